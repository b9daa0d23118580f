//! What operators read of jobs, runs and device results. Times are epoch seconds.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::targets;
use crate::{
    error::{Error, Result},
    instants,
    scope::Scope,
};

/// The most jobs one page holds.
pub const JOBS_MAX: i64 = 1_000;
/// The most runs one page holds.
pub const RUNS_MAX: i64 = 500;
/// The most devices one answer holds.
pub const DEVICES_MAX: i64 = 10_000;

/// The warning of a job one of whose components is a path of which nobody can say what it means.
const UNRESOLVED: &str =
    "A component names a path that fits no assembly or several; it fails until an assembly is named by its id.";
/// The warning of a job one of whose assemblies was removed.
const MISSING: &str = "An assembly of this job was removed; the job fails until another is named.";

/// A job.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are named as clients of the reference read them")]
pub struct JobView {
    pub id: i64,
    pub name: String,
    pub job_kind: String,
    pub components: Box<RawValue>,
    pub targets: Box<RawValue>,
    pub schedule: ScheduleView,
    pub schedule_type: String,
    pub start_ts: Option<i64>,
    pub timezone: String,
    pub cron: Option<String>,
    pub end_ts: Option<i64>,
    pub max_occurrences: Option<i64>,
    pub occurrences_used: i64,
    pub misfire_policy: String,
    pub overlap_policy: String,
    pub duration_stop_enabled: bool,
    pub expiration: String,
    pub stop_after: Option<String>,
    pub execution_context: String,
    pub credential_id: Option<i64>,
    pub use_service_account: bool,
    pub enabled: bool,
    pub created_at: i64,
    pub updated_at: i64,
    pub last_run_ts: Option<i64>,
    pub latest_occurrence: Option<i64>,
    pub last_status: String,
    pub next_run_ts: Option<i64>,
    pub result_counts: ResultCounts,
    pub warning_code: String,
    pub warning_message: String,
}

/// The schedule of a job in the form it is written in.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are those of a job's body")]
pub struct ScheduleView {
    #[serde(rename = "type")]
    pub kind: String,
    pub start: Option<i64>,
    pub timezone: String,
    pub cron: Option<String>,
    pub end: Option<i64>,
    pub max_occurrences: Option<i64>,
}

/// How many targets of the latest occurrence stand where.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the fields are the statuses of runs")]
pub struct ResultCounts {
    pub pending: i64,
    pub running: i64,
    pub success: i64,
    pub warning: i64,
    pub failed: i64,
    pub expired: i64,
    pub timed_out: i64,
    pub skipped: i64,
    pub total_targets: i64,
}

impl ResultCounts {
    /// The one word for an occurrence: the first of the statuses that any target has.
    #[must_use]
    pub fn status(&self, only_without_devices: bool) -> &'static str {
        let in_order = [
            (self.running, "Running"),
            (self.failed, "Failed"),
            (self.timed_out, "Timed Out"),
            (self.warning, "Warning"),
            (self.expired, "Expired"),
            (self.pending, "Pending"),
            (self.success, "Success"),
        ];
        match in_order.into_iter().find(|(count, _)| *count > 0) {
            Some((_, status)) => status,
            None if self.skipped > 0 && only_without_devices => "No Devices Targeted",
            None if self.skipped > 0 => "Skipped",
            // Opened, its targets not yet frozen.
            None => "Pending",
        }
    }
}

/// Which jobs a list shows.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Only this one.
    pub id: Option<i64>,
    /// Only those of exactly this name.
    pub name: Option<String>,
    /// Only those that reach this site.
    pub site_id: Option<i64>,
    /// Only those older than this one: the cursor.
    pub before: Option<i64>,
}

/// The jobs a caller may see, newest first, at most `limit`.
///
/// # Errors
/// When the database refuses.
pub async fn jobs(conn: &mut PgConnection, scope: &Scope, filter: JobFilter, limit: i64) -> Result<Vec<JobView>> {
    let rows = sqlx::query!(
        r#"SELECT j.id, j.name, j.job_kind, j.components AS "components: Json<Box<RawValue>>",
                  j.targets AS "targets: Json<Box<RawValue>>",
                  CASE WHEN o.id IS NULL AND jsonb_typeof(j.targets) = 'array' THEN jsonb_array_length(j.targets) END AS saved_targets, j.schedule_type, j.start_at, j.timezone, j.cron, j.end_at,
                  j.max_occurrences, j.occurrences_used, j.misfire_policy, j.overlap_policy, j.duration_stop_enabled, j.expiration,
                  j.stop_after, j.execution_context, j.credential_id, j.use_service_account, j.enabled, j.created_at, j.updated_at,
                  j.next_due_at, o.scheduled_at AS "latest?",
                  j.components @? '$[*] ? (!exists(@.assembly_guid))' AS "unresolved!",
                  EXISTS (SELECT FROM jsonb_array_elements(j.components) e
                          WHERE NOT EXISTS (SELECT FROM assemblies a WHERE a.guid = e ->> 'assembly_guid')) AS "missing!",
                  c.pending AS "pending!", c.running AS "running!", c.success AS "success!", c.warning AS "warning!",
                  c.failed AS "failed!", c.expired AS "expired!", c.timed_out AS "timed_out!", c.skipped AS "skipped!",
                  c.hosts AS "hosts!", c.without_devices AS "without_devices!"
           FROM scheduled_jobs j
           LEFT JOIN LATERAL (
               SELECT id, scheduled_at, results FROM job_occurrences WHERE job_id = j.id ORDER BY scheduled_at DESC LIMIT 1
           ) o ON true
           CROSS JOIN LATERAL (
               SELECT coalesce(sum(runs) FILTER (WHERE status = 'Pending'), 0)::bigint AS pending,
                      coalesce(sum(runs) FILTER (WHERE status = 'Running'), 0)::bigint AS running,
                      coalesce(sum(runs) FILTER (WHERE status = 'Success'), 0)::bigint AS success,
                      coalesce(sum(runs) FILTER (WHERE status = 'Warning'), 0)::bigint AS warning,
                      coalesce(sum(runs) FILTER (WHERE status = 'Failed'), 0)::bigint AS failed,
                      coalesce(sum(runs) FILTER (WHERE status = 'Expired'), 0)::bigint AS expired,
                      coalesce(sum(runs) FILTER (WHERE status = 'Timed Out'), 0)::bigint AS timed_out,
                      coalesce(sum(runs) FILTER (WHERE status = 'Skipped'), 0)::bigint AS skipped,
                      coalesce(sum(runs) FILTER (WHERE NOT nowhere), 0)::bigint AS hosts,
                      coalesce(bool_and(without), false) AS without_devices
               FROM (
                   SELECT k.status, k.site_id, k.nowhere, k.without, k.runs
                   FROM jsonb_to_recordset(o.results) AS k (status text, site_id bigint, nowhere boolean, without boolean, runs bigint)
                   UNION ALL
                   -- One that is under way is counted.
                   SELECT r.status, r.site_id, r.device_guid IS NULL, r.skip_reason = 'no_devices_targeted', 1
                   FROM scheduled_job_runs r WHERE o.results IS NULL AND r.occurrence_id = o.id) AS r
               WHERE $1::bigint[] IS NULL OR r.site_id = ANY($1) OR (r.site_id IS NULL AND r.nowhere)
           ) c
           WHERE ($1::bigint[] IS NULL OR job_site_ids(j.targets) <@ $1)
             AND ($2::bigint IS NULL OR j.id = $2)
             AND ($3::bigint IS NULL OR $3 = ANY(job_site_ids(j.targets))
                  -- All devices are those that the job may reach: see `targets::reach`.
                  OR (j.targets @> '[{"kind": "all_devices"}]' AND EXISTS (SELECT FROM sites WHERE id = $3)
                      AND (j.scope_site_ids IS NULL OR $3 = ANY(j.scope_site_ids))
                      AND NOT EXISTS (
                          SELECT FROM unnest(ARRAY[j.owner_user_id, j.editor_user_id]) AS person (id)
                          WHERE NOT EXISTS (
                              SELECT FROM users u WHERE u.id = person.id AND NOT u.directory_disabled
                                AND (u.role = 'Admin' OR EXISTS (
                                     SELECT FROM user_site_assignments a WHERE a.user_id = u.id AND a.site_id = $3))))))
             AND ($4::bigint IS NULL OR j.id < $4) AND ($6::text IS NULL OR j.name = $6)
           ORDER BY j.id DESC LIMIT $5"#,
        scope.site_ids(),
        filter.id,
        filter.site_id,
        filter.before,
        limit,
        filter.name,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let mut counts = ResultCounts {
                pending: row.pending,
                running: row.running,
                success: row.success,
                warning: row.warning,
                failed: row.failed,
                expired: row.expired,
                timed_out: row.timed_out,
                skipped: row.skipped,
                total_targets: row.hosts,
            };
            let latest = row.latest.map(|at| at.timestamp());
            let last_status = match latest {
                Some(_) => counts.status(row.without_devices),
                None if row.start_at.is_some() => "Scheduled",
                None => "",
            };
            if latest.is_none() {
                counts.total_targets = row.saved_targets.map_or(0, i64::from);
            }
            let (warning_code, warning_message) = match (row.unresolved, row.missing) {
                (true, _) => ("assembly_unresolved", UNRESOLVED),
                (false, true) => ("assembly_missing", MISSING),
                (false, false) => ("", ""),
            };
            let (start_ts, end_ts) = (row.start_at.map(|at| at.timestamp()), row.end_at.map(|at| at.timestamp()));
            JobView {
                schedule: ScheduleView {
                    kind: row.schedule_type.clone(),
                    start: start_ts,
                    timezone: row.timezone.clone(),
                    cron: row.cron.clone(),
                    end: end_ts,
                    max_occurrences: row.max_occurrences,
                },
                id: row.id,
                name: row.name,
                job_kind: row.job_kind,
                components: row.components.0,
                targets: row.targets.0,
                schedule_type: row.schedule_type,
                start_ts,
                timezone: row.timezone,
                cron: row.cron,
                end_ts,
                max_occurrences: row.max_occurrences,
                occurrences_used: row.occurrences_used,
                misfire_policy: row.misfire_policy,
                overlap_policy: row.overlap_policy,
                duration_stop_enabled: row.duration_stop_enabled,
                expiration: row.expiration,
                stop_after: row.stop_after,
                execution_context: row.execution_context,
                credential_id: row.credential_id,
                use_service_account: row.use_service_account,
                enabled: row.enabled,
                created_at: row.created_at.timestamp(),
                updated_at: row.updated_at.timestamp(),
                last_run_ts: latest,
                latest_occurrence: latest,
                last_status: last_status.to_owned(),
                next_run_ts: row.next_due_at.filter(|_| row.enabled).map(|at| at.timestamp()),
                result_counts: counts,
                warning_code: warning_code.to_owned(),
                warning_message: warning_message.to_owned(),
            }
        })
        .collect())
}

/// One job.
///
/// # Errors
/// 404.
pub async fn job(conn: &mut PgConnection, scope: &Scope, id: i64) -> Result<JobView> {
    let filter = JobFilter { id: Some(id), ..JobFilter::default() };
    jobs(conn, scope, filter, 1).await?.pop().ok_or_else(Error::not_found)
}

/// One run: one target of one occurrence.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are named as clients of the reference read them")]
pub struct RunView {
    pub id: i64,
    pub job_id: i64,
    pub scheduled_ts: i64,
    pub started_ts: Option<i64>,
    pub finished_ts: Option<i64>,
    pub status: String,
    pub error: Option<String>,
    pub skip_reason: Option<String>,
    pub cause: String,
    pub device_guid: Option<Uuid>,
    pub target_hostname: Option<String>,
    pub site_id: Option<i64>,
    pub shared_execution: bool,
    pub component_index: Option<i32>,
    pub component_kind: String,
    pub component_name: String,
    pub workflow_run_id: Option<Uuid>,
    pub cancel_requested: bool,
    #[serde(skip)]
    sort_at: DateTime<Utc>,
}

impl RunView {
    /// Where the page after this run begins.
    #[must_use]
    pub fn cursor(&self) -> String {
        format!("{}-{}", self.sort_at.timestamp_micros(), self.id)
    }
}

/// Where a page of runs begins, as [`RunView::cursor`] wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunCursor(DateTime<Utc>, i64);

impl std::str::FromStr for RunCursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.rsplit_once('-')
            .and_then(|(at, id)| Some(Self(instants::from_micros(at.parse().ok()?)?, id.parse().ok()?)))
            .ok_or_else(|| Error::field("invalid_cursor", "cursor", "is not the next_cursor of a page"))
    }
}

/// The runs of a job in the last `days`, newest first, at most `limit`. The job's visibility is the caller's to check; runs
/// of devices in other sites, from before its targets were changed, are left out here.
///
/// # Errors
/// When the database refuses.
pub async fn runs(
    conn: &mut PgConnection,
    scope: &Scope,
    job_id: i64,
    days: i32,
    after: Option<RunCursor>,
    limit: i64,
) -> Result<Vec<RunView>> {
    let rows = sqlx::query!(
        r#"SELECT r.id, r.job_id, r.scheduled_at, r.started_at, r.finished_at, r.status, r.error, r.skip_reason, o.cause, r.device_guid,
                  r.target_hostname, r.site_id, r.shared_execution, r.component_index, r.component_kind, r.component_name,
                  coalesce(r.workflow_run_id, o.workflow_run_id) AS workflow_run_id, r.cancel_requested_at,
                  r.scheduled_at AS sort_at
           FROM scheduled_job_runs r JOIN job_occurrences o ON o.id = r.occurrence_id
           WHERE r.job_id = $1
             AND ($2::bigint[] IS NULL OR r.site_id = ANY($2) OR (r.site_id IS NULL AND r.device_guid IS NULL))
             AND coalesce(r.finished_at, r.started_at, r.scheduled_at) >= now() - make_interval(days => $3)
             -- Whatever the arguments, a range of the index that the page is ordered by: by what of a run never changes, so that a run
             -- that starts meanwhile is on one page and not on none.
             AND (r.scheduled_at, r.id) < (coalesce($4, 'infinity'::timestamptz), coalesce($5, 9223372036854775807))
           ORDER BY r.scheduled_at DESC, r.id DESC LIMIT $6"#,
        job_id,
        scope.site_ids(),
        days,
        after.map(|cursor| cursor.0),
        after.map(|cursor| cursor.1),
        limit,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| RunView {
            id: row.id,
            job_id: row.job_id,
            scheduled_ts: row.scheduled_at.timestamp(),
            started_ts: row.started_at.map(|at| at.timestamp()),
            finished_ts: row.finished_at.map(|at| at.timestamp()),
            status: row.status,
            error: row.error,
            skip_reason: row.skip_reason,
            cause: row.cause,
            device_guid: row.device_guid,
            target_hostname: row.target_hostname,
            site_id: row.site_id,
            shared_execution: row.shared_execution,
            component_index: row.component_index,
            component_kind: row.component_kind,
            component_name: row.component_name,
            workflow_run_id: row.workflow_run_id,
            cancel_requested: row.cancel_requested_at.is_some(),
            sort_at: row.sort_at,
        })
        .collect())
}

/// How one device fared in one occurrence.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are named as clients of the reference read them")]
pub struct DeviceResult {
    pub run_id: Option<i64>,
    pub device_guid: Option<Uuid>,
    pub hostname: String,
    pub online: bool,
    pub site_id: Option<i64>,
    pub site_name: String,
    pub site: String,
    pub inventory_hostname: String,
    pub wireguard_peer_ip: String,
    pub resolved_connection: String,
    pub resolution_status: String,
    pub resolution_reason: String,
    pub ran_on: Option<i64>,
    pub job_status: String,
    pub error: Option<String>,
    pub has_stdout: bool,
    pub has_stderr: bool,
    pub activities: Value,
}

/// The devices of an occurrence: the one at epoch second `occurrence`, else the latest. Answers its instant, or none and the
/// devices the job has now when it never ran.
///
/// # Errors
/// 404 when the caller may not see the job, or it has no such occurrence; 400 `invalid_query` for an instant beyond the year 9999.
pub async fn devices(
    conn: &mut PgConnection,
    scope: &Scope,
    job_id: i64,
    occurrence: Option<i64>,
) -> Result<(Option<i64>, Vec<DeviceResult>)> {
    let instant = occurrence.map(|seconds| {
        let outside =
            || Error::field("invalid_query", "occurrence", "must be an instant in seconds since 1970, up to the year 9999");
        instants::from_seconds(seconds).ok_or_else(outside)
    });
    let instant = instant.transpose()?;
    let view = job(conn, scope, job_id).await?;
    let found = sqlx::query!(
        "SELECT id, scheduled_at FROM job_occurrences
         WHERE job_id = $1 AND ($2::timestamptz IS NULL OR date_trunc('second', scheduled_at) = $2)
         ORDER BY scheduled_at DESC LIMIT 1",
        job_id,
        instant,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(found) = found else {
        if occurrence.is_some() {
            return Err(Error::not_found());
        }
        return Ok((None, planned(conn, scope, job_id, &serde_json::from_str(view.targets.get())?).await?));
    };
    let rows = sqlx::query!(
        r#"SELECT r.id, r.device_guid, coalesce(d.hostname, r.target_hostname, '') AS "hostname!",
                  p.online AS "online!",
                  r.site_id, coalesce(s.name, '') AS "site_name!", r.resolution_status, r.resolution_reason, r.error,
                  coalesce(r.finished_at, r.started_at) AS ran_on, r.status
           FROM scheduled_job_runs r
           LEFT JOIN devices d ON d.guid = r.device_guid
           LEFT JOIN live_system_sockets k ON k.device_guid = d.guid
           CROSS JOIN LATERAL presence(k.device_guid IS NOT NULL, d.last_seen, d.left_at) AS p
           LEFT JOIN sites s ON s.id = r.site_id
           WHERE r.occurrence_id = $1 AND r.device_guid IS NOT NULL AND ($2::bigint[] IS NULL OR r.site_id = ANY($2))
           ORDER BY coalesce(d.hostname_key, r.target_hostname) COLLATE "C", r.id LIMIT $3"#,
        found.id,
        scope.site_ids(),
        DEVICES_MAX,
    )
    .fetch_all(&mut *conn)
    .await?;
    let runs: Vec<i64> = rows.iter().map(|row| row.id).collect();
    let activities = sqlx::query!(
        r#"SELECT a.id, a.run_id AS "run_id!", a.component_kind, a.script_type, a.script_path, a.script_name,
                  a.stdout <> '' AS "has_stdout!", a.stderr <> '' AS "has_stderr!"
           FROM activity_history a WHERE a.run_id = ANY($1) ORDER BY a.component_index, a.id"#,
        &runs,
    )
    .fetch_all(conn)
    .await?;
    let mut by_run: HashMap<i64, (bool, bool, Vec<Value>)> = HashMap::new();
    for row in activities {
        let (stdout, stderr, list) = by_run.entry(row.run_id).or_default();
        *stdout |= row.has_stdout;
        *stderr |= row.has_stderr;
        list.push(json!({
            "activity_id": row.id,
            "component_kind": row.component_kind,
            "script_type": row.script_type,
            "component_path": row.script_path,
            "component_name": row.script_name,
            "has_stdout": row.has_stdout,
            "has_stderr": row.has_stderr,
        }));
    }
    let devices = rows
        .into_iter()
        .map(|row| {
            let (has_stdout, has_stderr, list) = by_run.remove(&row.id).unwrap_or_default();
            DeviceResult {
                run_id: Some(row.id),
                device_guid: row.device_guid,
                hostname: row.hostname,
                online: row.online,
                site_id: row.site_id,
                site: row.site_name.clone(),
                site_name: row.site_name,
                inventory_hostname: String::new(),
                wireguard_peer_ip: String::new(),
                resolved_connection: "agent".to_owned(),
                resolution_status: row.resolution_status,
                resolution_reason: row.resolution_reason,
                ran_on: row.ran_on.map(|at| at.timestamp()),
                job_status: row.status,
                error: row.error,
                has_stdout,
                has_stderr,
                activities: Value::Array(list),
            }
        })
        .collect();
    Ok((Some(found.scheduled_at.timestamp()), devices))
}

/// What the job would run on now.
async fn planned(conn: &mut PgConnection, scope: &Scope, job_id: i64, saved: &Value) -> Result<Vec<DeviceResult>> {
    let reach = targets::reach(conn, job_id).await?;
    let reach = targets::narrow(&reach, scope.site_ids());
    let resolved = targets::resolve(conn, saved, &reach).await?;
    let guids: Vec<Uuid> = resolved.iter().map(|target| target.device_guid).collect();
    let rows = sqlx::query!(
        r#"SELECT d.guid, d.hostname, d.site_id, coalesce(s.name, '') AS "site_name!", p.online AS "online!"
           FROM devices d LEFT JOIN live_system_sockets k ON k.device_guid = d.guid
           CROSS JOIN LATERAL presence(k.device_guid IS NOT NULL, d.last_seen, d.left_at) AS p LEFT JOIN sites s ON s.id = d.site_id
           WHERE d.guid = ANY($1) ORDER BY d.hostname_key, d.guid LIMIT $2"#,
        &guids,
        DEVICES_MAX,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| DeviceResult {
            run_id: None,
            device_guid: Some(row.guid),
            hostname: row.hostname,
            online: row.online,
            site_id: row.site_id,
            site: row.site_name.clone(),
            site_name: row.site_name,
            inventory_hostname: String::new(),
            wireguard_peer_ip: String::new(),
            resolved_connection: String::new(),
            resolution_status: "pending".to_owned(),
            resolution_reason: String::new(),
            ran_on: None,
            job_status: "Pending".to_owned(),
            error: None,
            has_stdout: false,
            has_stderr: false,
            activities: json!([]),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_word_wins_in_the_order_of_the_contract() {
        let counts = ResultCounts { success: 5, failed: 1, running: 1, ..ResultCounts::default() };
        assert_eq!(counts.status(false), "Running");
        assert_eq!(ResultCounts { running: 0, ..counts.clone() }.status(false), "Failed");
        assert_eq!(ResultCounts { success: 3, expired: 1, pending: 1, ..ResultCounts::default() }.status(false), "Expired");
        assert_eq!(ResultCounts { success: 3, skipped: 1, ..ResultCounts::default() }.status(false), "Success");
        assert_eq!(ResultCounts { skipped: 1, ..ResultCounts::default() }.status(true), "No Devices Targeted");
        assert_eq!(ResultCounts { skipped: 1, ..ResultCounts::default() }.status(false), "Skipped");
        assert_eq!(ResultCounts::default().status(false), "Pending");
    }

    #[test]
    fn a_cursor_reads_what_it_wrote() {
        let at = DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap();
        assert_eq!("1700000000123456-42".parse::<RunCursor>().unwrap(), RunCursor(at, 42));
        for text in ["", "x", "1-x", "1700000000123456"] {
            assert!(text.parse::<RunCursor>().is_err(), "{text}");
        }
    }
}
