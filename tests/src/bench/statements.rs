//! Which statements a measured window spent Postgres' time in: `--statements`. For finding out; the figures themselves are
//! measured without it.

use std::sync::atomic::{AtomicBool, Ordering};

use borealis_engine::db::Pool;

static WANTED: AtomicBool = AtomicBool::new(false);

/// How many are printed.
const SHOWN: i64 = 25;
/// What the server of a bench is asked for then.
pub(super) const SETTING: &str = "ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'";

/// Has every bench of this process print them.
pub fn want() {
    WANTED.store(true, Ordering::Relaxed);
}

/// Whether they are wanted.
#[must_use]
pub fn are_wanted() -> bool {
    WANTED.load(Ordering::Relaxed)
}

/// Begins a window.
///
/// # Panics
/// When the server has no `pg_stat_statements`.
pub async fn begin(pool: &Pool) {
    if are_wanted() {
        for sql in [
            "CREATE EXTENSION IF NOT EXISTS pg_stat_statements",
            // What triggers and functions ask, too: foreign keys.
            "ALTER SYSTEM SET pg_stat_statements.track = 'all'",
            "ALTER SYSTEM SET pg_stat_statements.track_planning = on",
            "SELECT pg_reload_conf()",
            "SELECT pg_sleep(0.1)",
            "SELECT pg_stat_statements_reset()",
        ] {
            sqlx::raw_sql(sql).execute(pool).await.expect("pg_stat_statements");
        }
    }
}

/// Ends it, and prints the statements that took longest.
///
/// # Panics
/// When the database is away.
pub async fn print(pool: &Pool, window: &str) {
    print_by(pool, window, "total_exec_time + total_plan_time").await;
}

/// Ends it, and prints the statements with the most of `measure`, an expression over `pg_stat_statements`.
///
/// # Panics
/// When the database is away.
pub async fn print_by(pool: &Pool, window: &str, measure: &'static str) {
    if !are_wanted() {
        return;
    }
    let sql = format!(
        "SELECT calls, total_exec_time, total_plan_time, rows, shared_blks_hit + shared_blks_read AS pages, wal_bytes::bigint,
                left(regexp_replace(query, '\\s+', ' ', 'g'), 150) AS query
         FROM pg_stat_statements ORDER BY {measure} DESC LIMIT $1"
    );
    let rows: Vec<(i64, f64, f64, i64, i64, i64, String)> =
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(SHOWN).fetch_all(pool).await.expect("the statements");
    eprintln!("  statements of {window}: calls, ms, ms of planning, rows, pages, bytes of write-ahead log");
    for (calls, ms, planning, rows, pages, wal, query) in rows {
        eprintln!("  {calls:>8} {ms:>9.1} {planning:>8.1} {rows:>8} {pages:>9} {wal:>10}  {query}");
    }
}
