//! A machine proves its key and gets tokens, renews them, and is recognised by them.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use borealis_protocol::{keys as wire, rest::RemoteOpsRoute};
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{
    machines::{self, Bearer, Verdict},
    rates,
};
use crate::{
    audit, db,
    error::{Error, Kind, Result},
    keys::{AccessClaims, Keys, guid_text, parse_guid},
    scope::{Actor, ActorKind},
    secret::Secret,
};

/// How long a refresh token lives after it was last used, in days.
pub const REFRESH_TTL_DAYS: i64 = 90;
/// How long a rotated refresh token still answers, in seconds: the answer with its successor may have been lost.
pub const ROTATION_GRACE_S: i64 = 60;
/// How long after completion a valid proof gives tokens again, in seconds.
pub const REISSUE_S: i64 = 600;
/// Milliseconds until the next poll of an undecided request.
pub const POLL_AFTER_MS: u64 = 5000;

const REFRESH_TOKEN_BYTES: usize = 48;
const MAX_REFRESH_TOKEN_CHARS: usize = 256;

/// A poll, read as far as that needs no database.
#[derive(Debug, Clone)]
pub struct Proof {
    reference: String,
    client_nonce: Vec<u8>,
    signature: String,
}

impl Proof {
    /// Reads a poll body.
    ///
    /// # Errors
    /// 400 with the code for the first thing missing or unreadable.
    pub fn parse(body: &Map<String, Value>) -> Result<Self> {
        let required = |name: &str, code: &'static str| match body.get(name).and_then(Value::as_str).map(str::trim) {
            None | Some("") => Err(Error::field(code, name, "is required")),
            Some(text) => Ok(text.to_owned()),
        };
        let reference = required("approval_reference", "approval_reference_required")?;
        let client_nonce = required("client_nonce", "client_nonce_required")?;
        let signature = required("proof_sig", "proof_sig_required")?;
        let client_nonce = wire::from_base64(&client_nonce)
            .map_err(|_| Error::field("invalid_client_nonce", "client_nonce", "must be base64"))?;
        wire::from_base64(&signature).map_err(|_| Error::field("invalid_proof_sig", "proof_sig", "must be base64"))?;
        Ok(Self { reference, client_nonce, signature })
    }
}

/// What a poll finds.
#[derive(Debug)]
pub enum Poll {
    /// No such reference.
    Unknown,
    /// Nobody has decided yet.
    Pending,
    /// An operator said no, or what was approved must not be done any more.
    Denied,
    /// Too old.
    Expired,
    /// The tokens were given out before.
    Finalized,
    /// Here they are.
    Approved(Box<Issued>),
}

/// Tokens for a device.
#[derive(Debug)]
pub struct Issued {
    /// The device.
    pub guid: Uuid,
    /// Its hostname, as stored.
    pub hostname: String,
    /// Its site.
    pub site_id: Option<i64>,
    /// The approval this completes.
    pub approval_id: Uuid,
    /// The access token.
    pub access_token: Secret<String>,
    /// The refresh token.
    pub refresh_token: Secret<String>,
    /// Tokens from before are dead, or the device moved: open sockets must close.
    pub drop_sockets: bool,
    /// False when the same tokens' answer was lost and this is another pair.
    pub first: bool,
}

/// Judges a poll; an approved one becomes a device, once, in one transaction.
///
/// # Errors
/// 400 `nonce_mismatch`, `agent_pubkey_invalid`, `invalid_proof`; 429 `rate_limited`.
pub async fn poll(pool: &db::Pool, keys: &Keys, proof: &Proof, address: &str) -> Result<Poll> {
    // The reference is compared as the text that was given out, which is what the proof signs.
    let Some(reference) = Uuid::try_parse(&proof.reference).ok().filter(|id| id.to_string() == proof.reference) else {
        return Ok(Poll::Unknown);
    };
    let exists = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM device_approvals WHERE approval_reference = $1) AS "exists!""#,
        reference
    )
    .fetch_one(pool)
    .await?;
    if !exists {
        return Ok(Poll::Unknown);
    }
    rates::hit(pool, "enroll.poll", &proof.reference, rates::POLLS_PER_REFERENCE).await?;

    let mut tx = pool.begin().await?;
    let row = sqlx::query_as!(
        Approval,
        r#"SELECT id, device_guid, hostname_claimed, hostname_claimed_key, fingerprint, public_key, site_id, status, client_nonce, server_nonce,
                  coalesce(approved_by_user_id <> 'site_auto_approval', true) AS "by_operator!", decided_as_admin, decided_at, reinstate, coalesce(completed_at > now() - make_interval(secs => $2), false) AS "may_reissue!"
           FROM device_approvals WHERE approval_reference = $1 FOR UPDATE"#,
        reference,
        REISSUE_S as f64,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(approval) = row else { return Ok(Poll::Unknown) };
    if !bool::from(approval.client_nonce.ct_eq(&proof.client_nonce)) {
        return Err(Error::invalid("nonce_mismatch", "The nonce is not that of the request."));
    }
    let key = wire::from_spki_der(&approval.public_key)
        .map_err(|_| Error::invalid("agent_pubkey_invalid", "The key of the request is not an Ed25519 key."))?;
    let message = wire::enrollment_proof_bytes(&approval.server_nonce, &proof.reference, &approval.client_nonce);
    wire::verify_base64(&key, &message, &proof.signature)
        .map_err(|_| Error::invalid("invalid_proof", "The proof was not made with the key of the request."))?;

    let outcome = match approval.status.as_str() {
        "pending" => return Ok(Poll::Pending),
        "denied" => return Ok(Poll::Denied),
        "expired" => return Ok(Poll::Expired),
        "completed" if approval.may_reissue => reissue(&mut tx, keys, &approval).await?,
        "completed" => return Ok(Poll::Finalized),
        _ => finalise(&mut tx, keys, &approval, address).await?,
    };
    tx.commit().await?;
    Ok(outcome)
}

struct Approval {
    id: Uuid,
    device_guid: Option<Uuid>,
    hostname_claimed: String,
    hostname_claimed_key: String,
    fingerprint: String,
    public_key: Vec<u8>,
    site_id: Option<i64>,
    status: String,
    client_nonce: Vec<u8>,
    server_nonce: Vec<u8>,
    by_operator: bool,
    decided_as_admin: bool,
    decided_at: Option<DateTime<Utc>>,
    reinstate: bool,
    may_reissue: bool,
}

struct Stored {
    guid: Uuid,
    hostname: String,
    site_id: Option<i64>,
    status: String,
    fingerprint: String,
    token_version: i32,
}

/// What an approval may still do to the device it would bind, looked at when it is used and not only when it was given:
/// the device may have been revoked, moved or purged since. A purged GUID needs an administrator who knew of the purge.
fn may_bind(approval: &Approval, target: Option<&Stored>, purged_at: Option<DateTime<Utc>>) -> bool {
    let knew = |purged_at| approval.decided_as_admin && approval.decided_at.is_some_and(|decided_at| decided_at > purged_at);
    purged_at.is_none_or(knew)
        && target.is_none_or(|device| {
            let same_device = device.fingerprint == approval.fingerprint || approval.device_guid == Some(device.guid);
            let may_live = device.status == "active" || (approval.reinstate && approval.decided_as_admin);
            same_device && may_live && (device.site_id == approval.site_id || approval.decided_as_admin)
        })
}

async fn finalise(tx: &mut db::Tx<'_>, keys: &Keys, approval: &Approval, address: &str) -> Result<Poll> {
    // The device with this key, and the one the approval names: at most two rows, and never two when it may go on.
    let found = sqlx::query_as!(
        Stored,
        "SELECT guid, hostname, site_id, status, fingerprint, token_version FROM devices
         WHERE fingerprint = $1 OR guid = $2 ORDER BY guid FOR UPDATE",
        approval.fingerprint,
        approval.device_guid,
    )
    .fetch_all(&mut **tx)
    .await?;
    let target = match (found.as_slice(), approval.device_guid) {
        ([], _) => None,
        ([device], None) => Some(device),
        ([device], Some(guid)) if device.guid == guid => Some(device),
        // The key belongs to another device than the approval names.
        _ => return deny(tx, approval).await,
    };
    let guid = target.map(|device| device.guid).or(approval.device_guid).unwrap_or_else(Uuid::new_v4);
    let barrier =
        sqlx::query!("SELECT required_token_version, purged_at FROM device_purge_barriers WHERE guid = $1 FOR UPDATE", guid)
            .fetch_optional(&mut **tx)
            .await?;
    if !may_bind(approval, target, barrier.as_ref().map(|barrier| barrier.purged_at)) {
        return deny(tx, approval).await;
    }
    let least = barrier.map_or(1, |barrier| barrier.required_token_version).max(1);
    let (hostname, token_version, drop_sockets) = match target {
        Some(device) => {
            let new_key = device.fingerprint != approval.fingerprint;
            let version = (device.token_version + i32::from(new_key)).max(least);
            // The name that an operator approved is the device's, unless another one of the site has it: then it stays as it was, and
            // the new one is shown as reported.
            let hostname = sqlx::query_scalar!(
                "UPDATE devices AS d SET fingerprint = $2, public_key = $3, token_version = $4, status = 'active', site_id = $5,
                        last_enrollment_at = now(), key_added_at = CASE WHEN $6 THEN now() ELSE key_added_at END,
                        hostname = CASE WHEN n.is_free THEN $7 ELSE d.hostname END,
                        hostname_key = CASE WHEN n.is_free THEN $8 ELSE d.hostname_key END
                 FROM (SELECT $9 AND NOT EXISTS (SELECT FROM devices o WHERE o.hostname_key = $8 AND o.guid <> $1
                                                 AND o.site_id IS NOT DISTINCT FROM $5) AS is_free) AS n
                 WHERE d.guid = $1 RETURNING d.hostname",
                guid,
                approval.fingerprint,
                approval.public_key,
                version,
                approval.site_id,
                new_key,
                approval.hostname_claimed,
                approval.hostname_claimed_key,
                approval.by_operator,
            )
            .fetch_one(&mut **tx)
            .await?;
            // The approval is for the machine that asks now, which may be another one or have another id: reinstalled, say.
            machines::unbind(&mut *tx, guid).await?;
            (hostname, version, version != device.token_version || device.site_id != approval.site_id)
        }
        None => {
            let agent_id =
                borealis_protocol::agent_id(&approval.hostname_claimed, &guid_text(guid), borealis_protocol::CONTEXT_SYSTEM);
            sqlx::query!(
                "INSERT INTO devices (guid, hostname, hostname_key, site_id, agent_id, fingerprint, public_key, token_version, last_seen)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now())",
                guid,
                approval.hostname_claimed,
                approval.hostname_claimed_key,
                approval.site_id,
                agent_id,
                approval.fingerprint,
                approval.public_key,
                least,
            )
            .execute(&mut **tx)
            .await
            .map_err(|error| {
                // Another enrollment with this key, or for this GUID, was faster; the next poll finds its device.
                let busy =
                    || Error::new(Kind::Unavailable, "busy", "This key is being enrolled elsewhere; poll again.").retry_after(1);
                Error::from(error).on_constraint("devices_fingerprint_key", busy).on_constraint("devices_pkey", busy)
            })?;
            (approval.hostname_claimed.clone(), least, false)
        }
    };
    sqlx::query!(
        "INSERT INTO device_keys (device_guid, fingerprint) VALUES ($1, $2)
         ON CONFLICT (device_guid, fingerprint) DO UPDATE SET retired_at = NULL",
        guid,
        approval.fingerprint,
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!(
        "UPDATE device_keys SET retired_at = now() WHERE device_guid = $1 AND fingerprint <> $2 AND retired_at IS NULL",
        guid,
        approval.fingerprint,
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("DELETE FROM device_purge_barriers WHERE guid = $1", guid).execute(&mut **tx).await?;
    sqlx::query!(
        "UPDATE device_approvals SET status = 'completed', device_guid = $2, completed_at = now(), updated_at = now() WHERE id = $1",
        approval.id,
        guid,
    )
    .execute(&mut **tx)
    .await?;
    let (access_token, refresh_token) = issue(tx, keys, guid, &approval.fingerprint, token_version).await?;
    let actor = Actor {
        kind: ActorKind::Device,
        id: guid_text(guid),
        name: hostname.clone(),
        ip: address.to_owned(),
        ..Actor::default()
    };
    let entry = audit::Entry {
        action: "device.enroll",
        object_kind: "device",
        object_id: guid_text(guid),
        site_id: approval.site_id,
        detail: json!({"approval_id": approval.id, "fingerprint": approval.fingerprint, "token_version": token_version, "new": target.is_none()}),
        ..audit::Entry::default()
    };
    audit::record(tx, &actor, entry).await?;
    let site_id = approval.site_id;
    let approval_id = approval.id;
    Ok(Poll::Approved(Box::new(Issued {
        guid,
        hostname,
        site_id,
        approval_id,
        access_token,
        refresh_token,
        drop_sockets,
        first: true,
    })))
}

/// What was approved must not be done any more.
async fn deny(tx: &mut db::Tx<'_>, approval: &Approval) -> Result<Poll> {
    sqlx::query!("UPDATE device_approvals SET status = 'denied', updated_at = now() WHERE id = $1", approval.id)
        .execute(&mut **tx)
        .await?;
    let actor = Actor::system();
    let entry = audit::Entry {
        action: "device_approval.withdraw",
        object_kind: "device_approval",
        object_id: approval.id.to_string(),
        site_id: approval.site_id,
        failed: true,
        detail: json!({"reason": "the device changed after the approval"}),
    };
    audit::record(tx, &actor, entry).await?;
    Ok(Poll::Denied)
}

/// The answer with the tokens was lost: the key proves it again, the lost pair dies and another is given.
async fn reissue(tx: &mut db::Tx<'_>, keys: &Keys, approval: &Approval) -> Result<Poll> {
    let device = sqlx::query_as!(
        Stored,
        "SELECT guid, hostname, site_id, status, fingerprint, token_version FROM devices WHERE guid = $1 FOR UPDATE",
        approval.device_guid,
    )
    .fetch_optional(&mut **tx)
    .await?;
    let Some(device) = device.filter(|device| device.fingerprint == approval.fingerprint && device.status == "active") else {
        return Ok(Poll::Finalized);
    };
    let (access_token, refresh_token) = issue(tx, keys, device.guid, &device.fingerprint, device.token_version).await?;
    Ok(Poll::Approved(Box::new(Issued {
        guid: device.guid,
        hostname: device.hostname,
        site_id: device.site_id,
        approval_id: approval.id,
        access_token,
        refresh_token,
        drop_sockets: false,
        first: false,
    })))
}

/// A new pair; every refresh token from before is revoked.
async fn issue(
    tx: &mut db::Tx<'_>,
    keys: &Keys,
    guid: Uuid,
    fingerprint: &str,
    token_version: i32,
) -> Result<(Secret<String>, Secret<String>)> {
    let now = sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(&mut **tx).await?;
    let access = Secret::new(keys.sign_access(guid, fingerprint, token_version, now)?);
    sqlx::query!("UPDATE refresh_tokens SET revoked_at = now() WHERE device_guid = $1 AND revoked_at IS NULL", guid)
        .execute(&mut **tx)
        .await?;
    let refresh = insert_refresh(tx, guid, Uuid::new_v4(), Uuid::new_v4()).await?;
    Ok((access, refresh))
}

async fn insert_refresh(tx: &mut db::Tx<'_>, guid: Uuid, id: Uuid, family: Uuid) -> Result<Secret<String>> {
    let token = Secret::new(URL_SAFE_NO_PAD.encode(rand::random::<[u8; REFRESH_TOKEN_BYTES]>()));
    sqlx::query!(
        "INSERT INTO refresh_tokens (id, device_guid, family, token_hash, expires_at)
         VALUES ($1, $2, $3, $4, now() + make_interval(days => $5))",
        id,
        guid,
        family,
        hash(token.expose()),
        REFRESH_TTL_DAYS as i32,
    )
    .execute(&mut **tx)
    .await?;
    Ok(token)
}

fn hash(token: &str) -> Vec<u8> {
    Sha256::digest(token.as_bytes()).to_vec()
}

/// A refresh, read as far as that needs no database.
#[derive(Debug)]
pub struct Renewal {
    guid: Uuid,
    token: Secret<String>,
    rotates: bool,
    bearer: Bearer,
}

impl Renewal {
    /// Reads a refresh body. `rotates`, alone or in `capabilities`, says that the agent stores the token it gets.
    ///
    /// # Errors
    /// 400 `invalid_request`.
    pub fn parse(body: &Map<String, Value>) -> Result<Self> {
        let invalid = || Error::invalid("invalid_request", "A refresh needs guid and refresh_token.");
        let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::trim).unwrap_or_default();
        let guid = parse_guid(text("guid")).ok_or_else(invalid)?;
        let token = text("refresh_token");
        if token.is_empty() || token.len() > MAX_REFRESH_TOKEN_CHARS {
            return Err(invalid());
        }
        let says = |value: Option<&Value>| value.and_then(Value::as_bool).unwrap_or(false);
        let rotates = says(body.get("rotates")) || says(body.get("capabilities").and_then(|all| all.get("rotates")));
        let said = |name: &str| body.get(name).and_then(Value::as_str);
        let bearer = Bearer::parse(said("machine_id"), said("instance"));
        Ok(Self { guid, token: Secret::new(token.to_owned()), rotates, bearer })
    }
}

/// What a refresh gives.
#[derive(Debug)]
pub struct Renewed {
    /// The access token.
    pub access_token: Secret<String>,
    /// The next refresh token, for agents that store it.
    pub refresh_token: Option<Secret<String>>,
    /// The device's site now.
    pub site_id: Option<i64>,
}

struct TokenRow {
    id: Uuid,
    family: Uuid,
    expires_at: DateTime<Utc>,
    last_used_at: Option<DateTime<Utc>>,
    rotated_at: Option<DateTime<Utc>>,
    replaced_by: Option<Uuid>,
    revoked_at: Option<DateTime<Utc>>,
}

impl TokenRow {
    fn is_unused(&self) -> bool {
        self.last_used_at.is_none() && self.rotated_at.is_none() && self.revoked_at.is_none()
    }
}

/// What a refresh token is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    /// It is the family's newest.
    Current,
    /// It was rotated a moment ago and its successor was never used: the answer was lost.
    Repeated,
    /// It was rotated, and somebody has it who should not.
    Reused,
    /// It was rotated, and the machine that it belongs to has it again: from a snapshot or a backup of itself.
    Restored,
    Revoked,
    Expired,
}

/// Judges a token by its row and its successor's.
fn worth(token: &TokenRow, successor: Option<&TokenRow>, now: DateTime<Utc>) -> Worth {
    if token.revoked_at.is_some() {
        return Worth::Revoked;
    }
    if token.expires_at <= now {
        return Worth::Expired;
    }
    let Some(rotated_at) = token.rotated_at else { return Worth::Current };
    if now - rotated_at <= TimeDelta::seconds(ROTATION_GRACE_S) && successor.is_some_and(TokenRow::is_unused) {
        Worth::Repeated
    } else {
        Worth::Reused
    }
}

/// Gives a new access token for a refresh token, and rotates it for agents that can.
///
/// # Errors
/// 401 `device_purged`, `invalid_refresh_token`, `refresh_token_revoked`, `refresh_token_expired`; 403 `device_revoked`;
/// 409 `identity_held`, `identity_contested`; 429 `rate_limited`; 500 `token_issue_failed`. Nothing transient is ever a 401 or 403: older agents forget who they are then.
pub async fn refresh(pool: &db::Pool, keys: &Keys, renewal: &Renewal, address: &str) -> Result<Renewed> {
    let refused = |code: &'static str, message: &str| Error::new(Kind::Unauthenticated, code, message);
    let guid = renewal.guid;
    let token_hash = hash(renewal.token.expose());
    let known = sqlx::query!(
        r#"SELECT EXISTS (SELECT 1 FROM device_purge_barriers WHERE guid = $1) AS "purged!",
                  EXISTS (SELECT 1 FROM refresh_tokens WHERE device_guid = $1 AND token_hash = $2) AS "token!""#,
        guid,
        token_hash,
    )
    .fetch_one(pool)
    .await?;
    if known.purged {
        return Err(refused("device_purged", "This device was removed."));
    }
    if !known.token {
        return Err(refused("invalid_refresh_token", "There is no such refresh token."));
    }
    // Counted only for those who hold a token: a stranger must not use up a device's tries.
    rates::hit(pool, "enroll.refresh", &guid_text(guid), rates::REFRESHES_PER_DEVICE).await?;

    let mut tx = pool.begin().await?;
    // The device's row is the lock of all its tokens.
    let device = sqlx::query!(
        "SELECT hostname, site_id, status, fingerprint, token_version, clock_timestamp() AS \"now!\" FROM devices
         WHERE guid = $1 FOR NO KEY UPDATE",
        guid
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(device) = device else {
        return Err(Error::new(Kind::NotFound, "device_not_found", "There is no such device."));
    };
    let rows = sqlx::query_as!(
        TokenRow,
        "SELECT id, family, expires_at, last_used_at, rotated_at, replaced_by, revoked_at FROM refresh_tokens
         WHERE device_guid = $1 AND (token_hash = $2
            OR id = (SELECT replaced_by FROM refresh_tokens WHERE device_guid = $1 AND token_hash = $2))
         ORDER BY token_hash = $2 DESC",
        guid,
        token_hash,
    )
    .fetch_all(&mut *tx)
    .await?;
    let Some((token, successor)) = rows.split_first() else {
        return Err(refused("invalid_refresh_token", "There is no such refresh token."));
    };
    let successor = successor.first().filter(|next| Some(next.id) == token.replaced_by);
    let bearer = Bearer { address: address.to_owned(), ..renewal.bearer.clone() };
    let known = machines::known(&mut tx, &[guid]).await?.remove(&guid).unwrap_or_default();
    let may_connect = device.status == "active" || device.status == "quarantined";
    let mut worth = worth(token, successor, device.now);
    // Who shows a token that is worth nothing any more is refused for that.
    if may_connect && worth != Worth::Revoked && worth != Worth::Expired {
        let mut verdict = known.judge(&bearer);
        // The machine that the tokens belong to has old ones again: it was restored, unless newer ones are in use.
        if verdict == Verdict::Admit && worth == Worth::Reused && !bearer.machine_id.is_empty() && !known.binds(&bearer) {
            worth = Worth::Restored;
            let unused = successor.is_some_and(TokenRow::is_unused);
            if !unused && !known.chose(&bearer) && machines::newer_in_use(&mut tx, guid).await? {
                verdict = Verdict::Contested;
            }
        }
        machines::note(&mut tx, guid, &known, &bearer, verdict).await?;
        if let Some(refusal) = machines::refusal(verdict) {
            // What was noted is kept.
            tx.commit().await?;
            return Err(refusal);
        }
    }
    let superseded = match worth {
        Worth::Revoked => return Err(refused("refresh_token_revoked", "This refresh token was withdrawn.")),
        Worth::Expired => return Err(refused("refresh_token_expired", "This refresh token has expired.")),
        Worth::Reused => {
            sqlx::query!("UPDATE refresh_tokens SET revoked_at = now() WHERE family = $1 AND revoked_at IS NULL", token.family)
                .execute(&mut *tx)
                .await?;
            let actor = Actor {
                kind: ActorKind::Device,
                id: guid_text(guid),
                name: device.hostname,
                ip: address.to_owned(),
                ..Actor::default()
            };
            let entry = audit::Entry {
                action: "device.refresh_token_reused",
                object_kind: "device",
                object_id: guid_text(guid),
                site_id: device.site_id,
                failed: true,
                detail: json!({"family": token.family}),
            };
            audit::record(&mut tx, &actor, entry).await?;
            tx.commit().await?;
            return Err(refused("refresh_token_revoked", "This refresh token was withdrawn."));
        }
        Worth::Repeated => successor.map(|next| next.id),
        Worth::Restored => {
            machines::note_restored(&mut tx, guid, &device.hostname, device.site_id, address).await?;
            // What was newer leads to what is given now.
            sqlx::query_scalar!(
                "SELECT id FROM refresh_tokens WHERE family = $1 AND rotated_at IS NULL AND revoked_at IS NULL ORDER BY expires_at DESC LIMIT 1",
                token.family
            )
            .fetch_optional(&mut *tx)
            .await?
        }
        Worth::Current => None,
    };
    if !may_connect {
        return Err(Error::new(Kind::Forbidden, "device_revoked", "This device may not connect any more."));
    }
    let access_token = Secret::new(keys.sign_access(guid, &device.fingerprint, device.token_version, device.now)?);
    // A family that has rotated once always does: who holds a copy must not be able to opt out of being noticed.
    let rotates = renewal.rotates
        || matches!(worth, Worth::Repeated | Worth::Restored)
        || sqlx::query_scalar!(
            r#"SELECT EXISTS (SELECT FROM refresh_tokens WHERE family = $1 AND rotated_at IS NOT NULL) AS "rotated!""#,
            token.family
        )
        .fetch_one(&mut *tx)
        .await?;
    let refresh_token = if rotates {
        let next = Uuid::new_v4();
        // The token, and in a repetition the successor nobody received and all that led to it, now lead to the new one.
        sqlx::query!(
            "UPDATE refresh_tokens SET rotated_at = coalesce(rotated_at, clock_timestamp()), replaced_by = $3,
                    last_used_at = CASE WHEN id = $1 THEN clock_timestamp() ELSE last_used_at END
             WHERE id = $1 OR id = $2 OR (family = $4 AND replaced_by = $2)",
            token.id,
            superseded,
            next,
            token.family,
        )
        .execute(&mut *tx)
        .await?;
        Some(insert_refresh(&mut tx, guid, next, token.family).await?)
    } else {
        sqlx::query!(
            "UPDATE refresh_tokens SET last_used_at = now(), expires_at = now() + make_interval(days => $2) WHERE id = $1",
            token.id,
            REFRESH_TTL_DAYS as i32,
        )
        .execute(&mut *tx)
        .await?;
        None
    };
    if known.chose(&bearer) {
        machines::forget_choice(&mut tx, guid).await?;
    }
    tx.commit().await?;
    Ok(Renewed { access_token, refresh_token, site_id: device.site_id })
}

/// A device recognised by its access token, as its row is now.
#[derive(Debug, Clone)]
pub struct DeviceIdentity {
    /// Its GUID.
    pub guid: Uuid,
    /// Its hostname, as stored.
    pub hostname: String,
    /// Its site; none until it is assigned.
    pub site_id: Option<i64>,
    /// `active` or `quarantined`.
    pub status: String,
    /// SHA-256 of its public key's SPKI DER, lower-case hex.
    pub fingerprint: String,
    /// The version its tokens must have.
    pub token_version: i32,
    /// Its agent id, as stored.
    pub agent_id: String,
    /// When the token expires; an open socket outlives it.
    pub token_expires_at: DateTime<Utc>,
}

/// Recognises a device by its access token: the token's signature and times, then its claims against the device's row.
///
/// # Errors
/// 401 `invalid_token`, `token_expired`; those of [`identify`].
pub async fn authenticate(pool: &db::Pool, keys: &Keys, bearer: &str) -> Result<DeviceIdentity> {
    identify(pool, &keys.verify_access(bearer)?).await
}

/// Compares the claims of a verified token with the device's row and the database's time, in one query.
///
/// # Errors
/// 401 `token_expired`, `invalid_token`, `device_purged`; 403 `fingerprint_mismatch`, `token_version_mismatch`, `device_revoked`; 404 `device_not_found`.
pub async fn identify(pool: &db::Pool, claims: &AccessClaims) -> Result<DeviceIdentity> {
    let row = sqlx::query!(
        r#"SELECT d.hostname AS "hostname?", d.site_id, d.status AS "status?", d.fingerprint AS "fingerprint?",
                  d.token_version AS "token_version?", d.agent_id AS "agent_id?", b.required_token_version AS "required?",
                  clock_timestamp() AS "now!"
           FROM (SELECT $1::uuid AS guid) AS w
           LEFT JOIN devices AS d ON d.guid = w.guid
           LEFT JOIN device_purge_barriers AS b ON b.guid = w.guid"#,
        claims.guid,
    )
    .fetch_one(pool)
    .await?;
    claims.check(row.now)?;
    let purged = || Error::new(Kind::Unauthenticated, "device_purged", "This device was removed.");
    if row.required.is_some_and(|required| claims.token_version < required) {
        return Err(purged());
    }
    let (Some(hostname), Some(status), Some(fingerprint), Some(token_version), Some(agent_id)) =
        (row.hostname, row.status, row.fingerprint, row.token_version, row.agent_id)
    else {
        return Err(if row.required.is_some() {
            purged()
        } else {
            Error::new(Kind::NotFound, "device_not_found", "There is no such device.")
        });
    };
    let forbidden = |code: &'static str, message: &str| Err(Error::new(Kind::Forbidden, code, message));
    if !bool::from(fingerprint.as_bytes().ct_eq(claims.fingerprint.as_bytes())) {
        return forbidden("fingerprint_mismatch", "The device has another key now.");
    }
    if token_version != claims.token_version {
        return forbidden("token_version_mismatch", "The device needs a new token.");
    }
    if status != "active" && status != "quarantined" {
        return forbidden("device_revoked", "This device may not connect any more.");
    }
    Ok(DeviceIdentity {
        guid: claims.guid,
        hostname,
        site_id: row.site_id,
        status,
        fingerprint,
        token_version,
        agent_id,
        token_expires_at: claims.expires_at,
    })
}

/// The path under which the agents of a site find their worker, without a slash at its end.
#[must_use]
pub fn route_path_prefix(keys: &Keys, site_id: i64) -> String {
    format!("/_borealis/site-workers/{}", keys.site_worker_guid(site_id))
}

/// Where a device's socket goes. Newer agents refuse to connect without it; the worker it names is served by every API
/// process. `public_base` is the public base URL.
#[must_use]
pub fn remote_ops_route(keys: &Keys, public_base: &str, site_id: Option<i64>) -> RemoteOpsRoute {
    let Some(site) = site_id else {
        return RemoteOpsRoute { reason: Some("device_site_unassigned".to_owned()), ..RemoteOpsRoute::default() };
    };
    let prefix = route_path_prefix(keys, site);
    let base = format!("{}{prefix}", public_base.trim_end_matches('/'));
    let socket = format!("{base}/socket.io/");
    RemoteOpsRoute {
        available: true,
        site_id,
        reason: None,
        worker_guid: Some(keys.site_worker_guid(site).to_string()),
        route_generation: Some(1),
        route_path_prefix: Some(prefix),
        urls: Some(json!({"base": base, "socket_io": socket})),
        base_url: Some(base),
        socket_url: Some(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn token() -> TokenRow {
        TokenRow {
            id: Uuid::from_u128(1),
            family: Uuid::from_u128(9),
            expires_at: at(1000),
            last_used_at: None,
            rotated_at: None,
            replaced_by: None,
            revoked_at: None,
        }
    }

    #[test]
    fn a_rotated_token_is_worth_something_only_while_its_successor_is_unused() {
        let now = at(0);
        assert_eq!(worth(&token(), None, now), Worth::Current);
        assert_eq!(worth(&TokenRow { expires_at: now, ..token() }, None, now), Worth::Expired);
        assert_eq!(worth(&TokenRow { revoked_at: Some(at(-1)), ..token() }, None, now), Worth::Revoked);

        let rotated = |ago: i64| TokenRow { rotated_at: Some(at(-ago)), ..token() };
        assert_eq!(worth(&rotated(60), Some(&token()), now), Worth::Repeated);
        assert_eq!(worth(&rotated(61), Some(&token()), now), Worth::Reused);
        assert_eq!(worth(&rotated(1), None, now), Worth::Reused);
        for used in [
            TokenRow { last_used_at: Some(at(-1)), ..token() },
            TokenRow { rotated_at: Some(at(-1)), ..token() },
            TokenRow { revoked_at: Some(at(-1)), ..token() },
        ] {
            assert_eq!(worth(&rotated(1), Some(&used), now), Worth::Reused);
        }
    }

    fn approval() -> Approval {
        Approval {
            id: Uuid::from_u128(1),
            device_guid: Some(Uuid::from_u128(2)),
            hostname_claimed: "web".into(),
            hostname_claimed_key: "web".into(),
            fingerprint: "new".into(),
            public_key: vec![],
            site_id: Some(1),
            status: "approved".into(),
            client_nonce: vec![],
            server_nonce: vec![],
            by_operator: true,
            decided_as_admin: false,
            decided_at: Some(at(0)),
            reinstate: false,
            may_reissue: false,
        }
    }

    fn device() -> Stored {
        Stored {
            guid: Uuid::from_u128(2),
            hostname: "web".into(),
            site_id: Some(1),
            status: "active".into(),
            fingerprint: "old".into(),
            token_version: 1,
        }
    }

    #[test]
    fn an_approval_binds_only_what_it_may_still_bind() {
        assert!(may_bind(&approval(), Some(&device()), None));
        assert!(!may_bind(&Approval { device_guid: None, ..approval() }, Some(&device()), None), "another device's key");

        let revoked = Stored { status: "revoked".into(), ..device() };
        assert!(!may_bind(&approval(), Some(&revoked), None));
        assert!(!may_bind(&Approval { reinstate: true, ..approval() }, Some(&revoked), None));
        assert!(!may_bind(&Approval { decided_as_admin: true, ..approval() }, Some(&revoked), None));
        assert!(may_bind(&Approval { decided_as_admin: true, reinstate: true, ..approval() }, Some(&revoked), None));

        let elsewhere = Stored { site_id: Some(2), ..device() };
        assert!(!may_bind(&approval(), Some(&elsewhere), None));
        assert!(may_bind(&Approval { decided_as_admin: true, ..approval() }, Some(&elsewhere), None));

        assert!(may_bind(&Approval { device_guid: None, ..approval() }, None, None));
        let admin = Approval { decided_as_admin: true, ..approval() };
        assert!(!may_bind(&approval(), None, Some(at(-1))), "a purged device is an administrator's to bring back");
        assert!(may_bind(&admin, None, Some(at(-1))));
        assert!(!may_bind(&admin, None, Some(at(1))), "purged since it was approved");
        assert!(!may_bind(&admin, Some(&device()), Some(at(1))));
    }

    #[test]
    fn a_refresh_says_whether_it_stores_the_next_token() {
        let parse = |body: Value| Renewal::parse(body.as_object().unwrap());
        let guid = "6F9619FF-8B86-4011-B42D-00C04FC964FF";
        assert!(!parse(json!({"guid": guid, "refresh_token": "t"})).unwrap().rotates);
        assert!(parse(json!({"guid": guid, "refresh_token": "t", "rotates": true})).unwrap().rotates);
        assert!(parse(json!({"guid": guid, "refresh_token": "t", "capabilities": {"rotates": true}})).unwrap().rotates);
        for bad in [
            json!({}),
            json!({"guid": guid}),
            json!({"guid": "x", "refresh_token": "t"}),
            json!({"guid": guid, "refresh_token": 4}),
        ] {
            assert_eq!(parse(bad).unwrap_err().code, "invalid_request");
        }
    }
}
