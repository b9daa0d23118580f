//! What clocks end, and what is deleted because it is old. Every worker process does it; each piece takes its rows under
//! locks it does not wait for.

use std::time::Duration;

use borealis_engine::{
    Result,
    access::api_tokens::KEPT_DAYS,
    db, enrollment,
    jobs::{delivery, occurrence, run},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Services,
    durable::{metrics, start},
    hold::Gate,
    scheduled_run::{self, RESULTS},
};

/// How often deadlines are looked at.
const DEADLINES_EVERY: Duration = Duration::from_secs(1);
/// How many passes over deadlines lie between two sweeps of old rows.
const PASSES_BETWEEN_SWEEPS: u32 = 60;
/// The most rows one piece of work handles.
const BATCH: i64 = 2_000;

/// Enforces deadlines and removes old rows until `stop`.
pub async fn keep(services: Services, history_days: i32, gate: Gate, stop: CancellationToken) {
    let mut every = tokio::time::interval(DEADLINES_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pass = 0_u32;
    let mut behind = false;
    while stop.run_until_cancelled(every.tick()).await.is_some() {
        if !gate.is_open() {
            continue;
        }
        if let Err(error) = deadlines(&services, pass.is_multiple_of(PASSES_BETWEEN_SWEEPS)).await {
            metrics::failed_pass("deadlines");
            tracing::warn!(?error, "deadlines not enforced");
        }
        // One batch in each pass for as long as there is more, so that deadlines never wait for old rows.
        if behind || pass.is_multiple_of(PASSES_BETWEEN_SWEEPS) {
            behind = sweep(&services, history_days).await.unwrap_or_else(|error| {
                metrics::failed_pass("retention");
                tracing::warn!(?error, "old rows not removed");
                false
            });
        }
        pass = pass.wrapping_add(1);
    }
}

/// Ends what is past its deadline and signals the workflow runs that waited for it. `thorough` also looks for what no
/// clock tells of.
///
/// # Errors
/// When the database refuses.
pub async fn deadlines(services: &Services, thorough: bool) -> Result<()> {
    let mut tx = db::begin_wide(&services.pool).await?;
    // One process at a time: the others would only wait for its locks.
    let mine = sqlx::query_scalar!(r#"SELECT pg_try_advisory_xact_lock(hashtext('borealis.deadlines')) AS "mine!""#)
        .fetch_one(&mut *tx)
        .await?;
    if !mine {
        return Ok(());
    }
    let mut workflows: Vec<Uuid> = Vec::new();
    if thorough {
        workflows.extend(delivery::expire_moved(&mut tx).await?.finished.into_iter().map(|finished| finished.workflow_run_id));
    }
    workflows.extend(delivery::expire_undelivered(&mut tx).await?.finished.into_iter().map(|finished| finished.workflow_run_id));
    workflows.extend(delivery::time_out_silent(&mut tx).await?.finished.into_iter().map(|finished| finished.workflow_run_id));
    let stopped = run::enforce_limits(&mut tx, BATCH).await?;
    workflows.extend(stopped.finished_workflows);
    for workflow in workflows {
        start::signal(&mut tx, workflow, RESULTS, &serde_json::Value::Null).await?;
    }
    tx.commit().await?;
    if !stopped.devices.is_empty() {
        services.agents.deliver(&stopped.devices).await?;
    }
    abandoned(services).await
}

/// Closes occurrences whose workflow run has ended without closing them, and starts those that wait for nobody: a run that
/// failed must not hold up its job for ever.
async fn abandoned(services: &Services) -> Result<()> {
    let abandoned = sqlx::query!(
        r#"SELECT o.id, coalesce(w.error, 'the run that carried it out is gone') AS "error!" FROM job_occurrences o
           LEFT JOIN workflow_runs w ON w.id = o.workflow_run_id
           WHERE o.state = 'open' AND o.created_at < now() - interval '10 seconds'
             AND (w.id IS NULL OR w.finished_at < now() - interval '5 seconds')
           ORDER BY o.id LIMIT $1"#,
        BATCH,
    )
    .fetch_all(&services.pool)
    .await?;
    for occurrence in abandoned {
        let mut tx = services.pool.begin().await?;
        occurrence::fail_unsent(&mut tx, occurrence.id, &format!("workflow_failed: {}", occurrence.error)).await?;
        // What devices still have ends by their answer or by its time limit; then the occurrence is found here again.
        if occurrence::open_runs(&mut tx, occurrence.id).await? == 0 {
            tracing::warn!(
                occurrence_id = occurrence.id,
                error = occurrence.error,
                "closed an occurrence whose workflow run had ended"
            );
            scheduled_run::close(&mut tx, occurrence.id).await?;
        }
        tx.commit().await?;
    }
    let waiting = sqlx::query_scalar!(
        "SELECT DISTINCT ON (o.job_id) o.id FROM job_occurrences o
         WHERE o.state = 'queued' AND o.created_at < now() - interval '10 seconds'
           AND NOT EXISTS (SELECT FROM job_occurrences other WHERE other.job_id = o.job_id AND other.state = 'open')
         ORDER BY o.job_id, o.scheduled_at LIMIT $1",
        BATCH,
    )
    .fetch_all(&services.pool)
    .await?;
    let mut tx = services.pool.begin().await?;
    scheduled_run::start_occurrences(&mut tx, &waiting).await?;
    tx.commit().await?;
    Ok(())
}

/// Removes a batch of what is older than `history_days`. What runs next never depends on it. Answers whether there is more.
///
/// # Errors
/// When the database refuses.
pub async fn sweep(services: &Services, history_days: i32) -> Result<bool> {
    let pool = &services.pool;
    enrollment::approvals::expire_old(pool).await?;
    sqlx::query!("DELETE FROM rate_counters WHERE window_start < now() - interval '1 day'").execute(pool).await?;
    sqlx::query!("DELETE FROM internal_nonces WHERE seen_at < now() - interval '5 minutes'").execute(pool).await?;
    sqlx::query!("DELETE FROM auth_challenges WHERE expires_at < now() - interval '1 hour'").execute(pool).await?;
    sqlx::query!("DELETE FROM operator_sessions WHERE expires_at < now()").execute(pool).await?;
    sqlx::query!("DELETE FROM api_tokens WHERE expires_at < now() - make_interval(days => $1)", KEPT_DAYS).execute(pool).await?;
    sqlx::query!("DELETE FROM idempotency_keys WHERE created_at < now() - interval '1 day'").execute(pool).await?;
    sqlx::query!("DELETE FROM workers WHERE last_seen_at < now() - interval '1 day'").execute(pool).await?;
    let runs = sqlx::query!(
        "DELETE FROM workflow_runs WHERE id = ANY (ARRAY(
             SELECT id FROM workflow_runs WHERE finished_at < now() - $1::int * interval '1 day' ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
        history_days,
        BATCH,
    )
    .execute(pool)
    .await?;
    let activities = sqlx::query!(
        "DELETE FROM activity_history WHERE id = ANY (ARRAY(
             SELECT id FROM activity_history WHERE delivery = 'done' AND finished_at < now() - $1::int * interval '1 day'
             ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
        history_days,
        BATCH,
    )
    .execute(pool)
    .await?;
    // The scripts of quick runs go with the last of their activities.
    sqlx::query!(
        "DELETE FROM quick_run_scripts WHERE id = ANY (ARRAY(
             SELECT q.id FROM quick_run_scripts q WHERE q.created_at < now() - interval '1 hour'
               AND NOT EXISTS (SELECT FROM activity_history a WHERE a.quick_run_script_id = q.id)
             ORDER BY q.id LIMIT $1 FOR UPDATE SKIP LOCKED))",
        BATCH,
    )
    .execute(pool)
    .await?;
    // The latest occurrence of a job stays: operators look at it, however old it is.
    let occurrences = sqlx::query!(
        "DELETE FROM job_occurrences WHERE id = ANY (ARRAY(
             SELECT o.id FROM job_occurrences o
             WHERE o.state = 'closed' AND o.finished_at < now() - $1::int * interval '1 day'
               AND EXISTS (SELECT FROM job_occurrences later WHERE later.job_id = o.job_id AND later.scheduled_at > o.scheduled_at)
             ORDER BY o.finished_at LIMIT $2 FOR UPDATE OF o SKIP LOCKED))",
        history_days,
        BATCH,
    )
    .execute(pool)
    .await?;
    let full = |deleted: sqlx::postgres::PgQueryResult| i64::try_from(deleted.rows_affected()).is_ok_and(|rows| rows >= BATCH);
    Ok(full(runs) || full(activities) || full(occurrences))
}
