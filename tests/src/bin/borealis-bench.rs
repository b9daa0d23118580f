//! `./borealis bench`: measures the built programs and prints figures beside their references.

use borealis_tests::bench::{Report, agents, api, dispatch, durable, plain, scheduler};
use clap::{Parser, Subcommand};

/// Measures the engine on this machine.
#[derive(Debug, Parser)]
#[command(name = "borealis-bench")]
struct Line {
    /// Print the figures as one JSON document on standard output.
    #[arg(long, global = true)]
    json: bool,
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
    /// A plain program that a bench compares with.
    #[command(hide = true)]
    Plain {
        /// Which.
        which: plain::Plain,
        /// Where it listens.
        port: u16,
    },
}

#[tokio::main]
async fn main() {
    let line = Line::parse();
    let reports: Vec<Report> = match &line.bench {
        Bench::Durable(options) => vec![durable::run(options).await],
        Bench::Dispatch(options) => vec![dispatch::run(options).await],
        Bench::Scheduler(options) => vec![scheduler::run(options).await],
        Bench::Agents(options) => vec![agents::run(options).await],
        Bench::Api(options) => vec![api::run(options).await],
        Bench::Plain { which, port } => return plain::serve(*which, *port).await,
    };
    if line.json {
        println!("{}", serde_json::to_string_pretty(&reports).unwrap_or_default());
    } else {
        reports.iter().for_each(|report| println!("{report}"));
    }
}
