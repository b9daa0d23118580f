//! `/metrics`, on a listener of its own: whoever can connect to it reads it, so it is off unless set, and never a route of
//! a listener that people, agents or workers use.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use crate::{Error, meter};

/// The most connections at a time; further ones wait in the kernel's queue.
pub const MAX_CONNECTIONS: usize = 8;
/// How long the head of a request may take, and how long a connection may be idle.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// How long what is looked up for a scrape may take; then it goes out as it was.
pub const REFRESH_TIMEOUT: Duration = Duration::from_secs(5);

/// Brings up to date what is not counted where it happens, before it is shown.
pub type Refresh = Arc<dyn Fn() -> BoxFuture<'static, ()> + Send + Sync>;

/// Binds the listener.
///
/// # Errors
/// [`Error::Listen`].
pub async fn bind(addr: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(addr).await.map_err(|source| Error::Listen { addr, source })
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, refresh: Refresh, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        loop {
            let Ok(place) = room.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (refresh, stop) = (refresh.clone(), stop.clone());
                    tokio::spawn(async move {
                        stop.run_until_cancelled(connection(stream, refresh)).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection for metrics could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
}

async fn connection(stream: TcpStream, refresh: Refresh) {
    let service = service_fn(|request| {
        let refresh = refresh.clone();
        async move { Ok::<_, Infallible>(answer(&request, &refresh).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection for metrics ended");
    }
}

async fn answer(request: &Request<Incoming>, refresh: &Refresh) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "There is only /metrics here.\n".to_owned());
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "Metrics are read with GET.\n".to_owned());
    }
    if tokio::time::timeout(REFRESH_TIMEOUT, refresh()).await.is_err() {
        tracing::warn!("what metrics look up took too long");
    }
    match meter::text() {
        Ok(text) => plain(StatusCode::OK, text),
        Err(error) => {
            tracing::error!(%error, "the metrics cannot be written");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "The metrics cannot be written.\n".to_owned())
        }
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
