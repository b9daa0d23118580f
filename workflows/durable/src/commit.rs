//! The one place where the outcome of a step is written.
//!
//! Everything a step changes in its run is one statement over arrays: the run and the event that tells of it, guarded row
//! by row by the lease token and the number of the step. A step that has lost its lease changes nothing and is told so.
//! A worker that may go on keeps the lease for the next step ([`hand_over`]), so that between two steps there is neither
//! queue nor claim; every other outcome gives the lease up ([`release`]).
//!
//! Steps that wrote no domain rows share statements by *natural batching*: the committer takes all that is waiting,
//! commits it, and starts over when that commit has returned. Nothing waits for a timer; an idle committer commits at once.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use borealis_tasks::Tasks;
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc, oneshot};
use uuid::Uuid;

use crate::{
    COMMIT_BATCH, COMMIT_LANES, LEASE, Pool, Result,
    definition::{Children, Failure, Outcome, Step, Workflow},
    error::is_transient,
    metrics::{self, METERS, StepMeters},
    start::wake_up,
};

/// The attempt of a step whose outcome is written, as it was claimed.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The run.
    pub run_id: Uuid,
    /// The lease.
    pub token: Uuid,
    /// The step's number in the run.
    pub seq: i32,
    /// The try of the step.
    pub attempt: i32,
    /// Whether the run is a child: its end then concerns its parent.
    pub is_child: bool,
}

/// A run and the token of one of its leases.
type Lease = (Uuid, Uuid);

impl Attempt {
    fn lease(&self) -> Lease {
        (self.run_id, self.token)
    }
}

/// The outcome of one attempt of one step, ready to be written.
#[derive(Debug, Clone)]
pub struct Commit {
    /// Whose it is.
    pub of: Attempt,
    step: &'static str,
    pub(crate) kind: &'static str,
    next_step: Option<&'static str>,
    data: Value,
    error: Option<String>,
    wait_signal: Option<String>,
    wait_children: Children,
    wait_ms: Option<i64>,
    delay_ms: i64,
    keeps: bool,
    pub(crate) meters: &'static StepMeters,
}

/// What an outcome means for its run, once it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// There is a next step.
    GoesOn,
    /// It was the last one, and went well.
    Ends,
    /// The run has failed.
    Fails,
    /// It sleeps.
    Waits,
    /// The step is tried again.
    Retries,
    /// The step was told to stop and is run again.
    Released,
}

/// What became of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is written, and the next step is ours under the same lease.
    Kept,
    /// It is written, and the lease is given up.
    Released,
    /// The lease had been lost: nothing of the attempt happened.
    Lost,
}

impl Commit {
    /// Decides what an attempt's answer means for its run. Pure: `jitter` is between 0 and 1; `goes_on` says whether the
    /// worker would run the next step at once.
    #[must_use]
    pub fn decide<S>(
        workflow: &Workflow<S>,
        step: &Step<S>,
        of: Attempt,
        answer: Result<Outcome, Failure>,
        jitter: f64,
        goes_on: bool,
    ) -> Self {
        let attempt = of.attempt;
        let mut commit = Self {
            of,
            step: step.name,
            kind: "next",
            next_step: None,
            data: Value::Null,
            error: None,
            wait_signal: None,
            wait_children: Children::None,
            wait_ms: None,
            delay_ms: 0,
            keeps: false,
            meters: step.meters(workflow.name),
        };
        match answer {
            Ok(Outcome::Next(state)) => {
                commit.next_step = workflow.after(step.name).map(|step| step.name);
                commit.keeps = goes_on && commit.next_step.is_some();
                commit.data = state;
            }
            Ok(Outcome::Done(output)) => {
                commit.kind = "done";
                commit.data = output;
            }
            Ok(Outcome::Failed { error, output }) => {
                commit.kind = "fail";
                commit.error = Some(error.replace('\0', " "));
                commit.data = output;
            }
            Ok(Outcome::Wait(wait)) => {
                commit.kind = "wait";
                commit.data = wait.state;
                commit.wait_signal = wait.signal;
                commit.wait_children = wait.children;
                commit.wait_ms = wait.at_most.map(milliseconds);
            }
            Err(Failure::Stopped) => commit.kind = "release",
            // Begun and not known to have ended: a step that must not be repeated is not, whatever cut it off.
            Err(Failure::Transient(error)) if step.never_retry => {
                commit.kind = "fail";
                commit.error = Some(format!("interrupted: {}", error.replace('\0', " ")));
            }
            Err(Failure::Transient(error)) if attempt < step.retry.attempts => {
                commit.kind = "retry";
                commit.error = Some(error.replace('\0', " "));
                let pause = step.retry.pause(attempt).mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
                commit.delay_ms = milliseconds(pause);
            }
            Err(Failure::Transient(error) | Failure::Final(error)) => {
                commit.kind = "fail";
                commit.error = Some(error.replace('\0', " "));
            }
        }
        commit
    }

    /// What is written instead of an outcome the database refuses (a NUL in a text, say): the run fails and says so.
    fn refused(&self, error: &sqlx::Error) -> Self {
        let reason = error.to_string();
        Self {
            kind: "fail",
            error: Some(format!("outcome_refused: {}", reason.replace('\0', " "))),
            data: Value::Null,
            keeps: false,
            ..self.clone()
        }
    }

    /// As `workflow_becomes` decides it in the database. What is written may also turn a run to its cancel step.
    pub(crate) fn ending(&self) -> Ending {
        match self.kind {
            "next" if self.next_step.is_some() => Ending::GoesOn,
            "next" | "done" => Ending::Ends,
            "fail" => Ending::Fails,
            "wait" => Ending::Waits,
            "retry" => Ending::Retries,
            _ => Ending::Released,
        }
    }

    /// The same for a trace: a word, and whether something went wrong.
    pub(crate) fn said(&self) -> (&'static str, bool) {
        match self.ending() {
            Ending::GoesOn | Ending::Ends => ("committed", false),
            Ending::Waits => ("waiting", false),
            Ending::Retries => ("retried", true),
            Ending::Fails => ("failed", true),
            Ending::Released => ("released", false),
        }
    }

    pub(crate) fn step(&self) -> &'static str {
        self.step
    }

    /// Whether one statement is all there is to write: nobody else's row has to be looked at.
    fn is_alone(&self) -> bool {
        !self.of.is_child && self.wait_signal.is_none() && self.wait_children == Children::None
    }

    fn detail(&self) -> Value {
        match self.kind {
            "wait" => {
                json!({"signal": self.wait_signal, "children": self.wait_children != Children::None, "at_most_ms": self.wait_ms})
            }
            "retry" => json!({"error": self.error, "delay_ms": self.delay_ms}),
            "fail" => json!({"error": self.error}),
            _ => json!({}),
        }
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Writes outcomes through the caller's connection, in its transaction when there is one; without one, only outcomes that
/// are [alone](Commit::is_alone) are written as a whole. Answers what became of each, in order.
///
/// # Errors
/// When the database refuses. In a transaction nothing was written then; without one, each outcome was written or was not.
pub async fn write(conn: &mut PgConnection, worker: &str, commits: &[Commit]) -> Result<Vec<Written>> {
    let kept = hand_over(&mut *conn, worker, &sorted(commits.iter().filter(|commit| commit.keeps))).await?;
    let others = sorted(commits.iter().filter(|commit| !kept.contains(&commit.of.lease())));
    let released = if others.is_empty() { HashSet::new() } else { release(conn, worker, &others).await? };
    // By lease and not by run: an attempt that has lost its lease may be in one batch with the one that has it.
    let written = |commit: &Commit| match commit.of.lease() {
        lease if kept.contains(&lease) => Written::Kept,
        lease if released.contains(&lease) => Written::Released,
        _ => Written::Lost,
    };
    Ok(commits.iter().map(written).collect())
}

/// In the order of their ids, as everybody locks runs.
fn sorted<'a>(commits: impl Iterator<Item = &'a Commit>) -> Vec<&'a Commit> {
    let mut sorted: Vec<&Commit> = commits.collect();
    sorted.sort_by_key(|commit| commit.of.run_id);
    sorted
}

fn all<'a, T>(commits: &[&'a Commit], field: impl Fn(&'a Commit) -> T) -> Vec<T> {
    commits.iter().map(|commit| field(commit)).collect()
}

/// Commits steps whose worker goes on with the next one under the same lease: no column of an index changes. Answers the
/// leases it was done for; the others are lost, or their runs are to be cancelled.
async fn hand_over(conn: &mut PgConnection, worker: &str, commits: &[&Commit]) -> Result<HashSet<Lease>> {
    if commits.is_empty() {
        return Ok(HashSet::new());
    }
    let kept = sqlx::query!(
        r#"WITH written AS (
               UPDATE workflow_runs r
               SET step = a.next_step, seq = r.seq + 1, attempt = 1, worker_deaths = 0, state_data = a.data, wake = NULL,
                   event_seq = r.event_seq + 1, updated_at = now()
               FROM unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[], $5::text[], $6::text[], $7::jsonb[])
                   AS a(id, token, seq, attempt, step, next_step, data)
               WHERE r.id = a.id AND r.lease_token = a.token AND r.seq = a.seq AND r.cancel_requested_at IS NULL
               RETURNING r.id, a.token, r.event_seq, a.step, a.attempt, a.seq, a.data
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, step_seq, output)
               SELECT id, event_seq, 'step_committed', step, attempt, $8, seq, data FROM written
           )
           SELECT id, token AS "token!" FROM written"#,
        &all(commits, |c| c.of.run_id),
        &all(commits, |c| c.of.token),
        &all(commits, |c| c.of.seq),
        &all(commits, |c| c.of.attempt),
        &all(commits, |c| c.step) as &[&str],
        &all(commits, |c| c.next_step) as &[Option<&str>],
        &all(commits, |c| &c.data) as &[&Value],
        worker,
    )
    .fetch_all(conn)
    .await?;
    Ok(kept.into_iter().map(|row| (row.id, row.token)).collect())
}

/// Writes outcomes that end the lease, and what follows from them for others. Answers the runs whose outcome is written.
async fn release(conn: &mut PgConnection, worker: &str, commits: &[&Commit]) -> Result<HashSet<Lease>> {
    // Whether a cancel was asked for is read from the row that is updated, so that one that commits while this statement
    // waits for the row is seen.
    let rows = sqlx::query!(
        r#"WITH written AS (
               UPDATE workflow_runs r
               SET step = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL)
                       WHEN 'cancelling' THEN 'cancel' WHEN 'step_committed' THEN a.next_step ELSE r.step END,
                   seq = r.seq + (a.kind IN ('next', 'done', 'wait'))::int,
                   attempt = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL)
                       WHEN 'retry_scheduled' THEN r.attempt WHEN 'failed' THEN r.attempt
                       WHEN 'released' THEN greatest(r.attempt - 1, 0) ELSE 0 END,
                   worker_deaths = CASE WHEN a.kind IN ('retry', 'release') THEN r.worker_deaths ELSE 0 END,
                   state = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL)
                       WHEN 'succeeded' THEN 'succeeded' WHEN 'failed' THEN 'failed' WHEN 'cancelled' THEN 'cancelled' WHEN 'cancelling' THEN 'cancelling'
                       ELSE CASE WHEN r.step = 'cancel' THEN 'cancelling' WHEN a.kind = 'wait' THEN 'waiting' ELSE 'pending' END END,
                   state_data = CASE WHEN a.kind IN ('next', 'wait') THEN a.data ELSE r.state_data END,
                   output = CASE WHEN workflow_becomes(a.kind, a.next_step IS NULL, r.step, false) IN ('succeeded', 'cancelled') THEN a.data
                       WHEN a.kind = 'fail' THEN nullif(a.data, 'null') ELSE r.output END,
                   error = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, false)
                       WHEN 'failed' THEN a.error WHEN 'cancelled' THEN coalesce(r.cancel_reason, 'cancelled') ELSE r.error END,
                   parked = workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL) = 'waiting',
                   wait_signal = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL)
                       WHEN 'waiting' THEN a.wait_signal END,
                   wait_children = a.wait_children
                       AND workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL) = 'waiting',
                   wait_any = a.wait_any,
                   wait_until = CASE workflow_becomes(a.kind, a.next_step IS NULL, r.step, r.cancel_requested_at IS NOT NULL)
                       WHEN 'waiting' THEN now() + a.wait_ms * interval '1 millisecond' END,
                   wake = CASE WHEN a.kind = 'fail' OR a.kind IN ('retry', 'release') AND (r.cancel_requested_at IS NULL OR r.step = 'cancel') THEN r.wake END,
                   ready_at = now() + a.delay_ms * interval '1 millisecond',
                   lease_token = NULL, lease_expires_at = NULL, worker = NULL,
                   finished_at = CASE WHEN workflow_becomes(a.kind, a.next_step IS NULL, r.step, false) IN ('succeeded', 'failed', 'cancelled')
                       THEN now() END,
                   event_seq = r.event_seq + 1, updated_at = now()
               FROM unnest($1::uuid[], $2::uuid[], $3::int[], $4::text[], $5::text[], $6::text[], $7::jsonb[], $8::text[], $9::text[],
                           $10::boolean[], $11::bigint[], $12::bigint[], $13::jsonb[], $14::int[], $16::boolean[])
                   AS a(id, token, seq, step, kind, next_step, data, error, wait_signal, wait_children, wait_ms, delay_ms, detail, attempt, wait_any)
               WHERE r.id = a.id AND r.lease_token = a.token AND r.seq = a.seq
               RETURNING r.id, r.workflow, r.version, r.place, r.event_seq, r.priority, r.ready_at, r.parent_id, r.finished_at, r.parked, r.wait_signal,
                         r.wait_children, r.open_children, r.wait_any AND r.ended_children > r.told_children AS untold, a.token, a.step, a.seq, a.attempt, a.kind, a.data, a.detail,
                         CASE WHEN r.finished_at IS NOT NULL THEN r.state
                              WHEN r.parked THEN 'waiting'
                              WHEN r.step = 'cancel' AND a.step <> 'cancel' THEN 'cancelling'
                              WHEN a.kind = 'next' THEN 'step_committed'
                              WHEN a.kind = 'retry' THEN 'retry_scheduled'
                              ELSE 'released' END AS becomes
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, detail, step_seq, output)
               SELECT id, event_seq, becomes, step, attempt, $15, detail,
                      CASE WHEN kind IN ('next', 'done', 'wait') THEN seq END, CASE WHEN kind IN ('next', 'done', 'wait') THEN data END
               FROM written
           )
           SELECT id AS "id!", token AS "token!", parent_id, (finished_at IS NOT NULL) AS "finished!", parked AS "parked!",
                  wait_signal, wait_children AS "wait_children!", open_children AS "open_children!", untold AS "untold!",
                  CASE WHEN finished_at IS NULL AND NOT parked
                       THEN workflow_hint(id, workflow_queue(workflow, version, place), event_seq, ready_at, priority) IS NOT NULL END AS hinted
           FROM written"#,
        &all(commits, |c| c.of.run_id),
        &all(commits, |c| c.of.token),
        &all(commits, |c| c.of.seq),
        &all(commits, |c| c.step) as &[&str],
        &all(commits, |c| c.kind) as &[&str],
        &all(commits, |c| c.next_step) as &[Option<&str>],
        &all(commits, |c| &c.data) as &[&Value],
        &all(commits, |c| c.error.as_deref()) as &[Option<&str>],
        &all(commits, |c| c.wait_signal.as_deref()) as &[Option<&str>],
        &all(commits, |c| c.wait_children != Children::None),
        &all(commits, |c| c.wait_ms) as &[Option<i64>],
        &all(commits, |c| c.delay_ms),
        &all(commits, Commit::detail),
        &all(commits, |c| c.of.attempt),
        worker,
        &all(commits, |c| c.wait_children == Children::Any),
    )
    .fetch_all(&mut *conn)
    .await?;

    let mut written = HashSet::with_capacity(rows.len());
    let (mut sleeping, mut wakes, mut parents) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        written.insert((row.id, row.token));
        if row.parked && row.wait_children && (row.open_children == 0 || row.untold) {
            wakes.push((row.id, by_children(row.open_children)));
        } else if row.parked && row.wait_signal.is_some() {
            sleeping.push(row.id);
        }
        if row.finished {
            parents.extend(row.parent_id);
        }
    }
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
    Ok(written)
}

/// Why children wake a run: the last of them has ended, or one of them.
fn by_children(open: i32) -> Value {
    json!({"by": if open == 0 { "children" } else { "child" }})
}

/// Counts ended children off their parents (one entry per child) and wakes those parents that waited for it, or for the last.
pub(crate) async fn children_ended(conn: &mut PgConnection, parents: &[Uuid]) -> Result<()> {
    if parents.is_empty() {
        return Ok(());
    }
    let ready = sqlx::query!(
        "WITH ended AS (
             SELECT id, count(*)::int AS children FROM unnest($1::uuid[]) AS t(id) GROUP BY id
         ), held AS (
             SELECT r.id FROM workflow_runs r JOIN ended USING (id) ORDER BY r.id FOR UPDATE OF r
         ), counted AS (
             UPDATE workflow_runs r
             SET open_children = greatest(r.open_children - e.children, 0), ended_children = r.ended_children + e.children
             FROM ended e JOIN held USING (id) WHERE r.id = e.id
             RETURNING r.id, r.open_children, r.parked AND r.wait_children AND (r.wait_any OR r.open_children = 0) AS waits
         )
         SELECT id, open_children FROM counted WHERE waits",
        parents,
    )
    .fetch_all(&mut *conn)
    .await?;
    let wakes: Vec<_> = ready.into_iter().map(|row| (row.id, by_children(row.open_children))).collect();
    wake_up(conn, &wakes).await?;
    Ok(())
}

/// Hands outcomes to the committers and waits for the commit.
#[derive(Debug, Clone)]
pub(crate) struct Committer {
    lanes: Vec<mpsc::Sender<Waiting>>,
}

type Waiting = (Commit, oneshot::Sender<Written>);

impl Committer {
    /// Starts the committers of this process. They end with the tasks of `tasks`.
    pub fn spawn(pool: &Pool, worker: &str, tasks: &Tasks) -> Self {
        let lane = || {
            let (queue, inbox) = mpsc::channel(COMMIT_BATCH * 2);
            // Outcomes that wait are there for the next one, should this one panic. Those in its hands count as lost.
            let (inbox, pool, worker) = (Arc::new(Mutex::new(inbox)), pool.clone(), worker.to_owned());
            tasks.keep_until_stopped("commit", move || run(pool.clone(), worker.clone(), inbox.clone()));
            queue
        };
        Self { lanes: (0..COMMIT_LANES).map(|_| lane()).collect() }
    }

    /// Writes one outcome. [`Written::Lost`] also when Postgres stayed away until the lease must have been lost.
    pub async fn commit(&self, commit: Commit) -> Written {
        let (done, answer) = oneshot::channel();
        let lane = commit.of.run_id.as_u128() % (self.lanes.len().max(1) as u128);
        let Some(queue) = self.lanes.get(usize::try_from(lane).unwrap_or(0)) else { return Written::Lost };
        if queue.send((commit, done)).await.is_err() {
            return Written::Lost;
        }
        answer.await.unwrap_or(Written::Lost)
    }
}

async fn run(pool: Pool, worker: String, inbox: Arc<Mutex<mpsc::Receiver<Waiting>>>) {
    let mut inbox = inbox.lock().await;
    let mut batch = Vec::with_capacity(COMMIT_BATCH);
    while inbox.recv_many(&mut batch, COMMIT_BATCH).await > 0 {
        let (alone, others): (Vec<Waiting>, Vec<Waiting>) = batch.drain(..).partition(|(commit, _)| commit.is_alone());
        for part in [alone, others].into_iter().filter(|part| !part.is_empty()) {
            let (commits, waiting): (Vec<_>, Vec<_>) = part.into_iter().unzip();
            METERS.commit_batch.observe(f64::from(u32::try_from(commits.len()).unwrap_or(u32::MAX)));
            let started = Instant::now();
            let answers = persist(&pool, &worker, &commits).await;
            METERS.commit_seconds.observe(started.elapsed().as_secs_f64());
            for (done, written) in waiting.into_iter().zip(answers) {
                let _ = done.send(written);
            }
        }
    }
}

/// Commits a batch, trying again while Postgres is away and the leases may still be ours. When a batch is refused for
/// what one of its rows holds, the rows go one by one, so that one bad outcome fails alone.
async fn persist(pool: &Pool, worker: &str, commits: &[Commit]) -> Vec<Written> {
    let started = tokio::time::Instant::now();
    loop {
        match transaction(pool, worker, commits).await {
            Ok(written) => {
                metrics::count(commits, &written);
                return written;
            }
            Err(error) if is_transient(&error) => {
                metrics::failed("commit", &error);
                if started.elapsed() > LEASE {
                    tracing::error!(?error, count = commits.len(), "outcomes dropped: their leases are over");
                    let lost = vec![Written::Lost; commits.len()];
                    metrics::count(commits, &lost);
                    return lost;
                }
                tracing::warn!(?error, "commit failed, trying again");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) if commits.len() == 1 => {
                let Some(refused) = commits.first().filter(|commit| commit.kind != "fail") else {
                    metrics::count(commits, &[Written::Lost]);
                    return vec![Written::Lost];
                };
                tracing::error!(?error, run_id = %refused.of.run_id, "outcome refused by the database");
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

/// Writes a batch as a whole, also one that may have been written before.
pub(crate) async fn transaction(pool: &Pool, worker: &str, commits: &[Commit]) -> Result<Vec<Written>> {
    let written = if commits.iter().all(Commit::is_alone) {
        write(&mut *pool.acquire().await?, worker, commits).await?
    } else {
        let mut tx = pool.begin().await?;
        let written = write(&mut tx, worker, commits).await?;
        tx.commit().await?;
        written
    };
    let doubtful = |(commit, written): (&Commit, &Written)| commit.keeps && *written == Written::Lost;
    if commits.iter().zip(&written).any(doubtful) { repair(pool, commits, written).await } else { Ok(written) }
}

/// An earlier try may have been committed although its answer was lost. Then the lease is still ours, one step further.
async fn repair(pool: &Pool, commits: &[Commit], mut written: Vec<Written>) -> Result<Vec<Written>> {
    let (ids, tokens): (Vec<Uuid>, Vec<Uuid>) = commits.iter().map(|commit| (commit.of.run_id, commit.of.token)).unzip();
    let seqs: Vec<i32> = commits.iter().map(|commit| commit.of.seq).collect();
    let ours = sqlx::query!(
        r#"SELECT r.id, t.token AS "token!" FROM workflow_runs r JOIN unnest($1::uuid[], $2::uuid[], $3::int[]) AS t(id, token, seq)
               ON r.id = t.id AND r.lease_token = t.token AND r.seq = t.seq + 1"#,
        &ids,
        &tokens,
        &seqs,
    )
    .fetch_all(pool)
    .await?;
    let ours: HashSet<Lease> = ours.into_iter().map(|row| (row.id, row.token)).collect();
    for (answer, commit) in written.iter_mut().zip(commits) {
        if *answer == Written::Lost && commit.keeps && ours.contains(&commit.of.lease()) {
            *answer = Written::Kept;
        }
    }
    Ok(written)
}
