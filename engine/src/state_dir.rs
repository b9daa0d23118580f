//! The state folder of an engine: secrets, logs and the private Postgres. Nobody but its owner may look inside.

use std::{
    fs,
    io::{Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use crate::error::{Error, Kind, Result};

/// A log larger than this is put aside when it is opened, in bytes.
const LOG_BYTES: u64 = 16 * 1024 * 1024;
/// So many logs are kept aside.
const LOGS_KEPT: u32 = 3;

/// Makes `folder` with all folders above it, for this user alone (mode 0700), also when it exists with a wider mode.
///
/// # Errors
/// `state_folder_unusable`.
pub fn own(folder: &Path) -> Result<()> {
    let failed = |error| unusable(folder, error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    if fs::metadata(folder).map_err(failed)?.permissions().mode() & 0o077 != 0 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// Opens a log for appending (mode 0600), after putting a large one aside.
///
/// # Errors
/// `state_folder_unusable`.
pub fn open_log(log: &Path) -> Result<fs::File> {
    if let Some(folder) = log.parent() {
        own(folder)?;
    }
    rotate(log).map_err(|error| unusable(log, error))?;
    fs::OpenOptions::new().create(true).append(true).mode(0o600).open(log).map_err(|error| unusable(log, error))
}

fn rotate(log: &Path) -> std::io::Result<()> {
    if fs::metadata(log).map_or(0, |present| present.len()) < LOG_BYTES {
        return Ok(());
    }
    let aside = |number: u32| {
        let mut name = log.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    };
    for number in (1..LOGS_KEPT).rev() {
        match fs::rename(aside(number), aside(number + 1)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(log, aside(1))
}

/// The right to run the engine on a state folder. It ends with the process that holds it, however that ends.
#[derive(Debug)]
pub struct Lock {
    _file: fs::File,
}

/// Takes the right to run the engine on `state_dir`.
///
/// # Errors
/// `already_running` with the process id of the holder in `pid`; `state_folder_unusable`.
pub fn lock(state_dir: &Path) -> Result<Lock> {
    let path = state_dir.join("up.lock");
    let failed = |error| unusable(&path, error);
    let mut file =
        fs::OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let _ = file.take(32).read_to_string(&mut holder);
            let holder = holder.trim();
            return Err(Error::new(
                Kind::Conflict,
                "already_running",
                format!("An engine (process {holder}) already runs on {}.", state_dir.display()),
            )
            .with("pid", holder));
        }
        Err(fs::TryLockError::Error(error)) => return Err(failed(error)),
    }
    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(failed)?;
    Ok(Lock { _file: file })
}

/// The error for a file or folder of the state folder that cannot be used.
pub(crate) fn unusable(path: &Path, error: std::io::Error) -> Error {
    let mut unusable =
        Error::new(Kind::Unavailable, "state_folder_unusable", format!("{} cannot be used: {error}.", path.display()));
    unusable.source = Some(Box::new(error));
    unusable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_log_stays_and_a_large_one_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("some.log");
        fs::write(&log, "short").unwrap();
        open_log(&log).unwrap();
        assert_eq!(fs::read_to_string(&log).unwrap(), "short");
        for round in 0..5 {
            fs::File::create(&log).unwrap().set_len(LOG_BYTES + round).unwrap();
            assert_eq!(open_log(&log).unwrap().metadata().unwrap().len(), 0);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1 + LOGS_KEPT as usize);
        assert_eq!(fs::metadata(folder.path().join("some.log.1")).unwrap().len(), LOG_BYTES + 4);
    }

    #[test]
    fn one_holder_at_a_time_and_the_other_is_told_who() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path()).unwrap();
        let refused = lock(folder.path()).unwrap_err();
        assert_eq!(refused.code, "already_running");
        assert_eq!(refused.extra["pid"], std::process::id().to_string());
        drop(held);
        lock(folder.path()).unwrap();
    }

    #[test]
    fn a_folder_others_could_read_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("a/b");
        own(&state).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
        own(&state).unwrap();
        assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
