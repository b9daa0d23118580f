//! The supervisor with real processes: it starts everything on a state folder only its owner may enter, restarts what dies,
//! stops cleanly, leaves a cluster behind a crash that the next start goes on with, and runs beside another one.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use borealis_tests::{Child, Processes, TestDatabase, eventually, processes::free_port};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const SOON: Duration = Duration::from_secs(60);

/// A machine's worth of engine: a state folder below one that nobody else may enter, and two ports.
struct Machine {
    processes: Processes,
    port: u16,
    state: PathBuf,
    _folder: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-ops-").tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let state = folder.path().join("state");
        let mut processes = Processes::new();
        let port = free_port();
        processes
            .set("BOREALIS_STATE_DIR", state.to_str().unwrap())
            .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
            .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
        Self { processes, port, state, _folder: folder }
    }

    fn start(&mut self) -> Child {
        self.processes.start("borealis-api", &["up"])
    }

    async fn answers(&self, path: &str) -> Option<String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let client = client();
        let answer = client.get(url).timeout(Duration::from_secs(5)).send().await.ok()?;
        let answer = answer.error_for_status().ok()?;
        answer.text().await.ok()
    }

    async fn is_ready(&self) {
        eventually("the engine is ready", SOON, || self.answers("/ready")).await;
    }

    /// The private Postgres, when its note is there.
    fn postgres(&self) -> Option<Pid> {
        let note = std::fs::read_to_string(self.state.join("postgres/data/postmaster.pid")).ok()?;
        note.lines().next()?.trim().parse().ok().map(Pid::from_raw)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // What a failed test leaves behind: a killed supervisor leaves its Postgres.
        if let Some(pid) = self.postgres().filter(|pid| name(*pid) == "postgres") {
            let _ = kill(pid, Signal::SIGQUIT);
            for _ in 0..100 {
                if !lives(pid) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn name(pid: Pid) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// Whether a process runs; one that waits for its parent to notice does not.
fn lives(pid: Pid) -> bool {
    stat(pid).is_some_and(|(_, state, _)| state != "Z")
}

/// A process's parent, state and command line.
fn stat(pid: Pid) -> Option<(Pid, String, String)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.to_owned();
    let parent = Pid::from_raw(fields.next()?.parse().ok()?);
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some((parent, state, String::from_utf8_lossy(&line).replace('\0', " ")))
}

/// The child of `parent` whose command line contains `what`.
fn child_of(parent: u32, what: &str) -> Option<Pid> {
    let parent = Pid::from_raw(i32::try_from(parent).ok()?);
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw));
    pids.find(|pid| stat(*pid).is_some_and(|(of, state, line)| of == parent && state != "Z" && line.contains(what)))
}

async fn gone(what: &str, pid: Pid) {
    eventually(&format!("{what} {pid} ends"), SOON, || async move { (!lives(pid)).then_some(()) }).await;
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn everything_starts_restarts_and_stops() {
    let mut machine = Machine::new();
    let up = machine.start();
    machine.is_ready().await;
    let phase = machine.answers("/api/bootstrap/state").await;
    if let Some(phase) = phase {
        assert!(phase.contains("aegis_setup_required"), "{phase}");
    }
    assert_eq!(mode(&machine.state), 0o700);
    assert_eq!(mode(&machine.state.join("postgres")), 0o700);
    let postgres = machine.postgres().unwrap();

    // A second one on the same folder is refused and told why, and changes nothing.
    let mut second = machine.start();
    assert_eq!(second.wait(SOON).await.code(), Some(75));
    assert!(second.output().contains(&format!("process {}", up.pid())), "{}", second.output());

    // The API dies and comes back.
    let api = child_of(up.pid(), "borealis-api serve").expect("an API process");
    kill(api, Signal::SIGKILL).unwrap();
    eventually("another API process", SOON, || async { child_of(up.pid(), "borealis-api serve").filter(|pid| *pid != api) })
        .await;
    machine.is_ready().await;

    // Postgres dies and comes back.
    kill(postgres, Signal::SIGKILL).unwrap();
    eventually("another Postgres", SOON, || async { machine.postgres().filter(|pid| *pid != postgres && lives(*pid)) }).await;
    machine.is_ready().await;
    let postgres = machine.postgres().unwrap();

    assert_eq!(up.terminate().await.code(), Some(0));
    assert!(!lives(postgres), "Postgres still runs after a clean stop");
    assert!(machine.postgres().is_none(), "Postgres was not stopped cleanly");
    assert!(machine.answers("/health").await.is_none());
}

#[tokio::test]
async fn a_killed_supervisor_leaves_a_cluster_the_next_one_goes_on_with() {
    let mut machine = Machine::new();
    let up = machine.start();
    machine.is_ready().await;
    let postgres = machine.postgres().unwrap();
    let api = child_of(up.pid(), "borealis-api serve").expect("an API process");
    up.kill();
    gone("the API", api).await;
    assert!(lives(postgres), "the cluster should outlive its supervisor");

    let up = machine.start();
    machine.is_ready().await;
    assert_eq!(machine.postgres(), Some(postgres));
    assert_eq!(up.terminate().await.code(), Some(0));
    gone("Postgres", postgres).await;
}

#[tokio::test]
async fn two_run_beside_each_other_and_a_taken_port_is_named() {
    let (mut one, mut two) = (Machine::new(), Machine::new());
    let (first, second) = (one.start(), two.start());
    one.is_ready().await;
    two.is_ready().await;
    assert_ne!(one.postgres(), two.postgres());

    let mut third = Machine::new();
    third.processes.set("BOREALIS_LISTEN", format!("127.0.0.1:{}", one.port));
    let mut refused = third.start();
    assert_eq!(refused.wait(SOON).await.code(), Some(1));
    let said = refused.output();
    assert!(said.contains("BOREALIS_LISTEN") && said.contains(&one.port.to_string()), "{said}");
    assert!(!third.state.join("postgres").exists(), "it should fail before it starts anything");

    assert_eq!(first.terminate().await.code(), Some(0));
    assert!(two.answers("/ready").await.is_some(), "stopping one must not touch the other");
    assert_eq!(second.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn an_external_postgres_is_used_and_left_running() {
    let database = TestDatabase::start().await;
    let mut machine = Machine::new();
    machine.processes.set("DATABASE_URL", database.url.as_str());
    let up = machine.start();
    machine.is_ready().await;
    assert!(!machine.state.join("postgres").exists());
    assert_eq!(up.terminate().await.code(), Some(0));
    let one: i32 = sqlx::query_scalar("SELECT 1").fetch_one(&database.pool).await.unwrap();
    assert_eq!(one, 1);
}

#[tokio::test]
async fn a_setting_that_cannot_be_is_named() {
    let mut machine = Machine::new();
    for (name, value) in [("BOREALIS_PUBLIC_BASE_URL", "https://host/path"), ("BOREALIS_LISTEN", "127.0.0.1:0")] {
        let mut other = Processes::new();
        other.set("BOREALIS_STATE_DIR", machine.state.to_str().unwrap()).set(name, value);
        let mut up = other.start("borealis-api", &["up"]);
        assert_eq!(up.wait(SOON).await.code(), Some(1));
        assert!(up.output().contains(name), "{}", up.output());
    }
    // By the variable it came from, not by an option that nobody has typed.
    for (variable, value) in
        [("BOREALIS_LISTEN", "nonsense"), ("BOREALIS_UNSEAL", "perhaps"), ("BOREALIS_ENROLL_PER_MINUTE", "0")]
    {
        let before = machine.processes.get(variable);
        let mut up = machine.processes.set(variable, value).start("borealis-api", &["up"]);
        assert_eq!(up.wait(SOON).await.code(), Some(2));
        let said = up.output();
        assert!(said.contains(&format!("{variable} is '{value}'")) && !said.contains("--listen"), "{said}");
        match before {
            Some(before) => machine.processes.set(variable, before),
            None => machine.processes.unset(variable),
        };
    }
    let mut typed = machine.processes.start("borealis-api", &["up", "--listen", "nonsense"]);
    assert_eq!(typed.wait(SOON).await.code(), Some(2));
    assert!(typed.output().contains("--listen"), "{}", typed.output());
    machine.processes.set("BOREALIS_WORKER_CONCURRENCY", "many");
    let mut worker = machine.processes.start("borealis-worker", &["run"]);
    assert_eq!(worker.wait(SOON).await.code(), Some(2));
    assert!(worker.output().contains("BOREALIS_WORKER_CONCURRENCY is 'many'"), "{}", worker.output());
    machine.processes.unset("BOREALIS_WORKER_CONCURRENCY");

    // A misspelled one is noticed, once for all processes of `up`.
    machine.processes.set("BOREALIS_MFA_ISUER", "Example");
    let up = machine.start();
    machine.is_ready().await;
    let said = up.output();
    assert_eq!(said.matches("there is no setting BOREALIS_MFA_ISUER; did you mean BOREALIS_MFA_ISSUER?").count(), 1, "{said}");
    assert_eq!(up.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn every_program_says_its_own_name() {
    let mut processes = Processes::new();
    for program in ["borealis-api", "borealis-worker", "borealis-agent"] {
        let mut child = processes.start(program, &["--version"]);
        assert_eq!(child.wait(SOON).await.code(), Some(0));
        assert_eq!(child.output().trim(), format!("{program} {}", env!("CARGO_PKG_VERSION")));
    }
}

/// As root only: the folder of links to sockets is taken from another user.
#[tokio::test]
async fn a_failed_start_leaves_no_postgres_behind() {
    use std::os::unix::fs::chown;
    const OTHER: u32 = 54_321;
    if !nix::unistd::Uid::effective().is_root() {
        return;
    }
    // Postgres needs a name for its user, and this one must not have a folder in /run.
    let Some(nobody) = nix::unistd::User::from_name("nobody").unwrap() else { return };
    let taken = PathBuf::from(format!("/tmp/borealis-{}", nobody.uid));
    if taken.exists() {
        return;
    }
    let folder = tempfile::Builder::new().prefix("borealis-ops-").tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let programs = folder.path().join("bin");
    std::fs::create_dir(&programs).unwrap();
    for program in ["borealis-api", "borealis-worker"] {
        std::fs::copy(borealis_tests::processes::built(program), programs.join(program)).unwrap();
    }
    let state = folder.path().join("a".repeat(100));
    std::fs::create_dir(&state).unwrap();
    chown(&state, Some(nobody.uid.as_raw()), None).unwrap();
    std::fs::create_dir(&taken).unwrap();
    chown(&taken, Some(OTHER), None).unwrap();

    let mut processes = Processes::new();
    processes
        .set("BOREALIS_STATE_DIR", state.to_str().unwrap())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
    let user = [format!("--reuid={}", nobody.uid), "--regid=65534".to_owned()];
    let program = programs.join("borealis-api");
    let mut up = processes.start_program(
        Path::new("/usr/bin/setpriv"),
        &[&user[0], &user[1], "--clear-groups", "--", program.to_str().unwrap(), "up"],
    );
    let status = up.wait(SOON).await;
    std::fs::remove_dir(&taken).unwrap();
    assert_eq!(status.code(), Some(1), "{}", up.output());
    assert!(up.output().contains("too long for a unix socket"), "{}", up.output());
    let note = std::fs::read_to_string(state.join("postgres/data/postmaster.pid")).unwrap_or_default();
    let left = note.lines().next().and_then(|pid| pid.trim().parse().ok()).map(Pid::from_raw).filter(|pid| lives(*pid));
    if let Some(pid) = left {
        let _ = kill(pid, Signal::SIGQUIT);
        panic!("its Postgres {pid} runs on");
    }
}

#[tokio::test]
async fn a_crash_leaves_no_core_dump_with_secrets_in_it() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let crash = |script: String| {
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(format!("ulimit -c unlimited; exec {script}")).current_dir(folder.path()).env_clear();
        command.env("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none").env("BOREALIS_STATE_DIR", folder.path());
        command.env("BOREALIS_ENGINE_SECRET_FILE", folder.path().join("secrets/engine.secret")).env("PATH", "/usr/bin:/bin");
        let port = free_port();
        command.env("BOREALIS_LISTEN", format!("127.0.0.1:{port}"));
        command.env("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        (command.spawn().unwrap(), port)
    };
    let dumped = |mut child: std::process::Child| {
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGABRT).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(Signal::SIGABRT as i32));
        status.core_dumped()
    };
    // Without our care there is one, where this machine makes any.
    let (sleeper, _) = crash("sleep 60".to_owned());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let made_here = dumped(sleeper);
    let (api, port) = crash(format!("{} serve", borealis_tests::processes::built("borealis-api").display()));
    eventually("the API listens", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", api.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    assert!(!dumped(api), "a core dump of the API");
    let (worker, _) = crash(format!("{} run", borealis_tests::processes::built("borealis-worker").display()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!dumped(worker), "a core dump of the worker");
    eprintln!("this machine makes core dumps: {made_here}");
}
