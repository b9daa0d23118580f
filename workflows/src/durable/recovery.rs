//! What goes on when nobody is there to do it: runs of dead workers, waits that are over, hints that were lost. Every
//! worker process does it; rows are taken with SKIP LOCKED, so any number may.

use borealis_engine::{Result, db::Pool};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{MAX_WORKER_DEATHS, RECOVER_BATCH, RECOVER_EVERY, commit::children_ended, definition::Registry, start::wake_up};
use crate::metrics::{self, METERS};

/// How many passes lie between two searches for lost hints.
const PASSES_BETWEEN_SWEEPS: u32 = 40;

/// Recovers until `stop`.
pub async fn keep(pool: Pool, registry: Registry, stop: CancellationToken) {
    let mut every = tokio::time::interval(RECOVER_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pass = 0_u32;
    while stop.run_until_cancelled(every.tick()).await.is_some() {
        let done = async {
            while expired_leases(&pool, &registry).await? == usize::try_from(RECOVER_BATCH).unwrap_or(usize::MAX) {}
            while ended_waits(&pool).await? == usize::try_from(RECOVER_BATCH).unwrap_or(usize::MAX) {}
            if pass.is_multiple_of(PASSES_BETWEEN_SWEEPS) {
                lost_hints(&pool).await?;
            }
            Ok::<_, borealis_engine::Error>(())
        };
        if let Err(error) = done.await {
            metrics::failed_pass("recovery");
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
pub async fn expired_leases(pool: &Pool, registry: &Registry) -> Result<usize> {
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
               RETURNING r.id, r.workflow, r.version, r.event_seq, r.priority, r.ready_at, r.parent_id, r.finished_at, r.error,
                         old.step, old.attempt, old.worker, r.worker_deaths
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, detail)
               SELECT id, event_seq, CASE WHEN finished_at IS NULL THEN 'worker_lost' ELSE 'failed' END, step, attempt, coalesce(worker, ''),
                      jsonb_strip_nulls(jsonb_build_object('deaths', worker_deaths, 'error', CASE WHEN finished_at IS NOT NULL THEN error END))
               FROM taken
           )
           SELECT parent_id, (finished_at IS NOT NULL) AS "finished!",
                  CASE WHEN finished_at IS NULL THEN workflow_hint(id, workflow || '.v' || version, event_seq, ready_at, priority) IS NOT NULL END AS hinted
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

/// Writes a new hint for runs that have been ready for a while and have none: somebody emptied the queue by hand.
///
/// # Errors
/// When the database refuses.
pub async fn lost_hints(pool: &Pool) -> Result<usize> {
    let rows = sqlx::query!(
        r#"WITH ready AS (
               SELECT r.id, r.workflow || '.v' || r.version AS queue, r.event_seq, r.priority FROM workflow_runs r
               WHERE r.state IN ('pending', 'cancelling') AND r.lease_token IS NULL AND NOT r.parked AND r.ready_at < now() - interval '10 seconds'
                 AND NOT EXISTS (SELECT FROM apalis.jobs j WHERE j.id = r.id || ':' || r.event_seq)
               ORDER BY r.ready_at LIMIT $1 FOR UPDATE OF r SKIP LOCKED
           )
           SELECT workflow_hint(id, queue, event_seq, now(), priority) IS NOT NULL AS hinted FROM ready"#,
        RECOVER_BATCH,
    )
    .fetch_all(pool)
    .await?;
    if !rows.is_empty() {
        METERS.hints_rewritten.inc_by(u64::try_from(rows.len()).unwrap_or(0));
        tracing::warn!(count = rows.len(), "runs without a hint were queued again");
    }
    Ok(rows.len())
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
