//! What the wall clock of a zone shows: stretches of time with one distance from UTC each, from 1970 to 2100.
//!
//! Instants are seconds of the epoch; wall-clock times are seconds of the epoch as if the zone were UTC.

use jiff::{Timestamp, tz::TimeZone};

/// 1969-12-29 and 2101-01-03, in seconds of the epoch: before and after, the nearest stretch counts.
const FROM_S: i64 = -3 * 86_400;
const UNTIL_S: i64 = 4_134_067_200;
/// Where the first stretch begins and the last one ends. Far enough from the ends of `i64` to be added to.
const EVER_S: i64 = i64::MAX / 4;

/// A stretch of time with one distance from UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    /// Its first second.
    from_s: i64,
    /// What the wall clock is ahead of UTC.
    offset_s: i64,
    /// The latest wall-clock second shown before it.
    shown_s: i64,
}

/// The rules of a zone.
#[derive(Debug, PartialEq, Eq)]
pub struct Rules {
    /// In their order; never empty, and the first one begins before everything.
    stretches: Vec<Stretch>,
}

impl Rules {
    /// One distance from UTC at all times.
    #[must_use]
    pub fn fixed(offset_s: i64) -> Self {
        Self { stretches: vec![Stretch { from_s: -EVER_S, offset_s, shown_s: -EVER_S }] }
    }

    /// The rules of a zone as its file has them; `None` when its offsets cannot be read.
    #[must_use]
    pub fn of(zone: &TimeZone) -> Option<Self> {
        let first = Timestamp::from_second(FROM_S).ok()?;
        let mut rules = Self::fixed(zone.to_offset(first).seconds().into());
        for change in zone.following(first) {
            let at = change.timestamp().as_second();
            if at > UNTIL_S {
                break;
            }
            rules.change(at, change.offset().seconds().into());
        }
        Some(rules)
    }

    fn change(&mut self, from_s: i64, offset_s: i64) {
        let Some(last) = self.stretches.last().copied().filter(|last| last.offset_s != offset_s) else { return };
        let shown_s = last.shown_s.max(from_s - 1 + last.offset_s);
        self.stretches.push(Stretch { from_s, offset_s, shown_s });
    }

    fn at(&self, index: usize) -> Stretch {
        self.stretches.get(index).copied().unwrap_or(Stretch { from_s: -EVER_S, offset_s: 0, shown_s: -EVER_S })
    }

    /// The stretch an instant lies in: what the wall clock is ahead of UTC, and the first second after the stretch.
    #[must_use]
    pub fn stretch(&self, at_s: i64) -> (i64, i64) {
        let index = self.stretches.partition_point(|stretch| stretch.from_s <= at_s).saturating_sub(1);
        let end = self.stretches.get(index + 1).map_or(EVER_S, |next| next.from_s);
        (self.at(index).offset_s, end)
    }

    /// What the wall clock shows at an instant.
    #[must_use]
    pub fn wall(&self, at_s: i64) -> i64 {
        at_s + self.stretch(at_s).0
    }

    /// The latest wall-clock time shown up to an instant, the instant included. Later than [`Rules::wall`] while clocks that
    /// were set back show a time for the second time.
    #[must_use]
    pub fn latest_shown(&self, at_s: i64) -> i64 {
        let index = self.stretches.partition_point(|stretch| stretch.from_s <= at_s).saturating_sub(1);
        let stretch = self.at(index);
        stretch.shown_s.max(at_s + stretch.offset_s)
    }

    /// The first instant at which the wall clock shows this time, or a later one when it never shows it.
    #[must_use]
    pub fn first_showing(&self, wall_s: i64) -> i64 {
        // The last stretch before which the wall clock has not come so far.
        let index = self.stretches.partition_point(|stretch| stretch.shown_s < wall_s).saturating_sub(1);
        let stretch = self.at(index);
        stretch.from_s.max(wall_s - stretch.offset_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_folds() {
        // An hour is skipped at 1,000,000 and comes twice at 2,000,000.
        let mut rules = Rules::fixed(3600);
        rules.change(1_000_000, 7200);
        rules.change(1_500_000, 7200);
        rules.change(2_000_000, 3600);
        assert_eq!(rules.stretches.len(), 3, "a change of nothing is none");
        assert_eq!(rules.wall(999_999), 1_003_599);
        assert_eq!(rules.wall(1_000_000), 1_007_200);
        assert_eq!(rules.first_showing(1_003_599), 999_999);
        for skipped in [1_003_600, 1_005_000, 1_007_199, 1_007_200] {
            assert_eq!(rules.first_showing(skipped), 1_000_000);
        }
        assert_eq!(rules.first_showing(1_007_201), 1_000_001);
        assert_eq!(rules.first_showing(2_007_199), 1_999_999);
        assert_eq!(rules.wall(2_000_000), 2_003_600, "shown before, at 1,996,400");
        assert_eq!(rules.first_showing(2_003_600), 1_996_400);
        assert_eq!(rules.first_showing(2_007_200), 2_003_600);
        assert_eq!(rules.latest_shown(2_000_000), 2_007_199);
        assert_eq!(rules.latest_shown(2_003_600), 2_007_200);
        assert_eq!(rules.stretch(2_000_000), (3600, EVER_S));
        assert_eq!((rules.wall(-5_000_000), rules.first_showing(-5_000_000)), (-4_996_400, -5_003_600));
    }
}
