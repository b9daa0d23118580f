//! `bench durable`: runs per second, steps per second, the latency of a run alone, of the hand-over between steps, and
//! from a start to the first step. One worker process with every promise on, one driver, one Postgres.

use std::time::{Duration, Instant};

use borealis_engine::db::Pool;
use borealis_workflows::{NewRun, Workflow, start};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::{
    Environment, Latencies, Report,
    environment::{Database, machine, resident_mib, tree_cpu_seconds},
    peers, per_second, reference,
    report::{Goal, median},
};
use crate::{Child, probe};

/// How much is measured.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Five-step runs of the throughput figure.
    #[arg(long, default_value_t = 20_000)]
    pub runs: usize,
    /// One-step runs that wait when the worker starts.
    #[arg(long, default_value_t = 200_000)]
    pub waiting: usize,
    /// Clients that start runs at the same time.
    #[arg(long, default_value_t = 512)]
    pub clients: usize,
    /// Steps the worker runs at the same time.
    #[arg(long, default_value_t = 1_000)]
    pub concurrency: usize,
    /// How often everything is measured, one round after the other. Shown are the median, the smallest and the largest.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub repeat: usize,
    /// Measure only this; may be given several times. Without it everything is measured.
    #[arg(long = "part", value_enum, value_name = "PART")]
    pub parts: Vec<Part>,
    /// The folder of the drivers of other systems: Restate and DBOS Transact are measured in the same run.
    #[arg(long, env = "BOREALIS_PEERS_DIR", value_name = "DIR")]
    pub peers: Option<std::path::PathBuf>,
}

/// One of the measurements of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// A run alone: from its start to its end.
    Alone,
    /// From a start to the begin of the step.
    AddToStart,
    /// Five-step runs by many clients.
    FiveSteps,
    /// The hand-over between steps at half of that rate.
    HalfLoad,
    /// One-step runs by many clients.
    OneStep,
    /// One-step runs that wait when the worker starts.
    Waiting,
}

impl Options {
    fn measures(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

/// What the rounds gave, figure by figure in the order in which they came first.
#[derive(Debug, Default)]
struct Rounds(Vec<Measured>);

#[derive(Debug)]
struct Measured {
    name: String,
    unit: &'static str,
    goal: Option<Goal>,
    values: Vec<f64>,
}

impl Rounds {
    fn add(&mut self, goal: Option<Goal>, name: impl Into<String>, value: f64, unit: &'static str) {
        let name = name.into();
        match self.0.iter_mut().find(|known| known.name == name) {
            Some(known) => known.values.push(value),
            None => self.0.push(Measured { name, unit, goal, values: vec![value] }),
        }
    }

    fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(None, name, value, unit);
    }

    fn at_least(&mut self, bound: f64, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(Some(Goal::AtLeast(bound)), name, value, unit);
    }

    fn at_most(&mut self, bound: f64, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(Some(Goal::AtMost(bound)), name, value, unit);
    }

    fn values(&self, name: &str) -> &[f64] {
        self.0.iter().find(|known| known.name == name).map_or(&[], |known| &known.values)
    }
}

/// The names of figures that others are made of.
const ALONE: &str = "a five-step run alone, start to end, p50";
const STEPS: &str = "their steps";

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("durable", &machine());
    let mut environment = Environment::start().await;
    let alone = reference::pgbench(&environment.cluster, 1, Duration::from_secs(4)).await;
    let together = reference::pgbench(&environment.cluster, 8, Duration::from_secs(6)).await;
    report.figure("reference: pgbench -N, 1 client", alone, "tx/s");
    report.figure("reference: pgbench -N, 8 clients", together, "tx/s");

    let mut bench = Bench::start(&mut environment, options).await;
    let mut rounds = Rounds::default();
    for round in 1..=options.repeat.max(1) {
        eprintln!("  round {round} of {}", options.repeat.max(1));
        bench.warm_up().await;
        bench.round(&mut rounds, &environment, options, together).await;
        if options.measures(Part::Waiting) {
            bench = bench.waiting(&mut rounds, &mut environment, options).await;
        }
    }
    for Measured { name, unit, goal, values } in &rounds.0 {
        report.median(*goal, name, values, unit);
    }
    let singles = rounds.values(&one_step(options));
    if singles.len() > 1 {
        let slowest = singles.iter().copied().fold(f64::INFINITY, f64::min);
        report.at_least(0.7, format!("{}: slowest round, to the median", one_step(options)), slowest / median(singles), "x");
    }
    if let Some(drivers) = &options.peers {
        // They have the machine to themselves, as ours had.
        drop((environment, bench));
        let ours = peers::Ours { runs_per_s: median(rounds.values(STEPS)) / 5.0, alone_ms: median(rounds.values(ALONE)) };
        peers::durable(drivers, ours, &mut report).await;
    }
    report
}

fn one_step(options: &Options) -> String {
    format!("one-step runs, {} clients", options.clients)
}

/// A worker process and a database.
struct Bench {
    database: Database,
    worker: Child,
}

impl Bench {
    async fn start(environment: &mut Environment, options: &Options) -> Self {
        let database = environment.database(32).await;
        probe::create_tables(&database.pool).await;
        environment.processes.set("CONCURRENCY", options.concurrency.to_string());
        let worker = environment.processes.start("test-worker", &[]);
        Self { database, worker }
    }

    /// Measures what was asked for, once.
    async fn round(&self, rounds: &mut Rounds, environment: &Environment, options: &Options, together: f64) {
        if options.measures(Part::Alone) {
            self.alone(rounds).await;
        }
        if options.measures(Part::AddToStart) {
            self.add_to_start(rounds).await;
        }
        if options.measures(Part::FiveSteps) || options.measures(Part::HalfLoad) {
            let (runs, cpu) = self.five_steps(environment, options).await;
            rounds.at_least(2_000.0, format!("five-step runs, {} clients", options.clients), runs, "runs/s");
            rounds.at_least(10_000.0, STEPS, runs * 5.0, "steps/s");
            rounds.figure("their steps for each transaction of pgbench -N, 8 clients", runs * 5.0 / together, "x");
            rounds.figure("processor time of worker and Postgres for each run", cpu * 1_000.0, "ms");
            rounds.figure("worker resident after it", resident_mib(self.worker.pid()), "MiB");
            if options.measures(Part::HalfLoad) {
                self.half_load(rounds, runs / 2.0).await;
            }
        }
        if options.measures(Part::OneStep) {
            self.one_step(rounds, options).await;
        }
    }

    /// Every round begins with empty tables.
    async fn warm_up(&self) {
        sqlx::raw_sql(EMPTY).execute(&self.database.pool).await.expect("empty tables");
        start_all(&self.database.pool, &probe::plain(), 500, 32).await;
        finished(&self.database.pool, "plain", 500).await;
        sqlx::raw_sql("VACUUM ANALYZE").execute(&self.database.pool).await.expect("a vacuum");
    }

    /// One run after another: from the call that starts it to the moment its caller hears that it has ended.
    async fn alone(&self, rounds: &mut Rounds) {
        let pool = &self.database.pool;
        let mut latencies = Latencies::default();
        let plain = probe::plain();
        for _ in 0..300 {
            let began = Instant::now();
            let run = start_one(pool, &plain).await;
            // Looking costs the two processors as much as running; before this much has passed it cannot have ended.
            tokio::time::sleep(Duration::from_millis(1)).await;
            while !is_finished(pool, run).await {
                // Shorter than the runtime's timer can wait; nothing else runs on this thread.
                std::thread::sleep(Duration::from_micros(200));
            }
            latencies.add(began.elapsed());
        }
        rounds.at_most(4.0, ALONE, latencies.percentile(50.0), "ms");
        rounds.figure("a five-step run alone, start to end, p99", latencies.percentile(99.0), "ms");
    }

    /// From the call that adds a one-step run to the begin of its step, on an idle system.
    async fn add_to_start(&self, rounds: &mut Rounds) {
        let pool = &self.database.pool;
        let single = probe::single();
        let mut latencies = Latencies::default();
        for _ in 0..500 {
            let began = chrono::Utc::now().timestamp_micros();
            let run = start_one(pool, &single).await;
            while !is_finished(pool, run).await {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            latencies.add_ms(milliseconds(stamp(pool, run).await - began));
        }
        rounds.at_most(2.0, "one-step run, add to start, p50", latencies.percentile(50.0), "ms");
        rounds.at_most(5.0, "one-step run, add to start, p99", latencies.percentile(99.0), "ms");
    }

    /// Runs per second, from the first start to the last end; and the processor seconds of worker and Postgres a run.
    async fn five_steps(&self, environment: &Environment, options: &Options) -> (f64, f64) {
        let pool = &self.database.pool;
        let cpu = || tree_cpu_seconds(environment.cluster.pid()) + tree_cpu_seconds(self.worker.pid());
        let (before, cpu_before, began) = (count_finished(pool, "plain").await, cpu(), Instant::now());
        start_all(pool, &probe::plain(), options.runs, options.clients).await;
        finished(pool, "plain", before + options.runs).await;
        let rate = per_second(options.runs, began.elapsed());
        #[allow(clippy::cast_precision_loss)]
        (rate, (cpu() - cpu_before) / options.runs as f64)
    }

    /// The time between the commits of successive empty steps, while runs arrive at a steady rate.
    async fn half_load(&self, rounds: &mut Rounds, rate: f64) {
        let pool = &self.database.pool;
        let last = sqlx::query_scalar::<_, uuid::Uuid>("SELECT id FROM workflow_runs ORDER BY id DESC LIMIT 1");
        let last = last.fetch_one(pool).await.expect("a run");
        let before = count_finished(pool, "plain").await;
        let runs = start_at(pool, &probe::plain(), rate, Duration::from_secs(8)).await;
        finished(pool, "plain", before + runs).await;
        let gaps: Vec<f64> = sqlx::query_scalar(
            "SELECT extract(epoch FROM at - before)::float8 * 1000 FROM (
                 SELECT kind, at, lag(at) OVER (PARTITION BY run_id ORDER BY seq) AS before FROM workflow_events WHERE run_id > $1) AS e
             WHERE kind IN ('step_committed', 'succeeded') AND before IS NOT NULL",
        )
        .bind(last)
        .fetch_all(pool)
        .await
        .expect("the events");
        let gaps: Latencies = gaps.into_iter().collect();
        rounds.figure("half load", rate, "runs/s");
        rounds.figure("hand-over between steps at half load, p50", gaps.percentile(50.0), "ms");
        rounds.at_most(100.0, "hand-over between steps at half load, p99", gaps.percentile(99.0), "ms");
    }

    async fn one_step(&self, rounds: &mut Rounds, options: &Options) {
        let pool = &self.database.pool;
        let (before, began) = (count_finished(pool, "single").await, Instant::now());
        start_all(pool, &probe::single(), options.runs, options.clients).await;
        finished(pool, "single", before + options.runs).await;
        let rate = per_second(options.runs, began.elapsed());
        rounds.at_least(4_370.0, one_step(options), rate, "runs/s");
        let (before, began) = (count_finished(pool, "single").await, Instant::now());
        start_each(pool, &probe::single(), options.runs / 4, 32).await;
        finished(pool, "single", before + options.runs / 4).await;
        let rate = per_second(options.runs / 4, began.elapsed());
        rounds.figure("one-step runs, 32 clients, each start a transaction of its own", rate, "runs/s");
    }

    /// Runs that wait when the worker starts: the rate over all, and that it does not depend on how many wait.
    async fn waiting(self, rounds: &mut Rounds, environment: &mut Environment, options: &Options) -> Self {
        let Self { database, worker } = self;
        let pool = database.pool.clone();
        worker.terminate().await;
        sqlx::raw_sql(EMPTY).execute(&pool).await.expect("empty tables");
        let began = Instant::now();
        start_many(&pool, &probe::single(), options.waiting).await;
        rounds.figure("one-step runs added, 1,000 in a transaction", per_second(options.waiting, began.elapsed()), "runs/s");
        let worker = environment.processes.start("test-worker", &[]);
        finished(&pool, "single", options.waiting / 100).await;
        let (began, tenth) = (Instant::now(), options.waiting / 10);
        let first = finished(&pool, "single", tenth).await;
        let first_rate = per_second(first, began.elapsed());
        let almost = finished(&pool, "single", options.waiting - tenth).await;
        let (last_began, all) = (Instant::now(), finished(&pool, "single", options.waiting).await);
        let last_rate = per_second(all - almost, last_began.elapsed());
        rounds.at_least(50_000.0, "one-step runs, already waiting", per_second(all, began.elapsed()), "runs/s");
        rounds.figure("the same, first tenth", first_rate, "runs/s");
        rounds.figure("the same, last tenth", last_rate, "runs/s");
        Self { database, worker }
    }
}

#[allow(clippy::cast_precision_loss)]
fn milliseconds(micros: i64) -> f64 {
    micros as f64 / 1_000.0
}

async fn start_one(pool: &Pool, workflow: &Workflow) -> uuid::Uuid {
    let new = NewRun { input: json!({"n": 1}), ..NewRun::default() };
    // One statement, and so a transaction of its own.
    let mut connection = pool.acquire().await.expect("a connection");
    start(&mut connection, workflow, new).await.expect("a start").run_id
}

/// Starts what its clients ask for: all that waits in one statement, as the engine does with outcomes. Each client hears when
/// its run is on disk.
fn starter(pool: &Pool, workflow: &Workflow) -> (mpsc::Sender<oneshot::Sender<()>>, tokio::task::JoinHandle<()>) {
    let (queue, mut inbox) = mpsc::channel::<oneshot::Sender<()>>(AT_ONCE);
    let (pool, workflow) = (pool.clone(), workflow.clone());
    let starting = tokio::spawn(async move {
        let mut batch = Vec::new();
        while inbox.recv_many(&mut batch, AT_ONCE).await > 0 {
            let new = batch.iter().map(|_| NewRun { input: json!({"n": 1}), ..NewRun::default() }).collect();
            let mut connection = pool.acquire().await.expect("a connection");
            borealis_workflows::start_many(&mut connection, &workflow, new).await.expect("a start");
            batch.drain(..).for_each(|client| {
                let _ = client.send(());
            });
        }
    });
    (queue, starting)
}

/// No runs, and no events of any.
const EMPTY: &str = "TRUNCATE workflow_runs, workflow_events CASCADE";
/// The most runs one statement starts.
const AT_ONCE: usize = 512;

/// Starts runs by so many clients, each of which waits until its run is on disk before it starts the next.
async fn start_all(pool: &Pool, workflow: &Workflow, count: usize, clients: usize) {
    let (queue, starting) = starter(pool, workflow);
    stream::iter(0..count)
        .for_each_concurrent(clients, |_| {
            let queue = queue.clone();
            async move {
                let (done, started) = oneshot::channel();
                queue.send(done).await.expect("a starter");
                started.await.expect("a start");
            }
        })
        .await;
    drop(queue);
    starting.await.expect("a starter that ends");
}

/// Starts runs by so many clients, each in a statement of its own.
async fn start_each(pool: &Pool, workflow: &Workflow, count: usize, clients: usize) {
    stream::iter(0..count)
        .for_each_concurrent(clients, |_| async move {
            start_one(pool, workflow).await;
        })
        .await;
}

/// Starts runs at a steady rate; answers how many.
async fn start_at(pool: &Pool, workflow: &Workflow, rate: f64, lasts: Duration) -> usize {
    let (queue, starting) = starter(pool, workflow);
    let mut every = tokio::time::interval(Duration::from_secs_f64(1.0 / rate.max(1.0)));
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < lasts {
        every.tick().await;
        // Nobody waits for it: the rate is what it is.
        queue.send(oneshot::channel().0).await.expect("a starter");
        count += 1;
    }
    drop(queue);
    starting.await.expect("a starter that ends");
    count
}

/// Starts runs, a thousand in a transaction.
async fn start_many(pool: &Pool, workflow: &Workflow, count: usize) {
    let mut left = count;
    while left > 0 {
        let mut connection = pool.acquire().await.expect("a connection");
        let new = (0..left.min(1_000)).map(|_| NewRun { input: json!({"n": 1}), ..NewRun::default() }).collect();
        borealis_workflows::start_many(&mut connection, workflow, new).await.expect("a start");
        left -= left.min(1_000);
    }
}

async fn is_finished(pool: &Pool, run: uuid::Uuid) -> bool {
    let sql = "SELECT finished_at IS NOT NULL FROM workflow_runs WHERE id = $1";
    sqlx::query_scalar(sql).bind(run).fetch_one(pool).await.expect("the run")
}

async fn stamp(pool: &Pool, run: uuid::Uuid) -> i64 {
    let output: Value =
        sqlx::query_scalar("SELECT output FROM workflow_runs WHERE id = $1").bind(run).fetch_one(pool).await.expect("the run");
    output.as_i64().expect("a stamp")
}

async fn count_finished(pool: &Pool, workflow: &str) -> usize {
    let sql = "SELECT count(*) FROM workflow_runs WHERE workflow = $1 AND state = 'succeeded'";
    let count: i64 = sqlx::query_scalar(sql).bind(workflow).fetch_one(pool).await.expect("a count");
    usize::try_from(count).unwrap_or(0)
}

/// Waits until so many runs have succeeded; answers how many there are then.
async fn finished(pool: &Pool, workflow: &str, count: usize) -> usize {
    let limit = Instant::now() + Duration::from_secs(600);
    loop {
        let now = count_finished(pool, workflow).await;
        if now >= count {
            return now;
        }
        assert!(Instant::now() < limit, "{now} of {count} runs of {workflow} ended in 600 s");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}
