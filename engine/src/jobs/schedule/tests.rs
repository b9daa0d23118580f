//! Known instants around changes of clocks, and random schedules against an oracle that knows nothing of the search: it
//! walks the clock minute by minute and asks of each minute whether the schedule names it.

use std::collections::{BTreeSet, HashSet};

use chrono::{NaiveDate, NaiveDateTime, NaiveTime, TimeZone, Timelike};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn utc(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).unwrap().with_timezone(&Utc)
}

fn input(value: Value) -> ScheduleInput {
    serde_json::from_value(value).unwrap()
}

fn schedule(value: Value) -> Schedule {
    Schedule::parse(&input(value), utc("2020-01-01T00:00:00Z")).unwrap()
}

fn code(value: Value) -> &'static str {
    Schedule::parse(&input(value), utc("2026-01-01T00:00:00Z")).unwrap_err().code
}

fn next(schedule: &Schedule, after: &str, count: usize) -> Vec<String> {
    std::iter::successors(schedule.next_after(utc(after)), |at| schedule.next_after(*at))
        .take(count)
        .map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
        .collect()
}

#[test]
fn daily_follows_the_wall_through_gap_and_fold() {
    let daily = schedule(json!({"type": "daily", "start": "2026-03-27T02:30", "timezone": "Europe/Berlin"}));
    assert_eq!(
        next(&daily, "2026-03-27T12:00:00Z", 3),
        ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"],
        "02:30 does not exist on the 29th: 03:00 is the first valid instant, and the day after it is 02:30 again"
    );
    assert_eq!(
        next(&daily, "2026-10-24T12:00:00Z", 2),
        ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
        "02:30 comes twice on the 25th: the first pass only"
    );
    assert_eq!(next(&daily, "2026-10-25T00:59:00Z", 1), ["2026-10-26T01:30:00Z"], "nothing in the second pass");
}

#[test]
fn a_start_inside_a_gap_keeps_its_wall_time() {
    let daily = schedule(json!({"type": "daily", "start": "2026-03-29T02:30", "timezone": "Europe/Berlin"}));
    assert_eq!(daily.start(), Some(utc("2026-03-29T01:00:00Z")));
    assert_eq!(next(&daily, "2026-03-29T00:00:00Z", 2), ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
    let stored = Schedule::from_row(&ScheduleRow {
        schedule_type: "daily".into(),
        start_at: daily.start(),
        start_wall: daily.start_wall(),
        timezone: "Europe/Berlin".into(),
        cron: None,
        end_at: None,
        max_occurrences: None,
        created_at: utc("2020-01-01T00:00:00Z"),
    })
    .unwrap();
    assert_eq!(next(&stored, "2026-03-29T00:00:00Z", 2), next(&daily, "2026-03-29T00:00:00Z", 2));
}

#[test]
fn half_hour_changes_of_lord_howe() {
    // Clocks go from 02:00 (+10:30) to 02:30 (+11) on 2026-10-04, and back from 02:00 (+11) to 01:30 on 2026-04-05.
    let spring = schedule(json!({"type": "daily", "start": "2026-10-03T02:15", "timezone": "Australia/Lord_Howe"}));
    assert_eq!(next(&spring, "2026-10-03T00:00:00Z", 2), ["2026-10-03T15:30:00Z", "2026-10-04T15:15:00Z"]);
    let autumn = schedule(json!({"type": "daily", "start": "2026-04-04T01:45", "timezone": "Australia/Lord_Howe"}));
    assert_eq!(next(&autumn, "2026-04-04T00:00:00Z", 2), ["2026-04-04T14:45:00Z", "2026-04-05T15:15:00Z"]);
}

#[test]
fn a_31st_and_a_leap_day_are_counted_from_the_anchor() {
    let monthly = schedule(json!({"type": "monthly", "start": "2026-01-31T09:00:00Z"}));
    assert_eq!(
        next(&monthly, "2026-01-31T09:00:00Z", 4),
        ["2026-02-28T09:00:00Z", "2026-03-31T09:00:00Z", "2026-04-30T09:00:00Z", "2026-05-31T09:00:00Z"]
    );
    let yearly = schedule(json!({"type": "yearly", "start": "2024-02-29T09:00:00Z"}));
    assert_eq!(
        next(&yearly, "2024-02-29T09:00:00Z", 4),
        ["2025-02-28T09:00:00Z", "2026-02-28T09:00:00Z", "2027-02-28T09:00:00Z", "2028-02-29T09:00:00Z"]
    );
}

#[test]
fn intervals_keep_absolute_time() {
    let hourly = schedule(json!({"type": "every_hour", "start": "2026-10-25T00:30", "timezone": "Europe/Berlin"}));
    assert_eq!(
        next(&hourly, "2026-10-24T23:00:00Z", 3),
        ["2026-10-24T23:30:00Z", "2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"],
        "both passes of 02:30"
    );
    let quarter = schedule(json!({"type": "cron", "cron": "*/15 * * * *", "timezone": "Europe/Berlin"}));
    for (from, until) in [("2026-03-29T00:00:00Z", "2026-03-29T03:00:00Z"), ("2026-10-25T00:00:00Z", "2026-10-25T03:00:00Z")] {
        let instants: Vec<_> = std::iter::successors(quarter.next_after(utc(from)), |at| quarter.next_after(*at))
            .take_while(|at| *at <= utc(until))
            .collect();
        assert_eq!(instants.len(), 12);
        assert!(instants.windows(2).all(|pair| pair[1] - pair[0] == Duration::minutes(15)));
    }
}

#[test]
fn cron_has_its_unix_meaning() {
    // 2026-11-22 is a Sunday.
    for sunday in ["0", "7", "SUN", "sun"] {
        let weekly = schedule(json!({"type": "cron", "cron": format!("0 9 * * {sunday}")}));
        assert_eq!(next(&weekly, "2026-11-20T00:00:00Z", 1), ["2026-11-22T09:00:00Z"], "{sunday}");
    }
    let weekdays = schedule(json!({"type": "cron", "cron": "0 9 * * 1-5"}));
    assert_eq!(next(&weekdays, "2026-11-20T10:00:00Z", 1), ["2026-11-23T09:00:00Z"]);
    let weekend = schedule(json!({"type": "cron", "cron": "0 9 * * 6-7"}));
    assert_eq!(
        next(&weekend, "2026-11-20T10:00:00Z", 3),
        ["2026-11-21T09:00:00Z", "2026-11-22T09:00:00Z", "2026-11-28T09:00:00Z"]
    );
    let either = schedule(json!({"type": "cron", "cron": "0 0 13 * 5"}));
    assert_eq!(
        next(&either, "2026-11-01T00:00:00Z", 3),
        ["2026-11-06T00:00:00Z", "2026-11-13T00:00:00Z", "2026-11-20T00:00:00Z"]
    );
    assert_eq!(next(&either, "2026-12-11T00:00:00Z", 1), ["2026-12-13T00:00:00Z"], "a 13th that is a Sunday");
    let seconds = schedule(json!({"type": "cron", "cron": "*/20 30 4 1 jan *"}));
    assert_eq!(
        next(&seconds, "2026-01-01T04:30:10Z", 3),
        ["2026-01-01T04:30:20Z", "2026-01-01T04:30:40Z", "2027-01-01T04:30:00Z"]
    );
    let leap = schedule(json!({"type": "cron", "cron": "0 0 29 2 *"}));
    assert_eq!(next(&leap, "2026-01-01T00:00:00Z", 2), ["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]);
    let nightly = schedule(json!({"type": "cron", "cron": "@daily", "timezone": "America/New_York"}));
    assert_eq!(next(&nightly, "2026-07-01T00:00:00Z", 1), ["2026-07-01T04:00:00Z"]);
}

#[test]
fn ranges_of_names_go_over_the_end() {
    let instants = |cron: &str| next(&schedule(json!({"type": "cron", "cron": cron})), "2026-11-01T10:00:00Z", 40);
    for (names, numbers) in [
        ("0 9 * * SAT-SUN", "0 9 * * 6-7"),
        ("0 9 * * FRI-SUN", "0 9 * * 5-7"),
        ("0 9 * * fri-mon", "0 9 * * 5,6,0,1"),
        ("0 9 * * SUN-TUE", "0 9 * * 0-2"),
        ("0 9 * * FRI-TUE/2", "0 9 * * 5,0,2"),
        ("0 9 * * 7-TUE", "0 9 * * 0-2"),
        ("0 9 1 NOV-FEB *", "0 9 1 11,12,1,2 *"),
    ] {
        assert_eq!(instants(names), instants(numbers), "{names}");
    }
}

#[test]
fn cron_fields_mean_the_wall_clock_of_that_day() {
    // Singapore was half an hour off in 1970, when the start lies.
    let hourly = schedule(json!({"type": "cron", "cron": "0 * * * *", "timezone": "Asia/Singapore", "start": 0}));
    assert_eq!(next(&hourly, "2026-12-01T00:15:00Z", 2), ["2026-12-01T01:00:00Z", "2026-12-01T02:00:00Z"]);
    assert_eq!(next(&hourly, "1970-01-01T00:00:00Z", 1), ["1970-01-01T00:30:00Z"]);
    let noon = json!({"type": "cron", "cron": "0 12 1 * *", "timezone": "America/Vancouver", "start": "2026-12-01T00:00"});
    assert_eq!(next(&schedule(noon), "2026-11-28T00:00:00Z", 1), ["2026-12-01T19:00:00Z"]);
    let sixth = json!({"type": "cron", "cron": "0 */6 * * *", "timezone": "Europe/Berlin", "start": "2027-03-27T18:00"});
    assert_eq!(
        next(&schedule(sixth), "2027-03-27T18:00:00Z", 5),
        ["2027-03-27T23:00:00Z", "2027-03-28T04:00:00Z", "2027-03-28T10:00:00Z", "2027-03-28T16:00:00Z", "2027-03-28T22:00:00Z"],
        "00, 06, 12, 18, 00 on the wall clock"
    );
}

#[test]
fn cron_goes_through_gap_and_fold_as_debian_does() {
    let fixed = schedule(json!({"type": "cron", "cron": "0,30 2 * * *", "timezone": "America/New_York"}));
    assert_eq!(
        next(&fixed, "2026-03-08T00:00:00Z", 2),
        ["2026-03-08T07:00:00Z", "2026-03-09T06:00:00Z"],
        "both skipped times are 03:00, which is one instant"
    );
    let fixed = schedule(json!({"type": "cron", "cron": "30 1 * * *", "timezone": "America/New_York"}));
    assert_eq!(next(&fixed, "2026-11-01T00:00:00Z", 2), ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]);
    let stepped = schedule(json!({"type": "cron", "cron": "*/30 0-3 * * *", "timezone": "America/New_York"}));
    assert_eq!(
        next(&stepped, "2026-11-01T04:45:00Z", 5),
        ["2026-11-01T05:00:00Z", "2026-11-01T05:30:00Z", "2026-11-01T06:00:00Z", "2026-11-01T06:30:00Z", "2026-11-01T07:00:00Z"],
        "both passes of 01:00 and 01:30"
    );
    assert_eq!(
        next(&stepped, "2026-03-08T06:15:00Z", 3),
        ["2026-03-08T06:30:00Z", "2026-03-08T07:00:00Z", "2026-03-08T07:30:00Z"],
        "nothing in place of 02:00 and 02:30"
    );
    let star_hour = schedule(json!({"type": "cron", "cron": "15 * * * *", "timezone": "Australia/Lord_Howe"}));
    // Half an hour is skipped at 02:00: that hour has no quarter past.
    assert_eq!(next(&star_hour, "2026-10-03T14:00:00Z", 2), ["2026-10-03T14:45:00Z", "2026-10-03T16:15:00Z"]);
    let range = schedule(json!({"type": "cron", "cron": "0-59/30 0-23 * * *", "timezone": "America/New_York"}));
    assert_eq!(
        next(&range, "2026-11-01T05:15:00Z", 2),
        ["2026-11-01T05:30:00Z", "2026-11-01T07:00:00Z"],
        "a range of all is not a star: the first pass only"
    );
    let skipped_day = schedule(json!({"type": "cron", "cron": "0 9 30 12 *", "timezone": "Pacific/Apia", "start": 0}));
    assert_eq!(next(&skipped_day, "2011-06-01T00:00:00Z", 1), ["2011-12-30T10:00:00Z"], "Samoa went without that day");
    let quarter = schedule(json!({"type": "cron", "cron": "*/15 * * * *", "timezone": "Europe/Berlin"}));
    for (from, until) in [("2026-03-29T00:00:00Z", "2026-03-29T03:00:00Z"), ("2026-10-25T00:00:00Z", "2026-10-25T03:00:00Z")] {
        let instants: Vec<_> = std::iter::successors(quarter.next_after(utc(from)), |at| quarter.next_after(*at))
            .take_while(|at| *at <= utc(until))
            .collect();
        assert_eq!(instants.len(), 12);
        assert!(instants.windows(2).all(|pair| pair[1] - pair[0] == Duration::minutes(15)));
    }
}

/// The start of a job as an old version stored it, by rules that have changed since.
#[test]
fn a_wall_clock_time_outlives_a_change_of_rules() {
    let row = |kind: &str, start_at: &str, start_wall: Option<&str>| {
        Schedule::from_row(&ScheduleRow {
            schedule_type: kind.into(),
            start_at: Some(utc(start_at)),
            start_wall: start_wall.map(|wall| wall.parse().unwrap()),
            timezone: "America/Vancouver".into(),
            cron: (kind == "cron").then(|| "0 12 * * *".into()),
            end_at: None,
            max_occurrences: None,
            created_at: utc("2020-01-01T00:00:00Z"),
        })
        .unwrap()
    };
    let now = utc("2026-11-28T00:00:00Z");
    // Until 2026 noon of a December day was 20:00Z; by the rules since it is 19:00Z.
    let (old, new) = (utc("2026-12-01T20:00:00Z"), utc("2026-12-01T19:00:00Z"));
    let noon = "2026-12-01T12:00:00".parse().ok();
    for kind in ["once", "daily", "weekly", "yearly"] {
        let moved = row(kind, "2026-12-01T20:00:00Z", Some("2026-12-01T12:00:00"));
        assert_eq!((moved.start(), moved.first(now)), (Some(new), Some(new)), "{kind}");
        assert_eq!(
            (moved.wall_of(new), moved.follow(old, noon, now), moved.follow(new, noon, now)),
            (noon, Some(new), Some(new))
        );
    }
    assert_eq!(row("once", "2026-12-01T20:00:00Z", None).start(), Some(old), "what was given as an instant stays one");
    let cron = row("cron", "2026-01-01T00:00:00Z", None);
    assert_eq!(cron.follow(old, noon, now), Some(new));
    assert_eq!(
        cron.follow(old, None, now),
        Some(utc("2026-11-28T19:00:00Z")),
        "an instant the schedule does not have, and no wall"
    );
    assert_eq!(cron.follow(new, None, now), Some(new));
    let hourly = schedule(json!({"type": "cron", "cron": "30 * * * *", "timezone": "Asia/Singapore"}));
    assert_eq!(hourly.wall_of(utc("2026-12-01T01:30:00Z")), None, "due whenever it matches");
}

#[test]
fn a_far_start_costs_nothing() {
    let hourly = schedule(json!({"type": "every_5_minutes", "start": 0}));
    assert_eq!(next(&hourly, "2099-12-31T23:57:00Z", 2), ["2100-01-01T00:00:00Z", "2100-01-01T00:05:00Z"]);
    let daily = schedule(json!({"type": "daily", "start": 0, "timezone": "Pacific/Chatham"}));
    assert!(daily.next_after(utc("2099-12-31T00:00:00Z")).is_some());
    for (kind, cron) in [("daily", None), ("every_hour", None), ("cron", Some("0 0 1 1 *"))] {
        let schedule = schedule(json!({"type": kind, "start": 0, "cron": cron}));
        assert_eq!(schedule.next_after(utc("2100-12-31T23:59:59Z")), None, "{kind} ends with the year 2100");
        assert_eq!(schedule.next_after(DateTime::<Utc>::MAX_UTC - Duration::days(2)), None, "{kind}");
    }
}

#[test]
fn what_is_due_when_a_job_is_saved() {
    let now = utc("2026-06-01T10:00:30Z");
    let first = |value| Schedule::parse(&input(value), now).unwrap().first(now);
    assert_eq!(first(json!({"type": "immediately"})), Some(utc("2026-06-01T10:00:00Z")));
    assert_eq!(first(json!({})), Some(utc("2026-06-01T10:00:00Z")));
    assert_eq!(first(json!({"type": "once", "start": "2026-01-01T00:00:00Z"})), Some(utc("2026-06-01T10:00:00Z")));
    assert_eq!(first(json!({"type": "once", "start": "2026-07-01T00:00:59Z"})), Some(utc("2026-07-01T00:00:00Z")));
    assert_eq!(first(json!({"type": "every_5_minutes", "start": "2026-01-01T00:00:00Z"})), Some(utc("2026-06-01T10:05:00Z")));
    assert_eq!(
        first(json!({"type": "daily", "start": "2026-06-01T10:00:45Z"})),
        Some(utc("2026-06-01T10:00:00Z")),
        "a start seconds ahead is floored to the present minute, and is due"
    );
    assert_eq!(first(json!({"type": "cron", "cron": "* * * * *"})), Some(utc("2026-06-01T10:01:00Z")));
    assert_eq!(
        first(json!({"type": "cron", "cron": "* * * * *", "start": "2026-06-02T00:00:00Z"})),
        Some(utc("2026-06-02T00:00:00Z"))
    );
}

#[test]
fn an_end_and_a_count_bound_the_preview() {
    let now = utc("2026-06-01T10:00:30Z");
    let preview = |value, count| Schedule::parse(&input(value), now).unwrap().preview(now, count);
    assert_eq!(preview(json!({"type": "daily", "start": 0}), 5).len(), 5);
    assert_eq!(preview(json!({"type": "daily", "start": 0, "max_occurrences": 3}), 5).len(), 3);
    assert_eq!(preview(json!({"type": "daily", "start": 0, "end": "2026-06-03T00:00:00Z"}), 5).len(), 2, "the end itself counts");
    assert_eq!(preview(json!({"type": "once", "start": 0}), 5), [utc("2026-06-01T10:00:00Z")]);
    let bounded = schedule(json!({"type": "daily", "start": 0, "max_occurrences": 3}));
    assert_eq!((bounded.remaining(0), bounded.remaining(3), bounded.remaining(9)), (Some(3), Some(0), Some(0)));
}

#[test]
fn bad_schedules_name_their_field() {
    for (value, expected) in [
        (json!({"type": "fortnightly", "start": 0}), "invalid_schedule_type"),
        (json!({"type": 5}), "invalid_schedule_type"),
        (json!({"type": "Daily", "start": 0}), "invalid_schedule_type"),
        (json!({"type": "once"}), "start_required"),
        (json!({"type": "daily"}), "start_required"),
        (json!({"type": "daily", "start": "soon"}), "invalid_start"),
        (json!({"type": "daily", "start": ""}), "invalid_start"),
        (json!({"type": "daily", "start": true}), "invalid_start"),
        (json!({"type": "daily", "start": 1e300}), "invalid_start"),
        (json!({"type": "daily", "start": -5}), "invalid_start"),
        (json!({"type": "daily", "start": "2026-02-30T00:00:00Z"}), "invalid_start"),
        (json!({"type": "daily", "start": "9999-01-01T00:00:00Z"}), "invalid_start"),
        (json!({"type": "daily", "start": 0, "timezone": "Mars/Olympus"}), "invalid_timezone"),
        (json!({"type": "daily", "start": 0, "timezone": ""}), "invalid_timezone"),
        (json!({"type": "daily", "start": 0, "timezone": 1}), "invalid_timezone"),
        (json!({"type": "cron"}), "invalid_cron"),
        (json!({"type": "cron", "cron": ""}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* * * * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "60 * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* 24 * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* * 0 * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* * * 13 *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "* * * * 8"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "*/0 * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "30-10 * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "1,,2 * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "-1 * * * *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "@reboot"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "0 0 30 2 *"}), "invalid_cron"),
        (json!({"type": "cron", "cron": "0 0 31 4,6,9,11 *"}), "invalid_cron"),
        (json!({"type": "daily", "start": 0, "cron": "* * * * *"}), "invalid_cron"),
        (json!({"type": "daily", "start": 100_000, "end": 0}), "invalid_end"),
        (json!({"type": "daily", "start": 0, "end": "never"}), "invalid_end"),
        (json!({"type": "cron", "cron": "* * * * *", "end": "2025-01-01T00:00:00Z"}), "invalid_end"),
        (json!({"type": "daily", "start": 0, "max_occurrences": 0}), "invalid_max_occurrences"),
        (json!({"type": "daily", "start": 0, "max_occurrences": 1.5}), "invalid_max_occurrences"),
        (json!({"type": "daily", "start": 0, "max_occurrences": "3"}), "invalid_max_occurrences"),
    ] {
        assert_eq!(code(value.clone()), expected, "{value}");
    }
    assert!(serde_json::from_value::<ScheduleInput>(json!({"type": "once", "begin": 0})).is_err(), "unknown fields are refused");
}

#[test]
fn starts_are_read_in_every_form() {
    let start = |start: Value| schedule(json!({"type": "daily", "start": start, "timezone": "Asia/Tokyo"})).start().unwrap();
    let expected = utc("2026-05-01T09:30:00Z");
    for text in [
        "2026-05-01T09:30:00Z",
        "2026-05-01T09:30Z",
        "2026-05-01T11:30:59+02:00",
        "2026-05-01T11:30+02:00",
        "2026-05-01T11:30:00.250+0200",
        "2026-05-01T18:30",
        "2026-05-01 18:30:05",
        "1777627800",
    ] {
        assert_eq!(start(json!(text)), expected, "{text}");
    }
    assert_eq!(start(json!(1_777_627_805)), expected);
    assert_eq!(start(json!(1_777_627_805.75)), expected);
    assert_eq!(start(json!("2026-05-01")), utc("2026-04-30T15:00:00Z"));
}

#[test]
fn expirations() {
    let read = |value| Expiration::parse(&value, "invalid_expiration", "expiration").map(|e| e.to_string()).map_err(|e| e.code);
    for (value, text) in [
        (json!("no_expire"), "no_expire"),
        (json!("90m"), "90m"),
        (json!("60m"), "1h"),
        (json!("2h"), "2h"),
        (json!("3d"), "3d"),
        (json!("15"), "15m"),
        (json!(15), "15m"),
    ] {
        assert_eq!(read(value).as_deref(), Ok(text));
    }
    for value in [
        json!("soon"),
        json!(""),
        json!("m"),
        json!("-5m"),
        json!("0m"),
        json!("1.5h"),
        json!(-1),
        json!(true),
        json!("99999999d"),
        json!("5é"),
    ] {
        assert_eq!(read(value.clone()), Err("invalid_expiration"), "{value}");
    }
    let period = |value| schedule(value).default_expiration().to_string();
    assert_eq!(period(json!({"type": "immediately"})), "no_expire");
    assert_eq!(period(json!({"type": "every_15_minutes", "start": 0})), "15m");
    assert_eq!(period(json!({"type": "weekly", "start": 0})), "7d");
    assert_eq!(period(json!({"type": "cron", "cron": "*/10 * * * * *"})), "1m");
}

/// Zones with changes of one hour, of half an hour, at odd minutes, in the southern hemisphere, and one that stopped
/// changing; the years are those in which they changed.
const ZONES: [(&str, i32); 6] = [
    ("Europe/Berlin", 2025),
    ("America/New_York", 2026),
    ("Australia/Lord_Howe", 2026),
    ("America/Sao_Paulo", 2016),
    ("Asia/Tehran", 2020),
    ("Pacific/Chatham", 2025),
];

/// What the wall shows at a minute of the epoch.
fn wall(zone: &Zone, minute: i64) -> NaiveDateTime {
    zone.wall(DateTime::from_timestamp(minute * 60, 0).unwrap())
}

/// Walks `from..until` (minutes of the epoch) and collects the minutes at which `wanted` holds of the wall, by the rule
/// for wall times: the first pass of a repeated minute only, and the minute after a gap for any the gap has swallowed.
fn walk(zone: &Zone, from: i64, until: i64, wanted: impl Fn(NaiveDateTime) -> bool) -> BTreeSet<i64> {
    let mut seen = HashSet::new();
    let mut due = BTreeSet::new();
    let mut before = wall(zone, from - 300);
    for minute in from - 299..until {
        let shown = wall(zone, minute);
        let mut swallowed = before + Duration::minutes(1);
        while swallowed < shown {
            if wanted(swallowed) && minute >= from {
                due.insert(minute);
            }
            swallowed += Duration::minutes(1);
        }
        let fresh = seen.insert(shown);
        if minute >= from && fresh && wanted(shown) {
            due.insert(minute);
        }
        before = shown;
    }
    due
}

/// A cron field as a set, and text that means the set.
fn field(low: u32, high: u32) -> impl Strategy<Value = (String, BTreeSet<u32>)> {
    prop_oneof![
        3 => Just(("*".to_owned(), (low..=high).collect::<BTreeSet<_>>())),
        2 => (1..=12u32).prop_map(move |step| {
            (format!("*/{step}"), (low..=high).filter(|n| (n - low).is_multiple_of(step)).collect())
        }),
        3 => prop::collection::btree_set(low..=high, 1..4).prop_map(|set| {
            (set.iter().map(u32::to_string).collect::<Vec<_>>().join(","), set)
        }),
        2 => (low..=high, low..=high).prop_map(|(a, b)| {
            let (a, b) = (a.min(b), a.max(b));
            (format!("{a}-{b}"), (a..=b).collect())
        }),
    ]
}

/// A minute within two years of a zone's changes, more often than not within a day of one.
fn instants() -> impl Strategy<Value = (Zone, i64)> {
    (0..ZONES.len(), 0..730i64 * 1440, any::<bool>(), 0..8usize, -1440..1440i64).prop_map(
        |(zone, anywhere, near, which, around)| {
            let (name, year) = ZONES[zone];
            let zone = Zone::named(name).unwrap();
            let first = Utc.with_ymd_and_hms(year, 1, 1, 0, 0, 0).unwrap().timestamp() / 60;
            let mut changes = Vec::new();
            for hour in (0..730 * 24).map(|hour| first + hour * 60) {
                if wall(&zone, hour + 60) - wall(&zone, hour) != Duration::minutes(60) {
                    changes.push(hour);
                }
            }
            let minute = match changes.get(which % changes.len().max(1)) {
                Some(change) if near => change + around,
                _ => first + anywhere,
            };
            (zone, minute)
        },
    )
}

/// The instants of `schedule` in `from..until` (minutes of the epoch), found by stepping.
fn found(schedule: &Schedule, from: i64, until: i64) -> BTreeSet<i64> {
    let at = |minute: i64| DateTime::from_timestamp(minute * 60, 0).unwrap();
    std::iter::successors(schedule.next_after(at(from) - Duration::nanoseconds(1)), |at| schedule.next_after(*at))
        .take_while(|next| *next < at(until))
        .map(|next| {
            assert_eq!(next.second(), 0);
            next.timestamp() / 60
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn cron_equals_the_walk(
        (zone, middle) in instants(),
        (minutes, minute_set) in field(0, 59),
        (hours, hour_set) in field(0, 23),
        (days, day_set) in field(1, 31),
        (months, month_set) in field(1, 12),
        (weekdays, weekday_set) in field(0, 6),
    ) {
        let (from, until) = (middle - 2 * 1440, middle + 2 * 1440);
        let anchor = from - 1000;
        let text = format!("{minutes} {hours} {days} {months} {weekdays}");
        let schedule = Schedule::parse(
            &input(json!({"type": "cron", "cron": text, "timezone": zone.name(), "start": anchor * 60})),
            DateTime::from_timestamp(anchor * 60, 0).unwrap(),
        );
        let Ok(schedule) = schedule else { return Ok(()) };
        let day_fits = |date: NaiveDate| {
            let (by_day, by_weekday) =
                (day_set.contains(&date.day()), weekday_set.contains(&date.weekday().num_days_from_sunday()));
            let days_fit = if days.starts_with('*') || weekdays.starts_with('*') { by_day && by_weekday } else { by_day || by_weekday };
            month_set.contains(&date.month()) && days_fit
        };
        let time_fits = |at: NaiveDateTime| minute_set.contains(&at.minute()) && hour_set.contains(&at.hour());
        let expected: BTreeSet<i64> = if minutes.starts_with('*') || hours.starts_with('*') {
            (from..until).filter(|minute| time_fits(wall(&zone, *minute)) && day_fits(wall(&zone, *minute).date())).collect()
        } else {
            walk(&zone, from, until, |at| time_fits(at) && day_fits(at.date()))
        };
        prop_assert_eq!(found(&schedule, from, until), expected, "{} in {:?}", text, zone);
    }

    #[test]
    fn daily_and_longer_equal_the_walk(
        (zone, middle) in instants(),
        back in 0..800i64,
        time in 0..1440i64,
        kind in prop::sample::select(vec!["daily", "weekly", "monthly", "yearly"]),
    ) {
        let (from, until) = (middle - 2 * 1440, middle + 2 * 1440);
        let day = wall(&zone, from).date().and_time(NaiveTime::MIN) - Duration::days(back) + Duration::minutes(time);
        let start = day.format("%Y-%m-%dT%H:%M").to_string();
        let schedule = schedule(json!({"type": kind, "start": start, "timezone": zone.name()}));
        let last_of_month = |date: NaiveDate| (date + Days::new(1)).month() != date.month();
        let expected = walk(&zone, from, until, |at| {
            let date_fits = match kind {
                "daily" => true,
                "weekly" => (at.date() - day.date()).num_days() % 7 == 0,
                _ => {
                    let same = at.day() == day.day() || (last_of_month(at.date()) && day.day() > at.day());
                    same && (kind == "monthly" || at.month() == day.month())
                }
            };
            at >= day && date_fits && (at.hour(), at.minute()) == (day.hour(), day.minute())
        });
        prop_assert_eq!(found(&schedule, from, until), expected, "{} from {} in {:?}", kind, start, zone);
    }

    #[test]
    fn intervals_are_multiples_from_the_anchor(start in 0..4_000_000_000i64, after in 0..4_000_000_000i64, kind in 2..7usize) {
        let kind = ScheduleType::VARIANTS[kind];
        let schedule = schedule(json!({"type": kind.as_str(), "start": start, "timezone": "Pacific/Chatham"}));
        let start = start / 60 * 60;
        let next = schedule.next_after(DateTime::from_timestamp(after, 0).unwrap()).unwrap().timestamp();
        let interval = kind.interval_s().unwrap();
        prop_assert!(next > after && next >= start && (next - start) % interval == 0);
        prop_assert!(next == start || next - after <= interval);
    }

    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,40}", cron in "[-*/,0-9 a-z]{0,24}") {
        let now = utc("2026-01-01T00:00:00Z");
        let _ = Schedule::parse(&input(json!({"type": "daily", "start": text, "timezone": text})), now);
        let _ = Schedule::parse(&input(json!({"type": "daily", "start": text})), now);
        if let Ok(schedule) = Schedule::parse(&input(json!({"type": "cron", "cron": cron})), now) {
            prop_assert!(schedule.next_after(now).is_none_or(|next| next > now));
        }
        let _ = text.parse::<Expiration>();
    }
}
