//! The scheduler: sleeps until the nearest due instant or a change of one, and turns due instants into occurrences.
//!
//! One worker process leads by a lease in the database, any number stand by. Leadership is for economy only: what is due is
//! taken under row locks and decided in the transaction that moves the job's cursor, so two leaders would do no harm.

use std::time::Duration;

use borealis_engine::{
    Result,
    db::Pool,
    jobs::{
        cursor,
        occurrence::{self, Decision, NewOccurrence, Overlap},
    },
};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    durable::wakeup::{SCHEDULE_CHANGED, Wakeup},
    metrics::{self, METERS},
    scheduled_run,
};

/// How long a leader leads without renewal.
const LEAD: &str = "5 seconds";
/// The longest sleep: bounds how late a lost notification or a dead leader can make an instant.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The most jobs decided in one transaction.
const BATCH: i64 = 100;

/// Schedules until `stop`. `worker` names this process.
pub async fn keep(pool: Pool, wakeup: Wakeup, worker: String, stop: CancellationToken) {
    let token = Uuid::new_v4();
    let work = async {
        loop {
            let changed = wakeup.listen(SCHEDULE_CHANGED);
            tokio::pin!(changed);
            changed.as_mut().enable();
            let sleep = match tick(&pool, &worker, token).await {
                Ok(next) => next,
                Err(error) => {
                    metrics::failed_pass("scheduler");
                    tracing::warn!(?error, "scheduler pass failed");
                    LONGEST_SLEEP
                }
            };
            let _ = tokio::time::timeout(sleep, changed).await;
        }
    };
    stop.run_until_cancelled(work).await;
    METERS.leads.set(0);
    let _ = step_down(&pool, token).await;
}

/// One pass, if the holder of `token` leads: decides all that is due and answers how long to sleep.
///
/// # Errors
/// When the database refuses.
pub async fn tick(pool: &Pool, worker: &str, token: Uuid) -> Result<Duration> {
    let leads = lead(pool, worker, token).await;
    METERS.leads.set(i64::from(matches!(leads, Ok(true))));
    if !leads? {
        return Ok(LONGEST_SLEEP);
    }
    while advance(pool, BATCH).await? == usize::try_from(BATCH).unwrap_or(usize::MAX) {}
    let nearest = cursor::nearest(&mut *pool.acquire().await?).await?;
    Ok(nearest.map_or(LONGEST_SLEEP, |seconds| Duration::from_secs_f64(seconds.clamp(0.0, LONGEST_SLEEP.as_secs_f64()))))
}

/// Takes or keeps the lead.
async fn lead(pool: &Pool, worker: &str, token: Uuid) -> Result<bool> {
    let leads = sqlx::query_scalar!(
        "INSERT INTO duty_leases (duty, holder, token, expires_at) VALUES ('scheduler', $1, $2, now() + $3::text::interval)
         ON CONFLICT (duty) DO UPDATE SET holder = $1, token = $2, expires_at = EXCLUDED.expires_at
         WHERE duty_leases.token = $2 OR duty_leases.expires_at < now()
         RETURNING 1",
        worker,
        token,
        LEAD,
    )
    .fetch_optional(pool)
    .await?;
    Ok(leads.is_some())
}

async fn step_down(pool: &Pool, token: Uuid) -> Result<()> {
    sqlx::query!("DELETE FROM duty_leases WHERE duty = 'scheduler' AND token = $1", token).execute(pool).await?;
    Ok(())
}

/// Decides up to `limit` jobs whose cursor has come, and answers how many. Any number of processes may do it at once.
///
/// # Errors
/// When the database refuses.
pub async fn advance(pool: &Pool, limit: i64) -> Result<usize> {
    let mut tx = pool.begin().await?;
    let now = sqlx::query_scalar!(r#"SELECT now() AS "now!""#).fetch_one(&mut *tx).await?;
    let jobs = cursor::due(&mut tx, limit).await?;
    let mut decided = Vec::new();
    for job in &jobs {
        decide(&mut tx, job, now, &mut decided).await?;
    }
    tx.commit().await?;
    for job in &jobs {
        METERS.jobs_decided.inc();
        METERS.lateness.observe((now - job.next_due_at).as_seconds_f64().max(0.0));
    }
    for decision in decided {
        METERS.instants.with_label_values(&[decision]).inc();
    }
    Ok(jobs.len())
}

async fn decide(
    conn: &mut PgConnection,
    job: &cursor::DueJob,
    now: DateTime<Utc>,
    decided: &mut Vec<&'static str>,
) -> Result<()> {
    let schedule = match &job.schedule {
        Ok(schedule) => schedule,
        Err(error) => {
            tracing::error!(job_id = job.id, ?error, "a stored schedule cannot be read; the job is stopped");
            return cursor::advance(conn, job.id, None, 0, Some(job.next_due_at)).await;
        }
    };
    let plan = occurrence::plan(job.next_due_at, now, schedule.remaining(job.occurrences_used), job.misfire_policy, |at| {
        schedule.next_after(at)
    });
    let mut last = None;
    for decision in plan.decisions {
        match decision {
            Decision::Skip { at, reason, more } => {
                let note = (more > 0).then(|| format!("{more} earlier occurrences were missed too"));
                occurrence::record_skip(conn, job.id, at, reason, note.as_deref()).await?;
                decided.push("misfire");
            }
            Decision::Fire { at, catch_up } => {
                let (unfinished, queued) = occurrence::unfinished(conn, job.id).await?;
                let answer = occurrence::overlap(job.overlap_policy, unfinished, queued, catch_up);
                if answer == Overlap::Skip {
                    occurrence::record_skip(conn, job.id, at, "overlap", None).await?;
                    decided.push("overlap");
                } else {
                    let new = NewOccurrence {
                        job_id: job.id,
                        scheduled_at: at,
                        cause: if catch_up { "catch_up" } else { "schedule" },
                        scope_site_ids: None,
                        only_devices: None,
                        requested_by: String::new(),
                        queued: answer == Overlap::Wait,
                    };
                    if let Some(occurrence_id) = occurrence::open(conn, &new).await?
                        && answer == Overlap::Run
                    {
                        scheduled_run::start_occurrence(conn, occurrence_id).await?;
                    }
                    decided.push(if answer == Overlap::Wait { "queued" } else { "run" });
                }
                last = Some(at);
            }
        }
    }
    cursor::advance(conn, job.id, plan.next_due_at, plan.used, last).await
}
