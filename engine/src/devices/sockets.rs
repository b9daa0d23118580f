//! Which machine is connected, and to which API process. The rows are presence itself: rebuilt by reconnection, and
//! removed by any other process when the one that wrote them has died.

use std::time::Duration;

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::{
    Result,
    db::{self, Pool, Tx},
    enrollment::machines::{self, Bearer, Verdict},
    names,
};

/// How often an API process says that it lives, at most; a process is missed after [`PROCESS_SILENCE_S`].
pub const HEARTBEAT: Duration = Duration::from_secs(4);
/// After this silence, in seconds, a process owns no sockets any more.
pub const PROCESS_SILENCE_S: f64 = 15.0;

/// The two kinds of agent runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Mode {
    /// The service.
    System,
    /// A helper in a person's session.
    CurrentUser,
}

impl Mode {
    /// Reads the mode and its aliases; anything else is the service.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.trim().to_ascii_lowercase().as_str() {
            "currentuser" | "current_user" | "interactive" | "user" => Self::CurrentUser,
            _ => Self::System,
        }
    }

    /// The text stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What an agent says of itself in `connect_agent`.
#[derive(Debug, Clone, PartialEq)]
pub struct Hello {
    /// `<HOSTNAME>_<GUID>_<CONTEXT>`.
    pub agent_id: String,
    /// Its runtime.
    pub mode: Mode,
    /// Its hostname, for display; at most 253 characters.
    pub hostname: String,
    /// Contexts it can also serve, lower case; at most 8.
    pub helper_contexts: Vec<String>,
    /// The other abilities it announces; at most 8 KiB, else none.
    pub capabilities: Map<String, Value>,
    /// The agent and its machine; its address is not in the message.
    pub bearer: Bearer,
}

impl Hello {
    /// The most bytes of `capabilities` kept.
    const CAPABILITIES_LIMIT: usize = 8 * 1024;

    /// Reads the first argument of the event: an object, or a bare text that is the agent id.
    ///
    /// # Errors
    /// The code: `agent_id_required`.
    pub fn parse(value: &Value) -> std::result::Result<Self, &'static str> {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().trim();
        let agent_id = value.as_str().map_or_else(|| text("agent_id"), str::trim);
        if agent_id.is_empty() || agent_id.len() > 400 || agent_id.contains('\0') {
            return Err("agent_id_required");
        }
        let mut capabilities = value.get("capabilities").and_then(Value::as_object).cloned().unwrap_or_default();
        let contexts = value
            .get("helper_contexts")
            .or_else(|| capabilities.get("helper_contexts"))
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).map(str::to_ascii_lowercase).take(8).collect())
            .unwrap_or_default();
        let rendered = serde_json::to_string(&capabilities).unwrap_or_default();
        if rendered.len() > Self::CAPABILITIES_LIMIT || rendered.contains("\\u0000") {
            capabilities = Map::new();
        }
        let said = |name: &str| value.get(name).and_then(Value::as_str);
        let bearer = Bearer::parse(said("machine_id"), said("instance"));
        let hostname = Some(text("hostname"))
            .filter(|name| !name.is_empty() && !name.contains('\0'))
            .or_else(|| embedded_guid(agent_id).map(|(hostname, _)| hostname))
            .unwrap_or_default();
        Ok(Self {
            agent_id: agent_id.to_owned(),
            mode: Mode::parse(text("service_mode")),
            hostname: hostname.chars().take(253).collect(),
            helper_contexts: contexts,
            capabilities,
            bearer,
        })
    }

    /// Whether the agent announces `name`.
    #[must_use]
    pub fn can(&self, name: &str) -> bool {
        self.capabilities.get(name).and_then(Value::as_bool).unwrap_or(false)
    }
}

/// The hostname and GUID inside an agent id `<HOSTNAME>_<GUID>_<CONTEXT>`; the hostname may itself hold underscores.
#[must_use]
pub fn embedded_guid(agent_id: &str) -> Option<(&str, Uuid)> {
    let is_context =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    agent_id.rmatch_indices('_').find_map(|(at, _)| {
        let (before, context) = (agent_id.get(..at)?, agent_id.get(at + 1..)?);
        let (hostname, guid) = before.rsplit_once('_')?;
        let guid = Uuid::try_parse(guid.trim_matches(['{', '}'])).ok()?;
        (is_context(context) && !hostname.is_empty()).then_some((hostname, guid))
    })
}

/// A socket that wants to be its device's.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The device the token named.
    pub device: Uuid,
    /// The token version the socket was admitted with.
    pub token_version: i32,
    /// The device's site when the socket was admitted.
    pub site_id: Option<i64>,
    /// The socket's id in its process.
    pub socket_id: String,
    /// Where it comes from; empty when that is not known.
    pub address: String,
    /// What the agent said.
    pub hello: Hello,
}

/// What became of a [`Registration`], in the same order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registered {
    /// It is the device's socket now.
    Current {
        /// The hostname of the device as stored.
        hostname: String,
        /// The socket it replaces: its process and id.
        replaced: Option<(Uuid, String)>,
    },
    /// It may not be: the code of the refusal.
    Refused(&'static str),
}

/// Makes each socket the one of its device and mode; the newest wins. A handful of statements for any number.
///
/// # Errors
/// When the database is away.
pub async fn register(tx: &mut Tx<'_>, process: Uuid, registrations: &[Registration]) -> Result<Vec<Registered>> {
    let devices: Vec<Uuid> = registrations.iter().map(|one| one.device).collect();
    let known = sqlx::query!(
        "SELECT guid, hostname, site_id, token_version, status, agent_id FROM devices WHERE guid = ANY($1) ORDER BY guid FOR NO KEY UPDATE",
        &devices
    )
    .fetch_all(&mut **tx)
    .await?;
    let known: std::collections::HashMap<Uuid, _> = known.into_iter().map(|row| (row.guid, row)).collect();
    let mut bearers = machines::known(&mut *tx, &devices).await?;

    let mut answers = Vec::with_capacity(registrations.len());
    // The last one of a batch wins, as it would have one by one.
    let mut winners: std::collections::BTreeMap<(Uuid, &'static str), &Registration> = std::collections::BTreeMap::new();
    for one in registrations {
        let answer = match known.get(&one.device) {
            None => Registered::Refused("device_not_found"),
            Some(row) => match refusal(one, row.token_version, row.site_id, &row.status) {
                Some(code) => Registered::Refused(code),
                None => match machines::refusal(judge(tx, bearers.entry(one.device).or_default(), one).await?) {
                    Some(refusal) => Registered::Refused(refusal.code),
                    None => {
                        winners.insert((one.device, one.hello.mode.as_str()), one);
                        Registered::Current { hostname: row.hostname.clone(), replaced: None }
                    }
                },
            },
        };
        answers.push(answer);
    }
    let winners: Vec<&Registration> = winners.into_values().collect();
    let guids: Vec<Uuid> = winners.iter().map(|one| one.device).collect();
    let replaced = sqlx::query!(
        "SELECT device_guid, service_mode, socket_id, api_process FROM device_sockets WHERE device_guid = ANY($1) FOR UPDATE",
        &guids
    )
    .fetch_all(&mut **tx)
    .await?;
    for (one, answer) in registrations.iter().zip(&mut answers) {
        if let Registered::Current { replaced: slot, .. } = answer {
            *slot = replaced
                .iter()
                .find(|row| row.device_guid == one.device && row.service_mode == one.hello.mode.as_str())
                .filter(|row| (row.api_process, row.socket_id.as_str()) != (process, one.socket_id.as_str()))
                .map(|row| (row.api_process, row.socket_id.clone()));
        }
    }
    let modes: Vec<String> = winners.iter().map(|one| one.hello.mode.as_str().to_owned()).collect();
    let sockets: Vec<String> = winners.iter().map(|one| one.socket_id.clone()).collect();
    let agents: Vec<String> = winners.iter().map(|one| one.hello.agent_id.clone()).collect();
    let hostnames: Vec<String> = winners.iter().map(|one| one.hello.hostname.clone()).collect();
    let contexts: Vec<String> = winners.iter().map(|one| one.hello.helper_contexts.join("\n")).collect();
    let capabilities: Vec<Value> = winners.iter().map(|one| Value::Object(one.hello.capabilities.clone())).collect();
    let instances: Vec<Option<Uuid>> = winners.iter().map(|one| one.hello.bearer.instance).collect();
    sqlx::query!(
        "INSERT INTO device_sockets (device_guid, service_mode, socket_id, api_process, agent_id, hostname, helper_contexts, capabilities, instance)
         SELECT n.device, n.mode, n.socket, $1, n.agent, n.hostname, coalesce(string_to_array(nullif(n.contexts, ''), E'\\n'), '{}'), n.capabilities, n.instance
         FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::jsonb[], $9::uuid[])
              AS n (device, mode, socket, agent, hostname, contexts, capabilities, instance)
         ON CONFLICT (device_guid, service_mode) DO UPDATE SET socket_id = excluded.socket_id, api_process = excluded.api_process,
             agent_id = excluded.agent_id, hostname = excluded.hostname, helper_contexts = excluded.helper_contexts,
             capabilities = excluded.capabilities, connected_at = clock_timestamp(), instance = excluded.instance,
             contested_by = NULL, contested_at = NULL",
        process,
        &guids,
        &modes,
        &sockets,
        &agents,
        &hostnames,
        &contexts,
        &capabilities,
        &instances as &[Option<Uuid>],
    )
    .execute(&mut **tx)
    .await?;
    let machine_ids: Vec<String> = winners.iter().map(|one| one.hello.bearer.machine_id.clone()).collect();
    // A renamed machine repairs its agent id, and the first that says its machine id binds the device to it.
    sqlx::query!(
        "UPDATE devices d SET agent_id = n.agent, machine_id = coalesce(d.machine_id, nullif(n.machine, ''))
         FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[]) AS n (device, agent, mode, machine)
         WHERE d.guid = n.device AND n.mode = 'system' AND (d.agent_id <> n.agent OR (d.machine_id IS NULL AND n.machine <> ''))",
        &guids,
        &agents,
        &modes,
        &machine_ids,
    )
    .execute(&mut **tx)
    .await?;
    Ok(answers)
}

/// Whether the socket is one of the machine that has the device's identity.
async fn judge(tx: &mut Tx<'_>, known: &mut machines::Known, one: &Registration) -> Result<Verdict> {
    let bearer = Bearer { hostname: one.hello.hostname.clone(), address: one.address.clone(), ..one.hello.bearer.clone() };
    let verdict = known.judge(&bearer);
    match verdict {
        // Written with all that are admitted.
        Verdict::Admit => known.admitted(&bearer),
        Verdict::Contested | Verdict::Held => machines::note(&mut *tx, one.device, known, &bearer, verdict).await?,
    }
    Ok(verdict)
}

fn refusal(one: &Registration, token_version: i32, site_id: Option<i64>, status: &str) -> Option<&'static str> {
    if embedded_guid(&one.hello.agent_id).map(|(_, guid)| guid) != Some(one.device) {
        return Some("agent_id_guid_mismatch");
    }
    match status {
        "active" => {}
        "quarantined" => return Some("device_quarantined"),
        _ => return Some("device_revoked"),
    }
    if token_version != one.token_version {
        return Some("token_version_mismatch");
    }
    (site_id != one.site_id).then_some("device_site_mismatch")
}

/// Forgets sockets of this process that have closed; rows that were taken over by a newer socket stay. Answers the
/// devices that are now without a socket, with hostname and site.
///
/// # Errors
/// When the database is away.
pub async fn unregister(pool: &Pool, process: Uuid, socket_ids: &[String]) -> Result<Vec<Gone>> {
    let gone = sqlx::query_as!(
        Gone,
        "WITH gone AS (DELETE FROM device_sockets WHERE api_process = $1 AND socket_id = ANY($2) RETURNING device_guid)
         SELECT d.guid AS device, d.hostname, d.site_id FROM gone JOIN devices d ON d.guid = gone.device_guid",
        process,
        socket_ids
    )
    .fetch_all(pool)
    .await?;
    Ok(gone)
}

/// Forgets sockets that this process should have and has not, after a grace in which a registration may be on its way.
///
/// # Errors
/// When the database is away.
pub async fn prune(pool: &Pool, process: Uuid, open: &[String]) -> Result<Vec<Gone>> {
    let mut tx = db::begin_wide(pool).await?;
    let gone = sqlx::query_as!(
        Gone,
        "WITH gone AS (DELETE FROM device_sockets s WHERE s.api_process = $1 AND s.connected_at < now() - interval '10 s'
                         AND NOT EXISTS (SELECT 1 FROM unnest($2::text[]) AS o (id) WHERE o.id = s.socket_id)
                       RETURNING device_guid)
         SELECT d.guid AS device, d.hostname, d.site_id FROM gone JOIN devices d ON d.guid = gone.device_guid",
        process,
        open
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(gone)
}

/// A device that has lost its socket.
#[derive(Debug, Clone)]
pub struct Gone {
    /// The device.
    pub device: Uuid,
    /// Its hostname.
    pub hostname: String,
    /// Its site.
    pub site_id: Option<i64>,
}

/// An agent socket of this process, as the sweep compares it with the database.
#[derive(Debug, Clone)]
pub struct Local {
    /// Its device.
    pub device: Uuid,
    /// The token version it was admitted with.
    pub token_version: i32,
    /// The site its device had.
    pub site_id: Option<i64>,
    /// Its id.
    pub socket_id: String,
    /// The mode it registered with; none before `connect_agent`.
    pub mode: Option<Mode>,
}

/// What the sweep found about a socket that is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// It must close, and why.
    Close(&'static str),
    /// It is fine, but its row is gone: to be registered again.
    Missing,
}

/// Compares this process's agent sockets with the database, in one query; answers the index and finding of each that
/// is not as it should be.
///
/// # Errors
/// When the database is away.
pub async fn sweep(pool: &Pool, process: Uuid, local: &[Local]) -> Result<Vec<(usize, Finding)>> {
    let devices: Vec<Uuid> = local.iter().map(|one| one.device).collect();
    let versions: Vec<i32> = local.iter().map(|one| one.token_version).collect();
    let sites: Vec<i64> = local.iter().map(|one| one.site_id.unwrap_or(0)).collect();
    let sockets: Vec<String> = local.iter().map(|one| one.socket_id.clone()).collect();
    let modes: Vec<String> = local.iter().map(|one| one.mode.map_or("", Mode::as_str).to_owned()).collect();
    let rows = sqlx::query!(
        r#"SELECT l.at AS "at!", d.status AS "status?", coalesce(d.token_version = l.version, false) AS "same_version!",
                  coalesce(coalesce(d.site_id, 0) = l.site, false) AS "same_site!", s.socket_id AS "registered?"
           FROM unnest($1::uuid[], $2::int[], $3::bigint[], $4::text[], $5::text[]) WITH ORDINALITY AS l (device, version, site, socket, mode, at)
           LEFT JOIN devices d ON d.guid = l.device
           LEFT JOIN device_sockets s ON s.device_guid = l.device AND s.service_mode = l.mode
           WHERE d.guid IS NULL OR d.status <> 'active' OR d.token_version <> l.version OR coalesce(d.site_id, 0) <> l.site
              OR (l.mode <> '' AND (s.socket_id IS NULL OR s.socket_id <> l.socket OR s.api_process <> $6))"#,
        &devices,
        &versions,
        &sites,
        &sockets,
        &modes,
        process
    )
    .fetch_all(&mut *db::begin_wide(pool).await?)
    .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            let index = usize::try_from(row.at).ok()?.checked_sub(1)?;
            let finding = match row.status.as_deref() {
                None => Finding::Close("device_purged"),
                Some("quarantined") => Finding::Close("device_quarantined"),
                Some(status) if status != "active" => Finding::Close("device_revoked"),
                Some(_) if !row.same_version => Finding::Close("token_version_mismatch"),
                Some(_) if !row.same_site => Finding::Close("device_site_mismatch"),
                Some(_) if row.registered.is_some() => Finding::Close("replaced"),
                Some(_) => Finding::Missing,
            };
            Some((index, finding))
        })
        .collect())
}

/// An operator socket's session as it is now.
#[derive(Debug, Clone)]
pub struct OperatorNow {
    /// The session.
    pub session: Uuid,
    /// Whether the user's role is Admin.
    pub admin: bool,
    /// The sites assigned.
    pub sites: Vec<i64>,
}

/// Which of these sessions still stand, and what their users may see now; by the same conditions as those of requests. A session
/// that is not in the answer has ended.
///
/// # Errors
/// When the database is away.
pub async fn operators(pool: &Pool, sessions: &[Uuid], idle_s: u32) -> Result<Vec<OperatorNow>> {
    let rows = sqlx::query_as!(
        OperatorNow,
        r#"SELECT s.id AS session, u.role = 'Admin' AS "admin!",
                  ARRAY(SELECT a.site_id FROM user_site_assignments a WHERE a.user_id = u.id ORDER BY 1) AS "sites!"
           FROM operator_sessions s JOIN users u ON u.id = s.user_id
           WHERE s.id = ANY($1) AND s.expires_at > now() AND s.last_seen_at > now() - make_interval(secs => $2) AND u.may_sign_in
             AND EXISTS (SELECT 1 FROM ready_admins) AND EXISTS (SELECT 1 FROM aegis)"#,
        sessions,
        f64::from(idle_s),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows)
}

/// Which API process has a device's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub process: Uuid,
    /// Where its internal listener is reached; empty of a process that does not say it.
    pub internal_url: String,
}

/// The living process that has the socket of a device's service.
///
/// # Errors
/// When the database is away.
pub async fn owner(pool: &Pool, device: Uuid) -> Result<Option<Owner>> {
    Ok(sqlx::query_as!(
        Owner,
        "SELECT p.id AS process, p.internal_url FROM device_sockets s JOIN api_processes p ON p.id = s.api_process
         WHERE s.device_guid = $1 AND s.service_mode = 'system' AND p.last_seen_at > now() - make_interval(secs => $2)",
        device,
        PROCESS_SILENCE_S
    )
    .fetch_optional(pool)
    .await?)
}

/// Says that this process lives, and where others reach its internal listener.
///
/// # Errors
/// When the database is away.
pub async fn heartbeat(pool: &Pool, process: Uuid, internal_url: &str) -> Result<()> {
    // An update alone writes half of what an insert that meets its row does.
    let known = sqlx::query!("UPDATE api_processes SET last_seen_at = now() WHERE id = $1", process).execute(pool).await?;
    if known.rows_affected() == 0 {
        sqlx::query!(
            "INSERT INTO api_processes (id, internal_url) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET last_seen_at = now()",
            process,
            internal_url
        )
        .execute(pool)
        .await?;
    }
    Ok(())
}

/// Whether no other API process lives.
///
/// # Errors
/// When the database is away.
pub async fn alone(pool: &Pool, process: Uuid) -> Result<bool> {
    Ok(sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (SELECT FROM api_processes WHERE id <> $1 AND last_seen_at > now() - make_interval(secs => $2)) AS "alone!""#,
        process,
        PROCESS_SILENCE_S
    )
    .fetch_one(pool)
    .await?)
}

/// Removes processes that have been silent too long, and the sockets that were theirs. Answers the devices that are now
/// without a socket.
///
/// # Errors
/// When the database is away.
pub async fn bury(pool: &Pool) -> Result<Vec<Gone>> {
    let mut tx = pool.begin().await?;
    sqlx::query!(
        "DELETE FROM api_processes WHERE id IN (
             SELECT id FROM api_processes WHERE last_seen_at < now() - make_interval(secs => $1) FOR UPDATE SKIP LOCKED)",
        PROCESS_SILENCE_S
    )
    .execute(&mut *tx)
    .await?;
    let gone = sqlx::query_as!(
        Gone,
        "WITH gone AS (DELETE FROM device_sockets s WHERE NOT EXISTS (SELECT 1 FROM api_processes p WHERE p.id = s.api_process)
                       RETURNING device_guid)
         SELECT d.guid AS device, d.hostname, d.site_id FROM gone JOIN devices d ON d.guid = gone.device_guid"
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(gone)
}

/// The clean end of a process: its sockets and its row are gone at once.
///
/// # Errors
/// When the database is away; others then clean up in time.
pub async fn leave(pool: &Pool, process: Uuid) -> Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query!("DELETE FROM device_sockets WHERE api_process = $1", process).execute(&mut *tx).await?;
    sqlx::query!("DELETE FROM api_processes WHERE id = $1", process).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(())
}

/// Finds devices by hostname for the internal event bridge: those of that name with a socket of that mode, or with a
/// service socket that serves it too.
///
/// # Errors
/// When the database is away.
pub async fn connected_by_hostname(pool: &Pool, hostname: &str, mode: Mode) -> Result<Vec<Uuid>> {
    let devices = sqlx::query_scalar!(
        "SELECT DISTINCT d.guid FROM devices d JOIN device_sockets s ON s.device_guid = d.guid
         WHERE d.hostname_key = $1 AND d.status = 'active'
           AND (s.service_mode = $2 OR (s.service_mode = 'system' AND $2 = ANY(s.helper_contexts)))",
        names::key(hostname),
        mode.as_str()
    )
    .fetch_all(pool)
    .await?;
    Ok(devices)
}

/// Which of these devices are connected anywhere.
///
/// # Errors
/// When the database is away.
pub async fn connected(pool: &Pool, devices: &[Uuid]) -> Result<Vec<Uuid>> {
    let devices = sqlx::query_scalar!(
        "SELECT DISTINCT d.guid FROM devices d JOIN device_sockets s ON s.device_guid = d.guid WHERE d.guid = ANY($1) AND d.status = 'active'",
        devices
    )
    .fetch_all(pool)
    .await?;
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GUID: &str = "6F2C1F0E-8A35-4A55-9D3B-0D6E1F0A9B11";

    #[test]
    fn the_guid_is_found_inside_the_agent_id() {
        let guid = Uuid::try_parse(GUID).unwrap();
        assert_eq!(embedded_guid(&format!("HOST_{GUID}_SYSTEM")), Some(("HOST", guid)));
        assert_eq!(embedded_guid(&format!("MY_OLD_HOST_{GUID}_CURRENTUSER")), Some(("MY_OLD_HOST", guid)));
        assert_eq!(embedded_guid(&format!("host_{}_svc-1", GUID.to_lowercase())), Some(("host", guid)));
        assert_eq!(embedded_guid(&format!("HOST_{GUID}_A_B")), Some(("HOST", guid)));
        for wrong in [
            GUID.to_owned(),
            format!("{GUID}_SYSTEM"),
            format!("HOST_{GUID}"),
            "HOST".into(),
            format!("HOST_{GUID}_"),
            String::new(),
        ] {
            assert_eq!(embedded_guid(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_hello_is_an_object_or_a_text() {
        let id = format!("HOST_{GUID}_SYSTEM");
        let bare = Hello::parse(&json!(id)).unwrap();
        assert_eq!((bare.hostname.as_str(), bare.mode), ("HOST", Mode::System));
        let full = Hello::parse(&json!({
            "agent_id": id, "service_mode": "Interactive", "hostname": "host-1",
            "capabilities": {"dedup": true, "cancel": "yes", "helper_contexts": ["CurrentUser"]}
        }))
        .unwrap();
        assert_eq!((full.hostname.as_str(), full.mode), ("host-1", Mode::CurrentUser));
        assert_eq!(full.helper_contexts, ["currentuser"]);
        assert!(full.can("dedup") && !full.can("cancel") && !full.can("vnc"));
        for wrong in [json!({}), json!(7), json!(""), json!({"agent_id": " "}), json!([id]), json!({"agent_id": "a\u{0}b"})] {
            assert_eq!(Hello::parse(&wrong), Err("agent_id_required"), "{wrong}");
        }
    }

    #[test]
    fn a_socket_must_be_what_its_token_says() {
        let guid = Uuid::try_parse(GUID).unwrap();
        let one = |agent_id: String| Registration {
            device: guid,
            token_version: 2,
            site_id: Some(1),
            socket_id: "s".into(),
            address: String::new(),
            hello: Hello::parse(&json!(agent_id)).unwrap(),
        };
        let own = one(format!("H_{GUID}_SYSTEM"));
        assert_eq!(refusal(&own, 2, Some(1), "active"), None);
        assert_eq!(refusal(&own, 3, Some(1), "active"), Some("token_version_mismatch"));
        assert_eq!(refusal(&own, 2, Some(2), "active"), Some("device_site_mismatch"));
        assert_eq!(refusal(&own, 2, None, "active"), Some("device_site_mismatch"));
        assert_eq!(refusal(&own, 2, Some(1), "quarantined"), Some("device_quarantined"));
        assert_eq!(refusal(&own, 2, Some(1), "decommissioned"), Some("device_revoked"));
        let foreign = one("H_00000000-0000-0000-0000-000000000001_SYSTEM".into());
        assert_eq!(refusal(&foreign, 2, Some(1), "active"), Some("agent_id_guid_mismatch"));
    }
}
