//! What every handler can reach.

use std::sync::Arc;

use borealis_engine::{
    access::{Access, aegis::Vault},
    db,
    hold::Guard,
    keys::Keys,
};
use borealis_tasks::Tasks;
use tokio_util::sync::CancellationToken;

pub use crate::settings::Settings;
use crate::{event_streams::EventStreams, room::RoomOfAll, sockets::Hub};

/// The application state: cheap to clone.
#[derive(Debug, Clone)]
pub struct App(Arc<Inner>);

/// What is shared. Each room of the house adds its handle here.
#[derive(Debug)]
pub struct Inner {
    /// Settings of this process.
    pub settings: Settings,
    /// The database.
    pub pool: db::Pool,
    /// This process's id, new at every start.
    pub process_id: uuid::Uuid,
    /// Cancelled when this process stops: event streams and background tasks end with it.
    pub shutdown: CancellationToken,
    /// Keeps the long-lived tasks of this process going.
    pub tasks: Tasks,
    /// Whether the engine is held, and how far it has come.
    pub guard: Arc<Guard>,
    /// What seals and opens secrets.
    pub vault: Vault,
    /// Signing keys.
    pub keys: Keys,
    /// Sockets.
    pub hub: Hub,
    /// Event streams that are open.
    pub streams: EventStreams,
    /// The memory that bodies of requests may hold at once.
    pub rooms: RoomOfAll,
}

impl App {
    /// Wraps the shared state.
    #[must_use]
    pub fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// What sign-in works with.
    #[must_use]
    pub fn access(&self) -> Access<'_> {
        Access { pool: &self.pool, vault: &self.vault, settings: &self.settings.access }
    }
}

impl std::ops::Deref for App {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}
