//! The agent's HTTP side.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use borealis_protocol::{CONTEXT_SYSTEM, HEADER_AGENT_CONTEXT};
use reqwest::header::{ACCEPT, AUTHORIZATION, DATE, RETRY_AFTER};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use url::Url;

use crate::backoff::Ending;
use crate::clock::ServerClock;
use crate::{Error, Result};

/// What the agent calls itself.
pub(crate) const USER_AGENT: &str = concat!("Borealis-Agent/", env!("CARGO_PKG_VERSION"));

/// Limit of one request from connect to the last byte.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// The most the agent reads of an answer.
const RESPONSE_CAP_BYTES: usize = 4 * 1024 * 1024;
/// The most of an error answer that is kept.
const ERROR_BODY_CAP_BYTES: usize = 4096;

/// Why a request brought no answer to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The engine was not reached, or stopped in the middle.
    #[error("cannot reach the engine: {0}")]
    Network(String),
    /// The engine answered with a status of 400 or more.
    #[error("the engine answered {status}: {body}")]
    Status { status: u16, body: String, retry_after: Option<Duration> },
    /// The answer makes no sense.
    #[error("the engine's answer is not understood: {0}")]
    Body(String),
}

impl CallError {
    pub(crate) const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// What it says of the engine.
    pub(crate) const fn ending(&self) -> Ending {
        match self {
            Self::Status { status, retry_after, .. } => Ending::of_status(*status, *retry_after),
            Self::Network(_) | Self::Body(_) => Ending::Away,
        }
    }
}

/// Requests to one engine.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    clock: Arc<ServerClock>,
}

impl Client {
    pub(crate) fn new(base: Url, tls: &Arc<rustls::ClientConfig>, clock: Arc<ServerClock>) -> Result<Self> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(rustls::ClientConfig::clone(tls))
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(USER_AGENT)
            .timeout(REQUEST_LIMIT)
            .connect_timeout(Duration::from_secs(10))
            .pool_idle_timeout(Duration::from_secs(60))
            .build()
            .map_err(|error| Error::Tls(error.to_string()))?;
        Ok(Self { http, base, clock })
    }

    /// Sends `body` to `path` and reads the answer.
    pub(crate) async fn post<T, R>(&self, path: &str, bearer: Option<&str>, body: &T) -> Result<R, CallError>
    where
        T: Serialize + Sync + ?Sized,
        R: DeserializeOwned,
    {
        let url = join(&self.base, path);
        let mut request = self.http.post(url).header(ACCEPT, "application/json").header(HEADER_AGENT_CONTEXT, CONTEXT_SYSTEM);
        if let Some(token) = bearer {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let mut response = request.json(body).send().await.map_err(|error| CallError::Network(chain(&error)))?;
        let date = response.headers().get(DATE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let status = response.status().as_u16();
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(parse_retry_after);
        let cap = if status >= 300 { ERROR_BODY_CAP_BYTES } else { RESPONSE_CAP_BYTES };
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| CallError::Network(chain(&error)))? {
            let room = cap.saturating_sub(bytes.len());
            bytes.extend_from_slice(chunk.get(..room.min(chunk.len())).unwrap_or_default());
            if chunk.len() > room {
                if status < 300 {
                    return Err(CallError::Body("too long".to_owned()));
                }
                break;
            }
        }
        if status >= 300 {
            return Err(CallError::Status { status, body: String::from_utf8_lossy(&bytes).trim().to_owned(), retry_after });
        }
        let answer = serde_json::from_slice(&bytes).map_err(|error| CallError::Body(error.to_string()))?;
        // The time of who answers with a page of its own, or an error, is not the engine's.
        if let Some(date) = date {
            self.clock.observe(&date);
        }
        Ok(answer)
    }
}

/// Appends `path` to the URL's own path: an engine may live below a prefix.
pub(crate) fn join(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}/{}", base.path().trim_end_matches('/'), path.trim_start_matches('/')));
    url.set_query(None);
    url.set_fragment(None);
    url
}

/// `Retry-After` in its form of seconds.
pub(crate) fn parse_retry_after(value: &str) -> Option<Duration> {
    value.trim().parse().ok().map(Duration::from_secs)
}

/// TLS with the system's certificate authorities and those of `ca_file`; used by requests and socket alike.
pub(crate) fn tls(ca_file: Option<&Path>) -> Result<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    // A machine without any authority can still talk to an engine on loopback, or to one from the extra file.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca_file {
        let mut found = false;
        let certificates = CertificateDer::pem_file_iter(path)
            .map_err(|error| Error::Corrupt { path: path.to_owned(), reason: error.to_string() })?;
        for certificate in certificates {
            certificate
                .map_err(|error| error.to_string())
                .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()))
                .map_err(|reason| Error::Corrupt { path: path.to_owned(), reason })?;
            found = true;
        }
        if !found {
            return Err(Error::Corrupt { path: path.to_owned(), reason: "no certificate in it".to_owned() });
        }
    }
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::Tls(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// An error with its causes; `reqwest` alone says only "error sending request".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_go_below_the_base() {
        let join = |base: &str| super::join(&Url::parse(base).unwrap(), "/api/x").to_string();
        assert_eq!(join("https://rmm.example"), "https://rmm.example/api/x");
        assert_eq!(join("https://rmm.example/below/?q#f"), "https://rmm.example/below/api/x");
    }

    #[test]
    fn an_extra_authority_must_be_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        assert!(tls(None).is_ok());
        assert!(tls(Some(&path)).is_err(), "absent");
        std::fs::write(&path, "nothing here").unwrap();
        assert!(tls(Some(&path)).is_err(), "empty");
    }
}
