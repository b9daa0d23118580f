//! Time zones: what their wall clocks show, by rules that can be updated without a build.
//!
//! The rules come from a folder of compiled zones (TZif, RFC 9636), as the system has it in `/usr/share/zoneinfo`, or from the copy
//! built into the program, whichever is newer; `BOREALIS_ZONEINFO` names another folder. [`refresh`] looks at them again, so an
//! update of the system's package reaches a running process.

mod data;
mod rules;

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use chrono::{DateTime, NaiveDateTime, Utc};

pub use self::{
    data::{Data, OLD_AFTER_DAYS, Source},
    rules::Rules,
};
use crate::error::Result;

/// A time zone: its IANA name and its rules, as they were when it was looked up.
#[derive(Clone)]
pub struct Zone {
    name: Arc<str>,
    rules: Arc<Rules>,
}

impl Zone {
    /// UTC.
    #[must_use]
    pub fn utc() -> Self {
        Self { name: "UTC".into(), rules: Arc::new(Rules::fixed(0)) }
    }

    /// The zone of an IANA name, in the present rules. `None`: there is none.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        current().zone(name)
    }

    /// Its IANA name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its rules.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// What the wall clock shows.
    #[must_use]
    pub fn wall(&self, at: DateTime<Utc>) -> NaiveDateTime {
        let offset_s = self.rules.stretch(at.timestamp()).0;
        at.naive_utc().checked_add_signed(chrono::Duration::seconds(offset_s)).unwrap_or_else(|| at.naive_utc())
    }

    /// The first instant at which the wall clock shows `wall`. When it never shows it, because clocks are set ahead over it: the
    /// first instant after that change. `None` far outside of all calendars.
    #[must_use]
    pub fn first_showing(&self, wall: NaiveDateTime) -> Option<DateTime<Utc>> {
        let wall = wall.and_utc();
        let at_s = self.rules.first_showing(wall.timestamp());
        let shown = self.rules.wall(at_s) == wall.timestamp();
        DateTime::from_timestamp(at_s, if shown { wall.timestamp_subsec_nanos() } else { 0 })
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The rules in use, and the folder that was asked for.
static CURRENT: RwLock<(Option<Arc<Data>>, Option<PathBuf>)> = RwLock::new((None, None));

/// The rules in use.
#[must_use]
pub fn current() -> Arc<Data> {
    if let (Some(data), _) = &*CURRENT.read().unwrap_or_else(PoisonError::into_inner) {
        return Arc::clone(data);
    }
    let mut current = CURRENT.write().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(current.0.get_or_insert_with(|| Arc::new(Data::newest())))
}

/// Uses `folder` from now on, or without one the newest rules of this machine, and answers what is used. Says so in the log.
///
/// # Errors
/// `invalid_setting` naming `BOREALIS_ZONEINFO` when the folder has no zones.
pub fn load(folder: Option<PathBuf>) -> Result<Arc<Data>> {
    let data = Arc::new(Data::choose(folder.as_deref())?);
    data.log();
    *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = (Some(Arc::clone(&data)), folder);
    Ok(data)
}

/// Reads the rules again. Answers whether they are of another version or place than before. A folder that has gone leaves the
/// present rules in use.
#[must_use]
pub fn refresh() -> bool {
    let before = current();
    let folder = CURRENT.read().unwrap_or_else(PoisonError::into_inner).1.clone();
    let data = match Data::choose(folder.as_deref()) {
        Ok(data) => Arc::new(data),
        Err(error) => {
            tracing::warn!(why = %error.message, "time zone rules cannot be read again; those read before stay in use");
            return false;
        }
    };
    let changed = !data.same_as(&before);
    if changed {
        data.log();
    }
    CURRENT.write().unwrap_or_else(PoisonError::into_inner).0 = Some(data);
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_shows_what_its_wall_clocks_show() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let wall = |text: &str| text.parse::<NaiveDateTime>().unwrap();
        let vancouver = Zone::named("America/Vancouver").unwrap();
        assert_eq!(vancouver.wall(at("2026-12-01T19:00:00Z")), wall("2026-12-01T12:00:00"), "rules of 2026");
        let berlin = Zone::named("Europe/Berlin").unwrap();
        assert_eq!(berlin.first_showing(wall("2027-03-28T02:30:00")), Some(at("2027-03-28T01:00:00Z")));
        assert_eq!(berlin.first_showing(wall("2027-10-31T02:30:00.25")), Some(at("2027-10-31T00:30:00.250Z")));
        assert_eq!(berlin.wall(at("2027-10-31T01:30:00.5Z")), wall("2027-10-31T02:30:00.5"));
        let apia = Zone::named("Pacific/Apia").unwrap();
        assert_eq!(apia.first_showing(wall("2011-12-30T09:00:00")), Some(at("2011-12-30T10:00:00Z")), "a day that never was");
        assert_eq!(Zone::utc().wall(at("2026-01-01T00:00:00Z")), wall("2026-01-01T00:00:00"));
        let far = NaiveDateTime::MAX;
        assert!(berlin.first_showing(far).is_none_or(|at| at.naive_utc() > wall("9999-01-01T00:00:00")));
    }
}
