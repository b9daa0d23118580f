//! The simulated world: workers, operators, schedulers and the faults between them, one operation after another.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use borealis_engine::{
    db::{Pool, Tx},
    hold::NO_EPOCH,
    jobs::cursor,
};
use borealis_workflows::{
    CancelAsked, NewRun, Registry, Services,
    durable::{
        RetryAsked,
        claim::{self, Claim},
        commit::Written,
        definition::Failure,
        error::is_transient,
        recovery,
        single::{self, Executed, Place},
    },
    housekeeping, request_cancel, retry, scheduler, signal, start,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    check,
    clock::{CONNECTIONS, Clock},
    plan::{self, Act, Plan, Witness},
};
use crate::probe::NoAgents;

/// The most claims a worker holds.
const HOLD_MAX: usize = 6;
/// The most transactions that stay open across operations.
const OPEN_MAX: usize = 4;
/// What Postgres ends a transaction after in which nothing happens, in milliseconds.
const IDLE_MS: i64 = 10_000;
/// The lease, in milliseconds.
const LEASE_MS: i64 = 10_000;
/// More jobs than there are.
const ALL_JOBS: i64 = 100;

/// A run as the simulation knows it.
#[derive(Debug, Clone)]
pub struct Run {
    /// Its id.
    pub id: Uuid,
    /// Its workflow.
    pub workflow: &'static str,
    /// Its plan.
    pub plan: Plan,
    /// Its start key.
    pub key: Option<String>,
    /// The payloads sent to it, by signal.
    pub sent: BTreeMap<String, Vec<i64>>,
    /// Whether a cancel was asked for, and whether a worker was at it then.
    pub cancel: Option<bool>,
    /// How often an operator had it tried again.
    pub retried: usize,
}

/// A job as the simulation knows it.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its id.
    pub id: i64,
    /// Its first instant, epoch seconds.
    pub start: i64,
    /// The seconds between two instants.
    pub step: i64,
    /// How many instants it may use.
    pub max: Option<i64>,
}

#[derive(Debug)]
struct Worker {
    name: String,
    scheduler: Uuid,
    held: Vec<Held>,
    frozen_until: i64,
}

#[derive(Debug)]
struct Held {
    run: Uuid,
    token: Uuid,
    renewed: i64,
    stop: CancellationToken,
    workflow: String,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Claimed(Claim),
    /// Waits for the committer.
    Executed(Executed<Services>),
    /// Wrote rows of its own; since when its transaction is open, and what became of the outcome once it is written in it.
    Own(Executed<Services>, i64, Option<Written>),
    /// Is being written.
    Leaving,
}

/// An operator's transaction that is still open.
#[derive(Debug)]
struct Ask {
    tx: Tx<'static>,
    since: i64,
    what: Asked,
}

#[derive(Debug)]
enum Asked {
    Start(Run),
    Signal(Uuid, String, i64),
    Cancel(Uuid, bool),
    Retry(Uuid),
}

/// The world of one seed.
#[derive(Debug)]
pub struct World {
    pub(super) clock: Clock,
    pub(super) pool: Pool,
    pub(super) registry: Registry,
    pub(super) services: Arc<Services>,
    pub(super) witness: Witness,
    pub(super) runs: Vec<Run>,
    pub(super) jobs: Vec<Job>,
    pub(super) wrong: Vec<String>,
    pub(super) trace: Vec<String>,
    /// When the schedules were stopped, epoch seconds.
    pub(super) schedules_rest_at: i64,
    rng: StdRng,
    workers: Vec<Worker>,
    workers_made: u32,
    asks: Vec<Ask>,
    labels: HashMap<Uuid, String>,
    payloads: i64,
    hints_lost: bool,
    hints_doubled: bool,
    unsettled: bool,
    aloud: bool,
}

impl World {
    /// An empty world.
    #[must_use]
    pub fn new(clock: Clock, pool: Pool, seed: u64, aloud: bool) -> Self {
        Self {
            services: Arc::new(Services { pool: pool.clone(), agents: Arc::new(NoAgents) }),
            registry: plan::registry(),
            rng: StdRng::seed_from_u64(seed),
            witness: Witness::default(),
            clock,
            pool,
            runs: Vec::new(),
            jobs: Vec::new(),
            wrong: Vec::new(),
            trace: Vec::new(),
            schedules_rest_at: 0,
            workers: Vec::new(),
            workers_made: 0,
            asks: Vec::new(),
            labels: HashMap::new(),
            payloads: 0,
            hints_lost: false,
            hints_doubled: false,
            unsettled: false,
            aloud,
        }
    }

    fn tell(&mut self, text: String) {
        let at = self.clock.now() - super::clock::BEGIN_MS;
        let line = format!("{:>5} {:>9.3} s  {text}", self.trace.len(), at as f64 / 1000.0);
        if self.aloud {
            println!("{line}");
        }
        self.trace.push(line);
    }

    pub(super) fn label(&self, run: Uuid) -> String {
        self.labels.get(&run).cloned().unwrap_or_else(|| run.to_string())
    }

    /// Takes an answer of the engine: an outage is a fault like others, anything else is wrong.
    async fn answer<T>(&mut self, what: &str, answer: Result<T, impl Into<borealis_engine::Error>>) -> Option<T> {
        match answer.map_err(Into::into) {
            Ok(value) => Some(value),
            Err(error) => {
                self.unsettled = true;
                if !error.is_transient() {
                    self.wrong.push(format!("{what}: refused: {error:?}"));
                }
                self.tell(format!(
                    "{what}: {} ({})",
                    error.code,
                    error.source.map(|source| source.to_string()).unwrap_or_default()
                ));
                None
            }
        }
    }

    fn open_transactions(&self) -> usize {
        let own = self.workers.iter().flat_map(|worker| &worker.held).filter(|held| matches!(held.stage, Stage::Own(..))).count();
        own + self.asks.len()
    }

    /// Waits until the connections of failed operations are back, so that their locks are gone.
    async fn settle(&mut self) {
        if !std::mem::take(&mut self.unsettled) {
            return;
        }
        for _ in 0..1_000 {
            let away = usize::try_from(self.pool.size()).unwrap_or(0) - self.pool.num_idle();
            if away <= self.open_transactions() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_micros(200)).await;
        }
    }

    /// Sets the stage: bounds, jobs, workers.
    pub async fn open(&mut self) {
        sqlx::query("INSERT INTO workflow_limits (key, bound) VALUES ('one', 1), ('two', 2)")
            .execute(&self.pool)
            .await
            .expect("bounds");
        for _ in 0..self.rng.random_range(0..3) {
            self.add_job().await;
        }
        for _ in 0..self.rng.random_range(2..=4) {
            let worker = self.new_worker();
            self.workers.push(worker);
        }
    }

    async fn add_job(&mut self) {
        let (kind, step) =
            [("every_5_minutes", 300), ("every_15_minutes", 900), ("every_hour", 3600)][self.rng.random_range(0..3)];
        let misfire = ["skip", "run_once", "run_all"][self.rng.random_range(0..3)];
        let overlap = ["skip", "queue", "allow"][self.rng.random_range(0..3)];
        let max = self.rng.random_bool(0.3).then(|| self.rng.random_range(1..20_i64));
        let start = self.clock.now() / 1000 + 60 * self.rng.random_range(0..10);
        let id = sqlx::query_scalar(
            "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at, misfire_policy, overlap_policy, max_occurrences, next_due_at)
             VALUES ('job', '[]', '[]', $1, to_timestamp($2), $3, $4, $5, to_timestamp($2)) RETURNING id",
        )
        .bind(kind)
        .bind(start as f64)
        .bind(misfire)
        .bind(overlap)
        .bind(max)
        .fetch_one(&self.pool)
        .await
        .expect("a job");
        self.tell(format!("job {id}: {kind}, misfire {misfire}, overlap {overlap}, at most {max:?}"));
        self.jobs.push(Job { id, start, step, max });
    }

    fn new_worker(&mut self) -> Worker {
        self.workers_made += 1;
        let name = format!("w{}", self.workers_made);
        let scheduler = Uuid::from_u128(u128::from(self.workers_made));
        Worker { name, scheduler, held: Vec::new(), frozen_until: 0 }
    }

    /// One operation, or one fault.
    pub async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..10 => self.start_run().await,
            10..28 => self.claim_some().await,
            28..46 => self.execute_one().await,
            46..62 => self.commit_some().await,
            62..67 => self.renew_one().await,
            67..73 => self.recover().await,
            73..80 => self.pass_time().await,
            80..86 => self.send_signal().await,
            86..88 => self.cancel_one().await,
            88..91 => {
                self.retry_one().await;
            }
            91..93 => self.finish_ask().await,
            93..94 => self.schedule().await,
            94..95 => self.keep_house().await,
            95..96 => self.kill().await,
            96..98 => self.freeze(),
            98..99 => self.tamper_with_hints().await,
            _ if self.rng.random_bool(0.3) => self.restart_postgres().await,
            _ => self.schedule_twice().await,
        }
        self.settle().await;
        self.hear();
    }

    fn hear(&mut self) {
        let complaints = self.witness.with(|testimony| std::mem::take(&mut testimony.complaints));
        self.wrong.extend(complaints);
    }

    /// Looks at every rule that must hold between two transactions.
    pub async fn inspect(&mut self) {
        let broken = check::now(&self.pool, self.hints_lost, self.hints_doubled).await;
        let broken: Vec<String> = broken.into_iter().map(|rule| self.named(&rule)).collect();
        self.wrong.extend(broken);
    }

    /// A text with the names of runs instead of their ids.
    pub(super) fn named(&self, text: &str) -> String {
        self.labels.iter().fold(text.to_owned(), |text, (id, label)| text.replace(&id.to_string(), label))
    }

    async fn start_run(&mut self) {
        let workflow = if self.rng.random_bool(0.15) { plan::once() } else { plan::sim() };
        let steps = self.rng.random_range(1..=workflow.steps.len());
        let plan = Plan::random(&mut self.rng, steps);
        let key = self.rng.random_bool(0.4).then(|| format!("key{}", self.rng.random_range(0..12)));
        let limit_keys = match self.rng.random_range(0..10) {
            0 => vec!["one".to_owned()],
            1 => vec!["two".to_owned()],
            2 => vec!["one".to_owned(), "two".to_owned(), "boundless".to_owned()],
            _ => Vec::new(),
        };
        let new = NewRun {
            key: key.clone(),
            input: json!(plan),
            priority: self.rng.random_range(0..1_000_000),
            limit_keys,
            ..NewRun::default()
        };
        let Ok(mut tx) = self.pool.begin().await else { return };
        let started = start(&mut tx, &workflow, new).await;
        let Some(started) = self.answer("start", started).await else {
            let _ = tx.rollback().await;
            return;
        };
        let known =
            self.runs.iter().find(|run| key.is_some() && run.key == key && run.workflow == workflow.name).map(|run| run.id);
        if (known.is_some() == started.created) || known.is_some_and(|known| known != started.run_id) {
            self.wrong.push(format!("start with key {key:?} answered {started:?}, known was {known:?}"));
        }
        if !started.created {
            self.tell(format!("start {key:?} once more: {}", self.label(started.run_id)));
            let _ = tx.rollback().await;
            return;
        }
        let label = format!("r{}", self.labels.len());
        self.labels.insert(started.run_id, label.clone());
        let run = Run { id: started.run_id, workflow: workflow.name, plan, key, sent: BTreeMap::new(), cancel: None, retried: 0 };
        self.tell(format!("start {label}, {} {:?} {:?}", run.workflow, run.key, run.plan.acts));
        self.ask(tx, Asked::Start(run)).await;
    }

    /// Commits an operator's transaction, gives it up, or leaves it open for a while.
    async fn ask(&mut self, tx: Tx<'static>, what: Asked) {
        let ask = Ask { tx, since: self.clock.now(), what };
        match self.rng.random_range(0..10) {
            0 => self.give_up(ask).await,
            1..3 if self.open_transactions() < OPEN_MAX => {
                self.tell("... and stays open".into());
                self.asks.push(ask);
            }
            _ => self.granted(ask).await,
        }
    }

    async fn give_up(&mut self, ask: Ask) {
        self.tell("... and is rolled back".into());
        ask.tx.rollback().await.expect("a rollback");
    }

    async fn granted(&mut self, ask: Ask) {
        ask.tx.commit().await.expect("a commit");
        match ask.what {
            Asked::Start(run) => self.runs.push(run),
            Asked::Signal(id, name, payload) => {
                self.change(id, |run| run.sent.entry(name).or_default().push(payload));
            }
            Asked::Cancel(id, leased) => self.change(id, |run| run.cancel = Some(leased)),
            Asked::Retry(id) => self.change(id, |run| run.retried += 1),
        }
    }

    fn change(&mut self, id: Uuid, change: impl FnOnce(&mut Run)) {
        if let Some(run) = self.runs.iter_mut().find(|run| run.id == id) {
            change(run);
        }
    }

    async fn finish_ask(&mut self) {
        if self.asks.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.asks.len());
        let ask = self.asks.remove(at);
        self.tell("an open request goes on".into());
        if self.rng.random_bool(0.3) { self.give_up(ask).await } else { self.granted(ask).await }
    }

    fn awake(&mut self) -> Option<usize> {
        let now = self.clock.now();
        let awake: Vec<usize> = (0..self.workers.len()).filter(|at| self.workers[*at].frozen_until <= now).collect();
        if awake.is_empty() { None } else { Some(awake[self.rng.random_range(0..awake.len())]) }
    }

    fn queues(&self) -> Vec<(String, i32)> {
        self.registry.iter().map(|workflow| (workflow.name.to_owned(), workflow.version)).collect()
    }

    async fn claim_some(&mut self) {
        let Some(at) = self.awake() else { return };
        let queues = self.queues();
        let (workflow, version) = queues[self.rng.random_range(0..queues.len() + 2).min(queues.len() - 1)].clone();
        // The generated workflow with the most runs comes first in the registry.
        let (workflow, version) = if self.rng.random_bool(0.5) { queues[0].clone() } else { (workflow, version) };
        let limit = self.rng.random_range(1..=4_usize).min(HOLD_MAX.saturating_sub(self.workers[at].held.len()));
        if limit > 0 {
            let lost = self.rng.random_bool(0.03);
            self.claim(at, &workflow, version, limit, lost).await;
        }
    }

    async fn claim(&mut self, at: usize, workflow: &str, version: i32, limit: usize, lost: bool) -> usize {
        let queue = borealis_workflows::durable::queue(workflow, version, "");
        let name = self.workers[at].name.clone();
        let claimed = claim::claim(&self.pool, &queue, &name, limit).await;
        let Some(mut claims) = self.answer(&format!("{name} claims {queue}"), claimed).await else { return 0 };
        if claims.len() > limit {
            self.wrong.push(format!("{} claims of {limit}", claims.len()));
        }
        self.learn_labels(&claims).await;
        claims.sort_by_key(|claim| self.label(claim.lease().0));
        let labels: Vec<String> = claims.iter().map(|claim| self.label(claim.lease().0)).collect();
        if labels.is_empty() {
            return 0;
        }
        let fate = if lost { ", but the answer is lost" } else { "" };
        self.tell(format!("{name} claims {}{fate}", labels.join(" ")));
        let count = claims.len();
        if !lost {
            let now = self.clock.now();
            self.workers[at].held.extend(claims.into_iter().map(|claim| {
                let (run, token) = claim.lease();
                let stop = CancellationToken::new();
                Held { run, token, renewed: now, stop, workflow: workflow.to_owned(), stage: Stage::Claimed(claim) }
            }));
        }
        count
    }

    /// Names runs the simulation has not started itself: children by their parent, scheduled runs by their occurrence.
    async fn learn_labels(&mut self, claims: &[Claim]) {
        let unknown: Vec<Uuid> = claims.iter().map(|claim| claim.lease().0).filter(|id| !self.labels.contains_key(id)).collect();
        if unknown.is_empty() {
            return;
        }
        let rows: Vec<(Uuid, Option<Uuid>, Option<String>)> =
            sqlx::query_as("SELECT id, parent_id, start_key FROM workflow_runs WHERE id = ANY ($1)")
                .bind(&unknown)
                .fetch_all(&self.pool)
                .await
                .expect("runs");
        for (id, parent, key) in rows {
            let key = key.unwrap_or_default();
            let label = match parent {
                Some(parent) => format!("{}/{}", self.label(parent), key.rsplit('/').next().unwrap_or_default()),
                None => format!("occurrence{key}"),
            };
            self.labels.insert(id, label);
        }
    }

    fn pick_held(&mut self, at: usize, wanted: impl Fn(&Stage) -> bool) -> Option<usize> {
        let fitting: Vec<usize> =
            self.workers[at].held.iter().enumerate().filter(|(_, held)| wanted(&held.stage)).map(|(index, _)| index).collect();
        if fitting.is_empty() { None } else { Some(fitting[self.rng.random_range(0..fitting.len())]) }
    }

    async fn execute_one(&mut self) {
        let Some(at) = self.awake() else { return };
        if let Some(index) = self.pick_held(at, |stage| matches!(stage, Stage::Claimed(_))) {
            self.execute(at, index).await;
        }
    }

    async fn execute(&mut self, at: usize, index: usize) {
        if self.open_transactions() >= OPEN_MAX.min(CONNECTIONS as usize - 2) {
            return self.finish_ask().await;
        }
        let jitter = self.rng.random_range(0.0..1.0);
        let Held { run, token, renewed, stop, workflow, stage } = self.workers[at].held.remove(index);
        let Stage::Claimed(claim) = stage else { return };
        let version = 1;
        let goes_on = self.rng.random_bool(0.8);
        let place = Place { workflow: &workflow, version, stop: stop.clone(), jitter, goes_on };
        let witness = self.witness.clone();
        let executed = witness.hears(claim.execute(&self.registry, self.services.clone(), place)).await;
        let Some(executed) = executed else {
            self.wrong.push(format!("{}: no such step", self.label(run)));
            return;
        };
        // A step that failed gave its transaction back.
        self.unsettled = true;
        if self.witness.with(|testimony| std::mem::take(&mut testimony.deadly)) {
            self.tell(format!("{} runs {} {executed}", self.workers[at].name, self.label(run)));
            return self.die(at).await;
        }
        let own = if executed.tx.is_some() { ", in a transaction of its own" } else { "" };
        self.tell(format!("{} runs {} {}{own}", self.workers[at].name, self.label(run), executed));
        let stage = if executed.tx.is_some() { Stage::Own(executed, self.clock.now(), None) } else { Stage::Executed(executed) };
        self.workers[at].held.push(Held { run, token, renewed, stop, workflow, stage });
    }

    async fn commit_some(&mut self) {
        let Some(at) = self.awake() else { return };
        let own = self.pick_held(at, |stage| matches!(stage, Stage::Own(..)));
        if let Some(index) = own.filter(|_| self.rng.random_bool(0.5)) {
            let fault = self.rng.random_range(0..20);
            return self.commit_own(at, index, fault).await;
        }
        let fault = self.rng.random_range(0..20);
        self.commit_batch(at, fault).await;
    }

    /// Commits what waits at a worker, as one batch. `fault` 0: nothing arrives; 1: the answer is lost, and it is tried again.
    async fn commit_batch(&mut self, at: usize, fault: u32) {
        let (mut batch, mut rest) = (Vec::new(), Vec::new());
        for held in std::mem::take(&mut self.workers[at].held) {
            match held.stage {
                Stage::Executed(_) if self.rng.random_bool(0.8) => batch.push(held),
                _ => rest.push(held),
            }
        }
        self.workers[at].held = rest;
        if batch.is_empty() {
            return;
        }
        let name = self.workers[at].name.clone();
        let labels: Vec<String> = batch.iter().map(|held| self.label(held.run)).collect();
        let what = format!("{name} commits {}", labels.join(" "));
        let executed = outcomes(&batch);
        let written = if fault == 0 {
            self.write_in_vain(&name, &executed).await
        } else {
            single::commit_batch(&self.pool, &name, &executed).await
        };
        let Some(written) = self.answer(&what, written).await else {
            self.workers[at].held.extend(batch);
            return;
        };
        if fault == 0 {
            self.tell(format!("{what}: does not arrive"));
            self.workers[at].held.extend(batch);
            return;
        }
        self.tell(format!("{what}: {written:?}"));
        if fault == 1 {
            let again = single::commit_batch(&self.pool, &name, &outcomes(&batch)).await;
            if let Some(again) = self.answer("the same batch again", again).await {
                let wrong = again.iter().zip(&written).any(|(again, first)| match first {
                    Written::Kept => *again != Written::Kept,
                    _ => *again != Written::Lost,
                });
                if wrong {
                    self.wrong.push(format!("{what}: {written:?}, and repeated: {again:?}"));
                }
            }
        }
        for (held, written) in batch.into_iter().zip(written) {
            self.settled(at, held, written);
        }
    }

    /// A batch whose connection is lost before the commit.
    async fn write_in_vain(&self, worker: &str, executed: &[&Executed<Services>]) -> Result<Vec<Written>, sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let written = single::write_batch(&mut tx, worker, executed).await;
        tx.rollback().await?;
        written
    }

    /// What a worker does with a claim whose outcome is written: goes on, lets go, or learns that it was not its own any more.
    fn settled(&mut self, at: usize, held: Held, written: Written) {
        let Held { run, token, renewed, stop, workflow, stage } = held;
        match (written, stage) {
            (Written::Kept, Stage::Executed(executed) | Stage::Own(executed, ..)) => match executed.next() {
                Some(next) => {
                    self.workers[at].held.push(Held { run, token, renewed, stop, workflow, stage: Stage::Claimed(next) });
                }
                None => self.wrong.push(format!("{}: a lease was kept for no step", self.label(run))),
            },
            (Written::Lost, _) => self.refused(run, renewed),
            _ => {}
        }
    }

    /// Commits a step's own transaction. `fault` 0: the commit fails; 1: the answer is lost; 2: it stays open once more.
    async fn commit_own(&mut self, at: usize, index: usize, fault: u32) {
        let name = self.workers[at].name.clone();
        let mut held = self.workers[at].held.remove(index);
        let Stage::Own(mut executed, since, mut written) = std::mem::replace(&mut held.stage, Stage::Leaving) else { return };
        let what = format!("{name} commits {} itself", self.label(held.run));
        let gone = executed.tx.is_none();
        if !gone && written.is_none() {
            let wrote = executed.write_own(&name).await;
            match wrote {
                Ok(wrote) => written = Some(wrote),
                Err(error) => {
                    if !is_transient(&error) {
                        self.wrong.push(format!("{what}: {error:?}"));
                    }
                    return self.undo(at, held, executed, &what).await;
                }
            }
        }
        if !gone && written == Some(Written::Lost) {
            self.tell(format!("{what}: refused"));
            executed.tx.take().expect("a transaction").rollback().await.expect("a rollback");
            return self.refused(held.run, held.renewed);
        }
        match (gone, fault) {
            (true, _) | (_, 0) => self.undo(at, held, executed, &what).await,
            (_, 1) => {
                executed.tx.take().expect("a transaction").commit().await.expect("a commit");
                self.tell(format!("{what}, but the answer is lost"));
                executed.undone(Failure::Transient("the answer of the commit was lost".into()));
                let again = single::commit_batch(&self.pool, &name, &[&executed]).await;
                if self.answer("its failure", again).await.is_some_and(|again| again != [Written::Lost]) {
                    self.wrong.push(format!("{what}: a committed step failed afterwards"));
                }
            }
            (_, 2..5) => {
                self.tell(format!("{what}: written, and stays open"));
                held.stage = Stage::Own(executed, since, written);
                self.workers[at].held.push(held);
            }
            _ => {
                executed.tx.take().expect("a transaction").commit().await.expect("a commit");
                self.tell(format!("{what}: {written:?}"));
                held.stage = Stage::Executed(executed);
                self.settled(at, held, written.unwrap_or(Written::Lost));
            }
        }
    }

    /// A step whose own transaction did not commit has failed like any other attempt.
    async fn undo(&mut self, at: usize, mut held: Held, mut executed: Executed<Services>, what: &str) {
        self.tell(format!("{what}: fails"));
        if let Some(tx) = executed.tx.take() {
            tx.rollback().await.expect("a rollback");
        }
        executed.undone(Failure::Transient("database_unavailable: the commit failed".into()));
        held.stage = Stage::Executed(executed);
        self.workers[at].held.push(held);
    }

    /// An outcome was refused: right only if the lease was over.
    fn refused(&mut self, run: Uuid, renewed: i64) {
        let age = self.clock.now() - renewed;
        if age <= LEASE_MS {
            self.wrong.push(format!("{}: refused {age} ms after its lease was renewed", self.label(run)));
        }
    }

    async fn renew_one(&mut self) {
        if let Some(at) = self.awake() {
            self.renew(at).await;
        }
    }

    async fn renew(&mut self, at: usize) {
        let leases: Vec<(Uuid, Uuid)> = self.workers[at].held.iter().map(|held| (held.run, held.token)).collect();
        if leases.is_empty() {
            return;
        }
        let name = self.workers[at].name.clone();
        let renewed = single::renew(&self.pool, &leases).await;
        let Some(renewed) = self.answer(&format!("{name} renews"), renewed).await else { return };
        let now = self.clock.now();
        let mut lost = Vec::new();
        for held in &mut self.workers[at].held {
            match renewed.iter().find(|renewed| (renewed.run_id, renewed.token) == (held.run, held.token)) {
                Some(renewed) => {
                    held.renewed = now;
                    if renewed.cancelled {
                        held.stop.cancel();
                    }
                }
                None => {
                    held.stop.cancel();
                    if now - held.renewed <= LEASE_MS {
                        lost.push(held.run);
                    }
                }
            }
        }
        for run in lost {
            self.wrong.push(format!("{} was taken from {name} before its lease was over", self.label(run)));
        }
        self.tell(format!("{name} renews {} of {}", renewed.len(), leases.len()));
    }

    async fn recover(&mut self) {
        match self.rng.random_range(0..5) {
            0..3 => self.take_back().await,
            3 => self.wake().await,
            _ => self.find_lost_hints().await,
        };
    }

    async fn take_back(&mut self) -> usize {
        let taken = recovery::expired_leases(&self.pool, &self.registry).await;
        let count = self.answer("expired leases", taken).await.unwrap_or(0);
        if count > 0 {
            self.tell(format!("{count} leases are taken back"));
        }
        count
    }

    async fn wake(&mut self) -> usize {
        let woken = recovery::ended_waits(&self.pool).await;
        let count = self.answer("ended waits", woken).await.unwrap_or(0);
        if count > 0 {
            self.tell(format!("{count} waits are over"));
        }
        count
    }

    async fn find_lost_hints(&mut self) -> usize {
        let found = recovery::lost_hints(&self.pool).await;
        let count = self.answer("lost hints", found).await.unwrap_or(0);
        if count > 0 {
            self.tell(format!("{count} hints are written again"));
            if !self.hints_lost {
                self.wrong.push(format!("{count} runs were ready without a hint, and nobody had taken one away"));
            }
        }
        count
    }

    async fn pass_time(&mut self) {
        let milliseconds = match self.rng.random_range(0..20) {
            0..9 => self.rng.random_range(1..1_500),
            9..15 => self.rng.random_range(1_000..5_000),
            15..19 => self.rng.random_range(5_000..30_000),
            _ => self.rng.random_range(60_000..3_600_000),
        };
        self.tell(format!("{:.3} s pass", milliseconds as f64 / 1000.0));
        self.advance(milliseconds).await;
    }

    /// Lets time pass; Postgres ends the transactions nothing has happened in for too long.
    async fn advance(&mut self, milliseconds: i64) {
        self.clock.advance(milliseconds);
        let before = self.clock.now() - IDLE_MS;
        self.cut_transactions(|since| since < before).await;
    }

    async fn cut_transactions(&mut self, cut: impl Fn(i64) -> bool) {
        let mut ended = Vec::new();
        for held in self.workers.iter_mut().flat_map(|worker| &mut worker.held) {
            if let Stage::Own(executed, since, _) = &mut held.stage
                && cut(*since)
            {
                ended.extend(executed.tx.take());
            }
        }
        let (gone, kept): (Vec<Ask>, Vec<Ask>) = std::mem::take(&mut self.asks).into_iter().partition(|ask| cut(ask.since));
        self.asks = kept;
        ended.extend(gone.into_iter().map(|ask| ask.tx));
        for tx in ended {
            self.tell("an open transaction is cut off".into());
            tx.rollback().await.expect("a rollback");
        }
    }

    async fn restart_postgres(&mut self) {
        self.tell("Postgres is started anew".into());
        self.cut_transactions(|_| true).await;
        let gone_at = self.clock.now();
        let away = self.rng.random_range(0..15_000);
        self.clock.advance(away);
        self.clock.restart_postgres();
        // Nobody could renew meanwhile: a lease that was good then is good for its whole length again.
        for held in self.workers.iter_mut().flat_map(|worker| &mut worker.held) {
            if gone_at - held.renewed <= LEASE_MS {
                held.renewed = self.clock.now();
            }
        }
    }

    fn pick_run(&mut self) -> Option<Run> {
        if self.runs.is_empty() { None } else { Some(self.runs[self.rng.random_range(0..self.runs.len())].clone()) }
    }

    async fn send_signal(&mut self) {
        let Some(run) = self.pick_run() else { return };
        let waits: Vec<usize> = (0..run.plan.acts.len()).filter(|at| matches!(run.plan.acts[*at], Act::Signal(..))).collect();
        let name = match waits.as_slice() {
            waits if !waits.is_empty() && self.rng.random_bool(0.85) => {
                plan::signal_name(waits[self.rng.random_range(0..waits.len())])
            }
            _ if self.rng.random_bool(0.7) => plan::UNDONE.to_owned(),
            _ => "unheard".to_owned(),
        };
        self.signal(run.id, &name, true).await;
    }

    async fn signal(&mut self, run: Uuid, name: &str, trouble: bool) {
        self.payloads += 1;
        let payload = self.payloads;
        let Ok(mut tx) = self.pool.begin().await else { return };
        let sent = signal(&mut tx, run, name, &json!(payload)).await;
        let what = format!("signal {name} = {payload} to {}", self.label(run));
        match self.answer(&what, sent).await {
            Some(true) => {
                self.tell(what);
                let asked = Asked::Signal(run, name.to_owned(), payload);
                if trouble {
                    self.ask(tx, asked).await;
                } else {
                    self.granted(Ask { tx, since: 0, what: asked }).await;
                }
            }
            answer => {
                if answer == Some(false) {
                    self.tell(format!("{what}: has ended"));
                }
                let _ = tx.rollback().await;
            }
        }
    }

    async fn cancel_one(&mut self) {
        let Some(run) = self.pick_run() else { return };
        let Ok(mut tx) = self.pool.begin().await else { return };
        let leased: Result<bool, _> =
            sqlx::query_scalar("SELECT lease_token IS NOT NULL FROM workflow_runs WHERE id = $1 FOR UPDATE")
                .bind(run.id)
                .fetch_one(&mut *tx)
                .await;
        let what = format!("cancel {}", self.label(run.id));
        let Some(leased) = self.answer(&what, leased).await else {
            let _ = tx.rollback().await;
            return;
        };
        let asked = request_cancel(&mut tx, run.id, "simulated").await;
        match self.answer(&what, asked).await {
            Some(CancelAsked::Cancelling) => {
                self.tell(what);
                self.ask(tx, Asked::Cancel(run.id, leased)).await;
            }
            other => {
                if other == Some(CancelAsked::Unknown) {
                    self.wrong.push(format!("{what}: unknown"));
                }
                let _ = tx.rollback().await;
            }
        }
    }

    /// An operator has some of what failed tried again. Answers whether anything had failed.
    pub async fn retry_some(&mut self) -> bool {
        let mut retried = false;
        for _ in 0..self.rng.random_range(0..4) {
            retried |= self.retry_one().await;
        }
        retried
    }

    async fn retry_one(&mut self) -> bool {
        let failed: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM workflow_runs WHERE state = 'failed'")
            .fetch_all(&self.pool)
            .await
            .expect("failed runs");
        let mut failed: Vec<(String, Uuid)> = failed.into_iter().map(|id| (self.label(id), id)).collect();
        failed.sort();
        if failed.is_empty() {
            return false;
        }
        let (label, id) = failed[self.rng.random_range(0..failed.len())].clone();
        let Ok(mut tx) = self.pool.begin().await else { return false };
        let retried = retry(&mut tx, id, "somebody").await;
        let what = format!("retry {label}");
        match self.answer(&what, retried).await {
            Some(RetryAsked::Retrying) => {
                self.tell(what);
                self.ask(tx, Asked::Retry(id)).await;
            }
            Some(other) => self.wrong.push(format!("{what}: {other:?}")),
            None => tx.rollback().await.unwrap_or_default(),
        }
        true
    }

    async fn schedule(&mut self) {
        let Some(at) = self.awake() else { return };
        let (name, token) = (self.workers[at].name.clone(), self.workers[at].scheduler);
        let next = scheduler::tick(&self.pool, &name, token, NO_EPOCH).await;
        self.answer(&format!("{name} schedules"), next).await;
    }

    /// A scheduler stands still in the middle of its pass until it has lost the lead, and its successor makes one: what the
    /// first is deciding is left to it. Then the first dies.
    async fn schedule_twice(&mut self) {
        let Ok(mut tx) = self.pool.begin().await else { return };
        let due = cursor::due(&mut tx, ALL_JOBS, Some(NO_EPOCH)).await;
        let due = self.answer("a slow scheduler", due).await.map_or(0, |(_, jobs)| jobs.len());
        let decided = scheduler::advance(&self.pool, ALL_JOBS, NO_EPOCH).await;
        let decided = self.answer("a second scheduler", decided).await.unwrap_or(0);
        if due > 0 {
            self.tell(format!("a slow scheduler is at {due} jobs, a second one decides {decided}"));
        }
        if decided > 0 {
            self.wrong.push(format!("{decided} jobs were decided while another scheduler was at them"));
        }
        tx.rollback().await.expect("a rollback");
    }

    async fn keep_house(&mut self) {
        let kept = housekeeping::deadlines(&self.services, true).await;
        self.answer("housekeeping", kept).await;
    }

    async fn kill(&mut self) {
        if self.workers.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.workers.len());
        self.die(at).await;
    }

    /// A worker dies, and another one takes its place.
    async fn die(&mut self, at: usize) {
        let successor = self.new_worker();
        let worker = std::mem::replace(&mut self.workers[at], successor);
        self.tell(format!("{} dies with {} claims", worker.name, worker.held.len()));
        for held in worker.held {
            if let Stage::Own(Executed { tx: Some(tx), .. }, ..) = held.stage {
                tx.rollback().await.expect("a rollback");
            }
        }
    }

    fn freeze(&mut self) {
        let Some(at) = self.awake() else { return };
        let until = self.clock.now() + self.rng.random_range(1_000..40_000);
        self.workers[at].frozen_until = until;
        self.tell(format!("{} freezes", self.workers[at].name));
    }

    async fn tamper_with_hints(&mut self) {
        let Some(run) = self.pick_run() else { return };
        let (what, sql) = match self.rng.random_range(0..3) {
            0 => ("lost", "DELETE FROM apalis.jobs WHERE encode(job, 'hex')::uuid = $1"),
            1 => ("late", "UPDATE apalis.jobs SET run_at = run_at + interval '7 seconds' WHERE encode(job, 'hex')::uuid = $1"),
            _ => (
                "doubled",
                "INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority, metadata, idempotency_key)
                 SELECT gen_random_uuid()::text, workflow || '.v' || version, decode(replace(id::text, '-', ''), 'hex'), 'Pending', 0, 1, now(), priority, '',
                        gen_random_uuid()::text
                 FROM workflow_runs WHERE id = $1",
            ),
        };
        self.hints_lost |= what == "lost";
        self.hints_doubled |= what == "doubled";
        let done = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(run.id).execute(&self.pool).await;
        if let Some(done) = self.answer("hints", done).await {
            self.tell(format!("{} hints of {} are {what}", done.rows_affected(), self.label(run.id)));
        }
    }

    /// The faults are over, and every signal that is waited for comes.
    pub async fn calm(&mut self) {
        self.quiet().await;
        while self.wrong.is_empty() && self.answer_all().await > 0 {
            self.quiet().await;
        }
    }

    /// The faults are over: everything open ends, and workers work until nothing is left to do without an answer from outside.
    async fn quiet(&mut self) {
        self.tell("quiet".into());
        for ask in std::mem::take(&mut self.asks) {
            self.granted(ask).await;
        }
        for worker in &mut self.workers {
            worker.frozen_until = 0;
        }
        // What is due so far is decided; then the schedules rest, or there would be no end.
        if self.schedules_rest_at == 0 {
            self.advance(11_000).await;
            self.schedule().await;
            self.schedules_rest_at = self.clock.now() / 1000;
            sqlx::query("UPDATE scheduled_jobs SET enabled = false").execute(&self.pool).await.expect("jobs at rest");
        }
        let mut idle = 0;
        for _ in 0..400 {
            if self.work().await {
                idle = 0;
                self.advance(2_000).await;
            } else {
                idle += 1;
                self.find_lost_hints().await;
                self.keep_house().await;
                if idle > 3 && !self.skip_to_next().await {
                    return;
                }
                self.advance(11_000).await;
            }
            self.hear();
        }
        self.wrong.push("no end of work".into());
    }

    /// One round of everything; false when there was nothing to do.
    async fn work(&mut self) -> bool {
        let mut busy = self.take_back().await + self.wake().await > 0;
        for at in 0..self.workers.len() {
            self.commit_owned(at).await;
        }
        for at in 0..self.workers.len() {
            if at == 0 {
                for (workflow, version) in self.queues() {
                    busy |= self.claim(at, &workflow, version, 200, false).await > 0;
                }
            }
            while !self.workers[at].held.is_empty() {
                busy = true;
                match self.workers[at].held.iter().position(|held| matches!(held.stage, Stage::Claimed(_))) {
                    Some(index) => self.execute(at, index).await,
                    None => self.commit_batch(at, 9).await,
                }
                self.commit_owned(at).await;
            }
        }
        busy
    }

    async fn commit_owned(&mut self, at: usize) {
        while let Some(index) = self.workers[at].held.iter().position(|held| matches!(held.stage, Stage::Own(..))) {
            self.commit_own(at, index, 9).await;
        }
    }

    /// Jumps to the next instant anything waits for; false when there is none.
    async fn skip_to_next(&mut self) -> bool {
        let next: Option<f64> = sqlx::query_scalar(
            "SELECT extract(epoch FROM min(t) - now())::float8 FROM (
                 SELECT wait_until AS t FROM workflow_runs WHERE parked AND wait_until IS NOT NULL
                 UNION ALL SELECT ready_at FROM workflow_runs WHERE state IN ('pending', 'cancelling') AND NOT parked
                 UNION ALL SELECT lease_expires_at FROM workflow_runs WHERE lease_token IS NOT NULL
                 UNION ALL SELECT created_at + interval '20 seconds' FROM job_occurrences WHERE state <> 'closed'
                 UNION ALL SELECT run_at FROM apalis.jobs) AS instants",
        )
        .fetch_one(&self.pool)
        .await
        .expect("the next instant");
        let Some(next) = next else { return false };
        self.advance(((next * 1000.0) as i64).clamp(1_000, 3_600_000)).await;
        true
    }

    /// Sends every signal that is still waited for. Answers how many.
    async fn answer_all(&mut self) -> usize {
        let waiting: Vec<(Uuid, String)> =
            sqlx::query_as("SELECT id, wait_signal FROM workflow_runs WHERE parked AND wait_signal IS NOT NULL")
                .fetch_all(&self.pool)
                .await
                .expect("waiting runs");
        let mut waiting: Vec<(String, Uuid, String)> = waiting.into_iter().map(|(id, name)| (self.label(id), id, name)).collect();
        waiting.sort();
        for (label, id, name) in &waiting {
            if self.runs.iter().any(|run| run.id == *id && run.sent.get(name).is_some_and(|sent| !sent.is_empty())) {
                self.wrong.push(format!("{label} waits for {name}, which was sent and accepted"));
            }
        }
        let count = waiting.len();
        for (_, id, name) in waiting {
            self.signal(id, &name, false).await;
        }
        count
    }
}

fn outcomes(batch: &[Held]) -> Vec<&Executed<Services>> {
    batch.iter().filter_map(|held| if let Stage::Executed(executed) = &held.stage { Some(executed) } else { None }).collect()
}
