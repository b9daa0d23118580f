//! Sites: what devices belong to, what operators are assigned to, and what an enrollment code opens.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Duration, Utc};
use serde_json::json;
use uuid::Uuid;

use crate::{
    audit::{self, Entry},
    db,
    devices::lookup,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::{Actor, Scope},
};

/// The most characters of a name.
pub const NAME_MAX_CHARS: usize = 200;
/// The most characters of a description.
pub const DESCRIPTION_MAX_CHARS: usize = 2000;
/// How far ahead auto-approval may be switched on.
pub const AUTO_APPROVAL_MAX: Duration = Duration::days(7);
/// The most sites or devices in one request.
pub const BATCH_MAX: usize = 1000;
/// How many codes are tried before giving up; with 128 random bits the second is never needed.
const CODE_TRIES: u32 = 12;

/// A site.
#[derive(Debug, Clone)]
pub struct Site {
    /// Its id.
    pub id: i64,
    /// Its name, unique in any case.
    pub name: String,
    /// What it is.
    pub description: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// How many devices belong to it.
    pub device_count: i64,
    /// What an agent presents to ask for enrollment; 8 groups of 4 upper-case hex digits.
    pub enrollment_code: String,
    /// Until when it opens anything; none for ever.
    pub enrollment_code_expires_at: Option<DateTime<Utc>>,
    /// Until when enrollments are approved without an operator.
    pub auto_approve_until: Option<DateTime<Utc>>,
}

/// Which sites a list shows.
#[derive(Debug, Clone, Default)]
pub struct Which {
    /// This one.
    pub id: Option<i64>,
    /// The one of this name, in any case.
    pub name: Option<String>,
}

impl Site {
    /// Whether enrollments are approved without an operator at this moment.
    #[must_use]
    pub fn auto_approval_active(&self, now: DateTime<Utc>) -> bool {
        self.auto_approve_until.is_some_and(|until| until > now)
    }
}

/// The most days an enrollment code is given.
pub const CODE_MAX_DAYS: i32 = 3650;

/// How many days an enrollment code opens a site; none for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeDays(Option<i32>);

impl CodeDays {
    /// So many, 0 for ever; none of them when it is too many.
    #[must_use]
    pub fn new(days: i32) -> Option<Self> {
        (0..=CODE_MAX_DAYS).contains(&days).then_some(Self((days > 0).then_some(days)))
    }
}

/// A new enrollment code: 128 random bits.
#[must_use]
pub fn new_enrollment_code() -> String {
    let groups: Vec<String> = rand::random::<[u16; 8]>().iter().map(|group| format!("{group:04X}")).collect();
    groups.join("-")
}

/// The one form in which codes are compared: without dashes and blanks, upper case.
#[must_use]
pub fn normal_enrollment_code(text: &str) -> String {
    text.chars().filter(|c| *c != '-' && !c.is_whitespace()).map(|c| c.to_ascii_uppercase()).collect()
}

fn name(text: &str, field: &'static str) -> Result<Name> {
    if text.trim().is_empty() {
        let code = if field == "name" { "name is required" } else { "new_name is required" };
        return Err(Error::field(code, field, "is required."));
    }
    Name::parse(text, &Rule { field, code: "invalid_name", max_chars: NAME_MAX_CHARS, in_paths: false })
}

/// Checks until when auto-approval is to be on; none switches it off.
fn auto_approval(until: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>> {
    let Some(until) = until else { return Ok(None) };
    if until <= now {
        return Err(Error::field("auto_approve_until must be in the future", "auto_approve_until", "must be in the future."));
    }
    if until > now + AUTO_APPROVAL_MAX {
        return Err(Error::field("invalid auto_approve_until", "auto_approve_until", "must be at most 7 days ahead."));
    }
    Ok(Some(until))
}

fn not_found() -> Error {
    Error::new(Kind::NotFound, "site not found", "There is no such site.")
}

fn name_taken(error: sqlx::Error) -> Error {
    Error::from(error)
        .on_constraint("sites_name_key", || Error::conflict("name already exists", "There is a site of this name already."))
}

/// The sites the caller may see, by name.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, scope: &Scope, which: &Which) -> Result<Vec<Site>> {
    Ok(sqlx::query_as!(
        Site,
        r#"SELECT s.id, s.name, s.description, s.created_at, s.enrollment_code, s.enrollment_code_expires_at, s.auto_approve_until,
                  (SELECT count(*) FROM devices d WHERE d.site_id = s.id) AS "device_count!"
           FROM sites s
           WHERE ($1::bigint[] IS NULL OR s.id = ANY($1)) AND ($2::bigint IS NULL OR s.id = $2) AND ($3::text IS NULL OR s.name_key = $3)
           ORDER BY s.name_key"#,
        scope.site_ids(),
        which.id,
        which.name.as_deref().map(names::key),
    )
    .fetch_all(pool)
    .await?)
}

/// One site in `scope`.
///
/// # Errors
/// 404 `site not found`.
pub async fn one(pool: &db::Pool, scope: &Scope, id: i64) -> Result<Site> {
    list(pool, scope, &Which { id: Some(id), name: None }).await?.pop().ok_or_else(not_found)
}

async fn get(tx: &mut db::Tx<'_>, id: i64) -> Result<Site> {
    sqlx::query_as!(
        Site,
        r#"SELECT s.id, s.name, s.description, s.created_at, s.enrollment_code, s.enrollment_code_expires_at, s.auto_approve_until,
                  (SELECT count(*) FROM devices d WHERE d.site_id = s.id) AS "device_count!"
           FROM sites s WHERE s.id = $1"#,
        id,
    )
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(not_found)
}

async fn record(tx: &mut db::Tx<'_>, actor: &Actor, action: &str, site: i64, detail: serde_json::Value) -> Result<()> {
    let entry =
        Entry { action, object_kind: "site", object_id: site.to_string(), site_id: Some(site), detail, ..Entry::default() };
    audit::record(tx, actor, entry).await
}

/// Makes a site with a new enrollment code.
///
/// # Errors
/// 400 `name is required`, `invalid_name`, `invalid_description`; 409 `name already exists`;
/// 500 `unable_to_generate_enrollment_code`.
pub async fn create(pool: &db::Pool, actor: &Actor, new_name: &str, description: &str, code_days: CodeDays) -> Result<Site> {
    let name = name(new_name, "name")?;
    let description = description.trim();
    if description.chars().count() > DESCRIPTION_MAX_CHARS {
        return Err(Error::field(
            "invalid_description",
            "description",
            format!("must have at most {DESCRIPTION_MAX_CHARS} characters."),
        ));
    }
    let mut tx = pool.begin().await?;
    for _ in 0..CODE_TRIES {
        let id = sqlx::query_scalar!(
            "INSERT INTO sites (name, name_key, description, enrollment_code, enrollment_code_expires_at)
             VALUES ($1, $2, $3, $4, now() + make_interval(days => $5))
             ON CONFLICT (enrollment_code) DO NOTHING RETURNING id",
            name.as_str(),
            name.key(),
            description,
            new_enrollment_code(),
            code_days.0,
        )
        .fetch_optional(&mut *tx)
        .await
        .map_err(name_taken)?;
        if let Some(id) = id {
            record(&mut tx, actor, "site.create", id, json!({ "name": name.as_str() })).await?;
            let site = get(&mut tx, id).await?;
            tx.commit().await?;
            return Ok(site);
        }
    }
    Err(Error::new(Kind::Bug, "unable_to_generate_enrollment_code", "No free enrollment code was found."))
}

/// Renames a site.
///
/// # Errors
/// 400 `new_name is required`, `invalid_name`; 404 `site not found`; 409 `name already exists`.
pub async fn rename(pool: &db::Pool, actor: &Actor, id: i64, new_name: &str) -> Result<Site> {
    let name = name(new_name, "new_name")?;
    let mut tx = pool.begin().await?;
    let before = sqlx::query_scalar!("SELECT name FROM sites WHERE id = $1 FOR UPDATE", id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    sqlx::query!("UPDATE sites SET name = $2, name_key = $3 WHERE id = $1", id, name.as_str(), name.key())
        .execute(&mut *tx)
        .await
        .map_err(name_taken)?;
    record(&mut tx, actor, "site.rename", id, json!({ "before": before, "after": name.as_str() })).await?;
    let site = get(&mut tx, id).await?;
    tx.commit().await?;
    Ok(site)
}

/// Gives a site another enrollment code; the old one opens nothing from then on. Requests made with it wait on, for a
/// person to decide.
///
/// # Errors
/// 404 `site not found`; 500 `unable_to_generate_enrollment_code`.
pub async fn rotate_enrollment_code(pool: &db::Pool, actor: &Actor, id: i64, code_days: CodeDays) -> Result<Site> {
    let mut tx = pool.begin().await?;
    let taken = || Error::new(Kind::Bug, "unable_to_generate_enrollment_code", "No free enrollment code was found.");
    let changed = sqlx::query!(
        "UPDATE sites SET enrollment_code = $2, enrollment_code_expires_at = now() + make_interval(days => $3) WHERE id = $1",
        id,
        new_enrollment_code(),
        code_days.0,
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| Error::from(error).on_constraint("sites_enrollment_code_key", taken))?;
    if changed.rows_affected() == 0 {
        return Err(not_found());
    }
    record(&mut tx, actor, "site.rotate_enrollment_code", id, json!({ "days": code_days.0 })).await?;
    let site = get(&mut tx, id).await?;
    tx.commit().await?;
    Ok(site)
}

/// Approves the site's enrollments without an operator until then, or with one again.
///
/// # Errors
/// 400 `invalid auto_approve_until`, `auto_approve_until must be in the future`; 404 `site not found`.
pub async fn set_auto_approval(pool: &db::Pool, actor: &Actor, id: i64, until: Option<DateTime<Utc>>) -> Result<Site> {
    let until = auto_approval(until, Utc::now())?;
    let mut tx = pool.begin().await?;
    let before = sqlx::query_scalar!("SELECT auto_approve_until FROM sites WHERE id = $1 FOR UPDATE", id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    sqlx::query!("UPDATE sites SET auto_approve_until = $2 WHERE id = $1", id, until).execute(&mut *tx).await?;
    record(&mut tx, actor, "site.auto_approval", id, json!({ "before": before, "after": until })).await?;
    let site = get(&mut tx, id).await?;
    tx.commit().await?;
    Ok(site)
}

/// Deletes sites; their devices belong to no site then, and are returned. Unknown ids are passed over. Returns how many
/// sites were deleted.
///
/// # Errors
/// 400 `too_many_sites`; 409 `site_in_use` with the jobs that name one of them or the credentials that belong to one: then nothing is deleted.
pub async fn delete(pool: &db::Pool, actor: &Actor, ids: &[i64]) -> Result<(usize, Vec<Uuid>)> {
    let ids: Vec<i64> = ids.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    if ids.len() > BATCH_MAX {
        return Err(Error::field("too_many_sites", "ids", format!("must name at most {BATCH_MAX} sites.")));
    }
    let mut tx = pool.begin().await?;
    let sites =
        sqlx::query!("SELECT id, name FROM sites WHERE id = ANY($1) ORDER BY id FOR UPDATE", &ids).fetch_all(&mut *tx).await?;
    let jobs = sqlx::query!(
        "SELECT id, name FROM scheduled_jobs
         WHERE scope_site_ids && $1
            OR jsonb_path_exists(targets, '$[*] ? (@.site_id == $ids[*] || @.allowed_site_ids[*] == $ids[*])',
                                 jsonb_build_object('ids', to_jsonb($1::bigint[])))
         ORDER BY id LIMIT 50",
        &ids,
    )
    .fetch_all(&mut *tx)
    .await?;
    if !jobs.is_empty() {
        let jobs: Vec<_> = jobs.into_iter().map(|job| json!({ "id": job.id, "name": job.name })).collect();
        return Err(Error::conflict("site_in_use", "Scheduled jobs name one of these sites; change or delete them first.")
            .with("jobs", jobs));
    }
    let credentials = sqlx::query!("SELECT id, name FROM credentials WHERE site_id = ANY($1) ORDER BY id LIMIT 50", &ids)
        .fetch_all(&mut *tx)
        .await?;
    if !credentials.is_empty() {
        // Without its site, a credential would be for every site.
        let credentials: Vec<_> = credentials.into_iter().map(|row| json!({ "id": row.id, "name": row.name })).collect();
        return Err(Error::conflict("site_in_use", "Credentials belong to one of these sites; move or delete them first.")
            .with("credentials", credentials));
    }
    let devices = sqlx::query_scalar!("UPDATE devices SET site_id = NULL WHERE site_id = ANY($1) RETURNING guid", &ids)
        .fetch_all(&mut *tx)
        .await?;
    sqlx::query!("DELETE FROM sites WHERE id = ANY($1)", &ids).execute(&mut *tx).await?;
    for site in &sites {
        record(&mut tx, actor, "site.delete", site.id, json!({ "name": site.name })).await?;
    }
    tx.commit().await?;
    Ok((sites.len(), devices))
}

/// One device's place in [`device_map`].
#[derive(Debug, Clone)]
pub struct Place {
    /// The hostname, as stored.
    pub hostname: String,
    /// Its site.
    pub site_id: i64,
    /// The site's name.
    pub site_name: String,
}

/// To which sites hostnames belong; with none given, all of them. Of namesakes the one seen last counts.
///
/// # Errors
/// When the database is away.
pub async fn device_map(pool: &db::Pool, scope: &Scope, hostnames: Option<&[String]>) -> Result<Vec<Place>> {
    let hostnames: Option<Vec<String>> = hostnames.map(|names| names.iter().map(|name| names::key(name)).collect());
    Ok(sqlx::query_as!(
        Place,
        r#"SELECT DISTINCT ON (d.hostname_key) d.hostname, s.id AS site_id, s.name AS site_name
           FROM devices d JOIN sites s ON s.id = d.site_id
           WHERE ($1::bigint[] IS NULL OR d.site_id = ANY($1)) AND ($2::text[] IS NULL OR d.hostname_key = ANY($2))
           ORDER BY d.hostname_key, d.last_seen DESC NULLS LAST, d.guid"#,
        scope.site_ids(),
        hostnames.as_deref(),
    )
    .fetch_all(pool)
    .await?)
}

/// Puts devices, named by hostname or GUID, into a site. Returns those that have moved.
///
/// # Errors
/// 400 `too_many_hostnames`, `unknown_target` with the names no device has; 404 `site not found`;
/// 409 `ambiguous_hostname` as [`lookup::ambiguous`]. In all cases nothing is moved.
pub async fn assign(pool: &db::Pool, actor: &Actor, site_id: i64, names: &[String]) -> Result<Vec<Uuid>> {
    if names.len() > BATCH_MAX {
        return Err(Error::field("too_many_hostnames", "hostnames", format!("must name at most {BATCH_MAX} devices.")));
    }
    let names: BTreeMap<String, &String> =
        names.iter().filter(|name| !name.trim().is_empty()).map(|name| (names::key(name.trim()), name)).collect();
    let guids: Vec<Uuid> = names.keys().filter_map(|name| Uuid::try_parse(name).ok()).collect();
    let keys: Vec<String> = names.keys().cloned().collect();
    let mut tx = pool.begin().await?;
    let site = sqlx::query_scalar!("SELECT name FROM sites WHERE id = $1 FOR SHARE", site_id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    let found = lookup::all(&mut tx, &Scope::All, &guids, &keys).await?;
    let (mut named, mut unknown) = (Vec::new(), Vec::new());
    for (name, typed) in &names {
        let guid = Uuid::try_parse(name).ok();
        let by_guid: Vec<_> = found.iter().filter(|device| Some(device.guid) == guid).collect();
        let by_name = || found.iter().filter(|device| device.hostname_key == *name).collect();
        match if by_guid.is_empty() { by_name() } else { by_guid }[..] {
            [] => unknown.push(typed.trim().to_owned()),
            [device] => named.push(device.guid),
            ref namesakes => return Err(lookup::ambiguous(typed.trim(), namesakes.iter().copied())),
        }
    }
    if !unknown.is_empty() {
        return Err(Error::field("unknown_target", "hostnames", "some of these devices do not exist.").with("hostnames", unknown));
    }
    let devices = sqlx::query!(
        "SELECT guid, hostname, site_id FROM devices WHERE guid = ANY($1) AND site_id IS DISTINCT FROM $2 ORDER BY guid FOR UPDATE",
        &named,
        site_id,
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut changed = Vec::new();
    for device in devices {
        let entry = Entry {
            action: "device.assign_site",
            object_kind: "device",
            object_id: device.guid.to_string(),
            site_id: Some(site_id),
            detail: json!({ "hostname": device.hostname, "before": device.site_id, "after": site_id, "site": site }),
            ..Entry::default()
        };
        audit::record(&mut tx, actor, entry).await?;
        changed.push(device.guid);
    }
    sqlx::query!("UPDATE devices SET site_id = $2 WHERE guid = ANY($1)", &changed, site_id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_128_bits_in_eight_groups() {
        let code = new_enrollment_code();
        assert_eq!((code.len(), code.split('-').count()), (39, 8));
        assert!(
            code.split('-')
                .all(|group| group.len() == 4 && group.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)))
        );
        assert_ne!(code, new_enrollment_code());
        assert_eq!(normal_enrollment_code(&format!(" {} ", code.to_lowercase().replace('-', " - "))), code.replace('-', ""));
    }

    #[test]
    fn auto_approval_lies_ahead_and_not_further_than_a_week() {
        let now = Utc::now();
        assert_eq!(auto_approval(None, now).unwrap(), None);
        assert_eq!(auto_approval(Some(now + Duration::days(7)), now).unwrap(), Some(now + Duration::days(7)));
        let code = |until| auto_approval(Some(until), now).unwrap_err().code;
        assert_eq!(code(now), "auto_approve_until must be in the future");
        assert_eq!(code(now + Duration::days(7) + Duration::seconds(1)), "invalid auto_approve_until");
    }

    #[test]
    fn names_are_trimmed_and_bounded() {
        assert_eq!(name(" Berlin ", "name").unwrap().as_str(), "Berlin");
        assert_eq!(name(" ", "name").unwrap_err().code, "name is required");
        assert_eq!(name("", "new_name").unwrap_err().code, "new_name is required");
        let error = name(&"x".repeat(201), "new_name").unwrap_err();
        assert!(error.code == "invalid_name" && error.fields.contains_key("new_name"));
    }
}
