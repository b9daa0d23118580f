//! The open event streams of this process. They do not look for news each on its own: one look for all of them tells each of what it
//! follows (`reconcilers/event_streams.rs`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;

use crate::access::operator::Credential;

/// The most streams of one process.
pub const ALL_MAX: usize = 512;
/// The most streams that one user has at a process, with all sessions and API tokens.
pub const USER_MAX: usize = 32;

/// What a stream is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Word {
    /// The number of the run's last event; 0 before the first look.
    pub last: i32,
    /// The run has ended, or is gone.
    pub ended: bool,
    /// The session or API token that the stream was opened with has ended.
    pub revoked: bool,
}

/// All open streams.
#[derive(Debug, Clone, Default)]
pub struct EventStreams(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    streams: BTreeMap<u64, Stream>,
}

#[derive(Debug)]
struct Stream {
    run: Uuid,
    user_id: i64,
    credential: Credential,
    word: watch::Sender<Word>,
}

/// What the open streams follow.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The runs.
    pub runs: Vec<Uuid>,
    /// The sessions they were opened with.
    pub sessions: Vec<Uuid>,
    /// The API tokens they were opened with.
    pub tokens: Vec<Uuid>,
}

/// One open stream, until it is dropped.
#[derive(Debug)]
pub struct Followed {
    id: u64,
    of: EventStreams,
    word: watch::Receiver<Word>,
}

impl EventStreams {
    /// Opens a stream on a run; none when there are as many as may be.
    #[must_use]
    pub fn follow(&self, run: Uuid, user_id: i64, credential: Credential) -> Option<Followed> {
        let mut open = self.open();
        if open.streams.len() >= ALL_MAX || open.streams.values().filter(|stream| stream.user_id == user_id).count() >= USER_MAX {
            return None;
        }
        let (word, heard) = watch::channel(Word::default());
        let id = open.next;
        open.next += 1;
        open.streams.insert(id, Stream { run, user_id, credential, word });
        Some(Followed { id, of: self.clone(), word: heard })
    }

    /// What is to be looked at, each once.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        let (mut runs, mut sessions, mut tokens) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for stream in self.open().streams.values() {
            runs.insert(stream.run);
            match stream.credential {
                Credential::Session(id) => sessions.insert(id),
                Credential::Token(id) => tokens.insert(id),
            };
        }
        let list = |set: BTreeSet<Uuid>| set.into_iter().collect();
        Wanted { runs: list(runs), sessions: list(sessions), tokens: list(tokens) }
    }

    /// Tells the streams of `runs`, which were looked at, how far they are: the last event of each that is there, and whether it has
    /// ended.
    pub fn tell(&self, looked_at: &[Uuid], runs: &BTreeMap<Uuid, (i32, bool)>) {
        for stream in self.open().streams.values().filter(|stream| looked_at.binary_search(&stream.run).is_ok()) {
            let now = runs.get(&stream.run).copied();
            stream.word.send_if_modified(|word| {
                let (last, ended) = now.unwrap_or((word.last, true));
                let changed = (word.last, word.ended) != (last, ended);
                (word.last, word.ended) = (last, ended);
                changed
            });
        }
    }

    /// Ends the streams opened with one of `wanted`'s sessions and tokens that is not among those that `stand`.
    pub fn end_revoked(&self, wanted: &Wanted, stand: &BTreeSet<Uuid>) {
        for stream in self.open().streams.values() {
            let (id, looked_at) = match stream.credential {
                Credential::Session(id) => (id, &wanted.sessions),
                Credential::Token(id) => (id, &wanted.tokens),
            };
            if looked_at.binary_search(&id).is_ok() && !stand.contains(&id) {
                stream.word.send_if_modified(|word| !std::mem::replace(&mut word.revoked, true));
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Followed {
    /// What was told last.
    pub fn word(&mut self) -> Word {
        *self.word.borrow_and_update()
    }

    /// Returns when something else was told since [`Self::word`].
    pub async fn news(&mut self) {
        // The sender is in the list for as long as this is.
        let _ = self.word.changed().await;
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.of.open().streams.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_bounded_for_all_and_for_each_user() {
        let streams = EventStreams::default();
        let run = Uuid::new_v4();
        let open = |user| streams.follow(run, user, Credential::Session(Uuid::from_u128(7)));
        let mut kept: Vec<Followed> = (0..USER_MAX).filter_map(|_| open(1)).collect();
        assert_eq!(kept.len(), USER_MAX);
        assert!(open(1).is_none());
        kept.extend((0..ALL_MAX as i64).filter_map(|number| open(2 + number / 20)));
        assert_eq!(kept.len(), ALL_MAX);
        assert!(open(1_000_000).is_none());
        kept.clear();
        assert!(open(1).is_some());
        assert_eq!(streams.wanted(), Wanted::default(), "a stream that is dropped is forgotten");
    }

    #[test]
    fn each_stream_hears_of_its_run_and_its_own_credential() {
        let streams = EventStreams::default();
        let ids: Vec<Uuid> = (1..=6).map(Uuid::from_u128).collect();
        let [one, other, session, second, token, late] = ids[..] else { panic!("six") };
        let mut first = streams.follow(one, 1, Credential::Session(session)).unwrap();
        let mut both = streams.follow(one, 1, Credential::Token(token)).unwrap();
        let mut gone = streams.follow(other, 2, Credential::Session(second)).unwrap();
        let wanted = streams.wanted();
        assert_eq!(wanted, Wanted { runs: vec![one, other], sessions: vec![session, second], tokens: vec![token] });
        // Opened after the look began: nothing is known of it yet.
        let mut after = streams.follow(late, 3, Credential::Session(late)).unwrap();
        streams.tell(&wanted.runs, &BTreeMap::from([(one, (4, false))]));
        streams.end_revoked(&wanted, &BTreeSet::from([session, token]));
        assert_eq!(first.word(), Word { last: 4, ended: false, revoked: false });
        assert_eq!(both.word(), Word { last: 4, ended: false, revoked: false });
        assert_eq!(gone.word(), Word { last: 0, ended: true, revoked: true });
        assert_eq!(after.word(), Word::default());
        streams.tell(&wanted.runs, &BTreeMap::from([(one, (4, false))]));
        assert!(!first.word.has_changed().unwrap(), "the same again wakes nobody");
        streams.end_revoked(&wanted, &BTreeSet::from([session]));
        assert!(both.word().revoked && !first.word().revoked);
    }
}
