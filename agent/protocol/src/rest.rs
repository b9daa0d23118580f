//! Bodies of the agent's REST routes. Readers ignore unknown fields; absent texts read
//! as empty, so that the engine can answer with the code for a missing field.
//!
//! Types that carry tokens or codes have no `Debug`: they cannot be logged by accident.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::succession::Succession;

/// Path of [`EnrollRequest`].
pub const PATH_ENROLL_REQUEST: &str = "/api/agent/enroll/request";
/// Path of [`PollRequest`].
pub const PATH_ENROLL_POLL: &str = "/api/agent/enroll/poll";
/// Path of [`RefreshRequest`].
pub const PATH_TOKEN_REFRESH: &str = "/api/agent/token/refresh";
/// Path of [`Heartbeat`].
pub const PATH_HEARTBEAT: &str = "/api/agent/heartbeat";
/// Path of [`StatusReport`].
pub const PATH_STATUS: &str = "/api/agent/status";
/// Path of [`Details`].
pub const PATH_DETAILS: &str = "/api/agent/details";
/// Path that answers [`ScriptIdle`].
pub const PATH_SCRIPT_REQUEST: &str = "/api/agent/script/request";

/// [`StatusReport::phase`] of an agent that stops: its good-bye.
pub const PHASE_STOPPED: &str = "stopped";

/// `error` codes of a refused token refresh that end the agent's account: it gives up its tokens. With status 401, 403 or 404,
/// and only where the whole code is one of these: what a proxy says in between ends nothing.
pub const FINAL_REFRESH_ERRORS: [&str; 6] = [
    "refresh_token_expired",
    "refresh_token_revoked",
    "device_purged",
    "device_revoked",
    "fingerprint_mismatch",
    "token_version_mismatch",
];
/// `error` codes of a refused token refresh that end nothing: the agent keeps its tokens and tries again.
pub const PASSING_REFRESH_ERRORS: [&str; 2] = ["invalid_refresh_token", "device_not_found"];

/// What an agent says of its token handling at enrollment and refresh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCapabilities {
    /// The agent stores a new refresh token from a refresh answer; agents that say nothing keep their first one forever.
    #[serde(default)]
    pub rotates: bool,
}

/// Asks for admission.
#[derive(Clone, Serialize, Deserialize)]
pub struct EnrollRequest {
    /// Name of the machine.
    #[serde(default)]
    pub hostname: String,
    /// The site's enrollment code.
    #[serde(default)]
    pub enrollment_code: String,
    /// Base64 SPKI of the agent's Ed25519 key.
    #[serde(default)]
    pub agent_pubkey: String,
    /// Base64 of at least 16 random bytes; repeated in every poll.
    #[serde(default)]
    pub client_nonce: String,
    /// `{job_id, run_id, target}` when an onboarding job installed the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onboarding_context: Option<Value>,
}

/// The answer to [`EnrollRequest`]. `status` is always `pending`, as deployed agents abort on anything else.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EnrollResponse {
    /// `pending`.
    pub status: String,
    /// Names the request in polls.
    #[serde(default)]
    pub approval_reference: String,
    /// Base64 of 32 random bytes of the engine.
    #[serde(default)]
    pub server_nonce: String,
    /// Milliseconds to wait before the first poll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_after_ms: Option<u64>,
    /// The site admits machines by itself at the moment.
    #[serde(default, skip_serializing_if = "is_false")]
    pub auto_approved: bool,
    /// Base64 SPKI of the engine's script-signing key.
    #[serde(default)]
    pub signing_key: String,
}

/// Asks whether the request was decided, and proves possession of the key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PollRequest {
    /// As answered to [`EnrollRequest`].
    #[serde(default)]
    pub approval_reference: String,
    /// The same text as in [`EnrollRequest`].
    #[serde(default)]
    pub client_nonce: String,
    /// Base64 signature over [`crate::keys::enrollment_proof_bytes`].
    #[serde(default)]
    pub proof_sig: String,
    /// How the agent handles tokens.
    #[serde(default)]
    pub capabilities: TokenCapabilities,
}

/// The answer to [`PollRequest`].
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct PollResponse {
    /// `pending`, `approved`, `completed`, `denied`, `expired` or `unknown`.
    #[serde(default)]
    pub status: String,
    /// Milliseconds to wait before the next poll, while `pending`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_after_ms: Option<u64>,
    /// Why it was denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `finalized` when the tokens were handed out before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The device's GUID, once approved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guid: Option<String>,
    /// Bearer token for every device route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
    /// Seconds the access token lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in: Option<i64>,
    /// Token for [`RefreshRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<String>,
    /// `Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_type: Option<String>,
    /// Base64 SPKI of the engine's script-signing key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing_key: Option<String>,
    /// Where the agent's socket goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_ops_route: Option<RemoteOpsRoute>,
}

/// Asks for a new access token.
#[derive(Clone, Serialize, Deserialize)]
pub struct RefreshRequest {
    /// The device's GUID.
    #[serde(default)]
    pub guid: String,
    /// The refresh token last received.
    #[serde(default)]
    pub refresh_token: String,
    /// How the agent handles tokens.
    #[serde(default)]
    pub capabilities: TokenCapabilities,
    /// See [`crate::machine_id`]; empty when the machine has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    /// See [`crate::events::ConnectAgent::instance`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instance: String,
}

/// The answer to [`RefreshRequest`].
#[derive(Clone, Serialize, Deserialize)]
pub struct RefreshResponse {
    /// Bearer token for every device route.
    #[serde(default)]
    pub access_token: String,
    /// Seconds the access token lives.
    #[serde(default)]
    pub expires_in: i64,
    /// `Bearer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_type: Option<String>,
    /// The next refresh token, for agents that announced [`TokenCapabilities::rotates`]; the former one ends once this one is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_token: Option<String>,
    /// Where the agent's socket goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_ops_route: Option<RemoteOpsRoute>,
}

/// Where an agent's socket goes. Newer reference agents refuse to connect without an available route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteOpsRoute {
    /// Whether the rest is filled.
    #[serde(default)]
    pub available: bool,
    /// The device's site.
    #[serde(default)]
    pub site_id: Option<i64>,
    /// Why there is no route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// GUID of the site's worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_guid: Option<String>,
    /// Grows when the route changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_generation: Option<i64>,
    /// `/_borealis/site-workers/<worker_guid>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_path_prefix: Option<String>,
    /// Public base URL followed by the prefix; the socket is at this plus `/socket.io/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// `base_url` plus `/socket.io/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_url: Option<String>,
    /// `{base, socket_io}`, the same two again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub urls: Option<Value>,
}

impl RemoteOpsRoute {
    /// The base URL of the socket if an agent may use this route: available, and base URL and prefix both name
    /// the worker.
    #[must_use]
    pub fn usable_base_url(&self) -> Option<&str> {
        let (guid, base) = (self.worker_guid.as_deref()?, self.base_url.as_deref()?);
        let prefix = self.route_path_prefix.as_deref()?;
        let names_worker = |text: &str| text.contains("/_borealis/site-workers/") && text.contains(guid);
        (self.available && !guid.is_empty() && names_worker(base) && names_worker(prefix)).then_some(base)
    }
}

/// Sign of life with what changes often.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Name of the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// `system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_mode: Option<String>,
    /// Load and uptime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Any of `memory, network, software, storage, cpu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inventory: Option<Map<String, Value>>,
    /// First address of the machine that is not loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_ip: Option<String>,
    /// `Server`, `Workstation`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_type: Option<String>,
    /// Build of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_build_id: Option<String>,
    /// State of the agent's roles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_role_health: Option<RoleHealth>,
}

/// What a machine is doing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Name of the operating system with its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operating_system: Option<String>,
    /// Boot time, RFC 3339 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reboot: Option<String>,
    /// Seconds since boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime: Option<u64>,
    /// 0 to 100 over all processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<f64>,
    /// 0 to 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_percent: Option<f64>,
    /// `system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_mode: Option<String>,
}

/// The answer to [`Heartbeat`] and [`StatusReport`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct IngestResponse {
    /// `ok`.
    #[serde(default)]
    pub status: String,
    /// Milliseconds the engine would like to be left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_after_ms: Option<u64>,
    /// The device's site.
    #[serde(default)]
    pub site_id: Option<i64>,
    /// Name of that site.
    #[serde(default)]
    pub site_name: String,
    /// The report repeated the one before.
    #[serde(default, skip_serializing_if = "is_false")]
    pub coalesced: bool,
    /// Whether the engine knows of a socket of this agent; of heartbeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_connected: Option<bool>,
    /// The engine's script key now, base64 SPKI; of heartbeats.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub signing_key: String,
    /// How it came to its place; left out where it is the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signing_key_successions: Vec<Succession>,
}

/// State of all roles.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RoleHealth {
    /// One entry per role.
    #[serde(default)]
    pub roles: Vec<Role>,
    /// Epoch seconds.
    #[serde(default)]
    pub reported_at: i64,
    /// Grows with every change of the set of roles.
    #[serde(default)]
    pub supervisor_revision: i64,
}

/// State of one role.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Role {
    /// `<context>:<role_name>`.
    #[serde(default)]
    pub role_id: String,
    /// Short name, for example `context_system`.
    #[serde(default)]
    pub role_name: String,
    /// Name for people.
    #[serde(default)]
    pub role_label: String,
    /// `system` or `currentuser`.
    #[serde(default)]
    pub context: String,
    /// `healthy, recovering, unhealthy, pending, unsupported, not_applicable` or `unknown`.
    #[serde(default)]
    pub status_code: String,
    /// The status for people.
    #[serde(default)]
    pub status: String,
    /// One line of explanation.
    #[serde(default)]
    pub detail: String,
    /// More of it; values are texts.
    #[serde(default)]
    pub details: std::collections::BTreeMap<String, String>,
    /// Epoch seconds.
    #[serde(default)]
    pub last_checked_at: i64,
}

/// Progress of the agent's start, and its end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Name of the machine.
    #[serde(default)]
    pub hostname: String,
    /// `system`.
    #[serde(default)]
    pub service_mode: String,
    /// Differs with every start of the agent.
    #[serde(default)]
    pub boot_id: String,
    /// Key of the newest milestone, or `socket_disconnected`.
    #[serde(default)]
    pub phase: String,
    /// `healthy`, `recovering`, `degraded`, `unhealthy`.
    #[serde(default)]
    pub status: String,
    /// One line for people.
    #[serde(default)]
    pub message: String,
    /// All milestones in order.
    #[serde(default)]
    pub milestones: Vec<Milestone>,
    /// What went wrong last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// One step of the agent's start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestone {
    /// Stable name, for example `socket_connected`.
    #[serde(default)]
    pub key: String,
    /// Name for people.
    #[serde(default)]
    pub label: String,
    /// `pending, active, complete, failed` or `skipped`.
    #[serde(default)]
    pub state: String,
    /// One line for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Epoch seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<i64>,
    /// Epoch seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<i64>,
    /// Epoch seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<i64>,
}

/// The full inventory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Details {
    /// Name of the machine.
    #[serde(default)]
    pub hostname: String,
    /// See [`crate::agent_id`].
    #[serde(default)]
    pub agent_id: String,
    /// Build of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_build_id: Option<String>,
    /// `system`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_mode: Option<String>,
    /// State of the agent's roles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_role_health: Option<RoleHealth>,
    /// `summary{}, memory[], network[], software[], storage[], cpu{}, sessions, processes`.
    #[serde(default)]
    pub details: Map<String, Value>,
}

/// The answer of the script poll; work never comes this way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScriptIdle {
    /// `idle` or `quarantined`.
    pub status: String,
    /// Milliseconds until the next poll.
    pub poll_after_ms: u64,
    /// `ed25519`.
    pub sig_alg: String,
    /// Base64 SPKI of the engine's script-signing key.
    pub signing_key: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
const fn is_false(value: &bool) -> bool {
    !*value
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn absent_and_unknown_fields_are_taken() {
        let request: EnrollRequest = serde_json::from_value(json!({"hostname": "a", "surprise": 1})).unwrap();
        assert_eq!((request.hostname.as_str(), request.enrollment_code.as_str()), ("a", ""));
        let legacy: RefreshRequest = serde_json::from_value(json!({"guid": "G", "refresh_token": "t"})).unwrap();
        assert!(!legacy.capabilities.rotates);
    }

    #[test]
    fn a_route_counts_only_when_it_names_its_worker() {
        let route = RemoteOpsRoute {
            available: true,
            worker_guid: Some("ABC".into()),
            route_path_prefix: Some("/_borealis/site-workers/ABC".into()),
            base_url: Some("https://rmm.example/_borealis/site-workers/ABC".into()),
            ..RemoteOpsRoute::default()
        };
        assert_eq!(route.usable_base_url(), Some("https://rmm.example/_borealis/site-workers/ABC"));
        assert_eq!(RemoteOpsRoute { available: false, ..route.clone() }.usable_base_url(), None);
        assert_eq!(RemoteOpsRoute { base_url: Some("https://rmm.example".into()), ..route.clone() }.usable_base_url(), None);
        assert_eq!(RemoteOpsRoute { worker_guid: Some("ABD".into()), ..route }.usable_base_url(), None);
        let none: RemoteOpsRoute = serde_json::from_value(json!({"available": false, "site_id": null, "reason": "x"})).unwrap();
        assert_eq!(none.usable_base_url(), None);
    }
}
