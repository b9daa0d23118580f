//! How a machine becomes a device: enrollment and token refresh. Bodies that are not JSON read as empty, as agents of all ages
//! are answered by the code for the first missing field.

use axum::{
    Json,
    extract::{FromRequestParts, Request, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use borealis_engine::{
    Kind,
    access::limits::{self, Limit},
    enrollment::{
        machines, rates,
        requests::{self, Accepted, Source},
        tokens::{self, Issued, Poll, Proof, Renewal},
    },
    keys::{ACCESS_TOKEN_TTL_S, guid_text},
};
use borealis_protocol::{
    keys::to_base64,
    rest::{EnrollResponse, PollResponse, RefreshResponse},
};
use serde_json::{Map, Value, json};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{Routes, client},
    body,
    errors::{ApiError, Result},
    metrics::METERS,
    sockets::events::ToOperator,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).anonymous(routes!(request)).anonymous(routes!(poll)).anonymous(routes!(refresh))
}

/// The address a request came from, as text and as the subject of limits.
struct Peer {
    ip: String,
    subject: String,
}

impl FromRequestParts<App> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self> {
        let ip = client::client_ip(parts);
        Ok(Self { ip: ip.map(|ip| ip.to_string()).unwrap_or_default(), subject: limits::address(ip) })
    }
}

/// The members of a JSON object; none when the body is anything else.
async fn lenient(request: Request) -> Result<Map<String, Value>> {
    Ok(serde_json::from_slice(&body::bytes(request).await?).unwrap_or_default())
}

async fn approvals_changed(app: &App, id: Uuid, site_id: Option<i64>, status: &str, hostname: &str) {
    let payload = json!({"approval_id": id, "site_id": site_id, "status": status, "hostname": hostname});
    app.hub.to_site(site_id, ToOperator::DeviceApprovals, payload).await;
}

/// Ask to be enrolled.
///
/// Takes `hostname`, `enrollment_code` (the site's), `agent_pubkey` (base64 SPKI DER of an Ed25519 key), `client_nonce`
/// (base64, at least 16 bytes) and optionally `onboarding_context` `{job_id, run_id, target}`. The answer is always `pending`;
/// `auto_approved` says that the first poll will give tokens.
#[utoipa::path(post, path = "/api/agent/enroll/request", tag = "Enrollment", request_body = Value, responses(
    (status = 200, body = Value, description = "`{status: pending, approval_reference, server_nonce, poll_after_ms, signing_key, auto_approved?}`"),
    (status = 400, description = "`hostname_required`, `enrollment_code_required`, `agent_pubkey_required`, `client_nonce_required`, `invalid_hostname`, `invalid_agent_pubkey`, `invalid_client_nonce`, `invalid_enrollment_code`"),
    (status = 429, description = "`rate_limited`: per address, per key, an address with too many wrong codes, or a site with too many open requests"),
))]
async fn request(State(app): State<App>, peer: Peer, request: Request) -> Result<Json<EnrollResponse>> {
    rates::hit(&app.pool, "enroll.address", &peer.subject, app.settings.enroll_per_minute).await?;
    let request = requests::Request::parse(&lenient(request).await?)?;
    let wrong_codes = Limit { max: app.settings.enroll_wrong_codes.into(), ..limits::ENROLLMENT_CODE };
    let source = Source { ip: peer.ip, subject: peer.subject, wrong_codes };
    let accepted = requests::submit(&app.pool, &request, &source).await;
    let Accepted { approval_id, reference, server_nonce, site_id, hostname, approved, auto_approved } =
        accepted.inspect_err(|error| tracing::info!(code = error.code, ?request, "enrollment refused"))?;
    tracing::info!(?request, site_id, approved, "enrollment requested");
    approvals_changed(&app, approval_id, Some(site_id), if approved { "approved" } else { "pending" }, &hostname).await;
    Ok(Json(EnrollResponse {
        status: "pending".to_owned(),
        approval_reference: reference.to_string(),
        server_nonce: to_base64(&server_nonce),
        poll_after_ms: Some(if approved { 250 } else { 3000 }),
        auto_approved,
        signing_key: app.keys.script_public_spki_base64(),
    }))
}

/// Ask whether the request was decided.
///
/// Takes `approval_reference`, `client_nonce` and `proof_sig`: the base64 Ed25519 signature over the decoded server nonce, the
/// reference as text and the decoded client nonce. Once approved, the answer has the tokens; for ten minutes after that a valid
/// proof gives another pair and ends the first, as its answer may have been lost.
#[utoipa::path(post, path = "/api/agent/enroll/poll", tag = "Enrollment", request_body = Value, responses(
    (status = 200, body = Value, description = "`{status: pending|denied|expired|approved, ...}`; with `guid`, `access_token`, `refresh_token`, `expires_in`, `signing_key` and `remote_ops_route` when approved"),
    (status = 400, description = "`approval_reference_required`, `client_nonce_required`, `proof_sig_required`, `invalid_client_nonce`, `invalid_proof_sig`, `nonce_mismatch`, `agent_pubkey_invalid`, `invalid_proof`"),
    (status = 404, description = "`{status: unknown}`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn poll(State(app): State<App>, peer: Peer, request: Request) -> Result<Response> {
    let proof = Proof::parse(&lenient(request).await?)?;
    let said = |status: &str| PollResponse { status: status.to_owned(), ..PollResponse::default() };
    let answer = match tokens::poll(&app.pool, &app.keys, &proof, &peer.ip).await? {
        Poll::Unknown => return Ok((StatusCode::NOT_FOUND, Json(said("unknown"))).into_response()),
        Poll::Pending => PollResponse { poll_after_ms: Some(tokens::POLL_AFTER_MS), ..said("pending") },
        Poll::Denied => PollResponse { reason: Some("operator_denied".to_owned()), ..said("denied") },
        Poll::Expired => said("expired"),
        Poll::Finalized => PollResponse { detail: Some("finalized".to_owned()), ..said("approved") },
        Poll::Approved(issued) => approved(&app, &issued).await,
    };
    Ok(Json(answer).into_response())
}

async fn approved(app: &App, issued: &Issued) -> PollResponse {
    if issued.drop_sockets {
        app.hub.drop_device(issued.guid).await;
    }
    if issued.first {
        approvals_changed(app, issued.approval_id, issued.site_id, "completed", &issued.hostname).await;
    }
    PollResponse {
        status: "approved".to_owned(),
        guid: Some(guid_text(issued.guid)),
        access_token: Some(issued.access_token.expose().clone()),
        expires_in: Some(ACCESS_TOKEN_TTL_S),
        refresh_token: Some(issued.refresh_token.expose().clone()),
        token_type: Some("Bearer".to_owned()),
        signing_key: Some(app.keys.script_public_spki_base64()),
        remote_ops_route: Some(tokens::remote_ops_route(&app.keys, app.settings.public_base_url.as_str(), issued.site_id)),
        ..PollResponse::default()
    }
}

/// Get a new access token.
///
/// Takes `guid` and `refresh_token`, and `capabilities.rotates` from agents that store the new refresh token in the answer. A
/// rotated token answers once more within a minute if its successor was never used; used later, it ends the whole family. An agent
/// that says its `machine_id`, and is on the machine that the identity belongs to, goes on with a rotated token: it was restored from a
/// snapshot. On another machine it is held. `instance` is a UUID that the agent makes up at each start; of two that are there at once,
/// the second is held.
/// Transient trouble is never 401 or 403.
#[utoipa::path(post, path = "/api/agent/token/refresh", tag = "Enrollment", request_body = Value, responses(
    (status = 200, body = Value, description = "`{access_token, expires_in, token_type, refresh_token?, remote_ops_route}`"),
    (status = 400, description = "`invalid_request`"),
    (status = 401, description = "`device_purged`, `invalid_refresh_token`, `refresh_token_revoked`, `refresh_token_expired`"),
    (status = 403, description = "`device_revoked`"),
    (status = 409, description = "`identity_held`: another machine has this identity, and an operator has to decide; `identity_contested`: another agent with this identity is connected, or was within the last 90 seconds"),
    (status = 429, description = "`rate_limited`"),
    (status = 500, description = "`token_issue_failed`"),
    (status = 502, description = "`token_refresh_unavailable`"),
))]
async fn refresh(State(app): State<App>, peer: Peer, request: Request) -> Result<Response> {
    let renewal = Renewal::parse(&lenient(request).await?)?;
    let renewed = match tokens::refresh(&app.pool, &app.keys, &renewal, &peer.ip).await {
        Ok(renewed) => renewed,
        Err(mut error) if error.kind == Kind::Unavailable => {
            error.code = "token_refresh_unavailable";
            error.message = "Tokens cannot be renewed now; try again.".to_owned();
            let mut response = ApiError(error).into_response();
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            return Ok(response);
        }
        Err(error) => {
            if error.code == machines::HELD {
                METERS.identities_held.inc();
            }
            return Err(error.into());
        }
    };
    let answer = RefreshResponse {
        access_token: renewed.access_token.expose().clone(),
        expires_in: ACCESS_TOKEN_TTL_S,
        token_type: Some("Bearer".to_owned()),
        refresh_token: renewed.refresh_token.map(|token| token.expose().clone()),
        remote_ops_route: Some(tokens::remote_ops_route(&app.keys, app.settings.public_base_url.as_str(), renewed.site_id)),
    };
    Ok(Json(answer).into_response())
}
