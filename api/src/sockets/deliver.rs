//! What the engine sends to agents: one task takes what is ready for the devices connected here, and writes it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use borealis_engine::{
    Error, Result,
    db::{self, Pool},
    jobs::delivery::{self, Cancel, Delivery, Doubt, Taken},
    work,
};
use borealis_protocol::events::{QUICK_JOB_CANCEL, QUICK_JOB_RUN, QuickJobCancel};
use socketioxide::{SendError, SocketError};
use tokio::sync::Notify;
use uuid::Uuid;

use super::Running;
use crate::metrics::METERS;

/// The most devices asked for in one statement; fewer than [`delivery::DELIVERIES`], so that one dispatch for each is one batch.
const DEVICES: usize = 1_000;

/// The devices to look at next.
#[derive(Debug, Default)]
pub struct Wanted {
    devices: Mutex<(HashSet<Uuid>, HashSet<Uuid>)>,
    /// Taken, and perhaps not: nothing more is taken before this is undone.
    doubts: Mutex<Vec<Doubt>>,
    wake: Notify,
    busy_since: Mutex<Option<Instant>>,
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

    /// For how long dispatches have been going out without a pause; none while none do.
    pub fn busy_for(&self) -> Option<Duration> {
        self.busy_since.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }

    fn set_busy(&self, busy: bool) {
        let mut since = self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = busy.then(|| since.unwrap_or_else(Instant::now));
    }

    fn doubt(&self, doubt: Doubt) {
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner).push(doubt);
    }

    /// Undoes what is in doubt. One task does.
    async fn settle_doubts(&self, pool: &Pool) -> Result<()> {
        loop {
            let doubt = self.doubts.lock().unwrap_or_else(PoisonError::into_inner).last().cloned();
            let Some(doubt) = doubt else { return Ok(()) };
            delivery::undo(pool, &doubt).await?;
            self.doubts.lock().unwrap_or_else(PoisonError::into_inner).pop();
        }
    }

    fn take(&self) -> (Vec<Uuid>, Vec<Uuid>) {
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let (look, reconnected) = std::mem::take(&mut *devices);
        (look.difference(&reconnected).copied().collect(), reconnected.into_iter().collect())
    }
}

/// What was taken of the tables and is to be written to sockets.
#[derive(Debug, Default)]
struct Batch {
    cancels: Vec<Cancel>,
    deliveries: Vec<Delivery>,
    more: bool,
}

/// Sends, for ever.
pub async fn run(running: Arc<Running>) {
    loop {
        let mut more = std::pin::pin!(running.wanted.wake.notified());
        if !more.as_mut().enable() {
            running.wanted.set_busy(false);
            more.await;
        }
        running.wanted.set_busy(true);
        let (look, reconnected) = running.wanted.take();
        for (devices, again) in [(reconnected, true), (look, false)] {
            let (sent, trouble) = send(&running, &devices, again).await;
            let Some(error) = trouble else { continue };
            METERS.errors_delivery.inc();
            tracing::warn!(%error, source = ?error.source, "dispatches wait for the database");
            tokio::time::sleep(Duration::from_millis(rand::random_range(500..1500))).await;
            let rest = devices.into_iter().skip(sent);
            if again {
                running.wanted.reconnected(rest);
            } else {
                running.wanted.look(rest);
            }
        }
    }
}

/// Sends what is ready for these devices; for how many of them it was done, and what stopped it. One batch is taken while the
/// one before is written.
async fn send(running: &Running, devices: &[Uuid], reconnected: bool) -> (usize, Option<Error>) {
    let mut taken = Batch::default();
    for (at, chunk) in devices.chunks(DEVICES).enumerate() {
        let open = match delivery::open(&running.pool, chunk).await {
            Ok(open) => open,
            Err(error) => {
                write(running, taken).await;
                return (at * DEVICES, Some(error));
            }
        };
        while !open.is_empty() {
            let (next, all_written) = tokio::join!(take(running, &open, reconnected), write(running, taken));
            taken = match next {
                Ok(next) => next,
                Err(error) => return (at * DEVICES, Some(error)),
            };
            // What could not be written is ready again, and would be taken again at once.
            if !taken.more || !all_written {
                break;
            }
        }
    }
    write(running, taken).await;
    (devices.len(), None)
}

/// Takes what is ready for these devices, and marks it sent.
async fn take(running: &Running, devices: &[Uuid], reconnected: bool) -> Result<Batch> {
    running.wanted.settle_doubts(&running.pool).await?;
    let mut tx = db::begin_wide(&running.pool).await?;
    let at_least = running.guard.at_least();
    let cancels = delivery::take_cancels(&mut tx, running.process_id, devices, reconnected, at_least).await?;
    let taken = delivery::take_ready(&mut tx, running.process_id, devices, reconnected, at_least).await?;
    if let Err(error) = tx.commit().await {
        // The answer may have been lost and not the commit.
        running.wanted.doubt(Doubt::about(&taken, &cancels));
        return Err(error.into());
    }
    let Taken { deliveries, more, .. } = taken;
    let more = more || i64::try_from(cancels.len()).is_ok_and(|taken| taken >= delivery::BATCH);
    Ok(Batch { cancels, deliveries, more })
}

/// Writes to the sockets; whether every socket took its dispatch.
async fn write(running: &Running, batch: Batch) -> bool {
    for cancel in batch.cancels {
        let message = QuickJobCancel { job_id: cancel.activity_id, reason: cancel.reason };
        if let Some(agent) = running.registry.agent(&cancel.socket_id)
            && let Some(socket) = agent.socket()
        {
            match socket.emit(QUICK_JOB_CANCEL, &message) {
                Ok(()) => METERS.cancels_sent.inc(),
                // It is sent again when the agent is back.
                Err(_) => agent.cut.cancel(),
            }
        }
    }
    let mut unsent = Vec::new();
    for (at, delivery) in batch.deliveries.iter().enumerate() {
        if at % 64 == 63 {
            // Signing is work; others may want this thread.
            tokio::task::yield_now().await;
        }
        let (keys, bytes, own) = (running.keys.clone(), delivery.bytes(), delivery.clone());
        let payload = work::sized(bytes, move || delivery::payload(&keys, &own)).await.flatten();
        let payload = match payload {
            Ok(payload) => payload,
            // Nobody had the time to sign it: it is still to be sent.
            Err(error) if error.is_transient() => {
                unsent.push(delivery.activity_id);
                continue;
            }
            Err(error) => {
                tracing::error!(%error, source = ?error.source, activity = delivery.activity_id, "a dispatch cannot be written");
                continue;
            }
        };
        let Some(agent) = running.registry.agent(&delivery.socket_id) else {
            unsent.push(delivery.activity_id);
            continue;
        };
        agent.sent(delivery.activity_id, delivery.limit);
        let written = agent.socket().map(|socket| socket.emit(QUICK_JOB_RUN, &payload));
        match written {
            Some(Ok(())) => METERS.dispatches_sent.inc(),
            Some(Err(SendError::Socket(SocketError::InternalChannelFull))) => {
                // It does not listen; back with a new socket it gets the rest.
                unsent.push(delivery.activity_id);
                agent.cut.cancel();
            }
            Some(Err(_)) | None => unsent.push(delivery.activity_id),
        }
    }
    METERS.dispatches_given_back.inc_by(u64::try_from(unsent.len()).unwrap_or(0));
    if !unsent.is_empty()
        && let Err(error) = delivery::give_back(&running.pool, &unsent).await
    {
        tracing::warn!(%error, source = ?error.source, dispatches = unsent.len(), "what was not sent could not be given back");
    }
    unsent.is_empty()
}
