//! The assembled service: routes, limits, request ids and headers.

use std::any::Any;

use axum::{
    Extension, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use borealis_engine::{Error, Kind};
use serde_json::Value;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::openapi::OpenApi;

use crate::{
    access::Entry,
    document::{self, Document},
    errors::{ApiError, ErrorBody},
    metrics::Answering,
    routes,
    state::App,
};

/// The largest body of any route, in bytes: an agent's inventory. What claims to be larger is refused unread.
pub const LARGEST_BODY: u64 = 32 * 1024 * 1024;
/// The longest request target, in bytes.
pub const MAX_TARGET: usize = 8 * 1024;

/// Builds the public service with its OpenAPI document and access table.
pub fn build(app: &App) -> (Router, OpenApi, Vec<Entry>) {
    let (router, mut document, table) = routes::all(app).split();
    document::complete(&mut document, &table);
    let router = router
        .merge(crate::sockets::routes())
        .merge(routes::docs::shortcuts())
        .fallback(|| async { ApiError(Error::new(Kind::NotFound, "not_found", "There is no such route.")) })
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(Document::new(&document)))
        .layer(middleware::from_fn(largest_body))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(normal_form))
        .layer(middleware::from_fn_with_state(app.clone(), headers))
        .layer(middleware::from_fn_with_state(app.clone(), request_id))
        .with_state(app.clone());
    (router, document, table)
}

async fn method_not_allowed() -> Response {
    let mut response =
        ApiError(Error::new(Kind::Invalid, "method_not_allowed", "This route does not take this method.")).into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// Whether a path is in the one form that is routed: nothing in it can mean another path to a proxy, a file system or a
/// later decoder.
fn is_normal(path: &str) -> bool {
    if !path.starts_with('/') || path.contains("//") || path.contains([';', '\\']) {
        return false;
    }
    path.split('/').all(|segment| {
        if matches!(segment, "." | "..") {
            return false;
        }
        let mut rest = segment.as_bytes();
        while let Some(at) = rest.iter().position(|byte| *byte == b'%') {
            let Some(Ok(digits)) = rest.get(at + 1..at + 3).map(std::str::from_utf8) else { return false };
            let Ok(byte) = u8::from_str_radix(digits, 16) else { return false };
            // Letters, digits and the other unreserved characters have no reason to be encoded but to hide (RFC 3986, 2.3).
            let hides = byte.is_ascii_alphanumeric() || byte.is_ascii_control() || b"-._~/\\;%".contains(&byte);
            if hides {
                return false;
            }
            rest = rest.get(at + 3..).unwrap_or_default();
        }
        true
    })
}

async fn normal_form(request: Request, next: Next) -> Response {
    let uri = request.uri();
    if uri.path_and_query().is_some_and(|target| target.as_str().len() > MAX_TARGET) {
        let mut response =
            ApiError(Error::invalid("uri_too_long", "The request target is longer than this service accepts.")).into_response();
        *response.status_mut() = StatusCode::URI_TOO_LONG;
        return response;
    }
    if !is_normal(uri.path()) {
        return ApiError(Error::new(Kind::NotFound, "not_found", "There is no such route.")).into_response();
    }
    next.run(request).await
}

/// Whether a path is a socket's, with its own rules for time and answers.
fn is_socket(path: &str) -> bool {
    path.starts_with("/socket.io") || path.starts_with("/_borealis/")
}

async fn largest_body(request: Request, next: Next) -> Response {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if !is_socket(request.uri().path()) && length.is_some_and(|length| length > LARGEST_BODY) {
        let refused = Error::new(Kind::TooLarge, "body_too_large", "The request body is larger than any route accepts.");
        return ApiError(refused).into_response();
    }
    next.run(request).await
}

#[allow(clippy::needless_pass_by_value, reason = "the layer hands the panic over")]
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no text")
        .to_owned();
    ApiError(Error::bug(format!("a handler panicked: {text}"))).into_response()
}

const API_POLICY: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");

/// Headers that keep a browser from doing with an answer what it is not for.
async fn headers(State(app): State<App>, request: Request, next: Next) -> Response {
    let is_api = request.uri().path().starts_with("/api/");
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    let mut add = |name: HeaderName, value: HeaderValue| {
        headers.entry(name).or_insert(value);
    };
    add(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    add(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    add(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    add(header::CONTENT_SECURITY_POLICY, API_POLICY);
    if is_api {
        add(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    if app.settings.public_base_url.scheme() == "https" {
        add(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    response
}

/// Gives each request an id, which goes into its log lines, its answer's `X-Request-Id` and the body of an error.
async fn request_id(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let request_id = uuid::Uuid::now_v7();
    let is_https = app.settings.public_base_url.scheme() == "https";
    let answering = Answering::begin("public", &request).traced(request_id, is_https, None);
    let id = request_id.simple().to_string();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", request_id = id, method = %request.method(), path);
    request.extensions_mut().insert(RequestId(id.clone()));
    let started = std::time::Instant::now();
    let response = tracing::Instrument::instrument(next.run(request), span.clone()).await;
    let body = match response.extensions().get::<ErrorBody>().cloned() {
        Some(ErrorBody(body)) => Some(body),
        None if is_socket(&path) => None,
        None => foreign_error(&response),
    };
    let mut response = match body {
        Some(mut body) => {
            body.insert("request_id".into(), id.clone().into());
            let (mut parts, _) = response.into_parts();
            parts.headers.remove(header::CONTENT_LENGTH);
            parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            Response::from_parts(parts, Body::from(Value::Object(body).to_string()))
        }
        None => response,
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    span.in_scope(|| {
        tracing::debug!(status = response.status().as_u16(), ms = started.elapsed().as_secs_f64() * 1e3, "answered")
    });
    answering.end(&response);
    response
}

/// The error body for a refusal that did not come from our code: a framework's plain text becomes our form.
fn foreign_error(response: &Response) -> Option<serde_json::Map<String, Value>> {
    let status = response.status();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.to_str().is_ok_and(|value| value.starts_with("application/json")));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    let code = status.canonical_reason().unwrap_or("error").to_lowercase().replace([' ', '-'], "_");
    let mut body = serde_json::Map::new();
    body.insert("error".into(), code.into());
    body.insert("message".into(), "The request was refused.".into());
    Some(body)
}

/// The id of the present request.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

#[cfg(test)]
mod tests {
    use super::is_normal;

    #[test]
    fn one_form_of_a_path_is_routed() {
        for path in ["/", "/api/sites", "/api/devices/lab%20pc%C3%BC", "/api/users/a@b+c", "/api/x/a.b", "/api/sites/"] {
            assert!(is_normal(path), "{path}");
        }
        for path in [
            "",
            "*",
            "api",
            "//api/sites",
            "/api//sites",
            "/api/./sites",
            "/api/../api/sites",
            "/api/%2e%2e/sites",
            "/api/a%2Fb",
            "/api/a%5cb",
            "/api/sites;v=1",
            "/api/sites%3bv=1",
            "/api\\sites",
            "/api/%73ites",
            "/api/a%00",
            "/api/a%0d%0ab",
            "/api/a%252fb",
            "/api/a%",
            "/api/a%4",
            "/api/a%zz",
            "/api/a%+4",
        ] {
            assert!(!is_normal(path), "{path}");
        }
    }
}
