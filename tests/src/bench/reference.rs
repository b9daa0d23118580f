//! What the machine can do at best, measured in the same run.

use std::{process::Stdio, time::Duration};

use tokio::process::Command;

use crate::TestCluster;

/// Transactions per second of `pgbench -N` (an update, a select and an insert each) with so many clients.
///
/// # Panics
/// When `pgbench` cannot run.
pub async fn pgbench(cluster: &TestCluster, clients: u32, lasts: Duration) -> f64 {
    let admin = cluster.url();
    let once = async |arguments: &[&str]| {
        let socket = admin.query_pairs().find(|(name, _)| name == "host").map(|(_, value)| value.into_owned()).expect("a socket");
        let output = Command::new(cluster.program("pgbench"))
            .args(["-h", &socket, "-U", admin.username()])
            .args(arguments)
            .arg(admin.path().trim_start_matches('/'))
            .env("PGSSLMODE", "disable")
            .stdin(Stdio::null())
            .output()
            .await
            .expect("pgbench");
        assert!(output.status.success(), "pgbench: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    once(&["-i", "-q", "-s", "10"]).await;
    let (clients, seconds) = (clients.to_string(), lasts.as_secs().max(1).to_string());
    let said = once(&["-N", "-M", "prepared", "-n", "-c", &clients, "-j", "2", "-T", &seconds]).await;
    let tps = said.lines().find_map(|line| line.strip_prefix("tps = ")).and_then(|rest| rest.split_whitespace().next());
    tps.and_then(|tps| tps.parse().ok()).unwrap_or_else(|| panic!("pgbench printed no tps:\n{said}"))
}
