//! How the engine's script key passes its place on: each key signs the next one. An agent that has pinned one of them at enrollment
//! follows from there, and believes nobody else.

use serde::{Deserialize, Serialize};

use crate::keys::{self, KeyError, SigningKey, VerifyingKey};

/// Begins every signed succession. A script is UTF-8 text and can never start with 0xFF, so nobody gets one signed as a script.
const DOMAIN: &[u8] = b"\xFFborealis script key succession\0";

/// A key, and the word of the one before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Succession {
    /// The next key: base64 SPKI.
    pub key: String,
    /// Base64 Ed25519 by the key before, over the next one.
    pub signature: String,
}

fn to_sign(key: &VerifyingKey) -> Vec<u8> {
    [DOMAIN, key.as_bytes().as_slice()].concat()
}

impl Succession {
    /// By `before`, in favour of `next`.
    #[must_use]
    pub fn sign(before: &SigningKey, next: &VerifyingKey) -> Self {
        Self { key: keys::spki_base64(next), signature: keys::sign_base64(before, &to_sign(next)) }
    }

    /// The next key, if `before` has named it.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn next_after(&self, before: &VerifyingKey) -> Result<VerifyingKey, KeyError> {
        let next = keys::from_spki_base64(&self.key)?;
        keys::verify_base64(before, &to_sign(&next), &self.signature)?;
        Ok(next)
    }
}

/// The key that `pinned` has passed its place to, if that is `wanted`: base64 SPKI. `successions` are in their order; those before
/// `pinned` came do not matter, and nor do those to keys that were named and never used.
#[must_use]
pub fn follow(pinned: &VerifyingKey, successions: &[Succession], wanted: &str) -> Option<VerifyingKey> {
    let wanted = keys::from_spki_base64(wanted).ok()?;
    let mut reached = vec![*pinned];
    for succession in successions {
        if let Some(next) = reached.iter().find_map(|key| succession.next_after(key).ok()) {
            if next == wanted {
                return Some(next);
            }
            reached.push(next);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn chain(seeds: &[u8]) -> Vec<Succession> {
        seeds.windows(2).map(|pair| Succession::sign(&key(pair[0]), &key(pair[1]).verifying_key())).collect()
    }

    fn reaches(pinned: u8, successions: &[Succession], wanted: u8) -> bool {
        let wanted = key(wanted).verifying_key();
        follow(&key(pinned).verifying_key(), successions, &keys::spki_base64(&wanted)) == Some(wanted)
    }

    #[test]
    fn a_key_is_followed_from_wherever_it_was_pinned() {
        let all = chain(&[1, 2, 3]);
        assert!(reaches(1, &all, 2) && reaches(1, &all, 3) && reaches(2, &all, 3));
        // Never back, and never to who is not named.
        assert!(!reaches(2, &all, 1) && !reaches(3, &all, 2) && !reaches(1, &all, 4) && !reaches(9, &all, 3));
        assert!(!reaches(1, &[], 2));
    }

    #[test]
    fn one_that_was_named_and_never_used_is_no_dead_end() {
        let mut all = chain(&[1, 5]);
        all.extend(chain(&[1, 2, 3]));
        assert!(reaches(1, &all, 2) && reaches(1, &all, 3) && reaches(2, &all, 3) && !reaches(5, &all, 3));
    }

    #[test]
    fn nobody_else_can_name_a_successor() {
        let forged = Succession { key: keys::spki_base64(&key(7).verifying_key()), ..chain(&[1, 2])[0].clone() };
        assert!(!reaches(1, &[forged], 7));
        assert!(!reaches(1, &[Succession::sign(&key(6), &key(7).verifying_key())], 7));
        // A script of which the text is everything of the signed bytes that is text.
        let text = String::from_utf8_lossy(&to_sign(&key(7).verifying_key())).into_owned();
        let bait = Succession {
            key: keys::spki_base64(&key(7).verifying_key()),
            signature: keys::sign_base64(&key(1), text.as_bytes()),
        };
        assert!(!reaches(1, &[bait], 7));
        // A missing link is not jumped over.
        assert!(!reaches(1, &chain(&[2, 3]), 3));
        let garbage = Succession { key: "AAAA".into(), signature: "%".into() };
        assert!(!reaches(1, std::slice::from_ref(&garbage), 7));
        assert!(reaches(1, &[garbage, chain(&[1, 2])[0].clone()], 2));
    }
}
