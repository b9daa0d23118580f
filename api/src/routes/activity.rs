//! Quick runs and the activity history of a device.

use axum::{Json, extract::State};
use borealis_engine::{
    Error,
    devices::lookup::Found,
    jobs::activity::{self, ActivityView, QuickRun, QuickRunBody},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{Operator, Permission, Routes, TargetDevice},
    body::{self, Params, Path},
    errors::{ApiError, Result},
    sockets::events::ToOperator,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::JobsLaunch, routes!(quick_run))
        .operator(Permission::JobsRead, routes!(history))
        .operator(Permission::JobsEdit, routes!(clear))
        .operator(Permission::JobsRead, routes!(one))
}

/// A script to be run now.
#[derive(ToSchema)]
#[schema(as = QuickRunBody)]
#[expect(dead_code, reason = "the shape of a body, for the OpenAPI document")]
struct QuickRunDocument {
    /// Hostnames or GUIDs; at most 1,000.
    hostnames: Vec<String>,
    assembly_guid: Option<String>,
    /// Instead of the guid, a path under `Scripts/`.
    script_path: Option<String>,
    /// `system`, which is the default, or `currentuser`.
    run_mode: Option<String>,
    /// With `currentuser`: `all_active_sessions`, which is the default, or `specific_session`.
    session_target: Option<String>,
    /// With `specific_session`.
    target_session_id: Option<i64>,
    /// Values of the script's variables.
    variable_values: Option<Value>,
    /// Accepted and ignored.
    admin_user: Option<String>,
    /// Accepted and ignored.
    admin_pass: Option<String>,
}

/// What became of one host.
#[derive(Debug, Serialize, ToSchema)]
struct QuickRunResult {
    hostname: String,
    device_guid: Uuid,
    /// The id of the activity.
    job_id: i64,
    /// `Queued`: sent when the device is connected, at once or within 15 minutes. `Failed`: not to be sent.
    status: String,
    /// Why it failed: `device_not_active`.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// What became of each host, in the order of the request.
#[derive(Debug, Serialize, ToSchema)]
struct QuickRunResults {
    results: Vec<QuickRunResult>,
}

/// Run a script now on devices in your sites, all or none of them.
#[utoipa::path(post, path = "/api/scripts/quick_run", tag = "Assemblies", request_body = QuickRunDocument,
    responses(
        (status = 200, body = QuickRunResults),
        (status = 400, description = "`invalid_json`, `missing_hostnames`, `missing_script`, `unknown_target`, `unsupported_script_type`, `invalid_<field>`"),
        (status = 403, description = "`out_of_scope_hostnames` with `hostnames`; `step_up_required` for more than 50 devices"),
        (status = 404, description = "`script_not_found`"),
        (status = 409, description = "`ambiguous_hostname`, `ambiguous_assembly` with `candidates`"),
    ))]
async fn quick_run(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<QuickRunBody>,
) -> Result<Json<QuickRunResults>> {
    let run = QuickRun::parse(body)?;
    if run.hosts.len() > activity::STEP_UP_ABOVE {
        operator.require_step_up()?;
    }
    let script = activity::script(&app.pool, &operator.scope, &run).await?;
    let mut tx = app.pool.begin().await?;
    let started = activity::start(&mut tx, &operator.scope, &operator.actor, &run, &script).await?;
    tx.commit().await?;
    for run in &started {
        let change = json!({
            "activity_id": run.job_id, "hostname": run.target.hostname, "device_guid": run.target.device_guid, "status": run.status,
            "queue_lane": activity::QUICK_RUN_LANE, "activity_kind": activity::QUICK_RUN_KIND, "change": "created", "source": "quick_job",
        });
        app.hub.to_site(run.target.site_id, ToOperator::DeviceActivity, change).await;
    }
    let devices: Vec<Uuid> = started.iter().map(|run| run.target.device_guid).collect();
    app.hub.deliver(&devices).await;
    let results = started
        .into_iter()
        .map(|run| QuickRunResult {
            hostname: run.target.hostname,
            device_guid: run.target.device_guid,
            job_id: run.job_id,
            status: run.status,
            error: run.error,
        })
        .collect();
    Ok(Json(QuickRunResults { results }))
}

/// One script on one device. Times are epoch seconds, 0 when unset.
#[derive(ToSchema)]
#[schema(as = Activity)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct ActivityDocument {
    id: i64,
    device_guid: Uuid,
    hostname: String,
    site_id: Option<i64>,
    script_name: String,
    script_path: String,
    script_type: String,
    ran_at: i64,
    /// `Queued`, `Running`, `Success`, `Warning`, `Failed`, `Expired`, `Timed Out` or `Skipped`.
    status: String,
    error: Option<String>,
    exit_code: Option<i32>,
    /// Of a single activity only.
    stdout: Option<String>,
    /// Of a single activity only.
    stderr: Option<String>,
    /// In lists only.
    has_stdout: Option<bool>,
    /// In lists only.
    has_stderr: Option<bool>,
    queue_lane: String,
    activity_kind: String,
    metadata: Value,
    started_at: i64,
    updated_at: i64,
    finished_at: i64,
    scheduled_job_name: String,
    scheduled_job_kind: String,
}

/// Which part of a history to read.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct HistoryQuery {
    /// Only activities with a smaller id, newest first.
    before_id: Option<i64>,
    /// At most this many: 1 to 500, which is the default.
    limit: Option<i64>,
}

/// What ran on a device: what has not ended first, then the newest.
#[derive(Debug, Serialize, ToSchema)]
struct History {
    #[schema(value_type = Vec<ActivityDocument>)]
    history: Vec<ActivityView>,
    /// The `before_id` of the next page; null on the last.
    next_before_id: Option<i64>,
}

/// The device, or these routes' spelling of its absence.
fn named(device: Result<TargetDevice>) -> Result<Found> {
    device.map(|TargetDevice(device)| device).map_err(|ApiError(error)| ApiError(activity::as_contract(error)))
}

/// The activity history of a device, by hostname or GUID.
#[utoipa::path(get, path = "/api/device/activity/{hostname}", tag = "Assemblies", params(("hostname" = String, Path), HistoryQuery),
    responses(
        (status = 200, body = History),
        (status = 400, description = "`invalid_query`, `invalid_limit`"),
        (status = 404, description = "`Not found`"),
        (status = 409, description = "`ambiguous_hostname` with `guids` and `candidates`"),
    ))]
async fn history(
    State(app): State<App>,
    operator: Operator,
    device: Result<TargetDevice>,
    Params(query): Params<HistoryQuery>,
) -> Result<Json<History>> {
    let device = named(device)?;
    let limit = query.limit.unwrap_or(activity::HISTORY_MAX);
    if !(1..=activity::HISTORY_MAX).contains(&limit) {
        return Err(Error::field("invalid_limit", "limit", format!("must be between 1 and {}", activity::HISTORY_MAX)).into());
    }
    let mut conn = app.pool.acquire().await?;
    let history = activity::history(&mut conn, &operator.scope, device.guid, query.before_id, limit).await?;
    let full = i64::try_from(history.len()).is_ok_and(|count| count == limit);
    let next_before_id = full.then(|| next_before_id(&history, query.before_id.is_none())).flatten();
    Ok(Json(History { history, next_before_id }))
}

/// Where the next page begins. The first page also has old activities that have not ended, which do not count.
fn next_before_id(page: &[ActivityView], first: bool) -> Option<i64> {
    let active = |row: &&ActivityView| matches!(row.status.as_str(), "Queued" | "Running");
    let ended = page.iter().filter(|row| !first || !active(row)).map(|row| row.id).min();
    ended.or_else(|| page.iter().map(|row| row.id).max().map(|id| id + 1))
}

/// Done.
#[derive(Debug, Serialize, ToSchema)]
struct ActivityCleared {
    /// `ok`.
    status: &'static str,
    /// How many activities.
    cleared: u64,
}

/// Clear the activity history of a device, except what has not ended.
#[utoipa::path(delete, path = "/api/device/activity/{hostname}", tag = "Assemblies", params(("hostname" = String, Path)),
    responses(
        (status = 200, body = ActivityCleared),
        (status = 404, description = "`Not found`"),
        (status = 409, description = "`ambiguous_hostname` with `guids` and `candidates`"),
    ))]
async fn clear(State(app): State<App>, operator: Operator, device: Result<TargetDevice>) -> Result<Json<ActivityCleared>> {
    let device = named(device)?;
    let mut tx = app.pool.begin().await?;
    let cleared = activity::clear(&mut tx, &operator.scope, &operator.actor, &device).await?;
    tx.commit().await?;
    let change = json!({"hostname": device.hostname, "device_guid": device.guid, "change": "cleared", "source": "operator"});
    app.hub.to_site(device.site_id, ToOperator::DeviceActivity, change).await;
    Ok(Json(ActivityCleared { status: "ok", cleared }))
}

/// One activity with its output.
#[utoipa::path(get, path = "/api/device/activity/job/{job_id}", tag = "Assemblies", params(("job_id" = i64, Path)),
    responses((status = 200, body = ActivityDocument), (status = 404, description = "`Not found`")))]
async fn one(State(app): State<App>, operator: Operator, Path(job_id): Path<i64>) -> Result<Json<ActivityView>> {
    Ok(Json(activity::one(&mut *app.pool.acquire().await?, &operator.scope, job_id).await?))
}
