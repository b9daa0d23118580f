//! A worker process like `borealis-worker`, with the probe workflows beside the engine's own, to be killed by the crash tests.
//! With the feature `failpoints` the environment variable `FAILPOINTS` says where it dies.

use std::{path::PathBuf, sync::Arc};

use borealis_engine::db;
use borealis_tests::probe;
use borealis_workers::api_client::ApiClient;
use borealis_workflows::{Agents, Registry};
use clap::Parser;
use tokio_util::sync::CancellationToken;

/// As `borealis-worker` is told.
#[derive(Debug, clap::Parser)]
struct Telemetry {
    #[command(flatten)]
    exports: borealis_telemetry::Exports,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let exports = Telemetry::parse().exports;
    let telemetry = borealis_telemetry::start("test-worker", "0", "info", borealis_telemetry::log::Format::Text, &exports)?;
    #[cfg(feature = "failpoints")]
    let _scenario = borealis_workflows::durable::fault::from_environment();
    let url = std::env::var("DATABASE_URL")?;
    let id = uuid::Uuid::new_v4();
    let agents: Arc<dyn Agents> = match std::env::var("BOREALIS_INTERNAL_URL") {
        Ok(internal) => {
            let secret = PathBuf::from(std::env::var("BOREALIS_ENGINE_SECRET_FILE")?);
            Arc::new(ApiClient::new(internal.split(',').map(str::parse).collect::<Result<_, _>>()?, &secret, id)?)
        }
        Err(_) => Arc::new(probe::NoAgents),
    };
    let pool = db::connect(&db::Options { url, max_connections: 16, application_name: "test-worker".into() })?;
    if let Some(addr) = exports.metrics_listen.0 {
        borealis_workers::serve_metrics(addr, &pool, CancellationToken::new()).await?;
    }
    let registry =
        Registry::new(borealis_workflows::registry().iter().chain(probe::registry().iter()).map(|workflow| (**workflow).clone()));
    let concurrency = std::env::var("CONCURRENCY").map_or(Ok(16), |text| text.parse())?;
    let options = borealis_workers::Options { id, concurrency, history_days: 30, duties: std::env::var("NO_DUTIES").is_err() };
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::spawn(async move {
        terminate.recv().await;
        stopping.cancel();
    });
    borealis_workers::run(pool, agents, registry, options, stop).await;
    telemetry.close().await;
    Ok(())
}
