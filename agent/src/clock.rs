//! The engine's time as far as the agent knows it, so that a wrong clock of the machine hurts nobody.

use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The engine's clock: read from the `Date` of its answers and carried on by the monotonic clock.
#[derive(Debug, Default)]
pub(crate) struct ServerClock {
    seen: Mutex<Option<(i64, Instant)>>,
}

impl ServerClock {
    /// Takes the `Date` header of an answer.
    pub(crate) fn observe(&self, date: &str) {
        if let Ok(time) = chrono::DateTime::parse_from_rfc2822(date)
            && let Ok(mut seen) = self.seen.lock()
        {
            *seen = Some((time.timestamp(), Instant::now()));
        }
    }

    /// Epoch seconds by the engine's clock; by the machine's while the engine said nothing.
    pub(crate) fn now(&self) -> i64 {
        let seen = self.seen.lock().ok().and_then(|seen| *seen);
        seen.map_or_else(local_now, |(then, at)| then.saturating_add(i64::try_from(at.elapsed().as_secs()).unwrap_or(i64::MAX)))
    }
}

/// Epoch seconds by the machine's clock.
pub(crate) fn local_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_time_wins() {
        let clock = ServerClock::default();
        assert!((clock.now() - local_now()).abs() <= 1);
        clock.observe("not a date");
        assert!((clock.now() - local_now()).abs() <= 1);
        clock.observe("Sun, 06 Nov 1994 08:49:37 GMT");
        assert!((784_111_777..784_111_780).contains(&clock.now()));
    }
}
