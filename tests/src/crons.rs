//! Random crons in zones with all kinds of changes.

use borealis_engine::jobs::schedule::Schedule;
use chrono::DateTime;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;

/// Zones with all kinds of changes: of an hour, of half an hour, of two hours, of a day; at midnight, in the southern hemisphere, for the
/// month of Ramadan, for good; and without any.
pub const ZONES: [&str; 60] = [
    "Africa/Cairo",
    "Africa/Casablanca",
    "Africa/El_Aaiun",
    "Africa/Juba",
    "Africa/Lagos",
    "Africa/Sao_Tome",
    "America/Adak",
    "America/Anchorage",
    "America/Asuncion",
    "America/Bogota",
    "America/Caracas",
    "America/Chicago",
    "America/Chihuahua",
    "America/Ciudad_Juarez",
    "America/Halifax",
    "America/Havana",
    "America/Los_Angeles",
    "America/Mexico_City",
    "America/New_York",
    "America/Nuuk",
    "America/Phoenix",
    "America/Port-au-Prince",
    "America/Santiago",
    "America/Sao_Paulo",
    "America/Scoresbysund",
    "America/St_Johns",
    "America/Vancouver",
    "America/Whitehorse",
    "Antarctica/Casey",
    "Antarctica/Troll",
    "Antarctica/Vostok",
    "Asia/Almaty",
    "Asia/Amman",
    "Asia/Beirut",
    "Asia/Damascus",
    "Asia/Gaza",
    "Asia/Jerusalem",
    "Asia/Kathmandu",
    "Asia/Kolkata",
    "Asia/Manila",
    "Asia/Singapore",
    "Asia/Tehran",
    "Asia/Tokyo",
    "Australia/Adelaide",
    "Australia/Eucla",
    "Australia/Lord_Howe",
    "Australia/Sydney",
    "Etc/GMT+12",
    "Europe/Berlin",
    "Europe/Dublin",
    "Europe/Istanbul",
    "Europe/Lisbon",
    "Europe/Volgograd",
    "Pacific/Apia",
    "Pacific/Auckland",
    "Pacific/Chatham",
    "Pacific/Easter",
    "Pacific/Fiji",
    "Pacific/Kiritimati",
    "Pacific/Norfolk",
];

/// The schedule of a cron in a zone; none when it is never due.
///
/// # Panics
/// When the input has another form.
#[must_use]
pub fn schedule(cron: &str, zone: &str) -> Option<Schedule> {
    let input = json!({"type": "cron", "cron": cron, "timezone": zone});
    Schedule::parse(&serde_json::from_value(input).expect("an input"), DateTime::UNIX_EPOCH).ok()
}

fn field(random: &mut StdRng, low: u32, high: u32, names: &[&str]) -> String {
    let mut number = || random.random_range(low..=high);
    let (one, other) = (number(), number());
    match random.random_range(0..10) {
        0..3 => "*".to_owned(),
        3..5 => format!("*/{}", random.random_range(1..=12.min(high))),
        5 => format!("{}-{}", one.min(other), one.max(other)),
        6 => format!("{}-{}/{}", one.min(other), one.max(other), random.random_range(1..=5)),
        7 if !names.is_empty() => {
            let name = |number: u32| names[(number - low) as usize % names.len()];
            format!("{}-{}", name(one), name(other))
        }
        _ => {
            let list = std::iter::once(one).chain((0..random.random_range(0..3)).map(|_| random.random_range(low..=high)));
            list.map(|number| number.to_string()).collect::<Vec<_>>().join(",")
        }
    }
}

/// A random one, which may never be due.
pub fn cron(random: &mut impl Rng) -> String {
    const MONTHS: [&str; 12] = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
    const WEEKDAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
    let mut random = StdRng::from_rng(random);
    let days = if random.random_bool(0.5) { "*".to_owned() } else { field(&mut random, 1, 31, &[]) };
    let months = if random.random_bool(0.7) { "*".to_owned() } else { field(&mut random, 1, 12, &MONTHS) };
    let weekdays = if random.random_bool(0.5) { "*".to_owned() } else { field(&mut random, 0, 6, &WEEKDAYS) };
    let (minutes, hours) = (field(&mut random, 0, 59, &[]), field(&mut random, 0, 23, &[]));
    format!("{minutes} {hours} {days} {months} {weekdays}")
}
