//! The Postgres adapter's way to Postgres: many notifications in one transaction, and a listener that comes back.
//!
//! The driver that comes with the adapter sends each notification by itself, and its stream ends for good when Postgres
//! is away for longer than a connection is waited for.

use std::{sync::Arc, time::Duration};

use borealis_engine::{
    bus::{self, Heard},
    db::Pool,
};
use futures::stream::{self, BoxStream, StreamExt};
use socketioxide_postgres::drivers::{Driver, Notification};
use tokio::sync::{Mutex, mpsc, oneshot};

/// Notifications that wait for the one before them to be committed.
const QUEUE: usize = 4096;
/// Notifications heard and not yet handled, per listener.
const HEARD: usize = 1024;

struct Notice {
    channel: String,
    payload: String,
    done: oneshot::Sender<Result<(), String>>,
}

/// What the adapter talks through. Clones share one queue.
#[derive(Clone)]
pub struct Bus {
    pool: Pool,
    queue: mpsc::Sender<Notice>,
    waiting: Arc<Mutex<mpsc::Receiver<Notice>>>,
}

/// Why something could not be told to the other processes: Postgres is away, or refused.
#[derive(Debug, thiserror::Error)]
#[error("the other API processes could not be reached: {0}")]
pub struct Error(String);

impl From<borealis_engine::Error> for Error {
    fn from(error: borealis_engine::Error) -> Self {
        Self(error.to_string())
    }
}

impl Bus {
    /// A bus over `pool`, to be driven by [`Self::drive`].
    pub fn new(pool: Pool) -> Self {
        let (queue, waiting) = mpsc::channel::<Notice>(QUEUE);
        Self { pool, queue, waiting: Arc::new(Mutex::new(waiting)) }
    }

    /// Sends what is to be told, for ever.
    pub async fn drive(self) {
        let pool = &self.pool;
        let mut waiting = self.waiting.lock().await;
        let mut batch = Vec::new();
        while waiting.recv_many(&mut batch, bus::BATCH).await > 0 {
            let (mut channels, mut payloads, mut answers) = (Vec::new(), Vec::new(), Vec::new());
            for notice in batch.drain(..) {
                channels.push(notice.channel);
                payloads.push(notice.payload);
                answers.push(notice.done);
            }
            let sent = bus::notify(pool, &channels, &payloads).await.map_err(|error| error.to_string());
            for answer in answers {
                let _ = answer.send(sent.clone());
            }
        }
    }

    /// Sends one notification; with others that wait, in their order.
    ///
    /// # Errors
    /// When it was not sent.
    pub async fn tell(&self, channel: &str, payload: String) -> Result<(), Error> {
        let (done, answer) = oneshot::channel();
        let stopped = || Error("this process is stopping".into());
        self.queue.send(Notice { channel: channel.to_owned(), payload, done }).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map_err(Error)
    }

    /// Listens; the receiver also learns when something may have been missed.
    pub fn listen(&self, channels: Vec<String>) -> mpsc::Receiver<Heard> {
        let (heard, receiver) = mpsc::channel(HEARD);
        tokio::spawn(bus::listen(self.pool.clone(), channels, heard));
        receiver
    }
}

/// One notification, as the adapter reads it.
pub struct Told {
    channel: String,
    payload: String,
}

impl Notification for Told {
    fn channel(&self) -> &str {
        &self.channel
    }

    fn payload(&self) -> &str {
        &self.payload
    }
}

impl Driver for Bus {
    type Error = Error;
    type Notification = Told;
    type NotificationStream = BoxStream<'static, Told>;

    /// The table is part of our migrations; this only finds out whether Postgres is there.
    async fn init(&self, _: &str) -> Result<(), Error> {
        Ok(bus::reachable(&self.pool).await?)
    }

    async fn listen(&self, channels: &[&str]) -> Result<Self::NotificationStream, Error> {
        let mut heard = Bus::listen(self, channels.iter().map(|channel| (*channel).to_owned()).collect());
        // The adapter answers its own heartbeat only when it hears it, so it must not begin before it listens.
        heard.recv().await;
        let told = stream::poll_fn(move |cx| heard.poll_recv(cx)).filter_map(async |heard| match heard {
            Heard::Notification { channel, payload } => Some(Told { channel, payload }),
            Heard::Connected => None,
        });
        Ok(told.boxed())
    }

    async fn notify(&self, channel: &str, message: &str) -> Result<(), Error> {
        self.tell(channel, message.to_owned()).await
    }

    async fn push_attachment(&self, _: &str, attachment: &[u8]) -> Result<i64, Error> {
        Ok(bus::attach(&self.pool, attachment).await?)
    }

    async fn get_attachment(&self, _: &str, id: i64) -> Result<Vec<u8>, Error> {
        Ok(bus::attachment(&self.pool, id).await?)
    }

    async fn cleanup_attachments(&self, _: &str, age: Duration) -> Result<(), Error> {
        Ok(bus::forget_attachments(&self.pool, age).await?)
    }

    async fn close(&self, _: &[&str]) -> Result<(), Error> {
        Ok(())
    }
}
