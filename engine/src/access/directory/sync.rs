//! Looking cached users up again: who is still there, with which role and sites.
//!
//! Nobody is disabled because something went wrong: only a directory that was asked, and said that there is no such person
//! or that no group of theirs fits, takes an account away; and more than half of the accounts at once only when a person
//! confirms it.

use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use super::{
    Provider, get,
    ldap::{Connection, Person},
    record,
    sign_in::{Cached, refresh, role},
};
use crate::{
    access::{
        Access,
        users::{self, Role},
    },
    audit::{self, Entry},
    db,
    error::{Error, Kind, Result},
    scope::Actor,
};

/// How long one sync may take; who was not reached is first next time.
const LIMIT: Duration = Duration::from_secs(8 * 60);
/// How long a process has a provider to itself.
const CLAIM_S: f64 = 600.0;
/// After how many failures in a row the directory is left alone.
const FAILURES_MAX: usize = 5;

/// What a sync did.
#[derive(Debug, Default)]
pub struct Synced {
    /// How many accounts were looked up.
    pub checked: usize,
    /// How many could not be, and were left as they are.
    pub unclear: usize,
    /// How many were disabled.
    pub disabled: usize,
    /// The sessions that ended.
    pub ended: Vec<Uuid>,
}

impl Synced {
    /// A sentence.
    #[must_use]
    pub fn message(&self) -> String {
        format!(
            "{} accounts looked up, {} disabled, {} left as they are because of errors.",
            self.checked, self.disabled, self.unclear
        )
    }
}

/// A provider whose next sync is due, claimed for this process.
///
/// # Errors
/// When the database is away.
pub async fn due(pool: &db::Pool) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar!(
        "UPDATE directory_providers SET sync_claimed_until = now() + make_interval(secs => $1)
         WHERE id = (
             SELECT p.id FROM directory_providers p
             WHERE p.enabled AND (p.sync_claimed_until IS NULL OR p.sync_claimed_until < now())
               AND (p.last_sync_at IS NULL OR p.last_sync_at <= now() - make_interval(secs => p.sync_interval_seconds))
               AND EXISTS (SELECT 1 FROM users u WHERE u.directory_provider_id = p.id AND NOT u.directory_disabled)
             ORDER BY p.last_sync_at NULLS FIRST LIMIT 1 FOR UPDATE SKIP LOCKED)
         RETURNING id",
        CLAIM_S,
    )
    .fetch_optional(pool)
    .await?)
}

fn failed(message: String) -> Error {
    Error::new(Kind::Upstream, "sync_failed", message)
}

/// Whether so many of these accounts may go without anybody having confirmed it.
fn is_mass(gone: usize, checked: usize) -> bool {
    gone > 1 && gone * 2 > checked
}

impl Access<'_> {
    /// Looks the cached users of a provider up again. `confirmed`: also when more than half of them are gone.
    ///
    /// # Errors
    /// 404 `provider_not_found`; 409 `mass_disable_unconfirmed`; 502 `sync_failed`, and nothing has changed; 423 `aegis_locked`.
    pub async fn sync_provider(&self, actor: &Actor, id: i64, confirmed: bool) -> Result<Synced> {
        let provider = get(self.pool, id).await?;
        let outcome = self.sync(actor, &provider, confirmed).await;
        let (status, message) = match &outcome {
            Ok(synced) => ("ok", synced.message()),
            Err(error) => ("failed", error.message.clone()),
        };
        let mut tx = self.pool.begin().await?;
        sqlx::query!(
            "UPDATE directory_providers SET last_sync_at = now(), last_sync_status = $2, last_sync_message = left($3, 500),
                    sync_claimed_until = NULL
             WHERE id = $1",
            id,
            status,
            message,
        )
        .execute(&mut *tx)
        .await?;
        // What happens every minute and changes nothing is no event.
        if outcome.as_ref().is_ok_and(|synced| synced.disabled > 0) || status != provider.last_sync.status {
            record(&mut tx, actor, "directory.sync", id, json!({ "status": status, "message": message })).await?;
        }
        tx.commit().await?;
        outcome
    }

    async fn sync(&self, actor: &Actor, provider: &Provider, confirmed: bool) -> Result<Synced> {
        let bind_password = provider.bind_password(self.vault)?;
        let began = Instant::now();
        let unreachable = |error: Error| {
            tracing::warn!(provider = provider.id, %error, source = ?error.source, "a directory could not be synced");
            failed(error.message)
        };
        let users = sqlx::query_as!(
            Cached,
            r#"SELECT id, username, role, directory_subject AS "subject!" FROM users
               WHERE directory_provider_id = $1 AND NOT directory_disabled AND directory_subject IS NOT NULL
               ORDER BY directory_last_sync_at NULLS FIRST, id"#,
            provider.id,
        )
        .fetch_all(self.pool)
        .await?;
        let mut synced = Synced::default();
        let mut kept: Vec<(Cached, Person, Role)> = Vec::new();
        let mut gone: Vec<(Cached, &str)> = Vec::new();
        {
            let mut connection =
                Connection::open(&self.settings.egress, provider, bind_password.as_ref(), false).await.map_err(unreachable)?;
            connection.read_base().await.map_err(unreachable)?;
            let mut failures = 0;
            for user in users {
                if began.elapsed() > LIMIT {
                    break;
                }
                match connection.find_again(&user.subject, &user.username).await {
                    Ok(found) => {
                        failures = 0;
                        synced.checked += 1;
                        match found {
                            None => gone.push((user, "the directory does not know it any more")),
                            Some(person) if person.disabled => gone.push((user, "the directory has disabled it")),
                            Some(person) => match role(&provider.group_mappings, &person.groups) {
                                Some(role) => kept.push((user, person, role)),
                                None => gone.push((user, "no group of the directory fits")),
                            },
                        }
                    }
                    Err(error) => {
                        synced.unclear += 1;
                        failures += 1;
                        if failures >= FAILURES_MAX {
                            return Err(unreachable(error));
                        }
                        tracing::warn!(user = user.id, %error, source = ?error.source, "a user could not be looked up again");
                    }
                }
            }
        }
        if is_mass(gone.len(), synced.checked) && !confirmed {
            let why = format!(
                "{} of {} accounts would be disabled. If the directory is as it should be, sync again with confirm_disable.",
                gone.len(),
                synced.checked
            );
            return Err(Error::conflict("mass_disable_unconfirmed", why));
        }
        for (user, person, role) in kept {
            let mut tx = self.pool.begin().await?;
            if let Some(user) = lock(&mut tx, provider, &user).await? {
                refresh(&mut tx, actor, provider, &user, &person, role).await?;
            }
            tx.commit().await?;
        }
        for (user, why) in gone {
            let mut tx = self.pool.begin().await?;
            if lock(&mut tx, provider, &user).await?.is_some() {
                synced.ended.extend(users::set_directory_disabled(&mut tx, user.id, true).await?);
                let detail = json!({ "username": user.username, "reason": why });
                let object_id = user.id.to_string();
                let entry = Entry { action: "user.disable", object_kind: "user", object_id, detail, ..Entry::default() };
                audit::record(&mut tx, actor, entry).await?;
                synced.disabled += 1;
            }
            tx.commit().await?;
        }
        Ok(synced)
    }
}

/// The user as they are now, unless they have become another's or were disabled in the meantime.
async fn lock(tx: &mut db::Tx<'_>, provider: &Provider, user: &Cached) -> Result<Option<Cached>> {
    Ok(sqlx::query_as!(
        Cached,
        r#"SELECT id, username, role, directory_subject AS "subject!" FROM users
           WHERE id = $1 AND directory_provider_id = $2 AND directory_subject = $3 AND NOT directory_disabled FOR UPDATE"#,
        user.id,
        provider.id,
        user.subject,
    )
    .fetch_optional(&mut **tx)
    .await?)
}

/// Gives the cached users of a provider whose mappings have changed the roles and sites of the groups they were last seen in.
/// Whom no mapping fits any more keeps nothing but the account, which the next sync disables.
pub(super) async fn remap(tx: &mut db::Tx<'_>, actor: &Actor, provider: &Provider) -> Result<()> {
    let users = sqlx::query!(
        r#"SELECT id, username, role, display_name, directory_subject AS "subject!", directory_dn, directory_groups
           FROM users WHERE directory_provider_id = $1 AND NOT directory_disabled AND directory_subject IS NOT NULL
           ORDER BY id FOR UPDATE"#,
        provider.id,
    )
    .fetch_all(&mut **tx)
    .await?;
    for user in users {
        let person = Person {
            dn: user.directory_dn,
            subject: user.subject.clone(),
            username: user.username.clone(),
            display_name: user.display_name,
            groups: user.directory_groups,
            disabled: false,
        };
        let role = role(&provider.group_mappings, &person.groups);
        let user = Cached { id: user.id, username: user.username, role: user.role, subject: user.subject };
        refresh(tx, actor, provider, &user, &person, role.unwrap_or(Role::User)).await?;
        if role.is_none() {
            sqlx::query!("DELETE FROM user_site_assignments WHERE user_id = $1", user.id).execute(&mut **tx).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_mass;

    #[test]
    fn one_may_always_go_and_half() {
        for (gone, checked, mass) in [(0, 0, false), (1, 1, false), (1, 2, false), (2, 2, true), (2, 4, false), (3, 5, true)] {
            assert_eq!(is_mass(gone, checked), mass, "{gone} of {checked}");
        }
    }
}
