//! What is known of a machine.

pub mod clean;
pub mod hostnames;
pub mod ingest;
pub mod labels;
pub mod list;
pub mod metadata;
pub mod role_health;
pub mod sockets;
pub mod summary;
