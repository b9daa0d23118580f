//! Plays seeds of the simulated core: many, or one aloud.

use std::time::Instant;

use borealis_tests::sim::Simulator;
use clap::Parser;

#[derive(Debug, Parser)]
#[command(about = "Simulates the durable core under virtual time and faults, from seeds")]
struct Arguments {
    /// How many seeds to play.
    #[arg(long, default_value_t = 200)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Plays this seed only.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints every operation.
    #[arg(long)]
    trace: bool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments = Arguments::parse();
    let seeds = match arguments.seed {
        Some(seed) => seed..seed + 1,
        None => arguments.from..arguments.from + arguments.seeds,
    };
    let simulator = Simulator::start().await;
    let started = Instant::now();
    let (mut operations, mut failed, mut played) = (0, Vec::new(), 0_u64);
    for seed in seeds {
        match simulator.run(seed, arguments.trace).await {
            Ok(count) => operations += count,
            Err(failure) => {
                println!("{failure}\n");
                failed.push(seed);
            }
        }
        played += 1;
        if played.is_multiple_of(500) {
            println!("{played} seeds, {} failed, {:.0} s", failed.len(), started.elapsed().as_secs_f64());
        }
    }
    println!("{played} seeds, {operations} operations, {:.1} s; failed: {failed:?}", started.elapsed().as_secs_f64());
    if !failed.is_empty() {
        std::process::exit(1);
    }
}
