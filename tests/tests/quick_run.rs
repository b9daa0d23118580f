//! A script run now: delivered over a device's socket, answered, seen by the operators of its site and by nobody else.

use std::time::Duration;

use borealis_protocol::{CONTEXT_SYSTEM, agent_id, envelope, events::QuickJobRun, keys};
use borealis_tests::{
    Actor, Device, TestEngine,
    actor::Credential,
    agent::{Socket, open, open_agent},
    engine::PASSWORD,
    eventually,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

fn token(actor: &Actor) -> &str {
    match &actor.credential {
        Credential::Bearer(token) => token,
        other => panic!("no token: {other:?}"),
    }
}

async fn connect(engine: &TestEngine, device: &Device) -> Socket {
    let mut socket = eventually("the engine takes sockets", LIMIT, || async {
        match open_agent(engine.addr, token(&device.actor)).await {
            Ok(socket) => Some(socket),
            Err(503) => None,
            Err(status) => panic!("refused with {status}"),
        }
    })
    .await;
    let id = agent_id(&device.hostname, &device.guid, CONTEXT_SYSTEM);
    let answer = socket.hello(&id, json!({"dedup": true, "cancel": true, "output": true})).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    socket
}

/// An operator's socket, which is told what changes.
async fn watch(engine: &TestEngine, operator: &Actor) -> Socket {
    open(engine.addr, "/socket.io/", &[("authorization", &format!("Bearer {}", token(operator)))]).await.expect("a socket")
}

async fn script(actor: &Actor, payload: Value) -> Value {
    let body = json!({"domain": "user", "display_name": "Say hi", "payload": payload});
    actor.post("/api/assemblies", body).await.expect(201).body["assembly_guid"].clone()
}

async fn queued(engine: &TestEngine) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM activity_history").fetch_one(&engine.database.pool).await.expect("a count")
}

#[tokio::test]
async fn a_script_reaches_its_device_and_its_answer_the_operators_of_the_site() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let device = engine.device(north).await;
    let (operator, stranger) = (engine.operator(&[north]).await, engine.operator(&[south]).await);
    let mut socket = connect(&engine, &device).await;
    let (mut seen, mut unseen) = (watch(&engine, &operator).await, watch(&engine, &stranger).await);
    let guid =
        script(&operator, json!({"type": "bash", "script": "echo $WHO", "timeout_seconds": 60, "variables": [{"name": "who"}]}))
            .await;

    let body =
        json!({"hostnames": [device.hostname.to_uppercase()], "assembly_guid": guid, "variable_values": {"who": "'; $(id)"}});
    let started = operator.post("/api/scripts/quick_run", body).await.ok();
    let job = started["results"][0]["job_id"].as_i64().expect("a job id");
    assert_eq!(
        (&started["results"][0]["hostname"], &started["results"][0]["status"]),
        (&json!(device.hostname), &json!("Queued"))
    );
    let created = seen.event("device_activity_changed").await;
    assert_eq!(
        (&created["activity_id"], &created["change"], &created["source"]),
        (&json!(job), &json!("created"), &json!("quick_job"))
    );

    let sent: QuickJobRun = serde_json::from_value(socket.event("quick_job_run").await).expect("a dispatch");
    // By the name that the agent gave with its socket.
    assert_eq!((sent.job_id, sent.target_hostname.as_str(), sent.run_mode.as_str()), (job, "host", "system"));
    assert_eq!((sent.environment["WHO"].as_str(), sent.timeout_seconds), ("'; $(id)", 60));
    assert_eq!((&sent.context["assembly_guid"], &sent.context["queue_lane"]), (&guid, &json!("quick_run")));
    assert!(sent.admin_user.is_empty() && sent.admin_pass.is_empty());
    let pinned = keys::from_spki_base64(&device.signing_key).expect("the key of the enrollment");
    let text = envelope::verify(&sent, &pinned, &device.guid, chrono::Utc::now().timestamp()).expect("a good signature");
    assert_eq!(text, b"echo $WHO");

    assert_eq!(socket.call("quick_job_accepted", json!({"job_id": job})).await["status"], "ok");
    let progress = json!({"job_id": job, "status": "Running", "stdout": "work", "append_output": true});
    assert_eq!(socket.call("quick_job_progress", progress).await["status"], "ok");
    let path = format!("/api/device/activity/{}", device.hostname);
    let row = operator.get(&path).await.ok()["history"][0].clone();
    assert_eq!((&row["status"], &row["has_stdout"], &row["finished_at"]), (&json!("Running"), &json!(true), &json!(0)));
    assert_eq!(operator.delete(&path).await.ok()["cleared"], 0, "what runs is not cleared");

    let result = json!({"job_id": job, "status": "Success", "stdout": "worked\n", "stderr": "a word", "exit_code": 0});
    assert_eq!(socket.call("quick_job_result", result).await["status"], "ok");
    let one = operator.get(&format!("/api/device/activity/job/{job}")).await.ok();
    assert_eq!((&one["status"], &one["stdout"], &one["stderr"]), (&json!("Success"), &json!("worked\n"), &json!("a word")));
    assert_eq!((&one["metadata"]["assembly_guid"], &one["metadata"]["assembly_source"]), (&guid, &json!("user")));
    assert!(one["started_at"].as_i64() > Some(0) && one["finished_at"].as_i64() > Some(0), "{one}");
    loop {
        let change = seen.event("device_activity_changed").await;
        if change["status"] == "Success" {
            break;
        }
    }

    let _ = stranger.get(&path).await.error(404, "Not found");
    let _ = stranger.get(&format!("/api/device/activity/job/{job}")).await.error(404, "Not found");
    let _ = stranger.delete(&path).await.error(404, "Not found");
    assert!(unseen.silent("device_activity_changed", Duration::from_millis(500)).await, "another site's operator hears nothing");

    let _ = operator.delete(&path).await.ok();
    assert_eq!(operator.get(&path).await.ok()["history"], json!([]));
    let audited: Vec<String> = sqlx::query_scalar(
        "SELECT action FROM audit_events WHERE object_kind = 'device' AND site_id = $1 AND actor_name = $2 ORDER BY id",
    )
    .bind(north)
    .bind(&operator.name)
    .fetch_all(&engine.database.pool)
    .await
    .expect("the audit");
    assert_eq!(audited, ["script.quick_run", "device.clear_activity", "device.clear_activity"]);
}

#[tokio::test]
async fn a_script_waits_for_a_device_that_is_away() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let device = engine.device(north).await;
    let operator = engine.operator(&[north]).await;
    let guid = script(&operator, json!({"type": "bash", "script": "echo hi"})).await;
    let body = json!({"hostnames": [device.guid], "assembly_guid": guid, "run_mode": "current_user", "session_target": "single",
                      "target_session_id": 3});
    let started = operator.post("/api/scripts/quick_run", body).await.ok();
    let job = started["results"][0]["job_id"].clone();
    let minutes: f64 = sqlx::query_scalar(
        "SELECT extract(epoch FROM deliver_until - created_at)::float8 / 60 FROM activity_history WHERE status = 'Queued'",
    )
    .fetch_one(&engine.database.pool)
    .await
    .expect("the row");
    assert!((minutes - 15.0).abs() < 0.1, "{minutes}");
    let mut socket = connect(&engine, &device).await;
    let sent = socket.event("quick_job_run").await;
    assert_eq!((&sent["job_id"], &sent["run_mode"]), (&job, &json!("currentuser")), "the word agents know");
    assert_eq!((&sent["session_target"], &sent["target_session_id"]), (&json!("specific_session"), &json!(3)));
}

#[tokio::test]
async fn a_device_that_must_not_run_anything_fails_alone() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (fit, unfit) = (engine.device(north).await, engine.device(north).await);
    let operator = engine.operator(&[north]).await;
    let guid = script(&operator, json!({"type": "bash", "script": "echo hi"})).await;
    sqlx::query("UPDATE devices SET status = 'quarantined' WHERE hostname = $1")
        .bind(&unfit.hostname)
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    let body = json!({"hostnames": [unfit.hostname, fit.hostname, unfit.guid], "assembly_guid": guid});
    let started = operator.post("/api/scripts/quick_run", body).await.ok();
    let results = started["results"].as_array().expect("results");
    assert_eq!(results.len(), 2, "each device once");
    assert_eq!((&results[0]["status"], &results[0]["error"]), (&json!("Failed"), &json!("device_not_active")));
    assert_eq!((&results[1]["status"], results[1].get("error")), (&json!("Queued"), None));
    let shown = operator.get(&format!("/api/device/activity/job/{}", results[0]["job_id"])).await.ok();
    assert_eq!((&shown["status"], &shown["error"]), (&json!("Failed"), &json!("device_not_active")));
    assert!(shown["stderr"].as_str().is_some_and(|text| text.contains("quarantined")), "{shown}");
}

#[tokio::test]
async fn many_devices_need_a_fresh_proof_of_who_asks() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let device = engine.device(north).await;
    let operator = engine.operator(&[north]).await;
    let guid = script(&operator, json!({"type": "bash", "script": "echo hi"})).await;
    let mut hosts = vec![device.hostname.clone()];
    hosts.extend((0..50).map(|index| format!("absent-{index}")));
    let body = |hosts: &[String]| json!({"hostnames": hosts, "assembly_guid": guid});
    let run = |hosts: &[String]| operator.post("/api/scripts/quick_run", body(hosts));
    engine.age_step_ups().await;
    let _ = run(&hosts).await.error(403, "step_up_required");
    let _ = run(&hosts[..50]).await.error(403, "out_of_scope_hostnames");
    let _ = operator.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let refused = run(&hosts).await.error(403, "out_of_scope_hostnames");
    assert_eq!(refused.body["hostnames"].as_array().map(Vec::len), Some(50), "{}", refused.text);
    let many: Vec<String> = (0..1001).map(|index| format!("absent-{index}")).collect();
    let _ = run(&many).await.error(400, "invalid_hostnames");
    assert_eq!(queued(&engine).await, 0, "what was refused left nothing");
}

#[tokio::test]
async fn only_scripts_are_run() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let device = engine.device(north).await;
    let operator = engine.operator(&[north]).await;
    sqlx::query(
        "INSERT INTO assemblies (guid, domain, display_name, assembly_type, payload, content_hash)
         VALUES ('play', 'official', 'Play', 'ansible', '{\"playbook\": []}', ''), ('flow', 'official', 'Flow', 'workflow', '{}', '')",
    )
    .execute(&engine.database.pool)
    .await
    .expect("assemblies");
    for guid in ["play", "flow"] {
        let body = json!({"hostnames": [device.hostname], "assembly_guid": guid});
        let _ = operator.post("/api/scripts/quick_run", body).await.error(400, "unsupported_script_type");
    }
    for path in ["/etc/passwd", "Scripts/Play", "Ansible_Playbooks/Play", "Scripts/"] {
        let body = json!({"hostnames": [device.hostname], "script_path": path});
        let _ = operator.post("/api/scripts/quick_run", body).await.error(404, "script_not_found");
    }
    // Of a protected domain, so neither an operator nor an administrator changes them.
    let _ = operator.put("/api/assemblies/play", json!({"summary": "s"})).await.error(403, "forbidden");
    let _ = operator.delete("/api/assemblies/play?force=true").await.error(403, "forbidden");
    let _ = engine.admin().await.delete("/api/assemblies/play").await.error(403, "dev_mode_required");
    assert_eq!(queued(&engine).await, 0, "what was refused left nothing");
}
