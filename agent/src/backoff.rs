//! Waiting between attempts: exponential with full jitter, so that agents cut together do not come back together.

use std::time::Duration;

/// Never wait less than this, or an error that comes at once would spin.
const FLOOR: Duration = Duration::from_millis(100);

/// The state of one row of attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// A socket that lived this long was good: the next wait starts small again.
    pub const GOOD_SOCKET: Duration = Duration::from_secs(60);

    /// The waits between two sockets: up to a second after the first failure, five minutes at most.
    #[must_use]
    pub const fn of_sockets() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(300))
    }

    /// Waits up to `base` after the first failure and twice as long after each further one, up to `cap`.
    #[must_use]
    pub const fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }

    /// Failures since the last [`Self::reset`].
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// The next attempt may come soon again.
    pub const fn reset(&mut self) {
        self.failures = 0;
    }

    /// Counts a failure and says how long to wait. `random` gets a number of milliseconds and answers one in `0..=that`.
    /// A `hint` of the server is waited out in full, and jitter of the usual size comes on top.
    pub fn next(&mut self, hint: Option<Duration>, random: impl FnOnce(u64) -> u64) -> Duration {
        let factor = 2u32.checked_pow(self.failures).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_add(1);
        let ceiling = self.base.saturating_mul(factor).min(self.cap);
        let ceiling_ms = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX);
        let jitter = Duration::from_millis(random(ceiling_ms).min(ceiling_ms));
        match hint {
            Some(hint) => hint.min(self.cap) + jitter.min(self.base),
            None => jitter.max(FLOOR.min(self.cap)),
        }
    }

    /// [`Self::next`] with the thread's random numbers.
    pub fn wait(&mut self, hint: Option<Duration>) -> Duration {
        self.next(hint, up_to)
    }
}

/// A random number in `0..=max`.
pub(crate) fn up_to(max: u64) -> u64 {
    rand::random_range(0..=max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn backoff() -> Backoff {
        Backoff::of_sockets()
    }

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let mut backoff = backoff();
        let ceilings: Vec<u64> = (0..11).map(|_| backoff.next(None, |max| max).as_secs()).collect();
        assert_eq!(ceilings, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        for _ in 0..100 {
            assert_eq!(backoff.next(None, |max| max).as_secs(), 300, "and never overflows");
        }
        backoff.reset();
        assert_eq!(backoff.next(None, |max| max).as_secs(), 1);
    }

    #[test]
    fn jitter_takes_the_whole_range_above_the_floor() {
        let mut backoff = backoff();
        assert_eq!(backoff.next(None, |_| 0), FLOOR);
        assert_eq!(backoff.next(None, |max| max / 2), Duration::from_secs(1));
        assert_eq!(backoff.next(None, |_| u64::MAX), Duration::from_secs(4), "a bad source stays in bounds");
        for _ in 0..1000 {
            assert!(backoff.wait(None) <= Duration::from_secs(300));
        }
    }

    #[test]
    fn a_hint_is_waited_out_within_the_cap() {
        let mut backoff = backoff();
        assert_eq!(backoff.next(Some(Duration::from_secs(10)), |_| 0), Duration::from_secs(10));
        assert_eq!(backoff.next(Some(Duration::from_secs(10)), |max| max), Duration::from_secs(11));
        assert!(backoff.next(Some(Duration::from_secs(86_400)), |max| max) <= Duration::from_secs(301));
    }
}
