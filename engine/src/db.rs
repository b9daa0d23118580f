//! The connection to Postgres and the one history of migrations.

use std::{str::FromStr, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::error::{Error, Result};

/// The pool every store function takes.
pub type Pool = sqlx::PgPool;
/// A transaction; what is written through it is committed together.
pub type Tx<'a> = sqlx::Transaction<'a, sqlx::Postgres>;

static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");

/// How a process connects.
#[derive(Debug, Clone)]
pub struct Options {
    /// A `postgres://` URL; a unix socket folder goes into its `host` parameter.
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
    let connect = PgConnectOptions::from_str(&options.url)
        .map_err(|error| Error::invalid("invalid_database_url", format!("DATABASE_URL cannot be read: {error}")))?
        .application_name(&options.application_name)
        // A process that froze inside a transaction must not keep its locks for longer than its leases.
        .options([("idle_in_transaction_session_timeout", "10s")]);
    Ok(PgPoolOptions::new()
        .max_connections(options.max_connections)
        .acquire_timeout(Duration::from_secs(5))
        .idle_timeout(Duration::from_secs(300))
        .test_before_acquire(true)
        .connect_lazy_with(connect))
}

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
    MIGRATOR.run(pool).await.map_err(|error| match error {
        sqlx::migrate::MigrateError::Execute(error) => error.into(),
        other => Error::bug(other),
    })
}

/// Whether Postgres answers and has every migration of this version. What `/ready` reports.
///
/// # Errors
/// When it does not answer, or is behind.
pub async fn ready(pool: &Pool) -> Result<()> {
    let applied: i64 = sqlx::query_scalar("SELECT count(*) FROM _sqlx_migrations WHERE success").fetch_one(pool).await?;
    let known = MIGRATOR.iter().count();
    if usize::try_from(applied).unwrap_or(0) < known {
        return Err(Error::new(
            crate::error::Kind::Unavailable,
            "migrations_pending",
            format!("{applied} of {known} migrations are applied."),
        ));
    }
    Ok(())
}
