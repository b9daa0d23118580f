//! Generated workflows: what each step of a run does is said by the run's input, so that one definition carries them all.

use std::sync::{Arc, Mutex, PoisonError};

use borealis_workflows::{
    Child, Registry, StepContext, Workflow,
    durable::definition::{Children, Outcome, StepError, StepResult, Wait, Wake, transient, workflow},
    start_children,
};
use rand::{RngExt, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

/// The workflow of runs with one to five steps.
pub const SIM: &str = "sim";
/// The workflow whose second step must not be repeated.
pub const ONCE: &str = "sim_once";
/// That step.
pub const FRAGILE: &str = "s1";
/// The workflow of children.
pub const CHILD: &str = "sim_child";
/// How often a step is tried that fails for a while.
pub const ATTEMPTS: i32 = 3;
/// The names of the steps, the first of which a run begins with.
pub const STEPS: [&str; 5] = ["s0", "s1", "s2", "s3", "s4"];
/// The step a cancelled run goes to.
pub const CANCEL: &str = borealis_workflows::durable::definition::CANCEL_STEP;
/// The signal the cancel step of some runs waits for.
pub const UNDONE: &str = "undone";
/// How long it waits at most, in milliseconds.
const UNDONE_MS: u64 = 20_000;

/// What one step does.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// Nothing: the outcome is committed in a batch.
    Plain,
    /// Writes a row in the transaction that commits the step.
    Effect,
    /// Fails in its first tries.
    Moody(i32),
    /// Fails for good.
    Fails,
    /// Takes its worker with it.
    Deadly,
    /// Ends the run before its last step.
    Done,
    /// Waits for a signal, with an end to its patience or without; fails that often after it was woken.
    Signal(Option<u64>, i32),
    /// Sleeps for some milliseconds.
    Nap(u64),
    /// Starts children and waits for them.
    Children(u32),
}

/// What a run does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Its steps; those of the workflow that are not named here are not reached.
    pub acts: Vec<Act>,
    /// Whether a step that finds itself told to stop does so.
    pub heeds_stop: bool,
    /// Whether its cancel step waits for the far side's answer.
    pub slow_cancel: bool,
}

impl Plan {
    /// A plan of `steps` steps.
    pub fn random(rng: &mut StdRng, steps: usize) -> Self {
        let acts = (0..steps).map(|_| Act::random(rng)).collect();
        Self { acts, heeds_stop: rng.random_bool(0.7), slow_cancel: rng.random_bool(0.3) }
    }
}

impl Act {
    fn random(rng: &mut StdRng) -> Self {
        match rng.random_range(0..100) {
            0..2 => Self::Deadly,
            2..25 => Self::Plain,
            25..50 => Self::Effect,
            50..60 => Self::Moody(rng.random_range(1..=ATTEMPTS)),
            60..63 => Self::Fails,
            63..65 => Self::Done,
            65..82 => Self::Signal(
                rng.random_bool(0.3).then(|| rng.random_range(0..30_000)),
                if rng.random_bool(0.3) { rng.random_range(1..=ATTEMPTS) } else { 0 },
            ),
            82..88 => Self::Nap(rng.random_range(0..20_000)),
            _ => Self::Children(rng.random_range(0..4)),
        }
    }

    /// Whether a run may end as failed because of this step, whatever workers do.
    #[must_use]
    pub fn may_fail(&self) -> bool {
        matches!(self, Self::Fails | Self::Moody(_) | Self::Signal(_, 1..))
    }
}

/// The signal step `index` waits for.
#[must_use]
pub fn signal_name(index: usize) -> String {
    format!("go{index}")
}

/// All generated workflows, and the engine's own.
#[must_use]
pub fn registry() -> Registry {
    let own = borealis_workflows::registry();
    Registry::new([sim(), once(), child()].into_iter().chain(own.iter().map(|workflow| (**workflow).clone())))
}

/// The workflow [`SIM`].
#[must_use]
pub fn sim() -> Workflow {
    steps(workflow(SIM, 1), STEPS.len())
}

/// The workflow [`CHILD`].
#[must_use]
pub fn child() -> Workflow {
    steps(workflow(CHILD, 1), 2)
}

/// The workflow [`ONCE`].
#[must_use]
pub fn once() -> Workflow {
    workflow(ONCE, 1)
        .step("s0", |cx| Box::pin(step(cx)))
        .step(FRAGILE, |cx| Box::pin(step(cx)))
        .never_retry()
        .step("s2", |cx| Box::pin(step(cx)))
        .on_cancel(|cx| Box::pin(cancel(cx)))
}

fn steps(mut workflow: Workflow, count: usize) -> Workflow {
    for name in STEPS.into_iter().take(count) {
        workflow = workflow.step(name, |cx| Box::pin(step(cx))).retry(transient(ATTEMPTS));
    }
    workflow.on_cancel(|cx| Box::pin(cancel(cx)))
}

/// What steps tell the simulation: how often each ran, and what they found amiss.
#[derive(Debug, Clone, Default)]
pub struct Witness(Arc<Mutex<Testimony>>);

/// See [`Witness`].
#[derive(Debug, Default)]
pub struct Testimony {
    /// Runs of a step that got as far as doing something: run, number, step.
    pub runs: Vec<(Uuid, i32, &'static str)>,
    /// What should not be.
    pub complaints: Vec<String>,
    /// Whether the worker of the step that ran last is to die of it.
    pub deadly: bool,
}

tokio::task_local! {
    static WITNESS: Witness;
}

impl Witness {
    /// Runs something whose steps testify here.
    pub async fn hears<T>(&self, what: impl Future<Output = T>) -> T {
        WITNESS.scope(self.clone(), what).await
    }

    /// Looks at the testimony.
    pub fn with<T>(&self, look: impl FnOnce(&mut Testimony) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn testify(cx: &StepContext) {
    let ran = (cx.run_id, cx.seq, cx.step);
    let _ = WITNESS.try_with(|witness| witness.with(|testimony| testimony.runs.push(ran)));
}

fn complain(text: String) {
    let _ = WITNESS.try_with(|witness| witness.with(|testimony| testimony.complaints.push(text)));
}

/// What a step hands on: its own number, by which the next one knows that nothing lies between.
fn after(cx: &StepContext, more: Value) -> Value {
    json!({"after": cx.seq, "with": more})
}

fn follows(cx: &StepContext) {
    let before: i64 = cx.state::<Value>().ok().and_then(|state| state.get("after").and_then(Value::as_i64)).unwrap_or(-1);
    if before + 1 != i64::from(cx.seq) {
        complain(format!("step {} of run {} has number {} and the state of number {before}", cx.step, cx.run_id, cx.seq));
    }
}

async fn effect(cx: &mut StepContext) -> Result<(), StepError> {
    let (run_id, seq) = (cx.run_id, cx.seq);
    sqlx::query(
        "INSERT INTO public.sim_effects (run_id, seq) VALUES ($1, $2) ON CONFLICT (run_id, seq) DO UPDATE SET written = sim_effects.written + 1",
    )
    .bind(run_id)
    .bind(seq)
    .execute(&mut **cx.tx().await?)
    .await?;
    Ok(())
}

async fn step(cx: &mut StepContext) -> StepResult {
    let plan: Plan = cx.input()?;
    follows(cx);
    let index = STEPS.iter().position(|name| *name == cx.step).unwrap_or(0);
    if plan.heeds_stop && cx.cancelled().is_cancelled() {
        return Err(StepError::Stopped);
    }
    let Some(act) = plan.acts.get(index) else { return Ok(Outcome::Done(after(cx, Value::Null))) };
    testify(cx);
    match act {
        Act::Plain => Ok(Outcome::Next(after(cx, Value::Null))),
        Act::Effect => {
            effect(cx).await?;
            Ok(Outcome::Next(after(cx, json!("effect"))))
        }
        Act::Moody(tries) if cx.attempt <= *tries => Err(StepError::Transient(format!("moody in try {}", cx.attempt))),
        Act::Moody(_) => Ok(Outcome::Next(after(cx, Value::Null))),
        Act::Fails => Err(StepError::Final("planned".into())),
        Act::Deadly => {
            let _ = WITNESS.try_with(|witness| witness.with(|testimony| testimony.deadly = true));
            Err(StepError::Stopped)
        }
        Act::Done => Ok(Outcome::Done(after(cx, json!("done")))),
        Act::Signal(at_most, tries) => match cx.wake.clone() {
            Wake::First => Ok(Outcome::Wait(Wait {
                signal: Some(signal_name(index)),
                children: Children::None,
                at_most: at_most.map(std::time::Duration::from_millis),
                state: after(cx, json!({"wait_ms": at_most})),
            })),
            _ if cx.attempt <= *tries => Err(StepError::Transient(format!("moody after the wait in try {}", cx.attempt))),
            Wake::Signal(payload) => Ok(Outcome::Next(after(cx, json!({"signal": payload})))),
            Wake::Deadline if at_most.is_some() => Ok(Outcome::Next(after(cx, json!("deadline")))),
            other => Err(StepError::Final(format!("unplanned: woken by {other:?}"))),
        },
        Act::Nap(ms) => match cx.wake {
            Wake::First => Ok(Outcome::Wait(Wait {
                signal: None,
                children: Children::None,
                at_most: Some(std::time::Duration::from_millis(*ms)),
                state: after(cx, json!({"wait_ms": ms})),
            })),
            Wake::Deadline => Ok(Outcome::Next(after(cx, json!("deadline")))),
            ref other => Err(StepError::Final(format!("unplanned: woken by {other:?}"))),
        },
        Act::Children(count) => children(cx, *count).await,
    }
}

async fn children(cx: &mut StepContext, count: u32) -> StepResult {
    match cx.wake {
        Wake::First => {
            let run_id = cx.run_id;
            let plan = |n: u32| Plan {
                acts: vec![
                    if n.is_multiple_of(2) { Act::Effect } else { Act::Plain },
                    if n == 0 { Act::Fails } else { Act::Nap(u64::from(n) * 700) },
                ],
                heeds_stop: true,
                slow_cancel: false,
            };
            let children: Vec<_> = (0..count).map(|n| Child { key: n.to_string(), input: json!(plan(n)) }).collect();
            start_children(cx.tx().await?, run_id, &child(), &children).await?;
            Ok(Outcome::Wait(Wait {
                signal: None,
                children: if count.is_multiple_of(2) { Children::Any } else { Children::Last },
                at_most: None,
                state: after(cx, json!({"children": count})),
            }))
        }
        // One of several has ended: it waits for the next, as if nothing had been.
        Wake::Child => {
            let state = after(cx, json!({"children": count}));
            Ok(Outcome::Wait(Wait { children: Children::Any, state, ..Wait::default() }))
        }
        Wake::Children => {
            // A worker that has lost the run may come so late that it finds the children of a later step.
            let open: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM workflow_runs c JOIN workflow_runs p ON p.id = c.parent_id
                 WHERE p.id = $1 AND p.seq = $2 AND c.finished_at IS NULL
                 AND NOT EXISTS (SELECT FROM workflow_events e WHERE e.run_id = c.id AND e.kind = 'retry_requested')",
            )
            .bind(cx.run_id)
            .bind(cx.seq)
            .fetch_one(cx.pool())
            .await?;
            if open > 0 {
                complain(format!("run {} was woken by its children while {open} of them are open", cx.run_id));
            }
            Ok(Outcome::Next(after(cx, json!("children"))))
        }
        ref other => Err(StepError::Final(format!("unplanned: woken by {other:?}"))),
    }
}

/// The undo: a row that is written once, after an answer of the far side for some.
async fn cancel(cx: &mut StepContext) -> StepResult {
    let plan: Plan = cx.input()?;
    if plan.slow_cancel && cx.wake == Wake::First {
        let at_most = Some(std::time::Duration::from_millis(UNDONE_MS));
        return Ok(Outcome::Wait(Wait {
            signal: Some(UNDONE.into()),
            children: Children::None,
            at_most,
            state: after(cx, json!({"wait_ms": UNDONE_MS})),
        }));
    }
    effect(cx).await?;
    Ok(Outcome::Done(after(cx, json!("effect"))))
}
