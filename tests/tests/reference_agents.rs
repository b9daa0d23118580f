//! Agents of the reference, unmodified, on this engine: what they print arrives whole, what they cannot do is not waited for, and what
//! they ask for is answered in a way they understand.

use std::time::Duration;

use borealis_engine::{
    db,
    jobs::{delivery, occurrence, results, run},
};
use borealis_protocol::output;
use borealis_tests::{
    Actor, Device, TestEngine, eventually,
    reference_agent::{Generation, ReferenceAgent, Seen},
};
use serde_json::{Value, json};
use sqlx::PgPool;

const LIMIT: Duration = Duration::from_secs(20);

/// Runs a script on a device now; the id of the activity.
async fn quick_run(operator: &Actor, device: &Device, script: &str, timeout_seconds: u32) -> i64 {
    let payload = json!({"type": "bash", "script": script, "timeout_seconds": timeout_seconds});
    let body = json!({"domain": "user", "display_name": "A script", "payload": payload});
    let guid = operator.post("/api/assemblies", body).await.expect(201).body["assembly_guid"].clone();
    let body = json!({"hostnames": [device.hostname], "assembly_guid": guid});
    let started = operator.post("/api/scripts/quick_run", body).await.ok();
    started["results"][0]["job_id"].as_i64().unwrap_or_else(|| panic!("no job in {started}"))
}

/// The activity once it has ended.
async fn ended(operator: &Actor, job: i64, limit: Duration) -> Value {
    let path = format!("/api/device/activity/job/{job}");
    eventually("the script has ended", limit, || async {
        let shown = operator.get(&path).await.ok();
        (!matches!(shown["status"].as_str(), Some("Queued" | "Running"))).then_some(shown)
    })
    .await
}

async fn site_with(engine: &TestEngine, generation: Generation) -> (Actor, Device, ReferenceAgent) {
    let (site, _) = engine.site("north").await;
    let (operator, device) = (engine.operator(&[site]).await, engine.device(site).await);
    let agent = ReferenceAgent::start(&device, generation);
    agent.connected(&engine.database.pool).await;
    (operator, device, agent)
}

fn is_disconnected(seen: &Seen) -> bool {
    matches!(seen, Seen::Disconnected(_))
}

#[tokio::test]
async fn a_report_of_any_size_says_how_its_script_ended() {
    let engine = TestEngine::start().await;
    let (operator, device, agent) = site_with(&engine, Generation::Newest).await;
    for megabytes in [2, 5, 20] {
        let script = format!("echo begin; head -c {megabytes}000000 /dev/zero | tr '\\0' x; echo end");
        let job = quick_run(&operator, &device, &script, 60).await;
        let shown = ended(&operator, job, LIMIT).await;
        assert_eq!((&shown["status"], &shown["exit_code"]), (&json!("Success"), &json!(0)), "{megabytes} MB");
        let stdout = shown["stdout"].as_str().expect("the output");
        assert!(stdout.starts_with("begin\nxxx"), "{megabytes} MB");
        assert!(
            stdout.len() <= output::CAP_BYTES + output::NOTES_BYTES && stdout.contains(" bytes of output left out here]"),
            "{megabytes} MB"
        );
        // A report that was too long for the engine has lost its end on the way, and says so.
        let end = if megabytes == 20 { "xxx\n[The report was too long; the rest was left out.]\n" } else { "xxxend\n" };
        assert!(stdout.ends_with(end), "{megabytes} MB end in {}", &stdout[stdout.len() - 80..]);
    }
    assert_eq!(agent.count(is_disconnected), 0, "{:?}", agent.seen());

    // A script that waits its turn is not lost with a report before it, and one after a lost socket runs.
    agent.lose_socket();
    agent.until("the end", LIMIT, |seen| is_disconnected(seen).then_some(())).await;
    let job = quick_run(&operator, &device, "echo again", 60).await;
    assert_eq!(ended(&operator, job, LIMIT).await["stdout"], "again\n");
    // It has asked for a token before each connect and after the one that ended, and was never told to forget it.
    assert_eq!(agent.count(|seen| *seen == Seen::Refreshed(200)), 3, "{:?}", agent.seen());
    assert_eq!(agent.count(|seen| matches!(seen, Seen::Refreshed(_) | Seen::Wiped(_))), 3);
}

#[tokio::test]
async fn an_agent_that_runs_scripts_in_its_read_loop_is_not_cut_off_while_it_does() {
    let engine = TestEngine::start().await;
    let (operator, device, agent) = site_with(&engine, Generation::Early).await;
    // Longer than the engine waits for an answer to a ping.
    let job = quick_run(&operator, &device, "sleep 52; echo done", 120).await;
    let shown = ended(&operator, job, Duration::from_secs(80)).await;
    assert_eq!((&shown["status"], &shown["stdout"]), (&json!("Success"), &json!("done\n")));
    assert_eq!(agent.count(is_disconnected), 0, "{:?}", agent.seen());
}

#[tokio::test]
async fn how_a_script_ended_is_understood_without_an_exit_code() {
    let engine = TestEngine::start().await;
    let (operator, device, _agent) = site_with(&engine, Generation::Newest).await;
    for (script, seconds, status, code) in [
        ("sleep 30", 1, "Timed Out", Value::Null),
        ("echo 'Script timed out after 60 seconds' >&2; exit 3", 30, "Failed", Value::Null),
        ("exit 3", 30, "Failed", Value::Null),
        ("true", 30, "Success", json!(0)),
    ] {
        let job = quick_run(&operator, &device, script, seconds).await;
        let shown = ended(&operator, job, LIMIT).await;
        assert_eq!((&shown["status"], &shown["exit_code"]), (&json!(status), &code), "{script}: {shown}");
    }
}

/// A run of a job with a stop-after of a minute; the ids of job and run.
async fn job_run(engine: &TestEngine, operator: &Actor, device: &Device, script: &str) -> (i64, i64) {
    let body =
        json!({"domain": "user", "display_name": "Long", "payload": {"type": "bash", "script": script, "timeout_seconds": 300}});
    let guid = operator.post("/api/assemblies", body).await.expect(201).body["assembly_guid"].clone();
    let job = json!({
        "name": "Long", "components": [{"assembly_guid": guid}], "targets": [device.hostname], "stop_after": "1m",
        "schedule": {"type": "daily", "start": "2090-01-01T03:00", "timezone": "UTC"},
    });
    let job = operator.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].as_i64().expect("a job");
    let _ = operator.post(&format!("/api/scheduled_jobs/{job}/rerun"), json!({})).await.ok();
    let mut tx = engine.database.pool.begin().await.expect("a transaction");
    let occurrence: i64 = sqlx::query_scalar("SELECT id FROM job_occurrences WHERE job_id = $1 ORDER BY id DESC LIMIT 1")
        .bind(job)
        .fetch_one(&mut *tx)
        .await
        .expect("an occurrence");
    occurrence::freeze(&mut tx, occurrence).await.expect("targets");
    let scripts = occurrence::scripts(&engine.database.pool, occurrence).await.expect("scripts");
    assert!(occurrence::prepare(&mut tx, occurrence, &scripts).await.expect("dispatches"));
    let run: i64 = sqlx::query_scalar("SELECT id FROM scheduled_job_runs WHERE occurrence_id = $1")
        .bind(occurrence)
        .fetch_one(&mut *tx)
        .await
        .expect("a run");
    tx.commit().await.expect("a commit");
    engine.app.hub.deliver(&[uuid::Uuid::try_parse(&device.guid).expect("a GUID")]).await;
    (job, run)
}

async fn run_row(pool: &PgPool, run: i64) -> (String, Option<String>, Option<i64>) {
    sqlx::query_as(
        "SELECT r.status, r.error, (SELECT a.id FROM activity_history a WHERE a.run_id = r.id) FROM scheduled_job_runs r WHERE r.id = $1",
    )
    .bind(run)
    .fetch_one(pool)
    .await
    .expect("the run")
}

#[tokio::test]
async fn nothing_is_waited_for_from_an_agent_that_cannot_stop_a_script() {
    let engine = TestEngine::start().await;
    let pool = &engine.database.pool;
    let (operator, device, agent) = site_with(&engine, Generation::Newest).await;
    for cancelled in [false, true] {
        let (job, run) = job_run(&engine, &operator, &device, "sleep 4; echo late").await;
        eventually("the run has begun", LIMIT, || async { (run_row(pool, run).await.0 == "Running").then_some(()) }).await;
        if cancelled {
            let answer = operator.post(&format!("/api/scheduled_jobs/{job}/runs/{run}/cancel"), json!({})).await.ok();
            assert_eq!(answer["status"], "cancelled");
        } else {
            sqlx::query("UPDATE scheduled_job_runs SET started_at = now() - interval '61 seconds' WHERE id = $1")
                .bind(run)
                .execute(pool)
                .await
                .expect("an update");
            let mut conn = pool.acquire().await.expect("a connection");
            let done = run::enforce_limits(&mut conn, 100).await.expect("the limits");
            assert_eq!(done.ended, [run]);
        }
        let expected = if cancelled { ("Failed", "cancelled_by_operator") } else { ("Timed Out", "stop_after") };
        let (status, error, activity) = run_row(pool, run).await;
        assert_eq!((status.as_str(), error.as_deref()), (expected.0, Some(expected.1)));
        let activity = activity.expect("an activity");
        let report = agent.until("the late report", LIMIT, |seen| match seen {
            Seen::Result(report) if report["job_id"] == activity => Some(report.clone()),
            _ => None,
        });
        assert_eq!(report.await["status"], "Success");
        let event: Value = eventually("the report is recorded", LIMIT, || async {
            sqlx::query_scalar("SELECT detail FROM activity_events WHERE activity_id = $1 AND kind = 'late_result'")
                .bind(activity)
                .fetch_optional(pool)
                .await
                .expect("events")
        })
        .await;
        assert_eq!((&event["status"], &event["stdout"]), (&json!("Success"), &json!("late\n")));
        assert_eq!(run_row(pool, run).await.0, expected.0, "a late report is an event and no state");
        let shown = operator.get(&format!("/api/device/activity/job/{activity}")).await.ok();
        assert_eq!((&shown["status"], shown["stderr"].as_str().unwrap().contains("it may go on")), (&json!(expected.0), true));
    }
}

#[tokio::test]
async fn a_script_that_waits_has_its_limit_from_the_end_of_what_was_ahead_of_it() {
    let engine = TestEngine::start().await;
    let pool = &engine.database.pool;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    // In minutes ago: when it was sent, and when it ended.
    let add = async |sent: f64, finished: Option<f64>| -> i64 {
        sqlx::query_scalar(
            "INSERT INTO activity_history (device_guid, hostname, site_id, request, timeout_seconds, delivery, status, sent_at, started_at, finished_at)
             VALUES ($1::uuid, $2, $3, '{}', 60, CASE WHEN $5::float8 IS NULL THEN 'sent' ELSE 'done' END,
                     CASE WHEN $5::float8 IS NULL THEN 'Queued' ELSE 'Success' END, now() - $4 * interval '1 minute',
                     CASE WHEN $5::float8 IS NOT NULL THEN now() - $4 * interval '1 minute' END, now() - $5 * interval '1 minute')
             RETURNING id",
        )
        .bind(&device.guid)
        .bind(&device.hostname)
        .bind(site)
        .bind(sent)
        .bind(finished)
        .fetch_one(pool)
        .await
        .expect("an activity")
    };
    let timed_out = async || -> Vec<i64> {
        let mut tx = db::begin_wide(pool).await.expect("a transaction");
        let settled: results::Settled = delivery::time_out_silent(&mut tx).await.expect("the silent");
        tx.commit().await.expect("a commit");
        settled.changes.iter().map(|change| change.activity_id).collect()
    };
    // One ahead, the one that waits, and one a minute since.
    let _ahead = add(10.0, Some(9.0)).await;
    let waits = add(9.9, None).await;
    for minute in 0..8 {
        add(f64::from(minute) + 0.5, Some(f64::from(minute) + 0.4)).await;
    }
    assert_eq!(timed_out().await, [waits], "later ones do not put it off");
    // While what was ahead has only just ended, it still has its time; and what was sent later waits for it.
    let _ahead = add(9.0, Some(0.5)).await;
    let (waits, later) = (add(8.9, None).await, add(8.8, None).await);
    assert!(timed_out().await.is_empty());
    sqlx::query(
        "UPDATE activity_history SET finished_at = now() - interval '3 minutes' WHERE finished_at > now() - interval '3 minutes'",
    )
    .execute(pool)
    .await
    .expect("an update");
    assert_eq!(timed_out().await, [waits]);
    assert!(timed_out().await.is_empty(), "{later} has its time from the end of the one before it");
}

async fn startup(admin: &Actor, device: &Device) -> Vec<Value> {
    let shown = admin.get(&format!("/api/device/details/{}", device.hostname)).await.ok();
    let roles = &shown["agent_role_health"]["roles"];
    roles.as_array().unwrap_or_else(|| panic!("no roles in {shown}")).clone()
}

#[tokio::test]
async fn what_agents_send_and_ask_for_is_kept_and_answered() {
    let engine = TestEngine::start().await;
    let (_, device, agent) = site_with(&engine, Generation::Newest).await;
    let admin = engine.admin().await;
    let now = chrono::Utc::now().timestamp();

    // Metadata: sent until it is acknowledged, and the newest wins.
    agent.set_metadata(1, "rack 7, Köln", now - 50);
    agent.set_metadata(500, "last", now - 50);
    let answer = agent.heartbeat().await;
    assert_eq!(answer["metadata_field_acks"], json!(["field_001", "field_500"]));
    assert!(agent.queued_metadata().is_empty());
    agent.set_metadata(1, "older", now - 60);
    assert_eq!(agent.heartbeat().await["metadata_field_acks"], json!(["field_001"]));
    let (status, body) = agent.get("/api/agent/metadata/1").await;
    let expected = json!({"field": {
        "field_number": 1, "field_key": "field_001", "label": "Field 001", "value": "rack 7, Köln", "modified_at": now - 50,
        "source": "agent_cli", "actor": "root", "has_value": true,
    }});
    assert_eq!((status, body), (200, expected));
    let (status, body) = agent.get("/api/agent/metadata/2").await;
    assert_eq!((status, &body["field"]["has_value"], &body["field"]["value"]), (200, &json!(false), &json!("")));
    for wrong in ["0", "501", "x", "1.5", "-1", "99999999999"] {
        let (status, body) = agent.get(&format!("/api/agent/metadata/{wrong}")).await;
        assert_eq!((status, &body["error"]), (400, &json!("invalid_field")), "{wrong}");
    }

    // The tunnel that it asks for each minute: said to be absent, and shown as that.
    agent.ensure().await;
    assert_eq!(agent.count(|seen| matches!(seen, Seen::Ensured(status) if *status != 503)), 0);
    let _ = agent.heartbeat().await;
    let roles = startup(&admin, &device).await;
    let role =
        |name: &str| roles.iter().find(|role| role["role_name"] == name).unwrap_or_else(|| panic!("no {name} in {roles:?}"));
    let tunnel = role("wireguard_tunnel");
    assert_eq!(tunnel["detail"], "This engine has no tunnels yet. Scripts and inventory do not need one.");
    assert_eq!(tunnel["details"]["last_error"], tunnel["detail"]);
    assert_eq!(role("context_currentuser")["role_id"], "system:context_currentuser");
    assert_eq!(role("context_currentuser")["context"], "currentuser");
    // Asking for it each minute is a step of the start that is long over.
    let boot = role("system_heartbeat");
    assert_eq!((&boot["status_code"], &boot["details"]["phase"]), (&json!("healthy"), &json!("steady_state_online")));

    // A refusal costs the database no write.
    let version = async || -> String {
        sqlx::query_scalar("SELECT xmin::text || ctid::text FROM devices WHERE guid = $1::uuid")
            .bind(&device.guid)
            .fetch_one(&engine.database.pool)
            .await
            .expect("the device")
    };
    drop(agent);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = version().await;
    let answer = device.post("/api/agent/vpn/ensure", json!({"agent_id": "x", "reason": "agent_boot"})).await;
    let _ = answer.error(503, "tunnel_unavailable");
    assert_eq!(version().await, before);
}
