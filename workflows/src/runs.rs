//! What operators read of workflow runs. A run is visible to those who may see every one of its sites; a run without sites
//! to administrators only.

use std::collections::BTreeMap;

use borealis_engine::{Error, Result, Scope, db::Pool};
use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

/// The states a run can be in, as in the CHECK of `workflow_runs.state`.
pub const STATES: [&str; 7] = ["pending", "running", "waiting", "cancelling", "succeeded", "failed", "cancelled"];
/// The most runs one page holds.
pub const PAGE_MAX: i64 = 200;
/// The most events one read returns.
pub const EVENTS_MAX: i64 = 1_000;

/// A run as lists show it.
#[derive(Debug, Clone)]
pub struct RunView {
    /// The run.
    pub id: Uuid,
    /// Its workflow's name.
    pub workflow: String,
    /// Its workflow's version.
    pub version: i32,
    /// One of [`STATES`].
    pub state: String,
    /// The step it is at.
    pub step: String,
    /// The try of that step.
    pub attempt: i32,
    /// The job it belongs to.
    pub scheduled_job_id: Option<i64>,
    /// The run that started it as a child.
    pub parent_id: Option<Uuid>,
    /// The sites it touches.
    pub site_ids: Vec<i64>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When its first step began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// Why it failed or was cancelled.
    pub error: Option<String>,
    /// Why a cancel was asked for, while it is not done.
    pub cancel_reason: Option<String>,
    /// What it ended with.
    pub output: Option<Value>,
}

/// Which runs a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this workflow.
    pub workflow: Option<String>,
    /// In this state.
    pub state: Option<String>,
    /// Of this job.
    pub job_id: Option<i64>,
    /// After this one, in the order of the list (newest first).
    pub after: Option<Uuid>,
    /// At most this many.
    pub limit: i64,
}

/// Lists runs, newest first. Run ids grow with time, so the id is the order and the cursor.
///
/// # Errors
/// When the database refuses.
pub async fn list(pool: &Pool, scope: &Scope, filter: &Filter) -> Result<Vec<RunView>> {
    Ok(sqlx::query_as!(
        RunView,
        r#"SELECT id, workflow, version, state, step, attempt, owner_id AS scheduled_job_id, parent_id, scope_ids AS site_ids, created_at, started_at, finished_at,
                  error, cancel_reason, output
           FROM workflow_runs
           WHERE ($1::bigint[] IS NULL OR (scope_ids <> '{}' AND scope_ids <@ $1))
             AND ($2::text IS NULL OR workflow = $2) AND ($3::text IS NULL OR state = $3)
             AND ($4::bigint IS NULL OR owner_id = $4) AND ($5::uuid IS NULL OR id < $5)
           ORDER BY id DESC LIMIT $6"#,
        scope.site_ids(),
        filter.workflow,
        filter.state,
        filter.job_id,
        filter.after,
        filter.limit,
    )
    .fetch_all(pool)
    .await?)
}

/// One run.
///
/// # Errors
/// 404 when there is none in scope.
pub async fn get(conn: &mut PgConnection, scope: &Scope, id: Uuid) -> Result<RunView> {
    sqlx::query_as!(
        RunView,
        r#"SELECT id, workflow, version, state, step, attempt, owner_id AS scheduled_job_id, parent_id, scope_ids AS site_ids, created_at, started_at, finished_at,
                  error, cancel_reason, output
           FROM workflow_runs WHERE id = $1 AND ($2::bigint[] IS NULL OR (scope_ids <> '{}' AND scope_ids <@ $2))"#,
        id,
        scope.site_ids(),
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)
}

/// How far runs are: the number of the last event of each, and whether it has ended. Runs that are gone are left out.
///
/// # Errors
/// When the database refuses.
pub async fn progress(pool: &Pool, ids: &[Uuid]) -> Result<BTreeMap<Uuid, (i32, bool)>> {
    let rows =
        sqlx::query!(r#"SELECT id, event_seq, finished_at IS NOT NULL AS "ended!" FROM workflow_runs WHERE id = ANY($1)"#, ids)
            .fetch_all(pool)
            .await?;
    Ok(rows.into_iter().map(|row| (row.id, (row.event_seq, row.ended))).collect())
}

/// One transition of a run.
#[derive(Debug, Clone)]
pub struct EventView {
    /// Its number in the run, from 1.
    pub seq: i32,
    /// When.
    pub at: DateTime<Utc>,
    /// `created`, `step_started`, `step_committed`, `waiting`, `woken`, `retry_scheduled`, `worker_lost`, `released`,
    /// `cancel_requested`, `cancelling`, `retry_requested`, `succeeded`, `failed`, `cancelled`.
    pub kind: String,
    /// The step.
    pub step: String,
    /// The try of the step.
    pub attempt: i32,
    /// The worker process, where one was at it.
    pub worker: String,
    /// The cause, and what belongs to it.
    pub detail: Value,
}

/// The events of a run after number `after`, oldest first, at most [`EVENTS_MAX`]. The run's scope is the caller's to check.
///
/// # Errors
/// When the database refuses.
pub async fn events(conn: &mut PgConnection, id: Uuid, after: i32) -> Result<Vec<EventView>> {
    Ok(sqlx::query_as!(
        EventView,
        "SELECT seq, at, kind, step, attempt, worker, detail FROM workflow_events WHERE run_id = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        id,
        after,
        EVENTS_MAX,
    )
    .fetch_all(conn)
    .await?)
}
