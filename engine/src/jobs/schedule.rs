//! The schedule model: which instants a job is due.
//!
//! Three families, by what stays fixed when clocks change:
//!
//! * *instants* (`immediately`, `once`): one occurrence;
//! * *intervals* (`every_5_minutes` ... `every_hour`, and crons whose hour field is `*` or `*/n` with n a divisor of
//!   24 below it): fixed distances in absolute time, so a change of clocks neither repeats nor loses an instant;
//! * *wall times* (`daily` ... `yearly`, all other crons): the clock on the wall in [`Schedule::timezone`]. A time that
//!   a spring change skips is the first valid instant after the gap; a time an autumn change repeats is its first pass.
//!
//! The n-th occurrence is always counted from the anchor, never from the one before, so a 31st stays a 31st. All
//! searches are arithmetic or bounded: an `after` that is centuries away costs the same as one that is near.

use std::{fmt, str::FromStr};

use chrono::{
    DateTime, Datelike, Days, Duration, FixedOffset, LocalResult, Months, NaiveDate, NaiveDateTime, NaiveTime, Offset, TimeZone,
    Utc,
};
use chrono_tz::{GapInfo, Tz};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// The last year an occurrence can lie in; time-zone data and the cron search end there.
const LAST_YEAR: i32 = 2100;
/// The most instants one preview answers.
pub const PREVIEW_MAX: usize = 100;

/// The schedule types; the same set is a CHECK of `scheduled_jobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScheduleType {
    /// Once, as soon as it is saved.
    Immediately,
    /// Once, at `start`.
    Once,
    /// Every 5 minutes from `start`.
    Every5Minutes,
    /// Every 10 minutes from `start`.
    Every10Minutes,
    /// Every 15 minutes from `start`.
    Every15Minutes,
    /// Every 30 minutes from `start`.
    Every30Minutes,
    /// Every hour from `start`.
    EveryHour,
    /// Every day at the wall time of `start`.
    Daily,
    /// Every seventh day at the wall time of `start`.
    Weekly,
    /// Every month on the day of `start`, or the month's last day when it is shorter.
    Monthly,
    /// Every year on the date of `start`; February 29 becomes February 28 in common years.
    Yearly,
    /// By a cron expression.
    Cron,
}

impl ScheduleType {
    /// Every type, in the order of the contract.
    pub const ALL: [Self; 12] = [
        Self::Immediately,
        Self::Once,
        Self::Every5Minutes,
        Self::Every10Minutes,
        Self::Every15Minutes,
        Self::Every30Minutes,
        Self::EveryHour,
        Self::Daily,
        Self::Weekly,
        Self::Monthly,
        Self::Yearly,
        Self::Cron,
    ];

    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Immediately => "immediately",
            Self::Once => "once",
            Self::Every5Minutes => "every_5_minutes",
            Self::Every10Minutes => "every_10_minutes",
            Self::Every15Minutes => "every_15_minutes",
            Self::Every30Minutes => "every_30_minutes",
            Self::EveryHour => "every_hour",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
            Self::Cron => "cron",
        }
    }

    /// Whether it has at most one occurrence.
    #[must_use]
    pub fn is_one_shot(self) -> bool {
        matches!(self, Self::Immediately | Self::Once)
    }

    /// The fixed distance of the sub-day types, in seconds.
    fn interval_s(self) -> Option<i64> {
        Some(match self {
            Self::Every5Minutes => 300,
            Self::Every10Minutes => 600,
            Self::Every15Minutes => 900,
            Self::Every30Minutes => 1800,
            Self::EveryHour => 3600,
            _ => return None,
        })
    }
}

impl FromStr for ScheduleType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.as_str()).collect();
            Error::field("invalid_schedule_type", "schedule.type", format!("must be one of {}", known.join(", ")))
        })
    }
}

/// The schedule of a request body, not yet checked: `schedule: {type, start, timezone, cron, end, max_occurrences}`, or
/// the same collected from the flat reference forms. `start` and `end` are epoch seconds or ISO 8601 text.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleInput {
    /// One of [`ScheduleType::ALL`]; absent: `immediately`.
    #[serde(rename = "type")]
    pub kind: Value,
    /// The anchor. Needed by every type but `immediately` and `cron`.
    pub start: Value,
    /// IANA name; absent: `UTC`.
    pub timezone: Value,
    /// The expression of type `cron`, 5 or 6 fields.
    pub cron: Value,
    /// No occurrence after this instant.
    pub end: Value,
    /// No more occurrences than this, manual ones not counted.
    pub max_occurrences: Value,
}

/// The columns of `scheduled_jobs` a schedule is made of.
#[derive(Debug, Clone)]
pub struct ScheduleRow {
    /// `schedule_type`.
    pub schedule_type: String,
    /// `start_at`.
    pub start_at: Option<DateTime<Utc>>,
    /// `start_wall`: what the clock on the wall showed in the text of `start`, where a gap moved it.
    pub start_wall: Option<NaiveDateTime>,
    /// `timezone`.
    pub timezone: String,
    /// `cron`.
    pub cron: Option<String>,
    /// `end_at`.
    pub end_at: Option<DateTime<Utc>>,
    /// `max_occurrences`.
    pub max_occurrences: Option<i64>,
    /// `created_at`: the anchor of schedules without a start.
    pub created_at: DateTime<Utc>,
}

/// A checked schedule.
#[derive(Debug, Clone)]
pub struct Schedule {
    kind: ScheduleType,
    start: Option<DateTime<Utc>>,
    start_wall: Option<NaiveDateTime>,
    timezone: Tz,
    cron: Option<Cron>,
    end: Option<DateTime<Utc>>,
    max_occurrences: Option<i64>,
    /// Instant of occurrence 0: `start`, else when the job was made.
    anchor: DateTime<Utc>,
}

impl Schedule {
    /// Checks the schedule of a request body. `now` anchors a schedule without a start.
    ///
    /// # Errors
    /// 400 `invalid_schedule_type`, `start_required`, `invalid_start`, `invalid_timezone`, `invalid_cron`,
    /// `invalid_end`, `invalid_max_occurrences`, each with its field.
    pub fn parse(input: &ScheduleInput, now: DateTime<Utc>) -> Result<Self> {
        let kind = match &input.kind {
            Value::Null => ScheduleType::Immediately,
            Value::String(text) => text.trim().parse()?,
            _ => return Err(Error::field("invalid_schedule_type", "schedule.type", "must be text")),
        };
        let timezone = match &input.timezone {
            Value::Null => Tz::UTC,
            Value::String(text) => parse_timezone(text)?,
            _ => return Err(Error::field("invalid_timezone", "schedule.timezone", "must be the name of an IANA time zone")),
        };
        let start = parse_instant(&input.start, timezone, "invalid_start", "schedule.start")?;
        if start.is_none() && !matches!(kind, ScheduleType::Immediately | ScheduleType::Cron) {
            return Err(Error::field("start_required", "schedule.start", format!("type {} needs a start", kind.as_str())));
        }
        let cron = match (&input.cron, kind) {
            (Value::Null, ScheduleType::Cron) => {
                return Err(Error::field("invalid_cron", "schedule.cron", "type cron needs an expression"));
            }
            (Value::Null, _) => None,
            (Value::String(text), ScheduleType::Cron) => Some(Cron::parse(text)?),
            (Value::String(text), _) if text.trim().is_empty() => None,
            (Value::String(_), _) => {
                return Err(Error::field("invalid_cron", "schedule.cron", "goes with type cron only"));
            }
            _ => return Err(Error::field("invalid_cron", "schedule.cron", "must be text")),
        };
        let end = parse_instant(&input.end, timezone, "invalid_end", "schedule.end")?.map(|(instant, _)| instant);
        let max_occurrences = match &input.max_occurrences {
            Value::Null => None,
            value => Some(value.as_i64().filter(|n| (1..=1_000_000_000).contains(n)).ok_or_else(|| {
                Error::field("invalid_max_occurrences", "schedule.max_occurrences", "must be a whole number from 1 to 1000000000")
            })?),
        };
        let schedule = Self::build(kind, start, timezone, cron, end, max_occurrences, now);
        if let (Some((start, _)), Some(end)) = (start, end)
            && end < start
        {
            return Err(Error::field("invalid_end", "schedule.end", "lies before the start"));
        }
        let unbounded = Self { end: None, ..schedule.clone() };
        if kind == ScheduleType::Cron && unbounded.at_or_after(unbounded.anchor).is_none() {
            return Err(Error::field("invalid_cron", "schedule.cron", "never fires: no date fits it"));
        }
        if end.is_some() && schedule.first(now).is_none() && unbounded.first(now).is_some() {
            return Err(Error::field("invalid_end", "schedule.end", "leaves no occurrence"));
        }
        Ok(schedule)
    }

    /// The schedule of a stored job.
    ///
    /// # Errors
    /// A fault of ours when a stored value cannot be read.
    pub fn from_row(row: &ScheduleRow) -> Result<Self> {
        let kind: ScheduleType = row.schedule_type.parse().map_err(|error: Error| Error::bug(error.message))?;
        let timezone = parse_timezone(&row.timezone).map_err(|error| Error::bug(error.message))?;
        let cron = match (kind, &row.cron) {
            (ScheduleType::Cron, Some(text)) => Some(Cron::parse(text).map_err(|error| Error::bug(error.message))?),
            (ScheduleType::Cron, None) => return Err(Error::bug("a cron schedule without an expression")),
            _ => None,
        };
        let start = row.start_at.map(|at| (at, row.start_wall));
        Ok(Self::build(kind, start, timezone, cron, row.end_at, row.max_occurrences, row.created_at))
    }

    fn build(
        kind: ScheduleType,
        start: Option<(DateTime<Utc>, Option<NaiveDateTime>)>,
        timezone: Tz,
        cron: Option<Cron>,
        end: Option<DateTime<Utc>>,
        max_occurrences: Option<i64>,
        now: DateTime<Utc>,
    ) -> Self {
        let floor = kind != ScheduleType::Cron;
        let start_wall = start.and_then(|(_, wall)| wall);
        let start = start.map(|(at, _)| if floor { floor_minute(at) } else { at });
        let anchor = start.unwrap_or(if floor { floor_minute(now) } else { now });
        Self { kind, start, start_wall, timezone, cron, end, max_occurrences, anchor }
    }

    /// The same, anchored at `created_at` when it has no start of its own: as the stored job reads it.
    #[must_use]
    pub fn anchored(self, created_at: DateTime<Utc>) -> Self {
        let start = self.start.map(|at| (at, self.start_wall));
        Self::build(self.kind, start, self.timezone, self.cron, self.end, self.max_occurrences, created_at)
    }

    /// Whether both have the same parts, whenever they were saved.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        (self.kind, self.start, self.start_wall, self.timezone, self.cron(), self.end, self.max_occurrences)
            == (other.kind, other.start, other.start_wall, other.timezone, other.cron(), other.end, other.max_occurrences)
    }

    /// The type.
    #[must_use]
    pub fn kind(&self) -> ScheduleType {
        self.kind
    }

    /// The start, as saved: floored to the minute except for type `cron`.
    #[must_use]
    pub fn start(&self) -> Option<DateTime<Utc>> {
        self.start
    }

    /// The wall time of a start that fell into a gap; null for any other.
    #[must_use]
    pub fn start_wall(&self) -> Option<NaiveDateTime> {
        self.start_wall
    }

    /// The zone whose wall time counts.
    #[must_use]
    pub fn timezone(&self) -> Tz {
        self.timezone
    }

    /// The cron expression, as given.
    #[must_use]
    pub fn cron(&self) -> Option<&str> {
        self.cron.as_ref().map(|cron| cron.source.as_str())
    }

    /// No occurrence after this instant.
    #[must_use]
    pub fn end(&self) -> Option<DateTime<Utc>> {
        self.end
    }

    /// No more occurrences than this.
    #[must_use]
    pub fn max_occurrences(&self) -> Option<i64> {
        self.max_occurrences
    }

    /// How many occurrences are left when `used` have been fired, skipped or missed; `None`: no bound.
    #[must_use]
    pub fn remaining(&self, used: i64) -> Option<i64> {
        self.max_occurrences.map(|max| (max - used).max(0))
    }

    /// The first due instant of a job whose schedule is saved at `now`: the first instant that is not past. `once` with a
    /// past start and `immediately` are due at once. An anchor in the present minute counts as not past, as reference
    /// types have no seconds. `max_occurrences` is not looked at.
    #[must_use]
    pub fn first(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let minute = floor_minute(now);
        let first = match self.kind {
            ScheduleType::Immediately => Some(minute),
            ScheduleType::Once => Some(self.anchor.max(minute)),
            ScheduleType::Cron => self.at_or_after(now),
            _ if self.anchor >= minute => Some(self.anchor),
            _ => self.at_or_after(now),
        }?;
        self.within_end(first)
    }

    /// The first instant strictly after `after`, `end` respected; `None`: there is none. `max_occurrences` is applied by
    /// the cursor, with [`Schedule::remaining`].
    #[must_use]
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let next = match self.kind {
            ScheduleType::Immediately | ScheduleType::Once => Some(self.anchor).filter(|anchor| *anchor > after),
            ScheduleType::Cron => self.cron_after(after),
            _ if self.anchor > after => Some(self.anchor),
            kind => match kind.interval_s() {
                Some(interval_s) => {
                    let passed = (after - self.anchor).num_seconds().div_euclid(interval_s);
                    self.anchor.checked_add_signed(Duration::seconds(interval_s.checked_mul(passed.checked_add(1)?)?))
                }
                None => self.wall_after(after),
            },
        }?;
        self.within_end(next)
    }

    /// The first `count` instants as a job saved at `from` would have them, `end` and `max_occurrences` respected.
    #[must_use]
    pub fn preview(&self, from: DateTime<Utc>, count: usize) -> Vec<DateTime<Utc>> {
        let bound = self.max_occurrences.and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
        let step = |at: &DateTime<Utc>| if self.kind.is_one_shot() { None } else { self.next_after(*at) };
        std::iter::successors(self.first(from), step).take(count.min(PREVIEW_MAX).min(bound)).collect()
    }

    /// The distance from the first occurrence to the second, in whole minutes rounded up, as [`Expiration`]: what a
    /// recurring job's pending runs live by default. One-shot schedules: no expiry.
    #[must_use]
    pub fn default_expiration(&self) -> Expiration {
        if self.kind.is_one_shot() {
            return Expiration::Never;
        }
        let unbounded = Self { end: None, ..self.clone() };
        let Some(first) = unbounded.at_or_after(self.anchor) else { return Expiration::Never };
        let Some(second) = unbounded.next_after(first) else { return Expiration::Never };
        let seconds = (second - first).num_seconds();
        Expiration::After(Duration::minutes(seconds.div_euclid(60) + i64::from(seconds.rem_euclid(60) > 0)))
    }

    fn within_end(&self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        (at.year() <= LAST_YEAR && self.end.is_none_or(|end| at <= end)).then_some(at)
    }

    fn at_or_after(&self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.next_after(at - Duration::nanoseconds(1))
    }

    /// Wall-time types, n >= 1: `after` is not before the anchor. The estimate from the calendar distance is at most
    /// two occurrences early, whatever the zone did in between.
    fn wall_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let anchor = self.start_wall.unwrap_or_else(|| self.anchor.with_timezone(&self.timezone).naive_local());
        let local = after.with_timezone(&self.timezone).naive_local();
        let days = (local.date() - anchor.date()).num_days();
        let months = i64::from(local.year() - anchor.year()) * 12 + i64::from(local.month()) - i64::from(anchor.month());
        let passed = match self.kind {
            ScheduleType::Daily => days,
            ScheduleType::Weekly => days.div_euclid(7),
            ScheduleType::Monthly => months,
            _ => months.div_euclid(12),
        };
        let from = (passed - 2).max(1);
        (from..from + 8).find_map(|n| {
            let instant = resolve(self.timezone, self.nth_wall(anchor, n)?)?;
            (instant > after).then_some(instant)
        })
    }

    /// The wall time of occurrence `n`, counted from the anchor.
    fn nth_wall(&self, anchor: NaiveDateTime, n: i64) -> Option<NaiveDateTime> {
        let n = u64::try_from(n).ok()?;
        match self.kind {
            ScheduleType::Daily => anchor.checked_add_days(Days::new(n)),
            ScheduleType::Weekly => anchor.checked_add_days(Days::new(n.checked_mul(7)?)),
            ScheduleType::Monthly => anchor.checked_add_months(Months::new(u32::try_from(n).ok()?)),
            _ => anchor.checked_add_months(Months::new(u32::try_from(n.checked_mul(12)?).ok()?)),
        }
    }

    fn cron_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let cron = self.cron.as_ref()?;
        // Nothing comes before the start.
        let after = self.start.map_or(after, |start| after.max(start - Duration::nanoseconds(1)));
        if cron.interval {
            let offset = self.timezone.offset_from_utc_datetime(&self.anchor.naive_utc()).fix();
            cron.interval_after(after, offset, self.timezone)
        } else {
            cron.wall_after(after, self.timezone)
        }
    }
}

/// A cron expression with its Unix meaning, searched by the `cron` crate in naive time.
#[derive(Debug, Clone)]
struct Cron {
    source: String,
    /// Day of month and day of week both given: either matches, so there are two.
    whole: Vec<cron::Schedule>,
    /// The time of day alone, on every day.
    time: cron::Schedule,
    /// The days alone, at midnight.
    days: Vec<cron::Schedule>,
    /// Whether the hours are `*` or divide the day evenly: fixed distances in absolute time.
    interval: bool,
    /// Whether minutes or seconds are stepped within given hours: then both passes of a repeated hour count.
    stepped: bool,
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
const WEEKDAY: Field = Field { name: "day of week", low: 0, high: 7, names: &["sun", "mon", "tue", "wed", "thu", "fri", "sat"] };

/// The longest expression read, in bytes.
const CRON_MAX: usize = 512;

impl Cron {
    fn parse(text: &str) -> Result<Self> {
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
        let seconds = set(&SECOND, second)?;
        let minutes = set(&MINUTE, minute)?;
        let hours = set(&HOUR, hour)?;
        let days = set(&DAY, day)?;
        let months = set(&MONTH, month)?;
        // Unix: 0 and 7 are Sunday. The crate: 1 is Sunday, 7 is Saturday.
        let weekdays = set(&WEEKDAY, weekday)?.into_iter().map(|n| n % 7 + 1).collect::<std::collections::BTreeSet<_>>();
        let weekdays: Vec<u32> = weekdays.into_iter().collect();

        let list = |numbers: &[u32], full: usize| {
            if numbers.len() == full { "*".to_owned() } else { numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",") }
        };
        let (seconds, minutes, months) = (list(&seconds, 60), list(&minutes, 60), list(&months, 12));
        let (hour_list, day_list, weekday_list) = (list(&hours, 24), list(&days, 31), list(&weekdays, 7));
        // As in Unix, a field that begins with a star does not count as given.
        let either = !day.starts_with('*') && !weekday.starts_with('*');
        let pairs = if either {
            vec![(day_list.as_str(), "*"), ("*", weekday_list.as_str())]
        } else {
            vec![(day_list.as_str(), weekday_list.as_str())]
        };
        let build =
            |expression: String| cron::Schedule::from_str(&expression).map_err(|error| fault(format!("cannot be read: {error}")));
        let mut whole = Vec::new();
        let mut only_days = Vec::new();
        for (day, weekday) in pairs {
            whole.push(build(format!("{seconds} {minutes} {hour_list} {day} {months} {weekday} *"))?);
            only_days.push(build(format!("0 0 0 {day} {months} {weekday} *"))?);
        }
        let step = |text: &str| text.strip_prefix("*/").and_then(|n| n.parse::<u32>().ok());
        Ok(Self {
            source: source.to_owned(),
            whole,
            time: build(format!("{seconds} {minutes} {hour_list} * * * *"))?,
            days: only_days,
            interval: *hour == "*" || step(hour).is_some_and(|n| n < 24 && 24 % n == 0),
            stepped: minute.starts_with('*') || second.starts_with('*'),
        })
    }

    /// Wall time: each naive match once, at the instant it resolves to.
    fn wall_after(&self, after: DateTime<Utc>, zone: Tz) -> Option<DateTime<Utc>> {
        let local = after.with_timezone(&zone).naive_local();
        let mut naive = local;
        // A naive match resolves to no more than `after` only in the second pass of a repeated stretch, so the number of
        // tries is bounded by the matches in that stretch.
        let first = loop {
            naive = next_naive(&self.whole, naive)?;
            match resolve(zone, naive) {
                Some(instant) if instant > after => break instant,
                _ => {}
            }
        };
        let near = Duration::hours(3);
        if !self.stepped || offset_s(zone, after - near) == offset_s(zone, after + near) {
            return Some(first);
        }
        let mut best = first;
        let mut again = local - near;
        while let Some(next) = next_naive(&self.whole, again).filter(|next| *next <= naive) {
            if let LocalResult::Ambiguous(one, two) = zone.from_local_datetime(&next) {
                let late = one.max(two).with_timezone(&Utc);
                if late > after {
                    best = best.min(late);
                }
            }
            again = next;
        }
        Some(best)
    }

    /// Fixed distances: the time of day is read with the offset of the anchor, the date with the true one.
    fn interval_after(&self, after: DateTime<Utc>, offset: FixedOffset, zone: Tz) -> Option<DateTime<Utc>> {
        let mut after = after;
        // Each round jumps to a later date; a date has no match only where the zone skipped it.
        for _ in 0..400 {
            let naive = next_naive(std::slice::from_ref(&self.time), after.with_timezone(&offset).naive_local())?;
            let instant = offset.from_local_datetime(&naive).single()?.with_timezone(&Utc);
            let date = instant.with_timezone(&zone).date_naive();
            let fits = next_naive(&self.days, date.and_time(NaiveTime::MIN) - Duration::seconds(1))?.date();
            if fits == date {
                return Some(instant);
            }
            after = resolve(zone, fits.and_time(NaiveTime::MIN))? - Duration::nanoseconds(1);
        }
        None
    }
}

impl Field {
    /// The numbers a field means: `*`, `a`, `a-b`, `x/n` and lists of them.
    fn set(&self, text: &str) -> Result<Vec<u32>, String> {
        let mut numbers = std::collections::BTreeSet::new();
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
                (self.number(low)?, self.number(high)?)
            } else {
                let low = self.number(range)?;
                (low, if step.is_some() { self.high } else { low })
            };
            if low > high {
                return Err(format!("'{range}' runs backwards"));
            }
            numbers.extend((low..=high).step_by(step.unwrap_or(1) as usize));
        }
        Ok(numbers.into_iter().collect())
    }

    fn number(&self, text: &str) -> Result<u32, String> {
        let named = self.names.iter().position(|name| name.eq_ignore_ascii_case(text));
        let number = match named {
            Some(index) => u32::try_from(index).map(|index| index + self.low).ok(),
            None => digits(text),
        };
        number
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

/// The first naive time strictly after `after` that one of `schedules` has.
fn next_naive(schedules: &[cron::Schedule], after: NaiveDateTime) -> Option<NaiveDateTime> {
    let after = after.and_utc();
    schedules.iter().filter_map(|schedule| schedule.after(&after).next()).min().map(|next| next.naive_utc())
}

fn offset_s(zone: Tz, at: DateTime<Utc>) -> i32 {
    zone.offset_from_utc_datetime(&at.naive_utc()).fix().local_minus_utc()
}

/// The instant at which a wall shows `naive`: its first pass when it shows it twice, the first valid instant after the
/// gap when never.
fn resolve(zone: Tz, naive: NaiveDateTime) -> Option<DateTime<Utc>> {
    match zone.from_local_datetime(&naive) {
        LocalResult::Single(at) => Some(at.with_timezone(&Utc)),
        LocalResult::Ambiguous(one, two) => Some(one.min(two).with_timezone(&Utc)),
        LocalResult::None => GapInfo::new(&naive, &zone)?.end.map(|end| end.with_timezone(&Utc)),
    }
}

/// `at` without its seconds.
#[must_use]
pub fn floor_minute(at: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp(at.timestamp().div_euclid(60) * 60, 0).unwrap_or(at)
}

fn parse_timezone(text: &str) -> Result<Tz> {
    text.trim().parse().map_err(|_| {
        Error::field("invalid_timezone", "schedule.timezone", format!("'{}' is not the name of an IANA time zone", short(text)))
    })
}

/// The first characters of a client's text, for a message.
pub(super) fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(60).collect()
}

/// An instant, and the wall time it was written as where a gap moved it.
type Moved = (DateTime<Utc>, Option<NaiveDateTime>);

/// Epoch seconds (a number, or text of at least nine digits) or ISO 8601 text; text without an offset is wall time in
/// `zone`.
fn parse_instant(value: &Value, zone: Tz, code: &'static str, field: &str) -> Result<Option<Moved>> {
    let fault = || Error::field(code, field, "must be epoch seconds or ISO 8601 text between 1970 and 2100");
    let moved = match value {
        Value::Null => return Ok(None),
        Value::Number(number) => {
            let seconds = number.as_i64().or_else(|| {
                number.as_f64().filter(|n| n.is_finite() && n.abs() < 1e15).map(|n| {
                    #[expect(clippy::cast_possible_truncation, reason = "bounded above")]
                    let whole = n.floor() as i64;
                    whole
                })
            });
            (seconds.and_then(|s| DateTime::from_timestamp(s, 0)).ok_or_else(fault)?, None)
        }
        Value::String(text) => parse_instant_text(text.trim(), zone).ok_or_else(fault)?,
        _ => return Err(fault()),
    };
    if !(1970..=LAST_YEAR).contains(&moved.0.year()) {
        return Err(fault());
    }
    Ok(Some(moved))
}

fn parse_instant_text(text: &str, zone: Tz) -> Option<Moved> {
    if text.len() >= 9 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().and_then(|s| DateTime::from_timestamp(s, 0)).map(|at| (at, None));
    }
    if let Ok(at) = DateTime::parse_from_rfc3339(text) {
        return Some((at.with_timezone(&Utc), None));
    }
    for format in ["%Y-%m-%dT%H:%M%:z", "%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%d %H:%M:%S%.f%:z"] {
        if let Ok(at) = DateTime::parse_from_str(text, format) {
            return Some((at.with_timezone(&Utc), None));
        }
    }
    if let Some(naive) = text.strip_suffix('Z').and_then(|text| NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M").ok()) {
        return Some((naive.and_utc(), None));
    }
    let naive = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"]
        .iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        .or_else(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().map(|date| date.and_time(NaiveTime::MIN)))?;
    let in_gap = matches!(zone.from_local_datetime(&naive), LocalResult::None);
    Some((resolve(zone, naive)?, in_gap.then_some(naive)))
}

/// What happens to instants that passed while no scheduler ran; the same set is a CHECK of `scheduled_jobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MisfirePolicy {
    /// None of them runs.
    Skip,
    /// The newest runs, the others are recorded as missed.
    #[default]
    RunOnce,
    /// The newest ten run, the others are recorded as missed.
    RunAll,
}

impl MisfirePolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Skip, Self::RunOnce, Self::RunAll];

    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::RunOnce => "run_once",
            Self::RunAll => "run_all",
        }
    }

    /// How many missed instants run.
    #[must_use]
    pub fn catch_up(self) -> usize {
        match self {
            Self::Skip => 0,
            Self::RunOnce => 1,
            Self::RunAll => 10,
        }
    }
}

impl FromStr for MisfirePolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| Error::field("invalid_misfire_policy", "misfire_policy", "must be one of skip, run_once, run_all"))
    }
}

/// What happens when an instant comes while the occurrence before it is not finished; the same set is a CHECK of
/// `scheduled_jobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OverlapPolicy {
    /// It is recorded as skipped.
    #[default]
    Skip,
    /// It runs when the one before it has finished.
    Queue,
    /// It runs beside it.
    Allow,
}

impl OverlapPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Skip, Self::Queue, Self::Allow];

    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::Queue => "queue",
            Self::Allow => "allow",
        }
    }
}

impl FromStr for OverlapPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| Error::field("invalid_overlap_policy", "overlap_policy", "must be one of skip, queue, allow"))
    }
}

/// A span after which something ends: `no_expire`, or `<n>m`, `<n>h`, `<n>d`, a bare number being minutes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiration {
    /// `no_expire`.
    Never,
    /// After this long; whole minutes, at least one, at most ten years.
    After(Duration),
}

impl Expiration {
    /// The span; `None`: no end.
    #[must_use]
    pub fn duration(self) -> Option<Duration> {
        match self {
            Self::Never => None,
            Self::After(duration) => Some(duration),
        }
    }

    /// When something that began at `at` ends; `None`: never.
    #[must_use]
    pub fn from(self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        at.checked_add_signed(self.duration()?)
    }

    fn read(text: &str) -> Option<Self> {
        const TEN_YEARS_MINUTES: i64 = 10 * 366 * 24 * 60;
        if text == "no_expire" {
            return Some(Self::Never);
        }
        let (number, minutes) = [("m", 1), ("h", 60), ("d", 24 * 60)]
            .into_iter()
            .find_map(|(unit, minutes)| Some((text.strip_suffix(unit)?, minutes)))
            .unwrap_or((text, 1));
        if number.is_empty() || number.len() > 9 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let total = number.parse::<i64>().ok()?.checked_mul(minutes)?;
        (1..=TEN_YEARS_MINUTES).contains(&total).then(|| Self::After(Duration::minutes(total)))
    }

    /// Reads a JSON value of field `name`.
    ///
    /// # Errors
    /// 400 `invalid_expiration` or the given `code`.
    pub fn parse(value: &Value, code: &'static str, name: &str) -> Result<Self> {
        let fault = || Error::field(code, name, "must be no_expire, or a number with m, h or d (a bare number is minutes)");
        match value {
            Value::Number(number) => Self::read(&number.to_string()).ok_or_else(fault),
            Value::String(text) => Self::read(text.trim()).ok_or_else(fault),
            _ => Err(fault()),
        }
    }
}

impl FromStr for Expiration {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::read(text)
            .ok_or_else(|| Error::field("invalid_expiration", "expiration", "must be no_expire, or a number with m, h or d"))
    }
}

impl fmt::Display for Expiration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("no_expire"),
            Self::After(duration) => match duration.num_minutes() {
                minutes if minutes % 1440 == 0 => write!(f, "{}d", minutes / 1440),
                minutes if minutes % 60 == 0 => write!(f, "{}h", minutes / 60),
                minutes => write!(f, "{minutes}m"),
            },
        }
    }
}

#[cfg(test)]
mod tests;
