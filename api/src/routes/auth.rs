//! Sign-in, sign-out, and the account of the signed-in user.

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{HeaderMap, request::Parts},
};
use borealis_engine::{
    Secret,
    access::{
        bootstrap, passkeys,
        passwords::Sent,
        recovery_codes,
        sign_in::{Outcome, Pending, SignedIn, Stage},
        users,
    },
};
use chrono::{DateTime, Utc};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{
        Operator, Permission, Routes,
        client::{self, Caller, Carrier},
        operator,
    },
    body::{self, Path},
    errors::{ApiError, Result},
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .anonymous(routes!(login))
        .anonymous(routes!(mfa_verify))
        .anonymous(routes!(logout))
        .operator(Permission::AccountManage, routes!(step_up))
        .operator(Permission::AccountManage, routes!(password_reset))
        .operator(Permission::AccountManage, routes!(mfa_reset))
        .operator(Permission::AccountManage, routes!(recovery_codes_left, make_recovery_codes))
        .operator(Permission::AccountManage, routes!(own_sessions, end_other_sessions))
        .operator(Permission::AccountManage, routes!(end_session))
        .operator(Permission::AccountRead, routes!(me))
}

/// `{"status":"ok"}`.
#[derive(Debug, serde::Serialize, ToSchema)]
pub(super) struct Done {
    status: &'static str,
}

impl Done {
    pub(super) fn json() -> Json<Self> {
        Json(Self { status: "ok" })
    }
}

/// Name and password.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Login {
    /// The name to sign in with, any case.
    #[serde(default)]
    username: String,
    /// The password; or its digest.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
    /// The SHA-512 of the password, in hex.
    #[schema(value_type = Option<String>)]
    password_sha512: Option<Secret<String>>,
}

/// The password was right and a code is needed.
#[derive(Debug, serde::Serialize, ToSchema)]
pub(super) struct MfaRequired {
    /// `mfa_required`.
    status: &'static str,
    /// `setup`: the user has just been given a second factor; `verify`: they have one.
    #[schema(value_type = String)]
    stage: Stage,
    /// Names this sign-in for five minutes; opens nothing else.
    pending_token: String,
    /// The user's name.
    username: String,
    /// `Admin` or `User`.
    role: String,
    /// `totp`.
    available_methods: [&'static str; 1],
    /// `totp`.
    preferred_method: &'static str,
    /// The new secret, in base32; only with `setup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
    /// What an authenticator app takes; only with `setup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    otpauth_url: Option<String>,
    /// Always null: clients draw it from `otpauth_url`. Only with `setup`.
    #[serde(skip_serializing_if = "Option::is_none")]
    qr_image: Option<Option<String>>,
}

impl From<Pending> for MfaRequired {
    fn from(pending: Pending) -> Self {
        let enrollment = pending.enrollment.as_ref();
        Self {
            status: "mfa_required",
            stage: pending.stage,
            pending_token: pending.token.expose().clone(),
            username: pending.username,
            role: pending.role,
            available_methods: ["totp"],
            preferred_method: "totp",
            secret: enrollment.map(|enrollment| enrollment.secret.expose().clone()),
            otpauth_url: enrollment.map(|enrollment| enrollment.url.expose().clone()),
            qr_image: enrollment.map(|_| None),
        }
    }
}

/// The user is signed in.
#[derive(Debug, serde::Serialize, ToSchema)]
pub(super) struct SignInAnswer {
    /// `ok`.
    status: &'static str,
    /// The user's name, as stored.
    username: String,
    /// `Admin` or `User`.
    role: String,
    /// `local` or `directory`.
    auth_source: String,
    /// The session's token, for `Authorization: Bearer`. Not told to pages in a browser, which have it in a cookie: where the request had
    /// a cookie of ours or `Sec-Fetch-Site`.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

impl SignInAnswer {
    pub(super) fn new(app: &App, caller: &Caller, signed_in: SignedIn) -> (HeaderMap, Json<Self>) {
        let cookies = client::signed_in_cookies(app, &signed_in.token, &signed_in.device);
        let token = caller.wants_token.then(|| signed_in.token.expose().clone());
        let answer =
            Self { status: "ok", username: signed_in.username, role: signed_in.role, auth_source: signed_in.auth_source, token };
        (cookies, Json(answer))
    }
}

/// How a sign-in goes on: signed in, or a code is needed.
#[derive(Debug, serde::Serialize, ToSchema)]
#[serde(untagged)]
enum LoginAnswer {
    /// Signed in.
    SignedIn(SignInAnswer),
    /// A code is needed.
    MfaRequired(MfaRequired),
}

pub(super) async fn require_login_phase(app: &App) -> Result<()> {
    Ok(bootstrap::state(&app.pool, &app.vault).await?.require_login_phase()?)
}

/// Sign in with name and password.
#[utoipa::path(post, path = "/api/auth/login", tag = "Authentication", request_body = Login, responses(
    (status = 200, body = LoginAnswer),
    (status = 400, description = "`missing credentials`"),
    (status = 401, description = "`invalid username or password`"),
    (status = 403, description = "`bad_origin`"),
    (status = 423, description = "`bootstrap_required` with the state, `auth_reset_required`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn login(
    State(app): State<App>,
    caller: Caller,
    body::Json(body): body::Json<Login>,
) -> Result<(HeaderMap, Json<LoginAnswer>)> {
    require_login_phase(&app).await?;
    let password = Sent { plain: body.password, sha512: body.password_sha512 };
    Ok(match app.access().sign_in(&caller.client, &body.username, &password).await? {
        Outcome::SignedIn(signed_in) => {
            let (cookies, Json(answer)) = SignInAnswer::new(&app, &caller, signed_in);
            (cookies, Json(LoginAnswer::SignedIn(answer)))
        }
        Outcome::Pending(pending) => (HeaderMap::new(), Json(LoginAnswer::MfaRequired(pending.into()))),
    })
}

/// The code of a second step.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MfaCode {
    /// From the first step.
    #[serde(default)]
    #[schema(value_type = String)]
    pub(super) pending_token: Secret<String>,
    /// Six digits; other characters are ignored.
    #[serde(default)]
    pub(super) code: String,
}

/// Take the code of the second step.
#[utoipa::path(post, path = "/api/auth/mfa/verify", tag = "Authentication", request_body = MfaCode, responses(
    (status = 200, body = SignInAnswer),
    (status = 400, description = "`invalid_code`: neither six digits nor a recovery code"),
    (status = 401, description = "`mfa_pending`, `invalid_session`, `expired`, `invalid_code`"),
    (status = 403, description = "`mfa_not_configured`, `user_disabled`, `bad_origin`"),
    (status = 423, description = "`bootstrap_required` with the state"),
    (status = 429, description = "`rate_limited`"),
))]
async fn mfa_verify(
    State(app): State<App>,
    caller: Caller,
    body::Json(body): body::Json<MfaCode>,
) -> Result<(HeaderMap, Json<SignInAnswer>)> {
    require_login_phase(&app).await?;
    let signed_in = app.access().verify(&caller.client, &body.pending_token, &body.code).await?;
    Ok(SignInAnswer::new(&app, &caller, signed_in))
}

/// The headers of a request, where more of them is needed than the session.
pub(super) struct Head(pub(super) Parts);

impl FromRequestParts<App> for Head {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, ApiError> {
        Ok(Self(parts.clone()))
    }
}

/// End the session. Answers the same without one.
#[utoipa::path(post, path = "/api/auth/logout", tag = "Authentication", responses(
    (status = 200, body = Done),
    (status = 403, description = "`bad_origin`"),
))]
async fn logout(State(app): State<App>, Head(parts): Head) -> Result<(HeaderMap, Json<Done>)> {
    if let Some((token, carrier)) = client::session_token(&parts.headers) {
        if carrier == Carrier::Cookie {
            client::check_cookie_request(&app, &parts)?;
        }
        if let Some(session) = operator::session(&app, token).await? {
            app.access().sign_out(&Caller::of(&parts).client, &session).await?;
            app.hub.drop_session(session.id).await;
        }
    }
    Ok((client::signed_out_cookies(&app), Done::json()))
}

/// Your account.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Me {
    /// The name to sign in with.
    username: String,
    /// The name to show.
    display_name: String,
    /// `Admin` or `User`.
    role: String,
    /// Whether a second factor is asked for.
    mfa_enabled: bool,
    /// How many passkeys there are.
    passkey_count: i64,
    /// `local` or `directory`.
    auth_source: String,
    /// The directory the account comes from; 0 for none.
    directory_provider_id: i64,
    /// Whether the directory has disabled the account.
    directory_disabled: bool,
    /// Whether a password must be chosen before anything else.
    password_change_required: bool,
}

/// Your account.
#[utoipa::path(get, path = "/api/auth/me", tag = "Authentication", responses(
    (status = 200, body = Me),
    (status = 401, description = "`unauthorized`"),
))]
async fn me(State(app): State<App>, operator: Operator) -> Result<Json<Me>> {
    let user = users::get(&app.pool, operator.user_id).await?;
    Ok(Json(Me {
        username: user.username,
        display_name: user.display_name,
        role: user.role,
        mfa_enabled: !user.mfa_disabled,
        passkey_count: passkeys::count(&app.pool, operator.user_id).await?,
        auth_source: user.auth_source,
        directory_provider_id: user.directory_provider_id.unwrap_or(0),
        directory_disabled: user.directory_disabled,
        password_change_required: user.password_change_required,
    }))
}

/// A proof of who the operator is.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Proof {
    /// Your password; or its digest.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
    /// The SHA-512 of your password, in hex.
    #[schema(value_type = Option<String>)]
    password_sha512: Option<Secret<String>>,
    /// A code of your second factor, instead of the password.
    code: Option<String>,
}

/// The step-up was accepted.
#[derive(Debug, serde::Serialize, ToSchema)]
struct SteppedUp {
    /// `ok`.
    status: &'static str,
    /// How long it counts, in seconds.
    expires_in: i64,
}

/// Prove again who you are; counts for five minutes on this session.
#[utoipa::path(post, path = "/api/auth/step-up", tag = "Authentication", request_body = Proof, responses(
    (status = 200, body = SteppedUp),
    (status = 400, description = "`password_or_code_required`, `invalid_code`"),
    (status = 401, description = "`unauthorized`, `invalid current password`, `invalid_code`"),
    (status = 403, description = "`mfa_not_configured`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn step_up(
    State(app): State<App>,
    operator: Operator,
    Head(parts): Head,
    body::Json(body): body::Json<Proof>,
) -> Result<Json<SteppedUp>> {
    let client = Caller::of(&parts).client;
    let password = Sent { plain: body.password, sha512: body.password_sha512 };
    app.access().step_up(&client, operator.session()?, &password, body.code.as_deref()).await?;
    Ok(Json(SteppedUp { status: "ok", expires_in: borealis_engine::access::sessions::STEP_UP_S }))
}

/// Your password, old and new; each as text or as digest.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PasswordChange {
    /// The present password.
    #[schema(value_type = Option<String>)]
    current_password: Option<Secret<String>>,
    /// Its SHA-512, in hex.
    #[schema(value_type = Option<String>)]
    current_password_sha512: Option<Secret<String>>,
    /// The new password, at least 12 characters.
    #[schema(value_type = Option<String>)]
    new_password: Option<Secret<String>>,
    /// Its SHA-512, in hex.
    #[schema(value_type = Option<String>)]
    new_password_sha512: Option<Secret<String>>,
}

/// Change your password; all other sessions end.
#[utoipa::path(post, path = "/api/auth/password/reset", tag = "Authentication", request_body = PasswordChange, responses(
    (status = 200, body = Done),
    (status = 400, description = "`invalid current password`, `invalid new password`, `password_too_short`, `new password must differ from the current password`"),
    (status = 401, description = "`unauthorized`, `invalid current password`"),
    (status = 403, description = "`directory_user_local_action_disabled`"),
    (status = 429, description = "`rate_limited`"),
))]
async fn password_reset(
    State(app): State<App>,
    operator: Operator,
    Head(parts): Head,
    body::Json(body): body::Json<PasswordChange>,
) -> Result<Json<Done>> {
    let client = Caller::of(&parts).client;
    let current = Sent { plain: body.current_password, sha512: body.current_password_sha512 };
    let new = Sent { plain: body.new_password, sha512: body.new_password_sha512 };
    for session in app.access().change_password(&client, operator.session()?, &current, &new).await? {
        app.hub.drop_session(session).await;
    }
    Ok(Done::json())
}

/// How many of your recovery codes are left.
#[derive(Debug, serde::Serialize, ToSchema)]
struct RecoveryCodesLeft {
    /// How many.
    left: i64,
    /// When they were made, in seconds since 1970; 0 without any.
    made_at: i64,
}

/// How many recovery codes are left.
#[utoipa::path(get, path = "/api/auth/mfa/recovery-codes", tag = "Authentication", responses(
    (status = 200, body = RecoveryCodesLeft),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`session_required`"),
))]
async fn recovery_codes_left(State(app): State<App>, operator: Operator) -> Result<Json<RecoveryCodesLeft>> {
    let mut connection = app.pool.acquire().await.map_err(borealis_engine::Error::from)?;
    let left = recovery_codes::left(&mut connection, operator.session()?.user_id).await?;
    Ok(Json(RecoveryCodesLeft { left: left.count, made_at: left.made_at.map_or(0, |at| at.timestamp()) }))
}

/// New recovery codes. They are shown only this once.
#[derive(serde::Serialize, ToSchema)]
struct RecoveryCodes {
    /// `ok`.
    status: &'static str,
    /// Ten codes, each of which stands once for a code of the authenticator app at `POST /api/auth/mfa/verify`.
    codes: Vec<String>,
}

/// Make ten recovery codes for the case that the authenticator app is lost; former ones are void. Needs a step-up.
#[utoipa::path(post, path = "/api/auth/mfa/recovery-codes", tag = "Authentication", responses(
    (status = 200, body = RecoveryCodes),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`step_up_required`, `mfa_not_configured`"),
))]
async fn make_recovery_codes(State(app): State<App>, operator: Operator, Head(parts): Head) -> Result<Json<RecoveryCodes>> {
    let codes = app.access().make_recovery_codes(&Caller::of(&parts).client, operator.session()?).await?;
    Ok(Json(RecoveryCodes { status: "ok", codes }))
}

/// What becomes of your second factor.
#[derive(Debug, serde::Serialize, ToSchema)]
struct MfaReset {
    /// `ok`.
    status: &'static str,
    /// Your name.
    username: String,
    /// Whether a second factor is asked for.
    mfa_enabled: bool,
    /// Whether the next sign-in sets a new one up.
    setup_required_on_next_login: bool,
}

/// Forget your second factor; needs a step-up. All other sessions end.
#[utoipa::path(post, path = "/api/auth/mfa/reset", tag = "Authentication", responses(
    (status = 200, body = MfaReset),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`step_up_required`"),
    (status = 404, description = "`user not found`"),
))]
async fn mfa_reset(State(app): State<App>, operator: Operator, Head(parts): Head) -> Result<Json<MfaReset>> {
    let (enabled, ended) = app.access().reset_mfa(&Caller::of(&parts).client, operator.session()?).await?;
    for session in ended {
        app.hub.drop_session(session).await;
    }
    Ok(Json(MfaReset { status: "ok", username: operator.username, mfa_enabled: enabled, setup_required_on_next_login: enabled }))
}

/// One of your sessions.
#[derive(Debug, serde::Serialize, ToSchema)]
struct OwnSession {
    /// Names it; opens nothing.
    id: Uuid,
    /// Whether it is the one this request came with.
    current: bool,
    /// When it was opened.
    created_at: DateTime<Utc>,
    /// When it was last used, to a minute.
    last_seen_at: DateTime<Utc>,
    /// When it ends, if not sooner for lack of use.
    expires_at: DateTime<Utc>,
    /// The address it was opened from.
    ip: String,
    /// What the client called itself.
    user_agent: String,
}

/// Your sessions.
#[derive(Debug, serde::Serialize, ToSchema)]
struct OwnSessions {
    /// The one used last first.
    sessions: Vec<OwnSession>,
}

/// Where you are signed in.
#[utoipa::path(get, path = "/api/auth/sessions", tag = "Authentication", responses(
    (status = 200, body = OwnSessions),
    (status = 401, description = "`unauthorized`"),
))]
async fn own_sessions(State(app): State<App>, operator: Operator) -> Result<Json<OwnSessions>> {
    let own = operator.session()?;
    let sessions = app.access().own_sessions(own).await?.into_iter().map(|session| OwnSession {
        id: session.id,
        current: session.id == own.id,
        created_at: session.created_at,
        last_seen_at: session.last_seen_at,
        expires_at: session.expires_at,
        ip: session.ip,
        user_agent: session.user_agent,
    });
    Ok(Json(OwnSessions { sessions: sessions.collect() }))
}

/// How many sessions were ended.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Ended {
    /// `ok`.
    status: &'static str,
    /// How many.
    ended: usize,
}

/// Sign out everywhere else.
#[utoipa::path(delete, path = "/api/auth/sessions", tag = "Authentication", responses(
    (status = 200, body = Ended),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`bad_origin`"),
))]
async fn end_other_sessions(State(app): State<App>, operator: Operator, Head(parts): Head) -> Result<Json<Ended>> {
    let ended = app.access().end_other_sessions(&Caller::of(&parts).client, operator.session()?).await?;
    for session in &ended {
        app.hub.drop_session(*session).await;
    }
    Ok(Json(Ended { status: "ok", ended: ended.len() }))
}

/// End one of your sessions.
#[utoipa::path(delete, path = "/api/auth/sessions/{id}", tag = "Authentication",
    params(("id" = Uuid, Path, description = "The session's id.")), responses(
    (status = 200, body = Done),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`bad_origin`"),
    (status = 404, description = "`session_not_found`: you have no such session"),
))]
async fn end_session(State(app): State<App>, operator: Operator, Path(id): Path<Uuid>, Head(parts): Head) -> Result<Json<Done>> {
    app.access().end_own_session(&Caller::of(&parts).client, operator.session()?, id).await?;
    app.hub.drop_session(id).await;
    Ok(Done::json())
}
