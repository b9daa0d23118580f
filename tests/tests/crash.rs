//! The crash matrix: a real worker process is killed with SIGKILL at every point of every step of every workflow, and the
//! run ends as if nothing had happened. And the zombie: a worker that comes back after its lease commits nothing.
//!
//! The points are the fail points of `borealis_durable::fault`; a worker dies at its point the first time it
//! comes there, and another one, without points, takes over.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use borealis_tests::{Processes, TestDatabase, TestEngine, agent, eventually, probe};
use borealis_workflows::{NewRun, Workflow, signal, start};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

/// From the death of a worker to the end of the run: the lease, the recovery, the remaining steps, and a slow machine.
const RECOVERED: Duration = Duration::from_secs(60);
/// Where a worker dies within a step.
const PLACES: [&str; 4] = ["before", "inside", "after_effect", "after_commit"];

fn worker(processes: &mut Processes, database: &TestDatabase, fail_at: Option<&str>) -> borealis_tests::Child {
    processes.set("DATABASE_URL", database.url.as_str());
    processes.set("FAILPOINTS", fail_at.map(|point| format!("{point}=1*return")).unwrap_or_default());
    processes.start("test-worker", &[])
}

async fn state(pool: &PgPool, run: Uuid) -> String {
    sqlx::query_scalar("SELECT state FROM workflow_runs WHERE id = $1").bind(run).fetch_one(pool).await.unwrap()
}

async fn count(pool: &PgPool, sql: &str) -> i64 {
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql.to_owned())).fetch_one(pool).await.unwrap()
}

/// What must hold after every crash: no run open, no lease, no hint, no gap in events, the journal as long as the run.
async fn nothing_is_left(pool: &PgPool, case: &str) {
    for (what, sql) in [
        ("open runs", "SELECT count(*) FROM workflow_runs WHERE finished_at IS NULL OR lease_token IS NOT NULL"),
        ("hints", "SELECT count(*) FROM apalis.jobs"),
        (
            "gaps in events",
            "SELECT count(*) FROM (SELECT max(seq) - count(*) AS missing FROM workflow_events GROUP BY run_id) e WHERE missing <> 0",
        ),
        (
            "journal rows astray",
            "SELECT count(*) FROM workflow_runs r WHERE r.seq <> (SELECT count(*) FROM workflow_journal j WHERE j.run_id = r.id)",
        ),
    ] {
        assert_eq!(count(pool, sql).await, 0, "{case}: {what}");
    }
}

/// The engine's own workflows, each with the test that kills it; the list is compared with the registry.
const COVERED: [&str; 1] = ["scheduled_run"];

#[test]
fn every_workflow_of_the_engine_is_in_the_matrix() {
    let registry = borealis_workflows::registry();
    let all: std::collections::BTreeSet<_> = registry.iter().map(|workflow| workflow.name).collect();
    assert_eq!(all, COVERED.into_iter().collect(), "a workflow without a crash matrix");
}

/// Every step of a workflow with every place in it, as fail points.
fn points(workflow: &Workflow) -> Vec<String> {
    let steps = workflow.steps.iter().map(|step| step.name);
    steps.flat_map(|step| PLACES.map(|place| format!("{place}:{}:{step}", workflow.name))).collect()
}

/// Runs `case` for every point, a few at a time.
async fn matrix<F: Future<Output = ()>>(points: Vec<String>, at_a_time: usize, case: impl Fn(String) -> F) {
    let total = points.len();
    let done = AtomicUsize::new(0);
    futures::StreamExt::for_each_concurrent(futures::stream::iter(points), at_a_time, |point| {
        let running = case(point.clone());
        let done = &done;
        async move {
            let started = Instant::now();
            running.await;
            let number = done.fetch_add(1, Ordering::Relaxed) + 1;
            println!("{number}/{total} {point}: ended {:.1} s after the start", started.elapsed().as_secs_f64());
        }
    })
    .await;
}

/// The probe has every kind of step: rows, a call outside, a fan-out, a wait, an end.
#[tokio::test(flavor = "multi_thread")]
async fn the_probe_survives_a_death_at_every_point() {
    matrix(points(&probe::probe()), 5, |point| async move {
        let database = TestDatabase::start().await;
        probe::create_tables(&database.pool).await;
        let pool = &database.pool;
        let mut tx = pool.begin().await.unwrap();
        let run = start(&mut tx, &probe::probe(), NewRun { input: json!({}), ..NewRun::default() }).await.unwrap().run_id;
        signal(&mut tx, run, probe::GO, &json!("go")).await.unwrap();
        tx.commit().await.unwrap();
        let mut processes = Processes::new();
        let mut doomed = worker(&mut processes, &database, Some(&point));
        let status = doomed.wait(RECOVERED).await;
        assert!(!status.success(), "{point}: the worker was to die, not to end");
        let _heir = worker(&mut processes, &database, None);
        eventually(&format!("{point}: the run ends"), RECOVERED, || async {
            (state(pool, run).await == "succeeded").then_some(())
        })
        .await;
        nothing_is_left(pool, &point).await;
        // What was written in the committing transaction is there once; what was called outside was called with one key.
        assert_eq!(count(pool, "SELECT count(*) FROM probe_rows WHERE written <> 1").await, 0, "{point}: rows written twice");
        assert_eq!(count(pool, "SELECT count(*) FROM probe_rows").await, 1 + probe::CHILDREN, "{point}");
        assert_eq!(count(pool, "SELECT count(*) FROM probe_calls").await, 1, "{point}: the call had two keys");
        let repeated = i64::from(point.starts_with("inside:probe:call") || point.starts_with("after_effect:probe:call"));
        assert_eq!(
            count(pool, "SELECT calls::bigint FROM probe_calls").await,
            1 + repeated,
            "{point}: an interrupted call is repeated, a finished one is not"
        );
    })
    .await;
}

/// The scheduled run against the real API with a device on a real socket: the device gets its script once, whatever dies.
#[tokio::test(flavor = "multi_thread")]
async fn the_scheduled_run_survives_a_death_at_every_point() {
    matrix(points(&borealis_workflows::scheduled_run::definition()), 3, |point| async move {
        let engine = TestEngine::start().await;
        let pool = &engine.database.pool;
        let (site, _) = engine.site("Home").await;
        let admin = engine.admin().await;
        let device = engine.device(site).await;
        let mut socket = agent::open_agent(engine.addr, device.enrolled["access_token"].as_str().unwrap()).await.unwrap();
        socket
            .hello(&borealis_protocol::agent_id(&device.hostname, &device.guid, "SYSTEM"), json!({"dedup": true, "cancel": true}))
            .await;
        let job = scheduled_job(&admin, &device).await;
        let mut processes = Processes::new();
        processes.set("BOREALIS_INTERNAL_URL", format!("http://{}", engine.internal_addr));
        processes.set("BOREALIS_ENGINE_SECRET_FILE", engine.state_dir().join("secrets/engine.secret").display().to_string());
        let mut doomed = worker(&mut processes, &engine.database, Some(&point));
        // The device answers as soon as it is sent something; it is sent it while the worker lives or dies.
        let answering = tokio::spawn(async move {
            let script = socket.event("quick_job_run").await;
            let job_id = script["job_id"].clone();
            let taken = socket.call("quick_job_accepted", json!({"job_id": job_id})).await;
            let result = json!({"job_id": job_id, "status": "Success", "stdout": "hello\n", "stderr": "", "exit_code": 0});
            let ended = socket.call("quick_job_result", result).await;
            let silent = socket.silent("quick_job_run", Duration::from_secs(3)).await;
            (taken, ended, silent, socket)
        });
        let status = doomed.wait(RECOVERED).await;
        assert!(!status.success(), "{point}: the worker was to die, not to end");
        let _heir = worker(&mut processes, &engine.database, None);
        eventually(&format!("{point}: the occurrence closes"), RECOVERED, || async {
            (count(pool, "SELECT count(*) FROM workflow_runs WHERE state = 'succeeded'").await == 1).then_some(())
        })
        .await;
        nothing_is_left(pool, &point).await;
        let (taken, ended, silent, _socket) = answering.await.unwrap();
        assert_eq!((taken, ended), (json!({"status": "ok"}), json!({"status": "ok"})), "{point}");
        assert!(silent, "{point}: the script was sent twice");
        let runs = admin.get(&format!("/api/scheduled_jobs/{job}/runs")).await.ok();
        assert_eq!(runs["runs"].as_array().map(Vec::len), Some(1), "{point}: {runs}");
        assert_eq!(runs["runs"][0]["status"], "Success", "{point}: {runs}");
        assert_eq!(
            count(pool, "SELECT count(*) FROM activity_history WHERE delivery_count = 1 AND delivery = 'done'").await,
            1,
            "{point}"
        );
    })
    .await;
}

async fn scheduled_job(admin: &borealis_tests::Actor, device: &borealis_tests::Device) -> i64 {
    let assembly = admin
        .post(
            "/api/assemblies",
            json!({
                "domain": "user", "display_name": "hello", "assembly_type": "script", "assembly_subtype": "bash",
                "payload": {"name": "hello", "type": "bash", "script": "echo hello\n", "timeout_seconds": 60},
            }),
        )
        .await
        .expect(201)
        .body;
    let job = admin
        .post(
            "/api/scheduled_jobs",
            json!({
                "name": "hello", "schedule": {"type": "immediately"}, "execution_context": "system",
                "components": [{"kind": "script", "assembly_guid": assembly["assembly_guid"]}],
                "targets": [{"kind": "device", "device_guid": device.guid, "hostname": device.hostname}],
            }),
        )
        .await
        .ok();
    job["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {job}"))
}

/// R4: a worker is stopped past its lease, another finishes its step, the first goes on: it commits nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_zombie_commits_nothing() {
    let database = TestDatabase::start().await;
    probe::create_tables(&database.pool).await;
    let pool = &database.pool;
    let mut processes = Processes::new();
    processes.set("DATABASE_URL", database.url.as_str());
    // It sleeps between its effect and its commit, which is where it is stopped.
    processes.set("FAILPOINTS", "after_effect:probe:call=1*sleep(2000)");
    let zombie = processes.start("test-worker", &[]);
    let mut tx = pool.begin().await.unwrap();
    let run = start(&mut tx, &probe::probe(), NewRun { input: json!({}), ..NewRun::default() }).await.unwrap().run_id;
    tx.commit().await.unwrap();
    eventually("the effect", RECOVERED, || async { (count(pool, "SELECT count(*) FROM probe_calls").await == 1).then_some(()) })
        .await;
    zombie.stop();
    let owner: String =
        sqlx::query_scalar("SELECT worker FROM workflow_runs WHERE id = $1").bind(run).fetch_one(pool).await.unwrap();
    let heir = worker(&mut processes, &database, None);
    eventually("another worker goes past the step", RECOVERED, || async {
        (count(pool, "SELECT count(*) FROM workflow_journal WHERE step = 'wait'").await == 1).then_some(())
    })
    .await;
    let before: Vec<(Uuid, i32, String, String)> = journal(pool).await;
    let events = count(pool, "SELECT count(*) FROM workflow_events").await;
    zombie.resume();
    // Long enough for its sleep, its commit and its renewal.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(journal(pool).await, before, "the zombie changed the journal");
    assert_eq!(count(pool, "SELECT count(*) FROM workflow_events").await, events, "the zombie wrote events");
    let by: String = sqlx::query_scalar("SELECT worker FROM workflow_journal WHERE step = 'call'").fetch_one(pool).await.unwrap();
    assert_ne!(by, owner, "the step is the heir's");
    // And it is of use again: alone now, it finishes the run.
    heir.kill();
    let mut tx = pool.begin().await.unwrap();
    assert!(signal(&mut tx, run, probe::GO, &Value::Null).await.unwrap());
    tx.commit().await.unwrap();
    eventually("the run ends", RECOVERED, || async { (state(pool, run).await == "succeeded").then_some(()) }).await;
    nothing_is_left(pool, "zombie").await;
}

async fn journal(pool: &PgPool) -> Vec<(Uuid, i32, String, String)> {
    sqlx::query_as("SELECT run_id, seq, step, worker FROM workflow_journal ORDER BY run_id, seq").fetch_all(pool).await.unwrap()
}
