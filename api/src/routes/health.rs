//! Liveness and readiness.

use axum::{Json, extract::State};
use borealis_engine::{db, time_zones};
use chrono::{NaiveDate, Utc};
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

/// The answer of `/ready`.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Ready {
    /// `ok`.
    status: &'static str,
    /// Whether the engine is held: agents stay connected, and nothing is scheduled and nothing is dispatched.
    held: bool,
    /// The rules of time zones this process uses.
    time_zones: TimeZones,
    /// Tasks of this process that do not run, have failed within the last minute, or hang. They are started again by themselves; the log
    /// says why they failed.
    failing_tasks: Vec<&'static str>,
}

/// Rules of time zones.
#[derive(Debug, serde::Serialize, ToSchema)]
struct TimeZones {
    /// Their version, as `2026f`; `unknown` for a folder that does not say.
    version: String,
    /// The latest day on which they can have been released.
    released: Option<NaiveDate>,
    /// Whether they are older than a year, or of unknown age.
    old: bool,
}

/// Readiness: Postgres answers and is migrated. 503 with the reason otherwise.
#[utoipa::path(get, path = "/ready", tag = "Core", responses((status = 200, body = Ready), (status = 503, description = "Not ready, with the reason")))]
async fn ready(State(app): State<App>) -> Result<Json<Ready>> {
    db::ready(&app.pool).await?;
    let zones = time_zones::current();
    let time_zones = TimeZones { version: zones.version(), released: zones.released(), old: zones.is_old(Utc::now()) };
    let failing_tasks = app.tasks.health().iter().filter(|task| task.is_failing()).map(|task| task.name).collect();
    Ok(Json(Ready { status: "ok", held: app.guard.standing().held.is_some(), time_zones, failing_tasks }))
}
