//! The two hostnames of a device: the approved one, by which it is addressed, and the one its agent reports. Only an operator makes
//! the one the other.

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    audit, db,
    enrollment::{approvals::Resolution, tokens::DeviceIdentity},
    error::{Error, Result},
    keys::guid_text,
    names::Name,
    scope::{Actor, ActorKind, Scope},
};

/// A device's changed hostname is written to the audit at most once in this many seconds.
pub const EVENT_S: i32 = 600;
/// The most devices an error or event names.
const NAMED_MAX: i64 = 20;

/// Keeps the hostname that an agent reports, where it differs from what it reported before. What differs from before but for case
/// is an event of the audit, with the devices of the site that have the name. To be called inside a transaction.
///
/// # Errors
/// When the database refuses.
pub async fn reported(conn: &mut PgConnection, device: &DeviceIdentity, name: &Name) -> Result<()> {
    let row = sqlx::query!(
        r#"UPDATE devices SET reported_hostname = $2, reported_hostname_key = $3,
                  reported_hostname_event_at = CASE
                      WHEN reported_hostname_key <> $3 AND (reported_hostname_key <> '' OR hostname_key <> $3)
                           AND coalesce(reported_hostname_event_at < now() - make_interval(secs => $4), true)
                      THEN now() ELSE reported_hostname_event_at END
           WHERE guid = $1
           RETURNING hostname, site_id, coalesce(reported_hostname_event_at = now(), false) AS "is_event!""#,
        device.guid,
        name.as_str(),
        name.key(),
        f64::from(EVENT_S),
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row.filter(|row| row.is_event) else { return Ok(()) };
    let namesakes = namesakes(conn, device.guid, row.site_id, name.key()).await?;
    let actor = Actor { kind: ActorKind::Device, id: guid_text(device.guid), name: row.hostname.clone(), ..Actor::default() };
    let entry = audit::Entry {
        action: "device.hostname_reported",
        object_kind: "device",
        object_id: guid_text(device.guid),
        site_id: row.site_id,
        detail: json!({"hostname": row.hostname, "reported_hostname": name.as_str(), "namesakes": namesakes}),
        ..audit::Entry::default()
    };
    audit::record(conn, &actor, entry).await
}

/// The other devices of a site with this name, as GUIDs.
async fn namesakes(conn: &mut PgConnection, device: Uuid, site_id: Option<i64>, key: &str) -> Result<Vec<String>> {
    let guids = sqlx::query_scalar!(
        "SELECT guid FROM devices WHERE hostname_key = $1 AND guid <> $2 AND site_id IS NOT DISTINCT FROM $3 ORDER BY guid LIMIT $4",
        key,
        device,
        site_id,
        NAMED_MAX,
    )
    .fetch_all(conn)
    .await?;
    Ok(guids.into_iter().map(guid_text).collect())
}

/// What an operator approved.
#[derive(Debug, Clone)]
pub struct Renamed {
    /// The hostname before.
    pub before: String,
    /// The hostname now.
    pub hostname: String,
    /// The device's site.
    pub site_id: Option<i64>,
}

/// Makes the hostname that a device in `scope` reports its approved one. `seen` is that hostname as the operator saw it, so that
/// another one reported since is not approved by mistake.
///
/// # Errors
/// 404 `not found`; 409 `hostname_not_reported` with `reported_hostname`, `conflict_resolution_required` with `guids` when a device of
/// the site has the name and `resolution` does not say that both may have it.
pub async fn approve(
    pool: &db::Pool,
    scope: &Scope,
    actor: &Actor,
    guid: Uuid,
    seen: &Name,
    resolution: Option<Resolution>,
) -> Result<Renamed> {
    let mut tx = pool.begin().await?;
    let device = sqlx::query!(
        "SELECT hostname, reported_hostname, reported_hostname_key, site_id FROM devices
         WHERE guid = $1 AND ($2::bigint[] IS NULL OR site_id = ANY($2)) FOR UPDATE",
        guid,
        scope.site_ids(),
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(Error::not_found)?;
    if device.reported_hostname_key != seen.key() {
        return Err(Error::conflict("hostname_not_reported", "The device does not report this hostname now.")
            .with("reported_hostname", device.reported_hostname));
    }
    let namesakes = namesakes(&mut tx, guid, device.site_id, seen.key()).await?;
    if !namesakes.is_empty() && resolution != Some(Resolution::Coexist) {
        let message = "A device of this site has this name; say coexist to have two of it.";
        return Err(Error::conflict("conflict_resolution_required", message).with("guids", namesakes));
    }
    sqlx::query!(
        "UPDATE devices SET hostname = $2, hostname_key = $3 WHERE guid = $1",
        guid,
        device.reported_hostname,
        device.reported_hostname_key,
    )
    .execute(&mut *tx)
    .await?;
    let entry = audit::Entry {
        action: "device.hostname_approve",
        object_kind: "device",
        object_id: guid_text(guid),
        site_id: device.site_id,
        detail: json!({"before": device.hostname, "after": device.reported_hostname, "namesakes": namesakes}),
        ..audit::Entry::default()
    };
    audit::record(&mut tx, actor, entry).await?;
    tx.commit().await?;
    Ok(Renamed { before: device.hostname, hostname: device.reported_hostname, site_id: device.site_id })
}
