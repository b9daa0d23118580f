//! Occurrences: from a due instant to frozen targets.
//!
//! The scheduler's decision is [`plan`] and [`settle`], pure functions of the job's cursor, its policies, the clock and what
//! the job has open. [`write()`] applies it in the transaction that moves the cursor, so an instant is decided once, whoever
//! asks and however often.

use std::collections::{BTreeSet, HashMap};

use chrono::{DateTime, Duration, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{
    schedule::{Expiration, MisfirePolicy, OverlapPolicy},
    spec::{self, Component},
    targets,
};
use crate::{
    Error, Result,
    assemblies::{self, RunMode, ScriptRequest, Source},
    db::Pool,
};

/// The lane agents and operators see for scripts of scheduled jobs (jobs 4.3).
const QUEUE_LANE: &str = "scheduled_job_system";
/// The kind of activity they see for them.
const ACTIVITY_KIND: &str = "scheduled_job";

/// An instant decided later than this after it was due counts as missed. Longer than the minute to which a job that runs
/// at once is floored.
pub const MISFIRE_GRACE: Duration = Duration::seconds(90);
/// The most missed instants that are run again (`run_all`) and that leave a record of their own.
pub const CATCH_UP_MAX: usize = 10;
/// The most occurrences of a job that wait for the one before them (`queue`).
pub const QUEUE_MAX: i64 = 10;
/// The most pairs of site and status an occurrence keeps the numbers of; with more, its runs are counted when they are shown.
const RESULTS_MAX: i64 = 200;
/// The most instants one decision looks at; a longer outage is caught up with by jumping.
const INSTANTS_MAX: usize = 100_000;

/// What becomes of one due instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It runs.
    Fire {
        /// The instant it was due.
        at: DateTime<Utc>,
        /// True when it makes up for an outage.
        catch_up: bool,
    },
    /// It does not run and leaves a record.
    Skip {
        /// The instant it was due.
        at: DateTime<Utc>,
        /// `misfire`.
        reason: &'static str,
        /// How many further instants this record stands for.
        more: usize,
    },
}

impl Decision {
    /// The instant it is about.
    #[must_use]
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::Fire { at, .. } | Self::Skip { at, .. } => *at,
        }
    }
}

/// What the scheduler does with a job whose cursor has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// In order of their instants.
    pub decisions: Vec<Decision>,
    /// The next instant; none when nothing more will come.
    pub next_due_at: Option<DateTime<Utc>>,
    /// How many instants the schedule used up with this.
    pub used: i64,
}

/// Decides what to do with every instant from `due` up to `now`. `next` gives the instant after one; `left` is how many the
/// schedule may still use.
#[must_use]
pub fn plan(
    due: DateTime<Utc>,
    now: DateTime<Utc>,
    left: Option<i64>,
    misfire: MisfirePolicy,
    next: impl Fn(DateTime<Utc>) -> Option<DateTime<Utc>>,
) -> Plan {
    let left = left.map_or(INSTANTS_MAX, |left| usize::try_from(left).unwrap_or(0)).min(INSTANTS_MAX);
    let mut instants = Vec::new();
    let mut cursor = Some(due);
    while let Some(at) = cursor.filter(|at| *at <= now && instants.len() < left) {
        instants.push(at);
        cursor = next(at).filter(|after| *after > at);
    }
    let used = instants.len();
    let next_due_at = cursor.filter(|_| used < left || left == INSTANTS_MAX);
    let missed = instants.iter().take_while(|at| now - **at > MISFIRE_GRACE).count();
    // How many of the missed run after all; the others leave a record.
    let run = match misfire {
        MisfirePolicy::Skip => 0,
        MisfirePolicy::RunOnce => usize::from(missed == used).min(missed),
        MisfirePolicy::RunAll => missed.min(CATCH_UP_MAX),
    };
    let skipped = missed - run;
    let unseen = skipped.saturating_sub(CATCH_UP_MAX);
    let mut decisions = Vec::new();
    for (index, at) in instants.into_iter().enumerate() {
        if index < unseen {
            continue;
        }
        decisions.push(if index < skipped {
            Decision::Skip { at, reason: "misfire", more: if index == unseen { unseen } else { 0 } }
        } else {
            Decision::Fire { at, catch_up: index < missed }
        });
    }
    Plan { decisions, next_due_at, used: i64::try_from(used).unwrap_or(i64::MAX) }
}

/// What a scheduled job has of its own when due instants are decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Occurrences that have not ended, those that wait included.
    pub unfinished: i64,
    /// Of these, those that wait for the one before them.
    pub queued: i64,
    /// Which of the instants asked about have an occurrence already, by hand.
    pub taken: BTreeSet<DateTime<Utc>>,
}

/// What each of these jobs has; `instants` are those to be decided. Jobs without anything are left out.
///
/// # Errors
/// When the database refuses.
pub async fn standings(conn: &mut PgConnection, instants: &[(i64, DateTime<Utc>)]) -> Result<HashMap<i64, Standing>> {
    let (jobs, ats): (Vec<i64>, Vec<DateTime<Utc>>) = instants.iter().copied().unzip();
    let distinct: Vec<i64> = jobs.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let mut standings: HashMap<i64, Standing> = HashMap::new();
    let unfinished = sqlx::query!(
        r#"SELECT o.job_id, count(*) AS "unfinished!", count(*) FILTER (WHERE o.state = 'queued') AS "queued!"
           FROM unnest($1::bigint[]) AS j(id) JOIN job_occurrences o ON o.job_id = j.id AND o.state <> 'closed' GROUP BY 1"#,
        &distinct,
    )
    .fetch_all(&mut *conn)
    .await?;
    for row in unfinished {
        let standing = standings.entry(row.job_id).or_default();
        (standing.unfinished, standing.queued) = (row.unfinished, row.queued);
    }
    let taken = sqlx::query!(
        "SELECT o.job_id, o.scheduled_at FROM unnest($1::bigint[], $2::timestamptz[]) AS t(job_id, at)
         JOIN job_occurrences o ON o.job_id = t.job_id AND o.scheduled_at = t.at",
        &jobs,
        &ats,
    )
    .fetch_all(conn)
    .await?;
    for row in taken {
        standings.entry(row.job_id).or_default().taken.insert(row.scheduled_at);
    }
    Ok(standings)
}

/// What becomes of a decided instant, given what the job has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// The job.
    pub job_id: i64,
    /// The instant.
    pub at: DateTime<Utc>,
    /// What becomes of it.
    pub fate: Fate,
}

/// The fates of an instant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// An occurrence is opened and runs now.
    Run {
        /// True when it makes up for an outage.
        catch_up: bool,
    },
    /// An occurrence is opened and waits for those before it.
    Wait {
        /// True when it makes up for an outage.
        catch_up: bool,
    },
    /// It leaves a record with a reason and does not run.
    Skip {
        /// `misfire` or `overlap`.
        reason: &'static str,
        /// For how many further instants the record stands.
        more: usize,
    },
}

impl Fate {
    /// One word for it: `run`, `queued`, or why it does not run.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Run { .. } => "run",
            Self::Wait { .. } => "queued",
            Self::Skip { reason, .. } => reason,
        }
    }
}

/// Settles the decisions of a plan one after another, each seeing those before it. Pure. An instant that has an occurrence
/// already is left as it is.
#[must_use]
pub fn settle(job_id: i64, decisions: &[Decision], policy: OverlapPolicy, standing: &Standing) -> Vec<Settled> {
    let (mut unfinished, mut queued) = (standing.unfinished, standing.queued);
    let mut settled = Vec::with_capacity(decisions.len());
    for decision in decisions {
        let (at, fate) = match *decision {
            Decision::Skip { at, reason, more } => (at, Fate::Skip { reason, more }),
            Decision::Fire { at, catch_up } => (
                at,
                match overlap(policy, unfinished > 0, queued, catch_up) {
                    Overlap::Run => Fate::Run { catch_up },
                    Overlap::Wait => Fate::Wait { catch_up },
                    Overlap::Skip => Fate::Skip { reason: "overlap", more: 0 },
                },
            ),
        };
        if standing.taken.contains(&at) {
            continue;
        }
        unfinished += i64::from(!matches!(fate, Fate::Skip { .. }));
        queued += i64::from(matches!(fate, Fate::Wait { .. }));
        settled.push(Settled { job_id, at, fate });
    }
    settled
}

/// Opens occurrences and records skips, one statement for each. Answers the occurrences that are to run now.
///
/// # Errors
/// When the database refuses; then nothing was written.
pub async fn write(conn: &mut PgConnection, settled: &[Settled]) -> Result<Vec<i64>> {
    let (mut jobs, mut ats, mut causes, mut states) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut skips = Vec::new();
    for Settled { job_id, at, fate } in settled {
        let (catch_up, state) = match fate {
            Fate::Run { catch_up } => (catch_up, "open"),
            Fate::Wait { catch_up } => (catch_up, "queued"),
            Fate::Skip { reason, more } => {
                let note = (*more > 0).then(|| format!("{more} earlier occurrences were missed too"));
                skips.push((*job_id, *at, *reason, note));
                continue;
            }
        };
        jobs.push(*job_id);
        ats.push(*at);
        causes.push(if *catch_up { "catch_up" } else { "schedule" });
        states.push(state);
    }
    record_skips(conn, &skips).await?;
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let opened = sqlx::query!(
        "INSERT INTO job_occurrences (job_id, scheduled_at, cause, state)
         SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[])
         ON CONFLICT ON CONSTRAINT job_occurrences_instant_key DO NOTHING RETURNING id, state",
        &jobs,
        &ats,
        &causes as &[&str],
        &states as &[&str],
    )
    .fetch_all(conn)
    .await?;
    Ok(opened.into_iter().filter(|row| row.state == "open").map(|row| row.id).collect())
}

/// Records instants that did not run, each as a Skipped run (jobs 7.1).
async fn record_skips(conn: &mut PgConnection, skips: &[(i64, DateTime<Utc>, &str, Option<String>)]) -> Result<()> {
    if skips.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "WITH skip AS (
             SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[]) AS t(job_id, at, reason, error)
         ), occurrence AS (
             INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at, finished_at)
             SELECT job_id, at, 'schedule', 'closed', now(), now() FROM skip
             ON CONFLICT ON CONSTRAINT job_occurrences_instant_key DO NOTHING RETURNING id, job_id, scheduled_at
         )
         INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, skip_reason, error, resolution_status, resolution_reason, finished_at)
         SELECT o.job_id, o.id, o.scheduled_at, 'Skipped', s.reason, s.error, 'skipped', s.reason, now()
         FROM occurrence o JOIN skip s ON s.job_id = o.job_id AND s.at = o.scheduled_at",
        &skips.iter().map(|skip| skip.0).collect::<Vec<_>>(),
        &skips.iter().map(|skip| skip.1).collect::<Vec<_>>(),
        &skips.iter().map(|skip| skip.2).collect::<Vec<_>>() as &[&str],
        &skips.iter().map(|skip| skip.3.as_deref()).collect::<Vec<_>>() as &[Option<&str>],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// An occurrence that somebody asks for.
#[derive(Debug, Clone)]
pub struct Requested {
    /// The job.
    pub job_id: i64,
    /// Now; moved on past any instant that is taken.
    pub at: DateTime<Utc>,
    /// `rerun` or `retry`.
    pub cause: &'static str,
    /// The sites it may reach, when narrower than the job's; none: the job's.
    pub scope_site_ids: Option<Vec<i64>>,
    /// For a retry: the only devices it is for.
    pub only_devices: Option<Vec<Uuid>>,
    /// Who asked.
    pub requested_by: String,
}

/// Opens an occurrence that somebody asks for.
///
/// # Errors
/// When the database refuses.
pub async fn open(conn: &mut PgConnection, new: &Requested) -> Result<i64> {
    let mut at = new.at;
    loop {
        let id = sqlx::query_scalar!(
            "INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, only_devices, scope_site_ids, requested_by)
             VALUES ($1, $2, $3, 'open', $4, $5, $6)
             ON CONFLICT ON CONSTRAINT job_occurrences_instant_key DO NOTHING RETURNING id",
            new.job_id,
            at,
            new.cause,
            new.only_devices.as_deref(),
            new.scope_site_ids.as_deref(),
            new.requested_by,
        )
        .fetch_optional(&mut *conn)
        .await?;
        if let Some(id) = id {
            return Ok(id);
        }
        // Two manual starts within one second of each other are two occurrences.
        at += Duration::seconds(1);
    }
}

/// Whether an occurrence that is due runs now, waits or is skipped, given what else of the job has not ended. Pure.
///
/// Catching up on several missed instants (`run_all`) runs them one after another, also under `skip`.
#[must_use]
pub fn overlap(policy: OverlapPolicy, unfinished: bool, queued: i64, catching_up: bool) -> Overlap {
    match policy {
        _ if !unfinished => Overlap::Run,
        OverlapPolicy::Allow => Overlap::Run,
        OverlapPolicy::Queue if queued < QUEUE_MAX => Overlap::Wait,
        OverlapPolicy::Skip if catching_up && queued < QUEUE_MAX => Overlap::Wait,
        OverlapPolicy::Queue | OverlapPolicy::Skip => Overlap::Skip,
    }
}

/// The answer of [`overlap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// It runs now.
    Run,
    /// It runs when those before it have ended.
    Wait,
    /// It is recorded as skipped.
    Skip,
}

/// Remembers the workflow runs that carry occurrences out.
///
/// # Errors
/// When the database refuses.
pub async fn carried_by(conn: &mut PgConnection, carriers: &[(i64, Uuid)]) -> Result<()> {
    let (ids, runs): (Vec<i64>, Vec<Uuid>) = carriers.iter().copied().unzip();
    sqlx::query!(
        "UPDATE job_occurrences o SET workflow_run_id = t.run_id, state = 'open'
         FROM unnest($1::bigint[], $2::uuid[]) AS t(id, run_id) WHERE o.id = t.id",
        &ids,
        &runs,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// How an occurrence went.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Summary {
    /// How many runs ended in each status.
    pub statuses: std::collections::BTreeMap<String, i64>,
    /// The occurrence of the same job that waited for this one, now due.
    #[serde(skip)]
    pub next_queued: Option<i64>,
}

impl Summary {
    /// What the operator of a job is told when not every run went well: how many of how many, and how they ended.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        let is_well = |status: &str| ["Success", "Warning", "Skipped"].contains(&status);
        let bad: Vec<_> = self.statuses.iter().filter(|(status, _)| !is_well(status)).collect();
        let (count, all) = (bad.iter().map(|(_, count)| **count).sum::<i64>(), self.statuses.values().sum::<i64>());
        let each: Vec<String> = bad.iter().map(|(status, count)| format!("{count} {status}")).collect();
        (count > 0).then(|| format!("runs_failed: {count} of {all} runs did not end well: {}.", each.join(", ")))
    }
}

/// How many runs of an occurrence have not ended.
///
/// # Errors
/// When the database refuses.
pub async fn open_runs(conn: &mut PgConnection, occurrence_id: i64) -> Result<i64> {
    Ok(sqlx::query_scalar!(
        r#"SELECT count(*) AS "open!" FROM scheduled_job_runs WHERE occurrence_id = $1 AND status IN ('Pending', 'Running')"#,
        occurrence_id
    )
    .fetch_one(conn)
    .await?)
}

/// Closes an occurrence and names the one that waited for it.
///
/// # Errors
/// When the database refuses.
pub async fn close(conn: &mut PgConnection, occurrence_id: i64) -> Result<Summary> {
    let closed = sqlx::query!(
        "UPDATE job_occurrences SET state = 'closed', finished_at = coalesce(finished_at, now()) WHERE id = $1 RETURNING job_id",
        occurrence_id
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(closed) = closed else { return Ok(Summary::default()) };
    // The job's row orders the closers, so that of two that end together one sees the other.
    sqlx::query!("SELECT id FROM scheduled_jobs WHERE id = $1 FOR UPDATE", closed.job_id).fetch_optional(&mut *conn).await?;
    let statuses = sqlx::query!(
        r#"WITH k AS (
               SELECT status, site_id, device_guid IS NULL AS nowhere, skip_reason = 'no_devices_targeted' AS without, count(*) AS runs
               FROM scheduled_job_runs WHERE occurrence_id = $1 GROUP BY 1, 2, 3, 4
           ), kept AS (
               UPDATE job_occurrences SET results = g.results
               FROM (SELECT jsonb_agg(to_jsonb(k)) AS results, count(*) AS entries FROM k) g
               WHERE id = $1 AND g.entries <= $2
           )
           SELECT status, sum(runs)::bigint AS "count!" FROM k GROUP BY 1"#,
        occurrence_id,
        RESULTS_MAX,
    )
    .fetch_all(&mut *conn)
    .await?
    .into_iter()
    .map(|row| (row.status, row.count))
    .collect();
    let next_queued = sqlx::query_scalar!(
        "SELECT id FROM job_occurrences o WHERE job_id = $1 AND state = 'queued'
           AND NOT EXISTS (SELECT FROM job_occurrences other WHERE other.job_id = $1 AND other.state = 'open')
         ORDER BY scheduled_at, id LIMIT 1 FOR UPDATE",
        closed.job_id
    )
    .fetch_optional(&mut *conn)
    .await?;
    Ok(Summary { statuses, next_queued })
}

/// The job of an occurrence that this workflow run carries out, and whether it has ended; none when it is gone.
///
/// # Errors
/// When the database refuses.
pub async fn of_workflow_run(conn: &mut PgConnection, occurrence_id: i64, workflow_run_id: Uuid) -> Result<Option<(i64, bool)>> {
    let found = sqlx::query!(
        r#"SELECT job_id, state = 'closed' AS "has_ended!" FROM job_occurrences WHERE id = $1 AND workflow_run_id = $2"#,
        occurrence_id,
        workflow_run_id,
    )
    .fetch_optional(conn)
    .await?;
    Ok(found.map(|found| (found.job_id, found.has_ended)))
}

/// The workflow run of the occurrence of a run, when an operator has cancelled every run of it that was not skipped.
///
/// # Errors
/// When the database refuses.
pub async fn cancelled_whole(conn: &mut PgConnection, run_id: i64) -> Result<Option<Uuid>> {
    Ok(sqlx::query_scalar!(
        "SELECT o.workflow_run_id FROM job_occurrences o
         WHERE o.id = (SELECT r.occurrence_id FROM scheduled_job_runs r WHERE r.id = $1) AND o.state = 'open'
           AND NOT EXISTS (SELECT FROM scheduled_job_runs r WHERE r.occurrence_id = o.id AND r.status <> 'Skipped'
                           AND (r.cancel_requested_at IS NULL OR r.cancel_reason IS DISTINCT FROM $2))",
        run_id,
        super::run::CANCELLED_BY_OPERATOR,
    )
    .fetch_optional(conn)
    .await?
    .flatten())
}

/// Cancels every unfinished occurrence of a job that is about to go. Answers the workflow runs to be cancelled with them
/// and the devices to be told.
///
/// # Errors
/// When the database refuses.
pub async fn cancel_all(conn: &mut PgConnection, job_id: i64) -> Result<(Vec<Uuid>, Vec<Uuid>)> {
    let unfinished = sqlx::query!(
        "SELECT id, workflow_run_id FROM job_occurrences WHERE job_id = $1 AND state <> 'closed' ORDER BY id FOR UPDATE",
        job_id
    )
    .fetch_all(&mut *conn)
    .await?;
    let (mut workflows, mut devices) = (Vec::new(), Vec::new());
    for occurrence in unfinished {
        devices.extend(super::run::cancel_open(conn, occurrence.id, None, super::run::CANCELLED_BY_OPERATOR).await?.devices);
        workflows.extend(occurrence.workflow_run_id);
    }
    Ok((workflows, devices))
}

/// What the workflow of an occurrence is started with.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The occurrence.
    pub id: i64,
    /// The job.
    pub job_id: i64,
    /// The sites whose operators may see the run; none: administrators only.
    pub site_ids: Vec<i64>,
}

/// The facts of occurrences; one that is gone is left out.
///
/// # Errors
/// When the database refuses.
pub async fn facts(conn: &mut PgConnection, occurrence_ids: &[i64]) -> Result<Vec<Facts>> {
    Ok(sqlx::query_as!(
        Facts,
        r#"SELECT o.id, o.job_id, coalesce(job_site_ids(j.targets), '{}') AS "site_ids!" FROM unnest($1::bigint[]) AS t(id)
           JOIN job_occurrences o ON o.id = t.id JOIN scheduled_jobs j ON j.id = o.job_id"#,
        occurrence_ids
    )
    .fetch_all(conn)
    .await?)
}

/// Freezes the targets of an occurrence: one Pending run per device, as things are now. Doing it again changes nothing.
/// Without any device there is one run, Skipped with `no_devices_targeted`.
///
/// # Errors
/// 404 when the occurrence or its job is gone.
pub async fn freeze(conn: &mut PgConnection, occurrence_id: i64) -> Result<()> {
    let occurrence = sqlx::query!(
        r#"SELECT o.job_id, o.scheduled_at, o.state, o.frozen_at, o.only_devices, o.scope_site_ids, j.targets, j.expiration, j.stop_after,
                j.duration_stop_enabled, j.components, now() AS "now!"
         FROM job_occurrences o JOIN scheduled_jobs j ON j.id = o.job_id WHERE o.id = $1 FOR NO KEY UPDATE OF o"#,
        occurrence_id
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    if occurrence.state == "closed" {
        return Err(Error::conflict("occurrence_closed", "The occurrence has been closed; run the job again."));
    }
    if occurrence.frozen_at.is_some() {
        return Ok(());
    }
    let reach = targets::reach(&mut *conn, occurrence.job_id).await?;
    let scope = targets::narrow(&reach, occurrence.scope_site_ids.as_deref());
    let mut devices = targets::resolve(&mut *conn, &occurrence.targets, &scope).await?;
    if let Some(only) = &occurrence.only_devices {
        devices.retain(|device| only.contains(&device.device_guid));
    }
    let expiration = occurrence.expiration.parse::<Expiration>()?;
    // What caught up or waited in the queue was due long ago; its expiry counts from now.
    let expires_at = expiration.from(occurrence.scheduled_at.max(occurrence.now));
    let stop_after_s =
        spec::stop_limit(occurrence.duration_stop_enabled, occurrence.stop_after.as_deref(), &occurrence.expiration)
            .and_then(|limit| i32::try_from(limit.num_seconds()).ok());
    let components: Vec<Component> = serde_json::from_value(occurrence.components)?;
    let name = components.into_iter().next().map(|component| component.name).unwrap_or_default();
    let guids: Vec<Uuid> = devices.iter().map(|device| device.device_guid).collect();
    let hostnames: Vec<String> = devices.iter().map(|device| device.hostname.clone()).collect();
    let sites: Vec<Option<i64>> = devices.iter().map(|device| device.site_id).collect();
    sqlx::query!(
        "WITH frozen AS (UPDATE job_occurrences SET frozen_at = now() WHERE id = $2)
         INSERT INTO scheduled_job_runs
             (job_id, occurrence_id, scheduled_at, component_name, device_guid, target_hostname, site_id, expires_at, stop_after_s,
              status, skip_reason, resolution_status, resolution_reason)
         SELECT $1::bigint, $2::bigint, $3::timestamptz, $4::text, t.guid, t.hostname, t.site_id, $5::timestamptz, $6::int,
                'Pending', NULL, 'eligible', ''
         FROM unnest($7::uuid[], $8::text[], $9::bigint[]) AS t(guid, hostname, site_id)
         UNION ALL
         SELECT $1, $2, $3, $4, NULL, NULL, NULL, NULL, NULL, 'Skipped', 'no_devices_targeted', 'skipped', 'no_devices_targeted'
         WHERE cardinality($7) = 0",
        occurrence.job_id,
        occurrence_id,
        occurrence.scheduled_at,
        name,
        expires_at,
        stop_after_s,
        &guids,
        &hostnames,
        &sites as &[Option<i64>],
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// What the components of a job run, read and prepared before the transaction that writes it.
#[derive(Debug)]
pub struct Scripts {
    components: Value,
    execution_context: String,
    /// One for each component, up to the first that cannot be had.
    ready: Vec<ScriptRequest>,
    /// Why that one cannot be had.
    error: Option<String>,
}

/// Reads and prepares the scripts of an occurrence's job, as they are now.
///
/// # Errors
/// 404 when the occurrence or its job is gone; when the database is away; 503 `busy`.
pub async fn scripts(pool: &Pool, occurrence_id: i64) -> Result<Scripts> {
    let mut conn = pool.acquire().await?;
    let job = sqlx::query!(
        "SELECT j.components, j.execution_context FROM job_occurrences o JOIN scheduled_jobs j ON j.id = o.job_id WHERE o.id = $1",
        occurrence_id
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    let mode = if job.execution_context == "current_user" { RunMode::CurrentUser } else { RunMode::System };
    let components: Vec<Component> = serde_json::from_value(job.components.clone())?;
    let mut scripts =
        Scripts { components: job.components, execution_context: job.execution_context, ready: Vec::new(), error: None };
    let mut sources = Vec::with_capacity(components.len());
    for component in components {
        sources.push((source(&mut conn, &component).await, component.variable_values));
    }
    // No connection waits for the work.
    drop(conn);
    for (source, values) in sources {
        let script = match source {
            Ok(source) => source.ready(values, mode).await,
            Err(error) => Err(error),
        };
        match script {
            Ok(script) => scripts.ready.push(script),
            Err(error) if error.is_transient() || error.kind == crate::Kind::Bug => return Err(error),
            Err(error) => {
                scripts.error = Some(format!("{}: {}", error.code, error.message));
                break;
            }
        }
    }
    Ok(scripts)
}

async fn source(conn: &mut PgConnection, component: &Component) -> Result<Source> {
    let Some(guid) = &component.assembly_guid else {
        let path = component.path.as_deref().unwrap_or_default();
        let why = format!("The job names the path {path}, which fits no assembly or several; name an assembly by its id.");
        return Err(Error::conflict("assembly_unresolved", why));
    };
    assemblies::source(conn, guid).await
}

/// Writes what is to be sent to each device of a frozen occurrence: one activity per open run and component. Doing it again writes
/// nothing new. Answers false, and has written nothing, when the job or one of the assemblies is not what `scripts` was read from;
/// then they are to be read again.
///
/// A component whose script cannot be had fails the runs that would need it, with the reason.
///
/// # Errors
/// 404 when the occurrence or its job is gone.
pub async fn prepare(conn: &mut PgConnection, occurrence_id: i64, scripts: &Scripts) -> Result<bool> {
    // A cancel either came before, and its runs are not Pending, or waits and finds the activities written here.
    let pending = sqlx::query_scalar!(
        "SELECT id FROM scheduled_job_runs WHERE occurrence_id = $1 AND status = 'Pending' ORDER BY id FOR UPDATE",
        occurrence_id
    )
    .fetch_all(&mut *conn)
    .await?;
    if pending.is_empty() {
        return Ok(true);
    }
    let guids: Vec<String> = scripts.ready.iter().map(|script| script.assembly_guid.clone()).collect();
    let hashes: Vec<String> = scripts.ready.iter().map(|script| script.content_hash.clone()).collect();
    let job = sqlx::query!(
        r#"SELECT j.id, o.scheduled_at, o.requested_by,
                  j.components = $2 AND j.execution_context = $3 AND NOT EXISTS (
                      SELECT FROM unnest($4::text[], $5::text[]) AS s (guid, hash)
                      WHERE NOT EXISTS (SELECT FROM assemblies a WHERE a.guid = s.guid AND a.content_hash = s.hash)) AS "current!"
           FROM job_occurrences o JOIN scheduled_jobs j ON j.id = o.job_id WHERE o.id = $1"#,
        occurrence_id,
        scripts.components,
        scripts.execution_context,
        &guids,
        &hashes,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    if !job.current {
        return Ok(false);
    }
    for (index, script) in scripts.ready.iter().enumerate() {
        let context = json!({
            "assembly_source": script.assembly_source, "assembly_guid": script.assembly_guid, "scheduled_job_id": job.id,
            "scheduled_ts": job.scheduled_at.timestamp(), "queue_lane": QUEUE_LANE, "activity_kind": ACTIVITY_KIND,
        });
        let index = i32::try_from(index).unwrap_or(i32::MAX);
        sqlx::query!(
            "INSERT INTO occurrence_scripts (occurrence_id, component_index, request, bytes) VALUES ($1, $2, $3, $4)
             ON CONFLICT (occurrence_id, component_index) DO NOTHING",
            occurrence_id,
            index,
            script.request,
            script.bytes,
        )
        .execute(&mut *conn)
        .await?;
        sqlx::query!(
            "INSERT INTO activity_history
                 (device_guid, hostname, site_id, run_id, component_index, component_kind, script_name, script_path, script_type,
                  activity_kind, queue_lane, request, content_hash, timeout_seconds, metadata, requested_by, deliver_until)
             SELECT r.device_guid, r.target_hostname, r.site_id, r.id, $2, 'script', $3, $4, $5, $6, $7,
                    jsonb_build_object('target_hostname', r.target_hostname, 'run_mode', $8::text, 'context',
                        $9::jsonb || jsonb_build_object('scheduled_job_run_id', r.id)),
                    $10, $11, $9::jsonb || jsonb_build_object('scheduled_job_run_id', r.id), $12, r.expires_at
             FROM scheduled_job_runs r JOIN devices d ON d.guid = r.device_guid
             WHERE r.occurrence_id = $1 AND r.status = 'Pending' AND r.cancel_requested_at IS NULL
             ORDER BY r.id
             ON CONFLICT (run_id, component_index) WHERE run_id IS NOT NULL DO NOTHING",
            occurrence_id,
            index,
            script.script_name,
            script.script_path,
            script.script_type,
            ACTIVITY_KIND,
            QUEUE_LANE,
            script.run_mode,
            context,
            script.content_hash,
            i32::try_from(script.timeout_seconds).unwrap_or(i32::MAX),
            job.requested_by,
        )
        .execute(&mut *conn)
        .await?;
    }
    if let Some(error) = &scripts.error {
        fail_unsent(&mut *conn, occurrence_id, error).await?;
    }
    // A device that went away between freezing and now has no activity, and so nothing that could end its run.
    sqlx::query!(
        "UPDATE scheduled_job_runs r SET status = 'Failed', error = 'device_gone: The device was removed.', finished_at = now(), updated_at = now()
         WHERE r.occurrence_id = $1 AND r.status = 'Pending' AND NOT EXISTS (SELECT FROM activity_history a WHERE a.run_id = r.id)",
        occurrence_id
    )
    .execute(&mut *conn)
    .await?;
    Ok(true)
}

/// The devices of an occurrence that have not said that they have begun.
///
/// # Errors
/// When the database refuses.
pub async fn waiting_devices(conn: &mut PgConnection, occurrence_id: i64) -> Result<Vec<Uuid>> {
    Ok(sqlx::query_scalar!(
        r#"SELECT DISTINCT device_guid AS "device!" FROM scheduled_job_runs WHERE occurrence_id = $1 AND status = 'Pending' AND device_guid IS NOT NULL"#,
        occurrence_id
    )
    .fetch_all(conn)
    .await?)
}

/// Fails those open runs of an occurrence of which no device has anything.
///
/// # Errors
/// When the database refuses.
pub async fn fail_unsent(conn: &mut PgConnection, occurrence_id: i64, error: &str) -> Result<()> {
    super::run::lock(&mut *conn, occurrence_id, None).await?;
    sqlx::query!(
        "UPDATE scheduled_job_runs r SET status = 'Failed', error = left($2, 512), finished_at = now(), updated_at = now()
         WHERE r.occurrence_id = $1 AND r.status IN ('Pending', 'Running')
           AND NOT EXISTS (SELECT FROM activity_history a WHERE a.run_id = r.id AND a.delivery IN ('sent', 'accepted'))",
        occurrence_id,
        error,
    )
    .execute(&mut *conn)
    .await?;
    sqlx::query!(
        "UPDATE activity_history a SET status = 'Failed', error = left($2, 512), delivery = 'done', finished_at = now(), updated_at = now()
         FROM scheduled_job_runs r
         WHERE r.id = a.run_id AND r.occurrence_id = $1 AND r.status = 'Failed' AND a.delivery IN ('waiting', 'ready')",
        occurrence_id,
        error,
    )
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minute: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_700_000_000 / 300 * 300 + minute * 60, 0).unwrap()
    }

    fn every_5(at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        Some(at + Duration::minutes(5))
    }

    fn fires(plan: &Plan) -> Vec<DateTime<Utc>> {
        plan.decisions.iter().filter_map(|d| if let Decision::Fire { at, .. } = d { Some(*at) } else { None }).collect()
    }

    #[test]
    fn on_time_is_one_fire_and_the_next_instant() {
        for policy in [MisfirePolicy::Skip, MisfirePolicy::RunOnce, MisfirePolicy::RunAll] {
            let plan = plan(at(0), at(0) + Duration::seconds(2), None, policy, every_5);
            assert_eq!(plan.decisions, [Decision::Fire { at: at(0), catch_up: false }]);
            assert_eq!((plan.next_due_at, plan.used), (Some(at(5)), 1));
        }
    }

    #[test]
    fn after_an_outage_each_policy_does_what_it_says() {
        let now = at(62); // instants 0, 5, ..., 60; the last is two minutes late
        let skip = plan(at(0), now, None, MisfirePolicy::Skip, every_5);
        assert!(fires(&skip).is_empty());
        assert_eq!(skip.decisions.len(), CATCH_UP_MAX);
        assert_eq!(
            skip.decisions.first(),
            Some(&Decision::Skip { at: at(15), reason: "misfire", more: 3 }),
            "13 missed, ten recorded alone"
        );
        let once = plan(at(0), now, None, MisfirePolicy::RunOnce, every_5);
        assert_eq!(fires(&once), [at(60)]);
        let all = plan(at(0), now, None, MisfirePolicy::RunAll, every_5);
        assert_eq!(fires(&all).len(), CATCH_UP_MAX);
        assert_eq!(fires(&all).first(), Some(&at(15)));
        for plan in [skip, once, all] {
            assert_eq!((plan.next_due_at, plan.used), (Some(at(65)), 13));
        }
    }

    #[test]
    fn an_instant_on_time_takes_the_place_of_the_catch_up() {
        let once = plan(at(0), at(10), None, MisfirePolicy::RunOnce, every_5);
        assert_eq!(fires(&once), [at(10)], "the missed 0 and 5 are not run beside it");
        assert_eq!(once.used, 3);
    }

    #[test]
    fn the_last_allowed_instant_ends_the_schedule() {
        let last = plan(at(0), at(0), Some(1), MisfirePolicy::RunOnce, every_5);
        assert_eq!((fires(&last), last.next_due_at), (vec![at(0)], None));
        let missed = plan(at(0), at(62), Some(3), MisfirePolicy::RunOnce, every_5);
        assert_eq!((fires(&missed), missed.next_due_at, missed.used), (vec![at(10)], None, 3));
    }

    #[test]
    fn decisions_of_one_pass_see_each_other() {
        let fire = |minute| Decision::Fire { at: at(minute), catch_up: true };
        let decisions: Vec<_> = (0..3).map(|n| fire(n * 5)).collect();
        let fates = |policy, standing: &Standing| {
            settle(7, &decisions, policy, standing).into_iter().map(|settled| (settled.at, settled.fate)).collect::<Vec<_>>()
        };
        let (run, wait) = (Fate::Run { catch_up: true }, Fate::Wait { catch_up: true });
        let nothing = Standing::default();
        assert_eq!(fates(OverlapPolicy::Skip, &nothing), [(at(0), run.clone()), (at(5), wait.clone()), (at(10), wait.clone())]);
        let taken = Standing { taken: BTreeSet::from([at(0)]), ..Standing::default() };
        assert_eq!(
            fates(OverlapPolicy::Skip, &taken),
            [(at(5), run), (at(10), wait.clone())],
            "what is there already is left alone"
        );
        let full = Standing { unfinished: QUEUE_MAX, queued: QUEUE_MAX - 1, ..Standing::default() };
        let skip = Fate::Skip { reason: "overlap", more: 0 };
        assert_eq!(fates(OverlapPolicy::Queue, &full), [(at(0), wait), (at(5), skip.clone()), (at(10), skip)]);
    }

    #[test]
    fn overlap_follows_its_policy() {
        use OverlapPolicy::{Allow, Queue, Skip};
        assert_eq!(overlap(Skip, false, 0, false), Overlap::Run);
        assert_eq!(overlap(Skip, true, 0, false), Overlap::Skip);
        assert_eq!(overlap(Skip, true, 0, true), Overlap::Wait, "catching up goes one after another");
        assert_eq!(overlap(Queue, true, 3, false), Overlap::Wait);
        assert_eq!(overlap(Queue, true, QUEUE_MAX, false), Overlap::Skip, "the queue is bounded");
        assert_eq!(overlap(Allow, true, 0, false), Overlap::Run);
    }
}
