//! Notifications between processes over Postgres: hints that something changed, never the only record of it.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::sync::mpsc;

use crate::{
    Result,
    db::{Cause, Pool},
};

/// The longest payload Postgres carries is 7,999 bytes; this leaves room for a wrapper.
pub const PAYLOAD_LIMIT_BYTES: usize = 7_500;

/// The most notifications sent in one transaction.
pub const BATCH: usize = 500;

/// What a listener hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Listening (again). What was sent before is lost, so the receiver looks at the tables once.
    Connected,
    /// A notification.
    Notification {
        /// The channel it came on.
        channel: String,
        /// Its payload.
        payload: String,
    },
}

/// Listens on `channels` and passes on what is heard, until the receiver is gone. Comes back by itself when Postgres does.
pub async fn listen(pool: Pool, channels: Vec<String>, heard: mpsc::Sender<Heard>) {
    let mut pause = Duration::from_millis(200);
    while !heard.is_closed() {
        match listen_once(&pool, &channels, &heard).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(error = Cause::text(&error), "listening to Postgres was interrupted"),
        }
        tokio::select! {
            () = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => {}
            () = heard.closed() => return,
        }
        pause = (pause * 2).min(Duration::from_secs(3));
    }
}

async fn listen_once(pool: &Pool, channels: &[String], heard: &mpsc::Sender<Heard>) -> sqlx::Result<()> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.listen_all(channels.iter().map(String::as_str)).await?;
    if heard.send(Heard::Connected).await.is_err() {
        return Ok(());
    }
    loop {
        let next = tokio::select! {
            next = listener.try_recv() => next?,
            () = heard.closed() => return Ok(()),
        };
        let event = match next {
            Some(notification) => {
                Heard::Notification { channel: notification.channel().to_owned(), payload: notification.payload().to_owned() }
            }
            // The connection was lost and made again.
            None => Heard::Connected,
        };
        if heard.send(event).await.is_err() {
            return Ok(());
        }
    }
}

/// Sends notifications, in order, in one transaction.
///
/// # Errors
/// When the database is away or a payload is too long.
pub async fn notify(pool: &Pool, channels: &[String], payloads: &[String]) -> Result<()> {
    sqlx::query!(
        "SELECT pg_notify(n.channel, n.payload) AS sent FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS n (channel, payload, at) ORDER BY n.at",
        channels,
        payloads
    )
    .fetch_all(pool)
    .await?;
    Ok(())
}

/// Whether Postgres can be reached.
///
/// # Errors
/// When it cannot.
pub async fn reachable(pool: &Pool) -> Result<()> {
    pool.acquire().await?;
    Ok(())
}

/// Keeps a payload that is too long for a notification; answers its id.
///
/// # Errors
/// When the database is away.
pub async fn attach(pool: &Pool, payload: &[u8]) -> Result<i64> {
    Ok(sqlx::query_scalar!("INSERT INTO socket_attachments (payload) VALUES ($1) RETURNING id", payload).fetch_one(pool).await?)
}

/// A kept payload.
///
/// # Errors
/// When the database is away or the payload was forgotten.
pub async fn attachment(pool: &Pool, id: i64) -> Result<Vec<u8>> {
    Ok(sqlx::query_scalar!("SELECT payload FROM socket_attachments WHERE id = $1", id).fetch_one(pool).await?)
}

/// Forgets payloads older than `age`.
///
/// # Errors
/// When the database is away.
pub async fn forget_attachments(pool: &Pool, age: Duration) -> Result<()> {
    sqlx::query!("DELETE FROM socket_attachments WHERE created_at < now() - make_interval(secs => $1)", age.as_secs_f64())
        .execute(pool)
        .await?;
    Ok(())
}
