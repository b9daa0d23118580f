//! The durable runtime: workflows whose every step is committed once, wherever and however often processes die.
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
//! * [`lease`]: renewing what this process holds, and learning of cancellation.
//! * [`recovery`]: runs of dead workers, ended waits, lost hints.
//! * [`single`]: one operation at a time, for the simulator of the tests.
//! * [`worker`]: the workflow type of its own on apalis' `IntoWorkerService`, and the process around it.

pub mod claim;
pub mod commit;
pub mod definition;
pub mod fault;
pub mod lease;
pub mod recovery;
pub mod single;
pub mod start;
pub mod wakeup;
pub mod worker;

use std::time::Duration;

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

/// The name of the queue of one version of a workflow.
#[must_use]
pub fn queue(workflow: &str, version: i32) -> String {
    format!("{workflow}.v{version}")
}
