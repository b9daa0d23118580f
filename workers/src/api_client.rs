//! What a worker asks of the API process, over the internal listener: signed, retried, bounded in time.

use std::{
    path::Path,
    sync::{
        Arc, LazyLock, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use borealis_engine::{
    Error, Kind, Result,
    devices::calls::{Outcome, Spec},
    egress,
    internal::{self, Key},
    keys::read_engine_secret,
};
use borealis_telemetry::{
    meter::{self, HistogramVec, IntCounter},
    trace,
};
use borealis_workflows::{Agents, hold::Confirmed};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::Url;
use uuid::Uuid;

/// How long one attempt may take.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// How long connecting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a request is tried, the first time included.
pub const ATTEMPTS: u32 = 4;
/// The first pause between two attempts; it doubles, and a random part of it is waited.
pub const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// What the answer to a call of an agent may take beyond the time limit of the call.
pub const CALL_GRACE: Duration = Duration::from_secs(3);
/// The code of a request that reached no API process.
const UNREACHED: &str = "api_unreached";
/// The most events of one request.
const EVENTS: usize = 5_000;

const PREFIX: &str = "/api/internal/job-scheduler/";
const HOST_SERVICE_EVENT: &str = "host-service-event";
const PUBLIC_BASE_URL: &str = "public-base-url";
const EPOCH: &str = "epoch";
const AGENT_CALL: &str = "agent-call";

static REQUESTS: LazyLock<HistogramVec> = LazyLock::new(|| {
    meter::histograms(
        "borealis_api_request_seconds",
        "Requests of this worker to API processes, tries each, by route and result: ok, refused or away.",
        &["route", "result"],
        &meter::SECONDS,
    )
});

static EVENTS_ASKED: LazyLock<IntCounter> = LazyLock::new(|| {
    meter::counter("borealis_dispatches_asked_total", "Events for devices this worker asked API processes to send.")
});

/// Shows the meters from the start, at nought.
pub(crate) fn show() {
    LazyLock::force(&EVENTS_ASKED);
    for route in [HOST_SERVICE_EVENT, PUBLIC_BASE_URL, EPOCH, AGENT_CALL] {
        for result in ["ok", "refused", "away"] {
            REQUESTS.with_label_values(&[route, result]);
        }
    }
}

/// An event for a device's agent.
#[derive(Debug, Clone, Serialize)]
pub struct HostServiceEvent {
    /// The device.
    pub device_guid: Uuid,
    /// `quick_job_run`, `quick_job_cancel` or `agent_maintenance_request`.
    pub event_name: &'static str,
    /// What is sent; of a job its id, the rest is in the tables.
    pub payload: Value,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Emitted {
    /// Whether the device is connected.
    pub emitted: bool,
    /// Whether it will be sent once it is.
    #[serde(default)]
    pub queued: bool,
    /// Why it was not taken.
    #[serde(default)]
    pub error: Option<String>,
}

/// The way to the API processes: any of them will do, and the one that answered last is asked first.
#[derive(Debug, Clone)]
pub struct ApiClient {
    http: reqwest::Client,
    bases: Arc<[Url]>,
    /// How often another one was turned to; which one is asked follows from it.
    turns: Arc<AtomicUsize>,
    secret_file: Arc<Path>,
    /// Read again when a request is refused: a rotation may have put another secret there.
    key: Arc<RwLock<Key>>,
    worker: String,
}

impl ApiClient {
    /// A client of the internal listeners at `bases`, signing with the engine secret in `secret_file` as `worker`.
    ///
    /// # Errors
    /// When there is no listener, or no HTTP client can be made; those of [`read_engine_secret`].
    pub fn new(bases: Vec<Url>, secret_file: &Path, worker: Uuid) -> Result<Self> {
        if bases.is_empty() {
            return Err(Error::field("invalid_setting", "BOREALIS_INTERNAL_URL", "it names no API process."));
        }
        egress::provide_tls();
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(Error::bug)?;
        Ok(Self {
            http,
            bases: bases.into(),
            turns: Arc::default(),
            secret_file: secret_file.into(),
            key: Arc::new(RwLock::new(Key::derive(read_engine_secret(secret_file)?.expose()))),
            worker: worker.to_string(),
        })
    }

    /// Passes events on to agents; answers one result for each, in order.
    ///
    /// # Errors
    /// When the API process is away for longer than the attempts take, or does not accept this worker.
    pub async fn host_service_events(&self, events: &[HostServiceEvent]) -> Result<Vec<Emitted>> {
        #[derive(Deserialize)]
        struct Answer {
            results: Vec<Emitted>,
        }
        let mut results = Vec::with_capacity(events.len());
        for chunk in events.chunks(EVENTS) {
            let answer = self.call("POST", HOST_SERVICE_EVENT, Some(json!({"events": chunk}))).await?;
            let answer: Answer = serde_json::from_value(answer)?;
            if answer.results.len() != chunk.len() {
                return Err(Error::bug("the API answered another number of events than it was sent"));
            }
            EVENTS_ASKED.inc_by(u64::try_from(chunk.len()).unwrap_or(0));
            results.extend(answer.results);
        }
        Ok(results)
    }

    /// The URL people and agents use.
    ///
    /// # Errors
    /// As [`ApiClient::host_service_events`].
    pub async fn public_base_url(&self) -> Result<String> {
        let answer = self.call("GET", PUBLIC_BASE_URL, None).await?;
        let url = answer.get("public_base_url").and_then(Value::as_str);
        url.map(str::to_owned).ok_or_else(|| Error::bug("the API answered no URL"))
    }

    /// Asks a device's agent, once: it is turned to another API process only when one cannot be connected to.
    async fn agent_call(&self, device: Uuid, call: Spec, request: Value) -> Result<Outcome> {
        let body = json!({"device_guid": device, "call": call.name, "request": request}).to_string().into_bytes();
        let text = self.any("POST", AGENT_CALL, &body, call.limit + CALL_GRACE, |error| error.code == UNREACHED).await?;
        Ok(serde_json::from_str(&text)?)
    }

    async fn call(&self, method: &'static str, route: &str, body: Option<Value>) -> Result<Value> {
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let error = match self.any(method, route, &body, TIMEOUT, Error::is_transient).await {
                Ok(answer) => return Ok(serde_json::from_str(&answer)?),
                Err(error) if error.is_transient() && attempt < ATTEMPTS => error,
                Err(error) => return Err(error),
            };
            tracing::debug!(%error, source = ?error.source, route, attempt, "the API is asked again");
            let least = Duration::from_secs(error.retry_after_s.unwrap_or(0)).min(Duration::from_secs(5));
            tokio::time::sleep(least + pause.mul_f64(rand::random_range(0.0..1.0))).await;
            pause *= 2;
            attempt += 1;
        }
    }

    /// Asks the API processes in turn, from the one that answered last, until one answers; another one is asked after an error of which
    /// `next` says so. Each attempt may take `limit`.
    async fn any(
        &self,
        method: &'static str,
        route: &str,
        body: &[u8],
        limit: Duration,
        next: impl Fn(&Error) -> bool,
    ) -> Result<String> {
        let turn = self.turns.load(Ordering::Relaxed);
        let mut last = Error::bug("no API process");
        for base in self.bases.iter().cycle().skip(turn % self.bases.len()).take(self.bases.len()) {
            let started = Instant::now();
            let key = self.key();
            let mut answer = self.once(base, &key, method, route, body, limit).await;
            if answer.as_ref().is_err_and(|error| error.kind == Kind::Unauthenticated) {
                self.read_key_again();
                let now = self.key();
                if now != key {
                    answer = self.once(base, &now, method, route, body, limit).await;
                }
            }
            let result = match &answer {
                Ok(_) => "ok",
                Err(error) if error.is_transient() => "away",
                Err(_) => "refused",
            };
            REQUESTS.with_label_values(&[route, result]).observe(started.elapsed().as_secs_f64());
            match answer {
                Err(error) if next(&error) => last = error,
                answer => return answer,
            }
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
        Err(last)
    }

    fn key(&self) -> Key {
        self.key.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the engine secret that lies there now.
    fn read_key_again(&self) {
        match read_engine_secret(&self.secret_file) {
            Ok(secret) => *self.key.write().unwrap_or_else(PoisonError::into_inner) = Key::derive(secret.expose()),
            Err(error) => tracing::warn!(why = %error.message, "the engine secret cannot be read again"),
        }
    }

    /// One attempt, with a timestamp and nonce of its own: one whose answer was lost is not a replay of the next.
    async fn once(
        &self,
        base: &Url,
        key: &Key,
        method: &'static str,
        route: &str,
        body: &[u8],
        limit: Duration,
    ) -> Result<String> {
        let url = base.join(&format!("{PREFIX}{route}")).map_err(Error::bug)?;
        let path_and_query = match url.query() {
            Some(query) => format!("{}?{query}", url.path()),
            None => url.path().to_owned(),
        };
        let headers = internal::headers(key, method, &path_and_query, &self.worker, body);
        let method = reqwest::Method::from_bytes(method.as_bytes()).map_err(Error::bug)?;
        let mut request = self.http.request(method, url).timeout(limit);
        if let Some(parent) = trace::parent() {
            request = request.header("traceparent", parent);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let answer = request.header("content-type", "application/json").body(body.to_vec()).send().await.map_err(away)?;
        let status = answer.status();
        let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let text = answer.text().await.map_err(away)?;
        if status.is_success() {
            return Ok(text);
        }
        let reason = format!("The API process answered {status}: {}", text.chars().take(300).collect::<String>());
        if status.is_server_error() {
            return Err(Error::new(Kind::Unavailable, "api_unavailable", reason).retry_after(retry_after.unwrap_or(0)));
        }
        Err(match status.as_u16() {
            401 => Error::new(Kind::Unauthenticated, "unauthorized", reason),
            _ => Error::invalid("api_refused", reason),
        })
    }
}

fn away(error: reqwest::Error) -> Error {
    let code = if error.is_connect() { UNREACHED } else { "api_unavailable" };
    let mut away = Error::new(Kind::Unavailable, code, "The API process cannot be reached.");
    away.source = Some(Box::new(error));
    away
}

#[async_trait::async_trait]
impl Agents for ApiClient {
    async fn deliver(&self, devices: &[Uuid]) -> Result<()> {
        let events: Vec<HostServiceEvent> = devices
            .iter()
            .map(|device| HostServiceEvent { device_guid: *device, event_name: "quick_job_run", payload: Value::Null })
            .collect();
        self.host_service_events(&events).await?;
        Ok(())
    }

    async fn call(&self, device: Uuid, call: Spec, request: Value) -> Result<Outcome> {
        self.agent_call(device, call, request).await
    }

    async fn confirm(&self) -> Result<Confirmed> {
        #[derive(Deserialize)]
        struct Answer {
            epoch: i64,
            may_act: bool,
        }
        // Once: it is asked again in a second.
        let Answer { epoch, may_act } = serde_json::from_str(&self.any("GET", EPOCH, &[], TIMEOUT, Error::is_transient).await?)?;
        Ok(Confirmed { epoch, may_act })
    }
}
