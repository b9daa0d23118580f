//! The health of an agent's roles: what agents report in many spellings, in one form, merged with what
//! is stored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::clean;

/// Roles kept of one device.
pub const MAX_ROLES: usize = 200;
/// A role not checked for this many seconds reads as unknown.
pub const STALE_S: i64 = 900;
/// A document that only repeats what is stored is stored again after this many seconds, long before its roles are stale.
pub const REPEATED_S: i64 = 300;
/// The role that tells how the agent's start went; only its own report replaces it.
pub const STARTUP_ROLE: &str = "system_heartbeat";

const MAX_DETAILS: usize = 64;
const MAX_TEXT_CHARS: usize = 4096;

/// All roles of a device.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Document {
    /// Sorted by label, then context.
    pub roles: Vec<Role>,
    /// Epoch seconds of the newest report.
    pub reported_at: i64,
    /// The largest seen.
    pub supervisor_revision: i64,
}

/// One role.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Role {
    /// As the agent says it; `<context>:<role_name>` when it does not.
    pub role_id: String,
    /// Short name.
    pub role_name: String,
    /// Name for people.
    pub role_label: String,
    /// `system`, `currentuser` or what the agent says.
    pub context: String,
    /// `healthy, recovering, unhealthy, pending, loaded, unsupported, not_applicable` or `unknown`.
    pub status_code: String,
    /// The status for people.
    pub status: String,
    /// One line of explanation.
    pub detail: String,
    /// More of it.
    pub details: BTreeMap<String, String>,
    /// Epoch seconds.
    pub last_checked_at: i64,
    /// What newer agents add: `desired_state, observed_state, last_success_at, recovery_attempts, last_error`.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

const MORE: [&str; 5] = ["desired_state", "observed_state", "last_success_at", "recovery_attempts", "last_error"];

/// One of the known status codes.
#[must_use]
pub fn status_code(text: &str) -> &'static str {
    match text.trim().to_lowercase().replace([' ', '-'], "_").as_str() {
        "healthy" | "ok" | "up" | "ready" | "running" | "online" => "healthy",
        "recovering" | "warning" | "degraded" | "healing" | "starting" => "recovering",
        "pending" | "bootstrapping" | "initializing" | "idle" => "pending",
        "unhealthy" | "down" | "failed" | "error" | "broken" => "unhealthy",
        "loaded" => "loaded",
        "unsupported" => "unsupported",
        "not_applicable" => "not_applicable",
        _ => "unknown",
    }
}

/// A context in its one spelling.
#[must_use]
pub fn context(text: &str) -> String {
    match text.trim().to_lowercase().as_str() {
        "" | "system" | "svc" | "service" | "system_service" => "system".to_owned(),
        "interactive" | "currentuser" | "current_user" | "user" => "currentuser".to_owned(),
        other => clean::line(other, 64),
    }
}

fn role_name(text: &str) -> String {
    let name = text.trim().to_lowercase().replace([' ', '-'], "_");
    match name.as_str() {
        "script_exec_system" => "context_system".to_owned(),
        "script_exec_currentuser" => "context_currentuser".to_owned(),
        "device_audit" => "device_auditor".to_owned(),
        "service_control" => "service_management".to_owned(),
        "remoteshell" => "remote_shell".to_owned(),
        "wireguardtunnel" => "wireguard".to_owned(),
        "macro" => "macros".to_owned(),
        "screenshot" => "node_screenshot".to_owned(),
        _ => clean::line(&name, 64),
    }
}

fn capitalised(code: &str) -> String {
    let mut words = code.replace('_', " ");
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

fn first<'a>(map: &'a Map<String, Value>, names: &[&str]) -> Option<&'a Value> {
    names.iter().find_map(|name| map.get(*name).filter(|value| !value.is_null() && value.as_str() != Some("")))
}

fn text(map: &Map<String, Value>, names: &[&str]) -> String {
    first(map, names).map(|value| clean::text(&as_text(value), MAX_TEXT_CHARS)).unwrap_or_default()
}

/// A text for people: of an answer of the engine that an agent quotes, its message.
#[must_use]
pub fn readable(text: &str) -> String {
    let quoted = text.find('{').and_then(|at| serde_json::from_str::<Map<String, Value>>(text.get(at..)?.trim()).ok());
    let said = quoted.as_ref().and_then(|body| ["message", "error"].iter().find_map(|name| body.get(*name)?.as_str()));
    said.filter(|said| !said.is_empty()).unwrap_or(text).to_owned()
}

fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn seconds(value: Option<&Value>) -> i64 {
    value.and_then(|value| value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds as i64))).unwrap_or(0).max(0)
}

impl Role {
    /// Reads one role of a report; none when it has no name. `reporting` is the context of the sender.
    fn read(value: &Value, reporting: &str, now: i64) -> Option<Self> {
        let map = value.as_object()?;
        let name = text(map, &["role_name", "role", "name", "role_label", "label"]);
        let role_name = role_name(&name);
        if role_name.is_empty() {
            return None;
        }
        let stated_id = clean::line(&text(map, &["role_id"]), 200);
        let context = first(map, &["context"]).and_then(Value::as_str).map_or_else(|| reporting.to_owned(), context);
        let label = text(map, &["role_label", "label"]);
        let stated = text(map, &["status_code", "status"]);
        let code = status_code(&stated);
        let shown = text(map, &["status"]);
        let details = first(map, &["details", "metadata", "info"]).and_then(Value::as_object);
        Some(Self {
            role_id: if stated_id.is_empty() { format!("{context}:{role_name}") } else { stated_id },
            role_label: if label.is_empty() { capitalised(&role_name) } else { clean::line(&label, 128) },
            role_name,
            context,
            status_code: code.to_owned(),
            status: if shown.is_empty() || shown.to_lowercase() == code { capitalised(code) } else { clean::line(&shown, 128) },
            detail: readable(&text(map, &["detail", "message"])),
            details: details
                .into_iter()
                .flatten()
                .take(MAX_DETAILS)
                .map(|(name, value)| (clean::line(name, 128), readable(&clean::text(&as_text(value), MAX_TEXT_CHARS))))
                .collect(),
            last_checked_at: match seconds(first(map, &["last_checked_at", "checked_at"])) {
                0 => now,
                at => at,
            },
            more: MORE
                .iter()
                .filter_map(|name| Some(((*name).to_owned(), map.get(*name).filter(|value| !value.is_null())?)))
                .map(|(name, value)| match value {
                    Value::String(text) => (name, Value::String(readable(&clean::text(text, MAX_TEXT_CHARS)))),
                    other => (name, clean::json(other.clone())),
                })
                .filter(|(_, value)| value.to_string().len() <= MAX_TEXT_CHARS)
                .collect(),
        })
    }
}

impl Document {
    /// Reads a report: the document, or a bare list of roles.
    #[must_use]
    pub fn read(value: &Value, reporting: &str, now: i64) -> Self {
        let empty = Vec::new();
        let (roles, reported_at, supervisor_revision) = match value {
            Value::Array(roles) => (roles, now, 0),
            Value::Object(map) => (
                map.get("roles").and_then(Value::as_array).unwrap_or(&empty),
                Some(seconds(map.get("reported_at"))).filter(|at| *at > 0).unwrap_or(now),
                map.get("supervisor_revision").and_then(Value::as_i64).unwrap_or(0),
            ),
            _ => (&empty, 0, 0),
        };
        let roles = roles.iter().take(MAX_ROLES).filter_map(|role| Role::read(role, reporting, now)).collect();
        Self { roles, reported_at, supervisor_revision }
    }

    /// Merges a report from `reporting` into what is stored: every role of the reporting context and of each context in the
    /// report is replaced, others stay. The startup role stays too unless the report has it: it comes with the status
    /// route, and a heartbeat without it says nothing of it.
    #[must_use]
    pub fn merge(mut self, report: Self, reporting: &str) -> Self {
        let startup_reported = report.roles.iter().any(|role| role.role_name == STARTUP_ROLE);
        let mut contexts: Vec<String> = report.roles.iter().map(|role| role.context.clone()).collect();
        contexts.push(reporting.to_owned());
        self.roles.retain(|role| !contexts.contains(&role.context) || (role.role_name == STARTUP_ROLE && !startup_reported));
        self.add(report.roles);
        self.reported_at = self.reported_at.max(report.reported_at);
        self.supervisor_revision = self.supervisor_revision.max(report.supervisor_revision);
        self
    }

    /// Whether nothing but the times differs from what is stored, and that is young.
    #[must_use]
    pub fn repeats(&self, stored: &Self) -> bool {
        let timeless = |document: &Self| {
            let roles = document.roles.iter().map(|role| Role { last_checked_at: 0, ..role.clone() }).collect();
            Self { roles, reported_at: 0, ..document.clone() }
        };
        let ages = |from: i64, to: i64| (0..REPEATED_S).contains(&(to - from));
        let times = |document: &Self| {
            let checked = document.roles.iter().map(|role| role.last_checked_at);
            std::iter::once(document.reported_at).chain(checked).collect::<Vec<_>>()
        };
        timeless(self) == timeless(stored) && times(stored).into_iter().zip(times(self)).all(|(from, to)| ages(from, to))
    }

    /// Replaces single roles, by id.
    #[must_use]
    pub fn with(mut self, role: Role, now: i64) -> Self {
        self.add(vec![role]);
        self.reported_at = self.reported_at.max(now);
        self
    }

    fn add(&mut self, roles: Vec<Role>) {
        let mut by_id: BTreeMap<String, Role> =
            std::mem::take(&mut self.roles).into_iter().map(|role| (role.role_id.clone(), role)).collect();
        by_id.extend(roles.into_iter().map(|role| (role.role_id.clone(), role)));
        self.roles = by_id.into_values().collect();
        self.roles.sort_by(|a, b| {
            (a.role_label.to_lowercase(), &a.context, &a.role_id).cmp(&(b.role_label.to_lowercase(), &b.context, &b.role_id))
        });
        self.roles.truncate(MAX_ROLES);
    }

    /// The document for operators: roles not checked for [`STALE_S`] seconds read as unknown.
    #[must_use]
    pub fn shown(mut self, now: i64) -> Value {
        for role in &mut self.roles {
            if now - role.last_checked_at > STALE_S {
                role.status_code = "unknown".to_owned();
                role.status = "Unknown".to_owned();
                role.more.insert("stale".to_owned(), Value::Bool(true));
            }
        }
        serde_json::to_value(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ids(document: &Document) -> Vec<&str> {
        document.roles.iter().map(|role| role.role_id.as_str()).collect()
    }

    #[test]
    fn many_spellings_have_one_form() {
        let report = json!([
            {"role": "Script Exec System", "status": "running", "message": "fine", "info": {"n": 3, "t": "x"}, "checked_at": 7},
            {"label": "WireGuardTunnel", "context": "Interactive", "status_code": "FAILED", "status": "Broken pipe"},
            {"status": "ok"},
            "nothing",
        ]);
        let read = Document::read(&report, "system", 100);
        assert_eq!(ids(&read), ["system:context_system", "currentuser:wireguard"]);
        let role = &read.roles[0];
        assert_eq!((role.status_code.as_str(), role.status.as_str(), role.detail.as_str()), ("healthy", "running", "fine"));
        assert_eq!(role.details, BTreeMap::from([("n".to_owned(), "3".to_owned()), ("t".to_owned(), "x".to_owned())]));
        assert_eq!((role.last_checked_at, read.roles[1].last_checked_at), (7, 100));
        assert_eq!((read.roles[1].status_code.as_str(), read.roles[1].status.as_str()), ("unhealthy", "Broken pipe"));
        for (text, code) in [
            ("degraded", "recovering"),
            ("idle", "pending"),
            ("not applicable", "not_applicable"),
            ("?", "unknown"),
            ("", "unknown"),
        ] {
            assert_eq!(status_code(text), code);
        }
        assert_eq!(Document::read(&json!("x"), "system", 1), Document::default());
    }

    #[test]
    fn a_report_replaces_its_contexts_and_leaves_the_rest() {
        let role = |context: &str, name: &str| json!({"role_name": name, "context": context, "status": "ok"});
        let stored = Document::read(
            &json!({"roles": [role("system", "gone"), role("system", STARTUP_ROLE), role("currentuser", "helper"), role("startup", "x")],
                    "reported_at": 50, "supervisor_revision": 9}),
            "system",
            50,
        );
        let report = Document::read(
            &json!({"roles": [role("system", "kept")], "reported_at": 40, "supervisor_revision": 3}),
            "system",
            60,
        );
        let merged = stored.clone().merge(report, "system");
        assert_eq!(ids(&merged), ["currentuser:helper", "system:kept", "system:system_heartbeat", "startup:x"]);
        assert_eq!((merged.reported_at, merged.supervisor_revision), (50, 9));

        let empty = stored.clone().merge(Document::read(&json!([]), "currentuser", 60), "currentuser");
        assert!(!ids(&empty).contains(&"currentuser:helper"));
        assert!(ids(&empty).contains(&"system:gone"));

        let with_startup = Document::read(&json!([role("system", STARTUP_ROLE)]), "system", 70);
        let merged = stored.merge(with_startup, "system");
        assert_eq!(merged.roles.iter().filter(|role| role.role_name == STARTUP_ROLE).count(), 1);
        assert_eq!(merged.roles.iter().find(|role| role.role_name == STARTUP_ROLE).unwrap().last_checked_at, 70);
    }

    #[test]
    fn old_roles_read_as_unknown_and_documents_survive_storage() {
        let stored =
            Document::read(&json!([{"role": "a", "status": "ok", "last_error": "none", "last_checked_at": 1000}]), "system", 0);
        let again: Document = serde_json::from_value(serde_json::to_value(&stored).unwrap()).unwrap();
        assert_eq!(again, stored);
        assert_eq!(again.clone().shown(1900)["roles"][0]["status_code"], "healthy");
        let shown = again.shown(1901);
        assert_eq!((&shown["roles"][0]["status_code"], &shown["roles"][0]["stale"]), (&json!("unknown"), &json!(true)));
        assert_eq!(shown["roles"][0]["last_error"], "none");
    }

    #[test]
    fn an_answer_of_the_engine_is_shown_as_its_message_and_an_id_as_it_was_sent() {
        let quoted = "WireGuard ensure request failed: POST /api/agent/vpn/ensure failed: HTTP 503: \
                      {\"error\":\"tunnel_unavailable\",\"message\":\"There are no tunnels.\",\"request_id\":\"x\"}\n";
        let report = json!([
            {"role_id": "system:context_currentuser", "role_name": "context_currentuser", "context": "currentuser",
             "detail": quoted, "details": {"last_error": quoted, "other": "{not json"}, "last_error": quoted},
            {"role_name": "vnc", "detail": "{\"error\":\"busy\"}"},
        ]);
        let read = Document::read(&report, "system", 1);
        assert_eq!(ids(&read), ["system:context_currentuser", "system:vnc"]);
        let role = &read.roles[0];
        assert_eq!((role.context.as_str(), role.detail.as_str()), ("currentuser", "There are no tunnels."));
        assert_eq!((role.details["last_error"].as_str(), role.details["other"].as_str()), ("There are no tunnels.", "{not json"));
        assert_eq!((&role.more["last_error"], read.roles[1].detail.as_str()), (&json!("There are no tunnels."), "busy"));
        assert_eq!(readable("plain"), "plain");
    }

    #[test]
    fn a_report_is_bounded() {
        let many: Vec<Value> = (0..500).map(|n| json!({"role": format!("r{n}"), "message": "x".repeat(10_000)})).collect();
        let read = Document::read(&Value::Array(many), "system", 1);
        assert_eq!((read.roles.len(), read.roles[0].detail.chars().count()), (MAX_ROLES, MAX_TEXT_CHARS));
    }

    #[test]
    fn a_report_that_only_repeats_is_stored_again_from_time_to_time() {
        let document = |status: &str, at: i64| {
            let roles = json!([{"role": "script_exec_system", "status": status, "last_checked_at": at}, {"role": "macro", "status": "ok"}]);
            Document::read(&json!({"roles": roles, "reported_at": at}), "system", at)
        };
        let stored = document("ok", 1_000);
        assert!(document("ok", 1_020).repeats(&stored));
        assert!(!document("failed", 1_020).repeats(&stored));
        assert!(!document("ok", 1_000 + REPEATED_S).repeats(&stored), "or its roles would go stale");
        assert!(!document("ok", 900).repeats(&stored), "a clock that was set back");
        assert!(!Document::default().repeats(&stored) && !stored.repeats(&Document::default()));
    }
}
