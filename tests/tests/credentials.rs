//! Stored credentials: what goes in never comes out, who sees which, and what a change leaves alone.

use borealis_tests::{Actor, TestEngine, engine::PASSWORD};
use serde_json::{Value, json};

/// Secrets nothing else in a database looks like.
const CANARIES: [&str; 4] = ["canary-password-5b1", "canary-key-5b2", "canary-passphrase-5b3", "canary-become-5b4"];

async fn stepped_up(engine: &TestEngine) -> Actor {
    let admin = engine.admin().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    admin
}

fn everything(name: &str) -> Value {
    json!({
        "name": name, "description": "for tests", "credential_type": "machine", "connection_type": "ssh", "username": "deploy",
        "password": CANARIES[0], "private_key": CANARIES[1], "private_key_passphrase": CANARIES[2], "become_method": "SUDO",
        "become_username": "root", "become_password": CANARIES[3], "metadata": {"note": "x", "aegis_secret_state": "mine"},
        "winrm_transport": "ntlm",
    })
}

async fn make(admin: &Actor, body: Value) -> i64 {
    admin.post("/api/credentials", body).await.ok()["credential"]["id"].as_i64().expect("an id")
}

#[tokio::test]
async fn a_secret_goes_in_and_never_comes_out() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    engine.age_step_ups().await;
    let _ = admin.post("/api/credentials", everything("Web")).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let made = admin.post("/api/credentials", everything("Web")).await.ok();
    assert_eq!(made["status"], "ok");
    let credential = &made["credential"];
    for field in ["has_password", "has_private_key", "has_private_key_passphrase", "has_become_password"] {
        assert_eq!(credential[field], true, "{field}");
    }
    assert_eq!(
        credential["metadata"],
        json!({"note": "x", "winrm_transport": "ntlm"}),
        "the engine's own keys are not a client's"
    );
    assert_eq!((&credential["become_method"], &credential["site_id"]), (&json!("sudo"), &Value::Null));
    assert_eq!((&credential["secret_reset_required"], &credential["lost_secret_fields"]), (&json!(false), &json!([])));
    let id = credential["id"].as_i64().expect("an id");
    let shown = [
        made.to_string(),
        admin.get("/api/credentials").await.ok().to_string(),
        admin.get(&format!("/api/credentials/{id}")).await.ok().to_string(),
        admin.get("/api/openapi.json").await.ok().to_string(),
    ];
    let mut tables = Vec::new();
    for table in ["credentials", "audit_events", "idempotency_keys"] {
        let rows: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT t::text FROM {table} t")))
            .fetch_all(&engine.database.pool)
            .await
            .expect("the rows");
        tables.extend(rows);
    }
    assert!(tables.iter().any(|row| row.contains("credential.create")), "the audit tells of it");
    for canary in CANARIES {
        assert!(shown.iter().chain(&tables).all(|text| !text.contains(canary)), "{canary} can be read");
    }
    // What is sealed for one row and column opens nowhere else: two equal secrets have nothing in common.
    let other = make(&admin, everything("Web 2")).await;
    let sealed: Vec<Option<String>> = sqlx::query_scalar("SELECT password_sealed FROM credentials WHERE id = ANY($1)")
        .bind([id, other])
        .fetch_all(&engine.database.pool)
        .await
        .expect("the rows");
    assert!(sealed.iter().flatten().all(|text| text.starts_with("aegis:v2:")) && sealed[0] != sealed[1], "{sealed:?}");
}

#[tokio::test]
async fn a_change_leaves_alone_what_it_does_not_name() {
    let engine = TestEngine::start().await;
    let admin = stepped_up(&engine).await;
    let id = make(&admin, everything("Web")).await;
    let path = format!("/api/credentials/{id}");
    let put = async |body: Value| admin.put(&path, body).await.ok()["credential"].clone();
    let sealed = async || -> (Option<String>, Option<String>) {
        sqlx::query_as("SELECT password_sealed, private_key_sealed FROM credentials WHERE id = $1")
            .bind(id)
            .fetch_one(&engine.database.pool)
            .await
            .expect("the row")
    };
    let before = sealed().await;
    let renamed = put(json!({"name": "Web server"})).await;
    assert_eq!(
        (&renamed["name"], &renamed["username"], &renamed["has_password"]),
        (&json!("Web server"), &json!("deploy"), &json!(true))
    );
    assert_eq!(sealed().await, before);
    assert_eq!(put(json!({"password": null})).await["has_password"], false, "null forgets");
    assert_eq!(put(json!({"private_key": ""})).await["has_private_key"], false, "empty forgets");
    assert_eq!(put(json!({"clear_become_password": true})).await["has_become_password"], false);
    let kept = put(json!({"private_key_passphrase": "new", "clear_private_key_passphrase": true})).await;
    assert_eq!(kept["has_private_key_passphrase"], true, "a value wins over the switch");
    assert_eq!(put(json!({"winrm_transport": ""})).await["metadata"], json!({"note": "x"}));
    assert_eq!(put(json!({"metadata_json": "{\"a\": 1}"})).await["metadata"], json!({"a": 1}));
    // A reset of the secret store left marks: they go with the last secret that is set again or given up.
    sqlx::query("UPDATE credentials SET lost_secret_fields = '{password,private_key}', reset_at = now() WHERE id = $1")
        .bind(id)
        .execute(&engine.database.pool)
        .await
        .expect("the marks");
    let marked = admin.get(&path).await.ok()["credential"].clone();
    assert_eq!(
        (&marked["secret_reset_required"], &marked["metadata"]["aegis_secret_state"]),
        (&json!(true), &json!("reset_required"))
    );
    assert_eq!(put(json!({"password": "again"})).await["lost_secret_fields"], json!(["private_key"]));
    let healed = put(json!({"clear_private_key": true})).await;
    assert_eq!((&healed["secret_reset_required"], &healed["reset_at"]), (&json!(false), &json!(0)));
}

#[tokio::test]
async fn bad_credentials_are_refused_by_name_and_change_nothing() {
    let engine = TestEngine::start().await;
    let admin = stepped_up(&engine).await;
    let id = make(&admin, everything("Web")).await;
    let with = |field: &str, value: Value| {
        let mut body = json!({"name": "Other"});
        body[field] = value;
        body
    };
    for (body, code, field) in [
        (json!({}), "name is required", "name"),
        (with("name", json!("  ")), "name is required", "name"),
        (with("credential_type", json!("robot")), "invalid credential_type", "credential_type"),
        (with("connection_type", json!("telnet")), "invalid connection_type", "connection_type"),
        (with("metadata", json!([1])), "metadata must be an object", "metadata"),
        (with("metadata_json", json!("{")), "metadata_json must be valid JSON", "metadata_json"),
        (with("site_id", json!(4711)), "site not found", "site_id"),
        (with("site_id", json!("x")), "site not found", "site_id"),
        (with("username", json!("x".repeat(257))), "invalid_field", "username"),
        (with("password", json!("x".repeat(65 * 1024))), "invalid_field", "password"),
    ] {
        let reply = admin.post("/api/credentials", body).await.error(400, code);
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
    let _ = admin.post("/api/credentials", with("typo", json!(1))).await.error(400, "invalid_json");
    let _ = admin.post("/api/credentials", everything("wEB")).await.error(409, "credential name already exists");
    let other = make(&admin, everything("Second")).await;
    let _ = admin
        .put(&format!("/api/credentials/{other}"), json!({"name": "web"}))
        .await
        .error(409, "credential name already exists");
    let _ = admin.put("/api/credentials/4711", json!({"name": "x"})).await.error(404, "credential not found");
    let _ = admin.get("/api/credentials/4711").await.error(404, "credential not found");
    let _ = admin.delete("/api/credentials/4711").await.error(404, "credential not found");
    let count: i64 =
        sqlx::query_scalar("SELECT count(*) FROM credentials").fetch_one(&engine.database.pool).await.expect("a count");
    assert_eq!(count, 2);

    // What a job uses stays, and so does the site of a credential.
    sqlx::query(
        "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, credential_id) VALUES ('Nightly', '[]', '[]', 'daily', $1)",
    )
    .bind(id)
    .execute(&engine.database.pool)
    .await
    .expect("a job");
    let path = format!("/api/credentials/{id}");
    let reply = admin.delete(&path).await.error(409, "credential_in_use");
    assert_eq!(reply.body["jobs"][0]["name"], "Nightly");
    let (site, _) = engine.site("Berlin").await;
    let _ = admin.put(&path, json!({"site_id": site})).await.ok();
    let reply = admin.post("/api/sites/delete", json!({"ids": [site]})).await.error(409, "site_in_use");
    assert_eq!(reply.body["credentials"][0]["id"], id);
    sqlx::query("DELETE FROM scheduled_jobs").execute(&engine.database.pool).await.expect("no job");
    assert_eq!(admin.delete(&path).await.ok(), json!({"status": "ok"}));
    let _ = admin.post("/api/sites/delete", json!({"ids": [site]})).await.ok();
}

#[tokio::test]
async fn operators_see_the_credentials_of_their_sites_and_of_every_site() {
    let engine = TestEngine::start().await;
    let admin = stepped_up(&engine).await;
    let (berlin, _) = engine.site("Berlin").await;
    let (paris, _) = engine.site("Paris").await;
    let ours = make(&admin, json!({"name": "berlin", "site_id": berlin})).await;
    let theirs = make(&admin, json!({"name": "Paris", "site_id": paris.to_string()})).await;
    let _ = make(&admin, json!({"name": "all", "site_id": 0})).await;
    let names = async |actor: &Actor| -> Vec<String> {
        let list = actor.get("/api/credentials").await.ok();
        list["credentials"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|row| row["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    assert_eq!(names(&admin).await, ["all", "berlin", "Paris"]);
    let operator = engine.operator(&[berlin]).await;
    assert_eq!(names(&operator).await, ["all", "berlin"]);
    assert_eq!(operator.get(&format!("/api/credentials/{ours}")).await.ok()["credential"]["site_name"], "Berlin");
    let foreign = operator.get(&format!("/api/credentials/{theirs}")).await.error(404, "credential not found");
    let absent = operator.get("/api/credentials/4711").await.error(404, "credential not found");
    assert_eq!(foreign.body["message"], absent.body["message"]);
    for reply in [
        operator.post("/api/credentials", json!({"name": "x"})).await,
        operator.put(&format!("/api/credentials/{ours}"), json!({"name": "x"})).await,
        operator.delete(&format!("/api/credentials/{ours}")).await,
    ] {
        let _ = reply.error(403, "forbidden");
    }
}
