//! Starts the listeners and everything else that an API process does, and stops them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use borealis_engine::{
    Error, Kind,
    access::aegis::Vault,
    db::{self, Pool},
    egress,
    hold::Guard,
    keys::Keys,
    time_zones,
};
use borealis_tasks::Tasks;
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    access, app, audit_webhook,
    connections::{self, Door},
    event_streams::EventStreams,
    internal, metrics, reconcilers,
    room::RoomOfAll,
    sockets::Hub,
    state::{App, Inner, Settings},
};

/// How long after a failed look at the secret store the next one follows.
const PREPARE_RETRY: Duration = Duration::from_secs(5);

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
    _watched: db::Watched,
}

impl Running {
    /// Waits until both listeners are closed and the requests in flight have been answered, after the token given to
    /// [`serve`] was cancelled.
    pub async fn wait(self) {
        self.app.tasks.ended().await;
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
    if settings.internal_url.port() == Some(0) && settings.internal_url.set_port(Some(internal_addr.port())).is_err() {
        return Err(Error::invalid("invalid_setting", "The internal URL cannot have a port."));
    }
    egress::provide_tls();
    time_zones::load(settings.zoneinfo.clone())?;
    let keys = Keys::load_or_create(&settings.state_dir.join("secrets"), Some(&settings.engine_secret_file))?;
    let tasks = Tasks::new(shutdown.clone());
    let app = App::new(Inner {
        tasks: tasks.clone(),
        pool,
        process_id: uuid::Uuid::now_v7(),
        shutdown: shutdown.clone(),
        guard: Arc::new(Guard::new(&settings.state_dir)),
        vault: Vault::new(settings.unseal.clone()),
        settings,
        keys,
        hub: Hub::default(),
        streams: EventStreams::default(),
        rooms: RoomOfAll::default(),
    });
    let (router, ..) = app::build(&app);
    let internal_router = internal::router(&app, borealis_workflows::registry());
    if let Some(metrics) = app.settings.exports.metrics_listen.0 {
        metrics::serve(metrics, &app, shutdown.clone()).await?;
    }
    let watched = db::watch("requests", &app.pool);
    tasks.keep_until_done("prepare", {
        let app = app.clone();
        move || prepare(app.clone())
    });
    reconcilers::start(&tasks, &app);
    if let Some(webhook) = app.settings.audit_webhook.clone() {
        let (app, shutdown) = (app.clone(), shutdown.clone());
        tasks.keep("audit_webhook", move || audit_webhook::run(app.clone(), webhook.clone(), shutdown.clone()));
    }
    let door =
        Door { proxies: Arc::new(app.settings.trusted_proxies.clone()), per_address: Some(app.settings.connections_per_address) };
    for (name, listener, router, door) in
        [("public_listener", public, router, door), ("internal_listener", internal, internal_router, Door::default())]
    {
        let (listener, shutdown) = (Arc::new(listener), shutdown.clone());
        tasks.keep(name, move || connections::accept(listener.clone(), router.clone(), door.clone(), shutdown.clone()));
    }
    tasks.keep("sockets", {
        let (app, shutdown) = (app.clone(), shutdown);
        move || app.hub.clone().run(app.clone(), shutdown.clone())
    });
    tracing::info!(%addr, %internal_addr, "listening");
    Ok(Running { addr, internal_addr, app, _watched: watched })
}

/// Does [`access::prepare`], as soon as Postgres is there. Nothing waits for it: what is not done yet is done when needed.
async fn prepare(app: App) {
    while let Err(error) = access::prepare(&app).await {
        tracing::warn!(%error, "the secret store could not be looked at; trying again");
        sleep(PREPARE_RETRY).await;
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
