//! One durable operation at a time, for those who drive the runtime themselves instead of letting a worker process do it: the
//! simulator of the tests. What happens here is what [`super::worker`] does, without its tasks and timers.

use std::{fmt, sync::Arc};

use borealis_engine::{
    Result,
    db::{Pool, Tx},
};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    claim::Claim,
    commit::{Commit, write},
    definition::{Registry, StepContext, StepError, StepResult, Wake, Workflow},
    lease, worker,
};
use crate::Services;

pub use lease::Renewed;

/// A step that has run: its answer, and what that means for its run, not yet written.
#[derive(Debug)]
pub struct Executed {
    /// The run.
    pub run_id: Uuid,
    /// The lease the step was claimed with.
    pub token: Uuid,
    workflow: Arc<Workflow>,
    step: String,
    attempt: i32,
    commit: Commit,
    /// The transaction the step has written through, which has to commit its outcome.
    pub tx: Option<Tx<'static>>,
}

impl Claim {
    /// The run that is claimed, and the token of its lease.
    #[must_use]
    pub fn lease(&self) -> (Uuid, Uuid) {
        (self.run_id, self.token)
    }

    /// Runs the claimed step. `None` when the registry does not know it. `jitter` is between 0 and 1.
    pub async fn execute(self, registry: &Registry, services: Arc<Services>, place: Place<'_>) -> Option<Executed> {
        let workflow = registry.find(place.workflow, place.version)?.clone();
        let step = workflow.find(&self.step)?;
        let context = StepContext {
            run_id: self.run_id,
            step: step.name,
            seq: self.seq,
            attempt: self.attempt,
            wake: Wake::read(self.wake.as_ref()),
            input: self.input,
            state: self.state,
            services,
            stop: place.stop,
            tx: None,
        };
        let (answer, tx) = worker::execute(workflow.clone(), step.name, context).await;
        let commit = Commit::decide(&workflow, step, (self.run_id, self.token, self.attempt), answer, place.jitter);
        let (run_id, token, attempt) = (self.run_id, self.token, self.attempt);
        Some(Executed { run_id, token, step: self.step, attempt, commit, workflow, tx })
    }
}

/// What a claim does not say of the step it is for.
#[derive(Debug)]
pub struct Place<'a> {
    /// The workflow whose queue was claimed from.
    pub workflow: &'a str,
    /// Its version.
    pub version: i32,
    /// Fires when the run is cancelled or the lease is lost.
    pub stop: CancellationToken,
    /// What the pause of a retry is varied by, between 0 and 1.
    pub jitter: f64,
}

impl fmt::Display for Executed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in try {}: {}", self.step, self.attempt, self.commit.kind)
    }
}

impl Executed {
    /// What is to be written instead when the step's own transaction did not commit: it failed like any other attempt.
    pub fn undone(&mut self, error: StepError) {
        self.tx = None;
        self.decide(Err(error));
    }

    fn decide(&mut self, answer: StepResult) {
        let Some(step) = self.workflow.find(&self.step) else { return };
        self.commit = Commit::decide(&self.workflow, step, (self.run_id, self.token, self.attempt), answer, 0.0);
    }

    /// Writes the outcome into the step's own transaction, which the caller then commits. False when the lease was lost.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn write_own(&mut self, worker: &str) -> Result<bool> {
        let Some(tx) = self.tx.as_mut() else { return Ok(false) };
        Ok(write(tx, worker, std::slice::from_ref(&self.commit)).await? == [true])
    }
}

/// Writes the outcomes of steps that have no transaction of their own, as one batch within the caller's. Answers, in order,
/// whether each was written.
///
/// # Errors
/// When the database refuses.
pub async fn write_batch(conn: &mut PgConnection, worker: &str, executed: &[&Executed]) -> Result<Vec<bool>> {
    let commits: Vec<Commit> = executed.iter().map(|executed| executed.commit.clone()).collect();
    write(conn, worker, &commits).await
}

/// Renews the leases of these runs, each given with its token, and answers those that still were theirs.
///
/// # Errors
/// When the database refuses.
pub async fn renew(pool: &Pool, leases: &[(Uuid, Uuid)]) -> Result<Vec<Renewed>> {
    let (runs, tokens): (Vec<Uuid>, Vec<Uuid>) = leases.iter().copied().unzip();
    lease::renew(pool, &runs, &tokens).await
}
