//! What happens to instants that were missed or come too soon, and when what they started ends.

use std::{fmt, str::FromStr};

use chrono::{DateTime, Duration, Utc};
use serde_json::Value;
use strum::VariantArray as _;

use crate::error::{Error, Result};

/// What happens to instants that passed while no scheduler ran; the same set is a CHECK of `scheduled_jobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
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
    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
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
        Self::VARIANTS
            .iter()
            .copied()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| Error::field("invalid_misfire_policy", "misfire_policy", "must be one of skip, run_once, run_all"))
    }
}

/// What happens when an instant comes while the occurrence before it is not finished; the same set is a CHECK of
/// `scheduled_jobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
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
    /// The text stored and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl FromStr for OverlapPolicy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::VARIANTS
            .iter()
            .copied()
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
