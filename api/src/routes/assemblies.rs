//! Assemblies.

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use borealis_engine::{
    Error, Kind,
    assemblies::{self, AssemblyBody, BODY_MAX, Detail, Filter, ImportBody, Item, VALUES_MAX},
    work,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use crate::{
    access::{Operator, Permission, Routes},
    body::{self, BodyLimit, Change, Params, Path, SentBack},
    errors::{ApiError, Result},
    page::Limit,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .body(BodyLimit { bytes: BODY_MAX, values: VALUES_MAX })
        .operator(Permission::AssembliesRead, routes!(list))
        .operator(Permission::AssembliesEdit, routes!(create))
        .operator(Permission::AssembliesEdit, routes!(import))
        .operator(Permission::AssembliesRead, routes!(export))
        .operator(Permission::AssembliesRead, routes!(get))
        .operator(Permission::AssembliesEdit, routes!(update, delete))
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
    /// Chosen by administrators only, to import an assembly under the id it had.
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
    /// Only assemblies of exactly this display name. Names need not be unique.
    name: Option<String>,
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
    let limit = Limit::new(query.limit, assemblies::PAGE_MAX, assemblies::PAGE_MAX)?;
    let offset = query.cursor.unwrap_or(0).max(0);
    let filter =
        Filter { domain: query.domain, assembly_type: query.r#type, name: query.name.map(|name| name.replace('\0', "")) };
    let mut items = assemblies::list(&mut *app.pool.acquire().await?, &filter, limit.and_one(), offset).await?;
    let next_cursor = limit.cut(&mut items).map(|_| offset.saturating_add(limit.rows()));
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
async fn get(State(app): State<App>, _operator: Operator, Path(guid): Path<String>) -> Result<Response> {
    let detail = assemblies::get(&app.pool, &guid).await?;
    answer(StatusCode::OK, detail.payload.len(), detail).await
}

/// Make an assembly of the user domain. The body may have 32 MiB.
#[utoipa::path(post, path = "/api/assemblies", tag = "Assemblies", request_body = BodyDocument,
    responses(
        (status = 201, body = DetailDocument),
        (status = 400, description = "`invalid_json`, `invalid_domain`, `missing_payload`, `invalid_payload`, `script_too_large`, `unsupported_script_type`, `invalid_assembly_type`, `not_supported_yet`, `invalid_assembly_guid`, `invalid_field`"),
        (status = 403, description = "`forbidden`, `dev_mode_required`; `assembly_guid_forbidden` for an operator who chooses the id"),
        (status = 409, description = "`assembly_exists`, `assembly_path_taken`; `assembly_reserved` with `jobs`; `quota_exceeded` with `quota`, `used` and `limit`"),
        (status = 413, description = "`body_too_large`"),
    ))]
async fn create(State(app): State<App>, operator: Operator, body::Json(body): body::Json<AssemblyBody>) -> Result<Response> {
    let guid = body.assembly_guid.clone().unwrap_or_default();
    match assemblies::create(&app.pool, operator.caller(&app), body).await {
        Ok(detail) => answer(StatusCode::CREATED, detail.payload.len(), detail).await,
        Err(error) => Err(refused(&app, &operator, "assembly.create", &guid, error).await),
    }
}

impl SentBack for AssemblyBody {
    const READ_ONLY: &'static [&'static str] = &[
        "assembly_id",
        "payload_guid",
        "payload_json",
        "is_dirty",
        "dirty_since",
        "last_persisted",
        "virtual_path",
        "path",
        "created_at",
        "updated_at",
        "last_edited_by",
    ];
    const ALSO_NAMED: &'static [(&'static str, &'static str)] =
        &[("name", "display_name"), ("description", "summary"), ("source", "domain")];
}

/// Answers with JSON; a large one is written on the pool for such work.
async fn answer<T: Serialize + Send + 'static>(status: StatusCode, bytes: usize, value: T) -> Result<Response> {
    let text = work::sized(bytes, move || serde_json::to_vec(&value)).await?.map_err(Error::from)?;
    Ok((status, [(header::CONTENT_TYPE, "application/json")], text).into_response())
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
        (status = 409, description = "`content_changed`, `assembly_path_taken`; `assembly_in_use` and `assembly_reserved` with `jobs`; `quota_exceeded` with `quota`, `used` and `limit`"),
        (status = 413, description = "`body_too_large`"),
    ))]
async fn update(
    State(app): State<App>,
    operator: Operator,
    Path(guid): Path<String>,
    headers: HeaderMap,
    Change(body): Change<AssemblyBody>,
) -> Result<Response> {
    let expected = expected(&headers)?;
    match assemblies::update(&app.pool, operator.caller(&app), &guid, body, expected).await {
        Ok(detail) => answer(StatusCode::OK, detail.payload.len(), detail).await,
        Err(error) => Err(refused(&app, &operator, "assembly.update", &guid, error).await),
    }
}

/// An assembly to be imported.
#[derive(ToSchema)]
#[schema(as = AssemblyImport)]
#[expect(dead_code, reason = "the shape of a body, for the OpenAPI document")]
struct ImportDocument {
    /// `{assembly_guid, name, description, type, script, timeout_seconds, variables[], files[]}`, or its JSON as text. A `script` that
    /// is base64 is decoded.
    document: Value,
    /// The same as `document`.
    payload: Option<Value>,
    /// `user`, which is the default.
    domain: Option<String>,
    /// The assembly to change; by default the document's. Of one that is not there, administrators keep the id.
    assembly_guid: Option<String>,
}

/// An imported assembly.
#[derive(Debug, Serialize)]
struct Imported {
    #[serde(flatten)]
    detail: Detail,
    queue: Vec<Value>,
}

/// An imported assembly with its document.
#[derive(ToSchema)]
#[schema(as = ImportedAssembly)]
#[expect(dead_code, reason = "the shape of an answer, for the OpenAPI document")]
struct ImportedDocument {
    #[schema(inline)]
    #[serde(flatten)]
    detail: DetailDocument,
    /// Always empty: writes are immediate.
    queue: Vec<Value>,
}

/// Make an assembly of a document, or change the one with its id. The body may have 32 MiB.
#[utoipa::path(post, path = "/api/assemblies/import", tag = "Assemblies", request_body = ImportDocument,
    responses(
        (status = 201, body = ImportedDocument),
        (status = 400, description = "`invalid_json`, `missing_document`, `invalid_document`, `unknown_document_type`, and those of making one"),
        (status = 403, description = "`forbidden`, `dev_mode_required`"),
        (status = 409, description = "Those of making and of changing one"),
        (status = 413, description = "`body_too_large`"),
    ))]
async fn import(State(app): State<App>, operator: Operator, body::Json(body): body::Json<ImportBody>) -> Result<Response> {
    let guid = body.assembly_guid.clone().unwrap_or_default();
    match assemblies::import(&app.pool, operator.caller(&app), body).await {
        Ok(detail) => {
            let bytes = detail.payload.len();
            answer(StatusCode::CREATED, bytes, Imported { detail, queue: Vec::new() }).await
        }
        Err(error) => Err(refused(&app, &operator, "assembly.import", &guid, error).await),
    }
}

/// An assembly as a document that can be imported.
#[utoipa::path(get, path = "/api/assemblies/{guid}/export", tag = "Assemblies", params(("guid" = String, Path)),
    responses((status = 200, body = Value), (status = 404, description = "`not found`")))]
async fn export(State(app): State<App>, _operator: Operator, Path(guid): Path<String>) -> Result<Response> {
    let (bytes, document) = assemblies::export(&app.pool, &guid).await?;
    answer(StatusCode::OK, bytes, document).await
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
struct AssemblyRemoved {
    /// `queued`, as the reference says; it is gone already.
    status: &'static str,
}

/// Remove an assembly that no scheduled job uses.
#[utoipa::path(delete, path = "/api/assemblies/{guid}", tag = "Assemblies", params(("guid" = String, Path), DeleteQuery),
    responses(
        (status = 202, body = AssemblyRemoved),
        (status = 403, description = "`forbidden`, `dev_mode_required`"),
        (status = 404, description = "`not found`"),
        (status = 409, description = "`assembly_in_use` with `jobs`"),
    ))]
async fn delete(
    State(app): State<App>,
    operator: Operator,
    Path(guid): Path<String>,
    Params(query): Params<DeleteQuery>,
) -> Result<(StatusCode, Json<AssemblyRemoved>)> {
    let mut tx = app.pool.begin().await?;
    if let Err(error) = assemblies::delete(&mut tx, operator.caller(&app), &guid, query.force).await {
        drop(tx);
        return Err(refused(&app, &operator, "assembly.delete", &guid, error).await);
    }
    tx.commit().await?;
    Ok((StatusCode::ACCEPTED, Json(AssemblyRemoved { status: "queued" })))
}
