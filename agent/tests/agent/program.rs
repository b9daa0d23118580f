//! The program: its command line, its log, and what it leaves running.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::engine::{CODE, Engine, HOST, SOON, job};

const AGENT: &str = env!("CARGO_BIN_EXE_borealis-agent");

fn run(arguments: &[&str], dir: &Path) -> Output {
    Command::new(AGENT)
        .args(arguments)
        .env_clear()
        .env("BOREALIS_AGENT_STATE_DIR", dir.join("state"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn every_verb_has_help_and_status_needs_no_settings() {
    let dir = tempfile::tempdir().unwrap();
    for verb in ["install", "run", "status", "uninstall"] {
        for help in [vec![verb, "--help"], vec!["help", verb]] {
            let output = run(&help, dir.path());
            assert!(output.status.success(), "{help:?}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("Usage: borealis-agent"), "{help:?}");
        }
    }
    let output = run(&["status"], dir.path());
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "not enrolled: {said} {}", String::from_utf8_lossy(&output.stderr));
    for part in ["service:", "server:      none is set", "enrolled:    no"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!dir.path().join("state").exists(), "it only looks");
}

#[test]
fn levels_reach_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    for (to_journal, arguments) in [(true, vec!["run"]), (false, vec!["run"])] {
        let file = std::fs::File::create(dir.path().join("journal")).unwrap();
        let metadata = file.metadata().unwrap();
        let stream = format!("{}:{}", metadata.dev(), metadata.ino() + u64::from(!to_journal));
        let status =
            Command::new(AGENT).args(&arguments).env_clear().env("JOURNAL_STREAM", stream).stderr(file).status().unwrap();
        assert!(!status.success());
        let said = std::fs::read_to_string(dir.path().join("journal")).unwrap();
        assert!(
            said.starts_with(if to_journal { "<3>borealis-agent: no server URL" } else { "borealis-agent: no server URL" }),
            "{said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_script_has_started_outlives_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let journal = std::fs::File::create(dir.path().join("journal")).unwrap();
    let metadata = journal.metadata().unwrap();
    let mut agent = tokio::process::Command::new(AGENT)
        .args(["run", "--server-url", &engine.url, "--enrollment-code", CODE, "--hostname", HOST, "--state-dir"])
        .arg(dir.path().join("state"))
        .env("JOURNAL_STREAM", format!("{}:{}", metadata.dev(), metadata.ino()))
        .stderr(journal)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut peer = engine.socket().await;
    let (go, done) = (dir.path().join("go"), dir.path().join("done"));
    let script = format!(
        "(until [ -e {go} ]; do sleep 0.1; done; echo out; echo err >&2; touch {done}) &\necho started",
        go = go.display(),
        done = done.display()
    );
    peer.emit("quick_job_run", &job(1, &script)).await;
    let (id, result, _) = peer.result().await;
    assert_eq!((result.status.as_str(), result.stdout.as_str()), ("Success", "started\n"));
    peer.ack(id, json!({"status": "ok"})).await;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    drop(peer);
    assert!(tokio::time::timeout(SOON, agent.wait()).await.expect("it stops").unwrap().success());
    std::fs::write(&go, "").unwrap();
    let began = Instant::now();
    while !done.exists() {
        assert!(began.elapsed() < SOON, "it went with the agent");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let said = std::fs::read_to_string(dir.path().join("journal")).unwrap();
    assert!(said.lines().all(|line| line.starts_with('<')), "{said}");
    assert!(said.contains("<6> INFO") && said.contains("agent started"), "{said}");
}
