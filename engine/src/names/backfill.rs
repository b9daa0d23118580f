//! Gives rows that were written before there were keys theirs. SQL cannot fold names as [`super::key`] does, so the migration gives
//! such rows an [`super::exact_key`], and this replaces it. Until then such a name is found where it is spelled exactly so.

use sqlx::AssertSqlSafe;

use super::key;
use crate::{assemblies, db, error::Result};

/// Rows updated in one statement.
const BATCH: i64 = 1000;

/// A column of names.
struct Column {
    table: &'static str,
    id: &'static str,
    name: &'static str,
    key: &'static str,
}

/// Names of which there is one each.
const UNIQUE: [Column; 4] = [
    Column { table: "users", id: "id", name: "username", key: "username_key" },
    Column { table: "sites", id: "id", name: "name", key: "name_key" },
    Column { table: "credentials", id: "id", name: "name", key: "name_key" },
    Column { table: "directory_providers", id: "id", name: "name", key: "name_key" },
];
/// Names that may repeat.
const REPEATED: [Column; 2] = [
    Column { table: "devices", id: "guid", name: "hostname", key: "hostname_key" },
    Column { table: "device_approvals", id: "id", name: "hostname_claimed", key: "hostname_claimed_key" },
];

/// A name that another row of its table has too, by the rule of today. It keeps its exact key: it is found where it is spelled
/// exactly so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collision {
    /// The table.
    pub table: &'static str,
    /// The row's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The name of the row that has the key.
    pub holder: String,
}

/// Gives every row its key, the oldest row first. Can be interrupted, repeated and run by several processes at once. Answers, and
/// logs, the names that collide; they do not stop the engine.
///
/// # Errors
/// When the database refuses.
pub async fn run(pool: &db::Pool) -> Result<Vec<Collision>> {
    for column in &REPEATED {
        repeated(pool, column).await?;
    }
    assemblies::fold_paths_anew(pool).await?;
    let mut collisions = Vec::new();
    for column in &UNIQUE {
        collisions.extend(unique(pool, column).await?);
    }
    for Collision { table, id, name, holder } in &collisions {
        tracing::warn!(table, id, name, holder, "two names are the same but for case or form; rename or remove one of them");
    }
    Ok(collisions)
}

async fn repeated(pool: &db::Pool, Column { table, id, name, key: column }: &Column) -> Result<()> {
    // Nothing but an exact key sorts before a space.
    let select = format!("SELECT {id}, {name} FROM {table} WHERE {column} < ' ' LIMIT {BATCH}");
    let update = format!(
        "UPDATE {table} AS t SET {column} = n.key FROM unnest($1::uuid[], $2::text[], $3::text[]) AS n (id, name, key)
         WHERE t.{id} = n.id AND t.{name} = n.name"
    );
    loop {
        let rows: Vec<(uuid::Uuid, String)> = sqlx::query_as(AssertSqlSafe(select.clone())).fetch_all(pool).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let keys: Vec<String> = rows.iter().map(|(_, name)| key(name)).collect();
        let (ids, names): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        sqlx::query(AssertSqlSafe(update.clone())).bind(ids).bind(names).bind(keys).execute(pool).await?;
    }
}

async fn unique(pool: &db::Pool, Column { table, id, name, key: column }: &Column) -> Result<Vec<Collision>> {
    let select = format!("SELECT {id}, {name} FROM {table} WHERE {column} < ' ' ORDER BY {id}");
    let update = format!(
        "UPDATE {table} AS t SET {column} = $3 WHERE t.{id} = $1 AND t.{name} = $2
         AND NOT EXISTS (SELECT FROM {table} o WHERE o.{column} = $3)"
    );
    let holder = format!("SELECT {name} FROM {table} WHERE {column} = $1");
    let rows: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(select)).fetch_all(pool).await?;
    let mut collisions = Vec::new();
    for (id, name) in rows {
        let key = key(&name);
        let updated = sqlx::query(AssertSqlSafe(update.clone())).bind(id).bind(&name).bind(&key).execute(pool).await;
        match updated.map(|done| done.rows_affected()) {
            Ok(1..) => continue,
            // Another process has given the key away in this moment.
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {}
            Ok(0) => {}
            Err(error) => return Err(error.into()),
        }
        let holder: Option<String> = sqlx::query_scalar(AssertSqlSafe(holder.clone())).bind(&key).fetch_optional(pool).await?;
        // Without one, the row itself was renamed or removed in this moment.
        collisions.extend(holder.map(|holder| Collision { table, id: id.to_string(), name, holder }));
    }
    Ok(collisions)
}
