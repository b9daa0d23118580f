//! A socket as an agent or a browser opens it, frame by frame.

use std::time::Duration;

use borealis_protocol::framing::{self, Frame};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest},
};

/// How long a test waits for something to come.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// An open Socket.IO connection in the default namespace.
#[derive(Debug)]
pub struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    next_ack: u64,
}

/// Opens the WebSocket at `path` of `addr` with these headers; the status when it is refused.
///
/// # Errors
/// The HTTP status of a refusal.
pub async fn open(addr: std::net::SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Socket, u16> {
    let mut request = format!("ws://{addr}{path}?EIO=4&transport=websocket").into_client_request().expect("a request");
    for (name, value) in headers {
        let name = tungstenite::http::HeaderName::try_from(*name).expect("a header name");
        request.headers_mut().insert(name, value.parse().expect("a header value"));
    }
    opened(tokio_tungstenite::connect_async(request).await.map(|(stream, _)| stream)).await
}

/// Opens an agent's socket below a `wss://` URL whose certificate one of these authorities has signed.
///
/// # Errors
/// The HTTP status of a refusal.
pub async fn open_agent_over_tls(base: &str, roots: &rustls::RootCertStore, token: &str) -> Result<Socket, u16> {
    let mut request = format!("{base}/socket.io/?EIO=4&transport=websocket").into_client_request().expect("a request");
    for (name, value) in [("authorization", format!("Bearer {token}")), ("x-borealis-agent-context", "SYSTEM".into())] {
        request.headers_mut().insert(name, value.parse().expect("a header value"));
    }
    let tls = rustls::ClientConfig::builder().with_root_certificates(roots.clone()).with_no_client_auth();
    let tls = Some(tokio_tungstenite::Connector::Rustls(std::sync::Arc::new(tls)));
    let connected = tokio_tungstenite::connect_async_tls_with_config(request, None, false, tls).await;
    opened(connected.map(|(stream, _)| stream)).await
}

async fn opened(connected: tungstenite::Result<WebSocketStream<MaybeTlsStream<TcpStream>>>) -> Result<Socket, u16> {
    match connected {
        Ok(stream) => {
            let mut socket = Socket { stream, next_ack: 0 };
            assert!(matches!(socket.frame().await, Some(Frame::Open(_))), "an open packet comes first");
            socket.send(&Frame::Connect(None)).await;
            assert!(matches!(socket.frame().await, Some(Frame::Connect(_))), "the namespace is accepted");
            Ok(socket)
        }
        Err(tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
        Err(error) => panic!("the socket cannot be opened: {error}"),
    }
}

/// Opens an agent's socket where there may be nobody: what [`open_agent`] would panic about is an error here.
///
/// # Errors
/// With the reason, when there is no socket after [`PATIENCE`].
pub async fn try_open_agent(addr: std::net::SocketAddr, token: &str) -> Result<Socket, String> {
    let mut request = format!("ws://{addr}/socket.io/?EIO=4&transport=websocket").into_client_request().expect("a request");
    for (name, value) in [("authorization", format!("Bearer {token}")), ("x-borealis-agent-context", "SYSTEM".into())] {
        request.headers_mut().insert(name, value.parse().expect("a header value"));
    }
    let opening = async {
        let (stream, _) = tokio_tungstenite::connect_async(request).await.map_err(|error| error.to_string())?;
        let mut socket = Socket { stream, next_ack: 0 };
        let opened = socket.next().await;
        socket.send(&Frame::Connect(None)).await;
        match (opened, socket.next().await) {
            (Some(Frame::Open(_)), Some(Frame::Connect(_))) => Ok(socket),
            other => Err(format!("refused: {other:?}")),
        }
    };
    tokio::time::timeout(PATIENCE, opening).await.map_err(|_| "no answer".to_owned())?
}

/// Opens an agent's socket with its access token.
///
/// # Errors
/// The HTTP status of a refusal.
pub async fn open_agent(addr: std::net::SocketAddr, token: &str) -> Result<Socket, u16> {
    open(addr, "/socket.io/", &[("authorization", &format!("Bearer {token}")), ("x-borealis-agent-context", "SYSTEM")]).await
}

impl Socket {
    /// Writes one frame.
    pub async fn send(&mut self, frame: &Frame) {
        let _ = self.stream.send(Message::text(framing::encode(frame))).await;
    }

    /// Writes a text as it is.
    pub async fn raw(&mut self, text: &str) {
        let _ = self.stream.send(Message::text(text)).await;
    }

    /// The next frame, pings answered and left out; none when the connection is closed.
    ///
    /// # Panics
    /// When nothing comes for [`PATIENCE`].
    pub async fn frame(&mut self) -> Option<Frame> {
        tokio::time::timeout(PATIENCE, self.next()).await.expect("a frame, or the end")
    }

    /// As [`Self::frame`], for as long as it takes. Nothing is lost when it is cut off.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            match self.stream.next().await? {
                Ok(Message::Text(text)) => match framing::decode(&text).expect("a frame") {
                    Frame::Ping(payload) => self.send(&Frame::Pong(payload)).await,
                    frame => return Some(frame),
                },
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Sends an event that needs no answer.
    pub async fn emit(&mut self, name: &str, payload: Value) {
        self.send(&Frame::Event { id: None, name: name.into(), args: vec![payload] }).await;
    }

    /// Sends an event and waits for its answer; events that come in between are lost.
    pub async fn call(&mut self, name: &str, payload: Value) -> Value {
        self.next_ack += 1;
        let wanted = self.next_ack;
        self.send(&Frame::Event { id: Some(wanted), name: name.into(), args: vec![payload] }).await;
        loop {
            match self.frame().await.expect("an answer before the end") {
                Frame::Ack { id, args } if id == wanted => return args.into_iter().next().unwrap_or_default(),
                _ => {}
            }
        }
    }

    /// As [`Self::call`], for who may be left without an answer: none when none comes for `time`, or the connection ends.
    pub async fn ask(&mut self, name: &str, payload: Value, time: Duration) -> Option<Value> {
        self.next_ack += 1;
        let wanted = self.next_ack;
        self.send(&Frame::Event { id: Some(wanted), name: name.into(), args: vec![payload] }).await;
        let answer = async {
            loop {
                match self.next().await? {
                    Frame::Ack { id, args } if id == wanted => return args.into_iter().next(),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(time, answer).await.ok().flatten()
    }

    /// The name and first argument of the next event; none when the connection is closed.
    pub async fn any_event(&mut self) -> Option<(String, Value)> {
        loop {
            if let Frame::Event { name, args, .. } = self.next().await? {
                return Some((name, args.into_iter().next().unwrap_or_default()));
            }
        }
    }

    /// The first argument of the next event of that name; other events are left out.
    pub async fn event(&mut self, wanted: &str) -> Value {
        loop {
            match self.frame().await.unwrap_or_else(|| panic!("{wanted} before the end")) {
                Frame::Event { name, args, .. } if name == wanted => return args.into_iter().next().unwrap_or_default(),
                _ => {}
            }
        }
    }

    /// Whether no event of that name comes for `time`.
    pub async fn silent(&mut self, unwanted: &str, time: Duration) -> bool {
        let heard = tokio::time::timeout(time, async {
            loop {
                match self.frame().await {
                    Some(Frame::Event { name, .. }) if name == unwanted => return,
                    Some(_) => {}
                    None => std::future::pending().await,
                }
            }
        });
        heard.await.is_err()
    }

    /// Waits until the engine has closed the connection.
    pub async fn closed(mut self) {
        let ended = tokio::time::timeout(PATIENCE, async { while self.frame().await.is_some() {} }).await;
        assert!(ended.is_ok(), "the engine should close the connection");
    }

    /// Registers as an agent; the engine's answer.
    pub async fn hello(&mut self, agent_id: &str, capabilities: Value) -> Value {
        let hello = json!({"agent_id": agent_id, "service_mode": "system", "hostname": "host", "capabilities": capabilities});
        self.call("connect_agent", hello).await
    }
}
