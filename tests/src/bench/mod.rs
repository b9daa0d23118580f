//! Benchmarks: real programs on a private Postgres that commits to disk, each figure beside a reference measured in the
//! same run on the same machine, so that it can be read as a ratio.
//!
//! * [`environment`]: the Postgres, the programs and the machine a bench runs on.
//! * [`report`]: figures, goals and references, as text and as JSON.
//! * [`reference`]: what the machine can do at best: `pgbench -N`.
//! * one file per bench: [`durable`].

pub mod durable;
pub mod environment;
pub mod reference;
pub mod report;

pub use environment::Environment;
pub use report::{Figure, Latencies, Report};
