//! Socket.IO events between agent and engine.
//!
//! An agent that announces [`Capabilities::dedup`] sends `quick_job_accepted`, `quick_job_declined`, `quick_job_progress` and
//! `quick_job_result` with an ack id and is answered an [`Ack`]. It keeps a result on disk until it is acknowledged, and a
//! `quick_job_run` with a job id it knows is never run again: it answers `quick_job_accepted`, or the stored result when there
//! is one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::envelope::Envelope;
use crate::lenient;
use crate::succession::Succession;

/// Agent to engine, once after the namespace is connected: [`ConnectAgent`].
pub const CONNECT_AGENT: &str = "connect_agent";
/// Engine to agent: [`QuickJobRun`].
pub const QUICK_JOB_RUN: &str = "quick_job_run";
/// Engine to agent: [`QuickJobCancel`].
pub const QUICK_JOB_CANCEL: &str = "quick_job_cancel";
/// Agent to engine: [`QuickJobAccepted`].
pub const QUICK_JOB_ACCEPTED: &str = "quick_job_accepted";
/// Agent to engine: [`QuickJobDeclined`].
pub const QUICK_JOB_DECLINED: &str = "quick_job_declined";
/// Agent to engine: [`QuickJobProgress`].
pub const QUICK_JOB_PROGRESS: &str = "quick_job_progress";
/// Agent to engine: [`QuickJobResult`].
pub const QUICK_JOB_RESULT: &str = "quick_job_result";

/// [`QuickJobProgress::status`] while a script runs.
pub const STATUS_RUNNING: &str = "Running";
/// [`QuickJobResult::status`] of a script that ended with exit code 0.
pub const STATUS_SUCCESS: &str = "Success";
/// [`QuickJobResult::status`] of everything else but [`STATUS_TIMED_OUT`].
pub const STATUS_FAILED: &str = "Failed";
/// [`QuickJobResult::status`] of a script stopped at its time limit; the engine reads it as `Timed Out`.
pub const STATUS_TIMED_OUT: &str = "timed_out";

/// [`QuickJobResult::reason`]: the script was stopped by [`QuickJobCancel`], or never started because of it.
pub const REASON_CANCELLED: &str = "cancelled";
/// [`QuickJobResult::reason`]: the script was stopped at its time limit.
pub const REASON_TIMED_OUT: &str = "timed_out";
/// [`QuickJobResult::reason`]: signature, envelope or target were wrong; nothing was run.
pub const REASON_REFUSED: &str = "refused";
/// [`QuickJobResult::reason`]: the agent or its machine ended while the script ran, or the agent does not know the job any more; what
/// the script did is unknown. The status
/// that goes with it is [`STATUS_TIMED_OUT`], as for a script that nothing was heard of.
pub const REASON_OUTCOME_UNKNOWN: &str = "outcome_unknown";
/// [`QuickJobResult::reason`]: the agent was stopped and took the script with it.
pub const REASON_AGENT_STOPPED: &str = "agent_stopped";
/// [`QuickJobResult::reason`]: the machine could not start the script or hold the job.
pub const REASON_AGENT_ERROR: &str = "agent_error";

/// [`QuickJobDeclined::reason`]: the disk of the machine is full.
pub const DECLINED_DISK_FULL: &str = "agent_disk_full";
/// [`QuickJobDeclined::reason`]: the disk of the machine does not take the job for another reason.
pub const DECLINED_DISK_ERROR: &str = "agent_disk_error";
/// [`QuickJobDeclined::reason`]: the agent holds as many jobs as it may.
pub const DECLINED_QUEUE_FULL: &str = "agent_queue_full";

/// The most bytes of one output stream in one [`QuickJobProgress`].
pub const PROGRESS_CAP_BYTES: usize = 64 * 1024;

/// Registers an agent's socket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectAgent {
    /// See [`crate::agent_id`].
    #[serde(default)]
    pub agent_id: String,
    /// Name of the machine.
    #[serde(default)]
    pub hostname: String,
    /// `system`; aliases are the engine's to normalise.
    #[serde(default)]
    pub service_mode: String,
    /// What the agent can do.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// `["currentuser"]` when the system service can also run scripts in user sessions.
    #[serde(default)]
    pub helper_contexts: Vec<String>,
    /// See [`crate::machine_id`]; empty when the machine has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    /// A UUID that the agent makes up at each start: two that are there at once are two agents. Empty when it says none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instance: String,
}

impl ConnectAgent {
    /// Reads the argument of `connect_agent` in every form agents send: an object, or a bare text that is the agent id.
    /// Helper contexts may also stand inside `capabilities`. None for anything else.
    #[must_use]
    pub fn from_value(value: &Value) -> Option<Self> {
        if let Value::String(agent_id) = value {
            return Some(Self { agent_id: agent_id.clone(), ..Self::default() });
        }
        let mut parsed: Self = serde_json::from_value(value.clone()).ok()?;
        if parsed.helper_contexts.is_empty() {
            parsed.helper_contexts.clone_from(&parsed.capabilities.helper_contexts);
        }
        Some(parsed)
    }
}

/// What an agent can do. Flags that are absent or not a boolean read as false.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// `go` for the reference's agent, `rust` for ours.
    #[serde(default)]
    pub runtime: String,
    /// Runs scripts as the system account.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub system_scripts: bool,
    /// Never runs a job id twice, and answers with acks; may be sent a dispatch again.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub dedup: bool,
    /// Stores rotated refresh tokens.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub rotates: bool,
    /// Understands [`QuickJobCancel`].
    #[serde(default, deserialize_with = "lenient::flag")]
    pub cancel: bool,
    /// Sends output while a script runs.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub output: bool,
    /// Files can be managed.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub file_management: bool,
    /// Processes can be listed and ended.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub process_management: bool,
    /// A remote shell can be opened.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub remote_shell: bool,
    /// Services can be managed.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub service_management: bool,
    /// Software can be listed.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub software_management: bool,
    /// Remote desktop.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub vnc: bool,
    /// WireGuard tunnel.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub wireguard_tunnel: bool,
    /// As [`ConnectAgent::helper_contexts`], in the place some agents put it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub helper_contexts: Vec<String>,
}

/// The engine's answer to what an agent sends with an ack id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// `ok`: stored. `ignored`: understood and of no use (unknown job, already final); the agent need not send it again.
    #[serde(default)]
    pub status: String,
    /// Set instead of `status` when the engine could not handle the event; the agent sends it again later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Milliseconds to wait before sending again or connecting again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Ack {
    /// `{"status":"ok"}`.
    #[must_use]
    pub fn ok() -> Self {
        Self { status: "ok".to_owned(), error: None, retry_after_ms: None }
    }

    /// `{"status":"ignored"}`.
    #[must_use]
    pub fn ignored() -> Self {
        Self { status: "ignored".to_owned(), error: None, retry_after_ms: None }
    }

    /// `{"error":code}`: try again.
    #[must_use]
    pub fn retry(code: &str) -> Self {
        Self { status: String::new(), error: Some(code.to_owned()), retry_after_ms: None }
    }

    /// Whether the event is settled and need not be sent again.
    #[must_use]
    pub fn settles(&self) -> bool {
        self.error.is_none() && matches!(self.status.as_str(), "ok" | "ignored")
    }
}

/// One script for one device, with the signed [`Envelope`] beside the legacy fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QuickJobRun {
    /// Id of the activity row.
    pub job_id: i64,
    /// The hostname that the agent reported, for agents that compare it with their own. The machine meant is the one whose GUID the
    /// envelope has.
    #[serde(default)]
    pub target_hostname: String,
    /// `bash`, `powershell` or `batch`.
    #[serde(default)]
    pub script_type: String,
    /// Name of the assembly.
    #[serde(default)]
    pub script_name: String,
    /// Where the script came from.
    #[serde(default)]
    pub script_path: String,
    /// Base64 of the script, UTF-8 with LF.
    #[serde(default)]
    pub script_content: String,
    /// `base64`.
    #[serde(default)]
    pub script_encoding: String,
    /// Process environment to add.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Items `{name, type, value | default}`; what they set and `environment` does not is added to the environment.
    #[serde(default)]
    pub variables: Vec<Value>,
    /// Limit of the script in seconds, 0 for none.
    #[serde(default)]
    pub timeout_seconds: u64,
    /// Not used by agents for scripts.
    #[serde(default)]
    pub files: Vec<Value>,
    /// `system` or `currentuser`.
    #[serde(default)]
    pub run_mode: String,
    /// Always empty.
    #[serde(default)]
    pub admin_user: String,
    /// Always empty.
    #[serde(default)]
    pub admin_pass: String,
    /// `system` or `currentuser`.
    #[serde(default)]
    pub target_context: String,
    /// `all_active_sessions` or `specific_session`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_target: Option<String>,
    /// Number of a Windows session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_session_id: Option<i64>,
    /// Base64 Ed25519 over the decoded script.
    #[serde(default)]
    pub signature: String,
    /// `ed25519`; `eddsa` and empty mean the same.
    #[serde(default)]
    pub sig_alg: String,
    /// Base64 SPKI of the signer. Our agent trusts only the key it pinned at enrollment, and whom that has passed its place to.
    #[serde(default)]
    pub signing_key: String,
    /// How the script key has passed its place on, from the first; left out where it never has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signing_key_successions: Vec<Succession>,
    /// The device has accepted this job before. An agent that does not know it, as its state is older or a copy, does not run it: it
    /// reports [`REASON_OUTCOME_UNKNOWN`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub accepted: bool,
    /// Repeated verbatim in every report.
    #[serde(default)]
    pub context: Map<String, Value>,
    /// What binds the script to job, device, environment and time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope: Option<Envelope>,
    /// Base64 Ed25519 over [`Envelope::to_sign`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub envelope_signature: Option<String>,
}

/// Stops a script, or takes it out of the agent's queue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuickJobCancel {
    /// Id of the activity row.
    pub job_id: i64,
    /// For people; reported with the result.
    #[serde(default)]
    pub reason: String,
}

/// The agent has the job on its disk and will report its end whatever happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuickJobAccepted {
    /// Id of the activity row.
    pub job_id: i64,
}

/// The agent could not write the job to its disk: it does not have it and will not run it. The engine offers it again later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuickJobDeclined {
    /// Id of the activity row.
    pub job_id: i64,
    /// One of the `DECLINED_` texts.
    #[serde(default)]
    pub reason: String,
}

/// What a running script said so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QuickJobProgress {
    /// Id of the activity row.
    pub job_id: i64,
    /// Empty reads as `Running`.
    #[serde(default)]
    pub status: String,
    /// Output; added to what is stored when `append_output`, else in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout: Option<String>,
    /// As `stdout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr: Option<String>,
    /// See `stdout`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append_output: Option<bool>,
    /// Lane of the activity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_lane: Option<String>,
    /// Kind of the activity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity_kind: Option<String>,
    /// Merged into the activity's metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<Map<String, Value>>,
    /// As received with the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<Map<String, Value>>,
}

/// How a script ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QuickJobResult {
    /// Id of the activity row.
    pub job_id: i64,
    /// [`STATUS_SUCCESS`], [`STATUS_FAILED`], [`STATUS_TIMED_OUT`]; empty reads as `Failed`.
    #[serde(default)]
    pub status: String,
    /// All of the output, in the place of what progress brought.
    #[serde(default)]
    pub stdout: String,
    /// As `stdout`.
    #[serde(default)]
    pub stderr: String,
    /// As received with the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<Map<String, Value>>,
    /// Exit code of the script; 128 + n when signal n ended it; absent when it was not run to an end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Output beyond [`crate::output::CAP_BYTES`] was left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truncated: Option<bool>,
    /// One of the `REASON_` texts, when the script did not end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn connect_agent_in_all_its_forms() {
        let go = json!({"agent_id": "A_1_SYSTEM", "service_mode": "system", "hostname": "A", "capabilities":
            {"runtime": "go", "system_scripts": true, "python_fallback": false, "vnc": "yes", "helper_contexts": ["currentuser"]}});
        let parsed = ConnectAgent::from_value(&go).unwrap();
        assert!(parsed.capabilities.system_scripts && !parsed.capabilities.dedup && !parsed.capabilities.vnc);
        assert_eq!(parsed.helper_contexts, ["currentuser"]);
        assert_eq!(ConnectAgent::from_value(&json!("A_1_SYSTEM")).unwrap().agent_id, "A_1_SYSTEM");
        assert_eq!(ConnectAgent::from_value(&json!([1])), None);
    }

    #[test]
    fn reports_keep_the_field_names_of_the_contract() {
        let result = QuickJobResult { job_id: 5, status: STATUS_SUCCESS.into(), stdout: "x".into(), ..QuickJobResult::default() };
        assert_eq!(serde_json::to_value(result).unwrap(), json!({"job_id": 5, "status": "Success", "stdout": "x", "stderr": ""}));
        assert!(serde_json::from_value::<QuickJobResult>(json!({"job_id": "5"})).is_err(), "ids are integers");
        let progress: QuickJobProgress = serde_json::from_value(json!({"job_id": 5, "status": "Running"})).unwrap();
        assert_eq!(progress.append_output, None);
    }

    #[test]
    fn only_a_settled_answer_ends_the_sending() {
        assert!(Ack::ok().settles() && Ack::ignored().settles());
        assert!(!Ack::retry("unavailable").settles());
        let odd: Ack = serde_json::from_value(json!({})).unwrap();
        assert!(!odd.settles());
    }
}
