//! Signing in, proving it again, and the signed-in user's password and second factor.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::ZeroizeOnDrop;

use super::{
    Access, Client,
    challenges::{self, Purpose},
    directory::{ldap::Login, sign_in::Asked},
    limits::{self, Attempt},
    mfa,
    passwords::{self, Digest, Sent},
    recovery_codes::{self, RecoveryCode},
    sessions::{self, Session},
};
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names,
    scope::Actor,
    secret::Secret,
};

pub(super) const PASSWORD: &str = "users.password";
pub(super) const MFA_SECRET: &str = "users.mfa_secret";
const DEVICE_COOKIE: &str = "device-cookie";
const LIMIT_SUBJECT: &str = "limit-subject";

/// A completed sign-in.
#[derive(Debug)]
pub struct SignedIn {
    /// The user's name, as stored.
    pub username: String,
    /// `Admin` or `User`.
    pub role: String,
    /// `local` or `directory`.
    pub auth_source: String,
    /// The session's token.
    pub token: Secret<String>,
    /// Marks this browser as one the user has signed in from; see [`Client::device`].
    pub device: Secret<String>,
}

/// Which second step a sign-in waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The user has no second factor yet and is given one.
    Setup,
    /// The user types a code of the second factor they have.
    Verify,
}

/// A sign-in whose password was right and that waits for a code.
#[derive(Debug)]
pub struct Pending {
    /// Which step.
    pub stage: Stage,
    /// Names the challenge; opens nothing else.
    pub token: Secret<String>,
    /// The user's name.
    pub username: String,
    /// `Admin` or `User`.
    pub role: String,
    /// For [`Stage::Setup`]: the new secret and its URL.
    pub enrollment: Option<Enrollment>,
}

/// A new second factor.
#[derive(Debug)]
pub struct Enrollment {
    /// Base32.
    pub secret: Secret<String>,
    /// `otpauth://totp/...`.
    pub url: Secret<String>,
}

/// How a sign-in goes on.
#[derive(Debug)]
pub enum Outcome {
    /// The user is in.
    SignedIn(SignedIn),
    /// A code is needed.
    Pending(Pending),
}

#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
#[serde(tag = "stage", rename_all = "lowercase")]
enum MfaState {
    Setup { secret: String },
    Verify,
}

pub(super) struct Account {
    pub id: i64,
    pub username: String,
    pub role: String,
    pub auth_source: String,
    pub password_sealed: Option<String>,
    mfa_secret_sealed: Option<String>,
    mfa_disabled: bool,
    mfa_last_step: i64,
    auth_reset_required: bool,
    directory_provider_id: Option<i64>,
    directory_subject: Option<String>,
    directory_disabled: bool,
    pub may_sign_in: bool,
}

async fn by_name(pool: &db::Pool, username: &str) -> Result<Option<Account>> {
    Ok(sqlx::query_as!(
        Account,
        "SELECT id, username, role, auth_source, password_sealed, mfa_secret_sealed, mfa_disabled, mfa_last_step,
                auth_reset_required, directory_provider_id, directory_subject, directory_disabled, may_sign_in
         FROM users WHERE username_key = ANY($1) ORDER BY username_key LIMIT 1",
        &names::lookup_keys(username.trim()),
    )
    .fetch_optional(pool)
    .await?)
}

pub(super) async fn by_id(pool: &db::Pool, id: i64) -> Result<Option<Account>> {
    Ok(sqlx::query_as!(
        Account,
        "SELECT id, username, role, auth_source, password_sealed, mfa_secret_sealed, mfa_disabled, mfa_last_step,
                auth_reset_required, directory_provider_id, directory_subject, directory_disabled, may_sign_in
         FROM users WHERE id = $1",
        id,
    )
    .fetch_optional(pool)
    .await?)
}

pub(super) async fn lock(tx: &mut db::Tx<'_>, id: i64) -> Result<Option<Account>> {
    Ok(sqlx::query_as!(
        Account,
        "SELECT id, username, role, auth_source, password_sealed, mfa_secret_sealed, mfa_disabled, mfa_last_step,
                auth_reset_required, directory_provider_id, directory_subject, directory_disabled, may_sign_in
         FROM users WHERE id = $1 FOR UPDATE",
        id,
    )
    .fetch_optional(&mut **tx)
    .await?)
}

fn refused() -> Error {
    Error::new(Kind::Unauthenticated, "invalid username or password", "The username or the password is wrong.")
}

fn wrong_code() -> Error {
    let mut error = Error::new(Kind::Unauthenticated, "invalid_code", "The code is wrong, or has been used already.");
    error.fields.insert("code".to_owned(), "is wrong, or has been used already.".to_owned());
    error
}

pub(super) fn disabled() -> Error {
    Error::new(Kind::Forbidden, "user_disabled", "This account may not sign in.")
}

/// Writes one row of the audit about something that was refused.
pub(super) async fn record_refusal(
    access: Access<'_>,
    actor: &Actor,
    action: &str,
    user_id: Option<i64>,
    reason: &str,
) -> Result<()> {
    let mut connection = access.pool.acquire().await?;
    let entry = Entry {
        action,
        object_kind: "user",
        // Never what was typed as a name: people type passwords there.
        object_id: user_id.map(|id| id.to_string()).unwrap_or_default(),
        failed: true,
        detail: json!({ "reason": reason }),
        ..Entry::default()
    };
    audit::record(&mut connection, actor, entry).await
}

impl Access<'_> {
    /// The subject failures of `account` are counted under: the browser itself if it has signed in to the same account
    /// before, so that strangers cannot lock its user out.
    fn subject(&self, client: &Client, account: Option<&Account>, name: &str) -> Result<String> {
        self.known_device(client, account).map_or_else(|| self.name_subject(name), Ok)
    }

    /// The browser as a subject of limits, if it has signed in to the account before.
    fn known_device(&self, client: &Client, account: Option<&Account>) -> Option<String> {
        let account = account?;
        let text = client.device.as_ref()?.expose();
        let (marked, tag) = text.rsplit_once('.')?;
        let tag = URL_SAFE_NO_PAD.decode(tag).ok()?;
        let (user, id) = marked.split_once('.')?;
        (user == account.id.to_string() && self.vault.tag_fits(DEVICE_COOKIE, marked, &tag)).then(|| format!("device:{id}"))
    }

    /// A name as a subject of limits: keyed, because people type passwords where a name is asked for.
    pub(super) fn name_subject(&self, name: &str) -> Result<String> {
        Ok(format!("name:{}", hex::encode(self.vault.tag(LIMIT_SUBJECT, &limits::account(name))?)))
    }

    fn device_mark(&self, user_id: i64) -> Result<Secret<String>> {
        let marked = format!("{user_id}.{}", uuid::Uuid::new_v4().simple());
        let tag = URL_SAFE_NO_PAD.encode(self.vault.tag(DEVICE_COOKIE, &marked)?);
        Ok(Secret::new(format!("{marked}.{tag}")))
    }

    async fn attempt(&self, client: &Client, first: limits::Limit, account: Option<&Account>, name: &str) -> Result<Attempt> {
        let subject = self.subject(client, account, name)?;
        let known_device = subject.starts_with("device:");
        let mut limits = vec![(first, subject), (limits::ACCOUNT_HOUR, self.name_subject(name)?)];
        // Strangers behind the same address must not keep out a browser that has signed in before.
        if !known_device {
            limits.push((limits::ADDRESS, limits::address(client.ip)));
        }
        limits::attempt(self.pool, &limits).await
    }

    fn verifier(&self, account: &Account) -> Result<Option<Secret<String>>> {
        if account.auth_source != "local" {
            return Ok(None);
        }
        account.password_sealed.as_deref().map(|sealed| self.vault.open(PASSWORD, account.id, sealed)).transpose()
    }

    /// Whether what was sent is the password of this account, here or in its directory.
    async fn is_password_of(&self, client: &Client, account: &Account, digest: &Digest, sent: &Sent) -> Result<bool> {
        let (Some(provider), Some(plain)) = (account.directory_provider_id, &sent.plain) else {
            return passwords::verify(digest, self.verifier(account)?).await;
        };
        let known_device = self.known_device(client, Some(account)).is_some();
        match self.ask_directories(&account.username, plain, Some(provider), known_device).await? {
            // The name may be another's by now.
            Asked::Right(found) => Ok(account.directory_subject.as_deref() == Some(found.1.subject.as_str())),
            Asked::Refused(_) => Ok(false),
        }
    }

    /// Signs in with name and password. Unknown names, wrong passwords and accounts that may not sign in get the same
    /// answer after the same work; anything else is said only after a right password.
    ///
    /// # Errors
    /// 400 `missing credentials`; 401 `invalid username or password`; 403 `directory_group_not_allowed`,
    /// `directory_user_disabled`; 409 `directory_username_conflict`; 423 `auth_reset_required`; 429 `rate_limited`.
    pub async fn sign_in(&self, client: &Client, username: &str, sent: &Sent) -> Result<Outcome> {
        if username.trim().is_empty() {
            return Err(Error::field("missing credentials", "username", "is required."));
        }
        let digest = match sent.presented() {
            Ok(digest) => digest,
            Err(passwords::Unusable::Missing) => {
                return Err(passwords::Unusable::Missing.into_error("missing credentials", "password"));
            }
            // A password nobody can have is a wrong one.
            Err(_) => Digest::of(""),
        };
        let account = by_name(self.pool, username).await?;
        let local = account.as_ref().is_some_and(|account| account.auth_source == "local");
        // A name of a directory counts once, with whatever domain it is typed.
        let name = if local { username.to_owned() } else { Login::parse(username).account };
        let attempt = self.attempt(client, limits::ACCOUNT, account.as_ref(), &name).await?;
        let known_device = self.known_device(client, account.as_ref()).is_some();
        let verifier = account.as_ref().map(|account| self.verifier(account)).transpose()?.flatten();
        // Both at once: how long it takes tells nobody which of them knows the name.
        let (right, asked) = tokio::join!(passwords::verify(&digest, verifier), async {
            match &sent.plain {
                Some(plain) if !local && !plain.expose().is_empty() && plain.expose().len() <= passwords::MAX_BYTES => {
                    let only = account.as_ref().and_then(|account| account.directory_provider_id);
                    self.ask_directories(username, plain, only, known_device).await
                }
                _ => Ok(Asked::Refused("wrong name or password")),
            }
        });
        let account = match (asked?, account) {
            (Asked::Right(found), _) => {
                limits::give_back(self.pool, attempt).await?;
                let id = self.admit(client, &found.0, &found.1).await?;
                by_id(self.pool, id).await?.ok_or_else(refused)?
            }
            (Asked::Refused(_), Some(account)) if right? && local && !account.directory_disabled => {
                limits::give_back(self.pool, attempt).await?;
                account
            }
            (Asked::Refused(reason), account) => {
                let user_id = account.map(|account| account.id);
                record_refusal(*self, &client.anonymous(), "session.login", user_id, reason).await?;
                return Err(refused());
            }
        };
        if account.auth_reset_required {
            return Err(Error::new(Kind::Locked, "auth_reset_required", "This account must be recovered first."));
        }
        let mut tx = self.pool.begin().await?;
        // What was proven may have changed while the password was being checked.
        let now = lock(&mut tx, account.id).await?;
        let now = now.filter(|now| now.password_sealed == account.password_sealed && !now.directory_disabled);
        let now = now.ok_or_else(refused)?;
        if now.mfa_disabled && now.auth_source == "local" {
            let signed_in = self.complete(&mut tx, client, &now, "password").await?;
            tx.commit().await?;
            return Ok(Outcome::SignedIn(signed_in));
        }
        let pending = if now.mfa_secret_sealed.is_some() {
            let token = challenges::begin(&mut tx, self.vault, Purpose::Mfa, Some(now.id), &MfaState::Verify).await?;
            Pending { stage: Stage::Verify, token, username: now.username, role: now.role, enrollment: None }
        } else {
            let secret = mfa::new_secret();
            let state = MfaState::Setup { secret: secret.expose().clone() };
            let token = challenges::begin(&mut tx, self.vault, Purpose::Mfa, Some(now.id), &state).await?;
            let enrollment = Some(self.enrollment(secret, &now.username)?);
            Pending { stage: Stage::Setup, token, username: now.username, role: now.role, enrollment }
        };
        tx.commit().await?;
        Ok(Outcome::Pending(pending))
    }

    pub(super) fn enrollment(&self, secret: Secret<String>, username: &str) -> Result<Enrollment> {
        let url = Secret::new(mfa::otpauth_url(&secret, &self.settings.mfa_issuer, username)?);
        Ok(Enrollment { secret, url })
    }

    /// Opens the session of a user who has proven everything.
    pub(super) async fn complete(&self, tx: &mut db::Tx<'_>, client: &Client, account: &Account, by: &str) -> Result<SignedIn> {
        // Clients made before there were step-ups know none, and who has just proven a second factor has proven enough.
        let stepped_up = matches!(by, "totp" | "passkey" | "bootstrap");
        let ip = client.ip_text();
        let token = sessions::create(tx, account.id, self.settings.sessions, &ip, &client.user_agent, stepped_up).await?;
        sqlx::query!("UPDATE users SET last_login = now() WHERE id = $1", account.id).execute(&mut **tx).await?;
        let entry = Entry {
            action: "session.login",
            object_kind: "user",
            object_id: account.id.to_string(),
            detail: json!({ "by": by }),
            ..Entry::default()
        };
        audit::record(tx, &client.acting_as(account.id, &account.username), entry).await?;
        Ok(SignedIn {
            username: account.username.clone(),
            role: account.role.clone(),
            auth_source: account.auth_source.clone(),
            token,
            device: self.device_mark(account.id)?,
        })
    }

    /// As [`Access::complete`], for an account written in the same transaction.
    pub(super) async fn complete_new(&self, tx: &mut db::Tx<'_>, client: &Client, user_id: i64) -> Result<SignedIn> {
        let account = lock(tx, user_id).await?.ok_or_else(|| Error::bug("an account vanished while it was written"))?;
        self.complete(tx, client, &account, "bootstrap").await
    }

    /// Takes the code of the second step.
    ///
    /// # Errors
    /// 400 `invalid_code` when it is no code; 401 `mfa_pending`, `invalid_session`, `expired`, `invalid_code`;
    /// 403 `mfa_not_configured`, `user_disabled`; 429 `rate_limited`.
    pub async fn verify(&self, client: &Client, token: &Secret<String>, code: &str) -> Result<SignedIn> {
        if token.expose().is_empty() {
            return Err(Error::new(
                Kind::Unauthenticated,
                "mfa_pending",
                "No sign-in waits for a code; pending_token is required.",
            ));
        }
        let code = Typed::parse(code)?;
        let user_id = challenges::owner(self.pool, Purpose::Mfa, token).await?.flatten().ok_or_else(challenges::invalid)?;
        let account = by_id(self.pool, user_id).await?.ok_or_else(challenges::invalid)?;
        let attempt = self.attempt(client, limits::MFA, Some(&account), &account.username).await?;
        let mut tx = self.pool.begin().await?;
        let challenge = challenges::find::<MfaState>(&mut tx, self.vault, Purpose::Mfa, token).await?;
        let account = lock(&mut tx, user_id).await?.ok_or_else(challenges::invalid)?;
        if !account.may_sign_in {
            return Err(disabled());
        }
        let (secret, last_step, code) = match (&challenge.state, &account.mfa_secret_sealed) {
            (MfaState::Verify, Some(sealed)) => match code {
                Typed::Code(code) => (self.vault.open(MFA_SECRET, user_id, sealed)?, account.mfa_last_step, code),
                Typed::Recovery(code) => return self.recover(tx, client, &account, challenge.id, &code, attempt).await,
            },
            (MfaState::Verify, None) => {
                return Err(Error::new(
                    Kind::Forbidden,
                    "mfa_not_configured",
                    "This account has no second factor; sign in again.",
                ));
            }
            (MfaState::Setup { secret }, None) => match code {
                Typed::Code(code) => (Secret::new(secret.clone()), 0, code),
                Typed::Recovery(_) => return Err(mfa::not_digits()),
            },
            // Another sign-in has enrolled one in the meantime; this one's secret must not replace it.
            (MfaState::Setup { .. }, Some(_)) => return Err(challenges::invalid()),
        };
        let Some(step) = mfa::accepted_step(&secret, &code, Utc::now(), last_step)? else {
            return Err(refuse_code(tx, client, challenge.id, user_id, "wrong code").await);
        };
        challenges::used(&mut tx, challenge.id).await?;
        match challenge.state {
            MfaState::Setup { .. } => {
                let sealed = self.vault.seal(&mut tx, MFA_SECRET, user_id, secret.expose()).await?;
                sqlx::query!(
                    "UPDATE users SET mfa_secret_sealed = $2, mfa_last_step = $3, mfa_disabled = false, updated_at = now()
                     WHERE id = $1",
                    user_id,
                    sealed,
                    step,
                )
                .execute(&mut *tx)
                .await?;
                let entry =
                    Entry { action: "mfa.enroll", object_kind: "user", object_id: user_id.to_string(), ..Entry::default() };
                audit::record(&mut tx, &client.acting_as(user_id, &account.username), entry).await?;
            }
            MfaState::Verify => use_step(&mut tx, user_id, step).await?,
        }
        let signed_in = self.complete(&mut tx, client, &account, "totp").await?;
        tx.commit().await?;
        limits::give_back(self.pool, attempt).await?;
        Ok(signed_in)
    }

    /// Takes a recovery code in place of the app's.
    async fn recover(
        &self,
        mut tx: db::Tx<'_>,
        client: &Client,
        account: &Account,
        challenge: uuid::Uuid,
        code: &RecoveryCode,
        attempt: Attempt,
    ) -> Result<SignedIn> {
        if !recovery_codes::use_up(&mut tx, account.id, code).await? {
            return Err(refuse_code(tx, client, challenge, account.id, "wrong recovery code").await);
        }
        challenges::used(&mut tx, challenge).await?;
        let left = recovery_codes::left(&mut tx, account.id).await?.count;
        let entry = Entry {
            action: "mfa.recovery_code_used",
            object_kind: "user",
            object_id: account.id.to_string(),
            detail: json!({ "left": left }),
            ..Entry::default()
        };
        audit::record(&mut tx, &client.acting_as(account.id, &account.username), entry).await?;
        let signed_in = self.complete(&mut tx, client, account, "recovery code").await?;
        tx.commit().await?;
        limits::give_back(self.pool, attempt).await?;
        Ok(signed_in)
    }

    /// Proves again who a signed-in user is, with the password or a code.
    ///
    /// # Errors
    /// 400 `password_or_code_required`, `invalid_code`; 401 `invalid current password`, `invalid_code`;
    /// 403 `mfa_not_configured`; 429 `rate_limited`.
    pub async fn step_up(&self, client: &Client, session: &Session, sent: &Sent, code: Option<&str>) -> Result<()> {
        let account = by_id(self.pool, session.user_id).await?.ok_or_else(user_not_found)?;
        let actor = client.acting_as(account.id, &account.username);
        let (attempt, mut tx) = if let Some(code) = code {
            let code = mfa::digits(code)?;
            let attempt = self.attempt(client, limits::MFA, Some(&account), &account.username).await?;
            let mut tx = self.pool.begin().await?;
            let account = lock(&mut tx, session.user_id).await?.ok_or_else(user_not_found)?;
            let Some(sealed) = &account.mfa_secret_sealed else {
                return Err(Error::new(Kind::Forbidden, "mfa_not_configured", "This account has no second factor."));
            };
            let secret = self.vault.open(MFA_SECRET, account.id, sealed)?;
            let Some(step) = mfa::accepted_step(&secret, &code, Utc::now(), account.mfa_last_step)? else {
                drop(tx);
                record_refusal(*self, &actor, "session.step_up", Some(account.id), "wrong code").await?;
                return Err(wrong_code());
            };
            use_step(&mut tx, account.id, step).await?;
            (attempt, tx)
        } else {
            let digest = sent.presented().map_err(|why| why.into_error("password_or_code_required", "password"))?;
            let attempt = self.attempt(client, limits::ACCOUNT, Some(&account), &account.username).await?;
            if !self.is_password_of(client, &account, &digest, sent).await? {
                record_refusal(*self, &actor, "session.step_up", Some(account.id), "wrong password").await?;
                return Err(wrong_password());
            }
            (attempt, self.pool.begin().await?)
        };
        sessions::stepped_up(&mut tx, session.id).await?;
        let entry =
            Entry { action: "session.step_up", object_kind: "user", object_id: account.id.to_string(), ..Entry::default() };
        audit::record(&mut tx, &actor, entry).await?;
        tx.commit().await?;
        limits::give_back(self.pool, attempt).await
    }

    /// Changes the user's password and ends all other sessions, whose ids are returned.
    ///
    /// # Errors
    /// 400 `invalid current password`, `invalid new password`, `password_too_short`, `password_too_long`,
    /// `new password must differ from the current password`; 401 `invalid current password`;
    /// 403 `directory_user_local_action_disabled`; 429 `rate_limited`.
    pub async fn change_password(
        &self,
        client: &Client,
        session: &Session,
        current: &Sent,
        new: &Sent,
    ) -> Result<Vec<uuid::Uuid>> {
        let old = current.presented().map_err(|why| why.into_error("invalid current password", "current_password"))?;
        let new = new.chosen().map_err(|why| why.into_error("invalid new password", "new_password"))?;
        let account = by_id(self.pool, session.user_id).await?.ok_or_else(user_not_found)?;
        if account.auth_source != "local" {
            return Err(directory_user());
        }
        let actor = client.acting_as(account.id, &account.username);
        let attempt = self.attempt(client, limits::ACCOUNT, Some(&account), &account.username).await?;
        if !passwords::verify(&old, self.verifier(&account)?).await? {
            record_refusal(*self, &actor, "user.change_password", Some(account.id), "wrong password").await?;
            return Err(wrong_password());
        }
        limits::give_back(self.pool, attempt).await?;
        if old.is(&new) {
            return Err(Error::field(
                "new password must differ from the current password",
                "new_password",
                "must differ from the current password.",
            ));
        }
        let verifier = passwords::verifier(&new).await?;
        let mut tx = self.pool.begin().await?;
        let sealed = self.vault.seal(&mut tx, PASSWORD, account.id, verifier.expose()).await?;
        let changed = sqlx::query!(
            "UPDATE users SET password_sealed = $2, password_change_required = false, updated_at = now()
             WHERE id = $1 AND password_sealed = $3",
            account.id,
            sealed,
            account.password_sealed,
        )
        .execute(&mut *tx)
        .await?;
        if changed.rows_affected() == 0 {
            return Err(wrong_password());
        }
        let ended = sessions::end_all(&mut tx, account.id, Some(session.id)).await?;
        challenges::end_all(&mut tx, account.id).await?;
        let entry =
            Entry { action: "user.change_password", object_kind: "user", object_id: account.id.to_string(), ..Entry::default() };
        audit::record(&mut tx, &actor, entry).await?;
        tx.commit().await?;
        Ok(ended)
    }

    /// Forgets the user's second factor and ends all other sessions, whose ids are returned beside whether a new factor
    /// must be set up at the next sign-in. The caller has asked for a step-up.
    ///
    /// # Errors
    /// 403 `step_up_required`; 404 `user not found`.
    pub async fn reset_mfa(&self, client: &Client, session: &Session) -> Result<(bool, Vec<uuid::Uuid>)> {
        session.require_step_up()?;
        let mut tx = self.pool.begin().await?;
        let disabled = sqlx::query_scalar!(
            "UPDATE users SET mfa_secret_sealed = NULL, mfa_last_step = 0, updated_at = now() WHERE id = $1 RETURNING mfa_disabled",
            session.user_id,
        )
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(user_not_found)?;
        let ended = sessions::end_all(&mut tx, session.user_id, Some(session.id)).await?;
        challenges::end_all(&mut tx, session.user_id).await?;
        let entry =
            Entry { action: "mfa.reset", object_kind: "user", object_id: session.user_id.to_string(), ..Entry::default() };
        audit::record(&mut tx, &client.acting_as(session.user_id, &session.username), entry).await?;
        tx.commit().await?;
        Ok((!disabled, ended))
    }

    /// Ends the session.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn sign_out(&self, client: &Client, session: &Session) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        sessions::end(&mut tx, session.id).await?;
        let entry =
            Entry { action: "session.logout", object_kind: "user", object_id: session.user_id.to_string(), ..Entry::default() };
        audit::record(&mut tx, &client.acting_as(session.user_id, &session.username), entry).await?;
        tx.commit().await?;
        Ok(())
    }

    /// The live sessions of the session's user, the one used last first.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn own_sessions(&self, session: &Session) -> Result<Vec<sessions::Listed>> {
        sessions::list(self.pool, session.user_id, self.settings.sessions).await
    }

    /// Ends one session of the session's user, this one or another.
    ///
    /// # Errors
    /// 404 `session_not_found`; when the database is away.
    pub async fn end_own_session(&self, client: &Client, session: &Session, ended: uuid::Uuid) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        if !sessions::end_of(&mut tx, session.user_id, ended).await? {
            return Err(Error::new(Kind::NotFound, "session_not_found", "You have no such session."));
        }
        record_ended(&mut tx, client, session, &[ended]).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Ends all other sessions of the session's user, and says which.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn end_other_sessions(&self, client: &Client, session: &Session) -> Result<Vec<uuid::Uuid>> {
        let mut tx = self.pool.begin().await?;
        let ended = sessions::end_all(&mut tx, session.user_id, Some(session.id)).await?;
        if !ended.is_empty() {
            record_ended(&mut tx, client, session, &ended).await?;
        }
        tx.commit().await?;
        Ok(ended)
    }
}

/// What was typed at the second step.
enum Typed {
    Code(String),
    Recovery(RecoveryCode),
}

impl Typed {
    fn parse(typed: &str) -> Result<Self> {
        match RecoveryCode::parse(typed) {
            Some(code) => Ok(Self::Recovery(code)),
            None => mfa::digits(typed).map(Self::Code),
        }
    }
}

/// Counts a wrong code against its sign-in; the refusal.
async fn refuse_code(mut tx: db::Tx<'_>, client: &Client, challenge: uuid::Uuid, user_id: i64, reason: &str) -> Error {
    let entry = Entry {
        action: "session.mfa",
        object_kind: "user",
        object_id: user_id.to_string(),
        failed: true,
        detail: json!({ "reason": reason }),
        ..Entry::default()
    };
    let work = async {
        challenges::failed(&mut tx, challenge).await?;
        audit::record(&mut tx, &client.anonymous(), entry).await?;
        tx.commit().await?;
        Ok(())
    };
    work.await.err().unwrap_or_else(wrong_code)
}

async fn record_ended(tx: &mut db::Tx<'_>, client: &Client, session: &Session, ended: &[uuid::Uuid]) -> Result<()> {
    let entry = Entry {
        action: "session.end",
        object_kind: "user",
        object_id: session.user_id.to_string(),
        detail: serde_json::json!({"sessions": ended}),
        ..Entry::default()
    };
    audit::record(tx, &client.acting_as(session.user_id, &session.username), entry).await
}

/// Uses a step up. The row is locked, and the condition holds even if it were not.
async fn use_step(tx: &mut db::Tx<'_>, user_id: i64, step: i64) -> Result<()> {
    let used = sqlx::query!("UPDATE users SET mfa_last_step = $2 WHERE id = $1 AND mfa_last_step < $2", user_id, step)
        .execute(&mut **tx)
        .await?;
    if used.rows_affected() == 0 { Err(wrong_code()) } else { Ok(()) }
}

pub(super) fn user_not_found() -> Error {
    Error::new(Kind::NotFound, "user not found", "There is no such user.")
}

pub(super) fn directory_user() -> Error {
    Error::new(Kind::Forbidden, "directory_user_local_action_disabled", "The directory manages this account.")
}

fn wrong_password() -> Error {
    Error::new(Kind::Unauthenticated, "invalid current password", "The password is wrong.")
}
