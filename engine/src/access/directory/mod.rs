//! Directories: LDAP servers and Active Directory whose people may sign in. Administrators only, but for the sign-in.
//!
//! A provider is used only after a test of exactly what it is now has passed: whatever changes how it is reached switches it
//! off, and whatever changes where its password would go forgets the password.

use std::{collections::BTreeMap, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{Access, aegis::Vault, api_tokens, challenges, sessions, users::Role};
use crate::{
    audit::{self, Entry},
    db, egress,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::Actor,
    secret::Secret,
};

pub mod dn;
mod groups;
pub mod ldap;
pub mod sign_in;
pub mod sync;
pub mod trust;

use ldap::Target;
use trust::Trust;

const BIND_PASSWORD: &str = "directory_providers.bind_password";
const KEYTAB: &str = "directory_providers.kerberos_keytab";
/// The most characters of a text setting.
const TEXT_MAX_CHARS: usize = 1000;
/// The most bytes of the trusted certificates and of a secret.
const LONG_MAX_BYTES: usize = 64 * 1024;
/// The most servers and overrides of a provider.
const SERVERS_MAX: usize = 16;
/// The most mappings of a provider, and groups or sites of one.
const MAPPINGS_MAX: usize = 500;
/// The shortest time between two syncs, in seconds, and the longest.
const SYNC_S: std::ops::RangeInclusive<i32> = 60..=7 * 24 * 3600;

/// What a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ProviderType {
    /// An LDAP server.
    #[default]
    Ldap,
    /// A domain controller.
    ActiveDirectory,
}

impl ProviderType {
    /// The text stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// Reads a type, any case, with spaces, dashes or underscores; whatever is not Active Directory is LDAP.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let letters: String = text.to_lowercase().chars().filter(char::is_ascii_alphabetic).collect();
        if matches!(letters.as_str(), "ad" | "activedirectory") { Self::ActiveDirectory } else { Self::Ldap }
    }
}

/// A group and what it makes of its members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMapping {
    /// Its distinguished name.
    pub group_dn: String,
    /// The role.
    pub role: Role,
}

/// Groups and the sites their members see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteMapping {
    /// Its id; none before it is stored.
    pub id: Option<i64>,
    /// What people call it.
    pub label: String,
    /// Distinguished names.
    pub group_dns: Vec<String>,
    /// Sites.
    pub site_ids: Vec<i64>,
}

/// What an administrator sets of a provider, but for its secrets and mappings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Its name, unique in any case.
    pub name: String,
    /// What the servers speak.
    pub provider_type: ProviderType,
    /// The lowest is asked first.
    pub priority: i32,
    /// The domain by which people name it: `user@domain`, `DOMAIN\user`.
    pub domain_suffix: String,
    /// `ldap://` and `ldaps://` URLs, tried in order.
    pub server_urls: Vec<String>,
    /// Addresses for names, in place of the name server's.
    pub host_overrides: BTreeMap<String, IpAddr>,
    /// The scheme of URLs without one.
    pub use_ldaps: bool,
    /// Whether `ldap://` URLs must switch to TLS (StartTLS) before anything is said.
    pub tls_required: bool,
    /// Whom to trust; see [`Trust::of`].
    pub tls_ca_pem: String,
    /// Where people are searched.
    pub base_dn: String,
    /// The provider's own account; empty: none.
    pub bind_dn: String,
    /// How a person is found: `{username}` and `{user}` are the account part of what was typed, `{login}` is all of it.
    pub user_search_filter: String,
    /// The attribute that is the name to sign in with.
    pub username_attribute: String,
    /// The attribute with the name to show.
    pub display_name_attribute: String,
    /// The attribute with the address for mail.
    pub email_attribute: String,
    /// The attribute with the groups.
    pub member_of_attribute: String,
    /// Where groups are searched; empty: where people are.
    pub group_search_base_dn: String,
    /// How further groups of a person are found, for instance those that name their members by `memberUid`; empty: not at
    /// all. `{dn}`, `{username}` and `{gid}` are the person's name, username attribute and `gidNumber`.
    pub group_search_filter: String,
    /// Whether groups of groups count.
    pub nested_groups: bool,
    /// The Kerberos realm: another name of the domain. Sign-in itself binds over TLS.
    pub kerberos_realm: String,
    /// The key distribution centre. Kept for clients.
    pub kerberos_kdc: String,
    /// How often cached users are looked up again, in seconds.
    pub sync_interval_seconds: i32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: String::new(),
            provider_type: ProviderType::Ldap,
            priority: 100,
            domain_suffix: String::new(),
            server_urls: Vec::new(),
            host_overrides: BTreeMap::new(),
            use_ldaps: false,
            tls_required: true,
            tls_ca_pem: String::new(),
            base_dn: String::new(),
            bind_dn: String::new(),
            user_search_filter: String::new(),
            username_attribute: String::new(),
            display_name_attribute: "displayName".to_owned(),
            email_attribute: "mail".to_owned(),
            member_of_attribute: "memberOf".to_owned(),
            group_search_base_dn: String::new(),
            group_search_filter: String::new(),
            nested_groups: true,
            kerberos_realm: String::new(),
            kerberos_kdc: String::new(),
            sync_interval_seconds: 60,
        }
    }
}

/// When something last happened to a provider, and how it went.
#[derive(Debug, Clone, Default)]
pub struct Last {
    /// When.
    pub at: Option<DateTime<Utc>>,
    /// `ok`, `failed`, or empty when it never happened.
    pub status: String,
    /// A sentence.
    pub message: String,
}

/// A provider.
#[derive(Debug, Clone)]
pub struct Provider {
    /// Its id.
    pub id: i64,
    /// Whether its people may sign in.
    pub enabled: bool,
    /// What an administrator has set.
    pub settings: Settings,
    bind_password_sealed: Option<String>,
    keytab_sealed: Option<String>,
    /// Groups and roles, in order.
    pub group_mappings: Vec<GroupMapping>,
    /// Groups and sites, in order.
    pub site_mappings: Vec<SiteMapping>,
    /// The last sync.
    pub last_sync: Last,
    /// The last test.
    pub last_test: Last,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

impl Provider {
    /// Whether there is a bind password.
    #[must_use]
    pub fn has_bind_password(&self) -> bool {
        self.bind_password_sealed.is_some()
    }

    /// Whether there is a keytab.
    #[must_use]
    pub fn has_keytab(&self) -> bool {
        self.keytab_sealed.is_some()
    }

    fn bind_password(&self, vault: &Vault) -> Result<Option<Secret<String>>> {
        self.bind_password_sealed.as_deref().map(|sealed| vault.open(BIND_PASSWORD, self.id, sealed)).transpose()
    }
}

/// What changes of a provider; what is none stays.
#[derive(Debug, Default)]
pub struct Change {
    /// See [`Settings`], likewise below.
    pub name: Option<String>,
    /// The type.
    pub provider_type: Option<ProviderType>,
    /// Whether its people may sign in.
    pub enabled: Option<bool>,
    /// The priority.
    pub priority: Option<i32>,
    /// The domain.
    pub domain_suffix: Option<String>,
    /// The servers.
    pub server_urls: Option<Vec<String>>,
    /// The overrides.
    pub host_overrides: Option<BTreeMap<String, IpAddr>>,
    /// The default scheme.
    pub use_ldaps: Option<bool>,
    /// Whether TLS is a must.
    pub tls_required: Option<bool>,
    /// Whom to trust.
    pub tls_ca_pem: Option<String>,
    /// Where people are.
    pub base_dn: Option<String>,
    /// The account that the engine binds with.
    pub bind_dn: Option<String>,
    /// Its password; empty: forget it.
    pub bind_password: Option<Secret<String>>,
    /// How people are found.
    pub user_search_filter: Option<String>,
    /// An attribute.
    pub username_attribute: Option<String>,
    /// An attribute.
    pub display_name_attribute: Option<String>,
    /// An attribute.
    pub email_attribute: Option<String>,
    /// An attribute.
    pub member_of_attribute: Option<String>,
    /// Where groups are.
    pub group_search_base_dn: Option<String>,
    /// How further groups are found.
    pub group_search_filter: Option<String>,
    /// Whether groups of groups count.
    pub nested_groups: Option<bool>,
    /// The realm.
    pub kerberos_realm: Option<String>,
    /// The key distribution centre.
    pub kerberos_kdc: Option<String>,
    /// The keytab in base64; empty: forget it.
    pub keytab: Option<Secret<String>>,
    /// How often to sync.
    pub sync_interval_seconds: Option<i32>,
    /// All group mappings.
    pub group_mappings: Option<Vec<GroupMapping>>,
    /// All site mappings.
    pub site_mappings: Option<Vec<SiteMapping>>,
}

fn set<T>(value: &mut T, change: Option<T>) {
    if let Some(change) = change {
        *value = change;
    }
}

fn set_text(value: &mut String, change: Option<String>) {
    set(value, change.map(|text| text.trim().to_owned()));
}

impl Settings {
    fn apply(&mut self, change: &mut Change) {
        set_text(&mut self.name, change.name.take());
        set(&mut self.provider_type, change.provider_type);
        set(&mut self.priority, change.priority);
        set_text(&mut self.domain_suffix, change.domain_suffix.take());
        set(&mut self.server_urls, change.server_urls.take());
        set(&mut self.host_overrides, change.host_overrides.take());
        set(&mut self.use_ldaps, change.use_ldaps);
        set(&mut self.tls_required, change.tls_required);
        set_text(&mut self.tls_ca_pem, change.tls_ca_pem.take());
        set_text(&mut self.base_dn, change.base_dn.take());
        set_text(&mut self.bind_dn, change.bind_dn.take());
        set_text(&mut self.user_search_filter, change.user_search_filter.take());
        set_text(&mut self.username_attribute, change.username_attribute.take());
        set_text(&mut self.display_name_attribute, change.display_name_attribute.take());
        set_text(&mut self.email_attribute, change.email_attribute.take());
        set_text(&mut self.member_of_attribute, change.member_of_attribute.take());
        set_text(&mut self.group_search_base_dn, change.group_search_base_dn.take());
        set_text(&mut self.group_search_filter, change.group_search_filter.take());
        set(&mut self.nested_groups, change.nested_groups);
        set_text(&mut self.kerberos_realm, change.kerberos_realm.take().map(|realm| realm.to_uppercase()));
        set_text(&mut self.kerberos_kdc, change.kerberos_kdc.take());
        set(&mut self.sync_interval_seconds, change.sync_interval_seconds);
        self.complete();
    }

    /// Fills in what is empty and has a default.
    fn complete(&mut self) {
        let default = Self::default();
        let ad = self.provider_type == ProviderType::ActiveDirectory;
        let or = |value: &mut String, default: &str| {
            if value.is_empty() {
                default.clone_into(value);
            }
        };
        or(&mut self.username_attribute, if ad { "sAMAccountName" } else { "uid" });
        or(&mut self.display_name_attribute, &default.display_name_attribute);
        or(&mut self.email_attribute, &default.email_attribute);
        or(&mut self.member_of_attribute, &default.member_of_attribute);
        let filter = if ad {
            format!(
                "(&(objectCategory=person)(objectClass=user)(|({}={{user}})(userPrincipalName={{login}})))",
                self.username_attribute
            )
        } else {
            format!("({}={{user}})", self.username_attribute)
        };
        or(&mut self.user_search_filter, &filter);
        self.sync_interval_seconds = self.sync_interval_seconds.clamp(*SYNC_S.start(), *SYNC_S.end());
    }

    fn check(&self) -> Result<()> {
        if self.name.is_empty() {
            return Err(Error::field("name_required", "name", "is required."));
        }
        Name::parse(&self.name, &Rule { field: "name", code: "invalid_text", max_chars: TEXT_MAX_CHARS, in_paths: false })?;
        for (field, text) in [
            ("domain_suffix", &self.domain_suffix),
            ("base_dn", &self.base_dn),
            ("bind_dn", &self.bind_dn),
            ("user_search_filter", &self.user_search_filter),
            ("group_search_base_dn", &self.group_search_base_dn),
            ("group_search_filter", &self.group_search_filter),
            ("kerberos_realm", &self.kerberos_realm),
            ("kerberos_kdc", &self.kerberos_kdc),
        ] {
            if text.chars().count() > TEXT_MAX_CHARS || text.chars().any(char::is_control) {
                let why = format!("must have at most {TEXT_MAX_CHARS} characters, and no control characters.");
                return Err(Error::field("invalid_text", field, why));
            }
        }
        for (field, text) in [
            ("username_attribute", &self.username_attribute),
            ("display_name_attribute", &self.display_name_attribute),
            ("email_attribute", &self.email_attribute),
            ("member_of_attribute", &self.member_of_attribute),
        ] {
            if text.len() > 100 || !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b';')) {
                return Err(Error::field("invalid_attribute", field, "must be the name of an attribute."));
            }
        }
        if self.server_urls.len() > SERVERS_MAX || self.host_overrides.len() > SERVERS_MAX {
            let why = format!("and host_overrides must have at most {SERVERS_MAX} entries.");
            return Err(Error::field("invalid_server_url", "server_urls", why));
        }
        for url in &self.server_urls {
            let _ = Target::parse(url, self.use_ldaps, &self.host_overrides)?;
        }
        check_filter("user_search_filter", &self.user_search_filter, &["{username}", "{user}", "{login}"])?;
        if !self.group_search_filter.is_empty() {
            check_filter("group_search_filter", &self.group_search_filter, &["{dn}", "{username}", "{gid}"])?;
        }
        if self.tls_ca_pem.len() > LONG_MAX_BYTES {
            return Err(Error::field("invalid_certificate", "tls_ca_pem", "must have at most 64 KiB."));
        }
        Trust::of(&self.tls_ca_pem).map(|_| ())
    }

    /// Whether this is the provider's domain: its suffix or realm, or the first label of one.
    #[must_use]
    pub fn is_domain(&self, domain: &str) -> bool {
        let first = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
        [&self.domain_suffix, &self.kerberos_realm].into_iter().any(|name| {
            let name = name.trim_start_matches(['@', '.']).to_lowercase();
            !name.is_empty() && (name == domain || first(&name) == domain)
        })
    }

    /// Whether somebody else, or somebody in between, could get the bind password now.
    fn leads_elsewhere(&self, before: &Self) -> bool {
        self.server_urls != before.server_urls
            || self.host_overrides != before.host_overrides
            || self.use_ldaps != before.use_ldaps
            || self.tls_required != before.tls_required
            || self.tls_ca_pem != before.tls_ca_pem
    }

    /// Whether a test of what was before says nothing of this.
    fn needs_test(&self, before: &Self) -> bool {
        let told_apart = |settings: &Self| Self {
            name: String::new(),
            priority: 0,
            domain_suffix: String::new(),
            kerberos_realm: String::new(),
            kerberos_kdc: String::new(),
            sync_interval_seconds: 60,
            ..settings.clone()
        };
        told_apart(self) != told_apart(before)
    }
}

fn not_found() -> Error {
    Error::new(Kind::NotFound, "provider_not_found", "There is no such directory provider.")
}

/// A filter with values in place of its placeholders must be an LDAP filter, and there must be one of them.
fn check_filter(field: &str, filter: &str, placeholders: &[&str]) -> Result<()> {
    let named = placeholders.iter().any(|placeholder| filter.contains(placeholder));
    let sample = placeholders.iter().fold(filter.to_owned(), |filter, placeholder| filter.replace(placeholder, "x"));
    if named && ldap3::parse_filter(sample).is_ok() {
        return Ok(());
    }
    let why = format!("must be an LDAP filter with {} in it.", placeholders.join(" or "));
    Err(Error::field("invalid_filter", field, why))
}

fn check_mappings(change: &mut Change) -> Result<()> {
    let text = |field: &str, text: &str| {
        if text.chars().count() > TEXT_MAX_CHARS || text.chars().any(char::is_control) {
            let why = format!("must have at most {TEXT_MAX_CHARS} characters, and no control characters.");
            return Err(Error::field("invalid_text", field, why));
        }
        Ok(())
    };
    let name = |field: &str, name: &str| {
        text(field, name)?;
        if dn::is_valid(name) {
            return Ok(());
        }
        Err(Error::field(
            "invalid_dn",
            field,
            format!("{name} is not a distinguished name, like cn=Operators,ou=groups,dc=example,dc=org."),
        ))
    };
    if let Some(mappings) = &mut change.group_mappings {
        let mut seen = std::collections::BTreeSet::new();
        mappings.iter_mut().for_each(|mapping| mapping.group_dn = mapping.group_dn.trim().to_owned());
        mappings.retain(|mapping| {
            !mapping.group_dn.is_empty() && seen.insert((dn::normal(&mapping.group_dn), mapping.role.as_str()))
        });
        if mappings.len() > MAPPINGS_MAX {
            return Err(Error::field("invalid_text", "group_mappings", format!("must have at most {MAPPINGS_MAX} entries.")));
        }
        mappings.iter().try_for_each(|mapping| name("group_mappings", &mapping.group_dn))?;
    }
    if let Some(mappings) = &mut change.site_mappings {
        for mapping in mappings.iter_mut() {
            mapping.group_dns = mapping.group_dns.iter().map(|dn| dn.trim().to_owned()).filter(|dn| !dn.is_empty()).collect();
            mapping.label = mapping.label.trim().to_owned();
        }
        mappings.retain(|mapping| !mapping.group_dns.is_empty() || !mapping.site_ids.is_empty());
        let most = mappings.iter().map(|mapping| mapping.group_dns.len().max(mapping.site_ids.len())).max().unwrap_or(0);
        if mappings.len() > MAPPINGS_MAX || most > MAPPINGS_MAX {
            return Err(Error::field("invalid_text", "site_mappings", format!("must have at most {MAPPINGS_MAX} entries.")));
        }
        for (position, mapping) in mappings.iter_mut().enumerate() {
            mapping.group_dns.iter().try_for_each(|group| name("site_mappings", group))?;
            text("site_mappings", &mapping.label)?;
            if mapping.label.is_empty() {
                mapping.label = format!("User Site Group {}", position + 1);
            }
        }
    }
    Ok(())
}

/// All providers, in the order they are asked.
///
/// # Errors
/// When the database is away.
pub async fn list(pool: &db::Pool) -> Result<Vec<Provider>> {
    load(&mut *pool.acquire().await?, None).await
}

/// One provider.
///
/// # Errors
/// 404 `provider_not_found`.
pub async fn get(pool: &db::Pool, id: i64) -> Result<Provider> {
    load(&mut *pool.acquire().await?, Some(id)).await?.pop().ok_or_else(not_found)
}

async fn load(connection: &mut sqlx::PgConnection, id: Option<i64>) -> Result<Vec<Provider>> {
    let rows =
        sqlx::query!("SELECT * FROM directory_providers WHERE $1::bigint IS NULL OR id = $1 ORDER BY priority, name_key", id,)
            .fetch_all(&mut *connection)
            .await?;
    let groups = sqlx::query!(
        "SELECT provider_id, group_dn, role FROM directory_group_mappings
         WHERE $1::bigint IS NULL OR provider_id = $1 ORDER BY provider_id, position",
        id,
    )
    .fetch_all(&mut *connection)
    .await?;
    let sites = sqlx::query!(
        r#"SELECT m.id, m.provider_id, m.label, m.group_dns,
                  ARRAY(SELECT s.site_id FROM directory_mapped_sites s WHERE s.mapping_id = m.id ORDER BY s.site_id) AS "site_ids!"
           FROM directory_site_mappings m
           WHERE $1::bigint IS NULL OR m.provider_id = $1 ORDER BY m.provider_id, m.position"#,
        id,
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut providers = Vec::with_capacity(rows.len());
    for row in rows {
        let of_this = |provider_id: i64| provider_id == row.id;
        let mut group_mappings = Vec::new();
        for group in groups.iter().filter(|group| of_this(group.provider_id)) {
            group_mappings.push(GroupMapping { group_dn: group.group_dn.clone(), role: Role::parse(&group.role)? });
        }
        let site_mappings = sites.iter().filter(|mapping| of_this(mapping.provider_id)).map(|mapping| SiteMapping {
            id: Some(mapping.id),
            label: mapping.label.clone(),
            group_dns: mapping.group_dns.clone(),
            site_ids: mapping.site_ids.clone(),
        });
        providers.push(Provider {
            id: row.id,
            enabled: row.enabled,
            site_mappings: site_mappings.collect(),
            group_mappings,
            settings: Settings {
                name: row.name,
                provider_type: ProviderType::parse(&row.provider_type),
                priority: row.priority,
                domain_suffix: row.domain_suffix,
                server_urls: row.server_urls,
                host_overrides: serde_json::from_value(row.host_overrides)?,
                use_ldaps: row.use_ldaps,
                tls_required: row.tls_required,
                tls_ca_pem: row.tls_ca_pem,
                base_dn: row.base_dn,
                bind_dn: row.bind_dn,
                user_search_filter: row.user_search_filter,
                username_attribute: row.username_attribute,
                display_name_attribute: row.display_name_attribute,
                email_attribute: row.email_attribute,
                member_of_attribute: row.member_of_attribute,
                group_search_base_dn: row.group_search_base_dn,
                group_search_filter: row.group_search_filter,
                nested_groups: row.nested_groups,
                kerberos_realm: row.kerberos_realm,
                kerberos_kdc: row.kerberos_kdc,
                sync_interval_seconds: row.sync_interval_seconds,
            },
            bind_password_sealed: row.bind_password_sealed,
            keytab_sealed: row.kerberos_keytab_sealed,
            last_sync: Last { at: row.last_sync_at, status: row.last_sync_status, message: row.last_sync_message },
            last_test: Last { at: row.last_test_at, status: row.last_test_status, message: row.last_test_message },
            created_at: row.created_at,
            updated_at: row.updated_at,
        });
    }
    Ok(providers)
}

impl Access<'_> {
    /// Makes a provider, switched off until a test of it has passed.
    ///
    /// # Errors
    /// 400 `name_required`, `invalid_*`; 404 `site_not_found`; 409 `provider_name_exists`, `test_required`; 423 `aegis_locked`.
    pub async fn create_provider(&self, actor: &Actor, mut change: Change) -> Result<Provider> {
        if change.enabled == Some(true) {
            return Err(test_required());
        }
        let mut settings = Settings::default();
        settings.apply(&mut change);
        settings.check()?;
        check_mappings(&mut change)?;
        let mut tx = self.pool.begin().await?;
        let id = sqlx::query_scalar!(
            "INSERT INTO directory_providers (name, name_key) VALUES ($1, $2) RETURNING id",
            settings.name,
            names::key(&settings.name),
        )
        .fetch_one(&mut *tx)
        .await
        .map_err(name_taken)?;
        self.write(&mut tx, id, &settings, &mut change).await?;
        let provider = load(&mut tx, Some(id)).await?.pop().ok_or_else(not_found)?;
        record(&mut tx, actor, "directory.create", id, shown(&provider)).await?;
        tx.commit().await?;
        Ok(provider)
    }

    /// Changes a provider; the ids of the sessions that ended because of it come with it.
    ///
    /// What changes how people are found or servers reached switches it off until it is tested again. What changes where the
    /// bind password would go forgets it, unless it is sent again. Switching it off ends the sessions and API tokens of its people.
    ///
    /// # Errors
    /// As [`Access::create_provider`]; 404 `provider_not_found`.
    pub async fn update_provider(&self, actor: &Actor, id: i64, mut change: Change) -> Result<(Provider, Vec<Uuid>)> {
        let mut tx = self.pool.begin().await?;
        sqlx::query_scalar!("SELECT id FROM directory_providers WHERE id = $1 FOR UPDATE", id)
            .fetch_optional(&mut *tx)
            .await?
            .ok_or_else(not_found)?;
        let before = load(&mut tx, Some(id)).await?.pop().ok_or_else(not_found)?;
        let mut settings = before.settings.clone();
        settings.apply(&mut change);
        settings.check()?;
        check_mappings(&mut change)?;
        let forgotten = settings.leads_elsewhere(&before.settings) && change.bind_password.is_none();
        if forgotten {
            change.bind_password = Some(Secret::new(String::new()));
        }
        let untested = settings.needs_test(&before.settings) || change.bind_password.is_some();
        // One that is on stays on when a later test fails: its server may only be away.
        let tested = !untested && (before.enabled || before.last_test.status == "ok");
        if change.enabled == Some(true) && !tested {
            return Err(test_required());
        }
        let enabled = change.enabled.unwrap_or(before.enabled) && tested;
        sqlx::query!(
            "UPDATE directory_providers SET enabled = $2, last_test_status = CASE WHEN $3 THEN '' ELSE last_test_status END,
                    last_test_message = CASE WHEN $3 THEN '' ELSE last_test_message END,
                    last_test_at = CASE WHEN $3 THEN NULL ELSE last_test_at END
             WHERE id = $1",
            id,
            enabled,
            untested,
        )
        .execute(&mut *tx)
        .await?;
        let remapped = change.site_mappings.is_some() || change.group_mappings.is_some();
        self.write(&mut tx, id, &settings, &mut change).await?;
        let mut ended = Vec::new();
        if before.enabled && change.enabled == Some(false) {
            for user in cached(&mut tx, id).await? {
                api_tokens::revoke_all(&mut tx, user).await?;
                challenges::end_all(&mut tx, user).await?;
                ended.extend(sessions::end_all(&mut tx, user, None).await?);
            }
        }
        let provider = load(&mut tx, Some(id)).await?.pop().ok_or_else(not_found)?;
        if remapped {
            sync::remap(&mut tx, actor, &provider).await?;
        }
        let mut detail = changed(&shown(&before), &shown(&provider));
        detail["bind_password_forgotten"] = json!(forgotten && before.has_bind_password());
        record(&mut tx, actor, "directory.update", id, detail).await?;
        tx.commit().await?;
        Ok((provider, ended))
    }

    async fn write(&self, tx: &mut db::Tx<'_>, id: i64, settings: &Settings, change: &mut Change) -> Result<()> {
        sqlx::query!(
            "UPDATE directory_providers SET name = $2, provider_type = $3, priority = $4, domain_suffix = $5, server_urls = $6,
                    host_overrides = $7, use_ldaps = $8, tls_required = $9, tls_ca_pem = $10, base_dn = $11, bind_dn = $12,
                    user_search_filter = $13, username_attribute = $14, display_name_attribute = $15, email_attribute = $16,
                    member_of_attribute = $17, group_search_base_dn = $18, nested_groups = $19, kerberos_realm = $20,
                    kerberos_kdc = $21, sync_interval_seconds = $22, group_search_filter = $23, name_key = $24, updated_at = now()
             WHERE id = $1",
            id,
            settings.name,
            settings.provider_type.as_str(),
            settings.priority,
            settings.domain_suffix,
            &settings.server_urls,
            serde_json::to_value(&settings.host_overrides)?,
            settings.use_ldaps,
            settings.tls_required,
            settings.tls_ca_pem,
            settings.base_dn,
            settings.bind_dn,
            settings.user_search_filter,
            settings.username_attribute,
            settings.display_name_attribute,
            settings.email_attribute,
            settings.member_of_attribute,
            settings.group_search_base_dn,
            settings.nested_groups,
            settings.kerberos_realm,
            settings.kerberos_kdc,
            settings.sync_interval_seconds,
            settings.group_search_filter,
            names::key(&settings.name),
        )
        .execute(&mut **tx)
        .await
        .map_err(name_taken)?;
        if let Some(password) = change.bind_password.take() {
            let sealed = self.sealed(tx, BIND_PASSWORD, "bind_password", id, &password).await?;
            sqlx::query!("UPDATE directory_providers SET bind_password_sealed = $2 WHERE id = $1", id, sealed)
                .execute(&mut **tx)
                .await?;
        }
        if let Some(keytab) = change.keytab.take() {
            if STANDARD.decode(keytab.expose().trim()).is_err() {
                return Err(Error::field("invalid_keytab", "kerberos_keytab_base64", "must be base64."));
            }
            let sealed = self.sealed(tx, KEYTAB, "kerberos_keytab_base64", id, &keytab).await?;
            sqlx::query!("UPDATE directory_providers SET kerberos_keytab_sealed = $2 WHERE id = $1", id, sealed)
                .execute(&mut **tx)
                .await?;
        }
        if let Some(mappings) = change.group_mappings.take() {
            sqlx::query!("DELETE FROM directory_group_mappings WHERE provider_id = $1", id).execute(&mut **tx).await?;
            let (dns, roles): (Vec<String>, Vec<String>) =
                mappings.into_iter().map(|mapping| (mapping.group_dn, mapping.role.as_str().to_owned())).unzip();
            sqlx::query!(
                "INSERT INTO directory_group_mappings (provider_id, position, group_dn, role)
                 SELECT $1, position, dn, role FROM unnest($2::text[], $3::text[]) WITH ORDINALITY AS m (dn, role, position)",
                id,
                &dns,
                &roles,
            )
            .execute(&mut **tx)
            .await?;
        }
        if let Some(mappings) = change.site_mappings.take() {
            sqlx::query!("DELETE FROM directory_site_mappings WHERE provider_id = $1", id).execute(&mut **tx).await?;
            for (position, mapping) in (0i32..).zip(mappings) {
                let mapping_id = sqlx::query_scalar!(
                    "INSERT INTO directory_site_mappings (provider_id, position, label, group_dns) VALUES ($1, $2, $3, $4)
                     RETURNING id",
                    id,
                    position,
                    mapping.label,
                    &mapping.group_dns,
                )
                .fetch_one(&mut **tx)
                .await?;
                sqlx::query!(
                    "INSERT INTO directory_mapped_sites (mapping_id, site_id) SELECT DISTINCT $1::bigint, s FROM unnest($2::bigint[]) s",
                    mapping_id,
                    &mapping.site_ids,
                )
                .execute(&mut **tx)
                .await
                .map_err(|error| {
                    Error::from(error).on_constraint("directory_mapped_sites_site_id_fkey", || {
                        Error::new(Kind::NotFound, "site_not_found", "A mapping names a site that does not exist.")
                    })
                })?;
            }
        }
        Ok(())
    }

    async fn sealed(
        &self,
        tx: &mut db::Tx<'_>,
        column: &'static str,
        field: &str,
        id: i64,
        secret: &Secret<String>,
    ) -> Result<Option<String>> {
        if secret.expose().len() > LONG_MAX_BYTES {
            return Err(Error::field("invalid_text", field, "must have at most 64 KiB."));
        }
        if secret.expose().is_empty() { Ok(None) } else { self.vault.seal(tx, column, id, secret.expose()).await.map(Some) }
    }

    /// Removes a provider that nobody signs in with.
    ///
    /// # Errors
    /// 404 `provider_not_found`; 409 `provider_has_cached_users`.
    pub async fn delete_provider(&self, actor: &Actor, id: i64) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        let deleted = sqlx::query_scalar!("DELETE FROM directory_providers WHERE id = $1 RETURNING name", id)
            .fetch_optional(&mut *tx)
            .await
            .map_err(|error| {
                Error::from(error).on_constraint("users_directory_provider_fkey", || {
                    let why = "People of this provider have accounts; disable and delete those first.";
                    Error::conflict("provider_has_cached_users", why)
                })
            })?
            .ok_or_else(not_found)?;
        record(&mut tx, actor, "directory.delete", id, json!({ "name": deleted })).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Tries a provider: connects, binds, reads the base. What came out is kept; the message is for the administrator.
    ///
    /// # Errors
    /// 404 `provider_not_found`; 423 `aegis_locked`. A test that failed is no error.
    pub async fn test_provider(&self, actor: &Actor, id: i64) -> Result<Last> {
        let provider = get(self.pool, id).await?;
        let password = provider.bind_password(self.vault)?;
        let outcome = async {
            let mut connection = ldap::Connection::open(&self.settings.egress, &provider, password.as_ref(), false).await?;
            connection.read_base().await
        }
        .await;
        let (status, message) = match outcome {
            Ok(()) => ("ok", "The directory was reached and its base could be read.".to_owned()),
            Err(error) => {
                tracing::info!(provider = id, %error, source = ?error.source, "a test of a directory provider failed");
                ("failed", error.message)
            }
        };
        let mut tx = self.pool.begin().await?;
        // Only for what was tested: a change in the meantime has made it untested.
        sqlx::query!(
            "UPDATE directory_providers SET last_test_at = now(), last_test_status = $3, last_test_message = left($4, 500)
             WHERE id = $1 AND updated_at = $2",
            id,
            provider.updated_at,
            status,
            message,
        )
        .execute(&mut *tx)
        .await?;
        record(&mut tx, actor, "directory.test", id, json!({ "status": status, "message": message })).await?;
        tx.commit().await?;
        Ok(Last { at: Some(Utc::now()), status: status.to_owned(), message })
    }

    /// What a server shows as its certificate, unchecked, so that a person can decide to pin it. The first that answers.
    ///
    /// # Errors
    /// 400 `missing_server`, `invalid_server_url`, `ldaps_required`; 403 `egress_refused`; 502 `certificate_download_failed`.
    pub async fn directory_certificate(
        &self,
        urls: &[String],
        use_ldaps: bool,
        overrides: &BTreeMap<String, IpAddr>,
    ) -> Result<(String, Target, trust::Certificate)> {
        if urls.is_empty() {
            return Err(Error::field("missing_server", "server_url", "is required."));
        }
        let mut last = Error::field("missing_server", "server_url", "is required.");
        for url in urls.iter().take(SERVERS_MAX) {
            let target = Target::parse(url, use_ldaps, overrides)?;
            if target.scheme != "ldaps" {
                return Err(Error::field("ldaps_required", "server_url", "must be an ldaps:// URL."));
            }
            let connected = self.settings.egress.connect(egress::DIRECTORY, &target.name, target.port, target.pinned).await;
            let shown = match connected {
                Ok(stream) => trust::download(stream, &target.name).await,
                Err(error) if error.kind == Kind::Forbidden => return Err(error),
                Err(error) => {
                    let mut failed = Error::new(Kind::Upstream, "certificate_download_failed", error.message.clone());
                    failed.source = Some(error.into());
                    Err(failed)
                }
            };
            match shown {
                Ok(certificate) => return Ok((url.clone(), target, certificate)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

fn test_required() -> Error {
    Error::conflict("test_required", "Test the provider as it is now before it is switched on.")
}

fn name_taken(error: sqlx::Error) -> Error {
    Error::from(error).on_constraint("directory_providers_name_key", || {
        Error::conflict("provider_name_exists", "Another provider has this name.")
    })
}

/// For the audit: what is not secret, and tells where passwords go and who becomes what.
fn shown(provider: &Provider) -> serde_json::Value {
    let settings = &provider.settings;
    let groups =
        provider.group_mappings.iter().map(|mapping| json!({"group_dn": mapping.group_dn, "role": mapping.role.as_str()}));
    let sites =
        provider.site_mappings.iter().map(|mapping| json!({"group_dns": mapping.group_dns, "site_ids": mapping.site_ids}));
    json!({
        "name": settings.name,
        "enabled": provider.enabled,
        "server_urls": settings.server_urls,
        "host_overrides": settings.host_overrides,
        "tls_required": settings.tls_required,
        "tls_ca_sha256": hex::encode(Sha256::digest(&settings.tls_ca_pem)),
        "base_dn": settings.base_dn,
        "bind_dn": settings.bind_dn,
        "user_search_filter": settings.user_search_filter,
        "group_search_filter": settings.group_search_filter,
        "group_mappings": groups.collect::<Vec<_>>(),
        "site_mappings": sites.collect::<Vec<_>>(),
    })
}

/// What is, and under `before` what was, of that which has changed.
fn changed(before: &serde_json::Value, after: &serde_json::Value) -> serde_json::Value {
    let was: serde_json::Map<_, _> = (before.as_object().into_iter().flatten())
        .filter(|(name, value)| after.get(name) != Some(value))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let mut detail = after.clone();
    detail["before"] = was.into();
    detail
}

async fn record(tx: &mut db::Tx<'_>, actor: &Actor, action: &str, id: i64, detail: serde_json::Value) -> Result<()> {
    let entry = Entry { action, object_kind: "directory_provider", object_id: id.to_string(), detail, ..Entry::default() };
    audit::record(tx, actor, entry).await
}

/// Switches every provider off whose password a reset of the secret store takes: it has to be set and tested again.
pub(super) async fn lose_secrets(tx: &mut db::Tx<'_>) -> Result<()> {
    sqlx::query!(
        "UPDATE directory_providers SET enabled = false, last_test_at = NULL, last_test_status = '',
                last_test_message = 'A reset of the secret store took the bind password.', updated_at = now()
         WHERE bind_password_sealed IS NOT NULL"
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn cached(tx: &mut db::Tx<'_>, provider: i64) -> Result<Vec<i64>> {
    Ok(sqlx::query_scalar!("SELECT id FROM users WHERE directory_provider_id = $1 ORDER BY id FOR UPDATE", provider)
        .fetch_all(&mut **tx)
        .await?)
}
