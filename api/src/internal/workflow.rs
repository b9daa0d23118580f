//! Starting a workflow on behalf of a worker.

use axum::{Extension, Json as JsonBody, extract::State};
use borealis_engine::Error;
use borealis_workflows::{NewRun, Registry};
use serde_json::{Value, json};

use super::Worker;
use crate::{body::Json, errors::Result, state::App};

/// The longest key, in bytes.
const KEY_BYTES: usize = 255;

/// What is to be started.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    /// Its name.
    workflow: String,
    /// Its version; by default the newest.
    version: Option<i32>,
    /// What makes the start single: a second one with the same key finds the first run.
    key: String,
    /// What its first step gets.
    input: Value,
    /// The job it belongs to.
    scheduled_job_id: Option<i64>,
    /// The sites whose operators may see it.
    #[serde(default)]
    site_ids: Vec<i64>,
}

/// Starts a run, once per key.
pub(super) async fn start(
    State(app): State<App>,
    Extension(registry): Extension<Registry>,
    Extension(Worker(worker)): Extension<Worker>,
    Json(start): Json<Start>,
) -> Result<JsonBody<Value>> {
    if start.key.is_empty() || start.key.len() > KEY_BYTES {
        return Err(Error::field("invalid_key", "key", format!("1 to {KEY_BYTES} bytes are needed.")).into());
    }
    let workflow = match start.version {
        Some(version) => registry.find(&start.workflow, version),
        None => registry.newest(&start.workflow),
    };
    let workflow = workflow
        .ok_or_else(|| Error::field("unknown_workflow", "workflow", "There is no such workflow, or not in this version."))?;
    let new = NewRun {
        key: Some(start.key),
        input: start.input,
        owner_id: start.scheduled_job_id,
        scope_ids: start.site_ids,
        ..NewRun::default()
    };
    let mut tx = app.pool.begin().await.map_err(Error::from)?;
    let started = borealis_workflows::start(&mut tx, workflow, new).await?;
    tx.commit().await.map_err(Error::from)?;
    tracing::info!(%worker, workflow = workflow.name, run = %started.run_id, created = started.created, "a worker started a workflow");
    Ok(JsonBody(json!({"started": started.created, "run": {"id": started.run_id.to_string()}})))
}
