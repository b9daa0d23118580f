//! The workflow type of its own on apalis' `IntoWorkerService`, and the process around it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use apalis_core::{
    error::BoxDynError,
    task::Task,
    worker::{
        builder::WorkerBuilder,
        service::{IntoWorkerService, WorkerService},
    },
};
use apalis_postgres::PostgresStorage;
use borealis_tasks::Tasks;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_service::Service;

use crate::{
    Pool, Result, Tx,
    claim::{Claim, DurableBackend, Fetcher},
    commit::{Attempt, Commit, Committer, Written, write},
    connect::Connect,
    definition::{DEFAULT_LANE, Failure, Outcome, Registry, Services, Step, StepContext, StepError, Wake, Workflow},
    fault,
    gate::Gate,
    lease::Leases,
    metrics::{self, METERS},
    observer,
    output::Output,
    recovery,
    wakeup::Wakeup,
};

/// How long running steps may take to end after a stop was asked for, before they are told to stop too.
const DRAIN: Duration = Duration::from_secs(5);
/// How long they then have before the process goes without them; recovery takes their runs over.
const STOP: Duration = Duration::from_secs(3);

/// Connections for what keeps runs alive: renewals, commits, recovery. Notifications have one of their own.
const VITAL_CONNECTIONS: u32 = 5;
/// Connections for claims.
const CLAIM_CONNECTIONS: u32 = 2;

/// The place of runs that may run anywhere.
pub const ANYWHERE: &str = "";

/// How the runtime's own connections plan: its statements are written for one plan, by index from array to row, which
/// must not depend on when a table of runs was last analyzed.
pub const PLANS: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
];

/// Settings of a worker process.
#[derive(Debug, Clone)]
pub struct Options {
    /// A name no other process start has: host, pid and a random part.
    pub name: String,
    /// The most steps that run at the same time, for each lane.
    pub lanes: BTreeMap<&'static str, usize>,
    /// The places whose runs it takes; [`ANYWHERE`] alone unless it is to be a worker of certain places.
    pub places: Vec<String>,
    /// How often a queue is looked at when nothing is announced; [`super::POLL_EVERY`] but in tests.
    pub poll_every: Duration,
    /// Whether this process may act.
    pub gate: Gate,
    /// How it connects to the database for its own statements.
    pub connect: Connect,
    /// What the tasks of the process are seen with.
    pub tasks: Tasks,
}

impl Options {
    /// Eight steps at a time, connections to the database of `pool`, always allowed to act. `stop` ends the tasks of the process.
    #[must_use]
    pub fn new(name: impl Into<String>, pool: &Pool, stop: &CancellationToken) -> Self {
        Self {
            name: name.into(),
            lanes: BTreeMap::from([(DEFAULT_LANE, 8)]),
            places: vec![ANYWHERE.to_owned()],
            poll_every: crate::POLL_EVERY,
            gate: Gate::open(),
            connect: Connect::like(pool),
            tasks: Tasks::new(stop.clone()),
        }
    }
}

/// What all queues of a process share.
struct Process<S> {
    name: String,
    services: Arc<S>,
    committer: Committer,
    leases: Leases,
    claims: Claims,
    lanes: Arc<BTreeMap<&'static str, Arc<Semaphore>>>,
    wakeup: Wakeup,
    poll_every: Duration,
    gate: Gate,
    drain: CancellationToken,
    /// Keeps the fetchers going.
    fetching: Tasks,
    running: TaskTracker,
}

impl<S> Clone for Process<S> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            services: self.services.clone(),
            committer: self.committer.clone(),
            leases: self.leases.clone(),
            claims: self.claims.clone(),
            lanes: self.lanes.clone(),
            wakeup: self.wakeup.clone(),
            poll_every: self.poll_every,
            gate: self.gate.clone(),
            drain: self.drain.clone(),
            fetching: self.fetching.clone(),
            running: self.running.clone(),
        }
    }
}

/// Where claims are made.
#[derive(Debug, Clone)]
struct Claims {
    /// A claim that a crash of Postgres takes back is made again: the step runs twice, and only one outcome is written.
    unflushed: Pool,
    /// For workflows with a step that must not be repeated: it begins when its claim is on disk.
    durable: Pool,
}

impl Claims {
    fn of<S>(&self, workflow: &Workflow<S>) -> Pool {
        if workflow.steps.iter().any(|step| step.never_retry) { self.durable.clone() } else { self.unflushed.clone() }
    }
}

/// A workflow as apalis runs it: `WorkerBuilder::new(name).backend(storage).build(flow)`.
pub struct DurableFlow<S> {
    workflow: Arc<Workflow<S>>,
    process: Process<S>,
}

impl<S> fmt::Debug for DurableFlow<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DurableFlow({:?})", self.workflow)
    }
}

impl<S: Services> IntoWorkerService<PostgresStorage<Vec<u8>>, DurableService<S>> for DurableFlow<S> {
    type Task = Task<Claim>;
    type Backend = DurableBackend;

    fn into_service(self, storage: PostgresStorage<Vec<u8>>) -> WorkerService<DurableBackend, DurableService<S>> {
        let Process { name: worker, claims, lanes, wakeup, poll_every, gate, fetching, .. } = self.process.clone();
        let slots = lanes.get(self.workflow.lane).cloned().unwrap_or_else(|| Arc::new(Semaphore::new(0)));
        let queue = storage.config().queue.to_string();
        let pool = claims.of(&self.workflow);
        WorkerService {
            backend: DurableBackend::spawn(Fetcher { pool, queue, worker, slots, wakeup, poll_every, gate }, &fetching),
            service: DurableService { workflow: self.workflow, process: self.process },
        }
    }
}

/// Runs one claimed step and has its outcome committed.
pub struct DurableService<S> {
    workflow: Arc<Workflow<S>>,
    process: Process<S>,
}

impl<S> fmt::Debug for DurableService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DurableService({:?})", self.workflow)
    }
}

impl<S: Services> Service<Task<Claim>> for DurableService<S> {
    type Response = ();
    type Error = BoxDynError;
    type Future = BoxFuture<'static, Result<(), BoxDynError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxDynError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, task: Task<Claim>) -> Self::Future {
        let (workflow, process) = (self.workflow.clone(), self.process.clone());
        let running = process.running.clone();
        // A task of its own: steps run in parallel, and a panic is one failed step.
        let step = running.spawn(run_steps(workflow, process, task.args));
        Box::pin(async move { step.await.map_err(BoxDynError::from) })
    }
}

/// Runs the step a claim is for and those after it, for as long as the lease stays ours.
async fn run_steps<S: Services>(workflow: Arc<Workflow<S>>, process: Process<S>, mut claim: Claim) {
    let slot = claim.slot.take();
    let (run_id, token) = (claim.run_id, claim.token);
    let stop = CancellationToken::new();
    process.leases.hold(run_id, token, stop.clone());
    while let Some(next) = run_step(&workflow, &process, claim, stop.clone()).await {
        claim = next;
    }
    process.leases.release(run_id, token);
    drop(slot);
}

/// Runs one step, from the first fail point to the last. Answers the claim of the next one when the lease is still ours.
async fn run_step<S: Services>(
    workflow: &Arc<Workflow<S>>,
    process: &Process<S>,
    mut claim: Claim,
    stop: CancellationToken,
) -> Option<Claim> {
    let (run_id, attempt) = (claim.run_id, claim.attempt);
    let Some(step) = workflow.find(&claim.step) else {
        tracing::error!(%run_id, step = claim.step, workflow = workflow.name, "this version of the workflow has no such step");
        return None;
    };
    let (name, step_name, meters) = (workflow.name, step.name, step.meters(workflow.name));
    fault::point("before", name, step_name);
    let next = workflow.after(step_name).map(|next| next.name);
    let context = StepContext {
        run_id,
        step: step_name,
        seq: claim.seq,
        attempt,
        wake: Wake::read(claim.wake.take().as_ref()),
        // The last step may have it; the others leave it to those after them.
        input: if next.is_some() { claim.input.clone() } else { std::mem::take(&mut claim.input) },
        state: std::mem::take(&mut claim.state),
        services: process.services.clone(),
        output: Output::new(process.services.pool().clone(), run_id, claim.token, claim.seq, attempt),
        stop,
        tx: None,
    };
    let span = tracing::info_span!("step", %run_id, workflow = name, step = step_name, attempt);
    let traced = observer::step(run_id, name, step_name, attempt);
    let began = Instant::now();
    let ran = traced.around(tracing::Instrument::instrument(execute(step, context), span)).await;
    let (answer, tx) =
        ran.unwrap_or_else(|| (Err(Failure::Final("internal_error: the observer did not run the step".to_owned())), None));
    let answered = Instant::now();
    meters.seconds.observe((answered - began).as_secs_f64());
    fault::point("after_effect", name, step_name);
    let of = Attempt { run_id, token: claim.token, seq: claim.seq, attempt, is_child: claim.is_child };
    // What the next step will get, if it is ours.
    let state = match &answer {
        Ok(Outcome::Next(state)) if next.is_some() => state.clone(),
        _ => Value::Null,
    };
    let commit = Commit::decide(workflow, step, of.clone(), answer, rand::random(), !process.drain.is_cancelled());
    let (said, went_wrong) = commit.said();
    let written = match tx {
        Some(mut tx) => match write(&mut tx, &process.name, std::slice::from_ref(&commit)).await {
            Ok(written) if written != [Written::Lost] => {
                let written = written.first().copied().unwrap_or(Written::Lost);
                let committed = tx.commit().await.map(|()| written);
                if committed.is_ok() {
                    metrics::count(std::slice::from_ref(&commit), &[written]);
                }
                committed
            }
            Ok(_) => {
                metrics::count(std::slice::from_ref(&commit), &[Written::Lost]);
                Ok(Written::Lost)
            }
            Err(error) => Err(error),
        },
        None => Ok(process.committer.commit(commit).await),
    };
    fault::point("after_commit", name, step_name);
    let written = match written {
        Ok(written) => written,
        Err(error) => {
            // The step's own transaction did not commit, so nothing of it happened: it failed like any other attempt.
            let failure = process.services.judge(Box::new(error));
            let commit = Commit::decide(workflow, step, of, Err(failure), rand::random(), false);
            process.committer.commit(commit).await
        }
    };
    match written {
        Written::Lost => traced.committed("lost", true),
        _ => traced.committed(said, went_wrong),
    }
    match (written, next) {
        (Written::Kept, Some(next)) => {
            METERS.hand_over.observe(answered.elapsed().as_secs_f64());
            Some(Claim { step: next.to_owned(), seq: claim.seq + 1, attempt: 1, state, wake: None, ..claim })
        }
        (Written::Lost, _) => {
            tracing::warn!(%run_id, step = step_name, attempt, "outcome refused: the lease had been lost");
            None
        }
        _ => None,
    }
}

/// Runs the step's function under its time limit. Its transaction comes back only with a good answer.
pub(crate) async fn execute<S: Services>(
    step: &Step<S>,
    mut context: StepContext<S>,
) -> (Result<Outcome, Failure>, Option<Tx<'static>>) {
    let caught = tokio::time::timeout(
        step.timeout,
        futures::FutureExt::catch_unwind(std::panic::AssertUnwindSafe((step.run)(&mut context))),
    )
    .await;
    let answer = match caught {
        Ok(Ok(answer)) => answer,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
            Err(StepError::Final(format!("panic: {}", text.unwrap_or_default())))
        }
        Err(_) => Err(StepError::Transient(format!("timeout: the step took longer than {} s.", step.timeout.as_secs()))),
    };
    let answer = answer.map_err(|error| error.judged(&*context.services));
    let tx = context.tx.take().filter(|_| answer.is_ok());
    (answer, tx)
}

/// Runs the workflows of `registry` until `stop` fires, then drains. While Postgres is away it waits.
pub async fn run<S: Services>(registry: Registry<S>, services: impl Into<Arc<S>>, options: Options, stop: CancellationToken) {
    let services = services.into();
    let pool: Pool = services.pool().clone();
    let drain = stop.child_token();
    let after = CancellationToken::new();
    // What claims and looks ends when the process is asked to stop; what commits and renews, when its last step has ended.
    let (draining, lasting) = (options.tasks.part(drain.clone()), options.tasks.part(after.clone()));
    let queues: Vec<(Arc<Workflow<S>>, String)> = registry
        .iter()
        .filter(|workflow| options.lanes.get(workflow.lane).is_some_and(|slots| *slots > 0))
        .flat_map(|workflow| {
            options.places.iter().map(|place| (workflow.clone(), crate::queue(workflow.name, workflow.version, place)))
        })
        .collect();
    let names = queues.iter().map(|(_, queue)| queue.clone());
    // Connections of its own, so that steps that wait for one never keep a lease from being renewed.
    let vital = options.connect.pool("vital", VITAL_CONNECTIONS, &PLANS);
    let unflushed = [PLANS.as_slice(), &[("synchronous_commit", "off")]].concat();
    let claims = Claims { unflushed: options.connect.pool("claims", CLAIM_CONNECTIONS, &unflushed), durable: vital.clone() };
    let process = Process {
        committer: Committer::spawn(&vital, &options.name, &lasting),
        leases: Leases::default(),
        claims,
        lanes: Arc::new(options.lanes.iter().map(|(lane, slots)| (*lane, Arc::new(Semaphore::new(*slots)))).collect()),
        wakeup: Wakeup::spawn(options.connect.clone(), names, &[], &draining),
        poll_every: options.poll_every,
        gate: options.gate.clone(),
        drain: drain.clone(),
        fetching: draining.clone(),
        running: TaskTracker::new(),
        services,
        name: options.name,
    };
    lasting.keep("leases", {
        let (leases, vital, after) = (process.leases.clone(), vital.clone(), after.clone());
        move || leases.clone().keep(vital.clone(), after.clone())
    });
    draining.keep("recovery", {
        let (registry, gate, drain) = (registry.clone(), options.gate.clone(), drain.clone());
        move || recovery::keep(vital.clone(), registry.clone(), gate.clone(), drain.clone())
    });
    for (workflow, queue) in queues {
        let (process, pool) = (process.clone(), pool.clone());
        // It lives until the last step has ended: its steps run in tasks of their own, and its fetcher ends before.
        lasting.keep_until_stopped("queue", move || {
            let storage =
                PostgresStorage::<Vec<u8>>::new(&pool).with_config(apalis_postgres::Config::default().queue(queue.clone()));
            let flow = DurableFlow { workflow: workflow.clone(), process: process.clone() };
            let worker = WorkerBuilder::new(format!("{}/{queue}", process.name)).backend(storage).build(flow);
            async move {
                if let Err(error) = worker.run().await {
                    tracing::error!(%error, "a queue's worker has ended");
                }
            }
        });
    }
    stop.cancelled().await;
    process.running.close();
    if tokio::time::timeout(DRAIN, process.running.wait()).await.is_err() {
        process.leases.stop_all();
        if tokio::time::timeout(STOP, process.running.wait()).await.is_err() {
            tracing::warn!(count = process.running.len(), "steps still running at exit; another worker takes them over");
        }
    }
    after.cancel();
    draining.end_within(Duration::ZERO).await;
    lasting.end_within(Duration::ZERO).await;
}
