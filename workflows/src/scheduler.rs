//! The scheduler: sleeps until the nearest due instant or a change of one, and turns due instants into occurrences.
//!
//! One worker process leads by a lease in the database, any number stand by. Leadership is for economy only: what is due is
//! taken under row locks and decided in the transaction that moves the job's cursor, so two leaders would do no harm.

use std::{collections::HashMap, time::Duration};

use borealis_engine::{
    Result,
    db::Pool,
    jobs::{
        cursor::{self, DueJob, Move},
        occurrence::{self, Decision, Plan, Standing},
    },
};
use chrono::{DateTime, Utc};
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
const BATCH: i64 = 1_000;

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

/// Takes or keeps the lead. The lease is written when less than half of it is left, and not by one who stands by.
async fn lead(pool: &Pool, worker: &str, token: Uuid) -> Result<bool> {
    let held = sqlx::query!(
        r#"SELECT token = $1 AS "ours!", expires_at > now() + $2::text::interval / 2 AS "fresh!" FROM duty_leases
           WHERE duty = 'scheduler' AND expires_at > now()"#,
        token,
        LEAD,
    )
    .fetch_optional(pool)
    .await?;
    match held {
        Some(held) if !held.ours => return Ok(false),
        Some(held) if held.fresh => return Ok(true),
        _ => {}
    }
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
    let (now, jobs) = cursor::due(&mut tx, limit).await?;
    if jobs.is_empty() {
        return Ok(0);
    }
    let plans: Vec<_> = jobs.iter().filter_map(|job| Some((job, plan(job, now)?))).collect();
    let instants: Vec<_> =
        plans.iter().flat_map(|(job, plan)| plan.decisions.iter().map(|decision| (job.id, decision.at()))).collect();
    let standings = occurrence::standings(&mut tx, &instants).await?;
    let nothing = Standing::default();
    let settled: Vec<_> = plans
        .iter()
        .flat_map(|(job, plan)| {
            occurrence::settle(job.id, &plan.decisions, job.overlap_policy, standings.get(&job.id).unwrap_or(&nothing))
        })
        .collect();
    let open = occurrence::write(&mut tx, &settled).await?;
    scheduled_run::start_occurrences(&mut tx, &open).await?;
    let planned: HashMap<i64, &Plan> = plans.iter().map(|(job, plan)| (job.id, plan)).collect();
    let moves: Vec<_> = jobs.iter().map(|job| moved(job, planned.get(&job.id).copied())).collect();
    cursor::advance(&mut tx, &moves).await?;
    tx.commit().await?;
    for job in &jobs {
        METERS.jobs_decided.inc();
        METERS.lateness.observe((now - job.next_due_at).as_seconds_f64().max(0.0));
    }
    for settled in &settled {
        METERS.instants.with_label_values(&[settled.fate.as_str()]).inc();
    }
    Ok(jobs.len())
}

/// What to do with the due instants of a job; none when its schedule cannot be read.
fn plan(job: &DueJob, now: DateTime<Utc>) -> Option<Plan> {
    match &job.schedule {
        Ok(schedule) => {
            Some(occurrence::plan(job.next_due_at, now, schedule.remaining(job.occurrences_used), job.misfire_policy, |at| {
                schedule.next_after(at)
            }))
        }
        Err(error) => {
            tracing::error!(job_id = job.id, ?error, "a stored schedule cannot be read; the job is stopped");
            None
        }
    }
}

/// Where the cursor of a decided job goes; without a plan the job is stopped.
fn moved(job: &DueJob, plan: Option<&Plan>) -> Move {
    let fired = |decision: &&Decision| matches!(decision, Decision::Fire { .. });
    Move {
        job_id: job.id,
        next_due_at: plan.and_then(|plan| plan.next_due_at),
        used: plan.map_or(0, |plan| plan.used),
        last: plan.map_or(Some(job.next_due_at), |plan| plan.decisions.iter().rfind(fired).map(Decision::at)),
    }
}
