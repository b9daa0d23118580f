//! A small engine of the test's own, and an agent at it.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use borealis_agent::{CancellationToken, Config};
use borealis_protocol::envelope;
use borealis_protocol::events::{
    CONNECT_AGENT, ConnectAgent, QUICK_JOB_ACCEPTED, QUICK_JOB_PROGRESS, QUICK_JOB_RESULT, QuickJobProgress, QuickJobResult,
    QuickJobRun,
};
use borealis_protocol::framing::{self, Frame, Open};
use borealis_protocol::keys::{self, SigningKey};
use borealis_protocol::rest::{EnrollRequest, PollRequest};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async};

pub const GUID: &str = "0D2F7B1A-0000-4000-8000-00000000ABCD";
pub const HOST: &str = "TESTHOST";
pub const CODE: &str = "THE-CODE";
/// Generous, as tests share their machine.
pub const SOON: Duration = Duration::from_secs(30);

pub fn engine_key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// What the engine saw over HTTP.
#[derive(Default)]
pub struct Seen {
    pub enrollments: Vec<EnrollRequest>,
    pub refreshes: Vec<Value>,
    pub posts: Vec<(String, Value)>,
    /// What refreshes are answered, when they are refused: status and body.
    pub refuse: Option<(u16, String)>,
    /// How many were.
    pub refused: usize,
    /// What `connect_agent` is answered, when it is refused.
    pub refuse_hello: Option<Value>,
    /// Seconds by which the engine's clock is ahead of this machine's, when it says the time.
    pub clock_ahead: Option<i64>,
    /// What heartbeats are told of the agent's socket; nothing by an engine of the reference.
    pub socket_connected: Option<bool>,
}

pub struct Engine {
    pub url: String,
    pub seen: Arc<Mutex<Seen>>,
    pub sockets: mpsc::Receiver<Peer>,
    /// The machine id of its agents.
    machine_id: tempfile::NamedTempFile,
}

impl Engine {
    /// `lifetime`: `expires_in` of access tokens, in seconds.
    pub async fn start(lifetime: i64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (send, sockets) = mpsc::channel(16);
        let (shared, base) = (Arc::clone(&seen), url.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, base, send) = (Arc::clone(&shared), base.clone(), send.clone());
                tokio::spawn(async move {
                    let mut first = [0u8; 3];
                    while stream.peek(&mut first).await.is_ok_and(|count| count > 0 && count < 3) {}
                    if &first == b"GET" {
                        let refusal = seen.lock().unwrap().refuse_hello.clone();
                        if let Some(peer) = Peer::accept(stream, refusal).await {
                            let _ = send.send(peer).await;
                        }
                    } else {
                        serve_posts(stream, &seen, &base, lifetime).await;
                    }
                });
            }
        });
        let machine_id = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(machine_id.path(), "0123456789abcdef0123456789ABCDEF\n").unwrap();
        Self { url, seen, sockets, machine_id }
    }

    pub async fn socket(&mut self) -> Peer {
        timeout(SOON, self.sockets.recv()).await.expect("the agent connects").unwrap()
    }

    pub fn posts(&self, path: &str) -> Vec<Value> {
        let seen = self.seen.lock().unwrap();
        seen.posts.iter().filter(|(seen, _)| seen == path).map(|(_, body)| body.clone()).collect()
    }
}

pub async fn serve_posts(mut stream: TcpStream, seen: &Mutex<Seen>, base: &str, lifetime: i64) {
    let mut buffer = Vec::new();
    loop {
        let head_end = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            let mut chunk = [0u8; 4096];
            match stream.read(&mut chunk).await {
                Ok(count) if count > 0 => buffer.extend_from_slice(&chunk[..count]),
                _ => return,
            }
        };
        let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
        let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let header = |name: &str| {
            head.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let length: usize = header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
        while buffer.len() < head_end + length {
            let mut chunk = [0u8; 4096];
            match stream.read(&mut chunk).await {
                Ok(count) if count > 0 => buffer.extend_from_slice(&chunk[..count]),
                _ => return,
            }
        }
        let body: Value = serde_json::from_slice(&buffer[head_end..head_end + length]).unwrap_or(Value::Null);
        buffer.drain(..head_end + length);
        let (status, text) = answer_post(&path, body, header("authorization"), seen, base, lifetime);
        let kind = if text.starts_with('<') { "text/html" } else { "application/json" };
        let ahead = seen.lock().unwrap().clock_ahead;
        let date = ahead.and_then(|ahead| chrono::DateTime::from_timestamp(now() + ahead, 0));
        let date = date.map_or_else(String::new, |date| date.format("date: %a, %d %b %Y %H:%M:%S GMT\r\n").to_string());
        let reply = format!("HTTP/1.1 {status} X\r\n{date}content-type: {kind}\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

pub fn answer_post(
    path: &str,
    body: Value,
    bearer: Option<String>,
    seen: &Mutex<Seen>,
    base: &str,
    lifetime: i64,
) -> (u16, String) {
    let mut seen = seen.lock().unwrap();
    let seen = &mut *seen;
    let signing_key = keys::spki_base64(&engine_key().verifying_key());
    let route = json!({"available": true, "site_id": 1, "worker_guid": "W1", "route_generation": 1,
        "route_path_prefix": "/_borealis/site-workers/W1", "base_url": format!("{base}/_borealis/site-workers/W1")});
    let (status, answer) = match path {
        "/api/agent/enroll/request" => {
            let request: EnrollRequest = serde_json::from_value(body).unwrap();
            if request.enrollment_code != CODE {
                return (400, refusal("invalid_enrollment_code"));
            }
            seen.enrollments.push(request);
            let nonce = keys::to_base64(&[3; 32]);
            (
                200,
                json!({"status": "pending", "approval_reference": "ref-1", "server_nonce": nonce, "poll_after_ms": 100,
                "signing_key": signing_key}),
            )
        }
        "/api/agent/enroll/poll" => {
            let poll: PollRequest = serde_json::from_value(body).unwrap();
            let request = seen.enrollments.last().unwrap();
            let proof = keys::enrollment_proof_bytes(&[3; 32], "ref-1", &keys::from_base64(&poll.client_nonce).unwrap());
            let key = keys::from_spki_base64(&request.agent_pubkey).unwrap();
            keys::verify_base64(&key, &proof, &poll.proof_sig).unwrap();
            assert!(poll.capabilities.rotates && poll.client_nonce == request.client_nonce);
            (
                200,
                json!({"status": "approved", "guid": GUID.to_lowercase(), "access_token": "access-0", "refresh_token": "refresh-0",
                "expires_in": lifetime, "token_type": "Bearer", "signing_key": signing_key, "remote_ops_route": route}),
            )
        }
        "/api/agent/token/refresh" => {
            if let Some((status, body)) = seen.refuse.clone() {
                seen.refused += 1;
                return (status, body);
            }
            seen.refreshes.push(body);
            let count = seen.refreshes.len();
            (
                200,
                json!({"access_token": format!("access-{count}"), "refresh_token": format!("refresh-{count}"),
                "expires_in": 900, "token_type": "Bearer", "remote_ops_route": route}),
            )
        }
        _ if bearer.is_none() => (401, json!({"error": "missing_authorization"})),
        _ => {
            seen.posts.push((path.to_owned(), body));
            let mut answer = json!({"status": "ok", "poll_after_ms": 15000, "site_id": 1, "site_name": "s"});
            if let Some(connected) = seen.socket_connected.filter(|_| path == "/api/agent/heartbeat") {
                answer["socket_connected"] = connected.into();
            }
            (200, answer)
        }
    };
    (status, answer.to_string())
}

/// A refusal as the engine writes it.
pub fn refusal(code: &str) -> String {
    json!({"error": code, "message": "m", "request_id": "r"}).to_string()
}

/// Epoch seconds of this machine.
pub fn now() -> i64 {
    chrono::Utc::now().timestamp()
}

/// The engine's end of a socket.
pub struct Peer {
    pub socket: WebSocketStream<TcpStream>,
    pub path: String,
    pub bearer: String,
    pub hello: ConnectAgent,
}

impl Peer {
    pub async fn accept(stream: TcpStream, refusal: Option<Value>) -> Option<Self> {
        let mut path = String::new();
        let mut bearer = String::new();
        #[allow(clippy::result_large_err, reason = "the signature the library asks for")]
        let look = |request: &Request, response: Response| {
            path = request.uri().to_string();
            bearer = request.headers().get("authorization").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
            Ok(response)
        };
        let mut socket = accept_hdr_async(stream, look).await.ok()?;
        let open = Open { sid: "s".into(), upgrades: vec![], ping_interval: 700, ping_timeout: 500, max_payload: 1_000_000 };
        socket.send(Message::text(framing::encode(&Frame::Open(open)))).await.ok()?;
        let mut peer = Self { socket, path, bearer, hello: ConnectAgent::default() };
        assert_eq!(peer.frame().await?, Frame::Connect(None));
        peer.send(&Frame::Connect(Some(json!({"sid": "n"})))).await;
        let (id, name, argument) = peer.event().await?;
        assert_eq!(name, CONNECT_AGENT);
        peer.hello = ConnectAgent::from_value(&argument).unwrap();
        let hangs_up = refusal.is_some();
        let answer = Frame::Ack { id: id?, args: vec![refusal.unwrap_or_else(|| json!({"status": "ok"}))] };
        peer.socket.feed(Message::text(framing::encode(&answer))).await.ok()?;
        if hangs_up {
            // In one packet with the answer, so that the agent reads both at once.
            peer.socket.feed(Message::text(framing::encode(&Frame::Disconnect))).await.ok()?;
        }
        peer.socket.flush().await.ok()?;
        Some(peer)
    }

    pub async fn send(&mut self, frame: &Frame) {
        let _ = self.socket.send(Message::text(framing::encode(frame))).await;
    }

    pub async fn ack(&mut self, id: u64, answer: Value) {
        self.send(&Frame::Ack { id, args: vec![answer] }).await;
    }

    pub async fn emit<T: serde::Serialize>(&mut self, name: &str, payload: &T) {
        let text = framing::encode_event(None, name, payload).unwrap();
        self.socket.send(Message::text(text)).await.unwrap();
    }

    /// The agent's next frame; pings it meanwhile. None when the agent hung up.
    pub async fn frame(&mut self) -> Option<Frame> {
        let mut ping = tokio::time::interval(Duration::from_millis(300));
        let deadline = Instant::now() + SOON;
        loop {
            assert!(Instant::now() < deadline, "the agent says nothing");
            tokio::select! {
                message = self.socket.next() => match message {
                    Some(Ok(Message::Text(text))) => match framing::decode(text.as_str()).unwrap() {
                        Frame::Pong(_) => {}
                        frame => return Some(frame),
                    },
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                    Some(Ok(_)) => {}
                },
                _ = ping.tick() => self.send(&Frame::Ping(String::new())).await,
            }
        }
    }

    /// Keeps the agent connected until something is so.
    pub async fn attend(&mut self, what: &str, mut so: impl FnMut() -> bool) {
        let mut ping = tokio::time::interval(Duration::from_millis(300));
        let deadline = Instant::now() + SOON;
        while !so() {
            assert!(Instant::now() < deadline, "{what}");
            tokio::select! {
                message = self.socket.next() => assert!(matches!(message, Some(Ok(_))), "the socket is up: {message:?}"),
                _ = ping.tick() => self.send(&Frame::Ping(String::new())).await,
            }
        }
    }

    pub async fn event(&mut self) -> Option<(Option<u64>, String, Value)> {
        loop {
            if let Frame::Event { id, name, mut args } = self.frame().await? {
                return Some((id, name, args.remove(0)));
            }
        }
    }

    /// Acknowledges everything until a result comes, which it leaves to the caller.
    pub async fn result(&mut self) -> (u64, QuickJobResult, String) {
        let mut output = String::new();
        loop {
            let (id, name, argument) = self.event().await.expect("a result before the socket ends");
            let id = id.expect("reports ask for an answer");
            match name.as_str() {
                QUICK_JOB_RESULT => return (id, serde_json::from_value(argument).unwrap(), output),
                QUICK_JOB_PROGRESS => {
                    let progress: QuickJobProgress = serde_json::from_value(argument).unwrap();
                    assert_eq!(progress.append_output, Some(true));
                    output.push_str(&progress.stdout.unwrap_or_default());
                }
                QUICK_JOB_ACCEPTED => {}
                other => panic!("unexpected {other}"),
            }
            self.ack(id, json!({"status": "ok"})).await;
        }
    }

    pub async fn expect_event(&mut self, wanted: &str) -> Value {
        loop {
            let (id, name, argument) = self.event().await.expect("the socket is up");
            if let Some(id) = id {
                self.ack(id, json!({"status": "ok"})).await;
            }
            if name == wanted {
                return argument;
            }
        }
    }
}

pub fn job(job_id: i64, script: &str) -> QuickJobRun {
    let mut run = QuickJobRun {
        job_id,
        target_hostname: HOST.to_lowercase(),
        script_type: "bash".into(),
        script_name: "test".into(),
        script_content: keys::to_base64(script.as_bytes()),
        script_encoding: "base64".into(),
        environment: [("GREETING".to_owned(), "hello".to_owned())].into(),
        timeout_seconds: 60,
        run_mode: "system".into(),
        context: json!({"scheduled_job_run_id": 77}).as_object().cloned().unwrap(),
        ..QuickJobRun::default()
    };
    envelope::sign(&mut run, &engine_key(), GUID, now() + 600).unwrap();
    run
}

pub fn write_config(path: &Path, url: &str, code: Option<&str>) {
    std::fs::write(path, json!({"server_url": url, "enrollment_code": code}).to_string()).unwrap();
}

pub struct Running {
    pub stop: CancellationToken,
    pub task: tokio::task::JoinHandle<borealis_agent::Result<()>>,
}

impl Running {
    pub fn start(engine: &Engine, dir: &Path, code: Option<&str>) -> Self {
        let mut config = Config::new(engine.url.parse().unwrap(), dir.to_owned());
        config.enrollment_code = code.map(str::to_owned);
        config.hostname = Some(HOST.into());
        config.machine_id_file = Some(engine.machine_id.path().to_owned());
        config.heartbeat_every = Duration::from_secs(1);
        let stop = CancellationToken::new();
        let task = tokio::spawn(borealis_agent::run(config, stop.clone()));
        Self { stop, task }
    }

    pub async fn end(self) {
        self.stop.cancel();
        timeout(SOON, self.task).await.expect("the agent stops").unwrap().unwrap();
    }
}
