//! Device reads.

use axum::{Json, extract::State, response::Response};
use borealis_engine::devices::list::{self, Device, Filter};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::IntoParams;
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes, TargetDevice},
    body::{self, Params},
    errors::Result,
    large::Encodings,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::DevicesRead, routes!(devices))
        .operator(Permission::DevicesRead, routes!(device))
        .operator(Permission::DevicesRead, routes!(details))
        .operator(Permission::DevicesRead, routes!(agents))
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
    /// Only those with this text, in any case, in a hostname, address, description, domain, user, operating system or GUID.
    #[serde(default)]
    q: String,
    /// Only those of which something has changed since, but for what every heartbeat changes (`last_seen`, `uptime` and the use of processor
    /// and memory): RFC 3339, or epoch seconds, such as `as_of` of an answer. Removed devices, and what time alone changes (`status`), are not
    /// told.
    changed_after: Option<String>,
    /// `hostname` (the default), `created_at` or `last_seen`; `-last_seen` is the latest first. A list by `last_seen` has one page.
    sort: Option<String>,
    /// Only these fields of each device, names separated by commas: `hostname,status,last_seen`.
    fields: Option<String>,
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

/// The devices in the caller's sites. Compressed for clients that take gzip.
#[utoipa::path(get, path = "/api/devices", tag = "Devices", params(Which), responses(
    (status = 200, body = Value, description = "`{devices: [...], next_cursor, as_of}`"),
    (status = 400, description = "`invalid_limit`, `invalid_cursor`, `invalid_fields`, `invalid_instant`, `invalid_query`, `invalid_search`, `invalid_sort`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn devices(
    State(app): State<App>,
    operator: Operator,
    encodings: Encodings,
    Params(which): Params<Which>,
) -> Result<Response> {
    let given = |text: &str| Some(text.trim().replace('\0', "")).filter(|text| !text.is_empty());
    let filter = Filter {
        hostname: given(&which.hostname),
        search: given(&which.q),
        connection_type: given(&which.connection_type),
        only_agents: says_yes(&which.only_agents),
        changed_after: body::instant(which.changed_after.as_deref(), "changed_after")?,
        sort: which.sort.filter(|sort| !sort.is_empty()),
        slim: says_yes(&which.slim),
        fields: which.fields.filter(|names| !names.trim().is_empty()),
        limit: which.limit,
        cursor: which.cursor.filter(|cursor| !cursor.is_empty()),
    };
    let page = list::page(&app.pool, &operator.scope, &filter).await?;
    encodings.json(page.about_bytes(), page).await
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
