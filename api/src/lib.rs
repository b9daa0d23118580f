//! How Borealis Engine is reached: HTTP routes, sockets, and the OpenAPI document. No SQL lives here.

pub mod access;
pub mod admin;
pub mod app;
pub mod audit_webhook;
pub mod body;
pub mod connections;
pub mod document;
pub mod errors;
pub mod event_streams;
pub mod github;
pub mod internal;
pub mod large;
pub mod metrics;
pub mod page;
pub mod reconcilers;
pub mod room;
pub mod routes;
pub mod serve;
pub mod settings;
pub mod sockets;
pub mod state;
pub mod up;
