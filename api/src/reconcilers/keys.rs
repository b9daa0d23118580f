//! Rotations of the keys on disk.

use std::time::Duration;

use borealis_tasks::Reconciler;

use crate::state::App;

/// How often the keys on disk are read again; a rotation waits for that.
pub const KEYS_EVERY: Duration = Duration::from_secs(2);

/// Reads the keys on disk again.
pub struct ReadKeys {
    app: App,
    /// What was wrong at the last look.
    trouble: Option<String>,
}

impl ReadKeys {
    pub const fn new(app: App) -> Self {
        Self { app, trouble: None }
    }
}

impl Reconciler for ReadKeys {
    const NAME: &'static str = "keys";
    const EVERY: Duration = KEYS_EVERY;

    async fn pass(&mut self) {
        match self.app.keys.read_again() {
            Ok(changed) => {
                if changed {
                    tracing::info!("the keys on disk have changed");
                }
                self.trouble = None;
            }
            Err(error) => {
                if self.trouble.as_ref() != Some(&error.message) {
                    tracing::error!(why = %error.message, "the keys on disk cannot be read again; what was read before counts");
                }
                self.trouble = Some(error.message);
            }
        }
    }
}
