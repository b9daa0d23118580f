//! Devices as operators see them. The caller's sites are part of every query.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{
    Serialize,
    ser::{SerializeMap, Serializer},
};
use serde_json::{Map, Value, json, value::RawValue};
use sqlx::types::Json;
use uuid::Uuid;

use super::{role_health, sockets::PROCESS_SILENCE_S};
use crate::{
    db,
    error::{Error, Result},
    keys::guid_text,
    names,
    scope::Scope,
};

/// The most devices one answer holds.
pub const MAX_ROWS: i64 = 10_000;
/// A device seen within this many seconds is being collected from.
pub const COLLECTING_S: i64 = 130;

/// Which devices.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// With exactly this hostname, in any case.
    pub hostname: Option<String>,
    /// With this connection type, in any case.
    pub connection_type: Option<String>,
    /// Only machines with an agent, that is without a connection type.
    pub only_agents: bool,
    /// Without the large documents.
    pub slim: bool,
    /// The most rows; [`MAX_ROWS`] unless less.
    pub limit: Option<i64>,
    /// Where the page before ended, as it answered.
    pub cursor: Option<String>,
}

/// One page.
#[derive(Debug, Serialize)]
pub struct Page {
    /// The devices, by hostname.
    pub devices: Vec<Device>,
    /// For the next page, when there is more.
    pub next_cursor: Option<String>,
}

/// A device as operators read it. The large documents are in the answer twice, as clients of the reference read either; they are the text
/// that Postgres gave, never parsed.
#[derive(Debug)]
pub struct Device {
    /// The device.
    pub guid: Uuid,
    /// What is shown at the top, and overrides what the summary says of it.
    scalars: Map<String, Value>,
    /// None of a slim one.
    documents: Option<Documents>,
}

/// The large documents of a device.
#[derive(Debug)]
struct Documents {
    named: [(&'static str, Box<RawValue>); 8],
    summary: Map<String, Value>,
    role_health: Value,
    reported_at: [(&'static str, i64); 3],
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in &self.scalars {
            map.serialize_entry(name, value)?;
        }
        if let Some(documents) = &self.documents {
            // Written once, shown twice.
            let summary = Merged { under: &documents.summary, over: &self.scalars };
            let summary = serde_json::value::to_raw_value(&summary).map_err(serde::ser::Error::custom)?;
            for (name, document) in &documents.named {
                map.serialize_entry(name, document)?;
            }
            map.serialize_entry("summary", &summary)?;
            map.serialize_entry("details", &Details { named: &documents.named, summary: &summary })?;
            map.serialize_entry("agent_role_health", &documents.role_health)?;
            for (name, at) in documents.reported_at {
                map.serialize_entry(name, &at)?;
            }
        }
        map.end()
    }
}

/// An object with the entries of two; those of `over` win.
struct Merged<'a> {
    under: &'a Map<String, Value>,
    over: &'a Map<String, Value>,
}

impl Serialize for Merged<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.under.iter().filter(|(name, _)| !self.over.contains_key(*name)).chain(self.over))
    }
}

/// The documents and the summary, in one object.
struct Details<'a> {
    named: &'a [(&'static str, Box<RawValue>)],
    summary: &'a RawValue,
}

impl Serialize for Details<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let documents = self.named.iter().map(|(name, document)| (*name, &**document));
        serializer.collect_map(documents.chain([("summary", self.summary)]))
    }
}

/// A stored document, as its text.
type Document = Option<Json<Box<RawValue>>>;

struct Row {
    guid: Uuid,
    hostname: String,
    reported_hostname: String,
    hostname_change: Option<String>,
    agent_socket: bool,
    online: bool,
    connection_state: String,
    site_id: Option<i64>,
    site_name: Option<String>,
    site_description: Option<String>,
    agent_id: String,
    status: String,
    description: String,
    created_at: DateTime<Utc>,
    last_enrollment_at: DateTime<Utc>,
    last_seen: Option<DateTime<Utc>>,
    agent_build_id: String,
    device_type: String,
    domain: String,
    external_ip: String,
    internal_ip: String,
    last_reboot: String,
    last_user: String,
    operating_system: String,
    uptime: i64,
    cpu_percent: Option<f64>,
    memory_percent: Option<f64>,
    connection_type: String,
    connection_endpoint: String,
    agent_release_channel: String,
    agent_branch: String,
    summary: Option<Value>,
    memory: Document,
    network: Document,
    software: Document,
    services: Document,
    storage: Document,
    cpu: Document,
    sessions: Document,
    processes: Document,
    role_health: Option<Value>,
    agent_update: Option<Value>,
    services_reported_at: Option<DateTime<Utc>>,
    sessions_reported_at: Option<DateTime<Utc>>,
    processes_reported_at: Option<DateTime<Utc>>,
}

/// Epoch seconds, 0 for never.
fn epoch(at: Option<DateTime<Utc>>) -> i64 {
    at.map_or(0, |at| at.timestamp())
}

/// RFC 3339, empty for never.
fn iso(at: Option<DateTime<Utc>>) -> String {
    at.map(|at| at.to_rfc3339_opts(SecondsFormat::Secs, true)).unwrap_or_default()
}

impl Row {
    fn into_device(self, slim: bool, now: DateTime<Utc>) -> Device {
        let last_seen = self.last_seen;
        let update = |name: &str| self.agent_update.as_ref().and_then(|all| all.get(name)).and_then(Value::as_str).unwrap_or("");
        let guid = guid_text(self.guid);
        let scalars = json!({
            "hostname": self.hostname,
            "description": self.description,
            "created_at": self.created_at.timestamp(),
            "created_at_iso": iso(Some(self.created_at)),
            "last_enrollment_at": self.last_enrollment_at.timestamp(),
            "last_enrollment_at_iso": iso(Some(self.last_enrollment_at)),
            "agent_hash": self.agent_build_id,
            "agent_build_id": self.agent_build_id,
            "agent_guid": guid,
            "guid": guid,
            "agent_id": self.agent_id,
            "device_type": self.device_type,
            "domain": self.domain,
            "external_ip": self.external_ip,
            "internal_ip": self.internal_ip,
            "last_reboot": self.last_reboot,
            "last_seen": epoch(last_seen),
            "last_seen_iso": iso(last_seen),
            "cpu_percent": self.cpu_percent,
            "memory_percent": self.memory_percent,
            "last_user": self.last_user,
            "operating_system": self.operating_system,
            "uptime": self.uptime,
            "connection_type": self.connection_type,
            "connection_endpoint": self.connection_endpoint,
            "agent_release_channel_override": "",
            "agent_release_channel": self.agent_release_channel,
            "agent_branch": self.agent_branch,
            "agent_update_channel": update("channel"),
            "agent_update_target_build_id": update("target_build_id"),
            "agent_update_state": update("state"),
            "agent_update_error": update("error"),
            "agent_update_source": update("source"),
            "site_id": self.site_id,
            "site_name": self.site_name.unwrap_or_default(),
            "site_description": self.site_description.unwrap_or_default(),
            "status": if self.online { "Online" } else { "Offline" },
            "enrollment_status": self.status,
        });
        let mut scalars = match scalars {
            Value::Object(scalars) => scalars,
            _ => Map::new(),
        };
        let more: [(&str, Value); 4] = [
            ("reported_hostname", self.reported_hostname.into()),
            ("hostname_change", self.hostname_change.into()),
            ("agent_socket", self.agent_socket.into()),
            ("connection_state", self.connection_state.into()),
        ];
        scalars.extend(more.map(|(name, value)| (name.to_owned(), value)));
        if slim {
            return Device { guid: self.guid, scalars, documents: None };
        }
        let list = |stored: Document| stored.map_or_else(|| raw("[]"), |document| document.0);
        let health: role_health::Document =
            self.role_health.and_then(|stored| serde_json::from_value(stored).ok()).unwrap_or_default();
        let documents = Documents {
            named: [
                ("memory", list(self.memory)),
                ("network", list(self.network)),
                ("software", list(self.software)),
                ("services", list(self.services)),
                ("storage", list(self.storage)),
                ("cpu", self.cpu.map_or_else(|| raw("{}"), |document| document.0)),
                ("sessions", list(self.sessions)),
                ("processes", list(self.processes)),
            ],
            summary: match self.summary {
                Some(Value::Object(summary)) => summary,
                _ => Map::new(),
            },
            role_health: health.shown(now.timestamp()),
            reported_at: [
                ("services_reported_at", epoch(self.services_reported_at)),
                ("sessions_reported_at", epoch(self.sessions_reported_at)),
                ("processes_reported_at", epoch(self.processes_reported_at)),
            ],
        };
        Device { guid: self.guid, scalars, documents: Some(documents) }
    }
}

/// A document of our own.
fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap_or_default()
}

fn encode_cursor(name: &str, guid: Uuid) -> String {
    URL_SAFE_NO_PAD.encode(format!("{guid}{name}"))
}

fn decode_cursor(cursor: &str) -> Result<(String, Uuid)> {
    let text = URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    text.as_deref()
        .and_then(|text| Some((text.get(36..)?.to_owned(), Uuid::try_parse(text.get(..36)?).ok()?)))
        .filter(|(name, _)| !name.contains('\0'))
        .ok_or_else(|| Error::field("invalid_cursor", "cursor", "is not one this list gave out"))
}

/// The devices in `scope` that pass the filter, by hostname.
///
/// # Errors
/// 400 `invalid_cursor`, `invalid_limit`.
pub async fn page(pool: &db::Pool, scope: &Scope, filter: &Filter) -> Result<Page> {
    let limit = match filter.limit {
        None => MAX_ROWS,
        Some(limit) if (1..=MAX_ROWS).contains(&limit) => limit,
        Some(_) => return Err(Error::field("invalid_limit", "limit", format!("must be 1 to {MAX_ROWS}"))),
    };
    let mut picked = pick(pool, scope, filter, limit + 1).await?;
    let more = i64::try_from(picked.len()).unwrap_or(i64::MAX) > limit;
    picked.truncate(usize::try_from(limit).unwrap_or_default());
    let next_cursor = picked.last().filter(|_| more).map(|(name, guid)| encode_cursor(name, *guid));
    let guids: Vec<Uuid> = picked.into_iter().map(|(_, guid)| guid).collect();
    Ok(Page { devices: describe(pool, scope, &guids, filter.slim).await?, next_cursor })
}

/// Which devices pass the filter: the key of the hostname and the GUID of each. Planned anew each time, as the filter decides
/// which index helps; that is cheap because it reads one table.
async fn pick(pool: &db::Pool, scope: &Scope, filter: &Filter, limit: i64) -> Result<Vec<(String, Uuid)>> {
    let (after_name, after_guid) = filter.cursor.as_deref().map(decode_cursor).transpose()?.unzip();
    let picked = sqlx::query!(
        r#"SELECT d.hostname_key, d.guid FROM devices AS d
           WHERE ($1::bigint[] IS NULL OR d.site_id = ANY($1))
             AND ($2::text IS NULL OR d.hostname_key = $2)
             AND ($3::text IS NULL OR lower(d.connection_type COLLATE "C") = lower($3 COLLATE "C"))
             AND (NOT $4 OR d.connection_type = '')
             AND ($5::text IS NULL OR (d.hostname_key, d.guid) > ($5, $6))
           ORDER BY d.hostname_key, d.guid
           LIMIT $7"#,
        scope.site_ids(),
        filter.hostname.as_deref().map(names::key),
        filter.connection_type,
        filter.only_agents,
        after_name,
        after_guid,
        limit,
    )
    .fetch_all(&mut *db::begin_wide(pool).await?)
    .await?;
    Ok(picked.into_iter().map(|row| (row.hostname_key, row.guid)).collect())
}

/// What there is to show of these devices, by hostname; those outside `scope` are left out. Each row is looked up by its key,
/// whatever Postgres thinks of the size of the tables and of the list, so that one kept plan is good for all.
async fn describe(pool: &db::Pool, scope: &Scope, guids: &[Uuid], slim: bool) -> Result<Vec<Device>> {
    let rows = sqlx::query_as!(
        Row,
        r#"SELECT d.guid, d.hostname, d.reported_hostname,
                  CASE WHEN d.reported_hostname_key IN ('', d.hostname_key) THEN NULL
                       WHEN EXISTS (SELECT FROM devices o WHERE o.hostname_key = d.reported_hostname_key AND o.guid <> d.guid
                                    AND o.site_id IS NOT DISTINCT FROM d.site_id) THEN 'conflict'
                       ELSE 'pending' END AS hostname_change,
                  p.agent_socket AS "agent_socket!", p.online AS "online!", p.connection_state AS "connection_state!",
                  d.site_id, s.name AS "site_name?",
                  s.description AS "site_description?", d.agent_id, d.status, d.description, d.created_at, d.last_enrollment_at,
                  d.last_seen, d.agent_build_id, d.device_type, d.domain, d.external_ip, d.internal_ip, d.last_reboot, d.last_user,
                  d.operating_system, d.uptime, d.cpu_percent, d.memory_percent, d.connection_type, d.connection_endpoint,
                  d.agent_release_channel, d.agent_branch,
                  x.summary AS "summary?", x.memory AS "memory?: Json<Box<RawValue>>", x.network AS "network?: Json<Box<RawValue>>", x.software AS "software?: Json<Box<RawValue>>",
                  x.services AS "services?: Json<Box<RawValue>>", x.storage AS "storage?: Json<Box<RawValue>>", x.cpu AS "cpu?: Json<Box<RawValue>>", x.sessions AS "sessions?: Json<Box<RawValue>>",
                  x.processes AS "processes?: Json<Box<RawValue>>", x.role_health AS "role_health?", x.agent_update AS "agent_update?",
                  x.services_reported_at AS "services_reported_at?", x.sessions_reported_at AS "sessions_reported_at?",
                  x.processes_reported_at AS "processes_reported_at?"
           FROM unnest((SELECT $1::uuid[])) AS wanted (guid)
           CROSS JOIN LATERAL (SELECT * FROM devices WHERE guid = wanted.guid LIMIT 1) AS d
           CROSS JOIN LATERAL device_presence_of(d.guid, d.last_seen, d.left_at) AS p
           LEFT JOIN LATERAL (SELECT name, description FROM sites WHERE id = d.site_id LIMIT 1) AS s ON true
           LEFT JOIN LATERAL (SELECT * FROM device_details WHERE device_guid = d.guid AND NOT $3 LIMIT 1) AS x ON true
           WHERE $2::bigint[] IS NULL OR d.site_id = ANY($2)
           ORDER BY d.hostname_key, d.guid"#,
        guids,
        scope.site_ids(),
        slim,
    )
    .fetch_all(pool)
    .await?;
    let now = Utc::now();
    Ok(rows.into_iter().map(|row| row.into_device(slim, now)).collect())
}

/// One device in `scope`.
///
/// # Errors
/// 404 `not found`.
pub async fn one(pool: &db::Pool, scope: &Scope, guid: Uuid) -> Result<Device> {
    describe(pool, scope, &[guid], false).await?.pop().map(with_version).ok_or_else(Error::not_found)
}

/// What reads of a single device add. There is no published build to compare with yet: the installed one is the target.
fn with_version(mut device: Device) -> Device {
    let text = |name: &str| device.scalars.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (build, channel) = (text("agent_build_id"), text("agent_release_channel"));
    let extra = [
        ("agent_version_status", if build.is_empty() { "Needs Updated".into() } else { "Up-to-Date".into() }),
        ("agent_target_build_id", build.into()),
        ("agent_target_published_at", 0.into()),
        ("agent_release_channel_override", Value::Null),
        ("agent_release_channel_effective", if channel.is_empty() { "stable".into() } else { channel.into() }),
    ];
    device.scalars.extend(extra.map(|(name, value)| (name.to_owned(), value)));
    device
}

/// The agents that are online in `scope`, keyed by agent id: one entry per live socket.
///
/// # Errors
/// When the database is away.
pub async fn agents(pool: &db::Pool, scope: &Scope) -> Result<Map<String, Value>> {
    let rows = sqlx::query!(
        r#"SELECT k.agent_id, k.service_mode, k.helper_contexts, d.agent_id AS device_agent_id, d.guid, d.hostname, d.site_id,
                  s.name AS "site_name?", s.description AS "site_description?", d.last_seen, d.agent_build_id, d.device_type,
                  d.connection_type, d.connection_endpoint, d.domain, d.external_ip, d.internal_ip, d.last_reboot, d.last_user,
                  d.operating_system, d.uptime
           FROM device_sockets AS k
           JOIN api_processes AS p ON p.id = k.api_process AND p.last_seen_at > now() - make_interval(secs => $2)
           JOIN devices AS d ON d.guid = k.device_guid
           LEFT JOIN sites AS s ON s.id = d.site_id
           WHERE ($1::bigint[] IS NULL OR d.site_id = ANY($1)) AND d.connection_type = ''
           ORDER BY d.hostname_key, d.guid, k.service_mode
           LIMIT $3"#,
        scope.site_ids(),
        PROCESS_SILENCE_S,
        MAX_ROWS * 2,
    )
    .fetch_all(pool)
    .await?;
    let now = Utc::now();
    let mut agents = Map::new();
    for row in rows {
        let guid = guid_text(row.guid);
        let id = [row.agent_id, row.device_agent_id].into_iter().find(|id| !id.is_empty()).unwrap_or_else(|| guid.clone());
        let collecting = row.last_seen.is_some_and(|at| (now - at).num_seconds() < COLLECTING_S);
        let entry = json!({
            "hostname": row.hostname,
            "agent_hostname": row.hostname,
            "service_mode": row.service_mode,
            "collector_active": collecting,
            "collector_active_ts": epoch(row.last_seen),
            "last_seen": epoch(row.last_seen),
            "status": "Online",
            "agent_id": id,
            "agent_guid": guid,
            "agent_hash": row.agent_build_id,
            "connection_type": row.connection_type,
            "connection_endpoint": row.connection_endpoint,
            "device_type": row.device_type,
            "domain": row.domain,
            "external_ip": row.external_ip,
            "internal_ip": row.internal_ip,
            "last_reboot": row.last_reboot,
            "last_user": row.last_user,
            "operating_system": row.operating_system,
            "uptime": row.uptime,
            "site_id": row.site_id,
            "site_name": row.site_name.unwrap_or_default(),
            "site_description": row.site_description.unwrap_or_default(),
            "helper_contexts": row.helper_contexts,
        });
        agents.insert(id, entry);
    }
    Ok(agents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_what_was_given_out() {
        let guid = Uuid::from_u128(5);
        assert_eq!(decode_cursor(&encode_cursor("wéb", guid)).unwrap(), ("wéb".to_owned(), guid));
        for bad in ["", "?", "YWJj", &URL_SAFE_NO_PAD.encode("é".repeat(40)), &encode_cursor("a\0", guid)] {
            assert_eq!(decode_cursor(bad).unwrap_err().code, "invalid_cursor");
        }
    }
}
