//! Whether the database has the tables of this version, and whether this program may use them.

use std::collections::BTreeSet;

use sqlx::migrate::MigrateError;

use crate::{
    db::{Cause, MIGRATOR, Pool},
    error::{Error, Kind, Result},
};

/// Postgres' codes: a table that is not there, a right that is missing.
const UNDEFINED_TABLE: &str = "42P01";
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Checks that every migration of this version has been applied and none of a later one, and that the role may read and write
/// all tables.
///
/// # Errors
/// `migrations_pending`, `database_is_newer`, `database_rights_missing`; and when the database is away.
pub async fn check(pool: &Pool) -> Result<()> {
    let asked: sqlx::Result<Vec<i64>> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success").fetch_all(pool).await;
    let applied: BTreeSet<i64> = match asked {
        Ok(versions) => versions.into_iter().collect(),
        Err(error) if code(&error).as_deref() == Some(UNDEFINED_TABLE) => BTreeSet::new(),
        Err(error) => return Err(explained(pool, error).await),
    };
    compare(&applied, &MIGRATOR.iter().map(|migration| migration.version).collect())?;
    match missing_right(pool).await? {
        Some(right) => Err(lacks(&right)),
        None => Ok(()),
    }
}

/// Compares what has been applied with what this version knows. Pure.
fn compare(applied: &BTreeSet<i64>, known: &BTreeSet<i64>) -> Result<()> {
    let last = |versions: &BTreeSet<i64>| versions.last().copied().unwrap_or(0);
    if last(applied) > last(known) {
        return Err(newer(last(applied), last(known)));
    }
    let missing = known.difference(applied).count();
    if missing > 0 {
        let message = format!(
            "{} of {} migrations are applied: run `borealis-api migrate` as the owner of the database.",
            known.len() - missing,
            known.len()
        );
        return Err(Error::new(Kind::Unavailable, "migrations_pending", message).retry_after(2));
    }
    Ok(())
}

fn newer(theirs: i64, ours: i64) -> Error {
    let message = format!("This database belongs to a newer version of the engine ({theirs} > {ours}): start that one.");
    Error::new(Kind::Unavailable, "database_is_newer", message).retry_after(30)
}

fn lacks(right: &str) -> Error {
    let message = format!("The role of DATABASE_URL lacks {right}. Grant it, or use the role that owns the database.");
    Error::new(Kind::Unavailable, "database_rights_missing", message).retry_after(30)
}

/// The first right on the tables of the engine and its queue that the role has not, as a person would write it after `GRANT`.
async fn missing_right(pool: &Pool) -> Result<Option<String>> {
    let right = sqlx::query_scalar(
        "SELECT wanted FROM (
             SELECT 'USAGE on schema ' || quote_ident(nspname) AS wanted FROM pg_namespace
             WHERE nspname IN ('public', 'apalis') AND NOT has_schema_privilege(oid, 'USAGE')
             UNION ALL
             SELECT privilege || ' on table ' || quote_ident(n.nspname) || '.' || quote_ident(c.relname)
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
                  unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS privilege
             -- Tables of others in the same schema are none of ours.
             WHERE n.nspname IN ('public', 'apalis') AND c.relkind IN ('r', 'p') AND c.relname <> '_sqlx_migrations'
               AND c.relowner = (SELECT relowner FROM pg_class WHERE oid = to_regclass('_sqlx_migrations'))
               AND NOT has_table_privilege(c.oid, privilege)
         ) AS missing LIMIT 1",
    );
    Ok(right.fetch_optional(pool).await?)
}

/// The first right to make tables that the role has not.
async fn missing_right_to_create(pool: &Pool) -> Result<Option<String>> {
    let right = sqlx::query_scalar(
        "SELECT wanted FROM (
             SELECT 'CREATE on database ' || quote_ident(current_database()) AS wanted
             WHERE NOT has_database_privilege(current_database(), 'CREATE')
             UNION ALL
             SELECT 'CREATE on schema ' || quote_ident(nspname) FROM pg_namespace
             WHERE nspname IN ('public', 'apalis') AND NOT has_schema_privilege(oid, 'CREATE')
         ) AS missing LIMIT 1",
    );
    Ok(right.fetch_optional(pool).await?)
}

/// Names the right when one is missing.
async fn explained(pool: &Pool, error: sqlx::Error) -> Error {
    if code(&error).as_deref() != Some(INSUFFICIENT_PRIVILEGE) {
        return error.into();
    }
    let right = missing_right(pool).await.ok().flatten();
    let mut lacks = lacks(&right.unwrap_or_else(|| "a right".to_owned()));
    lacks.source = Some(Box::new(Cause(error)));
    lacks
}

/// Says why migrations could not be applied. What waiting does not mend is a conflict.
pub(crate) async fn not_migrated(pool: &Pool, error: MigrateError) -> Error {
    let error = match error {
        MigrateError::VersionMissing(version) => {
            let ours = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or(0);
            return if version > ours { Error { kind: Kind::Conflict, ..newer(version, ours) } } else { Error::bug(error) };
        }
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error,
        MigrateError::VersionMismatch(version) => return modified(version),
        other => return Error::bug(other),
    };
    if code(&error).as_deref() != Some(INSUFFICIENT_PRIVILEGE) {
        return error.into();
    }
    let right = missing_right_to_create(pool).await.ok().flatten();
    // A table of ours that another role owns, for one.
    let right = right.unwrap_or_else(|| format!("a right that migrations need ({})", Cause::text(&error)));
    Error { kind: Kind::Conflict, source: Some(Box::new(Cause(error))), ..lacks(&right) }
}

/// A migration that reads otherwise than the database remembers.
fn modified(version: i64) -> Error {
    let why = format!(
        "Migration {version} was run on this database by a version of the engine that was never published. Go on with that version, \
         or restore a backup from before it."
    );
    Error::new(Kind::Conflict, "migration_modified", why)
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(applied: &[i64]) -> Option<&'static str> {
        compare(&applied.iter().copied().collect(), &BTreeSet::from([1, 2, 23])).err().map(|error| error.code)
    }

    #[test]
    fn only_the_schema_of_this_version_will_do() {
        assert_eq!(compared(&[1, 2, 23]), None);
        assert_eq!(compared(&[]), Some("migrations_pending"));
        assert_eq!(compared(&[1, 23]), Some("migrations_pending"));
        assert_eq!(compared(&[1, 2, 23, 99]), Some("database_is_newer"));
        assert_eq!(compared(&[99]), Some("database_is_newer"));
        // One that a later version took out: nothing of it is missed.
        assert_eq!(compared(&[1, 2, 3, 23]), None);
        let error = compare(&BTreeSet::from([99]), &BTreeSet::from([23])).unwrap_err();
        assert!(error.message.contains("(99 > 23)"), "{}", error.message);
    }
}
