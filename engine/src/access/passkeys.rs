//! Passkeys: signing in with a key pair that an authenticator keeps (WebAuthn), in place of password and code.
//!
//! Credentials are discoverable and verified by their user, so a passkey is both factors. What a ceremony needs stays on the
//! server as a [`challenges`] row: it works once, for the user who began it, for five minutes.

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use url::{Host, Url};
use webauthn_rs_core::{
    WebauthnCore,
    error::WebauthnError,
    proto::{
        AttestationConveyancePreference, AuthenticationState, Credential, PublicKeyCredential, RegisterPublicKeyCredential,
        RegistrationState, UserVerificationPolicy,
    },
};

use super::{
    Access, Client,
    challenges::{self, Purpose},
    limits,
    sessions::Session,
    sign_in::{self, Account, SignedIn, disabled, user_not_found},
};
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::Actor,
    secret::Secret,
};

/// The most passkeys of one user.
pub const MAX: usize = 20;
/// The most characters of a label.
pub const LABEL_MAX_CHARS: usize = 80;
const DEFAULT_LABEL: &str = "Passkey";
const CREDENTIAL: &str = "passkeys.credential";
const LOOKUP: &str = "passkey-lookup";

/// Who the authenticator is asked to sign for: the host of the public base URL.
#[derive(Debug)]
pub struct RelyingParty(WebauthnCore);

impl RelyingParty {
    /// Of the engine at `base`; `name` is shown to people.
    ///
    /// # Errors
    /// 503 `passkeys_unavailable` when the host is an address: browsers make passkeys for names only.
    pub fn of(base: &Url, name: &str) -> Result<Self> {
        let Some(Host::Domain(host)) = base.host() else {
            let why = "Passkeys need a host name: set BOREALIS_PUBLIC_BASE_URL to one.";
            return Err(Error::new(Kind::Unavailable, "passkeys_unavailable", why));
        };
        let open = Duration::from_secs(u64::from(challenges::OPEN_S.unsigned_abs()));
        // The core of the library, because its front asks for no discoverable credentials. Every policy is named here.
        Ok(Self(WebauthnCore::new_unsafe_experts_only(name, host, vec![base.clone()], open, Some(false), Some(false))))
    }
}

/// A passkey as its user sees it.
#[derive(Debug, Clone)]
pub struct Passkey {
    /// Its id.
    pub id: i64,
    /// What its user calls it.
    pub label: String,
    /// How it can be reached: `internal`, `usb`, ...
    pub transports: Vec<String>,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// When it last signed somebody in.
    pub last_used_at: Option<DateTime<Utc>>,
}

#[derive(Serialize, Deserialize)]
struct Registering {
    label: Option<String>,
    state: RegistrationState,
}

/// A ceremony that has begun.
#[derive(Debug)]
pub struct Begun {
    /// Names it for five minutes.
    pub request_id: Secret<String>,
    /// What `navigator.credentials` is called with; binaries are base64url.
    pub options: Value,
}

/// The user handle kept by the authenticator: the same for all passkeys of a user, and tells nothing of them.
fn handle(user_id: i64, username: &str) -> [u8; 32] {
    Sha256::digest(format!("{user_id}:{}", names::key(username))).into()
}

fn label(text: Option<&str>) -> Result<Option<String>> {
    let text = text.map(str::trim).unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    let rule = Rule { field: "label", code: "invalid_label", max_chars: LABEL_MAX_CHARS, in_paths: false };
    Name::parse(text, &rule).map(|label| Some(label.into_string()))
}

fn begun(request_id: Secret<String>, options: impl Serialize) -> Result<Begun> {
    let options = serde_json::to_value(options)?;
    // Clients take the options themselves; the library wraps them.
    let options = options.get("publicKey").cloned().ok_or_else(|| Error::bug("options without publicKey"))?;
    Ok(Begun { request_id, options })
}

fn no_ceremony(request_id: &Secret<String>) -> Result<()> {
    if request_id.expose().is_empty() {
        let why = "No passkey ceremony has begun; request_id is required.";
        return Err(Error::new(Kind::Unauthenticated, "passkey_pending", why));
    }
    Ok(())
}

fn read<T: serde::de::DeserializeOwned>(credential: Value) -> Result<T> {
    serde_json::from_value(credential)
        .map_err(|error| Error::field("invalid_passkey", "credential", format!("is not what a browser answers: {error}.")))
}

fn failed(why: &WebauthnError) -> Error {
    tracing::info!(%why, "a passkey was refused");
    Error::invalid("passkey_verification_failed", "The passkey could not be verified.")
}

fn local(account: &Account) -> Result<()> {
    if account.auth_source != "local" {
        return Err(Error::new(Kind::Forbidden, "passkeys_local_users_only", "The directory manages this account."));
    }
    if !account.may_sign_in {
        return Err(disabled());
    }
    Ok(())
}

fn not_found() -> Error {
    Error::new(Kind::NotFound, "passkey_not_found", "You have no such passkey.")
}

fn too_many() -> Error {
    Error::conflict("too_many_passkeys", format!("A user has at most {MAX} passkeys; remove one first."))
}

/// How many passkeys a user has.
///
/// # Errors
/// When the database is away.
pub async fn count(pool: &db::Pool, user_id: i64) -> Result<i64> {
    Ok(sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM passkeys WHERE user_id = $1"#, user_id).fetch_one(pool).await?)
}

/// The passkeys of a user, the oldest first.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, user_id: i64) -> Result<Vec<Passkey>> {
    Ok(sqlx::query_as!(
        Passkey,
        "SELECT id, label, transports, created_at, last_used_at FROM passkeys WHERE user_id = $1 ORDER BY created_at, id",
        user_id,
    )
    .fetch_all(pool)
    .await?)
}

/// Removes every passkey of a user, and says how many there were.
///
/// # Errors
/// When the database is away.
pub async fn remove_all(tx: &mut db::Tx<'_>, user_id: i64) -> Result<u64> {
    Ok(sqlx::query!("DELETE FROM passkeys WHERE user_id = $1", user_id).execute(&mut **tx).await?.rows_affected())
}

/// Calls a passkey of the actor's by another name; an empty one makes it `Passkey`.
///
/// # Errors
/// 400 `invalid_label`; 404 `passkey_not_found`.
pub async fn rename(pool: &db::Pool, actor: &Actor, user_id: i64, id: i64, text: &str) -> Result<Passkey> {
    let label = label(Some(text))?.unwrap_or_else(|| DEFAULT_LABEL.to_owned());
    let mut tx = pool.begin().await?;
    let passkey = sqlx::query_as!(
        Passkey,
        "UPDATE passkeys SET label = $3 WHERE id = $1 AND user_id = $2 RETURNING id, label, transports, created_at, last_used_at",
        id,
        user_id,
        label,
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(not_found)?;
    record(&mut tx, actor, "passkey.rename", id, json!({"label": label})).await?;
    tx.commit().await?;
    Ok(passkey)
}

/// Removes a passkey of the actor's.
///
/// # Errors
/// 404 `passkey_not_found`.
pub async fn remove(pool: &db::Pool, actor: &Actor, user_id: i64, id: i64) -> Result<()> {
    let mut tx = pool.begin().await?;
    let label = sqlx::query_scalar!("DELETE FROM passkeys WHERE id = $1 AND user_id = $2 RETURNING label", id, user_id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    record(&mut tx, actor, "passkey.remove", id, json!({"label": label})).await?;
    tx.commit().await?;
    Ok(())
}

async fn record(tx: &mut db::Tx<'_>, actor: &Actor, action: &str, id: i64, detail: Value) -> Result<()> {
    let entry = Entry { action, object_kind: "passkey", object_id: id.to_string(), detail, ..Entry::default() };
    audit::record(tx, actor, entry).await
}

impl Access<'_> {
    fn lookup_tag(&self, credential_id: &[u8]) -> Result<[u8; 32]> {
        self.vault.tag(LOOKUP, &URL_SAFE_NO_PAD.encode(credential_id))
    }

    /// Sealed for the tag it is found by: the row's id is not known before it is written.
    async fn seal_credential(&self, tx: &mut db::Tx<'_>, tag: &[u8; 32], credential: &Credential) -> Result<String> {
        let plain = Secret::new(serde_json::to_string(credential)?);
        self.vault.seal(tx, CREDENTIAL, hex::encode(tag), plain.expose()).await
    }

    fn open_credential(&self, tag: &[u8], sealed: &str) -> Result<Credential> {
        Ok(serde_json::from_str(self.vault.open(CREDENTIAL, hex::encode(tag), sealed)?.expose())?)
    }

    /// Begins the registration of a passkey for the session's user.
    ///
    /// # Errors
    /// 400 `invalid_label`; 403 `step_up_required`, `passkeys_local_users_only`, `user_disabled`; 404 `user not found`;
    /// 409 `too_many_passkeys`; 423 `aegis_locked`.
    pub async fn begin_passkey(&self, party: &RelyingParty, session: &Session, text: Option<&str>) -> Result<Begun> {
        session.require_step_up()?;
        let label = label(text)?;
        let account = sign_in::by_id(self.pool, session.user_id).await?.ok_or_else(user_not_found)?;
        local(&account)?;
        let sealed = sqlx::query!("SELECT lookup_tag, credential_sealed FROM passkeys WHERE user_id = $1", account.id)
            .fetch_all(self.pool)
            .await?;
        if sealed.len() >= MAX {
            return Err(too_many());
        }
        let mut own = Vec::with_capacity(sealed.len());
        for row in sealed {
            own.push(self.open_credential(&row.lookup_tag, &row.credential_sealed)?.cred_id);
        }
        let builder = party
            .0
            .new_challenge_register_builder(&handle(account.id, &account.username), &account.username, &account.username)
            .map_err(Error::bug)?
            .attestation(AttestationConveyancePreference::None)
            .user_verification_policy(UserVerificationPolicy::Required)
            .require_resident_key(true)
            .reject_synchronised_authenticators(false)
            .exclude_credentials(Some(own));
        let (options, state) = party.0.generate_challenge_register(builder).map_err(Error::bug)?;
        let mut tx = self.pool.begin().await?;
        let state = Registering { label, state };
        let request_id = challenges::begin(&mut tx, self.vault, Purpose::PasskeyRegister, Some(account.id), &state).await?;
        tx.commit().await?;
        begun(request_id, options)
    }

    /// Takes the authenticator's answer and keeps the passkey; answers how many the user has now.
    ///
    /// # Errors
    /// 400 `invalid_passkey`, `invalid_label`, `passkey_verification_failed`; 401 `passkey_pending`, `invalid_session`,
    /// `expired`; 403 `passkeys_local_users_only`, `user_disabled`; 404 `user not found`; 409 `passkey_already_registered`,
    /// `too_many_passkeys`; 423 `aegis_locked`.
    pub async fn finish_passkey(
        &self,
        party: &RelyingParty,
        client: &Client,
        session: &Session,
        request_id: &Secret<String>,
        credential: Value,
        text: Option<&str>,
    ) -> Result<i64> {
        no_ceremony(request_id)?;
        let named = label(text)?;
        let answer: RegisterPublicKeyCredential = read(credential)?;
        let mut tx = self.pool.begin().await?;
        let account = sign_in::lock(&mut tx, session.user_id).await?.ok_or_else(user_not_found)?;
        local(&account)?;
        let challenge = challenges::find::<Registering>(&mut tx, self.vault, Purpose::PasskeyRegister, request_id).await?;
        if challenge.user_id != Some(account.id) {
            return Err(challenges::invalid());
        }
        let credential = match party.0.register_credential(&answer, &challenge.state.state, None) {
            Ok(credential) => credential,
            Err(why) => {
                challenges::failed(&mut tx, challenge.id).await?;
                tx.commit().await?;
                return Err(failed(&why));
            }
        };
        challenges::used(&mut tx, challenge.id).await?;
        let have = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM passkeys WHERE user_id = $1"#, account.id)
            .fetch_one(&mut *tx)
            .await?;
        if usize::try_from(have).is_ok_and(|have| have >= MAX) {
            return Err(too_many());
        }
        let tag = self.lookup_tag(&credential.cred_id)?;
        // The browser's word, unsigned: shown, and a hint to browsers, no more.
        let transports = answer.response.transports.iter().flatten().map(ToString::to_string);
        let transports: Vec<String> = transports.collect::<BTreeSet<_>>().into_iter().collect();
        let label = named.or(challenge.state.label).unwrap_or_else(|| DEFAULT_LABEL.to_owned());
        let sealed = self.seal_credential(&mut tx, &tag, &credential).await?;
        let id = sqlx::query_scalar!(
            "INSERT INTO passkeys (user_id, label, lookup_tag, credential_sealed, transports) VALUES ($1, $2, $3, $4, $5) RETURNING id",
            account.id,
            label,
            &tag,
            sealed,
            &transports,
        )
        .fetch_one(&mut *tx)
        .await
        .map_err(|error| {
            Error::from(error).on_constraint("passkeys_lookup_tag_key", || {
                Error::conflict("passkey_already_registered", "This passkey is registered already.")
            })
        })?;
        let actor = client.acting_as(account.id, &account.username);
        record(&mut tx, &actor, "passkey.create", id, json!({"label": label})).await?;
        tx.commit().await?;
        Ok(have + 1)
    }

    /// Begins a sign-in with whatever passkey the person at the browser picks.
    ///
    /// # Errors
    /// 423 `aegis_locked`; 429 `rate_limited`.
    pub async fn begin_passkey_sign_in(&self, party: &RelyingParty, client: &Client) -> Result<Begun> {
        // Each leaves a row for an hour, and nobody has proven anything yet.
        let _counted = limits::attempt(self.pool, &[(limits::CEREMONY, limits::address(client.ip))]).await?;
        let builder =
            party.0.new_challenge_authenticate_builder(Vec::new(), Some(UserVerificationPolicy::Required)).map_err(Error::bug)?;
        let (options, state) = party.0.generate_challenge_authenticate(builder).map_err(Error::bug)?;
        let mut tx = self.pool.begin().await?;
        let request_id = challenges::begin(&mut tx, self.vault, Purpose::PasskeyAuthenticate, None, &state).await?;
        tx.commit().await?;
        begun(request_id, options)
    }

    /// Takes the authenticator's signature and signs its user in.
    ///
    /// # Errors
    /// 400 `invalid_passkey`, `passkey_verification_failed`; 401 `passkey_pending`, `invalid_session`, `expired`;
    /// 403 `passkeys_local_users_only`, `user_disabled`; 404 `passkey_not_configured`; 423 `aegis_locked`; 429 `rate_limited`.
    pub async fn finish_passkey_sign_in(
        &self,
        party: &RelyingParty,
        client: &Client,
        request_id: &Secret<String>,
        credential: Value,
    ) -> Result<SignedIn> {
        no_ceremony(request_id)?;
        let answer: PublicKeyCredential = read(credential)?;
        let tag = self.lookup_tag(&answer.raw_id)?;
        let owner =
            sqlx::query_scalar!("SELECT user_id FROM passkeys WHERE lookup_tag = $1", &tag).fetch_optional(self.pool).await?;
        let mut counted = vec![(limits::ADDRESS, limits::address(client.ip))];
        if let Some(account) = match owner {
            Some(owner) => sign_in::by_id(self.pool, owner).await?,
            None => None,
        } {
            counted.push((limits::ACCOUNT_HOUR, self.name_subject(&account.username)?));
        }
        let attempt = limits::attempt(self.pool, &counted).await?;
        let mut tx = self.pool.begin().await?;
        // The account first, as everywhere; then the passkey, whose counter only goes up.
        let account = match owner {
            Some(owner) => sign_in::lock(&mut tx, owner).await?,
            None => None,
        };
        let challenge =
            challenges::find::<AuthenticationState>(&mut tx, self.vault, Purpose::PasskeyAuthenticate, request_id).await?;
        let row = sqlx::query!("SELECT id, user_id, credential_sealed FROM passkeys WHERE lookup_tag = $1 FOR UPDATE", &tag)
            .fetch_optional(&mut *tx)
            .await?;
        let refusal = |reason: &str| Entry {
            action: "session.passkey",
            object_kind: "user",
            object_id: account.as_ref().map(|account| account.id.to_string()).unwrap_or_default(),
            failed: true,
            detail: json!({ "reason": reason }),
            ..Entry::default()
        };
        let (account, row) = match (&account, row) {
            (Some(account), Some(row)) if row.user_id == account.id => (account, row),
            _ => {
                challenges::failed(&mut tx, challenge.id).await?;
                audit::record(&mut tx, &client.anonymous(), refusal("unknown passkey")).await?;
                tx.commit().await?;
                let why = "This passkey is not registered here.";
                return Err(Error::new(Kind::NotFound, "passkey_not_configured", why));
            }
        };
        let mut credential = self.open_credential(&tag, &row.credential_sealed)?;
        let expected = handle(account.id, &account.username);
        let verified = match answer.get_user_unique_id() {
            Some(found) if found == expected => party.0.authenticate_single_credential(&answer, &challenge.state, &credential),
            _ => Err(WebauthnError::InvalidUserUniqueId),
        };
        let verified = match verified {
            Ok(verified) => verified,
            Err(why) => {
                let reason = match why {
                    WebauthnError::CredentialPossibleCompromise => "the signature counter went back: the passkey may be a copy",
                    _ => "not verified",
                };
                challenges::failed(&mut tx, challenge.id).await?;
                audit::record(&mut tx, &client.anonymous(), refusal(reason)).await?;
                tx.commit().await?;
                return Err(failed(&why));
            }
        };
        local(account)?;
        credential.counter = verified.counter();
        credential.backup_state = verified.backup_state();
        credential.backup_eligible = verified.backup_eligible();
        let sealed = self.seal_credential(&mut tx, &tag, &credential).await?;
        sqlx::query!("UPDATE passkeys SET credential_sealed = $2, last_used_at = now() WHERE id = $1", row.id, sealed)
            .execute(&mut *tx)
            .await?;
        challenges::used(&mut tx, challenge.id).await?;
        let signed_in = self.complete(&mut tx, client, account, "passkey").await?;
        tx.commit().await?;
        limits::give_back(self.pool, attempt).await?;
        Ok(signed_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passkeys_need_a_name_for_a_host() {
        let party = |base: &str| RelyingParty::of(&base.parse().unwrap(), "Borealis");
        assert!(party("https://rmm.example:8443/").is_ok() && party("http://localhost:8080/").is_ok());
        for base in ["http://127.0.0.1:8080/", "http://[::1]/"] {
            assert_eq!(party(base).unwrap_err().code, "passkeys_unavailable", "{base}");
        }
    }

    #[test]
    fn labels_are_bounded_and_empty_ones_are_none() {
        assert_eq!(label(None).unwrap(), None);
        assert_eq!(label(Some("  ")).unwrap(), None);
        assert_eq!(label(Some(" Yubikey ")).unwrap().as_deref(), Some("Yubikey"));
        assert!(label(Some(&"\u{fc}".repeat(80))).is_ok());
        for bad in ["x".repeat(81), "a\nb".to_owned()] {
            assert_eq!(label(Some(&bad)).unwrap_err().code, "invalid_label");
        }
    }

    #[test]
    fn a_handle_is_the_same_for_a_user_however_the_name_is_written() {
        assert_eq!(handle(7, "Ada"), handle(7, "ada"));
        assert_ne!(handle(7, "ada"), handle(8, "ada"));
    }
}
