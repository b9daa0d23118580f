//! Starting, signalling, cancelling and retrying runs: plain functions over the caller's connection, so that each
//! happens exactly when the caller's transaction commits.

use apalis_core::task::builder::TaskBuilder;
use borealis_engine::{Error, Result};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::definition::Workflow;

/// A run to be started.
#[derive(Debug, Clone, Default)]
pub struct NewRun {
    /// What makes the start single, unique per workflow; none: every start is a new run.
    pub key: Option<String>,
    /// What the first step gets.
    pub input: Value,
    /// Higher is claimed first.
    pub priority: i32,
    /// The job this run belongs to, for lists.
    pub scheduled_job_id: Option<i64>,
    /// The sites whose operators may see the run; none: administrators only.
    pub site_ids: Vec<i64>,
    /// Keys whose number of running steps is bounded by `workflow_limits`.
    pub limit_keys: Vec<String>,
}

/// A started run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// The run: the new one, or the one that already had the key.
    pub run_id: Uuid,
    /// False when the key had been used: nothing was started.
    pub created: bool,
}

/// A run that has become ready and needs a hint in its queue.
#[derive(Debug, Clone)]
pub(super) struct Hint {
    pub run_id: Uuid,
    pub workflow: String,
    pub version: i32,
    /// Tells this readiness from earlier ones of the run.
    pub event_seq: i32,
    /// When it is ready, epoch seconds of the database's clock.
    pub ready_at: i64,
    pub priority: i32,
}

/// Puts hints into their queues, in one statement per queue.
pub(super) async fn push_hints(conn: &mut PgConnection, mut hints: Vec<Hint>) -> Result<()> {
    while let Some(first) = hints.first() {
        let (workflow, version) = (first.workflow.clone(), first.version);
        let (these, rest): (Vec<_>, Vec<_>) =
            hints.into_iter().partition(|hint| hint.workflow == workflow && hint.version == version);
        let tasks = these
            .into_iter()
            .map(|hint| {
                TaskBuilder::new(hint.run_id.as_bytes().to_vec())
                    .idempotency_key(format!("{}:{}", hint.run_id, hint.event_seq))
                    .run_at_timestamp(u64::try_from(hint.ready_at).unwrap_or(0))
                    .priority(usize::try_from(hint.priority).unwrap_or(0))
                    .max_attempts(1)
                    .build()
            })
            .collect();
        apalis_postgres::queries::push_tasks(conn, &super::queue(&workflow, version), tasks).await.map_err(
            |error| match error {
                apalis_postgres::Error::Database(error) => Error::from(error),
                other => Error::bug(other),
            },
        )?;
        hints = rest;
    }
    Ok(())
}

/// Starts a run of `workflow`, once per key.
///
/// # Errors
/// When the database refuses.
pub async fn start(conn: &mut PgConnection, workflow: &Workflow, new: NewRun) -> Result<Started> {
    let run_id = Uuid::now_v7();
    let created = sqlx::query!(
        r#"WITH run AS (
               INSERT INTO workflow_runs
                   (id, workflow, version, start_key, step, input, state_data, priority, scheduled_job_id, site_ids, limit_keys, event_seq)
               VALUES ($1, $2, $3, $4, $5, $6, $6, $7, $8, $9, $10, 1)
               ON CONFLICT (workflow, start_key) DO NOTHING
               RETURNING id, ready_at
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step) SELECT id, 1, 'created', $5 FROM run
           )
           SELECT floor(extract(epoch FROM ready_at))::bigint AS "ready_at!" FROM run"#,
        run_id,
        workflow.name,
        workflow.version,
        new.key,
        workflow.first(),
        new.input,
        new.priority,
        new.scheduled_job_id,
        &new.site_ids,
        &new.limit_keys,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(created) = created else {
        let run_id =
            sqlx::query_scalar!("SELECT id FROM workflow_runs WHERE workflow = $1 AND start_key = $2", workflow.name, new.key)
                .fetch_one(conn)
                .await?;
        return Ok(Started { run_id, created: false });
    };
    let hint = Hint {
        run_id,
        workflow: workflow.name.to_owned(),
        version: workflow.version,
        event_seq: 1,
        ready_at: created.ready_at,
        priority: new.priority,
    };
    push_hints(conn, vec![hint]).await?;
    Ok(Started { run_id, created: true })
}

/// One child of a fan-out.
#[derive(Debug, Clone)]
pub struct Child {
    /// Unique among the children of the parent, so that a repeated step starts no second child.
    pub key: String,
    /// What its first step gets.
    pub input: Value,
}

/// Starts children of `parent` in one statement, from a step of the parent and through its transaction. The parent may then
/// wait for them: the last one to end wakes it in its own transaction. Children known by their key are not started again.
///
/// # Errors
/// When the database refuses.
pub async fn start_children(conn: &mut PgConnection, parent: Uuid, workflow: &Workflow, children: &[Child]) -> Result<Vec<Uuid>> {
    let ids: Vec<Uuid> = children.iter().map(|_| Uuid::now_v7()).collect();
    let keys: Vec<String> = children.iter().map(|child| format!("{parent}/{}", child.key)).collect();
    let inputs: Vec<Value> = children.iter().map(|child| child.input.clone()).collect();
    let rows = sqlx::query!(
        r#"WITH run AS (
               INSERT INTO workflow_runs
                   (id, workflow, version, start_key, step, input, state_data, priority, scheduled_job_id, site_ids, parent_id, event_seq)
               SELECT c.id, $2, $3, c.key, $4, c.input, c.input, p.priority, p.scheduled_job_id, p.site_ids, p.id, 1
               FROM unnest($5::uuid[], $6::text[], $7::jsonb[]) AS c(id, key, input)
               JOIN workflow_runs p ON p.id = $1
               ON CONFLICT (workflow, start_key) DO NOTHING
               RETURNING id, ready_at, priority
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step) SELECT id, 1, 'created', $4 FROM run
           ), counted AS (
               UPDATE workflow_runs SET open_children = open_children + (SELECT count(*) FROM run) WHERE id = $1
           )
           SELECT id, floor(extract(epoch FROM ready_at))::bigint AS "ready_at!", priority FROM run"#,
        parent,
        workflow.name,
        workflow.version,
        workflow.first(),
        &ids,
        &keys,
        &inputs,
    )
    .fetch_all(&mut *conn)
    .await?;
    let started = rows.iter().map(|row| row.id).collect();
    let hints = rows
        .into_iter()
        .map(|row| Hint {
            run_id: row.id,
            workflow: workflow.name.to_owned(),
            version: workflow.version,
            event_seq: 1,
            ready_at: row.ready_at,
            priority: row.priority,
        })
        .collect();
    push_hints(conn, hints).await?;
    Ok(started)
}

/// Ends the waits of runs that are parked: the one way a sleeping run becomes ready. Each pair is a run and its `wake` document.
pub(super) async fn wake_up(conn: &mut PgConnection, wakes: &[(Uuid, Value)]) -> Result<usize> {
    if wakes.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = wakes.iter().map(|(id, _)| *id).collect();
    let documents: Vec<Value> = wakes.iter().map(|(_, wake)| wake.clone()).collect();
    let hints = sqlx::query_as!(
        Hint,
        r#"WITH asked AS (
               SELECT * FROM unnest($1::uuid[], $2::jsonb[]) AS t(id, wake)
           ), held AS (
               SELECT r.id FROM workflow_runs r JOIN asked USING (id) WHERE r.parked ORDER BY r.id FOR UPDATE OF r
           ), woken AS (
               UPDATE workflow_runs r
               SET parked = false, wait_signal = NULL, wait_children = false, wait_until = NULL, wake = a.wake, ready_at = now(),
                   state = CASE WHEN r.step = 'cancel' THEN 'cancelling' ELSE 'pending' END,
                   event_seq = r.event_seq + 1, updated_at = now()
               FROM asked a JOIN held USING (id)
               WHERE r.id = a.id AND r.parked
               RETURNING r.id, r.workflow, r.version, r.event_seq, r.priority, r.step, r.ready_at, a.wake
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail) SELECT id, event_seq, 'woken', step, wake FROM woken
           )
           SELECT id AS run_id, workflow, version, event_seq, priority, floor(extract(epoch FROM ready_at))::bigint AS "ready_at!" FROM woken"#,
        &ids,
        &documents,
    )
    .fetch_all(&mut *conn)
    .await?;
    let count = hints.len();
    push_hints(conn, hints).await?;
    Ok(count)
}

/// Sends the signal `name` to a run. One that comes before the run waits for it is kept; a second one of the same name
/// that finds the first unused replaces its payload. Answers false when the run has ended or does not exist.
///
/// # Errors
/// When the database refuses.
pub async fn signal(conn: &mut PgConnection, run_id: Uuid, name: &str, payload: &Value) -> Result<bool> {
    // The run's row is locked first: a step that is about to wait either sees the signal or is seen waiting.
    let run = sqlx::query!("SELECT finished_at, parked, wait_signal FROM workflow_runs WHERE id = $1 FOR UPDATE", run_id)
        .fetch_optional(&mut *conn)
        .await?;
    let Some(run) = run.filter(|run| run.finished_at.is_none()) else { return Ok(false) };
    if run.parked && run.wait_signal.as_deref() == Some(name) {
        wake_up(conn, &[(run_id, json!({"by": "signal", "payload": payload}))]).await?;
    } else {
        sqlx::query!(
            "INSERT INTO workflow_signals (run_id, name, payload) VALUES ($1, $2, $3)
             ON CONFLICT (run_id, name) DO UPDATE SET payload = EXCLUDED.payload, sent_at = now()",
            run_id,
            name,
            payload,
        )
        .execute(conn)
        .await?;
    }
    Ok(true)
}

/// What asking for a cancel did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelAsked {
    /// The run will go to its cancel step, now or when its running step lets go.
    Cancelling,
    /// It had been asked before.
    Already,
    /// It has ended; nothing to cancel.
    Ended,
    /// There is no such run.
    Unknown,
}

/// Asks a run to stop. A run that sleeps or is queued goes to its cancel step at once; a running step is told to stop
/// within [`super::RENEW_EVERY`].
///
/// # Errors
/// When the database refuses.
pub async fn request_cancel(conn: &mut PgConnection, run_id: Uuid, reason: &str) -> Result<CancelAsked> {
    let run =
        sqlx::query!("SELECT finished_at, cancel_requested_at, lease_token FROM workflow_runs WHERE id = $1 FOR UPDATE", run_id)
            .fetch_optional(&mut *conn)
            .await?;
    let Some(run) = run else { return Ok(CancelAsked::Unknown) };
    if run.finished_at.is_some() {
        return Ok(CancelAsked::Ended);
    }
    if run.cancel_requested_at.is_some() {
        return Ok(CancelAsked::Already);
    }
    let hint = sqlx::query_as!(
        Hint,
        r#"WITH run AS (
               UPDATE workflow_runs
               SET cancel_requested_at = now(), cancel_reason = $2, state = 'cancelling', event_seq = event_seq + 1, updated_at = now(),
                   step = CASE WHEN lease_token IS NULL THEN 'cancel' ELSE step END,
                   attempt = CASE WHEN lease_token IS NULL THEN 0 ELSE attempt END,
                   parked = false, wait_signal = NULL, wait_children = false, wait_until = NULL, wake = NULL, ready_at = now()
               WHERE id = $1
               RETURNING id, workflow, version, event_seq, priority, step, ready_at
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail)
               SELECT id, event_seq, 'cancel_requested', step, jsonb_build_object('reason', $2::text) FROM run
           )
           SELECT id AS run_id, workflow, version, event_seq, priority, floor(extract(epoch FROM ready_at))::bigint AS "ready_at!" FROM run"#,
        run_id,
        reason,
    )
    .fetch_one(&mut *conn)
    .await?;
    if run.lease_token.is_none() {
        push_hints(conn, vec![hint]).await?;
    }
    Ok(CancelAsked::Cancelling)
}

/// Lets a failed run try its failed step again, with fresh attempts.
///
/// # Errors
/// 404 when there is no such run, 409 `run_not_failed` when it has not failed.
pub async fn retry(conn: &mut PgConnection, run_id: Uuid, requested_by: &str) -> Result<()> {
    let state = sqlx::query_scalar!("SELECT state FROM workflow_runs WHERE id = $1 FOR UPDATE", run_id)
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(Error::not_found)?;
    if state != "failed" {
        return Err(Error::conflict("run_not_failed", format!("Only a failed run can be retried; this one is {state}.")));
    }
    let hint = sqlx::query_as!(
        Hint,
        r#"WITH run AS (
               UPDATE workflow_runs
               SET state = CASE WHEN step = 'cancel' THEN 'cancelling' ELSE 'pending' END, attempt = 0, worker_deaths = 0, error = NULL,
                   finished_at = NULL, event_seq = event_seq + 1, ready_at = now(), updated_at = now()
               WHERE id = $1
               RETURNING id, workflow, version, event_seq, priority, step, ready_at, parent_id
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail)
               SELECT id, event_seq, 'retry_requested', step, jsonb_build_object('requested_by', $2::text) FROM run
           ), parent AS (
               UPDATE workflow_runs p SET open_children = p.open_children + 1 FROM run WHERE p.id = run.parent_id AND p.finished_at IS NULL
           )
           SELECT id AS run_id, workflow, version, event_seq, priority, floor(extract(epoch FROM ready_at))::bigint AS "ready_at!" FROM run"#,
        run_id,
        requested_by,
    )
    .fetch_one(&mut *conn)
    .await?;
    push_hints(conn, vec![hint]).await
}
