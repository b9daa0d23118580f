//! Signing in with a name and password that a directory knows.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;
use tokio::time::timeout;

use super::{
    GroupMapping, Provider, SiteMapping, dn,
    ldap::{Connection, Login, Person, Verdict},
    list,
};
use crate::{
    access::{
        Access, Client, limits,
        sign_in::record_refusal,
        users::{self, DISPLAY_NAME_MAX_CHARS, Role},
    },
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    names::{self, Name, Rule},
    scope::Actor,
    secret::Secret,
};

/// How long all directories together may take to answer a sign-in.
const LIMIT: Duration = Duration::from_secs(20);
/// The most characters of the name of a directory's account.
const USERNAME_MAX_CHARS: usize = 128;

/// What the directories say of a name and a password.
#[derive(Debug)]
pub(in crate::access) enum Asked {
    /// Not that it is right, for this reason. What the reason is is for the audit alone.
    Refused(&'static str),
    /// It is right.
    Right(Box<(Provider, Person)>),
}

/// The role a person has by their groups; none when no mapping fits. Without any mapping everybody is a user.
#[must_use]
pub fn role(mappings: &[GroupMapping], groups: &[String]) -> Option<Role> {
    if mappings.is_empty() {
        return Some(Role::User);
    }
    let groups: BTreeSet<String> = groups.iter().map(|group| dn::normal(group)).collect();
    let fitting = || mappings.iter().filter(|mapping| groups.contains(&dn::normal(&mapping.group_dn)));
    fitting().find(|mapping| mapping.role == Role::Admin).or_else(|| fitting().next()).map(|mapping| mapping.role)
}

/// The sites a person sees by their groups.
#[must_use]
pub fn sites(mappings: &[SiteMapping], groups: &[String]) -> BTreeSet<i64> {
    let groups: BTreeSet<String> = groups.iter().map(|group| dn::normal(group)).collect();
    let fits = |mapping: &&SiteMapping| mapping.group_dns.iter().any(|group| groups.contains(&dn::normal(group)));
    mappings.iter().filter(fits).flat_map(|mapping| mapping.site_ids.iter().copied()).collect()
}

/// A user as the database has them.
pub(super) struct Cached {
    pub id: i64,
    pub username: String,
    pub role: String,
    pub subject: String,
}

/// Writes what the directory says of a user: role, groups, and sites where the provider maps them.
pub(super) async fn refresh(
    tx: &mut db::Tx<'_>,
    actor: &Actor,
    provider: &Provider,
    user: &Cached,
    person: &Person,
    role: Role,
) -> Result<()> {
    // A new name is taken when it is free; the subject tells who it is.
    let new_name = username(person).ok();
    sqlx::query!(
        "UPDATE users SET role = $2, directory_dn = $3, directory_groups = $4, directory_domain = $5,
                directory_last_sync_at = now(), display_name = $6, updated_at = now(),
                username = CASE WHEN new.is_free THEN $7 ELSE username END,
                username_key = CASE WHEN new.is_free THEN $8 ELSE username_key END
         FROM (SELECT $7::text IS NOT NULL
                      AND NOT EXISTS (SELECT FROM users other WHERE other.username_key = $8 AND other.id <> $1) AS is_free) AS new
         WHERE id = $1",
        user.id,
        role.as_str(),
        person.dn,
        &person.groups,
        domain(provider),
        display_name(person, &user.username),
        new_name.as_ref().map(Name::as_str),
        new_name.as_ref().map(Name::key),
    )
    .execute(&mut **tx)
    .await?;
    let mut detail = json!({ "username": user.username, "provider": provider.id });
    if user.role != role.as_str() {
        detail["role"] = json!({ "before": user.role, "after": role.as_str() });
    }
    if !provider.site_mappings.is_empty() {
        let wanted = if role == Role::Admin { BTreeSet::new() } else { sites(&provider.site_mappings, &person.groups) };
        let wanted: Vec<i64> = wanted.into_iter().collect();
        let gone = sqlx::query_scalar!(
            "DELETE FROM user_site_assignments WHERE user_id = $1 AND site_id <> ALL ($2) RETURNING site_id",
            user.id,
            &wanted,
        )
        .fetch_all(&mut **tx)
        .await?;
        let new = sqlx::query_scalar!(
            "INSERT INTO user_site_assignments (user_id, site_id)
             SELECT $1, id FROM sites WHERE id = ANY ($2) ON CONFLICT DO NOTHING RETURNING site_id",
            user.id,
            &wanted,
        )
        .fetch_all(&mut **tx)
        .await?;
        if !gone.is_empty() || !new.is_empty() {
            detail["sites"] = json!({ "removed": gone, "added": new });
        }
    }
    if detail.get("role").is_some() || detail.get("sites").is_some() {
        let object_id = user.id.to_string();
        let entry = Entry { action: "user.directory_update", object_kind: "user", object_id, detail, ..Entry::default() };
        audit::record(tx, actor, entry).await?;
    }
    Ok(())
}

fn domain(provider: &Provider) -> &str {
    let settings = &provider.settings;
    if settings.domain_suffix.is_empty() { &settings.kerberos_realm } else { &settings.domain_suffix }
}

/// The name of a person's account here; an error when the directory's cannot be one.
fn username(person: &Person) -> Result<Name> {
    Name::parse(&person.username, &Rule { max_chars: USERNAME_MAX_CHARS, ..users::USERNAME })
}

/// The name to show for a person: what the directory says, without what people cannot see.
fn display_name(person: &Person, username: &str) -> String {
    let name = names::visible(&person.display_name, DISPLAY_NAME_MAX_CHARS);
    if name.is_empty() { username.to_owned() } else { name }
}

impl Access<'_> {
    /// Asks the directories that may know this name, or only the one an account is of. From a `known_device`, one the person has
    /// signed in from, failures are counted there alone; from elsewhere also under the person, whom a directory may find by
    /// several spellings.
    ///
    /// # Errors
    /// 429 `rate_limited` before the directory is told a password; when the database is away. A directory that cannot be asked is a refusal.
    pub(in crate::access) async fn ask_directories(
        &self,
        name: &str,
        password: &Secret<String>,
        only: Option<i64>,
        known_device: bool,
    ) -> Result<Asked> {
        let login = Login::parse(name);
        let mut providers = list(self.pool).await?;
        providers.retain(|provider| provider.enabled && only.is_none_or(|only| provider.id == only));
        // A domain chooses between providers. One that none of them is for may still be part of a name that their filters find.
        let is_named = |provider: &Provider| login.domain.as_deref().is_some_and(|domain| provider.settings.is_domain(domain));
        if only.is_none() && providers.iter().any(is_named) {
            providers.retain(is_named);
        }
        let answer = timeout(LIMIT, self.ask(&providers, &login, password, known_device)).await;
        answer.unwrap_or(Ok(Asked::Refused("the directory did not answer in time")))
    }

    async fn ask(&self, providers: &[Provider], login: &Login, password: &Secret<String>, known_device: bool) -> Result<Asked> {
        let mut refusal = if providers.is_empty() { "wrong name or password" } else { "unknown to the directory" };
        let mut found = None;
        for provider in providers {
            let bind_password = provider.bind_password(self.vault)?;
            let person = async {
                let mut connection = Connection::open(&self.settings.egress, provider, bind_password.as_ref(), true).await?;
                let person = connection.find(login).await?;
                Ok::<_, Error>(person.map(|person| (connection, person)))
            };
            match person.await {
                Ok(None) => {}
                Ok(Some(_)) if found.is_some() => return Ok(Asked::Refused("several directories know this name")),
                Ok(Some((connection, person))) => found = Some((provider, connection, person)),
                Err(error) if error.code == "ambiguous_directory_username" => {
                    return Ok(Asked::Refused("several people of the directory have this name"));
                }
                Err(error) => {
                    tracing::warn!(provider = provider.id, %error, source = ?error.source, "a directory could not be asked");
                    refusal = "the directory could not be asked";
                }
            }
        }
        let Some((provider, connection, person)) = found else { return Ok(Asked::Refused(refusal)) };
        let counted = if known_device {
            None
        } else {
            let subject = self.name_subject(&format!("{}/{}", provider.id, person.subject))?;
            Some(limits::attempt(self.pool, &[(limits::ACCOUNT, subject.clone()), (limits::ACCOUNT_HOUR, subject)]).await?)
        };
        let verdict = connection.check_password(&person, password).await;
        if let (Ok(Verdict::Right), Some(counted)) = (&verdict, counted) {
            limits::give_back(self.pool, counted).await?;
        }
        match verdict {
            Ok(Verdict::Right) if person.disabled => Ok(Asked::Refused("the account is disabled")),
            Ok(Verdict::Right) => Ok(Asked::Right(Box::new((provider.clone(), person)))),
            Ok(Verdict::Wrong(why)) => Ok(Asked::Refused(why)),
            Err(error) => {
                tracing::warn!(provider = provider.id, %error, source = ?error.source, "a directory could not be asked");
                Ok(Asked::Refused("the directory could not be asked"))
            }
        }
    }

    /// The account of a person whose password was right: found by the directory's own id, made when it is their first time,
    /// and brought up to date.
    ///
    /// # Errors
    /// 403 `directory_group_not_allowed`, `directory_user_disabled`; 409 `directory_username_conflict`.
    pub(in crate::access) async fn admit(&self, client: &Client, provider: &Provider, person: &Person) -> Result<i64> {
        let mut tx = self.pool.begin().await?;
        let known = sqlx::query!(
            r#"SELECT id, username, role, directory_subject AS "subject!", directory_disabled FROM users
               WHERE directory_provider_id = $1 AND directory_subject = $2 FOR UPDATE"#,
            provider.id,
            person.subject,
        )
        .fetch_optional(&mut *tx)
        .await?;
        let known_id = known.as_ref().map(|user| user.id);
        let refuse = async |code: &'static str, kind: Kind, why: &str, reason: &str| {
            record_refusal(*self, &client.anonymous(), "session.login", known_id, reason).await?;
            Err(Error::new(kind, code, why))
        };
        if known.as_ref().is_some_and(|user| user.directory_disabled) {
            let why = "This account has been disabled here; an administrator can enable it again.";
            return refuse("directory_user_disabled", Kind::Forbidden, why, "the account is disabled here").await;
        }
        let Some(role) = role(&provider.group_mappings, &person.groups) else {
            let why = "None of your groups in the directory may sign in here.";
            return refuse("directory_group_not_allowed", Kind::Forbidden, why, "no group of the directory fits").await;
        };
        let user = match known {
            Some(user) => Cached { id: user.id, username: user.username, role: user.role, subject: user.subject },
            None => {
                let conflict = "Another account has this name.";
                let name = match username(person) {
                    Ok(name) => name,
                    Err(error) => {
                        let why = format!("The directory's name for this account cannot be a name here: {}", error.message);
                        return refuse("directory_username_conflict", Kind::Conflict, &why, "the name cannot be one here").await;
                    }
                };
                let id = sqlx::query_scalar!(
                    "INSERT INTO users (username, username_key, display_name, role, auth_source, directory_provider_id, directory_subject)
                     VALUES ($1, $2, $3, $4, 'directory', $5, $6) ON CONFLICT DO NOTHING RETURNING id",
                    name.as_str(),
                    name.key(),
                    display_name(person, name.as_str()),
                    role.as_str(),
                    provider.id,
                    person.subject,
                )
                .fetch_optional(&mut *tx)
                .await?;
                let Some(id) = id else {
                    drop(tx);
                    return refuse("directory_username_conflict", Kind::Conflict, conflict, "another account has the name").await;
                };
                let entry = Entry {
                    action: "user.create",
                    object_kind: "user",
                    object_id: id.to_string(),
                    detail: json!({ "username": name.as_str(), "role": role.as_str(), "provider": provider.id }),
                    ..Entry::default()
                };
                audit::record(&mut tx, &client.anonymous(), entry).await?;
                Cached { id, username: name.into_string(), role: role.as_str().to_owned(), subject: person.subject.clone() }
            }
        };
        refresh(&mut tx, &client.acting_as(user.id, &user.username), provider, &user, person, role).await?;
        tx.commit().await?;
        Ok(user.id)
    }
}

/// What an administrator wants to know of a name.
#[derive(Debug)]
pub struct Lookup {
    /// The provider that was asked.
    pub provider: Provider,
    /// The name, taken apart.
    pub login: Login,
    /// The person.
    pub person: Person,
    /// The role the person would have.
    pub role: Option<Role>,
    /// Whether a password sent along was right; none when none was sent.
    pub verdict: Option<Verdict>,
}

impl Access<'_> {
    /// Looks a name up in one provider, switched on or not, and changes nothing.
    ///
    /// # Errors
    /// 400 `username_required`; 404 `provider_not_found`, `directory_user_not_found`; 409 `ambiguous_directory_username`;
    /// 502 `directory_lookup_failed`, `directory_auth_failed`, `ldap_connect_failed`, `pinned_certificate_mismatch`.
    pub async fn look_up(&self, actor: &Actor, id: i64, name: &str, password: Option<&Secret<String>>) -> Result<Lookup> {
        if name.trim().is_empty() {
            return Err(Error::field("username_required", "username", "is required."));
        }
        let provider = super::get(self.pool, id).await?;
        let login = Login::parse(name);
        let bind_password = provider.bind_password(self.vault)?;
        let (person, verdict) = {
            let mut connection = Connection::open(&self.settings.egress, &provider, bind_password.as_ref(), false).await?;
            let person = connection.find(&login).await?;
            let person = person.ok_or_else(|| {
                Error::new(Kind::NotFound, "directory_user_not_found", "The directory knows nobody of this name.")
            })?;
            let verdict = match password {
                Some(password) => Some(connection.check_password(&person, password).await?),
                None => None,
            };
            (person, verdict)
        };
        let mut tx = self.pool.begin().await?;
        let detail = json!({ "dn": person.dn, "password_checked": verdict.is_some() });
        super::record(&mut tx, actor, "directory.lookup", id, detail).await?;
        tx.commit().await?;
        Ok(Lookup { role: role(&provider.group_mappings, &person.groups), provider, login, person, verdict })
    }

    /// Switches the account of a directory's user off, which ends its sessions, or on again.
    ///
    /// # Errors
    /// 400 `invalid_username`, `cannot_disable_self`; 404 `directory_user_not_found`, for local users too.
    pub async fn set_directory_disabled(
        &self,
        actor: &Actor,
        own_id: i64,
        name: &str,
        disabled: bool,
    ) -> Result<(String, Vec<uuid::Uuid>)> {
        if name.trim().is_empty() {
            return Err(Error::field("invalid_username", "username", "is required."));
        }
        let mut tx = self.pool.begin().await?;
        let user = sqlx::query!(
            "SELECT id, username, auth_source FROM users WHERE username_key = ANY($1) ORDER BY username_key LIMIT 1 FOR UPDATE",
            &names::lookup_keys(name.trim()),
        )
        .fetch_optional(&mut *tx)
        .await?;
        if user.as_ref().is_some_and(|user| user.id == own_id) {
            return Err(Error::invalid("cannot_disable_self", "You cannot switch your own account off or on."));
        }
        let user = user
            .filter(|user| user.auth_source == "directory")
            .ok_or_else(|| Error::new(Kind::NotFound, "directory_user_not_found", "There is no such user of a directory."))?;
        let ended = users::set_directory_disabled(&mut tx, user.id, disabled).await?;
        let action = if disabled { "user.disable" } else { "user.enable" };
        let detail = json!({ "username": user.username });
        let entry = Entry { action, object_kind: "user", object_id: user.id.to_string(), detail, ..Entry::default() };
        audit::record(&mut tx, actor, entry).await?;
        tx.commit().await?;
        Ok((user.username, ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_give_the_role_and_the_sites() {
        let mapping = |dn: &str, role| GroupMapping { group_dn: dn.to_owned(), role };
        let groups = |dns: &[&str]| dns.iter().map(|dn| (*dn).to_owned()).collect::<Vec<_>>();
        let mappings = [mapping("cn=ops,dc=x", Role::User), mapping("cn=root,dc=x", Role::Admin)];
        assert_eq!(role(&[], &[]), Some(Role::User));
        assert_eq!(role(&mappings, &groups(&["CN=Ops, DC=x"])), Some(Role::User));
        assert_eq!(role(&mappings, &groups(&["cn=ops,dc=x", "cn=root,dc=x"])), Some(Role::Admin));
        assert_eq!(role(&mappings, &groups(&["cn=others,dc=x"])), None);

        let site = |dns: &[&str], sites: &[i64]| SiteMapping {
            id: None,
            label: String::new(),
            group_dns: groups(dns),
            site_ids: sites.to_vec(),
        };
        let mappings = [site(&["cn=a,dc=x", "cn=b,dc=x"], &[1, 2]), site(&["cn=b,dc=x"], &[2, 3]), site(&[], &[4])];
        assert_eq!(sites(&mappings, &groups(&["CN=A,DC=X"])), BTreeSet::from([1, 2]));
        assert_eq!(sites(&mappings, &groups(&["cn=b,dc=x"])), BTreeSet::from([1, 2, 3]));
        assert!(sites(&mappings, &[]).is_empty());
    }
}
