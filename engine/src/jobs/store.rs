//! Jobs in the database.
//!
//! A job is visible to those who may see every site of its targets; the condition is part of each
//! query. Saving a job moves the scheduler's cursor and tells the scheduler; nothing here starts a run.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{
    schedule::{Expiration, Schedule, ScheduleRow},
    spec::{self, Component, ExecutionContext, JobBody, JobSpec},
    targets,
};
use crate::{
    assemblies,
    audit::{self, Entry},
    error::{Error, Kind, Result},
    quotas,
    scope::{Actor, Caller, Scope},
};

/// The channel on which the scheduler is told that a due instant has changed.
pub const SCHEDULE_CHANGED: &str = "borealis_schedule";

/// A stored job, locked.
#[derive(Debug)]
pub struct Job {
    /// Its id.
    pub id: i64,
    /// What it is.
    pub spec: JobSpec,
    /// The saved form of its targets.
    pub targets: Value,
    /// The sites it may ever reach; none: all.
    pub scope_site_ids: Option<Vec<i64>>,
    /// How many occurrences the schedule has used up.
    pub occurrences_used: i64,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// The clock every decision about instants uses: the database's.
///
/// # Errors
/// When the database refuses.
pub async fn now(conn: &mut PgConnection) -> Result<DateTime<Utc>> {
    Ok(sqlx::query_scalar!(r#"SELECT now() AS "now!""#).fetch_one(conn).await?)
}

/// Makes a job and answers its id.
///
/// # Errors
/// 403, 400 and 409 as [`targets::to_save`] and [`JobSpec::parse`]; 400 `unknown_assembly`; 409 `ambiguous_assembly`,
/// `quota_exceeded`.
pub async fn create(conn: &mut PgConnection, caller: Caller<'_>, body: &JobBody) -> Result<i64> {
    let now = now(conn).await?;
    let targets = match &body.targets {
        Some(value) if !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()) => {
            targets::to_save(conn, caller.scope, &spec::targets(value)?).await?
        }
        _ => Vec::new(),
    };
    let mut spec = JobSpec::parse(body, now)?;
    resolve(conn, &mut spec.components).await?;
    let scope_site_ids = caller.scope.site_ids().map(|sites| {
        let mut sites = sites.to_vec();
        sites.sort_unstable();
        sites
    });
    let schedule = &spec.schedule;
    let first = schedule.first(now);
    let id = sqlx::query_scalar!(
        "INSERT INTO scheduled_jobs (name, job_kind, components, targets, schedule_type, start_at, start_wall, timezone, cron, end_at,
             max_occurrences, misfire_policy, overlap_policy, duration_stop_enabled, expiration, stop_after, execution_context,
             enabled, owner_user_id, editor_user_id, scope_site_ids, next_due_at, next_due_wall)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $19, $20, $21, $22) RETURNING id",
        spec.name,
        spec.job_kind,
        serde_json::to_value(&spec.components)?,
        Value::Array(targets),
        schedule.kind().as_str(),
        schedule.start(),
        schedule.start_wall(),
        schedule.timezone().name(),
        schedule.cron(),
        schedule.end(),
        schedule.max_occurrences(),
        spec.misfire_policy.as_str(),
        spec.overlap_policy.as_str(),
        spec.duration_stop_enabled,
        spec.expiration.to_string(),
        spec.stop_after.map(|limit| limit.to_string()),
        spec.execution_context.as_str(),
        spec.enabled,
        caller.user_id,
        scope_site_ids.as_deref(),
        first,
        first.and_then(|first| schedule.wall_of(first)),
    )
    .fetch_one(&mut *conn)
    .await?;
    quotas::jobs(conn, caller.user_id, caller.quotas).await?;
    let detail = json!({"name": spec.name, "schedule": schedule.kind().as_str(), "assemblies": named(&spec.components)});
    record(conn, caller.actor, "scheduled_job.create", id, detail).await?;
    tell_scheduler(conn).await?;
    Ok(id)
}

/// Changes what the body names and checks the whole again.
///
/// # Errors
/// 404; else as [`create`], and 400 `no_fields_to_update`.
pub async fn update(conn: &mut PgConnection, caller: Caller<'_>, id: i64, body: &JobBody) -> Result<()> {
    let now = now(conn).await?;
    let job = lock(conn, caller.scope, id).await?;
    let mut spec = job.spec.clone();
    // Targets stay inside the sites the job was made for, whoever edits it.
    let saved = match &body.targets {
        Some(value) if !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()) => {
            let scope = targets::narrow(caller.scope, job.scope_site_ids.as_deref());
            Value::Array(targets::to_save(conn, &scope, &spec::targets(value)?).await?)
        }
        _ => job.targets.clone(),
    };
    spec.update(body, now)?;
    spec.schedule = spec.schedule.anchored(job.created_at);
    if body.components.is_some() {
        resolve(conn, &mut spec.components).await?;
    }
    let edited = edits(caller, body, &job.spec, &spec);
    let grows = saved != job.targets || spec.components != job.spec.components;
    let schedule = &spec.schedule;
    let moved = !schedule.same_as(&job.spec.schedule) || (spec.enabled && !job.spec.enabled);
    let next_due_at = next_due(&spec, job.occurrences_used, now);
    let owner = sqlx::query_scalar!(
        "UPDATE scheduled_jobs SET name = $2, components = $3, targets = $4, schedule_type = $5, start_at = $6, start_wall = $7,
             timezone = $8, cron = $9, end_at = $10, max_occurrences = $11, misfire_policy = $12, overlap_policy = $13,
             duration_stop_enabled = $14, expiration = $15, stop_after = $16, execution_context = $17, enabled = $18,
             next_due_at = CASE WHEN $19 THEN $20 ELSE next_due_at END,
             next_due_wall = CASE WHEN $19 THEN $23 ELSE next_due_wall END,
             schedule_revision = schedule_revision + CASE WHEN $19 THEN 1 ELSE 0 END, updated_at = now(),
             -- Who saves a job whose owner or last editor is gone takes it over.
             owner_user_id = coalesce(owner_user_id, $21),
             editor_user_id = CASE WHEN $22 THEN $21 ELSE coalesce(editor_user_id, $21) END
         WHERE id = $1 RETURNING owner_user_id AS \"owner!\"",
        id,
        spec.name,
        serde_json::to_value(&spec.components)?,
        saved,
        schedule.kind().as_str(),
        schedule.start(),
        schedule.start_wall(),
        schedule.timezone().name(),
        schedule.cron(),
        schedule.end(),
        schedule.max_occurrences(),
        spec.misfire_policy.as_str(),
        spec.overlap_policy.as_str(),
        spec.duration_stop_enabled,
        spec.expiration.to_string(),
        spec.stop_after.map(|limit| limit.to_string()),
        spec.execution_context.as_str(),
        spec.enabled,
        moved,
        next_due_at,
        caller.user_id,
        edited,
        next_due_at.and_then(|next| schedule.wall_of(next)),
    )
    .fetch_one(&mut *conn)
    .await?;
    if grows {
        quotas::jobs(conn, owner, caller.quotas).await?;
    }
    let detail = json!({"name": spec.name, "before": job.spec.name, "edited": edited, "assemblies": named(&spec.components)});
    record(conn, caller.actor, "scheduled_job.update", id, detail).await?;
    tell_scheduler(conn).await
}

/// Switches a job on or off. What was due while it was off is not made up for.
///
/// # Errors
/// 404.
pub async fn toggle(conn: &mut PgConnection, caller: Caller<'_>, id: i64, enabled: bool) -> Result<()> {
    let now = now(conn).await?;
    let job = lock(conn, caller.scope, id).await?;
    if job.spec.enabled == enabled {
        return Ok(());
    }
    let next_due_at = next_due(&job.spec, job.occurrences_used, now);
    sqlx::query!(
        "UPDATE scheduled_jobs SET enabled = $2, next_due_at = CASE WHEN $2 THEN $3 ELSE next_due_at END,
             next_due_wall = CASE WHEN $2 THEN $4 ELSE next_due_wall END,
             schedule_revision = schedule_revision + 1, updated_at = now() WHERE id = $1",
        id,
        enabled,
        next_due_at,
        next_due_at.and_then(|next| job.spec.schedule.wall_of(next)),
    )
    .execute(&mut *conn)
    .await?;
    let action = if enabled { "scheduled_job.enable" } else { "scheduled_job.disable" };
    record(conn, caller.actor, action, id, json!({"name": job.spec.name})).await?;
    tell_scheduler(conn).await
}

/// Switches off the jobs that use these credentials, and says which.
///
/// # Errors
/// When the database is away.
pub(crate) async fn disable_with_credentials(conn: &mut PgConnection, actor: &Actor, credentials: &[i64]) -> Result<Vec<i64>> {
    let jobs = sqlx::query!(
        "UPDATE scheduled_jobs SET enabled = false, schedule_revision = schedule_revision + 1, updated_at = now()
         WHERE enabled AND credential_id = ANY ($1) RETURNING id, name",
        credentials,
    )
    .fetch_all(&mut *conn)
    .await?;
    for job in &jobs {
        record(conn, actor, "scheduled_job.disable", job.id, json!({"name": job.name, "reason": "credential_lost"})).await?;
    }
    tell_scheduler(conn).await?;
    Ok(jobs.into_iter().map(|job| job.id).collect())
}

/// Removes a job with its occurrences and runs. What is running must have been cancelled before, in the same transaction.
///
/// # Errors
/// 404.
pub async fn delete(conn: &mut PgConnection, caller: Caller<'_>, id: i64) -> Result<()> {
    let job = lock(conn, caller.scope, id).await?;
    sqlx::query!("DELETE FROM scheduled_jobs WHERE id = $1", id).execute(&mut *conn).await?;
    record(conn, caller.actor, "scheduled_job.delete", id, json!({"name": job.spec.name})).await?;
    tell_scheduler(conn).await
}

/// Removes the ended occurrences of a job except the latest, and what has not ended. Answers how many runs went, and the
/// instant of the latest occurrence.
///
/// # Errors
/// 404.
pub async fn clear_runs(conn: &mut PgConnection, caller: Caller<'_>, id: i64) -> Result<(i64, Option<DateTime<Utc>>)> {
    lock(conn, caller.scope, id).await?;
    let kept = sqlx::query!(
        "SELECT id, scheduled_at FROM job_occurrences WHERE job_id = $1 ORDER BY scheduled_at DESC, id DESC LIMIT 1",
        id
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(kept) = kept else { return Ok((0, None)) };
    let cleared = sqlx::query_scalar!(
        r#"WITH gone AS (SELECT id FROM job_occurrences WHERE job_id = $1 AND id <> $2 AND state = 'closed'),
                runs AS (DELETE FROM scheduled_job_runs WHERE occurrence_id IN (SELECT id FROM gone) RETURNING 1),
                occurrences AS (DELETE FROM job_occurrences WHERE id IN (SELECT id FROM gone))
           SELECT count(*) AS "count!" FROM runs"#,
        id,
        kept.id,
    )
    .fetch_one(&mut *conn)
    .await?;
    record(conn, caller.actor, "scheduled_job.clear_runs", id, json!({"cleared": cleared})).await?;
    Ok((cleared, Some(kept.scheduled_at)))
}

/// Reads and locks a job the caller may see. The lock also orders manual starts of the same job.
///
/// # Errors
/// 404.
pub async fn lock(conn: &mut PgConnection, scope: &Scope, id: i64) -> Result<Job> {
    let row = sqlx::query!(
        "SELECT id, name, components, targets, schedule_type, start_at, start_wall, timezone, cron, end_at, max_occurrences,
                misfire_policy, overlap_policy, duration_stop_enabled, expiration, stop_after, execution_context, enabled,
                scope_site_ids, occurrences_used, created_at
         FROM scheduled_jobs
         WHERE id = $1 AND ($2::bigint[] IS NULL OR job_site_ids(targets) <@ $2)
         FOR UPDATE",
        id,
        scope.site_ids(),
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)?;
    let schedule = Schedule::from_row(&ScheduleRow {
        schedule_type: row.schedule_type,
        start_at: row.start_at,
        start_wall: row.start_wall,
        timezone: row.timezone,
        cron: row.cron,
        end_at: row.end_at,
        max_occurrences: row.max_occurrences,
        created_at: row.created_at,
    })?;
    let stored = |error: Error| Error::bug(error.message);
    let components: Vec<Component> = serde_json::from_value(row.components)?;
    Ok(Job {
        id: row.id,
        spec: JobSpec {
            name: row.name,
            job_kind: "automation",
            components,
            schedule,
            misfire_policy: row.misfire_policy.parse().map_err(stored)?,
            overlap_policy: row.overlap_policy.parse().map_err(stored)?,
            duration_stop_enabled: row.duration_stop_enabled,
            expiration: row.expiration.parse().unwrap_or(Expiration::Never),
            stop_after: row.stop_after.as_deref().and_then(|text| text.parse().ok()),
            execution_context: ExecutionContext::parse(&row.execution_context).map_err(stored)?,
            enabled: row.enabled,
        },
        targets: row.targets,
        scope_site_ids: row.scope_site_ids,
        occurrences_used: row.occurrences_used,
        created_at: row.created_at,
    })
}

/// The devices that did not end in Success in the latest occurrence that had devices, as far as the caller may see them.
///
/// # Errors
/// 409 `occurrence_in_progress` while it has not ended, 409 `nothing_to_retry` when there is none or all succeeded.
pub async fn to_retry(conn: &mut PgConnection, scope: &Scope, job_id: i64) -> Result<Vec<Uuid>> {
    if in_progress(conn, job_id).await? {
        return Err(occurrence_in_progress());
    }
    let devices = sqlx::query_scalar!(
        r#"SELECT DISTINCT r.device_guid AS "device_guid!" FROM scheduled_job_runs r
           WHERE r.occurrence_id = (
                   SELECT o.id FROM job_occurrences o
                   WHERE o.job_id = $1 AND EXISTS (SELECT FROM scheduled_job_runs d WHERE d.occurrence_id = o.id AND d.device_guid IS NOT NULL)
                   ORDER BY o.scheduled_at DESC LIMIT 1)
             AND r.device_guid IS NOT NULL AND r.status <> 'Success' AND ($2::bigint[] IS NULL OR r.site_id = ANY($2))
           ORDER BY 1"#,
        job_id,
        scope.site_ids(),
    )
    .fetch_all(conn)
    .await?;
    if devices.is_empty() {
        return Err(Error::conflict("nothing_to_retry", "No target of the latest occurrence is without success."));
    }
    Ok(devices)
}

/// The devices whose run in an occurrence did not end well, as far as the caller may see them.
///
/// # Errors
/// 409 `nothing_to_retry` when there are none.
pub async fn failed_in(conn: &mut PgConnection, scope: &Scope, occurrence_id: i64) -> Result<Vec<Uuid>> {
    let devices = sqlx::query_scalar!(
        r#"SELECT DISTINCT device_guid AS "device_guid!" FROM scheduled_job_runs
           WHERE occurrence_id = $1 AND device_guid IS NOT NULL AND status NOT IN ('Success', 'Warning', 'Skipped')
             AND ($2::bigint[] IS NULL OR site_id = ANY($2))
           ORDER BY 1"#,
        occurrence_id,
        scope.site_ids(),
    )
    .fetch_all(conn)
    .await?;
    if devices.is_empty() {
        return Err(Error::conflict("nothing_to_retry", "No target of this occurrence has failed."));
    }
    Ok(devices)
}

/// Whether an occurrence of the job has not ended.
///
/// # Errors
/// When the database refuses.
pub async fn in_progress(conn: &mut PgConnection, job_id: i64) -> Result<bool> {
    Ok(sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT FROM job_occurrences WHERE job_id = $1 AND state <> 'closed') AS "open!""#,
        job_id
    )
    .fetch_one(conn)
    .await?)
}

/// The 409 of a manual start beside an unfinished occurrence.
#[must_use]
pub fn occurrence_in_progress() -> Error {
    Error::conflict("occurrence_in_progress", "An occurrence of this job has not ended.")
}

/// The instant of an occurrence, and its runs as far as they are frozen.
///
/// # Errors
/// 404 when there is none.
pub async fn started(conn: &mut PgConnection, occurrence_id: i64) -> Result<(DateTime<Utc>, Vec<i64>)> {
    let row = sqlx::query!(
        r#"SELECT scheduled_at, ARRAY(SELECT r.id FROM scheduled_job_runs r WHERE r.occurrence_id = o.id ORDER BY r.id) AS "runs!"
           FROM job_occurrences o WHERE id = $1"#,
        occurrence_id
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)?;
    Ok((row.scheduled_at, row.runs))
}

/// When a job is due next, if it is switched on or rescheduled at `now`. A one-shot job that has run is due again only at a
/// start that lies ahead.
fn next_due(spec: &JobSpec, used: i64, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let schedule = &spec.schedule;
    if schedule.remaining(used) == Some(0) {
        return None;
    }
    let ran = schedule.kind().is_one_shot() && used > 0;
    if ran && schedule.start().is_none_or(|start| start <= now) {
        return None;
    }
    schedule.first(now)
}

/// Whether a change makes the caller the job's last editor: it changes what is run, or an administrator says again what is run.
fn edits(caller: Caller<'_>, body: &JobBody, before: &JobSpec, after: &JobSpec) -> bool {
    let said = body.components.is_some() || body.execution_context.is_some();
    let changed = before.components != after.components || before.execution_context != after.execution_context;
    said && (changed || caller.is_admin())
}

/// The guids that components name.
fn named(components: &[Component]) -> Vec<&str> {
    components.iter().filter_map(|component| component.assembly_guid.as_deref()).collect()
}

/// Puts the guid of its assembly into each component, by the path it was named with where there is no guid. The paths are dropped.
async fn resolve(conn: &mut PgConnection, components: &mut [Component]) -> Result<()> {
    for (index, component) in components.iter_mut().enumerate() {
        let by = if component.assembly_guid.is_some() { "assembly_guid" } else { "path" };
        let field = format!("components[{index}].{by}");
        let reference = assemblies::Reference { assembly_guid: component.assembly_guid.take(), path: component.path.take() };
        let guid = assemblies::resolve(&mut *conn, &reference).await.map_err(|error| match error.kind {
            Kind::NotFound => Error::field("unknown_assembly", &field, "names no assembly"),
            Kind::Invalid => Error::field("invalid_components", &field, "is not a script"),
            _ if error.code == "ambiguous_assembly" => error.with("component", index),
            _ => error,
        })?;
        component.assembly_guid = Some(guid);
    }
    Ok(())
}

async fn tell_scheduler(conn: &mut PgConnection) -> Result<()> {
    sqlx::query!("SELECT pg_notify($1, '')", SCHEDULE_CHANGED).execute(conn).await?;
    Ok(())
}

/// Writes the audit row of something done to a job.
///
/// # Errors
/// When the database refuses.
pub async fn record(conn: &mut PgConnection, actor: &Actor, action: &str, id: i64, detail: Value) -> Result<()> {
    let entry = Entry { action, object_kind: "scheduled_job", object_id: id.to_string(), detail, ..Entry::default() };
    audit::record(conn, actor, entry).await
}
