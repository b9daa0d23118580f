//! Nothing essential dies silently: every long-lived task of an API process and of a worker is made to panic, and work goes on.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use borealis_tests::{Robot, TestEngine, eventually};
use borealis_workers::api_client::ApiClient;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Above the pauses after two failures in a row.
const SOON: Duration = Duration::from_secs(60);

/// The tasks of an API process and of a worker. A task that is added is listed here, and is made to panic as the others are.
const TASKS: [&str; 30] = [
    "arrivals",
    "audit_check",
    "audit_seal",
    "commit",
    "deliveries",
    "departures",
    "directory_sync",
    "epoch",
    "event_streams",
    "events",
    "fetch",
    "gate",
    "housekeeping",
    "internal_listener",
    "keys",
    "leases",
    "listen",
    "notices",
    "notifications",
    "presence",
    "public_listener",
    "queue",
    "reach",
    "recovery",
    "results",
    "scheduler",
    "secret_store",
    "sockets",
    "sweep",
    "time_zones",
];

/// The names of the tasks that run.
fn running() -> BTreeSet<&'static str> {
    borealis_tasks::all().into_iter().filter(|task| task.running).map(|task| task.name).collect()
}

async fn run_script(engine: &TestEngine, target: &str) -> i64 {
    let admin = engine.admin().await;
    let payload = json!({"name": "Say", "type": "bash", "script": "echo hello", "timeout_seconds": 60});
    let assembly = json!({"domain": "user", "display_name": format!("Say {}", Uuid::new_v4()), "assembly_type": "script",
        "assembly_subtype": "bash", "payload": payload});
    let assembly = admin.post("/api/assemblies", assembly).await.ok();
    let job = json!({
        "name": "Say",
        "components": [{"assembly_guid": assembly["assembly_guid"], "name": "Say"}],
        "targets": [target],
        "schedule": {"type": "immediately"},
    });
    let made = admin.post("/api/scheduled_jobs", job).await.ok();
    made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"))
}

async fn succeeds(engine: &TestEngine, job: i64) {
    let admin = engine.admin().await;
    eventually("the run succeeds", SOON, async || {
        let found = admin.get(&format!("/api/scheduled_jobs/{job}/runs")).await;
        (found.status == 200).then_some(())?;
        let runs = found.body["runs"].as_array().cloned().unwrap_or_default();
        assert!(runs.len() <= 1, "one occurrence: {runs:?}");
        (runs.first()?["status"] == "Success").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_that_panics_is_started_again_and_work_goes_on() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let robot = Robot::start(engine.device(site).await, vec![engine.addr]);
    robot.connected().await;
    let (stop, id) = (CancellationToken::new(), Uuid::new_v4());
    let internal = format!("http://{}", engine.internal_addr).parse().expect("a URL");
    let agents = ApiClient::new(vec![internal], &engine.state_dir().join("secrets/engine.secret"), id).expect("a client");
    let options = borealis_workers::Options { id, concurrency: 4, history_days: 30, duties: true };
    let pool = engine.database.pool.clone();
    let worker =
        tokio::spawn(borealis_workers::run(pool, Arc::new(agents), borealis_workflows::registry(), options, stop.clone()));
    succeeds(&engine, run_script(&engine, &robot.device.hostname).await).await;
    let all: BTreeSet<&str> = TASKS.into();
    eventually("all tasks run", SOON, async || (running() == all).then_some(())).await;

    // Those that have tasks of their own take them along.
    let (whole, parts): (BTreeSet<&str>, BTreeSet<&str>) = all.iter().partition(|task| ["queue", "sockets"].contains(task));
    for group in [parts, whole] {
        for task in &group {
            assert!(borealis_tasks::trip(task) > 0, "{task}");
        }
        let until = tokio::time::Instant::now() + SOON;
        loop {
            let failed: BTreeSet<&str> =
                borealis_tasks::all().into_iter().filter(|task| task.restarts > 0).map(|task| task.name).collect();
            let missing: Vec<&&str> = group.difference(&failed).collect();
            if missing.is_empty() {
                break;
            }
            assert!(tokio::time::Instant::now() < until, "these have not failed: {missing:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    eventually("all tasks run again", SOON, async || (running() == all).then_some(())).await;
    robot.connected().await;
    for _ in 0..3 {
        succeeds(&engine, run_script(&engine, &robot.device.hostname).await).await;
    }
    assert!(robot.memory().sent.values().all(|sent| *sent >= 1));

    // Both probes say it, for a while.
    let ready = engine.anonymous().get("/ready").await.ok();
    let failing: BTreeSet<&str> = ready["failing_tasks"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for task in ["epoch", "sockets", "public_listener", "audit_seal"] {
        assert!(failing.contains(task), "{task} is not among {failing:?}");
    }
    stop.cancel();
    worker.await.expect("no panic");
}
