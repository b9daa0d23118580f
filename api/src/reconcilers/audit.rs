//! The audit's chain: sealed a moment after it was written, and checked once a day.

use std::time::Duration;

use borealis_engine::audit::chain;
use borealis_tasks::Reconciler;
use tokio::time::Instant;

use crate::{metrics::METERS, state::App};

/// How often the audit is checked.
const CHECK_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Seals what the audit says. One process at a time does, and only one that is not locked can.
pub struct Seal(pub App);

impl Reconciler for Seal {
    const NAME: &'static str = "audit_seal";
    const EVERY: Duration = Duration::from_secs(1);

    async fn pass(&mut self) {
        let app = &self.0;
        while app.vault.is_open() && !app.shutdown.is_cancelled() {
            match chain::seal(&app.pool, &app.vault).await {
                Ok(sealed) if i64::try_from(sealed).is_ok_and(|sealed| sealed == chain::BATCH) => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "audit events wait to be sealed");
                    break;
                }
            }
        }
    }
}

/// Checks once a day that nobody has changed the audit. Each process does, by its own clock: someone who can write to the database must
/// not be able to say that it was done.
pub struct Check {
    app: App,
    /// When it was last checked by this process.
    checked: Option<Instant>,
    started: bool,
}

impl Check {
    pub const fn new(app: App) -> Self {
        Self { app, checked: None, started: false }
    }
}

impl Reconciler for Check {
    const NAME: &'static str = "audit_check";
    const EVERY: Duration = Duration::from_secs(15 * 60);

    async fn pass(&mut self) {
        // A process that starts has something else to do.
        if !std::mem::replace(&mut self.started, true) {
            return;
        }
        let app = &self.app;
        if !app.vault.is_open() || self.checked.is_some_and(|at| at.elapsed() < CHECK_EVERY) {
            return;
        }
        match chain::check_and_note(&app.pool, &app.vault).await {
            Ok(report) => {
                self.checked = Some(Instant::now());
                METERS.audit_broken.set(i64::from(report.broken.is_some()));
                match report.broken {
                    Some(broken) => tracing::error!(
                        seq = broken.seq,
                        event_id = broken.event_id,
                        why = broken.why,
                        "THE AUDIT WAS TAMPERED WITH; see GET /api/audit/check"
                    ),
                    None => tracing::info!(checked = report.checked, head = report.head, "the audit is whole"),
                }
            }
            Err(error) => tracing::warn!(%error, "the audit could not be checked"),
        }
    }
}
