//! The processes of a device, as its agent lists them when it is asked.

use axum::{Json, extract::State};
use borealis_engine::{
    Error,
    devices::calls::{ListProcesses, Process, ProcessRequest},
    keys::guid_text,
};
use borealis_protocol::calls::{ACTION_LIST, PROCESSES_REFRESH_MS, process_list_age_s};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Permission, Routes, TargetDevice},
    body::Params,
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).operator(Permission::DevicesRead, routes!(list))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ProcessesQuery {
    /// How old the list may be, in seconds: 0.25 to 15, by default 5. Values outside become the nearest.
    max_age_seconds: Option<f64>,
}

/// The processes of a device.
#[derive(Debug, Serialize, ToSchema)]
struct ProcessList {
    /// `ok`.
    status: &'static str,
    /// The device's hostname.
    hostname: String,
    /// Its GUID, upper case.
    guid: String,
    /// Its agent id.
    agent_id: String,
    /// Always true: the agent was asked.
    agent_socket: bool,
    /// When the list was made, in epoch seconds.
    reported_at: i64,
    /// How often to ask again, in milliseconds; at least 5000.
    refresh_interval_ms: i64,
    /// How many processes these are.
    count: usize,
    /// There are more; these are the largest.
    truncated: bool,
    /// The processes, in no order.
    processes: Vec<Process>,
}

/// List the processes of a device. Its agent is asked now.
#[utoipa::path(get, path = "/api/device/processes/{hostname}", tag = "Devices",
    params(("hostname" = String, Path, description = "The hostname, in any case, or the GUID"), ProcessesQuery), responses(
    (status = 200, body = ProcessList),
    (status = 400, description = "`invalid_query`, `invalid_max_age_seconds`; the agent refused with `invalid_request`"),
    (status = 401, description = "`unauthorized`"),
    (status = 403, description = "The agent refused with `access_denied`"),
    (status = 404, description = "`not found`"),
    (status = 409, description = "`ambiguous_hostname` with `guids` and `candidates`"),
    (status = 501, description = "The agent cannot: `unsupported_event`, `unsupported_platform`"),
    (status = 502, description = "`invalid_agent_response`; the agent failed: `agent_error` with `agent_code`"),
    (status = 503, description = "`agent_unavailable`: it is not connected; `agent_busy`: too many requests to it are under way"),
    (status = 504, description = "`timeout`: it has not answered within 8 seconds"),
))]
async fn list(
    State(app): State<App>,
    TargetDevice(device): TargetDevice,
    Params(query): Params<ProcessesQuery>,
) -> Result<Json<ProcessList>> {
    if query.max_age_seconds.is_some_and(|asked| !asked.is_finite()) {
        return Err(Error::field("invalid_max_age_seconds", "max_age_seconds", "must be a number.").into());
    }
    let request = ProcessRequest {
        action: ACTION_LIST.to_owned(),
        max_age_seconds: process_list_age_s(query.max_age_seconds),
        requested_at: chrono::Utc::now().timestamp(),
    };
    let snapshot = app.hub.call::<ListProcesses>(device.guid, &request).await?;
    Ok(Json(ProcessList {
        status: "ok",
        hostname: device.hostname,
        guid: guid_text(device.guid),
        agent_id: device.agent_id,
        agent_socket: true,
        reported_at: snapshot.reported_at,
        refresh_interval_ms: snapshot.refresh_interval_ms.max(PROCESSES_REFRESH_MS),
        count: snapshot.processes.len(),
        truncated: snapshot.truncated,
        processes: snapshot.processes,
    }))
}
