//! What an API process does by itself, again and again.

mod audit;
mod directories;
mod epoch;
mod event_streams;
mod keys;
mod secret_store;
mod time_zones;

use borealis_tasks::Tasks;
pub use keys::KEYS_EVERY;

use crate::state::App;

/// Starts them.
pub fn start(tasks: &Tasks, app: &App) {
    tasks.reconcile({
        let app = app.clone();
        move || secret_store::KeepOpen::new(app.clone())
    });
    tasks.reconcile({
        let app = app.clone();
        move || keys::ReadKeys::new(app.clone())
    });
    tasks.reconcile({
        let app = app.clone();
        move || epoch::WatchEpoch::new(app.clone())
    });
    tasks.reconcile({
        let app = app.clone();
        move || event_streams::FeedStreams::new(app.clone())
    });
    tasks.reconcile(|| time_zones::ReadTimeZones);
    tasks.reconcile({
        let app = app.clone();
        move || audit::Seal(app.clone())
    });
    tasks.reconcile({
        let app = app.clone();
        move || audit::Check::new(app.clone())
    });
    tasks.reconcile({
        let app = app.clone();
        move || directories::Sync(app.clone())
    });
}
