//! Declaring what is counted and measured. A meter is made once, in a `LazyLock`, and used through the handle that comes
//! back: counting is an atomic addition, without names, labels or allocation.
//!
//! Labels take values from a set that the code knows: workflows, steps, routes, outcomes. Never an id, a host or a text from
//! outside, each of which would be a time series for ever.

use prometheus::core::Collector;
pub use prometheus::{Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use prometheus::{HistogramOpts, Opts};

/// Buckets for what takes from half a millisecond to minutes, in seconds.
pub const SECONDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0, 300.0];
/// Buckets for the sizes of batches of up to some thousand.
pub const SIZES: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];

/// Adds a meter to what `/metrics` shows.
///
/// # Panics
/// When the name is none or is taken. Names are constants, so this is a fault that every start would show.
#[allow(clippy::panic)]
fn registered<C: Collector + Clone + 'static>(name: &str, made: prometheus::Result<C>) -> C {
    match made.and_then(|meter| prometheus::register(Box::new(meter.clone())).map(|()| meter)) {
        Ok(meter) => meter,
        Err(error) => panic!("the meter {name} cannot be used: {error}"),
    }
}

/// A number of events since the start of the process.
pub fn counter(name: &str, help: &str) -> IntCounter {
    registered(name, IntCounter::new(name, help))
}

/// The same, by labels.
pub fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(name, IntCounterVec::new(Opts::new(name, help), labels))
}

/// A number that goes up and down.
pub fn gauge(name: &str, help: &str) -> IntGauge {
    registered(name, IntGauge::new(name, help))
}

/// The same, by labels.
pub fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(name, IntGaugeVec::new(Opts::new(name, help), labels))
}

/// A measurement with fractions that goes up and down.
pub fn measure(name: &str, help: &str) -> Gauge {
    registered(name, Gauge::new(name, help))
}

/// The same, by labels.
pub fn measures(name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    registered(name, GaugeVec::new(Opts::new(name, help), labels))
}

/// How measurements are distributed.
pub fn histogram(name: &str, help: &str, buckets: &[f64]) -> Histogram {
    registered(name, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

/// The same, by labels.
pub fn histograms(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
    registered(name, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
}

/// Says what program and version this process is.
pub fn build_info(program: &str, version: &str) {
    static INFO: std::sync::LazyLock<IntGaugeVec> = std::sync::LazyLock::new(|| {
        gauges("borealis_build_info", "Always 1; the labels say what runs.", &["program", "version"])
    });
    INFO.with_label_values(&[program, version]).set(1);
}

/// All meters in the text format of Prometheus, version 0.0.4.
///
/// # Errors
/// When a meter cannot be written.
pub fn text() -> Result<String, prometheus::Error> {
    prometheus::TextEncoder::new().encode_to_string(&prometheus::gather())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_in_the_text() {
        let counted = counters("test_things_total", "Things.", &["kind"]);
        counted.with_label_values(&["round"]).inc_by(3);
        histogram("test_seconds", "Seconds.", &[0.1, 1.0]).observe(0.5);
        let text = text().unwrap();
        for line in [
            "# TYPE test_things_total counter",
            "test_things_total{kind=\"round\"} 3",
            "test_seconds_bucket{le=\"0.1\"} 0",
            "test_seconds_bucket{le=\"1\"} 1",
            "test_seconds_bucket{le=\"+Inf\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in {text}");
        }
        assert!(text.contains("process_resident_memory_bytes "), "{text}");
    }
}
