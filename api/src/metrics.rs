//! What the API process tells of itself. The names are explained in `docs/operations.md`, which a test compares.

use std::{
    net::SocketAddr,
    sync::LazyLock,
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request},
    http::{Method, Uri},
    response::Response,
};
use borealis_engine::{Error, Kind, devices::calls::Outcome};
use borealis_protocol::calls::ALL;
use borealis_telemetry::{
    meter::{self, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec},
    trace::Span,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::state::App;

/// Meters of sockets and of what goes over them.
#[derive(Debug)]
pub(crate) struct Meters {
    pub dispatches_sent: IntCounter,
    pub dispatches_given_back: IntCounter,
    pub cancels_sent: IntCounter,
    pub results_applied: IntCounter,
    pub results_late: IntCounter,
    pub results_unknown: IntCounter,
    pub results_refused: IntCounter,
    pub results_turned_away: IntCounter,
    pub results_batch: Histogram,
    pub results_seconds: Histogram,
    pub results_waiting: IntGauge,
    pub errors_delivery: IntCounter,
    pub errors_results: IntCounter,
    pub held: IntGauge,
    pub identities_held: IntCounter,
    pub identities_flapping: IntCounter,
    pub audit_broken: IntGauge,
    pub audit_webhook_behind: IntGauge,
    calls: HistogramVec,
    sockets: IntGaugeVec,
    requests: IntCounterVec,
    seconds: HistogramVec,
}

pub(crate) static METERS: LazyLock<Meters> = LazyLock::new(|| {
    let dispatches = meter::counters(
        "borealis_dispatches_total",
        "Scripts taken of the tables for the sockets of this process: sent, or given_back because the socket was gone.",
        &["result"],
    );
    let results = meter::counters(
        "borealis_results_total",
        "Reports of agents: applied, late (ended already), unknown, refused by the database, or turned_away for lack of room.",
        &["outcome"],
    );
    let errors = meter::counters(
        "borealis_socket_errors_total",
        "Batches of dispatches (delivery) and of reports (results) that failed and are tried again.",
        &["task"],
    );
    Meters {
        dispatches_sent: dispatches.with_label_values(&["sent"]),
        dispatches_given_back: dispatches.with_label_values(&["given_back"]),
        cancels_sent: meter::counter("borealis_cancels_sent_total", "Cancels written to sockets of agents."),
        results_applied: results.with_label_values(&["applied"]),
        results_late: results.with_label_values(&["late"]),
        results_unknown: results.with_label_values(&["unknown"]),
        results_refused: results.with_label_values(&["refused"]),
        results_turned_away: results.with_label_values(&["turned_away"]),
        results_batch: meter::histogram("borealis_results_batch_size", "Reports in one transaction.", &meter::SIZES),
        results_seconds: meter::histogram(
            "borealis_results_seconds",
            "How long batches of reports took until they were committed, tries included.",
            &meter::SECONDS,
        ),
        results_waiting: meter::gauge("borealis_results_waiting", "Reports of agents that wait to be applied."),
        errors_delivery: errors.with_label_values(&["delivery"]),
        errors_results: errors.with_label_values(&["results"]),
        held: meter::gauge("borealis_held", "1 while the engine is held: nothing is scheduled and nothing is dispatched."),
        identities_held: meter::counter(
            "borealis_identities_held_total",
            "Sockets refused because another machine has the identity of their device.",
        ),
        identities_flapping: meter::counter(
            "borealis_identities_flapping_total",
            "Devices whose sockets displaced each other again and again: two machines may have one identity.",
        ),
        audit_broken: meter::gauge(
            "borealis_audit_broken",
            "1 when the daily check of the audit by this process has found that it was tampered with.",
        ),
        audit_webhook_behind: meter::gauge(
            "borealis_audit_webhook_behind",
            "Sealed events of the audit that its webhook has not taken yet; 0 without one.",
        ),
        calls: meter::histograms(
            "borealis_agent_call_seconds",
            "Calls to agents that callers of this process waited for, by call and outcome: answered, refused, unreadable, timed_out, busy or away.",
            &["call", "outcome"],
            &meter::SECONDS,
        ),
        sockets: meter::gauges("borealis_sockets", "Sockets connected to this process, of agents and of operators.", &["kind"]),
        requests: meter::counters(
            "borealis_http_requests_total",
            "Answered requests, by listener (public or internal), method, the template of the route and status.",
            &["listener", "method", "route", "status"],
        ),
        seconds: meter::histograms(
            "borealis_http_request_seconds",
            "From the head of a request to the head of its answer.",
            &["listener", "method", "route"],
            &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0, 30.0],
        ),
    }
});

impl Meters {
    /// A call to an agent has ended.
    pub(crate) fn agent_call(&self, call: &str, outcome: &str, took: Duration) {
        self.calls.with_label_values(&[call, outcome]).observe(took.as_secs_f64());
    }
}

/// Serves `/metrics` of this process.
///
/// # Errors
/// `listen_failed` when the address cannot be bound.
pub(crate) async fn serve(addr: SocketAddr, app: &App, stop: CancellationToken) -> borealis_engine::Result<SocketAddr> {
    LazyLock::force(&METERS);
    for (call, outcome) in ALL.iter().flat_map(|call| Outcome::WORDS.map(|outcome| (call.name, outcome))) {
        METERS.calls.with_label_values(&[call, outcome]);
    }
    let hub = app.hub.clone();
    let sockets = move || {
        let (agents, operators, waiting) = hub.figures();
        for (kind, count) in [("agent", agents), ("operator", operators)] {
            METERS.sockets.with_label_values(&[kind]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        METERS.results_waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
    };
    let bound = borealis_workflows::metrics::serve(addr, &app.pool, sockets, stop)
        .await
        .map_err(|error| Error::new(Kind::Unavailable, "listen_failed", error.to_string()))?;
    tracing::info!(addr = %bound, "metrics");
    Ok(bound)
}

/// Where monitors ask how a process is.
const HEALTH: [&str; 2] = ["/health", "/ready"];

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Answering {
    listener: &'static str,
    method: &'static str,
    route: Option<MatchedPath>,
    uri: Uri,
    started: Instant,
    span: Span,
}

impl Answering {
    /// A request that has just come.
    pub fn begin(listener: &'static str, request: &Request) -> Self {
        Self {
            listener,
            method: known(request.method()),
            // The template: what somebody made up is in no label.
            route: request.extensions().get::<MatchedPath>().cloned(),
            uri: request.uri().clone(),
            started: Instant::now(),
            span: Span::default(),
        }
    }

    /// Has a span tell of it, unless it only asks how this process is: such requests come every few seconds and would be most of all
    /// spans. `parent` is the `traceparent` of somebody trusted.
    pub fn traced(self, id: Uuid, is_https: bool, parent: Option<&str>) -> Self {
        if self.route.as_ref().is_some_and(|route| HEALTH.contains(&route.as_str())) {
            return self;
        }
        let scheme = if is_https { "https" } else { "http" };
        Self { span: Span::request(id, self.method, scheme, self.uri.path(), parent), ..self }
    }

    /// It has been answered.
    pub fn end(self, response: &Response) {
        let route = self.route.as_ref().map(MatchedPath::as_str);
        let status = response.status();
        let labels = [self.listener, self.method, route.unwrap_or("none")];
        METERS.requests.with_label_values(&[labels[0], labels[1], labels[2], status.as_str()]).inc();
        METERS.seconds.with_label_values(&labels).observe(self.started.elapsed().as_secs_f64());
        self.span.answered(self.method, route, status.as_u16());
    }
}

/// A method there is a route for, in the words of a label.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "OTHER",
    }
}
