//! Stored credentials: what playbooks and remote tasks sign in with. Each secret is sealed by itself, bound to its row and
//! column. What is stored comes back as "there is one", never as itself.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::aegis::Vault;
use crate::{
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::{Actor, Scope},
    secret::Secret,
};

/// The most characters of a name.
pub const NAME_MAX_CHARS: usize = 200;
/// The most characters of a description.
pub const DESCRIPTION_MAX_CHARS: usize = 2000;
/// The most characters of a username.
pub const USERNAME_MAX_CHARS: usize = 256;
/// The most bytes of one secret.
pub const SECRET_MAX_BYTES: usize = 64 * 1024;
/// The most bytes of the metadata, as JSON.
pub const METADATA_MAX_BYTES: usize = 64 * 1024;
/// How many jobs a refused deletion names.
const JOBS_NAMED: i64 = 50;

/// Keys of the metadata that say what a reset took. They are the engine's; a client's are dropped.
const OWN_KEYS: [&str; 3] = ["aegis_secret_state", "aegis_lost_secret_fields", "aegis_reset_at"];

/// One of the secrets of a credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// The password to sign in with.
    Password,
    /// A private key, as PEM text.
    PrivateKey,
    /// What opens the private key.
    PrivateKeyPassphrase,
    /// The password to become another user with, on the far side.
    BecomePassword,
}

impl Field {
    /// All of them, in the order they are stored here.
    pub const ALL: [Self; 4] = [Self::Password, Self::PrivateKey, Self::PrivateKeyPassphrase, Self::BecomePassword];

    /// Its name in requests, answers and the audit.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::PrivateKey => "private_key",
            Self::PrivateKeyPassphrase => "private_key_passphrase",
            Self::BecomePassword => "become_password",
        }
    }

    /// What it is sealed for.
    fn column(self) -> &'static str {
        match self {
            Self::Password => "credentials.password",
            Self::PrivateKey => "credentials.private_key",
            Self::PrivateKeyPassphrase => "credentials.private_key_passphrase",
            Self::BecomePassword => "credentials.become_password",
        }
    }
}

/// A credential, without its secrets.
#[derive(Debug, Clone, PartialEq)]
pub struct Credential {
    /// Its id.
    pub id: i64,
    /// Its name, unique in any case.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// The site it is for; none: every site.
    pub site_id: Option<i64>,
    /// The site's name, or empty.
    pub site_name: String,
    /// `machine`, `domain` or `token`.
    pub credential_type: String,
    /// `ssh`, `windows` or `winrm`.
    pub connection_type: String,
    /// The account on the far side.
    pub username: String,
    /// Which secrets there are.
    pub has: Vec<Field>,
    /// How to become another user on the far side: `sudo`, `su`, `runas`; or empty.
    pub become_method: String,
    /// The user to become.
    pub become_username: String,
    /// What else is known of it, without the engine's own keys.
    pub metadata: Map<String, Value>,
    /// Secrets that a reset took and nobody has set again.
    pub lost_secret_fields: Vec<String>,
    /// When that reset was.
    pub reset_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

impl Credential {
    /// The metadata as clients see it: with the marks of a reset, while they stand.
    #[must_use]
    pub fn shown_metadata(&self) -> Map<String, Value> {
        let mut metadata = self.metadata.clone();
        if !self.lost_secret_fields.is_empty() {
            let at = self.reset_at.map_or(0, |at| at.timestamp());
            let [state, lost, reset_at] = OWN_KEYS;
            metadata.insert(state.to_owned(), json!("reset_required"));
            metadata.insert(lost.to_owned(), json!(self.lost_secret_fields));
            metadata.insert(reset_at.to_owned(), json!(at));
        }
        metadata
    }
}

/// What becomes of one secret.
#[derive(Debug, Clone, Default)]
pub enum SecretChange {
    /// It stays as it is.
    #[default]
    Keep,
    /// It is forgotten.
    Clear,
    /// It is replaced.
    Set(Secret<String>),
}

/// A change of a credential; what is absent stays as it is. A new one starts from nothing.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// The name.
    pub name: Option<String>,
    /// The description.
    pub description: Option<String>,
    /// The site, or none of them.
    pub site_id: Option<Option<i64>>,
    /// `machine`, `domain` or `token`.
    pub credential_type: Option<String>,
    /// `ssh`, `windows` or `winrm`.
    pub connection_type: Option<String>,
    /// The account on the far side.
    pub username: Option<String>,
    /// How to become another user.
    pub become_method: Option<String>,
    /// The user to become.
    pub become_username: Option<String>,
    /// Replaces the metadata.
    pub metadata: Option<Map<String, Value>>,
    /// Sets `metadata.winrm_transport`; empty removes it.
    pub winrm_transport: Option<String>,
    /// The password.
    pub password: SecretChange,
    /// The private key.
    pub private_key: SecretChange,
    /// What opens the private key.
    pub private_key_passphrase: SecretChange,
    /// The password to become another user with.
    pub become_password: SecretChange,
}

impl Change {
    fn secret(&self, field: Field) -> &SecretChange {
        match field {
            Field::Password => &self.password,
            Field::PrivateKey => &self.private_key,
            Field::PrivateKeyPassphrase => &self.private_key_passphrase,
            Field::BecomePassword => &self.become_password,
        }
    }
}

fn not_found() -> Error {
    Error::new(Kind::NotFound, "credential not found", "There is no such credential, or you may not see it.")
}

fn bounded(text: &str, field: &str, max: usize) -> Result<String> {
    let text = text.trim();
    if text.chars().count() > max || text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
        return Err(Error::field(
            "invalid_field",
            field,
            format!("must have at most {max} characters, and no control characters."),
        ));
    }
    Ok(text.to_owned())
}

fn one_of(text: &str, field: &str, code: &'static str, known: &[&str]) -> Result<String> {
    let text = text.trim().to_ascii_lowercase();
    if known.contains(&text.as_str()) {
        return Ok(text);
    }
    Err(Error::field(code, field, format!("must be one of {}.", known.join(", "))))
}

/// A private key as programs read it: no byte order mark, line feeds only, one at the end.
fn private_key(text: &str) -> String {
    let text = text.trim_start_matches('\u{feff}').replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') { text } else { text + "\n" }
}

fn name(text: &str) -> Result<Name> {
    if text.trim().is_empty() {
        return Err(Error::field("name is required", "name", "is required."));
    }
    Name::parse(text, &Rule { field: "name", code: "invalid_field", max_chars: NAME_MAX_CHARS, in_paths: false })
}

/// Applies what is not secret. Pure.
fn apply(credential: &mut Credential, change: &Change) -> Result<()> {
    if let Some(text) = &change.name {
        credential.name = name(text)?.into_string();
    }
    if let Some(text) = &change.description {
        credential.description = bounded(text, "description", DESCRIPTION_MAX_CHARS)?;
    }
    if let Some(site_id) = change.site_id {
        credential.site_id = site_id;
    }
    if let Some(text) = &change.credential_type {
        credential.credential_type = one_of(text, "credential_type", "invalid credential_type", &["machine", "domain", "token"])?;
    }
    if let Some(text) = &change.connection_type {
        credential.connection_type = one_of(text, "connection_type", "invalid connection_type", &["ssh", "windows", "winrm"])?;
    }
    if let Some(text) = &change.username {
        credential.username = bounded(text, "username", USERNAME_MAX_CHARS)?;
    }
    if let Some(text) = &change.become_method {
        credential.become_method = bounded(text, "become_method", 64)?.to_lowercase();
    }
    if let Some(text) = &change.become_username {
        credential.become_username = bounded(text, "become_username", USERNAME_MAX_CHARS)?;
    }
    if let Some(metadata) = &change.metadata {
        credential.metadata = metadata.clone();
        credential.metadata.retain(|key, _| !OWN_KEYS.contains(&key.as_str()));
    }
    if let Some(text) = &change.winrm_transport {
        match bounded(text, "winrm_transport", 64)? {
            text if text.is_empty() => credential.metadata.remove("winrm_transport"),
            text => credential.metadata.insert("winrm_transport".to_owned(), json!(text)),
        };
    }
    if Value::Object(credential.metadata.clone()).to_string().len() > METADATA_MAX_BYTES {
        return Err(Error::field("invalid_field", "metadata", format!("must have at most {METADATA_MAX_BYTES} bytes.")));
    }
    for field in Field::ALL {
        match change.secret(field) {
            SecretChange::Keep => continue,
            SecretChange::Clear => credential.has.retain(|has| *has != field),
            SecretChange::Set(secret) if secret.expose().len() > SECRET_MAX_BYTES => {
                return Err(Error::field("invalid_field", field.name(), format!("must have at most {SECRET_MAX_BYTES} bytes.")));
            }
            SecretChange::Set(_) if credential.has.contains(&field) => {}
            SecretChange::Set(_) => credential.has.push(field),
        }
        credential.lost_secret_fields.retain(|lost| lost != field.name());
    }
    Ok(())
}

/// The credentials a caller may see, by name: those of their sites and those of every site.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool, scope: &Scope) -> Result<Vec<Credential>> {
    read(&mut *pool.acquire().await?, scope, None).await
}

/// One credential.
///
/// # Errors
/// 404 `credential not found`.
pub async fn get(pool: &db::Pool, scope: &Scope, id: i64) -> Result<Credential> {
    read(&mut *pool.acquire().await?, scope, Some(id)).await?.pop().ok_or_else(not_found)
}

async fn read(conn: &mut sqlx::PgConnection, scope: &Scope, id: Option<i64>) -> Result<Vec<Credential>> {
    let rows = sqlx::query!(
        r#"SELECT c.id, c.name, c.description, c.site_id, coalesce(s.name, '') AS "site_name!", c.credential_type, c.connection_type,
                  c.username, c.become_method, c.become_username, c.metadata, c.lost_secret_fields, c.reset_at, c.created_at, c.updated_at,
                  ARRAY[c.password_sealed IS NOT NULL, c.private_key_sealed IS NOT NULL, c.private_key_passphrase_sealed IS NOT NULL,
                        c.become_password_sealed IS NOT NULL] AS "has!"
           FROM credentials c LEFT JOIN sites s ON s.id = c.site_id
           WHERE ($1::bigint[] IS NULL OR c.site_id IS NULL OR c.site_id = ANY($1)) AND ($2::bigint IS NULL OR c.id = $2)
           ORDER BY c.name_key, c.id"#,
        scope.site_ids(),
        id,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Credential {
            id: row.id,
            name: row.name,
            description: row.description,
            site_id: row.site_id,
            site_name: row.site_name,
            credential_type: row.credential_type,
            connection_type: row.connection_type,
            username: row.username,
            has: Field::ALL.into_iter().zip(row.has).filter_map(|(field, has)| has.then_some(field)).collect(),
            become_method: row.become_method,
            become_username: row.become_username,
            metadata: row.metadata.as_object().cloned().unwrap_or_default(),
            lost_secret_fields: row.lost_secret_fields,
            reset_at: row.reset_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
        .collect())
}

/// Makes a credential.
///
/// # Errors
/// 400 `name is required`, `invalid credential_type`, `invalid connection_type`, `invalid_field`, `site not found`;
/// 409 `credential name already exists`; 423 `aegis_locked`.
pub async fn create(pool: &db::Pool, vault: &Vault, actor: &Actor, change: &Change) -> Result<Credential> {
    let mut tx = pool.begin().await?;
    let name = name(change.name.as_deref().unwrap_or_default())?;
    // The row comes first: its id is part of what its secrets are bound to.
    let id =
        sqlx::query_scalar!("INSERT INTO credentials (name, name_key) VALUES ($1, $2) RETURNING id", name.as_str(), name.key())
            .fetch_one(&mut *tx)
            .await
            .map_err(refused)?;
    write(tx, vault, actor, id, change, "credential.create").await
}

/// Changes a credential.
///
/// # Errors
/// As [`create`]; 404 `credential not found`.
pub async fn update(pool: &db::Pool, vault: &Vault, actor: &Actor, id: i64, change: &Change) -> Result<Credential> {
    let mut tx = pool.begin().await?;
    sqlx::query!("SELECT id FROM credentials WHERE id = $1 FOR UPDATE", id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    write(tx, vault, actor, id, change, "credential.update").await
}

async fn write(
    mut tx: db::Tx<'_>,
    vault: &Vault,
    actor: &Actor,
    id: i64,
    change: &Change,
    action: &'static str,
) -> Result<Credential> {
    let mut credential = read(&mut tx, &Scope::All, Some(id)).await?.pop().ok_or_else(not_found)?;
    let before = credential.clone();
    apply(&mut credential, change)?;
    sqlx::query!(
        "UPDATE credentials
         SET name = $2, description = $3, site_id = $4, credential_type = $5, connection_type = $6, username = $7, become_method = $8,
             become_username = $9, metadata = $10, lost_secret_fields = $11, name_key = $12, updated_at = now()
         WHERE id = $1",
        id,
        credential.name,
        credential.description,
        credential.site_id,
        credential.credential_type,
        credential.connection_type,
        credential.username,
        credential.become_method,
        credential.become_username,
        Value::Object(credential.metadata.clone()),
        &credential.lost_secret_fields,
        names::key(&credential.name),
    )
    .execute(&mut *tx)
    .await
    .map_err(refused)?;
    let mut changed = Vec::new();
    for field in Field::ALL {
        let sealed = match change.secret(field) {
            SecretChange::Keep => continue,
            SecretChange::Clear => None,
            SecretChange::Set(secret) if field == Field::PrivateKey => {
                let text = Secret::new(private_key(secret.expose()));
                Some(vault.seal(&mut tx, field.column(), id, text.expose()).await?)
            }
            SecretChange::Set(secret) => Some(vault.seal(&mut tx, field.column(), id, secret.expose()).await?),
        };
        changed.push(field.name());
        // A statement for each column, so that a column's name never comes from anywhere but here.
        match field {
            Field::Password => sqlx::query!("UPDATE credentials SET password_sealed = $2 WHERE id = $1", id, sealed),
            Field::PrivateKey => sqlx::query!("UPDATE credentials SET private_key_sealed = $2 WHERE id = $1", id, sealed),
            Field::PrivateKeyPassphrase => {
                sqlx::query!("UPDATE credentials SET private_key_passphrase_sealed = $2 WHERE id = $1", id, sealed)
            }
            Field::BecomePassword => sqlx::query!("UPDATE credentials SET become_password_sealed = $2 WHERE id = $1", id, sealed),
        }
        .execute(&mut *tx)
        .await?;
    }
    let detail = json!({
        "name": credential.name, "username": credential.username, "site_before": before.site_id, "site_after": credential.site_id,
        "name_before": before.name, "username_before": before.username, "secrets_changed": changed,
    });
    let entry = Entry {
        action,
        object_kind: "credential",
        object_id: id.to_string(),
        site_id: credential.site_id,
        detail,
        ..Entry::default()
    };
    audit::record(&mut tx, actor, entry).await?;
    let credential = read(&mut tx, &Scope::All, Some(id)).await?.pop().ok_or_else(not_found)?;
    tx.commit().await?;
    Ok(credential)
}

fn refused(error: sqlx::Error) -> Error {
    Error::from(error)
        .on_constraint("credentials_name_key", || {
            Error::conflict("credential name already exists", "There is a credential of this name already.")
        })
        .on_constraint("credentials_site_fkey", || Error::field("site not found", "site_id", "names no site."))
}

/// Marks every credential that has secrets as having lost them, and says which. The caller takes the secrets.
///
/// # Errors
/// When the database is away.
pub(super) async fn lose_secrets(tx: &mut db::Tx<'_>) -> Result<Vec<i64>> {
    Ok(sqlx::query_scalar!(
        "UPDATE credentials SET reset_at = now(), updated_at = now(), lost_secret_fields = ARRAY(
             SELECT f.name FROM (VALUES ('password', password_sealed), ('private_key', private_key_sealed),
                 ('private_key_passphrase', private_key_passphrase_sealed), ('become_password', become_password_sealed)) f (name, sealed)
             WHERE f.sealed IS NOT NULL OR f.name = ANY (lost_secret_fields))
         WHERE num_nonnulls(password_sealed, private_key_sealed, private_key_passphrase_sealed, become_password_sealed) > 0
         RETURNING id"
    )
    .fetch_all(&mut **tx)
    .await?)
}

/// Deletes a credential.
///
/// # Errors
/// 404 `credential not found`; 409 `credential_in_use` with the jobs that use it.
pub async fn delete(pool: &db::Pool, actor: &Actor, id: i64) -> Result<()> {
    let mut tx = pool.begin().await?;
    let credential = sqlx::query!("SELECT name, site_id FROM credentials WHERE id = $1 FOR UPDATE", id)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or_else(not_found)?;
    let jobs = sqlx::query!("SELECT id, name FROM scheduled_jobs WHERE credential_id = $1 ORDER BY id LIMIT $2", id, JOBS_NAMED)
        .fetch_all(&mut *tx)
        .await?;
    if !jobs.is_empty() {
        let jobs: Vec<_> = jobs.into_iter().map(|job| json!({ "id": job.id, "name": job.name })).collect();
        return Err(Error::conflict("credential_in_use", "Scheduled jobs use this credential; change or delete them first.")
            .with("jobs", jobs));
    }
    sqlx::query!("DELETE FROM credentials WHERE id = $1", id).execute(&mut *tx).await?;
    let entry = Entry {
        action: "credential.delete",
        object_kind: "credential",
        object_id: id.to_string(),
        site_id: credential.site_id,
        detail: json!({ "name": credential.name }),
        ..Entry::default()
    };
    audit::record(&mut tx, actor, entry).await?;
    tx.commit().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank() -> Credential {
        Credential {
            id: 1,
            name: "web".into(),
            description: String::new(),
            site_id: None,
            site_name: String::new(),
            credential_type: "machine".into(),
            connection_type: "ssh".into(),
            username: String::new(),
            has: Vec::new(),
            become_method: String::new(),
            become_username: String::new(),
            metadata: Map::new(),
            lost_secret_fields: Vec::new(),
            reset_at: None,
            created_at: DateTime::UNIX_EPOCH,
            updated_at: DateTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn what_is_absent_stays_and_what_is_empty_goes() {
        let mut credential = blank();
        credential.metadata.insert("winrm_transport".into(), json!("ntlm"));
        apply(&mut credential, &Change { username: Some(" ada ".into()), ..Change::default() }).unwrap();
        assert_eq!((credential.name.as_str(), credential.username.as_str()), ("web", "ada"));
        assert_eq!(credential.metadata["winrm_transport"], "ntlm");
        apply(&mut credential, &Change { winrm_transport: Some(String::new()), ..Change::default() }).unwrap();
        assert!(credential.metadata.is_empty());
        let code = |change| apply(&mut blank(), &change).unwrap_err().code;
        assert_eq!(code(Change { name: Some(" ".into()), ..Change::default() }), "name is required");
        assert_eq!(code(Change { credential_type: Some("x".into()), ..Change::default() }), "invalid credential_type");
        assert_eq!(code(Change { connection_type: Some("x".into()), ..Change::default() }), "invalid connection_type");
        let long = SecretChange::Set(Secret::new("x".repeat(SECRET_MAX_BYTES + 1)));
        assert_eq!(code(Change { private_key: long, ..Change::default() }), "invalid_field");
    }

    #[test]
    fn the_marks_of_a_reset_are_ours_and_go_with_the_last_secret_set_again() {
        let mut credential = blank();
        credential.lost_secret_fields = vec!["password".into(), "private_key".into()];
        credential.reset_at = Some(DateTime::UNIX_EPOCH);
        let metadata = json!({"aegis_secret_state": "fine", "aegis_reset_at": 7, "note": "kept"}).as_object().cloned();
        apply(&mut credential, &Change { metadata, ..Change::default() }).unwrap();
        assert_eq!(credential.metadata, json!({"note": "kept"}).as_object().cloned().unwrap());
        assert_eq!(credential.shown_metadata()["aegis_secret_state"], "reset_required");
        apply(&mut credential, &Change { password: SecretChange::Set(Secret::new("x".into())), ..Change::default() }).unwrap();
        assert_eq!(credential.shown_metadata()["aegis_lost_secret_fields"], json!(["private_key"]));
        apply(&mut credential, &Change { private_key: SecretChange::Clear, ..Change::default() }).unwrap();
        assert_eq!(credential.shown_metadata(), credential.metadata);
        assert_eq!(credential.has, [Field::Password]);
    }

    #[test]
    fn private_keys_have_the_line_ends_programs_read() {
        assert_eq!(private_key("\u{feff}a\r\nb\rc"), "a\nb\nc\n");
        assert_eq!(private_key("a\n"), "a\n");
    }
}
