//! Answers that may be large: written, and compressed for clients that take that, off the threads that serve sockets. For data
//! without secrets only: what is compressed together with something that a stranger chooses may be guessed from its length.

use std::{convert::Infallible, io::Write as _};

use axum::{
    extract::FromRequestParts,
    http::{
        HeaderMap, HeaderValue,
        header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, VARY},
        request::Parts,
    },
    response::{IntoResponse as _, Response},
};
use borealis_engine::{Error, work};
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;

use crate::errors::Result;

/// From this many bytes on an answer is compressed.
const COMPRESSED_FROM: usize = 4 * 1024;
/// The level of compression, from 1 to 9.
const LEVEL: u32 = 2;
/// Up to about so many bytes are written where the request is served, and a quarter of them compressed: less than a millisecond.
const INLINE_MAX: usize = 128 * 1024;

/// What the client takes.
#[derive(Debug, Clone, Copy)]
pub struct Encodings {
    gzip: bool,
}

impl<S: Sync> FromRequestParts<S> for Encodings {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> std::result::Result<Self, Infallible> {
        Ok(Self { gzip: takes_gzip(&parts.headers) })
    }
}

/// Whether `Accept-Encoding` has gzip, or everything, and does not exclude it.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let (mut named, mut any) = (None, false);
    for value in headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()) {
        for coding in value.split(',') {
            let mut parts = coding.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let weight = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse::<f32>().ok()).unwrap_or(1.0);
            match name {
                _ if name.eq_ignore_ascii_case("gzip") => named = Some(weight > 0.0),
                "*" => any = weight > 0.0,
                _ => {}
            }
        }
    }
    named.unwrap_or(any)
}

impl Encodings {
    /// Answers `answer`, which has `about` so many bytes, as JSON.
    ///
    /// # Errors
    /// 503 `busy` when too much is being worked on; when it cannot be written.
    pub async fn json<T: Serialize + Send + 'static>(self, about: usize, answer: T) -> Result<Response> {
        let written = move || write(&answer, self.gzip);
        let inline = if self.gzip { INLINE_MAX / 4 } else { INLINE_MAX };
        let (body, compressed) = if about <= inline { written()? } else { work::heavy(written).await?? };
        let mut response = body.into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.append(VARY, HeaderValue::from_static("accept-encoding"));
        if compressed {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        Ok(response)
    }
}

/// The bytes of an answer, and whether they are compressed.
fn write(answer: &impl Serialize, gzip: bool) -> Result<(Vec<u8>, bool), Error> {
    let text = serde_json::to_vec(answer)?;
    if !gzip || text.len() < COMPRESSED_FROM {
        return Ok((text, false));
    }
    let mut encoder = GzEncoder::new(Vec::with_capacity(text.len() / 6), Compression::new(LEVEL));
    encoder.write_all(&text).map_err(Error::bug)?;
    Ok((encoder.finish().map_err(Error::bug)?, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_taken_when_it_is_named_or_anything_is() {
        let taken = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(ACCEPT_ENCODING, HeaderValue::from_static(value));
            }
            takes_gzip(&headers)
        };
        for yes in [&["gzip"][..], &["br, GZIP;q=0.5"], &["*"], &["deflate", "gzip"], &["*;q=0, gzip"], &["gzip; q=1"]] {
            assert!(taken(yes), "{yes:?}");
        }
        for no in [&[][..], &["identity"], &["gzip;q=0"], &["gzip;q=0.0, *"], &["*;q=0"], &["br"]] {
            assert!(!taken(no), "{no:?}");
        }
    }
}
