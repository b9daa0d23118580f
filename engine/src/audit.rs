//! The audit: one row per action, written in the same transaction as its effect.

use crate::{error::Result, scope::Actor};

/// What is recorded. `detail` never holds secrets, codes or nonces.
#[derive(Debug, Clone, Default)]
pub struct Entry<'a> {
    /// What was done, as `noun.verb`: `site.create`, `session.login`.
    pub action: &'a str,
    /// What it was done to.
    pub object_kind: &'a str,
    /// Its id, as text.
    pub object_id: String,
    /// The site it belongs to.
    pub site_id: Option<i64>,
    /// False when it was refused or went wrong.
    pub failed: bool,
    /// Before and after, reasons.
    pub detail: serde_json::Value,
}

/// Writes one row.
///
/// # Errors
/// When the database refuses; the caller's transaction must then not commit.
pub async fn record(db: &mut sqlx::PgConnection, actor: &Actor, entry: Entry<'_>) -> Result<()> {
    let detail = if entry.detail.is_null() { serde_json::json!({}) } else { entry.detail };
    sqlx::query!(
        "INSERT INTO audit_events (actor_kind, actor_id, actor_name, ip, action, object_kind, object_id, site_id, outcome, detail)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        actor.kind.as_str(),
        actor.id,
        actor.name,
        actor.ip,
        entry.action,
        entry.object_kind,
        entry.object_id,
        entry.site_id,
        if entry.failed { "failure" } else { "success" },
        detail,
    )
    .execute(db)
    .await?;
    Ok(())
}
