//! What the core tells of itself. Every meter of the durable runtime and the scheduler is declared here; the names are
//! explained in `docs/operations.md`, which a test compares.
//!
//! On the way of a step there are only additions to handles that were looked up when its workflow was first run
//! ([`StepMeters`]). What is in the tables is looked up by [`Tables`], seldom and with bounds.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use borealis_engine::{Result, db, db::Pool, time_zones};
use borealis_telemetry::{
    listener,
    meter::{self, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec},
    trace,
};
use chrono::Utc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::durable::{
    commit::{Commit, Ending, Written},
    definition::CANCEL_STEP,
    worker::PLANS,
};

/// Meters of the durable runtime and the scheduler.
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
    pub leads: IntGauge,
    pub lateness: Histogram,
    pub jobs_decided: IntCounter,
    pub instants: IntCounterVec,
    steps: IntCounterVec,
    step_seconds: HistogramVec,
    ended: IntCounterVec,
}

pub(crate) static METERS: LazyLock<Meters> = LazyLock::new(|| {
    let lost = meter::counters(
        "borealis_lease_losses_total",
        "Leases this process lost while it held them, by how it noticed: commit (its outcome was refused), renewal (it was told), \
         silence (no word from Postgres for a whole lease).",
        &["noticed"],
    );
    let recovered = meter::counters(
        "borealis_runs_recovered_total",
        "Runs this process took back from workers that are gone, by what became of them: again or failed.",
        &["fate"],
    );
    Meters {
        started: meter::counters(
            "borealis_runs_started_total",
            "Runs written by this process, those of transactions that were rolled back included.",
            &["workflow"],
        ),
        claims: meter::histograms("borealis_claim_seconds", "How long claims took.", &["queue"], &meter::SECONDS),
        claimed: meter::counters("borealis_claimed_runs_total", "Runs leased by claims.", &["queue"]),
        hand_over: meter::histogram(
            "borealis_step_handover_seconds",
            "From the answer of a step to the beginning of the next one under the same lease.",
            &meter::SECONDS,
        ),
        commit_batch: meter::histogram("borealis_commit_batch_size", "Outcomes in one commit.", &meter::SIZES),
        commit_seconds: meter::histogram(
            "borealis_commit_seconds",
            "How long commits of batches took, tries included.",
            &meter::SECONDS,
        ),
        leases: meter::gauge("borealis_leases_held", "Leases this process holds now."),
        lost_at_commit: lost.with_label_values(&["commit"]),
        lost_at_renewal: lost.with_label_values(&["renewal"]),
        lost_in_silence: lost.with_label_values(&["silence"]),
        run_again: recovered.with_label_values(&["again"]),
        run_failed: recovered.with_label_values(&["failed"]),
        hints_rewritten: meter::counter(
            "borealis_hints_rewritten_total",
            "Runs that were ready, had no hint, and were queued again.",
        ),
        waits_ended: meter::counter("borealis_waits_ended_total", "Waits this process ended because their instant had come."),
        errors: meter::counters(
            "borealis_pass_errors_total",
            "Passes of a standing task that failed and are tried again, most often because Postgres is away.",
            &["task"],
        ),
        leads: meter::gauge("borealis_scheduler_leads", "1 while this process leads as scheduler."),
        lateness: meter::histogram(
            "borealis_scheduler_lateness_seconds",
            "From the instant at which a job was due to the pass that decided it.",
            &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 90.0, 600.0],
        ),
        jobs_decided: meter::counter("borealis_scheduler_jobs_decided_total", "Due jobs this process has decided."),
        instants: meter::counters(
            "borealis_scheduler_instants_total",
            "Due instants of jobs, by what became of them: run, queued, overlap or misfire.",
            &["decision"],
        ),
        steps: meter::counters(
            "borealis_steps_total",
            "Attempts of steps, by what was written of them: committed, waiting, retried, failed, released or lost (nothing).",
            &["workflow", "step", "outcome"],
        ),
        step_seconds: meter::histograms(
            "borealis_step_seconds",
            "How long attempts of steps ran, without their commit.",
            &["workflow", "step"],
            &meter::SECONDS,
        ),
        ended: meter::counters(
            "borealis_runs_ended_total",
            "Runs that ended in this process, by their last state.",
            &["workflow", "state"],
        ),
    }
});

/// The standing tasks of a worker whose passes may fail.
const TASKS: [&str; 7] = ["claim", "commit", "deadlines", "recovery", "renewal", "retention", "scheduler"];

/// Shows the meters of a worker from its start, at nought.
pub fn show() {
    for task in TASKS {
        METERS.errors.with_label_values(&[task]);
    }
}

/// Counts a failed pass of a standing task.
pub(crate) fn failed_pass(task: &str) {
    METERS.errors.with_label_values(&[task]).inc();
}

/// Counts runs that were written.
pub(crate) fn runs_started(workflow: &str, count: usize) {
    METERS.started.with_label_values(&[workflow]).inc_by(u64::try_from(count).unwrap_or(0));
}

/// Counts a run that recovery ended.
pub(crate) fn run_failed_by_recovery(run: Uuid, workflow: &str) {
    METERS.ended.with_label_values(&[workflow, "failed"]).inc();
    trace::run_ended(run, workflow.to_owned(), "failed");
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
        trace::run_ended(run, self.workflow, state);
    }
}

/// Counts what became of outcomes, once that is certain.
pub(crate) fn count(commits: &[Commit], written: &[Written]) {
    for (commit, written) in commits.iter().zip(written) {
        commit.meters.count(commit.of.run_id, commit.ending(), commit.step() == CANCEL_STEP, *written);
    }
}

/// What is not counted where it happens: the state of the pools, and of the tables.
#[derive(Debug)]
struct Looked {
    connections: IntGaugeVec,
    timeouts: IntCounter,
    task_restarts: IntCounterVec,
    task_failing: IntGaugeVec,
    zones_version: IntGauge,
    zones_age: Gauge,
    up: IntGauge,
    failures: IntCounter,
    seconds: Gauge,
    ready: IntGaugeVec,
    ready_age: GaugeVec,
    leased: IntGaugeVec,
    lease_overdue: GaugeVec,
    workers: IntGaugeVec,
    schedulers: IntGaugeVec,
    schedule_overdue: GaugeVec,
    activities: IntGaugeVec,
    devices: IntGaugeVec,
}

static LOOKED: LazyLock<Looked> = LazyLock::new(|| Looked {
    connections: meter::gauges(
        "borealis_pool_connections",
        "Connections to Postgres of this process, by pool and state: open, idle (some of those that are open), max.",
        &["pool", "state"],
    ),
    timeouts: meter::counter("borealis_pool_timeouts_total", "How often no connection came free within 5 s."),
    task_restarts: meter::counters(
        "borealis_task_restarts_total",
        "How often a long-lived task of this process failed and was started again.",
        &["task"],
    ),
    task_failing: meter::gauges(
        "borealis_task_failing",
        "1 while a long-lived task of this process does not run, failed within the last minute, or hangs.",
        &["task"],
    ),
    zones_version: meter::gauge(
        "borealis_time_zones_version",
        "The version of the rules of time zones as year and number of its letter: 202606 is 2026f. 0 when it is not known.",
    ),
    zones_age: meter::measure(
        "borealis_time_zones_age_seconds",
        "How old the rules of time zones are at least; more than a year when it is not known.",
    ),
    up: meter::gauge("borealis_postgres_up", "1 when Postgres answered the last look at the tables."),
    failures: meter::counter("borealis_tables_failures_total", "Looks at the tables for metrics that failed or took too long."),
    seconds: meter::measure("borealis_tables_seconds", "How long the last look at the tables took."),
    ready: meter::gauges(
        "borealis_queue_ready_runs",
        "Runs that are ready and that nobody has claimed. All queues together count to 100000 at most. From the tables.",
        &["queue"],
    ),
    ready_age: meter::measures(
        "borealis_queue_oldest_ready_seconds",
        "How long the oldest of them has been ready. From the tables.",
        &["queue"],
    ),
    leased: meter::gauges("borealis_runs_leased", "Runs that a worker holds. From the tables.", &[]),
    lease_overdue: meter::measures(
        "borealis_lease_overdue_seconds",
        "How long ago the oldest lease ran out that nobody has taken back. From the tables.",
        &[],
    ),
    workers: meter::gauges(
        "borealis_workers",
        "Worker processes: alive, or lost (silent for 15 s without having stopped; forgotten after a day). From the tables.",
        &["state"],
    ),
    schedulers: meter::gauges("borealis_schedulers", "Workers that lead as scheduler: one, or none. From the tables.", &[]),
    schedule_overdue: meter::measures(
        "borealis_scheduler_overdue_seconds",
        "How long ago the oldest job was due that nobody has decided. From the tables.",
        &[],
    ),
    activities: meter::gauges(
        "borealis_activities_open",
        "Scripts on their way to devices, by delivery: ready, sent or accepted. Counted to 100000 at most. From the tables.",
        &["delivery"],
    ),
    devices: meter::gauges(
        "borealis_devices",
        "Devices by state: connected, no_socket (report over HTTP but get no work), offline. From the tables.",
        &["state"],
    ),
});

/// The most rows that are counted.
const COUNTED: i64 = 100_000;
/// How long what was looked up is good for, at least.
const FRESH: Duration = Duration::from_secs(5);
/// How much longer than a look took it is good for: looking takes a twentieth of a connection's time at most.
const SHARE: u32 = 20;
/// How long a look may take; Postgres ends a statement after half of it.
const LIMIT: Duration = Duration::from_secs(2);

/// Looks at the tables for metrics: over a connection of its own, seldom, and not for long.
#[derive(Debug)]
pub struct Tables {
    pool: Pool,
    /// When to look again.
    next: tokio::sync::Mutex<Option<Instant>>,
}

/// Serves `/metrics` of a process that works with the database behind `main`, until `stop`; answers where. `before` sets what
/// only the process itself knows.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(
    addr: SocketAddr,
    main: &Pool,
    before: impl Fn() + Send + Sync + 'static,
    stop: CancellationToken,
) -> Result<SocketAddr, borealis_telemetry::Error> {
    let socket = listener::bind(addr).await?;
    let bound = socket.local_addr().unwrap_or(addr);
    let (tables, before) = (Arc::new(Tables::new(main)), Arc::new(before));
    let refresh: listener::Refresh = Arc::new(move || {
        let (tables, before) = (tables.clone(), before.clone());
        Box::pin(async move {
            before();
            tables.refresh().await;
        })
    });
    tokio::spawn(listener::serve(socket, refresh, stop));
    Ok(bound)
}

impl Tables {
    /// Looks at the database of `main`. Nothing is asked before the first [`Tables::refresh`].
    #[must_use]
    pub fn new(main: &Pool) -> Self {
        LazyLock::force(&LOOKED);
        let bounds = [("statement_timeout", "1000"), ("default_transaction_read_only", "on")];
        let settings = [PLANS.as_slice(), &bounds].concat();
        Self { pool: db::sibling(main, 1, &settings), next: tokio::sync::Mutex::new(None) }
    }

    /// Brings up to date what is looked up: the pools now, the tables unless they were looked at a moment ago. What cannot be
    /// looked up is not shown.
    pub async fn refresh(&self) {
        LOOKED.connections.reset();
        for pool in db::pools() {
            for (state, count) in [("open", pool.open), ("idle", pool.idle), ("max", pool.max)] {
                LOOKED.connections.with_label_values(&[pool.name, state]).set(count.into());
            }
        }
        LOOKED.task_failing.reset();
        for task in borealis_tasks::all() {
            let restarts = LOOKED.task_restarts.with_label_values(&[task.name]);
            restarts.inc_by(task.restarts.saturating_sub(restarts.get()));
            LOOKED.task_failing.with_label_values(&[task.name]).add(i64::from(task.is_failing()));
        }
        LOOKED.timeouts.inc_by(db::timeouts().saturating_sub(LOOKED.timeouts.get()));
        let zones = time_zones::current();
        LOOKED.zones_version.set(zones.version_number());
        LOOKED.zones_age.set(zones.age(Utc::now()).as_seconds_f64());
        // Whoever comes while somebody looks sees what that one has found.
        let mut next = self.next.lock().await;
        if next.is_some_and(|next| Instant::now() < next) {
            return;
        }
        let started = Instant::now();
        let looked = tokio::time::timeout(LIMIT, self.look()).await;
        let took = started.elapsed();
        *next = Some(started + took + FRESH.max(took * SHARE));
        LOOKED.seconds.set(took.as_secs_f64());
        match looked {
            Ok(Ok(())) => LOOKED.up.set(1),
            failed => {
                LOOKED.failures.inc();
                match failed {
                    Ok(Err(error)) => {
                        tracing::warn!(%error, source = ?error.source, "the tables could not be looked at for metrics")
                    }
                    _ => tracing::warn!("looking at the tables for metrics took too long"),
                }
            }
        }
    }

    async fn look(&self) -> Result<()> {
        forget();
        let now = sqlx::query!(
            r#"SELECT (SELECT count(*) FROM workers WHERE stopped_at IS NULL AND last_seen_at >= now() - interval '15 seconds') AS "alive!",
                      (SELECT count(*) FROM workers WHERE stopped_at IS NULL AND last_seen_at < now() - interval '15 seconds') AS "lost!",
                      (SELECT count(*) FROM duty_leases WHERE duty = 'scheduler' AND expires_at > now()) AS "schedulers!",
                      (SELECT greatest(extract(epoch FROM now() - min(next_due_at)), 0)::float8 FROM scheduled_jobs
                       WHERE enabled AND next_due_at IS NOT NULL) AS due,
                      (SELECT count(*) FROM workflow_runs WHERE lease_token IS NOT NULL) AS "leased!",
                      (SELECT greatest(extract(epoch FROM now() - min(lease_expires_at)), 0)::float8 FROM workflow_runs
                       WHERE lease_token IS NOT NULL) AS lease"#,
        )
        .fetch_one(&self.pool)
        .await;
        // Postgres is up when it answers at all, also with a refusal.
        LOOKED.up.set(i64::from(!matches!(&now, Err(error) if !matches!(error, sqlx::Error::Database(_)))));
        let now = now?;
        LOOKED.workers.with_label_values(&["alive"]).set(now.alive);
        LOOKED.workers.with_label_values(&["lost"]).set(now.lost);
        LOOKED.schedulers.with_label_values(&[] as &[&str]).set(now.schedulers);
        LOOKED.schedule_overdue.with_label_values(&[] as &[&str]).set(now.due.unwrap_or(0.0));
        LOOKED.leased.with_label_values(&[] as &[&str]).set(now.leased);
        LOOKED.lease_overdue.with_label_values(&[] as &[&str]).set(now.lease.unwrap_or(0.0));
        self.ready().await?;
        self.devices().await?;
        self.activities().await
    }

    /// The oldest of what is ready, in the order of its index.
    async fn ready(&self) -> Result<()> {
        let ready = sqlx::query!(
            r#"SELECT workflow || '.v' || version AS "queue!", count(*) AS "runs!", extract(epoch FROM now() - min(ready_at))::float8 AS "age!"
               FROM (SELECT workflow, version, ready_at FROM workflow_runs
                     WHERE state IN ('pending', 'cancelling') AND lease_token IS NULL AND NOT parked AND ready_at <= now()
                     ORDER BY ready_at LIMIT $1) AS ready
               GROUP BY workflow, version"#,
            COUNTED,
        )
        .fetch_all(&self.pool)
        .await?;
        for queue in crate::registry().iter().map(|workflow| workflow.queue()) {
            LOOKED.ready.with_label_values(&[&queue]).set(0);
            LOOKED.ready_age.with_label_values(&[&queue]).set(0.0);
        }
        for queue in ready {
            LOOKED.ready.with_label_values(&[&queue.queue]).set(queue.runs);
            LOOKED.ready_age.with_label_values(&[&queue.queue]).set(queue.age);
        }
        Ok(())
    }

    async fn activities(&self) -> Result<()> {
        let open = sqlx::query!(
            r#"SELECT delivery AS "delivery!", count(*) AS "count!"
               FROM (SELECT delivery FROM activity_history WHERE delivery IN ('ready', 'sent', 'accepted') LIMIT $1) AS open
               GROUP BY delivery"#,
            COUNTED,
        )
        .fetch_all(&self.pool)
        .await?;
        for delivery in ["ready", "sent", "accepted"] {
            LOOKED.activities.with_label_values(&[delivery]).set(0);
        }
        for row in open {
            LOOKED.activities.with_label_values(&[&row.delivery]).set(row.count);
        }
        Ok(())
    }

    async fn devices(&self) -> Result<()> {
        let devices = sqlx::query!(
            r#"SELECT connection_state AS "state!", count(*) AS "count!" FROM device_presence GROUP BY connection_state"#,
        )
        .fetch_all(&self.pool)
        .await?;
        for state in ["connected", "no_socket", "offline"] {
            LOOKED.devices.with_label_values(&[state]).set(0);
        }
        for row in devices {
            LOOKED.devices.with_label_values(&[&row.state]).set(row.count);
        }
        Ok(())
    }
}

/// Shows nothing of the tables until they have been looked at again.
fn forget() {
    LOOKED.up.set(0);
    for looked in [&LOOKED.ready, &LOOKED.leased, &LOOKED.workers, &LOOKED.schedulers, &LOOKED.activities, &LOOKED.devices] {
        looked.reset();
    }
    for looked in [&LOOKED.ready_age, &LOOKED.lease_overdue, &LOOKED.schedule_overdue] {
        looked.reset();
    }
}
