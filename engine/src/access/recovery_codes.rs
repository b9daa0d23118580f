//! Recovery codes, for users who have lost the authenticator app. Each can be used once, in place of a code of the app, at sign-in only:
//! a step-up takes the password.

use chrono::{DateTime, Utc};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    access::{Access, Client, sessions::Session},
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    secret::Secret,
};

/// How many are made at a time.
pub const COUNT: usize = 10;
/// Characters of a code, without the dashes: 80 bits.
const CHARS: usize = 16;
/// Base32 (RFC 4648): no character is taken for another.
const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// A typed recovery code, in its one written form.
pub struct RecoveryCode(Secret<String>);

impl RecoveryCode {
    /// Reads what was typed: with or without dashes and blanks, in any case. None when it is something else.
    #[must_use]
    pub fn parse(typed: &str) -> Option<Self> {
        let code: String =
            typed.chars().filter(|c| !matches!(c, '-' | ' ')).take(CHARS + 1).map(|c| c.to_ascii_uppercase()).collect();
        let is_one = code.len() == CHARS && code.bytes().all(|byte| ALPHABET.contains(&byte));
        // A long number is a code of an app with something around it.
        (is_one && code.bytes().any(|byte| byte.is_ascii_alphabetic())).then(|| Self(Secret::new(code)))
    }

    fn new() -> Self {
        let bytes = rand::random::<[u8; CHARS]>();
        let code = bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
        Self(Secret::new(code))
    }

    /// As people read it: `ABCD-EFGH-IJKL-MNOP`.
    fn shown(&self) -> String {
        let code = self.0.expose();
        [&code[..4], &code[4..8], &code[8..12], &code[12..]].join("-")
    }

    fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0.expose()).into()
    }
}

/// Codes that are left, without telling them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// How many.
    pub count: i64,
    /// When they were made; none without any.
    pub made_at: Option<DateTime<Utc>>,
}

/// What is left of a user's codes.
///
/// # Errors
/// When the database is away.
pub async fn left(db: &mut sqlx::PgConnection, user_id: i64) -> Result<Left> {
    let query = sqlx::query_as!(
        Left,
        r#"SELECT count(*) AS "count!", max(made_at) AS made_at FROM recovery_codes WHERE user_id = $1"#,
        user_id
    );
    Ok(query.fetch_one(db).await?)
}

/// Uses a code up. Whether it was one.
pub(super) async fn use_up(tx: &mut db::Tx<'_>, user_id: i64, code: &RecoveryCode) -> Result<bool> {
    let hash = code.hash();
    let used = sqlx::query!("DELETE FROM recovery_codes WHERE user_id = $1 AND code_hash = $2", user_id, &hash[..])
        .execute(&mut **tx)
        .await?;
    Ok(used.rows_affected() == 1)
}

impl Access<'_> {
    /// Makes ten codes in place of all former ones, and tells them this once. The caller has asked for a step-up.
    ///
    /// # Errors
    /// 403 `step_up_required`, `mfa_not_configured` where there is no authenticator app they could stand for.
    pub async fn make_recovery_codes(&self, client: &Client, session: &Session) -> Result<Vec<String>> {
        session.require_step_up()?;
        let mut tx = self.pool.begin().await?;
        let has_app = sqlx::query_scalar!(
            r#"SELECT mfa_secret_sealed IS NOT NULL AS "has_app!" FROM users WHERE id = $1 FOR UPDATE"#,
            session.user_id
        )
        .fetch_optional(&mut *tx)
        .await?;
        if has_app != Some(true) {
            let why = "There is no authenticator app that a recovery code could stand for.";
            return Err(Error::new(Kind::Forbidden, "mfa_not_configured", why));
        }
        sqlx::query!("DELETE FROM recovery_codes WHERE user_id = $1", session.user_id).execute(&mut *tx).await?;
        let codes: Vec<RecoveryCode> = (0..COUNT).map(|_| RecoveryCode::new()).collect();
        let hashes: Vec<Vec<u8>> = codes.iter().map(|code| code.hash().to_vec()).collect();
        sqlx::query!(
            "INSERT INTO recovery_codes (user_id, code_hash) SELECT $1, * FROM unnest($2::bytea[])",
            session.user_id,
            &hashes
        )
        .execute(&mut *tx)
        .await?;
        let entry = Entry {
            action: "mfa.recovery_codes",
            object_kind: "user",
            object_id: session.user_id.to_string(),
            detail: json!({ "made": COUNT }),
            ..Entry::default()
        };
        audit::record(&mut tx, &client.acting_as(session.user_id, &session.username), entry).await?;
        tx.commit().await?;
        Ok(codes.iter().map(RecoveryCode::shown).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_read_as_people_type_it() {
        let code = RecoveryCode::new();
        let shown = code.shown();
        assert_eq!(shown.len(), 19);
        for typed in [shown.clone(), shown.to_lowercase(), shown.replace('-', ""), shown.replace('-', " "), format!(" {shown} ")]
        {
            assert_eq!(RecoveryCode::parse(&typed).expect("a code").hash(), code.hash(), "{typed}");
        }
        assert_ne!(RecoveryCode::new().hash(), code.hash());
        for other in
            ["", "123456", "123 456", "2345672345672345", "ABCD-EFGH-IJKL-MNO", "ABCD-EFGH-IJKL-MNOPQ", "ABCD-EFGH-IJKL-MN0P"]
        {
            assert!(RecoveryCode::parse(other).is_none(), "{other}");
        }
    }
}
