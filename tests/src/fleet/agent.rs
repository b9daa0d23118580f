//! One simulated agent: a task that keeps its socket up, and what it would keep on its disk.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use borealis_agent::backoff::{Ending, Reconnect};
use borealis_engine::keys::guid_text;
use borealis_protocol::{
    CONTEXT_SYSTEM, HEADER_AGENT_CONTEXT, agent_id, envelope,
    events::{
        Ack, CONNECT_AGENT, Capabilities, ConnectAgent, QUICK_JOB_ACCEPTED, QUICK_JOB_CANCEL, QUICK_JOB_PROGRESS,
        QUICK_JOB_RESULT, QUICK_JOB_RUN, QuickJobAccepted, QuickJobCancel, QuickJobProgress, QuickJobResult, QuickJobRun,
        REASON_CANCELLED, REASON_REFUSED, STATUS_FAILED, STATUS_RUNNING, STATUS_SUCCESS,
    },
    framing::{self, Frame},
    rest::{
        Heartbeat, Metrics, Milestone, PATH_HEARTBEAT, PATH_STATUS, PATH_TOKEN_REFRESH, RefreshRequest, RefreshResponse,
        StatusReport, TokenCapabilities,
    },
};
use chrono::{TimeDelta, Utc};
use futures::{SinkExt, StreamExt};
use serde::Serialize;
use serde_json::Value;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, Message, client::IntoClientRequest, protocol::WebSocketConfig},
};
use url::Url;

use super::{
    Departure, Shared, Slot, Work, http,
    identity::Machine,
    record::{count, note},
};

/// From the start of the TCP connect to the answer of `connect_agent`.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long the engine may take to acknowledge a result.
const ACK_LIMIT: Duration = Duration::from_secs(30);
/// How long a report the engine could not take waits when it says nothing.
const RETRY: Duration = Duration::from_secs(5);
/// What a token must still be good for when it is used.
const TOKEN_LEFT: TimeDelta = TimeDelta::seconds(60);
/// How long an agent waits for its reports to settle after a connect.
const SETTLE: Duration = Duration::from_millis(300);
/// Bytes each agent reads at once.
const READ_BYTES: usize = 2048;

type Socket = WebSocketStream<TcpStream>;

/// A dispatch the agent has.
#[derive(Debug)]
struct Job {
    run: Option<i64>,
    script: String,
    context: serde_json::Map<String, Value>,
    work: Work,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Behind others.
    Waiting,
    Running {
        since: Instant,
        /// Pieces of output streamed so far.
        chunks: u32,
    },
    /// Not acknowledged yet: to be sent (again) at `next`.
    Ended { result: Box<QuickJobResult>, first_sent: Option<Instant>, next: Instant },
    /// Acknowledged.
    Settled,
}

/// Why a connection is over, or did not come about.
struct Ended {
    ending: Ending,
    /// The token was refused.
    distrust: bool,
}

impl From<io::Error> for Ended {
    fn from(_: io::Error) -> Self {
        LOST
    }
}

impl From<tungstenite::Error> for Ended {
    fn from(error: tungstenite::Error) -> Self {
        let tungstenite::Error::Http(answer) = error else { return LOST };
        let hint = answer.headers().get("retry-after").and_then(|text| text.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        let status = answer.status().as_u16();
        Self { ending: Ending::of_status(status, hint), distrust: matches!(status, 401 | 403) }
    }
}

const LOST: Ended = Ended { ending: Ending::Away, distrust: false };

/// A registered socket.
struct Link {
    socket: Socket,
    api: Url,
    /// Silence for longer than this is the end.
    silence: Duration,
    heard: Instant,
    next_id: u64,
    /// Results that wait for their ack, by its number.
    asked: HashMap<u64, i64>,
    /// Dispatches that came on this connection.
    came: Vec<i64>,
}

impl Link {
    async fn send<T: Serialize + ?Sized>(&mut self, id: Option<u64>, name: &str, payload: &T) -> Result<(), Ended> {
        let text = framing::encode_event(id, name, payload).map_err(|_| LOST)?;
        Ok(self.socket.send(Message::text(text)).await?)
    }

    /// Sends an event with a number to be answered.
    async fn ask<T: Serialize + ?Sized>(&mut self, name: &str, payload: &T) -> Result<u64, Ended> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(Some(id), name, payload).await?;
        Ok(id)
    }

    /// The next frame, pings answered.
    async fn frame(&mut self) -> Result<Frame, Ended> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    self.heard = Instant::now();
                    match framing::decode(&text) {
                        Ok(Frame::Ping(payload)) => {
                            self.socket.send(Message::text(framing::encode(&Frame::Pong(payload)))).await?;
                        }
                        Ok(frame) => return Ok(frame),
                        Err(_) => return Err(LOST),
                    }
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(LOST),
                Some(Ok(_)) => {}
            }
        }
    }
}

/// Counts an agent as connected for as long as it lives.
struct Connected<'a>(&'a Shared);

impl<'a> Connected<'a> {
    fn new(shared: &'a Shared) -> Self {
        count(&shared.record.sums.connects);
        count(&shared.record.sums.connected);
        Self(shared)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.record.sums.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The agent.
pub struct Agent {
    index: usize,
    machine: Machine,
    shared: Arc<Shared>,
    jobs: BTreeMap<i64, Job>,
    /// The dispatch that runs, and those behind it.
    queue: std::collections::VecDeque<i64>,
    /// Results not acknowledged.
    unsettled: Vec<i64>,
    next_heartbeat: Option<Instant>,
    received: u32,
    /// What it made up at its start.
    instance: String,
}

impl Agent {
    /// An agent that has not connected yet.
    pub fn new(index: usize, machine: Machine, shared: Arc<Shared>) -> Self {
        // Spread over the fleet, so that which dispatches are checked does not depend on when they come.
        let received = u32::try_from(index).unwrap_or(0);
        let next_heartbeat = shared.settings.heartbeat.map(|every| Instant::now() + every.mul_f64(rand::random()));
        Self {
            index,
            machine,
            shared,
            jobs: BTreeMap::new(),
            queue: std::collections::VecDeque::new(),
            unsettled: Vec::new(),
            next_heartbeat,
            received,
            instance: uuid::Uuid::new_v4().to_string(),
        }
    }

    /// What it says of its machine: one of its own.
    fn machine_id(&self) -> String {
        borealis_protocol::machine_id(&self.machine.guid.simple().to_string())
    }

    fn slot(shared: &Shared, index: usize) -> &Slot {
        shared.slots.get(index).expect("one slot for each machine")
    }

    /// Keeps the socket up, for ever.
    pub async fn live(mut self) {
        let shared = self.shared.clone();
        let slot = Self::slot(&shared, self.index);
        let mut reconnect = Reconnect::new();
        let mut turn = shared.turns.acquire().await.ok();
        loop {
            if let Some((_, back)) = slot.take_order() {
                sleep_until(back.into()).await;
                continue;
            }
            let connected = timeout(CONNECT_LIMIT, self.connect()).await.unwrap_or(Err(LOST));
            drop(turn.take());
            let ended = match connected {
                Ok(mut link) => {
                    let _connected = Connected::new(&shared);
                    let since = Instant::now();
                    let (ended, order) = tokio::select! {
                        ended = self.serve(&mut link) => (ended, None),
                        order = ordered(slot) => (LOST, Some(order)),
                    };
                    drop(_connected);
                    let lived = since.elapsed();
                    match order {
                        Some((how, back)) => {
                            leave(link.socket, how, back).await;
                            // The order was the reason, not a failure; what follows is the agent's own backoff.
                            sleep_until(back).await;
                        }
                        None => count(&shared.record.sums.lost_sockets),
                    }
                    Ended { ending: Ending::Lost(lived), ..ended }
                }
                Err(ended) => {
                    count(&shared.record.sums.failed_connects);
                    ended
                }
            };
            if ended.distrust {
                self.machine.expires_at = Utc::now();
            }
            tokio::select! {
                () = tokio::time::sleep(reconnect.wait(ended.ending)) => {}
                // An order: how long to stay away is said there.
                () = slot.wake.notified() => {}
            }
        }
    }

    async fn connect(&mut self) -> Result<Link, Ended> {
        let api = self.shared.api().ok_or(LOST)?;
        self.refresh(&api).await?;
        let started = Instant::now();
        let (host, port) = http::target(&api)?;
        let mut request = format!("ws://{host}:{port}/socket.io/?EIO=4&transport=websocket").into_client_request()?;
        let header = |text: &str| text.parse().map_err(|_| LOST);
        request.headers_mut().insert("authorization", header(&format!("Bearer {}", self.machine.access_token))?);
        request.headers_mut().insert(HEADER_AGENT_CONTEXT, header(CONTEXT_SYSTEM)?);
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let config = WebSocketConfig::default().read_buffer_size(READ_BYTES).write_buffer_size(0);
        let (socket, _) = client_async_with_config(request, stream, Some(config)).await?;
        let mut link =
            Link { socket, api, silence: CONNECT_LIMIT, heard: started, next_id: 0, asked: HashMap::new(), came: Vec::new() };
        let Frame::Open(open) = link.frame().await? else { return Err(LOST) };
        link.silence = Duration::from_millis(open.ping_interval.saturating_add(open.ping_timeout));
        link.socket.send(Message::text(framing::encode(&Frame::Connect(None)))).await?;
        let Frame::Connect(_) = link.frame().await? else { return Err(LOST) };
        let hello = ConnectAgent {
            agent_id: agent_id(&self.machine.hostname, &guid_text(self.machine.guid), CONTEXT_SYSTEM),
            hostname: self.machine.hostname.clone(),
            service_mode: "system".to_owned(),
            capabilities: Capabilities {
                runtime: "simulated".to_owned(),
                system_scripts: true,
                dedup: self.shared.settings.dedup,
                rotates: true,
                cancel: true,
                output: true,
                ..Capabilities::default()
            },
            helper_contexts: Vec::new(),
            machine_id: self.machine_id(),
            instance: self.instance.clone(),
        };
        let hello = link.ask(CONNECT_AGENT, &hello).await?;
        // A dispatch may come before the answer.
        loop {
            match link.frame().await? {
                Frame::Ack { id, args } if id == hello => {
                    let ack: Ack =
                        args.into_iter().next().and_then(|value| serde_json::from_value(value).ok()).unwrap_or_else(Ack::ok);
                    if ack.error.is_some() {
                        return Err(Ended { ending: Ending::of_refusal(ack.retry_after_ms), distrust: true });
                    }
                    break;
                }
                Frame::Event { name, args, .. } => self.handle(&mut link, &name, args).await?,
                Frame::Close | Frame::Disconnect | Frame::ConnectError(_) => return Err(LOST),
                _ => {}
            }
        }
        note(&mut self.shared.record.times().connect, started.elapsed());
        Ok(link)
    }

    /// Renews the access token when it has less than a minute left.
    async fn refresh(&mut self, api: &Url) -> Result<(), Ended> {
        if self.machine.expires_at - Utc::now() > TOKEN_LEFT {
            return Ok(());
        }
        let request = RefreshRequest {
            guid: guid_text(self.machine.guid),
            refresh_token: self.machine.refresh_token.clone(),
            capabilities: TokenCapabilities { rotates: true },
            machine_id: self.machine_id(),
            instance: self.instance.clone(),
        };
        let body = serde_json::to_string(&request).map_err(|_| LOST)?;
        let (status, body) = http::post(api, PATH_TOKEN_REFRESH, None, &body).await?;
        if status != 200 {
            // `http::post` gives no headers; the engine's 503 asks for two seconds.
            let hint = (status == 503).then_some(Duration::from_secs(2));
            return Err(Ended { ending: Ending::of_status(status, hint), distrust: false });
        }
        let renewed: RefreshResponse = serde_json::from_slice(&body).map_err(|_| LOST)?;
        self.machine.access_token = renewed.access_token;
        self.machine.expires_at = Utc::now() + TimeDelta::seconds(renewed.expires_in);
        if let Some(token) = renewed.refresh_token {
            self.machine.refresh_token = token;
        }
        Ok(())
    }

    /// Uses the socket until it ends.
    async fn serve(&mut self, link: &mut Link) -> Ended {
        if self.shared.status.load(Ordering::Relaxed) {
            self.report(&link.api, PATH_STATUS, status(&self.machine.hostname), SETTLE);
        }
        // Whatever was sent on the connection before may be lost.
        let now = Instant::now();
        for id in &self.unsettled {
            if let Some(Job { state: State::Ended { next, .. }, .. }) = self.jobs.get_mut(id) {
                *next = now;
            }
        }
        if let Some(next) = &mut self.next_heartbeat
            && *next < now
        {
            *next = now + RETRY.mul_f64(rand::random());
        }
        loop {
            if let Err(ended) = self.work(link).await {
                return ended;
            }
            let due = self.due(link);
            let happened = tokio::select! {
                frame = link.frame() => Some(frame),
                () = sleep_until(due) => None,
            };
            let done = match happened {
                Some(Ok(Frame::Event { name, args, .. })) => self.handle(link, &name, args).await,
                Some(Ok(Frame::Ack { id, args })) => {
                    self.acknowledged(link, id, args);
                    Ok(())
                }
                Some(Ok(Frame::Close | Frame::Disconnect | Frame::ConnectError(_))) => Err(LOST),
                Some(Ok(_)) => Ok(()),
                Some(Err(ended)) => Err(ended),
                None if link.heard.elapsed() > link.silence => Err(LOST),
                None => Ok(()),
            };
            if let Err(ended) = done {
                return ended;
            }
        }
    }

    /// When there is something to do by itself.
    fn due(&self, link: &Link) -> Instant {
        let mut due = link.heard + link.silence + Duration::from_secs(1);
        due = self.next_heartbeat.map_or(due, |next| due.min(next));
        if let Some(Job { state: State::Running { since, chunks }, work, .. }) =
            self.queue.front().and_then(|id| self.jobs.get(id))
        {
            due = due.min(chunk_due(*since, work, *chunks));
        }
        for id in &self.unsettled {
            if let Some(Job { state: State::Ended { next, .. }, .. }) = self.jobs.get(id) {
                due = due.min(*next);
            }
        }
        due
    }

    /// Does what is due.
    async fn work(&mut self, link: &mut Link) -> Result<(), Ended> {
        let now = Instant::now();
        if let Some(every) = self.shared.settings.heartbeat
            && self.next_heartbeat.is_some_and(|next| next <= now)
        {
            // As the real one: the interval, and up to a quarter more.
            self.next_heartbeat = Some(now + every + every.mul_f64(rand::random_range(0.0..0.25)));
            self.refresh(&link.api.clone()).await?;
            self.report(&link.api, PATH_HEARTBEAT, heartbeat(&self.machine.hostname), Duration::ZERO);
        }
        while let Some(id) = self.queue.front().copied() {
            if !self.advance(link, id).await? {
                break;
            }
            self.queue.pop_front();
        }
        let due: Vec<i64> = self
            .unsettled
            .iter()
            .copied()
            .filter(|id| matches!(self.jobs.get(id), Some(Job { state: State::Ended { next, .. }, .. }) if *next <= now))
            .collect();
        for id in due {
            if link.asked.values().any(|asked| *asked == id) {
                count(&self.shared.record.sums.unanswered);
            }
            self.send_result(link, id).await?;
        }
        Ok(())
    }

    /// Moves the first dispatch of the queue on; whether it has ended.
    async fn advance(&mut self, link: &mut Link, id: i64) -> Result<bool, Ended> {
        let Some(job) = self.jobs.get_mut(&id) else { return Ok(true) };
        if let State::Waiting = job.state {
            job.state = State::Running { since: Instant::now(), chunks: 0 };
            self.shared.record.execute(self.index, id, job.run, &job.script);
        }
        let State::Running { since, mut chunks } = job.state else { return Ok(true) };
        let now = Instant::now();
        let mut pieces = Vec::new();
        while chunks < job.work.chunks && !job.work.takes.is_zero() && chunk_due(since, &job.work, chunks) <= now {
            pieces.push(piece(&job.work, chunks));
            chunks += 1;
        }
        job.state = State::Running { since, chunks };
        let over = since + job.work.takes <= now;
        let context = (!pieces.is_empty()).then(|| job.context.clone());
        let ended = over.then(|| QuickJobResult {
            job_id: id,
            status: if job.work.exit_code == 0 { STATUS_SUCCESS } else { STATUS_FAILED }.to_owned(),
            stdout: (0..job.work.chunks).map(|number| piece(&job.work, number)).collect(),
            context: Some(std::mem::take(&mut job.context)),
            exit_code: Some(job.work.exit_code),
            ..QuickJobResult::default()
        });
        // Written down before anything is sent: the socket may end in between.
        if let Some(result) = ended {
            self.end(id, result);
        }
        for text in pieces {
            let progress = QuickJobProgress {
                job_id: id,
                status: STATUS_RUNNING.to_owned(),
                stdout: Some(text),
                append_output: Some(true),
                context: context.clone(),
                ..QuickJobProgress::default()
            };
            link.ask(QUICK_JOB_PROGRESS, &progress).await?;
        }
        Ok(over)
    }

    /// A result is there.
    fn end(&mut self, id: i64, result: QuickJobResult) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.state = State::Ended { result: Box::new(result), first_sent: None, next: Instant::now() };
        self.unsettled.push(id);
        count(&self.shared.record.sums.results);
    }

    async fn send_result(&mut self, link: &mut Link, id: i64) -> Result<(), Ended> {
        let Some(Job { state: State::Ended { result, first_sent, next }, .. }) = self.jobs.get_mut(&id) else { return Ok(()) };
        *next = Instant::now() + ACK_LIMIT;
        if first_sent.is_some() {
            count(&self.shared.record.sums.resent);
        }
        first_sent.get_or_insert_with(Instant::now);
        let number = link.ask(QUICK_JOB_RESULT, result).await?;
        link.asked.insert(number, id);
        Ok(())
    }

    fn acknowledged(&mut self, link: &mut Link, number: u64, args: Vec<Value>) {
        let Some(id) = link.asked.remove(&number) else { return };
        let ack = args.into_iter().next().and_then(|value| serde_json::from_value::<Ack>(value).ok());
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let State::Ended { first_sent, next, .. } = &mut job.state else { return };
        match ack {
            Some(ack) if ack.settles() => {
                if let Some(sent) = first_sent {
                    note(&mut self.shared.record.times().ack, sent.elapsed());
                }
                count(&self.shared.record.sums.acked);
                if ack.status == "ignored" {
                    count(&self.shared.record.sums.ignored);
                }
                job.state = State::Settled;
                self.unsettled.retain(|other| *other != id);
            }
            other => {
                let pause = other.and_then(|ack| ack.retry_after_ms).map_or(RETRY, Duration::from_millis);
                *next = Instant::now() + pause.mul_f64(rand::random_range(1.0..1.5));
            }
        }
    }

    async fn handle(&mut self, link: &mut Link, name: &str, args: Vec<Value>) -> Result<(), Ended> {
        let argument = args.into_iter().next().unwrap_or_default();
        match name {
            QUICK_JOB_RUN => match serde_json::from_value::<QuickJobRun>(argument) {
                Ok(run) => self.take(link, run).await,
                Err(_) => {
                    count(&self.shared.record.sums.refused);
                    Ok(())
                }
            },
            QUICK_JOB_CANCEL => {
                if let Ok(cancel) = serde_json::from_value::<QuickJobCancel>(argument) {
                    self.cancel(cancel.job_id);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn take(&mut self, link: &mut Link, run: QuickJobRun) -> Result<(), Ended> {
        let id = run.job_id;
        let run_id = run.context.get("scheduled_job_run_id").and_then(Value::as_i64);
        let record = &self.shared.record;
        record.receive(self.index, id, run_id);
        if link.came.contains(&id) {
            count(&record.sums.repeated);
        }
        link.came.push(id);
        let known = self.jobs.contains_key(&id);
        if known {
            count(&record.sums.redelivered);
        }
        if known && self.shared.settings.dedup {
            let running = matches!(self.jobs.get(&id), Some(Job { state: State::Waiting | State::Running { .. }, .. }));
            if running {
                link.ask(QUICK_JOB_ACCEPTED, &QuickJobAccepted { job_id: id }).await?;
            } else if matches!(self.jobs.get(&id), Some(Job { state: State::Ended { .. }, .. })) {
                self.send_result(link, id).await?;
            }
            return Ok(());
        }
        self.received = self.received.wrapping_add(1);
        let refusal = self.received.is_multiple_of(self.shared.settings.verify_one_in.max(1)).then(|| self.refusal(&run));
        let work = (self.shared.settings.work)(&run);
        let script = format!("{} {}", run.script_name, run.script_path);
        self.jobs.insert(id, Job { run: run_id, script, context: run.context, work, state: State::Waiting });
        if let Some(why) = refusal.flatten() {
            count(&self.shared.record.sums.refused);
            self.end(id, failure(id, &why, REASON_REFUSED));
            return Ok(());
        }
        self.queue.push_back(id);
        if self.shared.settings.dedup {
            link.ask(QUICK_JOB_ACCEPTED, &QuickJobAccepted { job_id: id }).await?;
        }
        Ok(())
    }

    /// Why a dispatch must not be run, if so.
    fn refusal(&self, run: &QuickJobRun) -> Option<String> {
        if !run.target_hostname.eq_ignore_ascii_case(&self.machine.hostname) {
            return Some(format!("the job is for {}", run.target_hostname));
        }
        let guid = guid_text(self.machine.guid);
        envelope::verify(run, &self.machine.engine_key, &guid, Utc::now().timestamp()).err().map(|why| why.to_string())
    }

    fn cancel(&mut self, id: i64) {
        // A cancel may overtake its dispatch, which must then find itself ended.
        let job = self.jobs.entry(id).or_insert_with(|| Job {
            run: None,
            script: String::new(),
            context: serde_json::Map::new(),
            work: Work::default(),
            state: State::Waiting,
        });
        if let State::Waiting | State::Running { .. } = job.state {
            count(&self.shared.record.sums.cancelled);
            self.queue.retain(|other| *other != id);
            self.end(id, failure(id, "cancelled", REASON_CANCELLED));
        }
    }

    /// Sends a report over REST beside the socket.
    fn report(&self, api: &Url, path: &'static str, body: impl Serialize, after: Duration) {
        let Ok(body) = serde_json::to_string(&body) else { return };
        let (shared, api, token) = (self.shared.clone(), api.clone(), self.machine.access_token.clone());
        let stop = shared.stop.clone();
        let sending = async move {
            tokio::time::sleep(after).await;
            let started = Instant::now();
            match http::post(&api, path, Some(&token), &body).await {
                Ok((200, _)) => {
                    count(&shared.record.sums.reports);
                    note(&mut shared.record.times().report, started.elapsed());
                }
                _ => count(&shared.record.sums.failed_reports),
            }
        };
        self.shared.reports.spawn(async move {
            tokio::select! {
                () = sending => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// An order to leave.
async fn ordered(slot: &Slot) -> (Departure, Instant) {
    loop {
        slot.wake.notified().await;
        if let Some((how, back)) = slot.take_order() {
            return (how, back.into());
        }
    }
}

async fn leave(socket: Socket, how: Departure, back: Instant) {
    match how {
        Departure::Cut => {}
        Departure::Reset => {
            let _ = socket.get_ref().set_zero_linger();
        }
        Departure::Silent => sleep_until(back).await,
    }
}

/// When the piece of that number is due; after the last one, the end.
fn chunk_due(since: Instant, work: &Work, number: u32) -> Instant {
    if number >= work.chunks {
        since + work.takes
    } else {
        since + work.takes.mul_f64(f64::from(number + 1) / f64::from(work.chunks + 1))
    }
}

/// A piece of output: lines that say which piece it is.
fn piece(work: &Work, number: u32) -> String {
    let mut text = String::with_capacity(work.chunk_bytes + 1);
    while text.len() < work.chunk_bytes {
        text.push_str(&format!("piece {number} of {}; ", work.chunks));
    }
    text.truncate(work.chunk_bytes);
    text.push('\n');
    text
}

fn failure(id: i64, why: &str, reason: &str) -> QuickJobResult {
    QuickJobResult {
        job_id: id,
        status: STATUS_FAILED.to_owned(),
        stderr: why.to_owned(),
        reason: Some(reason.to_owned()),
        ..QuickJobResult::default()
    }
}

fn heartbeat(hostname: &str) -> Heartbeat {
    Heartbeat {
        hostname: Some(hostname.to_owned()),
        service_mode: Some("system".to_owned()),
        metrics: Some(Metrics {
            operating_system: Some("Debian GNU/Linux 12".to_owned()),
            uptime: Some(86_400),
            cpu_percent: Some(rand::random_range(0.0..100.0)),
            memory_percent: Some(rand::random_range(20.0..80.0)),
            ..Metrics::default()
        }),
        internal_ip: Some("10.0.0.7".to_owned()),
        agent_build_id: Some(borealis_agent::VERSION.to_owned()),
        ..Heartbeat::default()
    }
}

fn status(hostname: &str) -> StatusReport {
    let milestone = |key: &str| Milestone {
        key: key.to_owned(),
        label: key.to_owned(),
        state: "complete".to_owned(),
        ..Milestone::default()
    };
    StatusReport {
        hostname: hostname.to_owned(),
        service_mode: "system".to_owned(),
        boot_id: "simulated".to_owned(),
        phase: "steady_state_online".to_owned(),
        status: "healthy".to_owned(),
        message: "Online".to_owned(),
        milestones: ["process_start", "socket_connected", "steady_state_online"].map(milestone).to_vec(),
        last_error: None,
    }
}
