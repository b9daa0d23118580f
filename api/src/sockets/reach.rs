//! Whether this process reaches Postgres. Without it a socket is of no use to its agent: nothing is sent over it and no
//! report is recorded. So a process that is cut off closes its sockets when there is another one they can go to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use borealis_engine::{Error, Kind, db};
use tokio::time::{Instant, sleep};

use super::Running;

/// How long to wait between two questions to Postgres.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long Postgres may take to answer one.
const ANSWER: Duration = Duration::from_secs(3);
/// A process that had no answer for this long is cut off.
const SILENCE: Duration = Duration::from_secs(8);
/// When a refused socket should try again; by then the balancer has chosen another process.
const TRY_AGAIN_S: u64 = 1;

/// What this process knows of its way to Postgres.
#[derive(Debug, Default)]
pub struct Reach {
    cut_off: AtomicBool,
}

impl Reach {
    /// Lets a new socket in, unless this process is cut off.
    ///
    /// # Errors
    /// 503 `database_unavailable`.
    pub fn admit(&self) -> Result<(), Error> {
        if self.cut_off.load(Ordering::Relaxed) {
            let message = "This process does not reach the database; connect again, to another one.";
            return Err(Error::new(Kind::Unavailable, "database_unavailable", message).retry_after(TRY_AGAIN_S));
        }
        Ok(())
    }
}

/// Asks Postgres for an answer, for ever, and closes the sockets of this process while there is none.
pub async fn watch(running: Arc<Running>) {
    let mut answered = Instant::now();
    loop {
        let asked = Instant::now();
        if db::answers(&running.hub_pool, ANSWER).await {
            answered = Instant::now();
            if running.reach.cut_off.swap(false, Ordering::Relaxed) {
                tracing::info!("this process reaches the database again and takes sockets");
            }
        } else if answered.elapsed() >= SILENCE && !running.company.seen().alone {
            // There is nowhere else to go for the sockets of the only process.
            if !running.reach.cut_off.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    sockets = running.registry.open(),
                    "this process does not reach the database and closes its sockets"
                );
            }
            running.registry.cut_all();
        }
        sleep(ASK_EVERY.saturating_sub(asked.elapsed())).await;
    }
}
