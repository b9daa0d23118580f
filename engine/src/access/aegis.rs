//! The Aegis key: everything sealed in the database is sealed under it.
//!
//! A random 32-byte data key is made once. It is stored wrapped by a key derived from the operator's passphrase (the
//! *cipher*), and, when the engine may unseal itself, a second time wrapped by the key in the unseal file. Each column
//! has its own sub-key, and every envelope is bound to its row, so a sealed value moved elsewhere does not open.

use std::{
    fmt::Display,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use aes_gcm::{
    Aes256Gcm,
    aead::{Aead, KeyInit, Payload},
};
use argon2::{Algorithm, Argon2, Params, Version};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;
use unicode_normalization::UnicodeNormalization;
use zeroize::Zeroizing;

use crate::{
    audit, db,
    error::{Error, Kind, Result},
    scope::Actor,
    secret::Secret,
};

/// The columns sealed under Aegis: what rotation, reset and the status answer walk.
pub const PROTECTED: [&str; 11] = [
    "users.password",
    "users.mfa_secret",
    "auth_challenges.state",
    "credentials.password",
    "credentials.private_key",
    "credentials.private_key_passphrase",
    "credentials.become_password",
    "passkeys.credential",
    "directory_providers.bind_password",
    "directory_providers.kerberos_keytab",
    "github_token.token",
];

/// The fewest characters of a cipher.
pub const CIPHER_MIN_CHARS: usize = 12;
/// The most bytes of a cipher.
pub const CIPHER_MAX_BYTES: usize = 1024;

const ENVELOPE: &str = "aegis:v2:";
const NONCE_BYTES: usize = 12;
const KEY_BYTES: usize = 32;

/// How many Argon2 computations run at the same time in this process.
const HASHERS: usize = 2;
/// How long a computation waits for its turn.
const HASHER_WAIT: Duration = Duration::from_secs(10);
static HASHING: Semaphore = Semaphore::const_new(HASHERS);

type Key = Secret<[u8; KEY_BYTES]>;

/// Runs memory-hard work off the async threads, a few at a time, so that parallel sign-ins do not take the machine.
///
/// # Errors
/// 503 `busy` when no turn came within ten seconds.
pub(crate) async fn hashing<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let turn = tokio::time::timeout(HASHER_WAIT, HASHING.acquire())
        .await
        .map_err(|_| Error::new(Kind::Unavailable, "busy", "Too many sign-ins at the same time; try again.").retry_after(2))?
        .map_err(Error::bug)?;
    // The permit goes with the work: a client that hangs up must not free the turn of a computation still running.
    tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    })
    .await
    .map_err(Error::bug)
}

/// How the passphrase becomes a key; stored beside the wrapped key.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kdf {
    name: String,
    salt_b64: String,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl Kdf {
    fn fresh() -> Self {
        Self {
            name: "argon2id".to_owned(),
            salt_b64: STANDARD.encode(rand::random::<[u8; 16]>()),
            memory_kib: 64 * 1024,
            passes: 3,
            lanes: 1,
        }
    }

    fn derive(&self, cipher: &str) -> Result<Key> {
        // Bounds, so that a damaged row cannot ask for all memory.
        if self.name != "argon2id" || self.memory_kib > 1024 * 1024 || self.passes > 64 {
            return Err(corrupt());
        }
        let salt = STANDARD.decode(&self.salt_b64).map_err(|_| corrupt())?;
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(KEY_BYTES)).map_err(|_| corrupt())?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(cipher.as_bytes(), &salt, key.as_mut())
            .map_err(|error| Error::bug(error.to_string()))?;
        Ok(Secret::new(*key))
    }
}

fn corrupt() -> Error {
    let mut error = Error::new(Kind::Bug, "corrupt_secret_store", "A stored secret cannot be read.");
    error.source = Some("a sealed value does not open".into());
    error
}

fn locked() -> Error {
    Error::new(Kind::Locked, "aegis_locked", "The secret store is locked; unlock it first.")
}

fn encrypt(key: &[u8; KEY_BYTES], aad: &str, plain: &[u8]) -> Result<Vec<u8>> {
    let nonce: [u8; NONCE_BYTES] = rand::random();
    let sealed = Aes256Gcm::new(key.into())
        .encrypt(&nonce.into(), Payload { msg: plain, aad: aad.as_bytes() })
        .map_err(|_| Error::bug("sealing failed"))?;
    Ok([&nonce[..], &sealed].concat())
}

fn decrypt(key: &[u8; KEY_BYTES], aad: &str, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    Aes256Gcm::new(key.into()).decrypt(nonce.into(), Payload { msg: sealed, aad: aad.as_bytes() }).ok().map(Zeroizing::new)
}

fn sub_key(data_key: &Key, purpose: &str) -> Result<Key> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    hkdf::Hkdf::<Sha256>::new(None, data_key.expose())
        .expand(format!("borealis-aegis-v2 {purpose}").as_bytes(), key.as_mut())
        .map_err(|_| Error::bug("a sub-key has an impossible length"))?;
    Ok(Secret::new(*key))
}

const PASSPHRASE_AAD: &str = "aegis.wrapped_key:1";
const UNSEAL_AAD: &str = "aegis.unseal_wrapped_key:1";

fn unwrap_key(wrapping: &Key, aad: &str, wrapped: &[u8]) -> Option<Key> {
    let plain = decrypt(wrapping.expose(), aad, wrapped)?;
    Some(Secret::new(<[u8; KEY_BYTES]>::try_from(plain.as_slice()).ok()?))
}

fn not_configured() -> Error {
    Error::conflict("not_configured", "The secret store has not been set up.")
}

/// The data key, if `text` is the cipher it is wrapped by.
async fn unwrap_with(text: &Secret<String>, kdf: serde_json::Value, wrapped: &[u8]) -> Result<Key> {
    let kdf: Kdf = serde_json::from_value(kdf).map_err(|_| corrupt())?;
    let refused = || Error::new(Kind::Unauthenticated, "invalid_cipher", "This is not the cipher.");
    let cipher = cipher("cipher", text).map_err(|_| refused())?;
    let wrapping = hashing(move || kdf.derive(cipher.expose())).await??;
    unwrap_key(&wrapping, PASSPHRASE_AAD, wrapped).ok_or_else(refused)
}

/// Checks a new cipher and brings it into its one written form (Unicode NFC).
///
/// # Errors
/// 400 `invalid_request`, naming `field`.
pub fn cipher(field: &str, text: &Secret<String>) -> Result<Secret<String>> {
    let refuse = |why: String| Err(Error::field("invalid_request", field, why));
    let normal = Secret::new(text.expose().nfc().collect::<String>());
    let shown = normal.expose();
    if shown.trim() != shown {
        return refuse("must not begin or end with white space.".to_owned());
    }
    if shown.chars().count() < CIPHER_MIN_CHARS {
        return refuse(format!("must have at least {CIPHER_MIN_CHARS} characters."));
    }
    if shown.len() > CIPHER_MAX_BYTES {
        return refuse(format!("must have at most {CIPHER_MAX_BYTES} bytes."));
    }
    Ok(normal)
}

/// Writes a file that only this user can read, whole or not at all, and on disk when this returns.
///
/// # Errors
/// When the file system refuses.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
        if !folder.exists() {
            std::fs::create_dir_all(folder)?;
            std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
        }
        let draft = path.with_extension(format!("{}.new", uuid::Uuid::new_v4().simple()));
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)
            .and_then(|mut file| {
                file.write_all(content)?;
                file.sync_all()
            })
            .and_then(|()| std::fs::rename(&draft, path))
            .and_then(|()| std::fs::File::open(folder)?.sync_all());
        if written.is_err() {
            let _ = std::fs::remove_file(&draft);
        }
        written
    };
    write().map_err(|error| Error::bug(format!("{} could not be written: {error}", path.display())))
}

fn read_unseal_file(path: &Path) -> Option<Key> {
    let text = Zeroizing::new(std::fs::read_to_string(path).ok()?);
    let bytes = Zeroizing::new(STANDARD.decode(text.trim()).ok()?);
    Some(Secret::new(<[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok()?))
}

fn write_unseal_file(path: &Path) -> Result<Key> {
    let key = Secret::new(rand::random::<[u8; KEY_BYTES]>());
    write_private(path, Zeroizing::new(STANDARD.encode(key.expose()) + "\n").as_bytes())?;
    Ok(key)
}

/// Holds the unsealed key of this process, or nothing while the engine is locked. Cheap to clone; clones share the key.
#[derive(Debug, Clone, Default)]
pub struct Vault(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    key: RwLock<Option<Key>>,
    unseal_file: Option<PathBuf>,
}

impl Vault {
    /// A locked vault. With an `unseal_file` (`<state>/secrets/unseal.key`) the engine writes that file at set-up and
    /// opens itself with it after a restart; without, somebody must type the cipher each time.
    #[must_use]
    pub fn new(unseal_file: Option<PathBuf>) -> Self {
        Self(Arc::new(Inner { key: RwLock::default(), unseal_file }))
    }

    /// The vault of an engine whose state is in `state_dir`.
    #[must_use]
    pub fn in_state_dir(state_dir: &Path, unseal_automatically: bool) -> Self {
        Self::new(unseal_automatically.then(|| state_dir.join("secrets").join("unseal.key")))
    }

    /// Whether the key is in memory.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.key.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Forgets the key.
    pub fn lock(&self) {
        self.0.key.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn keep(&self, key: Key) {
        self.0.key.write().unwrap_or_else(PoisonError::into_inner).replace(key);
    }

    fn sub_key(&self, purpose: &str) -> Result<Key> {
        let key = self.0.key.read().unwrap_or_else(PoisonError::into_inner);
        sub_key(key.as_ref().ok_or_else(locked)?, purpose)
    }

    /// Seals `plain` for one column (`users.password`) of one row. The answer is `aegis:v2:` and base64.
    ///
    /// # Errors
    /// 423 `aegis_locked`.
    pub fn seal(&self, column: &'static str, row: impl Display, plain: &str) -> Result<String> {
        let key = self.sub_key(column)?;
        let sealed = encrypt(key.expose(), &format!("{column}:{row}"), plain.as_bytes())?;
        Ok(format!("{ENVELOPE}{}", STANDARD.encode(sealed)))
    }

    /// Opens what [`Vault::seal`] made for the same column and row.
    ///
    /// # Errors
    /// 423 `aegis_locked`; 500 `corrupt_secret_store` when the text is no envelope, was changed, or belongs elsewhere.
    pub fn open(&self, column: &'static str, row: impl Display, envelope: &str) -> Result<Secret<String>> {
        let key = self.sub_key(column)?;
        let sealed = envelope.strip_prefix(ENVELOPE).ok_or_else(corrupt)?;
        let sealed = STANDARD.decode(sealed).map_err(|_| corrupt())?;
        let plain = decrypt(key.expose(), &format!("{column}:{row}"), &sealed).ok_or_else(corrupt)?;
        let text = std::str::from_utf8(&plain).map_err(|_| corrupt())?;
        Ok(Secret::new(text.to_owned()))
    }

    /// An authentication tag of `message` under a sub-key of its own: what a client holds and only the engine can make.
    ///
    /// # Errors
    /// 423 `aegis_locked`.
    pub fn tag(&self, purpose: &'static str, message: &str) -> Result<[u8; KEY_BYTES]> {
        use hmac::{KeyInit as _, Mac as _};
        let key = self.sub_key(purpose)?;
        let mut mac = hmac::Hmac::<Sha256>::new_from_slice(key.expose()).map_err(Error::bug)?;
        mac.update(message.as_bytes());
        Ok(mac.finalize().into_bytes().into())
    }

    /// Whether `tag` is what [`Vault::tag`] makes; compared in constant time. False while locked.
    #[must_use]
    pub fn tag_fits(&self, purpose: &'static str, message: &str, tag: &[u8]) -> bool {
        self.tag(purpose, message).is_ok_and(|expected| expected.ct_eq(tag).into())
    }

    /// Makes the data key, once per engine. The caller commits `tx`, and calls [`Fresh::keep`] when that worked.
    ///
    /// # Errors
    /// 400 `invalid_request` for a weak cipher; 409 `already_configured`.
    pub async fn set_up(&self, tx: &mut db::Tx<'_>, text: &Secret<String>, actor: &Actor) -> Result<Fresh> {
        let cipher = cipher("cipher", text)?;
        let kdf = Kdf::fresh();
        let (kdf, wrapping) = hashing(move || kdf.derive(cipher.expose()).map(|key| (kdf, key))).await??;
        let data_key = Secret::new(rand::random::<[u8; KEY_BYTES]>());
        let wrapped = encrypt(wrapping.expose(), PASSPHRASE_AAD, data_key.expose())?;
        // The row comes first: of two set-ups at once, the second waits here and is refused before it touches the file.
        sqlx::query!("INSERT INTO aegis (kdf, wrapped_key) VALUES ($1, $2)", serde_json::to_value(&kdf)?, wrapped)
            .execute(&mut **tx)
            .await
            .map_err(|error| {
                Error::from(error).on_constraint("aegis_pkey", || {
                    Error::conflict("already_configured", "The secret store has been set up already.")
                })
            })?;
        self.renew_unseal_file(tx, &data_key).await?;
        let entry = audit::Entry { action: "aegis.setup", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(tx, actor, entry).await?;
        Ok(Fresh { vault: self.clone(), key: data_key })
    }

    async fn renew_unseal_file(&self, tx: &mut db::Tx<'_>, data_key: &Key) -> Result<()> {
        if let Some(path) = &self.0.unseal_file {
            let wrapped = encrypt(write_unseal_file(path)?.expose(), UNSEAL_AAD, data_key.expose())?;
            sqlx::query!("UPDATE aegis SET unseal_wrapped_key = $1", wrapped).execute(&mut **tx).await?;
        }
        Ok(())
    }

    /// Opens the vault with the cipher. If the engine may unseal itself and its file is missing or stale, a new one is
    /// written with the commit of `tx`.
    ///
    /// # Errors
    /// 401 `invalid_cipher`; 409 `not_configured`; 500 `corrupt_secret_store`.
    pub async fn unlock(&self, tx: &mut db::Tx<'_>, text: &Secret<String>, actor: &Actor) -> Result<Fresh> {
        let row = sqlx::query!("SELECT kdf, wrapped_key, unseal_wrapped_key FROM aegis FOR UPDATE")
            .fetch_optional(&mut **tx)
            .await?
            .ok_or_else(not_configured)?;
        let key = unwrap_with(text, row.kdf, &row.wrapped_key).await?;
        if self.unseal_with_file(row.unseal_wrapped_key.as_deref()).is_none() {
            self.renew_unseal_file(tx, &key).await?;
        }
        let entry = audit::Entry { action: "aegis.unlock", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(tx, actor, entry).await?;
        Ok(Fresh { vault: self.clone(), key })
    }

    /// Has the data key wrapped by another cipher. What is sealed stays as it is, so no process notices, and the unseal file
    /// stays good.
    ///
    /// # Errors
    /// 400 `invalid_request` for a new cipher that is weak or the present one; 401 `invalid_cipher`; 409 `not_configured`.
    pub async fn rotate(&self, tx: &mut db::Tx<'_>, current: &Secret<String>, new: &Secret<String>, actor: &Actor) -> Result<()> {
        let new = cipher("new_cipher", new)?;
        let row = sqlx::query!("SELECT kdf, wrapped_key FROM aegis FOR UPDATE")
            .fetch_optional(&mut **tx)
            .await?
            .ok_or_else(not_configured)?;
        let key = unwrap_with(current, row.kdf, &row.wrapped_key).await?;
        if cipher("current_cipher", current)?.expose() == new.expose() {
            return Err(Error::field("invalid_request", "new_cipher", "must differ from the present one."));
        }
        let kdf = Kdf::fresh();
        let (kdf, wrapping) = hashing(move || kdf.derive(new.expose()).map(|key| (kdf, key))).await??;
        let wrapped = encrypt(wrapping.expose(), PASSPHRASE_AAD, key.expose())?;
        sqlx::query!("UPDATE aegis SET kdf = $1, wrapped_key = $2, updated_at = now()", serde_json::to_value(&kdf)?, wrapped)
            .execute(&mut **tx)
            .await?;
        let entry = audit::Entry { action: "aegis.rotate", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(tx, actor, entry).await
    }

    fn unseal_with_file(&self, wrapped: Option<&[u8]>) -> Option<Key> {
        unwrap_key(&read_unseal_file(self.0.unseal_file.as_deref()?)?, UNSEAL_AAD, wrapped?)
    }

    /// Opens the vault with the unseal file, if there is one and it fits. Called at process start, and whenever a locked
    /// process is asked for its phase: so a second API process follows the set-up done in the first.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn unseal_from_file(&self, pool: &db::Pool) -> Result<bool> {
        if self.is_open() {
            return Ok(true);
        }
        if !self.0.unseal_file.as_deref().is_some_and(Path::exists) {
            return Ok(false);
        }
        let wrapped = sqlx::query_scalar!("SELECT unseal_wrapped_key FROM aegis").fetch_optional(pool).await?.flatten();
        let Some(key) = self.unseal_with_file(wrapped.as_deref()) else { return Ok(false) };
        self.keep(key);
        Ok(true)
    }
}

/// A key that becomes the vault's once the transaction that goes with it is committed.
#[derive(Debug)]
#[must_use]
pub struct Fresh {
    vault: Vault,
    key: Key,
}

impl Fresh {
    /// Opens the vault.
    pub fn keep(self) {
        self.vault.keep(self.key);
    }
}

/// When the secret store was last changed; none before set-up.
///
/// # Errors
/// When the database is away.
pub async fn updated_at(pool: &db::Pool) -> Result<Option<DateTime<Utc>>> {
    Ok(sqlx::query_scalar!("SELECT updated_at FROM aegis").fetch_optional(pool).await?)
}

#[cfg(test)]
impl Vault {
    pub(crate) fn open_for_test() -> Self {
        let vault = Self::default();
        vault.keep(Secret::new(rand::random()));
        vault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let vault = Vault::open_for_test();
        let sealed = vault.seal("users.password", 7, "hunter").unwrap();
        assert!(sealed.starts_with("aegis:v2:") && !sealed.contains("hunter"));
        assert_eq!(vault.open("users.password", 7, &sealed).unwrap().expose(), "hunter");
        assert_eq!(vault.open("users.password", 8, &sealed).unwrap_err().code, "corrupt_secret_store");
        assert_eq!(vault.open("users.mfa_secret", 7, &sealed).unwrap_err().code, "corrupt_secret_store");
        assert_eq!(vault.open("users.password", 7, "hunter").unwrap_err().code, "corrupt_secret_store");
        assert_eq!(vault.open("users.password", 7, "aegis:v2:AAAA").unwrap_err().code, "corrupt_secret_store");
        let mut broken = sealed.clone().into_bytes();
        let place = ENVELOPE.len() + 20;
        broken[place] = if broken[place] == b'A' { b'B' } else { b'A' };
        assert!(vault.open("users.password", 7, std::str::from_utf8(&broken).unwrap()).is_err());
        assert_ne!(sealed, vault.seal("users.password", 7, "hunter").unwrap());
        assert!(Vault::open_for_test().open("users.password", 7, &sealed).is_err());
    }

    #[test]
    fn a_locked_vault_neither_seals_nor_opens() {
        let vault = Vault::open_for_test();
        let sealed = vault.seal("users.password", 1, "x").unwrap();
        vault.clone().lock();
        assert!(!vault.is_open());
        assert_eq!(vault.seal("users.password", 1, "x").unwrap_err().code, "aegis_locked");
        assert_eq!(vault.open("users.password", 1, &sealed).unwrap_err().code, "aegis_locked");
        assert!(!vault.tag_fits("device-cookie", "x", &[0; 32]));
    }

    #[test]
    fn ciphers_are_long_and_have_no_white_space_around_them() {
        let check = |text: &str| cipher("cipher", &Secret::new(text.to_owned()));
        assert_eq!(check("twelve chars").unwrap().expose(), "twelve chars");
        for bad in ["", "eleven char", " twelve chars", "twelve chars\n", &"x".repeat(1025)] {
            let error = check(bad).unwrap_err();
            assert!(error.fields.contains_key("cipher"), "{bad:?}");
            assert_eq!(error.code, "invalid_request");
        }
        // The same text typed on two systems is the same cipher.
        assert_eq!(check("pa\u{308}sswords go").unwrap().expose(), check("p\u{e4}sswords go").unwrap().expose());
    }

    #[test]
    fn the_unseal_file_is_private_and_opens_what_it_wrapped() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::in_state_dir(folder.path(), true);
        let path = folder.path().join("secrets/unseal.key");
        let data_key = Secret::new([7; KEY_BYTES]);
        let wrapped = encrypt(write_unseal_file(&path).unwrap().expose(), UNSEAL_AAD, data_key.expose()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(vault.unseal_with_file(Some(&wrapped)).unwrap().expose(), data_key.expose());
        assert!(vault.unseal_with_file(None).is_none());
        write_unseal_file(&path).unwrap();
        assert!(vault.unseal_with_file(Some(&wrapped)).is_none());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(Vault::in_state_dir(folder.path(), false).unseal_with_file(Some(&wrapped)).is_none());
    }
}
