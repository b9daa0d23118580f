//! The scheduler: sleeps until the nearest due instant or a change of one, and turns due instants into occurrences.
//!
//! One worker process leads by a lease in the database, any number stand by. Leadership is for economy only: what is due is
//! taken under row locks and decided in the transaction that moves the job's cursor, so two leaders would do no harm.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use borealis_engine::{
    Result,
    db::{Pool, Tx},
    jobs::{
        cursor::{self, DueJob, Move},
        occurrence::{self, Decision, Fate, Plan, Settled, Standing},
        store, zone_changes,
    },
    time_zones,
};
use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    durable::{metrics, wakeup::Wakeup},
    hold::Gate,
    metrics::METERS,
    scheduled_run,
};

/// How long a leader leads without renewal.
const LEAD: &str = "5 seconds";
/// The longest sleep: bounds how late a lost notification or a dead leader can make an instant.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// The most jobs decided in one transaction.
const BATCH: i64 = 1_000;
/// How often the rules of time zones are read again.
const READ_ZONES_EVERY: Duration = Duration::from_secs(60);
/// How often jobs are held against the rules of their time zones when these have not changed: another process may have saved a job by
/// other rules.
const FOLLOW_ZONES_EVERY: Duration = Duration::from_secs(3600);

/// Schedules until `stop`. `worker` names this process.
pub async fn keep(pool: Pool, wakeup: Wakeup, worker: String, gate: Gate, stop: CancellationToken) {
    let token = Uuid::new_v4();
    let mut zones = Zones::default();
    let work = async {
        loop {
            let changed = wakeup.listen(store::SCHEDULE_CHANGED);
            tokio::pin!(changed);
            changed.as_mut().enable();
            let sleep = match pass(&pool, &worker, token, &gate, &mut zones).await {
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

/// When the rules of time zones were last read, and jobs last held against them.
#[derive(Debug, Default)]
struct Zones {
    read: Option<Instant>,
    followed: Option<Instant>,
}

async fn pass(pool: &Pool, worker: &str, token: Uuid, gate: &Gate, zones: &mut Zones) -> Result<Duration> {
    if !gate.is_open() {
        METERS.leads.set(0);
        return Ok(LONGEST_SLEEP);
    }
    if !leads(pool, worker, token).await? {
        // Who leads meanwhile may leave jobs by other rules.
        zones.followed = None;
        return Ok(LONGEST_SLEEP);
    }
    if zones.read.is_none_or(|at| at.elapsed() >= READ_ZONES_EVERY) {
        zones.read = Some(Instant::now());
        if tokio::task::spawn_blocking(time_zones::refresh).await.unwrap_or(false) {
            zones.followed = None;
        }
    }
    if zones.followed.is_none_or(|at| at.elapsed() >= FOLLOW_ZONES_EVERY) {
        follow_time_zones(pool).await?;
        zones.followed = Some(Instant::now());
    }
    decide(pool, gate.at_least()).await
}

/// Moves the jobs whose time zones have other rules than when their next instants were computed. Answers how many moved.
///
/// # Errors
/// When the database refuses.
pub async fn follow_time_zones(pool: &Pool) -> Result<usize> {
    let (mut after, mut moved) = (i64::MIN, 0);
    loop {
        let mut tx = pool.begin().await?;
        let followed = zone_changes::follow(&mut tx, after, BATCH).await?;
        tx.commit().await?;
        moved += followed.moved;
        let Some(last) = followed.last_id else { break };
        after = last;
    }
    if moved > 0 {
        tracing::warn!(jobs = moved, "the next instants of jobs moved with the rules of their time zones");
    }
    Ok(moved)
}

/// One pass, if the holder of `token` leads: decides all that is due and answers how long to sleep.
///
/// # Errors
/// When the database refuses.
pub async fn tick(pool: &Pool, worker: &str, token: Uuid, at_least: i64) -> Result<Duration> {
    if leads(pool, worker, token).await? { decide(pool, at_least).await } else { Ok(LONGEST_SLEEP) }
}

async fn decide(pool: &Pool, at_least: i64) -> Result<Duration> {
    while advance(pool, BATCH, at_least).await? == usize::try_from(BATCH).unwrap_or(usize::MAX) {}
    let nearest = cursor::nearest(&mut *pool.acquire().await?).await?;
    Ok(nearest.map_or(LONGEST_SLEEP, |seconds| Duration::from_secs_f64(seconds.clamp(0.0, LONGEST_SLEEP.as_secs_f64()))))
}

async fn leads(pool: &Pool, worker: &str, token: Uuid) -> Result<bool> {
    let leads = lead(pool, worker, token).await;
    METERS.leads.set(i64::from(matches!(leads, Ok(true))));
    leads
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

/// Decides up to `limit` jobs whose cursor has come, and answers how many. Any number of processes may do it at once. None while the
/// engine is held, or the database is behind the epoch `at_least`.
///
/// # Errors
/// When the database refuses.
pub async fn advance(pool: &Pool, limit: i64, at_least: i64) -> Result<usize> {
    let mut tx = pool.begin().await?;
    let (now, jobs) = cursor::due(&mut tx, limit, Some(at_least)).await?;
    if jobs.is_empty() {
        return Ok(0);
    }
    let settled = decide_these(&mut tx, &jobs, now, |decision| decision).await?;
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

/// Decides these jobs, as `turned`: writes what becomes of their instants and moves their cursors.
async fn decide_these(
    tx: &mut Tx<'_>,
    jobs: &[DueJob],
    now: DateTime<Utc>,
    turned: impl Fn(Decision) -> Decision,
) -> Result<Vec<Settled>> {
    let mut plans: Vec<_> = jobs.iter().filter_map(|job| Some((job, plan(job, now)?))).collect();
    for (_, plan) in &mut plans {
        plan.decisions = std::mem::take(&mut plan.decisions).into_iter().map(&turned).collect();
    }
    let settled = settle(tx, &plans).await?;
    let open = occurrence::write(tx, &settled).await?;
    scheduled_run::start_occurrences(tx, &open).await?;
    let planned: HashMap<i64, &Plan> = plans.iter().map(|(job, plan)| (job.id, plan)).collect();
    let moves: Vec<_> = jobs.iter().map(|job| moved(job, planned.get(&job.id).copied())).collect();
    cursor::advance(tx, &moves).await?;
    Ok(settled)
}

/// What becomes of the decisions of these plans, given what their jobs have.
async fn settle(tx: &mut Tx<'_>, plans: &[(&DueJob, Plan)]) -> Result<Vec<Settled>> {
    let instants: Vec<_> =
        plans.iter().flat_map(|(job, plan)| plan.decisions.iter().map(|decision| (job.id, decision.at()))).collect();
    let standings = occurrence::standings(tx, &instants).await?;
    let nothing = Standing::default();
    let of_job = |(job, plan): &(&DueJob, Plan)| {
        occurrence::settle(job.id, &plan.decisions, job.overlap_policy, standings.get(&job.id).unwrap_or(&nothing))
    };
    Ok(plans.iter().flat_map(of_job).collect())
}

/// What the scheduler would do with a due job now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreseen {
    /// The job.
    pub job_id: i64,
    /// Its name.
    pub name: String,
    /// Its first due instant.
    pub due_at: DateTime<Utc>,
    /// How many occurrences are opened.
    pub runs: usize,
    /// How many due instants do not run.
    pub skipped: i64,
    /// When it is due after that.
    pub next_due_at: Option<DateTime<Utc>>,
}

/// What the scheduler would do now, if the engine were not held: up to `limit` jobs, the longest due first. Changes nothing.
///
/// # Errors
/// When the database refuses.
pub async fn foresee(pool: &Pool, limit: i64) -> Result<Vec<Foreseen>> {
    let mut tx = pool.begin().await?;
    let (now, jobs) = cursor::due(&mut tx, limit, None).await?;
    let plans: Vec<_> = jobs.iter().filter_map(|job| Some((job, plan(job, now)?))).collect();
    let settled = settle(&mut tx, &plans).await?;
    tx.rollback().await?;
    let runs = |job_id| settled.iter().filter(|one| one.job_id == job_id && !matches!(one.fate, Fate::Skip { .. })).count();
    let foreseen = plans.iter().map(|(job, plan)| {
        let runs = runs(job.id);
        Foreseen {
            job_id: job.id,
            name: job.name.clone(),
            due_at: job.next_due_at,
            runs,
            skipped: plan.used - i64::try_from(runs).unwrap_or(plan.used),
            next_due_at: plan.next_due_at,
        }
    });
    Ok(foreseen.collect())
}

/// Skips what is due now, whatever the jobs' policies: each instant leaves a record and does not run. Answers how many jobs.
///
/// # Errors
/// When the database refuses.
pub async fn skip_missed(tx: &mut Tx<'_>) -> Result<usize> {
    let mut skipped = 0;
    loop {
        let (now, jobs) = cursor::due(tx, BATCH, None).await?;
        if jobs.is_empty() {
            return Ok(skipped);
        }
        skipped += jobs.len();
        let skip = |decision| match decision {
            Decision::Fire { at, .. } => Decision::Skip { at, reason: "misfire", more: 0 },
            skip => skip,
        };
        decide_these(tx, &jobs, now, skip).await?;
    }
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
    let next_due_at = plan.and_then(|plan| plan.next_due_at);
    Move {
        job_id: job.id,
        next_due_at,
        next_due_wall: next_due_at.and_then(|next| job.schedule.as_ref().ok()?.wall_of(next)),
        used: plan.map_or(0, |plan| plan.used),
        last: plan.map_or(Some(job.next_due_at), |plan| plan.decisions.iter().rfind(fired).map(Decision::at)),
    }
}
