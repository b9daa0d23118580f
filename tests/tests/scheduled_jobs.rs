//! Scheduled jobs over REST: what is accepted is kept and shown as it was meant, what is not is refused by name, and nobody
//! reaches beyond their sites.

use std::collections::BTreeSet;

use borealis_tests::{Actor, TestEngine};
use serde_json::{Value, json};

async fn script(actor: &Actor) -> String {
    let body = json!({"domain": "user", "display_name": "Say hi", "payload": {"type": "bash", "script": "echo hi"}});
    let made = actor.post("/api/assemblies", body).await.expect(201).body;
    made["assembly_guid"].as_str().expect("a guid").to_owned()
}

/// A job that is not due for long.
fn job(script: &str, targets: Value) -> Value {
    json!({
        "name": "Nightly", "components": [{"assembly_guid": script, "name": "Say hi", "variable_values": {"who": "me"}}],
        "targets": targets, "schedule": {"type": "daily", "start": "2090-01-01T03:00", "timezone": "Europe/Berlin"},
    })
}

async fn make(actor: &Actor, script: &str, targets: Value) -> Value {
    actor.post("/api/scheduled_jobs", job(script, targets)).await.ok()["job"].clone()
}

fn path(job: &Value, rest: &str) -> String {
    format!("/api/scheduled_jobs/{}{rest}", job["id"])
}

/// The fields of an answer are those the OpenAPI document names.
async fn documented(actor: &Actor, schema: &str, answer: &Value) {
    let document = actor.get("/api/openapi.json").await.ok();
    let named = document["components"]["schemas"][schema]["properties"].as_object().unwrap_or_else(|| panic!("no {schema}"));
    let found = answer.as_object().unwrap_or_else(|| panic!("no object: {answer}"));
    let (named, found): (BTreeSet<_>, BTreeSet<_>) = (named.keys().collect(), found.keys().collect());
    assert_eq!(found, named, "{schema}");
}

#[tokio::test]
async fn a_job_is_shown_as_it_was_made_and_changed() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let operator = engine.operator(&[site]).await;
    let script = script(&operator).await;

    let made = make(&operator, &script, json!([device.hostname])).await;
    assert_eq!(made["targets"][0]["device_guid"], device.guid.to_lowercase());
    assert_eq!((&made["targets"][0]["kind"], &made["targets"][0]["site_id"]), (&json!("device"), &json!(site)));
    assert_eq!(made["start_ts"], 3_786_919_200_i64, "03:00 in Berlin is 02:00 UTC");
    assert_eq!((&made["next_run_ts"], &made["last_status"]), (&made["start_ts"], &json!("Scheduled")));
    assert_eq!(made["schedule"]["timezone"], "Europe/Berlin");
    assert_eq!(made["expiration"], "1d", "one period");
    assert_eq!((&made["misfire_policy"], &made["overlap_policy"]), (&json!("run_once"), &json!("skip")));
    assert_eq!(
        (&made["enabled"], &made["execution_context"], &made["job_kind"]),
        (&json!(true), &json!("system"), &json!("automation"))
    );
    assert_eq!((&made["result_counts"]["total_targets"], &made["latest_occurrence"]), (&json!(1), &Value::Null));
    assert_eq!(operator.get(&path(&made, "")).await.ok()["job"], made);
    assert_eq!(operator.get("/api/scheduled_jobs").await.ok()["jobs"], json!([made]));
    assert_eq!(operator.get(&format!("/api/scheduled_jobs?site={site}")).await.ok()["jobs"][0]["id"], made["id"]);
    assert_eq!(operator.get("/api/scheduled_jobs?site=9999").await.ok()["jobs"], json!([]));
    documented(&operator, "ScheduledJob", &made).await;
    documented(&operator, "ResultCounts", &made["result_counts"]).await;
    let planned = operator.get(&path(&made, "/devices")).await.ok();
    assert_eq!((&planned["occurrence"], &planned["devices"][0]["job_status"]), (&Value::Null, &json!("Pending")));

    let _ = operator.put(&path(&made, ""), json!({})).await.error(400, "no_fields_to_update");
    let changed =
        operator.put(&path(&made, ""), json!({"name": "Weekly", "stop_after": "5m", "overlap_policy": "queue"})).await.ok();
    let changed = &changed["job"];
    assert_eq!(
        (&changed["name"], &changed["stop_after"], &changed["duration_stop_enabled"]),
        (&json!("Weekly"), &json!("5m"), &json!(true))
    );
    assert_eq!(changed["next_run_ts"], made["next_run_ts"], "the schedule was not touched");
    let changed = operator.put(&path(&made, ""), json!({"schedule": {"type": "weekly", "start": 4_000_000_059_i64}})).await.ok();
    assert_eq!((&changed["job"]["next_run_ts"], &changed["job"]["expiration"]), (&json!(4_000_000_020_i64), &json!("7d")));
    let _ = operator.put(&path(&made, ""), json!({"schedule_type": "daily"})).await.error(400, "start_required");

    let off = operator.post(&path(&made, "/toggle"), json!({"enabled": false})).await.ok();
    assert_eq!((&off["job"]["enabled"], &off["job"]["next_run_ts"]), (&json!(false), &Value::Null));
    let _ = operator.post(&path(&made, "/rerun"), json!({})).await.error(409, "job_disabled");
    let on = operator.call("POST", &path(&made, "/toggle"), None).await.ok();
    assert_eq!((&on["job"]["enabled"], &on["job"]["next_run_ts"]), (&json!(true), &json!(4_000_000_020_i64)));

    assert_eq!(operator.delete(&path(&made, "")).await.ok(), json!({"status": "ok"}));
    let _ = operator.get(&path(&made, "")).await.error(404, "not found");
}

#[tokio::test]
async fn bad_input_is_refused_by_name_and_changes_nothing() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let script = script(&admin).await;
    let good = job(&script, json!([device.hostname]));
    for (change, status, code) in [
        (json!({"name": null}), 400, "name_and_components_required"),
        (json!({"components": []}), 400, "name_and_components_required"),
        (json!({"components": [{}]}), 400, "invalid_components"),
        (json!({"components": [{"assembly_guid": "no-such"}]}), 400, "unknown_assembly"),
        (json!({"components": [{"assembly_guid": script, "type": "ansible"}]}), 400, "not_supported_yet"),
        (json!({"targets": null}), 400, "targets_required"),
        (json!({"targets": []}), 400, "targets_required"),
        (json!({"targets": [{}]}), 400, "invalid_target"),
        (json!({"targets": ["no-such-host"]}), 400, "unknown_target"),
        (json!({"targets": ["0f0e0d0c-0b0a-4908-8706-050403020100"]}), 400, "unknown_target"),
        (json!({"targets": [{"kind": "filter", "filter_id": 1}]}), 400, "not_supported_yet"),
        (json!({"schedule": {"type": "fortnightly"}}), 400, "invalid_schedule_type"),
        (json!({"schedule": {"type": "daily"}}), 400, "start_required"),
        (json!({"schedule": {"type": "daily", "start": "soon"}}), 400, "invalid_start"),
        (json!({"schedule": {"type": "daily", "start": 0, "timezone": "Mars/Olympus"}}), 400, "invalid_timezone"),
        (json!({"schedule": {"type": "cron", "cron": "61 * * * *"}}), 400, "invalid_cron"),
        (json!({"schedule": {"type": "cron", "cron": "0 0 30 2 *"}}), 400, "invalid_cron"),
        (json!({"schedule": {"type": "cron"}}), 400, "invalid_cron"),
        (json!({"schedule": {"type": "daily", "start": 100, "end": 0}}), 400, "invalid_end"),
        (json!({"schedule": {"type": "daily", "start": 0, "max_occurrences": 0}}), 400, "invalid_max_occurrences"),
        (json!({"schedule": {"type": "daily", "start": 0, "color": "red"}}), 400, "unknown_field"),
        (json!({"expiration": "soon"}), 400, "invalid_expiration"),
        (json!({"stop_after": "soon"}), 400, "invalid_stop_after"),
        (json!({"misfire_policy": "maybe"}), 400, "invalid_misfire_policy"),
        (json!({"overlap_policy": "maybe"}), 400, "invalid_overlap_policy"),
        (json!({"execution_context": "root"}), 400, "invalid_execution_context"),
        (json!({"execution_context": "local"}), 400, "not_supported_yet"),
        (json!({"job_kind": "agent_maintenance"}), 400, "invalid_job_kind"),
        (json!({"job_kind": "chores"}), 400, "invalid_job_kind"),
        (json!({"credential_id": 1}), 400, "not_supported_yet"),
        (json!({"enabled": "yes"}), 400, "invalid_field"),
        (json!({"colour": "red"}), 400, "invalid_json"),
    ] {
        let mut body = good.clone();
        for (key, value) in change.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let _ = admin.post("/api/scheduled_jobs", body).await.error(status, code);
    }
    for raw in ["", "{", "[]", "null", "\"job\""] {
        let request =
            admin.request(reqwest::Method::POST, "/api/scheduled_jobs").header("Content-Type", "application/json").body(raw);
        let _ = admin.send(request).await.expect(400);
    }
    assert_eq!(admin.get("/api/scheduled_jobs").await.ok()["jobs"], json!([]), "nothing was made");

    let made = make(&admin, &script, json!([device.hostname])).await;
    for (rest, code) in [
        ("/devices?occurrence=soon", "invalid_query"),
        ("/runs?days=0", "invalid_days"),
        ("/runs?days=many", "invalid_query"),
        ("/runs?limit=501", "invalid_limit"),
        ("/runs?cursor=x", "invalid_cursor"),
    ] {
        let _ = admin.get(&path(&made, rest)).await.error(400, code);
    }
    let _ = admin.get("/api/scheduled_jobs?limit=0").await.error(400, "invalid_limit");
    let _ = admin.get(&path(&made, "/devices?occurrence=1")).await.error(404, "not found");
    let _ = admin.get("/api/scheduled_jobs/abc").await.error(404, "not found");
    let _ = admin.get("/api/scheduled_jobs/99999999999999999999").await.error(404, "not found");
    let _ = admin.post(&path(&made, "/runs/12345/cancel"), json!({})).await.error(404, "not found");
    let _ = admin.post(&path(&made, "/toggle"), json!({"on": true})).await.error(400, "invalid_json");
    let _ = admin.post(&path(&made, "/retry_failed"), json!({})).await.error(409, "nothing_to_retry");
}

#[tokio::test]
async fn a_preview_shows_the_next_instants() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let ask =
        |schedule: Value, count: Value| admin.post("/api/scheduled_jobs/preview", json!({"schedule": schedule, "count": count}));
    let daily = json!({"type": "daily", "start": "2090-03-25T02:30", "timezone": "Europe/Berlin"});
    let shown = ask(daily.clone(), json!(3)).await.ok();
    assert_eq!(shown["occurrences"][0], json!({"ts": 3_794_088_600_i64, "iso": "2090-03-25T01:30:00Z"}));
    assert_eq!(
        (&shown["occurrences"][1]["iso"], &shown["occurrences"][2]["iso"]),
        (&json!("2090-03-26T01:00:00Z"), &json!("2090-03-27T00:30:00Z")),
        "02:30 does not exist on the 26th"
    );
    assert_eq!(ask(daily.clone(), Value::Null).await.ok()["occurrences"].as_array().map(Vec::len), Some(5));
    let bounded = json!({"type": "daily", "start": "2090-01-01", "max_occurrences": 2});
    assert_eq!(ask(bounded, json!(100)).await.ok()["occurrences"].as_array().map(Vec::len), Some(2));
    let _ = ask(daily.clone(), json!(0)).await.error(400, "invalid_count");
    let _ = ask(daily, json!(101)).await.error(400, "invalid_count");
    let _ = ask(json!({"type": "cron", "cron": "0 0 31 2 *"}), json!(1)).await.error(400, "invalid_cron");
    let _ = ask(json!({"type": "daily"}), json!(1)).await.error(400, "start_required");
    let _ = ask(json!({"kind": "daily"}), json!(1)).await.error(400, "invalid_json");
}

#[tokio::test]
async fn nobody_reaches_beyond_their_sites() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let (here, there) = (engine.device(north).await, engine.device(south).await);
    let owner = engine.operator(&[north]).await;
    let stranger = engine.operator(&[south]).await;
    let nowhere = engine.operator(&[]).await;
    let admin = engine.admin().await;
    let script = script(&owner).await;
    let made = make(&owner, &script, json!([here.hostname])).await;
    let started = owner.post(&path(&made, "/rerun"), json!({})).await.ok();
    let run = started["runs"][0].as_i64().expect("a run");

    // Somebody else's job and no job at all answer the same, whatever is tried.
    let absent = json!({"id": 424_242});
    for actor in [&stranger, &nowhere] {
        for job in [&made, &absent] {
            for (method, rest, body) in [
                ("GET", String::new(), None),
                ("PUT", String::new(), Some(json!({"name": "mine"}))),
                ("POST", "/toggle".into(), Some(json!({"enabled": false}))),
                ("POST", "/rerun".into(), Some(json!({"allow_overlap": true}))),
                ("POST", "/retry_failed".into(), Some(json!({"allow_overlap": true}))),
                ("GET", "/runs".into(), None),
                ("DELETE", "/runs".into(), None),
                ("GET", "/devices".into(), None),
                ("POST", format!("/runs/{run}/cancel"), Some(json!({}))),
                ("DELETE", String::new(), None),
            ] {
                let _ = actor.call(method, &path(job, &rest), body.as_ref()).await.error(404, "not found");
            }
        }
        assert_eq!(actor.get("/api/scheduled_jobs").await.ok()["jobs"], json!([]));
        assert_eq!(actor.get(&format!("/api/scheduled_jobs?site={north}")).await.ok()["jobs"], json!([]));
    }
    assert_eq!(owner.get(&path(&made, "")).await.ok()["job"]["enabled"], true, "nothing was changed");

    // A foreign host and no host answer the same, by name, by GUID and with a lie about the site.
    for target in [
        json!(there.hostname),
        json!(there.guid),
        json!({"kind": "device", "device_guid": there.guid, "hostname": here.hostname, "site_id": north}),
        json!({"kind": "device", "hostname": there.hostname, "site_id": north}),
        json!("no-such-host"),
        json!({"kind": "all_devices"}),
    ] {
        let body = job(&script, json!([here.hostname, target]));
        let _ = owner.post("/api/scheduled_jobs", body).await.error(403, "out_of_scope_targets");
        let _ = owner.put(&path(&made, ""), json!({"targets": [target]})).await.error(403, "out_of_scope_targets");
    }
    let _ = nowhere.post("/api/scheduled_jobs", job(&script, json!([here.hostname]))).await.error(403, "out_of_scope_targets");

    // An administrator's edit does not widen an operator's job.
    let _ = admin.put(&path(&made, ""), json!({"targets": [there.hostname]})).await.error(403, "out_of_scope_targets");
    // A job that reaches both sites is seen by neither operator.
    let both = make(&admin, &script, json!([here.hostname, there.hostname])).await;
    let all = make(&admin, &script, json!([{"all_devices": true}])).await;
    for actor in [&owner, &stranger] {
        for hidden in [&both, &all] {
            let _ = actor.get(&path(hidden, "")).await.error(404, "not found");
        }
    }
    assert_eq!(engine.operator(&[north, south]).await.get(&path(&both, "")).await.ok()["job"]["id"], both["id"]);
}

#[tokio::test]
async fn a_lost_assignment_stops_the_next_occurrence() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let device = engine.device(north).await;
    let owner = engine.operator(&[north]).await;
    let admin = engine.admin().await;
    let script = script(&owner).await;
    let made = make(&owner, &script, json!([device.hostname])).await;
    let body = json!({"usernames": [owner.name], "site_ids": [south]});
    let _ = admin.post("/api/user_site_assignments/assign", body).await.ok();
    let _ = owner.get(&path(&made, "")).await.error(404, "not found");
    let _ = admin.post(&path(&made, "/rerun"), json!({})).await.ok();
    let runs = admin.get(&path(&made, "/runs")).await.ok();
    assert_eq!((&runs["runs"][0]["status"], &runs["runs"][0]["skip_reason"]), (&json!("Skipped"), &json!("no_devices_targeted")));
    assert_eq!(admin.get(&path(&made, "")).await.ok()["job"]["last_status"], "No Devices Targeted");
}

#[tokio::test]
async fn a_name_that_fits_several_devices_is_never_guessed() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let first = engine.device_named(north, "twin").await;
    let second = engine.device_named(south, "TWIN").await;
    let admin = engine.admin().await;
    let script = script(&admin).await;
    let refused = admin.post("/api/scheduled_jobs", job(&script, json!(["twin"]))).await.error(409, "ambiguous_hostname");
    assert_eq!(refused.body["candidates"].as_array().map(Vec::len), Some(2));
    let made = make(&admin, &script, json!([{"kind": "device", "hostname": "twin", "site_id": south}])).await;
    assert_eq!(made["targets"][0]["device_guid"], second.guid.to_lowercase());
    let operator = engine.operator(&[north]).await;
    let made = make(&operator, &script, json!(["twin"])).await;
    assert_eq!(made["targets"][0]["device_guid"], first.guid.to_lowercase(), "a namesake elsewhere is no conflict");
}

#[tokio::test]
async fn a_manual_start_freezes_its_targets_and_can_be_cancelled_and_retried() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let (one, two) = (engine.device(site).await, engine.device(site).await);
    let operator = engine.operator(&[site]).await;
    let script = script(&operator).await;
    let made = make(&operator, &script, json!([one.hostname, two.hostname])).await;
    let started = operator.post(&path(&made, "/rerun"), json!({})).await.ok();
    assert_eq!((&started["status"], started["runs"].as_array().map(Vec::len)), (&json!("queued"), Some(2)));
    assert_eq!(started["job"]["next_run_ts"], made["next_run_ts"], "the schedule goes on as before");
    let _ = operator.post(&path(&made, "/rerun"), json!({})).await.error(409, "occurrence_in_progress");
    let _ = operator.post(&path(&made, "/retry_failed"), json!({})).await.error(409, "occurrence_in_progress");

    let listed = operator.get(&path(&made, "/runs")).await.ok();
    assert_eq!(listed["runs"].as_array().map(Vec::len), Some(2));
    documented(&operator, "ScheduledJobRun", &listed["runs"][0]).await;
    let page = operator.get(&path(&made, "/runs?limit=1")).await.ok();
    let cursor = page["next_cursor"].as_str().expect("a cursor").to_owned();
    let rest = operator.get(&path(&made, &format!("/runs?limit=1&cursor={cursor}"))).await.ok();
    assert_ne!(page["runs"][0]["id"], rest["runs"][0]["id"]);

    let run = started["runs"][0].as_i64().expect("a run");
    let cancelled = operator.post(&path(&made, &format!("/runs/{run}/cancel")), json!({})).await.ok();
    assert_eq!(cancelled["status"], "cancelled", "nothing had reached the device");
    let _ = operator.post(&path(&made, &format!("/runs/{run}/cancel")), json!({})).await.error(409, "run_already_finished");
    let devices = operator.get(&path(&made, "/devices")).await.ok();
    assert_eq!((&devices["occurrence"], devices["devices"].as_array().map(Vec::len)), (&started["occurrence"], Some(2)));
    let stopped =
        devices["devices"].as_array().and_then(|list| list.iter().find(|device| device["run_id"] == run)).expect("the run");
    assert_eq!((&stopped["job_status"], &stopped["error"]), (&json!("Failed"), &json!("cancelled_by_operator")));
    let counts = &operator.get(&path(&made, "")).await.ok()["job"]["result_counts"];
    assert_eq!((&counts["pending"], &counts["failed"], &counts["total_targets"]), (&json!(1), &json!(1), &json!(2)));

    // The other one succeeds; what is retried is the one that did not.
    sqlx::query(
        "UPDATE scheduled_job_runs SET status = 'Success', started_at = now(), finished_at = now() WHERE status = 'Pending'",
    )
    .execute(&engine.database.pool)
    .await
    .expect("an update");
    sqlx::query("UPDATE job_occurrences SET state = 'closed', finished_at = now()")
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    let retried = operator.post(&path(&made, "/retry_failed"), json!({})).await.ok();
    assert_eq!(retried["runs"].as_array().map(Vec::len), Some(1));
    let again = operator.get(&path(&made, "/devices")).await.ok();
    assert_eq!(again["devices"][0]["device_guid"], stopped["device_guid"]);

    let cleared = operator.delete(&path(&made, "/runs")).await.ok();
    assert_eq!((&cleared["cleared"], &cleared["kept_occurrence"]), (&json!(2), &retried["occurrence"]));
    assert_eq!(operator.delete(&path(&made, "")).await.ok(), json!({"status": "ok"}));
}

#[tokio::test]
async fn the_same_request_under_one_key_is_one_job() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let script = script(&admin).await;
    let body = job(&script, json!([device.hostname]));
    let send = |actor: &Actor, key: &str, body: &Value| {
        let request = actor.request(reqwest::Method::POST, "/api/scheduled_jobs").header("Idempotency-Key", key).json(body);
        let actor = actor.clone();
        async move { actor.send(request).await }
    };
    let twins = futures::future::join_all((0..20).map(|_| send(&admin, "one", &body))).await;
    let answers: Vec<Value> = twins.into_iter().map(borealis_tests::Reply::ok).collect();
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "one answer for all");
    assert_eq!(admin.get("/api/scheduled_jobs").await.ok()["jobs"].as_array().map(Vec::len), Some(1));
    let mut other = body.clone();
    other["name"] = json!("Other");
    let _ = send(&admin, "one", &other).await.error(422, "idempotency_key_reused");
    let _ = send(&admin, &"x".repeat(256), &body).await.error(400, "invalid_idempotency_key");
    // A refused request keeps nothing under its key.
    other["targets"] = json!(["no-such-host"]);
    let _ = send(&admin, "two", &other).await.error(400, "unknown_target");
    let _ = send(&admin, "two", &body).await.ok();
    // Somebody else's key is somebody else's.
    let _ = send(&engine.second_admin().await, "one", &other).await.error(400, "unknown_target");

    let made = answers[0]["job"].clone();
    let rerun = |key: &str| {
        let request = admin.request(reqwest::Method::POST, &path(&made, "/rerun")).header("Idempotency-Key", key);
        let admin = admin.clone();
        async move { admin.send(request).await }
    };
    let first = rerun("go").await.ok();
    assert_eq!(rerun("go").await.ok(), first);
    let _ = rerun("go again").await.error(409, "occurrence_in_progress");
}

#[tokio::test]
async fn a_list_by_site_has_the_jobs_for_all_devices_that_reach_it() {
    let engine = TestEngine::start().await;
    let ((north, _), (south, _)) = (engine.site("north").await, engine.site("south").await);
    let (admin, second) = (engine.admin().await, engine.second_admin().await);
    let script = script(&second).await;
    let made = make(&second, &script, json!([{"kind": "all_devices"}])).await;
    let found = async |site: i64| admin.get(&format!("/api/scheduled_jobs?site={site}")).await.ok()["jobs"].clone();
    for site in [north, south] {
        assert_eq!(found(site).await[0]["id"], made["id"]);
    }
    assert_eq!(found(999_999_999).await, json!([]), "there is no such site");
    // Its owner becomes an operator of one site, and so the job reaches no other.
    let sql = "UPDATE users SET role = 'User' WHERE username = $1";
    let _ = sqlx::query(sql).bind(&second.name).execute(&engine.database.pool).await.expect("an update");
    assert_eq!(found(north).await, json!([]));
    let body = json!({"usernames": [second.name], "site_ids": [south]});
    let _ = admin.post("/api/user_site_assignments/assign", body).await.ok();
    assert_eq!((found(north).await, found(south).await[0]["id"].clone()), (json!([]), made["id"].clone()));
}

#[tokio::test]
async fn a_run_that_starts_while_pages_are_read_is_on_one_of_them() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let admin = engine.admin().await;
    let script = script(&admin).await;
    let mut devices = Vec::new();
    for _ in 0..5 {
        devices.push(engine.device(site).await);
    }
    let guids: Vec<&str> = devices.iter().map(|device| device.guid.as_str()).collect();
    let made = make(&admin, &script, json!(guids)).await;
    let pool = &engine.database.pool;
    let sql = "WITH occurrence AS (
                   INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at)
                   VALUES ($1, now() - interval '1 minute', 'schedule', 'open', now())
                   RETURNING id, job_id, scheduled_at)
               INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, device_guid, target_hostname, site_id)
               SELECT o.job_id, o.id, o.scheduled_at, 'Pending', d.guid, d.hostname, d.site_id FROM occurrence o, devices d";
    let _ = sqlx::query(sql).bind(made["id"].as_i64()).execute(pool).await.expect("runs");
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = admin.get(&path(&made, &format!("/runs?limit=2{cursor}"))).await.ok();
        seen.extend(page["runs"].as_array().expect("runs").iter().map(|run| run["id"].as_i64().expect("an id")));
        // The last one of all starts now.
        let start = "UPDATE scheduled_job_runs SET status = 'Running', started_at = now()
                     WHERE id = (SELECT min(id) FROM scheduled_job_runs) AND status = 'Pending'";
        let _ = sqlx::query(start).execute(pool).await.expect("a start");
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    let distinct: BTreeSet<i64> = seen.iter().copied().collect();
    assert_eq!((seen.len(), distinct.len()), (5, 5), "{seen:?}");
}
