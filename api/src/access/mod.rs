//! Who may call a route. A route enters the router only through one of the methods of [`Routes`], each of which names a
//! class, and for operators the [`Permission`] it needs; so a route without them does not exist, and [`Routes::split`] gives the list
//! that the access test walks. Which role and which scope of an API token has a permission is in one place of its own.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{FromRequestParts, Request, State},
    http::{Method, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use borealis_engine::{
    Error, Kind,
    access::{api_tokens::TokenScope, bootstrap, limits, passwords, setup_token, users::Role},
};
use utoipa::openapi::{
    PathItem, Paths, RefOr,
    path::{Operation, ParameterIn},
};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use crate::{
    body::{Admission, BodyLimit},
    errors::ApiError,
    state::App,
};

/// How long a request may take until its answer begins; an event stream has begun by then. A large body gets a second more for each
/// [`BYTES_PER_S`] of it.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The slowest upload that is waited for, in bytes a second.
pub const BYTES_PER_S: u64 = 256 * 1024;

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Anybody.
    Anonymous,
    /// A signed-in operator; handlers take [`Operator`].
    Operator,
    /// A signed-in operator whose role is Admin now; handlers take [`Operator`] too.
    Admin,
    /// A machine with a valid access token; handlers take [`Device`].
    Device,
}

/// One line of the access table.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Entry {
    /// Upper case: `GET`.
    pub method: String,
    /// As in the OpenAPI document: `/api/runs/{id}`.
    pub path: String,
    /// Who may call it.
    pub class: Class,
    /// What an operator needs to call it.
    pub permission: Option<Permission>,
    /// The scope with which an operator's API token may call it; none where no token gets in.
    pub token_scope: Option<TokenScope>,
    /// The most bytes its body may have, where it takes one.
    pub body_bytes: usize,
}

/// A set of routes, each with its class.
pub struct Routes {
    router: OpenApiRouter<App>,
    table: Vec<Entry>,
    app: App,
    body: Option<BodyLimit>,
}

impl Routes {
    /// No routes yet.
    #[must_use]
    pub fn new(app: App) -> Self {
        Self { router: OpenApiRouter::new(), table: Vec::new(), app, body: None }
    }

    /// Says how large the bodies of the routes added from here on may be, where that is not what is usual for their class.
    #[must_use]
    pub fn body(self, limit: BodyLimit) -> Self {
        Self { body: Some(limit), ..self }
    }

    /// Adds routes anybody may call.
    #[must_use]
    pub fn anonymous(self, routes: UtoipaMethodRouter<App>) -> Self {
        self.add(Class::Anonymous, None, routes)
    }

    /// Adds routes for signed-in operators who have a permission.
    #[must_use]
    pub fn operator(self, permission: Permission, routes: UtoipaMethodRouter<App>) -> Self {
        let class = if Role::User.may(permission) { Class::Operator } else { Class::Admin };
        self.add(class, Some(permission), routes)
    }

    /// Adds routes for devices.
    #[must_use]
    pub fn device(self, routes: UtoipaMethodRouter<App>) -> Self {
        self.add(Class::Device, None, routes)
    }

    /// Adds all routes of another set.
    #[must_use]
    pub fn merge(mut self, other: Self) -> Self {
        self.router = self.router.merge(other.router);
        self.table.extend(other.table);
        self
    }

    fn add(mut self, class: Class, permission: Option<Permission>, (schemas, paths, methods): UtoipaMethodRouter<App>) -> Self {
        let usual = if class == Class::Anonymous { BodyLimit::ANONYMOUS } else { BodyLimit::USUAL };
        let limit = self.body.unwrap_or(usual);
        for (path, item) in &paths.paths {
            for (method, _) in operations(item) {
                self.table.push(Entry {
                    method: method.to_string(),
                    path: path.clone(),
                    class,
                    permission,
                    token_scope: permission.and_then(Permission::token_scope),
                    body_bytes: limit.bytes,
                });
            }
        }
        let guard = Guard { app: self.app.clone(), class, permission, limit, query: query_names(&paths).into() };
        let guard = middleware::from_fn_with_state(guard, check);
        self.router = self.router.routes((schemas, paths, methods.layer(guard)));
        self
    }

    /// The router, its OpenAPI document and the access table.
    pub fn split(self) -> (Router<App>, utoipa::openapi::OpenApi, Vec<Entry>) {
        let (router, document) = self.router.split_for_parts();
        (router, document, self.table)
    }
}

/// What is known of the routes of one path.
#[derive(Clone)]
struct Guard {
    app: App,
    class: Class,
    permission: Option<Permission>,
    limit: BodyLimit,
    /// The names that the query of each method may have.
    query: Arc<[(Method, Vec<String>)]>,
}

/// The operations of a path, each with its method.
fn operations(item: &PathItem) -> impl Iterator<Item = (Method, &Operation)> {
    [
        (Method::GET, &item.get),
        (Method::POST, &item.post),
        (Method::PUT, &item.put),
        (Method::PATCH, &item.patch),
        (Method::DELETE, &item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
}

/// The names that the queries of these operations have in the document.
fn query_names(paths: &Paths) -> Vec<(Method, Vec<String>)> {
    let mut names = Vec::new();
    for item in paths.paths.values() {
        for (method, operation) in operations(item) {
            let of_query = operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
                RefOr::T(parameter) if matches!(parameter.parameter_in, ParameterIn::Query) => Some(parameter.name.clone()),
                _ => None,
            });
            names.push((method, of_query.collect()));
        }
    }
    names
}

/// Refuses a query with a name that the operation does not have: a misspelt filter would show everything. Agents may be newer than the
/// engine, and are not refused.
fn check_query(guard: &Guard, parts: &Parts) -> Result<(), ApiError> {
    let (Class::Operator | Class::Admin, Some(query)) = (guard.class, parts.uri.query()) else { return Ok(()) };
    let Some((_, known)) = guard.query.iter().find(|(method, _)| *method == parts.method) else { return Ok(()) };
    for (name, _) in url::form_urlencoded::parse(query.as_bytes()) {
        if !known.iter().any(|known| *known == name) {
            let shown: String = name.chars().take(60).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let why = format!("is no parameter of this route, whose parameters are: {known}");
            return Err(Error::field("invalid_query", &shown, why).into());
        }
    }
    Ok(())
}

async fn check(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let deadline = DEADLINE + Duration::from_secs(length.unwrap_or(0) / BYTES_PER_S);
    match tokio::time::timeout(deadline, admit(guard, request, next)).await {
        Ok(response) => response,
        Err(_) => {
            tracing::warn!("request timed out");
            ApiError(Error::new(Kind::Unavailable, "request_timeout", "This took too long; try again.").retry_after(5))
                .into_response()
        }
    }
}

async fn admit(guard: Guard, request: Request, next: Next) -> Response {
    let Guard { app, class, permission, limit, .. } = guard.clone();
    let (mut parts, body) = request.into_parts();
    let admitted = match class {
        Class::Anonymous => Ok(limits::address(client::client_ip(&parts))),
        Class::Operator | Class::Admin => {
            let needed = permission.and_then(Permission::token_scope);
            operator::authenticate(&app, &parts, needed).await.and_then(|operator| {
                if let Some(missing) = permission.filter(|permission| !operator.role.may(*permission)) {
                    let why = format!("Your role does not have the permission {missing}.");
                    return Err(Error::new(Kind::Forbidden, "forbidden", why).with("permission", missing.as_str()).into());
                }
                let holder = operator.user_id.to_string();
                parts.extensions.insert(operator);
                Ok(holder)
            })
        }
        Class::Device => device::authenticate(&app, &parts).await.map(|device| {
            let holder = device.identity.guid.to_string();
            parts.extensions.insert(device);
            holder
        }),
    };
    match admitted.and_then(|holder| check_query(&guard, &parts).map(|()| holder)) {
        Ok(holder) => {
            // Kept here, so that what the handler takes is given back when it has answered.
            let admission = Admission::new(app.rooms.of(class), holder);
            parts.extensions.insert(limit);
            parts.extensions.insert(admission.clone());
            let response = next.run(Request::from_parts(parts, body)).await;
            drop(admission);
            response
        }
        Err(error) => error.into_response(),
    }
}

/// What a process does for access when it starts: opens the secret store with the unseal file, and leaves a setup token
/// for somebody at another machine while the set-up is not complete. Safe to repeat.
///
/// # Errors
/// When the database is away or the state folder cannot be written.
pub async fn prepare(app: &App) -> borealis_engine::Result<()> {
    passwords::warm_up().await?;
    let state = bootstrap::state(&app.pool, &app.vault).await?;
    if state.phase == bootstrap::Phase::LoginRequired {
        setup_token::remove(&app.pool, &app.settings.state_dir).await;
        return Ok(());
    }
    tracing::info!(phase = ?state.phase, "the set-up is not complete");
    setup_token::ensure(&app.pool, &app.settings.state_dir).await
}

pub mod client;
pub mod device;
pub mod operator;
pub mod proxies;
mod target;

pub use borealis_engine::access::permissions::Permission;
pub use device::Device;
pub use operator::Operator;
pub use target::TargetDevice;

macro_rules! from_extensions {
    ($($name:ty),*) => {$(
        impl<S: Send + Sync> FromRequestParts<S> for $name {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
                parts.extensions.get::<Self>().cloned().ok_or_else(|| {
                    ApiError(Error::bug(concat!(stringify!($name), " is not admitted by this route's class")))
                })
            }
        }
    )*};
}
from_extensions!(Operator, Device);
