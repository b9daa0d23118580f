//! The state folder of an engine: secrets, logs and the private Postgres. Nobody but its owner may look inside, the owner is the
//! account the engine runs as, and links in it are not followed.

use std::{
    fs,
    io::{Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{errno::Errno, fcntl::OFlag, unistd::Uid};

use crate::error::{Error, Kind, Result};

/// A log larger than this is put aside when it is opened, in bytes.
const LOG_BYTES: u64 = 16 * 1024 * 1024;
/// So many logs are kept aside.
const LOGS_KEPT: u32 = 3;

/// Makes `folder` with all folders above it, for this account alone (mode 0700), also when it exists with a wider mode.
///
/// # Errors
/// `state_folder_unusable`, also when it is a link or belongs to another account.
pub fn own(folder: &Path) -> Result<()> {
    let failed = |error| unusable(folder, error);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    // From here on the folder itself, wherever its path may lead in the next moment.
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(folder).map_err(no_link).map_err(failed)?;
    let metadata = opened.metadata().map_err(failed)?;
    belongs_to_us(&metadata).map_err(failed)?;
    if metadata.permissions().mode() & 0o077 != 0 {
        opened.set_permissions(fs::Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

/// Opens a file of a state folder with these options, or creates it (mode 0600): a file of this account, and no link.
fn open(options: &mut fs::OpenOptions, path: &Path) -> std::io::Result<fs::File> {
    // A pipe in its place must not hold anybody up.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = options.create(true).mode(0o600).custom_flags(flags.bits()).open(path).map_err(no_link)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("it is not a file"));
    }
    belongs_to_us(&metadata)?;
    Ok(file)
}

fn belongs_to_us(metadata: &fs::Metadata) -> std::io::Result<()> {
    let own = Uid::effective();
    if metadata.uid() == own.as_raw() {
        return Ok(());
    }
    let why = format!("it belongs to user {} and this is user {own}; start the engine as the one who created it", metadata.uid());
    Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, why))
}

/// Says of a link that it is one.
fn no_link(error: std::io::Error) -> std::io::Error {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ELOOP | Errno::ENOTDIR) => {
            std::io::Error::other("it is a link, and links are not followed here; name the place itself")
        }
        _ => error,
    }
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
    open(fs::OpenOptions::new().append(true), log).map_err(|error| unusable(log, error))
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
    let mut file = open(fs::OpenOptions::new().read(true).write(true), &path).map_err(failed)?;
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

    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (elsewhere, link) = (folder.path().join("elsewhere"), folder.path().join("link"));
        own(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &link).unwrap();
        assert!(own(&link).unwrap_err().message.contains("is a link"));
        let target = folder.path().join("target");
        fs::write(&target, "precious").unwrap();
        for name in ["up.lock", "some.log"] {
            std::os::unix::fs::symlink(&target, elsewhere.join(name)).unwrap();
        }
        assert!(lock(&elsewhere).unwrap_err().message.contains("is a link"));
        assert!(open_log(&elsewhere.join("some.log")).unwrap_err().message.contains("is a link"));
        assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    }

    #[test]
    fn what_belongs_to_another_account_is_not_used() {
        if !Uid::effective().is_root() {
            eprintln!("only the administrator can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(12_345), None).unwrap();
        let foreign = folder.path().join("foreign");
        fs::create_dir(&foreign).unwrap();
        give(&foreign);
        assert!(own(&foreign).unwrap_err().message.contains("belongs to user 12345"));
        let (log, lock_file) = (folder.path().join("some.log"), folder.path().join("up.lock"));
        for path in [&log, &lock_file] {
            fs::write(path, "").unwrap();
            give(path);
        }
        assert!(open_log(&log).unwrap_err().message.contains("belongs to user 12345"));
        assert!(lock(folder.path()).unwrap_err().message.contains("belongs to user 12345"));
    }
}
