//! Devices as operators list them. The caller's sites are part of every query. How a device is written is in `shown.rs`.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Map, Value, json, value::RawValue};
use sqlx::types::Json;
use uuid::Uuid;

pub use super::shown::Device;
use super::{
    shown::{Row, Shown, epoch},
    sockets::PROCESS_SILENCE_S,
};
use crate::{
    db,
    error::{Error, Result},
    keys::guid_text,
    names,
    scope::Scope,
};

/// The most devices one answer holds.
pub const MAX_ROWS: i64 = 10_000;
/// A list of more is a long one.
const PAGE_ROWS: usize = 1_000;
/// The longest text that devices are searched for, in characters.
pub const SEARCH_MAX: usize = 200;
/// A device seen within this many seconds is being collected from.
pub const COLLECTING_S: i64 = 130;
/// How long before an answer its `as_of` is, in seconds: what was being written at that time is in the next answer.
const AS_OF_S: i64 = 15;

/// Which devices.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// With exactly this hostname, in any case.
    pub hostname: Option<String>,
    /// With this text in a hostname, address, description, domain, user, operating system or GUID, in any case; outside of hostnames
    /// letters beyond ASCII count as they are.
    pub search: Option<String>,
    /// With this connection type, in any case.
    pub connection_type: Option<String>,
    /// Only machines with an agent, that is without a connection type.
    pub only_agents: bool,
    /// Only those of which something has changed since, but for what every heartbeat changes.
    pub changed_after: Option<DateTime<Utc>>,
    /// The order; by hostname when there is none. See [`Sort::parse`].
    pub sort: Option<String>,
    /// Without the large documents.
    pub slim: bool,
    /// Only these fields, names separated by commas.
    pub fields: Option<String>,
    /// The most rows; [`MAX_ROWS`] unless less.
    pub limit: Option<i64>,
    /// Where the page before ended, as it answered.
    pub cursor: Option<String>,
}

/// What a list is ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    Hostname,
    CreatedAt,
    LastSeen,
}

/// The order of a list. Devices that are equal are in the order of their GUIDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sort {
    key: Key,
    descending: bool,
}

/// The order of a list that names none.
const BY_HOSTNAME: Sort = Sort { key: Key::Hostname, descending: false };

impl Sort {
    /// `hostname`, `created_at` or `last_seen`, descending after a `-`.
    fn parse(text: &str) -> Result<Self> {
        let (name, descending) = text.strip_prefix('-').map_or((text, false), |name| (name, true));
        let key = match name {
            "hostname" => Key::Hostname,
            "created_at" => Key::CreatedAt,
            "last_seen" => Key::LastSeen,
            _ => {
                let wanted = "must be hostname, created_at or last_seen, after a `-` for the opposite order";
                return Err(Error::field("invalid_sort", "sort", wanted));
            }
        };
        Ok(Self { key, descending })
    }

    fn name(self) -> &'static str {
        match self.key {
            Key::Hostname => "hostname",
            Key::CreatedAt => "created_at",
            Key::LastSeen => "last_seen",
        }
    }

    /// What a cursor of this order begins with; none for an order that changes while pages are read.
    fn mark(self) -> Option<char> {
        match (self.key, self.descending) {
            (Key::Hostname, false) => Some('h'),
            (Key::Hostname, true) => Some('H'),
            (Key::CreatedAt, false) => Some('c'),
            (Key::CreatedAt, true) => Some('C'),
            (Key::LastSeen, _) => None,
        }
    }
}

/// One page.
#[derive(Debug, Serialize)]
pub struct Page {
    /// The devices, in the order that was asked for.
    pub devices: Vec<Device>,
    /// For the next page, when there is more.
    pub next_cursor: Option<String>,
    /// What to ask `changed_after` next, to hear of what has changed since this answer: epoch seconds.
    pub as_of: i64,
}

impl Page {
    /// About how many bytes it has as JSON.
    #[must_use]
    pub fn about_bytes(&self) -> usize {
        let of_one = if self.devices.first().is_some_and(|device| device.shown.has_documents()) { 16 * 1024 } else { 1024 };
        self.devices.len() * of_one
    }
}

/// Where a page ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    guid: Uuid,
    hostname_key: Option<String>,
    created_at: Option<DateTime<Utc>>,
}

fn encode_cursor(sort: Sort, last: &Picked) -> Option<String> {
    let mark = sort.mark()?;
    let key = match sort.key {
        Key::CreatedAt => last.created_at.timestamp_micros().to_string(),
        _ => last.hostname_key.clone(),
    };
    Some(URL_SAFE_NO_PAD.encode(format!("{mark}{}{key}", last.guid)))
}

fn decode_cursor(sort: Sort, cursor: &str) -> Result<Place> {
    let read = || {
        let text = URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| String::from_utf8(bytes).ok())?;
        let rest = text.strip_prefix(sort.mark()?)?;
        let (guid, key) = (Uuid::try_parse(rest.get(..36)?).ok()?, rest.get(36..).filter(|key| !key.contains('\0'))?);
        Some(match sort.key {
            Key::CreatedAt => {
                Place { guid, hostname_key: None, created_at: Some(DateTime::from_timestamp_micros(key.parse().ok()?)?) }
            }
            _ => Place { guid, hostname_key: Some(key.to_owned()), created_at: None },
        })
    };
    read().ok_or_else(|| Error::field("invalid_cursor", "cursor", "is not one that this list gave out in this order"))
}

/// The devices in `scope` that pass the filter. A list by `last_seen` is one page: its order changes while it is read.
///
/// # Errors
/// 400 `invalid_cursor`, `invalid_fields`, `invalid_limit`, `invalid_search`, `invalid_sort`.
pub async fn page(pool: &db::Pool, scope: &Scope, filter: &Filter) -> Result<Page> {
    let limit = match filter.limit {
        None => MAX_ROWS,
        Some(limit) if (1..=MAX_ROWS).contains(&limit) => limit,
        Some(_) => return Err(Error::field("invalid_limit", "limit", format!("must be 1 to {MAX_ROWS}"))),
    };
    if filter.search.as_ref().is_some_and(|text| text.chars().count() > SEARCH_MAX) {
        return Err(Error::field("invalid_search", "q", format!("must have at most {SEARCH_MAX} characters")));
    }
    let shown = match &filter.fields {
        Some(names) => Shown::only(names)?,
        None if filter.slim => Shown::Slim,
        None => Shown::All,
    };
    let sort = filter.sort.as_deref().map_or(Ok(BY_HOSTNAME), Sort::parse)?;
    let as_of = Utc::now().timestamp() - AS_OF_S;
    let mut picked = pick(pool, scope, filter, sort, limit + 1).await?;
    let more = i64::try_from(picked.len()).unwrap_or(i64::MAX) > limit;
    picked.truncate(usize::try_from(limit).unwrap_or_default());
    let next_cursor = picked.last().filter(|_| more).and_then(|last| encode_cursor(sort, last));
    let guids: Vec<Uuid> = picked.into_iter().map(|picked| picked.guid).collect();
    Ok(Page { devices: describe(pool, scope, &guids, shown).await?, next_cursor, as_of })
}

/// A device that passes a filter.
struct Picked {
    guid: Uuid,
    hostname_key: String,
    created_at: DateTime<Utc>,
}

/// What is read most: a page of all devices, by hostname. One plan is good for each of its pages, by the index of that order.
async fn pick_next(pool: &db::Pool, after: Option<&Place>, limit: i64) -> Result<Vec<Picked>> {
    Ok(sqlx::query_as!(
        Picked,
        "SELECT guid, hostname_key, created_at FROM devices WHERE (hostname_key, guid) > ($1, $2) ORDER BY hostname_key, guid LIMIT $3",
        after.and_then(|after| after.hostname_key.as_deref()).unwrap_or_default(),
        after.map_or(Uuid::nil(), |after| after.guid),
        limit,
    )
    .fetch_all(pool)
    .await?)
}

/// Which devices pass the filter, in its order. Planned anew each time, as filter and order decide which index helps; that is cheap
/// because it reads one table.
async fn pick(pool: &db::Pool, scope: &Scope, filter: &Filter, sort: Sort, limit: i64) -> Result<Vec<Picked>> {
    let after = filter.cursor.as_deref().map(|cursor| decode_cursor(sort, cursor)).transpose()?;
    let after = after.as_ref();
    let everything = *scope == Scope::All
        && [&filter.hostname, &filter.search, &filter.connection_type].iter().all(|given| given.is_none())
        && !filter.only_agents
        && filter.changed_after.is_none();
    if everything && sort == BY_HOSTNAME {
        return pick_next(pool, after, limit).await;
    }
    let hostname = filter.search.as_deref().map(|text| pattern(&names::key(text)));
    Ok(sqlx::query_as!(
        Picked,
        r#"SELECT d.guid, d.hostname_key, d.created_at FROM devices AS d
           WHERE ($1::bigint[] IS NULL OR d.site_id = ANY($1))
             AND ($2::text IS NULL OR d.hostname_key = $2)
             AND ($3::text IS NULL OR lower(d.connection_type COLLATE "C") = lower($3 COLLATE "C"))
             AND (NOT $4 OR d.connection_type = '')
             AND ($5::text IS NULL OR d.hostname_key LIKE $5 OR d.reported_hostname_key LIKE $5
                  OR lower(concat_ws(chr(31), d.description, d.internal_ip, d.external_ip, d.domain, d.last_user, d.operating_system, d.guid) COLLATE "C") LIKE $13)
             AND ($6::timestamptz IS NULL OR d.changed_at >= $6)
             AND ($7::text IS NULL OR CASE WHEN $8 THEN (d.hostname_key, d.guid) < ($7, $9) ELSE (d.hostname_key, d.guid) > ($7, $9) END)
             AND ($10::timestamptz IS NULL
                  OR CASE WHEN $8 THEN (d.created_at, d.guid) < ($10, $9) ELSE (d.created_at, d.guid) > ($10, $9) END)
           ORDER BY CASE WHEN $11 = 'hostname' AND NOT $8 THEN d.hostname_key END, CASE WHEN $11 = 'hostname' AND $8 THEN d.hostname_key END DESC,
                    CASE WHEN $11 = 'created_at' AND NOT $8 THEN d.created_at END, CASE WHEN $11 = 'created_at' AND $8 THEN d.created_at END DESC,
                    CASE WHEN $11 = 'last_seen' AND NOT $8 THEN d.last_seen END NULLS FIRST,
                    CASE WHEN $11 = 'last_seen' AND $8 THEN d.last_seen END DESC NULLS LAST,
                    CASE WHEN NOT $8 THEN d.guid END, CASE WHEN $8 THEN d.guid END DESC
           LIMIT $12"#,
        scope.site_ids(),
        filter.hostname.as_deref().map(names::key),
        filter.connection_type,
        filter.only_agents,
        hostname,
        filter.changed_after,
        after.and_then(|after| after.hostname_key.clone()),
        sort.descending,
        after.map(|after| after.guid),
        after.and_then(|after| after.created_at),
        sort.name(),
        limit,
        filter.search.as_deref().map(|text| pattern(&text.to_ascii_lowercase())),
    )
    .fetch_all(&mut *db::begin_wide(pool).await?)
    .await?)
}

/// What LIKE finds a text with.
fn pattern(text: &str) -> String {
    let mut pattern = String::from("%");
    for letter in text.chars() {
        if matches!(letter, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern.push('%');
    pattern
}

/// What there is to show of these devices, in this order; those outside `scope` are left out. The rows of a page are looked up by their
/// keys: Postgres is not told how many there are, nor whether documents are wanted, so that one kept plan costs as much as any other and
/// none is made anew. A long list reads each table once.
async fn describe(pool: &db::Pool, scope: &Scope, guids: &[Uuid], shown: Shown) -> Result<Vec<Device>> {
    let query = sqlx::query_as!(
        Row,
        r#"SELECT d.guid, d.hostname, d.reported_hostname,
                  CASE WHEN d.reported_hostname_key IN ('', d.hostname_key) THEN NULL
                       WHEN EXISTS (SELECT FROM devices o WHERE o.hostname_key = d.reported_hostname_key AND o.guid <> d.guid
                                    AND o.site_id IS NOT DISTINCT FROM d.site_id) THEN 'conflict'
                       ELSE 'pending' END AS hostname_change,
                  k.device_guid IS NOT NULL AS "agent_socket!", p.online AS "online!", p.connection_state AS "connection_state!",
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
           FROM unnest((SELECT $1::uuid[])) WITH ORDINALITY AS wanted (guid, at)
           JOIN devices AS d ON d.guid = wanted.guid
           LEFT JOIN live_system_sockets AS k ON k.device_guid = d.guid
           CROSS JOIN LATERAL presence(k.device_guid IS NOT NULL, d.last_seen, d.left_at) AS p
           LEFT JOIN sites AS s ON s.id = d.site_id
           LEFT JOIN LATERAL (SELECT * FROM device_details WHERE device_guid = d.guid AND (SELECT $3::boolean) LIMIT 1) AS x ON true
           WHERE $2::bigint[] IS NULL OR d.site_id = ANY($2)
           ORDER BY wanted.at"#,
        guids,
        scope.site_ids(),
        shown.has_documents(),
    );
    let rows = if guids.len() > PAGE_ROWS {
        let mut tx = db::begin_wide(pool).await?;
        sqlx::raw_sql("SET LOCAL enable_nestloop = off").execute(&mut *tx).await?;
        query.fetch_all(&mut *tx).await?
    } else {
        query.fetch_all(pool).await?
    };
    let shown = Arc::new(shown);
    Ok(rows.into_iter().map(|row| Device { row, shown: Arc::clone(&shown) }).collect())
}

/// One device in `scope`.
///
/// # Errors
/// 404 `not found`.
pub async fn one(pool: &db::Pool, scope: &Scope, guid: Uuid) -> Result<Device> {
    describe(pool, scope, &[guid], Shown::WithVersion).await?.pop().ok_or_else(Error::not_found)
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
    fn a_cursor_is_what_was_given_out_in_its_order() {
        let picked = Picked { guid: Uuid::from_u128(5), hostname_key: "wéb".to_owned(), created_at: DateTime::UNIX_EPOCH };
        for text in ["hostname", "-hostname", "created_at", "-created_at"] {
            let sort = Sort::parse(text).unwrap();
            let cursor = encode_cursor(sort, &picked).unwrap();
            let place = decode_cursor(sort, &cursor).unwrap();
            assert_eq!(place.guid, picked.guid);
            match sort.key {
                Key::CreatedAt => assert_eq!(place.created_at, Some(picked.created_at)),
                _ => assert_eq!(place.hostname_key.as_deref(), Some("wéb")),
            }
            let other = Sort { descending: !sort.descending, ..sort };
            assert_eq!(decode_cursor(other, &cursor).unwrap_err().code, "invalid_cursor");
        }
        assert!(encode_cursor(Sort::parse("last_seen").unwrap(), &picked).is_none());
        let sort = Sort::parse("hostname").unwrap();
        let zero = encode_cursor(sort, &Picked { hostname_key: "a\0".to_owned(), ..picked }).unwrap();
        for bad in ["", "?", "YWJj", &URL_SAFE_NO_PAD.encode("é".repeat(40)), &zero] {
            assert_eq!(decode_cursor(sort, bad).unwrap_err().code, "invalid_cursor");
        }
        for wrong in ["", "-", "name", "--hostname", "hostname "] {
            assert_eq!(Sort::parse(wrong).unwrap_err().code, "invalid_sort");
        }
    }

    #[test]
    fn what_is_searched_for_is_text() {
        assert_eq!(pattern(r"50%_\a"), r"%50\%\_\\a%");
    }
}
