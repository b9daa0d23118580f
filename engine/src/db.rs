//! The connection to Postgres and the one history of migrations.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{AssertSqlSafe, Connection, Executor, postgres::PgPoolOptions};

use crate::{
    error::{Error, Result},
    names, schema,
};

mod address;
mod cause;
mod check;
mod former;

pub use address::Address;
pub use cause::Cause;
pub use check::{check, check_at_start};

/// The setting that names the database.
pub const SETTING: &str = "DATABASE_URL";

/// The pool every store function takes.
pub type Pool = sqlx::PgPool;
/// A transaction; what is written through it is committed together.
pub type Tx<'a> = sqlx::Transaction<'a, sqlx::Postgres>;

/// How long Postgres may take to say that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(6);

pub(crate) static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");

/// How a process connects.
#[derive(Debug, Clone)]
pub struct Options {
    /// A `postgres://` URL, as [`Address`] reads it.
    pub url: String,
    /// The most connections this process opens.
    pub max_connections: u32,
    /// Shown in `pg_stat_activity`.
    pub application_name: String,
}

/// Opens a pool. Connections are made when first needed, so this succeeds while Postgres is away.
///
/// # Errors
/// When the URL cannot be read.
pub fn connect(options: &Options) -> Result<Pool> {
    let connect = Address::parse(&options.url)?.connect_options();
    // A pooler takes no parameter it does not know; floating-point numbers are read in binary, and need no further digits.
    let connect = connect.application_name(&options.application_name).extra_float_digits(None);
    Ok(pool(options.max_connections, &[]).connect_lazy_with(connect))
}

/// A second, small pool to the same database, for what must not wait behind requests or steps. `settings` are set on each of its
/// connections, beside those every connection of the engine has; they are not taken from `main`.
#[must_use]
pub fn sibling(main: &Pool, max_connections: u32, settings: &[(&str, &str)]) -> Pool {
    pool(max_connections, settings).connect_lazy_with((*main.connect_options()).clone())
}

/// A connection that was used a moment ago is used again without asking; one that has been idle may be gone and is tried.
fn pool(max_connections: u32, settings: &[(&str, &str)]) -> PgPoolOptions {
    // Set on the connection and not asked for in its startup message, where a pooler refuses them.
    let sql: String =
        LIMITS.iter().chain(settings).map(|(name, value)| format!("SET {name} = '{}';", value.replace('\'', "''"))).collect();
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(Duration::from_secs(5))
        // Costs nothing while nobody listens; metrics do.
        .acquire_time_level(log::LevelFilter::Trace)
        .idle_timeout(Duration::from_secs(300))
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            let sql = AssertSqlSafe(sql.clone());
            Box::pin(async move { connection.execute(sqlx::raw_sql(sql)).await.map(|_| ()) })
        })
        .before_acquire(|connection, about| {
            Box::pin(async move {
                if about.idle_for > TRUSTED_FOR {
                    // One that does not answer is closed, and the next one tried.
                    let silent = |_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into());
                    tokio::time::timeout(PING_LIMIT, connection.ping()).await.map_err(silent)??;
                }
                Ok(true)
            })
        })
}

/// The pools of this process that are looked at by name, each for as long as its [`Watched`] lives.
static WATCHED: Mutex<Vec<(u64, &str, Pool)>> = Mutex::new(Vec::new());

fn all_watched() -> MutexGuard<'static, Vec<(u64, &'static str, Pool)>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a pool among those that [`pools`] tells of.
#[derive(Debug)]
pub struct Watched(u64);

impl Drop for Watched {
    fn drop(&mut self) {
        all_watched().retain(|(id, ..)| *id != self.0);
    }
}

/// How much of a pool is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolUse {
    /// What the pool is for.
    pub name: &'static str,
    /// Connections that are open.
    pub open: u32,
    /// Those of them that wait for work.
    pub idle: u32,
    /// The most that may be open.
    pub max: u32,
}

/// Has [`pools`] tell of a pool.
#[must_use]
pub fn watch(name: &'static str, pool: &Pool) -> Watched {
    let mut watched = all_watched();
    let id = watched.iter().map(|(id, ..)| *id).max().unwrap_or(0) + 1;
    watched.push((id, name, pool.clone()));
    Watched(id)
}

/// How much of the watched pools is used; pools of the same name are one.
#[must_use]
pub fn pools() -> Vec<PoolUse> {
    let mut all: Vec<PoolUse> = Vec::new();
    for (_, name, pool) in all_watched().iter() {
        let (open, idle) = (pool.size(), u32::try_from(pool.num_idle()).unwrap_or(u32::MAX));
        let max = pool.options().get_max_connections();
        match all.iter_mut().find(|one| one.name == *name) {
            Some(one) => (one.open, one.idle, one.max) = (one.open + open, one.idle + idle, one.max + max),
            None => all.push(PoolUse { name, open, idle, max }),
        }
    }
    all
}

static TIMEOUTS: AtomicU64 = AtomicU64::new(0);

/// Counts an error that said that no connection came free in time.
pub(crate) fn count_timeout() {
    TIMEOUTS.fetch_add(1, Ordering::Relaxed);
}

/// How often no connection came free in time, since the start of the process.
#[must_use]
pub fn timeouts() -> u64 {
    TIMEOUTS.load(Ordering::Relaxed)
}

/// What is set on every connection. A process that froze inside a transaction must not keep its locks for longer than its leases.
/// The others have Postgres notice a process that has vanished without a word, so that it holds no locks for long; they are
/// without effect on a unix socket, and behind a pooler they watch the pooler.
const LIMITS: [(&str, &str); 6] = [
    // To compile a statement takes longer than any of ours may.
    ("jit", "off"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("tcp_user_timeout", "15s"),
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
];
/// How long a connection that is tried may take to answer.
const PING_LIMIT: Duration = Duration::from_secs(2);
/// How long an idle connection is taken to be alive.
const TRUSTED_FOR: Duration = Duration::from_secs(1);

/// A transaction for statements over many rows. Each is planned for the tables as they are now: a plan kept from the time when
/// they were empty may read all of a table for every row of another, until Postgres has analyzed them.
///
/// # Errors
/// When the database is away.
pub async fn begin_wide(pool: &Pool) -> Result<Tx<'static>> {
    Ok(pool.begin_with("BEGIN; SET LOCAL plan_cache_mode = force_custom_plan").await?)
}

/// The same for the rest of a transaction that has begun.
///
/// # Errors
/// When the database refuses.
pub async fn plan_afresh(conn: &mut sqlx::PgConnection) -> Result<()> {
    sqlx::raw_sql("SET LOCAL plan_cache_mode = force_custom_plan").execute(conn).await?;
    Ok(())
}

/// Brings the database to this version. Safe to call from several processes at once: sqlx takes an advisory lock.
///
/// # Errors
/// When Postgres is away, or its history is not a prefix of ours.
pub async fn migrate(pool: &Pool) -> Result<()> {
    former::accept(pool).await?;
    if let Err(error) = MIGRATOR.run(pool).await {
        return Err(schema::not_migrated(pool, error).await);
    }
    names::backfill::run(pool).await?;
    Ok(())
}

/// Whether Postgres answers within `limit`: also with an error of its own, but not that it is going down or full.
pub async fn answers(pool: &Pool, limit: Duration) -> bool {
    match tokio::time::timeout(limit, sqlx::query("SELECT 1").execute(pool)).await {
        Ok(Ok(_)) => true,
        Ok(Err(sqlx::Error::Database(error))) => {
            error.code().is_some_and(|code| !["08", "53", "57P"].iter().any(|class| code.starts_with(class)))
        }
        Ok(Err(_)) | Err(_) => false,
    }
}

/// Whether Postgres answers, has every migration of this version and takes writes. What `/ready` reports.
///
/// # Errors
/// When it does not answer in time, is of another version, only lets itself be read, or the role lacks a right.
pub async fn ready(pool: &Pool) -> Result<()> {
    let unavailable = |code, message: String| Error::new(crate::error::Kind::Unavailable, code, message).retry_after(2);
    let asking = async {
        schema::check(pool).await?;
        let read_only: bool =
            sqlx::query_scalar("SELECT current_setting('transaction_read_only')::boolean").fetch_one(pool).await?;
        if read_only {
            return Err(unavailable("database_read_only", "The database takes no writes now.".to_owned()));
        }
        Ok(())
    };
    tokio::time::timeout(READY_LIMIT, asking).await.map_err(|_| {
        unavailable("database_unavailable", format!("The database did not answer within {} s.", READY_LIMIT.as_secs()))
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pool_is_told_of_while_it_is_watched() {
        let url = "postgres://nobody@localhost/none?host=/nowhere".to_owned();
        let pool = connect(&Options { url, max_connections: 3, application_name: String::new() }).unwrap();
        let told = || pools().into_iter().filter(|one| one.name == "of the test").collect::<Vec<_>>();
        let (first, second) = (watch("of the test", &pool), watch("of the test", &pool));
        assert_eq!(told(), [PoolUse { name: "of the test", open: 0, idle: 0, max: 6 }]);
        drop(first);
        assert_eq!(told(), [PoolUse { name: "of the test", open: 0, idle: 0, max: 3 }]);
        drop(second);
        assert_eq!(told(), []);
    }
}
