//! Scheduled jobs.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use borealis_engine::{
    Error,
    db::{self, Tx},
    idempotency::{self, Claim},
    jobs::{
        schedule::{PREVIEW_MAX, Schedule, ScheduleInput},
        spec::JobBody,
        store,
        view::{self, DeviceResult, JobFilter, JobView, RunView},
    },
};
use borealis_workflows::jobs::{self, Which};
use chrono::SecondsFormat;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Change, OptionalJson, Params, Path, SentBack},
    errors::{ApiError, Result},
    page::Limit,
    state::App,
};

/// How many instants a preview shows when the caller does not say.
const PREVIEW_DEFAULT: i64 = 5;
/// How far back a list of runs looks when the caller does not say, in days.
const DAYS_DEFAULT: i32 = 30;
/// The furthest back a list of runs looks, in days.
const DAYS_MAX: i32 = 3_660;

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::JobsRead, routes!(list))
        .operator(Permission::JobsEdit, routes!(create))
        .operator(Permission::JobsRead, routes!(preview))
        .operator(Permission::JobsRead, routes!(get))
        .operator(Permission::JobsEdit, routes!(update, delete))
        .operator(Permission::JobsEdit, routes!(toggle))
        .operator(Permission::JobsLaunch, routes!(rerun))
        .operator(Permission::JobsLaunch, routes!(retry_failed))
        .operator(Permission::JobsRead, routes!(runs))
        .operator(Permission::JobsEdit, routes!(clear_runs))
        .operator(Permission::JobsLaunch, routes!(cancel_run))
        .operator(Permission::JobsRead, routes!(devices))
}

/// A schedule. `start` and `end` are epoch seconds or ISO 8601 text; text without an offset is wall time in `timezone`.
#[derive(ToSchema)]
#[schema(as = JobSchedule)]
#[expect(dead_code, reason = "the shape of a body, for the OpenAPI document")]
struct ScheduleDocument {
    /// `immediately`, `once`, `every_5_minutes`, `every_10_minutes`, `every_15_minutes`, `every_30_minutes`, `every_hour`,
    /// `daily`, `weekly`, `monthly`, `yearly` or `cron`; `immediately` by default.
    r#type: Option<String>,
    /// The anchor; needed by every type but `immediately` and `cron`.
    start: Option<Value>,
    /// IANA name; `UTC` by default.
    timezone: Option<String>,
    /// 5 fields, or 6 with seconds first, with their Unix meaning.
    cron: Option<String>,
    /// No occurrence after this instant.
    end: Option<Value>,
    /// No more occurrences than this.
    max_occurrences: Option<i64>,
}

/// A job to be made; an update takes any subset.
#[derive(ToSchema)]
#[schema(as = ScheduledJobBody)]
#[expect(dead_code, reason = "the shape of a body, for the OpenAPI document")]
struct JobDocument {
    /// 1 to 200 characters.
    name: String,
    /// Script components: `{assembly_guid | path, name, variable_values{}}`.
    components: Vec<Value>,
    /// Hostnames or GUIDs, `{kind: "device", device_guid | hostname, site_id}`, or `{kind: "all_devices"}`.
    targets: Vec<Value>,
    /// `automation`.
    job_kind: Option<String>,
    schedule: Option<ScheduleDocument>,
    /// `schedule.type`, flat; so are `start`, `timezone`, `cron`, `end` and `max_occurrences`.
    schedule_type: Option<String>,
    start: Option<Value>,
    timezone: Option<String>,
    cron: Option<String>,
    end: Option<Value>,
    max_occurrences: Option<i64>,
    /// `{stopAfterEnabled, expiration}`; the same as the next two.
    duration: Option<Value>,
    /// Whether a run that takes longer than `stop_after` (else `expiration`) is stopped.
    duration_stop_enabled: Option<bool>,
    /// How long a run waits for its device: `no_expire`, or a number with `m`, `h` or `d`. By default one period of the
    /// schedule, `no_expire` for one-shot jobs.
    expiration: Option<String>,
    /// How long a run may take, written like `expiration`.
    stop_after: Option<String>,
    /// `run_once`, `skip` or `run_all`.
    misfire_policy: Option<String>,
    /// `skip`, `queue` or `allow`.
    overlap_policy: Option<String>,
    /// `system` or `current_user`.
    execution_context: Option<String>,
    /// True by default.
    enabled: Option<bool>,
}

/// How many targets of the latest occurrence stand where.
#[derive(ToSchema)]
#[schema(as = ResultCounts)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct CountsDocument {
    pending: i64,
    running: i64,
    success: i64,
    warning: i64,
    failed: i64,
    expired: i64,
    timed_out: i64,
    skipped: i64,
    total_targets: i64,
}

/// A scheduled job. Times are epoch seconds.
#[derive(ToSchema)]
#[schema(as = ScheduledJob)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct JobViewDocument {
    id: i64,
    name: String,
    job_kind: String,
    components: Vec<Value>,
    targets: Vec<Value>,
    schedule: ScheduleDocument,
    schedule_type: String,
    start_ts: Option<i64>,
    timezone: String,
    cron: Option<String>,
    end_ts: Option<i64>,
    max_occurrences: Option<i64>,
    /// How many occurrences the schedule has used up.
    occurrences_used: i64,
    misfire_policy: String,
    overlap_policy: String,
    duration_stop_enabled: bool,
    expiration: String,
    stop_after: Option<String>,
    execution_context: String,
    credential_id: Option<i64>,
    use_service_account: bool,
    enabled: bool,
    created_at: i64,
    updated_at: i64,
    last_run_ts: Option<i64>,
    latest_occurrence: Option<i64>,
    /// The worst status of the latest occurrence; `Scheduled` or empty before the first.
    last_status: String,
    /// Null while disabled.
    next_run_ts: Option<i64>,
    result_counts: CountsDocument,
    warning_code: String,
    warning_message: String,
}

/// One target of one occurrence.
#[derive(ToSchema)]
#[schema(as = ScheduledJobRun)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct RunDocument {
    id: i64,
    job_id: i64,
    scheduled_ts: i64,
    started_ts: Option<i64>,
    finished_ts: Option<i64>,
    /// `Pending`, `Running`, `Success`, `Warning`, `Failed`, `Expired`, `Timed Out` or `Skipped`.
    status: String,
    error: Option<String>,
    /// `overlap`, `misfire`, `no_devices_targeted`, `disabled` or `maintenance_window`.
    skip_reason: Option<String>,
    /// `schedule`, `catch_up`, `rerun` or `retry`.
    cause: String,
    device_guid: Option<uuid::Uuid>,
    target_hostname: Option<String>,
    site_id: Option<i64>,
    shared_execution: bool,
    component_index: Option<i32>,
    component_kind: String,
    component_name: String,
    workflow_run_id: Option<uuid::Uuid>,
    cancel_requested: bool,
}

/// How one device fared in one occurrence.
#[derive(ToSchema)]
#[schema(as = ScheduledJobDevice)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct DeviceDocument {
    run_id: Option<i64>,
    device_guid: Option<uuid::Uuid>,
    hostname: String,
    online: bool,
    site_id: Option<i64>,
    site_name: String,
    site: String,
    inventory_hostname: String,
    wireguard_peer_ip: String,
    resolved_connection: String,
    resolution_status: String,
    resolution_reason: String,
    ran_on: Option<i64>,
    job_status: String,
    error: Option<String>,
    has_stdout: bool,
    has_stderr: bool,
    /// `{activity_id, component_kind, script_type, component_path, component_name, has_stdout, has_stderr}` each.
    activities: Vec<Value>,
}

/// Which jobs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only jobs of exactly this name. Names need not be unique.
    name: Option<String>,
    /// Only jobs that reach this site; what is no positive number is no filter.
    site: Option<String>,
    /// The same.
    site_id: Option<String>,
    /// At most this many: 1 to 1,000, which is the default.
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<i64>,
}

/// A page of jobs, newest first.
#[derive(Debug, Serialize, ToSchema)]
struct JobList {
    #[schema(value_type = Vec<JobViewDocument>)]
    jobs: Vec<JobView>,
    /// Where the next page begins; null on the last.
    next_cursor: Option<i64>,
}

/// A job.
#[derive(Debug, Serialize, ToSchema)]
struct OneJob {
    #[schema(value_type = JobViewDocument)]
    job: JobView,
}

/// List the scheduled jobs whose every target is in your sites.
#[utoipa::path(get, path = "/api/scheduled_jobs", tag = "Scheduled Jobs", params(ListQuery),
    responses((status = 200, body = JobList), (status = 400, description = "`invalid_query`, `invalid_limit`")))]
async fn list(State(app): State<App>, operator: Operator, Params(query): Params<ListQuery>) -> Result<Json<JobList>> {
    let limit = Limit::new(query.limit, view::JOBS_MAX, view::JOBS_MAX)?;
    let site_id = query.site_id.or(query.site).and_then(|text| text.trim().parse().ok()).filter(|site| *site > 0);
    let filter =
        JobFilter { name: query.name.map(|name| name.replace('\0', "")), site_id, before: query.cursor, ..JobFilter::default() };
    let mut jobs = view::jobs(&mut *db::begin_wide(&app.pool).await?, &operator.scope, filter, limit.and_one()).await?;
    let next_cursor = limit.cut(&mut jobs).map(|job| job.id);
    Ok(Json(JobList { jobs, next_cursor }))
}

/// Make a scheduled job. With an `Idempotency-Key`, the same request within 24 hours makes one job and gets one answer.
#[utoipa::path(post, path = "/api/scheduled_jobs", tag = "Scheduled Jobs", request_body = JobDocument,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 200, body = OneJob),
        (status = 400, description = "`invalid_json`, `name_and_components_required`, `targets_required`, `unknown_target`, `unknown_assembly`, `not_supported_yet`, `start_required`, `invalid_<field>`"),
        (status = 403, description = "`out_of_scope_targets`"),
        (status = 409, description = "`ambiguous_hostname`, `request_in_progress`"),
        (status = 422, description = "`idempotency_key_reused`"),
    ))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    headers: HeaderMap,
    body::Json(body): body::Json<Value>,
) -> Result<(StatusCode, Json<Value>)> {
    let mut tx = app.pool.begin().await?;
    let slot = match claim(&mut tx, &operator, &headers, "POST /api/scheduled_jobs", &body).await? {
        Claim::Replay(status, answer) => return replay(status, answer),
        Claim::Fresh(slot) => slot,
    };
    let body: JobBody = body::from_value(body)?;
    let id = store::create(&mut tx, operator.caller(&app), &body).await?;
    let answer = json!({"job": view::job(&mut tx, &operator.scope, id).await?});
    slot.keep(&mut tx, 200, &answer).await?;
    tx.commit().await?;
    Ok((StatusCode::OK, Json(answer)))
}

async fn claim(tx: &mut Tx<'_>, operator: &Operator, headers: &HeaderMap, operation: &str, body: &Value) -> Result<Claim> {
    let key = match headers.get("idempotency-key") {
        None => None,
        Some(value) => {
            Some(value.to_str().map_err(|_| Error::invalid("invalid_idempotency_key", "Idempotency-Key must be plain text."))?)
        }
    };
    Ok(idempotency::claim(tx, &format!("user:{}", operator.user_id), key, operation, body).await?)
}

fn replay(status: u16, answer: Value) -> Result<(StatusCode, Json<Value>)> {
    Ok((StatusCode::from_u16(status).map_err(|error| ApiError(Error::bug(error)))?, Json(answer)))
}

/// What to preview.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PreviewBody {
    #[schema(value_type = ScheduleDocument)]
    schedule: ScheduleInput,
    /// 1 to 100, 5 by default.
    count: Option<i64>,
}

/// An instant.
#[derive(Debug, Serialize, ToSchema)]
struct Instant {
    /// Epoch seconds.
    ts: i64,
    /// RFC 3339, UTC.
    iso: String,
}

/// The next instants.
#[derive(Debug, Serialize, ToSchema)]
struct Preview {
    occurrences: Vec<Instant>,
}

/// When a job with this schedule would run, were it made now.
#[utoipa::path(post, path = "/api/scheduled_jobs/preview", tag = "Scheduled Jobs", request_body = PreviewBody,
    responses(
        (status = 200, body = Preview),
        (status = 400, description = "`invalid_json`, `invalid_count`, `start_required`, `invalid_schedule_type`, `invalid_start`, `invalid_timezone`, `invalid_cron`, `invalid_end`, `invalid_max_occurrences`"),
    ))]
async fn preview(
    State(app): State<App>,
    _operator: Operator,
    body::Json(body): body::Json<PreviewBody>,
) -> Result<Json<Preview>> {
    let count = body.count.unwrap_or(PREVIEW_DEFAULT);
    let count = usize::try_from(count)
        .ok()
        .filter(|count| (1..=PREVIEW_MAX).contains(count))
        .ok_or_else(|| Error::field("invalid_count", "count", format!("must be a whole number from 1 to {PREVIEW_MAX}")))?;
    let now = store::now(&mut *app.pool.acquire().await?).await?;
    let schedule = Schedule::parse(&body.schedule, now)?;
    let occurrences = schedule
        .preview(now, count)
        .into_iter()
        .map(|at| Instant { ts: at.timestamp(), iso: at.to_rfc3339_opts(SecondsFormat::Secs, true) })
        .collect();
    Ok(Json(Preview { occurrences }))
}

/// One scheduled job.
#[utoipa::path(get, path = "/api/scheduled_jobs/{id}", tag = "Scheduled Jobs", params(("id" = i64, Path)),
    responses((status = 200, body = OneJob), (status = 404, description = "`not found`")))]
async fn get(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<OneJob>> {
    Ok(Json(OneJob { job: view::job(&mut *app.pool.acquire().await?, &operator.scope, id).await? }))
}

impl SentBack for JobBody {
    const READ_ONLY: &'static [&'static str] = &[
        "id",
        "start_ts",
        "end_ts",
        "occurrences_used",
        "created_at",
        "updated_at",
        "last_run_ts",
        "latest_occurrence",
        "last_status",
        "next_run_ts",
        "result_counts",
        "warning_code",
        "warning_message",
    ];
}

/// Change a scheduled job. What the body does not name stays; a schedule is replaced as a whole. The body may be a job as it was read: what
/// cannot be changed is not looked at.
#[utoipa::path(put, path = "/api/scheduled_jobs/{id}", tag = "Scheduled Jobs", params(("id" = i64, Path)), request_body = JobDocument,
    responses(
        (status = 200, body = OneJob),
        (status = 400, description = "`no_fields_to_update`, and those of making one"),
        (status = 403, description = "`out_of_scope_targets`"),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`ambiguous_hostname`"),
    ))]
async fn update(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    Change(body): Change<JobBody>,
) -> Result<Json<OneJob>> {
    let mut tx = app.pool.begin().await?;
    store::update(&mut tx, operator.caller(&app), id, &body).await?;
    let job = view::job(&mut tx, &operator.scope, id).await?;
    tx.commit().await?;
    Ok(Json(OneJob { job }))
}

/// Whether the job is to be on.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct ToggleBody {
    /// True by default.
    enabled: Option<bool>,
}

/// Switch a scheduled job on or off. What was due while it was off is not made up for.
#[utoipa::path(post, path = "/api/scheduled_jobs/{id}/toggle", tag = "Scheduled Jobs", params(("id" = i64, Path)), request_body = ToggleBody,
    responses((status = 200, body = OneJob), (status = 404, description = "`not found`")))]
async fn toggle(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    OptionalJson(body): OptionalJson<ToggleBody>,
) -> Result<Json<OneJob>> {
    let mut tx = app.pool.begin().await?;
    store::toggle(&mut tx, operator.caller(&app), id, body.enabled.unwrap_or(true)).await?;
    let job = view::job(&mut tx, &operator.scope, id).await?;
    tx.commit().await?;
    Ok(Json(OneJob { job }))
}

/// How to start it.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct StartBody {
    /// Start beside an occurrence that has not ended.
    allow_overlap: bool,
}

/// A started occurrence.
#[derive(Debug, Serialize, ToSchema)]
struct Started {
    /// `queued`.
    status: &'static str,
    /// Its instant, in epoch seconds.
    occurrence: i64,
    /// The ids of its runs.
    runs: Vec<i64>,
    #[schema(value_type = JobViewDocument)]
    job: JobView,
}

/// Run an enabled job now, on what its targets are now and you may see. The schedule goes on as before.
#[utoipa::path(post, path = "/api/scheduled_jobs/{id}/rerun", tag = "Scheduled Jobs", request_body = StartBody,
    params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 200, body = Started),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`job_disabled`, `occurrence_in_progress`, `request_in_progress`"),
        (status = 422, description = "`idempotency_key_reused`"),
    ))]
async fn rerun(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<StartBody>,
) -> Result<(StatusCode, Json<Value>)> {
    start(&app, &operator, id, &headers, &body, false).await
}

/// Run the targets of the latest occurrence again that did not end in Success.
#[utoipa::path(post, path = "/api/scheduled_jobs/{id}/retry_failed", tag = "Scheduled Jobs",
    params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 200, body = Started),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`job_disabled`, `occurrence_in_progress`, `nothing_to_retry`, `request_in_progress`"),
        (status = 422, description = "`idempotency_key_reused`"),
    ))]
async fn retry_failed(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<StartBody>,
) -> Result<(StatusCode, Json<Value>)> {
    start(&app, &operator, id, &headers, &body, true).await
}

async fn start(
    app: &App,
    operator: &Operator,
    id: i64,
    headers: &HeaderMap,
    body: &StartBody,
    retry: bool,
) -> Result<(StatusCode, Json<Value>)> {
    let mut tx = app.pool.begin().await?;
    let cause = if retry { "retry" } else { "rerun" };
    let operation = format!("POST /api/scheduled_jobs/{id}/{cause}");
    let slot = match claim(&mut tx, operator, headers, &operation, &json!(body)).await? {
        Claim::Replay(status, answer) => return replay(status, answer),
        Claim::Fresh(slot) => slot,
    };
    let which = if retry { Which::UnsuccessfulOfLatest } else { Which::All };
    let started = jobs::start_now(&mut tx, operator.caller(app), id, which, body.allow_overlap).await?;
    let (at, runs) = store::started(&mut tx, started.id).await?;
    let job = view::job(&mut tx, &operator.scope, id).await?;
    let answer = json!(Started { status: "queued", occurrence: at.timestamp(), runs, job });
    slot.keep(&mut tx, 200, &answer).await?;
    tx.commit().await?;
    Ok((StatusCode::OK, Json(answer)))
}

/// Done.
#[derive(Debug, Serialize, ToSchema)]
struct JobRemoved {
    /// `ok`.
    status: &'static str,
}

/// Remove a scheduled job with its runs. What is running is cancelled first.
#[utoipa::path(delete, path = "/api/scheduled_jobs/{id}", tag = "Scheduled Jobs", params(("id" = i64, Path)),
    responses((status = 200, body = JobRemoved), (status = 404, description = "`not found`")))]
async fn delete(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<JobRemoved>> {
    let mut tx = app.pool.begin().await?;
    let devices = jobs::delete(&mut tx, operator.caller(&app), id).await?;
    tx.commit().await?;
    app.hub.deliver(&devices).await;
    Ok(Json(JobRemoved { status: "ok" }))
}

/// Which runs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct RunsQuery {
    /// Only runs of this many days: 1 to 3,660, 30 by default.
    days: Option<i32>,
    /// At most this many: 1 to 500, which is the default.
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// A page of runs, newest first.
#[derive(Debug, Serialize, ToSchema)]
struct RunList {
    #[schema(value_type = Vec<RunDocument>)]
    runs: Vec<RunView>,
    /// Where the next page begins; null on the last.
    next_cursor: Option<String>,
}

/// The runs of a job.
#[utoipa::path(get, path = "/api/scheduled_jobs/{id}/runs", tag = "Scheduled Jobs", params(("id" = i64, Path), RunsQuery),
    responses(
        (status = 200, body = RunList),
        (status = 400, description = "`invalid_query`, `invalid_days`, `invalid_limit`, `invalid_cursor`"),
        (status = 404, description = "`not found`"),
    ))]
async fn runs(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    Params(query): Params<RunsQuery>,
) -> Result<Json<RunList>> {
    let days = query.days.unwrap_or(DAYS_DEFAULT);
    if !(1..=DAYS_MAX).contains(&days) {
        return Err(Error::field("invalid_days", "days", format!("must be between 1 and {DAYS_MAX}")).into());
    }
    let limit = Limit::new(query.limit, view::RUNS_MAX, view::RUNS_MAX)?;
    let after = query.cursor.as_deref().map(str::parse).transpose()?;
    let mut conn = app.pool.acquire().await?;
    view::job(&mut conn, &operator.scope, id).await?;
    let mut runs = view::runs(&mut conn, &operator.scope, id, days, after, limit.and_one()).await?;
    let next_cursor = limit.cut(&mut runs).map(RunView::cursor);
    Ok(Json(RunList { runs, next_cursor }))
}

/// What was cleared.
#[derive(Debug, Serialize, ToSchema)]
struct RunsCleared {
    /// `ok`.
    status: &'static str,
    /// How many runs.
    cleared: i64,
    /// The instant of the latest occurrence, which stays.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_occurrence: Option<i64>,
}

/// Clear the run history of a job, except its latest occurrence and what has not ended.
#[utoipa::path(delete, path = "/api/scheduled_jobs/{id}/runs", tag = "Scheduled Jobs", params(("id" = i64, Path)),
    responses((status = 200, body = RunsCleared), (status = 404, description = "`not found`")))]
async fn clear_runs(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<RunsCleared>> {
    let mut tx = app.pool.begin().await?;
    let (cleared, kept) = store::clear_runs(&mut tx, operator.caller(&app), id).await?;
    tx.commit().await?;
    Ok(Json(RunsCleared { status: "ok", cleared, kept_occurrence: kept.map(|at| at.timestamp()) }))
}

/// A cancel that was taken.
#[derive(Debug, Serialize, ToSchema)]
struct Cancelling {
    /// `cancelled` when the run has ended, `cancelling` while its device is asked.
    status: &'static str,
}

/// Cancel one run. What has not reached its device ends at once, as `Failed` with `cancelled_by_operator`; else the device
/// is asked to stop, and the run ends with its answer.
#[utoipa::path(post, path = "/api/scheduled_jobs/{id}/runs/{run_id}/cancel", tag = "Scheduled Jobs",
    params(("id" = i64, Path), ("run_id" = i64, Path)),
    responses(
        (status = 200, body = Cancelling),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`run_already_finished`"),
    ))]
async fn cancel_run(
    State(app): State<App>,
    operator: Operator,
    Path((id, run_id)): Path<(i64, i64)>,
) -> Result<Json<Cancelling>> {
    let mut tx = app.pool.begin().await?;
    view::job(&mut tx, &operator.scope, id).await?;
    let cancelled = jobs::cancel_run(&mut tx, operator.caller(&app), id, run_id).await?;
    tx.commit().await?;
    app.hub.deliver(&cancelled.devices).await;
    Ok(Json(Cancelling { status: if cancelled.ended.contains(&run_id) { "cancelled" } else { "cancelling" } }))
}

/// Which occurrence.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct DevicesQuery {
    /// Its instant, in epoch seconds; the latest by default.
    occurrence: Option<i64>,
}

/// The devices of an occurrence.
#[derive(Debug, Serialize, ToSchema)]
struct DeviceList {
    /// Its instant, in epoch seconds; null when the job never ran: then the devices are those it has now.
    occurrence: Option<i64>,
    #[schema(value_type = Vec<DeviceDocument>)]
    devices: Vec<DeviceResult>,
}

/// How each device fared.
#[utoipa::path(get, path = "/api/scheduled_jobs/{id}/devices", tag = "Scheduled Jobs", params(("id" = i64, Path), DevicesQuery),
    responses(
        (status = 200, body = DeviceList),
        (status = 400, description = "`invalid_query`"),
        (status = 404, description = "`not found`: no such job, or no such occurrence of it"),
    ))]
async fn devices(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    Params(query): Params<DevicesQuery>,
) -> Result<Json<DeviceList>> {
    let mut conn = app.pool.acquire().await?;
    let (occurrence, devices) = view::devices(&mut conn, &operator.scope, id, query.occurrence).await?;
    Ok(Json(DeviceList { occurrence, devices }))
}
