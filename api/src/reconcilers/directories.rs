//! Accounts of directories are looked up again when their time has come.

use std::time::Duration;

use borealis_engine::{Actor, access::directory::sync};
use borealis_tasks::Reconciler;

use crate::{routes, state::App};

/// Syncs the providers whose time has come. A provider is synced by one process at a time.
pub struct Sync(pub App);

impl Reconciler for Sync {
    const NAME: &'static str = "directory_sync";
    const EVERY: Duration = Duration::from_secs(10);

    async fn pass(&mut self) {
        let app = &self.0;
        while app.vault.is_open() && !app.shutdown.is_cancelled() {
            let provider = match sync::due(&app.pool).await {
                Ok(Some(provider)) => provider,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "directories wait to be synced");
                    break;
                }
            };
            let system = Actor::system();
            // A task of its own, because what a broken server answers may make the library panic.
            match tokio::spawn(routes::directory::sync_and_tell(app.clone(), system, provider, false)).await {
                Ok(Ok(synced)) => tracing::debug!(provider, message = synced.message(), "a directory was synced"),
                Ok(Err(error)) => tracing::warn!(provider, %error, "a directory was not synced"),
                Err(error) => tracing::error!(provider, %error, "a sync of a directory broke off"),
            }
        }
    }
}
