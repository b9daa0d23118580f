//! A simulated fleet: thousands of agents in one process that speak the real wire (`borealis-protocol`): token at the
//! upgrade, Socket.IO, signed envelopes, reports with acks, heartbeats over REST.
//!
//! ```no_run
//! # async fn example(engine: &borealis_tests::TestEngine, site: i64) {
//! use std::time::Duration;
//! use borealis_tests::fleet::{Departure, Fleet, Settings, Work, identity};
//!
//! // Either enrolled over REST, with the site's code while its automatic approval is on ...
//! let machines = identity::enroll(&engine.admin().await, site, "host", 200).await;
//! // ... or, for many, written into the tables with keys and tokens that are just as real:
//! let machines = identity::write(&engine.app.pool, &engine.app.keys, site, "host", 10_000).await;
//!
//! let fleet = Fleet::start(machines, Settings {
//!     work: Work::of(|run| Work { takes: Duration::from_millis(200), chunks: 3, ..Work::default() }),
//!     ..Settings::at([engine.base.clone()])
//! });
//! fleet.until("all are connected", Duration::from_secs(60), |counts| counts.connected == 10_000).await;
//! // ... schedule something over REST ...
//! fleet.vanish(0..500, Departure::Cut, Duration::from_secs(3)); // and back after that, with the agent's own backoff
//! fleet.until("all is reported", Duration::from_secs(60), |counts| counts.acked == 10_000).await;
//! let counts = fleet.counts();
//! assert_eq!((counts.executed, counts.doubled, counts.unacked), (10_000, 0, 0));
//! fleet.stop().await;
//! # }
//! ```
//!
//! * The fleet runs in threads of its own ([`Settings::threads`]); every method may be called from any runtime.
//! * [`Settings::at`] takes several base URLs; one is picked at random at each connect, and [`Fleet::move_to`] changes them
//!   while it runs. An API that restarts or moves is survived like an agent survives it: with [`borealis_agent::backoff::Reconnect`].
//! * An agent keeps what it was sent and what it has not been acknowledged through every departure, as the real one keeps it
//!   on its disk, runs one script at a time, and answers a dispatch it knows without running it again. With
//!   [`Settings::dedup`] off it is an agent of the older kind: it says nothing of `dedup` and runs whatever comes.
//! * [`Fleet::counts`] are sums; [`Fleet::receipts`] and [`Fleet::executions`] name each dispatch that came and each that was
//!   begun. A dispatch is known by its id (what the wire calls `job_id`: the activity's) and the device; `doubled` counts
//!   executions beyond the first of the same dispatch, and of the same run and script under another dispatch.
//! * Tokens are renewed over REST a minute before they end.

mod agent;
mod http;
pub mod identity;
mod record;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_protocol::events::QuickJobRun;
use tokio::{runtime::Runtime, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use url::Url;

pub use identity::Machine;
pub use record::{Counts, Execution, Latencies, Receipt};

use record::Record;

/// How a fleet behaves.
#[derive(Clone)]
pub struct Settings {
    /// Base URLs of API processes; one is picked at each connect.
    pub apis: Vec<Url>,
    /// Time between two heartbeats of an agent; the first comes at a random moment within it. None: no heartbeats.
    pub heartbeat: Option<Duration>,
    /// Whether an agent reports its status over REST after each connect, as the real one does.
    pub status: bool,
    /// What becomes of a dispatch.
    pub work: WorkOf,
    /// Whether the agents never run a dispatch twice, and say so.
    pub dedup: bool,
    /// Of how many dispatches one has its signatures checked. A fleet checks in two threads what 10,000 machines check at
    /// home, so a benchmark checks a sample; a dispatch that is wrong is refused, as an agent does.
    pub verify_one_in: u32,
    /// How many agents connect at once at the start. Later, each comes back when its backoff says so.
    pub connecting: usize,
    /// Threads of the fleet.
    pub threads: usize,
}

impl Settings {
    /// The usual behaviour at these base URLs.
    #[must_use]
    pub fn at(apis: impl IntoIterator<Item = Url>) -> Self {
        Self {
            apis: apis.into_iter().collect(),
            heartbeat: Some(Duration::from_secs(30)),
            status: true,
            work: Work::of(|_| Work::default()),
            dedup: true,
            verify_one_in: 1,
            connecting: 128,
            threads: 1,
        }
    }
}

/// Decides how each dispatch is run.
pub type WorkOf = Arc<dyn Fn(&QuickJobRun) -> Work + Send + Sync>;

/// How a script is run.
#[derive(Debug, Clone)]
pub struct Work {
    /// How long it takes.
    pub takes: Duration,
    /// In how many pieces its output is streamed while it runs; the result brings all of it.
    pub chunks: u32,
    /// Bytes of each piece.
    pub chunk_bytes: usize,
    /// Its exit code; anything but 0 is a failure.
    pub exit_code: i32,
}

impl Default for Work {
    /// Ends at once with one line of output.
    fn default() -> Self {
        Self { takes: Duration::ZERO, chunks: 1, chunk_bytes: 32, exit_code: 0 }
    }
}

impl Work {
    /// Makes a rule for [`Settings::work`].
    pub fn of(rule: impl Fn(&QuickJobRun) -> Self + Send + Sync + 'static) -> WorkOf {
        Arc::new(rule)
    }
}

/// How agents leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// The connection is closed without a good-bye.
    Cut,
    /// The connection is reset.
    Reset,
    /// The connection stays open and nobody reads or answers any more, until the agent comes back with another one.
    Silent,
}

/// What the control of a fleet and one agent share.
#[derive(Debug, Default)]
struct Slot {
    order: Mutex<Option<(Departure, Instant)>>,
    wake: tokio::sync::Notify,
}

impl Slot {
    fn take_order(&self) -> Option<(Departure, Instant)> {
        lock(&self.order).take()
    }
}

/// What all agents share.
struct Shared {
    settings: Settings,
    apis: RwLock<Vec<Url>>,
    record: Record,
    slots: Vec<Slot>,
    /// [`Settings::status`] now.
    status: AtomicBool,
    /// Turns for the first connect.
    turns: Semaphore,
    stop: CancellationToken,
    /// Heartbeats and status reports under way.
    reports: TaskTracker,
}

impl Shared {
    fn api(&self) -> Option<Url> {
        let apis = self.apis.read().unwrap_or_else(PoisonError::into_inner);
        (!apis.is_empty()).then(|| apis.get(rand::random_range(0..apis.len())).cloned())?
    }
}

/// The fleet. Dropping it ends it without a good-bye.
pub struct Fleet {
    shared: Arc<Shared>,
    agents: TaskTracker,
    runtime: Option<Runtime>,
}

impl Fleet {
    /// Starts an agent for each machine, in threads of the fleet.
    ///
    /// # Panics
    /// When the threads cannot be started.
    #[must_use]
    pub fn start(machines: Vec<Machine>, settings: Settings) -> Self {
        borealis_api::serve::raise_open_files();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(settings.threads.max(1))
            .thread_name("fleet")
            .enable_all()
            .build()
            .expect("the fleet's threads");
        let shared = Arc::new(Shared {
            apis: RwLock::new(settings.apis.clone()),
            record: Record::default(),
            slots: machines.iter().map(|_| Slot::default()).collect(),
            turns: Semaphore::new(settings.connecting.max(1)),
            status: AtomicBool::new(settings.status),
            stop: CancellationToken::new(),
            reports: TaskTracker::new(),
            settings,
        });
        let agents = TaskTracker::new();
        for (index, machine) in machines.into_iter().enumerate() {
            let agent = agent::Agent::new(index, machine, shared.clone());
            let stop = shared.stop.clone();
            agents.spawn_on(
                async move {
                    tokio::select! {
                        () = agent.live() => {}
                        () = stop.cancelled() => {}
                    }
                },
                runtime.handle(),
            );
        }
        agents.close();
        Self { shared, agents, runtime: Some(runtime) }
    }

    /// The sums now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.record.counts()
    }

    /// Every dispatch that came, in order, those that came again included.
    #[must_use]
    pub fn receipts(&self) -> Vec<Receipt> {
        self.shared.record.receipts()
    }

    /// Every dispatch that was begun, in order.
    #[must_use]
    pub fn executions(&self) -> Vec<Execution> {
        self.shared.record.executions()
    }

    /// How long things took since the start, or since [`Self::forget_latencies`].
    #[must_use]
    pub fn latencies(&self) -> Latencies {
        self.shared.record.latencies()
    }

    /// Begins new histograms.
    pub fn forget_latencies(&self) {
        self.shared.record.forget_latencies();
    }

    /// From now on agents connect here; open connections stay.
    pub fn move_to(&self, apis: impl IntoIterator<Item = Url>) {
        *self.shared.apis.write().unwrap_or_else(PoisonError::into_inner) = apis.into_iter().collect();
    }

    /// Whether agents report their status after a connect from now on.
    pub fn report_status(&self, on: bool) {
        self.shared.status.store(on, Ordering::Relaxed);
    }

    /// These agents, by their place among the machines, leave now and try to come back after `away`.
    pub fn vanish(&self, agents: Range<usize>, how: Departure, away: Duration) {
        let back = Instant::now() + away;
        for slot in self.shared.slots.get(agents).unwrap_or_default() {
            *lock(&slot.order) = Some((how, back));
            slot.wake.notify_one();
        }
    }

    /// Waits until the sums are as wanted.
    ///
    /// # Panics
    /// With `what` and the sums when they are not within `limit`.
    pub async fn until(&self, what: &str, limit: Duration, wanted: impl Fn(&Counts) -> bool) -> Counts {
        let deadline = Instant::now() + limit;
        loop {
            let counts = self.counts();
            if wanted(&counts) {
                return counts;
            }
            assert!(Instant::now() < deadline, "not within {limit:?}: {what}; {counts:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends all agents; connections are closed without a good-bye.
    pub async fn stop(self) {
        self.shared.stop.cancel();
        self.agents.wait().await;
    }

    /// How many agents have a registered socket.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.shared.record.sums.connected.load(Ordering::Relaxed)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet").field("agents", &self.shared.slots.len()).field("counts", &self.counts()).finish()
    }
}

/// Nothing under these locks can panic half-way, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
