//! What the fleet counts, so that loss and doubling show.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use hdrhistogram::Histogram;

use super::lock;

/// Sums over all agents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Agents with a registered socket now.
    pub connected: u64,
    /// Registrations, each reconnect counted.
    pub connects: u64,
    /// Connects that failed or were refused.
    pub failed_connects: u64,
    /// Sockets that ended for another reason than an order of the test.
    pub lost_sockets: u64,
    /// Dispatches received, those that came again included.
    pub received: u64,
    /// Of these, dispatches the agent knew already.
    pub redelivered: u64,
    /// Of these, dispatches that came again on the very connection they had come on.
    pub repeated: u64,
    /// Dispatches an agent refused: wrong signature, envelope or device.
    pub refused: u64,
    /// Dispatches begun: the effect of a script.
    pub executed: u64,
    /// Executions beyond the first of the same dispatch, or of the same run and script.
    pub doubled: u64,
    /// Dispatches ended by a cancel.
    pub cancelled: u64,
    /// Results made; each counts once, however often it is sent.
    pub results: u64,
    /// Sendings of results beyond the first.
    pub resent: u64,
    /// Of these, sendings because the engine had not answered the one before in time, on the same connection.
    pub unanswered: u64,
    /// Results the engine has acknowledged.
    pub acked: u64,
    /// Of these, those it had no use for.
    pub ignored: u64,
    /// Results it has not acknowledged yet.
    pub unacked: u64,
    /// Heartbeats and status reports that were taken.
    pub reports: u64,
    /// Heartbeats and status reports that failed.
    pub failed_reports: u64,
}

/// A dispatch that came.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    /// The agent's place among the machines.
    pub agent: usize,
    /// The dispatch: the activity's id.
    pub dispatch: i64,
    /// The scheduled job's run on this device, when it belongs to one.
    pub run: Option<i64>,
    /// When it came.
    pub at: DateTime<Utc>,
}

/// A dispatch that was begun.
#[derive(Debug, Clone, Copy)]
pub struct Execution {
    /// The agent's place among the machines.
    pub agent: usize,
    /// The dispatch.
    pub dispatch: i64,
    /// When it was begun.
    pub at: DateTime<Utc>,
}

/// How long things took, in microseconds.
#[derive(Debug, Clone)]
pub struct Latencies {
    /// From the start of a TCP connect to the answer of `connect_agent`.
    pub connect: Histogram<u64>,
    /// A heartbeat or status report, from its connect to its answer.
    pub report: Histogram<u64>,
    /// From the first sending of a result to its ack.
    pub ack: Histogram<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        let histogram = || Histogram::new_with_bounds(1, 600_000_000, 3).expect("bounds that fit");
        Self { connect: histogram(), report: histogram(), ack: histogram() }
    }
}

/// Records a time.
pub fn note(histogram: &mut Histogram<u64>, took: Duration) {
    histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
}

/// The counters behind [`Counts`].
#[derive(Debug, Default)]
pub struct Sums {
    pub connected: AtomicU64,
    pub connects: AtomicU64,
    pub failed_connects: AtomicU64,
    pub lost_sockets: AtomicU64,
    pub redelivered: AtomicU64,
    pub repeated: AtomicU64,
    pub refused: AtomicU64,
    pub cancelled: AtomicU64,
    pub results: AtomicU64,
    pub resent: AtomicU64,
    pub unanswered: AtomicU64,
    pub acked: AtomicU64,
    pub ignored: AtomicU64,
    pub reports: AtomicU64,
    pub failed_reports: AtomicU64,
}

/// Adds one.
pub fn count(sum: &AtomicU64) {
    sum.fetch_add(1, Ordering::Relaxed);
}

#[derive(Debug, Default)]
struct Log {
    receipts: Vec<Receipt>,
    executions: Vec<Execution>,
    /// Executions of each dispatch, and of each run and script, on each agent.
    of_dispatch: HashMap<(usize, i64), u64>,
    of_run: HashMap<(usize, i64, String), u64>,
    doubled: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Record {
    /// What is only counted.
    pub sums: Sums,
    log: Mutex<Log>,
    latencies: Mutex<Latencies>,
}

impl Record {
    /// A dispatch has come.
    pub fn receive(&self, agent: usize, dispatch: i64, run: Option<i64>) {
        lock(&self.log).receipts.push(Receipt { agent, dispatch, run, at: Utc::now() });
    }

    /// A dispatch is begun; `run` and `script` say what it is for.
    pub fn execute(&self, agent: usize, dispatch: i64, run: Option<i64>, script: &str) {
        let mut log = lock(&self.log);
        log.executions.push(Execution { agent, dispatch, at: Utc::now() });
        let times = log.of_dispatch.entry((agent, dispatch)).or_default();
        *times += 1;
        let again = *times > 1;
        let of_run = run.map(|run| {
            let times = log.of_run.entry((agent, run, script.to_owned())).or_default();
            *times += 1;
            *times > 1
        });
        if again || of_run == Some(true) {
            log.doubled += 1;
        }
    }

    /// The histograms, to add to.
    pub fn times(&self) -> std::sync::MutexGuard<'_, Latencies> {
        lock(&self.latencies)
    }

    /// A copy of the histograms.
    pub fn latencies(&self) -> Latencies {
        self.times().clone()
    }

    /// Begins new ones.
    pub fn forget_latencies(&self) {
        *self.times() = Latencies::default();
    }

    /// A copy.
    pub fn receipts(&self) -> Vec<Receipt> {
        lock(&self.log).receipts.clone()
    }

    /// A copy.
    pub fn executions(&self) -> Vec<Execution> {
        lock(&self.log).executions.clone()
    }

    /// The sums now.
    pub fn counts(&self) -> Counts {
        let of = |sum: &AtomicU64| sum.load(Ordering::Relaxed);
        let sums = &self.sums;
        // Acks before results: an ack that comes in between must not make the difference negative.
        let acked = of(&sums.acked);
        let results = of(&sums.results);
        let log = lock(&self.log);
        Counts {
            connected: of(&sums.connected),
            connects: of(&sums.connects),
            failed_connects: of(&sums.failed_connects),
            lost_sockets: of(&sums.lost_sockets),
            received: log.receipts.len() as u64,
            redelivered: of(&sums.redelivered),
            repeated: of(&sums.repeated),
            refused: of(&sums.refused),
            executed: log.executions.len() as u64,
            doubled: log.doubled,
            cancelled: of(&sums.cancelled),
            results,
            resent: of(&sums.resent),
            unanswered: of(&sums.unanswered),
            acked,
            ignored: of(&sums.ignored),
            unacked: results.saturating_sub(acked),
            reports: of(&sums.reports),
            failed_reports: of(&sums.failed_reports),
        }
    }
}
