//! The events of a workflow run: read at once, or followed as a stream.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse, Response, Sse, sse},
};
use borealis_engine::{Error, Kind, Secret};
use borealis_workflows::runs;
use chrono::{DateTime, Utc};
use futures::Stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use super::runs::run_id;
use crate::{
    access::{
        Operator, Permission, Routes,
        client::{self, Carrier},
        operator,
    },
    body::{Params, Path},
    errors::{ApiError, Result},
    event_streams::{Followed, Word},
    state::App,
};

/// How often an open stream looks although it has heard of nothing new, so that it ends with the caller's right to see the run.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// How long a stream waits that found the database away.
const AWAY: Duration = Duration::from_secs(2);
/// How often a stream that has nothing to tell says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Tells nginx to pass a stream on as it comes.
const UNBUFFERED: (HeaderName, &str) = (HeaderName::from_static("x-accel-buffering"), "no");

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).operator(Permission::JobsRead, routes!(events))
}

/// A transition of a run.
#[derive(Debug, Serialize, ToSchema)]
struct RunEvent {
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

impl From<runs::EventView> for RunEvent {
    fn from(event: runs::EventView) -> Self {
        let runs::EventView { seq, at, kind, step, attempt, worker, detail } = event;
        Self { seq, at, kind, step, attempt, worker, detail }
    }
}

/// The events of a run.
#[derive(Debug, Serialize, ToSchema)]
struct RunEvents {
    events: Vec<RunEvent>,
}

/// Which events to read.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct EventsQuery {
    /// Only events after this number.
    after: Option<i32>,
}

/// The events of a run, oldest first.
///
/// At most 1,000 at a time: as JSON, or with `Accept: text/event-stream` as a stream of events called `run`, each with its number as
/// `id`, that ends with the run and resumes after `Last-Event-ID`.
#[utoipa::path(get, path = "/api/runs/{id}/events", tag = "Runs",
    params(("id" = Uuid, Path), EventsQuery, ("Last-Event-ID" = Option<i32>, Header, description = "Of a stream: only events after this number")),
    responses(
        (status = 200, description = "The events; or the stream of them", content((RunEvents = "application/json"), (String = "text/event-stream"))),
        (status = 204, description = "Of a stream: the run has ended, and there is nothing after that event"),
        (status = 400, description = "`invalid_query`"),
        (status = 404, description = "`not found`"),
        (status = 429, description = "`too_many_streams`"),
    ))]
async fn events(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<String>,
    Params(query): Params<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response> {
    let id = run_id(&id)?;
    let mut conn = app.pool.acquire().await?;
    let run = runs::get(&mut conn, &operator.scope, id).await?;
    let resumed = headers.get("last-event-id").and_then(|value| value.to_str().ok()).and_then(|value| value.trim().parse().ok());
    let streams = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    let after = resumed.filter(|_| streams).or(query.after).unwrap_or(0);
    let events = runs::events(&mut conn, id, after).await?;
    drop(conn);
    if !streams {
        return Ok(Json(RunEvents { events: events.into_iter().map(RunEvent::from).collect() }).into_response());
    }
    if run.finished_at.is_some() && events.is_empty() {
        // A browser that is answered anything else comes again every few seconds.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let followed = app.streams.follow(id, operator.user_id, operator.credential()).ok_or_else(|| {
        Error::new(Kind::Limited, "too_many_streams", "Too many event streams are open; try again.").retry_after(5)
    })?;
    let (token, carrier) = client::session_token(&headers).unwrap_or(("", Carrier::Bearer));
    let watcher = Watcher { token: Secret::new(token.to_owned()), carrier, ip: operator.actor.ip };
    let cursor =
        Cursor { app, watcher, followed, id, after, heard: Word::default(), due: true, waiting: VecDeque::new(), ended: false };
    let stream = Sse::new(stream(cursor)).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE));
    Ok(([UNBUFFERED], stream).into_response())
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
    followed: Followed,
    id: Uuid,
    after: i32,
    /// The word that was last acted on.
    heard: Word,
    /// There is to be a look, whatever was heard.
    due: bool,
    waiting: VecDeque<RunEvent>,
    ended: bool,
}

fn stream(cursor: Cursor) -> impl Stream<Item = Result<sse::Event, Infallible>> {
    futures::stream::unfold(cursor, |mut cursor| async move {
        loop {
            if let Some(event) = cursor.waiting.pop_front() {
                let sent = sse::Event::default().id(event.seq.to_string()).event("run").json_data(&event).unwrap_or_default();
                return Some((Ok(sent), cursor));
            }
            if cursor.ended {
                return None;
            }
            let word = cursor.followed.word();
            if word.revoked {
                return None;
            }
            if !cursor.due && word == cursor.heard {
                cursor.due = tokio::time::timeout(LOOK_AGAIN, cursor.followed.news()).await.is_err();
                continue;
            }
            match news(&cursor).await {
                // The run's state is read before its events, so an ended run has all of them here.
                Ok((ended, events)) => {
                    cursor.heard = word;
                    cursor.ended = ended && events.is_empty();
                    // There may be more than are read at once.
                    cursor.due = !events.is_empty();
                    cursor.after = events.last().map_or(cursor.after, |event| event.seq);
                    cursor.waiting.extend(events);
                }
                // The database is away: the client keeps its place and goes on when it is back.
                Err(ApiError(error)) if error.kind == Kind::Unavailable => tokio::time::sleep(AWAY).await,
                Err(_) => return None,
            }
        }
    })
}

/// Reads what is new, with the operator's rights as they are now.
async fn news(cursor: &Cursor) -> Result<(bool, Vec<RunEvent>)> {
    let Watcher { token, carrier, ip } = &cursor.watcher;
    let operator = operator::find(&cursor.app, token.expose(), *carrier, ip.clone()).await?;
    let operator = operator.ok_or_else(|| Error::new(Kind::Unauthenticated, "unauthorized", "The session has ended."))?;
    let mut conn = cursor.app.pool.acquire().await?;
    let run = runs::get(&mut conn, &operator.scope, cursor.id).await?;
    let events = runs::events(&mut conn, cursor.id, cursor.after).await?;
    Ok((run.finished_at.is_some(), events.into_iter().map(RunEvent::from).collect()))
}
