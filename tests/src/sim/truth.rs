//! The end of a seed: whether what became of every run and every job is what the plan, the requests and the faults allow.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{
    plan::{self, Act},
    world::{Job, Run, World},
};

/// How many workers may die in one step before its run fails.
const DEATHS: usize = 3;

/// A decided instant: when, why it was skipped with which note, and how many workflow runs carry it out.
type Decided = (DateTime<Utc>, Option<String>, Option<String>, i64);
/// A committed step.
type Entry = (Uuid, i32, String, Value, DateTime<Utc>);

impl World {
    /// Compares the ends with the plans.
    pub async fn judge(&mut self) {
        let ends: Vec<(Uuid, String, Option<String>)> =
            sqlx::query_as("SELECT id, state, error FROM workflow_runs").fetch_all(&self.pool).await.expect("runs");
        let ends: BTreeMap<Uuid, (String, Option<String>)> =
            ends.into_iter().map(|(id, state, error)| (id, (state, error))).collect();
        let rows: Vec<Entry> =
            sqlx::query_as("SELECT run_id, seq, step, output, committed_at FROM workflow_journal ORDER BY run_id, seq")
                .fetch_all(&self.pool)
                .await
                .expect("the journal");
        let mut journals: BTreeMap<Uuid, Vec<Entry>> = BTreeMap::new();
        for row in rows {
            journals.entry(row.0).or_default().push(row);
        }
        let mut wrong = Vec::new();
        for run in &self.runs {
            let label = self.label(run.id);
            let Some((state, error)) = ends.get(&run.id) else {
                wrong.push(format!("{label} is gone"));
                continue;
            };
            let journal = journals.get(&run.id).map(Vec::as_slice).unwrap_or_default();
            wrong.extend(end(run, state, error.as_deref(), journal).into_iter().map(|what| format!("{label} ({state}): {what}")));
        }
        let mut times: BTreeMap<(Uuid, i32), usize> = BTreeMap::new();
        self.witness.with(|testimony| {
            for (run, number, _) in testimony.runs.iter().filter(|(.., step)| *step == plan::FRAGILE) {
                *times.entry((*run, *number)).or_default() += 1;
            }
        });
        for run in self.runs.iter().filter(|run| run.workflow == plan::ONCE) {
            let repeated = times.iter().any(|((id, _), times)| *id == run.id && *times > 1 + run.retried);
            if repeated {
                wrong.push(format!("{}: a step that must not be repeated was", self.label(run.id)));
            }
        }
        for run in &self.runs {
            for (at, _) in run.plan.acts.iter().enumerate().filter(|(_, act)| matches!(act, Act::Deadly)) {
                let died = self.witness.with(|testimony| {
                    testimony.runs.iter().filter(|(id, _, step)| *id == run.id && *step == plan::STEPS[at]).count()
                });
                if died > DEATHS * (1 + run.retried) {
                    wrong.push(format!("{}: its step {} took {died} workers with it", self.label(run.id), plan::STEPS[at]));
                }
            }
        }
        for job in self.jobs.clone() {
            wrong.extend(self.job(&job).await);
        }
        self.wrong.append(&mut wrong);
    }

    /// Every instant of a job was decided once.
    async fn job(&self, job: &Job) -> Vec<String> {
        let (used, next): (i64, Option<DateTime<Utc>>) =
            sqlx::query_as("SELECT occurrences_used, next_due_at FROM scheduled_jobs WHERE id = $1")
                .bind(job.id)
                .fetch_one(&self.pool)
                .await
                .expect("the job");
        let rows: Vec<Decided> = sqlx::query_as(
            "SELECT o.scheduled_at, r.skip_reason, r.error, (SELECT count(*) FROM workflow_runs w WHERE w.workflow = 'scheduled_run' AND w.start_key = o.id::text)
             FROM job_occurrences o LEFT JOIN scheduled_job_runs r ON r.occurrence_id = o.id AND o.workflow_run_id IS NULL WHERE o.job_id = $1 ORDER BY 1",
        )
        .bind(job.id)
        .fetch_all(&self.pool)
        .await
        .expect("its occurrences");
        let mut wrong = Vec::new();
        let mut decided = 0;
        let mut seen = BTreeSet::new();
        for (at, skipped, error, carriers) in &rows {
            let number = (at.timestamp() - job.start) / job.step;
            if at.timestamp() != job.start + number * job.step || !(0..used).contains(&number) || !seen.insert(number) {
                wrong.push(format!("job {}: an instant that never was, or was twice: {at}", job.id));
            }
            if *carriers != i64::from(skipped.is_none()) {
                wrong.push(format!("job {}: {carriers} workflow runs for {at} ({skipped:?})", job.id));
            }
            let more: i64 = error.as_deref().and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(0);
            decided += 1 + more;
        }
        if decided != used {
            wrong.push(format!("job {}: {used} instants used, {decided} decided", job.id));
        }
        let due = (self.schedules_rest_at - job.start).div_euclid(job.step) + 1;
        let due = job.max.map_or(due, |max| due.min(max)).max(0);
        if used != due {
            wrong.push(format!("job {}: {used} instants used, {due} were due", job.id));
        }
        let expected = job.max.is_none_or(|max| used < max).then(|| job.start + used * job.step);
        if next.map(|next| next.timestamp()) != expected {
            wrong.push(format!("job {}: next is {next:?}, not {expected:?}", job.id));
        }
        wrong
    }
}

/// What is wrong with the end of a run.
fn end(run: &Run, state: &str, error: Option<&str>, journal: &[Entry]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut steps: Vec<&str> = journal.iter().map(|(_, _, step, ..)| step.as_str()).collect();
    steps.dedup();
    let done = run.plan.acts.iter().position(|act| matches!(act, Act::Done));
    // A plan shorter than its workflow is ended by the step after its last.
    let whole = if run.workflow == plan::ONCE { 3 } else { plan::STEPS.len() };
    let planned = done.map_or((run.plan.acts.len() + 1).min(whole), |at| at + 1);
    let planned = &plan::STEPS[..planned];
    match state {
        "succeeded" => {
            if steps != planned {
                wrong.push(format!("committed {steps:?}, planned {planned:?}"));
            }
            if run.cancel == Some(false) {
                wrong.push("it was cancelled while nobody was at it".into());
            }
        }
        "cancelled" => {
            if run.cancel.is_none() {
                wrong.push("nobody asked for it".into());
            }
            if steps.last() != Some(&plan::CANCEL) || !planned.starts_with(&steps[..steps.len() - 1]) {
                wrong.push(format!("committed {steps:?}"));
            }
        }
        "failed" => {
            let error = error.unwrap_or_default();
            let at = steps.iter().filter(|step| **step != plan::CANCEL).count();
            let acts = &run.plan.acts[at.saturating_sub(1).min(run.plan.acts.len())..];
            let known = match error {
                "planned" => acts.iter().any(|act| matches!(act, Act::Fails)),
                text if text.starts_with("moody") => acts.iter().any(Act::may_fail),
                text if text.starts_with("interrupted: ") => run.workflow == plan::ONCE,
                text => ["worker_lost: ", "database_unavailable: "].iter().any(|reason| text.starts_with(reason)),
            };
            if !known {
                wrong.push(format!("for no reason that was planned: {error}"));
            }
        }
        other => wrong.push(format!("it has not ended: {other}")),
    }
    let mut heard = BTreeSet::new();
    for (_, _, step, output, at) in journal {
        let with = &output["with"];
        if let Some(payload) = with["signal"].as_i64() {
            let index = plan::STEPS.iter().position(|name| name == step).unwrap_or(0);
            if !run.sent.get(&plan::signal_name(index)).is_some_and(|sent| sent.contains(&payload)) || !heard.insert(payload) {
                wrong.push(format!("{step} heard {payload}, which was not sent or is used up"));
            }
        }
        if with == "deadline" {
            let before = journal
                .iter()
                .rev()
                .find(|(_, _, other, output, began)| other == step && began <= at && output["with"]["wait_ms"].is_i64());
            let early = before.is_none_or(|(_, _, _, output, began)| {
                (*at - *began).num_milliseconds() < output["with"]["wait_ms"].as_i64().unwrap_or(0)
            });
            if early {
                wrong.push(format!("{step} was woken before its time"));
            }
        }
    }
    wrong
}
