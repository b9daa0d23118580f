//! The audit: one row per action, written in the same transaction as its effect. It is append-only, and [`chain`] shows when
//! somebody changed it all the same.

pub mod chain;

use chrono::{DateTime, Utc};

use crate::{db, error::Result, names, scope::Actor};

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

/// Writes one row. The detail says with what it was done: `session` is the id of a session, `api_token` id and name of an API token.
///
/// # Errors
/// When the database refuses; the caller's transaction must then not commit.
pub async fn record(db: &mut sqlx::PgConnection, actor: &Actor, entry: Entry<'_>) -> Result<()> {
    let mut detail = if entry.detail.is_null() { serde_json::json!({}) } else { entry.detail };
    if let Some(detail) = detail.as_object_mut() {
        if let Some(token) = &actor.token {
            detail.insert("api_token".to_owned(), serde_json::to_value(token)?);
        }
        if let Some(session) = &actor.session {
            detail.insert("session".to_owned(), serde_json::to_value(session)?);
        }
    }
    sqlx::query!(
        "WITH event AS (
             INSERT INTO audit_events (actor_kind, actor_id, actor_name, actor_name_key, ip, action, object_kind, object_id, site_id, outcome, detail)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING id
         )
         INSERT INTO audit_unsealed SELECT id FROM event",
        actor.kind.as_str(),
        actor.id,
        actor.name,
        names::key(&actor.name),
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

/// Which events are asked for. All conditions hold at once.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Not before this.
    pub from: Option<DateTime<Utc>>,
    /// Before this.
    pub to: Option<DateTime<Utc>>,
    /// By whom: a username or hostname, in any case.
    pub actor: Option<String>,
    /// What was done, or the beginning of it: `user.` is all that was done to users.
    pub action: Option<String>,
    /// What it was done to.
    pub object_kind: Option<String>,
    /// Its id.
    pub object_id: Option<String>,
    /// The site it belongs to.
    pub site_id: Option<i64>,
    /// `success` or `failure`.
    pub outcome: Option<String>,
}

/// One event.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Event {
    /// Its id; later ones are larger, nearly always.
    pub id: i64,
    /// When it was written.
    pub at: DateTime<Utc>,
    /// `anonymous`, `operator`, `device`, `worker` or `system`.
    pub actor_kind: String,
    /// The user id, device GUID or worker id.
    pub actor_id: String,
    /// The username or hostname.
    pub actor_name: String,
    /// The client's address.
    pub ip: String,
    /// What was done.
    pub action: String,
    /// What it was done to.
    pub object_kind: String,
    /// Its id.
    pub object_id: String,
    /// The site it belongs to.
    pub site_id: Option<i64>,
    /// `success` or `failure`.
    pub outcome: String,
    /// Before and after, reasons.
    pub detail: serde_json::Value,
}

/// Events, the latest first: up to `limit` of those with ids below `before`.
///
/// # Errors
/// When the database is away.
pub async fn page(pool: &db::Pool, filter: &Filter, before: Option<i64>, limit: i64) -> Result<Vec<Event>> {
    // A beginning is no pattern: what stands for something in one is taken as itself.
    let beginning = filter.action.as_ref().map(|text| text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_") + "%");
    Ok(sqlx::query_as!(
        Event,
        "SELECT id, at, actor_kind, actor_id, actor_name, ip, action, object_kind, object_id, site_id, outcome, detail FROM audit_events
         WHERE ($1::timestamptz IS NULL OR at >= $1) AND ($2::timestamptz IS NULL OR at < $2)
           AND ($3::text IS NULL OR actor_name_key = $11 OR (actor_name_key = '' AND lower(actor_name) = lower($3))) AND ($4::text IS NULL OR action LIKE $4)
           AND ($5::text IS NULL OR object_kind = $5) AND ($6::text IS NULL OR object_id = $6)
           AND ($7::bigint IS NULL OR site_id = $7) AND ($8::text IS NULL OR outcome = $8) AND ($9::bigint IS NULL OR id < $9)
         ORDER BY id DESC LIMIT $10",
        filter.from,
        filter.to,
        filter.actor.as_deref(),
        beginning,
        filter.object_kind.as_deref(),
        filter.object_id.as_deref(),
        filter.site_id,
        filter.outcome.as_deref(),
        before,
        limit,
        filter.actor.as_deref().map(names::key),
    )
    .fetch_all(&mut *db::begin_wide(pool).await?)
    .await?)
}
