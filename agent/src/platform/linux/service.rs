//! The agent as a service of systemd.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command as StdCommand;

use nix::unistd::Uid;

use super::super::{ServiceSpec, ServiceState};
use crate::{Error, Result};

const UNIT_NAME: &str = "borealis-agent.service";
const UNIT_PATH: &str = "/etc/systemd/system/borealis-agent.service";

pub(super) fn definition(spec: &ServiceSpec) -> String {
    // Scripts administer the machine, so the sandbox options of systemd would only break them. KillMode=process: what scripts have
    // started stays when the agent is stopped, and the running script is left to the agent, which stops it and reports that. One
    // that a killed agent leaves behind is ended by the next.
    format!(
        "[Unit]\n\
             Description=Borealis agent\n\
             Wants=network-online.target\n\
             After=network-online.target\n\
             StartLimitIntervalSec=0\n\
             \n\
             [Service]\n\
             Type=exec\n\
             ExecStart={program} run --config {config}\n\
             Restart=always\n\
             RestartSec=5\n\
             KillMode=process\n\
             TimeoutStopSec=30\n\
             OOMPolicy=continue\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
        program = unit_quote(&spec.program),
        config = unit_quote(&spec.config_path),
    )
}

pub(super) fn may_manage() -> Result<()> {
    if !Uid::effective().is_root() {
        return Err(Error::Service("this needs root: run it again with sudo".to_owned()));
    }
    if !Path::new("/run/systemd/system").exists() {
        return Err(Error::Service(
            "systemd does not run here: start `borealis-agent run` with the service manager of this machine".to_owned(),
        ));
    }
    Ok(())
}

pub(super) fn install(spec: &ServiceSpec) -> Result<()> {
    may_manage()?;
    let unit = Path::new(UNIT_PATH);
    let draft = Path::new("/etc/systemd/system/.borealis-agent.service.new");
    std::fs::write(draft, definition(spec)).map_err(Error::file(draft))?;
    std::fs::set_permissions(draft, Permissions::from_mode(0o644)).map_err(Error::file(draft))?;
    std::fs::rename(draft, unit).map_err(Error::file(unit))?;
    systemctl(&["daemon-reload"])?;
    systemctl(&["enable", UNIT_NAME])?;
    systemctl(&["restart", UNIT_NAME])
}

pub(super) fn uninstall() -> Result<()> {
    let unit = Path::new(UNIT_PATH);
    if !unit.exists() {
        return Ok(());
    }
    may_manage()?;
    systemctl(&["disable", "--now", UNIT_NAME])?;
    std::fs::remove_file(unit).map_err(Error::file(unit))?;
    systemctl(&["daemon-reload"])?;
    // What it remembers of a service that failed; there may be nothing.
    let _ = systemctl(&["reset-failed", UNIT_NAME]);
    Ok(())
}

pub(super) fn state() -> ServiceState {
    let state = StdCommand::new("systemctl")
        .args(["is-active", UNIT_NAME])
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default();
    let state = if state.is_empty() { "unknown".to_owned() } else { state };
    ServiceState { installed: Path::new(UNIT_PATH).exists(), state }
}
/// A path as one word of a unit file: quoted, with the specifiers of systemd doubled.
fn unit_quote(path: &Path) -> String {
    let escaped = path.to_string_lossy().replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    let output = StdCommand::new("systemctl")
        .args(arguments)
        .output()
        .map_err(|error| Error::Service(format!("cannot run systemctl: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Service(format!("systemctl {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(program: &str) -> ServiceSpec {
        ServiceSpec {
            program: program.into(),
            config_path: "/etc/borealis-agent/config.json".into(),
            state_dir: "/var/lib/borealis-agent".into(),
        }
    }

    #[test]
    fn paths_are_one_word_in_the_unit() {
        let unit = definition(&spec("/opt/my agent/50%\"$x"));
        assert!(unit.contains(r#"ExecStart="/opt/my agent/50%%\"$$x" run --config"#), "{unit}");
    }

    #[test]
    fn the_unit_passes_systemds_own_check() {
        let dir = tempfile::tempdir().unwrap();
        let unit = dir.path().join(UNIT_NAME);
        std::fs::write(&unit, definition(&spec("/bin/true"))).unwrap();
        let Ok(output) = StdCommand::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output() else {
            eprintln!("systemd-analyze is not installed here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains(UNIT_NAME), "{said}");
    }
}
