//! Benchmarks: real programs on a private Postgres that commits to disk, each figure beside a reference measured in the
//! same run on the same machine, so that it can be read as a ratio.
//!
//! * [`environment`]: the Postgres, the programs and the machine a bench runs on.
//! * [`report`]: figures, goals and references, as text and as JSON.
//! * [`reference`]: what the machine can do at best: `pgbench -N`.
//! * [`stand`]: an engine with machines; [`load`]: requests at a fixed rate; [`plain`]: the plainest programs beside it.
//! * [`statements`]: where Postgres' time went.
//! * one file per bench: [`durable`], [`dispatch`], [`scheduler`], [`agents`], [`calls`], [`api`], [`recovery`], [`waits`], [`idle`].
//! * [`peers`]: other systems beside ours.

pub mod access;
pub mod agents;
pub mod api;
pub mod calls;
pub mod dispatch;
pub mod durable;
pub mod environment;
pub mod idle;
pub mod load;
pub mod peers;
pub mod plain;
pub mod recovery;
pub mod reference;
pub mod report;
pub mod scheduler;
pub mod stand;
pub mod statements;
pub mod waits;

pub use environment::Environment;
pub use report::{Figure, Latencies, Report};

/// How many of something happened in a second.
#[allow(clippy::cast_precision_loss)]
fn per_second(count: usize, lasted: std::time::Duration) -> f64 {
    count as f64 / lasted.as_secs_f64()
}
