//! Cron expressions with their Unix meaning, by the wall clock of their zone.
//!
//! As in Debian's cron, where the minute or the hour field begins with `*`, a step included, the job is due at every instant whose
//! wall-clock time matches: in both passes of a time that comes twice, and not at all at a time that is skipped. Every other cron is
//! due once for each time it names: at the first pass of one that comes twice, at the first instant after the gap for one that is
//! skipped.
//!
//! Nothing is scanned by the minute: a search steps from field to field, and over changes of the clock.

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, NaiveTime, Timelike};

use super::{LAST_YEAR, start::Instant};
use crate::{
    error::{Error, Result},
    time_zones::Rules,
};

/// The longest expression read, in bytes.
const CRON_MAX: usize = 512;

/// A cron expression. Each field is a set of numbers, one bit each.
#[derive(Debug, Clone)]
pub(super) struct Cron {
    source: String,
    seconds: u64,
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// Sunday is 0.
    weekdays: u64,
    /// Day of month and day of week are both given: either matches.
    either: bool,
    /// Whether it is due at every instant that matches.
    every_match: bool,
}

/// One field: its name, its bounds and the names that stand for numbers, the first of which is `low`'s.
struct Field {
    name: &'static str,
    low: u32,
    high: u32,
    names: &'static [&'static str],
}

const SECOND: Field = Field { name: "second", low: 0, high: 59, names: &[] };
const MINUTE: Field = Field { name: "minute", low: 0, high: 59, names: &[] };
const HOUR: Field = Field { name: "hour", low: 0, high: 23, names: &[] };
const DAY: Field = Field { name: "day of month", low: 1, high: 31, names: &[] };
const MONTH: Field = Field {
    name: "month",
    low: 1,
    high: 12,
    names: &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
};
/// Unix: 0 and 7 are Sunday.
const WEEKDAY: Field = Field { name: "day of week", low: 0, high: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] };

impl Cron {
    /// Reads an expression of 5 fields, of 6 with seconds first, or one of the names as `@daily`.
    ///
    /// # Errors
    /// 400 `invalid_cron`, with the field that cannot be read.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let fault = |message: String| Error::field("invalid_cron", "schedule.cron", message);
        let source = text.trim();
        if source.len() > CRON_MAX {
            return Err(fault(format!("is longer than {CRON_MAX} characters")));
        }
        let expanded = match source {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            other => other,
        };
        let parts: Vec<&str> = expanded.split_ascii_whitespace().collect();
        let (second, rest) = match parts.as_slice() {
            [second, rest @ ..] if rest.len() == 5 => (*second, rest),
            rest if rest.len() == 5 => ("0", rest),
            other => return Err(fault(format!("must have 5 fields, or 6 with seconds first, not {}", other.len()))),
        };
        let [minute, hour, day, month, weekday] = rest else { return Err(fault("must have 5 or 6 fields".into())) };
        let set = |field: &Field, text: &str| field.set(text).map_err(|reason| fault(format!("{}: {reason}", field.name)));
        let weekdays = set(&WEEKDAY, weekday)?;
        Ok(Self {
            source: source.to_owned(),
            seconds: set(&SECOND, second)?,
            minutes: set(&MINUTE, minute)?,
            hours: set(&HOUR, hour)?,
            days: set(&DAY, day)?,
            months: set(&MONTH, month)?,
            weekdays: (weekdays | weekdays >> 7) & 0b111_1111,
            // As in Unix, a field that begins with a star does not count as given.
            either: !day.starts_with('*') && !weekday.starts_with('*'),
            every_match: minute.starts_with('*') || hour.starts_with('*'),
        })
    }

    /// The expression as it was given.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// The first due instant after `after` (seconds of the epoch).
    pub(super) fn after(&self, after: i64, rules: &Rules) -> Option<Instant> {
        if !self.every_match {
            let wall = self.wall_from(rules.latest_shown(after).checked_add(1)?)?;
            let at = DateTime::from_timestamp(rules.first_showing(wall.and_utc().timestamp()), 0)?;
            return Some(Instant { at, wall: Some(wall) });
        }
        let mut from = after.checked_add(1)?;
        loop {
            let (offset, end) = rules.stretch(from);
            let at = self.wall_from(from.checked_add(offset)?)?.and_utc().timestamp() - offset;
            if at < end {
                return Some(Instant { at: DateTime::from_timestamp(at, 0)?, wall: None });
            }
            from = end;
        }
    }

    /// The first wall-clock time from `wall` on (seconds of the epoch, as if in UTC) that the fields name.
    fn wall_from(&self, wall: i64) -> Option<NaiveDateTime> {
        let wall = DateTime::from_timestamp(wall, 0)?.naive_utc();
        let date = self.date_from(wall.date())?;
        if date == wall.date()
            && let Some(time) = self.time_from(wall.time())
        {
            return Some(date.and_time(time));
        }
        let date = if date == wall.date() { self.date_from(date.succ_opt()?)? } else { date };
        Some(date.and_time(self.time_from(NaiveTime::MIN)?))
    }

    fn time_from(&self, from: NaiveTime) -> Option<NaiveTime> {
        let (hour, minute, second) = (from.hour(), from.minute(), from.second());
        let (first_minute, first_second) = (self.minutes.trailing_zeros(), self.seconds.trailing_zeros());
        if has(self.hours, hour) {
            if has(self.minutes, minute)
                && let Some(second) = next(self.seconds, second)
            {
                return NaiveTime::from_hms_opt(hour, minute, second);
            }
            if let Some(minute) = next(self.minutes, minute + 1) {
                return NaiveTime::from_hms_opt(hour, minute, first_second);
            }
        }
        NaiveTime::from_hms_opt(next(self.hours, hour + 1)?, first_minute, first_second)
    }

    fn date_from(&self, from: NaiveDate) -> Option<NaiveDate> {
        let (mut year, mut month, mut day) = (from.year(), from.month(), from.day());
        // A year more than instants lie in, for zones behind UTC.
        while year <= LAST_YEAR + 1 {
            if has(self.months, month)
                && let Some(day) = next(self.days_of(NaiveDate::from_ymd_opt(year, month, 1)?), day)
            {
                return NaiveDate::from_ymd_opt(year, month, day);
            }
            (year, month, day) = match next(self.months, month + 1) {
                Some(month) => (year, month, 1),
                None => (year + 1, self.months.trailing_zeros(), 1),
            };
        }
        None
    }

    /// The days of a month that the fields name.
    fn days_of(&self, first: NaiveDate) -> u64 {
        let length = u32::from(first.num_days_in_month());
        let sunday = first.weekday().num_days_from_sunday();
        let by_weekday =
            (1..=length).filter(|day| has(self.weekdays, (day - 1 + sunday) % 7)).fold(0, |days, day| days | 1 << day);
        let all = (1 << (length + 1)) - 2;
        all & if self.either { self.days | by_weekday } else { self.days & by_weekday }
    }
}

fn has(set: u64, number: u32) -> bool {
    set >> number & 1 == 1
}

/// The first number of a set that is not below `from`, which is at most 60.
fn next(set: u64, from: u32) -> Option<u32> {
    let rest = set >> from << from;
    (rest != 0).then(|| rest.trailing_zeros())
}

impl Field {
    /// The numbers a field means: `*`, `a`, `a-b`, `x/n` and lists of them. A range of names may go over the end: `sat-sun`.
    fn set(&self, text: &str) -> Result<u64, String> {
        let mut numbers = 0;
        for item in text.split(',') {
            let (range, step) = match item.split_once('/') {
                None => (item, None),
                Some((range, step)) => {
                    let step: u32 = digits(step).ok_or_else(|| format!("'{step}' is not a step"))?;
                    if step == 0 || step > self.high {
                        return Err(format!("a step must be 1 to {}", self.high));
                    }
                    (range, Some(step))
                }
            };
            let (low, high) = if range == "*" {
                (self.low, if self.high == 7 { 6 } else { self.high })
            } else if let Some((low, high)) = range.split_once('-') {
                let named = self.named(low).is_some() || self.named(high).is_some();
                let (low, high) = (self.number(low)?, self.number(high)?);
                (low, if named && low > high { high + self.round() } else { high })
            } else {
                let low = self.number(range)?;
                (low, if step.is_some() { self.high } else { low })
            };
            if low > high {
                return Err(format!("'{range}' runs backwards"));
            }
            for number in (low..=high).step_by(step.unwrap_or(1) as usize) {
                numbers |= 1 << if number > self.high { number - self.round() } else { number };
            }
        }
        Ok(numbers)
    }

    /// After how many numbers the names come again.
    fn round(&self) -> u32 {
        u32::try_from(self.names.len()).unwrap_or(0)
    }

    fn named(&self, text: &str) -> Option<u32> {
        let index = self.names.iter().position(|name| name.eq_ignore_ascii_case(text))?;
        u32::try_from(index).ok().map(|index| index + self.low)
    }

    fn number(&self, text: &str) -> Result<u32, String> {
        self.named(text)
            .or_else(|| digits(text))
            .filter(|n| (self.low..=self.high).contains(n))
            .ok_or_else(|| format!("'{text}' is not a number from {} to {}", self.low, self.high))
    }
}

fn digits(text: &str) -> Option<u32> {
    if text.is_empty() || text.len() > 4 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}
