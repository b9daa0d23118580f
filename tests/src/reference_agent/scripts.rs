//! How these agents run a script: checked by its signature, one at a time on each connection, all output kept, no exit code told.

use std::{collections::BTreeMap, process::Stdio, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use borealis_protocol::keys;
use ed25519_dalek::Verifier;
use serde_json::{Map, Value, json};
use tokio::process::Command;

use super::wire::Writer;

/// What a script left.
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs a script that was sent with `quick_job_run` and reports it on the connection it came on; the payload of the report. None
/// when it was not for this machine.
pub async fn run(writer: &Writer, hostname: &str, payload: &Value) -> Option<Value> {
    let text = |name: &str| payload[name].as_str().unwrap_or_default().trim().to_owned();
    let target = text("target_hostname");
    if !target.is_empty() && !target.eq_ignore_ascii_case(hostname) {
        return None;
    }
    if !matches!(text("run_mode").to_lowercase().as_str(), "" | "system") {
        return None;
    }
    let mut report = Map::new();
    report.insert("job_id".into(), payload["job_id"].clone());
    if payload["context"].is_object() {
        report.insert("context".into(), payload["context"].clone());
    }
    let ran = match checked(payload) {
        Err(refused) => Ran { code: -1, stdout: String::new(), stderr: refused.to_owned() },
        Ok(script) => {
            let mut progress = report.clone();
            progress.insert("status".into(), "Running".into());
            if let Some(lane) = payload["context"]["queue_lane"].as_str().filter(|lane| !lane.is_empty()) {
                progress.insert("queue_lane".into(), lane.into());
            }
            writer.emit("quick_job_progress", &Value::Object(progress)).await.ok()?;
            execute(payload, &script).await
        }
    };
    report.insert("status".into(), if ran.code == 0 { "Success" } else { "Failed" }.into());
    report.insert("stdout".into(), ran.stdout.into());
    report.insert("stderr".into(), ran.stderr.into());
    let report = Value::Object(report);
    // On a connection that is gone it is lost.
    let _ = writer.emit("quick_job_result", &report).await;
    Some(report)
}

/// The script, when its signature is good. The key in the message counts, as these agents see it.
fn checked(payload: &Value) -> Result<Vec<u8>, &'static str> {
    let text = |name: &str| payload[name].as_str().unwrap_or_default();
    let script = STANDARD.decode(text("script_content")).map_err(|_| "Invalid script payload (unable to decode)")?;
    if text("signature").is_empty() {
        return Err("Missing script signature; rejecting payload");
    }
    let good = || {
        let key = keys::from_spki_base64(text("signing_key")).ok()?;
        let signature = ed25519_dalek::Signature::from_slice(&STANDARD.decode(text("signature")).ok()?).ok()?;
        key.verify(&script, &signature).ok()
    };
    good().ok_or("Rejected script payload due to invalid signature")?;
    Ok(script)
}

fn environment(payload: &Value) -> BTreeMap<String, String> {
    let shown = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        other => other.to_string(),
    };
    let name = |text: &str| {
        let clean = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
        text.trim().chars().map(clean).collect::<String>().to_uppercase()
    };
    let mut environment: BTreeMap<String, String> =
        payload["environment"].as_object().into_iter().flatten().map(|(key, value)| (name(key), shown(value))).collect();
    for variable in payload["variables"].as_array().into_iter().flatten() {
        if let Some(key) = variable["name"].as_str().map(name) {
            environment.entry(key).or_insert_with(|| shown(&variable["default"]));
        }
    }
    environment
}

async fn execute(payload: &Value, script: &[u8]) -> Ran {
    if payload["script_type"] != "bash" {
        let kind = payload["script_type"].as_str().unwrap_or_default();
        return Ran { code: -1, stdout: String::new(), stderr: format!("Unsupported type: {kind}") };
    }
    let file = tempfile::NamedTempFile::new().expect("a file for a script");
    std::fs::write(file.path(), script).expect("a script is written");
    let mut command = Command::new("bash");
    command.arg(file.path()).envs(environment(payload)).stdin(Stdio::null()).kill_on_drop(true);
    let limit = payload["timeout_seconds"].as_u64().unwrap_or(0);
    let output = if limit == 0 {
        command.output().await
    } else {
        match tokio::time::timeout(Duration::from_secs(limit), command.output()).await {
            Ok(output) => output,
            // What it had printed is lost here; the reference keeps it, and nothing depends on it.
            Err(_) => {
                return Ran { code: -1, stdout: String::new(), stderr: format!("Script timed out after {limit} seconds") };
            }
        }
    };
    match output {
        Ok(output) => Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        },
        Err(error) => Ran { code: -1, stdout: String::new(), stderr: error.to_string() },
    }
}

/// What is said of roles in a heartbeat. The current user's role says `system` in its id and `currentuser` as its context.
pub fn roles(tunnel: Option<&str>, now: i64) -> Value {
    let role = |context: &str, name: &str, label: &str, code: &str, detail: &str, details: Value| {
        json!({
            "role_id": format!("system:{name}"), "role_name": name, "role_label": label, "context": context, "status": code,
            "status_code": code, "detail": detail, "details": details, "last_checked_at": now,
        })
    };
    let (code, detail) = tunnel.map_or(("healthy", "Persistent WireGuard tunnel active."), |error| ("recovering", error));
    let ready = json!({"running_status": "Ready", "execution_context": "SYSTEM", "runtime": "go"});
    let mut tunnel_details = json!({"running_status": "Stopped", "tunnel_id": "", "runtime": "go", "supervisor_revision": 3});
    if let Some(error) = tunnel {
        tunnel_details["last_error"] = error.into();
    }
    json!({
        "roles": [
            role("system", "context_system", "SYSTEM Context", "healthy", "Go SYSTEM script listener is ready.", ready),
            role("currentuser", "context_currentuser", "Current User Context", "unsupported",
                 "CURRENTUSER helper broker is unavailable.", json!({"running_status": "Unavailable", "runtime": "go"})),
            role("system", "wireguard_tunnel", "WireGuard VPN", code, detail, tunnel_details),
        ],
        "reported_at": now, "supervisor_revision": 3,
    })
}
