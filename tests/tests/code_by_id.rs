//! Code is named by id: whatever operators of other sites do to assemblies, a job runs the script it was made for or nothing; and a
//! job reaches no further than those who decided what it runs.

use std::sync::OnceLock;

use borealis_engine::{
    Actor as Who, Caller, Kind, Scope,
    assemblies::{self, AssemblyBody},
    db::{self, Pool},
    jobs::{
        occurrence::{self, Requested},
        spec::JobBody,
        store,
    },
    quotas::Quotas,
};
use borealis_tests::{Actor, Device, TestDatabase, TestEngine, probe::NoAgents};
use borealis_workflows::{Services, housekeeping};
use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

fn document(text: &str) -> Value {
    json!({"type": "bash", "script": text})
}

async fn make(actor: &Actor, name: &str, text: &str) -> Value {
    let body = json!({"domain": "user", "display_name": name, "payload": document(text)});
    actor.post("/api/assemblies", body).await.expect(201).body
}

fn job(component: Value, device: &Device) -> Value {
    let later = json!({"type": "once", "start": "2090-01-01T00:00:00Z"});
    json!({"name": "A job", "components": [component], "targets": [device.guid], "schedule": later})
}

async fn schedule(actor: &Actor, component: Value, device: &Device) -> Value {
    actor.post("/api/scheduled_jobs", job(component, device)).await.ok()["job"].clone()
}

fn at(job: &Value, rest: &str) -> String {
    format!("/api/scheduled_jobs/{}{rest}", job["id"])
}

/// Runs a job, and answers the hash of what was prepared for its device, or why there is nothing.
async fn dispatched(pool: &Pool, job: i64) -> Result<String, String> {
    let mut conn = pool.acquire().await.expect("a connection");
    let new = Requested {
        job_id: job,
        at: store::now(&mut conn).await.expect("a clock"),
        cause: "rerun",
        scope_site_ids: None,
        only_devices: None,
        requested_by: "test".into(),
    };
    let occurrence = occurrence::open(&mut conn, &new).await.expect("an occurrence");
    drop(conn);
    let scripts = occurrence::scripts(pool, occurrence).await.expect("scripts");
    let mut tx = pool.begin().await.expect("a transaction");
    occurrence::freeze(&mut tx, occurrence).await.expect("frozen targets");
    assert!(occurrence::prepare(&mut tx, occurrence, &scripts).await.expect("prepared"), "nobody changes it meanwhile");
    let run = "SELECT a.content_hash, coalesce(r.error, r.skip_reason, '') FROM scheduled_job_runs r
               LEFT JOIN activity_history a ON a.run_id = r.id AND r.status = 'Pending' WHERE r.occurrence_id = $1";
    let (hash, error): (Option<String>, String) =
        sqlx::query_as(run).bind(occurrence).fetch_one(&mut *tx).await.expect("one run");
    tx.rollback().await.expect("a rollback");
    sqlx::query("DELETE FROM job_occurrences WHERE id = $1").bind(occurrence).execute(pool).await.expect("no occurrence");
    hash.ok_or(error)
}

#[tokio::test]
async fn an_operator_of_another_site_puts_no_script_where_a_job_runs() {
    let engine = TestEngine::start().await;
    let ((north, _), (south, _)) = (engine.site("north").await, engine.site("south").await);
    let there = engine.device(south).await;
    let (operator, admin) = (engine.operator(&[north]).await, engine.admin().await);
    let pool = &engine.database.pool;
    let wanted = make(&admin, "Disk space", "df -h").await;
    let made = schedule(&admin, json!({"path": "Scripts/Disk_space"}), &there).await;
    let id = made["id"].as_i64().expect("an id");
    assert_eq!(made["components"][0]["assembly_guid"], wanted["assembly_guid"], "a path is resolved when the job is saved");
    assert!(made["components"][0].get("path").is_none(), "and not kept: {made}");
    let hash = wanted["content_hash"].as_str().expect("a hash").to_owned();
    assert_eq!(dispatched(pool, id).await.as_ref(), Ok(&hash));

    // The same name, made or changed to.
    let twin = make(&operator, "Disk space", "rm -rf /").await;
    assert_ne!(twin["path"], wanted["path"]);
    let other = make(&operator, "Other", "rm -rf /").await;
    let own = format!("/api/assemblies/{}", other["assembly_guid"].as_str().expect("a guid"));
    let _ = operator.put(&own, json!({"display_name": "Disk_space"})).await.ok();
    let _ = operator.put(&own, json!({"source_path": "scripts\\DISK_space"})).await.error(409, "assembly_path_taken");
    assert_eq!(dispatched(pool, id).await.as_ref(), Ok(&hash));
    // From now on the path says nothing any more, and is not guessed.
    for path in ["Scripts/Disk_space", "disk_space"] {
        let refused =
            admin.post("/api/scheduled_jobs", job(json!({"path": path}), &there)).await.error(409, "ambiguous_assembly");
        assert_eq!(refused.body["candidates"].as_array().map(Vec::len), Some(3), "{}", refused.text);
        let quick = json!({"hostnames": [there.guid], "script_path": path});
        let _ = admin.post("/api/scripts/quick_run", quick).await.error(409, "ambiguous_assembly");
    }
    let exact = schedule(&admin, json!({"path": twin["path"]}), &there).await;
    assert_eq!(exact["components"][0]["assembly_guid"], twin["assembly_guid"], "its own path is one");
    let _ = admin.delete(&at(&exact, "")).await.ok();

    // The same guid, after it is gone.
    let guid = wanted["assembly_guid"].as_str().expect("a guid").to_owned();
    for own in [&twin, &other] {
        let _ = operator.delete(&format!("/api/assemblies/{}", own["assembly_guid"].as_str().expect("a guid"))).await.expect(202);
    }
    let _ = admin.delete(&format!("/api/assemblies/{guid}?force=true")).await.expect(202);
    let again = |name: &str, chosen: Option<&str>| json!({"domain": "user", "display_name": name, "assembly_guid": chosen, "payload": document("rm -rf /")});
    let _ = operator.post("/api/assemblies", again("Mine", Some(&guid))).await.error(403, "assembly_guid_forbidden");
    let _ = operator.post("/api/assemblies", again("Mine", Some("any-other"))).await.error(403, "assembly_guid_forbidden");
    let refused = operator.post("/api/assemblies", again("disk SPACE", None)).await.error(409, "assembly_reserved");
    assert_eq!(refused.body["jobs"], json!([]), "jobs of other sites are not named");
    let mut by_path = again("Mine", None);
    by_path["source_path"] = json!("Scripts/Disk_space");
    let _ = operator.post("/api/assemblies", by_path).await.error(409, "assembly_reserved");
    for (name, chosen) in [("Mine", Some(guid.as_str())), ("Disk space", None)] {
        let refused = admin.post("/api/assemblies", again(name, chosen)).await.error(409, "assembly_reserved");
        assert_eq!(refused.body["jobs"], json!([{"id": made["id"], "name": "A job"}]));
    }
    let error = dispatched(pool, id).await.expect_err("nothing");
    assert!(error.starts_with("script_not_found"), "{error}");
    assert_eq!(admin.get(&at(&made, "")).await.ok()["job"]["warning_code"], "assembly_missing");
    // With the last job that names it, the name is free.
    let _ = admin.delete(&at(&made, "")).await.ok();
    let _ = operator.post("/api/assemblies", again("Disk space", None)).await.expect(201);
    let _ = admin.post("/api/assemblies", again("Restored", Some(&guid))).await.expect(201);
    let _ = admin.post("/api/assemblies", again("Restored", Some(&guid))).await.error(409, "assembly_exists");
}

#[tokio::test]
async fn every_assembly_has_a_path_of_its_own() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let operator = engine.operator(&[site]).await;
    let mut made = Vec::new();
    for name in ["東京", "大阪", "保存", "a b", "a_b", "A.b", "a/b"] {
        made.push(make(&operator, name, &format!("echo {name}")).await);
    }
    let mut paths: Vec<String> = made.iter().map(|one| one["path"].as_str().expect("a path").to_lowercase()).collect();
    assert_eq!(paths[..3], ["scripts/東京", "scripts/大阪", "scripts/保存"]);
    for one in &made {
        assert_eq!(one["path"], one["virtual_path"]);
        let component = json!({"path": one["path"], "description": "Says where", "domain": "user", "domainLabel": "User"});
        let reply = operator.post("/api/scheduled_jobs", job(component, &device)).await;
        if one["path"] == "Scripts/a_b" {
            let _ = reply.error(409, "ambiguous_assembly");
            continue;
        }
        let component = reply.ok()["job"]["components"][0].clone();
        assert_eq!(component["assembly_guid"], one["assembly_guid"]);
        let kept = ["description", "domain", "domainLabel"].map(|key| component[key].clone());
        assert_eq!(kept, ["Says where", "user", "User"], "what clients of the reference send is kept for them");
    }
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), made.len());
    let unknown = job(json!({"path": "Scripts/__"}), &device);
    let refused = operator.post("/api/scheduled_jobs", unknown).await.error(400, "unknown_assembly");
    assert!(refused.body["fields"]["components[0].path"].is_string(), "{}", refused.text);
    // A new name is a new path; the old one is free.
    let guid = made[0]["assembly_guid"].as_str().expect("a guid");
    let renamed = operator.put(&format!("/api/assemblies/{guid}"), json!({"display_name": "Tokyo"})).await.ok();
    assert_eq!(renamed["path"], "Scripts/Tokyo");
    assert_eq!(make(&operator, "東京", "echo").await["path"], "Scripts/東京");
}

#[tokio::test]
async fn a_job_reaches_what_both_its_owner_and_its_last_editor_may_reach() {
    let engine = TestEngine::start().await;
    let ((north, _), (south, _)) = (engine.site("north").await, engine.site("south").await);
    let device = engine.device(north).await;
    let (operator, admin) = (engine.operator(&[north]).await, engine.admin().await);
    let pool = &engine.database.pool;
    let (good, bad) = (make(&admin, "Good", "df").await, make(&operator, "Bad", "rm -rf /").await);
    let component = |one: &Value, who: &str| json!({"assembly_guid": one["assembly_guid"], "variable_values": {"who": who}});
    let hash = |one: &Value| Ok(one["content_hash"].as_str().expect("a hash").to_owned());
    let made = schedule(&admin, component(&good, "a"), &device).await;
    let id = made["id"].as_i64().expect("an id");
    let move_to = |site: i64| {
        let sql = "UPDATE devices SET site_id = $1 WHERE guid = $2::uuid";
        sqlx::query(sql).bind(site).bind(device.guid.clone()).execute(pool)
    };
    let nothing = Err("no_devices_targeted".to_owned());

    // A name and a schedule are no code, and what is said again unchanged changes nothing.
    let _ = operator.put(&at(&made, ""), json!({"name": "Renamed", "components": [component(&good, "a")]})).await.ok();
    let _ = move_to(south).await.expect("a move");
    assert_eq!(dispatched(pool, id).await, hash(&good));
    for change in [
        json!({"components": [component(&bad, "a")]}),
        json!({"components": [component(&good, "b")]}),
        json!({"execution_context": "current_user"}),
    ] {
        let _ = move_to(north).await.expect("a move");
        let _ = operator.put(&at(&made, ""), change.clone()).await.ok();
        assert!(dispatched(pool, id).await.is_ok(), "{change}");
        let _ = move_to(south).await.expect("a move");
        assert_eq!(dispatched(pool, id).await, nothing, "{change}");
        // An administrator who saves what it runs answers for it.
        let _ =
            admin.put(&at(&made, ""), json!({"components": [component(&good, "a")], "execution_context": "system"})).await.ok();
        assert_eq!(dispatched(pool, id).await, hash(&good), "{change}");
    }
    // An editor who is gone answers for nothing.
    let _ = move_to(north).await.expect("a move");
    let _ = operator.put(&at(&made, ""), json!({"components": [component(&bad, "a")]})).await.ok();
    sqlx::query("DELETE FROM users WHERE username = $1").bind(&operator.name).execute(pool).await.expect("no user");
    assert_eq!(dispatched(pool, id).await, nothing);
    let _ = admin.put(&at(&made, ""), json!({"name": "Taken over"})).await.ok();
    assert_eq!(dispatched(pool, id).await, hash(&bad));
}

#[tokio::test]
async fn nobody_stores_more_than_their_quota() {
    let quotas = Quotas { jobs: 2, job_bytes: 20_000, assemblies: 3, assembly_bytes: 100_000 };
    let engine = TestEngine::with(|settings| settings.quotas = quotas).await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let (operator, other) = (engine.operator(&[site]).await, engine.operator(&[site]).await);
    let told = |reply: borealis_tests::Reply| {
        let refused = reply.error(409, "quota_exceeded");
        (refused.body["quota"].clone(), refused.body["used"].as_i64().expect("a number"), refused.body["limit"].clone())
    };
    let body = |size: usize| json!({"domain": "user", "payload": document(&"é".repeat(size / 2))});
    let one = operator.post("/api/assemblies", body(40_000)).await.expect(201).body;
    let (quota, used, limit) = told(operator.post("/api/assemblies", body(70_000)).await);
    assert_eq!((quota, limit), (json!("assembly_bytes"), json!(100_000)));
    assert!((110_000..120_000).contains(&used), "{used}");
    let guid = one["assembly_guid"].as_str().expect("a guid");
    let own = format!("/api/assemblies/{guid}");
    let grown = json!({"payload": document(&"x".repeat(120_000))});
    assert_eq!(told(operator.put(&own, grown.clone()).await).0, "assembly_bytes");
    assert_eq!(told(other.put(&own, grown).await).0, "assembly_bytes", "it counts for its owner");
    for _ in 0..2 {
        let _ = make(&operator, "Small", "id").await;
    }
    let body = json!({"domain": "user", "payload": document("id")});
    assert_eq!(told(operator.post("/api/assemblies", body.clone()).await), (json!("assemblies"), 4, json!(3)));
    let _ = other.post("/api/assemblies", body.clone()).await.expect(201);
    let _ = operator.delete(&own).await.expect(202);
    let _ = operator.post("/api/assemblies", body).await.expect(201);

    let small = make(&other, "Job", "id").await["assembly_guid"].clone();
    let _ = schedule(&other, json!({"assembly_guid": small}), &device).await;
    let noise = || (0..30).map(|_| Uuid::new_v4().to_string()).collect::<String>();
    let values: serde_json::Map<String, Value> = (0..200).map(|n| (format!("v{n}"), json!(noise()))).collect();
    let large = json!({"assembly_guid": small, "variable_values": values});
    assert_eq!(told(other.post("/api/scheduled_jobs", job(large, &device)).await).0, "job_bytes");
    let _ = schedule(&other, json!({"assembly_guid": small}), &device).await;
    let third = other.post("/api/scheduled_jobs", job(json!({"assembly_guid": small}), &device)).await;
    assert_eq!(told(third), (json!("jobs"), 3, json!(2)));
}

#[tokio::test]
async fn the_script_of_a_quick_run_is_stored_once() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let devices = [engine.device(site).await, engine.device(site).await, engine.device(site).await];
    let operator = engine.operator(&[site]).await;
    let made = make(&operator, "Large", &"echo hi\n".repeat(100_000)).await;
    let hosts: Vec<&str> = devices.iter().map(|device| device.hostname.as_str()).collect();
    let body = json!({"hostnames": hosts, "assembly_guid": made["assembly_guid"]});
    let _ = operator.post("/api/scripts/quick_run", body).await.ok();
    let stored: (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM quick_run_scripts WHERE bytes > 1000000 AND request ? 'script_content'), count(*),
                max(octet_length(request::text))::bigint FROM activity_history",
    )
    .fetch_one(&engine.database.pool)
    .await
    .expect("the rows");
    assert_eq!((stored.0, stored.1), (1, 3));
    assert!(stored.2 < 2_000, "{} bytes for each device", stored.2);
    // It goes with the last of its activities.
    let pool = &engine.database.pool;
    let services = Services { pool: pool.clone(), agents: std::sync::Arc::new(NoAgents) };
    for left in [1_i64, 0] {
        sqlx::query("UPDATE quick_run_scripts SET created_at = now() - interval '1 day'").execute(pool).await.expect("age");
        let _ = housekeeping::sweep(&services, 30).await.expect("a sweep");
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM quick_run_scripts").fetch_one(pool).await.expect("a count");
        assert_eq!(count, left);
        sqlx::query("DELETE FROM activity_history").execute(pool).await.expect("no activities");
    }
}

#[tokio::test]
async fn jobs_that_named_a_path_are_bound_to_what_it_meant_or_reported() {
    let database = TestDatabase::before(24).await;
    let pool = &database.pool;
    for (guid, name, source) in [
        ("one", "Disk space", None),
        ("t1", "東京", None),
        ("t2", "大阪", None),
        ("moved", "Moved", Some("Scripts/Own/Place.json")),
    ] {
        sqlx::query(
            "INSERT INTO assemblies (guid, domain, display_name, assembly_type, assembly_subtype, payload, content_hash, source_path)
             VALUES ($1, 'user', $2, 'script', 'bash', '{\"script\": \"id\"}', $1, $3)",
        )
        .bind(guid)
        .bind(name)
        .bind(source)
        .execute(pool)
        .await
        .expect("an assembly");
    }
    let users = "INSERT INTO users (username, role) VALUES ('root', 'Admin'), ('op', 'User') RETURNING id";
    let users: Vec<i64> = sqlx::query_scalar(users).fetch_all(pool).await.expect("users");
    let jobs = [
        json!([{"kind": "script", "path": "\\disk_SPACE", "name": "x"}]),
        json!([{"kind": "script", "path": "Scripts/__"}]),
        json!([{"kind": "script", "path": "Scripts/Nowhere"}]),
        json!([{"kind": "script", "assembly_guid": "moved", "path": "Scripts/Disk_space"}, {"kind": "script", "path": "own/place.json"}]),
    ];
    let mut ids = Vec::new();
    for components in &jobs {
        let insert = "INSERT INTO scheduled_jobs (name, components, targets, schedule_type, owner_user_id)
                      VALUES ('Old', $1, '[{\"kind\": \"all_devices\"}]', 'immediately', $2) RETURNING id";
        let id: i64 = sqlx::query_scalar(insert).bind(components).bind(users[0]).fetch_one(pool).await.expect("a job");
        ids.push(id);
    }
    sqlx::query(
        "INSERT INTO audit_events (actor_kind, actor_id, action, object_kind, object_id, outcome)
         VALUES ('operator', $1, 'scheduled_job.update', 'scheduled_job', $2, 'success')",
    )
    .bind(users[1].to_string())
    .bind(ids[3].to_string())
    .execute(pool)
    .await
    .expect("an event");

    db::migrate(pool).await.expect("a migration");
    let bound = |index: usize| {
        let id = ids[index];
        async move {
            sqlx::query_as::<_, (Value, Option<i64>)>("SELECT components, editor_user_id FROM scheduled_jobs WHERE id = $1")
                .bind(id)
                .fetch_one(pool)
                .await
                .expect("the job")
        }
    };
    assert_eq!(bound(0).await, (json!([{"kind": "script", "assembly_guid": "one", "name": "x"}]), Some(users[0])));
    assert_eq!(bound(1).await.0, jobs[1], "two fit");
    assert_eq!(bound(2).await.0, jobs[2], "none fits");
    let both = json!([{"kind": "script", "assembly_guid": "moved"}, {"kind": "script", "assembly_guid": "moved"}]);
    assert_eq!(bound(3).await, (both, Some(users[1])), "the last to save it answers for it");
    let paths: Vec<String> =
        sqlx::query_scalar("SELECT path FROM assemblies ORDER BY guid").fetch_all(pool).await.expect("paths");
    assert_eq!(paths, ["Scripts/Own/Place.json", "Scripts/Disk_space", "Scripts/東京", "Scripts/大阪"]);

    // Told to administrators: in the audit, and on the job.
    let events: Vec<(String, String, Value)> = sqlx::query_as(
        "SELECT object_id, action, detail -> 'candidates' FROM audit_events WHERE action LIKE 'scheduled_job.assembly%' ORDER BY id",
    )
    .fetch_all(pool)
    .await
    .expect("events");
    let event = |index: usize, what: &str, fit: Value| (ids[index].to_string(), format!("scheduled_job.assembly_{what}"), fit);
    assert_eq!(
        events,
        [
            event(0, "resolved", json!(["one"])),
            event(1, "unresolved", json!(["t1", "t2"])),
            event(2, "unresolved", json!([])),
            event(3, "resolved", json!(["moved"])),
        ]
    );
    let site: i64 =
        sqlx::query_scalar("INSERT INTO sites (name, name_key, enrollment_code) VALUES ('north', 'north', 'N') RETURNING id")
            .fetch_one(pool)
            .await
            .expect("a site");
    device(pool, site).await;
    assert_eq!(dispatched(pool, ids[0]).await, Ok("one".to_owned()));
    for id in [ids[1], ids[2]] {
        let error = dispatched(pool, id).await.expect_err("nothing");
        assert!(error.starts_with("assembly_unresolved: "), "{error}");
        let shown = borealis_engine::jobs::view::job(&mut pool.acquire().await.expect("a connection"), &Scope::All, id).await;
        assert_eq!(shown.expect("the job").warning_code, "assembly_unresolved");
    }
    // What an unresolved job names stays free of others.
    let actor = Who { name: "op".into(), ..Who::default() };
    let scope = Scope::Sites(vec![site]);
    let caller = Caller { user_id: users[1], scope: &scope, actor: &actor, quotas: &Quotas::default() };
    let body = AssemblyBody {
        domain: Some("user".into()),
        display_name: Some("nowhere".into()),
        payload: Some(document("id")),
        ..AssemblyBody::default()
    };
    let refused = assemblies::create(pool, caller, body).await.expect_err("a refusal");
    assert_eq!(refused.code, "assembly_reserved");
}

async fn device(pool: &Pool, site: i64) -> Uuid {
    let guid = Uuid::new_v4();
    let insert = "INSERT INTO devices (guid, hostname, hostname_key, site_id, fingerprint, public_key)
                  VALUES ($1, 'host', 'host', $2, $1::text, '')";
    sqlx::query(insert).bind(guid).bind(site).execute(pool).await.expect("a device");
    guid
}

/// What somebody does to assemblies or, as an administrator, to jobs of the other site.
#[derive(Debug, Clone)]
enum Step {
    /// Operator: make one with this name or source path, and perhaps with the guid of one that is or was there.
    Create { name: usize, path: Option<usize>, guid: Option<usize> },
    /// Operator: change one.
    Change { which: usize, name: Option<usize>, path: Option<usize>, text: Option<u8> },
    /// Operator: remove one.
    Delete { which: usize, force: bool },
    /// Administrator: have a job of the other site run what has this path.
    ScheduleByPath { name: usize },
    /// Administrator: have it run this one.
    Schedule { which: usize },
    /// Administrator: make one.
    AdminCreate { name: usize },
    /// Administrator: remove one that jobs name.
    AdminDelete { which: usize },
}

const NAMES: [&str; 6] = ["Disk space", "Disk_space", "DISK space", "東京", "大阪", "x"];
const PATHS: [&str; 5] = ["Scripts/Disk_space", "scripts\\disk_space", "Scripts/__", "Scripts/東京", "disk_space"];

fn step() -> impl Strategy<Value = Step> {
    let (name, path, which) = (0..NAMES.len(), 0..PATHS.len(), 0..64_usize);
    prop_oneof![
        3 => (name.clone(), proptest::option::weighted(0.3, path.clone()), proptest::option::weighted(0.4, which.clone()))
            .prop_map(|(name, path, guid)| Step::Create { name, path, guid }),
        4 => (which.clone(), proptest::option::of(name.clone()), proptest::option::weighted(0.3, path), proptest::option::of(any::<u8>()))
            .prop_map(|(which, name, path, text)| Step::Change { which, name, path, text }),
        2 => (which.clone(), any::<bool>()).prop_map(|(which, force)| Step::Delete { which, force }),
        2 => name.clone().prop_map(|name| Step::ScheduleByPath { name }),
        1 => which.clone().prop_map(|which| Step::Schedule { which }),
        1 => name.prop_map(|name| Step::AdminCreate { name }),
        1 => which.prop_map(|which| Step::AdminDelete { which }),
    ]
}

/// A database with an administrator, an operator of one site, and a device in another.
struct World {
    database: TestDatabase,
    operator: (i64, Scope),
    admin: (i64, Scope),
    device: Uuid,
    quotas: Quotas,
}

impl World {
    async fn new() -> Self {
        let database = TestDatabase::start().await;
        let pool = &database.pool;
        let ids = "INSERT INTO sites (name, name_key, enrollment_code) VALUES ('north', 'north', 'N'), ('south', 'south', 'S') RETURNING id";
        let sites: Vec<i64> = sqlx::query_scalar(ids).fetch_all(pool).await.expect("sites");
        let ids = "INSERT INTO users (username, username_key, role) VALUES ('root', 'root', 'Admin'), ('op', 'op', 'User') RETURNING id";
        let users: Vec<i64> = sqlx::query_scalar(ids).fetch_all(pool).await.expect("users");
        let device = device(pool, sites[1]).await;
        let quotas = Quotas { jobs: 1_000_000, assemblies: 1_000_000, ..Quotas::default() };
        Self { operator: (users[1], Scope::Sites(vec![sites[0]])), admin: (users[0], Scope::All), device, quotas, database }
    }

    fn caller<'a>(&'a self, (id, scope): &'a (i64, Scope), actor: &'a Who) -> Caller<'a> {
        Caller { user_id: *id, scope, actor, quotas: &self.quotas }
    }

    /// Takes the steps, and compares what each job of the other site runs with what it ran when it was made.
    async fn walk(&self, steps: Vec<Step>) -> Result<(), TestCaseError> {
        let pool = &self.database.pool;
        for table in ["scheduled_jobs", "assemblies", "assembly_reservations"] {
            sqlx::query(sqlx::AssertSqlSafe(format!("DELETE FROM {table}"))).execute(pool).await.expect("an empty table");
        }
        let actor = Who { name: "someone".into(), ..Who::default() };
        let (operator, admin) = (self.caller(&self.operator, &actor), self.caller(&self.admin, &actor));
        let (mut guids, mut jobs): (Vec<String>, Vec<(i64, String)>) = (Vec::new(), Vec::new());
        let body = |name: usize, path: Option<usize>, guid: Option<String>, text: String| AssemblyBody {
            domain: Some("user".into()),
            display_name: Some(NAMES[name].into()),
            source_path: path.map(|path| PATHS[path].into()),
            assembly_guid: guid,
            payload: Some(document(&text)),
            ..AssemblyBody::default()
        };
        for (at, step) in steps.into_iter().enumerate() {
            let known = |which: usize| guids.get(which.checked_rem(guids.len()).unwrap_or(0)).cloned();
            let failed = match step {
                Step::Create { name, path, guid } => {
                    let new = body(name, path, guid.and_then(known), format!("echo operator {at}"));
                    assemblies::create(pool, operator, new).await.map(|made| guids.push(made.item.assembly_guid)).err()
                }
                Step::AdminCreate { name } => {
                    let new = body(name, None, None, format!("echo admin {at}"));
                    assemblies::create(pool, admin, new).await.map(|made| guids.push(made.item.assembly_guid)).err()
                }
                Step::Change { which, name, path, text } => {
                    let Some(guid) = known(which) else { continue };
                    let change = AssemblyBody {
                        display_name: name.map(|name| NAMES[name].into()),
                        source_path: path.map(|path| PATHS[path].into()),
                        payload: text.map(|text| document(&format!("echo changed {text}"))),
                        ..AssemblyBody::default()
                    };
                    assemblies::update(pool, operator, &guid, change, None).await.err()
                }
                Step::Delete { which, force } => {
                    let Some(guid) = known(which) else { continue };
                    delete(pool, operator, &guid, force).await.err()
                }
                Step::AdminDelete { which } => {
                    let Some(guid) = known(which) else { continue };
                    delete(pool, admin, &guid, true).await.err()
                }
                Step::ScheduleByPath { name } => {
                    let path = format!("Scripts/{}", NAMES[name].replace(' ', "_"));
                    self.schedule(admin, json!({"path": path}), &mut jobs).await.err()
                }
                Step::Schedule { which } => {
                    let Some(guid) = known(which) else { continue };
                    self.schedule(admin, json!({"assembly_guid": guid}), &mut jobs).await.err()
                }
            };
            if let Some(error) = failed {
                prop_assert!(error.kind != Kind::Bug, "step {at}: {error:?}");
            }
        }
        for (job, hash) in jobs {
            match dispatched(pool, job).await {
                Ok(now) => prop_assert_eq!(now, hash, "job {}", job),
                // Only the administrator can have removed it.
                Err(error) => prop_assert!(error.starts_with("script_not_found"), "{}", error),
            }
        }
        let twice = "SELECT count(*) FROM (SELECT FROM assemblies GROUP BY path_key HAVING count(*) > 1) t";
        let twice: i64 = sqlx::query_scalar(twice).fetch_one(pool).await.expect("a count");
        prop_assert_eq!(twice, 0);
        Ok(())
    }

    async fn schedule(&self, caller: Caller<'_>, component: Value, jobs: &mut Vec<(i64, String)>) -> borealis_engine::Result<()> {
        let pool = &self.database.pool;
        let body: JobBody = serde_json::from_value(json!({
            "name": "There", "components": [component], "targets": [self.device], "schedule": {"type": "once", "start": "2090-01-01T00:00:00Z"},
        }))?;
        let mut tx = pool.begin().await?;
        let job = store::create(&mut tx, caller, &body).await?;
        tx.commit().await?;
        let hash = dispatched(pool, job).await.expect("what was just named is there");
        jobs.push((job, hash));
        Ok(())
    }
}

async fn delete(pool: &Pool, caller: Caller<'_>, guid: &str, force: bool) -> borealis_engine::Result<()> {
    let mut tx = pool.begin().await?;
    assemblies::delete(&mut tx, caller, guid, force).await?;
    tx.commit().await?;
    Ok(())
}

static RUNTIME: OnceLock<(tokio::runtime::Runtime, World)> = OnceLock::new();

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn no_change_by_an_operator_of_another_site_changes_what_a_job_dispatches(steps in prop::collection::vec(step(), 1..16)) {
        let (runtime, world) = RUNTIME.get_or_init(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
            let world = runtime.block_on(World::new());
            (runtime, world)
        });
        runtime.block_on(world.walk(steps))?;
    }
}
