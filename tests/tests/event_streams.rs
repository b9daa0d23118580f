//! Streams of the events of runs: what they tell, how they go on and end, and what they cost while nothing happens.

use std::time::Duration;

use borealis_tests::{Actor, TestEngine, engine::PASSWORD, eventually};
use reqwest::{
    Method, Response,
    header::{ACCEPT, HeaderMap, HeaderValue},
};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(10);
/// Processes of Postgres write their counts after ten idle seconds at the latest.
const COUNTS_SETTLE: Duration = Duration::from_secs(11);
/// Over how long statements are counted.
const COUNTED: Duration = Duration::from_secs(8);

/// A run with `events` events that nobody works on.
async fn run(engine: &TestEngine, events: i32) -> Uuid {
    let id = Uuid::now_v7();
    let sql = "INSERT INTO workflow_runs (id, workflow, version, state, step, input, scope_ids)
               VALUES ($1, 'scheduled_run', 1, 'pending', 'resolve', '{\"occurrence_id\": 0}', '{}')";
    let _ = sqlx::query(sql).bind(id).execute(&engine.database.pool).await.expect("a run");
    for _ in 0..events {
        happens(engine, id, "step_started").await;
    }
    id
}

async fn happens(engine: &TestEngine, run: Uuid, kind: &str) {
    let sql = "WITH next AS (
                   UPDATE workflow_runs SET event_seq = event_seq + 1 WHERE id = $1 RETURNING id, event_seq)
               INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, detail)
               SELECT id, event_seq, $2, 'resolve', 1, '', '{}' FROM next";
    let _ = sqlx::query(sql).bind(run).bind(kind).execute(&engine.database.pool).await.expect("an event");
}

async fn ends(engine: &TestEngine, run: Uuid) {
    let sql = "UPDATE workflow_runs SET state = 'succeeded', finished_at = now() WHERE id = $1";
    let _ = sqlx::query(sql).bind(run).execute(&engine.database.pool).await.expect("an end");
}

async fn follow(who: &Actor, run: Uuid, last_event: Option<&str>) -> Response {
    let mut headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("text/event-stream"))]);
    if let Some(last) = last_event {
        headers.insert("last-event-id", last.parse().expect("a header"));
    }
    who.request(Method::GET, &format!("/api/runs/{run}/events")).headers(headers).send().await.expect("an answer")
}

/// The numbers of the events in a piece of a stream.
fn numbers(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("id: ")).collect()
}

async fn next(stream: &mut Response) -> String {
    let mut text = String::new();
    while !text.ends_with("\n\n") || numbers(&text).is_empty() {
        let piece = tokio::time::timeout(LIMIT, stream.chunk()).await.expect("an event").expect("a stream").expect("no end");
        text.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    text
}

#[tokio::test]
async fn a_stream_tells_what_happens_and_ends_with_the_run() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let run = run(&engine, 2).await;
    let mut stream = follow(&admin, run, None).await;
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.headers()["x-accel-buffering"], "no");
    let mut seen = next(&mut stream).await;
    while numbers(&seen).len() < 2 {
        seen.push_str(&next(&mut stream).await);
    }
    assert_eq!(numbers(&seen), ["1", "2"], "{seen}");
    assert!(seen.contains("event: run\n"), "{seen}");
    happens(&engine, run, "step_committed").await;
    let third = next(&mut stream).await;
    assert!(numbers(&third) == ["3"] && third.contains("step_committed"), "{third}");

    // A second one goes on where it is told to.
    let mut resumed = follow(&admin, run, Some("2")).await;
    assert_eq!(numbers(&next(&mut resumed).await), ["3"]);
    happens(&engine, run, "succeeded").await;
    ends(&engine, run).await;
    let rest = tokio::time::timeout(LIMIT, stream.text()).await.expect("an end").expect("a stream");
    assert_eq!(numbers(&rest), ["4"]);

    // What a browser asks for when such a stream has ended.
    let over = follow(&admin, run, Some("4")).await;
    assert_eq!(over.status(), 204, "so that it does not come again");
    let again = follow(&admin, run, Some("3")).await;
    assert_eq!(again.status(), 200);
    assert_eq!(numbers(&tokio::time::timeout(LIMIT, again.text()).await.expect("an end").expect("a stream")), ["4"]);
    // Without a stream, the header says nothing.
    let events = admin.get(&format!("/api/runs/{run}/events?after=2")).await.ok();
    assert_eq!(events["events"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_run_that_is_purged_ends_its_streams() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let run = run(&engine, 1).await;
    let mut stream = follow(&admin, run, None).await;
    let _ = next(&mut stream).await;
    let purge = "WITH gone AS (DELETE FROM workflow_events WHERE run_id = $1) DELETE FROM workflow_runs WHERE id = $1";
    let _ = sqlx::query(purge).bind(run).execute(&engine.database.pool).await.expect("a purge");
    let rest = tokio::time::timeout(LIMIT, stream.text()).await.expect("an end").expect("a stream");
    assert!(numbers(&rest).is_empty(), "{rest}");
}

/// Transactions of the database; every statement outside one is one.
async fn statements(engine: &TestEngine) -> i64 {
    let sql = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    sqlx::query_scalar(sql).fetch_one(&engine.database.pool).await.expect("a count")
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_streams_share_one_look() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let run = run(&engine, 1).await;
    let mut streams = Vec::new();
    for _ in 0..15 {
        let user = engine.user("Admin", &[]).await;
        let who = engine.anonymous().sign_in(&user, PASSWORD, 0).await;
        streams.extend(futures::future::join_all((0..32).map(|_| follow(&who, run, None))).await);
    }
    streams.extend(futures::future::join_all((0..32).map(|_| follow(&admin, run, None))).await);
    assert_eq!(streams.len(), 512);
    assert!(streams.iter().all(|stream| stream.status() == 200));
    assert_eq!(follow(&admin, run, None).await.status(), 429);
    for stream in &mut streams {
        assert_eq!(numbers(&next(stream).await), ["1"]);
    }
    tokio::time::sleep(COUNTS_SETTLE).await;
    let before = statements(&engine).await;
    tokio::time::sleep(COUNTED).await;
    let rate = (statements(&engine).await - before) as f64 / COUNTED.as_secs_f64();
    println!("{rate:.1} statements a second with 512 open streams, with everything else the engine does");
    assert!(rate < 20.0, "{rate:.1} statements a second");
    happens(&engine, run, "step_committed").await;
    for stream in &mut streams {
        assert_eq!(numbers(&next(stream).await), ["2"]);
    }
    drop(streams);
    eventually("there is room again", LIMIT, || async { (follow(&admin, run, None).await.status() == 200).then_some(()) }).await;
}
