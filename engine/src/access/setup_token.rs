//! The setup token: what somebody must present during the set-up who does not sit at the machine. Each API process has one in its state
//! folder, and each token counts at all processes.

use std::path::{Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::{aegis, sessions};
use crate::{db, error::Result, secret::Secret};

fn file(state_dir: &Path) -> PathBuf {
    state_dir.join("secrets").join("setup.token")
}

/// What a token is kept as; none when it cannot be one.
fn hash(token: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
    (bytes.len() == 32).then(|| Sha256::digest(token).to_vec())
}

/// The token in the state folder, made when there is none (`<state>/secrets/setup.token`, 0600); as it is kept.
fn own(state_dir: &Path) -> Result<Vec<u8>> {
    let path = file(state_dir);
    let found = std::fs::read_to_string(&path).map(Secret::new).ok();
    if let Some(hash) = found.and_then(|text| hash(text.expose().trim())) {
        return Ok(hash);
    }
    let token = sessions::new_token();
    aegis::write_private(&path, format!("{}\n", token.expose()).as_bytes())?;
    hash(token.expose()).ok_or_else(|| crate::Error::bug("a new token is none"))
}

/// Makes the setup token of this process, if it has none, and lets it count everywhere.
///
/// # Errors
/// When the file cannot be written, or the database is away.
pub async fn ensure(pool: &db::Pool, state_dir: &Path) -> Result<()> {
    let hash = own(state_dir)?;
    sqlx::query!("INSERT INTO setup_tokens (hash) VALUES ($1) ON CONFLICT DO NOTHING", hash).execute(pool).await?;
    Ok(())
}

/// Whether `presented` is the setup token of one of the API processes.
///
/// # Errors
/// When the database is away.
pub async fn fits(pool: &db::Pool, presented: &[u8]) -> Result<bool> {
    let Some(hash) = std::str::from_utf8(presented).ok().and_then(hash) else { return Ok(false) };
    let known = sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM setup_tokens WHERE hash = $1) AS "known!""#, hash);
    Ok(known.fetch_one(pool).await?)
}

/// Removes the setup token of this process, and has none count any more: the set-up is complete. What cannot be removed is logged; a
/// process whose set-up is not complete makes its own count again.
pub async fn remove(pool: &db::Pool, state_dir: &Path) {
    let path = file(state_dir);
    if let Err(error) = std::fs::remove_file(&path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "the setup token could not be removed");
    }
    if let Err(error) = sqlx::query!("DELETE FROM setup_tokens").execute(pool).await {
        tracing::warn!(%error, "setup tokens still count");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_setup_token_is_made_once_and_a_damaged_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let first = own(folder.path()).unwrap();
        let path = file(folder.path());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(hash(std::fs::read_to_string(&path).unwrap().trim()), Some(first.clone()));
        assert_eq!(own(folder.path()).unwrap(), first);
        std::fs::write(&path, "").unwrap();
        let second = own(folder.path()).unwrap();
        assert_ne!(first, second);
        for none in ["", "x", "AAAA"] {
            assert_eq!(hash(none), None, "{none}");
        }
    }
}
