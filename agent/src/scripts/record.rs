//! What the disk holds of the jobs of one device: one file each, and how far back jobs are not remembered any more.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use borealis_protocol::events::{QuickJobResult, QuickJobRun, REASON_OUTCOME_UNKNOWN, STATUS_FAILED, STATUS_TIMED_OUT};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::platform::Platform;
use crate::{Error, Result, files};

/// How long after it was made a job without an envelope counts as one that can still arrive, in seconds. The engine signs for a day.
const REACH_SECONDS: i64 = 25 * 3600;

const UNREADABLE: &str = "the agent's record of this job became unreadable; outcome unknown";
/// Says that a job was running when the agent ended.
pub(super) const RESTARTED: &str = "agent restarted while the script was running; outcome unknown";

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    Received,
    Running,
    Finished,
    Acked,
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) job_id: i64,
    /// Order of arrival.
    pub(super) seq: u64,
    pub(super) state: State,
    /// Epoch seconds of the last change, by the machine's clock.
    pub(super) changed_at: i64,
    /// Until when the engine's signature lets the job be begun, in epoch seconds.
    #[serde(default)]
    pub(super) not_after: i64,
    /// The job, until it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) run: Option<QuickJobRun>,
    /// Its result, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<QuickJobResult>,
}

impl Record {
    /// What is kept in memory of it.
    pub(super) fn entry(&self) -> Entry {
        Entry { seq: self.seq, state: self.state, changed_at: self.changed_at, not_after: self.not_after }
    }
}

/// What is known of a job without its file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) state: State,
    pub(super) changed_at: i64,
    pub(super) not_after: i64,
}

/// Until when a job may still arrive of which no checked envelope is at hand.
pub(super) fn reach(now: i64) -> i64 {
    now.saturating_add(REACH_SECONDS)
}

/// The files of the jobs of one device.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    platform: Arc<dyn Platform>,
    dir: PathBuf,
}

impl Folder {
    /// Opens the folder of `guid` below `state_dir`. Those of other identities are removed, as nobody waits for their jobs.
    pub(super) fn open(platform: Arc<dyn Platform>, state_dir: &Path, guid: &str) -> Result<Self> {
        let jobs = state_dir.join("jobs");
        // The GUID comes from the engine; only its letters, digits and dashes become a directory name.
        let own: String = guid.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let dir = jobs.join(if own.is_empty() { "none" } else { &own });
        platform.private_dir(&jobs).map_err(Error::file(&jobs))?;
        platform.private_dir(&dir).map_err(Error::file(&dir))?;
        for other in std::fs::read_dir(&jobs).map_err(Error::file(&jobs))?.flatten() {
            if other.path() != dir && other.file_type().is_ok_and(|kind| kind.is_dir()) {
                let _ = std::fs::remove_dir_all(other.path());
            }
        }
        Ok(Self { platform, dir })
    }

    /// Every job there is. One whose file is unreadable has ended with a result that says so: that it was here is known all the same,
    /// and so it is not run again.
    pub(super) fn load(&self, now: i64) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for file in std::fs::read_dir(&self.dir).map_err(Error::file(&self.dir))?.flatten() {
            let path = file.path();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {}
                Some("new") => {
                    // The draft of a write that never finished; what it was to replace is still there.
                    let _ = std::fs::remove_file(&path);
                    continue;
                }
                _ => continue,
            }
            let named = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            match (files::read_json::<Record>(&*self.platform, &path), named) {
                (Ok(Some(record)), Some(job_id)) if record.job_id == job_id => records.push(record),
                (Ok(None), _) => {}
                (_, Some(job_id)) => {
                    warn!(job_id, "unreadable job file");
                    records.push(lost(job_id, Entry { seq: 0, state: State::Finished, changed_at: now, not_after: reach(now) }));
                }
                (_, None) => warn!(path = %path.display(), "not a job file"),
            }
        }
        Ok(records)
    }

    /// Reads a job's file; one that is gone or unreadable gives a record without a job and with a result that says so.
    pub(super) fn read(&self, job_id: i64, entry: Entry) -> io::Result<Record> {
        match files::read(&*self.platform, &self.path(job_id)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| lost(job_id, entry))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(lost(job_id, entry)),
            Err(error) => Err(error),
        }
    }

    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        files::replace_json(&*self.platform, &self.path(record.job_id), record)
    }

    pub(super) fn remove(&self, job_id: i64) -> io::Result<()> {
        match std::fs::remove_file(self.path(job_id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Jobs that end by then may have been forgotten; in epoch seconds, 0 for none. When it cannot be read, those of a day ago.
    pub(super) fn forgotten_until(&self, now: i64) -> i64 {
        match files::read_json::<i64>(&*self.platform, &self.mark()) {
            Ok(mark) => mark.unwrap_or(0),
            Err(error) => {
                warn!(%error, "it is not known how far back jobs are remembered");
                now
            }
        }
    }

    /// Notes on disk that jobs that end by `until` may have been forgotten.
    pub(super) fn forget_until(&self, until: i64) -> io::Result<()> {
        files::replace_json(&*self.platform, &self.mark(), &until)
    }

    fn mark(&self) -> PathBuf {
        self.dir.join("forgotten-until")
    }

    fn path(&self, job_id: i64) -> PathBuf {
        self.dir.join(format!("{job_id}.json"))
    }
}

fn lost(job_id: i64, entry: Entry) -> Record {
    let Entry { seq, state, changed_at, not_after } = entry;
    let result = Some(failure(job_id, None, UNREADABLE, REASON_OUTCOME_UNKNOWN));
    Record { job_id, seq, state, changed_at, not_after, run: None, result }
}

/// A result for a job that did not run to an end.
pub(crate) fn failure(
    job_id: i64,
    context: Option<serde_json::Map<String, serde_json::Value>>,
    stderr: &str,
    reason: &str,
) -> QuickJobResult {
    let status = if reason == REASON_OUTCOME_UNKNOWN { STATUS_TIMED_OUT } else { STATUS_FAILED };
    QuickJobResult {
        job_id,
        status: status.to_owned(),
        stderr: stderr.to_owned(),
        context,
        reason: Some(reason.to_owned()),
        ..QuickJobResult::default()
    }
}
