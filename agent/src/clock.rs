//! The engine's time as far as the agent knows it, so that a machine whose clock is off by days can still be worked with.
//!
//! Nobody signs that time. So it never decides alone: a job is late by the machine's own clock as well, with more to spare, and what
//! jobs are remembered for how long is judged by the machine's clock only.

use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use borealis_protocol::envelope::CLOCK_LEEWAY_SECONDS;

/// Seconds a job may be late by the clock of the machine, which may be wrong.
const MACHINE_LEEWAY_SECONDS: i64 = 7 * 86_400;

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

    /// Whether a job that may be begun until `not_after` (epoch seconds) is late: by the engine's clock, or by the machine's.
    pub(crate) fn is_past(&self, not_after: i64) -> bool {
        not_after.saturating_add(CLOCK_LEEWAY_SECONDS) < self.now()
            || not_after.saturating_add(MACHINE_LEEWAY_SECONDS) < local_now()
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
    #[test]
    fn neither_clock_makes_an_old_job_fresh() {
        let clock = ServerClock::default();
        let now = local_now();
        let date = |seconds: i64| chrono::DateTime::from_timestamp(now + seconds, 0).unwrap().to_rfc2822();
        assert!(!clock.is_past(now - CLOCK_LEEWAY_SECONDS + 60) && clock.is_past(now - CLOCK_LEEWAY_SECONDS - 60));
        // The engine's time was set back: only so far does it count.
        clock.observe(&date(-40 * 86_400));
        assert!(!clock.is_past(now - MACHINE_LEEWAY_SECONDS + 60) && clock.is_past(now - MACHINE_LEEWAY_SECONDS - 60));
        clock.observe(&date(86_400));
        assert!(clock.is_past(now + 3600));
    }
}
