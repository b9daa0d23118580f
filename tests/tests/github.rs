//! The GitHub token, against a server that answers as GitHub does.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    http::{HeaderMap, StatusCode},
    response::IntoResponse,
    routing,
};
use borealis_tests::{TestEngine, engine::PASSWORD};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use url::Url;

const PATH: &str = "/api/github/token";
const GOOD: &str = "ghp_a-token-with-enough-of-it-1234";

/// Answers `/rate_limit` by the token: good, weak, unknown, or broken. Keeps what it was asked with.
async fn stand_in(seen: Arc<Mutex<Vec<HeaderMap>>>) -> Url {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let base = format!("http://{}/", listener.local_addr().expect("its address"));
    let answer = move |headers: HeaderMap| async move {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
        seen.lock().expect("the list").push(headers);
        let limit = |limit: &'static str| ([("x-ratelimit-limit", limit)], "{}").into_response();
        match token.strip_prefix("Bearer ") {
            Some(GOOD) => limit("5000"),
            Some("weak") => limit("60"),
            Some("moved") => (StatusCode::FOUND, [("location", "http://169.254.169.254/")]).into_response(),
            Some("broken") => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            _ => StatusCode::UNAUTHORIZED.into_response(),
        }
    };
    let github = Router::new().route("/rate_limit", routing::get(answer));
    tokio::spawn(async move { axum::serve(listener, github).await.expect("a server") });
    base.parse().expect("a URL")
}

#[tokio::test]
async fn the_token_is_kept_sealed_and_judged_by_github() {
    let seen: Arc<Mutex<Vec<HeaderMap>>> = Arc::default();
    let github = stand_in(Arc::clone(&seen)).await;
    let engine = TestEngine::with(|settings| {
        settings.access.egress = format!("127.0.0.1:{}", github.port().expect("a port")).parse().expect("a policy");
        settings.github_api_url = github.clone();
    })
    .await;
    let admin = engine.admin().await;
    let missing = admin.get(PATH).await.ok();
    for (field, value) in [
        ("token", json!("")),
        ("has_token", json!(false)),
        ("valid", json!(false)),
        ("status", json!("missing")),
        ("configured", json!(true)),
        ("locked", json!(false)),
        ("reset_required", json!(false)),
        ("checked_at", json!(0)),
        ("rate_limit", Value::Null),
    ] {
        assert_eq!(missing[field], value, "{field} of {missing}");
    }
    engine.age_step_ups().await;
    let _ = admin.post(PATH, json!({"token": GOOD})).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = admin.post(PATH, json!({"token": "with a space"})).await.error(400, "invalid_token");
    let _ = admin.post(PATH, json!({})).await.error(400, "invalid_json");

    let set = admin.post(PATH, json!({"token": format!(" {GOOD}\n")})).await.expect(200);
    assert!(!set.text.contains(GOOD), "{}", set.text);
    let (set, shown) = (set.body, admin.get(PATH).await.ok());
    for answer in [&set, &shown] {
        assert_eq!(
            (&answer["status"], &answer["valid"], &answer["rate_limit"], &answer["token_hint"], &answer["token"]),
            (&json!("ok"), &json!(true), &json!(5000), &json!("1234"), &json!("")),
            "{answer}"
        );
        assert!(answer["checked_at"].as_i64().is_some_and(|at| at > 0), "{answer}");
    }
    let sealed: String =
        sqlx::query_scalar("SELECT token_sealed FROM github_token").fetch_one(&engine.database.pool).await.expect("a row");
    assert!(sealed.starts_with("aegis:v2:"), "{sealed}");

    for (token, status, error, limit) in [
        ("weak", "insufficient", Value::Null, json!(60)),
        ("unknown", "invalid", Value::Null, Value::Null),
        ("broken", "error", json!("github_failed"), Value::Null),
        // A redirect is not followed.
        ("moved", "error", json!("github_failed"), Value::Null),
    ] {
        let answer = admin.post(PATH, json!({"token": token})).await.ok();
        let found = (&answer["status"], &answer["valid"], &answer["error"], &answer["rate_limit"], &answer["has_token"]);
        assert_eq!(found, (&json!(status), &json!(false), &error, &limit, &json!(true)), "{answer}");
        assert_eq!(answer["token_hint"], "", "a short token is not told by its end");
    }
    let gone = admin.post(PATH, json!({"token": " "})).await.ok();
    assert_eq!((&gone["status"], &gone["has_token"]), (&json!("missing"), &json!(false)));

    // GitHub saw its own token, and nothing of ours.
    let session = match &admin.credential {
        borealis_tests::actor::Credential::Bearer(token) => token.clone(),
        _ => panic!("no session"),
    };
    let seen: Vec<HeaderMap> = seen.lock().expect("the list").clone();
    assert_eq!(seen.len(), 6);
    for headers in &seen {
        assert!(!headers.contains_key("cookie") && !headers.contains_key("x-github-token"), "{headers:?}");
        assert!(headers.values().all(|value| !value.to_str().unwrap_or_default().contains(&session)), "{headers:?}");
    }
    let audit = admin.get("/api/audit?object_kind=github_token").await.expect(200);
    assert_eq!(audit.body["events"].as_array().map(Vec::len), Some(6), "{}", audit.text);
    assert!(!audit.text.contains(GOOD));
}

#[tokio::test]
async fn github_is_asked_only_where_the_policy_lets() {
    let github = stand_in(Arc::default()).await;
    let engine = TestEngine::with(|settings| settings.github_api_url = github.clone()).await;
    let admin = engine.admin().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let answer = admin.post(PATH, json!({"token": GOOD})).await.ok();
    assert_eq!((&answer["status"], &answer["error"]), (&json!("error"), &json!("egress_refused")), "{answer}");
}
