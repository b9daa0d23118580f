//! `bench agents`: what a connected agent costs, how fast agents are let in, and how they come back after the API process
//! was killed while people go on asking it.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    Report,
    environment::{cpu_seconds, machine, resident_mib, tree_cpu_seconds},
    load, peers, per_second, plain,
    stand::Stand,
    statements,
};
use crate::{eventually, fleet::Fleet};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Agents.
    #[arg(long, default_value_t = 10_000)]
    pub agents: usize,
    /// Seconds of quiet with all connected before memory is read; longer than a heartbeat interval.
    #[arg(long, default_value_t = 45)]
    pub settle: u64,
    /// The folder of the drivers of other systems: MeshCentral is measured beside, as far as it is set up there.
    #[arg(long, env = "BOREALIS_PEERS_DIR", value_name = "DIR")]
    pub peers: Option<std::path::PathBuf>,
}

/// When connecting has failed.
const LIMIT: Duration = Duration::from_secs(300);
/// Requests a second of people while the agents come back.
const PEOPLE: f64 = 20.0;
/// Connections of the plain echo that are compared with.
const ECHO_BYTES: usize = 64;

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("agents", &machine());
    let mut stand = Stand::start().await;
    footprint(&mut stand, &mut report).await;
    let echo = plain::tcp_echo(&mut stand.environment.processes, options.agents, ECHO_BYTES).await;

    let machines = stand.machines(options.agents).await;
    let before = resident_mib(stand.installation.api.pid());
    let cpu = || (cpu_seconds(stand.installation.api.pid()), tree_cpu_seconds(stand.environment.cluster.pid()));
    statements::begin(&stand.database.pool).await;
    let (cpu_before, began) = (cpu(), Instant::now());
    let fleet = Fleet::start(machines, crate::fleet::Settings { status: false, ..stand.settings() });
    let all = options.agents as u64;
    fleet.until("all agents are connected", LIMIT, |counts| counts.connected == all).await;
    let rate = per_second(options.agents, began.elapsed());
    let cpu_after = cpu();
    statements::print(&stand.database.pool, "letting agents in").await;
    report.at_least(1_500.0, "agents let in: connected, authenticated and registered", rate, "agents/s");
    report.figure("a connect, p50", micros(&fleet.latencies().connect, 50.0), "ms");
    report.figure("a connect, p99", micros(&fleet.latencies().connect, 99.0), "ms");
    report.figure("processor time of the API for each", (cpu_after.0 - cpu_before.0) * 1e3 / options.agents as f64, "ms");
    report.figure("processor time of Postgres for each", (cpu_after.1 - cpu_before.1) * 1e3 / options.agents as f64, "ms");
    report.figure("reference: a plain TCP echo", echo.accepts_per_s, "accepts/s");
    report.figure("agents let in, to the echo", rate / echo.accepts_per_s, "x");

    statements::begin(&stand.database.pool).await;
    let (cpu_before, began) = (cpu(), Instant::now());
    tokio::time::sleep(Duration::from_secs(options.settle)).await;
    let (cpu_after, lasted) = (cpu(), began.elapsed().as_secs_f64());
    statements::print(&stand.database.pool, "heartbeats").await;
    let connected = resident_mib(stand.installation.api.pid());
    report.at_most(50.0, "memory of the API for each agent", (connected - before) * 1024.0 / options.agents as f64, "KiB");
    report.figure("memory of the API with all of them", connected, "MiB");
    report.figure("heartbeats", fleet.counts().reports as f64 / lasted, "/s");
    report.figure("a heartbeat, p99", micros(&fleet.latencies().report, 99.0), "ms");
    report.figure("processor use of the API meanwhile", (cpu_after.0 - cpu_before.0) / lasted * 100.0, "% of a core");
    report.figure("processor use of Postgres meanwhile", (cpu_after.1 - cpu_before.1) / lasted * 100.0, "% of a core");
    restart(&mut stand, &fleet, options, &mut report).await;
    fleet.stop().await;
    if let Some(drivers) = &options.peers {
        drop(stand);
        peers::meshcentral(drivers, rate, &mut report).await;
    }
    report
}

/// What the processes need before anybody is there.
async fn footprint(stand: &mut Stand, report: &mut Report) {
    // Without what the set-up of the first administrator needed: a process that was started with everything in place.
    stand.installation.restart_api(&mut stand.environment.processes).await;
    let _ = stand.installation.admin.get("/api/devices").await.ok();
    tokio::time::sleep(Duration::from_secs(5)).await;
    report.at_most(80.0, "API idle, resident", resident_mib(stand.installation.api.pid()), "MiB");
    report.at_most(60.0, "worker idle, resident", resident_mib(stand.worker.pid()), "MiB");
    let (first, again) = up().await;
    report.at_most(5.0, "built `borealis-api up` ready, first start", first, "s");
    report.figure("built `borealis-api up` ready, started again", again, "s");
}

/// How long `borealis-api up` takes from its start to ready: with an empty state folder, and with what that left.
async fn up() -> (f64, f64) {
    let folder = tempfile::Builder::new().prefix("borealis-up-").tempdir().expect("a folder");
    let (mut processes, port) = (crate::Processes::new(), crate::processes::free_port());
    processes
        .set("BOREALIS_STATE_DIR", folder.path().join("state").display().to_string())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", crate::processes::free_port()));
    let mut times = [0.0; 2];
    for time in &mut times {
        let began = Instant::now();
        let up = processes.start("borealis-api", &["up"]);
        let ready = crate::Actor::anonymous(&format!("http://127.0.0.1:{port}").parse().expect("a URL"));
        eventually("the engine is ready", Duration::from_secs(60), async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            (ready.get("/ready").await.status == 200).then_some(())
        })
        .await;
        *time = began.elapsed().as_secs_f64();
        up.terminate().await;
    }
    times.into()
}

/// Kills the API process under everybody and watches them come back.
async fn restart(stand: &mut Stand, fleet: &Fleet, options: &Options, report: &mut Report) {
    fleet.report_status(true);
    fleet.forget_latencies();
    let began = Instant::now();
    stand.installation.restart_api(&mut stand.environment.processes).await;
    let listening = began.elapsed().as_secs_f64();
    let token = stand.token().to_owned();
    let page = stand.installation.base.join("/api/devices?slim=1&limit=100").expect("a URL").to_string();
    let back = |share: f64| {
        let wanted = (options.agents as f64 * share).ceil() as u64;
        async move {
            fleet.until("the agents come back", LIMIT, |counts| counts.connected >= wanted).await;
            began.elapsed().as_secs_f64()
        }
    };
    let all_back = std::sync::atomic::AtomicBool::new(false);
    let people =
        load::get_until(PEOPLE, Some(token.as_str()), |_| page.clone(), || all_back.load(std::sync::atomic::Ordering::Relaxed));
    let agents = async {
        let times = tokio::join!(back(0.5), back(0.99), back(1.0));
        all_back.store(true, std::sync::atomic::Ordering::Relaxed);
        times
    };
    let ((half, most, all), people) = tokio::join!(agents, people);
    report.figure("API killed to listening again", listening, "s");
    report.figure("API killed to 50 % of the agents back", half, "s");
    report.at_most(60.0, "API killed to 99 % back", most, "s");
    report.at_most(120.0, "API killed to all back", all, "s");
    report.at_most(1_000.0, "GET /api/devices meanwhile, p99", people.latencies.percentile(99.0), "ms");
    report.figure("GET /api/devices meanwhile, requests", people.latencies.count() as f64, "");
    report.at_most(0.0, "GET /api/devices meanwhile, failed", people.failed as f64, "");
    let counts = fleet.counts();
    report.figure("connects that failed and were tried again", counts.failed_connects as f64, "");
}

fn micros(histogram: &hdrhistogram::Histogram<u64>, percent: f64) -> f64 {
    histogram.value_at_percentile(percent) as f64 / 1_000.0
}
