//! What a workflow is: a name, a version, and its steps in order. What a step may answer.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Pool, Tx, error,
    metrics::StepMeters,
    output::Output,
    start::{ChildRun, children},
};

/// What a step answers.
pub type StepResult = Result<Outcome, StepError>;
/// A step: a named async function over its context.
pub type StepFn<S> = for<'a> fn(&'a mut StepContext<S>) -> BoxFuture<'a, StepResult>;

/// The step that runs when a run is cancelled; every definition has it, by default it ends the run at once.
pub const CANCEL_STEP: &str = "cancel";

/// The lane of a workflow that names none.
pub const DEFAULT_LANE: &str = "default";

/// One version of a workflow. Built once, at start; never changed once published.
pub struct Workflow<S> {
    /// Its name, the same in database, API and docs.
    pub name: &'static str,
    /// Its version; a change of its steps is a new version beside the old.
    pub version: i32,
    /// Whose slots its steps take; see [`Workflow::lane`].
    pub lane: &'static str,
    /// Its steps, in order.
    pub steps: Vec<Step<S>>,
    /// What runs instead of the next step once a cancel was asked for.
    pub cancel: Step<S>,
}

/// One step of a workflow.
pub struct Step<S> {
    /// Its name, unique in the workflow.
    pub name: &'static str,
    /// What it does.
    pub run: StepFn<S>,
    /// What happens when it fails.
    pub retry: Retry,
    /// How long one attempt may take; its end counts as a transient failure.
    pub timeout: Duration,
    /// True when an attempt that was cut off must not be repeated: the run then fails with `interrupted`.
    pub never_retry: bool,
    /// Found when it is first run.
    meters: OnceLock<&'static StepMeters>,
}

/// How often and how soon a failed step is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all, the first included.
    pub attempts: i32,
    /// The pause before the second attempt; doubled for each further one, up to [`Retry::CEILING`].
    pub base: Duration,
}

impl Retry {
    /// The longest pause between two attempts.
    pub const CEILING: Duration = Duration::from_secs(60);

    /// The pause after `attempt` attempts, before jitter.
    #[must_use]
    pub fn pause(self, attempt: i32) -> Duration {
        let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(0).min(16);
        self.base.saturating_mul(1 << doublings).min(Self::CEILING)
    }
}

/// `attempts` tries of transient failures, half a second apart at first.
#[must_use]
pub const fn transient(attempts: i32) -> Retry {
    Retry { attempts, base: Duration::from_millis(500) }
}

/// Begins a definition.
#[must_use]
pub fn workflow<S: Services>(name: &'static str, version: i32) -> Workflow<S> {
    Workflow {
        name,
        version,
        lane: DEFAULT_LANE,
        steps: Vec::new(),
        cancel: Step::new(CANCEL_STEP, |_| Box::pin(async { Ok(Outcome::Done(Value::Null)) })),
    }
}

impl<S> Step<S> {
    /// What counts its attempts, as a step of `workflow`.
    pub(crate) fn meters(&self, workflow: &'static str) -> &'static StepMeters {
        self.meters.get_or_init(|| StepMeters::of(workflow, self.name))
    }

    fn new(name: &'static str, run: StepFn<S>) -> Self {
        Self { name, run, retry: transient(5), timeout: Duration::from_secs(300), never_retry: false, meters: OnceLock::new() }
    }
}

impl<S> Workflow<S> {
    /// Adds a step. Whether it is a wait is decided by what it answers: [`Outcome::Wait`] brings it back when woken.
    #[must_use]
    pub fn step(mut self, name: &'static str, run: StepFn<S>) -> Self {
        self.steps.push(Step::new(name, run));
        self
    }

    /// Has its steps run in a lane with slots of its own, so that many long runs of one workflow do not keep the others waiting. A
    /// worker that has no slots in the lane leaves them to others.
    #[must_use]
    pub fn lane(mut self, lane: &'static str) -> Self {
        self.lane = lane;
        self
    }

    /// Sets the retry policy of the step added last.
    #[must_use]
    pub fn retry(self, retry: Retry) -> Self {
        self.last(|step| step.retry = retry)
    }

    /// Sets the time limit of one attempt of the step added last.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        self.last(|step| step.timeout = timeout)
    }

    /// Declares that the step added last must not be repeated once begun.
    #[must_use]
    pub fn never_retry(self) -> Self {
        self.last(|step| step.never_retry = true)
    }

    /// What runs instead of the next step once a cancel was asked for. It may wait for the far side's answer.
    #[must_use]
    pub fn on_cancel(mut self, run: StepFn<S>) -> Self {
        self.cancel = Step::new(CANCEL_STEP, run);
        self
    }

    fn last(mut self, change: impl FnOnce(&mut Step<S>)) -> Self {
        if let Some(step) = self.steps.last_mut() {
            change(step);
        }
        self
    }

    /// The step of that name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Step<S>> {
        if name == CANCEL_STEP { Some(&self.cancel) } else { self.steps.iter().find(|step| step.name == name) }
    }

    /// The step after the one of that name; none after the last.
    #[must_use]
    pub fn after(&self, name: &str) -> Option<&Step<S>> {
        let at = self.steps.iter().position(|step| step.name == name)?;
        self.steps.get(at + 1)
    }

    /// The name of the first step.
    #[must_use]
    pub fn first(&self) -> &'static str {
        self.steps.first().map_or(CANCEL_STEP, |step| step.name)
    }

    /// The name of its queue, for runs that may run anywhere.
    #[must_use]
    pub fn queue(&self) -> String {
        crate::queue(self.name, self.version, "")
    }

    /// One line that names everything a published version must keep: its steps in order.
    #[must_use]
    pub fn shape(&self) -> String {
        let steps: Vec<_> = self
            .steps
            .iter()
            .map(|step| if step.never_retry { format!("{}!", step.name) } else { step.name.to_owned() })
            .collect();
        format!("{}: {}", self.queue(), steps.join(" -> "))
    }
}

impl<S> Clone for Workflow<S> {
    fn clone(&self) -> Self {
        Self { name: self.name, version: self.version, lane: self.lane, steps: self.steps.clone(), cancel: self.cancel.clone() }
    }
}

impl<S> Clone for Step<S> {
    fn clone(&self) -> Self {
        let Self { name, run, retry, timeout, never_retry, ref meters } = *self;
        Self { name, run, retry, timeout, never_retry, meters: meters.clone() }
    }
}

impl<S> fmt::Debug for Step<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<S> fmt::Debug for Workflow<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shape())
    }
}

/// How a step ended well.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// On to the next step, which gets this value as its state; after the last step the run has succeeded with it.
    Next(Value),
    /// The run has succeeded with this value, whatever steps are left.
    Done(Value),
    /// The run has failed, for this reason and with this value, and what the step has written stays: the work went wrong, not the
    /// step. A retry runs the step again.
    Failed {
        /// Why, as `code: sentence`.
        error: String,
        /// What it ended with.
        output: Value,
    },
    /// Sleep without a worker until a signal, the children or an instant; then the same step runs again with this state.
    Wait(Wait),
}

impl Outcome {
    /// [`Outcome::Next`] from any serializable state.
    ///
    /// # Errors
    /// When the state cannot be written as JSON.
    pub fn next(state: &impl Serialize) -> StepResult {
        Ok(Self::Next(serde_json::to_value(state).map_err(StepError::bug)?))
    }

    /// [`Outcome::Done`] from any serializable output.
    ///
    /// # Errors
    /// When the output cannot be written as JSON.
    pub fn done(output: &impl Serialize) -> StepResult {
        Ok(Self::Done(serde_json::to_value(output).map_err(StepError::bug)?))
    }
}

/// Which ends of children end a wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Children {
    /// None: it waits for something else.
    #[default]
    None,
    /// That of any child, once for each look: one that ended since the run was last told of children counts.
    Any,
    /// That of the last open child.
    Last,
}

/// What a run sleeps for.
#[derive(Debug, Clone, Default)]
pub struct Wait {
    /// The signal that wakes it. A signal sent earlier and not yet used wakes it at once.
    pub signal: Option<String>,
    /// Which ends of children wake it.
    pub children: Children,
    /// How long it sleeps at most, by the database's clock.
    pub at_most: Option<Duration>,
    /// The state the step gets when it runs again.
    pub state: Value,
}

/// How a step ended badly. Any error becomes one with `?`; [`Services::judge`] says what it means for the run.
#[derive(Debug)]
pub enum StepError {
    /// Trying again may help.
    Transient(String),
    /// Trying again will not help: the run fails.
    Final(String),
    /// The step noticed that it was told to stop: see [`StepContext::cancelled`].
    Stopped,
    /// Something that a function the step has called answered.
    Other(Box<dyn std::error::Error + Send + Sync>),
}

/// What a bad end means for the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The step is tried again, as often as its [`Retry`] allows.
    Transient(String),
    /// The run fails with this text, as `code: sentence`.
    Final(String),
    /// The step was told to stop, and runs again elsewhere or is cancelled.
    Stopped,
}

impl StepError {
    /// A fault of the program: final, with its text.
    pub fn bug(error: impl fmt::Display) -> Self {
        Self::Final(format!("internal_error: {error}"))
    }

    pub(crate) fn judged<S: Services>(self, services: &S) -> Failure {
        match self {
            Self::Transient(text) => Failure::Transient(text),
            Self::Final(text) => Failure::Final(text),
            Self::Stopped => Failure::Stopped,
            Self::Other(error) => services.judge(error),
        }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for StepError {
    fn from(error: E) -> Self {
        Self::Other(Box::new(error))
    }
}

/// What a step may use besides its run: whatever the program needs, and the database.
pub trait Services: Send + Sync + 'static {
    /// The database of the runs.
    fn pool(&self) -> &Pool;

    /// What an error that a step has passed on means for its run. Unless the program says otherwise, trouble with the database is
    /// transient and everything else is final.
    fn judge(&self, error: Box<dyn std::error::Error + Send + Sync>) -> Failure {
        match error.downcast_ref::<sqlx::Error>() {
            Some(error) if error::is_transient(error) => Failure::Transient(format!("database_unavailable: {error}")),
            _ => Failure::Final(format!("internal_error: {error}")),
        }
    }
}

/// Why a waiting step runs again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wake {
    /// It runs for the first time.
    First,
    /// The signal came, with its payload.
    Signal(Value),
    /// A child ended, and others are open.
    Child,
    /// The last open child ended.
    Children,
    /// The instant passed.
    Deadline,
}

impl Wake {
    pub(crate) fn read(wake: Option<&Value>) -> Self {
        match wake.and_then(|wake| wake.get("by")).and_then(Value::as_str) {
            Some("signal") => Self::Signal(wake.and_then(|wake| wake.get("payload")).cloned().unwrap_or(Value::Null)),
            Some("child") => Self::Child,
            Some("children") => Self::Children,
            Some("deadline") => Self::Deadline,
            _ => Self::First,
        }
    }
}

/// What a step sees of its run.
pub struct StepContext<S> {
    /// The run.
    pub run_id: Uuid,
    /// The step's name.
    pub step: &'static str,
    /// The number of this step in the run, counted over all committed steps.
    pub seq: i32,
    /// 1 for the first try of this step.
    pub attempt: i32,
    /// Why it runs, for a step that waits.
    pub wake: Wake,
    /// What the run was started with.
    pub(crate) input: Value,
    /// What the step before answered, or this step itself before it waited.
    pub(crate) state: Value,
    /// Everything else a step may use.
    pub services: Arc<S>,
    /// Where it tells what happens.
    pub(crate) output: Output,
    /// Fires when the run is cancelled, the lease is lost or the worker stops.
    pub(crate) stop: CancellationToken,
    /// The transaction that will commit this step, once the step has asked for it.
    pub(crate) tx: Option<Tx<'static>>,
}

impl<S: Services> StepContext<S> {
    /// A key that is the same at every attempt of this step: to be handed to whatever outside is asked to do something once.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}:{}", self.run_id, self.seq)
    }

    /// What the run was started with.
    ///
    /// # Errors
    /// Final, when it is not a `T`.
    pub fn input<T: DeserializeOwned>(&self) -> Result<T, StepError> {
        T::deserialize(&self.input).map_err(StepError::bug)
    }

    /// What the step before answered.
    ///
    /// # Errors
    /// Final, when it is not a `T`.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T, StepError> {
        T::deserialize(&self.state).map_err(StepError::bug)
    }

    /// The database, for reading outside the committing transaction.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        self.services.pool()
    }

    /// The transaction that commits this step: what is written through it happens exactly once. It is opened at the first
    /// call; nothing remote may be awaited while it is open.
    ///
    /// # Errors
    /// Transient, when the database is away.
    pub async fn tx(&mut self) -> Result<&mut Tx<'static>, StepError> {
        if self.tx.is_none() {
            self.tx = Some(self.services.pool().begin().await?);
        }
        self.tx.as_mut().ok_or_else(|| StepError::bug("no transaction"))
    }

    /// A connection to look at what is committed, outside the transaction that commits the step.
    ///
    /// # Errors
    /// Transient, when the database is away.
    pub async fn look(&self) -> Result<sqlx::pool::PoolConnection<sqlx::Postgres>, StepError> {
        Ok(self.services.pool().acquire().await?)
    }

    /// Gives the transaction back unused, so that something remote may be awaited. What was written through it is undone.
    pub fn end_tx(&mut self) {
        self.tx = None;
    }

    /// Where the step tells what happens while it runs.
    #[must_use]
    pub fn output(&self) -> Output {
        self.output.clone()
    }

    /// The children of the run, in the order in which they were started.
    ///
    /// # Errors
    /// Transient, when the database is away.
    pub async fn children(&self) -> Result<Vec<ChildRun>, StepError> {
        Ok(children(self.services.pool(), self.run_id).await?)
    }

    /// Completes when the step is to stop: the run was cancelled, its lease is lost, or the worker goes down.
    /// A step that runs long selects on it and answers [`StepError::Stopped`].
    #[must_use]
    pub fn cancelled(&self) -> CancellationToken {
        self.stop.clone()
    }
}

impl<S> fmt::Debug for StepContext<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepContext")
            .field("run_id", &self.run_id)
            .field("step", &self.step)
            .field("attempt", &self.attempt)
            .finish()
    }
}

/// All workflows a process can run, by name and version.
pub struct Registry<S>(Vec<Arc<Workflow<S>>>);

impl<S> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> Default for Registry<S> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<S> fmt::Debug for Registry<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0).finish()
    }
}

impl<S> Registry<S> {
    /// A registry of these.
    #[must_use]
    pub fn new(workflows: impl IntoIterator<Item = Workflow<S>>) -> Self {
        Self(workflows.into_iter().map(Arc::new).collect())
    }

    /// The workflow of that name and version.
    #[must_use]
    pub fn find(&self, name: &str, version: i32) -> Option<&Arc<Workflow<S>>> {
        self.0.iter().find(|workflow| workflow.name == name && workflow.version == version)
    }

    /// The newest version of that name: what a new run is started with.
    #[must_use]
    pub fn newest(&self, name: &str) -> Option<&Arc<Workflow<S>>> {
        self.0.iter().filter(|workflow| workflow.name == name).max_by_key(|workflow| workflow.version)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workflow<S>>> {
        self.0.iter()
    }

    /// A drawing of all workflows in Graphviz' language.
    #[must_use]
    pub fn dot(&self) -> String {
        let mut dot = String::from("digraph workflows {\n  rankdir=LR; node [shape=box];\n");
        for workflow in self.iter() {
            let queue = workflow.queue();
            dot.push_str(&format!("  subgraph \"cluster_{queue}\" {{ label=\"{queue}\";\n"));
            for step in &workflow.steps {
                dot.push_str(&format!("    \"{queue}/{0}\" [label=\"{0}\"];\n", step.name));
            }
            for pair in workflow.steps.windows(2) {
                if let [from, to] = pair {
                    dot.push_str(&format!("    \"{queue}/{}\" -> \"{queue}/{}\";\n", from.name, to.name));
                }
            }
            dot.push_str("  }\n");
        }
        dot.push_str("}\n");
        dot
    }
}
