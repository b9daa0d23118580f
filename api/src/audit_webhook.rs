//! Sending the audit to another system, such as a log collector or a SIEM, where someone who controls the engine cannot change it.
//!
//! Events are sent in the order of the chain, after they were sealed, as JSON lines. Where it stands is in the database and moves with a 2xx
//! answer only: each event arrives at least once, also across crashes, and in order. One process at a time sends.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use borealis_engine::{
    Error, Kind, Result, Secret,
    audit::chain::{self, Link},
    db::Pool,
    keys,
};
use reqwest::{Client, header, redirect::Policy};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{metrics, settings::may_take_a_token, state::App};

/// Events in one request.
const BATCH: i64 = 500;
/// How long an answer may take; shorter than a transaction may stand still.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked for new events.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The longest pause after failures; it doubles up to here.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Where the audit is told, and how the engine proves who it is there.
#[derive(Debug, Clone)]
pub struct Webhook {
    /// Where it is posted.
    pub url: Url,
    /// A file with a token that goes along as `Authorization: Bearer`; none for none.
    pub token_file: Option<PathBuf>,
}

impl Webhook {
    /// Checks that the audit may be sent there: readable by nobody in between.
    ///
    /// # Errors
    /// `invalid_setting`.
    pub fn new(url: Url, token_file: Option<&Path>) -> Result<Self> {
        if !may_take_a_token(&url) {
            return Err(Error::field("invalid_setting", "BOREALIS_AUDIT_WEBHOOK_URL", "it must be an https URL."));
        }
        Ok(Self { url, token_file: token_file.map(Path::to_path_buf) })
    }

    /// The token as it lies there now: it may be replaced while the engine runs.
    fn token(&self) -> Result<Option<Secret<String>>> {
        self.token_file.as_deref().map(keys::read_token).transpose()
    }
}

/// Tells it, until `shutdown`.
pub(crate) async fn run(app: App, webhook: Webhook, shutdown: CancellationToken) {
    let client = Client::builder().no_proxy().redirect(Policy::none()).connect_timeout(LIMIT).timeout(LIMIT).build();
    let client = match client {
        Ok(client) => client,
        Err(error) => return tracing::error!(%error, "the audit is told to nobody: there is no HTTP client"),
    };
    let mut pause = LOOK_EVERY;
    let mut next = Instant::now();
    while shutdown.run_until_cancelled(sleep_until(next)).await.is_some() {
        match send(&app.pool, &client, &webhook).await {
            Ok(sent) => {
                pause = LOOK_EVERY;
                next = if sent == BATCH { Instant::now() } else { Instant::now() + LOOK_EVERY };
            }
            Err(error) => {
                pause = (pause * 2).min(LONGEST_PAUSE);
                next = Instant::now() + pause;
                tracing::warn!(why = %error.message, source = ?error.source, again_in_s = pause.as_secs(), "the audit could not be told to its webhook");
            }
        }
        if let Ok(behind) = chain::behind(&app.pool).await {
            metrics::METERS.audit_webhook_behind.set(behind);
        }
    }
}

/// Sends what comes next; how many events it was. None while another process sends.
async fn send(pool: &Pool, client: &Client, webhook: &Webhook) -> Result<i64> {
    let mut tx = pool.begin().await.map_err(Error::from)?;
    let Some(links) = chain::next_for_webhook(&mut tx, BATCH).await? else { return Ok(0) };
    let Some(last) = links.last().map(|link| link.seq) else { return Ok(0) };
    let failed = |why: String| {
        let mut error = Error::new(Kind::Upstream, "webhook_failed", "The webhook did not take the events.");
        error.source = Some(why.into());
        error
    };
    let mut lines = String::new();
    for link in &links {
        lines.push_str(&serde_json::to_string::<Link>(link)?);
        lines.push('\n');
    }
    let mut request = client
        .post(webhook.url.clone())
        .header(header::USER_AGENT, "Borealis-Engine")
        .header(header::CONTENT_TYPE, "application/x-ndjson");
    if let Some(token) = webhook.token()? {
        request = request.bearer_auth(token.expose());
    }
    let answer = request.body(lines).send().await.map_err(|error| failed(error.without_url().to_string()))?;
    if !answer.status().is_success() {
        return Err(failed(format!("status {}", answer.status())));
    }
    chain::told_webhook(&mut tx, last).await?;
    tx.commit().await.map_err(Error::from)?;
    Ok(i64::try_from(links.len()).unwrap_or(BATCH))
}
