//! Requests at a fixed rate, whatever the answers do. The time of a request counts from the instant it was planned for, so
//! that one slow answer is not hidden by the requests that were not sent meanwhile.

use std::{
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::Instant};

use super::Latencies;

/// What a row of requests came to.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// From the planned instant to the end of the answer, of those that succeeded.
    pub latencies: Latencies,
    /// Requests that failed, or were answered with another status than 2xx.
    pub failed: usize,
    /// Bytes of the answers.
    pub bytes: usize,
}

/// Keeps connections alive, as a browser does.
static HTTP: LazyLock<reqwest::Client> = LazyLock::new(|| {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("an HTTP client")
});

/// What a request says beside its URL.
#[derive(Debug, Clone, Copy, Default)]
pub struct Says<'a> {
    /// The token it comes with.
    pub bearer: Option<&'a str>,
    /// Whether it takes compressed answers; they are counted as they come.
    pub gzip: bool,
}

impl<'a> From<Option<&'a str>> for Says<'a> {
    fn from(bearer: Option<&'a str>) -> Self {
        Self { bearer, gzip: false }
    }
}

/// GETs `url(n)` for n = 0, 1, ... at `rate` a second for `lasts`, and waits for all answers.
pub async fn get<'a>(rate: f64, lasts: Duration, says: impl Into<Says<'a>>, url: impl Fn(usize) -> String) -> Load {
    let until = Instant::now() + lasts;
    get_until(rate, says, url, || Instant::now() >= until).await
}

/// The same until `done`.
pub async fn get_until<'a>(rate: f64, says: impl Into<Says<'a>>, url: impl Fn(usize) -> String, done: impl Fn() -> bool) -> Load {
    let says = says.into();
    let load = Arc::new(Mutex::new(Load::default()));
    let sent = AtomicUsize::new(0);
    let mut requests = JoinSet::new();
    let began = Instant::now();
    while !done() {
        let number = sent.fetch_add(1, Ordering::Relaxed);
        #[allow(clippy::cast_precision_loss)]
        let planned = began + Duration::from_secs_f64(number as f64 / rate);
        tokio::time::sleep_until(planned).await;
        let mut request = HTTP.get(url(number));
        if let Some(token) = says.bearer {
            request = request.bearer_auth(token);
        }
        if says.gzip {
            request = request.header(reqwest::header::ACCEPT_ENCODING, "gzip");
        }
        let load = load.clone();
        requests.spawn(async move {
            let answer = async { request.send().await?.error_for_status()?.bytes().await };
            let answer = answer.await;
            let mut load = load.lock().expect("nobody panics here");
            match answer {
                Ok(body) => {
                    load.latencies.add(planned.elapsed());
                    load.bytes += body.len();
                }
                Err(_) => load.failed += 1,
            }
        });
        while requests.try_join_next().is_some() {}
    }
    while requests.join_next().await.is_some() {}
    let load = load.lock().expect("nobody panics here");
    load.clone()
}
