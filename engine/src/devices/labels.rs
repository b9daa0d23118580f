//! What operators call a device: finding it by a part of its hostname, and its description.

use serde_json::json;
use uuid::Uuid;

use crate::{
    audit, db,
    error::{Error, Result},
    keys::guid_text,
    names,
    scope::{Actor, Scope},
};

/// The most devices a search answers.
pub const FOUND_MAX: i64 = 50;
/// A search for fewer characters finds nothing.
pub const SEARCH_MIN_CHARS: usize = 3;
/// The most characters of a description.
pub const DESCRIPTION_MAX_CHARS: usize = 1024;

/// A device that a search has found.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its GUID, upper case.
    pub agent_guid: String,
    /// Its agent id.
    pub agent_id: String,
    /// Its hostname.
    pub hostname: String,
    /// Empty for machines with an agent.
    pub connection_type: String,
    /// Its site.
    pub site_id: Option<i64>,
    /// The site's name, or empty.
    pub site_name: String,
    /// The site's description, or empty.
    pub site_description: String,
}

/// The devices in `scope` whose hostname contains `text`, in any case: the one with exactly this name first, then those that begin
/// with it. At most [`FOUND_MAX`]; none for fewer than [`SEARCH_MIN_CHARS`] characters.
///
/// # Errors
/// When the database is away.
pub async fn search(pool: &db::Pool, scope: &Scope, text: &str) -> Result<Vec<Found>> {
    let key = names::key(text.trim());
    if key.chars().count() < SEARCH_MIN_CHARS {
        return Ok(Vec::new());
    }
    let rows = sqlx::query!(
        r#"SELECT d.guid, d.agent_id, d.hostname, d.connection_type, d.site_id, coalesce(s.name, '') AS "site_name!",
                  coalesce(s.description, '') AS "site_description!"
           FROM devices d LEFT JOIN sites s ON s.id = d.site_id
           WHERE strpos(d.hostname_key, $1) > 0 AND ($2::bigint[] IS NULL OR d.site_id = ANY($2))
           ORDER BY d.hostname_key = $1 DESC, starts_with(d.hostname_key, $1) DESC, d.hostname_key, s.name_key, d.guid LIMIT $3"#,
        key,
        scope.site_ids(),
        FOUND_MAX,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Found {
            agent_guid: guid_text(row.guid),
            agent_id: row.agent_id,
            hostname: row.hostname,
            connection_type: row.connection_type,
            site_id: row.site_id,
            site_name: row.site_name,
            site_description: row.site_description,
        })
        .collect())
}

/// Changes the description of a device in `scope`.
///
/// # Errors
/// 400 `invalid_description`; 404 `not found`.
pub async fn describe(pool: &db::Pool, scope: &Scope, actor: &Actor, device: Uuid, description: &str) -> Result<()> {
    let description = description.trim();
    let is_control = |c: char| c.is_control() && c != '\n' && c != '\t';
    if description.chars().count() > DESCRIPTION_MAX_CHARS || description.chars().any(is_control) {
        let why = format!("must have at most {DESCRIPTION_MAX_CHARS} characters, and no control characters.");
        return Err(Error::field("invalid_description", "description", why));
    }
    let mut tx = pool.begin().await?;
    let before = sqlx::query!(
        "SELECT hostname, site_id, description FROM devices
         WHERE guid = $1 AND ($2::bigint[] IS NULL OR site_id = ANY($2)) FOR UPDATE",
        device,
        scope.site_ids(),
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(Error::not_found)?;
    sqlx::query!("UPDATE devices SET description = $2 WHERE guid = $1", device, description).execute(&mut *tx).await?;
    let entry = audit::Entry {
        action: "device.describe",
        object_kind: "device",
        object_id: guid_text(device),
        site_id: before.site_id,
        detail: json!({"hostname": before.hostname, "before": before.description, "after": description}),
        ..audit::Entry::default()
    };
    audit::record(&mut tx, actor, entry).await?;
    tx.commit().await?;
    Ok(())
}
