//! The OpenAPI document: what handlers say of themselves, completed by what the access table knows of them.

use std::collections::BTreeMap;

use axum::body::Bytes;
use utoipa::openapi::{
    Content, ContentBuilder, InfoBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Response, Schema, Type,
    security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};

use crate::access::{Class, Entry};

/// The name of the schema of errors.
const ERROR: &str = "Error";

/// The OpenAPI document as it is served.
#[derive(Debug, Clone)]
pub struct Document(pub Bytes);

impl Document {
    /// Writes it down.
    #[must_use]
    pub fn new(document: &OpenApi) -> Self {
        Self(serde_json::to_vec(document).map(Bytes::from).unwrap_or_else(|error| {
            tracing::error!(%error, "the OpenAPI document cannot be written");
            Bytes::from_static(b"{}")
        }))
    }
}

/// Adds what the whole document says, and to each operation what follows from its line in the access table: who may call it, and how it
/// is refused before it is called.
pub fn complete(document: &mut OpenApi, table: &[Entry]) {
    document.info = InfoBuilder::new()
        .title("Borealis Engine")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "The REST API of Borealis Engine. Errors are `{error, message, request_id}` with a stable code in `error`, and \
             `fields` where a field of the request is at fault.",
        ))
        .build();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme("session", SecurityScheme::ApiKey(ApiKey::Cookie(ApiKeyValue::new("borealis_auth"))));
    let bearer =
        |text: &str| SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(text)).build());
    components.add_security_scheme("session_token", bearer("The token that sign-in returned."));
    components.add_security_scheme("api_token", bearer("An API token of an operator, with the scope that is named with it."));
    components.add_security_scheme("device_token", bearer("The access token of an enrolled device."));
    components.schemas.insert(ERROR.to_owned(), error_schema());
    let descriptions = descriptions(&components.schemas);
    for entry in table {
        let Entry { method, path, class, permission, token_scope, body_bytes } = entry;
        let Some(item) = document.paths.paths.get_mut(path) else { continue };
        let operation = match method.as_str() {
            "GET" => item.get.as_mut(),
            "POST" => item.post.as_mut(),
            "PUT" => item.put.as_mut(),
            "PATCH" => item.patch.as_mut(),
            "DELETE" => item.delete.as_mut(),
            _ => None,
        };
        let Some(operation) = operation else { continue };
        operation.operation_id = Some(operation_id(method, path));
        if let Some(RefOr::T(body)) = &mut operation.request_body {
            let said = body.description.take().map(|said| format!(" {said}")).unwrap_or_default();
            body.description = Some(format!("At most {} KiB.{said}", body_bytes / 1024));
        }
        // The first sentence of a handler's comment is the summary; what follows in the same paragraph explains.
        if let Some(text) = operation.summary.take().map(|text| text.replace('\n', " ")) {
            let (summary, rest) = text.split_once(". ").unwrap_or((&text, ""));
            operation.summary = Some(summary.trim_end_matches('.').to_owned());
            if !rest.is_empty() {
                let more = operation.description.take().map(|more| format!("\n\n{more}")).unwrap_or_default();
                operation.description = Some(format!("{rest}{more}"));
            }
        }
        let schemes: &[&str] = match class {
            Class::Anonymous => &[],
            Class::Operator | Class::Admin => &["session", "session_token"],
            Class::Device => &["device_token"],
        };
        let plain = schemes.iter().map(|scheme| SecurityRequirement::new(*scheme, Vec::<String>::new()));
        let token = token_scope.iter().map(|scope| SecurityRequirement::new("api_token", [scope.as_str()]));
        operation.security = Some(plain.chain(token).collect());
        if matches!(class, Class::Operator | Class::Admin) {
            let text = operation.description.get_or_insert_default();
            if !text.is_empty() {
                text.push_str("\n\n");
            }
            if *class == Class::Admin {
                text.push_str("Needs the Admin role. ");
            }
            if let Some(permission) = permission {
                text.push_str(&format!("Permission: `{permission}`. "));
            }
            match token_scope {
                Some(scope) => text.push_str(&format!("Scope of an API token: `{}`.", scope.as_str())),
                None => text.push_str("Not for API tokens."),
            }
        }
        let has_body = operation.request_body.is_some();
        complete_responses(&mut operation.responses.responses, &refusals(entry, has_body), &descriptions);
    }
}

/// How an operation is refused before its handler is called: status, codes, and when.
fn refusals(entry: &Entry, has_body: bool) -> Vec<(&'static str, &'static str)> {
    let is_operators = matches!(entry.class, Class::Operator | Class::Admin);
    let changes = entry.method != "GET";
    let mut refusals = Vec::new();
    let mut add = |when: bool, status, codes| {
        if when {
            refusals.push((status, codes));
        }
    };
    add(entry.class != Class::Anonymous, "401", "`unauthorized`");
    add(is_operators, "403", "`password_change_required`");
    add(is_operators && changes, "403", "`bad_origin`");
    add(is_operators && entry.token_scope.is_some(), "403", "`insufficient_scope`");
    add(is_operators && entry.token_scope.is_none(), "403", "`session_required`");
    add(entry.class == Class::Admin, "403", "`forbidden`");
    add(entry.class == Class::Device, "403", "`device_revoked`");
    add(has_body, "400", "`invalid_json`");
    add(has_body, "413", "`body_too_large`");
    add(has_body, "415", "`unsupported_content_encoding`");
    add(is_operators && changes && has_body, "415", "`unsupported_media_type`");
    add(is_operators, "400", "`invalid_query`");
    add(true, "503", "`database_unavailable`");
    refusals
}

/// Adds these refusals, the error's schema to every error, and a description where there is none.
fn complete_responses(
    responses: &mut BTreeMap<String, RefOr<Response>>,
    refusals: &[(&str, &str)],
    descriptions: &BTreeMap<String, String>,
) {
    for (status, codes) in refusals {
        let response = responses.entry((*status).to_owned()).or_insert_with(|| RefOr::T(Response::default()));
        let RefOr::T(response) = response else { continue };
        if !response.description.contains(codes) {
            let joint = if response.description.is_empty() { "" } else { "; " };
            response.description.push_str(joint);
            response.description.push_str(codes);
        }
    }
    for (status, response) in responses.iter_mut() {
        let RefOr::T(response) = response else { continue };
        let is_error = status.starts_with(['4', '5']);
        if is_error && response.content.is_empty() {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(ERROR))).build();
            response.content.insert("application/json".to_owned(), RefOr::T(content));
        }
        if response.description.is_empty() {
            let named = response.content.values().find_map(schema_name).and_then(|name| descriptions.get(name));
            response.description = named.cloned().unwrap_or_else(|| "Done.".to_owned());
        }
    }
}

/// The name of the schema that a content refers to.
fn schema_name(content: &RefOr<Content>) -> Option<&str> {
    let RefOr::T(content) = content else { return None };
    match content.schema.as_ref()? {
        RefOr::Ref(reference) => reference.ref_location.rsplit('/').next(),
        RefOr::T(_) => None,
    }
}

/// What each schema says of itself.
fn descriptions(schemas: &BTreeMap<String, RefOr<Schema>>) -> BTreeMap<String, String> {
    let said = |schema: &RefOr<Schema>| match schema {
        RefOr::T(Schema::Object(object)) => object.description.clone(),
        _ => None,
    };
    schemas.iter().filter_map(|(name, schema)| Some((name.clone(), said(schema)?))).collect()
}

/// The body of every error.
fn error_schema() -> RefOr<Schema> {
    let text = |description: &str| ObjectBuilder::new().schema_type(Type::String).description(Some(description)).build();
    let fields = ObjectBuilder::new()
        .schema_type(Type::Object)
        .additional_properties(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some("The fields of the request that are at fault, each with the reason."))
        .build();
    let object = ObjectBuilder::new()
        .schema_type(Type::Object)
        .description(Some("Why a request was refused. Some codes come with further members, which their operation names."))
        .property("error", text("A stable code for programs."))
        .property("message", text("A sentence for people."))
        .property("request_id", text("The request, as the log names it."))
        .property("fields", fields)
        .property(
            "retry_after",
            ObjectBuilder::new().schema_type(Type::Integer).description(Some("When to try again, in seconds.")),
        )
        .required("error")
        .required("message")
        .build();
    RefOr::T(Schema::Object(object))
}

/// A name for an operation that no other has: `get_scheduled_jobs_id` for `GET /api/scheduled_jobs/{id}`.
fn operation_id(method: &str, path: &str) -> String {
    let words =
        path.split(|character: char| !character.is_ascii_alphanumeric()).filter(|word| !word.is_empty() && *word != "api");
    words.fold(method.to_lowercase(), |id, word| id + "_" + word)
}
