//! What is known of a machine.

pub mod calls;
pub mod clean;
pub mod hostnames;
pub mod ingest;
pub mod labels;
pub mod list;
pub mod lookup;
pub mod metadata;
pub mod role_health;
mod shown;
pub mod sockets;
pub mod summary;
