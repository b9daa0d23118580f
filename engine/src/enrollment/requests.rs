//! A machine asks to be enrolled.

use std::fmt;

use borealis_protocol::keys;
use serde_json::{Map, Value, json};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{approvals, rates};
use crate::{
    access::limits::{self, Limit},
    audit, db,
    error::{Error, Kind, Result},
    keys::guid_text,
    names::{self, Name, Rule},
    scope::{Actor, ActorKind},
    sites::normal_enrollment_code,
};

/// The longest hostname, in characters.
pub const MAX_HOSTNAME_CHARS: usize = 253;
/// Fewer bytes are no nonce.
pub const MIN_NONCE_BYTES: usize = 16;
/// More bytes are not needed.
pub const MAX_NONCE_BYTES: usize = 256;
/// Open requests of one site; a code that has leaked must not fill the table.
pub const MAX_OPEN_PER_SITE: i64 = 20_000;
/// Keys whose wrong codes are remembered.
pub const MAX_WRONG_CODES: i64 = 5_000;

/// A request, read and checked as far as that needs no database.
#[derive(Clone)]
pub struct Request {
    /// The name the machine gives itself; a label.
    pub hostname: Name,
    /// The code, as sent.
    pub code: String,
    /// SPKI DER of an Ed25519 key.
    pub public_key: Vec<u8>,
    /// SHA-256 of it, lower-case hex.
    pub fingerprint: String,
    /// At least [`MIN_NONCE_BYTES`] bytes.
    pub client_nonce: Vec<u8>,
    /// The job, run and target that installed the agent, as far as they make sense.
    pub onboarding: (Option<i64>, Option<i64>, String),
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("hostname", &self.hostname.as_str())
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

/// Where a request comes from, and how many wrong codes may.
#[derive(Debug, Clone)]
pub struct Source {
    /// The address.
    pub ip: String,
    /// The address as the subject of limits.
    pub subject: String,
    /// [`limits::ENROLLMENT_CODE`] with the number that is set.
    pub wrong_codes: Limit,
}

/// What the machine is told.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// The approval's id, for operators.
    pub approval_id: Uuid,
    /// Names the request in polls; as text it is part of the proof.
    pub reference: Uuid,
    /// 32 random bytes, part of the proof.
    pub server_nonce: [u8; 32],
    /// The site the code belongs to.
    pub site_id: i64,
    /// As stored.
    pub hostname: String,
    /// Approved already, by an operator before or by the site's open door now.
    pub approved: bool,
    /// By the site's open door.
    pub auto_approved: bool,
}

/// Reads a hostname. It stands in paths and lists, so it has no characters that cannot.
///
/// # Errors
/// 400 `invalid_hostname`.
pub fn hostname(text: &str) -> Result<Name> {
    Name::parse(text, &Rule { field: "hostname", code: "invalid_hostname", max_chars: MAX_HOSTNAME_CHARS, in_paths: true })
}

/// How a wrong code is shown to administrators: enough to recognise a typing mistake, too little to use.
#[must_use]
pub fn mask(code: &str) -> String {
    let chars: Vec<char> = code.trim().chars().filter(|c| !c.is_control()).collect();
    match chars.as_slice() {
        [a, b, c, _, .., x, y, z] => format!("{a}{b}{c}***{x}{y}{z}"),
        _ => "***".to_owned(),
    }
}

fn text<'a>(body: &'a Map<String, Value>, name: &str) -> &'a str {
    body.get(name).and_then(Value::as_str).map(str::trim).unwrap_or_default()
}

impl Request {
    /// Reads a request body.
    ///
    /// # Errors
    /// 400 with the code for the first thing missing or unreadable.
    pub fn parse(body: &Map<String, Value>) -> Result<Self> {
        let required = |name: &str, code: &'static str| match text(body, name) {
            "" => Err(Error::field(code, name, "is required")),
            text => Ok(text),
        };
        let hostname_text = required("hostname", "hostname_required")?;
        let code = required("enrollment_code", "enrollment_code_required")?;
        let public_key = required("agent_pubkey", "agent_pubkey_required")?;
        let client_nonce = required("client_nonce", "client_nonce_required")?;
        let hostname = hostname(hostname_text)?;
        let key = keys::from_spki_base64(public_key).map_err(|_| {
            Error::field("invalid_agent_pubkey", "agent_pubkey", "must be an Ed25519 public key: the SPKI DER in base64")
        })?;
        let client_nonce = keys::from_base64(client_nonce)
            .ok()
            .filter(|nonce| (MIN_NONCE_BYTES..=MAX_NONCE_BYTES).contains(&nonce.len()))
            .ok_or_else(|| Error::field("invalid_client_nonce", "client_nonce", "must be base64 of 16 to 256 bytes"))?;
        Ok(Self {
            hostname,
            code: code.to_owned(),
            public_key: keys::spki_der(&key).to_vec(),
            fingerprint: keys::fingerprint(&key),
            client_nonce,
            onboarding: onboarding(body.get("onboarding_context")),
        })
    }
}

/// Bad parts are dropped, not refused.
fn onboarding(context: Option<&Value>) -> (Option<i64>, Option<i64>, String) {
    let id = |name: &str| context.and_then(|context| context.get(name)).and_then(Value::as_i64).filter(|id| *id > 0);
    let target = context.and_then(|context| context.get("target")).and_then(Value::as_str);
    let target = target.map(|text| names::visible(text, MAX_HOSTNAME_CHARS));
    (id("job_id"), id("run_id"), target.unwrap_or_default())
}

/// A device that stands in the way of, or speaks for, letting a machine in unseen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    guid: Uuid,
    same_key: bool,
    same_site: bool,
    active: bool,
}

/// The open request of a key.
struct Before {
    id: Uuid,
    approval_reference: Uuid,
    status: String,
    site_id: Option<i64>,
    hostname_claimed: String,
    hostname_claimed_key: String,
    approved_by_user_id: Option<String>,
}

/// Whether a site's open door lets a machine in, and as which device: as a new one when neither its key nor its name is
/// known here; as itself when it is active in this site. Everything else is for a person.
fn open_door(known: &[Known]) -> Option<Option<Uuid>> {
    match known.iter().find(|device| device.same_key) {
        Some(itself) => (itself.active && itself.same_site).then_some(Some(itself.guid)),
        None => known.is_empty().then_some(None),
    }
}

/// Takes a request: finds the site by its code and opens an approval, or renews the open one of this key.
///
/// # Errors
/// 400 `invalid_enrollment_code`; 429 `rate_limited` per key, for an address that came with too many wrong codes, or when a
/// site has [`MAX_OPEN_PER_SITE`] open requests.
pub async fn submit(pool: &db::Pool, request: &Request, source: &Source) -> Result<Accepted> {
    let address = source.ip.as_str();
    limits::check(pool, &source.wrong_codes, &source.subject).await?;
    rates::hit(pool, "enroll.key", &request.fingerprint, rates::REQUESTS_PER_KEY).await?;
    let code = normal_enrollment_code(&request.code);
    let site = sqlx::query!(
        r#"SELECT id, upper(translate(enrollment_code, '- ', '')) AS "code!",
                  coalesce(auto_approve_until > now(), false) AS "open_door!",
                  coalesce(enrollment_code_expires_at <= now(), false) AS "expired!",
                  EXISTS (SELECT FROM device_approvals a
                          WHERE a.fingerprint = $2 AND a.site_id = sites.id AND a.status IN ('pending', 'approved')
                            AND a.kind = 'enrollment') AS "asked_in_time!"
           FROM sites WHERE upper(translate(enrollment_code, '- ', '')) = $1"#,
        code,
        request.fingerprint,
    )
    .fetch_optional(pool)
    .await?
    .filter(|site| bool::from(site.code.as_bytes().ct_eq(code.as_bytes())));
    let Some(site) = site else {
        record_wrong_code(pool, request, address).await?;
        // Stays taken: it was wrong. Of many at once, those over the limit hear that and not whether they were right.
        let _taken = limits::attempt(pool, &[(source.wrong_codes, source.subject.clone())]).await?;
        return Err(no_such_code());
    };
    // Who asked in time and was restarted goes on. To know an old code is no guess.
    if site.expired && !site.asked_in_time {
        record_wrong_code(pool, request, address).await?;
        return Err(no_such_code());
    }
    for _ in 0..3 {
        match open(pool, request, address, site.id, site.open_door).await {
            // Two requests with one key at once: the second finds the first's row.
            Err(error) if error.constraint() == Some("device_approvals_open") => {}
            outcome => return outcome,
        }
    }
    Err(Error::new(Kind::Unavailable, "busy", "Too many requests with this key at once; try again.").retry_after(1))
}

fn no_such_code() -> Error {
    Error::invalid("invalid_enrollment_code", "No site has this enrollment code, or it has expired.")
}

async fn open(pool: &db::Pool, request: &Request, address: &str, site_id: i64, door_open: bool) -> Result<Accepted> {
    let server_nonce: [u8; 32] = rand::random();
    let (job, run, target) = &request.onboarding;
    let mut tx = pool.begin().await?;
    sqlx::query!("DELETE FROM enrollment_code_failures WHERE fingerprint = $1", request.fingerprint).execute(&mut *tx).await?;
    let before = sqlx::query_as!(
        Before,
        "SELECT id, approval_reference, status, site_id, hostname_claimed, hostname_claimed_key, approved_by_user_id FROM device_approvals
         WHERE fingerprint = $1 AND status IN ('pending', 'approved') AND kind = 'enrollment' FOR UPDATE",
        request.fingerprint,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let same = |before: &Before| before.site_id == Some(site_id) && before.hostname_claimed_key == request.hostname.key();
    if let Some(before) = &before {
        // The decision was for this key, in this site, under this name; a restart of the agent does not undo it.
        if before.status == "approved" && same(before) {
            sqlx::query!(
                "UPDATE device_approvals SET client_nonce = $2, server_nonce = $3, remote_addr = $4, updated_at = now() WHERE id = $1",
                before.id,
                request.client_nonce,
                server_nonce.as_slice(),
                address,
            )
            .execute(&mut *tx)
            .await?;
            tx.commit().await?;
            return Ok(Accepted {
                approval_id: before.id,
                reference: before.approval_reference,
                server_nonce,
                site_id,
                hostname: before.hostname_claimed.clone(),
                approved: true,
                auto_approved: before.approved_by_user_id.as_deref() == Some("site_auto_approval"),
            });
        }
        // Somebody may be looking at it: what they decide is for what they see.
        if !same(before) {
            sqlx::query!("UPDATE device_approvals SET status = 'expired', updated_at = now() WHERE id = $1", before.id)
                .execute(&mut *tx)
                .await?;
            let why = "the key asked again under another name or in another site";
            approvals::record_expired(&mut tx, before.id, before.site_id, why).await?;
        }
    }
    let (id, reference) = match before.filter(same) {
        Some(before) => {
            sqlx::query!(
                "UPDATE device_approvals SET hostname_claimed = $2, enrollment_code = $3, client_nonce = $4,
                        server_nonce = $5, remote_addr = $6, onboarding_job_id = $7, onboarding_run_id = $8,
                        onboarding_target = $9, hostname_claimed_key = $10, updated_at = now()
                 WHERE id = $1",
                before.id,
                request.hostname.as_str(),
                request.code,
                request.client_nonce,
                server_nonce.as_slice(),
                address,
                *job,
                *run,
                target,
                request.hostname.key(),
            )
            .execute(&mut *tx)
            .await?;
            (before.id, before.approval_reference)
        }
        None => {
            let open = sqlx::query_scalar!(
                r#"SELECT count(*) AS "count!" FROM (SELECT 1 FROM device_approvals
                   WHERE site_id = $1 AND status IN ('pending', 'approved') AND kind = 'enrollment' LIMIT $2) AS o"#,
                site_id,
                MAX_OPEN_PER_SITE,
            )
            .fetch_one(&mut *tx)
            .await?;
            if open >= MAX_OPEN_PER_SITE {
                let error = Error::new(Kind::Limited, "rate_limited", "This site has too many open requests; decide some first.");
                return Err(error.retry_after(600));
            }
            let (id, reference) = (Uuid::now_v7(), Uuid::new_v4());
            sqlx::query!(
                "INSERT INTO device_approvals (id, approval_reference, hostname_claimed, fingerprint, public_key, enrollment_code,
                        site_id, client_nonce, server_nonce, remote_addr, onboarding_job_id, onboarding_run_id, onboarding_target,
                        hostname_claimed_key)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
                id,
                reference,
                request.hostname.as_str(),
                request.fingerprint,
                request.public_key,
                request.code,
                site_id,
                request.client_nonce,
                server_nonce.as_slice(),
                address,
                *job,
                *run,
                target,
                request.hostname.key(),
            )
            .execute(&mut *tx)
            .await?;
            (id, reference)
        }
    };
    let approved = door_open && enter(&mut tx, request, id, site_id).await?;
    tx.commit().await?;
    Ok(Accepted {
        approval_id: id,
        reference,
        server_nonce,
        site_id,
        hostname: request.hostname.as_str().to_owned(),
        approved,
        auto_approved: approved,
    })
}

/// Approves by the site's open door, if its rule allows.
async fn enter(tx: &mut db::Tx<'_>, request: &Request, approval: Uuid, site_id: i64) -> Result<bool> {
    let known = sqlx::query_as!(
        Known,
        r#"SELECT guid, fingerprint = $1 AS "same_key!", coalesce(site_id = $2, false) AS "same_site!", status = 'active' AS "active!"
           FROM devices WHERE fingerprint = $1 OR (site_id = $2 AND hostname_key = $3) LIMIT 100"#,
        request.fingerprint,
        site_id,
        request.hostname.key(),
    )
    .fetch_all(&mut **tx)
    .await?;
    let Some(guid) = open_door(&known) else { return Ok(false) };
    sqlx::query!(
        "UPDATE device_approvals SET status = 'approved', device_guid = $2, approved_by_user_id = 'site_auto_approval',
                decided_at = now(), updated_at = now()
         WHERE id = $1",
        approval,
        guid,
    )
    .execute(&mut **tx)
    .await?;
    let actor = Actor { kind: ActorKind::System, name: "site_auto_approval".to_owned(), ..Actor::default() };
    let entry = audit::Entry {
        action: "device_approval.approve",
        object_kind: "device_approval",
        object_id: approval.to_string(),
        site_id: Some(site_id),
        detail: json!({"hostname": request.hostname.as_str(), "fingerprint": request.fingerprint, "guid": guid.map(guid_text)}),
        ..audit::Entry::default()
    };
    audit::record(tx, &actor, entry).await?;
    Ok(true)
}

async fn record_wrong_code(pool: &db::Pool, request: &Request, address: &str) -> Result<()> {
    sqlx::query!(
        "INSERT INTO enrollment_code_failures AS f (fingerprint, hostname_claimed, code_mask, remote_addr)
         VALUES ($1, $2, $3, $4)
         ON CONFLICT (fingerprint) DO UPDATE SET hostname_claimed = excluded.hostname_claimed, code_mask = excluded.code_mask,
             remote_addr = excluded.remote_addr, last_seen_at = now(), attempt_count = f.attempt_count + 1",
        request.fingerprint,
        request.hostname.as_str(),
        mask(&request.code),
        address,
    )
    .execute(pool)
    .await?;
    sqlx::query!(
        "DELETE FROM enrollment_code_failures
         WHERE last_seen_at < now() - interval '24 hours'
            OR last_seen_at < (SELECT last_seen_at FROM enrollment_code_failures ORDER BY last_seen_at DESC OFFSET $1 LIMIT 1)",
        MAX_WRONG_CODES,
    )
    .execute(pool)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;

    fn body() -> Map<String, Value> {
        let key = SigningKey::from_bytes(&[1; 32]);
        let body = json!({
            "hostname": " web-1 ", "enrollment_code": "ABCD", "agent_pubkey": keys::spki_base64(&key.verifying_key()),
            "client_nonce": keys::to_base64(&[5; 32]),
            "onboarding_context": {"job_id": 4, "run_id": -1, "target": "10.0.0.4"},
        });
        body.as_object().unwrap().clone()
    }

    #[test]
    fn a_request_is_read_in_the_contracts_order() {
        let request = Request::parse(&body()).unwrap();
        assert_eq!((request.hostname.as_str(), request.fingerprint.len()), ("web-1", 64));
        assert_eq!(request.onboarding, (Some(4), None, "10.0.0.4".to_owned()));

        let mut rest = Map::new();
        for (name, code) in [
            ("hostname", "hostname_required"),
            ("enrollment_code", "enrollment_code_required"),
            ("agent_pubkey", "agent_pubkey_required"),
            ("client_nonce", "client_nonce_required"),
        ] {
            assert_eq!(Request::parse(&rest).unwrap_err().code, code);
            rest.insert(name.to_owned(), body()[name].clone());
        }
        for (name, bad, code) in [
            ("hostname", json!("x".repeat(254)), "invalid_hostname"),
            ("hostname", json!("a\nb"), "invalid_hostname"),
            ("hostname", json!(7), "hostname_required"),
            ("agent_pubkey", json!("!!"), "invalid_agent_pubkey"),
            ("agent_pubkey", json!(keys::to_base64(&[1; 44])), "invalid_agent_pubkey"),
            ("client_nonce", json!(keys::to_base64(&[5; 15])), "invalid_client_nonce"),
            ("client_nonce", json!("?"), "invalid_client_nonce"),
        ] {
            let mut changed = body();
            changed.insert(name.to_owned(), bad);
            assert_eq!(Request::parse(&changed).unwrap_err().code, code);
        }
    }

    #[test]
    fn wrong_codes_are_shown_masked() {
        assert_eq!(mask("0123456789"), "012***789");
        assert_eq!(mask("1234567"), "123***567");
        assert_eq!(mask("123456"), "***");
        assert_eq!(mask(""), "***");
    }

    #[test]
    fn the_open_door_admits_only_the_unknown_and_the_active_itself() {
        let guid = Uuid::from_u128(1);
        let itself = Known { guid, same_key: true, same_site: true, active: true };
        let namesake = Known { guid: Uuid::from_u128(2), same_key: false, same_site: true, active: true };
        assert_eq!(open_door(&[]), Some(None));
        assert_eq!(open_door(std::slice::from_ref(&itself)), Some(Some(guid)));
        assert_eq!(open_door(&[namesake.clone(), itself.clone()]), Some(Some(guid)));
        assert_eq!(open_door(std::slice::from_ref(&namesake)), None);
        assert_eq!(open_door(&[Known { active: false, ..itself.clone() }]), None);
        assert_eq!(open_door(&[Known { same_site: false, ..itself }]), None);
    }
}
