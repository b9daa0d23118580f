//! Linux: bash, process groups, systemd.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command as StdCommand;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, Uid, gethostname};
use tokio::process::Command;

use super::{Interpreter, Platform, ServiceSpec, ServiceState};
use crate::{Error, Result};

const UNIT_NAME: &str = "borealis-agent.service";
const UNIT_PATH: &str = "/etc/systemd/system/borealis-agent.service";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables of the agent's environment a script may see.
const PASSED_ON: [&str; 8] = ["HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TZ", "USER"];

#[derive(Debug)]
pub(super) struct Linux;

impl Platform for Linux {
    fn hostname(&self) -> String {
        gethostname().map(|name| name.to_string_lossy().trim().to_owned()).unwrap_or_default()
    }

    fn private_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let mode = std::fs::metadata(path)?.permissions().mode();
        if mode & 0o077 != 0 {
            std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    fn private_file(&self, path: &Path) -> io::Result<File> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        if file.metadata()?.permissions().mode() & 0o077 != 0 {
            file.set_permissions(Permissions::from_mode(0o600))?;
        }
        Ok(file)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn interpreter(&self, script_type: &str) -> Option<Interpreter> {
        if !script_type.eq_ignore_ascii_case("bash") {
            return None;
        }
        let program =
            ["/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash"].iter().map(PathBuf::from).find(|path| path.exists())?;
        Some(Interpreter { program, arguments: vec!["--noprofile".into(), "--norc".into()], extension: "sh" })
    }

    fn base_environment(&self) -> Vec<(OsString, OsString)> {
        let mut environment: Vec<(OsString, OsString)> =
            PASSED_ON.iter().filter_map(|name| std::env::var_os(name).map(|value| (OsString::from(name), value))).collect();
        let mut default = |name: &str, value: &str| {
            if !environment.iter().any(|(known, _)| known == name) {
                environment.push((name.into(), value.into()));
            }
        };
        default("PATH", DEFAULT_PATH);
        default("SHELL", "/bin/bash");
        if Uid::effective().is_root() {
            default("HOME", "/root");
            default("USER", "root");
            default("LOGNAME", "root");
        }
        environment
    }

    fn own_group(&self, command: &mut Command) {
        command.process_group(0);
    }

    fn stop_group(&self, leader: u32, force: bool) -> io::Result<()> {
        let signal = if force { Signal::SIGKILL } else { Signal::SIGTERM };
        match killpg(group(leader)?, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn group_alive(&self, leader: u32) -> bool {
        group(leader).is_ok_and(|group| !matches!(killpg(group, None), Err(Errno::ESRCH)))
    }

    fn service_definition(&self, spec: &ServiceSpec) -> String {
        // Scripts administer the machine, so the sandbox options of systemd would only break them. KillMode=mixed leaves
        // the running script to the agent, which stops it and reports that.
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
             KillMode=mixed\n\
             TimeoutStopSec=30\n\
             OOMPolicy=continue\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            program = unit_quote(&spec.program),
            config = unit_quote(&spec.config_path),
        )
    }

    fn may_manage_service(&self) -> Result<()> {
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

    fn install_service(&self, spec: &ServiceSpec) -> Result<()> {
        self.may_manage_service()?;
        let unit = Path::new(UNIT_PATH);
        let draft = Path::new("/etc/systemd/system/.borealis-agent.service.new");
        std::fs::write(draft, self.service_definition(spec)).map_err(Error::file(draft))?;
        std::fs::set_permissions(draft, Permissions::from_mode(0o644)).map_err(Error::file(draft))?;
        std::fs::rename(draft, unit).map_err(Error::file(unit))?;
        systemctl(&["daemon-reload"])?;
        systemctl(&["enable", UNIT_NAME])?;
        systemctl(&["restart", UNIT_NAME])
    }

    fn uninstall_service(&self) -> Result<()> {
        let unit = Path::new(UNIT_PATH);
        if !unit.exists() {
            return Ok(());
        }
        self.may_manage_service()?;
        systemctl(&["disable", "--now", UNIT_NAME])?;
        std::fs::remove_file(unit).map_err(Error::file(unit))?;
        systemctl(&["daemon-reload"])
    }

    fn service_state(&self) -> ServiceState {
        let state = StdCommand::new("systemctl")
            .args(["is-active", UNIT_NAME])
            .output()
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            .unwrap_or_default();
        let state = if state.is_empty() { "unknown".to_owned() } else { state };
        ServiceState { installed: Path::new(UNIT_PATH).exists(), state }
    }
}

/// A group id that cannot be 0 or 1: those would mean the agent itself or everything.
fn group(leader: u32) -> io::Result<Pid> {
    match i32::try_from(leader) {
        Ok(id) if id > 1 => Ok(Pid::from_raw(id)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a process group")),
    }
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
    fn private_means_private_even_over_an_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        Linux.private_dir(&inner).unwrap();
        assert_eq!(std::fs::metadata(&inner).unwrap().permissions().mode() & 0o777, 0o700);
        let file = inner.join("f");
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        drop(Linux.private_file(&file).unwrap());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn no_signal_goes_to_everybody() {
        assert!(Linux.stop_group(0, true).is_err());
        assert!(Linux.stop_group(1, true).is_err());
        assert!(Linux.stop_group(u32::MAX, true).is_err());
        assert!(!Linux.group_alive(0));
    }

    #[test]
    fn paths_are_one_word_in_the_unit() {
        let unit = Linux.service_definition(&spec("/opt/my agent/50%\"$x"));
        assert!(unit.contains(r#"ExecStart="/opt/my agent/50%%\"$$x" run --config"#), "{unit}");
    }

    #[test]
    fn the_unit_passes_systemds_own_check() {
        let dir = tempfile::tempdir().unwrap();
        let unit = dir.path().join(UNIT_NAME);
        std::fs::write(&unit, Linux.service_definition(&spec("/bin/true"))).unwrap();
        let Ok(output) = StdCommand::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output() else {
            eprintln!("systemd-analyze is not installed here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains(UNIT_NAME), "{said}");
    }
}
