//! Asking GitHub, through the egress policy.

use std::time::Duration;

use borealis_engine::{Error, Kind, Result, Secret, access::directory::trust::Trust, egress};
use reqwest::{Client, StatusCode, header, redirect::Policy};
use url::Url;

/// Where GitHub's interface is.
pub const DEFAULT_URL: &str = "https://api.github.com";
/// How long it may take to answer.
const LIMIT: Duration = Duration::from_secs(20);
/// The fewest requests an hour a token must allow; without one GitHub allows 60.
const ENOUGH: u64 = 5000;
const GITHUB: egress::Purpose = egress::Purpose { name: "GitHub", ports: &[443], private: false };

/// What GitHub says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is good for this many requests an hour.
    Good(u64),
    /// It is good for too few.
    Insufficient(u64),
    /// GitHub does not know it.
    Unknown,
}

/// Asks GitHub what the token is good for.
///
/// # Errors
/// 403 `egress_refused`; 502 `unreachable`, `github_failed`.
pub async fn verify(policy: &egress::Policy, base: &Url, token: &Secret<String>) -> Result<Verdict> {
    let failed = |why: String| {
        let mut error = Error::new(Kind::Upstream, "github_failed", "GitHub did not answer as it should.");
        error.source = Some(why.into());
        error
    };
    let host = base.host_str().ok_or_else(|| failed("no host".to_owned()))?;
    let port = base.port_or_known_default().unwrap_or(443);
    // Resolved once, looked at, and used as they are.
    let addresses = policy.addresses(GITHUB, host, port).await?;
    // As for a directory that names no certificate: the authorities this machine trusts.
    let tls = Trust::of("")?.config.as_ref().clone();
    let client = Client::builder()
        .tls_backend_preconfigured(tls)
        .no_proxy()
        .redirect(Policy::none())
        .resolve_to_addrs(host, &addresses)
        .connect_timeout(egress::CONNECT_LIMIT)
        .timeout(LIMIT)
        .build()
        .map_err(Error::bug)?;
    let answer = client
        .get(base.join("rate_limit").map_err(Error::bug)?)
        .header(header::USER_AGENT, "Borealis-Engine")
        .header(header::ACCEPT, "application/vnd.github+json")
        .bearer_auth(token.expose())
        .send()
        .await
        .map_err(|error| failed(error.without_url().to_string()))?;
    let allowed = answer.headers().get("x-ratelimit-limit").and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    // The body is not read: what counts is in the head.
    match (answer.status(), allowed) {
        (StatusCode::UNAUTHORIZED, _) => Ok(Verdict::Unknown),
        (StatusCode::OK, Some(allowed)) if allowed >= ENOUGH => Ok(Verdict::Good(allowed)),
        (StatusCode::OK, Some(allowed)) => Ok(Verdict::Insufficient(allowed)),
        (status, _) => Err(failed(format!("status {status}"))),
    }
}
