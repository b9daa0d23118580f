//! One request on one connection: what a machine that reports twice a minute does, and all it needs.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use url::Url;

/// How long a request may take.
const LIMIT: Duration = Duration::from_secs(30);
/// The longest answer that is read, in bytes.
const ANSWER_BYTES: u64 = 64 * 1024;

/// Host and port of a base URL.
pub fn target(base: &Url) -> io::Result<(&str, u16)> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "a base URL is http with host");
    Ok((base.host_str().ok_or_else(wrong)?, base.port_or_known_default().ok_or_else(wrong)?))
}

/// POSTs JSON; status and body of the answer.
pub async fn post(base: &Url, path: &str, bearer: Option<&str>, body: &str) -> io::Result<(u16, Vec<u8>)> {
    timeout(LIMIT, exchange(base, path, bearer, body)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn exchange(base: &Url, path: &str, bearer: Option<&str>, body: &str) -> io::Result<(u16, Vec<u8>)> {
    let (host, port) = target(base)?;
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    let authorization = bearer.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         X-Borealis-Agent-Context: SYSTEM\r\n{authorization}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(1024);
    stream.take(ANSWER_BYTES).read_to_end(&mut answer).await?;
    parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.lines().next()?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.get(end + 4..)?.to_vec()))
}
