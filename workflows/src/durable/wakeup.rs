//! One LISTEN connection per process, shared by all its queues. It also holds the marks of those queues whose fetcher
//! sleeps: shared advisory locks, which end with the connection. Missed notifications cost at most one poll interval, so
//! a lost connection is simply made anew.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use borealis_engine::db::Pool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, futures::Notified, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// The channel on which `workflow_hint` names queues that have something to claim.
const READY: &str = "borealis_ready";
/// The channel on which the scheduler is told that a due instant has changed.
pub const SCHEDULE_CHANGED: &str = "borealis_schedule";

/// How long the connection may take to answer before it is made anew.
const ANSWER: Duration = Duration::from_secs(5);

/// Wakes those who wait for a name: a queue, or [`SCHEDULE_CHANGED`].
#[derive(Debug, Clone)]
pub struct Wakeup {
    names: Arc<Names>,
    marks: mpsc::UnboundedSender<Mark>,
}

#[derive(Debug, Default)]
struct Names {
    known: HashMap<String, Notify>,
    /// For names nobody announced: never notified.
    unknown: Notify,
}

/// A fetcher goes to sleep, or wakes.
#[derive(Debug)]
enum Mark {
    Sleeps(String, oneshot::Sender<()>),
    Wakes(String),
}

impl Wakeup {
    /// Starts listening for these names.
    pub fn spawn(pool: Pool, names: impl IntoIterator<Item = String>, stop: CancellationToken) -> Self {
        let known = names.into_iter().map(|name| (name, Notify::new())).collect();
        let names = Arc::new(Names { known, unknown: Notify::new() });
        let (marks, mut asked) = mpsc::unbounded_channel();
        let wakeup = Self { names: names.clone(), marks };
        tokio::spawn(async move {
            let mut sleeping = BTreeSet::new();
            stop.run_until_cancelled(async {
                loop {
                    if let Err(error) = receive(&names, &pool, &mut sleeping, &mut asked).await {
                        tracing::warn!(%error, "LISTEN connection lost; polling until it is back");
                    }
                    // Nobody may wait for a mark while there is no connection to hold it.
                    let away = tokio::time::sleep(Duration::from_secs(1));
                    tokio::pin!(away);
                    loop {
                        tokio::select! {
                            () = &mut away => break,
                            Some(mark) = asked.recv() => note(&mut sleeping, mark),
                        }
                    }
                }
            })
            .await;
        });
        wakeup
    }

    /// Completes at the next notification for `name` after this call.
    pub fn listen(&self, name: &str) -> Notified<'_> {
        self.names.known.get(name).unwrap_or(&self.names.unknown).notified()
    }

    /// Says that the fetcher of `queue` sleeps from now on: whoever makes a run of it ready after this notifies.
    pub async fn sleeps(&self, queue: &str) {
        let (done, answer) = oneshot::channel();
        if self.marks.send(Mark::Sleeps(queue.to_owned(), done)).is_ok() {
            let _ = answer.await;
        }
    }

    /// Says that the fetcher of `queue` is awake: nobody needs to notify.
    pub fn wakes(&self, queue: &str) {
        let _ = self.marks.send(Mark::Wakes(queue.to_owned()));
    }
}

/// Keeps in mind who sleeps, for the connection that will hold the marks.
fn note(sleeping: &mut BTreeSet<String>, mark: Mark) {
    match mark {
        Mark::Sleeps(queue, done) => {
            sleeping.insert(queue);
            let _ = done.send(());
        }
        Mark::Wakes(queue) => {
            sleeping.remove(&queue);
        }
    }
}

async fn receive(
    names: &Names,
    pool: &Pool,
    sleeping: &mut BTreeSet<String>,
    asked: &mut mpsc::UnboundedReceiver<Mark>,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    // A connection that is made anew behind our back would have lost its marks.
    listener.eager_reconnect(false);
    listener.listen_all([READY, SCHEDULE_CHANGED]).await?;
    for queue in sleeping.iter() {
        mark(&mut listener, queue, true).await?;
    }
    // Whatever came before we listened.
    names.known.values().for_each(Notify::notify_waiters);
    loop {
        tokio::select! {
            notification = listener.try_recv() => {
                let notification = notification?.ok_or(sqlx::Error::WorkerCrashed)?;
                let name = if notification.channel() == READY { notification.payload() } else { notification.channel() };
                if let Some(notify) = names.known.get(name) {
                    notify.notify_waiters();
                }
            }
            Some(asked) = asked.recv() => match asked {
                Mark::Sleeps(queue, done) => {
                    if sleeping.insert(queue.clone()) {
                        mark(&mut listener, &queue, true).await?;
                    }
                    let _ = done.send(());
                }
                Mark::Wakes(queue) => {
                    if sleeping.remove(&queue) {
                        mark(&mut listener, &queue, false).await?;
                    }
                }
            },
        }
    }
}

/// Sets or removes the mark that `workflow_hint` looks for. A connection that does not answer is given up.
async fn mark(listener: &mut PgListener, queue: &str, sleeps: bool) -> Result<(), sqlx::Error> {
    let marking = async {
        if sleeps {
            sqlx::query!("SELECT pg_advisory_lock_shared(hashtext('borealis.idle'), hashtext($1))::text AS done", queue)
                .fetch_one(listener)
                .await
                .map(drop)
        } else {
            sqlx::query!("SELECT pg_advisory_unlock_shared(hashtext('borealis.idle'), hashtext($1)) AS done", queue)
                .fetch_one(listener)
                .await
                .map(drop)
        }
    };
    tokio::time::timeout(ANSWER, marking).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}
