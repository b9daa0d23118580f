//! `bench recovery`: SIGKILL of the only busy worker while another stands by. From the kill to the moment the runs it held
//! go on. Most of it is the lease, which must run out first; beside it, the same with a worker that is asked to end.

use std::time::Duration;

use borealis_engine::db::Pool;
use borealis_workflows::{NewRun, durable::LEASE};
use chrono::{DateTime, Utc};
use serde_json::json;

use super::{
    Environment, Latencies, Report,
    environment::{Database, machine},
    reference,
};
use crate::{Child, eventually, probe};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Kills, one after the other, each at another instant between two renewals.
    #[arg(long, default_value_t = 8)]
    pub kills: u32,
    /// Runs the worker holds when it is killed.
    #[arg(long, default_value_t = 1_000)]
    pub runs: usize,
}

/// When a round has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// Renewals are three seconds apart; the kills are spread over that.
const RENEWAL_MS: u32 = 3_000;

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("recovery", &machine());
    let mut environment = Environment::start().await;
    let tps = reference::pgbench(&environment.cluster, 8, Duration::from_secs(4)).await;
    let database = environment.database(8).await;
    probe::create_tables(&database.pool).await;
    environment.processes.set("CONCURRENCY", options.runs.to_string());
    // In the first seconds of a Postgres nothing is taken back.
    tokio::time::sleep(LEASE).await;

    let (mut first, mut last) = (Latencies::default(), Latencies::default());
    for number in 0..options.kills {
        let phase = Duration::from_millis(u64::from(RENEWAL_MS * number / options.kills.max(1)));
        let round = round(&mut environment, &database, options.runs, End::Kill(phase)).await;
        eprintln!("  kill {number}: first run after {:.2} s, last after {:.2} s", round.first_s, round.last_s);
        first.add_ms(round.first_s);
        last.add_ms(round.last_s);
    }
    let asked = round(&mut environment, &database, options.runs, End::Terminate).await;
    report.figure("kills", f64::from(options.kills), "");
    report.figure("runs held by the worker that is killed", options.runs as f64, "");
    report.figure("kill to the first run going on, p50", first.percentile(50.0), "s");
    report.figure("kill to the last run going on, p50", last.percentile(50.0), "s");
    report.at_most(15.0, "kill to the last run going on, max", last.percentile(100.0), "s");
    report.figure("reference: the lease", LEASE.as_secs_f64(), "s");
    report.figure("kill to the last run going on, max, to the lease", last.percentile(100.0) / LEASE.as_secs_f64(), "x");
    report.figure("from the first to the last run of a kill, max", spread(&first, &last), "s");
    report.figure("reference: as many transactions of pgbench -N, 8 clients", options.runs as f64 / tps, "s");
    report.figure("the worker asked to end instead: to the last run going on", asked.last_s, "s");
    report
}

/// An upper bound of how far apart the runs of one kill went on.
fn spread(first: &Latencies, last: &Latencies) -> f64 {
    (last.percentile(100.0) - first.percentile(0.0)).max(0.0)
}

/// How the busy worker ends.
enum End {
    /// At once, so long after its runs have begun.
    Kill(Duration),
    /// In its own time.
    Terminate,
}

/// From the end of the worker, in seconds.
struct Round {
    first_s: f64,
    last_s: f64,
}

async fn round(environment: &mut Environment, database: &Database, runs: usize, end: End) -> Round {
    let pool = &database.pool;
    let busy = environment.processes.start("test-worker", &[]);
    let new = (0..runs).map(|_| NewRun { input: json!({}), ..NewRun::default() }).collect();
    let mut connection = pool.acquire().await.expect("a connection");
    borealis_workflows::start_many(&mut connection, &probe::sleeper(), new).await.expect("a start");
    drop(connection);
    begun(pool, runs).await;
    let heir = environment.processes.start("test-worker", &[]);
    workers(pool, 2).await;
    let at = leave(busy, end).await;
    begun(pool, 2 * runs).await;
    let times: Vec<f64> = sqlx::query_scalar(
        "SELECT extract(epoch FROM at - $1)::float8 FROM workflow_events WHERE kind = 'step_started' ORDER BY at OFFSET $2",
    )
    .bind(at)
    .bind(i64::try_from(runs).unwrap_or(i64::MAX))
    .fetch_all(pool)
    .await
    .expect("the events");
    heir.kill();
    sqlx::raw_sql("TRUNCATE workflow_runs, workflow_events, workers, apalis.jobs CASCADE")
        .execute(pool)
        .await
        .expect("empty tables");
    let of = |time: Option<&f64>| time.copied().unwrap_or(f64::NAN);
    Round { first_s: of(times.first()), last_s: of(times.last()) }
}

/// Ends the worker; when.
async fn leave(busy: Child, end: End) -> DateTime<Utc> {
    match end {
        End::Kill(phase) => {
            tokio::time::sleep(phase).await;
            let at = Utc::now();
            busy.kill();
            at
        }
        End::Terminate => {
            let at = Utc::now();
            busy.terminate().await;
            at
        }
    }
}

/// Waits until steps have begun so many times.
async fn begun(pool: &Pool, count: usize) {
    eventually("the runs go on", LIMIT, async || {
        let sql = "SELECT count(*) FROM workflow_events WHERE kind = 'step_started'";
        let begun: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("a count");
        usize::try_from(begun).is_ok_and(|begun| begun >= count).then_some(())
    })
    .await;
}

/// Waits until so many workers are there.
async fn workers(pool: &Pool, count: i64) {
    eventually("the workers are there", LIMIT, async || {
        let sql = "SELECT count(*) FROM workers WHERE stopped_at IS NULL";
        let there: i64 = sqlx::query_scalar(sql).fetch_one(pool).await.expect("a count");
        (there >= count).then_some(())
    })
    .await;
}
