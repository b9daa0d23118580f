//! `bench calls`: what a call to an agent costs beyond the agent's own time, through the API process that has its socket and through
//! another one.

use std::{net::SocketAddr, time::Duration};

use borealis_protocol::{CONTEXT_SYSTEM, agent_id, framing::Frame};
use serde_json::{Value, json};
use url::Url;

use super::{Report, environment::machine, load, plain, stand::Stand};
use crate::{
    agent::{self, Socket},
    eventually,
    fleet::Machine,
    processes::free_port,
};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Calls a second.
    #[arg(long, default_value_t = 30.0)]
    pub rate: f64,
    /// Seconds of each load.
    #[arg(long, default_value_t = 15)]
    pub seconds: u64,
    /// Processes that the agent lists.
    #[arg(long, default_value_t = 200)]
    pub processes: usize,
}

/// How long something with nothing in its way may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("calls", &machine());
    let mut stand = Stand::start().await;
    let (_empty, empty) = plain::empty_route(&mut stand.environment.processes).await;
    let machines = stand.machines(1).await;
    let [machine] = machines.as_slice() else { panic!("one machine") };
    let (_other, other) = second_api(&mut stand).await;
    let agent = tokio::spawn(answer(connect(&stand.installation.base, machine).await, list(options.processes)));

    let lasts = Duration::from_secs(options.seconds);
    let nothing = load::get(options.rate, lasts, None, |_| empty.to_string()).await;
    report.figure("calls a second, planned ahead", options.rate, "/s");
    report.figure("reference: an empty axum route, p50", nothing.latencies.percentile(50.0), "ms");
    let path = format!("api/device/processes/{}", machine.guid);
    for (is_goal, name, base) in [(false, "its own API process", &stand.installation.base), (true, "another API process", &other)]
    {
        let url = base.join(&path).expect("a URL");
        let load = load::get(options.rate, lasts, Some(stand.token()), |_| url.to_string()).await;
        let p50 = load.latencies.percentile(50.0);
        if is_goal {
            report.at_most(5.0, format!("through {name}, p50"), p50, "ms");
        } else {
            report.figure(format!("through {name}, p50"), p50, "ms");
        }
        report.figure(format!("through {name}, p99"), load.latencies.percentile(99.0), "ms");
        report.figure(format!("through {name}, p50 to the empty route"), p50 / nothing.latencies.percentile(50.0), "x");
        report.at_most(0.0, format!("through {name}, failed"), load.failed as f64, "");
    }
    agent.abort();
    report
}

/// A second API process on the same database, with the same keys.
async fn second_api(stand: &mut Stand) -> (crate::Child, Url) {
    let port = free_port();
    let processes = &mut stand.environment.processes;
    processes
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
    let api = processes.start("borealis-api", &["serve"]);
    eventually("the second API listens", LIMIT, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
    (api, Url::parse(&format!("http://127.0.0.1:{port}/")).expect("a URL"))
}

async fn connect(base: &Url, machine: &Machine) -> Socket {
    let addr = SocketAddr::from(([127, 0, 0, 1], base.port().expect("a port")));
    let mut socket = eventually("a socket", LIMIT, async || agent::try_open_agent(addr, &machine.access_token).await.ok()).await;
    let id = agent_id(&machine.hostname, &machine.guid.to_string(), CONTEXT_SYSTEM);
    let hello = socket.hello(&id, json!({"dedup": true, "process_management": true})).await;
    assert_eq!(hello["status"], "ok", "{hello}");
    socket
}

/// What an agent lists.
fn list(processes: usize) -> Value {
    let row = |pid: usize| {
        json!({"id": format!("{pid}:1700000000"), "pid": pid, "parent_pid": 1, "name": "a-process", "cpu_percent": 0.5, "raw_cpu_percent": 1.0,
               "memory_percent": 0.1, "memory_bytes": 12_345_678, "command_line": "/usr/bin/a-process --with some --arguments",
               "executable_path": "/usr/bin/a-process", "username": "root", "status": "sleeping", "created_at": 1_700_000_000,
               "captured_at": 1_700_000_100, "child_count": 0, "has_children": false})
    };
    json!({"ok": true, "reported_at": 1_700_000_100, "refresh_interval_ms": 5_000, "processes": (1..=processes).map(row).collect::<Vec<_>>()})
}

/// Answers every call at once.
async fn answer(mut socket: Socket, list: Value) {
    let list = list.to_string();
    while let Some(frame) = socket.next().await {
        if let Frame::Event { id: Some(id), .. } = frame {
            socket.raw(&format!("43{id}[{list}]")).await;
        }
    }
}
