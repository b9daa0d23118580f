//! What open event streams follow.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use borealis_engine::{Result, access::api_tokens, devices::sockets};
use borealis_tasks::Reconciler;
use borealis_workflows::runs;

use crate::{event_streams::Wanted, state::App};

/// How often sessions and API tokens are looked at.
const RIGHTS_EVERY: Duration = Duration::from_secs(2);

/// Looks for all open event streams whether their runs have gone on, and whether their sessions and API tokens still stand: one statement
/// each, however many streams there are.
pub struct FeedStreams {
    app: App,
    rights_at: Option<Instant>,
    /// The last look failed.
    away: bool,
}

impl FeedStreams {
    pub const fn new(app: App) -> Self {
        Self { app, rights_at: None, away: false }
    }

    async fn look(&mut self, wanted: &Wanted) -> Result<()> {
        self.app.streams.tell(&wanted.runs, &runs::progress(&self.app.pool, &wanted.runs).await?);
        if self.rights_at.is_none_or(|at| at.elapsed() >= RIGHTS_EVERY) {
            let mut stand = BTreeSet::new();
            if !wanted.sessions.is_empty() {
                let idle_s = self.app.settings.access.sessions.idle_s;
                stand.extend(
                    sockets::operators(&self.app.pool, &wanted.sessions, idle_s).await?.into_iter().map(|one| one.session),
                );
            }
            if !wanted.tokens.is_empty() {
                stand.extend(api_tokens::standing(&self.app.pool, &wanted.tokens).await?);
            }
            self.app.streams.end_revoked(wanted, &stand);
            self.rights_at = Some(Instant::now());
        }
        Ok(())
    }
}

impl Reconciler for FeedStreams {
    const NAME: &'static str = "event_streams";
    const EVERY: Duration = Duration::from_millis(400);

    async fn pass(&mut self) {
        let wanted = self.app.streams.wanted();
        if wanted.runs.is_empty() {
            return;
        }
        let looked = self.look(&wanted).await;
        if let Err(error) = &looked
            && !self.away
        {
            tracing::warn!(%error, source = ?error.source, "event streams wait for the database");
        }
        self.away = looked.is_err();
    }
}
