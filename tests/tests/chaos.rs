//! The short form of `./borealis chaos`, with seeds that are kept: a new one for everybody, and those that have failed once.

use borealis_tests::chaos::{Options, run};

/// Seconds of faults; the quiet and the reckoning come on top.
const SECONDS: u64 = 15;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_while_everything_fails() {
    let outcome = run(&Options { seconds: SECONDS, seed: Some(1), runs: 300, agents: 30, trace: false }).await;
    assert!(outcome.broken.is_empty(), "seed {}: {:#?}\n{}", outcome.seed, outcome.broken, outcome.summary.join("\n"));
}
