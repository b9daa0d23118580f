//! The agent's socket: one at a time, kept up for as long as the agent runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use borealis_protocol::events::{Ack, CONNECT_AGENT, Capabilities, ConnectAgent};
use borealis_protocol::framing::{self, Frame, Open};
use borealis_protocol::{CONTEXT_SYSTEM, HEADER_AGENT_CONTEXT, agent_id};
use futures::{FutureExt as _, Sink, SinkExt as _, Stream, StreamExt as _};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::{AUTHORIZATION, RETRY_AFTER, USER_AGENT};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, connect_async_tls_with_config};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use url::Url;

use crate::account::{Account, TokenError};
use crate::backoff::{Ending, Reconnect};
use crate::client::{self, parse_retry_after};
use crate::config::is_loopback;
use crate::report::Status;

/// TCP, TLS and upgrade together.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// From the upgrade to the connected namespace.
const NAMESPACE_LIMIT: Duration = Duration::from_secs(45);
/// How long the engine may take to answer `connect_agent`; engines that never answer it have registered the agent by then.
const REGISTER_LIMIT: Duration = Duration::from_secs(15);
/// How old a socket is of which every process of the engine should know.
const KNOWN_AFTER: Duration = Duration::from_secs(10);
/// How long one frame may take to be written.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// The largest message the agent takes, in bytes.
const MESSAGE_CAP_BYTES: usize = 32 * 1024 * 1024;
/// Frames waiting to be written, and events waiting to be handled.
const QUEUE: usize = 64;

/// One connection, from namespace connect to its end.
#[derive(Debug)]
pub(crate) struct Session {
    frames: mpsc::Sender<String>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Vec<Value>>>>,
    next_id: AtomicU64,
    closed: CancellationToken,
    /// The engine does not know of it.
    unknown: CancellationToken,
    opened: Instant,
}

/// An event of the engine.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) name: String,
    /// The first argument, null without one.
    pub(crate) argument: Value,
    /// To be answered with [`Session::acknowledge`] when there is one.
    pub(crate) ack_id: Option<u64>,
    pub(crate) session: Arc<Session>,
}

/// Why a call brought no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    #[error("the socket is closed")]
    Closed,
    #[error("no answer in time")]
    Timeout,
    #[error("the message has no JSON form")]
    Encode,
}

impl Session {
    pub(crate) fn new() -> (Arc<Self>, mpsc::Receiver<String>) {
        let (frames, receiver) = mpsc::channel(QUEUE);
        let session = Self {
            frames,
            waiting: Mutex::new(HashMap::new()),
            next_id: AtomicU64::new(0),
            closed: CancellationToken::new(),
            unknown: CancellationToken::new(),
            opened: Instant::now(),
        };
        (Arc::new(session), receiver)
    }

    /// The engine says that it knows of no socket of this agent. One that was opened long enough before for the engine to know
    /// leads to a process that is cut off from the others, and is given up.
    pub(crate) fn unknown_to_engine(&self) {
        if self.opened.elapsed() > KNOWN_AFTER {
            self.unknown.cancel();
        }
    }

    /// Sends an event and waits for the engine's answer.
    pub(crate) async fn call<T>(&self, name: &str, payload: &T, limit: Duration) -> Result<Vec<Value>, CallError>
    where
        T: Serialize + Sync + ?Sized,
    {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let text = framing::encode_event(Some(id), name, payload).map_err(|_| CallError::Encode)?;
        let (send, receive) = oneshot::channel();
        self.waiting().insert(id, send);
        let answer = timeout(limit, async {
            self.write(text).await?;
            tokio::select! {
                answer = receive => answer.map_err(|_| CallError::Closed),
                () = self.closed.cancelled() => Err(CallError::Closed),
            }
        })
        .await;
        self.waiting().remove(&id);
        answer.unwrap_or(Err(CallError::Timeout))
    }

    /// Sends an event that asks for an answer nobody here waits for.
    pub(crate) async fn emit_for_ack<T: Serialize + Sync + ?Sized>(&self, name: &str, payload: &T) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        if let Ok(text) = framing::encode_event(Some(id), name, payload) {
            let _ = self.write(text).await;
        }
    }

    /// Answers an event of the engine.
    pub(crate) async fn acknowledge(&self, id: u64, answer: &Value) {
        if let Ok(text) = framing::encode_ack(id, answer) {
            let _ = self.write(text).await;
        }
    }

    async fn write(&self, text: String) -> Result<(), CallError> {
        tokio::select! {
            sent = self.frames.send(text) => sent.map_err(|_| CallError::Closed),
            () = self.closed.cancelled() => Err(CallError::Closed),
        }
    }

    fn answered(&self, id: u64, args: Vec<Value>) {
        if let Some(waiting) = self.waiting().remove(&id) {
            let _ = waiting.send(args);
        }
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Vec<Value>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the socket needs of the agent.
pub(crate) struct Socket {
    pub(crate) server_url: Url,
    pub(crate) allow_plain_http: bool,
    pub(crate) hostname: String,
    pub(crate) tls: Arc<rustls::ClientConfig>,
    pub(crate) account: Arc<Account>,
    pub(crate) status: Arc<Status>,
    /// Set while a socket is registered.
    pub(crate) link: watch::Sender<Option<Arc<Session>>>,
    pub(crate) inbox: mpsc::Sender<Inbound>,
}

/// How a connection, or the attempt, ended.
#[derive(Debug)]
struct Ended {
    why: String,
    ending: Ending,
}

impl Ended {
    /// The engine was not reached, or is gone.
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), ending: Ending::Away }
    }

    const fn with(mut self, ending: Ending) -> Self {
        self.ending = ending;
        self
    }
}

/// A queue for the events of the engine.
pub(crate) fn inbox() -> (mpsc::Sender<Inbound>, mpsc::Receiver<Inbound>) {
    mpsc::channel(QUEUE)
}

impl Socket {
    /// Connects again and again until `stop`.
    pub(crate) async fn keep_up(&self, stop: CancellationToken) {
        let mut reconnect = Reconnect::new();
        while !stop.is_cancelled() {
            self.status.active("socket_connecting");
            let ended = self.connect_once(reconnect.failures(), &stop).await;
            self.link.send_replace(None);
            if stop.is_cancelled() {
                return;
            }
            let pause = reconnect.wait(ended.ending);
            warn!(why = %ended.why, ending = ?ended.ending, pause_ms = pause.as_millis(), "socket disconnected");
            self.status.disconnected(&ended.why);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    async fn connect_once(&self, failures: u32, stop: &CancellationToken) -> Ended {
        let opening = async {
            let bearer = self.account.bearer().await.map_err(|error| match error {
                TokenError::NotEnrolled => Ended::new("not enrolled").with(Ending::Refused),
                TokenError::Transient { reason, ending } => Ended::new(reason).with(ending),
            })?;
            let url = self.url(failures).ok_or_else(|| Ended::new("the socket's URL is not usable"))?;
            debug!(%url, "connecting");
            timeout(CONNECT_LIMIT, self.open(&url, &bearer)).await.unwrap_or_else(|_| Err(Ended::new("no connection in time")))
        };
        let opened = tokio::select! {
            opened = opening => opened,
            () = stop.cancelled() => return Ended::new("stopped"),
        };
        let socket = match opened {
            Ok(socket) => socket,
            Err(ended) => return ended,
        };
        let (mut sink, mut stream) = socket.split();
        let ended = tokio::select! {
            ended = self.serve(&mut sink, &mut stream) => ended,
            () = stop.cancelled() => Ended::new("stopped"),
        };
        // Manners, not needed: the other side may be gone.
        let _ = timeout(Duration::from_secs(1), async {
            let _ = sink.send(Message::text(framing::encode(&Frame::Disconnect))).await;
            let _ = sink.close().await;
        })
        .await;
        ended
    }

    async fn open(
        &self,
        url: &Url,
        bearer: &str,
    ) -> Result<tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>, Ended> {
        let mut request = url.as_str().into_client_request().map_err(|error| Ended::new(error.to_string()))?;
        let bearer = HeaderValue::from_str(&format!("Bearer {bearer}")).map_err(|_| Ended::new("the token is no header"))?;
        let headers = request.headers_mut();
        headers.insert(AUTHORIZATION, bearer);
        headers.insert(HEADER_AGENT_CONTEXT, HeaderValue::from_static(CONTEXT_SYSTEM));
        headers.insert(USER_AGENT, HeaderValue::from_static(client::USER_AGENT));
        let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_CAP_BYTES)).max_frame_size(Some(MESSAGE_CAP_BYTES));
        let connector = Connector::Rustls(Arc::clone(&self.tls));
        match connect_async_tls_with_config(request, Some(config), true, Some(connector)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => {
                let status = response.status().as_u16();
                if matches!(status, 401 | 403) {
                    // Only the refresh route decides whether the account is over.
                    self.account.distrust_access_token();
                }
                let hint = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(parse_retry_after);
                Err(Ended::new(format!("the engine answered {status} to the socket")).with(Ending::of_status(status, hint)))
            }
            Err(error) => Err(Ended::new(error.to_string())),
        }
    }

    /// Where to connect: the route of the last enrollment or refresh, or the server's own URL. After a failure the other one
    /// gets its turn, as a route may have gone stale.
    fn url(&self, failures: u32) -> Option<Url> {
        let route = self.account.route();
        let base = match route.as_ref().and_then(|route| route.usable_base_url()).and_then(|base| Url::parse(base).ok()) {
            Some(base) if failures.is_multiple_of(2) && self.may_go_to(&base) => base,
            _ => self.server_url.clone(),
        };
        let mut url = client::join(&base, "/socket.io/");
        let scheme = match url.scheme() {
            "https" => "wss",
            "http" => "ws",
            _ => return None,
        };
        url.set_scheme(scheme).ok()?;
        url.set_query(Some("EIO=4&transport=websocket"));
        Some(url)
    }

    /// A route must not lead the token from https to plain http.
    fn may_go_to(&self, base: &Url) -> bool {
        match base.scheme() {
            "https" => true,
            "http" => self.server_url.scheme() == "http" && (self.allow_plain_http || is_loopback(base)),
            _ => false,
        }
    }

    async fn serve<W, R>(&self, sink: &mut W, stream: &mut R) -> Ended
    where
        W: Sink<Message, Error = tungstenite::Error> + Unpin,
        R: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
    {
        let open = match timeout(NAMESPACE_LIMIT, greet(sink, stream)).await {
            Ok(Ok(open)) => open,
            Ok(Err(ended)) => return ended,
            Err(_) => return Ended::new("the namespace was not connected in time"),
        };
        // A peer that is alive pings; silence for longer than this means it is not there any more.
        let silence = Duration::from_millis(open.ping_interval.saturating_add(open.ping_timeout).clamp(1000, 600_000));
        let (session, frames) = Session::new();
        let registered_at: Mutex<Option<Instant>> = Mutex::new(None);
        let mut registration = std::pin::pin!(self.register(&session, &registered_at));
        let mut ended = tokio::select! {
            ended = write_frames(sink, frames) => registration.now_or_never().unwrap_or(ended),
            // An engine that refuses may hang up at once: its answer counts, not the end of the socket.
            ended = self.read_frames(stream, &session, silence) => registration.now_or_never().unwrap_or(ended),
            ended = &mut registration => ended,
            () = session.unknown.cancelled() => Ended::new("the engine knows of no socket of this agent"),
        };
        session.closed.cancel();
        session.waiting().clear();
        if let Some(at) = registered_at.lock().ok().and_then(|at| *at) {
            ended.ending = Ending::Lost(at.elapsed());
        }
        ended
    }

    /// Introduces the agent and lets the rest of it use the socket; ends only when the engine refuses.
    async fn register(&self, session: &Arc<Session>, registered_at: &Mutex<Option<Instant>>) -> Ended {
        let hello = ConnectAgent {
            agent_id: agent_id(&self.hostname, &self.account.guid(), CONTEXT_SYSTEM),
            hostname: self.hostname.clone(),
            service_mode: "system".to_owned(),
            capabilities: Capabilities {
                runtime: "rust".to_owned(),
                system_scripts: true,
                dedup: true,
                rotates: true,
                cancel: true,
                output: true,
                process_management: true,
                ..Capabilities::default()
            },
            helper_contexts: Vec::new(),
            machine_id: self.account.machine_id().to_owned(),
            instance: self.account.instance().to_owned(),
        };
        match session.call(CONNECT_AGENT, &hello, REGISTER_LIMIT).await {
            Ok(mut args) => {
                let answer = if args.is_empty() { Value::Null } else { args.swap_remove(0) };
                let ack: Ack = serde_json::from_value(answer).unwrap_or_else(|_| Ack::ok());
                if let Some(error) = ack.error {
                    if matches!(error.as_str(), "token_expired" | "invalid_token" | "token_version_mismatch") {
                        self.account.distrust_access_token();
                    }
                    let again = ack.retry_after_ms.map(Duration::from_millis);
                    let why = self.account.hear_refusal(&error, again).map(str::to_owned);
                    return Ended::new(why.unwrap_or_else(|| format!("the engine refused the agent: {error}")))
                        .with(Ending::of_refusal(ack.retry_after_ms));
                }
            }
            Err(CallError::Timeout) => debug!("connect_agent was not answered"),
            Err(error) => return Ended::new(error.to_string()),
        }
        if let Ok(mut at) = registered_at.lock() {
            *at = Some(Instant::now());
        }
        info!("socket connected");
        self.status.complete("socket_connecting");
        self.status.complete("socket_connected");
        self.status.complete("steady_state_online");
        self.link.send_replace(Some(Arc::clone(session)));
        std::future::pending().await
    }

    async fn read_frames<R>(&self, stream: &mut R, session: &Arc<Session>, silence: Duration) -> Ended
    where
        R: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
    {
        loop {
            let text = match timeout(silence, next_text(stream)).await {
                Ok(Ok(text)) => text,
                Ok(Err(ended)) => return ended,
                Err(_) => return Ended::new("the engine has gone silent"),
            };
            match framing::decode(&text) {
                Ok(Frame::Ping(payload)) => {
                    if session.write(framing::encode(&Frame::Pong(payload))).await.is_err() {
                        return Ended::new("cannot answer a ping");
                    }
                }
                Ok(Frame::Event { id, name, args }) => {
                    let argument = args.into_iter().next().unwrap_or(Value::Null);
                    let inbound = Inbound { name, argument, ack_id: id, session: Arc::clone(session) };
                    if self.inbox.send(inbound).await.is_err() {
                        return Ended::new("the agent is stopping");
                    }
                }
                Ok(Frame::Ack { id, args }) => session.answered(id, args),
                Ok(Frame::Close | Frame::Disconnect) => return Ended::new("the engine closed the socket"),
                Ok(Frame::ConnectError(data)) => return refused(data.as_ref()),
                Ok(Frame::Open(_) | Frame::Connect(_) | Frame::Pong(_) | Frame::Noop) => {}
                Err(error) => warn!(%error, "a frame that is not understood"),
            }
        }
    }
}

async fn greet<W, R>(sink: &mut W, stream: &mut R) -> Result<Open, Ended>
where
    W: Sink<Message, Error = tungstenite::Error> + Unpin,
    R: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    let mut opened = None;
    loop {
        let reply = match framing::decode(&next_text(stream).await?) {
            Ok(Frame::Open(open)) => {
                opened = Some(open);
                Frame::Connect(None)
            }
            Ok(Frame::Ping(payload)) => Frame::Pong(payload),
            Ok(Frame::Connect(_)) => match opened {
                Some(open) => return Ok(open),
                None => return Err(Ended::new("the namespace came before the transport")),
            },
            Ok(Frame::ConnectError(data)) => return Err(refused(data.as_ref())),
            Ok(Frame::Close | Frame::Disconnect) => return Err(Ended::new("the engine closed the socket")),
            Ok(_) => continue,
            Err(error) => return Err(Ended::new(format!("not an engine: {error}"))),
        };
        sink.send(Message::text(framing::encode(&reply))).await.map_err(|error| Ended::new(error.to_string()))?;
    }
}

async fn write_frames<W>(sink: &mut W, mut frames: mpsc::Receiver<String>) -> Ended
where
    W: Sink<Message, Error = tungstenite::Error> + Unpin,
{
    while let Some(text) = frames.recv().await {
        match timeout(WRITE_LIMIT, sink.send(Message::text(text))).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Ended::new(error.to_string()),
            Err(_) => return Ended::new("the engine does not read"),
        }
    }
    Ended::new("the agent is stopping")
}

/// The next text frame. What else a WebSocket carries is skipped, or is the end.
async fn next_text<R>(stream: &mut R) -> Result<String, Ended>
where
    R: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    loop {
        match stream.next().await {
            Some(Ok(Message::Text(text))) => return Ok(text.as_str().to_owned()),
            Some(Ok(Message::Close(frame))) => {
                let why = frame.map_or_else(String::new, |frame| format!(" ({} {})", frame.code, frame.reason));
                return Err(Ended::new(format!("the engine closed the socket{why}")));
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(Ended::new(error.to_string())),
            None => return Err(Ended::new("the connection was cut")),
        }
    }
}

fn refused(data: Option<&Value>) -> Ended {
    let message = data.and_then(|data| data.get("message")).and_then(Value::as_str).unwrap_or("no reason given");
    let hint = data
        .and_then(|data| data.get("retry_after_ms").or_else(|| data.get("data")?.get("retry_after_ms")))
        .and_then(Value::as_u64);
    Ended::new(format!("the engine refused the namespace: {message}")).with(Ending::of_refusal(hint))
}
