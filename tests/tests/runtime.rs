//! The durable runtime as another program uses it, with no table or word of the engine: lanes, places, waits for children, output.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use borealis_tests::{TestDatabase, eventually};
use borealis_workflows::durable::{
    self, Child, Children, DEFAULT_LANE, NewRun, Outcome, Pool, Registry, Services, StepContext, StepError, StepResult, Wait,
    Wake, Workflow,
    output::{self, Output},
    recovery, signal, start, start_children, start_many,
    worker::{self, ANYWHERE, Options},
    workflow,
};
use serde_json::{Value, json};
use tokio::{sync::Notify, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(20);
/// The lane of the slow workflow.
const SLOW: &str = "slow";
/// How many steps of it may run at the same time.
const SLOTS: usize = 2;

/// What the steps of this program use.
struct Program {
    pool: Pool,
    /// How many slow steps run now, and the most that ever did.
    slow: (AtomicUsize, AtomicUsize),
    /// What ends the slow steps.
    open: CancellationToken,
    /// Where the step of `teller` tells, for the test to go on with.
    told: Mutex<Option<Output>>,
    tells: Notify,
}

impl Services for Program {
    fn pool(&self) -> &Pool {
        &self.pool
    }
}

type Context = StepContext<Program>;

fn fast() -> Workflow<Program> {
    workflow("fast", 1).step("only", |_: &mut Context| Box::pin(async { Outcome::done(&"fast") }))
}

fn slow() -> Workflow<Program> {
    workflow("slow", 1).lane(SLOW).step("only", |cx| Box::pin(slow_step(cx)))
}

async fn slow_step(cx: &mut Context) -> StepResult {
    let (now, most) = &cx.services.slow;
    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
    let stopped = cx.cancelled().run_until_cancelled(cx.services.open.cancelled()).await.is_none();
    cx.services.slow.0.fetch_sub(1, Ordering::SeqCst);
    if stopped { Err(StepError::Stopped) } else { Outcome::done(&"slow") }
}

fn child() -> Workflow<Program> {
    workflow("child", 1).step("only", |cx: &mut Context| {
        Box::pin(async {
            match &cx.wake {
                Wake::Signal(_) => Outcome::done(&cx.input::<Value>()?),
                _ => Ok(Outcome::Wait(Wait { signal: Some("end".into()), ..Wait::default() })),
            }
        })
    })
}

/// Starts as many children as its input says, and counts the times it is woken by them, until all have ended.
fn parent() -> Workflow<Program> {
    workflow("parent", 1).step("only", |cx| Box::pin(parent_step(cx)))
}

async fn parent_step(cx: &mut Context) -> StepResult {
    let wait = |state: Value| Ok(Outcome::Wait(Wait { children: Children::Any, state, ..Wait::default() }));
    let seen = |ended: usize| json!({"woken": cx.state::<Value>().ok().and_then(|state| state["woken"].as_u64()).unwrap_or(0) + 1, "ended": ended});
    match cx.wake {
        Wake::First => {
            let count: usize = cx.input()?;
            let children: Vec<Child> = (0..count).map(|n| Child { key: n.to_string(), input: json!(n) }).collect();
            let run_id = cx.run_id;
            start_children(cx.tx().await?, run_id, &child(), &children).await?;
            wait(json!({"woken": 0}))
        }
        Wake::Child | Wake::Children => {
            let children = cx.children().await?;
            let ended = children.iter().filter(|child| child.state == "succeeded").count();
            if ended == children.len() { Outcome::done(&seen(ended)) } else { wait(seen(ended)) }
        }
        ref other => Err(StepError::Final(format!("woken by {other:?}"))),
    }
}

fn teller() -> Workflow<Program> {
    workflow("teller", 1).step("only", |cx| Box::pin(teller_step(cx)))
}

async fn teller_step(cx: &mut Context) -> StepResult {
    let output = cx.output();
    output.write(&[("line", json!(format!("try {}", cx.attempt))), ("line", json!("second"))]).await?;
    *cx.services.told.lock().unwrap() = Some(output);
    cx.services.tells.notify_one();
    cx.cancelled().cancelled().await;
    Err(StepError::Stopped)
}

/// A database with nothing but the runtime, and workers on it.
struct World {
    database: TestDatabase,
    program: Arc<Program>,
    workers: Vec<(CancellationToken, JoinHandle<()>)>,
}

impl World {
    async fn new() -> Self {
        let database = TestDatabase::empty().await;
        durable::setup_alone(&database.pool).await.unwrap();
        let program = Arc::new(Program {
            pool: database.pool.clone(),
            slow: Default::default(),
            open: CancellationToken::new(),
            told: Mutex::default(),
            tells: Notify::new(),
        });
        Self { database, program, workers: Vec::new() }
    }

    fn worker(&mut self, name: &str, change: impl FnOnce(&mut Options)) -> CancellationToken {
        let stop = CancellationToken::new();
        let mut options = Options::new(name, &self.database.pool, &stop);
        change(&mut options);
        let registry = Registry::new([fast(), slow(), child(), parent(), teller()]);
        let running = tokio::spawn(worker::run(registry, self.program.clone(), options, stop.clone()));
        self.workers.push((stop.clone(), running));
        stop
    }

    async fn start(&self, workflow: &Workflow<Program>, new: NewRun) -> Uuid {
        start(&mut self.database.pool.acquire().await.unwrap(), workflow, new).await.unwrap().run_id
    }

    async fn output_of(&self, run: Uuid) -> Value {
        eventually("a run succeeds", SOON, async || {
            let sql = "SELECT output FROM workflow_runs WHERE id = $1 AND state = 'succeeded'";
            sqlx::query_scalar(sql).bind(run).fetch_optional(&self.database.pool).await.unwrap()
        })
        .await
    }

    async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.database.pool).await.unwrap()
    }

    /// The workers that have begun steps of a run.
    async fn workers_of(&self, run: Uuid) -> Vec<String> {
        let sql = "SELECT DISTINCT worker FROM workflow_events WHERE run_id = $1 AND kind = 'step_started' ORDER BY 1";
        sqlx::query_scalar(sql).bind(run).fetch_all(&self.database.pool).await.unwrap()
    }

    async fn stop(self) -> TestDatabase {
        for (stop, running) in self.workers {
            stop.cancel();
            running.await.unwrap();
        }
        self.database
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_lane_keeps_only_its_own_waiting() {
    let mut world = World::new().await;
    world.worker("w1", |options| options.lanes = BTreeMap::from([(DEFAULT_LANE, 4), (SLOW, SLOTS)]));
    let mut conn = world.database.pool.acquire().await.unwrap();
    start_many(&mut conn, &slow(), vec![NewRun::default(); 20]).await.unwrap();
    eventually("the lane is full", SOON, async || (world.program.slow.0.load(Ordering::SeqCst) == SLOTS).then_some(())).await;
    start_many(&mut conn, &fast(), vec![NewRun::default(); 100]).await.unwrap();
    eventually("the others end", SOON, async || {
        (world.count("SELECT count(*) FROM workflow_runs WHERE workflow = 'fast' AND state = 'succeeded'").await == 100)
            .then_some(())
    })
    .await;
    assert_eq!(world.count("SELECT count(*) FROM workflow_runs WHERE workflow = 'slow' AND finished_at IS NOT NULL").await, 0);
    world.program.open.cancel();
    eventually("the slow ones end", SOON, async || {
        (world.count("SELECT count(*) FROM workflow_runs WHERE workflow = 'slow' AND state = 'succeeded'").await == 20)
            .then_some(())
    })
    .await;
    assert_eq!(world.program.slow.1.load(Ordering::SeqCst), SLOTS, "never more at the same time");
    drop(conn);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_slots_in_a_lane_leaves_its_runs_to_others() {
    let mut world = World::new().await;
    world.program.open.cancel();
    world.worker("without", |_| {});
    let run = world.start(&slow(), NewRun::default()).await;
    for _ in 0..20 {
        // Long enough for a worker that would take it.
        let other = world.start(&fast(), NewRun::default()).await;
        assert_eq!(world.output_of(other).await, json!("fast"));
    }
    assert_eq!(world.workers_of(run).await, [""; 0]);
    world.worker("with", |options| options.lanes = BTreeMap::from([(SLOW, 1)]));
    assert_eq!(world.output_of(run).await, json!("slow"));
    assert_eq!(world.workers_of(run).await, ["with"]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_of_a_place_are_taken_by_its_workers_alone() {
    let mut world = World::new().await;
    world.worker("anywhere", |_| {});
    world.worker("one", |options| options.places = vec!["site:1".into()]);
    let at = |place: &str| NewRun { place: place.into(), input: json!(1), ..NewRun::default() };
    let (free, pinned, nowhere) = (
        world.start(&fast(), at(ANYWHERE)).await,
        world.start(&fast(), at("site:1")).await,
        world.start(&fast(), at("site:2")).await,
    );
    assert_eq!((world.output_of(free).await, world.output_of(pinned).await), (json!("fast"), json!("fast")));
    assert_eq!((world.workers_of(free).await, world.workers_of(pinned).await), (vec!["anywhere".into()], vec!["one".into()]));

    // Its children are where it is.
    let family = world.start(&parent(), at("site:1")).await;
    let child = eventually("the child waits", SOON, async || {
        let sql = "SELECT id FROM workflow_runs WHERE parent_id = $1 AND parked";
        sqlx::query_scalar::<_, Uuid>(sql).bind(family).fetch_optional(&world.database.pool).await.unwrap()
    })
    .await;
    signal(&mut world.database.pool.acquire().await.unwrap(), child, "end", &Value::Null).await.unwrap();
    world.output_of(family).await;
    assert_eq!((world.workers_of(family).await, world.workers_of(child).await), (vec!["one".into()], vec!["one".into()]));

    // A lost hint is written again, into the queue of its place.
    assert_eq!(world.workers_of(nowhere).await, [""; 0]);
    let lost =
        "DELETE FROM apalis.jobs; UPDATE workflow_runs SET ready_at = now() - interval '1 minute' WHERE finished_at IS NULL";
    world.database.execute(lost).await;
    eventually("the hint is there again", SOON, async || {
        let _ = recovery::lost_hints(&world.database.pool).await;
        (world.count("SELECT count(*) FROM apalis.jobs WHERE job_type = 'fast.v1@site:2'").await == 1).then_some(())
    })
    .await;
    world.worker("two", |options| options.places = vec!["site:2".into(), "site:3".into()]);
    world.output_of(nowhere).await;
    assert_eq!(world.workers_of(nowhere).await, ["two"]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_with_any_child_and_none_is_missed() {
    const CHILDREN: usize = 30;
    let mut world = World::new().await;
    for name in ["w1", "w2"] {
        world.worker(name, |_| {});
    }
    let family = world.start(&parent(), NewRun { input: json!(CHILDREN), ..NewRun::default() }).await;
    let waiting = "SELECT count(*) FROM workflow_runs WHERE workflow = 'child' AND parked";
    eventually("all children wait", SOON, async || (world.count(waiting).await == 30).then_some(())).await;
    let children: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM workflow_runs WHERE parent_id = $1")
        .bind(family)
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
    let end = async |child: Uuid| {
        let mut conn = world.database.pool.acquire().await.unwrap();
        assert!(signal(&mut conn, child, "end", &Value::Null).await.unwrap());
    };
    // Alone, each wakes the parent.
    for (number, child) in children[..3].iter().enumerate() {
        end(*child).await;
        eventually("the parent is told", SOON, async || {
            let sql = "SELECT state_data FROM workflow_runs WHERE id = $1 AND parked";
            let state: Option<Value> = sqlx::query_scalar(sql).bind(family).fetch_optional(&world.database.pool).await.unwrap();
            state.filter(|state| *state == json!({"woken": number + 1, "ended": number + 1}))
        })
        .await;
    }
    // Many at the same time, while the parent runs and while it waits.
    for group in children[3..].chunks(9) {
        futures::future::join_all(group.iter().map(|child| end(*child))).await;
    }
    let seen = world.output_of(family).await;
    assert_eq!(seen["ended"], CHILDREN, "{seen}");
    let woken = seen["woken"].as_u64().unwrap();
    assert!((4..=CHILDREN as u64).contains(&woken), "{seen}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_in_order_and_ends_with_the_lease() {
    let mut world = World::new().await;
    world.worker("w1", |_| {});
    let run = world.start(&teller(), NewRun::default()).await;
    world.program.tells.notified().await;
    let first = world.program.told.lock().unwrap().take().unwrap();
    first.write(&[("result", json!({"changed": true}))]).await.unwrap();
    let read = async |mark| output::told(&world.database.pool, run, mark, 100).await.unwrap();
    let all = read((0, 0, 0)).await;
    let shown: Vec<(i64, &str, &Value)> = all.iter().map(|told| (told.n, told.kind.as_str(), &told.data)).collect();
    assert_eq!(shown, [(1, "line", &json!("try 1")), (2, "line", &json!("second")), (3, "result", &json!({"changed": true}))]);
    assert_eq!(read((0, 1, 2)).await, all[2..], "from where a reader was");

    // The lease is somebody else's from now on: nothing more is told by the first try.
    world
        .database
        .execute("UPDATE workflow_runs SET lease_token = gen_random_uuid(), lease_expires_at = now() - interval '1 second'")
        .await;
    assert!(matches!(first.write(&[("line", json!("too late"))]).await, Err(StepError::Stopped)));
    world.program.tells.notified().await;
    let second = world.program.told.lock().unwrap().take().unwrap();
    assert!(matches!(first.write(&[("line", json!("too late"))]).await, Err(StepError::Stopped)));
    second.write(&[("line", json!("end"))]).await.unwrap();
    let later: Vec<(i32, i64, Value)> = read((0, 1, 3)).await.into_iter().map(|told| (told.attempt, told.n, told.data)).collect();
    assert_eq!(later, [(2, 1, json!("try 2")), (2, 2, json!("second")), (2, 3, json!("end"))]);

    // A batch that holds what Postgres does not take is not written at all, and may be written otherwise.
    second.write(&[("line", json!("good")), ("line", json!("a NUL \0"))]).await.unwrap_err();
    second.write(&[("line", json!("good"))]).await.unwrap();
    assert_eq!(read((0, 2, 3)).await.len(), 1);

    // A worker that stops lets go of the step, which then runs again as the same attempt: what it tells comes after.
    let (stop, running) = world.workers.remove(0);
    stop.cancel();
    running.await.unwrap();
    world.worker("w2", |_| {});
    world.program.tells.notified().await;
    let again: Vec<(i32, i64, Value)> = output::told(&world.database.pool, run, (0, 2, 4), 100)
        .await
        .unwrap()
        .into_iter()
        .map(|told| (told.attempt, told.n, told.data))
        .collect();
    assert_eq!(again, [(2, 5, json!("try 2")), (2, 6, json!("second"))]);

    // It goes with its run.
    let database = world.stop().await;
    database.execute("DELETE FROM workflow_runs").await;
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM workflow_output").fetch_one(&database.pool).await.unwrap();
    assert_eq!(left, 0);
}
