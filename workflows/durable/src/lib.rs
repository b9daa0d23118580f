#![doc = include_str!("../README.md")]
//!
//! # Inside
//!
//! A run is a row of `workflow_runs`, and that row is the truth. An apalis task in `apalis.jobs` is a *hint* that a run
//! is ready: it is written in the transaction that makes the run ready, and consumed in the statement that leases it.
//! So a lost, doubled or late hint is harmless, and nothing has to be acknowledged. The worker that commits a step goes on
//! with the next one under the same lease; hints lie only where a run starts, wakes, or changes hands.
//!
//! * [`definition`]: what a workflow is, and what a step may answer.
//! * [`start`]: starting, signalling, cancelling and retrying runs, in the caller's transaction.
//! * [`claim`]: from hints to leased runs; the apalis backend.
//! * [`commit`]: the one place where a step's outcome is written, fenced by its lease, batched naturally.
//! * `lease`: renewing what this process holds, and learning of cancellation.
//! * [`recovery`]: runs of dead workers, ended waits, lost hints.
//! * [`single`]: one operation at a time, for those who drive the runtime themselves.
//! * [`worker`]: the workflow type of its own on apalis' `IntoWorkerService`, and the process around it.

pub mod claim;
pub mod commit;
pub mod connect;
pub mod definition;
pub mod error;
pub mod fault;
pub mod gate;
mod lease;
pub mod metrics;
pub mod observer;
pub mod output;
pub mod recovery;
pub mod single;
pub mod start;
pub mod wakeup;
pub mod worker;

use std::time::Duration;

pub use definition::{
    Children, DEFAULT_LANE, Failure, Outcome, Registry, Services, StepContext, StepError, StepResult, Wait, Wake, Workflow,
    workflow,
};
pub use start::{
    CancelAsked, Child, ChildRun, NewRun, RetryAsked, Started, request_cancel, retry, signal, start, start_children, start_many,
};

/// The pool every function takes.
pub type Pool = sqlx::PgPool;
/// A transaction; what is written through it is committed together.
pub type Tx<'a> = sqlx::Transaction<'a, sqlx::Postgres>;
/// What asking the database answers.
pub type Result<T, E = sqlx::Error> = std::result::Result<T, E>;

/// How long a claimed step is ours without renewal. Database time.
pub const LEASE: Duration = Duration::from_secs(10);
/// How often leases are renewed, also during a step of forty minutes.
pub const RENEW_EVERY: Duration = Duration::from_secs(3);
/// A step whose worker died this often fails its run with `worker_lost`.
pub const MAX_WORKER_DEATHS: i32 = 3;
/// How often recovery looks for expired leases and ended waits.
pub const RECOVER_EVERY: Duration = Duration::from_millis(500);
/// How often the queue is polled when no notification comes; bounds the lateness of delayed and missed hints.
pub const POLL_EVERY: Duration = Duration::from_millis(500);
/// The most steps one commit batch carries.
pub const COMMIT_BATCH: usize = 500;
/// How many commit batches of a process may be under way at the same time.
pub const COMMIT_LANES: usize = 1;
/// The most runs one claim takes.
pub const CLAIM_BATCH: usize = 200;
/// The most signals, children and rows one recovery pass handles.
pub const RECOVER_BATCH: i64 = 500;

/// The name of the queue of one version of a workflow at a place, as `workflow_queue` makes it.
#[must_use]
pub fn queue(workflow: &str, version: i32, place: &str) -> String {
    let at = if place.is_empty() { "" } else { "@" };
    format!("{workflow}.v{version}{at}{place}")
}

/// The tables of the runtime, for [`setup_alone`].
const SCHEMA: &str = include_str!("../schema.sql");
/// Where it is looked for.
const TABLE: &str = "public.workflow_runs";

/// Prepares a database whose only tables for runs are the runtime's own: makes them unless they are there, and brings the queue's to
/// their version.
///
/// # Errors
/// When Postgres is away or refuses.
pub async fn setup_alone(pool: &Pool) -> Result<()> {
    let mut tx = pool.begin().await?;
    // Two programs that start at the same time make them once.
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtext('borealis.workflow_schema'))").execute(&mut *tx).await?;
    let is_there = sqlx::query_scalar!(r#"SELECT to_regclass($1) IS NOT NULL AS "is!""#, TABLE).fetch_one(&mut *tx).await?;
    if !is_there {
        sqlx::raw_sql(SCHEMA).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    setup(pool).await
}

/// Brings the queue's own tables to their version, in a database that has the tables of `schema.sql` by migrations of the
/// program's own.
///
/// # Errors
/// When Postgres is away, or its history of the queue's migrations is another.
pub async fn setup(pool: &Pool) -> Result<()> {
    apalis_postgres::PostgresStorage::setup(pool).await.map_err(|error| match error {
        apalis_postgres::Error::Database(error) => error,
        other => sqlx::Error::Configuration(Box::new(other)),
    })?;
    start::own_notifications(pool).await
}
