//! One durable operation at a time, for those who drive the runtime themselves instead of letting a worker process do it: the
//! simulator of the tests. What happens here is what [`super::worker`] does, without its tasks and timers.

use std::{fmt, sync::Arc};

use serde_json::Value;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Pool, Result, Tx,
    claim::Claim,
    commit::{Attempt, Commit, Written, transaction, write},
    definition::{Failure, Outcome, Registry, Services, StepContext, Wake, Workflow},
    lease,
    output::Output,
    worker,
};

pub use lease::Renewed;

/// A step that has run: its answer, and what that means for its run, not yet written.
pub struct Executed<S> {
    workflow: Arc<Workflow<S>>,
    step: &'static str,
    commit: Commit,
    /// The claim of the next step, if the lease stays ours.
    next: Option<Claim>,
    /// The transaction the step has written through, which has to commit its outcome.
    pub tx: Option<Tx<'static>>,
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
    /// Whether the worker would run the next step at once.
    pub goes_on: bool,
}

impl Claim {
    /// The run that is claimed, and the token of its lease.
    #[must_use]
    pub fn lease(&self) -> (Uuid, Uuid) {
        (self.run_id, self.token)
    }

    /// Runs the claimed step. `None` when the registry does not know it.
    pub async fn execute<S: Services>(self, registry: &Registry<S>, services: Arc<S>, place: Place<'_>) -> Option<Executed<S>> {
        let workflow = registry.find(place.workflow, place.version)?.clone();
        let step = workflow.find(&self.step)?;
        let of =
            Attempt { run_id: self.run_id, token: self.token, seq: self.seq, attempt: self.attempt, is_child: self.is_child };
        let context = StepContext {
            run_id: self.run_id,
            step: step.name,
            seq: self.seq,
            attempt: self.attempt,
            wake: Wake::read(self.wake.as_ref()),
            input: self.input.clone(),
            state: self.state,
            output: Output::new(services.pool().clone(), self.run_id, self.token, self.seq, self.attempt),
            services,
            stop: place.stop,
            tx: None,
        };
        let (answer, tx) = worker::execute(step, context).await;
        let state = if let Ok(Outcome::Next(state)) = &answer { state.clone() } else { Value::Null };
        let next = workflow.after(step.name).map(|next| Claim {
            run_id: self.run_id,
            token: self.token,
            step: next.name.to_owned(),
            seq: self.seq + 1,
            attempt: 1,
            input: self.input,
            state,
            wake: None,
            is_child: self.is_child,
            slot: None,
        });
        let commit = Commit::decide(&workflow, step, of, answer, place.jitter, place.goes_on);
        let step = step.name;
        Some(Executed { step, commit, next, workflow, tx })
    }
}

impl<S: Services> Executed<S> {
    /// What is to be written instead when the step's own transaction did not commit: it failed like any other attempt.
    pub fn undone(&mut self, error: Failure) {
        self.tx = None;
        if let Some(step) = self.workflow.find(self.step) {
            self.commit = Commit::decide(&self.workflow, step, self.commit.of.clone(), Err(error), 0.0, false);
        }
    }

    /// Writes the outcome into the step's own transaction, which the caller then commits.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn write_own(&mut self, worker: &str) -> Result<Written> {
        let Some(tx) = self.tx.as_mut() else { return Ok(Written::Lost) };
        Ok(write(tx, worker, std::slice::from_ref(&self.commit)).await?.first().copied().unwrap_or(Written::Lost))
    }

    /// The claim of the next step, after [`Written::Kept`].
    #[must_use]
    pub fn next(self) -> Option<Claim> {
        self.next
    }
}

impl<S> fmt::Debug for Executed<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executed({self})")
    }
}

impl<S> fmt::Display for Executed<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in try {}: {}", self.step, self.commit.of.attempt, self.commit.kind)
    }
}

/// Commits the outcomes of steps that have no transaction of their own, as one batch. Answers, in order, what became of each.
///
/// # Errors
/// When the database refuses; the same batch may be tried again.
pub async fn commit_batch<S>(pool: &Pool, worker: &str, executed: &[&Executed<S>]) -> Result<Vec<Written>> {
    transaction(pool, worker, &commits(executed)).await
}

/// As [`commit_batch`], through the caller's transaction.
///
/// # Errors
/// When the database refuses.
pub async fn write_batch<S>(conn: &mut PgConnection, worker: &str, executed: &[&Executed<S>]) -> Result<Vec<Written>> {
    write(conn, worker, &commits(executed)).await
}

fn commits<S>(executed: &[&Executed<S>]) -> Vec<Commit> {
    executed.iter().map(|executed| executed.commit.clone()).collect()
}

/// Renews the leases of these runs, each given with its token, and answers those that still were theirs.
///
/// # Errors
/// When the database refuses.
pub async fn renew(pool: &Pool, leases: &[(Uuid, Uuid)]) -> Result<Vec<Renewed>> {
    let (runs, tokens): (Vec<Uuid>, Vec<Uuid>) = leases.iter().copied().unzip();
    lease::renew(pool, &runs, &tokens).await
}
