//! What to run: assembly documents (contract jobs 3), and what of them is sent to a device (4.2, 4.3).
//!
//! Values an operator gives to a script's variables reach it through the process environment, never as program text.
//! Only booleans and numbers, whose text is of a fixed alphabet, are also written into PowerShell, where code expects
//! them as literals.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use borealis_protocol::canonical;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json, value::RawValue};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    audit::{self, Entry},
    error::{Error, Kind, Result},
    jobs::spec,
    json::{self, Limits},
    scope::{Actor, Scope},
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
/// The most jobs that a refusal names.
const JOBS_NAMED: usize = 50;
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
    /// Chosen by the client, or generated: 32 lower-case hex.
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

/// An assembly as lists show it (contract jobs 3.1).
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the fields are those of contract jobs 3.1")]
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
    /// The text as JSON, or null when it is none.
    pub payload_json: Option<Box<RawValue>>,
}

/// Which assemblies a list shows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this domain; unknown text is no filter.
    pub domain: Option<String>,
    /// Of this type.
    pub assembly_type: Option<String>,
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
    last_edited_by: String,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    description: Option<String>,
}

impl From<Row> for Item {
    fn from(row: Row) -> Self {
        let text = |at: DateTime<Utc>| at.format("%Y-%m-%dT%H:%M:%S").to_string();
        let path = virtual_path(&row.assembly_type, &row.display_name, row.source_path.as_deref());
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
            virtual_path: path.clone(),
            path,
            created_at: text(row.created_at),
            updated_at: text(row.updated_at),
            content_hash: row.content_hash,
            last_edited_by: row.last_edited_by,
        }
    }
}

/// `<Scripts|Workflows|Ansible_Playbooks>/<name>`, where the assembly names no path of its own.
fn virtual_path(assembly_type: &str, display_name: &str, source_path: Option<&str>) -> String {
    if let Some(path) = source_path.filter(|path| !path.is_empty()) {
        return path.to_owned();
    }
    let folder = match assembly_type {
        "workflow" => "Workflows",
        "ansible" => "Ansible_Playbooks",
        _ => "Scripts",
    };
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    format!("{folder}/{}", display_name.chars().map(safe).collect::<String>())
}

/// Lists assemblies by display name without case, at most [`PAGE_MAX`], and where the next page begins.
///
/// # Errors
/// When the database refuses.
pub async fn list(conn: &mut PgConnection, filter: &Filter, limit: i64, offset: i64) -> Result<Vec<Item>> {
    let domain = filter.domain.as_deref().filter(|domain| ["official", "community", "user"].contains(domain));
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT guid, domain, display_name, summary, assembly_type, assembly_subtype, content_hash, source_repo, source_path,
                  source_version, last_edited_by, created_at, updated_at, description AS "description?"
           FROM assemblies
           WHERE ($1::text IS NULL OR domain = $1) AND ($2::text IS NULL OR assembly_type = $2)
           ORDER BY lower(display_name), guid LIMIT $3 OFFSET $4"#,
        domain,
        filter.assembly_type,
        limit.clamp(1, PAGE_MAX),
        offset.max(0),
    )
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(Item::from).collect())
}

/// One assembly with its document.
///
/// # Errors
/// 404.
pub async fn get(conn: &mut PgConnection, guid: &str) -> Result<Detail> {
    let guid = guid.trim().to_lowercase();
    let payload = sqlx::query_scalar!("SELECT payload FROM assemblies WHERE guid = $1", guid)
        .fetch_optional(&mut *conn)
        .await?
        .ok_or_else(Error::not_found)?;
    let row = sqlx::query_as!(
        Row,
        r#"SELECT guid, domain, display_name, summary, assembly_type, assembly_subtype, content_hash, source_repo, source_path,
                  source_version, last_edited_by, created_at, updated_at, description AS "description?"
           FROM assemblies WHERE guid = $1"#,
        guid
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)?;
    let payload_json = serde_json::from_str(&payload).ok();
    Ok(Detail { item: row.into(), payload, payload_json })
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
        let payload = match payload {
            Value::Object(document) => {
                let guid = Value::String(guid.clone());
                let mut document: BTreeMap<&str, &Value> = document.iter().map(|(name, value)| (name.as_str(), value)).collect();
                document.insert("assembly_guid", &guid);
                serde_json::to_string_pretty(&document)?
            }
            Value::String(text) => text.clone(),
            Value::Null => return Err(Error::field("missing_payload", "payload", "is required")),
            _ => return Err(Error::field("invalid_payload", "payload", "must be an object or text")),
        };
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

/// Makes an assembly and answers its guid.
///
/// # Errors
/// 400 naming the field, `assembly_exists` for a guid that is taken; 403 `forbidden` or `dev_mode_required` for a protected
/// domain.
pub async fn create(conn: &mut PgConnection, user_id: i64, admin: bool, actor: &Actor, body: &AssemblyBody) -> Result<String> {
    let guid = match body.assembly_guid.as_deref().map(|guid| guid.trim().to_lowercase()) {
        None => Uuid::new_v4().simple().to_string(),
        Some(guid) if guid.is_empty() => Uuid::new_v4().simple().to_string(),
        // What a path cannot carry could never be asked for again.
        Some(guid)
            if guid.chars().count() > TEXT_MAX
                || guid.chars().any(|c| c.is_control() || c.is_whitespace() || "/\\%;?#".contains(c))
                || RESERVED_GUIDS.contains(&guid.as_str()) =>
        {
            return Err(Error::field(
                "invalid_assembly_guid",
                "assembly_guid",
                "must be at most 200 characters that can stand in a path, and no name of a route",
            ));
        }
        Some(guid) => guid,
    };
    check_domain(body.domain.as_deref().map(str::trim), admin)?;
    check_type(body.assembly_type.as_deref())?;
    let checked = Checked::new(
        guid,
        bounded("display_name", body.display_name.as_deref(), TEXT_MAX)?,
        bounded("summary", body.summary.as_deref(), SUMMARY_MAX)?.unwrap_or_default(),
        bounded("assembly_subtype", body.assembly_subtype.as_deref(), TEXT_MAX)?.map(|text| text.to_lowercase()),
        body.payload.as_ref().unwrap_or(&Value::Null),
    )?;
    sqlx::query!(
        "INSERT INTO assemblies (guid, domain, display_name, summary, description, assembly_type, assembly_subtype, payload, content_hash,
             source_repo, source_path, source_version, owner_user_id, last_edited_by)
         VALUES ($1, 'user', $2, $3, $4, 'script', $5, $6, $7, $8, $9, $10, $11, $12)",
        checked.guid,
        checked.display_name,
        checked.summary,
        checked.description,
        checked.subtype,
        checked.payload,
        checked.content_hash,
        bounded("source_repo", body.source_repo.as_deref(), SUMMARY_MAX)?,
        source_path(body.source_path.as_deref())?,
        bounded("source_version", body.source_version.as_deref(), TEXT_MAX)?,
        user_id,
        actor.name,
    )
    .execute(&mut *conn)
    .await
    .map_err(|error| {
        Error::from(error)
            .on_constraint("assemblies_pkey", || Error::field("assembly_exists", "assembly_guid", "already exists"))
    })?;
    record(conn, actor, "assembly.create", &checked.guid, json!({"domain": "user", "content_hash": checked.content_hash}))
        .await?;
    Ok(checked.guid)
}

/// Changes what the body names. With `expected`, only when the stored content hash is that one.
///
/// # Errors
/// 404; 400 naming the field; 403 for a protected domain; 409 `content_changed` with the `content_hash` of now,
/// `assembly_in_use` when jobs of other sites run it.
pub async fn update(
    conn: &mut PgConnection,
    admin: bool,
    scope: &Scope,
    actor: &Actor,
    guid: &str,
    body: &AssemblyBody,
    expected: Option<&str>,
) -> Result<()> {
    let guid = guid.trim().to_lowercase();
    let row = sqlx::query!(
        "SELECT domain, assembly_type, display_name, summary, assembly_subtype, payload, content_hash, source_repo, source_path, source_version
         FROM assemblies WHERE guid = $1 FOR UPDATE",
        guid
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    check_domain(Some(&row.domain), admin)?;
    // What jobs of other sites run as root on their machines is not this operator's to rewrite.
    let path = virtual_path(&row.assembly_type, &row.display_name, row.source_path.as_deref());
    if jobs_using(&mut *conn, scope, &guid, &path).await?.iter().any(|job| !job.visible) {
        return Err(Error::conflict("assembly_in_use", "Scheduled jobs of other sites use it; an administrator can change it."));
    }
    if body.domain.as_deref().is_some_and(|domain| domain.trim() != row.domain) {
        return Err(Error::field("invalid_domain", "domain", "cannot be changed"));
    }
    if body.assembly_guid.as_deref().is_some_and(|other| other.trim().to_lowercase() != guid) {
        return Err(Error::field("invalid_assembly_guid", "assembly_guid", "cannot be changed"));
    }
    check_type(body.assembly_type.as_deref())?;
    if expected.or(body.content_hash.as_deref()).is_some_and(|expected| expected.trim() != row.content_hash) {
        return Err(Error::conflict("content_changed", "The assembly was changed by somebody else.")
            .with("content_hash", row.content_hash));
    }
    // A new document brings its own type along.
    let subtype = bounded("assembly_subtype", body.assembly_subtype.as_deref(), TEXT_MAX)?
        .map(|text| text.to_lowercase())
        .or_else(|| body.payload.is_none().then_some(row.assembly_subtype));
    let stored = Value::String(row.payload);
    let checked = Checked::new(
        guid,
        bounded("display_name", body.display_name.as_deref(), TEXT_MAX)?.or(Some(row.display_name)),
        bounded("summary", body.summary.as_deref(), SUMMARY_MAX)?.unwrap_or(row.summary),
        subtype,
        body.payload.as_ref().unwrap_or(&stored),
    )?;
    sqlx::query!(
        "UPDATE assemblies SET display_name = $2, summary = $3, description = $4, assembly_subtype = $5, payload = $6, content_hash = $7,
             source_repo = $8, source_path = $9, source_version = $10, last_edited_by = $11, updated_at = now()
         WHERE guid = $1",
        checked.guid,
        checked.display_name,
        checked.summary,
        checked.description,
        checked.subtype,
        checked.payload,
        checked.content_hash,
        bounded("source_repo", body.source_repo.as_deref(), SUMMARY_MAX)?.or(row.source_repo),
        source_path(body.source_path.as_deref())?.or(row.source_path),
        bounded("source_version", body.source_version.as_deref(), TEXT_MAX)?.or(row.source_version),
        actor.name,
    )
    .execute(&mut *conn)
    .await?;
    record(conn, actor, "assembly.update", &checked.guid, json!({"before": row.content_hash, "after": checked.content_hash}))
        .await
}

/// Removes an assembly that no job uses, or any with `force`.
///
/// # Errors
/// 404; 403 for a protected domain; 409 `assembly_in_use` with those of its `jobs` the caller may see.
pub async fn delete(conn: &mut PgConnection, admin: bool, scope: &Scope, actor: &Actor, guid: &str, force: bool) -> Result<()> {
    let guid = guid.trim().to_lowercase();
    let row = sqlx::query!(
        "SELECT domain, content_hash, assembly_type, display_name, source_path FROM assemblies WHERE guid = $1 FOR UPDATE",
        guid
    )
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(Error::not_found)?;
    check_domain(Some(&row.domain), admin)?;
    let path = virtual_path(&row.assembly_type, &row.display_name, row.source_path.as_deref());
    let jobs = jobs_using(&mut *conn, scope, &guid, &path).await?;
    let foreign = jobs.iter().any(|job| !job.visible);
    // Jobs of other sites are not this operator's to break, and not named.
    if foreign || (!jobs.is_empty() && !force) {
        let seen = jobs.iter().filter(|job| job.visible).take(JOBS_NAMED).map(|job| json!({"id": job.id, "name": job.name}));
        let message = if foreign {
            "Scheduled jobs of other sites use it; an administrator can remove it."
        } else {
            "Scheduled jobs use it; they fail once it is gone. Remove it with ?force=true."
        };
        return Err(Error::conflict("assembly_in_use", message).with("jobs", seen.collect::<Vec<_>>()));
    }
    sqlx::query!("DELETE FROM assemblies WHERE guid = $1", guid).execute(&mut *conn).await?;
    record(conn, actor, "assembly.delete", &guid, json!({"content_hash": row.content_hash, "jobs": jobs.len()})).await
}

/// A job that runs an assembly.
struct UsingJob {
    id: i64,
    name: String,
    /// Whether the caller may see it.
    visible: bool,
}

/// The jobs that run an assembly, by its guid or its virtual path.
async fn jobs_using(conn: &mut PgConnection, scope: &Scope, guid: &str, path: &str) -> Result<Vec<UsingJob>> {
    Ok(sqlx::query_as!(
        UsingJob,
        r#"SELECT j.id, j.name, ($3::bigint[] IS NULL OR job_site_ids(j.targets) <@ $3) IS TRUE AS "visible!"
           FROM scheduled_jobs j
           WHERE j.components @> $1
              OR EXISTS (SELECT FROM jsonb_array_elements(j.components) c
                         WHERE c ->> 'assembly_guid' IS NULL AND lower(replace(c ->> 'path', '\', '/')) IN ($2, 'scripts/' || $2))
           ORDER BY j.id"#,
        json!([{"assembly_guid": guid}]),
        path.replace('\\', "/").to_lowercase(),
        scope.site_ids(),
    )
    .fetch_all(&mut *conn)
    .await?)
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

/// A script document (contract jobs 3.2), read.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    /// One of [`SCRIPT_TYPES`].
    pub script_type: &'static str,
    /// The body, with LF.
    pub content: String,
    /// The limit in seconds; 0: none.
    pub timeout_seconds: u32,
    /// The variables it declares.
    pub variables: Vec<Variable>,
    /// `{file_name, size, mime_type, data}` each, `data` in base64.
    pub files: Vec<Value>,
    /// What it says about itself.
    pub description: String,
}

/// A variable of a script.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    /// As the document writes it.
    pub name: String,
    /// What operators see.
    pub label: String,
    /// How its value is read.
    pub kind: VariableKind,
    /// The value without one from the operator.
    pub value: Value,
}

/// How the value of a variable is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VariableKind {
    /// As text.
    String,
    /// As a number.
    Number,
    /// As true or false.
    Boolean,
    /// As text; no secret is looked up for scripts.
    Credential,
}

impl VariableKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Credential => "credential",
        }
    }
}

impl Script {
    /// Reads a stored document; text that is no JSON object is the script itself. `subtype` is the type of a document that
    /// names none.
    ///
    /// # Errors
    /// 400 `unsupported_script_type`, `invalid_payload` naming the field.
    pub fn parse(payload: &str, subtype: &str) -> Result<Self> {
        let fault = |field: &str, message: &str| Error::field("invalid_payload", &format!("payload{field}"), message);
        // Text of any kind may be a script; a document that is too large to be read as one is none.
        if payload.trim_start().starts_with('{') {
            json::measure(payload.as_bytes(), Limits::values(VALUES_MAX)).map_err(|error| fault("", &error.message))?;
        }
        let read = payload.trim_start().starts_with('{').then(|| serde_json::from_str(payload));
        let document = match read {
            Some(Ok(Value::Object(document))) => document,
            _ => Map::from_iter([("content".to_owned(), Value::String(payload.to_owned()))]),
        };
        let document = std::cell::RefCell::new(document);
        // Taken, not copied: files may be large.
        let get = |keys: &[&str]| {
            let mut document = document.borrow_mut();
            keys.iter().find_map(|key| document.remove(*key).filter(|value| !value.is_null()))
        };
        let text = |keys: &[&str]| match get(keys) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(fault(&format!(".{}", keys[0]), "must be text")),
        };

        let named = text(&["type", "script_type"])?.filter(|kind| !kind.trim().is_empty());
        let named = named.unwrap_or_else(|| if subtype.is_empty() { "powershell".into() } else { subtype.into() });
        let named = named.trim().to_ascii_lowercase();
        let script_type = SCRIPT_TYPES.into_iter().find(|kind| *kind == named).ok_or_else(|| {
            Error::field("unsupported_script_type", "payload.type", format!("must be one of {}", SCRIPT_TYPES.join(", ")))
        })?;

        let body = match get(&["script_lines"]) {
            Some(Value::Array(lines)) => {
                let lines: Option<Vec<&str>> = lines.iter().map(Value::as_str).collect();
                lines.ok_or_else(|| fault(".script_lines", "must be a list of text"))?.join("\n")
            }
            Some(_) => return Err(fault(".script_lines", "must be a list of text")),
            None => text(&["script", "content"])?.ok_or_else(|| fault(".script", "is required"))?,
        };
        let encoding = text(&["script_encoding", "scriptEncoding"])?.unwrap_or_default();
        let body = match encoding.trim().to_ascii_lowercase().as_str() {
            "base64" | "b64" | "base-64" => {
                let compact: String = body.split_ascii_whitespace().collect();
                let bytes = STANDARD.decode(compact).map_err(|_| fault(".script", "is not base64"))?;
                String::from_utf8(bytes).map_err(|_| fault(".script", "is not UTF-8"))?
            }
            "" | "plain" | "text" | "utf-8" | "utf8" | "none" => body,
            _ => return Err(fault(".script_encoding", "must be base64 or plain")),
        };
        let content = body.replace("\r\n", "\n").replace('\r', "\n");
        if content.trim().is_empty() {
            return Err(fault(".script", "is empty"));
        }
        if content.contains('\0') {
            return Err(fault(".script", "contains a NUL character"));
        }

        if content.len() > SCRIPT_MAX {
            return Err(Error::field("script_too_large", "payload.script", format!("must be at most {SCRIPT_MAX} bytes")));
        }

        let timeout_seconds = match get(&["timeout_seconds", "timeout"]) {
            None => TIMEOUT_DEFAULT_S,
            Some(value) => value
                .as_i64()
                .or_else(|| value.as_str().and_then(|text| text.trim().parse().ok()))
                .filter(|seconds| (0..=TIMEOUT_MAX_S).contains(seconds))
                .and_then(|seconds| u32::try_from(seconds).ok())
                .ok_or_else(|| fault(".timeout_seconds", &format!("must be a whole number from 0 to {TIMEOUT_MAX_S}")))?,
        };
        let variables = match get(&["variables"]) {
            None => Vec::new(),
            Some(Value::Array(list)) => list
                .iter()
                .enumerate()
                .map(|(index, item)| Variable::parse(item).map_err(|reason| fault(&format!(".variables[{index}]"), &reason)))
                .collect::<Result<Vec<_>>>()?,
            Some(_) => return Err(fault(".variables", "must be a list")),
        };
        if variables.len() > spec::VARIABLES_MAX {
            return Err(fault(".variables", &format!("must be at most {}", spec::VARIABLES_MAX)));
        }
        let files = match get(&["files"]) {
            None => Vec::new(),
            Some(Value::Array(list)) if list.len() > FILES_MAX => {
                return Err(fault(".files", &format!("must be at most {FILES_MAX}")));
            }
            Some(Value::Array(list)) => list.into_iter().filter_map(file).collect(),
            Some(_) => return Err(fault(".files", "must be a list")),
        };
        let description = text(&["description", "summary"])?.unwrap_or_default().chars().take(SUMMARY_MAX).collect();
        Ok(Self { script_type, content, timeout_seconds, variables, files, description })
    }
}

/// A file of a document; none when it has no name or no data.
fn file(mut item: Value) -> Option<Value> {
    let data = item.get_mut("data").map(Value::take).filter(Value::is_string)?;
    let text = |keys: [&str; 2]| keys.iter().find_map(|key| item.get(*key)?.as_str()).map(str::trim);
    let name = text(["file_name", "name"]).filter(|name| !name.is_empty())?;
    let mut file = json!({
        "file_name": name,
        "size": item.get("size").and_then(Value::as_i64).unwrap_or(0),
        "mime_type": text(["mime_type", "mimeType"]).unwrap_or_default(),
    });
    file["data"] = data;
    Some(file)
}

/// The files as they are sent.
fn sent_files(mut files: Vec<Value>) -> Vec<Value> {
    let size: usize = files.iter().filter_map(|file| file.get("data")?.as_str()).map(str::len).sum();
    if size > FILES_SENT_MAX {
        for file in files.iter_mut().filter_map(Value::as_object_mut) {
            file.remove("data");
        }
    }
    files
}

impl Variable {
    fn parse(item: &Value) -> Result<Self, String> {
        let item = item.as_object().ok_or("must be an object")?;
        let get = |keys: &[&str]| keys.iter().find_map(|key| item.get(*key).filter(|value| !value.is_null()).cloned());
        let text = |keys: &[&str]| get(keys).and_then(|value| value.as_str().map(|text| text.trim().to_owned()));
        let name = text(&["name", "key"]).filter(|name| !name.is_empty()).ok_or("needs a name")?;
        let kind = match text(&["type"]).unwrap_or_default().to_ascii_lowercase().as_str() {
            "number" => VariableKind::Number,
            "boolean" => VariableKind::Boolean,
            "credential" => VariableKind::Credential,
            _ => VariableKind::String,
        };
        let value = get(&["value", "default", "defaultValue", "default_value"]).unwrap_or_default();
        let one = Map::from_iter([(name.clone(), value.clone())]);
        spec::check_variables(&one)?;
        literal(kind, &value).map_err(|reason| format!("'{name}' {reason}"))?;
        Ok(Self { label: text(&["label"]).unwrap_or_else(|| name.clone()), name, kind, value })
    }
}

/// The text of a value as the environment carries it, and whether it may also stand in program text as a literal.
fn literal(kind: VariableKind, value: &Value) -> Result<(String, Option<String>), &'static str> {
    let text = match value {
        Value::Null => String::new(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match kind {
        VariableKind::Boolean => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(("True".into(), Some("$true".into()))),
            "false" | "0" | "no" | "off" | "" => Ok(("False".into(), Some("$false".into()))),
            _ => Err("must be true or false"),
        },
        VariableKind::Number => match text.trim() {
            "" => Ok((String::new(), Some("0".into()))),
            number if is_number(number) => Ok((number.into(), Some(number.into()))),
            _ => Err("must be a number"),
        },
        VariableKind::String | VariableKind::Credential => Ok((text, None)),
    }
}

/// `-?digits[.digits][e[+-]digits]`: nothing else may ever stand in a script.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let text = text.strip_prefix('-').unwrap_or(text);
    let (mantissa, exponent) =
        text.split_once(['e', 'E']).map_or((text, None), |(mantissa, exponent)| (mantissa, Some(exponent)));
    let mantissa_fits = match mantissa.split_once('.') {
        None => digits(mantissa),
        Some((whole, part)) => digits(whole) && digits(part),
    };
    text.len() <= 40 && mantissa_fits && exponent.is_none_or(|e| digits(e.strip_prefix(['+', '-']).unwrap_or(e)))
}

/// Where a script runs on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// As the machine's own account.
    System,
    /// In every active session of a user.
    CurrentUser,
    /// In one session of a user.
    Session(i64),
}

/// How a component names its assembly: by guid, else by virtual path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ComponentRef {
    /// The guid.
    pub assembly_guid: Option<String>,
    /// The virtual path.
    pub path: Option<String>,
}

/// A script ready to be sent, but for its device, its ids and its signatures.
#[derive(Debug, Clone)]
pub struct ScriptRequest {
    /// The assembly's name.
    pub script_name: String,
    /// The assembly's virtual path.
    pub script_path: String,
    /// One of [`SCRIPT_TYPES`].
    pub script_type: &'static str,
    /// The limit in seconds; 0: none.
    pub timeout_seconds: u32,
    /// The assembly as it was.
    pub content_hash: String,
    /// The assembly.
    pub assembly_guid: String,
    /// Its domain.
    pub assembly_source: String,
    prepared: Prepared,
}

impl ScriptRequest {
    /// What is stored as `activity_history.request`: the payload of `quick_job_run` (contract jobs 4.3) except `job_id`,
    /// signatures and key. `target_hostname` and `context` are the caller's to set.
    #[must_use]
    pub fn request(&self, mode: RunMode) -> Value {
        let (run_mode, session_target, session) = match mode {
            RunMode::System => ("system", None, None),
            RunMode::CurrentUser => ("currentuser", Some("all_active_sessions"), None),
            RunMode::Session(id) => ("currentuser", Some("specific_session"), Some(id)),
        };
        let mut request = json!({
            "target_hostname": "",
            "script_type": self.script_type,
            "script_name": self.script_name,
            "script_path": self.script_path,
            "script_content": STANDARD.encode(&self.prepared.content),
            "script_encoding": "base64",
            "environment": self.prepared.environment,
            "variables": self.prepared.variables,
            "timeout_seconds": self.timeout_seconds,
            "files": self.prepared.files,
            "run_mode": run_mode,
            "admin_user": "",
            "admin_pass": "",
            "target_context": run_mode,
            "context": {"assembly_source": self.assembly_source, "assembly_guid": self.assembly_guid},
        });
        if let (Some(target), Some(request)) = (session_target, request.as_object_mut()) {
            request.insert("session_target".into(), target.into());
            if let Some(id) = session {
                request.insert("target_session_id".into(), id.into());
            }
        }
        request
    }
}

/// A script with its values in place.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// The text that is signed and run.
    pub content: String,
    /// What is added to the environment of its process.
    pub environment: BTreeMap<String, String>,
    /// `{name, label, type, value}` each.
    pub variables: Vec<Value>,
    /// `{file_name, size, mime_type, data?}` each.
    pub files: Vec<Value>,
}

/// Prepares a script for a run: reads its document, sets the values of its variables and writes the environment. Pure.
///
/// # Errors
/// 400 `invalid_variable_value` naming the variable.
pub fn prepare(script: &Script, values: &Map<String, Value>) -> Result<Prepared> {
    spec::check_variables(values).map_err(|reason| Error::field("invalid_variable_value", "variable_values", reason))?;
    let mut variables = script.variables.clone();
    for (name, value) in values {
        match variables.iter_mut().find(|variable| variable.name == *name) {
            Some(variable) => variable.value = value.clone(),
            None => variables.push(Variable {
                name: name.clone(),
                label: name.clone(),
                kind: VariableKind::String,
                value: value.clone(),
            }),
        }
    }
    let mut environment = BTreeMap::new();
    let mut literals: BTreeMap<String, (String, Option<String>)> = BTreeMap::new();
    let mut sent = Vec::new();
    for variable in &variables {
        let (text, literal) = literal(variable.kind, &variable.value)
            .map_err(|reason| Error::field("invalid_variable_value", &format!("variable_values.{}", variable.name), reason))?;
        let sanitised: String = variable.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let key = sanitised.to_ascii_uppercase();
        if is_identifier(&variable.name) {
            environment.insert(variable.name.clone(), text.clone());
        }
        environment.insert(sanitised, text.clone());
        environment.insert(key.clone(), text.clone());
        literals.insert(key.clone(), (key.clone(), literal.clone()));
        literals.insert(variable.name.to_ascii_uppercase(), (key, literal));
        sent.push(json!({"name": variable.name, "label": variable.label, "type": variable.kind.as_str(), "value": text}));
    }
    let content =
        if script.script_type == "powershell" { rewrite_powershell(&script.content, &literals) } else { script.content.clone() };
    Ok(Prepared { content, environment, variables: sent, files: sent_files(script.files.clone()) })
}

fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_') && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Rewrites references `$env:NAME` and `$env:{NAME}` to variables of the script: booleans and numbers become literals, text
/// becomes the one form `${env:KEY}`, so that no value of an operator ever stands in the program text. A reference that is
/// assigned to, or escaped with a backtick, stays as it is.
fn rewrite_powershell(content: &str, literals: &BTreeMap<String, (String, Option<String>)>) -> String {
    const MARK: &str = "$env:";
    let mut out = String::with_capacity(content.len());
    let mut rest = content;
    while let Some(at) = find_ignoring_case(rest, MARK) {
        let (before, from_mark) = rest.split_at(at);
        out.push_str(before);
        let after = from_mark.get(MARK.len()..).unwrap_or_default();
        let (name, length) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) if !name.contains('\n') => (name, name.len() + 2),
            _ => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (after.get(..end).unwrap_or_default(), end)
            }
        };
        let tail = after.get(length..).unwrap_or_default();
        let known = literals.get(&name.to_ascii_uppercase()).filter(|_| !before.ends_with('`') && !is_assigned(tail));
        match known {
            Some((_, Some(literal))) => out.push_str(literal),
            Some((key, None)) => {
                out.push_str("${env:");
                out.push_str(key);
                out.push('}');
            }
            None => out.push_str(from_mark.get(..MARK.len() + length).unwrap_or_default()),
        }
        rest = tail;
    }
    out.push_str(rest);
    out
}

fn find_ignoring_case(text: &str, mark: &str) -> Option<usize> {
    text.match_indices('$')
        .map(|(at, _)| at)
        .find(|at| text.get(*at..*at + mark.len()).is_some_and(|found| found.eq_ignore_ascii_case(mark)))
}

/// Whether what follows a reference assigns to it: `=`, `+=`, `-=`, `*=`, `/=`, `%=`, `++`, `--`.
fn is_assigned(tail: &str) -> bool {
    let tail = tail.trim_start_matches([' ', '\t']);
    let tail = tail.strip_prefix(['+', '-', '*', '/', '%']).map_or(tail, |rest| {
        if rest.starts_with(['+', '-']) {
            "="
        } else if rest.starts_with('=') {
            rest
        } else {
            ""
        }
    });
    tail.starts_with('=')
}

/// The script of an assembly, ready to be sent: found by guid, else by virtual path, as it is now.
///
/// # Errors
/// 404 `script_not_found`; 400 `unsupported_script_type`, `invalid_payload`, `invalid_variable_value`.
pub async fn script_for_run(
    conn: &mut PgConnection,
    component: &ComponentRef,
    values: &Map<String, Value>,
) -> Result<ScriptRequest> {
    let guid = component.assembly_guid.as_deref().map(|guid| guid.trim().to_lowercase());
    let path = component.path.as_deref().map(|path| {
        let path = path.trim().replace('\\', "/").to_lowercase();
        let path = path.trim_start_matches('/');
        if path.starts_with("scripts/") { path.to_owned() } else { format!("scripts/{path}") }
    });
    let row = sqlx::query!(
        r#"SELECT guid, domain, display_name, assembly_type, assembly_subtype, payload, content_hash, source_path
           FROM assemblies
           WHERE guid = $1 OR ($2::text IS NOT NULL AND assembly_type = 'script' AND lower(replace(
               coalesce(nullif(source_path, ''), 'Scripts/' || regexp_replace(display_name, '[^A-Za-z0-9._-]', '_', 'g')), '\', '/')) = $2)
           ORDER BY (guid = $1) IS TRUE DESC, array_position(ARRAY['official', 'community', 'user'], domain), guid LIMIT 1"#,
        guid,
        path,
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(|| Error::new(Kind::NotFound, "script_not_found", "Script not found: there is no such assembly."))?;
    if row.assembly_type != "script" {
        return Err(Error::invalid("unsupported_script_type", "The assembly is not a script."));
    }
    let script = Script::parse(&row.payload, &row.assembly_subtype)?;
    let script_path = virtual_path(&row.assembly_type, &row.display_name, row.source_path.as_deref());
    let prepared = prepare(&script, values)?;
    Ok(ScriptRequest {
        script_name: row.display_name,
        script_path,
        script_type: script.script_type,
        timeout_seconds: script.timeout_seconds,
        content_hash: row.content_hash,
        assembly_guid: row.guid,
        assembly_source: row.domain,
        prepared,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(document: Value) -> Script {
        Script::parse(&document.to_string(), "").unwrap()
    }

    fn fault(document: Value) -> &'static str {
        Script::parse(&document.to_string(), "").unwrap_err().code
    }

    fn run(document: Value, values: Value) -> Prepared {
        prepare(&script(document), values.as_object().unwrap()).unwrap()
    }

    #[test]
    fn bodies_are_read_in_every_form() {
        assert_eq!(script(json!({"type": "bash", "script_lines": ["a", "b"]})).content, "a\nb");
        assert_eq!(script(json!({"type": "bash", "script": "a\r\nb\rc"})).content, "a\nb\nc");
        assert_eq!(script(json!({"type": "bash", "content": "ZWNobyBoaQ==", "script_encoding": "base64"})).content, "echo hi");
        assert_eq!(script(json!({"type": "bash", "content": "aGVsbG8="})).content, "aGVsbG8=", "decoded only when it says so");
        assert_eq!(Script::parse("echo hi", "bash").unwrap().content, "echo hi", "text is the script itself");
        assert_eq!(script(json!({"script": "x"})).script_type, "powershell");
        assert_eq!(script(json!({"script": "x"})).timeout_seconds, 3600);
        assert_eq!(script(json!({"script": "x", "timeout": "0"})).timeout_seconds, 0);
    }

    #[test]
    fn bad_documents_are_refused() {
        for (document, code) in [
            (json!({"type": "bash"}), "invalid_payload"),
            (json!({"type": "bash", "script": "  "}), "invalid_payload"),
            (json!({"type": "bash", "script": 5}), "invalid_payload"),
            (json!({"type": "bash", "script_lines": ["a", 5]}), "invalid_payload"),
            (json!({"type": "bash", "script": "%%%", "script_encoding": "base64"}), "invalid_payload"),
            (json!({"type": "bash", "script": "//8=", "script_encoding": "base64"}), "invalid_payload"),
            (json!({"type": "bash", "script": "x", "script_encoding": "rot13"}), "invalid_payload"),
            (json!({"type": "bash", "script": "x", "timeout_seconds": -1}), "invalid_payload"),
            (json!({"type": "bash", "script": "x", "timeout_seconds": 1e12}), "invalid_payload"),
            (json!({"type": "bash", "script": "x", "variables": {}}), "invalid_payload"),
            (json!({"type": "bash", "script": "x", "variables": [{"label": "no name"}]}), "invalid_payload"),
            (
                json!({"type": "bash", "script": "x", "variables": [{"name": "n", "type": "number", "default": "1;rm"}]}),
                "invalid_payload",
            ),
            (json!({"type": "ansible", "script": "x"}), "unsupported_script_type"),
            (json!({"type": "python", "script": "x"}), "unsupported_script_type"),
        ] {
            assert_eq!(fault(document.clone()), code, "{document}");
        }
    }

    #[test]
    fn values_win_over_defaults_and_reach_the_environment() {
        let document = json!({"type": "bash", "script": "echo $GREETING", "variables": [
            {"name": "greeting", "default": "hi"}, {"name": "loud", "type": "boolean", "default": "yes"},
            {"name": "my-path", "default_value": "/tmp"}, {"key": "count", "type": "number"}]});
        let run = run(document, json!({"greeting": "hello $(id)", "extra": null}));
        let get = |key: &str| run.environment.get(key).map(String::as_str);
        assert_eq!((get("GREETING"), get("greeting")), (Some("hello $(id)"), Some("hello $(id)")));
        assert_eq!(
            (get("LOUD"), get("MY_PATH"), get("my_path"), get("my-path")),
            (Some("True"), Some("/tmp"), Some("/tmp"), None)
        );
        assert_eq!((get("COUNT"), get("EXTRA")), (Some(""), Some("")));
        assert_eq!(run.content, "echo $GREETING", "bash reads the environment");
        assert_eq!(run.variables[0], json!({"name": "greeting", "label": "greeting", "type": "string", "value": "hello $(id)"}));
    }

    #[test]
    fn no_value_of_an_operator_becomes_powershell() {
        let document = json!({"type": "powershell",
            "script": "Write-Host \"Hi $env:name and $ENV:{my name}\"\nif ($env:Flag) { $n = $env:count + 1 }\n$env:name = 'x'; `$env:name; $env:PATH; $env:names",
            "variables": [{"name": "name"}, {"name": "my name"}, {"name": "flag", "type": "boolean"}, {"name": "count", "type": "number"}]});
        let evil = "\"; Remove-Item C:\\ -Recurse; '’; $(calc) #";
        let run = run(document.clone(), json!({"name": evil, "my name": evil, "flag": true, "count": "-1.5e3"}));
        assert_eq!(
            run.content,
            "Write-Host \"Hi ${env:NAME} and ${env:MY_NAME}\"\nif ($true) { $n = -1.5e3 + 1 }\n$env:name = 'x'; `$env:name; $env:PATH; $env:names"
        );
        assert_eq!(run.environment.get("NAME").map(String::as_str), Some(evil));
        for bad in ["1; calc", "0x10", "1e", "--1", "$(calc)", "1 2", ".5", "Infinity", "१"] {
            let values = json!({"count": bad});
            let error = prepare(&script(document.clone()), values.as_object().unwrap()).unwrap_err();
            assert_eq!(
                (error.code, error.fields.contains_key("variable_values.count")),
                ("invalid_variable_value", true),
                "{bad}"
            );
        }
        let values = json!({"flag": "$(calc)"});
        assert!(prepare(&script(document), values.as_object().unwrap()).is_err());
    }

    #[test]
    fn a_request_is_what_an_agent_reads() {
        let prepared = run(json!({"type": "bash", "script": "echo hi"}), json!({"who": "me"}));
        let script = ScriptRequest {
            script_name: "n".into(),
            script_path: "p".into(),
            script_type: "bash",
            timeout_seconds: 1,
            content_hash: String::new(),
            assembly_guid: "g".into(),
            assembly_source: "user".into(),
            prepared,
        };
        let request = script.request(RunMode::Session(3));
        for absent in ["job_id", "signature", "sig_alg", "signing_key", "envelope"] {
            assert!(request.get(absent).is_none(), "{absent}");
        }
        let mut payload = request.clone();
        payload["job_id"] = json!(7);
        let read: borealis_protocol::events::QuickJobRun = serde_json::from_value(payload).unwrap();
        assert_eq!(STANDARD.decode(&read.script_content).unwrap(), b"echo hi");
        assert_eq!((read.session_target.as_deref(), read.target_session_id), (Some("specific_session"), Some(3)));
        assert_eq!((read.run_mode.as_str(), read.admin_user.as_str(), read.timeout_seconds), ("currentuser", "", 1));
        assert_eq!(read.environment.get("WHO").map(String::as_str), Some("me"));
        assert!(script.request(RunMode::System).get("session_target").is_none());
    }

    #[test]
    fn files_travel_while_they_are_small() {
        let document = |data: String| {
            json!({"script": "x", "files": [{"name": "a.txt", "mimeType": "text/plain", "size": 3, "data": data},
            {"name": "no data"}, {"data": "no name"}, 5]})
        };
        let small = run(document("YWJj".into()), json!({}));
        assert_eq!(small.files, [json!({"file_name": "a.txt", "size": 3, "mime_type": "text/plain", "data": "YWJj"})]);
        let large = run(document("A".repeat(FILES_SENT_MAX + 1)), json!({}));
        assert_eq!(large.files, [json!({"file_name": "a.txt", "size": 3, "mime_type": "text/plain"})]);
    }

    #[test]
    fn a_script_has_an_end() {
        assert_eq!(fault(json!({"script": "x".repeat(SCRIPT_MAX + 1)})), "script_too_large");
        assert_eq!(script(json!({"script": "x".repeat(SCRIPT_MAX)})).content.len(), SCRIPT_MAX);
    }

    #[test]
    fn a_virtual_path_has_safe_letters() {
        assert_eq!(virtual_path("script", "Say hi/../x", None), "Scripts/Say_hi_.._x");
        assert_eq!(virtual_path("script", "x", Some("Scripts/a.json")), "Scripts/a.json");
    }
}
