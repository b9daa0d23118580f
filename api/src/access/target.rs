//! The device that a path names.

use axum::{
    extract::{FromRequestParts, RawPathParams},
    http::request::Parts,
};
use borealis_engine::{
    Error,
    devices::lookup::{self, Found},
    keys::parse_guid,
};

use super::Operator;
use crate::{errors::ApiError, state::App};

/// The device in the caller's sites that a path names: by hostname or GUID where its parameter is `{hostname}`, by GUID alone where it is
/// `{guid}`. Every operator's route with such a parameter takes this.
///
/// Answers 404 `not found` when there is none, 409 `ambiguous_hostname` with `guids` and `candidates` when several have the hostname,
/// and 400 `invalid guid` for a `{guid}` that is none.
#[derive(Debug, Clone)]
pub struct TargetDevice(pub Found);

impl FromRequestParts<App> for TargetDevice {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let operator = Operator::from_request_parts(parts, app).await?;
        let params = RawPathParams::from_request_parts(parts, app).await.map_err(|_| ApiError(Error::not_found()))?;
        let (name, text) = params
            .iter()
            .find(|(name, _)| matches!(*name, "hostname" | "guid"))
            .ok_or_else(|| ApiError(Error::bug("the path of this route names no device")))?;
        if name == "guid" && parse_guid(text).is_none() {
            return Err(Error::invalid("invalid guid", "The path does not name a device GUID.").into());
        }
        let mut conn = app.pool.acquire().await?;
        Ok(Self(lookup::one(&mut conn, &operator.scope, text).await?))
    }
}
