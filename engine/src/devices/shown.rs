//! A device as operators read it: which fields it has, and how they are written. What is read of the database is in `list.rs`.

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{
    Serialize,
    ser::{SerializeMap, SerializeSeq, Serializer},
};
use serde_json::{Map, Value, value::RawValue};
use sqlx::types::Json;
use uuid::Uuid;

use super::role_health;
use crate::{
    error::{Error, Result},
    keys::guid_text,
};

/// A stored document, as its text.
type Document = Option<Json<Box<RawValue>>>;

/// What is read of a device.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) guid: Uuid,
    pub(super) hostname: String,
    pub(super) reported_hostname: String,
    pub(super) hostname_change: Option<String>,
    pub(super) agent_socket: bool,
    pub(super) online: bool,
    pub(super) connection_state: String,
    pub(super) site_id: Option<i64>,
    pub(super) site_name: Option<String>,
    pub(super) site_description: Option<String>,
    pub(super) agent_id: String,
    pub(super) status: String,
    pub(super) description: String,
    pub(super) created_at: DateTime<Utc>,
    pub(super) last_enrollment_at: DateTime<Utc>,
    pub(super) last_seen: Option<DateTime<Utc>>,
    pub(super) agent_build_id: String,
    pub(super) device_type: String,
    pub(super) domain: String,
    pub(super) external_ip: String,
    pub(super) internal_ip: String,
    pub(super) last_reboot: String,
    pub(super) last_user: String,
    pub(super) operating_system: String,
    pub(super) uptime: i64,
    pub(super) cpu_percent: Option<f64>,
    pub(super) memory_percent: Option<f64>,
    pub(super) connection_type: String,
    pub(super) connection_endpoint: String,
    pub(super) agent_release_channel: String,
    pub(super) agent_branch: String,
    pub(super) summary: Option<Value>,
    pub(super) memory: Document,
    pub(super) network: Document,
    pub(super) software: Document,
    pub(super) services: Document,
    pub(super) storage: Document,
    pub(super) cpu: Document,
    pub(super) sessions: Document,
    pub(super) processes: Document,
    pub(super) role_health: Option<Value>,
    pub(super) agent_update: Option<Value>,
    pub(super) services_reported_at: Option<DateTime<Utc>>,
    pub(super) sessions_reported_at: Option<DateTime<Utc>>,
    pub(super) processes_reported_at: Option<DateTime<Utc>>,
}

impl Row {
    fn update(&self, name: &str) -> &str {
        self.agent_update.as_ref().and_then(|all| all.get(name)).and_then(Value::as_str).unwrap_or_default()
    }

    /// The channel that counts; agents that name none are on `stable`.
    fn channel(&self) -> &str {
        if self.agent_release_channel.is_empty() { "stable" } else { &self.agent_release_channel }
    }
}

/// The value of a field.
#[derive(Debug)]
pub(super) enum Cell<'a> {
    Text(&'a str),
    Written(String),
    Whole(i64),
    Id(Option<i64>),
    Share(Option<f64>),
    Flag(bool),
    Reason(Option<&'a str>),
    Document(&'a RawValue),
    EmptyList,
    EmptyObject,
}

impl Serialize for Cell<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Written(text) => serializer.serialize_str(text),
            Self::Whole(number) => serializer.serialize_i64(*number),
            Self::Id(id) => id.serialize(serializer),
            Self::Share(share) => share.serialize(serializer),
            Self::Flag(flag) => serializer.serialize_bool(*flag),
            Self::Reason(text) => text.serialize(serializer),
            Self::Document(text) => text.serialize(serializer),
            Self::EmptyList => serializer.serialize_seq(Some(0))?.end(),
            Self::EmptyObject => serializer.serialize_map(Some(0))?.end(),
        }
    }
}

/// Epoch seconds, 0 for never.
pub(super) fn epoch(at: Option<DateTime<Utc>>) -> i64 {
    at.map_or(0, |at| at.timestamp())
}

/// RFC 3339, empty for never.
fn iso(at: Option<DateTime<Utc>>) -> Cell<'static> {
    Cell::Written(at.map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true)).unwrap_or_default())
}

fn list(document: &Document) -> Cell<'_> {
    document.as_ref().map_or(Cell::EmptyList, |document| Cell::Document(&document.0))
}

type Read = for<'a> fn(&'a Row) -> Cell<'a>;
/// A field's name, and how it is read.
type Field = (&'static str, Read);

/// The fields that every device has. They override what the summary says of them.
const FIELDS: [Field; 42] = [
    ("hostname", |row| Cell::Text(&row.hostname)),
    ("description", |row| Cell::Text(&row.description)),
    ("created_at", |row| Cell::Whole(row.created_at.timestamp())),
    ("created_at_iso", |row| iso(Some(row.created_at))),
    ("last_enrollment_at", |row| Cell::Whole(row.last_enrollment_at.timestamp())),
    ("last_enrollment_at_iso", |row| iso(Some(row.last_enrollment_at))),
    ("agent_hash", |row| Cell::Text(&row.agent_build_id)),
    ("agent_build_id", |row| Cell::Text(&row.agent_build_id)),
    ("agent_guid", |row| Cell::Written(guid_text(row.guid))),
    ("guid", |row| Cell::Written(guid_text(row.guid))),
    ("agent_id", |row| Cell::Text(&row.agent_id)),
    ("device_type", |row| Cell::Text(&row.device_type)),
    ("domain", |row| Cell::Text(&row.domain)),
    ("external_ip", |row| Cell::Text(&row.external_ip)),
    ("internal_ip", |row| Cell::Text(&row.internal_ip)),
    ("last_reboot", |row| Cell::Text(&row.last_reboot)),
    ("last_seen", |row| Cell::Whole(epoch(row.last_seen))),
    ("last_seen_iso", |row| iso(row.last_seen)),
    ("cpu_percent", |row| Cell::Share(row.cpu_percent)),
    ("memory_percent", |row| Cell::Share(row.memory_percent)),
    ("last_user", |row| Cell::Text(&row.last_user)),
    ("operating_system", |row| Cell::Text(&row.operating_system)),
    ("uptime", |row| Cell::Whole(row.uptime)),
    ("connection_type", |row| Cell::Text(&row.connection_type)),
    ("connection_endpoint", |row| Cell::Text(&row.connection_endpoint)),
    ("agent_release_channel_override", |_| Cell::Text("")),
    ("agent_release_channel", |row| Cell::Text(&row.agent_release_channel)),
    ("agent_branch", |row| Cell::Text(&row.agent_branch)),
    ("agent_update_channel", |row| Cell::Text(row.update("channel"))),
    ("agent_update_target_build_id", |row| Cell::Text(row.update("target_build_id"))),
    ("agent_update_state", |row| Cell::Text(row.update("state"))),
    ("agent_update_error", |row| Cell::Text(row.update("error"))),
    ("agent_update_source", |row| Cell::Text(row.update("source"))),
    ("site_id", |row| Cell::Id(row.site_id)),
    ("site_name", |row| Cell::Text(row.site_name.as_deref().unwrap_or_default())),
    ("site_description", |row| Cell::Text(row.site_description.as_deref().unwrap_or_default())),
    ("status", |row| Cell::Text(if row.online { "Online" } else { "Offline" })),
    ("enrollment_status", |row| Cell::Text(&row.status)),
    ("reported_hostname", |row| Cell::Text(&row.reported_hostname)),
    ("hostname_change", |row| Cell::Reason(row.hostname_change.as_deref())),
    ("agent_socket", |row| Cell::Flag(row.agent_socket)),
    ("connection_state", |row| Cell::Text(&row.connection_state)),
];

/// What reads of a single device have in place of those of [`FIELDS`], or beside them. There is no published build to compare with yet:
/// the installed one is the target.
const VERSION: [Field; 5] = [
    ("agent_version_status", |row| Cell::Text(if row.agent_build_id.is_empty() { "Needs Updated" } else { "Up-to-Date" })),
    ("agent_target_build_id", |row| Cell::Text(&row.agent_build_id)),
    ("agent_target_published_at", |_| Cell::Whole(0)),
    ("agent_release_channel_override", |_| Cell::Reason(None)),
    ("agent_release_channel_effective", |row| Cell::Text(row.channel())),
];

/// The large documents. They are in the answer twice, as clients of the reference read either; they are the text that Postgres gave,
/// never parsed.
const DOCUMENTS: [Field; 8] = [
    ("memory", |row| list(&row.memory)),
    ("network", |row| list(&row.network)),
    ("software", |row| list(&row.software)),
    ("services", |row| list(&row.services)),
    ("storage", |row| list(&row.storage)),
    ("cpu", |row| row.cpu.as_ref().map_or(Cell::EmptyObject, |document| Cell::Document(&document.0))),
    ("sessions", |row| list(&row.sessions)),
    ("processes", |row| list(&row.processes)),
];

const REPORTED_AT: [Field; 3] = [
    ("services_reported_at", |row| Cell::Whole(epoch(row.services_reported_at))),
    ("sessions_reported_at", |row| Cell::Whole(epoch(row.sessions_reported_at))),
    ("processes_reported_at", |row| Cell::Whole(epoch(row.processes_reported_at))),
];

/// What of a device is shown.
#[derive(Debug, Clone)]
pub(super) enum Shown {
    /// Its own fields.
    Slim,
    /// The documents, too.
    All,
    /// And the status of its version.
    WithVersion,
    /// Only these.
    Only(Vec<Field>),
}

impl Shown {
    /// The fields that a list of names separated by commas names.
    ///
    /// # Errors
    /// 400 `invalid_fields` that names one which no device has.
    pub(super) fn only(names: &str) -> Result<Self> {
        let known = || FIELDS.iter().chain(&DOCUMENTS).chain(&REPORTED_AT);
        let mut fields: Vec<Field> = Vec::new();
        for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let found = known().find(|(known, _)| *known == name);
            let field = *found.ok_or_else(|| {
                let shown: String = name.chars().take(64).collect();
                Error::field("invalid_fields", "fields", format!("{shown:?} is no field of a device"))
            })?;
            if !fields.iter().any(|(known, _)| *known == name) {
                fields.push(field);
            }
        }
        if fields.is_empty() {
            return Err(Error::field("invalid_fields", "fields", "names no field"));
        }
        Ok(Self::Only(fields))
    }

    /// Whether the documents have to be read.
    pub(super) fn has_documents(&self) -> bool {
        match self {
            Self::Slim => false,
            Self::All | Self::WithVersion => true,
            Self::Only(fields) => {
                let of_details = |name: &str| {
                    DOCUMENTS.iter().chain(&REPORTED_AT).any(|(known, _)| *known == name) || name.starts_with("agent_update_")
                };
                fields.iter().any(|(name, _)| of_details(name))
            }
        }
    }
}

/// A device as operators read it.
#[derive(Debug)]
pub struct Device {
    pub(super) row: Row,
    pub(super) shown: std::sync::Arc<Shown>,
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let row = &self.row;
        let mut map = serializer.serialize_map(None)?;
        match &*self.shown {
            Shown::Only(fields) => {
                for (name, read) in fields {
                    map.serialize_entry(name, &read(row))?;
                }
            }
            Shown::Slim => {
                for (name, read) in &FIELDS {
                    map.serialize_entry(name, &read(row))?;
                }
            }
            shown @ (Shown::All | Shown::WithVersion) => {
                let version: &[Field] = if matches!(shown, Shown::WithVersion) { &VERSION } else { &[] };
                let is_replaced = |name: &str| version.iter().any(|(replaced, _)| *replaced == name);
                for (name, read) in FIELDS.iter().filter(|(name, _)| !is_replaced(name)).chain(version).chain(&DOCUMENTS) {
                    map.serialize_entry(name, &read(row))?;
                }
                // Written once, shown twice.
                let summary = serde_json::value::to_raw_value(&Summary(row)).map_err(serde::ser::Error::custom)?;
                map.serialize_entry("summary", &summary)?;
                map.serialize_entry("details", &Details { row, summary: &summary })?;
                let health: role_health::Document =
                    row.role_health.clone().and_then(|stored| serde_json::from_value(stored).ok()).unwrap_or_default();
                map.serialize_entry("agent_role_health", &health.shown(Utc::now().timestamp()))?;
                for (name, read) in &REPORTED_AT {
                    map.serialize_entry(name, &read(row))?;
                }
            }
        }
        map.end()
    }
}

/// What the agent says of the machine, with the device's own fields in place of those it has of the same name.
struct Summary<'a>(&'a Row);

impl Serialize for Summary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let none = Map::new();
        let stored = self.0.summary.as_ref().and_then(Value::as_object).unwrap_or(&none);
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in stored.iter().filter(|(name, _)| !FIELDS.iter().any(|(field, _)| field == name)) {
            map.serialize_entry(name, value)?;
        }
        for (name, read) in &FIELDS {
            map.serialize_entry(name, &read(self.0))?;
        }
        map.end()
    }
}

/// The documents and the summary, in one object.
struct Details<'a> {
    row: &'a Row,
    summary: &'a RawValue,
}

impl Serialize for Details<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, read) in &DOCUMENTS {
            map.serialize_entry(name, &read(self.row))?;
        }
        map.serialize_entry("summary", self.summary)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_named_once_and_known() {
        let Shown::Only(fields) = Shown::only(" hostname,software , hostname,").unwrap() else { panic!("some fields") };
        assert_eq!(fields.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["hostname", "software"]);
        assert!(Shown::only("hostname,software").unwrap().has_documents());
        assert!(!Shown::only("hostname,status").unwrap().has_documents());
        for wrong in ["", " , ", "hostname,nothing", "summary.cpu"] {
            assert_eq!(Shown::only(wrong).unwrap_err().code, "invalid_fields");
        }
    }

    #[test]
    fn no_field_is_there_twice() {
        let mut names: Vec<&str> = FIELDS.iter().chain(&DOCUMENTS).chain(&REPORTED_AT).map(|(name, _)| *name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
