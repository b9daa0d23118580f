//! Ed25519 keys as they travel: base64 of the DER `SubjectPublicKeyInfo` (RFC 8410), and what is derived from them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signature, Signer as _};
pub use ed25519_dalek::{SigningKey, VerifyingKey};

use crate::canonical::sha256_hex;

/// DER of an Ed25519 `SubjectPublicKeyInfo` up to the 32 key bytes; RFC 8410 leaves no other form.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Length in bytes of an Ed25519 `SubjectPublicKeyInfo`.
pub const SPKI_LEN: usize = 44;

/// Length in bytes of the nonces of an enrollment that this project makes.
pub const NONCE_LEN: usize = 32;

/// Why a key or signature text was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not base64 in any of the accepted spellings.
    #[error("not base64")]
    Base64,
    /// Not the DER of an Ed25519 public key, or a point of small order that verifies anything.
    #[error("not an Ed25519 public key")]
    NotEd25519,
    /// Not a signature of 64 bytes.
    #[error("not an Ed25519 signature")]
    NotASignature,
    /// The signature does not match.
    #[error("signature does not match")]
    BadSignature,
}

/// Standard base64 with padding.
#[must_use]
pub fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Reads base64 as the reference does: white space is skipped, the URL-safe alphabet and missing padding are accepted.
///
/// # Errors
/// [`KeyError::Base64`].
pub fn from_base64(text: &str) -> Result<Vec<u8>, KeyError> {
    let mut plain: String = text
        .chars()
        .filter(|c| !c.is_ascii_whitespace())
        .map(|c| match c {
            '-' => '+',
            '_' => '/',
            c => c,
        })
        .collect();
    if !plain.contains('=') {
        while !plain.len().is_multiple_of(4) {
            plain.push('=');
        }
    }
    STANDARD.decode(plain).map_err(|_| KeyError::Base64)
}

/// The DER `SubjectPublicKeyInfo` of a key.
#[must_use]
pub fn spki_der(key: &VerifyingKey) -> [u8; SPKI_LEN] {
    let mut der = [0u8; SPKI_LEN];
    let (prefix, rest) = der.split_at_mut(SPKI_PREFIX.len());
    prefix.copy_from_slice(&SPKI_PREFIX);
    rest.copy_from_slice(key.as_bytes());
    der
}

/// The key as fields like `agent_pubkey` and `signing_key` carry it: base64 of [`spki_der`].
#[must_use]
pub fn spki_base64(key: &VerifyingKey) -> String {
    to_base64(&spki_der(key))
}

/// Reads a DER `SubjectPublicKeyInfo`; only Ed25519 keys of full order are accepted.
///
/// # Errors
/// [`KeyError::NotEd25519`].
pub fn from_spki_der(der: &[u8]) -> Result<VerifyingKey, KeyError> {
    let bytes: &[u8; 32] = der.strip_prefix(&SPKI_PREFIX).and_then(|b| b.try_into().ok()).ok_or(KeyError::NotEd25519)?;
    let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::NotEd25519)?;
    if key.is_weak() { Err(KeyError::NotEd25519) } else { Ok(key) }
}

/// Reads a key as [`spki_base64`] writes it.
///
/// # Errors
/// [`KeyError::Base64`] or [`KeyError::NotEd25519`].
pub fn from_spki_base64(text: &str) -> Result<VerifyingKey, KeyError> {
    from_spki_der(&from_base64(text)?)
}

/// Fingerprint of a key: lower-case hex SHA-256 of its `SubjectPublicKeyInfo` (claim `ssl_key_fingerprint`).
#[must_use]
pub fn fingerprint(key: &VerifyingKey) -> String {
    sha256_hex(&spki_der(key))
}

/// What the agent signs to prove its key at enrollment: `server_nonce || approval_reference || client_nonce`
/// with the nonces decoded and the reference as UTF-8.
#[must_use]
pub fn enrollment_proof_bytes(server_nonce: &[u8], approval_reference: &str, client_nonce: &[u8]) -> Vec<u8> {
    [server_nonce, approval_reference.as_bytes(), client_nonce].concat()
}

/// Signs `message`, as standard base64.
#[must_use]
pub fn sign_base64(key: &SigningKey, message: &[u8]) -> String {
    to_base64(&key.sign(message).to_bytes())
}

/// Checks a base64 signature over `message`, strictly (no malleable forms).
///
/// # Errors
/// Any [`KeyError`] but [`KeyError::NotEd25519`].
pub fn verify_base64(key: &VerifyingKey, message: &[u8], signature: &str) -> Result<(), KeyError> {
    let bytes = from_base64(signature)?;
    let signature = Signature::from_slice(&bytes).map_err(|_| KeyError::NotASignature)?;
    key.verify_strict(message, &signature).map_err(|_| KeyError::BadSignature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    /// The public key of RFC 8410 section 10.1, in the form `openssl pkey -pubout` prints it.
    const RFC8410: &str = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=";

    #[test]
    fn spki_is_the_form_of_the_rfc() {
        let key = from_spki_base64(RFC8410).unwrap();
        assert_eq!(hex::encode(key.as_bytes()), "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1");
        assert_eq!(spki_base64(&key), RFC8410);
        assert_eq!(fingerprint(&key).len(), 64);
    }

    #[test]
    fn loose_base64_is_read_and_other_keys_are_not() {
        let spaced = RFC8410.replace('=', "").replace("AyEA", "Ay\n EA");
        assert_eq!(from_spki_base64(&spaced), from_spki_base64(RFC8410));
        assert_eq!(from_spki_base64("***"), Err(KeyError::Base64));
        assert_eq!(from_spki_base64("AAAA"), Err(KeyError::NotEd25519));
        let mut weak = SPKI_PREFIX.to_vec();
        weak.extend([0u8; 32]);
        assert_eq!(from_spki_der(&weak), Err(KeyError::NotEd25519), "a point of small order");
        let mut long = spki_der(&key(1).verifying_key()).to_vec();
        long.push(0);
        assert_eq!(from_spki_der(&long), Err(KeyError::NotEd25519));
    }

    #[test]
    fn proofs_bind_nonces_and_reference() {
        let key = key(7);
        let proof = sign_base64(&key, &enrollment_proof_bytes(b"server", "ref", b"client"));
        let public = key.verifying_key();
        assert!(verify_base64(&public, &enrollment_proof_bytes(b"server", "ref", b"client"), &proof).is_ok());
        for (s, r, c) in [(&b"sErver"[..], "ref", &b"client"[..]), (b"server", "reF", b"client"), (b"server", "ref", b"clienT")] {
            assert_eq!(verify_base64(&public, &enrollment_proof_bytes(s, r, c), &proof), Err(KeyError::BadSignature));
        }
        assert_eq!(verify_base64(&public, b"", "AAAA"), Err(KeyError::NotASignature));
    }
}
