//! The device extractor: the access token's claims are compared with the device's row at every request.

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
    time::Instant,
};

use axum::http::{HeaderMap, header, request::Parts};
use borealis_engine::{
    Actor, ActorKind, Error, Kind,
    enrollment::tokens::{self, DeviceIdentity},
    keys::guid_text,
};
use borealis_protocol::HEADER_AGENT_CONTEXT;
use uuid::Uuid;

use super::client;
use crate::{errors::ApiError, state::App};

/// A machine that has proven who it is.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its GUID.
    pub guid: Uuid,
    /// Its site now; none until it is assigned.
    pub site_id: Option<i64>,
    /// Its hostname, as stored.
    pub hostname: String,
    /// `active` or `quarantined`.
    pub status: String,
    /// `SYSTEM` or `CURRENTUSER`, from `X-Borealis-Agent-Context`; empty when not sent.
    pub context: String,
    /// For the audit.
    pub actor: Actor,
    /// All that is known of it from its token and row.
    pub identity: DeviceIdentity,
}

/// Finds the device behind a request.
///
/// # Errors
/// 401 `missing_authorization`, and those of [`authenticate_token`].
pub async fn authenticate(app: &App, parts: &Parts) -> Result<Device, ApiError> {
    let bearer = bearer(&parts.headers)
        .ok_or_else(|| Error::new(Kind::Unauthenticated, "missing_authorization", "An access token is needed."))?;
    let ip = client::client_ip(parts).map(|ip| ip.to_string()).unwrap_or_default();
    authenticate_token(app, bearer, &agent_context(&parts.headers), ip).await
}

/// Finds the device an access token speaks for. `context` is the agent's, `ip` the peer's address for the audit.
///
/// # Errors
/// 429 `rate_limited`; those of [`tokens::authenticate`].
pub async fn authenticate_token(app: &App, bearer: &str, context: &str, ip: String) -> Result<Device, ApiError> {
    let claims = app.keys.verify_access(bearer)?;
    // Per device and not per claimed name: only a token of ours comes this far.
    pace(&claims.fingerprint)?;
    let identity = tokens::identify(&app.pool, &claims).await?;
    Ok(Device {
        guid: identity.guid,
        site_id: identity.site_id,
        hostname: identity.hostname.clone(),
        status: identity.status.clone(),
        context: context.to_owned(),
        actor: Actor {
            kind: ActorKind::Device,
            id: guid_text(identity.guid),
            name: identity.hostname.clone(),
            ip,
            ..Actor::default()
        },
        identity,
    })
}

/// The bearer token; the scheme is matched exactly.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let token = headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?.trim();
    (!token.is_empty()).then_some(token)
}

/// The agent's context: letters, digits, `_` and `-`, upper case.
fn agent_context(headers: &HeaderMap) -> String {
    let text = headers.get(HEADER_AGENT_CONTEXT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.chars().filter(|c| c.is_ascii_alphanumeric() || "_-".contains(*c)).take(32).collect::<String>().to_uppercase()
}

/// Requests a device may make at once, and in a minute.
const BURST: f64 = 60.0;
const PER_S: f64 = 1.0;
/// Devices remembered; one that has been forgotten has its whole burst again.
const REMEMBERED: usize = 50_000;

struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { left: BURST, at: now }
    }

    /// Takes one request, or says how many seconds until there is one.
    fn take(&mut self, now: Instant) -> Result<(), f64> {
        self.left = (self.left + now.saturating_duration_since(self.at).as_secs_f64() * PER_S).min(BURST);
        self.at = now;
        if self.left < 1.0 {
            return Err((1.0 - self.left) / PER_S);
        }
        self.left -= 1.0;
        Ok(())
    }

    fn is_full(&self, now: Instant) -> bool {
        self.left + now.saturating_duration_since(self.at).as_secs_f64() * PER_S >= BURST
    }
}

/// Keeps one device from using up what others need. In the memory of this process and not in Postgres: it guards no secret,
/// a device with several processes to talk to may have several shares, and a heartbeat must not cost a second write.
fn pace(fingerprint: &str) -> Result<(), Error> {
    static BUCKETS: LazyLock<Mutex<HashMap<String, Bucket>>> = LazyLock::new(Mutex::default);
    let now = Instant::now();
    let mut buckets = BUCKETS.lock().unwrap_or_else(PoisonError::into_inner);
    if buckets.len() >= REMEMBERED && !buckets.contains_key(fingerprint) {
        buckets.retain(|_, bucket| !bucket.is_full(now));
        if buckets.len() >= REMEMBERED {
            buckets.clear();
        }
    }
    buckets.entry(fingerprint.to_owned()).or_insert_with(|| Bucket::full(now)).take(now).map_err(|wait_s| {
        let seconds = wait_s.ceil().clamp(1.0, 60.0) as u64;
        Error::new(Kind::Limited, "rate_limited", "This device sends too many requests.").retry_after(seconds)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_device_has_a_burst_and_then_one_request_a_second() {
        let start = Instant::now();
        let mut bucket = Bucket::full(start);
        for _ in 0..60 {
            assert!(bucket.take(start).is_ok());
        }
        let wait = bucket.take(start).unwrap_err();
        assert!((0.9..=1.0).contains(&wait), "{wait}");
        assert!(bucket.take(start + Duration::from_secs(1)).is_ok());
        assert!(bucket.take(start + Duration::from_secs(1)).is_err());
        assert!(!bucket.is_full(start + Duration::from_secs(30)));
        assert!(bucket.is_full(start + Duration::from_secs(61)));
    }

    #[test]
    fn headers_are_read_strictly() {
        let headers = |name: &'static str, value: &str| HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
        assert_eq!(bearer(&headers("authorization", "Bearer abc")), Some("abc"));
        for bad in ["bearer abc", "Bearer ", "Bearer", "Basic abc", "abc"] {
            assert_eq!(bearer(&headers("authorization", bad)), None, "{bad}");
        }
        assert_eq!(agent_context(&headers("x-borealis-agent-context", "sys<t>em; x")), "SYSTEMX");
    }
}
