//! API tokens: making, listing and revoking them; people only, no token does it.

use axum::{Json, extract::State, http::StatusCode};
use borealis_engine::access::{api_tokens, users};
use chrono::{DateTime, Utc};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Done;
use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Path},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::AccountManage, routes!(list, create))
        .operator(Permission::AccountManage, routes!(revoke))
        .operator(Permission::ApiTokensManage, routes!(list_of_user))
        .operator(Permission::ApiTokensManage, routes!(revoke_of_user))
}

/// An API token; never the token itself.
#[derive(Debug, serde::Serialize, ToSchema)]
struct ApiToken {
    /// Names it; opens nothing.
    id: Uuid,
    /// What its owner calls it.
    name: String,
    /// The last four characters of the token.
    hint: String,
    /// What it may do.
    scopes: Vec<String>,
    /// When it was made.
    created_at: DateTime<Utc>,
    /// When it ends, or ended.
    expires_at: DateTime<Utc>,
    /// When it was last used, to a minute; null when it has never been used.
    last_used_at: Option<DateTime<Utc>>,
    /// The address it was used from then; else empty.
    last_used_ip: String,
}

impl From<api_tokens::Listed> for ApiToken {
    fn from(token: api_tokens::Listed) -> Self {
        Self {
            id: token.id,
            name: token.name,
            hint: token.hint,
            scopes: token.scopes,
            created_at: token.created_at,
            expires_at: token.expires_at,
            last_used_at: token.last_used_at,
            last_used_ip: token.last_used_ip,
        }
    }
}

/// The API tokens of a user.
#[derive(Debug, serde::Serialize, ToSchema)]
struct ApiTokens {
    /// The newest first; those that expired in the last 30 days too.
    tokens: Vec<ApiToken>,
}

async fn all(app: &App, user_id: i64) -> Result<Json<ApiTokens>> {
    let tokens = api_tokens::list(&app.pool, user_id).await?;
    Ok(Json(ApiTokens { tokens: tokens.into_iter().map(ApiToken::from).collect() }))
}

/// Your API tokens.
#[utoipa::path(get, path = "/api/auth/tokens", tag = "API tokens", responses(
    (status = 200, body = ApiTokens),
    (status = 401, description = "`unauthorized`"),
))]
async fn list(State(app): State<App>, operator: Operator) -> Result<Json<ApiTokens>> {
    all(&app, operator.user_id).await
}

/// A new API token.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewApiToken {
    /// 1 to 80 characters.
    #[serde(default)]
    name: String,
    /// At least one of `read`, `assemblies:write`, `devices:write`, `jobs:write`, `sites:write`.
    #[serde(default)]
    scopes: Vec<String>,
    /// 1 to 366, by default 90.
    expires_in_days: Option<i64>,
}

/// The API token that was made.
#[derive(serde::Serialize, ToSchema)]
struct MadeApiToken {
    /// The token, for `Authorization: Bearer`. It is told this once.
    token: String,
    #[serde(flatten)]
    listed: ApiToken,
}

/// Make an API token for your account; needs a step-up. The answer has the token, which is never shown again.
#[utoipa::path(post, path = "/api/auth/tokens", tag = "API tokens", request_body = NewApiToken, responses(
    (status = 201, body = MadeApiToken),
    (status = 400, description = "`name_required`, `invalid_name`, `invalid_scope` with the `known` ones, `invalid_expiry`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`step_up_required`, `bad_origin`"),
    (status = 409, description = "`too_many_tokens`: 50 are live"),
))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<NewApiToken>,
) -> Result<(StatusCode, Json<MadeApiToken>)> {
    let new = api_tokens::New { name: body.name, scopes: body.scopes, expires_in_days: body.expires_in_days };
    let (token, listed) = api_tokens::create(&app.pool, &operator.actor, operator.session()?, &new).await?;
    Ok((StatusCode::CREATED, Json(MadeApiToken { token: token.expose().clone(), listed: listed.into() })))
}

/// Revoke one of your API tokens.
#[utoipa::path(delete, path = "/api/auth/tokens/{id}", tag = "API tokens", params(("id" = Uuid, Path)), responses(
    (status = 200, body = Done),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`bad_origin`"),
    (status = 404, description = "`token_not_found`: you have no such token"),
))]
async fn revoke(State(app): State<App>, operator: Operator, Path(id): Path<Uuid>) -> Result<Json<Done>> {
    api_tokens::revoke(&app.pool, &operator.actor, operator.user_id, id).await?;
    Ok(Done::json())
}

/// The API tokens of a user.
#[utoipa::path(get, path = "/api/users/{username}/tokens", tag = "API tokens",
    params(("username" = String, Path, description = "Any case")), responses(
    (status = 200, body = ApiTokens),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`user not found`"),
))]
async fn list_of_user(State(app): State<App>, _: Operator, Path(username): Path<String>) -> Result<Json<ApiTokens>> {
    all(&app, users::id_of(&app.pool, &username).await?).await
}

/// Revoke an API token of a user.
#[utoipa::path(delete, path = "/api/users/{username}/tokens/{id}", tag = "API tokens",
    params(("username" = String, Path, description = "Any case"), ("id" = Uuid, Path)), responses(
    (status = 200, body = Done),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`user not found`, `token_not_found`"),
))]
async fn revoke_of_user(
    State(app): State<App>,
    operator: Operator,
    Path((username, id)): Path<(String, Uuid)>,
) -> Result<Json<Done>> {
    api_tokens::revoke(&app.pool, &operator.actor, users::id_of(&app.pool, &username).await?, id).await?;
    Ok(Done::json())
}
