//! The hottest queries on large tables, as Postgres really runs them: by an index, without sorting what a page does not show,
//! without reading what it throws away. The texts are those of the code, taken from the checked queries in `.sqlx`.
//!
//! 10,000 devices, 200,000 runs that wait for a worker, and `BOREALIS_PLAN_ROWS` finished ones: 500,000 unless set, so that a
//! test run has them in its minutes. The same checks at the size the engine is meant for:
//! `BOREALIS_PLAN_ROWS=5000000 ./borealis test --profile large -E 'binary(plans)' --no-capture`.

use borealis_tests::{TestDatabase, probe::NoAgents};
use borealis_workflows::{Services, durable::worker::PLANS, housekeeping};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

const DEVICES: i64 = 10_000;
const WAITING: i64 = 200_000;
const JOBS: i64 = 10_000;
/// Since when they wait: all since the same instant, as runs that were started together do.
const READY_AT: &str = "2020-01-01T00:00:00Z";
/// A job that has run on every device, so often in the last 60 days.
const MASS_JOB: i64 = 7;
const MASS_TIMES: i64 = 20;
/// Tables that are never to be read from end to end.
const LARGE: [&str; 7] =
    ["workflow_runs", "workflow_events", "jobs", "activity_history", "scheduled_job_runs", "job_occurrences", "scheduled_jobs"];

/// Rows that may be sorted for the sake of a few.
const SORTED_MAX: i64 = 1_000;

/// A query of the code and what it may cost.
struct Case {
    name: &'static str,
    /// Texts that this query has and no other.
    has: &'static [&'static str],
    /// Its arguments, as SQL.
    arguments: String,
    /// Pages it may touch.
    pages: i64,
    /// Rows it may read and throw away.
    in_vain: i64,
    /// Whether it runs on the runtime's own connections, with their settings.
    of_runtime: bool,
    /// Whether it runs in a transaction of `db::begin_wide`, with a plan of its own each time.
    wide: bool,
}

fn rows() -> i64 {
    std::env::var("BOREALIS_PLAN_ROWS").ok().map_or(500_000, |rows| rows.parse().expect("a number of rows"))
}

async fn execute(pool: &PgPool, sql: String) {
    let mut connection = pool.acquire().await.expect("a connection");
    sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut *connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Fills the tables. What has ended is spread over the last 60 days; one in a thousand has failed.
async fn fill(pool: &PgPool) {
    let rows = rows();
    let occurrences = rows / 10;
    let id = |n: &str, kind: u32| format!("('{kind:08}-0000-7000-8000-' || lpad(to_hex({n}), 12, '0'))::uuid");
    for sql in [
        "INSERT INTO sites (name, name_key, description, enrollment_code) SELECT 'site ' || n, 'site ' || n, '', 'code' || n FROM generate_series(1, 20) n".to_owned(),
        format!(
            "INSERT INTO devices (guid, hostname, hostname_key, site_id, fingerprint, public_key, last_seen)
             SELECT {}, 'host-' || n, 'host-' || n, 1 + n % 20, 'f' || n, '', now() FROM generate_series(1, {DEVICES}) n",
            id("n", 1)
        ),
        "INSERT INTO device_sockets (device_guid, service_mode, socket_id, api_process)
             SELECT guid, 'system', guid::text, '00000000-0000-0000-0000-000000000001' FROM devices"
            .to_owned(),
        format!(
            "INSERT INTO workflow_runs (id, workflow, version, state, step, event_seq, seq, input, started_at, finished_at, created_at, error, owner_id)
             SELECT {}, 'scheduled_run', 1, CASE WHEN n % 1000 = 0 THEN 'failed' ELSE 'succeeded' END, 'finish', 2, 1, '{{}}', t, t, t,
                    CASE WHEN n % 1000 = 0 THEN 'x' END, 1 + n % {JOBS}
             FROM (SELECT n, now() - (({rows} - n)::float8 / {rows}) * interval '60 days' AS t FROM generate_series(1, {rows}) n) AS old",
            id("n", 2)
        ),
        "INSERT INTO workflow_events (run_id, seq, kind) SELECT id, 1, 'created' FROM workflow_runs".to_owned(),
        "INSERT INTO workflow_events (run_id, seq, kind, step, attempt, worker, step_seq, output)
         SELECT id, 2, 'succeeded', 'finish', 1, 'w', 0, 'null' FROM workflow_runs"
            .to_owned(),
        format!(
            "INSERT INTO workflow_runs (id, workflow, version, state, step, event_seq, input, ready_at)
             SELECT {}, 'scheduled_run', 1, 'pending', 'resolve', 1, '{{}}', '{READY_AT}' FROM generate_series(1, {WAITING}) n",
            id("n", 3)
        ),
        "INSERT INTO workflow_events (run_id, seq, kind) SELECT id, 1, 'created' FROM workflow_runs WHERE state = 'pending'".to_owned(),
        "INSERT INTO apalis.jobs (id, job_type, job, status, attempts, max_attempts, run_at, priority)
         SELECT id || ':1', 'scheduled_run.v1', uuid_send(id), 'Pending', 0, 1, now() - interval '1 hour', 0
         FROM workflow_runs WHERE state = 'pending'"
            .to_owned(),
        format!(
            "INSERT INTO workflow_runs (id, workflow, version, state, step, event_seq, input, lease_token, lease_expires_at, worker, attempt)
             SELECT {}, 'scheduled_run', 1, 'running', 'resolve', 1, '{{}}', {}, now() + interval '1 hour', 'w', 1 FROM generate_series(1, 1000) n",
            id("n", 4),
            id("n", 5)
        ),
        format!(
            "INSERT INTO workflow_runs (id, workflow, version, state, step, event_seq, input, parked, wait_until, wait_signal)
             SELECT {}, 'scheduled_run', 1, 'waiting', 'results', 1, '{{}}', true, now() + n * interval '1 hour', 'results' FROM generate_series(1, 20000) n",
            id("n", 6)
        ),
        format!(
            "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at, next_due_at)
             SELECT 'job ' || n, '[]', jsonb_build_array(jsonb_build_object('kind', 'device', 'device_guid', {}, 'site_id', 1 + n % 20)), 'daily', now(),
                    now() + n * interval '1 minute' FROM generate_series(1, {JOBS}) n",
            id("1 + n % 10000", 1)
        ),
        format!(
            "INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at, finished_at, created_at)
             SELECT 1 + n % {JOBS}, t, 'schedule', 'closed', t, t, t
             FROM (SELECT n, now() - (({occurrences} - n)::float8 / {occurrences}) * interval '60 days' AS t FROM generate_series(1, {occurrences}) n) AS old"
        ),
        format!(
            "INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, device_guid, target_hostname, site_id, started_at, finished_at, created_at)
             SELECT o.job_id, o.id, o.scheduled_at, 'Success', {}, 'host-' || n, 1 + n % 20, o.created_at, o.created_at, o.created_at
             FROM job_occurrences o, generate_series(1, 10) n",
            id("1 + (o.id * 10 + n) % 10000", 1)
        ),
        format!(
            "INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at, finished_at, created_at)
             SELECT {MASS_JOB}, t, 'schedule', 'closed', t, t, t FROM (SELECT now() - n * interval '3 days' AS t FROM generate_series(0, {MASS_TIMES} - 1) n) AS old"
        ),
        format!(
            "INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, device_guid, target_hostname, site_id, started_at, finished_at, created_at)
             SELECT o.job_id, o.id, o.scheduled_at, 'Success', d.guid, d.hostname, d.site_id, o.created_at, o.created_at, o.created_at
             FROM job_occurrences o, devices d WHERE o.id > {occurrences}"
        ),
        "INSERT INTO activity_history (device_guid, hostname, site_id, run_id, status, request, delivery, created_at, finished_at)
         SELECT device_guid, target_hostname, site_id, id, 'Success', '{}', 'done', created_at, finished_at FROM scheduled_job_runs"
            .to_owned(),
        "INSERT INTO activity_history (device_guid, hostname, site_id, request, deliver_until)
         SELECT guid, hostname, site_id, '{}', now() + interval '1 hour' FROM devices WHERE hostname LIKE 'host-1%'"
            .to_owned(),
    ] {
        // Without triggers: what refers to what is known here.
        execute(pool, format!("BEGIN; SET LOCAL session_replication_role = replica; {sql}; COMMIT")).await;
    }
    for table in LARGE.into_iter().chain(["devices", "device_sockets", "sites"]) {
        let schema = if table == "jobs" { "apalis" } else { "public" };
        execute(pool, format!("VACUUM ANALYZE {schema}.{table}")).await;
    }
}

/// The text of the only checked query that has all these.
fn query(case: &Case) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../.sqlx");
    let mut found = Vec::new();
    for file in std::fs::read_dir(folder).expect("the checked queries") {
        let text = std::fs::read_to_string(file.expect("a file").path()).expect("a file");
        let checked: Value = serde_json::from_str(&text).expect("a checked query");
        let query = checked["query"].as_str().expect("a query").to_owned();
        if case.has.iter().all(|part| query.contains(part)) {
            found.push(query);
        }
    }
    assert_eq!(found.len(), 1, "{}: {} queries have {:?}", case.name, found.len(), case.has);
    found.remove(0)
}

/// Every node of a plan, with the kind of the node above it.
fn nodes<'a>(plan: &'a Value, above: &'a str, all: &mut Vec<(&'a Value, &'a str)>) {
    all.push((plan, above));
    let kind = plan["Node Type"].as_str().unwrap_or_default();
    // A lock between a limit and what it limits changes nothing.
    let kind = if kind == "LockRows" { above } else { kind };
    for below in plan["Plans"].as_array().into_iter().flatten() {
        nodes(below, kind, all);
    }
}

fn faults(case: &Case, plan: &Value) -> Vec<String> {
    let mut all = Vec::new();
    nodes(plan, "", &mut all);
    let mut faults = Vec::new();
    for (node, above) in all {
        let (kind, table) = (node["Node Type"].as_str().unwrap_or_default(), node["Relation Name"].as_str().unwrap_or_default());
        if kind == "Seq Scan" && LARGE.contains(&table) {
            faults.push(format!("reads all of {table}"));
        }
        let sorted = node["Plans"][0]["Actual Rows"].as_i64().unwrap_or(0);
        if kind == "Sort" && above == "Limit" && sorted > SORTED_MAX {
            faults.push(format!("sorts {sorted} rows for a page"));
        }
        let loops = node["Actual Loops"].as_f64().unwrap_or(1.0);
        let vain: f64 =
            ["Rows Removed by Filter", "Rows Removed by Join Filter"].iter().filter_map(|key| node[key].as_f64()).sum();
        if vain * loops > case.in_vain as f64 {
            faults.push(format!("{kind} of {table} throws {} rows away", vain * loops));
        }
    }
    let pages = plan["Shared Hit Blocks"].as_i64().unwrap_or(0) + plan["Shared Read Blocks"].as_i64().unwrap_or(0);
    if pages > case.pages {
        faults.push(format!("touches {pages} pages, {} are allowed", case.pages));
    }
    faults
}

/// Runs a query as it is run for the seventh time: Postgres has then settled on a plan for these arguments or for any.
async fn explain(connection: &mut PgConnection, case: &Case) -> Option<String> {
    let mut sql = "BEGIN; SET LOCAL jit = off;".to_owned();
    if case.wide {
        sql.push_str("SET LOCAL plan_cache_mode = force_custom_plan;");
    }
    if case.of_runtime {
        for (name, value) in PLANS {
            sql.push_str(&format!("SET LOCAL {name} = {value};"));
        }
    }
    sql.push_str(&format!("PREPARE hot AS {};", query(case)));
    for _ in 0..6 {
        sql.push_str(&format!("EXPLAIN EXECUTE hot{};", case.arguments));
    }
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await.unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE hot{}", case.arguments);
    let row = sqlx::raw_sql(AssertSqlSafe(explain))
        .fetch_one(&mut *connection)
        .await
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let plan: Value = sqlx::Row::get(&row, 0);
    sqlx::raw_sql("ROLLBACK; DEALLOCATE ALL").execute(&mut *connection).await.expect("a rollback");
    let plan = &plan[0];
    let pages =
        plan["Plan"]["Shared Hit Blocks"].as_i64().unwrap_or(0) + plan["Plan"]["Shared Read Blocks"].as_i64().unwrap_or(0);
    println!("{:<26} {:>8.2} ms {pages:>8} pages", case.name, plan["Execution Time"].as_f64().unwrap_or(0.0));
    let faults = faults(case, &plan["Plan"]);
    (!faults.is_empty()).then(|| format!("{}: {}\n{:#}", case.name, faults.join("; "), plan["Plan"]))
}

/// Ids of the leased runs and their tokens, as array literals.
fn leased(kind: u32, count: u32) -> String {
    let ids: Vec<String> = (1..=count).map(|n| format!("{kind:08}-0000-7000-8000-{n:012x}")).collect();
    format!("'{{{}}}'", ids.join(","))
}

fn repeat(value: &str, count: usize) -> String {
    format!("'{{{}}}'", vec![value; count].join(","))
}

fn cases() -> Vec<Case> {
    let (ids, tokens) = (leased(4, 100), leased(5, 100));
    let case = |name, has, arguments: String, pages, in_vain| Case {
        name,
        has,
        arguments,
        pages,
        in_vain,
        of_runtime: false,
        wide: false,
    };
    let wide = |name, has, arguments, pages, in_vain| Case { wide: true, ..case(name, has, arguments, pages, in_vain) };
    let runtime = |name, has, arguments, pages, in_vain| Case { of_runtime: true, ..case(name, has, arguments, pages, in_vain) };
    // As the parameters of the statements are, one element for each of the runs.
    let columns = |values: &[&str]| values.iter().map(|value| repeat(value, 100)).collect::<Vec<_>>().join(", ");
    let hand_over = columns(&["0", "1", "resolve", "dispatch", "\"{}\""]);
    let release = columns(&["0", "resolve", "retry", "NULL", "\"{}\"", "x", "NULL", "false", "NULL", "500", "\"{}\"", "1"]);
    let none = columns(&["false"]);
    vec![
        runtime(
            "claim",
            &["apalis.jobs", "consumed AS", "SKIP LOCKED", "is_child!"],
            "('scheduled_run.v1', 100, 'w')".into(),
            20_000,
            10_000,
        ),
        runtime(
            "commit: hand over",
            &["SET step = a.next_step, seq = r.seq + 1"],
            format!("({ids}, {tokens}, {hand_over}, 'w')"),
            10_000,
            100,
        ),
        runtime(
            "commit: release",
            &["UPDATE workflow_runs r", "workflow_becomes", "r.seq = a.seq"],
            format!("({ids}, {tokens}, {release}, 'w', {none})"),
            20_000,
            100,
        ),
        runtime(
            "renew leases",
            &["SET lease_expires_at = now() + interval '10 seconds' FROM held", "AS run_id"],
            format!("({ids}, {tokens})"),
            10_000,
            100,
        ),
        runtime("expired leases", &["lease_expires_at < now() AND pg_postmaster_start_time()"], "(500)".into(), 500, 10),
        runtime("ended waits", &["parked AND wait_until <= now()"], "(500)".into(), 500, 10),
        // A piece is looked at whole, and what has its hint is thrown away.
        runtime("lost hints", &["piece AS MATERIALIZED", "workflow_hint"], "(NULL, NULL, 1000)".into(), 10_000, 1_000),
        runtime(
            "lost hints, further on",
            &["piece AS MATERIALIZED", "workflow_hint"],
            format!("('{READY_AT}', '00000003-0000-7000-8000-000000010000', 1000)"),
            10_000,
            1_000,
        ),
        case("due jobs", &["FROM scheduled_jobs WHERE enabled AND next_due_at <= now()"], "(100, 0)".into(), 500, 10),
        case("nearest job", &["SELECT extract(epoch FROM min(next_due_at)"], String::new(), 500, 10),
        case(
            "next device page",
            &["SELECT guid, hostname_key, created_at FROM devices WHERE (hostname_key, guid) >"],
            "('host-5', '00000001-0000-7000-8000-000000000005', 101)".into(),
            500,
            100,
        ),
        wide(
            "device page",
            &["SELECT d.guid, d.hostname_key, d.created_at FROM devices AS d"],
            "(NULL, NULL, NULL, false, NULL, NULL, NULL, false, NULL, NULL, 'hostname', 101, NULL)".into(),
            500,
            100,
        ),
        wide(
            "a later device page",
            &["SELECT d.guid, d.hostname_key, d.created_at FROM devices AS d"],
            "(NULL, NULL, NULL, false, NULL, NULL, 'host-5', false, '00000001-0000-7000-8000-000000000005', NULL, 'hostname', 101, NULL)".into(),
            500,
            10_000,
        ),
        wide(
            "devices of a hostname",
            &["SELECT d.guid, d.hostname_key, d.created_at FROM devices AS d"],
            "(NULL, 'host-5', NULL, false, NULL, NULL, NULL, false, NULL, NULL, 'hostname', 101, NULL)".into(),
            20,
            10,
        ),
        case(
            "devices of a page",
            &["unnest((SELECT $1::uuid[])) WITH ORDINALITY AS wanted"],
            format!("({}, NULL, false)", leased(1, 100)),
            2_500,
            2_000,
        ),
        case("one device", &["unnest((SELECT $1::uuid[])) WITH ORDINALITY AS wanted"], format!("({}, NULL, true)", leased(1, 1)), 50, 100),
        case(
            "job list",
            &["without_devices", "ORDER BY j.id DESC LIMIT $5"],
            "(NULL, NULL, NULL, NULL, 101, NULL)".into(),
            20_000,
            500,
        ),
        case(
            "runs of a mass job",
            &["FROM scheduled_job_runs r JOIN job_occurrences o", "LIMIT $6"],
            format!("({MASS_JOB}, NULL, 60, NULL, NULL, 101)"),
            1_500,
            100,
        ),
        case(
            "runs of a mass job, a later page",
            &["FROM scheduled_job_runs r JOIN job_occurrences o", "LIMIT $6"],
            format!("({MASS_JOB}, NULL, 60, now() - interval '20 days', 1, 101)"),
            1_500,
            100,
        ),
        case(
            "history of a device",
            &["FROM activity_history a", "A page is cut by id"],
            "('00000001-0000-7000-8000-000000000005', NULL, NULL, 51)".into(),
            5_000,
            100,
        ),
        case(
            "history of a device, a later page",
            &["FROM activity_history a", "A page is cut by id"],
            "('00000001-0000-7000-8000-000000000005', NULL, 400000, 51)".into(),
            1_500,
            100,
        ),
        case("deliveries: open", &["FROM unnest((SELECT $1::uuid[])) AS n (guid)"], format!("({})", leased(1, 100)), 1_500, 100),
        case(
            "deliveries: due",
            &["SELECT DISTINCT s.device_guid FROM device_sockets s"],
            "('00000000-0000-0000-0000-000000000001', 0)".into(),
            60_000,
            100,
        ),
        case(
            "deliveries: take",
            &["UPDATE activity_history a SET delivery = CASE WHEN kept.again"],
            format!("('00000000-0000-0000-0000-000000000001', {}, true, 64, 1000000, 0)", leased(1, 100)),
            20_000,
            10_000,
        ),
        case("deliveries: expired", &["delivery = 'ready' AND deliver_until <= now()"], "(1000)".into(), 500, 10),
        case(
            "run list",
            &["FROM workflow_runs\n", "ORDER BY id DESC LIMIT $6"],
            "(NULL, NULL, NULL, NULL, NULL, 51)".into(),
            500,
            100,
        ),
        case(
            "run list, a later page",
            &["FROM workflow_runs\n", "ORDER BY id DESC LIMIT $6"],
            "(NULL, NULL, NULL, NULL, '00000002-0000-7000-8000-000000010000', 51)".into(),
            500,
            100,
        ),
        case("retention: runs", &["DELETE FROM workflow_runs WHERE id = ANY"], "(30, 2000)".into(), 60_000, 100),
        case("retention: activities", &["DELETE FROM activity_history WHERE id = ANY"], "(30, 2000)".into(), 60_000, 100),
        case("retention: occurrences", &["DELETE FROM job_occurrences WHERE id = ANY"], "(30, 2000)".into(), 100_000, 100),
        case(
            "run list, failed ones",
            &["FROM workflow_runs\n", "ORDER BY id DESC LIMIT $6"],
            "(NULL, NULL, 'failed', NULL, NULL, 51)".into(),
            500,
            100,
        ),
        case(
            "run list of a job",
            &["FROM workflow_runs\n", "ORDER BY id DESC LIMIT $6"],
            "(NULL, NULL, NULL, 17, NULL, 51)".into(),
            500,
            100,
        ),
        case("abandoned occurrences", &["the run that carried it out is gone"], "(2000)".into(), 500, 10),
        case("waiting occurrences", &["SELECT DISTINCT ON (o.job_id) o.id"], "(2000)".into(), 500, 10),
        runtime("metrics: what is alive", &["AS \"schedulers!\"", "AS \"leased!\""], String::new(), 5_000, 10),
        runtime("metrics: ready runs", &["AS \"queue!\", count(*) AS \"runs!\""], "(100000)".into(), 150_000, 10),
        runtime("metrics: open activities", &["SELECT delivery AS \"delivery!\""], "(100000)".into(), 20_000, 10),
        case("limits of runs", &["status = 'Running' AND stop_after_s IS NOT NULL"], "(2000)".into(), 500, 10),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hottest_queries_keep_their_plans_on_large_tables() {
    let database = TestDatabase::start().await;
    let began = std::time::Instant::now();
    fill(&database.pool).await;
    println!("{} finished rows, filled in {:.0} s", rows(), began.elapsed().as_secs_f64());
    let mut connection = database.pool.acquire().await.expect("a connection");
    let mut found = Vec::new();
    for case in cases() {
        found.extend(explain(&mut connection, &case).await);
    }
    assert!(found.is_empty(), "{}", found.join("\n\n"));
    drop(connection);

    // Retention goes on batch by batch until nothing old is left, and touches nothing else.
    let services = Services { pool: database.pool.clone(), agents: std::sync::Arc::new(NoAgents) };
    let count = async |sql: &'static str| -> i64 { sqlx::query_scalar(sql).fetch_one(&database.pool).await.expect("a count") };
    let (began, mut batches) = (std::time::Instant::now(), 0);
    while housekeeping::sweep(&services, 30).await.expect("a sweep") {
        batches += 1;
        assert!(batches < 10_000, "retention has no end");
    }
    println!("retention: {batches} batches in {:.1} s", began.elapsed().as_secs_f64());
    for (what, sql) in [
        ("old runs", "SELECT count(*) FROM workflow_runs WHERE finished_at < now() - interval '30 days 1 hour'"),
        ("old activities", "SELECT count(*) FROM activity_history WHERE finished_at < now() - interval '30 days 1 hour'"),
        (
            "events of nobody",
            "SELECT count(*) FROM workflow_events e WHERE NOT EXISTS (SELECT FROM workflow_runs r WHERE r.id = e.run_id)",
        ),
    ] {
        assert_eq!(count(sql).await, 0, "{what}");
    }
    assert_eq!(count("SELECT count(*) FROM workflow_runs WHERE finished_at IS NULL").await, WAITING + 21_000);
    assert!(count("SELECT count(*) FROM workflow_runs WHERE finished_at IS NOT NULL").await > rows() / 3);
}
