//! Device reads.

use axum::{Json, extract::State};
use borealis_engine::devices::list::{self, Device, Filter, Page};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::IntoParams;
use utoipa_axum::routes;

use crate::{
    access::{Area, Operator, Routes, TargetDevice},
    body::Params,
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .area(Area::Devices)
        .operator(routes!(devices))
        .operator(routes!(device))
        .operator(routes!(details))
        .operator(routes!(agents))
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Which {
    /// `1`, `true` or `yes`: only machines with an agent.
    #[serde(default)]
    only_agents: String,
    /// Only this connection type, in any case.
    #[serde(default)]
    connection_type: String,
    /// Only this hostname, in any case.
    #[serde(default)]
    hostname: String,
    /// `1`, `true` or `yes`: without the large documents.
    #[serde(default)]
    slim: String,
    /// The most rows, 1 to 10000; by default 10000.
    limit: Option<i64>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

fn says_yes(text: &str) -> bool {
    matches!(text.trim().to_lowercase().as_str(), "1" | "true" | "yes")
}

/// The devices in the caller's sites, by hostname.
#[utoipa::path(get, path = "/api/devices", tag = "Devices", params(Which), responses(
    (status = 200, body = Value, description = "`{devices: [...], next_cursor}`"),
    (status = 400, description = "`invalid_limit`, `invalid_cursor`, `invalid_query`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn devices(State(app): State<App>, operator: Operator, Params(which): Params<Which>) -> Result<Json<Page>> {
    let given = |text: &str| Some(text.trim().replace('\0', "")).filter(|text| !text.is_empty());
    let filter = Filter {
        hostname: given(&which.hostname),
        connection_type: given(&which.connection_type),
        only_agents: says_yes(&which.only_agents),
        slim: says_yes(&which.slim),
        limit: which.limit,
        cursor: which.cursor.filter(|cursor| !cursor.is_empty()),
    };
    Ok(Json(list::page(&app.pool, &operator.scope, &filter).await?))
}

/// One device.
#[utoipa::path(get, path = "/api/devices/{guid}", tag = "Devices", params(("guid" = String, Path, description = "The device's GUID")), responses(
    (status = 200, body = Value, description = "The device, with its version status"),
    (status = 400, description = "`invalid guid`"),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`not found`"),
))]
async fn device(State(app): State<App>, operator: Operator, TargetDevice(device): TargetDevice) -> Result<Json<Device>> {
    Ok(Json(list::one(&app.pool, &operator.scope, device.guid).await?))
}

/// The device of a hostname, or of a GUID in its place.
#[utoipa::path(get, path = "/api/device/details/{hostname}", tag = "Devices", params(("hostname" = String, Path, description = "The hostname, in any case, or the GUID")), responses(
    (status = 200, body = Value, description = "The device, with its version status"),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`ambiguous_hostname` with `guids` and `candidates`"),
))]
async fn details(State(app): State<App>, operator: Operator, TargetDevice(device): TargetDevice) -> Result<Json<Device>> {
    Ok(Json(list::one(&app.pool, &operator.scope, device.guid).await?))
}

/// The agents that are online, keyed by agent id.
#[utoipa::path(get, path = "/api/agents", tag = "Devices", responses(
    (status = 200, body = Value, description = "`{<agent id>: {hostname, service_mode, site_id, ...}}`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn agents(State(app): State<App>, operator: Operator) -> Result<Json<Map<String, Value>>> {
    Ok(Json(list::agents(&app.pool, &operator.scope).await?))
}
