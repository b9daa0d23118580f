//! The OpenAPI document and a page that shows it with Swagger UI, all from the binary: nothing is fetched from elsewhere.

use std::{borrow::Cow, sync::Arc};

use axum::{
    Extension, Router,
    http::{HeaderValue, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};
use borealis_engine::Error;
use utoipa_axum::routes;

use crate::{access::Routes, body::Path, document::Document, errors::Result, state::App};

const DOCS: &str = "/api/docs";
const DOCUMENT: &str = "/api/openapi.json";
const PAGE: &str = include_str!("docs/page.html");
const SCRIPT: &str = include_str!("docs/page.js");
const STYLE: &str = include_str!("docs/page.css");

/// The files of Swagger UI that the page needs; its others are not served.
const VIEWER: [(&str, &str); 2] =
    [("swagger-ui.css", "text/css; charset=utf-8"), ("swagger-ui-bundle.js", "text/javascript; charset=utf-8")];

/// Pictures are in the style, as data.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'",
);
/// The viewer changes with the engine's version only.
const VIEWER_AGE: HeaderValue = HeaderValue::from_static("public, max-age=3600");

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone()).anonymous(routes!(document)).anonymous(routes!(page)).anonymous(routes!(asset))
}

/// What leads a person with a browser to the page. It is no part of the API, so the document does not list it.
pub(crate) fn shortcuts() -> Router<App> {
    Router::new().route("/", get(async || Redirect::to(DOCS))).route("/api/docs/", get(async || Redirect::permanent(DOCS)))
}

/// This API as an OpenAPI 3.1 document.
#[utoipa::path(get, path = "/api/openapi.json", tag = "Core",
    responses((status = 200, description = "The document", content_type = "application/json", body = serde_json::Value)))]
async fn document(Extension(Document(text)): Extension<Document>) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
}

/// A page for people that shows the OpenAPI document.
#[utoipa::path(get, path = "/api/docs", tag = "Core",
    responses((status = 200, description = "The page", content_type = "text/html", body = String)))]
async fn page() -> Response {
    static_text("text/html; charset=utf-8", PAGE)
}

/// The scripts and styles of the page.
#[utoipa::path(get, path = "/api/docs/{asset}", tag = "Core",
    params(("asset" = String, Path, description = "`page.js`, `page.css`, `swagger-ui-bundle.js` or `swagger-ui.css`")),
    responses((status = 200, description = "The file"), (status = 404, description = "`not found`")))]
async fn asset(Path(asset): Path<String>) -> Result<Response> {
    match asset.as_str() {
        "page.js" => Ok(static_text("text/javascript; charset=utf-8", SCRIPT)),
        "page.css" => Ok(static_text("text/css; charset=utf-8", STYLE)),
        name => viewer(name),
    }
}

/// A file of Swagger UI.
fn viewer(name: &str) -> Result<Response> {
    let (name, kind) = VIEWER.into_iter().find(|(known, _)| *known == name).ok_or_else(Error::not_found)?;
    let file = utoipa_swagger_ui::serve(name, Arc::new(utoipa_swagger_ui::Config::from(DOCUMENT)));
    let file = file.map_err(|error| Error::bug(error.to_string()))?.ok_or_else(Error::not_found)?;
    let bytes = match file.bytes {
        Cow::Borrowed(bytes) => bytes.into_response(),
        Cow::Owned(bytes) => bytes.into_response(),
    };
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(kind)), (header::CACHE_CONTROL, VIEWER_AGE)];
    Ok((headers, bytes).into_response())
}

fn static_text(kind: &'static str, text: &'static str) -> Response {
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(kind)), (header::CONTENT_SECURITY_POLICY, PAGE_POLICY)];
    (headers, text).into_response()
}
