//! How a script reaches its device: one path, whether it is dispatched while the device is connected or waits for it.
//!
//! A row is marked `sent` before it is written to a socket, so a crash in between loses the dispatch and never doubles
//! it. An agent that announces `dedup` is sent the row again when it reconnects; another agent never is. An agent that could not
//! write it to its disk says so, and it is ready again after [`results::DECLINED_PAUSE_S`].

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, OnceLock},
    time::Duration,
};

use borealis_protocol::{
    envelope::{self, Envelope},
    events::QuickJobRun,
};
use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::results::{self, Change, Settled, Status};
use crate::{
    Error, Result,
    db::{self, Pool, Tx},
    keys::{Keys, ScriptKey, guid_text},
};

/// The channel on which API processes tell each other that there is something to send.
pub const CHANNEL: &str = "borealis_deliver";
/// The most rows taken in one transaction.
pub const BATCH: i64 = 1000;
/// The most dispatches taken at once.
pub const DELIVERIES: i64 = 1_024;
/// About how many bytes of dispatches are taken at once; they wait in memory until their sockets have taken them.
pub const DELIVERY_BYTES: i64 = 16 * 1024 * 1024;
/// How long a signed dispatch may take to reach its agent, in seconds; wide, because clocks of machines are off.
const REACH_S: i64 = 24 * 3600;
/// What an agent may take beyond a script's limit before it counts as silent, in seconds.
pub const SILENCE_GRACE_S: i32 = 60;

/// Something to write to a socket of this process.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// What the agent calls `job_id`.
    pub activity_id: i64,
    /// The device.
    pub device: Uuid,
    /// The socket that is the device's now.
    pub socket_id: String,
    /// Whether the agent was sent it before.
    pub again: bool,
    /// Whether it was accepted before: an agent that does not know it then does not run it.
    pub accepted: bool,
    /// How long the script may take; zero for as long as it likes.
    pub limit: Duration,
    /// The row's request: without id and signatures, and without what it shares.
    pub request: Value,
    /// What it shares with the other devices of its occurrence or quick run.
    pub shared: Option<Arc<Shared>>,
    /// The hostname the agent said when it connected, else the one it reported, else the approved one: agents that compare it with
    /// their own must find themselves meant, whatever the device was called when the job was made.
    pub agent_hostname: String,
    /// What operators see of the row now.
    pub change: Change,
}

/// The part of a dispatch that is the same for every device, with what is signed of it.
#[derive(Debug, Default)]
pub struct Shared {
    request: Map<String, Value>,
    /// The length of the request as text.
    bytes: usize,
    signed: OnceLock<Signed>,
}

/// What signatures need of a script, whichever device it is for.
#[derive(Debug, Clone)]
struct Signed {
    /// The key, base64 SPKI.
    by: String,
    signature: String,
    script_sha256: String,
    script_type: String,
    env_sha256: String,
    timeout_seconds: u64,
    run_mode: String,
}

impl Delivery {
    /// About how many bytes [`payload`] works on.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shared.as_ref().map_or(0, |shared| shared.bytes)
    }
}

/// Where the part is kept that several dispatches share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Part {
    /// In `quick_run_scripts`.
    QuickRun(i64),
    /// In `occurrence_scripts`, by occurrence and component.
    Occurrence(i64, i32),
}

impl Part {
    fn of(quick_run: Option<i64>, occurrence: Option<i64>, component: i32) -> Option<Self> {
        quick_run.map(Self::QuickRun).or_else(|| occurrence.map(|occurrence| Self::Occurrence(occurrence, component)))
    }
}

/// Dispatches taken together.
#[derive(Debug, Default)]
pub struct Taken {
    /// To be written to their sockets, oldest first.
    pub deliveries: Vec<Delivery>,
    /// When, by the database's clock; none when nothing was.
    pub at: Option<DateTime<Utc>>,
    /// Whether more may be ready for the same devices.
    pub more: bool,
}

/// What was taken in a transaction of which nobody knows whether it was committed, and was not written to any socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Doubt {
    at: Option<DateTime<Utc>>,
    activities: Vec<i64>,
    cancels: Vec<i64>,
}

impl Doubt {
    /// About these.
    #[must_use]
    pub fn about(taken: &Taken, cancels: &[Cancel]) -> Self {
        Self {
            at: taken.at,
            activities: taken.deliveries.iter().map(|delivery| delivery.activity_id).collect(),
            cancels: cancels.iter().map(|cancel| cancel.activity_id).collect(),
        }
    }
}

/// A request to stop a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cancel {
    /// The activity.
    pub activity_id: i64,
    /// The device.
    pub device: Uuid,
    /// The socket that is the device's now.
    pub socket_id: String,
    /// Why.
    pub reason: String,
}

/// Devices with a socket at `process` for which something is ready or to be cancelled: the poll behind the notifications. As all here:
/// nothing while the engine is held, or the database is behind the epoch `at_least` that the process has seen.
///
/// # Errors
/// When the database is away.
pub async fn due(pool: &Pool, process: Uuid, at_least: i64) -> Result<Vec<Uuid>> {
    let devices = sqlx::query_scalar!(
        "SELECT DISTINCT s.device_guid FROM device_sockets s JOIN activity_history a ON a.device_guid = s.device_guid
         WHERE s.api_process = $1 AND a.delivery IN ('ready', 'sent', 'accepted')
           AND (SELECT e.held_since IS NULL AND e.epoch >= $2 FROM engine_epoch e)
           AND ((a.delivery = 'ready' AND a.cancel_requested_at IS NULL AND (a.deliver_until IS NULL OR a.deliver_until > now())
                 AND (a.offer_after IS NULL OR a.offer_after <= now()))
             OR (a.delivery <> 'ready' AND a.cancel_requested_at IS NOT NULL AND a.cancel_sent_at IS NULL
                 AND coalesce(s.capabilities -> 'cancel' = 'true', false)))",
        process,
        at_least
    )
    .fetch_all(&mut *db::begin_wide(pool).await?)
    .await?;
    Ok(devices)
}

/// Those of `devices` that have a dispatch which has not ended. Of a thousand machines that come back, few have: the others need
/// no statement that is planned for them.
///
/// # Errors
/// When the database is away.
pub async fn open(pool: &Pool, devices: &[Uuid]) -> Result<Vec<Uuid>> {
    let open = sqlx::query_scalar!(
        r#"SELECT n.guid AS "guid!" FROM unnest((SELECT $1::uuid[])) AS n (guid)
           CROSS JOIN LATERAL (SELECT FROM activity_history a
                               WHERE a.device_guid = n.guid AND a.delivery IN ('ready', 'sent', 'accepted') LIMIT 1) AS a"#,
        devices
    )
    .fetch_all(pool)
    .await?;
    Ok(open)
}

/// Takes what is ready for those of `devices` whose socket is at `process`, oldest first, and marks it sent. With
/// `reconnected`, also what was sent before and has not ended, to agents that announce `dedup`. Up to [`DELIVERIES`] rows and
/// about [`DELIVERY_BYTES`]; the caller commits, writes them, and comes back while there are more.
///
/// # Errors
/// When the database refuses.
pub async fn take_ready(tx: &mut Tx<'_>, process: Uuid, devices: &[Uuid], reconnected: bool, at_least: i64) -> Result<Taken> {
    let rows = sqlx::query!(
        r#"WITH picked AS (
               SELECT a.id, s.socket_id, s.dedup, s.cancels, a.delivery <> 'ready' AS again, r.occurrence_id, c.occurrence_id IS NOT NULL AS shares,
                      coalesce(nullif(s.hostname, ''), nullif(d.reported_hostname, ''), d.hostname) AS agent_hostname,
                      pg_column_size(a.request) + coalesce(c.bytes, q.bytes, 0) AS bytes
               FROM activity_history a
               JOIN devices d ON d.guid = a.device_guid AND d.status = 'active'
                    -- A device that has moved takes nothing along that was meant for it where it was.
                    AND d.site_id IS NOT DISTINCT FROM a.site_id
               CROSS JOIN LATERAL (
                   -- The mode asked for; a service socket also serves its helpers, a helper never the service.
                   SELECT o.socket_id, o.api_process, o.connected_at, o.hostname, coalesce(o.capabilities -> 'dedup' = 'true', false) AS dedup,
                          coalesce(o.capabilities -> 'cancel' = 'true', false) AS cancels
                   FROM device_sockets o WHERE o.device_guid = a.device_guid
                     AND (o.service_mode = 'system' OR a.request ->> 'run_mode' = 'currentuser')
                   ORDER BY (o.service_mode = 'currentuser') = (coalesce(a.request ->> 'run_mode', '') = 'currentuser') DESC LIMIT 1
                   -- A newer socket of the device waits with its registration until this is committed.
                   FOR KEY SHARE) s
               LEFT JOIN scheduled_job_runs r ON r.id = a.run_id
               LEFT JOIN occurrence_scripts c ON c.occurrence_id = r.occurrence_id AND c.component_index = a.component_index
               LEFT JOIN quick_run_scripts q ON q.id = a.quick_run_script_id
               WHERE a.device_guid = ANY($2) AND a.delivery IN ('ready', 'sent', 'accepted') AND s.api_process = $1
                 AND a.cancel_requested_at IS NULL AND (SELECT e.held_since IS NULL AND e.epoch >= $6 FROM engine_epoch e)
                 AND ((a.delivery = 'ready' AND (a.deliver_until IS NULL OR a.deliver_until > now())
                      AND (a.offer_after IS NULL OR a.offer_after <= now()))
                   OR ($3 AND a.delivery IN ('sent', 'accepted') AND s.dedup AND a.sent_at < s.connected_at))
                 -- A run that is gone takes its dispatch with it.
                 AND (r.status IN ('Pending', 'Running') AND r.cancel_requested_at IS NULL
                      OR a.run_id IS NULL AND NOT coalesce(a.request -> 'context' ? 'scheduled_job_run_id', false))
               ORDER BY a.id LIMIT $4 FOR UPDATE OF a SKIP LOCKED),
           kept AS (SELECT *, (sum(bytes) OVER (ORDER BY id))::float8 - bytes AS bytes_before FROM picked)
           UPDATE activity_history a SET delivery = CASE WHEN kept.again THEN a.delivery ELSE 'sent' END,
                  delivery_count = a.delivery_count + 1, sent_at = now(), agent_cancels = kept.cancels, updated_at = now()
           FROM kept WHERE a.id = kept.id AND kept.bytes_before < $5
           RETURNING a.id, a.device_guid, a.hostname, a.site_id, a.run_id, a.component_index, a.status, a.queue_lane, a.activity_kind,
                     a.request, a.quick_run_script_id, kept.occurrence_id AS "occurrence_id?", kept.shares AS "shares!", kept.bytes AS "bytes!", kept.socket_id,
                     kept.agent_hostname AS "agent_hostname!", kept.dedup AS "dedup!", kept.again AS "again!", a.delivery = 'accepted' AS "accepted!", a.sent_at AS "sent_at!",
                     a.timeout_seconds"#,
        process,
        devices,
        reconnected,
        DELIVERIES,
        DELIVERY_BYTES as f64,
        at_least,
    )
    .fetch_all(&mut **tx)
    .await?;
    let at = rows.first().map(|row| row.sent_at);
    // An agent that never says it has accepted a script has begun with it as far as anybody can know.
    let begun: BTreeSet<i64> = rows.iter().filter(|row| !row.dedup).filter_map(|row| row.run_id).collect();
    results::begin_runs(tx, &begun.into_iter().collect::<Vec<_>>()).await?;
    let scripts: BTreeSet<Part> = rows
        .iter()
        .filter_map(|row| Part::of(row.quick_run_script_id, row.occurrence_id.filter(|_| row.shares), row.component_index))
        .collect();
    let scripts = shared(tx, &scripts).await?;
    let bytes: i64 = rows.iter().map(|row| i64::from(row.bytes)).sum();
    let more = bytes >= DELIVERY_BYTES || i64::try_from(rows.len()).is_ok_and(|taken| taken >= DELIVERIES);
    let mut deliveries: Vec<Delivery> = rows
        .into_iter()
        .map(|row| Delivery {
            activity_id: row.id,
            device: row.device_guid,
            socket_id: row.socket_id,
            again: row.again,
            accepted: row.accepted,
            limit: Duration::from_secs(u64::try_from(row.timeout_seconds).unwrap_or(0)),
            request: row.request,
            shared: Part::of(row.quick_run_script_id, row.occurrence_id, row.component_index)
                .and_then(|part| scripts.get(&part).cloned()),
            agent_hostname: row.agent_hostname,
            change: Change {
                activity_id: row.id,
                device: row.device_guid,
                hostname: row.hostname,
                site_id: row.site_id,
                status: Status::parse(&row.status).unwrap_or(Status::Queued),
                queue_lane: row.queue_lane,
                activity_kind: row.activity_kind,
                by_result: false,
            },
        })
        .collect();
    deliveries.sort_by_key(|delivery| delivery.activity_id);
    Ok(Taken { deliveries, at, more })
}

/// The parts that dispatches share.
async fn shared(tx: &mut Tx<'_>, parts: &BTreeSet<Part>) -> Result<HashMap<Part, Arc<Shared>>> {
    let (mut quick_runs, mut occurrences, mut components) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts {
        match *part {
            Part::QuickRun(id) => quick_runs.push(id),
            Part::Occurrence(occurrence, component) => {
                occurrences.push(occurrence);
                components.push(component);
            }
        }
    }
    let shared = |request, bytes| match request {
        Value::Object(request) => {
            Arc::new(Shared { request, bytes: usize::try_from(bytes).unwrap_or(0), signed: OnceLock::new() })
        }
        _ => Arc::default(),
    };
    let mut found = HashMap::with_capacity(parts.len());
    if !occurrences.is_empty() {
        let rows = sqlx::query!(
            "SELECT s.occurrence_id, s.component_index, s.request, s.bytes FROM unnest($1::bigint[], $2::int[]) AS n (occurrence_id, component_index)
             JOIN occurrence_scripts s ON s.occurrence_id = n.occurrence_id AND s.component_index = n.component_index",
            &occurrences,
            &components
        )
        .fetch_all(&mut **tx)
        .await?;
        found.extend(
            rows.into_iter()
                .map(|row| (Part::Occurrence(row.occurrence_id, row.component_index), shared(row.request, row.bytes))),
        );
    }
    if !quick_runs.is_empty() {
        let rows = sqlx::query!("SELECT id, request, bytes FROM quick_run_scripts WHERE id = ANY($1)", &quick_runs)
            .fetch_all(&mut **tx)
            .await?;
        found.extend(rows.into_iter().map(|row| (Part::QuickRun(row.id), shared(row.request, row.bytes))));
    }
    Ok(found)
}

/// Gives back what could not be written to its socket, and so was certainly not sent.
///
/// # Errors
/// When the database is away; the rows then end by their time limit, or are sent again to an agent with `dedup`.
pub async fn give_back(pool: &Pool, activities: &[i64]) -> Result<()> {
    sqlx::query!(
        "UPDATE activity_history SET delivery = 'ready', delivery_count = delivery_count - 1, sent_at = NULL, updated_at = now()
         WHERE id = ANY($1) AND delivery = 'sent' AND delivery_count = 1",
        activities
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Makes what was taken in doubt as if it had not been: nobody has sent it. What another process has taken since stays.
///
/// # Errors
/// When the database is away; then it is to be tried again.
pub async fn undo(pool: &Pool, doubt: &Doubt) -> Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query!(
        "UPDATE activity_history SET delivery = 'ready', delivery_count = delivery_count - 1, sent_at = NULL, updated_at = now()
         WHERE id = ANY($1) AND delivery = 'sent' AND delivery_count = 1 AND sent_at = $2",
        &doubt.activities,
        doubt.at
    )
    .execute(&mut *tx)
    .await?;
    // What was to be sent again, still is.
    sqlx::query!(
        "UPDATE activity_history a SET sent_at = s.connected_at - interval '1 millisecond', updated_at = now() FROM device_sockets s
         WHERE s.device_guid = a.device_guid AND a.id = ANY($1) AND a.delivery IN ('sent', 'accepted') AND a.delivery_count > 1
           AND a.sent_at = $2 AND s.connected_at < a.sent_at",
        &doubt.activities,
        doubt.at
    )
    .execute(&mut *tx)
    .await?;
    // An agent that is asked twice to stop a script stops it once.
    sqlx::query!("UPDATE activity_history SET cancel_sent_at = NULL, updated_at = now() WHERE id = ANY($1)", &doubt.cancels)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

/// Takes the cancels that are to be written to sockets of `process`, and marks them sent. With `reconnected` those are
/// included that were sent before: they may have been lost with the old socket.
///
/// # Errors
/// When the database refuses.
pub async fn take_cancels(
    tx: &mut Tx<'_>,
    process: Uuid,
    devices: &[Uuid],
    reconnected: bool,
    at_least: i64,
) -> Result<Vec<Cancel>> {
    let cancels = sqlx::query_as!(
        Cancel,
        r#"WITH picked AS (
               SELECT a.id, s.socket_id FROM activity_history a
               JOIN device_sockets s ON s.device_guid = a.device_guid AND s.service_mode = 'system' AND s.api_process = $1
               WHERE a.device_guid = ANY($2) AND a.delivery IN ('sent', 'accepted') AND a.cancel_requested_at IS NOT NULL
                 AND (SELECT e.held_since IS NULL AND e.epoch >= $5 FROM engine_epoch e)
                 AND (a.cancel_sent_at IS NULL OR ($3 AND a.cancel_sent_at < s.connected_at))
                 AND coalesce(s.capabilities -> 'cancel' = 'true', false)
               ORDER BY a.id LIMIT $4 FOR UPDATE OF a SKIP LOCKED)
           UPDATE activity_history a SET cancel_sent_at = now(), updated_at = now() FROM picked WHERE a.id = picked.id
           RETURNING a.id AS activity_id, a.device_guid AS device, picked.socket_id,
                     coalesce((SELECT nullif(r.cancel_reason, '') FROM scheduled_job_runs r WHERE r.id = a.run_id), 'cancelled_by_operator') AS "reason!""#,
        process,
        devices,
        reconnected,
        BATCH,
        at_least
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(cancels)
}

/// The payload of `quick_job_run`: the request with its id, the legacy signature and the signed envelope.
///
/// # Errors
/// A bug when the stored request is not what a dispatch writes.
pub fn payload(keys: &Keys, delivery: &Delivery) -> Result<Value> {
    let mut object = delivery.shared.as_ref().map(|shared| shared.request.clone()).unwrap_or_default();
    match &delivery.request {
        Value::Object(own) => object.extend(own.clone()),
        _ => return Err(Error::bug("the request of an activity is not an object")),
    }
    object.insert("job_id".into(), delivery.activity_id.into());
    object.insert("target_hostname".into(), delivery.agent_hostname.as_str().into());
    if delivery.accepted {
        object.insert("accepted".into(), true.into());
    }
    let key = keys.script_key();
    // By the key before it, where that has passed its place on in the meantime, it is of no use.
    let known = delivery.shared.as_ref().and_then(|shared| shared.signed.get()).filter(|known| known.by == key.spki_base64());
    let signed = match known {
        Some(signed) => signed.clone(),
        None => {
            let signed = Signed::of(&key, &object)?;
            if let Some(shared) = &delivery.shared {
                // Another task may have been faster; its is the same.
                let _ = shared.signed.set(signed.clone());
            }
            signed
        }
    };
    let envelope = Envelope {
        v: envelope::VERSION,
        job_id: delivery.activity_id,
        device_guid: guid_text(delivery.device),
        script_sha256: signed.script_sha256,
        script_type: signed.script_type,
        env_sha256: signed.env_sha256,
        timeout_seconds: signed.timeout_seconds,
        run_mode: signed.run_mode,
        not_after: Utc::now().timestamp() + REACH_S,
    };
    object.insert("signature".into(), signed.signature.into());
    object.insert("sig_alg".into(), "ed25519".into());
    object.insert("signing_key".into(), key.spki_base64().into());
    if !key.successions().is_empty() {
        object.insert("signing_key_successions".into(), serde_json::to_value(key.successions())?);
    }
    object.insert("envelope_signature".into(), key.sign(&envelope.to_sign()).into());
    object.insert("envelope".into(), serde_json::to_value(envelope)?);
    Ok(Value::Object(object))
}

impl Signed {
    fn of(key: &ScriptKey, request: &Map<String, Value>) -> Result<Self> {
        let run: QuickJobRun = serde_json::from_value(Value::Object(request.clone()))?;
        let script = borealis_protocol::keys::from_base64(&run.script_content).map_err(Error::bug)?;
        Ok(Self {
            by: key.spki_base64().to_owned(),
            signature: key.sign(&script),
            script_sha256: borealis_protocol::canonical::sha256_hex(&script),
            script_type: run.script_type,
            env_sha256: envelope::env_sha256(&run.environment, &run.variables),
            timeout_seconds: run.timeout_seconds,
            run_mode: run.run_mode,
        })
    }
}

/// Ends what was not delivered in time as `Expired`, with its runs: as `not_delivered`, or with what the agent said when it could not
/// take it. Up to [`BATCH`] rows; to be called again while any come.
///
/// # Errors
/// When the database refuses.
pub async fn expire_undelivered(tx: &mut Tx<'_>) -> Result<Settled> {
    let ids = sqlx::query_scalar!(
        "SELECT id FROM activity_history WHERE delivery = 'ready' AND deliver_until <= now() ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED",
        BATCH
    )
    .fetch_all(&mut **tx)
    .await?;
    end(tx, &ids, Status::Expired, "not_delivered", true).await
}

/// Ends what is ready for a device that has moved to another site since, as `Expired`: [`take_ready`] never takes it. Up to
/// [`BATCH`] rows. Looks at every row that is ready, so it is not for every second.
///
/// # Errors
/// When the database refuses.
pub async fn expire_moved(tx: &mut Tx<'_>) -> Result<Settled> {
    let ids = sqlx::query_scalar!(
        "SELECT a.id FROM activity_history a JOIN devices d ON d.guid = a.device_guid
         WHERE a.delivery = 'ready' AND d.site_id IS DISTINCT FROM a.site_id ORDER BY a.id LIMIT $1 FOR UPDATE OF a SKIP LOCKED",
        BATCH
    )
    .fetch_all(&mut **tx)
    .await?;
    end(tx, &ids, Status::Expired, "device_moved", false).await
}

/// Ends what has been silent beyond its time limit as `Timed Out` with `outcome_unknown`, with its runs. The limit counts
/// from the start of the script; of a script that waits behind others on its device, from the end of those that were sent before
/// it. A limit
/// of 0 is none; a job's own limit is kept by [`super::run::enforce_limits`]. Up to [`BATCH`] rows; to be called again while any come.
///
/// # Errors
/// When the database refuses.
pub async fn time_out_silent(tx: &mut Tx<'_>) -> Result<Settled> {
    let ids = sqlx::query_scalar!(
        "SELECT a.id FROM activity_history a
         WHERE a.delivery IN ('sent', 'accepted') AND (
               a.timeout_seconds > 0
                -- Most are not that old, whatever they wait behind.
                AND coalesce(a.started_at, a.sent_at) < now() - make_interval(secs => a.timeout_seconds + $1)
                AND coalesce(a.started_at, greatest(a.sent_at, (
                        -- The end of what was ahead of it. A script that its agent could not stop may have gone on up to its limit.
                        SELECT max(CASE WHEN b.cancel_requested_at IS NULL OR b.agent_cancels THEN b.finished_at
                                        ELSE greatest(b.finished_at, coalesce(b.started_at, b.sent_at) + make_interval(secs => b.timeout_seconds)) END)
                        FROM activity_history b
                        WHERE b.device_guid = a.device_guid AND b.id <> a.id AND (b.sent_at, b.id) < (a.sent_at, a.id)
                          AND b.finished_at > a.sent_at)))
                    < now() - make_interval(secs => a.timeout_seconds + $1)
                AND (a.started_at IS NOT NULL OR NOT EXISTS (SELECT 1 FROM activity_history b
                         WHERE b.device_guid = a.device_guid AND b.delivery IN ('sent', 'accepted')
                           AND (b.sent_at, b.id) < (a.sent_at, a.id))))
         ORDER BY a.id LIMIT $2 FOR UPDATE SKIP LOCKED",
        SILENCE_GRACE_S,
        BATCH
    )
    .fetch_all(&mut **tx)
    .await?;
    end(tx, &ids, Status::TimedOut, "outcome_unknown", false).await
}

/// Ends these. `declined`: with the agent's own reason where it has said one.
async fn end(tx: &mut Tx<'_>, ids: &[i64], status: Status, error: &str, declined: bool) -> Result<Settled> {
    if ids.is_empty() {
        return Ok(Settled::default());
    }
    let rows = sqlx::query!(
        "UPDATE activity_history SET status = $2, delivery = 'done', error = CASE WHEN $4 THEN coalesce(error, $3) ELSE $3 END,
                finished_at = now(), updated_at = now()
         WHERE id = ANY($1) RETURNING id, device_guid, hostname, site_id, run_id, queue_lane, activity_kind",
        ids,
        status.as_str(),
        error,
        declined
    )
    .fetch_all(&mut **tx)
    .await?;
    let runs: BTreeSet<i64> = rows.iter().filter_map(|row| row.run_id).collect();
    let finished = results::end_runs(tx, &runs.into_iter().collect::<Vec<_>>()).await?;
    let changes = rows
        .into_iter()
        .map(|row| Change {
            activity_id: row.id,
            device: row.device_guid,
            hostname: row.hostname,
            site_id: row.site_id,
            status,
            queue_lane: row.queue_lane,
            activity_kind: row.activity_kind,
            by_result: true,
        })
        .collect();
    Ok(Settled { outcomes: Vec::new(), changes, finished })
}

/// Splits device ids into payloads for [`CHANNEL`].
#[must_use]
pub fn notices(devices: &[Uuid]) -> Vec<String> {
    // A simple UUID and a comma are 33 bytes.
    devices
        .chunks(crate::bus::PAYLOAD_LIMIT_BYTES / 33)
        .map(|chunk| chunk.iter().map(|device| device.simple().to_string()).collect::<Vec<_>>().join(","))
        .collect()
}

/// Reads such a payload; what is no id is left out.
#[must_use]
pub fn read_notice(payload: &str) -> Vec<Uuid> {
    payload.split(',').filter_map(|text| Uuid::try_parse(text).ok()).collect()
}

/// Tells every API process, in this transaction, that there is something to send to these devices.
///
/// # Errors
/// When the database refuses.
pub async fn announce(tx: &mut Tx<'_>, devices: &[Uuid]) -> Result<()> {
    sqlx::query!("SELECT pg_notify($1, n.payload) AS sent FROM unnest($2::text[]) AS n (payload)", CHANNEL, &notices(devices))
        .fetch_all(&mut **tx)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notices_are_short_and_read_back() {
        let devices: Vec<Uuid> = (0..1000).map(Uuid::from_u128).collect();
        let notices = notices(&devices);
        assert!(notices.len() > 1 && notices.iter().all(|text| text.len() < 8000));
        assert_eq!(notices.iter().flat_map(|text| read_notice(text)).collect::<Vec<_>>(), devices);
        assert!(super::notices(&[]).is_empty());
        assert!(read_notice("x,,1").is_empty());
    }
}
