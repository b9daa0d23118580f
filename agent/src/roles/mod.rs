//! The parts of the agent that handle the events of the engine. Each has a queue of its own, so that a slow one delays no other: a cancel
//! is not kept waiting by a disk, nor a job by a list of processes.

mod processes;
mod scripts;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use borealis_protocol::calls::{AGENT_BUSY, Refusal, UNSUPPORTED_EVENT};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tracing::{error, warn};

pub(crate) use self::processes::Processes;
pub(crate) use self::scripts::{Cancels, Jobs};
use crate::socket::Inbound;

/// Events that wait for one role.
const QUEUE: usize = 64;

/// A part of the agent that handles events of the engine.
pub(crate) trait Role: Send + Sync + 'static {
    /// The events it handles.
    fn events(&self) -> &'static [&'static str];

    /// How many of them it handles at once. With one they are handled in the order they came.
    fn at_once(&self) -> usize {
        1
    }

    /// Handles an event; its answer goes out if the engine asked for one.
    fn handle<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value>;

    /// Answers an event for which there is no room.
    fn refuse<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
        warn!(event = event.name, "too many requests wait; this one is refused");
        std::future::ready(Refusal::new(AGENT_BUSY, "Too many requests wait on this machine.").to_answer()).boxed()
    }
}

/// Hands the events of `inbound` to the roles until its other end is dropped. Dropping this ends what they are at.
pub(crate) async fn dispatch(roles: Vec<Arc<dyn Role>>, inbound: &mut mpsc::Receiver<Inbound>) {
    let mut drivers = JoinSet::new();
    let mut queues: HashMap<&'static str, (Arc<dyn Role>, mpsc::Sender<Inbound>)> = HashMap::new();
    for role in roles {
        let (queue, waiting) = mpsc::channel(QUEUE);
        for event in role.events() {
            queues.insert(event, (Arc::clone(&role), queue.clone()));
        }
        drivers.spawn(drive(role, waiting));
    }
    while let Some(event) = inbound.recv().await {
        let Some((role, queue)) = queues.get(event.name.as_str()) else {
            answer(&event, &json!({"error": UNSUPPORTED_EVENT})).await;
            continue;
        };
        if let Err(mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) = queue.try_send(event) {
            let refusal = role.refuse(&event).await;
            answer(&event, &refusal).await;
        }
    }
}

/// Has a role handle what waits for it.
async fn drive(role: Arc<dyn Role>, mut waiting: mpsc::Receiver<Inbound>) {
    let slots = Arc::new(Semaphore::new(role.at_once()));
    let mut handling = JoinSet::new();
    while let Some(event) = waiting.recv().await {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        while handling.try_join_next().is_some() {}
        let role = Arc::clone(&role);
        handling.spawn(async move {
            let handled = AssertUnwindSafe(role.handle(&event)).catch_unwind().await.unwrap_or_else(|_| {
                error!(event = event.name, "a handler panicked");
                json!({"error": "handler_panic"})
            });
            answer(&event, &handled).await;
            drop(slot);
        });
    }
}

async fn answer(event: &Inbound, answer: &Value) {
    if let Some(id) = event.ack_id {
        event.session.acknowledge(id, answer).await;
    }
}

#[cfg(test)]
mod tests {
    use borealis_protocol::framing::{self, Frame};

    use super::*;
    use crate::socket::Session;

    /// Never ends, two at once.
    struct Stuck;
    /// Answers its argument, and panics when that is null.
    struct Echo;

    impl Role for Stuck {
        fn events(&self) -> &'static [&'static str] {
            &["stuck"]
        }

        fn at_once(&self) -> usize {
            2
        }

        fn handle<'a>(&'a self, _: &'a Inbound) -> BoxFuture<'a, Value> {
            std::future::pending().boxed()
        }
    }

    impl Role for Echo {
        fn events(&self) -> &'static [&'static str] {
            &["echo", "also"]
        }

        fn handle<'a>(&'a self, event: &'a Inbound) -> BoxFuture<'a, Value> {
            async move {
                assert!(!event.argument.is_null(), "nothing to say");
                // The later ones would overtake if they could.
                let wait = 20_u64.saturating_sub(event.argument.as_u64().unwrap_or(0));
                tokio::time::sleep(std::time::Duration::from_millis(wait)).await;
                event.argument.clone()
            }
            .boxed()
        }
    }

    #[tokio::test]
    async fn a_role_that_is_stuck_delays_no_other() {
        let (session, mut frames) = Session::new();
        let (send, mut inbound) = mpsc::channel(500);
        let running = tokio::spawn(async move { dispatch(vec![Arc::new(Stuck), Arc::new(Echo)], &mut inbound).await });
        let event = |name: &str, argument: Value, ack_id: u64| Inbound {
            name: name.to_owned(),
            argument,
            ack_id: Some(ack_id),
            session: Arc::clone(&session),
        };
        for ack_id in 0..200 {
            send.send(event("stuck", Value::Null, ack_id)).await.unwrap();
        }
        for ack_id in 1_000..1_010 {
            send.send(event(if ack_id % 2 == 0 { "echo" } else { "also" }, json!(ack_id - 1_000), ack_id)).await.unwrap();
        }
        send.send(event("echo", Value::Null, 1_010)).await.unwrap();
        send.send(event("echo", json!("after"), 1_011)).await.unwrap();
        send.send(event("nobody's", Value::Null, 1_012)).await.unwrap();
        let (mut refused, mut echoed, mut unsupported) = (0, Vec::new(), None);
        while echoed.len() < 12 || unsupported.is_none() {
            let text = tokio::time::timeout(std::time::Duration::from_secs(10), frames.recv()).await.unwrap().unwrap();
            let Ok(Frame::Ack { id, mut args }) = framing::decode(&text) else { panic!("{text}") };
            let answer = args.swap_remove(0);
            match id {
                0..200 => {
                    assert_eq!(answer["error"], AGENT_BUSY);
                    refused += 1;
                }
                1_012 => unsupported = Some(answer),
                _ => echoed.push((id, answer)),
            }
        }
        // Two are handled, one has left the queue and waits for its turn, and the queue is full.
        assert!((200 - QUEUE - 3..=200 - QUEUE).contains(&refused), "{refused}");
        let expected = (0..10).map(|n| (1_000 + n, json!(n)));
        let expected = expected.chain([(1_010, json!({"error": "handler_panic"})), (1_011, json!("after"))]).collect::<Vec<_>>();
        assert_eq!(echoed, expected, "in the order they came, and a panic ends nothing");
        assert_eq!(unsupported.unwrap(), json!({"error": UNSUPPORTED_EVENT}));
        drop(send);
        running.await.unwrap();
    }
}
