//! Files that are either the old or the new text after a crash, and that nobody else can read.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::platform::Platform;
use crate::{Error, Result};

/// Replaces `path` by `bytes`: written beside it, flushed to the disk, then renamed over it.
pub(crate) fn replace(platform: &dyn Platform, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = draft_of(path);
    let mut file = platform.private_file(&draft)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    drop(file);
    if let Err(error) = written.and_then(|()| std::fs::rename(&draft, path)) {
        let _ = std::fs::remove_file(&draft);
        return Err(error);
    }
    path.parent().map_or(Ok(()), |dir| platform.sync_dir(dir))
}

/// [`replace`] with a value as JSON.
pub(crate) fn replace_json<T: Serialize>(platform: &dyn Platform, path: &Path, value: &T) -> io::Result<()> {
    replace(platform, path, &serde_json::to_vec_pretty(value)?)
}

/// Reads a file of the state directory; links are not followed.
pub(crate) fn read(platform: &dyn Platform, path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    platform.own_file(path, false)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// [`read`] as JSON; none when there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(platform: &dyn Platform, path: &Path) -> Result<Option<T>> {
    from_json(path, read(platform, path))
}

/// Makes JSON of what was read of `path`; none when there is no such file.
pub(crate) fn from_json<T: DeserializeOwned>(path: &Path, read: io::Result<Vec<u8>>) -> Result<Option<T>> {
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file(path)(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::Corrupt { path: path.to_owned(), reason: error.to_string() })
}

/// Where [`replace`] writes before it renames.
pub(crate) fn draft_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Held while an agent works with a state directory; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "kept open for its lock")] File);

/// Takes the lock of `dir`.
pub(crate) fn lock(platform: &dyn Platform, dir: &Path) -> Result<Lock> {
    let path = dir.join("agent.lock");
    let file = platform.own_file(&path, true).map_err(Error::file(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::Locked(dir.to_owned())),
        Err(std::fs::TryLockError::Error(error)) => Err(Error::file(&path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform;

    #[test]
    fn a_replacement_is_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let platform = platform::current();
        replace_json(&*platform, &path, &1).unwrap();
        // A draft left behind by a crash is in nobody's way.
        std::fs::write(draft_of(&path), "{half").unwrap();
        assert_eq!(read_json::<i32>(&*platform, &path).unwrap(), Some(1));
        replace_json(&*platform, &path, &2).unwrap();
        assert_eq!(read_json::<i32>(&*platform, &path).unwrap(), Some(2));
        assert!(!draft_of(&path).exists());
        assert_eq!(read_json::<i32>(&*platform, &dir.path().join("none")).unwrap(), None);
    }

    #[test]
    fn one_agent_per_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let platform = platform::current();
        let first = lock(&*platform, dir.path()).unwrap();
        assert!(matches!(lock(&*platform, dir.path()), Err(Error::Locked(_))));
        drop(first);
        assert!(lock(&*platform, dir.path()).is_ok());
    }
}
