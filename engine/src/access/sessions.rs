//! Operator sessions: an opaque random token with the client, its SHA-256 in the database, and every request looks it up.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::users::Role;
use crate::{
    db,
    error::{Error, Kind, Result},
    scope::{Actor, ActorKind, Scope},
    secret::Secret,
};

/// How long a step-up counts, in seconds.
pub const STEP_UP_S: i64 = 300;
/// How old `last_seen_at` may be before a request writes it again, in seconds.
pub(super) const TOUCH_AFTER_S: i64 = 60;
/// How long a token of 256 bits is, in characters of base64url.
pub(super) const TOKEN_CHARS: usize = 43;
const USER_AGENT_MAX_CHARS: usize = 256;

/// How long sessions live.
#[derive(Debug, Clone, Copy)]
pub struct Lifetimes {
    /// Without a request, in seconds. `BOREALIS_SESSION_IDLE_SECONDS`.
    pub idle_s: u32,
    /// At most, in seconds. `BOREALIS_TOKEN_TTL_SECONDS`.
    pub absolute_s: u32,
}

impl Default for Lifetimes {
    /// 12 hours idle, 30 days at most.
    fn default() -> Self {
        Self { idle_s: 12 * 3600, absolute_s: 30 * 24 * 3600 }
    }
}

/// A new random token of 256 bits, as 43 characters of base64url.
#[must_use]
pub fn new_token() -> Secret<String> {
    Secret::new(URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// A session as a request finds it, with its user and the sites the user may see.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its id.
    pub id: Uuid,
    /// The user's id.
    pub user_id: i64,
    /// The user's name, as stored.
    pub username: String,
    /// From the user's row now.
    pub role: Role,
    /// When the user last proved again who they are.
    pub stepped_up_at: Option<DateTime<Utc>>,
    /// Whether the user must choose a password of their own before anything else.
    pub password_change_required: bool,
    /// What the user may see.
    pub scope: Scope,
    /// The data key the secret store has now.
    pub key_id: Uuid,
    last_seen_at: DateTime<Utc>,
}

impl Session {
    /// Refuses when the last step-up is older than five minutes.
    ///
    /// # Errors
    /// 403 `step_up_required`.
    pub fn require_step_up(&self) -> Result<()> {
        require_step_up(self.stepped_up_at, Utc::now())
    }

    /// Who acts, for the audit.
    #[must_use]
    pub fn actor(&self, ip: String) -> Actor {
        let (id, name) = (self.user_id.to_string(), self.username.clone());
        Actor { kind: ActorKind::Operator, id, name, ip, session: Some(self.id), token: None }
    }
}

fn require_step_up(at: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Result<()> {
    if at.is_some_and(|at| (now - at).num_seconds() < STEP_UP_S) {
        return Ok(());
    }
    Err(Error::new(Kind::Forbidden, "step_up_required", "Prove again who you are: POST /api/auth/step-up."))
}

/// Opens a session; `stepped_up` when the sign-in proved as much as a step-up does.
///
/// # Errors
/// When the database is away.
pub async fn create(
    tx: &mut db::Tx<'_>,
    user_id: i64,
    lifetimes: Lifetimes,
    ip: &str,
    user_agent: &str,
    stepped_up: bool,
) -> Result<Secret<String>> {
    let token = new_token();
    let user_agent: String = user_agent.chars().filter(|c| !c.is_control()).take(USER_AGENT_MAX_CHARS).collect();
    sqlx::query!(
        "INSERT INTO operator_sessions (id, user_id, token_hash, expires_at, ip, user_agent, stepped_up_at)
         VALUES ($1, $2, $3, now() + make_interval(secs => $4), $5, $6, CASE WHEN $7 THEN now() END)",
        Uuid::now_v7(),
        user_id,
        &Sha256::digest(token.expose())[..],
        f64::from(lifetimes.absolute_s),
        ip,
        user_agent,
        stepped_up,
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!(
        "DELETE FROM operator_sessions WHERE expires_at < now() OR last_seen_at < now() - make_interval(secs => $1)",
        f64::from(lifetimes.idle_s),
    )
    .execute(&mut **tx)
    .await?;
    Ok(token)
}

/// Finds the live session behind `token`: not ended, not idle for too long, of a user who may sign in, in an engine
/// whose set-up is complete. One query.
///
/// # Errors
/// When the database is away.
pub async fn find(pool: &db::Pool, token: &str, lifetimes: Lifetimes) -> Result<Option<Session>> {
    let row = sqlx::query!(
        r#"SELECT s.id, s.last_seen_at, s.stepped_up_at, s.user_id, u.username, u.role, u.password_change_required, aegis.key_id,
                  ARRAY(SELECT a.site_id FROM user_site_assignments a WHERE a.user_id = u.id ORDER BY a.site_id) AS "site_ids!"
           FROM operator_sessions s JOIN users u ON u.id = s.user_id CROSS JOIN aegis
           WHERE s.token_hash = $1 AND s.expires_at > now() AND s.last_seen_at > now() - make_interval(secs => $2)
             AND u.may_sign_in
             AND EXISTS (SELECT 1 FROM ready_admins)"#,
        &Sha256::digest(token)[..],
        f64::from(lifetimes.idle_s),
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let role = Role::parse(&row.role)?;
    let session = Session {
        id: row.id,
        user_id: row.user_id,
        username: row.username,
        scope: if role == Role::Admin { Scope::All } else { Scope::Sites(row.site_ids) },
        role,
        stepped_up_at: row.stepped_up_at,
        password_change_required: row.password_change_required,
        key_id: row.key_id,
        last_seen_at: row.last_seen_at,
    };
    Ok(Some(session))
}

/// Remembers that somebody works with the session now. What a page goes on asking by itself is no work.
///
/// # Errors
/// When the database is away.
pub async fn touch(pool: &db::Pool, session: &Session) -> Result<()> {
    if (Utc::now() - session.last_seen_at).num_seconds() >= TOUCH_AFTER_S {
        sqlx::query!(
            "UPDATE operator_sessions SET last_seen_at = now()
             WHERE id = $1 AND last_seen_at < now() - make_interval(secs => 30)",
            session.id,
        )
        .execute(pool)
        .await?;
    }
    Ok(())
}

/// Remembers that the session's user has just proved again who they are.
///
/// # Errors
/// When the database is away.
pub async fn stepped_up(tx: &mut db::Tx<'_>, session: Uuid) -> Result<()> {
    sqlx::query!("UPDATE operator_sessions SET stepped_up_at = now() WHERE id = $1", session).execute(&mut **tx).await?;
    Ok(())
}

/// Ends one session.
///
/// # Errors
/// When the database is away.
pub async fn end(tx: &mut db::Tx<'_>, session: Uuid) -> Result<()> {
    sqlx::query!("DELETE FROM operator_sessions WHERE id = $1", session).execute(&mut **tx).await?;
    Ok(())
}

/// Ends every session of a user but `kept`, and says which.
///
/// # Errors
/// When the database is away.
pub async fn end_all(tx: &mut db::Tx<'_>, user_id: i64, kept: Option<Uuid>) -> Result<Vec<Uuid>> {
    Ok(sqlx::query_scalar!(
        "DELETE FROM operator_sessions WHERE user_id = $1 AND ($2::uuid IS NULL OR id <> $2) RETURNING id",
        user_id,
        kept,
    )
    .fetch_all(&mut **tx)
    .await?)
}

/// A session as its user sees it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its id; opens nothing.
    pub id: Uuid,
    /// When the user signed in.
    pub created_at: DateTime<Utc>,
    /// When it was last used, to a minute.
    pub last_seen_at: DateTime<Utc>,
    /// When it ends, if it does not end sooner for lack of use.
    pub expires_at: DateTime<Utc>,
    /// The address it was opened from.
    pub ip: String,
    /// What the client called itself then.
    pub user_agent: String,
}

/// The live sessions of a user, the one used last first.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, user_id: i64, lifetimes: Lifetimes) -> Result<Vec<Listed>> {
    Ok(sqlx::query_as!(
        Listed,
        "SELECT id, created_at, last_seen_at, expires_at, ip, user_agent FROM operator_sessions
         WHERE user_id = $1 AND expires_at > now() AND last_seen_at > now() - make_interval(secs => $2)
         ORDER BY last_seen_at DESC, id DESC",
        user_id,
        f64::from(lifetimes.idle_s),
    )
    .fetch_all(pool)
    .await?)
}

/// A live session, and whose it is.
#[derive(Debug, Clone)]
pub struct Owned {
    /// The user's name.
    pub username: String,
    /// The session.
    pub session: Listed,
}

/// The live sessions of everybody or of one user, by user, the one used last first.
///
/// # Errors
/// When the database is away.
pub async fn list_all(pool: &db::Pool, user_id: Option<i64>, idle_s: u32) -> Result<Vec<Owned>> {
    let rows = sqlx::query!(
        "SELECT u.username, s.id, s.created_at, s.last_seen_at, s.expires_at, s.ip, s.user_agent
         FROM operator_sessions s JOIN users u ON u.id = s.user_id
         WHERE ($1::bigint IS NULL OR s.user_id = $1) AND s.expires_at > now() AND s.last_seen_at > now() - make_interval(secs => $2)
         ORDER BY u.username_key, s.last_seen_at DESC, s.id DESC",
        user_id,
        f64::from(idle_s),
    )
    .fetch_all(pool)
    .await?;
    let owned = rows.into_iter().map(|row| Owned {
        username: row.username,
        session: Listed {
            id: row.id,
            created_at: row.created_at,
            last_seen_at: row.last_seen_at,
            expires_at: row.expires_at,
            ip: row.ip,
            user_agent: row.user_agent,
        },
    });
    Ok(owned.collect())
}

/// Ends one session of a user; whether there was one.
///
/// # Errors
/// When the database is away.
pub async fn end_of(tx: &mut db::Tx<'_>, user_id: i64, session: Uuid) -> Result<bool> {
    let ended = sqlx::query!("DELETE FROM operator_sessions WHERE id = $1 AND user_id = $2", session, user_id);
    Ok(ended.execute(&mut **tx).await?.rows_affected() == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_up_counts_for_five_minutes() {
        let now = Utc::now();
        let ago = |seconds| Some(now - chrono::Duration::seconds(seconds));
        assert!(require_step_up(ago(299), now).is_ok());
        assert_eq!(require_step_up(ago(300), now).unwrap_err().code, "step_up_required");
        assert_eq!(require_step_up(None, now).unwrap_err().code, "step_up_required");
    }

    #[test]
    fn tokens_are_256_bits_and_differ() {
        assert_eq!(new_token().expose().len(), TOKEN_CHARS);
        assert_ne!(new_token().expose(), new_token().expose());
    }
}
