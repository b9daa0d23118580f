//! What every route has in common: forms of paths, methods, bodies, errors and headers, and a database that goes away.

use std::time::Duration;

use borealis_api::{access::Class, connections::HEAD_TIMEOUT_S};
use borealis_tests::{Reply, TestCluster, TestDatabase, TestEngine, eventually, raw};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[track_caller]
fn no_such_route(reply: Reply) {
    let _ = reply.error(404, "not_found");
}

#[tokio::test]
async fn health_answers_at_once_and_readiness_when_the_database_is_migrated() {
    let engine = TestEngine::start().await;
    assert_eq!(engine.anonymous().get("/health").await.ok()["status"], "ok");
    assert_eq!(engine.anonymous().get("/ready").await.ok()["status"], "ok");
}

#[tokio::test]
async fn readiness_names_what_is_wrong_with_the_database() {
    let engine = TestEngine::start().await;
    let pool = &engine.database.pool;
    let known: i64 = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(pool).await.unwrap();
    let ready = async || engine.anonymous().get("/ready").await;

    engine.database.tamper("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (999, 'later', true, '', 0)").await;
    let reply = ready().await.error(503, "database_is_newer");
    assert!(reply.text.contains(&format!("(999 > {known})")), "{}", reply.text);
    let error = borealis_engine::db::migrate(pool).await.unwrap_err();
    assert_eq!(error.code, "database_is_newer");
    assert!(error.message.contains(&format!("(999 > {known})")), "{}", error.message);

    engine.database.tamper("DELETE FROM _sqlx_migrations WHERE version >= 3").await;
    let _ = ready().await.error(503, "migrations_pending");
    engine.database.tamper("ALTER TABLE _sqlx_migrations RENAME TO elsewhere").await;
    let reply = ready().await.error(503, "migrations_pending");
    assert!(reply.text.contains("0 of "), "{}", reply.text);
}

#[tokio::test]
async fn a_role_without_rights_is_told_which() {
    let database = TestDatabase::start().await;
    let role = format!("limited_{}", uuid::Uuid::new_v4().simple());
    let limited = borealis_engine::db::sibling(&database.pool, 2, &[("role", &role)]);
    for sql in [
        format!("CREATE ROLE {role}"),
        format!("GRANT USAGE ON SCHEMA public, apalis TO {role}"),
        format!("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public, apalis TO {role}"),
        format!("REVOKE UPDATE ON devices FROM {role}"),
        // Somebody else's table beside ours.
        format!("CREATE ROLE {role}_other"),
        "CREATE TABLE public.not_ours ()".to_owned(),
        format!("ALTER TABLE public.not_ours OWNER TO {role}_other"),
    ] {
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&database.pool).await.unwrap();
    }
    let said = async || borealis_engine::db::ready(&limited).await.map_err(|error| (error.code, error.message));
    let (code, message) = said().await.unwrap_err();
    assert!(code == "database_rights_missing" && message.contains("lacks UPDATE on table public.devices."), "{message}");
    sqlx::query(sqlx::AssertSqlSafe(format!("GRANT UPDATE ON devices TO {role}"))).execute(&database.pool).await.unwrap();
    assert_eq!(said().await, Ok(()));

    // What migrations need is more.
    sqlx::query("DELETE FROM _sqlx_migrations WHERE version >= 3").execute(&database.pool).await.unwrap();
    let error = borealis_engine::db::migrate(&limited).await.unwrap_err();
    assert!(error.code == "database_rights_missing" && error.message.contains("lacks CREATE on "), "{}", error.message);
    limited.close().await;
    for sql in [format!("DROP OWNED BY {role}, {role}_other"), format!("DROP ROLE {role}, {role}_other")] {
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&database.pool).await.unwrap();
    }
}

#[tokio::test]
async fn a_path_has_one_form_and_everything_else_is_404() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let borealis_tests::actor::Credential::Bearer(token) = &admin.credential else { panic!("an administrator's token") };
    let authorization = format!("Bearer {token}");
    let headers = [("Authorization", authorization.as_str())];
    let _ = raw::request(engine.addr, "GET", "/api/sites", &headers).await.expect(200);
    for target in [
        "//api/sites",
        "/api//sites",
        "/api/sites//",
        "/api/sites/",
        "/api/./sites",
        "/api/x/../sites",
        "/api/%2e%2e/api/sites",
        "/api%2fsites",
        "/api%2Fsites",
        "/api%5csites",
        "/api\\sites",
        "/API/sites",
        "/api/Sites",
        "/api/sites.json",
        "/api/sites;v=1",
        "/api/sites%3bv=1",
        "/api/%73ites",
        "/api/sites%00",
        "/api/sites%0d%0aX-Injected:1",
        "/api/sites%20",
        "/api/sites%252f",
        "/api/sites%",
        "/health/../api/sites",
        "/health/",
    ] {
        no_such_route(raw::request(engine.addr, "GET", target, &headers).await);
    }
}

#[tokio::test]
async fn headers_cannot_pass_the_guard() {
    let engine = TestEngine::start().await;
    for (name, value) in [
        ("X-Original-URL", "/health"),
        ("X-Rewrite-URL", "/health"),
        ("X-HTTP-Method-Override", "GET"),
        ("Forwarded", "for=127.0.0.1;host=localhost"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-Forwarded-User", "admin"),
        ("Authorization", "Bearer "),
        ("Authorization", "Basic YWRtaW46YWRtaW4="),
        ("Cookie", "borealis_auth="),
        ("Cookie", "session=x; borealis_auth=null"),
    ] {
        let reply = raw::request(engine.addr, "GET", "/api/sites", &[(name, value)]).await;
        assert_eq!(reply.status, 401, "{name}: {value}: {}", reply.text);
    }
}

#[tokio::test]
async fn a_wrong_method_is_405_with_the_allowed_ones() {
    let engine = TestEngine::start().await;
    let reply = engine.anonymous().delete("/health").await.error(405, "method_not_allowed");
    let allowed: Vec<&str> = reply.header("allow").expect("an Allow header").split(',').map(str::trim).collect();
    assert!(allowed.contains(&"GET") && !allowed.contains(&"DELETE"), "{allowed:?}");
    // On a guarded route too, and with the methods of both classes of the path.
    let reply = engine.anonymous().delete("/api/sites").await.error(405, "method_not_allowed");
    let allowed: Vec<&str> = reply.header("allow").expect("an Allow header").split(',').map(str::trim).collect();
    assert!(allowed.contains(&"GET") && allowed.contains(&"POST"), "{allowed:?}");
}

#[tokio::test]
async fn a_body_that_is_not_what_the_route_takes_is_400_and_names_the_field() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let send = async |text: &'static str| {
        let request = admin.request(reqwest::Method::POST, "/api/sites").header("Content-Type", "application/json").body(text);
        admin.send(request).await
    };
    for text in ["", "{", "[]", "null", "\"name\"", "{\"name\": \"a\"} {}", "\u{feff}{}", "{\"name\": \"\\ud800\"}"] {
        let _ = send(text).await.error(400, "invalid_json");
    }
    let reply = send(r#"{"name": 7}"#).await.error(400, "invalid_json");
    assert!(reply.body["fields"]["name"].is_string(), "{}", reply.text);
    let reply = send(r#"{"name": "Lab", "colour": "red"}"#).await.error(400, "invalid_json");
    assert!(reply.body["message"].as_str().is_some_and(|text| text.contains("colour")), "{}", reply.text);
    let deep = "[".repeat(100_000).leak();
    let _ = send(deep).await.error(400, "invalid_json");
    assert_eq!(admin.get("/api/sites").await.ok()["sites"].as_array().map(Vec::len), Some(0), "a refused body made a site");
}

#[tokio::test]
async fn an_oversized_body_is_413_and_its_rest_is_not_read() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let body = format!(r#"{{"name": "{}"}}"#, "x".repeat(borealis_api::body::BodyLimit::USUAL.bytes));
    let request = admin.request(reqwest::Method::POST, "/api/sites").header("Content-Type", "application/json").body(body);
    let _ = admin.send(request).await.error(413, "body_too_large");
    // A length that is only claimed is refused before anything is sent.
    let borealis_tests::actor::Credential::Bearer(token) = &admin.credential else { panic!("an administrator's token") };
    let headers = [
        ("Authorization", format!("Bearer {token}")),
        ("Content-Type", "application/json".into()),
        ("Content-Length", "99999999999".into()),
    ];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let _ = raw::request(engine.addr, "POST", "/api/sites", &headers).await.error(413, "body_too_large");
}

#[tokio::test]
async fn a_text_the_database_cannot_hold_is_the_senders_fault() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let reply = admin.post("/api/sites", json!({"name": "a\u{0}b", "description": "\u{0}"})).await;
    assert_eq!(reply.status, 400, "{}", reply.text);
    assert!(reply.body["error"].is_string(), "{}", reply.text);
}

#[tokio::test]
async fn an_overlong_target_and_too_many_headers_are_refused() {
    let engine = TestEngine::start().await;
    let target = format!("/api/sites?x={}", "y".repeat(borealis_api::app::MAX_TARGET));
    let _ = raw::request(engine.addr, "GET", &target, &[]).await.error(414, "uri_too_long");
    let many = vec![("X-Filler", "1"); 101];
    assert_eq!(raw::request(engine.addr, "GET", "/health", &many).await.status, 431);
    let large = "z".repeat(borealis_api::connections::MAX_HEAD_BYTES);
    assert_eq!(raw::request(engine.addr, "GET", "/health", &[("X-Filler", &large)]).await.status, 431);
}

#[tokio::test]
async fn every_answer_carries_the_headers_that_tame_browsers() {
    let engine = TestEngine::start().await;
    for (path, status) in [("/health", 200), ("/api/openapi.json", 200), ("/api/sites", 401), ("/nothing", 404)] {
        let reply = engine.anonymous().get(path).await.expect(status);
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(reply.header("x-frame-options"), Some("DENY"), "{path}");
        assert!(reply.header("content-security-policy").is_some_and(|policy| policy.contains("default-src 'none'")), "{path}");
        assert_eq!(reply.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(reply.header("strict-transport-security"), None, "{path}: this engine is not behind TLS");
        assert!(reply.header("x-request-id").is_some_and(|id| id.len() == 32), "{path}");
        let is_api = path.starts_with("/api/");
        assert_eq!(reply.header("cache-control"), is_api.then_some("no-store"), "{path}");
    }
}

#[tokio::test]
async fn behind_tls_browsers_are_told_to_stay_there() {
    let engine = TestEngine::with(|settings| settings.public_base_url = "https://rmm.example/".parse().expect("a URL")).await;
    for (path, status) in [("/health", 200), ("/api/sites", 401), ("/nothing", 404)] {
        let reply = engine.anonymous().get(path).await.expect(status);
        assert!(reply.header("strict-transport-security").is_some_and(|text| text.starts_with("max-age=")), "{path}");
    }
}

#[tokio::test]
async fn the_docs_page_comes_from_the_engine_alone() {
    let engine = TestEngine::start().await;
    let page = engine.anonymous().get("/api/docs").await.expect(200);
    let policy = page.header("content-security-policy").expect("a policy");
    assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
    assert!(!page.text.contains("http://") && !page.text.contains("https://"), "the page fetches from elsewhere");
    for asset in page.text.split('"').filter(|text| text.starts_with("/api/docs/")) {
        let _ = engine.anonymous().get(asset).await.expect(200);
    }
    let _ = engine.anonymous().get("/api/docs/other.js").await.error(404, "not found");
    // The bare address, and the path with a slash at its end, lead there.
    for (path, status) in [("/", 303), ("/api/docs/", 308)] {
        assert_eq!(engine.anonymous().get(path).await.expect(status).header("location"), Some("/api/docs"), "{path}");
    }
}

#[tokio::test]
async fn a_slow_head_is_cut_and_many_idle_connections_do_not_stop_others() {
    let engine = TestEngine::start().await;
    let mut slow = tokio::net::TcpStream::connect(engine.addr).await.expect("a connection");
    let slow = tokio::spawn(async move {
        let started = std::time::Instant::now();
        slow.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n").await.expect("a beginning");
        // A line every other second, so that it is never silent.
        let (mut reading, mut writing) = slow.into_split();
        let dripping = tokio::spawn(async move {
            while writing.write_all(b"a: b\r\n").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        });
        let mut rest = Vec::new();
        let _ = reading.read_to_end(&mut rest).await;
        dripping.abort();
        (started.elapsed(), String::from_utf8_lossy(&rest).into_owned())
    });
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(tokio::net::TcpStream::connect(engine.addr).await.expect("a connection"));
    }
    assert_eq!(engine.anonymous().get("/health").await.ok()["status"], "ok");
    let limit = Duration::from_secs(HEAD_TIMEOUT_S);
    let (lasted, said) = tokio::time::timeout(limit * 2, slow).await.expect("it is cut").expect("no panic");
    assert!(lasted + Duration::from_secs(1) >= limit && !said.contains("200 OK"), "{lasted:?}: {said}");
}

#[tokio::test]
async fn without_the_database_it_is_503_with_retry_after_and_comes_back_by_itself() {
    let cluster = TestCluster::start().await;
    let database = TestDatabase::on(cluster.url()).await;
    let engine = TestEngine::on(database, |_| {}).await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Lab").await;
    let device = engine.device(site).await;

    let stopped = cluster.stop().await;
    assert_eq!(engine.anonymous().get("/health").await.ok()["status"], "ok", "liveness needs no database");
    let _ = engine.anonymous().get("/api/openapi.json").await.expect(200);
    let nobody = engine.anonymous();
    for (actor, method, path, body) in [
        (&nobody, "GET", "/ready", None),
        (&admin, "GET", "/api/sites", None),
        (&admin, "POST", "/api/sites", Some(json!({"name": "Lost"}))),
        (&device.actor, "POST", "/api/agent/heartbeat", Some(json!({"hostname": device.hostname}))),
        (&nobody, "POST", "/api/auth/login", Some(json!({"username": "admin", "password": "a long password"}))),
    ] {
        let reply = actor.call(method, path, body.as_ref()).await;
        let reply = reply.expect(503);
        assert!(reply.header("retry-after").and_then(|text| text.parse::<u32>().ok()).is_some_and(|after| after >= 1), "{path}");
        assert!(reply.body["error"].is_string() && reply.body["request_id"].is_string(), "{path}: {}", reply.text);
        assert!(!reply.text.contains("sock") && !reply.text.contains("Connection"), "{path} tells internals: {}", reply.text);
    }

    let _cluster = stopped.start().await;
    eventually("the API works again", Duration::from_secs(30), async || {
        (engine.anonymous().get("/ready").await.status == 200).then_some(())
    })
    .await;
    let sites = admin.get("/api/sites").await.ok();
    assert_eq!(sites["sites"].as_array().map(Vec::len), Some(1), "what was refused was not done: {sites}");
    let _ = device.post("/api/agent/heartbeat", json!({"hostname": device.hostname})).await.ok();
}

#[tokio::test]
async fn what_a_route_does_not_know_in_a_query_is_refused_everywhere() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (_, document, table) = borealis_api::app::build(&engine.app);
    let document = serde_json::to_value(document).expect("JSON");
    let mut tried = 0;
    for entry in table.iter().filter(|entry| matches!(entry.class, Class::Operator | Class::Admin)) {
        let path: Vec<&str> = entry.path.split('/').map(|part| if part.starts_with('{') { "1" } else { part }).collect();
        let path = path.join("/");
        let reply = admin.call(&entry.method, &format!("{path}?no_such%20name=1"), None).await;
        let place = format!("{} {}: {}", entry.method, entry.path, reply.text);
        assert_eq!((reply.status, &reply.body["error"]), (400, &"invalid_query".into()), "{place}");
        assert!(reply.body["fields"]["no_such name"].is_string(), "{place}");
        // What it knows it takes, or says what is wrong with the value.
        let operation = &document["paths"][&entry.path][entry.method.to_lowercase()];
        for parameter in operation["parameters"].as_array().into_iter().flatten().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().expect("a name");
            if entry.method == "GET" {
                let reply = admin.get(&format!("{path}?{name}=1")).await;
                let unknown = reply.body["message"].as_str().is_some_and(|text| text.contains("no parameter of this route"));
                assert!(!unknown, "{place}: {name}");
            }
        }
        tried += 1;
    }
    assert!(tried > 50, "{tried}");
    // Anybody may ask for these, and probes add what they like.
    let _ = engine.anonymous().get("/health?probe=1").await.ok();
}

#[tokio::test]
async fn a_compressed_body_is_refused_by_name() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let request = |coding: &str| {
        let request = admin.request(reqwest::Method::POST, "/api/sites").header("content-encoding", coding);
        request.header("content-type", "application/json").body(r#"{"name": "x"}"#)
    };
    let _ = admin.send(request("gzip")).await.error(415, "unsupported_content_encoding");
    assert_eq!(admin.send(request("identity")).await.status, 201);
}

#[tokio::test]
async fn what_was_read_can_be_sent_back() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let assembly = json!({"domain": "user", "display_name": "Say hi", "payload": {"type": "bash", "script": "echo hi"}});
    let assembly =
        admin.post("/api/assemblies", assembly).await.expect(201).body["assembly_guid"].as_str().expect("a guid").to_owned();
    let job = json!({
        "name": "Nightly", "components": [{"assembly_guid": assembly, "name": "Say hi"}], "targets": [device.hostname],
        "schedule": {"type": "daily", "start": "2090-01-01T03:00", "timezone": "Europe/Berlin"}, "stop_after": "2h",
    });
    let job = admin.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].clone();
    let credential = json!({"name": "Web", "username": "deploy", "password": "a secret", "metadata": {"note": "x"}});
    let credential = admin.post("/api/credentials", credential).await.ok()["credential"]["id"].clone();
    for (path, inside) in [
        (format!("/api/scheduled_jobs/{job}"), "job"),
        (format!("/api/assemblies/{assembly}"), ""),
        (format!("/api/credentials/{credential}"), "credential"),
    ] {
        let read = async || {
            let answer = admin.get(&path).await.ok();
            if inside.is_empty() { answer } else { answer[inside].clone() }
        };
        let before = read().await;
        let _ = admin.put(&path, before.clone()).await.ok();
        let mut after = read().await;
        for touched in ["updated_at", "last_persisted"].into_iter().filter(|touched| before.get(touched).is_some()) {
            after[touched] = before[touched].clone();
        }
        assert_eq!(after, before, "{path}");
        let mut unknown = before.clone();
        unknown["nobody_knows_this"] = json!(1);
        let _ = admin.put(&path, unknown).await.error(400, "invalid_json");
    }
    // Two names of one field cannot say different things.
    let path = format!("/api/assemblies/{assembly}");
    let mut read = admin.get(&path).await.ok();
    read["name"] = json!("Say something");
    let _ = admin.put(&path, read).await.error(400, "conflicting_fields");
    let _ = admin.put(&path, json!({"name": "Say something"})).await.ok();
    assert_eq!(admin.get(&path).await.ok()["display_name"], "Say something");
}
