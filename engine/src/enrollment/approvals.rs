//! Who decides over a request, and what may be decided.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::machines;
use crate::{
    audit, db,
    error::{Error, Kind, Result},
    keys::{guid_text, parse_guid},
    scope::{Actor, Scope},
};

/// The most rows one list answers.
pub const MAX_ROWS: i64 = 10_000;
/// Undecided requests expire after this many days.
pub const PENDING_DAYS: i32 = 7;
/// Approved requests nobody fetched expire after this many hours.
pub const UNCLAIMED_HOURS: i32 = 24;
/// The most requests one round of [`expire_old`] ends.
const EXPIRED_AT_ONCE: i64 = 500;
/// Decided requests are kept this many days.
pub const KEPT_DAYS: i32 = 180;
/// Wrong codes are shown for this many seconds after they were last seen.
pub const WRONG_CODES_S: i32 = 300;

/// A device that has the name or the key of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conflict {
    /// Its GUID, upper case. Absent when the caller may not see it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
    /// The fingerprint of its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssl_key_fingerprint: Option<String>,
    /// Its site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_id: Option<i64>,
    /// The name of its site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub site_name: Option<String>,
    /// Whether the key is the same, so that approval merges into it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fingerprint_match: Option<bool>,
    /// Whether the approver must say what to do, or be an administrator.
    pub requires_prompt: bool,
}

/// A request as operators see it.
#[derive(Debug, Clone, Serialize)]
pub struct Approval {
    /// Its id; null for a wrong code.
    pub id: Option<Uuid>,
    /// What the machine polls with; it is no secret, as a poll needs the machine's key.
    pub approval_reference: Option<Uuid>,
    /// The device it is, or will be, bound to.
    pub guid: Option<String>,
    /// The name the machine gives itself.
    pub hostname_claimed: String,
    /// The fingerprint of its key.
    pub ssl_key_fingerprint_claimed: String,
    /// The code as it was sent; masked for a wrong code.
    pub enrollment_code: String,
    /// Its site.
    pub site_id: Option<i64>,
    /// The site's name.
    pub site_name: Option<String>,
    /// `pending`, `approved`, `denied`, `expired`, `completed`; or `wrong_code`.
    pub status: String,
    /// RFC 3339 UTC.
    pub created_at: String,
    /// RFC 3339 UTC.
    pub updated_at: String,
    /// A user id, `site_auto_approval` or `system`.
    pub approved_by_user_id: Option<String>,
    /// That user's name then.
    pub approved_by_username: Option<String>,
    /// A device in the way; only while pending.
    pub hostname_conflict: Option<Conflict>,
    /// Always null: hostnames may repeat and are not changed.
    pub alternate_hostname: Option<String>,
    /// Whether approving needs a resolution.
    pub conflict_requires_prompt: bool,
    /// Whether the key is a known device's.
    pub fingerprint_match: bool,
    /// The job that installed the agent.
    pub onboarding_job_id: Option<i64>,
    /// Its run.
    pub onboarding_run_id: Option<i64>,
    /// Its target.
    pub onboarding_target: String,
    /// `enrollment`; or `identity`, of a machine that has the identity of the device `guid` and is not the machine it belongs to.
    pub kind: String,
    /// Of an identity: `held` and `current`, what is known of the two machines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub facts: Option<serde_json::Value>,
    /// For a wrong code: where it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remote_addr: Option<String>,
    /// For a wrong code: RFC 3339 UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_seen_at: Option<String>,
    /// For a wrong code: RFC 3339 UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<String>,
    /// For a wrong code: how often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wrong_code_attempt_count: Option<i32>,
    /// For a wrong code: `invalid_enrollment_code`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<&'static str>,
}

fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// The requests in `scope`, oldest first; all of them, or those with one status.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, scope: &Scope, status: Option<&str>, limit: i64) -> Result<Vec<Approval>> {
    let rows = sqlx::query!(
        r#"SELECT a.id, a.approval_reference, a.device_guid, a.hostname_claimed, a.fingerprint, a.enrollment_code, a.site_id,
                  s.name AS "site_name?", a.status, a.created_at, a.updated_at, a.approved_by_user_id, a.approved_by_username,
                  a.onboarding_job_id, a.onboarding_run_id, a.onboarding_target, a.kind, a.facts,
                  c.guid AS "other_guid?", c.fingerprint AS "other_fingerprint?", c.site_id AS "other_site_id?",
                  c.site_name AS "other_site_name?", c.active AS "other_active?"
           FROM device_approvals AS a
           LEFT JOIN sites AS s ON s.id = a.site_id
           LEFT JOIN LATERAL (
               SELECT d.guid, d.fingerprint, d.site_id, ds.name AS site_name, d.status = 'active' AS active
               FROM devices AS d LEFT JOIN sites AS ds ON ds.id = d.site_id
               WHERE d.fingerprint = a.fingerprint
                  OR (d.site_id = a.site_id AND d.hostname_key = a.hostname_claimed_key)
               ORDER BY d.fingerprint = a.fingerprint DESC, d.last_seen DESC NULLS LAST, d.guid
               LIMIT 1
           ) AS c ON a.status = 'pending' AND a.kind = 'enrollment'
           WHERE ($1::bigint[] IS NULL OR a.site_id = ANY($1)) AND ($2::text IS NULL OR a.status = $2)
           ORDER BY a.created_at, a.id
           LIMIT $3"#,
        scope.site_ids(),
        status,
        limit.clamp(1, MAX_ROWS),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let same_key = row.other_fingerprint.as_deref() == Some(row.fingerprint.as_str());
            let here = row.other_site_id == row.site_id;
            // A known key that is active here merges by itself; everything else needs a word or an administrator.
            let requires_prompt = row.other_guid.is_some() && !(same_key && here && row.other_active == Some(true));
            let hostname_conflict = row.other_guid.map(|guid| {
                if scope.contains(row.other_site_id) {
                    Conflict {
                        guid: Some(guid_text(guid)),
                        ssl_key_fingerprint: row.other_fingerprint,
                        site_id: row.other_site_id,
                        site_name: row.other_site_name,
                        fingerprint_match: Some(same_key),
                        requires_prompt,
                    }
                } else {
                    Conflict {
                        guid: None,
                        ssl_key_fingerprint: None,
                        site_id: None,
                        site_name: None,
                        fingerprint_match: None,
                        requires_prompt: true,
                    }
                }
            });
            let visible_match = hostname_conflict.as_ref().and_then(|conflict| conflict.fingerprint_match).unwrap_or(false);
            Approval {
                id: Some(row.id),
                approval_reference: Some(row.approval_reference),
                guid: row.device_guid.map(guid_text),
                hostname_claimed: row.hostname_claimed,
                ssl_key_fingerprint_claimed: row.fingerprint,
                enrollment_code: row.enrollment_code,
                site_id: row.site_id,
                site_name: row.site_name,
                status: row.status,
                created_at: rfc3339(row.created_at),
                updated_at: rfc3339(row.updated_at),
                approved_by_user_id: row.approved_by_user_id,
                approved_by_username: row.approved_by_username,
                conflict_requires_prompt: requires_prompt,
                fingerprint_match: visible_match,
                hostname_conflict,
                alternate_hostname: None,
                onboarding_job_id: row.onboarding_job_id,
                onboarding_run_id: row.onboarding_run_id,
                onboarding_target: row.onboarding_target,
                facts: Some(row.facts).filter(|_| row.kind == "identity"),
                kind: row.kind,
                remote_addr: None,
                first_seen_at: None,
                last_seen_at: None,
                wrong_code_attempt_count: None,
                last_error: None,
            }
        })
        .collect())
}

/// Machines that came with a wrong code in the last [`WRONG_CODES_S`] seconds, newest first. For administrators: nobody
/// knows which site they meant.
///
/// # Errors
/// When the database is away.
pub async fn wrong_codes(pool: &db::Pool) -> Result<Vec<Approval>> {
    let rows = sqlx::query!(
        "SELECT fingerprint, hostname_claimed, code_mask, remote_addr, first_seen_at, last_seen_at, attempt_count
         FROM enrollment_code_failures WHERE last_seen_at > now() - make_interval(secs => $1)
         ORDER BY last_seen_at DESC LIMIT $2",
        f64::from(WRONG_CODES_S),
        MAX_ROWS,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Approval {
            id: None,
            approval_reference: None,
            guid: None,
            hostname_claimed: row.hostname_claimed,
            ssl_key_fingerprint_claimed: row.fingerprint,
            enrollment_code: row.code_mask,
            site_id: None,
            site_name: None,
            status: "wrong_code".to_owned(),
            created_at: rfc3339(row.first_seen_at),
            updated_at: rfc3339(row.last_seen_at),
            approved_by_user_id: None,
            approved_by_username: None,
            hostname_conflict: None,
            alternate_hostname: None,
            conflict_requires_prompt: false,
            fingerprint_match: false,
            onboarding_job_id: None,
            onboarding_run_id: None,
            onboarding_target: String::new(),
            kind: "enrollment".to_owned(),
            facts: None,
            remote_addr: Some(row.remote_addr),
            first_seen_at: Some(rfc3339(row.first_seen_at)),
            last_seen_at: Some(rfc3339(row.last_seen_at)),
            wrong_code_attempt_count: Some(row.attempt_count),
            last_error: Some("invalid_enrollment_code"),
        })
        .collect())
}

/// A site's code, for administrators.
#[derive(Debug, Clone, Serialize)]
pub struct Code {
    /// `site:<id>`.
    pub id: String,
    /// The site.
    pub site_id: i64,
    /// Its name.
    pub site_name: String,
    /// The code.
    pub code: String,
    /// RFC 3339 UTC.
    pub created_at: String,
}

/// Every site's code, by site name.
///
/// # Errors
/// When the database is away.
pub async fn codes(pool: &db::Pool) -> Result<Vec<Code>> {
    let rows = sqlx::query!(
        "SELECT id, name, enrollment_code, created_at FROM sites WHERE enrollment_code <> '' ORDER BY name_key, id LIMIT $1",
        MAX_ROWS,
    )
    .fetch_all(pool)
    .await?;
    let code = |row: (i64, String, String, DateTime<Utc>)| Code {
        id: format!("site:{}", row.0),
        site_id: row.0,
        site_name: row.1,
        code: row.2,
        created_at: rfc3339(row.3),
    };
    Ok(rows.into_iter().map(|row| code((row.id, row.name, row.enrollment_code, row.created_at))).collect())
}

/// What an approver wants done with a device that has the request's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// It is this machine: give it the new key.
    Overwrite,
    /// It is another machine: make a new device of the same name.
    Coexist,
}

/// How an approver wants a request approved.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Bind to this device.
    pub guid: Option<Uuid>,
    /// What to do with a namesake.
    pub resolution: Option<Resolution>,
    /// Whether a device that is not active may come back.
    pub reinstate: bool,
}

impl Wish {
    /// Reads the members of an approve body.
    ///
    /// # Errors
    /// 400 `invalid_guid`, `invalid_conflict_resolution`.
    pub fn parse(guid: Option<&str>, resolution: Option<&str>, reinstate: bool) -> Result<Self> {
        let guid = match guid.map(str::trim) {
            None | Some("") => None,
            Some(text) => Some(parse_guid(text).ok_or_else(|| Error::field("invalid_guid", "guid", "must be a device GUID"))?),
        };
        let resolution = match resolution.map(str::trim) {
            None | Some("") => None,
            Some("overwrite") => Some(Resolution::Overwrite),
            Some("coexist") => Some(Resolution::Coexist),
            Some(_) => {
                let why = "must be overwrite or coexist";
                return Err(Error::field("invalid_conflict_resolution", "conflict_resolution", why));
            }
        };
        Ok(Self { guid, resolution, reinstate })
    }
}

/// A device a decision may concern.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    guid: Uuid,
    site_id: Option<i64>,
    active: bool,
    same_key: bool,
    /// Same site and same name, whatever the key.
    namesake: bool,
}

/// What approving will do.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Binding {
    guid: Option<Uuid>,
    resolution: Option<&'static str>,
}

/// Decides what a request is bound to. `known` holds the device with its key, its namesakes in its site and the device the
/// approver names, as far as they exist.
///
/// An approver of one site can bind only devices of that site: anything that touches another site, a GUID without a device
/// or a device that is not active is an administrator's to decide.
fn bind(wish: &Wish, known: &[Known], hostname: &str, site_id: Option<i64>, scope: &Scope, admin: bool) -> Result<Binding> {
    let named = match wish.resolution {
        Some(Resolution::Overwrite) => Some("overwrite"),
        Some(Resolution::Coexist) => Some("coexist"),
        None => None,
    };
    let itself = known.iter().find(|device| device.same_key);
    let (target, resolution) = if let Some(itself) = itself {
        if wish.guid.is_some_and(|guid| guid != itself.guid) {
            return Err(Error::conflict("fingerprint_in_use", "Another device has this key; a key belongs to one device."));
        }
        (Some(itself), Some("auto_merge_fingerprint"))
    } else if let Some(guid) = wish.guid {
        match known.iter().find(|device| device.guid == guid && scope.contains(device.site_id)) {
            Some(device) => (Some(device), named),
            None if admin => return Ok(Binding { guid: Some(guid), resolution: named }),
            None => return Err(Error::not_found()),
        }
    } else {
        let namesakes: Vec<&Known> = known.iter().filter(|device| device.namesake).collect();
        match (namesakes.as_slice(), wish.resolution) {
            ([], _) => (None, None),
            (_, None) => {
                let message = "A device of this site has this name and another key; say overwrite or coexist.";
                return Err(Error::conflict("conflict_resolution_required", message).with("hostname", hostname));
            }
            (_, Some(Resolution::Coexist)) => (None, Some("coexist")),
            ([one], Some(Resolution::Overwrite)) => (Some(*one), Some("overwrite")),
            (several, Some(Resolution::Overwrite)) => {
                let guids: Vec<String> = several.iter().map(|device| guid_text(device.guid)).collect();
                let message = "Several devices of this site have this name; name the one to overwrite by guid.";
                return Err(Error::conflict("ambiguous_hostname", message).with("guids", guids));
            }
        }
    };
    if let Some(device) = target {
        if !admin && (device.site_id != site_id || !device.active) {
            let message = "The machine is known already; an administrator has to decide about it.";
            return Err(Error::new(Kind::Forbidden, "forbidden", message));
        }
        if !device.active && !wish.reinstate {
            let message = "The device is not active; approve with reinstate to let it back in.";
            return Err(Error::conflict("reinstate_required", message));
        }
    }
    Ok(Binding { guid: target.map(|device| device.guid), resolution })
}

/// What a decision did.
#[derive(Debug, Clone)]
pub struct Decided {
    /// The request.
    pub id: Uuid,
    /// Its site.
    pub site_id: Option<i64>,
    /// The name it asked for.
    pub hostname: String,
    /// How a conflict was resolved.
    pub resolution: Option<&'static str>,
    /// A device that belongs to another machine now: its sockets must close.
    pub moved: Option<Uuid>,
}

struct Open {
    /// Of a machine that is held: the device whose identity it has.
    identity_of: Option<Uuid>,
    hostname: String,
    hostname_key: String,
    fingerprint: String,
    site_id: Option<i64>,
}

/// Locks a pending request in `scope`.
async fn lock(tx: &mut db::Tx<'_>, scope: &Scope, id: Uuid) -> Result<Open> {
    let row = sqlx::query!(
        "SELECT hostname_claimed, hostname_claimed_key, fingerprint, site_id, status, kind, device_guid FROM device_approvals
         WHERE id = $1 AND ($2::bigint[] IS NULL OR site_id = ANY($2)) FOR UPDATE",
        id,
        scope.site_ids(),
    )
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(Error::not_found)?;
    if row.status != "pending" {
        return Err(Error::conflict("approval_not_pending", format!("The request is {} already.", row.status)));
    }
    Ok(Open {
        identity_of: row.device_guid.filter(|_| row.kind == "identity"),
        hostname: row.hostname_claimed,
        hostname_key: row.hostname_claimed_key,
        fingerprint: row.fingerprint,
        site_id: row.site_id,
    })
}

/// Approves a request. Nothing reaches the machine until it polls.
///
/// # Errors
/// 404 `not found`; 403 `forbidden`; 409 `approval_not_pending`, `conflict_resolution_required` (with `hostname`),
/// `ambiguous_hostname` (with `guids`), `fingerprint_in_use`, `reinstate_required`.
pub async fn approve(pool: &db::Pool, scope: &Scope, admin: bool, actor: &Actor, id: Uuid, wish: &Wish) -> Result<Decided> {
    let mut tx = pool.begin().await?;
    let open = lock(&mut tx, scope, id).await?;
    if let Some(device) = open.identity_of {
        move_identity(&mut tx, actor, id, device, &open).await?;
        tx.commit().await?;
        return Ok(Decided { id, site_id: open.site_id, hostname: open.hostname, resolution: None, moved: Some(device) });
    }
    let known = sqlx::query_as!(
        Known,
        r#"SELECT guid, site_id, status = 'active' AS "active!", fingerprint = $1 AS "same_key!",
                  coalesce(site_id = $2 AND hostname_key = $3, false) AS "namesake!"
           FROM devices
           WHERE fingerprint = $1 OR guid = $4 OR (site_id = $2 AND hostname_key = $3)
           ORDER BY fingerprint = $1 DESC, guid = $4 DESC, guid LIMIT 100"#,
        open.fingerprint,
        open.site_id,
        open.hostname_key,
        wish.guid,
    )
    .fetch_all(&mut *tx)
    .await?;
    let binding = bind(wish, &known, &open.hostname, open.site_id, scope, admin)?;
    sqlx::query!(
        "UPDATE device_approvals SET status = 'approved', device_guid = $2, conflict_resolution = $3, approved_by_user_id = $4,
                approved_by_username = $5, decided_as_admin = $6, reinstate = $7, decided_at = now(), updated_at = now()
         WHERE id = $1",
        id,
        binding.guid,
        binding.resolution,
        actor.id,
        actor.name,
        admin,
        wish.reinstate,
    )
    .execute(&mut *tx)
    .await?;
    let detail = json!({
        "hostname": open.hostname, "fingerprint": open.fingerprint, "guid": binding.guid.map(guid_text),
        "conflict_resolution": binding.resolution, "reinstate": wish.reinstate,
    });
    record(&mut tx, actor, "device_approval.approve", id, open.site_id, detail).await?;
    tx.commit().await?;
    Ok(Decided { id, site_id: open.site_id, hostname: open.hostname, resolution: binding.resolution, moved: None })
}

/// Moves the identity of a device to the machine that is held.
async fn move_identity(tx: &mut db::Tx<'_>, actor: &Actor, id: Uuid, device: Uuid, open: &Open) -> Result<()> {
    machines::move_to_held(&mut *tx, device, id).await?;
    sqlx::query!(
        "UPDATE device_approvals SET status = 'completed', approved_by_user_id = $2, approved_by_username = $3, decided_at = now(),
                completed_at = now(), updated_at = now()
         WHERE id = $1",
        id,
        actor.id,
        actor.name,
    )
    .execute(&mut **tx)
    .await?;
    let detail = json!({"kind": "identity", "guid": guid_text(device), "hostname": open.hostname});
    record(tx, actor, "device_approval.approve", id, open.site_id, detail).await
}

/// Denies a request. The machine may ask again; one that is held stays held.
///
/// # Errors
/// 404 `not found`; 409 `approval_not_pending`.
pub async fn deny(pool: &db::Pool, scope: &Scope, actor: &Actor, id: Uuid) -> Result<Decided> {
    let mut tx = pool.begin().await?;
    let open = lock(&mut tx, scope, id).await?;
    sqlx::query!(
        "UPDATE device_approvals SET status = 'denied', approved_by_user_id = $2, approved_by_username = $3,
                decided_at = now(), updated_at = now()
         WHERE id = $1",
        id,
        actor.id,
        actor.name,
    )
    .execute(&mut *tx)
    .await?;
    let detail = json!({"hostname": open.hostname, "fingerprint": open.fingerprint});
    record(&mut tx, actor, "device_approval.deny", id, open.site_id, detail).await?;
    tx.commit().await?;
    Ok(Decided { id, site_id: open.site_id, hostname: open.hostname, resolution: None, moved: None })
}

async fn record(
    tx: &mut db::Tx<'_>,
    actor: &Actor,
    action: &str,
    id: Uuid,
    site_id: Option<i64>,
    detail: serde_json::Value,
) -> Result<()> {
    let entry =
        audit::Entry { action, object_kind: "device_approval", object_id: id.to_string(), site_id, failed: false, detail };
    audit::record(tx, actor, entry).await
}

/// Notes that a request ended by itself.
pub(super) async fn record_expired(tx: &mut db::Tx<'_>, id: Uuid, site_id: Option<i64>, why: &str) -> Result<()> {
    let actor = Actor::system();
    record(tx, &actor, "device_approval.expire", id, site_id, json!({"reason": why})).await
}

/// Ends requests nobody decided or fetched in time, 500 at once, and removes what is only history: decided requests, dead
/// refresh tokens, old wrong codes. For the housekeeping loop; safe to call from several processes. Answers how many expired.
///
/// # Errors
/// When the database is away.
pub async fn expire_old(pool: &db::Pool) -> Result<u64> {
    let mut tx = pool.begin().await?;
    let expired = sqlx::query!(
        r#"UPDATE device_approvals AS a SET status = 'expired', updated_at = now()
           FROM (SELECT id, status FROM device_approvals
                 WHERE (status = 'pending' AND updated_at < now() - make_interval(days => $1))
                    OR (status = 'approved' AND coalesce(decided_at, updated_at) < now() - make_interval(hours => $2))
                 ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED) AS old
           WHERE a.id = old.id RETURNING a.id, a.site_id, old.status = 'pending' AS "undecided!""#,
        PENDING_DAYS,
        UNCLAIMED_HOURS,
        EXPIRED_AT_ONCE,
    )
    .fetch_all(&mut *tx)
    .await?;
    for row in &expired {
        let why = if row.undecided { "nobody decided" } else { "nobody fetched the tokens" };
        record_expired(&mut tx, row.id, row.site_id, why).await?;
    }
    tx.commit().await?;
    sqlx::query!(
        "DELETE FROM device_approvals
         WHERE status IN ('denied', 'expired', 'completed') AND updated_at < now() - make_interval(days => $1)",
        KEPT_DAYS,
    )
    .execute(pool)
    .await?;
    sqlx::query!(
        "DELETE FROM refresh_tokens
         WHERE expires_at < now() - interval '30 days' OR revoked_at < now() - interval '30 days'
            OR rotated_at < now() - interval '90 days'"
    )
    .execute(pool)
    .await?;
    sqlx::query!("DELETE FROM enrollment_code_failures WHERE last_seen_at < now() - interval '24 hours'").execute(pool).await?;
    Ok(expired.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Option<i64> = Some(1);

    fn device(guid: u128) -> Known {
        Known { guid: Uuid::from_u128(guid), site_id: HERE, active: true, same_key: false, namesake: false }
    }

    fn decide(wish: &Wish, known: &[Known], admin: bool) -> Result<Binding> {
        let scope = if admin { Scope::All } else { Scope::Sites(vec![1]) };
        bind(wish, known, "web", HERE, &scope, admin)
    }

    fn code(wish: &Wish, known: &[Known], admin: bool) -> &'static str {
        decide(wish, known, admin).unwrap_err().code
    }

    #[test]
    fn a_key_is_its_device_and_needs_an_administrator_elsewhere() {
        let itself = Known { same_key: true, ..device(1) };
        let merged = Binding { guid: Some(itself.guid), resolution: Some("auto_merge_fingerprint") };
        assert_eq!(decide(&Wish::default(), std::slice::from_ref(&itself), false).unwrap(), merged);
        let coexist = Wish { resolution: Some(Resolution::Coexist), ..Wish::default() };
        assert_eq!(decide(&coexist, std::slice::from_ref(&itself), false).unwrap(), merged);
        let other = Wish { guid: Some(Uuid::from_u128(2)), ..Wish::default() };
        assert_eq!(code(&other, &[itself.clone(), device(2)], true), "fingerprint_in_use");

        let elsewhere = Known { site_id: Some(2), ..itself.clone() };
        assert_eq!(code(&Wish::default(), std::slice::from_ref(&elsewhere), false), "forbidden");
        assert!(decide(&Wish::default(), &[elsewhere], true).is_ok());

        let revoked = Known { active: false, ..itself };
        let reinstate = Wish { reinstate: true, ..Wish::default() };
        assert_eq!(code(&reinstate, std::slice::from_ref(&revoked), false), "forbidden");
        assert_eq!(code(&Wish::default(), std::slice::from_ref(&revoked), true), "reinstate_required");
        assert!(decide(&reinstate, &[revoked], true).is_ok());
    }

    #[test]
    fn a_namesake_asks_for_a_word() {
        let namesake = Known { namesake: true, ..device(1) };
        let overwrite = Wish { resolution: Some(Resolution::Overwrite), ..Wish::default() };
        let coexist = Wish { resolution: Some(Resolution::Coexist), ..Wish::default() };
        assert_eq!(code(&Wish::default(), std::slice::from_ref(&namesake), true), "conflict_resolution_required");
        assert_eq!(decide(&overwrite, std::slice::from_ref(&namesake), false).unwrap().guid, Some(namesake.guid));
        assert_eq!(decide(&coexist, std::slice::from_ref(&namesake), false).unwrap().guid, None);
        let twins = [namesake.clone(), Known { guid: Uuid::from_u128(2), ..namesake }];
        assert_eq!(code(&overwrite, &twins, true), "ambiguous_hostname");
        let named = Wish { guid: Some(Uuid::from_u128(2)), ..overwrite.clone() };
        assert_eq!(decide(&named, &twins, false).unwrap().guid, Some(Uuid::from_u128(2)));
        assert_eq!(decide(&overwrite, &[], false).unwrap(), Binding { guid: None, resolution: None });
    }

    #[test]
    fn a_named_device_must_be_the_approvers_to_bind() {
        let wish = Wish { guid: Some(Uuid::from_u128(1)), ..Wish::default() };
        assert_eq!(decide(&wish, &[device(1)], false).unwrap().guid, wish.guid);
        let elsewhere = Known { site_id: Some(2), ..device(1) };
        assert_eq!(code(&wish, std::slice::from_ref(&elsewhere), false), "not found");
        assert_eq!(code(&wish, &[], false), "not found", "unknown and foreign look the same");
        assert_eq!(decide(&wish, &[elsewhere], true).unwrap().guid, wish.guid);
        assert_eq!(decide(&wish, &[], true).unwrap().guid, wish.guid);
        let two_sites = Scope::Sites(vec![1, 2]);
        let moving = [Known { site_id: Some(2), ..device(1) }];
        assert_eq!(bind(&wish, &moving, "web", HERE, &two_sites, false).unwrap_err().code, "forbidden");
    }

    #[test]
    fn unknown_words_are_refused() {
        assert_eq!(Wish::parse(None, Some("merge"), false).unwrap_err().code, "invalid_conflict_resolution");
        assert_eq!(Wish::parse(Some("x"), None, false).unwrap_err().code, "invalid_guid");
        assert!(Wish::parse(Some(""), Some(""), false).unwrap().guid.is_none());
    }
}
