//! `bench durable`: runs per second, steps per second, the latency of a run alone, of the hand-over between steps, and
//! from a start to the first step. One worker process with every promise on, one driver, one Postgres.

use std::time::{Duration, Instant};

use borealis_engine::db::Pool;
use borealis_workflows::{NewRun, durable::definition::Workflow, start};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use super::{
    Environment, Latencies, Report,
    environment::{Database, machine, resident_mib, tree_cpu_seconds},
    peers, per_second, reference,
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
    /// The folder of the drivers of other systems: Restate and DBOS Transact are measured in the same run.
    #[arg(long, env = "BOREALIS_PEERS_DIR", value_name = "DIR")]
    pub peers: Option<std::path::PathBuf>,
}

/// Runs the bench.
pub async fn run(options: &Options) -> Report {
    let mut report = Report::new("durable", &machine());
    let mut environment = Environment::start().await;
    let alone = reference::pgbench(&environment.cluster, 1, Duration::from_secs(4)).await;
    let together = reference::pgbench(&environment.cluster, 8, Duration::from_secs(6)).await;
    report.figure("reference: pgbench -N, 1 client", alone, "tx/s");
    report.figure("reference: pgbench -N, 8 clients", together, "tx/s");

    let bench = Bench::start(&mut environment, options).await;
    bench.warm_up().await;
    let alone_ms = bench.alone(&mut report).await;
    bench.add_to_start(&mut report).await;
    let (runs, cpu) = bench.five_steps(&environment, options).await;
    report.at_least(2_000.0, format!("five-step runs, {} clients", options.clients), runs, "runs/s");
    report.at_least(10_000.0, "their steps", runs * 5.0, "steps/s");
    report.figure("their steps for each transaction of pgbench -N, 8 clients", runs * 5.0 / together, "x");
    report.figure("processor time of worker and Postgres for each run", cpu * 1_000.0, "ms");
    report.figure("worker resident after it", resident_mib(bench.worker.pid()), "MiB");
    bench.half_load(&mut report, runs / 2.0).await;
    bench.one_step(&mut report, options).await;
    bench.waiting(&mut report, &mut environment, options).await;
    if let Some(drivers) = &options.peers {
        // They have the machine to themselves, as ours had.
        drop(environment);
        peers::durable(drivers, peers::Ours { runs_per_s: runs, alone_ms }, &mut report).await;
    }
    report
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

    async fn warm_up(&self) {
        start_all(&self.database.pool, &probe::plain(), 500, 32).await;
        finished(&self.database.pool, "plain", 500).await;
        sqlx::raw_sql("VACUUM ANALYZE").execute(&self.database.pool).await.expect("a vacuum");
    }

    /// One run after another: from the call that starts it to the moment its caller hears that it has ended.
    async fn alone(&self, report: &mut Report) -> f64 {
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
        report.at_most(4.0, "a five-step run alone, start to end, p50", latencies.percentile(50.0), "ms");
        report.figure("a five-step run alone, start to end, p99", latencies.percentile(99.0), "ms");
        latencies.percentile(50.0)
    }

    /// From the call that adds a one-step run to the begin of its step, on an idle system.
    async fn add_to_start(&self, report: &mut Report) {
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
        report.at_most(2.0, "one-step run, add to start, p50", latencies.percentile(50.0), "ms");
        report.at_most(5.0, "one-step run, add to start, p99", latencies.percentile(99.0), "ms");
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
    async fn half_load(&self, report: &mut Report, rate: f64) {
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
        report.figure("half load", rate, "runs/s");
        report.figure("hand-over between steps at half load, p50", gaps.percentile(50.0), "ms");
        report.at_most(100.0, "hand-over between steps at half load, p99", gaps.percentile(99.0), "ms");
    }

    async fn one_step(&self, report: &mut Report, options: &Options) {
        let pool = &self.database.pool;
        let (before, began) = (count_finished(pool, "single").await, Instant::now());
        start_all(pool, &probe::single(), options.runs, options.clients).await;
        finished(pool, "single", before + options.runs).await;
        let rate = per_second(options.runs, began.elapsed());
        report.at_least(4_370.0, format!("one-step runs, {} clients", options.clients), rate, "runs/s");
        let (before, began) = (count_finished(pool, "single").await, Instant::now());
        start_each(pool, &probe::single(), options.runs / 4, 32).await;
        finished(pool, "single", before + options.runs / 4).await;
        let rate = per_second(options.runs / 4, began.elapsed());
        report.figure("one-step runs, 32 clients, each start a transaction of its own", rate, "runs/s");
    }

    /// Runs that wait when the worker starts: the rate over all, and that it does not depend on how many wait.
    async fn waiting(self, report: &mut Report, environment: &mut Environment, options: &Options) {
        let Self { database, worker } = self;
        let pool = database.pool;
        worker.terminate().await;
        sqlx::raw_sql("TRUNCATE workflow_runs, workflow_events CASCADE").execute(&pool).await.expect("an empty table");
        let began = Instant::now();
        start_many(&pool, &probe::single(), options.waiting).await;
        report.figure("one-step runs added, 1,000 in a transaction", per_second(options.waiting, began.elapsed()), "runs/s");
        let worker = environment.processes.start("test-worker", &[]);
        finished(&pool, "single", options.waiting / 100).await;
        let (began, tenth) = (Instant::now(), options.waiting / 10);
        let first = finished(&pool, "single", tenth).await;
        let first_rate = per_second(first, began.elapsed());
        let almost = finished(&pool, "single", options.waiting - tenth).await;
        let (last_began, all) = (Instant::now(), finished(&pool, "single", options.waiting).await);
        let last_rate = per_second(all - almost, last_began.elapsed());
        report.at_least(50_000.0, "one-step runs, already waiting", per_second(all, began.elapsed()), "runs/s");
        report.figure("the same, first tenth", first_rate, "runs/s");
        report.figure("the same, last tenth", last_rate, "runs/s");
        worker.terminate().await;
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
