//! Talking to a directory's server: connecting through the egress policy, binding, searching, finding a person.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use ldap3::{
    Ldap, LdapConnAsync, LdapConnSettings, LdapError, Scope, SearchEntry, SearchOptions, StdStream,
    adapters::{Adapter, EntriesOnly, PagedResults},
    ldap_escape,
};
use tokio::{task::AbortHandle, time::timeout};
use url::Url;

use super::{Provider, Settings, dn, trust::Trust};
use crate::{
    egress::{self, Policy},
    error::{Error, Kind, Result},
    secret::Secret,
};

/// How long a server may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long a server that could not be reached is not asked again for a sign-in, so that one that is down does not slow
/// every sign-in down.
const AWAY: Duration = Duration::from_secs(10);
/// How many entries a server is asked for at once in a search that may find many: less than the usual limits of servers,
/// 500 of OpenLDAP and 1,000 of Active Directory.
const PAGE: i32 = 400;

const SUCCESS: u32 = 0;
const SIZE_LIMIT: u32 = 4;
const ADMIN_LIMIT: u32 = 11;
const NO_SUCH_OBJECT: u32 = 32;
const INVALID_CREDENTIALS: u32 = 49;
const UNWILLING: u32 = 53;

/// What a person typed as their name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// As typed, trimmed.
    pub typed: String,
    /// Without the domain.
    pub account: String,
    /// The domain, from `DOMAIN\account` or `account@domain`; lower case.
    pub domain: Option<String>,
}

impl Login {
    /// Takes a name apart.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let typed = text.trim().to_owned();
        let parts = typed.split_once('\\').map(|(domain, account)| (account, domain)).or_else(|| typed.rsplit_once('@'));
        let (account, domain) = match parts {
            Some((account, domain)) if !account.is_empty() && !domain.is_empty() => {
                (account.to_owned(), Some(domain.to_lowercase()))
            }
            _ => (typed.clone(), None),
        };
        Self { typed, account, domain }
    }
}

/// A person as the directory has them.
#[derive(Debug, Clone)]
pub struct Person {
    /// The distinguished name.
    pub dn: String,
    /// What stays the same when the person is renamed or moved: `uuid:`, `guid:`, `sid:` or, for want of those, `dn:` and
    /// the value.
    pub subject: String,
    /// What the account is called here: the user principal name, else the username attribute.
    pub username: String,
    /// The name to show; may be empty.
    pub display_name: String,
    /// The groups, nested ones too where the provider wants them.
    pub groups: Vec<String>,
    /// Whether the directory itself says that the account is off.
    pub disabled: bool,
}

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `ldap` or `ldaps`.
    pub scheme: &'static str,
    /// The name its certificate must be for.
    pub name: String,
    /// Its port.
    pub port: u16,
    /// The address to connect to in place of the name's own.
    pub pinned: Option<IpAddr>,
}

impl Target {
    /// Reads a server URL of a provider. A URL without a scheme gets one from `use_ldaps`. An override for the full name, for
    /// the first label of it, or for the full name of a short one, gives the address; a short name then becomes the full one.
    ///
    /// # Errors
    /// 400 `invalid_server_url`.
    pub fn parse(text: &str, use_ldaps: bool, overrides: &BTreeMap<String, IpAddr>) -> Result<Self> {
        let invalid = || Error::field("invalid_server_url", "server_urls", format!("{text} is not an ldap:// or ldaps:// URL."));
        let full =
            if text.contains("://") { text.to_owned() } else { format!("{}://{text}", if use_ldaps { "ldaps" } else { "ldap" }) };
        let url = Url::parse(&full).map_err(|_| invalid())?;
        let (scheme, port) = match url.scheme() {
            "ldap" => ("ldap", 389),
            "ldaps" => ("ldaps", 636),
            _ => return Err(invalid()),
        };
        let more = !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some();
        if more || !url.username().is_empty() || url.password().is_some() {
            return Err(invalid());
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(invalid)?.to_lowercase();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let first = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
        let (name, pinned) = if let Some(ip) = overrides.get(&host) {
            (host, Some(*ip))
        } else if host.parse::<IpAddr>().is_ok() {
            (host, None)
        } else if let Some((full, ip)) = overrides.iter().find(|(name, _)| !host.contains('.') && first(name) == host) {
            (full.clone(), Some(*ip))
        } else {
            let ip = overrides.get(&first(&host)).copied();
            (host, ip)
        };
        Ok(Self { scheme, name, port: url.port().unwrap_or(port), pinned })
    }

    fn url(&self) -> Result<Url> {
        let host = if self.name.contains(':') { format!("[{}]", self.name) } else { self.name.clone() };
        Url::parse(&format!("{}://{host}:{}", self.scheme, self.port)).map_err(Error::bug)
    }

    fn key(&self) -> String {
        format!("{}:{}:{:?}", self.name, self.port, self.pinned)
    }
}

static UNREACHED: LazyLock<Mutex<HashMap<String, Instant>>> = LazyLock::new(Mutex::default);

fn is_away(target: &Target) -> bool {
    let unreached = UNREACHED.lock().unwrap_or_else(PoisonError::into_inner);
    unreached.get(&target.key()).is_some_and(|at| at.elapsed() < AWAY)
}

fn note(target: &Target, reached: bool) {
    let mut unreached = UNREACHED.lock().unwrap_or_else(PoisonError::into_inner);
    if reached {
        unreached.remove(&target.key());
    } else {
        unreached.retain(|_, at| at.elapsed() < AWAY);
        unreached.insert(target.key(), Instant::now());
    }
}

fn upstream(code: &'static str, message: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    let mut error = Error::new(Kind::Upstream, code, message);
    error.source = Some(source.into());
    error
}

pub(super) fn lookup_failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    upstream("directory_lookup_failed", "The directory could not be searched.", source)
}

/// A connection on which the provider's service account is bound. Dropping it closes it.
pub struct Connection<'a> {
    ldap: Ldap,
    driver: AbortHandle,
    pub(super) settings: &'a Settings,
}

/// What a search found.
pub(super) struct Found {
    /// The entries, at most as many as were asked for and one more.
    pub entries: Vec<SearchEntry>,
    /// Whether the server had no more to say: false when its own limit cut the answer off.
    pub complete: bool,
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Whether a password was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It was.
    Right,
    /// It was not, or the account may not be used: the reason, for the audit and for administrators.
    Wrong(&'static str),
}

/// What Active Directory says beside "invalid credentials".
fn reason(text: &str) -> &'static str {
    let code = text.split_once("data ").map(|(_, rest)| rest.split([',', ' ']).next().unwrap_or_default());
    match code {
        Some("530" | "531") => "the account may not be used now or from here",
        Some("532" | "773") => "the password has expired",
        Some("533") => "the account is disabled",
        Some("701") => "the account has expired",
        Some("775") => "the account is locked",
        _ => "wrong password",
    }
}

impl<'a> Connection<'a> {
    /// Connects to the first server of the provider that answers, and binds the service account, or nobody when none is set.
    /// `hurry` leaves out servers that did not answer a moment ago.
    ///
    /// # Errors
    /// 502 `ldap_connect_failed` when no server can be reached or trusted; `pinned_certificate_mismatch`;
    /// `directory_auth_failed` when the service account is refused; 400 `invalid_server_url`, `invalid_certificate`.
    pub async fn open(policy: &Policy, provider: &'a Provider, password: Option<&Secret<String>>, hurry: bool) -> Result<Self> {
        let settings = &provider.settings;
        let mut last = Error::new(Kind::Upstream, "ldap_connect_failed", "The provider has no server.");
        for url in &settings.server_urls {
            let target = Target::parse(url, settings.use_ldaps, &settings.host_overrides)?;
            if hurry && is_away(&target) {
                last = Error::new(Kind::Upstream, "ldap_connect_failed", "The server did not answer a moment ago.");
                continue;
            }
            match Self::reach(policy, settings, &target).await {
                Ok(connection) => {
                    note(&target, true);
                    return connection.bound(settings, password).await;
                }
                Err(error) => {
                    note(&target, false);
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn reach(policy: &Policy, settings: &'a Settings, target: &Target) -> Result<Self> {
        let trust = Trust::of(&settings.tls_ca_pem)?;
        let stream = policy.connect(egress::DIRECTORY, &target.name, target.port, target.pinned).await.map_err(|error| {
            let message = format!("{}:{} cannot be reached: {}", target.name, target.port, error.message);
            upstream("ldap_connect_failed", &message, error)
        })?;
        let stream = stream.into_std().map_err(Error::bug)?;
        let how = LdapConnSettings::new()
            .set_std_stream(StdStream::Tcp(stream))
            .set_config(trust.config.clone())
            .set_conn_timeout(ANSWER_LIMIT)
            .set_starttls(settings.tls_required);
        let (connection, ldap) = LdapConnAsync::from_url_with_settings(how, &target.url()?).await.map_err(|error| {
            if trust.mismatched() {
                let message = format!("{} shows another certificate than the pinned one.", target.name);
                return upstream("pinned_certificate_mismatch", &message, error);
            }
            let why = match &error {
                LdapError::LdapResult { .. } => "it refuses StartTLS",
                LdapError::Timeout { .. } => "it does not answer",
                _ => "its certificate is not trusted, or it speaks no TLS",
            };
            upstream("ldap_connect_failed", &format!("{} cannot be used: {why}.", target.name), error)
        })?;
        let driver = tokio::spawn(async move {
            if let Err(error) = connection.drive().await {
                tracing::debug!(%error, "a connection to a directory ended");
            }
        });
        Ok(Self { ldap, driver: driver.abort_handle(), settings })
    }

    async fn bound(mut self, settings: &Settings, password: Option<&Secret<String>>) -> Result<Self> {
        let failed = "The directory refuses the provider's own account.";
        if settings.bind_dn.is_empty() {
            return Ok(self);
        }
        // A bind with a name and no password is no bind at all, and succeeds.
        let password = password.filter(|password| !password.expose().is_empty());
        let Some(password) = password else {
            return Err(upstream("directory_auth_failed", failed, "the provider has no bind password"));
        };
        let result = self.ldap.with_timeout(ANSWER_LIMIT).simple_bind(&settings.bind_dn, password.expose()).await;
        match result {
            Ok(answer) if answer.rc == SUCCESS => Ok(self),
            Ok(answer) => Err(upstream("directory_auth_failed", failed, answer.to_string())),
            Err(error) => Err(upstream("ldap_connect_failed", "The directory did not answer.", error)),
        }
    }

    /// The entries that fit, at most `most` and one more, which shows that there are more. `paged`: in pages, for what may
    /// be many.
    pub(super) async fn search(
        &mut self,
        base: &str,
        scope: Scope,
        filter: &str,
        attributes: &[&str],
        most: usize,
        paged: bool,
    ) -> Result<Found> {
        let mut options = SearchOptions::new().timelimit(i32::try_from(ANSWER_LIMIT.as_secs()).unwrap_or(10));
        let mut adapters: Vec<Box<dyn Adapter<_, _>>> = vec![Box::new(EntriesOnly::new())];
        if paged {
            adapters.push(Box::new(PagedResults::new(PAGE)));
        } else {
            options = options.sizelimit(i32::try_from(most).unwrap_or(i32::MAX).saturating_add(1));
        }
        let search = async {
            let ldap = self.ldap.with_timeout(ANSWER_LIMIT).with_search_options(options);
            let mut stream =
                ldap.streaming_search_with(adapters, base, scope, filter, attributes.to_vec()).await.map_err(lookup_failed)?;
            let mut entries = Vec::new();
            while entries.len() <= most {
                match stream.next().await.map_err(lookup_failed)? {
                    Some(entry) => entries.push(SearchEntry::construct(entry)),
                    None => break,
                }
            }
            let result = stream.finish().await;
            // Asked for one entry by its name, a server says in this way that there is none.
            if result.rc == NO_SUCH_OBJECT && scope == Scope::Base {
                return Ok(Found { entries: Vec::new(), complete: true });
            }
            // The search was ended here, so what the server says about its end is not its answer.
            if entries.len() > most {
                return Ok(Found { entries, complete: true });
            }
            match result.rc {
                SUCCESS => Ok(Found { entries, complete: true }),
                SIZE_LIMIT | ADMIN_LIMIT => Ok(Found { entries, complete: false }),
                _ => Err(lookup_failed(result.to_string())),
            }
        };
        timeout(ANSWER_LIMIT * 2, search).await.unwrap_or_else(|elapsed| Err(lookup_failed(elapsed)))
    }

    /// The entry that fits, if there is one, and another one where there are several.
    async fn one(&mut self, base: &str, scope: Scope, filter: &str, attributes: &[&str]) -> Result<Vec<SearchEntry>> {
        let found = self.search(base, scope, filter, attributes, 1, false).await?;
        if found.complete { Ok(found.entries) } else { Err(lookup_failed("the server's own limit was reached")) }
    }

    /// Reads the entry of the base, which shows that the service account may.
    ///
    /// # Errors
    /// 502 `directory_lookup_failed`.
    pub async fn read_base(&mut self) -> Result<()> {
        let base = self.settings.base_dn.clone();
        let found = self.one(&base, Scope::Base, "(objectClass=*)", &["1.1"]).await?;
        if found.is_empty() {
            return Err(Error::new(Kind::Upstream, "directory_lookup_failed", "The base DN cannot be read."));
        }
        Ok(())
    }

    /// The one person of this name; none when there is none.
    ///
    /// # Errors
    /// 409 `ambiguous_directory_username` when there are several; 502 `directory_lookup_failed`.
    pub async fn find(&mut self, login: &Login) -> Result<Option<Person>> {
        let settings = self.settings;
        self.person(&settings.base_dn, Scope::Subtree, &user_filter(settings, login), &login.account).await
    }

    /// The person with this subject; none when the directory says that there is none any more.
    ///
    /// # Errors
    /// 502 `directory_lookup_failed`.
    pub async fn find_again(&mut self, subject: &str, username: &str) -> Result<Option<Person>> {
        let base = &self.settings.base_dn;
        let bytes =
            |hex: &str| hex.as_bytes().chunks(2).map(|pair| format!("\\{}", String::from_utf8_lossy(pair))).collect::<String>();
        let filter = match subject.split_once(':') {
            Some(("uuid", uuid)) => format!("(entryUUID={})", ldap_escape(uuid)),
            Some(("guid", hex)) => format!("(objectGUID={})", bytes(hex)),
            Some(("sid", hex)) => format!("(objectSid={})", bytes(hex)),
            Some(("dn", dn)) => {
                // A missing entry is an answer only when the base is there: a server that lost a branch must not disable everybody.
                self.read_base().await?;
                return self.person(dn, Scope::Base, "(objectClass=*)", username).await;
            }
            _ => return Err(Error::bug(format!("a subject of no kind: {subject}"))),
        };
        self.person(base, Scope::Subtree, &filter, username).await
    }

    async fn person(&mut self, base: &str, scope: Scope, filter: &str, account: &str) -> Result<Option<Person>> {
        let settings = self.settings;
        let attributes = [
            settings.username_attribute.as_str(),
            &settings.display_name_attribute,
            &settings.member_of_attribute,
            "userPrincipalName",
            "userAccountControl",
            "entryUUID",
            "objectGUID",
            "objectSid",
            "primaryGroupID",
            "gidNumber",
        ];
        let mut found = self.one(base, scope, filter, &attributes).await?;
        if found.len() > 1 {
            let why = "Several people of the directory have this name.";
            return Err(Error::conflict("ambiguous_directory_username", why));
        }
        let Some(entry) = found.pop() else { return Ok(None) };
        let mut person = read(settings, &entry, account);
        person.groups = self.groups(&person, &Attributes(&entry)).await?;
        Ok(Some(person))
    }

    /// Whether the password is that person's: asked by binding as them, after which the connection is nobody's any more.
    ///
    /// # Errors
    /// 502 `directory_auth_failed` when the server does not say.
    pub async fn check_password(mut self, person: &Person, password: &Secret<String>) -> Result<Verdict> {
        // See `bound`: the server would say yes.
        if password.expose().is_empty() {
            return Ok(Verdict::Wrong("wrong password"));
        }
        let failed = "The directory did not say whether the password is right.";
        match self.ldap.with_timeout(ANSWER_LIMIT).simple_bind(&person.dn, password.expose()).await {
            Ok(answer) if answer.rc == SUCCESS => Ok(Verdict::Right),
            Ok(answer) if answer.rc == INVALID_CREDENTIALS => Ok(Verdict::Wrong(reason(&answer.text))),
            Ok(answer) if answer.rc == UNWILLING => Ok(Verdict::Wrong("the directory is not willing")),
            Ok(answer) => Err(upstream("directory_auth_failed", failed, answer.to_string())),
            Err(error) => Err(upstream("directory_auth_failed", failed, error)),
        }
    }
}

/// The filter that finds the person who typed this. The domain of the name is left away only where it is this provider's: who
/// types another one is found by the whole of it, for instance by an address for mail, or not at all.
fn user_filter(settings: &Settings, login: &Login) -> String {
    let own = login.domain.as_deref().is_none_or(|domain| settings.is_domain(domain));
    let account = if own { login.account.as_str() } else { login.typed.as_str() };
    fill(&settings.user_search_filter, &[("{username}", account), ("{user}", account), ("{login}", &login.typed)])
}

/// Puts values in place of the placeholders of a search filter, escaped.
pub(super) fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut filter = String::with_capacity(template.len() * 2);
    let mut rest = template;
    // One pass: a value with a placeholder in it stays a value.
    while let Some((before, after)) = rest.split_once('{') {
        filter.push_str(before);
        let at =
            values.iter().find_map(|(placeholder, value)| Some((value, after.strip_prefix(placeholder.strip_prefix('{')?)?)));
        if let Some((value, after)) = at {
            filter.push_str(&ldap_escape(*value));
            rest = after;
        } else {
            filter.push('{');
            rest = after;
        }
    }
    filter.push_str(rest);
    filter
}

/// The attributes of an entry. Their names come back as the server writes them.
pub(super) struct Attributes<'a>(pub &'a SearchEntry);

impl Attributes<'_> {
    /// All values of an attribute, as text.
    pub fn all(&self, name: &str) -> Vec<String> {
        let found = self.0.attrs.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name));
        found.flat_map(|(_, values)| values.clone()).collect()
    }

    /// The first value that is not empty, trimmed.
    pub fn first(&self, name: &str) -> Option<String> {
        self.all(name).into_iter().map(|value| value.trim().to_owned()).find(|value| !value.is_empty())
    }

    /// The first value, as bytes.
    pub fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        let binary = self.0.bin_attrs.iter().find(|(found, _)| found.eq_ignore_ascii_case(name));
        let binary = binary.and_then(|(_, values)| values.first().cloned());
        binary.or_else(|| self.all(name).into_iter().next().map(String::into_bytes))
    }

    /// Whether the server has answered a part of the values only (`name;range=0-1499`).
    pub fn is_part(&self, name: &str) -> bool {
        let options = |found: &String| found.split_once(';').map(|(name, options)| (name.to_owned(), options.to_owned()));
        let part = |(found, options): (String, String)| found.eq_ignore_ascii_case(name) && options.starts_with("range=");
        self.0.attrs.keys().filter_map(options).any(part)
    }
}

fn read(settings: &Settings, entry: &SearchEntry, account: &str) -> Person {
    let attributes = Attributes(entry);
    let subject = (attributes.first("entryUUID").map(|uuid| format!("uuid:{uuid}")))
        .or_else(|| attributes.bytes("objectGUID").map(|bytes| format!("guid:{}", hex::encode(bytes))))
        .or_else(|| attributes.bytes("objectSid").map(|bytes| format!("sid:{}", hex::encode(bytes))))
        .unwrap_or_else(|| format!("dn:{}", dn::normal(&entry.dn)));
    let control = attributes.first("userAccountControl").and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    Person {
        dn: entry.dn.clone(),
        subject,
        username: attributes
            .first("userPrincipalName")
            .or_else(|| attributes.first(&settings.username_attribute))
            .unwrap_or_else(|| account.to_owned()),
        display_name: attributes.first(&settings.display_name_attribute).unwrap_or_default(),
        groups: attributes.all(&settings.member_of_attribute),
        disabled: control & 0x2 != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        for (typed, account, domain) in [
            ("alice", "alice", None),
            (" alice@Ad.Test ", "alice", Some("ad.test")),
            ("BOREALIS\\alice", "alice", Some("borealis")),
            ("a@b@c", "a@b", Some("c")),
            ("@c", "@c", None),
            ("a@", "a@", None),
        ] {
            let login = Login::parse(typed);
            assert_eq!((login.account.as_str(), login.domain.as_deref()), (account, domain), "{typed}");
        }
    }

    #[test]
    fn a_name_stays_a_name_in_a_filter() {
        let filter = |template: &str, typed: &str| {
            let settings = Settings {
                user_search_filter: template.to_owned(),
                domain_suffix: "borealis.test".to_owned(),
                kerberos_realm: "AD.TEST".to_owned(),
                ..Settings::default()
            };
            user_filter(&settings, &Login::parse(typed))
        };
        assert_eq!(filter("(&(uid={user})(x={other}))", "{login}"), "(&(uid={login})(x={other}))");
        assert_eq!(filter("(uid={username})", "*)(uid=*"), "(uid=\\2a\\29\\28uid=\\2a)");
        // A domain of the provider's own is left away, another one is part of the name.
        let both = "(|(uid={user})(mail={login}))";
        assert_eq!(filter(both, "a@Borealis.test"), "(|(uid=a)(mail=a@Borealis.test))");
        assert_eq!(filter(both, "AD\\a"), "(|(uid=a)(mail=AD\\5ca))");
        assert_eq!(filter(both, "a@b"), "(|(uid=a@b)(mail=a@b))");
    }

    #[test]
    fn overrides_give_the_address_and_keep_the_name() {
        let ip: IpAddr = "10.0.0.5".parse().unwrap();
        let target = |url: &str, name: &str| {
            let overrides = BTreeMap::from([(name.to_owned(), ip)]);
            let target = Target::parse(url, true, &overrides).unwrap();
            (target.name, target.port, target.pinned.is_some())
        };
        assert_eq!(target("ldaps://dc1.ad.test", "dc1.ad.test"), ("dc1.ad.test".into(), 636, true));
        assert_eq!(target("ldap://DC1:3890", "dc1.ad.test"), ("dc1.ad.test".into(), 3890, true));
        assert_eq!(target("dc1.ad.test", "dc1"), ("dc1.ad.test".into(), 636, true));
        assert_eq!(target("dc2.ad.test", "dc1.ad.test"), ("dc2.ad.test".into(), 636, false));
        for bad in ["http://dc1", "ldap://dc1/dc=x", "ldap://u@dc1", "ldap://", "ldap://dc1?x", "ldap:// dc1"] {
            assert_eq!(Target::parse(bad, false, &BTreeMap::new()).unwrap_err().code, "invalid_server_url", "{bad}");
        }
    }

    #[test]
    fn the_reason_of_active_directory_is_told() {
        let text =
            |code: &str| format!("80090308: LdapErr: DSID-0C09041C, comment: AcceptSecurityContext error, data {code}, v4563");
        assert_eq!(reason(&text("775")), "the account is locked");
        assert_eq!(reason(&text("52e")), "wrong password");
        assert_eq!(reason(""), "wrong password");
    }
}
