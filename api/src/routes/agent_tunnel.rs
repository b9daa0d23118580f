//! The tunnel of an agent. There are none yet.

use borealis_engine::{Error, Kind};
use utoipa_axum::routes;

use crate::{
    access::{Device, Routes},
    errors::Result,
    state::App,
};

/// When an agent may ask again, in seconds. Those of the reference ask every minute, whatever they are told.
const ASK_AGAIN_S: u64 = 3600;

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).device(routes!(ensure))
}

/// Ask for the tunnel to the engine. There are none yet, which is answered without a write to the database.
#[utoipa::path(post, path = "/api/agent/vpn/ensure", tag = "Agents", responses(
    (status = 401, description = "As of the heartbeat"),
    (status = 403, description = "As of the heartbeat"),
    (status = 404, description = "`device_not_found`"),
    (status = 429, description = "`rate_limited`"),
    (status = 503, description = "`tunnel_unavailable`"),
))]
async fn ensure(_device: Device) -> Result<()> {
    let message = "This engine has no tunnels yet. Scripts and inventory do not need one.";
    Err(Error::new(Kind::Unavailable, "tunnel_unavailable", message).retry_after(ASK_AGAIN_S).into())
}
