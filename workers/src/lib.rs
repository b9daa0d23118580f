//! Where work runs: the worker process. It runs workflow steps, leads or stands by as scheduler, recovers the runs of dead
//! workers, and enforces deadlines and retention. It reaches agents through the API process only.

pub mod api_client;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use borealis_engine::{Result, db, jobs::store};
use borealis_tasks::Tasks;
use borealis_workflows::{
    Agents, Registry, Services,
    durable::{DEFAULT_LANE, POLL_EVERY, connect::Connect, observer, wakeup, worker},
    hold, housekeeping, metrics, scheduler, traces,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How often a worker says that it is alive.
const SEEN_EVERY: Duration = Duration::from_secs(5);

/// Settings of a worker process.
#[derive(Debug, Clone)]
pub struct Options {
    /// This process: new at every start.
    pub id: Uuid,
    /// The most steps run at the same time.
    pub concurrency: usize,
    /// How long finished runs are kept, in days.
    pub history_days: i32,
    /// Whether this process may schedule and keep house, besides running steps.
    pub duties: bool,
}

/// A name no other process start has: host, pid and the process's id.
#[must_use]
pub fn name(id: Uuid) -> String {
    let host = nix::unistd::gethostname().ok().and_then(|host| host.into_string().ok()).unwrap_or_else(|| "worker".to_owned());
    let short = id.simple().to_string();
    format!("{host}:{}:{}", std::process::id(), short.get(24..).unwrap_or(&short))
}

/// Serves `/metrics` of this worker until `stop`; answers where.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve_metrics(
    addr: SocketAddr,
    pool: &db::Pool,
    stop: CancellationToken,
) -> Result<SocketAddr, borealis_telemetry::Error> {
    metrics::show();
    api_client::show();
    metrics::serve(addr, pool, || {}, stop).await
}

/// Runs a worker process until `stop`, then drains: steps get a few seconds to end, their runs are never lost. While Postgres is away it
/// waits.
pub async fn run(pool: db::Pool, agents: Arc<dyn Agents>, registry: Registry, options: Options, stop: CancellationToken) {
    let name = name(options.id);
    let pool = db::sibling(&pool, pool.options().get_max_connections(), &worker::PLANS);
    let services = Services { pool: pool.clone(), agents };
    tracing::info!(name, concurrency = options.concurrency, "worker starts");
    let tasks = Tasks::new(stop.clone());
    let connect = connect(&pool);
    observer::observe(traces::Traces);
    let (keeper, gate) = hold::closed();
    tasks.keep("gate", {
        let (keeper, pool, agents, stop) = (Arc::new(keeper), pool.clone(), services.agents.clone(), stop.clone());
        move || {
            let (keeper, pool, agents, stop) = (keeper.clone(), pool.clone(), agents.clone(), stop.clone());
            async move { keeper.keep(pool, agents, stop).await }
        }
    });
    if options.duties {
        let wakeup = wakeup::Wakeup::spawn(connect.clone(), [], &[store::SCHEDULE_CHANGED], &tasks);
        // A connection of its own: what is due must not wait behind steps.
        let scheduling = db::sibling(&pool, 1, &worker::PLANS);
        tasks.keep("scheduler", {
            let (name, gate, stop) = (name.clone(), gate.clone(), stop.clone());
            move || scheduler::keep(scheduling.clone(), wakeup.clone(), name.clone(), gate.clone(), stop.clone())
        });
        tasks.keep("housekeeping", {
            let (services, days, gate, stop) = (services.clone(), options.history_days, gate.clone(), stop.clone());
            move || housekeeping::keep(services.clone(), days, gate.clone(), stop.clone())
        });
    }
    tasks.keep("presence", {
        let (pool, id, name, stop) = (pool.clone(), options.id, name.clone(), stop.clone());
        move || presence(pool.clone(), id, name.clone(), stop.clone())
    });
    let options = worker::Options {
        name,
        lanes: BTreeMap::from([(DEFAULT_LANE, options.concurrency.max(1))]),
        places: vec![worker::ANYWHERE.to_owned()],
        poll_every: POLL_EVERY,
        gate: gate.acts(),
        connect,
        tasks: tasks.clone(),
    };
    worker::run(registry, services, options, stop).await;
    tasks.end_within(Duration::from_secs(2)).await;
}

/// The runtime's own pools are made as all of the engine's are, and watched for as long as the runtime lives.
fn connect(pool: &db::Pool) -> Connect {
    let (main, watched) = (pool.clone(), Mutex::new(vec![db::watch("steps", pool)]));
    Connect::with(move |name, max_connections, settings| {
        let made = db::sibling(&main, max_connections, settings);
        if name != "listen" {
            watched.lock().unwrap_or_else(PoisonError::into_inner).push(db::watch(name, &made));
        }
        made
    })
}

/// Keeps this process's row in `workers`.
async fn presence(pool: db::Pool, id: Uuid, name: String, stop: CancellationToken) {
    let host = name.split(':').next().unwrap_or_default().to_owned();
    let mut every = tokio::time::interval(SEEN_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(every.tick()).await.is_some() {
        if let Err(error) = borealis_workflows::workers::seen(&pool, id, &name, &host, std::process::id()).await {
            tracing::debug!(?error, "presence not written");
        }
    }
    let _ = borealis_workflows::workers::stopped(&pool, id).await;
}
