//! How a machine becomes a device, and stays one: only with its own key, only where it was let in, and never twice.

use base64::{Engine, engine::general_purpose::STANDARD};
use borealis_tests::{
    Actor, Device, TestEngine,
    actor::{Credential, Enrollment, new_key, spki},
};
use chrono::{TimeDelta, Utc};
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};
use uuid::Uuid;

async fn sql(engine: &TestEngine, text: &'static str) -> u64 {
    sqlx::query(text).execute(&engine.database.pool).await.unwrap_or_else(|error| panic!("{text}: {error}")).rows_affected()
}

async fn count(engine: &TestEngine, text: &'static str) -> i64 {
    sqlx::query_scalar(text).fetch_one(&engine.database.pool).await.unwrap_or_else(|error| panic!("{text}: {error}"))
}

async fn ask(engine: &TestEngine, hostname: &str, code: &str, key: &SigningKey) -> Enrollment {
    Enrollment::request(&engine.anonymous(), hostname, code, key.clone()).await
}

async fn decide(engine: &TestEngine, actor: &Actor, pending: &Enrollment, body: Value) -> borealis_tests::Reply {
    let id = engine.approval(pending.reference()).await;
    actor.post(&format!("/api/admin/device-approvals/{id}/approve"), body).await
}

async fn approvals(actor: &Actor, query: &str) -> Vec<Value> {
    actor.get(&format!("/api/admin/device-approvals{query}")).await.ok()["approvals"].as_array().expect("approvals").clone()
}

async fn refresh(engine: &TestEngine, guid: &str, token: &str, rotates: bool) -> borealis_tests::Reply {
    let body = json!({"guid": guid, "refresh_token": token, "capabilities": {"rotates": rotates}});
    engine.anonymous().post("/api/agent/token/refresh", body).await
}

fn token<'a>(answer: &'a Value, name: &str) -> &'a str {
    answer[name].as_str().unwrap_or_else(|| panic!("no {name} in {answer}"))
}

fn with_token(device: &Device, token: &str) -> Actor {
    Actor { credential: Credential::Bearer(token.to_owned()), ..device.actor.clone() }
}

async fn heartbeat(actor: &Actor) -> borealis_tests::Reply {
    actor.post("/api/agent/heartbeat", json!({})).await
}

#[tokio::test]
async fn a_request_is_refused_for_the_first_thing_wrong_with_it() {
    let engine = TestEngine::start().await;
    let (_, code) = engine.site("north").await;
    let nobody = engine.anonymous();
    let good = json!({
        "hostname": "web", "enrollment_code": code, "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16]),
    });
    let mut body = json!({});
    for (name, error) in [
        ("hostname", "hostname_required"),
        ("enrollment_code", "enrollment_code_required"),
        ("agent_pubkey", "agent_pubkey_required"),
        ("client_nonce", "client_nonce_required"),
    ] {
        let _ = nobody.post("/api/agent/enroll/request", body.clone()).await.error(400, error);
        body[name] = good[name].clone();
    }
    let p256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEuQ8Yq3TB3l6ZdxwlmbTmkO0EAkIoVvKxPCyTVt0M7QqDTMlqH4IZ2mRvuwhx8EnvXHS5XP2T6g2W2v8hH2kQFg==";
    for (name, bad, error) in [
        ("agent_pubkey", json!("%%%"), "invalid_agent_pubkey"),
        ("agent_pubkey", json!(p256), "invalid_agent_pubkey"),
        ("client_nonce", json!(STANDARD.encode([1; 15])), "invalid_client_nonce"),
        ("hostname", json!("a\u{7}b"), "invalid_hostname"),
        ("enrollment_code", json!("0000-0000"), "invalid_enrollment_code"),
    ] {
        let mut changed = good.clone();
        changed[name] = bad;
        let _ = nobody.post("/api/agent/enroll/request", changed).await.error(400, error);
    }
    let raw = nobody.request(reqwest::Method::POST, "/api/agent/enroll/request").body("{not json");
    let _ = nobody.send(raw).await.error(400, "hostname_required");
    assert_eq!(count(&engine, "SELECT count(*) FROM device_approvals").await, 0);

    // The code's dashes and case do not matter.
    let mut loose = good.clone();
    loose["enrollment_code"] = code.replace('-', "").to_lowercase().into();
    let _ = nobody.post("/api/agent/enroll/request", loose).await.ok();
}

#[tokio::test]
async fn requests_are_counted_per_address_and_per_key() {
    let engine = TestEngine::with(|settings| settings.enroll_per_minute = 15).await;
    let (_, code) = engine.site("north").await;
    let key = new_key();
    for _ in 0..12 {
        let _ = ask(&engine, "web", &code, &key).await;
    }
    let body = json!({
        "hostname": "web", "enrollment_code": code, "agent_pubkey": spki(&key), "client_nonce": STANDARD.encode([1; 16]),
    });
    let refused = engine.anonymous().post("/api/agent/enroll/request", body.clone()).await.error(429, "rate_limited");
    assert!(refused.header("retry-after").is_some_and(|wait| wait.parse::<u64>().is_ok_and(|wait| wait >= 1)));
    let _ = ask(&engine, "db", &code, &new_key()).await;
    let _ = ask(&engine, "db", &code, &new_key()).await;
    // The address is looked at before the body.
    let _ = engine.anonymous().post("/api/agent/enroll/request", json!({})).await.error(429, "rate_limited");
}

#[tokio::test]
async fn an_address_that_guesses_codes_is_refused_at_every_process() {
    let engine = TestEngine::with(|settings| settings.enroll_wrong_codes = 5).await;
    let second = engine.second().await;
    let (_, code) = engine.site("north").await;
    let (here, there) = (engine.anonymous(), engine.anonymous().at(&second.base));
    let body = |code: &str| json!({"hostname": "guesser", "enrollment_code": code, "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16])});
    // Right codes, however many, are no guesses.
    for _ in 0..8 {
        let _ = ask(&engine, "web", &code, &new_key()).await;
    }
    // Another key each time does not help, nor another process.
    for n in 0..5 {
        let guess = body(&format!("{n:04X}-WRONG-WRONG"));
        let _ = if n % 2 == 0 { &here } else { &there }
            .post("/api/agent/enroll/request", guess)
            .await
            .error(400, "invalid_enrollment_code");
    }
    for actor in [&here, &there] {
        for sent in ["one more guess", &code] {
            let refused = actor.post("/api/agent/enroll/request", body(sent)).await.error(429, "rate_limited");
            let wait: u64 = refused.header("retry-after").expect("a time").parse().expect("seconds");
            assert!((60..=16 * 60).contains(&wait), "{wait}");
            assert_eq!(refused.body["retry_after"], wait);
        }
    }
    // Administrators see who it was.
    let rows = approvals(&engine.admin().await, "?status=wrong_code").await;
    assert_eq!(rows.len(), 5, "the refused are not judged, and so not listed");
    for row in &rows {
        assert_eq!((&row["hostname_claimed"], &row["remote_addr"]), (&json!("guesser"), &json!("127.0.0.1")));
        assert!(row["enrollment_code"].as_str().is_some_and(|mask| mask.ends_with("***ONG")), "{row}");
        assert!(row["last_seen_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{row}");
    }
    sql(&engine, "UPDATE rate_counters SET window_start = window_start - interval '17 minutes'").await;
    let _ = here.post("/api/agent/enroll/request", body(&code)).await.ok();
    second.stop().await;
}

#[tokio::test]
async fn guesses_at_the_same_time_are_counted_one_by_one() {
    let engine = TestEngine::with(|settings| settings.enroll_wrong_codes = 5).await;
    let _ = engine.site("north").await;
    let nobody = engine.anonymous();
    let guesses = (0..20).map(|_| {
        let body = json!({
            "hostname": "web", "enrollment_code": "a guess", "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16]),
        });
        let nobody = &nobody;
        async move { nobody.post("/api/agent/enroll/request", body).await.status }
    });
    let statuses = futures::future::join_all(guesses).await;
    assert_eq!(statuses.iter().filter(|status| **status == 400).count(), 5, "{statuses:?}");
    assert!(statuses.iter().all(|status| [400, 429].contains(status)), "{statuses:?}");
}

#[tokio::test]
async fn polls_refreshes_and_requests_of_a_device_are_counted() {
    let engine = TestEngine::start().await;
    let second = engine.second().await;
    let (site, code) = engine.site("north").await;
    // A request's polls and a device's refreshes: together at both processes.
    let waiting = ask(&engine, "web", &code, &new_key()).await;
    let device = engine.device_named(site, "db").await;
    let nodes = [engine.anonymous(), engine.anonymous().at(&second.base)];
    let proof = waiting.own_proof();
    let renewal = json!({"guid": device.guid, "refresh_token": device.refresh_token});
    for (path, body, most) in [("/api/agent/enroll/poll", &proof, 60), ("/api/agent/token/refresh", &renewal, 30)] {
        for n in 0..most {
            let _ = nodes[n % 2].post(path, body.clone()).await.ok();
        }
        for node in &nodes {
            let refused = node.post(path, body.clone()).await.error(429, "rate_limited");
            assert!(refused.header("retry-after").is_some(), "{path}");
        }
    }
    // Who holds no token of the device cannot use its tries up, and hears nothing of them.
    let _ = refresh(&engine, &device.guid, "no token", false).await.error(401, "invalid_refresh_token");
    let other = engine.device_named(site, "mail").await;
    let _ = refresh(&engine, &other.guid, &other.refresh_token, false).await.ok();

    let mut refused = None;
    for _ in 0..400 {
        let reply = heartbeat(&device).await;
        if reply.status != 200 {
            refused = Some(reply.error(429, "rate_limited"));
            break;
        }
    }
    assert!(refused.expect("a device that does not stop is slowed").header("retry-after").is_some());
    let _ = heartbeat(&other).await.ok();
    second.stop().await;
}

#[tokio::test]
async fn a_site_has_only_so_many_open_requests() {
    let engine = TestEngine::start().await;
    let (_, code) = engine.site("north").await;
    sql(
        &engine,
        "INSERT INTO device_approvals (id, approval_reference, hostname_claimed, fingerprint, public_key, enrollment_code, site_id,
                client_nonce, server_nonce, hostname_claimed_key)
         SELECT gen_random_uuid(), gen_random_uuid(), 'filler', n::text, '', '', s.id, '', '', 'filler' FROM sites AS s, generate_series(1, 20000) AS n",
    )
    .await;
    let body = json!({
        "hostname": "web", "enrollment_code": code, "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16]),
    });
    let refused = engine.anonymous().post("/api/agent/enroll/request", body).await.error(429, "rate_limited");
    assert!(refused.header("retry-after").is_some());
    let (_, south) = engine.site("south").await;
    let _ = ask(&engine, "web", &south, &new_key()).await;
}

#[tokio::test]
async fn a_rotated_code_opens_nothing_and_what_waits_goes_on() {
    let engine = TestEngine::start().await;
    let (site, before) = engine.site("north").await;
    let admin = engine.admin().await;
    let waiting = ask(&engine, "web", &before, &new_key()).await;
    let rotated = admin.call("POST", &format!("/api/sites/{site}/rotate-enrollment-code"), None).await.ok();
    let after = rotated["enrollment_code"].as_str().expect("a code");
    assert!(after.len() == 39 && after != before && rotated["id"] == site, "{rotated}");
    let body = json!({
        "hostname": "db", "enrollment_code": before, "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16]),
    });
    let _ = engine.anonymous().post("/api/agent/enroll/request", body).await.error(400, "invalid_enrollment_code");
    let _ = ask(&engine, "db", after, &new_key()).await;
    let _ = decide(&engine, &admin, &waiting, json!({})).await.ok();
    let _ = waiting.finish(site).await;
    for unknown in ["999999", "x"] {
        let path = format!("/api/sites/{unknown}/rotate-enrollment-code");
        let _ = admin.call("POST", &path, None).await.error(404, "site not found");
    }
    let events = admin.get("/api/audit?action=site.rotate_enrollment_code").await.ok();
    assert_eq!(events["events"].as_array().map(Vec::len), Some(1), "{events}");
    assert!(!events.to_string().contains(after) && !events.to_string().contains(&before), "a code is no thing for the audit");
}

#[tokio::test]
async fn a_machine_becomes_a_device_and_its_lost_answer_is_given_again() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let key = new_key();
    let pending = ask(&engine, " web-1 ", &code, &key).await;
    assert_eq!(pending.answer["poll_after_ms"], 3000);
    assert_eq!(pending.poll().await.ok(), json!({"status": "pending", "poll_after_ms": 5000}));

    // Only the key that asked is answered; a reference alone is worth nothing.
    let nobody = engine.anonymous();
    let mut stolen = pending.proof(&new_key());
    let _ = nobody.post("/api/agent/enroll/poll", stolen.clone()).await.error(400, "invalid_proof");
    stolen["client_nonce"] = STANDARD.encode([9; 32]).into();
    let _ = nobody.post("/api/agent/enroll/poll", stolen.clone()).await.error(400, "nonce_mismatch");
    stolen["approval_reference"] = Uuid::new_v4().to_string().into();
    let unknown = nobody.post("/api/agent/enroll/poll", stolen.clone()).await.expect(404);
    assert_eq!(unknown.body, json!({"status": "unknown"}));
    for (name, error) in [
        ("proof_sig", "proof_sig_required"),
        ("client_nonce", "client_nonce_required"),
        ("approval_reference", "approval_reference_required"),
    ] {
        stolen[name] = Value::Null;
        let _ = nobody.post("/api/agent/enroll/poll", stolen.clone()).await.error(400, error);
    }
    for (name, error) in [("client_nonce", "invalid_client_nonce"), ("proof_sig", "invalid_proof_sig")] {
        let mut bad = pending.proof(&key);
        bad[name] = "%".into();
        let _ = nobody.post("/api/agent/enroll/poll", bad).await.error(400, error);
    }

    assert_eq!(decide(&engine, &engine.admin().await, &pending, json!({})).await.ok(), json!({"status": "approved"}));
    let _ = decide(&engine, &engine.admin().await, &pending, json!({})).await.error(409, "approval_not_pending");
    let device = pending.clone().finish(site).await;
    let route = &device.enrolled["remote_ops_route"];
    assert_eq!((&route["available"], &route["site_id"]), (&json!(true), &json!(site)));
    for name in ["route_path_prefix", "base_url"] {
        let text = token(route, name);
        assert!(text.contains("/_borealis/site-workers/") && text.contains(token(route, "worker_guid")), "{text}");
    }
    assert_eq!(heartbeat(&device).await.ok()["site_id"], site);
    let listed = engine.admin().await.get("/api/devices").await.ok();
    assert_eq!((&listed["devices"][0]["guid"], &listed["devices"][0]["hostname"]), (&json!(device.guid), &json!("web-1")));
    assert_eq!(device.guid, device.guid.to_uppercase());

    // The answer was lost: the key gets another pair, and the lost refresh token is dead.
    let again = pending.poll().await.ok();
    assert_eq!((&again["status"], &again["guid"]), (&json!("approved"), &json!(device.guid)));
    let _ = refresh(&engine, &device.guid, &device.refresh_token, false).await.error(401, "refresh_token_revoked");
    let _ = refresh(&engine, &device.guid, token(&again, "refresh_token"), false).await.ok();
    sql(&engine, "UPDATE device_approvals SET completed_at = now() - interval '601 seconds'").await;
    assert_eq!(pending.poll().await.ok(), json!({"status": "approved", "detail": "finalized"}));
    assert_eq!(count(&engine, "SELECT count(*) FROM audit_events WHERE action = 'device.enroll'").await, 1);
}

#[tokio::test]
async fn polls_at_the_same_time_make_one_device() {
    let engine = TestEngine::start().await;
    let (_, code) = engine.site("north").await;
    let key = new_key();
    let pending = ask(&engine, "web", &code, &key).await;
    let _ = decide(&engine, &engine.admin().await, &pending, json!({})).await.ok();
    // At two API processes at once.
    let second = engine.second().await;
    let (here, there) = (engine.anonymous(), engine.anonymous().at(&second.base));
    let proof = pending.proof(&key);
    let polls = (0..10).map(|n| {
        let (actor, proof) = (if n % 2 == 0 { &here } else { &there }, proof.clone());
        async move { actor.post("/api/agent/enroll/poll", proof).await }
    });
    let guids: Vec<Value> = futures::future::join_all(polls).await.into_iter().map(|reply| reply.ok()["guid"].clone()).collect();
    assert!(guids.iter().all(|guid| guid.is_string() && *guid == guids[0]), "{guids:?}");
    assert_eq!(count(&engine, "SELECT count(*) FROM devices").await, 1);
    assert_eq!(count(&engine, "SELECT count(*) FROM audit_events WHERE action = 'device.enroll'").await, 1);
    assert_eq!(count(&engine, "SELECT count(*) FROM refresh_tokens WHERE revoked_at IS NULL").await, 1);
}

#[tokio::test]
async fn a_key_has_one_open_request_and_an_approval_survives_a_restart_of_the_agent() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let key = new_key();
    let zeroth = ask(&engine, "web", &code, &key).await;
    let shown = engine.approval(zeroth.reference()).await;
    let first = ask(&engine, "web-new", &code, &key).await;
    // Who looks at the first and approves it, does not approve the other name.
    assert_ne!(zeroth.reference(), first.reference());
    let approve = format!("/api/admin/device-approvals/{shown}/approve");
    let _ = engine.admin().await.post(&approve, json!({})).await.error(409, "approval_not_pending");
    assert_eq!(zeroth.poll().await.ok(), json!({"status": "expired"}));
    let second = ask(&engine, "Web-New", &code, &key).await;
    assert_eq!(first.reference(), second.reference());
    let _ = first.poll().await.error(400, "nonce_mismatch");
    let _ = decide(&engine, &engine.admin().await, &second, json!({})).await.ok();

    // Restarted before it fetched its tokens: no second approval.
    let third = ask(&engine, "WEB-NEW", &code, &key).await;
    assert_eq!((third.reference(), &third.answer["poll_after_ms"]), (second.reference(), &json!(250)));
    // Under another name the decision does not count.
    let renamed = ask(&engine, "dc-1", &code, &key).await;
    assert_ne!(renamed.reference(), third.reference());
    assert_eq!(renamed.poll().await.ok()["status"], "pending");
    assert_eq!(third.poll().await.ok(), json!({"status": "expired"}));

    let _ = decide(&engine, &engine.admin().await, &renamed, json!({})).await.ok();
    let device = renamed.finish(site).await;
    assert_eq!(device.enrolled["status"], "approved");

    // Denied, it may ask again at once.
    let other = ask(&engine, "db", &code, &new_key()).await;
    let id = engine.approval(other.reference()).await;
    let admin = engine.admin().await;
    let denied = admin.call("POST", &format!("/api/admin/device-approvals/{id}/deny"), None).await.ok();
    assert_eq!(denied, json!({"status": "denied"}));
    assert_eq!(other.poll().await.ok(), json!({"status": "denied", "reason": "operator_denied"}));

    // What nobody decides, or fetches, ends.
    let old = ask(&engine, "old", &code, &new_key()).await;
    sql(&engine, "UPDATE device_approvals SET updated_at = now() - interval '8 days' WHERE status = 'pending'").await;
    assert_eq!(borealis_engine::enrollment::expire_old(&engine.database.pool).await.unwrap(), 1);
    assert_eq!(old.poll().await.ok(), json!({"status": "expired"}));
}

#[tokio::test]
async fn an_enrollment_code_ends_and_the_next_one_lasts_as_asked() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, code) = engine.site("north").await;
    let listed = async || admin.get("/api/sites").await.ok()["sites"][0].clone();
    let ahead = |site: &Value| site["enrollment_code_expires_at"].as_i64().expect("an instant") - Utc::now().timestamp();
    let days = |days: i64| days * 86_400 - 120..=days * 86_400 + 120;
    assert!(days(90).contains(&ahead(&listed().await)), "{}", listed().await);
    let key = new_key();
    let _ = ask(&engine, "early", &code, &key).await;

    sql(&engine, "UPDATE sites SET enrollment_code_expires_at = now() - interval '1 second'").await;
    assert_eq!(listed().await["enrollment_code_expired"], true);
    let body = json!({"hostname": "late", "enrollment_code": code, "agent_pubkey": spki(&new_key()), "client_nonce": STANDARD.encode([1; 16])});
    let _ = engine.anonymous().post("/api/agent/enroll/request", body).await.error(400, "invalid_enrollment_code");
    // Who has asked in time goes on, also after a restart, and is decided on as before.
    let waiting = ask(&engine, "early", &code, &key).await;
    let _ = decide(&engine, &admin, &waiting, json!({})).await.ok();
    let _ = waiting.finish(site).await;

    let path = format!("/api/sites/{site}/rotate-enrollment-code");
    for wrong in [-1, 3651] {
        let body = json!({"enrollment_code_days": wrong});
        let _ = admin.post(&path, body.clone()).await.error(400, "invalid_enrollment_code_days");
        let named = json!({"name": "x", "enrollment_code_days": wrong});
        let _ = admin.post("/api/sites", named).await.error(400, "invalid_enrollment_code_days");
    }
    let week = admin.post(&path, json!({"enrollment_code_days": 7})).await.ok();
    assert!(days(7).contains(&ahead(&week)), "{week}");
    let forever = admin.post(&path, json!({"enrollment_code_days": 0})).await.ok();
    assert_eq!((&forever["enrollment_code_expires_at"], &forever["enrollment_code_expired"]), (&json!(0), &json!(false)));
    let again = admin.call("POST", &path, None).await.ok();
    assert!(days(90).contains(&ahead(&again)), "{again}");
    let _ = ask(&engine, "in-time", again["enrollment_code"].as_str().expect("a code"), &new_key()).await;
}

#[tokio::test]
async fn a_wrong_code_is_shown_to_administrators_until_the_right_one_comes() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let key = new_key();
    let mut body = json!({
        "hostname": "web", "enrollment_code": "ABCDEF-123456", "agent_pubkey": spki(&key), "client_nonce": STANDARD.encode([1; 16]),
    });
    for _ in 0..2 {
        let _ = engine.anonymous().post("/api/agent/enroll/request", body.clone()).await.error(400, "invalid_enrollment_code");
    }
    let admin = engine.admin().await;
    let rows = approvals(&admin, "?status=wrong_code").await;
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (&rows[0]["enrollment_code"], &rows[0]["wrong_code_attempt_count"], &rows[0]["last_error"]),
        (&json!("ABC***456"), &json!(2), &json!("invalid_enrollment_code"))
    );
    assert!(approvals(&engine.operator(&[site]).await, "?status=wrong_code").await.is_empty());
    body["enrollment_code"] = code.into();
    let _ = engine.anonymous().post("/api/agent/enroll/request", body).await.ok();
    assert!(approvals(&admin, "?status=wrong_code").await.is_empty());
}

#[tokio::test]
async fn an_open_door_admits_only_who_harms_nobody() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let (_, south) = engine.site("south").await;
    sql(&engine, "UPDATE sites SET auto_approve_until = now() + interval '1 hour'").await;
    let key = new_key();
    let entering = ask(&engine, "web", &code, &key).await;
    assert_eq!((&entering.answer["auto_approved"], &entering.answer["poll_after_ms"]), (&json!(true), &json!(250)));
    let device = entering.finish(site).await;

    // A namesake with another key needs a person; in another site it is nobody's namesake; the machine itself comes back.
    assert_eq!(ask(&engine, "WEB", &code, &new_key()).await.poll().await.ok()["status"], "pending");
    assert_eq!(ask(&engine, "web", &south, &new_key()).await.poll().await.ok()["status"], "approved");
    let back = ask(&engine, "web", &code, &key).await.finish(site).await;
    assert_eq!(back.guid, device.guid);
    // Whom the door let in is in the audit.
    let audited =
        "SELECT count(*) FROM audit_events WHERE action = 'device_approval.approve' AND actor_name = 'site_auto_approval'";
    assert_eq!(count(&engine, audited).await, 3);
    // Its key in another site would move it there.
    assert_eq!(ask(&engine, "web", &south, &key).await.poll().await.ok()["status"], "pending");
    sql(&engine, "UPDATE device_approvals SET status = 'denied' WHERE status = 'pending'").await;

    // Nor does it lift a revocation.
    sql(&engine, "UPDATE devices SET status = 'revoked', token_version = token_version + 1 WHERE hostname = 'web'").await;
    let revoked = ask(&engine, "web", &code, &key).await;
    assert_eq!(revoked.poll().await.ok()["status"], "pending");
    let admin = engine.admin().await;
    let _ = decide(&engine, &admin, &revoked, json!({})).await.error(409, "reinstate_required");
    let _ = decide(&engine, &engine.operator(&[site]).await, &revoked, json!({"reinstate": true})).await.error(403, "forbidden");
    let _ = decide(&engine, &admin, &revoked, json!({"reinstate": true})).await.ok();
    let reinstated = revoked.finish(site).await;
    assert_eq!(reinstated.guid, device.guid);
    let _ = heartbeat(&reinstated).await.ok();
    let _ = heartbeat(&device).await.error(403, "token_version_mismatch");
}

#[tokio::test]
async fn an_open_door_closes_at_its_end() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let admin = engine.admin().await;
    let door = format!("/api/sites/{site}/auto-approval");
    let until = json!({"auto_approve_until": Utc::now().timestamp() + 3600});
    assert_eq!(ask(&engine, "a", &code, &new_key()).await.answer.get("auto_approved"), None);
    let _ = admin.post(&door, until.clone()).await.ok();
    let admitted = ask(&engine, "b", &code, &new_key()).await;
    assert_eq!(admitted.answer["auto_approved"], true);
    // Its time is over: nobody has to close it. Whom it admitted before still comes in.
    sql(&engine, "UPDATE sites SET auto_approve_until = now() - interval '1 second'").await;
    assert_eq!(admin.get("/api/sites").await.ok()["sites"][0]["auto_approval_active"], false);
    assert_eq!(ask(&engine, "c", &code, &new_key()).await.poll().await.ok()["status"], "pending");
    let _ = admitted.finish(site).await;
    let _ = admin.post(&door, until).await.ok();
    let _ = admin.post(&door, json!({"auto_approve_until": 0})).await.ok();
    assert_eq!(ask(&engine, "d", &code, &new_key()).await.poll().await.ok()["status"], "pending");
    let shown = approvals(&admin, "?status=completed").await;
    assert_eq!((shown.len(), &shown[0]["approved_by_user_id"]), (1, &json!("site_auto_approval")));
}

#[tokio::test]
async fn no_door_and_no_former_approval_lifts_a_quarantine_or_a_revocation() {
    for (status, change) in [
        ("quarantined", "UPDATE devices SET status = 'quarantined', token_version = token_version + 1"),
        ("revoked", "UPDATE devices SET status = 'revoked', token_version = token_version + 1"),
        ("decommissioned", "UPDATE devices SET status = 'decommissioned', token_version = token_version + 1"),
    ] {
        let engine = TestEngine::start().await;
        let (site, code) = engine.site("north").await;
        let (admin, operator) = (engine.admin().await, engine.operator(&[site]).await);
        let device = engine.device_named(site, "web").await;
        let before = ask(&engine, "web", &code, &device.key).await;
        let _ = decide(&engine, &admin, &before, json!({})).await.ok();
        sql(&engine, change).await;
        sql(&engine, "UPDATE sites SET auto_approve_until = now() + interval '1 hour'").await;
        assert_eq!(before.poll().await.ok(), json!({"status": "denied", "reason": "operator_denied"}), "{status}");

        // Neither with its own key, nor by its name with another.
        let own = ask(&engine, "web", &code, &device.key).await;
        assert_eq!(own.poll().await.ok()["status"], "pending", "{status}");
        let _ = decide(&engine, &operator, &own, json!({"reinstate": true})).await.error(403, "forbidden");
        let _ = decide(&engine, &admin, &own, json!({})).await.error(409, "reinstate_required");
        let namesake = ask(&engine, "web", &code, &new_key()).await;
        assert_eq!(namesake.poll().await.ok()["status"], "pending", "{status}");
        let overwrite = json!({"conflict_resolution": "overwrite", "reinstate": true});
        let _ = decide(&engine, &operator, &namesake, overwrite).await.error(403, "forbidden");
        let _ = decide(&engine, &admin, &namesake, json!({"guid": device.guid})).await.error(409, "reinstate_required");
        let kept: String = sqlx::query_scalar("SELECT status FROM devices").fetch_one(&engine.database.pool).await.unwrap();
        assert_eq!(kept, status);

        let _ = decide(&engine, &admin, &own, json!({"reinstate": true})).await.ok();
        let back = own.finish(site).await;
        assert_eq!(back.guid, device.guid);
        let _ = heartbeat(&back).await.ok();
        let _ = heartbeat(&device).await.error(403, "token_version_mismatch");
        let _ = refresh(&engine, &device.guid, &device.refresh_token, true).await.error(401, "refresh_token_revoked");
    }
}

#[tokio::test]
async fn an_operator_of_one_site_decides_nothing_of_another() {
    let engine = TestEngine::start().await;
    let (north, north_code) = engine.site("north").await;
    let (south, south_code) = engine.site("south").await;
    let foreign = engine.device_named(south, "dc-1").await;
    let waiting = ask(&engine, "web", &south_code, &new_key()).await;
    let own = ask(&engine, "dc-1", &north_code, &new_key()).await;
    let operator = engine.operator(&[north]).await;

    let seen = approvals(&operator, "").await;
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0]["approval_reference"], own.reference());
    assert!(seen[0].get("client_nonce").is_none() && seen[0].get("server_nonce").is_none());
    // The foreign namesake is no conflict, and not shown.
    assert_eq!(seen[0]["hostname_conflict"], Value::Null);
    let _ = decide(&engine, &operator, &waiting, json!({})).await.error(404, "not found");
    let id = engine.approval(waiting.reference()).await;
    let _ = operator.post(&format!("/api/admin/device-approvals/{id}/deny"), json!({})).await.error(404, "not found");
    let _ = operator.post("/api/admin/device-approvals/nothing/deny", json!({})).await.error(404, "not found");
    assert!(approvals(&engine.operator(&[]).await, "").await.is_empty());
    let _ = operator.get("/api/admin/enrollment-codes").await.error(403, "forbidden");

    // Neither by GUID, known or not, nor by the foreign device's own key.
    for guid in [foreign.guid.clone(), Uuid::new_v4().to_string()] {
        let _ = decide(&engine, &operator, &own, json!({"guid": guid})).await.error(404, "not found");
    }
    let moving = ask(&engine, "dc-1", &north_code, &foreign.key).await;
    let moving_row =
        approvals(&operator, "?status=pending").await.into_iter().find(|row| row["approval_reference"] == moving.reference());
    assert_eq!(moving_row.expect("the own request")["hostname_conflict"], json!({"requires_prompt": true}));
    let _ = decide(&engine, &operator, &moving, json!({})).await.error(403, "forbidden");
    let _ = decide(&engine, &operator, &own, json!({})).await.ok();
    let twin = own.finish(north).await;
    assert_ne!(twin.guid, foreign.guid);

    // Names are not keys: each sees their own, an administrator must say which.
    let mine = operator.get("/api/device/details/DC-1").await.ok();
    assert_eq!(mine["guid"], twin.guid);
    let both = engine.admin().await.get("/api/device/details/dc-1").await.error(409, "ambiguous_hostname");
    assert_eq!(both.body["guids"].as_array().map(Vec::len), Some(2));
    let _ = operator.get(&format!("/api/devices/{}", foreign.guid)).await.error(404, "not found");
    let _ = operator.get(&format!("/api/devices/{}", twin.guid.to_lowercase())).await.ok();
    let listed = operator.get("/api/devices").await.ok();
    assert_eq!(listed["devices"].as_array().map(Vec::len), Some(1));

    // An administrator may move the machine; its site follows.
    assert_eq!(
        decide(&engine, &engine.admin().await, &moving, json!({})).await.ok()["conflict_resolution"],
        "auto_merge_fingerprint"
    );
    let moved = moving.finish(north).await;
    assert_eq!(moved.guid, foreign.guid);
    assert_eq!(heartbeat(&moved).await.ok()["site_id"], north);
}

#[tokio::test]
async fn a_namesake_of_the_same_site_asks_what_to_do() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let before = engine.device_named(site, "web").await;
    let operator = engine.operator(&[site]).await;
    let pending = ask(&engine, "Web", &code, &new_key()).await;
    let row = approvals(&operator, "?status=pending").await.remove(0);
    assert_eq!(row["hostname_conflict"]["guid"], before.guid);
    assert_eq!((&row["conflict_requires_prompt"], &row["fingerprint_match"]), (&json!(true), &json!(false)));
    let refused = decide(&engine, &operator, &pending, json!({})).await.error(409, "conflict_resolution_required");
    assert_eq!(refused.body["hostname"], "Web");
    let _ = decide(&engine, &operator, &pending, json!({"conflict_resolution": "merge"}))
        .await
        .error(400, "invalid_conflict_resolution");
    let _ = decide(&engine, &operator, &pending, json!({"resolution": "overwrite"})).await.error(400, "invalid_json");
    let _ = decide(&engine, &operator, &pending, json!({"conflict_resolution": "overwrite"})).await.ok();
    let after = pending.finish(site).await;
    assert_eq!(after.guid, before.guid);
    // The old key is out: its tokens of both kinds are dead.
    let _ = heartbeat(&before).await.error(403, "fingerprint_mismatch");
    let _ = refresh(&engine, &before.guid, &before.refresh_token, true).await.error(401, "refresh_token_revoked");
    let _ = heartbeat(&after).await.ok();
    assert_eq!(count(&engine, "SELECT count(*) FROM device_keys WHERE retired_at IS NULL").await, 1);

    let third = ask(&engine, "web", &code, &new_key()).await;
    let _ = decide(&engine, &operator, &third, json!({"conflict_resolution": "coexist"})).await.ok();
    assert_ne!(third.finish(site).await.guid, before.guid);
    let fourth = ask(&engine, "web", &code, &new_key()).await;
    let several =
        decide(&engine, &operator, &fourth, json!({"conflict_resolution": "overwrite"})).await.error(409, "ambiguous_hostname");
    assert_eq!(several.body["guids"].as_array().map(Vec::len), Some(2));
    let _ = decide(&engine, &operator, &fourth, json!({"guid": before.guid})).await.ok();
    assert_eq!(fourth.finish(site).await.guid, before.guid);
}

#[tokio::test]
async fn decisions_at_the_same_time_are_one_decision() {
    let engine = TestEngine::start().await;
    let (_, code) = engine.site("north").await;
    let admin = engine.admin().await;
    let pending = ask(&engine, "web", &code, &new_key()).await;
    let id = engine.approval(pending.reference()).await;
    let posts = (0..8).map(|n| {
        let (admin, verb) = (&admin, if n % 2 == 0 { "approve" } else { "deny" });
        let path = format!("/api/admin/device-approvals/{id}/{verb}");
        async move { admin.post(&path, json!({})).await.status }
    });
    let statuses = futures::future::join_all(posts).await;
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 409].contains(status)), "{statuses:?}");
}

#[tokio::test]
async fn a_rotated_refresh_token_works_once_more_only_while_its_successor_is_unused() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let guid = &device.guid;
    let first = refresh(&engine, guid, &device.refresh_token, true).await.ok();
    assert_eq!((&first["expires_in"], &first["token_type"]), (&json!(900), &json!("Bearer")));
    assert_eq!(first["remote_ops_route"]["available"], true);
    let _ = heartbeat(&with_token(&device, token(&first, "access_token"))).await.ok();

    // The answer was lost: the same token gives another successor, and the lost one ends with its first use later.
    let second = refresh(&engine, guid, &device.refresh_token, true).await.ok();
    let lost = token(&first, "refresh_token");
    let kept = token(&second, "refresh_token");
    assert_ne!(lost, kept);
    let third = refresh(&engine, guid, kept, true).await.ok();
    let newest = token(&third, "refresh_token");

    // Somebody else has the old one: nobody of the family is let in any more.
    let _ = refresh(&engine, guid, &device.refresh_token, true).await.error(401, "refresh_token_revoked");
    let _ = refresh(&engine, guid, newest, true).await.error(401, "refresh_token_revoked");
    assert_eq!(count(&engine, "SELECT count(*) FROM audit_events WHERE action = 'device.refresh_token_reused'").await, 1);

    // The minute ends the second chance too.
    let other = engine.device(site).await;
    let _ = refresh(&engine, &other.guid, &other.refresh_token, true).await.ok();
    sql(&engine, "UPDATE refresh_tokens SET rotated_at = rotated_at - interval '61 seconds'").await;
    let _ = refresh(&engine, &other.guid, &other.refresh_token, true).await.error(401, "refresh_token_revoked");
}

#[tokio::test]
async fn refreshes_at_the_same_time_keep_the_agent_in() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let calls = (0..6).map(|_| refresh(&engine, &device.guid, &device.refresh_token, true));
    let answers: Vec<Value> = futures::future::join_all(calls).await.into_iter().map(borealis_tests::Reply::ok).collect();
    assert_eq!(count(&engine, "SELECT count(*) FROM refresh_tokens WHERE rotated_at IS NULL AND revoked_at IS NULL").await, 1);
    // Whichever answer the agent keeps, it goes on.
    let _ = refresh(&engine, &device.guid, token(&answers[0], "refresh_token"), true).await.ok();
}

#[tokio::test]
async fn an_agent_that_does_not_rotate_keeps_its_token() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    for _ in 0..3 {
        let answer = refresh(&engine, &device.guid.to_lowercase(), &device.refresh_token, false).await.ok();
        assert_eq!(answer.get("refresh_token"), None);
    }
    let guid = &device.guid;
    let nobody = engine.anonymous();
    let _ = nobody.post("/api/agent/token/refresh", json!({"guid": guid})).await.error(400, "invalid_request");
    let raw = nobody.request(reqwest::Method::POST, "/api/agent/token/refresh").body("][");
    let _ = nobody.send(raw).await.error(400, "invalid_request");
    let _ = refresh(&engine, guid, "something", false).await.error(401, "invalid_refresh_token");
    let other = engine.device(site).await;
    let _ = refresh(&engine, guid, &other.refresh_token, false).await.error(401, "invalid_refresh_token");

    sql(&engine, "UPDATE devices SET status = 'quarantined'").await;
    let _ = refresh(&engine, guid, &device.refresh_token, false).await.ok();
    sql(&engine, "UPDATE devices SET status = 'revoked'").await;
    let _ = refresh(&engine, guid, &device.refresh_token, false).await.error(403, "device_revoked");
    sql(&engine, "UPDATE refresh_tokens SET expires_at = now()").await;
    let _ = refresh(&engine, guid, &device.refresh_token, false).await.error(401, "refresh_token_expired");
    sql(&engine, "UPDATE refresh_tokens SET revoked_at = now()").await;
    let _ = refresh(&engine, guid, &device.refresh_token, false).await.error(401, "refresh_token_revoked");
    // Nothing of a token is stored but its hash.
    let stored: Vec<Vec<u8>> =
        sqlx::query_scalar("SELECT token_hash FROM refresh_tokens").fetch_all(&engine.database.pool).await.unwrap();
    assert!(stored.iter().all(|hash| hash.len() == 32));
}

#[tokio::test]
async fn trouble_with_the_database_never_makes_an_agent_forget_itself() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    engine.app.pool.close().await;
    let refused = refresh(&engine, &device.guid, &device.refresh_token, true).await.error(502, "token_refresh_unavailable");
    assert!(refused.header("retry-after").is_some());
    let _ = heartbeat(&device).await.error(503, "database_unavailable");
}

#[tokio::test]
async fn a_device_is_known_by_its_token_and_its_row() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let nobody = engine.anonymous();
    let _ = heartbeat(&nobody).await.error(401, "missing_authorization");
    let _ = heartbeat(&with_token(&device, "x.y.z")).await.error(401, "invalid_token");
    let Credential::Bearer(good) = &device.actor.credential else { panic!("a token") };
    let mut tampered: Vec<char> = good.chars().collect();
    let middle = good.find('.').unwrap() + 20;
    tampered[middle] = if tampered[middle] == 'A' { 'B' } else { 'A' };
    let _ = heartbeat(&with_token(&device, &tampered.into_iter().collect::<String>())).await.error(401, "invalid_token");
    let unsigned = format!("{}.{}.", "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", good.split('.').nth(1).unwrap());
    let _ = heartbeat(&with_token(&device, &unsigned)).await.error(401, "invalid_token");

    // The engine's own key, but past, or for another row.
    let guid = Uuid::try_parse(&device.guid).unwrap();
    let fingerprint = borealis_protocol::keys::fingerprint(&device.key.verifying_key());
    let sign = |guid: Uuid, fingerprint: &str, version: i32, age_s: i64| {
        with_token(
            &device,
            &engine.app.keys.sign_access(guid, fingerprint, version, Utc::now() - TimeDelta::seconds(age_s)).unwrap(),
        )
    };
    let _ = heartbeat(&sign(guid, &fingerprint, 1, 900 + 50)).await.ok();
    let _ = heartbeat(&sign(guid, &fingerprint, 1, 900 + 70)).await.error(401, "token_expired");
    let _ = heartbeat(&sign(Uuid::new_v4(), &fingerprint, 1, 0)).await.error(404, "device_not_found");
    let _ = heartbeat(&sign(guid, "00", 1, 0)).await.error(403, "fingerprint_mismatch");
    let _ = heartbeat(&sign(guid, &fingerprint, 2, 0)).await.error(403, "token_version_mismatch");

    // A device's token opens nothing of an operator's, nor the other way round.
    for path in ["/api/devices", "/api/agents", "/api/admin/device-approvals", "/api/sites"] {
        let _ = device.get(path).await.error(401, "unauthorized");
    }
    let _ = heartbeat(&engine.admin().await).await.error(401, "invalid_token");

    sql(&engine, "UPDATE devices SET status = 'quarantined'").await;
    let script = device.post("/api/agent/script/request", json!({})).await.ok();
    assert_eq!((&script["status"], &script["poll_after_ms"]), (&json!("quarantined"), &json!(60000)));
    assert_eq!(script["signing_key"], device.signing_key);
    sql(&engine, "UPDATE devices SET status = 'active'").await;
    assert_eq!(device.post("/api/agent/script/request", json!({})).await.ok()["status"], "idle");
    for status in ["UPDATE devices SET status = 'revoked'", "UPDATE devices SET status = 'decommissioned'"] {
        sql(&engine, status).await;
        let _ = heartbeat(&device).await.error(403, "device_revoked");
    }
}

#[tokio::test]
async fn a_purged_device_is_refused_everywhere_and_returns_only_by_an_administrator() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let device = engine.device_named(site, "web").await;
    sql(&engine, "INSERT INTO device_purge_barriers (guid, required_token_version) SELECT guid, token_version + 1 FROM devices")
        .await;
    // Even while the row is still there.
    let _ = heartbeat(&device).await.error(401, "device_purged");
    sql(&engine, "DELETE FROM devices").await;
    let _ = heartbeat(&device).await.error(401, "device_purged");
    let _ = refresh(&engine, &device.guid, &device.refresh_token, true).await.error(401, "device_purged");

    let pending = ask(&engine, "web", &code, &device.key).await;
    let body = json!({"guid": device.guid});
    let _ = decide(&engine, &engine.operator(&[site]).await, &pending, body.clone()).await.error(404, "not found");
    let _ = decide(&engine, &engine.admin().await, &pending, body).await.ok();
    let back = pending.finish(site).await;
    assert_eq!(back.guid, device.guid);
    let _ = heartbeat(&back).await.ok();
    let _ = heartbeat(&device).await.error(403, "token_version_mismatch");
    assert_eq!(count(&engine, "SELECT count(*) FROM device_purge_barriers").await, 0);
    assert_eq!(count(&engine, "SELECT token_version::bigint FROM devices").await, 2, "no token from before the purge counts");
}

#[tokio::test]
async fn a_purge_outlives_open_doors_and_approvals_from_before() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let (admin, device) = (engine.admin().await, engine.device_named(site, "web").await);
    // Approved by an administrator, and then somebody purges it before the machine comes for its tokens.
    let approved = ask(&engine, "web", &code, &device.key).await;
    let _ = decide(&engine, &admin, &approved, json!({})).await.ok();
    sql(&engine, "INSERT INTO device_purge_barriers (guid, required_token_version) SELECT guid, token_version + 1 FROM devices")
        .await;
    sql(&engine, "DELETE FROM devices").await;
    assert_eq!(approved.poll().await.ok()["status"], "denied");
    assert_eq!(count(&engine, "SELECT count(*) FROM audit_events WHERE action = 'device_approval.withdraw'").await, 1);

    // The old key at an open door is a new machine: another GUID, and the purged one stays away.
    let _ = admin
        .post(&format!("/api/sites/{site}/auto-approval"), json!({"auto_approve_until": Utc::now().timestamp() + 60}))
        .await
        .ok();
    let again = ask(&engine, "web", &code, &device.key).await.finish(site).await;
    assert_ne!(again.guid, device.guid);
    let _ = heartbeat(&again).await.ok();
    let _ = heartbeat(&device).await.error(401, "device_purged");
    let _ = refresh(&engine, &device.guid, &device.refresh_token, true).await.error(401, "device_purged");
    let _ = refresh(&engine, &device.guid, &again.refresh_token, true).await.error(401, "device_purged");
    assert_eq!(count(&engine, "SELECT count(*) FROM device_purge_barriers").await, 1);

    // Nor can the key be bound to the purged GUID beside its new one.
    let twice = ask(&engine, "web-2", &code, &device.key).await;
    assert_eq!(twice.finish(site).await.guid, again.guid);
    let _ = admin.post(&format!("/api/sites/{site}/auto-approval"), json!({"auto_approve_until": 0})).await.ok();
    let bound = ask(&engine, "web-3", &code, &device.key).await;
    let _ = decide(&engine, &admin, &bound, json!({"guid": device.guid})).await.error(409, "fingerprint_in_use");
    let _ = decide(&engine, &admin, &bound, json!({"guid": "not one"})).await.error(400, "invalid_guid");
}

#[tokio::test]
async fn requests_are_listed_by_status_and_end_by_themselves() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    let (admin, operator) = (engine.admin().await, engine.operator(&[site]).await);
    let key = new_key();
    let installed = json!({
        "hostname": "installed", "enrollment_code": code, "agent_pubkey": spki(&key), "client_nonce": STANDARD.encode([1; 16]),
        "onboarding_context": {"job_id": 7, "run_id": 0, "target": " 10.0.0.9 "},
    });
    let _ = engine.anonymous().post("/api/agent/enroll/request", installed).await.ok();
    let fetched = ask(&engine, "never-fetched", &code, &new_key()).await;
    let _ = decide(&engine, &operator, &fetched, json!({})).await.ok();
    let names =
        |rows: Vec<Value>| rows.iter().map(|row| row["hostname_claimed"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    for (query, expected) in [
        ("", vec!["installed", "never-fetched"]),
        ("?status=all", vec!["installed", "never-fetched"]),
        ("?status=pending", vec!["installed"]),
        ("?status=approved", vec!["never-fetched"]),
        ("?status=expired", vec![]),
        ("?limit=1", vec!["installed"]),
    ] {
        assert_eq!(names(approvals(&operator, query).await), expected, "{query}");
    }
    let row = approvals(&operator, "?status=pending").await.remove(0);
    assert_eq!(
        (&row["onboarding_job_id"], &row["onboarding_run_id"], &row["onboarding_target"], &row["guid"], &row["site_name"]),
        (&json!(7), &Value::Null, &json!("10.0.0.9"), &Value::Null, &json!("north"))
    );
    let row = approvals(&operator, "?status=approved").await.remove(0);
    assert_eq!(row["approved_by_username"], operator.name);

    // Seven days for a decision, a day to come for the tokens.
    let expire = || async { borealis_engine::enrollment::expire_old(&engine.database.pool).await.unwrap() };
    sql(
        &engine,
        "UPDATE device_approvals SET updated_at = now() - interval '6 days', decided_at = decided_at - interval '23 hours'",
    )
    .await;
    assert_eq!(expire().await, 0);
    sql(
        &engine,
        "UPDATE device_approvals SET updated_at = now() - interval '8 days', decided_at = decided_at - interval '2 hours'",
    )
    .await;
    assert_eq!(expire().await, 2);
    assert_eq!(fetched.poll().await.ok(), json!({"status": "expired"}));
    assert_eq!(names(approvals(&admin, "?status=expired").await).len(), 2);
    assert_eq!(count(&engine, "SELECT count(*) FROM audit_events WHERE action = 'device_approval.expire'").await, 2);

    // A key that could not be read any more would be told so, and not let in.
    let broken = ask(&engine, "broken", &code, &new_key()).await;
    sql(&engine, "UPDATE device_approvals SET public_key = '\\x00' WHERE status = 'pending'").await;
    let _ = broken.poll().await.error(400, "agent_pubkey_invalid");
}

#[tokio::test]
async fn reports_change_the_devices_own_row_and_nothing_else() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device_named(site, "web").await;
    let other = engine.device_named(site, "db").await;
    let admin = engine.admin().await;
    let read = || async { admin.get(&format!("/api/devices/{}", device.guid)).await.ok() };

    let beat = json!({
        "hostname": "web-renamed", "guid": other.guid, "internal_ip": "10.0.0.4", "agent_hash": "b7", "surprise": [1],
        "metrics": {"operating_system": "Debian\u{0} 12", "uptime": 77, "cpu_percent": 12.5},
        "inventory": {"memory": [{"slot": "a\u{0}"}], "software": [{"name": "ignored"}]},
        "agent_role_health": {"roles": [{"role": "script_exec_system", "status": "running"}], "reported_at": 5},
    });
    let answer = device.post("/api/agent/heartbeat", beat).await.ok();
    assert_eq!((&answer["site_name"], &answer["metadata_field_acks"]), (&json!("north"), &json!([])));
    let row = read().await;
    assert_eq!(
        (&row["hostname"], &row["reported_hostname"], &row["operating_system"], &row["status"]),
        (&json!("web"), &json!("web-renamed"), &json!("Debian 12"), &json!("Online"))
    );
    assert_eq!((&row["memory"], &row["software"]), (&json!([{"slot": "a"}]), &json!([])));
    assert_eq!(row["agent_role_health"]["roles"][0]["role_id"], "system:context_system");
    assert_eq!((&row["site_id"], &row["agent_version_status"]), (&json!(site), &json!("Up-to-Date")));
    assert_eq!(admin.get(&format!("/api/devices/{}", other.guid)).await.ok()["hostname"], "db");

    // A status is a sign of life each time, and written once in thirty seconds.
    let status = json!({"boot_id": "b", "phase": "steady_state_online", "status": "ok", "milestones": [{"key": "any"}]});
    assert_eq!(device.post("/api/agent/status", status.clone()).await.ok().get("coalesced"), None);
    sql(&engine, "UPDATE devices SET last_seen = now() - interval '1 hour'").await;
    let again = device.post("/api/agent/status", status.clone()).await.ok();
    assert_eq!((&again["coalesced"], &again["poll_after_ms"]), (&json!(true), &json!(30000)));
    assert_eq!(read().await["status"], "Online");
    sql(&engine, "UPDATE device_details SET status_accepted_at = now() - interval '31 seconds'").await;
    assert_eq!(device.post("/api/agent/status", status).await.ok().get("coalesced"), None);
    // The startup role outlives a heartbeat that does not know it.
    let _ =
        device.post("/api/agent/heartbeat", json!({"agent_role_health": {"roles": [{"role": "x", "status": "ok"}]}})).await.ok();
    let roles = read().await["agent_role_health"]["roles"].clone();
    let ids: Vec<&str> = roles.as_array().unwrap().iter().filter_map(|role| role["role_id"].as_str()).collect();
    assert_eq!(ids, ["system:system_heartbeat", "system:x"]);

    // Details: absent keeps, empty clears; they belong to the token's device, whatever the name says.
    let details = |details: Value| json!({"hostname": "db", "details": details});
    let report = details(
        json!({"summary": {"domain": "corp", "last_user": "ann", "x": {"a": 1}}, "software": [{"name": "bash", "source": "dpkg"}], "services": [{"name": "s"}]}),
    );
    assert_eq!(device.post("/api/agent/details", report.clone()).await.ok(), json!({"status": "ok"}));
    assert_eq!(device.post("/api/agent/details", report).await.ok(), json!({"status": "ok", "coalesced": true}));
    let _ = device
        .post("/api/agent/details", details(json!({"summary": {"last_user": "bob", "y": "more"}, "services": []})))
        .await
        .ok();
    let row = read().await;
    assert_eq!((&row["software"][0]["name"], &row["services"]), (&json!("bash"), &json!([])));
    assert_eq!((&row["summary"]["last_user"], &row["domain"]), (&json!("bob"), &json!("corp")), "replaced and kept");
    assert_eq!((&row["summary"]["x"], &row["summary"]["y"]), (&Value::Null, &Value::Null), "what nobody knows is not kept");
    assert_eq!((&row["hostname"], &row["reported_hostname"]), (&json!("web"), &json!("db")));
    assert_eq!(admin.get(&format!("/api/devices/{}", other.guid)).await.ok()["software"], json!([]));
    let _ = device.post("/api/agent/details", json!({"details": []})).await.error(400, "invalid payload");
    let _ = device
        .post("/api/agent/details", json!({"hostname": "web", "guid": other.guid, "details": {}}))
        .await
        .error(403, "guid_mismatch");
    let raw = device.request(reqwest::Method::POST, "/api/agent/heartbeat").body("{");
    let _ = device.send(raw).await.error(400, "invalid_request");
}

#[tokio::test]
async fn bodies_are_bounded_per_route() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let megabytes = |n: usize| json!({"hostname": "web", "details": {"filler": "x".repeat(n * 1024 * 1024)}});
    let _ = device.post("/api/agent/heartbeat", megabytes(7)).await.ok();
    let _ = device.post("/api/agent/heartbeat", megabytes(8)).await.error(413, "body_too_large");
    let _ = device.post("/api/agent/details", megabytes(23)).await.ok();
    let _ = device.post("/api/agent/details", megabytes(24)).await.error(413, "body_too_large");
    let _ = device.post("/api/agent/status", megabytes(1)).await.error(413, "body_too_large");
}

#[tokio::test]
async fn device_lists_come_in_pages_and_old_codes_routes_are_gone() {
    let engine = TestEngine::start().await;
    let (site, code) = engine.site("north").await;
    for name in ["b", "A", "c", "a"] {
        let pending = ask(&engine, name, &code, &new_key()).await;
        let _ = decide(&engine, &engine.admin().await, &pending, json!({"conflict_resolution": "coexist"})).await.ok();
        let _ = pending.finish(site).await;
    }
    let admin = engine.admin().await;
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = admin.get(&format!("/api/devices?limit=1&slim=1&cursor={cursor}")).await.ok();
        names
            .extend(page["devices"].as_array().unwrap().iter().map(|device| device["hostname"].as_str().unwrap().to_lowercase()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["a", "a", "b", "c"]);
    assert_eq!(admin.get("/api/devices?hostname=A").await.ok()["devices"].as_array().map(Vec::len), Some(2));
    let _ = admin.get("/api/devices?limit=0").await.error(400, "invalid_limit");
    let _ = admin.get("/api/devices?cursor=zz").await.error(400, "invalid_cursor");
    let _ = admin.get("/api/devices/nothing").await.error(400, "invalid guid");
    assert_eq!(admin.get("/api/agents").await.ok(), json!({}));
    let codes = admin.get("/api/admin/enrollment-codes").await.ok();
    assert_eq!((&codes["codes"][0]["id"], &codes["codes"][0]["code"]), (&json!(format!("site:{site}")), &json!(code)));
    let _ = admin.post("/api/admin/enrollment-codes", json!({})).await.error(410, "legacy_endpoint_removed_use_sites_api");
    let _ = admin.delete("/api/admin/enrollment-codes/site:1").await.error(410, "legacy_endpoint_removed_use_sites_api");
}
