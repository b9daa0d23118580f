//! `./borealis bench`: measures the built programs and prints figures beside their references.

use borealis_tests::bench::{Report, durable};
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
}

#[tokio::main]
async fn main() {
    let line = Line::parse();
    let reports: Vec<Report> = match &line.bench {
        Bench::Durable(options) => vec![durable::run(options).await],
    };
    if line.json {
        println!("{}", serde_json::to_string_pretty(&reports).unwrap_or_default());
    } else {
        reports.iter().for_each(|report| println!("{report}"));
    }
}
