//! How an API process that cannot open the secret store by itself gets the data key from one that has it: through the database, where
//! nobody can read it.
//!
//! Who asks makes a key pair and writes its public half into `aegis_handovers`; the private half stays in memory. Who has the data key
//! seals it to that public key (HPKE, RFC 9180, in mode PSK) and writes the answer beside it. The pre-shared key comes from the
//! script-signing key, which API processes have and workers have not. So a question that somebody else writes into the database gets an
//! answer they cannot open, an answer that somebody else writes is refused, and a copy of the database opens nothing, also
//! not together with the state folder.

use std::time::{Duration, Instant};

use hpke::{
    Deserializable, Kem as _, OpModeR, OpModeS, PskBundle, Serializable, aead::AesGcm256, kdf::HkdfSha256, kem::X25519HkdfSha256,
};
use serde_json::json;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Held, KEY_BYTES, Key, Vault};
use crate::{
    audit, db,
    error::{Error, Result},
    keys::Keys,
    scope::Actor,
    secret::Secret,
};

type Kem = X25519HkdfSha256;

const INFO: &[u8] = b"borealis-aegis-handover-v1";
/// Questions that were not repeated for so long are nobody's any more, in seconds.
const ASKED_WITHIN_S: f64 = 30.0;
/// Questions answered at a time.
const BATCH: i64 = 16;
/// How long after an answer that does not open another one is asked for.
const PAUSE: Duration = Duration::from_secs(60);

/// The part of one API process in handing the data key over.
pub struct Handover {
    process_id: Uuid,
    asking: Option<Asking>,
    pause_until: Option<Instant>,
}

/// A question: its two halves.
struct Asking {
    private: <Kem as hpke::Kem>::PrivateKey,
    public: Vec<u8>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handover").field("process_id", &self.process_id).finish_non_exhaustive()
    }
}

impl Asking {
    fn new() -> Self {
        let (private, public) = Kem::gen_keypair();
        Self { private, public: public.to_bytes().to_vec() }
    }
}

impl Handover {
    /// Of the process with this id, which no other has or had.
    #[must_use]
    pub fn new(process_id: Uuid) -> Self {
        Self { process_id, asking: None, pause_until: None }
    }

    /// Answers others if the vault is open, else asks, or takes the answer. Called every second. Whether this call opened the vault.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn step(&mut self, pool: &db::Pool, vault: &Vault, keys: &Keys) -> Result<bool> {
        let Ok(held) = vault.held() else { return self.ask(pool, vault, keys).await };
        if self.asking.is_some() {
            sqlx::query!("DELETE FROM aegis_handovers WHERE process_id = $1", self.process_id).execute(pool).await?;
            self.asking = None;
        }
        answer(pool, vault, &held, keys).await?;
        Ok(false)
    }

    async fn ask(&mut self, pool: &db::Pool, vault: &Vault, keys: &Keys) -> Result<bool> {
        if self.pause_until.is_some_and(|until| Instant::now() < until) {
            return Ok(false);
        }
        let asking = self.asking.get_or_insert_with(Asking::new);
        // Nothing is asked for before the set-up.
        let row = sqlx::query!(
            r#"INSERT INTO aegis_handovers AS h (process_id, public_key) SELECT $1, $2 FROM aegis
               ON CONFLICT (process_id) DO UPDATE
                   SET asked_at = now(), public_key = excluded.public_key,
                       key_id = CASE WHEN h.public_key = excluded.public_key THEN h.key_id END,
                       answer = CASE WHEN h.public_key = excluded.public_key THEN h.answer END
               RETURNING h.key_id, h.answer, (SELECT aegis.key_id FROM aegis) AS present"#,
            self.process_id,
            asking.public
        )
        .fetch_optional(pool)
        .await?;
        let Some(row) = row else { return Ok(false) };
        // One for a key that a reset has taken since is followed by another.
        let (Some(key_id), Some(sealed)) = (row.key_id.filter(|key_id| row.present == Some(*key_id)), row.answer) else {
            return Ok(false);
        };
        let opened = open(&asking.private, &keys.handover_key(), self.process_id, key_id, &sealed);
        let done = opened.is_some();
        if let Some(key) = opened {
            vault.keep(Held { id: key_id, key });
        } else {
            tracing::warn!(
                "another process has answered with something that does not open; are the script-signing keys the same?"
            );
            self.pause_until = Some(Instant::now() + PAUSE);
        }
        self.asking = None;
        sqlx::query!("DELETE FROM aegis_handovers WHERE process_id = $1", self.process_id).execute(pool).await?;
        Ok(done)
    }
}

async fn answer(pool: &db::Pool, vault: &Vault, held: &Held, keys: &Keys) -> Result<()> {
    let waiting = sqlx::query_scalar!(
        "SELECT process_id FROM aegis_handovers
         WHERE key_id IS DISTINCT FROM $1 AND asked_at > now() - make_interval(secs => $2) ORDER BY asked_at LIMIT $3",
        held.id,
        ASKED_WITHIN_S,
        BATCH
    )
    .fetch_all(pool)
    .await?;
    for process_id in waiting {
        let mut tx = pool.begin().await?;
        vault.fenced(&mut tx, held).await?;
        let asked = sqlx::query_scalar!(
            "SELECT public_key FROM aegis_handovers
             WHERE process_id = $1 AND key_id IS DISTINCT FROM $2 FOR UPDATE SKIP LOCKED",
            process_id,
            held.id
        );
        let Some(public) = asked.fetch_optional(&mut *tx).await? else { continue };
        let Ok(sealed) = seal(&public, &keys.handover_key(), process_id, held) else { continue };
        sqlx::query!("UPDATE aegis_handovers SET key_id = $2, answer = $3 WHERE process_id = $1", process_id, held.id, sealed)
            .execute(&mut *tx)
            .await?;
        let actor = Actor::system();
        let detail = json!({ "process_id": process_id });
        let entry = audit::Entry { action: "aegis.handover", object_kind: "aegis", detail, ..audit::Entry::default() };
        audit::record(&mut tx, &actor, entry).await?;
        tx.commit().await?;
        tracing::info!(%process_id, "the key of the secret store was handed to another process");
    }
    Ok(())
}

/// What an answer is bound to besides the keys.
fn bound_to(process_id: Uuid, key_id: Uuid) -> [u8; 32] {
    let mut bytes = [0; 32];
    let (process, key) = bytes.split_at_mut(16);
    process.copy_from_slice(process_id.as_bytes());
    key.copy_from_slice(key_id.as_bytes());
    bytes
}

/// The encapsulated key, then the data key sealed under it.
fn seal(public: &[u8], shared: &Key, process_id: Uuid, held: &Held) -> Result<Vec<u8>> {
    let bug = |error: hpke::HpkeError| Error::bug(error.to_string());
    let public = <Kem as hpke::Kem>::PublicKey::from_bytes(public).map_err(bug)?;
    let mode = OpModeS::Psk(PskBundle::new(shared.expose(), INFO).map_err(bug)?);
    let bound = bound_to(process_id, held.id);
    let (encapsulated, sealed) =
        hpke::single_shot_seal::<AesGcm256, HkdfSha256, Kem>(&mode, &public, INFO, held.key.expose(), &bound).map_err(bug)?;
    Ok([encapsulated.to_bytes().as_slice(), &sealed].concat())
}

fn open(private: &<Kem as hpke::Kem>::PrivateKey, shared: &Key, process_id: Uuid, key_id: Uuid, answer: &[u8]) -> Option<Key> {
    let (encapsulated, sealed) = answer.split_first_chunk::<KEY_BYTES>()?;
    let encapsulated = <Kem as hpke::Kem>::EncappedKey::from_bytes(encapsulated).ok()?;
    let mode = OpModeR::Psk(PskBundle::new(shared.expose(), INFO).ok()?);
    let bound = bound_to(process_id, key_id);
    let opened =
        hpke::single_shot_open::<AesGcm256, HkdfSha256, Kem>(&mode, private, &encapsulated, INFO, sealed, &bound).ok()?;
    let opened = Zeroizing::new(opened);
    Some(Secret::new(<[u8; KEY_BYTES]>::try_from(opened.as_slice()).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_opens_for_who_asked_and_has_the_shared_key_only() {
        let (asking, other) = (Asking::new(), Asking::new());
        let (shared, stranger) = (Secret::new([1; KEY_BYTES]), Secret::new([2; KEY_BYTES]));
        let (process, held) = (Uuid::now_v7(), Held { id: Uuid::new_v4(), key: Secret::new([9; KEY_BYTES]) });
        let answer = seal(&asking.public, &shared, process, &held).unwrap();
        let opened =
            |private, shared, process, key, answer: &[u8]| open(private, shared, process, key, answer).map(|key| *key.expose());
        assert_eq!(opened(&asking.private, &shared, process, held.id, &answer), Some([9; KEY_BYTES]));
        assert!(!answer.windows(8).any(|window| window == [9; 8]), "the key is not readable");

        // Who wrote the question into the database, and is no API process.
        assert_eq!(opened(&asking.private, &stranger, process, held.id, &answer), None);
        // Who reads the database, and has the state folder.
        assert_eq!(opened(&other.private, &shared, process, held.id, &answer), None);
        // An answer to somebody else, or with another key.
        assert_eq!(opened(&asking.private, &shared, Uuid::now_v7(), held.id, &answer), None);
        assert_eq!(opened(&asking.private, &shared, process, Uuid::new_v4(), &answer), None);
        // An answer by somebody who is no API process.
        let forged = seal(&asking.public, &stranger, process, &held).unwrap();
        assert_eq!(opened(&asking.private, &shared, process, held.id, &forged), None);
        for broken in [&answer[..0], &answer[..31], &answer[..40]] {
            assert_eq!(opened(&asking.private, &shared, process, held.id, broken), None);
        }
        // A key nobody can have made.
        assert!(seal(&[0; KEY_BYTES], &shared, process, &held).is_err());
        assert!(seal(&[1; 5], &shared, process, &held).is_err());
    }
}
