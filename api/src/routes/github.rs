//! The token GitHub is asked with. Administrators only.

use axum::{Json, extract::State};
use borealis_engine::{
    Secret,
    access::{bootstrap, github},
};
use chrono::Utc;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes},
    body,
    errors::Result,
    github::{Verdict, verify},
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::IntegrationsRead, routes!(status))
        .operator(Permission::IntegrationsEdit, routes!(update))
}

/// The token and what GitHub says of it.
#[derive(Debug, Default, serde::Serialize, ToSchema)]
struct Token {
    /// Always empty: the token never comes back.
    token: &'static str,
    /// Its last four characters, or empty.
    token_hint: String,
    has_token: bool,
    /// Whether GitHub takes it.
    valid: bool,
    /// A sentence.
    message: String,
    /// `ok`, `missing`, `invalid`, `insufficient`, `error`, `locked`, `reset_required`.
    status: &'static str,
    /// Requests an hour that it is good for.
    rate_limit: Option<u64>,
    /// Why GitHub could not be asked.
    error: Option<&'static str>,
    /// When GitHub was asked, in epoch seconds; 0 when it was not.
    checked_at: i64,
    /// Whether the secret store has been set up.
    configured: bool,
    /// Whether it is locked.
    locked: bool,
    /// Whether a reset of the secret store took the token.
    reset_required: bool,
    /// When, in epoch seconds; 0 when it did not.
    reset_at: i64,
}

async fn look(app: &App) -> Result<Token> {
    let stored = github::stored(&app.pool).await?;
    let store = bootstrap::state(&app.pool, &app.vault).await?;
    let mut token = Token {
        token_hint: stored.hint,
        has_token: stored.has_token,
        configured: store.configured,
        locked: store.locked,
        reset_required: stored.reset_at.is_some(),
        reset_at: stored.reset_at.map_or(0, |at| at.timestamp()),
        ..Token::default()
    };
    let (status, message) = if store.locked {
        ("locked", "The secret store is locked.".to_owned())
    } else if token.reset_required {
        ("reset_required", "A reset of the secret store took the token; set it again.".to_owned())
    } else if let Some(secret) = github::token(&app.pool, &app.vault).await? {
        token.checked_at = Utc::now().timestamp();
        match verify(&app.settings.access.egress, &app.settings.github_api_url, &secret).await {
            Ok(Verdict::Good(limit)) => {
                (token.valid, token.rate_limit) = (true, Some(limit));
                ("ok", format!("GitHub takes the token, for {limit} requests an hour."))
            }
            Ok(Verdict::Insufficient(limit)) => {
                token.rate_limit = Some(limit);
                ("insufficient", format!("GitHub takes the token, but for {limit} requests an hour only."))
            }
            Ok(Verdict::Unknown) => ("invalid", "GitHub does not know the token.".to_owned()),
            Err(error) => {
                tracing::warn!(%error, source = ?error.source, "GitHub could not be asked");
                token.error = Some(error.code);
                ("error", error.message)
            }
        }
    } else {
        ("missing", "There is no token.".to_owned())
    };
    (token.status, token.message) = (status, message);
    Ok(token)
}

/// Whether there is a token, and what GitHub says of it now.
#[utoipa::path(get, path = "/api/github/token", tag = "GitHub", responses(
    (status = 200, body = Token),
    (status = 403, description = "`forbidden`"),
))]
async fn status(State(app): State<App>, _: Operator) -> Result<Json<Token>> {
    Ok(Json(look(&app).await?))
}

/// A token.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewToken {
    /// Empty: remove the token.
    #[schema(value_type = String)]
    token: Secret<String>,
}

/// Set or remove the token, and ask GitHub what it is good for. It is kept whatever GitHub says. Needs a step-up.
#[utoipa::path(post, path = "/api/github/token", tag = "GitHub", request_body = NewToken, responses(
    (status = 200, body = Token),
    (status = 400, description = "`invalid_token`"),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 423, description = "`aegis_locked`"),
))]
async fn update(State(app): State<App>, operator: Operator, body::Json(body): body::Json<NewToken>) -> Result<Json<Token>> {
    operator.require_step_up()?;
    github::set(&app.pool, &app.vault, &operator.actor, &body.token).await?;
    Ok(Json(look(&app).await?))
}
