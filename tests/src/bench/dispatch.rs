//! `bench dispatch`: one job for every agent, all of them connected. From the instant it is due to the last delivery and to
//! the last result whose commit the agents have been told of.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Timelike, Utc};
use serde_json::json;

use super::{
    Environment, Report,
    environment::{cpu_seconds, machine, tree_cpu_seconds},
    plain, reference,
    stand::Stand,
    statements,
};
use crate::fleet::{Counts, Fleet};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Connected agents.
    #[arg(long, default_value_t = 10_000)]
    pub agents: usize,
    /// Jobs, one after the other.
    #[arg(long, default_value_t = 3)]
    pub jobs: usize,
}

/// How far ahead a job is scheduled.
const AHEAD: TimeDelta = TimeDelta::seconds(4);
/// When a round has failed.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of a dispatch of this bench on the wire, about.
const DISPATCH_BYTES: usize = 1_500;

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("dispatch", &machine());
    let mut environment = Environment::start().await;
    let tps = reference::pgbench(&environment.cluster, 8, Duration::from_secs(5)).await;
    let echo = plain::tcp_echo(&mut environment.processes, options.agents, DISPATCH_BYTES).await;
    let stand = Stand::on(environment).await;
    let fleet = stand.fleet(options.agents).await;
    let mut rounds = Vec::new();
    for number in 0..options.jobs {
        let round = round(&stand, &fleet, options.agents, number).await;
        eprintln!("  job {number}: {round:?}");
        rounds.push(round);
    }
    let worst = |of: fn(&Round) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
    let (delivered, recorded) = (worst(|round| round.last_delivery_s), worst(|round| round.last_result_s));
    report.figure("agents connected", options.agents as f64, "");
    report.figure("jobs, one after the other; the worst is shown", options.jobs as f64, "");
    report.at_most(3.0, "due to last delivery", delivered, "s");
    report.figure("due to first delivery", worst(|round| round.first_delivery_s), "s");
    report.at_most(10.0, "due to last result recorded", recorded, "s");
    report.figure("due to the job's run closed", worst(|round| round.closed_s), "s");
    report.at_most(0.0, "dispatches lost", worst(|round| round.lost), "");
    report.at_most(0.0, "dispatches doubled", worst(|round| round.doubled), "");
    report.figure("processor time of the API", worst(|round| round.api_cpu_s), "s");
    report.figure("processor time of Postgres", worst(|round| round.postgres_cpu_s), "s");
    report.figure("reference: the same messages through a plain TCP echo, there and back", echo.round.as_secs_f64(), "s");
    report.figure("due to last result, to the echo", recorded / echo.round.as_secs_f64(), "x");
    report.figure("reference: as many transactions of pgbench -N, 8 clients", options.agents as f64 / tps, "s");
    report.figure("due to last result, to pgbench", recorded / (options.agents as f64 / tps), "x");
    fleet.stop().await;
    report
}

/// What one job came to; times from the instant it was due.
#[derive(Debug, Clone)]
struct Round {
    first_delivery_s: f64,
    last_delivery_s: f64,
    last_result_s: f64,
    closed_s: f64,
    lost: f64,
    doubled: f64,
    api_cpu_s: f64,
    postgres_cpu_s: f64,
}

async fn round(stand: &Stand, fleet: &Fleet, agents: usize, number: usize) -> Round {
    let before = fleet.counts();
    let due = (Utc::now() + AHEAD).with_nanosecond(0).expect("a whole second");
    // Six fields, because jobs of other types are due at whole minutes.
    let cron = due.format("%-S %-M %-H %-d %-m *").to_string();
    let schedule = json!({"type": "cron", "cron": cron, "timezone": "UTC", "max_occurrences": 1});
    let job = stand.installation.schedule_for_all(&format!("Bench {number}"), schedule).await;
    tokio::time::sleep((due - Utc::now()).to_std().unwrap_or_default()).await;
    let cpu = || (cpu_seconds(stand.installation.api.pid()), tree_cpu_seconds(stand.environment.cluster.pid()));
    let cpu_before = cpu();
    statements::begin(&stand.database.pool).await;
    let all = agents as u64;
    let after = fleet.until("every result is acknowledged", LIMIT, |now| now.acked - before.acked >= all).await;
    let last_result_s = seconds(Utc::now() - due);
    let (api, postgres) = cpu();
    statements::print(&stand.database.pool, &format!("job {number}")).await;
    let closed_s = closed(stand, job, due).await;
    let mut deliveries: Vec<DateTime<Utc>> =
        fleet.receipts().iter().skip(usize::try_from(before.received).unwrap_or(0)).map(|receipt| receipt.at).collect();
    deliveries.sort();
    let of = |at: Option<&DateTime<Utc>>| at.map_or(f64::NAN, |at| seconds(*at - due));
    Round {
        first_delivery_s: of(deliveries.first()),
        last_delivery_s: of(deliveries.last()),
        last_result_s,
        closed_s,
        lost: lost(stand, job, all).await,
        doubled: doubled(&before, &after, all),
        api_cpu_s: api - cpu_before.0,
        postgres_cpu_s: postgres - cpu_before.1,
    }
}

/// Machines whose result is not in the database as it was reported.
async fn lost(stand: &Stand, job: i64, all: u64) -> f64 {
    let recorded: i64 = sqlx::query_scalar(
        "SELECT count(DISTINCT r.device_guid) FROM scheduled_job_runs r JOIN activity_history a ON a.run_id = r.id
         WHERE r.job_id = $1 AND r.status = 'Success' AND a.status = 'Success' AND a.delivery = 'done' AND a.stdout <> ''",
    )
    .bind(job)
    .fetch_one(&stand.database.pool)
    .await
    .expect("the runs");
    all as f64 - recorded as f64
}

/// Deliveries and executions beyond one for each machine.
fn doubled(before: &Counts, after: &Counts, all: u64) -> f64 {
    let extra = |of: fn(&Counts) -> u64| (of(after) - of(before)).abs_diff(all) as f64;
    extra(|counts| counts.received) + extra(|counts| counts.executed) + (after.doubled - before.doubled) as f64
}

/// When the workflow run that carried the job was over.
async fn closed(stand: &Stand, job: i64, due: DateTime<Utc>) -> f64 {
    let at = crate::eventually("the job's run is closed", LIMIT, async || {
        let query = "SELECT finished_at FROM job_occurrences WHERE job_id = $1 AND state = 'closed'";
        let found = sqlx::query_scalar::<_, DateTime<Utc>>(query).bind(job).fetch_optional(&stand.database.pool).await;
        found.expect("the occurrence")
    })
    .await;
    seconds(at - due)
}

fn seconds(time: TimeDelta) -> f64 {
    time.as_seconds_f64()
}
