//! Stored credentials for remote work.

use axum::{Json, extract::State};
use borealis_engine::{
    Error, Secret,
    access::credentials::{self, Change, Field, SecretChange},
};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::auth::Done;
use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Path, SentBack},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::CredentialsRead, routes!(list))
        .operator(Permission::CredentialsRead, routes!(get))
        .operator(Permission::CredentialsEdit, routes!(create))
        .operator(Permission::CredentialsEdit, routes!(update))
        .operator(Permission::CredentialsEdit, routes!(delete))
}

/// A credential. Its secrets never leave the engine through this API.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Credential {
    id: i64,
    name: String,
    description: String,
    /// The site it is for; null: every site.
    site_id: Option<i64>,
    site_name: String,
    /// `machine`, `domain` or `token`.
    credential_type: String,
    /// `ssh`, `windows` or `winrm`.
    connection_type: String,
    username: String,
    has_password: bool,
    has_private_key: bool,
    has_private_key_passphrase: bool,
    become_method: String,
    become_username: String,
    has_become_password: bool,
    metadata: Map<String, Value>,
    /// True when a reset of the secret store took secrets that nobody has set again; until then it cannot be used.
    secret_reset_required: bool,
    /// Which.
    lost_secret_fields: Vec<String>,
    /// When that reset was, in epoch seconds; 0 when there is none.
    reset_at: i64,
    /// Epoch seconds.
    created_at: i64,
    /// Epoch seconds.
    updated_at: i64,
}

impl From<credentials::Credential> for Credential {
    fn from(credential: credentials::Credential) -> Self {
        let has = |field| credential.has.contains(&field);
        let lost = !credential.lost_secret_fields.is_empty();
        Self {
            has_password: has(Field::Password),
            has_private_key: has(Field::PrivateKey),
            has_private_key_passphrase: has(Field::PrivateKeyPassphrase),
            has_become_password: has(Field::BecomePassword),
            metadata: credential.shown_metadata(),
            secret_reset_required: lost,
            reset_at: credential.reset_at.filter(|_| lost).map_or(0, |at| at.timestamp()),
            id: credential.id,
            name: credential.name,
            description: credential.description,
            site_id: credential.site_id,
            site_name: credential.site_name,
            credential_type: credential.credential_type,
            connection_type: credential.connection_type,
            username: credential.username,
            become_method: credential.become_method,
            become_username: credential.become_username,
            lost_secret_fields: credential.lost_secret_fields,
            created_at: credential.created_at.timestamp(),
            updated_at: credential.updated_at.timestamp(),
        }
    }
}

/// Credentials.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Credentials {
    /// By name.
    credentials: Vec<Credential>,
}

/// One credential.
#[derive(Debug, serde::Serialize, ToSchema)]
struct One {
    credential: Credential,
}

/// A credential that was written.
#[derive(Debug, serde::Serialize, ToSchema)]
struct CredentialWritten {
    /// `ok`.
    status: &'static str,
    credential: Credential,
}

impl CredentialWritten {
    fn json(credential: credentials::Credential) -> Json<Self> {
        Json(Self { status: "ok", credential: credential.into() })
    }
}

/// A field that is there, whatever its value: null is told from absent.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> std::result::Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl SentBack for CredentialBody {
    const READ_ONLY: &'static [&'static str] = &[
        "id",
        "site_name",
        "has_password",
        "has_private_key",
        "has_private_key_passphrase",
        "has_become_password",
        "secret_reset_required",
        "lost_secret_fields",
        "reset_at",
        "created_at",
        "updated_at",
    ];
}

/// What is written. What is absent stays as it is; a secret that is null or empty is forgotten.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CredentialBody {
    /// 1 to 200 characters, unique in any case.
    name: Option<String>,
    /// At most 2000 characters.
    description: Option<String>,
    /// The site it is for; null, empty or not above zero: every site.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<i64>)]
    site_id: Option<Option<Value>>,
    /// `machine` (the default), `domain` or `token`.
    credential_type: Option<String>,
    /// `ssh` (the default), `windows` or `winrm`.
    connection_type: Option<String>,
    /// The account on the far side.
    username: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    password: Option<Option<Secret<String>>>,
    /// PEM text.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    private_key: Option<Option<Secret<String>>>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    private_key_passphrase: Option<Option<Secret<String>>>,
    /// `sudo`, `su`, `runas`.
    become_method: Option<String>,
    become_username: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    become_password: Option<Option<Secret<String>>>,
    /// Forget the password, if `password` is absent.
    #[serde(default)]
    clear_password: bool,
    /// Forget the private key, if `private_key` is absent.
    #[serde(default)]
    clear_private_key: bool,
    /// Forget the passphrase, if `private_key_passphrase` is absent.
    #[serde(default)]
    clear_private_key_passphrase: bool,
    /// Forget the password, if `become_password` is absent.
    #[serde(default)]
    clear_become_password: bool,
    /// An object; replaces what was there.
    metadata: Option<Value>,
    /// The same as JSON text.
    metadata_json: Option<String>,
    /// Kept as `metadata.winrm_transport`; empty removes it.
    winrm_transport: Option<String>,
}

fn secret(value: Option<Option<Secret<String>>>, clear: bool) -> SecretChange {
    match value {
        None if clear => SecretChange::Clear,
        None => SecretChange::Keep,
        Some(Some(secret)) if !secret.expose().is_empty() => SecretChange::Set(secret),
        Some(_) => SecretChange::Clear,
    }
}

/// The id of a site as clients write it: a number, or its text.
fn site_id(value: Option<Value>) -> Result<Option<i64>> {
    let id = match &value {
        None | Some(Value::Null) => Some(0),
        Some(Value::String(text)) if text.trim().is_empty() => Some(0),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(value) => value.as_i64(),
    };
    let id = id.ok_or_else(|| Error::field("site not found", "site_id", "names no site."))?;
    Ok((id > 0).then_some(id))
}

impl CredentialBody {
    fn change(self) -> Result<Change> {
        let metadata = match (self.metadata, self.metadata_json) {
            (Some(Value::Object(metadata)), _) => Some(metadata),
            (Some(_), _) => return Err(Error::field("metadata must be an object", "metadata", "must be an object.").into()),
            (None, Some(text)) => match serde_json::from_str(&text) {
                Ok(Value::Object(metadata)) => Some(metadata),
                Ok(_) => return Err(Error::field("metadata must be an object", "metadata_json", "must hold an object.").into()),
                Err(_) => {
                    return Err(Error::field("metadata_json must be valid JSON", "metadata_json", "must be valid JSON.").into());
                }
            },
            (None, None) => None,
        };
        Ok(Change {
            name: self.name,
            description: self.description,
            site_id: self.site_id.map(site_id).transpose()?,
            credential_type: self.credential_type,
            connection_type: self.connection_type,
            username: self.username,
            become_method: self.become_method,
            become_username: self.become_username,
            metadata,
            winrm_transport: self.winrm_transport,
            password: secret(self.password, self.clear_password),
            private_key: secret(self.private_key, self.clear_private_key),
            private_key_passphrase: secret(self.private_key_passphrase, self.clear_private_key_passphrase),
            become_password: secret(self.become_password, self.clear_become_password),
        })
    }
}

/// The credentials you may see: those of your sites and those of every site.
#[utoipa::path(get, path = "/api/credentials", tag = "Credentials", responses((status = 200, body = Credentials)))]
async fn list(State(app): State<App>, operator: Operator) -> Result<Json<Credentials>> {
    let credentials = credentials::list(&app.pool, &operator.scope).await?;
    Ok(Json(Credentials { credentials: credentials.into_iter().map(Credential::from).collect() }))
}

/// One credential, without its secrets.
#[utoipa::path(get, path = "/api/credentials/{id}", tag = "Credentials", params(("id" = i64, Path)), responses(
    (status = 200, body = One),
    (status = 404, description = "`credential not found`"),
))]
async fn get(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<One>> {
    Ok(Json(One { credential: credentials::get(&app.pool, &operator.scope, id).await?.into() }))
}

/// Store a credential.
#[utoipa::path(post, path = "/api/credentials", tag = "Credentials", request_body = CredentialBody, responses(
    (status = 200, body = CredentialWritten),
    (status = 400, description = "`name is required`, `invalid credential_type`, `invalid connection_type`, `metadata must be an object`, `metadata_json must be valid JSON`, `site not found`, `invalid_field`"),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 409, description = "`credential name already exists`"),
    (status = 423, description = "`aegis_locked`"),
))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<CredentialBody>,
) -> Result<Json<CredentialWritten>> {
    operator.require_step_up()?;
    Ok(CredentialWritten::json(credentials::create(&app.pool, &app.vault, &operator.actor, &body.change()?).await?))
}

/// Change a credential; what is absent stays as it is.
#[utoipa::path(put, path = "/api/credentials/{id}", tag = "Credentials", params(("id" = i64, Path)), request_body = CredentialBody, responses(
    (status = 200, body = CredentialWritten),
    (status = 400, description = "As for a new one"),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 404, description = "`credential not found`"),
    (status = 409, description = "`credential name already exists`"),
    (status = 423, description = "`aegis_locked`"),
))]
async fn update(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    body::Change(body): body::Change<CredentialBody>,
) -> Result<Json<CredentialWritten>> {
    operator.require_step_up()?;
    Ok(CredentialWritten::json(credentials::update(&app.pool, &app.vault, &operator.actor, id, &body.change()?).await?))
}

/// Delete a credential that no job uses.
#[utoipa::path(delete, path = "/api/credentials/{id}", tag = "Credentials", params(("id" = i64, Path)), responses(
    (status = 200, body = Done),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 404, description = "`credential not found`"),
    (status = 409, description = "`credential_in_use`"),
))]
async fn delete(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<Done>> {
    operator.require_step_up()?;
    credentials::delete(&app.pool, &operator.actor, id).await?;
    Ok(Done::json())
}
