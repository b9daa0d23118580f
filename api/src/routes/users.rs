//! Operator accounts and site assignments.

use std::collections::{BTreeMap, BTreeSet};

use axum::{Json, extract::State};
use borealis_engine::{
    Error, Scope, Secret,
    access::{
        passwords::Sent,
        users::{self, Role},
    },
    sites,
};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::{auth::Done, sites::Site};
use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Path},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::UsersRead, routes!(list))
        .operator(Permission::UsersEdit, routes!(create))
        .operator(Permission::UsersEdit, routes!(delete))
        .operator(Permission::UsersEdit, routes!(reset_password))
        .operator(Permission::UsersEdit, routes!(role))
        .operator(Permission::UsersEdit, routes!(mfa))
        .operator(Permission::UsersRead, routes!(selection))
        .operator(Permission::UsersEdit, routes!(assign))
}

/// A user.
#[derive(Debug, serde::Serialize, ToSchema)]
struct User {
    id: i64,
    username: String,
    display_name: String,
    /// `Admin` or `User`.
    role: String,
    /// Epoch seconds; 0 for never.
    last_login: i64,
    /// Epoch seconds.
    created_at: i64,
    /// Epoch seconds.
    updated_at: i64,
    /// 1 when a second factor is asked for.
    mfa_enabled: u8,
    /// 1 when the account must be recovered before it can sign in.
    auth_reset_required: u8,
    /// Epoch seconds; 0 when it is not.
    auth_reset_at: i64,
    /// 1 when the user must choose a password before anything else.
    password_change_required: u8,
    /// `local` or `directory`.
    auth_source: String,
    /// The directory it comes from.
    directory_provider_id: Option<i64>,
    /// Its name.
    directory_provider_name: String,
    /// Its domain.
    directory_domain: String,
    /// 1 when the directory has disabled the account.
    directory_disabled: u8,
}

impl From<users::User> for User {
    fn from(user: users::User) -> Self {
        Self {
            id: user.id,
            username: user.username,
            display_name: user.display_name,
            role: user.role,
            last_login: user.last_login.map(|at| at.timestamp()).unwrap_or(0),
            created_at: user.created_at.timestamp(),
            updated_at: user.updated_at.timestamp(),
            mfa_enabled: u8::from(!user.mfa_disabled),
            auth_reset_required: u8::from(user.auth_reset_required),
            auth_reset_at: user.auth_reset_at.filter(|_| user.auth_reset_required).map(|at| at.timestamp()).unwrap_or(0),
            password_change_required: u8::from(user.password_change_required),
            auth_source: user.auth_source,
            directory_provider_id: user.directory_provider_id,
            directory_provider_name: user.directory_provider_name,
            directory_domain: user.directory_domain,
            directory_disabled: u8::from(user.directory_disabled),
        }
    }
}

/// Every user.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Users {
    /// By name.
    users: Vec<User>,
}

/// Every user, by name.
#[utoipa::path(get, path = "/api/users", tag = "Users", responses(
    (status = 200, body = Users),
    (status = 403, description = "`forbidden`"),
))]
async fn list(State(app): State<App>, _: Operator) -> Result<Json<Users>> {
    let users = users::list(&app.pool).await?;
    Ok(Json(Users { users: users.into_iter().map(User::from).collect() }))
}

/// A new user.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewUser {
    /// 1 to 64 characters, none of them `/` or `\`.
    #[serde(default)]
    username: String,
    /// By default the username.
    display_name: Option<String>,
    /// `Admin` or `User`, by default `User`.
    role: Option<String>,
    /// At least 12 characters; or its digest.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
    /// The SHA-512 of the password, in hex.
    #[schema(value_type = Option<String>)]
    password_sha512: Option<Secret<String>>,
}

/// Whoever makes an administrator has to be there: else a session left open makes itself one, with a password of its own, and
/// every other step-up is void.
fn proven_for(operator: &Operator, role: Option<&str>) -> Result<()> {
    if role.is_some_and(|role| Role::parse(role).is_ok_and(|role| role == Role::Admin)) {
        operator.require_step_up()?;
    }
    Ok(())
}

/// Make a user; an administrator needs a step-up. They set a second factor up at the first sign-in, and see no site until one is assigned.
#[utoipa::path(post, path = "/api/users", tag = "Users", request_body = NewUser, responses(
    (status = 200, body = Done),
    (status = 400, description = "`username and password are required`, `invalid_username`, `invalid_display_name`, `invalid role`, `password_too_short`"),
    (status = 403, description = "`forbidden`, `step_up_required` for an administrator"),
    (status = 409, description = "`username already exists`"),
))]
async fn create(State(app): State<App>, operator: Operator, body::Json(body): body::Json<NewUser>) -> Result<Json<Done>> {
    proven_for(&operator, body.role.as_deref())?;
    let new = users::New {
        username: body.username,
        display_name: body.display_name,
        role: body.role,
        password: Sent { plain: body.password, sha512: body.password_sha512 },
    };
    users::create(&app.pool, &app.vault, &operator.actor, &new).await?;
    Ok(Done::json())
}

/// Remove a user with their sessions and site assignments.
#[utoipa::path(delete, path = "/api/users/{username}", tag = "Users", params(("username" = String, Path, description = "Any case")), responses(
    (status = 200, body = Done),
    (status = 400, description = "`cannot_delete_self`, `last_user`, `last_admin`"),
    (status = 403, description = "`forbidden`, `directory_user_local_action_disabled`"),
    (status = 404, description = "`user not found`"),
))]
async fn delete(State(app): State<App>, operator: Operator, Path(username): Path<String>) -> Result<Json<Done>> {
    for session in users::delete(&app.pool, &operator.actor, operator.user_id, &username).await? {
        app.hub.drop_session(session).await;
    }
    Ok(Done::json())
}

/// A password for somebody else.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewPassword {
    /// At least 12 characters; or its digest.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
    /// The SHA-512 of the password, in hex.
    #[schema(value_type = Option<String>)]
    password_sha512: Option<Secret<String>>,
}

/// Give a user a password to begin with. Their second factor is forgotten, their sessions end, and they must choose a
/// password of their own after signing in.
#[utoipa::path(post, path = "/api/users/{username}/reset_password", tag = "Users",
    params(("username" = String, Path, description = "Any case")), request_body = NewPassword, responses(
    (status = 200, body = Done),
    (status = 400, description = "`invalid password`, `password_too_short`, `cannot_reset_self`"),
    (status = 403, description = "`forbidden`, `step_up_required`, `directory_user_local_action_disabled`"),
    (status = 404, description = "`user not found`"),
))]
async fn reset_password(
    State(app): State<App>,
    operator: Operator,
    Path(username): Path<String>,
    body::Json(body): body::Json<NewPassword>,
) -> Result<Json<Done>> {
    operator.require_step_up()?;
    let password = Sent { plain: body.password, sha512: body.password_sha512 };
    let ended = users::reset_password(&app.pool, &app.vault, &operator.actor, operator.user_id, &username, &password).await?;
    for session in ended {
        app.hub.drop_session(session).await;
    }
    Ok(Done::json())
}

/// A role.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewRole {
    /// `Admin` or `User`.
    #[serde(default)]
    role: String,
}

/// Change a user's role; it counts from their next request.
#[utoipa::path(post, path = "/api/users/{username}/role", tag = "Users",
    params(("username" = String, Path, description = "Any case")), request_body = NewRole, responses(
    (status = 200, body = Done),
    (status = 400, description = "`invalid role`, `cannot demote the last admin`"),
    (status = 403, description = "`forbidden`, `step_up_required` for `Admin`, `directory_user_local_action_disabled`"),
    (status = 404, description = "`user not found`"),
))]
async fn role(
    State(app): State<App>,
    operator: Operator,
    Path(username): Path<String>,
    body::Json(body): body::Json<NewRole>,
) -> Result<Json<Done>> {
    proven_for(&operator, Some(&body.role))?;
    users::set_role(&app.pool, &operator.actor, &username, &body.role).await?;
    Ok(Done::json())
}

/// What to ask of a user beside the password.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SecondFactor {
    /// Required: whether a second factor is asked for.
    #[schema(required)]
    enabled: Option<bool>,
    /// Forget the authenticator; the user sets one up at the next sign-in, if one is asked for.
    #[serde(default)]
    reset_secret: bool,
}

/// Switch a user's second factor on or off, or forget their authenticator. Their sessions end unless it is only switched on.
#[utoipa::path(post, path = "/api/users/{username}/mfa", tag = "Users",
    params(("username" = String, Path, description = "Any case")), request_body = SecondFactor, responses(
    (status = 200, body = Done),
    (status = 400, description = "`enabled_required`"),
    (status = 403, description = "`forbidden`, `step_up_required`, `directory_mfa_required`"),
    (status = 404, description = "`user not found`"),
))]
async fn mfa(
    State(app): State<App>,
    operator: Operator,
    Path(username): Path<String>,
    body::Json(body): body::Json<SecondFactor>,
) -> Result<Json<Done>> {
    operator.require_step_up()?;
    let enabled = body.enabled.ok_or_else(|| Error::field("enabled_required", "enabled", "is required."))?;
    for session in users::set_mfa(&app.pool, &operator.actor, &username, enabled, body.reset_secret).await? {
        app.hub.drop_session(session).await;
    }
    Ok(Done::json())
}

/// Some users.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Usernames {
    /// Any case.
    #[serde(default)]
    usernames: Vec<String>,
}

/// A selected user.
#[derive(Debug, serde::Serialize, ToSchema)]
struct SelectedUser {
    id: i64,
    username: String,
    display_name: String,
    role: String,
}

/// A site a user may see.
#[derive(Debug, serde::Serialize, ToSchema)]
struct AssignedSite {
    id: i64,
    name: String,
}

/// What is assigned to the selected users now, and what could be.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Selection {
    /// In the order asked for.
    users: Vec<SelectedUser>,
    /// All sites, by name.
    sites: Vec<Site>,
    /// By username.
    existing_assignments: BTreeMap<String, Vec<AssignedSite>>,
    /// The sites all of them have; empty when they differ.
    selected_site_ids: Vec<i64>,
    /// Whether they differ.
    has_mixed_assignments: bool,
    /// Says so in words; else empty.
    warning: &'static str,
}

/// What is assigned to these users now.
#[utoipa::path(post, path = "/api/user_site_assignments/selection", tag = "Users", request_body = Usernames, responses(
    (status = 200, body = Selection),
    (status = 400, description = "`users_required`, `too_many_users`, `admin_selected`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`user_not_found` with `usernames`"),
))]
async fn selection(State(app): State<App>, _: Operator, body::Json(body): body::Json<Usernames>) -> Result<Json<Selection>> {
    let users = users::selection(&app.pool, &body.usernames).await?;
    let sites = sites::list(&app.pool, &Scope::All, &sites::Which::default()).await?;
    let sets: BTreeSet<BTreeSet<i64>> = users.iter().map(|user| user.sites.iter().map(|(id, _)| *id).collect()).collect();
    let mixed = sets.len() > 1;
    let existing = users
        .iter()
        .map(|user| {
            let sites = user.sites.iter().map(|(id, name)| AssignedSite { id: *id, name: name.clone() }).collect();
            (user.username.clone(), sites)
        })
        .collect();
    Ok(Json(Selection {
        users: users
            .into_iter()
            .map(|user| SelectedUser { id: user.id, username: user.username, display_name: user.display_name, role: user.role })
            .collect(),
        sites: sites.into_iter().map(Site::from).collect(),
        existing_assignments: existing,
        selected_site_ids: if mixed { Vec::new() } else { sets.into_iter().flatten().collect() },
        has_mixed_assignments: mixed,
        warning: if mixed { "The selected users have different sites; assigning replaces them all." } else { "" },
    }))
}

/// Which users get which sites.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SiteAssignment {
    /// Any case.
    #[serde(default)]
    usernames: Vec<String>,
    /// The sites they may see from now on; none takes everything away. Numbers below 1 are ignored.
    site_ids: Vec<i64>,
}

/// What was assigned.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Assigned {
    /// `ok`.
    status: &'static str,
    /// To how many users.
    assigned_user_count: usize,
    /// What they may see now.
    assigned_site_ids: Vec<i64>,
}

/// Replace the sites of these users.
#[utoipa::path(post, path = "/api/user_site_assignments/assign", tag = "Users", request_body = SiteAssignment, responses(
    (status = 200, body = Assigned),
    (status = 400, description = "`users_required`, `too_many_users`, `too_many_sites`, `admin_selected`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`user_not_found` with `usernames`, `site_not_found` with `site_ids`"),
))]
async fn assign(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<SiteAssignment>,
) -> Result<Json<Assigned>> {
    let (count, sites) = users::assign(&app.pool, &operator.actor, &body.usernames, &body.site_ids).await?;
    Ok(Json(Assigned { status: "ok", assigned_user_count: count, assigned_site_ids: sites }))
}
