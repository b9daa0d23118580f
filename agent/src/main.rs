//! The command line of the Borealis agent.

mod journal;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use borealis_agent::installation::{self, PROGRAM_PATH};
use borealis_agent::platform::{self, ServiceSpec};
use borealis_agent::{CancellationToken, Config, DEFAULT_CONFIG_PATH, Error, Result, Settings};
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Makes this machine a device of a Borealis engine.
#[derive(Parser)]
#[command(name = "borealis-agent", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the configuration, put the program in its place, install it as a service and start it (as root); again to replace any of it
    Install(Options),
    /// Run the agent in the foreground until it is told to stop
    Run(Options),
    /// Show whether the agent is installed, running and enrolled
    Status(Options),
    /// Stop the service and remove it; identity and results stay unless --purge is given (as root)
    Uninstall {
        #[command(flatten)]
        options: Options,
        /// Also remove the configuration, the state directory and the installed program: the machine will have to be enrolled again
        #[arg(long)]
        purge: bool,
    },
}

#[derive(Args)]
struct Options {
    /// Base URL of the engine, for example https://rmm.example.org
    #[arg(long, env = "BOREALIS_AGENT_SERVER_URL", value_name = "URL")]
    server_url: Option<String>,
    /// The site's enrollment code; needed once, erased after use
    #[arg(long, env = "BOREALIS_AGENT_ENROLLMENT_CODE", hide_env_values = true, value_name = "CODE")]
    enrollment_code: Option<String>,
    /// Directory of identity, tokens and jobs [default: /var/lib/borealis-agent]
    #[arg(long, env = "BOREALIS_AGENT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Configuration file (JSON) [default: /etc/borealis-agent/config.json, if it exists]
    #[arg(long, env = "BOREALIS_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// PEM file with certificate authorities to trust besides those of the system
    #[arg(long, env = "BOREALIS_AGENT_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Name to report instead of the machine's own
    #[arg(long, env = "BOREALIS_AGENT_HOSTNAME", value_name = "NAME")]
    hostname: Option<String>,
    /// File with the id of this machine, for several agents on one machine [default: /etc/machine-id]
    #[arg(long, env = "BOREALIS_AGENT_MACHINE_ID_FILE", value_name = "FILE")]
    machine_id_file: Option<PathBuf>,
    /// Allow plain http to addresses that are not loopback; tokens and scripts are then readable on the network
    #[arg(long, env = "BOREALIS_AGENT_ALLOW_PLAIN_HTTP")]
    allow_plain_http: bool,
}

impl Options {
    fn settings(&self) -> Settings {
        Settings {
            server_url: self.server_url.clone(),
            enrollment_code: self.enrollment_code.clone(),
            state_dir: self.state_dir.clone(),
            ca_file: self.ca_file.clone(),
            allow_plain_http: self.allow_plain_http,
            hostname: self.hostname.clone(),
            machine_id_file: self.machine_id_file.clone(),
        }
    }

    /// The configuration file: the one named, which must be there, or the usual one if it is.
    fn config_path(&self) -> Result<Option<PathBuf>> {
        match &self.config {
            Some(path) if path.exists() => Ok(Some(path.clone())),
            Some(path) => Err(Error::Config(format!("{}: no such file", path.display()))),
            None => Ok(Some(PathBuf::from(DEFAULT_CONFIG_PATH)).filter(|path| path.exists())),
        }
    }

    /// What command line, environment and configuration file say, which may be nothing.
    fn all_settings(&self) -> Result<Settings> {
        let stored = self.config_path()?.as_deref().map(Settings::read).transpose()?.flatten();
        Ok(self.settings().or(stored.unwrap_or_default()))
    }

    fn load(&self) -> Result<Config> {
        Config::load(self.settings(), self.config_path()?.as_deref())
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Install(options) => install(&options),
        Command::Run(options) => run(&options),
        Command::Status(options) => status(&options),
        Command::Uninstall { options, purge } => uninstall(&options, purge),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            let level = if journal::is_listening() { journal::prefix(tracing::Level::ERROR) } else { "" };
            eprintln!("{level}borealis-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode> {
    let config = options.load()?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("BOREALIS_AGENT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // A log that cannot be written, on a full disk say, must not end what it tells of.
    let lines = tracing_subscriber::fmt::layer()
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let lines = if journal::is_listening() {
        // The journal has a clock of its own.
        lines.event_format(journal::Leveled(tracing_subscriber::fmt::format().without_time().with_ansi(false))).boxed()
    } else {
        lines.boxed()
    };
    // Libraries say at `trace` what goes over the wire, with the tokens in it: that is heard of nobody but ourselves.
    let discreet = filter_fn(|about| *about.level() <= tracing::Level::DEBUG || about.target().starts_with("borealis"));
    tracing_subscriber::registry().with(discreet).with(filter).with(lines).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::Service(format!("cannot start: {error}")))?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let signals = stop.clone();
        tokio::spawn(async move {
            told_to_end().await;
            tracing::info!("told to stop");
            signals.cancel();
        });
        borealis_agent::run(config, stop).await
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(unix)]
async fn told_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn told_to_end() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn install(options: &Options) -> Result<ExitCode> {
    let platform = platform::current();
    platform.may_manage_service()?;
    let path = options.config.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG_PATH));
    let present = Some(path.as_path()).filter(|path| path.exists());
    // Installing again changes what is given and keeps the rest.
    let config = Config::load(options.settings(), present)?;
    let settings = Settings {
        server_url: Some(config.server_url.to_string()),
        enrollment_code: config.enrollment_code.clone(),
        state_dir: Some(absolute(&config.state_dir)?),
        ca_file: config.ca_file.as_deref().map(absolute).transpose()?,
        allow_plain_http: config.allow_plain_http,
        hostname: config.hostname.clone(),
        machine_id_file: config.machine_id_file.as_deref().map(absolute).transpose()?,
    };
    let state_dir = settings.state_dir()?;
    let program = std::env::current_exe().map_err(|error| Error::Service(format!("cannot find my own program: {error}")))?;
    for origin in [Some(program.as_path()), present, config.ca_file.as_deref()].into_iter().flatten() {
        installation::check_origin(&*platform, origin)?;
    }
    let program = installation::place_program(&program, Path::new(PROGRAM_PATH))?;
    let path = absolute(&path)?;
    settings.save(&*platform, &path)?;
    platform.install_service(&ServiceSpec { program, config_path: path.clone(), state_dir })?;
    println!("The agent is installed and running; its configuration is {}.", path.display());
    if config.enrollment_code.is_none() {
        println!("It has no enrollment code. If it is not enrolled yet, run install again with --enrollment-code.");
    }
    Ok(ExitCode::SUCCESS)
}

fn status(options: &Options) -> Result<ExitCode> {
    let service = platform::current().service_state();
    println!("service:     {}, {}", if service.installed { "installed" } else { "not installed" }, service.state);
    let settings = options.all_settings()?;
    println!("server:      {}", settings.server_url.as_deref().unwrap_or("none is set"));
    let state_dir = settings.state_dir()?;
    println!("state:       {}", state_dir.display());
    let Some(identity) = borealis_agent::identity(&state_dir)? else {
        println!("enrolled:    no, the agent never ran with this state directory");
        return Ok(ExitCode::from(3));
    };
    println!("fingerprint: {}", identity.fingerprint);
    if identity.enrolled {
        println!("enrolled:    yes, as {}", identity.guid);
        return Ok(ExitCode::SUCCESS);
    }
    println!("enrolled:    no");
    Ok(ExitCode::from(3))
}

fn uninstall(options: &Options, purge: bool) -> Result<ExitCode> {
    let platform = platform::current();
    platform.uninstall_service()?;
    if purge {
        let config = options.config.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_CONFIG_PATH));
        let state_dir = options.settings().or(Settings::read(&config)?.unwrap_or_default()).state_dir()?;
        installation::purge(&*platform, &state_dir, &config, Path::new(PROGRAM_PATH))?;
    }
    println!("The agent is uninstalled.");
    Ok(ExitCode::SUCCESS)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|source| Error::File { path: path.to_owned(), source })
}
