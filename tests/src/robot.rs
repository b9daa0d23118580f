//! A machine on the wire that does what it is told, remembers what it was told, and comes again when it is cut off.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use borealis_protocol::framing::Frame;
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    Device,
    actor::Credential,
    agent::{Socket, try_open_agent},
    eventually,
};

/// How long a robot waits before it connects again.
const AGAIN: Duration = Duration::from_millis(300);

/// The machine. Dropping it cuts it off.
#[derive(Debug)]
pub struct Robot {
    /// What it is enrolled as.
    pub device: Device,
    memory: Arc<Mutex<Memory>>,
    _stop: DropGuard,
}

/// What it remembers.
#[derive(Debug, Default, Clone)]
pub struct Memory {
    /// Where it is connected.
    pub at: Option<SocketAddr>,
    /// How often it has connected.
    pub connections: u32,
    /// How often it was sent each job.
    pub sent: BTreeMap<i64, u32>,
    /// Jobs it was told to stop.
    pub cancelled: Vec<i64>,
    /// How long a job takes here; a job begins with what this says then.
    pub takes: Duration,
    jobs: BTreeMap<i64, Job>,
}

#[derive(Debug, Clone)]
struct Job {
    ends: tokio::time::Instant,
    status: &'static str,
    acknowledged: bool,
    asked: Option<u64>,
}

impl Robot {
    /// Starts it; it tries the addresses in turn.
    #[must_use]
    pub fn start(device: Device, addresses: Vec<SocketAddr>) -> Self {
        let memory = Arc::new(Mutex::new(Memory::default()));
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(live(device.clone(), addresses, memory.clone())));
        Self { device, memory, _stop: stop.drop_guard() }
    }

    /// What it remembers now.
    #[must_use]
    pub fn memory(&self) -> Memory {
        lock(&self.memory).clone()
    }

    /// How long jobs that begin from now on take.
    pub fn take(&self, time: Duration) {
        lock(&self.memory).takes = time;
    }

    /// Waits until it is connected.
    pub async fn connected(&self) {
        eventually("the machine is connected", Duration::from_secs(60), async || self.memory().at.map(|_| ())).await;
    }
}

fn lock(memory: &Mutex<Memory>) -> std::sync::MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn live(device: Device, addresses: Vec<SocketAddr>, memory: Arc<Mutex<Memory>>) {
    let Credential::Bearer(token) = device.actor.credential.clone() else { panic!("a device has a token") };
    for addr in addresses.iter().cycle() {
        if let Ok(mut socket) = try_open_agent(*addr, &token).await {
            serve(&device, *addr, &mut socket, &memory).await;
            lock(&memory).at = None;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn serve(device: &Device, addr: SocketAddr, socket: &mut Socket, memory: &Mutex<Memory>) {
    let id = borealis_protocol::agent_id(&device.hostname, &device.guid, "SYSTEM");
    let hello = json!({"agent_id": id, "service_mode": "system", "hostname": device.hostname, "capabilities": {"dedup": true, "cancel": true}});
    let mut number = 1;
    event(socket, Some(number), "connect_agent", hello).await;
    for job in lock(memory).jobs.values_mut() {
        job.asked = None;
    }
    loop {
        let next = tokio::time::timeout(Duration::from_millis(50), socket.next()).await;
        match next {
            Ok(None) => return,
            Ok(Some(Frame::Ack { id: 1, .. })) => {
                let mut memory = lock(memory);
                memory.at = Some(addr);
                memory.connections += 1;
            }
            Ok(Some(Frame::Ack { id, args })) => acknowledged(memory, id, args.first().unwrap_or(&Value::Null)),
            Ok(Some(Frame::Event { id: Some(id), .. })) => {
                let nothing = json!({"ok": true, "processes": [{"pid": 1, "name": device.hostname}]});
                socket.send(&Frame::Ack { id, args: vec![nothing] }).await;
            }
            Ok(Some(Frame::Event { name, args, .. })) => {
                let job = args.first().and_then(|args| args["job_id"].as_i64()).unwrap_or_default();
                if told(memory, &name, job) {
                    number += 1;
                    event(socket, Some(number), "quick_job_accepted", json!({"job_id": job})).await;
                }
            }
            Ok(Some(_)) | Err(_) => {}
        }
        for (job, status) in ended(memory, &mut number) {
            let result = json!({"job_id": job, "status": status, "stdout": format!("ran {job}\n"), "stderr": "", "exit_code": 0});
            let asked = lock(memory).jobs.get(&job).and_then(|job| job.asked);
            event(socket, asked, "quick_job_result", result).await;
        }
    }
}

async fn event(socket: &mut Socket, id: Option<u64>, name: &str, payload: Value) {
    socket.send(&Frame::Event { id, name: name.into(), args: vec![payload] }).await;
}

/// Notes an order; true when it is a job to be accepted.
fn told(memory: &Mutex<Memory>, name: &str, job: i64) -> bool {
    let mut memory = lock(memory);
    match name {
        "quick_job_run" => {
            *memory.sent.entry(job).or_default() += 1;
            let ends = tokio::time::Instant::now() + memory.takes;
            memory.jobs.entry(job).or_insert(Job { ends, status: "Success", acknowledged: false, asked: None });
            true
        }
        "quick_job_cancel" => {
            memory.cancelled.push(job);
            if let Some(job) = memory.jobs.get_mut(&job) {
                job.ends = tokio::time::Instant::now();
                job.status = "Failed";
            }
            false
        }
        _ => false,
    }
}

fn acknowledged(memory: &Mutex<Memory>, id: u64, answer: &Value) {
    let taken = ["ok", "ignored"].contains(&answer["status"].as_str().unwrap_or_default());
    for job in lock(memory).jobs.values_mut().filter(|job| job.asked == Some(id)) {
        job.acknowledged = taken;
        if !taken {
            job.asked = None;
        }
    }
}

/// Jobs that have ended and are to be reported; each gets the number its answer will have.
fn ended(memory: &Mutex<Memory>, number: &mut u64) -> Vec<(i64, &'static str)> {
    let now = tokio::time::Instant::now();
    let mut memory = lock(memory);
    let due = memory.jobs.iter_mut().filter(|(_, job)| !job.acknowledged && job.asked.is_none() && job.ends <= now);
    due.map(|(id, job)| {
        *number += 1;
        job.asked = Some(*number);
        (*id, job.status)
    })
    .collect()
}
