//! How often a machine may knock, counted in Postgres so that every API process sees the same numbers.

use crate::{
    db,
    error::{Error, Kind, Result},
};

/// Seconds a limit looks back.
pub const WINDOW_S: u64 = 60;

/// Requests a minute with one public key.
pub const REQUESTS_PER_KEY: u32 = 12;
/// Polls a minute for one reference.
pub const POLLS_PER_REFERENCE: u32 = 60;
/// Refreshes a minute of one device.
pub const REFRESHES_PER_DEVICE: u32 = 30;

/// Counts one hit and lets it through, or refuses it uncounted. Hits are kept in buckets of ten seconds; parallel hits may
/// pass one limit by as many as there are connections, which no limit here minds.
///
/// # Errors
/// 429 `rate_limited` with the seconds to wait.
pub async fn hit(pool: &db::Pool, scope: &str, subject: &str, per_minute: u32) -> Result<()> {
    let counted = sqlx::query!(
        "INSERT INTO rate_counters AS c (scope, subject, window_start, hits)
         SELECT $1, $2, date_bin('10 seconds', now(), 'epoch'), 1
         WHERE (SELECT coalesce(sum(hits), 0) FROM rate_counters
                WHERE scope = $1 AND subject = $2 AND window_start > now() - interval '60 seconds') < $3
         ON CONFLICT (scope, subject, window_start) DO UPDATE SET hits = c.hits + 1",
        scope,
        subject,
        i64::from(per_minute),
    )
    .execute(pool)
    .await?
    .rows_affected();
    if counted == 0 {
        return Err(Error::new(Kind::Limited, "rate_limited", "Too many requests; wait before the next.").retry_after(10));
    }
    // One in a hundred hits clears what no limit of this module looks at any more.
    if rand::random_ratio(1, 100) {
        sqlx::query!("DELETE FROM rate_counters WHERE scope LIKE 'enroll.%' AND window_start < now() - interval '10 minutes'")
            .execute(pool)
            .await?;
    }
    Ok(())
}
