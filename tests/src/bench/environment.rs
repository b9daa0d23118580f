//! The Postgres, the programs and the machine a bench runs on.

use std::{fs, path::PathBuf};

use borealis_engine::db::{self, Pool};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use url::Url;

use super::statements;
use crate::{Processes, TestCluster};

/// A private Postgres with the settings `./borealis up` gives its own, and the programs on it. Everything ends with it.
#[derive(Debug)]
pub struct Environment {
    /// The server.
    pub cluster: TestCluster,
    /// The programs.
    pub processes: Processes,
    databases: u32,
}

/// One database of the server, prepared as the engine does it.
#[derive(Debug)]
pub struct Database {
    /// Where it is.
    pub url: Url,
    /// For the driver of the bench.
    pub pool: Pool,
}

impl Environment {
    /// Starts the server.
    ///
    /// # Panics
    /// When it does not take its settings.
    pub async fn start() -> Self {
        let mut cluster = TestCluster::durable().await;
        if statements::are_wanted() {
            let mut connection = PgConnection::connect(cluster.url().as_str()).await.expect("the bench's Postgres");
            sqlx::raw_sql(statements::SETTING).execute(&mut connection).await.expect("a setting");
            drop(connection);
            cluster = cluster.stop().await.start().await;
        }
        Self { cluster, processes: Processes::new(), databases: 0 }
    }

    /// Makes a database with every migration; programs started from now on use it.
    ///
    /// # Panics
    /// When it cannot.
    pub async fn database(&mut self, connections: u32) -> Database {
        self.databases += 1;
        let name = format!("bench_{}", self.databases);
        let admin = self.cluster.url();
        let mut connection = PgConnection::connect(admin.as_str()).await.expect("the bench's Postgres");
        let sql = format!("CREATE DATABASE {name}");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("a database");
        let mut url = admin;
        url.set_path(&name);
        let options = db::Options { url: url.to_string(), max_connections: connections, application_name: "bench".into() };
        let pool = db::connect(&options).expect("a readable database URL");
        borealis_workflows::setup(&pool).await.unwrap_or_else(|error| panic!("the set-up of the database: {error:?}"));
        self.processes.set("DATABASE_URL", url.as_str()).set("RUST_LOG", "warn");
        Database { url, pool }
    }
}

/// The machine, in one line: processor, cores, memory, kernel.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1_048_576.0;
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, {memory:.0} GiB, Linux {}", field(&read("/proc/cpuinfo"), "model name"), kernel.trim())
}

/// The resident memory of a process, in MiB.
#[must_use]
pub fn resident_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(PathBuf::from("/proc").join(pid.to_string()).join("status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).map(|rest| rest.trim().trim_end_matches(" kB"));
    kib.and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1_024.0
}

/// The processor time a process and the children it has reaped have used, in seconds.
#[must_use]
pub fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(PathBuf::from("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    let fields: Vec<f64> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().filter_map(|f| f.parse().ok()).collect();
    // After the name and the state letter: utime, stime, cutime and cstime are the 11th to 14th numbers, in ticks of 10 ms.
    fields.get(10..14).map_or(0.0, |ticks| ticks.iter().sum::<f64>() / 100.0)
}

/// The processor time of a process and of all its living descendants, in seconds: a Postgres with its backends.
#[must_use]
pub fn tree_cpu_seconds(root: u32) -> f64 {
    let children: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()))
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut total = 0.0;
    let mut open = vec![root];
    while let Some(pid) = open.pop() {
        total += cpu_seconds(pid);
        open.extend(children.iter().filter(|(_, parent)| *parent == pid).map(|(child, _)| *child));
    }
    total
}
