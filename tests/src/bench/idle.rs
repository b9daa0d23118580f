//! `bench idle`: what an engine that has nothing to do writes into Postgres' write-ahead log. Each window begins with a
//! checkpoint, after which Postgres writes every page that changes in full once, as after every one of its own.

use std::time::Duration;

use super::{Report, environment::machine, stand::Stand, statements};
use crate::{Child, Processes, chaos::real::RealAgent, processes::free_port};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Minutes of each window. Checkpoints of the private Postgres are five minutes apart.
    #[arg(long, default_value_t = 5)]
    pub minutes: u32,
    /// Minutes before the first: what happens at the start does not count.
    #[arg(long, default_value_t = 1)]
    pub settle: u32,
}

/// Agents of the larger engine.
const AGENTS: usize = 3;

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("idle", &machine());
    let mut stand = Stand::start().await;
    let mut agents = vec![agent(&mut stand, 1).await];
    let small = window(&stand, options, "one API process, a worker, one agent").await;
    report.at_most(40.0, "one API process, a worker, one agent", small, "KB/min");
    let _second = second_api(&mut stand.environment.processes);
    for number in 2..=AGENTS {
        agents.push(agent(&mut stand, number).await);
    }
    let large = window(&stand, options, "two API processes, a worker, three agents").await;
    report.at_most(120.0, "two API processes, a worker, three agents", large, "KB/min");
    report
}

async fn agent(stand: &mut Stand, number: usize) -> RealAgent {
    let Stand { installation, environment, .. } = stand;
    RealAgent::named(&mut environment.processes, &installation.admin, installation.site, &format!("idle-{number}")).await
}

/// Another API process on the same database and with the same keys.
fn second_api(processes: &mut Processes) -> Child {
    processes
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
    processes.start("borealis-api", &["serve"])
}

/// Kilobytes of write-ahead log a minute.
async fn window(stand: &Stand, options: &Options, name: &str) -> f64 {
    let pool = &stand.database.pool;
    tokio::time::sleep(Duration::from_secs(60) * options.settle).await;
    sqlx::raw_sql("CHECKPOINT").execute(pool).await.expect("a checkpoint");
    statements::begin(pool).await;
    let from: String = position(stand).await;
    tokio::time::sleep(Duration::from_secs(60) * options.minutes).await;
    let sql = "SELECT (pg_current_wal_insert_lsn() - $1::text::pg_lsn)::float8 / 1000";
    let written: f64 = sqlx::query_scalar(sql).bind(from).fetch_one(pool).await.expect("a position");
    statements::print_by(pool, name, "wal_bytes").await;
    written / f64::from(options.minutes.max(1))
}

async fn position(stand: &Stand) -> String {
    let sql = "SELECT pg_current_wal_insert_lsn()::text";
    sqlx::query_scalar(sql).fetch_one(&stand.database.pool).await.expect("a position")
}
