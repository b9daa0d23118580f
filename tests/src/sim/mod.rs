//! A seeded simulation of the durable core: the engine's own statements against a real database, under virtual time and
//! between faults. One thread, one operation at a time; the same seed does the same again.
//!
//! * [`clock`]: virtual time, and connections that believe it.
//! * [`plan`]: generated workflows.
//! * [`world`]: workers, operators, schedulers, faults.
//! * [`check`]: what must be true between any two transactions.
//! * [`truth`]: what must have become of everything in the end.

pub mod check;
pub mod clock;
pub mod plan;
pub mod truth;
pub mod world;

use std::fmt;

use borealis_engine::db::Pool;
use sqlx::AssertSqlSafe;

use self::{clock::Clock, world::World};
use crate::TestDatabase;

/// Operations of one seed, before the quiet.
const OPERATIONS: u32 = 120;
/// Operations between two looks at the rules.
const INSPECT_EVERY: u32 = 20;
/// How many of the last operations a failure shows.
const SHOWN: usize = 60;

/// A database prepared for simulation.
#[derive(Debug)]
pub struct Simulator {
    clock: Clock,
    pool: Pool,
    _database: TestDatabase,
}

/// What a seed that broke a rule tells.
#[derive(Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// The rules it broke.
    pub wrong: Vec<String>,
    /// Its last operations.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the last operations of seed {}:", self.seed)?;
        for line in &self.trace {
            writeln!(f, "  {line}")?;
        }
        for wrong in self.wrong.iter().take(20) {
            writeln!(f, "seed {}: {wrong}", self.seed)?;
        }
        write!(f, "again: cargo run -p borealis-tests --bin borealis-sim -- --seed {} --trace", self.seed)
    }
}

impl Simulator {
    /// Prepares a database of its own.
    pub async fn start() -> Self {
        let database = TestDatabase::start().await;
        sqlx::raw_sql(include_str!("virtual.sql")).execute(&database.pool).await.expect("virtual time");
        let clock = Clock::default();
        let pool = clock.pool(&database.url);
        Self { clock, pool, _database: database }
    }

    /// Runs one seed. `aloud` prints every operation.
    ///
    /// # Errors
    /// When a rule was broken.
    pub async fn run(&self, seed: u64, aloud: bool) -> Result<usize, Failure> {
        self.clock.reset();
        self.clear().await;
        let mut world = World::new(self.clock.clone(), self.pool.clone(), seed, aloud);
        world.open().await;
        for operation in 0..OPERATIONS {
            world.step().await;
            if (operation + 1) % INSPECT_EVERY == 0 || aloud {
                world.inspect().await;
            }
            if !world.wrong.is_empty() {
                return Err(failure(seed, world));
            }
        }
        world.calm().await;
        if world.wrong.is_empty() && world.retry_some().await {
            world.inspect().await;
            world.calm().await;
        }
        world.inspect().await;
        let broken = check::at_the_end(&self.pool).await;
        let broken: Vec<String> = broken.iter().map(|rule| world.named(rule)).collect();
        world.wrong.extend(broken);
        world.judge().await;
        if world.wrong.is_empty() { Ok(world.trace.len()) } else { Err(failure(seed, world)) }
    }

    async fn clear(&self) {
        let tables: Vec<String> = sqlx::query_scalar(
            "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relname IN ('workflow_runs', 'workflow_journal', 'workflow_events', 'workflow_signals', 'workflow_limits', 'duty_leases',
                                 'job_occurrences', 'occurrence_scripts', 'scheduled_job_runs', 'scheduled_jobs', 'activity_history', 'activity_events', 'jobs', 'sim_effects')
               AND c.relkind = 'r' AND n.nspname IN ('public', 'apalis')",
        )
        .fetch_all(&self.pool)
        .await
        .expect("the tables");
        let sql = format!("TRUNCATE {} RESTART IDENTITY", tables.join(", "));
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.pool).await.expect("empty tables");
    }
}

fn failure(seed: u64, world: World) -> Failure {
    let shown = world.trace.len().saturating_sub(SHOWN);
    Failure { seed, wrong: world.wrong, trace: world.trace[shown..].to_vec() }
}
