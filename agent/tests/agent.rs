//! The whole agent against a small engine of the test's own: enrollment, socket, scripts, reconnecting.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of a test fail the test")]

#[path = "agent/calls.rs"]
mod calls;
#[path = "agent/engine.rs"]
mod engine;
#[path = "agent/program.rs"]
mod program;
#[path = "agent/trouble.rs"]
mod trouble;

use std::time::Duration;

use borealis_agent::{CancellationToken, Config, Settings};
use borealis_protocol::envelope;
use borealis_protocol::events::{QUICK_JOB_ACCEPTED, QUICK_JOB_PROGRESS, QUICK_JOB_RESULT, QuickJobCancel};
use borealis_protocol::framing::Frame;
use borealis_protocol::keys::SigningKey;
use engine::{CODE, Engine, GUID, HOST, Running, SOON, engine_key, job, refusal, write_config};
use serde_json::json;
use tokio::time::{Instant, timeout};

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_the_engine_does_not_know_of_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    engine.seen.lock().unwrap().socket_connected = Some(true);
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    // The process at its other end is cut off from the rest of the engine: it pings, and that is all.
    let mut peer = engine.socket().await;
    let lost = tokio::spawn(async move { while peer.frame().await.is_some_and(|frame| frame != Frame::Disconnect) {} });
    while engine.posts("/api/agent/heartbeat").len() < 2 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!lost.is_finished(), "a socket that is known is kept");
    engine.seen.lock().unwrap().socket_connected = Some(false);
    timeout(SOON, lost).await.expect("the agent hangs up").unwrap();
    engine.seen.lock().unwrap().socket_connected = Some(true);
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &job(1, "echo fine")).await;
    assert_eq!(peer.result().await.1.status, "Success");
    agent.end().await;
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
    envelope::sign(&mut elsewhere, &engine_key(), "6F9619FF-8B86-D011-B42D-00C04FC964FF", i64::MAX).unwrap();
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
    // Its machine is named by its GUID; what it was called when the job was made does not matter.
    let mut renamed = job(7, "echo fine");
    renamed.target_hostname = "OTHER".into();
    peer.emit("quick_job_run", &renamed).await;
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
        let (machine_id, instance) = (&peer.hello.machine_id, &peer.hello.instance);
        let asked = json!({"guid": GUID, "refresh_token": "refresh-0", "capabilities": {"rotates": true},
            "machine_id": machine_id, "instance": instance});
        assert_eq!(seen.refreshes, [asked]);
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
    engine.seen.lock().unwrap().refuse = Some((401, refusal("device_purged")));
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
    let run = job(1, &format!("echo x >> {trace}\nsleep 3\necho late >> {trace}\n", trace = trace.display()));
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
    assert_eq!((result.job_id, result.status.as_str(), result.reason.as_deref()), (1, "timed_out", Some("outcome_unknown")));
    assert!(result.stderr.contains("outcome unknown"));
    assert_eq!(result.context, Some(run.context.clone()));
    peer.ack(id, json!({"status": "ok"})).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.stdout.as_str()), (2, "hidden\n"), "what waited is run, without the agent's secrets");
    peer.ack(id, json!({"status": "ok"})).await;
    peer.emit("quick_job_run", &run).await;
    assert_eq!(peer.expect_event(QUICK_JOB_RESULT).await["reason"], "outcome_unknown");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n", "the script was ended before its outcome was called unknown");
    assert_eq!(engine.seen.lock().unwrap().enrollments.len(), 1);

    let pid = nix::unistd::Pid::from_raw(i32::try_from(second.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = timeout(SOON, second.wait()).await.expect("it stops").unwrap();
    assert!(status.success(), "a clean stop is no failure: {status}");
}
