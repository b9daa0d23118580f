//! Requests of the engine that the agent answers at once.

use borealis_protocol::calls::{ACTION_LIST, PROCESS_MANAGEMENT_REQUEST, ProcessSnapshot};
use borealis_protocol::framing::Frame;
use serde_json::{Value, json};

use super::engine::{CODE, Engine, Peer, Running};

/// Sends a request and waits for its answer.
async fn ask(peer: &mut Peer, wanted: u64, name: &str, argument: Value) -> Value {
    peer.send(&Frame::Event { id: Some(wanted), name: name.into(), args: vec![argument] }).await;
    loop {
        if let Frame::Ack { id, mut args } = peer.frame().await.expect("the socket is up")
            && id == wanted
        {
            return args.swap_remove(0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_listed_when_the_engine_asks() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = Engine::start(900).await;
    let agent = Running::start(&engine, dir.path(), Some(CODE));
    let mut peer = engine.socket().await;
    assert!(peer.hello.capabilities.process_management);
    let request = json!({"action": ACTION_LIST, "max_age_seconds": 5, "requested_at": 1});
    let answer = ask(&mut peer, 1, PROCESS_MANAGEMENT_REQUEST, request.clone()).await;
    assert_eq!(answer["ok"], true, "{answer}");
    let first: ProcessSnapshot = serde_json::from_value(answer).unwrap();
    let own = i64::from(std::process::id());
    assert!(first.processes.iter().any(|process| process.pid == own && !process.username.is_empty()), "{first:?}");
    let again: ProcessSnapshot = serde_json::from_value(ask(&mut peer, 2, PROCESS_MANAGEMENT_REQUEST, request).await).unwrap();
    assert_eq!(again, first, "a snapshot that is young enough is not taken again");
    for (argument, code) in [
        (json!({"action": "terminate", "pid": own}), "unsupported_action"),
        (json!({"action": 7}), "invalid_request"),
        (json!("list"), "invalid_request"),
        (json!({}), "unsupported_action"),
    ] {
        let answer = ask(&mut peer, 3, PROCESS_MANAGEMENT_REQUEST, argument).await;
        assert_eq!((&answer["ok"], &answer["error"]), (&json!(false), &json!(code)), "{answer}");
    }
    assert_eq!(ask(&mut peer, 4, "file_management_request", json!({})).await, json!({"error": "unsupported_event"}));
    agent.end().await;
}
