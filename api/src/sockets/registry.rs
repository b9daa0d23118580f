//! The sockets of this process. What is here is gone with the process; what others need to know is in Postgres.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_engine::devices::sockets::{Hello, Local, Mode};
use socketioxide::extract::SocketRef;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Adapter, PING_INTERVAL, PING_TIMEOUT, flapping::Flapping, wire::Heard};

/// How long an agent that can answer may be silent.
const SILENCE: Duration = Duration::from_secs(PING_INTERVAL.as_secs() + PING_TIMEOUT.as_secs());
/// What a script may take beyond its limit before its agent should have been heard.
const SCRIPT_GRACE: Duration = Duration::from_secs(60);
/// How long a script without a limit may keep its agent silent.
const NO_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
/// Scripts remembered for one socket; further ones do not make it wait longer.
const SCRIPTS: usize = 1_000;

/// A machine's socket, known from its upgrade on.
#[derive(Debug)]
pub struct Agent {
    /// The device the token named.
    pub device: Uuid,
    /// The token's version.
    pub token_version: i32,
    /// The device's site at the upgrade.
    pub site_id: Option<i64>,
    /// Where it comes from; empty when that is not known.
    pub address: String,
    /// Closes it.
    pub cut: CancellationToken,
    /// When it was opened.
    pub opened: Instant,
    /// When its last byte came.
    pub heard: Arc<Heard>,
    /// The calls to it that may be under way.
    pub calls: Semaphore,
    /// Reports that wait for room, of an agent that cannot be told to come again.
    pub waiting: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    socket: Option<SocketRef<Adapter>>,
    hello: Option<Hello>,
    /// The scripts it was sent and has not reported the end of, each with the time by which it should have.
    scripts: HashMap<i64, Instant>,
}

impl State {
    /// Whether it may be unable to answer while a script runs: older agents run scripts in the loop that reads the socket. Newer
    /// ones are known by what they announce.
    fn runs_scripts_in_its_read_loop(&self) -> bool {
        const NEWER: [&str; 3] = ["dedup", "patch_management", "registry_management"];
        self.hello.as_ref().is_some_and(|hello| !NEWER.iter().any(|name| hello.capabilities.contains_key(*name)))
    }

    /// When it is lost if nothing more is heard of it.
    fn lost_at(&self, last_heard: Instant) -> Instant {
        let answer_by = last_heard + SILENCE;
        if !self.runs_scripts_in_its_read_loop() {
            return answer_by;
        }
        self.scripts.values().copied().max().map_or(answer_by, |script| script.max(answer_by))
    }

    fn sent(&mut self, activity: i64, limit: Duration, now: Instant) {
        if self.scripts.len() >= SCRIPTS {
            return;
        }
        // It runs them one after another.
        let before = self.scripts.values().copied().max().map_or(now, |last| last.max(now));
        let limit = if limit.is_zero() { NO_LIMIT } else { limit.min(NO_LIMIT) + SCRIPT_GRACE };
        self.scripts.insert(activity, before + limit);
    }
}

impl Agent {
    /// A socket that has been admitted.
    pub fn new(device: Uuid, token_version: i32, site_id: Option<i64>, address: String, cut: CancellationToken) -> Self {
        Self {
            device,
            token_version,
            site_id,
            address,
            cut,
            opened: Instant::now(),
            heard: Arc::default(),
            calls: Semaphore::new(super::CALLS_AT_ONCE),
            waiting: AtomicUsize::new(0),
            state: Mutex::default(),
        }
    }

    /// The socket in the namespace, once it is there.
    pub fn socket(&self) -> Option<SocketRef<Adapter>> {
        lock(&self.state).socket.clone()
    }

    /// What the agent said, once it is registered.
    pub fn hello(&self) -> Option<Hello> {
        lock(&self.state).hello.clone()
    }

    /// Whether it is registered and announces `name`.
    pub fn can(&self, name: &str) -> bool {
        lock(&self.state).hello.as_ref().is_some_and(|hello| hello.can(name))
    }

    /// It was sent a script that may take `limit`; none when that is zero.
    pub fn sent(&self, activity: i64, limit: Duration) {
        lock(&self.state).sent(activity, limit, Instant::now());
    }

    /// It has reported the end of a script.
    pub fn ended(&self, activity: i64) {
        lock(&self.state).scripts.remove(&activity);
    }

    /// Cuts it once it has been silent for too long; ends when it is `closed`.
    pub async fn watch(&self, closed: &CancellationToken) {
        loop {
            let lost_at = lock(&self.state).lost_at(self.heard.last().into_std());
            if lost_at <= Instant::now() {
                tracing::info!(device = %self.device, "a socket is closed: its agent is silent");
                self.cut.cancel();
                break;
            }
            tokio::select! {
                () = closed.cancelled() => return,
                () = tokio::time::sleep_until(lost_at.into()) => {}
            }
        }
        closed.cancelled().await;
    }

    /// Notes the registration.
    pub fn registered(&self, hello: Hello) {
        lock(&self.state).hello = Some(hello);
    }
}

/// A person's socket.
#[derive(Debug)]
pub struct Person {
    /// The session it was opened with.
    pub session: Uuid,
    /// The user.
    pub user_id: i64,
    /// Closes it.
    pub cut: CancellationToken,
    view: Mutex<View>,
}

/// What a person sees and where they are.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct View {
    /// Whether the role is Admin.
    pub admin: bool,
    /// The sites, for anybody else.
    pub sites: Vec<i64>,
}

impl Person {
    /// A socket that has been admitted.
    pub fn new(session: Uuid, user_id: i64, view: View, cut: CancellationToken) -> Self {
        Self { session, user_id, cut, view: Mutex::new(view) }
    }

    /// What the person may see.
    pub fn view(&self) -> View {
        lock(&self.view).clone()
    }

    /// Sets what the person may see; answers whether it was something else.
    pub fn set_view(&self, view: View) -> bool {
        let mut now = lock(&self.view);
        let changed = *now != view;
        *now = view;
        changed
    }
}

/// A person with the socket they are at.
type Present = (Arc<Person>, SocketRef<Adapter>);

/// All sockets of this process.
#[derive(Debug, Default)]
pub struct Registry {
    agents: Mutex<Agents>,
    people: Mutex<HashMap<String, Present>>,
    open: AtomicUsize,
    /// Which devices' sockets displace each other.
    pub flapping: Flapping,
}

#[derive(Debug, Default)]
struct Agents {
    /// Every admitted socket, in the namespace or not yet.
    by_device: HashMap<Uuid, Vec<Arc<Agent>>>,
    by_socket: HashMap<String, Arc<Agent>>,
}

/// The most sockets one device may have open at once, until they are registered.
const PER_DEVICE: usize = 4;

impl Registry {
    /// Counts an open connection; the guard counts it out again.
    pub fn count(self: &Arc<Self>) -> Counted {
        self.open.fetch_add(1, Ordering::Relaxed);
        Counted(self.clone())
    }

    /// Open connections.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Adds a machine's socket that was just admitted. Of too many, the oldest that is not registered is cut, so that sockets that are
    /// refused do not displace the one that is.
    pub fn admit(&self, agent: &Arc<Agent>) {
        let mut agents = lock(&self.agents);
        let own = agents.by_device.entry(agent.device).or_default();
        if own.len() >= PER_DEVICE
            && let Some(oldest) = own.iter().find(|agent| agent.hello().is_none()).or(own.first())
        {
            oldest.cut.cancel();
        }
        own.push(agent.clone());
    }

    /// The socket has entered the namespace.
    pub fn enter(&self, agent: &Arc<Agent>, socket: SocketRef<Adapter>) {
        let id = socket.id.to_string();
        lock(&agent.state).socket = Some(socket);
        lock(&self.agents).by_socket.insert(id, agent.clone());
    }

    /// The connection is closed.
    pub fn remove(&self, agent: &Arc<Agent>) {
        let socket = lock(&agent.state).socket.take();
        let mut agents = lock(&self.agents);
        if let Some(socket) = socket {
            agents.by_socket.remove(&socket.id.to_string());
        }
        if let Some(own) = agents.by_device.get_mut(&agent.device) {
            own.retain(|other| !Arc::ptr_eq(other, agent));
            if own.is_empty() {
                agents.by_device.remove(&agent.device);
            }
        }
    }

    /// The machine's socket of that id.
    pub fn agent(&self, socket_id: &str) -> Option<Arc<Agent>> {
        lock(&self.agents).by_socket.get(socket_id).cloned()
    }

    /// The registered socket of a device's service, the newest if there are several.
    pub fn agent_of(&self, device: Uuid) -> Option<Arc<Agent>> {
        let own = lock(&self.agents).by_device.get(&device).cloned().unwrap_or_default();
        let is_service = |agent: &Arc<Agent>| agent.hello().is_some_and(|hello| hello.mode == Mode::System);
        own.into_iter().rev().find(|agent| !agent.cut.is_cancelled() && is_service(agent))
    }

    /// All machine sockets.
    pub fn agents(&self) -> Vec<Arc<Agent>> {
        lock(&self.agents).by_device.values().flatten().cloned().collect()
    }

    /// Which of these devices have a socket here, and which have not.
    pub fn split(&self, devices: &[Uuid]) -> (Vec<Uuid>, Vec<Uuid>) {
        let agents = lock(&self.agents);
        devices.iter().copied().partition(|device| agents.by_device.contains_key(device))
    }

    /// Cuts a device's sockets.
    pub fn cut_device(&self, device: Uuid) {
        let own = lock(&self.agents).by_device.get(&device).cloned().unwrap_or_default();
        for agent in own {
            agent.cut.cancel();
        }
    }

    /// A person's socket has entered the namespace.
    pub fn enter_person(&self, person: Arc<Person>, socket: SocketRef<Adapter>) {
        lock(&self.people).insert(socket.id.to_string(), (person, socket));
    }

    /// A person's socket has left.
    pub fn remove_person(&self, socket_id: &str) {
        lock(&self.people).remove(socket_id);
    }

    /// All people's sockets.
    pub fn people(&self) -> Vec<Present> {
        lock(&self.people).values().cloned().collect()
    }

    /// How many sockets of machines and of people have entered the namespace.
    pub fn count_each(&self) -> (usize, usize) {
        (lock(&self.agents).by_socket.len(), lock(&self.people).len())
    }

    /// Whether any person is here.
    pub fn has_people(&self) -> bool {
        !lock(&self.people).is_empty()
    }

    /// Cuts the sockets of a session.
    pub fn cut_session(&self, session: Uuid) {
        for (person, _) in self.people().into_iter().filter(|(person, _)| person.session == session) {
            person.cut.cancel();
        }
    }

    /// Cuts everything.
    pub fn cut_all(&self) {
        for agent in self.agents() {
            agent.cut.cancel();
        }
        for (person, _) in self.people() {
            person.cut.cancel();
        }
    }

    /// The machine sockets as the sweep compares them, each with its handle. Without those that are being closed.
    pub fn local(&self) -> Vec<(Arc<Agent>, Local)> {
        self.agents()
            .into_iter()
            .filter(|agent| !agent.cut.is_cancelled())
            .map(|agent| {
                let (socket_id, mode) = {
                    let state = lock(&agent.state);
                    let id = state.socket.as_ref().map(|socket| socket.id.to_string()).unwrap_or_default();
                    (id, state.hello.as_ref().map(|hello| hello.mode))
                };
                let local =
                    Local { device: agent.device, token_version: agent.token_version, site_id: agent.site_id, socket_id, mode };
                (agent, local)
            })
            .collect()
    }
}

/// Counts a connection out when it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<Registry>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Nothing under these locks can panic half-way, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_agent_that_cannot_answer_while_a_script_runs_is_waited_for() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let state = |capabilities: serde_json::Value| State {
            hello: Hello::parse(&json!({"agent_id": "a", "capabilities": capabilities})).ok(),
            ..State::default()
        };
        for newer in [json!({"dedup": true}), json!({"patch_management": false}), json!({"registry_management": true})] {
            let mut state = state(newer);
            state.sent(1, Duration::from_secs(600), now);
            assert_eq!(state.lost_at(now), after(45));
        }
        let mut early = state(json!({"runtime": "go", "system_scripts": true}));
        assert_eq!(early.lost_at(now), after(45));
        early.sent(1, Duration::from_secs(600), now);
        assert_eq!(early.lost_at(now), after(660));
        // The next one waits behind it.
        early.sent(2, Duration::from_secs(100), after(10));
        assert_eq!(early.lost_at(after(10)), after(820));
        early.scripts.remove(&2);
        assert_eq!(early.lost_at(after(640)), after(685));
        early.scripts.remove(&1);
        assert_eq!(early.lost_at(after(50)), after(95));
        early.sent(3, Duration::ZERO, now);
        assert!(early.lost_at(now) > after(24 * 3600));
        // Before it has said who it is, nothing was sent to it.
        assert_eq!(State::default().lost_at(now), after(45));
    }
}
