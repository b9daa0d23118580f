//! Whether this worker process may act: not before an API process has confirmed that the database is the one it knows, not while the
//! engine is held, and not on a database that is behind what this process has seen (see [`borealis_engine::hold`]).

use std::{sync::Arc, time::Duration};

use borealis_engine::{
    Result,
    db::Pool,
    hold::{self, EVERY_EPOCH, NO_EPOCH},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Agents, durable::gate};

/// How often an open gate is looked after.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The first pause before an API process is asked again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause before an API process is asked again.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The word of an API process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confirmed {
    /// The highest epoch it has seen; a worker acts on no database that is behind.
    pub epoch: i64,
    /// Whether it has judged the database and the engine is not held.
    pub may_act: bool,
}

/// Whether this process may act. Its standing tasks ask before each pass.
#[derive(Debug, Clone)]
pub struct Gate {
    epoch: watch::Receiver<i64>,
    acts: gate::Gate,
}

impl Gate {
    /// One that is always open: for a runtime that no API process watches over.
    #[must_use]
    pub fn open() -> Self {
        Self { epoch: watch::channel(NO_EPOCH).1, acts: gate::Gate::open() }
    }

    /// The epoch its statements ask for; [`EVERY_EPOCH`] while it is closed.
    #[must_use]
    pub fn at_least(&self) -> i64 {
        *self.epoch.borrow()
    }

    /// Whether this process may act.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.at_least() != EVERY_EPOCH
    }

    /// The same for the runtime, which knows no epochs.
    #[must_use]
    pub fn acts(&self) -> gate::Gate {
        self.acts.clone()
    }
}

/// What opens and closes a gate.
#[derive(Debug)]
pub struct Keeper {
    epoch: watch::Sender<i64>,
    acts: gate::Keeper,
}

/// A gate, closed, and its keeper.
#[must_use]
pub fn closed() -> (Keeper, Gate) {
    let (sender, receiver) = watch::channel(EVERY_EPOCH);
    let (keeper, acts) = gate::Gate::closed();
    (Keeper { epoch: sender, acts: keeper }, Gate { epoch: receiver, acts })
}

impl Keeper {
    /// Opens and closes the gate until `stop`.
    pub async fn keep(&self, pool: Pool, agents: Arc<dyn Agents>, stop: CancellationToken) {
        let mut pause = FIRST_PAUSE;
        let work = async {
            loop {
                // While the database is away nothing can be done anyway.
                if let Err(error) = self.look(&pool, agents.as_ref()).await {
                    tracing::debug!(%error, "whether this worker may act cannot be looked at");
                }
                if *self.epoch.borrow() != EVERY_EPOCH {
                    pause = FIRST_PAUSE;
                    tokio::time::sleep(LOOK_EVERY).await;
                } else {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        };
        stop.run_until_cancelled(work).await;
    }

    async fn look(&self, pool: &Pool, agents: &dyn Agents) -> Result<()> {
        let present = *self.epoch.borrow();
        let at_least = if present == EVERY_EPOCH {
            let confirmed = agents.confirm().await?;
            if !confirmed.may_act {
                return Ok(());
            }
            confirmed.epoch
        } else {
            present
        };
        let (may_act, epoch) = hold::may_act(&mut *pool.acquire().await?, at_least).await?;
        let next = if may_act { epoch } else { EVERY_EPOCH };
        if next == present {
            return Ok(());
        }
        if present == EVERY_EPOCH {
            tracing::info!(epoch, "an API process has confirmed the database: this worker acts");
        } else if next == EVERY_EPOCH {
            tracing::error!(
                epoch,
                seen = present,
                "THE ENGINE IS HELD, or its database is older than what was seen of it: this worker does nothing until an API process \
                 confirms the database"
            );
        }
        self.epoch.send_replace(next);
        self.acts.set(next != EVERY_EPOCH);
        Ok(())
    }
}
