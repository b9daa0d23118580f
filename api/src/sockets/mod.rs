//! The sockets of agents and operators.
//!
//! Two Socket.IO servers stand behind one path: machines and people are told apart at the upgrade and never meet, so no
//! operator's event can reach an agent. Both are joined with those of other API processes through Postgres.

mod agents;
mod bus;
mod calls;
mod deliver;
pub mod events;
mod flapping;
mod frames;
mod people;
mod reach;
mod registry;
mod results_intake;
mod said;
mod upgrade;
mod wire;

use std::{
    convert::Infallible,
    sync::{Arc, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use borealis_engine::{
    bus::Heard,
    db::Pool,
    devices::sockets::{self, Finding, Mode},
    hold::Guard,
    internal,
    jobs::delivery,
    keys::Keys,
};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use serde_json::Value;
use socketioxide::{
    SocketIo, SocketIoBuilder, TransportType, adapter::Emitter, extract::SocketRef, handler::ConnectHandler,
    service::SocketIoService,
};
use socketioxide_postgres::{CustomPostgresAdapter, PostgresAdapterConfig, PostgresAdapterCtr};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{access::Class, internal::peers::Peers, room::Room, state::App};
pub use calls::{AT_ONCE as CALLS_AT_ONCE, Through};
use events::ToOperator;

/// How Socket.IO servers of one kind find each other.
type Adapter = CustomPostgresAdapter<Emitter, bus::Bus>;
type Service = SocketIoService<Nothing, Adapter>;

/// The largest message of an agent, in bytes: a report with both outputs in full, escaped. A longer one is shortened.
pub const AGENT_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// What a message that was shortened may have beyond that, in bytes.
const SHORTENED_BYTES: usize = 4 * 1024;
/// The largest message of an operator, in bytes.
pub const OPERATOR_MESSAGE_BYTES: usize = 256 * 1024;

/// How often a peer is asked whether it is there.
pub const PING_INTERVAL: Duration = Duration::from_secs(25);
/// How long a peer may take to answer.
pub const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the library waits for an agent's answer. It knows of nothing but answers, and an agent in the middle of a long
/// message or of a script may not be able to give one, so the silence of agents is judged by [`registry::Agent::watch`].
pub const AGENT_LIBRARY_PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The channel on which API processes tell each other that they are there, and to close sockets.
const DROP_CHANNEL: &str = "borealis_drop";
/// How often the sockets here are compared with the database; a revoked one is closed within two rounds.
const SWEEP: Duration = Duration::from_secs(2);
/// How long a machine may take to register.
const REGISTER: Duration = Duration::from_secs(60);
/// Events to operators that wait to be sent; further ones are dropped, which a client notices at its next look.
const EVENTS: usize = 20_000;
/// Events on their way at once.
const EVENTS_AT_ONCE: usize = 256;
/// Connections of the hub's own pool: three listeners, and what is told.
const POOL: u32 = 8;

/// The handle through which the rest of the API process reaches sockets, its own and those of other API processes.
#[derive(Clone, Default)]
pub struct Hub(Arc<OnceLock<Arc<Running>>>);

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("sockets", &self.0.get().map(|running| running.registry.open())).finish()
    }
}

/// A hub that has been started.
struct Running {
    guard: Arc<Guard>,
    pool: Pool,
    /// Connections that no request and no sweep waits for.
    hub_pool: Pool,
    bus: bus::Bus,
    reach: reach::Reach,
    process_id: Uuid,
    keys: Keys,
    session_idle_s: u32,
    /// Where others reach the internal listener of this process.
    internal_url: String,
    peers: Peers,
    /// The memory that answers to calls may take while they are read.
    answers: Arc<Room>,
    registry: Arc<registry::Registry>,
    gate: upgrade::Gate,
    lobby: agents::Lobby,
    intake: Arc<results_intake::Intake>,
    wanted: deliver::Wanted,
    agents: SocketIo<Adapter>,
    agents_service: Service,
    people: SocketIo<Adapter>,
    people_service: Service,
    company: Company,
    events: mpsc::Sender<Event>,
    waiting_events: Mutex<mpsc::Receiver<Event>>,
}

/// Whether other API processes share the sockets. While there is none, nothing is told through Postgres: ten thousand agents
/// are twenty thousand events a job.
#[derive(Debug, Default)]
struct Company(std::sync::Mutex<Seen>);

#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    alone: bool,
    /// Processes that have said hello; a look at the table from before one of them says nothing.
    hellos: u64,
}

impl Company {
    fn seen(&self) -> Seen {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another process has started.
    fn hello(&self) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = Seen { alone: false, hellos: seen.hellos + 1 };
    }

    /// What the table of processes said, when it was looked at after `before`.
    fn note(&self, before: Seen, alone: bool) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.alone = alone && seen.hellos == before.hellos;
    }
}

enum Event {
    Site { site: Option<i64>, event: ToOperator, payload: Value },
    Drop(String),
    Deliver(Vec<Uuid>),
}

/// Stands behind the socket servers, which are given upgraded connections only and so never turn to it.
#[derive(Debug, Clone)]
struct Nothing;

/// The routes of sockets. They authenticate by themselves, at the upgrade.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/socket.io/", get(upgrade::plain))
        .route("/_borealis/site-workers/{worker}/socket.io/", get(upgrade::through_worker))
}

impl Hub {
    fn running(&self) -> Option<&Arc<Running>> {
        self.0.get()
    }

    /// Sockets of agents and of operators that are here, and reports that wait to be applied.
    pub fn figures(&self) -> (usize, usize, usize) {
        self.running().map_or((0, 0, 0), |running| {
            let (agents, people) = running.registry.count_each();
            (agents, people, running.intake.waiting())
        })
    }

    /// Tells the operators who may see `site` (administrators for none) that something changed.
    pub async fn to_site(&self, site: Option<i64>, event: ToOperator, payload: Value) {
        if let Some(running) = self.running() {
            running.tell_site(site, event, payload);
        }
    }

    /// Sends what is ready for these devices to those of them that are connected, to any API process.
    pub async fn deliver(&self, devices: &[Uuid]) {
        let Some(running) = self.running() else { return };
        let (here, elsewhere) = running.registry.split(devices);
        if !here.is_empty() {
            running.wanted.look(here);
        }
        if !elsewhere.is_empty() {
            running.tell(Event::Deliver(elsewhere));
        }
    }

    /// Writes an event to a device's sockets, on any API process. Whether one is there; not whether it arrived.
    pub async fn emit(&self, device: Uuid, event: &str, payload: &Value) -> borealis_engine::Result<bool> {
        let Some(running) = self.running() else { return Ok(false) };
        if sockets::connected(&running.pool, &[device]).await?.is_empty() {
            return Ok(false);
        }
        let Some(server) = running.agents.of("/") else { return Ok(false) };
        server.to(agents::room(device)).emit(event, payload).await.map_err(|error| {
            borealis_engine::Error::new(
                borealis_engine::Kind::Unavailable,
                "agent_unavailable",
                format!("The event was not sent: {error}"),
            )
        })?;
        Ok(true)
    }

    /// Closes every socket of a device: its token version changed, it was purged, revoked or moved to another site.
    pub async fn drop_device(&self, device: Uuid) {
        if let Some(running) = self.running() {
            running.registry.cut_device(device);
            running.tell_drop(format!("device:{device}"));
        }
    }

    /// Closes every socket opened with an operator session that has ended.
    pub async fn drop_session(&self, session: Uuid) {
        if let Some(running) = self.running() {
            running.registry.cut_session(session);
            running.tell_drop(format!("session:{session}"));
        }
    }

    /// Runs the sockets of this process until `shutdown`, then closes them and takes them out of the database.
    pub async fn run(self, app: App, shutdown: CancellationToken) {
        let pool = borealis_engine::db::sibling(&app.pool, POOL, &[]);
        let _watched = borealis_engine::db::watch("sockets", &pool);
        // Started again after a failure, it goes on with the sockets that are there.
        let before = self.running().cloned();
        let running = match &before {
            Some(running) => running.clone(),
            None => match Peers::new(app.keys.clone(), app.process_id) {
                Ok(peers) => Arc::new(Running::new(&app, pool.clone(), bus::Bus::new(pool), peers)),
                Err(error) => {
                    tracing::error!(%error, source = ?error.source, "sockets cannot be served");
                    return;
                }
            },
        };
        // Its tasks end after the sockets here are closed.
        let ended = CancellationToken::new();
        let tasks = app.tasks.part(ended.clone());
        tasks.keep_until_stopped("notifications", {
            let bus = running.bus.clone();
            move || bus.clone().drive()
        });
        while let Err(error) = sockets::heartbeat(&running.pool, running.process_id, &running.internal_url).await {
            tracing::warn!(%error, "sockets wait for the database");
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = shutdown.cancelled() => return,
            }
        }
        if before.is_none() {
            tokio::select! {
                () = running.open() => {}
                () = shutdown.cancelled() => return,
            }
            // Its row is in the table; who does not hear this finds it there with the next sweep.
            if let Err(error) = running.bus.tell(DROP_CHANNEL, format!("hello:{}", running.process_id)).await {
                tracing::debug!(%error, "other processes were not told of this one");
            }
            let _ = self.0.set(running.clone());
        }
        let keep = |name, task: fn(Arc<Running>) -> BoxFuture<'static, ()>| {
            let running = running.clone();
            tasks.keep_until_stopped(name, move || task(running.clone()));
        };
        keep("results", |running| running.intake.clone().run(running).boxed());
        keep("deliveries", |running| deliver::run(running).boxed());
        keep("arrivals", |running| async move { running.lobby.receive(running.clone()).await }.boxed());
        keep("departures", |running| async move { running.lobby.dismiss(running.clone()).await }.boxed());
        keep("events", |running| running.send_events().boxed());
        keep("notices", |running| running.hear().boxed());
        keep("reach", |running| reach::watch(running).boxed());
        keep("sweep", |running| running.sweep_for_ever().boxed());
        shutdown.cancelled().await;
        running.registry.cut_all();
        // The closing sockets say good-bye, and what they reported last is written.
        tokio::time::sleep(Duration::from_millis(300)).await;
        ended.cancel();
        tasks.end_within(Duration::from_secs(1)).await;
        let left = tokio::time::timeout(Duration::from_secs(2), sockets::leave(&running.pool, running.process_id)).await;
        if !matches!(left, Ok(Ok(()))) {
            tracing::warn!("this process's sockets were left to others to clean up");
        }
    }
}

impl Running {
    fn new(app: &App, hub_pool: Pool, bus: bus::Bus, peers: Peers) -> Self {
        let server = |prefix: &'static str, message_bytes: usize, buffer: usize, ping_timeout: Duration| {
            let config = PostgresAdapterConfig::new()
                .with_prefix(prefix)
                .with_table_name("socket_attachments")
                .with_payload_threshold(borealis_engine::bus::PAYLOAD_LIMIT_BYTES - 500);
            let adapter = PostgresAdapterCtr::new_with_driver(bus.clone(), config);
            let builder: SocketIoBuilder<Adapter> = SocketIo::builder()
                .transports([TransportType::Websocket])
                .ping_interval(PING_INTERVAL)
                .ping_timeout(ping_timeout)
                .max_buffer_size(buffer)
                .max_payload(message_bytes as u64)
                .ws_max_message_size(message_bytes)
                .ws_max_frame_size(message_bytes)
                .with_adapter(adapter);
            builder.build_with_inner_svc(Nothing)
        };
        let (agents_service, agents) =
            server("borealis-agents", AGENT_MESSAGE_BYTES + SHORTENED_BYTES, 1024, AGENT_LIBRARY_PATIENCE);
        let (people_service, people) = server("borealis-operators", OPERATOR_MESSAGE_BYTES, 1024, PING_TIMEOUT);
        let (events, waiting_events) = mpsc::channel(EVENTS);
        Self {
            guard: app.guard.clone(),
            pool: app.pool.clone(),
            hub_pool,
            bus,
            reach: reach::Reach::default(),
            process_id: app.process_id,
            keys: app.keys.clone(),
            session_idle_s: app.settings.access.sessions.idle_s,
            internal_url: app.settings.internal_url.as_str().trim_end_matches('/').to_owned(),
            peers,
            answers: app.rooms.of(Class::Device).trees.clone(),
            registry: Arc::default(),
            gate: upgrade::Gate::default(),
            lobby: agents::Lobby::default(),
            intake: Arc::default(),
            wanted: deliver::Wanted::default(),
            agents,
            agents_service,
            people,
            people_service,
            company: Company::default(),
            events,
            waiting_events: Mutex::new(waiting_events),
        }
    }

    /// Opens the default namespace of both servers; needs Postgres, and waits for it.
    ///
    /// Who enters is received in a middleware, and not in the handler: the library runs that only after it has told the client that it is
    /// in, and an event that the client sends at once would find nobody.
    async fn open(self: &Arc<Self>) {
        loop {
            let weak = Arc::downgrade(self);
            let entering = move |socket: SocketRef<Adapter>| {
                if let Some(running) = weak.upgrade() {
                    agents::entered(&running, socket);
                }
                std::future::ready(Ok::<(), Infallible>(()))
            };
            match self.agents.ns("/", (async || ()).with(entering)).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(%error, "the sockets of agents wait for the database"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        loop {
            let weak = Arc::downgrade(self);
            let entering = move |socket: SocketRef<Adapter>| {
                if let Some(running) = weak.upgrade() {
                    people::entered(&running, socket);
                }
                std::future::ready(Ok::<(), Infallible>(()))
            };
            match self.people.ns("/", (async || ()).with(entering)).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(%error, "the sockets of operators wait for the database"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    fn tell(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            tracing::warn!("an event was dropped: too many wait");
        }
    }

    fn tell_site(&self, site: Option<i64>, event: ToOperator, payload: Value) {
        if self.company.seen().alone && !self.registry.has_people() {
            return;
        }
        self.tell(Event::Site { site, event, payload });
    }

    fn tell_presence(&self, hostname: &str, device: Uuid, site: Option<i64>, here: bool) {
        self.tell_site(site, ToOperator::AgentStatus, agents::presence(hostname, device, here));
    }

    fn tell_drop(&self, payload: String) {
        self.tell(Event::Drop(payload));
    }

    async fn send_events(self: Arc<Self>) {
        let mut waiting = self.waiting_events.lock().await;
        let stream = futures::stream::poll_fn(|cx| waiting.poll_recv(cx));
        stream.for_each_concurrent(EVENTS_AT_ONCE, |event| self.send_event(event)).await;
    }

    async fn send_event(&self, event: Event) {
        match event {
            Event::Site { site, event, payload } => {
                let name = event.name();
                let rooms = || {
                    let mut rooms = vec![people::ADMINS.to_owned()];
                    rooms.extend(site.map(people::site_room));
                    rooms
                };
                let Some(server) = self.people.of("/") else { return };
                if self.company.seen().alone {
                    let _ = server.to(rooms()).local().emit(name, &payload).await;
                    return;
                }
                if let Err(error) = server.to(rooms()).emit(name, &payload).await {
                    tracing::debug!(%error, name, "an event did not reach the other processes");
                    if let Some(server) = self.people.of("/") {
                        let _ = server.to(rooms()).local().emit(name, &payload).await;
                    }
                }
            }
            // The sweep of the other processes finds the same within seconds.
            Event::Drop(payload) => {
                if let Err(error) = self.bus.tell(DROP_CHANNEL, payload).await {
                    tracing::warn!(%error, "other processes were not told to close a socket");
                }
            }
            // And their poll what is to be delivered.
            Event::Deliver(devices) => {
                for payload in delivery::notices(&devices) {
                    if let Err(error) = self.bus.tell(delivery::CHANNEL, payload).await {
                        tracing::warn!(%error, "other processes were not told of a dispatch");
                        return;
                    }
                }
            }
        }
    }

    async fn hear(self: Arc<Self>) {
        let mut heard = self.bus.listen(vec![delivery::CHANNEL.to_owned(), DROP_CHANNEL.to_owned()]);
        while let Some(heard) = heard.recv().await {
            match heard {
                Heard::Notification { channel, payload } if channel == delivery::CHANNEL => {
                    let (here, _) = self.registry.split(&delivery::read_notice(&payload));
                    if !here.is_empty() {
                        self.wanted.look(here);
                    }
                }
                Heard::Notification { payload, .. } => self.drop_named(&payload),
                Heard::Connected => {
                    if let Err(error) = self.sweep().await {
                        tracing::debug!(%error, "the sweep waits for the database");
                    }
                }
            }
        }
    }

    fn drop_named(&self, payload: &str) {
        let id = |text: &str| Uuid::try_parse(text).ok();
        match payload.split_once(':') {
            Some(("hello", process)) if id(process) != Some(self.process_id) => self.company.hello(),
            Some(("device", device)) => {
                if let Some(device) = id(device) {
                    self.registry.cut_device(device);
                }
            }
            Some(("session", session)) => {
                if let Some(session) = id(session) {
                    self.registry.cut_session(session);
                }
            }
            Some(("socket", socket)) => {
                if let Some((process, socket_id)) = socket.split_once(':')
                    && id(process) == Some(self.process_id)
                    && let Some(agent) = self.registry.agent(socket_id)
                {
                    agent.cut.cancel();
                }
            }
            _ => {}
        }
    }

    async fn sweep_for_ever(self: Arc<Self>) {
        let mut rounds: u32 = 0;
        let mut said_alive: Option<Instant> = None;
        let mut clock = tokio::time::interval(SWEEP);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            let done = async {
                if said_alive.is_none_or(|at| at.elapsed() >= sockets::HEARTBEAT) {
                    sockets::heartbeat(&self.pool, self.process_id, &self.internal_url).await?;
                    said_alive = Some(Instant::now());
                }
                let before = self.company.seen();
                self.company.note(before, sockets::alone(&self.pool, self.process_id).await?);
                self.sweep().await?;
                for gone in sockets::bury(&self.pool).await? {
                    self.tell_presence(&gone.hostname, gone.device, gone.site_id, false);
                }
                let due = delivery::due(&self.pool, self.process_id, self.guard.at_least()).await?;
                if !due.is_empty() {
                    self.wanted.look(due);
                }
                if rounds.is_multiple_of(30) {
                    internal::forget_nonces(&self.pool).await?;
                }
                Ok::<_, borealis_engine::Error>(())
            };
            if let Err(error) = done.await {
                tracing::warn!(%error, source = ?error.source, "the sweep of sockets waits for the database");
            }
            rounds = rounds.wrapping_add(1);
        }
    }

    /// Closes what must not be open any more, and puts people into the rooms they may be in.
    async fn sweep(&self) -> borealis_engine::Result<()> {
        let (agents, local): (Vec<_>, Vec<_>) = self.registry.local().into_iter().unzip();
        for (index, finding) in sockets::sweep(&self.pool, self.process_id, &local).await? {
            let Some(agent) = agents.get(index) else { continue };
            match finding {
                Finding::Close(reason) => {
                    tracing::info!(device = %agent.device, reason, "a socket is closed");
                    agent.cut.cancel();
                }
                Finding::Missing => self.lobby.again(agent),
            }
        }
        let ids: Vec<String> = local.iter().map(|one| one.socket_id.clone()).collect();
        for gone in sockets::prune(&self.pool, self.process_id, &ids).await? {
            self.tell_presence(&gone.hostname, gone.device, gone.site_id, false);
        }
        for (agent, local) in agents.iter().zip(&local) {
            if local.mode.is_none() && Instant::now().saturating_duration_since(agent.opened) > REGISTER {
                agent.cut.cancel();
            }
        }
        let people = self.registry.people();
        if people.is_empty() {
            return Ok(());
        }
        let sessions: Vec<Uuid> = people.iter().map(|(person, _)| person.session).collect();
        let now = sockets::operators(&self.pool, &sessions, self.session_idle_s).await?;
        for (person, socket) in people {
            if !socket.connected() {
                self.registry.remove_person(&socket.id.to_string());
                continue;
            }
            match now.iter().find(|one| one.session == person.session) {
                Some(one) => {
                    people::replace(&person, &socket, registry::View { admin: one.admin, sites: one.sites.clone() });
                }
                None => person.cut.cancel(),
            }
        }
        Ok(())
    }
}

/// Finds the devices the internal event bridge means by hostname and mode.
///
/// # Errors
/// When the database is away.
pub async fn by_hostname(app: &App, hostname: &str, mode: &str) -> borealis_engine::Result<Vec<Uuid>> {
    sockets::connected_by_hostname(&app.pool, hostname, Mode::parse(mode)).await
}
