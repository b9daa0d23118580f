//! Calls to agents, for workers and for other API processes.

use axum::{Extension, Json as JsonBody, extract::State};
use borealis_engine::{
    Error,
    devices::calls::{Outcome, Spec},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::Worker;
use crate::{body::Json, errors::Result, sockets::Through, state::App};

/// Which agent is asked for what.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentCall {
    /// The device.
    pub device_guid: Uuid,
    /// The call's name: only calls that are declared can be made, so no event of another kind can be sent this way.
    pub call: String,
    /// Its request.
    pub request: Value,
    /// Only through a socket of this process: it was passed on already.
    #[serde(default)]
    pub here: bool,
}

/// Calls an agent and waits for what comes of it.
pub(super) async fn agent_call(
    State(app): State<App>,
    Extension(Worker(worker)): Extension<Worker>,
    Json(call): Json<AgentCall>,
) -> Result<JsonBody<Outcome>> {
    let unknown = || Error::field("unknown_call", "call", format!("There is no call {:?}.", call.call));
    let spec = Spec::named(&call.call).ok_or_else(unknown)?;
    if !(spec.takes)(&call.request) {
        return Err(Error::field("invalid_request", "request", "is not what this call takes.").into());
    }
    let through = if call.here { Through::Here } else { Through::Any };
    tracing::debug!(%worker, device = %call.device_guid, call = spec.name, ?through, "a call");
    Ok(JsonBody(app.hub.call_named(call.device_guid, *spec, &call.request, through).await?))
}
