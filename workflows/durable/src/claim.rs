//! From hints to leased runs: the backend an apalis worker polls.
//!
//! One statement consumes the hints at the head of a queue and leases the runs they point to, with a fresh token each. A
//! hint whose run is not ready any more is consumed and forgotten.

use std::{
    collections::BTreeMap,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use apalis_core::{
    backend::{Backend, BackendConfig, finalize::Ephemeral},
    task::Task,
    worker::context::WorkerContext,
};
use borealis_tasks::Tasks;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use uuid::Uuid;

use crate::{
    CLAIM_BATCH, POLL_EVERY, Pool, Result,
    gate::Gate,
    metrics::{self, METERS},
    wakeup::{Sleep, Wakeup},
};

/// A leased run whose present step this process may run.
#[derive(Debug)]
pub struct Claim {
    pub(crate) run_id: Uuid,
    pub(crate) token: Uuid,
    pub(crate) step: String,
    pub(crate) seq: i32,
    pub(crate) attempt: i32,
    pub(crate) input: Value,
    pub(crate) state: Value,
    pub(crate) wake: Option<Value>,
    pub(crate) is_child: bool,
    /// Given back when the step has ended.
    pub(crate) slot: Option<OwnedSemaphorePermit>,
}

/// Leases up to `limit` ready runs of `queue` to `worker`.
///
/// Rows are found by `= ANY (ARRAY(...))` and not by joins: a queue that was vacuumed while it was empty counts as empty for the
/// planner however full it is, and then a join reads all of it for every hint.
///
/// # Errors
/// When the database refuses.
pub async fn claim(pool: &Pool, queue: &str, worker: &str, limit: usize) -> Result<Vec<Claim>> {
    let limit = i64::try_from(limit.min(CLAIM_BATCH)).unwrap_or(1);
    let rows = sqlx::query!(
        r#"WITH hint AS (
               SELECT j.id, encode(j.job, 'hex')::uuid AS run_id FROM apalis.jobs j
               WHERE j.job_type = $1 AND j.status = 'Pending' AND j.run_at <= now()
               ORDER BY j.priority DESC, j.run_at LIMIT $2 FOR UPDATE SKIP LOCKED
           ), run AS (
               SELECT r.id, r.limit_keys <> '{}' AS limited,
                      r.lease_token IS NULL AND r.state IN ('pending', 'cancelling') AND NOT r.parked AS ready
               FROM workflow_runs r WHERE r.id = ANY (ARRAY(SELECT run_id FROM hint))
               ORDER BY r.id FOR UPDATE OF r
           ), consumed AS (
               DELETE FROM apalis.jobs j WHERE j.id = ANY (ARRAY(
                   SELECT h.id FROM hint h WHERE h.run_id <> ALL (ARRAY(SELECT id FROM run WHERE limited AND ready))))
           ), leased AS (
               UPDATE workflow_runs r
               SET lease_token = gen_random_uuid(), lease_expires_at = now() + interval '10 seconds', worker = $3,
                   state = CASE WHEN r.state = 'pending' THEN 'running' ELSE r.state END,
                   attempt = r.attempt + 1, event_seq = r.event_seq + 1,
                   started_at = coalesce(r.started_at, now()), updated_at = now()
               WHERE r.id = ANY (ARRAY(SELECT id FROM run WHERE ready AND NOT limited))
               RETURNING r.id, r.lease_token, r.step, r.seq, r.attempt, r.event_seq, r.input, r.state_data, r.wake, r.parent_id
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker)
               SELECT id, event_seq, 'step_started', step, attempt, $3 FROM leased
           )
           SELECT id AS "id?", lease_token AS "lease_token?", step AS "step?", seq AS "seq?", attempt AS "attempt?", input AS "input?",
                  state_data AS "state_data?", wake AS "wake?", (parent_id IS NOT NULL) AS "is_child!", false AS "limited!" FROM leased
           UNION ALL
           SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, false, true WHERE EXISTS (SELECT FROM run WHERE limited AND ready)"#,
        queue,
        limit,
        worker,
    )
    .fetch_all(pool)
    .await?;
    let mut limited = false;
    let mut claims = Vec::with_capacity(rows.len());
    for row in rows {
        limited |= row.limited;
        if let (Some(run_id), Some(token), Some(step), Some(seq), Some(attempt), Some(input), Some(state)) =
            (row.id, row.lease_token, row.step, row.seq, row.attempt, row.input, row.state_data)
        {
            claims.push(Claim {
                run_id,
                token,
                step,
                seq,
                attempt,
                input,
                state,
                wake: row.wake,
                is_child: row.is_child,
                slot: None,
            });
        }
    }
    if limited {
        claims.extend(claim_limited(pool, queue, worker, limit - i64::try_from(claims.len()).unwrap_or(limit)).await?);
    }
    Ok(claims)
}

/// Leases runs whose keys are bounded. Who holds a key is read from the leases themselves, so a dead worker frees its keys
/// with its leases; one claimer at a time decides, so that no bound is passed.
async fn claim_limited(pool: &Pool, queue: &str, worker: &str, limit: i64) -> Result<Vec<Claim>> {
    let mut tx = pool.begin().await?;
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtext('borealis.workflow_limits'))").execute(&mut *tx).await?;
    let candidates = sqlx::query!(
        r#"SELECT j.id, r.id AS run_id, r.limit_keys FROM apalis.jobs j JOIN workflow_runs r ON r.id = encode(j.job, 'hex')::uuid
           WHERE j.job_type = $1 AND j.status = 'Pending' AND j.run_at <= now() AND r.limit_keys <> '{}'
             AND r.lease_token IS NULL AND r.state IN ('pending', 'cancelling') AND NOT r.parked
           ORDER BY j.priority DESC, j.run_at LIMIT $2 FOR UPDATE OF j, r SKIP LOCKED"#,
        queue,
        limit.max(1),
    )
    .fetch_all(&mut *tx)
    .await?;
    let keys: Vec<String> = candidates.iter().flat_map(|candidate| candidate.limit_keys.clone()).collect();
    let mut free: BTreeMap<String, i64> = sqlx::query!(
        r#"SELECT l.key, l.bound - (SELECT count(*) FROM workflow_runs r WHERE r.lease_token IS NOT NULL AND l.key = ANY (r.limit_keys)) AS "free!"
           FROM workflow_limits l WHERE l.key = ANY ($1)"#,
        &keys,
    )
    .fetch_all(&mut *tx)
    .await?
    .into_iter()
    .map(|row| (row.key, row.free))
    .collect();
    let (mut admitted, mut hints, mut deferred) = (Vec::new(), Vec::new(), Vec::new());
    for candidate in candidates {
        if admit(&mut free, &candidate.limit_keys) {
            admitted.push(candidate.run_id);
            hints.push(candidate.id);
        } else {
            deferred.push(candidate.id);
        }
    }
    sqlx::query!("DELETE FROM apalis.jobs WHERE id = ANY ($1)", &hints).execute(&mut *tx).await?;
    sqlx::query!("UPDATE apalis.jobs SET run_at = now() + interval '1 second' WHERE id = ANY ($1)", &deferred)
        .execute(&mut *tx)
        .await?;
    let rows = sqlx::query!(
        r#"WITH leased AS (
               UPDATE workflow_runs r
               SET lease_token = gen_random_uuid(), lease_expires_at = now() + interval '10 seconds', worker = $2,
                   state = CASE WHEN r.state = 'pending' THEN 'running' ELSE r.state END,
                   attempt = r.attempt + 1, event_seq = r.event_seq + 1,
                   started_at = coalesce(r.started_at, now()), updated_at = now()
               WHERE r.id = ANY ($1)
               RETURNING r.id, r.lease_token, r.step, r.seq, r.attempt, r.event_seq, r.input, r.state_data, r.wake, r.parent_id
           ), event AS (
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker)
               SELECT id, event_seq, 'step_started', step, attempt, $2 FROM leased
           )
           SELECT id, lease_token AS "lease_token!", step, seq, attempt, input, state_data, wake, (parent_id IS NOT NULL) AS "is_child!" FROM leased"#,
        &admitted,
        worker,
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(rows
        .into_iter()
        .map(|row| Claim {
            run_id: row.id,
            token: row.lease_token,
            step: row.step,
            seq: row.seq,
            attempt: row.attempt,
            input: row.input,
            state: row.state_data,
            wake: row.wake,
            is_child: row.is_child,
            slot: None,
        })
        .collect())
}

/// Takes one place under each bounded key, or none at all.
fn admit(free: &mut BTreeMap<String, i64>, keys: &[String]) -> bool {
    if keys.iter().any(|key| free.get(key).is_some_and(|free| *free < 1)) {
        return false;
    }
    for key in keys {
        if let Some(free) = free.get_mut(key) {
            *free -= 1;
        }
    }
    true
}

/// The backend of one queue: a fetcher that claims no more than there are free slots, woken by notifications and by the
/// poll interval, and the channel through which an apalis worker polls what it claimed.
#[derive(Debug)]
pub struct DurableBackend {
    claims: mpsc::Receiver<Claim>,
}

/// Why a backend's poll failed: it does not; trouble with Postgres is waited out.
#[derive(Debug, thiserror::Error)]
#[error("the backend has ended")]
pub struct BackendEnded;

impl DurableBackend {
    pub(crate) fn spawn(fetcher: Fetcher, tasks: &Tasks) -> Self {
        let (sender, claims) = mpsc::channel(CLAIM_BATCH);
        let fetcher = Arc::new(fetcher);
        // A claim cut off in flight either did not happen or is found by recovery.
        tasks.keep_until_done("fetch", move || {
            let (fetcher, sender) = (fetcher.clone(), sender.clone());
            async move {
                tokio::select! {
                    () = fetcher.fetch(&sender) => {}
                    // The queue's worker was started again, with a fetcher of its own.
                    () = sender.closed() => {}
                }
            }
        });
        Self { claims }
    }
}

/// What claims the runs of one queue.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub pool: Pool,
    pub queue: String,
    pub worker: String,
    pub slots: Arc<Semaphore>,
    pub wakeup: Wakeup,
    pub poll_every: Duration,
    pub gate: Gate,
}

impl Fetcher {
    /// Claims for as long as there is something to claim, then sleeps until a writer of a hint wakes it. It falls asleep only
    /// when no such writer is under way, and looks once more then.
    async fn fetch(&self, claims: &mpsc::Sender<Claim>) {
        let Self { pool, queue, worker, slots, wakeup, poll_every, gate } = self;
        let (took, leased) = (METERS.claims.with_label_values(&[queue]), METERS.claimed.with_label_values(&[queue]));
        let mut pause = FIRST_PAUSE;
        loop {
            gate.opened().await;
            let woken = wakeup.listen(queue);
            tokio::pin!(woken);
            woken.as_mut().enable();
            let Ok(first) = slots.clone().acquire_owned().await else { return };
            let mut permits = vec![first];
            while permits.len() < CLAIM_BATCH {
                let Ok(permit) = slots.clone().try_acquire_owned() else { break };
                permits.push(permit);
            }
            let asked = permits.len();
            let started = Instant::now();
            let claimed = match claim(pool, queue, worker, asked).await {
                Ok(claimed) => claimed,
                Err(error) => {
                    metrics::failed("claim", &error);
                    tracing::warn!(?error, queue, "claim failed");
                    drop(permits);
                    tokio::time::sleep(POLL_EVERY).await;
                    continue;
                }
            };
            took.observe(started.elapsed().as_secs_f64());
            leased.inc_by(u64::try_from(claimed.len()).unwrap_or(0));
            let (full, many) = (claimed.len() == asked, claimed.len() >= MANY);
            if !claimed.is_empty() {
                pause = FIRST_PAUSE;
                wakeup.awake(queue);
            }
            for (mut claim, permit) in claimed.into_iter().zip(permits.drain(..)) {
                claim.slot = Some(permit);
                if claims.send(claim).await.is_err() {
                    return;
                }
            }
            drop(permits);
            if full {
                continue;
            }
            if many {
                // There is more in a moment, and one claim for all of it costs the same.
                tokio::time::sleep(BREATH).await;
            }
            let at_most = match tokio::time::timeout(POLL_EVERY, wakeup.sleep(queue)).await.unwrap_or(Sleep::Deaf) {
                Sleep::Begun => continue,
                Sleep::GoesOn | Sleep::Deaf => *poll_every,
                Sleep::Busy => {
                    let now = pause;
                    pause = (pause * 2).min(LAST_PAUSE);
                    now
                }
            };
            let _ = tokio::time::timeout(at_most, woken).await;
        }
    }
}

/// How long a fetcher that has not got all it asked for waits before it looks again.
const BREATH: Duration = Duration::from_millis(2);
/// How long a fetcher waits before it looks again while a transaction that has written a hint is under way: at first,
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// and at most.
const LAST_PAUSE: Duration = Duration::from_millis(8);
/// A claim of this many runs is taken for load.
const MANY: usize = 4;

impl Backend for DurableBackend {
    type Task = Task<Claim>;
    type Error = BackendEnded;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), BackendEnded>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, _: &WorkerContext) -> Poll<Option<Result<Self::Task, BackendEnded>>> {
        self.claims.poll_recv(cx).map(|claim| claim.map(|claim| Ok(Task::new(claim))))
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), BackendEnded>> {
        Poll::Ready(Ok(()))
    }
}

impl BackendConfig for DurableBackend {
    type Args = Claim;
    type Id = Uuid;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = tower_layer::Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Self::Layer {
        tower_layer::Identity::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_admits_as_many_as_are_free_and_takes_all_keys_or_none() {
        let mut free = BTreeMap::from([("site:1".to_owned(), 2), ("job:9".to_owned(), 1)]);
        let both = ["site:1".to_owned(), "job:9".to_owned()];
        assert!(admit(&mut free, &both));
        assert!(!admit(&mut free, &both), "job:9 is full");
        assert_eq!(free["site:1"], 1, "a refused run takes nothing");
        assert!(admit(&mut free, &["site:1".to_owned(), "unbounded".to_owned()]));
        assert!(!admit(&mut free, &["site:1".to_owned()]));
    }
}
