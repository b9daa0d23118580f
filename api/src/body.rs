//! What a request carries, with answers a person can act on: the field and the reason, never a panic or a silent default.

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Query, Request, rejection::BytesRejection},
    http::request::Parts,
};
use borealis_engine::{Error, Kind};
use serde::de::DeserializeOwned;

use crate::errors::ApiError;

/// A JSON body. Unknown fields are refused where the type says `deny_unknown_fields`.
///
/// Answers 400 `invalid_json` when it does not parse or a field has the wrong type, and 413 `body_too_large`.
#[derive(Debug, Clone)]
pub struct Json<T>(pub T);

/// A JSON body that may be absent: then `T::default()`.
#[derive(Debug, Clone)]
pub struct OptionalJson<T>(pub T);

/// A query string. Answers 400 `invalid_query`.
#[derive(Debug, Clone)]
pub struct Params<T>(pub T);

/// The parameters of a path. What does not parse names nothing, so it answers the 404 of an absent thing.
#[derive(Debug, Clone)]
pub struct Path<T>(pub T);

/// The bytes of a body, bounded by the route's limit.
///
/// # Errors
/// 413 `body_too_large` past the limit, 400 `invalid_body` when the connection broke.
pub async fn bytes<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    Bytes::from_request(request, state).await.map_err(|rejection| {
        ApiError(match rejection {
            BytesRejection::FailedToBufferBody(error) if error.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE => {
                Error::new(Kind::TooLarge, "body_too_large", "The request body is larger than this route accepts.")
            }
            _ => Error::invalid("invalid_body", "The request body could not be read."),
        })
    })
}

/// How deep the arrays and objects of a body may be nested.
pub const MAX_DEPTH: usize = 64;

/// How deep arrays and objects are nested in what is JSON; anything in what is not.
fn depth(bytes: &[u8]) -> usize {
    let (mut now, mut most) = (0_usize, 0_usize);
    let (mut in_text, mut escaped) = (false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => {
                now += 1;
                most = most.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

/// Reads JSON from `bytes`, naming the field and the place of the fault.
///
/// # Errors
/// 400 `invalid_json`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if depth(bytes) > MAX_DEPTH {
        let why = format!("The request body is nested more than {MAX_DEPTH} levels deep.");
        return Err(ApiError(Error::invalid("invalid_json", why)));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        unreadable(Some(path).filter(|path| path != "." && path != "?"), error.inner())
    })?;
    json.end().map_err(|error| unreadable(None, &error))?;
    Ok(value)
}

/// Reads a JSON object. Deriving readers take an array for a struct too, its fields by position; no client should.
fn object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()).is_some_and(|first| *first != b'{') {
        return Err(ApiError(Error::invalid("invalid_json", "The request body must be a JSON object.")));
    }
    parse(bytes)
}

fn unreadable(field: Option<String>, error: &serde_json::Error) -> ApiError {
    let reason = error.to_string();
    let Some(field) = field else {
        return ApiError(Error::invalid("invalid_json", format!("The request body is not what this route takes: {reason}.")));
    };
    let mut invalid =
        Error::invalid("invalid_json", format!("The request body is not what this route takes: {field}: {reason}."));
    invalid.fields.insert(field, reason);
    ApiError(invalid)
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        object(&bytes(request, state).await?).map(Self)
    }
}

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = bytes(request, state).await?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self(T::default()));
        }
        object(&bytes).map(Self)
    }
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri).map(|Query(value)| Self(value)).map_err(|error| {
            let reason = error.body_text();
            let reason = reason.strip_prefix("Failed to deserialize query string: ").unwrap_or(&reason);
            let mut invalid =
                Error::invalid("invalid_query", format!("The query string is not what this route takes: {reason}."));
            if let Some((field, reason)) = reason.split_once(": ") {
                invalid.fields.insert(field.to_owned(), reason.to_owned());
            }
            ApiError(invalid)
        })
    }
}

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(_) => Err(Error::not_found().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_nested_so_deep_and_no_deeper() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(parse::<serde_json::Value>(nested(MAX_DEPTH).as_bytes()).is_ok());
        let refused = parse::<serde_json::Value>(nested(MAX_DEPTH + 1).as_bytes()).unwrap_err();
        assert_eq!(refused.0.code, "invalid_json");
        // What looks like it inside a text is none.
        let text = serde_json::json!({"a": "\\\"".to_owned() + &"[{".repeat(100), "b": [1]}).to_string();
        assert_eq!(depth(text.as_bytes()), 2);
        assert!(parse::<serde_json::Value>(text.as_bytes()).is_ok());
    }

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[allow(dead_code)]
        schedule: Inner,
    }

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[allow(dead_code)]
        count: i64,
    }

    fn fault(text: &str) -> Error {
        object::<Outer>(text.as_bytes()).expect_err("must not parse").0
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        let error = fault(r#"{"schedule": {"count": "many"}}"#);
        assert_eq!(error.code, "invalid_json");
        assert!(error.fields.contains_key("schedule.count"), "{error:?}");
        assert!(error.message.contains("schedule.count"), "{error:?}");
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error = fault(r#"{"schedule": {"count": 1, "cuont": 2}}"#);
        assert!(error.message.contains("cuont"), "{error:?}");
    }

    #[test]
    fn trailing_text_and_broken_text_are_refused() {
        for text in [r#"{"schedule": {"count": 1}} x"#, "{", "", "[]", r#"[{"count": 1}]"#, "null", "\u{feff}{}"] {
            assert_eq!(fault(text).code, "invalid_json", "{text}");
        }
    }

    #[test]
    fn endless_nesting_is_refused_and_does_not_overflow() {
        assert!(parse::<serde_json::Value>("[".repeat(1_000_000).as_bytes()).is_err());
    }
}
