//! The whole agent against a small engine of the test's own: enrollment, socket, scripts, reconnecting.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of a test fail the test")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use borealis_agent::{CancellationToken, Config, Settings};
use borealis_protocol::envelope;
use borealis_protocol::events::{
    CONNECT_AGENT, ConnectAgent, QUICK_JOB_ACCEPTED, QUICK_JOB_PROGRESS, QUICK_JOB_RESULT, QuickJobCancel, QuickJobProgress,
    QuickJobResult, QuickJobRun,
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

const GUID: &str = "0D2F7B1A-0000-4000-8000-00000000ABCD";
const HOST: &str = "TESTHOST";
const CODE: &str = "THE-CODE";
/// Generous, as tests share their machine.
const SOON: Duration = Duration::from_secs(30);

fn engine_key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// What the engine saw over HTTP.
#[derive(Default)]
struct Seen {
    enrollments: Vec<EnrollRequest>,
    refreshes: Vec<Value>,
    posts: Vec<(String, Value)>,
    /// What refreshes are answered, when they are refused.
    refuse: Option<(u16, &'static str)>,
}

struct Engine {
    url: String,
    seen: Arc<Mutex<Seen>>,
    sockets: mpsc::Receiver<Peer>,
}

impl Engine {
    /// `lifetime`: `expires_in` of access tokens, in seconds.
    async fn start(lifetime: i64) -> Self {
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
                        if let Some(peer) = Peer::accept(stream).await {
                            let _ = send.send(peer).await;
                        }
                    } else {
                        serve_posts(stream, &seen, &base, lifetime).await;
                    }
                });
            }
        });
        Self { url, seen, sockets }
    }

    async fn socket(&mut self) -> Peer {
        timeout(SOON, self.sockets.recv()).await.expect("the agent connects").unwrap()
    }

    fn posts(&self, path: &str) -> Vec<Value> {
        let seen = self.seen.lock().unwrap();
        seen.posts.iter().filter(|(seen, _)| seen == path).map(|(_, body)| body.clone()).collect()
    }
}

async fn serve_posts(mut stream: TcpStream, seen: &Mutex<Seen>, base: &str, lifetime: i64) {
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
        let (status, answer) = answer_post(&path, body, header("authorization"), seen, base, lifetime);
        let text = answer.to_string();
        let reply =
            format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        if stream.write_all(reply.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn answer_post(path: &str, body: Value, bearer: Option<String>, seen: &Mutex<Seen>, base: &str, lifetime: i64) -> (u16, Value) {
    let mut seen = seen.lock().unwrap();
    let signing_key = keys::spki_base64(&engine_key().verifying_key());
    let route = json!({"available": true, "site_id": 1, "worker_guid": "W1", "route_generation": 1,
        "route_path_prefix": "/_borealis/site-workers/W1", "base_url": format!("{base}/_borealis/site-workers/W1")});
    match path {
        "/api/agent/enroll/request" => {
            let request: EnrollRequest = serde_json::from_value(body).unwrap();
            if request.enrollment_code != CODE {
                return (400, json!({"error": "invalid_enrollment_code"}));
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
            if let Some((status, code)) = seen.refuse {
                return (status, json!({"error": code}));
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
            (200, json!({"status": "ok", "poll_after_ms": 15000, "site_id": 1, "site_name": "s"}))
        }
    }
}

/// The engine's end of a socket.
struct Peer {
    socket: WebSocketStream<TcpStream>,
    path: String,
    bearer: String,
    hello: ConnectAgent,
}

impl Peer {
    async fn accept(stream: TcpStream) -> Option<Self> {
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
        peer.ack(id?, json!({"status": "ok"})).await;
        Some(peer)
    }

    async fn send(&mut self, frame: &Frame) {
        let _ = self.socket.send(Message::text(framing::encode(frame))).await;
    }

    async fn ack(&mut self, id: u64, answer: Value) {
        self.send(&Frame::Ack { id, args: vec![answer] }).await;
    }

    async fn emit<T: serde::Serialize>(&mut self, name: &str, payload: &T) {
        let text = framing::encode_event(None, name, payload).unwrap();
        self.socket.send(Message::text(text)).await.unwrap();
    }

    /// The agent's next frame; pings it meanwhile. None when the agent hung up.
    async fn frame(&mut self) -> Option<Frame> {
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

    async fn event(&mut self) -> Option<(Option<u64>, String, Value)> {
        loop {
            if let Frame::Event { id, name, mut args } = self.frame().await? {
                return Some((id, name, args.remove(0)));
            }
        }
    }

    /// Acknowledges everything until a result comes, which it leaves to the caller.
    async fn result(&mut self) -> (u64, QuickJobResult, String) {
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

    async fn expect_event(&mut self, wanted: &str) -> Value {
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

fn job(job_id: i64, script: &str) -> QuickJobRun {
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
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    envelope::sign(&mut run, &engine_key(), GUID, i64::try_from(now).unwrap() + 600).unwrap();
    run
}

fn write_config(path: &Path, url: &str, code: Option<&str>) {
    std::fs::write(path, json!({"server_url": url, "enrollment_code": code}).to_string()).unwrap();
}

struct Running {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<borealis_agent::Result<()>>,
}

impl Running {
    fn start(engine: &Engine, dir: &Path, code: Option<&str>) -> Self {
        let mut config = Config::new(engine.url.parse().unwrap(), dir.to_owned());
        config.enrollment_code = code.map(str::to_owned);
        config.hostname = Some(HOST.into());
        config.heartbeat_every = Duration::from_secs(1);
        let stop = CancellationToken::new();
        let task = tokio::spawn(borealis_agent::run(config, stop.clone()));
        Self { stop, task }
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(SOON, self.task).await.expect("the agent stops").unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_survives_a_cut_and_runs_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    assert_eq!(peer.bearer, "Bearer access-0");
    assert_eq!(peer.path, "/_borealis/site-workers/W1/socket.io/?EIO=4&transport=websocket");
    assert_eq!(peer.hello.agent_id, format!("{HOST}_{GUID}_SYSTEM"));
    let can = &peer.hello.capabilities;
    assert!(can.dedup && can.rotates && can.cancel && can.output && can.system_scripts);

    let trace = dir.path().join("trace");
    let run = job(1, &format!("echo x >> {}\necho \"$GREETING\"\nsleep 1\necho done\n", trace.display()));
    peer.emit("quick_job_run", &run).await;
    let accepted = peer.expect_event(QUICK_JOB_ACCEPTED).await;
    assert_eq!(accepted, json!({"job_id": 1}));
    peer.emit("quick_job_run", &run).await;
    let (_, result, output) = peer.result().await;
    assert_eq!((result.status.as_str(), result.stdout.as_str(), result.exit_code), ("Success", "hello\ndone\n", Some(0)));
    assert_eq!(result.context, Some(run.context.clone()));
    assert!(output.starts_with("hello\n"), "live output: {output:?}");

    // The result is not acknowledged and the connection is cut: it comes again over the next one.
    drop(peer);
    let mut peer = engine.socket().await;
    let (id, again, _) = peer.result().await;
    assert_eq!(again, result);
    peer.ack(id, json!({"status": "ok"})).await;

    // Sent again after all: the stored result, no second run. Also by the next process.
    peer.emit("quick_job_run", &run).await;
    assert_eq!(peer.expect_event(QUICK_JOB_RESULT).await, serde_json::to_value(&result).unwrap());
    agent.end().await;
    let agent = Running::start(&engine, dir.path(), None);
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &run).await;
    assert_eq!(peer.expect_event(QUICK_JOB_RESULT).await, serde_json::to_value(&result).unwrap());
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n", "run once");
    assert_eq!(engine.seen.lock().unwrap().enrollments.len(), 1, "enrolled once");
    assert!(!engine.posts("/api/agent/heartbeat").is_empty());
    assert!(!engine.posts("/api/agent/details").is_empty());
    assert!(!engine.posts("/api/agent/status").is_empty());
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tampered_and_foreign_jobs_fail_and_do_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    let trace = dir.path().join("trace");
    let script = format!("echo x >> {}\n", trace.display());
    let mut altered = job(1, &script);
    altered.environment.insert("LD_PRELOAD".into(), "x".into());
    let mut unsigned = job(2, &script);
    unsigned.signature.clear();
    let mut own_key = job(3, &script);
    envelope::sign(&mut own_key, &SigningKey::from_bytes(&[6; 32]), GUID, i64::MAX).unwrap();
    let mut elsewhere = job(4, &script);
    elsewhere.target_hostname = "OTHER".into();
    let mut late = job(5, &script);
    envelope::sign(&mut late, &engine_key(), GUID, 1_000_000).unwrap();
    let mut windows = job(6, &script);
    windows.script_type = "powershell".into();
    for run in [altered, unsigned, own_key, elsewhere, late, windows] {
        peer.emit("quick_job_run", &run).await;
        let (id, result, _) = peer.result().await;
        assert_eq!((result.job_id, result.status.as_str(), result.reason.as_deref()), (run.job_id, "Failed", Some("refused")));
        assert!(!result.stderr.is_empty());
        peer.ack(id, json!({"status": "ok"})).await;
    }
    peer.emit("quick_job_run", &job(7, "echo fine")).await;
    let (_, result, _) = peer.result().await;
    assert_eq!(result.status, "Success");
    assert!(!trace.exists());
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_running_waiting_and_coming_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    let trace = dir.path().join("trace");
    let touch = format!("echo x >> {}\n", trace.display());
    let cancel = |job_id| QuickJobCancel { job_id, reason: "by ann".into() };
    peer.emit("quick_job_run", &job(1, "sleep 60 & sleep 60")).await;
    peer.expect_event(QUICK_JOB_PROGRESS).await;
    peer.emit("quick_job_run", &job(2, &touch)).await;
    peer.emit("quick_job_cancel", &cancel(2)).await;
    peer.emit("quick_job_cancel", &cancel(3)).await;
    peer.emit("quick_job_run", &job(3, &touch)).await;
    peer.emit("quick_job_cancel", &cancel(1)).await;
    let mut ended = std::collections::BTreeSet::new();
    while ended.len() < 3 {
        let (id, result, _) = peer.result().await;
        assert_eq!((result.status.as_str(), result.reason.as_deref()), ("Failed", Some("cancelled")), "{result:?}");
        assert!(result.stderr.contains("cancelled: by ann"));
        ended.insert(result.job_id);
        peer.ack(id, json!({"status": "ok"})).await;
    }
    peer.emit("quick_job_run", &job(4, "echo fine")).await;
    let (_, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.status.as_str()), (4, "Success"));
    assert!(!trace.exists());
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_agent_takes_its_script_with_it_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &job(1, "echo begun; sleep 60")).await;
    peer.emit("quick_job_run", &job(2, "echo next")).await;
    peer.expect_event(QUICK_JOB_PROGRESS).await;
    agent.stop.cancel();
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.reason.as_deref()), (1, Some("agent_stopped")));
    peer.ack(id, json!({"status": "ok"})).await;
    let task = tokio::spawn(agent.end());
    while peer.frame().await.is_some() {}
    task.await.unwrap();

    let agent = Running::start(&engine, dir.path(), None);
    let mut peer = engine.socket().await;
    let (_, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.stdout.as_str()), (2, "next\n"), "what waited is run by the next process");
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_noticed_and_a_new_socket_comes() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    // Held open, and nothing is ever said on it again.
    let silent = engine.socket().await;
    let began = Instant::now();
    let mut next = engine.socket().await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(next.path, "/socket.io/?EIO=4&transport=websocket", "the other address gets its turn");
    next.emit("quick_job_run", &job(1, "echo fine")).await;
    assert_eq!(next.result().await.1.status, "Success");
    drop(silent);
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_token_is_refreshed_and_rotated_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(30).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let peer = engine.socket().await;
    assert_eq!(peer.bearer, "Bearer access-1", "less than a minute left is not enough");
    {
        let seen = engine.seen.lock().unwrap();
        assert_eq!(seen.refreshes, [json!({"guid": GUID, "refresh_token": "refresh-0", "capabilities": {"rotates": true}})]);
    }
    let stored = std::fs::read_to_string(dir.path().join("agent.json")).unwrap();
    assert!(stored.contains("refresh-1") && !stored.contains("refresh-0"));
    assert!(!stored.contains(CODE));
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purged_agent_waits_for_a_new_code() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let mut engine = Engine::start(30).await;
    engine.seen.lock().unwrap().refuse = Some((401, "device_purged"));
    write_config(&path, &engine.url, Some(CODE));
    let mut config = Config::load(Settings::default(), Some(&path)).unwrap();
    config.state_dir = dir.path().join("state");
    config.hostname = Some(HOST.into());
    let stop = CancellationToken::new();
    let task = tokio::spawn(borealis_agent::run(config, stop.clone()));
    let running = Running { stop, task };
    let stored = || std::fs::read_to_string(dir.path().join("state/agent.json")).unwrap_or_default();
    let began = Instant::now();
    while !stored().contains(GUID) || stored().contains("refresh-0") {
        assert!(began.elapsed() < SOON, "the tokens are given up: {}", stored());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!std::fs::read_to_string(&path).unwrap().contains(CODE), "the code was used");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(engine.seen.lock().unwrap().enrollments.len(), 1, "and is not used again");

    engine.seen.lock().unwrap().refuse = None;
    write_config(&path, &engine.url, Some(CODE));
    let peer = engine.socket().await;
    assert_eq!(peer.bearer, "Bearer access-1");
    {
        let seen = engine.seen.lock().unwrap();
        assert_eq!(seen.enrollments.len(), 2);
        assert_eq!(seen.enrollments[0].agent_pubkey, seen.enrollments[1].agent_pubkey, "the same identity");
    }
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_reports_an_unknown_outcome_and_runs_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let start = || {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_borealis-agent"))
            .arg("run")
            .env("BOREALIS_AGENT_SERVER_URL", &engine.url)
            .env("BOREALIS_AGENT_ENROLLMENT_CODE", CODE)
            .env("BOREALIS_AGENT_STATE_DIR", dir.path().join("state"))
            .env("BOREALIS_AGENT_HOSTNAME", HOST)
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    };
    let (mut first, trace) = (start(), dir.path().join("trace"));
    let mut peer = engine.socket().await;
    let run = job(1, &format!("echo x >> {}\nsleep 5\n", trace.display()));
    peer.emit("quick_job_run", &run).await;
    peer.emit("quick_job_run", &job(2, "echo \"${BOREALIS_AGENT_ENROLLMENT_CODE-hidden}\"")).await;
    while peer.expect_event(QUICK_JOB_ACCEPTED).await["job_id"] != 2 {}
    while !trace.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    first.kill().await.unwrap();

    let mut second = tokio::process::Command::new(env!("CARGO_BIN_EXE_borealis-agent"))
        .args(["run", "--server-url", &engine.url, "--hostname", HOST, "--state-dir"])
        .arg(dir.path().join("state"))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut peer = engine.socket().await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.status.as_str(), result.reason.as_deref()), (1, "Failed", Some("outcome_unknown")));
    assert!(result.stderr.contains("outcome unknown"));
    assert_eq!(result.context, Some(run.context.clone()));
    peer.ack(id, json!({"status": "ok"})).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.stdout.as_str()), (2, "hidden\n"), "what waited is run, without the agent's secrets");
    peer.ack(id, json!({"status": "ok"})).await;
    peer.emit("quick_job_run", &run).await;
    assert_eq!(peer.expect_event(QUICK_JOB_RESULT).await["reason"], "outcome_unknown");
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n");
    assert_eq!(engine.seen.lock().unwrap().enrollments.len(), 1);

    let pid = nix::unistd::Pid::from_raw(i32::try_from(second.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = timeout(SOON, second.wait()).await.expect("it stops").unwrap();
    assert!(status.success(), "a clean stop is no failure: {status}");
}
