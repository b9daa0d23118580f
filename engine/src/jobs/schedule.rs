//! The schedule model: which instants a job is due.
//!
//! Three families, by what stays fixed when clocks change:
//!
//! * *instants* (`immediately`, `once`): one occurrence;
//! * *intervals* (`every_5_minutes` ... `every_hour`): fixed distances in absolute time, so a change of clocks neither repeats nor
//!   loses an instant;
//! * *wall-clock times* (`daily` ... `yearly` and [crons](cron)): what the wall clock shows in [`Schedule::timezone`]. `daily` and longer
//!   take the first valid instant after a gap for a time that a spring change skips, and the first pass of a time that an autumn change
//!   repeats.
//!
//! The n-th occurrence is always counted from the anchor, never from the one before, so a 31st stays a 31st. All
//! searches are arithmetic or bounded: an `after` that is centuries away costs the same as one that is near.

mod cron;
mod policy;
mod start;

use std::str::FromStr;

use chrono::{DateTime, Datelike, Days, Duration, Months, NaiveDateTime, Utc};
use serde::Deserialize;
use serde_json::Value;
use strum::VariantArray as _;

pub use self::policy::{Expiration, MisfirePolicy, OverlapPolicy};
use self::{cron::Cron, start::Instant};
use crate::{
    error::{Error, Result},
    time_zones::Zone,
};

/// The last year an occurrence can lie in; time-zone data and the cron search end there.
const LAST_YEAR: i32 = 2100;
/// The most instants one preview answers.
pub const PREVIEW_MAX: usize = 100;

/// The schedule types; the same set is a CHECK of `scheduled_jobs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ScheduleType {
    /// Once, as soon as it is saved.
    Immediately,
    /// Once, at `start`.
    Once,
    /// Every 5 minutes from `start`.
    #[strum(serialize = "every_5_minutes")]
    Every5Minutes,
    /// Every 10 minutes from `start`.
    #[strum(serialize = "every_10_minutes")]
    Every10Minutes,
    /// Every 15 minutes from `start`.
    #[strum(serialize = "every_15_minutes")]
    Every15Minutes,
    /// Every 30 minutes from `start`.
    #[strum(serialize = "every_30_minutes")]
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
    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Whether it has at most one occurrence.
    #[must_use]
    pub fn is_one_shot(self) -> bool {
        matches!(self, Self::Immediately | Self::Once)
    }

    /// Whether it is due at the wall-clock time of its start.
    fn is_wall_time(self) -> bool {
        matches!(self, Self::Daily | Self::Weekly | Self::Monthly | Self::Yearly)
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
        Self::VARIANTS.iter().copied().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Self::VARIANTS.iter().map(|kind| kind.as_str()).collect();
            Error::field("invalid_schedule_type", "schedule.type", format!("must be one of {}", known.join(", ")))
        })
    }
}

/// The schedule of a request body, not yet checked: `schedule: {type, start, timezone, cron, end, max_occurrences}`, or
/// the same collected from the flat reference forms. `start` and `end` are epoch seconds or ISO 8601 text.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleInput {
    /// One of the names of [`ScheduleType`]; absent: `immediately`.
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
    /// `start_wall`: the wall-clock time the start stands for, as in [`Schedule::start_wall`].
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
    timezone: Zone,
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
            Value::Null => Zone::utc(),
            Value::String(text) => parse_timezone(text)?,
            _ => return Err(Error::field("invalid_timezone", "schedule.timezone", "must be the name of an IANA time zone")),
        };
        let start = start::parse(&input.start, &timezone, "invalid_start", "schedule.start")?;
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
        let end = start::parse(&input.end, &timezone, "invalid_end", "schedule.end")?.map(|end| end.at);
        let max_occurrences = match &input.max_occurrences {
            Value::Null => None,
            value => Some(value.as_i64().filter(|n| (1..=1_000_000_000).contains(n)).ok_or_else(|| {
                Error::field("invalid_max_occurrences", "schedule.max_occurrences", "must be a whole number from 1 to 1000000000")
            })?),
        };
        let schedule = Self::build(kind, start, timezone, cron, end, max_occurrences, now);
        if let (Some(start), Some(end)) = (schedule.start, end)
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
        let start = row.start_at.map(|at| Instant { at, wall: row.start_wall });
        Ok(Self::build(kind, start, timezone, cron, row.end_at, row.max_occurrences, row.created_at))
    }

    fn build(
        kind: ScheduleType,
        start: Option<Instant>,
        timezone: Zone,
        cron: Option<Cron>,
        end: Option<DateTime<Utc>>,
        max_occurrences: Option<i64>,
        now: DateTime<Utc>,
    ) -> Self {
        let floor = kind != ScheduleType::Cron;
        let start = start.map(|start| if floor { start.floored() } else { start });
        let start_wall = start.and_then(|start| start.wall.or_else(|| kind.is_wall_time().then(|| timezone.wall(start.at))));
        let start = start.map(|start| start_wall.and_then(|wall| showing(&timezone, wall, start.at)).unwrap_or(start.at));
        let anchor = start.unwrap_or(if floor { floor_minute(now) } else { now });
        Self { kind, start, start_wall, timezone, cron, end, max_occurrences, anchor }
    }

    /// The same, anchored at `created_at` when it has no start of its own: as the stored job reads it.
    #[must_use]
    pub fn anchored(self, created_at: DateTime<Utc>) -> Self {
        let start = self.start.map(|at| Instant { at, wall: self.start_wall });
        Self::build(self.kind, start, self.timezone, self.cron, self.end, self.max_occurrences, created_at)
    }

    /// Whether both have the same parts, whenever they were saved.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        let parts = |of: &Self| (of.kind, of.start, of.start_wall, of.end, of.max_occurrences);
        parts(self) == parts(other) && self.timezone.name() == other.timezone.name() && self.cron() == other.cron()
    }

    /// The same. A start that is the instant of `before`, in the same zone, keeps the wall-clock time it had there: clients write
    /// back as an instant what they were given as one.
    #[must_use]
    pub fn keeping_wall_of(mut self, before: &Self) -> Self {
        if self.start == before.start && self.kind == before.kind && self.timezone.name() == before.timezone.name() {
            self.start_wall = before.start_wall.or(self.start_wall);
        }
        self
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

    /// The wall-clock time the start stands for, where there is one: it was written without an offset, or the type goes by the wall
    /// clock. It stays when the rules of the zone change, and the instant follows.
    #[must_use]
    pub fn start_wall(&self) -> Option<NaiveDateTime> {
        self.start_wall
    }

    /// The zone whose wall clock counts.
    #[must_use]
    pub fn timezone(&self) -> &Zone {
        &self.timezone
    }

    /// The cron expression, as given.
    #[must_use]
    pub fn cron(&self) -> Option<&str> {
        self.cron.as_ref().map(Cron::source)
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
        self.within_end(self.due_after(after)?.at)
    }

    /// The wall-clock time that the due instant `at` stands for. `None` where none decides the instant: for intervals, for crons that
    /// fire whenever their fields match, and for instants the schedule does not have.
    #[must_use]
    pub fn wall_of(&self, at: DateTime<Utc>) -> Option<NaiveDateTime> {
        self.due_after(at - Duration::nanoseconds(1)).filter(|due| due.at == at)?.wall
    }

    /// Where the cursor of a stored job belongs by the present rules of its zone: `next` with the wall-clock time `wall` it stood for
    /// when it was stored. `None`: nothing more will come.
    #[must_use]
    pub fn follow(&self, next: DateTime<Utc>, wall: Option<NaiveDateTime>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let followed = match wall {
            Some(wall) => showing(&self.timezone, wall, next).unwrap_or(next),
            None if self.kind.is_one_shot() || self.at_or_after(next) == Some(next) => next,
            None => self.next_after(now)?,
        };
        self.within_end(followed)
    }

    fn due_after(&self, after: DateTime<Utc>) -> Option<Instant> {
        let anchor = Instant { at: self.anchor, wall: self.start_wall };
        match self.kind {
            ScheduleType::Immediately | ScheduleType::Once => Some(anchor).filter(|anchor| anchor.at > after),
            ScheduleType::Cron => self.cron_after(after),
            _ if self.anchor > after => Some(anchor),
            kind => match kind.interval_s() {
                Some(interval_s) => {
                    let passed = (after - self.anchor).num_seconds().div_euclid(interval_s);
                    let distance = Duration::try_seconds(interval_s.checked_mul(passed.checked_add(1)?)?)?;
                    Some(Instant { at: self.anchor.checked_add_signed(distance)?, wall: None })
                }
                None => self.wall_after(after),
            },
        }
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
    fn wall_after(&self, after: DateTime<Utc>) -> Option<Instant> {
        let anchor = self.start_wall.unwrap_or_else(|| self.timezone.wall(self.anchor));
        let local = self.timezone.wall(after);
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
            let wall = self.nth_wall(anchor, n)?;
            let at = self.timezone.first_showing(wall)?;
            (at > after).then_some(Instant { at, wall: Some(wall) })
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

    fn cron_after(&self, after: DateTime<Utc>) -> Option<Instant> {
        // Nothing comes before the start.
        let after = self.start.map_or(after, |start| after.max(start - Duration::nanoseconds(1)));
        self.cron.as_ref()?.after(after.timestamp(), self.timezone.rules())
    }
}

/// `at` if the wall clock of the zone shows `wall` then, else the first instant at which it does.
fn showing(zone: &Zone, wall: NaiveDateTime, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
    if zone.wall(at) == wall { Some(at) } else { zone.first_showing(wall) }
}

/// `at` without its seconds.
#[must_use]
pub fn floor_minute(at: DateTime<Utc>) -> DateTime<Utc> {
    DateTime::from_timestamp(at.timestamp().div_euclid(60) * 60, 0).unwrap_or(at)
}

fn parse_timezone(text: &str) -> Result<Zone> {
    Zone::named(text.trim()).ok_or_else(|| {
        Error::field("invalid_timezone", "schedule.timezone", format!("'{}' is not the name of an IANA time zone", short(text)))
    })
}

/// The first characters of a client's text, for a message.
pub(super) fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(60).collect()
}

#[cfg(test)]
mod tests;
