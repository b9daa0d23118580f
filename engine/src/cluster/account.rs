//! Whom the private server runs as.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use nix::unistd::{Uid, User};

use crate::error::{Error, Kind, Result};

/// The unprivileged account that is used, and created when missing, by an engine that root starts. Also the name of the
/// cluster's owner inside Postgres, whoever runs it.
pub const SERVICE_USER: &str = "borealis-pg";

/// An account of this machine.
#[derive(Debug, Clone)]
pub(super) struct Account {
    pub(super) name: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Not the one this process runs under.
    pub(super) is_other: bool,
}

impl Account {
    /// The account for the server on `data`: this process's own, unless that is root.
    pub(super) fn for_data(data: &Path) -> Result<Self> {
        let owner = fs::metadata(data).ok().map(|folder| folder.uid());
        if Uid::effective().is_root() {
            return match owner {
                Some(uid) if uid != 0 => Self::other(by_id(uid)?),
                _ => Self::other(service_user()?),
            };
        }
        match owner {
            Some(uid) if uid != Uid::effective().as_raw() => Err(Error::new(
                Kind::Forbidden,
                "data_folder_of_another_user",
                format!("{} belongs to another user; start the engine as the one who created it.", data.display()),
            )),
            _ => Self::current(),
        }
    }

    /// This process's account.
    pub(super) fn current() -> Result<Self> {
        let user = by_id(Uid::effective().as_raw())?;
        Ok(Self { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), is_other: false })
    }

    #[allow(clippy::unnecessary_wraps)]
    fn other(user: User) -> Result<Self> {
        Ok(Self { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), is_other: true })
    }
}

/// The name of this process's user.
pub(super) fn own_name() -> Result<String> {
    Account::current().map(|account| account.name)
}

fn by_id(uid: u32) -> Result<User> {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().ok_or_else(|| {
        Error::new(
            Kind::Unavailable,
            "user_without_a_name",
            format!("User id {uid} has no entry in /etc/passwd, which PostgreSQL needs; add one, or set DATABASE_URL."),
        )
    })
}

fn service_user() -> Result<User> {
    let find = || User::from_name(SERVICE_USER).ok().flatten();
    if let Some(user) = find() {
        return Ok(user);
    }
    let made = Command::new("useradd")
        .args(["--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "--user-group", SERVICE_USER])
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .output();
    // Another start may have made it at the same time; what counts is that it is there.
    find().ok_or_else(|| {
        let why = match made {
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        Error::new(
            Kind::Unavailable,
            "no_service_user",
            format!("PostgreSQL must not run as root and user {SERVICE_USER} cannot be created: {why}"),
        )
    })
}
