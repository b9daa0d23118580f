//! The core under simulated faults: see `borealis_tests::sim`. A seed that fails is printed with its last operations and can
//! be played again by `borealis-sim`.

use borealis_tests::sim::Simulator;

/// Seeds of one test run; `borealis-sim --seeds 10000` plays more.
const SEEDS: u64 = 200;
/// Seeds that once broke a rule.
const KEPT: [u64; 1] = [1083];

#[tokio::test]
async fn two_hundred_seeds_break_no_rule() {
    let simulator = Simulator::start().await;
    for seed in KEPT.into_iter().chain(0..SEEDS) {
        if let Err(failure) = simulator.run(seed, false).await {
            panic!("{failure}");
        }
    }
}

#[tokio::test]
async fn a_seed_does_the_same_again() {
    let simulator = Simulator::start().await;
    for seed in 1_000..1_005 {
        let first = simulator.run(seed, false).await.unwrap_or_else(|failure| panic!("{failure}"));
        let second = simulator.run(seed, false).await.unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(first, second, "seed {seed}");
    }
}
