//! Targets: from what an operator wrote to devices, when a job is saved and again each time it is carried out.
//!
//! The site of a target is always the device's own, looked up here; what a client says about it is only used to tell
//! namesakes apart.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::spec::{self, TargetInput};
use crate::{
    devices::lookup::{self, Found},
    error::{Error, Kind, Result},
    names,
    scope::Scope,
};

/// A device a job is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedTarget {
    /// The device.
    pub device_guid: Uuid,
    /// Its hostname now.
    pub hostname: String,
    /// Its site now.
    pub site_id: Option<i64>,
}

/// Which hosts a request could not be carried out for, and what the refusal is called where it was made.
#[derive(Debug, Clone, Copy)]
pub struct Refusal {
    /// The 403 of an operator: `out_of_scope_targets`, `out_of_scope_hostnames`.
    pub out_of_scope: &'static str,
    /// The 400 of an administrator: `unknown_target`.
    pub unknown: &'static str,
    /// The member of the error body that names them: `targets`, `hostnames`.
    pub member: &'static str,
}

/// How a job's targets are refused.
pub const JOB_REFUSAL: Refusal = Refusal { out_of_scope: "out_of_scope_targets", unknown: "unknown_target", member: "targets" };
/// How a quick run's hosts are refused.
pub const QUICK_RUN_REFUSAL: Refusal =
    Refusal { out_of_scope: "out_of_scope_hostnames", unknown: "unknown_target", member: "hostnames" };

/// Resolves what an operator wrote, each entry to exactly one device in scope; all or nothing.
async fn find(conn: &mut PgConnection, scope: &Scope, inputs: &[&TargetInput], refusal: Refusal) -> Result<Vec<Found>> {
    let (mut guids, mut names) = (Vec::new(), Vec::new());
    for input in inputs {
        if let TargetInput::Device { guid, hostname, .. } = input {
            guids.extend(guid);
            names.extend(hostname.as_deref().map(names::key));
        }
    }
    let found = lookup::all(conn, scope, &guids, &names).await?;
    let by_guid: HashMap<Uuid, &Found> = found.iter().map(|device| (device.guid, device)).collect();
    let mut by_name: HashMap<&str, Vec<&Found>> = HashMap::new();
    for device in &found {
        by_name.entry(&device.hostname_key).or_default().push(device);
    }
    let (mut devices, mut missing, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    for input in inputs {
        let TargetInput::Device { guid, hostname, site_id } = input else { continue };
        // A GUID names the device; the name beside it is a label.
        let candidates: Vec<&Found> = match (guid, hostname) {
            (Some(guid), _) => by_guid.get(guid).copied().into_iter().collect(),
            (None, Some(name)) => by_name
                .get(names::key(name).as_str())
                .into_iter()
                .flatten()
                .copied()
                .filter(|device| site_id.is_none() || device.site_id == *site_id)
                .collect(),
            (None, None) => Vec::new(),
        };
        match candidates.as_slice() {
            [] => missing.push(hostname.clone().or_else(|| guid.map(crate::keys::guid_text)).unwrap_or_default()),
            [device] => {
                if seen.insert(device.guid) {
                    devices.push((*device).clone());
                }
            }
            several => return Err(lookup::ambiguous(hostname.as_deref().unwrap_or_default(), several.iter().copied())),
        }
    }
    if !missing.is_empty() {
        missing.truncate(lookup::NAMED_MAX);
        let names = missing.join(", ");
        return Err(match scope {
            Scope::All => Error::invalid(refusal.unknown, format!("There is no device {names}.")),
            Scope::Sites(_) => {
                Error::new(Kind::Forbidden, refusal.out_of_scope, format!("Outside your sites, or not a device: {names}."))
            }
        }
        .with(refusal.member, missing));
    }
    Ok(devices)
}

/// Resolves the targets of a job that is saved, and answers their saved form. `scope` is the caller's, and inside the job's
/// own when it has one.
///
/// # Errors
/// 403 `out_of_scope_targets` naming them, 400 `unknown_target` for an administrator, 409 `ambiguous_hostname` with the
/// candidates.
pub async fn to_save(conn: &mut PgConnection, scope: &Scope, inputs: &[TargetInput]) -> Result<Vec<Value>> {
    let mut saved = Vec::new();
    for input in inputs {
        if let TargetInput::AllDevices { name } = input {
            if *scope != Scope::All {
                return Err(Error::new(
                    Kind::Forbidden,
                    JOB_REFUSAL.out_of_scope,
                    "All devices reaches beyond your sites; only an administrator may target it.",
                )
                .with("targets", vec!["all_devices"]));
            }
            if saved.is_empty() {
                saved.push(spec::saved_all_devices(name));
            }
        }
    }
    if matches!(scope, Scope::Sites(sites) if sites.is_empty()) {
        return Err(Error::new(Kind::Forbidden, JOB_REFUSAL.out_of_scope, "You are assigned to no site."));
    }
    let inputs: Vec<&TargetInput> = inputs.iter().collect();
    for device in find(conn, scope, &inputs, JOB_REFUSAL).await? {
        saved.push(json!({
            "kind": "device",
            "device_guid": device.guid,
            "hostname": device.hostname,
            "site_id": device.site_id,
            "site_name": device.site_name,
        }));
    }
    Ok(saved)
}

/// Resolves the hosts of a quick run, in their order and each once.
///
/// # Errors
/// 403 `out_of_scope_hostnames` naming them, 400 `unknown_target` for an administrator, 409 `ambiguous_hostname`.
pub async fn to_run_now(conn: &mut PgConnection, scope: &Scope, hosts: &[TargetInput]) -> Result<Vec<ResolvedTarget>> {
    let hosts: Vec<&TargetInput> = hosts.iter().collect();
    let found = find(conn, scope, &hosts, QUICK_RUN_REFUSAL).await?;
    Ok(found.into_iter().map(|d| ResolvedTarget { device_guid: d.guid, hostname: d.hostname, site_id: d.site_id }).collect())
}

/// The devices a job's saved targets are now, inside `scope`, each once and in the order of their GUIDs. Devices that must
/// not run anything (revoked, quarantined, decommissioned) are left out. A saved device that is gone is looked for under
/// its hostname in its site, as it has a new GUID when it was purged and enrolled again.
///
/// # Errors
/// When the database refuses.
pub async fn resolve(conn: &mut PgConnection, targets: &Value, scope: &Scope) -> Result<Vec<ResolvedTarget>> {
    let saved = Saved::read(targets);
    let rows = sqlx::query!(
        // Three ways to a device, each by its own index: all of them, by GUID, and by name where the GUID is gone.
        r#"SELECT d.guid AS "guid!", d.hostname AS "hostname!", d.site_id FROM (
               SELECT guid, hostname, site_id, status FROM devices WHERE $2
               UNION
               SELECT d.guid, d.hostname, d.site_id, d.status FROM unnest($3::uuid[]) AS t (guid) JOIN devices d ON d.guid = t.guid
               UNION
               SELECT d.guid, d.hostname, d.site_id, d.status FROM unnest($3::uuid[], $4::text[], $5::bigint[]) AS t (guid, hostname, site_id)
               JOIN devices d ON d.hostname_key = t.hostname AND d.site_id = t.site_id
               WHERE NOT EXISTS (SELECT FROM devices known WHERE known.guid = t.guid)
           ) d
           WHERE d.status = 'active' AND ($1::bigint[] IS NULL OR d.site_id = ANY($1))
           ORDER BY 1"#,
        scope.site_ids(),
        saved.all,
        &saved.guids,
        &saved.hostnames,
        &saved.sites,
    )
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ResolvedTarget { device_guid: row.guid, hostname: row.hostname, site_id: row.site_id })
        .collect())
}

/// The saved targets, as columns.
#[derive(Debug, Default)]
struct Saved {
    all: bool,
    guids: Vec<Uuid>,
    hostnames: Vec<String>,
    sites: Vec<i64>,
}

impl Saved {
    fn read(targets: &Value) -> Self {
        let mut saved = Self::default();
        for target in targets.as_array().into_iter().flatten() {
            let text = |key: &str| target.get(key).and_then(Value::as_str).unwrap_or_default();
            match text("kind") {
                "all_devices" => saved.all = true,
                "device" => {
                    if let Ok(guid) = Uuid::parse_str(text("device_guid")) {
                        saved.guids.push(guid);
                        saved.hostnames.push(names::key(text("hostname")));
                        // No site has this id, so a device without one is found by its GUID only.
                        saved.sites.push(target.get("site_id").and_then(Value::as_i64).unwrap_or(-1));
                    }
                }
                _ => {}
            }
        }
        saved
    }
}

/// The sites a job may reach now: those that both its owner and who last changed what it runs may see now, inside those it was saved
/// with. Asked again for every occurrence, so that a removed assignment stops the next one. A job whose owner or last editor is
/// gone reaches nothing, until somebody saves it and so takes it over.
///
/// # Errors
/// 404 when there is no such job.
pub async fn reach(conn: &mut PgConnection, job_id: i64) -> Result<Scope> {
    let row = sqlx::query!(
        r#"SELECT j.scope_site_ids, o.role AS "owner?", e.role AS "editor?",
                  ARRAY(SELECT a.site_id FROM user_site_assignments a WHERE a.user_id = j.owner_user_id ORDER BY 1) AS "owner_sites!",
                  ARRAY(SELECT a.site_id FROM user_site_assignments a WHERE a.user_id = j.editor_user_id ORDER BY 1) AS "editor_sites!"
           FROM scheduled_jobs j
           LEFT JOIN users o ON o.id = j.owner_user_id AND NOT o.directory_disabled
           LEFT JOIN users e ON e.id = j.editor_user_id AND NOT e.directory_disabled
           WHERE j.id = $1"#,
        job_id
    )
    .fetch_optional(conn)
    .await?
    .ok_or_else(Error::not_found)?;
    let scope = |role: Option<&str>, sites: Vec<i64>| match role {
        Some("Admin") => Scope::All,
        Some(_) => Scope::Sites(sites),
        None => Scope::Sites(Vec::new()),
    };
    let owner = scope(row.owner.as_deref(), row.owner_sites);
    let editor = scope(row.editor.as_deref(), row.editor_sites);
    Ok(narrow(&narrow(&owner, editor.site_ids()), row.scope_site_ids.as_deref()))
}

/// `scope` inside `sites`; `None`: no further bound.
#[must_use]
pub fn narrow(scope: &Scope, sites: Option<&[i64]>) -> Scope {
    match (scope, sites) {
        (scope, None) => scope.clone(),
        (Scope::All, Some(sites)) => Scope::Sites(sites.to_vec()),
        (Scope::Sites(own), Some(sites)) => {
            let sites: BTreeSet<_> = sites.iter().collect();
            Scope::Sites(own.iter().copied().filter(|site| sites.contains(site)).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_never_grows() {
        assert_eq!(narrow(&Scope::All, None), Scope::All);
        assert_eq!(narrow(&Scope::All, Some(&[2, 3])), Scope::Sites(vec![2, 3]));
        assert_eq!(narrow(&Scope::Sites(vec![1, 2]), Some(&[2, 3])), Scope::Sites(vec![2]));
        assert_eq!(narrow(&Scope::Sites(vec![1]), Some(&[])), Scope::Sites(vec![]));
        assert_eq!(narrow(&Scope::Sites(vec![1]), None), Scope::Sites(vec![1]));
    }
}
