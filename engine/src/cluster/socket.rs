//! The way to the server's socket.

use std::{
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use nix::unistd::Uid;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};

/// The folder of the socket, inside the data folder.
pub(super) const FOLDER: &str = "borealis.sock";
/// The name Postgres gives a socket on its default port.
pub(super) const NAME: &str = ".s.PGSQL.5432";
/// The longest path of a unix socket, in bytes: `sun_path` less its closing zero (unix(7)).
const LONGEST: usize = 107;

/// A path to `folder` that is short enough for the socket inside it: the path itself, or else a link to it in a folder that
/// is ours alone.
pub(super) fn reachable(folder: &Path) -> Result<PathBuf> {
    let folder = std::path::absolute(folder).map_err(Error::bug)?;
    if folder.join(NAME).as_os_str().len() <= LONGEST && folder.to_str().is_some() {
        return Ok(folder);
    }
    let uid = Uid::effective();
    let name = format!("{:.16}", hex::encode(Sha256::digest(folder.as_os_str().as_bytes())));
    let mut homes = Vec::new();
    if uid.is_root() {
        homes.push(PathBuf::from("/run/borealis"));
    } else {
        homes.push(PathBuf::from(format!("/run/user/{uid}/borealis")));
    }
    homes.push(PathBuf::from(format!("/tmp/borealis-{uid}")));
    for home in homes {
        if own(&home, uid) && link(&folder, &home.join(&name)).is_ok() {
            return Ok(home.join(name));
        }
    }
    Err(Error::new(
        Kind::Unavailable,
        "socket_path_too_long",
        format!(
            "The path {} is too long for a unix socket and no folder for a shorter link could be made in /run or /tmp; \
             set BOREALIS_STATE_DIR to a shorter path.",
            folder.display()
        ),
    ))
}

/// Makes `home`, and checks that it is a real folder nobody else can enter: /tmp is everybody's.
fn own(home: &Path, uid: Uid) -> bool {
    let _ = fs::DirBuilder::new().mode(0o700).create(home);
    fs::symlink_metadata(home)
        .is_ok_and(|found| found.is_dir() && found.uid() == uid.as_raw() && found.permissions().mode() & 0o077 == 0)
}

fn link(target: &Path, at: &Path) -> std::io::Result<()> {
    if fs::read_link(at).is_ok_and(|present| present == target) {
        return Ok(());
    }
    // Two starts may do this at once: each makes a link of its own and puts it in place.
    let draft = at.with_extension(std::process::id().to_string());
    let _ = fs::remove_file(&draft);
    symlink(target, &draft)?;
    fs::rename(&draft, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_path_is_used_as_it_is_and_a_long_one_through_a_link() {
        assert_eq!(
            reachable(Path::new("/var/lib/borealis/borealis.sock")).unwrap(),
            Path::new("/var/lib/borealis/borealis.sock")
        );
        let root = tempfile::tempdir().unwrap();
        let long = root.path().join("a".repeat(90)).join(FOLDER);
        fs::create_dir_all(&long).unwrap();
        let short = reachable(&long).unwrap();
        assert!(short.join(NAME).as_os_str().len() <= LONGEST);
        fs::write(long.join("marker"), "here").unwrap();
        assert_eq!(fs::read_to_string(short.join("marker")).unwrap(), "here");
        assert_eq!(reachable(&long).unwrap(), short);
        fs::remove_file(short).unwrap();
    }

    #[test]
    fn a_folder_others_may_enter_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let home = root.path().join("home");
        assert!(own(&home, Uid::effective()));
        fs::set_permissions(&home, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!own(&home, Uid::effective()));
        let linked = root.path().join("linked");
        symlink(root.path(), &linked).unwrap();
        assert!(!own(&linked, Uid::effective()));
    }
}
