//! How long work gets done: one file per workflow, and the use cases that start or steer them. The runtime is `durable`, a crate of its
//! own.

pub mod hold;
pub mod housekeeping;
pub mod jobs;
pub mod metrics;
pub mod runs;
pub mod scheduled_run;
pub mod scheduler;
pub mod traces;
pub mod workers;

use std::{fmt, sync::Arc};

use borealis_engine::{
    Error, Result,
    db::Pool,
    devices::calls::{Call, Outcome, Spec},
};
use durable::Failure;
use serde_json::Value;
use uuid::Uuid;

pub use borealis_durable as durable;
pub use durable::{CancelAsked, Child, NewRun, Started, request_cancel, retry, signal, start, start_children, start_many};

/// A workflow of the engine.
pub type Workflow = durable::Workflow<Services>;
/// Workflows of the engine.
pub type Registry = durable::Registry<Services>;
/// What a step of them sees.
pub type StepContext = durable::StepContext<Services>;

/// The workflows of the engine: every version that may still have runs.
#[must_use]
pub fn registry() -> Registry {
    Registry::new([scheduled_run::definition()])
}

/// What a step may use besides its run.
#[derive(Clone)]
pub struct Services {
    /// The database.
    pub pool: Pool,
    /// The way to agents, through the API process.
    pub agents: Arc<dyn Agents>,
}

impl durable::Services for Services {
    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn judge(&self, error: Box<dyn std::error::Error + Send + Sync>) -> Failure {
        let error = match error.downcast::<Error>() {
            Ok(error) => *error,
            Err(error) => match error.downcast::<sqlx::Error>() {
                Ok(error) => Error::from(*error),
                Err(error) => return Failure::Final(format!("internal_error: {error}")),
            },
        };
        let text = match &error.source {
            Some(source) => format!("{}: {} ({source})", error.code, error.message),
            None => format!("{}: {}", error.code, error.message),
        };
        if error.is_transient() { Failure::Transient(text) } else { Failure::Final(text) }
    }
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

    /// Asks a device's agent and waits for what comes of it, at most for the call's time limit. It is sent at most once: a caller
    /// that needs it done must be able to ask again. A runtime without API processes reaches no agent.
    async fn call(&self, device: Uuid, call: Spec, request: Value) -> Result<Outcome> {
        let _ = (device, call, request);
        Ok(Outcome::Away)
    }

    /// Asks an API process whether this worker may act. A runtime without API processes may.
    async fn confirm(&self) -> Result<hold::Confirmed> {
        Ok(hold::Confirmed { epoch: borealis_engine::hold::NO_EPOCH, may_act: true })
    }
}

impl dyn Agents {
    /// Asks a device's agent.
    ///
    /// # Errors
    /// As [`Outcome::into_reply`], and those of the way to the API processes.
    pub async fn ask<C: Call>(&self, device: Uuid, request: &C::Request) -> Result<C::Reply> {
        self.call(device, Spec::of::<C>(), serde_json::to_value(request)?).await?.into_reply::<C>()
    }
}

/// Prepares a database: the engine's migrations, and the queue's.
///
/// # Errors
/// When Postgres is away, or its history is not a prefix of ours.
pub async fn setup(pool: &Pool) -> Result<()> {
    borealis_engine::db::migrate(pool).await?;
    Ok(durable::setup(pool).await?)
}
