//! Workflow runs: every run of every workflow can be listed, cancelled and retried. Their events are in `run_events.rs`.

use axum::{Json, extract::State};
use borealis_engine::{Error, audit};
use borealis_workflows::{CancelAsked, jobs, runs};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{Operator, Permission, Routes},
    body::{OptionalJson, Params, Path},
    errors::Result,
    page::Limit,
    state::App,
};

/// How many runs a page holds when the caller does not say.
const PAGE_DEFAULT: i64 = 50;

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::JobsRead, routes!(list))
        .operator(Permission::JobsRead, routes!(get))
        .operator(Permission::JobsLaunch, routes!(cancel))
        .operator(Permission::JobsLaunch, routes!(retry))
}

/// A workflow run.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Run {
    id: Uuid,
    workflow: String,
    version: i32,
    /// `pending`, `running`, `waiting`, `cancelling`, `succeeded`, `failed` or `cancelled`.
    state: String,
    step: String,
    attempt: i32,
    scheduled_job_id: Option<i64>,
    parent_id: Option<Uuid>,
    site_ids: Vec<i64>,
    created_at: DateTime<Utc>,
    started_at: Option<DateTime<Utc>>,
    finished_at: Option<DateTime<Utc>>,
    error: Option<String>,
    /// Why a cancel was asked for.
    cancel_reason: Option<String>,
    /// What the run ended with.
    output: Option<Value>,
}

impl From<runs::RunView> for Run {
    fn from(run: runs::RunView) -> Self {
        Self {
            id: run.id,
            workflow: run.workflow,
            version: run.version,
            state: run.state,
            step: run.step,
            attempt: run.attempt,
            scheduled_job_id: run.scheduled_job_id,
            parent_id: run.parent_id,
            site_ids: run.site_ids,
            created_at: run.created_at,
            started_at: run.started_at,
            finished_at: run.finished_at,
            error: run.error,
            cancel_reason: run.cancel_reason,
            output: run.output,
        }
    }
}

/// Which runs to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only runs of this workflow.
    workflow: Option<String>,
    /// Only runs in this state.
    state: Option<String>,
    /// Only runs of this scheduled job.
    job_id: Option<i64>,
    /// At most this many: 1 to 200, 50 by default.
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<Uuid>,
}

/// A page of runs, newest first.
#[derive(Debug, Serialize, ToSchema)]
struct Page {
    runs: Vec<Run>,
    /// Where the next page begins; null on the last.
    next_cursor: Option<Uuid>,
}

/// List workflow runs in your sites.
#[utoipa::path(get, path = "/api/runs", tag = "Runs", params(ListQuery),
    responses((status = 200, body = Page), (status = 400, description = "`invalid_query`, `invalid_state`, `invalid_limit`")))]
async fn list(State(app): State<App>, operator: Operator, Params(query): Params<ListQuery>) -> Result<Json<Page>> {
    if let Some(state) = query.state.as_deref().filter(|state| !runs::STATES.contains(state)) {
        let known = runs::STATES.join(", ");
        return Err(Error::field("invalid_state", "state", format!("{state:?} is not one of {known}")).into());
    }
    let limit = Limit::new(query.limit, PAGE_DEFAULT, runs::PAGE_MAX)?;
    let filter = runs::Filter {
        workflow: query.workflow,
        state: query.state,
        job_id: query.job_id,
        after: query.cursor,
        limit: limit.and_one(),
    };
    let mut runs = runs::list(&app.pool, &operator.scope, &filter).await?;
    let next_cursor = limit.cut(&mut runs).map(|run| run.id);
    Ok(Json(Page { runs: runs.into_iter().map(Run::from).collect(), next_cursor }))
}

/// One workflow run.
#[utoipa::path(get, path = "/api/runs/{id}", tag = "Runs", params(("id" = Uuid, Path)),
    responses((status = 200, body = Run), (status = 404, description = "`not found`")))]
async fn get(State(app): State<App>, operator: Operator, Path(id): Path<String>) -> Result<Json<Run>> {
    let mut conn = app.pool.acquire().await?;
    Ok(Json(runs::get(&mut conn, &operator.scope, run_id(&id)?).await?.into()))
}

/// Why a run is to be cancelled.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct CancelBody {
    /// Shown on the run; `cancelled_by_operator` by default.
    reason: Option<String>,
}

/// The answer to a cancel or a retry.
#[derive(Debug, Serialize, ToSchema)]
struct Accepted {
    /// `cancelling`, `already_cancelling` or `queued`.
    status: &'static str,
    run: Run,
}

/// Cancel a run: its cancel step runs instead of the next one.
#[utoipa::path(post, path = "/api/runs/{id}/cancel", tag = "Runs", params(("id" = Uuid, Path)), request_body = CancelBody,
    responses((status = 200, body = Accepted), (status = 404, description = "`not found`"), (status = 409, description = "`run_already_finished`")))]
async fn cancel(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<String>,
    OptionalJson(body): OptionalJson<CancelBody>,
) -> Result<Json<Accepted>> {
    let id = run_id(&id)?;
    let reason = body.reason.as_deref().map_or("cancelled_by_operator", str::trim);
    if reason.is_empty() || reason.len() > 200 {
        return Err(Error::field("invalid_reason", "reason", "must have 1 to 200 characters").into());
    }
    let mut tx = app.pool.begin().await?;
    runs::get(&mut tx, &operator.scope, id).await?;
    let status = match borealis_workflows::request_cancel(&mut tx, id, reason).await? {
        CancelAsked::Cancelling => "cancelling",
        CancelAsked::Already => "already_cancelling",
        CancelAsked::Ended => return Err(Error::conflict("run_already_finished", "The run has ended already.").into()),
        CancelAsked::Unknown => return Err(Error::not_found().into()),
    };
    record(&mut tx, &operator, "workflow_run.cancel", id, serde_json::json!({ "reason": reason })).await?;
    let run = runs::get(&mut tx, &operator.scope, id).await?.into();
    tx.commit().await?;
    Ok(Json(Accepted { status, run }))
}

/// Let a failed run try its failed step again. The run of a scheduled job's occurrence that has ended is retried by a new run for the
/// targets that did not end well; that one is answered.
#[utoipa::path(post, path = "/api/runs/{id}/retry", tag = "Runs", params(("id" = Uuid, Path)),
    responses((status = 200, body = Accepted), (status = 404, description = "`not found`"), (status = 409, description = "`run_not_failed`; for a job `job_disabled`, `occurrence_in_progress`, `nothing_to_retry`")))]
async fn retry(State(app): State<App>, operator: Operator, Path(id): Path<String>) -> Result<Json<Accepted>> {
    let id = run_id(&id)?;
    let mut tx = app.pool.begin().await?;
    let goes_on = jobs::retry_run(&mut tx, operator.caller(&app), id).await?;
    let run = runs::get(&mut tx, &operator.scope, goes_on).await?.into();
    tx.commit().await?;
    Ok(Json(Accepted { status: "queued", run }))
}

async fn record(tx: &mut borealis_engine::db::Tx<'_>, operator: &Operator, action: &str, id: Uuid, detail: Value) -> Result<()> {
    let entry =
        audit::Entry { action, object_kind: "workflow_run", object_id: id.to_string(), detail, ..audit::Entry::default() };
    audit::record(tx, &operator.actor, entry).await?;
    Ok(())
}

/// A run id from a path; what is no UUID is no run.
pub(super) fn run_id(text: &str) -> Result<Uuid> {
    Ok(Uuid::parse_str(text).map_err(|_| Error::not_found())?)
}
