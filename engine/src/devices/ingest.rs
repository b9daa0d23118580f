//! What agents report of themselves. A device is its GUID, from its token; nothing in a body decides
//! whose row is written.

use borealis_protocol::rest::PHASE_STOPPED;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    clean, hostnames, metadata,
    role_health::{self, Document, Role},
    summary,
};
use crate::{
    db,
    enrollment::{requests, tokens::DeviceIdentity},
    error::{Error, Kind, Result},
    keys::guid_text,
    names::Name,
    work,
};

/// How long an identical status is only noted, in seconds.
pub const STATUS_WINDOW_S: i64 = 30;
/// At most one status event in this many seconds.
pub const STATUS_EVENT_S: i64 = 10;
/// How long identical details are only noted, in seconds.
pub const DETAILS_WINDOW_S: i64 = 60;

const MAX_TEXT_CHARS: usize = 512;
/// The last milestone of an agent's start.
const STEADY_STATE: &str = "steady_state_online";
/// The milestones before it that an agent may report again later.
const BOOT_PHASES: [&str; 14] = [
    "process_start",
    "server_config_loaded",
    "identity_loaded",
    "authenticating",
    "authenticated",
    "roles_loading",
    "roles_ready",
    "helper_broker_ready",
    "wireguard_starting",
    "wireguard_online",
    "inventory_ready",
    "status_channel_online",
    "socket_connecting",
    "socket_connected",
];

/// What every report is answered with.
#[derive(Debug, Clone)]
pub struct Noted {
    /// The device's site.
    pub site_id: Option<i64>,
    /// The site's name, or nothing.
    pub site_name: String,
    /// The report repeated the one before.
    pub coalesced: bool,
    /// The metadata fields that need not be sent again, by name.
    pub metadata_acks: Vec<String>,
    /// The device's service has a socket, at whichever API process.
    pub has_socket: bool,
}

fn gone() -> Error {
    Error::new(Kind::NotFound, "device_not_registered", "There is no such device.")
}

/// The first of `names` that is a non-empty text or a number, as one line.
fn first(map: &Map<String, Value>, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| match map.get(*name)? {
        Value::String(text) => Some(clean::line(text, MAX_TEXT_CHARS)).filter(|text| !text.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    })
}

fn object<'a>(map: &'a Map<String, Value>, name: &str) -> Option<&'a Map<String, Value>> {
    map.get(name).and_then(Value::as_object)
}

fn number(map: &Map<String, Value>, name: &str) -> Option<f64> {
    map.get(name).and_then(|value| value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())).filter(|n| n.is_finite())
}

fn percent(map: &Map<String, Value>, name: &str) -> Option<f64> {
    number(map, name).map(|n| n.clamp(0.0, 100.0))
}

fn seconds(map: &Map<String, Value>, names: &[&str]) -> Option<i64> {
    names.iter().find_map(|name| number(map, name)).filter(|n| (0.0..1e15).contains(n)).map(|n| n as i64)
}

/// Whether a branch name is one.
#[must_use]
pub fn is_branch(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
    !text.is_empty()
        && text.len() <= 160
        && text.chars().all(allowed)
        && !text.starts_with(['/', '.'])
        && !text.ends_with(['/', '.'])
        && !text.contains("..")
        && !text.contains("//")
}

/// `system` or `currentuser`: from the body, else from the context header.
#[must_use]
pub fn service_mode(stated: Option<&str>, header: &str) -> &'static str {
    let mode = stated.map(str::trim).filter(|mode| !mode.is_empty()).unwrap_or(header);
    if role_health::context(mode) == "currentuser" { "currentuser" } else { "system" }
}

/// The scalar columns a report may set; nothing means keep.
#[derive(Debug, Default, PartialEq)]
struct Scalars {
    hostname: Option<Name>,
    agent_id: Option<String>,
    build: Option<String>,
    device_type: Option<String>,
    domain: Option<String>,
    external_ip: Option<String>,
    internal_ip: Option<String>,
    last_reboot: Option<String>,
    last_user: Option<String>,
    operating_system: Option<String>,
    uptime: Option<i64>,
    cpu_percent: Option<f64>,
    memory_percent: Option<f64>,
    connection_type: Option<String>,
    connection_endpoint: Option<String>,
    channel: Option<String>,
    branch: Option<String>,
}

/// What [`Scalars::write`] leads to.
struct Written<'a> {
    noted: Noted,
    /// A hostname that was not reported before, and has not been written.
    renamed: Option<&'a Name>,
}

/// A reported hostname; none where it cannot be one, which is no reason to refuse a report.
fn hostname(value: Option<&Value>) -> Option<Name> {
    requests::hostname(value?.as_str()?).ok()
}

const BUILD: [&str; 3] = ["agent_build_id", "installed_build_id", "agent_hash"];

impl Scalars {
    fn of_heartbeat(body: &Map<String, Value>) -> Self {
        let empty = Map::new();
        let metrics = object(body, "metrics").unwrap_or(&empty);
        Self {
            hostname: hostname(body.get("hostname")),
            build: first(body, &BUILD),
            device_type: first(body, &["device_type"]),
            domain: first(metrics, &["domain"]),
            external_ip: first(body, &["external_ip"]),
            internal_ip: first(body, &["internal_ip"]),
            last_reboot: first(metrics, &["last_reboot"]),
            last_user: first(metrics, &["last_user"]),
            operating_system: first(metrics, &["operating_system"]),
            uptime: seconds(metrics, &["uptime"]),
            cpu_percent: percent(metrics, "cpu_percent"),
            memory_percent: percent(metrics, "memory_percent"),
            channel: first(body, &["agent_release_channel"]),
            branch: first(body, &["agent_branch"]).filter(|branch| is_branch(branch)),
            ..Self::default()
        }
    }

    fn of_details(body: &Map<String, Value>, summary: &Map<String, Value>, guid: Uuid) -> Self {
        Self {
            hostname: hostname(body.get("hostname").or_else(|| summary.get("hostname"))),
            // An agent id names its device; one that names another is not taken.
            agent_id: first(body, &["agent_id"]).filter(|id| id.to_uppercase().contains(&guid_text(guid))),
            build: first(body, &BUILD).or_else(|| first(summary, &BUILD)),
            device_type: first(summary, &["device_type", "type"]),
            domain: first(summary, &["domain"]),
            external_ip: first(summary, &["external_ip", "public_ip"]),
            internal_ip: first(summary, &["internal_ip", "private_ip"]),
            last_reboot: first(summary, &["last_reboot", "last_boot"]),
            last_user: first(summary, &["last_user", "last_user_name", "username"]),
            operating_system: first(summary, &["operating_system", "agent_operating_system", "os"]),
            uptime: seconds(summary, &["uptime_sec", "uptime_seconds", "uptime"]),
            cpu_percent: percent(summary, "cpu_percent"),
            memory_percent: percent(summary, "memory_percent"),
            connection_type: first(summary, &["connection_type", "remote_type"]),
            connection_endpoint: first(
                summary,
                &["connection_endpoint", "connection_address", "address", "external_ip", "internal_ip"],
            ),
            channel: first(body, &["agent_release_channel"])
                .or_else(|| first(summary, &["agent_release_channel", "release_channel"])),
            branch: first(body, &["agent_branch"])
                .or_else(|| first(summary, &["agent_branch", "branch", "repo_ref", "repo_branch"]))
                .filter(|branch| is_branch(branch)),
        }
    }

    /// Writes them, but for a hostname that changed, in one statement on the narrow row. The first hostname of a device that reports
    /// the approved one has not changed. `alive` says whether the report is a sign of life.
    async fn write(&self, db: &mut sqlx::PgConnection, guid: Uuid, alive: bool) -> Result<Written<'_>> {
        let row = sqlx::query!(
            r#"UPDATE devices AS d SET
                   last_seen = CASE WHEN $2 THEN now() ELSE d.last_seen END, left_at = CASE WHEN $2 THEN NULL ELSE d.left_at END,
                   agent_id = coalesce($4, d.agent_id),
                   agent_build_id = coalesce($5, d.agent_build_id), device_type = coalesce($6, d.device_type),
                   domain = coalesce($7, d.domain), external_ip = coalesce($8, d.external_ip),
                   internal_ip = coalesce($9, d.internal_ip), last_reboot = coalesce($10, d.last_reboot),
                   last_user = coalesce($11, d.last_user), operating_system = coalesce($12, d.operating_system),
                   uptime = coalesce($13, d.uptime), cpu_percent = coalesce($14, d.cpu_percent),
                   memory_percent = coalesce($15, d.memory_percent), connection_type = coalesce($16, d.connection_type),
                   connection_endpoint = coalesce($17, d.connection_endpoint),
                   agent_release_channel = coalesce($18, d.agent_release_channel), agent_branch = coalesce($19, d.agent_branch),
                   reported_hostname = CASE WHEN d.reported_hostname = '' AND d.hostname = $3 THEN $3 ELSE d.reported_hostname END,
                   reported_hostname_key =
                       CASE WHEN d.reported_hostname = '' AND d.hostname = $3 THEN $20 ELSE d.reported_hostname_key END
               WHERE d.guid = $1
               RETURNING d.site_id, coalesce((SELECT s.name FROM sites AS s WHERE s.id = d.site_id), '') AS "site_name!",
                         coalesce(d.reported_hostname <> $3, false) AS "renamed!",
                         EXISTS (SELECT FROM device_sockets AS k WHERE k.device_guid = d.guid AND k.service_mode = 'system') AS "has_socket!""#,
            guid,
            alive,
            self.hostname.as_ref().map(Name::as_str),
            self.agent_id,
            self.build,
            self.device_type,
            self.domain,
            self.external_ip,
            self.internal_ip,
            self.last_reboot,
            self.last_user,
            self.operating_system,
            self.uptime,
            self.cpu_percent,
            self.memory_percent,
            self.connection_type,
            self.connection_endpoint,
            self.channel,
            self.branch,
            self.hostname.as_ref().map(Name::key),
        )
        .fetch_optional(db)
        .await?
        .ok_or_else(gone)?;
        let noted = Noted {
            site_id: row.site_id,
            site_name: row.site_name,
            coalesced: false,
            metadata_acks: Vec::new(),
            has_socket: row.has_socket,
        };
        Ok(Written { noted, renamed: self.hostname.as_ref().filter(|_| row.renamed) })
    }

    /// Writes all of them inside a transaction.
    async fn store(&self, tx: &mut db::Tx<'_>, device: &DeviceIdentity, alive: bool) -> Result<Noted> {
        let written = self.write(tx, device.guid, alive).await?;
        if let Some(name) = written.renamed {
            hostnames::reported(tx, device, name).await?;
        }
        Ok(written.noted)
    }
}

/// All five members, empty ones included.
fn agent_update(body: &Map<String, Value>) -> Option<Value> {
    let update = object(body, "agent_update_status")?;
    let text = |names: &[&str]| first(update, names).unwrap_or_default();
    Some(json!({
        "operation_id": text(&["operation_id"]),
        "channel": text(&["target_channel", "effective_channel"]),
        "target_branch": text(&["target_branch"]),
        "target_build_id": text(&["target_build_id"]),
        "state": text(&["state", "status"]),
        "error": text(&["last_error"]),
        "source": text(&["last_source"]),
    }))
}

/// A heartbeat: the sign of life, with the scalars, lists, role health and metadata fields it brings. Software in it is ignored; that
/// comes with the details.
///
/// # Errors
/// 404 `device_not_registered`.
pub async fn heartbeat(pool: &db::Pool, device: &DeviceIdentity, context: &str, body: &Map<String, Value>) -> Result<Noted> {
    let scalars = Scalars::of_heartbeat(body);
    let empty = Map::new();
    let inventory = object(body, "inventory").unwrap_or(&empty);
    let part = |name: &str, fits: fn(&Value) -> bool| inventory.get(name).filter(|v| fits(v)).cloned().map(clean::json);
    let memory = part("memory", Value::is_array);
    let network = part("network", Value::is_array);
    let storage = part("storage", Value::is_array);
    let cpu = part("cpu", Value::is_object);
    let update = agent_update(body);
    let health = body.get("agent_role_health").filter(|value| value.is_object() || value.is_array());
    let nothing_more = memory.is_none() && network.is_none() && storage.is_none() && cpu.is_none() && update.is_none();
    let fields = object(body, "metadata_fields").map(|fields| metadata::read(fields, Utc::now())).unwrap_or_default();
    if nothing_more && health.is_none() && fields.is_empty() {
        let written = scalars.write(&mut *pool.acquire().await?, device.guid, true).await?;
        if let Some(name) = written.renamed {
            let mut tx = pool.begin().await?;
            hostnames::reported(&mut tx, device, name).await?;
            tx.commit().await?;
        }
        return Ok(written.noted);
    }
    let mode = stated_mode(body, context);
    let mut tx = pool.begin().await?;
    let mut noted = scalars.store(&mut tx, device, true).await?;
    noted.metadata_acks = metadata::store(&mut tx, device.guid, &fields).await?;
    // The device's row is locked by the update above, so the read and the write of the document are one.
    let role_health = match health {
        Some(report) => merged_health(&mut tx, device.guid, report, mode).await?,
        None => None,
    };
    if nothing_more && role_health.is_none() {
        tx.commit().await?;
        return Ok(noted);
    }
    sqlx::query!(
        "INSERT INTO device_details AS x (device_guid, memory, network, storage, cpu, agent_update, role_health)
         VALUES ($1, coalesce($2::jsonb, '[]'), coalesce($3::jsonb, '[]'), coalesce($4::jsonb, '[]'), coalesce($5::jsonb, '{}'),
                 coalesce($6::jsonb, '{}'), coalesce($7::jsonb, '{}'))
         ON CONFLICT (device_guid) DO UPDATE SET memory = coalesce($2, x.memory), network = coalesce($3, x.network),
             storage = coalesce($4, x.storage), cpu = coalesce($5, x.cpu), agent_update = coalesce($6, x.agent_update),
             role_health = coalesce($7, x.role_health)
         WHERE $7::jsonb IS NOT NULL OR (x.memory, x.network, x.storage, x.cpu, x.agent_update) IS DISTINCT FROM
             (coalesce($2, x.memory), coalesce($3, x.network), coalesce($4, x.storage), coalesce($5, x.cpu), coalesce($6, x.agent_update))",
        device.guid,
        memory,
        network,
        storage,
        cpu,
        update,
        role_health,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(noted)
}

fn stated_mode(body: &Map<String, Value>, context: &str) -> &'static str {
    let stated = body.get("service_mode").or_else(|| object(body, "metrics")?.get("service_mode")).and_then(Value::as_str);
    service_mode(stated, context)
}

async fn stored_health(db: &mut sqlx::PgConnection, guid: Uuid) -> Result<Document> {
    let stored =
        sqlx::query_scalar!("SELECT role_health FROM device_details WHERE device_guid = $1", guid).fetch_optional(db).await?;
    // What cannot be read is older than this form and is replaced.
    Ok(stored.and_then(|stored| serde_json::from_value(stored).ok()).unwrap_or_default())
}

/// The stored document with a report merged into it; none while the report only repeats it.
async fn merged_health(db: &mut sqlx::PgConnection, guid: Uuid, report: &Value, mode: &str) -> Result<Option<Value>> {
    let stored = stored_health(db, guid).await?;
    let report = Document::read(report, mode, Utc::now().timestamp());
    let merged = stored.clone().merge(report, mode);
    Ok(if merged.repeats(&stored) { None } else { Some(serde_json::to_value(merged)?) })
}

/// A status report, read.
#[derive(Debug, Clone, PartialEq)]
struct Status {
    mode: &'static str,
    boot_id: String,
    phase: String,
    status: &'static str,
    message: String,
    milestones: Value,
    last_error: Value,
}

/// The five words operators see.
fn normal_status(text: &str) -> &'static str {
    match text.trim().to_lowercase().as_str() {
        "healthy" | "ok" | "online" | "complete" | "completed" | "ready" => "healthy",
        "unhealthy" | "failed" | "error" => "unhealthy",
        "unknown" => "unknown",
        _ => "recovering",
    }
}

impl Status {
    fn read(body: &Map<String, Value>, context: &str) -> Self {
        let text = |name: &str| first(body, &[name]).unwrap_or_default();
        let milestones = body.get("milestones").filter(|value| value.is_array()).cloned().map(clean::json);
        let last_error = body.get("last_error").filter(|v| v.is_object() || v.is_array() || v.is_string()).cloned();
        Self {
            mode: stated_mode(body, context),
            boot_id: text("boot_id"),
            phase: text("phase"),
            status: normal_status(&text("status")),
            message: role_health::readable(&text("message")),
            milestones: milestones.unwrap_or_else(|| json!([])),
            last_error: last_error.map(clean::json).unwrap_or_default(),
        }
    }

    fn signature(&self) -> Result<Vec<u8>> {
        let all = serde_json::to_vec(&(
            (self.mode, &self.boot_id, &self.phase, &self.message),
            (self.status, &self.milestones, &self.last_error),
        ))?;
        Ok(Sha256::digest(all).to_vec())
    }

    /// What is shown after `before`, the startup role as it is stored; none when that stays. A boot that has once reached its
    /// steady state does not fall back: agents go on to report single phases of it, each with only those before it complete.
    fn after(self, before: Option<&Role>) -> Option<Self> {
        let Some(before) = before else { return Some(self) };
        let detail = |name: &str| before.details.get(name).map(String::as_str).unwrap_or_default();
        let milestones: Value = serde_json::from_str(detail("milestones_json")).unwrap_or_default();
        let reached = milestones
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["key"] == STEADY_STATE && one["state"] == "complete"));
        if !reached || self.boot_id.is_empty() || detail("boot_id") != self.boot_id {
            return Some(self);
        }
        let is_step = |phase: &str| BOOT_PHASES.contains(&phase);
        if !is_step(&self.phase) || self.status == "unhealthy" {
            return Some(Self { milestones, ..self });
        }
        // A step that went wrong and has been taken again since.
        let again = is_step(detail("phase"));
        let message = "The agent has started.".to_owned();
        again.then(|| Self { phase: STEADY_STATE.to_owned(), status: "healthy", message, milestones, ..self })
    }

    fn role(&self, now: i64) -> Role {
        let detail = [&self.message, &self.phase].into_iter().find(|text| !text.is_empty());
        let details = [
            ("boot_id", self.boot_id.clone()),
            ("phase", self.phase.clone()),
            ("message", self.message.clone()),
            ("milestones_json", self.milestones.to_string()),
            ("last_error_json", self.last_error.to_string()),
        ];
        let status = match self.status {
            "healthy" => "Healthy",
            "unhealthy" => "Unhealthy",
            "unknown" => "Unknown",
            _ => "Recovering",
        };
        Role {
            role_id: format!("system:{}", role_health::STARTUP_ROLE),
            role_name: role_health::STARTUP_ROLE.to_owned(),
            role_label: "Startup Timeline".to_owned(),
            context: "system".to_owned(),
            status_code: self.status.to_owned(),
            status: status.to_owned(),
            detail: detail.cloned().unwrap_or_else(|| "The agent reported its status.".to_owned()),
            details: details.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            last_checked_at: now,
            more: Map::new(),
        }
    }
}

/// What a status report leads to.
#[derive(Debug, Clone)]
pub struct StatusNoted {
    /// The answer.
    pub noted: Noted,
    /// The event for the operators of the site, if one is due.
    pub event: Option<Value>,
}

/// A status report: the sign of life and the startup role; with the phase [`PHASE_STOPPED`] a good-bye. Identical reports within [`STATUS_WINDOW_S`] of the last accepted
/// one are only noted.
///
/// # Errors
/// 404 `device_not_registered`.
pub async fn status(pool: &db::Pool, device: &DeviceIdentity, context: &str, body: &Map<String, Value>) -> Result<StatusNoted> {
    let report = Status::read(body, context);
    let signature = report.signature()?;
    let scalars = Scalars { hostname: hostname(body.get("hostname")), ..Scalars::default() };
    let mut tx = pool.begin().await?;
    let noted = scalars.store(&mut tx, device, true).await?;
    if report.phase == PHASE_STOPPED {
        sqlx::query!("UPDATE devices SET left_at = now() WHERE guid = $1", device.guid).execute(&mut *tx).await?;
    }
    let before = sqlx::query!(
        r#"SELECT status_signature, status_accepted_at, status_event_at, now() AS "now!" FROM device_details WHERE device_guid = $1"#,
        device.guid,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let now = before.as_ref().map_or_else(Utc::now, |before| before.now);
    let within = |at: Option<DateTime<Utc>>, seconds: i64| at.is_some_and(|at| now - at < TimeDelta::seconds(seconds));
    if let Some(before) = &before
        && before.status_signature.as_deref() == Some(signature.as_slice())
        && within(before.status_accepted_at, STATUS_WINDOW_S)
    {
        tx.commit().await?;
        return Ok(StatusNoted { noted: Noted { coalesced: true, ..noted }, event: None });
    }
    let stored = stored_health(&mut tx, device.guid).await?;
    let startup = stored.roles.iter().find(|role| role.role_name == role_health::STARTUP_ROLE);
    let (report, role) = match report.after(startup) {
        Some(report) => {
            let role = report.role(now.timestamp());
            (Some(report), Some(role))
        }
        None => (None, startup.cloned().map(|role| Role { last_checked_at: now.timestamp(), ..role })),
    };
    let announce = report.is_some() && !within(before.and_then(|before| before.status_event_at), STATUS_EVENT_S);
    let health = match role {
        Some(role) => stored.with(role, now.timestamp()),
        None => stored,
    };
    sqlx::query!(
        "INSERT INTO device_details AS x (device_guid, role_health, status_signature, status_accepted_at, status_event_at)
         VALUES ($1, $2, $3, now(), CASE WHEN $4 THEN now() END)
         ON CONFLICT (device_guid) DO UPDATE SET role_health = $2, status_signature = $3, status_accepted_at = now(),
             status_event_at = CASE WHEN $4 THEN now() ELSE x.status_event_at END",
        device.guid,
        serde_json::to_value(health)?,
        signature,
        announce,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    let event = report.filter(|_| announce).map(|report| {
        json!({
            "hostname": device.hostname, "guid": guid_text(device.guid),
            "phase": report.phase, "status": report.status, "changed_at": now.timestamp(),
        })
    });
    Ok(StatusNoted { noted, event })
}

/// The documents of a details report; nothing means keep, empty means clear.
#[derive(Debug, Default, PartialEq)]
struct Parts {
    memory: Option<Value>,
    network: Option<Value>,
    software: Option<Value>,
    services: Option<Value>,
    storage: Option<Value>,
    cpu: Option<Value>,
    sessions: Option<Value>,
    processes: Option<Value>,
}

impl Parts {
    /// Takes them out of a report; nothing is copied, as they may be large.
    fn take(details: &mut Map<String, Value>, summary: &mut Map<String, Value>) -> Self {
        let list = |details: &mut Map<String, Value>, name: &str| details.remove(name).filter(Value::is_array).map(clean::json);
        // Sessions and processes come as a list, or as a document with the list and the time of the report in it.
        let either = |details: &mut Map<String, Value>, name: &str| {
            details.remove(name).filter(|value| value.is_array() || value.is_object()).map(clean::json)
        };
        let cpu = [summary.remove("cpu"), details.remove("cpu")].into_iter().flatten().find(Value::is_object);
        Self {
            memory: list(details, "memory"),
            network: list(details, "network"),
            software: list(details, "software").map(software),
            services: list(details, "services"),
            storage: list(details, "storage"),
            cpu: cpu.map(clean::json),
            sessions: either(details, "sessions"),
            processes: either(details, "processes"),
        }
    }
}

/// The most that is kept of one document of a details report, in bytes of JSON.
const PART_BYTES: usize = 4 * 1024 * 1024;

/// Counts what is written to it, up to [`PART_BYTES`].
struct Counted(usize);

impl std::io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        if self.0 > PART_BYTES { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Parts {
    /// Refuses a document that is too large to be kept beside those of thousands of devices.
    fn check(&self) -> Result<()> {
        let parts = [
            ("memory", &self.memory),
            ("network", &self.network),
            ("software", &self.software),
            ("services", &self.services),
            ("storage", &self.storage),
            ("cpu", &self.cpu),
            ("sessions", &self.sessions),
            ("processes", &self.processes),
        ];
        for (name, part) in parts {
            if part.as_ref().is_some_and(|part| serde_json::to_writer(Counted(0), part).is_err()) {
                let mut refused =
                    Error::field("part_too_large", &format!("details.{name}"), format!("must be at most {PART_BYTES} bytes"));
                refused.kind = Kind::TooLarge;
                return Err(refused);
            }
        }
        Ok(())
    }
}

/// Software rows in one form: named, from a known source, each once, in order.
fn software(rows: Value) -> Value {
    const KNOWN: [&str; 4] = ["name", "version", "source", "metadata"];
    let Value::Array(rows) = rows else { return json!([]) };
    let mut sorted = std::collections::BTreeMap::new();
    for row in rows {
        let Value::Object(row) = row else { continue };
        let Some(name) = first(&row, &["name"]) else { continue };
        let version = first(&row, &["version"]).unwrap_or_default();
        let source = match first(&row, &["source"]).unwrap_or_default().to_lowercase().as_str() {
            "" | "local" | "installed" | "registry" | "uninstall_registry" | "local_installed" => "local_installed".to_owned(),
            "appx" | "ms_store" | "store" | "windows_store" => "windows_store".to_owned(),
            other => other.to_owned(),
        };
        if source == "windows_store" && Uuid::try_parse(&name).is_ok() {
            continue;
        }
        let mut metadata = object(&row, "metadata").cloned().unwrap_or_default();
        metadata.extend(row.iter().filter(|(name, _)| !KNOWN.contains(&name.as_str())).map(|(k, v)| (k.clone(), v.clone())));
        let key = (name.to_lowercase(), source.clone(), version.to_lowercase());
        sorted.entry(key).or_insert_with(|| json!({"name": name, "version": version, "source": source, "metadata": metadata}));
    }
    sorted.into_values().collect()
}

/// A details report, read.
struct DetailsReport {
    scalars: Scalars,
    summary: Map<String, Value>,
    parts: Parts,
    mode: &'static str,
    hash: Vec<u8>,
    health: Option<Value>,
    update: Option<Value>,
}

impl DetailsReport {
    fn read(raw: &[u8], device: &DeviceIdentity, context: &str) -> Result<Self> {
        let invalid = || Error::invalid("invalid payload", "Details need an object `details` and a hostname.");
        let Ok(Value::Object(mut body)) = serde_json::from_slice(raw) else { return Err(invalid()) };
        let Some(Value::Object(mut details)) = body.remove("details") else { return Err(invalid()) };
        let mut summary = match details.remove("summary") {
            Some(Value::Object(summary)) => summary,
            _ => Map::new(),
        };
        let scalars = Scalars::of_details(&body, &summary, device.guid);
        if first(&body, &["hostname"]).or_else(|| first(&summary, &["hostname"])).is_none() {
            return Err(invalid());
        }
        let says_other = |names: &[&str], own: &str| first(&body, names).is_some_and(|said| !said.eq_ignore_ascii_case(own));
        if says_other(&["guid", "agent_guid"], &guid_text(device.guid)) {
            return Err(Error::new(Kind::Forbidden, "guid_mismatch", "The report speaks of another device."));
        }
        if says_other(&["ssl_key_fingerprint", "fingerprint"], &device.fingerprint) {
            return Err(Error::new(Kind::Forbidden, "fingerprint_mismatch", "The report speaks of another key."));
        }
        let mode = stated_mode(&body, context);
        let hash = Sha256::new().chain_update(mode).chain_update([0]).chain_update(raw).finalize().to_vec();
        let parts = Parts::take(&mut details, &mut summary);
        parts.check()?;
        let update = agent_update(&body);
        let health = body.remove("agent_role_health").or_else(|| body.remove("role_health"));
        let health = health.filter(|report| report.is_object() || report.is_array());
        Ok(Self { scalars, summary, parts, mode, hash, health, update })
    }
}

/// What a details report leads to.
#[derive(Debug, Clone, Copy)]
pub struct DetailsNoted {
    /// The device's site.
    pub site_id: Option<i64>,
    /// The same body was accepted a moment ago.
    pub coalesced: bool,
    /// The services differ from before.
    pub services_changed: bool,
    /// The software differs from before.
    pub software_changed: bool,
}

/// A details report. It is not a sign of life.
///
/// # Errors
/// 400 `invalid payload`; 413 `part_too_large`; 403 `guid_mismatch`, `fingerprint_mismatch` when the body speaks of another device; 404
/// `device_not_registered`.
pub async fn details(pool: &db::Pool, device: &DeviceIdentity, context: &str, raw: Vec<u8>) -> Result<DetailsNoted> {
    let (identity, context) = (device.clone(), context.to_owned());
    let read = work::sized(raw.len(), move || DetailsReport::read(&raw, &identity, &context)).await??;
    let DetailsReport { scalars, summary, parts, mode, hash, health, update } = read;
    let mut tx = pool.begin().await?;
    let noted = scalars.store(&mut tx, device, summary.contains_key("last_seen")).await?;
    let before = sqlx::query!(
        r#"SELECT summary, coalesce(details_hash = $2 AND details_accepted_at > now() - make_interval(secs => $3), false) AS "same!",
                  $4::jsonb IS NOT NULL AND services IS DISTINCT FROM $4 AS "services_changed!",
                  $5::jsonb IS NOT NULL AND software IS DISTINCT FROM $5 AS "software_changed!"
           FROM device_details WHERE device_guid = $1"#,
        device.guid,
        hash,
        DETAILS_WINDOW_S as f64,
        parts.services,
        parts.software,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let site_id = noted.site_id;
    if before.as_ref().is_some_and(|before| before.same) {
        tx.commit().await?;
        return Ok(DetailsNoted { site_id, coalesced: true, services_changed: false, software_changed: false });
    }
    let empty = Map::new();
    let stored = before.as_ref().and_then(|before| before.summary.as_object());
    let summary = Value::Object(summary::replaced(stored.unwrap_or(&empty), &summary));
    let role_health = match health {
        Some(report) => merged_health(&mut tx, device.guid, &report, mode).await?,
        None => None,
    };
    sqlx::query!("INSERT INTO device_details (device_guid) VALUES ($1) ON CONFLICT DO NOTHING", device.guid)
        .execute(&mut *tx)
        .await?;
    sqlx::query!(
        "-- A document that is the same stays where it is: a large one would be written to disk again.
         UPDATE device_details SET summary = CASE WHEN summary = $2 THEN summary ELSE $2 END,
                memory = CASE WHEN $3::jsonb IS NULL OR memory = $3 THEN memory ELSE $3 END,
                network = CASE WHEN $4::jsonb IS NULL OR network = $4 THEN network ELSE $4 END,
                software = CASE WHEN $5::jsonb IS NULL OR software = $5 THEN software ELSE $5 END,
                services = CASE WHEN $6::jsonb IS NULL OR services = $6 THEN services ELSE $6 END,
                storage = CASE WHEN $7::jsonb IS NULL OR storage = $7 THEN storage ELSE $7 END,
                cpu = CASE WHEN $8::jsonb IS NULL OR cpu = $8 THEN cpu ELSE $8 END,
                sessions = CASE WHEN $9::jsonb IS NULL OR sessions = $9 THEN sessions ELSE $9 END,
                processes = CASE WHEN $10::jsonb IS NULL OR processes = $10 THEN processes ELSE $10 END,
                agent_update = coalesce($11, agent_update), role_health = coalesce($12, role_health),
                services_reported_at = CASE WHEN $6::jsonb IS NULL THEN services_reported_at ELSE now() END,
                sessions_reported_at = CASE WHEN $9::jsonb IS NULL THEN sessions_reported_at ELSE now() END,
                processes_reported_at = CASE WHEN $10::jsonb IS NULL THEN processes_reported_at ELSE now() END,
                details_hash = $13, details_accepted_at = now()
         WHERE device_guid = $1",
        device.guid,
        summary,
        parts.memory,
        parts.network,
        parts.software,
        parts.services,
        parts.storage,
        parts.cpu,
        parts.sessions,
        parts.processes,
        update,
        role_health,
        hash,
    )
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    // Without a row before, every list that came is news.
    let (services_changed, software_changed) = before.map_or((parts.services.is_some(), parts.software.is_some()), |before| {
        (before.services_changed, before.software_changed)
    });
    Ok(DetailsNoted { site_id, coalesced: false, services_changed, software_changed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_heartbeat_takes_what_fits_and_keeps_the_rest() {
        let body = map(json!({
            "hostname": " web ", "external_ip": "", "internal_ip": "10.0.0.4\n", "agent_hash": "b1", "agent_branch": "../x",
            "metrics": {"uptime": "77", "cpu_percent": 150.5, "memory_percent": "x", "operating_system": "Debian\0 12", "last_user": 5},
        }));
        let scalars = Scalars::of_heartbeat(&body);
        let expected = Scalars {
            hostname: requests::hostname("web").ok(),
            internal_ip: Some("10.0.0.4".into()),
            build: Some("b1".into()),
            uptime: Some(77),
            cpu_percent: Some(100.0),
            operating_system: Some("Debian 12".into()),
            last_user: Some("5".into()),
            ..Scalars::default()
        };
        assert_eq!(scalars, expected);
        assert_eq!(Scalars::of_heartbeat(&map(json!({"hostname": 4, "metrics": []}))), Scalars::default());
    }

    #[test]
    fn an_agent_id_of_another_device_is_not_taken() {
        let guid = Uuid::from_u128(7);
        let own = format!("WEB_{}_SYSTEM", guid_text(guid));
        let take = |id: &str| Scalars::of_details(&map(json!({"agent_id": id})), &Map::new(), guid).agent_id;
        assert_eq!(take(&own), Some(own.clone()));
        assert_eq!(take(&format!("WEB_{}_SYSTEM", guid_text(Uuid::from_u128(8)))), None);
    }

    #[test]
    fn branches_follow_the_grammar() {
        for good in ["main", "release/1.2", "a-b_c.d"] {
            assert!(is_branch(good), "{good}");
        }
        for bad in ["", "/a", "a/", ".a", "a.", "a..b", "a//b", "a@{b", "a b", "a:b", "a\\b", "ä", &"x".repeat(161)] {
            assert!(!is_branch(bad), "{bad}");
        }
    }

    #[test]
    fn status_words_have_one_form() {
        for (text, normal) in [
            ("OK", "healthy"),
            ("ready", "healthy"),
            ("pending", "recovering"),
            ("error", "unhealthy"),
            ("", "recovering"),
            ("unknown", "unknown"),
        ] {
            assert_eq!(normal_status(text), normal);
        }
        let body = map(json!({"status": "ok", "phase": "p", "milestones": [{"key": "new_one"}], "last_error": 5}));
        let one = Status::read(&body, "SYSTEM");
        assert_eq!(one.role(1).details["milestones_json"], r#"[{"key":"new_one"}]"#);
        assert_eq!((one.role(1).detail.as_str(), one.role(1).details["last_error_json"].as_str()), ("p", "null"));
        let other = Status::read(&body, "CURRENTUSER");
        assert_ne!(one.signature().unwrap(), other.signature().unwrap());
        assert_eq!(one.signature().unwrap(), Status::read(&body, "").signature().unwrap());
    }

    #[test]
    fn a_boot_that_has_reached_its_steady_state_does_not_fall_back() {
        let report = |boot: &str, phase: &str, status: &str, steady: &str| {
            let milestones = json!([{"key": "socket_connected", "state": "complete"}, {"key": STEADY_STATE, "state": steady}]);
            let body = json!({"boot_id": boot, "phase": phase, "status": status, "message": phase, "milestones": milestones});
            Status::read(&map(body), "SYSTEM")
        };
        let shown = |before: &Role, next: Status| {
            let role = next.after(Some(before)).map_or_else(|| before.clone(), |status| status.role(1));
            (role.details["phase"].clone(), role.status_code.clone(), role)
        };
        let first = report("1", "socket_connecting", "healthy", "pending");
        assert_eq!(first.clone().after(None), Some(first.clone()));
        let (_, _, steady) = shown(&first.role(1), report("1", STEADY_STATE, "healthy", "complete"));
        let (phase, status, _) = shown(&steady, report("1", "wireguard_starting", "active", "pending"));
        assert_eq!((phase.as_str(), status.as_str()), (STEADY_STATE, "healthy"));
        // A socket that is lost is said, and steps do not hide it.
        let (phase, status, lost) = shown(&steady, report("1", "socket_disconnected", "degraded", "complete"));
        assert_eq!((phase.as_str(), status.as_str()), ("socket_disconnected", "recovering"));
        let (phase, ..) = shown(&lost, report("1", "wireguard_starting", "active", "pending"));
        assert_eq!(phase, "socket_disconnected");
        let (phase, status, _) = shown(&lost, report("1", STEADY_STATE, "healthy", "complete"));
        assert_eq!((phase.as_str(), status.as_str()), (STEADY_STATE, "healthy"));
        // What fails is said too, until it is tried again.
        let (phase, status, failed) = shown(&steady, report("1", "wireguard_online", "failed", "pending"));
        assert_eq!((phase.as_str(), status.as_str()), ("wireguard_online", "unhealthy"));
        let (phase, status, _) = shown(&failed, report("1", "wireguard_starting", "active", "pending"));
        assert_eq!((phase.as_str(), status.as_str()), (STEADY_STATE, "healthy"));
        // Another boot starts from its beginning.
        let (phase, status, _) = shown(&steady, report("2", "authenticating", "active", "pending"));
        assert_eq!((phase.as_str(), status.as_str()), ("authenticating", "recovering"));
    }

    #[test]
    fn absent_keeps_and_empty_clears() {
        let read = |details: Value| Parts::take(&mut map(details), &mut Map::new());
        assert_eq!(read(json!({})), Parts::default());
        assert_eq!(read(json!({"software": [], "memory": null})), Parts { software: Some(json!([])), ..Parts::default() });
    }

    #[test]
    fn a_document_that_is_too_large_is_refused_by_name() {
        let part = |bytes: usize| Parts { processes: Some(json!(["x".repeat(bytes - 4)])), ..Parts::default() };
        assert!(part(PART_BYTES).check().is_ok());
        let refused = part(PART_BYTES + 1).check().unwrap_err();
        assert_eq!((refused.kind, refused.code), (Kind::TooLarge, "part_too_large"));
        assert!(refused.fields.contains_key("details.processes"));
    }

    #[test]
    fn software_rows_are_one_per_program() {
        let rows = json!([
            {"name": "Zed", "version": "2", "source": "Registry", "publisher": "Z"},
            {"name": "zed", "version": "2", "source": "installed"},
            {"name": "Alpha", "version": 1, "source": "appx"},
            {"name": "6F9619FF-8B86-D011-B42D-00C04FC964FF", "source": "store"},
            {"version": "3"},
            {"name": "bash", "source": "dpkg", "metadata": {"a": 1}},
        ]);
        let expected = json!([
            {"name": "Alpha", "version": "1", "source": "windows_store", "metadata": {}},
            {"name": "bash", "version": "", "source": "dpkg", "metadata": {"a": 1}},
            {"name": "Zed", "version": "2", "source": "local_installed", "metadata": {"publisher": "Z"}},
        ]);
        assert_eq!(software(rows), expected);
    }
}
