//! A body that the handler has not read to its end. A connection can only go on behind it, and a peer that is still sending when its
//! connection closes may lose the answer. So a short rest is read, and before a long one the end is announced.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::{sync::oneshot, time::timeout};

/// The longest rest that is read, in bytes.
const REST_BYTES: u64 = 64 * 1024;
/// How long it is waited for.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// A request's body that comes back when the handler drops it.
pub struct Lent<B: Body + Unpin> {
    body: Option<B>,
    polled: bool,
    back: Option<oneshot::Sender<(B, bool)>>,
}

/// What is left of a body when the handler has answered.
pub struct Rest<B>(Option<oneshot::Receiver<(B, bool)>>);

/// The body for the handler, and its rest for afterwards.
pub fn lend<B: Body + Unpin>(body: B) -> (Lent<B>, Rest<B>) {
    let (back, rest) = oneshot::channel();
    (Lent { body: Some(body), polled: false, back: Some(back) }, Rest(Some(rest)))
}

impl<B: Body<Data = Bytes> + Unpin> Body for Lent<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.polled = true;
        self.body.as_mut().map_or(Poll::Ready(None), |body| Pin::new(body).poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl<B: Body + Unpin> Drop for Lent<B> {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take())
            && !body.is_end_stream()
        {
            let _ = back.send((body, self.polled));
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Rest<B> {
    /// Reads what is left; whether the connection can go on behind it. A peer that `waits` to be told to send its body is not told now.
    pub async fn read_on(mut self, waits: bool) -> bool {
        // Nothing came back when it was read to its end, or when somebody still reads it.
        let Some((mut body, polled)) = self.0.take().and_then(|mut rest| rest.try_recv().ok()) else { return true };
        if waits && !polled || body.size_hint().lower() > REST_BYTES {
            return false;
        }
        let reading = async {
            let mut left = REST_BYTES;
            loop {
                match body.frame().await {
                    None => return true,
                    Some(Err(_)) => return false,
                    Some(Ok(frame)) => {
                        let length = frame.data_ref().map_or(0, Bytes::len);
                        let Some(less) = left.checked_sub(u64::try_from(length).unwrap_or(u64::MAX)) else { return false };
                        left = less;
                    }
                }
            }
        };
        timeout(REST_PATIENCE, reading).await.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{Full, StreamBody};

    use super::*;

    fn pieces(count: usize, length: usize) -> impl Body<Data = Bytes, Error = std::io::Error> + Unpin {
        let frames = (0..count).map(move |_| Ok(Frame::data(Bytes::from(vec![b'x'; length]))));
        StreamBody::new(futures::stream::iter(frames.collect::<Vec<_>>()))
    }

    #[tokio::test]
    async fn what_was_read_leaves_nothing() {
        let (lent, rest) = lend(pieces(3, 10));
        assert_eq!(lent.collect().await.unwrap().to_bytes().len(), 30);
        assert!(rest.read_on(false).await);
    }

    #[tokio::test]
    async fn a_short_rest_is_read_and_a_long_one_is_not() {
        let (mut lent, rest) = lend(pieces(5, 10_000));
        assert!(lent.frame().await.is_some());
        drop(lent);
        assert!(rest.read_on(false).await);
        let (lent, rest) = lend(pieces(50, 10_000));
        drop(lent);
        assert!(!rest.read_on(false).await);
        let (lent, rest) = lend(Full::new(Bytes::from(vec![0; 100_000])));
        drop(lent);
        assert!(!rest.read_on(false).await, "its length is known");
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_that_does_not_come_is_not_waited_for() {
        let (lent, rest) = lend(StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, std::io::Error>>()));
        drop(lent);
        assert!(!rest.read_on(false).await);
        // One that was to be asked for, and was not.
        let (lent, rest) = lend(pieces(1, 10));
        drop(lent);
        assert!(!rest.read_on(true).await);
    }
}
