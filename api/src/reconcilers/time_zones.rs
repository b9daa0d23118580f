//! Updates of the rules of time zones.

use std::time::Duration;

use borealis_engine::time_zones;
use borealis_tasks::Reconciler;

/// Reads the rules of time zones again.
pub struct ReadTimeZones;

impl Reconciler for ReadTimeZones {
    const NAME: &'static str = "time_zones";
    const EVERY: Duration = Duration::from_secs(60);

    async fn pass(&mut self) {
        // What it finds is in the log; reading files is not for this thread.
        let _ = tokio::task::spawn_blocking(time_zones::refresh).await;
    }
}
