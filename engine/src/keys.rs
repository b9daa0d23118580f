//! Keys on disk: the engine secret, the keys of agent access tokens and the script-signing key.
//!
//! They are files in the secrets folder, mode 0600, made once and then shared by every process of this engine (on several
//! hosts: copied there). They are not sealed under Aegis, so agents keep working while the engine is locked.
//!
//! | file | holds |
//! |---|---|
//! | the engine secret's, by setting | 64 random bytes as base64url text; internal requests are signed with a sub-key of it |
//! | `agent-token.pem` | the Ed25519 key new access tokens are signed with (PKCS#8) |
//! | `agent-token-*.pem` | further keys whose tokens are accepted |
//! | `script-signing.pem` | the Ed25519 key scripts are signed with (PKCS#8) |
//! | `script-signing.successions.json` | how it came to its place, once it has been rotated; nothing in it is secret |
//!
//! They are rotated while everything runs ([`rotation`]): running processes read them again every two seconds.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use borealis_protocol::succession::Succession;
use chrono::{DateTime, Utc};
use ed25519_dalek::{
    Signer, SigningKey, VerifyingKey,
    pkcs8::{EncodePrivateKey, EncodePublicKey},
};
use hkdf::Hkdf;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    error::{Error, Kind, Result},
    internal::Keyring,
    secret::Secret,
    state_dir,
};

mod eddsa;
mod files;
pub mod rotation;

use files::{read, read_or_create, read_signing_key, signing_key, unusable};

/// How long an access token lives, in seconds.
pub const ACCESS_TOKEN_TTL_S: i64 = 900;
/// How far the clocks of two engine hosts may differ, in seconds.
pub const LEEWAY_S: u64 = 60;

/// What an agent's access token is for; no other token of this engine says so.
const TOKEN_TYPE: &str = "agent-access";
const AUDIENCE: &str = "borealis-engine";
const MAX_TOKEN_CHARS: usize = 4096;
const ENGINE_SECRET_BYTES: usize = 64;
const MIN_ENGINE_SECRET_CHARS: usize = 32;
const TOKEN_KEY: &str = "agent-token";
const SCRIPT_KEY: &str = "script-signing";
/// How long the tokens of the key before the present one are accepted after a rotation: longer than they live.
const PREVIOUS_TOKEN_KEY_FOR: Duration = Duration::from_secs(1200);
/// Some thousands of rotations.
const SUCCESSIONS_MAX_BYTES: u64 = 1024 * 1024;
/// Of what API processes share and workers do not have.
const HANDOVER_INFO: &[u8] = b"borealis-aegis-handover-psk-v1";

/// The keys an engine process works with. Cheap to clone; clones share what is read again. Shows nothing of itself.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    secrets_dir: PathBuf,
    engine_secret_file: PathBuf,
    rotating: RwLock<Arc<Rotating>>,
}

/// What a rotation changes.
struct Rotating {
    keyring: Arc<Keyring>,
    token_kid: String,
    token_signer: EncodingKey,
    /// By `kid`. Every key whose tokens are accepted.
    token_verifiers: BTreeMap<String, DecodingKey>,
    script: SigningKey,
    script_spki: String,
    successions: Successions,
    /// A digest of all of it, to notice a change by.
    digest: [u8; 32],
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}

/// Whom an access token speaks for, as far as the token alone can say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessClaims {
    /// The device.
    pub guid: Uuid,
    /// SHA-256 of its public key's SPKI DER, lower-case hex.
    pub fingerprint: String,
    /// Must equal the device row's.
    pub token_version: i32,
    /// Until when the token is refused, leeway apart.
    pub not_before: DateTime<Utc>,
    /// From when on the token is refused, leeway apart.
    pub expires_at: DateTime<Utc>,
}

impl AccessClaims {
    /// Whether the token is good at `now`, the leeway of [`LEEWAY_S`] included.
    ///
    /// # Errors
    /// 401 `token_expired`, or `invalid_token` before its time.
    pub fn check(&self, now: DateTime<Utc>) -> Result<()> {
        let leeway = chrono::TimeDelta::seconds(i64::try_from(LEEWAY_S).unwrap_or(0));
        if self.expires_at + leeway < now {
            return Err(Error::new(Kind::Unauthenticated, "token_expired", "The access token has expired."));
        }
        if self.not_before - leeway > now {
            return Err(Error::new(Kind::Unauthenticated, "invalid_token", "The access token is not valid yet."));
        }
        Ok(())
    }
}

/// The claims on the wire.
#[derive(Serialize, Deserialize)]
struct Claims {
    #[serde(default)]
    typ: String,
    #[serde(default)]
    aud: String,
    #[serde(default)]
    sub: String,
    #[serde(default)]
    guid: String,
    #[serde(default)]
    ssl_key_fingerprint: String,
    #[serde(default)]
    token_version: i64,
    iat: i64,
    nbf: i64,
    exp: i64,
}

impl Keys {
    /// Reads the keys of `secrets_dir`, making those that are missing. Processes that start together agree: a file appears
    /// complete or not at all, and the first one stays.
    ///
    /// `engine_secret_file` is where the engine secret lies; by default `engine.secret` in the folder.
    ///
    /// # Errors
    /// `invalid_key_file` when a file cannot be read, made or understood, or others than its owner may read it.
    pub fn load_or_create(secrets_dir: &Path, engine_secret_file: Option<&Path>) -> Result<Self> {
        state_dir::own(secrets_dir)?;
        let engine_secret_file = engine_secret_file.map_or_else(|| secrets_dir.join("engine.secret"), Path::to_path_buf);
        engine_secret(&engine_secret_file)?;
        signing_key(&secrets_dir.join(format!("{TOKEN_KEY}.pem")))?;
        signing_key(&secrets_dir.join(format!("{SCRIPT_KEY}.pem")))?;
        let rotating = Rotating::read(secrets_dir, &engine_secret_file)?;
        Ok(Self(Arc::new(Inner {
            secrets_dir: secrets_dir.to_owned(),
            engine_secret_file,
            rotating: RwLock::new(Arc::new(rotating)),
        })))
    }

    /// Reads again what a rotation changes. Whether something is other than before.
    ///
    /// # Errors
    /// `invalid_key_file`; then what was read before still counts.
    pub fn read_again(&self) -> Result<bool> {
        let new = Rotating::read(&self.0.secrets_dir, &self.0.engine_secret_file)?;
        let changed = new.digest != self.rotating().digest;
        if changed {
            *self.0.rotating.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        }
        Ok(changed)
    }

    fn rotating(&self) -> Arc<Rotating> {
        self.0.rotating.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The keys that requests of workers are signed with.
    #[must_use]
    pub fn keyring(&self) -> Arc<Keyring> {
        self.rotating().keyring.clone()
    }

    /// A key that the API processes of this engine share and nobody else has: a sub-key of the script-signing key.
    #[must_use]
    pub fn handover_key(&self) -> Secret<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        // 32 bytes are within HKDF-SHA256's 8160, so this cannot fail.
        let derived = Hkdf::<Sha256>::new(None, self.rotating().script.as_bytes()).expand(HANDOVER_INFO, key.as_mut());
        debug_assert!(derived.is_ok());
        Secret::new(*key)
    }

    /// The key scripts are signed with at this moment.
    #[must_use]
    pub fn script_key(&self) -> ScriptKey {
        ScriptKey(self.rotating())
    }

    /// Its public half: SPKI DER in standard base64, what agents call `signing_key`.
    #[must_use]
    pub fn script_public_spki_base64(&self) -> String {
        self.rotating().script_spki.clone()
    }

    /// The guid under which a site's agents find their worker: the same in every process and after every restart.
    /// Nothing is secret about it.
    #[must_use]
    pub fn site_worker_guid(&self, site_id: i64) -> Uuid {
        let now = self.rotating();
        // The first of all script keys, so that a rotation changes nothing.
        let first = now.successions.first.as_deref().unwrap_or(&now.script_spki);
        let digest = Sha256::digest(format!("borealis-site-worker-v2:{first}:{site_id}"));
        let mut bytes = [0; 16];
        for (byte, hashed) in bytes.iter_mut().zip(digest) {
            *byte = hashed;
        }
        uuid::Builder::from_custom_bytes(bytes).into_uuid()
    }

    /// An access token for a device, valid from `now` on for [`ACCESS_TOKEN_TTL_S`].
    ///
    /// # Errors
    /// 500 `token_issue_failed`.
    pub fn sign_access(&self, guid: Uuid, fingerprint: &str, token_version: i32, now: DateTime<Utc>) -> Result<String> {
        let guid = guid_text(guid);
        let iat = now.timestamp();
        let claims = Claims {
            typ: TOKEN_TYPE.to_owned(),
            aud: AUDIENCE.to_owned(),
            sub: format!("device:{guid}"),
            guid,
            ssl_key_fingerprint: fingerprint.to_owned(),
            token_version: token_version.into(),
            iat,
            nbf: iat,
            exp: iat + ACCESS_TOKEN_TTL_S,
        };
        let now = self.rotating();
        let header = Header { kid: Some(now.token_kid.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, &claims, &now.token_signer).map_err(|error| {
            let mut failed = Error::new(Kind::Bug, "token_issue_failed", "The access token could not be made.");
            failed.source = Some(Box::new(error));
            failed
        })
    }

    /// Reads an access token. One algorithm, one type, one audience, a key of ours by `kid`. Whether it is the token's time is asked
    /// with [`AccessClaims::check`] and the time of the database: the clock of this process may be wrong.
    ///
    /// # Errors
    /// 401 `invalid_token` or `invalid_claims`.
    pub fn verify_access(&self, token: &str) -> Result<AccessClaims> {
        let invalid = || Error::new(Kind::Unauthenticated, "invalid_token", "The access token is not valid.");
        if token.len() > MAX_TOKEN_CHARS {
            return Err(invalid());
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| invalid())?;
        // Keys come from our folder only; a header that brings or names another is not one of ours.
        if header.alg != Algorithm::EdDSA || header.jwk.is_some() || header.jku.is_some() || header.x5u.is_some() {
            return Err(invalid());
        }
        let now = self.rotating();
        let key = header.kid.as_deref().and_then(|kid| now.token_verifiers.get(kid)).ok_or_else(invalid)?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "sub"]);
        let claims = jsonwebtoken::decode::<Claims>(token, key, &validation).map_err(|_| invalid())?.claims;
        if claims.typ != TOKEN_TYPE {
            return Err(invalid());
        }
        let wrong = || Error::new(Kind::Unauthenticated, "invalid_claims", "The access token names no device.");
        let guid = parse_guid(&claims.guid).ok_or_else(wrong)?;
        let token_version = i32::try_from(claims.token_version).ok().filter(|version| *version >= 1).ok_or_else(wrong)?;
        if claims.ssl_key_fingerprint.is_empty() || claims.sub != format!("device:{}", guid_text(guid)) {
            return Err(wrong());
        }
        Ok(AccessClaims {
            guid,
            fingerprint: claims.ssl_key_fingerprint,
            token_version,
            not_before: DateTime::from_timestamp(claims.nbf, 0).ok_or_else(wrong)?,
            expires_at: DateTime::from_timestamp(claims.exp, 0).ok_or_else(wrong)?,
        })
    }
}

/// The script key at one moment: what is signed together is signed by one key.
#[derive(Clone)]
pub struct ScriptKey(Arc<Rotating>);

impl std::fmt::Debug for ScriptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ScriptKey")
    }
}

impl ScriptKey {
    /// The Ed25519 signature over `script`, in standard base64.
    #[must_use]
    pub fn sign(&self, script: &[u8]) -> String {
        STANDARD.encode(self.0.script.sign(script).to_bytes())
    }

    /// Its public half: SPKI DER in standard base64, what agents call `signing_key`.
    #[must_use]
    pub fn spki_base64(&self) -> &str {
        &self.0.script_spki
    }

    /// How it came to its place, from the first key; empty while it is the first.
    #[must_use]
    pub fn successions(&self) -> &[Succession] {
        &self.0.successions.successions
    }
}

/// `script-signing.successions.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Successions {
    /// The first of all keys, base64 SPKI.
    first: Option<String>,
    /// All that followed, each signed by the one before.
    successions: Vec<Succession>,
}

impl Successions {
    fn path(secrets_dir: &Path) -> PathBuf {
        secrets_dir.join(format!("{SCRIPT_KEY}.successions.json"))
    }

    fn read(secrets_dir: &Path) -> Result<Self> {
        let path = Self::path(secrets_dir);
        let Some(text) = when_there(files::read_bounded(&path, SUCCESSIONS_MAX_BYTES), &path)? else {
            return Ok(Self::default());
        };
        serde_json::from_str(&text).map_err(|error| unusable(&path, &error))
    }
}

impl Rotating {
    /// All of it as it was at one moment: files are renamed while we read.
    fn read(secrets_dir: &Path, engine_secret_file: &Path) -> Result<Self> {
        let mut last = Self::read_once(secrets_dir, engine_secret_file)?;
        loop {
            let again = Self::read_once(secrets_dir, engine_secret_file)?;
            if again.digest == last.digest {
                return Ok(again);
            }
            last = again;
        }
    }

    fn read_once(secrets_dir: &Path, engine_secret_file: &Path) -> Result<Self> {
        let current = read_signing_key(&secrets_dir.join(format!("{TOKEN_KEY}.pem")))?;
        let mut token_verifiers = BTreeMap::from([verifier(&current.verifying_key())?]);
        let others = fs::read_dir(secrets_dir).map_err(|error| unusable(secrets_dir, &error))?;
        for entry in others {
            let path = entry.map_err(|error| unusable(secrets_dir, &error))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let previous = name == format!("{TOKEN_KEY}-previous.pem");
            if !name.starts_with(&format!("{TOKEN_KEY}-")) || !name.ends_with(".pem") || previous && outlived(&path) {
                continue;
            }
            // One that was there a moment ago.
            if let Some((kid, key)) =
                when_there(read_signing_key(&path), &path)?.map(|key| verifier(&key.verifying_key())).transpose()?
            {
                token_verifiers.insert(kid, key);
            }
        }
        let secret = |role: rotation::Role| {
            let path = role.of_secret(engine_secret_file);
            when_there(read_engine_secret(&path), &path)
        };
        let current_secret = read_engine_secret(engine_secret_file)?;
        let (next, previous) = (secret(rotation::Role::Next)?, secret(rotation::Role::Previous)?);
        let text = |secret: &Option<Secret<String>>| secret.as_ref().map(|secret| Zeroizing::new(secret.expose().clone()));
        let (next, previous) = (text(&next), text(&previous));
        let token_kid = kid(&spki(&current.verifying_key())?);
        eddsa::install();
        let script = read_signing_key(&secrets_dir.join(format!("{SCRIPT_KEY}.pem")))?;
        let script_spki = STANDARD.encode(spki(&script.verifying_key())?);
        let successions = Successions::read(secrets_dir)?;
        let known = serde_json::to_string(&successions)?;
        let mut digest = Sha256::new();
        let secrets = [Some(current_secret.expose()), next.as_deref(), previous.as_deref()];
        for part in secrets.into_iter().flatten().chain([&token_kid, &script_spki, &known]).chain(token_verifiers.keys()) {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        Ok(Self {
            keyring: Arc::new(Keyring::new(
                current_secret.expose(),
                next.as_deref().map(String::as_str),
                previous.as_deref().map(String::as_str),
            )),
            token_kid,
            token_signer: EncodingKey::from_ed_der(current.to_pkcs8_der().map_err(Error::bug)?.as_bytes()),
            token_verifiers,
            script,
            script_spki,
            successions,
            digest: digest.finalize().into(),
        })
    }
}

/// Whether this is a key before the present one, and nobody can hold a token of it any more.
fn outlived(previous: &Path) -> bool {
    let since = fs::metadata(previous).and_then(|metadata| metadata.modified());
    // One of the future is of a clock that was put right.
    since.is_ok_and(|since| SystemTime::now().duration_since(since).is_ok_and(|age| age > PREVIOUS_TOKEN_KEY_FOR))
}

/// What was read of a file that need not be there.
fn when_there<T>(read: Result<T>, path: &Path) -> Result<Option<T>> {
    match read {
        Err(_) if matches!(path.try_exists(), Ok(false)) => Ok(None),
        read => read.map(Some),
    }
}

/// Reads the engine secret at `path`, making it when there is none.
///
/// # Errors
/// `invalid_key_file`.
pub fn engine_secret(path: &Path) -> Result<Secret<String>> {
    read_or_create(path, new_engine_secret)?;
    read_engine_secret(path)
}

/// Reads the engine secret at `path`: what a worker needs, and none of the other keys.
///
/// # Errors
/// `invalid_key_file` when it cannot be read, is too short, or others than its owner may read it.
pub fn read_engine_secret(path: &Path) -> Result<Secret<String>> {
    let text = read(path)?;
    let text = text.trim();
    if text.len() < MIN_ENGINE_SECRET_CHARS {
        return Err(unusable(path, &format!("it is shorter than {MIN_ENGINE_SECRET_CHARS} characters")));
    }
    Ok(Secret::new(text.to_owned()))
}

/// Reads a token that somebody has put into a file: one line.
///
/// # Errors
/// `invalid_key_file` when it cannot be read, is empty, or others than its owner may read it.
pub fn read_token(path: &Path) -> Result<Secret<String>> {
    let text = read(path)?;
    let text = text.trim();
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(unusable(path, &"it is not one line with a token"));
    }
    Ok(Secret::new(text.to_owned()))
}

fn new_engine_secret() -> Result<Zeroizing<String>> {
    let bytes = Zeroizing::new(rand::random::<[u8; ENGINE_SECRET_BYTES]>());
    Ok(Zeroizing::new(URL_SAFE_NO_PAD.encode(bytes.as_slice())))
}

/// A device GUID as it is written outside: upper case, without braces.
#[must_use]
pub fn guid_text(guid: Uuid) -> String {
    guid.hyphenated().encode_upper(&mut Uuid::encode_buffer()).to_owned()
}

/// Reads a device GUID in any case, with or without braces. Other spellings of a UUID are not accepted.
#[must_use]
pub fn parse_guid(text: &str) -> Option<Uuid> {
    let text = text.trim();
    let bare = text.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')).unwrap_or(text);
    if bare.len() != 36 {
        return None;
    }
    Uuid::try_parse(bare).ok().filter(|guid| !guid.is_nil())
}

/// The fingerprint of a public key: SHA-256 of its SPKI DER, lower-case hex.
#[must_use]
pub fn fingerprint(spki_der: &[u8]) -> String {
    hex::encode(Sha256::digest(spki_der))
}

fn kid(spki_der: &[u8]) -> String {
    fingerprint(spki_der).chars().take(16).collect()
}

fn spki(key: &VerifyingKey) -> Result<Vec<u8>> {
    Ok(key.to_public_key_der().map_err(Error::bug)?.into_vec())
}

fn verifier(key: &VerifyingKey) -> Result<(String, DecodingKey)> {
    // jsonwebtoken takes the 32 raw bytes here, whatever the name says.
    Ok((kid(&spki(key)?), DecodingKey::from_ed_der(key.as_bytes())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use hmac::{Hmac, KeyInit as _, Mac as _};

    use super::*;

    fn keys() -> (tempfile::TempDir, Keys) {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::load_or_create(&dir.path().join("secrets"), None).unwrap();
        (dir, keys)
    }

    fn code(result: Result<AccessClaims>) -> &'static str {
        result.unwrap_err().code
    }

    /// A token of any header and claims, signed with the engine's own token key unless told otherwise.
    fn forge(
        keys: &Keys,
        header: &serde_json::Value,
        claims: &serde_json::Value,
        key: Option<&SigningKey>,
        dir: &Path,
    ) -> String {
        let own = read_signing_key(&dir.join("secrets/agent-token.pem")).unwrap();
        let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(serde_json::to_vec(value).unwrap());
        let mut header = header.clone();
        if header.get("kid").is_none() {
            header["kid"] = keys.rotating().token_kid.clone().into();
        }
        let message = format!("{}.{}", part(&header), part(claims));
        let signature = key.unwrap_or(&own).sign(message.as_bytes());
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
    }

    fn claims(now: i64) -> serde_json::Value {
        serde_json::json!({
            "typ": "agent-access", "aud": "borealis-engine", "sub": "device:6F9619FF-8B86-4011-B42D-00C04FC964FF",
            "guid": "6F9619FF-8B86-4011-B42D-00C04FC964FF", "ssl_key_fingerprint": "ab", "token_version": 1,
            "iat": now, "nbf": now, "exp": now + 900,
        })
    }

    #[test]
    fn a_token_says_what_was_signed() {
        let (_dir, keys) = keys();
        let guid = Uuid::new_v4();
        let token = keys.sign_access(guid, "ab12", 3, Utc::now()).unwrap();
        let read = keys.verify_access(&token).unwrap();
        assert_eq!((read.guid, read.fingerprint.as_str(), read.token_version), (guid, "ab12", 3));
    }

    #[test]
    fn only_our_own_unexpired_access_tokens_pass() {
        let (dir, keys) = keys();
        let now = Utc::now().timestamp();
        let eddsa = serde_json::json!({"alg": "EdDSA", "typ": "JWT"});
        let forge = |header: &serde_json::Value, claims: &serde_json::Value, key: Option<&SigningKey>| {
            forge(&keys, header, claims, key, dir.path())
        };
        let verify = |token: &str| {
            let claims = keys.verify_access(token)?;
            claims.check(DateTime::from_timestamp(now, 0).unwrap())?;
            Ok(claims)
        };
        let good = claims(now);
        assert!(verify(&forge(&eddsa, &good, None)).is_ok(), "the forgery itself must be able to pass");

        let with = |name: &str, value: serde_json::Value| {
            let mut changed = good.clone();
            changed[name] = value;
            changed
        };
        let without = |name: &str| {
            let mut changed = good.clone();
            changed.as_object_mut().unwrap().remove(name);
            changed
        };
        // The leeway is 60 s on both ends.
        assert!(verify(&forge(&eddsa, &with("exp", (now - 50).into()), None)).is_ok());
        assert_eq!(code(verify(&forge(&eddsa, &with("exp", (now - 70).into()), None))), "token_expired");
        assert!(verify(&forge(&eddsa, &with("nbf", (now + 50).into()), None)).is_ok());
        assert_eq!(code(verify(&forge(&eddsa, &with("nbf", (now + 70).into()), None))), "invalid_token");

        for (bad, expected) in [
            (with("typ", "remote-op-session".into()), "invalid_token"),
            (without("typ"), "invalid_token"),
            (with("aud", "borealis-site-worker".into()), "invalid_token"),
            (without("aud"), "invalid_token"),
            (without("exp"), "invalid_token"),
            (without("nbf"), "invalid_token"),
            (with("guid", "".into()), "invalid_claims"),
            (with("guid", Uuid::new_v4().to_string().into()), "invalid_claims"),
            (with("token_version", 0.into()), "invalid_claims"),
            (with("ssl_key_fingerprint", "".into()), "invalid_claims"),
        ] {
            assert_eq!(code(verify(&forge(&eddsa, &bad, None))), expected, "{bad}");
        }

        let stranger = SigningKey::from_bytes(&[7; 32]);
        assert_eq!(code(verify(&forge(&eddsa, &good, Some(&stranger)))), "invalid_token");
        for header in [
            serde_json::json!({"alg": "none", "typ": "JWT"}),
            serde_json::json!({"alg": "HS256", "typ": "JWT"}),
            serde_json::json!({"alg": "ES256", "typ": "JWT"}),
            serde_json::json!({"alg": "EdDSA", "kid": "0123456789abcdef"}),
            serde_json::json!({"alg": "EdDSA", "jku": "https://example.net/keys"}),
            serde_json::json!({"alg": "EdDSA", "x5u": "https://example.net/cert"}),
        ] {
            assert_eq!(code(verify(&forge(&header, &good, None))), "invalid_token", "{header}");
        }

        // HMAC with the public key as its secret: the classic confusion.
        let own = read_signing_key(&dir.path().join("secrets/agent-token.pem")).unwrap();
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(keys.rotating().token_kid.clone());
        for secret in [own.verifying_key().as_bytes().to_vec(), spki(&own.verifying_key()).unwrap()] {
            let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
            let message = format!("{}.{}", part(&serde_json::to_value(&header).unwrap()), part(&good));
            let mut mac = Hmac::<Sha256>::new_from_slice(&secret).unwrap();
            mac.update(message.as_bytes());
            let confused = format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
            assert_eq!(code(verify(&confused)), "invalid_token");
        }

        let token = forge(&eddsa, &good, None);
        let (message, _) = token.rsplit_once('.').unwrap();
        for broken in ["", ".", "..", "a.b.c", message, &format!("{message}."), &format!("{token}x"), &"a".repeat(10_000)] {
            assert_eq!(code(verify(broken)), "invalid_token");
        }
    }

    #[test]
    fn a_rotated_key_is_accepted_until_its_file_is_gone() {
        let (dir, keys) = keys();
        let secrets = dir.path().join("secrets");
        let old = keys.sign_access(Uuid::new_v4(), "ab", 1, Utc::now()).unwrap();
        fs::rename(secrets.join("agent-token.pem"), secrets.join("agent-token-old.pem")).unwrap();
        let rotated = Keys::load_or_create(&secrets, None).unwrap();
        assert_ne!(rotated.rotating().token_kid, keys.rotating().token_kid);
        assert!(rotated.verify_access(&old).is_ok());
        let new = rotated.sign_access(Uuid::new_v4(), "ab", 1, Utc::now()).unwrap();
        assert_eq!(code(keys.verify_access(&new)), "invalid_token");
        fs::remove_file(secrets.join("agent-token-old.pem")).unwrap();
        assert_eq!(code(Keys::load_or_create(&secrets, None).unwrap().verify_access(&old)), "invalid_token");
    }

    #[test]
    fn processes_starting_together_agree() {
        let dir = tempfile::tempdir().unwrap();
        let secrets = dir.path().join("secrets");
        let all: Vec<Keys> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..8).map(|_| scope.spawn(|| Keys::load_or_create(&secrets, None).unwrap())).collect();
            started.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for keys in &all {
            assert_eq!(keys.rotating().digest, all[0].rotating().digest);
            assert_eq!(keys.rotating().token_kid, all[0].rotating().token_kid);
            assert_eq!(keys.script_public_spki_base64(), all[0].script_public_spki_base64());
            assert_eq!(keys.site_worker_guid(7), all[0].site_worker_guid(7));
        }
        assert_ne!(all[0].site_worker_guid(7), all[0].site_worker_guid(8));
        let mut names: Vec<String> =
            fs::read_dir(&secrets).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["agent-token.pem", "engine.secret", "script-signing.pem"]);
        for name in names {
            assert_eq!(fs::metadata(secrets.join(name)).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn files_others_may_read_or_that_hold_no_key_are_refused() {
        let (dir, _keys) = keys();
        let secrets = dir.path().join("secrets");
        let path = secrets.join("script-signing.pem");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = Keys::load_or_create(&secrets, None).unwrap_err();
        assert_eq!(refused.code, "invalid_key_file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Keys::load_or_create(&secrets, None).is_ok());
        fs::write(&path, "nothing").unwrap();
        assert_eq!(Keys::load_or_create(&secrets, None).unwrap_err().code, "invalid_key_file");
    }

    #[test]
    fn scripts_verify_under_the_announced_key() {
        use ed25519_dalek::pkcs8::DecodePublicKey;
        let (_dir, keys) = keys();
        let public = VerifyingKey::from_public_key_der(&STANDARD.decode(keys.script_public_spki_base64()).unwrap()).unwrap();
        let signature: [u8; 64] = STANDARD.decode(keys.script_key().sign(b"uptime")).unwrap().try_into().unwrap();
        let signature = ed25519_dalek::Signature::from_bytes(&signature);
        assert!(public.verify_strict(b"uptime", &signature).is_ok());
        assert!(public.verify_strict(b"uptime ", &signature).is_err());
    }

    #[test]
    fn guids_have_one_form() {
        let guid = parse_guid(" {6f9619ff-8b86-d011-b42d-00c04fc964ff} ").unwrap();
        assert_eq!(guid_text(guid), "6F9619FF-8B86-D011-B42D-00C04FC964FF");
        for bad in ["", "{}", "6f9619ff8b86d011b42d00c04fc964ff", "urn:uuid:6f9619ff-8b86-d011-b42d-00c04fc964ff", "x"] {
            assert_eq!(parse_guid(bad), None, "{bad}");
        }
        assert_eq!(parse_guid("00000000-0000-0000-0000-000000000000"), None);
    }

    #[test]
    fn nothing_of_a_key_is_shown() {
        let (_dir, keys) = keys();
        assert_eq!(format!("{keys:?}"), "Keys");
    }
}
