//! How a worker, or another API process, proves itself to the internal listener: one HMAC over the whole request, valid once, for a minute.
//!
//! Scheme `v2`: the key is HKDF-SHA256 over the engine secret's text; signed are, each followed by a
//! line feed: `v2`, the method, the path with its query as sent, the timestamp, the nonce, the worker's id and the hex
//! SHA-256 of the body.

use std::fmt::Write as _;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{Error, Kind, Result, Secret, db::Pool};

/// When the request was signed: seconds since 1970.
pub const TIMESTAMP_HEADER: &str = "x-borealis-internal-timestamp";
/// 16 or more random bytes, base64url.
pub const NONCE_HEADER: &str = "x-borealis-internal-nonce";
/// The worker's GUID.
pub const WORKER_HEADER: &str = "x-borealis-internal-worker";
/// Which key signed: `1`, `next` or `previous`; absent means `1`.
pub const KEY_HEADER: &str = "x-borealis-internal-key";
/// `v2=` and the signature in hex.
pub const SIGNATURE_HEADER: &str = "x-borealis-internal-signature";

/// How far a request's clock may be from ours, in seconds, either way.
pub const SKEW_S: i64 = 60;
/// How long a nonce is remembered, in seconds; longer than twice the skew.
pub const NONCE_KEPT_S: i64 = 300;

const KEY_INFO: &[u8] = b"borealis-job-scheduler-internal-v2";
const DEFAULT_KEY: &str = "1";

/// The parts of a request that are signed.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// Upper case.
    pub method: &'a str,
    /// Path and query, exactly as in the request line.
    pub path_and_query: &'a str,
    /// As in its header.
    pub timestamp: &'a str,
    /// As in its header.
    pub nonce: &'a str,
    /// As in its header.
    pub worker: &'a str,
    /// The body's bytes.
    pub body: &'a [u8],
}

/// One signing key.
#[derive(Debug, Clone)]
pub struct Key(Secret<[u8; 32]>);

impl Key {
    /// Derives the key from the engine secret's text; surrounding white space does not count.
    #[must_use]
    pub fn derive(secret: &str) -> Self {
        let mut okm = [0_u8; 32];
        // 32 bytes are within HKDF-SHA256's 8160, so this cannot fail; an all-zero key is refused below all the same.
        let derived = Hkdf::<Sha256>::new(None, secret.trim().as_bytes()).expand(KEY_INFO, &mut okm);
        debug_assert!(derived.is_ok());
        Self(Secret::new(okm))
    }

    /// The value of the signature header.
    #[must_use]
    pub fn sign(&self, signed: &Signed<'_>) -> String {
        let mut text = String::from("v2=");
        text.push_str(&hex::encode(self.mac(signed)));
        text
    }

    fn mac(&self, signed: &Signed<'_>) -> [u8; 32] {
        let mut message = String::from("v2\n");
        for part in [signed.method, signed.path_and_query, signed.timestamp, signed.nonce, signed.worker] {
            message.push_str(part);
            message.push('\n');
        }
        let _ = writeln!(message, "{}", hex::encode(Sha256::digest(signed.body)));
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.0.expose()) else { return [0; 32] };
        mac.update(message.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

/// The keys that are accepted now: the present one, and while it is being rotated its successor or predecessor.
#[derive(Debug, Clone)]
pub struct Keyring {
    keys: Vec<(&'static str, Key)>,
}

impl Keyring {
    /// A ring of the engine secret and, during a rotation, of others; empty secrets are no keys.
    #[must_use]
    pub fn new(current: &str, next: Option<&str>, previous: Option<&str>) -> Self {
        let keys = [(DEFAULT_KEY, Some(current)), ("next", next), ("previous", previous)]
            .into_iter()
            .filter_map(|(id, secret)| Some((id, secret.filter(|text| !text.trim().is_empty())?)))
            .map(|(id, secret)| (id, Key::derive(secret)))
            .collect();
        Self { keys }
    }

    /// The key to sign with.
    #[must_use]
    pub fn current(&self) -> Option<&Key> {
        self.keys.first().map(|(_, key)| key)
    }

    /// Checks clock and signature. The nonce is to be remembered afterwards with [`remember_nonce`]; only a request that
    /// was signed may use up a nonce.
    ///
    /// `key_id` is the key header. A sender that names `1` means the engine secret as it knows it, so that workers
    /// started before a rotation go on: every live key is tried. Any other id names that key alone.
    ///
    /// # Errors
    /// 401 `unauthorized` or `stale_request`.
    pub fn verify(&self, key_id: Option<&str>, signed: &Signed<'_>, signature: &str, now_s: i64) -> Result<()> {
        let unauthorized = || Error::new(Kind::Unauthenticated, "unauthorized", "The request is not signed by a known key.");
        let given = signature.strip_prefix("v2=").and_then(|text| hex::decode(text).ok()).ok_or_else(unauthorized)?;
        if !nonce_is_sound(signed.nonce) || uuid::Uuid::try_parse(signed.worker).is_err() {
            return Err(unauthorized());
        }
        let key_id = key_id.unwrap_or(DEFAULT_KEY);
        let mut matched = subtle::Choice::from(0);
        for (_, key) in self.keys.iter().filter(|(id, _)| key_id == DEFAULT_KEY || *id == key_id) {
            matched |= key.mac(signed).as_slice().ct_eq(&given);
        }
        if !bool::from(matched) {
            return Err(unauthorized());
        }
        // After the signature, so that a stranger learns nothing of our clock.
        let timestamp: i64 = signed.timestamp.parse().map_err(|_| unauthorized())?;
        if now_s.checked_sub(timestamp).is_none_or(|age| age.abs() > SKEW_S) {
            return Err(Error::new(
                Kind::Unauthenticated,
                "stale_request",
                "The request was signed more than a minute from this clock.",
            ));
        }
        Ok(())
    }
}

/// The headers that prove a request with `key`, as of now and with a nonce of its own. `sender` is the GUID of the worker or API process.
#[must_use]
pub fn headers(key: &Key, method: &str, path_and_query: &str, sender: &str, body: &[u8]) -> [(&'static str, String); 4] {
    let (timestamp, nonce) = (chrono::Utc::now().timestamp().to_string(), nonce());
    let signature = key.sign(&Signed { method, path_and_query, timestamp: &timestamp, nonce: &nonce, worker: sender, body });
    [(TIMESTAMP_HEADER, timestamp), (NONCE_HEADER, nonce), (WORKER_HEADER, sender.to_owned()), (SIGNATURE_HEADER, signature)]
}

/// Compared in constant time.
impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.expose().ct_eq(other.0.expose()).into()
    }
}

impl Eq for Key {}

fn nonce_is_sound(nonce: &str) -> bool {
    (22..=128).contains(&nonce.len())
        && BASE64_URL_SAFE_NO_PAD.decode(nonce.trim_end_matches('=')).is_ok_and(|bytes| bytes.len() >= 16)
}

/// A fresh nonce: 16 random bytes, base64url.
#[must_use]
pub fn nonce() -> String {
    BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 16]>())
}

/// Uses up a nonce, once among all API processes.
///
/// # Errors
/// 401 `replayed_request` when it was seen before.
pub async fn remember_nonce(pool: &Pool, nonce: &str) -> Result<()> {
    let new = sqlx::query!("INSERT INTO internal_nonces (nonce) VALUES ($1) ON CONFLICT DO NOTHING", nonce)
        .execute(pool)
        .await?
        .rows_affected();
    if new == 0 {
        return Err(Error::new(Kind::Unauthenticated, "replayed_request", "This request was received before."));
    }
    Ok(())
}

/// Forgets nonces that are too old to matter; a request that carries one is stale by its timestamp.
///
/// # Errors
/// When the database is away.
pub async fn forget_nonces(pool: &Pool) -> Result<u64> {
    let gone = sqlx::query!(
        "DELETE FROM internal_nonces WHERE nonce IN (
             SELECT nonce FROM internal_nonces WHERE seen_at < now() - make_interval(secs => $1) LIMIT 10000)",
        NONCE_KEPT_S as f64
    )
    .execute(pool)
    .await?
    .rows_affected();
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_700_000_000;
    const WORKER: &str = "6f2c1f0e-8a35-4a55-9d3b-0d6e1f0a9b11";
    const NONCE: &str = "AAECAwQFBgcICQoLDA0ODw";

    fn request() -> Signed<'static> {
        Signed {
            method: "POST",
            path_and_query: "/api/internal/job-scheduler/host-service-event?a=1&b=2",
            timestamp: "1700000000",
            nonce: NONCE,
            worker: WORKER,
            body: b"{\"hostname\":\"a\"}",
        }
    }

    fn code(result: Result<()>) -> &'static str {
        result.map_or_else(|error| error.code, |()| "ok")
    }

    #[test]
    fn the_signature_is_the_contracts() {
        // Computed with Python: hmac over hkdf_sha256(b"secret", salt=zeros, info).
        let key = Key::derive(" secret\n");
        assert_eq!(key.sign(&request()), KNOWN);
    }

    const KNOWN: &str = "v2=b96e4ffc5935a342fdf0145f12332d52d51b66ce1ad373613c49687bd06a6329";

    #[test]
    fn every_part_is_bound() {
        let ring = Keyring::new("secret", None, None);
        let signature = Key::derive("secret").sign(&request());
        assert_eq!(code(ring.verify(None, &request(), &signature, NOW)), "ok");
        let changed = [
            Signed { method: "GET", ..request() },
            Signed { path_and_query: "/api/internal/job-scheduler/workflow/start?a=1&b=2", ..request() },
            Signed { path_and_query: "/api/internal/job-scheduler/host-service-event?b=2&a=1", ..request() },
            Signed { path_and_query: "/api/internal/job-scheduler/host-service-event", ..request() },
            Signed { timestamp: "1700000001", ..request() },
            Signed { nonce: "BAECAwQFBgcICQoLDA0ODw", ..request() },
            Signed { worker: "6f2c1f0e-8a35-4a55-9d3b-0d6e1f0a9b12", ..request() },
            Signed { body: b"{\"hostname\":\"b\"}", ..request() },
        ];
        for request in changed {
            assert_eq!(code(ring.verify(None, &request, &signature, NOW)), "unauthorized", "{request:?}");
        }
    }

    #[test]
    fn a_signature_of_another_form_is_refused() {
        let ring = Keyring::new("secret", None, None);
        let signature = Key::derive("secret").sign(&request());
        for other in ["", "v2=", "v2=zz", &signature[3..], &signature.replace("v2", "v1"), &signature[..40]] {
            assert_eq!(code(ring.verify(None, &request(), other, NOW)), "unauthorized", "{other}");
        }
    }

    #[test]
    fn a_clock_may_be_a_minute_off() {
        let ring = Keyring::new("secret", None, None);
        let signature = Key::derive("secret").sign(&request());
        for (now, expected) in [(NOW - 60, "ok"), (NOW + 60, "ok"), (NOW - 61, "stale_request"), (NOW + 61, "stale_request")] {
            assert_eq!(code(ring.verify(None, &request(), &signature, now)), expected);
        }
        let far = Signed { timestamp: "-9223372036854775808", ..request() };
        assert_eq!(code(ring.verify(None, &far, &Key::derive("secret").sign(&far), NOW)), "stale_request");
    }

    #[test]
    fn a_short_nonce_is_refused() {
        let ring = Keyring::new("secret", None, None);
        for nonce in ["", "AAAA", "not base64url!!!!!!!!!!!"] {
            let request = Signed { nonce, ..request() };
            let signature = Key::derive("secret").sign(&request);
            assert_eq!(code(ring.verify(None, &request, &signature, NOW)), "unauthorized");
        }
        assert!(nonce_is_sound(&super::nonce()));
    }

    #[test]
    fn two_keys_live_during_a_rotation() {
        let ring = Keyring::new("new", None, Some("old"));
        let (new, old) = (Key::derive("new").sign(&request()), Key::derive("old").sign(&request()));
        assert_eq!(code(ring.verify(None, &request(), &new, NOW)), "ok");
        assert_eq!(code(ring.verify(Some("1"), &request(), &old, NOW)), "ok", "a worker from before the rotation");
        assert_eq!(code(ring.verify(Some("previous"), &request(), &old, NOW)), "ok");
        assert_eq!(code(ring.verify(Some("previous"), &request(), &new, NOW)), "unauthorized");
        assert_eq!(code(ring.verify(Some("next"), &request(), &new, NOW)), "unauthorized");
        let after = Keyring::new("new", None, None);
        assert_eq!(code(after.verify(None, &request(), &old, NOW)), "unauthorized");
    }

    #[test]
    fn an_empty_secret_is_no_key() {
        let ring = Keyring::new(" \n", None, None);
        let signature = Key::derive("").sign(&request());
        assert_eq!(code(ring.verify(None, &request(), &signature, NOW)), "unauthorized");
    }
}
