//! The log of a process, on standard error: text for people, or one JSON object a line. What happens inside a request or a
//! step carries its `request_id` or `run_id`.

use std::{io::IsTerminal, sync::LazyLock};

use tracing::{Event, Level, Subscriber, field};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterFn, Targets, filter_fn},
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::{
    Error,
    meter::{self, Histogram},
};

/// How it is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts the log. With `measured`, it is also noted how long connections to Postgres are waited for, which their pool tells
/// nobody but the log.
///
/// # Errors
/// [`Error::Filter`], [`Error::Twice`].
pub fn start(filter: &str, format: Format, measured: bool) -> Result<(), Error> {
    let filter = EnvFilter::try_new(filter)?;
    let started = if measured {
        LazyLock::force(&ACQUIRE);
        // Each with a filter of its own: what one wants to hear of is not for the other.
        let waits = Targets::new().with_target(ACQUIRE_TARGET, Level::TRACE);
        tracing_subscriber::registry()
            .with(discreet())
            .with(lines(format).with_filter(filter))
            .with(Acquires.with_filter(waits))
            .try_init()
    } else {
        tracing_subscriber::registry().with(discreet()).with(filter).with(lines(format)).try_init()
    };
    started.map_err(|_| Error::Twice)
}

/// Libraries say at `trace` what goes over the wire, with the tokens in it: that is heard of nobody but ourselves, and of who counts.
fn discreet() -> FilterFn {
    filter_fn(|about| {
        *about.level() <= Level::DEBUG || about.target().starts_with("borealis") || about.target() == ACQUIRE_TARGET
    })
}

fn lines<S>(format: Format) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    // A log that cannot be written, on a full disk say, must not end what it tells of.
    let lines = tracing_subscriber::fmt::layer().log_internal_errors(false).with_writer(std::io::stderr);
    match format {
        Format::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => lines.json().boxed(),
    }
}

/// Where sqlx says how long it took to get a connection.
const ACQUIRE_TARGET: &str = "sqlx::pool::acquire";

static ACQUIRE: LazyLock<Histogram> = LazyLock::new(|| {
    meter::histogram(
        "borealis_pool_acquire_seconds",
        "How long connections to Postgres were waited for, those that were got.",
        &[0.0001, 0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0],
    )
});

/// Turns what sqlx says of acquired connections into a histogram.
struct Acquires;

impl<S: Subscriber> Layer<S> for Acquires {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        struct Seconds;
        impl field::Visit for Seconds {
            fn record_f64(&mut self, field: &field::Field, value: f64) {
                if field.name() == "acquired_after_secs" {
                    ACQUIRE.observe(value);
                }
            }
            fn record_debug(&mut self, _: &field::Field, _: &dyn std::fmt::Debug) {}
        }
        event.record(&mut Seconds);
    }
}
