//! Whether the engine is held.

use std::time::Duration;

use borealis_engine::Kind;
use borealis_tasks::Reconciler;
use tokio::time::Instant;

use crate::{metrics::METERS, state::App};

/// How often the log says that the engine is held.
const HELD_SAID_EVERY: Duration = Duration::from_secs(60);

/// Watches over the epoch, and says in the log when the engine is held, and again every minute.
pub struct WatchEpoch {
    app: App,
    /// When the log last said that the engine is held.
    said: Option<Instant>,
    /// What was wrong at the last look.
    trouble: Option<String>,
}

impl WatchEpoch {
    pub const fn new(app: App) -> Self {
        Self { app, said: None, trouble: None }
    }
}

impl Reconciler for WatchEpoch {
    const NAME: &'static str = "epoch";
    const EVERY: Duration = Duration::from_secs(1);

    async fn pass(&mut self) {
        let app = &self.app;
        let standing = match app.guard.look(&app.pool).await {
            Ok(standing) => standing,
            Err(error) => {
                // That the database is away is said elsewhere.
                if error.kind != Kind::Unavailable || error.code == "state_folder_unusable" {
                    if self.trouble.as_ref() != Some(&error.message) {
                        tracing::error!(%error, source = ?error.source, "nothing is scheduled and nothing is dispatched by this process");
                    }
                    self.trouble = Some(error.message);
                }
                return;
            }
        };
        self.trouble = None;
        METERS.held.set(i64::from(standing.held.is_some()));
        match standing.held {
            Some(held) if self.said.is_none_or(|at| at.elapsed() >= HELD_SAID_EVERY) => {
                tracing::error!(
                    since = %held.since, why = %held.reason, by = held.by,
                    "THE ENGINE IS HELD: nothing is scheduled and nothing is dispatched. `borealis-api admin release` shows what would \
                     happen, and releases it"
                );
                self.said = Some(Instant::now());
            }
            Some(_) => {}
            None => {
                if self.said.take().is_some() {
                    tracing::info!(epoch = standing.at_least, "the engine is released");
                }
            }
        }
    }
}
