//! How the engine is seen from outside: metrics for Prometheus, logs, and traces for OpenTelemetry.
//!
//! What is measured is declared where it happens; this crate is how it leaves the process. It knows no domain, no SQL and no
//! web framework, and the crates behind it are used nowhere else.
//!
//! * [`meter`]: declaring counters, gauges and histograms.
//! * [`listener`]: `/metrics`, on a listener of its own.
//! * [`log`]: text or JSON.
//! * [`settings`]: the command line and the environment.
//! * [`trace`]: spans over OTLP/HTTP, off unless an endpoint is set. The id of a run is the id of its trace.

pub mod listener;
pub mod log;
pub mod meter;
pub mod settings;
pub mod trace;

use std::{
    fmt::{self, Display, Formatter},
    net::SocketAddr,
    str::FromStr,
};

use clap::Args;
use url::Url;

/// What leaves a process besides its log. Nothing, unless it is set.
#[derive(Debug, Clone, Default, Args)]
pub struct Exports {
    /// Where `/metrics` is served, for Prometheus; nowhere when not set. Plain HTTP for whoever can connect.
    #[arg(long, env = "BOREALIS_METRICS_LISTEN", value_name = "ADDR:PORT", default_value = "", hide_default_value = true)]
    pub metrics_listen: Optional<SocketAddr>,
    /// The base URL of an OpenTelemetry collector (OTLP over HTTP), as http://127.0.0.1:4318; no traces when not set.
    #[arg(long, env = "BOREALIS_OTLP_ENDPOINT", value_name = "URL", default_value = "", hide_default_value = true)]
    pub otlp_endpoint: Optional<Url>,
}

/// A setting that may be left out, or be empty, which is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Optional<T>(pub Option<T>);

impl<T> Default for Optional<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: FromStr> FromStr for Optional<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        let text = text.trim();
        Ok(Self(if text.is_empty() { None } else { Some(text.parse()?) }))
    }
}

impl<T: Display> Display for Optional<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |value| value.fmt(f))
    }
}

/// What was started, to be closed at the end of the process.
#[derive(Debug)]
pub struct Started(Option<trace::Export>);

/// Starts the log of this process, and its traces when they are asked for. To be called within the runtime.
///
/// # Errors
/// When a setting cannot be read, or the log is set up already.
pub fn start(
    program: &'static str,
    version: &'static str,
    filter: &str,
    format: log::Format,
    exports: &Exports,
) -> Result<Started, Error> {
    log::start(filter, format, exports.metrics_listen.0.is_some())?;
    meter::build_info(program, version);
    let export = exports.otlp_endpoint.0.as_ref().map(|endpoint| trace::start(endpoint, program, version)).transpose()?;
    Ok(Started(export))
}

impl Started {
    /// Sends what has not been sent yet.
    pub async fn close(self) {
        if let Some(export) = self.0 {
            export.close().await;
        }
    }
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log filter cannot be read.
    #[error("BOREALIS_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Something else takes the log already.
    #[error("the log is set up already")]
    Twice,
    /// The metrics listener cannot be bound.
    #[error("Cannot listen on {addr} for metrics: {source}. Set BOREALIS_METRICS_LISTEN to another address.")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Traces cannot be exported as asked.
    #[error("BOREALIS_OTLP_ENDPOINT: {0}")]
    Otlp(String),
}
