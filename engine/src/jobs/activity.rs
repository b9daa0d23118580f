//! Quick runs and the activity history of a device.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{
    spec::{self, TargetInput},
    targets::{self, ResolvedTarget},
};
use crate::{
    assemblies::{self, Reference, RunMode, ScriptRequest},
    audit::{self, Entry},
    db::Pool,
    devices::lookup::Found,
    error::{Error, Kind, Result},
    scope::{Actor, Scope},
};

/// The most devices of one quick run.
pub const QUICK_RUN_MAX: usize = 1_000;
/// More devices than this in one quick run need a fresh proof of who asks.
pub const STEP_UP_ABOVE: usize = 50;
/// How long a quick run waits for its device, in minutes.
pub const QUICK_RUN_WAIT_MINUTES: i32 = 15;
/// The most rows one history holds.
pub const HISTORY_MAX: i64 = 500;
/// `queue_lane` of a quick run.
pub const QUICK_RUN_LANE: &str = "quick_run";
/// The error of a quick run on a device that is quarantined, revoked or decommissioned.
pub const NOT_ACTIVE: &str = "device_not_active";
/// `activity_kind` of a quick run.
pub const QUICK_RUN_KIND: &str = "quick_run";

/// The body of `POST /api/scripts/quick_run`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuickRunBody {
    /// Hostnames or GUIDs.
    pub hostnames: Value,
    /// The script.
    pub assembly_guid: Option<String>,
    /// Or its virtual path, under `Scripts/`.
    pub script_path: Option<String>,
    /// `system` or `currentuser`.
    pub run_mode: Option<String>,
    /// `all_active_sessions` or `specific_session`.
    pub session_target: Option<String>,
    /// With `specific_session`.
    pub target_session_id: Option<Value>,
    /// Values of the script's variables.
    pub variable_values: Option<Map<String, Value>>,
    /// Accepted and ignored: nothing is ever run with a password from here.
    pub admin_user: Option<Value>,
    /// Accepted and ignored.
    pub admin_pass: Option<Value>,
}

/// A quick run as written, checked.
#[derive(Debug, Clone)]
pub struct QuickRun {
    /// The hosts as written.
    pub hosts: Vec<TargetInput>,
    /// The script.
    pub script: Reference,
    /// Where it runs.
    pub mode: RunMode,
    /// Values of its variables.
    pub values: Map<String, Value>,
}

impl QuickRun {
    /// Checks a body.
    ///
    /// # Errors
    /// 400 `missing_hostnames`, `invalid_hostnames`, `missing_script`, `invalid_script_path`, `invalid_run_mode`,
    /// `invalid_session_target`, `invalid_target_session_id`, `invalid_variable_value`.
    pub fn parse(body: QuickRunBody) -> Result<Self> {
        let hosts = match &body.hostnames {
            Value::Null => return Err(missing_hostnames()),
            Value::Array(list) if list.is_empty() => return Err(missing_hostnames()),
            Value::Array(list) => list.clone(),
            Value::String(one) => vec![Value::String(one.clone())],
            _ => return Err(Error::field("invalid_hostnames", "hostnames", "must be a list of hostnames or GUIDs")),
        };
        if hosts.len() > QUICK_RUN_MAX {
            return Err(Error::field("invalid_hostnames", "hostnames", format!("must be at most {QUICK_RUN_MAX}")));
        }
        let hosts = hosts
            .iter()
            .enumerate()
            .map(|(index, host)| {
                let fault = || Error::field("invalid_hostnames", &format!("hostnames[{index}]"), "is not a hostname or GUID");
                let text = host.as_str().map(str::trim).filter(|text| !text.is_empty() && text.len() <= 253).ok_or_else(fault)?;
                let guid = Uuid::parse_str(text).ok();
                let hostname = guid.is_none().then(|| text.to_owned());
                Ok(TargetInput::Device { guid, hostname, site_id: None })
            })
            .collect::<Result<Vec<_>>>()?;
        let given = |text: Option<String>| text.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let script = Reference { assembly_guid: given(body.assembly_guid), path: given(body.script_path) };
        if script == Reference::default() {
            return Err(Error::invalid("missing_script", "Missing script_path or assembly_guid: say which script."));
        }
        if script.path.as_deref().is_some_and(|path| path.split(['/', '\\']).any(|part| part == "..")) {
            return Err(Error::field("invalid_script_path", "script_path", "must not leave its folder"));
        }
        let mode = run_mode(body.run_mode.as_deref(), body.session_target.as_deref(), body.target_session_id.as_ref())?;
        let values = body.variable_values.unwrap_or_default();
        spec::check_variables(&values).map_err(|reason| Error::field("invalid_variable_value", "variable_values", reason))?;
        Ok(Self { hosts, script, mode, values })
    }
}

fn missing_hostnames() -> Error {
    let mut error = Error::invalid("missing_hostnames", "Missing hostnames[]: a quick run needs at least one host.");
    error.fields.insert("hostnames".into(), "needs at least one host".into());
    error
}

fn run_mode(mode: Option<&str>, session: Option<&str>, id: Option<&Value>) -> Result<RunMode> {
    let lower = |text: &str| text.trim().to_ascii_lowercase();
    match mode.map(lower).as_deref().unwrap_or("system") {
        "" | "system" => return Ok(RunMode::System),
        "currentuser" | "current_user" | "interactive" | "user" => {}
        _ => return Err(Error::field("invalid_run_mode", "run_mode", "must be system or currentuser")),
    }
    match session.map(lower).as_deref().unwrap_or("all_active_sessions") {
        "" | "all_active_sessions" | "all" | "all_sessions" | "fanout" => Ok(RunMode::CurrentUser),
        "specific_session" | "specific" | "single" | "session" => id
            .and_then(|id| id.as_i64().or_else(|| id.as_str().and_then(|text| text.trim().parse().ok())))
            .filter(|id| (1..=i64::from(u32::MAX)).contains(id))
            .map(RunMode::Session)
            .ok_or_else(|| Error::field("invalid_target_session_id", "target_session_id", "must be a positive whole number")),
        _ => Err(Error::field("invalid_session_target", "session_target", "must be all_active_sessions or specific_session")),
    }
}

/// A started quick run on one device.
#[derive(Debug, Clone)]
pub struct Started {
    /// The activity.
    pub job_id: i64,
    /// The device.
    pub target: ResolvedTarget,
    /// `Queued`, or `Failed` for a device that must not run anything.
    pub status: String,
    /// Why it failed: [`NOT_ACTIVE`].
    pub error: Option<String>,
}

/// The script of a quick run, found and prepared before the transaction that writes it. The hosts are checked before, so that nobody
/// learns of scripts by asking for foreign devices.
///
/// # Errors
/// 403, 400 and 409 as [`targets::to_run_now`]; 404 `script_not_found`; 409 `ambiguous_assembly`; 400 as [`assemblies::Source::ready`].
pub async fn script(pool: &Pool, scope: &Scope, run: &QuickRun) -> Result<ScriptRequest> {
    let mut conn = pool.acquire().await?;
    targets::to_run_now(&mut conn, scope, &run.hosts).await?;
    let guid = assemblies::resolve(&mut conn, &run.script).await?;
    let source = assemblies::source(&mut conn, &guid).await?;
    drop(conn);
    source.ready(run.values.clone(), run.mode).await
}

/// Writes what is to be sent to each device, all or nothing, and the script once for all of them. The caller delivers after commit; a device that does not
/// appear within [`QUICK_RUN_WAIT_MINUTES`] does not run it.
///
/// # Errors
/// 403, 400 and 409 as [`targets::to_run_now`].
pub async fn start(
    conn: &mut PgConnection,
    scope: &Scope,
    actor: &Actor,
    run: &QuickRun,
    script: &ScriptRequest,
) -> Result<Vec<Started>> {
    let targets = targets::to_run_now(conn, scope, &run.hosts).await?;
    let guids: Vec<Uuid> = targets.iter().map(|target| target.device_guid).collect();
    let hostnames: Vec<String> = targets.iter().map(|target| target.hostname.clone()).collect();
    let sites: Vec<Option<i64>> = targets.iter().map(|target| target.site_id).collect();
    let context = json!({
        "assembly_source": script.assembly_source,
        "assembly_guid": script.assembly_guid,
        "queue_lane": QUICK_RUN_LANE,
        "activity_kind": QUICK_RUN_KIND,
    });
    let shared = sqlx::query_scalar!(
        "INSERT INTO quick_run_scripts (request, bytes) VALUES ($1, $2) RETURNING id",
        script.request,
        script.bytes,
    )
    .fetch_one(&mut *conn)
    .await?;
    let ids = sqlx::query!(
        r#"INSERT INTO activity_history
               (device_guid, hostname, site_id, script_name, script_path, script_type, activity_kind, queue_lane, request, content_hash,
                timeout_seconds, metadata, requested_by, deliver_until, status, delivery, error, stderr, finished_at, quick_run_script_id)
           SELECT t.guid, t.hostname, t.site_id, $4, $5, $6, $7, $8,
                  jsonb_build_object('target_hostname', t.hostname, 'run_mode', $9::text, 'context', $10::jsonb), $11, $12, $10::jsonb, $13,
                  now() + make_interval(mins => $14),
                  CASE WHEN d.status = 'active' THEN 'Queued' ELSE 'Failed' END,
                  CASE WHEN d.status = 'active' THEN 'ready' ELSE 'done' END,
                  CASE WHEN d.status <> 'active' THEN $15 END,
                  CASE WHEN d.status <> 'active' THEN 'The device is ' || d.status || '; nothing was sent to it.' ELSE '' END,
                  CASE WHEN d.status <> 'active' THEN now() END, $16
           FROM unnest($1::uuid[], $2::text[], $3::bigint[]) AS t (guid, hostname, site_id)
           JOIN devices d ON d.guid = t.guid
           RETURNING id, device_guid, status, error"#,
        &guids,
        &hostnames,
        &sites as &[Option<i64>],
        script.script_name,
        script.script_path,
        script.script_type,
        QUICK_RUN_KIND,
        QUICK_RUN_LANE,
        script.run_mode,
        context,
        script.content_hash,
        i32::try_from(script.timeout_seconds).unwrap_or(i32::MAX),
        actor.name,
        QUICK_RUN_WAIT_MINUTES,
        NOT_ACTIVE,
        shared,
    )
    .fetch_all(&mut *conn)
    .await?;
    let mut started = Vec::with_capacity(targets.len());
    for target in targets {
        let Some(row) = ids.iter().find(|row| row.device_guid == target.device_guid) else { continue };
        let entry = Entry {
            action: "script.quick_run",
            object_kind: "device",
            object_id: target.device_guid.to_string(),
            site_id: target.site_id,
            detail: json!({"activity_id": row.id, "assembly_guid": script.assembly_guid, "content_hash": script.content_hash}),
            ..Entry::default()
        };
        audit::record(conn, actor, entry).await?;
        started.push(Started { job_id: row.id, target, status: row.status.clone(), error: row.error.clone() });
    }
    Ok(started)
}

/// A row of a device's history. Times are epoch seconds, 0 when unset.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are named as clients of the reference read them")]
pub struct ActivityView {
    pub id: i64,
    pub device_guid: Uuid,
    pub hostname: String,
    pub site_id: Option<i64>,
    pub script_name: String,
    pub script_path: String,
    pub script_type: String,
    pub ran_at: i64,
    pub status: String,
    pub error: Option<String>,
    pub exit_code: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub has_stdout: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub has_stderr: Option<bool>,
    pub queue_lane: String,
    pub activity_kind: String,
    pub metadata: Value,
    pub started_at: i64,
    pub updated_at: i64,
    pub finished_at: i64,
    pub scheduled_job_name: String,
    pub scheduled_job_kind: String,
}

/// The routes of activities spell their 404 with a capital letter.
#[must_use]
pub fn as_contract(error: Error) -> Error {
    if error.kind == Kind::NotFound { Error { code: "Not found", ..error } } else { error }
}

fn epoch(at: Option<DateTime<Utc>>) -> i64 {
    at.map_or(0, |at| at.timestamp())
}

/// The history of a device: what has not ended first, then the newest, at most `limit`. With `before`, only
/// rows with a smaller id, newest first.
///
/// # Errors
/// When the database is away.
pub async fn history(
    conn: &mut PgConnection,
    scope: &Scope,
    device: Uuid,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<ActivityView>> {
    let rows = sqlx::query!(
        r#"SELECT a.id, a.device_guid, a.hostname, a.site_id, a.script_name, a.script_path, a.script_type, a.created_at, a.status, a.error,
                  a.exit_code, a.stdout <> '' AS "has_stdout!", a.stderr <> '' AS "has_stderr!", a.queue_lane, a.activity_kind,
                  a.metadata, a.started_at, a.updated_at, a.finished_at, j.name AS "job_name?", j.job_kind AS "job_kind?"
           FROM activity_history a
           LEFT JOIN scheduled_job_runs r ON r.id = a.run_id
           LEFT JOIN scheduled_jobs j ON j.id = r.job_id
           WHERE a.id IN (
               -- A page is cut by id, so that the next one goes on where it ends.
               SELECT p.id FROM activity_history p
               WHERE p.device_guid = $1 AND ($2::bigint[] IS NULL OR p.site_id = ANY($2)) AND ($3::bigint IS NULL OR p.id < $3)
               ORDER BY $3::bigint IS NULL AND p.status IN ('Queued', 'Running') DESC, p.id DESC LIMIT $4)
           ORDER BY $3::bigint IS NULL AND a.status IN ('Queued', 'Running') DESC,
                    CASE WHEN $3::bigint IS NULL THEN coalesce(a.updated_at, a.started_at, a.created_at) END DESC, a.id DESC"#,
        device,
        scope.site_ids(),
        before,
        limit.clamp(1, HISTORY_MAX),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ActivityView {
            id: row.id,
            device_guid: row.device_guid,
            hostname: row.hostname,
            site_id: row.site_id,
            script_name: row.script_name,
            script_path: row.script_path,
            script_type: row.script_type,
            ran_at: epoch(row.started_at.or(Some(row.created_at))),
            status: row.status,
            error: row.error,
            exit_code: row.exit_code,
            stdout: None,
            stderr: None,
            has_stdout: Some(row.has_stdout),
            has_stderr: Some(row.has_stderr),
            queue_lane: row.queue_lane,
            activity_kind: row.activity_kind,
            metadata: row.metadata,
            started_at: epoch(row.started_at),
            updated_at: row.updated_at.timestamp(),
            finished_at: epoch(row.finished_at),
            scheduled_job_name: row.job_name.unwrap_or_default(),
            scheduled_job_kind: row.job_kind.unwrap_or_default(),
        })
        .collect())
}

/// One activity with its output. It is seen by those who may see the device's site then and now.
///
/// # Errors
/// 404.
pub async fn one(conn: &mut PgConnection, scope: &Scope, id: i64) -> Result<ActivityView> {
    let row = sqlx::query!(
        r#"SELECT a.id, a.device_guid, a.hostname, a.site_id, a.script_name, a.script_path, a.script_type, a.created_at, a.status, a.error,
                  a.exit_code, a.stdout, a.stderr, a.queue_lane, a.activity_kind, a.metadata, a.started_at, a.updated_at, a.finished_at,
                  j.name AS "job_name?", j.job_kind AS "job_kind?"
           FROM activity_history a
           JOIN devices d ON d.guid = a.device_guid
           LEFT JOIN scheduled_job_runs r ON r.id = a.run_id
           LEFT JOIN scheduled_jobs j ON j.id = r.job_id
           WHERE a.id = $1 AND ($2::bigint[] IS NULL OR (a.site_id = ANY($2) AND d.site_id = ANY($2)))"#,
        id,
        scope.site_ids(),
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)
    .map_err(as_contract)?;
    Ok(ActivityView {
        id: row.id,
        device_guid: row.device_guid,
        hostname: row.hostname,
        site_id: row.site_id,
        script_name: row.script_name,
        script_path: row.script_path,
        script_type: row.script_type,
        ran_at: epoch(row.started_at.or(Some(row.created_at))),
        status: row.status,
        error: row.error,
        exit_code: row.exit_code,
        stdout: Some(row.stdout),
        stderr: Some(row.stderr),
        has_stdout: None,
        has_stderr: None,
        queue_lane: row.queue_lane,
        activity_kind: row.activity_kind,
        metadata: row.metadata,
        started_at: epoch(row.started_at),
        updated_at: row.updated_at.timestamp(),
        finished_at: epoch(row.finished_at),
        scheduled_job_name: row.job_name.unwrap_or_default(),
        scheduled_job_kind: row.job_kind.unwrap_or_default(),
    })
}

/// Clears the history of the device a path names, except what has not ended and what a run that has not ended refers to.
/// Answers how many rows went.
///
/// # Errors
/// When the database is away.
pub async fn clear(conn: &mut PgConnection, scope: &Scope, actor: &Actor, device: &Found) -> Result<u64> {
    let cleared = sqlx::query!(
        "DELETE FROM activity_history a
         WHERE a.device_guid = $1 AND ($2::bigint[] IS NULL OR a.site_id = ANY($2)) AND a.delivery = 'done'
           AND NOT EXISTS (SELECT FROM scheduled_job_runs r WHERE r.id = a.run_id AND r.status IN ('Pending', 'Running'))",
        device.guid,
        scope.site_ids(),
    )
    .execute(&mut *conn)
    .await?
    .rows_affected();
    let entry = Entry {
        action: "device.clear_activity",
        object_kind: "device",
        object_id: device.guid.to_string(),
        site_id: device.site_id,
        detail: json!({"cleared": cleared}),
        ..Entry::default()
    };
    audit::record(conn, actor, entry).await?;
    Ok(cleared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<QuickRun> {
        QuickRun::parse(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn a_run_mode_is_one_of_two_and_never_everybody() {
        let mode = |mode: Value, target: Value, id: Value| {
            parse(json!({"hostnames": ["a"], "assembly_guid": "g", "run_mode": mode, "session_target": target, "target_session_id": id}))
                .map(|run| run.mode)
                .map_err(|error| error.code)
        };
        assert_eq!(mode(json!(null), json!(null), json!(null)), Ok(RunMode::System));
        assert_eq!(mode(json!("current_user"), json!(null), json!(5)), Ok(RunMode::CurrentUser));
        assert_eq!(mode(json!("CurrentUser"), json!("specific"), json!("7")), Ok(RunMode::Session(7)));
        assert_eq!(mode(json!("broadcast"), json!(null), json!(null)), Err("invalid_run_mode"));
        assert_eq!(mode(json!("currentuser"), json!("some"), json!(null)), Err("invalid_session_target"));
        for id in [json!(null), json!(0), json!(-1), json!("x"), json!(1.5)] {
            assert_eq!(mode(json!("currentuser"), json!("specific_session"), id), Err("invalid_target_session_id"));
        }
    }

    #[test]
    fn faults_name_their_field() {
        for (value, code) in [
            (json!({"assembly_guid": "g"}), "missing_hostnames"),
            (json!({"hostnames": [], "assembly_guid": "g"}), "missing_hostnames"),
            (json!({"hostnames": {}, "assembly_guid": "g"}), "invalid_hostnames"),
            (json!({"hostnames": ["a", " "], "assembly_guid": "g"}), "invalid_hostnames"),
            (json!({"hostnames": ["a", 5], "assembly_guid": "g"}), "invalid_hostnames"),
            (json!({"hostnames": ["a"]}), "missing_script"),
            (json!({"hostnames": ["a"], "assembly_guid": " "}), "missing_script"),
            (json!({"hostnames": ["a"], "script_path": "../x"}), "invalid_script_path"),
            (json!({"hostnames": ["a"], "assembly_guid": "g", "variable_values": {"v": {}}}), "invalid_variable_value"),
        ] {
            assert_eq!(parse(value.clone()).map(|_| ()).unwrap_err().code, code, "{value}");
        }
    }
}
