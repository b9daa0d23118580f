//! Waiting between attempts: exponential with full jitter, so that agents cut together do not come back together.
//!
//! [`Reconnect`] is the policy of the agent's socket. It must bring a fleet back to a healthy engine within a minute or two
//! (99 % of 10,000 agents in 60 s, all in 120 s) and must not storm one that is not. Which of the two it has before it, an agent
//! reads from how the last connection ended ([`Ending`]):
//!
//! * A registered socket is the proof of a healthy engine, so its loss is answered soon: up to a second, more only if the socket
//!   was short-lived.
//! * Nobody there (refused, reset, no answer, a proxy's 502 or 504): the engine is being restarted, or is away. An attempt costs it nothing, and
//!   it cannot call anybody when it is back; so the waits grow to [`AWAY_CAP`] and no further. However long the engine
//!   was away, each agent knocks within that time of its return.
//! * The engine says when to come (`Retry-After`, `retry_after_ms`): that is waited out in full, then jitter up to
//!   [`LATER_CAP`]. A busy engine is thus in command of the pace, and what was a row of refusals before is forgotten.
//! * The engine refuses without such a hint: this agent, or this request, is not welcome, and another try will hardly change it.
//!   The waits grow to [`REFUSED_CAP`].

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
        let jitter = self.jitter(self.cap, random);
        match hint {
            Some(hint) => hint.min(self.cap) + jitter.min(self.base),
            None => jitter.max(FLOOR.min(self.cap)),
        }
    }

    /// [`Self::next`] with the thread's random numbers.
    pub fn wait(&mut self, hint: Option<Duration>) -> Duration {
        self.next(hint, up_to)
    }

    /// Counts a failure; a random time up to what its number allows, and up to `cap`.
    fn jitter(&mut self, cap: Duration, random: impl FnOnce(u64) -> u64) -> Duration {
        let factor = 2u32.checked_pow(self.failures).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_add(1);
        let ceiling = self.base.saturating_mul(factor).min(cap);
        let ceiling_ms = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(random(ceiling_ms).min(ceiling_ms))
    }
}

/// The longest wait for an engine that is away.
pub const AWAY_CAP: Duration = Duration::from_secs(20);
/// The most jitter on top of a hint: it parts those who were told the same, no more.
pub const LATER_CAP: Duration = Duration::from_secs(10);
/// As many failures as it takes to reach [`AWAY_CAP`]: a hint leaves no more behind, and refusals after it begin from here.
const AT_AWAY_CAP: u32 = AWAY_CAP.as_secs().next_power_of_two().ilog2();
/// The longest wait at all.
pub const REFUSED_CAP: Duration = Duration::from_secs(300);
/// The longest hint that is obeyed, so that with its jitter it is within [`REFUSED_CAP`].
const LONGEST_HINT: Duration = Duration::from_secs(REFUSED_CAP.as_secs() - LATER_CAP.as_secs());
/// A socket registered for this long was good. Shorter ones are no reason to forget all failures: an engine that throws
/// its agents out as soon as they are in, or two machines that are one device, would be stormed.
pub const GOOD_SOCKET: Duration = Duration::from_secs(5);
/// How many failures a socket leaves behind that was registered for less: the next wait is up to eight seconds.
const SHORT_SOCKET: u32 = 3;

/// How a connection of the agent ended, or why it did not come about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was registered for this long, then it was lost.
    Lost(Duration),
    /// The engine was not reached, or what answered in its place said that it is not there.
    Away,
    /// The engine has no time now and says when to come again.
    Later(Duration),
    /// The engine refused.
    Refused,
}

impl Ending {
    /// What an HTTP status in place of a socket or a token means, with the answer's `Retry-After`.
    #[must_use]
    pub const fn of_status(status: u16, retry_after: Option<Duration>) -> Self {
        match (retry_after, status) {
            (Some(hint), _) => Self::Later(hint),
            (None, 500..) => Self::Away,
            (None, _) => Self::Refused,
        }
    }

    /// What a refusal over the socket means, with its `retry_after_ms`.
    #[must_use]
    pub fn of_refusal(retry_after_ms: Option<u64>) -> Self {
        retry_after_ms.map_or(Self::Refused, |ms| Self::Later(Duration::from_millis(ms)))
    }
}

/// The waits between two connections of an agent.
#[derive(Debug, Clone)]
pub struct Reconnect {
    backoff: Backoff,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self::new()
    }
}

impl Reconnect {
    /// Before the first connection.
    #[must_use]
    pub const fn new() -> Self {
        Self { backoff: Backoff::new(Duration::from_secs(1), REFUSED_CAP) }
    }

    /// Failures in a row.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.backoff.failures()
    }

    /// How long to wait after such an ending. `random` gets a number of milliseconds and answers one in `0..=that`.
    pub fn next(&mut self, ending: Ending, random: impl FnOnce(u64) -> u64) -> Duration {
        match ending {
            Ending::Lost(lived) => {
                let failures = &mut self.backoff.failures;
                *failures = if lived >= GOOD_SOCKET { 0 } else { (*failures).min(SHORT_SOCKET) };
                self.backoff.jitter(AWAY_CAP, random).max(FLOOR)
            }
            Ending::Away => self.backoff.jitter(AWAY_CAP, random).max(FLOOR),
            Ending::Later(hint) => {
                let jitter = self.backoff.jitter(LATER_CAP, random);
                self.backoff.failures = self.backoff.failures.min(AT_AWAY_CAP);
                hint.max(FLOOR).min(LONGEST_HINT) + jitter
            }
            Ending::Refused => self.backoff.jitter(REFUSED_CAP, random).max(FLOOR),
        }
    }

    /// [`Self::next`] with the thread's random numbers.
    pub fn wait(&mut self, ending: Ending) -> Duration {
        self.next(ending, up_to)
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
        Backoff::new(Duration::from_secs(1), Duration::from_secs(300))
    }

    fn ceilings(reconnect: &mut Reconnect, ending: Ending, count: usize) -> Vec<u64> {
        (0..count).map(|_| reconnect.next(ending, |max| max).as_secs()).collect()
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

    #[test]
    fn an_engine_that_is_away_is_asked_every_twenty_seconds_however_long_it_was_away() {
        let mut reconnect = Reconnect::new();
        assert_eq!(ceilings(&mut reconnect, Ending::Away, 8), [1, 2, 4, 8, 16, 20, 20, 20]);
        assert_eq!(reconnect.next(Ending::Away, |_| 0), FLOOR, "over the whole range");
        // The engine is back, and restarts once more after a while.
        assert_eq!(ceilings(&mut reconnect, Ending::Lost(GOOD_SOCKET), 1), [1]);
    }

    #[test]
    fn a_socket_that_did_not_last_slows_down_a_little() {
        let mut reconnect = Reconnect::new();
        assert_eq!(ceilings(&mut reconnect, Ending::Lost(Duration::ZERO), 6), [1, 2, 4, 8, 8, 8]);
        assert_eq!(ceilings(&mut reconnect, Ending::Away, 2), [16, 20]);
        assert_eq!(ceilings(&mut reconnect, Ending::Lost(Duration::ZERO), 1), [8], "it was let in: whatever came before is over");
    }

    #[test]
    fn a_refusal_waits_up_to_five_minutes_and_a_hint_ends_that() {
        let mut reconnect = Reconnect::new();
        assert_eq!(ceilings(&mut reconnect, Ending::Refused, 11), [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        let hint = Ending::Later(Duration::from_secs(7));
        assert_eq!(reconnect.next(hint, |_| 0), Duration::from_secs(7), "never earlier than asked");
        assert_eq!(reconnect.next(hint, |max| max), Duration::from_secs(7) + LATER_CAP);
        assert_eq!(ceilings(&mut reconnect, Ending::Refused, 1), [32]);
        let beyond = reconnect.next(Ending::Later(Duration::from_secs(86_400)), |max| max);
        assert_eq!(beyond, REFUSED_CAP, "nobody sends an agent away for a day");
    }

    #[test]
    fn answers_are_read_as_what_they_mean() {
        let hint = Some(Duration::from_secs(3));
        assert_eq!(Ending::of_status(503, hint), Ending::Later(Duration::from_secs(3)));
        assert_eq!(Ending::of_status(429, hint), Ending::Later(Duration::from_secs(3)));
        for status in [500, 502, 503, 504] {
            assert_eq!(Ending::of_status(status, None), Ending::Away, "{status} of a proxy, most likely");
        }
        for status in [400, 401, 403, 404, 429] {
            assert_eq!(Ending::of_status(status, None), Ending::Refused, "{status}");
        }
        assert_eq!(Ending::of_refusal(Some(1500)), Ending::Later(Duration::from_millis(1500)));
        assert_eq!(Ending::of_refusal(None), Ending::Refused);
    }
}
