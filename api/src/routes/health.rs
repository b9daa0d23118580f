//! Liveness and readiness.

use axum::{Json, extract::State};
use borealis_engine::db;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{access::Routes, errors::Result, state::App};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).anonymous(routes!(health)).anonymous(routes!(ready))
}

/// The answer of a probe.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Probe {
    /// `ok`.
    status: &'static str,
}

/// Liveness: this process runs. Answers without Postgres and in every phase.
#[utoipa::path(get, path = "/health", tag = "Core", responses((status = 200, body = Probe)))]
async fn health() -> Json<Probe> {
    Json(Probe { status: "ok" })
}

/// Readiness: Postgres answers and is migrated. 503 with the reason otherwise.
#[utoipa::path(get, path = "/ready", tag = "Core", responses((status = 200, body = Probe), (status = 503, description = "Not ready, with the reason")))]
async fn ready(State(app): State<App>) -> Result<Json<Probe>> {
    db::ready(&app.pool).await?;
    Ok(Json(Probe { status: "ok" }))
}
