//! What things are: the domain types, rules, SQL and cryptography of Borealis Engine.
//!
//! This crate knows no HTTP, no queue and no sockets of agents or people; beside Postgres it speaks to directories. Each noun of the house has one module, named as in
//! `docs/architecture.md`; a module is types, rules as pure functions, then the store functions with their SQL.

pub mod access;
pub mod assemblies;
pub mod audit;
pub mod bus;
pub mod cluster;
pub mod db;
pub mod devices;
pub mod egress;
pub mod enrollment;
pub mod error;
pub mod hold;
pub mod idempotency;
pub mod instants;
pub mod internal;
pub mod jobs;
pub mod json;
pub mod keys;
pub mod names;
pub mod quotas;
pub mod schema;
pub mod scope;
pub mod secret;
pub mod sites;
pub mod state_dir;
pub mod time_zones;
pub mod work;

pub use error::{Error, Kind, Result};
pub use scope::{Actor, ActorKind, ActorToken, Caller, Scope};
pub use secret::Secret;
