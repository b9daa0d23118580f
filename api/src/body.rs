//! What a request carries, with answers a person can act on: the field and the reason, never a panic or a silent default.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    body::{Bytes, HttpBody},
    extract::{FromRequest, FromRequestParts, Query, Request},
    http::{header, request::Parts},
};
use borealis_engine::{
    Error, Kind,
    json::{self, Limits},
    work,
};
use bytes::BytesMut;
use chrono::{DateTime, Datelike as _, Utc};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::{
    errors::ApiError,
    room::{Held, NOT_COUNTED, Room, Rooms},
};

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

/// The most that the body of a route may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimit {
    /// Bytes.
    pub bytes: usize,
    /// Values of its JSON, as [`json::Size::values`] counts them.
    pub values: usize,
}

impl BodyLimit {
    /// Of routes that do not say otherwise.
    pub const USUAL: Self = Self { bytes: 1024 * 1024, values: 50_000 };
    /// Of routes that anybody may call. The largest such body is the answer of an authenticator.
    pub const ANONYMOUS: Self = Self { bytes: 64 * 1024, values: 1_000 };
}

/// Where the guard of a route has room taken for a body, and in whose name.
#[derive(Debug, Clone)]
pub struct Admission {
    rooms: Rooms,
    holder: String,
    held: Arc<Mutex<Vec<Held>>>,
}

impl Admission {
    /// For one request of `holder`. What is taken is held until the last copy of this is dropped.
    #[must_use]
    pub fn new(rooms: &Rooms, holder: String) -> Self {
        Self { rooms: rooms.clone(), holder, held: Arc::default() }
    }

    async fn take(&self, room: &Arc<Room>, bytes: usize) -> Result<(), ApiError> {
        if bytes > NOT_COUNTED {
            let held = room.take(&self.holder, bytes).await?;
            self.held.lock().unwrap_or_else(PoisonError::into_inner).push(held);
        }
        Ok(())
    }
}

fn too_large() -> ApiError {
    ApiError(Error::new(Kind::TooLarge, "body_too_large", "The request body is larger than this route accepts."))
}

/// The bytes of a JSON body: within the route's limit of bytes and of values, and with room taken for them and for the tree that
/// will be built of them. Every body is read here.
///
/// # Errors
/// 413 `body_too_large` past the limit, 400 `invalid_body` when the connection broke, 400 `invalid_json` when it has too many values
/// or levels, 415 `unsupported_content_encoding` when it is compressed, 503 `busy` when too much is being worked on.
pub async fn bytes(request: Request) -> Result<Bytes, ApiError> {
    let admission = request.extensions().get::<Admission>().cloned();
    let limit = request.extensions().get::<BodyLimit>().copied().unwrap_or(BodyLimit::USUAL);
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > limit.bytes) {
        return Err(too_large());
    }
    if let Some(admission) = &admission
        && !request.body().is_end_stream()
    {
        admission.take(&admission.rooms.bodies, length.unwrap_or(limit.bytes)).await?;
    }
    if request.headers().get(header::CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
    {
        let message = "The request body is compressed; send it as it is.";
        return Err(ApiError(Error::new(Kind::Unsupported, "unsupported_content_encoding", message)));
    }
    let mut body = request.into_body();
    // With a length that is known the memory is as large as the body, and is used as the body comes.
    let mut bytes = BytesMut::with_capacity(length.unwrap_or(0));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError(Error::invalid("invalid_body", "The request body could not be read.")))?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > limit.bytes {
            return Err(too_large());
        }
        bytes.extend_from_slice(data);
    }
    let bytes = bytes.freeze();
    let measured = bytes.clone();
    let size = work::sized(bytes.len(), move || json::measure(&measured, Limits::values(limit.values))).await??;
    if let Some(admission) = &admission {
        admission.take(&admission.rooms.trees, size.tree_bytes()).await?;
    }
    Ok(bytes)
}

/// Reads JSON from `bytes`, which [`bytes`](fn@bytes) has read, naming the field and the place of the fault.
///
/// # Errors
/// 400 `invalid_json`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        unreadable(Some(path).filter(|path| path != "." && path != "?"), error.inner())
    })?;
    json.end().map_err(|error| unreadable(None, &error))?;
    Ok(value)
}

/// Reads what a tree says, naming the field of a fault.
///
/// # Errors
/// 400 `invalid_json`.
pub fn from_value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        unreadable(Some(path).filter(|path| path != "." && path != "?"), error.inner())
    })
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

impl<T: DeserializeOwned + Send + 'static, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = bytes(request).await?;
        work::sized(bytes.len(), move || object(&bytes).map(Self)).await?
    }
}

/// What answers have and no body sets: a client may send an answer back, changed where it wants to change something.
pub trait SentBack {
    /// Fields that are taken and not looked at.
    const READ_ONLY: &'static [&'static str];
    /// Fields that say what another one says: the name in answers, and the name in bodies.
    const ALSO_NAMED: &'static [(&'static str, &'static str)] = &[];
}

/// The body of a change: a [`Json`] that may be an answer which is sent back.
#[derive(Debug)]
pub struct Change<T>(pub T);

impl<T: DeserializeOwned + SentBack + Send + 'static, S: Send + Sync> FromRequest<S> for Change<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = bytes(request).await?;
        work::sized(bytes.len(), move || object(&without_read_only::<T>(&bytes)?).map(Self)).await?
    }
}

/// The body without what it has of [`SentBack::READ_ONLY`], and with the names that bodies have.
fn without_read_only<T: SentBack>(bytes: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut fields: BTreeMap<String, Box<RawValue>> = object(bytes)?;
    fields.retain(|name, _| !T::READ_ONLY.contains(&name.as_str()));
    for (shown, named) in T::ALSO_NAMED {
        let Some(value) = fields.remove(*shown) else { continue };
        if fields.get(*named).is_some_and(|other| other.get() != value.get()) {
            return Err(Error::field("conflicting_fields", shown, format!("differs from {named}, which says the same")).into());
        }
        fields.insert((*named).to_owned(), value);
    }
    Ok(serde_json::to_vec(&fields).map_err(Error::from)?)
}

impl<T: DeserializeOwned + Default + Send + 'static, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = bytes(request).await?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self(T::default()));
        }
        work::sized(bytes.len(), move || object(&bytes).map(Self)).await?
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

/// The instant that a parameter of a query names, in epoch seconds or as RFC 3339; none when it is empty.
///
/// # Errors
/// 400 `invalid_instant` that names the `field`.
pub fn instant(text: Option<&str>, field: &str) -> Result<Option<DateTime<Utc>>, Error> {
    let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(None) };
    let read = match text.parse::<i64>() {
        Ok(seconds) => DateTime::from_timestamp(seconds, 0),
        Err(_) => DateTime::parse_from_rfc3339(text).ok().map(|at| at.to_utc()),
    };
    let storable = read.filter(|at| (1970..=9999).contains(&at.year()));
    let wanted = "must be RFC 3339, as 2026-01-31T00:00:00Z, or epoch seconds, between 1970 and the year 9999";
    storable.map(Some).ok_or_else(|| Error::field("invalid_instant", field, wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(limit: BodyLimit, length: Option<usize>, text: &str) -> Request {
        let mut request = Request::new(axum::body::Body::from(text.to_owned()));
        if let Some(length) = length {
            request.headers_mut().insert(header::CONTENT_LENGTH, length.into());
        }
        let rooms = Rooms { bodies: Room::new(1 << 20, 1 << 20), trees: Room::new(1 << 20, 1 << 20) };
        request.extensions_mut().insert(limit);
        request.extensions_mut().insert(Admission::new(&rooms, "x".to_owned()));
        request
    }

    #[tokio::test]
    async fn a_body_is_bounded_in_bytes_values_and_levels() {
        let limit = BodyLimit { bytes: 1_000, values: 10 };
        let read = async |length: Option<usize>, text: &str| match bytes(request(limit, length, text)).await {
            Ok(_) => "read",
            Err(ApiError(error)) => error.code,
        };
        let padded = |size: usize| format!("{:<size$}", "{}");
        assert_eq!(read(None, &padded(1_000)).await, "read");
        assert_eq!(read(None, &padded(1_001)).await, "body_too_large");
        assert_eq!(read(Some(1_001), "").await, "body_too_large", "not read at all");
        assert_eq!(read(None, "[0,0,0,0,0,0,0,0,0,0]").await, "read");
        assert_eq!(read(None, "[0,0,0,0,0,0,0,0,0,0,0]").await, "invalid_json");
        assert_eq!(read(None, &"[".repeat(json::DEPTH + 1)).await, "invalid_json");
    }

    #[tokio::test]
    async fn room_is_taken_for_the_body_and_the_tree_until_the_request_ends() {
        let request = request(BodyLimit { bytes: 1 << 20, values: 1 << 20 }, None, &format!("[{}]", vec!["0"; 400].join(",")));
        let admission = request.extensions().get::<Admission>().cloned().unwrap();
        let read = bytes(request).await.unwrap();
        assert_eq!(read.len(), 801);
        assert_eq!((admission.rooms.bodies.taken(), admission.rooms.trees.taken()), (1 << 20, 400 * json::BYTES_PER_VALUE));
        let rooms = admission.rooms.clone();
        drop(admission);
        assert_eq!((rooms.bodies.taken(), rooms.trees.taken()), (0, 0));
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
