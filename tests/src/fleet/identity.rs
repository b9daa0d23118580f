//! Machines that are devices of an engine already.

use borealis_engine::{
    db::Pool,
    keys::{ACCESS_TOKEN_TTL_S, Keys, guid_text},
};
use borealis_protocol::keys::{self, VerifyingKey};
use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    Actor, Device,
    actor::{Enrollment, new_key},
};

/// Enrollments over REST at once.
const ENROLLING: usize = 8;
/// Devices in one statement.
const BATCH: usize = 2_000;

/// One machine: what an agent keeps on its disk.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The device.
    pub guid: Uuid,
    /// Its hostname.
    pub hostname: String,
    /// Its access token.
    pub access_token: String,
    /// When that ends.
    pub expires_at: DateTime<Utc>,
    /// Its refresh token.
    pub refresh_token: String,
    /// The engine's key for scripts.
    pub engine_key: VerifyingKey,
}

impl From<Device> for Machine {
    fn from(device: Device) -> Self {
        let text = |name: &str| device.enrolled[name].as_str().expect("the answer of an enrollment").to_owned();
        Self {
            guid: Uuid::try_parse(&device.guid).expect("a GUID"),
            access_token: text("access_token"),
            expires_at: Utc::now() + TimeDelta::seconds(device.enrolled["expires_in"].as_i64().unwrap_or(ACCESS_TOKEN_TTL_S)),
            refresh_token: device.refresh_token,
            engine_key: keys::from_spki_base64(&device.signing_key).expect("the engine's key"),
            hostname: device.hostname,
        }
    }
}

/// Enrolls machines over REST, as agents do: the site's automatic approval is switched on, and each asks with its code.
/// They are called `<prefix>-0` and so on.
///
/// # Panics
/// When the engine does not admit them.
pub async fn enroll(admin: &Actor, site: i64, prefix: &str, count: usize) -> Vec<Machine> {
    let until = (Utc::now() + TimeDelta::hours(1)).timestamp();
    let on = admin.post(&format!("/api/sites/{site}/auto-approval"), json!({"auto_approve_until": until})).await.ok();
    let code = match on["enrollment_code"].as_str() {
        Some(code) => code.to_owned(),
        None => enrollment_code(admin, site).await,
    };
    let nobody = Actor::anonymous(&admin.base);
    let enrolled = (0..count).map(|number| {
        let (nobody, code, hostname) = (nobody.clone(), code.clone(), format!("{prefix}-{number}"));
        async move { Machine::from(Enrollment::request(&nobody, &hostname, &code, new_key()).await.finish(site).await) }
    });
    stream::iter(enrolled).buffered(ENROLLING).collect().await
}

/// The code a machine asks with for admission to a site.
///
/// # Panics
/// When the site has none.
pub async fn enrollment_code(admin: &Actor, site: i64) -> String {
    let found = admin.get("/api/sites").await.ok();
    let code = found["sites"].as_array().into_iter().flatten().find(|one| one["id"] == site);
    code.and_then(|site| site["enrollment_code"].as_str())
        .unwrap_or_else(|| panic!("no code of site {site} in {found}"))
        .to_owned()
}

/// Writes machines into the tables as if they had been enrolled: each with a key of its own, an access token signed by the
/// engine's keys and a refresh token. Enrolling ten thousand over REST takes minutes and is not what is shown.
///
/// # Panics
/// When the database refuses.
pub async fn write(pool: &Pool, engine: &Keys, site: i64, prefix: &str, count: usize) -> Vec<Machine> {
    let engine_key = keys::from_spki_base64(&engine.script_public_spki_base64()).expect("the engine's key");
    let mut machines = Vec::with_capacity(count);
    for start in (0..count).step_by(BATCH) {
        let (mut guids, mut hostnames, mut agents, mut fingerprints, mut publics, mut hashes) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for number in start..(start + BATCH).min(count) {
            let (guid, hostname) = (Uuid::new_v4(), format!("{prefix}-{number}"));
            let public = new_key().verifying_key();
            let fingerprint = keys::fingerprint(&public);
            let refresh_token = keys::to_base64(&rand::random::<[u8; 48]>()).replace(['+', '/', '='], "x");
            let now = Utc::now();
            guids.push(guid);
            agents.push(borealis_protocol::agent_id(&hostname, &guid_text(guid), borealis_protocol::CONTEXT_SYSTEM));
            hostnames.push(hostname.clone());
            publics.push(keys::spki_der(&public).to_vec());
            hashes.push(Sha256::digest(refresh_token.as_bytes()).to_vec());
            machines.push(Machine {
                guid,
                hostname,
                access_token: engine.sign_access(guid, &fingerprint, 1, now).expect("a token"),
                expires_at: now + TimeDelta::seconds(ACCESS_TOKEN_TTL_S),
                refresh_token,
                engine_key,
            });
            fingerprints.push(fingerprint);
        }
        sqlx::query(
            "WITH machine AS (
                 SELECT * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::bytea[])
                          AS m (guid, hostname, agent_id, fingerprint, public_key, token_hash)),
             device AS (
                 INSERT INTO devices (guid, hostname, hostname_key, site_id, agent_id, fingerprint, public_key)
                 SELECT guid, hostname, lower(hostname), $1, agent_id, fingerprint, public_key FROM machine RETURNING guid, fingerprint),
             key AS (INSERT INTO device_keys (device_guid, fingerprint) SELECT guid, fingerprint FROM device)
             INSERT INTO refresh_tokens (id, device_guid, family, token_hash, expires_at)
             SELECT gen_random_uuid(), m.guid, gen_random_uuid(), m.token_hash, now() + interval '90 days'
             FROM machine m JOIN device d ON d.guid = m.guid",
        )
        .bind(site)
        .bind(&guids)
        .bind(&hostnames)
        .bind(&agents)
        .bind(&fingerprints)
        .bind(&publics)
        .bind(&hashes)
        .execute(pool)
        .await
        .expect("the machines are written");
    }
    machines
}

/// What an inventory report of a simulated machine says: as much as a small server's.
#[must_use]
pub fn inventory(hostname: &str) -> Value {
    let software: Vec<Value> =
        (0..120).map(|number| json!({"name": format!("package-{number}"), "version": format!("1.{number}.0")})).collect();
    json!({
        "hostname": hostname,
        "details": {
            "summary": {"hostname": hostname, "operating_system": "Debian GNU/Linux 12", "device_type": "Server",
                        "internal_ip": "10.0.0.7", "uptime_sec": 86_400},
            "memory": [{"slot": "0", "capacity": 17_179_869_184_i64}],
            "network": [{"adapter": "eth0", "ips": ["10.0.0.7"], "mac": "02:00:00:00:00:07"}],
            "software": software,
            "storage": [{"drive": "/", "total": 107_374_182_400_i64, "free": 53_687_091_200_i64}],
            "cpu": {"name": "x86_64", "cores": 8},
        },
    })
}
