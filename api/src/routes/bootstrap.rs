//! First set-up and the Aegis key.

use axum::{Json, extract::State, http::HeaderMap};
use borealis_engine::{
    Secret,
    access::{aegis, bootstrap, passwords::Sent, setup_token},
};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::auth::{Head, MfaCode, MfaRequired, SignInAnswer};
use crate::{
    access::{
        Operator, Permission, Routes,
        client::{self, Caller, Installer},
    },
    body,
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .anonymous(routes!(state))
        .anonymous(routes!(aegis_setup))
        .anonymous(routes!(aegis_unlock))
        .anonymous(routes!(admin_setup))
        .anonymous(routes!(admin_recover))
        .anonymous(routes!(admin_verify))
        .operator(Permission::SecretsRead, routes!(aegis_status))
        .operator(Permission::SecretsManage, routes!(aegis_rotate))
        .operator(Permission::SecretsManage, routes!(aegis_force_reset))
}

/// How far the set-up is.
#[derive(Debug, serde::Serialize, ToSchema)]
struct PublicState {
    /// `ok` after a change; absent in the answer of a plain question.
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<&'static str>,
    /// `aegis_setup_required`, `aegis_unlock_required`, `admin_setup_required`, `admin_recovery_required` or
    /// `login_required`.
    #[schema(value_type = String)]
    phase: bootstrap::Phase,
    /// Whether there is a secret store.
    configured: bool,
    /// Whether it is locked in this process.
    locked: bool,
}

impl PublicState {
    fn new(status: Option<&'static str>, state: bootstrap::State) -> Json<Self> {
        Json(Self { status, phase: state.phase, configured: state.configured, locked: state.locked })
    }
}

/// How far the set-up is.
#[utoipa::path(get, path = "/api/bootstrap/state", tag = "Bootstrap", responses((status = 200, body = PublicState)))]
async fn state(State(app): State<App>) -> Result<Json<PublicState>> {
    Ok(PublicState::new(None, bootstrap::state(&app.pool, &app.vault).await?))
}

/// The passphrase of the secret store.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Cipher {
    /// At least 12 characters, no white space around them.
    #[serde(default)]
    #[schema(value_type = String)]
    cipher: Secret<String>,
}

/// Make the secret store.
#[utoipa::path(post, path = "/api/bootstrap/aegis/setup", tag = "Bootstrap", request_body = Cipher, responses(
    (status = 200, body = PublicState),
    (status = 400, description = "`invalid_request`: the cipher is too weak"),
    (status = 403, description = "`setup_token_required`, `bad_origin`"),
    (status = 409, description = "`invalid_phase` with the state, `already_configured`"),
))]
async fn aegis_setup(
    State(app): State<App>,
    Installer(caller): Installer,
    body::Json(body): body::Json<Cipher>,
) -> Result<(HeaderMap, Json<PublicState>)> {
    let state = app.access().set_up_aegis(&caller.client, &body.cipher).await?;
    Ok((client::signed_out_cookies(&app), PublicState::new(Some("ok"), state)))
}

/// Open the secret store in this process.
#[utoipa::path(post, path = "/api/bootstrap/aegis/unlock", tag = "Bootstrap", request_body = Cipher, responses(
    (status = 200, body = PublicState),
    (status = 400, description = "`invalid_request`"),
    (status = 401, description = "`invalid_cipher`"),
    (status = 403, description = "`setup_token_required`, `bad_origin`"),
    (status = 409, description = "`invalid_phase` with the state"),
    (status = 429, description = "`rate_limited`"),
    (status = 500, description = "`corrupt_secret_store`"),
))]
async fn aegis_unlock(
    State(app): State<App>,
    Installer(caller): Installer,
    body::Json(body): body::Json<Cipher>,
) -> Result<Json<PublicState>> {
    let state = app.access().unlock_aegis(&caller.client, &body.cipher).await?;
    if state.phase == bootstrap::Phase::LoginRequired {
        setup_token::remove(&app.pool, &app.settings.state_dir).await;
    }
    Ok(PublicState::new(Some("ok"), state))
}

/// The first administrator, or one to be recovered.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Admin {
    /// The name to sign in with.
    #[serde(default)]
    username: String,
    /// The name to show; by default the username. Not used for a recovery.
    display_name: Option<String>,
    /// The password, at least 12 characters; or its digest.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
    /// The SHA-512 of the password, in hex.
    #[schema(value_type = Option<String>)]
    password_sha512: Option<Secret<String>>,
}

/// Begin the set-up of the first administrator.
#[utoipa::path(post, path = "/api/bootstrap/admin/setup", tag = "Bootstrap", request_body = Admin, responses(
    (status = 200, body = MfaRequired),
    (status = 400, description = "`username and password are required`, `invalid_username`, `invalid_display_name`, `password_too_short`"),
    (status = 403, description = "`setup_token_required`, `bad_origin`"),
    (status = 409, description = "`invalid_phase` with the state, `bootstrap_already_initialized`"),
))]
async fn admin_setup(State(app): State<App>, _: Installer, body::Json(body): body::Json<Admin>) -> Result<Json<MfaRequired>> {
    let password = Sent { plain: body.password, sha512: body.password_sha512 };
    let pending = app.access().set_up_admin(&body.username, body.display_name.as_deref(), &password).await?;
    Ok(Json(pending.into()))
}

/// Begin the recovery of an administrator when none can sign in.
#[utoipa::path(post, path = "/api/bootstrap/admin/recover", tag = "Bootstrap", request_body = Admin, responses(
    (status = 200, body = MfaRequired),
    (status = 400, description = "`username and password are required`, `password_too_short`"),
    (status = 403, description = "`setup_token_required`, `bad_origin`"),
    (status = 404, description = "`admin_not_found`"),
    (status = 409, description = "`invalid_phase` with the state, `admin_recovery_not_required`"),
))]
async fn admin_recover(State(app): State<App>, _: Installer, body::Json(body): body::Json<Admin>) -> Result<Json<MfaRequired>> {
    let password = Sent { plain: body.password, sha512: body.password_sha512 };
    Ok(Json(app.access().recover_admin(&body.username, &password).await?.into()))
}

/// Prove the administrator's second factor; writes the account and signs it in.
#[utoipa::path(post, path = "/api/bootstrap/admin/mfa/verify", tag = "Bootstrap", request_body = MfaCode, responses(
    (status = 200, body = SignInAnswer),
    (status = 400, description = "`invalid_code`: not six digits"),
    (status = 401, description = "`bootstrap_pending`, `invalid_session`, `expired`, `invalid_code`"),
    (status = 403, description = "`setup_token_required`, `bad_origin`"),
    (status = 404, description = "`admin_not_found`"),
    (status = 409, description = "`bootstrap_already_initialized`, `username already exists`, `admin_recovery_not_required`"),
    (status = 423, description = "`bootstrap_required` with the state"),
    (status = 429, description = "`rate_limited`"),
))]
async fn admin_verify(
    State(app): State<App>,
    Installer(caller): Installer,
    body::Json(body): body::Json<MfaCode>,
) -> Result<(HeaderMap, Json<SignInAnswer>)> {
    let signed_in = app.access().verify_admin(&caller.client, &body.pending_token, &body.code).await?;
    setup_token::remove(&app.pool, &app.settings.state_dir).await;
    Ok(SignInAnswer::new(&app, &caller, signed_in))
}

/// The state of the secret store.
#[derive(Debug, serde::Serialize, ToSchema)]
struct AegisStatus {
    /// Whether there is one.
    configured: bool,
    /// Whether it is locked in this process.
    locked: bool,
    /// `engine_global`.
    unlock_scope: &'static str,
    /// The columns sealed under it.
    secret_scope: Vec<&'static str>,
    /// Epoch seconds of its last change; 0 before set-up.
    updated_at: i64,
    /// The caller's role.
    user_role: &'static str,
}

/// The state of the secret store.
#[utoipa::path(get, path = "/api/aegis/status", tag = "Bootstrap", responses(
    (status = 200, body = AegisStatus),
    (status = 401, description = "`unauthorized`"),
))]
async fn aegis_status(State(app): State<App>, operator: Operator) -> Result<Json<AegisStatus>> {
    Ok(Json(AegisStatus::now(&app, operator).await?))
}

impl AegisStatus {
    async fn now(app: &App, operator: Operator) -> Result<Self> {
        let updated_at = aegis::updated_at(&app.pool).await?;
        Ok(Self {
            configured: updated_at.is_some(),
            locked: updated_at.is_some() && !app.vault.is_open(),
            unlock_scope: "engine_global",
            secret_scope: aegis::PROTECTED.to_vec(),
            updated_at: updated_at.map(|at| at.timestamp()).unwrap_or(0),
            user_role: operator.role.as_str(),
        })
    }
}

/// The present cipher and the next one.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CipherRotation {
    /// The cipher that opens the secret store now.
    #[serde(default)]
    #[schema(value_type = String)]
    current_cipher: Secret<String>,
    /// The one that shall: at least 12 characters, no white space around them.
    #[serde(default)]
    #[schema(value_type = String)]
    new_cipher: Secret<String>,
}

/// The secret store has another cipher.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Rotated {
    /// `ok`.
    status: &'static str,
    #[serde(flatten)]
    aegis: AegisStatus,
}

/// Change the cipher; needs a step-up. Nothing that is sealed changes, and nobody waits.
#[utoipa::path(post, path = "/api/aegis/rotate", tag = "Bootstrap", request_body = CipherRotation, responses(
    (status = 200, body = Rotated),
    (status = 400, description = "`invalid_request`: the new cipher is too short, or the present one"),
    (status = 401, description = "`unauthorized`, `invalid_cipher`"),
    (status = 403, description = "`forbidden`, `step_up_required`, `bad_origin`"),
    (status = 409, description = "`not_configured`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn aegis_rotate(
    State(app): State<App>,
    operator: Operator,
    Head(parts): Head,
    body::Json(body): body::Json<CipherRotation>,
) -> Result<Json<Rotated>> {
    let client = Caller::of(&parts).client;
    app.access().rotate_aegis(&client, operator.session()?, &body.current_cipher, &body.new_cipher).await?;
    Ok(Json(Rotated { status: "ok", aegis: AegisStatus::now(&app, operator).await? }))
}

/// What is about to be lost.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Confirmation {
    /// `reset`, so that nobody does it by mistake.
    #[serde(default)]
    confirm: String,
}

/// There is no secret store any more.
#[derive(Debug, serde::Serialize, ToSchema)]
struct WasReset {
    /// `ok`.
    status: &'static str,
    /// True.
    force_reset: bool,
    /// Credentials that lost secrets, and cannot be used until these are set again.
    affected_credentials: usize,
    /// Scheduled jobs that used them and are off now.
    disabled_jobs: usize,
    /// Whether a GitHub token was lost.
    github_token_reset: bool,
    /// Users, who are all without password and second factor.
    affected_users: u64,
    /// Passkeys that were removed.
    removed_passkeys: u64,
    #[serde(flatten)]
    aegis: AegisStatus,
}

/// End the secret store and everything sealed in it, for when its cipher is lost or in wrong hands; needs a step-up. Everybody is
/// signed out and nobody can sign in: a new secret store has to be set up, and an administrator recovered.
#[utoipa::path(post, path = "/api/aegis/force_reset", tag = "Bootstrap", request_body = Confirmation, responses(
    (status = 200, body = WasReset),
    (status = 400, description = "`confirmation_required`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`forbidden`, `step_up_required`, `bad_origin`"),
    (status = 409, description = "`not_configured`"),
))]
async fn aegis_force_reset(
    State(app): State<App>,
    operator: Operator,
    Head(parts): Head,
    body::Json(body): body::Json<Confirmation>,
) -> Result<(HeaderMap, Json<WasReset>)> {
    let client = Caller::of(&parts).client;
    let taken = app.access().force_reset(&client, operator.session()?, &body.confirm).await?;
    for session in &taken.sessions {
        app.hub.drop_session(*session).await;
    }
    let was_reset = WasReset {
        status: "ok",
        force_reset: true,
        affected_credentials: taken.credentials.len(),
        disabled_jobs: taken.jobs.len(),
        github_token_reset: taken.github_token,
        affected_users: taken.users,
        removed_passkeys: taken.passkeys,
        aegis: AegisStatus::now(&app, operator).await?,
    };
    Ok((client::signed_out_cookies(&app), Json(was_reset)))
}
