//! Which device is meant: the one place where a path's hostname or GUID becomes a device.

use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    keys::{guid_text, parse_guid},
    names,
    scope::Scope,
};

/// The most devices that an error lists.
pub const NAMED_MAX: usize = 50;

/// A device that was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its GUID.
    pub guid: Uuid,
    /// Its hostname now.
    pub hostname: String,
    /// The key of that: see [`names::key`].
    pub hostname_key: String,
    /// Its agent id.
    pub agent_id: String,
    /// Its site now.
    pub site_id: Option<i64>,
    /// The name of that.
    pub site_name: Option<String>,
}

/// The devices in scope that have one of `guids`, or one of `names` (keys) as hostname.
///
/// # Errors
/// When the database is away.
pub async fn all(conn: &mut PgConnection, scope: &Scope, guids: &[Uuid], names: &[String]) -> Result<Vec<Found>> {
    Ok(sqlx::query_as!(
        Found,
        r#"SELECT d.guid, d.hostname, d.hostname_key, d.agent_id, d.site_id, s.name AS "site_name?"
           FROM devices d LEFT JOIN sites s ON s.id = d.site_id
           WHERE (d.guid = ANY($1) OR d.hostname_key = ANY($2)) AND ($3::bigint[] IS NULL OR d.site_id = ANY($3))
           ORDER BY d.guid"#,
        guids,
        names,
        scope.site_ids(),
    )
    .fetch_all(conn)
    .await?)
}

/// The device that `text` names in scope: by its GUID, in every spelling of it, or else by its hostname.
///
/// # Errors
/// 404 when there is none in scope; see [`ambiguous`].
pub async fn one(conn: &mut PgConnection, scope: &Scope, text: &str) -> Result<Found> {
    let text = text.trim();
    let guid = parse_guid(text);
    let guids: Vec<Uuid> = guid.into_iter().collect();
    let mut found = all(conn, scope, &guids, &[names::key(text)]).await?;
    if let Some(exact) = found.iter().position(|device| Some(device.guid) == guid) {
        return Ok(found.swap_remove(exact));
    }
    if found.len() > 1 {
        return Err(ambiguous(text, found.iter()));
    }
    found.pop().ok_or_else(Error::not_found)
}

/// Several devices have the hostname: 409 `ambiguous_hostname` with `hostname`, `guids`, and `candidates`, each with `guid`, `hostname`,
/// `site_id` and `site_name`; at most [`NAMED_MAX`] of them.
pub fn ambiguous<'a>(hostname: &str, candidates: impl Iterator<Item = &'a Found>) -> Error {
    let candidates: Vec<&Found> = candidates.take(NAMED_MAX).collect();
    let guids: Vec<String> = candidates.iter().map(|device| guid_text(device.guid)).collect();
    let candidates: Vec<Value> = candidates
        .into_iter()
        .map(|device| json!({"guid": device.guid, "hostname": device.hostname, "site_id": device.site_id, "site_name": device.site_name}))
        .collect();
    Error::conflict("ambiguous_hostname", format!("Several devices are called {hostname}; use the GUID of the one you mean."))
        .with("hostname", hostname)
        .with("guids", guids)
        .with("candidates", candidates)
}
