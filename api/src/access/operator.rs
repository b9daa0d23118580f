//! The operator extractor: the session or API token is looked up at every request, role and disablement come from the user's row.

use axum::http::request::Parts;
use borealis_engine::{
    Actor, Caller, Error, Kind, Scope,
    access::{
        api_tokens::{self, ApiToken, TokenScope},
        permissions::Permission,
        sessions::{self, Session},
        users::Role,
    },
};
use uuid::Uuid;

use super::client::{self, Carrier};
use crate::{errors::ApiError, state::App};

/// A signed-in operator, or a program of theirs.
#[derive(Debug, Clone)]
pub struct Operator {
    /// The user's id.
    pub user_id: i64,
    /// The user's name, as stored.
    pub username: String,
    /// The role in the user's row now.
    pub role: Role,
    /// The sites this operator may see.
    pub scope: Scope,
    /// For the audit.
    pub actor: Actor,
    proof: Proof,
}

/// What a request came with.
#[derive(Debug, Clone)]
enum Proof {
    Session(Session),
    Token(ApiToken),
}

/// What a request came with, by its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// A session.
    Session(Uuid),
    /// An API token.
    Token(Uuid),
}

/// What somebody may do who must choose a password first.
const BEFORE_PASSWORD_CHANGE: [&str; 3] = ["/api/auth/me", "/api/auth/password/reset", "/api/auth/logout"];

impl Operator {
    fn of_session(session: Session, ip: String) -> Self {
        Self {
            user_id: session.user_id,
            username: session.username.clone(),
            role: session.role,
            scope: session.scope.clone(),
            actor: session.actor(ip),
            proof: Proof::Session(session),
        }
    }

    fn of_token(token: ApiToken, ip: String) -> Self {
        Self {
            user_id: token.user_id,
            username: token.username.clone(),
            role: token.role,
            scope: token.scope.clone(),
            actor: token.actor(ip),
            proof: Proof::Token(token),
        }
    }

    /// For what the operator makes or changes.
    #[must_use]
    pub fn caller<'a>(&'a self, app: &'a App) -> Caller<'a> {
        Caller { user_id: self.user_id, scope: &self.scope, actor: &self.actor, quotas: &app.settings.quotas }
    }

    /// Whether the role is Admin.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// The session this request came with.
    ///
    /// # Errors
    /// 403 `session_required` when it came with an API token.
    pub fn session(&self) -> Result<&Session, ApiError> {
        match &self.proof {
            Proof::Session(session) => Ok(session),
            Proof::Token(_) => Err(api_tokens::session_required().into()),
        }
    }

    /// Refuses unless the operator has proved again who they are, in the last five minutes.
    ///
    /// # Errors
    /// 403 `step_up_required`, `session_required`.
    pub fn require_step_up(&self) -> Result<(), ApiError> {
        Ok(self.session()?.require_step_up()?)
    }

    /// Whether the role has a permission, and so has what the request came with: a session, or an API token with its scope.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        let by_proof = match &self.proof {
            Proof::Session(_) => true,
            Proof::Token(token) => token.require(permission.token_scope()).is_ok(),
        };
        by_proof && self.role.may(permission)
    }

    /// What the request came with.
    #[must_use]
    pub fn credential(&self) -> Credential {
        match &self.proof {
            Proof::Session(session) => Credential::Session(session.id),
            Proof::Token(token) => Credential::Token(token.id),
        }
    }

    fn password_change_required(&self) -> bool {
        match &self.proof {
            Proof::Session(session) => session.password_change_required,
            Proof::Token(token) => token.password_change_required,
        }
    }
}

fn unauthorized() -> ApiError {
    Error::new(Kind::Unauthenticated, "unauthorized", "Sign in first.").into()
}

/// Finds the operator behind a request. A change that came with a cookie must come from our own pages. `needed` is the scope
/// an API token must have; without one no API token is let in.
///
/// # Errors
/// 401 `unauthorized`; 403 `bad_origin`, `password_change_required`, `insufficient_scope`, `session_required`;
/// 415 `unsupported_media_type`.
pub async fn authenticate(app: &App, parts: &Parts, needed: Option<TokenScope>) -> Result<Operator, ApiError> {
    let (token, carrier) = client::session_token(&parts.headers).ok_or_else(unauthorized)?;
    let ip = client::client_ip(parts).map(|ip| ip.to_string()).unwrap_or_default();
    let operator = find(app, token, carrier, ip).await?.ok_or_else(unauthorized)?;
    if carrier == Carrier::Cookie && client::changes(&parts.method) {
        client::check_cookie_request(app, parts)?;
    }
    match &operator.proof {
        Proof::Token(token) => token.require(needed)?,
        Proof::Session(session) => sessions::touch(&app.pool, session).await?,
    }
    if operator.password_change_required() && !BEFORE_PASSWORD_CHANGE.contains(&parts.uri.path()) {
        return Err(ApiError(Error::new(
            Kind::Forbidden,
            "password_change_required",
            "Somebody else has set your password; choose your own first: POST /api/auth/password/reset.",
        )));
    }
    Ok(operator)
}

/// Who is behind a token now: a session's, or an API token's if it came as a bearer token. `ip` is where the request comes from.
///
/// # Errors
/// When the database is away.
pub async fn find(app: &App, token: &str, carrier: Carrier, ip: String) -> Result<Option<Operator>, ApiError> {
    if carrier == Carrier::Bearer && api_tokens::is_one(token) {
        if !app.vault.is_open() && !app.vault.follow(&app.pool).await? {
            return Ok(None);
        }
        return Ok(api_tokens::find(&app.pool, token, &ip).await?.map(|token| Operator::of_token(token, ip)));
    }
    Ok(session(app, token).await?.map(|session| Operator::of_session(session, ip)))
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
