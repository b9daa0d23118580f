//! The engine as a whole: whether it is held.

use axum::{Json, extract::State};
use chrono::{DateTime, Utc};
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::{
    access::{Permission, Routes},
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).operator(Permission::EngineRead, routes!(hold))
}

/// Whether the engine is held.
#[derive(Debug, Default, serde::Serialize, ToSchema)]
struct Hold {
    /// True while nothing is scheduled and nothing is dispatched.
    held: bool,
    /// Since when.
    since: Option<DateTime<Utc>>,
    /// `asked` by an administrator; `older_database` or `other_database`: the database was restored from a backup.
    reason: Option<&'static str>,
    /// The same as a sentence.
    message: Option<String>,
}

/// Says whether the engine is held, as this API process has seen it within the last second. It is released at the console, with
/// `borealis-api admin release`.
#[utoipa::path(get, path = "/api/engine/hold", tag = "Core", responses((status = 200, body = Hold)))]
async fn hold(State(app): State<App>) -> Json<Hold> {
    Json(match app.guard.standing().held {
        Some(held) => Hold {
            held: true,
            since: Some(held.since),
            reason: Some(held.reason.as_str()),
            message: Some(format!("The engine is held: {}.", held.reason)),
        },
        None => Hold::default(),
    })
}
