//! What operators call a device: its hostname, and its description.

use axum::extract::State;
use borealis_engine::{
    devices::{hostnames, labels},
    enrollment::{approvals::Wish, requests},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes, TargetDevice},
    body::{Json, Params},
    errors::Result,
    sockets::events::ToOperator,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::DevicesRead, routes!(search))
        .operator(Permission::DevicesEdit, routes!(describe))
        .operator(Permission::DevicesEdit, routes!(approve_hostname))
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct DeviceSearch {
    /// A part of the hostname, in any case; at least three characters.
    #[serde(default)]
    hostname: String,
}

/// A device that a search has found.
#[derive(Debug, Serialize, ToSchema)]
struct FoundDevice {
    /// Its GUID, upper case.
    agent_guid: String,
    /// Its agent id.
    agent_id: String,
    /// Its hostname.
    hostname: String,
    /// Empty for machines with an agent.
    connection_type: String,
    /// Its site.
    site_id: Option<i64>,
    /// The site's name, or empty.
    site_name: String,
    /// The site's description, or empty.
    site_description: String,
}

/// What a search has found.
#[derive(Debug, Serialize, ToSchema)]
struct FoundDevices {
    /// At most 50: the one with exactly this name first, then those that begin with it.
    devices: Vec<FoundDevice>,
    /// What was searched for.
    query: String,
    /// How many devices these are.
    count: usize,
}

/// Find devices in the caller's sites by a part of the hostname. Fewer than three characters find nothing.
#[utoipa::path(get, path = "/api/devices/search", tag = "Devices", params(DeviceSearch), responses(
    (status = 200, body = FoundDevices),
    (status = 400, description = "`invalid_query`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn search(
    State(app): State<App>,
    operator: Operator,
    Params(search): Params<DeviceSearch>,
) -> Result<axum::Json<FoundDevices>> {
    let query = search.hostname.trim().to_owned();
    let devices: Vec<FoundDevice> = labels::search(&app.pool, &operator.scope, &query)
        .await?
        .into_iter()
        .map(|found| FoundDevice {
            agent_guid: found.agent_guid,
            agent_id: found.agent_id,
            hostname: found.hostname,
            connection_type: found.connection_type,
            site_id: found.site_id,
            site_name: found.site_name,
            site_description: found.site_description,
        })
        .collect();
    Ok(axum::Json(FoundDevices { count: devices.len(), devices, query }))
}

/// A device's description.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct DeviceDescription {
    /// At most 1024 characters; empty clears it.
    description: String,
}

/// The change was made.
#[derive(Debug, Serialize, ToSchema)]
struct DeviceDescribed {
    /// `ok`.
    status: &'static str,
}

/// Describe a device.
#[utoipa::path(post, path = "/api/device/description/{hostname}", tag = "Devices", request_body = DeviceDescription,
    params(("hostname" = String, Path, description = "The hostname, in any case, or the GUID")), responses(
    (status = 200, body = DeviceDescribed),
    (status = 400, description = "`invalid_description`, `invalid_json`"),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`ambiguous_hostname` with `guids` and `candidates`"),
))]
async fn describe(
    State(app): State<App>,
    operator: Operator,
    TargetDevice(device): TargetDevice,
    Json(body): Json<DeviceDescription>,
) -> Result<axum::Json<DeviceDescribed>> {
    labels::describe(&app.pool, &operator.scope, &operator.actor, device.guid, &body.description).await?;
    Ok(axum::Json(DeviceDescribed { status: "ok" }))
}

/// Which reported hostname to approve.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ApproveHostname {
    /// The device's `reported_hostname`, so that another one reported since is not approved by mistake.
    hostname: String,
    /// `coexist` when another device of the site has the name and both are to have it.
    conflict_resolution: Option<String>,
}

/// The hostname was approved.
#[derive(Debug, Serialize, ToSchema)]
struct HostnameApproved {
    /// `ok`.
    status: &'static str,
    /// The device's hostname now.
    hostname: String,
}

/// Approve the hostname that a device reports: from then on it is addressed by it.
#[utoipa::path(post, path = "/api/devices/{guid}/hostname", tag = "Devices", request_body = ApproveHostname,
    params(("guid" = String, Path, description = "The device's GUID")), responses(
    (status = 200, body = HostnameApproved),
    (status = 400, description = "`invalid guid`, `invalid_hostname`, `invalid_conflict_resolution`, `invalid_json`"),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`hostname_not_reported` with `reported_hostname`, `conflict_resolution_required` with `guids`"),
))]
async fn approve_hostname(
    State(app): State<App>,
    operator: Operator,
    TargetDevice(device): TargetDevice,
    Json(body): Json<ApproveHostname>,
) -> Result<axum::Json<HostnameApproved>> {
    let seen = requests::hostname(&body.hostname)?;
    let resolution = Wish::parse(None, body.conflict_resolution.as_deref(), false)?.resolution;
    let renamed = hostnames::approve(&app.pool, &operator.scope, &operator.actor, device.guid, &seen, resolution).await?;
    let change = json!({"hostname": renamed.hostname, "change": "hostname"});
    app.hub.to_site(renamed.site_id, ToOperator::DeviceInventory, change).await;
    Ok(axum::Json(HostnameApproved { status: "ok", hostname: renamed.hostname }))
}
