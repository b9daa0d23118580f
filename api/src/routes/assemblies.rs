//! Assemblies.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
};
use borealis_engine::{
    Error, Kind,
    assemblies::{self, AssemblyBody, BODY_MAX, Detail, Filter, Item, VALUES_MAX},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Area, Operator, Routes},
    body::{self, BodyLimit, Params, Path},
    errors::{ApiError, Result},
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .area(Area::Assemblies)
        .body(BodyLimit { bytes: BODY_MAX, values: VALUES_MAX })
        .operator(routes!(list, create))
        .operator(routes!(get, update, delete))
}

/// An assembly. Times are text without an offset, in UTC.
#[derive(ToSchema)]
#[schema(as = Assembly)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct ItemDocument {
    assembly_guid: String,
    assembly_id: String,
    name: String,
    display_name: String,
    description: String,
    summary: String,
    assembly_type: String,
    assembly_subtype: String,
    /// Its domain: `official`, `community` or `user`.
    source: String,
    is_dirty: bool,
    dirty_since: Option<String>,
    last_persisted: String,
    payload_guid: String,
    source_repo: Option<String>,
    source_path: Option<String>,
    source_version: Option<String>,
    virtual_path: String,
    path: String,
    created_at: String,
    updated_at: String,
    content_hash: String,
    last_edited_by: String,
}

/// An assembly with its document.
#[derive(ToSchema)]
#[schema(as = AssemblyDetail)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct DetailDocument {
    #[schema(inline)]
    #[serde(flatten)]
    item: ItemDocument,
    /// The exact stored text.
    payload: String,
    /// The text parsed, or null when it is not JSON.
    payload_json: Value,
}

/// An assembly to be made; an update takes any subset.
#[derive(ToSchema)]
#[schema(as = AssemblyBody)]
#[expect(dead_code, reason = "the shape of a body, for the OpenAPI document")]
struct BodyDocument {
    /// `user`.
    domain: String,
    /// `{type, script | script_lines | content, script_encoding, timeout_seconds, variables[], ...}`, or text.
    payload: Value,
    assembly_guid: Option<String>,
    display_name: Option<String>,
    summary: Option<String>,
    /// `script`.
    assembly_type: Option<String>,
    /// `powershell`, `batch` or `bash`; by default the document's.
    assembly_subtype: Option<String>,
    source_repo: Option<String>,
    source_path: Option<String>,
    source_version: Option<String>,
    /// For a change: the hash of what is to be changed, as `If-Match`.
    content_hash: Option<String>,
}

/// Which assemblies to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `official`, `community` or `user`; anything else is no filter.
    domain: Option<String>,
    /// `script`, `workflow` or `ansible`.
    r#type: Option<String>,
    /// At most this many: 1 to 1,000, which is the default.
    limit: Option<i64>,
    /// The `next_cursor` of the page before.
    cursor: Option<i64>,
}

/// A page of assemblies by display name.
#[derive(Debug, Serialize, ToSchema)]
struct AssemblyList {
    #[schema(value_type = Vec<ItemDocument>)]
    items: Vec<Item>,
    /// Always empty: writes are immediate.
    queue: Vec<Value>,
    /// The state of the catalog of official assemblies.
    official_catalog: Value,
    /// Where the next page begins; null on the last.
    next_cursor: Option<i64>,
}

/// List assemblies.
#[utoipa::path(get, path = "/api/assemblies", tag = "Assemblies", params(ListQuery),
    responses((status = 200, body = AssemblyList), (status = 400, description = "`invalid_query`, `invalid_limit`")))]
async fn list(State(app): State<App>, _operator: Operator, Params(query): Params<ListQuery>) -> Result<Json<AssemblyList>> {
    let limit = query.limit.unwrap_or(assemblies::PAGE_MAX);
    if !(1..=assemblies::PAGE_MAX).contains(&limit) {
        return Err(Error::field("invalid_limit", "limit", format!("must be between 1 and {}", assemblies::PAGE_MAX)).into());
    }
    let offset = query.cursor.unwrap_or(0).max(0);
    let filter = Filter { domain: query.domain, assembly_type: query.r#type };
    let items = assemblies::list(&mut *app.pool.acquire().await?, &filter, limit, offset).await?;
    let full = i64::try_from(items.len()).is_ok_and(|count| count == limit);
    let next_cursor = full.then(|| offset.saturating_add(limit));
    Ok(Json(AssemblyList {
        items,
        queue: Vec::new(),
        official_catalog: json!({"available": false, "update_count": 0}),
        next_cursor,
    }))
}

/// One assembly with its document.
#[utoipa::path(get, path = "/api/assemblies/{guid}", tag = "Assemblies", params(("guid" = String, Path)),
    responses((status = 200, body = DetailDocument), (status = 404, description = "`not found`")))]
async fn get(State(app): State<App>, _operator: Operator, Path(guid): Path<String>) -> Result<Json<Detail>> {
    Ok(Json(assemblies::get(&mut *app.pool.acquire().await?, &guid).await?))
}

/// Make an assembly of the user domain. The body may have 32 MiB.
#[utoipa::path(post, path = "/api/assemblies", tag = "Assemblies", request_body = BodyDocument,
    responses(
        (status = 201, body = DetailDocument),
        (status = 400, description = "`invalid_json`, `invalid_domain`, `missing_payload`, `invalid_payload`, `script_too_large`, `unsupported_script_type`, `invalid_assembly_type`, `not_supported_yet`, `invalid_assembly_guid`, `assembly_exists`, `invalid_field`"),
        (status = 403, description = "`forbidden`, `dev_mode_required`"),
        (status = 413, description = "`body_too_large`"),
    ))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<AssemblyBody>,
) -> Result<(StatusCode, Json<Detail>)> {
    let mut tx = app.pool.begin().await?;
    let created = assemblies::create(&mut tx, operator.user_id, operator.is_admin(), &operator.actor, &body).await;
    let guid = match created {
        Ok(guid) => guid,
        Err(error) => {
            drop(tx);
            let guid = body.assembly_guid.unwrap_or_default();
            return Err(refused(&app, &operator, "assembly.create", &guid, error).await);
        }
    };
    let detail = assemblies::get(&mut tx, &guid).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(detail)))
}

/// The content hash in `If-Match`, with or without quotes; none for `*`, which any assembly that exists fulfils.
fn expected(headers: &HeaderMap) -> Result<Option<&str>> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().map_err(|_| Error::invalid("invalid_if_match", "If-Match must be plain text."))?.trim();
    let text = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    Ok(Some(text).filter(|text| *text != "*"))
}

/// Records a refusal that is about who asked, and passes the error on.
async fn refused(app: &App, operator: &Operator, action: &str, guid: &str, error: Error) -> ApiError {
    if error.kind != Kind::Forbidden {
        return ApiError(error);
    }
    let recorded = async {
        let mut conn = app.pool.acquire().await?;
        assemblies::record_refusal(&mut conn, &operator.actor, action, guid, error.code).await
    };
    match recorded.await {
        Ok(()) => ApiError(error),
        // A refusal nobody hears of is no refusal.
        Err(unrecorded) => ApiError(unrecorded),
    }
}

/// Change an assembly. With `If-Match`, only when its `content_hash` is that one.
#[utoipa::path(put, path = "/api/assemblies/{guid}", tag = "Assemblies", request_body = BodyDocument,
    params(("guid" = String, Path), ("If-Match" = Option<String>, Header)),
    responses(
        (status = 200, body = DetailDocument),
        (status = 400, description = "As for making one"),
        (status = 403, description = "`forbidden`, `dev_mode_required`"),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`content_changed`"),
        (status = 413, description = "`body_too_large`"),
    ))]
async fn update(
    State(app): State<App>,
    operator: Operator,
    Path(guid): Path<String>,
    headers: HeaderMap,
    body::Json(body): body::Json<AssemblyBody>,
) -> Result<Json<Detail>> {
    let expected = expected(&headers)?;
    let mut tx = app.pool.begin().await?;
    if let Err(error) =
        assemblies::update(&mut tx, operator.is_admin(), &operator.scope, &operator.actor, &guid, &body, expected).await
    {
        drop(tx);
        return Err(refused(&app, &operator, "assembly.update", &guid, error).await);
    }
    let detail = assemblies::get(&mut tx, &guid).await?;
    tx.commit().await?;
    Ok(Json(detail))
}

/// How to remove it.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct DeleteQuery {
    /// Also when scheduled jobs use it; they fail from then on.
    #[serde(default)]
    force: bool,
}

/// Removed.
#[derive(Debug, Serialize, ToSchema)]
struct Removed {
    /// `queued`, as the reference says; it is gone already.
    status: &'static str,
}

/// Remove an assembly that no scheduled job uses.
#[utoipa::path(delete, path = "/api/assemblies/{guid}", tag = "Assemblies", params(("guid" = String, Path), DeleteQuery),
    responses(
        (status = 202, body = Removed),
        (status = 403, description = "`forbidden`, `dev_mode_required`"),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`assembly_in_use` with `jobs`"),
    ))]
async fn delete(
    State(app): State<App>,
    operator: Operator,
    Path(guid): Path<String>,
    Params(query): Params<DeleteQuery>,
) -> Result<(StatusCode, Json<Removed>)> {
    let mut tx = app.pool.begin().await?;
    let caller = (operator.is_admin(), &operator.scope, &operator.actor);
    if let Err(error) = assemblies::delete(&mut tx, caller.0, caller.1, caller.2, &guid, query.force).await {
        drop(tx);
        return Err(refused(&app, &operator, "assembly.delete", &guid, error).await);
    }
    tx.commit().await?;
    Ok((StatusCode::ACCEPTED, Json(Removed { status: "queued" })))
}
