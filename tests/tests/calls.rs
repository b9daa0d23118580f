//! Calls to agents: every form of answer, agents that do not answer as they should, callers that go away, and sockets that are at another
//! API process. The agents are spoken for frame by frame.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_engine::devices::calls::{ListProcesses, Outcome, ProcessRequest, Spec};
use borealis_protocol::{CONTEXT_SYSTEM, agent_id, calls::PROCESS_MANAGEMENT_REQUEST, framing::Frame};
use borealis_tests::{
    Actor, TestEngine,
    actor::{Credential, Device},
    agent::{Socket, open_agent},
    engine::Node,
    eventually,
};
use borealis_workers::api_client::ApiClient;
use borealis_workflows::Agents;
use futures::future::join_all;
use serde_json::{Value, json};
use tokio::{sync::mpsc, task::AbortHandle};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(10);

/// What an agent does with a call: after this time it sends these acks, each the text of the arguments.
type Answer = (Duration, Vec<String>);

/// The socket of a device, whose calls a test answers. Dropping it closes the socket.
struct Agent {
    device: Device,
    calls: Arc<AtomicUsize>,
    /// The most calls that were not answered yet at once.
    most: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Agent {
    /// Connects a device to a node; each of its calls is answered as `answer` says, by its number from 0.
    async fn connect(device: Device, node: &Node, answer: impl Fn(usize, &Value) -> Answer + Send + 'static) -> Self {
        let Credential::Bearer(token) = device.credential.clone() else { panic!("a device has a token") };
        let mut socket = open_agent(node.addr, &token).await.expect("a socket");
        let id = agent_id(&device.hostname, &device.guid, CONTEXT_SYSTEM);
        let hello = socket.hello(&id, json!({"dedup": true, "process_management": true})).await;
        assert_eq!(hello["status"], "ok", "{hello}");
        let calls = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn(serve(socket, calls.clone(), most.clone(), answer)).abort_handle();
        Self { device, calls, most, task }
    }

    fn path(&self) -> String {
        format!("/api/device/processes/{}", self.device.guid)
    }

    fn guid(&self) -> Uuid {
        Uuid::parse_str(&self.device.guid).expect("a GUID")
    }
}

async fn serve(mut socket: Socket, calls: Arc<AtomicUsize>, most: Arc<AtomicUsize>, answer: impl Fn(usize, &Value) -> Answer) {
    let (send, mut due) = mpsc::unbounded_channel::<(u64, String)>();
    let mut open = 0_usize;
    loop {
        tokio::select! {
            frame = socket.next() => {
                let Some(frame) = frame else { return };
                let Frame::Event { id: Some(id), name, args } = frame else { continue };
                assert_eq!(name, PROCESS_MANAGEMENT_REQUEST);
                open += 1;
                most.fetch_max(open, Ordering::SeqCst);
                let (after, answers) = answer(calls.fetch_add(1, Ordering::SeqCst), args.first().expect("a request"));
                let send = send.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    for answer in answers {
                        let _ = send.send((id, answer));
                    }
                });
            }
            Some((id, text)) = due.recv() => {
                open = open.saturating_sub(1);
                socket.raw(&format!("43{id}{text}")).await;
            }
        }
    }
}

fn at_once(answer: impl Into<String>) -> Answer {
    (Duration::ZERO, vec![answer.into()])
}

fn one_process() -> String {
    json!([{"ok": true, "reported_at": 1_700_000_000, "refresh_interval_ms": 1_000,
            "processes": [{"id": "7:1", "pid": 7, "name": "init", "disk_read_rate": 12}]}])
    .to_string()
}

fn request() -> ProcessRequest {
    ProcessRequest { action: "list".into(), max_age_seconds: 5.0, requested_at: 0 }
}

async fn engine() -> (TestEngine, Actor, i64) {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("site").await;
    let operator = engine.operator(&[site]).await;
    ready(&engine).await;
    (engine, operator, site)
}

async fn ready(node: &Node) {
    eventually("the sockets are open", LIMIT, || async {
        (open_agent(node.addr, "a.b.c").await.err() == Some(401)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_answer_has_one_status() {
    let (engine, operator, site) = engine().await;
    let rows = |count: usize| "[0],".repeat(count);
    let cases: Vec<(String, u16, &str)> = vec![
        (one_process(), 200, ""),
        (r#"[{"processes":[]}]"#.into(), 200, ""),
        (r#"[{"status":"ok","processes":[]}]"#.into(), 200, ""),
        (r#"[{"ok":false,"error":"access_denied","message":"No."}]"#.into(), 403, "access_denied"),
        (r#"[{"ok":false,"error":"process_not_found"}]"#.into(), 404, "process_not_found"),
        (r#"[{"ok":false,"error":"protected_process"}]"#.into(), 409, "protected_process"),
        (r#"[{"ok":false,"error":"invalid_request"}]"#.into(), 400, "invalid_request"),
        (r#"[{"error":"unsupported_event"}]"#.into(), 501, "unsupported_event"),
        (r#"[{"error":"handler_panic"}]"#.into(), 502, "agent_error"),
        (r#"[{"status":"error","detail":"broken"}]"#.into(), 502, "agent_error"),
        (r#"[{"ok":false,"error":"agent_busy"}]"#.into(), 503, "agent_busy"),
        (r#"[{"ok":false,"error":"timeout"}]"#.into(), 504, "timeout"),
        ("[null]".into(), 502, "invalid_agent_response"),
        ("[]".into(), 502, "invalid_agent_response"),
        (r#"["ok"]"#.into(), 502, "invalid_agent_response"),
        (r#"[{"ok":true}]"#.into(), 502, "invalid_agent_response"),
        (r#"[{"ok":true,"processes":{}}]"#.into(), 502, "invalid_agent_response"),
        // More values, and more bytes, than a list of processes has.
        (format!(r#"[{{"ok":true,"processes":[],"x":[{}0]}}]"#, rows(500_000)), 502, "invalid_agent_response"),
        (format!(r#"[{{"ok":true,"processes":[],"x":"{}"}}]"#, "x".repeat(9 << 20)), 502, "invalid_agent_response"),
        (format!(r#"[{{"ok":true,"processes":[],"x":{}1{}}}]"#, "[".repeat(100), "]".repeat(100)), 502, "invalid_agent_response"),
    ];
    let answers: Vec<String> = cases.iter().map(|(answer, ..)| answer.clone()).collect();
    let agent =
        Agent::connect(engine.device(site).await, &engine, move |number, _| at_once(answers[number % answers.len()].clone()))
            .await;
    for (answer, status, code) in &cases {
        let shown: String = answer.chars().take(80).collect();
        let reply = operator.get(&agent.path()).await;
        if *status == 200 {
            let body = reply.ok();
            assert_eq!((&body["status"], &body["agent_socket"]), (&json!("ok"), &json!(true)), "{shown}");
            assert_eq!(body["count"], body["processes"].as_array().expect("rows").len());
        } else {
            let reply = reply.error(*status, code);
            assert!(*status != 502 || reply.body.get("processes").is_none(), "{shown}");
        }
    }
    let body = operator.get(&agent.path()).await.ok();
    assert_eq!((&body["reported_at"], &body["refresh_interval_ms"]), (&json!(1_700_000_000), &json!(5_000)), "{body}");
    assert_eq!((&body["processes"][0]["pid"], &body["processes"][0]["disk_read_rate"]), (&json!(7), &json!(12)), "{body}");
    assert_eq!(body["hostname"], agent.device.hostname);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_asks_reaches_the_agent_within_bounds() {
    let (engine, operator, site) = engine().await;
    let (send, mut heard) = mpsc::unbounded_channel();
    let agent = Agent::connect(engine.device(site).await, &engine, move |_, request| {
        let _ = send.send(request.clone());
        at_once(one_process())
    })
    .await;
    for (asked, told) in [("", 5.0), ("?max_age_seconds=0", 0.25), ("?max_age_seconds=3", 3.0), ("?max_age_seconds=1e300", 15.0)]
    {
        let _ = operator.get(&format!("{}{asked}", agent.path())).await.ok();
        let request = heard.recv().await.expect("a request");
        assert_eq!((&request["action"], &request["max_age_seconds"]), (&json!("list"), &json!(told)), "{asked}");
    }
    for bad in ["?max_age_seconds=NaN", "?max_age_seconds=inf"] {
        let _ = operator.get(&format!("{}{bad}", agent.path())).await.error(400, "invalid_max_age_seconds");
    }
    for bad in ["?max_age_seconds=x", "?max_age=1"] {
        let _ = operator.get(&format!("{}{bad}", agent.path())).await.error(400, "invalid_query");
    }
    assert_eq!(agent.calls.load(Ordering::SeqCst), 4, "what is refused is not sent");

    let elsewhere = engine.site("elsewhere").await.0;
    let stranger = engine.operator(&[elsewhere]).await;
    let _ = stranger.get(&agent.path()).await.error(404, "not found");
    let _ = operator.get("/api/device/processes/nobody").await.error(404, "not found");
    let away = engine.device(site).await;
    let _ = operator.get(&format!("/api/device/processes/{}", away.guid)).await.error(503, "agent_unavailable");
    assert_eq!(agent.calls.load(Ordering::SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_answers_never_late_or_twice_disturbs_no_other_call() {
    let (engine, operator, site) = engine().await;
    let agent = Agent::connect(engine.device(site).await, &engine, |number, _| match number {
        // Never; too late; twice, and then something else.
        0 => (Duration::ZERO, Vec::new()),
        1 => (Duration::from_secs(9), vec![one_process()]),
        2 => (Duration::ZERO, vec![one_process(), one_process(), r#"[{"ok":false}]"#.into()]),
        _ => at_once(one_process()),
    })
    .await;
    let started = Instant::now();
    let path = agent.path();
    let (never, late) = tokio::join!(operator.get(&path), operator.get(&path));
    let (_, _) = (never.error(504, "timeout"), late.error(504, "timeout"));
    let took = started.elapsed();
    assert!((Duration::from_secs(8)..Duration::from_secs(12)).contains(&took), "{took:?}");
    let _ = operator.get(&agent.path()).await.ok();
    // The late answer comes meanwhile.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let body = operator.get(&agent.path()).await.ok();
    assert_eq!(body["count"], 1);
    assert_eq!(agent.calls.load(Ordering::SeqCst), 4, "each was sent once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_lost_ends_its_calls_at_once() {
    let (engine, operator, site) = engine().await;
    let device = engine.device(site).await;
    let agent = Agent::connect(device, &engine, |_, _| (Duration::ZERO, Vec::new())).await;
    let (path, calls) = (agent.path(), agent.calls.clone());
    let asking = tokio::spawn(async move { operator.get(&path).await });
    eventually("the call is sent", LIMIT, || async { (calls.load(Ordering::SeqCst) == 1).then_some(()) }).await;
    let lost = Instant::now();
    drop(agent);
    let _ = asking.await.expect("an answer").error(503, "agent_unavailable");
    assert!(lost.elapsed() < Duration::from_secs(3), "{:?}", lost.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_leave_no_call_behind() {
    let (engine, operator, site) = engine().await;
    let agent = Agent::connect(engine.device(site).await, &engine, |number, _| match number {
        0..8 => (Duration::ZERO, Vec::new()),
        _ => at_once(one_process()),
    })
    .await;
    // As many as may be under way; none of them is ever answered.
    let asking: Vec<_> = (0..8)
        .map(|_| {
            let (operator, path) = (operator.clone(), agent.path());
            tokio::spawn(async move { operator.get(&path).await })
        })
        .collect();
    eventually("all are sent", LIMIT, || async { (agent.calls.load(Ordering::SeqCst) == 8).then_some(()) }).await;
    // One more waits for its turn.
    let waiting = tokio::spawn({
        let (operator, path) = (operator.clone(), agent.path());
        async move { operator.get(&path).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(agent.calls.load(Ordering::SeqCst), 8, "it is not sent while as many are under way as may be");
    let gone = Instant::now();
    for one in asking {
        one.abort();
    }
    assert_eq!(waiting.await.expect("an answer").ok()["count"], 1);
    assert!(gone.elapsed() < Duration::from_secs(3), "{:?}", gone.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_calls_at_once_are_all_answered() {
    let (engine, _, site) = engine().await;
    let answer = |_: usize, _: &Value| (Duration::from_millis(6), vec![one_process()]);
    let agent = Agent::connect(engine.device(site).await, &engine, answer).await;
    let (hub, device) = (&engine.app.hub, agent.guid());
    let answers = join_all((0..500).map(|_| async { hub.call::<ListProcesses>(device, &request()).await })).await;
    let failed: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());
    assert_eq!(agent.calls.load(Ordering::SeqCst), 500);
    assert!(agent.most.load(Ordering::SeqCst) <= borealis_api::sockets::CALLS_AT_ONCE, "{:?}", agent.most);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_finds_the_socket_at_another_process() {
    let (engine, operator, site) = engine().await;
    let other = engine.second().await;
    ready(&other).await;
    let there = operator.at(&other.base);
    let agent = Agent::connect(engine.device(site).await, &other, |number, _| match number {
        0 => at_once(one_process()),
        1 => at_once(r#"[{"ok":false,"error":"process_not_found","message":"Gone."}]"#),
        2 => (Duration::ZERO, Vec::new()),
        _ => at_once(one_process()),
    })
    .await;
    assert_eq!(operator.get(&agent.path()).await.ok()["processes"][0]["name"], "init");
    let refused = operator.get(&agent.path()).await.error(404, "process_not_found");
    assert!(refused.body["message"].as_str().is_some_and(|text| text.contains("Gone.")), "{}", refused.body);
    let started = Instant::now();
    let _ = operator.get(&agent.path()).await.error(504, "timeout");
    assert!(started.elapsed() < Duration::from_secs(11), "{:?}", started.elapsed());
    assert_eq!(there.get(&agent.path()).await.ok()["count"], 1, "and where it is");

    // A worker asks any process; the trait's typed form is what workflows use.
    let (secret, here) = (engine.app.settings.engine_secret_file.clone(), format!("http://{}", engine.internal_addr));
    let nowhere = "http://127.0.0.1:9";
    let bases = [nowhere, here.as_str()].map(|base| base.parse().expect("a URL")).to_vec();
    let worker: Arc<dyn Agents> = Arc::new(ApiClient::new(bases, &secret, Uuid::new_v4()).expect("a client"));
    let snapshot = worker.ask::<ListProcesses>(agent.guid(), &request()).await.expect("a list");
    assert_eq!(snapshot.processes[0].pid, 7);
    assert!(matches!(worker.call(Uuid::new_v4(), Spec::of::<ListProcesses>(), json!({})).await, Ok(Outcome::Away)));
    let mut wrong = Spec::of::<ListProcesses>();
    wrong.name = "quick_job_run";
    let refused = worker.call(agent.guid(), wrong, json!({"job_id": 1})).await.expect_err("no event but a declared call");
    assert!(refused.message.contains("unknown_call"), "{refused}");
    assert_eq!(agent.calls.load(Ordering::SeqCst), 5);

    // The device comes to the first process; a caller at the other follows it.
    let device = agent.device.clone();
    drop(agent);
    let agent = Agent::connect(device, &engine, |_, _| at_once(one_process())).await;
    assert_eq!(there.get(&agent.path()).await.ok()["count"], 1);
    // A process that is gone and has left its row: nobody waits for long.
    sqlx::query("UPDATE api_processes SET internal_url = 'http://127.0.0.1:9' WHERE id = $1")
        .bind(engine.app.process_id)
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    let started = Instant::now();
    let _ = there.get(&agent.path()).await.error(503, "agent_unavailable");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}
