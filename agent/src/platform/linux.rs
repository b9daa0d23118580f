//! Linux: bash, process groups, files; systemd is in [`service`].

mod service;

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, Uid, gethostname};
use tokio::process::Command;

use super::{Interpreter, Platform, ServiceSpec, ServiceState};
use crate::Result;

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
        // From here on the directory itself, wherever its path may lead in the next moment.
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
        let dir = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(no_link)?;
        let metadata = dir.metadata()?;
        let own = Uid::effective();
        if metadata.uid() != own.as_raw() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("belongs to another account (user {}; this is user {own}): it is not used", metadata.uid()),
            ));
        }
        if metadata.permissions().mode() & 0o077 != 0 {
            dir.set_permissions(Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    fn private_file(&self, path: &Path) -> io::Result<File> {
        // One that is left over from a crash; or a link, which is not followed.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    fn own_file(&self, path: &Path, create: bool) -> io::Result<File> {
        // A pipe in its place must not hold the agent up.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = OpenOptions::new()
            .read(true)
            .write(create)
            .create(create)
            .mode(0o600)
            .custom_flags(flags.bits())
            .open(path)
            .map_err(no_link)?;
        let metadata = file.metadata()?;
        let refused = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !metadata.is_file() {
            return refused("is not a file".to_owned());
        }
        if metadata.uid() != Uid::effective().as_raw() && metadata.uid() != 0 {
            return refused(format!("belongs to another account (user {}): it is not used", metadata.uid()));
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

    fn drain(&self) -> PathBuf {
        PathBuf::from("/bin/cat")
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

    fn process_mark(&self, process: u32) -> Option<String> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name of the program may hold spaces and brackets; what follows it does not. The 22nd field is when it began.
        let (_, fields) = stat.rsplit_once(") ")?;
        let began = fields.split_whitespace().nth(19)?;
        Some(format!("{} {began}", boot.trim()))
    }

    fn is_only_ours(&self, path: &Path) -> io::Result<()> {
        let own = Uid::effective().as_raw();
        let caller = std::env::var("SUDO_UID").ok().filter(|_| own == 0).and_then(|uid| uid.parse().ok());
        for place in path.canonicalize()?.ancestors() {
            let metadata = std::fs::metadata(place)?;
            let (mode, owner) = (metadata.permissions().mode(), metadata.uid());
            // In a sticky directory nobody replaces what belongs to another.
            let shared = mode & 0o002 != 0 || (mode & 0o020 != 0 && metadata.gid() != 0);
            let why = if ![0, own].contains(&owner) && Some(owner) != caller {
                format!("{} belongs to user {owner}, who could have put something else there", place.display())
            } else if shared && !(metadata.is_dir() && mode & 0o1000 != 0) {
                format!("others may write to {} and could have put something else there", place.display())
            } else {
                continue;
            };
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        Ok(())
    }

    fn service_definition(&self, spec: &ServiceSpec) -> String {
        service::definition(spec)
    }

    fn may_manage_service(&self) -> Result<()> {
        service::may_manage()
    }

    fn install_service(&self, spec: &ServiceSpec) -> Result<()> {
        service::install(spec)
    }

    fn uninstall_service(&self) -> Result<()> {
        service::uninstall()
    }

    fn service_state(&self) -> ServiceState {
        service::state()
    }
}

/// Says of a link that it is one.
fn no_link(error: io::Error) -> io::Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP | Errno::ENOTDIR) => {
            io::Error::new(io::ErrorKind::InvalidInput, "is a link, or not of the expected kind: links are not followed here")
        }
        _ => error,
    }
}

/// A group id that cannot be 0 or 1: those would mean the agent itself or everything.
fn group(leader: u32) -> io::Result<Pid> {
    match i32::try_from(leader) {
        Ok(id) if id > 1 => Ok(Pid::from_raw(id)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a process group")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_means_private_even_over_an_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        Linux.private_dir(&inner).unwrap();
        std::fs::set_permissions(&inner, Permissions::from_mode(0o755)).unwrap();
        Linux.private_dir(&inner).unwrap();
        assert_eq!(std::fs::metadata(&inner).unwrap().permissions().mode() & 0o777, 0o700);
        let file = inner.join("f");
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        drop(Linux.private_file(&file).unwrap());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(Linux.private_dir(&link).unwrap_err().to_string().contains("link"));
        let (target, inside) = (dir.path().join("target"), real.join("inside"));
        std::fs::write(&target, "precious").unwrap();
        for create in [false, true] {
            let _ = std::fs::remove_file(&inside);
            std::os::unix::fs::symlink(&target, &inside).unwrap();
            assert!(Linux.own_file(&inside, create).unwrap_err().to_string().contains("link"));
        }
        drop(Linux.private_file(&inside).unwrap());
        assert!(std::fs::symlink_metadata(&inside).unwrap().is_file(), "the link has made room");
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    }

    #[test]
    fn what_belongs_to_another_account_is_not_used() {
        if !Uid::effective().is_root() {
            eprintln!("only the administrator can give a file away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (foreign, file) = (dir.path().join("foreign"), dir.path().join("file"));
        std::fs::create_dir(&foreign).unwrap();
        std::fs::write(&file, "").unwrap();
        for path in [&foreign, &file] {
            std::os::unix::fs::chown(path, Some(12_345), None).unwrap();
        }
        for refusal in [Linux.private_dir(&foreign).unwrap_err(), Linux.own_file(&file, true).unwrap_err()] {
            assert!(refusal.to_string().contains("another account (user 12345"), "{refusal}");
        }
    }

    #[test]
    fn no_signal_goes_to_everybody() {
        assert!(Linux.stop_group(0, true).is_err());
        assert!(Linux.stop_group(1, true).is_err());
        assert!(Linux.stop_group(u32::MAX, true).is_err());
        assert!(!Linux.group_alive(0));
    }

    #[test]
    fn a_place_that_others_may_write_to_is_found() {
        if !Uid::effective().is_root() {
            eprintln!("only the administrator can give a directory away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (inner, program) = (dir.path().join("a"), dir.path().join("a/program"));
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(&program, "").unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        mode(&program, 0o755);
        mode(&inner, 0o755);
        mode(dir.path(), 0o1777);
        Linux.is_only_ours(&program).unwrap();
        mode(&inner, 0o777);
        assert!(Linux.is_only_ours(&program).unwrap_err().to_string().contains("others may write to"));
        mode(&inner, 0o755);
        mode(&program, 0o757);
        assert!(Linux.is_only_ours(&program).unwrap_err().to_string().contains("others may write to"));
        mode(&program, 0o755);
        mode(dir.path(), 0o777);
        assert!(Linux.is_only_ours(&program).unwrap_err().to_string().contains("others may write to"));
        mode(dir.path(), 0o755);
        std::os::unix::fs::chown(&inner, Some(12_345), None).unwrap();
        assert!(Linux.is_only_ours(&program).unwrap_err().to_string().contains("user 12345"));
    }

    #[test]
    fn a_process_is_told_from_others_with_its_number() {
        let own = Linux.process_mark(std::process::id()).unwrap();
        assert_eq!(Linux.process_mark(std::process::id()).unwrap(), own);
        assert_ne!(Linux.process_mark(1), Some(own));
        assert_eq!(Linux.process_mark(u32::MAX), None);
    }
}
