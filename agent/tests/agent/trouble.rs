//! An agent whose surroundings fail it: full disks, clocks that jump, proxies that answer in the engine's place.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use borealis_protocol::envelope;
use borealis_protocol::events::{QUICK_JOB_ACCEPTED, QUICK_JOB_RESULT, QuickJobCancel};
use serde_json::json;
use tokio::time::Instant;

use super::engine::{CODE, Engine, GUID, HOST, Running, SOON, engine_key, job, now, write_config};

/// A small disk of its own, until it is dropped.
struct Disk(PathBuf);

impl Disk {
    /// None where this account cannot mount any.
    fn mount(at: &Path, size: &str) -> Option<Self> {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("only root can mount a small disk");
            return None;
        }
        std::fs::create_dir(at).unwrap();
        let options = format!("size={size},mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status().unwrap();
        assert!(mounted.success(), "a small disk is mounted");
        Some(Self(at.to_owned()))
    }

    /// Leaves no byte free.
    fn fill(&self) {
        let error = std::fs::write(self.0.join("filling"), vec![b'x'; 64 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filling")).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy"]).arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_heard_of_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let Some(disk) = Disk::mount(&dir.path().join("state"), "512k") else { return };
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, &disk.0, Some(CODE));
    let mut peer = engine.socket().await;

    // A job that comes to a full disk is not taken, and the engine hears so. A cancel and a refusal are heard all the same.
    disk.fill();
    let run = job(1, &format!("echo x >> {}", trace.display()));
    peer.emit("quick_job_run", &run).await;
    let declined = peer.expect_event("quick_job_declined").await;
    assert_eq!(declined, json!({"job_id": 1, "reason": "agent_disk_full"}));
    peer.emit("quick_job_cancel", &QuickJobCancel { job_id: 2, reason: String::new() }).await;
    let mut unsigned = job(3, "echo no");
    unsigned.signature.clear();
    peer.emit("quick_job_run", &unsigned).await;
    // They are two jobs, and each is answered when it can be.
    let mut reasons = std::collections::BTreeMap::new();
    while reasons.len() < 2 {
        let (id, result, _) = peer.result().await;
        reasons.insert(result.job_id, result.reason.unwrap_or_default());
        peer.ack(id, json!({"status": "ok"})).await;
    }
    assert_eq!(reasons, [(2, "cancelled".to_owned()), (3, "refused".to_owned())].into());
    disk.free();
    peer.emit("quick_job_run", &run).await;
    assert_eq!(peer.expect_event(QUICK_JOB_ACCEPTED).await["job_id"], 1);
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.status.as_str()), (1, "Success"));
    peer.ack(id, json!({"status": "ok"})).await;

    // The disk fills while a script runs: what it did is known.
    let (go, filled) = (dir.path().join("go"), "echo the end; exit 7");
    let waits = format!("until [ -e {} ]; do sleep 0.1; done; {filled}", go.display());
    peer.emit("quick_job_run", &job(4, &waits)).await;
    peer.expect_event("quick_job_progress").await;
    // One waits behind it. It cannot begin, and ends as what it is. It is long: what the first one leaves is no room for it.
    let long = format!("#{}\necho x >> {}", "x".repeat(100_000), trace.display());
    peer.emit("quick_job_run", &job(5, &long)).await;
    peer.expect_event(QUICK_JOB_ACCEPTED).await;
    disk.fill();
    std::fs::write(&go, "").unwrap();
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.exit_code, result.stdout.as_str()), (4, Some(7), "the end\n"));
    peer.ack(id, json!({"status": "ok"})).await;
    peer.emit("quick_job_cancel", &QuickJobCancel { job_id: 5, reason: String::new() }).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.reason.as_deref()), (5, Some("cancelled")), "a job that cannot begin can be cancelled");
    peer.ack(id, json!({"status": "ok"})).await;
    disk.free();
    agent.end().await;

    // All of that is on the disk by now.
    let agent = Running::start(&engine, &disk.0, None);
    let mut peer = engine.socket().await;
    for job_id in [1, 3, 4, 5] {
        peer.emit("quick_job_run", &job(job_id, "echo again")).await;
        // A result whose acknowledgement found the disk full is sent once more first.
        while peer.expect_event(QUICK_JOB_RESULT).await["job_id"] != job_id {}
    }
    agent.end().await;
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_brings_no_job_back() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut engine = Engine::start(900).await;
    engine.seen.lock().unwrap().clock_ahead = Some(0);
    let agent = Running::start(&engine, &dir.path().join("state"), Some(CODE));
    let mut peer = engine.socket().await;
    let run = job(1, &format!("echo x >> {}", trace.display()));
    let far = |job_id| {
        let mut run = job(job_id, "echo fine");
        envelope::sign(&mut run, &engine_key(), GUID, now() + 30 * 86_400).unwrap();
        run
    };
    let mut last = String::new();
    // The engine's clock, or who answers in its place, jumps nine days ahead, and back.
    for (job_id, ahead) in [(1, 0), (2, 9 * 86_400), (3, 0), (4, -40 * 86_400)] {
        engine.seen.lock().unwrap().clock_ahead = Some(ahead);
        let heard = engine.posts("/api/agent/heartbeat").len();
        peer.attend("heartbeats bring the time", || engine.posts("/api/agent/heartbeat").len() >= heard + 2).await;
        if job_id > 1 {
            peer.emit("quick_job_run", &run).await;
            assert_eq!(peer.expect_event(QUICK_JOB_RESULT).await["stdout"], last);
        }
        peer.emit("quick_job_run", &if job_id == 1 { run.clone() } else { far(job_id) }).await;
        let (id, result, _) = peer.result().await;
        assert_eq!((result.job_id, result.status.as_str()), (job_id, "Success"));
        if job_id == 1 {
            last = result.stdout;
        }
        peer.ack(id, json!({"status": "ok"})).await;
    }
    // What is long past by the machine's own clock is not made fresh by the engine's.
    let mut old = job(5, &format!("echo x >> {}", trace.display()));
    envelope::sign(&mut old, &engine_key(), GUID, now() - 10 * 86_400).unwrap();
    peer.emit("quick_job_run", &old).await;
    let (_, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.reason.as_deref()), (5, Some("refused")), "{result:?}");
    agent.end().await;
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n", "run once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_proxy_ends_no_account() {
    let dir = tempfile::tempdir().unwrap();
    let config_path = dir.path().join("config.json");
    let mut engine = Engine::start(30).await;
    // Also with a code at hand, which an operator leaves for an agent that the engine itself refuses.
    write_config(&config_path, &engine.url, Some(CODE));
    let mut config = borealis_agent::Config::load(borealis_agent::Settings::default(), Some(&config_path)).unwrap();
    config.state_dir = dir.path().join("state");
    config.hostname = Some(HOST.into());
    config.heartbeat_every = Duration::from_secs(1);
    let page = "<html><h1>Unavailable</h1>The service was decommissioned, its token revoked: device_purged</html>";
    engine.seen.lock().unwrap().refuse = Some((503, page.to_owned()));
    let stop = borealis_agent::CancellationToken::new();
    let agent = Running { stop: stop.clone(), task: tokio::spawn(borealis_agent::run(config, stop)) };
    let stored = || std::fs::read_to_string(dir.path().join("state/agent.json")).unwrap_or_default();
    // What else there is, is tried in `account.rs`; each of these takes a while.
    let answers = [(403, page.to_owned()), (401, json!({"message": "device_purged"}).to_string())];
    let began = Instant::now();
    while !stored().contains("refresh-0") || std::fs::read_to_string(&config_path).unwrap().contains(CODE) {
        assert!(began.elapsed() < SOON, "it is enrolled, and the code erased");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    write_config(&config_path, &engine.url, Some(CODE));
    for answer in answers {
        engine.seen.lock().unwrap().refuse = Some(answer.clone());
        let asked = engine.seen.lock().unwrap().refused;
        let began = Instant::now();
        while engine.seen.lock().unwrap().refused == asked {
            assert!(began.elapsed() < SOON, "it asks again");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(stored().contains("refresh-0"), "given up at {answer:?}");
    }
    assert_eq!(engine.seen.lock().unwrap().enrollments.len(), 1, "and not enrolled again");
    engine.seen.lock().unwrap().refuse = None;
    assert_eq!(engine.socket().await.bearer, "Bearer access-1");
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_order_mark_is_no_part_of_a_script() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &job(1, "\u{feff}set -e\nfalse\necho no\n")).await;
    let (_, result, _) = peer.result().await;
    assert_eq!(
        (result.status.as_str(), result.exit_code, result.stdout.as_str(), result.stderr.as_str()),
        ("Failed", Some(1), "", "")
    );
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reason_at_the_end_of_a_long_output_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &job(1, "seq 1 6000000; echo the reason; exit 3")).await;
    let (_, result, _) = peer.result().await;
    assert_eq!((result.exit_code, result.truncated), (Some(3), Some(true)));
    assert!(result.stdout.starts_with("1\n2\n") && result.stdout.ends_with("\n6000000\nthe reason\n"));
    assert!(result.stdout.contains(" bytes of output left out here]\n"));
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_stops_says_good_bye() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    tokio::spawn(async move { while peer.frame().await.is_some() {} });
    agent.end().await;
    let last = engine.posts("/api/agent/status").pop().unwrap();
    assert_eq!(last["phase"], "stopped", "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_accepted_and_is_not_known_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, &dir.path().join("state"), Some(CODE));
    let mut peer = engine.socket().await;
    let run = job(1, &format!("echo x >> {}", trace.display()));
    peer.emit("quick_job_run", &run).await;
    let (id, result, _) = peer.result().await;
    assert_eq!(result.status, "Success");
    peer.ack(id, json!({"status": "ok"})).await;
    // One that it knows is answered as what it is.
    let mut again = run;
    again.accepted = true;
    peer.emit("quick_job_run", &again).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.job_id, result.status.as_str()), (1, "Success"));
    peer.ack(id, json!({"status": "ok"})).await;
    agent.end().await;

    // An agent whose state is older: the same machine from a snapshot, or a copy on another one.
    std::fs::remove_dir_all(dir.path().join("state/jobs")).unwrap();
    let agent = Running::start(&engine, &dir.path().join("state"), None);
    let mut peer = engine.socket().await;
    peer.emit("quick_job_run", &again).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.status.as_str(), result.reason.as_deref()), ("timed_out", Some("outcome_unknown")));
    assert!(result.stderr.contains("does not know it any more"), "{}", result.stderr);
    peer.ack(id, json!({"status": "ok"})).await;
    agent.end().await;
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), "x\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_identity_another_machine_has_is_quiet_until_it_may_ask_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let held = json!({"error": "identity_held", "status_code": 409, "retry_after_ms": 8_000});
    engine.seen.lock().unwrap().refuse_hello = Some(held);
    let agent = Running::start(&engine, &dir.path().join("state"), Some(CODE));
    let mut first = engine.socket().await;
    assert_eq!((first.hello.machine_id.len(), first.hello.instance.len()), (64, 36), "it says who it is");
    while first.frame().await.is_some() {}
    let seen = std::sync::Arc::clone(&engine.seen);
    let posts = || seen.lock().unwrap().posts.len();
    // What was on its way has arrived once nothing has come for a second.
    loop {
        let so_far = posts();
        tokio::time::sleep(Duration::from_secs(1)).await;
        if posts() == so_far {
            break;
        }
    }
    let (before, refreshes) = (posts(), engine.seen.lock().unwrap().refreshes.len());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(posts(), before, "no heartbeat, no inventory: {:?}", seen.lock().unwrap().posts);
    assert_eq!(engine.seen.lock().unwrap().refreshes.len(), refreshes);

    engine.seen.lock().unwrap().refuse_hello = None;
    let mut peer = engine.socket().await;
    {
        let seen = engine.seen.lock().unwrap();
        assert_eq!(seen.refreshes.len(), refreshes + 1, "it asks for new tokens first: old ones may be the other machine's");
        let asked = seen.refreshes.last().unwrap();
        assert_eq!((&asked["machine_id"], &asked["instance"]), (&json!(peer.hello.machine_id), &json!(peer.hello.instance)));
    }
    peer.attend("heartbeats go on", || posts() > before).await;
    agent.end().await;
}
