//! Assemblies, quick runs and the activity history.

use borealis_tests::{Actor, TestEngine};
use serde_json::{Value, json};

fn document() -> Value {
    json!({"type": "bash", "description": "Says hi.", "script": "echo \"$GREETING\"\r\n", "timeout_seconds": 60,
           "variables": [{"name": "greeting", "default": "hi"}, {"name": "count", "type": "number", "default": 1}]})
}

async fn script(actor: &Actor) -> Value {
    let body = json!({"domain": "user", "display_name": "Say hi", "summary": "s", "payload": document()});
    actor.post("/api/assemblies", body).await.expect(201).body
}

#[tokio::test]
async fn an_assembly_is_kept_as_it_was_written() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let operator = engine.operator(&[site]).await;
    let made = script(&operator).await;
    let guid = made["assembly_guid"].as_str().expect("a guid");
    assert_eq!(guid.len(), 32);
    assert_eq!(
        (&made["assembly_type"], &made["assembly_subtype"], &made["source"]),
        (&json!("script"), &json!("bash"), &json!("user"))
    );
    assert_eq!(
        (&made["name"], &made["description"], &made["path"]),
        (&json!("Say hi"), &json!("Says hi."), &json!("Scripts/Say_hi"))
    );
    assert_eq!(made["payload_json"]["script"], "echo \"$GREETING\"\r\n");
    assert_eq!(made["payload_json"]["assembly_guid"], guid);
    assert_eq!(operator.get(&format!("/api/assemblies/{}", guid.to_uppercase())).await.ok(), made);
    let listed = operator.get("/api/assemblies?domain=user&type=script").await.ok();
    assert_eq!((&listed["items"][0]["content_hash"], &listed["queue"]), (&made["content_hash"], &json!([])));
    assert!(listed["items"][0].get("payload").is_none());
    assert_eq!(operator.get("/api/assemblies?domain=official").await.ok()["items"], json!([]));

    let changed = operator.put(&format!("/api/assemblies/{guid}"), json!({"display_name": "Other"})).await.ok();
    assert_eq!((&changed["payload"], &changed["name"]), (&made["payload"], &json!("Other")));
    assert_ne!(changed["content_hash"], made["content_hash"]);
    let stale = operator.request(reqwest::Method::PUT, &format!("/api/assemblies/{guid}"));
    let stale = stale.header("If-Match", made["content_hash"].as_str().expect("a hash")).json(&json!({"summary": "x"}));
    let _ = operator.send(stale).await.error(409, "content_changed");
    let _ = operator
        .put(&format!("/api/assemblies/{guid}"), json!({"assembly_guid": "other"}))
        .await
        .error(400, "invalid_assembly_guid");

    for (body, status, code) in [
        (json!({"payload": document()}), 400, "invalid_domain"),
        (json!({"domain": "nonsense", "payload": document()}), 400, "invalid_domain"),
        (json!({"domain": "official", "payload": document()}), 403, "forbidden"),
        (json!({"domain": "user"}), 400, "missing_payload"),
        (json!({"domain": "user", "payload": 5}), 400, "invalid_payload"),
        (json!({"domain": "user", "payload": {"type": "bash"}}), 400, "invalid_payload"),
        (json!({"domain": "user", "payload": {"type": "perl", "script": "x"}}), 400, "unsupported_script_type"),
        (json!({"domain": "user", "payload": document(), "assembly_type": "workflow"}), 400, "not_supported_yet"),
        (json!({"domain": "user", "payload": document(), "assembly_guid": guid}), 403, "assembly_guid_forbidden"),
        (json!({"domain": "user", "payload": document(), "owner": "me"}), 400, "invalid_json"),
    ] {
        let _ = operator.post("/api/assemblies", body).await.error(status, code);
    }
    let official = json!({"domain": "official", "payload": document()});
    let _ = engine.admin().await.post("/api/assemblies", official).await.error(403, "dev_mode_required");
    // Larger than other routes take, and accepted; larger than this one takes, and refused.
    let large = |bytes: usize| json!({"domain": "user", "payload": {"type": "bash", "script": "x".repeat(bytes)}});
    let _ = operator.post("/api/assemblies", large(2 << 20)).await.expect(201);
    let _ = operator.post("/api/assemblies", large(33 << 20)).await.error(413, "body_too_large");

    let device = engine.device(site).await;
    let job = json!({"name": "Uses it", "components": [{"assembly_guid": guid}], "targets": [device.hostname],
                     "schedule": {"type": "once", "start": "2090-01-01T00:00:00Z"}});
    let _ = operator.post("/api/scheduled_jobs", job).await.ok();
    let _ = operator.delete(&format!("/api/assemblies/{guid}")).await.error(409, "assembly_in_use");
    let _ = operator.delete(&format!("/api/assemblies/{guid}?force=true")).await.expect(202);
    let _ = operator.get(&format!("/api/assemblies/{guid}")).await.error(404, "not found");
}

#[tokio::test]
async fn a_quick_run_is_queued_for_each_host_or_for_none() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let (one, two, there) = (engine.device(north).await, engine.device(north).await, engine.device(south).await);
    let operator = engine.operator(&[north]).await;
    let admin = engine.admin().await;
    let made = script(&operator).await;
    let guid = made["assembly_guid"].as_str().expect("a guid");
    let run = |hosts: Value| json!({"hostnames": hosts, "assembly_guid": guid, "variable_values": {"greeting": "hello; $(id)"}, "admin_pass": "secret"});

    let started = operator.post("/api/scripts/quick_run", run(json!([two.hostname, one.guid]))).await.ok();
    let results = started["results"].as_array().expect("results");
    assert_eq!(
        (&results[0]["hostname"], &results[1]["hostname"]),
        (&json!(two.hostname), &json!(one.hostname)),
        "in their order"
    );
    assert_eq!(results[0]["status"], "Queued");
    let request = "SELECT s.request || a.request FROM activity_history a JOIN quick_run_scripts s ON s.id = a.quick_run_script_id
                   WHERE a.id = $1";
    let request: Value =
        sqlx::query_scalar(request).bind(results[0]["job_id"].as_i64()).fetch_one(&engine.database.pool).await.expect("the row");
    assert_eq!((&request["target_hostname"], &request["run_mode"]), (&json!(two.hostname), &json!("system")));
    assert_eq!((&request["environment"]["GREETING"], &request["environment"]["COUNT"]), (&json!("hello; $(id)"), &json!("1")));
    assert_eq!((&request["timeout_seconds"], &request["admin_pass"]), (&json!(60), &json!("")));
    assert_eq!(request["script_content"], "ZWNobyAiJEdSRUVUSU5HIgo=", "LF, base64");

    for (host, named) in [
        (there.hostname.clone(), there.hostname.clone()),
        // A GUID is named in its canonical form, however it was written.
        (there.guid.to_lowercase(), there.guid.to_uppercase()),
        ("no-such-host".to_owned(), "no-such-host".to_owned()),
    ] {
        let refused = operator.post("/api/scripts/quick_run", run(json!([one.hostname, host]))).await;
        assert_eq!(refused.error(403, "out_of_scope_hostnames").body["hostnames"], json!([named]));
    }
    let _ = admin.post("/api/scripts/quick_run", run(json!(["no-such-host"]))).await.error(400, "unknown_target");
    for (change, status, code) in [
        (json!({"hostnames": null}), 400, "missing_hostnames"),
        (json!({"hostnames": []}), 400, "missing_hostnames"),
        (json!({"hostnames": [5]}), 400, "invalid_hostnames"),
        (json!({"assembly_guid": null}), 400, "missing_script"),
        (json!({"assembly_guid": "no-such"}), 404, "script_not_found"),
        (json!({"assembly_guid": null, "script_path": "../../etc/passwd"}), 400, "invalid_script_path"),
        (json!({"run_mode": "everybody"}), 400, "invalid_run_mode"),
        (json!({"run_mode": "currentuser", "session_target": "specific_session"}), 400, "invalid_target_session_id"),
        (json!({"variable_values": {"count": "1; calc"}}), 400, "invalid_variable_value"),
        (json!({"variable_values": {"count": []}}), 400, "invalid_variable_value"),
        (json!({"everywhere": true}), 400, "invalid_json"),
    ] {
        let mut body = run(json!([one.hostname]));
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let _ = operator.post("/api/scripts/quick_run", body).await.error(status, code);
    }
    let by_path = json!({"hostnames": [one.hostname], "script_path": "Say_hi"});
    let _ = operator.post("/api/scripts/quick_run", by_path).await.ok();
    let rows: i64 =
        sqlx::query_scalar("SELECT count(*) FROM activity_history").fetch_one(&engine.database.pool).await.expect("a count");
    assert_eq!(rows, 3, "what was refused left nothing");
}

#[tokio::test]
async fn a_history_is_seen_and_cleared_only_from_inside_its_site() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let device = engine.device_named(north, "twin").await;
    let operator = engine.operator(&[north]).await;
    let stranger = engine.operator(&[south]).await;
    let made = script(&operator).await;
    let body = json!({"hostnames": ["twin"], "assembly_guid": made["assembly_guid"]});
    let mut ids = Vec::new();
    for _ in 0..3 {
        let started = operator.post("/api/scripts/quick_run", body.clone()).await.ok();
        ids.push(started["results"][0]["job_id"].as_i64().expect("an id"));
    }
    sqlx::query(
        "UPDATE activity_history SET status = 'Success', delivery = 'done', stdout = 'hi', finished_at = now() WHERE id <> $1",
    )
    .bind(ids[0])
    .execute(&engine.database.pool)
    .await
    .expect("an update");

    for name in ["twin", "TWIN", device.guid.as_str()] {
        let shown = operator.get(&format!("/api/device/activity/{name}")).await.ok();
        let history = shown["history"].as_array().expect("a history");
        assert_eq!(history.len(), 3);
        assert_eq!(
            (&history[0]["id"], &history[0]["status"]),
            (&json!(ids[0]), &json!("Queued")),
            "what has not ended comes first"
        );
        assert_eq!((&history[1]["has_stdout"], &history[1]["has_stderr"]), (&json!(true), &json!(false)));
        assert!(history[1].get("stdout").is_none());
    }
    let older = operator.get(&format!("/api/device/activity/twin?before_id={}&limit=1", ids[2])).await.ok();
    assert_eq!((older["history"].as_array().map(Vec::len), &older["history"][0]["id"]), (Some(1), &json!(ids[1])));
    let _ = operator.get("/api/device/activity/twin?limit=501").await.error(400, "invalid_limit");
    let one = operator.get(&format!("/api/device/activity/job/{}", ids[2])).await.ok();
    assert_eq!((&one["stdout"], &one["script_name"], &one["hostname"]), (&json!("hi"), &json!("Say hi"), &json!("twin")));

    for path in
        ["twin".to_owned(), device.guid.clone(), "no-such-host".to_owned(), format!("job/{}", ids[2]), "job/424242".to_owned()]
    {
        let _ = stranger.get(&format!("/api/device/activity/{path}")).await.error(404, "Not found");
    }
    let _ = stranger.delete("/api/device/activity/twin").await.error(404, "Not found");
    let _ = engine.device_named(south, "twin").await;
    assert_eq!(
        operator.get("/api/device/activity/twin").await.ok()["history"].as_array().map(Vec::len),
        Some(3),
        "a namesake elsewhere"
    );
    assert_eq!(stranger.get("/api/device/activity/twin").await.ok()["history"], json!([]));
    let admin = engine.admin().await;
    let ambiguous = admin.get("/api/device/activity/twin").await.error(409, "ambiguous_hostname");
    assert_eq!(ambiguous.body["candidates"].as_array().map(Vec::len), Some(2));
    let _ = admin.delete("/api/device/activity/twin").await.error(409, "ambiguous_hostname");

    assert_eq!(operator.delete("/api/device/activity/twin").await.ok()["cleared"], 2);
    let left = operator.get("/api/device/activity/twin").await.ok();
    assert_eq!(
        (left["history"].as_array().map(Vec::len), &left["history"][0]["id"]),
        (Some(1), &json!(ids[0])),
        "what waits stays"
    );
}
