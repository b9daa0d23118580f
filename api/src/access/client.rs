//! What a request says about the client that sent it, and what of it may be believed.

use std::net::{IpAddr, SocketAddr};

use axum::{
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, HeaderValue, Method, Version, header, request::Parts},
};
use borealis_engine::{
    Error, Kind, Secret,
    access::{Client, bootstrap, setup_token},
};

use super::proxies::TrustedProxies;
use crate::{
    errors::ApiError,
    state::{App, Settings},
};

/// The cookie with the session's token.
pub const SESSION_COOKIE: &str = "borealis_auth";
/// The cookie that marks a browser somebody has signed in from; see [`Client::device`].
pub const DEVICE_COOKIE: &str = "borealis_device";
/// How long the browser keeps the mark, in seconds: a year.
const DEVICE_COOKIE_S: u32 = 365 * 24 * 3600;
/// The header with the setup token.
pub const SETUP_TOKEN_HEADER: &str = "x-borealis-setup-token";

/// Headers of which a proxy adds at least one. Their presence says that the peer is not the client.
const FORWARDING: [&str; 8] = [
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-real-ip",
    "x-client-ip",
];

/// Who the client is, as [`TrustedProxies::client`](super::proxies::TrustedProxies::client) has found at the door.
#[derive(Debug, Clone, Copy)]
pub struct ClientIp(pub IpAddr);

/// The address of the client; none when the service runs without a listener.
#[must_use]
pub fn client_ip(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<ClientIp>().map(|ClientIp(ip)| *ip)
}

/// The address of the peer of this connection, which may be a proxy.
fn peer_ip(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|ConnectInfo(peer)| peer.ip().to_canonical())
}

/// The value of a cookie.
fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(key, value)| (key == name && !value.is_empty()).then_some(value))
}

/// How a session's token came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// `Authorization: Bearer`: only a program that knows the token sends it.
    Bearer,
    /// The cookie: a browser sends it by itself, so the request must show that our own pages made it.
    Cookie,
}

/// The token of the session a request claims to belong to. A bearer token comes before the cookie.
#[must_use]
pub fn session_token(headers: &HeaderMap) -> Option<(&str, Carrier)> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        let token = token.trim();
        return (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some((token, Carrier::Bearer));
    }
    cookie(headers, SESSION_COOKIE).map(|token| (token, Carrier::Cookie))
}

/// Whether a method may change something.
#[must_use]
pub fn changes(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("?"))
}

fn bad_origin() -> ApiError {
    Error::new(Kind::Forbidden, "bad_origin", "This request was not made by a page of this engine.").into()
}

/// Whether `Origin` is ours: the configured base URL, or the very host the request was sent to. Where that URL is https, a page
/// of plain http may be anybody's who is on the line.
pub fn own_origin(base: &url::Url, headers: &HeaderMap, origin: &str) -> bool {
    if base.origin().ascii_serialization() == origin {
        return true;
    }
    let plain = (base.scheme() == "http").then(|| origin.strip_prefix("http://")).flatten();
    let authority = origin.strip_prefix("https://").or(plain);
    authority.is_some_and(|authority| text(headers, "host") == Some(authority))
}

fn check_json(parts: &Parts) -> Result<(), ApiError> {
    let headers = &parts.headers;
    let has_body = headers.contains_key(header::TRANSFER_ENCODING)
        || text(headers, "content-length").is_some_and(|length| length.trim() != "0");
    let essence = text(headers, "content-type").and_then(|value| value.split(';').next()).unwrap_or("").trim();
    if has_body && !essence.eq_ignore_ascii_case("application/json") {
        return Err(ApiError(Error::new(
            Kind::Unsupported,
            "unsupported_media_type",
            "The body must be sent with Content-Type: application/json.",
        )));
    }
    Ok(())
}

/// Refuses a change that came with a cookie and that another site's page may have made.
///
/// # Errors
/// 403 `bad_origin`, 415 `unsupported_media_type`.
pub fn check_cookie_request(app: &App, parts: &Parts) -> Result<(), ApiError> {
    let ours = match (text(&parts.headers, "origin"), text(&parts.headers, "sec-fetch-site")) {
        (Some(origin), _) => own_origin(&app.settings.public_base_url, &parts.headers, origin),
        (None, site) => site == Some("same-origin"),
    };
    if !ours {
        return Err(bad_origin());
    }
    check_json(parts)
}

/// Refuses a request without credentials that another site's page made in somebody's browser. Programs send neither of
/// the headers this looks at.
///
/// # Errors
/// 403 `bad_origin`, 415 `unsupported_media_type`.
pub fn check_anonymous_request(app: &App, parts: &Parts) -> Result<(), ApiError> {
    match (text(&parts.headers, "origin"), text(&parts.headers, "sec-fetch-site")) {
        (None, None) => return Ok(()),
        (Some(origin), _) if own_origin(&app.settings.public_base_url, &parts.headers, origin) => {}
        (None, Some("same-origin" | "none")) => {}
        _ => return Err(bad_origin()),
    }
    check_json(parts)
}

/// Whether the request was made on this machine: by its peer address, with no proxy between, and under a name of this
/// machine (a page of a foreign site that lets its own name point here sends that name as `Host`). HTTP/1.0 is what proxies
/// speak that add no header.
///
/// A proxy that adds no header and speaks HTTP/1.1 cannot be told from a program on this machine. So nothing is local when the public
/// base URL is not a loopback address or trusted proxies are set.
#[must_use]
pub fn is_local(settings: &Settings, parts: &Parts) -> bool {
    is_for_this_machine(settings) && from_here(parts)
}

/// Whether the engine serves this machine only: its public base URL is a loopback address, and no trusted proxies are set.
#[must_use]
pub fn is_for_this_machine(settings: &Settings) -> bool {
    settings.public_base_url.host_str().is_some_and(names_this_machine) && settings.trusted_proxies == TrustedProxies::default()
}

fn from_here(parts: &Parts) -> bool {
    peer_ip(parts).is_some_and(|ip| ip.is_loopback())
        && parts.version >= Version::HTTP_11
        && !FORWARDING.iter().any(|name| parts.headers.contains_key(*name))
        && text(&parts.headers, "host").is_none_or(names_this_machine)
}

fn names_this_machine(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => authority.split(':').next().unwrap_or(""),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether the base URL is plain http on this machine, where a browser would not keep a `Secure` cookie everywhere.
fn plain_loopback(app: &App) -> bool {
    let url = &app.settings.public_base_url;
    url.scheme() == "http" && url.host_str().is_some_and(names_this_machine)
}

fn set_cookie(app: &App, name: &str, value: &str, max_age_s: Option<u32>) -> Option<HeaderValue> {
    let secure = if plain_loopback(app) { "" } else { "; Secure" };
    let age = max_age_s.map(|seconds| format!("; Max-Age={seconds}")).unwrap_or_default();
    let mut header = HeaderValue::from_str(&format!("{name}={value}; HttpOnly; SameSite=Strict; Path=/{age}{secure}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// `Set-Cookie` headers for a new session.
#[must_use]
pub fn signed_in_cookies(app: &App, token: &Secret<String>, device: &Secret<String>) -> HeaderMap {
    let cookies = [
        set_cookie(app, SESSION_COOKIE, token.expose(), None),
        set_cookie(app, DEVICE_COOKIE, device.expose(), Some(DEVICE_COOKIE_S)),
    ];
    cookies.into_iter().flatten().map(|value| (header::SET_COOKIE, value)).collect()
}

/// `Set-Cookie` headers that end the session in the browser.
#[must_use]
pub fn signed_out_cookies(app: &App) -> HeaderMap {
    [SESSION_COOKIE, "session"]
        .into_iter()
        .filter_map(|name| set_cookie(app, name, "", Some(0)))
        .map(|value| (header::SET_COOKIE, value))
        .collect()
}

/// Whether a browser page makes the request: one of our cookies was sent, or `Sec-Fetch-Site`. A page has the session in a cookie that
/// its scripts cannot read, so the token is not in its answer.
fn is_page(headers: &HeaderMap) -> bool {
    let ours = [SESSION_COOKIE, DEVICE_COOKIE].into_iter().any(|name| cookie(headers, name).is_some());
    ours || headers.contains_key("sec-fetch-site")
}

/// Who knocks, for routes without credentials. Refuses what a foreign page sent.
#[derive(Debug, Clone)]
pub struct Caller {
    /// What the engine is told.
    pub client: Client,
    /// Whether the session's token is in the body of the answer: not for browser pages.
    pub wants_token: bool,
}

impl Caller {
    /// Reads the request's headers.
    #[must_use]
    pub fn of(parts: &Parts) -> Self {
        let headers = &parts.headers;
        let client = Client {
            ip: client_ip(parts),
            user_agent: text(headers, "user-agent").unwrap_or_default().to_owned(),
            device: cookie(headers, DEVICE_COOKIE).map(|value| Secret::new(value.to_owned())),
        };
        Self { client, wants_token: !is_page(headers) }
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        check_anonymous_request(app, parts)?;
        Ok(Self::of(parts))
    }
}

/// Who sets the engine up: somebody on this machine, or with the setup token.
#[derive(Debug, Clone)]
pub struct Installer(pub Caller);

impl FromRequestParts<App> for Installer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let caller = Caller::from_request_parts(parts, app).await?;
        if !is_local(&app.settings, parts) {
            if bootstrap::state(&app.pool, &app.vault).await?.phase != bootstrap::Phase::LoginRequired {
                setup_token::ensure(&app.pool, &app.settings.state_dir).await?;
            }
            let presented = parts.headers.get(SETUP_TOKEN_HEADER).map(HeaderValue::as_bytes).unwrap_or_default();
            if !setup_token::fits(&app.pool, presented).await? {
                return Err(ApiError(Error::new(
                    Kind::Forbidden,
                    "setup_token_required",
                    "From another machine, and behind a proxy, the set-up needs the X-Borealis-Setup-Token header, with the \
                     content of secrets/setup.token in the state folder of an API process.",
                )));
            }
        }
        Ok(Self(caller))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn parts(peer: Option<&str>, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri("/x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut parts = request.body(()).unwrap().into_parts().0;
        if let Some(peer) = peer {
            parts.extensions.insert(ConnectInfo(peer.parse::<SocketAddr>().unwrap()));
        }
        parts
    }

    #[test]
    fn a_bearer_token_comes_before_the_cookie_and_a_broken_one_does_not_fall_back() {
        let token = |headers: &[(&str, &str)]| {
            let parts = parts(None, headers);
            session_token(&parts.headers).map(|(token, carrier)| (token.to_owned(), carrier))
        };
        assert_eq!(token(&[("cookie", "a=b; borealis_auth=c")]), Some(("c".into(), Carrier::Cookie)));
        assert_eq!(token(&[("cookie", "borealis_auth=c"), ("authorization", "bearer b")]), Some(("b".into(), Carrier::Bearer)));
        assert_eq!(token(&[("cookie", "borealis_auth=c"), ("authorization", "Basic b")]), None);
        assert_eq!(token(&[("cookie", "borealis_auth=c"), ("authorization", "Bearer ")]), None);
        assert_eq!(token(&[("cookie", "borealis_auth=; xborealis_auth=c")]), None);
    }

    #[test]
    fn local_is_judged_by_the_peer_the_absence_of_proxies_and_the_name() {
        assert!(from_here(&parts(Some("127.0.0.1:5"), &[("host", "127.0.0.1:8080")])));
        assert!(from_here(&parts(Some("[::1]:5"), &[("host", "[::1]:8080")])));
        assert!(from_here(&parts(Some("[::ffff:127.0.0.1]:5"), &[("host", "LOCALHOST")])));
        assert!(!from_here(&parts(None, &[("host", "127.0.0.1")])));
        assert!(!from_here(&parts(Some("192.0.2.1:5"), &[("host", "127.0.0.1")])));
        assert!(!from_here(&parts(Some("127.0.0.1:5"), &[("host", "evil.example")])));
        assert!(!from_here(&parts(Some("127.0.0.1:5"), &[("host", "127.0.0.1.evil.example")])));
        for name in FORWARDING {
            assert!(!from_here(&parts(Some("127.0.0.1:5"), &[("host", "localhost"), (name, "127.0.0.1")])), "{name}");
        }
    }
}
