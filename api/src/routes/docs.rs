//! The OpenAPI document and a page that shows it, both from the binary: nothing is fetched from elsewhere.

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
const PAGE: &str = include_str!("docs/page.html");
const SCRIPT: &str = include_str!("docs/page.js");
const STYLE: &str = include_str!("docs/page.css");

const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
     frame-ancestors 'none'",
);

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

/// The script and the style of the page.
#[utoipa::path(get, path = "/api/docs/{asset}", tag = "Core",
    params(("asset" = String, Path, description = "`page.js` or `page.css`")),
    responses((status = 200, description = "The file"), (status = 404, description = "`not found`")))]
async fn asset(Path(asset): Path<String>) -> Result<Response> {
    match asset.as_str() {
        "page.js" => Ok(static_text("text/javascript; charset=utf-8", SCRIPT)),
        "page.css" => Ok(static_text("text/css; charset=utf-8", STYLE)),
        _ => Err(Error::not_found().into()),
    }
}

fn static_text(kind: &'static str, text: &'static str) -> Response {
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static(kind)), (header::CONTENT_SECURITY_POLICY, PAGE_POLICY)];
    (headers, text).into_response()
}
