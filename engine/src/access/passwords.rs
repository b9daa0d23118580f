//! Passwords. Clients send the password or its SHA-512 in hex; both are reduced to the digest, and an Argon2id verifier
//! over that digest is stored, sealed under Aegis.

use std::sync::OnceLock;

use argon2::{
    Algorithm, Argon2, Params, Version,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use sha2::{Digest as _, Sha512};
use subtle::ConstantTimeEq;

use super::aegis;
use crate::{
    error::{Error, Result},
    secret::Secret,
};

/// The fewest characters of a new password; can be checked only where the password itself is sent.
pub const MIN_CHARS: usize = 12;
/// The most bytes of a password.
pub const MAX_BYTES: usize = 1024;

// OWASP's second recommendation for Argon2id, with one more pass: 19 MiB, 3 passes, 1 lane.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 3;

/// A password reduced to the lower-case hex of its SHA-512.
#[derive(Debug, Clone)]
pub struct Digest(Secret<String>);

impl Digest {
    /// Reduces a password.
    #[must_use]
    pub fn of(password: &str) -> Self {
        Self(Secret::new(hex::encode(Sha512::digest(password.as_bytes()))))
    }

    /// Takes a digest a client has computed: 128 hex characters, any case.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        (text.len() == 128 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .then(|| Self(Secret::new(text.to_ascii_lowercase())))
    }

    /// Whether both are the same password; compared in constant time.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        self.0.expose().as_bytes().ct_eq(other.0.expose().as_bytes()).into()
    }
}

/// What a client sent: `password`, `password_sha512`, or both.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    /// The password itself.
    pub plain: Option<Secret<String>>,
    /// Its SHA-512 in hex.
    pub sha512: Option<Secret<String>>,
}

/// Why a [`Sent`] is no password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// Neither field has a value.
    Missing,
    /// The digest is not 128 hex characters, or not the digest of the password sent with it.
    Malformed,
    /// The password is shorter than [`MIN_CHARS`].
    TooShort,
    /// The password is longer than [`MAX_BYTES`].
    TooLong,
}

impl Sent {
    /// The password to compare with a stored one.
    ///
    /// # Errors
    /// Any [`Unusable`] but `TooShort`.
    pub fn presented(&self) -> Result<Digest, Unusable> {
        let filled = |text: &Option<Secret<String>>| text.clone().filter(|text| !text.expose().is_empty());
        match (filled(&self.plain), filled(&self.sha512)) {
            (None, None) => Err(Unusable::Missing),
            (Some(plain), _) if plain.expose().len() > MAX_BYTES => Err(Unusable::TooLong),
            (Some(plain), None) => Ok(Digest::of(plain.expose())),
            (None, Some(sha512)) => Digest::from_hex(sha512.expose()).ok_or(Unusable::Malformed),
            (Some(plain), Some(sha512)) => {
                let digest = Digest::of(plain.expose());
                let same = Digest::from_hex(sha512.expose()).is_some_and(|other| other.is(&digest));
                same.then_some(digest).ok_or(Unusable::Malformed)
            }
        }
    }

    /// The password to store as somebody's new one.
    ///
    /// # Errors
    /// Any [`Unusable`].
    pub fn chosen(&self) -> Result<Digest, Unusable> {
        if self.plain.as_ref().is_some_and(|plain| !plain.expose().is_empty() && plain.expose().chars().count() < MIN_CHARS) {
            return Err(Unusable::TooShort);
        }
        self.presented()
    }
}

impl Unusable {
    /// The client error, with `code` for the cases that have no code of their own.
    #[must_use]
    pub fn into_error(self, code: &'static str, field: &str) -> Error {
        match self {
            Self::Missing => Error::field(code, field, "is required (or its SHA-512 in hex)."),
            Self::Malformed => {
                Error::field(code, field, "the digest must be the SHA-512 of the password, as 128 hex characters.")
            }
            Self::TooShort => Error::field("password_too_short", field, format!("must have at least {MIN_CHARS} characters.")),
            Self::TooLong => Error::field("password_too_long", field, format!("must have at most {MAX_BYTES} bytes.")),
        }
    }
}

fn hasher() -> Result<Argon2<'static>> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, None).map_err(|error| Error::bug(error.to_string()))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

fn make(digest: &Digest) -> Result<Secret<String>> {
    let hash = hasher()?.hash_password(digest.0.expose().as_bytes()).map_err(|error| Error::bug(error.to_string()))?;
    Ok(Secret::new(hash.to_string()))
}

/// The verifier text of a password: an Argon2id PHC string, to be sealed.
///
/// # Errors
/// 503 `busy`.
pub async fn verifier(digest: &Digest) -> Result<Secret<String>> {
    let digest = digest.clone();
    aegis::hashing(move || make(&digest)).await?
}

/// Whether `digest` is the password behind `verifier`. Without one (no such user, no password) the same computation is
/// made and the answer is no, so that both cases take the same time.
///
/// # Errors
/// 503 `busy`; 500 when the verifier is no PHC string.
pub async fn verify(digest: &Digest, verifier: Option<Secret<String>>) -> Result<bool> {
    static NOBODY: OnceLock<Secret<String>> = OnceLock::new();
    let digest = digest.clone();
    aegis::hashing(move || {
        let known = verifier.is_some();
        let verifier = match verifier {
            Some(verifier) => verifier,
            None => match NOBODY.get() {
                Some(nobody) => nobody.clone(),
                None => NOBODY.get_or_init(|| make(&Digest::of("nobody")).unwrap_or_default()).clone(),
            },
        };
        let parsed = PasswordHash::new(verifier.expose()).map_err(|error| Error::bug(error.to_string()))?;
        let fits = hasher()?.verify_password(digest.0.expose().as_bytes(), &parsed).is_ok();
        Ok(fits && known)
    })
    .await?
}

/// Makes the stand-in verifier ahead of time, so that the first unknown name does not take longer than the second.
///
/// # Errors
/// 503 `busy`.
pub async fn warm_up() -> Result<()> {
    verify(&Digest::of(""), None).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(plain: Option<&str>, sha512: Option<&str>) -> Sent {
        Sent { plain: plain.map(|text| Secret::new(text.into())), sha512: sha512.map(|text| Secret::new(text.into())) }
    }

    #[tokio::test]
    async fn both_forms_of_a_password_fit_the_same_verifier() {
        let plain = sent(Some("correct horse"), None).chosen().unwrap();
        let stored = verifier(&plain).await.unwrap();
        assert!(stored.expose().starts_with("$argon2id$v=19$m=19456,t=3,p=1$"));
        let digest = hex::encode_upper(Sha512::digest(b"correct horse"));
        let hashed = sent(None, Some(&digest)).presented().unwrap();
        assert!(verify(&hashed, Some(stored.clone())).await.unwrap());
        assert!(verify(&plain, Some(stored.clone())).await.unwrap());
        assert!(!verify(&Digest::of("wrong horse!!"), Some(stored)).await.unwrap());
        assert!(!verify(&Digest::of("nobody"), None).await.unwrap());
    }

    #[test]
    fn unusable_passwords_are_told_apart() {
        let digest = hex::encode(Sha512::digest(b"correct horse"));
        assert_eq!(sent(None, None).presented().unwrap_err(), Unusable::Missing);
        assert_eq!(sent(Some(""), Some("")).presented().unwrap_err(), Unusable::Missing);
        assert_eq!(sent(None, Some("c0ffee")).presented().unwrap_err(), Unusable::Malformed);
        assert_eq!(sent(None, Some(&"g".repeat(128))).presented().unwrap_err(), Unusable::Malformed);
        assert_eq!(sent(Some("another horse"), Some(&digest)).presented().unwrap_err(), Unusable::Malformed);
        assert_eq!(sent(Some("short"), None).chosen().unwrap_err(), Unusable::TooShort);
        assert!(sent(Some("short"), None).presented().is_ok());
        assert_eq!(sent(Some(&"x".repeat(1025)), None).chosen().unwrap_err(), Unusable::TooLong);
        assert!(sent(Some("correct horse"), Some(&digest)).chosen().is_ok());
    }
}
