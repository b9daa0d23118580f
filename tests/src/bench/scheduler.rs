//! `bench scheduler`: how late a thousand jobs of the same second begin among a hundred thousand, and what those cost that
//! are not due.

use std::time::{Duration, Instant};

use borealis_engine::jobs::schedule::PREVIEW_MAX;
use chrono::Utc;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use sqlx::AssertSqlSafe;

use super::{
    Environment, Latencies, Report,
    environment::{Database, machine, tree_cpu_seconds},
    reference,
};
use crate::{Child, crons, probe};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Enabled jobs.
    #[arg(long, default_value_t = 100_000)]
    pub jobs: i64,
    /// Of these, jobs that are due in the same second.
    #[arg(long, default_value_t = 1_000)]
    pub due: i64,
    /// Seconds each idle time is measured.
    #[arg(long, default_value_t = 20)]
    pub idle: u64,
}

/// How long the due jobs may take to have all begun.
const LIMIT: Duration = Duration::from_secs(120);
/// How often the occurrences are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How far ahead the due second lies: the jobs have to be written before it.
const AHEAD: Duration = Duration::from_secs(5);

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("scheduler", &machine());
    let mut environment = Environment::start().await;
    let tps = reference::pgbench(&environment.cluster, 8, Duration::from_secs(5)).await;
    report.figure("reference: pgbench -N, 8 clients", tps, "tx/s");
    let database = environment.database(8).await;
    probe::create_tables(&database.pool).await;
    // As many steps at once as a worker runs when nobody says otherwise.
    environment.processes.set("CONCURRENCY", "64".to_owned());
    let worker = environment.processes.start("test-worker", &[]);
    tokio::time::sleep(Duration::from_secs(3)).await;

    previews(&mut report);

    let without = idle(&environment, &worker, options.idle).await;
    let later = "now() + interval '1 hour' + n * interval '0.5 second'";
    write(&database, options.jobs - options.due, later).await;
    sqlx::raw_sql("VACUUM ANALYZE").execute(&database.pool).await.expect("a vacuum");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let with = idle(&environment, &worker, options.idle).await;
    report.figure("idle worker and Postgres, no job", without * 100.0, "% of a core");
    report.figure(format!("idle worker and Postgres, {} jobs", options.jobs - options.due), with * 100.0, "% of a core");
    report.at_most(1.0, "idle cost of the jobs", (with - without).max(0.0) * 100.0, "% of a core");

    for round in ["first", "second"] {
        let Lateness { decided, begun } = due_together(&database, options.due).await;
        report.figure(format!("due to decided, {round} time, p50"), decided.percentile(50.0), "ms");
        report.at_most(500.0, format!("due to decided, {round} time, p99"), decided.percentile(99.0), "ms");
        report.figure(format!("due to first step begun, {round} time, p50"), begun.percentile(50.0), "ms");
        report.figure(format!("due to first step begun, {round} time, p99"), begun.percentile(99.0), "ms");
        report.figure(format!("jobs decided a second, {round} time"), rate(&decided), "jobs/s");
        report.figure(format!("jobs begun a second, {round} time"), rate(&begun), "jobs/s");
    }
    report
}

/// How many random crons are previewed.
const PREVIEWS: usize = 2_000;

/// How long the next hundred instants of random crons take, each in a random zone.
fn previews(report: &mut Report) {
    let mut random = StdRng::seed_from_u64(1);
    let mut took = Latencies::default();
    while took.count() < PREVIEWS {
        let (text, zone) = (crons::cron(&mut random), crons::ZONES[random.random_range(0..crons::ZONES.len())]);
        let Some(schedule) = crons::schedule(&text, zone) else { continue };
        let began = Instant::now();
        let instants = schedule.preview(Utc::now(), PREVIEW_MAX);
        took.add(began.elapsed());
        std::hint::black_box(instants);
    }
    report.figure("preview of 100 instants of a cron, p50", took.percentile(50.0), "ms");
    report.at_most(5.0, "preview of 100 instants of a cron, slowest", took.percentile(100.0), "ms");
}

/// The share of a core that worker and Postgres use while nothing happens.
async fn idle(environment: &Environment, worker: &Child, seconds: u64) -> f64 {
    let used = || tree_cpu_seconds(environment.cluster.pid()) + tree_cpu_seconds(worker.pid());
    let before = used();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    #[allow(clippy::cast_precision_loss)]
    let lasted = seconds as f64;
    (used() - before) / lasted
}

/// Writes daily jobs without targets, the `n`-th of them due at `when`, an SQL expression.
async fn write(database: &Database, count: i64, when: &str) {
    let sql = format!(
        "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at, next_due_at)
         SELECT 'bench ' || n, '[]', '[]', 'daily', {when}, {when} FROM generate_series(1, $1) AS n"
    );
    sqlx::query(AssertSqlSafe(sql)).bind(count).execute(&database.pool).await.expect("the jobs");
}

/// How late the jobs of one second were.
struct Lateness {
    /// Until the occurrence and its run were committed, as another connection saw it: at most [`LOOK`] too long.
    decided: Latencies,
    /// Until a worker had begun the run's first step.
    begun: Latencies,
}

/// Writes jobs for one second and waits until all have begun.
async fn due_together(database: &Database, count: i64) -> Lateness {
    let mark: i64 =
        sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM scheduled_jobs").fetch_one(&database.pool).await.expect("the jobs");
    write(database, count, &format!("date_trunc('second', now()) + interval '{} seconds'", AHEAD.as_secs())).await;
    sqlx::query("SELECT pg_notify('borealis_schedule', '')").execute(&database.pool).await.expect("a notification");
    let deadline = tokio::time::Instant::now() + AHEAD + LIMIT;
    let mut decided = Vec::new();
    let mut seen = 0;
    while seen < count {
        let (visible, late): (i64, Option<f64>) = sqlx::query_as(
            "SELECT count(*), extract(epoch FROM clock_timestamp() - max(scheduled_at))::float8 * 1000 FROM job_occurrences
             WHERE job_id > $1 AND workflow_run_id IS NOT NULL",
        )
        .bind(mark)
        .fetch_one(&database.pool)
        .await
        .expect("the occurrences");
        decided.extend((seen..visible).filter_map(|_| late));
        seen = visible;
        assert!(tokio::time::Instant::now() < deadline, "{seen} of {count} jobs were decided in {LIMIT:?}");
        tokio::time::sleep(LOOK).await;
    }
    loop {
        let late: Vec<f64> = sqlx::query_scalar(
            "SELECT extract(epoch FROM w.started_at - o.scheduled_at)::float8 * 1000 FROM job_occurrences o
             JOIN workflow_runs w ON w.id = o.workflow_run_id WHERE o.job_id > $1 AND w.started_at IS NOT NULL",
        )
        .bind(mark)
        .fetch_all(&database.pool)
        .await
        .expect("the occurrences");
        if i64::try_from(late.len()).is_ok_and(|begun| begun >= count) {
            return Lateness { decided: decided.into_iter().collect(), begun: late.into_iter().collect() };
        }
        assert!(tokio::time::Instant::now() < deadline, "{} of {count} jobs began in {LIMIT:?}", late.len());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[allow(clippy::cast_precision_loss)]
fn rate(latencies: &Latencies) -> f64 {
    latencies.count() as f64 / (latencies.percentile(100.0) / 1_000.0)
}
