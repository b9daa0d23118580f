//! `bench scheduler`: how late a thousand jobs of the same second begin among a hundred thousand, and what those cost that
//! are not due.

use std::time::Duration;

use sqlx::AssertSqlSafe;

use super::{
    Environment, Latencies, Report,
    environment::{Database, machine, tree_cpu_seconds},
    reference,
};
use crate::{Child, probe};

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
    let worker = environment.processes.start("test-worker", &[]);
    tokio::time::sleep(Duration::from_secs(3)).await;

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
        let latencies = due_together(&database, options.due).await;
        report.figure(format!("due to begun, {round} time, p50"), latencies.percentile(50.0), "ms");
        report.at_most(500.0, format!("due to begun, {round} time, p99"), latencies.percentile(99.0), "ms");
        report.figure(format!("jobs decided and begun a second, {round} time"), rate(&latencies), "jobs/s");
    }
    report
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

/// Writes jobs for one second and waits until all have begun. Answers how late each began its first step.
async fn due_together(database: &Database, count: i64) -> Latencies {
    let mark: i64 =
        sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM scheduled_jobs").fetch_one(&database.pool).await.expect("the jobs");
    write(database, count, &format!("date_trunc('second', now()) + interval '{} seconds'", AHEAD.as_secs())).await;
    sqlx::query("SELECT pg_notify('borealis_schedule', '')").execute(&database.pool).await.expect("a notification");
    tokio::time::sleep(AHEAD).await;
    let deadline = tokio::time::Instant::now() + LIMIT;
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
            return late.into_iter().collect();
        }
        assert!(tokio::time::Instant::now() < deadline, "{} of {count} jobs began in {LIMIT:?}", late.len());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[allow(clippy::cast_precision_loss)]
fn rate(latencies: &Latencies) -> f64 {
    latencies.count() as f64 / (latencies.percentile(100.0) / 1_000.0)
}
