//! The way to the internal listeners of other API processes.

use std::time::Duration;

use borealis_engine::{
    Error, Result,
    devices::calls::{Outcome, Spec},
    internal,
    keys::Keys,
};
use reqwest::header::CONTENT_TYPE;
use serde_json::Value;
use tokio::time::Instant;
use url::Url;
use uuid::Uuid;

use super::{AGENT_CALL, AgentCall};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(2);
/// What an answer may take beyond the time limit of the call.
const GRACE: Duration = Duration::from_secs(1);

/// Reaches other API processes, with requests signed by the engine secret.
#[derive(Debug)]
pub struct Peers {
    http: reqwest::Client,
    keys: Keys,
    process_id: Uuid,
}

impl Peers {
    /// Of the process `process_id`.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(keys: Keys, process_id: Uuid) -> Result<Self> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(Error::bug)?;
        Ok(Self { http, keys, process_id })
    }

    /// Has the process whose internal listener is at `base` call an agent through a socket of its own. A process that is not reached has
    /// no sockets.
    pub async fn call(&self, base: &str, device: Uuid, spec: Spec, request: &Value, deadline: Instant) -> Outcome {
        let call = AgentCall { device_guid: device, call: spec.name.to_owned(), request: request.clone(), here: true };
        match self.post(base, &call, deadline).await {
            Ok(outcome) => outcome,
            Err(error) if error.is_timeout() => Outcome::TimedOut,
            Err(error) => {
                tracing::warn!(%device, base, %error, "another API process was not reached for a call");
                Outcome::Away
            }
        }
    }

    async fn post(&self, base: &str, call: &AgentCall, deadline: Instant) -> std::result::Result<Outcome, Failed> {
        let url = Url::parse(base).and_then(|base| base.join(AGENT_CALL)).map_err(|error| Failed::Address(error.to_string()))?;
        let body = serde_json::to_vec(call).map_err(|error| Failed::Answer(error.to_string()))?;
        let keyring = self.keys.keyring();
        let key = keyring.current().ok_or_else(|| Failed::Answer("there is no engine secret".to_owned()))?;
        let mut request = self.http.post(url.clone()).timeout(deadline.saturating_duration_since(Instant::now()) + GRACE);
        for (name, value) in internal::headers(key, "POST", url.path(), &self.process_id.to_string(), &body) {
            request = request.header(name, value);
        }
        let answer = request.header(CONTENT_TYPE, "application/json").body(body).send().await.map_err(Failed::Http)?;
        let status = answer.status();
        let text = answer.text().await.map_err(Failed::Http)?;
        if !status.is_success() {
            return Err(Failed::Answer(format!("it answered {status}: {}", text.chars().take(300).collect::<String>())));
        }
        serde_json::from_str(&text).map_err(|error| Failed::Answer(error.to_string()))
    }
}

/// Why another process did not answer.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("its address is not usable: {0}")]
    Address(String),
    #[error(transparent)]
    Http(reqwest::Error),
    #[error("{0}")]
    Answer(String),
}

impl Failed {
    /// It was reached, and did not answer in time.
    fn is_timeout(&self) -> bool {
        matches!(self, Self::Http(error) if error.is_timeout() && !error.is_connect())
    }
}
