//! Virtual time: an instant that only the simulation moves, and connections whose Postgres believes it.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use borealis_engine::db::Pool;
use chrono::{DateTime, Utc};
use sqlx::{
    PgConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use url::Url;

/// Where virtual time begins: 2040, so that an instant of the real clock is recognized.
pub const BEGIN_MS: i64 = 2_208_988_800_000;
/// How long a statement waits for a lock. Whoever holds it cannot go on meanwhile, so waiting is in vain.
const LOCK_TIMEOUT: &str = "5ms";
/// The most connections: those of transactions that are held open, and one to work with.
pub const CONNECTIONS: u32 = 10;

/// The instant, in milliseconds since 1970, and the one at which Postgres was started.
#[derive(Debug, Clone)]
pub struct Clock {
    now: Arc<AtomicI64>,
    postmaster: Arc<AtomicI64>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { now: Arc::new(AtomicI64::new(BEGIN_MS)), postmaster: Arc::new(AtomicI64::new(BEGIN_MS - 3_600_000)) }
    }
}

impl Clock {
    /// Back to the beginning.
    pub fn reset(&self) {
        self.now.store(BEGIN_MS, Ordering::Relaxed);
        self.postmaster.store(BEGIN_MS - 3_600_000, Ordering::Relaxed);
    }

    /// Now, in milliseconds since 1970.
    #[must_use]
    pub fn now(&self) -> i64 {
        self.now.load(Ordering::Relaxed)
    }

    /// Now, as a date.
    #[must_use]
    pub fn date(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.now()).expect("an instant")
    }

    /// Lets time pass.
    pub fn advance(&self, milliseconds: i64) {
        self.now.fetch_add(milliseconds.max(0), Ordering::Relaxed);
    }

    /// Postgres has been started just now.
    pub fn restart_postgres(&self) {
        self.postmaster.store(self.now(), Ordering::Relaxed);
    }

    async fn set(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        sqlx::query("SELECT set_config('virtual.now', to_timestamp($1 / 1000.0)::text, false), set_config('virtual.postmaster', to_timestamp($2 / 1000.0)::text, false)")
            .bind(self.now())
            .bind(self.postmaster.load(Ordering::Relaxed))
            .execute(connection)
            .await?;
        Ok(())
    }

    /// A pool on `url` that lives in this time: a connection knows the instant at which it was taken from the pool.
    ///
    /// # Panics
    /// When the URL cannot be read.
    #[must_use]
    pub fn pool(&self, url: &Url) -> Pool {
        let options = PgConnectOptions::from_str(url.as_str()).expect("a readable database URL").options([
            ("search_path", "virtual,pg_catalog,public"),
            ("lock_timeout", LOCK_TIMEOUT),
            ("timezone", "UTC"),
            ("jit", "off"),
        ]);
        let (fresh, used) = (self.clone(), self.clone());
        PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(Duration::from_secs(10))
            .test_before_acquire(false)
            .after_connect(move |connection, _| {
                let clock = fresh.clone();
                Box::pin(async move { clock.set(connection).await })
            })
            .before_acquire(move |connection, _| {
                let clock = used.clone();
                Box::pin(async move { clock.set(connection).await.map(|()| true) })
            })
            .connect_lazy_with(options)
    }
}
