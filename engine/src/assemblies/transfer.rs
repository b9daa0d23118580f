//! Assemblies as documents that travel: from the editor of existing clients, from an export, and back.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{AssemblyBody, Detail, SUMMARY_MAX, TEXT_MAX, create, get, update};
use crate::{
    db::Pool,
    error::{Error, Kind, Result},
    names,
    scope::Caller,
    work,
};

/// What an assembly without a name is called.
const UNNAMED: &str = "Imported Assembly";
/// Fields of a record that are no part of a document.
const RECORD_KEYS: [&str; 18] = [
    "assembly_type",
    "assembly_subtype",
    "display_name",
    "summary",
    "domain",
    "payload_guid",
    "source_repo",
    "source_path",
    "source_version",
    "content_hash",
    "created_at",
    "updated_at",
    "is_dirty",
    "dirty_since",
    "last_persisted",
    "version",
    "category",
    "sites",
];

/// The body of `POST /api/assemblies/import`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImportBody {
    /// An object, or its JSON as text.
    pub document: Option<Value>,
    /// The same.
    pub payload: Option<Value>,
    /// `user`, the default; of an assembly that is there, its own.
    pub domain: Option<String>,
    /// The assembly to change; else that of the document. One that is not there is kept for administrators only.
    pub assembly_guid: Option<String>,
}

/// Makes an assembly of a document, or changes the one with its guid. An operator's new one gets a guid of the engine's.
///
/// # Errors
/// 400 `missing_document`, `invalid_document`, `unknown_document_type`, `not_supported_yet`; else as [`create`] and [`update`].
pub async fn import(pool: &Pool, caller: Caller<'_>, body: ImportBody) -> Result<Detail> {
    let mut document: Map<String, Value> = match body.document.or(body.payload) {
        None | Some(Value::Null) => return Err(Error::field("missing_document", "document", "is required")),
        Some(Value::Object(document)) => document,
        Some(Value::String(text)) => serde_json::from_str(text.trim_start_matches('\u{feff}'))
            .map_err(|_| Error::field("invalid_document", "document", "is not the JSON of an object"))?,
        Some(_) => return Err(Error::field("invalid_document", "document", "must be an object, or its JSON as text")),
    };
    check_type(&document)?;
    let text = |document: &Map<String, Value>, keys: &[&str]| {
        let found = keys.iter().filter_map(|key| document.get(*key)?.as_str()).map(str::trim).find(|text| !text.is_empty());
        found.map(str::to_owned)
    };
    let guid = body.assembly_guid.filter(|guid| !guid.trim().is_empty()).or_else(|| text(&document, &["assembly_guid"]));
    let guid = guid.map(|guid| guid.trim().to_lowercase());
    // A document in which a whole record stands around the script.
    if let Some(Value::Object(inner)) = document.get("payload") {
        let mut inner = inner.clone();
        for key in ["name", "display_name", "description"] {
            if let (Some(value), false) = (document.get(key), inner.contains_key(key)) {
                inner.insert(key.to_owned(), value.clone());
            }
        }
        document = inner;
    }
    let name = text(&document, &["display_name", "name", "tab_name"]);
    let shortened =
        |text: String, max: usize| -> String { text.chars().filter(|c| !c.is_control() || *c == '\n').take(max).collect() };
    let summary = text(&document, &["description", "summary"]).map(|text| shortened(text, SUMMARY_MAX));
    let mut change = AssemblyBody {
        display_name: name.map(|text| names::visible(&text, TEXT_MAX)).filter(|name| !name.is_empty()),
        summary,
        payload: Some(Value::Object(document)),
        ..AssemblyBody::default()
    };
    if let Some(guid) = &guid {
        match update(pool, caller, guid, change.clone(), None).await {
            Err(error) if error.kind == Kind::NotFound => {}
            done => return done,
        }
    }
    change.domain = Some(body.domain.unwrap_or_else(|| "user".to_owned()));
    change.display_name = change.display_name.or_else(|| Some(UNNAMED.to_owned()));
    change.assembly_guid = guid.filter(|_| caller.is_admin());
    create(pool, caller, change).await
}

/// Refuses what is no script.
fn check_type(document: &Map<String, Value>) -> Result<()> {
    let said = |keys: &[&str]| -> Vec<String> {
        keys.iter().filter_map(|key| document.get(*key)?.as_str()).map(|text| text.trim().to_ascii_lowercase()).collect()
    };
    let has = |keys: &[&str]| keys.iter().any(|key| document.contains_key(*key));
    let words = said(&["assembly_type", "kind", "assembly_subtype", "type", "script_type"]);
    let other = ["workflow", "ansible"].into_iter().find(|kind| words.iter().any(|word| word == kind));
    let other = other.or_else(|| (has(&["workflow"]) || (has(&["nodes"]) && has(&["edges"]))).then_some("workflow"));
    if let Some(kind) = other {
        return Err(Error::field(
            "not_supported_yet",
            "document",
            format!("a document of kind {kind} is not supported by this version"),
        ));
    }
    if has(&["script", "script_lines", "content", "payload"]) {
        return Ok(());
    }
    if has(&["playbook", "tasks", "roles"]) {
        return Err(Error::field("not_supported_yet", "document", "a document of kind ansible is not supported by this version"));
    }
    Err(Error::field("unknown_document_type", "document", "has no script"))
}

/// An assembly as a document, and about how many bytes that is: what [`import`] takes. It says how its script is written.
///
/// # Errors
/// 404.
pub async fn export(pool: &Pool, guid: &str) -> Result<(usize, Map<String, Value>)> {
    let detail = get(pool, guid).await?;
    let bytes = detail.payload.len();
    Ok((bytes, work::sized(bytes, move || document(detail)).await?))
}

fn document(Detail { item, payload, payload_json }: Detail) -> Map<String, Value> {
    let document = payload_json.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok());
    let mut document = match document {
        Some(Value::Object(document)) => document,
        _ => Map::from_iter([("content".to_owned(), payload.into()), ("script_encoding".to_owned(), "plain".into())]),
    };
    for key in RECORD_KEYS {
        document.remove(key);
    }
    document.insert("assembly_guid".into(), item.assembly_guid.into());
    for (key, value) in [("name", item.display_name), ("description", item.description), ("type", item.assembly_subtype)] {
        if document.get(key).and_then(Value::as_str).is_none_or(|text| text.trim().is_empty()) {
            document.insert(key.into(), value.into());
        }
    }
    document
}
