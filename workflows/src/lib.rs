//! How long work gets done: the durable runtime on apalis, and one file per workflow.

pub mod durable;
pub mod hold;
pub mod housekeeping;
pub mod metrics;
pub mod runs;
pub mod scheduled_run;
pub mod scheduler;
pub mod workers;

use std::{fmt, sync::Arc};

use borealis_engine::{Error, Result, db::Pool};
use uuid::Uuid;

pub use durable::start::{CancelAsked, Child, NewRun, Started, request_cancel, retry, signal, start, start_children, start_many};

/// The workflows of the engine: every version that may still have runs.
#[must_use]
pub fn registry() -> durable::definition::Registry {
    durable::definition::Registry::new([scheduled_run::definition()])
}

/// What a step may use besides its run.
#[derive(Clone)]
pub struct Services {
    /// The database.
    pub pool: Pool,
    /// The way to agents, through the API process.
    pub agents: Arc<dyn Agents>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

/// The way to agents: only API processes hold their sockets.
#[async_trait::async_trait]
pub trait Agents: Send + Sync {
    /// Asks the API to send what is ready for these devices, and to pass on cancels. It may be asked again at will: what
    /// was sent is marked, so a repetition sends nothing twice.
    async fn deliver(&self, devices: &[Uuid]) -> Result<()>;

    /// Asks an API process whether this worker may act. A runtime without API processes may.
    async fn confirm(&self) -> Result<hold::Confirmed> {
        Ok(hold::Confirmed { epoch: borealis_engine::hold::NO_EPOCH, may_act: true })
    }
}

/// Prepares a database: the engine's migrations, and the queue's.
///
/// # Errors
/// When Postgres is away, or its history is not a prefix of ours.
pub async fn setup(pool: &Pool) -> Result<()> {
    borealis_engine::db::migrate(pool).await?;
    apalis_postgres::PostgresStorage::setup(pool).await.map_err(|error| match error {
        apalis_postgres::Error::Database(error) => Error::from(error),
        other => Error::bug(other),
    })?;
    durable::start::own_notifications(pool).await
}
