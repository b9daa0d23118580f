//! The private Postgres: a cluster of our own on the machine's server binaries, for who brings no `DATABASE_URL`.
//!
//! It listens on a unix socket only and never runs as root. Its folder lies in the state directory, which nobody but its
//! owner may enter, and the unprivileged server does not have to: it is handed the data folder as an open directory and
//! knows it as `/proc/self/fd/9`. A cluster outlives a crash of the process that started it; the next start finds it by its
//! `postmaster.pid` and goes on with it.

use std::{
    fs,
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};
use tokio::{
    process::{Child, ChildStdin, Command},
    time::sleep,
};

use crate::{
    db::Cause,
    error::{Error, Kind, Result},
    state_dir::{self, unusable},
};

mod account;
mod binaries;
mod socket;

use account::Account;
pub use account::SERVICE_USER;
pub use binaries::{Binaries, OLDEST_SERVER};

/// The database the engine lives in.
pub const DATABASE: &str = "borealis";
/// How long the server may take to create its folder.
const INITDB_LIMIT: Duration = Duration::from_secs(180);
/// How long the server may take until it answers; after a crash it first replays its log.
const READY_LIMIT: Duration = Duration::from_secs(600);
/// How long a fast shutdown may take before it is forced.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How often a server that exits before it answers is started again.
const ATTEMPTS: u32 = 3;
/// Where a cluster keeps what.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Holds `data`; ours alone.
    folder: PathBuf,
    data: PathBuf,
    log: PathBuf,
}

impl Paths {
    /// The places inside a state directory: `postgres/data` and `logs/postgres.log`.
    #[must_use]
    pub fn under(state_dir: &Path) -> Self {
        let folder = state_dir.join("postgres");
        Self { data: folder.join("data"), folder, log: state_dir.join("logs").join("postgres.log") }
    }

    /// The data folder.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The server's log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }
}

/// What a power cut may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Nothing that was committed; the cluster outlives a crash of ours.
    Full,
    /// Nothing either, but the cluster ends with the process that started it, however that ends: for measurements.
    Bench,
    /// Everything: for tests. The cluster also ends with the process that started it.
    Test,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    paths: Paths,
    process: Process,
    socket: PathBuf,
    /// Ends a test cluster when its pipe breaks.
    _warden: Option<(Child, ChildStdin)>,
}

#[derive(Debug)]
enum Process {
    Started(Child, Pid),
    TakenOver(Pid),
}

/// Ends a server whose start is given up half-way.
struct Begun(Option<Pid>);

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill(pid, Signal::SIGINT);
        }
    }
}

/// Why a start did not succeed.
enum Failed {
    /// The server ended before it answered; another try may help.
    Exited,
    Fatal(Error),
}

impl<E: Into<Error>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Fatal(error.into())
    }
}

impl Cluster {
    /// Starts the cluster, or goes on with the one that runs on the same folder. Creates the folder at the first start, and the
    /// database [`DATABASE`] when it is missing. Returns when the server answers.
    ///
    /// # Errors
    /// When no suitable server is installed, the folder belongs to somebody else, or the server does not come up; the message
    /// says what to do.
    pub async fn start(paths: &Paths, durability: Durability) -> Result<Self> {
        let mut attempt = 1;
        loop {
            match Self::try_start(paths, durability).await {
                Ok(cluster) => return Ok(cluster),
                Err(Failed::Fatal(error)) => return Err(error),
                Err(Failed::Exited) if attempt < ATTEMPTS => {
                    tracing::warn!(attempt, log = %paths.log.display(), "postgres ended before it answered; starting it again");
                    attempt += 1;
                    sleep(Duration::from_secs(1)).await;
                }
                Err(Failed::Exited) => {
                    let said = last_lines(&paths.log, 5);
                    return Err(Error::new(
                        Kind::Unavailable,
                        "postgres_does_not_start",
                        format!("PostgreSQL ended right after its start. Its log {} ends with:\n{said}", paths.log.display()),
                    ));
                }
            }
        }
    }

    async fn try_start(paths: &Paths, durability: Durability) -> Result<Self, Failed> {
        state_dir::own(&paths.folder)?;
        // Before anything is started: a folder that cannot be used must not leave a server behind.
        let socket = socket::reachable(&paths.data.join(socket::FOLDER))?;
        let process = match running(&paths.data).await? {
            Some(pid) => {
                tracing::info!(pid = pid.as_raw(), "going on with the postgres that runs already");
                Process::TakenOver(pid)
            }
            None => launch(paths, durability).await?,
        };
        let mut cluster = Self { paths: paths.clone(), process, socket, _warden: None };
        let mut begun = Begun((!cluster.taken_over()).then(|| cluster.pid()));
        let ready = async {
            if durability != Durability::Full {
                cluster._warden = Some(warden(cluster.pid())?);
            }
            cluster.until_ready().await
        };
        let ready = ready.await;
        let begun = begun.0.take();
        match ready {
            Ok(()) => Ok(cluster),
            Err(Failed::Fatal(error)) if begun.is_some() => {
                if let Err(error) = cluster.stop().await {
                    tracing::error!(%error, "the postgres of a failed start cannot be stopped");
                }
                Err(Failed::Fatal(error))
            }
            Err(failed) => Err(failed),
        }
    }

    /// How to reach a database of this cluster.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        url(&self.socket, database)
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        match self.process {
            Process::Started(_, pid) | Process::TakenOver(pid) => pid,
        }
    }

    /// Whether the server was running before [`Cluster::start`].
    #[must_use]
    pub fn taken_over(&self) -> bool {
        matches!(self.process, Process::TakenOver(_))
    }

    /// Waits until the server ends by itself. Meanwhile keeps the short way to its socket in place. Cancel safe.
    pub async fn exited(&mut self) {
        let mut last_check = Instant::now();
        loop {
            if self.has_exited() {
                return;
            }
            sleep(Duration::from_millis(250)).await;
            if last_check.elapsed() > Duration::from_secs(60) {
                last_check = Instant::now();
                if let Err(error) = socket::reachable(&self.paths.data.join(socket::FOLDER)) {
                    tracing::warn!(%error, "the way to postgres's socket cannot be kept");
                }
            }
        }
    }

    /// Stops the server: open transactions are rolled back, everything committed is on disk when this returns.
    ///
    /// # Errors
    /// When the server cannot be signalled.
    pub async fn stop(mut self) -> Result<()> {
        self._warden = None;
        let last_word = Duration::from_secs(5);
        for (signal, limit) in [(Signal::SIGINT, STOP_LIMIT), (Signal::SIGQUIT, last_word), (Signal::SIGKILL, last_word)] {
            if self.has_exited() {
                return Ok(());
            }
            if signal != Signal::SIGINT {
                tracing::warn!(%signal, "postgres does not stop; forcing it");
            }
            match kill(self.pid(), signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(Error::bug(error)),
            }
            let deadline = Instant::now() + limit;
            while Instant::now() < deadline {
                if self.has_exited() {
                    return Ok(());
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
        Err(Error::new(Kind::Unavailable, "postgres_does_not_stop", "PostgreSQL did not end."))
    }

    fn has_exited(&mut self) -> bool {
        match &mut self.process {
            Process::Started(child, _) => !matches!(child.try_wait(), Ok(None)),
            Process::TakenOver(pid) => !exists(*pid),
        }
    }

    async fn until_ready(&mut self) -> Result<(), Failed> {
        let options: PgConnectOptions = self.url("postgres").parse().map_err(Error::bug)?;
        let options = options.application_name("borealis start").disable_statement_logging();
        let started = Instant::now();
        let mut said = Instant::now();
        loop {
            if self.has_exited() {
                return Err(Failed::Exited);
            }
            match options.connect().await {
                Ok(mut connection) => {
                    create_database(&mut connection).await?;
                    let _ = connection.close().await;
                    return Ok(());
                }
                Err(error) if is_refusal(&error) => return Err(refused(&self.paths, error).into()),
                Err(error) if started.elapsed() > READY_LIMIT => {
                    let mut timeout = Error::new(
                        Kind::Unavailable,
                        "postgres_does_not_answer",
                        format!("PostgreSQL runs but does not answer; its log is {}.", self.paths.log.display()),
                    );
                    timeout.source = Some(Box::new(Cause(error)));
                    return Err(timeout.into());
                }
                Err(_) => {}
            }
            if said.elapsed() > Duration::from_secs(5) {
                said = Instant::now();
                tracing::info!(seconds = started.elapsed().as_secs(), "waiting for postgres to recover");
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// How to reach a database of the cluster that somebody else runs at these places; none while nobody does. Starts nothing.
///
/// # Errors
/// When there is no short way to the socket.
pub async fn find(paths: &Paths, database: &str) -> Result<Option<String>> {
    let folder = paths.data.join(socket::FOLDER);
    if !folder.exists() {
        return Ok(None);
    }
    let folder = socket::reachable(&folder)?;
    let answers = tokio::net::UnixStream::connect(folder.join(socket::NAME)).await.is_ok();
    Ok(answers.then(|| url(&folder, database)))
}

fn url(socket: &Path, database: &str) -> String {
    // Port and TLS are named so that a PGPORT or PGSSLMODE of the caller's environment changes nothing.
    format!(
        "postgres://{SERVICE_USER}@localhost:5432/{}?host={}&sslmode=disable",
        percent(database),
        percent(&socket.to_string_lossy())
    )
}

/// Creates the engine's database when it is missing.
async fn create_database(connection: &mut sqlx::PgConnection) -> Result<()> {
    let present: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = 'borealis')")
        .fetch_one(&mut *connection)
        .await?;
    if !present {
        sqlx::query("CREATE DATABASE borealis").execute(connection).await?;
    }
    Ok(())
}

/// Whether the server answered and does not want us; anything else may pass.
fn is_refusal(error: &sqlx::Error) -> bool {
    // 28: authorization; 3D: no such database.
    error.as_database_error().and_then(|db| db.code()).is_some_and(|code| code.starts_with("28") || code.starts_with("3D"))
}

fn refused(paths: &Paths, error: sqlx::Error) -> Error {
    let mut refused = Error::new(
        Kind::Unavailable,
        "postgres_refuses",
        format!("The PostgreSQL on {} does not let this user in.", paths.data.display()),
    );
    refused.source = Some(Box::new(Cause(error)));
    refused
}

/// The server that runs on `data`, if one does. Takes away the note of a dead one when its process id belongs to somebody else
/// now, as Postgres would then refuse to start.
async fn running(data: &Path) -> Result<Option<Pid>> {
    let note = data.join("postmaster.pid");
    let Ok(text) = fs::read_to_string(&note) else { return Ok(None) };
    let Some(pid) = text.lines().next().and_then(|line| line.trim().parse().ok()).filter(|pid| *pid > 1).map(Pid::from_raw)
    else {
        return Ok(None);
    };
    // Its socket may need a moment, and so may the end of a server that is going down.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if !exists(pid) {
            return Ok(None);
        }
        match works_on(pid, data).await {
            Some(true) => return Ok(Some(pid)),
            Some(false) => {
                fs::remove_file(&note).map_err(Error::bug)?;
                return Ok(None);
            }
            None if Instant::now() > deadline => return Ok(None),
            None => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Whether `pid` is a Postgres on `data`; none when that cannot be told now.
async fn works_on(pid: Pid, data: &Path) -> Option<bool> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() != "postgres") {
        return Some(false);
    }
    // The postmaster works inside its data folder. Root without CAP_SYS_PTRACE may not look there; its socket tells then.
    if let (Ok(cwd), Ok(own)) = (fs::metadata(process.join("cwd")), fs::metadata(data)) {
        return Some((cwd.dev(), cwd.ino()) == (own.dev(), own.ino()));
    }
    let folder = socket::reachable(&data.join(socket::FOLDER)).ok()?;
    let stream = tokio::net::UnixStream::connect(folder.join(socket::NAME)).await.ok()?;
    (stream.peer_cred().ok()?.pid()? == pid.as_raw()).then_some(true)
}

fn exists(pid: Pid) -> bool {
    kill(pid, None) != Err(Errno::ESRCH)
}

async fn launch(paths: &Paths, durability: Durability) -> Result<Process> {
    let binaries = Binaries::find(&paths.data)?;
    let account = Account::for_data(&paths.data)?;
    if !paths.data.join("PG_VERSION").exists() {
        create(paths, &binaries, &account, durability).await?;
    }
    admit(&paths.data, &account)?;
    sockets_folder(&paths.data, &account)?;
    let log = state_dir::open_log(&paths.log)?;
    let mut command = inside(&paths.data, &binaries.file("postgres"), &account)?;
    command
        .args(["-D", INSIDE, "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700", "-c"])
        .arg(format!("unix_socket_directories={INSIDE}/{}", socket::FOLDER))
        .stdout(Stdio::from(log.try_clone().map_err(Error::bug)?))
        .stderr(Stdio::from(log))
        // Ctrl-C in a terminal reaches every process of the group; the server is stopped last, by us.
        .process_group(0);
    if durability == Durability::Test {
        for setting in TEST_SETTINGS {
            command.args(["-c", setting]);
        }
    }
    let child = command.spawn().map_err(|error| cannot_run(&binaries.file("postgres"), error))?;
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::bug("a process without an id"))?;
    Ok(Process::Started(child, pid))
}

/// How the server knows its data folder: descriptor 9, which [`inside`] opens for it.
const INSIDE: &str = "/proc/self/fd/9";

const TEST_SETTINGS: [&str; 5] =
    ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=64MB", "max_connections=300"];

/// A command that runs `program` as `account` with `data` open as descriptor 9. The shell moves the descriptor there from
/// standard input, so that no other child of ours can inherit it.
fn inside(data: &Path, program: &Path, account: &Account) -> Result<Command> {
    let folder = fs::File::open(data).map_err(|error| unusable(data, error))?;
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec \"$@\" 9<&0 </dev/null", "sh"]);
    if account.is_other {
        command.args(["setpriv", "--clear-groups", "--no-new-privs"]);
        command.arg(format!("--reuid={}", account.uid)).arg(format!("--regid={}", account.gid)).arg("--");
    }
    command.arg(program).stdin(Stdio::from(folder)).current_dir("/").env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
    Ok(command)
}

/// Creates the data folder beside its place and moves it there when it is complete, so that a crash leaves nothing half-done.
async fn create(paths: &Paths, binaries: &Binaries, account: &Account, durability: Durability) -> Result<()> {
    tracing::info!(data = %paths.data.display(), version = binaries.version, "creating the private postgres cluster");
    let draft = paths.folder.join("data.new");
    if paths.data.exists() {
        // An empty folder may be a mount point; anything else is not ours to touch.
        fs::remove_dir(&paths.data).map_err(|error| {
            Error::new(
                Kind::Conflict,
                "data_folder_in_use",
                format!("{} is not a PostgreSQL data folder and cannot be replaced: {error}.", paths.data.display()),
            )
        })?;
    }
    match fs::remove_dir_all(&draft) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::bug(error)),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(&draft).map_err(|error| unusable(&draft, error))?;
    std::os::unix::fs::chown(&draft, Some(account.uid), Some(account.gid)).map_err(Error::bug)?;
    let mut command = inside(&draft, &binaries.file("initdb"), account)?;
    command.args(["-D", INSIDE, "-U", SERVICE_USER, "-A", "peer", "-E", "UTF8", "--no-locale", "--data-checksums"]);
    if durability == Durability::Test {
        command.arg("--no-sync");
    }
    let output = tokio::time::timeout(INITDB_LIMIT, command.kill_on_drop(true).output())
        .await
        .map_err(|_| Error::new(Kind::Unavailable, "initdb_timeout", "initdb did not end within three minutes."))?
        .map_err(|error| cannot_run(&binaries.file("initdb"), error))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(Kind::Unavailable, "initdb_failed", format!("initdb failed: {}", said.trim())));
    }
    let conf = draft.join("postgresql.conf");
    let mut text = fs::read_to_string(&conf).map_err(Error::bug)?;
    text.push_str(SETTINGS);
    replace(&conf, &text, account)?;
    fs::rename(&draft, &paths.data).map_err(Error::bug)
}

/// Written once, when the cluster is created, so that an operator's later edits stay.
const SETTINGS: &str = "
# Borealis Engine: sized for a small machine. Change what you need, this file is not written again.
max_connections = 200
shared_buffers = 128MB
effective_cache_size = 512MB
maintenance_work_mem = 64MB
wal_buffers = 8MB
checkpoint_completion_target = 0.9
max_wal_size = 1GB
min_wal_size = 80MB
wal_level = replica
autovacuum_naptime = 15s
idle_in_transaction_session_timeout = 60s
log_line_prefix = '%m [%p] %q%a '
log_checkpoints = off
log_timezone = 'UTC'
timezone = 'UTC'
";

/// Who may connect: the account the server runs under, this process's user and root, each as the cluster's owner.
fn admit(data: &Path, account: &Account) -> Result<()> {
    let mut users = vec![account.name.clone(), "root".to_owned(), account::own_name()?];
    users.sort();
    users.dedup();
    let map: String = users.iter().map(|user| format!("own \"{}\" {SERVICE_USER}\n", user.replace('"', "\"\""))).collect();
    replace(&data.join("pg_hba.conf"), "local all all peer map=own\n", account)?;
    replace(&data.join("pg_ident.conf"), &map, account)
}

fn sockets_folder(data: &Path, account: &Account) -> Result<()> {
    let folder = data.join(socket::FOLDER);
    match fs::DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => std::os::unix::fs::lchown(&folder, Some(account.uid), Some(account.gid)).map_err(Error::bug),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::bug(error)),
    }
}

/// Writes a file of the server's as a whole. We may be root and the folder is the server's, so no link in it is followed.
fn replace(path: &Path, text: &str, account: &Account) -> Result<()> {
    let draft = path.with_extension("borealis-new");
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::bug(error)),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).map_err(Error::bug)?;
    file.write_all(text.as_bytes()).map_err(Error::bug)?;
    std::os::unix::fs::fchown(&file, Some(account.uid), Some(account.gid)).map_err(Error::bug)?;
    file.sync_all().map_err(Error::bug)?;
    fs::rename(&draft, path).map_err(Error::bug)
}

/// A process that ends the server when its pipe to us breaks: also when we are killed.
fn warden(server: Pid) -> Result<(Child, ChildStdin)> {
    let mut child = Command::new("/bin/sh")
        .args(["-c", "cat >/dev/null; kill -QUIT \"$1\" 2>/dev/null", "sh"])
        .arg(server.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0)
        .spawn()
        .map_err(|error| cannot_run(Path::new("/bin/sh"), error))?;
    let pipe = child.stdin.take().ok_or_else(|| Error::bug("a child without a pipe"))?;
    Ok((child, pipe))
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(count)).map(|line| format!("  {line}\n")).collect()
}

fn cannot_run(program: &Path, error: std::io::Error) -> Error {
    let mut cannot = Error::new(Kind::Unavailable, "cannot_run", format!("{} cannot be run: {error}.", program.display()));
    cannot.source = Some(Box::new(error));
    cannot
}

/// Percent-encodes everything a query value may not hold as it is.
fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_planted_in_the_servers_folder_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        for name in ["pg_hba.conf", "pg_hba.borealis-new"] {
            std::os::unix::fs::symlink(&victim, folder.path().join(name)).unwrap();
        }
        let account = Account::for_data(folder.path()).unwrap_or_else(|_| Account::current().unwrap());
        replace(&folder.path().join("pg_hba.conf"), "local", &account).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_to_string(folder.path().join("pg_hba.conf")).unwrap(), "local");
    }

    #[test]
    fn a_url_survives_odd_paths() {
        assert_eq!(percent("/a b/ü&c=d"), "/a%20b/%C3%BC%26c%3Dd");
    }

    #[tokio::test]
    async fn the_note_of_a_dead_server_whose_id_is_somebody_elses_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("postmaster.pid");
        fs::write(&note, format!("{}\n/proc/self/fd/9\n", std::process::id())).unwrap();
        assert_eq!(running(folder.path()).await.unwrap(), None);
        assert!(!note.exists(), "a living process that is no postgres would keep postgres from starting");
    }
}
