//! Other systems, measured by drivers outside of this project: a folder of programs that install pinned peers into a scratch
//! folder and print one JSON object a repetition. Each is measured with the settings that make it look its best, and of its
//! repetitions the best counts.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::Value;
use tokio::process::Command;

use super::Report;

/// Where peers are installed and write: a variable of the drivers, in the folder for temporary files unless set.
const SCRATCH_VARIABLE: &str = "PEERS_DIR";
const MESH_CASE: &str = "meshcentral 1000 agents reconnect";
const RESTATE_CASE: &str = "restate, five steps";
const RESTATE_ALONE: &str = "restate, alone";
const DBOS_CASE: &str = "dbos, five steps";
const DBOS_ALONE: &str = "dbos, alone";

/// Restate: one partition instead of 24, HTTP/2, 512 in flight. DBOS (TypeScript): 64 in flight, a pool of 20, a Unix socket,
/// without LISTEN/NOTIFY. Both warmed with 2,000 runs. Those were the fastest of all that the drivers have tried.
const DURABLE: &str = r#"
import sys
import restate_case
from pb import *
reps = int(sys.argv[1])
pg_start()
try:
    one = {"RESTATE_DEFAULT_NUM_PARTITIONS": "1"}
    restate_case.rcase("restate, five steps", n=20000, conc=512, h2=True, warm=2000, env=one, reps=reps)
    restate_case.rcase("restate, alone", mode="lat", n=500, conc=1, warm=2000, env=one, reps=1)
    unix = {"DB": f"postgresql://postgres@localhost:{PORT}/bench?host={SOCK}", "PEERS_NODE": str(PEERS / "node/node_modules")}
    dbos = [[NODE, str(HERE / "dbos_ts.js")]]
    case("dbos, five steps", dbos, reps, {**unix, "MODE": "start", "CONC": "64", "POOL": "20", "N": "2000", "LISTEN": "0", "WARM": "2000"})
    case("dbos, alone", dbos, 1, {**unix, "MODE": "lat", "N": "500", "WARM": "2000"})
finally:
    pg_stop()
"#;

/// Repetitions of each throughput.
const REPETITIONS: &str = "3";

/// What ours came to, to be compared.
#[derive(Debug, Clone, Copy)]
pub struct Ours {
    /// Five-step runs per second.
    pub runs_per_s: f64,
    /// A five-step run alone, p50, in milliseconds.
    pub alone_ms: f64,
}

/// Five-step runs of Restate and of DBOS Transact.
///
/// # Panics
/// When a peer cannot be installed or run.
pub async fn durable(drivers: &Path, ours: Ours, report: &mut Report) {
    let drivers = &absolute(drivers);
    install(drivers, "setup.sh", "node/node_modules/@restatedev/restate-sdk").await;
    let mut python = Command::new("python3");
    python.args(["-c", DURABLE, REPETITIONS]).env("PYTHONPATH", drivers).env("PYTHONDONTWRITEBYTECODE", "1");
    let rows = rows(python).await;
    for (name, case, alone) in [("Restate", RESTATE_CASE, RESTATE_ALONE), ("DBOS Transact", DBOS_CASE, DBOS_ALONE)] {
        let rate = best(&rows, case, "rate", f64::max);
        report.figure(format!("{name}: five-step runs"), rate, "runs/s");
        report.at_least(1.0, format!("five-step runs, to {name}"), ours.runs_per_s / rate, "x");
        let latency = best(&rows, alone, "p50_ms", f64::min);
        report.figure(format!("{name}: a run alone, p50"), latency, "ms");
        report.figure(format!("a run alone, to {name}"), ours.alone_ms / latency, "x");
    }
}

/// MeshCentral with a thousand agents that come back, over TLS as it demands.
///
/// # Panics
/// When it cannot be installed or run.
pub async fn meshcentral(drivers: &Path, ours: f64, report: &mut Report) {
    let drivers = &absolute(drivers);
    install(drivers, "setup.sh", "node/node_modules/@restatedev/restate-sdk").await;
    install(drivers, "setup_mesh.sh", "mesh/node_modules/meshcentral").await;
    let mut python = Command::new("python3");
    python.arg(drivers.join("mesh_case.py")).arg("agents").env("PYTHONDONTWRITEBYTECODE", "1");
    let rows = rows(python).await;
    let rate = best(&rows, MESH_CASE, "per_s", f64::max);
    report.figure("MeshCentral: 1,000 agents, let in", rate, "agents/s");
    report.at_least(5.0, "agents let in, to MeshCentral", ours / rate, "x");
    report.figure("MeshCentral: memory with 1,000 agents", best(&rows, MESH_CASE, "rss_mb", f64::min), "MB");
}

fn absolute(drivers: &Path) -> PathBuf {
    drivers.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", drivers.display()))
}

fn scratch() -> PathBuf {
    std::env::var_os(SCRATCH_VARIABLE).map_or_else(|| std::env::temp_dir().join("borealis-peers"), PathBuf::from)
}

/// Runs a set-up of the drivers, unless what it leaves is there.
async fn install(drivers: &Path, setup: &str, leaves: &str) {
    if scratch().join(leaves).exists() {
        return;
    }
    eprintln!("  {setup}: installing peers into {}", scratch().display());
    let mut command = Command::new("bash");
    command.arg(drivers.join(setup)).env(SCRATCH_VARIABLE, scratch()).stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.status().await.expect("bash");
    assert!(status.success(), "{} did not install its peers: {status}", drivers.join(setup).display());
}

/// Runs a driver; the objects it prints.
async fn rows(mut driver: Command) -> Vec<Value> {
    driver.env(SCRATCH_VARIABLE, scratch()).current_dir(scratch()).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = driver.output().await.expect("python3");
    let said = String::from_utf8_lossy(&output.stdout);
    let rows: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    for row in &rows {
        eprintln!("  {row}");
    }
    assert!(output.status.success(), "a driver ended with {}:\n{said}", output.status);
    rows
}

/// The best value that the repetitions of a case have.
fn best(rows: &[Value], case: &str, name: &str, better: fn(f64, f64) -> f64) -> f64 {
    let of_case = rows.iter().filter(|row| row["case"].as_str().is_some_and(|said| said.trim() == case));
    let values = of_case.filter_map(|row| row[name].as_f64());
    values.reduce(better).unwrap_or_else(|| panic!("no repetition of {case} has a {name}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_best_repetition_counts_and_a_failed_one_does_not() {
        let rows = [
            json!({"case": "a", "rate": 1.0}),
            json!({"case": "a ", "rate": 3.0}),
            json!({"case": "a", "error": "no"}),
            json!({"case": "b", "rate": 9.0}),
        ];
        assert_eq!(best(&rows, "a", "rate", f64::max), 3.0);
        assert_eq!(best(&rows, "a", "rate", f64::min), 1.0);
    }
}
