//! What agents report of the scripts they were sent: applied once, by the device that owns the row, in batches.
//!
//! A terminal state is final. The run that an activity belongs to moves in the same transaction, and the last run of an
//! occurrence to end names the workflow run that waits for it. Locks are taken in one order everywhere: activities,
//! runs, occurrences, each by id.

use std::collections::{BTreeMap, BTreeSet};

use borealis_protocol::output;
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::run::OUTCOME_UNKNOWN;
use crate::{
    Result,
    db::{self, Tx},
};

/// The most bytes kept of each output stream: of a longer one both ends, with a marked gap.
pub const OUTPUT_LIMIT_BYTES: usize = output::CAP_BYTES + output::NOTES_BYTES;
/// What ends an output that came in pieces and grew longer; the result brings its end.
pub const TRUNCATED: &str = "\n[output truncated: the limit of 1 MiB is reached]\n";
/// How long a job waits that its agent could not take before it is offered again, in seconds.
pub const DECLINED_PAUSE_S: i32 = 20;
/// The most reports applied in one transaction.
pub const BATCH: usize = 1_000;
/// The most bytes of metadata taken from one report.
const METADATA_LIMIT_BYTES: usize = 64 * 1024;
/// The most late reports recorded of one activity.
const EVENTS_LIMIT: i64 = 20;
/// The most bytes of each output kept with a late report.
const EVENT_OUTPUT_BYTES: usize = 16 * 1024;
/// What the engine alone says of an activity; an agent's echo of it is not believed.
const ENGINE_METADATA: [&str; 5] =
    ["assembly_source", "assembly_guid", "scheduled_job_id", "scheduled_job_run_id", "scheduled_ts"];

/// The status of an activity; the same set is a CHECK of `activity_history`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
pub enum Status {
    /// Not begun.
    Queued,
    /// Begun.
    Running,
    /// Ended well.
    Success,
    /// Ended with a warning.
    Warning,
    /// Ended badly.
    Failed,
    /// Never delivered.
    Expired,
    /// No answer in time.
    #[strum(serialize = "Timed Out")]
    TimedOut,
    /// Not meant to run.
    Skipped,
}

impl Status {
    /// The text stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Reads a stored or reported text in any spelling that agents use; none when it means nothing to us.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.trim().to_ascii_lowercase().as_str() {
            "queued" | "pending" | "created" => Self::Queued,
            "running" | "started" | "in_progress" => Self::Running,
            "success" | "completed" | "complete" => Self::Success,
            "warning" => Self::Warning,
            "failed" | "error" => Self::Failed,
            "expired" => Self::Expired,
            "timed_out" | "timed out" | "timeout" => Self::TimedOut,
            "skipped" => Self::Skipped,
            _ => return None,
        })
    }

    /// Whether nothing can follow.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// Which event a report came as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The agent has the script on its disk.
    Accepted,
    /// The agent could not write the script to its disk: it does not have it.
    Declined,
    /// Something about a script that has not ended.
    Progress,
    /// The end.
    Result,
}

impl Kind {
    fn late_event(self) -> &'static str {
        match self {
            Self::Accepted => "late_accept",
            Self::Declined => "late_decline",
            Self::Progress => "late_progress",
            Self::Result => "late_result",
        }
    }
}

/// One report of one device.
#[derive(Debug, Clone)]
pub struct Report {
    /// The device whose socket it came on.
    pub device: Uuid,
    /// What the agent calls `job_id`.
    pub activity_id: i64,
    /// The event.
    pub kind: Kind,
    /// What the agent says of the script.
    pub status: Status,
    /// Its standard output, whole or a piece.
    pub stdout: Option<String>,
    /// Its standard error, whole or a piece.
    pub stderr: Option<String>,
    /// Whether the outputs are pieces to append.
    pub append_output: bool,
    /// The exit status, where the agent sends one.
    pub exit_code: Option<i32>,
    /// A code of the agent's for what went wrong.
    pub error: Option<String>,
    /// The lane, kept when the row has none.
    pub queue_lane: String,
    /// The kind, kept when the row has none.
    pub activity_kind: String,
    /// Merged into the row's.
    pub metadata: Map<String, Value>,
    /// The limit that an agent without exit codes says in its text the script has run into, in seconds.
    timed_out_after: Option<i32>,
}

impl Report {
    /// Reads the first argument of `quick_job_accepted`, `quick_job_declined`, `quick_job_progress` or `quick_job_result`. None when it is not
    /// an object with an integer `job_id`: such are ignored. Unknown fields are ignored too.
    #[must_use]
    pub fn parse(device: Uuid, kind: Kind, value: &Value) -> Option<Self> {
        let object = value.as_object()?;
        let activity_id = match object.get("job_id")? {
            Value::Number(number) => number.as_i64()?,
            Value::String(text) => text.trim().parse().ok()?,
            _ => return None,
        };
        let text = |name: &str| object.get(name).and_then(Value::as_str).map(storable);
        let short = |name: &str| text(name).map(|text| output::first(&text, 200).to_owned()).unwrap_or_default();
        let said = Status::parse(object.get("status").and_then(Value::as_str).unwrap_or_default());
        let error = text("reason").or_else(|| text("error")).filter(|text| !text.is_empty());
        let status = match kind {
            Kind::Accepted | Kind::Declined => Status::Queued,
            Kind::Progress => said.unwrap_or(Status::Running),
            // It is not known how the script ended: the status is that of a device that was silent.
            Kind::Result if error.as_deref() == Some(OUTCOME_UNKNOWN) => Status::TimedOut,
            // A result ends the script whatever it says; what is not known to end well has not.
            Kind::Result => said.filter(|status| status.is_terminal()).unwrap_or(Status::Failed),
        };
        let exit_code = object.get("exit_code").and_then(Value::as_i64).and_then(|code| i32::try_from(code).ok());
        // Agents that send no exit code say `Success` of 0 and of nothing else, and of a time-out only in the error output.
        let silent = kind == Kind::Result && exit_code.is_none() && error.is_none();
        let stderr = text("stderr");
        let timed_out_after = stderr.as_deref().filter(|_| silent && status == Status::Failed).and_then(stated_time_out);
        let mut metadata = object.get("metadata").and_then(Value::as_object).cloned().unwrap_or_default();
        metadata.retain(|name, _| !ENGINE_METADATA.contains(&name.as_str()));
        let rendered = serde_json::to_string(&metadata).unwrap_or_default();
        if rendered.len() > METADATA_LIMIT_BYTES || rendered.contains("\\u0000") {
            metadata = Map::new();
        }
        Some(Self {
            device,
            activity_id,
            kind,
            status,
            stdout: text("stdout").map(bounded),
            stderr: stderr.map(bounded),
            append_output: object.get("append_output").and_then(Value::as_bool).unwrap_or(false),
            exit_code: exit_code.or((silent && said == Some(Status::Success)).then_some(0)),
            error: error.map(|text| match text.as_str() {
                "cancelled" => "cancelled_by_operator".to_owned(),
                text => output::first(text, 512).to_owned(),
            }),
            queue_lane: short("queue_lane"),
            activity_kind: short("activity_kind"),
            metadata,
            timed_out_after,
        })
    }

    /// The bytes it holds in memory, roughly; for the bound of a queue.
    #[must_use]
    pub fn weight(&self) -> usize {
        512 + self.stdout.as_ref().map_or(0, String::len) + self.stderr.as_ref().map_or(0, String::len)
    }
}

/// The seconds in the line with which agents of the reference end the error output of a script that they have stopped at its limit.
fn stated_time_out(stderr: &str) -> Option<i32> {
    let line = stderr.trim_end().lines().next_back()?;
    line.strip_prefix("Script timed out after ")?.strip_suffix(" seconds")?.parse().ok()
}

/// Postgres keeps no NUL in a text.
fn storable(text: &str) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text.to_owned() }
}

/// Both ends of an output that is too long.
fn bounded(text: String) -> String {
    output::shorten(&text).unwrap_or(text)
}

/// What became of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It changed the row.
    Applied,
    /// The row was terminal already: recorded, not applied.
    Late,
    /// There is no such row, or it belongs to another device. The two look alike from outside.
    Unknown,
}

/// An activity as operators see it after a change: the payload of `device_activity_changed`.
#[derive(Debug, Clone)]
pub struct Change {
    /// The activity.
    pub activity_id: i64,
    /// Its device.
    pub device: Uuid,
    /// The device's hostname, as the row has it.
    pub hostname: String,
    /// The device's site, as the row has it.
    pub site_id: Option<i64>,
    /// The status now.
    pub status: Status,
    /// The lane.
    pub queue_lane: String,
    /// The kind.
    pub activity_kind: String,
    /// Whether the event that caused it was a result.
    pub by_result: bool,
}

impl Change {
    /// The payload of `device_activity_changed`.
    #[must_use]
    pub fn payload(&self) -> Value {
        json!({
            "activity_id": self.activity_id,
            "hostname": self.hostname,
            "status": self.status.as_str(),
            "queue_lane": self.queue_lane,
            "activity_kind": self.activity_kind,
            "change": "updated",
            "source": if self.by_result { "quick_job" } else { "quick_job_progress" },
        })
    }
}

/// An occurrence whose last run has just ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// The occurrence.
    pub occurrence_id: i64,
    /// The workflow run that waits for it: to be signalled `results` in the same transaction.
    pub workflow_run_id: Uuid,
}

/// What a batch did.
#[derive(Debug, Default)]
pub struct Settled {
    /// One for each report, in order; empty for what time brought about.
    pub outcomes: Vec<Outcome>,
    /// To be shown to operators after the commit.
    pub changes: Vec<Change>,
    /// To be signalled before the commit.
    pub finished: Vec<Finished>,
}

#[derive(Debug, Default)]
struct Output {
    /// Whether `text` takes the place of what is stored, or follows it.
    replace: bool,
    text: String,
    /// The length in bytes of what is stored once this is written.
    len: usize,
}

impl Output {
    fn take(&mut self, piece: &str, append: bool) {
        if !append {
            *self = Self { replace: true, text: String::new(), len: 0 };
        }
        if self.len >= OUTPUT_LIMIT_BYTES || piece.is_empty() {
            return;
        }
        let room = OUTPUT_LIMIT_BYTES - self.len;
        let kept = output::first(piece, room);
        self.text.push_str(kept);
        self.len += kept.len();
        if kept.len() < piece.len() {
            self.text.push_str(TRUNCATED);
            self.len += TRUNCATED.len();
        }
    }
}

/// An activity's row with what a batch does to it.
#[derive(Debug)]
struct Row {
    device: Uuid,
    hostname: String,
    site_id: Option<i64>,
    run_id: Option<i64>,
    status: Status,
    queue_lane: String,
    activity_kind: String,
    timeout_seconds: i32,
    cancelled: bool,
    /// Whether it is on its way and nothing was heard of it yet.
    sent: bool,
    changed: bool,
    started: bool,
    /// Whether the agent does not have it, so that it is to be offered again.
    declined: bool,
    by_result: bool,
    stdout: Output,
    stderr: Output,
    exit_code: Option<i32>,
    error: Option<String>,
    metadata: Map<String, Value>,
}

/// The rule: what one report does to one row.
fn fold(row: &mut Row, report: &Report) -> Outcome {
    if row.device != report.device {
        return Outcome::Unknown;
    }
    if row.status.is_terminal() {
        return Outcome::Late;
    }
    if report.kind == Kind::Declined {
        return decline(row, report);
    }
    row.changed = true;
    (row.sent, row.declined) = (false, false);
    match (row.status, report.status) {
        // What runs does not go back into the queue.
        (Status::Running, Status::Queued) => {}
        // A script may print the same line; that it names its own limit, it hardly will.
        (_, Status::Failed) if report.timed_out_after == Some(row.timeout_seconds) => row.status = Status::TimedOut,
        (_, status) => row.status = status,
    }
    row.started |= report.status != Status::Queued;
    row.by_result = report.kind == Kind::Result;
    let append = report.append_output;
    if let Some(text) = &report.stdout {
        row.stdout.take(text, append);
    }
    if let Some(text) = &report.stderr {
        row.stderr.take(text, append);
    }
    row.exit_code = report.exit_code.or(row.exit_code);
    row.error = report.error.clone().or_else(|| row.error.take());
    if row.status == Status::Failed && row.cancelled {
        row.error = Some(row.error.take().unwrap_or_else(|| "cancelled_by_operator".to_owned()));
    }
    if row.queue_lane.is_empty() {
        row.queue_lane.clone_from(&report.queue_lane);
    }
    if row.activity_kind.is_empty() {
        row.activity_kind.clone_from(&report.activity_kind);
    }
    row.metadata.extend(report.metadata.clone());
    Outcome::Applied
}

/// What becomes of a row whose agent could not take it: it waits and is offered again, or ends where that is wanted anyway.
fn decline(row: &mut Row, report: &Report) -> Outcome {
    if !row.sent {
        return Outcome::Late;
    }
    (row.changed, row.sent) = (true, false);
    if row.cancelled {
        row.status = Status::Failed;
        row.error = Some("cancelled_by_operator".to_owned());
    } else {
        row.declined = true;
        row.error.clone_from(&report.error);
    }
    Outcome::Applied
}

/// Applies reports in their order, in a few statements for any number up to [`BATCH`].
///
/// # Errors
/// When the database refuses; nothing of the batch is then applied.
pub async fn apply(tx: &mut Tx<'_>, reports: &[Report]) -> Result<Settled> {
    db::plan_afresh(tx).await?;
    let ids: Vec<i64> = reports.iter().map(|report| report.activity_id).collect::<BTreeSet<_>>().into_iter().collect();
    let stored = sqlx::query!(
        r#"SELECT id, device_guid, hostname, site_id, run_id, status, queue_lane, activity_kind, timeout_seconds,
                  cancel_requested_at IS NOT NULL AS "cancelled!", delivery = 'sent' AS "sent!",
                  octet_length(stdout) AS "stdout_len!", octet_length(stderr) AS "stderr_len!"
           FROM activity_history WHERE id = ANY($1) ORDER BY id FOR UPDATE"#,
        &ids
    )
    .fetch_all(&mut **tx)
    .await?;
    let length = |len: i32| usize::try_from(len).unwrap_or(0);
    let mut rows: BTreeMap<i64, Row> = stored
        .into_iter()
        .map(|row| {
            let loaded = Row {
                device: row.device_guid,
                hostname: row.hostname,
                site_id: row.site_id,
                run_id: row.run_id,
                // The CHECK of the table admits nothing else; an unknown text is treated as final.
                status: Status::parse(&row.status).unwrap_or(Status::Failed),
                queue_lane: row.queue_lane,
                activity_kind: row.activity_kind,
                timeout_seconds: row.timeout_seconds,
                cancelled: row.cancelled,
                sent: row.sent,
                changed: false,
                started: false,
                declined: false,
                by_result: false,
                stdout: Output { len: length(row.stdout_len), ..Output::default() },
                stderr: Output { len: length(row.stderr_len), ..Output::default() },
                exit_code: None,
                error: None,
                metadata: Map::new(),
            };
            (row.id, loaded)
        })
        .collect();

    let outcomes: Vec<Outcome> = reports
        .iter()
        .map(|report| rows.get_mut(&report.activity_id).map_or(Outcome::Unknown, |row| fold(row, report)))
        .collect();
    record_late(tx, reports.iter().zip(&outcomes).filter(|(_, outcome)| **outcome == Outcome::Late).map(|(report, _)| report))
        .await?;

    rows.retain(|_, row| row.changed);
    write(tx, &rows).await?;

    let declined = rows.values().filter(|row| row.declined).filter_map(|row| Some((row.run_id?, row.error.clone())));
    explain_waiting(tx, declined).await?;
    let going = |row: &&Row| !row.status.is_terminal() && !row.declined;
    let running: BTreeSet<i64> = rows.values().filter(going).filter_map(|row| row.run_id).collect();
    begin_runs(tx, &running.into_iter().collect::<Vec<_>>()).await?;
    let ended: BTreeSet<i64> = rows.values().filter(|row| row.status.is_terminal()).filter_map(|row| row.run_id).collect();
    let finished = end_runs(tx, &ended.into_iter().collect::<Vec<_>>()).await?;
    let changes = rows
        .into_iter()
        .map(|(activity_id, row)| Change {
            activity_id,
            device: row.device,
            hostname: row.hostname,
            site_id: row.site_id,
            status: row.status,
            queue_lane: row.queue_lane,
            activity_kind: row.activity_kind,
            by_result: row.by_result,
        })
        .collect();
    Ok(Settled { outcomes, changes, finished })
}

async fn write(tx: &mut Tx<'_>, rows: &BTreeMap<i64, Row>) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = rows.keys().copied().collect();
    let statuses: Vec<String> = rows.values().map(|row| row.status.as_str().to_owned()).collect();
    let ended: Vec<bool> = rows.values().map(|row| row.status.is_terminal()).collect();
    let started: Vec<bool> = rows.values().map(|row| row.started).collect();
    let declined: Vec<bool> = rows.values().map(|row| row.declined).collect();
    let stdout: Vec<String> = rows.values().map(|row| row.stdout.text.clone()).collect();
    let stdout_new: Vec<bool> = rows.values().map(|row| row.stdout.replace).collect();
    let stderr: Vec<String> = rows.values().map(|row| row.stderr.text.clone()).collect();
    let stderr_new: Vec<bool> = rows.values().map(|row| row.stderr.replace).collect();
    let exit_codes: Vec<Option<i32>> = rows.values().map(|row| row.exit_code).collect();
    let errors: Vec<Option<String>> = rows.values().map(|row| row.error.clone()).collect();
    let lanes: Vec<String> = rows.values().map(|row| row.queue_lane.clone()).collect();
    let kinds: Vec<String> = rows.values().map(|row| row.activity_kind.clone()).collect();
    let metadata: Vec<Value> = rows.values().map(|row| Value::Object(row.metadata.clone())).collect();
    sqlx::query!(
        "UPDATE activity_history a SET
             status = n.status,
             delivery = CASE WHEN n.ended THEN 'done' WHEN n.declined THEN 'ready' ELSE 'accepted' END,
             -- As if it had not been sent: the agent says so.
             delivery_count = CASE WHEN n.declined THEN greatest(a.delivery_count - 1, 0) ELSE a.delivery_count END,
             sent_at = CASE WHEN n.declined THEN NULL ELSE a.sent_at END,
             offer_after = CASE WHEN n.declined THEN now() + make_interval(secs => $15) END,
             stdout = CASE WHEN n.stdout_new THEN n.stdout WHEN n.stdout = '' THEN a.stdout ELSE a.stdout || n.stdout END,
             stderr = CASE WHEN n.stderr_new THEN n.stderr WHEN n.stderr = '' THEN a.stderr ELSE a.stderr || n.stderr END,
             exit_code = coalesce(n.exit_code, a.exit_code),
             -- Before the agent has it, there is only the reason why it could not take it.
             error = CASE WHEN a.delivery = 'sent' THEN n.error ELSE coalesce(n.error, a.error) END,
             queue_lane = n.lane,
             activity_kind = n.kind,
             metadata = jsonb_strip_nulls(jsonb_build_object(
                 'assembly_source', a.request #> '{context,assembly_source}', 'assembly_guid', a.request #> '{context,assembly_guid}',
                 'scheduled_job_id', a.request #> '{context,scheduled_job_id}', 'scheduled_job_run_id', a.request #> '{context,scheduled_job_run_id}',
                 'scheduled_ts', a.request #> '{context,scheduled_ts}')) || a.metadata
                 || CASE WHEN octet_length(a.metadata::text) < 65536 THEN n.metadata ELSE '{}'::jsonb END,
             started_at = CASE WHEN n.started THEN coalesce(a.started_at, now()) ELSE a.started_at END,
             finished_at = CASE WHEN n.ended THEN now() END,
             updated_at = now()
         FROM unnest($1::bigint[], $2::text[], $3::bool[], $4::bool[], $5::text[], $6::bool[], $7::text[], $8::bool[], $9::int[], $10::text[],
                     $11::text[], $12::text[], $13::jsonb[], $14::bool[])
              AS n (id, status, ended, started, stdout, stdout_new, stderr, stderr_new, exit_code, error, lane, kind, metadata, declined)
         WHERE a.id = n.id",
        &ids,
        &statuses,
        &ended,
        &started,
        &stdout,
        &stdout_new,
        &stderr,
        &stderr_new,
        &exit_codes as &[Option<i32>],
        &errors as &[Option<String>],
        &lanes,
        &kinds,
        &metadata,
        &declined,
        f64::from(DECLINED_PAUSE_S)
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn record_late(tx: &mut Tx<'_>, reports: impl Iterator<Item = &Report>) -> Result<()> {
    let (mut ids, mut kinds, mut details) = (Vec::new(), Vec::new(), Vec::new());
    for report in reports {
        let output = |text: &Option<String>| text.as_ref().map(|text| output::first(text, EVENT_OUTPUT_BYTES).to_owned());
        ids.push(report.activity_id);
        kinds.push(report.kind.late_event().to_owned());
        details.push(json!({
            "status": report.status.as_str(), "exit_code": report.exit_code, "error": report.error,
            "stdout": output(&report.stdout), "stderr": output(&report.stderr),
        }));
    }
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO activity_events (activity_id, kind, detail)
         SELECT n.id, n.kind, n.detail FROM unnest($1::bigint[], $2::text[], $3::jsonb[]) AS n (id, kind, detail)
         WHERE (SELECT count(*) FROM activity_events e WHERE e.activity_id = n.id) < $4",
        &ids,
        &kinds,
        &details,
        EVENTS_LIMIT
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Says of `Pending` runs why they still are.
async fn explain_waiting(tx: &mut Tx<'_>, reasons: impl Iterator<Item = (i64, Option<String>)>) -> Result<()> {
    let (runs, reasons): (Vec<i64>, Vec<Option<String>>) = reasons.unzip();
    if runs.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "UPDATE scheduled_job_runs r SET error = n.reason, updated_at = now()
         FROM unnest($1::bigint[], $2::text[]) AS n (id, reason)
         WHERE r.id = n.id AND r.id IN (SELECT id FROM scheduled_job_runs WHERE id = ANY($1) AND status = 'Pending' ORDER BY id FOR UPDATE)",
        &runs,
        &reasons as &[Option<String>]
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// `Pending` runs of these become `Running`: their script has reached its device.
///
/// # Errors
/// When the database refuses.
pub(super) async fn begin_runs(tx: &mut Tx<'_>, runs: &[i64]) -> Result<()> {
    if runs.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "UPDATE scheduled_job_runs SET status = 'Running', started_at = coalesce(started_at, now()), error = NULL, updated_at = now()
         WHERE id IN (SELECT id FROM scheduled_job_runs WHERE id = ANY($1) AND status = 'Pending' ORDER BY id FOR UPDATE)",
        runs
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends those of these runs whose activities have all ended, with the worst of their statuses; answers the occurrences
/// whose last run this was.
///
/// # Errors
/// When the database refuses.
pub async fn end_runs(tx: &mut Tx<'_>, runs: &[i64]) -> Result<Vec<Finished>> {
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    // Locked before their activities are counted: of two transactions that end the last two, the second sees the first.
    sqlx::query!("SELECT id FROM scheduled_job_runs WHERE id = ANY($1) ORDER BY id FOR UPDATE", runs)
        .fetch_all(&mut **tx)
        .await?;
    // A cancelled run is Failed, or Timed Out when it was the stop-after that cancelled; but what had succeeded already, has.
    let occurrences = sqlx::query_scalar!(
        "UPDATE scheduled_job_runs r SET
             status = CASE WHEN g.worst = 'Success' OR r.cancel_requested_at IS NULL THEN g.worst
                           WHEN r.cancel_reason = 'stop_after' THEN 'Timed Out' ELSE 'Failed' END,
             error = CASE WHEN g.worst = 'Success' THEN NULL
                          WHEN r.cancel_requested_at IS NOT NULL THEN left(coalesce(nullif(r.cancel_reason, ''), 'cancelled_by_operator'), 512)
                          ELSE left(g.error, 512) END,
             started_at = coalesce(r.started_at, g.started_at), finished_at = now(), updated_at = now()
         FROM (SELECT n.run_id, w.* FROM unnest($1::bigint[]) AS n (run_id) CROSS JOIN LATERAL (
                   SELECT bool_and(a.delivery = 'done') AS ended, min(a.started_at) AS started_at, min(a.error) AS error,
                          (ARRAY['Success', 'Skipped', 'Warning', 'Expired', 'Timed Out', 'Failed'])[max(array_position(
                           ARRAY['Success', 'Skipped', 'Warning', 'Expired', 'Timed Out', 'Failed'], a.status))] AS worst
                   FROM activity_history a WHERE a.run_id = n.run_id) w) g
         WHERE r.id = ANY($1) AND r.id = g.run_id AND g.ended AND g.worst IS NOT NULL AND r.status IN ('Pending', 'Running')
         RETURNING r.occurrence_id",
        runs
    )
    .fetch_all(&mut **tx)
    .await?;
    let occurrences: Vec<i64> = occurrences.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    finished_occurrences(&mut *tx, &occurrences).await
}

/// Those of these occurrences that have no open run left. To be called after runs of theirs were ended in this
/// transaction: then exactly one transaction gets the answer.
///
/// # Errors
/// When the database refuses.
pub async fn finished_occurrences(conn: &mut PgConnection, occurrences: &[i64]) -> Result<Vec<Finished>> {
    if occurrences.is_empty() {
        return Ok(Vec::new());
    }
    // Weaker than FOR UPDATE, so that the foreign keys of new rows do not wait for it.
    sqlx::query!("SELECT id FROM job_occurrences WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE", occurrences)
        .fetch_all(&mut *conn)
        .await?;
    let finished = sqlx::query_as!(
        Finished,
        r#"SELECT o.id AS occurrence_id, o.workflow_run_id AS "workflow_run_id!" FROM job_occurrences o
           WHERE o.id = ANY($1) AND o.workflow_run_id IS NOT NULL AND o.frozen_at IS NOT NULL AND NOT EXISTS (
                 SELECT 1 FROM scheduled_job_runs r WHERE r.occurrence_id = o.id AND r.status IN ('Pending', 'Running'))"#,
        occurrences
    )
    .fetch_all(&mut *conn)
    .await?;
    Ok(finished)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            device: Uuid::from_u128(1),
            hostname: "host".into(),
            site_id: Some(1),
            run_id: Some(1),
            status: Status::Queued,
            queue_lane: String::new(),
            activity_kind: String::new(),
            timeout_seconds: 60,
            cancelled: false,
            sent: true,
            changed: false,
            started: false,
            declined: false,
            by_result: false,
            stdout: Output::default(),
            stderr: Output::default(),
            exit_code: None,
            error: None,
            metadata: Map::new(),
        }
    }

    fn report(kind: Kind, value: Value) -> Report {
        Report::parse(Uuid::from_u128(1), kind, &value).unwrap()
    }

    #[test]
    fn statuses_are_read_as_the_contract_says() {
        for (text, status) in [
            ("created", Some(Status::Queued)),
            ("In_Progress", Some(Status::Running)),
            ("complete", Some(Status::Success)),
            ("error", Some(Status::Failed)),
            ("timeout", Some(Status::TimedOut)),
            ("Timed Out", Some(Status::TimedOut)),
            ("", None),
            ("odd", None),
        ] {
            assert_eq!(Status::parse(text), status, "{text}");
        }
        assert_eq!(report(Kind::Result, json!({"job_id": 1})).status, Status::Failed);
        assert_eq!(report(Kind::Result, json!({"job_id": 1, "status": "Running"})).status, Status::Failed);
        assert_eq!(report(Kind::Progress, json!({"job_id": 1})).status, Status::Running);
        assert_eq!(report(Kind::Accepted, json!({"job_id": "7", "status": "Success"})).status, Status::Queued);
        assert_eq!(report(Kind::Declined, json!({"job_id": "7", "status": "Success"})).status, Status::Queued);
        let unknown = json!({"job_id": 1, "status": "Failed", "reason": "outcome_unknown"});
        assert_eq!(report(Kind::Result, unknown).status, Status::TimedOut);
    }

    #[test]
    fn what_is_no_report_is_ignored() {
        for value in [json!([]), json!("1"), json!({}), json!({"job_id": null}), json!({"job_id": 1.5}), json!({"job_id": "x"})] {
            assert!(Report::parse(Uuid::nil(), Kind::Result, &value).is_none(), "{value}");
        }
    }

    #[test]
    fn the_first_end_is_final() {
        let mut row = row();
        assert_eq!(fold(&mut row, &report(Kind::Accepted, json!({"job_id": 1}))), Outcome::Applied);
        assert_eq!((row.status, row.started), (Status::Queued, false));
        assert_eq!(fold(&mut row, &report(Kind::Progress, json!({"job_id": 1}))), Outcome::Applied);
        assert_eq!((row.status, row.started), (Status::Running, true));
        fold(&mut row, &report(Kind::Progress, json!({"job_id": 1, "status": "queued"})));
        assert_eq!(row.status, Status::Running);
        fold(&mut row, &report(Kind::Result, json!({"job_id": 1, "status": "Success", "stdout": "out", "exit_code": 0})));
        assert_eq!(
            fold(&mut row, &report(Kind::Result, json!({"job_id": 1, "status": "Failed", "stdout": "other"}))),
            Outcome::Late
        );
        assert_eq!(fold(&mut row, &report(Kind::Progress, json!({"job_id": 1}))), Outcome::Late);
        assert_eq!((row.status, row.stdout.text.as_str(), row.exit_code), (Status::Success, "out", Some(0)));
    }

    #[test]
    fn what_could_not_be_taken_is_offered_again() {
        let declined = report(Kind::Declined, json!({"job_id": 1, "reason": "agent_disk_full"}));
        let mut offered = row();
        assert_eq!(fold(&mut offered, &declined), Outcome::Applied);
        assert!(offered.declined && !offered.started && offered.status == Status::Queued);
        assert_eq!(offered.error.as_deref(), Some("agent_disk_full"));
        assert_eq!(fold(&mut offered, &declined), Outcome::Late, "it is on its way no longer");
        // Both in one batch: it has it after all.
        assert_eq!(fold(&mut offered, &report(Kind::Accepted, json!({"job_id": 1}))), Outcome::Applied);
        assert!(!offered.declined);

        let mut accepted = Row { sent: false, ..row() };
        assert_eq!(fold(&mut accepted, &declined), Outcome::Late);
        assert!(!accepted.changed);

        let mut cancelled = Row { cancelled: true, ..row() };
        assert_eq!(fold(&mut cancelled, &declined), Outcome::Applied);
        assert_eq!((cancelled.status, cancelled.error.as_deref()), (Status::Failed, Some("cancelled_by_operator")));
    }

    #[test]
    fn another_device_changes_nothing() {
        let mut row = row();
        let foreign = Report::parse(Uuid::from_u128(2), Kind::Result, &json!({"job_id": 1, "status": "Success"})).unwrap();
        assert_eq!(fold(&mut row, &foreign), Outcome::Unknown);
        assert!(!row.changed);
    }

    #[test]
    fn output_is_appended_replaced_and_cut() {
        let mut row = row();
        row.stdout.len = 5;
        fold(&mut row, &report(Kind::Progress, json!({"job_id": 1, "stdout": "a", "append_output": true})));
        fold(&mut row, &report(Kind::Progress, json!({"job_id": 1, "stdout": "b", "append_output": true})));
        assert_eq!((row.stdout.text.as_str(), row.stdout.replace, row.stdout.len), ("ab", false, 7));
        fold(&mut row, &report(Kind::Progress, json!({"job_id": 1, "stdout": "whole"})));
        assert_eq!((row.stdout.text.as_str(), row.stdout.replace, row.stdout.len), ("whole", true, 5));

        let mut output = Output::default();
        // A character of three bytes lies across the limit.
        output.take(&format!("{}\u{20ac}", "x".repeat(OUTPUT_LIMIT_BYTES - 1)), true);
        assert!(output.text.ends_with(TRUNCATED));
        assert_eq!(output.len, OUTPUT_LIMIT_BYTES - 1 + TRUNCATED.len());
        let cut = output.len;
        output.take("more", true);
        assert_eq!(output.len, cut, "nothing follows the mark");

        // The end of a whole output stays.
        let long = format!("first\n{}\nthe reason", "x".repeat(6_000_000));
        fold(&mut row, &report(Kind::Result, json!({"job_id": 1, "stdout": long})));
        assert!(row.stdout.text.starts_with("first\nx") && row.stdout.text.ends_with("x\nthe reason"));
        assert!(row.stdout.text.contains(" bytes of output left out here]\n") && row.stdout.len <= OUTPUT_LIMIT_BYTES);

        let mut full = Output { len: OUTPUT_LIMIT_BYTES - 1, ..Output::default() };
        full.take("y", true);
        assert_eq!((full.text.as_str(), full.len), ("y", OUTPUT_LIMIT_BYTES));
    }

    #[test]
    fn an_agent_that_sends_no_exit_code_is_understood() {
        let end = |value: Value| {
            let mut row = row();
            fold(&mut row, &report(Kind::Result, value));
            (row.status, row.exit_code)
        };
        let failed = |stderr: &str| end(json!({"job_id": 1, "status": "Failed", "stdout": "", "stderr": stderr}));
        assert_eq!(end(json!({"job_id": 1, "status": "Success", "stdout": "", "stderr": ""})), (Status::Success, Some(0)));
        assert_eq!(failed("Script timed out after 60 seconds"), (Status::TimedOut, None));
        assert_eq!(failed("half\nScript timed out after 60 seconds\n"), (Status::TimedOut, None));
        for other in [
            "",
            "Script timed out after 61 seconds",
            "Script timed out after 60 seconds\nmore",
            "x Script timed out after 60 seconds",
            "Script timed out after  seconds",
        ] {
            assert_eq!(failed(other), (Status::Failed, None), "{other}");
        }
        // One that sends its exit code says how it ended.
        let own = json!({"job_id": 1, "status": "Failed", "exit_code": 1, "stderr": "Script timed out after 60 seconds"});
        assert_eq!(end(own), (Status::Failed, Some(1)));
    }

    #[test]
    fn an_unknown_outcome_is_timed_out_whoever_found_out() {
        let report = report(Kind::Result, json!({"job_id": 1, "status": "Failed", "reason": "outcome_unknown"}));
        assert_eq!((report.status, report.error.as_deref()), (Status::TimedOut, Some("outcome_unknown")));
    }

    #[test]
    fn an_agent_cannot_poison_the_store() {
        let report = report(
            Kind::Result,
            json!({"job_id": 1, "stdout": "a\u{0}b", "metadata": {"x": "\u{0}"}, "error": "e".repeat(600), "queue_lane": "l".repeat(900)}),
        );
        assert_eq!(report.stdout.as_deref(), Some("a\u{fffd}b"));
        assert!(report.metadata.is_empty());
        assert_eq!((report.error.unwrap().len(), report.queue_lane.len()), (512, 200));
    }

    #[test]
    fn the_engines_own_metadata_is_not_taken_from_agents() {
        let report = report(Kind::Result, json!({"job_id": 1, "metadata": {"scheduled_job_run_id": 9, "pid": 4}}));
        assert_eq!(Value::Object(report.metadata), json!({"pid": 4}));
    }

    #[test]
    fn a_cancelled_failure_says_so() {
        let mut row = row();
        row.cancelled = true;
        fold(&mut row, &report(Kind::Result, json!({"job_id": 1, "status": "Failed"})));
        assert_eq!(row.error.as_deref(), Some("cancelled_by_operator"));
    }
}
