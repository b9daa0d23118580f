//! Idempotency keys: the same request under the same key has one effect and one answer, for 24 hours.
//!
//! The answer is written in the transaction of its effect, so neither exists without the other. Twins that arrive at the
//! same time wait for each other on an advisory lock, at most [`TWIN_WAIT_MS`].

use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::error::{Error, Kind, Result};

/// How long a twin waits for the request before it, in milliseconds.
pub const TWIN_WAIT_MS: u32 = 5_000;
/// The longest key, in characters.
pub const KEY_MAX: usize = 255;

/// What is known of a key.
#[derive(Debug)]
pub enum Claim {
    /// Nothing: carry the request out, and [`Slot::keep`] its answer before committing.
    Fresh(Slot),
    /// The request was carried out; this was its answer.
    Replay(u16, Value),
}

/// The place an answer is kept in; without a key it keeps nothing.
#[derive(Debug)]
pub struct Slot(Option<Row>);

#[derive(Debug)]
struct Row {
    actor: String,
    key: String,
    body_hash: Vec<u8>,
}

/// Claims `key` for a request of `actor` until the transaction ends. `operation` and `body` are what the key stands for.
///
/// # Errors
/// 400 `invalid_idempotency_key`; 422 `idempotency_key_reused` when the key stands for something else; 409
/// `request_in_progress` when a twin does not finish in time.
pub async fn claim(conn: &mut PgConnection, actor: &str, key: Option<&str>, operation: &str, body: &Value) -> Result<Claim> {
    let Some(key) = key else { return Ok(Claim::Fresh(Slot(None))) };
    if key.is_empty() || key.chars().count() > KEY_MAX || key.chars().any(char::is_control) {
        return Err(Error::invalid("invalid_idempotency_key", format!("Idempotency-Key must be 1 to {KEY_MAX} characters.")));
    }
    let mut hash = Sha256::new();
    hash.update(operation.as_bytes());
    hash.update([0]);
    hash.update(serde_json::to_vec(body)?);
    let body_hash = hash.finalize().to_vec();

    sqlx::query!("SELECT set_config('lock_timeout', $1, true)", TWIN_WAIT_MS.to_string()).fetch_one(&mut *conn).await?;
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1 || chr(10) || $2, 7301))", actor, key)
        .fetch_one(&mut *conn)
        .await
        .map_err(|error| match error.as_database_error().and_then(|error| error.code()) {
            Some(code) if code == "55P03" => {
                Error::conflict("request_in_progress", "A request under this key is being carried out.").retry_after(1)
            }
            _ => error.into(),
        })?;
    sqlx::query!("SELECT set_config('lock_timeout', '0', true)").fetch_one(&mut *conn).await?;

    let known = sqlx::query!(
        "SELECT body_hash, status, response FROM idempotency_keys
         WHERE actor = $1 AND key = $2 AND created_at > now() - interval '24 hours'",
        actor,
        key
    )
    .fetch_optional(conn)
    .await?;
    match known {
        None => Ok(Claim::Fresh(Slot(Some(Row { actor: actor.to_owned(), key: key.to_owned(), body_hash })))),
        Some(known) if known.body_hash == body_hash => {
            Ok(Claim::Replay(u16::try_from(known.status).map_err(Error::bug)?, known.response))
        }
        Some(_) => Err(Error::new(
            Kind::Unprocessable,
            "idempotency_key_reused",
            "This Idempotency-Key was used for another request within the last 24 hours.",
        )),
    }
}

impl Slot {
    /// Keeps the answer, in the transaction of its effect.
    ///
    /// # Errors
    /// When the database refuses.
    pub async fn keep(self, conn: &mut PgConnection, status: u16, response: &Value) -> Result<()> {
        let Some(row) = self.0 else { return Ok(()) };
        sqlx::query!(
            "INSERT INTO idempotency_keys (actor, key, body_hash, status, response) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (actor, key) DO UPDATE
             SET body_hash = EXCLUDED.body_hash, status = EXCLUDED.status, response = EXCLUDED.response, created_at = now()",
            row.actor,
            row.key,
            row.body_hash,
            i16::try_from(status).map_err(Error::bug)?,
            response,
        )
        .execute(conn)
        .await?;
        Ok(())
    }
}
