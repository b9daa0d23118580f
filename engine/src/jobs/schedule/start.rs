//! Instants in request bodies.

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, NaiveTime, Timelike, Utc};
use serde_json::Value;

use super::{LAST_YEAR, floor_minute};
use crate::{
    error::{Error, Result},
    instants,
    time_zones::Zone,
};

/// An instant, and the wall-clock time it stands for, if one decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instant {
    /// The instant.
    pub at: DateTime<Utc>,
    /// What the wall clock shows then; another time where clocks are set ahead over this one.
    pub wall: Option<NaiveDateTime>,
}

impl Instant {
    /// The same without its seconds.
    pub(super) fn floored(self) -> Self {
        let minute = |wall: NaiveDateTime| wall.with_second(0).and_then(|wall| wall.with_nanosecond(0)).unwrap_or(wall);
        Self { at: floor_minute(self.at), wall: self.wall.map(minute) }
    }
}

impl From<DateTime<Utc>> for Instant {
    fn from(at: DateTime<Utc>) -> Self {
        Self { at, wall: None }
    }
}

/// Epoch seconds (a number, or text of at least nine digits) or ISO 8601 text; text without an offset is wall-clock time in
/// `zone`.
///
/// # Errors
/// 400 `code`, with its field.
pub(super) fn parse(value: &Value, zone: &Zone, code: &'static str, field: &str) -> Result<Option<Instant>> {
    let fault = || Error::field(code, field, "must be epoch seconds or ISO 8601 text between 1970 and 2100");
    let instant = match value {
        Value::Null => return Ok(None),
        Value::Number(number) => {
            let seconds = number.as_i64().or_else(|| {
                number.as_f64().filter(|n| n.is_finite() && n.abs() < 1e15).map(|n| {
                    #[expect(clippy::cast_possible_truncation, reason = "bounded above")]
                    let whole = n.floor() as i64;
                    whole
                })
            });
            seconds.and_then(instants::from_seconds).ok_or_else(fault)?.into()
        }
        Value::String(text) => parse_text(text.trim(), zone).ok_or_else(fault)?,
        _ => return Err(fault()),
    };
    if !(1970..=LAST_YEAR).contains(&instant.at.year()) {
        return Err(fault());
    }
    Ok(Some(instant))
}

fn parse_text(text: &str, zone: &Zone) -> Option<Instant> {
    if text.len() >= 9 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().and_then(instants::from_seconds).map(Instant::from);
    }
    if let Ok(at) = DateTime::parse_from_rfc3339(text) {
        return Some(at.with_timezone(&Utc).into());
    }
    for format in ["%Y-%m-%dT%H:%M%:z", "%Y-%m-%dT%H:%M:%S%.f%z", "%Y-%m-%d %H:%M:%S%.f%:z"] {
        if let Ok(at) = DateTime::parse_from_str(text, format) {
            return Some(at.with_timezone(&Utc).into());
        }
    }
    if let Some(wall) = text.strip_suffix('Z').and_then(|text| NaiveDateTime::parse_from_str(text, "%Y-%m-%dT%H:%M").ok()) {
        return Some(wall.and_utc().into());
    }
    let wall = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"]
        .iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        .or_else(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().map(|date| date.and_time(NaiveTime::MIN)))?;
    Some(Instant { at: zone.first_showing(wall)?, wall: Some(wall) })
}
