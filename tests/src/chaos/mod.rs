//! `./borealis chaos`: an engine of real processes under load while its parts are killed, frozen, cut off and slowed down, in
//! an order that a seed decides; then quiet, and a reckoning of all that was promised.
//!
//! * [`work`]: what is asked of the engine, and what it has accepted.
//! * [`faults`]: what happens to it meanwhile.
//! * [`clocks`]: how the clock of one process is turned.
//! * [`real`]: the real agent beside the simulated fleet.
//! * [`reckoning`]: whether everything accepted came to a true end, once.

mod clocks;
mod faults;
pub(crate) mod real;
mod reckoning;
mod work;

use std::time::{Duration, Instant};

use rand::{SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;

use crate::{
    Child, House, Proxy, TestCluster, TestDatabase,
    fleet::{Fleet, Settings, Work, identity},
    probe,
};

/// How long the engine may take to come to rest once nothing disturbs it any more.
pub const QUIET: Duration = Duration::from_secs(30);

/// How much happens.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// How long faults are made, in seconds.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// What decides the faults and the work; printed, so that a run can be made again.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Workflow runs that are started meanwhile.
    #[arg(long, default_value_t = 2_000)]
    pub runs: usize,
    /// Simulated agents that jobs are dispatched to.
    #[arg(long, default_value_t = 100)]
    pub agents: usize,
    /// Say what is done to the engine, and when.
    #[arg(long)]
    pub trace: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The seed it was made from.
    pub seed: u64,
    /// What was done and seen, in a few lines.
    pub summary: Vec<String>,
    /// Promises that were broken; none when all is well.
    pub broken: Vec<String>,
}

/// An engine of which every part can be disturbed.
pub(crate) struct Scene {
    /// The server; none while it is down.
    cluster: Option<TestCluster>,
    house: House,
    /// The ways to Postgres: of the API processes, then of the workers.
    proxies: Vec<Proxy>,
    workers: Vec<Option<Child>>,
    fleet: Fleet,
    agents: usize,
    real: real::RealAgent,
    /// The clocks of the API processes, then of the workers, then of the real agent; none where they cannot be turned.
    clocks: Option<clocks::Clocks>,
    /// When it began, where that is to be told.
    traced: Option<Instant>,
}

/// API processes of a scene.
const APIS: usize = 2;
/// Workers of a scene.
const WORKERS: usize = 3;
/// The clock of the real agent.
const AGENT_CLOCK: usize = APIS + WORKERS;
/// Clocks of a scene.
const CLOCKS: usize = AGENT_CLOCK + 1;
/// Lines of Postgres's log that are shown when a promise was broken.
const LAST_WORDS: usize = 100;

impl Scene {
    async fn open(options: &Options) -> Self {
        let cluster = TestCluster::durable().await;
        let database = TestDatabase::on(cluster.url()).await;
        probe::create_tables(&database.pool).await;
        let mut proxies = Vec::new();
        for _ in 0..APIS + WORKERS {
            proxies.push(Proxy::start(&database.url).await);
        }
        let ways: Vec<_> = proxies.iter().map(|proxy| proxy.url(&database.url)).collect();
        let clocks = clocks::Clocks::new(CLOCKS);
        let dress = |index: usize, processes: &mut crate::Processes| {
            if let Some(clocks) = &clocks {
                clocks.wear(index, processes);
            }
        };
        let mut house = House::open_with(database, ways.get(..APIS).unwrap_or_default(), &[], dress).await;
        let mut workers = Vec::new();
        for (index, way) in ways.iter().enumerate().skip(APIS) {
            house.processes.set("DATABASE_URL", way.as_str());
            dress(index, &mut house.processes);
            workers.push(Some(house.processes.start("test-worker", &[])));
        }
        dress(AGENT_CLOCK, &mut house.processes);
        let real = real::RealAgent::admitted(&mut house.processes, &house.admin, house.site).await;
        let machines = identity::write(&house.database.pool, &house.keys(), house.site, "fleet", options.agents).await;
        let fleet = Fleet::start(
            machines,
            Settings {
                work: Work::of(|_| Work {
                    takes: Duration::from_millis(rand::random_range(0..1_500)),
                    chunks: 2,
                    ..Work::default()
                }),
                heartbeat: Some(Duration::from_secs(5)),
                ..Settings::at(house.apis.iter().map(|api| api.base.clone()))
            },
        );
        let agents = options.agents;
        fleet.until("the fleet is connected", Duration::from_secs(60), |counts| counts.connected == agents as u64).await;
        let traced = options.trace.then(Instant::now);
        Self { cluster: Some(cluster), house, proxies, workers, fleet, agents, real, clocks, traced }
    }

    /// Tells what happens, if that is wanted.
    fn say(&self, what: &str) {
        if let Some(began) = self.traced {
            eprintln!("{:8.3} {} {what}", began.elapsed().as_secs_f64(), chrono::Utc::now().format("%T%.3f"));
        }
    }

    async fn start_api(&mut self, index: usize) {
        if let Some(clocks) = &self.clocks {
            clocks.wear(index, &mut self.house.processes);
        }
        self.house.restart(index).await;
    }

    fn start_worker(&mut self, index: usize) {
        let Some(proxy) = self.proxies.get(APIS + index) else { return };
        let way = proxy.url(&self.house.database.url);
        self.house.processes.set("DATABASE_URL", way.as_str());
        if let Some(clocks) = &self.clocks {
            clocks.wear(APIS + index, &mut self.house.processes);
        }
        let worker = self.house.processes.start("test-worker", &[]);
        if let Some(place) = self.workers.get_mut(index) {
            *place = Some(worker);
        }
    }
}

/// Makes one run of chaos.
pub async fn run(options: &Options) -> Outcome {
    let seed = options.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    eprintln!("chaos with seed {seed}: {} s of faults, {} runs, {} agents", options.seconds, options.runs, options.agents);
    let mut scene = Scene::open(options).await;
    if scene.clocks.is_none() {
        eprintln!("no clock is turned: libfaketime is not installed (apt-get install libfaketime)");
    }
    let lasts = Duration::from_secs(options.seconds);
    let stop = CancellationToken::new();
    let admins = scene.house.apis.iter().map(|api| scene.house.admin.at(&api.base)).collect();
    let pool = scene.house.database.pool.clone();
    let script = scene.real.script();
    let working = async {
        let accepted = work::run(&pool, admins, StdRng::seed_from_u64(seed), options.runs, lasts, &script, &stop).await;
        (accepted, Instant::now())
    };
    let disturbing = async {
        let made = faults::make(&mut scene, StdRng::seed_from_u64(seed ^ 0x5eed), lasts).await;
        stop.cancel();
        (made, Instant::now())
    };
    let ((accepted, asked), (made, quiet)) = tokio::join!(working, disturbing);
    let (at_rest, mut broken) = reckoning::reckon(&scene, &accepted, quiet + QUIET).await;
    let (wrong, of_the_real) = scene.real.reckon(&pool).await;
    broken.extend(wrong);
    let counts = scene.fleet.counts();
    let summary = vec![
        format!("faults: {}", made.iter().map(|(name, times)| format!("{times} x {name}")).collect::<Vec<_>>().join(", ")),
        format!(
            "accepted: {} runs, of them {} asked to cancel; {} jobs on {} agents, {} dispatches executed, {} results sent again, {} because nobody answered",
            accepted.runs.len(),
            accepted.cancels.len(),
            accepted.jobs.len(),
            scene.agents,
            counts.executed,
            counts.resent,
            counts.unanswered
        ),
        of_the_real,
        format!("all was accepted {:.1} s after the last fault", asked.saturating_duration_since(quiet).as_secs_f64()),
        match at_rest {
            Some((after, last)) => format!("at rest {:.1} s after the last fault; the last to end: {last}", after.as_secs_f64()),
            None => format!("not at rest {} s after the last fault, {} agents connected", QUIET.as_secs(), counts.connected),
        },
    ];
    if !broken.is_empty() {
        scene.house.processes.show_logs();
        if let Some(cluster) = &scene.cluster {
            eprintln!("---- Postgres ----\n{}", cluster.last_words(LAST_WORDS));
        }
    }
    scene.fleet.stop().await;
    Outcome { seed, summary, broken }
}
