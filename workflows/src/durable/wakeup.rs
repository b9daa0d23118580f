//! One LISTEN connection per process, shared by all its queues. Missed notifications cost at most one poll interval, so
//! a lost connection is simply made anew.

use std::{collections::HashMap, sync::Arc, time::Duration};

use borealis_engine::db::Pool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, futures::Notified};
use tokio_util::sync::CancellationToken;

/// The channel apalis-postgres notifies when a task is inserted.
const INSERTED: &str = "apalis::job::insert";
/// The channel on which the scheduler is told that a due instant has changed.
pub const SCHEDULE_CHANGED: &str = "borealis_schedule";

#[derive(Debug, serde::Deserialize)]
struct Inserted {
    job_type: String,
}

/// Wakes those who wait for a name: a queue, or [`SCHEDULE_CHANGED`].
#[derive(Debug, Clone)]
pub struct Wakeup(Arc<Names>);

#[derive(Debug, Default)]
struct Names {
    known: HashMap<String, Notify>,
    /// For names nobody announced: never notified.
    unknown: Notify,
}

impl Wakeup {
    /// Starts listening for these names.
    pub fn spawn(pool: Pool, names: impl IntoIterator<Item = String>, stop: CancellationToken) -> Self {
        let known = names.into_iter().map(|name| (name, Notify::new())).collect();
        let wakeup = Self(Arc::new(Names { known, unknown: Notify::new() }));
        let waking = wakeup.clone();
        tokio::spawn(async move {
            stop.run_until_cancelled(async {
                loop {
                    if let Err(error) = waking.receive(&pool).await {
                        tracing::warn!(%error, "LISTEN connection lost; polling until it is back");
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            })
            .await;
        });
        wakeup
    }

    /// Completes at the next notification for `name` after this call.
    pub fn listen(&self, name: &str) -> Notified<'_> {
        self.0.known.get(name).unwrap_or(&self.0.unknown).notified()
    }

    async fn receive(&self, pool: &Pool) -> Result<(), sqlx::Error> {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.listen_all([INSERTED, SCHEDULE_CHANGED]).await?;
        // Whatever came before we listened.
        self.0.known.values().for_each(Notify::notify_waiters);
        loop {
            let notification = listener.try_recv().await?.ok_or(sqlx::Error::WorkerCrashed)?;
            let name = if notification.channel() == INSERTED {
                serde_json::from_str::<Inserted>(notification.payload()).map(|inserted| inserted.job_type).unwrap_or_default()
            } else {
                notification.channel().to_owned()
            };
            if let Some(notify) = self.0.known.get(&name) {
                notify.notify_waiters();
            }
        }
    }
}
