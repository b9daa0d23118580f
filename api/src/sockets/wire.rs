//! The byte stream under a socket: it can be cut from outside, it slows a peer that says too much, and it does not wait
//! for ever for one that does not listen.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// How long a peer may refuse to take a byte before its socket is cut.
pub const WRITE_STALL: Duration = Duration::from_secs(60);
/// The longest single pause of a peer that says too much; what it still owes is paid at its next read.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How much a peer may say.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// WebSocket frames a second, in the long run.
    pub frames_per_s: f64,
    /// Frames at once.
    pub frames_burst: f64,
    /// Bytes a second, in the long run.
    pub bytes_per_s: f64,
    /// Bytes at once.
    pub bytes_burst: f64,
}

/// A bucket that may be overdrawn; the debt is waited for.
#[derive(Debug)]
struct Bucket {
    per_s: f64,
    burst: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_s: f64, burst: f64, now: Instant) -> Self {
        Self { per_s, burst, level: burst, at: now }
    }

    /// Takes `amount` and answers how long to wait until nothing is owed.
    fn take(&mut self, amount: f64, now: Instant) -> Duration {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.per_s;
        self.at = now;
        self.level = (self.level + gained).min(self.burst) - amount;
        if self.level >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64((-self.level / self.per_s).min(3600.0)) }
    }
}

/// Counts the WebSocket frames in a client's bytes (RFC 6455, 5.2).
#[derive(Debug, Default)]
struct Frames {
    header: [u8; 14],
    have: usize,
    payload_left: u64,
}

impl Frames {
    fn count(&mut self, mut bytes: &[u8]) -> u32 {
        let mut frames = 0;
        while let Some((&byte, rest)) = bytes.split_first() {
            if self.payload_left > 0 {
                let skipped = bytes.len().min(usize::try_from(self.payload_left).unwrap_or(usize::MAX));
                self.payload_left -= skipped as u64;
                bytes = bytes.get(skipped..).unwrap_or_default();
                continue;
            }
            if let Some(slot) = self.header.get_mut(self.have) {
                *slot = byte;
            }
            self.have += 1;
            bytes = rest;
            if self.have < 2 {
                continue;
            }
            let [_, second, h2, h3, h4, h5, h6, h7, h8, h9, ..] = self.header;
            let (length_bytes, length) = match second & 0x7f {
                126 => (2, u64::from(u16::from_be_bytes([h2, h3]))),
                127 => (8, u64::from_be_bytes([h2, h3, h4, h5, h6, h7, h8, h9])),
                short => (0, u64::from(short)),
            };
            let mask_bytes = if second & 0x80 == 0 { 0 } else { 4 };
            if self.have == 2 + length_bytes + mask_bytes {
                frames += 1;
                self.payload_left = length;
                self.have = 0;
            }
        }
        frames
    }
}

/// The stream of one socket.
pub struct Guarded<S> {
    inner: S,
    frames: Frames,
    frame_bucket: Bucket,
    byte_bucket: Bucket,
    pause: Option<Pin<Box<Sleep>>>,
    stalled: Option<Pin<Box<Sleep>>>,
    // One each, because a future remembers one waker and reader and writer are two tasks.
    cut_read: Pin<Box<WaitForCancellationFutureOwned>>,
    cut_write: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Guarded<S> {
    /// Guards `inner`; cancelling `cut` closes it.
    pub fn new(inner: S, allowance: Allowance, cut: &CancellationToken) -> Self {
        let now = Instant::now();
        Self {
            inner,
            frames: Frames::default(),
            frame_bucket: Bucket::new(allowance.frames_per_s, allowance.frames_burst, now),
            byte_bucket: Bucket::new(allowance.bytes_per_s, allowance.bytes_burst, now),
            pause: None,
            stalled: None,
            cut_read: Box::pin(cut.clone().cancelled_owned()),
            cut_write: Box::pin(cut.clone().cancelled_owned()),
        }
    }

    /// Whether writing is over: cut from outside, or the peer has not taken a byte for too long.
    fn write_ended(&mut self, cx: &mut Context<'_>) -> Option<io::Error> {
        if self.cut_write.as_mut().poll(cx).is_ready() {
            return Some(io::ErrorKind::BrokenPipe.into());
        }
        let stalled = self.stalled.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready());
        stalled.then(|| io::ErrorKind::TimedOut.into())
    }

    fn note_progress<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stalled = None;
        } else if self.stalled.is_none() {
            let mut sleep = Box::pin(tokio::time::sleep(WRITE_STALL));
            // Registers the waker; the time has certainly not passed.
            let _ = sleep.as_mut().poll(cx);
            self.stalled = Some(sleep);
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.cut_read.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        if let Some(pause) = &mut this.pause {
            std::task::ready!(pause.as_mut().poll(cx));
            this.pause = None;
        }
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
        let read = buffer.filled().get(before..).unwrap_or_default();
        let now = Instant::now();
        let frames = this.frames.count(read);
        let wait =
            this.frame_bucket.take(f64::from(frames), now).max(this.byte_bucket.take(read.len() as f64, now)).min(LONGEST_PAUSE);
        if !wait.is_zero() {
            this.pause = Some(Box::pin(tokio::time::sleep(wait)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Some(error) = this.write_ended(cx) {
            return Poll::Ready(Err(error));
        }
        let result = Pin::new(&mut this.inner).poll_write(cx, bytes);
        this.note_progress(cx, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(error) = this.write_ended(cx) {
            return Poll::Ready(Err(error));
        }
        let result = Pin::new(&mut this.inner).poll_flush(cx);
        this.note_progress(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const FREE: Allowance = Allowance { frames_per_s: 1e9, frames_burst: 1e9, bytes_per_s: 1e9, bytes_burst: 1e9 };

    fn frame(length: usize) -> Vec<u8> {
        let mut bytes = vec![0x81];
        match length {
            0..=125 => bytes.push(0x80 | length as u8),
            126..=65_535 => {
                bytes.push(0x80 | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(0x80 | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend([1, 2, 3, 4]);
        bytes.resize(bytes.len() + length, b'x');
        bytes
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let all: Vec<u8> = [0, 1, 125, 126, 127, 65_535, 65_536, 0, 3].iter().flat_map(|length| frame(*length)).collect();
        for piece in [1, 2, 3, 7, 4096, all.len()] {
            let mut frames = Frames::default();
            assert_eq!(all.chunks(piece).map(|bytes| frames.count(bytes)).sum::<u32>(), 9, "pieces of {piece}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_too_much_is_slowed() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let allowance = Allowance { frames_per_s: 20.0, frames_burst: 100.0, ..FREE };
        let mut ours = Guarded::new(ours, allowance, &CancellationToken::new());
        let bytes: Vec<u8> = (0..300).flat_map(|_| frame(3)).collect();
        peer.write_all(&bytes).await.unwrap();
        let started = Instant::now();
        let mut read = vec![0; bytes.len()];
        for piece in read.chunks_mut(frame(3).len()) {
            ours.read_exact(piece).await.unwrap();
        }
        let seconds = started.elapsed().as_secs_f64();
        assert!((9.0..11.0).contains(&seconds), "200 frames over the burst take 10 s, took {seconds}");
        assert_eq!(read, bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_stream_ends_for_reader_and_writer() {
        let (_peer, ours) = tokio::io::duplex(16);
        let cut = CancellationToken::new();
        let (mut reader, mut writer) = tokio::io::split(Guarded::new(ours, FREE, &cut));
        let reading = tokio::spawn(async move { reader.read(&mut [0; 8]).await });
        let writing = tokio::spawn(async move { writer.write_all(&[0; 1000]).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!reading.is_finished() && !writing.is_finished());
        cut.cancel();
        assert_eq!(reading.await.unwrap().unwrap(), 0);
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_listen_is_given_up() {
        let (_peer, ours) = tokio::io::duplex(16);
        let mut ours = Guarded::new(ours, FREE, &CancellationToken::new());
        let started = Instant::now();
        assert_eq!(ours.write_all(&[0; 1000]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() >= WRITE_STALL);
    }
}
