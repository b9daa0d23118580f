//! The byte stream under a socket: it can be cut from outside, it slows a peer that says too much, it notes when a peer was last
//! heard, and it does not wait for ever for one that does not listen.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::frames::Frames;

/// How long a peer may refuse to take a byte before its socket is cut.
pub const WRITE_STALL: Duration = Duration::from_secs(60);
/// The longest single pause of a peer that says too much; what it still owes is paid at its next read.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What a frame costs beside its bytes, so that empty frames are not free.
const FRAME_BYTES: f64 = 64.0;
/// Bytes read at once.
const READ_BYTES: usize = 4096;

/// How much a peer may say.
#[derive(Debug, Clone, Copy)]
pub struct Allowance {
    /// WebSocket messages a second, in the long run. A message that is sent in several frames is one.
    pub messages_per_s: f64,
    /// Messages at once.
    pub messages_burst: f64,
    /// Bytes a second, in the long run.
    pub bytes_per_s: f64,
    /// Bytes at once.
    pub bytes_burst: f64,
    /// The most bytes of one message: a longer one is shortened, or ends the socket. None when something else keeps the limit.
    pub message_bytes: Option<u64>,
}

/// The most answers that a peer is expected to give: those that never came are no allowance for ever.
const ASKED_MAX: u32 = 64;

/// When a peer was last heard. Any byte counts: an answer to a ping cannot be sent inside a long message.
#[derive(Debug)]
pub struct Heard {
    opened: Instant,
    after_ms: AtomicU64,
    /// Answers that are to come.
    asked: AtomicU32,
}

impl Default for Heard {
    fn default() -> Self {
        Self { opened: Instant::now(), after_ms: AtomicU64::new(0), asked: AtomicU32::new(0) }
    }
}

impl Heard {
    fn note(&self, now: Instant) {
        let after = now.saturating_duration_since(self.opened).as_millis();
        self.after_ms.store(u64::try_from(after).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The peer is asked something: one message of it does not count against its rate.
    pub fn ask(&self) {
        let _ = self.asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |asked| (asked < ASKED_MAX).then_some(asked + 1));
    }

    /// How many of these messages the peer was asked for.
    fn answers(&self, messages: u32) -> u32 {
        let before = self.asked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |asked| Some(asked.saturating_sub(messages)));
        before.map_or(0, |asked| asked.min(messages))
    }

    /// When the last byte came; when it was opened, before the first.
    pub fn last(&self) -> Instant {
        self.opened + Duration::from_millis(self.after_ms.load(Ordering::Relaxed))
    }
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

/// The stream of one socket.
pub struct Guarded<S> {
    inner: S,
    frames: Frames,
    /// What has been read and did not fit into the reader's buffer.
    ready: Vec<u8>,
    heard: Arc<Heard>,
    opening: Option<Opening>,
    message_bucket: Bucket,
    byte_bucket: Bucket,
    pause: Option<Pin<Box<Sleep>>>,
    stalled: Option<Pin<Box<Sleep>>>,
    // One each, because a future remembers one waker and reader and writer are two tasks.
    cut_read: Pin<Box<WaitForCancellationFutureOwned>>,
    cut_write: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Guarded<S> {
    /// Guards `inner`; cancelling `cut` closes it. What is read is noted in `heard`.
    pub fn new(inner: S, allowance: Allowance, cut: &CancellationToken, heard: Arc<Heard>) -> Self {
        let now = Instant::now();
        Self {
            inner,
            frames: Frames::new(allowance.message_bytes),
            ready: Vec::new(),
            heard,
            opening: None,
            message_bucket: Bucket::new(allowance.messages_per_s, allowance.messages_burst, now),
            byte_bucket: Bucket::new(allowance.bytes_per_s, allowance.bytes_burst, now),
            pause: None,
            stalled: None,
            cut_read: Box::pin(cut.clone().cancelled_owned()),
            cut_write: Box::pin(cut.clone().cancelled_owned()),
        }
    }

    /// Tells the client another ping timeout than the one the library was given, in milliseconds: the library is told to wait
    /// far longer, because the silence of an agent is judged elsewhere.
    pub fn announcing(mut self, library_ms: u64, told_ms: u64) -> Self {
        self.opening = Some(Opening::new(library_ms, told_ms));
        self
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
        loop {
            if !this.ready.is_empty() {
                let fits = this.ready.len().min(buffer.remaining());
                let rest = this.ready.split_off(fits);
                buffer.put_slice(&this.ready);
                this.ready = rest;
                return Poll::Ready(Ok(()));
            }
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            std::task::ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            let read = read.filled();
            if read.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let now = Instant::now();
            this.heard.note(now);
            let before = buffer.filled().len();
            let ready = &mut this.ready;
            let counted = this.frames.pass(read, &mut |piece| {
                let fits = if ready.is_empty() { piece.len().min(buffer.remaining()) } else { 0 };
                let (first, rest) = piece.split_at_checked(fits).unwrap_or((piece, &[]));
                buffer.put_slice(first);
                ready.extend_from_slice(rest);
            });
            let Ok(counted) = counted else {
                tracing::info!("a message was too long and could not be shortened; its socket is closed");
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            };
            let bytes = read.len() as f64 + f64::from(counted.frames) * FRAME_BYTES;
            let wait = this
                .message_bucket
                .take(f64::from(counted.messages - this.heard.answers(counted.messages)), now)
                .max(this.byte_bucket.take(bytes, now))
                .min(LONGEST_PAUSE);
            if !wait.is_zero() {
                this.pause = Some(Box::pin(tokio::time::sleep(wait)));
            }
            if buffer.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            // Only part of a header: nothing to give yet.
            if let Some(pause) = &mut this.pause {
                std::task::ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Some(error) = this.write_ended(cx) {
            return Poll::Ready(Err(error));
        }
        let result = match &mut this.opening {
            Some(opening) => opening.write(&mut this.inner, cx, bytes),
            None => Pin::new(&mut this.inner).poll_write(cx, bytes),
        };
        if this.opening.as_ref().is_some_and(Opening::is_over) {
            this.opening = None;
        }
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

/// The first bytes to a client, the open packet, with another ping timeout in it. The number is padded with blanks, which JSON
/// allows before a number, so that the frame keeps its length.
#[derive(Debug)]
struct Opening {
    library: String,
    told: String,
    /// What is written in place of what the library wrote first, and how much of it is.
    shown: Vec<u8>,
    written: usize,
}

impl Opening {
    fn new(library_ms: u64, told_ms: u64) -> Self {
        let library = format!("\"pingTimeout\":{library_ms}");
        let width = library_ms.to_string().len();
        Self { told: format!("\"pingTimeout\":{told_ms:>width$}"), library, shown: Vec::new(), written: 0 }
    }

    fn write(&mut self, inner: &mut (impl AsyncWrite + Unpin), cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.shown.is_empty() {
            self.shown = bytes.to_vec();
            let found = bytes.windows(self.library.len()).position(|part| part == self.library.as_bytes());
            let place = found.and_then(|at| self.shown.get_mut(at..at + self.told.len()));
            if let Some(place) = place.filter(|place| place.len() == self.told.len()) {
                place.copy_from_slice(self.told.as_bytes());
            }
        }
        let left = self.shown.get(self.written..).unwrap_or_default();
        let result = Pin::new(inner).poll_write(cx, left);
        if let Poll::Ready(Ok(written)) = result {
            self.written += written;
        }
        result
    }

    fn is_over(&self) -> bool {
        !self.shown.is_empty() && self.written >= self.shown.len()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const FREE: Allowance =
        Allowance { messages_per_s: 1e9, messages_burst: 1e9, bytes_per_s: 1e9, bytes_burst: 1e9, message_bytes: Some(1 << 20) };

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

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_too_much_is_slowed() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let allowance = Allowance { messages_per_s: 20.0, messages_burst: 100.0, ..FREE };
        let mut ours = Guarded::new(ours, allowance, &CancellationToken::new(), Arc::default());
        let bytes: Vec<u8> = (0..300).flat_map(|_| frame(3)).collect();
        peer.write_all(&bytes).await.unwrap();
        let started = Instant::now();
        let mut read = vec![0; bytes.len()];
        for piece in read.chunks_mut(frame(3).len()) {
            ours.read_exact(piece).await.unwrap();
        }
        let seconds = started.elapsed().as_secs_f64();
        assert!((9.0..11.0).contains(&seconds), "200 messages over the burst take 10 s, took {seconds}");
        assert_eq!(read, bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_in_many_frames_is_one_and_every_byte_is_heard() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let allowance = Allowance { messages_per_s: 1.0, messages_burst: 2.0, ..FREE };
        let heard = Arc::new(Heard::default());
        let mut ours = Guarded::new(ours, allowance, &CancellationToken::new(), heard.clone());
        let opened = heard.last();
        let mut bytes = frame(4_000);
        bytes[0] = 0x01;
        for _ in 0..98 {
            bytes.extend([&[0x00][..], &frame(4_000)[1..]].concat());
        }
        bytes.extend([&[0x80][..], &frame(4_000)[1..]].concat());
        peer.write_all(&bytes).await.unwrap();
        let mut read = vec![0; bytes.len()];
        ours.read_exact(&mut read).await.unwrap();
        assert_eq!(read, bytes);
        assert_eq!(Instant::now(), opened, "nothing was waited for");
        tokio::time::advance(Duration::from_secs(7)).await;
        peer.write_all(&[0x81]).await.unwrap();
        assert!(
            tokio::time::timeout(Duration::from_secs(1), ours.read(&mut [0; 8])).await.is_err(),
            "half a header is nothing yet"
        );
        assert_eq!(heard.last() - opened, Duration::from_secs(7));
    }

    #[tokio::test]
    async fn a_client_is_told_the_ping_timeout_that_counts() {
        let (mut peer, ours) = tokio::io::duplex(16);
        let ours = Guarded::new(ours, FREE, &CancellationToken::new(), Arc::default());
        let mut ours = ours.announcing(2_592_000_000, 20_000);
        let packet = br#"..0{"sid":"x","pingInterval":25000,"pingTimeout":2592000000,"maxPayload":5}"#;
        let later = br#"{"pingTimeout":2592000000}"#;
        let writing = tokio::spawn(async move {
            ours.write_all(packet).await.unwrap();
            ours.write_all(later).await.unwrap();
        });
        let mut told = vec![0; packet.len() + later.len()];
        peer.read_exact(&mut told).await.unwrap();
        writing.await.unwrap();
        assert_eq!(
            String::from_utf8(told).unwrap(),
            r#"..0{"sid":"x","pingInterval":25000,"pingTimeout":     20000,"maxPayload":5}{"pingTimeout":2592000000}"#
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_stream_ends_for_reader_and_writer() {
        let (_peer, ours) = tokio::io::duplex(16);
        let cut = CancellationToken::new();
        let (mut reader, mut writer) = tokio::io::split(Guarded::new(ours, FREE, &cut, Arc::default()));
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
        let mut ours = Guarded::new(ours, FREE, &CancellationToken::new(), Arc::default());
        let started = Instant::now();
        assert_eq!(ours.write_all(&[0; 1000]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() >= WRITE_STALL);
    }
}
