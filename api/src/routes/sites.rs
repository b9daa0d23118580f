//! Sites.

use std::collections::BTreeMap;

use axum::{Json, extract::State, http::StatusCode};
use borealis_engine::{
    Error, Kind,
    sites::{self, CODE_MAX_DAYS, CodeDays},
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::auth::Done;
use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Params, Path},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::SitesRead, routes!(list))
        .operator(Permission::SitesEdit, routes!(create))
        .operator(Permission::SitesRead, routes!(get))
        .operator(Permission::SitesEdit, routes!(delete))
        .operator(Permission::SitesRead, routes!(device_map))
        .operator(Permission::SitesEdit, routes!(assign))
        .operator(Permission::SitesEdit, routes!(rename))
        .operator(Permission::SitesEdit, routes!(rotate_enrollment_code))
        .operator(Permission::SitesEdit, routes!(auto_approval))
}

/// A site.
#[derive(Debug, serde::Serialize, ToSchema)]
pub(super) struct Site {
    id: i64,
    name: String,
    description: String,
    /// Epoch seconds.
    created_at: i64,
    device_count: i64,
    /// What an agent presents to ask for enrollment; empty for those who may not rotate it.
    enrollment_code: String,
    /// Until when, in epoch seconds; 0 for ever.
    enrollment_code_expires_at: i64,
    /// Whether it opens nothing any more: rotate it.
    enrollment_code_expired: bool,
    /// Until when enrollments are approved without an operator, in epoch seconds; 0 when not.
    auto_approve_until: i64,
    /// Whether they are at this moment.
    auto_approval_active: bool,
}

impl From<sites::Site> for Site {
    fn from(site: sites::Site) -> Self {
        Self {
            auto_approval_active: site.auto_approval_active(Utc::now()),
            id: site.id,
            name: site.name,
            description: site.description,
            created_at: site.created_at.timestamp(),
            device_count: site.device_count,
            enrollment_code: site.enrollment_code,
            enrollment_code_expires_at: site.enrollment_code_expires_at.map_or(0, |at| at.timestamp()),
            enrollment_code_expired: site.enrollment_code_expires_at.is_some_and(|at| at <= Utc::now()),
            auto_approve_until: site.auto_approve_until.map(|at| at.timestamp()).unwrap_or(0),
        }
    }
}

/// The sites the caller may see.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Sites {
    /// By name.
    sites: Vec<Site>,
    /// The base URL people and agents use, without a slash at the end.
    public_base_url: String,
    /// Its host.
    public_hostname: String,
}

/// Which sites to list.
#[derive(Debug, serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct SitesQuery {
    /// Only the site of this name, in any case.
    name: Option<String>,
}

/// A site as this operator may see it. With a code machines are brought in: it is for those who could make one.
fn shown(operator: &Operator, mut site: sites::Site) -> Site {
    if !operator.may(Permission::SitesEdit) {
        site.enrollment_code.clear();
    }
    site.into()
}

/// The sites the caller may see.
#[utoipa::path(get, path = "/api/sites", tag = "Sites", params(SitesQuery), responses(
    (status = 200, body = Sites),
    (status = 400, description = "`invalid_query`"),
    (status = 401, description = "`unauthorized`"),
))]
async fn list(State(app): State<App>, operator: Operator, Params(query): Params<SitesQuery>) -> Result<Json<Sites>> {
    let which = sites::Which { id: None, name: query.name.map(|name| name.replace('\0', "")) };
    let sites = sites::list(&app.pool, &operator.scope, &which).await?.into_iter().map(|site| shown(&operator, site)).collect();
    let url = &app.settings.public_base_url;
    Ok(Json(Sites {
        sites,
        public_base_url: url.as_str().trim_end_matches('/').to_owned(),
        public_hostname: url.host_str().unwrap_or_default().to_owned(),
    }))
}

/// One site.
#[utoipa::path(get, path = "/api/sites/{site_id}", tag = "Sites", params(("site_id" = i64, Path)), responses(
    (status = 200, body = Site),
    (status = 401, description = "`unauthorized`"),
    (status = 404, description = "`site not found`"),
))]
async fn get(State(app): State<App>, operator: Operator, Path(site_id): Path<i64>) -> Result<Json<Site>> {
    Ok(Json(shown(&operator, sites::one(&app.pool, &operator.scope, site_id).await?)))
}

/// A new site.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewSite {
    /// Unique in any case.
    #[serde(default)]
    name: String,
    /// What it is.
    #[serde(default)]
    description: Option<String>,
    /// For how many days its enrollment code can be used, 0 for ever; else as the engine is set.
    #[serde(default)]
    enrollment_code_days: Option<i32>,
}

/// How long the next enrollment code can be used.
#[derive(Debug, Default, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct EnrollmentCodeLife {
    /// For how many days, 0 for ever; else as the engine is set.
    enrollment_code_days: Option<i32>,
}

fn code_days(app: &App, asked: Option<i32>) -> Result<CodeDays> {
    CodeDays::new(asked.unwrap_or(app.settings.enrollment_code_days)).ok_or_else(|| {
        Error::field("invalid_enrollment_code_days", "enrollment_code_days", format!("must be from 0 to {CODE_MAX_DAYS}.")).into()
    })
}

/// Make a site with a new enrollment code.
#[utoipa::path(post, path = "/api/sites", tag = "Sites", request_body = NewSite, responses(
    (status = 201, body = Site),
    (status = 400, description = "`name is required`, `invalid_name`, `invalid_description`, `invalid_enrollment_code_days`"),
    (status = 403, description = "`forbidden`"),
    (status = 409, description = "`name already exists`"),
    (status = 500, description = "`unable_to_generate_enrollment_code`"),
))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<NewSite>,
) -> Result<(StatusCode, Json<Site>)> {
    let description = body.description.unwrap_or_default();
    let site =
        sites::create(&app.pool, &operator.actor, &body.name, &description, code_days(&app, body.enrollment_code_days)?).await?;
    Ok((StatusCode::CREATED, Json(site.into())))
}

/// Reads a site id: a positive integer, or its decimal text.
fn site_id(value: &Value) -> Option<i64> {
    let id = match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    id.filter(|id| *id > 0)
}

/// Which sites to delete.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SiteIds {
    /// Integers or their decimal text.
    #[serde(default)]
    #[schema(value_type = Vec<i64>)]
    ids: Value,
}

/// What was deleted.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Deleted {
    /// `ok`.
    status: &'static str,
    /// How many.
    deleted: usize,
}

/// Delete sites; their devices belong to no site then.
#[utoipa::path(post, path = "/api/sites/delete", tag = "Sites", request_body = SiteIds, responses(
    (status = 200, body = Deleted),
    (status = 400, description = "`ids must be a list`, `invalid id`, `too_many_sites`"),
    (status = 403, description = "`forbidden`"),
    (status = 409, description = "`site_in_use` with `jobs`"),
))]
async fn delete(State(app): State<App>, operator: Operator, body::Json(body): body::Json<SiteIds>) -> Result<Json<Deleted>> {
    let Value::Array(ids) = &body.ids else {
        return Err(Error::field("ids must be a list", "ids", "must be a list.").into());
    };
    let ids = ids
        .iter()
        .enumerate()
        .map(|(index, id)| {
            site_id(id).ok_or_else(|| Error::field("invalid id", &format!("ids[{index}]"), "must be a positive integer."))
        })
        .collect::<borealis_engine::Result<Vec<i64>>>()?;
    let (deleted, devices) = sites::delete(&app.pool, &operator.actor, &ids).await?;
    for device in devices {
        app.hub.drop_device(device).await;
    }
    Ok(Json(Deleted { status: "ok", deleted }))
}

/// Which hostnames to look up.
#[derive(Debug, serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct MapQuery {
    /// Hostnames, with commas between them; all when absent.
    hostnames: Option<String>,
}

/// Where devices belong.
#[derive(Debug, serde::Serialize, ToSchema)]
struct DeviceMap {
    /// By hostname.
    mapping: BTreeMap<String, MapEntry>,
}

/// A device's site.
#[derive(Debug, serde::Serialize, ToSchema)]
struct MapEntry {
    site_id: i64,
    site_name: String,
}

/// To which sites hostnames belong, among the sites the caller may see.
#[utoipa::path(get, path = "/api/sites/device_map", tag = "Sites", params(MapQuery), responses(
    (status = 200, body = DeviceMap),
    (status = 401, description = "`unauthorized`"),
))]
async fn device_map(State(app): State<App>, operator: Operator, Params(query): Params<MapQuery>) -> Result<Json<DeviceMap>> {
    let hostnames: Option<Vec<String>> =
        query.hostnames.map(|list| list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect());
    let places = sites::device_map(&app.pool, &operator.scope, hostnames.as_deref()).await?;
    let mapping = places
        .into_iter()
        .map(|place| (place.hostname, MapEntry { site_id: place.site_id, site_name: place.site_name }))
        .collect();
    Ok(Json(DeviceMap { mapping }))
}

/// Which devices go to which site.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Assignment {
    /// The site.
    #[serde(default)]
    #[schema(value_type = i64)]
    site_id: Value,
    /// Hostnames or GUIDs.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    hostnames: Value,
}

/// Put devices into a site. They reconnect.
#[utoipa::path(post, path = "/api/sites/assign", tag = "Sites", request_body = Assignment, responses(
    (status = 200, body = Done),
    (status = 400, description = "`invalid site_id`, `hostnames must be a list of strings`, `too_many_hostnames`, `unknown_target` with `hostnames`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`site not found`"),
    (status = 409, description = "`ambiguous_hostname` with `candidates`"),
))]
async fn assign(State(app): State<App>, operator: Operator, body::Json(body): body::Json<Assignment>) -> Result<Json<Done>> {
    let site = site_id(&body.site_id).ok_or_else(|| Error::field("invalid site_id", "site_id", "must be a positive integer."))?;
    let names = body
        .hostnames
        .as_array()
        .and_then(|names| names.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>())
        .ok_or_else(|| Error::field("hostnames must be a list of strings", "hostnames", "must be a list of strings."))?;
    for device in sites::assign(&app.pool, &operator.actor, site, &names).await? {
        app.hub.drop_device(device).await;
    }
    Ok(Done::json())
}

/// A new name.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Rename {
    /// The site.
    #[serde(default)]
    #[schema(value_type = i64)]
    id: Value,
    /// Unique in any case.
    #[serde(default)]
    new_name: String,
}

/// Rename a site.
#[utoipa::path(post, path = "/api/sites/rename", tag = "Sites", request_body = Rename, responses(
    (status = 200, body = Site),
    (status = 400, description = "`invalid id`, `new_name is required`, `invalid_name`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`site not found`"),
    (status = 409, description = "`name already exists`"),
))]
async fn rename(State(app): State<App>, operator: Operator, body::Json(body): body::Json<Rename>) -> Result<Json<Site>> {
    let id = site_id(&body.id).ok_or_else(|| Error::field("invalid id", "id", "must be a positive integer."))?;
    Ok(Json(sites::rename(&app.pool, &operator.actor, id, &body.new_name).await?.into()))
}

/// A path's site id; what is none names nothing.
fn path_id(text: String) -> Result<i64> {
    Ok(site_id(&Value::String(text)).ok_or_else(|| Error::new(Kind::NotFound, "site not found", "There is no such site."))?)
}

/// Give a site another enrollment code.
///
/// The old one opens nothing from then on; requests made with it wait for a decision as before.
#[utoipa::path(post, path = "/api/sites/{site_id}/rotate-enrollment-code", tag = "Sites",
    params(("site_id" = i64, Path, description = "The site")), request_body = EnrollmentCodeLife, responses(
    (status = 200, body = Site),
    (status = 400, description = "`invalid_enrollment_code_days`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`site not found`"),
))]
async fn rotate_enrollment_code(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<String>,
    body::OptionalJson(body): body::OptionalJson<EnrollmentCodeLife>,
) -> Result<Json<Site>> {
    let days = code_days(&app, body.enrollment_code_days)?;
    Ok(Json(sites::rotate_enrollment_code(&app.pool, &operator.actor, path_id(id)?, days).await?.into()))
}

/// Until when enrollments are approved without an operator.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct AutoApproval {
    /// Epoch seconds, at most 7 days ahead; null, "" or 0 switches it off.
    #[serde(default)]
    #[schema(value_type = Option<i64>)]
    auto_approve_until: Value,
}

/// Reads an instant in epoch seconds; null, "" and 0 are none.
fn instant(value: &Value) -> Option<Option<DateTime<Utc>>> {
    let seconds = match value {
        Value::Null => 0,
        Value::Number(number) => number.as_i64()?,
        Value::String(text) if text.trim().is_empty() => 0,
        Value::String(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    if seconds == 0 {
        return Some(None);
    }
    DateTime::from_timestamp(seconds, 0).map(Some)
}

/// Approve the site's enrollments without an operator for a while, or with one again.
#[utoipa::path(post, path = "/api/sites/{site_id}/auto-approval", tag = "Sites",
    params(("site_id" = i64, Path, description = "The site")), request_body = AutoApproval, responses(
    (status = 200, body = Site),
    (status = 400, description = "`invalid auto_approve_until`, `auto_approve_until must be in the future`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`site not found`"),
))]
async fn auto_approval(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<String>,
    body::Json(body): body::Json<AutoApproval>,
) -> Result<Json<Site>> {
    let id = path_id(id)?;
    let until = instant(&body.auto_approve_until).ok_or_else(|| {
        Error::field("invalid auto_approve_until", "auto_approve_until", "must be an instant in epoch seconds, null, \"\" or 0.")
    })?;
    Ok(Json(sites::set_auto_approval(&app.pool, &operator.actor, id, until).await?.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ids_are_positive_integers_or_their_text() {
        assert_eq!(site_id(&json!(3)), Some(3));
        assert_eq!(site_id(&json!(" 3 ")), Some(3));
        for bad in [json!(0), json!(-1), json!(1.5), json!("x"), json!(""), json!(null), json!([1]), json!(true)] {
            assert_eq!(site_id(&bad), None, "{bad}");
        }
    }

    #[test]
    fn instants_are_epoch_seconds_or_nothing() {
        for none in [json!(null), json!(""), json!(0), json!("0")] {
            assert_eq!(instant(&none), Some(None), "{none}");
        }
        assert_eq!(instant(&json!(60)), Some(DateTime::from_timestamp(60, 0)));
        for bad in [json!("x"), json!(1.5), json!([]), json!(i64::MAX)] {
            assert_eq!(instant(&bad), None, "{bad}");
        }
    }
}
