//! What agents report, on its way into Postgres: one task takes all that waits and applies it in one transaction. The
//! agent hears of it after the commit, and only then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_engine::{
    Error, Result, db,
    jobs::results::{self, Finished, Outcome, Report, Settled},
};
use borealis_protocol::events::Ack;
use serde_json::json;
use socketioxide::extract::AckSender;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Adapter, Running, events::ToOperator, registry::Agent};
use crate::metrics::METERS;

/// KiB of reports that may wait.
const ROOM_KIB: usize = 256 * 1024;
/// Reports that may wait.
const QUEUE: usize = 20_000;
/// Reports of one agent without acks that may wait for room.
const PATIENCE: usize = 4;
/// How long dispatches that go out without a pause come before all reports: both want the same processors, and a report is
/// as true later.
const DISPATCHES_FIRST: Duration = Duration::from_millis(1_500);
/// How long reports then wait for a full batch while dispatches still go out: fuller batches cost less.
const GATHER: Duration = Duration::from_millis(500);
/// How often it is looked whether that is over.
const GATHER_STEP: Duration = Duration::from_millis(20);
/// When an agent that was turned away comes again, in milliseconds.
const RETRY_MS: u64 = 5_000;

struct Waiting {
    report: Report,
    ack: AckSender<Adapter>,
    _room: OwnedSemaphorePermit,
}

/// The queue in front of the store.
pub struct Intake {
    queue: mpsc::Sender<Waiting>,
    waiting: Mutex<mpsc::Receiver<Waiting>>,
    room: Arc<Semaphore>,
}

impl Default for Intake {
    fn default() -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE);
        Self { queue, waiting: Mutex::new(waiting), room: Arc::new(Semaphore::new(ROOM_KIB)) }
    }
}

fn retry(code: &str) -> Ack {
    Ack { retry_after_ms: Some(RETRY_MS), ..Ack::retry(code) }
}

impl Intake {
    /// Reports that wait to be applied.
    pub fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Takes a report. Called in the order the agent sent them. Without room, an agent that keeps its reports is told to
    /// come again; one that does not is made to wait.
    pub fn offer(self: &Arc<Self>, agent: &Arc<Agent>, report: Report, ack: AckSender<Adapter>) {
        let size = u32::try_from(report.weight().div_ceil(1024)).unwrap_or(u32::MAX);
        let refused = match self.room.clone().try_acquire_many_owned(size) {
            Ok(room) => match self.queue.try_send(Waiting { report, ack, _room: room }) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(waiting) | mpsc::error::TrySendError::Closed(waiting)) => {
                    (waiting.report, waiting.ack)
                }
            },
            Err(_) => (report, ack),
        };
        let (report, ack) = refused;
        if agent.can("dedup") {
            METERS.results_turned_away.inc();
            let _ = ack.send(&retry("busy"));
            return;
        }
        if agent.waiting.fetch_add(1, Ordering::Relaxed) >= PATIENCE {
            agent.cut.cancel();
        }
        let (intake, agent) = (self.clone(), agent.clone());
        tokio::spawn(async move {
            let _counted = CountOut(&agent.waiting);
            if let Ok(room) = intake.room.clone().acquire_many_owned(size).await {
                let _ = intake.queue.send(Waiting { report, ack, _room: room }).await;
            }
        });
    }

    /// Applies what comes, for ever.
    pub async fn run(self: Arc<Self>, running: Arc<Running>) {
        let mut waiting = self.waiting.lock().await;
        let mut batch = Vec::new();
        while waiting.recv_many(&mut batch, results::BATCH).await > 0 {
            let until = Instant::now() + GATHER;
            while running
                .wanted
                .busy_for()
                .is_some_and(|busy| busy < DISPATCHES_FIRST || (batch.len() < results::BATCH && Instant::now() < until))
            {
                tokio::time::sleep(GATHER_STEP).await;
                while batch.len() < results::BATCH
                    && let Ok(next) = waiting.try_recv()
                {
                    batch.push(next);
                }
            }
            let reports: Vec<Report> = batch.iter().map(|one| one.report.clone()).collect();
            let mut pause = Duration::from_millis(100);
            let started = Instant::now();
            let outcomes = loop {
                match apply(&running, &reports).await {
                    Ok(outcomes) => break outcomes.into_iter().map(Some).collect(),
                    Err(error) if error.is_transient() => {
                        METERS.errors_results.inc();
                        tracing::warn!(%error, reports = reports.len(), "results wait for the database");
                        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                        pause = (pause * 2).min(Duration::from_secs(3));
                    }
                    Err(error) => {
                        tracing::error!(%error, source = ?error.source, reports = reports.len(), "results were refused; applying one by one");
                        break one_by_one(&running, &reports).await;
                    }
                }
            };
            METERS.results_batch.observe(f64::from(u32::try_from(reports.len()).unwrap_or(u32::MAX)));
            METERS.results_seconds.observe(started.elapsed().as_secs_f64());
            for (one, outcome) in batch.drain(..).zip(outcomes) {
                match outcome {
                    Some(Outcome::Applied) => METERS.results_applied.inc(),
                    Some(Outcome::Late) => METERS.results_late.inc(),
                    Some(Outcome::Unknown) => METERS.results_unknown.inc(),
                    None => METERS.results_refused.inc(),
                }
                let _ = match outcome {
                    Some(Outcome::Applied) => one.ack.send(&Ack::ok()),
                    Some(Outcome::Late | Outcome::Unknown) => one.ack.send(&Ack::ignored()),
                    None => one.ack.send(&retry("internal_error")),
                };
            }
        }
    }
}

struct CountOut<'a>(&'a AtomicUsize);

impl Drop for CountOut<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// So that one report the database will not have does not keep the others out.
async fn one_by_one(running: &Running, reports: &[Report]) -> Vec<Option<Outcome>> {
    let mut outcomes = Vec::with_capacity(reports.len());
    for report in reports {
        outcomes.push(match apply(running, std::slice::from_ref(report)).await {
            Ok(one) => one.first().copied(),
            Err(error) => {
                tracing::error!(%error, source = ?error.source, activity = report.activity_id, device = %report.device, "a result was refused");
                None
            }
        });
    }
    outcomes
}

async fn apply(running: &Running, reports: &[Report]) -> Result<Vec<Outcome>> {
    let mut tx = running.pool.begin().await.map_err(Error::from)?;
    let Settled { outcomes, changes, finished } = results::apply(&mut tx, reports).await?;
    for one in &finished {
        signal(&mut tx, one).await?;
    }
    tx.commit().await.map_err(Error::from)?;
    for change in changes {
        running.tell_site(change.site_id, ToOperator::DeviceActivity, change.payload());
    }
    Ok(outcomes)
}

/// Wakes the workflow run that waits for an occurrence, in the transaction that ended its last run.
async fn signal(tx: &mut db::Tx<'_>, finished: &Finished) -> Result<()> {
    let payload = json!({"occurrence_id": finished.occurrence_id});
    if !borealis_workflows::signal(tx, finished.workflow_run_id, "results", &payload).await? {
        tracing::debug!(run = %finished.workflow_run_id, "nobody waits for these results");
    }
    Ok(())
}
