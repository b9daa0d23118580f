//! `./borealis chaos`: faults and load from a seed, then quiet and a reckoning. Exit status 1 when a promise was broken.

use std::process::ExitCode;

use borealis_tests::chaos::{self, Options};
use clap::Parser;

/// Kills, freezes, cuts off and slows down the parts of an engine under load, and checks that nothing is lost or doubled.
#[derive(Debug, Parser)]
#[command(name = "borealis-chaos")]
struct Line {
    #[command(flatten)]
    options: Options,
    /// How many runs, each with the next seed.
    #[arg(long, default_value_t = 1)]
    times: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Line { options, times } = Line::parse();
    let first = options.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let mut failed = Vec::new();
    for seed in first..first.saturating_add(times) {
        let outcome = chaos::run(&Options { seed: Some(seed), ..options.clone() }).await;
        outcome.summary.iter().for_each(|line| println!("  {line}"));
        if outcome.broken.is_empty() {
            println!("seed {seed}: nothing lost, nothing doubled");
        } else {
            outcome.broken.iter().for_each(|line| println!("  BROKEN: {line}"));
            println!(
                "seed {seed}: {} promises broken; again with: ./borealis chaos --seed {seed} --seconds {}",
                outcome.broken.len(),
                options.seconds
            );
            failed.push(seed);
        }
    }
    println!("{} of {times} runs of chaos passed", times - failed.len() as u64);
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
