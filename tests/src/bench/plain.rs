//! The plainest programs that do the same kind of work, run as processes of their own beside the engine: a TCP echo and an
//! HTTP route with nothing behind it.

use std::{net::Ipv4Addr, time::Duration};

use axum::{Router, routing::get};
use futures::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use url::Url;

use crate::{Child, Processes, eventually, processes::free_port};

/// Which program this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Plain {
    /// Sends back what comes.
    Echo,
    /// Answers `GET /` with nothing.
    Empty,
}

/// Connects under way at once.
const CONNECTING: usize = 256;

/// Serves for ever.
pub async fn serve(plain: Plain, port: u16) {
    borealis_api::serve::raise_open_files();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("a free port");
    match plain {
        Plain::Empty => axum::serve(listener, Router::new().route("/", get(async || ()))).await.expect("a server"),
        Plain::Echo => loop {
            if let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(echo(stream));
            }
        },
    }
}

async fn echo(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut buffer = [0; 2048];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        let Some(bytes) = buffer.get(..read) else { return };
        if stream.write_all(bytes).await.is_err() {
            return;
        }
    }
}

async fn start(processes: &mut Processes, plain: &str) -> (Child, u16) {
    let port = free_port();
    let child = processes.start("borealis-bench", &["plain", plain, &port.to_string()]);
    eventually("the plain program listens", Duration::from_secs(10), async || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()
    })
    .await;
    (child, port)
}

/// Starts the empty route; its URL.
pub async fn empty_route(processes: &mut Processes) -> (Child, Url) {
    let (child, port) = start(processes, "empty").await;
    (child, Url::parse(&format!("http://127.0.0.1:{port}/")).expect("a URL"))
}

/// What a plain TCP echo did.
#[derive(Debug, Clone, Copy)]
pub struct Echo {
    /// Connections a second, each with one message there and back.
    pub accepts_per_s: f64,
    /// How long one message there and back on every connection took.
    pub round: Duration,
}

/// Opens so many connections to a plain TCP echo, then sends a message of `bytes` there and back on each.
///
/// # Panics
/// When they cannot be opened.
pub async fn tcp_echo(processes: &mut Processes, connections: usize, bytes: usize) -> Echo {
    let (_child, port) = start(processes, "echo").await;
    let began = Instant::now();
    let open = (0..connections).map(|_| async move {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("a connection");
        stream.set_nodelay(true).expect("an option");
        there_and_back(&mut stream, 64).await;
        stream
    });
    let mut streams: Vec<TcpStream> = stream::iter(open).buffer_unordered(CONNECTING).collect().await;
    let accepts_per_s = super::per_second(connections, began.elapsed());
    let began = Instant::now();
    stream::iter(streams.iter_mut()).for_each_concurrent(None, async |stream| there_and_back(stream, bytes).await).await;
    Echo { accepts_per_s, round: began.elapsed() }
}

async fn there_and_back(stream: &mut TcpStream, bytes: usize) {
    let message = vec![b'x'; bytes];
    let mut answer = vec![0; bytes];
    stream.write_all(&message).await.expect("a message");
    stream.read_exact(&mut answer).await.expect("its echo");
}
