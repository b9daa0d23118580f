//! Other systems, measured by drivers outside of this project: a folder of programs that print one JSON object a case.

use std::{path::Path, process::Stdio};

use serde_json::Value;
use tokio::process::Command;

use super::Report;

/// The case of the drivers that is compared with.
const MESH_CASE: &str = "meshcentral 1000 agents reconnect";

/// MeshCentral with a thousand agents that come back, over TLS as it demands: the best of the driver's repetitions.
///
/// # Panics
/// When the driver cannot be run, or says nothing of the case: most often because MeshCentral is not set up.
pub async fn meshcentral(drivers: &Path, ours: f64, report: &mut Report) {
    let output = Command::new("python3")
        .arg(drivers.join("mesh_case.py"))
        .arg("agents")
        .current_dir(drivers)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .await
        .expect("python3");
    let said = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Value> = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|row| row["case"].as_str().is_some_and(|case| case.trim() == MESH_CASE))
        .collect();
    assert!(!rows.is_empty(), "{} said nothing of {MESH_CASE}:\n{said}", drivers.display());
    let best = |of: fn(&Value) -> f64| rows.iter().map(of).fold(0.0, f64::max);
    let rate = best(|row| row["per_s"].as_f64().unwrap_or(0.0));
    let memory = rows.iter().filter_map(|row| row["rss_mb"].as_f64()).fold(f64::INFINITY, f64::min);
    report.figure("MeshCentral, 1,000 agents, let in", rate, "agents/s");
    report.figure("agents let in, to MeshCentral", ours / rate, "x");
    report.figure("MeshCentral, memory with 1,000 agents", memory, "MB");
}
