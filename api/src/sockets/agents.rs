//! The sockets of machines: registration, reports, departure.

use std::{collections::HashMap, sync::Arc, time::Duration};

use borealis_engine::{
    Error, Result,
    devices::sockets::{self, Hello, Registered, Registration},
    enrollment::machines,
    jobs::results::{Kind, Report},
};
use chrono::Utc;
use serde_json::{Value, json};
use socketioxide::extract::{AckSender, SocketRef};
use tokio::sync::{Mutex, mpsc};
use uuid::Uuid;

use super::{
    Adapter, Running,
    events::{FromAgent, ToOperator},
    registry::Agent,
    said::Said,
    upgrade::Peer,
};
use crate::metrics::METERS;

/// Registrations that may wait; one device has few sockets, so more cannot be.
const QUEUE: usize = 50_000;
/// Registrations in one transaction.
const BATCH: usize = 500;
/// How long an answer may take to reach its agent before a refused socket is closed.
const LAST_WORD: Duration = Duration::from_millis(250);

struct Arrival {
    agent: Arc<Agent>,
    socket_id: String,
    hello: Hello,
    ack: Option<AckSender<Adapter>>,
}

/// Arrivals and departures, each handled in batches.
pub struct Lobby {
    arrivals: mpsc::Sender<Arrival>,
    waiting: Mutex<mpsc::Receiver<Arrival>>,
    departures: mpsc::UnboundedSender<String>,
    departed: Mutex<mpsc::UnboundedReceiver<String>>,
}

impl Default for Lobby {
    fn default() -> Self {
        let (arrivals, waiting) = mpsc::channel(QUEUE);
        let (departures, departed) = mpsc::unbounded_channel();
        Self { arrivals, waiting: Mutex::new(waiting), departures, departed: Mutex::new(departed) }
    }
}

/// The room of a device.
pub fn room(device: Uuid) -> String {
    format!("device:{device}")
}

/// A machine's socket has entered the namespace: its events are named here.
pub fn entered(running: &Arc<Running>, socket: SocketRef<Adapter>) {
    let Some(Peer::Agent(agent)) = socket.req_parts().extensions.get::<Peer>().cloned() else { return };
    running.registry.enter(&agent, socket.clone());
    for event in FromAgent::ALL {
        let (running, agent) = (running.clone(), agent.clone());
        // The body of the closure runs in the order of the messages; what it returned would not.
        socket.on(event.name(), move |Said(said), ack: AckSender<Adapter>| {
            match event {
                FromAgent::Connect => connect(&running, &agent, said.unwrap_or_default(), ack),
                FromAgent::Accepted => report(&running, &agent, Kind::Accepted, said, ack),
                // Another agent may have begun with what it was sent.
                FromAgent::Declined if !agent.can("dedup") => {}
                FromAgent::Declined => report(&running, &agent, Kind::Declined, said, ack),
                FromAgent::Progress => report(&running, &agent, Kind::Progress, said, ack),
                FromAgent::Result => report(&running, &agent, Kind::Result, said, ack),
            }
            std::future::ready(())
        });
    }
    let (running, agent) = (running.clone(), agent);
    socket.on_disconnect(move |socket: SocketRef<Adapter>| {
        // The agent left the namespace, or its connection is gone; either way nothing more can be said to it.
        agent.cut.cancel();
        let _ = running.lobby.departures.send(socket.id.to_string());
        std::future::ready(())
    });
}

/// Whose report it is, was settled at the upgrade; it need not wait for the registration.
fn report(running: &Arc<Running>, agent: &Arc<Agent>, kind: Kind, said: Option<Value>, ack: AckSender<Adapter>) {
    if let Some(report) = said.and_then(|said| Report::parse(agent.device, kind, &said)) {
        if kind == Kind::Result {
            agent.ended(report.activity_id);
        }
        running.intake.offer(agent, report, ack);
    }
}

fn connect(running: &Arc<Running>, agent: &Arc<Agent>, said: Value, ack: AckSender<Adapter>) {
    let code = match Hello::parse(&said) {
        Ok(hello) => {
            let Some(socket) = agent.socket() else { return };
            let arrival = Arrival { agent: agent.clone(), socket_id: socket.id.to_string(), hello, ack: Some(ack) };
            match running.lobby.arrivals.try_send(arrival) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(arrival) | mpsc::error::TrySendError::Closed(arrival)) => {
                    refuse(&arrival.agent, arrival.ack, "sockets_busy");
                    return;
                }
            }
        }
        Err(code) => code,
    };
    refuse(agent, Some(ack), code);
}

/// Answers, and closes: agents do not read the answer.
fn refuse(agent: &Arc<Agent>, ack: Option<AckSender<Adapter>>, code: &'static str) {
    tracing::info!(device = %agent.device, code, "a socket was refused");
    let status = match code {
        "device_not_found" => 404,
        "agent_id_required" => 400,
        "sockets_busy" => 503,
        "device_purged" => 401,
        machines::HELD | machines::CONTESTED => 409,
        _ => 403,
    };
    if let Some(ack) = ack {
        let mut answer = json!({"error": code, "status_code": status});
        let again = match code {
            "sockets_busy" => Some(rand::random_range(1_000..10_000)),
            machines::HELD => Some(machines::HELD_AGAIN_S * 1_000),
            machines::CONTESTED => Some(machines::CONTESTED_AGAIN_S * 1_000),
            _ => None,
        };
        if let Some(again) = again {
            answer["retry_after_ms"] = again.into();
        }
        let _ = ack.send(&answer);
    }
    let agent = agent.clone();
    tokio::spawn(async move {
        tokio::time::sleep(LAST_WORD).await;
        agent.cut.cancel();
    });
}

impl Lobby {
    /// Registers a socket whose row was lost.
    pub fn again(&self, agent: &Arc<Agent>) {
        if let (Some(hello), Some(socket)) = (agent.hello(), agent.socket()) {
            let _ = self.arrivals.try_send(Arrival { agent: agent.clone(), socket_id: socket.id.to_string(), hello, ack: None });
        }
    }

    /// Registers who comes, for ever.
    pub async fn receive(&self, running: Arc<Running>) {
        let mut waiting = self.waiting.lock().await;
        let mut batch = Vec::new();
        while waiting.recv_many(&mut batch, BATCH).await > 0 {
            batch.retain(|arrival| !arrival.agent.cut.is_cancelled());
            let mut pause = Duration::from_millis(100);
            let answers = loop {
                match register(&running, &batch).await {
                    Ok(answers) => break answers,
                    Err(error) => {
                        tracing::warn!(%error, source = ?error.source, sockets = batch.len(), "registrations wait for the database");
                        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                        pause = (pause * 2).min(Duration::from_secs(3));
                    }
                }
            };
            settle(&running, batch.drain(..).zip(answers)).await;
        }
    }

    /// Takes out who has left, for ever.
    pub async fn dismiss(&self, running: Arc<Running>) {
        let mut departed = self.departed.lock().await;
        let mut batch = Vec::new();
        while departed.recv_many(&mut batch, BATCH).await > 0 {
            match sockets::unregister(&running.pool, running.process_id, &batch).await {
                Ok(gone) => {
                    for device in gone {
                        running.tell_presence(&device.hostname, device.device, device.site_id, false);
                    }
                }
                // The sweep finds rows whose socket is gone.
                Err(error) => tracing::warn!(%error, source = ?error.source, "departures were not noted"),
            }
            batch.clear();
        }
    }
}

async fn register(running: &Running, batch: &[Arrival]) -> Result<Vec<Registered>> {
    let registrations: Vec<Registration> = batch
        .iter()
        .map(|arrival| Registration {
            device: arrival.agent.device,
            token_version: arrival.agent.token_version,
            site_id: arrival.agent.site_id,
            socket_id: arrival.socket_id.clone(),
            address: arrival.agent.address.clone(),
            hello: arrival.hello.clone(),
        })
        .collect();
    let mut tx = running.pool.begin().await.map_err(Error::from)?;
    let answers = sockets::register(&mut tx, running.process_id, &registrations).await?;
    tx.commit().await.map_err(Error::from)?;
    Ok(answers)
}

async fn settle(running: &Arc<Running>, answers: impl Iterator<Item = (Arrival, Registered)>) {
    let mut newest: HashMap<(Uuid, &'static str), Arc<Agent>> = HashMap::new();
    let mut elsewhere = Vec::new();
    for (Arrival { agent, socket_id, hello, ack }, answer) in answers {
        match answer {
            Registered::Refused(code) => {
                if code == machines::HELD {
                    METERS.identities_held.inc();
                    let payload = json!({"site_id": agent.site_id, "status": "pending", "hostname": hello.hostname});
                    running.tell_site(agent.site_id, ToOperator::DeviceApprovals, payload);
                }
                refuse(&agent, ack, code);
            }
            Registered::Current { hostname, replaced } => {
                let mode = hello.mode.as_str();
                let fresh = agent.hello().is_none();
                let by_no_number = hello.bearer.instance.is_none();
                agent.registered(hello);
                match agent.socket() {
                    Some(socket) if !agent.cut.is_cancelled() => socket.join(room(agent.device)),
                    // It left while it was being registered, and its departure may have been noted before its row was there.
                    _ => {
                        let _ = running.lobby.departures.send(socket_id);
                        continue;
                    }
                }
                if let Some(ack) = ack {
                    let worker = agent.site_id.map(|site| running.keys.site_worker_guid(site).to_string());
                    let _ = ack.send(&json!({"status": "ok", "worker_guid": worker, "site_id": agent.site_id}));
                }
                if replaced.is_some() && by_no_number {
                    displaced(running, &agent, &hostname);
                }
                match replaced {
                    Some((process, socket_id)) if process == running.process_id => {
                        if let Some(old) = running.registry.agent(&socket_id) {
                            old.cut.cancel();
                        }
                    }
                    Some((process, socket_id)) => elsewhere.push(format!("socket:{process}:{socket_id}")),
                    None if fresh => running.tell_presence(&hostname, agent.device, agent.site_id, true),
                    None => {}
                }
                // Of two in one batch, the later is the device's.
                if let Some(older) = newest.insert((agent.device, mode), agent.clone())
                    && !Arc::ptr_eq(&older, &agent)
                {
                    older.cut.cancel();
                }
            }
        }
    }
    running.wanted.reconnected(newest.into_values().map(|agent| agent.device));
    for payload in elsewhere {
        running.tell_drop(payload);
    }
}

/// A socket has taken the place of another of its device, and its agent does not say which one it is. An agent that lost its connection
/// does that once in a while; two that have one identity do it again and again, which is reported.
fn displaced(running: &Arc<Running>, agent: &Arc<Agent>, hostname: &str) {
    if !running.registry.flapping.displaced(agent.device) {
        return;
    }
    METERS.identities_flapping.inc();
    tracing::warn!(device = %agent.device, address = agent.address, "sockets of a device displace each other: two machines may have its identity");
    let (running, agent, hostname) = (running.clone(), agent.clone(), hostname.to_owned());
    tokio::spawn(async move {
        let noted = machines::note_flapping(&running.pool, agent.device, &hostname, agent.site_id, &agent.address).await;
        if let Err(error) = noted {
            tracing::warn!(%error, "the audit was not told of sockets that displace each other");
        }
    });
}

/// What is told of a machine when a socket comes or goes.
pub fn presence(hostname: &str, device: Uuid, here: bool) -> Value {
    json!({
        "hostname": hostname,
        "guid": borealis_engine::keys::guid_text(device),
        "phase": if here { "socket_connected" } else { "socket_disconnected" },
        "status": if here { "online" } else { "degraded" },
        "changed_at": Utc::now().timestamp(),
    })
}
