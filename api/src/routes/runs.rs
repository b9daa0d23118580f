//! Workflow runs: every run of every workflow can be listed, watched, cancelled and retried.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response, Sse, sse},
};
use borealis_engine::{Error, Kind, Secret, audit};
use borealis_workflows::{CancelAsked, runs};
use chrono::{DateTime, Utc};
use futures::Stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use crate::{
    access::{
        Area, Operator, Routes,
        client::{self, Carrier},
        operator,
    },
    body::{OptionalJson, Params, Path},
    errors::{ApiError, Result},
    state::App,
};

/// How often an open event stream looks for news.
const STREAM_EVERY: Duration = Duration::from_millis(400);
/// Open event streams of one API process; each looks for news on its own.
static STREAMS: Semaphore = Semaphore::const_new(512);
/// How many of them one user has, with all sessions and API tokens.
static STREAMS_OF: Mutex<BTreeMap<i64, u32>> = Mutex::new(BTreeMap::new());
/// The most of them that one user may have.
const STREAMS_OF_ONE: u32 = 32;
/// How many runs a page holds when the caller does not say.
const PAGE_DEFAULT: i64 = 50;

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .area(Area::Jobs)
        .operator(routes!(list))
        .operator(routes!(get))
        .operator(routes!(events))
        .operator(routes!(cancel))
        .operator(routes!(retry))
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
#[serde(deny_unknown_fields)]
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
    let limit = query.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=runs::PAGE_MAX).contains(&limit) {
        return Err(Error::field("invalid_limit", "limit", format!("must be between 1 and {}", runs::PAGE_MAX)).into());
    }
    let filter = runs::Filter { workflow: query.workflow, state: query.state, job_id: query.job_id, after: query.cursor, limit };
    let runs: Vec<Run> = runs::list(&app.pool, &operator.scope, &filter).await?.into_iter().map(Run::from).collect();
    let full = i64::try_from(runs.len()).is_ok_and(|count| count == limit);
    let next_cursor = runs.last().map(|run| run.id).filter(|_| full);
    Ok(Json(Page { runs, next_cursor }))
}

/// One workflow run.
#[utoipa::path(get, path = "/api/runs/{id}", tag = "Runs", params(("id" = Uuid, Path)),
    responses((status = 200, body = Run), (status = 404, description = "`not found`")))]
async fn get(State(app): State<App>, operator: Operator, Path(id): Path<String>) -> Result<Json<Run>> {
    let mut conn = app.pool.acquire().await?;
    Ok(Json(runs::get(&mut conn, &operator.scope, run_id(&id)?).await?.into()))
}

/// A transition of a run.
#[derive(Debug, Serialize, ToSchema)]
struct Event {
    /// Its number in the run, from 1.
    seq: i32,
    at: DateTime<Utc>,
    /// `created`, `step_started`, `step_committed`, `waiting`, `woken`, `retry_scheduled`, `worker_lost`, `released`,
    /// `cancel_requested`, `cancelling`, `retry_requested`, `succeeded`, `failed` or `cancelled`.
    kind: String,
    step: String,
    attempt: i32,
    worker: String,
    detail: Value,
}

impl From<runs::EventView> for Event {
    fn from(event: runs::EventView) -> Self {
        let runs::EventView { seq, at, kind, step, attempt, worker, detail } = event;
        Self { seq, at, kind, step, attempt, worker, detail }
    }
}

/// The events of a run.
#[derive(Debug, Serialize, ToSchema)]
struct Events {
    events: Vec<Event>,
}

/// Which events to read.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    /// Only events after this number.
    after: Option<i32>,
}

/// The events of a run, oldest first.
///
/// At most 1,000 at a time: as JSON, or with `Accept: text/event-stream` as a stream that ends with the run and resumes after
/// `Last-Event-ID`.
#[utoipa::path(get, path = "/api/runs/{id}/events", tag = "Runs", params(("id" = Uuid, Path), EventsQuery),
    responses((status = 200, body = Events), (status = 404, description = "`not found`")))]
async fn events(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<String>,
    Params(query): Params<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response> {
    let id = run_id(&id)?;
    let mut conn = app.pool.acquire().await?;
    runs::get(&mut conn, &operator.scope, id).await?;
    let resumed = headers.get("last-event-id").and_then(|value| value.to_str().ok()).and_then(|value| value.trim().parse().ok());
    let after = resumed.or(query.after).unwrap_or(0);
    let streams = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    if streams {
        drop(conn);
        let place = Place::take(operator.user_id).ok_or_else(|| {
            Error::new(Kind::Limited, "too_many_streams", "Too many event streams are open; try again.").retry_after(5)
        })?;
        let (token, carrier) = client::session_token(&headers).unwrap_or(("", Carrier::Bearer));
        let watcher = Watcher { token: Secret::new(token.to_owned()), carrier, ip: operator.actor.ip };
        let stream = stream(app.clone(), watcher, place, id, after);
        return Ok(Sse::new(stream).keep_alive(sse::KeepAlive::new().interval(Duration::from_secs(15))).into_response());
    }
    let events = runs::events(&mut conn, id, after).await?.into_iter().map(Event::from).collect();
    Ok(Json(Events { events }).into_response())
}

/// The place of one open stream, until it is dropped.
struct Place {
    user_id: i64,
    _of_all: SemaphorePermit<'static>,
}

impl Place {
    fn take(user_id: i64) -> Option<Self> {
        let of_all = STREAMS.try_acquire().ok()?;
        let mut streams = STREAMS_OF.lock().unwrap_or_else(PoisonError::into_inner);
        let count = streams.entry(user_id).or_default();
        if *count >= STREAMS_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Self { user_id, _of_all: of_all })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut streams = STREAMS_OF.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = streams.get_mut(&self.user_id) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.user_id);
            }
        }
    }
}

/// Who watches a stream: what their request came with.
struct Watcher {
    token: Secret<String>,
    carrier: Carrier,
    ip: String,
}

/// Where a stream stands.
struct Cursor {
    app: App,
    watcher: Watcher,
    /// Given back when the stream ends.
    _place: Place,
    id: Uuid,
    after: i32,
    waiting: std::collections::VecDeque<Event>,
    ended: bool,
}

fn stream(app: App, watcher: Watcher, place: Place, id: Uuid, after: i32) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    let cursor = Cursor { app, watcher, _place: place, id, after, waiting: std::collections::VecDeque::new(), ended: false };
    futures::stream::unfold(cursor, |mut cursor| async move {
        loop {
            if let Some(event) = cursor.waiting.pop_front() {
                let sent = sse::Event::default().id(event.seq.to_string()).event("run").json_data(&event).unwrap_or_default();
                return Some((Ok(sent), cursor));
            }
            if cursor.ended {
                return None;
            }
            match news(&cursor).await {
                // The run's state is read before its events, so an ended run has all of them here.
                Ok((ended, events)) => {
                    cursor.ended = ended && events.is_empty();
                    cursor.after = events.last().map_or(cursor.after, |event| event.seq);
                    let none = events.is_empty();
                    cursor.waiting.extend(events);
                    if none && !cursor.ended {
                        tokio::time::sleep(STREAM_EVERY).await;
                    }
                }
                // The database is away: the client keeps its place and goes on when it is back.
                Err(ApiError(error)) if error.kind == Kind::Unavailable => tokio::time::sleep(STREAM_EVERY * 5).await,
                Err(_) => return None,
            }
        }
    })
}

/// Reads what is new, with the operator's rights as they are now.
async fn news(cursor: &Cursor) -> Result<(bool, Vec<Event>)> {
    let Watcher { token, carrier, ip } = &cursor.watcher;
    let operator = operator::find(&cursor.app, token.expose(), *carrier, ip.clone()).await?;
    let operator = operator.ok_or_else(|| Error::new(Kind::Unauthenticated, "unauthorized", "The session has ended."))?;
    let mut conn = cursor.app.pool.acquire().await?;
    let run = runs::get(&mut conn, &operator.scope, cursor.id).await?;
    let events = runs::events(&mut conn, cursor.id, cursor.after).await?;
    Ok((run.finished_at.is_some(), events.into_iter().map(Event::from).collect()))
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

/// Let a failed run try its failed step again.
#[utoipa::path(post, path = "/api/runs/{id}/retry", tag = "Runs", params(("id" = Uuid, Path)),
    responses((status = 200, body = Accepted), (status = 404, description = "`not found`"), (status = 409, description = "`run_not_failed`")))]
async fn retry(State(app): State<App>, operator: Operator, Path(id): Path<String>) -> Result<Json<Accepted>> {
    let id = run_id(&id)?;
    let mut tx = app.pool.begin().await?;
    runs::get(&mut tx, &operator.scope, id).await?;
    borealis_workflows::retry(&mut tx, id, &operator.username).await?;
    record(&mut tx, &operator, "workflow_run.retry", id, Value::Null).await?;
    let run = runs::get(&mut tx, &operator.scope, id).await?.into();
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
fn run_id(text: &str) -> Result<Uuid> {
    Ok(Uuid::parse_str(text).map_err(|_| Error::not_found())?)
}
