//! The one place where the outcome of a step is written.
//!
//! Everything a step changes in its run is one statement over arrays: run, journal and event of each step, guarded row by
//! row by the lease token the step was claimed with. A step that has lost its lease changes nothing and is told so.
//!
//! Steps that wrote no domain rows share transactions by *natural batching*: the committer takes all that is waiting,
//! commits it, and starts over when that commit has returned. Nothing waits for a timer; an idle committer commits at once.

use std::time::Duration;

use borealis_engine::{Result, db::Pool};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::{
    COMMIT_BATCH, LEASE,
    definition::{Outcome, Step, StepError, Workflow},
    start::{Hint, push_hints, wake_up},
};

/// The outcome of one attempt of one step, ready to be written.
#[derive(Debug, Clone)]
pub(super) struct Commit {
    pub run_id: Uuid,
    pub token: Uuid,
    pub kind: &'static str,
    next_step: Option<&'static str>,
    data: Value,
    error: Option<String>,
    wait_signal: Option<String>,
    wait_children: bool,
    wait_ms: Option<i64>,
    delay_ms: i64,
}

impl Commit {
    /// Decides what an attempt's answer means for its run. Pure: `jitter` is between 0 and 1.
    pub fn decide(
        workflow: &Workflow,
        step: &Step,
        (run_id, token, attempt): (Uuid, Uuid, i32),
        answer: Result<Outcome, StepError>,
        jitter: f64,
    ) -> Self {
        let mut commit = Self {
            run_id,
            token,
            kind: "next",
            next_step: None,
            data: Value::Null,
            error: None,
            wait_signal: None,
            wait_children: false,
            wait_ms: None,
            delay_ms: 0,
        };
        match answer {
            Ok(Outcome::Next(state)) => {
                commit.next_step = workflow.after(step.name).map(|step| step.name);
                commit.data = state;
            }
            Ok(Outcome::Done(output)) => {
                commit.kind = "done";
                commit.data = output;
            }
            Ok(Outcome::Wait(wait)) => {
                commit.kind = "wait";
                commit.data = wait.state;
                commit.wait_signal = wait.signal;
                commit.wait_children = wait.children;
                commit.wait_ms = wait.at_most.map(milliseconds);
            }
            Err(StepError::Stopped) => commit.kind = "release",
            // Begun and not known to have ended: a step that must not be repeated is not, whatever cut it off.
            Err(StepError::Transient(error)) if step.never_retry => {
                commit.kind = "fail";
                commit.error = Some(format!("interrupted: {}", error.replace('\0', " ")));
            }
            Err(StepError::Transient(error)) if attempt < step.retry.attempts => {
                commit.kind = "retry";
                commit.error = Some(error.replace('\0', " "));
                let pause = step.retry.pause(attempt).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
                commit.delay_ms = milliseconds(pause);
            }
            Err(StepError::Transient(error) | StepError::Final(error)) => {
                commit.kind = "fail";
                commit.error = Some(error.replace('\0', " "));
            }
        }
        commit
    }

    /// What is written instead of an outcome the database refuses (a NUL in a text, say): the run fails and says so.
    fn refused(&self, error: &borealis_engine::Error) -> Self {
        let reason = error.source.as_ref().map_or_else(|| error.message.clone(), ToString::to_string);
        Self {
            kind: "fail",
            error: Some(format!("outcome_refused: {}", reason.replace('\0', " "))),
            data: Value::Null,
            ..self.clone()
        }
    }

    fn detail(&self) -> Value {
        match self.kind {
            "wait" => json!({"signal": self.wait_signal, "children": self.wait_children, "at_most_ms": self.wait_ms}),
            "retry" => json!({"error": self.error, "delay_ms": self.delay_ms}),
            "fail" => json!({"error": self.error}),
            _ => json!({}),
        }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Writes outcomes within the caller's transaction. Answers, in order, whether each was written: false means that the lease
/// was lost and that nothing of that step happened.
pub(super) async fn write(conn: &mut PgConnection, worker: &str, commits: &[Commit]) -> Result<Vec<bool>> {
    let ids: Vec<Uuid> = commits.iter().map(|c| c.run_id).collect();
    let tokens: Vec<Uuid> = commits.iter().map(|c| c.token).collect();
    let kinds: Vec<String> = commits.iter().map(|c| c.kind.to_owned()).collect();
    let next: Vec<Option<String>> = commits.iter().map(|c| c.next_step.map(str::to_owned)).collect();
    let data: Vec<Value> = commits.iter().map(|c| c.data.clone()).collect();
    let errors: Vec<Option<String>> = commits.iter().map(|c| c.error.clone()).collect();
    let signals: Vec<Option<String>> = commits.iter().map(|c| c.wait_signal.clone()).collect();
    let children: Vec<bool> = commits.iter().map(|c| c.wait_children).collect();
    let waits: Vec<Option<i64>> = commits.iter().map(|c| c.wait_ms).collect();
    let delays: Vec<i64> = commits.iter().map(|c| c.delay_ms).collect();
    let details: Vec<Value> = commits.iter().map(Commit::detail).collect();
    // Locked by a statement of its own: the next one then reads what was committed while this one waited, a cancel above all.
    sqlx::query!(
        "SELECT r.id FROM workflow_runs r JOIN unnest($1::uuid[], $2::uuid[]) AS t(id, token) ON r.id = t.id AND r.lease_token = t.token
         ORDER BY r.id FOR UPDATE OF r",
        &ids,
        &tokens,
    )
    .fetch_all(&mut *conn)
    .await?;
    let rows = sqlx::query!(
        r#"WITH asked AS (
               SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[], $6::text[], $7::text[], $8::boolean[],
                                    $9::bigint[], $10::bigint[], $11::jsonb[])
                   AS t(id, token, kind, next_step, data, error, wait_signal, wait_children, wait_ms, delay_ms, detail)
           ), decided AS (
               SELECT a.*, r.step AS old_step, r.seq AS old_seq, r.attempt AS old_attempt,
                      a.kind IN ('next', 'done', 'wait') AS journaled,
                      CASE
                          WHEN a.kind = 'done' OR (a.kind = 'next' AND a.next_step IS NULL)
                              THEN CASE WHEN r.step = 'cancel' THEN 'cancelled' ELSE 'succeeded' END
                          WHEN a.kind = 'fail' THEN 'failed'
                          WHEN r.cancel_requested_at IS NOT NULL AND r.step <> 'cancel' THEN 'cancelling'
                          WHEN a.kind = 'next' THEN 'step_committed'
                          WHEN a.kind = 'wait' THEN 'waiting'
                          WHEN a.kind = 'retry' THEN 'retry_scheduled'
                          ELSE 'released'
                      END AS becomes
               FROM asked a JOIN workflow_runs r ON r.id = a.id AND r.lease_token = a.token
           ), written AS (
               UPDATE workflow_runs r
               SET step = CASE d.becomes WHEN 'cancelling' THEN 'cancel' WHEN 'step_committed' THEN d.next_step ELSE r.step END,
                   seq = r.seq + d.journaled::int,
                   attempt = CASE d.becomes WHEN 'retry_scheduled' THEN r.attempt WHEN 'released' THEN greatest(r.attempt - 1, 0)
                                            WHEN 'failed' THEN r.attempt ELSE 0 END,
                   worker_deaths = CASE WHEN d.becomes IN ('retry_scheduled', 'released') THEN r.worker_deaths ELSE 0 END,
                   state = CASE
                       WHEN d.becomes IN ('succeeded', 'failed', 'cancelled') THEN d.becomes
                       WHEN d.becomes = 'cancelling' OR r.step = 'cancel' THEN 'cancelling'
                       WHEN d.becomes = 'waiting' THEN 'waiting'
                       ELSE 'pending' END,
                   state_data = CASE WHEN d.kind IN ('next', 'wait') THEN d.data ELSE r.state_data END,
                   output = CASE WHEN d.becomes IN ('succeeded', 'cancelled') THEN d.data ELSE r.output END,
                   error = CASE d.becomes WHEN 'failed' THEN d.error WHEN 'cancelled' THEN coalesce(r.cancel_reason, 'cancelled') ELSE r.error END,
                   parked = d.becomes = 'waiting',
                   wait_signal = CASE WHEN d.becomes = 'waiting' THEN d.wait_signal END,
                   wait_children = d.becomes = 'waiting' AND d.wait_children,
                   wait_until = CASE WHEN d.becomes = 'waiting' THEN now() + d.wait_ms * interval '1 millisecond' END,
                   wake = CASE WHEN d.becomes IN ('retry_scheduled', 'released') THEN r.wake END,
                   ready_at = now() + d.delay_ms * interval '1 millisecond',
                   lease_token = NULL, lease_expires_at = NULL, worker = NULL,
                   finished_at = CASE WHEN d.becomes IN ('succeeded', 'failed', 'cancelled') THEN now() END,
                   event_seq = r.event_seq + 1, updated_at = now()
               FROM decided d
               WHERE r.id = d.id
               RETURNING r.id, r.workflow, r.version, r.event_seq, r.priority, r.ready_at, r.parent_id, r.finished_at, r.wait_signal,
                         r.wait_children, r.open_children, d.becomes, d.old_step, d.old_seq, d.old_attempt, d.journaled, d.data, d.detail
           ), journal AS (
               INSERT INTO workflow_journal (run_id, seq, step, attempt, worker, output)
               SELECT id, old_seq, old_step, old_attempt, $12, data FROM written WHERE journaled
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, detail)
               SELECT id, event_seq, becomes, old_step, old_attempt, $12, detail FROM written
           )
           SELECT id AS "id!", workflow AS "workflow!", version AS "version!", event_seq AS "event_seq!", priority AS "priority!",
                  ceil(extract(epoch FROM ready_at))::bigint AS "later!", floor(extract(epoch FROM ready_at))::bigint AS "now!",
                  parent_id, (finished_at IS NOT NULL) AS "finished!", becomes AS "becomes!",
                  wait_signal, wait_children AS "wait_children!", open_children AS "open_children!"
           FROM written"#,
        &ids,
        &tokens,
        &kinds,
        &next as &[Option<String>],
        &data,
        &errors as &[Option<String>],
        &signals as &[Option<String>],
        &children,
        &waits as &[Option<i64>],
        &delays,
        &details,
        worker,
    )
    .fetch_all(&mut *conn)
    .await?;

    let mut hints = Vec::new();
    let mut sleeping = Vec::new();
    let mut wakes = Vec::new();
    let mut parents: Vec<Uuid> = Vec::new();
    for row in &rows {
        match row.becomes.as_str() {
            "waiting" if row.wait_children && row.open_children == 0 => wakes.push((row.id, json!({"by": "children"}))),
            "waiting" if row.wait_signal.is_some() => sleeping.push(row.id),
            "step_committed" | "retry_scheduled" | "released" | "cancelling" => hints.push(Hint {
                run_id: row.id,
                workflow: row.workflow.clone(),
                version: row.version,
                event_seq: row.event_seq,
                ready_at: if row.becomes == "retry_scheduled" { row.later } else { row.now },
                priority: row.priority,
            }),
            _ => {}
        }
        if row.finished {
            parents.extend(row.parent_id);
        }
    }
    push_hints(&mut *conn, hints).await?;
    if !sleeping.is_empty() {
        // The runs' rows are locked now, so this later statement sees every signal that did not see them waiting.
        let used = sqlx::query!(
            "DELETE FROM workflow_signals s USING workflow_runs r
             WHERE r.id = ANY($1) AND s.run_id = r.id AND s.name = r.wait_signal RETURNING s.run_id, s.payload",
            &sleeping,
        )
        .fetch_all(&mut *conn)
        .await?;
        wakes.extend(used.into_iter().map(|signal| (signal.run_id, json!({"by": "signal", "payload": signal.payload}))));
    }
    wake_up(&mut *conn, &wakes).await?;
    children_ended(&mut *conn, &parents).await?;

    let written: std::collections::HashSet<Uuid> = rows.iter().map(|row| row.id).collect();
    Ok(ids.iter().map(|id| written.contains(id)).collect())
}

/// Counts ended children off their parents (one entry per child) and wakes those parents whose last child it was.
pub(super) async fn children_ended(conn: &mut PgConnection, parents: &[Uuid]) -> Result<()> {
    if parents.is_empty() {
        return Ok(());
    }
    let ready = sqlx::query_scalar!(
        "WITH ended AS (
             SELECT id, count(*)::int AS children FROM unnest($1::uuid[]) AS t(id) GROUP BY id
         ), held AS (
             SELECT r.id FROM workflow_runs r JOIN ended USING (id) ORDER BY r.id FOR UPDATE OF r
         ), counted AS (
             UPDATE workflow_runs r SET open_children = greatest(r.open_children - e.children, 0)
             FROM ended e JOIN held USING (id) WHERE r.id = e.id
             RETURNING r.id, r.open_children, r.parked AND r.wait_children AS waits
         )
         SELECT id FROM counted WHERE open_children = 0 AND waits",
        parents,
    )
    .fetch_all(&mut *conn)
    .await?;
    let wakes: Vec<_> = ready.into_iter().map(|id| (id, json!({"by": "children"}))).collect();
    wake_up(conn, &wakes).await?;
    Ok(())
}

/// Hands outcomes to the committer and waits for the commit.
#[derive(Debug, Clone)]
pub(super) struct Committer {
    queue: mpsc::Sender<(Commit, oneshot::Sender<bool>)>,
}

impl Committer {
    /// Starts the committer of this process. It ends when the last handle is gone.
    pub fn spawn(pool: Pool, worker: String) -> Self {
        let (queue, inbox) = mpsc::channel(COMMIT_BATCH * 2);
        tokio::spawn(run(pool, worker, inbox));
        Self { queue }
    }

    /// Writes one outcome. False when the lease was lost, or Postgres stayed away until it must have been.
    pub async fn commit(&self, commit: Commit) -> bool {
        let (done, answer) = oneshot::channel();
        self.queue.send((commit, done)).await.is_ok() && answer.await.unwrap_or(false)
    }
}

async fn run(pool: Pool, worker: String, mut inbox: mpsc::Receiver<(Commit, oneshot::Sender<bool>)>) {
    let mut batch = Vec::with_capacity(COMMIT_BATCH);
    while inbox.recv_many(&mut batch, COMMIT_BATCH).await > 0 {
        let (commits, waiting): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        let answers = persist(&pool, &worker, &commits).await;
        for (done, written) in waiting.into_iter().zip(answers) {
            let _ = done.send(written);
        }
    }
}

/// Commits a batch, trying again while Postgres is away and the leases may still be ours. When a batch is refused for
/// what one of its rows holds, the rows go one by one, so that one bad outcome fails alone.
async fn persist(pool: &Pool, worker: &str, commits: &[Commit]) -> Vec<bool> {
    let started = tokio::time::Instant::now();
    loop {
        match transaction(pool, worker, commits).await {
            Ok(written) => return written,
            Err(error) if error.is_transient() => {
                if started.elapsed() > LEASE {
                    tracing::error!(?error, count = commits.len(), "outcomes dropped: their leases are over");
                    return vec![false; commits.len()];
                }
                tracing::warn!(?error, "commit failed, trying again");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) if commits.len() == 1 => {
                let Some(refused) = commits.first().filter(|commit| commit.kind != "fail") else { return vec![false] };
                tracing::error!(?error, run_id = %refused.run_id, "outcome refused by the database");
                return Box::pin(persist(pool, worker, &[refused.refused(&error)])).await;
            }
            Err(error) => {
                tracing::warn!(?error, "batch refused, committing one by one");
                let mut written = Vec::with_capacity(commits.len());
                for commit in commits {
                    written.extend(Box::pin(persist(pool, worker, std::slice::from_ref(commit))).await);
                }
                return written;
            }
        }
    }
}

async fn transaction(pool: &Pool, worker: &str, commits: &[Commit]) -> Result<Vec<bool>> {
    let mut tx = pool.begin().await?;
    let written = write(&mut tx, worker, commits).await?;
    tx.commit().await?;
    Ok(written)
}
