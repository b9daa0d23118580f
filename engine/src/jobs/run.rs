//! The state machine of one target of one occurrence: a run.

use sqlx::PgConnection;
use strum::VariantArray as _;
use uuid::Uuid;

use crate::{
    Error, Result, Scope,
    audit::{self, Entry},
    scope::Actor,
};

/// The error of a run an operator has cancelled.
pub const CANCELLED_BY_OPERATOR: &str = "cancelled_by_operator";
/// The error of a run whose script ran past the job's stop-after.
pub const STOP_AFTER: &str = "stop_after";
/// The error of a run whose script may or may not have run.
pub const OUTCOME_UNKNOWN: &str = "outcome_unknown";
/// What is added to the error output of a script that its agent cannot stop.
const MAY_GO_ON: &str = "\n[The run was ended. This agent cannot stop a script: it may go on.]\n";
/// How long an agent may take to answer a cancel before the run ends without it, in seconds.
pub const CANCEL_ANSWER_S: i32 = 60;

/// Where a run stands. What has ended stays as it is; the database sees to that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, strum::IntoStaticStr, strum::VariantArray)]
pub enum RunStatus {
    /// Frozen as a target; nothing has reached the device.
    Pending,
    /// The device has it, or it was written to a socket that will not be written to again.
    Running,
    /// Every script ended with exit code 0.
    Success,
    /// Mixed outcome (onboarding).
    Warning,
    /// A script failed, or the run was cancelled.
    Failed,
    /// The device did not appear before the job's expiry.
    Expired,
    /// The script took too long, or nothing was heard of it again.
    #[strum(serialize = "Timed Out")]
    TimedOut,
    /// It was never meant to run: overlap, misfire, no devices.
    Skipped,
}

impl RunStatus {
    /// The text stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The status of that text.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::VARIANTS.iter().copied().find(|status| status.as_str() == text)
    }

    /// Whether nothing can happen any more.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

/// What asking for the cancel of runs did.
#[derive(Debug, Default)]
pub struct Cancelled {
    /// Runs that ended at once: nothing had reached their device, or its agent cannot stop a script.
    pub ended: Vec<i64>,
    /// Devices that have to be told; their runs end with the device's answer, or without it after [`CANCEL_ANSWER_S`].
    pub devices: Vec<Uuid>,
    /// Workflow runs whose last open run ended here: to be signalled `results` in the same transaction.
    pub finished_workflows: Vec<Uuid>,
}

/// Cancels one run of a job the caller may see.
///
/// # Errors
/// 404 when there is none in scope; 409 `run_already_finished` when it has ended.
pub async fn request_cancel(
    conn: &mut PgConnection,
    scope: &Scope,
    job_id: i64,
    run_id: i64,
    actor: &Actor,
) -> Result<Cancelled> {
    let run = sqlx::query!(
        "SELECT r.id, r.occurrence_id, r.status, r.site_id FROM scheduled_job_runs r
         WHERE r.id = $1 AND r.job_id = $2 AND ($3::bigint[] IS NULL OR r.site_id = ANY($3))",
        run_id,
        job_id,
        scope.site_ids(),
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    if RunStatus::parse(&run.status).is_some_and(RunStatus::is_terminal) {
        return Err(Error::conflict("run_already_finished", format!("The run has ended already: {}.", run.status)));
    }
    audit::record(
        conn,
        actor,
        Entry {
            action: "scheduled_job_run.cancel",
            object_kind: "scheduled_job_run",
            object_id: run_id.to_string(),
            site_id: run.site_id,
            ..Entry::default()
        },
    )
    .await?;
    cancel_open(conn, run.occurrence_id, Some(run_id), CANCELLED_BY_OPERATOR).await
}

/// Cancels the open runs of an occurrence, or one of them. What was sent to an agent that can stop a script is to be stopped, and
/// its run waits for the answer; every other run ends here.
///
/// # Errors
/// When the database refuses.
pub async fn cancel_open(conn: &mut PgConnection, occurrence_id: i64, run_id: Option<i64>, reason: &str) -> Result<Cancelled> {
    lock(conn, occurrence_id, run_id).await?;
    let status = if reason == STOP_AFTER { RunStatus::TimedOut } else { RunStatus::Failed };
    sqlx::query!(
        "UPDATE scheduled_job_runs SET cancel_requested_at = now(), cancel_reason = $3, updated_at = now()
         WHERE occurrence_id = $1 AND ($2::bigint IS NULL OR id = $2) AND status IN ('Pending', 'Running') AND cancel_requested_at IS NULL",
        occurrence_id,
        run_id,
        reason,
    )
    .execute(&mut *conn)
    .await?;
    // What was not sent is not sent any more, and from an agent that cannot stop a script nothing is waited for: what it still
    // says of it is recorded, and changes nothing.
    let devices = sqlx::query_scalar!(
        "WITH open AS (
             SELECT id FROM scheduled_job_runs
             WHERE occurrence_id = $1 AND ($2::bigint IS NULL OR id = $2) AND status IN ('Pending', 'Running')
         ), unsent AS (
             UPDATE activity_history a SET status = 'Failed', error = $3, delivery = 'done', finished_at = now(), updated_at = now()
             FROM open WHERE a.run_id = open.id AND a.delivery IN ('waiting', 'ready')
         ), left_alone AS (
             UPDATE activity_history a SET status = $4, error = $3, delivery = 'done', stderr = a.stderr || $5,
                    cancel_requested_at = coalesce(a.cancel_requested_at, now()), finished_at = now(), updated_at = now()
             FROM open WHERE a.run_id = open.id AND a.delivery IN ('sent', 'accepted') AND NOT a.agent_cancels
         ), told AS (
             UPDATE activity_history a SET cancel_requested_at = coalesce(a.cancel_requested_at, now()), updated_at = now()
             FROM open WHERE a.run_id = open.id AND a.delivery IN ('sent', 'accepted') AND a.agent_cancels
             RETURNING a.device_guid
         )
         SELECT DISTINCT device_guid FROM told",
        occurrence_id,
        run_id,
        reason,
        status.as_str(),
        MAY_GO_ON,
    )
    .fetch_all(&mut *conn)
    .await?;
    let ended = sqlx::query_scalar!(
        "UPDATE scheduled_job_runs r SET status = $3, error = $4, finished_at = now(), updated_at = now()
         WHERE r.occurrence_id = $1 AND ($2::bigint IS NULL OR r.id = $2) AND r.status IN ('Pending', 'Running')
           AND NOT EXISTS (SELECT FROM activity_history a WHERE a.run_id = r.id AND a.delivery IN ('sent', 'accepted'))
         RETURNING r.id",
        occurrence_id,
        run_id,
        status.as_str(),
        reason,
    )
    .fetch_all(&mut *conn)
    .await?;
    let finished_workflows = finished_workflow(conn, occurrence_id).await?.into_iter().collect();
    Ok(Cancelled { ended, devices, finished_workflows })
}

/// Locks what a cancel touches, in the order in which results lock it: activities, runs, occurrence.
pub(super) async fn lock(conn: &mut PgConnection, occurrence_id: i64, run_id: Option<i64>) -> Result<()> {
    sqlx::query!(
        "SELECT a.id FROM activity_history a JOIN scheduled_job_runs r ON r.id = a.run_id
         WHERE r.occurrence_id = $1 AND ($2::bigint IS NULL OR r.id = $2) AND r.status IN ('Pending', 'Running') AND a.delivery <> 'done'
         ORDER BY a.id FOR UPDATE OF a",
        occurrence_id,
        run_id,
    )
    .fetch_all(&mut *conn)
    .await?;
    sqlx::query!(
        "SELECT id FROM scheduled_job_runs
         WHERE occurrence_id = $1 AND ($2::bigint IS NULL OR id = $2) AND status IN ('Pending', 'Running') ORDER BY id FOR UPDATE",
        occurrence_id,
        run_id,
    )
    .fetch_all(&mut *conn)
    .await?;
    Ok(())
}

/// The workflow run of an occurrence none of whose runs is open any more.
async fn finished_workflow(conn: &mut PgConnection, occurrence_id: i64) -> Result<Option<Uuid>> {
    Ok(super::results::finished_occurrences(conn, &[occurrence_id]).await?.first().map(|finished| finished.workflow_run_id))
}

/// Ends what a clock ends: runs past their stop-after are asked to stop, and runs whose device did not answer a cancel end
/// without it. Meant to be called about once a second by one process.
///
/// # Errors
/// When the database refuses.
pub async fn enforce_limits(conn: &mut PgConnection, limit: i64) -> Result<Cancelled> {
    let mut done = Cancelled::default();
    let over = sqlx::query!(
        "SELECT id, occurrence_id FROM scheduled_job_runs
         WHERE status = 'Running' AND stop_after_s IS NOT NULL AND cancel_requested_at IS NULL
           AND started_at < now() - stop_after_s * interval '1 second'
         ORDER BY occurrence_id, id LIMIT $1",
        limit,
    )
    .fetch_all(&mut *conn)
    .await?;
    for run in over {
        let cancelled = cancel_open(conn, run.occurrence_id, Some(run.id), STOP_AFTER).await?;
        done.ended.extend(cancelled.ended);
        done.devices.extend(cancelled.devices);
        done.finished_workflows.extend(cancelled.finished_workflows);
    }
    let silent = sqlx::query!(
        "SELECT id, occurrence_id FROM scheduled_job_runs
         WHERE status IN ('Pending', 'Running') AND cancel_requested_at < now() - $2::int * interval '1 second'
         ORDER BY occurrence_id, id LIMIT $1",
        limit,
        CANCEL_ANSWER_S,
    )
    .fetch_all(&mut *conn)
    .await?;
    for run in silent {
        lock(conn, run.occurrence_id, Some(run.id)).await?;
        let ended = sqlx::query_scalar!(
            "UPDATE scheduled_job_runs
             SET status = CASE WHEN cancel_reason = 'stop_after' THEN 'Timed Out' ELSE 'Failed' END,
                 error = cancel_reason, finished_at = now(), updated_at = now()
             WHERE id = $1 AND status IN ('Pending', 'Running') RETURNING id",
            run.id,
        )
        .fetch_optional(&mut *conn)
        .await?;
        sqlx::query!(
            "UPDATE activity_history SET status = 'Timed Out', error = 'outcome_unknown', delivery = 'done', finished_at = now(), updated_at = now()
             WHERE run_id = $1 AND delivery <> 'done'",
            run.id,
        )
        .execute(&mut *conn)
        .await?;
        done.ended.extend(ended);
        done.finished_workflows.extend(finished_workflow(conn, run.occurrence_id).await?);
    }
    Ok(done)
}
