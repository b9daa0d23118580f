//! How a process opens the secret store by itself: with a wrapping key that is kept elsewhere than in the database.

use std::{
    fs,
    io::Read,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Once,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::{
    libc::O_NONBLOCK,
    sys::signal::{Signal, killpg},
    unistd::{Pid, Uid},
};
use tokio::{io::AsyncReadExt, process::Command, time::timeout};
use zeroize::Zeroizing;

use super::{KEY_BYTES, Key, write_private};
use crate::{
    error::{Error, Kind, Result},
    secret::Secret,
};

/// How long the unseal command may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// The most bytes it may print, and the most a key file may have.
pub const KEY_MAX_BYTES: usize = 4 * 1024;
/// Where programs are looked for: the caller's own `PATH` is not believed.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where the wrapping key is: 32 bytes as base64 text, like `openssl rand -base64 32` prints them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Unseal {
    /// Nowhere: somebody types the cipher, for each process.
    #[default]
    Manual,
    /// In a file of ours, made when it is missing or does not fit.
    Own(PathBuf),
    /// In a file that the engine only reads.
    KeyFile(PathBuf),
    /// A program with its arguments prints it.
    Command(Vec<String>),
}

impl Unseal {
    /// By the file of ours in a state folder: `secrets/unseal.key`.
    #[must_use]
    pub fn in_state_dir(state_dir: &Path) -> Self {
        Self::Own(state_dir.join("secrets").join("unseal.key"))
    }

    /// Whether the key is kept elsewhere: it may be slow to get, and not there.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::KeyFile(_) | Self::Command(_))
    }

    pub(super) fn own(&self) -> Option<&Path> {
        match self {
            Self::Own(path) => Some(path),
            _ => None,
        }
    }

    /// The key of a file of ours, if it is there and nobody else can have read it.
    pub(super) fn own_key(&self) -> Option<Key> {
        static SAID: Once = Once::new();
        let path = self.own()?;
        if matches!(path.try_exists(), Ok(false)) {
            return None;
        }
        let text = read(path).inspect_err(|why| {
            // This is asked every second.
            SAID.call_once(|| tracing::error!(path = %path.display(), why, "the unseal file is not used"));
        });
        key(std::str::from_utf8(&text.ok()?).ok()?)
    }

    /// The unseal key that is kept elsewhere.
    ///
    /// # Errors
    /// 503 `unseal_failed`; the message says why and never what was read.
    pub(super) async fn foreign_key(&self) -> Result<Key> {
        let (of, text) = match self {
            Self::KeyFile(path) => (format!("The unseal key file {}", path.display()), read(path)),
            Self::Command(words) => ("The unseal command".to_owned(), run(words).await),
            Self::Manual | Self::Own(_) => return Err(Error::bug("there is no unseal key that is kept elsewhere")),
        };
        let found = text.and_then(|text| {
            let text = std::str::from_utf8(&text).ok();
            text.and_then(key).ok_or_else(|| "it gives something else than 32 bytes in base64".to_owned())
        });
        found.map_err(|why| Error::new(Kind::Unavailable, "unseal_failed", format!("{of} cannot be used: {why}.")))
    }
}

fn key(text: &str) -> Option<Key> {
    let bytes = Zeroizing::new(STANDARD.decode(text.trim_end_matches(['\r', '\n'])).ok()?);
    Some(Secret::new(<[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok()?))
}

pub(super) fn write_own(path: &Path) -> Result<Key> {
    let key = Secret::new(rand::random::<[u8; KEY_BYTES]>());
    write_private(path, Zeroizing::new(STANDARD.encode(key.expose()) + "\n").as_bytes())?;
    Ok(key)
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let failed = |error: std::io::Error| error.to_string();
    // What is opened is what is looked at. A pipe in the file's place must not keep us waiting.
    let file = fs::OpenOptions::new().read(true).custom_flags(O_NONBLOCK).open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    if !about.is_file() {
        return Err("it is no file".to_owned());
    }
    if about.uid() != 0 && about.uid() != Uid::effective().as_raw() {
        return Err("it belongs to somebody else than root and the user the engine runs as".to_owned());
    }
    if about.permissions().mode() & 0o077 != 0 {
        return Err("others than its owner may read it (chmod 600)".to_owned());
    }
    let mut text = Zeroizing::new(Vec::with_capacity(KEY_MAX_BYTES + 64));
    file.take(KEY_MAX_BYTES as u64 + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() > KEY_MAX_BYTES {
        return Err(format!("it is longer than {KEY_MAX_BYTES} bytes"));
    }
    Ok(text)
}

/// What a program prints on its standard output. It gets no input, no secrets of ours from the environment, and its standard error
/// goes nowhere: nobody knows what it says there.
async fn run(words: &[String]) -> Result<Zeroizing<Vec<u8>>, String> {
    let (program, arguments) = words.split_first().ok_or("it is empty")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .envs(std::env::var_os("HOME").map(|home| ("HOME", home)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // What it starts ends with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{program} cannot be started: {error}"))?;
    // Declared after the child, so that it ends before somebody takes note of the child's end and gives its id away.
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
    let work = async {
        let mut text = Zeroizing::new(Vec::with_capacity(KEY_MAX_BYTES + 64));
        if let Some(output) = child.stdout.take() {
            let read = output.take(KEY_MAX_BYTES as u64 + 1).read_to_end(&mut text).await;
            read.map_err(|error| format!("its output cannot be read: {error}"))?;
        }
        if text.len() > KEY_MAX_BYTES {
            return Err(format!("it printed more than {KEY_MAX_BYTES} bytes"));
        }
        match child.wait().await {
            Ok(status) => {
                group.0 = None;
                if status.success() { Ok(text) } else { Err(format!("it ended with {status}")) }
            }
            Err(error) => Err(format!("it cannot be waited for: {error}")),
        }
    };
    let ended = timeout(COMMAND_LIMIT, work).await;
    ended.unwrap_or_else(|_| Err(format!("it did not end within {} s", COMMAND_LIMIT.as_secs())))
}

/// Ends a process and all it has started, unless it was seen to end.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    async fn said(unseal: Unseal) -> String {
        unseal.foreign_key().await.map_or_else(|error| error.message, |key| STANDARD.encode(key.expose()))
    }

    async fn says(script: &str) -> String {
        said(Unseal::Command(vec!["sh".into(), "-c".into(), script.into()])).await
    }

    #[tokio::test]
    async fn a_command_prints_the_key_and_nothing_else_of_it_counts() {
        assert_eq!(says(&format!("echo noise >&2; echo {KEY}")).await, KEY);
        assert_eq!(says(&format!("printf '%s\\r\\n' {KEY}")).await, KEY);
        for (script, why) in [
            (&*format!("echo {KEY}; exit 3"), "it ended with exit status: 3"),
            ("true", "something else than 32 bytes in base64"),
            ("echo canary", "something else than 32 bytes in base64"),
            ("head -c 5000 /dev/zero", "it printed more than 4096 bytes"),
            ("yes canary", "it printed more than 4096 bytes"),
            ("read line || exit 9", "exit status: 9"),
        ] {
            let said = says(script).await;
            assert!(said.contains(why) && !said.contains("canary"), "{script}: {said}");
        }
        let said = said(Unseal::Command(vec!["/nowhere/unseal".into()])).await;
        assert!(said.contains("cannot be started"), "{said}");
    }

    #[tokio::test]
    async fn a_command_sees_little_of_our_environment() {
        // cargo gives tests many variables.
        let script = format!("[ -z \"$CARGO_MANIFEST_DIR\" ] && [ \"$PWD\" = / ] && echo {KEY}");
        assert_eq!(says(&script).await, KEY);
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_hangs_is_ended_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("pid");
        // Time stands still for us and not for the script, so it has to have begun.
        let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", note.display());
        let running = tokio::spawn(async move { says(&script).await });
        while !note.exists() {
            tokio::task::yield_now().await;
        }
        assert!(running.await.unwrap().contains("it did not end within 30 s"));
        let pid: i32 = fs::read_to_string(&note).unwrap().trim().parse().unwrap();
        for _ in 0..1000 {
            // One that has ended may wait for somebody to notice.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z')) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("what the command started still runs");
    }

    #[tokio::test]
    async fn a_key_file_is_private_or_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let of = |path: &Path| said(Unseal::KeyFile(path.to_owned()));
        assert!(of(&path).await.contains("No such file"));
        fs::write(&path, format!("{KEY}\n")).unwrap();
        for (mode, fine) in [(0o644, false), (0o640, false), (0o606, false), (0o660, false), (0o600, true), (0o400, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let said = of(&path).await;
            assert_eq!(said == KEY, fine, "{mode:o}: {said}");
            assert!(fine || said.contains("chmod 600"), "{mode:o}: {said}");
        }
        assert!(of(folder.path()).await.contains("it is no file"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "x".repeat(5000)).unwrap();
        assert!(of(&path).await.contains("longer than 4096 bytes"));
    }
}
