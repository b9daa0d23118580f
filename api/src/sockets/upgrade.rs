//! The upgrade to a WebSocket: who it is, is decided before the first frame.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{HeaderMap, Response, StatusCode, header, request::Parts},
    response::IntoResponse,
};
use borealis_engine::{Error, Kind, Scope, enrollment::tokens};
use hyper_util::rt::TokioIo;
use tokio::{sync::Semaphore, time::timeout};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tower::Service;
use uuid::Uuid;

use super::{
    AGENT_LIBRARY_PATIENCE, AGENT_MESSAGE_BYTES, PING_TIMEOUT, Running,
    registry::{Agent, Person, View},
    wire::{Allowance, Guarded},
};
use crate::{
    access::{client, operator},
    errors::ApiError,
    state::App,
};

/// Upgrades that are being authenticated at once.
const AT_ONCE: usize = 64;
/// Upgrades that may wait for their turn.
const WAITING: usize = 4096;
/// How long an upgrade may wait for its turn.
const TURN: Duration = Duration::from_secs(15);
/// Open sockets of one process.
const SOCKETS: usize = 20_000;
/// How long a peer may take between our answer and the upgraded connection.
const UPGRADE: Duration = Duration::from_secs(10);

/// What a machine may say: 20 messages a second and 100 at once, and what that means in bytes of output.
const AGENT_ALLOWANCE: Allowance = Allowance {
    messages_per_s: 20.0,
    messages_burst: 100.0,
    bytes_per_s: 4.0 * 1024.0 * 1024.0,
    bytes_burst: 48.0 * 1024.0 * 1024.0,
    message_bytes: Some(AGENT_MESSAGE_BYTES as u64),
};
/// What a person's browser may say.
const PERSON_ALLOWANCE: Allowance = Allowance {
    messages_per_s: 50.0,
    messages_burst: 200.0,
    bytes_per_s: 256.0 * 1024.0,
    bytes_burst: 2.0 * 1024.0 * 1024.0,
    message_bytes: None,
};

/// The gate upgrades go through, so that ten thousand agents coming back at once meet a queue and not the database.
#[derive(Debug)]
pub struct Gate {
    turns: Semaphore,
    waiting: AtomicUsize,
}

impl Default for Gate {
    fn default() -> Self {
        Self { turns: Semaphore::new(AT_ONCE), waiting: AtomicUsize::new(0) }
    }
}

/// Who is at the other end; part of the socket's request extensions.
#[derive(Debug, Clone)]
pub enum Peer {
    /// A machine.
    Agent(Arc<Agent>),
    /// A person.
    Person(Arc<Person>),
}

/// `/socket.io/`.
pub async fn plain(State(app): State<App>, request: Request) -> Response<Body> {
    answer(&app, request).await
}

/// `/_borealis/site-workers/{worker}/socket.io/`: the same, under the prefix of a virtual worker.
pub async fn through_worker(State(app): State<App>, Path(worker): Path<String>, request: Request) -> Response<Body> {
    if Uuid::try_parse(&worker).is_err() {
        return ApiError(Error::new(Kind::NotFound, "not_found", "There is no such route.")).into_response();
    }
    answer(&app, request).await
}

async fn answer(app: &App, request: Request) -> Response<Body> {
    match upgrade(app, request).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn upgrade(app: &App, mut request: Request) -> Result<Response<Body>, ApiError> {
    let Some(running) = app.hub.running() else { return Err(busy()) };
    let key = websocket_key(&request)?;
    running.reach.admit()?;
    if running.registry.open() >= SOCKETS {
        return Err(busy());
    }
    let upgraded = hyper::upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    let peer = {
        let _turn = turn(&running.gate).await?;
        authenticate(app, &parts).await?
    };
    let mut inner = axum::http::Request::new(());
    *inner.uri_mut() = parts
        .uri
        .path_and_query()
        .map_or_else(String::new, |target| {
            // The server knows one path; the prefix of a virtual worker has done its service.
            target.query().map_or_else(|| "/socket.io/".to_owned(), |query| format!("/socket.io/?{query}"))
        })
        .parse()
        .unwrap_or_default();
    inner.extensions_mut().insert(peer.clone());

    let running = running.clone();
    tokio::spawn(async move {
        let counted = running.registry.count();
        let cut = match &peer {
            Peer::Agent(agent) => agent.cut.clone(),
            Peer::Person(person) => person.cut.clone(),
        };
        match timeout(UPGRADE, upgraded).await {
            Ok(Ok(stream)) => serve(&running, &peer, TokioIo::new(stream), inner, &cut, counted),
            Ok(Err(error)) => {
                tracing::debug!(%error, "an upgrade was not completed");
            }
            Err(_) => {}
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, header::HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, derive_accept_key(key.as_bytes()).parse().map_err(Error::bug)?);
    Ok(response)
}

fn serve(
    running: &Arc<Running>,
    peer: &Peer,
    stream: TokioIo<hyper::upgrade::Upgraded>,
    request: axum::http::Request<()>,
    cut: &CancellationToken,
    counted: super::registry::Counted,
) {
    let server = match peer {
        Peer::Agent(agent) => {
            running.registry.admit(agent);
            &running.agents_service
        }
        Peer::Person(_) => &running.people_service,
    };
    let (allowance, heard) = match peer {
        Peer::Agent(agent) => (AGENT_ALLOWANCE, agent.heard.clone()),
        Peer::Person(_) => (PERSON_ALLOWANCE, Arc::default()),
    };
    let mut stream = Guarded::new(stream, allowance, cut, heard);
    if matches!(peer, Peer::Agent(_)) {
        stream = stream.announcing(millis(AGENT_LIBRARY_PATIENCE), millis(PING_TIMEOUT));
    }
    let closed = CancellationToken::new();
    let stream = Watched { stream, _closed: closed.clone().drop_guard(), _counted: counted };
    // Accepts by starting a task of its own; whether the request was one it understands shows in the stream being dropped.
    let _accepted = server.clone().call((stream, request));
    if let Peer::Agent(agent) = peer {
        let (registry, agent) = (running.registry.clone(), agent.clone());
        tokio::spawn(async move {
            agent.watch(&closed).await;
            registry.remove(&agent);
        });
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A stream that says when it is dropped.
struct Watched<S> {
    stream: Guarded<S>,
    _closed: tokio_util::sync::DropGuard,
    _counted: super::registry::Counted,
}

impl<S: tokio::io::AsyncRead + Unpin> tokio::io::AsyncRead for Watched<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: tokio::io::AsyncWrite + Unpin> tokio::io::AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn busy() -> ApiError {
    // Spread, because agents of the reference do not spread themselves.
    let seconds = rand::random_range(1..=10);
    ApiError(Error::new(Kind::Unavailable, "sockets_busy", "Too many connect at once; try again.").retry_after(seconds))
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn turn(gate: &Gate) -> Result<tokio::sync::SemaphorePermit<'_>, ApiError> {
    let waiting = Waiting(&gate.waiting);
    if gate.waiting.fetch_add(1, Ordering::Relaxed) >= WAITING {
        return Err(busy());
    }
    let turn = timeout(TURN, gate.turns.acquire()).await;
    drop(waiting);
    turn.map_err(|_| busy())?.map_err(|_| busy())
}

/// The key of a WebSocket upgrade (RFC 6455, 4.2.1) of Engine.IO 4 without a session.
fn websocket_key(request: &Request) -> Result<String, ApiError> {
    let headers = request.headers();
    let names = |name: header::HeaderName, value: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|text| text.to_str().ok())
            .flat_map(|text| text.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(value))
    };
    let query = request.uri().query().unwrap_or_default();
    let has = |name: &str, value: &str| query.split('&').any(|pair| pair.split_once('=') == Some((name, value)));
    let key = headers.get(header::SEC_WEBSOCKET_KEY).and_then(|key| key.to_str().ok()).filter(|key| key.len() == 24);
    let fits = request.method() == axum::http::Method::GET
        && names(header::UPGRADE, "websocket")
        && names(header::CONNECTION, "upgrade")
        && headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == "13")
        && has("EIO", "4")
        && has("transport", "websocket")
        && !query.split('&').any(|pair| pair.starts_with("sid="));
    key.filter(|_| fits).map(str::to_owned).ok_or_else(|| {
        ApiError(Error::invalid("websocket_required", "This route takes WebSocket upgrades with EIO=4 and transport=websocket."))
    })
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

async fn authenticate(app: &App, parts: &Parts) -> Result<Peer, ApiError> {
    let bearer = bearer(&parts.headers);
    // A device's token is a JWT, an operator's is one opaque word.
    if let Some(token) = bearer.filter(|token| token.bytes().filter(|byte| *byte == b'.').count() == 2) {
        let device = tokens::authenticate(&app.pool, &app.keys, token).await.map_err(|error| as_401(error.into()))?;
        if device.status != "active" {
            return Err(as_401(Error::new(Kind::Unauthenticated, "device_quarantined", "This device may not connect.").into()));
        }
        let address = client::client_ip(parts).map(|ip| ip.to_string()).unwrap_or_default();
        let agent = Agent::new(device.guid, device.token_version, device.site_id, address, CancellationToken::new());
        return Ok(Peer::Agent(Arc::new(agent)));
    }
    if !origin_fits(&app.settings.public_base_url, &parts.headers, bearer.is_none()) {
        return Err(as_401(Error::new(Kind::Unauthenticated, "bad_origin", "The Origin is not this engine's.").into()));
    }
    let operator = operator::authenticate(app, parts, None).await.map_err(as_401)?;
    let session = operator.session().map_err(as_401)?.id;
    let view = View {
        admin: operator.is_admin(),
        sites: match &operator.scope {
            Scope::All => Vec::new(),
            Scope::Sites(sites) => sites.clone(),
        },
    };
    Ok(Peer::Person(Arc::new(Person::new(session, operator.user_id, view, CancellationToken::new()))))
}

/// Whoever is not known or not welcome is answered 401 at the upgrade (settled: agent tokens); trouble of ours stays 503.
fn as_401(ApiError(mut error): ApiError) -> ApiError {
    if !matches!(error.kind, Kind::Unavailable | Kind::Limited | Kind::Bug) {
        error.kind = Kind::Unauthenticated;
    }
    ApiError(error)
}

/// A browser says where its page comes from, and sends cookies for any page: with a cookie the Origin must be there and ours.
fn origin_fits(base: &url::Url, headers: &HeaderMap, required: bool) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return !required };
    origin.to_str().is_ok_and(|origin| client::own_origin(base, headers, origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(query: &str, headers: &[(&str, &str)]) -> Request {
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = format!("/socket.io/?{query}").parse().unwrap();
        for (name, value) in headers {
            request.headers_mut().append(header::HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        request
    }

    const GOOD: [(&str, &str); 4] = [
        ("upgrade", "websocket"),
        ("connection", "keep-alive, Upgrade"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    #[test]
    fn only_a_plain_websocket_upgrade_is_taken() {
        assert!(websocket_key(&request("EIO=4&transport=websocket", &GOOD)).is_ok());
        for query in ["", "EIO=3&transport=websocket", "EIO=4&transport=polling", "EIO=4&transport=websocket&sid=x"] {
            assert!(websocket_key(&request(query, &GOOD)).is_err(), "{query}");
        }
        for missing in 0..GOOD.len() {
            let headers: Vec<_> =
                GOOD.into_iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, header)| header).collect();
            assert!(websocket_key(&request("EIO=4&transport=websocket", &headers)).is_err(), "{missing}");
        }
    }

    #[test]
    fn a_foreign_page_does_not_get_in_with_a_cookie() {
        let base = url::Url::parse("https://engine.example:8443/").unwrap();
        let fits = |origin: Option<&str>, required| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, "10.0.0.5:8443".parse().unwrap());
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().unwrap());
            }
            origin_fits(&base, &headers, required)
        };
        assert!(fits(Some("https://engine.example:8443"), true));
        assert!(fits(Some("https://10.0.0.5:8443"), true), "the host that the request was sent to, as for requests over REST");
        assert!(fits(None, false));
        assert!(!fits(None, true));
        for foreign in [
            "https://engine.example",
            "http://engine.example:8443",
            "http://10.0.0.5:8443",
            "https://10.0.0.5",
            "https://evil.example",
            "null",
            "",
            "https://engine.example:8443.evil.example",
        ] {
            assert!(!fits(Some(foreign), true), "{foreign}");
            assert!(!fits(Some(foreign), false), "{foreign}");
        }
    }
}
