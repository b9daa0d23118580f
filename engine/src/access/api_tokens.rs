//! API tokens: what a program signs in with, in the name of its owner.
//!
//! A token acts as its owner: role and sites are read from the owner's row at each request, and its [`TokenScope`]s narrow
//! that further. It proves no person to be there, so it never stands for a [`Session`]: accounts, sessions and tokens are out of
//! its reach, and so is what asks for a step-up.

use chrono::{DateTime, Utc};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    sessions::{self, Session, TOUCH_AFTER_S},
    sign_in,
    users::Role,
};
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names::{Name, Rule},
    scope::{Actor, ActorKind, ActorToken, Scope},
    secret::Secret,
};

/// What every token begins with, so that people and scanners of secrets know one when they see it.
pub const PREFIX: &str = "brl_";
/// The most live tokens of one user.
pub const MAX: i64 = 50;
/// The most characters of a name.
pub const NAME_MAX_CHARS: usize = 80;
/// The longest life of a token, in days.
pub const LIFE_MAX_DAYS: i32 = 366;
/// The life of a token whose maker does not say, in days.
pub const LIFE_DEFAULT_DAYS: i32 = 90;
/// How long an expired token is still listed, in days; workers delete it then.
pub const KEPT_DAYS: i32 = 30;
/// How many of its last characters a token is known by.
const HINT_CHARS: usize = 4;

/// What a token may do. The same set is a CHECK of `api_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub enum TokenScope {
    /// Read whatever the owner may see.
    #[serde(rename = "read")]
    Read,
    /// Change assemblies.
    #[serde(rename = "assemblies:write")]
    AssembliesWrite,
    /// Admit devices, and change them.
    #[serde(rename = "devices:write")]
    DevicesWrite,
    /// Run things: jobs, their runs, quick runs and the history of these.
    #[serde(rename = "jobs:write")]
    JobsWrite,
    /// Change sites, and which devices are in them.
    #[serde(rename = "sites:write")]
    SitesWrite,
}

impl TokenScope {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Read, Self::AssembliesWrite, Self::DevicesWrite, Self::JobsWrite, Self::SitesWrite];

    /// The text stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::AssembliesWrite => "assemblies:write",
            Self::DevicesWrite => "devices:write",
            Self::JobsWrite => "jobs:write",
            Self::SitesWrite => "sites:write",
        }
    }
}

/// A live token as a request finds it, with its owner and the sites the owner may see.
#[derive(Debug, Clone)]
pub struct ApiToken {
    /// Its id.
    pub id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// The owner's id.
    pub user_id: i64,
    /// The owner's name, as stored.
    pub username: String,
    /// From the owner's row now.
    pub role: Role,
    /// Whether the owner must choose a password before anything else.
    pub password_change_required: bool,
    /// What the owner may see.
    pub scope: Scope,
    scopes: Vec<String>,
}

impl ApiToken {
    /// Refuses unless the token has the scope a route needs; a route that needs none is no token's.
    ///
    /// # Errors
    /// 403 `insufficient_scope`, naming the scope; `session_required`.
    pub fn require(&self, needed: Option<TokenScope>) -> Result<()> {
        let needed = needed.ok_or_else(session_required)?.as_str();
        if self.scopes.iter().any(|scope| scope == needed) {
            return Ok(());
        }
        Err(Error::new(Kind::Forbidden, "insufficient_scope", format!("This needs an API token with the scope {needed}."))
            .with("scope", needed))
    }

    /// Who acts, for the audit: the owner, by this token.
    #[must_use]
    pub fn actor(&self, ip: String) -> Actor {
        let token = Some(ActorToken { id: self.id, name: self.name.clone() });
        Actor { kind: ActorKind::Operator, id: self.user_id.to_string(), name: self.username.clone(), ip, token, session: None }
    }
}

/// The refusal of what only a signed-in person may do.
#[must_use]
pub fn session_required() -> Error {
    Error::new(Kind::Forbidden, "session_required", "API tokens may not do this; sign in.")
}

/// Whether a bearer token has the form of an API token. No session's has: it is shorter.
#[must_use]
pub fn is_one(token: &str) -> bool {
    token.strip_prefix(PREFIX).is_some_and(|random| random.len() == sessions::TOKEN_CHARS)
}

/// Finds the live token behind `token`: not expired, of a user who may sign in, in an engine whose set-up is complete. One
/// query. `ip` is where the request comes from.
///
/// # Errors
/// When the database is away.
pub async fn find(pool: &db::Pool, token: &str, ip: &str) -> Result<Option<ApiToken>> {
    let row = sqlx::query!(
        r#"SELECT t.id, t.name, t.scopes, t.last_used_at, t.user_id, u.username, u.role, u.password_change_required,
                  ARRAY(SELECT a.site_id FROM user_site_assignments a WHERE a.user_id = u.id ORDER BY a.site_id) AS "site_ids!"
           FROM api_tokens t JOIN users u ON u.id = t.user_id
           WHERE t.token_hash = $1 AND t.expires_at > now()
             AND u.may_sign_in
             AND EXISTS (SELECT 1 FROM aegis)
             AND EXISTS (SELECT 1 FROM ready_admins)"#,
        &Sha256::digest(token)[..],
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.last_used_at.is_none_or(|at| (Utc::now() - at).num_seconds() >= TOUCH_AFTER_S) {
        sqlx::query!(
            "UPDATE api_tokens SET last_used_at = now(), last_used_ip = $2
             WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < now() - make_interval(secs => 30))",
            row.id,
            ip,
        )
        .execute(pool)
        .await?;
    }
    let role = Role::parse(&row.role)?;
    Ok(Some(ApiToken {
        id: row.id,
        name: row.name,
        user_id: row.user_id,
        username: row.username,
        scope: if role == Role::Admin { Scope::All } else { Scope::Sites(row.site_ids) },
        role,
        password_change_required: row.password_change_required,
        scopes: row.scopes,
    }))
}

/// Which of these tokens still stand, by the same conditions as [`find`].
///
/// # Errors
/// When the database is away.
pub async fn standing(pool: &db::Pool, tokens: &[Uuid]) -> Result<Vec<Uuid>> {
    Ok(sqlx::query_scalar!(
        "SELECT t.id FROM api_tokens t JOIN users u ON u.id = t.user_id
         WHERE t.id = ANY($1) AND t.expires_at > now() AND u.may_sign_in
           AND EXISTS (SELECT 1 FROM aegis) AND EXISTS (SELECT 1 FROM ready_admins)",
        tokens,
    )
    .fetch_all(pool)
    .await?)
}

/// What a new token is asked to be.
#[derive(Debug, Clone, Default)]
pub struct New {
    /// What its owner calls it.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<String>,
    /// How long it lives, in days; by default [`LIFE_DEFAULT_DAYS`].
    pub expires_in_days: Option<i64>,
}

impl New {
    fn name(&self) -> Result<String> {
        let name = self.name.trim();
        if name.is_empty() {
            return Err(Error::field("name_required", "name", "is required."));
        }
        Name::parse(name, &Rule { field: "name", code: "invalid_name", max_chars: NAME_MAX_CHARS, in_paths: false })
            .map(Name::into_string)
    }

    /// Each scope once, in the order of [`TokenScope::ALL`].
    fn scopes(&self) -> Result<Vec<String>> {
        let known = TokenScope::ALL.map(TokenScope::as_str);
        if self.scopes.is_empty() || self.scopes.iter().any(|scope| !known.contains(&scope.as_str())) {
            return Err(Error::field("invalid_scope", "scopes", format!("must be some of {}.", known.join(", ")))
                .with("known", known.as_slice()));
        }
        Ok(known.iter().filter(|known| self.scopes.iter().any(|scope| scope == *known)).map(ToString::to_string).collect())
    }

    fn life_days(&self) -> Result<i32> {
        let days = self.expires_in_days.map_or(Ok(LIFE_DEFAULT_DAYS), i32::try_from);
        days.ok().filter(|days| (1..=LIFE_MAX_DAYS).contains(days)).ok_or_else(|| {
            Error::field("invalid_expiry", "expires_in_days", format!("must be between 1 and {LIFE_MAX_DAYS} days."))
        })
    }
}

/// A token as its owner sees it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its id; opens nothing.
    pub id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// Its last characters.
    pub hint: String,
    /// What it may do.
    pub scopes: Vec<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it ends, or ended.
    pub expires_at: DateTime<Utc>,
    /// When it was last used, to a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    /// The address it was used from then; empty when it has never been used.
    pub last_used_ip: String,
}

/// Makes a token for the session's user: the token itself, which is told this once, and how it is listed.
///
/// # Errors
/// 400 `name_required`, `invalid_name`, `invalid_scope`, `invalid_expiry`; 401 `unauthorized` when the session has just
/// ended; 403 `step_up_required`; 409 `too_many_tokens`.
pub async fn create(pool: &db::Pool, actor: &Actor, session: &Session, new: &New) -> Result<(Secret<String>, Listed)> {
    session.require_step_up()?;
    let (name, scopes, life_days) = (new.name()?, new.scopes()?, new.life_days()?);
    let token = Secret::new(format!("{PREFIX}{}", sessions::new_token().expose()));
    let hint = token.expose().get(token.expose().len() - HINT_CHARS..).unwrap_or_default();
    let mut tx = pool.begin().await?;
    sign_in::lock(&mut tx, session.user_id).await?.ok_or_else(sign_in::user_not_found)?;
    let live = sqlx::query_scalar!(
        r#"SELECT count(*) AS "count!" FROM api_tokens WHERE user_id = $1 AND expires_at > now()"#,
        session.user_id,
    )
    .fetch_one(&mut *tx)
    .await?;
    if live >= MAX {
        return Err(Error::conflict("too_many_tokens", format!("A user has at most {MAX} live API tokens; revoke one first.")));
    }
    // From the session's row, read under the lock: a session that has just been ended took the user's tokens with it.
    let made = sqlx::query_as!(
        Listed,
        "INSERT INTO api_tokens (id, user_id, name, token_hash, hint, scopes, expires_at)
         SELECT $1, s.user_id, $3, $4, $5, $6, now() + make_interval(days => $7) FROM operator_sessions s WHERE s.id = $2
         RETURNING id, name, hint, scopes, created_at, expires_at, last_used_at, last_used_ip",
        Uuid::now_v7(),
        session.id,
        name,
        &Sha256::digest(token.expose())[..],
        hint,
        &scopes,
        life_days,
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| Error::new(Kind::Unauthenticated, "unauthorized", "The session has ended."))?;
    let detail = json!({
        "username": session.username, "name": name, "hint": hint, "scopes": scopes, "expires_at": made.expires_at,
    });
    record(&mut tx, actor, "token.create", made.id, detail).await?;
    tx.commit().await?;
    Ok((token, made))
}

/// The tokens of a user, the newest first; those that expired in the last [`KEPT_DAYS`] too.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, user_id: i64) -> Result<Vec<Listed>> {
    Ok(sqlx::query_as!(
        Listed,
        "SELECT id, name, hint, scopes, created_at, expires_at, last_used_at, last_used_ip FROM api_tokens
         WHERE user_id = $1 AND expires_at > now() - make_interval(days => $2) ORDER BY created_at DESC, id DESC",
        user_id,
        KEPT_DAYS,
    )
    .fetch_all(pool)
    .await?)
}

/// Ends a token of a user.
///
/// # Errors
/// 404 `token_not_found`.
pub async fn revoke(pool: &db::Pool, actor: &Actor, user_id: i64, id: Uuid) -> Result<()> {
    let mut tx = pool.begin().await?;
    let gone = sqlx::query!(
        "DELETE FROM api_tokens t USING users u WHERE t.id = $1 AND t.user_id = $2 AND u.id = t.user_id
         RETURNING u.username, t.name, t.hint",
        id,
        user_id,
    )
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| Error::new(Kind::NotFound, "token_not_found", "The user has no such API token."))?;
    let detail = json!({"username": gone.username, "name": gone.name, "hint": gone.hint});
    record(&mut tx, actor, "token.revoke", id, detail).await?;
    tx.commit().await?;
    Ok(())
}

/// Ends every token of a user, and says how many there were.
///
/// # Errors
/// When the database is away.
pub async fn revoke_all(tx: &mut db::Tx<'_>, user_id: i64) -> Result<u64> {
    Ok(sqlx::query!("DELETE FROM api_tokens WHERE user_id = $1", user_id).execute(&mut **tx).await?.rows_affected())
}

async fn record(tx: &mut db::Tx<'_>, actor: &Actor, action: &str, id: Uuid, detail: serde_json::Value) -> Result<()> {
    let entry = Entry { action, object_kind: "api_token", object_id: id.to_string(), detail, ..Entry::default() };
    audit::record(tx, actor, entry).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_never_taken_for_a_token() {
        let random = sessions::new_token().expose().clone();
        assert!(is_one(&format!("{PREFIX}{random}")));
        assert!(!is_one(&random) && !is_one(PREFIX) && !is_one(""));
        let alike = format!("{PREFIX}{}", &random[PREFIX.len()..]);
        assert!(alike.len() == sessions::TOKEN_CHARS && !is_one(&alike));
    }

    #[test]
    fn scopes_are_known_and_come_once_in_their_order() {
        let scopes = |list: &[&str]| New { scopes: list.iter().map(ToString::to_string).collect(), ..New::default() }.scopes();
        assert_eq!(scopes(&["jobs:write", "read", "jobs:write"]).unwrap(), ["read", "jobs:write"]);
        for bad in [&[][..], &["jobs"], &["read", "*"], &["READ"], &[""]] {
            let error = scopes(bad).unwrap_err();
            assert!(error.code == "invalid_scope" && error.message.contains("devices:write"), "{bad:?}");
        }
        for scope in TokenScope::ALL {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.as_str());
        }
    }

    #[test]
    fn a_life_has_bounds() {
        let days = |days| New { expires_in_days: days, ..New::default() }.life_days().map_err(|error| error.code);
        assert_eq!((days(None), days(Some(1)), days(Some(366))), (Ok(90), Ok(1), Ok(366)));
        for bad in [i64::MIN, -1, 0, 367, i64::MAX] {
            assert_eq!(days(Some(bad)), Err("invalid_expiry"));
        }
    }
}
