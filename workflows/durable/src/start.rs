//! Starting, signalling, cancelling and retrying runs: plain functions over the caller's connection, so that each
//! happens exactly when the caller's transaction commits.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{Pool, Result, definition::Workflow, metrics};

/// A run to be started.
#[derive(Debug, Clone, Default)]
pub struct NewRun {
    /// What makes the start single, unique per workflow; none: every start is a new run.
    pub key: Option<String>,
    /// What the first step gets.
    pub input: Value,
    /// Higher is claimed first.
    pub priority: i32,
    /// What the run belongs to, for lists: an id of the program's own.
    pub owner_id: Option<i64>,
    /// Ids of the program's own that say who may see the run; the runtime only keeps them.
    pub scope_ids: Vec<i64>,
    /// Keys whose number of running steps is bounded by `workflow_limits`.
    pub limit_keys: Vec<String>,
    /// Where it has to run: only workers with this among their [places](crate::worker::Options::places) take it. Empty: the others do.
    pub place: String,
}

/// A started run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// The run: the new one, or the one that already had the key.
    pub run_id: Uuid,
    /// False when the key had been used: nothing was started.
    pub created: bool,
}

/// Turns off the queue's own notification of every inserted task: `workflow_hint` notifies, and only those who sleep.
///
/// # Errors
/// When the database refuses.
pub async fn own_notifications(pool: &Pool) -> Result<()> {
    let on = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'apalis.jobs'::regclass AND tgname = 'notify_workers' AND tgenabled <> 'D') AS "on!""#
    )
    .fetch_one(pool)
    .await?;
    if on {
        sqlx::query!("ALTER TABLE apalis.jobs DISABLE TRIGGER notify_workers").execute(pool).await?;
    }
    Ok(())
}

/// Starts a run of `workflow`, once per key.
///
/// # Errors
/// When the database refuses.
pub async fn start<S>(conn: &mut PgConnection, workflow: &Workflow<S>, new: NewRun) -> Result<Started> {
    start_many(conn, workflow, vec![new]).await?.pop().ok_or(sqlx::Error::RowNotFound)
}

/// Starts runs of `workflow` in one statement, each once per key. Answers in the order of `new`.
///
/// # Errors
/// When the database refuses; then none was started.
pub async fn start_many<S>(conn: &mut PgConnection, workflow: &Workflow<S>, new: Vec<NewRun>) -> Result<Vec<Started>> {
    let mut started: Vec<Started> = new.iter().map(|_| Started { run_id: Uuid::now_v7(), created: true }).collect();
    let mut order: Vec<usize> = (0..new.len()).collect();
    // In the order of their keys: two batches with the same keys would otherwise wait for each other.
    order.sort_by_key(|at| new.get(*at).and_then(|new| new.key.as_deref()));
    let sorted: Vec<(&NewRun, Uuid)> = order.iter().filter_map(|at| Some((new.get(*at)?, started.get(*at)?.run_id))).collect();
    fn all<'a, T>(runs: &[(&'a NewRun, Uuid)], field: impl Fn(&'a NewRun) -> T) -> Vec<T> {
        runs.iter().map(|(new, _)| field(new)).collect()
    }
    let created = sqlx::query!(
        r#"WITH run AS (
               INSERT INTO workflow_runs
                   (id, workflow, version, start_key, step, input, state_data, priority, owner_id, scope_ids, limit_keys, place, event_seq)
               SELECT id, $1, $2, start_key, $3, input, input, priority, owner_id,
                      CASE WHEN scope_ids = '[]' THEN '{}' ELSE ARRAY(SELECT jsonb_array_elements_text(scope_ids)::bigint) END,
                      CASE WHEN limit_keys = '[]' THEN '{}' ELSE ARRAY(SELECT jsonb_array_elements_text(limit_keys)) END, place, 1
               FROM unnest($4::uuid[], $5::text[], $6::jsonb[], $7::int[], $8::bigint[], $9::jsonb[], $10::jsonb[], $11::text[])
                   AS new(id, start_key, input, priority, owner_id, scope_ids, limit_keys, place)
               ON CONFLICT (workflow, start_key) WHERE start_key IS NOT NULL DO NOTHING
               RETURNING id, ready_at, priority, place
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step) SELECT id, 1, 'created', $3 FROM run
           )
           SELECT id, workflow_hint(id, workflow_queue($1, $2, place), 1, ready_at, priority) IS NOT NULL AS hinted FROM run"#,
        workflow.name,
        workflow.version,
        workflow.first(),
        &sorted.iter().map(|(_, id)| *id).collect::<Vec<_>>(),
        &all(&sorted, |new| new.key.as_deref()) as &[Option<&str>],
        &all(&sorted, |new| &new.input) as &[&Value],
        &all(&sorted, |new| new.priority),
        &all(&sorted, |new| new.owner_id) as &[Option<i64>],
        &all(&sorted, |new| json!(new.scope_ids)),
        &all(&sorted, |new| json!(new.limit_keys)),
        &all(&sorted, |new| new.place.as_str()) as &[&str],
    )
    .fetch_all(&mut *conn)
    .await?;
    metrics::runs_started(workflow.name, created.len());
    if created.len() == new.len() {
        return Ok(started);
    }
    let created: HashSet<Uuid> = created.into_iter().map(|row| row.id).collect();
    let keys: Vec<String> = new.iter().filter_map(|new| new.key.clone()).collect();
    let known: HashMap<Option<String>, Uuid> = sqlx::query!(
        "SELECT start_key, id FROM workflow_runs WHERE workflow = $1 AND start_key = ANY ($2)",
        workflow.name,
        &keys
    )
    .fetch_all(conn)
    .await?
    .into_iter()
    .map(|row| (row.start_key, row.id))
    .collect();
    for (started, new) in started.iter_mut().zip(new).filter(|(started, _)| !created.contains(&started.run_id)) {
        let run_id = known.get(&new.key).copied().ok_or(sqlx::Error::RowNotFound)?;
        *started = Started { run_id, created: false };
    }
    Ok(started)
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
pub async fn start_children<S>(
    conn: &mut PgConnection,
    parent: Uuid,
    workflow: &Workflow<S>,
    children: &[Child],
) -> Result<Vec<Uuid>> {
    let ids: Vec<Uuid> = children.iter().map(|_| Uuid::now_v7()).collect();
    let keys: Vec<String> = children.iter().map(|child| format!("{parent}/{}", child.key)).collect();
    let inputs: Vec<Value> = children.iter().map(|child| child.input.clone()).collect();
    let rows = sqlx::query!(
        r#"WITH run AS (
               INSERT INTO workflow_runs
                   (id, workflow, version, start_key, step, input, state_data, priority, owner_id, scope_ids, place, parent_id, event_seq)
               SELECT c.id, $2, $3, c.key, $4, c.input, c.input, p.priority, p.owner_id, p.scope_ids, p.place, p.id, 1
               FROM unnest($5::uuid[], $6::text[], $7::jsonb[]) AS c(id, key, input)
               JOIN workflow_runs p ON p.id = $1
               ON CONFLICT (workflow, start_key) WHERE start_key IS NOT NULL DO NOTHING
               RETURNING id, ready_at, priority, place
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step) SELECT id, 1, 'created', $4 FROM run
           ), counted AS (
               UPDATE workflow_runs SET open_children = open_children + (SELECT count(*) FROM run) WHERE id = $1
           )
           SELECT id, workflow_hint(id, workflow_queue($2, $3, place), 1, ready_at, priority) IS NOT NULL AS hinted FROM run"#,
        parent,
        workflow.name,
        workflow.version,
        workflow.first(),
        &ids,
        &keys,
        &inputs,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(|row| row.id).collect())
}

/// A child of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct ChildRun {
    /// Its run.
    pub run_id: Uuid,
    /// Its key among the children of the parent.
    pub key: String,
    /// Its state.
    pub state: String,
    /// What it ended with, once it has.
    pub output: Option<Value>,
    /// Why it failed or was cancelled.
    pub error: Option<String>,
}

/// The children of `parent`, in the order in which they were started.
///
/// # Errors
/// When the database refuses.
pub async fn children(pool: &Pool, parent: Uuid) -> Result<Vec<ChildRun>> {
    sqlx::query_as!(
        ChildRun,
        r#"SELECT id AS run_id, substr(coalesce(start_key, ''), 38) AS "key!", state, output, error
           FROM workflow_runs WHERE parent_id = $1 ORDER BY id"#,
        parent,
    )
    .fetch_all(pool)
    .await
}

/// Ends the waits of runs that are parked: the one way a sleeping run becomes ready. Each pair is a run and its `wake` document.
pub(crate) async fn wake_up(conn: &mut PgConnection, wakes: &[(Uuid, Value)]) -> Result<usize> {
    if wakes.is_empty() {
        return Ok(0);
    }
    let ids: Vec<Uuid> = wakes.iter().map(|(id, _)| *id).collect();
    let documents: Vec<Value> = wakes.iter().map(|(_, wake)| wake.clone()).collect();
    let woken = sqlx::query!(
        r#"WITH asked AS (
               SELECT * FROM unnest($1::uuid[], $2::jsonb[]) AS t(id, wake)
           ), held AS (
               SELECT r.id FROM workflow_runs r JOIN asked USING (id) WHERE r.parked ORDER BY r.id FOR UPDATE OF r
           ), woken AS (
               UPDATE workflow_runs r
               SET parked = false, wait_signal = NULL, wait_children = false, wait_until = NULL, wake = a.wake, ready_at = now(),
                   told_children = CASE WHEN a.wake ->> 'by' IN ('child', 'children') THEN r.ended_children ELSE r.told_children END,
                   state = CASE WHEN r.step = 'cancel' THEN 'cancelling' ELSE 'pending' END,
                   event_seq = r.event_seq + 1, updated_at = now()
               FROM asked a JOIN held USING (id)
               WHERE r.id = a.id AND r.parked
               RETURNING r.id, r.workflow, r.version, r.place, r.event_seq, r.priority, r.step, r.ready_at, a.wake
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail) SELECT id, event_seq, 'woken', step, wake FROM woken
           )
           SELECT workflow_hint(id, workflow_queue(workflow, version, place), event_seq, ready_at, priority) IS NOT NULL AS hinted FROM woken"#,
        &ids,
        &documents,
    )
    .fetch_all(conn)
    .await?;
    Ok(woken.len())
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
    let run = sqlx::query!("SELECT finished_at, cancel_requested_at FROM workflow_runs WHERE id = $1 FOR UPDATE", run_id)
        .fetch_optional(&mut *conn)
        .await?;
    let Some(run) = run else { return Ok(CancelAsked::Unknown) };
    if run.finished_at.is_some() {
        return Ok(CancelAsked::Ended);
    }
    if run.cancel_requested_at.is_some() {
        return Ok(CancelAsked::Already);
    }
    sqlx::query!(
        r#"WITH run AS (
               UPDATE workflow_runs
               SET cancel_requested_at = now(), cancel_reason = $2, state = 'cancelling', event_seq = event_seq + 1, updated_at = now(),
                   step = CASE WHEN lease_token IS NULL THEN 'cancel' ELSE step END,
                   attempt = CASE WHEN lease_token IS NULL THEN 0 ELSE attempt END,
                   parked = false, wait_signal = NULL, wait_children = false, wait_until = NULL, wake = NULL, ready_at = now()
               WHERE id = $1
               RETURNING id, workflow, version, place, event_seq, priority, step, ready_at, lease_token
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail)
               SELECT id, event_seq, 'cancel_requested', step, jsonb_build_object('reason', $2::text) FROM run
           )
           SELECT workflow_hint(id, workflow_queue(workflow, version, place), event_seq, ready_at, priority) IS NOT NULL AS hinted
           FROM run WHERE lease_token IS NULL"#,
        run_id,
        reason,
    )
    .fetch_optional(conn)
    .await?;
    Ok(CancelAsked::Cancelling)
}

/// What asking for a retry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetryAsked {
    /// The failed step is tried again.
    Retrying,
    /// The run has not failed: it is in this state.
    NotFailed(String),
    /// There is no such run.
    Unknown,
}

/// Lets a failed run try its failed step again, with fresh attempts.
///
/// # Errors
/// When the database refuses.
pub async fn retry(conn: &mut PgConnection, run_id: Uuid, requested_by: &str) -> Result<RetryAsked> {
    let state = sqlx::query_scalar!("SELECT state FROM workflow_runs WHERE id = $1 FOR UPDATE", run_id)
        .fetch_optional(&mut *conn)
        .await?;
    match state {
        None => return Ok(RetryAsked::Unknown),
        Some(state) if state != "failed" => return Ok(RetryAsked::NotFailed(state)),
        Some(_) => {}
    }
    sqlx::query!(
        r#"WITH run AS (
               UPDATE workflow_runs
               SET state = CASE WHEN step = 'cancel' THEN 'cancelling' ELSE 'pending' END, attempt = 0, worker_deaths = 0, error = NULL, output = NULL,
                   finished_at = NULL, event_seq = event_seq + 1, ready_at = now(), updated_at = now()
               WHERE id = $1
               RETURNING id, workflow, version, place, event_seq, priority, step, ready_at, parent_id
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, detail)
               SELECT id, event_seq, 'retry_requested', step, jsonb_build_object('requested_by', $2::text) FROM run
           ), parent AS (
               UPDATE workflow_runs p SET open_children = p.open_children + 1 FROM run WHERE p.id = run.parent_id
           )
           SELECT workflow_hint(id, workflow_queue(workflow, version, place), event_seq, ready_at, priority) IS NOT NULL AS hinted FROM run"#,
        run_id,
        requested_by,
    )
    .fetch_one(conn)
    .await?;
    Ok(RetryAsked::Retrying)
}
