//! The audit: who reads what of it, how it leaves the house, and that nobody changes it unnoticed.

use std::time::Duration;

use borealis_tests::{Actor, TestEngine};
use serde_json::{Value, json};

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
