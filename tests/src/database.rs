//! A fresh, migrated database for every test, copied from a template that is made once per migration history.

use std::{
    str::FromStr,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use borealis_engine::{
    cluster::{Binaries, Cluster, Durability, Paths},
    db::{self, Pool},
};
use sha2::{Digest, Sha256};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::sync::OnceCell;
use url::Url;

/// Names the server the tests may make databases on: a `postgres://` URL.
pub const URL_VARIABLE: &str = "BOREALIS_TEST_DATABASE_URL";

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");
static COUNT: AtomicU32 = AtomicU32::new(0);
/// Any number that nothing else on the server locks.
const LOCK: i64 = 0x626f_7265_616c_6973;

/// A database of one test. Dropped with the value, also when the test panics.
#[derive(Debug)]
pub struct TestDatabase {
    /// Where it is.
    pub url: Url,
    /// A pool on it, for what a test looks at behind the API's back.
    pub pool: Pool,
    admin: Url,
    name: String,
}

impl TestDatabase {
    /// Makes one.
    pub async fn start() -> Self {
        Self::on(server().await).await
    }

    /// Makes one on a given server.
    pub async fn on(admin: Url) -> Self {
        let mut connection = connect(&admin).await;
        let template = template(&admin, &mut connection).await;
        let _ = connection.close().await;
        Self::create(admin, &format!("TEMPLATE {template}")).await
    }

    /// Makes one whose texts are compared as in this ICU locale: `tr-TR`.
    ///
    /// # Panics
    /// When it cannot be migrated.
    pub async fn in_locale(locale: &str) -> Self {
        let how = format!("TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE '{locale}'");
        let database = Self::create(server().await, &how).await;
        borealis_workflows::setup(&database.pool).await.unwrap_or_else(|error| panic!("the set-up in {locale}: {error:?}"));
        database
    }

    /// Makes one without tables.
    pub async fn empty() -> Self {
        Self::create(server().await, "TEMPLATE template0").await
    }

    async fn create(admin: Url, how: &str) -> Self {
        let mut connection = connect(&admin).await;
        let name = format!("borealis_x_{}_{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        execute(&mut connection, format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await;
        execute(&mut connection, format!("CREATE DATABASE {name} {how}")).await;
        let _ = connection.close().await;
        let url = at(&admin, &name);
        let pool = db::connect(&db::Options { url: url.to_string(), max_connections: 8, application_name: "tests".into() })
            .expect("a readable database URL");
        Self { url, pool, admin, name }
    }
}

impl TestDatabase {
    /// Makes one with the migrations before `version` alone, to be migrated by the test.
    ///
    /// # Panics
    /// When one of them cannot be applied.
    pub async fn before(version: i64) -> Self {
        let database = Self::create(server().await, "TEMPLATE template0").await;
        let earlier = sqlx::migrate::Migrator {
            migrations: MIGRATIONS.iter().filter(|migration| migration.version < version).cloned().collect(),
            ..sqlx::migrate::Migrator::DEFAULT
        };
        earlier.run(&database.pool).await.unwrap_or_else(|error| panic!("the migrations before {version}: {error}"));
        database
    }

    /// Executes statements.
    ///
    /// # Panics
    /// When Postgres refuses one.
    pub async fn execute(&self, sql: impl Into<String>) {
        let mut connection = connect(&self.url).await;
        execute(&mut connection, sql.into()).await;
        let _ = connection.close().await;
    }

    /// What somebody with all rights over the database can do: a statement that no trigger stops.
    ///
    /// # Panics
    /// When Postgres refuses it.
    pub async fn tamper(&self, sql: &str) {
        let mut tx = self.pool.begin().await.expect("a transaction");
        for statement in ["SET LOCAL session_replication_role = replica", sql] {
            let done = sqlx::query(AssertSqlSafe(statement.to_owned())).execute(&mut *tx).await;
            let _ = done.unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
        tx.commit().await.expect("a commit");
    }
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (admin, name) = (self.admin.clone(), self.name.clone());
        // On a thread with a runtime of its own, because this may run while the test's runtime unwinds.
        let dropper = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async {
                let options = PgConnectOptions::from_str(admin.as_str()).ok()?;
                let drop = async {
                    let mut connection = PgConnection::connect_with(&options).await.ok()?;
                    let sql = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
                    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.ok()
                };
                tokio::time::timeout(Duration::from_secs(10), drop).await.ok()?
            })
        });
        let _ = dropper.join();
    }
}

/// The server to use: the named one, or one of this process' own, which ends with it.
async fn server() -> Url {
    match std::env::var(URL_VARIABLE) {
        Ok(url) => Url::parse(&url).unwrap_or_else(|error| panic!("{URL_VARIABLE} cannot be read: {error}")),
        Err(_) => OWN.get_or_init(TestCluster::start).await.url(),
    }
}

static OWN: OnceCell<TestCluster> = OnceCell::const_new();

/// A Postgres of a test's own, to be stopped and started.
#[derive(Debug)]
pub struct TestCluster {
    cluster: Cluster,
    paths: Paths,
    durability: Durability,
    _folder: tempfile::TempDir,
}

impl TestCluster {
    /// Makes and starts one; takes a second or two.
    pub async fn start() -> Self {
        Self::with(Durability::Test).await
    }

    /// Makes and starts one that commits as the one of `./borealis up` does, for measurements.
    pub async fn durable() -> Self {
        Self::with(Durability::Bench).await
    }

    async fn with(durability: Durability) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-postgres-").tempdir().expect("a folder");
        let paths = Paths::under(folder.path());
        let cluster = start(&paths, durability).await;
        Self { cluster, paths, durability, _folder: folder }
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.cluster.pid().as_raw().unsigned_abs()
    }

    /// A program of the server's version.
    ///
    /// # Panics
    /// When its version is not installed any more.
    #[must_use]
    pub fn program(&self, name: &str) -> std::path::PathBuf {
        Binaries::find(self.paths.data()).expect("an installed PostgreSQL").file(name)
    }

    /// The folder the server is below, as below an engine's state folder.
    #[must_use]
    pub fn state_dir(&self) -> &std::path::Path {
        self._folder.path()
    }

    /// The last lines of the server's log.
    #[must_use]
    pub fn last_words(&self, lines: usize) -> String {
        let text = std::fs::read(self.paths.log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }

    /// The server's maintenance database.
    #[must_use]
    pub fn url(&self) -> Url {
        Url::parse(&self.cluster.url("postgres")).expect("a URL")
    }

    /// Stops the server, as for maintenance; [`StoppedCluster::start`] brings it back at the same place.
    pub async fn stop(self) -> StoppedCluster {
        // A test cluster commits without waiting for its disk; what it has answered must not be lost here.
        let mut connection = connect(&self.url()).await;
        execute(&mut connection, "CHECKPOINT".into()).await;
        let Self { cluster, paths, durability, _folder } = self;
        cluster.stop().await.unwrap_or_else(|error| panic!("the test's Postgres does not stop: {error:?}"));
        StoppedCluster { paths, durability, _folder }
    }
}

impl TestCluster {
    /// Ends the server at once, as a crash does: it comes back by its log.
    pub async fn crash(self) -> StoppedCluster {
        let Self { mut cluster, paths, durability, _folder } = self;
        nix::sys::signal::kill(cluster.pid(), nix::sys::signal::Signal::SIGQUIT).expect("the test's Postgres runs");
        cluster.exited().await;
        StoppedCluster { paths, durability, _folder }
    }
}

/// A Postgres that is away for now.
#[derive(Debug)]
pub struct StoppedCluster {
    paths: Paths,
    durability: Durability,
    _folder: tempfile::TempDir,
}

impl StoppedCluster {
    /// Starts a copy of it as a standby that waits to be promoted.
    ///
    /// # Panics
    /// When it cannot be copied.
    pub async fn standby(&self) -> TestCluster {
        let folder = tempfile::Builder::new().prefix("borealis-standby-").tempdir().expect("a folder");
        let paths = Paths::under(folder.path());
        let copied =
            std::process::Command::new("cp").arg("-a").arg(self._folder.path().join("postgres")).arg(folder.path()).status();
        assert!(copied.is_ok_and(|status| status.success()), "the data folder cannot be copied");
        std::fs::write(paths.data().join("standby.signal"), "").expect("a file in the data folder");
        let cluster = start(&paths, self.durability).await;
        TestCluster { cluster, paths, durability: self.durability, _folder: folder }
    }

    /// Starts it again.
    pub async fn start(self) -> TestCluster {
        let Self { paths, durability, _folder } = self;
        let cluster = start(&paths, durability).await;
        TestCluster { cluster, paths, durability, _folder }
    }
}

async fn start(paths: &Paths, durability: Durability) -> Cluster {
    Cluster::start(paths, durability).await.unwrap_or_else(|error| panic!("no Postgres for the tests: {error}"))
}

fn at(admin: &Url, name: &str) -> Url {
    let mut url = admin.clone();
    url.set_path(name);
    url
}

async fn connect(url: &Url) -> PgConnection {
    let options = PgConnectOptions::from_str(url.as_str()).expect("a readable database URL");
    PgConnection::connect_with(&options).await.unwrap_or_else(|error| panic!("Postgres at {url}: {error}"))
}

async fn execute(connection: &mut PgConnection, sql: String) {
    if let Err(error) = sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await {
        panic!("{sql}: {error}");
    }
}

/// The name of the template database of this migration history, which exists when this returns. Also removes what
/// earlier test processes left behind.
async fn template(admin: &Url, connection: &mut PgConnection) -> String {
    let mut hash = Sha256::new();
    for migration in MIGRATIONS.iter() {
        hash.update(&*migration.checksum);
    }
    let name = format!("borealis_t_{}", &hex(&hash.finalize())[..16]);
    sqlx::query("SELECT pg_advisory_lock($1)").bind(LOCK).execute(&mut *connection).await.expect("a lock");
    let names: Vec<String> = sqlx::query_scalar("SELECT datname::text FROM pg_database WHERE datname LIKE 'borealis\\_%'")
        .fetch_all(&mut *connection)
        .await
        .expect("the list of databases");
    for left in names.iter().filter(|name| is_left_over(name)) {
        let sql = format!("DROP DATABASE IF EXISTS {left} WITH (FORCE)");
        let _ = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await;
    }
    if !names.contains(&name) {
        // Under another name until it is whole, so that a template is never half made.
        let making = format!("{name}_making");
        execute(connection, format!("DROP DATABASE IF EXISTS {making} WITH (FORCE)")).await;
        execute(connection, format!("CREATE DATABASE {making}")).await;
        let pool = PgPoolOptions::new()
            .max_connections(2)
            .connect(at(admin, &making).as_str())
            .await
            .expect("a connection to the new template");
        borealis_workflows::setup(&pool).await.unwrap_or_else(|error| panic!("the set-up of the queue: {error:?}"));
        pool.close().await;
        execute(connection, format!("ALTER DATABASE {making} RENAME TO {name}")).await;
    }
    sqlx::query("SELECT pg_advisory_unlock($1)").bind(LOCK).execute(&mut *connection).await.expect("an unlock");
    name
}

/// Whether a database belongs to a test process that is gone.
fn is_left_over(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("borealis_x_") else { return false };
    let Some((pid, _)) = rest.split_once('_') else { return false };
    pid.parse::<u32>().is_ok_and(|pid| !std::path::Path::new("/proc").join(pid.to_string()).exists())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
