//! The Aegis key: everything sealed in the database is sealed under it.
//!
//! A random 32-byte data key is made at the set-up. It is stored wrapped by a key derived from the operator's passphrase (the
//! *cipher*), and, when the engine may unseal itself, a second time wrapped by a key kept elsewhere ([`Unseal`]). Each column
//! has its own sub-key, and every envelope is bound to its row, so a sealed value moved elsewhere does not open.
//!
//! A [reset](Vault::reset) takes the data key away for good, from all processes: each knows its key by an id that is compared with
//! the database's wherever the key counts, and what is sealed is sealed in a transaction that holds the database's key fast.

use std::{
    fmt::Display,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
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
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    audit, db,
    error::{Error, Kind, Result},
    scope::Actor,
    secret::Secret,
};

mod handover;
mod reset;
mod unseal;

pub use handover::Handover;
pub use reset::Taken;
pub use unseal::{COMMAND_LIMIT, KEY_MAX_BYTES, Unseal};

/// The columns sealed under Aegis, each as `table.column` of what is `column_sealed` in the database: what a reset and the status
/// answer walk.
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

/// A data key, and which one it is.
#[derive(Debug, Clone)]
struct Held {
    id: Uuid,
    key: Key,
}

/// Holds the unsealed key of this process, or nothing while the engine is locked. Cheap to clone; clones share the key.
#[derive(Debug, Clone, Default)]
pub struct Vault(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    held: RwLock<Option<Held>>,
    unseal: Unseal,
}

impl Vault {
    /// A locked vault that may open itself as `unseal` says.
    #[must_use]
    pub fn new(unseal: Unseal) -> Self {
        Self(Arc::new(Inner { held: RwLock::default(), unseal }))
    }

    /// How this process opens the secret store by itself.
    #[must_use]
    pub fn unseal(&self) -> &Unseal {
        &self.0.unseal
    }

    /// Which data key is in memory, if one is.
    #[must_use]
    pub fn key_id(&self) -> Option<Uuid> {
        self.0.held.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|held| held.id)
    }

    /// Whether a key is in memory. Another process may have taken it out of the database a moment ago; see [`Vault::holds`].
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.key_id().is_some()
    }

    /// Whether this very data key, as the database names it, is in memory.
    #[must_use]
    pub fn holds(&self, key_id: Uuid) -> bool {
        self.key_id() == Some(key_id)
    }

    /// Forgets the key.
    pub fn lock(&self) {
        self.0.held.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Forgets the key if it is still this one.
    fn forget(&self, key_id: Uuid) {
        let mut held = self.0.held.write().unwrap_or_else(PoisonError::into_inner);
        if held.take_if(|held| held.id == key_id).is_some() {
            tracing::warn!("the secret store has another key or none now; this process has forgotten its own");
        }
    }

    fn keep(&self, held: Held) {
        self.0.held.write().unwrap_or_else(PoisonError::into_inner).replace(held);
    }

    fn held(&self) -> Result<Held> {
        self.0.held.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(locked)
    }

    fn sub_key(&self, purpose: &str) -> Result<Key> {
        sub_key(&self.held()?.key, purpose)
    }

    /// Holds the secret store's data key fast until `tx` ends, so that a reset waits for it, and refuses when it is not the one of
    /// this process. It never waits itself.
    ///
    /// # Errors
    /// 423 `aegis_locked`; 503 `aegis_busy` while a reset is on its way.
    pub async fn fence(&self, tx: &mut db::Tx<'_>) -> Result<()> {
        let held = self.held()?;
        self.fenced(tx, &held).await
    }

    async fn fenced(&self, tx: &mut db::Tx<'_>, held: &Held) -> Result<()> {
        let present = sqlx::query_scalar!("SELECT key_id FROM aegis FOR KEY SHARE NOWAIT").fetch_optional(&mut **tx).await;
        let present = present.map_err(|error| match error.as_database_error().and_then(|error| error.code()) {
            Some(code) if code == "55P03" => {
                Error::new(Kind::Unavailable, "aegis_busy", "The secret store is being reset.").retry_after(2)
            }
            _ => error.into(),
        })?;
        if present == Some(held.id) {
            return Ok(());
        }
        self.forget(held.id);
        Err(locked())
    }

    /// Seals `plain` for one column (`users.password`) of one row, which is written in the same `tx`. The answer is `aegis:v2:` and
    /// base64.
    ///
    /// # Errors
    /// As [`Vault::fence`].
    pub async fn seal(&self, tx: &mut db::Tx<'_>, column: &'static str, row: impl Display, plain: &str) -> Result<String> {
        let held = self.held()?;
        self.fenced(tx, &held).await?;
        envelope(&held.key, column, row, plain)
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
        self.tagger(purpose)?.tag(message)
    }

    /// Whether `tag` is what [`Vault::tag`] makes; compared in constant time. False while locked.
    #[must_use]
    pub fn tag_fits(&self, purpose: &'static str, message: &str, tag: &[u8]) -> bool {
        self.tagger(purpose).is_ok_and(|tagger| tagger.fits(message, tag))
    }

    /// Makes many tags under the key that is in memory now.
    ///
    /// # Errors
    /// 423 `aegis_locked`.
    pub fn tagger(&self, purpose: &'static str) -> Result<Tagger> {
        let held = self.held()?;
        Ok(Tagger { key_id: held.id, key: sub_key(&held.key, purpose)? })
    }

    /// Makes the data key, once per engine and again after each reset. The caller commits `tx`, and calls [`Fresh::keep`] when that
    /// worked.
    ///
    /// # Errors
    /// 400 `invalid_request` for a weak cipher; 409 `already_configured`.
    pub async fn set_up(&self, tx: &mut db::Tx<'_>, text: &Secret<String>, actor: &Actor) -> Result<Fresh> {
        let cipher = cipher("cipher", text)?;
        let kdf = Kdf::fresh();
        let (kdf, wrapping) = hashing(move || kdf.derive(cipher.expose()).map(|key| (kdf, key))).await??;
        let key = Secret::new(rand::random::<[u8; KEY_BYTES]>());
        let wrapped = encrypt(wrapping.expose(), PASSPHRASE_AAD, key.expose())?;
        // The row comes first: of two set-ups at once, the second waits here and is refused before it touches the file.
        let id = sqlx::query_scalar!(
            "INSERT INTO aegis (kdf, wrapped_key) VALUES ($1, $2) RETURNING key_id",
            serde_json::to_value(&kdf)?,
            wrapped
        )
        .fetch_one(&mut **tx)
        .await
        .map_err(|error| {
            Error::from(error).on_constraint("aegis_pkey", || {
                Error::conflict("already_configured", "The secret store has been set up already.")
            })
        })?;
        audit::chain::begin(tx, &Tagger { key_id: id, key: sub_key(&key, audit::chain::PURPOSE)? }).await?;
        self.renew_own_file(tx, &key).await?;
        let entry = audit::Entry { action: "aegis.setup", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(tx, actor, entry).await?;
        Ok(Fresh { vault: self.clone(), held: Held { id, key } })
    }

    async fn renew_own_file(&self, tx: &mut db::Tx<'_>, data_key: &Key) -> Result<()> {
        if let Some(path) = self.0.unseal.own() {
            let wrapped = encrypt(unseal::write_own(path)?.expose(), UNSEAL_AAD, data_key.expose())?;
            sqlx::query!("UPDATE aegis SET unseal_wrapped_key = $1", wrapped).execute(&mut **tx).await?;
        }
        Ok(())
    }

    /// Opens the vault with the cipher. If the engine may unseal itself with a file of its own, and that is missing or stale, a new
    /// one is written with the commit of `tx`.
    ///
    /// # Errors
    /// 401 `invalid_cipher`; 409 `not_configured`; 500 `corrupt_secret_store`.
    pub async fn unlock(&self, tx: &mut db::Tx<'_>, text: &Secret<String>, actor: &Actor) -> Result<Fresh> {
        let row = sqlx::query!("SELECT key_id, kdf, wrapped_key, unseal_wrapped_key FROM aegis FOR NO KEY UPDATE")
            .fetch_optional(&mut **tx)
            .await?
            .ok_or_else(not_configured)?;
        let key = unwrap_with(text, row.kdf, &row.wrapped_key).await?;
        if self.own_file_opens(row.unseal_wrapped_key.as_deref()).is_none() {
            self.renew_own_file(tx, &key).await?;
        }
        let entry = audit::Entry { action: "aegis.unlock", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(tx, actor, entry).await?;
        Ok(Fresh { vault: self.clone(), held: Held { id: row.key_id, key } })
    }

    /// Opens the vault with the cipher for a moment's work in this process, and leaves everything as it is.
    ///
    /// # Errors
    /// 401 `invalid_cipher`; 409 `not_configured`; 500 `corrupt_secret_store`.
    pub async fn open_with(&self, pool: &db::Pool, text: &Secret<String>) -> Result<()> {
        let row =
            sqlx::query!("SELECT key_id, kdf, wrapped_key FROM aegis").fetch_optional(pool).await?.ok_or_else(not_configured)?;
        let key = unwrap_with(text, row.kdf, &row.wrapped_key).await?;
        self.keep(Held { id: row.key_id, key });
        Ok(())
    }

    /// Has the data key wrapped by another cipher. What is sealed stays as it is, so no process notices, and the unseal file
    /// stays good.
    ///
    /// # Errors
    /// 400 `invalid_request` for a new cipher that is weak or the present one; 401 `invalid_cipher`; 409 `not_configured`.
    pub async fn rotate(&self, tx: &mut db::Tx<'_>, current: &Secret<String>, new: &Secret<String>, actor: &Actor) -> Result<()> {
        let new = cipher("new_cipher", new)?;
        let row = sqlx::query!("SELECT kdf, wrapped_key FROM aegis FOR NO KEY UPDATE")
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

    fn own_file_opens(&self, wrapped: Option<&[u8]>) -> Option<Key> {
        unwrap_key(&self.0.unseal.own_key()?, UNSEAL_AAD, wrapped?)
    }

    /// Does what the database says: forgets a key that is not the secret store's any more, and opens the vault with the file of ours
    /// if that fits. Answers whether it is open. Called at process start, every second, and whenever a request finds it locked; so
    /// a process follows what is done in another.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn follow(&self, pool: &db::Pool) -> Result<bool> {
        let before = self.key_id();
        let row = sqlx::query!("SELECT key_id, unseal_wrapped_key FROM aegis").fetch_optional(pool).await?;
        let present = row.as_ref().map(|row| row.key_id);
        // Only what was there before the question: a set-up in this process may have come between.
        if let Some(before) = before.filter(|before| present != Some(*before)) {
            self.forget(before);
        }
        let Some(row) = row else { return Ok(false) };
        if self.holds(row.key_id) {
            return Ok(true);
        }
        let Some(key) = self.own_file_opens(row.unseal_wrapped_key.as_deref()) else { return Ok(false) };
        self.keep(Held { id: row.key_id, key });
        Ok(true)
    }

    /// Opens the vault with an unseal key that is kept elsewhere ([`Unseal::is_foreign`]). Where the vault is open and that key does not fit,
    /// the data key is wrapped by it from now on. May take as long as [`COMMAND_LIMIT`]. Answers the data key it fits now; none
    /// before the set-up.
    ///
    /// # Errors
    /// 503 `unseal_failed` when it cannot be had; 409 `unseal_does_not_fit` while locked; when the database is away.
    pub async fn settle(&self, pool: &db::Pool) -> Result<Option<Uuid>> {
        let read = || sqlx::query!("SELECT key_id, unseal_wrapped_key FROM aegis").fetch_optional(pool);
        if read().await?.is_none() {
            return Ok(None);
        }
        let wrapping = self.0.unseal.foreign_key().await?;
        // That may have taken long.
        let Some(row) = read().await? else { return Ok(None) };
        let wrapped = row.unseal_wrapped_key.as_deref();
        if let Some(key) = wrapped.and_then(|wrapped| unwrap_key(&wrapping, UNSEAL_AAD, wrapped)) {
            if !self.holds(row.key_id) {
                self.keep(Held { id: row.key_id, key });
            }
            return Ok(Some(row.key_id));
        }
        let held = self.held().ok().filter(|held| held.id == row.key_id).ok_or_else(|| {
            let why = "The unseal key is not the one of this secret store; open it once with the cipher, and it will be.";
            Error::conflict("unseal_does_not_fit", why)
        })?;
        let mut tx = pool.begin().await?;
        self.fenced(&mut tx, &held).await?;
        let wrapped = encrypt(wrapping.expose(), UNSEAL_AAD, held.key.expose())?;
        sqlx::query!("UPDATE aegis SET unseal_wrapped_key = $1, updated_at = now()", wrapped).execute(&mut *tx).await?;
        let actor = Actor::system();
        let entry = audit::Entry { action: "aegis.unseal_key", object_kind: "aegis", ..audit::Entry::default() };
        audit::record(&mut tx, &actor, entry).await?;
        tx.commit().await?;
        Ok(Some(held.id))
    }
}

fn envelope(key: &Key, column: &str, row: impl Display, plain: &str) -> Result<String> {
    let sealed = encrypt(sub_key(key, column)?.expose(), &format!("{column}:{row}"), plain.as_bytes())?;
    Ok(format!("{ENVELOPE}{}", STANDARD.encode(sealed)))
}

/// Makes tags of one purpose under one data key.
#[derive(Debug)]
pub struct Tagger {
    /// Which data key.
    pub key_id: Uuid,
    key: Key,
}

impl Tagger {
    /// The tag of `message`.
    ///
    /// # Errors
    /// None in practice.
    pub fn tag(&self, message: &str) -> Result<[u8; KEY_BYTES]> {
        use hmac::{KeyInit as _, Mac as _};
        let mut mac = hmac::Hmac::<Sha256>::new_from_slice(self.key.expose()).map_err(Error::bug)?;
        mac.update(message.as_bytes());
        Ok(mac.finalize().into_bytes().into())
    }

    /// Whether `tag` is what [`Tagger::tag`] makes; compared in constant time.
    #[must_use]
    pub fn fits(&self, message: &str, tag: &[u8]) -> bool {
        self.tag(message).is_ok_and(|expected| expected.ct_eq(tag).into())
    }
}

/// A key that becomes the vault's once the transaction that goes with it is committed.
#[derive(Debug)]
#[must_use]
pub struct Fresh {
    vault: Vault,
    held: Held,
}

impl Fresh {
    /// Opens the vault.
    pub fn keep(self) {
        self.vault.keep(self.held);
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
        vault.keep(Held { id: Uuid::new_v4(), key: Secret::new(rand::random()) });
        vault
    }

    fn seal_for_test(&self, column: &'static str, row: i64, plain: &str) -> Result<String> {
        envelope(&self.held()?.key, column, row, plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_value_opens_in_its_own_place_only() {
        let vault = Vault::open_for_test();
        let sealed = vault.seal_for_test("users.password", 7, "hunter").unwrap();
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
        assert_ne!(sealed, vault.seal_for_test("users.password", 7, "hunter").unwrap());
        assert!(Vault::open_for_test().open("users.password", 7, &sealed).is_err());
    }

    #[test]
    fn a_locked_vault_neither_seals_nor_opens() {
        let vault = Vault::open_for_test();
        let sealed = vault.seal_for_test("users.password", 1, "x").unwrap();
        vault.clone().lock();
        assert!(!vault.is_open());
        assert_eq!(vault.seal_for_test("users.password", 1, "x").unwrap_err().code, "aegis_locked");
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
        let vault = Vault::new(Unseal::in_state_dir(folder.path()));
        let path = folder.path().join("secrets/unseal.key");
        let data_key = Secret::new([7; KEY_BYTES]);
        let wrapped = encrypt(unseal::write_own(&path).unwrap().expose(), UNSEAL_AAD, data_key.expose()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(vault.own_file_opens(Some(&wrapped)).unwrap().expose(), data_key.expose());
        assert!(vault.own_file_opens(None).is_none());
        unseal::write_own(&path).unwrap();
        assert!(vault.own_file_opens(Some(&wrapped)).is_none());
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(Vault::new(Unseal::Manual).own_file_opens(Some(&wrapped)).is_none());
    }

    #[test]
    fn a_vault_forgets_the_key_it_is_told_to_and_no_other() {
        let vault = Vault::open_for_test();
        let id = vault.key_id().unwrap();
        vault.forget(Uuid::new_v4());
        assert!(vault.holds(id));
        vault.forget(id);
        assert!(!vault.is_open());
    }
}
