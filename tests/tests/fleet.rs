//! A fleet against an engine of real processes: nothing is lost and nothing is done twice, whoever vanishes.

use std::time::Duration;

use borealis_tests::{
    Installation, Processes, TestDatabase, eventually,
    fleet::{Counts, Departure, Fleet, Settings, Work, identity},
};
use serde_json::{Value, json};

/// How long a step with nothing in its way may take. Far above what it takes.
const SOON: Duration = Duration::from_secs(90);

/// Scripts of all lengths up to two seconds that say something twice while they run.
fn settings(installation: &Installation) -> Settings {
    let takes = || Duration::from_millis(rand::random_range(0..2000));
    Settings {
        work: Work::of(move |_| Work { takes: takes(), chunks: 2, ..Work::default() }),
        heartbeat: Some(Duration::from_secs(5)),
        ..Settings::at([installation.base.clone()])
    }
}

/// Every machine has run its dispatch once and the engine has its result.
fn assert_all_true(counts: &Counts, machines: u64) {
    // A result that was written and whose ack was lost is sent again; the engine then has no use for it: that is `ignored`.
    let Counts { received, redelivered, repeated, refused, executed, doubled, cancelled, unacked, .. } = *counts;
    assert_eq!((received - redelivered, executed, doubled), (machines, machines, 0), "{counts:?}");
    assert_eq!((repeated, refused, cancelled, unacked), (0, 0, 0, 0), "{counts:?}");
}

/// The job as an operator reads it: every device with its result.
async fn assert_all_recorded(installation: &Installation, job: i64, machines: usize) {
    let devices = installation.devices(job).await;
    assert_eq!(devices.len(), machines);
    let wrong: Vec<&Value> =
        devices.iter().filter(|device| device["job_status"] != "Success" || device["has_stdout"] != true).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let activity = &devices[machines / 2]["activities"][0]["activity_id"];
    let activity = installation.admin.get(&format!("/api/device/activity/job/{activity}")).await.ok();
    let stdout = activity["stdout"].as_str().unwrap_or_default();
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(matches!(lines[..], [first, second] if first.starts_with("piece 0") && second.starts_with("piece 1")), "{activity}");
}

async fn assert_run_has_ended(installation: &Installation, job: i64, machines: usize) {
    eventually("the workflow run has ended", SOON, async || {
        let found = installation.admin.get(&format!("/api/runs?job_id={job}")).await.ok();
        let runs = found["runs"].as_array().cloned().unwrap_or_default();
        assert!(runs.len() <= 1, "one occurrence, but {found}");
        (runs.first()?["state"] == "succeeded").then_some(())
    })
    .await;
    // Now from what closing the occurrence noted, not counted.
    let counts = &installation.admin.get(&format!("/api/scheduled_jobs/{job}")).await.ok()["job"]["result_counts"];
    assert_eq!((&counts["success"], &counts["total_targets"]), (&json!(machines), &json!(machines)), "{counts}");
}

#[tokio::test]
async fn a_job_reaches_every_agent_once_while_groups_of_them_vanish() {
    const MACHINES: usize = 200;
    let database = TestDatabase::start().await;
    let mut processes = Processes::new();
    let installation = Installation::start(&mut processes, &database.url).await;
    let _worker = installation.worker(&mut processes);
    let machines = identity::enroll(&installation.admin, installation.site, "machine", MACHINES).await;
    let fleet = Fleet::start(machines, settings(&installation));
    fleet.until("all agents are connected", SOON, |counts| counts.connected == MACHINES as u64).await;

    let job = installation.schedule_for_all("All", json!({"type": "immediately"})).await;
    fleet.until("some have begun", SOON, |counts| counts.executed >= 20).await;
    fleet.vanish(0..60, Departure::Cut, Duration::from_secs(1));
    fleet.vanish(60..100, Departure::Reset, Duration::from_millis(100));
    fleet.vanish(100..120, Departure::Silent, Duration::from_secs(3));
    fleet.until("some results are there", SOON, |counts| counts.acked >= 60).await;
    fleet.vanish(150..200, Departure::Cut, Duration::ZERO);

    let counts = fleet.until("every result is acknowledged", SOON, |counts| counts.acked == MACHINES as u64).await;
    assert_all_true(&counts, MACHINES as u64);
    assert!(counts.connects > MACHINES as u64 && counts.reports > 0, "{counts:?}");
    assert_all_recorded(&installation, job, MACHINES).await;
    assert_run_has_ended(&installation, job, MACHINES).await;
    let copies: (i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM occurrence_scripts), (SELECT count(*) FROM activity_history WHERE request ? 'script_content')",
    )
    .fetch_one(&database.pool)
    .await
    .expect("the dispatches");
    assert_eq!(copies, (1, 0), "the script is stored once");
    fleet.until("all are back", SOON, |counts| counts.connected == MACHINES as u64).await;
    fleet.stop().await;
}

#[tokio::test]
async fn agents_follow_an_api_process_that_dies_and_comes_back_elsewhere() {
    const MACHINES: usize = 60;
    let database = TestDatabase::start().await;
    let mut processes = Processes::new();
    let mut installation = Installation::start(&mut processes, &database.url).await;
    let _worker = installation.worker(&mut processes);
    let machines = identity::write(&database.pool, &installation.keys(), installation.site, "machine", MACHINES).await;
    let fleet = Fleet::start(machines, settings(&installation));
    fleet.until("all agents are connected", SOON, |counts| counts.connected == MACHINES as u64).await;

    let job = installation.schedule_for_all("All", json!({"type": "immediately"})).await;
    fleet.until("some have begun", SOON, |counts| counts.executed >= 10).await;
    installation.move_api(&mut processes).await;
    fleet.move_to([installation.base.clone()]);

    let counts = fleet.until("every result is acknowledged", SOON, |counts| counts.acked == MACHINES as u64).await;
    assert_all_true(&counts, MACHINES as u64);
    assert_all_recorded(&installation, job, MACHINES).await;
    assert_run_has_ended(&installation, job, MACHINES).await;
    fleet.stop().await;
}
