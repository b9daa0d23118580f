//! Script assemblies, seen from outside: what is accepted, what is refused and why, who may remove what.

use borealis_protocol::canonical;
use borealis_tests::{Actor, Reply, TestEngine};
use reqwest::Method;
use serde_json::{Value, json};

fn body(payload: Value) -> Value {
    json!({"domain": "user", "display_name": "Say hi", "payload": payload})
}

fn bash() -> Value {
    json!({"type": "bash", "script": "echo hi\n"})
}

async fn make(actor: &Actor, body: Value) -> (String, Value) {
    let made = actor.post("/api/assemblies", body).await.expect(201).body;
    (made["assembly_guid"].as_str().expect("a guid").to_owned(), made)
}

async fn put_if(actor: &Actor, guid: &str, hash: &str, change: Value) -> Reply {
    let request = actor.request(Method::PUT, &format!("/api/assemblies/{guid}")).header("If-Match", hash);
    actor.send(request.json(&change)).await
}

#[tokio::test]
async fn every_fault_of_a_document_is_named_and_stores_nothing() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let with = |key: &str, value: Value| {
        let mut document = bash();
        document[key] = value;
        document
    };
    for (payload, code, field) in [
        (json!([]), "invalid_payload", "payload"),
        (json!(true), "invalid_payload", "payload"),
        (json!(""), "invalid_payload", "payload.script"),
        (json!(" \n"), "invalid_payload", "payload.script"),
        (json!({"type": "bash"}), "invalid_payload", "payload.script"),
        (with("script", json!("  ")), "invalid_payload", "payload.script"),
        (with("script", json!("a\u{0}b")), "invalid_payload", "payload.script"),
        (with("script", json!(["a"])), "invalid_payload", "payload.script"),
        (with("script", json!("x".repeat((4 << 20) + 1))), "script_too_large", "payload.script"),
        (with("script_lines", json!("a")), "invalid_payload", "payload.script_lines"),
        (with("script_lines", json!(["a", 1])), "invalid_payload", "payload.script_lines"),
        (with("script_encoding", json!("rot13")), "invalid_payload", "payload.script_encoding"),
        (with("script_encoding", json!("base64")), "invalid_payload", "payload.script"),
        (with("type", json!("perl")), "unsupported_script_type", "payload.type"),
        (with("type", json!("ansible")), "unsupported_script_type", "payload.type"),
        (with("timeout_seconds", json!(-1)), "invalid_payload", "payload.timeout_seconds"),
        (with("timeout_seconds", json!(1.5)), "invalid_payload", "payload.timeout_seconds"),
        (with("timeout_seconds", json!("soon")), "invalid_payload", "payload.timeout_seconds"),
        (with("timeout_seconds", json!(i64::MAX)), "invalid_payload", "payload.timeout_seconds"),
        (with("variables", json!({})), "invalid_payload", "payload.variables"),
        (with("variables", json!([{"default": 1}])), "invalid_payload", "payload.variables[0]"),
        (
            with("variables", json!([{"name": "n", "type": "number", "default": "1; calc"}])),
            "invalid_payload",
            "payload.variables[0]",
        ),
        (
            with("variables", json!([{"name": "n", "type": "boolean", "default": "perhaps"}])),
            "invalid_payload",
            "payload.variables[0]",
        ),
        (with("variables", json!([{"name": "n", "default": {}}])), "invalid_payload", "payload.variables[0]"),
        (with("variables", json!(vec![json!({"name": "n"}); 201])), "invalid_payload", "payload.variables"),
        (with("files", json!({})), "invalid_payload", "payload.files"),
        (with("files", json!(vec![json!({}); 101])), "invalid_payload", "payload.files"),
    ] {
        let refused = operator.post("/api/assemblies", body(payload)).await.error(400, code);
        assert!(refused.body["fields"][field].is_string(), "{field}: {}", refused.text);
    }
    for (key, value, code) in [
        ("domain", json!("mine"), "invalid_domain"),
        ("assembly_type", json!("ansible"), "not_supported_yet"),
        ("assembly_type", json!("picture"), "invalid_assembly_type"),
        ("display_name", json!("x".repeat(201)), "invalid_field"),
        ("display_name", json!("a\u{7}b"), "invalid_field"),
        ("display_name", json!(5), "invalid_json"),
        ("summary", json!("x".repeat(4001)), "invalid_field"),
        ("source_path", json!("Scripts/../../etc/passwd"), "invalid_field"),
        ("colour", json!("red"), "invalid_json"),
        ("assembly_guid", json!("a/b"), "invalid_assembly_guid"),
        ("assembly_guid", json!(".."), "invalid_assembly_guid"),
        ("assembly_guid", json!("a b"), "invalid_assembly_guid"),
        ("assembly_guid", json!("a%2e"), "invalid_assembly_guid"),
        ("assembly_guid", json!("Import"), "invalid_assembly_guid"),
        ("assembly_guid", json!("x".repeat(201)), "invalid_assembly_guid"),
    ] {
        let mut whole = body(bash());
        whole[key] = value;
        let _ = operator.post("/api/assemblies", whole).await.error(400, code);
    }
    assert_eq!(operator.get("/api/assemblies").await.ok()["items"], json!([]), "nothing of it was stored");
}

#[tokio::test]
async fn a_guid_is_chosen_by_administrators_and_taken_once() {
    let engine = TestEngine::start().await;
    let (operator, admin) = (engine.operator(&[]).await, engine.admin().await);
    let mut mine = body(bash());
    mine["assembly_guid"] = json!("  Mine.1 ");
    let _ = operator.post("/api/assemblies", mine.clone()).await.error(403, "assembly_guid_forbidden");
    let post = || admin.post("/api/assemblies", mine.clone());
    let (one, two) = tokio::join!(post(), post());
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409], "{} {}", one.text, two.text);
    let refused = if one.status == 409 { one } else { two };
    let _ = refused.error(409, "assembly_exists");
    let kept = operator.get("/api/assemblies/mine.1").await.ok();
    assert_eq!((&kept["assembly_guid"], &kept["payload_json"]["assembly_guid"]), (&json!("mine.1"), &json!("mine.1")));
}

#[tokio::test]
async fn a_script_without_a_word_about_base64_is_stored_as_the_text_it_is() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    // As the editor of the reference's web client sends it, and a plain script that it would garble.
    for (sent, text) in [("ZWNobyBoaQo=", "echo hi\n"), ("hostname", "hostname"), ("\u{feff}set -e", "set -e")] {
        let (guid, made) = make(&operator, body(json!({"type": "bash", "script": sent}))).await;
        for answer in [made, operator.get(&format!("/api/assemblies/{guid}")).await.ok()] {
            let document = &answer["payload_json"];
            assert_eq!((&document["script"], &document["script_encoding"]), (&json!(text), &json!("plain")));
        }
        let change = json!({"payload": {"type": "bash", "script": sent}});
        let changed = operator.put(&format!("/api/assemblies/{guid}"), change).await.ok();
        assert_eq!(
            (&changed["payload_json"]["script"], &changed["payload_json"]["script_encoding"]),
            (&json!(text), &json!("plain"))
        );
    }
    let said = json!({"type": "bash", "script": "ZWNobyAxMjM0NTY3ODkK", "script_encoding": "plain"});
    let _ = operator.post("/api/assemblies", body(said)).await.error(400, "invalid_payload");
    let (_, made) = make(&operator, body(json!({"type": "bash", "script": "ZWNobyBoaQo=", "script_encoding": "base64"}))).await;
    assert_eq!(made["payload_json"]["script_encoding"], "base64", "who says so gets it back so");
}

#[tokio::test]
async fn the_hash_is_that_of_the_canonical_form_and_guards_changes() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let (guid, made) = make(&operator, body(bash())).await;
    let canonical_hash = |item: &Value| {
        canonical::sha256_hex(&canonical::to_bytes(&json!({
            "assembly_guid": item["assembly_guid"], "display_name": item["display_name"], "summary": "", "assembly_type": "script",
            "assembly_subtype": "bash", "payload": item["payload_json"],
        })))
    };
    assert_eq!(made["content_hash"], canonical_hash(&made));
    let before = made["content_hash"].as_str().expect("a hash").to_owned();

    let quoted = format!("\"{before}\"");
    let changed = put_if(&operator, &guid, &quoted, json!({"display_name": "Other"})).await.ok();
    assert_eq!(changed["content_hash"], canonical_hash(&changed));
    let stale = put_if(&operator, &guid, &quoted, json!({"display_name": "Third"})).await.error(409, "content_changed");
    assert_eq!(stale.body["content_hash"], changed["content_hash"]);
    let in_body = json!({"display_name": "Third", "content_hash": before});
    let _ = operator.put(&format!("/api/assemblies/{guid}"), in_body).await.error(409, "content_changed");
    let weak = format!("W/\"{}\"", changed["content_hash"].as_str().expect("a hash"));
    let _ = put_if(&operator, &guid, &weak, json!({"display_name": "Third"})).await.ok();
    let last = put_if(&operator, &guid, "*", json!({"summary": "s"})).await.ok();
    assert_eq!((&last["display_name"], &last["summary"]), (&json!("Third"), &json!("s")));

    for (change, code) in [
        (json!({"domain": "official"}), "invalid_domain"),
        (json!({"assembly_guid": "another"}), "invalid_assembly_guid"),
        (json!({"payload": {"type": "bash"}}), "invalid_payload"),
        (json!({"assembly_type": "workflow"}), "not_supported_yet"),
    ] {
        let _ = operator.put(&format!("/api/assemblies/{guid}"), change).await.error(400, code);
    }
    assert_eq!(operator.get(&format!("/api/assemblies/{guid}")).await.ok(), last, "what was refused changed nothing");
    let _ = operator.put("/api/assemblies/absent", json!({"summary": "s"})).await.error(404, "not found");
    let _ = operator.delete("/api/assemblies/absent").await.error(404, "not found");
}

#[tokio::test]
async fn text_is_kept_as_it_is_and_is_the_script() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let mut raw = body(json!("echo \"raw\"\r\n"));
    raw["assembly_subtype"] = json!("Bash");
    let (_, made) = make(&operator, raw).await;
    assert_eq!((&made["payload"], &made["payload_json"]), (&json!("echo \"raw\"\r\n"), &Value::Null));
    assert_eq!(made["assembly_subtype"], "bash");
}

#[tokio::test]
async fn a_list_has_pages() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    for name in ["beta", "Alpha", "gamma"] {
        let mut one = body(bash());
        one["display_name"] = json!(name);
        let _ = make(&operator, one).await;
    }
    let first = operator.get("/api/assemblies?limit=2&domain=nonsense").await.ok();
    let names = |page: &Value| -> Vec<String> {
        page["items"].as_array().expect("items").iter().map(|item| item["name"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(names(&first), ["Alpha", "beta"], "without regard to case; an unknown domain is no filter");
    let second = operator.get(&format!("/api/assemblies?limit=2&cursor={}", first["next_cursor"])).await.ok();
    assert_eq!((names(&second), &second["next_cursor"]), (vec!["gamma".to_owned()], &Value::Null));
    let whole = operator.get("/api/assemblies?limit=3").await.ok();
    assert_eq!(whole["next_cursor"], Value::Null, "a page that is just full is the last one");
    let _ = operator.get("/api/assemblies?limit=0").await.error(400, "invalid_limit");
    let _ = operator.get("/api/assemblies?limit=many").await.error(400, "invalid_query");
}

#[tokio::test]
async fn what_jobs_of_other_sites_use_is_not_an_operators_to_remove() {
    let engine = TestEngine::start().await;
    let (north, _) = engine.site("north").await;
    let (south, _) = engine.site("south").await;
    let (here, there) = (engine.device(north).await, engine.device(south).await);
    let (operator, neighbour) = (engine.operator(&[north]).await, engine.operator(&[south]).await);
    let admin = engine.admin().await;
    let (guid, made) = make(&operator, body(bash())).await;
    let later = json!({"type": "once", "start": "2090-01-01T00:00:00Z"});
    let job = |name: &str, component: Value, host: &str| json!({"name": name, "components": [component], "targets": [host], "schedule": later});
    let own = job("Own", json!({"assembly_guid": guid}), &here.hostname);
    let own = operator.post("/api/scheduled_jobs", own).await.ok()["job"]["id"].clone();
    // By its path, which keeps it in use as well.
    let by_path = job("Theirs", json!({"path": made["path"]}), &there.hostname);
    let theirs = neighbour.post("/api/scheduled_jobs", by_path).await.ok()["job"]["id"].clone();

    let path = format!("/api/assemblies/{guid}");
    let mut harm = body(bash());
    harm["payload"]["script"] = json!("echo harm");
    for change in [json!({"payload": harm["payload"]}), json!({"display_name": "Harm"})] {
        let refused = operator.put(&path, change).await.error(409, "assembly_in_use");
        assert!(!refused.text.contains("Theirs"), "{}", refused.text);
    }
    assert!(!operator.get(&path).await.text.contains("harm"));
    let refused = operator.delete(&path).await.error(409, "assembly_in_use");
    assert_eq!(refused.body["jobs"], json!([{"id": own, "name": "Own"}]), "jobs of other sites are not named");
    let refused = operator.delete(&format!("{path}?force=true")).await.error(409, "assembly_in_use");
    assert!(!refused.text.contains("Theirs"), "{}", refused.text);
    let _ = operator.get(&path).await.ok();
    let refused = admin.delete(&path).await.error(409, "assembly_in_use");
    assert_eq!(refused.body["jobs"], json!([{"id": own, "name": "Own"}, {"id": theirs, "name": "Theirs"}]));

    let _ = neighbour.delete(&format!("/api/scheduled_jobs/{theirs}")).await;
    let _ = operator.put(&path, json!({"summary": "own again"})).await.ok();
    let _ = operator.delete(&path).await.error(409, "assembly_in_use");
    let _ = operator.delete(&format!("{path}?force=perhaps")).await.error(400, "invalid_query");
    let gone = operator.delete(&format!("{path}?force=true")).await.expect(202);
    assert_eq!(gone.body, json!({"status": "queued"}));
    let _ = operator.get(&path).await.error(404, "not found");
}

#[tokio::test]
async fn changes_and_refusals_are_in_the_audit() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let (guid, _) = make(&operator, body(bash())).await;
    let _ = operator.put(&format!("/api/assemblies/{guid}"), json!({"summary": "s"})).await.ok();
    let _ = operator.delete(&format!("/api/assemblies/{guid}")).await.expect(202);
    for (actor, code) in [(&operator, "forbidden"), (&engine.admin().await, "dev_mode_required")] {
        let mut official = body(bash());
        official["domain"] = json!("official");
        let _ = actor.post("/api/assemblies", official).await.error(403, code);
    }
    let rows: Vec<(String, String, String)> = sqlx::query_as(
        "SELECT action, outcome, coalesce(detail ->> 'error', '') FROM audit_events WHERE object_kind = 'assembly' ORDER BY id",
    )
    .fetch_all(&engine.database.pool)
    .await
    .expect("the audit");
    let expected = [
        ("assembly.create", "success", ""),
        ("assembly.update", "success", ""),
        ("assembly.delete", "success", ""),
        ("assembly.create", "failure", "forbidden"),
        ("assembly.create", "failure", "dev_mode_required"),
    ];
    assert_eq!(rows, expected.map(|(action, outcome, error)| (action.to_owned(), outcome.to_owned(), error.to_owned())));
}

#[tokio::test]
async fn the_editor_of_existing_clients_saves_by_import_and_reads_by_export() {
    let engine = TestEngine::start().await;
    let (operator, admin) = (engine.operator(&[]).await, engine.admin().await);
    // As it sends them: base64, and nothing said about it.
    let document = |guid: &str, script: &str| {
        json!({"assembly_guid": guid, "name": "Say hi", "description": "Says hi.", "type": "bash", "script": script,
               "timeout_seconds": 60, "variables": [{"name": "who", "type": "string", "default": "me", "required": false}], "files": []})
    };
    let import = |actor: &Actor, document: Value| {
        let (actor, body) = (actor.clone(), json!({"document": document, "domain": "user"}));
        async move { actor.post("/api/assemblies/import", body).await }
    };
    let made = import(&operator, document("", "ZWNobyBoaQ==")).await.expect(201).body;
    assert_eq!((&made["name"], &made["description"], &made["queue"]), (&json!("Say hi"), &json!("Says hi."), &json!([])));
    let guid = made["assembly_guid"].as_str().expect("a guid");
    let exported = operator.get(&format!("/api/assemblies/{guid}/export")).await.ok();
    assert_eq!(
        exported,
        json!({"assembly_guid": guid, "name": "Say hi", "description": "Says hi.", "type": "bash", "script": "echo hi", "script_encoding": "plain",
               "timeout_seconds": 60, "variables": [{"name": "who", "type": "string", "default": "me", "required": false}], "files": []})
    );
    let again = import(&operator, document(guid, "ZWNobyBieWU=")).await.expect(201).body;
    assert_eq!((&again["assembly_guid"], &again["payload_json"]["script"]), (&json!(guid), &json!("echo bye")));
    let same = import(&operator, json!(operator.get(&format!("/api/assemblies/{guid}/export")).await.ok().to_string())).await;
    assert_eq!(same.expect(201).body["content_hash"], again["content_hash"], "what was exported is imported unchanged");

    // An id that is not there is an administrator's to choose.
    let other = import(&operator, document("chosen", "aWQ=")).await.expect(201).body;
    assert_ne!(other["assembly_guid"], "chosen");
    assert_eq!(import(&admin, document("chosen", "aWQ=")).await.expect(201).body["assembly_guid"], "chosen");
    for (document, code) in [
        (Value::Null, "missing_document"),
        (json!([]), "invalid_document"),
        (json!("no json"), "invalid_document"),
        (json!({"name": "x"}), "unknown_document_type"),
        (json!({"nodes": [], "edges": []}), "not_supported_yet"),
        (json!({"type": "ansible", "playbook": "x"}), "not_supported_yet"),
        (json!({"type": "bash", "script": ""}), "invalid_payload"),
    ] {
        let _ = import(&operator, document).await.error(400, code);
    }
    let _ = operator.get("/api/assemblies/absent/export").await.error(404, "not found");
}
