//! The first set-up: which phase the engine is in, and how its first administrator comes to be.

use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::ZeroizeOnDrop;

use super::{
    Access, Client, aegis,
    aegis::{Taken, Vault},
    api_tokens,
    challenges::{self, Purpose},
    limits, mfa, passkeys,
    passwords::{self, Sent},
    sessions::{self, Session},
    sign_in::{MFA_SECRET, PASSWORD, Pending, SignedIn, Stage, record_refusal},
    users,
};
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names,
    secret::Secret,
};

/// How far the set-up is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// There is no secret store yet.
    AegisSetupRequired,
    /// The secret store is there and its key is not in this process's memory.
    AegisUnlockRequired,
    /// There is no administrator.
    AdminSetupRequired,
    /// There are administrators, and none of them can sign in.
    AdminRecoveryRequired,
    /// Normal work.
    LoginRequired,
}

/// The public state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct State {
    /// How far the set-up is.
    pub phase: Phase,
    /// Whether there is a secret store.
    pub configured: bool,
    /// Whether it is locked in this process.
    pub locked: bool,
}

impl State {
    fn of(configured: bool, open: bool, admins: bool, ready_admins: bool) -> Self {
        let phase = match () {
            () if !configured => Phase::AegisSetupRequired,
            () if !open => Phase::AegisUnlockRequired,
            () if !admins => Phase::AdminSetupRequired,
            () if !ready_admins => Phase::AdminRecoveryRequired,
            () => Phase::LoginRequired,
        };
        Self { phase, configured, locked: configured && !open }
    }

    /// Adds the state to an error: clients of the reference read it there.
    #[must_use]
    pub fn explain(&self, error: Error) -> Error {
        error.with("phase", json!(self.phase)).with("configured", self.configured).with("locked", self.locked)
    }

    /// Refuses unless the set-up is complete.
    ///
    /// # Errors
    /// 423 `bootstrap_required` with the state.
    pub fn require_login_phase(&self) -> Result<()> {
        if self.phase == Phase::LoginRequired {
            return Ok(());
        }
        Err(self.explain(Error::new(Kind::Locked, "bootstrap_required", "The engine's set-up is not complete.")))
    }

    /// Refuses unless this is the phase.
    ///
    /// # Errors
    /// 409 `invalid_phase` with the state.
    pub fn require(&self, phase: Phase) -> Result<()> {
        if self.phase == phase {
            return Ok(());
        }
        Err(self.explain(Error::conflict("invalid_phase", "The engine's set-up is not at this step.")))
    }
}

/// The present state. The process does what the database says on the way: see [`Vault::follow`].
///
/// # Errors
/// When the database is away.
pub async fn state(pool: &db::Pool, vault: &Vault) -> Result<State> {
    let row = sqlx::query!(
        r#"SELECT (SELECT key_id FROM aegis) AS key_id,
                  EXISTS (SELECT 1 FROM users WHERE role = 'Admin') AS "admins!",
                  EXISTS (SELECT 1 FROM ready_admins) AS "ready!""#
    )
    .fetch_one(pool)
    .await?;
    let open = row.key_id.is_some_and(|key_id| vault.holds(key_id)) || vault.follow(pool).await?;
    Ok(State::of(row.key_id.is_some(), open, row.admins, row.ready))
}

#[derive(Serialize, Deserialize, ZeroizeOnDrop)]
#[serde(tag = "flow", rename_all = "lowercase")]
enum AdminState {
    Setup { username: String, display_name: String, verifier: String, secret: String },
    Recover { verifier: String, secret: String },
}

fn password(sent: &Sent) -> Result<passwords::Digest> {
    sent.chosen().map_err(|why| why.into_error("username and password are required", "password"))
}

fn already_initialized() -> Error {
    Error::conflict("bootstrap_already_initialized", "There is an account already.")
}

impl Access<'_> {
    /// Makes the secret store.
    ///
    /// # Errors
    /// 400 `invalid_request`; 409 `invalid_phase`, `already_configured`.
    pub async fn set_up_aegis(&self, client: &Client, cipher: &Secret<String>) -> Result<State> {
        aegis::cipher("cipher", cipher)?;
        state(self.pool, self.vault).await?.require(Phase::AegisSetupRequired)?;
        let mut tx = self.pool.begin().await?;
        let fresh = self.vault.set_up(&mut tx, cipher, &client.anonymous()).await?;
        tx.commit().await?;
        fresh.keep();
        state(self.pool, self.vault).await
    }

    /// Opens the secret store in this process.
    ///
    /// # Errors
    /// 400 `invalid_request`; 401 `invalid_cipher`; 409 `invalid_phase`; 429 `rate_limited`; 500 `corrupt_secret_store`.
    pub async fn unlock_aegis(&self, client: &Client, cipher: &Secret<String>) -> Result<State> {
        if cipher.expose().is_empty() {
            return Err(Error::field("invalid_request", "cipher", "is required."));
        }
        state(self.pool, self.vault).await?.require(Phase::AegisUnlockRequired)?;
        let limits = [(limits::UNLOCK, "aegis".to_owned()), (limits::ADDRESS, limits::address(client.ip))];
        let attempt = limits::attempt(self.pool, &limits).await?;
        let mut tx = self.pool.begin().await?;
        match self.vault.unlock(&mut tx, cipher, &client.anonymous()).await {
            Ok(fresh) => {
                tx.commit().await?;
                fresh.keep();
                limits::give_back(self.pool, attempt).await?;
                state(self.pool, self.vault).await
            }
            Err(error) => {
                tx.rollback().await?;
                if error.code == "invalid_cipher" {
                    record_refusal(*self, &client.anonymous(), "aegis.unlock", None, "wrong cipher").await?;
                }
                Err(error)
            }
        }
    }

    /// Has the secret store opened by another cipher from now on.
    ///
    /// # Errors
    /// 400 `invalid_request`; 401 `invalid_cipher`; 403 `step_up_required`; 409 `not_configured`; 429 `rate_limited`.
    pub async fn rotate_aegis(
        &self,
        client: &Client,
        session: &Session,
        current: &Secret<String>,
        new: &Secret<String>,
    ) -> Result<()> {
        session.require_step_up()?;
        aegis::cipher("new_cipher", new)?;
        // Counted apart from wrong ciphers of an unlock, which must stay possible.
        let limits = [(limits::UNLOCK, format!("rotate:{}", session.user_id)), (limits::ADDRESS, limits::address(client.ip))];
        let attempt = limits::attempt(self.pool, &limits).await?;
        let actor = client.acting_as(session.user_id, &session.username);
        let mut tx = self.pool.begin().await?;
        match self.vault.rotate(&mut tx, current, new, &actor).await {
            Ok(()) => {
                tx.commit().await?;
                limits::give_back(self.pool, attempt).await
            }
            Err(error) => {
                tx.rollback().await?;
                if error.code == "invalid_cipher" {
                    record_refusal(*self, &actor, "aegis.rotate", None, "wrong cipher").await?;
                } else {
                    limits::give_back(self.pool, attempt).await?;
                }
                Err(error)
            }
        }
    }

    /// Ends the secret store and everything sealed in it; see [`Vault::reset`]. `confirm` must say `reset`.
    ///
    /// # Errors
    /// 400 `confirmation_required`; 403 `step_up_required`; 409 `not_configured`.
    pub async fn force_reset(&self, client: &Client, session: &Session, confirm: &str) -> Result<Taken> {
        if confirm != "reset" {
            let why = "must be \"reset\": everything sealed is lost, and nobody can sign in any more.";
            return Err(Error::field("confirmation_required", "confirm", why));
        }
        session.require_step_up()?;
        self.vault.reset(self.pool, &client.acting_as(session.user_id, &session.username)).await
    }

    /// Begins the set-up of the first administrator, who exists only once a code has been typed.
    ///
    /// # Errors
    /// 400 `username and password are required`, `invalid_username`, `invalid_display_name`, `password_too_short`;
    /// 409 `invalid_phase`, `bootstrap_already_initialized`.
    pub async fn set_up_admin(&self, username: &str, display_name: Option<&str>, sent: &Sent) -> Result<Pending> {
        if username.trim().is_empty() {
            return Err(Error::field("username and password are required", "username", "is required."));
        }
        let username = users::username(username)?;
        let display_name = users::display_name(display_name, username.as_str())?;
        let digest = password(sent)?;
        state(self.pool, self.vault).await?.require(Phase::AdminSetupRequired)?;
        if sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM users) AS "any!""#).fetch_one(self.pool).await? {
            return Err(already_initialized());
        }
        let verifier = passwords::verifier(&digest).await?;
        let secret = mfa::new_secret();
        let admin = AdminState::Setup {
            username: username.as_str().to_owned(),
            display_name,
            verifier: verifier.expose().clone(),
            secret: secret.expose().clone(),
        };
        self.begin_admin(None, username.into_string(), secret, &admin).await
    }

    /// Begins the recovery of an administrator when none can sign in.
    ///
    /// # Errors
    /// 400 as [`Access::set_up_admin`]; 404 `admin_not_found`; 409 `invalid_phase`, `admin_recovery_not_required`.
    pub async fn recover_admin(&self, username: &str, sent: &Sent) -> Result<Pending> {
        if username.trim().is_empty() {
            return Err(Error::field("username and password are required", "username", "is required."));
        }
        let digest = password(sent)?;
        state(self.pool, self.vault).await?.require(Phase::AdminRecoveryRequired)?;
        let row = sqlx::query!(
            "SELECT id, username, auth_reset_required, password_sealed IS NOT NULL AS \"has_password!\" FROM users
             WHERE username_key = ANY($1) AND role = 'Admin' AND auth_source = 'local' ORDER BY username_key LIMIT 1",
            &names::lookup_keys(username.trim()),
        )
        .fetch_optional(self.pool)
        .await?
        .ok_or_else(|| Error::new(Kind::NotFound, "admin_not_found", "There is no such administrator."))?;
        if row.has_password && !row.auth_reset_required {
            return Err(Error::conflict("admin_recovery_not_required", "This administrator can sign in."));
        }
        let verifier = passwords::verifier(&digest).await?;
        let secret = mfa::new_secret();
        let admin = AdminState::Recover { verifier: verifier.expose().clone(), secret: secret.expose().clone() };
        self.begin_admin(Some(row.id), row.username, secret, &admin).await
    }

    async fn begin_admin(
        &self,
        user_id: Option<i64>,
        username: String,
        secret: Secret<String>,
        admin: &AdminState,
    ) -> Result<Pending> {
        let mut tx = self.pool.begin().await?;
        let token = challenges::begin(&mut tx, self.vault, Purpose::BootstrapAdmin, user_id, admin).await?;
        tx.commit().await?;
        let enrollment = Some(self.enrollment(secret, &username)?);
        Ok(Pending { stage: Stage::Setup, token, username, role: "Admin".to_owned(), enrollment })
    }

    /// Takes the code that proves the administrator's second factor, writes the account and signs it in.
    ///
    /// # Errors
    /// 400 `invalid_code` when it is no code; 401 `bootstrap_pending`, `invalid_session`, `expired`, `invalid_code`;
    /// 404 `admin_not_found`; 409 `bootstrap_already_initialized`, `username already exists`; 423 `bootstrap_required`;
    /// 429 `rate_limited`.
    pub async fn verify_admin(&self, client: &Client, token: &Secret<String>, code: &str) -> Result<SignedIn> {
        if token.expose().is_empty() {
            return Err(Error::new(
                Kind::Unauthenticated,
                "bootstrap_pending",
                "No set-up waits for a code; pending_token is required.",
            ));
        }
        let code = mfa::digits(code)?;
        let state = state(self.pool, self.vault).await?;
        if matches!(state.phase, Phase::AegisSetupRequired | Phase::AegisUnlockRequired) {
            return Err(state.explain(Error::new(Kind::Locked, "bootstrap_required", "The secret store is not open.")));
        }
        challenges::owner(self.pool, Purpose::BootstrapAdmin, token).await?.ok_or_else(challenges::invalid)?;
        let limits = [(limits::MFA, "bootstrap".to_owned()), (limits::ADDRESS, limits::address(client.ip))];
        let attempt = limits::attempt(self.pool, &limits).await?;
        let mut tx = self.pool.begin().await?;
        let challenge = challenges::find::<AdminState>(&mut tx, self.vault, Purpose::BootstrapAdmin, token).await?;
        let (AdminState::Setup { secret, .. } | AdminState::Recover { secret, .. }) = &challenge.state;
        let secret = Secret::new(secret.clone());
        let Some(step) = mfa::accepted_step(&secret, &code, Utc::now(), 0)? else {
            challenges::failed(&mut tx, challenge.id).await?;
            let entry =
                Entry { action: "bootstrap.admin", failed: true, detail: json!({ "reason": "wrong code" }), ..Entry::default() };
            audit::record(&mut tx, &client.anonymous(), entry).await?;
            tx.commit().await?;
            let mut error = Error::new(Kind::Unauthenticated, "invalid_code", "The code is wrong.");
            error.fields.insert("code".to_owned(), "is wrong.".to_owned());
            return Err(error);
        };
        challenges::used(&mut tx, challenge.id).await?;
        // Two set-ups at the same moment: the second waits, and then sees the first one's account.
        sqlx::query!("LOCK TABLE users IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
        let (user_id, verifier, action) = match (&challenge.state, challenge.user_id) {
            (AdminState::Setup { username, display_name, verifier, .. }, _) => {
                if sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM users) AS "any!""#).fetch_one(&mut *tx).await? {
                    return Err(already_initialized());
                }
                let username = users::username(username)?;
                (users::insert(&mut tx, &username, display_name, users::Role::Admin).await?, verifier, "bootstrap.admin")
            }
            (AdminState::Recover { verifier, .. }, user_id) => {
                let ready =
                    sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM ready_admins) AS "ready!""#).fetch_one(&mut *tx).await?;
                if ready {
                    return Err(Error::conflict("admin_recovery_not_required", "An administrator can sign in."));
                }
                let user_id = sqlx::query_scalar!(
                    "UPDATE users SET auth_reset_required = false, mfa_disabled = false, password_change_required = false
                     WHERE id = $1 AND role = 'Admin' AND auth_source = 'local' RETURNING id",
                    user_id,
                )
                .fetch_optional(&mut *tx)
                .await?
                .ok_or_else(|| Error::new(Kind::NotFound, "admin_not_found", "There is no such administrator."))?;
                sessions::end_all(&mut tx, user_id, None).await?;
                passkeys::remove_all(&mut tx, user_id).await?;
                api_tokens::revoke_all(&mut tx, user_id).await?;
                (user_id, verifier, "bootstrap.recover")
            }
        };
        let password = self.vault.seal(&mut tx, PASSWORD, user_id, verifier).await?;
        let mfa_secret = self.vault.seal(&mut tx, MFA_SECRET, user_id, secret.expose()).await?;
        sqlx::query!(
            "UPDATE users SET password_sealed = $2, mfa_secret_sealed = $3, mfa_last_step = $4, updated_at = now() WHERE id = $1",
            user_id,
            password,
            mfa_secret,
            step,
        )
        .execute(&mut *tx)
        .await?;
        let entry = Entry { action, object_kind: "user", object_id: user_id.to_string(), ..Entry::default() };
        audit::record(&mut tx, &client.anonymous(), entry).await?;
        let signed_in = self.complete_new(&mut tx, client, user_id).await?;
        tx.commit().await?;
        limits::give_back(self.pool, attempt).await?;
        Ok(signed_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_condition_that_holds_is_the_phase() {
        let phase = |configured, open, admins, ready| State::of(configured, open, admins, ready).phase;
        assert_eq!(phase(false, false, true, true), Phase::AegisSetupRequired);
        assert_eq!(phase(true, false, true, true), Phase::AegisUnlockRequired);
        assert_eq!(phase(true, true, false, false), Phase::AdminSetupRequired);
        assert_eq!(phase(true, true, true, false), Phase::AdminRecoveryRequired);
        assert_eq!(phase(true, true, true, true), Phase::LoginRequired);
        assert!(State::of(true, false, true, true).locked && !State::of(false, false, false, false).locked);
        assert_eq!(
            json!(State::of(true, true, true, true)),
            json!({"phase": "login_required", "configured": true, "locked": false})
        );
        let error = State::of(true, false, true, true).require_login_phase().unwrap_err();
        assert_eq!((error.code, error.extra["phase"].as_str()), ("bootstrap_required", Some("aegis_unlock_required")));
    }
}
