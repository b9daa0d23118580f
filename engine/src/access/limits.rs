//! Rate limits and lockout, counted in Postgres so that every API process sees the same numbers.
//!
//! Hits are kept in one row per minute; a limit looks at the whole minutes its window touches, so it never lets through
//! more than it says. An attempt is counted before it is judged and given back when it was right: a burst of parallel
//! guesses cannot pass between the check and the count.

use std::net::IpAddr;

use crate::{
    db,
    error::{Error, Kind, Result},
    names,
};

/// At most `max` hits in `window_s` seconds for one subject.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// What is counted, apart from all else.
    pub scope: &'static str,
    /// How many are let through.
    pub max: i64,
    /// In how many seconds.
    pub window_s: i32,
}

/// Wrong passwords, codes and ciphers for one account.
pub const ACCOUNT: Limit = Limit { scope: "auth.account", max: 5, window_s: 15 * 60 };
/// Wrong one-time codes for one account.
pub const MFA: Limit = Limit { scope: "auth.mfa", max: 5, window_s: 15 * 60 };
/// Wrong anything for one account, whatever the path.
pub const ACCOUNT_HOUR: Limit = Limit { scope: "auth.account_hour", max: 100, window_s: 60 * 60 };
/// Wrong anything from one address.
pub const ADDRESS: Limit = Limit { scope: "auth.address", max: 20, window_s: 15 * 60 };
/// Passkey sign-ins begun from one address.
pub const CEREMONY: Limit = Limit { scope: "auth.ceremony", max: 300, window_s: 15 * 60 };
/// Wrong enrollment codes from one address; how many is a setting.
pub const ENROLLMENT_CODE: Limit = Limit { scope: "auth.enrollment_code", max: 20, window_s: 15 * 60 };
/// Wrong ciphers for the secret store.
pub const UNLOCK: Limit = Limit { scope: "aegis.unlock", max: 5, window_s: 15 * 60 };

/// The longest window any limit has, in seconds; older counters are removed.
const KEPT_S: i32 = 2 * 60 * 60;
const SUBJECT_MAX_CHARS: usize = 128;

/// An attempt that has been counted, and can be given back.
#[derive(Debug)]
#[must_use]
pub struct Attempt {
    taken: Vec<(&'static str, String)>,
}

/// The subject of an address: the address itself, or the /64 of an IPv6 address, which is one customer's.
#[must_use]
pub fn address(ip: Option<IpAddr>) -> String {
    match ip.map(|ip| ip.to_canonical()) {
        None => "unknown".to_owned(),
        Some(IpAddr::V4(ip)) => ip.to_string(),
        Some(IpAddr::V6(ip)) => {
            let [a, b, c, d, ..] = ip.segments();
            format!("{a:x}:{b:x}:{c:x}:{d:x}::/64")
        }
    }
}

/// The subject of an account: its name as the unique index sees it, bounded.
#[must_use]
pub fn account(username: &str) -> String {
    names::key(username.trim()).chars().take(SUBJECT_MAX_CHARS).collect()
}

/// Seconds until this limit has room for its subject; 0 when it has.
async fn wait_s(db: &mut sqlx::PgConnection, limit: &Limit, subject: &str) -> Result<i64> {
    // A bucket counts until its last second has left the window.
    let row = sqlx::query!(
        r#"SELECT coalesce(sum(hits), 0)::bigint AS "hits!",
                  extract(epoch FROM min(window_start) + make_interval(secs => $3 + 60) - clock_timestamp())::bigint AS wait_s
           FROM rate_counters
           WHERE scope = $1 AND subject = $2 AND hits > 0
             AND window_start > clock_timestamp() - make_interval(secs => $3 + 60)"#,
        limit.scope,
        subject,
        limit.window_s,
    )
    .fetch_one(db)
    .await?;
    Ok(if row.hits >= limit.max { row.wait_s.unwrap_or(0).max(1) } else { 0 })
}

fn full(wait_s: i64) -> Error {
    Error::new(Kind::Limited, "rate_limited", "Too many attempts; wait before the next.")
        .retry_after(u64::try_from(wait_s).unwrap_or(1))
}

/// Refuses when the limit is full, and counts nothing: for what is counted only once it is known to be wrong, where many
/// that are right may come at once.
///
/// # Errors
/// 429 `rate_limited` with the seconds until there is room again.
pub async fn check(pool: &db::Pool, limit: &Limit, subject: &str) -> Result<()> {
    match wait_s(&mut *pool.acquire().await?, limit, subject).await? {
        0 => Ok(()),
        wait => Err(full(wait)),
    }
}

/// Counts one attempt under every limit, or under none and refuses.
///
/// # Errors
/// 429 `rate_limited` with the seconds until the first of the full windows has room again.
pub async fn attempt(pool: &db::Pool, limits: &[(Limit, String)]) -> Result<Attempt> {
    let mut tx = pool.begin().await?;
    let mut taken: Vec<(Limit, String)> = limits.to_vec();
    // One order for all, so that two attempts never wait for each other crosswise.
    taken.sort_by(|(a, a_subject), (b, b_subject)| (a.scope, a_subject).cmp(&(b.scope, b_subject)));
    let mut wait = 0;
    for (limit, subject) in &taken {
        sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || $2, 0))", limit.scope, subject)
            .execute(&mut *tx)
            .await?;
        wait = wait.max(wait_s(&mut tx, limit, subject).await?);
    }
    if wait > 0 {
        return Err(full(wait));
    }
    for (limit, subject) in &taken {
        sqlx::query!(
            "INSERT INTO rate_counters AS c (scope, subject, window_start, hits)
             VALUES ($1, $2, date_trunc('minute', clock_timestamp()), 1)
             ON CONFLICT (scope, subject, window_start) DO UPDATE SET hits = c.hits + 1",
            limit.scope,
            subject,
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    if rand::random_ratio(1, 64) {
        sqlx::query!("DELETE FROM rate_counters WHERE window_start < now() - make_interval(secs => $1)", f64::from(KEPT_S))
            .execute(pool)
            .await?;
    }
    Ok(Attempt { taken: taken.into_iter().map(|(limit, subject)| (limit.scope, subject)).collect() })
}

/// Gives an attempt back: it was right.
///
/// # Errors
/// When the database is away.
pub async fn give_back(pool: &db::Pool, attempt: Attempt) -> Result<()> {
    for (scope, subject) in &attempt.taken {
        // The newest bucket is ours, or a later one of the same window: either way one hit less.
        sqlx::query!(
            "UPDATE rate_counters SET hits = hits - 1
             WHERE (scope, subject, window_start) IN (
                 SELECT scope, subject, window_start FROM rate_counters
                 WHERE scope = $1 AND subject = $2 AND hits > 0 ORDER BY window_start DESC LIMIT 1 FOR UPDATE)",
            scope,
            subject,
        )
        .execute(pool)
        .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_are_bounded_and_cannot_be_varied_cheaply() {
        assert_eq!(account("  Ada "), account("ada"));
        assert_eq!(account(&"x".repeat(5000)).len(), SUBJECT_MAX_CHARS);
        let ip = |text: &str| address(Some(text.parse().unwrap()));
        assert_eq!(ip("2001:db8:1:2:3::4"), ip("2001:db8:1:2:ffff::1"));
        assert_ne!(ip("2001:db8:1:2::4"), ip("2001:db8:1:3::4"));
        assert_eq!(ip("::ffff:192.0.2.1"), "192.0.2.1");
        assert_ne!(ip("192.0.2.1"), ip("192.0.2.2"));
        assert_eq!(address(None), "unknown");
    }
}
