//! The audit: who reads what of it, how it leaves the house, and that nobody changes it unnoticed.

use std::{
    os::unix::fs::PermissionsExt,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderMap, StatusCode},
    routing,
};
use borealis_api::audit_webhook::Webhook;
use borealis_engine::audit::chain;
use borealis_tests::{
    Actor, TestEngine,
    actor::{Enrollment, new_key},
    engine::{CIPHER, PASSWORD},
    eventually,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use url::Url;

/// Waits until all events are sealed; the report of the check.
async fn sealed(admin: &Actor) -> Value {
    for _ in 0..200 {
        let report = admin.get("/api/audit/check").await.ok();
        if report["waiting"] == 0 || report["ok"] == false {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("events wait to be sealed for ten seconds");
}

async fn run(engine: &TestEngine, sql: &'static str) -> Result<u64, sqlx::Error> {
    sqlx::query(sql).execute(&engine.database.pool).await.map(|done| done.rows_affected())
}

#[tokio::test]
async fn it_can_only_grow() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    assert_eq!(sealed(&admin).await["ok"], true);
    for sql in [
        "UPDATE audit_events SET actor_name = 'nobody'",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events CASCADE",
        "UPDATE audit_chain SET seq = seq",
        "DELETE FROM audit_chain",
    ] {
        let refused = run(&engine, sql).await.expect_err(sql);
        assert!(refused.to_string().contains("append-only"), "{sql}: {refused}");
    }
}

#[tokio::test]
async fn a_check_by_the_engine_itself_is_an_event_and_says_what_was_found() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let _ = sealed(&admin).await;
    let check = async || chain::check_and_note(&engine.database.pool, &engine.app.vault).await.expect("a check");
    let event = async || admin.get("/api/audit?action=audit.check").await.ok()["events"][0].clone();
    let found = check().await;
    assert!(found.broken.is_none() && found.checked > 0, "{found:?}");
    let first = event().await;
    assert_eq!(
        (&first["actor_kind"], &first["outcome"], &first["detail"]["head"]),
        (&json!("system"), &json!("success"), &json!(found.head))
    );

    let _ = sealed(&admin).await;
    engine.database.tamper("UPDATE audit_events SET actor_name = 'nobody' WHERE action = 'aegis.setup'").await;
    assert!(check().await.broken.is_some());
    let second = event().await;
    assert_eq!((&second["outcome"], second["detail"]["broken"]["why"].is_string()), (&json!("failure"), true), "{second}");
}

/// What a collector has taken: for each request the token and the events, by their places in the chain.
type Told = Arc<Mutex<Vec<(String, Vec<Value>)>>>;

/// A log collector that fails every other time, once after it has taken the events.
async fn collector(told: Told) -> Url {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let url = format!("http://{}/audit", listener.local_addr().expect("its address"));
    let take = move |headers: HeaderMap, body: String| async move {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        assert_eq!(headers["content-type"], "application/x-ndjson");
        let mut told = told.lock().expect("the list");
        let events = body.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        told.push((token, events));
        if told.len() % 2 == 1 { StatusCode::BAD_GATEWAY } else { StatusCode::NO_CONTENT }
    };
    let collector = Router::new().route("/audit", routing::post(take));
    tokio::spawn(async move { axum::serve(listener, collector).await.expect("a server") });
    url.parse().expect("a URL")
}

#[tokio::test]
async fn a_webhook_is_told_everything_in_order_and_at_least_once() {
    let told: Told = Arc::default();
    let url = collector(Arc::clone(&told)).await;
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    std::fs::write(&token, "a-token-of-the-collector\n").expect("written");
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    let engine = TestEngine::with(|settings| {
        settings.audit_webhook = Some(Webhook::new(url, Some(&token)).expect("a webhook"));
    })
    .await;
    let admin = engine.admin().await;
    // A second process tells nothing twice by being there.
    let second = engine.second().await;
    for name in ["One", "Two"] {
        engine.site(name).await;
    }
    let all = sealed(&admin).await["checked"].as_i64().expect("a number");
    let taken = async || {
        let told = told.lock().expect("the list").clone();
        // What was answered with success, in the order it came.
        let taken: Vec<Value> = told.iter().skip(1).step_by(2).flat_map(|(_, events)| events.clone()).collect();
        (taken.last().and_then(|event| event["seq"].as_i64()) >= Some(all)).then_some((told, taken))
    };
    let (told, taken) = eventually("all of it is told", Duration::from_secs(30), taken).await;
    let places: Vec<i64> = taken.iter().map(|event| event["seq"].as_i64().expect("a place")).collect();
    assert_eq!(places, (1..=*places.last().expect("some")).collect::<Vec<_>>(), "in order, and none twice");
    assert!(told.iter().all(|(token, _)| token == "Bearer a-token-of-the-collector"));
    // What was refused came again.
    assert_eq!(told[0].1[0], told[1].1[0]);
    let created = taken.iter().find(|event| event["action"] == "site.create").expect("the first site");
    assert_eq!((&created["actor_name"], &created["detail"]["name"]), (&json!("admin"), &json!("One")));
    assert!(created["tag"].as_str().is_some_and(|tag| tag.len() == 64), "{created}");
    second.stop().await;
}

/// What the tables hold that people change, apart from when somebody was last seen.
async fn contents(engine: &TestEngine) -> Vec<(String, i64, Option<String>)> {
    let mut found = Vec::new();
    for (table, columns) in [
        ("users", "to_jsonb(t) - 'last_login'"),
        ("user_site_assignments", "to_jsonb(t)"),
        ("sites", "to_jsonb(t)"),
        ("devices", "to_jsonb(t)"),
        ("device_approvals", "to_jsonb(t)"),
        ("credentials", "to_jsonb(t)"),
        ("directory_providers", "to_jsonb(t)"),
        ("api_tokens", "to_jsonb(t) - 'last_used_at'"),
        ("assemblies", "to_jsonb(t)"),
        ("scheduled_jobs", "to_jsonb(t)"),
        ("activity_history", "to_jsonb(t)"),
        ("operator_sessions", "to_jsonb(t) - 'last_seen_at'"),
        ("aegis", "to_jsonb(t)"),
        ("github_token", "to_jsonb(t)"),
    ] {
        let sql = format!("SELECT count(*), md5(string_agg(({columns})::text, ',' ORDER BY ({columns})::text)) FROM {table} t");
        let (count, digest): (i64, Option<String>) = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .fetch_one(&engine.database.pool)
            .await
            .unwrap_or_else(|error| panic!("{table}: {error}"));
        found.push((table.to_owned(), count, digest));
    }
    found
}

#[tokio::test]
async fn what_cannot_be_told_is_not_done() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, code) = engine.site("North").await;
    let device = engine.device(site).await;
    let operator = engine.operator(&[site]).await;
    let name = &operator.name;
    let _other_session = operator.sign_in(name, PASSWORD, 1).await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let credential =
        admin.post("/api/credentials", json!({"name": "Web", "username": "deploy"})).await.ok()["credential"]["id"].clone();
    let provider = admin.post("/api/directory/providers", json!({"name": "Main"})).await.ok()["provider"]["id"].clone();
    let token = json!({"name": "x", "scopes": ["read"], "expires_in_days": 1});
    let token = admin.post("/api/auth/tokens", token).await.ok()["id"].as_str().expect("an id").to_owned();
    let assembly = json!({"domain": "user", "display_name": "Hello", "assembly_type": "script", "assembly_subtype": "bash",
        "payload": {"name": "Hello", "type": "bash", "script": "echo hello"}});
    let made = admin.post("/api/assemblies", assembly.clone()).await.ok();
    let guid = made["assembly_guid"].as_str().expect("a guid").to_owned();
    let job = json!({"name": "A job", "components": [{"assembly_guid": guid, "name": "Hello"}],
        "targets": [{"kind": "all_devices"}], "schedule": {"type": "daily", "start": "2090-01-01T03:00:00Z"}});
    let scheduled = admin.post("/api/scheduled_jobs", job.clone()).await.ok()["job"]["id"].clone();
    let pending = Enrollment::request(&engine.anonymous(), "waiting", &code, new_key()).await;
    let approval = engine.approval(pending.reference()).await;

    for sql in [
        "CREATE FUNCTION full_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no space for it'; END $$",
        "CREATE TRIGGER full_up BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION full_up()",
    ] {
        run(&engine, sql).await.expect(sql);
    }
    let before = contents(&engine).await;
    for (who, method, path, body) in [
        (&admin, "POST", "/api/sites".to_owned(), json!({"name": "South"})),
        (&admin, "POST", format!("/api/sites/{site}/rotate-enrollment-code"), json!({})),
        (&admin, "POST", "/api/users".to_owned(), json!({"username": "new", "password": PASSWORD, "role": "User"})),
        (&admin, "POST", format!("/api/users/{name}/role"), json!({"role": "Admin"})),
        (&admin, "POST", format!("/api/users/{name}/mfa"), json!({"enabled": false})),
        (&admin, "POST", format!("/api/users/{name}/reset_password"), json!({"password": "an entirely new one"})),
        (&admin, "DELETE", format!("/api/users/{name}"), json!({})),
        (&admin, "POST", "/api/user_site_assignments/assign".to_owned(), json!({"usernames": [name], "site_ids": [site]})),
        (&admin, "POST", "/api/credentials".to_owned(), json!({"name": "Other", "username": "deploy"})),
        (&admin, "PUT", format!("/api/credentials/{credential}"), json!({"password": "x"})),
        (&admin, "DELETE", format!("/api/credentials/{credential}"), json!({})),
        (&admin, "POST", "/api/directory/providers".to_owned(), json!({"name": "Other"})),
        (&admin, "PATCH", format!("/api/directory/providers/{provider}"), json!({"priority": 1})),
        (&admin, "DELETE", format!("/api/directory/providers/{provider}"), json!({})),
        (&admin, "POST", "/api/auth/tokens".to_owned(), json!({"name": "y", "scopes": ["read"], "expires_in_days": 1})),
        (&admin, "DELETE", format!("/api/auth/tokens/{token}"), json!({})),
        (&admin, "POST", "/api/assemblies".to_owned(), assembly),
        (&admin, "PUT", format!("/api/assemblies/{guid}"), json!({"summary": "s"})),
        (&admin, "POST", "/api/scheduled_jobs".to_owned(), job),
        (&admin, "DELETE", format!("/api/scheduled_jobs/{scheduled}"), json!({})),
        (&admin, "POST", format!("/api/admin/device-approvals/{approval}/approve"), json!({})),
        (&admin, "POST", format!("/api/admin/device-approvals/{approval}/deny"), json!({})),
        (
            &admin,
            "POST",
            "/api/aegis/rotate".to_owned(),
            json!({"current_cipher": CIPHER, "new_cipher": "an entirely new passphrase"}),
        ),
        (&admin, "POST", "/api/aegis/force_reset".to_owned(), json!({"confirm": "reset"})),
        (
            &operator,
            "POST",
            "/api/auth/password/reset".to_owned(),
            json!({"current_password": PASSWORD, "new_password": "an entirely new one"}),
        ),
        (&operator, "POST", "/api/auth/step-up".to_owned(), json!({"password": PASSWORD})),
        (&operator, "DELETE", "/api/auth/sessions".to_owned(), json!({})),
        (&operator, "POST", "/api/auth/logout".to_owned(), json!({})),
        (
            &operator,
            "POST",
            "/api/scripts/quick_run".to_owned(),
            json!({"script_path": made["path"], "hostnames": [device.hostname]}),
        ),
    ] {
        let reply = who.call(method, &path, Some(&body)).await;
        assert!(reply.status >= 500, "{method} {path}: {} {}", reply.status, reply.text);
        assert!(!reply.text.contains("no space"), "{method} {path} tells internals: {}", reply.text);
        assert_eq!(contents(&engine).await, before, "{method} {path}");
    }
    run(&engine, "DROP TRIGGER full_up ON audit_events").await.expect("no trigger");
    let _ = admin.post("/api/sites", json!({"name": "South"})).await.expect(201);
    let _ = operator.get("/api/auth/me").await.ok();
}

#[tokio::test]
async fn a_change_a_removal_and_a_forged_place_show() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    for name in ["One", "Two", "Three"] {
        engine.site(name).await;
    }
    let whole = sealed(&admin).await;
    assert_eq!((&whole["ok"], &whole["broken"]), (&json!(true), &Value::Null));
    assert!(whole["checked"].as_i64().is_some_and(|checked| checked >= 3), "{whole}");
    assert_eq!(whole["head"].as_str().map(str::len), Some(64));

    let (seq, event): (i64, i64) = sqlx::query_as(
        "SELECT c.seq, c.event_id FROM audit_chain c JOIN audit_events e ON e.id = c.event_id WHERE e.action = 'site.create' ORDER BY c.seq LIMIT 1",
    )
    .fetch_one(&engine.database.pool)
    .await
    .expect("the first site");
    let broken = async |seq: Option<i64>, why: &str, who: &str| {
        let report = admin.get("/api/audit/check").await.ok();
        assert_eq!(report["ok"], false, "{who}: {report}");
        assert_eq!((&report["broken"]["seq"], &report["broken"]["why"]), (&json!(seq), &json!(why)), "{who}");
    };
    let whole_again = async |what: &str| assert_eq!(admin.get("/api/audit/check").await.ok()["ok"], true, "{what}");

    for column in ["actor_name", "ip", "action", "object_id"] {
        engine.database.tamper(&format!("UPDATE audit_events SET {column} = {column} || 'x' WHERE id = {event}")).await;
        broken(Some(seq), "the event or its place was changed", column).await;
        engine.database.tamper(&format!("UPDATE audit_events SET {column} = left({column}, -1) WHERE id = {event}")).await;
        whole_again(column).await;
    }
    engine.database.tamper(&format!("UPDATE audit_events SET at = at - interval '1 day' WHERE id = {event}")).await;
    broken(Some(seq), "the event or its place was changed", "at").await;
    engine.database.tamper(&format!("UPDATE audit_events SET at = at + interval '1 day' WHERE id = {event}")).await;
    whole_again("at").await;

    // An event put in past the engine.
    let stray =
        "INSERT INTO audit_events (id, actor_kind, actor_id, actor_name, ip, action, object_kind, object_id, outcome, detail)
                 OVERRIDING SYSTEM VALUE VALUES (999999, 'system', '', '', '', 'site.create', 'site', '1', 'success', '{}')";
    engine.database.tamper(stray).await;
    broken(None, "the event is not part of the chain", "a stray event").await;
    engine.database.tamper("DELETE FROM audit_events WHERE id = 999999").await;
    whole_again("a stray event").await;

    engine.database.tamper(&format!("DELETE FROM audit_events WHERE id = {event}")).await;
    broken(Some(seq), "the event was removed", "an event").await;
    // With its link gone too, the next one shows it.
    engine.database.tamper(&format!("DELETE FROM audit_chain WHERE seq = {seq}")).await;
    broken(Some(seq + 1), "links before this one are missing", "a link").await;
    engine
        .database
        .tamper(&format!("UPDATE audit_chain SET seq = seq - 1 WHERE seq > {seq} AND seq <= (SELECT max(seq) FROM audit_chain)"))
        .await;
    broken(Some(seq), "the event or its place was changed", "a closed gap").await;
}

#[tokio::test]
async fn it_is_asked_by_who_what_when_and_page_by_page() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Oslo").await;
    for n in 0..5 {
        engine.site(&format!("Site {n}")).await;
    }
    let list =
        async |query: &str| admin.get(&format!("/api/audit?{query}")).await.ok()["events"].as_array().cloned().expect("events");
    let made = list("action=site.create").await;
    assert_eq!(made.len(), 6);
    assert!(made.iter().all(|event| event["action"] == "site.create" && event["outcome"] == "success"));
    assert_eq!(list("action=site.").await.len(), 6);
    assert!(list("action=%25").await.is_empty() && list("action=s_te").await.is_empty(), "no pattern from outside");
    assert_eq!(list(&format!("object_kind=site&object_id={site}")).await.len(), 1);
    assert_eq!(list(&format!("site_id={site}&action=site.create")).await.len(), 1);
    let name = made[0]["actor_name"].as_str().expect("a name").to_uppercase();
    assert_eq!(list(&format!("actor={name}&action=site.create")).await.len(), 6);
    assert!(list("actor=somebody-else").await.is_empty());
    assert!(list("action=site.create&outcome=failure").await.is_empty());
    assert!(list("to=2020-01-01T00:00:00Z").await.is_empty());
    assert_eq!(list("from=1577836800&action=site.create").await.len(), 6);

    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = admin.get(&format!("/api/audit?action=site.create&limit=2{cursor}")).await.ok();
        seen.extend(page["events"].as_array().expect("events").iter().map(|event| event["id"].as_i64().expect("an id")));
        let Some(next) = page["next_cursor"].as_i64() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, made.iter().map(|event| event["id"].as_i64().expect("an id")).collect::<Vec<_>>());

    for (query, code) in [
        ("limit=0", "invalid_limit"),
        ("limit=201", "invalid_limit"),
        ("format=xml", "invalid_format"),
        ("outcome=maybe", "invalid_outcome"),
        ("from=yesterday", "invalid_instant"),
    ] {
        let _ = admin.get(&format!("/api/audit?{query}")).await.error(400, code);
    }
    let _ = admin.get("/api/audit?colour=red").await.expect(400);
}

#[tokio::test]
async fn it_leaves_as_lines_and_as_a_table_and_says_so() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    engine.site("=HYPERLINK(\"http://evil\")").await;
    let reader = engine.operator(&[]).await;
    let _ = reader.get("/api/audit?format=csv").await.error(403, "forbidden");

    let reply = admin.send(admin.request(reqwest::Method::GET, "/api/audit?format=jsonl")).await.expect(200);
    assert_eq!(reply.header("content-disposition"), Some("attachment; filename=\"audit.jsonl\""));
    let lines: Vec<Value> = reply.text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert!(lines.iter().any(|event| event["action"] == "site.create"), "{}", reply.text);
    assert_eq!(lines.iter().filter(|event| event["action"] == "audit.export").count(), 1, "the export itself is there");

    let reply = admin.send(admin.request(reqwest::Method::GET, "/api/audit?format=csv&limit=1000")).await.expect(200);
    let mut table = csv::Reader::from_reader(reply.text.as_bytes());
    assert_eq!(table.headers().expect("a head").iter().take(3).collect::<Vec<_>>(), ["id", "at", "actor_kind"]);
    let rows: Vec<csv::StringRecord> = table.records().map(|row| row.expect("a row")).collect();
    assert_eq!(rows.len(), lines.len() + 1, "and the second export");
    for row in &rows {
        assert!(row.iter().all(|cell| !cell.starts_with(['=', '+', '-', '@'])), "a spreadsheet would run {row:?}");
    }
    // Nothing to tell: a head all the same, and an empty file.
    let none = "actor=somebody-else";
    let empty = admin.send(admin.request(reqwest::Method::GET, &format!("/api/audit?format=csv&{none}"))).await.expect(200);
    assert_eq!(empty.text.lines().count(), 1);
    let empty = admin.send(admin.request(reqwest::Method::GET, &format!("/api/audit?format=jsonl&{none}"))).await.expect(200);
    assert_eq!(empty.text, "");
}
