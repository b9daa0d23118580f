//! The summary of a details report: a flat list of facts about a machine. Only what is known is kept, so that no agent can fill the
//! database or the list of devices with what nobody reads.

use serde_json::{Map, Value};

use super::clean;

/// The longest text of a fact, in characters.
const TEXT_CHARS: usize = 512;
/// What is known. Agents of different ages call the same fact by different names.
const KNOWN: [&str; 55] = [
    "address",
    "agent_branch",
    "agent_build_id",
    "agent_hash",
    "agent_id",
    "agent_operating_system",
    "agent_release_channel",
    "agent_release_channel_effective",
    "agent_target_build_id",
    "agent_update_channel",
    "agent_update_error",
    "agent_update_source",
    "agent_update_state",
    "agent_update_target_build_id",
    "architecture",
    "branch",
    "connection_address",
    "connection_endpoint",
    "connection_type",
    "cpu_percent",
    "device_type",
    "domain",
    "external_ip",
    "hostname",
    "installed_build_id",
    "internal_ip",
    "kernel",
    "last_boot",
    "last_reboot",
    "last_seen",
    "last_update_error",
    "last_user",
    "last_user_name",
    "manufacturer",
    "memory_percent",
    "model",
    "operating_system",
    "os",
    "private_ip",
    "public_ip",
    "release_channel",
    "remote_type",
    "repo_branch",
    "repo_ref",
    "serial_number",
    "service_mode",
    "target_build_id",
    "target_channel",
    "type",
    "update_source",
    "update_state",
    "uptime",
    "uptime_sec",
    "uptime_seconds",
    "username",
];

/// The facts of `reported` in place of those of the same names in `stored`; what is absent or null is kept as it was.
#[must_use]
pub fn replaced(stored: &Map<String, Value>, reported: &Map<String, Value>) -> Map<String, Value> {
    let fact = |name: &str| [reported, stored].into_iter().find_map(|facts| facts.get(name).and_then(plain));
    KNOWN.into_iter().filter_map(|name| Some((name.to_owned(), fact(name)?))).collect()
}

/// A text, a number, or true or false; anything else is no fact.
fn plain(value: &Value) -> Option<Value> {
    match value {
        Value::String(text) => Some(clean::text(text, TEXT_CHARS).into()),
        Value::Number(_) | Value::Bool(_) => Some(value.clone()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn facts_are_replaced_and_what_is_not_known_is_not_kept() {
        let stored = map(json!({"domain": "corp", "os": "Debian", "uptime": 7, "x": {"a": 1}, "kernel": ["6"]}));
        let reported =
            map(json!({"domain": "", "os": null, "uptime": {"now": 8}, "y": "z", "last_user": "r\0oot", "cpu_percent": 1.5}));
        let expected = json!({"domain": "", "os": "Debian", "uptime": 7, "last_user": "root", "cpu_percent": 1.5});
        assert_eq!(Value::from(replaced(&stored, &reported)), expected);
    }

    #[test]
    fn it_does_not_grow_whatever_comes() {
        let mut stored = Map::new();
        for round in 0..4 {
            let long = "\u{1f600}".repeat(1_000_000);
            let names = KNOWN.iter().map(|name| (*name).to_owned()).chain((0..10_000).map(|n| format!("key-{round}-{n}")));
            stored = replaced(&stored, &names.map(|name| (name, long.get(..4_000).unwrap_or_default().into())).collect());
            stored = replaced(&stored, &map(json!({"hostname": long})));
        }
        assert_eq!(stored.len(), KNOWN.len());
        assert!(Value::from(stored).to_string().len() < KNOWN.len() * (TEXT_CHARS * 4 + 64));
    }
}
