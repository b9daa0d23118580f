//! `borealis-worker`: runs workflow steps; see `borealis-worker --help`.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use borealis_engine::{db, secret::keep_out_of_core_dumps, time_zones};
use borealis_telemetry::{Exports, log::Format, settings};
use borealis_workers::api_client::ApiClient;
use clap::{CommandFactory, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs the durable workflows of Borealis Engine.
#[derive(Debug, Parser)]
#[command(name = "borealis-worker", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The database; the same as the API's.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true)]
    database_url: Option<String>,
    /// The internal listeners of the API processes, any of which will do, separated by commas.
    #[arg(long, env = "BOREALIS_INTERNAL_URL", value_delimiter = ',', default_value = "http://127.0.0.1:8081", global = true)]
    internal_url: Vec<url::Url>,
    /// The file that holds the engine secret, which signs requests to the internal listener.
    #[arg(long, env = "BOREALIS_ENGINE_SECRET_FILE", global = true)]
    engine_secret_file: Option<PathBuf>,
    /// The most steps run at the same time.
    #[arg(long, env = "BOREALIS_WORKER_CONCURRENCY", default_value_t = 64, global = true)]
    concurrency: usize,
    /// How long finished runs are kept, in days.
    #[arg(long, env = "BOREALIS_JOB_HISTORY_DAYS", default_value_t = 30, value_parser = clap::value_parser!(i32).range(1..=3650), global = true)]
    history_days: i32,
    /// A folder of compiled time zones, as /usr/share/zoneinfo [default: the system's, or the built-in copy where that is newer].
    #[arg(long, env = "BOREALIS_ZONEINFO", default_value = "", hide_default_value = true, global = true)]
    zoneinfo: String,
    /// Log filter, as `info` or `borealis_durable=debug,info`.
    #[arg(long, env = "BOREALIS_LOG", default_value = "info", global = true)]
    log: String,
    /// How it is logged.
    #[arg(long, env = "BOREALIS_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    log_format: Format,
    #[command(flatten)]
    exports: Exports,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run (the default).
    Run,
    /// List the workflows with their versions and steps.
    Workflows {
        /// Draw them in Graphviz' language instead.
        #[arg(long)]
        dot: bool,
    },
}

fn main() -> ExitCode {
    let arguments = settings::parse::<Arguments>();
    if let Some(Command::Workflows { dot }) = arguments.command {
        let registry = borealis_workflows::registry();
        if dot {
            print!("{}", registry.dot());
        } else {
            registry.iter().for_each(|workflow| println!("{}", workflow.shape()));
        }
        return ExitCode::SUCCESS;
    }
    keep_out_of_core_dumps();
    match tokio::runtime::Runtime::new().map_err(|error| error.to_string()).and_then(|runtime| runtime.block_on(run(arguments))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("borealis-worker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), String> {
    let telemetry = borealis_telemetry::start(
        "borealis-worker",
        env!("CARGO_PKG_VERSION"),
        &arguments.log,
        arguments.log_format,
        &arguments.exports,
    )
    .map_err(|error| error.to_string())?;
    for (name, meant) in settings::misspelled(&Arguments::command()) {
        tracing::warn!("there is no setting {name}; did you mean {meant}?");
    }
    let url = arguments
        .database_url
        .filter(|url| !url.trim().is_empty())
        .ok_or("DATABASE_URL is not set. `./borealis up` sets it; a worker elsewhere needs the same database as the API.")?;
    let secret_file = arguments
        .engine_secret_file
        .ok_or("BOREALIS_ENGINE_SECRET_FILE is not set. It names a copy of the API's <state>/secrets/engine.secret.")?;
    let zoneinfo = Some(arguments.zoneinfo.trim()).filter(|folder| !folder.is_empty());
    time_zones::load(zoneinfo.map(PathBuf::from)).map_err(|error| error.message)?;
    let id = uuid::Uuid::new_v4();
    db::check_at_start(&url).await.map_err(|error| error.message)?;
    let pool = db::connect(&db::Options { url, max_connections: 16, application_name: "borealis-worker".to_owned() })
        .map_err(|error| error.message)?;
    let agents = ApiClient::new(arguments.internal_url, &secret_file, id).map_err(|error| error.message)?;
    if let Some(addr) = arguments.exports.metrics_listen.0 {
        // For as long as the process lives, so that its end is seen too.
        let served = borealis_workers::serve_metrics(addr, &pool, CancellationToken::new()).await;
        let addr = served.map_err(|error| error.to_string())?;
        tracing::info!(%addr, "metrics");
    }
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).map_err(|e| e.to_string())?,
        signal(SignalKind::interrupt()).map_err(|e| e.to_string())?,
    );
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => (), _ = interrupt.recv() => () }
        stopping.cancel();
    });
    let options =
        borealis_workers::Options { id, concurrency: arguments.concurrency, history_days: arguments.history_days, duties: true };
    borealis_workers::run(pool, Arc::new(agents), borealis_workflows::registry(), options, stop).await;
    telemetry.close().await;
    Ok(())
}
