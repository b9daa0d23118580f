//! Spans for OpenTelemetry, over OTLP/HTTP with protobuf. Off unless [`start`] was called; then each entry here costs one
//! load of an atomic.
//!
//! The ids are the engine's own, so that nothing has to be handed along for a trace to hang together: a run's trace has the
//! run's id, and an HTTP request's trace has the request's id, which is in its answer and in the log. Steps of one run are one
//! trace whichever workers ran them, and however often they died. The root span of a run is written by the worker that ends it.
//!
//! Of the `OTEL_*` variables those of the SDK are read: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
//! `OTEL_TRACES_SAMPLER` with its `_ARG`, `OTEL_BSP_*`, and `OTEL_EXPORTER_OTLP_HEADERS` and `_TIMEOUT`.

use std::{
    borrow::Cow,
    cell::Cell,
    future::Future,
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use opentelemetry::{
    Context, KeyValue,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
        TracerProvider,
    },
};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{IdGenerator, RandomIdGenerator, SamplingDecision, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample},
};
use url::Url;
use uuid::Uuid;

use crate::Error;

/// How long the last spans may take to be sent when the process ends.
const FLUSH: Duration = Duration::from_secs(5);
/// The largest answer of a collector that is read, in bytes.
const ANSWER_BYTES: usize = 64 * 1024;

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

tokio::task_local! {
    /// The span this task is in, where there is one.
    static PRESENT: SpanContext;
}

thread_local! {
    /// The ids of the span that is built next on this thread.
    static CHOSEN: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// The export of this process; sends what is left when it is closed.
#[derive(Debug)]
pub struct Export(SdkTracerProvider);

impl Export {
    /// Sends what is left and ends the export.
    pub async fn close(self) {
        // The exporter waits for its own thread, which needs this runtime to send.
        let closed = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(FLUSH)).await;
        match closed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not sent"),
            Err(error) => tracing::warn!(%error, "the last spans were not sent"),
        }
    }
}

/// Begins to export spans to the collector at `endpoint`, from within the runtime that will send them. `program` is the name
/// of the service unless `OTEL_SERVICE_NAME` says another.
///
/// # Errors
/// [`Error::Otlp`].
pub fn start(endpoint: &Url, program: &'static str, version: &'static str) -> Result<Export, Error> {
    let otlp = |error: &dyn std::fmt::Display| Error::Otlp(error.to_string());
    if !matches!(endpoint.scheme(), "http" | "https") || endpoint.host().is_none() {
        return Err(Error::Otlp("it must be an http or https URL with a host.".to_owned()));
    }
    // As OTEL_EXPORTER_OTLP_ENDPOINT: a base, to which the path of the signal is added.
    let target = format!("{}/v1/traces", endpoint.as_str().trim_end_matches('/'));
    // Whoever comes second finds one installed, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(10))
        .connect_timeout(Duration::from_secs(2))
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| otlp(&error))?;
    let client = Client { http, runtime: tokio::runtime::Handle::current() };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(target)
        .build()
        .map_err(|error| otlp(&error))?;
    let mut resource = Resource::builder().with_attribute(KeyValue::new("service.version", version));
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name(program);
    }
    let resource = resource.with_attribute(KeyValue::new("service.instance.id", Uuid::new_v4().to_string())).build();
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Share::from_environment())
        .with_id_generator(Ids::default())
        .with_resource(resource)
        .build();
    let _ = TRACER.set(provider.tracer("borealis"));
    Ok(Export(provider))
}

/// Whether spans are exported.
#[must_use]
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// Sends for the exporter, whose thread has no runtime.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    runtime: tokio::runtime::Handle,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = request.into_parts();
        let mut asked = self.http.request(parts.method, parts.uri.to_string()).headers(parts.headers);
        asked = asked.body(body);
        let sending = self.runtime.spawn(async move {
            let mut answer = asked.send().await?;
            let (status, headers) = (answer.status(), answer.headers().clone());
            let mut body = Vec::new();
            while let Some(piece) = answer.chunk().await? {
                if body.len() + piece.len() > ANSWER_BYTES {
                    break;
                }
                body.extend_from_slice(&piece);
            }
            Ok::<_, reqwest::Error>((status, headers, body))
        });
        let (status, headers, body) = sending.await??;
        let mut response = Response::new(Bytes::from(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

/// The ids of spans: chosen ones where there are, else random ones.
#[derive(Debug, Default)]
struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        CHOSEN.get().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        CHOSEN.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

/// The share of traces that is kept, decided from the trace's id alone: all processes decide the same, and a trace is kept as
/// a whole or not at all.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Share(f64);

impl Share {
    fn from_environment() -> Self {
        let text = |name| std::env::var(name).unwrap_or_default();
        Self::read(&text("OTEL_TRACES_SAMPLER"), &text("OTEL_TRACES_SAMPLER_ARG"))
    }

    /// By the names OpenTelemetry gives its samplers. There is no parent to ask, so `parentbased_` makes no difference.
    fn read(sampler: &str, argument: &str) -> Self {
        match sampler.trim_start_matches("parentbased_") {
            "always_off" => Self(0.0),
            "traceidratio" => Self(argument.parse::<f64>().unwrap_or(1.0).clamp(0.0, 1.0)),
            _ => Self(1.0),
        }
    }

    /// Ids of version 7 that are made in one millisecond follow each other; mixed (the finalizer of SplitMix64), they do not.
    #[allow(clippy::cast_precision_loss)]
    fn keeps(self, trace: TraceId) -> bool {
        let id = u128::from_be_bytes(trace.to_bytes());
        let mut mixed = u64::try_from((id >> 64) ^ (id & u128::from(u64::MAX))).unwrap_or(0);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        (mixed as f64) < self.0 * u64::MAX as f64 || self.0 >= 1.0
    }
}

impl ShouldSample for Share {
    fn should_sample(
        &self,
        _: Option<&Context>,
        trace: TraceId,
        _: &str,
        _: &SpanKind,
        _: &[KeyValue],
        _: &[opentelemetry::trace::Link],
    ) -> SamplingResult {
        let decision = if self.keeps(trace) { SamplingDecision::RecordAndSample } else { SamplingDecision::Drop };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::default() }
    }
}

fn trace_id(id: Uuid) -> TraceId {
    TraceId::from_bytes(id.into_bytes())
}

/// The id of a run's root span: the second half of the run's id, which is never zero.
fn root_id(run: Uuid) -> SpanId {
    SpanId::from(u64::try_from(run.as_u128() & u128::from(u64::MAX)).unwrap_or(1))
}

fn under(trace: TraceId, span: SpanId) -> Context {
    let parent = SpanContext::new(trace, span, TraceFlags::SAMPLED, true, TraceState::default());
    Context::new().with_remote_span_context(parent)
}

/// How much of a path a span shows, in characters.
const PATH_SHOWN: usize = 256;

/// A span that has begun; nothing, while no spans are exported. It ends when it is dropped.
#[derive(Debug, Default)]
pub struct Span(Option<Box<opentelemetry_sdk::trace::Span>>);

impl Span {
    fn begin(tracer: &SdkTracer, builder: SpanBuilder, parent: &Context) -> Self {
        Self(Some(Box::new(tracer.build_with_context(builder, parent))))
    }

    /// The span of an HTTP request that has just come. A trace of its own with the request's id, unless `parent`, a
    /// `traceparent` of somebody trusted, says which it belongs to.
    #[must_use]
    pub fn request(request: Uuid, method: &str, scheme: &'static str, path: &str, parent: Option<&str>) -> Self {
        let Some(tracer) = TRACER.get() else { return Self::default() };
        let builder = SpanBuilder::from_name(method.to_owned()).with_kind(SpanKind::Server).with_attributes([
            KeyValue::new("http.request.method", method.to_owned()),
            KeyValue::new("url.scheme", scheme),
            KeyValue::new("url.path", path.chars().take(PATH_SHOWN).collect::<String>()),
            hyphenated("borealis.request_id", request),
        ]);
        match parent.and_then(read_parent) {
            Some((trace, span)) => Self::begin(tracer, builder, &under(trace, span)),
            None => {
                let random = RandomIdGenerator::default();
                with_ids(trace_id(request), random.new_span_id(), || Self::begin(tracer, builder, &Context::new()))
            }
        }
    }

    /// Says how the request ended; `route` is the template that matched, none when nothing did.
    pub fn answered(mut self, method: &str, route: Option<&str>, status: u16) {
        let Some(span) = &mut self.0 else { return };
        if let Some(route) = route {
            span.update_name(format!("{method} {route}"));
            span.set_attribute(KeyValue::new("http.route", route.to_owned()));
        }
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status)));
        if status >= 500 {
            span.set_status(Status::error(""));
        }
    }

    /// The span of one attempt of a step, in the trace of its run.
    #[must_use]
    pub fn step(run: Uuid, workflow: &'static str, step: &'static str, attempt: i32) -> Self {
        let Some(tracer) = TRACER.get() else { return Self::default() };
        let builder = SpanBuilder::from_name(format!("{workflow}/{step}")).with_attributes([
            hyphenated("borealis.run_id", run),
            KeyValue::new("borealis.workflow", workflow),
            KeyValue::new("borealis.step", step),
            KeyValue::new("borealis.attempt", i64::from(attempt)),
        ]);
        Self::begin(tracer, builder, &under(trace_id(run), root_id(run)))
    }

    /// Says what became of the attempt.
    pub fn committed(mut self, outcome: &'static str, went_wrong: bool) {
        let Some(span) = &mut self.0 else { return };
        span.set_attribute(KeyValue::new("borealis.outcome", outcome));
        if went_wrong {
            span.set_status(Status::error(outcome));
        }
    }

    /// Does `work` within this span: what it asks of others is told where it belongs.
    pub async fn around<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.0 {
            Some(span) => PRESENT.scope(span.span_context().clone(), work).await,
            None => work.await,
        }
    }
}

/// Writes the root span of a run that has just ended. It began when its id was made (RFC 9562, 5.7: the first 48 bits of a
/// version 7 are milliseconds since 1970).
pub fn run_ended(run: Uuid, workflow: impl Into<Cow<'static, str>>, state: &'static str) {
    let Some(tracer) = TRACER.get() else { return };
    let workflow = workflow.into();
    let milliseconds = u64::try_from(run.as_u128() >> 80).unwrap_or(0);
    let builder = SpanBuilder {
        start_time: (run.get_version_num() == 7).then(|| UNIX_EPOCH + Duration::from_millis(milliseconds)),
        ..SpanBuilder::from_name(workflow.clone())
    }
    .with_attributes([
        hyphenated("borealis.run_id", run),
        KeyValue::new("borealis.workflow", workflow),
        KeyValue::new("borealis.state", state),
    ]);
    let mut span = with_ids(trace_id(run), root_id(run), || tracer.build_with_context(builder, &Context::new()));
    if state == "failed" {
        span.set_status(Status::error(state));
    }
    span.end_with_timestamp(SystemTime::now());
}

/// The `traceparent` (W3C Trace Context) of the span this task is in, to be sent along with what it asks of others.
#[must_use]
pub fn parent() -> Option<String> {
    PRESENT
        .try_with(|present| format!("00-{}-{}-{:02x}", present.trace_id(), present.span_id(), present.trace_flags().to_u8()))
        .ok()
}

fn read_parent(text: &str) -> Option<(TraceId, SpanId)> {
    let mut parts = text.split('-');
    let (version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    (version == "00" && trace != TraceId::INVALID && span != SpanId::INVALID).then_some((trace, span))
}

fn hyphenated(name: &'static str, id: Uuid) -> KeyValue {
    KeyValue::new(name, id.to_string())
}

/// Builds a span with these ids.
fn with_ids<T>(trace: TraceId, span: SpanId, build: impl FnOnce() -> T) -> T {
    CHOSEN.set(Some((trace, span)));
    let built = build();
    CHOSEN.set(None);
    built
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_traces_is_kept_whatever_the_version_of_their_ids() {
        assert_eq!(Share::read("", ""), Share(1.0));
        assert_eq!(Share::read("parentbased_always_off", ""), Share(0.0));
        assert_eq!(Share::read("parentbased_traceidratio", "0.25"), Share(0.25));
        for make in [Uuid::new_v4 as fn() -> Uuid, Uuid::now_v7] {
            let kept = |share: f64| (0..4_000).filter(|_| Share(share).keeps(trace_id(make()))).count();
            assert_eq!((kept(0.0), kept(1.0)), (0, 4_000));
            let quarter = kept(0.25);
            assert!((700..1_300).contains(&quarter), "{quarter} of 4000 are no quarter");
        }
    }

    #[test]
    fn a_parent_is_read_as_it_is_written() {
        let run = Uuid::now_v7();
        let text = format!("00-{}-{}-01", trace_id(run), root_id(run));
        assert_eq!(read_parent(&text), Some((trace_id(run), root_id(run))));
        assert!(text.starts_with(&format!("00-{}-", run.simple())), "{text}");
        for bad in ["", "00", "00-0-0-01", "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "00-x-y-01"] {
            assert_eq!(read_parent(bad), None, "{bad}");
        }
    }
}
