//! Instants that come as numbers: a number from outside becomes a time here, or is refused.

use chrono::{DateTime, Utc};

/// The last second that is taken: the end of the year 9999. Postgres and what reads our answers know no later one, or not all of them do.
const LAST: i64 = 253_402_300_799;

/// The instant `seconds` after 1970; none before 1970 and after the year 9999.
#[must_use]
pub fn from_seconds(seconds: i64) -> Option<DateTime<Utc>> {
    (0..=LAST).contains(&seconds).then(|| DateTime::from_timestamp(seconds, 0)).flatten()
}

/// The instant `micros` microseconds after 1970; none before 1970 and after the year 9999.
#[must_use]
pub fn from_micros(micros: i64) -> Option<DateTime<Utc>> {
    (0..=LAST * 1_000_000).contains(&micros).then(|| DateTime::from_timestamp_micros(micros)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_of_years_with_four_digits() {
        assert_eq!(from_seconds(LAST).unwrap().to_rfc3339(), "9999-12-31T23:59:59+00:00");
        assert_eq!(from_seconds(0), from_micros(0));
        assert_eq!(from_seconds(7), from_micros(7_000_000));
        for outside in [i64::MIN, -1, LAST + 1, 99_999_999_999_999, i64::MAX] {
            assert_eq!(from_seconds(outside), None, "{outside}");
        }
        for outside in [i64::MIN, -1, (LAST + 1) * 1_000_000, i64::MAX] {
            assert_eq!(from_micros(outside), None, "{outside}");
        }
    }
}
