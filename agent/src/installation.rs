//! What `install` puts on a machine besides the service, and how all of it is removed.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::config::DEFAULT_CONFIG_PATH;
use crate::platform::Platform;
use crate::{Error, Result, files};

/// Where `install` puts the program, unless it runs from a system directory already.
pub const PROGRAM_PATH: &str = "/usr/local/bin/borealis-agent";
/// Directories whose programs stay where they are: a package or an administrator put them there.
const SYSTEM_DIRS: [&str; 3] = ["/usr", "/opt", "/nix/store"];

/// Refuses to make the administrator's what others can change: `path` and the directories it is in.
///
/// # Errors
/// [`Error::Service`] with who could, and what to do about it.
pub fn check_origin(platform: &dyn Platform, path: &Path) -> Result<()> {
    platform.is_only_ours(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Error::Service(format!(
            "{} is not used for a service that runs as root: {error}. Copy it to a directory that only root can write to, and install from there",
            path.display()
        )),
        _ => Error::file(path)(error),
    })
}

/// Where the service finds its program: `present` where that is in a system directory, else `target`, which gets its contents. What runs
/// from there is not disturbed: the new file takes the place of the old one as a whole.
///
/// # Errors
/// What the file system says.
pub fn place_program(present: &Path, target: &Path) -> Result<PathBuf> {
    let present = present.canonicalize().map_err(Error::file(present))?;
    if SYSTEM_DIRS.iter().any(|dir| present.starts_with(dir)) || target.canonicalize().is_ok_and(|target| target == present) {
        return Ok(present);
    }
    let draft = files::draft_of(target);
    let placed = (|| {
        match std::fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::create_new(&draft)?;
        io::copy(&mut File::open(&present)?, &mut file)?;
        file.set_permissions(Permissions::from_mode(0o755))?;
        file.sync_all()?;
        std::fs::rename(&draft, target)
    })();
    if placed.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    placed.map_err(Error::file(target))?;
    Ok(target.to_owned())
}

/// Removes state directory, configuration file and the program that [`place_program`] put to `program`, with the directories that are
/// empty then. What is not there is no error.
///
/// # Errors
/// An agent that runs with the state directory, a state directory that is none, or what the file system says.
pub fn purge(platform: &dyn Platform, state_dir: &Path, config: &Path, program: &Path) -> Result<()> {
    remove_state(platform, state_dir)?;
    for path in [config.to_owned(), files::draft_of(config), program.to_owned(), files::draft_of(program)] {
        found(std::fs::remove_file(&path)).map_err(Error::file(&path))?;
    }
    if config == Path::new(DEFAULT_CONFIG_PATH)
        && let Some(dir) = config.parent()
    {
        // Something of the administrator's may be in it.
        let _ = std::fs::remove_dir(dir);
    }
    Ok(())
}

/// Removes a state directory, if it is one: a mistyped path must cost nothing.
fn remove_state(platform: &dyn Platform, dir: &Path) -> Result<()> {
    if found(std::fs::symlink_metadata(dir)).map_err(Error::file(dir))?.is_none() {
        return Ok(());
    }
    let is_empty = std::fs::read_dir(dir).map_err(Error::file(dir))?.next().is_none();
    if is_empty {
        return std::fs::remove_dir(dir).map_err(Error::file(dir));
    }
    if !["agent.json", "agent.lock"].iter().any(|name| dir.join(name).exists()) {
        return Err(Error::Config(format!("{} is no state directory of an agent: it is left as it is", dir.display())));
    }
    let _lock = files::lock(platform, dir)?;
    std::fs::remove_dir_all(dir).map_err(Error::file(dir))
}

/// None for what is not there.
fn found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform;

    #[test]
    fn a_program_that_runs_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (target, new) = (dir.path().join("agent"), dir.path().join("agent-2"));
        std::fs::copy("/bin/sleep", &target).unwrap();
        std::fs::copy("/bin/true", &new).unwrap();
        let mut running = std::process::Command::new(&target).arg("60").spawn().unwrap();
        assert_eq!(
            std::fs::copy(&new, &target).unwrap_err().kind(),
            io::ErrorKind::ExecutableFileBusy,
            "in place it is not possible"
        );
        assert_eq!(place_program(&new, &target).unwrap(), target);
        assert_eq!(std::fs::read(&target).unwrap(), std::fs::read(&new).unwrap());
        assert_eq!(std::fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o755);
        assert!(running.try_wait().unwrap().is_none());
        running.kill().unwrap();
        let _ = running.wait();
        assert_eq!(place_program(&target, &target).unwrap(), target, "it is there already");
        assert_eq!(place_program(Path::new("/bin/true"), &target).unwrap(), Path::new("/bin/true").canonicalize().unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside it");
    }

    #[test]
    fn a_purge_leaves_nothing_and_takes_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let platform = platform::current();
        let [state, config, program] = ["state", "config.json", "agent"].map(|name| dir.path().join(name));
        let purge = || purge(&*platform, &state, &config, &program);
        purge().unwrap();
        std::fs::create_dir(&state).unwrap();
        for path in [&config, &files::draft_of(&config), &program] {
            std::fs::write(path, "").unwrap();
        }
        std::fs::write(state.join("precious"), "").unwrap();
        assert!(purge().is_err());
        assert!(state.join("precious").exists());
        // An agent that never came to an identity has a lock.
        let lock = files::lock(&*platform, &state).unwrap();
        assert!(matches!(purge(), Err(Error::Locked(_))));
        drop(lock);
        purge().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
