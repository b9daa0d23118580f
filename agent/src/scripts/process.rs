//! One script as a process group.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::left_over::Note;
use super::output::Captured;
use crate::platform::{Interpreter, Platform};

/// Between asking a script to end and making it.
pub(super) const GRACE: Duration = Duration::from_secs(5);
/// How long a killed process may take to be gone; one that hangs in the kernel is left behind.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long output is read on when the script has ended but something it started still holds its output open. Then the run ends
/// without it.
const LINGER: Duration = Duration::from_secs(2);

/// Why a script is to end early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// The engine said so, for this reason.
    Cancelled(String),
    /// The agent itself ends.
    AgentStopping,
}

/// A script ready to run.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) job_id: i64,
    pub(super) content: Vec<u8>,
    pub(super) interpreter: Interpreter,
    /// Complete; nothing is added to it.
    pub(super) environment: Vec<(OsString, OsString)>,
    /// Private directory for the script file.
    pub(super) dir: PathBuf,
    /// None for no limit.
    pub(super) limit: Option<Duration>,
}

/// Output of a running script.
#[derive(Debug, Default)]
pub(super) struct Live {
    stdout: Mutex<Captured>,
    stderr: Mutex<Captured>,
}

impl Live {
    pub(super) fn stdout(&self) -> MutexGuard<'_, Captured> {
        self.stdout.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stderr(&self) -> MutexGuard<'_, Captured> {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a script ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By itself, with this code (128 + n after signal n).
    Exited(i32),
    /// At its limit.
    TimedOut,
    /// It was told to.
    Stopped(Stop),
    /// It never ran.
    NotStarted(String),
}

/// Runs a script to its end; output goes to `live` meanwhile.
pub(super) async fn run(
    platform: &Arc<dyn Platform>,
    script: Script,
    live: &Arc<Live>,
    mut stop: watch::Receiver<Option<Stop>>,
) -> End {
    let file = script.dir.join(format!("{}.{}", script.job_id, script.interpreter.extension));
    if let Err(error) = platform.private_file(&file).and_then(|mut handle| handle.write_all(&script.content)) {
        let _ = std::fs::remove_file(&file);
        return End::NotStarted(format!("cannot write the script file: {error}"));
    }
    let mut command = Command::new(&script.interpreter.program);
    command
        .args(&script.interpreter.arguments)
        .arg(&file)
        .env_clear()
        .envs(script.environment)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    platform.own_group(&mut command);
    let end = match command.spawn() {
        Ok(child) => {
            let _note = child.id().map(|leader| Note::write(platform, &script.dir, script.job_id, leader));
            watch_over(platform, child, live, script.limit, &mut stop).await
        }
        Err(error) => End::NotStarted(format!("cannot start {}: {error}", script.interpreter.program.display())),
    };
    if let Err(error) = std::fs::remove_file(&file) {
        warn!(%error, path = %file.display(), "cannot remove the script file");
    }
    end
}

async fn watch_over(
    platform: &Arc<dyn Platform>,
    mut child: Child,
    live: &Arc<Live>,
    limit: Option<Duration>,
    stop: &mut watch::Receiver<Option<Stop>>,
) -> End {
    let leader = child.id();
    let over = CancellationToken::new();
    let stdout = child.stdout.take().map(|pipe| read(pipe, Arc::clone(live), Live::stdout, over.clone()));
    let stderr = child.stderr.take().map(|pipe| read(pipe, Arc::clone(live), Live::stderr, over.clone()));
    // A limit beyond what the clock can hold is no limit.
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    let end = tokio::select! {
        status = child.wait() => match status {
            Ok(status) => End::Exited(exit_code(status)),
            Err(error) => End::NotStarted(format!("lost the script's process: {error}")),
        },
        () = until(deadline) => End::TimedOut,
        why = told_to_stop(stop) => End::Stopped(why),
    };
    if !matches!(end, End::Exited(_))
        && let Some(leader) = leader
    {
        end_group(platform, &mut child, leader).await;
    }
    let _lingering = tokio::spawn(async move {
        sleep(LINGER).await;
        over.cancel();
    });
    left_open(platform, stdout).await;
    left_open(platform, stderr).await;
    end
}

/// Waits for a reader. What still holds the other end of its pipe may write on, although nobody looks at it any more.
async fn left_open<R>(platform: &Arc<dyn Platform>, reader: Option<JoinHandle<Option<R>>>)
where
    R: TryInto<Stdio>,
{
    let Some(reader) = reader else { return };
    if let Ok(Some(pipe)) = reader.await
        && let Ok(pipe) = pipe.try_into()
        && let Err(error) = keep_drained(platform, pipe)
    {
        warn!(%error, "what a script left running will fail when it writes to its output");
    }
}

/// Reads `pipe` to its end in a process of its own, which goes on when the agent ends.
fn keep_drained(platform: &Arc<dyn Platform>, pipe: Stdio) -> std::io::Result<()> {
    let mut command = Command::new(platform.drain());
    command.env_clear().current_dir("/").stdin(pipe).stdout(Stdio::null()).stderr(Stdio::null());
    platform.own_group(&mut command);
    let mut drain = command.spawn()?;
    tokio::spawn(async move { drain.wait().await });
    Ok(())
}

/// SIGTERM to the group, then SIGKILL to what is left of it after [`GRACE`].
async fn end_group(platform: &Arc<dyn Platform>, child: &mut Child, leader: u32) {
    let signal = |force| {
        if let Err(error) = platform.stop_group(leader, force) {
            warn!(%error, leader, force, "cannot signal the script's process group");
        }
    };
    signal(false);
    let _ = timeout(GRACE, async {
        let _ = child.wait().await;
        while platform.group_alive(leader) {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    if platform.group_alive(leader) {
        signal(true);
        if timeout(KILL_LIMIT, child.wait()).await.is_err() {
            warn!(leader, "the script's process does not end even when killed");
        }
    }
}

/// Reads `pipe` to its end, or hands it back when it is `over`.
fn read<R>(
    mut pipe: R,
    live: Arc<Live>,
    stream: fn(&Live) -> MutexGuard<'_, Captured>,
    over: CancellationToken,
) -> JoinHandle<Option<R>>
where
    R: AsyncRead + Unpin + Send + 'static,
{
    tokio::spawn(async move {
        let mut buffer = vec![0u8; 16 * 1024];
        // Beyond the limit output is still read, or the script would stand still on a full pipe.
        loop {
            let count = tokio::select! {
                count = pipe.read(&mut buffer) => count,
                () = over.cancelled() => return Some(pipe),
            };
            match count.ok().and_then(|count| buffer.get(..count)) {
                Some(bytes) if !bytes.is_empty() => stream(&live).push(bytes),
                _ => return None,
            }
        }
    })
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn told_to_stop(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let why = stop.wait_for(Option::is_some).await.map(|why| why.clone());
    match why {
        Ok(why) => why.unwrap_or(Stop::AgentStopping),
        Err(_) => std::future::pending().await,
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt as _;
        status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1)
    }
    #[cfg(not(unix))]
    {
        status.code().unwrap_or(-1)
    }
}

#[cfg(test)]
mod tests {
    use borealis_protocol::output::{CAP_BYTES, NOTES_BYTES};

    use super::*;
    use crate::platform;

    struct Ran {
        end: End,
        stdout: String,
        stderr: String,
        took: Duration,
    }

    async fn run_for(text: &str, limit: Option<Duration>, stop: watch::Receiver<Option<Stop>>) -> Ran {
        let dir = tempfile::tempdir().unwrap();
        let platform = platform::current();
        let script = Script {
            job_id: 1,
            content: text.as_bytes().to_vec(),
            interpreter: platform.interpreter("bash").unwrap(),
            environment: platform.base_environment(),
            dir: dir.path().to_owned(),
            limit,
        };
        let live = Arc::new(Live::default());
        let began = Instant::now();
        let end = run(&platform, script, &live, stop).await;
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the script file is gone");
        let (stdout, stderr) = (live.stdout().finished().0, live.stderr().finished().0);
        Ran { end, stdout, stderr, took: began.elapsed() }
    }

    fn no_stop() -> (watch::Sender<Option<Stop>>, watch::Receiver<Option<Stop>>) {
        watch::channel(None)
    }

    async fn gone(pid: &str) -> bool {
        for _ in 0..100 {
            // A zombie waits only for its parent to look at it; it runs no more.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    }

    #[tokio::test]
    async fn output_and_exit_codes() {
        let (_keep, stop) = no_stop();
        let ran = run_for("echo out; echo err >&2; exit 3", None, stop.clone()).await;
        assert_eq!((ran.end, ran.stdout.as_str(), ran.stderr.as_str()), (End::Exited(3), "out\n", "err\n"));
        let ran = run_for("kill -9 $$", None, stop.clone()).await;
        assert_eq!(ran.end, End::Exited(137));
        let ran = run_for("cat; echo \"${BOREALIS_AGENT_ENROLLMENT_CODE-unset}\"", None, stop).await;
        assert_eq!((ran.end, ran.stdout.as_str()), (End::Exited(0), "unset\n"), "no input, no secrets");
    }

    #[tokio::test]
    async fn a_limit_ends_children_that_ignore_sigterm() {
        let (_keep, stop) = no_stop();
        let text = "trap '' TERM\n(trap '' TERM; while :; do sleep 0.1; done) &\necho $! $$\nwhile :; do sleep 0.1; done\n";
        let ran = run_for(text, Some(Duration::from_millis(500)), stop).await;
        assert_eq!(ran.end, End::TimedOut);
        assert!(ran.took >= GRACE && ran.took < GRACE + Duration::from_secs(8), "{:?}", ran.took);
        for pid in ran.stdout.split_whitespace() {
            assert!(gone(pid).await, "process {pid} is still there");
        }
        assert_eq!(ran.stdout.split_whitespace().count(), 2);
    }

    #[tokio::test]
    async fn a_cancel_ends_a_polite_script_at_once() {
        let (send, stop) = no_stop();
        tokio::spawn(async move {
            sleep(Duration::from_millis(500)).await;
            send.send_replace(Some(Stop::Cancelled("enough".into())));
            sleep(Duration::from_secs(10)).await;
        });
        let ran = run_for("sleep 60 & echo $!; wait", None, stop).await;
        assert_eq!(ran.end, End::Stopped(Stop::Cancelled("enough".into())));
        assert!(ran.took < Duration::from_secs(4), "{:?}", ran.took);
        assert!(gone(ran.stdout.trim()).await);
    }

    #[tokio::test]
    async fn what_a_script_leaves_running_lives_on_and_does_not_hold_the_result_up() {
        let (_keep, stop) = no_stop();
        let dir = tempfile::tempdir().unwrap();
        let (go, done) = (dir.path().join("go"), dir.path().join("done"));
        // It writes to both of its outputs after the run has ended, more than a pipe holds.
        let text = format!(
            "nohup bash -c 'until [ -e {go} ]; do sleep 0.1; done; head -c 300000 /dev/zero; echo >&2 x; echo y; touch {done}' &\necho started",
            go = go.display(),
            done = done.display()
        );
        let ran = run_for(&text, None, stop).await;
        assert_eq!((ran.end, ran.stdout.as_str()), (End::Exited(0), "started\n"));
        assert!(ran.took < Duration::from_secs(10), "{:?}", ran.took);
        std::fs::write(&go, "").unwrap();
        let began = Instant::now();
        while !done.exists() {
            assert!(began.elapsed() < Duration::from_secs(10), "it died at its next write");
            sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn endless_output_fills_neither_memory_nor_the_pipe() {
        let (_keep, stop) = no_stop();
        let ran = run_for("seq 1 600000; echo the reason; exit 4", None, stop).await;
        assert_eq!(ran.end, End::Exited(4));
        assert!(ran.stdout.len() <= CAP_BYTES + NOTES_BYTES && ran.stdout.contains(" bytes of output left out here]\n"));
        assert!(ran.stdout.starts_with("1\n2\n") && ran.stdout.ends_with("\n600000\nthe reason\n"));
    }

    #[tokio::test]
    async fn a_missing_interpreter_is_a_result() {
        let dir = tempfile::tempdir().unwrap();
        let platform = platform::current();
        let interpreter = Interpreter { program: "/nonexistent".into(), arguments: vec![], extension: "sh" };
        let script =
            Script { job_id: 1, content: vec![], interpreter, environment: vec![], dir: dir.path().to_owned(), limit: None };
        let (_keep, stop) = no_stop();
        assert!(matches!(run(&platform, script, &Arc::default(), stop).await, End::NotStarted(_)));
    }
}
