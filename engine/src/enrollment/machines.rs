//! Which machine has a device's identity. A copy of an agent's state folder is a second bearer of the identity: it is held until an
//! operator decides, so that nothing runs on two machines.
//!
//! A bearer is told apart from others by two things that its agent says when it connects and when it renews its tokens: a hash of the
//! id of its machine, and a number that it makes up at each start. Another machine id is another machine. With the same machine id, as
//! on a copied disk, two bearers are two machines when both are there at once: the socket of one stays open while the other one wants
//! to connect. A machine that was restored from a snapshot of itself is the only one there, and goes on.
//!
//! This guards against copies made by accident. Someone who has stolen a state folder can take the machine id as well. Agents that say
//! neither are not held; [`note_flapping`] tells of those that displace each other.

use std::collections::HashMap;

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    audit, db,
    devices::sockets::PROCESS_SILENCE_S,
    error::{Error, Kind, Result},
    keys::guid_text,
    names,
    scope::{Actor, ActorKind},
};

/// The refusal of a bearer that has to wait for an operator.
pub const HELD: &str = borealis_protocol::IDENTITY_HELD;
/// The refusal of a bearer while another one is, or was a moment ago, there.
pub const CONTESTED: &str = borealis_protocol::IDENTITY_CONTESTED;
/// When a bearer that is held may ask again, in seconds.
pub const HELD_AGAIN_S: u64 = 240;
/// When a bearer that is contested may ask again, in seconds.
pub const CONTESTED_AGAIN_S: u64 = 5;
/// For so many seconds another socket must stay open beside a bearer that wants to connect, so that they are two machines. A socket
/// whose agent is gone without a word is closed before: its process waits 45 seconds for an answer to a ping.
const TWO_AFTER_S: f64 = 60.0;
/// For so many seconds after the last sign of newer tokens those are taken to be in use.
const NEWER_IN_USE_S: f64 = 90.0;
/// For so many hours an operator's choice waits for the agent that was chosen.
const CHOICE_H: i32 = 24;
/// So many machines of one device are shown at once; further ones are held without. A hostile agent can say any number of them.
const SHOWN_PER_DEVICE: i64 = 8;

/// What an agent says of itself and its machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bearer {
    /// The hash of its machine id: 64 characters of lower-case hex; empty when it says none.
    pub machine_id: String,
    /// The number it made up when it started; none when it says none.
    pub instance: Option<Uuid>,
    /// Its name; empty when it is not said.
    pub hostname: String,
    /// Where it is; empty when that is not known.
    pub address: String,
}

impl Bearer {
    /// Reads the members of a message; what has not the right form counts as not said.
    #[must_use]
    pub fn parse(machine_id: Option<&str>, instance: Option<&str>) -> Self {
        let machine_id = machine_id.unwrap_or_default().trim().to_ascii_lowercase();
        let is_hash = machine_id.len() == 64 && machine_id.bytes().all(|byte| byte.is_ascii_hexdigit());
        Self {
            machine_id: if is_hash { machine_id } else { String::new() },
            instance: instance.and_then(|text| Uuid::try_parse(text.trim()).ok()),
            ..Self::default()
        }
    }
}

/// What is known of the machines that have a device's identity.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The machine it belongs to; none until an agent has said one.
    machine_id: Option<String>,
    /// The agent that an operator chose, until it has renewed its tokens.
    chosen: Option<Uuid>,
    /// The agents that wait for an operator, or were denied.
    waiting: Vec<Uuid>,
    /// Its open socket, of an agent that says a number.
    other: Option<Other>,
}

/// The open socket of a device.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Other {
    instance: Uuid,
    /// Who wants to take its place, and for how many seconds.
    contested: Option<(Uuid, f64)>,
}

/// What becomes of a bearer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the device.
    Admit,
    /// Another one is there: to ask again in a moment.
    Contested,
    /// Another one is there, and an operator has to decide.
    Held,
}

impl Known {
    /// Judges a bearer by what is known.
    #[must_use]
    pub fn judge(&self, bearer: &Bearer) -> Verdict {
        if self.machine_id.as_ref().is_some_and(|id| *id != bearer.machine_id) {
            return Verdict::Held;
        }
        if let Some(chosen) = self.chosen {
            return if bearer.instance == Some(chosen) { Verdict::Admit } else { Verdict::Held };
        }
        let Some(instance) = bearer.instance else { return Verdict::Admit };
        if self.waiting.contains(&instance) {
            return Verdict::Held;
        }
        match self.other {
            None => Verdict::Admit,
            Some(other) if other.instance == instance => Verdict::Admit,
            Some(Other { contested: Some((by, since)), .. }) if by == instance && since >= TWO_AFTER_S => Verdict::Held,
            Some(_) => Verdict::Contested,
        }
    }

    /// Whether the bearer is the first that says its machine, which is bound then.
    #[must_use]
    pub fn binds(&self, bearer: &Bearer) -> bool {
        self.machine_id.is_none() && !bearer.machine_id.is_empty()
    }

    /// Whether an operator chose the bearer.
    #[must_use]
    pub fn chose(&self, bearer: &Bearer) -> bool {
        self.chosen.is_some() && self.chosen == bearer.instance
    }

    /// The bearer is admitted: others are judged by that.
    pub fn admitted(&mut self, bearer: &Bearer) {
        if self.binds(bearer) {
            self.machine_id = Some(bearer.machine_id.clone());
        }
        if let Some(instance) = bearer.instance {
            self.other = Some(Other { instance, contested: None });
        }
    }
}

/// What is known of the machines of `devices`, whose rows the caller has locked.
///
/// # Errors
/// When the database refuses.
pub async fn known(conn: &mut PgConnection, devices: &[Uuid]) -> Result<HashMap<Uuid, Known>> {
    let rows = sqlx::query!(
        r#"SELECT d.guid, d.machine_id, CASE WHEN d.chosen_at > now() - make_interval(hours => $3) THEN d.chosen_instance END AS chosen,
                  s.instance AS "instance?", s.contested_by AS "contested_by?",
                  (extract(epoch FROM clock_timestamp() - s.contested_at))::float8 AS "contested_s?",
                  ARRAY(SELECT (a.facts #>> '{held,instance}')::uuid FROM device_approvals a
                        WHERE a.device_guid = d.guid AND a.kind = 'identity' AND a.status IN ('pending', 'denied')
                          AND a.facts #>> '{held,instance}' IS NOT NULL) AS "waiting!"
           FROM devices d
           -- By its key, also when the planner takes the table for empty: after a restart all agents come at once.
           LEFT JOIN LATERAL (
               SELECT k.instance, k.contested_by, k.contested_at FROM device_sockets k JOIN api_processes p ON p.id = k.api_process
               WHERE k.device_guid = d.guid AND k.service_mode = 'system' AND p.last_seen_at > now() - make_interval(secs => $2)
               OFFSET 0) s ON true
           WHERE d.guid = ANY($1)"#,
        devices,
        PROCESS_SILENCE_S,
        CHOICE_H,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let other = row.instance.map(|instance| Other { instance, contested: row.contested_by.zip(row.contested_s) });
            let known = Known { machine_id: row.machine_id, chosen: row.chosen, waiting: row.waiting, other };
            (row.guid, known)
        })
        .collect())
}

/// Whether tokens of `device` that are newer than the ones a bearer shows are in use.
///
/// # Errors
/// When the database refuses.
pub async fn newer_in_use(conn: &mut PgConnection, device: Uuid) -> Result<bool> {
    Ok(sqlx::query_scalar!(
        r#"SELECT coalesce(greatest(d.last_seen, (SELECT max(t.last_used_at) FROM refresh_tokens t WHERE t.device_guid = d.guid))
                           > clock_timestamp() - make_interval(secs => $2), false) AS "in_use!"
           FROM devices d WHERE d.guid = $1"#,
        device,
        NEWER_IN_USE_S,
    )
    .fetch_one(conn)
    .await?)
}

/// Writes down what became of a bearer of `device`, whose row the caller has locked.
///
/// # Errors
/// When the database refuses.
pub async fn note(conn: &mut PgConnection, device: Uuid, known: &Known, bearer: &Bearer, verdict: Verdict) -> Result<()> {
    match verdict {
        Verdict::Admit if known.binds(bearer) => {
            sqlx::query!("UPDATE devices SET machine_id = $2 WHERE guid = $1 AND machine_id IS NULL", device, bearer.machine_id)
                .execute(conn)
                .await?;
        }
        Verdict::Admit => {}
        Verdict::Contested => {
            sqlx::query!(
                "UPDATE device_sockets SET contested_by = $2, contested_at = clock_timestamp()
                 WHERE device_guid = $1 AND service_mode = 'system' AND contested_by IS DISTINCT FROM $2",
                device,
                bearer.instance,
            )
            .execute(conn)
            .await?;
        }
        Verdict::Held => hold(conn, device, bearer).await?,
    }
    Ok(())
}

/// Shows a bearer as an approval, with what is known of both machines; tells log and audit when it was not there yet.
async fn hold(conn: &mut PgConnection, device: Uuid, bearer: &Bearer) -> Result<()> {
    let nonce: [u8; 32] = rand::random();
    let id = Uuid::now_v7();
    let row = sqlx::query!(
        r#"INSERT INTO device_approvals AS o (id, approval_reference, device_guid, hostname_claimed, hostname_claimed_key, fingerprint, public_key,
                  enrollment_code, site_id, client_nonce, server_nonce, remote_addr, kind, facts)
           SELECT $2, $3, d.guid, coalesce(nullif($4, ''), d.hostname), coalesce(nullif($5, ''), d.hostname_key), d.fingerprint,
                  d.public_key, '', d.site_id, $6, $6, $7, 'identity',
                  jsonb_build_object(
                      'held', jsonb_build_object('machine_id', $8::text, 'instance', $9::uuid, 'hostname', $4::text, 'address', $7::text),
                      'current', jsonb_build_object('machine_id', coalesce(d.machine_id, ''), 'hostname', d.hostname,
                          'address', d.internal_ip, 'operating_system', d.operating_system, 'last_seen', d.last_seen,
                          'connected', EXISTS (SELECT FROM device_sockets s WHERE s.device_guid = d.guid)))
           FROM devices d
           WHERE d.guid = $1 AND (SELECT count(*) FILTER (WHERE w.facts #>> '{held,machine_id}' <> $8) < $10 FROM device_approvals w
                                  WHERE w.device_guid = d.guid AND w.kind = 'identity' AND w.status IN ('pending', 'denied'))
           ON CONFLICT (device_guid, (facts #>> '{held,machine_id}')) WHERE status IN ('pending', 'denied') AND kind = 'identity'
           -- Not every message says a hostname.
           DO UPDATE SET remote_addr = excluded.remote_addr, site_id = excluded.site_id,
                  facts = CASE WHEN $4 = '' THEN jsonb_set(excluded.facts, '{held,hostname}', o.facts #> '{held,hostname}') ELSE excluded.facts END,
                  hostname_claimed = CASE WHEN $4 = '' THEN o.hostname_claimed ELSE excluded.hostname_claimed END,
                  hostname_claimed_key = CASE WHEN $4 = '' THEN o.hostname_claimed_key ELSE excluded.hostname_claimed_key END
           RETURNING id, site_id, hostname_claimed, facts -> 'current' ->> 'machine_id' AS "current!""#,
        device,
        id,
        Uuid::new_v4(),
        bearer.hostname,
        if bearer.hostname.is_empty() { String::new() } else { names::key(&bearer.hostname) },
        &nonce[..],
        bearer.address,
        bearer.machine_id,
        bearer.instance,
        SHOWN_PER_DEVICE,
    )
    .fetch_optional(&mut *conn)
    .await?;
    let Some(row) = row.filter(|row| row.id == id) else { return Ok(()) };
    tracing::warn!(%device, hostname = row.hostname_claimed, address = bearer.address, "a second machine has the identity of a device and is held");
    let actor = device_actor(device, &row.hostname_claimed, &bearer.address);
    let entry = audit::Entry {
        action: "device.identity_held",
        object_kind: "device",
        object_id: guid_text(device),
        site_id: row.site_id,
        failed: true,
        detail: json!({"approval_id": id, "held": bearer.machine_id, "current": row.current}),
    };
    audit::record(conn, &actor, entry).await
}

/// The identity of `device` belongs to the machine that `approval` shows as held; the one it belonged to is held when it comes.
///
/// # Errors
/// 409 `device_changed` when the device is gone, or not in the site of the approval any more; when the database refuses.
pub async fn move_to_held(conn: &mut PgConnection, device: Uuid, approval: Uuid) -> Result<()> {
    let moved = sqlx::query!(
        "UPDATE devices d SET machine_id = nullif(a.facts #>> '{held,machine_id}', ''),
                -- Only of two with the same machine id one must be named.
                chosen_instance = c.instance, chosen_at = CASE WHEN c.instance IS NOT NULL THEN now() END
         FROM device_approvals a
         CROSS JOIN LATERAL (SELECT CASE WHEN a.facts #>> '{held,machine_id}' = coalesce(o.machine_id, '')
                                         THEN (a.facts #>> '{held,instance}')::uuid END AS instance
                             FROM devices o WHERE o.guid = $1) AS c
         WHERE d.guid = $1 AND a.id = $2 AND d.site_id IS NOT DISTINCT FROM a.site_id",
        device,
        approval,
    )
    .execute(&mut *conn)
    .await?;
    if moved.rows_affected() == 0 {
        let message = "The device is gone, or in another site. The machine is shown there when it comes again.";
        return Err(Error::conflict("device_changed", message));
    }
    // A machine that was denied before may be the one it belonged to, or belongs to now.
    expire_others(conn, device, Some(approval)).await
}

/// The identity of `device` belongs to the next machine that says its id.
///
/// # Errors
/// When the database refuses.
pub(super) async fn unbind(conn: &mut PgConnection, device: Uuid) -> Result<()> {
    sqlx::query!("UPDATE devices SET machine_id = NULL, chosen_instance = NULL, chosen_at = NULL WHERE guid = $1", device)
        .execute(&mut *conn)
        .await?;
    expire_others(conn, device, None).await
}

/// What was shown, or decided, of the other machines of `device` is over.
async fn expire_others(conn: &mut PgConnection, device: Uuid, approval: Option<Uuid>) -> Result<()> {
    sqlx::query!(
        "UPDATE device_approvals SET status = 'expired', updated_at = now()
         WHERE device_guid = $1 AND kind = 'identity' AND status IN ('pending', 'denied') AND id IS DISTINCT FROM $2",
        device,
        approval,
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The agent that was chosen has tokens that the other one has not: they are told apart by those from now on.
///
/// # Errors
/// When the database refuses.
pub async fn forget_choice(conn: &mut PgConnection, device: Uuid) -> Result<()> {
    sqlx::query!("UPDATE devices SET chosen_instance = NULL, chosen_at = NULL WHERE guid = $1", device).execute(conn).await?;
    Ok(())
}

/// Tells the audit that a machine was restored from a snapshot of itself, and goes on with tokens it had before.
pub(super) async fn note_restored(
    conn: &mut PgConnection,
    device: Uuid,
    hostname: &str,
    site_id: Option<i64>,
    address: &str,
) -> Result<()> {
    let entry = audit::Entry {
        action: "device.identity_restored",
        object_kind: "device",
        object_id: guid_text(device),
        site_id,
        failed: false,
        detail: json!({}),
    };
    audit::record(conn, &device_actor(device, hostname, address), entry).await
}

/// Tells the audit that sockets of a device displace each other.
///
/// # Errors
/// When the database is away.
pub async fn note_flapping(pool: &db::Pool, device: Uuid, hostname: &str, site_id: Option<i64>, address: &str) -> Result<()> {
    let mut tx = pool.begin().await?;
    let entry = audit::Entry {
        action: "device.identity_flapping",
        object_kind: "device",
        object_id: guid_text(device),
        site_id,
        failed: true,
        detail: json!({"address": address}),
    };
    audit::record(&mut tx, &device_actor(device, hostname, address), entry).await?;
    tx.commit().await?;
    Ok(())
}

fn device_actor(device: Uuid, hostname: &str, address: &str) -> Actor {
    Actor {
        kind: ActorKind::Device,
        id: guid_text(device),
        name: hostname.to_owned(),
        ip: address.to_owned(),
        ..Actor::default()
    }
}

/// The refusal of a bearer; none when it is admitted. It is no 401 and no 403: the machine keeps its tokens.
#[must_use]
pub fn refusal(verdict: Verdict) -> Option<Error> {
    let conflict = |code, message: &str, again| Some(Error::new(Kind::Conflict, code, message).retry_after(again));
    match verdict {
        Verdict::Admit => None,
        Verdict::Held => {
            let message = "Another machine has this identity. An operator has to decide; see the device approvals.";
            conflict(HELD, message, HELD_AGAIN_S)
        }
        Verdict::Contested => {
            let message = "Another agent with this identity is connected, or was a moment ago. Try again.";
            conflict(CONTESTED, message, CONTESTED_AGAIN_S)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(machine: u8, instance: u128) -> Bearer {
        let machine_id = if machine == 0 { String::new() } else { machine.to_string().repeat(64) };
        Bearer { machine_id, instance: (instance > 0).then(|| Uuid::from_u128(instance)), ..Bearer::default() }
    }

    fn connected(machine: u8, instance: u128) -> Known {
        let mut known = Known::default();
        known.admitted(&bearer(machine, instance));
        known
    }

    #[test]
    fn a_bearer_is_read_as_what_it_says() {
        let hash = "0123456789abcdef".repeat(4);
        let instance = Uuid::from_u128(7);
        let said = Bearer::parse(Some(&format!(" {} ", hash.to_uppercase())), Some(&instance.simple().to_string()));
        assert_eq!((said.machine_id, said.instance), (hash, Some(instance)));
        for wrong in [None, Some(""), Some("abc"), Some("g".repeat(64).as_str())] {
            assert_eq!(Bearer::parse(wrong, wrong), Bearer::default());
        }
    }

    #[test]
    fn another_machine_is_held() {
        let known = connected(1, 1);
        assert_eq!(known.judge(&bearer(2, 2)), Verdict::Held);
        assert_eq!(known.judge(&bearer(2, 1)), Verdict::Held, "whatever number it has");
        assert_eq!(known.judge(&bearer(0, 1)), Verdict::Held, "nor one that does not say its machine any more");
        assert_eq!(known.judge(&bearer(1, 1)), Verdict::Admit);
        assert_eq!(Known { other: None, ..known }.judge(&bearer(1, 2)), Verdict::Admit, "the same one, started again");
        assert_eq!(Known::default().judge(&bearer(0, 0)), Verdict::Admit, "agents that say neither");
    }

    #[test]
    fn two_that_are_there_at_once_are_two_machines() {
        let mut known = connected(1, 1);
        assert_eq!(known.judge(&bearer(1, 2)), Verdict::Contested);
        let contested =
            |by: u128, since: f64| Some(Other { instance: Uuid::from_u128(1), contested: Some((Uuid::from_u128(by), since)) });
        known.other = contested(2, 59.0);
        assert_eq!(known.judge(&bearer(1, 2)), Verdict::Contested);
        known.other = contested(2, 60.0);
        assert_eq!(known.judge(&bearer(1, 2)), Verdict::Held);
        assert_eq!(known.judge(&bearer(1, 3)), Verdict::Contested, "it has not waited as long");
        assert_eq!(known.judge(&bearer(1, 1)), Verdict::Admit);
        // It is held when the other one is away for a moment, too.
        let waiting = Known { other: None, waiting: vec![Uuid::from_u128(2)], ..known };
        assert_eq!(waiting.judge(&bearer(1, 2)), Verdict::Held);
        assert_eq!(waiting.judge(&bearer(1, 1)), Verdict::Admit);
    }

    #[test]
    fn an_operator_chooses_one_of_two() {
        let known = Known { chosen: Some(Uuid::from_u128(2)), ..connected(1, 1) };
        assert_eq!(known.judge(&bearer(1, 2)), Verdict::Admit);
        assert_eq!(known.judge(&bearer(1, 1)), Verdict::Held);
        assert_eq!(known.judge(&bearer(2, 2)), Verdict::Held);
        assert!(known.chose(&bearer(1, 2)) && !known.chose(&bearer(1, 1)));
        assert!(!Known::default().chose(&bearer(0, 0)));
    }
}
