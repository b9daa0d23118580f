//! Who gets in, and who does not: set-up, sign-in, sessions, users and sites, seen from outside.

use std::{path::Path, time::Duration};

use borealis_engine::access::{aegis::Unseal, sessions};
use borealis_tests::{
    Actor, Processes, TestEngine,
    actor::Credential,
    engine::{ADMIN, CIPHER, Node, PASSWORD},
    eventually,
    processes::free_port,
    raw, totp,
};
use serde_json::{Value, json};

fn token(actor: &Actor) -> &str {
    match &actor.credential {
        Credential::Bearer(token) | Credential::Cookie(token) => token,
        Credential::None | Credential::Worker(_) => panic!("{} has no session", actor.name),
    }
}

/// A code that is not right at any step near now.
fn wrong_code(secret: &str) -> String {
    let near: Vec<String> = (0..3).map(|steps| totp::code(secret, steps)).collect();
    let earlier = |code: &String| !near.contains(code);
    (0..10).map(|digit| digit.to_string().repeat(6)).find(earlier).expect("a wrong code")
}

async fn phase(engine: &TestEngine) -> Value {
    engine.anonymous().get("/api/bootstrap/state").await.ok()["phase"].clone()
}

#[tokio::test]
async fn a_fresh_engine_is_set_up_step_by_step() {
    let engine = TestEngine::start().await;
    let nobody = engine.anonymous();
    let state = nobody.get("/api/bootstrap/state").await.ok();
    assert_eq!(state, json!({"phase": "aegis_setup_required", "configured": false, "locked": false}));

    // Nothing else works yet.
    let _ = nobody.get("/api/sites").await.error(401, "unauthorized");
    let login = json!({"username": "a", "password": "b"});
    let reply = nobody.post("/api/auth/login", login.clone()).await.error(423, "bootstrap_required");
    assert_eq!(reply.body["phase"], "aegis_setup_required");
    let verify = json!({"pending_token": "x", "code": "123456"});
    let _ = nobody.post("/api/auth/mfa/verify", verify.clone()).await.error(423, "bootstrap_required");
    let admin = json!({"username": ADMIN, "password": PASSWORD});
    let reply = nobody.post("/api/bootstrap/admin/setup", admin.clone()).await.error(409, "invalid_phase");
    assert_eq!(reply.body["phase"], "aegis_setup_required");
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", verify).await.error(423, "bootstrap_required");
    let _ = nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": CIPHER})).await.error(409, "invalid_phase");

    for weak in ["", "too short", " outer white space"] {
        let reply = nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": weak})).await.error(400, "invalid_request");
        assert!(reply.body["fields"]["cipher"].is_string(), "{}", reply.text);
    }
    let done = nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER})).await.ok();
    assert_eq!(done, json!({"status": "ok", "phase": "admin_setup_required", "configured": true, "locked": false}));
    let _ = nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER})).await.error(409, "invalid_phase");
    let _ = nobody.post("/api/auth/login", login).await.error(423, "bootstrap_required");
    let _ = nobody.post("/api/bootstrap/admin/recover", admin.clone()).await.error(409, "invalid_phase");

    for (body, code, field) in [
        (json!({"password": PASSWORD}), "username and password are required", "username"),
        (json!({"username": ADMIN}), "username and password are required", "password"),
        (json!({"username": ADMIN, "password": "short"}), "password_too_short", "password"),
        (json!({"username": ADMIN, "password_sha512": "abc"}), "username and password are required", "password"),
        (json!({"username": "a/b", "password": PASSWORD}), "invalid_username", "username"),
    ] {
        let reply = nobody.post("/api/bootstrap/admin/setup", body).await.error(400, code);
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
    let pending = nobody.post("/api/bootstrap/admin/setup", admin).await.ok();
    assert_eq!(
        (&pending["stage"], &pending["role"], &pending["status"]),
        (&json!("setup"), &json!("Admin"), &json!("mfa_required"))
    );
    let secret = pending["secret"].as_str().expect("a secret");
    assert!(pending["otpauth_url"].as_str().is_some_and(|url| url.starts_with("otpauth://totp/Borealis:admin?")), "{pending}");
    assert_eq!(phase(&engine).await, "admin_setup_required", "the administrator exists only after a right code");

    let with = |code: &str| json!({"pending_token": pending["pending_token"], "code": code});
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", with("12345")).await.error(400, "invalid_code");
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", with(&wrong_code(secret))).await.error(401, "invalid_code");
    let missing = json!({"code": "123456"});
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", missing).await.error(401, "bootstrap_pending");
    let reply = nobody.post("/api/bootstrap/admin/mfa/verify", with(&totp::code(secret, 0))).await.expect(200);
    assert_eq!((&reply.body["username"], &reply.body["role"]), (&json!("admin"), &json!("Admin")));
    let admin = nobody.signed_in(ADMIN, PASSWORD, secret, &reply.body);
    assert_eq!(phase(&engine).await, "login_required");

    // The challenge worked once, and set-up is over for good.
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", with(&totp::code(secret, 1))).await.error(401, "invalid_session");
    let again = json!({"username": "eve", "password": PASSWORD});
    let _ = nobody.post("/api/bootstrap/admin/setup", again).await.error(409, "invalid_phase");

    let me = admin.get("/api/auth/me").await.ok();
    assert_eq!((&me["username"], &me["role"], &me["mfa_enabled"]), (&json!("admin"), &json!("Admin"), &json!(true)));
    let status = admin.get("/api/aegis/status").await.ok();
    assert_eq!((&status["configured"], &status["locked"], &status["user_role"]), (&json!(true), &json!(false), &json!("Admin")));
}

#[tokio::test]
async fn two_people_at_the_set_up_make_one_secret_store_and_one_administrator() {
    let engine = TestEngine::start().await;
    let nobody = engine.anonymous();
    let setup = || nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER}));
    let (one, two) = tokio::join!(setup(), setup());
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409], "{} {}", one.text, two.text);

    let begin = |name: &'static str| nobody.post("/api/bootstrap/admin/setup", json!({"username": name, "password": PASSWORD}));
    let (one, two) = (begin("ada").await.ok(), begin("eve").await.ok());
    let verify = |pending: &Value| {
        let code = totp::code(pending["secret"].as_str().expect("a secret"), 0);
        let body = json!({"pending_token": pending["pending_token"], "code": code});
        let nobody = nobody.clone();
        async move { nobody.post("/api/bootstrap/admin/mfa/verify", body).await }
    };
    let (one, two) = tokio::join!(verify(&one), verify(&two));
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409], "{} {}", one.text, two.text);
}

#[tokio::test]
async fn sign_in_takes_password_and_code_and_each_code_once() {
    let engine = TestEngine::start().await;
    engine.admin().await;
    let username = engine.user("User", &[]).await;
    let nobody = engine.anonymous();
    let login = |password: &'static str| nobody.post("/api/auth/login", json!({"username": username, "password": password}));

    let pending = login(PASSWORD).await.ok();
    assert_eq!((&pending["stage"], &pending["status"]), (&json!("setup"), &json!("mfa_required")));
    assert_eq!(pending["available_methods"], json!(["totp"]));
    let secret = pending["secret"].as_str().expect("a secret").to_owned();
    assert_eq!(secret.len(), 32);
    let rival = login(PASSWORD).await.ok();
    let verify = |pending: &Value, code: String| {
        let body = json!({"pending_token": pending["pending_token"], "code": code});
        nobody.post("/api/auth/mfa/verify", body)
    };
    // Spaces are people's business.
    let code = totp::code(&secret, 0);
    let spaced = format!(" {} {} ", &code[..3], &code[3..]);
    let done = verify(&pending, spaced).await.ok();
    assert_eq!((&done["status"], &done["username"]), (&json!("ok"), &json!(username)));
    // The other sign-in's secret must not replace the one that is enrolled now.
    let rival_code = totp::code(rival["secret"].as_str().expect("a secret"), 0);
    let _ = verify(&rival, rival_code).await.error(401, "invalid_session");

    let pending = login(PASSWORD).await.ok();
    assert_eq!(pending["stage"], "verify");
    assert!(pending.get("secret").is_none() && pending.get("otpauth_url").is_none(), "{pending}");
    let _ = verify(&pending, code).await.error(401, "invalid_code");
    let next = totp::code(&secret, 1);
    let _ = verify(&pending, next.clone()).await.expect(200);
    let pending = login(PASSWORD).await.ok();
    let _ = verify(&pending, next).await.error(401, "invalid_code");
}

#[tokio::test]
async fn one_code_at_two_processes_at_the_same_moment_works_once() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let second = engine.second().await;
    let secret = admin.totp_secret.clone().expect("a secret");
    let here = engine.anonymous();
    let there = Actor::anonymous(&second.base);
    let login = json!({"username": ADMIN, "password": PASSWORD});
    let (one, two) = (here.post("/api/auth/login", login.clone()).await.ok(), there.post("/api/auth/login", login).await.ok());
    let code = totp::code(&secret, 1);
    let body = |pending: &Value| json!({"pending_token": pending["pending_token"], "code": code});
    let (one, two) = tokio::join!(here.post("/api/auth/mfa/verify", body(&one)), there.post("/api/auth/mfa/verify", body(&two)));
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 401], "{} {}", one.text, two.text);
    second.stop().await;
}

#[tokio::test]
async fn a_pending_token_opens_nothing() {
    let engine = TestEngine::start().await;
    engine.admin().await;
    let nobody = engine.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.ok();
    let pending_token = pending["pending_token"].as_str().expect("a token").to_owned();
    let document = nobody.get("/api/openapi.json").await.ok();
    let (_, _, table) = borealis_api::app::build(&engine.app);
    assert!(document["paths"].is_object() && table.len() > 20);
    for entry in table.iter().filter(|entry| entry.class != borealis_api::access::Class::Anonymous) {
        let path = entry.path.replace("{username}", ADMIN).replace(['{', '}'], "");
        for credential in [Credential::Bearer(pending_token.clone()), Credential::Cookie(pending_token.clone())] {
            let actor = Actor { credential, ..nobody.clone() };
            let reply = actor.call(&entry.method, &path, None).await;
            assert_eq!(reply.status, 401, "{} {}: {}", entry.method, entry.path, reply.text);
        }
    }
    // It is of one purpose: the bootstrap's verify does not know it.
    let body = json!({"pending_token": pending_token, "code": "123456"});
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", body).await.error(401, "invalid_session");
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_get_the_same_answer() {
    let engine = TestEngine::start().await;
    engine.admin().await;
    let nobody = engine.anonymous();
    let mut known = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": "wrong"})).await;
    let mut unknown = nobody.post("/api/auth/login", json!({"username": "nobody", "password": "wrong"})).await;
    for reply in [&mut known, &mut unknown] {
        assert_eq!((reply.status, &reply.body["error"]), (401, &json!("invalid username or password")));
        reply.body["request_id"] = Value::Null;
        reply.headers.retain(|(name, _)| name != "x-request-id" && name != "date");
    }
    assert_eq!((known.body, known.headers), (unknown.body, unknown.headers));
    for (body, field) in [(json!({"password": "x"}), "username"), (json!({"username": "x"}), "password")] {
        let reply = nobody.post("/api/auth/login", body).await.error(400, "missing credentials");
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
}

#[tokio::test]
async fn after_five_wrong_passwords_the_account_waits_but_not_for_a_browser_it_has_used() {
    let engine = TestEngine::start().await;
    engine.admin().await;
    let username = engine.user("User", &[]).await;
    let nobody = engine.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": username, "password": PASSWORD})).await.ok();
    let secret = pending["secret"].as_str().expect("a secret");
    let body = json!({"pending_token": pending["pending_token"], "code": totp::code(secret, 0)});
    let done = nobody.post("/api/auth/mfa/verify", body).await.expect(200);
    let cookies: Vec<&str> =
        done.headers.iter().filter(|(name, _)| name == "set-cookie").map(|(_, value)| value.as_str()).collect();
    let device = cookies.iter().find_map(|cookie| cookie.strip_prefix("borealis_device=")).expect("a device cookie");
    let device = device.split(';').next().expect("a value").to_owned();

    let attempt =
        |name: String, password: &'static str| nobody.post("/api/auth/login", json!({"username": name, "password": password}));
    // All at once: the limit must hold without anybody having to wait for the answer of the one before.
    let replies = futures::future::join_all((0..8).map(|_| attempt(username.to_uppercase(), "wrong password"))).await;
    let counted = |status| replies.iter().filter(|reply| reply.status == status).count();
    assert_eq!((counted(401), counted(429)), (5, 3));
    let reply = attempt(username.clone(), PASSWORD).await.error(429, "rate_limited");
    let wait: u64 = reply.header("retry-after").and_then(|text| text.parse().ok()).expect("Retry-After");
    assert!((1..=16 * 60).contains(&wait), "{wait}");
    // Others are not concerned.
    let _ = attempt(ADMIN.to_owned(), PASSWORD).await.expect(200);
    // Nor is a browser the user has signed in from, while a forged mark counts as none.
    let known = |mark: String| {
        let body = json!({"username": username, "password": PASSWORD});
        nobody.send(
            nobody
                .request(reqwest::Method::POST, "/api/auth/login")
                .header("Cookie", format!("borealis_device={mark}"))
                .json(&body),
        )
    };
    let _ = known(device.clone()).await.expect(200);
    let forged = device.replacen(|c: char| c.is_ascii_digit(), "9", 1);
    if forged != device {
        let _ = known(forged).await.error(429, "rate_limited");
    }
}

#[tokio::test]
async fn a_wrong_step_up_counts_as_a_wrong_sign_in() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    for _ in 0..5 {
        let _ = operator.post("/api/auth/step-up", json!({"password": "wrong"})).await.error(401, "invalid current password");
    }
    let right = json!({"password": PASSWORD});
    let _ = operator.post("/api/auth/step-up", right).await.error(429, "rate_limited");
    let login = json!({"username": operator.name, "password": PASSWORD});
    let _ = engine.anonymous().post("/api/auth/login", login).await.error(429, "rate_limited");
    // Who is signed in stays so.
    let _ = operator.get("/api/auth/me").await.ok();
}

#[tokio::test]
async fn an_account_has_a_hundred_failures_an_hour_whatever_the_path() {
    let engine = TestEngine::start().await;
    let operator = engine.operator(&[]).await;
    let wrong = async || operator.post("/api/auth/step-up", json!({"password": "wrong"})).await;
    let _ = wrong().await.error(401, "invalid current password");
    let count = async |hits: i32| {
        // As if they had been made over time; the shorter windows have passed.
        sqlx::query("UPDATE rate_counters SET hits = CASE scope WHEN 'auth.account_hour' THEN $1 ELSE 0 END")
            .bind(hits)
            .execute(&engine.database.pool)
            .await
            .expect("the counters");
    };
    count(98).await;
    let _ = wrong().await.error(401, "invalid current password");
    count(99).await;
    let _ = wrong().await.error(401, "invalid current password");
    let _ = wrong().await.error(429, "rate_limited");
    // By another path, and right.
    let login = json!({"username": operator.name, "password": PASSWORD});
    let _ = engine.anonymous().post("/api/auth/login", login).await.error(429, "rate_limited");
    let _ = operator.post("/api/auth/step-up", json!({"code": "123456"})).await.error(429, "rate_limited");
}

/// Every operation that says in the OpenAPI document that it asks for a step-up, with something it would do.
#[tokio::test]
async fn whatever_says_that_it_asks_for_a_step_up_does() {
    // Under a name, because passkeys need one.
    let engine = TestEngine::with(|settings| settings.public_base_url = "http://localhost:0".parse().expect("a URL")).await;
    let admin = engine.admin().await;
    let username = engine.user("User", &[]).await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let credential = admin.post("/api/credentials", json!({"name": "Web", "username": "deploy"})).await.ok();
    let credential = format!("/api/credentials/{}", credential["credential"]["id"]);
    let provider = admin.post("/api/directory/providers", json!({"name": "Main"})).await.ok();
    let provider = format!("/api/directory/providers/{}", provider["provider"]["id"]);
    let user = |what: &str| format!("/api/users/{username}/{what}");
    let rows: Vec<(&str, &str, String, Value)> = vec![
        ("POST", "/api/aegis/rotate", "".into(), json!({"current_cipher": CIPHER, "new_cipher": "an entirely new passphrase"})),
        ("POST", "/api/aegis/force_reset", "".into(), json!({"confirm": "reset"})),
        ("POST", "/api/auth/mfa/reset", "".into(), json!({})),
        ("POST", "/api/auth/mfa/recovery-codes", "".into(), json!({})),
        ("POST", "/api/auth/tokens", "".into(), json!({"name": "x", "scopes": ["read"], "expires_in_days": 1})),
        ("POST", "/api/auth/passkeys/register/options", "".into(), json!({"label": "Key"})),
        ("POST", "/api/users", "".into(), json!({"username": "other", "password": PASSWORD, "role": "Admin"})),
        ("POST", "/api/users/{username}/reset_password", user("reset_password"), json!({"password": "an entirely new one"})),
        ("POST", "/api/users/{username}/role", user("role"), json!({"role": "Admin"})),
        ("POST", "/api/users/{username}/mfa", user("mfa"), json!({"enabled": false})),
        ("POST", "/api/github/token", "".into(), json!({"token": "ghp_x"})),
        ("POST", "/api/credentials", "".into(), json!({"name": "Other", "username": "deploy"})),
        ("PUT", "/api/credentials/{id}", credential.clone(), json!({"password": "x"})),
        ("DELETE", "/api/credentials/{id}", credential, json!({})),
        ("POST", "/api/directory/providers", "".into(), json!({"name": "Other"})),
        ("PATCH", "/api/directory/providers/{id}", provider.clone(), json!({"priority": 1})),
        ("DELETE", "/api/directory/providers/{id}", provider.clone(), json!({})),
        (
            "POST",
            "/api/directory/providers/{id}/lookup-user",
            format!("{provider}/lookup-user"),
            json!({"username": "x", "password": "x"}),
        ),
    ];
    let document = admin.get("/api/openapi.json").await.ok();
    let mut said = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            if operation["responses"]["403"]["description"].as_str().is_some_and(|why| why.contains("step_up_required")) {
                said.push(format!("{} {path}", method.to_uppercase()));
            }
        }
    }
    let mut tried: Vec<String> = rows.iter().map(|(method, route, ..)| format!("{method} {route}")).collect();
    // That one asks where there are many devices: `many_devices_need_a_fresh_proof_of_who_asks`.
    tried.push("POST /api/scripts/quick_run".to_owned());
    said.sort();
    tried.sort();
    assert_eq!(said, tried);

    let stale = admin.sign_in(ADMIN, PASSWORD, 1).await;
    engine.age_step_ups().await;
    for (method, route, path, body) in rows {
        let path = if path.is_empty() { route.to_owned() } else { path };
        let _ = stale.call(method, &path, Some(&body)).await.error(403, "step_up_required");
    }
}

#[tokio::test]
async fn an_address_has_twenty_failures() {
    let engine = TestEngine::start().await;
    engine.admin().await;
    let nobody = engine.anonymous();
    for attempt in 0..20 {
        let body = json!({"username": format!("nobody-{attempt}"), "password": "wrong"});
        assert_eq!(nobody.post("/api/auth/login", body).await.status, 401, "attempt {attempt}");
    }
    let _ = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.error(429, "rate_limited");
}

#[tokio::test]
async fn behind_a_known_proxy_each_client_counts_for_itself() {
    let engine = TestEngine::with(|settings| settings.trusted_proxies = "127.0.0.1".parse().expect("a list")).await;
    let admin = engine.admin().await;
    let nobody = engine.anonymous();
    let from = async |forwarded: &str, username: &str, password: &str| {
        let request = nobody.request(reqwest::Method::POST, "/api/auth/login").header("X-Forwarded-For", forwarded);
        nobody.send(request.json(&json!({"username": username, "password": password}))).await
    };
    for attempt in 0..20 {
        // What a client writes there itself does not count.
        let forwarded = format!("198.51.100.{attempt}, 203.0.113.5");
        assert_eq!(from(&forwarded, &format!("nobody-{attempt}"), "wrong").await.status, 401, "attempt {attempt}");
    }
    let _ = from("203.0.113.5", ADMIN, PASSWORD).await.error(429, "rate_limited");
    let _ = from("203.0.113.6", ADMIN, PASSWORD).await.ok();
    let event = &admin.get("/api/audit?action=session.login&outcome=failure&limit=1").await.ok()["events"][0];
    assert_eq!(event["ip"], "203.0.113.5", "{event}");
}

#[tokio::test]
async fn a_second_factor_that_is_forgotten_meanwhile_lets_nobody_in() {
    let engine = TestEngine::start().await;
    let user = engine.operator(&[]).await;
    let nobody = engine.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": user.name, "password": PASSWORD})).await.ok();
    // What takes it ends the sign-ins that are under way; this is as if it had come between.
    sqlx::query("UPDATE users SET mfa_secret_sealed = NULL WHERE username = $1")
        .bind(&user.name)
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    let code = totp::code(user.totp_secret.as_deref().expect("a secret"), 1);
    let body = json!({"pending_token": pending["pending_token"], "code": code});
    let _ = nobody.post("/api/auth/mfa/verify", body).await.error(403, "mfa_not_configured");
}

#[tokio::test]
async fn a_recovery_code_stands_once_for_the_app_and_goes_with_it() {
    const PATH: &str = "/api/auth/mfa/recovery-codes";
    let engine = TestEngine::start().await;
    let user = engine.operator(&[]).await;
    assert_eq!(user.get(PATH).await.ok(), json!({"left": 0, "made_at": 0}));
    let _ = user.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let make = async || -> Vec<String> {
        let made = user.post(PATH, json!({})).await.ok();
        serde_json::from_value(made["codes"].clone()).expect("codes")
    };
    let former = make().await;
    let codes = make().await;
    assert_eq!(codes.len(), 10);
    assert!(codes.iter().all(|code| !former.contains(code)));
    let kept: Vec<String> =
        sqlx::query_scalar("SELECT r::text FROM recovery_codes r UNION ALL SELECT a::text FROM audit_events a")
            .fetch_all(&engine.database.pool)
            .await
            .expect("the rows");
    assert!(codes.iter().all(|code| kept.iter().all(|row| !row.contains(code.as_str()))), "only hashes are kept");

    let nobody = engine.anonymous();
    let pending = async || {
        let login = json!({"username": user.name, "password": PASSWORD});
        nobody.post("/api/auth/login", login).await.ok()["pending_token"].clone()
    };
    let verify =
        async |code: &str| nobody.post("/api/auth/mfa/verify", json!({"pending_token": pending().await, "code": code})).await;
    let _ = verify(&former[0]).await.error(401, "invalid_code");
    assert_eq!(verify(&codes[0].to_lowercase()).await.ok()["username"], user.name);
    let _ = verify(&codes[0]).await.error(401, "invalid_code");
    assert_eq!(user.get(PATH).await.ok()["left"], 9);
    // Twice at the same moment, it works once.
    let (first, second) = (pending().await, pending().await);
    let both =
        [first, second].map(|token| nobody.post("/api/auth/mfa/verify", json!({"pending_token": token, "code": codes[1]})));
    let worked = futures::future::join_all(both).await.iter().filter(|reply| reply.status == 200).count();
    assert_eq!(worked, 1);
    // It is for signing in alone.
    let _ = user.post("/api/auth/step-up", json!({"code": codes[2]})).await.error(400, "invalid_code");

    let events = engine.admin().await.get("/api/audit?action=mfa.recovery_code_used").await.ok();
    assert_eq!(events["events"][0]["detail"]["left"], 8, "{events}");
    // Wrong ones count like wrong codes of the app.
    sqlx::query("DELETE FROM rate_counters").execute(&engine.database.pool).await.expect("a deletion");
    for _ in 0..5 {
        let _ = verify("AAAA-BBBB-CCCC-DDDD").await.error(401, "invalid_code");
    }
    let _ = verify(&codes[3]).await.error(429, "rate_limited");
    sqlx::query("DELETE FROM rate_counters").execute(&engine.database.pool).await.expect("a deletion");

    // They go with the app, and stand for none before there is one.
    let _ = user.post("/api/auth/mfa/reset", json!({})).await.ok();
    assert_eq!(user.get(PATH).await.ok()["left"], 0);
    let _ = user.post(PATH, json!({})).await.error(403, "mfa_not_configured");
    let _ = verify(&codes[4]).await.error(400, "invalid_code");
}

#[tokio::test]
async fn five_wrong_codes_end_a_sign_in() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let secret = admin.totp_secret.clone().expect("a secret");
    let nobody = engine.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.ok();
    let verify =
        |code: String| nobody.post("/api/auth/mfa/verify", json!({"pending_token": pending["pending_token"], "code": code}));
    for _ in 0..5 {
        let _ = verify(wrong_code(&secret)).await.error(401, "invalid_code");
    }
    let _ = verify(totp::code(&secret, 1)).await.error(401, "invalid_session");
    let pending = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.ok();
    let body = json!({"pending_token": pending["pending_token"], "code": totp::code(&secret, 1)});
    let _ = nobody.post("/api/auth/mfa/verify", body).await.error(429, "rate_limited");
}

#[tokio::test]
async fn a_restart_and_a_second_process_come_back_open_with_the_key_file_and_locked_without() {
    let engine = TestEngine::start().await;
    let before = engine.second().await;
    let admin = engine.admin().await;
    // A process that was there before the set-up follows it.
    let _ = admin.at(&before.base).get("/api/auth/me").await.ok();
    before.stop().await;
    let after = engine.second().await;
    let _ = admin.at(&after.base).get("/api/auth/me").await.ok();
    after.stop().await;

    let key = engine.state_dir().join("secrets/unseal.key");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).expect("a key file").permissions());
    assert_eq!(mode & 0o777, 0o600);
    std::fs::remove_file(&key).expect("a key file");
    let locked = engine.stranger().await;
    let nobody = Actor::anonymous(&locked.base);
    let state = nobody.get("/api/bootstrap/state").await.ok();
    assert_eq!(state, json!({"phase": "aegis_unlock_required", "configured": true, "locked": true}));
    let _ = admin.at(&locked.base).get("/api/auth/me").await.error(401, "unauthorized");
    let login = json!({"username": ADMIN, "password": PASSWORD});
    let _ = nobody.post("/api/auth/login", login).await.error(423, "bootstrap_required");
    // The first process is not concerned.
    let _ = admin.get("/api/auth/me").await.ok();

    let unlock = |cipher: &'static str| nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": cipher}));
    let _ = unlock("").await.error(400, "invalid_request");
    let _ = unlock("not the passphrase").await.error(401, "invalid_cipher");
    assert_eq!(unlock(CIPHER).await.ok()["phase"], "login_required");
    let _ = admin.at(&locked.base).get("/api/auth/me").await.ok();
    assert!(key.exists(), "unlocking writes the key file anew");
    locked.stop().await;

    std::fs::remove_file(&key).expect("a key file");
    let locked = engine.stranger().await;
    let nobody = Actor::anonymous(&locked.base);
    let unlock = |cipher: &'static str| nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": cipher}));
    for _ in 0..4 {
        let _ = unlock("not the passphrase").await.error(401, "invalid_cipher");
    }
    let _ = unlock(CIPHER).await.error(429, "rate_limited");
    locked.stop().await;
}

#[tokio::test]
async fn another_cipher_opens_the_engine_and_nothing_stops_meanwhile() {
    const NEW: &str = "an entirely new passphrase";
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let second = engine.second().await;
    let rotate = |current: &'static str, new: &'static str| {
        admin.post("/api/aegis/rotate", json!({"current_cipher": current, "new_cipher": new}))
    };
    engine.age_step_ups().await;
    let _ = rotate(CIPHER, NEW).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    for (current, new) in [(CIPHER, "too short"), (CIPHER, CIPHER), (CIPHER, " not trimmed, refused")] {
        let reply = rotate(current, new).await.error(400, "invalid_request");
        assert!(reply.body["fields"]["new_cipher"].is_string(), "{}", reply.text);
    }
    let _ = rotate("not the passphrase", NEW).await.error(401, "invalid_cipher");
    let done = rotate(CIPHER, NEW).await.ok();
    assert_eq!((&done["status"], &done["configured"], &done["locked"]), (&json!("ok"), &json!(true), &json!(false)));
    let _ = rotate(CIPHER, NEW).await.error(401, "invalid_cipher");
    // The running processes go on, and what was sealed before still opens.
    for base in [&engine.node.base, &second.base] {
        let login = json!({"username": ADMIN, "password": PASSWORD});
        assert_eq!(Actor::anonymous(base).post("/api/auth/login", login).await.ok()["status"], "mfa_required");
    }
    second.stop().await;
    // The key file stays good.
    let third = engine.second().await;
    let _ = admin.at(&third.base).get("/api/auth/me").await.ok();
    third.stop().await;

    std::fs::remove_file(engine.state_dir().join("secrets/unseal.key")).expect("a key file");
    let locked = engine.stranger().await;
    let unlock = |cipher: &'static str| {
        let nobody = Actor::anonymous(&locked.base);
        async move { nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": cipher})).await }
    };
    let _ = unlock(CIPHER).await.error(401, "invalid_cipher");
    assert_eq!(unlock(NEW).await.ok()["phase"], "login_required");
    locked.stop().await;
    let events = admin.get("/api/audit?action=aegis.rotate").await.ok();
    let outcomes: Vec<_> = events["events"].as_array().expect("events").iter().map(|event| event["outcome"].clone()).collect();
    assert_eq!(outcomes, ["failure", "success", "failure"]);
}

#[tokio::test]
async fn the_set_up_is_for_this_machine_or_the_setup_token() {
    let engine = TestEngine::start().await;
    let nobody = engine.anonymous();
    let setup = |headers: &[(&str, &str)]| {
        let mut request = nobody.request(reqwest::Method::POST, "/api/bootstrap/aegis/setup").json(&json!({"cipher": CIPHER}));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        nobody.send(request)
    };
    for header in ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"] {
        let _ = setup(&[(header, "127.0.0.1")]).await.error(403, "setup_token_required");
    }
    // A name of somebody else's that points here.
    let _ = setup(&[("Host", "rebound.example")]).await.error(403, "setup_token_required");
    let _ = setup(&[("X-Forwarded-For", "127.0.0.1"), ("X-Borealis-Setup-Token", "")]).await.error(403, "setup_token_required");
    // A foreign page in a browser on this machine.
    let _ = setup(&[("Origin", "https://evil.example")]).await.error(403, "bad_origin");
    let _ = setup(&[("Origin", "null")]).await.error(403, "bad_origin");
    let _ = setup(&[("Sec-Fetch-Site", "cross-site")]).await.error(403, "bad_origin");
    assert_eq!(phase(&engine).await, "aegis_setup_required");

    let file = engine.state_dir().join("secrets/setup.token");
    let token = std::fs::read_to_string(&file).expect("a setup token");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).expect("a file").permissions());
    assert_eq!(mode & 0o777, 0o600);
    let _ = setup(&[("X-Forwarded-For", "192.0.2.1"), ("X-Borealis-Setup-Token", token.trim())]).await.expect(200);
    let pending = nobody.post("/api/bootstrap/admin/setup", json!({"username": ADMIN, "password": PASSWORD})).await.ok();
    let code = totp::code(pending["secret"].as_str().expect("a secret"), 0);
    let body = json!({"pending_token": pending["pending_token"], "code": code});
    let _ = nobody.post("/api/bootstrap/admin/mfa/verify", body).await.expect(200);
    assert!(!file.exists(), "the token outlives the set-up");
}

#[tokio::test]
async fn logout_ends_the_session_everywhere() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let second = engine.second().await;
    let reply = admin.post("/api/auth/logout", json!({})).await.expect(200);
    assert!(
        reply.header("set-cookie").is_some_and(|cookie| cookie.starts_with("borealis_auth=;") && cookie.contains("Max-Age=0"))
    );
    let _ = admin.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = admin.at(&second.base).get("/api/auth/me").await.error(401, "unauthorized");
    assert_eq!(admin.post("/api/auth/logout", json!({})).await.ok(), json!({"status": "ok"}));
    assert_eq!(engine.anonymous().call("POST", "/api/auth/logout", None).await.ok(), json!({"status": "ok"}));
    second.stop().await;
}

#[tokio::test]
async fn sessions_end_when_idle_and_when_old() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let pool = &engine.database.pool;
    let _ = admin.get("/api/auth/me").await.ok();
    sqlx::query("UPDATE operator_sessions SET last_seen_at = now() - interval '12 hours 1 second'").execute(pool).await.unwrap();
    let _ = admin.get("/api/auth/me").await.error(401, "unauthorized");
    // A request renews the idle time, though not at every request.
    sqlx::query("UPDATE operator_sessions SET last_seen_at = now() - interval '11 hours'").execute(pool).await.unwrap();
    let _ = admin.get("/api/auth/me").await.ok();
    let idle: f64 = sqlx::query_scalar("SELECT extract(epoch FROM now() - last_seen_at)::float8 FROM operator_sessions")
        .fetch_one(pool)
        .await
        .unwrap();
    assert!(idle < 30.0, "{idle}");
    let version =
        async || -> String { sqlx::query_scalar("SELECT xmin::text FROM operator_sessions").fetch_one(pool).await.unwrap() };
    let before = version().await;
    let _ = admin.get("/api/auth/me").await.ok();
    assert_eq!(before, version().await, "a request wrote the session again within a minute");
    sqlx::query("UPDATE operator_sessions SET expires_at = now()").execute(pool).await.unwrap();
    let _ = admin.get("/api/auth/me").await.error(401, "unauthorized");
}

#[tokio::test]
async fn cookies_and_tokens_are_handed_out_as_promised() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let secret = admin.totp_secret.clone().expect("a secret");
    let nobody = engine.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.expect(200);
    assert!(pending.header("set-cookie").is_none(), "a half-done sign-in hands out a cookie");
    // As a browser: no token in the body.
    let body = json!({"pending_token": pending.body["pending_token"], "code": totp::code(&secret, 1)});
    let request =
        nobody.request(reqwest::Method::POST, "/api/auth/mfa/verify").header("Sec-Fetch-Site", "same-origin").json(&body);
    let done = nobody.send(request).await.expect(200);
    assert!(done.body.get("token").is_none(), "{}", done.text);
    let cookie = done
        .headers
        .iter()
        .find_map(|(name, value)| (name == "set-cookie" && value.starts_with("borealis_auth=")).then_some(value.as_str()))
        .expect("a session cookie");
    let attributes: Vec<&str> = cookie.split("; ").skip(1).collect();
    assert_eq!(attributes, ["HttpOnly", "SameSite=Strict", "Path=/"], "plain http on loopback");
    let value = cookie["borealis_auth=".len()..].split(';').next().expect("a value");
    assert_eq!(value.len(), 43);
    let browser = Actor { credential: Credential::Cookie(value.to_owned()), ..nobody };
    let _ = browser.get("/api/auth/me").await.ok();
    let stored: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT token_hash FROM operator_sessions").fetch_all(&engine.database.pool).await.unwrap();
    assert!(stored.iter().all(|hash| hash.len() == 32 && hash.as_slice() != value.as_bytes()));

    let secure = TestEngine::with(|settings| {
        settings.public_base_url = "https://rmm.example/".parse().expect("a URL");
    })
    .await;
    let secret = secure.admin().await.totp_secret.expect("a secret");
    let nobody = secure.anonymous();
    let pending = nobody.post("/api/auth/login", json!({"username": ADMIN, "password": PASSWORD})).await.ok();
    let body = json!({"pending_token": pending["pending_token"], "code": totp::code(&secret, 1)});
    let done = nobody.post("/api/auth/mfa/verify", body).await.expect(200);
    assert_eq!(done.headers.iter().filter(|(name, _)| name == "set-cookie").count(), 2);
    for (_, cookie) in done.headers.iter().filter(|(name, _)| name == "set-cookie") {
        assert!(cookie.ends_with("; Secure"), "{cookie}");
    }
}

#[tokio::test]
async fn every_client_but_a_browser_page_gets_the_token() {
    let engine = TestEngine::start().await;
    let _ = engine.admin().await;
    let username = engine.user("User", &[]).await;
    sqlx::query("UPDATE users SET mfa_disabled = true WHERE username = $1")
        .bind(&username)
        .execute(&engine.database.pool)
        .await
        .unwrap();
    let body = json!({"username": username, "password": PASSWORD}).to_string();
    let sign_in = async |headers: &[(&str, &str)]| {
        let mut text = format!("POST /api/auth/login HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", engine.addr);
        let length = body.len().to_string();
        for (name, value) in headers.iter().chain(&[("Content-Type", "application/json"), ("Content-Length", length.as_str())]) {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        raw::send(engine.addr, format!("{text}\r\n{body}").as_bytes()).await.expect(200).body["token"].is_string()
    };
    for program in [&[][..], &[("Accept", "*/*")], &[("Accept", "text/plain")], &[("Cookie", "theirs=1")]] {
        assert!(sign_in(program).await, "{program:?}");
    }
    for page in [
        &[("Accept", "application/json"), ("Sec-Fetch-Site", "same-origin")][..],
        &[("Cookie", "borealis_auth=former")],
        &[("Cookie", "a=b; borealis_device=x")],
    ] {
        assert!(!sign_in(page).await, "{page:?}");
    }
}

#[tokio::test]
async fn the_set_up_behind_a_silent_proxy_needs_the_setup_token() {
    let engine = TestEngine::with(|settings| settings.public_base_url = "https://rmm.example/".parse().expect("a URL")).await;
    let port = free_port();
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("haproxy.cfg");
    let text = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n\
         frontend here\n bind 127.0.0.1:{port}\n default_backend engine\nbackend engine\n server engine {}\n",
        engine.addr
    );
    std::fs::write(&config, text).expect("a configuration");
    let mut processes = Processes::new();
    let proxy = Path::new("/usr/sbin/haproxy");
    let _proxy = processes.start_program(proxy, &["-db", "-f", config.to_str().expect("a path")]);
    eventually("the proxy listens", Duration::from_secs(30), async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;
    // As it comes from anywhere, through the proxy, under a name of this machine; and past it.
    let through = Actor::anonymous(&format!("http://localhost:{port}").parse().expect("a URL"));
    let token = std::fs::read_to_string(engine.state_dir().join("secrets/setup.token"));
    for nobody in [&through, &engine.anonymous()] {
        let reply = nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER})).await;
        let _ = reply.error(403, "setup_token_required");
    }
    let token = token.or_else(|_| std::fs::read_to_string(engine.state_dir().join("secrets/setup.token"))).expect("a token");
    let request = through.request(reqwest::Method::POST, "/api/bootstrap/aegis/setup").json(&json!({"cipher": CIPHER}));
    let _ = through.send(request.header("X-Borealis-Setup-Token", token.trim())).await.expect(200);
}

#[tokio::test]
async fn nothing_is_local_with_trusted_proxies() {
    let engine = TestEngine::with(|settings| settings.trusted_proxies = "192.0.2.0/24".parse().expect("a network")).await;
    let reply = engine.anonymous().post("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER})).await;
    let _ = reply.error(403, "setup_token_required");
}

#[tokio::test]
async fn the_setup_token_of_one_process_is_accepted_by_all() {
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::Manual).await;
    let _ = engine.admin().await;
    // Two processes with state folders of their own, behind a balancer, and both locked.
    let (first, second) = (engine.stranger_with("first", |_| {}).await, engine.stranger_with("second", |_| {}).await);
    let unlock = async |node: &Node, token: &str| {
        let nobody = Actor::anonymous(&node.base);
        let request = nobody.request(reqwest::Method::POST, "/api/bootstrap/aegis/unlock").json(&json!({"cipher": CIPHER}));
        nobody.send(request.header("X-Forwarded-For", "192.0.2.1").header("X-Borealis-Setup-Token", token)).await
    };
    let token_of = async |name: &str| {
        let file = engine.state_dir().join(name).join("secrets/setup.token");
        eventually("there is a setup token", Duration::from_secs(30), async || std::fs::read_to_string(&file).ok()).await
    };
    let (of_first, of_second) = (token_of("first").await, token_of("second").await);
    assert_ne!(of_first, of_second);
    let _ = unlock(&first, &sessions::new_token().expose().clone()).await.error(403, "setup_token_required");
    eventually("the token of one counts at the other", Duration::from_secs(30), async || {
        (unlock(&first, of_second.trim()).await.status == 200).then_some(())
    })
    .await;
    assert!(!engine.state_dir().join("first/secrets/setup.token").exists(), "it goes with the end of the set-up");
    // The other is still locked, and takes its own.
    let _ = unlock(&second, of_second.trim()).await.expect(200);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_change_with_a_cookie_must_come_from_our_own_page() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let cookie = format!("borealis_auth={}", token(&admin));
    let nobody = engine.anonymous();
    let own = format!("http://{}", engine.addr);
    let send = |headers: &[(&str, &str)], body: &'static str| {
        let mut request = nobody.request(reqwest::Method::POST, "/api/sites").header("Cookie", &cookie).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        nobody.send(request)
    };
    let json_type = ("Content-Type", "application/json");
    for headers in [
        &[json_type][..],
        &[json_type, ("Origin", "https://evil.example")],
        &[json_type, ("Origin", "null")],
        &[json_type, ("Origin", "https://evil.example"), ("Sec-Fetch-Site", "same-origin")],
        &[json_type, ("Origin", &format!("{own}.evil.example"))],
        &[json_type, ("Sec-Fetch-Site", "same-site")],
        &[json_type, ("Sec-Fetch-Site", "none")],
    ] {
        let reply = send(headers, r#"{"name": "evil"}"#).await;
        assert_eq!((reply.status, reply.body["error"].as_str()), (403, Some("bad_origin")), "{headers:?}: {}", reply.text);
    }
    for wrong in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx"] {
        let _ =
            send(&[("Content-Type", wrong), ("Origin", &own)], r#"{"name": "evil"}"#).await.error(415, "unsupported_media_type");
    }
    let _ = send(&[("Origin", &own)], r#"{"name": "evil"}"#).await.error(415, "unsupported_media_type");
    let request = nobody
        .request(reqwest::Method::POST, "/api/auth/logout")
        .header("Cookie", &cookie)
        .header("Origin", "https://evil.example");
    let _ = nobody.send(request).await.error(403, "bad_origin");
    assert_eq!(admin.get("/api/sites").await.ok()["sites"], json!([]), "a refused request made a site");

    let _ = send(&[json_type, ("Origin", &own)], r#"{"name": "one"}"#).await.expect(201);
    let utf8 = ("Content-Type", "application/json; charset=utf-8");
    let _ = send(&[utf8, ("Sec-Fetch-Site", "same-origin")], r#"{"name": "two"}"#).await.expect(201);
    // Reading needs neither, and a bearer token is no cookie.
    let request =
        nobody.request(reqwest::Method::GET, "/api/sites").header("Cookie", &cookie).header("Origin", "https://evil.example");
    let _ = nobody.send(request).await.expect(200);
    let request = admin.request(reqwest::Method::POST, "/api/sites").body(r#"{"name": "three"}"#);
    let _ = admin.send(request).await.expect(201);
}

#[tokio::test]
async fn a_role_counts_from_the_next_request_and_ends_no_session() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Berlin").await;
    let other = engine.second_admin().await;
    let set = |role: &'static str| admin.post_to_role(&other.name, role);
    let _ = other.get("/api/users").await.ok();
    let _ = set("user").await.ok();
    let _ = other.get("/api/users").await.error(403, "forbidden");
    assert_eq!(other.get("/api/sites").await.ok()["sites"], json!([]), "no assignment is no site");
    let body = json!({"usernames": [other.name.to_uppercase()], "site_ids": [site, site, 0]});
    let assigned = admin.post("/api/user_site_assignments/assign", body).await.ok();
    assert_eq!(assigned, json!({"status": "ok", "assigned_user_count": 1, "assigned_site_ids": [site]}));
    assert_eq!(other.get("/api/sites").await.ok()["sites"][0]["id"], site);
    // A session that was left open makes no administrators, neither of users nor anew.
    let aged = "UPDATE operator_sessions SET stepped_up_at = NULL";
    let _ = sqlx::query(aged).execute(&engine.database.pool).await.expect("an update");
    let _ = set("Admin").await.error(403, "step_up_required");
    let new = json!({"username": "mallory", "password": PASSWORD, "role": "admin"});
    let _ = admin.post("/api/users", new).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = set("Admin").await.ok();
    let _ = other.get("/api/users").await.ok();
    let _ = set("owner").await.error(400, "invalid role");
}

trait Roles {
    async fn post_to_role(&self, username: &str, role: &str) -> borealis_tests::Reply;
}

impl Roles for Actor {
    async fn post_to_role(&self, username: &str, role: &str) -> borealis_tests::Reply {
        self.post(&format!("/api/users/{username}/role"), json!({"role": role})).await
    }
}

#[tokio::test]
async fn the_last_administrator_stays() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let _ = admin.delete(&format!("/api/users/{ADMIN}")).await.error(400, "last_user");
    let user = engine.user("User", &[]).await;
    let _ = admin.post_to_role(ADMIN, "User").await.error(400, "cannot demote the last admin");
    let _ = admin.delete(&format!("/api/users/{ADMIN}")).await.error(400, "cannot_delete_self");
    let other = engine.second_admin().await;
    // Each takes the other's role away, at the same moment: one of them must be left.
    let (one, two) = tokio::join!(admin.post_to_role(&other.name, "User"), other.post_to_role(ADMIN, "User"));
    let mut statuses = [one.status, two.status];
    statuses.sort_unstable();
    assert!(statuses == [200, 400] || statuses == [200, 403], "{} {}", one.text, two.text);
    let admins: i64 =
        sqlx::query_scalar("SELECT count(*) FROM users WHERE role = 'Admin'").fetch_one(&engine.database.pool).await.unwrap();
    assert_eq!(admins, 1);
    assert_eq!(phase(&engine).await, "login_required");
    let left = if admin.get("/api/users").await.status == 200 { &admin } else { &other };
    let _ = left.delete(&format!("/api/users/{}", user.to_uppercase())).await.ok();
    let _ = left.delete(&format!("/api/users/{user}")).await.error(404, "user not found");
}

#[tokio::test]
async fn users_are_made_listed_and_removed() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    for (body, code, field) in [
        (json!({"password": PASSWORD}), "username and password are required", "username"),
        (json!({"username": "ada"}), "username and password are required", "password"),
        (json!({"username": "ada", "password_sha512": "12"}), "username and password are required", "password"),
        (json!({"username": "a\\b", "password": PASSWORD}), "invalid_username", "username"),
        (json!({"username": "ada", "password": "short"}), "password_too_short", "password"),
        (json!({"username": "ada", "password": PASSWORD, "role": "root"}), "invalid role", "role"),
        (
            json!({"username": "ada", "password": PASSWORD, "display_name": "x".repeat(201)}),
            "invalid_display_name",
            "display_name",
        ),
    ] {
        let reply = admin.post("/api/users", body).await.error(400, code);
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
    let unknown = json!({"username": "ada", "password": PASSWORD, "is_admin": true});
    let _ = admin.post("/api/users", unknown).await.error(400, "invalid_json");
    let ada = json!({"username": " Ada ", "display_name": "Ada L.", "password": PASSWORD, "role": "USER"});
    assert_eq!(admin.post("/api/users", ada.clone()).await.ok(), json!({"status": "ok"}));
    let _ =
        admin.post("/api/users", json!({"username": "aDA", "password": PASSWORD})).await.error(409, "username already exists");
    let users = admin.get("/api/users").await.ok()["users"].clone();
    let names: Vec<&str> = users.as_array().expect("a list").iter().filter_map(|user| user["username"].as_str()).collect();
    assert_eq!(names, ["Ada", ADMIN]);
    let listed = &users[0];
    assert_eq!((&listed["role"], &listed["mfa_enabled"], &listed["last_login"]), (&json!("User"), &json!(1), &json!(0)));
    assert!(listed["created_at"].as_i64().is_some_and(|at| at > 1_700_000_000));

    let ada = engine.anonymous().sign_in("ada", PASSWORD, 0).await;
    // The administrator who has made the account does not know its lasting password.
    let _ = ada.get("/api/sites").await.error(403, "password_change_required");
    let chosen = json!({"current_password": PASSWORD, "new_password": "one of her own choosing"});
    let _ = ada.post("/api/auth/password/reset", chosen).await.ok();
    for (method, path) in [
        ("GET", "/api/users"),
        ("POST", "/api/users"),
        ("DELETE", "/api/users/admin"),
        ("POST", "/api/users/admin/role"),
        ("POST", "/api/users/admin/reset_password"),
        ("POST", "/api/user_site_assignments/selection"),
        ("POST", "/api/user_site_assignments/assign"),
        ("POST", "/api/sites"),
        ("POST", "/api/sites/delete"),
        ("POST", "/api/sites/assign"),
        ("POST", "/api/sites/rename"),
        ("POST", "/api/sites/1/auto-approval"),
        ("POST", "/api/sites/1/rotate-enrollment-code"),
    ] {
        let _ = ada.call(method, path, Some(&json!({}))).await.error(403, "forbidden");
    }
    let _ = admin.delete("/api/users/ada").await.ok();
    let _ = ada.get("/api/auth/me").await.error(401, "unauthorized");
}

#[tokio::test]
async fn site_assignments_are_selected_and_replaced() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let ((berlin, _), (aachen, _)) = (engine.site("Berlin").await, engine.site("aachen").await);
    let (one, two) = (engine.user("User", &[berlin, aachen]).await, engine.user("User", &[berlin]).await);
    let select = |names: Value| admin.post("/api/user_site_assignments/selection", json!({"usernames": names}));
    let found = select(json!([two, one.to_uppercase(), two])).await.ok();
    let names: Vec<&Value> = found["users"].as_array().expect("a list").iter().map(|user| &user["username"]).collect();
    assert_eq!(names, [&json!(two), &json!(one)]);
    assert_eq!((&found["has_mixed_assignments"], &found["selected_site_ids"]), (&json!(true), &json!([])));
    assert!(found["warning"].as_str().is_some_and(|text| !text.is_empty()));
    assert_eq!(found["existing_assignments"][&one], json!([{"id": aachen, "name": "aachen"}, {"id": berlin, "name": "Berlin"}]));
    assert_eq!(found["sites"][0]["name"], "aachen");
    let found = select(json!([two])).await.ok();
    assert_eq!((&found["selected_site_ids"], &found["warning"]), (&json!([berlin]), &json!("")));

    let _ = select(json!([])).await.error(400, "users_required");
    let reply = select(json!([one, "ghost"])).await.error(404, "user_not_found");
    assert_eq!(reply.body["usernames"], json!(["ghost"]));
    let _ = select(json!([ADMIN, one])).await.error(400, "admin_selected");
    let assign = |names: Value, sites: Value| {
        admin.post("/api/user_site_assignments/assign", json!({"usernames": names, "site_ids": sites}))
    };
    let reply = assign(json!([one]), json!([berlin, 9999])).await.error(404, "site_not_found");
    assert_eq!(reply.body["site_ids"], json!([9999]));
    let _ = assign(json!([one, ADMIN]), json!([])).await.error(400, "admin_selected");
    assert_eq!(select(json!([one])).await.ok()["selected_site_ids"], json!([berlin, aachen]), "a refused change counted");
    let _ = assign(json!([one, two]), json!([])).await.ok();
    let found = select(json!([one, two])).await.ok();
    assert_eq!((&found["selected_site_ids"], &found["has_mixed_assignments"]), (&json!([]), &json!(false)));
}

#[tokio::test]
async fn the_own_password_changes_and_other_sessions_end() {
    const NEW: &str = "another horse battery";
    let engine = TestEngine::start().await;
    let _ = engine.admin().await;
    let here = engine.operator(&[]).await;
    let there = engine.anonymous().with_secret(&here).sign_in(&here.name, PASSWORD, 1).await;
    let change = |body: Value| here.post("/api/auth/password/reset", body);
    for (body, code, field) in [
        (json!({"new_password": NEW}), "invalid current password", "current_password"),
        (json!({"current_password": PASSWORD}), "invalid new password", "new_password"),
        (json!({"current_password_sha512": "x", "new_password": NEW}), "invalid current password", "current_password"),
        (json!({"current_password": PASSWORD, "new_password_sha512": "x"}), "invalid new password", "new_password"),
        (json!({"current_password": PASSWORD, "new_password": "short"}), "password_too_short", "new_password"),
        (
            json!({"current_password": PASSWORD, "new_password": PASSWORD}),
            "new password must differ from the current password",
            "new_password",
        ),
    ] {
        let reply = change(body).await.error(400, code);
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
    let _ = change(json!({"current_password": "wrong", "new_password": NEW})).await.error(401, "invalid current password");
    let _ = there.get("/api/auth/me").await.ok();
    let _ = change(json!({"current_password": PASSWORD, "new_password": NEW})).await.ok();
    let _ = here.get("/api/auth/me").await.ok();
    let _ = there.get("/api/auth/me").await.error(401, "unauthorized");
    let login = |password: &'static str| {
        let nobody = engine.anonymous();
        let body = json!({"username": here.name, "password": password});
        async move { nobody.post("/api/auth/login", body).await }
    };
    let _ = login(PASSWORD).await.error(401, "invalid username or password");
    let _ = login(NEW).await.expect(200);
}

#[tokio::test]
async fn the_own_sessions_are_listed_and_ended() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let here = engine.operator(&[]).await;
    let there = engine.anonymous().with_secret(&here).sign_in(&here.name, PASSWORD, 1).await;
    let list =
        async |actor: &Actor| actor.get("/api/auth/sessions").await.ok()["sessions"].as_array().cloned().expect("sessions");
    let found = list(&here).await;
    assert_eq!(found.len(), 2, "{found:?}");
    let current: Vec<_> = found.iter().filter(|session| session["current"] == true).collect();
    assert_eq!(current.len(), 1);
    assert_eq!(current[0]["ip"], "127.0.0.1");
    assert!(found.iter().all(|session| !session.to_string().contains(token(&there))), "{found:?}");
    let id = |session: &Value| session["id"].as_str().expect("an id").to_owned();
    let other = found.iter().find(|session| session["current"] == false).map(id).expect("the other one");

    // Of others neither the list nor the end; what is not there looks the same.
    assert!(list(&admin).await.iter().all(|session| id(session) != other));
    let foreign = admin.delete(&format!("/api/auth/sessions/{other}")).await.error(404, "session_not_found");
    let nothing = admin.delete(&format!("/api/auth/sessions/{}", uuid::Uuid::new_v4())).await.error(404, "session_not_found");
    assert_eq!(foreign.body["message"], nothing.body["message"]);
    let _ = admin.delete("/api/auth/sessions/none").await.expect(404);
    let _ = there.get("/api/auth/me").await.ok();

    let _ = there.delete(&format!("/api/auth/sessions/{}", id(current[0]))).await.ok();
    let _ = here.get("/api/auth/me").await.error(401, "unauthorized");
    assert_eq!(list(&there).await.len(), 1);
    assert_eq!(there.delete("/api/auth/sessions").await.ok(), json!({"status": "ok", "ended": 0}), "the own one stays");
    // The one it is asked with, too: a sign-out.
    let _ = there.delete(&format!("/api/auth/sessions/{other}")).await.ok();
    let _ = there.get("/api/auth/me").await.error(401, "unauthorized");

    let elsewhere = engine.operator(&[]).await;
    let kept = engine.anonymous().with_secret(&elsewhere).sign_in(&elsewhere.name, PASSWORD, 1).await;
    assert_eq!(kept.delete("/api/auth/sessions").await.ok(), json!({"status": "ok", "ended": 1}));
    let _ = elsewhere.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = kept.get("/api/auth/me").await.ok();
    let ended = admin.get("/api/audit?action=session.end").await.ok();
    assert_eq!(ended["events"].as_array().map(Vec::len), Some(3), "{ended}");
}

trait WithSecret {
    fn with_secret(self, other: &Actor) -> Actor;
}

impl WithSecret for Actor {
    fn with_secret(self, other: &Actor) -> Actor {
        Actor { totp_secret: other.totp_secret.clone(), ..self }
    }
}

#[tokio::test]
async fn a_password_set_by_an_administrator_must_be_replaced_by_its_user() {
    const GIVEN: &str = "given by the admin";
    const OWN: &str = "chosen by the user";
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let user = engine.operator(&[]).await;
    let path = format!("/api/users/{}/reset_password", user.name);
    engine.age_step_ups().await;
    let _ = admin.post(&path, json!({"password": GIVEN})).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let reply = admin.post(&path, json!({"password": "short"})).await.error(400, "password_too_short");
    assert!(reply.body["fields"]["password"].is_string(), "{}", reply.text);
    let _ = admin.post(&path, json!({"password_sha512": "x"})).await.error(400, "invalid password");
    let _ = admin.post("/api/users/ghost/reset_password", json!({"password": GIVEN})).await.error(404, "user not found");
    let own = format!("/api/users/{ADMIN}/reset_password");
    let _ = admin.post(&own, json!({"password": GIVEN})).await.error(400, "cannot_reset_self");
    let _ = user.get("/api/auth/me").await.ok();
    let _ = admin.post(&path, json!({"password": GIVEN})).await.ok();
    let _ = user.get("/api/auth/me").await.error(401, "unauthorized");

    // The second factor is set up anew, and nothing else opens before the user's own password.
    let user = engine.anonymous().sign_in(&user.name, GIVEN, 0).await;
    assert_eq!(user.get("/api/auth/me").await.ok()["password_change_required"], true);
    let _ = user.get("/api/sites").await.error(403, "password_change_required");
    let _ = user.post("/api/auth/password/reset", json!({"current_password": GIVEN, "new_password": OWN})).await.ok();
    assert_eq!(user.get("/api/sites").await.ok()["sites"], json!([]));
    assert_eq!(user.get("/api/auth/me").await.ok()["password_change_required"], false);
}

#[tokio::test]
async fn the_second_factor_is_forgotten_only_after_a_step_up() {
    let engine = TestEngine::start().await;
    let _ = engine.admin().await;
    let user = engine.operator(&[]).await;
    let other = engine.anonymous().with_secret(&user).sign_in(&user.name, PASSWORD, 1).await;
    engine.age_step_ups().await;
    let reset = || user.post("/api/auth/mfa/reset", json!({}));
    let _ = reset().await.error(403, "step_up_required");
    let step_up = |body: Value| user.post("/api/auth/step-up", body);
    let _ = step_up(json!({})).await.error(400, "password_or_code_required");
    let _ = step_up(json!({"password": "wrong"})).await.error(401, "invalid current password");
    let _ = step_up(json!({"code": "12"})).await.error(400, "invalid_code");
    let secret = user.totp_secret.clone().expect("a secret");
    // The other sign-in has used the next step already.
    let _ = step_up(json!({"code": totp::code(&secret, 0)})).await.error(401, "invalid_code");
    let _ = reset().await.error(403, "step_up_required");
    assert_eq!(step_up(json!({"password": PASSWORD})).await.ok()["expires_in"], 300);
    // It is this session's, and it wears off.
    let _ = other.post("/api/auth/mfa/reset", json!({})).await.error(403, "step_up_required");
    engine.age_step_ups().await;
    let _ = reset().await.error(403, "step_up_required");
    let _ = step_up(json!({"password": PASSWORD})).await.ok();
    let done = reset().await.ok();
    assert_eq!(done, json!({"status": "ok", "username": user.name, "mfa_enabled": true, "setup_required_on_next_login": true}));
    let _ = user.get("/api/auth/me").await.ok();
    let _ = other.get("/api/auth/me").await.error(401, "unauthorized");
    let pending = engine.anonymous().post("/api/auth/login", json!({"username": user.name, "password": PASSWORD})).await.ok();
    assert_eq!(pending["stage"], "setup");
    assert_ne!(pending["secret"], secret);
}

#[tokio::test]
async fn a_sign_in_with_a_second_factor_is_a_step_up() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let tokens = "/api/auth/tokens";
    let body = |name: &str| json!({"name": name, "scopes": ["read"], "expires_in_days": 1});
    let _ = admin.post(tokens, body("after the set-up")).await.ok();
    let operator = engine.operator(&[]).await;
    let _ = operator.post(tokens, body("after an app")).await.ok();
    engine.age_step_ups().await;
    let _ = operator.post(tokens, body("later")).await.error(403, "step_up_required");

    // A recovery code stands for an app that is gone, and a password alone is one factor.
    let _ = operator.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let codes = operator.post("/api/auth/mfa/recovery-codes", json!({})).await.ok()["codes"].clone();
    let login = json!({"username": operator.name, "password": PASSWORD});
    let pending = engine.anonymous().post("/api/auth/login", login.clone()).await.ok();
    let code = json!({"pending_token": pending["pending_token"], "code": codes[0]});
    let done = engine.anonymous().post("/api/auth/mfa/verify", code).await.ok();
    let recovered = engine.anonymous().signed_in(&operator.name, PASSWORD, "", &done);
    let _ = recovered.post(tokens, body("after a code")).await.error(403, "step_up_required");
    let off = format!("/api/users/{}/mfa", operator.name);
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post(&off, json!({"enabled": false})).await.ok();
    let done = engine.anonymous().post("/api/auth/login", login).await.ok();
    let signed_in = engine.anonymous().signed_in(&operator.name, PASSWORD, "", &done);
    let _ = signed_in.post(tokens, body("after a password")).await.error(403, "step_up_required");
}

#[tokio::test]
async fn sites_are_made_renamed_and_deleted() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let create = |body: Value| admin.post("/api/sites", body);
    for (body, code, field) in [
        (json!({}), "name is required", "name"),
        (json!({"name": "  "}), "name is required", "name"),
        (json!({"name": "x".repeat(201)}), "invalid_name", "name"),
        (json!({"name": "x", "description": "x".repeat(2001)}), "invalid_description", "description"),
    ] {
        let reply = create(body).await.error(400, code);
        assert!(reply.body["fields"][field].is_string(), "{}", reply.text);
    }
    let site = create(json!({"name": " Berlin ", "description": "HQ"})).await.expect(201).body;
    let id = site["id"].as_i64().expect("an id");
    assert_eq!((&site["name"], &site["device_count"], &site["auto_approve_until"]), (&json!("Berlin"), &json!(0), &json!(0)));
    let code = site["enrollment_code"].as_str().expect("a code");
    assert!(code.len() == 39 && code.split('-').all(|group| group.len() == 4), "{code}");
    let _ = create(json!({"name": "BERLIN"})).await.error(409, "name already exists");
    let (other, _) = engine.site("Aachen").await;
    let list = admin.get("/api/sites").await.ok();
    assert_eq!(list["public_base_url"], engine.base.as_str().trim_end_matches('/'));
    assert_eq!(list["public_hostname"], "127.0.0.1");
    assert_eq!((&list["sites"][0]["id"], &list["sites"][1]["id"]), (&json!(other), &json!(id)));

    let rename = |body: Value| admin.post("/api/sites/rename", body);
    let _ = rename(json!({"new_name": "x"})).await.error(400, "invalid id");
    let _ = rename(json!({"id": id})).await.error(400, "new_name is required");
    let _ = rename(json!({"id": id, "new_name": "aachen"})).await.error(409, "name already exists");
    let _ = rename(json!({"id": 9999, "new_name": "x"})).await.error(404, "site not found");
    assert_eq!(rename(json!({"id": id.to_string(), "new_name": "Bonn"})).await.ok()["name"], "Bonn");

    let approve = async |site: &str, until: Value| {
        admin.post(&format!("/api/sites/{site}/auto-approval"), json!({"auto_approve_until": until})).await
    };
    let now = chrono::Utc::now().timestamp();
    let id_text = id.to_string();
    for bad in [json!("soon"), json!(now + 8 * 86_400), json!([1])] {
        let reply = approve(&id_text, bad).await.error(400, "invalid auto_approve_until");
        assert!(reply.body["fields"]["auto_approve_until"].is_string(), "{}", reply.text);
    }
    let _ = approve(&id_text, json!(now - 5)).await.error(400, "auto_approve_until must be in the future");
    let _ = approve("9999", json!(now + 60)).await.error(404, "site not found");
    let _ = approve("x", json!(now + 60)).await.error(404, "site not found");
    let on = approve(&id_text, json!(now + 3600)).await.ok();
    assert_eq!((&on["auto_approve_until"], &on["auto_approval_active"]), (&json!(now + 3600), &json!(true)));
    let off = approve(&id_text, json!("")).await.ok();
    assert_eq!((&off["auto_approve_until"], &off["auto_approval_active"]), (&json!(0), &json!(false)));

    let delete = |ids: Value| admin.post("/api/sites/delete", json!({"ids": ids}));
    let _ = delete(json!(id)).await.error(400, "ids must be a list");
    let _ = delete(json!([id, "x"])).await.error(400, "invalid id");
    assert_eq!(delete(json!([])).await.ok(), json!({"status": "ok", "deleted": 0}));
    let operator = engine.operator(&[id, other]).await;
    assert_eq!(delete(json!([id.to_string(), 9999])).await.ok(), json!({"status": "ok", "deleted": 1}));
    let left = operator.get("/api/sites").await.ok();
    assert_eq!(left["sites"].as_array().map(Vec::len), Some(1));
}

async fn device(engine: &TestEngine, hostname: &str, site: Option<i64>) -> String {
    let guid: uuid::Uuid = sqlx::query_scalar(
        "INSERT INTO devices (guid, hostname, hostname_key, site_id, fingerprint, public_key) VALUES ($1, $2, lower($2), $3, $1::text, '\\x00') RETURNING guid",
    )
    .bind(uuid::Uuid::new_v4())
    .bind(hostname)
    .bind(site)
    .fetch_one(&engine.database.pool)
    .await
    .expect("a device");
    guid.to_string().to_uppercase()
}

#[tokio::test]
async fn devices_move_between_sites_by_name_or_guid() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let ((berlin, _), (bonn, _)) = (engine.site("Berlin").await, engine.site("Bonn").await);
    let operator = engine.operator(&[berlin]).await;
    let lone = device(&engine, "Lone", None).await;
    let one = device(&engine, "twin", Some(bonn)).await;
    let two = device(&engine, "TWIN", Some(bonn)).await;
    let map =
        async |actor: &Actor, query: &str| actor.get(&format!("/api/sites/device_map{query}")).await.ok()["mapping"].clone();
    assert_eq!(map(&operator, "").await, json!({}));
    let assign = |site: Value, names: Value| admin.post("/api/sites/assign", json!({"site_id": site, "hostnames": names}));
    let _ = assign(json!("x"), json!([])).await.error(400, "invalid site_id");
    let _ = assign(json!(berlin), json!("lone")).await.error(400, "hostnames must be a list of strings");
    let _ = assign(json!(berlin), json!([1])).await.error(400, "hostnames must be a list of strings");
    let _ = assign(json!(9999), json!(["lone"])).await.error(404, "site not found");
    let reply = assign(json!(berlin), json!(["lone", "ghost"])).await.error(400, "unknown_target");
    assert_eq!(reply.body["hostnames"], json!(["ghost"]));
    let reply = assign(json!(berlin), json!(["lone", "twin"])).await.error(409, "ambiguous_hostname");
    assert_eq!(
        (&reply.body["hostname"], reply.body["candidates"].as_array().map(Vec::len)),
        (&json!("twin"), Some(2)),
        "{}",
        reply.text
    );
    assert_eq!(map(&operator, "").await, json!({}), "a refused assignment moved a device");

    let _ = assign(json!(berlin), json!(["LONE", format!("{{{}}}", one.to_lowercase())])).await.ok();
    let place = json!({"site_id": berlin, "site_name": "Berlin"});
    assert_eq!(map(&operator, "").await, json!({"Lone": place, "twin": place}));
    assert_eq!(map(&operator, "?hostnames=lone,%20ghost").await, json!({"Lone": place}));
    assert_eq!(map(&operator, "?hostnames=").await, json!({}));
    let list = operator.get("/api/sites").await.ok();
    assert_eq!(list["sites"][0]["device_count"], 2);
    // The site goes, its devices stay without one.
    let _ = admin.post("/api/sites/delete", json!({"ids": [berlin]})).await.ok();
    assert_eq!(map(&operator, "").await, json!({}));
    let unassigned: Vec<uuid::Uuid> =
        sqlx::query_scalar("SELECT guid FROM devices WHERE site_id IS NULL").fetch_all(&engine.database.pool).await.unwrap();
    let unassigned: Vec<String> = unassigned.iter().map(|guid| guid.to_string().to_uppercase()).collect();
    assert!(unassigned.contains(&lone) && unassigned.contains(&one) && !unassigned.contains(&two));
}

#[tokio::test]
async fn a_site_that_a_job_names_is_not_deleted() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let ((berlin, _), (bonn, _), (ulm, _)) = (engine.site("Berlin").await, engine.site("Bonn").await, engine.site("Ulm").await);
    let insert = "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, scope_site_ids) VALUES ($1, '[]', $2, 'daily', $3)";
    for (name, targets, scope) in [
        ("by device", json!([{"kind": "device", "hostname": "h", "site_id": berlin}]), None),
        ("by owner", json!([{"kind": "all_devices"}]), Some(vec![bonn])),
    ] {
        sqlx::query(insert).bind(name).bind(targets).bind(scope).execute(&engine.database.pool).await.unwrap();
    }
    for (site, job) in [(berlin, "by device"), (bonn, "by owner")] {
        let reply = admin.post("/api/sites/delete", json!({"ids": [ulm, site]})).await.error(409, "site_in_use");
        assert_eq!(reply.body["jobs"][0]["name"], job, "{}", reply.text);
    }
    assert_eq!(admin.get("/api/sites").await.ok()["sites"].as_array().map(Vec::len), Some(3), "a refused deletion deleted");
    assert_eq!(admin.post("/api/sites/delete", json!({"ids": [ulm]})).await.ok()["deleted"], 1);
}

#[tokio::test]
async fn everything_is_in_the_audit_and_no_secret_is_in_the_database() {
    const NEW: &str = "another horse battery";
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Berlin").await;
    let user = engine.operator(&[site]).await;
    let _ = engine
        .anonymous()
        .post("/api/auth/login", json!({"username": "a password typed as a name", "password": "hunter2hunter2"}))
        .await;
    let _ = user.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = user.post("/api/auth/password/reset", json!({"current_password": PASSWORD, "new_password": NEW})).await.ok();
    let _ = user.post("/api/auth/mfa/reset", json!({})).await.ok();
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post_to_role(&user.name, "Admin").await.ok();
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post(&format!("/api/users/{}/reset_password", user.name), json!({"password": PASSWORD})).await.ok();
    let _ = admin.delete(&format!("/api/users/{}", user.name)).await.ok();
    let _ = admin.post("/api/sites/rename", json!({"id": site, "new_name": "Bonn"})).await.ok();
    let _ = admin.post("/api/sites/delete", json!({"ids": [site]})).await.ok();
    let pool = &engine.database.pool;
    for action in [
        "aegis.setup",
        "bootstrap.admin",
        "session.login",
        "site.create",
        "user.create",
        "user.sites",
        "mfa.enroll",
        "session.step_up",
        "user.change_password",
        "mfa.reset",
        "user.role",
        "user.reset_password",
        "user.delete",
        "site.rename",
        "site.delete",
    ] {
        let rows: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM audit_events WHERE action = $1 AND outcome = 'success' AND ip = '127.0.0.1'",
        )
        .bind(action)
        .fetch_one(pool)
        .await
        .unwrap();
        assert!(rows >= 1, "no audit of {action}");
    }
    let (actor, name): (String, String) =
        sqlx::query_as("SELECT actor_kind, actor_name FROM audit_events WHERE action = 'site.rename'")
            .fetch_one(pool)
            .await
            .unwrap();
    assert_eq!((actor.as_str(), name.as_str()), ("operator", ADMIN));
    let failures: i64 =
        sqlx::query_scalar("SELECT count(*) FROM audit_events WHERE action = 'session.login' AND outcome = 'failure'")
            .fetch_one(pool)
            .await
            .unwrap();
    assert_eq!(failures, 1);

    let mut dump = String::new();
    for table in ["users", "operator_sessions", "auth_challenges", "aegis", "audit_events", "sites", "rate_counters"] {
        let rows: Vec<String> =
            sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT t::text FROM {table} t"))).fetch_all(pool).await.unwrap();
        assert!(table == "sites" || !rows.is_empty(), "{table} is empty");
        dump.extend(rows);
        let rows: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT to_jsonb(t)::text FROM {table} t")))
            .fetch_all(pool)
            .await
            .unwrap();
        dump.extend(rows);
    }
    for secret in [
        PASSWORD,
        NEW,
        CIPHER,
        "hunter2hunter2",
        "a password typed as a name",
        "argon2id$v=",
        token(&admin),
        token(&user),
        admin.totp_secret.as_deref().expect("a secret"),
        user.totp_secret.as_deref().expect("a secret"),
    ] {
        assert!(!dump.contains(secret), "a secret is in the database in clear: {}", &secret[..4]);
    }
    for entry in std::fs::read_dir(engine.state_dir().join("secrets")).expect("a folder").flatten() {
        let text = std::fs::read(entry.path()).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&text).contains(CIPHER), "{}", entry.path().display());
    }
}

#[tokio::test]
async fn an_administrator_switches_the_second_factor_of_others() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let user = engine.operator(&[]).await;
    let path = format!("/api/users/{}/mfa", user.name.to_uppercase());
    let login =
        async || engine.anonymous().post("/api/auth/login", json!({"username": user.name, "password": PASSWORD})).await.ok();
    engine.age_step_ups().await;
    let _ = admin.post(&path, json!({"enabled": false})).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let reply = admin.post(&path, json!({"reset_secret": true})).await.error(400, "enabled_required");
    assert!(reply.body["fields"]["enabled"].is_string(), "{}", reply.text);
    let _ = admin.post("/api/users/ghost/mfa", json!({"enabled": true})).await.error(404, "user not found");
    assert_eq!(login().await["stage"], "verify");

    // Switching on what is on changes nothing, and nobody has to sign in again.
    let _ = admin.post(&path, json!({"enabled": true})).await.ok();
    let _ = user.get("/api/auth/me").await.ok();
    // Off: a weaker proof than that of the running sessions, so they end.
    let _ = admin.post(&path, json!({"enabled": false})).await.ok();
    let _ = user.get("/api/auth/me").await.error(401, "unauthorized");
    assert_eq!(login().await["status"], "ok");
    // On again: the authenticator was kept.
    let _ = admin.post(&path, json!({"enabled": true})).await.ok();
    assert_eq!(login().await["stage"], "verify");
    let _ = admin.post(&path, json!({"enabled": true, "reset_secret": true})).await.ok();
    assert_eq!(login().await["stage"], "setup");

    // A directory's users always have one.
    sqlx::query("UPDATE users SET auth_source = 'directory' WHERE username = $1")
        .bind(&user.name)
        .execute(&engine.database.pool)
        .await
        .unwrap();
    let _ = admin.post(&path, json!({"enabled": false})).await.error(403, "directory_mfa_required");
    let _ = admin.post(&path, json!({"enabled": true, "reset_secret": true})).await.ok();
}

#[tokio::test]
async fn what_is_missing_or_too_much_is_said_by_name() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let nobody = engine.anonymous();
    let _ = nobody.post("/api/auth/mfa/verify", json!({"code": "123456"})).await.error(401, "mfa_pending");

    // Without a second factor there is no code to prove anything with.
    let name = engine.user("User", &[]).await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post(&format!("/api/users/{name}/mfa"), json!({"enabled": false})).await.ok();
    let done = nobody.post("/api/auth/login", json!({"username": name, "password": PASSWORD})).await.ok();
    let user = nobody.signed_in(&name, PASSWORD, "", &done);
    let _ = user.post("/api/auth/step-up", json!({"code": "123456"})).await.error(403, "mfa_not_configured");

    let names: Vec<String> = (0..1001).map(|number| format!("user-{number}")).collect();
    let _ = admin.post("/api/user_site_assignments/selection", json!({"usernames": names})).await.error(400, "too_many_users");
    let all = json!({"usernames": names, "site_ids": []});
    let _ = admin.post("/api/user_site_assignments/assign", all).await.error(400, "too_many_users");
    let sites: Vec<u32> = (1..1002).collect();
    let all = json!({"usernames": [name], "site_ids": sites});
    let _ = admin.post("/api/user_site_assignments/assign", all).await.error(400, "too_many_sites");
}
