//! How the engine signs a script for a device and how the agent checks it.
//!
//! The reference signs the bytes of the script alone, so a signed script can be replayed to any machine with other
//! variables. Beside that signature, which its agents need, goes an envelope that binds the script to one job, one
//! device, its interpreter, its environment, its limits and a time. Our agent runs nothing without it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::canonical::{self, sha256_hex};
use crate::events::QuickJobRun;
use crate::keys::{self, SigningKey, VerifyingKey};
use crate::normalise_guid;

/// Version of the envelope written here.
pub const VERSION: u32 = 2;

/// Seconds an agent's clock may be ahead of the engine's before it calls a job too old.
pub const CLOCK_LEEWAY_SECONDS: i64 = 300;

/// Begins every signed envelope. A script is UTF-8 text and can never start with 0xFF, so a signature over a script is
/// never one over an envelope, whatever its author writes into it.
const DOMAIN: &[u8] = b"\xFFborealis quick_job_run envelope\0";

/// What a signature covers besides the script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// [`VERSION`].
    pub v: u32,
    /// Id of the activity row.
    pub job_id: i64,
    /// The device meant.
    pub device_guid: String,
    /// Hex SHA-256 of the decoded script.
    pub script_sha256: String,
    /// What runs it: `bash`, `powershell`, `batch`.
    pub script_type: String,
    /// [`env_sha256`].
    pub env_sha256: String,
    /// Limit of the script in seconds, 0 for none.
    pub timeout_seconds: u64,
    /// `system` or `currentuser`.
    pub run_mode: String,
    /// Epoch seconds; the agent does not begin a job that reaches it later.
    pub not_after: i64,
}

impl Envelope {
    /// The bytes that are signed: a domain prefix and the canonical JSON of the envelope.
    #[must_use]
    pub fn to_sign(&self) -> Vec<u8> {
        let value = json!({
            "v": self.v, "job_id": self.job_id, "device_guid": self.device_guid, "script_sha256": self.script_sha256,
            "script_type": self.script_type,
            "env_sha256": self.env_sha256, "timeout_seconds": self.timeout_seconds, "run_mode": self.run_mode,
            "not_after": self.not_after,
        });
        [DOMAIN, &canonical::to_bytes(&value)].concat()
    }
}

/// Hex SHA-256 of the canonical JSON of `{environment, variables}`.
#[must_use]
pub fn env_sha256(environment: &BTreeMap<String, String>, variables: &[Value]) -> String {
    sha256_hex(&canonical::to_bytes(&json!({"environment": environment, "variables": variables})))
}

/// Why a job must not be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No signature over the script.
    #[error("the script is not signed")]
    Unsigned,
    /// `sig_alg` is not Ed25519.
    #[error("the signature algorithm is not ed25519")]
    Algorithm,
    /// `script_content` is not base64.
    #[error("the script is not valid base64")]
    Content,
    /// The job brings a key of its own.
    #[error("the signing key is not the one received at enrollment")]
    ForeignKey,
    /// The signature over the script does not match.
    #[error("the script's signature does not match")]
    ScriptSignature,
    /// No envelope: only its script is signed.
    #[error("the job has no envelope")]
    NoEnvelope,
    /// The envelope is there without its signature, or the signature does not match.
    #[error("the envelope's signature does not match")]
    EnvelopeSignature,
    /// A version this agent does not know.
    #[error("the envelope's version is not supported")]
    EnvelopeVersion,
    /// The envelope was made for another job id.
    #[error("the envelope belongs to another job")]
    OtherJob,
    /// The envelope was made for another device.
    #[error("the envelope belongs to another device")]
    OtherDevice,
    /// Script, environment, variables, limit or mode differ from the envelope.
    #[error("the job differs from its envelope")]
    Altered,
    /// `not_after` has passed.
    #[error("the job came too late")]
    Expired,
}

/// Fills `signature`, `sig_alg`, `signing_key`, `envelope` and `envelope_signature` from the other fields.
///
/// # Errors
/// [`Refusal::Content`] when `script_content` is not base64; the job is left as it was.
pub fn sign(run: &mut QuickJobRun, key: &SigningKey, device_guid: &str, not_after: i64) -> Result<(), Refusal> {
    let script = keys::from_base64(&run.script_content).map_err(|_| Refusal::Content)?;
    let envelope = Envelope {
        v: VERSION,
        job_id: run.job_id,
        device_guid: normalise_guid(device_guid),
        script_sha256: sha256_hex(&script),
        script_type: run.script_type.clone(),
        env_sha256: env_sha256(&run.environment, &run.variables),
        timeout_seconds: run.timeout_seconds,
        run_mode: run.run_mode.clone(),
        not_after,
    };
    run.signature = keys::sign_base64(key, &script);
    "ed25519".clone_into(&mut run.sig_alg);
    run.signing_key = keys::spki_base64(&key.verifying_key());
    run.envelope_signature = Some(keys::sign_base64(key, &envelope.to_sign()));
    run.envelope = Some(envelope);
    Ok(())
}

/// Checks a job against the key pinned at enrollment and hands out the decoded script. `now` is epoch seconds.
///
/// # Errors
/// The first [`Refusal`] found; the job must then be reported `Failed` and not be run.
pub fn verify(run: &QuickJobRun, pinned: &VerifyingKey, device_guid: &str, now: i64) -> Result<Vec<u8>, Refusal> {
    if run.signature.trim().is_empty() {
        return Err(Refusal::Unsigned);
    }
    if !matches!(run.sig_alg.trim().to_ascii_lowercase().as_str(), "" | "ed25519" | "eddsa") {
        return Err(Refusal::Algorithm);
    }
    let announced = run.signing_key.trim();
    if !announced.is_empty() && keys::from_spki_base64(announced).ok().as_ref() != Some(pinned) {
        return Err(Refusal::ForeignKey);
    }
    let script = keys::from_base64(&run.script_content).map_err(|_| Refusal::Content)?;
    keys::verify_base64(pinned, &script, &run.signature).map_err(|_| Refusal::ScriptSignature)?;
    let envelope = run.envelope.as_ref().ok_or(Refusal::NoEnvelope)?;
    let signature = run.envelope_signature.as_deref().ok_or(Refusal::EnvelopeSignature)?;
    keys::verify_base64(pinned, &envelope.to_sign(), signature).map_err(|_| Refusal::EnvelopeSignature)?;
    if envelope.v != VERSION {
        return Err(Refusal::EnvelopeVersion);
    }
    if envelope.job_id != run.job_id {
        return Err(Refusal::OtherJob);
    }
    if normalise_guid(&envelope.device_guid) != normalise_guid(device_guid) {
        return Err(Refusal::OtherDevice);
    }
    if envelope.script_sha256 != sha256_hex(&script)
        || envelope.script_type != run.script_type
        || envelope.env_sha256 != env_sha256(&run.environment, &run.variables)
        || envelope.timeout_seconds != run.timeout_seconds
        || envelope.run_mode != run.run_mode
    {
        return Err(Refusal::Altered);
    }
    if envelope.not_after.saturating_add(CLOCK_LEEWAY_SECONDS) < now {
        return Err(Refusal::Expired);
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUID: &str = "0D2F7B1A-0000-4000-8000-00000000ABCD";
    const NOW: i64 = 1_800_000_000;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn job() -> QuickJobRun {
        let mut run = QuickJobRun {
            job_id: 42,
            script_type: "bash".into(),
            script_content: keys::to_base64(b"echo \"$GREETING\"\n"),
            script_encoding: "base64".into(),
            environment: BTreeMap::from([("GREETING".into(), "hi".into())]),
            variables: vec![json!({"name": "greeting", "type": "number", "value": 0.1})],
            timeout_seconds: 60,
            run_mode: "system".into(),
            ..QuickJobRun::default()
        };
        sign(&mut run, &key(1), &GUID.to_lowercase(), NOW + 60).unwrap();
        run
    }

    fn check(run: &QuickJobRun) -> Result<Vec<u8>, Refusal> {
        verify(run, &key(1).verifying_key(), GUID, NOW)
    }

    #[test]
    fn a_signed_job_survives_the_wire() {
        let text = serde_json::to_string(&job()).unwrap();
        let run: QuickJobRun = serde_json::from_str(&text).unwrap();
        assert_eq!(check(&run).unwrap(), b"echo \"$GREETING\"\n");
    }

    #[test]
    fn every_change_is_noticed() {
        type Change = fn(&mut QuickJobRun);
        let cases: &[(Change, Refusal)] = &[
            (|r| r.signature.clear(), Refusal::Unsigned),
            (|r| r.sig_alg = "rsa".into(), Refusal::Algorithm),
            (|r| r.script_content = "%".into(), Refusal::Content),
            (|r| r.script_content = keys::to_base64(b"rm -rf /"), Refusal::ScriptSignature),
            (|r| r.signing_key = keys::spki_base64(&key(2).verifying_key()), Refusal::ForeignKey),
            (|r| r.signing_key = "garbage".into(), Refusal::ForeignKey),
            (|r| r.envelope_signature = None, Refusal::EnvelopeSignature),
            (|r| r.envelope = None, Refusal::NoEnvelope),
            (|r| (r.envelope, r.envelope_signature) = (None, None), Refusal::NoEnvelope),
            (|r| r.script_type = "powershell".into(), Refusal::Altered),
            (|r| r.job_id = 43, Refusal::OtherJob),
            (|r| drop(r.environment.insert("LD_PRELOAD".into(), "/tmp/x.so".into())), Refusal::Altered),
            (|r| r.variables.clear(), Refusal::Altered),
            (|r| r.timeout_seconds = 0, Refusal::Altered),
            (|r| r.run_mode = "currentuser".into(), Refusal::Altered),
            (|r| r.envelope.as_mut().unwrap().not_after += 3600, Refusal::EnvelopeSignature),
            (|r| r.envelope.as_mut().unwrap().device_guid = "OTHER".into(), Refusal::EnvelopeSignature),
        ];
        for (at, (change, refusal)) in cases.iter().enumerate() {
            let mut run = job();
            change(&mut run);
            assert_eq!(check(&run), Err(*refusal), "case {at}");
        }
    }

    #[test]
    fn another_device_another_key_and_another_time_are_refused() {
        let run = job();
        let pinned = key(1).verifying_key();
        assert_eq!(verify(&run, &pinned, "0D2F7B1A-0000-4000-8000-00000000ABCE", NOW), Err(Refusal::OtherDevice));
        assert_eq!(verify(&run, &key(2).verifying_key(), GUID, NOW), Err(Refusal::ForeignKey));
        assert!(verify(&run, &pinned, GUID, NOW + 60 + CLOCK_LEEWAY_SECONDS).is_ok());
        assert_eq!(verify(&run, &pinned, GUID, NOW + 61 + CLOCK_LEEWAY_SECONDS), Err(Refusal::Expired));
    }

    #[test]
    fn a_script_that_quotes_an_envelope_signs_none() {
        let mut run = job();
        let forged = Envelope { job_id: 7, ..run.envelope.clone().unwrap() };
        // The most an author can do: a script whose text is everything of the signed bytes that is text.
        let text = String::from_utf8_lossy(&forged.to_sign()).into_owned();
        let mut bait = QuickJobRun { script_content: keys::to_base64(text.as_bytes()), ..QuickJobRun::default() };
        sign(&mut bait, &key(1), GUID, NOW).unwrap();
        run.job_id = 7;
        run.envelope = Some(forged);
        run.envelope_signature = Some(bait.signature);
        assert_eq!(check(&run), Err(Refusal::EnvelopeSignature));
    }
}
