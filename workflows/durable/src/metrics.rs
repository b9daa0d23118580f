//! What the runtime tells of itself, in the registry of `prometheus` of the process.
//!
//! On the way of a step there are only additions to handles that were looked up when its workflow was first run
//! ([`StepMeters`]). Labels take values from a set that the code knows: workflows, steps, outcomes.

use std::{
    collections::HashMap,
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, core::Collector};
use uuid::Uuid;

use crate::{
    commit::{Commit, Ending, Written},
    definition::CANCEL_STEP,
    observer,
};

/// Buckets for what takes from half a millisecond to minutes, in seconds.
const SECONDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0, 300.0];
/// Buckets for the sizes of batches of up to some thousand.
const SIZES: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];

/// A name that is none or is taken is a fault that every start would show.
#[allow(clippy::panic)]
fn registered<C: Collector + Clone + 'static>(name: &str, made: prometheus::Result<C>) -> C {
    match made.and_then(|meter| prometheus::register(Box::new(meter.clone())).map(|()| meter)) {
        Ok(meter) => meter,
        Err(error) => panic!("the meter {name} cannot be used: {error}"),
    }
}

fn counter(name: &str, help: &str) -> IntCounter {
    registered(name, IntCounter::new(name, help))
}

fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(name, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(name: &str, help: &str) -> IntGauge {
    registered(name, IntGauge::new(name, help))
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> Histogram {
    registered(name, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

fn histograms(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    registered(name, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
}

/// Meters of the runtime.
#[derive(Debug)]
pub(crate) struct Meters {
    pub started: IntCounterVec,
    pub claims: HistogramVec,
    pub claimed: IntCounterVec,
    pub hand_over: Histogram,
    pub commit_batch: Histogram,
    pub commit_seconds: Histogram,
    pub leases: IntGauge,
    pub lost_at_commit: IntCounter,
    pub lost_at_renewal: IntCounter,
    pub lost_in_silence: IntCounter,
    pub run_again: IntCounter,
    pub run_failed: IntCounter,
    pub hints_rewritten: IntCounter,
    pub waits_ended: IntCounter,
    pub errors: IntCounterVec,
    steps: IntCounterVec,
    step_seconds: HistogramVec,
    ended: IntCounterVec,
}

pub(crate) static METERS: LazyLock<Meters> = LazyLock::new(|| {
    let lost = counters(
        "borealis_lease_losses_total",
        "Leases this process lost while it held them, by how it noticed: commit (its outcome was refused), renewal (it was told), \
         silence (no word from Postgres for a whole lease).",
        &["noticed"],
    );
    let recovered = counters(
        "borealis_runs_recovered_total",
        "Runs this process took back from workers that are gone, by what became of them: again or failed.",
        &["fate"],
    );
    Meters {
        started: counters(
            "borealis_runs_started_total",
            "Runs written by this process, those of transactions that were rolled back included.",
            &["workflow"],
        ),
        claims: histograms("borealis_claim_seconds", "How long claims took.", &["queue"], &SECONDS),
        claimed: counters("borealis_claimed_runs_total", "Runs leased by claims.", &["queue"]),
        hand_over: histogram(
            "borealis_step_handover_seconds",
            "From the answer of a step to the beginning of the next one under the same lease.",
            &SECONDS,
        ),
        commit_batch: histogram("borealis_commit_batch_size", "Outcomes in one commit.", &SIZES),
        commit_seconds: histogram("borealis_commit_seconds", "How long commits of batches took, tries included.", &SECONDS),
        leases: gauge("borealis_leases_held", "Leases this process holds now."),
        lost_at_commit: lost.with_label_values(&["commit"]),
        lost_at_renewal: lost.with_label_values(&["renewal"]),
        lost_in_silence: lost.with_label_values(&["silence"]),
        run_again: recovered.with_label_values(&["again"]),
        run_failed: recovered.with_label_values(&["failed"]),
        hints_rewritten: counter("borealis_hints_rewritten_total", "Runs that were ready, had no hint, and were queued again."),
        waits_ended: counter("borealis_waits_ended_total", "Waits this process ended because their instant had come."),
        errors: counters(
            "borealis_pass_errors_total",
            "Passes of a standing task that failed and are tried again, most often because Postgres is away.",
            &["task"],
        ),
        steps: counters(
            "borealis_steps_total",
            "Attempts of steps, by what was written of them: committed, waiting, retried, failed, released or lost (nothing).",
            &["workflow", "step", "outcome"],
        ),
        step_seconds: histograms(
            "borealis_step_seconds",
            "How long attempts of steps ran, without their commit.",
            &["workflow", "step"],
            &SECONDS,
        ),
        ended: counters(
            "borealis_runs_ended_total",
            "Runs that ended in this process, by their last state.",
            &["workflow", "state"],
        ),
    }
});

/// The standing tasks of the runtime whose passes may fail.
const TASKS: [&str; 4] = ["claim", "commit", "recovery", "renewal"];

/// Shows the meters from the start of the process, at nought; `tasks` are those of the program that use [`failed_pass`].
pub fn show(tasks: &[&str]) {
    for task in TASKS.iter().chain(tasks) {
        METERS.errors.with_label_values(&[task]);
    }
}

/// How often a statement of the runtime found no free connection in time.
static POOL_TIMEOUTS: AtomicU64 = AtomicU64::new(0);

/// How often a statement of the runtime's standing tasks found no free connection in time, since the start of the process.
#[must_use]
pub fn pool_timeouts() -> u64 {
    POOL_TIMEOUTS.load(Ordering::Relaxed)
}

/// Counts a failed pass of a standing task of the runtime, and what it failed of.
pub(crate) fn failed(task: &str, error: &sqlx::Error) {
    if matches!(error, sqlx::Error::PoolTimedOut) {
        POOL_TIMEOUTS.fetch_add(1, Ordering::Relaxed);
    }
    failed_pass(task);
}

/// Counts a failed pass of a standing task.
pub fn failed_pass(task: &str) {
    METERS.errors.with_label_values(&[task]).inc();
}

/// Counts runs that were written.
pub(crate) fn runs_started(workflow: &str, count: usize) {
    METERS.started.with_label_values(&[workflow]).inc_by(u64::try_from(count).unwrap_or(0));
}

/// Counts a run that recovery ended.
pub(crate) fn run_failed_by_recovery(run: Uuid, workflow: &str) {
    METERS.ended.with_label_values(&[workflow, "failed"]).inc();
    observer::run_ended(run, workflow, "failed");
}

/// The handles of one step of a workflow. Looked up once, kept for as long as the process lives.
#[derive(Debug)]
pub struct StepMeters {
    pub(crate) seconds: Histogram,
    workflow: &'static str,
    committed: IntCounter,
    waiting: IntCounter,
    retried: IntCounter,
    failed: IntCounter,
    released: IntCounter,
    lost: IntCounter,
    run_succeeded: IntCounter,
    run_failed: IntCounter,
    run_cancelled: IntCounter,
}

impl StepMeters {
    /// Those of this step; the same for every definition of that name.
    pub(crate) fn of(workflow: &'static str, step: &'static str) -> &'static Self {
        static KNOWN: LazyLock<Mutex<HashMap<(&str, &str), &'static StepMeters>>> = LazyLock::new(Mutex::default);
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        // Workflows are code: there are as many of these as steps are written.
        known.entry((workflow, step)).or_insert_with(|| Box::leak(Box::new(Self::new(workflow, step))))
    }

    fn new(workflow: &'static str, step: &'static str) -> Self {
        let steps = |outcome| METERS.steps.with_label_values(&[workflow, step, outcome]);
        let ended = |state| METERS.ended.with_label_values(&[workflow, state]);
        Self {
            seconds: METERS.step_seconds.with_label_values(&[workflow, step]),
            workflow,
            committed: steps("committed"),
            waiting: steps("waiting"),
            retried: steps("retried"),
            failed: steps("failed"),
            released: steps("released"),
            lost: steps("lost"),
            run_succeeded: ended("succeeded"),
            run_failed: ended("failed"),
            run_cancelled: ended("cancelled"),
        }
    }

    /// Counts what became of an outcome, once it is certain.
    pub(crate) fn count(&self, run: Uuid, ending: Ending, is_cancel: bool, written: Written) {
        if written == Written::Lost {
            self.lost.inc();
            METERS.lost_at_commit.inc();
            return;
        }
        match ending {
            Ending::Waits => self.waiting.inc(),
            Ending::Retries => self.retried.inc(),
            Ending::Released => self.released.inc(),
            Ending::Fails => self.failed.inc(),
            Ending::GoesOn | Ending::Ends => self.committed.inc(),
        }
        let (counter, state) = match ending {
            Ending::Fails => (&self.run_failed, "failed"),
            Ending::Ends if is_cancel => (&self.run_cancelled, "cancelled"),
            Ending::Ends => (&self.run_succeeded, "succeeded"),
            _ => return,
        };
        counter.inc();
        observer::run_ended(run, self.workflow, state);
    }
}

/// Counts what became of outcomes, once that is certain.
pub(crate) fn count(commits: &[Commit], written: &[Written]) {
    for (commit, written) in commits.iter().zip(written) {
        commit.meters.count(commit.of.run_id, commit.ending(), commit.step() == CANCEL_STEP, *written);
    }
}
