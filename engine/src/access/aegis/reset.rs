//! The end of a secret store: for when the cipher is lost, or may be in the wrong hands together with the database.

use std::time::Duration;

use serde_json::json;
use uuid::Uuid;

use super::{PROTECTED, Vault, not_configured};
use crate::{
    access::{credentials, directory, github, users},
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    jobs::store,
    scope::Actor,
};

/// How often a reset is tried when others hold what it needs.
const TRIES: u32 = 5;

/// What a reset took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Credentials that lost secrets.
    pub credentials: Vec<i64>,
    /// Scheduled jobs that used them and are off now.
    pub jobs: Vec<i64>,
    /// Users, who have neither password nor second factor any more.
    pub users: u64,
    /// Passkeys.
    pub passkeys: u64,
    /// Whether there was a GitHub token.
    pub github_token: bool,
    /// API tokens.
    pub api_tokens: u64,
    /// The sessions of everybody.
    pub sessions: Vec<Uuid>,
}

impl Vault {
    /// Takes the data key away, and with it everything sealed under it; see [`PROTECTED`]. All users are without password and second
    /// factor, all sessions and API tokens end, directories are off, credentials are marked as having lost their secrets and jobs that use them are off. The next phases
    /// are the set-up of a new secret store and the recovery of an administrator. The key itself is not needed.
    ///
    /// # Errors
    /// 409 `not_configured`; when the database is away.
    pub async fn reset(&self, pool: &db::Pool, actor: &Actor) -> Result<Taken> {
        let held = self.key_id();
        let mut tried = 1;
        let taken = loop {
            match self.try_reset(pool, actor).await {
                // Most likely a deadlock with a sign-in: those who hold rows of users and challenges take them in several orders.
                Err(error) if error.kind == Kind::Unavailable && tried < TRIES => tried += 1,
                ended => break ended?,
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        // Not one that somebody has set up since.
        if let Some(held) = held {
            self.forget(held);
        }
        Ok(taken)
    }

    async fn try_reset(&self, pool: &db::Pool, actor: &Actor) -> Result<Taken> {
        let mut tx = db::begin_wide(pool).await?;
        // The row is deleted first: this waits for transactions that are sealing, and no new one can begin. The statements below see all
        // that was sealed.
        if sqlx::query!("DELETE FROM aegis").execute(&mut *tx).await?.rows_affected() == 0 {
            return Err(not_configured());
        }
        let users = users::require_reset(&mut tx).await?;
        let credentials = credentials::lose_secrets(&mut tx).await?;
        let jobs = store::disable_with_credentials(&mut tx, actor, &credentials).await?;
        let passkeys = sqlx::query!("DELETE FROM passkeys").execute(&mut *tx).await?.rows_affected();
        let github_token = github::lose(&mut tx).await?;
        directory::lose_secrets(&mut tx).await?;
        let api_tokens = sqlx::query!("DELETE FROM api_tokens").execute(&mut *tx).await?.rows_affected();
        for column in PROTECTED {
            empty(&mut tx, column).await?;
        }
        // Whoever was about to complete a sign-in held the user's row. What else signs people in ends here, too.
        let sessions = sqlx::query_scalar!("DELETE FROM operator_sessions RETURNING id").fetch_all(&mut *tx).await?;
        let taken = Taken { credentials, jobs, users, passkeys, github_token, api_tokens, sessions };
        let detail = json!({
            "credentials": taken.credentials, "jobs": taken.jobs, "users": taken.users, "passkeys": taken.passkeys,
            "github_token": taken.github_token, "api_tokens": taken.api_tokens, "sessions": taken.sessions.len(),
        });
        let entry = Entry { action: "aegis.force_reset", object_kind: "aegis", detail, ..Entry::default() };
        audit::record(&mut tx, actor, entry).await?;
        // Before the commit: after it, the file may be the one of a new set-up.
        if let Some(path) = self.unseal().own()
            && let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "the unseal key, which opens nothing any more, could not be removed");
        }
        tx.commit().await?;
        Ok(taken)
    }
}

/// Empties a protected column; where it must not be empty, the rows go.
async fn empty(tx: &mut db::Tx<'_>, column: &str) -> Result<()> {
    let (table, column) = column.split_once('.').ok_or_else(|| Error::bug(format!("{column} names no column")))?;
    let column = format!("{column}_sealed");
    let needed = sqlx::query_scalar!(
        r#"SELECT attnotnull AS "needed!" FROM pg_attribute WHERE attrelid = ($1::text)::regclass AND attname = $2 AND NOT attisdropped"#,
        table,
        column,
    )
    .fetch_optional(&mut **tx)
    .await?
    .ok_or_else(|| Error::bug(format!("{table} has no column {column}")))?;
    let sql = match needed {
        true => format!("DELETE FROM {table}"),
        false => format!("UPDATE {table} SET {column} = NULL WHERE {column} IS NOT NULL"),
    };
    // Of names that are written in this program only.
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut **tx).await?;
    Ok(())
}
