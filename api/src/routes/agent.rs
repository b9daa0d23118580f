//! What agents report. Fields an agent sends that this engine does not know are ignored.

use axum::{
    Json,
    extract::{Request, State},
};
use borealis_engine::{Error, devices::ingest, work};
use borealis_protocol::rest::ScriptIdle;
use serde_json::{Map, Value, json};
use utoipa_axum::routes;

use crate::{
    access::{Device, Routes},
    body::{self, BodyLimit},
    errors::Result,
    sockets::events::ToOperator,
    state::App,
};

/// The largest heartbeat.
const HEARTBEAT: BodyLimit = BodyLimit { bytes: 8 * 1024 * 1024, values: 100_000 };
/// The largest details.
const DETAILS: BodyLimit = BodyLimit { bytes: 24 * 1024 * 1024, values: 250_000 };
/// Milliseconds agents are asked to wait between heartbeats.
const POLL_AFTER_MS: u64 = 15_000;
/// The same after a report that said nothing new.
const COALESCED_AFTER_MS: u64 = 30_000;

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .device(routes!(status))
        .device(routes!(script_request))
        .body(HEARTBEAT)
        .device(routes!(heartbeat))
        .body(DETAILS)
        .device(routes!(details))
}

/// The members of a JSON object.
async fn object(request: Request) -> Result<Map<String, Value>> {
    let bytes = body::bytes(request).await?;
    let read = work::sized(bytes.len(), move || serde_json::from_slice(&bytes)).await?;
    Ok(read.map_err(|_| Error::invalid("invalid_request", "The body must be a JSON object."))?)
}

/// Say that the machine is alive, with what changes often.
#[utoipa::path(post, path = "/api/agent/heartbeat", tag = "Agents", request_body = Value, responses(
    (status = 200, body = Value, description = "`{status: ok, poll_after_ms, site_id, site_name, metadata_fields: {}, metadata_field_acks: [field_001, ...], socket_connected}`: the fields sent that need not be sent again; whether the agent of the service has a socket at any API process; and `signing_key, signing_key_successions` once the script key has been rotated"),
    (status = 400, description = "`invalid_request`"),
    (status = 401, description = "`missing_authorization`, `token_expired`, `invalid_token`, `invalid_claims`, `device_purged`"),
    (status = 403, description = "`fingerprint_mismatch`, `token_version_mismatch`, `device_revoked`"),
    (status = 404, description = "`device_not_found`, `device_not_registered`"),
    (status = 413, description = "`body_too_large`: more than 8 MiB"),
    (status = 429, description = "`rate_limited`"),
))]
async fn heartbeat(State(app): State<App>, device: Device, request: Request) -> Result<Json<Value>> {
    let body = object(request).await?;
    let noted = ingest::heartbeat(&app.pool, &device.identity, &device.context, &body).await?;
    let mut answer = json!({
        "status": "ok", "poll_after_ms": POLL_AFTER_MS, "site_id": noted.site_id, "site_name": noted.site_name,
        "metadata_fields": {}, "metadata_field_acks": noted.metadata_acks, "socket_connected": noted.has_socket,
    });
    let key = app.keys.script_key();
    if !key.successions().is_empty() {
        answer["signing_key"] = key.spki_base64().into();
        answer["signing_key_successions"] = serde_json::to_value(key.successions()).map_err(Error::from)?;
    }
    Ok(Json(answer))
}

/// Report the progress of the agent's start.
#[utoipa::path(post, path = "/api/agent/status", tag = "Agents", request_body = Value, responses(
    (status = 200, body = Value, description = "`{status: ok, poll_after_ms, site_id, site_name, coalesced?}`"),
    (status = 400, description = "`invalid_request`"),
    (status = 401, description = "As of the heartbeat"),
    (status = 403, description = "As of the heartbeat"),
    (status = 404, description = "`device_not_found`, `device_not_registered`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn status(State(app): State<App>, device: Device, request: Request) -> Result<Json<Value>> {
    let body = object(request).await?;
    let outcome = ingest::status(&app.pool, &device.identity, &device.context, &body).await?;
    if let Some(event) = outcome.event {
        app.hub.to_site(outcome.noted.site_id, ToOperator::AgentStatus, event).await;
    }
    let noted = outcome.noted;
    let mut answer = json!({"status": "ok", "site_id": noted.site_id, "site_name": noted.site_name});
    answer["poll_after_ms"] = if noted.coalesced { COALESCED_AFTER_MS } else { POLL_AFTER_MS }.into();
    if noted.coalesced {
        answer["coalesced"] = true.into();
    }
    Ok(Json(answer))
}

/// Report the inventory. A list that is absent is kept as it was, an empty one clears.
#[utoipa::path(post, path = "/api/agent/details", tag = "Agents", request_body = Value, responses(
    (status = 200, body = Value, description = "`{status: ok, coalesced?}`"),
    (status = 400, description = "`invalid payload`"),
    (status = 401, description = "As of the heartbeat"),
    (status = 403, description = "`guid_mismatch`, `fingerprint_mismatch`, and as of the heartbeat"),
    (status = 404, description = "`device_not_found`, `device_not_registered`"),
    (status = 413, description = "`body_too_large`: more than 24 MiB; `part_too_large`: more than 4 MiB of one document"),
    (status = 429, description = "`rate_limited`"),
))]
async fn details(State(app): State<App>, device: Device, request: Request) -> Result<Json<Value>> {
    let bytes = body::bytes(request).await?;
    let noted = ingest::details(&app.pool, &device.identity, &device.context, bytes.into()).await?;
    for (changed, event, change) in [
        (noted.services_changed, ToOperator::DeviceServices, "updated"),
        (noted.software_changed, ToOperator::DeviceInventory, "software_updated"),
    ] {
        if changed {
            app.hub.to_site(noted.site_id, event, json!({"hostname": device.hostname, "change": change})).await;
        }
    }
    Ok(Json(if noted.coalesced { json!({"status": "ok", "coalesced": true}) } else { json!({"status": "ok"}) }))
}

/// Ask for scripts. There are never any: jobs travel over the socket. Tells the key scripts are signed with.
#[utoipa::path(post, path = "/api/agent/script/request", tag = "Agents", responses(
    (status = 200, body = Value, description = "`{status: idle|quarantined, poll_after_ms, sig_alg: ed25519, signing_key}`"),
    (status = 401, description = "As of the heartbeat"),
    (status = 403, description = "As of the heartbeat"),
    (status = 404, description = "`device_not_found`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn script_request(State(app): State<App>, device: Device) -> Json<ScriptIdle> {
    let active = device.status == "active";
    Json(ScriptIdle {
        status: if active { "idle" } else { "quarantined" }.to_owned(),
        poll_after_ms: if active { 30_000 } else { 60_000 },
        sig_alg: "ed25519".to_owned(),
        signing_key: app.keys.script_public_spki_base64(),
    })
}
