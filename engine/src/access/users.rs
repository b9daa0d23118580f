//! Operator accounts and the sites they may see. Administrators only.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde_json::json;
use uuid::Uuid;

use super::{
    aegis::Vault,
    api_tokens, challenges, passkeys,
    passwords::{self, Sent},
    sessions,
    sign_in::{PASSWORD, directory_user, user_not_found},
};
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::Actor,
    secret::Secret,
};

/// The most characters of a username.
pub const USERNAME_MAX_CHARS: usize = 64;
/// The most characters of a display name.
pub const DISPLAY_NAME_MAX_CHARS: usize = 200;
/// The most names or sites in one request.
pub const BATCH_MAX: usize = 1000;

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
pub enum Role {
    /// Everything, everywhere.
    Admin,
    /// Work on the sites assigned.
    User,
}

impl Role {
    /// The text stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Reads a role, any case.
    ///
    /// # Errors
    /// 400 `invalid role`.
    pub fn parse(text: &str) -> Result<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "admin" => Ok(Self::Admin),
            "user" => Ok(Self::User),
            _ => Err(Error::field("invalid role", "role", "must be Admin or User.")),
        }
    }
}

/// What a username may be. It stands in paths.
pub(super) const USERNAME: Rule =
    Rule { field: "username", code: "invalid_username", max_chars: USERNAME_MAX_CHARS, in_paths: true };

/// Reads a new username.
///
/// # Errors
/// 400 `invalid_username`.
pub fn username(text: &str) -> Result<Name> {
    Name::parse(text, &USERNAME)
}

/// Checks a new display name and trims it; without one it is the username.
///
/// # Errors
/// 400 `invalid_display_name`.
pub fn display_name(text: Option<&str>, username: &str) -> Result<String> {
    let name = text.map(str::trim).filter(|name| !name.is_empty()).unwrap_or(username);
    let rule = Rule { field: "display_name", code: "invalid_display_name", max_chars: DISPLAY_NAME_MAX_CHARS, in_paths: false };
    Name::parse(name, &rule).map(Name::into_string)
}

/// One line of the user list.
#[derive(Debug, Clone)]
pub struct User {
    /// Its id.
    pub id: i64,
    /// The name to sign in with.
    pub username: String,
    /// The name to show.
    pub display_name: String,
    /// `Admin` or `User`.
    pub role: String,
    /// The last completed sign-in.
    pub last_login: Option<DateTime<Utc>>,
    /// When the account was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
    /// Whether a second factor is waived.
    pub mfa_disabled: bool,
    /// Whether the account must be recovered before it can sign in.
    pub auth_reset_required: bool,
    /// Since when, while it must.
    pub auth_reset_at: Option<DateTime<Utc>>,
    /// Whether the user must choose a password before anything else.
    pub password_change_required: bool,
    /// `local` or `directory`.
    pub auth_source: String,
    /// The directory it comes from.
    pub directory_provider_id: Option<i64>,
    /// Its name, or empty.
    pub directory_provider_name: String,
    /// The domain it was known by, or empty.
    pub directory_domain: String,
    /// Whether the directory has disabled it.
    pub directory_disabled: bool,
}

/// Every user, by name.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool) -> Result<Vec<User>> {
    Ok(sqlx::query_as!(
        User,
        r#"SELECT u.id, u.username, u.display_name, u.role, u.last_login, u.created_at, u.updated_at, u.mfa_disabled,
                u.auth_reset_required, u.auth_reset_at, u.password_change_required, u.auth_source, u.directory_provider_id,
                coalesce(p.name, '') AS "directory_provider_name!", u.directory_domain, u.directory_disabled
         FROM users u LEFT JOIN directory_providers p ON p.id = u.directory_provider_id ORDER BY u.username_key"#
    )
    .fetch_all(pool)
    .await?)
}

/// The id of the user of this name, any case.
///
/// # Errors
/// 404 `user not found`.
pub async fn id_of(pool: &db::Pool, username: &str) -> Result<i64> {
    let keys = names::lookup_keys(username.trim());
    sqlx::query_scalar!("SELECT id FROM users WHERE username_key = ANY($1) ORDER BY username_key LIMIT 1", &keys)
        .fetch_optional(pool)
        .await?
        .ok_or_else(user_not_found)
}

/// One user.
///
/// # Errors
/// 404 `user not found`.
pub async fn get(pool: &db::Pool, id: i64) -> Result<User> {
    sqlx::query_as!(
        User,
        r#"SELECT u.id, u.username, u.display_name, u.role, u.last_login, u.created_at, u.updated_at, u.mfa_disabled,
                u.auth_reset_required, u.auth_reset_at, u.password_change_required, u.auth_source, u.directory_provider_id,
                coalesce(p.name, '') AS "directory_provider_name!", u.directory_domain, u.directory_disabled
         FROM users u LEFT JOIN directory_providers p ON p.id = u.directory_provider_id WHERE u.id = $1"#,
        id,
    )
    .fetch_optional(pool)
    .await?
    .ok_or_else(user_not_found)
}

/// Writes the row of a new local account, without a password.
///
/// # Errors
/// 409 `username already exists`.
pub(super) async fn insert(tx: &mut db::Tx<'_>, username: &Name, display_name: &str, role: Role) -> Result<i64> {
    sqlx::query_scalar!(
        "INSERT INTO users (username, username_key, display_name, role) VALUES ($1, $2, $3, $4) RETURNING id",
        username.as_str(),
        username.key(),
        display_name,
        role.as_str(),
    )
    .fetch_one(&mut **tx)
    .await
    .map_err(|error| {
        Error::from(error).on_constraint("users_username_key", || {
            Error::conflict("username already exists", "There is a user of this name already.")
        })
    })
}

/// What a new account is made of.
#[derive(Debug, Clone, Default)]
pub struct New {
    /// The name to sign in with.
    pub username: String,
    /// The name to show.
    pub display_name: Option<String>,
    /// The role; `User` when absent.
    pub role: Option<String>,
    /// The first password.
    pub password: Sent,
}

/// Makes an account. Its user sets a second factor up and chooses another password at the first sign-in: who has made the account
/// does not know the lasting one.
///
/// # Errors
/// 400 `username and password are required`, `invalid_username`, `invalid_display_name`, `invalid role`,
/// `password_too_short`; 409 `username already exists`.
pub async fn create(pool: &db::Pool, vault: &Vault, actor: &Actor, new: &New) -> Result<i64> {
    const REQUIRED: &str = "username and password are required";
    if new.username.trim().is_empty() {
        return Err(Error::field(REQUIRED, "username", "is required."));
    }
    let name = username(&new.username)?;
    let display_name = display_name(new.display_name.as_deref(), name.as_str())?;
    let role = new.role.as_deref().map_or(Ok(Role::User), Role::parse)?;
    let digest = new.password.chosen().map_err(|why| why.into_error(REQUIRED, "password"))?;
    let verifier = passwords::verifier(&digest).await?;
    let mut tx = pool.begin().await?;
    let id = insert(&mut tx, &name, &display_name, role).await?;
    let sealed = vault.seal(&mut tx, PASSWORD, id, verifier.expose()).await?;
    sqlx::query!("UPDATE users SET password_sealed = $2, password_change_required = true WHERE id = $1", id, sealed)
        .execute(&mut *tx)
        .await?;
    let detail = json!({ "username": name.as_str(), "role": role.as_str() });
    record(&mut tx, actor, "user.create", id, detail).await?;
    tx.commit().await?;
    Ok(id)
}

async fn record(tx: &mut db::Tx<'_>, actor: &Actor, action: &str, id: i64, detail: serde_json::Value) -> Result<()> {
    audit::record(tx, actor, Entry { action, object_kind: "user", object_id: id.to_string(), detail, ..Entry::default() }).await
}

struct Named {
    id: i64,
    username: String,
    role: String,
    auth_source: String,
    directory_disabled: bool,
}

/// Locks the named user, after every administrator's row: so of two requests that would each take away one of the last
/// two administrators, the second sees what the first did.
async fn lock_with_admins(tx: &mut db::Tx<'_>, username: &str) -> Result<Named> {
    sqlx::query_scalar!("SELECT id FROM users WHERE role = 'Admin' ORDER BY id FOR UPDATE").fetch_all(&mut **tx).await?;
    lock(tx, username).await
}

async fn lock(tx: &mut db::Tx<'_>, username: &str) -> Result<Named> {
    sqlx::query_as!(
        Named,
        "SELECT id, username, role, auth_source, directory_disabled FROM users
         WHERE username_key = ANY($1) ORDER BY username_key LIMIT 1 FOR UPDATE",
        &names::lookup_keys(username.trim()),
    )
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(user_not_found)
}

/// Whether a local administrator who can sign in is left when `id` is none any more.
async fn admin_left_without(tx: &mut db::Tx<'_>, id: i64) -> Result<bool> {
    Ok(sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM ready_admins WHERE id <> $1) AS "left!""#, id,)
        .fetch_one(&mut **tx)
        .await?)
}

/// Removes an account with its sessions and site assignments; the ids of the sessions are returned.
///
/// # Errors
/// 400 `cannot_delete_self`, `last_user`, `last_admin`; 403 `directory_user_local_action_disabled`; 404 `user not found`.
pub async fn delete(pool: &db::Pool, actor: &Actor, own_id: i64, username: &str) -> Result<Vec<Uuid>> {
    let mut tx = pool.begin().await?;
    let user = lock_with_admins(&mut tx, username).await?;
    let others = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM users WHERE id <> $1) AS "others!""#, user.id)
        .fetch_one(&mut *tx)
        .await?;
    if !others {
        return Err(Error::invalid("last_user", "The only user cannot be deleted."));
    }
    if user.id == own_id {
        return Err(Error::invalid("cannot_delete_self", "You cannot delete your own account."));
    }
    // One that is off can go: else its provider could never be removed.
    if user.auth_source != "local" && !user.directory_disabled {
        return Err(directory_user());
    }
    if user.role == "Admin" && !admin_left_without(&mut tx, user.id).await? {
        return Err(Error::invalid("last_admin", "The last local administrator cannot be deleted."));
    }
    let ended = sessions::end_all(&mut tx, user.id, None).await?;
    sqlx::query!("DELETE FROM users WHERE id = $1", user.id).execute(&mut *tx).await?;
    record(&mut tx, actor, "user.delete", user.id, json!({ "username": user.username, "role": user.role })).await?;
    tx.commit().await?;
    Ok(ended)
}

/// Switches the account of a directory's user off, which ends its sessions (their ids are returned), or on again.
pub(super) async fn set_directory_disabled(tx: &mut db::Tx<'_>, id: i64, disabled: bool) -> Result<Vec<Uuid>> {
    sqlx::query!(
        "UPDATE users SET directory_disabled = $2, directory_disabled_at = CASE WHEN $2 THEN now() END, updated_at = now()
         WHERE id = $1",
        id,
        disabled,
    )
    .execute(&mut **tx)
    .await?;
    if !disabled {
        return Ok(Vec::new());
    }
    challenges::end_all(tx, id).await?;
    sessions::end_all(tx, id, None).await
}

/// Changes a role; it counts from the user's next request.
///
/// # Errors
/// 400 `invalid role`, `cannot demote the last admin`; 403 `directory_user_local_action_disabled`; 404 `user not found`.
pub async fn set_role(pool: &db::Pool, actor: &Actor, username: &str, role: &str) -> Result<()> {
    let role = Role::parse(role)?;
    let mut tx = pool.begin().await?;
    let user = lock_with_admins(&mut tx, username).await?;
    if user.auth_source != "local" {
        return Err(directory_user());
    }
    if user.role == "Admin" && role == Role::User && !admin_left_without(&mut tx, user.id).await? {
        return Err(Error::invalid("cannot demote the last admin", "The last local administrator cannot be demoted."));
    }
    sqlx::query!("UPDATE users SET role = $2, updated_at = now() WHERE id = $1", user.id, role.as_str())
        .execute(&mut *tx)
        .await?;
    let detail = json!({ "username": user.username, "before": user.role, "after": role.as_str() });
    record(&mut tx, actor, "user.role", user.id, detail).await?;
    tx.commit().await?;
    Ok(())
}

/// Switches the second factor of a user on or off, and forgets their authenticator when `reset_secret`. All sessions end where
/// that asks for less or for another proof than before; their ids are returned.
///
/// # Errors
/// 403 `directory_mfa_required`: a directory's users always have a second factor; 404 `user not found`.
pub async fn set_mfa(pool: &db::Pool, actor: &Actor, username: &str, enabled: bool, reset_secret: bool) -> Result<Vec<Uuid>> {
    let mut tx = pool.begin().await?;
    let user = lock(&mut tx, username).await?;
    if user.auth_source != "local" && !enabled {
        return Err(Error::new(
            Kind::Forbidden,
            "directory_mfa_required",
            "Users of a directory always have a second factor; it can be reset but not switched off.",
        ));
    }
    sqlx::query!(
        "UPDATE users SET mfa_disabled = NOT $2, mfa_secret_sealed = CASE WHEN $3 THEN NULL ELSE mfa_secret_sealed END,
                mfa_last_step = CASE WHEN $3 THEN 0 ELSE mfa_last_step END, updated_at = now()
         WHERE id = $1",
        user.id,
        enabled,
        reset_secret,
    )
    .execute(&mut *tx)
    .await?;
    let mut ended = Vec::new();
    if reset_secret || !enabled {
        ended = sessions::end_all(&mut tx, user.id, None).await?;
        challenges::end_all(&mut tx, user.id).await?;
    }
    let detail = json!({ "username": user.username, "enabled": enabled, "reset_secret": reset_secret });
    record(&mut tx, actor, "user.mfa", user.id, detail).await?;
    tx.commit().await?;
    Ok(ended)
}

/// Gives a user a password to begin with: the second factor is forgotten, all sessions end (their ids are returned) as API
/// tokens do, and the user must choose a password of their own after signing in.
///
/// # Errors
/// 400 `invalid password`, `password_too_short`, `cannot_reset_self`; 403 `directory_user_local_action_disabled`;
/// 404 `user not found`.
pub async fn reset_password(
    pool: &db::Pool,
    vault: &Vault,
    actor: &Actor,
    own_id: i64,
    username: &str,
    password: &Sent,
) -> Result<Vec<Uuid>> {
    let digest = password.chosen().map_err(|why| why.into_error("invalid password", "password"))?;
    let verifier = passwords::verifier(&digest).await?;
    let mut tx = pool.begin().await?;
    let user = lock(&mut tx, username).await?;
    if user.id == own_id {
        // Else a stolen session could take the account without knowing its password.
        return Err(Error::invalid("cannot_reset_self", "Change your own password with POST /api/auth/password/reset."));
    }
    let ended = reset_sign_in(&mut tx, vault, &user, &verifier).await?;
    record(&mut tx, actor, "user.reset_password", user.id, json!({ "username": user.username })).await?;
    tx.commit().await?;
    Ok(ended)
}

/// Sets a password that the local user has to change, and removes their other ways to sign in.
async fn reset_sign_in(tx: &mut db::Tx<'_>, vault: &Vault, user: &Named, verifier: &Secret<String>) -> Result<Vec<Uuid>> {
    if user.auth_source != "local" {
        return Err(directory_user());
    }
    let sealed = vault.seal(tx, PASSWORD, user.id, verifier.expose()).await?;
    sqlx::query!(
        "UPDATE users SET password_sealed = $2, mfa_secret_sealed = NULL, mfa_disabled = false, mfa_last_step = 0,
                auth_reset_required = false, password_change_required = true, updated_at = now()
         WHERE id = $1",
        user.id,
        sealed,
    )
    .execute(&mut **tx)
    .await?;
    let ended = sessions::end_all(tx, user.id, None).await?;
    challenges::end_all(tx, user.id).await?;
    passkeys::remove_all(tx, user.id).await?;
    api_tokens::revoke_all(tx, user.id).await?;
    Ok(ended)
}

/// Makes a local user an administrator who can sign in, from the console: answers a password to do it with, once. The second factor
/// is forgotten, and both it and a password of their own are chosen at the sign-in. A `User` is made an administrator only when
/// `promote` says so.
///
/// # Errors
/// 403 `directory_user_local_action_disabled`; 404 `user not found`; 409 `not_an_admin`; those of [`Vault::fence`].
pub async fn recover(pool: &db::Pool, vault: &Vault, actor: &Actor, username: &str, promote: bool) -> Result<Secret<String>> {
    let password = temporary_password();
    let sent = Sent { plain: Some(password.clone()), sha512: None };
    let digest = sent.chosen().map_err(|why| why.into_error("invalid password", "password"))?;
    let verifier = passwords::verifier(&digest).await?;
    let mut tx = pool.begin().await?;
    let user = lock(&mut tx, username).await?;
    if user.role != Role::Admin.as_str() && !promote {
        return Err(Error::conflict("not_an_admin", format!("{} is no administrator.", user.username)));
    }
    let ended = reset_sign_in(&mut tx, vault, &user, &verifier).await?;
    sqlx::query!("UPDATE users SET role = 'Admin' WHERE id = $1", user.id).execute(&mut *tx).await?;
    let detail = json!({ "username": user.username, "role_before": user.role, "sessions": ended });
    record(&mut tx, actor, "user.recover", user.id, detail).await?;
    tx.commit().await?;
    Ok(password)
}

/// 100 random bits in characters that cannot be taken for one another.
fn temporary_password() -> Secret<String> {
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut text = String::with_capacity(23);
    for at in 0..20 {
        if at > 0 && at % 5 == 0 {
            text.push('-');
        }
        text.push(char::from(ALPHABET[usize::from(rand::random::<u8>() % 32)]));
    }
    Secret::new(text)
}

/// Ends every session of a user, or of everybody; answers how many.
///
/// # Errors
/// When the database is away.
pub async fn end_sessions(pool: &db::Pool, actor: &Actor, user_id: Option<i64>) -> Result<usize> {
    let mut tx = pool.begin().await?;
    let ended =
        sqlx::query!("DELETE FROM operator_sessions WHERE $1::bigint IS NULL OR user_id = $1 RETURNING user_id, id", user_id)
            .fetch_all(&mut *tx)
            .await?;
    let mut of: BTreeMap<i64, Vec<Uuid>> = BTreeMap::new();
    for session in &ended {
        of.entry(session.user_id).or_default().push(session.id);
    }
    for (user_id, sessions) in of {
        record(&mut tx, actor, "session.end", user_id, json!({ "sessions": sessions })).await?;
    }
    tx.commit().await?;
    Ok(ended.len())
}

/// Has all local users recovered before they sign in again, and takes the state of everybody's second factor; answers how many users
/// there are. Those of a directory have their password there, so they set up another second factor at their next sign-in. The caller
/// takes what is sealed.
///
/// # Errors
/// When the database is away.
pub(super) async fn require_reset(tx: &mut db::Tx<'_>) -> Result<u64> {
    // In the order of others who lock several.
    sqlx::query!("SELECT id FROM users ORDER BY id FOR UPDATE").fetch_all(&mut **tx).await?;
    let users = sqlx::query!(
        "UPDATE users SET auth_reset_required = (auth_source = 'local'), auth_reset_at = now(), mfa_disabled = false, mfa_last_step = 0,
                password_change_required = false, updated_at = now()"
    );
    Ok(users.execute(&mut **tx).await?.rows_affected())
}

/// A user named in a request about site assignments.
#[derive(Debug, Clone)]
pub struct Selected {
    /// Its id.
    pub id: i64,
    /// The name to sign in with.
    pub username: String,
    /// The name to show.
    pub display_name: String,
    /// `Admin` or `User`.
    pub role: String,
    /// The sites it may see: id and name, by name.
    pub sites: Vec<(i64, String)>,
}

/// The names of a request, trimmed, without repetitions (any case), in their order.
fn distinct(usernames: &[String]) -> Result<Vec<String>> {
    let mut seen = BTreeSet::new();
    let names: Vec<String> = usernames
        .iter()
        .map(|name| name.trim())
        .filter(|name| !name.is_empty() && seen.insert(names::key(name)))
        .map(str::to_owned)
        .collect();
    if names.is_empty() {
        return Err(Error::field("users_required", "usernames", "must name at least one user."));
    }
    if names.len() > BATCH_MAX {
        return Err(Error::field("too_many_users", "usernames", format!("must name at most {BATCH_MAX} users.")));
    }
    Ok(names)
}

async fn select(tx: &mut db::Tx<'_>, usernames: &[String]) -> Result<Vec<Selected>> {
    let names = distinct(usernames)?;
    let keys: Vec<String> = names.iter().flat_map(|name| names::lookup_keys(name)).collect();
    let rows = sqlx::query!(
        r#"SELECT u.id, u.username, u.username_key, u.display_name, u.role,
                  ARRAY(SELECT s.id FROM user_site_assignments a JOIN sites s ON s.id = a.site_id
                        WHERE a.user_id = u.id ORDER BY s.name_key) AS "site_ids!",
                  ARRAY(SELECT s.name FROM user_site_assignments a JOIN sites s ON s.id = a.site_id
                        WHERE a.user_id = u.id ORDER BY s.name_key) AS "site_names!"
           FROM users u WHERE u.username_key = ANY($1) ORDER BY u.id FOR UPDATE OF u"#,
        &keys,
    )
    .fetch_all(&mut **tx)
    .await?;
    let mut by_key: BTreeMap<String, Selected> = BTreeMap::new();
    for row in rows {
        let sites = row.site_ids.into_iter().zip(row.site_names).collect();
        let user = Selected { id: row.id, username: row.username, display_name: row.display_name, role: row.role, sites };
        by_key.insert(row.username_key, user);
    }
    let (mut users, mut missing) = (Vec::new(), Vec::new());
    for name in names {
        match names::lookup_keys(&name).iter().find_map(|key| by_key.remove(key)) {
            Some(user) => users.push(user),
            None => missing.push(name),
        }
    }
    if !missing.is_empty() {
        return Err(
            Error::new(Kind::NotFound, "user_not_found", "Some of these users do not exist.").with("usernames", json!(missing))
        );
    }
    if let Some(admin) = users.iter().find(|user| user.role == "Admin") {
        return Err(Error::field(
            "admin_selected",
            "usernames",
            format!("{} is an administrator and sees every site.", admin.username),
        ));
    }
    Ok(users)
}

/// The named users with the sites they may see.
///
/// # Errors
/// 400 `users_required`, `too_many_users`, `admin_selected`; 404 `user_not_found`.
pub async fn selection(pool: &db::Pool, usernames: &[String]) -> Result<Vec<Selected>> {
    let mut tx = pool.begin().await?;
    let users = select(&mut tx, usernames).await?;
    tx.rollback().await?;
    Ok(users)
}

/// Replaces the sites of every named user. Returns how many users there were and the sites they have now.
///
/// # Errors
/// As [`selection`]; 400 `too_many_sites`; 404 `site_not_found`; 409 `directory_managed`.
pub async fn assign(pool: &db::Pool, actor: &Actor, usernames: &[String], site_ids: &[i64]) -> Result<(usize, Vec<i64>)> {
    let sites: Vec<i64> = site_ids.iter().copied().filter(|id| *id > 0).collect::<BTreeSet<_>>().into_iter().collect();
    if sites.len() > BATCH_MAX {
        return Err(Error::field("too_many_sites", "site_ids", format!("must name at most {BATCH_MAX} sites.")));
    }
    let mut tx = pool.begin().await?;
    // The sites are held against deletion until this is committed.
    let known =
        sqlx::query_scalar!("SELECT id FROM sites WHERE id = ANY($1) ORDER BY id FOR SHARE", &sites).fetch_all(&mut *tx).await?;
    let missing: Vec<i64> = sites.iter().copied().filter(|id| !known.contains(id)).collect();
    if !missing.is_empty() {
        return Err(
            Error::new(Kind::NotFound, "site_not_found", "Some of these sites do not exist.").with("site_ids", json!(missing))
        );
    }
    let users = select(&mut tx, usernames).await?;
    let ids: Vec<i64> = users.iter().map(|user| user.id).collect();
    let managed = sqlx::query_scalar!(
        "SELECT u.username FROM users u WHERE u.id = ANY($1)
         AND EXISTS (SELECT 1 FROM directory_site_mappings m WHERE m.provider_id = u.directory_provider_id) LIMIT 1",
        &ids,
    )
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(managed) = managed {
        let why = format!("The directory decides which sites {managed} sees; change the provider's site mappings.");
        return Err(Error::conflict("directory_managed", why));
    }
    sqlx::query!("DELETE FROM user_site_assignments WHERE user_id = ANY($1) AND site_id <> ALL($2)", &ids, &sites)
        .execute(&mut *tx)
        .await?;
    sqlx::query!(
        "INSERT INTO user_site_assignments (user_id, site_id)
         SELECT u, s FROM unnest($1::bigint[]) u CROSS JOIN unnest($2::bigint[]) s ON CONFLICT DO NOTHING",
        &ids,
        &sites,
    )
    .execute(&mut *tx)
    .await?;
    for user in &users {
        let before: Vec<i64> = user.sites.iter().map(|(id, _)| *id).collect();
        let detail = json!({ "username": user.username, "before": before, "after": sites });
        record(&mut tx, actor, "user.sites", user.id, detail).await?;
    }
    tx.commit().await?;
    Ok((users.len(), sites))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usernames_can_be_named_in_a_path() {
        assert_eq!(username(" ada ").unwrap().as_str(), "ada");
        assert_eq!(username("ada@example.org").unwrap().as_str(), "ada@example.org");
        for bad in ["", "  ", "a/b", "a\\b", "a\nb", ".", "..", &"x".repeat(65)] {
            let error = username(bad).unwrap_err();
            assert!(error.code == "invalid_username" && error.fields.contains_key("username"), "{bad:?}");
        }
    }

    #[test]
    fn roles_are_two_in_any_case() {
        assert_eq!(Role::parse(" aDMIN").unwrap(), Role::Admin);
        assert_eq!(Role::parse("user").unwrap(), Role::User);
        assert_eq!(Role::parse("root").unwrap_err().code, "invalid role");
    }

    #[test]
    fn display_names_default_to_the_username() {
        assert_eq!(display_name(None, "ada").unwrap(), "ada");
        assert_eq!(display_name(Some(" "), "ada").unwrap(), "ada");
        assert_eq!(display_name(Some(" Ada L. "), "ada").unwrap(), "Ada L.");
        assert!(display_name(Some(&"x".repeat(201)), "ada").is_err());
    }

    #[test]
    fn names_are_taken_once_in_their_order() {
        let names = |list: &[&str]| distinct(&list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&["Bob", " ada", "bob", ""]).unwrap(), ["Bob", "ada"]);
        assert_eq!(names(&["", " "]).unwrap_err().code, "users_required");
    }
}
