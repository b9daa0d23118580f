//! `scheduled_run`: one occurrence of a scheduled job, from frozen targets to the last result.
//!
//! resolve -> dispatch -> results -> finish. A device's run is a row with a state machine of its own; this workflow freezes
//! those rows, has them delivered, sleeps until the last of them has ended, and closes the occurrence.

use std::time::Duration;

use borealis_engine::{
    Error, Kind, Result,
    jobs::{
        occurrence::{self, Summary},
        run,
    },
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    StepContext, Workflow,
    durable::{Children, NewRun, Outcome, StepResult, Wait, Wake, definition::transient, fault, start, workflow},
};

/// The workflow's name.
pub const NAME: &str = "scheduled_run";
/// The signal that says: the last open run of the occurrence has ended.
pub const RESULTS: &str = "results";

/// How long the API may be away before dispatch leaves delivery to the devices' next connection.
const DISPATCH_ATTEMPTS: i32 = 5;
/// How many devices one request to the API names.
const DISPATCH_BATCH: usize = 1_000;
/// How often a cancel is passed on again to devices that have not answered.
const CANCEL_AGAIN: Duration = Duration::from_secs(10);
/// How often the scripts of an occurrence are read again because somebody changes them meanwhile.
const READ_ATTEMPTS: usize = 5;

/// What the workflow is started with.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Input {
    /// The occurrence to carry out.
    pub occurrence_id: i64,
}

/// What a cancel waits for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Targets {
    devices: Vec<Uuid>,
}

/// The workflow, version 1.
#[must_use]
pub fn definition() -> Workflow {
    workflow(NAME, 1)
        .step("resolve", |cx| Box::pin(resolve(cx)))
        .step("dispatch", |cx| Box::pin(dispatch(cx)))
        .retry(transient(DISPATCH_ATTEMPTS))
        .step("results", |cx| Box::pin(results(cx)))
        .step("finish", |cx| Box::pin(finish(cx)))
        .on_cancel(|cx| Box::pin(cancel(cx)))
}

/// Starts the runs of opened occurrences, in the caller's transaction and once per occurrence. Answers the runs.
///
/// # Errors
/// When the database refuses.
pub async fn start_occurrences(conn: &mut PgConnection, occurrence_ids: &[i64]) -> Result<Vec<Uuid>> {
    if occurrence_ids.is_empty() {
        return Ok(Vec::new());
    }
    let facts = occurrence::facts(conn, occurrence_ids).await?;
    let ids: Vec<i64> = facts.iter().map(|facts| facts.id).collect();
    let new = facts.into_iter().map(|facts| NewRun {
        key: Some(facts.id.to_string()),
        input: json!(Input { occurrence_id: facts.id }),
        owner_id: Some(facts.job_id),
        scope_ids: facts.site_ids,
        ..NewRun::default()
    });
    let started = start::start_many(conn, &definition(), new.collect()).await?;
    let carriers: Vec<(i64, Uuid)> = ids.into_iter().zip(started.iter().map(|started| started.run_id)).collect();
    occurrence::carried_by(conn, &carriers).await?;
    Ok(started.into_iter().map(|started| started.run_id).collect())
}

/// The occurrence that a run was started for.
///
/// # Errors
/// When the database refuses.
pub async fn occurrence_of(conn: &mut PgConnection, run_id: Uuid) -> Result<Option<i64>> {
    let input = sqlx::query_scalar!("SELECT input FROM workflow_runs WHERE id = $1 AND workflow = $2", run_id, NAME)
        .fetch_optional(conn)
        .await?;
    Ok(input.and_then(|input| Input::deserialize(input).ok()).map(|input| input.occurrence_id))
}

/// Freezes the targets and writes what is to be sent to each, in the transaction that commits this step.
async fn resolve(cx: &mut StepContext) -> StepResult {
    let Input { occurrence_id } = cx.input()?;
    for _ in 0..READ_ATTEMPTS {
        // Reading a script is work, and no transaction waits for it.
        let scripts = occurrence::scripts(&cx.services.pool, occurrence_id).await?;
        let tx = cx.tx().await?;
        occurrence::freeze(tx, occurrence_id).await?;
        if occurrence::prepare(tx, occurrence_id, &scripts).await? {
            inside(cx);
            return Outcome::next(&());
        }
        // Somebody has changed the job or a script since; what was frozen meanwhile is undone with the transaction.
        cx.end_tx();
    }
    Err(Error::new(Kind::Unavailable, "job_changing", "The job or its scripts keep changing.").into())
}

/// Asks the API to send. What is marked sent is not sent again, so this may be repeated at will; a device that is away gets
/// its script when it connects, whether or not this step ever succeeds.
async fn dispatch(cx: &mut StepContext) -> StepResult {
    let Input { occurrence_id } = cx.input()?;
    // Looked up and not handed on: ten thousand names are no state for every run's journal to keep.
    let devices = occurrence::waiting_devices(&mut *cx.look().await?, occurrence_id).await?;
    for batch in devices.chunks(DISPATCH_BATCH) {
        match cx.services.agents.deliver(batch).await {
            Ok(()) => {}
            Err(error) if error.is_transient() && cx.attempt < DISPATCH_ATTEMPTS => return Err(error.into()),
            Err(error) => {
                tracing::warn!(?error, "dispatch left to the devices' next connection");
                break;
            }
        }
    }
    inside(cx);
    Outcome::next(&())
}

/// Sleeps until the last run has ended.
async fn results(cx: &mut StepContext) -> StepResult {
    let Input { occurrence_id } = cx.input()?;
    // A run that ends after this look signals, and a signal that comes before the wait is kept.
    let open = occurrence::open_runs(&mut *cx.look().await?, occurrence_id).await?;
    inside(cx);
    if open == 0 {
        return Outcome::next(&());
    }
    Ok(Outcome::Wait(Wait { signal: Some(RESULTS.to_owned()), children: Children::None, at_most: None, state: json!(null) }))
}

/// Closes the occurrence and starts the one that waited for it. Where not every device's run went well, this run has failed, too.
async fn finish(cx: &mut StepContext) -> StepResult {
    let Input { occurrence_id } = cx.input()?;
    let summary = close(cx.tx().await?, occurrence_id).await?;
    inside(cx);
    match summary.trouble() {
        Some(error) => Ok(Outcome::Failed { error, output: json!(summary) }),
        None => Outcome::done(&summary),
    }
}

/// The fail point in the middle of a step, after its effect has begun.
fn inside(cx: &StepContext) {
    fault::point("inside", NAME, cx.step);
}

/// Closes an occurrence all of whose runs have ended, and starts the one that waited for it.
///
/// # Errors
/// When the database refuses.
pub async fn close(conn: &mut PgConnection, occurrence_id: i64) -> Result<Summary> {
    let summary = occurrence::close(conn, occurrence_id).await?;
    if let Some(next) = summary.next_queued {
        start_occurrences(conn, &[next]).await?;
    }
    Ok(summary)
}

/// Ends what nothing was sent of, passes the cancel on to the devices that have something, and sleeps until they have
/// answered; those that do not are ended by [`run::enforce_limits`].
async fn cancel(cx: &mut StepContext) -> StepResult {
    let Input { occurrence_id } = cx.input()?;
    if cx.wake == Wake::First {
        let tx = cx.tx().await?;
        let cancelled = run::cancel_open(tx, occurrence_id, None, run::CANCELLED_BY_OPERATOR).await?;
        if cancelled.devices.is_empty() && occurrence::open_runs(tx, occurrence_id).await? == 0 {
            return Outcome::done(&close(tx, occurrence_id).await?);
        }
        // The devices are told by the next pass, once this is committed.
        let state = json!(Targets { devices: cancelled.devices });
        return Ok(Outcome::Wait(Wait {
            signal: Some(RESULTS.to_owned()),
            children: Children::None,
            at_most: Some(Duration::ZERO),
            state,
        }));
    }
    let targets: Targets = cx.state()?;
    if occurrence::open_runs(cx.tx().await?, occurrence_id).await? == 0 {
        let tx = cx.tx().await?;
        return Outcome::done(&close(tx, occurrence_id).await?);
    }
    cx.end_tx();
    for batch in targets.devices.chunks(DISPATCH_BATCH) {
        if let Err(error) = cx.services.agents.deliver(batch).await {
            tracing::warn!(?error, "cancel not passed on yet");
        }
    }
    Ok(Outcome::Wait(Wait {
        signal: Some(RESULTS.to_owned()),
        children: Children::None,
        at_most: Some(CANCEL_AGAIN),
        state: json!(targets),
    }))
}
