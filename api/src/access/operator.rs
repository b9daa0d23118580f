//! The operator extractor: the session is looked up at every request, role and disablement come from the user's row.

use axum::http::request::Parts;
use borealis_engine::{
    Actor, Error, Kind, Scope,
    access::sessions::{self, Session},
};

use super::client::{self, Carrier};
use crate::{errors::ApiError, state::App};

/// A signed-in operator.
#[derive(Debug, Clone)]
pub struct Operator {
    /// The user's id.
    pub user_id: i64,
    /// The user's name, as stored.
    pub username: String,
    /// The role in the user's row now: `Admin` or `User`.
    pub role: String,
    /// The session this request came with.
    pub session_id: uuid::Uuid,
    /// The sites this operator may see.
    pub scope: Scope,
    /// For the audit.
    pub actor: Actor,
    /// The session itself.
    pub session: Session,
}

/// What somebody may do who must choose a password first.
const BEFORE_PASSWORD_CHANGE: [&str; 3] = ["/api/auth/me", "/api/auth/password/reset", "/api/auth/logout"];

impl Operator {
    /// Whether the role is Admin.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.role == "Admin"
    }

    /// Refuses unless the operator has proven anew who they are, in the last five minutes.
    ///
    /// # Errors
    /// 403 `step_up_required`.
    pub fn require_step_up(&self) -> Result<(), ApiError> {
        Ok(self.session.require_step_up()?)
    }
}

fn unauthorized() -> ApiError {
    Error::new(Kind::Unauthenticated, "unauthorized", "Sign in first.").into()
}

/// Finds the operator behind a request. A change that came with a cookie must come from our own pages.
///
/// # Errors
/// 401 `unauthorized`; 403 `bad_origin`, `password_change_required`; 415 `unsupported_media_type`.
pub async fn authenticate(app: &App, parts: &Parts) -> Result<Operator, ApiError> {
    let (token, carrier) = client::session_token(&parts.headers).ok_or_else(unauthorized)?;
    let session = session(app, token).await?.ok_or_else(unauthorized)?;
    if carrier == Carrier::Cookie && client::changes(&parts.method) {
        client::check_cookie_request(app, parts)?;
    }
    if session.password_change_required && !BEFORE_PASSWORD_CHANGE.contains(&parts.uri.path()) {
        return Err(ApiError(Error::new(
            Kind::Forbidden,
            "password_change_required",
            "Somebody else has set your password; choose your own first: POST /api/auth/password/reset.",
        )));
    }
    let ip = client::client_ip(parts).map(|ip| ip.to_string()).unwrap_or_default();
    Ok(Operator {
        user_id: session.user_id,
        username: session.username.clone(),
        role: session.role.clone(),
        session_id: session.id,
        scope: session.scope.clone(),
        actor: session.actor(ip),
        session,
    })
}

/// The live session behind a token, if the secret store is open in this process.
///
/// # Errors
/// When the database is away.
pub async fn session(app: &App, token: &str) -> Result<Option<Session>, ApiError> {
    let Some(session) = sessions::find(&app.pool, token, app.settings.access.sessions).await? else { return Ok(None) };
    let open = app.vault.holds(session.key_id) || app.vault.follow(&app.pool).await?;
    Ok(open.then_some(session))
}
