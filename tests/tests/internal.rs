//! The internal listener: a request is accepted once, whole, fresh, and from somebody who knows the engine secret.

use borealis_engine::internal::{self, Key, Signed};
use borealis_tests::{Reply, TestEngine};
use borealis_workers::api_client::{ApiClient, HostServiceEvent};
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

const EVENT: &str = "/api/internal/job-scheduler/host-service-event";
const BASE_URL: &str = "/api/internal/job-scheduler/public-base-url";

/// A request, to be signed and then perhaps changed.
#[derive(Clone)]
struct Request {
    method: &'static str,
    target: String,
    timestamp: String,
    nonce: String,
    worker: String,
    key_id: Option<&'static str>,
    body: String,
    signature: String,
}

impl Request {
    fn new(secret: &str, method: &'static str, target: &str, body: &str, age_s: i64) -> Self {
        let mut request = Self {
            method,
            target: target.into(),
            timestamp: (chrono::Utc::now().timestamp() - age_s).to_string(),
            nonce: internal::nonce(),
            worker: Uuid::new_v4().to_string(),
            key_id: None,
            body: body.into(),
            signature: String::new(),
        };
        request.signature = Key::derive(secret).sign(&Signed {
            method,
            path_and_query: target,
            timestamp: &request.timestamp,
            nonce: &request.nonce,
            worker: &request.worker,
            body: body.as_bytes(),
        });
        request
    }

    async fn send(&self, engine: &TestEngine) -> (u16, Value) {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let url = format!("http://{}{}", engine.internal_addr, self.target);
        let mut request = client
            .request(self.method.parse().expect("a method"), url)
            .header(internal::TIMESTAMP_HEADER, &self.timestamp)
            .header(internal::NONCE_HEADER, &self.nonce)
            .header(internal::WORKER_HEADER, &self.worker)
            .header(internal::SIGNATURE_HEADER, &self.signature)
            .body(self.body.clone());
        if let Some(key_id) = self.key_id {
            request = request.header(internal::KEY_HEADER, key_id);
        }
        let answer = request.send().await.expect("an answer");
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap_or_default())
    }
}

fn secret(engine: &TestEngine) -> String {
    engine.engine_secret()
}

#[track_caller]
fn refused(answer: &(u16, Value), code: &str) {
    assert_eq!((answer.0, answer.1["error"].as_str()), (401, Some(code)), "{answer:?}");
}

#[tokio::test]
async fn a_signed_request_is_accepted_once() {
    let engine = TestEngine::start().await;
    let request = Request::new(&secret(&engine), "GET", BASE_URL, "", 0);
    let answer = request.send(&engine).await;
    assert_eq!(answer.0, 200, "{answer:?}");
    assert!(answer.1["public_base_url"].as_str().is_some_and(|url| url.starts_with("http://127.0.0.1:")), "{answer:?}");
    refused(&request.send(&engine).await, "replayed_request");
}

/// What a thief does to a request.
type Change = fn(&mut Request);

#[tokio::test]
async fn what_was_changed_after_signing_is_refused() {
    let engine = TestEngine::start().await;
    let body = r#"{"hostname":"a","event_name":"quick_job_run"}"#;
    let signed = || Request::new(&secret(&engine), "POST", &format!("{EVENT}?a=1&b=2"), body, 0);
    let changes: [(&str, Change); 9] = [
        ("body", |request| request.body = request.body.replace("\"a\"", "\"b\"")),
        ("path", |request| request.target = request.target.replace("host-service-event", "workflow/start")),
        ("query", |request| request.target = request.target.replace("a=1&b=2", "b=2&a=1")),
        ("no query", |request| request.target = EVENT.into()),
        ("nonce", |request| request.nonce = internal::nonce()),
        ("worker", |request| request.worker = Uuid::new_v4().to_string()),
        ("timestamp", |request| request.timestamp = (chrono::Utc::now().timestamp() + 1).to_string()),
        ("signature", |request| request.signature = request.signature.replace("v2=", "v1=")),
        ("key", |request| request.key_id = Some("previous")),
    ];
    for (what, change) in changes {
        let mut request = signed();
        change(&mut request);
        let answer = request.send(&engine).await;
        assert_eq!((answer.0, answer.1["error"].as_str()), (401, Some("unauthorized")), "{what}: {answer:?}");
    }
    assert_eq!(signed().send(&engine).await.0, 200);
    refused(&Request::new("another secret", "GET", BASE_URL, "", 0).send(&engine).await, "unauthorized");
    for age in [90, -90] {
        refused(&Request::new(&secret(&engine), "GET", BASE_URL, "", age).send(&engine).await, "stale_request");
    }
}

#[tokio::test]
async fn the_public_listener_knows_no_internal_route_and_the_internal_one_no_public() {
    let engine = TestEngine::start().await;
    let _: Reply = engine.anonymous().get(BASE_URL).await.expect(404);
    let answer = reqwest_get(&engine, "/health").await;
    assert_eq!(answer, 401, "unsigned");
    assert_eq!(Request::new(&secret(&engine), "GET", "/api/sites", "", 0).send(&engine).await.0, 404);
}

async fn reqwest_get(engine: &TestEngine, path: &str) -> u16 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    client.get(format!("http://{}{path}", engine.internal_addr)).send().await.expect("an answer").status().as_u16()
}

#[tokio::test]
async fn only_events_of_the_list_are_passed_on() {
    let engine = TestEngine::start().await;
    let send = async |body: Value| Request::new(&secret(&engine), "POST", EVENT, &body.to_string(), 0).send(&engine).await;
    let (status, body) = send(json!({"payload": {}})).await;
    assert_eq!((status, body["error"].as_str()), (400, Some("hostname_and_event_name_required")));
    let (status, body) = send(json!({"hostname": "x", "event_name": "vnc_start"})).await;
    assert_eq!((status, body["error"].as_str()), (400, Some("event_not_allowed")));
    let (status, body) = send(json!({"hostname": "x", "event_name": "agent_maintenance_request"})).await;
    assert_eq!((status, &body), (200, &json!({"emitted": false, "queued": false})));
    let events = json!({"events": [
        {"device_guid": Uuid::new_v4(), "event_name": "quick_job_run"},
        {"hostname": "x", "event_name": "process_management_request"},
    ]});
    let (status, body) = send(events).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["results"][0], json!({"emitted": false, "queued": true}));
    assert_eq!(body["results"][1]["error"], "event_not_allowed");
    let start = json!({"workflow": "x", "key": "k", "input": {}, "surprise": 1}).to_string();
    let target = "/api/internal/job-scheduler/workflow/start";
    let (status, _) = Request::new(&secret(&engine), "POST", target, &start, 0).send(&engine).await;
    assert_eq!(status, 400, "unknown keys are refused");
}

#[tokio::test]
async fn a_worker_speaks_the_scheme() {
    let engine = TestEngine::start().await;
    let base = Url::parse(&format!("http://{}", engine.internal_addr)).expect("a URL");
    let client = ApiClient::new(vec![base.clone()], &engine.app.settings.engine_secret_file, Uuid::new_v4()).expect("a client");
    assert!(client.public_base_url().await.expect("a URL").starts_with("http://127.0.0.1:"));
    let event = HostServiceEvent { device_guid: Uuid::new_v4(), event_name: "quick_job_run", payload: Value::Null };
    let results = client.host_service_events(&[event.clone(), event]).await.expect("results");
    assert!(results.len() == 2 && results.iter().all(|result| result.queued && !result.emitted));
    let other = engine.state_dir().join("another.secret");
    borealis_engine::keys::engine_secret(&other).expect("another secret");
    let stranger = ApiClient::new(vec![base], &other, Uuid::new_v4()).expect("a client");
    assert_eq!(stranger.public_base_url().await.expect_err("a refusal").code, "unauthorized");
}
