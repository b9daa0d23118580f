//! `bench waits`: what 100,000 waiting runs cost while nothing happens to them, and how late those wake whose instant has
//! come among them.

use std::time::{Duration, Instant};

use borealis_engine::db::Pool;
use borealis_workflows::{NewRun, start_many};
use serde_json::json;

use super::{
    Environment, Latencies, Report,
    environment::{machine, resident_mib, tree_cpu_seconds},
    reference,
};
use crate::{Child, probe};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Runs that wait for an instant far away.
    #[arg(long, default_value_t = 100_000)]
    pub runs: usize,
    /// Runs beside them whose instants come, once spread over ten seconds and once all together.
    #[arg(long, default_value_t = 1_000)]
    pub due: usize,
    /// Seconds each idle time is measured.
    #[arg(long, default_value_t = 30)]
    pub idle: u64,
}

/// A day.
const FAR_MS: i64 = 24 * 3_600_000;
/// The instants come after this, when all runs wait, and within [`OVER_MS`].
const SOON_MS: i64 = 8_000;
const OVER_MS: i64 = 10_000;
const LIMIT: Duration = Duration::from_secs(300);

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("waits", &machine());
    let mut environment = Environment::start().await;
    let tps = reference::pgbench(&environment.cluster, 8, Duration::from_secs(4)).await;
    report.figure("reference: pgbench -N, 8 clients", tps, "tx/s");
    let database = environment.database(8).await;
    let pool = &database.pool;
    probe::create_tables(pool).await;
    environment.processes.set("CONCURRENCY", "1000");
    let worker = environment.processes.start("test-worker", &[]);
    tokio::time::sleep(Duration::from_secs(5)).await;

    let without = idle(&environment, &worker, options.idle).await;
    let (bytes, memory) = (stored(pool).await, resident_mib(worker.pid()));
    let began = Instant::now();
    add(pool, &vec![FAR_MS; options.runs]).await;
    parked(pool, options.runs).await;
    report.figure("runs started and put to sleep", super::per_second(options.runs, began.elapsed()), "runs/s");
    sqlx::raw_sql("VACUUM ANALYZE").execute(pool).await.expect("a vacuum");
    tokio::time::sleep(Duration::from_secs(5)).await;
    let with = idle(&environment, &worker, options.idle).await;
    let runs = options.runs as f64;
    report.figure("waiting runs", runs, "");
    report.figure("disk for each: its row, three events, indexes", (stored(pool).await - bytes) / runs, "bytes");
    report.figure("worker resident, more than without them", resident_mib(worker.pid()) - memory, "MiB");
    report.figure("worker and Postgres, no run", without * 100.0, "% of a core");
    report.figure("worker and Postgres while they wait", with * 100.0, "% of a core");
    report.at_most(1.0, "cost of the waiting", (with - without).max(0.0) * 100.0, "% of a core");

    let step = OVER_MS / i64::try_from(options.due).unwrap_or(i64::MAX).max(1);
    let spread: Vec<i64> = (0..).map(|n| SOON_MS + n * step).take(options.due).collect();
    let latencies = due(pool, &spread).await;
    report.figure("instant to step begun, spread over 10 s, p50", latencies.percentile(50.0), "ms");
    report.figure("instant to step begun, spread over 10 s, p99", latencies.percentile(99.0), "ms");
    report.at_most(1_000.0, "instant to step begun, spread over 10 s, max", latencies.percentile(100.0), "ms");
    let latencies = due(pool, &vec![SOON_MS; options.due]).await;
    report.figure("instant to step begun, all within one second, p50", latencies.percentile(50.0), "ms");
    report.figure("instant to step begun, all within one second, p99", latencies.percentile(99.0), "ms");
    report.at_most(1_000.0, "instant to step begun, all within one second, max", latencies.percentile(100.0), "ms");
    report
}

/// Starts runs, each of which sleeps for so many milliseconds.
async fn add(pool: &Pool, milliseconds: &[i64]) {
    for piece in milliseconds.chunks(1_000) {
        let new = piece.iter().map(|ms| NewRun { input: json!({"ms": ms}), ..NewRun::default() }).collect();
        let mut connection = pool.acquire().await.expect("a connection");
        start_many(&mut connection, &probe::napper(), new).await.expect("a start");
    }
}

/// Waits until so many sleep.
async fn parked(pool: &Pool, count: usize) {
    crate::eventually("the runs sleep", LIMIT, async || {
        let sql = "SELECT count(*) FROM workflow_runs WHERE parked";
        let asleep: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("a count");
        tokio::time::sleep(Duration::from_millis(200)).await;
        usize::try_from(asleep).is_ok_and(|asleep| asleep >= count).then_some(())
    })
    .await;
}

/// Starts runs beside the others, and answers how long after its instant each began its step again.
async fn due(pool: &Pool, milliseconds: &[i64]) -> Latencies {
    let last = sqlx::query_scalar::<_, uuid::Uuid>("SELECT id FROM workflow_runs ORDER BY id DESC LIMIT 1");
    let last = last.fetch_one(pool).await.expect("a run");
    add(pool, milliseconds).await;
    crate::eventually("they have ended", LIMIT, async || {
        let sql = "SELECT count(*) FROM workflow_runs WHERE id > $1 AND state = 'succeeded'";
        let ended: i64 = sqlx::query_scalar(sql).bind(last).fetch_one(pool).await.expect("a count");
        tokio::time::sleep(Duration::from_millis(500)).await;
        usize::try_from(ended).is_ok_and(|ended| ended >= milliseconds.len()).then_some(())
    })
    .await;
    let late: Vec<f64> = sqlx::query_scalar(
        "SELECT extract(epoch FROM g.at - (w.at + (r.input ->> 'ms')::int * interval '1 millisecond'))::float8 * 1000
         FROM workflow_runs r JOIN workflow_events w ON w.run_id = r.id AND w.kind = 'waiting'
         CROSS JOIN LATERAL (SELECT at FROM workflow_events e WHERE e.run_id = r.id AND e.kind = 'step_started' AND e.seq > w.seq
                             ORDER BY e.seq LIMIT 1) g
         WHERE r.id > $1",
    )
    .bind(last)
    .fetch_all(pool)
    .await
    .expect("the events");
    assert_eq!(late.len(), milliseconds.len(), "every run waited once");
    late.into_iter().collect()
}

/// Bytes of the tables of the runtime, with their indexes.
async fn stored(pool: &Pool) -> f64 {
    let sql = "SELECT (pg_total_relation_size('workflow_runs') + pg_total_relation_size('workflow_events')
                       + pg_total_relation_size('apalis.jobs'))::float8";
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("sizes")
}

/// The share of a core that worker and Postgres use while nothing happens.
async fn idle(environment: &Environment, worker: &Child, seconds: u64) -> f64 {
    let used = || tree_cpu_seconds(environment.cluster.pid()) + tree_cpu_seconds(worker.pid());
    let before = used();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    (used() - before) / seconds as f64
}
