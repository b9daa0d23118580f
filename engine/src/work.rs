//! Work that takes the processor for long (parsing, hashing and rewriting of scripts and documents), kept off the threads that
//! serve sockets and outside transactions.
//!
//! All of it shares one bounded pool for each process: at most [`slots`] pieces are worked on at once, so that no flood of large
//! documents leaves the other threads without a processor, and at most [`QUEUE_MAX`] wait. What comes beyond is refused with
//! 503 `busy`.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::Semaphore;

use crate::error::{Error, Kind, Result};

/// Up to this many bytes are worked on where the caller is: less than a millisecond, and less than a change of threads is worth.
pub const INLINE_MAX: usize = 16 * 1024;
/// The most pieces of work that wait for a slot.
pub const QUEUE_MAX: usize = 256;
/// When a caller that was refused may try again, in seconds.
const AGAIN_S: u64 = 2;

static POOL: LazyLock<Pool> = LazyLock::new(|| Pool::new(slots(), QUEUE_MAX));

/// How many pieces are worked on at once: all processors of the machine but one, at least one.
#[must_use]
pub fn slots() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).saturating_sub(1).max(1)
}

/// Does `work` on a thread of its own, when its turn has come. A caller that goes away in between gives its turn back; work that has
/// begun goes on and keeps its slot until it ends.
///
/// # Errors
/// 503 `busy` when too much waits already; a bug when `work` panics.
pub async fn heavy<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    POOL.run(work).await
}

/// Does `work` over so many `bytes`: here when they are few, and else as [`heavy`] does.
///
/// # Errors
/// As [`heavy`].
pub async fn sized<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    if bytes <= INLINE_MAX { Ok(work()) } else { heavy(work).await }
}

#[derive(Debug)]
struct Pool {
    slots: Arc<Semaphore>,
    waiting: AtomicUsize,
    queue_max: usize,
}

/// One that waits; it stops counting when it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    fn new(slots: usize, queue_max: usize) -> Self {
        Self { slots: Arc::new(Semaphore::new(slots)), waiting: AtomicUsize::new(0), queue_max }
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let slot = match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => {
                let ahead = self.waiting.fetch_add(1, Ordering::AcqRel);
                let _waiting = Waiting(&self.waiting);
                if ahead >= self.queue_max {
                    let busy = "The engine is busy with large documents; try again.";
                    return Err(Error::new(Kind::Unavailable, "busy", busy).retry_after(AGAIN_S));
                }
                Arc::clone(&self.slots).acquire_owned().await.map_err(Error::bug)?
            }
        };
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(slot);
            done
        });
        done.await.map_err(Error::bug)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_pool_has_so_many_slots_and_a_bounded_queue() {
        let pool = Arc::new(Pool::new(1, 1));
        let (finish, wait) = mpsc::channel::<()>();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let first = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move {
                pool.run(move || {
                    let _ = begun.send(());
                    wait.recv().is_ok()
                })
                .await
            }
        });
        has_begun.await.unwrap();
        let second = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(|| 2).await }
        });
        while pool.waiting.load(Ordering::Acquire) == 0 {
            tokio::task::yield_now().await;
        }
        let refused = pool.run(|| 3).await.unwrap_err();
        assert_eq!((refused.code, refused.is_transient()), ("busy", true));
        finish.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        assert_eq!(second.await.unwrap().unwrap(), 2);
        assert_eq!(pool.run(|| 4).await.unwrap(), 4, "the queue is empty again");
    }

    #[tokio::test]
    async fn who_goes_away_gives_the_turn_back_and_a_panic_the_slot() {
        let pool = Arc::new(Pool::new(1, 1));
        let slot = Arc::clone(&pool.slots).acquire_owned().await.unwrap();
        let gone = tokio::time::timeout(std::time::Duration::from_millis(1), pool.run(|| 1)).await;
        assert!(gone.is_err());
        assert_eq!(pool.waiting.load(Ordering::Acquire), 0);
        drop(slot);
        assert_eq!(pool.run::<()>(|| panic!("in a test")).await.unwrap_err().kind, Kind::Bug);
        assert_eq!(pool.run(|| 2).await.unwrap(), 2);
    }
}
