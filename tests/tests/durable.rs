//! The promises of the durable runtime (docs/architecture.md, *Durable runs*), each shown by the fault it is against.
//!
//! In-process workers where a fault can be caused from inside; real processes and SIGKILL in `crash.rs`.

use std::{sync::Arc, time::Duration};

use borealis_tasks::Tasks;
use borealis_tests::{TestDatabase, eventually, probe};
use borealis_workflows::{
    CancelAsked, NewRun, Services, Workflow,
    durable::{
        Outcome, POLL_EVERY, RetryAsked, Started, claim,
        connect::Connect,
        recovery,
        wakeup::{Sleep, Wakeup},
        worker, workflow,
    },
    request_cancel, retry, signal, start,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(20);

/// A database with the probe's tables, and what is needed to run workers on it.
struct Bench {
    database: TestDatabase,
    stops: Vec<(CancellationToken, tokio::task::JoinHandle<()>)>,
}

impl Bench {
    async fn new() -> Self {
        let database = TestDatabase::start().await;
        probe::create_tables(&database.pool).await;
        Self { database, stops: Vec::new() }
    }

    fn pool(&self) -> &PgPool {
        &self.database.pool
    }

    fn worker(&mut self, name: &str) -> &mut Self {
        self.worker_that_polls(name, POLL_EVERY)
    }

    fn worker_that_polls(&mut self, name: &str, poll_every: Duration) -> &mut Self {
        let pool = borealis_engine::db::connect(&borealis_engine::db::Options {
            url: self.database.url.to_string(),
            max_connections: 8,
            application_name: name.into(),
        })
        .unwrap();
        let services = Services { pool, agents: Arc::new(probe::NoAgents) };
        let stop = CancellationToken::new();
        let options = worker::Options { poll_every, ..worker::Options::new(name, &services.pool, &stop) };
        let running = worker::run(probe::registry(), services, options, stop.clone());
        self.stops.push((stop, tokio::spawn(running)));
        self
    }

    async fn stop(mut self) {
        for (stop, running) in self.stops.drain(..) {
            stop.cancel();
            running.await.unwrap();
        }
    }

    async fn start(&self, workflow: &Workflow, input: Value) -> Uuid {
        let mut tx = self.pool().begin().await.unwrap();
        let started = start(&mut tx, workflow, NewRun { input, ..NewRun::default() }).await.unwrap();
        tx.commit().await.unwrap();
        started.run_id
    }

    async fn state(&self, run: Uuid) -> (String, String, Option<String>) {
        sqlx::query_as("SELECT state, step, error FROM workflow_runs WHERE id = $1")
            .bind(run)
            .fetch_one(self.pool())
            .await
            .unwrap()
    }

    async fn reaches(&self, run: Uuid, wanted: &str) {
        eventually(&format!("run {run} is {wanted}"), SOON, || async { (self.state(run).await.0 == wanted).then_some(()) }).await;
    }

    async fn count(&self, sql: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql.to_owned())).fetch_one(self.pool()).await.unwrap()
    }

    async fn send(&self, run: Uuid, name: &str, payload: Value) -> bool {
        let mut tx = self.pool().begin().await.unwrap();
        let sent = signal(&mut tx, run, name, &payload).await.unwrap();
        tx.commit().await.unwrap();
        sent
    }

    async fn cancel(&self, run: Uuid) -> CancelAsked {
        let mut tx = self.pool().begin().await.unwrap();
        let asked = request_cancel(&mut tx, run, "test").await.unwrap();
        tx.commit().await.unwrap();
        asked
    }

    /// Nothing half-done is left: no lease, no hint, events and journal without gap or double.
    async fn is_clean(&self) {
        assert_eq!(
            self.count("SELECT count(*) FROM workflow_runs WHERE finished_at IS NULL OR lease_token IS NOT NULL").await,
            0
        );
        // A hint that came too late for its run is consumed by the next claim.
        eventually("no hint is left", SOON, || async {
            (self.count("SELECT count(*) FROM apalis.jobs").await == 0).then_some(())
        })
        .await;
        let gaps = "SELECT count(*) FROM (SELECT run_id, max(seq) - count(*) AS missing FROM workflow_events GROUP BY run_id) e WHERE missing <> 0";
        assert_eq!(self.count(gaps).await, 0, "event numbers have gaps");
        let gaps =
            "SELECT count(*) FROM workflow_runs r WHERE r.seq <> (SELECT count(*) FROM workflow_journal j WHERE j.run_id = r.id)";
        assert_eq!(self.count(gaps).await, 0, "the journal does not match the runs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_through_all_its_steps_and_leaves_its_history() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let run = bench.start(&probe::probe(), json!({})).await;
    eventually("the probe waits", SOON, || async {
        (bench.state(run).await.1 == "wait" && bench.state(run).await.0 == "waiting").then_some(())
    })
    .await;
    assert!(bench.send(run, probe::GO, json!({"answer": 42})).await);
    bench.reaches(run, "succeeded").await;
    let output: Value =
        sqlx::query_scalar("SELECT output FROM workflow_runs WHERE id = $1").bind(run).fetch_one(bench.pool()).await.unwrap();
    assert_eq!(output, json!({"answer": 42}));
    let steps: Vec<String> = sqlx::query_scalar("SELECT step FROM workflow_journal WHERE run_id = $1 ORDER BY seq")
        .bind(run)
        .fetch_all(bench.pool())
        .await
        .unwrap();
    assert_eq!(steps, ["write", "call", "children", "children", "wait", "wait", "end"]);
    assert_eq!(bench.count("SELECT count(*) FROM probe_rows").await, 1 + probe::CHILDREN);
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_start_key_starts_one_run_however_many_ask() {
    let bench = Bench::new().await;
    let asks = (0..20).map(|_| {
        let pool = bench.pool().clone();
        async move {
            let mut tx = pool.begin().await.unwrap();
            let new = NewRun { key: Some("the same".into()), input: json!({}), ..NewRun::default() };
            let started = start(&mut tx, &probe::plain(), new).await.unwrap();
            tx.commit().await.unwrap();
            started
        }
    });
    let started = futures::future::join_all(asks).await;
    assert_eq!(started.iter().filter(|started| started.created).count(), 1);
    assert!(started.iter().all(|other| other.run_id == started[0].run_id));
    assert_eq!(bench.count("SELECT count(*) FROM workflow_runs").await, 1);
    assert_eq!(bench.count("SELECT count(*) FROM apalis.jobs").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_what_the_caller_rolls_back_was_never_started() {
    let mut bench = Bench::new().await;
    let mut tx = bench.pool().begin().await.unwrap();
    start(&mut tx, &probe::plain(), NewRun { input: json!({}), ..NewRun::default() }).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(
        bench.count("SELECT count(*) FROM workflow_runs").await + bench.count("SELECT count(*) FROM apalis.jobs").await,
        0
    );
    bench.worker("w1");
    let run = bench.start(&probe::plain(), json!({})).await;
    bench.reaches(run, "succeeded").await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_claim_that_lost_its_lease_commits_nothing_and_a_ready_run_is_claimed_once() {
    let bench = Bench::new().await;
    let run = bench.start(&probe::plain(), json!({})).await;
    let claims = futures::future::join_all((0..10).map(|n| {
        let pool = bench.pool().clone();
        async move { claim::claim(&pool, "plain.v1", &format!("w{n}"), 10).await.unwrap().len() }
    }))
    .await;
    assert_eq!(claims.iter().sum::<usize>(), 1, "ten claimers, one lease");
    // The lease runs out and another takes over; the old token is worth nothing.
    sqlx::query("UPDATE workflow_runs SET lease_expires_at = now() - interval '1 second'").execute(bench.pool()).await.unwrap();
    eventually("the lease is taken back", SOON, || async {
        (recovery::expired_leases(bench.pool(), &probe::registry()).await.unwrap() == 1).then_some(())
    })
    .await;
    assert_eq!(claim::claim(bench.pool(), "plain.v1", "later", 10).await.unwrap().len(), 1);
    assert_eq!(bench.state(run).await.0, "running");
    let kinds: Vec<String> =
        sqlx::query_scalar("SELECT kind FROM workflow_events ORDER BY seq").fetch_all(bench.pool()).await.unwrap();
    assert_eq!(kinds, ["created", "step_started", "worker_lost", "step_started"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn p3_a_step_that_must_not_be_repeated_ends_as_interrupted() {
    let mut bench = Bench::new().await;
    let run = bench.start(&probe::fragile(), json!({})).await;
    assert_eq!(claim::claim(bench.pool(), "fragile.v1", "dead", 1).await.unwrap().len(), 1);
    sqlx::query("UPDATE workflow_runs SET lease_expires_at = now() - interval '1 second'").execute(bench.pool()).await.unwrap();
    bench.worker("w1");
    bench.reaches(run, "failed").await;
    let error = bench.state(run).await.2.unwrap();
    assert!(error.starts_with("interrupted: the worker dead was lost in step once"), "{error}");
    assert_eq!(bench.count("SELECT count(*) FROM probe_calls").await, 0);
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p5_the_third_death_in_one_step_fails_the_run() {
    let bench = Bench::new().await;
    let run = bench.start(&probe::plain(), json!({})).await;
    for death in 1..=3 {
        eventually("a claim", SOON, || async {
            (claim::claim(bench.pool(), "plain.v1", "doomed", 1).await.unwrap().len() == 1).then_some(())
        })
        .await;
        sqlx::query("UPDATE workflow_runs SET lease_expires_at = now() - interval '1 second'")
            .execute(bench.pool())
            .await
            .unwrap();
        eventually("a recovery", SOON, || async {
            (recovery::expired_leases(bench.pool(), &probe::registry()).await.unwrap() == 1).then_some(())
        })
        .await;
        assert_eq!(bench.state(run).await.0, if death < 3 { "pending" } else { "failed" });
    }
    let error = bench.state(run).await.2.unwrap();
    assert!(error.starts_with("worker_lost: "), "{error}");
    bench.is_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p6_a_signal_before_the_wait_is_kept_and_a_wait_costs_no_worker() {
    let mut bench = Bench::new().await;
    let run = bench.start(&probe::probe(), json!({})).await;
    assert!(bench.send(run, probe::GO, json!("early")).await);
    bench.worker("w1");
    bench.reaches(run, "succeeded").await;
    assert_eq!(bench.count("SELECT count(*) FROM workflow_signals").await, 0, "the signal is used up");
    assert!(!bench.send(run, probe::GO, json!("late")).await, "an ended run takes no signal");
    // More waiting runs than the worker has slots, and still another run gets through.
    let mut waiting = Vec::new();
    for _ in 0..20 {
        waiting.push(bench.start(&probe::probe(), json!({})).await);
    }
    for run in &waiting {
        bench.reaches(*run, "waiting").await;
    }
    let through = bench.start(&probe::plain(), json!({})).await;
    bench.reaches(through, "succeeded").await;
    for run in waiting {
        eventually("it waits for the signal", SOON, || async { (bench.state(run).await.1 == "wait").then_some(()) }).await;
        bench.send(run, probe::GO, json!(1)).await;
        bench.reaches(run, "succeeded").await;
    }
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p6_signals_racing_with_the_wait_are_never_lost() {
    let mut bench = Bench::new().await;
    bench.worker("w1").worker("w2");
    let mut runs = Vec::new();
    for _ in 0..40 {
        runs.push(bench.start(&probe::probe(), json!({})).await);
    }
    let signals = runs.iter().map(|run| bench.send(*run, probe::GO, json!(1)));
    assert!(futures::future::join_all(signals).await.into_iter().all(|sent| sent));
    for run in runs {
        bench.reaches(run, "succeeded").await;
    }
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p6_an_instant_wakes_a_wait() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let run = bench.start(&probe::napper(), json!({"ms": 300})).await;
    bench.reaches(run, "succeeded").await;
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_cancel_reaches_a_queued_a_waiting_and_a_running_run() {
    let mut bench = Bench::new().await;
    let queued = bench.start(&probe::probe(), json!({})).await;
    assert_eq!(bench.cancel(queued).await, CancelAsked::Cancelling);
    assert_eq!(bench.cancel(queued).await, CancelAsked::Already);
    bench.worker("w1");
    bench.reaches(queued, "cancelled").await;
    assert_eq!(bench.cancel(queued).await, CancelAsked::Ended);
    let waiting = bench.start(&probe::probe(), json!({})).await;
    eventually("it waits", SOON, || async { (bench.state(waiting).await.1 == "wait").then_some(()) }).await;
    bench.cancel(waiting).await;
    bench.reaches(waiting, "cancelled").await;
    let running = bench.start(&probe::sleeper(), json!({})).await;
    bench.reaches(running, "running").await;
    bench.cancel(running).await;
    bench.reaches(running, "cancelled").await;
    assert_eq!(
        bench.count("SELECT count(*) FROM probe_rows WHERE key LIKE 'undo:%' AND written = 1").await,
        3,
        "each undo ran once"
    );
    assert_eq!(bench.state(running).await.2.as_deref(), Some("test"));
    assert_eq!(bench.cancel(Uuid::new_v4()).await, CancelAsked::Unknown);
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_a_cancel_that_races_with_a_wait_is_never_lost() {
    let mut bench = Bench::new().await;
    bench.worker("w1").worker("w2");
    let asks = (0..60).map(|n| {
        let (bench, pool) = (&bench, bench.pool().clone());
        async move {
            let run = bench.start(&probe::probe(), json!({})).await;
            tokio::time::sleep(Duration::from_millis(n * 7 % 400)).await;
            // The row is held for a while, so that a commit that had begun waits for this one.
            let mut tx = pool.begin().await.unwrap();
            let asked = request_cancel(&mut tx, run, "race").await.unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
            tx.commit().await.unwrap();
            assert_eq!(asked, CancelAsked::Cancelling);
            run
        }
    });
    for run in futures::future::join_all(asks).await {
        bench.reaches(run, "cancelled").await;
    }
    // Children of cancelled parents go on by themselves; only the parents were cancelled.
    eventually("all runs end", SOON, || async {
        (bench.count("SELECT count(*) FROM workflow_runs WHERE finished_at IS NULL").await == 0).then_some(())
    })
    .await;
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transient_failures_are_tried_again_and_final_ones_are_not() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let twice = bench.start(&probe::moody(), json!({"transient": 2})).await;
    bench.reaches(twice, "succeeded").await;
    let too_often = bench.start(&probe::moody(), json!({"transient": 3})).await;
    bench.reaches(too_often, "failed").await;
    assert_eq!(bench.state(too_often).await.2.as_deref(), Some("try 3 is not enough"));
    let refused = bench.start(&probe::moody(), json!({"final": 1})).await;
    bench.reaches(refused, "failed").await;
    let attempts = |run: Uuid| format!("SELECT count(*) FROM probe_attempts WHERE step = '{run}'");
    assert_eq!(bench.count(&attempts(twice)).await, 3);
    assert_eq!(bench.count(&attempts(too_often)).await, 3);
    assert_eq!(bench.count(&attempts(refused)).await, 1);
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_and_an_outcome_the_database_refuses_fail_one_run_and_nothing_else() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let panics = bench.start(&probe::moody(), json!({"panic": 1})).await;
    let refused = bench.start(&probe::moody(), json!({"unstorable": 1})).await;
    let good = bench.start(&probe::plain(), json!({})).await;
    bench.reaches(good, "succeeded").await;
    bench.reaches(panics, "failed").await;
    bench.reaches(refused, "failed").await;
    assert_eq!(bench.state(panics).await.2.as_deref(), Some("panic: as the test wants it"));
    assert!(bench.state(refused).await.2.unwrap().starts_with("outcome_refused: "));
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_may_fail_its_run_and_keep_what_it_wrote() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let run = bench.start(&probe::moody(), json!({"ends_failed": true})).await;
    bench.reaches(run, "failed").await;
    assert_eq!(bench.state(run).await, ("failed".into(), "try".into(), Some("bad_luck: The work went wrong.".into())));
    let output = async || -> Option<Value> {
        sqlx::query_scalar("SELECT output FROM workflow_runs WHERE id = $1").bind(run).fetch_one(bench.pool()).await.unwrap()
    };
    assert_eq!(output().await, Some(json!({"written": 1})));
    assert_eq!(bench.count("SELECT count(*) FROM probe_rows WHERE written = 1").await, 1, "it stays");
    assert_eq!(bench.count("SELECT count(*) FROM probe_attempts").await, 1, "nothing was tried again");

    let mut tx = bench.pool().begin().await.unwrap();
    retry(&mut tx, run, "test").await.unwrap();
    tx.commit().await.unwrap();
    bench.reaches(run, "succeeded").await;
    assert_eq!(output().await, Some(json!({"written": 2})), "the step ran again, under the same key");
    bench.is_clean().await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_can_be_retried_from_its_failed_step() {
    let mut bench = Bench::new().await;
    bench.worker("w1");
    let run = bench.start(&probe::moody(), json!({"transient": 4})).await;
    bench.reaches(run, "failed").await;
    let mut tx = bench.pool().begin().await.unwrap();
    retry(&mut tx, run, "somebody").await.unwrap();
    tx.commit().await.unwrap();
    // Its attempts begin anew, so it fails again; and it says so.
    eventually("the second failure", SOON, || async {
        (bench.count(&format!("SELECT count(*) FROM probe_attempts WHERE step = '{run}'")).await == 6).then_some(())
    })
    .await;
    bench.reaches(run, "failed").await;
    let good = bench.start(&probe::plain(), json!({})).await;
    bench.reaches(good, "succeeded").await;
    let mut conn = bench.pool().acquire().await.unwrap();
    assert_eq!(retry(&mut conn, good, "somebody").await.unwrap(), RetryAsked::NotFailed("succeeded".to_owned()));
    assert_eq!(retry(&mut conn, Uuid::new_v4(), "somebody").await.unwrap(), RetryAsked::Unknown);
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn p10_bounds_of_keys_hold_and_are_freed_by_a_dead_worker() {
    let bench = Bench::new().await;
    sqlx::query("INSERT INTO workflow_limits (key, bound) VALUES ('site:1', 2)").execute(bench.pool()).await.unwrap();
    for _ in 0..5 {
        let mut tx = bench.pool().begin().await.unwrap();
        let new = NewRun { input: json!({}), limit_keys: vec!["site:1".into()], ..NewRun::default() };
        start(&mut tx, &probe::plain(), new).await.unwrap();
        tx.commit().await.unwrap();
    }
    let claimed = futures::future::join_all((0..5).map(|n| {
        let pool = bench.pool().clone();
        async move { claim::claim(&pool, "plain.v1", &format!("w{n}"), 10).await.unwrap().len() }
    }))
    .await;
    assert_eq!(claimed.iter().sum::<usize>(), 2, "the bound holds against concurrent claimers");
    sqlx::query("UPDATE workflow_runs SET lease_expires_at = now() - interval '1 second' WHERE lease_token IS NOT NULL")
        .execute(bench.pool())
        .await
        .unwrap();
    eventually("both leases are taken back", SOON, || async {
        recovery::expired_leases(bench.pool(), &probe::registry()).await.unwrap();
        (bench.count("SELECT count(*) FROM workflow_runs WHERE lease_token IS NOT NULL").await == 0).then_some(())
    })
    .await;
    eventually("the bound is free again", SOON, || async {
        (!claim::claim(bench.pool(), "plain.v1", "next", 10).await.unwrap().is_empty()).then_some(())
    })
    .await;
    assert!(bench.count("SELECT count(*) FROM workflow_runs WHERE lease_token IS NOT NULL").await <= 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_may_be_doubled_stale_or_lost() {
    let mut bench = Bench::new().await;
    let run = bench.start(&probe::plain(), json!({})).await;
    sqlx::query(
        "INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority, metadata, idempotency_key)
         SELECT '01ARZ3NDEKTSV4RRFFQ69G5FA' || n, job_type, job, status, attempts, max_attempts, run_at, priority, metadata, 'double' || n
         FROM apalis.jobs, generate_series(1, 5) AS n",
    )
    .execute(bench.pool())
    .await
    .unwrap();
    bench.worker("w1").worker("w2");
    bench.reaches(run, "succeeded").await;
    eventually("stale hints are consumed", SOON, || async {
        (bench.count("SELECT count(*) FROM apalis.jobs").await == 0).then_some(())
    })
    .await;
    assert_eq!(bench.count("SELECT count(*) FROM workflow_journal").await, 5, "no step ran twice");
    bench.is_clean().await;
    let lost = bench.start(&probe::plain(), json!({})).await;
    bench.reaches(lost, "succeeded").await;
    bench.stop().await;

    let bench = Bench::new().await;
    bench.start(&probe::plain(), json!({})).await;
    sqlx::query("DELETE FROM apalis.jobs").execute(bench.pool()).await.unwrap();
    sqlx::query("UPDATE workflow_runs SET ready_at = now() - interval '1 minute'").execute(bench.pool()).await.unwrap();
    assert_eq!(recovery::lost_hints(bench.pool()).await.unwrap(), 1);
    assert_eq!(recovery::lost_hints(bench.pool()).await.unwrap(), 0, "a run with a hint gets no second one");
    assert_eq!(claim::claim(bench.pool(), "plain.v1", "w", 10).await.unwrap().len(), 1);
}

#[test]
fn p9_published_workflows_keep_their_steps() {
    // A change of a line here is a change of runs that are on their way: add a version beside the old one instead.
    let published = include_str!("../published_workflows.txt");
    let now: String = borealis_workflows::registry().iter().map(|workflow| format!("{}\n", workflow.shape())).collect();
    assert_eq!(published, now, "a published version changed, or a new one is not written down");
}

#[tokio::test]
async fn a_claim_reads_what_it_takes_and_not_a_queue_that_counts_as_empty() {
    const WAITING: usize = 3_000;
    const TAKEN: usize = 200;
    let bench = Bench::new().await;
    let mut tx = bench.pool().begin().await.unwrap();
    borealis_workflows::start_many(&mut tx, &probe::single(), vec![NewRun::default(); WAITING]).await.unwrap();
    tx.commit().await.unwrap();
    // As vacuum leaves it after a look at an empty queue. The planner scales this by the size of the table: none in any size.
    for table in ["apalis.jobs", "workflow_runs"] {
        let sql = format!("UPDATE pg_class SET reltuples = 0, relpages = 10 WHERE oid = '{table}'::regclass");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(bench.pool()).await.unwrap();
    }
    let own = borealis_engine::db::sibling(bench.pool(), 1, &worker::PLANS);
    assert_eq!(claim::claim(&own, &probe::single().queue(), "test", TAKEN).await.unwrap().len(), TAKEN);
    // A session that ends has told what it read.
    own.close().await;
    for table in ["jobs", "workflow_runs"] {
        let sql = format!("SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE relname = '{table}' AND idx_tup_fetch >= {TAKEN}");
        let read: i64 = eventually("what was read is known", SOON, async || {
            sqlx::query_scalar(sqlx::AssertSqlSafe(sql.clone())).fetch_optional(bench.pool()).await.unwrap()
        })
        .await;
        assert!(read < i64::try_from(WAITING).unwrap(), "{read} rows of {table} were read to take {TAKEN}");
    }
}

/// A queue's wake-ups as a fetcher uses them, in a session of its own.
struct Fetcher {
    wakeup: Wakeup,
    queue: String,
    _tasks: Tasks,
    _stop: tokio_util::sync::DropGuard,
}

impl Fetcher {
    async fn new(bench: &Bench) -> Self {
        let (queue, stop) = (probe::single().queue(), CancellationToken::new());
        let tasks = Tasks::new(stop.clone());
        let wakeup = Wakeup::spawn(Connect::like(bench.pool()), [queue.clone()], &[], &tasks);
        let fetcher = Self { wakeup, queue, _tasks: tasks, _stop: stop.drop_guard() };
        fetcher.sleeps().await;
        fetcher
    }

    async fn sleep(&self) -> Sleep {
        self.wakeup.sleep(&self.queue).await
    }

    async fn sleeps(&self) {
        eventually("the fetcher sleeps", SOON, async || (self.sleep().await == Sleep::GoesOn).then_some(())).await;
    }

    /// Whether it is notified of a run that is started now.
    async fn is_told(&self, bench: &Bench) -> bool {
        let woken = self.wakeup.listen(&self.queue);
        tokio::pin!(woken);
        woken.as_mut().enable();
        bench.start(&probe::single(), json!({})).await;
        tokio::time::timeout(SOON / 4, woken).await.is_ok()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetcher_does_not_fall_asleep_while_a_hint_is_on_its_way() {
    let bench = Bench::new().await;
    let fetcher = Fetcher::new(&bench).await;
    assert!(fetcher.is_told(&bench).await, "whoever starts a run while it sleeps notifies");

    // A hint that is written while the fetcher is awake is not announced, and it cannot be seen before it is committed.
    fetcher.wakeup.awake(&fetcher.queue);
    assert_eq!(claim::claim(bench.pool(), &fetcher.queue, "test", 10).await.unwrap().len(), 1);
    let mut tx = bench.pool().begin().await.unwrap();
    start(&mut tx, &probe::single(), NewRun::default()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(claim::claim(bench.pool(), &fetcher.queue, "test", 10).await.unwrap().len(), 0);
        assert_eq!(fetcher.sleep().await, Sleep::Busy, "it would not be told of that hint");
    }
    tx.commit().await.unwrap();
    assert_eq!(fetcher.sleep().await, Sleep::Begun, "the hint is there for the one more look that this asks for");
    assert_eq!(claim::claim(bench.pool(), &fetcher.queue, "test", 10).await.unwrap().len(), 1);
    assert!(fetcher.is_told(&bench).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fetcher_that_sleeps_is_told_whichever_session_sees_to_it() {
    let bench = Bench::new().await;
    let (one, two) = (Fetcher::new(&bench).await, Fetcher::new(&bench).await);
    assert!(one.is_told(&bench).await && two.is_told(&bench).await);
    // The first saw to it. It wakes, and still does for the other.
    one.wakeup.awake(&one.queue);
    assert!(two.is_told(&bench).await);
    // Nobody sleeps: a start is not announced any more, and keeps both from falling asleep until it has ended.
    two.wakeup.awake(&two.queue);
    let written = eventually("a start is not announced", SOON, async || {
        let mut tx = bench.pool().begin().await.unwrap();
        start(&mut tx, &probe::single(), NewRun::default()).await.unwrap();
        let announces = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
             AND classid::bigint = hashtext('borealis.notifier')::bigint & 4294967295)";
        let announces: bool = sqlx::query_scalar(announces).fetch_one(&mut *tx).await.unwrap();
        (!announces).then_some(tx)
    })
    .await;
    assert_eq!([one.sleep().await, two.sleep().await], [Sleep::Busy; 2]);
    written.commit().await.unwrap();
    assert_eq!([two.sleep().await, one.sleep().await], [Sleep::Begun; 2]);

    // Now the second sees to it, and its session ends. The first takes over when it looks again without having been told.
    let ended =
        "SELECT count(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM
         pg_database WHERE datname = current_database()) AND classid::bigint = hashtext('borealis.keeper')::bigint & 4294967295";
    assert_eq!(bench.count(ended).await, 1);
    eventually("the first takes over", SOON, async || (one.sleep().await == Sleep::Begun).then_some(())).await;
    assert!(one.is_told(&bench).await);
    two.sleeps().await;
    assert!(two.is_told(&bench).await, "also over its new session");
}

/// How many tasks start runs at the same time, and how many each starts.
const STARTERS: usize = 12;
const STARTS: usize = 25;

#[tokio::test(flavor = "multi_thread")]
async fn no_start_waits_for_the_poll() {
    let mut bench = Bench::new().await;
    for name in ["w1", "w2"] {
        bench.worker_that_polls(name, Duration::from_secs(3_600));
    }
    let starting = (0..STARTERS).map(|_| {
        let pool = bench.pool().clone();
        tokio::spawn(async move {
            for _ in 0..STARTS {
                let mut tx = pool.begin().await.unwrap();
                start(&mut tx, &probe::single(), NewRun::default()).await.unwrap();
                tokio::time::sleep(Duration::from_micros(rand::random_range(0..4_000))).await;
                if rand::random_bool(0.2) {
                    tx.rollback().await.unwrap()
                } else {
                    tx.commit().await.unwrap()
                }
                tokio::time::sleep(Duration::from_micros(rand::random_range(0..8_000))).await;
            }
        })
    });
    for starter in starting.collect::<Vec<_>>() {
        starter.await.unwrap();
    }
    eventually("every run has ended", SOON, async || {
        (bench.count("SELECT count(*) FROM workflow_runs WHERE finished_at IS NULL").await == 0).then_some(())
    })
    .await;
    bench.stop().await;
}

/// What there is of the runtime in a database, as Postgres writes it.
const OF_THE_RUNTIME: &str = r"
    WITH mine AS (SELECT oid, relkind FROM pg_class WHERE relname LIKE 'workflow\_%' AND relnamespace = 'public'::regnamespace)
    SELECT concat_ws(' ', 'column', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                     pg_get_expr(d.adbin, d.adrelid))
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid IN (SELECT oid FROM mine WHERE relkind IN ('r', 'v')) AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL SELECT concat_ws(' ', 'constraint', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE conrelid IN (SELECT oid FROM mine)
    UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(indexrelid)) FROM pg_index WHERE indrelid IN (SELECT oid FROM mine)
    UNION ALL SELECT concat_ws(' ', 'trigger', pg_get_triggerdef(oid)) FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM mine) AND NOT tgisinternal
    UNION ALL SELECT concat_ws(' ', 'view', oid::regclass, pg_get_viewdef(oid)) FROM pg_class WHERE oid IN (SELECT oid FROM mine) AND relkind = 'v'
    UNION ALL SELECT concat_ws(' ', 'options', oid::regclass, reloptions) FROM pg_class WHERE oid IN (SELECT oid FROM mine) AND relkind = 'r'
    UNION ALL SELECT concat_ws(' ', 'function', oid::regprocedure, provolatile,
                               regexp_replace(regexp_replace(prosrc, '--[^\n]*', '', 'g'), '\s+', ' ', 'g'))
    FROM pg_proc WHERE proname LIKE 'workflow\_%' OR proname = 'has_ended'
    ORDER BY 1";

#[tokio::test]
async fn the_runtime_alone_makes_the_tables_of_the_migrations() {
    let (migrated, alone) = (TestDatabase::start().await, TestDatabase::empty().await);
    borealis_workflows::durable::setup_alone(&alone.pool).await.unwrap();
    // Again, as each start does.
    borealis_workflows::durable::setup_alone(&alone.pool).await.unwrap();
    let all: Vec<String> = sqlx::query_scalar(OF_THE_RUNTIME).fetch_all(&migrated.pool).await.unwrap();
    let own: Vec<String> = sqlx::query_scalar(OF_THE_RUNTIME).fetch_all(&alone.pool).await.unwrap();
    assert!(all.len() > 80, "{all:#?}");
    let missing: Vec<&String> = all.iter().filter(|line| !own.contains(line)).collect();
    let surplus: Vec<&String> = own.iter().filter(|line| !all.contains(line)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "missing: {missing:#?}, surplus: {surplus:#?}");
}

/// A program that knows nothing of the engine.
struct Shop(borealis_workflows::durable::Pool);

impl borealis_workflows::durable::Services for Shop {
    fn pool(&self) -> &borealis_workflows::durable::Pool {
        &self.0
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_runs_workflows_of_its_own() {
    let database = TestDatabase::empty().await;
    borealis_workflows::durable::setup_alone(&database.pool).await.unwrap();
    database
        .execute("CREATE TABLE stock (item text PRIMARY KEY, reserved integer NOT NULL); INSERT INTO stock VALUES ('lamp', 0)")
        .await;
    let order: borealis_workflows::durable::Workflow<Shop> = workflow("order", 1)
        .step("reserve", |cx| {
            Box::pin(async move {
                let item: String = cx.input()?;
                let sql = "UPDATE stock SET reserved = reserved + 1 WHERE item = $1";
                let done = sqlx::query(sql).bind(&item).execute(&mut **cx.tx().await?).await?;
                // Any error is passed on as it is.
                let count: u8 = u8::try_from(done.rows_affected())?;
                Outcome::next(&count)
            })
        })
        .step("ship", |cx| Box::pin(async move { Outcome::done(&format!("{} reserved", cx.state::<u8>()?)) }));
    let stop = CancellationToken::new();
    let options = worker::Options::new("shop", &database.pool, &stop);
    let registry = borealis_workflows::durable::Registry::new([order.clone()]);
    let running = tokio::spawn(worker::run(registry, Shop(database.pool.clone()), options, stop.clone()));
    let mut conn = database.pool.acquire().await.unwrap();
    let new = |input: Value| NewRun { key: Some(input.to_string()), input, ..NewRun::default() };
    let good = start(&mut conn, &order, new("lamp".into())).await.unwrap();
    assert_eq!(start(&mut conn, &order, new("lamp".into())).await.unwrap(), Started { created: false, ..good });
    let bad = start(&mut conn, &order, new(json!({}))).await.unwrap();
    let ended = async |id: Uuid| {
        eventually("a run ends", SOON, async || {
            let sql = "SELECT state, output, error FROM workflow_runs WHERE id = $1 AND finished_at IS NOT NULL";
            let row: Option<(String, Option<Value>, Option<String>)> =
                sqlx::query_as(sql).bind(id).fetch_optional(&database.pool).await.unwrap();
            row
        })
        .await
    };
    assert_eq!(ended(good.run_id).await, ("succeeded".to_owned(), Some("1 reserved".into()), None));
    let (state, _, error) = ended(bad.run_id).await;
    assert_eq!(state, "failed");
    assert!(error.as_deref().is_some_and(|error| error.starts_with("internal_error: invalid type: map")), "{error:?}");
    stop.cancel();
    running.await.unwrap();
}
