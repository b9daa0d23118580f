//! The byte stream of a connection: a peer that does not read is given up, and one that still sends when we close gets our last word.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// How long a peer may refuse to take a byte before its connection is cut.
pub const WRITE_STALL: Duration = Duration::from_secs(20);
/// How long a connection that we have closed is still read from, so that the kernel does not reset it with our answer on the way.
const LINGER: Duration = Duration::from_secs(2);
/// The most that is read then, in bytes.
const LINGER_BYTES: usize = 1024 * 1024;

/// A stream whose writes make progress.
pub struct Bounded<S> {
    inner: S,
    give_up: fn(&S),
    stalled: Option<Pin<Box<Sleep>>>,
    ended: bool,
    closing: Closing,
}

enum Closing {
    No,
    Lingering { until: Pin<Box<Sleep>>, left: usize },
    Done,
}

impl<S> Bounded<S> {
    /// Wraps `inner`. `give_up` is called before it is closed because the peer does not read.
    pub fn new(inner: S, give_up: fn(&S)) -> Self {
        Self { inner, give_up, stalled: None, ended: false, closing: Closing::No }
    }

    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.stalled.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready()) {
            true => {
                (self.give_up)(&self.inner);
                Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read"))
            }
            false => Ok(()),
        }
    }

    fn note<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
        } else if self.stalled.is_none() {
            let mut stalled = Box::pin(sleep(WRITE_STALL));
            // Registers the waker; the time has certainly not passed.
            let _ = stalled.as_mut().poll(cx);
            self.stalled = Some(stalled);
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        if buffer.filled().len() == before && buffer.remaining() > 0 {
            self.ended = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check(cx)?;
        let result = Pin::new(&mut this.inner).poll_write(cx, bytes);
        this.note(cx, result)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.check(cx)?;
        let result = Pin::new(&mut this.inner).poll_write_vectored(cx, parts);
        this.note(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.check(cx)?;
        let result = Pin::new(&mut this.inner).poll_flush(cx);
        // TCP has nothing to flush, so that this says nothing about the peer.
        if result.is_pending() { this.note(cx, result) } else { result }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            match &mut this.closing {
                Closing::No => {
                    ready!(Pin::new(&mut this.inner).poll_shutdown(cx))?;
                    this.closing = match this.ended {
                        true => Closing::Done,
                        false => Closing::Lingering { until: Box::pin(sleep(LINGER)), left: LINGER_BYTES },
                    };
                }
                Closing::Lingering { until, left } => {
                    let mut space = [0; 4096];
                    let mut buffer = ReadBuf::new(&mut space);
                    let over = until.as_mut().poll(cx).is_ready();
                    let read = Pin::new(&mut this.inner).poll_read(cx, &mut buffer);
                    *left = left.saturating_sub(buffer.filled().len());
                    match read {
                        Poll::Ready(Ok(())) if !over && *left > 0 && !buffer.filled().is_empty() => {}
                        Poll::Pending if !over => return Poll::Pending,
                        _ => this.closing = Closing::Done,
                    }
                }
                Closing::Done => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::Instant,
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_given_up() {
        let (_peer, ours) = tokio::io::duplex(16);
        let mut ours = Bounded::new(ours, |_| ());
        let started = Instant::now();
        assert_eq!(ours.write_all(&[0; 1000]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() >= WRITE_STALL && started.elapsed() < WRITE_STALL * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_peer_that_reads_is_served() {
        let (mut peer, ours) = tokio::io::duplex(16);
        let mut ours = Bounded::new(ours, |_| ());
        let writing = tokio::spawn(async move { ours.write_all(&[7; 160]).await });
        let mut read = [0; 16];
        for _ in 0..10 {
            tokio::time::sleep(WRITE_STALL - Duration::from_secs(1)).await;
            peer.read_exact(&mut read).await.unwrap();
        }
        assert!(writing.await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_still_sends_is_read_for_a_while_after_the_end() {
        let (mut peer, ours) = tokio::io::duplex(64);
        let mut ours = Bounded::new(ours, |_| ());
        let closing = tokio::spawn(async move { ours.shutdown().await });
        peer.write_all(&[0; 1000]).await.expect("it is read");
        drop(peer);
        closing.await.unwrap().unwrap();
        // One that says nothing does not hold it for long.
        let (_peer, ours) = tokio::io::duplex(64);
        let started = Instant::now();
        Bounded::new(ours, |_| ()).shutdown().await.unwrap();
        assert!(started.elapsed() >= LINGER && started.elapsed() < LINGER * 2);
    }
}
