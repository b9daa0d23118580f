//! The list of devices as clients ask for it: searched, ordered, a few fields only, what has changed, compressed.

use std::io::Read as _;

use borealis_tests::{Actor, engine::TestEngine};
use serde_json::{Value, json};

fn hostnames(page: &Value) -> Vec<&str> {
    let devices = page["devices"].as_array().unwrap_or_else(|| panic!("no devices in {page}"));
    devices.iter().map(|device| device["hostname"].as_str().unwrap_or_default()).collect()
}

async fn list(actor: &Actor, query: &str) -> Value {
    actor.get(&format!("/api/devices?slim=1&{query}")).await.ok()
}

async fn change(engine: &TestEngine, sql: &'static str) {
    let done = sqlx::query(sql).execute(&engine.database.pool).await.expect("an update");
    assert!(done.rows_affected() > 0, "{sql}");
}

#[tokio::test]
async fn devices_are_searched_and_ordered_page_by_page() {
    let engine = TestEngine::start().await;
    let ((north, _), (south, _)) = (engine.site("north").await, engine.site("south").await);
    for name in ["web-1", "db_1", "WEB-2", "dbx1", "Ölmühle"] {
        let _ = engine.device_named(north, name).await;
    }
    let _ = engine.device_named(south, "web-3").await;
    let admin = engine.admin().await;
    let operator = engine.operator(&[north]).await;
    change(
        &engine,
        "UPDATE devices SET description = 'the Web server of sales: 50%', last_user = 'ANNE' WHERE hostname = 'dbx1'",
    )
    .await;

    assert_eq!(
        hostnames(&list(&admin, "q=web").await),
        ["dbx1", "web-1", "WEB-2", "web-3"],
        "also in a description, in any case"
    );
    assert_eq!(hostnames(&list(&operator, "q=web").await), ["dbx1", "web-1", "WEB-2"], "in the caller's sites");
    // What means something to the database means nothing here.
    assert_eq!(hostnames(&list(&admin, "q=db_1").await), ["db_1"]);
    assert_eq!(hostnames(&list(&admin, "q=%25").await), ["dbx1"]);
    assert_eq!(hostnames(&list(&admin, "q=%5C").await), [""; 0]);
    assert_eq!(hostnames(&list(&admin, "q=anne").await), ["dbx1"]);
    assert_eq!(hostnames(&list(&admin, "q=%C3%B6LM").await), ["Ölmühle"], "hostnames are folded as names are");
    let guid = list(&admin, "hostname=web-3").await["devices"][0]["guid"].as_str().expect("a GUID").to_owned();
    assert_eq!(hostnames(&list(&admin, &format!("q={guid}")).await), ["web-3"]);

    // Every order, whole and in pages of two, which together are the same.
    change(&engine, "UPDATE devices SET last_seen = now() - interval '1 hour' WHERE hostname = 'web-1'").await;
    change(&engine, "UPDATE devices SET last_seen = NULL WHERE hostname = 'db_1'").await;
    let by_name = ["db_1", "dbx1", "web-1", "WEB-2", "web-3", "Ölmühle"];
    let by_age = ["web-1", "db_1", "WEB-2", "dbx1", "Ölmühle", "web-3"];
    for (sort, expected) in [("hostname", by_name), ("created_at", by_age)] {
        for (prefix, expected) in [("", expected.to_vec()), ("-", expected.into_iter().rev().collect())] {
            let whole = list(&admin, &format!("sort={prefix}{sort}")).await;
            assert_eq!((hostnames(&whole), &whole["next_cursor"]), (expected.clone(), &Value::Null), "{prefix}{sort}");
            let (mut found, mut cursor) = (Vec::new(), String::new());
            loop {
                let page = list(&admin, &format!("sort={prefix}{sort}&limit=2{cursor}")).await;
                found.extend(hostnames(&page).into_iter().map(str::to_owned));
                let Some(next) = page["next_cursor"].as_str() else { break };
                cursor = format!("&cursor={next}");
            }
            assert_eq!(found, expected, "{prefix}{sort} in pages");
            if !cursor.is_empty() {
                let other = if prefix.is_empty() { "-" } else { "" };
                let path = format!("/api/devices?sort={other}{sort}{cursor}");
                let _ = admin.get(&path).await.error(400, "invalid_cursor");
            }
        }
    }
    let latest = list(&admin, "sort=-last_seen&limit=5").await;
    assert_eq!((hostnames(&latest)[4], &latest["next_cursor"]), ("web-1", &Value::Null), "one page, those never seen last");
    assert_eq!(hostnames(&list(&admin, "sort=last_seen&limit=2").await), ["db_1", "web-1"]);

    for (query, code) in [
        ("sort=name", "invalid_sort"),
        ("fields=hostname,nothing", "invalid_fields"),
        ("changed_after=yesterday", "invalid_instant"),
        ("changed_after=99999999999999", "invalid_instant"),
        ("sort=last_seen&cursor=aGVsbG8", "invalid_cursor"),
        ("limit=0", "invalid_limit"),
    ] {
        let _ = admin.get(&format!("/api/devices?{query}")).await.error(400, code);
    }
    let _ = admin.get(&format!("/api/devices?q={}", "x".repeat(201))).await.error(400, "invalid_search");
}

#[tokio::test]
async fn a_client_that_keeps_a_copy_asks_for_what_has_changed() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    for name in ["one", "two", "three"] {
        let _ = engine.device_named(north, name).await;
    }
    let admin = engine.admin().await;
    change(&engine, "UPDATE devices SET changed_at = now() - interval '1 hour'").await;
    let copy = list(&admin, "").await;
    let since = copy["as_of"].as_i64().expect("an instant");
    let changed = async || list(&admin, &format!("changed_after={since}")).await;
    // What every heartbeat changes is no change; a name is, and so is a site.
    change(&engine, "UPDATE devices SET last_seen = now(), uptime = 5, cpu_percent = 7, memory_percent = 8").await;
    assert_eq!(hostnames(&changed().await), [""; 0]);
    change(&engine, "UPDATE devices SET last_user = 'root' WHERE hostname = 'two'").await;
    assert_eq!(hostnames(&changed().await), ["two"]);
    change(&engine, "UPDATE devices SET site_id = NULL WHERE hostname = 'three'").await;
    assert_eq!(hostnames(&changed().await), ["three", "two"]);
    assert_eq!(hostnames(&list(&admin, "changed_after=2020-01-01T00:00:00Z").await).len(), 3);
    assert_eq!(hostnames(&list(&admin, "changed_after=9000-01-01T00:00:00Z").await).len(), 0);
}

#[tokio::test]
async fn a_list_has_the_fields_that_are_asked_for_and_is_compressed() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    for number in 0..30 {
        let _ = engine.device_named(north, &format!("host-{number:02}")).await;
    }
    let admin = engine.admin().await;
    let few = admin.get("/api/devices?fields=status,hostname&limit=1").await.ok();
    assert_eq!(few["devices"][0], json!({"status": "Online", "hostname": "host-00"}));
    let documents = admin.get("/api/devices?fields=guid,software&limit=1").await.ok();
    assert_eq!(documents["devices"][0]["software"], json!([]));
    assert_eq!(admin.get("/api/devices?fields=&limit=1").await.ok()["devices"][0]["memory"], json!([]), "empty is not given");

    let get = async |encoding: &str| {
        let request = admin.request(reqwest::Method::GET, "/api/devices?slim=1").header("Accept-Encoding", encoding);
        let response = request.send().await.expect("an answer");
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
        let (coding, vary, kind) = (header("content-encoding"), header("vary"), header("content-type"));
        assert_eq!(kind.as_deref(), Some("application/json"));
        assert!(vary.is_some_and(|vary| vary.contains("accept-encoding")));
        (coding, response.bytes().await.expect("a body"))
    };
    let (coding, plain) = get("identity").await;
    assert_eq!(coding, None);
    let (coding, packed) = get("br, gzip").await;
    assert_eq!(coding.as_deref(), Some("gzip"));
    assert!(packed.len() * 5 < plain.len(), "{} of {}", packed.len(), plain.len());
    let mut text = String::new();
    let _ = flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut text).expect("gzip");
    let (mut one, mut other): (Value, Value) =
        (serde_json::from_str(&text).expect("JSON"), serde_json::from_slice(&plain).expect("JSON"));
    (one["as_of"], other["as_of"]) = (json!(0), json!(0));
    assert_eq!(one, other);
}
