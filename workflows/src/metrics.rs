//! What the core tells of itself, beside what the runtime counts (`durable/src/metrics.rs`): the scheduler, and what is in the tables,
//! which is looked up by [`Tables`], seldom and with bounds. The names are explained in `docs/operations.md`, which a test compares.

use std::{
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use borealis_durable::{self as durable, worker::PLANS};
use borealis_engine::{Result, db, db::Pool, time_zones};
use borealis_telemetry::{
    listener,
    meter::{self, Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec},
};
use chrono::Utc;
use tokio_util::sync::CancellationToken;

/// Meters of the scheduler.
#[derive(Debug)]
pub(crate) struct Meters {
    pub leads: IntGauge,
    pub lateness: Histogram,
    pub jobs_decided: IntCounter,
    pub instants: IntCounterVec,
}

pub(crate) static METERS: LazyLock<Meters> = LazyLock::new(|| Meters {
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
});

/// The standing tasks of a worker, beside those of the runtime, whose passes may fail.
const TASKS: [&str; 3] = ["deadlines", "retention", "scheduler"];

/// Shows the meters of a worker from its start, at nought.
pub fn show() {
    durable::metrics::show(&TASKS);
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
        let timeouts = db::timeouts() + durable::metrics::pool_timeouts();
        LOOKED.timeouts.inc_by(timeouts.saturating_sub(LOOKED.timeouts.get()));
        let zones = time_zones::current();
        LOOKED.zones_version.set(zones.version_number());
        LOOKED.zones_age.set(zones.age(Utc::now()).as_seconds_f64());
        // A refresh that comes while another one runs shows the result of that one.
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
