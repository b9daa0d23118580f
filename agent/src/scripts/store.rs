//! The jobs of one device: received -> running -> finished -> acknowledged.
//!
//! A job is on the disk before it is accepted, and marked running there before its script is started, so that after a crash it is run
//! at most once and its end is reported at least once. An end that a full disk does not take is kept in memory, reported from there,
//! and written when there is room. Acknowledged jobs stay for a while, so that a job sent again is recognised; what has been
//! forgotten is refused by the time its signature ends, whatever any clock says.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use borealis_protocol::events::{QuickJobResult, QuickJobRun, REASON_OUTCOME_UNKNOWN, REASON_REFUSED};
use tracing::{error, warn};

use super::output;
pub(crate) use super::record::failure;
use super::record::{Entry, Folder, RESTARTED, Record, State, reach};
use crate::Result;
use crate::platform::Platform;

/// Jobs that are not yet acknowledged; beyond that the agent takes no more.
pub const MAX_LIVE_JOBS: usize = 1000;
/// Acknowledged jobs remembered.
pub const MAX_REMEMBERED_JOBS: usize = 5000;
/// How long acknowledged jobs are remembered by the machine's clock, after the last change and after their signature ended; in seconds.
pub const REMEMBERED_SECONDS: i64 = 7 * 86_400;
/// What is kept of each output stream of an acknowledged job.
const REMEMBERED_OUTPUT_BYTES: usize = 4096;

const FORGOTTEN: &str = "the job is older than what this agent remembers: it may have been run before";

struct Inner {
    entries: BTreeMap<i64, Entry>,
    next_seq: u64,
    /// Ends of jobs that the disk did not take.
    unsaved: BTreeMap<i64, Record>,
    /// A job whose signature ends by then may have been here and be forgotten, in epoch seconds.
    forgotten_until: i64,
}

/// The jobs of one device.
#[derive(Clone)]
pub struct Store {
    folder: Folder,
    inner: Arc<Mutex<Inner>>,
}

/// What the store says to a job.
#[derive(Debug, Clone, PartialEq)]
pub enum Offer {
    /// It is new and on the disk now.
    Taken,
    /// It is new and has ended without being run; the result is to be reported.
    Ended,
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
    /// says so. `now` here and below is the machine's own time in epoch seconds.
    ///
    /// # Errors
    /// A directory that cannot be used. Unreadable job files are not fatal.
    pub fn open(platform: Arc<dyn Platform>, state_dir: &Path, guid: &str, now: i64) -> Result<Self> {
        let folder = Folder::open(platform, state_dir, guid)?;
        let records = folder.load(now)?;
        let mut inner = Inner {
            entries: BTreeMap::new(),
            next_seq: 1,
            unsaved: BTreeMap::new(),
            forgotten_until: folder.forgotten_until(now),
        };
        for record in &records {
            inner.next_seq = inner.next_seq.max(record.seq.saturating_add(1));
            inner.entries.insert(record.job_id, record.entry());
        }
        let store = Self { folder, inner: Arc::new(Mutex::new(inner)) };
        let mut inner = store.inner();
        for mut record in records {
            if record.state == State::Running {
                let context = record.run.take().map(|run| run.context);
                record.result = Some(failure(record.job_id, context, RESTARTED, REASON_OUTCOME_UNKNOWN));
                record.state = State::Finished;
                record.changed_at = now;
                store.keep(&mut inner, record);
            }
        }
        store.forget_old(&mut inner, now);
        drop(inner);
        Ok(store)
    }

    /// Takes a job over, unless it is known or there is no room. With `result` it has ended already (refused, cancelled
    /// before it came) and is only to be reported; so has one that is as old as what was forgotten.
    ///
    /// # Errors
    /// When the disk does not take it; then the job is not taken over.
    pub fn offer(&self, run: &QuickJobRun, result: Option<QuickJobResult>, now: i64) -> io::Result<Offer> {
        let mut inner = self.inner();
        let inner = &mut *inner;
        if let Some(entry) = inner.entries.get(&run.job_id).copied() {
            return Ok(Offer::Known(match entry.state {
                State::Received | State::Running => Known::Underway,
                State::Finished | State::Acked => {
                    let result = self.read(inner, run.job_id)?.result.unwrap_or_default();
                    Known::Ended(Box::new(QuickJobResult { job_id: run.job_id, ..result }))
                }
            }));
        }
        if inner.entries.values().filter(|entry| entry.state != State::Acked).count() >= MAX_LIVE_JOBS {
            return Ok(Offer::Full);
        }
        // Only of a job that is to be run the envelope has been checked.
        let signed_until = run.envelope.as_ref().filter(|_| result.is_none()).map(|envelope| envelope.not_after);
        let forgotten = signed_until.is_some_and(|until| until <= inner.forgotten_until);
        let result =
            result.or_else(|| forgotten.then(|| failure(run.job_id, Some(run.context.clone()), FORGOTTEN, REASON_REFUSED)));
        let ended = result.is_some();
        let record = Record {
            job_id: run.job_id,
            seq: inner.next_seq,
            state: if ended { State::Finished } else { State::Received },
            changed_at: now,
            not_after: signed_until.unwrap_or_else(|| reach(now)),
            run: (!ended).then(|| run.clone()),
            result,
        };
        if ended {
            inner.next_seq = inner.next_seq.saturating_add(1);
            self.keep(inner, record);
            return Ok(Offer::Ended);
        }
        self.flush(inner)?;
        if let Err(error) = self.folder.write(&record) {
            // Should it be there all the same, it must not be found at the next start: the engine hears that it was not taken.
            let _ = self.folder.remove(record.job_id);
            return Err(error);
        }
        inner.next_seq = inner.next_seq.saturating_add(1);
        inner.entries.insert(record.job_id, record.entry());
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
            self.keep(&mut inner, record);
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
        // Results in memory are few: no further script is started while there is no room for the last one's.
        self.flush(&mut inner)?;
        let mut record = self.read(&inner, job_id)?;
        record.state = State::Running;
        record.changed_at = now;
        self.folder.write(&record)?;
        inner.entries.insert(job_id, record.entry());
        Ok(true)
    }

    /// Keeps the result of a waiting or running job. A job that has ended keeps its first result.
    pub fn finish(&self, result: &QuickJobResult, now: i64) {
        let mut inner = self.inner();
        let Some(entry) = inner.entries.get(&result.job_id).copied() else { return };
        if matches!(entry.state, State::Finished | State::Acked) {
            return;
        }
        let record = Record {
            job_id: result.job_id,
            seq: entry.seq,
            state: State::Finished,
            changed_at: now,
            not_after: entry.not_after,
            run: None,
            result: Some(result.clone()),
        };
        self.keep(&mut inner, record);
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
    /// When its file cannot be read; the result is then sent again later.
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
        self.keep(&mut inner, record);
        self.forget_old(&mut inner, now);
        Ok(())
    }

    /// Writes what the disk did not take before.
    ///
    /// # Errors
    /// When it still does not.
    pub fn save(&self) -> io::Result<()> {
        self.flush(&mut self.inner())
    }

    /// Jobs waiting or running.
    #[must_use]
    pub fn underway(&self) -> usize {
        self.inner().entries.values().filter(|entry| matches!(entry.state, State::Received | State::Running)).count()
    }

    /// Keeps what a job has become, in memory where the disk does not take it. Its file then says less: that it runs, and the engine
    /// hears after a restart that its outcome is unknown; that it waits, so the file is removed: it must not be run then.
    fn keep(&self, inner: &mut Inner, record: Record) {
        let waited = inner.entries.get(&record.job_id).is_some_and(|entry| entry.state == State::Received);
        inner.entries.insert(record.job_id, record.entry());
        let mut written = self.folder.write(&record);
        if written.is_err() && waited {
            written = self.folder.remove(record.job_id).and_then(|()| self.folder.write(&record));
        }
        match written {
            Ok(()) => drop(inner.unsaved.remove(&record.job_id)),
            Err(error) => {
                error!(%error, job_id = record.job_id, "the disk does not take the end of a job: it is kept in memory");
                inner.unsaved.insert(record.job_id, record);
            }
        }
    }

    fn flush(&self, inner: &mut Inner) -> io::Result<()> {
        while let Some((job_id, record)) = inner.unsaved.first_key_value() {
            let job_id = *job_id;
            self.folder.write(record)?;
            inner.unsaved.remove(&job_id);
        }
        Ok(())
    }

    fn forget_old(&self, inner: &mut Inner, now: i64) {
        let mut acked: Vec<_> =
            inner.entries.iter().filter(|(_, e)| e.state == State::Acked).map(|(id, e)| (e.changed_at, e.seq, *id)).collect();
        acked.sort_unstable();
        let surplus = acked.len().saturating_sub(MAX_REMEMBERED_JOBS);
        let old = |entry: &Entry| now.saturating_sub(entry.changed_at.max(entry.not_after)) > REMEMBERED_SECONDS;
        let forgotten: Vec<i64> = acked
            .into_iter()
            .enumerate()
            .filter(|(at, (_, _, id))| *at < surplus || inner.entries.get(id).is_some_and(old))
            .map(|(_, (_, _, id))| id)
            .collect();
        let until = forgotten.iter().filter_map(|id| inner.entries.get(id)).map(|entry| entry.not_after).max();
        let Some(until) = until else { return };
        if until > inner.forgotten_until {
            // First this, so that none of them comes back as a new one.
            if let Err(error) = self.folder.forget_until(until) {
                warn!(%error, "cannot forget old jobs");
                return;
            }
            inner.forgotten_until = until;
        }
        for job_id in forgotten {
            if self.folder.remove(job_id).is_ok() {
                inner.entries.remove(&job_id);
                inner.unsaved.remove(&job_id);
            }
        }
    }

    fn read(&self, inner: &Inner, job_id: i64) -> io::Result<Record> {
        if let Some(record) = inner.unsaved.get(&job_id) {
            return Ok(record.clone());
        }
        let entry = inner.entries.get(&job_id).ok_or(io::ErrorKind::NotFound)?;
        self.folder.read(job_id, *entry)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Entries change one at a time, and with their file: a panic elsewhere leaves nothing half-done.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use borealis_protocol::envelope::Envelope;
    use borealis_protocol::events::{STATUS_SUCCESS, STATUS_TIMED_OUT};
    use serde_json::json;

    use super::*;
    use crate::platform;

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
        store.finish(&success(7, "out"), 1000);
        store.finish(&success(7, "other"), 1000);
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
        assert_eq!((result.status.as_str(), result.stderr.as_str()), (STATUS_TIMED_OUT, RESTARTED));
        assert_eq!(result.context, Some(job(3).context));
        store.finish(&success(1, "x"), 1002);
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
        store.finish(&success(1, &"é".repeat(100_000)), 1000);
        store.acknowledge(1, 1000).unwrap();
        let Offer::Known(Known::Ended(result)) = store.offer(&job(1), None, 1000).unwrap() else { panic!("not known") };
        assert!(result.stdout.len() <= REMEMBERED_OUTPUT_BYTES && result.truncated == Some(true));
        drop(store);
        let end = reach(1000) + REMEMBERED_SECONDS;
        let store = Store::open(platform::current(), dir.path(), GUID, end).unwrap();
        assert!(store.knows(1));
        drop(store);
        let store = Store::open(platform::current(), dir.path(), GUID, end + 1).unwrap();
        assert!(!store.knows(1));
    }

    fn signed(job_id: i64, not_after: i64) -> QuickJobRun {
        QuickJobRun { envelope: Some(Envelope { not_after, ..envelope() }), ..job(job_id) }
    }

    fn envelope() -> Envelope {
        serde_json::from_value(json!({"v": 2, "job_id": 1, "device_guid": GUID, "script_sha256": "", "script_type": "bash",
            "env_sha256": "", "timeout_seconds": 0, "run_mode": "system", "not_after": 0}))
        .unwrap()
    }

    #[test]
    fn what_was_forgotten_is_refused_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let run = |store: &Store, job_id, not_after, now| {
            assert_eq!(store.offer(&signed(job_id, not_after), None, now).unwrap(), Offer::Taken, "{job_id}");
            store.finish(&success(job_id, ""), now);
            store.acknowledge(job_id, now).unwrap();
        };
        run(&store, 1, 90_000, 1000);
        // Not before the signature has ended long ago.
        run(&store, 2, 100_000, 90_000 + REMEMBERED_SECONDS);
        assert!(store.knows(1));
        // The machine's clock jumps ahead, and back.
        run(&store, 3, 200_000, 95_000 + REMEMBERED_SECONDS);
        assert!(!store.knows(1) && store.knows(2));
        for store in [store, open(dir.path())] {
            let again = store.offer(&signed(1, 90_000), None, 1000).unwrap();
            assert!(matches!(again, Offer::Ended | Offer::Known(Known::Ended(_))), "{again:?}");
            assert_eq!(store.result(1).unwrap().unwrap().reason.as_deref(), Some(REASON_REFUSED));
            assert_eq!(store.next_waiting().unwrap(), None);
        }
        // What the engine signs from now on is newer.
        run(&open(dir.path()), 4, 90_001, 1000);
        // An end that nobody has signed counts for nothing.
        let store = open(dir.path());
        let refused = failure(5, None, "no", REASON_REFUSED);
        store.offer(&signed(5, i64::MAX), Some(refused), 1000).unwrap();
        store.acknowledge(5, 1000).unwrap();
        run(&store, 6, 300_000, 1000 + 4 * REMEMBERED_SECONDS);
        assert!(!store.knows(5));
        run(&store, 7, 300_001, 1000);
    }

    #[test]
    fn so_is_what_was_forgotten_for_want_of_room() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        {
            let mut inner = store.inner();
            for id in 0..i64::try_from(MAX_REMEMBERED_JOBS).unwrap() {
                inner.entries.insert(id, Entry { seq: 1, state: State::Acked, changed_at: 1000 + id, not_after: 90_000 + id });
            }
        }
        store.offer(&signed(-1, 99_000), None, 99_000).unwrap();
        store.finish(&success(-1, ""), 99_000);
        store.acknowledge(-1, 99_000).unwrap();
        assert!(!store.knows(0) && store.knows(1));
        assert_eq!(store.offer(&signed(0, 90_000), None, 1000).unwrap(), Offer::Ended);
        assert_eq!(store.offer(&signed(-2, 90_001), None, 1000).unwrap(), Offer::Taken);
    }

    #[test]
    fn there_is_an_end_to_what_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        {
            let mut inner = store.inner();
            for id in 0..i64::try_from(MAX_LIVE_JOBS).unwrap() {
                inner.entries.insert(id, Entry { seq: 1, state: State::Finished, changed_at: 0, not_after: 0 });
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
        assert!(store.result(1).unwrap().unwrap().stderr.contains("unreadable"));
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
        assert_eq!(store.offer(&job(5), Some(refusal.clone()), 1000).unwrap(), Offer::Ended);
        assert_eq!(store.next_waiting().unwrap(), None);
        assert_eq!(store.unacknowledged(), [5]);
        assert_eq!(store.offer(&job(5), None, 1000).unwrap(), Offer::Known(Known::Ended(Box::new(refusal))));
    }
}
