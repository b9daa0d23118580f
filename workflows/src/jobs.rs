//! What operators do with scheduled jobs and their runs, each in the caller's transaction and with its audit row.

use borealis_engine::{
    Error, Result,
    audit::{self, Entry},
    db,
    jobs::{
        occurrence::{self, Requested},
        run::{self, CANCELLED_BY_OPERATOR, Cancelled},
        store,
    },
    scope::Caller,
};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    durable::{self, RetryAsked},
    runs, scheduled_run,
};

/// Which targets a manual start is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those the job has now.
    All,
    /// Those that did not end in Success in the latest occurrence.
    UnsuccessfulOfLatest,
    /// Those that did not end well in this occurrence.
    FailedOf(i64),
}

/// An occurrence that was started.
#[derive(Debug, Clone, Copy)]
pub struct StartedOccurrence {
    /// The occurrence.
    pub id: i64,
    /// The workflow run that carries it out.
    pub workflow_run_id: Option<Uuid>,
}

/// Starts an occurrence of an enabled job now, on what its targets are now and the caller may see. The schedule goes on as before.
///
/// # Errors
/// 404 `not found`; 409 `job_disabled`, `occurrence_in_progress` unless `allow_overlap`, `nothing_to_retry`.
pub async fn start_now(
    conn: &mut PgConnection,
    caller: Caller<'_>,
    job_id: i64,
    which: Which,
    allow_overlap: bool,
) -> Result<StartedOccurrence> {
    let job = store::lock(conn, caller.scope, job_id).await?;
    if !job.spec.enabled {
        return Err(Error::conflict("job_disabled", "The job is disabled."));
    }
    if !allow_overlap && store::in_progress(conn, job_id).await? {
        return Err(store::occurrence_in_progress());
    }
    let (cause, only_devices) = match which {
        Which::All => ("rerun", None),
        Which::UnsuccessfulOfLatest => ("retry", Some(store::to_retry(conn, caller.scope, job_id).await?)),
        Which::FailedOf(occurrence) => ("retry", Some(store::failed_in(conn, caller.scope, occurrence).await?)),
    };
    let new = Requested {
        job_id,
        at: store::now(conn).await?,
        cause,
        scope_site_ids: caller.scope.site_ids().map(<[i64]>::to_vec),
        only_devices,
        requested_by: caller.actor.name.clone(),
    };
    let id = occurrence::open(conn, &new).await?;
    db::plan_afresh(conn).await?;
    occurrence::freeze(conn, id).await?;
    let carriers = scheduled_run::start_occurrences(conn, &[id]).await?;
    let (at, _) = store::started(conn, id).await?;
    store::record(conn, caller.actor, &format!("scheduled_job.{cause}"), job_id, json!({"occurrence": at.timestamp()})).await?;
    Ok(StartedOccurrence { id, workflow_run_id: carriers.first().copied() })
}

/// Cancels one run of a job. When that was the last one that could still go well, the workflow run that carries them is
/// cancelled with it. The devices in the answer are to be told once this is committed.
///
/// # Errors
/// 404 `not found`; 409 `run_already_finished`.
pub async fn cancel_run(conn: &mut PgConnection, caller: Caller<'_>, job_id: i64, run_id: i64) -> Result<Cancelled> {
    let cancelled = run::request_cancel(conn, caller.scope, job_id, run_id, caller.actor).await?;
    if let Some(workflow) = occurrence::cancelled_whole(conn, run_id).await? {
        crate::request_cancel(conn, workflow, CANCELLED_BY_OPERATOR).await?;
    } else {
        for workflow in &cancelled.finished_workflows {
            crate::signal(conn, *workflow, scheduled_run::RESULTS, &Value::Null).await?;
        }
    }
    Ok(cancelled)
}

/// Removes a job with its runs. What is running is cancelled; the devices in the answer are to be told once this is committed.
///
/// # Errors
/// 404 `not found`.
pub async fn delete(conn: &mut PgConnection, caller: Caller<'_>, job_id: i64) -> Result<Vec<Uuid>> {
    store::lock(conn, caller.scope, job_id).await?;
    let (workflows, devices) = occurrence::cancel_all(conn, job_id).await?;
    for workflow in workflows {
        crate::request_cancel(conn, workflow, CANCELLED_BY_OPERATOR).await?;
    }
    store::delete(conn, caller, job_id).await?;
    Ok(devices)
}

/// Tries a failed workflow run again, and answers the run that goes on. That is the run itself, at its failed step; when it is the
/// run of an occurrence that has ended, it is a new one for the targets that did not end well.
///
/// # Errors
/// 404 `not found`; 409 `run_not_failed`, and those of [`start_now`].
pub async fn retry_run(conn: &mut PgConnection, caller: Caller<'_>, id: Uuid) -> Result<Uuid> {
    let run = runs::get(conn, caller.scope, id).await?;
    let ended =
        if run.workflow == scheduled_run::NAME && run.state == "failed" { ended_occurrence(conn, id).await? } else { None };
    let goes_on = match ended {
        Some((occurrence, job_id)) => {
            let started = start_now(conn, caller, job_id, Which::FailedOf(occurrence), false).await?;
            started.workflow_run_id.ok_or_else(Error::not_found)?
        }
        None => {
            match durable::retry(conn, id, &caller.actor.name).await? {
                RetryAsked::Retrying => {}
                RetryAsked::Unknown => return Err(Error::not_found()),
                RetryAsked::NotFailed(state) => {
                    let message = format!("Only a failed run can be retried; this one is {state}.");
                    return Err(Error::conflict("run_not_failed", message));
                }
            }
            id
        }
    };
    let entry = Entry {
        action: "workflow_run.retry",
        object_kind: "workflow_run",
        object_id: id.to_string(),
        detail: if goes_on == id { Value::Null } else { json!({"goes_on_as": goes_on}) },
        ..Entry::default()
    };
    audit::record(conn, caller.actor, entry).await?;
    Ok(goes_on)
}

/// The occurrence that a run of [`scheduled_run`] has carried to its end, and its job.
///
/// # Errors
/// 409 `nothing_to_retry` when the occurrence is gone with its job.
async fn ended_occurrence(conn: &mut PgConnection, run_id: Uuid) -> Result<Option<(i64, i64)>> {
    let gone = || Error::conflict("nothing_to_retry", "The job of this run is gone.");
    let Some(occurrence) = scheduled_run::occurrence_of(conn, run_id).await? else { return Ok(None) };
    let (job_id, has_ended) = occurrence::of_workflow_run(conn, occurrence, run_id).await?.ok_or_else(gone)?;
    Ok(has_ended.then_some((occurrence, job_id)))
}
