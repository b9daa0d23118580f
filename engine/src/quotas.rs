//! What one user may store: so many jobs and assemblies, and so many bytes of them.

use sqlx::PgConnection;

use crate::error::{Error, Result};

/// How much a user may own. Settings of the API process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quotas {
    /// Scheduled jobs.
    pub jobs: u32,
    /// Bytes of their components and targets, as stored.
    pub job_bytes: u64,
    /// Assemblies.
    pub assemblies: u32,
    /// Bytes of their documents.
    pub assembly_bytes: u64,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { jobs: 2_000, job_bytes: 128 * 1024 * 1024, assemblies: 2_000, assembly_bytes: 512 * 1024 * 1024 }
    }
}

/// What a user owns of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Owned {
    count: i64,
    bytes: i64,
}

/// Taken with the user's id while something of theirs is counted, so that requests at the same time do not pass each other.
const JOBS_LOCK: i32 = 7_303;
const ASSEMBLIES_LOCK: i32 = 7_304;

/// Refuses when the jobs of `user_id`, the one just written included, are more than the quota. To be asked in the transaction that
/// has written it, and only when that has made something more.
///
/// # Errors
/// 409 `quota_exceeded` with `quota`, `used` and `limit`.
pub async fn jobs(conn: &mut PgConnection, user_id: i64, quotas: &Quotas) -> Result<()> {
    lock(&mut *conn, JOBS_LOCK, user_id).await?;
    let owned = sqlx::query_as!(
        Owned,
        r#"SELECT count(*) AS "count!", coalesce(sum(pg_column_size(components) + pg_column_size(targets)), 0)::bigint AS "bytes!"
           FROM scheduled_jobs WHERE owner_user_id = $1"#,
        user_id
    )
    .fetch_one(conn)
    .await?;
    refuse(owned, ("jobs", quotas.jobs), ("job_bytes", quotas.job_bytes))
}

/// The same of assemblies.
///
/// # Errors
/// 409 `quota_exceeded` with `quota`, `used` and `limit`.
pub async fn assemblies(conn: &mut PgConnection, user_id: i64, quotas: &Quotas) -> Result<()> {
    lock(&mut *conn, ASSEMBLIES_LOCK, user_id).await?;
    let owned = sqlx::query_as!(
        Owned,
        r#"SELECT count(*) AS "count!", coalesce(sum(octet_length(payload)), 0)::bigint AS "bytes!"
           FROM assemblies WHERE owner_user_id = $1"#,
        user_id
    )
    .fetch_one(conn)
    .await?;
    refuse(owned, ("assemblies", quotas.assemblies), ("assembly_bytes", quotas.assembly_bytes))
}

async fn lock(conn: &mut PgConnection, kind: i32, user_id: i64) -> Result<()> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1, hashint8($2))", kind, user_id).fetch_one(conn).await?;
    Ok(())
}

fn refuse(owned: Owned, count: (&str, u32), bytes: (&str, u64)) -> Result<()> {
    let refusal = |quota: &str, used: i64, limit: i64, what: &str| {
        let why =
            format!("With this you would have {used} {what}; at most {limit} are allowed. Remove some, or ask an administrator.");
        Error::conflict("quota_exceeded", why).with("quota", quota).with("used", used).with("limit", limit)
    };
    let limit = i64::from(count.1);
    if owned.count > limit {
        return Err(refusal(count.0, owned.count, limit, count.0));
    }
    let limit = i64::try_from(bytes.1).unwrap_or(i64::MAX);
    if owned.bytes > limit {
        return Err(refusal(bytes.0, owned.bytes, limit, &format!("bytes of {}", count.0)));
    }
    Ok(())
}
