//! What a person has begun and not yet proven. A challenge is held by a random token, serves one purpose, works once,
//! ends after five minutes or five wrong codes, and its state stays on the server, sealed.

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{aegis::Vault, sessions};
use crate::{
    db,
    error::{Error, Kind, Result},
    secret::Secret,
};

/// How long a challenge is open, in seconds.
pub const OPEN_S: i32 = 300;
/// How many wrong codes it bears.
pub const MAX_FAILURES: i32 = 5;

/// What a challenge is for; the same set is a CHECK of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Purpose {
    /// The second step of a sign-in.
    Mfa,
    /// The first administrator's set-up, or an administrator's recovery.
    BootstrapAdmin,
    /// The registration of a passkey.
    PasskeyRegister,
    /// A sign-in with a passkey.
    PasskeyAuthenticate,
}

impl Purpose {
    /// The text stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// An open challenge, locked until the transaction it was found in ends.
#[derive(Debug)]
pub struct Challenge<S> {
    /// Its id.
    pub id: Uuid,
    /// Whose it is; none while the account does not exist yet.
    pub user_id: Option<i64>,
    /// What its purpose needs.
    pub state: S,
}

const COLUMN: &str = "auth_challenges.state";

/// Opens a challenge and returns its token.
///
/// # Errors
/// Those of [`Vault::fence`].
pub async fn begin<S: Serialize>(
    tx: &mut db::Tx<'_>,
    vault: &Vault,
    purpose: Purpose,
    user_id: Option<i64>,
    state: &S,
) -> Result<Secret<String>> {
    let id = Uuid::now_v7();
    let token = sessions::new_token();
    let plain = Secret::new(serde_json::to_string(state)?);
    let sealed = vault.seal(tx, COLUMN, id, plain.expose()).await?;
    sqlx::query!(
        "INSERT INTO auth_challenges (id, token_hash, purpose, user_id, state_sealed, expires_at)
         VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))",
        id,
        &Sha256::digest(token.expose())[..],
        purpose.as_str(),
        user_id,
        sealed,
        f64::from(OPEN_S),
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("DELETE FROM auth_challenges WHERE expires_at < now() - interval '1 hour'").execute(&mut **tx).await?;
    Ok(token)
}

/// Finds the open challenge behind `token` and locks it.
///
/// # Errors
/// 401 `invalid_session` when there is none for this purpose, or it was used, or has borne too many wrong codes;
/// 401 `expired`.
pub async fn find<S: DeserializeOwned>(
    tx: &mut db::Tx<'_>,
    vault: &Vault,
    purpose: Purpose,
    token: &Secret<String>,
) -> Result<Challenge<S>> {
    let row = sqlx::query!(
        r#"SELECT id, user_id, state_sealed, expires_at <= now() AS "expired!"
           FROM auth_challenges
           WHERE token_hash = $1 AND purpose = $2 AND used_at IS NULL AND failures < $3
           FOR UPDATE"#,
        &Sha256::digest(token.expose())[..],
        purpose.as_str(),
        MAX_FAILURES,
    )
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(invalid)?;
    if row.expired {
        return Err(Error::new(Kind::Unauthenticated, "expired", "This sign-in took too long; begin again."));
    }
    let state = vault.open(COLUMN, row.id, &row.state_sealed)?;
    Ok(Challenge { id: row.id, user_id: row.user_id, state: serde_json::from_str(state.expose())? })
}

/// Whose open challenge `token` names: none when there is no such challenge, `Some(None)` when its account does not exist
/// yet. For counting attempts before the challenge is locked.
///
/// # Errors
/// When the database is away.
pub async fn owner(pool: &db::Pool, purpose: Purpose, token: &Secret<String>) -> Result<Option<Option<i64>>> {
    Ok(sqlx::query_scalar!(
        "SELECT user_id FROM auth_challenges WHERE token_hash = $1 AND purpose = $2 AND used_at IS NULL AND failures < $3",
        &Sha256::digest(token.expose())[..],
        purpose.as_str(),
        MAX_FAILURES,
    )
    .fetch_optional(pool)
    .await?)
}

/// The answer for a challenge that is not there.
#[must_use]
pub fn invalid() -> Error {
    Error::new(Kind::Unauthenticated, "invalid_session", "This sign-in is not open any more; begin again.")
}

/// Counts a wrong code. The caller commits.
///
/// # Errors
/// When the database is away.
pub async fn failed(tx: &mut db::Tx<'_>, id: Uuid) -> Result<()> {
    sqlx::query!("UPDATE auth_challenges SET failures = failures + 1 WHERE id = $1", id).execute(&mut **tx).await?;
    Ok(())
}

/// Uses the challenge up.
///
/// # Errors
/// When the database is away.
pub async fn used(tx: &mut db::Tx<'_>, id: Uuid) -> Result<()> {
    sqlx::query!("UPDATE auth_challenges SET used_at = now() WHERE id = $1", id).execute(&mut **tx).await?;
    Ok(())
}

/// Ends every open challenge of a user: the password or second factor it began with is not theirs any more.
///
/// # Errors
/// When the database is away.
pub async fn end_all(tx: &mut db::Tx<'_>, user_id: i64) -> Result<()> {
    sqlx::query!("DELETE FROM auth_challenges WHERE user_id = $1", user_id).execute(&mut **tx).await?;
    Ok(())
}
