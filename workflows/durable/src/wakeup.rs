//! One LISTEN connection per process, shared by all its queues. Its session also holds the advisory locks that say which
//! fetchers sleep, so that they end with it. A lost connection is made again; until then the fetchers poll.
//!
//! A transaction that writes a hint notifies while a fetcher sleeps. A fetcher falls asleep only when no transaction that has written
//! a hint is under way, so there is no moment at which a hint is neither seen nor announced. The locks and why this holds:
//! `docs/decisions/0008-no-wake-up-is-lost.md`.

use std::{collections::HashMap, sync::Arc, time::Duration};

use borealis_tasks::Tasks;
use sqlx::postgres::PgListener;
use tokio::sync::{Mutex, Notify, futures::Notified, mpsc, oneshot};

use crate::{Pool, connect::Connect};

/// The channel on which `workflow_hint` names queues that have something to claim.
const READY: &str = "borealis_ready";

/// How long the connection may take to answer before it is made again.
const ANSWER: Duration = Duration::from_secs(5);
/// How long to wait before a lost connection is made again.
const AWAY: Duration = Duration::from_secs(1);
/// How often a session whose fetcher is awake asks whether another one still sleeps.
const KEPT: Duration = Duration::from_millis(5);

/// Wakes those who wait for a name: a queue, or a channel of the program's own.
#[derive(Debug, Clone)]
pub struct Wakeup {
    names: Arc<Names>,
    asked: mpsc::UnboundedSender<Asked>,
}

#[derive(Debug, Default)]
struct Names {
    known: HashMap<String, Notify>,
    /// For names nobody announced: never notified.
    unknown: Notify,
}

/// What a fetcher that wants to sleep is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sleep {
    /// A transaction that has written a hint is under way: look again in a moment.
    Busy,
    /// From now on every hint is announced; what was committed before is there for one more look.
    Begun,
    /// It slept already: every hint since its last look was announced, or will be.
    GoesOn,
    /// There is no connection. Nothing is announced: poll.
    Deaf,
}

/// A fetcher goes to sleep, or is awake.
#[derive(Debug)]
enum Asked {
    Sleep(String, oneshot::Sender<Sleep>),
    Awake(String),
}

/// What the session holds for a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    /// The mark of a sleeper.
    marked: bool,
    /// What makes writers of hints notify.
    kept: bool,
}

impl Wakeup {
    /// Starts listening for these queues and for notifications on these channels, as a task of `tasks`.
    pub fn spawn(
        connect: Connect,
        queues: impl IntoIterator<Item = String>,
        channels: &'static [&'static str],
        tasks: &Tasks,
    ) -> Self {
        let channel_names = channels.iter().map(ToString::to_string);
        let known = queues.into_iter().chain(channel_names).map(|name| (name, Notify::new())).collect();
        let names = Arc::new(Names { known, unknown: Notify::new() });
        let (asked, asks) = mpsc::unbounded_channel();
        let wakeup = Self { names: names.clone(), asked };
        let asks = Arc::new(Mutex::new(asks));
        tasks.keep_until_stopped("listen", move || listen(connect.clone(), names.clone(), channels, asks.clone()));
        wakeup
    }

    /// Completes at the next notification for `name` after this call.
    pub fn listen(&self, name: &str) -> Notified<'_> {
        self.names.known.get(name).unwrap_or(&self.names.unknown).notified()
    }

    /// The fetcher of `queue` has found nothing and would sleep.
    pub async fn sleep(&self, queue: &str) -> Sleep {
        let (done, answer) = oneshot::channel();
        let _ = self.asked.send(Asked::Sleep(queue.to_owned(), done));
        answer.await.unwrap_or(Sleep::Deaf)
    }

    /// The fetcher of `queue` is awake: nobody needs to notify it.
    pub fn awake(&self, queue: &str) {
        let _ = self.asked.send(Asked::Awake(queue.to_owned()));
    }
}

async fn listen(connect: Connect, names: Arc<Names>, channels: &[&str], asks: Arc<Mutex<mpsc::UnboundedReceiver<Asked>>>) {
    let mut asks = asks.lock().await;
    loop {
        // A pool of its own, which is closed: in another one the session would go on with its locks.
        let own = Own(connect.pool("listen", 1, &[]));
        let Err(error) = receive(&names, channels, &own.0, &mut asks).await;
        drop(own);
        tracing::warn!(%error, "LISTEN connection lost; polling until it is back");
        away(&mut asks).await;
    }
}

/// A pool that is closed when it is dropped.
struct Own(Pool);

impl Drop for Own {
    fn drop(&mut self) {
        let pool = self.0.clone();
        tokio::spawn(async move { pool.close().await });
    }
}

/// Nobody may wait for an answer while there is no connection.
async fn away(asks: &mut mpsc::UnboundedReceiver<Asked>) {
    let over = tokio::time::sleep(AWAY);
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = &mut over => return,
            Some(asked) = asks.recv() => if let Asked::Sleep(_, done) = asked {
                let _ = done.send(Sleep::Deaf);
            }
        }
    }
}

/// Passes notifications on and holds the locks, until the connection is lost.
async fn receive(
    names: &Names,
    channels: &[&str],
    pool: &Pool,
    asks: &mut mpsc::UnboundedReceiver<Asked>,
) -> Result<std::convert::Infallible, sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    // A connection that is made again behind our back would have lost its locks.
    listener.eager_reconnect(false);
    listener.listen_all(std::iter::once(READY).chain(channels.iter().copied())).await?;
    // Whatever came before we listened.
    names.known.values().for_each(Notify::notify_waiters);
    let mut held: HashMap<String, Held> = HashMap::new();
    let mut kept = tokio::time::interval(KEPT);
    kept.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let keeps_awake = held.values().any(|held| held.kept && !held.marked);
        tokio::select! {
            notification = listener.try_recv() => {
                let notification = notification?.ok_or(sqlx::Error::WorkerCrashed)?;
                let name = if notification.channel() == READY { notification.payload() } else { notification.channel() };
                if let Some(notify) = names.known.get(name) {
                    notify.notify_waiters();
                }
            }
            Some(asked) = asks.recv() => match asked {
                Asked::Sleep(_, done) if done.is_closed() => {}
                Asked::Sleep(queue, done) => {
                    let held = held.entry(queue.clone()).or_default();
                    let answer = in_time(sleep(&mut listener, &queue, held)).await?;
                    if done.send(answer).is_err() {
                        // It did not wait for the answer, and will not look again because of it.
                        in_time(awake(&mut listener, &queue, held)).await?;
                    }
                }
                Asked::Awake(queue) => {
                    let held = held.entry(queue.clone()).or_default();
                    in_time(awake(&mut listener, &queue, held)).await?;
                }
            },
            _ = kept.tick(), if keeps_awake => {
                for (queue, held) in held.iter_mut().filter(|(_, held)| held.kept && !held.marked) {
                    in_time(awake(&mut listener, queue, held)).await?;
                }
            }
        }
    }
}

async fn sleep(listener: &mut PgListener, queue: &str, held: &mut Held) -> Result<Sleep, sqlx::Error> {
    let before = *held;
    if before.marked && before.kept {
        return Ok(Sleep::GoesOn);
    }
    let is = sqlx::query_scalar!(r#"SELECT workflow_sleep($1, $2, $3) AS "is!""#, queue, before.marked, before.kept)
        .fetch_one(listener)
        .await?;
    *held = Held { marked: is != "busy", kept: is == "keeps" || (is == "busy" && before.kept) };
    Ok(match *held {
        Held { marked: false, .. } => Sleep::Busy,
        now if now == before => Sleep::GoesOn,
        _ => Sleep::Begun,
    })
}

async fn awake(listener: &mut PgListener, queue: &str, held: &mut Held) -> Result<(), sqlx::Error> {
    if held.marked || held.kept {
        let kept = sqlx::query_scalar!(r#"SELECT workflow_awake($1, $2, $3) AS "kept!""#, queue, held.marked, held.kept)
            .fetch_one(listener)
            .await?;
        *held = Held { marked: false, kept };
    }
    Ok(())
}

/// A connection that does not answer is given up.
async fn in_time<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    tokio::time::timeout(ANSWER, answer).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}
