//! Tables and code agree: on the words of states and kinds, on what has ended, and on every checked query.

use std::collections::{BTreeMap, BTreeSet};

use borealis_engine::{
    access::{challenges::Purpose, directory::ProviderType, users::Role},
    devices::sockets::Mode,
    hold::Reason,
    jobs::{
        results::Status,
        run::RunStatus,
        schedule::{MisfirePolicy, OverlapPolicy, ScheduleType},
        spec::ExecutionContext,
    },
    scope::ActorKind,
};
use borealis_tests::TestDatabase;
use borealis_workflows::runs;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Column as _, Either, Executor as _, SqlSafeStr as _, Statement as _, TypeInfo as _};
use strum::VariantArray;

fn words<T: VariantArray + Copy + Into<&'static str>>() -> BTreeSet<String> {
    T::VARIANTS.iter().map(|word| (*word).into().to_owned()).collect()
}

/// The columns whose words an enum of the code has, all of them unless it says otherwise.
fn enums() -> BTreeMap<&'static str, BTreeSet<String>> {
    BTreeMap::from([
        ("activity_history.status", words::<Status>()),
        ("audit_events.actor_kind", words::<ActorKind>()),
        ("auth_challenges.purpose", words::<Purpose>()),
        ("device_sockets.service_mode", words::<Mode>()),
        ("directory_group_mappings.role", words::<Role>()),
        ("directory_providers.provider_type", words::<ProviderType>()),
        ("engine_epoch.held_reason", words::<Reason>()),
        ("scheduled_job_runs.status", words::<RunStatus>()),
        ("scheduled_jobs.execution_context", words::<ExecutionContext>()),
        ("scheduled_jobs.misfire_policy", words::<MisfirePolicy>()),
        ("scheduled_jobs.overlap_policy", words::<OverlapPolicy>()),
        ("scheduled_jobs.schedule_type", words::<ScheduleType>()),
        ("users.role", words::<Role>()),
        ("workflow_runs.state", runs::STATES.map(str::to_owned).into()),
    ])
}

/// Columns of whose words the code has only some so far.
const WIDER: [&str; 1] = ["scheduled_jobs.execution_context"];

/// Columns whose words only SQL knows.
const ONLY_IN_SQL: [&str; 14] = [
    "activity_history.delivery",
    "assemblies.assembly_type",
    "assemblies.domain",
    "audit_events.outcome",
    "credentials.connection_type",
    "credentials.credential_type",
    "device_approvals.kind",
    "device_approvals.status",
    "devices.status",
    "job_occurrences.cause",
    "job_occurrences.state",
    "scheduled_job_runs.resolution_status",
    "scheduled_jobs.job_kind",
    "users.auth_source",
];

/// The words of a constraint such as `CHECK ((state = ANY (ARRAY['open'::text, 'closed'::text])))`, and its column.
fn read(constraint: &str) -> Option<(&str, BTreeSet<String>)> {
    let (column, rest) = constraint.strip_prefix("CHECK ((")?.split_once(" = ANY (ARRAY[")?;
    let words = rest.strip_suffix("])))")?;
    let word = |word: &str| Some(word.trim().strip_prefix('\'')?.strip_suffix("'::text")?.to_owned());
    Some((column, words.split(',').map(word).collect::<Option<_>>()?))
}

#[tokio::test]
async fn tables_and_code_have_the_same_words() {
    let database = TestDatabase::start().await;
    let constraints: Vec<(String, String)> = sqlx::query_as(
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint
         WHERE contype = 'c' AND connamespace = 'public'::regnamespace AND conrelid <> 0",
    )
    .fetch_all(&database.pool)
    .await
    .expect("the constraints");
    let stored: BTreeMap<String, BTreeSet<String>> = constraints
        .iter()
        .filter_map(|(table, text)| read(text).map(|(column, words)| (format!("{table}.{column}"), words)))
        .collect();
    let enums = enums();
    let known: BTreeSet<&str> = enums.keys().copied().chain(ONLY_IN_SQL).collect();
    assert_eq!(stored.keys().map(String::as_str).collect::<BTreeSet<_>>(), known, "every set of words is known");
    for (column, words) in enums {
        let stored = &stored[column];
        if WIDER.contains(&column) {
            assert!(words.is_subset(stored), "{column}: {words:?} in {stored:?}");
        } else {
            assert_eq!(*stored, words, "{column}");
        }
    }
}

#[tokio::test]
async fn what_has_ended_stays_as_it_ended() {
    let database = TestDatabase::start().await;
    let fill = "
        INSERT INTO devices (guid, hostname, hostname_key, fingerprint, public_key)
            VALUES ('00000000-0000-7000-8000-000000000009', 'h', 'h', 'f', '');
        INSERT INTO workflow_runs (workflow, version, step, input, id, state, finished_at, error)
            VALUES ('w', 1, 's', '{}', '00000000-0000-7000-8000-000000000001', 'succeeded', now(), NULL),
                   ('w', 1, 's', '{}', '00000000-0000-7000-8000-000000000002', 'failed', now(), 'x');
        INSERT INTO scheduled_jobs (name, components, targets, schedule_type, start_at) VALUES ('job', '[]', '[]', 'daily', now());
        INSERT INTO job_occurrences (job_id, scheduled_at, cause, state) SELECT id, now(), 'schedule', 'closed' FROM scheduled_jobs;
        INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, target_hostname, finished_at)
            SELECT job_id, id, scheduled_at, 'Success', 'h', now() FROM job_occurrences;
        INSERT INTO activity_history (device_guid, hostname, status, delivery, request, finished_at)
            VALUES ('00000000-0000-7000-8000-000000000009', 'h', 'Failed', 'done', '{}', now());";
    sqlx::raw_sql(fill).execute(&database.pool).await.expect("the rows");
    for refused in [
        "UPDATE workflow_runs SET state = 'running', finished_at = NULL WHERE state = 'succeeded'",
        "UPDATE workflow_runs SET state = 'succeeded' WHERE state = 'failed'",
        "UPDATE scheduled_job_runs SET status = 'Failed'",
        "UPDATE activity_history SET status = 'Success'",
        "UPDATE activity_history SET delivery = 'ready'",
        "UPDATE job_occurrences SET state = 'open'",
    ] {
        let error = sqlx::query(refused).execute(&database.pool).await.expect_err(refused);
        let code = error.as_database_error().and_then(|error| error.code()).map(|code| code.into_owned());
        assert_eq!(code.as_deref(), Some("23514"), "{refused}: {error}");
    }
    for allowed in [
        "UPDATE workflow_runs SET state = 'pending', finished_at = NULL WHERE state = 'failed'",
        "UPDATE workflow_runs SET updated_at = now() WHERE state = 'succeeded'",
        "UPDATE activity_history SET stdout = 'late'",
    ] {
        let done = sqlx::query(allowed).execute(&database.pool).await.expect(allowed);
        assert_eq!(done.rows_affected(), 1, "{allowed}");
    }
}

/// The runtime knows nothing of the engine and judges errors of the database by itself. Both have to call the same ones transient.
#[tokio::test]
async fn runtime_and_engine_agree_on_what_is_transient() {
    let database = TestDatabase::start().await;
    let judged = |error: sqlx::Error| {
        let by_runtime = borealis_workflows::durable::error::is_transient(&error);
        let text = error.to_string();
        let by_engine = borealis_engine::Error::from(error).is_transient();
        assert_eq!(by_runtime, by_engine, "{text}");
        by_runtime
    };
    let mut transient = 0;
    for code in [
        "08000", "08006", "53100", "53300", "57P01", "57P03", "25006", "25P03", "40001", "40P01", "55P03", "22021", "22P05",
        "22003", "22008", "23505", "23514", "42601", "42P01", "26000", "57014", "25P02", "P0001", "XX000",
    ] {
        let sql = format!("DO $$ BEGIN RAISE EXCEPTION 'on purpose' USING ERRCODE = '{code}'; END $$");
        let error = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&database.pool).await.unwrap_err();
        assert_eq!(error.as_database_error().and_then(|error| error.code()).as_deref(), Some(code));
        transient += usize::from(judged(error));
    }
    assert_eq!(transient, 11);
    assert!(judged(sqlx::Error::PoolTimedOut) && judged(sqlx::Error::PoolClosed) && judged(sqlx::Error::WorkerCrashed));
    assert!(judged(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into())) && judged(sqlx::Error::Protocol(String::new())));
    assert!(!judged(sqlx::Error::RowNotFound) && !judged(sqlx::Error::ColumnNotFound(String::new())));
}

/// A type as `.sqlx` writes it, in the words of Postgres: `UuidArray` is `UUID[]`.
fn type_name(written: &Value) -> String {
    let name = written.as_str().or_else(|| written["Custom"]["name"].as_str()).unwrap_or_default();
    match name.strip_suffix("Array") {
        Some(element) => format!("{}[]", element.to_uppercase()),
        None => name.to_uppercase(),
    }
}

/// A build takes the types of parameters and columns from `.sqlx`; here they are compared with what Postgres says of each query. A query
/// without a file does not build, and a file without a query fails the house tests.
#[tokio::test]
async fn checked_queries_are_fresh() {
    let database = TestDatabase::start().await;
    let mut conn = database.pool.acquire().await.unwrap();
    let (mut count, mut wrong) = (0, Vec::new());
    for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.sqlx")).expect("the checked queries") {
        let path = file.expect("a file").path();
        let checked: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("a file")).expect("a checked query");
        let query = checked["query"].as_str().expect("a query");
        let describe = &checked["describe"];
        let listed = |list: &Value| list.as_array().cloned().unwrap_or_default();
        let parameters: Vec<String> = listed(&describe["parameters"]["Left"]).iter().map(type_name).collect();
        let columns: Vec<(String, String)> = listed(&describe["columns"])
            .iter()
            .map(|column| (column["name"].as_str().unwrap_or_default().to_owned(), type_name(&column["type_info"])))
            .collect();
        count += 1;
        let statement = match (&mut *conn).prepare(AssertSqlSafe(query.to_owned()).into_sql_str()).await {
            Ok(statement) => statement,
            Err(error) => {
                wrong.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        let name = |info: &sqlx::postgres::PgTypeInfo| info.name().to_uppercase();
        let now: Vec<(String, String)> =
            statement.columns().iter().map(|column| (column.name().to_owned(), name(column.type_info()))).collect();
        let takes: Vec<String> = match statement.parameters() {
            Some(Either::Left(types)) => types.iter().map(name).collect(),
            _ => Vec::new(),
        };
        if (&now, &takes) != (&columns, &parameters) {
            wrong.push(format!("{}: {takes:?} -> {now:?}, and written are {parameters:?} -> {columns:?}", path.display()));
        }
    }
    assert!(count > 400, "{count}");
    assert!(wrong.is_empty(), "run ./borealis prepare: {wrong:#?}");
}
