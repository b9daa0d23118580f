//! The secret store of this process follows the others, and is opened with an unseal key that is kept elsewhere.

use std::time::Duration;

use borealis_engine::access::{aegis::Handover, setup_token};
use borealis_tasks::Reconciler;
use tokio::time::Instant;
use uuid::Uuid;

use crate::state::App;

/// How long after a failure the unseal key is asked for again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before the unseal key is asked for again.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Follows what other processes do with the secret store, hands its key over, and opens it with an unseal key that is kept elsewhere.
/// Requests do not: such a key may be slow to get, and a request of a stranger must not ask for it.
pub struct KeepOpen {
    handover: Handover,
    /// The data key that is known to be wrapped by that unseal key.
    settled: Option<Uuid>,
    pause: Duration,
    next: Instant,
    app: App,
}

impl KeepOpen {
    pub fn new(app: App) -> Self {
        let handover = Handover::new(app.process_id);
        Self { handover, settled: None, pause: FIRST_PAUSE, next: Instant::now(), app }
    }
}

impl Reconciler for KeepOpen {
    const NAME: &'static str = "secret_store";
    const EVERY: Duration = Duration::from_secs(1);

    async fn pass(&mut self) {
        let (app, vault) = (&self.app, &self.app.vault);
        let mut open = match vault.follow(&app.pool).await {
            Ok(open) => open,
            Err(error) => {
                tracing::debug!(%error, "the secret store could not be looked at");
                return;
            }
        };
        match self.handover.step(&app.pool, vault, &app.keys).await {
            Ok(opened) => {
                if opened {
                    tracing::info!("another process has opened the secret store here");
                    setup_token::remove(&app.pool, &app.settings.state_dir).await;
                }
                open |= opened;
            }
            Err(error) => tracing::debug!(%error, "the key of the secret store could not be handed over"),
        }
        let done = open && self.settled.is_some() && self.settled == vault.key_id();
        if !vault.unseal().is_foreign() || done || Instant::now() < self.next {
            return;
        }
        let Some(ended) = app.shutdown.run_until_cancelled(vault.settle(&app.pool)).await else { return };
        match ended {
            Ok(key_id) => {
                if key_id.is_some() && !open {
                    tracing::info!("the secret store was opened with the unseal key");
                }
                self.settled = key_id;
                self.pause = FIRST_PAUSE;
            }
            Err(error) => {
                let state = if open { "is open, but a restart would leave it locked" } else { "stays locked" };
                tracing::warn!(why = %error.message, state, again_in_s = self.pause.as_secs(), "no unseal key for the secret store");
                self.next = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}
