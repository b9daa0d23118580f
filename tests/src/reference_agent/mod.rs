//! An agent that speaks as the newest agent of the reference does, written from what its sources show of the wire: it refreshes its
//! token before each connect, splits its messages into frames of 4,096 bytes, never asks for an answer to what it reports, and
//! loses a report whose connection has gone. It stands beside our own agent, to show that such agents keep working.

mod scripts;
mod wire;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex as StdMutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::Utc;
use serde_json::{Value, json};
use tokio::sync::{Mutex, Notify, watch};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{Device, eventually};
use wire::{Reader, Writer};

/// Which builds it behaves like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// The newest: each event is handled in a task of its own, and scripts wait for each other.
    Newest,
    /// The first: events are handled in the loop that reads the socket, so nothing is answered while a script runs, and the socket
    /// is opened at the engine's own path.
    Early,
}

/// Something it has done or heard.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    /// It has asked for a new access token; the status of the answer.
    Refreshed(u16),
    /// It has joined the namespace and said who it is.
    Connected,
    /// Its connection has ended, or did not come about.
    Disconnected(String),
    /// A status report; its phase and the status of the answer.
    Status(&'static str, u16),
    /// A heartbeat; the answer.
    Heartbeat(Value),
    /// It has asked for its tunnel; the status of the answer.
    Ensured(u16),
    /// A script was sent to it.
    Job(i64),
    /// It has reported the end of a script; the report.
    Result(Value),
    /// Its token is of no use any more, so it has forgotten it.
    Wiped(String),
}

#[derive(Default)]
struct Record {
    seen: StdMutex<Vec<Seen>>,
    more: watch::Sender<()>,
}

impl Record {
    fn note(&self, seen: Seen) {
        lock(&self.seen).push(seen);
        self.more.send_replace(());
    }
}

struct Inner {
    base: Url,
    hostname: String,
    guid: String,
    refresh_token: StdMutex<String>,
    access_token: StdMutex<String>,
    access_until: StdMutex<i64>,
    generation: Generation,
    boot_id: String,
    /// Values of metadata fields that were not acknowledged yet.
    queue: StdMutex<BTreeMap<String, Value>>,
    tunnel_error: StdMutex<Option<String>>,
    record: Arc<Record>,
    ensure: Notify,
    /// Ends the connection there is.
    drop: StdMutex<CancellationToken>,
    stop: CancellationToken,
}

/// A running agent. Dropping it ends it without a good-bye.
pub struct ReferenceAgent(Arc<Inner>);

impl std::fmt::Debug for ReferenceAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReferenceAgent").field("hostname", &self.0.hostname).field("seen", &self.seen().len()).finish()
    }
}

impl Drop for ReferenceAgent {
    fn drop(&mut self) {
        self.0.stop.cancel();
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ReferenceAgent {
    /// Starts it on an enrolled device.
    #[must_use]
    pub fn start(device: &Device, generation: Generation) -> Self {
        let text = |name: &str| device.enrolled[name].as_str().expect("the answer of an enrollment").to_owned();
        let inner = Arc::new(Inner {
            base: device.actor.base.clone(),
            hostname: device.hostname.clone(),
            guid: device.guid.to_uppercase(),
            refresh_token: StdMutex::new(device.refresh_token.clone()),
            access_token: StdMutex::new(text("access_token")),
            access_until: StdMutex::new(Utc::now().timestamp() + device.enrolled["expires_in"].as_i64().unwrap_or(900) - 5),
            generation,
            boot_id: Utc::now().timestamp().to_string(),
            queue: StdMutex::default(),
            tunnel_error: StdMutex::default(),
            record: Arc::default(),
            ensure: Notify::new(),
            drop: StdMutex::default(),
            stop: CancellationToken::new(),
        });
        for task in [0, 1, 2] {
            let (inner, stop) = (inner.clone(), inner.stop.clone());
            tokio::spawn(async move {
                let live = async {
                    match task {
                        0 => inner.socket_loop().await,
                        1 => inner.heartbeat_loop().await,
                        _ => inner.ensure_loop().await,
                    }
                };
                tokio::select! {
                    () = live => {}
                    () = stop.cancelled() => {}
                }
            });
        }
        Self(inner)
    }

    /// What it has done and heard so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.0.record.seen).clone()
    }

    /// Waits for something it does or hears, or has.
    ///
    /// # Panics
    /// With `what` when that does not come in time.
    pub async fn until<T>(&self, what: &str, limit: Duration, mut find: impl FnMut(&Seen) -> Option<T>) -> T {
        let mut more = self.0.record.more.subscribe();
        let found = async {
            loop {
                let found = lock(&self.0.record.seen).iter().find_map(&mut find);
                match found {
                    Some(found) => return found,
                    None => more.changed().await.expect("an agent"),
                }
            }
        };
        match tokio::time::timeout(limit, found).await {
            Ok(found) => found,
            Err(_) => panic!("not within {limit:?}: {what}; seen: {:?}", self.seen()),
        }
    }

    /// Waits until it is connected and the engine knows it.
    pub async fn connected(&self, pool: &sqlx::PgPool) {
        let limit = Duration::from_secs(30);
        self.until("a connection", limit, |seen| (*seen == Seen::Connected).then_some(())).await;
        eventually("the engine has registered the socket", limit, || async {
            sqlx::query_scalar::<_, bool>("SELECT EXISTS (SELECT FROM device_sockets WHERE device_guid = $1::uuid)")
                .bind(&self.0.guid)
                .fetch_one(pool)
                .await
                .expect("a row")
                .then_some(())
        })
        .await;
    }

    /// How often something was seen.
    #[must_use]
    pub fn count(&self, mut which: impl FnMut(&Seen) -> bool) -> usize {
        lock(&self.0.record.seen).iter().filter(|seen| which(seen)).count()
    }

    /// Sets a metadata field, to be sent with every heartbeat until the engine acknowledges it.
    pub fn set_metadata(&self, field: u16, value: &str, modified_at: i64) {
        let record = json!({"value": STANDARD.encode(value), "modified_at": modified_at, "source": "agent_cli", "actor": "root"});
        lock(&self.0.queue).insert(format!("field_{field:03}"), record);
    }

    /// The fields that were not acknowledged.
    #[must_use]
    pub fn queued_metadata(&self) -> Vec<String> {
        lock(&self.0.queue).keys().cloned().collect()
    }

    /// Sends a heartbeat now.
    pub async fn heartbeat(&self) -> Value {
        self.0.heartbeat().await
    }

    /// Asks for its tunnel now, as it does each minute.
    pub async fn ensure(&self) {
        self.0.ensure("agent_boot").await;
    }

    /// Ends its connection as a network does; what it runs goes on, and what it then says is lost.
    pub fn lose_socket(&self) {
        lock(&self.0.drop).cancel();
    }

    /// What `GET path` answers it.
    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.0.call(reqwest::Method::GET, path, None).await
    }
}

impl Inner {
    fn note(&self, seen: Seen) {
        self.record.note(seen);
    }

    fn agent_id(&self) -> String {
        format!("{}_{}_SYSTEM", self.hostname.to_uppercase(), self.guid)
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        vec![
            ("user-agent", "Borealis-Agent-Go/1".to_owned()),
            ("x-borealis-agent-context", "SYSTEM".to_owned()),
            ("authorization", format!("Bearer {}", lock(&self.access_token))),
        ]
    }

    async fn call(&self, method: reqwest::Method, path: &str, body: Option<&Value>) -> (u16, Value) {
        let (status, text) = self.exchange(method, path, body).await.unwrap_or_default();
        (status, serde_json::from_str(&text).unwrap_or_default())
    }

    /// Status and text of an answer; an error when there is none.
    async fn exchange(&self, method: reqwest::Method, path: &str, body: Option<&Value>) -> Result<(u16, String), String> {
        let url = format!("{}{path}", self.base.as_str().trim_end_matches('/'));
        let mut request =
            crate::actor::client().request(method, url).header("accept", "application/json").timeout(Duration::from_secs(30));
        for (name, value) in self.headers() {
            request = request.header(name, value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(wire::go_json(body));
        }
        let answer = request.send().await.map_err(|error| error.to_string())?;
        let status = answer.status().as_u16();
        Ok((status, answer.text().await.map_err(|error| error.to_string())?))
    }

    /// POSTs after making sure of the token; the status, and the error text these agents would keep.
    async fn post(&self, path: &str, body: &Value) -> Result<Value, (u16, String)> {
        if Utc::now().timestamp() > *lock(&self.access_until) - 60 {
            self.refresh().await.map_err(|error| (0, error))?;
        }
        let (status, text) = self.exchange(reqwest::Method::POST, path, Some(body)).await.map_err(|error| (0, error))?;
        if status >= 400 {
            return Err((status, format!("POST {path} failed: HTTP {status}: {text}")));
        }
        serde_json::from_str(&text).map_err(|error| (status, error.to_string()))
    }

    /// A new access token. A new refresh token in the answer is not read. The route to the socket, when it can be used.
    async fn refresh(&self) -> Result<Option<String>, String> {
        let body = json!({"guid": self.guid, "refresh_token": *lock(&self.refresh_token)});
        let (status, text) = self.exchange(reqwest::Method::POST, "/api/agent/token/refresh", Some(&body)).await?;
        self.note(Seen::Refreshed(status));
        if status >= 400 {
            let keeps = ["invalid_refresh_token", "device_not_found", "token_refresh_unavailable", "auth_unavailable"];
            let wipes = [
                "refresh_token_expired",
                "refresh_token_revoked",
                "device_purged",
                "device_revoked",
                "fingerprint_mismatch",
                "token_version",
                "revoked",
                "decommissioned",
            ];
            let lower = text.to_lowercase();
            if !keeps.iter().any(|word| lower.contains(word)) && wipes.iter().any(|word| lower.contains(word)) {
                lock(&self.refresh_token).clear();
                lock(&self.access_token).clear();
                self.note(Seen::Wiped(text.clone()));
            }
            return Err(format!("POST /api/agent/token/refresh failed: HTTP {status}: {text}"));
        }
        let answer: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let token = answer["access_token"].as_str().ok_or("refresh response missing access_token")?;
        token.clone_into(&mut lock(&self.access_token));
        *lock(&self.access_until) = Utc::now().timestamp() + answer["expires_in"].as_i64().unwrap_or(900) - 5;
        Ok(self.route(&answer["remote_ops_route"]))
    }

    /// The base of the socket below the site's worker; none when the newest agents would not use it. The address in it is that of
    /// the public base URL, which a test's engine does not listen on, so the path is taken from it.
    fn route(&self, route: &Value) -> Option<String> {
        const PREFIX: &str = "/_borealis/site-workers/";
        let (base, path) = (route["base_url"].as_str()?, route["route_path_prefix"].as_str()?);
        let worker = route["worker_guid"].as_str().filter(|worker| !worker.is_empty())?;
        let usable = route["available"] == true
            && route["site_id"].is_i64()
            && [base, path].iter().all(|text| text.contains(PREFIX) && text.contains(worker));
        usable.then(|| format!("{}{path}", self.base.as_str().trim_end_matches('/')))
    }

    async fn socket_loop(&self) {
        let mut backoff = Duration::from_secs(1);
        loop {
            let ended = self.connect().await.err().unwrap_or_default();
            self.note(Seen::Disconnected(ended.clone()));
            self.status("socket_disconnected", "degraded", &ended).await;
            if self.generation == Generation::Newest {
                let _ = self.refresh().await;
            }
            tokio::time::sleep(backoff).await;
            // Never reset, however long a connection has held.
            if backoff < Duration::from_secs(30) {
                backoff *= 2;
            }
        }
    }

    async fn connect(&self) -> Result<(), String> {
        let base = match self.generation {
            Generation::Newest => self.refresh().await?.ok_or("site worker route is unavailable")?,
            Generation::Early => self.base.to_string(),
        };
        self.status("socket_connecting", "healthy", "Engine socket connecting.").await;
        let (mut reader, writer) = wire::open(&base, &self.headers()).await?;
        let connection = CancellationToken::new();
        *lock(&self.drop) = connection.clone();
        // Scripts wait for each other on one connection, and only there.
        let serial = Arc::new(Mutex::new(()));
        tokio::select! {
            ended = self.serve(&mut reader, &writer, &serial) => ended,
            () = connection.cancelled() => Err("the test has cut it".to_owned()),
        }
    }

    async fn serve(&self, reader: &mut Reader, writer: &Writer, serial: &Arc<Mutex<()>>) -> Result<(), String> {
        loop {
            let message = reader.read().await?;
            match message.split_at_checked(1) {
                Some(("0", _)) => writer.write("40").await?,
                Some(("2", _)) => writer.write("3").await?,
                Some(("4", packet)) if packet.starts_with('0') => {
                    writer.emit("connect_agent", &self.hello()).await?;
                    self.note(Seen::Connected);
                    self.ensure.notify_one();
                    self.status("steady_state_online", "healthy", "Agent steady state online.").await;
                }
                Some(("4", packet)) if packet.starts_with('2') => {
                    let Some((name, payload, ack)) = wire::parse_event(&packet[1..]) else { return Err("a bad packet".into()) };
                    self.event(writer, serial, name, payload, ack).await?;
                }
                _ => {}
            }
        }
    }

    async fn event(
        &self,
        writer: &Writer,
        serial: &Arc<Mutex<()>>,
        name: String,
        payload: Value,
        ack: String,
    ) -> Result<(), String> {
        if name != "quick_job_run" {
            if !ack.is_empty() {
                writer.write(&format!("43{ack}[{{\"error\":\"unsupported_event\"}}]")).await?;
            }
            return Ok(());
        }
        self.note(Seen::Job(payload["job_id"].as_i64().unwrap_or_default()));
        let (writer, serial, hostname) = (writer.clone(), serial.clone(), self.hostname.clone());
        let handle = async move {
            let _one = serial.lock().await;
            let report = scripts::run(&writer, &hostname, &payload).await;
            if !ack.is_empty() {
                let _ = writer.write(&format!("43{ack}[null]")).await;
            }
            report
        };
        match self.generation {
            Generation::Early => {
                if let Some(report) = handle.await {
                    self.note(Seen::Result(report));
                }
            }
            Generation::Newest => {
                let (record, stop) = (self.record.clone(), self.stop.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        Some(report) = handle => record.note(Seen::Result(report)),
                        () = stop.cancelled() => {}
                        else => {}
                    }
                });
            }
        }
        Ok(())
    }

    fn hello(&self) -> Value {
        let mut capabilities = json!({
            "runtime": "go", "system_scripts": true, "file_management": true, "process_management": true, "remote_shell": true,
            "service_management": true, "software_management": true, "vnc": true, "wireguard_tunnel": true,
            "python_fallback": false, "linux_currentuser": false,
        });
        if self.generation == Generation::Newest {
            capabilities["patch_management"] = true.into();
            capabilities["registry_management"] = true.into();
        }
        json!({"agent_id": self.agent_id(), "service_mode": "system", "hostname": self.hostname, "capabilities": capabilities})
    }

    async fn status(&self, phase: &'static str, status: &str, message: &str) {
        const MILESTONES: [&str; 13] = [
            "process_start",
            "server_config_loaded",
            "identity_loaded",
            "authenticating",
            "authenticated",
            "roles_loading",
            "roles_ready",
            "wireguard_starting",
            "wireguard_online",
            "status_channel_online",
            "socket_connecting",
            "socket_connected",
            "steady_state_online",
        ];
        let now = Utc::now().timestamp();
        let rank = MILESTONES.iter().position(|key| *key == phase).unwrap_or(MILESTONES.len() - 1);
        let milestones: Vec<Value> = MILESTONES
            .iter()
            .enumerate()
            .map(|(at, key)| match at.cmp(&rank) {
                std::cmp::Ordering::Less => {
                    json!({"key": key, "label": key, "state": "complete", "updated_at": now, "completed_at": now})
                }
                std::cmp::Ordering::Equal if at == MILESTONES.len() - 1 => {
                    json!({"key": key, "label": key, "state": "complete", "updated_at": now, "completed_at": now})
                }
                std::cmp::Ordering::Equal => {
                    json!({"key": key, "label": key, "state": "active", "updated_at": now, "started_at": now})
                }
                std::cmp::Ordering::Greater => json!({"key": key, "label": key, "state": "pending"}),
            })
            .collect();
        let body = json!({
            "hostname": self.hostname, "service_mode": "system", "phase": phase, "status": status, "message": message,
            "boot_id": self.boot_id, "milestones": milestones,
        });
        let answer = self.post("/api/agent/status", &body).await;
        self.note(Seen::Status(phase, answer.map_or_else(|(status, _)| status, |_| 200)));
    }

    async fn heartbeat_loop(&self) {
        loop {
            self.heartbeat().await;
            let jitter = Duration::from_millis(rand::random_range(0..5_000));
            tokio::time::sleep(Duration::from_secs(20) + jitter).await;
        }
    }

    async fn heartbeat(&self) -> Value {
        let now = Utc::now().timestamp();
        let tunnel = lock(&self.tunnel_error).clone();
        let mut body = json!({
            "hostname": self.hostname, "service_mode": "system",
            "metrics": {"service_mode": "system", "operating_system": "Debian GNU/Linux 12", "last_user": "root", "domain": "",
                        "last_reboot": "2026-01-01 00:00:00", "memory_percent": 41.5, "uptime": 86_400},
            "inventory": {"memory": [], "storage": [], "network": [], "cpu": {"name": "x86_64"}},
            "agent_build_id": "", "installed_build_id": "", "agent_release_channel": "stable", "agent_branch": "main",
            "agent_id": self.agent_id(), "internal_ip": "10.0.0.9", "device_type": "Server",
            "agent_role_health": scripts::roles(tunnel.as_deref(), now),
        });
        let queue = lock(&self.queue).clone();
        if !queue.is_empty() {
            body["metadata_fields"] = Value::Object(queue.into_iter().collect());
        }
        let answer = match self.post("/api/agent/heartbeat", &body).await {
            Ok(answer) => answer,
            Err((status, error)) => json!({"failed": status, "error": error}),
        };
        for field in answer["metadata_field_acks"].as_array().into_iter().flatten() {
            let field = field.as_str().expect("an acknowledgement is the name of a field");
            lock(&self.queue).remove(field);
        }
        self.note(Seen::Heartbeat(answer.clone()));
        answer
    }

    async fn ensure_loop(&self) {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(10)) => {}
            () = self.ensure.notified() => self.ensure("socket_connect").await,
        }
        loop {
            self.ensure("agent_boot").await;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(60)) => {}
                () = self.ensure.notified() => {}
            }
        }
    }

    async fn ensure(&self, reason: &str) {
        self.status("wireguard_starting", "active", "Ensuring WireGuard tunnel.").await;
        let answer = self.post("/api/agent/vpn/ensure", &json!({"agent_id": self.agent_id(), "reason": reason})).await;
        let status = answer.as_ref().map_or_else(|(status, _)| *status, |_| 200);
        *lock(&self.tunnel_error) = answer.err().map(|(_, error)| format!("WireGuard ensure request failed: {error}"));
        self.note(Seen::Ensured(status));
    }
}
