//! Connections, each within bounds: how many there are, together and from one address, how long a head may take, how long a peer may
//! refuse to read, and what happens to a body that nobody reads.

mod body;
mod peers;
mod stream;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::ConnectInfo};
use hyper::{body::Incoming, header, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::access::{client::ClientIp, proxies::TrustedProxies};
use peers::Peers;
pub use stream::WRITE_STALL;

/// Plain HTTP connections one listener serves at a time; further ones wait in the kernel's queue. A connection that
/// became a socket no longer counts.
pub const MAX_CONNECTIONS: usize = 8192;
/// How long the head of a request may take, in seconds. Also ends idle kept-alive connections.
pub const HEAD_TIMEOUT_S: u64 = 30;
/// The head of a request, in bytes. Its lines are at most 100, hyper's own limit.
pub const MAX_HEAD_BYTES: usize = 64 * 1024;
/// How long requests in flight may still take after a shutdown began, in seconds.
pub const DRAIN_S: u64 = 10;
/// The most that the kernel keeps for a peer that does not acknowledge, in bytes; it may take less.
const SEND_BUFFER: usize = 512 * 1024;
/// The most that waits in the kernel to be sent, in bytes. A peer that does not read is held to this, and one that does is not slowed:
/// what is on its way does not count.
const UNSENT: u32 = 64 * 1024;
/// Who may connect to a listener, and what of their word is believed.
#[derive(Debug, Clone, Default)]
pub struct Door {
    /// The proxies whose `X-Forwarded-For` is believed. Their connections are not counted.
    pub proxies: Arc<TrustedProxies>,
    /// The most connections from one address; none: any number.
    pub per_address: Option<u32>,
}

/// Serves the connections of a listener until `shutdown`, and then those that are left for [`DRAIN_S`].
pub async fn accept(listener: Arc<TcpListener>, router: Router, door: Door, shutdown: CancellationToken) {
    let peers = Peers::new(door.per_address);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, peer)) => {
                    bound_unsent(&stream);
                    let trusted = door.proxies.trusts(peer.ip().to_canonical());
                    match peers.enter((!trusted).then(|| peer.ip())) {
                        Some(place) => {
                            let connection = connection(stream, peer, router.clone(), Arc::clone(&door.proxies), shutdown.clone());
                            connections.spawn(async move {
                                connection.await;
                                drop(place);
                            });
                        }
                        None => {
                            tracing::debug!(%peer, "too many connections from this address");
                            connections.spawn(turn_away(stream));
                        }
                    }
                }
                // Out of file descriptors, most likely: the loop must not spin on it.
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    let drained = timeout(Duration::from_secs(DRAIN_S), async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(connections = connections.len(), "connections cut at shutdown");
    }
}

/// The answer to an address that has too many connections.
fn too_many() -> String {
    let body = serde_json::json!({
        "error": "too_many_connections",
        "message": "Too many connections are open from this address.",
    })
    .to_string();
    let length = body.len();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
}

/// Bounds what waits in the kernel for a peer that does not read. Set on each connection: one that came before the listener was
/// first asked would inherit nothing from it.
fn bound_unsent(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    if let Err(error) = socket.set_send_buffer_size(SEND_BUFFER).and_then(|()| socket.set_tcp_notsent_lowat(UNSENT)) {
        tracing::debug!(%error, "what waits to be sent is not bounded");
    }
}

/// Sends the reason and closes, without waiting for the peer.
async fn turn_away(mut stream: TcpStream) {
    let _ = timeout(Duration::from_millis(100), stream.write_all(too_many().as_bytes())).await;
}

/// Has the kernel forget at once what a peer did not take, which it would else keep and offer for minutes.
fn reset(stream: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "a connection cannot be reset");
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    proxies: Arc<TrustedProxies>,
    shutdown: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let forwarded = request.headers().get_all("x-forwarded-for").iter().map(|value| value.to_str().unwrap_or("?"));
        let client = ClientIp(proxies.client(peer.ip(), forwarded));
        request.extensions_mut().insert(client);
        request.extensions_mut().insert(ConnectInfo(peer));
        let router = router.clone();
        async move {
            let waits = request.headers().contains_key(header::EXPECT);
            let (parts, incoming) = request.into_parts();
            let (body, rest) = body::lend(incoming);
            let Ok(mut response) = router.oneshot(hyper::Request::from_parts(parts, Body::new(body))).await;
            if !rest.read_on(waits).await {
                response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(HEAD_TIMEOUT_S))
        .max_header_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream::Bounded::new(stream, reset)), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_answer_to_too_many_connections_is_whole() {
        let text = super::too_many();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())), "{head}");
        assert!(head.lines().all(|line| !line.starts_with(' ')), "{head}");
        assert!(serde_json::from_str::<serde_json::Value>(body).is_ok());
    }
}
