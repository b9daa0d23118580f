//! Whether everything accepted came to a true end, once.

use std::time::{Duration, Instant};

use borealis_engine::db::Pool;
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use super::{
    QUIET, Scene,
    real::HOSTNAME,
    work::{Accepted, PERIOD},
};

/// What must have no rows once all is at rest.
const NOTHING_OPEN: [(&str, &str); 8] = [
    (
        "a run that has not ended",
        "SELECT concat_ws(' ', workflow, state, step, id) FROM workflow_runs WHERE finished_at IS NULL ORDER BY workflow = 'scheduled_run'",
    ),
    ("a lease", "SELECT id::text FROM workflow_runs WHERE lease_token IS NOT NULL"),
    ("a hint", "SELECT id FROM apalis.jobs"),
    ("an occurrence that is not closed", "SELECT id::text || ' ' || state FROM job_occurrences WHERE state <> 'closed'"),
    ("an activity that has not ended", "SELECT id::text || ' ' || delivery FROM activity_history WHERE delivery <> 'done'"),
    (
        "a run of a device that has not ended",
        "SELECT id::text || ' ' || status FROM scheduled_job_runs WHERE finished_at IS NULL",
    ),
    ("a parent with open children", "SELECT id::text FROM workflow_runs WHERE open_children <> 0"),
    ("a recurrent job that is still due", "SELECT id::text FROM scheduled_jobs WHERE enabled AND next_due_at IS NOT NULL"),
];

/// What must never have rows.
const NEVER: [(&str, &str); 10] = [
    ("events with a gap or a double", "SELECT run_id::text FROM workflow_events GROUP BY run_id HAVING max(seq) <> count(*)"),
    (
        "a run whose events do not count up to its own number",
        "SELECT r.id::text FROM workflow_runs r WHERE r.event_seq <> (SELECT count(*) FROM workflow_events e WHERE e.run_id = r.id)",
    ),
    (
        "a journal that does not match its run",
        "SELECT r.id::text FROM workflow_runs r WHERE r.seq <> (SELECT count(DISTINCT j.seq) FROM workflow_journal j WHERE j.run_id = r.id)
            OR r.seq <> (SELECT count(*) FROM workflow_journal j WHERE j.run_id = r.id)",
    ),
    ("a domain write that happened twice", "SELECT key FROM probe_rows WHERE written <> 1"),
    (
        "a success without all its steps",
        "SELECT r.id::text FROM workflow_runs r WHERE r.state = 'succeeded' AND r.workflow = 'plain' AND r.seq <> 5",
    ),
    (
        "a failure that is not the loss of workers",
        "SELECT id::text || ' ' || workflow || ' ' || coalesce(error, '') FROM workflow_runs
         WHERE state = 'failed' AND NOT (error LIKE 'worker_lost:%' AND worker_deaths >= 3)
           AND NOT (workflow = 'fragile' AND error LIKE 'interrupted:%')
           AND NOT (workflow = 'scheduled_run' AND error LIKE 'runs_failed:%')
           AND NOT (workflow = 'moody' AND error LIKE 'database_unavailable:%' AND attempt >= 3)",
    ),
    ("an instant of a schedule that was used twice", "SELECT job_id::text FROM job_occurrences GROUP BY job_id, scheduled_at HAVING count(*) > 1"),
    (
        "a dispatch that did not end in success",
        // What became of those of the real agent, it tells itself.
        "SELECT r.id::text || ' ' || r.status || ' ' || coalesce(r.error, '') FROM scheduled_job_runs r
         WHERE r.status NOT IN ('Success', 'Skipped') AND NOT EXISTS (
             SELECT FROM activity_history a JOIN devices d ON d.guid = a.device_guid WHERE a.run_id = r.id AND d.hostname = 'real-0')",
    ),
    ("an event of an activity that was refused", "SELECT id::text FROM activity_events WHERE kind = 'refused'"),
    (
        "an occurrence whose workflow run did not end as its runs did",
        "SELECT o.id::text || ' ' || w.state FROM job_occurrences o JOIN workflow_runs w ON w.id = o.workflow_run_id
         WHERE w.state <> CASE WHEN EXISTS (SELECT FROM scheduled_job_runs r WHERE r.occurrence_id = o.id
                                            AND r.status NOT IN ('Success', 'Warning', 'Skipped')) THEN 'failed' ELSE 'succeeded' END",
    ),
];

/// Waits until nothing is open or `deadline`, then looks at everything. Answers how long it took to come to rest and what
/// was seen open last, and what is broken.
pub async fn reckon(scene: &Scene, accepted: &Accepted, deadline: Instant) -> (Option<(Duration, String)>, Vec<String>) {
    let pool = &scene.house.database.pool;
    let began = deadline - QUIET;
    if let Some(job) = accepted.recurrent {
        let ended = sqlx::query("UPDATE scheduled_jobs SET enabled = false, next_due_at = NULL WHERE id = $1").bind(job);
        ended.execute(pool).await.expect("the end of the recurrent job");
    }
    let mut last = "nothing was open".to_owned();
    let at_rest = loop {
        let open = found(pool, &NOTHING_OPEN).await;
        let unacked = scene.fleet.counts().unacked;
        if open.is_empty() && unacked == 0 {
            break Some((began.elapsed(), last));
        }
        last = open.first().cloned().unwrap_or_else(|| format!("{unacked} results not acknowledged"));
        if Instant::now() > deadline {
            break None;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let mut broken = found(pool, &NOTHING_OPEN).await;
    if at_rest.is_none() {
        broken.extend(stuck(scene, pool).await);
    }
    broken.extend(found(pool, &NEVER).await);
    broken.extend(runs(pool, accepted).await);
    broken.extend(dispatches(scene, pool).await);
    broken.extend(instants(pool, accepted).await);
    (at_rest, broken)
}

/// What engine and fleet know of each dispatch that has not ended.
async fn stuck(scene: &Scene, pool: &Pool) -> Vec<String> {
    let rows: Vec<(i64, String)> = sqlx::query_as(
        "SELECT a.id, concat_ws(' ', a.hostname, a.status, a.delivery, 'sent', a.delivery_count, 'times, last', a.sent_at, 'changed', a.updated_at,
                'socket at', (SELECT string_agg(concat_ws(' ', s.api_process, s.connected_at), ', ') FROM device_sockets s WHERE s.device_guid = a.device_guid),
                'events', (SELECT string_agg(e.kind, ', ') FROM activity_events e WHERE e.activity_id = a.id))
         FROM activity_history a WHERE a.delivery <> 'done' ORDER BY a.id",
    )
    .fetch_all(pool)
    .await
    .expect("the open activities");
    let (receipts, executions) = (scene.fleet.receipts(), scene.fleet.executions());
    let mut told: Vec<String> = rows
        .iter()
        .map(|(id, row)| {
            let came: Vec<_> = receipts.iter().filter(|one| one.dispatch == *id).map(|one| one.at).collect();
            let begun: Vec<_> = executions.iter().filter(|one| one.dispatch == *id).map(|one| one.at).collect();
            format!("dispatch {id}: {row}; received {came:?}, begun {begun:?}")
        })
        .collect();
    told.push(format!("the fleet: {:?}", scene.fleet.counts()));
    told
}

async fn found(pool: &Pool, queries: &[(&str, &str)]) -> Vec<String> {
    let mut broken = Vec::new();
    for (what, sql) in queries {
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe((*sql).to_owned()))
            .fetch_all(pool)
            .await
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        if let Some(first) = rows.first() {
            broken.push(format!("{what}: {} times, first {first}", rows.len()));
        }
    }
    broken
}

/// Every accepted run is there under its key, and cancelled only if that was asked.
async fn runs(pool: &Pool, accepted: &Accepted) -> Vec<String> {
    let rows: Vec<(Uuid, Option<String>, String)> =
        sqlx::query_as("SELECT id, start_key, state FROM workflow_runs").fetch_all(pool).await.expect("the runs");
    let known: std::collections::HashMap<Uuid, (Option<String>, String)> =
        rows.into_iter().map(|(id, key, state)| (id, (key, state))).collect();
    let mut broken = Vec::new();
    for (id, key) in &accepted.runs {
        match known.get(id) {
            None => broken.push(format!("an accepted run is lost: {id} ({key})")),
            Some((found, _)) if found.as_ref() != Some(key) => broken.push(format!("run {id} has another key than {key}")),
            Some((_, state)) if state == "cancelled" && !accepted.cancels.contains(id) => {
                broken.push(format!("run {id} was cancelled and nobody asked"));
            }
            Some(_) => {}
        }
    }
    broken
}

/// Each device executed each dispatch once, and the engine knows of every one.
async fn dispatches(scene: &Scene, pool: &Pool) -> Vec<String> {
    let counts = scene.fleet.counts();
    let mut broken = Vec::new();
    if counts.doubled > 0 || counts.refused > 0 {
        broken.push(format!("dispatches executed twice or refused: {counts:?}"));
    }
    let successes: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM activity_history a JOIN devices d ON d.guid = a.device_guid WHERE a.status = 'Success' AND d.hostname <> $1",
    )
        .bind(HOSTNAME)
        .fetch_one(pool)
        .await
        .expect("a count");
    if u64::try_from(successes).unwrap_or(0) != counts.executed {
        broken.push(format!("{successes} activities succeeded, but the fleet executed {}", counts.executed));
    }
    broken
}

/// No instant of the recurrent job is missing between its first and its last.
async fn instants(pool: &Pool, accepted: &Accepted) -> Vec<String> {
    let sql = "SELECT scheduled_at::text FROM (
            SELECT scheduled_at, lag(scheduled_at) OVER (ORDER BY scheduled_at) AS before FROM job_occurrences WHERE job_id = $1) o
        WHERE scheduled_at - before <> make_interval(secs => $2)";
    #[allow(clippy::cast_precision_loss)]
    let gaps: Vec<String> =
        sqlx::query_scalar(sql).bind(accepted.recurrent).bind(PERIOD as f64).fetch_all(pool).await.expect("the instants");
    gaps.first()
        .map(|first| format!("instants of the recurrent job are missing {} times, first before {first}", gaps.len()))
        .into_iter()
        .collect()
}
