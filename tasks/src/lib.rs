//! Keeps the long-lived tasks of a process going: none dies silently.
//!
//! A task that panics, or ends although it should not, is logged, counted and started again, after a pause that grows from a second to
//! half a minute while it fails again and again. [`Tasks::health`] says how each task is; `/ready` and `/metrics` show it.
//!
//! ```
//! # use std::time::Duration;
//! # use borealis_tasks::{Reconciler, Tasks};
//! # use tokio_util::sync::CancellationToken;
//! struct Sweep;
//!
//! impl Reconciler for Sweep {
//!     const NAME: &'static str = "sweep";
//!     const EVERY: Duration = Duration::from_secs(10);
//!
//!     async fn pass(&mut self) {
//!         // What is to be done each time.
//!     }
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let stop = CancellationToken::new();
//! let tasks = Tasks::new(stop.clone());
//! tasks.reconcile(|| Sweep);
//! assert!(tasks.health().iter().all(|task| !task.is_failing()));
//! stop.cancel();
//! tasks.ended().await;
//! # });
//! ```

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// The pause after a first failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before a task is started again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A task that has run for so long is well again.
const WELL_AFTER: Duration = Duration::from_secs(60);
/// A reconciler whose pass takes longer than its interval and this is overdue.
const OVERDUE_AFTER: Duration = Duration::from_secs(60);

/// Periodic work: something is looked at, again and again, and set right.
pub trait Reconciler: Send + 'static {
    /// What it is called in log, metrics and `/ready`.
    const NAME: &'static str;
    /// The time from the begin of one pass to the begin of the next; a longer pass delays the next.
    const EVERY: Duration;

    /// One pass. What goes wrong in it is its own to log; a panic is caught, and the reconciler is made again.
    fn pass(&mut self) -> impl Future<Output = ()> + Send;
}

/// The long-lived tasks of a process, or of a part of it. They are dropped with its last handle.
#[derive(Debug, Clone)]
pub struct Tasks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stop: CancellationToken,
    running: Mutex<JoinSet<()>>,
    listed: List,
}

/// The tasks of a process, and how often those of each name were started again.
#[derive(Debug, Default)]
struct Listed {
    tasks: Vec<Arc<Task>>,
    restarts: BTreeMap<&'static str, Arc<AtomicU64>>,
}

type List = Arc<Mutex<Listed>>;

/// The tasks of all of this process.
static ALL: Mutex<Vec<Weak<Mutex<Listed>>>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Task {
    name: &'static str,
    /// The interval of a reconciler.
    every: Option<Duration>,
    state: Mutex<State>,
    /// How often a task of this name was started again.
    restarts: Arc<AtomicU64>,
    trip: Notify,
}

#[derive(Debug)]
struct State {
    began: Instant,
    running: bool,
    done: bool,
    why: Option<String>,
    passed: Instant,
}

/// How a task is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The task.
    pub name: &'static str,
    /// Whether it runs; not while it pauses after a failure.
    pub running: bool,
    /// How often it, or another task of its name, was started again.
    pub restarts: u64,
    /// Why it failed last, for a minute after it was started again.
    pub failed: Option<String>,
    /// A reconciler that has not ended a pass for much longer than it should take.
    pub overdue: bool,
}

impl Health {
    /// Whether somebody should look at it.
    #[must_use]
    pub const fn is_failing(&self) -> bool {
        self.failed.is_some() || self.overdue
    }
}

impl Tasks {
    /// Without tasks. They end when `stop` is cancelled: each watches it itself, or is dropped where it waits.
    #[must_use]
    pub fn new(stop: CancellationToken) -> Self {
        let listed = List::default();
        let mut all = lock(&ALL);
        all.retain(|listed| listed.strong_count() > 0);
        all.push(Arc::downgrade(&listed));
        Self(Arc::new(Inner { stop, running: Mutex::default(), listed }))
    }

    /// For tasks of a part of the process that ends on its own; their health is seen here, too.
    #[must_use]
    pub fn part(&self, stop: CancellationToken) -> Self {
        Self(Arc::new(Inner { stop, running: Mutex::default(), listed: self.0.listed.clone() }))
    }

    /// Keeps a task going until the process stops. `start` makes it, at first and after each failure. When the process stops, the task
    /// is expected to end by itself.
    pub fn keep<F>(&self, name: &'static str, mut start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        self.spawn(name, None, Ending::WithTheProcess, move |_| start());
    }

    /// As [`Self::keep`], for a task that does not watch the end of the process: it is dropped where it waits.
    pub fn keep_until_stopped<F>(&self, name: &'static str, start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        self.keep_dropping(name, Ending::WithTheProcess, start);
    }

    /// Keeps a task going until it has ended by itself once, or the process stops: then it is dropped where it waits.
    pub fn keep_until_done<F>(&self, name: &'static str, start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        self.keep_dropping(name, Ending::WhenDone, start);
    }

    fn keep_dropping<F>(&self, name: &'static str, ending: Ending, mut start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let stop = self.0.stop.clone();
        self.spawn(name, None, ending, move |_| {
            let (run, stop) = (start(), stop.clone());
            async move {
                stop.run_until_cancelled(run).await;
            }
        });
    }

    /// Runs a reconciler until the process stops. `make` makes it, at first and after each failure; its first pass is at once.
    pub fn reconcile<R: Reconciler>(&self, mut make: impl FnMut() -> R + Send + 'static) {
        let stop = self.0.stop.clone();
        self.spawn(R::NAME, Some(R::EVERY), Ending::WithTheProcess, move |task| {
            let (mut reconciler, stop) = (make(), stop.clone());
            async move {
                let mut every = tokio::time::interval(R::EVERY);
                every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                while stop.run_until_cancelled(every.tick()).await.is_some() {
                    reconciler.pass().await;
                    task.state().passed = Instant::now();
                }
            }
        });
    }

    fn spawn<F>(
        &self,
        name: &'static str,
        every: Option<Duration>,
        ending: Ending,
        mut start: impl FnMut(Arc<Task>) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send,
    {
        let task = self.listed(name, every);
        let stop = self.0.stop.clone();
        lock(&self.0.running).spawn(async move {
            let _done = Done(task.clone());
            let mut pause = FIRST_PAUSE;
            loop {
                task.begins();
                let run = async {
                    tokio::select! {
                        biased;
                        () = task.trip.notified() => tripped(),
                        () = async { start(task.clone()).await } => {}
                    }
                };
                let why = match AssertUnwindSafe(run).catch_unwind().await {
                    Ok(()) if stop.is_cancelled() || matches!(ending, Ending::WhenDone) => break,
                    Ok(()) => "it ended although the process goes on".to_owned(),
                    Err(panic) => format!("panic: {}", text(&*panic)),
                };
                if task.failed(&why) >= WELL_AFTER {
                    pause = FIRST_PAUSE;
                }
                tracing::error!(
                    task = name,
                    why,
                    again_in_s = pause.as_secs(),
                    "a task of this process has failed and is started again"
                );
                if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                    break;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        });
    }

    /// Lists a task, in the place of those that are done.
    fn listed(&self, name: &'static str, every: Option<Duration>) -> Arc<Task> {
        let now = Instant::now();
        let state = State { began: now, running: true, done: false, why: None, passed: now };
        let mut listed = lock(&self.0.listed);
        let restarts = listed.restarts.entry(name).or_default().clone();
        let task = Arc::new(Task { name, every, state: Mutex::new(state), restarts, trip: Notify::new() });
        listed.tasks.retain(|task| !task.state().done);
        listed.tasks.push(task.clone());
        task
    }

    /// How each task is, in the order they were begun. Tasks that are done are left out.
    #[must_use]
    pub fn health(&self) -> Vec<Health> {
        lock(&self.0.listed).health()
    }

    /// Completes when the tasks have ended, after `stop` was cancelled. Those of parts are not waited for.
    pub async fn ended(&self) {
        let mut running = std::mem::take(&mut *lock(&self.0.running));
        while running.join_next().await.is_some() {}
    }

    /// As [`Self::ended`], but what has not ended in time is dropped where it waits.
    pub async fn end_within(&self, limit: Duration) {
        let mut running = std::mem::take(&mut *lock(&self.0.running));
        let ended = timeout(limit, async { while running.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            running.shutdown().await;
        }
    }
}

fn lists() -> Vec<List> {
    lock(&ALL).iter().filter_map(Weak::upgrade).collect()
}

impl Listed {
    fn health(&self) -> Vec<Health> {
        self.tasks.iter().filter_map(|task| task.health()).collect()
    }
}

/// How all tasks of this process are: what metrics show.
#[must_use]
pub fn all() -> Vec<Health> {
    lists().iter().flat_map(|listed| lock(listed).health()).collect()
}

/// Makes the tasks of that name panic where they wait next; how many there are in this process. For tests of what a panic does.
pub fn trip(name: &str) -> usize {
    lists()
        .iter()
        .flat_map(|listed| lock(listed).tasks.clone())
        .filter(|task| task.name == name && !task.state().done)
        .map(|task| task.trip.notify_one())
        .count()
}

/// When a task may end.
#[derive(Debug, Clone, Copy)]
enum Ending {
    WithTheProcess,
    WhenDone,
}

impl Task {
    fn begins(&self) {
        let mut state = self.state();
        (state.began, state.passed, state.running) = (Instant::now(), Instant::now(), true);
    }

    /// Notes a failure; how long the task had run.
    fn failed(&self, why: &str) -> Duration {
        let mut state = self.state();
        state.running = false;
        self.restarts.fetch_add(1, Ordering::Relaxed);
        state.why = Some(why.to_owned());
        state.began.elapsed()
    }

    fn health(&self) -> Option<Health> {
        let state = self.state();
        let well = state.running && state.began.elapsed() >= WELL_AFTER;
        let overdue = self.every.is_some_and(|every| state.running && state.passed.elapsed() > every + OVERDUE_AFTER);
        (!state.done).then(|| Health {
            name: self.name,
            running: state.running,
            restarts: self.restarts.load(Ordering::Relaxed),
            failed: state.why.clone().filter(|_| !well),
            overdue,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// The task is done when this is dropped: it has ended, or was dropped where it waited.
struct Done(Arc<Task>);

impl Drop for Done {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.running, state.done) = (false, true);
    }
}

#[expect(clippy::panic, reason = "asked for by a test")]
fn tripped() {
    panic!("tripped by a test");
}

fn text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

/// Nothing under these locks can panic half-way, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn counted() -> (Arc<AtomicU32>, Arc<AtomicU32>) {
        (Arc::default(), Arc::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_or_ends_is_started_again() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        let (starts, _) = counted();
        let (count, end) = (starts.clone(), stop.clone());
        tasks.keep("task", move || {
            let (start, end) = (count.fetch_add(1, Ordering::Relaxed), end.clone());
            async move {
                match start {
                    0 => panic!("the first time"),
                    1 => {}
                    _ => end.cancelled().await,
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(10)).await;
        let health = tasks.health().remove(0);
        assert_eq!((health.running, health.restarts, health.failed.as_deref()), (false, 1, Some("panic: the first time")));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let health = tasks.health().remove(0);
        assert_eq!((health.restarts, health.failed.as_deref()), (2, Some("it ended although the process goes on")));
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(tasks.health()[0].running && tasks.health()[0].is_failing());
        tokio::time::sleep(WELL_AFTER).await;
        assert!(!tasks.health()[0].is_failing(), "well again");
        assert_eq!(starts.load(Ordering::Relaxed), 3);
        stop.cancel();
        tasks.ended().await;
        assert!(tasks.health().is_empty());
    }

    struct Count {
        passes: Arc<AtomicU32>,
        hang: bool,
    }

    impl Reconciler for Count {
        const NAME: &'static str = "count";
        const EVERY: Duration = Duration::from_secs(10);

        async fn pass(&mut self) {
            if self.passes.fetch_add(1, Ordering::Relaxed) == 3 && self.hang {
                std::future::pending().await
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reconciler_passes_on_and_is_seen_when_it_hangs() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        let (made, passes) = counted();
        let (making, passing) = (made.clone(), passes.clone());
        tasks.reconcile(move || {
            making.fetch_add(1, Ordering::Relaxed);
            Count { passes: passing.clone(), hang: true }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(passes.load(Ordering::Relaxed), 1, "at once");
        assert_eq!((trip("count"), trip("other")), (1, 0));
        tokio::time::sleep(Duration::from_secs(12)).await;
        assert_eq!((made.load(Ordering::Relaxed), passes.load(Ordering::Relaxed)), (2, 3), "made again, and at it");
        assert!(tasks.health()[0].failed.as_deref().is_some_and(|why| why.contains("tripped")));
        tokio::time::sleep(Duration::from_secs(75)).await;
        let health = tasks.health().remove(0);
        assert_eq!((health.overdue, health.failed), (true, None), "its fourth pass does not end");
        trip("count");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(!tasks.health()[0].overdue);
        stop.cancel();
        tasks.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_in_the_place_of_one_that_is_done_goes_on_counting() {
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        for expected in 0..3 {
            let part = tasks.part(stop.clone());
            part.keep("part", std::future::pending);
            tokio::time::sleep(Duration::from_millis(10)).await;
            let health = tasks.health();
            assert_eq!((health.len(), health[0].restarts), (1, expected));
            trip("part");
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(part);
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(tasks.health().is_empty(), "what was dropped is not there any more");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_done_is_not_started_again() {
        let tasks = Tasks::new(CancellationToken::new());
        let (starts, _) = counted();
        let count = starts.clone();
        tasks.keep_until_done("once", move || {
            let start = count.fetch_add(1, Ordering::Relaxed);
            async move { assert!(start > 0, "the first time") }
        });
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(starts.load(Ordering::Relaxed), 2);
        assert!(tasks.health().is_empty());
    }
}
