//! The second factor: time-based one-time codes (RFC 6238: SHA-1, 6 digits, 30 s), each accepted once.

use chrono::{DateTime, Utc};
use subtle::ConstantTimeEq;
use totp_rs::{Builder, Totp};

use crate::{
    error::{Error, Result},
    secret::Secret,
};

/// Seconds of one step.
pub const STEP_S: u64 = 30;
/// Digits of a code.
pub const DIGITS: usize = 6;

/// A new secret: base32 of 20 random bytes.
#[must_use]
pub fn new_secret() -> Secret<String> {
    Secret::new(totp_rs::Secret::generate().to_base32())
}

/// The digits of a typed code; other characters (blanks, dashes) are stripped.
///
/// # Errors
/// 400 `invalid_code` when fewer than six digits are left.
pub fn digits(typed: &str) -> Result<String> {
    // More than any code has is cut, so that the text stays small.
    let digits: String = typed.chars().filter(char::is_ascii_digit).take(DIGITS + 1).collect();
    if digits.len() < DIGITS { Err(not_digits()) } else { Ok(digits) }
}

/// 400 `invalid_code`.
pub(super) fn not_digits() -> Error {
    Error::field("invalid_code", "code", "must have six digits.")
}

fn totp(secret: &Secret<String>) -> Result<Builder> {
    let bytes =
        totp_rs::Secret::try_from_base32(secret.expose()).map_err(|_| Error::bug("a stored second factor is not base32"))?;
    Ok(Builder::new().with_secret(bytes))
}

/// The step at which `code` is right: the present one, the one before or the one after, and later than `last_step`.
///
/// # Errors
/// When the secret is damaged.
pub fn accepted_step(secret: &Secret<String>, code: &str, now: DateTime<Utc>, last_step: i64) -> Result<Option<i64>> {
    let totp: Totp = totp(secret)?.build().map_err(|error| Error::bug(error.to_string()))?;
    let present = u64::try_from(now.timestamp()).unwrap_or(0) / STEP_S;
    let mut accepted = None;
    // All three are computed whatever the outcome.
    for step in present.saturating_sub(1)..=present + 1 {
        let fits: bool = totp.generate(step * STEP_S).to_string().as_bytes().ct_eq(code.as_bytes()).into();
        let step = i64::try_from(step).map_err(Error::bug)?;
        if fits && step > last_step && accepted.is_none() {
            accepted = Some(step);
        }
    }
    Ok(accepted)
}

/// The URL an authenticator app takes, as text or as the content of a QR image.
///
/// # Errors
/// When the secret is damaged.
pub fn otpauth_url(secret: &Secret<String>, issuer: &str, username: &str) -> Result<String> {
    // A colon parts issuer and account in the label, so neither may have one.
    let label = |text: &str| text.replace(':', "_");
    totp(secret)?
        .with_issuer(Some(label(issuer)))
        .with_account_name(label(username))
        .build()
        .and_then(|totp| totp.to_url())
        .map_err(|error| Error::bug(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    // RFC 6238, appendix B: the ASCII secret 12345678901234567890 at 59 s gives 94287082, of which we take six digits.
    fn rfc() -> Secret<String> {
        Secret::new("GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ".to_owned())
    }

    #[test]
    fn codes_follow_the_rfc_and_live_one_step_to_either_side() {
        assert_eq!(accepted_step(&rfc(), "287082", at(59), 0).unwrap(), Some(1));
        assert_eq!(accepted_step(&rfc(), "287082", at(0), 0).unwrap(), Some(1));
        assert_eq!(accepted_step(&rfc(), "287082", at(89), 0).unwrap(), Some(1));
        assert_eq!(accepted_step(&rfc(), "287082", at(90), 0).unwrap(), None);
        assert_eq!(accepted_step(&rfc(), "287083", at(59), 0).unwrap(), None);
        assert_eq!(accepted_step(&rfc(), "081804", at(1_111_111_109), 0).unwrap(), Some(37_037_036));
    }

    #[test]
    fn a_used_step_is_not_accepted_again() {
        assert_eq!(accepted_step(&rfc(), "287082", at(59), 1).unwrap(), None);
        assert_eq!(accepted_step(&rfc(), "287082", at(59), 5).unwrap(), None);
    }

    #[test]
    fn typed_codes_lose_everything_but_digits() {
        assert_eq!(digits(" 123 456 ").unwrap(), "123456");
        assert_eq!(digits("12345").unwrap_err().code, "invalid_code");
        assert_eq!(digits("").unwrap_err().code, "invalid_code");
        // Seven digits are no code, and stay none.
        assert_eq!(digits("1234567890").unwrap(), "1234567");
    }

    #[test]
    fn secrets_are_32_base32_characters_and_fit_their_url() {
        let secret = new_secret();
        assert_eq!(secret.expose().len(), 32);
        assert_ne!(secret.expose(), new_secret().expose());
        let url = otpauth_url(&secret, "Borealis", "a:b c/ö").unwrap();
        assert!(url.starts_with("otpauth://totp/Borealis:a_b%20c"), "{url}");
        assert!(url.contains(secret.expose()) && url.contains("issuer=Borealis"), "{url}");
    }
}
