//! `./borealis demo`: an engine and an agent on this machine, and one scheduled job from REST call to result.

use std::{
    fs,
    path::Path,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use borealis_api::settings::{Environment, Settings};
use borealis_engine::state_dir;
use borealis_tests::demo::{self, Client, Notes, Outcome, Result, Screen, Trouble};
use clap::Parser;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::{Child, Command};

/// How long the engine may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How long an engine that runs already may take to answer.
const OTHER_LIMIT: Duration = Duration::from_secs(60);

/// Runs Borealis Engine with one agent on this machine and shows a scheduled job.
#[derive(Debug, Parser)]
#[command(name = "borealis-demo")]
struct Line {
    /// Stop everything after the result; the exit status is 0 only when the job ended in Success.
    #[arg(long)]
    exit: bool,
    #[command(flatten)]
    environment: Environment,
}

// One thread, the first: what it starts gets a signal when it ends.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let line = Line::parse();
    let stop = match borealis_api::up::on_signals() {
        Ok((stop, _)) => stop,
        Err(error) => {
            eprintln!("borealis: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut started = Started::default();
    let ended = tokio::select! {
        ended = run(&line, &mut started) => Some(ended),
        () = stop.cancelled() => None,
    };
    let code = match ended {
        Some(Ok(success)) => {
            if !line.exit {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = started.engine_ended() => eprintln!("\nborealis: the engine ended by itself"),
                }
            }
            if success { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Some(Err(error)) => {
            eprintln!("\nborealis: {error}");
            ExitCode::FAILURE
        }
        None => ExitCode::from(130),
    };
    started.stop().await;
    code
}

/// The processes of this demo.
#[derive(Debug, Default)]
struct Started {
    engine: Option<Child>,
    agent: Option<Child>,
}

impl Started {
    async fn engine_ended(&mut self) {
        match &mut self.engine {
            Some(engine) => {
                let _ = engine.wait().await;
            }
            None => std::future::pending().await,
        }
    }

    async fn stop(self) {
        if self.engine.is_some() || self.agent.is_some() {
            println!("\nStopping. What the demo made stays; ./borealis demo goes on with it.");
        }
        for child in [self.agent, self.engine].into_iter().flatten() {
            end(child).await;
        }
    }
}

async fn end(mut child: Child) {
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) else { return };
    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

async fn run(line: &Line, started: &mut Started) -> Result<bool> {
    let settings = line.environment.settings().map_err(|error| Trouble(error.message))?;
    let state = settings.state_dir.as_path();
    state_dir::own(state).map_err(|error| Trouble(error.message))?;
    let screen = Screen::default();
    let mut notes = Notes::read(state)?;
    println!("{}", screen.paint("1", "Borealis Engine demo"));

    let base = format!("http://{}", borealis_api::up::reachable(settings.listen));
    let mut client = Client::new(&base, state)?;
    screen.step("engine: private Postgres, API and a worker", engine(line, &settings, &client, started)).await?;
    // Made by the engine at its start.
    client = Client::new(&base, state)?;
    notes.base_url = Some(base.clone());
    screen
        .step(
            "administrator: secrets sealed, signed in with an authenticator code",
            demo::sign_in(&mut client, &mut notes, state),
        )
        .await?;
    screen.step("site", demo::site(&client, &mut notes, state)).await?;
    let hostname = hostname()?;
    screen
        .step(
            &format!("agent: {hostname} enrolled, approved and online"),
            agent(&settings, &client, &mut notes, &hostname, started),
        )
        .await?;
    let assembly = screen.step("assembly: a bash script", demo::assembly(&client)).await?;
    let run = screen.step("scheduled job, due now", demo::schedule(&client, &mut notes, state, &hostname, &assembly)).await?;

    screen.heading(&format!("Timeline of run {run}"));
    let ended = demo::timeline(&client, &run, &screen).await?;
    let Outcome { status, stdout, stderr } = demo::outcome(&client, &notes).await?;
    screen.heading(&format!("What the script printed on {hostname}"));
    for text in stdout.lines().chain(stderr.lines()) {
        println!("  | {}", printable(text));
    }
    let success = status == "Success" && ended == "succeeded";
    println!("\n  result: {}", screen.paint(if success { "32" } else { "31" }, &status));
    if !line.exit {
        how_to_go_on(&screen, &notes, state);
    }
    Ok(success)
}

/// Terminals obey what is printed to them, and this came from a script.
fn printable(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_control() || *letter == '\t').collect()
}

fn how_to_go_on(screen: &Screen, notes: &Notes, state: &Path) {
    let of = |field: &Option<String>| field.clone().unwrap_or_default();
    let secret = of(&notes.totp_secret);
    screen.heading("Running. Ctrl-C stops it.");
    println!("  API             {}   (all calls: {}/api/docs)", of(&notes.base_url), of(&notes.base_url));
    println!("  username        {}", of(&notes.username));
    println!("  password        {}", of(&notes.password));
    println!("  authenticator   {secret}   (base32; add it to an authenticator app, or: oathtool --totp -b {secret})");
    println!("  all of it       {}", Notes::path(state).display());
    println!("  logs            {}", state.join("logs").display());
}

/// Starts the engine, unless one runs on this state folder, and waits until it is ready.
async fn engine(line: &Line, settings: &Settings, client: &Client, started: &mut Started) -> Result<()> {
    match state_dir::lock(&settings.state_dir) {
        Ok(_) => {}
        Err(error) if error.code == "already_running" => {
            let since = Instant::now();
            let silent = || format!("{} But it does not answer at {}.", error.message, settings.listen);
            return client.ready(|| (since.elapsed() > OTHER_LIMIT).then(silent)).await;
        }
        Err(error) => return Err(Trouble(error.message)),
    }
    unused(settings).await?;
    let log = settings.state_dir.join("logs").join("engine.log");
    let mut command = child("borealis-api", &log)?;
    command.arg("up");
    command.env("BOREALIS_STATE_DIR", &settings.state_dir).env("BOREALIS_ENGINE_SECRET_FILE", &settings.engine_secret_file);
    command.env("BOREALIS_LISTEN", settings.listen.to_string());
    command.env("BOREALIS_INTERNAL_LISTEN", settings.internal_listen.to_string());
    command.env("BOREALIS_PUBLIC_BASE_URL", settings.public_base_url.as_str());
    command.env(
        "BOREALIS_UNSEAL",
        if settings.unseal == borealis_engine::access::aegis::Unseal::Manual { "manual" } else { "auto" },
    );
    command.env("BOREALIS_ENROLL_PER_MINUTE", settings.enroll_per_minute.to_string());
    command.env("BOREALIS_CONNECTIONS_PER_ADDRESS", settings.connections_per_address.to_string());
    match line.environment.store.database_url() {
        Some(url) => command.env("DATABASE_URL", url),
        None => command.env_remove("DATABASE_URL"),
    };
    let engine = command.spawn().map_err(|error| Trouble(format!("borealis-api cannot be started: {error}")))?;
    let engine = started.engine.insert(engine);
    client
        .ready(|| match engine.try_wait() {
            Ok(None) => None,
            _ => Some(format!("the engine did not start:\n{}", last_lines(&log))),
        })
        .await
}

/// Makes sure that who answers is the engine this demo starts. One that was killed a moment ago needs a little to end.
async fn unused(settings: &Settings) -> Result<()> {
    let addr = borealis_api::up::reachable(settings.listen);
    let since = Instant::now();
    while tokio::net::TcpStream::connect(addr).await.is_ok() {
        if since.elapsed() > Duration::from_secs(15) {
            return Err(Trouble(format!("something else listens on {addr}; set BOREALIS_LISTEN to another address")));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// Starts the agent, unless it is online already, and waits until it is.
async fn agent(settings: &Settings, client: &Client, notes: &mut Notes, hostname: &str, started: &mut Started) -> Result<()> {
    if let Some(guid) = &notes.device_guid
        && started.engine.is_none()
        && demo::is_online(client, guid).await?
    {
        return Ok(());
    }
    let state = settings.state_dir.join("demo-agent");
    state_dir::own(&state).map_err(|error| Trouble(error.message))?;
    let log = settings.state_dir.join("logs").join("agent.log");
    let mut command = child("borealis-agent", &log)?;
    command.arg("run");
    command.env("BOREALIS_AGENT_STATE_DIR", &state);
    // An agent that is installed on this machine has settings of its own; none of them count here.
    let config = state.join("config.json");
    fs::write(&config, "{}\n").map_err(|error| Trouble(format!("{} cannot be written: {error}", config.display())))?;
    command.env("BOREALIS_AGENT_CONFIG", config);
    command.env("BOREALIS_AGENT_SERVER_URL", notes.base_url.as_deref().unwrap_or_default());
    command.env("BOREALIS_AGENT_ENROLLMENT_CODE", notes.enrollment_code.as_deref().unwrap_or_default());
    command.env("BOREALIS_AGENT_HOSTNAME", hostname);
    // The engine is on this machine, whatever address it listens on.
    command.env("BOREALIS_AGENT_ALLOW_PLAIN_HTTP", "true");
    command.env_remove("BOREALIS_AGENT_CA_FILE");
    command.env_remove("DATABASE_URL");
    let agent = command.spawn().map_err(|error| Trouble(format!("borealis-agent cannot be started: {error}")))?;
    let agent = started.agent.insert(agent);
    let gone = || match agent.try_wait() {
        Ok(None) => None,
        _ => Some(format!("the agent ended:\n{}", last_lines(&log))),
    };
    demo::admit(client, notes, &settings.state_dir, hostname, gone)
        .await
        .map_err(|Trouble(why)| Trouble(format!("{why}\nThe agent's log is {}.", log.display())))
}

/// A program beside this one, with its output in `log`. It ends with this process, and Ctrl-C does not reach it.
fn child(program: &str, log: &Path) -> Result<Command> {
    let own = std::env::current_exe().map_err(|error| Trouble(error.to_string()))?;
    let program = own.with_file_name(program);
    if !program.exists() {
        return Err(Trouble(format!("{} is not built; ./borealis demo builds it", program.display())));
    }
    let log = state_dir::open_log(log).map_err(|error| Trouble(error.message))?;
    let output = log.try_clone().map_err(|error| Trouble(error.to_string()))?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::from(output)).stderr(Stdio::from(log)).process_group(0);
    Ok(command)
}

fn last_lines(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(12)).map(|line| format!("  {}\n", printable(line))).collect()
}

fn hostname() -> Result<String> {
    let name = nix::unistd::gethostname().map_err(|error| Trouble(error.to_string()))?;
    name.into_string().map_err(|_| Trouble("this machine's name is not text".to_owned()))
}
