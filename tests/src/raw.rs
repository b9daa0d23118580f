//! HTTP by hand, for what a proper client refuses to send.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::Reply;

/// Sends `request` as it is and reads until the engine closes or falls silent. The request should say `Connection: close`.
///
/// # Panics
/// When there is no answer within 40 s.
pub async fn send(addr: SocketAddr, request: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    // The engine may answer and close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(Ok(read @ 1..)) = timeout(Duration::from_secs(40), stream.read(&mut buffer)).await {
        answer.extend_from_slice(&buffer[..read]);
    }
    parse(&String::from_utf8_lossy(request), &String::from_utf8_lossy(&answer))
}

/// `METHOD target` with headers and no body, the target exactly as given.
pub async fn request(addr: SocketAddr, method: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    send(addr, text.as_bytes()).await
}

/// The first answer in `bytes`, once all of it is there as its `Content-Length` says.
#[must_use]
pub fn whole(bytes: &[u8]) -> Option<Reply> {
    let text = String::from_utf8_lossy(bytes);
    let (_, body) = text.split_once("\r\n\r\n")?;
    let reply = parse("", &text);
    let length = reply.header("content-length")?.parse::<usize>().ok()?;
    (body.len() >= length).then_some(reply)
}

fn parse(request: &str, answer: &str) -> Reply {
    let request = request.lines().next().unwrap_or_default().to_owned();
    let (head, text) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{request}: no answer, but {answer:?}"));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or_default();
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Reply::new(request, status, headers, text.to_owned())
}
