//! How a machine becomes a device: it asks with its site's code and its own public key ([`requests`]), an operator or the
//! site's open door decides ([`approvals`]), and the machine proves its key and gets tokens ([`tokens`]).

pub mod approvals;
pub mod machines;
pub mod rates;
pub mod requests;
pub mod tokens;

pub use approvals::expire_old;
