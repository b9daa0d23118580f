//! Key files: private, whole or not there, and never replaced by who comes second.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use ed25519_dalek::{
    SigningKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, spki::der::pem::LineEnding},
};
use nix::fcntl::OFlag;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// A key file is a few hundred bytes; anything longer is not one.
const MAX_FILE_BYTES: u64 = 16 * 1024;

pub(super) fn signing_key(path: &Path) -> Result<SigningKey> {
    read_or_create(path, new_signing_key)?;
    read_signing_key(path)
}

pub(super) fn new_signing_key() -> Result<Zeroizing<String>> {
    let seed = Zeroizing::new(rand::random::<[u8; 32]>());
    Ok(Zeroizing::new(SigningKey::from_bytes(&seed).to_pkcs8_pem(LineEnding::LF).map_err(Error::bug)?.as_str().to_owned()))
}

pub(super) fn read_signing_key(path: &Path) -> Result<SigningKey> {
    SigningKey::from_pkcs8_pem(read(path)?.trim()).map_err(|_| unusable(path, &"it is not an Ed25519 key in PKCS#8 PEM"))
}

pub(super) fn read(path: &Path) -> Result<Zeroizing<String>> {
    read_bounded(path, MAX_FILE_BYTES)
}

pub(super) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Zeroizing<String>> {
    let failed = |error: std::io::Error| unusable(path, &error);
    // What is looked at is what is read. A pipe in its place must not hold anybody up.
    let mut file = fs::OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.permissions().mode() & 0o077 != 0 {
        return Err(unusable(path, &"others than its owner may read it (chmod 600)"));
    }
    if metadata.len() > max_bytes {
        return Err(unusable(path, &"it is too long"));
    }
    let mut text = Zeroizing::new(String::new());
    file.read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// Reads `path`, or writes what `make` gives and then reads it. The text is complete in a file of another name before it is
/// linked to `path`, and a link never replaces a file: whoever comes second reads the first one's.
pub(super) fn read_or_create(path: &Path, make: impl FnOnce() -> Result<Zeroizing<String>>) -> Result<Zeroizing<String>> {
    if path.try_exists().map_err(|error| unusable(path, &error))? {
        return read(path);
    }
    let folder =
        path.parent().filter(|folder| !folder.as_os_str().is_empty()).map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|error| unusable(path, &error))?;
    let text = make()?;
    let temporary = folder.join(format!(".{}.new", Uuid::new_v4().simple()));
    let made = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(text.trim_end().as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        }
    })();
    // Best effort: a file left behind harms nobody.
    let _ = fs::remove_file(&temporary);
    made.map_err(|error| unusable(path, &error))?;
    if let Ok(folder) = fs::File::open(&folder) {
        folder.sync_all().map_err(|error| unusable(path, &error))?;
    }
    read(path)
}

pub(super) fn unusable(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::invalid("invalid_key_file", format!("{} cannot be used: {why}.", path.display()))
}
