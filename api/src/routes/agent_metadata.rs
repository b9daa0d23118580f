//! A device's numbered metadata fields, as its agent reads them. They are written with heartbeats.

use axum::{Json, extract::State};
use borealis_engine::devices::metadata;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    access::{Device, Routes},
    body::Path,
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).device(routes!(field))
}

/// A metadata field of the calling device.
#[derive(Debug, Serialize, ToSchema)]
struct AgentMetadataField {
    #[schema(value_type = AgentMetadataValue)]
    field: metadata::Field,
}

/// What a field holds.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes what the engine's type is written as")]
struct AgentMetadataValue {
    /// 1 to 500.
    field_number: i16,
    /// `field_001`.
    field_key: String,
    /// `Field 001`.
    label: String,
    /// Empty when nothing was set, and when it was cleared.
    value: String,
    /// Epoch seconds; 0 when nothing was set.
    modified_at: i64,
    /// What set it, for instance `agent`.
    source: String,
    /// Who set it.
    actor: String,
    /// Whether there is a value.
    has_value: bool,
}

/// Read a metadata field of the calling device.
///
/// Installers of the reference ask for field 1 to find out whether the access token of an earlier installation still works.
#[utoipa::path(get, path = "/api/agent/metadata/{number}", tag = "Agents",
    params(("number" = String, Path, description = "1 to 500")),
    responses(
        (status = 200, body = AgentMetadataField),
        (status = 400, description = "`invalid_field`"),
        (status = 401, description = "As of the heartbeat"),
        (status = 403, description = "As of the heartbeat"),
        (status = 404, description = "`device_not_found`"),
        (status = 429, description = "`rate_limited`"),
    ))]
async fn field(State(app): State<App>, device: Device, Path(number): Path<String>) -> Result<Json<AgentMetadataField>> {
    Ok(Json(AgentMetadataField { field: metadata::field(&app.pool, device.guid, &number).await? }))
}
