//! `./borealis bench`: measures the built programs and prints figures beside their references.

use std::path::PathBuf;

use borealis_tests::bench::{
    Report, access, agents, api, calls, dispatch, durable, idle, plain, recovery, report, scheduler, statements, waits,
};
use clap::{Parser, Subcommand};

/// Measures the engine on this machine.
#[derive(Debug, Parser)]
#[command(name = "borealis-bench")]
struct Line {
    /// Print the figures as one JSON document on standard output.
    #[arg(long, global = true)]
    json: bool,
    /// Also print which statements Postgres spent its time in; costs a little of every figure.
    #[arg(long, global = true)]
    statements: bool,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Durable runs: throughput, latency, hand-over.
    Durable(durable::Options),
    /// One job for 10,000 connected agents.
    Dispatch(dispatch::Options),
    /// 1,000 jobs of the same second among 100,000.
    Scheduler(scheduler::Options),
    /// 10,000 agents: memory, connects, the way back after a restart.
    Agents(agents::Options),
    /// The pages people look at, with 10,000 devices.
    Api(api::Options),
    /// Calls to an agent, through its API process and through another one.
    Calls(calls::Options),
    /// Signing in: what it costs, whom it slows down, what it tells.
    Access(access::Options),
    /// SIGKILL of the only busy worker while another stands by.
    Recovery(recovery::Options),
    /// 100,000 runs that wait.
    Waits(waits::Options),
    /// What an engine without work writes.
    Idle(idle::Options),
    /// All of these in turn, each as it is without options, and one report.
    All {
        /// The folder of the drivers of other systems.
        #[arg(long, env = "BOREALIS_PEERS_DIR", value_name = "DIR")]
        peers: Option<PathBuf>,
    },
    /// A plain program that a bench compares with.
    #[command(hide = true)]
    Plain {
        /// Which.
        which: plain::Plain,
        /// Where it listens.
        port: u16,
    },
}

/// What `all` is.
const ALL: [&str; 10] = ["durable", "recovery", "waits", "idle", "scheduler", "dispatch", "agents", "calls", "api", "access"];
/// Those that take `--peers`.
const WITH_PEERS: [&str; 2] = ["durable", "agents"];

/// Runs one bench; nothing for what is not one.
async fn run(bench: &Bench) -> Option<Report> {
    Some(match bench {
        Bench::Durable(options) => durable::run(options).await,
        Bench::Dispatch(options) => dispatch::run(options).await,
        Bench::Scheduler(options) => scheduler::run(options).await,
        Bench::Agents(options) => agents::run(options).await,
        Bench::Api(options) => api::run(options).await,
        Bench::Calls(options) => calls::run(options).await,
        Bench::Access(options) => access::run(options).await,
        Bench::Recovery(options) => recovery::run(options).await,
        Bench::Waits(options) => waits::run(options).await,
        Bench::Idle(options) => idle::run(options).await,
        Bench::All { .. } | Bench::Plain { .. } => return None,
    })
}

/// Runs every bench with what it does when nothing is said.
async fn all(peers: Option<&PathBuf>) -> Vec<Report> {
    let mut reports = Vec::new();
    for name in ALL {
        eprintln!("{name}:");
        let mut words = vec!["borealis-bench".into(), name.into()];
        if let Some(folder) = peers.filter(|_| WITH_PEERS.contains(&name)) {
            words.extend(["--peers".into(), folder.clone().into_os_string()]);
        }
        reports.extend(run(&Line::parse_from(words).bench).await);
    }
    reports
}

#[tokio::main]
async fn main() {
    let line = Line::parse();
    if line.statements {
        statements::want();
    }
    let reports = match &line.bench {
        Bench::Plain { which, port } => return plain::serve(*which, *port).await,
        Bench::All { peers } => all(peers.as_ref()).await,
        one => run(one).await.into_iter().collect(),
    };
    if line.json {
        println!("{}", serde_json::to_string_pretty(&reports).unwrap_or_default());
    } else {
        reports.iter().for_each(|report| println!("{report}"));
        println!("{}", report::summary(&reports));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bench_of_all_can_be_asked_for_with_its_peers() {
        for name in ALL {
            let mut words = vec!["borealis-bench", name, "--json"];
            words.extend(if WITH_PEERS.contains(&name) { vec!["--peers", "/somewhere"] } else { Vec::new() });
            assert!(Line::try_parse_from(words).is_ok(), "{name}");
        }
    }
}
