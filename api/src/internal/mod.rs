//! The internal listener: what workers, and other API processes, ask of the API process. Every request is signed (see [`internal`]); there is no
//! other way in, and no route of the public listener is here.

use std::collections::HashSet;

use axum::{
    Extension, Json as JsonBody, Router,
    body::Body,
    extract::{Request, State},
    http::HeaderMap,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use borealis_engine::{
    Error, Kind,
    devices::sockets,
    hold::EVERY_EPOCH,
    internal::{self, Signed},
};
use borealis_workflows::Registry;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    body::{BodyLimit, Json},
    errors::{ApiError, Result},
    metrics::Answering,
    sockets::by_hostname,
    state::App,
};

mod calls;
pub mod peers;
mod workflow;

pub use calls::AgentCall;

/// The largest body, in bytes.
pub const BODY_LIMIT: usize = 2 * 1024 * 1024;
/// The most events of one request.
pub const EVENTS: usize = 20_000;

/// One route of this listener. All of them are for workers and for other API processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Upper case.
    pub method: &'static str,
    /// The whole path.
    pub path: &'static str,
}

/// The route of calls to agents.
pub const AGENT_CALL: &str = "/api/internal/job-scheduler/agent-call";

/// Every route of this listener.
pub const TABLE: [Entry; 5] = [
    Entry { method: "POST", path: AGENT_CALL },
    Entry { method: "GET", path: "/api/internal/job-scheduler/epoch" },
    Entry { method: "GET", path: "/api/internal/job-scheduler/public-base-url" },
    Entry { method: "POST", path: "/api/internal/job-scheduler/host-service-event" },
    Entry { method: "POST", path: "/api/internal/job-scheduler/workflow/start" },
];

/// A worker, or an API process, that has proven itself.
#[derive(Debug, Clone, Copy)]
pub struct Worker(pub Uuid);

/// Builds the service of the internal listener; `registry` holds the workflows a worker may start.
pub fn router(app: &App, registry: Registry) -> Router {
    let [call, epoch, base_url, event, start] = TABLE;
    Router::new()
        .route(call.path, post(calls::agent_call))
        .route(epoch.path, get(confirm))
        .route(base_url.path, get(public_base_url))
        .route(event.path, post(host_service_event))
        .route(start.path, post(workflow::start))
        .fallback(|| async { ApiError(Error::new(Kind::NotFound, "not_found", "There is no such route.")) })
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(registry))
        .layer(middleware::from_fn_with_state(app.clone(), verify))
        .layer(tower_http::catch_panic::CatchPanicLayer::new())
        .with_state(app.clone())
}

async fn method_not_allowed() -> Response {
    let mut response =
        ApiError(Error::new(Kind::Invalid, "method_not_allowed", "This route does not take this method.")).into_response();
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

async fn verify(State(app): State<App>, request: Request, next: Next) -> Response {
    let answering = Answering::begin("internal", &request);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let parent = one(request.headers(), "traceparent");
    let (answering, response) = match admit(&app, request).await {
        Ok(request) => {
            let request_id = Uuid::now_v7();
            let span = tracing::info_span!("request", request_id = %request_id.simple(), %method, path);
            // Which trace it belongs to is a worker's word from here on.
            let answering = answering.traced(request_id, false, parent.as_deref());
            (answering, tracing::Instrument::instrument(next.run(request), span).await)
        }
        Err(error) => (answering, error.into_response()),
    };
    answering.end(&response);
    response
}

async fn admit(app: &App, request: Request) -> Result<Request> {
    let (mut parts, body) = request.into_parts();
    let headers = &parts.headers;
    let signature = one(headers, internal::SIGNATURE_HEADER).ok_or_else(unsigned)?;
    let (nonce, worker) =
        (one(headers, internal::NONCE_HEADER).ok_or_else(unsigned)?, one(headers, internal::WORKER_HEADER).ok_or_else(unsigned)?);
    let timestamp = one(headers, internal::TIMESTAMP_HEADER).ok_or_else(unsigned)?;
    let key_id = match headers.contains_key(internal::KEY_HEADER) {
        true => Some(one(headers, internal::KEY_HEADER).ok_or_else(unsigned)?),
        false => None,
    };
    let body = axum::body::to_bytes(body, BODY_LIMIT)
        .await
        .map_err(|_| Error::new(Kind::TooLarge, "body_too_large", "The request body is larger than this route accepts."))?;
    let signed = Signed {
        method: parts.method.as_str(),
        path_and_query: parts.uri.path_and_query().map_or("/", |target| target.as_str()),
        timestamp: &timestamp,
        nonce: &nonce,
        worker: &worker,
        body: &body,
    };
    app.keys.keyring().verify(key_id.as_deref(), &signed, &signature, chrono::Utc::now().timestamp())?;
    // Last, so that only what a worker signed can use up a nonce.
    internal::remember_nonce(&app.pool, &nonce).await?;
    let worker = Uuid::try_parse(&worker).map_err(|_| unsigned())?;
    parts.extensions.insert(Worker(worker));
    parts.extensions.insert(BodyLimit { bytes: BODY_LIMIT, ..BodyLimit::USUAL });
    Ok(Request::from_parts(parts, Body::from(body)))
}

/// A header that is there exactly once.
fn one(headers: &HeaderMap, name: &str) -> Option<String> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?.to_owned();
    values.next().is_none().then_some(value)
}

fn unsigned() -> ApiError {
    ApiError(Error::new(Kind::Unauthenticated, "unauthorized", "The request is not signed by a known key."))
}

/// Whether a worker may act: this process has judged the database, and the engine is not held.
async fn confirm(State(app): State<App>) -> JsonBody<Value> {
    let epoch = app.guard.at_least();
    JsonBody(json!({"epoch": epoch, "may_act": epoch != EVERY_EPOCH}))
}

/// The URL people and agents use.
async fn public_base_url(State(app): State<App>) -> JsonBody<Value> {
    JsonBody(json!({"public_base_url": app.settings.public_base_url.as_str().trim_end_matches('/')}))
}

/// One event for one device, or `events`, a list of such.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
enum HostServiceEvents {
    Many { events: Vec<HostServiceEvent> },
    One(HostServiceEvent),
}

#[derive(Debug, serde::Deserialize)]
struct HostServiceEvent {
    /// The device; or else its hostname.
    device_guid: Option<String>,
    #[serde(default)]
    hostname: String,
    /// `system` or `currentuser`; `mode` is the older name.
    #[serde(alias = "mode")]
    service_mode: Option<String>,
    #[serde(default)]
    event_name: String,
    #[serde(default)]
    payload: Value,
}

/// What became of one event.
#[derive(Debug, Default, Clone, serde::Serialize)]
struct Emitted {
    /// Whether a socket is there to take it.
    emitted: bool,
    /// Whether it will be sent when one is.
    queued: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

/// Passes events on to agents. What is a dispatch or a cancel is read from the tables, so the event only says where to
/// look; no worker can make a device run anything that is not there.
async fn host_service_event(
    State(app): State<App>,
    Extension(worker): Extension<Worker>,
    Json(body): Json<HostServiceEvents>,
) -> Result<JsonBody<Value>> {
    match body {
        HostServiceEvents::One(event) => {
            let result = pass_on(&app, worker, vec![event]).await?.pop().unwrap_or_default();
            match result.error {
                Some(code) => Err(Error::invalid(code, "The event names no device or is not one that may be sent.").into()),
                None => Ok(JsonBody(json!({"emitted": result.emitted, "queued": result.queued}))),
            }
        }
        HostServiceEvents::Many { events } if events.len() > EVENTS => {
            Err(Error::invalid("too_many_events", format!("At most {EVENTS} events go into one request.")).into())
        }
        HostServiceEvents::Many { events } => Ok(JsonBody(json!({"results": pass_on(&app, worker, events).await?}))),
    }
}

async fn pass_on(app: &App, Worker(worker): Worker, events: Vec<HostServiceEvent>) -> Result<Vec<Emitted>> {
    let named: Vec<Uuid> = events.iter().filter_map(|event| Uuid::try_parse(event.device_guid.as_deref()?).ok()).collect();
    let connected: HashSet<Uuid> = sockets::connected(&app.pool, &named).await?.into_iter().collect();
    let mut results = Vec::with_capacity(events.len());
    let mut deliver = HashSet::new();
    for event in events {
        let refused = |error| Emitted { error: Some(error), ..Emitted::default() };
        let is_job = matches!(event.event_name.as_str(), "quick_job_run" | "quick_job_cancel");
        if event.event_name.is_empty() || (event.device_guid.is_none() && event.hostname.trim().is_empty()) {
            results.push(refused("hostname_and_event_name_required"));
            continue;
        }
        if !is_job && event.event_name != "agent_maintenance_request" {
            results.push(refused("event_not_allowed"));
            continue;
        }
        let devices = match event.device_guid.as_deref().map(Uuid::try_parse) {
            Some(Ok(device)) => {
                if is_job {
                    // Also when it is not connected: it may be by the time the notice arrives.
                    deliver.insert(device);
                }
                if connected.contains(&device) { vec![device] } else { Vec::new() }
            }
            Some(Err(_)) => {
                results.push(refused("invalid_device_guid"));
                continue;
            }
            None => by_hostname(app, event.hostname.trim(), event.service_mode.as_deref().unwrap_or("system")).await?,
        };
        if is_job {
            deliver.extend(&devices);
            let emitted = !devices.is_empty();
            // A dispatch is kept in its table until its device is there; so is a cancel.
            results.push(Emitted { emitted, queued: !emitted, error: None });
            continue;
        }
        // Names repeat; an event that is not looked up in the tables must not reach a namesake.
        let emitted = match devices.as_slice() {
            [device] => app.hub.emit(*device, &event.event_name, &event.payload).await?,
            [] => false,
            _ => {
                results.push(refused("ambiguous_hostname"));
                continue;
            }
        };
        tracing::info!(%worker, event = event.event_name, emitted, "a worker sent an event");
        results.push(Emitted { emitted, queued: false, error: None });
    }
    app.hub.deliver(&deliver.into_iter().collect::<Vec<_>>()).await;
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_names_each_route_once() {
        let distinct: HashSet<_> = TABLE.iter().map(|entry| (entry.method, entry.path)).collect();
        assert_eq!(distinct.len(), TABLE.len());
        for entry in TABLE {
            assert!(axum::http::Method::from_bytes(entry.method.as_bytes()).is_ok());
            assert!(entry.path.starts_with("/api/internal/job-scheduler/"));
        }
    }

    #[test]
    fn a_header_sent_twice_is_no_header() {
        let mut headers = HeaderMap::new();
        headers.append(internal::NONCE_HEADER, "a".parse().unwrap());
        assert_eq!(one(&headers, internal::NONCE_HEADER).as_deref(), Some("a"));
        headers.append(internal::NONCE_HEADER, "b".parse().unwrap());
        assert_eq!(one(&headers, internal::NONCE_HEADER), None);
    }
}
