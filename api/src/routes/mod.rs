//! One file per resource: request and response types, then the handlers. [`all`] is the list of them.

use crate::{access::Routes, state::App};

pub mod activity;
pub mod agent;
pub mod agent_metadata;
pub mod agent_tunnel;
pub mod api_tokens;
pub mod approvals;
pub mod assemblies;
pub mod audit;
pub mod auth;
pub mod bootstrap;
pub mod credentials;
pub mod device_labels;
pub mod devices;
pub mod directory;
pub mod docs;
pub mod engine;
pub mod enrollment;
pub mod github;
pub mod health;
pub mod passkeys;
pub mod processes;
pub mod run_events;
pub mod runs;
pub mod scheduled_jobs;
pub mod sites;
pub mod users;

/// Every public route with its class.
#[must_use]
pub fn all(app: &App) -> Routes {
    Routes::new(app.clone())
        .merge(activity::routes(app))
        .merge(agent::routes(app))
        .merge(agent_metadata::routes(app))
        .merge(agent_tunnel::routes(app))
        .merge(api_tokens::routes(app))
        .merge(approvals::routes(app))
        .merge(assemblies::routes(app))
        .merge(audit::routes(app))
        .merge(auth::routes(app))
        .merge(bootstrap::routes(app))
        .merge(credentials::routes(app))
        .merge(device_labels::routes(app))
        .merge(devices::routes(app))
        .merge(directory::routes(app))
        .merge(docs::routes(app))
        .merge(engine::routes(app))
        .merge(enrollment::routes(app))
        .merge(github::routes(app))
        .merge(health::routes(app))
        .merge(passkeys::routes(app))
        .merge(processes::routes(app))
        .merge(run_events::routes(app))
        .merge(runs::routes(app))
        .merge(scheduled_jobs::routes(app))
        .merge(sites::routes(app))
        .merge(users::routes(app))
}
