//! Paths of assemblies: labels that clients show and may send in place of an id.
//!
//! A path is resolved to an assembly's guid once, when a request names it, and never kept as a reference. No two assemblies have the
//! same path; a request whose path would also fit another assembly by its name is refused instead of guessed. The path of an assembly
//! that was removed while jobs name it is given to no other until none does.

use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::{
    db::Pool,
    error::{Error, Kind, Result},
    names,
    scope::Scope,
};

/// The most candidates or jobs that a refusal names.
const NAMED_MAX: usize = 50;
/// The folder of scripts; it may be left out of a path in a request.
const SCRIPTS: &str = "Scripts/";
/// Holds while paths and guids are given away, so that what was looked up is still so when it is written.
const CATALOGUE_LOCK: i64 = 7_302;

/// How a request names an assembly: by its guid, else by its path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reference {
    /// The guid.
    pub assembly_guid: Option<String>,
    /// The path; not looked at beside a guid.
    pub path: Option<String>,
}

/// The path an assembly would have were it alone: `source_path`, else `<Scripts|Workflows|Ansible_Playbooks>/<name>`, where ASCII
/// characters of the name that are no letter, digit, dot, hyphen or underscore are `_`. Other letters stay as they are.
pub(super) fn base(assembly_type: &str, display_name: &str, source_path: Option<&str>) -> String {
    if let Some(path) = source_path.filter(|path| !path.is_empty()) {
        return path.to_owned();
    }
    let folder = match assembly_type {
        "workflow" => "Workflows/",
        "ansible" => "Ansible_Playbooks/",
        _ => SCRIPTS,
    };
    let safe = |c: char| if !c.is_ascii() || c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' };
    format!("{folder}{}", display_name.chars().map(safe).collect::<String>())
}

/// A path as it is compared: as names are, with `/`, without one in front.
pub(super) fn key(path: &str) -> String {
    names::key(path.trim()).replace('\\', "/").trim_start_matches('/').to_owned()
}

/// Computes again the keys of paths that were computed in SQL, which folds letters as the locale of the database does. Where another
/// assembly has the key already, the path gets the guid behind it, as that of a new assembly would. Can be repeated.
///
/// # Errors
/// When the database refuses.
pub(crate) async fn fold_anew(pool: &Pool) -> Result<()> {
    let mut tx = pool.begin().await?;
    lock(&mut tx).await?;
    let rows = sqlx::query!(
        "SELECT guid, assembly_type, display_name, source_path, path, path_key, base_key FROM assemblies
         WHERE octet_length(path || path_key || base_key) > length(path || path_key || base_key) ORDER BY created_at, guid"
    )
    .fetch_all(&mut *tx)
    .await?;
    for row in rows {
        let base_key = key(&base(&row.assembly_type, &row.display_name, row.source_path.as_deref()));
        let mut path = row.path;
        if key(&path) == row.path_key && base_key == row.base_key {
            continue;
        }
        if taken(&mut tx, &row.guid, &key(&path)).await? {
            path = format!("{path}~{}", row.guid);
        }
        sqlx::query!(
            "UPDATE assemblies SET path = $2, path_key = $3, base_key = $4 WHERE guid = $1",
            row.guid,
            path,
            key(&path),
            base_key
        )
        .execute(&mut *tx)
        .await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The path given to an assembly.
#[derive(Debug)]
pub(super) struct Path {
    pub path: String,
    pub key: String,
    pub base_key: String,
}

/// Waits until nobody else gives guids and paths away, and has others wait until the end of the transaction.
pub(super) async fn lock(conn: &mut PgConnection) -> Result<()> {
    sqlx::query!("SELECT pg_advisory_xact_lock($1)", CATALOGUE_LOCK).fetch_one(conn).await?;
    Ok(())
}

/// Finds the path for an assembly whose base path is `base`, under [`lock`]. A name that another assembly has already gets the guid
/// behind it; a source path is somebody's word and is refused instead.
///
/// # Errors
/// 409 `assembly_path_taken`, `assembly_reserved` with those of the `jobs` the caller may see.
pub(super) async fn assign(conn: &mut PgConnection, scope: &Scope, guid: &str, base: String, named: bool) -> Result<Path> {
    let base_key = key(&base);
    reserved(&mut *conn, scope, guid, &base_key).await?;
    if !taken(&mut *conn, guid, &base_key).await? {
        return Ok(Path { path: base, key: base_key.clone(), base_key });
    }
    let path = format!("{base}~{guid}");
    let unique = key(&path);
    if named || taken(&mut *conn, guid, &unique).await? {
        return Err(Error::conflict("assembly_path_taken", format!("Another assembly has the path {base}.")));
    }
    Ok(Path { path, key: unique, base_key })
}

async fn taken(conn: &mut PgConnection, guid: &str, key: &str) -> Result<bool> {
    Ok(sqlx::query_scalar!(r#"SELECT EXISTS (SELECT FROM assemblies WHERE path_key = $1 AND guid <> $2) AS "taken!""#, key, guid)
        .fetch_one(conn)
        .await?)
}

/// A job that names an assembly.
#[derive(Debug)]
pub(super) struct UsingJob {
    pub id: i64,
    pub name: String,
    /// Whether the caller may see it.
    pub visible: bool,
}

/// The jobs that name an assembly.
pub(super) async fn jobs_using(conn: &mut PgConnection, scope: &Scope, guid: &str) -> Result<Vec<UsingJob>> {
    Ok(sqlx::query_as!(
        UsingJob,
        r#"SELECT j.id, j.name, ($2::bigint[] IS NULL OR job_site_ids(j.targets) <@ $2) IS TRUE AS "visible!"
           FROM scheduled_jobs j WHERE j.components @> $1 ORDER BY j.id"#,
        json!([{"assembly_guid": guid}]),
        scope.site_ids(),
    )
    .fetch_all(conn)
    .await?)
}

/// Those of the jobs that a refusal may name.
pub(super) fn visible(jobs: &[UsingJob]) -> Vec<Value> {
    jobs.iter().filter(|job| job.visible).take(NAMED_MAX).map(|job| json!({"id": job.id, "name": job.name})).collect()
}

/// Refuses what jobs still name although there is no such assembly.
pub(super) fn refuse_reserved(jobs: &[UsingJob], what: &str) -> Result<()> {
    if jobs.is_empty() {
        return Ok(());
    }
    let why = format!("Scheduled jobs still name a removed assembly that had this {what}; change or remove these jobs first.");
    Err(Error::conflict("assembly_reserved", why).with("jobs", visible(jobs)))
}

/// Refuses a path that a removed assembly had while jobs name that assembly, or that a job names which could not be resolved.
async fn reserved(conn: &mut PgConnection, scope: &Scope, guid: &str, base_key: &str) -> Result<()> {
    let jobs = sqlx::query_as!(
        UsingJob,
        r#"SELECT j.id, j.name, ($3::bigint[] IS NULL OR job_site_ids(j.targets) <@ $3) IS TRUE AS "visible!"
           FROM scheduled_jobs j
           WHERE j.id IN (
               SELECT n.id FROM assembly_reservations r
               JOIN scheduled_jobs n ON n.components @> jsonb_build_array(jsonb_build_object('assembly_guid', r.guid))
               WHERE (r.path_key = $1 OR r.base_key = $1) AND r.guid <> $2
               UNION ALL
               SELECT n.id FROM scheduled_jobs n, jsonb_array_elements(n.components) c
               WHERE n.components @? '$[*] ? (!exists(@.assembly_guid))' AND NOT c ? 'assembly_guid'
                 AND $1 IN (assembly_path_key(c ->> 'path'), 'scripts/' || assembly_path_key(c ->> 'path')))
           ORDER BY j.id"#,
        base_key,
        guid,
        scope.site_ids(),
    )
    .fetch_all(conn)
    .await?;
    refuse_reserved(&jobs, "path")
}

/// Keeps the path of an assembly that is removed while jobs name it.
pub(super) async fn reserve(conn: &mut PgConnection, guid: &str) -> Result<()> {
    sqlx::query!(
        "INSERT INTO assembly_reservations (guid, path_key, base_key) SELECT guid, path_key, base_key FROM assemblies WHERE guid = $1
         ON CONFLICT (guid) DO UPDATE SET path_key = excluded.path_key, base_key = excluded.base_key, created_at = now()",
        guid
    )
    .execute(conn)
    .await?;
    Ok(())
}

/// The guid of the script that a request names. It can be neither changed nor removed before the transaction ends.
///
/// # Errors
/// 404 `script_not_found`; 400 `unsupported_script_type`; 409 `ambiguous_assembly` with the `candidates`.
pub async fn resolve(conn: &mut PgConnection, reference: &Reference) -> Result<String> {
    let absent = || Error::new(Kind::NotFound, "script_not_found", "Script not found: there is no such assembly.");
    if let Some(guid) = &reference.assembly_guid {
        let guid = guid.trim().to_lowercase();
        let row = sqlx::query!("SELECT assembly_type FROM assemblies WHERE guid = $1 FOR KEY SHARE", guid)
            .fetch_optional(conn)
            .await?
            .ok_or_else(absent)?;
        if row.assembly_type != "script" {
            return Err(Error::invalid("unsupported_script_type", "The assembly is not a script."));
        }
        return Ok(guid);
    }
    let path = reference.path.as_deref().unwrap_or_default();
    let written = key(path);
    let keys = [format!("{}{written}", key(SCRIPTS)), written];
    let mut found = sqlx::query!(
        "SELECT guid, display_name, path FROM assemblies
         WHERE assembly_type = 'script' AND (path_key = ANY($1) OR base_key = ANY($1)) ORDER BY guid LIMIT $2 FOR KEY SHARE",
        &keys,
        i64::try_from(NAMED_MAX).unwrap_or(i64::MAX),
    )
    .fetch_all(conn)
    .await?;
    match (found.pop(), found.len()) {
        (None, _) => Err(absent()),
        (Some(one), 0) => Ok(one.guid),
        (Some(last), _) => {
            found.push(last);
            let candidates: Vec<Value> = found
                .iter()
                .map(|one| json!({"assembly_guid": one.guid, "display_name": one.display_name, "path": one.path}))
                .collect();
            let why = format!("Several assemblies fit the path {path}; name one by its assembly_guid.");
            Err(Error::conflict("ambiguous_assembly", why).with("path", path).with("candidates", candidates))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_path_has_safe_letters_and_keeps_those_of_every_script() {
        assert_eq!(base("script", "Say hi/../x", None), "Scripts/Say_hi_.._x");
        assert_eq!(base("script", "x", Some("Scripts/a.json")), "Scripts/a.json");
        let cities = ["東京", "大阪", "保存"].map(|name| base("script", name, None));
        assert_eq!(cities, ["Scripts/東京", "Scripts/大阪", "Scripts/保存"]);
    }

    #[test]
    fn paths_are_compared_without_case_and_composition() {
        assert_eq!(key(" \\Scripts\\Mu\u{308}ll "), "scripts/müll");
        assert_eq!(key("Scripts/MÜLL"), "scripts/müll");
    }
}
