//! What to run: assemblies, made, changed and removed by operators.
//!
//! An assembly is named by its guid. Guids are chosen here, and by administrators who import an assembly; never by operators, so
//! that nobody can put a script where a job of others expects one. What jobs of other sites run is nobody's to change who does not
//! see these sites. Documents are parsed and hashed on the pool for such work, before the transaction that writes them.

mod document;
mod paths;
mod run;
#[cfg(test)]
mod tests;
mod transfer;

use std::sync::Arc;

use borealis_protocol::canonical;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use sqlx::PgConnection;
use uuid::Uuid;

pub use document::{Script, Variable, VariableKind};
pub(crate) use paths::fold_anew as fold_paths_anew;
pub use paths::{Reference, resolve};
pub use run::{Prepared, RunMode, ScriptRequest, Source, prepare, source};
pub use transfer::{ImportBody, export, import};

use crate::{
    audit::{self, Entry},
    db::Pool,
    error::{Error, Kind, Result},
    json::{self, Limits},
    names::{Name, Rule},
    quotas,
    scope::{Actor, Caller},
    work,
};

/// The largest body that carries an assembly, in bytes.
pub const BODY_MAX: usize = 32 * 1024 * 1024;
/// The most values a document may have, as [`json::Size::values`] counts them.
pub const VALUES_MAX: usize = 100_000;
/// The longest guid, name, subtype or source text, in characters.
pub const TEXT_MAX: usize = 200;
/// The longest summary, in characters.
pub const SUMMARY_MAX: usize = 4_000;
/// The limit of a script that names none, in seconds.
pub const TIMEOUT_DEFAULT_S: u32 = 3_600;
/// The longest limit a script may name, in seconds; 0 is no limit.
pub const TIMEOUT_MAX_S: i64 = 30 * 24 * 3_600;
/// The longest script, in bytes of UTF-8.
pub const SCRIPT_MAX: usize = 4 * 1024 * 1024;
/// The most files of a script.
pub const FILES_MAX: usize = 100;
/// The most bytes of file data, in base64, that travel with a script; beyond, its files are named without their data.
/// Agents of today use no files of scripts.
pub const FILES_SENT_MAX: usize = 1024 * 1024;
/// How often a change is tried again that others come before.
const CHANGE_ATTEMPTS: usize = 3;
/// Names of routes below `/api/assemblies`, and what no path can hold.
const RESERVED_GUIDS: [&str; 5] = ["import", "official", "dev-mode", ".", ".."];
/// The most assemblies one page holds.
pub const PAGE_MAX: i64 = 1_000;
/// Types of script an agent runs.
pub const SCRIPT_TYPES: [&str; 3] = ["powershell", "batch", "bash"];

/// The body of `POST /api/assemblies`, and of `PUT` with every field optional.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AssemblyBody {
    /// `user`; `official` and `community` need dev mode.
    pub domain: Option<String>,
    /// The document: an object, or text kept as it is.
    pub payload: Option<Value>,
    /// Chosen by an administrator, or generated: 32 lower-case hex.
    pub assembly_guid: Option<String>,
    /// By default the guid.
    pub display_name: Option<String>,
    /// One or two sentences.
    pub summary: Option<String>,
    /// `script`.
    pub assembly_type: Option<String>,
    /// `powershell`, `batch` or `bash`; by default the document's.
    pub assembly_subtype: Option<String>,
    /// Where it came from.
    pub source_repo: Option<String>,
    /// Where it came from.
    pub source_path: Option<String>,
    /// Where it came from.
    pub source_version: Option<String>,
    /// For an update: the hash of what is to be changed, as `If-Match`.
    pub content_hash: Option<String>,
}

/// An assembly as lists show it.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are named as clients of the reference read them")]
pub struct Item {
    pub assembly_guid: String,
    pub assembly_id: String,
    pub name: String,
    pub display_name: String,
    pub description: String,
    pub summary: String,
    pub assembly_type: String,
    pub assembly_subtype: String,
    pub source: String,
    pub is_dirty: bool,
    pub dirty_since: Option<String>,
    pub last_persisted: String,
    pub payload_guid: String,
    pub source_repo: Option<String>,
    pub source_path: Option<String>,
    pub source_version: Option<String>,
    pub virtual_path: String,
    pub path: String,
    pub created_at: String,
    pub updated_at: String,
    pub content_hash: String,
    pub last_edited_by: String,
}

/// An assembly with its document.
#[derive(Debug, Clone, Serialize)]
pub struct Detail {
    /// The item.
    #[serde(flatten)]
    pub item: Item,
    /// The exact stored text.
    pub payload: String,
    /// The text as JSON, with the `script_encoding` of its script; null when it is not JSON.
    pub payload_json: Option<Box<RawValue>>,
}

/// Which assemblies a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this domain; unknown text is no filter.
    pub domain: Option<String>,
    /// Of this type.
    pub assembly_type: Option<String>,
    /// With exactly this display name.
    pub name: Option<String>,
}

struct Row {
    guid: String,
    domain: String,
    display_name: String,
    summary: String,
    assembly_type: String,
    assembly_subtype: String,
    content_hash: String,
    source_repo: Option<String>,
    source_path: Option<String>,
    source_version: Option<String>,
    path: String,
    last_edited_by: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    description: Option<String>,
}

impl From<Row> for Item {
    fn from(row: Row) -> Self {
        let text = |at: DateTime<Utc>| at.format("%Y-%m-%dT%H:%M:%S").to_string();
        let description = row.description.filter(|text| !text.is_empty()).unwrap_or(row.summary);
        Self {
            assembly_id: row.guid.clone(),
            payload_guid: row.guid.clone(),
            assembly_guid: row.guid,
            name: row.display_name.clone(),
            display_name: row.display_name,
            description: description.clone(),
            summary: description,
            assembly_type: row.assembly_type,
            assembly_subtype: row.assembly_subtype,
            source: row.domain,
            is_dirty: false,
            dirty_since: None,
            last_persisted: text(row.updated_at),
            source_repo: row.source_repo,
            source_path: row.source_path,
            source_version: row.source_version,
            virtual_path: row.path.clone(),
            path: row.path,
            created_at: text(row.created_at),
            updated_at: text(row.updated_at),
            content_hash: row.content_hash,
            last_edited_by: row.last_edited_by,
        }
    }
}

/// Lists assemblies by display name without case, at most `limit` after the first `offset`.
///
/// # Errors
/// When the database refuses.
pub async fn list(conn: &mut PgConnection, filter: &Filter, limit: i64, offset: i64) -> Result<Vec<Item>> {
    let domain = filter.domain.as_deref().filter(|domain| ["official", "community", "user"].contains(domain));
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT guid, domain, display_name, summary, assembly_type, assembly_subtype, content_hash, source_repo, source_path,
                  source_version, path, last_edited_by, created_at, updated_at, description AS "description?"
           FROM assemblies
           WHERE ($1::text IS NULL OR domain = $1) AND ($2::text IS NULL OR assembly_type = $2)
             AND ($5::text IS NULL OR display_name = $5)
           ORDER BY lower(display_name), guid LIMIT $3 OFFSET $4"#,
        domain,
        filter.assembly_type,
        limit,
        offset.max(0),
        filter.name,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Item::from).collect())
}

/// One assembly with its document.
///
/// # Errors
/// 404; 503 `busy`.
pub async fn get(pool: &Pool, guid: &str) -> Result<Detail> {
    let guid = guid.trim().to_lowercase();
    let mut conn = pool.acquire().await?;
    let payload = sqlx::query_scalar!("SELECT payload FROM assemblies WHERE guid = $1", guid)
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(Error::not_found)?;
    let row = sqlx::query_as!(
        Row,
        r#"SELECT guid, domain, display_name, summary, assembly_type, assembly_subtype, content_hash, source_repo, source_path,
                  source_version, path, last_edited_by, created_at, updated_at, description AS "description?"
           FROM assemblies WHERE guid = $1"#,
        guid
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    drop(conn);
    work::sized(payload.len(), move || Detail { item: row.into(), payload_json: document::shown(&payload), payload }).await
}

/// What is stored of an assembly, checked.
struct Checked {
    guid: String,
    display_name: String,
    summary: String,
    description: String,
    subtype: String,
    payload: String,
    content_hash: String,
}

fn bounded(field: &str, text: Option<&str>, max: usize) -> Result<Option<String>> {
    let Some(text) = text.map(str::trim) else { return Ok(None) };
    if text.chars().count() > max || text.chars().any(|c| c.is_control() && c != '\n') {
        return Err(Error::field("invalid_field", field, format!("must be at most {max} characters without control characters")));
    }
    Ok(Some(text.to_owned()))
}

/// Reads a display name; empty for none of its own.
fn display_name(text: Option<&str>) -> Result<Option<String>> {
    let rule = Rule { field: "display_name", code: "invalid_field", max_chars: TEXT_MAX, in_paths: false };
    match text.map(str::trim) {
        None => Ok(None),
        Some("") => Ok(Some(String::new())),
        Some(text) => Name::parse(text, &rule).map(|name| Some(name.into_string())),
    }
}

fn check_domain(domain: Option<&str>, admin: bool) -> Result<()> {
    match domain {
        Some("user") => Ok(()),
        Some("official" | "community") if admin => {
            Err(Error::new(Kind::Forbidden, "dev_mode_required", "Assemblies of this domain change in dev mode only."))
        }
        Some("official" | "community") => {
            Err(Error::new(Kind::Forbidden, "forbidden", "Assemblies of this domain are changed by administrators only."))
        }
        _ => Err(Error::field("invalid_domain", "domain", "must be user")),
    }
}

fn check_type(assembly_type: Option<&str>) -> Result<()> {
    match assembly_type.map(|text| text.trim().to_ascii_lowercase()).as_deref() {
        None | Some("script" | "") => Ok(()),
        Some("workflow" | "ansible") => {
            Err(Error::field("not_supported_yet", "assembly_type", "only scripts are supported by this version"))
        }
        Some(_) => Err(Error::field("invalid_assembly_type", "assembly_type", "must be script")),
    }
}

impl Checked {
    fn new(
        guid: String,
        display_name: Option<String>,
        summary: String,
        subtype: Option<String>,
        payload: &Value,
    ) -> Result<Self> {
        let payload = document::stored(payload, &guid)?;
        if payload.contains('\0') {
            return Err(Error::field("invalid_payload", "payload", "contains a NUL character"));
        }
        let script = Script::parse(&payload, subtype.as_deref().unwrap_or_default())?;
        let subtype = subtype.filter(|text| !text.is_empty()).unwrap_or_else(|| script.script_type.to_owned());
        let display_name = display_name.filter(|name| !name.is_empty()).unwrap_or_else(|| guid.clone());
        let description = script.description;
        let mut content = json!({
            "assembly_guid": guid,
            "display_name": display_name,
            "summary": summary,
            "assembly_type": "script",
            "assembly_subtype": subtype,
        });
        content["payload"] =
            json::from_str(&payload, Limits::values(VALUES_MAX)).unwrap_or_else(|_| Value::String(payload.clone()));
        let content_hash = canonical::sha256_hex(&canonical::to_bytes(&content));
        Ok(Self { guid, display_name, summary, description, subtype, payload, content_hash })
    }
}

/// About how many bytes of work a document is.
fn weight(payload: Option<&Value>) -> usize {
    match payload {
        Some(Value::String(text)) => text.len(),
        Some(Value::Object(fields)) => fields.values().map(|value| weight(Some(value)) + 64).sum(),
        Some(Value::Array(items)) => items.iter().map(|item| weight(Some(item))).sum(),
        _ => 8,
    }
}

/// The guid of a new assembly.
fn new_guid(chosen: Option<&str>, admin: bool) -> Result<String> {
    let guid = chosen.unwrap_or_default().trim().to_lowercase();
    if guid.is_empty() {
        return Ok(Uuid::new_v4().simple().to_string());
    }
    // What a path cannot carry could never be asked for again.
    if guid.chars().count() > TEXT_MAX
        || guid.chars().any(|c| c.is_control() || c.is_whitespace() || "/\\%;?#".contains(c))
        || RESERVED_GUIDS.contains(&guid.as_str())
    {
        return Err(Error::field(
            "invalid_assembly_guid",
            "assembly_guid",
            "must be at most 200 characters that can stand in a path, and no name of a route",
        ));
    }
    if !admin {
        let why = "Only administrators choose the id of an assembly; leave assembly_guid out.";
        return Err(Error::new(Kind::Forbidden, "assembly_guid_forbidden", why));
    }
    Ok(guid)
}

/// Makes an assembly.
///
/// # Errors
/// 400 naming the field; 403 `forbidden` or `dev_mode_required` for a protected domain, `assembly_guid_forbidden` for an operator who
/// chooses a guid; 409 `assembly_exists`, `assembly_path_taken`, `assembly_reserved`, `quota_exceeded`; 503 `busy`.
pub async fn create(pool: &Pool, caller: Caller<'_>, body: AssemblyBody) -> Result<Detail> {
    let guid = new_guid(body.assembly_guid.as_deref(), caller.is_admin())?;
    check_domain(body.domain.as_deref().map(str::trim), caller.is_admin())?;
    check_type(body.assembly_type.as_deref())?;
    let display_name = display_name(body.display_name.as_deref())?;
    let summary = bounded("summary", body.summary.as_deref(), SUMMARY_MAX)?.unwrap_or_default();
    let subtype = bounded("assembly_subtype", body.assembly_subtype.as_deref(), TEXT_MAX)?.map(|text| text.to_lowercase());
    let source_repo = bounded("source_repo", body.source_repo.as_deref(), SUMMARY_MAX)?;
    let source_path = source_path(body.source_path.as_deref())?;
    let source_version = bounded("source_version", body.source_version.as_deref(), TEXT_MAX)?;
    let checked = work::sized(weight(body.payload.as_ref()), move || {
        Checked::new(guid, display_name, summary, subtype, &body.payload.unwrap_or_default())
    })
    .await??;

    let mut tx = pool.begin().await?;
    paths::lock(&mut tx).await?;
    // A job may name a guid that is gone; nothing takes its place.
    paths::refuse_reserved(&gone(&mut tx, caller, &checked.guid).await?, "id")?;
    let base = paths::base("script", &checked.display_name, source_path.as_deref());
    let named = source_path.as_deref().is_some_and(|path| !path.is_empty());
    let path = paths::assign(&mut tx, caller.scope, &checked.guid, base, named).await?;
    sqlx::query!(
        "INSERT INTO assemblies (guid, domain, display_name, summary, description, assembly_type, assembly_subtype, payload, content_hash,
             source_repo, source_path, source_version, path, path_key, base_key, owner_user_id, last_edited_by)
         VALUES ($1, 'user', $2, $3, $4, 'script', $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
        checked.guid,
        checked.display_name,
        checked.summary,
        checked.description,
        checked.subtype,
        checked.payload,
        checked.content_hash,
        source_repo,
        source_path,
        source_version,
        path.path,
        path.key,
        path.base_key,
        caller.user_id,
        caller.actor.name,
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| {
        Error::from(error).on_constraint("assemblies_pkey", || {
            Error::conflict("assembly_exists", "There is an assembly with this assembly_guid already.")
        })
    })?;
    quotas::assemblies(&mut tx, caller.user_id, caller.quotas).await?;
    let detail = json!({"domain": "user", "content_hash": checked.content_hash});
    record(&mut tx, caller.actor, "assembly.create", &checked.guid, detail).await?;
    tx.commit().await?;
    get(pool, &checked.guid).await
}

/// The jobs that name a guid of which there is no assembly.
async fn gone(conn: &mut PgConnection, caller: Caller<'_>, guid: &str) -> Result<Vec<paths::UsingJob>> {
    let exists = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM assemblies WHERE guid = $1) AS "exists!""#, guid)
        .fetch_one(&mut *conn)
        .await?;
    if exists { Ok(Vec::new()) } else { paths::jobs_using(conn, caller.scope, guid).await }
}

/// Changes what the body names. With `expected`, only when the stored content hash is that one.
///
/// # Errors
/// 404; 400 naming the field; 403 for a protected domain; 409 `content_changed` with the `content_hash` of now, `assembly_in_use`
/// when jobs of other sites run it, `assembly_path_taken`, `assembly_reserved`, `quota_exceeded`; 503 `busy`.
pub async fn update(pool: &Pool, caller: Caller<'_>, guid: &str, body: AssemblyBody, expected: Option<&str>) -> Result<Detail> {
    let guid = guid.trim().to_lowercase();
    let body = Arc::new(body);
    let mut changed = None;
    for _ in 0..CHANGE_ATTEMPTS {
        let seen = seen(&mut *pool.acquire().await?, caller, &guid, body.payload.is_none()).await?;
        check_unchangeable(&body, &seen, &guid)?;
        if expected.or(body.content_hash.as_deref()).is_some_and(|expected| expected.trim() != seen.content_hash) {
            return Err(content_changed(seen.content_hash));
        }
        let checked = checked_update(&body, &seen, &guid).await?;
        match write_update(pool, caller, &body, &seen, &checked).await? {
            None => return get(pool, &guid).await,
            Some(hash) => changed = Some(hash),
        }
    }
    Err(content_changed(changed.unwrap_or_default()))
}

fn content_changed(hash: String) -> Error {
    Error::conflict("content_changed", "The assembly was changed by somebody else.").with("content_hash", hash)
}

/// An assembly before a change.
struct Seen {
    domain: String,
    assembly_type: String,
    display_name: String,
    summary: String,
    assembly_subtype: String,
    /// None when a new one was sent.
    payload: Option<String>,
    payload_bytes: i32,
    content_hash: String,
    source_path: Option<String>,
}

/// Reads what is to be changed, and refuses who may not.
async fn seen(conn: &mut PgConnection, caller: Caller<'_>, guid: &str, with_payload: bool) -> Result<Seen> {
    let seen = sqlx::query_as!(
        Seen,
        r#"SELECT domain, assembly_type, display_name, summary, assembly_subtype, CASE WHEN $2 THEN payload END AS payload,
                  octet_length(payload) AS "payload_bytes!", content_hash, source_path
           FROM assemblies WHERE guid = $1"#,
        guid,
        with_payload,
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    check_domain(Some(&seen.domain), caller.is_admin())?;
    check_foreign(&paths::jobs_using(conn, caller.scope, guid).await?, "change")?;
    Ok(seen)
}

/// What jobs of other sites run as root on their machines is not this operator's to rewrite or to take away.
fn check_foreign(jobs: &[paths::UsingJob], what: &str) -> Result<()> {
    if jobs.iter().all(|job| job.visible) {
        return Ok(());
    }
    let why = format!("Scheduled jobs of other sites use it; an administrator can {what} it.");
    Err(Error::conflict("assembly_in_use", why).with("jobs", paths::visible(jobs)))
}

fn check_unchangeable(body: &AssemblyBody, seen: &Seen, guid: &str) -> Result<()> {
    if body.domain.as_deref().is_some_and(|domain| domain.trim() != seen.domain) {
        return Err(Error::field("invalid_domain", "domain", "cannot be changed"));
    }
    if body.assembly_guid.as_deref().is_some_and(|other| other.trim().to_lowercase() != guid) {
        return Err(Error::field("invalid_assembly_guid", "assembly_guid", "cannot be changed"));
    }
    check_type(body.assembly_type.as_deref())
}

async fn checked_update(body: &Arc<AssemblyBody>, seen: &Seen, guid: &str) -> Result<Checked> {
    let display_name = display_name(body.display_name.as_deref())?;
    let display_name = display_name.or_else(|| Some(seen.display_name.clone()));
    let summary = bounded("summary", body.summary.as_deref(), SUMMARY_MAX)?.unwrap_or_else(|| seen.summary.clone());
    // A new document brings its own type along.
    let subtype = bounded("assembly_subtype", body.assembly_subtype.as_deref(), TEXT_MAX)?
        .map(|text| text.to_lowercase())
        .or_else(|| body.payload.is_none().then(|| seen.assembly_subtype.clone()));
    let (body, guid) = (Arc::clone(body), guid.to_owned());
    let stored = seen.payload.clone().map(Value::String);
    work::sized(weight(body.payload.as_ref().or(stored.as_ref())), move || {
        let payload = body.payload.as_ref().or(stored.as_ref()).unwrap_or(&Value::Null);
        Checked::new(guid, display_name, summary, subtype, payload)
    })
    .await?
}

/// Writes a change, unless somebody else was faster: then the content hash of now.
async fn write_update(
    pool: &Pool,
    caller: Caller<'_>,
    body: &AssemblyBody,
    seen: &Seen,
    checked: &Checked,
) -> Result<Option<String>> {
    let source_path = source_path(body.source_path.as_deref())?.or_else(|| seen.source_path.clone());
    let mut tx = pool.begin().await?;
    paths::lock(&mut tx).await?;
    let now = sqlx::query!(
        "SELECT content_hash, source_repo, source_path, source_version, path, path_key, base_key, owner_user_id
         FROM assemblies WHERE guid = $1 FOR UPDATE",
        checked.guid
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(Error::not_found)?;
    if now.content_hash != seen.content_hash || now.source_path != seen.source_path {
        return Ok(Some(now.content_hash));
    }
    // A job may have come since; none can while the row is locked.
    check_foreign(&paths::jobs_using(&mut tx, caller.scope, &checked.guid).await?, "change")?;
    let base = paths::base(&seen.assembly_type, &checked.display_name, source_path.as_deref());
    let path = if base == paths::base(&seen.assembly_type, &seen.display_name, seen.source_path.as_deref()) {
        paths::Path { path: now.path, key: now.path_key, base_key: now.base_key }
    } else {
        let named = source_path.as_deref().is_some_and(|path| !path.is_empty());
        paths::assign(&mut tx, caller.scope, &checked.guid, base, named).await?
    };
    sqlx::query!(
        "UPDATE assemblies SET display_name = $2, summary = $3, description = $4, assembly_subtype = $5, payload = $6, content_hash = $7,
             source_repo = $8, source_path = $9, source_version = $10, path = $11, path_key = $12, base_key = $13,
             last_edited_by = $14, updated_at = now(),
             -- Whoever changes an assembly whose owner is gone takes it over.
             owner_user_id = coalesce(owner_user_id, $15)
         WHERE guid = $1",
        checked.guid,
        checked.display_name,
        checked.summary,
        checked.description,
        checked.subtype,
        checked.payload,
        checked.content_hash,
        bounded("source_repo", body.source_repo.as_deref(), SUMMARY_MAX)?.or(now.source_repo),
        source_path,
        bounded("source_version", body.source_version.as_deref(), TEXT_MAX)?.or(now.source_version),
        path.path,
        path.key,
        path.base_key,
        caller.actor.name,
        caller.user_id,
    )
    .execute(&mut *tx)
    .await?;
    if now.owner_user_id.is_none()
        || i64::try_from(checked.payload.len()).is_ok_and(|bytes| bytes > i64::from(seen.payload_bytes))
    {
        quotas::assemblies(&mut tx, now.owner_user_id.unwrap_or(caller.user_id), caller.quotas).await?;
    }
    let detail = json!({"before": seen.content_hash, "after": checked.content_hash});
    record(&mut tx, caller.actor, "assembly.update", &checked.guid, detail).await?;
    tx.commit().await?;
    Ok(None)
}

/// Removes an assembly that no job uses, or any with `force`. While jobs name it, its guid and its path are given to no other.
///
/// # Errors
/// 404; 403 for a protected domain; 409 `assembly_in_use` with those of its `jobs` the caller may see.
pub async fn delete(conn: &mut PgConnection, caller: Caller<'_>, guid: &str, force: bool) -> Result<()> {
    let guid = guid.trim().to_lowercase();
    paths::lock(&mut *conn).await?;
    let row = sqlx::query!("SELECT domain, content_hash FROM assemblies WHERE guid = $1 FOR UPDATE", guid)
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(Error::not_found)?;
    check_domain(Some(&row.domain), caller.is_admin())?;
    let jobs = paths::jobs_using(&mut *conn, caller.scope, &guid).await?;
    check_foreign(&jobs, "remove")?;
    if !jobs.is_empty() && !force {
        let why = "Scheduled jobs use it; they fail once it is gone. Remove it with ?force=true.";
        return Err(Error::conflict("assembly_in_use", why).with("jobs", paths::visible(&jobs)));
    }
    if !jobs.is_empty() {
        paths::reserve(&mut *conn, &guid).await?;
    }
    sqlx::query!("DELETE FROM assemblies WHERE guid = $1", guid).execute(&mut *conn).await?;
    record(conn, caller.actor, "assembly.delete", &guid, json!({"content_hash": row.content_hash, "jobs": jobs.len()})).await
}

/// Records that a change was refused for who asked; after the transaction of the change is gone.
///
/// # Errors
/// When the database refuses.
pub async fn record_refusal(conn: &mut PgConnection, actor: &Actor, action: &str, guid: &str, code: &str) -> Result<()> {
    let object_id = guid.chars().take(TEXT_MAX).collect();
    let entry =
        Entry { action, object_kind: "assembly", object_id, failed: true, detail: json!({"error": code}), ..Entry::default() };
    audit::record(conn, actor, entry).await
}

async fn record(conn: &mut PgConnection, actor: &Actor, action: &str, guid: &str, detail: Value) -> Result<()> {
    let entry = Entry { action, object_kind: "assembly", object_id: guid.to_owned(), detail, ..Entry::default() };
    audit::record(conn, actor, entry).await
}

fn source_path(path: Option<&str>) -> Result<Option<String>> {
    let path = bounded("source_path", path, SUMMARY_MAX)?;
    if path.as_deref().is_some_and(|path| path.split(['/', '\\']).any(|part| part == "..")) {
        return Err(Error::field("invalid_field", "source_path", "must not leave its folder"));
    }
    Ok(path)
}
