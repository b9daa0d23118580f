//! Another engine secret, or another key for access tokens or scripts, while everything runs.
//!
//! In three steps, each of which may be repeated, and after each of which everything works:
//!
//! 1. *prepare*: a new key lies beside the present one (`engine.secret.next`, `agent-token-next.pem`) and is accepted;
//! 2. *switch*: the new one is used, and the one before it (`engine.secret.previous`, `agent-token-previous.pem`) is still accepted;
//! 3. *finish*: the old one is removed.
//!
//! The script key is different in two ways: nobody has to accept the old one but agents, who look after that, and the old one signs that the
//! next one follows ([`Succession`]), because agents have pinned it.
//!
//! Running processes read the files every two seconds ([`Keys::read_again`](super::Keys::read_again)), workers when they are refused. With API processes
//! on several hosts a step is done on each before the next begins, with copies of the same files.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use borealis_protocol::{keys, succession::Succession};
use nix::unistd::Uid;

use super::{SCRIPT_KEY, Successions, TOKEN_KEY, files, new_engine_secret};
use crate::{
    access::aegis::write_private,
    error::{Error, Result},
};

/// What can be rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// What workers sign their requests with.
    EngineSecret,
    /// What the access tokens of agents are signed with.
    AgentTokens,
    /// What scripts are signed with.
    ScriptSigning,
}

/// Which of three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that is used.
    Current,
    /// The one that is going to be.
    Next,
    /// The one that was.
    Previous,
}

impl Role {
    pub(super) fn of_secret(self, file: &Path) -> PathBuf {
        let mut path = file.as_os_str().to_owned();
        path.push(match self {
            Self::Current => "",
            Self::Next => ".next",
            Self::Previous => ".previous",
        });
        path.into()
    }

    fn of_key(self, name: &str, secrets_dir: &Path) -> PathBuf {
        let role = match self {
            Self::Current => "",
            Self::Next => "-next",
            Self::Previous => "-previous",
        };
        secrets_dir.join(format!("{name}{role}.pem"))
    }
}

/// Which steps a rotation has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// None.
    Settled,
    /// The next key is there.
    Prepared,
    /// The previous key is there.
    Switched,
}

/// One key and its files on this host.
#[derive(Debug, Clone)]
pub struct Rotation {
    what: What,
    secrets_dir: PathBuf,
    engine_secret_file: PathBuf,
}

impl Rotation {
    /// Of the key whose file is in `secrets_dir`, or is `engine_secret_file`.
    #[must_use]
    pub fn new(what: What, secrets_dir: &Path, engine_secret_file: &Path) -> Self {
        Self { what, secrets_dir: secrets_dir.to_owned(), engine_secret_file: engine_secret_file.to_owned() }
    }

    /// The file of a key.
    #[must_use]
    pub fn path(&self, role: Role) -> PathBuf {
        match self.what {
            What::EngineSecret => role.of_secret(&self.engine_secret_file),
            What::AgentTokens => role.of_key(TOKEN_KEY, &self.secrets_dir),
            What::ScriptSigning => role.of_key(SCRIPT_KEY, &self.secrets_dir),
        }
    }

    fn there(&self, role: Role) -> Result<bool> {
        let path = self.path(role);
        path.try_exists().map_err(|error| files::unusable(&path, &error))
    }

    /// How far it is; a previous key of tokens that does not count any more is none. A next key beside a previous one is a rotation
    /// that was begun before the last was finished, or a switch that was cut off; both go on from here.
    ///
    /// # Errors
    /// `invalid_key_file` when the folder cannot be read.
    pub fn state(&self) -> Result<State> {
        Ok(match (self.there(Role::Next)?, self.there(Role::Previous)?) {
            (true, _) => State::Prepared,
            (false, true) if !self.outlived() => State::Switched,
            _ => State::Settled,
        })
    }

    /// Whether the previous key lies there and does not count any more.
    fn outlived(&self) -> bool {
        self.what == What::AgentTokens && super::outlived(&self.path(Role::Previous))
    }

    /// Makes the next key, unless it is there.
    ///
    /// # Errors
    /// 409 `rotation_unfinished` while the key of the last rotation is accepted; `invalid_key_file`.
    pub fn prepare(&self) -> Result<()> {
        let _alone = self.alone()?;
        if self.state()? == State::Switched {
            let why = format!("{} is still accepted; finish the last rotation first.", self.path(Role::Previous).display());
            return Err(Error::conflict("rotation_unfinished", why));
        }
        self.check(Role::Current)?;
        if self.outlived() {
            self.remove(Role::Previous)?;
        }
        let next = self.path(Role::Next);
        match self.what {
            What::EngineSecret => files::read_or_create(&next, new_engine_secret)?,
            What::AgentTokens | What::ScriptSigning => files::read_or_create(&next, files::new_signing_key)?,
        };
        self.check(Role::Next)?;
        if self.what == What::ScriptSigning { self.name_successor() } else { Ok(()) }
    }

    /// Has the present script key sign that the next one follows, unless it has.
    fn name_successor(&self) -> Result<()> {
        let present = files::read_signing_key(&self.path(Role::Current))?;
        let next = files::read_signing_key(&self.path(Role::Next))?;
        let succession = Succession::sign(&present, &next.verifying_key());
        let mut known = Successions::read(&self.secrets_dir)?;
        if known.successions.last() == Some(&succession) {
            return Ok(());
        }
        // One that it has named before, and that never took its place.
        known.successions.retain(|earlier| earlier.next_after(&present.verifying_key()).is_err());
        known.first.get_or_insert_with(|| keys::spki_base64(&present.verifying_key()));
        known.successions.push(succession);
        write_private(&Successions::path(&self.secrets_dir), &serde_json::to_vec_pretty(&known)?)
    }

    /// Uses the next key. Does nothing where that was done.
    ///
    /// # Errors
    /// 409 `rotation_not_prepared`; `invalid_key_file`.
    pub fn switch(&self) -> Result<()> {
        let _alone = self.alone()?;
        match self.state()? {
            State::Switched => return Ok(()),
            State::Settled => {
                let why = format!("{} is not there; prepare the rotation first.", self.path(Role::Next).display());
                return Err(Error::conflict("rotation_not_prepared", why));
            }
            State::Prepared => {}
        }
        self.check(Role::Next)?;
        if self.what == What::ScriptSigning {
            // Where the file was copied here, or a prepare was cut off.
            self.name_successor()?;
        }
        let (current, next, previous) = (self.path(Role::Current), self.path(Role::Next), self.path(Role::Previous));
        let work = || -> std::io::Result<()> {
            // From now on, as a key of tokens is forgotten some time after. Before anything else: both names are of one file for a moment.
            fs::File::options().write(true).open(&current)?.set_modified(SystemTime::now())?;
            let draft = self.draft();
            gone(&draft)?;
            // Never without a current key, and never without the old one among the accepted.
            fs::hard_link(&current, &draft)?;
            fs::rename(&draft, &previous)?;
            // Renaming one name of a file to another of its names leaves both.
            gone(&draft)?;
            fs::rename(&next, &current)?;
            self.sync()
        };
        work().map_err(|error| files::unusable(&current, &error))
    }

    /// Removes the key before the present one. Does nothing where that was done.
    ///
    /// # Errors
    /// 409 `rotation_not_switched` where the next key has not taken its place yet; `invalid_key_file`.
    pub fn finish(&self) -> Result<()> {
        let _alone = self.alone()?;
        if self.state()? == State::Prepared {
            let why = format!("{} is not used yet; switch to it first.", self.path(Role::Next).display());
            return Err(Error::conflict("rotation_not_switched", why));
        }
        self.remove(Role::Previous)
    }

    /// Forgets the keys beside the present one: for when somebody else may have them.
    ///
    /// # Errors
    /// `invalid_key_file`.
    pub fn discard(&self) -> Result<()> {
        let _alone = self.alone()?;
        self.remove(Role::Previous)?;
        self.remove(Role::Next)
    }

    /// What has to be copied to other machines after a prepare.
    #[must_use]
    pub fn to_copy(&self) -> Vec<PathBuf> {
        let mut files = vec![self.path(Role::Next)];
        if self.what == What::ScriptSigning {
            files.push(Successions::path(&self.secrets_dir));
        }
        files
    }

    fn remove(&self, role: Role) -> Result<()> {
        let path = self.path(role);
        gone(&path).and_then(|()| self.sync()).map_err(|error| files::unusable(&path, &error))
    }

    /// One rotation at a time, and by the user who owns the keys: the engine could not read another's.
    fn alone(&self) -> Result<fs::File> {
        let current = self.path(Role::Current);
        let owner = fs::metadata(&current).map_err(|error| files::unusable(&current, &error))?.uid();
        if owner != Uid::effective().as_raw() {
            let why = format!(
                "{} belongs to user {owner}: rotate it as that user, so that the engine can read the new one.",
                current.display()
            );
            return Err(Error::conflict("wrong_user", why));
        }
        let folder = current.parent().unwrap_or(&self.secrets_dir);
        let lock = fs::File::open(folder).map_err(|error| files::unusable(folder, &error))?;
        lock.try_lock().map_err(|_| Error::conflict("rotation_busy", "Another rotation is at work on this folder."))?;
        Ok(lock)
    }

    fn check(&self, role: Role) -> Result<()> {
        let path = self.path(role);
        match self.what {
            What::EngineSecret => super::read_engine_secret(&path).map(drop),
            What::AgentTokens | What::ScriptSigning => files::read_signing_key(&path).map(drop),
        }
    }

    /// A name that nobody takes for a key.
    fn draft(&self) -> PathBuf {
        self.path(Role::Current).with_extension("rotating")
    }

    fn sync(&self) -> std::io::Result<()> {
        self.path(Role::Current).parent().map_or(Ok(()), |folder| fs::File::open(folder)?.sync_all())
    }
}

fn gone(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use chrono::Utc;
    use uuid::Uuid;

    use super::{super::Keys, *};
    use crate::internal::{Key, Signed};

    struct Stand {
        _folder: tempfile::TempDir,
        secrets: PathBuf,
        keys: Keys,
    }

    impl Stand {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let secrets = folder.path().join("secrets");
            let keys = Keys::load_or_create(&secrets, None).unwrap();
            Self { _folder: folder, secrets, keys }
        }

        fn of(&self, what: What) -> Rotation {
            Rotation::new(what, &self.secrets, &self.secrets.join("engine.secret"))
        }

        /// The key a worker signs with that reads the file now.
        fn worker(&self) -> Key {
            Key::derive(super::super::read_engine_secret(&self.secrets.join("engine.secret")).unwrap().expose())
        }

        fn accepts(&self, key: &Key) -> bool {
            let request = Signed {
                method: "GET",
                path_and_query: "/",
                timestamp: "1700000000",
                nonce: "AAECAwQFBgcICQoLDA0ODw",
                worker: "6f2c1f0e-8a35-4a55-9d3b-0d6e1f0a9b11",
                body: b"",
            };
            self.keys.keyring().verify(None, &request, &key.sign(&request), 1_700_000_000).is_ok()
        }

        fn token(&self) -> String {
            self.keys.sign_access(Uuid::new_v4(), "ab", 1, Utc::now()).unwrap()
        }
    }

    #[test]
    fn an_engine_secret_is_rotated_without_refusing_anybody() {
        let stand = Stand::new();
        let rotation = stand.of(What::EngineSecret);
        let old = stand.worker();
        assert_eq!(rotation.switch().unwrap_err().code, "rotation_not_prepared");

        rotation.prepare().unwrap();
        rotation.prepare().unwrap();
        assert_eq!(rotation.finish().unwrap_err().code, "rotation_not_switched");
        assert!(stand.keys.read_again().unwrap() && stand.accepts(&old));
        assert!(!stand.keys.read_again().unwrap(), "nothing is new");

        rotation.switch().unwrap();
        rotation.switch().unwrap();
        let new = stand.worker();
        // Whoever has not looked yet accepts both, and so does who has.
        assert!(!stand.accepts(&Key::derive("something else")));
        assert!(stand.accepts(&old) && stand.accepts(&new));
        assert!(stand.keys.read_again().unwrap());
        assert!(stand.accepts(&old) && stand.accepts(&new));
        assert_eq!(rotation.prepare().unwrap_err().code, "rotation_unfinished");

        rotation.finish().unwrap();
        rotation.finish().unwrap();
        assert!(stand.keys.read_again().unwrap());
        assert!(!stand.accepts(&old) && stand.accepts(&new));
        assert_eq!(rotation.state().unwrap(), State::Settled);
        assert_eq!(fs::read_dir(&stand.secrets).unwrap().count(), 3);
    }

    #[test]
    fn the_key_of_tokens_is_rotated_and_the_old_one_wears_off() {
        let stand = Stand::new();
        let rotation = stand.of(What::AgentTokens);
        let before = stand.token();
        rotation.prepare().unwrap();
        // A process that has not looked yet must be able to check what others sign after the switch.
        assert!(stand.keys.read_again().unwrap());
        let other = Keys::load_or_create(&stand.secrets, None).unwrap();
        rotation.switch().unwrap();
        assert!(other.read_again().unwrap());
        let after = other.sign_access(Uuid::new_v4(), "ab", 1, Utc::now()).unwrap();
        for token in [&before, &after] {
            assert!(stand.keys.verify_access(token).is_ok() && other.verify_access(token).is_ok());
        }

        let previous = rotation.path(Role::Previous);
        let long_ago = SystemTime::now() - super::super::PREVIOUS_TOKEN_KEY_FOR - Duration::from_secs(1);
        fs::File::options().write(true).open(&previous).unwrap().set_modified(long_ago).unwrap();
        assert!(other.read_again().unwrap());
        assert_eq!(other.verify_access(&before).unwrap_err().code, "invalid_token");
        assert!(other.verify_access(&after).is_ok());
        rotation.finish().unwrap();
        assert!(!other.read_again().unwrap(), "it did not count any more");
        // The next rotation begins where nobody has finished the last.
        rotation.prepare().unwrap();
        rotation.switch().unwrap();
        assert_eq!(rotation.prepare().unwrap_err().code, "rotation_unfinished");
        fs::File::options().write(true).open(&previous).unwrap().set_modified(long_ago).unwrap();
        assert_eq!(rotation.state().unwrap(), State::Settled);
        rotation.prepare().unwrap();
        assert!(!previous.exists() && rotation.path(Role::Next).exists());
    }

    #[test]
    fn a_switch_that_was_cut_off_goes_on() {
        let stand = Stand::new();
        for what in [What::EngineSecret, What::AgentTokens] {
            let rotation = stand.of(what);
            rotation.prepare().unwrap();
            let next = fs::read_to_string(rotation.path(Role::Next)).unwrap();
            let current = fs::read_to_string(rotation.path(Role::Current)).unwrap();
            // Cut off between its two renames, with a draft of an attempt before that.
            fs::hard_link(rotation.path(Role::Current), rotation.path(Role::Previous)).unwrap();
            fs::write(rotation.draft(), "").unwrap();
            stand.keys.read_again().unwrap();
            assert_eq!(rotation.state().unwrap(), State::Prepared);
            rotation.switch().unwrap();
            assert_eq!(fs::read_to_string(rotation.path(Role::Current)).unwrap(), next);
            assert_eq!(fs::read_to_string(rotation.path(Role::Previous)).unwrap(), current);
            assert_eq!(fs::metadata(rotation.path(Role::Current)).unwrap().permissions().mode() & 0o777, 0o600);
            stand.keys.read_again().unwrap();
            rotation.finish().unwrap();
        }
        assert_eq!(fs::read_dir(&stand.secrets).unwrap().count(), 3);
    }

    #[test]
    fn a_script_key_passes_its_place_on_and_the_site_workers_stay() {
        let stand = Stand::new();
        let first = stand.keys.script_key();
        let pinned = keys::from_spki_base64(first.spki_base64()).unwrap();
        let worker = stand.keys.site_worker_guid(7);
        for rotated in 1..=2 {
            let rotation = stand.of(What::ScriptSigning);
            rotation.prepare().unwrap();
            rotation.prepare().unwrap();
            let before = stand.keys.script_public_spki_base64();
            assert!(stand.keys.read_again().unwrap());
            assert_eq!(stand.keys.script_public_spki_base64(), before, "it is only named yet");
            rotation.switch().unwrap();
            assert!(stand.keys.read_again().unwrap());
            rotation.finish().unwrap();
            let now = stand.keys.script_key();
            assert_ne!(now.spki_base64(), before);
            assert_eq!(now.successions().len(), rotated);
            let followed = borealis_protocol::succession::follow(&pinned, now.successions(), now.spki_base64());
            assert_eq!(keys::spki_base64(&followed.expect("a way from the first key")), now.spki_base64());
        }
        assert_eq!(stand.keys.site_worker_guid(7), worker);
        assert_eq!(Keys::load_or_create(&stand.secrets, None).unwrap().site_worker_guid(7), worker);
        assert_eq!(fs::read_dir(&stand.secrets).unwrap().count(), 4);
    }

    #[test]
    fn what_was_begun_and_given_up_leaves_nothing_behind() {
        let stand = Stand::new();
        let rotation = stand.of(What::ScriptSigning);
        let pinned = keys::from_spki_base64(stand.keys.script_key().spki_base64()).unwrap();
        rotation.prepare().unwrap();
        let given_up = fs::read_to_string(rotation.path(Role::Next)).unwrap();
        rotation.discard().unwrap();
        rotation.prepare().unwrap();
        assert_ne!(fs::read_to_string(rotation.path(Role::Next)).unwrap(), given_up);
        // A copy of the next key without the file of successions.
        fs::remove_file(Successions::path(&stand.secrets)).unwrap();
        rotation.switch().unwrap();
        rotation.discard().unwrap();
        stand.keys.read_again().unwrap();
        let now = stand.keys.script_key();
        assert_eq!(now.successions().len(), 1);
        assert!(borealis_protocol::succession::follow(&pinned, now.successions(), now.spki_base64()).is_some());
    }

    #[test]
    fn one_rotation_at_a_time() {
        let stand = Stand::new();
        let rotation = stand.of(What::EngineSecret);
        let at_work = rotation.alone().unwrap();
        assert_eq!(stand.of(What::AgentTokens).prepare().unwrap_err().code, "rotation_busy");
        drop(at_work);
        rotation.prepare().unwrap();
    }

    #[test]
    fn a_next_key_that_is_none_is_refused_and_changes_nothing() {
        let stand = Stand::new();
        let old = stand.worker();
        let rotation = stand.of(What::EngineSecret);
        let next = rotation.path(Role::Next);
        for (text, mode) in [("short", 0o600), ("a long enough secret, that others may read", 0o644)] {
            fs::write(&next, text).unwrap();
            fs::set_permissions(&next, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(stand.keys.read_again().unwrap_err().code, "invalid_key_file");
            assert_eq!(rotation.switch().unwrap_err().code, "invalid_key_file");
            assert!(stand.accepts(&old));
            fs::remove_file(&next).unwrap();
        }
    }
}
