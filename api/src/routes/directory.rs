//! Directory providers: LDAP servers and domain controllers whose people may sign in. Administrators only.

use std::{collections::BTreeMap, net::IpAddr};

use axum::{Json, extract::State, http::StatusCode};
use borealis_engine::{
    Error, Secret,
    access::{
        directory::{self, Change, GroupMapping, Provider, ProviderType, SiteMapping, ldap::Verdict},
        users::Role,
    },
};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::auth::Done;
use crate::{
    access::{Operator, Permission, Routes},
    body::{self, Path},
    errors::Result,
    state::App,
};

pub(super) fn routes(app: &App) -> Routes {
    Routes::new(app.clone())
        .operator(Permission::DirectoryRead, routes!(list))
        .operator(Permission::DirectoryEdit, routes!(create))
        .operator(Permission::DirectoryEdit, routes!(update, delete))
        .operator(Permission::DirectoryEdit, routes!(certificate))
        .operator(Permission::DirectoryEdit, routes!(test))
        .operator(Permission::DirectoryEdit, routes!(lookup_user))
        .operator(Permission::DirectoryEdit, routes!(sync))
        .operator(Permission::DirectoryEdit, routes!(directory_cache))
}

/// A group and the role it gives.
#[derive(Debug, serde::Serialize, serde::Deserialize, ToSchema)]
struct Group {
    /// Its distinguished name; compared without case and spaces.
    group_dn: String,
    /// `Admin` or `User`; anything else is `User`.
    #[serde(default)]
    role: String,
}

/// Groups and the sites their members see.
#[derive(Debug, serde::Serialize, serde::Deserialize, ToSchema)]
struct SiteGroup {
    /// Given by the engine.
    #[serde(default)]
    id: Option<i64>,
    /// Given by the engine.
    #[serde(default)]
    position: Option<usize>,
    /// What people call it; by default `User Site Group n`.
    #[serde(default)]
    label: String,
    /// Distinguished names.
    #[serde(default)]
    group_dns: Vec<String>,
    /// Ids of sites.
    #[serde(default)]
    site_ids: Vec<i64>,
}

/// A provider, without its secrets.
#[derive(Debug, serde::Serialize, ToSchema)]
struct DirectoryProvider {
    id: i64,
    name: String,
    /// `ldap` or `active_directory`.
    provider_type: &'static str,
    /// Whether its people may sign in.
    enabled: bool,
    /// The lowest is asked first.
    priority: i32,
    domain_suffix: String,
    server_urls: Vec<String>,
    /// Names and the addresses to use for them.
    #[schema(value_type = Object)]
    host_overrides: BTreeMap<String, IpAddr>,
    use_ldaps: bool,
    tls_required: bool,
    /// Whether certificates to trust are set.
    tls_ca_pem_present: bool,
    base_dn: String,
    bind_dn: String,
    bind_password_present: bool,
    user_search_filter: String,
    username_attribute: String,
    display_name_attribute: String,
    email_attribute: String,
    member_of_attribute: String,
    group_search_base_dn: String,
    group_search_filter: String,
    nested_groups: bool,
    kerberos_realm: String,
    kerberos_kdc: String,
    kerberos_keytab_present: bool,
    sync_interval_seconds: i32,
    group_mappings: Vec<Group>,
    site_mappings: Vec<SiteGroup>,
    /// Epoch seconds; 0 for never.
    last_sync_at: i64,
    /// `ok`, `failed`, or empty.
    last_sync_status: String,
    last_sync_message: String,
    /// Epoch seconds; 0 for never.
    last_test_at: i64,
    /// `ok`, `failed`, or empty: it has to be tested before it can be switched on.
    last_test_status: String,
    last_test_message: String,
    /// Epoch seconds.
    created_at: i64,
    /// Epoch seconds.
    updated_at: i64,
}

impl From<Provider> for DirectoryProvider {
    fn from(provider: Provider) -> Self {
        let epoch = |last: &directory::Last| last.at.map_or(0, |at| at.timestamp());
        let (last_sync_at, last_test_at) = (epoch(&provider.last_sync), epoch(&provider.last_test));
        let (bind_password_present, kerberos_keytab_present) = (provider.has_bind_password(), provider.has_keytab());
        let settings = provider.settings;
        Self {
            id: provider.id,
            enabled: provider.enabled,
            provider_type: settings.provider_type.as_str(),
            name: settings.name,
            priority: settings.priority,
            domain_suffix: settings.domain_suffix,
            server_urls: settings.server_urls,
            host_overrides: settings.host_overrides,
            use_ldaps: settings.use_ldaps,
            tls_required: settings.tls_required,
            tls_ca_pem_present: !settings.tls_ca_pem.is_empty(),
            base_dn: settings.base_dn,
            bind_dn: settings.bind_dn,
            bind_password_present,
            user_search_filter: settings.user_search_filter,
            username_attribute: settings.username_attribute,
            display_name_attribute: settings.display_name_attribute,
            email_attribute: settings.email_attribute,
            member_of_attribute: settings.member_of_attribute,
            group_search_base_dn: settings.group_search_base_dn,
            group_search_filter: settings.group_search_filter,
            nested_groups: settings.nested_groups,
            kerberos_realm: settings.kerberos_realm,
            kerberos_kdc: settings.kerberos_kdc,
            kerberos_keytab_present,
            sync_interval_seconds: settings.sync_interval_seconds,
            group_mappings: provider
                .group_mappings
                .into_iter()
                .map(|mapping| Group { group_dn: mapping.group_dn, role: mapping.role.as_str().to_owned() })
                .collect(),
            site_mappings: (0..)
                .zip(provider.site_mappings)
                .map(|(position, mapping)| SiteGroup {
                    id: mapping.id,
                    position: Some(position),
                    label: mapping.label,
                    group_dns: mapping.group_dns,
                    site_ids: mapping.site_ids,
                })
                .collect(),
            last_sync_at,
            last_sync_status: provider.last_sync.status,
            last_sync_message: provider.last_sync.message,
            last_test_at,
            last_test_status: provider.last_test.status,
            last_test_message: provider.last_test.message,
            created_at: provider.created_at.timestamp(),
            updated_at: provider.updated_at.timestamp(),
        }
    }
}

/// What is written. What is absent stays as it is.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DirectoryProviderBody {
    /// Unique in any case.
    name: Option<String>,
    /// `ldap` (the default) or `active_directory`; `ad` too.
    provider_type: Option<String>,
    /// Needs a test of the provider as it is that has passed.
    enabled: Option<bool>,
    /// 100 by default; the lowest is asked first.
    priority: Option<i32>,
    /// The domain by which people name it: `user@domain`, `DOMAIN\user`; its first label does too.
    domain_suffix: Option<String>,
    /// `ldap://` and `ldaps://` URLs, tried in order: a list, or text with commas or line ends between.
    #[schema(value_type = Option<Vec<String>>)]
    server_urls: Option<Value>,
    /// `{"dc1.ad.example": "10.0.0.5"}`, or lines `name=address`.
    #[schema(value_type = Option<Object>)]
    host_overrides: Option<Value>,
    /// Makes `ldaps://` the scheme of URLs without one.
    use_ldaps: Option<bool>,
    /// True by default: `ldap://` switches to TLS (StartTLS) before anything is said. False: passwords cross the network
    /// readable by everybody on it.
    tls_required: Option<bool>,
    /// Certificates to trust, as PEM. One that is no authority is pinned: the server must show exactly it. Empty: the
    /// authorities this machine trusts.
    tls_ca_pem: Option<String>,
    /// Where people are searched.
    base_dn: Option<String>,
    /// The account of the engine; empty: none.
    bind_dn: Option<String>,
    /// Its password. Empty: forget it. Forgotten too when `server_urls`, `host_overrides`, `use_ldaps`, `tls_required` or
    /// `tls_ca_pem` change without it.
    #[schema(value_type = Option<String>)]
    bind_password: Option<Secret<String>>,
    /// An LDAP filter with `{username}` or `{user}` (the account part of what was typed) or `{login}` (all of it).
    user_search_filter: Option<String>,
    /// `uid`, or `sAMAccountName`, by default.
    username_attribute: Option<String>,
    /// `displayName` by default.
    display_name_attribute: Option<String>,
    /// `mail` by default.
    email_attribute: Option<String>,
    /// `memberOf` by default.
    member_of_attribute: Option<String>,
    /// Where groups are searched; empty: `base_dn`.
    group_search_base_dn: Option<String>,
    /// Finds further groups of a person, with `{dn}`, `{username}` or `{gid}` (the person's `gidNumber`) in it, for instance
    /// `(&(objectClass=posixGroup)(memberUid={username}))`; empty: no further search.
    group_search_filter: Option<String>,
    /// Whether groups of groups count; true by default.
    nested_groups: Option<bool>,
    /// Another name of the domain.
    kerberos_realm: Option<String>,
    /// Kept for clients.
    kerberos_kdc: Option<String>,
    /// Kept, sealed; sign-in binds over TLS and does not use it. Empty: forget it.
    #[schema(value_type = Option<String>)]
    kerberos_keytab_base64: Option<Secret<String>>,
    /// 60 by default, and at least.
    sync_interval_seconds: Option<i32>,
    /// All of them. Without any, everybody the directory knows is a user; with some, only whom one fits may sign in.
    group_mappings: Option<Vec<Group>>,
    /// All of them. With some, the directory decides who sees which sites.
    site_mappings: Option<Vec<SiteGroup>>,
}

/// Servers as clients write them: a list, or text with commas or line ends between.
fn urls(value: Value) -> Result<Vec<String>> {
    let invalid = || Error::field("invalid_server_url", "server_urls", "must be a list of URLs, or text.");
    let texts = match value {
        Value::String(text) => text.split([',', '\n']).map(str::to_owned).collect(),
        Value::Array(list) => {
            list.into_iter().map(|url| url.as_str().map(str::to_owned).ok_or_else(invalid)).collect::<Result<Vec<_>, _>>()?
        }
        Value::Null => Vec::new(),
        _ => return Err(invalid().into()),
    };
    Ok(texts.into_iter().map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()).collect())
}

/// Overrides as clients write them: an object, or lines `name=address`, `name|address` or `name address`.
fn overrides(value: Value) -> Result<BTreeMap<String, IpAddr>> {
    let invalid = |why: String| Error::field("invalid_host_override", "host_overrides", why);
    let pairs: Map<String, Value> = match value {
        Value::Object(map) => map,
        Value::String(text) => text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| {
                let pair = line.split_once(['=', '|', ' ', '\t']);
                let (name, address) = pair.ok_or_else(|| invalid(format!("{line} is not name=address.")))?;
                Ok((name.to_owned(), Value::String(address.to_owned())))
            })
            .collect::<Result<_, Error>>()?,
        Value::Null => Map::new(),
        _ => return Err(invalid("must be an object of names and addresses.".to_owned()).into()),
    };
    let mut found = BTreeMap::new();
    for (name, address) in pairs {
        let name = name.trim().to_lowercase();
        let address = address.as_str().and_then(|text| text.trim().parse().ok());
        match address {
            Some(address) if !name.is_empty() => found.insert(name, address),
            _ => return Err(invalid(format!("the value for {name} must be an address.")).into()),
        };
    }
    Ok(found)
}

impl DirectoryProviderBody {
    fn change(self) -> Result<Change> {
        Ok(Change {
            name: self.name,
            provider_type: self.provider_type.as_deref().map(ProviderType::parse),
            enabled: self.enabled,
            priority: self.priority,
            domain_suffix: self.domain_suffix,
            server_urls: self.server_urls.map(urls).transpose()?,
            host_overrides: self.host_overrides.map(overrides).transpose()?,
            use_ldaps: self.use_ldaps,
            tls_required: self.tls_required,
            tls_ca_pem: self.tls_ca_pem,
            base_dn: self.base_dn,
            bind_dn: self.bind_dn,
            bind_password: self.bind_password,
            user_search_filter: self.user_search_filter,
            username_attribute: self.username_attribute,
            display_name_attribute: self.display_name_attribute,
            email_attribute: self.email_attribute,
            member_of_attribute: self.member_of_attribute,
            group_search_base_dn: self.group_search_base_dn,
            group_search_filter: self.group_search_filter,
            nested_groups: self.nested_groups,
            kerberos_realm: self.kerberos_realm,
            kerberos_kdc: self.kerberos_kdc,
            keytab: self.kerberos_keytab_base64,
            sync_interval_seconds: self.sync_interval_seconds,
            group_mappings: self.group_mappings.map(|mappings| {
                let mapping = |group: Group| {
                    let role = Role::parse(&group.role).unwrap_or(Role::User);
                    GroupMapping { group_dn: group.group_dn, role }
                };
                mappings.into_iter().map(mapping).collect()
            }),
            site_mappings: self.site_mappings.map(|mappings| {
                let mapping = |sites: SiteGroup| SiteMapping {
                    id: None,
                    label: sites.label,
                    group_dns: sites.group_dns,
                    site_ids: sites.site_ids,
                };
                mappings.into_iter().map(mapping).collect()
            }),
        })
    }
}

/// Providers.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Providers {
    /// In the order they are asked.
    providers: Vec<DirectoryProvider>,
}

/// A provider that was written.
#[derive(Debug, serde::Serialize, ToSchema)]
struct DirectoryProviderWritten {
    /// `ok`.
    status: &'static str,
    provider: DirectoryProvider,
}

/// Every provider, in the order they are asked.
#[utoipa::path(get, path = "/api/directory/providers", tag = "Directory", responses(
    (status = 200, body = Providers),
    (status = 403, description = "`forbidden`"),
))]
async fn list(State(app): State<App>, _: Operator) -> Result<Json<Providers>> {
    Ok(Json(Providers { providers: directory::list(&app.pool).await?.into_iter().map(DirectoryProvider::from).collect() }))
}

/// Make a provider. It is off until a test of it has passed. Needs a step-up.
#[utoipa::path(post, path = "/api/directory/providers", tag = "Directory", request_body = DirectoryProviderBody, responses(
    (status = 200, body = DirectoryProviderWritten),
    (status = 400, description = "`name_required`, `invalid_server_url`, `invalid_host_override`, `invalid_certificate`, `invalid_filter`, `invalid_attribute`, `invalid_keytab`, `invalid_text`"),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 404, description = "`site_not_found`"),
    (status = 409, description = "`provider_name_exists`, `test_required`"),
    (status = 423, description = "`aegis_locked`"),
))]
async fn create(
    State(app): State<App>,
    operator: Operator,
    body::Json(body): body::Json<DirectoryProviderBody>,
) -> Result<Json<DirectoryProviderWritten>> {
    operator.require_step_up()?;
    let provider = app.access().create_provider(&operator.actor, body.change()?).await?;
    Ok(Json(DirectoryProviderWritten { status: "ok", provider: provider.into() }))
}

/// Change a provider. What changes how it is reached switches it off until it is tested again; what changes where the bind
/// password goes forgets it, unless it is sent again. Switching it off ends the sessions of its people. Needs a step-up.
#[utoipa::path(patch, path = "/api/directory/providers/{id}", tag = "Directory", params(("id" = i64, Path)), request_body = DirectoryProviderBody, responses(
    (status = 200, body = DirectoryProviderWritten),
    (status = 400, description = "As for a new one"),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 404, description = "`provider_not_found`, `site_not_found`"),
    (status = 409, description = "`provider_name_exists`, `test_required`"),
    (status = 423, description = "`aegis_locked`"),
))]
async fn update(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    body::Json(body): body::Json<DirectoryProviderBody>,
) -> Result<Json<DirectoryProviderWritten>> {
    operator.require_step_up()?;
    let (provider, ended) = app.access().update_provider(&operator.actor, id, body.change()?).await?;
    for session in ended {
        app.hub.drop_session(session).await;
    }
    Ok(Json(DirectoryProviderWritten { status: "ok", provider: provider.into() }))
}

/// Remove a provider nobody has an account from.
#[utoipa::path(delete, path = "/api/directory/providers/{id}", tag = "Directory", params(("id" = i64, Path)), responses(
    (status = 200, body = Done),
    (status = 403, description = "`forbidden`, `step_up_required`"),
    (status = 404, description = "`provider_not_found`"),
    (status = 409, description = "`provider_has_cached_users`: disable and delete those first"),
))]
async fn delete(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<Json<Done>> {
    operator.require_step_up()?;
    app.access().delete_provider(&operator.actor, id).await?;
    Ok(Done::json())
}

/// Which server to look at.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Server {
    /// An `ldaps://` URL.
    server_url: Option<String>,
    /// Several, of which the first that answers counts.
    #[schema(value_type = Option<Vec<String>>)]
    server_urls: Option<Value>,
    /// Makes `ldaps://` the scheme of URLs without one; true by default.
    use_ldaps: Option<bool>,
    /// As in a provider.
    #[schema(value_type = Option<Object>)]
    host_overrides: Option<Value>,
}

/// A certificate, for somebody who decides whether to pin it.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Certificate {
    server_url: String,
    host: String,
    port: u16,
    /// The name the certificate should be for.
    requested_host: String,
    /// Where the connection went.
    connect_host: String,
    subject: String,
    issuer: String,
    common_name: String,
    /// Upper-case hex.
    serial_number: String,
    /// Upper-case hex with colons.
    sha256_fingerprint: String,
    /// ISO 8601.
    not_before: String,
    /// ISO 8601.
    not_after: String,
    dns_names: Vec<String>,
    ip_addresses: Vec<String>,
    /// To be set as `tls_ca_pem` once somebody has compared the fingerprint.
    pem: String,
}

/// What a server shows.
#[derive(Debug, serde::Serialize, ToSchema)]
struct CertificateAnswer {
    /// `ok`.
    status: &'static str,
    certificate: Certificate,
}

/// Download the certificate a server shows, unchecked. Nothing is sent to it and nothing stored: compare the fingerprint
/// with the server's own before you set `pem` as `tls_ca_pem`.
#[utoipa::path(post, path = "/api/directory/providers/certificate", tag = "Directory", request_body = Server, responses(
    (status = 200, body = CertificateAnswer),
    (status = 400, description = "`missing_server`, `invalid_server_url`, `invalid_host_override`, `ldaps_required`"),
    (status = 403, description = "`forbidden`, `egress_refused`"),
    (status = 502, description = "`certificate_download_failed`"),
))]
async fn certificate(
    State(app): State<App>,
    _: Operator,
    body::Json(body): body::Json<Server>,
) -> Result<Json<CertificateAnswer>> {
    let mut servers = body.server_urls.map(urls).transpose()?.unwrap_or_default();
    servers.extend(body.server_url.into_iter().map(|url| url.trim().to_owned()).filter(|url| !url.is_empty()));
    let pinned = body.host_overrides.map(overrides).transpose()?.unwrap_or_default();
    let use_ldaps = body.use_ldaps.unwrap_or(true);
    let (server_url, target, shown) = app.access().directory_certificate(&servers, use_ldaps, &pinned).await?;
    let certificate = Certificate {
        server_url,
        port: target.port,
        connect_host: target.pinned.map_or_else(|| target.name.clone(), |ip| ip.to_string()),
        requested_host: target.name.clone(),
        host: target.name,
        subject: shown.subject,
        issuer: shown.issuer,
        common_name: shown.common_name,
        serial_number: shown.serial_number,
        sha256_fingerprint: shown.sha256_fingerprint,
        not_before: shown.not_before.to_rfc3339(),
        not_after: shown.not_after.to_rfc3339(),
        dns_names: shown.dns_names,
        ip_addresses: shown.ip_addresses,
        pem: shown.pem,
    };
    Ok(Json(CertificateAnswer { status: "ok", certificate }))
}

/// How a test went.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Tested {
    /// `ok` or `failed`.
    status: String,
    /// Whether it passed.
    ok: bool,
    /// What was wrong.
    message: String,
}

/// Test a provider as it is: connect, bind, read the base.
#[utoipa::path(post, path = "/api/directory/providers/{id}/test", tag = "Directory", params(("id" = i64, Path)), responses(
    (status = 200, body = Tested),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`provider_not_found`"),
    (status = 423, description = "`aegis_locked`"),
    (status = 502, body = Tested, description = "It failed; `message` says how"),
))]
async fn test(State(app): State<App>, operator: Operator, Path(id): Path<i64>) -> Result<(StatusCode, Json<Tested>)> {
    let last = app.access().test_provider(&operator.actor, id).await?;
    let ok = last.status == "ok";
    let status = if ok { StatusCode::OK } else { StatusCode::BAD_GATEWAY };
    Ok((status, Json(Tested { ok, status: last.status, message: last.message })))
}

/// Whom to look up.
#[derive(serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Whom {
    /// As they would type it.
    #[serde(default)]
    username: String,
    /// Checked when it is there.
    #[schema(value_type = Option<String>)]
    password: Option<Secret<String>>,
}

/// What the directory knows of somebody.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Found {
    /// `ok`.
    status: &'static str,
    /// True.
    found: bool,
    provider_id: i64,
    provider_type: &'static str,
    /// As typed.
    login: String,
    /// Without the domain.
    account: String,
    display_name: String,
    dn: String,
    /// What stays the same when the person is renamed.
    subject: String,
    /// Distinguished names.
    groups: Vec<String>,
    group_count: usize,
    /// `Admin`, `User`, or empty when no mapping fits.
    mapped_role: &'static str,
    /// Whether they could sign in.
    allowed: bool,
    password_checked: bool,
    /// Null when none was sent.
    password_ok: Option<bool>,
    /// `invalid_username_or_password`, when it was wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    password_error: Option<&'static str>,
    /// Why, as far as the directory says.
    #[serde(skip_serializing_if = "Option::is_none")]
    password_message: Option<&'static str>,
}

/// Look somebody up in a provider, switched on or not. Changes nothing; a wrong password is still 200.
#[utoipa::path(post, path = "/api/directory/providers/{id}/lookup-user", tag = "Directory", params(("id" = i64, Path)), request_body = Whom, responses(
    (status = 200, body = Found),
    (status = 400, description = "`username_required`"),
    (status = 403, description = "`forbidden`, `step_up_required` when a password is sent"),
    (status = 404, description = "`provider_not_found`, `directory_user_not_found`"),
    (status = 409, description = "`ambiguous_directory_username`"),
    (status = 423, description = "`aegis_locked`"),
    (status = 502, description = "`directory_lookup_failed`, `directory_auth_failed`, `ldap_connect_failed`, `pinned_certificate_mismatch`"),
))]
async fn lookup_user(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    body::Json(body): body::Json<Whom>,
) -> Result<Json<Found>> {
    let password = body.password.filter(|password| !password.expose().is_empty());
    // Else a session left open would be a place to try passwords of others.
    if password.is_some() {
        operator.require_step_up()?;
    }
    let lookup = app.access().look_up(&operator.actor, id, &body.username, password.as_ref()).await?;
    let wrong = match &lookup.verdict {
        Some(Verdict::Wrong(why)) => Some(*why),
        _ => None,
    };
    Ok(Json(Found {
        status: "ok",
        found: true,
        provider_id: lookup.provider.id,
        provider_type: lookup.provider.settings.provider_type.as_str(),
        login: lookup.login.typed,
        account: lookup.login.account,
        display_name: lookup.person.display_name,
        dn: lookup.person.dn,
        subject: lookup.person.subject,
        group_count: lookup.person.groups.len(),
        groups: lookup.person.groups,
        mapped_role: lookup.role.map_or("", Role::as_str),
        allowed: lookup.role.is_some() && !lookup.person.disabled,
        password_checked: lookup.verdict.is_some(),
        password_ok: lookup.verdict.as_ref().map(|verdict| *verdict == Verdict::Right),
        password_error: wrong.map(|_| "invalid_username_or_password"),
        password_message: wrong,
    }))
}

/// How to sync.
#[derive(Debug, Default, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct How {
    /// Disable accounts even when that is more than half of them.
    #[serde(default)]
    confirm_disable: bool,
}

/// What a sync did.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Synced {
    /// `ok`.
    status: &'static str,
    /// How many accounts were disabled.
    disabled_users: usize,
    /// How many were looked up.
    checked_users: usize,
    /// How many could not be, and were left as they are.
    unclear_users: usize,
    message: String,
}

/// Look the accounts of a provider up again now: roles, groups and sites are brought up to date, and who is not there any
/// more is disabled. Nobody is disabled because something went wrong.
#[utoipa::path(post, path = "/api/directory/providers/{id}/sync", tag = "Directory", params(("id" = i64, Path)), request_body = Option<How>, responses(
    (status = 200, body = Synced),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`provider_not_found`"),
    (status = 409, description = "`mass_disable_unconfirmed`: more than half of the accounts would go"),
    (status = 423, description = "`aegis_locked`"),
    (status = 502, description = "`sync_failed`: nothing has changed"),
))]
async fn sync(
    State(app): State<App>,
    operator: Operator,
    Path(id): Path<i64>,
    body::OptionalJson(how): body::OptionalJson<How>,
) -> Result<Json<Synced>> {
    // On a task of its own: it goes on when the client does not wait for it.
    let work = tokio::spawn(sync_and_tell(app, operator.actor, id, how.confirm_disable));
    let synced = work.await.map_err(Error::bug)??;
    Ok(Json(Synced {
        status: "ok",
        disabled_users: synced.disabled,
        checked_users: synced.checked,
        unclear_users: synced.unclear,
        message: synced.message(),
    }))
}

/// Syncs, and cuts the sockets of the sessions that ended.
///
/// # Errors
/// As [`borealis_engine::access::Access::sync_provider`].
pub(crate) async fn sync_and_tell(
    app: App,
    actor: borealis_engine::Actor,
    provider: i64,
    confirmed: bool,
) -> borealis_engine::Result<directory::sync::Synced> {
    let synced = app.access().sync_provider(&actor, provider, confirmed).await?;
    for session in &synced.ended {
        app.hub.drop_session(*session).await;
    }
    Ok(synced)
}

/// Off or on.
#[derive(Debug, serde::Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Switch {
    /// True by default.
    #[serde(default = "yes")]
    disabled: bool,
}

impl Default for Switch {
    fn default() -> Self {
        Self { disabled: true }
    }
}

fn yes() -> bool {
    true
}

/// An account of a directory.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Switched {
    /// `ok`.
    status: &'static str,
    username: String,
    directory_disabled: bool,
}

/// Switch the account of a directory's user off, which ends its sessions, or on again.
#[utoipa::path(post, path = "/api/users/{username}/directory-cache", tag = "Directory",
    params(("username" = String, Path, description = "Any case")), request_body = Option<Switch>, responses(
    (status = 200, body = Switched),
    (status = 400, description = "`cannot_disable_self`, `invalid_username`"),
    (status = 403, description = "`forbidden`"),
    (status = 404, description = "`directory_user_not_found`, for local users too"),
))]
async fn directory_cache(
    State(app): State<App>,
    operator: Operator,
    Path(username): Path<String>,
    body::OptionalJson(body): body::OptionalJson<Switch>,
) -> Result<Json<Switched>> {
    let access = app.access();
    let (username, ended) = access.set_directory_disabled(&operator.actor, operator.user_id, &username, body.disabled).await?;
    for session in ended {
        app.hub.drop_session(session).await;
    }
    Ok(Json(Switched { status: "ok", username, directory_disabled: body.disabled }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn servers_are_a_list_or_text() {
        let expected = vec!["ldaps://a".to_owned(), "b".to_owned()];
        for form in [json!(["ldaps://a", " b ", ""]), json!("ldaps://a, b"), json!("ldaps://a\n\nb\n")] {
            assert_eq!(urls(form).unwrap(), expected);
        }
        for bad in [json!(7), json!(["a", 7])] {
            assert_eq!(urls(bad).unwrap_err().0.code, "invalid_server_url");
        }
    }

    #[test]
    fn overrides_are_an_object_or_lines() {
        let expected = BTreeMap::from([("dc1.ad.test".to_owned(), "10.0.0.5".parse().unwrap())]);
        for form in [
            json!({"DC1.ad.test": "10.0.0.5"}),
            json!("dc1.ad.test=10.0.0.5\n"),
            json!("dc1.ad.test|10.0.0.5"),
            json!("dc1.ad.test 10.0.0.5"),
        ] {
            assert_eq!(overrides(form).unwrap(), expected);
        }
        for bad in [json!({"a": "b"}), json!({"a": 1}), json!("a"), json!("a=b"), json!({"": "10.0.0.5"}), json!([])] {
            assert_eq!(overrides(bad).unwrap_err().0.code, "invalid_host_override");
        }
    }
}
