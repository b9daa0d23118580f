//! How much memory the bodies of requests may hold at once. Each class of callers has room of its own, so that strangers take none
//! from operators and devices none from either, and nobody may hold more of it than a share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use borealis_engine::{Error, Kind};
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::access::Class;

/// Bodies and trees smaller than this are not counted, in bytes: there are never more of them than connections.
pub const NOT_COUNTED: usize = 16 * 1024;
/// How long a request waits for room.
const PATIENCE: Duration = Duration::from_secs(10);

const MIB: usize = 1024 * 1024;

/// Memory that is shared, counted in KiB.
#[derive(Debug)]
pub struct Room {
    total: Arc<Semaphore>,
    total_kib: u32,
    share_kib: u32,
    shares: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// Memory that is taken, until it is dropped.
#[derive(Debug)]
pub struct Held {
    room: Arc<Room>,
    holder: String,
    _share: OwnedSemaphorePermit,
    _total: OwnedSemaphorePermit,
}

impl Drop for Held {
    fn drop(&mut self) {
        // The permit of the share is about to go.
        self.room.forget(&self.holder, 2);
    }
}

impl Room {
    /// Room for `total` bytes, of which one holder has at most `share`.
    #[must_use]
    pub fn new(total: usize, share: usize) -> Arc<Self> {
        let (total_kib, share_kib) = (kib(total), kib(share.min(total)));
        let permits = usize::try_from(total_kib).unwrap_or(Semaphore::MAX_PERMITS);
        Arc::new(Self { total: Arc::new(Semaphore::new(permits)), total_kib, share_kib, shares: Mutex::default() })
    }

    /// Takes `bytes` for `holder`, waiting for its turn. More than a share is taken as a whole share.
    ///
    /// # Errors
    /// 503 `busy` when there is no room for ten seconds.
    pub async fn take(self: &Arc<Self>, holder: &str, bytes: usize) -> Result<Held, Error> {
        let kib = kib(bytes).clamp(1, self.share_kib.max(1));
        timeout(PATIENCE, self.acquire(holder, kib)).await.ok().and_then(Result::ok).ok_or_else(|| {
            self.forget(holder, 1);
            let seconds = rand::random_range(1..=5);
            Error::new(Kind::Unavailable, "busy", "Too many large requests are being worked on; try again.").retry_after(seconds)
        })
    }

    async fn acquire(self: &Arc<Self>, holder: &str, kib: u32) -> Result<Held, AcquireError> {
        let share = {
            let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
            let permits = usize::try_from(self.share_kib).unwrap_or(Semaphore::MAX_PERMITS);
            Arc::clone(shares.entry(holder.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(permits))))
        };
        let share = share.acquire_many_owned(kib).await?;
        let total = Arc::clone(&self.total).acquire_many_owned(kib).await?;
        Ok(Held { room: Arc::clone(self), holder: holder.to_owned(), _share: share, _total: total })
    }

    /// Forgets the share of `holder` when no more than `known` know it, the map included.
    fn forget(&self, holder: &str, known: usize) {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        if shares.get(holder).is_some_and(|share| Arc::strong_count(share) <= known) {
            shares.remove(holder);
        }
    }

    /// How many bytes are taken now.
    #[must_use]
    pub fn taken(&self) -> usize {
        usize::try_from(self.total_kib).unwrap_or(usize::MAX).saturating_sub(self.total.available_permits()).saturating_mul(1024)
    }
}

fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// The room of one class of callers.
#[derive(Debug, Clone)]
pub struct Rooms {
    /// For bodies while they are read and kept.
    pub bodies: Arc<Room>,
    /// For the trees that are built of them.
    pub trees: Arc<Room>,
}

/// The room of each class.
#[derive(Debug)]
pub struct RoomOfAll {
    anonymous: Rooms,
    devices: Rooms,
    operators: Rooms,
}

impl Default for RoomOfAll {
    fn default() -> Self {
        let rooms = |bodies: (usize, usize), trees: (usize, usize)| Rooms {
            bodies: Room::new(bodies.0 * MIB, bodies.1 * MIB),
            trees: Room::new(trees.0 * MIB, trees.1 * MIB),
        };
        Self { anonymous: rooms((16, 2), (16, 2)), devices: rooms((96, 32), (192, 80)), operators: rooms((96, 40), (128, 64)) }
    }
}

impl RoomOfAll {
    /// The room of a class.
    #[must_use]
    pub fn of(&self, class: Class) -> &Rooms {
        match class {
            Class::Anonymous => &self.anonymous,
            Class::Device => &self.devices,
            Class::Operator | Class::Admin => &self.operators,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_is_bounded_together_and_for_each() {
        let room = Room::new(100 * 1024, 60 * 1024);
        let first = room.take("a", 40 * 1024).await.unwrap();
        assert_eq!(room.take("a", 40 * 1024).await.unwrap_err().code, "busy", "more than a share");
        let second = room.take("b", 60 * 1024).await.unwrap();
        assert_eq!(room.taken(), 100 * 1024);
        assert_eq!(room.take("c", 1).await.unwrap_err().code, "busy", "more than there is");
        drop(first);
        assert!(room.take("c", 1).await.is_ok());
        drop(second);
        // Larger than a share: alone, and as one.
        assert!(room.take("a", 1 << 30).await.is_ok());
        assert_eq!((room.taken(), room.shares.lock().unwrap().len()), (0, 0), "everything is given back");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_let_in_when_there_is_room() {
        let room = Room::new(10 * 1024, 10 * 1024);
        let held = room.take("a", 10 * 1024).await.unwrap();
        let waiting = tokio::spawn({
            let room = Arc::clone(&room);
            async move { room.take("b", 5 * 1024).await.is_ok() }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        drop(held);
        assert!(waiting.await.unwrap());
    }
}
