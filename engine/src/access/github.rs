//! The token GitHub is asked with. It is sealed, and never comes back.

use chrono::{DateTime, Utc};
use serde_json::json;

use super::aegis::Vault;
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Result},
    scope::Actor,
    secret::Secret,
};

const TOKEN: &str = "github_token.token";
/// The most characters of a token.
pub const MAX_CHARS: usize = 512;

/// What is known of the token without opening it.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Whether there is one.
    pub has_token: bool,
    /// Its last four characters, or empty.
    pub hint: String,
    /// When a reset of the secret store took it, until another is set.
    pub reset_at: Option<DateTime<Utc>>,
}

/// What is stored.
///
/// # Errors
/// When the database is away.
pub async fn stored(pool: &db::Pool) -> Result<Stored> {
    let row = sqlx::query_as!(Stored, r#"SELECT token_sealed IS NOT NULL AS "has_token!", hint, reset_at FROM github_token"#,)
        .fetch_optional(pool)
        .await?;
    Ok(row.unwrap_or(Stored { has_token: false, hint: String::new(), reset_at: None }))
}

/// The token itself, for asking GitHub.
///
/// # Errors
/// 423 `aegis_locked`.
pub async fn token(pool: &db::Pool, vault: &Vault) -> Result<Option<Secret<String>>> {
    let sealed = sqlx::query_scalar!("SELECT token_sealed FROM github_token").fetch_optional(pool).await?.flatten();
    sealed.map(|sealed| vault.open(TOKEN, 1, &sealed)).transpose()
}

/// Replaces the token; an empty one removes it.
///
/// # Errors
/// 400 `invalid_token`; those of [`Vault::fence`].
pub async fn set(pool: &db::Pool, vault: &Vault, actor: &Actor, token: &Secret<String>) -> Result<()> {
    let text = token.expose().trim();
    if text.len() > MAX_CHARS || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        let why = format!("must have at most {MAX_CHARS} characters, letters, digits and signs only.");
        return Err(Error::field("invalid_token", "token", why));
    }
    let mut tx = pool.begin().await?;
    if text.is_empty() {
        sqlx::query!("DELETE FROM github_token").execute(&mut *tx).await?;
    } else {
        let sealed = vault.seal(&mut tx, TOKEN, 1, text).await?;
        // A short one would be told by its end.
        let hint = if text.len() >= 20 { &text[text.len() - 4..] } else { "" };
        sqlx::query!(
            "INSERT INTO github_token (id, token_sealed, hint) VALUES (1, $1, $2)
             ON CONFLICT (id) DO UPDATE SET token_sealed = $1, hint = $2, reset_at = NULL, updated_at = now()",
            sealed,
            hint,
        )
        .execute(&mut *tx)
        .await?;
    }
    let action = if text.is_empty() { "github_token.remove" } else { "github_token.set" };
    audit::record(&mut tx, actor, Entry { action, object_kind: "github_token", detail: json!({}), ..Entry::default() }).await?;
    tx.commit().await?;
    Ok(())
}

/// Takes the token away, as a reset of the secret store does, and remembers that; answers whether there was one.
pub(super) async fn lose(tx: &mut db::Tx<'_>) -> Result<bool> {
    let lost =
        sqlx::query!("UPDATE github_token SET token_sealed = NULL, hint = '', reset_at = now() WHERE token_sealed IS NOT NULL");
    Ok(lost.execute(&mut **tx).await?.rows_affected() > 0)
}
