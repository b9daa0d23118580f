//! The API process, and the supervisor that runs all processes of one machine.

use std::{net::Ipv4Addr, process::ExitCode};

use borealis_api::{
    admin, app, github, serve,
    settings::{Environment, Settings},
    up,
};
use borealis_engine::{Error, Result, db, secret::keep_out_of_core_dumps, state_dir};
use borealis_telemetry::{Exports, log::Format, settings as given};
use clap::{CommandFactory, Parser, Subcommand};
use tokio_util::sync::CancellationToken;

/// Borealis Engine: remote management and automation on durable workflows.
#[derive(Debug, Parser)]
#[command(name = "borealis-api", version)]
struct Line {
    #[command(subcommand)]
    verb: Verb,
    /// What is logged, for example `info` or `info,borealis_api=debug`.
    #[arg(long, env = "BOREALIS_LOG", value_name = "FILTER", default_value = "info,sqlx=warn", global = true)]
    log: String,
    /// How it is logged.
    #[arg(long, env = "BOREALIS_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    log_format: Format,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Serves the API, on a database that `migrate` or `up` has prepared.
    Serve(Environment),
    /// Runs everything on this machine: a private Postgres unless DATABASE_URL is set, the API and a worker.
    Up(Environment),
    /// Brings the database to this version.
    Migrate(Environment),
    /// Looks after accounts and the secret store from the console of the engine's machine, also when nobody can sign in.
    ///
    /// Works on DATABASE_URL and the state folder, like the API; without DATABASE_URL on the private Postgres of a running `up`.
    /// What it changes is audited as done by `console`. Data goes to standard output, everything else to standard error.
    Admin(admin::Line),
    /// Prints the OpenAPI document.
    Openapi,
}

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The most connections to Postgres of one API process.
const POOL: u32 = 32;
/// Exit status when another engine runs on the state folder (EX_TEMPFAIL of sysexits.h).
const ALREADY_RUNNING: u8 = 75;

fn main() -> ExitCode {
    let line: Line = given::parse();
    keep_out_of_core_dumps();
    match run(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("borealis: {}", error.message);
            let mut cause = error.source.as_deref().map(|cause| cause as &dyn std::error::Error);
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::from(if error.code == "already_running" { ALREADY_RUNNING } else { 1 })
        }
    }
}

fn run(Line { verb, log, log_format }: Line) -> Result<()> {
    // The supervisor's children get a signal when the thread that started them ends; so it has one thread, the first.
    let mut threads = match verb {
        Verb::Up(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = threads.enable_all().build().map_err(Error::bug)?;
    runtime.block_on(async {
        // The others neither serve nor work for long.
        let exports = match &verb {
            Verb::Serve(environment) => environment.exports.clone(),
            _ => Exports::default(),
        };
        let telemetry = borealis_telemetry::start("borealis-api", env!("CARGO_PKG_VERSION"), &log, log_format, &exports)
            .map_err(|error| Error::invalid("invalid_setting", error.to_string()))?;
        let misspelled = given::misspelled(&Line::command());
        for (name, meant) in &misspelled {
            tracing::warn!("there is no setting {name}; did you mean {meant}?");
        }
        let ignored: Vec<String> = misspelled.into_iter().map(|(name, _)| name).collect();
        let ended = match verb {
            Verb::Serve(environment) => {
                serve::raise_open_files();
                serve(&environment).await
            }
            Verb::Up(environment) => up::up(&environment.settings()?, environment.store.database_url(), &ignored).await,
            Verb::Migrate(environment) => migrate(&environment).await,
            Verb::Admin(line) => admin::run(line).await,
            Verb::Openapi => openapi().await,
        };
        telemetry.close().await;
        ended
    })
}

async fn serve(environment: &Environment) -> Result<()> {
    let pool = pool(environment, "borealis-api")?;
    db::check_at_start(database_url(environment)?).await?;
    let (stop, _) = up::on_signals()?;
    serve::serve(environment.settings()?, pool, stop).await?.wait().await;
    Ok(())
}

async fn migrate(environment: &Environment) -> Result<()> {
    db::check(database_url(environment)?).await?;
    borealis_workflows::setup(&pool(environment, "borealis migrate")?).await
}

/// Prints the document of a service that serves nobody: on free ports, in a folder of its own, with no database behind it.
async fn openapi() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("borealis-openapi-{}", uuid::Uuid::new_v4()));
    state_dir::own(&folder)?;
    let settings = Settings {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        internal_listen: (Ipv4Addr::LOCALHOST, 0).into(),
        internal_url: "http://127.0.0.1:0".parse().map_err(Error::bug)?,
        engine_secret_file: folder.join("engine.secret"),
        state_dir: folder.clone(),
        public_base_url: "http://127.0.0.1:0".parse().map_err(Error::bug)?,
        enroll_per_minute: 1,
        enroll_wrong_codes: 1,
        enrollment_code_days: 1,
        unseal: borealis_engine::access::aegis::Unseal::Manual,
        access: borealis_engine::access::Settings::default(),
        trusted_proxies: Default::default(),
        connections_per_address: 1,
        quotas: Default::default(),
        audit_webhook: None,
        github_api_url: github::DEFAULT_URL.parse().map_err(Error::bug)?,
        exports: Exports::default(),
        worker_metrics_listen: None,
        zoneinfo: None,
    };
    let nowhere = format!("postgres://nobody@localhost/none?host={}", folder.display());
    let pool = db::connect(&db::Options { url: nowhere, max_connections: 1, application_name: String::new() })?;
    let stop = CancellationToken::new();
    let running = serve::serve(settings, pool, stop.clone()).await?;
    let (_, document, _) = app::build(&running.app);
    stop.cancel();
    running.wait().await;
    std::fs::remove_dir_all(&folder).map_err(Error::bug)?;
    println!("{}", document.to_pretty_json().map_err(Error::bug)?);
    Ok(())
}

fn pool(environment: &Environment, name: &str) -> Result<db::Pool> {
    let url = database_url(environment)?.to_owned();
    db::connect(&db::Options { url, max_connections: POOL, application_name: name.to_owned() })
}

fn database_url(environment: &Environment) -> Result<&str> {
    environment.store.database_url().ok_or_else(|| {
        Error::field("invalid_setting", db::SETTING, "it is not set; `borealis-api up` starts a private Postgres by itself.")
    })
}
