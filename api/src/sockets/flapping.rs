//! Sockets of one device that take each other's place again and again: two machines may have its identity.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use uuid::Uuid;

/// So many sockets of a device that take each other's place ...
const MANY: usize = 5;
/// ... within this time are two machines, or one with a very bad connection.
const WITHIN: Duration = Duration::from_secs(180);
/// How long that is not reported again.
const QUIET: Duration = Duration::from_secs(600);

/// Counts for each device how often one socket took the place of another, lately.
#[derive(Debug, Default)]
pub struct Flapping {
    devices: Mutex<Devices>,
}

#[derive(Debug, Default)]
struct Devices {
    known: HashMap<Uuid, Displaced>,
    /// How many there may be before old ones are removed.
    room: usize,
}

#[derive(Debug, Default)]
struct Displaced {
    at: Vec<Instant>,
    reported: Option<Instant>,
}

impl Displaced {
    /// Notes one more; whether that is to be reported.
    fn note(&mut self, now: Instant) -> bool {
        self.at.retain(|at| now.saturating_duration_since(*at) < WITHIN);
        self.at.push(now);
        let quiet = self.reported.is_some_and(|reported| now.saturating_duration_since(reported) < QUIET);
        let flapping = self.at.len() >= MANY && !quiet;
        if flapping {
            self.reported = Some(now);
        }
        flapping
    }

    fn is_old(&self, now: Instant) -> bool {
        let last = self.at.last().copied().max(self.reported);
        last.is_none_or(|last| now.saturating_duration_since(last) >= QUIET)
    }
}

impl Flapping {
    /// Notes that a socket of the device has taken the place of another; whether they do it so often that it is to be reported.
    pub fn displaced(&self, device: Uuid) -> bool {
        let now = Instant::now();
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if devices.known.len() >= devices.room {
            devices.known.retain(|_, one| !one.is_old(now));
            devices.room = (devices.known.len() * 2).max(1_000);
        }
        devices.known.entry(device).or_default().note(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_that_displace_each_other_are_reported_once_in_a_while() {
        let start = Instant::now();
        let reported = |step: u64, count: u64| -> usize {
            let mut displaced = Displaced::default();
            (0..count).filter(|index| displaced.note(start + Duration::from_secs(index * step))).count()
        };
        assert_eq!(reported(1, 4), 0);
        assert_eq!(reported(1, 5), 1);
        assert_eq!(reported(40, 20), 2, "again after ten minutes");
        assert_eq!(reported(46, 100), 0, "a connection that is lost every now and then");
    }
}
