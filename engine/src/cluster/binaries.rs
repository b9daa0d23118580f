//! Which of the installed servers is used.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::error::{Error, Kind, Result};

/// The oldest server the SQL of this engine is written for.
pub const OLDEST_SERVER: u32 = 15;
/// Where Debian puts servers: one folder for each major version.
const INSTALLED: &str = "/usr/lib/postgresql";

/// The programs of one server version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// The major version.
    pub version: u32,
    folder: PathBuf,
}

impl Binaries {
    /// The server for the folder `data`: the version that made it, or the newest installed one for a new folder.
    ///
    /// # Errors
    /// When none is installed; the message names the package.
    pub fn find(data: &Path) -> Result<Self> {
        Self::find_in(Path::new(INSTALLED), data)
    }

    fn find_in(installed: &Path, data: &Path) -> Result<Self> {
        let wanted = match fs::read_to_string(data.join("PG_VERSION")) {
            Ok(text) => Some(text.trim().parse::<u32>().map_err(|_| {
                Error::new(Kind::Conflict, "unknown_data_version", format!("{} has an unreadable PG_VERSION.", data.display()))
            })?),
            Err(_) => None,
        };
        let mut versions: Vec<Self> = fs::read_dir(installed)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let version = entry.file_name().to_str()?.parse().ok()?;
                Some(Self { version, folder: entry.path().join("bin") })
            })
            .filter(|binaries| ["postgres", "initdb"].iter().all(|name| binaries.file(name).exists()))
            .collect();
        versions.sort_by_key(|binaries| binaries.version);
        match wanted {
            Some(wanted) => versions.into_iter().find(|binaries| binaries.version == wanted).ok_or_else(|| {
                Error::new(
                    Kind::Unavailable,
                    "server_version_missing",
                    format!(
                        "{} was made by PostgreSQL {wanted}, which is not installed. Install it (apt-get install postgresql-{wanted}), \
                         or move the data to a newer server with pg_upgrade.",
                        data.display()
                    ),
                )
            }),
            None => versions.pop().filter(|binaries| binaries.version >= OLDEST_SERVER).ok_or_else(|| {
                Error::new(
                    Kind::Unavailable,
                    "no_server_installed",
                    format!(
                        "No PostgreSQL server of version {OLDEST_SERVER} or newer is installed. Install one \
                         (apt-get install postgresql), or set DATABASE_URL."
                    ),
                )
            }),
        }
    }

    /// One of its programs.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path, version: &str) {
        let bin = root.join(version).join("bin");
        fs::create_dir_all(&bin).unwrap();
        for name in ["postgres", "initdb"] {
            fs::write(bin.join(name), "").unwrap();
        }
    }

    #[test]
    fn a_data_folder_keeps_its_version_and_a_new_one_gets_the_newest() {
        let root = tempfile::tempdir().unwrap();
        let data = tempfile::tempdir().unwrap();
        let find = || Binaries::find_in(root.path(), data.path());
        assert_eq!(find().unwrap_err().code, "no_server_installed");
        install(root.path(), "9.6");
        install(root.path(), "14");
        assert_eq!(find().unwrap_err().code, "no_server_installed");
        install(root.path(), "15");
        install(root.path(), "17");
        // Client programs alone are no server.
        fs::create_dir_all(root.path().join("18/bin")).unwrap();
        assert_eq!(find().unwrap().version, 17);
        fs::write(data.path().join("PG_VERSION"), "15\n").unwrap();
        assert_eq!(find().unwrap().version, 15);
        fs::write(data.path().join("PG_VERSION"), "16\n").unwrap();
        assert_eq!(find().unwrap_err().code, "server_version_missing");
    }
}
