//! Worker processes, for operators to see. Nothing is decided by these rows: a run belongs to its lease.

use borealis_engine::{Result, db::Pool};
use uuid::Uuid;

/// Writes that a worker is alive.
///
/// # Errors
/// When the database refuses.
pub async fn seen(pool: &Pool, id: Uuid, name: &str, host: &str, pid: u32) -> Result<()> {
    // An update alone writes half of what an insert that meets its row does.
    let known = sqlx::query!("UPDATE workers SET last_seen_at = now() WHERE id = $1", id).execute(pool).await?;
    if known.rows_affected() > 0 {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO workers (id, name, host, pid) VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO UPDATE SET last_seen_at = now()",
        id,
        name,
        host,
        i32::try_from(pid).unwrap_or(0),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Writes that a worker has stopped in good order.
///
/// # Errors
/// When the database refuses.
pub async fn stopped(pool: &Pool, id: Uuid) -> Result<()> {
    sqlx::query!("UPDATE workers SET stopped_at = now() WHERE id = $1", id).execute(pool).await?;
    Ok(())
}
