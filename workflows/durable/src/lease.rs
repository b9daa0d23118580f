//! What this process holds: one statement every three seconds renews all of it, and tells of cancellation and of loss.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus::IntCounter;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    LEASE, Pool, RENEW_EVERY, Result,
    metrics::{self, METERS},
};

/// The leases of one process, by run. A run has at most one lease, and so at most one entry with a valid token.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<HashMap<Uuid, Held>>>);

#[derive(Debug, Clone)]
struct Held {
    token: Uuid,
    stop: CancellationToken,
    renewed: tokio::time::Instant,
    /// Whether it is known to be somebody else's.
    is_lost: bool,
}

impl Held {
    /// Tells the step to stop; counts the loss the first time.
    fn lose(&mut self, noticed: &IntCounter) {
        if !std::mem::replace(&mut self.is_lost, true) {
            noticed.inc();
        }
        self.stop.cancel();
    }
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to renew the lease of a claimed run. `stop` fires when the run is cancelled or the lease is lost.
    pub fn hold(&self, run: Uuid, token: Uuid, stop: CancellationToken) {
        let mut held = self.lock();
        held.insert(run, Held { token, stop, renewed: tokio::time::Instant::now(), is_lost: false });
        METERS.leases.set(i64::try_from(held.len()).unwrap_or(i64::MAX));
    }

    /// Stops renewing, if the lease is still the one of `token`.
    pub fn release(&self, run: Uuid, token: Uuid) {
        let mut held = self.lock();
        if held.get(&run).is_some_and(|held| held.token == token) {
            held.remove(&run);
            METERS.leases.set(i64::try_from(held.len()).unwrap_or(i64::MAX));
        }
    }

    /// Tells every running step to stop.
    pub fn stop_all(&self) {
        self.lock().values().for_each(|held| held.stop.cancel());
    }

    /// Renews until `stop`.
    pub async fn keep(self, pool: Pool, stop: CancellationToken) {
        let mut every = tokio::time::interval(RENEW_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(every.tick()).await.is_some() {
            if let Err(error) = self.renew(&pool).await {
                metrics::failed("renewal", &error);
                tracing::warn!(?error, "leases not renewed");
            }
            // Without word from Postgres for a whole lease, another worker may have taken over.
            for (run_id, held) in self.lock().iter_mut().filter(|(_, held)| held.renewed.elapsed() > LEASE) {
                tracing::warn!(%run_id, "lease lost: not renewed in time");
                held.lose(&METERS.lost_in_silence);
            }
        }
    }

    async fn renew(&self, pool: &Pool) -> Result<()> {
        let (runs, tokens): (Vec<Uuid>, Vec<Uuid>) = self.lock().iter().map(|(run, held)| (*run, held.token)).unzip();
        if runs.is_empty() {
            return Ok(());
        }
        let asked_at = tokio::time::Instant::now();
        let renewed = renew(pool, &runs, &tokens).await?;
        let mut all = self.lock();
        for row in &renewed {
            if let Some(held) = all.get_mut(&row.run_id).filter(|held| held.token == row.token) {
                held.renewed = asked_at;
                if row.cancelled {
                    held.stop.cancel();
                }
            }
        }
        let kept: HashMap<Uuid, Uuid> = renewed.into_iter().map(|row| (row.run_id, row.token)).collect();
        for (run, token) in runs.into_iter().zip(tokens) {
            // Not renewed and still ours to hold: taken over. A step that has just committed is not held any more.
            if kept.get(&run) != Some(&token)
                && let Some(held) = all.get_mut(&run).filter(|held| held.token == token)
            {
                held.lose(&METERS.lost_at_renewal);
            }
        }
        Ok(())
    }
}

/// A lease that was still held and now is again for [`LEASE`].
#[derive(Debug, Clone, Copy)]
pub struct Renewed {
    /// The run.
    pub run_id: Uuid,
    /// Its token.
    pub token: Uuid,
    /// Whether the running step is to stop, because a cancel was asked for.
    pub cancelled: bool,
}

/// Renews the leases of `runs` with these `tokens`, and answers those that still were theirs.
pub(crate) async fn renew(pool: &Pool, runs: &[Uuid], tokens: &[Uuid]) -> Result<Vec<Renewed>> {
    sqlx::query_as!(
        Renewed,
        r#"WITH held AS (
               SELECT r.id FROM workflow_runs r JOIN unnest($1::uuid[], $2::uuid[]) AS t(id, token) ON r.id = t.id AND r.lease_token = t.token
               ORDER BY r.id FOR UPDATE OF r
           )
           UPDATE workflow_runs r SET lease_expires_at = now() + interval '10 seconds' FROM held WHERE r.id = held.id
           RETURNING r.id AS run_id, r.lease_token AS "token!", (r.cancel_requested_at IS NOT NULL AND r.step <> 'cancel') AS "cancelled!""#,
        runs,
        tokens,
    )
    .fetch_all(pool)
    .await
}
