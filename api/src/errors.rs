//! The one place where an [`engine error`](borealis_engine::Error) becomes an HTTP answer.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use borealis_engine::{Error, Kind};
use serde_json::{Map, Value};

/// When to come again after an outage that does not say it, in seconds.
const RETRY_AFTER_S: u64 = 2;

/// What handlers return.
pub type Result<T, E = ApiError> = std::result::Result<T, E>;

/// An engine error on its way out.
#[derive(Debug)]
pub struct ApiError(pub Error);

impl<E: Into<Error>> From<E> for ApiError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// The status for a kind of error.
#[must_use]
pub fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        Kind::Forbidden => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Conflict => StatusCode::CONFLICT,
        Kind::Gone => StatusCode::GONE,
        Kind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Kind::Unsupported => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Kind::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::Locked => StatusCode::LOCKED,
        Kind::Limited => StatusCode::TOO_MANY_REQUESTS,
        Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Upstream => StatusCode::BAD_GATEWAY,
        Kind::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        Kind::NotSupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Bug => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Marks an error answer so that [`crate::app`] can add the request id to its body.
#[derive(Debug, Clone)]
pub struct ErrorBody(pub Map<String, Value>);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self(mut error) = self;
        if error.kind == Kind::Unavailable {
            // Whoever is turned away for what passes by itself is told when to come again.
            error.retry_after_s.get_or_insert(RETRY_AFTER_S);
        }
        if error.kind == Kind::Bug {
            tracing::error!(code = error.code, source = ?error.source, "request failed");
        } else if error.source.is_some() {
            tracing::warn!(code = error.code, source = ?error.source, "request refused");
        }
        let mut body = error.extra;
        body.insert("error".into(), error.code.into());
        body.insert("message".into(), error.message.into());
        if !error.fields.is_empty() {
            body.insert("fields".into(), serde_json::json!(error.fields));
        }
        if let Some(seconds) = error.retry_after_s {
            body.insert("retry_after".into(), seconds.into());
        }
        let mut response = (status(error.kind), Json(Value::Object(body.clone()))).into_response();
        if let Some(seconds) = error.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response.extensions_mut().insert(ErrorBody(body));
        response
    }
}
