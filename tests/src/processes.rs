//! The built binaries as real processes, to be killed, stopped and continued.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A folder for the logs of real processes, and what they share in their environment. Dropping it kills what still runs;
/// when the test panics, the logs are printed.
#[derive(Debug)]
pub struct Processes {
    logs: tempfile::TempDir,
    environment: BTreeMap<String, String>,
    count: usize,
}

/// A real process.
#[derive(Debug)]
pub struct Child {
    /// `borealis-worker #2`.
    pub name: String,
    child: std::process::Child,
    log: PathBuf,
}

impl Default for Processes {
    fn default() -> Self {
        Self::new()
    }
}

impl Processes {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self { logs: tempfile::tempdir().expect("a folder"), environment: BTreeMap::new(), count: 0 }
    }

    /// Sets a variable for the processes started from now on.
    pub fn set(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.environment.insert(name.to_owned(), value.into());
        self
    }

    /// What [`Self::set`] gave a variable.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<String> {
        self.environment.get(name).cloned()
    }

    /// Leaves it out for the processes started from now on.
    pub fn unset(&mut self, name: &str) -> &mut Self {
        self.environment.remove(name);
        self
    }

    /// Starts a built binary of the workspace. The child gets `PATH`, `HOME` and what [`Self::set`] gave, nothing else.
    ///
    /// # Panics
    /// When it cannot be started, most often because it is not built.
    pub fn start(&mut self, binary: &str, arguments: &[&str]) -> Child {
        self.start_program(&built(binary), arguments)
    }

    /// The same with a program of the system.
    ///
    /// # Panics
    /// When it cannot be started, most often because it is not installed.
    pub fn start_program(&mut self, program: &Path, arguments: &[&str]) -> Child {
        self.count += 1;
        let name = format!("{} #{}", program.file_name().unwrap_or_default().display(), self.count);
        let log = self.logs.path().join(format!("{:03}-{}.log", self.count, name.split(' ').next().unwrap_or_default()));
        let output = File::create(&log).expect("a log file");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(std::env::vars().filter(|(name, _)| ["PATH", "HOME", "RUST_BACKTRACE"].contains(&name.as_str())))
            .env("RUST_LOG", "info")
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a log file"))
            .stderr(output);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        Child { name, child, log }
    }
}

impl Processes {
    /// Prints what every process has said last.
    pub fn show_logs(&self) {
        let mut logs: Vec<_> =
            std::fs::read_dir(self.logs.path()).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        logs.sort();
        for log in logs {
            eprintln!("---- {} ----\n{}", log.file_name().unwrap_or_default().to_string_lossy(), tail(&log));
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(200)..).unwrap_or_default().join("\n")
}

/// Where a binary of the workspace is: beside this program, or beside the folder of this test.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn built(binary: &str) -> PathBuf {
    let own = std::env::current_exe().expect("the path of the test");
    own.ancestors().skip(1).take(2).map(|folder| folder.join(binary)).find(|path| path.exists()).unwrap_or_else(|| {
        panic!("{binary} is not built: run cargo build --workspace --bins, or the tests through ./borealis test")
    })
}

impl Child {
    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        kill(pid, signal).unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
    }

    /// Kills it at once, and waits until it is gone.
    pub fn kill(mut self) {
        self.kill_now();
    }

    /// The same, for one that is to be replaced. It must still run.
    pub fn kill_now(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Freezes it.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Asks it to end.
    pub fn ask_to_end(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Asks it to end, and gives how it ended.
    ///
    /// # Panics
    /// When it has not ended after 30 s.
    pub async fn terminate(mut self) -> ExitStatus {
        self.ask_to_end();
        self.wait(Duration::from_secs(30)).await
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When it has not ended within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                return status;
            }
            assert!(Instant::now() < deadline, "{} still runs after {limit:?}:\n{}", self.name, tail(&self.log));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child of ours").is_none()
    }

    /// What it has printed.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A loopback port that was free a moment ago.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
