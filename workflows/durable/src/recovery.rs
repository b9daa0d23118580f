//! What goes on when nobody is there to do it: runs of dead workers, waits that are over, hints that were lost. Every
//! worker process does it; rows are taken with SKIP LOCKED, so any number may.

use chrono::{DateTime, Utc};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    MAX_WORKER_DEATHS, Pool, RECOVER_BATCH, RECOVER_EVERY, Result,
    commit::children_ended,
    definition::{Registry, Services},
    gate::Gate,
    metrics::{self, METERS},
    start::wake_up,
};

/// How many passes lie between two steps of the search for lost hints.
const PASSES_BETWEEN_STEPS: u32 = 4;
/// How many runs one step of the search looks at.
const STEP_RUNS: i64 = 1_000;

/// Recovers until `stop`.
pub async fn keep<S: Services>(pool: Pool, registry: Registry<S>, gate: Gate, stop: CancellationToken) {
    let mut every = tokio::time::interval(RECOVER_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut pass, mut search) = (0_u32, Search::default());
    while stop.run_until_cancelled(every.tick()).await.is_some() {
        if !gate.is_open() {
            continue;
        }
        let done = async {
            while expired_leases(&pool, &registry).await? == usize::try_from(RECOVER_BATCH).unwrap_or(usize::MAX) {}
            while ended_waits(&pool).await? == usize::try_from(RECOVER_BATCH).unwrap_or(usize::MAX) {}
            if pass.is_multiple_of(PASSES_BETWEEN_STEPS) {
                // Where one is lost, more are.
                while search.step(&pool).await? > 0 {}
            }
            Ok::<_, sqlx::Error>(())
        };
        if let Err(error) = done.await {
            metrics::failed("recovery", &error);
            tracing::warn!(?error, "recovery pass failed");
        }
        pass = pass.wrapping_add(1);
    }
}

/// What becomes of a run whose worker is gone. Pure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The step runs again elsewhere.
    Again,
    /// The run fails with this code.
    Fails(&'static str),
}

/// Decides it from the deaths so far, this one included, and whether the step may be repeated.
#[must_use]
pub fn fate(deaths: i32, never_retry: bool) -> Fate {
    if never_retry {
        Fate::Fails("interrupted")
    } else if deaths >= MAX_WORKER_DEATHS {
        Fate::Fails("worker_lost")
    } else {
        Fate::Again
    }
}

/// Takes back the runs whose lease has run out. Answers how many.
///
/// In the first lease period after a start of Postgres nothing is taken back: the living could not renew while it was away.
///
/// # Errors
/// When the database refuses.
pub async fn expired_leases<S: Services>(pool: &Pool, registry: &Registry<S>) -> Result<usize> {
    let mut tx = pool.begin().await?;
    let lost = sqlx::query!(
        "SELECT id, workflow, version, step, attempt, worker, worker_deaths FROM workflow_runs
         WHERE lease_token IS NOT NULL AND lease_expires_at < now() AND pg_postmaster_start_time() < now() - interval '10 seconds'
         ORDER BY lease_expires_at LIMIT $1 FOR UPDATE SKIP LOCKED",
        RECOVER_BATCH,
    )
    .fetch_all(&mut *tx)
    .await?;
    if lost.is_empty() {
        return Ok(0);
    }
    let mut ids = Vec::new();
    let mut errors: Vec<Option<String>> = Vec::new();
    for run in &lost {
        let step = registry.find(&run.workflow, run.version).and_then(|workflow| workflow.find(&run.step));
        let fate = fate(run.worker_deaths + 1, step.is_some_and(|step| step.never_retry));
        tracing::warn!(run_id = %run.id, workflow = run.workflow, step = run.step, worker = run.worker, ?fate, "worker lost");
        ids.push(run.id);
        errors.push(match fate {
            Fate::Again => None,
            Fate::Fails(code) => Some(format!(
                "{code}: the worker {} was lost in step {} (attempt {}).",
                run.worker.as_deref().unwrap_or("?"),
                run.step,
                run.attempt
            )),
        });
    }
    let rows = sqlx::query!(
        r#"WITH lost AS (
               SELECT * FROM unnest($1::uuid[], $2::text[]) AS t(id, error)
           ), taken AS (
               UPDATE workflow_runs r
               SET lease_token = NULL, lease_expires_at = NULL, worker = NULL, worker_deaths = r.worker_deaths + 1,
                   state = CASE WHEN l.error IS NOT NULL THEN 'failed'
                                WHEN r.cancel_requested_at IS NOT NULL THEN 'cancelling' ELSE 'pending' END,
                   step = CASE WHEN l.error IS NULL AND r.cancel_requested_at IS NOT NULL THEN 'cancel' ELSE r.step END,
                   error = coalesce(l.error, r.error), finished_at = CASE WHEN l.error IS NOT NULL THEN now() END,
                   ready_at = now(), event_seq = r.event_seq + 1, updated_at = now()
               FROM lost l, workflow_runs old
               WHERE r.id = l.id AND old.id = r.id
               RETURNING r.id, r.workflow, r.version, r.place, r.event_seq, r.priority, r.ready_at, r.parent_id, r.finished_at, r.error,
                         old.step, old.attempt, old.worker, r.worker_deaths
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, detail)
               SELECT id, event_seq, CASE WHEN finished_at IS NULL THEN 'worker_lost' ELSE 'failed' END, step, attempt, coalesce(worker, ''),
                      jsonb_strip_nulls(jsonb_build_object('deaths', worker_deaths, 'error', CASE WHEN finished_at IS NOT NULL THEN error END))
               FROM taken
           )
           SELECT parent_id, (finished_at IS NOT NULL) AS "finished!",
                  CASE WHEN finished_at IS NULL THEN workflow_hint(id, workflow_queue(workflow, version, place), event_seq, ready_at, priority) IS NOT NULL END AS hinted
           FROM taken"#,
        &ids,
        &errors as &[Option<String>],
    )
    .fetch_all(&mut *tx)
    .await?;
    let parents: Vec<Uuid> = rows.iter().filter(|row| row.finished).filter_map(|row| row.parent_id).collect();
    children_ended(&mut tx, &parents).await?;
    tx.commit().await?;
    for (run, error) in lost.iter().zip(&errors) {
        match error {
            None => METERS.run_again.inc(),
            Some(_) => {
                METERS.run_failed.inc();
                metrics::run_failed_by_recovery(run.id, &run.workflow);
            }
        }
    }
    Ok(lost.len())
}

/// Wakes the runs whose wait has passed its instant. Answers how many.
///
/// # Errors
/// When the database refuses.
pub async fn ended_waits(pool: &Pool) -> Result<usize> {
    let mut tx = pool.begin().await?;
    let ended = sqlx::query_scalar!(
        "SELECT id FROM workflow_runs WHERE parked AND wait_until <= now() ORDER BY wait_until LIMIT $1 FOR UPDATE SKIP LOCKED",
        RECOVER_BATCH,
    )
    .fetch_all(&mut *tx)
    .await?;
    if ended.is_empty() {
        return Ok(0);
    }
    let wakes: Vec<_> = ended.into_iter().map(|id| (id, json!({"by": "deadline"}))).collect();
    let count = wake_up(&mut tx, &wakes).await?;
    tx.commit().await?;
    METERS.waits_ended.inc_by(u64::try_from(count).unwrap_or(0));
    Ok(count)
}

/// The search for runs that have been ready for a while and have no hint: somebody emptied the queue by hand. It walks over
/// all that is ready, oldest first, a piece at a time, so that its cost does not grow with what waits.
#[derive(Debug, Default)]
pub struct Search {
    /// The last run looked at.
    after: Option<(DateTime<Utc>, Uuid)>,
}

impl Search {
    /// Looks at the next piece, and writes a new hint for those of its runs that have none. Answers how many. Begins again
    /// after the last piece.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn step(&mut self, pool: &Pool) -> Result<usize> {
        let (after_at, after_id) = self.after.unzip();
        let row = sqlx::query!(
            r#"WITH piece AS MATERIALIZED (
                   SELECT r.id, r.ready_at, r.event_seq FROM workflow_runs r
                   WHERE r.state IN ('pending', 'cancelling') AND r.lease_token IS NULL AND NOT r.parked
                     AND r.ready_at < now() - interval '10 seconds'
                     AND (r.ready_at, r.id) > (coalesce($1, '-infinity'::timestamptz), coalesce($2, '00000000-0000-0000-0000-000000000000'::uuid))
                   ORDER BY r.ready_at, r.id LIMIT $3
               ), without AS MATERIALIZED (
                   SELECT p.id, p.event_seq FROM piece p
                   -- Not NOT EXISTS: as a join it reads the whole queue for every run when statistics call it empty.
                   WHERE (SELECT j.id FROM apalis.jobs j WHERE j.id = p.id || ':' || p.event_seq) IS NULL
               ), lost AS (
                   SELECT r.id, workflow_queue(r.workflow, r.version, r.place) AS queue, r.event_seq, r.priority
                   FROM without w JOIN workflow_runs r ON r.id = w.id
                   -- It may have been claimed since.
                   WHERE r.event_seq = w.event_seq AND r.state IN ('pending', 'cancelling') AND r.lease_token IS NULL AND NOT r.parked
                   FOR UPDATE OF r SKIP LOCKED
               ), hinted AS (
                   SELECT workflow_hint(id, queue, event_seq, now(), priority) IS NOT NULL AS hinted FROM lost
               )
               SELECT (SELECT count(hinted) FROM hinted) AS "hinted!", (SELECT count(*) FROM piece) AS "seen!",
                      l.ready_at AS "last_at?", l.id AS "last_id?"
               FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
                   SELECT ready_at, id FROM piece ORDER BY ready_at DESC, id DESC LIMIT 1) l ON true"#,
            after_at,
            after_id,
            STEP_RUNS,
        )
        .fetch_one(pool)
        .await?;
        self.after = row.last_at.zip(row.last_id).filter(|_| row.seen >= STEP_RUNS);
        if row.hinted > 0 {
            METERS.hints_rewritten.inc_by(u64::try_from(row.hinted).unwrap_or(0));
            tracing::warn!(count = row.hinted, "runs without a hint were queued again");
        }
        Ok(usize::try_from(row.hinted).unwrap_or(0))
    }
}

/// Searches all that is ready once. Answers how many hints were lost.
///
/// # Errors
/// When the database refuses.
pub async fn lost_hints(pool: &Pool) -> Result<usize> {
    let (mut search, mut lost) = (Search::default(), 0);
    loop {
        lost += search.step(pool).await?;
        if search.after.is_none() {
            return Ok(lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_death_in_a_step_fails_the_run() {
        assert_eq!(fate(1, false), Fate::Again);
        assert_eq!(fate(2, false), Fate::Again);
        assert_eq!(fate(3, false), Fate::Fails("worker_lost"));
        assert_eq!(fate(1, true), Fate::Fails("interrupted"), "a step that must not be repeated is not");
    }
}
