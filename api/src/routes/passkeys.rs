//! Passkeys: registering, signing in, and keeping one's own in order.

use axum::{Json, extract::State, http::HeaderMap};
use borealis_engine::{
    Error, Secret,
    access::passkeys::{self, Begun, Passkey, RelyingParty},
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::auth::{Head, SignInAnswer, require_login_phase};
use crate::{
    access::{Operator, Permission, Routes, client::Caller},
    body::{self, Path},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .anonymous(routes!(authenticate_options))
        .anonymous(routes!(authenticate_verify))
        .operator(Permission::AccountManage, routes!(register_options))
        .operator(Permission::AccountManage, routes!(register_verify))
        .operator(Permission::AccountManage, routes!(list))
        .operator(Permission::AccountManage, routes!(rename, remove))
}

fn party(app: &App) -> Result<RelyingParty> {
    Ok(RelyingParty::of(&app.settings.public_base_url, &app.settings.access.passkey_rp_name)?)
}

/// What a new passkey is to be called.
#[derive(Debug, Default, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Labelled {
    /// At most 80 characters; by default `Passkey`.
    label: Option<String>,
}

/// A ceremony that has begun.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Ceremony {
    /// `ok`.
    status: &'static str,
    /// Names the ceremony for five minutes.
    request_id: String,
    /// What `navigator.credentials` is called with as `publicKey`; binaries are base64url.
    #[schema(value_type = Object)]
    options: Value,
}

impl From<Begun> for Ceremony {
    fn from(begun: Begun) -> Self {
        Self { status: "ok", request_id: begun.request_id.expose().clone(), options: begun.options }
    }
}

fn nothing() -> Secret<String> {
    Secret::new(String::new())
}

/// What the authenticator answered.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Answer {
    /// From the first step.
    #[serde(default = "nothing")]
    #[schema(value_type = String)]
    request_id: Secret<String>,
    /// The `PublicKeyCredential` as JSON, binaries as base64url.
    #[serde(default)]
    #[schema(value_type = Object)]
    credential: Value,
    /// What the new passkey is to be called. Only for a registration.
    label: Option<String>,
}

/// Begin the registration of a passkey for your account; needs a step-up.
#[utoipa::path(post, path = "/api/auth/passkeys/register/options", tag = "Passkeys", request_body = Option<Labelled>, responses(
    (status = 200, body = Ceremony),
    (status = 400, description = "`invalid_label`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`step_up_required`, `passkeys_local_users_only`, `user_disabled`, `bad_origin`"),
    (status = 409, description = "`too_many_passkeys`"),
    (status = 503, description = "`passkeys_unavailable`: the engine has no host name"),
))]
async fn register_options(
    State(app): State<App>,
    operator: Operator,
    body::OptionalJson(body): body::OptionalJson<Labelled>,
) -> Result<Json<Ceremony>> {
    let begun = app.access().begin_passkey(&party(&app)?, operator.session()?, body.label.as_deref()).await?;
    Ok(Json(begun.into()))
}

/// The passkey is registered.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Registered {
    /// `ok`.
    status: &'static str,
    /// Your name.
    username: String,
    /// How many passkeys there are now.
    passkey_count: i64,
}

/// Take the authenticator's answer and keep the passkey.
#[utoipa::path(post, path = "/api/auth/passkeys/register/verify", tag = "Passkeys", request_body = Answer, responses(
    (status = 200, body = Registered),
    (status = 400, description = "`invalid_passkey`, `invalid_label`, `passkey_verification_failed`"),
    (status = 401, description = "`unauthorized`, `passkey_pending`, `invalid_session`, `expired`"),
    (status = 403, description = "`passkeys_local_users_only`, `user_disabled`, `bad_origin`"),
    (status = 409, description = "`passkey_already_registered`, `too_many_passkeys`"),
    (status = 503, description = "`passkeys_unavailable`"),
))]
async fn register_verify(
    State(app): State<App>,
    operator: Operator,
    Head(parts): Head,
    body::Json(body): body::Json<Answer>,
) -> Result<Json<Registered>> {
    let (party, client) = (party(&app)?, Caller::of(&parts).client);
    let passkey_count = app
        .access()
        .finish_passkey(&party, &client, operator.session()?, &body.request_id, body.credential, body.label.as_deref())
        .await?;
    Ok(Json(Registered { status: "ok", username: operator.username, passkey_count }))
}

/// Begin a sign-in with a passkey. A body is ignored.
#[utoipa::path(post, path = "/api/auth/passkeys/authenticate/options", tag = "Passkeys", responses(
    (status = 200, body = Ceremony),
    (status = 403, description = "`bad_origin`"),
    (status = 423, description = "`bootstrap_required` with the state"),
    (status = 429, description = "`rate_limited`"),
    (status = 503, description = "`passkeys_unavailable`"),
))]
async fn authenticate_options(State(app): State<App>, caller: Caller) -> Result<Json<Ceremony>> {
    require_login_phase(&app).await?;
    Ok(Json(app.access().begin_passkey_sign_in(&party(&app)?, &caller.client).await?.into()))
}

/// Take the authenticator's signature and sign in. No code follows: a passkey is both factors.
#[utoipa::path(post, path = "/api/auth/passkeys/authenticate/verify", tag = "Passkeys", request_body = Answer, responses(
    (status = 200, body = SignInAnswer),
    (status = 400, description = "`invalid_passkey`, `passkey_verification_failed`"),
    (status = 401, description = "`passkey_pending`, `invalid_session`, `expired`"),
    (status = 403, description = "`passkeys_local_users_only`, `user_disabled`, `bad_origin`"),
    (status = 404, description = "`passkey_not_configured`"),
    (status = 423, description = "`bootstrap_required` with the state"),
    (status = 429, description = "`rate_limited`"),
    (status = 503, description = "`passkeys_unavailable`"),
))]
async fn authenticate_verify(
    State(app): State<App>,
    caller: Caller,
    body::Json(body): body::Json<Answer>,
) -> Result<(HeaderMap, Json<SignInAnswer>)> {
    require_login_phase(&app).await?;
    let party = party(&app)?;
    let signed_in = app.access().finish_passkey_sign_in(&party, &caller.client, &body.request_id, body.credential).await?;
    Ok(SignInAnswer::new(&app, &caller, signed_in))
}

/// One of your passkeys.
#[derive(Debug, serde::Serialize, ToSchema)]
struct PasskeyInfo {
    id: i64,
    /// What it is called.
    label: String,
    /// Epoch seconds.
    created_at: i64,
    /// Epoch seconds; 0 when it has never been used.
    last_used_at: i64,
    /// How it can be reached: `internal`, `usb`, `nfc`, `ble`, `hybrid`.
    transports: Vec<String>,
}

impl From<Passkey> for PasskeyInfo {
    fn from(passkey: Passkey) -> Self {
        Self {
            id: passkey.id,
            label: passkey.label,
            created_at: passkey.created_at.timestamp(),
            last_used_at: passkey.last_used_at.as_ref().map(DateTime::<Utc>::timestamp).unwrap_or(0),
            transports: passkey.transports,
        }
    }
}

/// Your passkeys.
#[derive(Debug, serde::Serialize, ToSchema)]
struct All {
    /// `ok`.
    status: &'static str,
    /// The oldest first.
    passkeys: Vec<PasskeyInfo>,
    /// How many there are.
    passkey_count: usize,
}

/// Your passkeys.
#[utoipa::path(get, path = "/api/auth/passkeys", tag = "Passkeys", responses(
    (status = 200, body = All),
    (status = 401, description = "`unauthorized`"),
))]
async fn list(State(app): State<App>, operator: Operator) -> Result<Json<All>> {
    let passkeys: Vec<PasskeyInfo> =
        passkeys::list(&app.pool, operator.user_id).await?.into_iter().map(PasskeyInfo::from).collect();
    Ok(Json(All { status: "ok", passkey_count: passkeys.len(), passkeys }))
}

/// A passkey after a change.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Renamed {
    /// `ok`.
    status: &'static str,
    passkey: PasskeyInfo,
    /// How many there are.
    passkey_count: i64,
}

/// Rename one of your passkeys.
#[utoipa::path(patch, path = "/api/auth/passkeys/{id}", tag = "Passkeys", params(("id" = i64, Path)), request_body = Labelled, responses(
    (status = 200, body = Renamed),
    (status = 400, description = "`label_required`, `invalid_label`, `invalid_json`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`bad_origin`"),
    (status = 404, description = "`passkey_not_found`"),
))]
async fn rename(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    body::Json(body): body::Json<Labelled>,
) -> Result<Json<Renamed>> {
    let label = body.label.ok_or_else(|| Error::field("label_required", "label", "is required; empty makes it Passkey."))?;
    let passkey = passkeys::rename(&app.pool, &operator.actor, operator.user_id, id, &label).await?;
    let passkey_count = passkeys::count(&app.pool, operator.user_id).await?;
    Ok(Json(Renamed { status: "ok", passkey: passkey.into(), passkey_count }))
}

/// A passkey is gone.
#[derive(Debug, serde::Serialize, ToSchema)]
struct PasskeyRemoved {
    /// `ok`.
    status: &'static str,
    /// True.
    removed: bool,
    /// How many are left.
    passkey_count: i64,
}

/// Remove one of your passkeys. Sessions opened with it go on; end them with `DELETE /api/auth/sessions`.
#[utoipa::path(delete, path = "/api/auth/passkeys/{id}", tag = "Passkeys", params(("id" = i64, Path)), responses(
    (status = 200, body = PasskeyRemoved),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`bad_origin`"),
    (status = 404, description = "`passkey_not_found`"),
))]
async fn remove(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<PasskeyRemoved>> {
    passkeys::remove(&app.pool, &operator.actor, operator.user_id, id).await?;
    let passkey_count = passkeys::count(&app.pool, operator.user_id).await?;
    Ok(Json(PasskeyRemoved { status: "ok", removed: true, passkey_count }))
}
