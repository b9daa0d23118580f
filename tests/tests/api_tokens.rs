//! API tokens: what a program may do in the name of its owner, what it never may, and when that ends.

use std::{collections::BTreeMap, time::Duration};

use borealis_api::access::Class;
use borealis_engine::access::api_tokens::TokenScope;
use borealis_tests::{
    Actor, TestEngine,
    actor::Credential,
    agent,
    engine::{ADMIN, PASSWORD},
    eventually, totp,
};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

const ALL: [&str; 5] = ["read", "assemblies:write", "devices:write", "jobs:write", "sites:write"];

/// Routes that change nothing, and take what is asked as a body.
const READ_BY_POST: [&str; 2] = ["POST /api/scheduled_jobs/preview", "POST /api/user_site_assignments/selection"];

/// Routes of operators no API token gets into, whatever its scopes, as no scope has their permission.
const CLOSED: [&str; 39] = [
    "DELETE /api/auth/passkeys/{id}",
    "DELETE /api/auth/sessions",
    "DELETE /api/auth/sessions/{id}",
    "DELETE /api/auth/tokens/{id}",
    "DELETE /api/credentials/{id}",
    "DELETE /api/directory/providers/{id}",
    "DELETE /api/users/{username}",
    "DELETE /api/users/{username}/tokens/{id}",
    "GET /api/aegis/status",
    "GET /api/auth/mfa/recovery-codes",
    "GET /api/auth/passkeys",
    "GET /api/auth/sessions",
    "GET /api/auth/tokens",
    "GET /api/users/{username}/tokens",
    "PATCH /api/auth/passkeys/{id}",
    "PATCH /api/directory/providers/{id}",
    "POST /api/aegis/force_reset",
    "POST /api/aegis/rotate",
    "POST /api/auth/mfa/recovery-codes",
    "POST /api/auth/mfa/reset",
    "POST /api/auth/passkeys/register/options",
    "POST /api/auth/passkeys/register/verify",
    "POST /api/auth/password/reset",
    "POST /api/auth/step-up",
    "POST /api/auth/tokens",
    "POST /api/credentials",
    "POST /api/directory/providers",
    "POST /api/directory/providers/certificate",
    "POST /api/directory/providers/{id}/lookup-user",
    "POST /api/directory/providers/{id}/sync",
    "POST /api/directory/providers/{id}/test",
    "POST /api/github/token",
    "POST /api/user_site_assignments/assign",
    "POST /api/users",
    "POST /api/users/{username}/directory-cache",
    "POST /api/users/{username}/mfa",
    "POST /api/users/{username}/reset_password",
    "POST /api/users/{username}/role",
    "PUT /api/credentials/{id}",
];

fn bearer(actor: &Actor) -> &str {
    let Credential::Bearer(token) = &actor.credential else { panic!("{} has no token", actor.name) };
    token
}

async fn step_up(owner: &Actor) {
    let _ = owner.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
}

/// A program of `owner`, who has just stepped up, and the answer that gave its token.
async fn program(owner: &Actor, scopes: &[&str]) -> (Actor, Value) {
    let body = json!({"name": format!("for {}", scopes.join(" ")), "scopes": scopes});
    let made = owner.post("/api/auth/tokens", body).await.expect(201).body;
    let token = made["token"].as_str().unwrap_or_else(|| panic!("no token in {made}")).to_owned();
    let name = format!("a program of {} with {}", owner.name, scopes.join(" "));
    (Actor { name, credential: Credential::Bearer(token), ..owner.clone() }, made)
}

async fn run(engine: &TestEngine, sql: &'static str) {
    let _ = sqlx::query(sql).execute(&engine.database.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

async fn count(engine: &TestEngine) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM api_tokens").fetch_one(&engine.database.pool).await.expect("a count")
}

#[tokio::test]
async fn it_is_told_once_used_listed_and_revoked() {
    let engine = TestEngine::start().await;
    let owner = engine.operator(&[]).await;
    step_up(&owner).await;
    let body = json!({"name": " Nightly report ", "scopes": ["jobs:write", "read", "read"], "expires_in_days": 7});
    let made = owner.post("/api/auth/tokens", body).await.expect(201).body;
    let token = made["token"].as_str().expect("a token").to_owned();
    assert!(token.starts_with("brl_") && token.len() == 47, "{token}");
    let program = Actor { credential: Credential::Bearer(token.clone()), ..owner.clone() };
    assert_eq!(program.get("/api/auth/me").await.ok()["username"], owner.name);

    let reply = owner.get("/api/auth/tokens").await.expect(200);
    assert!(!reply.text.contains(&token), "told once");
    let listed = &reply.body["tokens"][0];
    assert_eq!(listed["name"], "Nightly report");
    assert_eq!(listed["hint"], token[token.len() - 4..]);
    assert_eq!(listed["scopes"], json!(["read", "jobs:write"]));
    assert_eq!(listed["last_used_ip"], "127.0.0.1");
    let time = |name: &str| listed[name].as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok()).expect(name);
    assert_eq!((time("expires_at") - time("created_at")).num_days(), 7);
    assert!((Utc::now() - time("last_used_at")).num_seconds() < 60);
    let unused = program_default_life(&owner).await;
    assert_eq!((unused.0, &unused.1), (90, &Value::Null));

    // The database and the audit know it by its hash and name only.
    for table in ["api_tokens", "audit_events"] {
        let sql = sqlx::AssertSqlSafe(format!("SELECT t::text FROM {table} t"));
        let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&engine.database.pool).await.expect("rows");
        assert!(!rows.is_empty() && rows.iter().all(|row| !row.contains(&token)), "{table}");
    }

    // Nobody else's to revoke.
    let at = format!("/api/auth/tokens/{}", made["id"].as_str().expect("an id"));
    let _ = engine.admin().await.delete(&at).await.error(404, "token_not_found");
    let _ = owner.delete(&format!("/api/auth/tokens/{}", Uuid::new_v4())).await.error(404, "token_not_found");
    let _ = program.get("/api/auth/me").await.ok();
    let _ = owner.delete(&at).await.ok();
    let _ = program.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = owner.delete(&at).await.error(404, "token_not_found");

    let events = engine.admin().await.get("/api/audit?action=token.").await.ok();
    let events = events["events"].as_array().expect("events");
    assert_eq!(events.iter().map(|event| &event["action"]).collect::<Vec<_>>(), ["token.revoke", "token.create", "token.create"]);
    for event in [&events[0], &events[2]] {
        assert_eq!((&event["actor_name"], &event["object_id"]), (&json!(owner.name), &made["id"]));
        assert_eq!((&event["detail"]["name"], &event["detail"]["hint"]), (&json!("Nightly report"), &made["hint"]));
    }
    assert_eq!(events[2]["detail"]["scopes"], json!(["read", "jobs:write"]));
}

/// The days a token lives whose maker does not say, and its last use.
async fn program_default_life(owner: &Actor) -> (i64, Value) {
    let (_, made) = program(owner, &["read"]).await;
    let time = |name: &str| made[name].as_str().and_then(|text| text.parse::<DateTime<Utc>>().ok()).expect(name);
    ((time("expires_at") - time("created_at")).num_days(), made["last_used_at"].clone())
}

#[tokio::test]
async fn what_is_asked_for_has_bounds() {
    let engine = TestEngine::start().await;
    let owner = engine.operator(&[]).await;
    let good = json!({"name": "A program", "scopes": ["read"]});
    engine.age_step_ups().await;
    let _ = owner.post("/api/auth/tokens", good.clone()).await.error(403, "step_up_required");
    step_up(&owner).await;
    for (field, value, code) in [
        ("name", json!(" "), "name_required"),
        ("name", json!("x".repeat(81)), "invalid_name"),
        ("name", json!("a\nb"), "invalid_name"),
        ("scopes", json!([]), "invalid_scope"),
        ("scopes", json!(["read", "everything"]), "invalid_scope"),
        ("expires_in_days", json!(0), "invalid_expiry"),
        ("expires_in_days", json!(367), "invalid_expiry"),
        ("expires_in_days", json!(i64::MAX), "invalid_expiry"),
        ("scopes", json!("read"), "invalid_json"),
        ("expires_at", json!("2100-01-01T00:00:00Z"), "invalid_json"),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let reply = owner.post("/api/auth/tokens", body).await.error(400, code);
        assert!(code == "invalid_json" || reply.body["fields"][field].is_string(), "{}", reply.text);
        assert!(code != "invalid_scope" || reply.body["known"] == json!(ALL), "{}", reply.text);
    }
    let _ = owner.post("/api/auth/tokens", json!({"scopes": ["read"]})).await.error(400, "name_required");
    assert_eq!(count(&engine).await, 0);

    for _ in 0..50 {
        let _ = owner.post("/api/auth/tokens", good.clone()).await.expect(201);
    }
    let _ = owner.post("/api/auth/tokens", good.clone()).await.error(409, "too_many_tokens");
    // Others have their own fifty, and what has expired does not count.
    let other = engine.operator(&[]).await;
    step_up(&other).await;
    let _ = other.post("/api/auth/tokens", good.clone()).await.expect(201);
    run(
        &engine,
        "UPDATE api_tokens SET created_at = now() - interval '9 days', expires_at = now() - interval '1 s'
         WHERE id = (SELECT min(id::text)::uuid FROM api_tokens)",
    )
    .await;
    let _ = owner.post("/api/auth/tokens", good).await.expect(201);
    // The database knows the same scopes.
    let refused = sqlx::query("UPDATE api_tokens SET scopes = '{everything}'").execute(&engine.database.pool).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("api_tokens_scopes_check")));
}

#[tokio::test]
async fn every_route_asks_for_one_scope_or_for_a_person() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    step_up(&admin).await;
    assert_eq!(TokenScope::ALL.map(TokenScope::as_str), ALL);
    let (everything, _) = program(&admin, &ALL).await;
    let (mut only, mut without) = (BTreeMap::new(), BTreeMap::new());
    for scope in ALL {
        only.insert(scope, program(&admin, &[scope]).await.0);
        let others: Vec<&str> = ALL.into_iter().filter(|other| *other != scope).collect();
        without.insert(scope, program(&admin, &others).await.0);
    }
    let (_, document, table) = borealis_api::app::build(&engine.app);
    let document = serde_json::to_value(document).expect("JSON");
    let (mut closed, mut used) = (Vec::new(), BTreeMap::<&str, usize>::new());
    for entry in &table {
        let (method, route) = (entry.method.as_str(), format!("{} {}", entry.method, entry.path));
        let path: Vec<&str> = entry.path.split('/').map(|part| if part.starts_with('{') { "0" } else { part }).collect();
        let path = path.join("/");
        let operation = &document["paths"][&entry.path][method.to_lowercase()];
        let told = operation["security"].as_array().expect("security").iter().find_map(|one| one.get("api_token"));
        assert_eq!(told, entry.token_scope.map(|scope| json!([scope])).as_ref(), "{route}: the document");
        match (entry.class, entry.token_scope) {
            (Class::Anonymous, scope) => assert_eq!(scope, None, "{route}"),
            (Class::Device, scope) => {
                assert_eq!(scope, None, "{route}");
                let _ = everything.call(method, &path, Some(&json!({}))).await.expect(401);
            }
            (Class::Operator | Class::Admin, None) => {
                closed.push(route);
                let _ = everything.call(method, &path, None).await.error(403, "session_required");
            }
            (Class::Operator | Class::Admin, Some(scope)) => {
                let reads = method == "GET" || READ_BY_POST.contains(&route.as_str());
                assert_eq!(scope == TokenScope::Read, reads, "{route}: reading needs read, and nothing else does");
                let scope = scope.as_str();
                *used.entry(scope).or_default() += 1;
                let reply = without[scope].call(method, &path, None).await.error(403, "insufficient_scope");
                assert!(reply.body["scope"] == scope && reply.body["message"].as_str().is_some_and(|text| text.contains(scope)));
                let reply = only[scope].call(method, &path, None).await;
                assert!(![401, 403].contains(&reply.status), "{route} with {scope}: {}", reply.text);
            }
        }
    }
    closed.sort();
    assert_eq!(closed, CLOSED);
    assert_eq!(used.keys().copied().collect::<Vec<_>>(), {
        let mut all = ALL;
        all.sort_unstable();
        all
    });

    // HEAD is reading.
    let _ = only["read"].call("HEAD", "/api/sites", None).await.expect(200);
    let _ = only["sites:write"].call("HEAD", "/api/sites", None).await.expect(403);
    // A scope gives nothing its owner has not.
    let user = engine.operator(&[]).await;
    step_up(&user).await;
    let (program, _) = program(&user, &ALL).await;
    let _ = program.post("/api/sites", json!({"name": "Mine"})).await.error(403, "forbidden");
    let _ = program.get("/api/audit").await.error(403, "forbidden");
    assert_eq!(admin.get("/api/sites").await.ok()["sites"].as_array().map(Vec::len), Some(0), "nothing was made on the way");
}

#[tokio::test]
async fn it_never_stands_for_a_person() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    step_up(&admin).await;
    let (program, _) = program(&admin, &ALL).await;
    // Where a person would have to step up, though the owner has just done so.
    let hosts: Vec<String> = (0..51).map(|n| format!("host-{n}")).collect();
    let quick = json!({"assembly_guid": Uuid::new_v4(), "hostnames": hosts});
    let _ = program.post("/api/scripts/quick_run", quick).await.error(403, "session_required");
    let _ = program.post("/api/auth/step-up", json!({"password": PASSWORD})).await.error(403, "session_required");
    // Not by cookie, and not over a socket.
    let _ = program.as_browser().get("/api/auth/me").await.error(401, "unauthorized");
    let authorization = format!("Bearer {}", bearer(&program));
    assert_eq!(agent::open(engine.addr, "/socket.io/", &[("authorization", &authorization)]).await.err(), Some(401));
    // Signing out ends sessions.
    let _ = program.post("/api/auth/logout", json!({})).await.ok();
    let _ = program.get("/api/auth/me").await.ok();
    let _ = admin.get("/api/auth/me").await.ok();
    // What is nearly a token is none.
    let token = bearer(&program);
    for wrong in [token[..token.len() - 1].to_owned(), token[4..].to_owned(), token.replace("brl_", "BRL_"), format!("{token}A")]
    {
        let wrong = Actor { credential: Credential::Bearer(wrong), ..program.clone() };
        let _ = wrong.get("/api/auth/me").await.error(401, "unauthorized");
    }
}

#[tokio::test]
async fn it_does_what_its_owner_may_at_that_moment() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (here, _) = engine.site("Here").await;
    let (there, _) = engine.site("There").await;
    let (near, far) = (engine.device(here).await, engine.device(there).await);
    let owner = engine.operator(&[here]).await;
    step_up(&owner).await;
    let (program, _) = program(&owner, &ALL).await;
    let sees = async |guid: &str| program.get(&format!("/api/devices/{guid}")).await.status;
    assert_eq!((sees(&near.guid).await, sees(&far.guid).await), (200, 404));
    let assign = async |sites: &[i64]| {
        let body = json!({"usernames": [owner.name], "site_ids": sites});
        let _ = admin.post("/api/user_site_assignments/assign", body).await.ok();
    };
    assign(&[there]).await;
    assert_eq!((sees(&near.guid).await, sees(&far.guid).await), (404, 200));
    assign(&[]).await;
    assert_eq!(program.get("/api/sites").await.ok()["sites"], json!([]));

    let role = async |role: &str| {
        let _ = admin.post(&format!("/api/users/{}/role", owner.name), json!({"role": role})).await.ok();
    };
    step_up(&admin).await;
    role("Admin").await;
    assert_eq!((sees(&near.guid).await, sees(&far.guid).await), (200, 200));
    let made = program.post("/api/sites", json!({"name": "By a program"})).await.expect(201).body;
    role("User").await;
    let _ = program.post("/api/sites", json!({"name": "Once more"})).await.error(403, "forbidden");

    // Whoever reads the audit sees that it was the program.
    let token = owner.get("/api/auth/tokens").await.ok()["tokens"][0].clone();
    let events = admin.get(&format!("/api/audit?action=site.create&object_id={}", made["id"])).await.ok();
    let event = &events["events"][0];
    assert_eq!((&event["actor_kind"], &event["actor_name"]), (&json!("operator"), &json!(owner.name)));
    assert_eq!(event["detail"]["api_token"], json!({"id": token["id"], "name": token["name"]}));
    let events = admin.get("/api/audit?action=user.role").await.ok();
    assert_eq!(events["events"][0]["detail"].get("api_token"), None, "a person did this");
}

#[tokio::test]
async fn it_ends_at_once() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    step_up(&admin).await;
    let owner = engine.operator(&[]).await;
    step_up(&owner).await;
    let (program_of_owner, made) = program(&owner, &["read"]).await;
    let lives = async || {
        let _ = program_of_owner.get("/api/auth/me").await.ok();
    };
    let ended = async || {
        let _ = program_of_owner.get("/api/auth/me").await.error(401, "unauthorized");
    };
    lives().await;

    // While its owner may not sign in.
    for (away, back) in [
        (
            "UPDATE users SET auth_source = 'directory', directory_disabled = true WHERE role = 'User'",
            "UPDATE users SET auth_source = 'local', directory_disabled = false WHERE role = 'User'",
        ),
        (
            "UPDATE users SET auth_reset_required = true WHERE role = 'User'",
            "UPDATE users SET auth_reset_required = false WHERE role = 'User'",
        ),
    ] {
        run(&engine, away).await;
        ended().await;
        run(&engine, back).await;
        lives().await;
    }
    run(&engine, "UPDATE users SET password_change_required = true WHERE role = 'User'").await;
    let _ = program_of_owner.get("/api/sites").await.error(403, "password_change_required");
    run(&engine, "UPDATE users SET password_change_required = false WHERE role = 'User'").await;

    // Its time is over: it is listed for a while, then not.
    run(&engine, "UPDATE api_tokens SET created_at = now() - interval '1 day', expires_at = now() - interval '1 ms'").await;
    ended().await;
    assert_eq!(owner.get("/api/auth/tokens").await.ok()["tokens"][0]["id"], made["id"]);
    run(&engine, "UPDATE api_tokens SET created_at = now() - interval '40 days', expires_at = now() - interval '31 days'").await;
    assert_eq!(owner.get("/api/auth/tokens").await.ok()["tokens"], json!([]));
    run(&engine, "UPDATE api_tokens SET expires_at = now() + interval '1 day'").await;
    lives().await;

    // Its owner's sessions are another matter.
    let _ = owner.post("/api/auth/logout", json!({})).await.ok();
    lives().await;

    // An administrator sees and revokes it.
    let at = format!("/api/users/{}/tokens", owner.name.to_uppercase());
    let listed = admin.get(&at).await.expect(200);
    assert_eq!(listed.body["tokens"][0]["id"], made["id"]);
    assert!(!listed.text.contains(bearer(&program_of_owner)));
    let _ = admin.get("/api/users/nobody/tokens").await.error(404, "user not found");
    let one = format!("{at}/{}", made["id"].as_str().expect("an id"));
    let _ = admin.delete(&one.replace(&owner.name.to_uppercase(), ADMIN)).await.error(404, "token_not_found");
    let _ = admin.delete(&one.replace(&owner.name.to_uppercase(), "nobody")).await.error(404, "user not found");
    lives().await;
    let _ = admin.delete(&one).await.ok();
    ended().await;
    let _ = admin.delete(&one).await.error(404, "token_not_found");
    let event = admin.get("/api/audit?action=token.revoke").await.ok()["events"][0].clone();
    assert_eq!((&event["actor_name"], &event["detail"]["username"]), (&json!(ADMIN), &json!(owner.name)));

    // An administrator sets the password, or removes the account.
    for end in ["reset_password", "delete"] {
        let owner = engine.operator(&[]).await;
        step_up(&owner).await;
        let (program, _) = program(&owner, &["read"]).await;
        let _ = program.get("/api/auth/me").await.ok();
        let at = format!("/api/users/{}", owner.name);
        let _ = match end {
            "delete" => admin.delete(&at).await.ok(),
            _ => admin.post(&format!("{at}/{end}"), json!({"password": PASSWORD})).await.ok(),
        };
        let _ = program.get("/api/auth/me").await.error(401, "unauthorized");
        assert_eq!(count(&engine).await, 0, "{end}");
    }
}

#[tokio::test]
async fn it_ends_with_the_recovery_of_its_owner() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    step_up(&admin).await;
    let (program, _) = program(&admin, &["read"]).await;
    let _ = program.get("/api/auth/me").await.ok();
    run(&engine, "UPDATE users SET auth_reset_required = true").await;
    let _ = program.get("/api/auth/me").await.error(401, "unauthorized");
    let nobody = engine.anonymous();
    let body = json!({"username": ADMIN, "password": "an entirely new passphrase"});
    let pending = nobody.post("/api/bootstrap/admin/recover", body).await.ok();
    let code = totp::code(pending["secret"].as_str().expect("a secret"), 0);
    let verify = json!({"pending_token": pending["pending_token"], "code": code});
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", verify).await.ok();
    let _ = program.get("/api/auth/me").await.error(401, "unauthorized");
    assert_eq!(count(&engine).await, 0);
}

#[tokio::test]
async fn none_is_made_by_a_session_that_ends_meanwhile() {
    let engine = TestEngine::start().await;
    let owner = engine.operator(&[]).await;
    step_up(&owner).await;
    // An administrator who resets the password holds the user's row, and ends sessions and tokens under it.
    let mut reset = engine.database.pool.begin().await.expect("a transaction");
    let user: i64 = sqlx::query_scalar("SELECT id FROM users WHERE username = $1 FOR UPDATE")
        .bind(&owner.name)
        .fetch_one(&mut *reset)
        .await
        .expect("the user");
    let making = tokio::spawn({
        let owner = owner.clone();
        async move { owner.post("/api/auth/tokens", json!({"name": "Late", "scopes": ["read"]})).await }
    });
    eventually("the request waits for the row", Duration::from_secs(10), || async {
        let waiting: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .fetch_one(&engine.database.pool)
        .await
        .expect("a count");
        (waiting > 0).then_some(())
    })
    .await;
    let _ = sqlx::query("DELETE FROM operator_sessions WHERE user_id = $1").bind(user).execute(&mut *reset).await.expect("ended");
    reset.commit().await.expect("a commit");
    let _ = making.await.expect("an answer").error(401, "unauthorized");
    assert_eq!(count(&engine).await, 0);
}

#[tokio::test]
async fn its_last_use_is_written_once_a_minute() {
    let engine = TestEngine::start().await;
    let owner = engine.operator(&[]).await;
    step_up(&owner).await;
    let (program, _) = program(&owner, &["read"]).await;
    let last = async || -> Option<DateTime<Utc>> {
        sqlx::query_scalar("SELECT last_used_at FROM api_tokens").fetch_one(&engine.database.pool).await.expect("a token")
    };
    assert_eq!(last().await, None);
    let _ = program.get("/api/auth/me").await.ok();
    assert!(last().await.is_some());
    run(&engine, "UPDATE api_tokens SET last_used_at = now() - interval '45 s'").await;
    let first = last().await.expect("a use");
    let _ = program.get("/api/auth/me").await.ok();
    let _ = program.post("/api/sites", json!({"name": "x"})).await.error(403, "insufficient_scope");
    assert_eq!(last().await, Some(first), "a request costs no write");
    run(&engine, "UPDATE api_tokens SET last_used_at = now() - interval '61 s', last_used_ip = '192.0.2.1'").await;
    let _ = program.get("/api/auth/me").await.ok();
    assert!(last().await.is_some_and(|at| at > first));
    assert_eq!(owner.get("/api/auth/tokens").await.ok()["tokens"][0]["last_used_ip"], "127.0.0.1");
}

/// A stream of the events of a run that has none, asked for by `who`.
async fn stream(engine: &TestEngine, who: &Actor) -> reqwest::Response {
    let id = Uuid::now_v7();
    let _ = sqlx::query(
        "INSERT INTO workflow_runs (id, workflow, version, state, step, input, scope_ids)
         VALUES ($1, 'scheduled_run', 1, 'pending', 'resolve', '{\"occurrence_id\": 0}', '{}')",
    )
    .bind(id)
    .execute(&engine.database.pool)
    .await
    .expect("a run");
    let request = who.request(reqwest::Method::GET, &format!("/api/runs/{id}/events"));
    let accept = (reqwest::header::ACCEPT, reqwest::header::HeaderValue::from_static("text/event-stream"));
    let mut stream = request.headers([accept].into_iter().collect()).send().await.expect("an answer");
    assert_eq!(stream.status(), 200);
    let early = tokio::time::timeout(Duration::from_secs(1), stream.chunk()).await;
    assert!(early.is_err(), "it stays open, with nothing to tell: {early:?}");
    stream
}

#[tokio::test]
async fn a_stream_of_events_ends_with_token_or_session() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    step_up(&admin).await;
    let (program, made) = program(&admin, &["read"]).await;
    let second = engine.second_admin().await;
    let (of_token, of_session) = (stream(&engine, &program).await, stream(&engine, &second).await);
    let ended = async |stream: reqwest::Response| {
        let end = tokio::time::timeout(Duration::from_secs(10), stream.text()).await.expect("an end").expect("a stream");
        assert_eq!(end, "");
    };
    // A page that only listens is nobody at work: the session grows idle all the same.
    let age = "UPDATE operator_sessions SET last_seen_at = now() - interval '1 hour'";
    sqlx::query(age).execute(&engine.database.pool).await.expect("an update");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let idle = "SELECT bool_and(last_seen_at < now() - interval '50 minutes') FROM operator_sessions";
    assert!(sqlx::query_scalar::<_, bool>(idle).fetch_one(&engine.database.pool).await.expect("the sessions"));
    let _ = admin.delete(&format!("/api/auth/tokens/{}", made["id"].as_str().expect("an id"))).await.ok();
    ended(of_token).await;
    let _ = second.post("/api/auth/logout", json!({})).await.ok();
    ended(of_session).await;
}
