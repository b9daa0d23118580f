//! Starts the listeners and everything else that an API process does, and stops them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use borealis_engine::{
    Actor, Error, Kind,
    access::{
        aegis::{Handover, Vault},
        directory::sync,
        setup_token,
    },
    audit::chain,
    db::{self, Pool},
    hold::Guard,
    keys::Keys,
    time_zones,
};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    access, app, audit_webhook,
    connections::{self, Door},
    internal, metrics,
    room::RoomOfAll,
    routes,
    sockets::Hub,
    state::{App, Inner, Settings},
};

/// How often it is looked for audit events to seal.
const SEAL_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether the audit has to be checked.
const CHECK_LOOK_EVERY: Duration = Duration::from_secs(15 * 60);
/// How often it is checked.
const CHECK_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How often it is looked for directories to sync.
const SYNC_LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether another process has changed the secret store.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);
/// How often the keys on disk are read again; a rotation waits for that.
pub const KEYS_EVERY: Duration = Duration::from_secs(2);
/// How often it is looked whether the engine is held.
const EPOCH_EVERY: Duration = Duration::from_secs(1);
/// How often the log says that the engine is held.
const HELD_SAID_EVERY: Duration = Duration::from_secs(60);
/// How often the rules of time zones are read again.
const TIME_ZONES_EVERY: Duration = Duration::from_secs(60);
/// How long after a failure the unseal key is asked for again; it doubles up to [`UNSEAL_LONGEST_PAUSE`].
const UNSEAL_FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before the unseal key is asked for again.
const UNSEAL_LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long after a failed look at the secret store the next one follows, in seconds.
const PREPARE_RETRY_S: u64 = 5;

/// Lets this process have as many files open as it may: every agent's socket is one, and the usual limit is 1,024.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// A running API process.
#[derive(Debug)]
pub struct Running {
    /// Where the public listener is bound.
    pub addr: SocketAddr,
    /// Where the internal listener is bound.
    pub internal_addr: SocketAddr,
    /// The state the handlers see.
    pub app: App,
    tasks: JoinSet<()>,
    _watched: db::Watched,
}

impl Running {
    /// Waits until both listeners are closed and the requests in flight have been answered, after the token given to
    /// [`serve`] was cancelled.
    pub async fn wait(mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Binds the public and the internal listener and serves until `shutdown` is cancelled. Port 0 binds a free port; a
/// public base URL with port 0 gets the public listener's.
///
/// # Errors
/// `listen_failed` when an address cannot be bound; those of [`Keys::load_or_create`].
pub async fn serve(mut settings: Settings, pool: Pool, shutdown: CancellationToken) -> borealis_engine::Result<Running> {
    let (public, addr) = bind(settings.listen).await?;
    let (internal, internal_addr) = bind(settings.internal_listen).await?;
    if settings.public_base_url.port() == Some(0) && settings.public_base_url.set_port(Some(addr.port())).is_err() {
        return Err(Error::invalid("invalid_setting", "The public base URL cannot have a port."));
    }
    time_zones::load(settings.zoneinfo.clone())?;
    let keys = Keys::load_or_create(&settings.state_dir.join("secrets"), Some(&settings.engine_secret_file))?;
    let app = App::new(Inner {
        pool,
        process_id: uuid::Uuid::now_v7(),
        shutdown: shutdown.clone(),
        guard: Arc::new(Guard::new(&settings.state_dir)),
        vault: Vault::new(settings.unseal.clone()),
        settings,
        keys,
        hub: Hub::default(),
        rooms: RoomOfAll::default(),
    });
    let (router, ..) = app::build(&app);
    let internal_router = internal::router(&app, borealis_workflows::registry());
    if let Some(metrics) = app.settings.exports.metrics_listen.0 {
        metrics::serve(metrics, &app, shutdown.clone()).await?;
    }
    let watched = db::watch("requests", &app.pool);
    let mut tasks = JoinSet::new();
    tasks.spawn(prepare(app.clone(), shutdown.clone()));
    tasks.spawn(keep_open(app.clone(), shutdown.clone()));
    tasks.spawn(read_keys(app.clone(), shutdown.clone()));
    tasks.spawn(watch_epoch(app.clone(), shutdown.clone()));
    tasks.spawn(read_time_zones(shutdown.clone()));
    tasks.spawn(seal_audit(app.clone(), shutdown.clone()));
    tasks.spawn(check_audit(app.clone(), shutdown.clone()));
    if let Some(webhook) = app.settings.audit_webhook.clone() {
        tasks.spawn(audit_webhook::run(app.clone(), webhook, shutdown.clone()));
    }
    tasks.spawn(sync_directories(app.clone(), shutdown.clone()));
    let door =
        Door { proxies: Arc::new(app.settings.trusted_proxies.clone()), per_address: Some(app.settings.connections_per_address) };
    tasks.spawn(connections::accept(public, router, door, shutdown.clone()));
    tasks.spawn(connections::accept(internal, internal_router, Door::default(), shutdown.clone()));
    tasks.spawn(app.hub.clone().run(app.clone(), shutdown));
    tracing::info!(%addr, %internal_addr, "listening");
    Ok(Running { addr, internal_addr, app, tasks, _watched: watched })
}

/// Does [`access::prepare`], as soon as Postgres is there. Nothing waits for it: what is not done yet is done when needed.
async fn prepare(app: App, shutdown: CancellationToken) {
    while let Err(error) = access::prepare(&app).await {
        tracing::warn!(%error, "the secret store could not be looked at; trying again");
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = sleep(Duration::from_secs(PREPARE_RETRY_S)) => {}
        }
    }
}

/// Watches over the epoch, and says in the log when the engine is held, and again every minute.
async fn watch_epoch(app: App, shutdown: CancellationToken) {
    let mut every = tokio::time::interval(EPOCH_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut said, mut trouble) = (None, None);
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        let standing = match app.guard.look(&app.pool).await {
            Ok(standing) => standing,
            Err(error) => {
                // That the database is away is said elsewhere.
                if error.kind != Kind::Unavailable || error.code == "state_folder_unusable" {
                    if trouble.as_ref() != Some(&error.message) {
                        tracing::error!(%error, source = ?error.source, "nothing is scheduled and nothing is dispatched by this process");
                    }
                    trouble = Some(error.message);
                }
                continue;
            }
        };
        trouble = None;
        metrics::METERS.held.set(i64::from(standing.held.is_some()));
        match standing.held {
            Some(held) if said.is_none_or(|at: tokio::time::Instant| at.elapsed() >= HELD_SAID_EVERY) => {
                tracing::error!(
                    since = %held.since, why = %held.reason, by = held.by,
                    "THE ENGINE IS HELD: nothing is scheduled and nothing is dispatched. `borealis-api admin release` shows what would \
                     happen, and releases it"
                );
                said = Some(tokio::time::Instant::now());
            }
            Some(_) => {}
            None => {
                if said.take().is_some() {
                    tracing::info!(epoch = standing.at_least, "the engine is released");
                }
            }
        }
    }
}

/// Follows updates of the rules of time zones.
async fn read_time_zones(shutdown: CancellationToken) {
    let mut every = tokio::time::interval(TIME_ZONES_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    every.reset();
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        // What it finds is in the log; reading files is not for this thread.
        let _ = tokio::task::spawn_blocking(time_zones::refresh).await;
    }
}

/// Follows rotations of the keys on disk.
async fn read_keys(app: App, shutdown: CancellationToken) {
    let mut every = tokio::time::interval(KEYS_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut trouble = None;
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        match app.keys.read_again() {
            Ok(changed) => {
                if changed {
                    tracing::info!("the keys on disk have changed");
                }
                trouble = None;
            }
            Err(error) => {
                if trouble.as_ref() != Some(&error.message) {
                    tracing::error!(why = %error.message, "the keys on disk cannot be read again; what was read before counts");
                }
                trouble = Some(error.message);
            }
        }
    }
}

/// Follows what other processes do with the secret store, hands its key over, and opens it with a key that somebody else keeps. Requests
/// do not: such a key may be slow to get, and asking for it is not for everybody who knocks.
async fn keep_open(app: App, shutdown: CancellationToken) {
    let vault = &app.vault;
    let mut handover = Handover::new(app.process_id);
    let mut every = tokio::time::interval(FOLLOW_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The data key that is known to be wrapped by the key of somebody else's.
    let mut settled = None;
    let (mut pause, mut next) = (UNSEAL_FIRST_PAUSE, tokio::time::Instant::now());
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        let mut open = match vault.follow(&app.pool).await {
            Ok(open) => open,
            Err(error) => {
                tracing::debug!(%error, "the secret store could not be looked at");
                continue;
            }
        };
        match handover.step(&app.pool, vault, &app.keys).await {
            Ok(opened) => {
                if opened {
                    tracing::info!("another process has opened the secret store here");
                    setup_token::remove(&app.pool, &app.settings.state_dir).await;
                }
                open |= opened;
            }
            Err(error) => tracing::debug!(%error, "the key of the secret store could not be handed over"),
        }
        let done = open && settled.is_some() && settled == vault.key_id();
        if !vault.unseal().is_foreign() || done || tokio::time::Instant::now() < next {
            continue;
        }
        let Some(ended) = shutdown.run_until_cancelled(vault.settle(&app.pool)).await else { return };
        match ended {
            Ok(key_id) => {
                if key_id.is_some() && !open {
                    tracing::info!("the secret store was opened with the unseal key");
                }
                settled = key_id;
                pause = UNSEAL_FIRST_PAUSE;
            }
            Err(error) => {
                let state = if open { "is open, but a restart would leave it locked" } else { "stays locked" };
                tracing::warn!(why = %error.message, state, again_in_s = pause.as_secs(), "no unseal key for the secret store");
                next = tokio::time::Instant::now() + pause;
                pause = (pause * 2).min(UNSEAL_LONGEST_PAUSE);
            }
        }
    }
}

/// Seals what the audit says, a moment after it was written. One process at a time does, and only one that is not locked can.
async fn seal_audit(app: App, shutdown: CancellationToken) {
    let mut every = tokio::time::interval(SEAL_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        while app.vault.is_open() {
            match chain::seal(&app.pool, &app.vault).await {
                Ok(sealed) if i64::try_from(sealed).is_ok_and(|sealed| sealed == chain::BATCH) => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "audit events wait to be sealed");
                    break;
                }
            }
        }
    }
}

/// Checks once a day that nobody has changed the audit. Each process does, by its own clock: who can write to the database must not be
/// able to say that it was done.
async fn check_audit(app: App, shutdown: CancellationToken) {
    let mut every = tokio::time::interval(CHECK_LOOK_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A process that starts has something else to do.
    every.reset();
    let mut checked: Option<tokio::time::Instant> = None;
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        if !app.vault.is_open() || checked.is_some_and(|at| at.elapsed() < CHECK_EVERY) {
            continue;
        }
        match chain::check_and_note(&app.pool, &app.vault).await {
            Ok(report) => {
                checked = Some(tokio::time::Instant::now());
                metrics::METERS.audit_broken.set(i64::from(report.broken.is_some()));
                match report.broken {
                    Some(broken) => tracing::error!(
                        seq = broken.seq,
                        event_id = broken.event_id,
                        why = broken.why,
                        "THE AUDIT WAS TAMPERED WITH; see GET /api/audit/check"
                    ),
                    None => tracing::info!(checked = report.checked, head = report.head, "the audit is whole"),
                }
            }
            Err(error) => tracing::warn!(%error, "the audit could not be checked"),
        }
    }
}

/// Looks the accounts of directories up again when their time has come. A provider is synced by one process at a time.
async fn sync_directories(app: App, shutdown: CancellationToken) {
    let mut every = tokio::time::interval(SYNC_LOOK_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(every.tick()).await.is_some() {
        while app.vault.is_open() && !shutdown.is_cancelled() {
            let provider = match sync::due(&app.pool).await {
                Ok(Some(provider)) => provider,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "directories wait to be synced");
                    break;
                }
            };
            let system = Actor::system();
            // A task of its own, because what a broken server answers may make the library panic.
            match tokio::spawn(routes::directory::sync_and_tell(app.clone(), system, provider, false)).await {
                Ok(Ok(synced)) => tracing::debug!(provider, message = synced.message(), "a directory was synced"),
                Ok(Err(error)) => tracing::warn!(provider, %error, "a directory was not synced"),
                Err(error) => tracing::error!(provider, %error, "a sync of a directory broke off"),
            }
        }
    }
}

async fn bind(addr: SocketAddr) -> borealis_engine::Result<(TcpListener, SocketAddr)> {
    let failed = |error: std::io::Error| {
        let mut failed = Error::new(Kind::Unavailable, "listen_failed", format!("Cannot listen on {addr}: {error}"));
        failed.source = Some(Box::new(error));
        failed
    };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}
