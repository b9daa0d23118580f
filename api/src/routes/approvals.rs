//! Requests of machines to be enrolled, and the decisions about them.

use axum::{Json, extract::State};
use borealis_engine::{
    Error, Kind,
    enrollment::approvals::{self, Decided, Wish},
};
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{Operator, Permission, Routes},
    body::{OptionalJson, Params, Path},
    errors::Result,
    sockets::events::ToOperator,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::EnrollmentCodesRead, routes!(codes))
        .operator(Permission::EnrollmentCodesEdit, routes!(create_code))
        .operator(Permission::EnrollmentCodesEdit, routes!(delete_code))
        .operator(Permission::ApprovalsRead, routes!(list))
        .operator(Permission::ApprovalsDecide, routes!(approve))
        .operator(Permission::ApprovalsDecide, routes!(deny))
}

/// The enrollment codes of all sites.
#[utoipa::path(get, path = "/api/admin/enrollment-codes", tag = "Enrollment", responses(
    (status = 200, body = Value, description = "`{codes: [{id: site:<id>, site_id, site_name, code, created_at}]}`, by site name"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`forbidden`"),
))]
async fn codes(State(app): State<App>) -> Result<Json<Value>> {
    Ok(Json(json!({"codes": approvals::codes(&app.pool).await?})))
}

fn removed() -> Error {
    Error::new(Kind::Gone, "legacy_endpoint_removed_use_sites_api", "Codes belong to sites and are made with them.")
}

/// Gone: codes are made with their site.
#[utoipa::path(post, path = "/api/admin/enrollment-codes", tag = "Enrollment", responses(
    (status = 410, description = "`legacy_endpoint_removed_use_sites_api`"),
))]
async fn create_code() -> Result<()> {
    Err(removed().into())
}

/// Gone: codes are removed with their site.
#[utoipa::path(delete, path = "/api/admin/enrollment-codes/{code_id}", tag = "Enrollment",
    params(("code_id" = String, Path, description = "`site:<id>`")), responses(
    (status = 410, description = "`legacy_endpoint_removed_use_sites_api`"),
))]
async fn delete_code() -> Result<()> {
    Err(removed().into())
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// `pending`, `approved`, `denied`, `expired`, `completed` or `wrong_code`; empty or `all` for everything.
    #[serde(default)]
    status: String,
    /// The most rows, 1 to 10000.
    limit: Option<i64>,
}

/// Requests in the caller's sites, oldest first; `status=wrong_code` lists, for administrators, who came with a wrong code in
/// the last five minutes.
#[utoipa::path(get, path = "/api/admin/device-approvals", tag = "Enrollment", params(Which), responses(
    (status = 200, body = Value, description = "`{approvals: [...]}`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn list(State(app): State<App>, operator: Operator, Params(which): Params<Which>) -> Result<Json<Value>> {
    let status = which.status.trim();
    if status == "wrong_code" {
        let rows = if operator.is_admin() { approvals::wrong_codes(&app.pool).await? } else { Vec::new() };
        return Ok(Json(json!({"approvals": rows})));
    }
    let status = Some(status).filter(|status| !status.is_empty() && *status != "all");
    let rows = approvals::list(&app.pool, &operator.scope, status, which.limit.unwrap_or(approvals::MAX_ROWS)).await?;
    Ok(Json(json!({"approvals": rows})))
}

/// How to approve.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Approve {
    /// Bind to this device. Unknown and purged GUIDs, and moves from another site, are for administrators.
    guid: Option<String>,
    /// `overwrite` or `coexist`, when a device of the site has the name and another key.
    conflict_resolution: Option<String>,
    /// Lets a device that is not active back in; for administrators.
    #[serde(default)]
    reinstate: bool,
}

async fn changed(app: &App, decided: &Decided, status: &str) {
    let payload = json!({"approval_id": decided.id, "site_id": decided.site_id, "status": status, "hostname": decided.hostname});
    app.hub.to_site(decided.site_id, ToOperator::DeviceApprovals, payload).await;
}

/// A path's id; what is none names nothing.
fn id(text: &str) -> Result<Uuid> {
    Ok(Uuid::try_parse(text).map_err(|_| Error::not_found())?)
}

/// Approve a request. Nothing reaches the machine until it polls.
///
/// One of `kind` `identity` moves the identity of the device `guid` to the machine that is held; the other one is held then.
#[utoipa::path(post, path = "/api/admin/device-approvals/{approval_id}/approve", tag = "Enrollment",
    params(("approval_id" = String, Path, description = "The request's id")), request_body = Option<Approve>, responses(
    (status = 200, body = Value, description = "`{status: approved, conflict_resolution?}`"),
    (status = 400, description = "`invalid_guid`, `invalid_conflict_resolution`, `invalid_json`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "`forbidden`: an administrator has to decide"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`approval_not_pending`, `conflict_resolution_required` (with `hostname`), `ambiguous_hostname` (with `guids`), `fingerprint_in_use`, `reinstate_required`; of `kind` `identity`: `device_changed`, as the device is gone or in another site"),
))]
async fn approve(
    State(app): State<App>,
    operator: Operator,
    Path(approval_id): Path<String>,
    OptionalJson(body): OptionalJson<Approve>,
) -> Result<Json<Value>> {
    let wish = Wish::parse(body.guid.as_deref(), body.conflict_resolution.as_deref(), body.reinstate)?;
    let admin = operator.is_admin();
    let decided = approvals::approve(&app.pool, &operator.scope, admin, &operator.actor, id(&approval_id)?, &wish).await?;
    if let Some(device) = decided.moved {
        app.hub.drop_device(device).await;
    }
    changed(&app, &decided, if decided.moved.is_some() { "completed" } else { "approved" }).await;
    let mut answer = json!({"status": "approved"});
    if let Some(resolution) = decided.resolution {
        answer["conflict_resolution"] = resolution.into();
    }
    Ok(Json(answer))
}

/// Deny a request. The machine may ask again.
#[utoipa::path(post, path = "/api/admin/device-approvals/{approval_id}/deny", tag = "Enrollment",
    params(("approval_id" = String, Path, description = "The request's id")), responses(
    (status = 200, body = Value, description = "`{status: denied}`"),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`approval_not_pending`"),
))]
async fn deny(State(app): State<App>, operator: Operator, Path(approval_id): Path<String>) -> Result<Json<Value>> {
    let decided = approvals::deny(&app.pool, &operator.scope, &operator.actor, id(&approval_id)?).await?;
    changed(&app, &decided, "denied").await;
    Ok(Json(json!({"status": "denied"})))
}
