//! Scripts of an agent that was killed: the next one ends them, as it reports that their outcome is unknown.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::process::GRACE;
use crate::files;
use crate::platform::Platform;

/// A note on disk of the process group of a running script; removed when dropped.
#[derive(Debug)]
pub(super) struct Note(PathBuf);

impl Note {
    /// Notes in `dir` that the group of `leader` runs the script of `job_id`. A full disk keeps no script from running.
    pub(super) fn write(platform: &Arc<dyn Platform>, dir: &Path, job_id: i64, leader: u32) -> Self {
        let path = dir.join(format!("{job_id}.group"));
        let mark = platform.process_mark(leader).unwrap_or_default();
        let written = platform.private_file(&path).and_then(|mut file| write!(file, "{leader} {mark}"));
        if let Err(error) = written {
            warn!(%error, job_id, "it is not noted which processes the script runs as");
        }
        Self(path)
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Ends the scripts that are noted in `dir` and still run. What a script that has ended left running goes on.
pub(crate) async fn end_left_over(platform: &Arc<dyn Platform>, dir: &Path) {
    for file in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = file.path();
        if path.extension().is_none_or(|extension| extension != "group") {
            continue;
        }
        let text = files::read(&**platform, &path).ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        let Some((leader, mark)) = text.split_once(' ') else { continue };
        let Ok(leader) = leader.parse() else { continue };
        // Another process may have its number by now.
        if platform.process_mark(leader).is_some_and(|now| now == mark) {
            info!(leader, "ending a script of the agent before this one");
            end(platform, leader).await;
        }
    }
}

async fn end(platform: &Arc<dyn Platform>, leader: u32) {
    let gone = async {
        while platform.group_alive(leader) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    let asked = platform.stop_group(leader, false);
    let ended = match asked {
        Ok(()) if timeout(GRACE, gone).await.is_ok() => Ok(()),
        _ => platform.stop_group(leader, true),
    };
    if let Err(error) = ended {
        warn!(%error, leader, "cannot end a script of the agent before this one");
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::platform;

    fn sleeper() -> Child {
        use std::os::unix::process::CommandExt as _;
        Command::new("sleep").arg("60").process_group(0).spawn().unwrap()
    }

    #[tokio::test]
    async fn a_script_is_ended_and_a_stranger_with_its_number_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let platform = platform::current();
        let (mut script, mut stranger) = (sleeper(), sleeper());
        let note = Note::write(&platform, dir.path(), 1, script.id());
        std::fs::write(dir.path().join("2.group"), format!("{} another-boot 5", stranger.id())).unwrap();
        std::fs::write(dir.path().join("3.group"), "nonsense").unwrap();
        // It is a child of this test, and so stays until it is waited for.
        let reaped = tokio::task::spawn_blocking(move || script.wait());
        end_left_over(&platform, dir.path()).await;
        assert!(!reaped.await.unwrap().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        let _ = stranger.wait();
        drop(note);
        assert!(!dir.path().join("1.group").exists());
    }
}
