//! The jobs of one device on disk, one file each: received -> running -> finished -> acknowledged.
//!
//! Every step is on the disk before it has an effect, so that after a crash a job is run at most once and its end is
//! reported at least once. Acknowledged jobs stay for a while, so that a job sent again is recognised.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use borealis_protocol::events::{QuickJobResult, QuickJobRun, REASON_OUTCOME_UNKNOWN, STATUS_FAILED};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::output;
use crate::platform::Platform;
use crate::{Error, Result, files};

/// Jobs that are not yet acknowledged; beyond that the agent takes no more.
pub const MAX_LIVE_JOBS: usize = 1000;
/// Acknowledged jobs remembered.
pub const MAX_REMEMBERED_JOBS: usize = 5000;
/// How long acknowledged jobs are remembered, in seconds.
pub const REMEMBERED_SECONDS: i64 = 7 * 86_400;
/// What is kept of each output stream of an acknowledged job.
const REMEMBERED_OUTPUT_BYTES: usize = 4096;

const UNREADABLE: &str = "the agent's record of this job became unreadable; outcome unknown";
const RESTARTED: &str = "agent restarted while the script was running; outcome unknown";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Received,
    Running,
    Finished,
    Acked,
}

/// One file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    job_id: i64,
    /// Order of arrival.
    seq: u64,
    state: State,
    /// Epoch seconds of the last change.
    changed_at: i64,
    /// The job, until it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    run: Option<QuickJobRun>,
    /// Its result, once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    result: Option<QuickJobResult>,
}

/// What is known of a job without its file.
#[derive(Debug, Clone, Copy)]
struct Entry {
    seq: u64,
    state: State,
    changed_at: i64,
}

struct Inner {
    entries: BTreeMap<i64, Entry>,
    next_seq: u64,
}

/// The jobs of one device.
#[derive(Clone)]
pub struct Store {
    platform: Arc<dyn Platform>,
    dir: PathBuf,
    inner: Arc<Mutex<Inner>>,
}

/// What the store says to a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Offer {
    /// It is new and on the disk now.
    Taken,
    /// It was here before and must not be run again.
    Known(Known),
    /// There is no room.
    Full,
}

/// How far a job is that was here before.
#[derive(Debug, Clone, PartialEq)]
pub enum Known {
    /// Waiting or running.
    Underway,
    /// Ended; the result is still to be acknowledged, or was once.
    Ended(Box<QuickJobResult>),
}

impl Store {
    /// Reads the jobs of `guid` below `state_dir` and settles what a crash left: a job found running gets a result that
    /// says so. Jobs of other identities are removed, as nobody waits for them.
    ///
    /// # Errors
    /// A directory that cannot be used. Unreadable job files are moved aside, not fatal.
    pub fn open(platform: Arc<dyn Platform>, state_dir: &Path, guid: &str, now: i64) -> Result<Self> {
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
        let store = Self { platform, dir, inner: Arc::new(Mutex::new(Inner { entries: BTreeMap::new(), next_seq: 1 })) };
        store.load(now)?;
        Ok(store)
    }

    fn load(&self, now: i64) -> Result<()> {
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
            match (files::read_json::<Record>(&path), named) {
                (Ok(Some(record)), Some(job_id)) if record.job_id == job_id => records.push(record),
                (Ok(None), _) => {}
                (_, Some(job_id)) => {
                    // That the job was here is known all the same, and so it is not run again.
                    warn!(job_id, "unreadable job file");
                    let record = lost(job_id, Entry { seq: 0, state: State::Finished, changed_at: now });
                    self.write(&record).map_err(Error::file(&path))?;
                    records.push(record);
                }
                (_, None) => warn!(path = %path.display(), "not a job file"),
            }
        }
        let mut inner = self.inner();
        for mut record in records {
            if record.state == State::Running {
                let context = record.run.take().map(|run| run.context);
                record.result = Some(failure(record.job_id, context, RESTARTED, REASON_OUTCOME_UNKNOWN));
                record.state = State::Finished;
                record.changed_at = now;
                self.write(&record).map_err(Error::file(&self.path(record.job_id)))?;
            }
            inner.next_seq = inner.next_seq.max(record.seq.saturating_add(1));
            inner.entries.insert(record.job_id, Entry { seq: record.seq, state: record.state, changed_at: record.changed_at });
        }
        self.forget_old(&mut inner, now);
        Ok(())
    }

    /// Takes a job over, unless it is known or there is no room. With `result` it has ended already (refused, cancelled
    /// before it came) and is only to be reported.
    ///
    /// # Errors
    /// When the disk does not take it; then the job is not taken over.
    pub fn offer(&self, run: &QuickJobRun, result: Option<QuickJobResult>, now: i64) -> io::Result<Offer> {
        let mut inner = self.inner();
        if let Some(entry) = inner.entries.get(&run.job_id) {
            return Ok(Offer::Known(match entry.state {
                State::Received | State::Running => Known::Underway,
                State::Finished | State::Acked => {
                    let record = self.read(&inner, run.job_id)?;
                    record.result.map_or(Known::Underway, |result| Known::Ended(Box::new(result)))
                }
            }));
        }
        if inner.entries.values().filter(|entry| entry.state != State::Acked).count() >= MAX_LIVE_JOBS {
            return Ok(Offer::Full);
        }
        let state = if result.is_some() { State::Finished } else { State::Received };
        let run = result.is_none().then(|| run.clone()).ok_or(run.job_id);
        let record = Record {
            job_id: run.as_ref().map_or_else(|id| *id, |run| run.job_id),
            seq: inner.next_seq,
            state,
            changed_at: now,
            run: run.ok(),
            result,
        };
        self.write(&record)?;
        inner.next_seq = inner.next_seq.saturating_add(1);
        inner.entries.insert(record.job_id, Entry { seq: record.seq, state, changed_at: now });
        Ok(Offer::Taken)
    }

    /// The job that waits longest, if any.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn next_waiting(&self) -> io::Result<Option<QuickJobRun>> {
        let mut inner = self.inner();
        loop {
            let waiting = inner.entries.iter().filter(|(_, entry)| entry.state == State::Received);
            let Some(job_id) = waiting.min_by_key(|(_, entry)| entry.seq).map(|(job_id, _)| *job_id) else { return Ok(None) };
            let mut record = self.read(&inner, job_id)?;
            if let Some(run) = record.run {
                return Ok(Some(run));
            }
            // There is nothing to run, and the engine hears so.
            record.state = State::Finished;
            self.write(&record)?;
            if let Some(entry) = inner.entries.get_mut(&job_id) {
                entry.state = State::Finished;
            }
        }
    }

    /// Marks a waiting job running; false when it is not waiting any more (cancelled meanwhile). Must come before the
    /// script is started.
    ///
    /// # Errors
    /// When the disk does not take it; then the script must not be started.
    pub fn start(&self, job_id: i64, now: i64) -> io::Result<bool> {
        let mut inner = self.inner();
        if !matches!(inner.entries.get(&job_id), Some(entry) if entry.state == State::Received) {
            return Ok(false);
        }
        let mut record = self.read(&inner, job_id)?;
        record.state = State::Running;
        record.changed_at = now;
        self.write(&record)?;
        if let Some(entry) = inner.entries.get_mut(&job_id) {
            (entry.state, entry.changed_at) = (State::Running, now);
        }
        Ok(true)
    }

    /// Stores the result of a waiting or running job. A job that has ended keeps its first result.
    ///
    /// # Errors
    /// When the disk does not take it; the job then stays as it was.
    pub fn finish(&self, result: &QuickJobResult, now: i64) -> io::Result<()> {
        let mut inner = self.inner();
        let Some(entry) = inner.entries.get_mut(&result.job_id) else { return Ok(()) };
        if matches!(entry.state, State::Finished | State::Acked) {
            return Ok(());
        }
        let record = Record {
            job_id: result.job_id,
            seq: entry.seq,
            state: State::Finished,
            changed_at: now,
            run: None,
            result: Some(result.clone()),
        };
        self.write(&record)?;
        (entry.state, entry.changed_at) = (State::Finished, now);
        Ok(())
    }

    /// Ids of the jobs that wait to be run.
    #[must_use]
    pub fn waiting(&self) -> Vec<i64> {
        self.inner().entries.iter().filter(|(_, entry)| entry.state == State::Received).map(|(id, _)| *id).collect()
    }

    /// Whether the job waits to be run.
    #[must_use]
    pub fn is_waiting(&self, job_id: i64) -> bool {
        matches!(self.inner().entries.get(&job_id), Some(entry) if entry.state == State::Received)
    }

    /// Whether the job was ever here.
    #[must_use]
    pub fn knows(&self, job_id: i64) -> bool {
        self.inner().entries.contains_key(&job_id)
    }

    /// The context of a waiting or running job, to be repeated in its reports.
    #[must_use]
    pub fn context(&self, job_id: i64) -> Option<serde_json::Map<String, serde_json::Value>> {
        let inner = self.inner();
        self.read(&inner, job_id).ok()?.run.map(|run| run.context)
    }

    /// Ids of the jobs whose result is not acknowledged yet, oldest first.
    #[must_use]
    pub fn unacknowledged(&self) -> Vec<i64> {
        let inner = self.inner();
        let mut ids: Vec<_> =
            inner.entries.iter().filter(|(_, e)| e.state == State::Finished).map(|(id, e)| (e.seq, *id)).collect();
        ids.sort_unstable();
        ids.into_iter().map(|(_, id)| id).collect()
    }

    /// The stored result of a job.
    ///
    /// # Errors
    /// When its file cannot be read.
    pub fn result(&self, job_id: i64) -> io::Result<Option<QuickJobResult>> {
        let inner = self.inner();
        Ok(self.read(&inner, job_id)?.result)
    }

    /// The engine has the result: the job becomes a memory with a piece of its output, for as long as memories last.
    ///
    /// # Errors
    /// When the disk does not take it; the result is then sent again later.
    pub fn acknowledge(&self, job_id: i64, now: i64) -> io::Result<()> {
        let mut inner = self.inner();
        if !matches!(inner.entries.get(&job_id), Some(entry) if entry.state == State::Finished) {
            return Ok(());
        }
        let mut record = self.read(&inner, job_id)?;
        record.state = State::Acked;
        record.changed_at = now;
        record.run = None;
        if let Some(result) = &mut record.result {
            for stream in [&mut result.stdout, &mut result.stderr] {
                if output::cut(stream, REMEMBERED_OUTPUT_BYTES) {
                    result.truncated = Some(true);
                }
            }
        }
        self.write(&record)?;
        if let Some(entry) = inner.entries.get_mut(&job_id) {
            (entry.state, entry.changed_at) = (State::Acked, now);
        }
        self.forget_old(&mut inner, now);
        Ok(())
    }

    /// Jobs waiting or running.
    #[must_use]
    pub fn underway(&self) -> usize {
        self.inner().entries.values().filter(|entry| matches!(entry.state, State::Received | State::Running)).count()
    }

    fn forget_old(&self, inner: &mut Inner, now: i64) {
        let mut acked: Vec<_> =
            inner.entries.iter().filter(|(_, e)| e.state == State::Acked).map(|(id, e)| (e.changed_at, e.seq, *id)).collect();
        acked.sort_unstable();
        let surplus = acked.len().saturating_sub(MAX_REMEMBERED_JOBS);
        for (at, (changed_at, _, job_id)) in acked.into_iter().enumerate() {
            if at >= surplus && now.saturating_sub(changed_at) <= REMEMBERED_SECONDS {
                break;
            }
            if std::fs::remove_file(self.path(job_id)).is_ok() {
                inner.entries.remove(&job_id);
            }
        }
    }

    fn path(&self, job_id: i64) -> PathBuf {
        self.dir.join(format!("{job_id}.json"))
    }

    /// The job's file. One that is gone or unreadable gives a record without a job and with a result that says so.
    fn read(&self, inner: &Inner, job_id: i64) -> io::Result<Record> {
        let entry = inner.entries.get(&job_id).ok_or(io::ErrorKind::NotFound)?;
        match std::fs::read(self.path(job_id)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).unwrap_or_else(|_| lost(job_id, *entry))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(lost(job_id, *entry)),
            Err(error) => Err(error),
        }
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        files::replace_json(&*self.platform, &self.path(record.job_id), record)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Entries change only after their file did, one field at a time: a panic elsewhere leaves nothing half-done.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn lost(job_id: i64, entry: Entry) -> Record {
    let result = Some(failure(job_id, None, UNREADABLE, REASON_OUTCOME_UNKNOWN));
    Record { job_id, seq: entry.seq, state: entry.state, changed_at: entry.changed_at, run: None, result }
}

/// A result for a job that did not run to an end.
pub(crate) fn failure(
    job_id: i64,
    context: Option<serde_json::Map<String, serde_json::Value>>,
    stderr: &str,
    reason: &str,
) -> QuickJobResult {
    QuickJobResult {
        job_id,
        status: STATUS_FAILED.to_owned(),
        stderr: stderr.to_owned(),
        context,
        reason: Some(reason.to_owned()),
        ..QuickJobResult::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform;
    use borealis_protocol::events::STATUS_SUCCESS;
    use serde_json::json;

    const GUID: &str = "0D2F7B1A-0000-4000-8000-00000000ABCD";

    fn open(dir: &Path) -> Store {
        Store::open(platform::current(), dir, GUID, 1000).unwrap()
    }

    fn job(job_id: i64) -> QuickJobRun {
        let context = json!({"scheduled_job_run_id": job_id}).as_object().cloned().unwrap();
        QuickJobRun { job_id, context, ..QuickJobRun::default() }
    }

    fn success(job_id: i64, stdout: &str) -> QuickJobResult {
        QuickJobResult { job_id, status: STATUS_SUCCESS.into(), stdout: stdout.into(), ..QuickJobResult::default() }
    }

    #[test]
    fn a_job_is_taken_once_whatever_its_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let offer = |store: &Store| store.offer(&job(7), None, 1000).unwrap();
        assert_eq!(offer(&store), Offer::Taken);
        assert_eq!(offer(&store), Offer::Known(Known::Underway));
        assert!(store.start(7, 1000).unwrap());
        assert!(!store.start(7, 1000).unwrap(), "a second start is refused");
        assert_eq!(offer(&store), Offer::Known(Known::Underway));
        store.finish(&success(7, "out"), 1000).unwrap();
        store.finish(&success(7, "other"), 1000).unwrap();
        let ended = Offer::Known(Known::Ended(Box::new(success(7, "out"))));
        assert_eq!(offer(&store), ended, "the first result stays");
        store.acknowledge(7, 1000).unwrap();
        assert_eq!(offer(&store), ended, "also when it was acknowledged");
        assert_eq!(offer(&open(dir.path())), ended, "also after a restart");
        assert_eq!(open(dir.path()).next_waiting().unwrap(), None);
    }

    #[test]
    fn a_crash_at_every_step_neither_loses_nor_repeats() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        for id in [3, 1, 2] {
            store.offer(&job(id), None, 1000).unwrap();
        }
        assert_eq!(store.next_waiting().unwrap().unwrap().job_id, 3, "order of arrival, not of ids");
        drop(store);

        let store = open(dir.path());
        assert_eq!(store.next_waiting().unwrap().unwrap(), job(3), "a waiting job waits on");
        assert!(store.start(3, 1001).unwrap());
        drop(store);

        let store = open(dir.path());
        assert_eq!(store.next_waiting().unwrap().unwrap().job_id, 1, "a started job is never started again");
        assert_eq!(store.unacknowledged(), [3]);
        let result = store.result(3).unwrap().unwrap();
        assert_eq!((result.status.as_str(), result.stderr.as_str()), (STATUS_FAILED, RESTARTED));
        assert_eq!(result.context, Some(job(3).context));
        store.finish(&success(1, "x"), 1002).unwrap();
        drop(store);

        let store = open(dir.path());
        assert_eq!(store.unacknowledged(), [3, 1], "a finished job is reported until acknowledged");
        store.acknowledge(3, 1003).unwrap();
        drop(store);
        assert_eq!(open(dir.path()).unacknowledged(), [1]);
    }

    #[test]
    fn memories_are_small_and_bounded_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        store.offer(&job(1), None, 1000).unwrap();
        store.finish(&success(1, &"é".repeat(100_000)), 1000).unwrap();
        store.acknowledge(1, 1000).unwrap();
        let Offer::Known(Known::Ended(result)) = store.offer(&job(1), None, 1000).unwrap() else { panic!("not known") };
        assert!(result.stdout.len() <= REMEMBERED_OUTPUT_BYTES && result.truncated == Some(true));
        drop(store);
        let store = Store::open(platform::current(), dir.path(), GUID, 1000 + REMEMBERED_SECONDS).unwrap();
        assert!(store.knows(1));
        drop(store);
        let store = Store::open(platform::current(), dir.path(), GUID, 1001 + REMEMBERED_SECONDS).unwrap();
        assert!(!store.knows(1));
    }

    #[test]
    fn there_is_an_end_to_what_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        {
            let mut inner = store.inner();
            for id in 0..i64::try_from(MAX_LIVE_JOBS).unwrap() {
                inner.entries.insert(id, Entry { seq: 1, state: State::Finished, changed_at: 0 });
            }
        }
        assert_eq!(store.offer(&job(-1), None, 1000).unwrap(), Offer::Full);
    }

    #[test]
    fn a_broken_file_and_a_foreign_identity_stop_nothing() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).offer(&job(1), None, 1000).unwrap();
        let own = dir.path().join("jobs").join(GUID);
        std::fs::write(own.join("2.json"), "{").unwrap();
        std::fs::write(own.join("3.json.new"), "{").unwrap();
        std::fs::copy(own.join("1.json"), own.join("9.json")).unwrap();
        let store = open(dir.path());
        assert!(store.knows(1) && !store.knows(3) && !own.join("3.json.new").exists());
        assert_eq!(store.unacknowledged(), [2, 9], "what cannot be read is known, reported and not run");
        assert_eq!(store.next_waiting().unwrap(), Some(job(1)));
        std::fs::write(own.join("1.json"), "{").unwrap();
        assert_eq!(store.next_waiting().unwrap(), None, "also when it breaks while the agent runs");
        assert_eq!(store.result(1).unwrap().unwrap().stderr, UNREADABLE);
        store.acknowledge(1, 1000).unwrap();
        assert_eq!(store.unacknowledged(), [2, 9]);
        let other = Store::open(platform::current(), dir.path(), "../../OTHER", 1000).unwrap();
        assert!(!other.knows(1) && !own.exists());
        assert!(dir.path().join("jobs/OTHER").exists(), "and a GUID is no path");
    }

    #[test]
    fn a_refused_job_is_known_and_only_reported() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let refusal = failure(5, None, "no", "refused");
        assert_eq!(store.offer(&job(5), Some(refusal.clone()), 1000).unwrap(), Offer::Taken);
        assert_eq!(store.next_waiting().unwrap(), None);
        assert_eq!(store.unacknowledged(), [5]);
        assert_eq!(store.offer(&job(5), None, 1000).unwrap(), Offer::Known(Known::Ended(Box::new(refusal))));
    }
}
