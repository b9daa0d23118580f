//! What the engine sends to agents: one task takes what is ready for the devices connected here, and writes it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use borealis_engine::{Error, Result, jobs::delivery};
use borealis_protocol::events::{QUICK_JOB_CANCEL, QUICK_JOB_RUN, QuickJobCancel};
use socketioxide::{SendError, SocketError};
use tokio::sync::Notify;
use uuid::Uuid;

use super::Running;

/// The most devices asked for in one statement.
const DEVICES: usize = 2_000;

/// The devices to look at next.
#[derive(Debug, Default)]
pub struct Wanted {
    devices: Mutex<(HashSet<Uuid>, HashSet<Uuid>)>,
    wake: Notify,
}

impl Wanted {
    /// Something may be ready for these.
    pub fn look(&self, devices: impl IntoIterator<Item = Uuid>) {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).0.extend(devices);
        self.wake.notify_one();
    }

    /// These have just connected: what they were sent before may be lost.
    pub fn reconnected(&self, devices: impl IntoIterator<Item = Uuid>) {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).1.extend(devices);
        self.wake.notify_one();
    }

    fn take(&self) -> (Vec<Uuid>, Vec<Uuid>) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let (look, reconnected) = std::mem::take(&mut *devices);
        (look.difference(&reconnected).copied().collect(), reconnected.into_iter().collect())
    }
}

/// Sends, for ever.
pub async fn run(running: Arc<Running>) {
    loop {
        running.wanted.wake.notified().await;
        let (look, reconnected) = running.wanted.take();
        for (devices, again) in [(reconnected, true), (look, false)] {
            for (at, chunk) in devices.chunks(DEVICES).enumerate() {
                if let Err(error) = send(&running, chunk, again).await {
                    tracing::warn!(%error, source = ?error.source, "dispatches wait for the database");
                    tokio::time::sleep(Duration::from_millis(rand::random_range(500..1500))).await;
                    let rest = devices.iter().skip(at * DEVICES).copied();
                    if again {
                        running.wanted.reconnected(rest)
                    } else {
                        running.wanted.look(rest)
                    }
                    break;
                }
            }
        }
    }
}

async fn send(running: &Running, devices: &[Uuid], reconnected: bool) -> Result<()> {
    loop {
        let mut tx = running.pool.begin().await.map_err(Error::from)?;
        let cancels = delivery::take_cancels(&mut tx, running.process_id, devices, reconnected).await?;
        let deliveries = delivery::take_ready(&mut tx, running.process_id, devices, reconnected).await?;
        tx.commit().await.map_err(Error::from)?;
        let full = [(cancels.len(), delivery::BATCH), (deliveries.len(), delivery::DELIVERIES)]
            .iter()
            .any(|(taken, most)| i64::try_from(*taken).is_ok_and(|taken| taken >= *most));

        for cancel in cancels {
            let message = QuickJobCancel { job_id: cancel.activity_id, reason: cancel.reason };
            if let Some(agent) = running.registry.agent(&cancel.socket_id)
                && let Some(socket) = agent.socket()
                && socket.emit(QUICK_JOB_CANCEL, &message).is_err()
            {
                // It is sent again when the agent is back.
                agent.cut.cancel();
            }
        }
        let mut unsent = Vec::new();
        for (at, delivery) in deliveries.iter().enumerate() {
            if at % 64 == 63 {
                // Signing is work; others may want this thread.
                tokio::task::yield_now().await;
            }
            let payload = match delivery::payload(&running.keys, delivery) {
                Ok(payload) => payload,
                Err(error) => {
                    tracing::error!(%error, source = ?error.source, activity = delivery.activity_id, "a dispatch cannot be written");
                    continue;
                }
            };
            let Some(agent) = running.registry.agent(&delivery.socket_id) else {
                unsent.push(delivery.activity_id);
                continue;
            };
            let written = agent.socket().map(|socket| socket.emit(QUICK_JOB_RUN, &payload));
            match written {
                Some(Ok(())) => {}
                Some(Err(SendError::Socket(SocketError::InternalChannelFull))) => {
                    // It does not listen; back with a new socket it gets the rest.
                    unsent.push(delivery.activity_id);
                    agent.cut.cancel();
                }
                Some(Err(_)) | None => unsent.push(delivery.activity_id),
            }
        }
        if !unsent.is_empty() {
            delivery::give_back(&running.pool, &unsent).await?;
        }
        if !full || !unsent.is_empty() {
            return Ok(());
        }
    }
}
