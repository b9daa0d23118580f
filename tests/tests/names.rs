//! Names mean the same whatever the locale of the database, cannot hide characters, and a device answers to the name that was
//! approved, whatever its agent says.

use std::time::Duration;

use borealis_api::access::Class;
use borealis_engine::{
    db,
    names::{self, backfill},
};
use borealis_protocol::{CONTEXT_SYSTEM, agent_id, events::QuickJobRun};
use borealis_tests::{
    Actor, Device, TestDatabase, TestEngine,
    actor::{Credential, Enrollment, new_key},
    agent::{Socket, open_agent},
    engine::PASSWORD,
    eventually,
};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(10);

async fn assembly(actor: &Actor) -> Value {
    let payload = json!({"type": "bash", "script": "echo hi", "timeout_seconds": 60});
    let body = json!({"domain": "user", "display_name": "Say hi", "payload": payload});
    actor.post("/api/assemblies", body).await.expect(201).body["assembly_guid"].clone()
}

async fn device_at(admin: &Actor, name: &str) -> Value {
    admin.get(&format!("/api/device/details/{name}")).await.ok()["guid"].clone()
}

/// Connects a device whose agent says this hostname, and announces what the reference's agents do: nothing of ours.
async fn connect(engine: &TestEngine, device: &Device, hostname: &str) -> Socket {
    let Credential::Bearer(token) = &device.actor.credential else { panic!("a device has a token") };
    let mut socket = eventually("a socket", LIMIT, || async { open_agent(engine.addr, token).await.ok() }).await;
    let id = agent_id(&device.hostname, &device.guid, CONTEXT_SYSTEM);
    let hello = json!({"agent_id": id, "service_mode": "system", "hostname": hostname, "capabilities": {"runtime": "go"}});
    let answer = socket.call("connect_agent", hello).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    socket
}

async fn audited(engine: &TestEngine, action: &str) -> Vec<Value> {
    let found = engine.admin().await.get(&format!("/api/audit?action={action}")).await.ok();
    found["events"].as_array().unwrap_or_else(|| panic!("no events in {found}")).clone()
}

async fn names_fold_in(database: TestDatabase, locale: &str) {
    let engine = TestEngine::on(database, |_| {}).await;
    let admin = engine.admin().await;
    // The administrator is called admin: ı is no i, and I is no ı, whatever language the database speaks.
    let user = engine.user("User", &[]).await;
    for (name, status) in [("ADMIN", 200), (user.to_uppercase().as_str(), 200), ("admın", 401), ("ADMİN", 401)] {
        let reply = engine.anonymous().post("/api/auth/login", json!({"username": name, "password": PASSWORD})).await;
        assert_eq!(reply.status, status, "{name} in {locale}: {}", reply.text);
    }

    let (site, code) = engine.site("Köln I").await;
    for name in ["KÖLN i", "Ko\u{308}ln I"] {
        let _ = admin.post("/api/sites", json!({"name": name})).await.error(409, "name already exists");
    }
    let made = json!({"username": "Zoë-I", "password": PASSWORD, "role": "User"});
    let _ = admin.post("/api/users", made).await.ok();
    let twin = json!({"username": "ZOË-i", "password": PASSWORD, "role": "User"});
    let _ = admin.post("/api/users", twin).await.error(409, "username already exists");
    let by_name = json!({"usernames": ["zoë-i"], "site_ids": [site]});
    let _ = admin.post("/api/user_site_assignments/assign", by_name).await.ok();

    let script = assembly(&admin).await;
    for (hostname, others) in [
        ("HOST-I", ["host-i", "Host-I"]),
        ("MÜLLER-x", ["müller-X", "MU\u{308}LLER-X"]),
        ("MÜNCHEN-PC", ["münchen-pc", "München-PC"]),
    ] {
        let device = engine.device_named(site, hostname).await;
        for name in others {
            assert_eq!(device_at(&admin, name).await, device.guid, "{name} in {locale}");
            let job = json!({
                "name": format!("for {name}"), "components": [{"kind": "script", "assembly_guid": script}],
                "targets": [name], "schedule": {"type": "daily", "start": "2030-01-01T03:00:00Z"},
            });
            let made = admin.post("/api/scheduled_jobs", job).await.ok();
            let target = made["job"]["targets"][0]["device_guid"].as_str().map(str::to_uppercase);
            assert_eq!(target.as_deref(), Some(device.guid.as_str()), "{name} in {locale}: {made}");
            let run = json!({"hostnames": [name], "assembly_guid": script});
            let _ = admin.post("/api/scripts/quick_run", run).await.ok();
        }
        // A namesake with another key is one in any case.
        let pending = Enrollment::request(&engine.anonymous(), others[0], &code, new_key()).await;
        let approval = engine.approval(pending.reference()).await;
        let path = format!("/api/admin/device-approvals/{approval}/approve");
        let _ = admin.post(&path, json!({})).await.error(409, "conflict_resolution_required");
    }
    let found = admin.get("/api/devices/search?hostname=M%C3%BCn").await.ok();
    assert_eq!((&found["count"], &found["devices"][0]["hostname"]), (&json!(1), &json!("MÜNCHEN-PC")), "{locale}");
    assert_eq!(admin.get("/api/devices/search?hostname=mu").await.ok()["count"], 0, "too short");
    let by = admin.get("/api/audit?actor=ADMIN&action=site.create").await.ok();
    assert_eq!(by["events"].as_array().map(Vec::len), Some(1), "{locale}: {by}");
}

#[tokio::test]
async fn names_fold_the_same_without_a_locale() {
    names_fold_in(TestDatabase::start().await, "C").await;
}

#[tokio::test]
async fn names_fold_the_same_in_turkish() {
    names_fold_in(TestDatabase::in_locale("tr-TR").await, "tr-TR").await;
}

#[tokio::test]
async fn names_fold_the_same_in_german() {
    names_fold_in(TestDatabase::in_locale("de-DE").await, "de-DE").await;
}

/// What a database from before keys has, names that collide by the rule of today among it.
async fn before_keys() -> TestDatabase {
    let database = TestDatabase::before(46).await;
    for sql in [
        "INSERT INTO users (username, role) VALUES ('Ädä', 'Admin'), ('bob', 'User'), ('äDÄ', 'User')",
        "INSERT INTO sites (name, enrollment_code) VALUES ('Köln', '1'), ('KÖLN', '2'), ('Bonn', '3')",
        "INSERT INTO credentials (name) VALUES ('Éclair'), ('éCLAIR')",
        "INSERT INTO assemblies (guid, domain, display_name, assembly_type, payload, content_hash, path, path_key, base_key)
         VALUES ('a', 'user', 'É', 'script', '', '', 'Scripts/É', 'scripts/É', 'scripts/É'),
                ('b', 'user', 'é', 'script', '', '', 'Scripts/é', 'scripts/é', 'scripts/é'),
                ('c', 'user', 'Ö', 'script', '', '', 'Scripts/Ö', 'scripts/Ö', 'scripts/Ö')",
        "INSERT INTO devices (guid, hostname, site_id, fingerprint, public_key)
         SELECT gen_random_uuid(), 'MÜNCHEN-' || n, 1, n::text, '' FROM generate_series(1, 2500) n",
    ] {
        sqlx::query(sql).execute(&database.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    database
}

async fn user_keys(database: &TestDatabase) -> Vec<(String, String)> {
    sqlx::query_as("SELECT username, username_key FROM users ORDER BY id").fetch_all(&database.pool).await.expect("users")
}

#[tokio::test]
async fn names_from_before_get_their_keys_and_collisions_are_reported() {
    let database = before_keys().await;
    db::migrate(&database.pool).await.expect("a migration");
    // As if it had been killed after some of the work, and two processes did the rest at once.
    for sql in [
        "UPDATE users SET username_key = chr(31) || username WHERE username <> 'bob'",
        "UPDATE sites SET name_key = chr(31) || name",
        "UPDATE devices SET hostname_key = chr(31) || hostname WHERE hostname LIKE '%1'",
    ] {
        sqlx::query(sql).execute(&database.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    let (one, other) = tokio::join!(backfill::run(&database.pool), backfill::run(&database.pool));
    let _ = (one.expect("a back-fill"), other.expect("a back-fill"));

    let collisions = backfill::run(&database.pool).await.expect("a back-fill");
    let names: Vec<(&str, &str, &str)> =
        collisions.iter().map(|found| (found.table, found.name.as_str(), found.holder.as_str())).collect();
    assert_eq!(names, [("users", "äDÄ", "Ädä"), ("sites", "KÖLN", "Köln"), ("credentials", "éCLAIR", "Éclair")]);
    let expected = [("Ädä", "ädä".to_owned()), ("bob", "bob".to_owned()), ("äDÄ", names::exact_key("äDÄ"))];
    assert_eq!(user_keys(&database).await, expected.map(|(name, key)| (name.to_owned(), key)));
    let unkeyed: i64 = sqlx::query_scalar("SELECT count(*) FROM devices WHERE hostname_key <> 'münchen-' || substr(hostname, 9)")
        .fetch_one(&database.pool)
        .await
        .expect("a count");
    assert_eq!(unkeyed, 0);
    let paths: Vec<(String, String, String)> = sqlx::query_as("SELECT path, path_key, base_key FROM assemblies ORDER BY guid")
        .fetch_all(&database.pool)
        .await
        .expect("assemblies");
    let expected = [
        ("Scripts/É~a", "scripts/é~a", "scripts/é"),
        ("Scripts/é", "scripts/é", "scripts/é"),
        ("Scripts/Ö", "scripts/ö", "scripts/ö"),
    ];
    assert_eq!(paths, expected.map(|(path, key, base)| (path.to_owned(), key.to_owned(), base.to_owned())));
    // Each is found where it is spelled exactly so, and any other spelling is the older one.
    for (typed, found) in [("äDÄ", "äDÄ"), ("Ädä", "Ädä"), ("ÄDÄ", "Ädä"), ("BOB", "bob")] {
        let id = borealis_engine::access::users::id_of(&database.pool, typed).await.expect("a user");
        let name: String = sqlx::query_scalar("SELECT username FROM users WHERE id = $1")
            .bind(id)
            .fetch_one(&database.pool)
            .await
            .expect("a name");
        assert_eq!(name, found, "{typed}");
    }
    // The collision ends with what caused it.
    sqlx::query("DELETE FROM users WHERE username = 'Ädä'").execute(&database.pool).await.expect("a removal");
    let left = backfill::run(&database.pool).await.expect("a back-fill");
    assert!(left.iter().all(|found| found.table != "users"), "{left:?}");
    assert_eq!(user_keys(&database).await[1].1, "ädä");
}

#[tokio::test]
async fn names_people_read_hide_nothing_and_names_in_paths_can_be_reached() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let (site, code) = engine.site("north").await;
    let script = assembly(&admin).await;
    for hidden in ["\u{202e}", "\u{200b}", "\u{feff}", "\u{2067}", "\u{7f}"] {
        let name = format!("a{hidden}b");
        let job = json!({"name": name, "components": [{"kind": "script", "assembly_guid": script}], "targets": [{"kind": "all_devices"}], "schedule": {"type": "daily", "start": "2030-01-01T03:00:00Z"}});
        let assembly = json!({"domain": "user", "display_name": name, "payload": {"type": "bash", "script": "true"}});
        for (path, body, code) in [
            ("/api/sites", json!({"name": name}), "invalid_name"),
            ("/api/sites/rename", json!({"id": site, "new_name": name}), "invalid_name"),
            ("/api/users", json!({"username": name, "password": PASSWORD}), "invalid_username"),
            ("/api/users", json!({"username": "ok", "display_name": name, "password": PASSWORD}), "invalid_display_name"),
            ("/api/credentials", json!({"name": name}), "invalid_field"),
            ("/api/auth/tokens", json!({"name": name, "scopes": ["read"]}), "invalid_name"),
            ("/api/directory/providers", json!({"name": name}), "invalid_text"),
            ("/api/scheduled_jobs", job, "invalid_name"),
            ("/api/assemblies", assembly, "invalid_field"),
        ] {
            let reply = admin.post(path, body).await.error(400, code);
            let code_point = format!("U+{:04X}", u32::from(hidden.chars().next().expect("a character")));
            assert!(reply.text.contains(&code_point), "{path}: {}", reply.text);
        }
    }
    let enroll = |hostname: &str| {
        let body = json!({
            "hostname": hostname, "enrollment_code": code, "agent_pubkey": borealis_tests::actor::spki(&new_key()),
            "client_nonce": "AQEBAQEBAQEBAQEBAQEBAQ==",
        });
        let anonymous = engine.anonymous();
        async move { anonymous.post("/api/agent/enroll/request", body).await }
    };
    for bad in ["a/b", "a\\b", "..", ".", "%41", "a;b", "a?b", "a#b", "a,b", "a\u{202e}b", "6F9619FF-8B86-D011-B42D-00C04FC964FF"]
    {
        let _ = enroll(bad).await.error(400, "invalid_hostname");
    }
    for bad in ["a%b", "x;y", "a/b", "..", "a?b", "x,y"] {
        let body = json!({"username": bad, "password": PASSWORD, "role": "User"});
        let _ = admin.post("/api/users", body).await.error(400, "invalid_username");
    }
    // What is allowed can be named in a path.
    for hostname in ["web (2) o'neil+x@y~$_.1", "日本 PC"] {
        let device = engine.device_named(site, hostname).await;
        let path = url::form_urlencoded::byte_serialize(hostname.as_bytes()).collect::<String>();
        // A path has one form: what need not be encoded is not.
        let path = path.replace('+', "%20").replace("%7E", "~");
        assert_eq!(device_at(&admin, &path).await, device.guid);
        let _ = admin.post(&format!("/api/device/description/{path}"), json!({"description": " rack 4\n"})).await.ok();
        let shown = admin.get(&format!("/api/devices/{}", device.guid)).await.ok();
        assert_eq!(shown["description"], "rack 4");
    }
    let _ = admin.post("/api/device/description/nowhere", json!({"description": ""})).await.error(404, "not found");
}

#[tokio::test]
async fn a_device_is_addressed_by_its_approved_name_only() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("north").await;
    let (elsewhere, _) = engine.site("south").await;
    let operator = engine.operator(&[site]).await;
    let stranger = engine.operator(&[elsewhere]).await;
    let script = assembly(&admin).await;
    let (web, db) = (engine.device_named(site, "web").await, engine.device_named(site, "db").await);
    let shown = || async { admin.get(&format!("/api/devices/{}", web.guid)).await.ok() };
    let run = |host: &str| {
        let body = json!({"hostnames": [host], "assembly_guid": script});
        let operator = operator.clone();
        async move { operator.post("/api/scripts/quick_run", body).await }
    };

    // It says that it is the other one, in every report there is.
    let _ = web.post("/api/agent/heartbeat", json!({"hostname": "DB"})).await.ok();
    let _ = web.post("/api/agent/status", json!({"hostname": "DB", "status": "ok"})).await.ok();
    let _ = web.post("/api/agent/details", json!({"hostname": "DB", "details": {"summary": {"hostname": "DB"}}})).await.ok();
    let row = shown().await;
    assert_eq!(
        (&row["hostname"], &row["reported_hostname"], &row["hostname_change"]),
        (&json!("web"), &json!("DB"), &json!("conflict"))
    );
    assert_eq!(run("db").await.ok()["results"][0]["device_guid"].as_str().map(str::to_uppercase).as_ref(), Some(&db.guid));
    assert_eq!(device_at(&operator, "db").await, db.guid);
    let events = audited(&engine, "device.hostname_reported").await;
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(
        (&events[0]["object_id"], &events[0]["detail"]["reported_hostname"], &events[0]["detail"]["namesakes"]),
        (&json!(web.guid), &json!("DB"), &json!([db.guid]))
    );

    // A name that is free is not taken either, until an operator of the site says so.
    let _ = web.post("/api/agent/heartbeat", json!({"hostname": "web-2"})).await.ok();
    assert_eq!(shown().await["hostname_change"], "pending");
    let _ = run("web-2").await.error(403, "out_of_scope_hostnames");
    let path = format!("/api/devices/{}/hostname", web.guid);
    let _ = stranger.post(&path, json!({"hostname": "web-2"})).await.error(404, "not found");
    let _ = operator.post(&path, json!({"hostname": "web-3"})).await.error(409, "hostname_not_reported");
    let _ = operator.post(&path, json!({"hostname": "WEB-2"})).await.ok();
    let row = shown().await;
    assert_eq!((&row["hostname"], &row["hostname_change"]), (&json!("web-2"), &Value::Null));
    let _ = run("web-2").await.ok();
    let _ = run("web").await.error(403, "out_of_scope_hostnames");
    assert_eq!(audited(&engine, "device.hostname_approve").await.len(), 1);

    // Two of a name need a word.
    let _ = web.post("/api/agent/heartbeat", json!({"hostname": "db"})).await.ok();
    let refused = operator.post(&path, json!({"hostname": "db"})).await.error(409, "conflict_resolution_required");
    assert_eq!(refused.body["guids"], json!([db.guid]));
    let _ = operator.post(&path, json!({"hostname": "db", "conflict_resolution": "coexist"})).await.ok();
    let _ = run("db").await.error(409, "ambiguous_hostname");

    // What cannot be a name is no reason to refuse a report, and is not shown.
    let _ = web.post("/api/agent/heartbeat", json!({"hostname": "a/b"})).await.ok();
    let _ = web.post("/api/agent/details", json!({"hostname": "a/b", "details": {}})).await.ok();
    assert_eq!(shown().await["reported_hostname"], "db");
}

#[tokio::test]
async fn a_job_finds_its_device_under_another_hostname() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("north").await;
    let script = assembly(&admin).await;
    let device = engine.device_named(site, "before").await;
    let run = json!({"hostnames": ["before"], "assembly_guid": script});
    let _ = admin.post("/api/scripts/quick_run", run).await.ok();
    // The reference's agents compare the hostname of a job with their own.
    let mut socket = connect(&engine, &device, "AFTER").await;
    let sent: QuickJobRun = serde_json::from_value(socket.event("quick_job_run").await).expect("a dispatch");
    assert_eq!(sent.target_hostname, "AFTER");
    assert_eq!(sent.envelope.map(|envelope| envelope.device_guid), Some(device.guid.clone()));
}

#[tokio::test]
async fn a_device_that_reports_without_a_socket_is_seen_to_have_none() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device_named(site, "web").await;
    let state = || async {
        let row = admin.get(&format!("/api/devices/{}", device.guid)).await.ok();
        assert_eq!(row["summary"]["agent_socket"], row["agent_socket"]);
        (row["status"].clone(), row["agent_socket"].clone(), row["connection_state"].clone())
    };
    let _ = device.post("/api/agent/heartbeat", json!({"hostname": "web"})).await.ok();
    assert_eq!(state().await, (json!("Online"), json!(false), json!("no_socket")));
    let socket = connect(&engine, &device, "web").await;
    assert_eq!(state().await, (json!("Online"), json!(true), json!("connected")));
    // With a socket it is online though it has not reported for long.
    let silent = "UPDATE devices SET last_seen = now() - interval '61 seconds'";
    sqlx::query(silent).execute(&engine.database.pool).await.expect("an update");
    assert_eq!(state().await.0, json!("Online"));
    drop(socket);
    eventually("the device is offline", LIMIT, || async {
        (state().await == (json!("Offline"), json!(false), json!("offline"))).then_some(())
    })
    .await;
}

/// Every route whose path names a device reads that name in one way, and refuses in one form.
#[tokio::test(flavor = "multi_thread")]
async fn every_path_that_names_a_device_reads_it_alike() {
    let engine = TestEngine::start().await;
    let ((north, _), (south, _)) = (engine.site("north").await, engine.site("south").await);
    let (one, other) = (engine.device_named(north, "twin").await, engine.device_named(south, "Twin").await);
    let (admin, operator) = (engine.admin().await, engine.operator(&[north]).await);
    let (_, _, table) = borealis_api::app::build(&engine.app);
    let of_devices = |path: &str| path.contains("{hostname}") || path.starts_with("/api/devices/{guid}");
    let mut ambiguous: Vec<Value> = Vec::new();
    let mut tried = 0;
    for entry in table.iter().filter(|entry| entry.class == Class::Operator && of_devices(&entry.path)) {
        let by_name = entry.path.contains("{hostname}");
        let call = async |actor: &Actor, name: &str| {
            let path = entry.path.replace("{hostname}", name).replace("{guid}", name);
            let body = match (entry.method.as_str(), by_name) {
                ("GET" | "DELETE", _) => None,
                (_, true) => Some(json!({})),
                (_, false) => Some(json!({"hostname": "other"})),
            };
            actor.call(&entry.method, &path, body.as_ref()).await
        };
        let place = format!("{} {}", entry.method, entry.path);
        if by_name {
            let mut reply = call(&admin, "TWIN").await.error(409, "ambiguous_hostname");
            for own in ["request_id", "message"] {
                reply.body.as_object_mut().expect("an object").remove(own);
            }
            ambiguous.push(reply.body);
            assert!(![404, 409, 400].contains(&call(&operator, "tWiN").await.status), "{place}: the only one in scope");
        } else {
            let _ = call(&admin, "twin").await.error(400, "invalid guid");
        }
        for spelling in [one.guid.clone(), one.guid.to_lowercase(), format!("%7B{}%7D", one.guid)] {
            let reply = call(&operator, &spelling).await;
            assert_ne!(reply.body["error"].as_str().unwrap_or_default().to_lowercase(), "not found", "{place} {spelling}");
            assert_ne!(reply.status, 400, "{place} {spelling}: {}", reply.text);
        }
        for absent in [other.guid.as_str(), "00000000-0000-4000-8000-000000000000"] {
            let reply = call(&operator, absent).await.expect(404);
            assert_eq!(
                reply.body["error"].as_str().map(str::to_lowercase).as_deref(),
                Some("not found"),
                "{place}: {}",
                reply.text
            );
        }
        tried += 1;
    }
    assert!(tried >= 7, "{tried}");
    assert_eq!(ambiguous[0]["candidates"].as_array().map(Vec::len), Some(2), "{ambiguous:?}");
    assert_eq!(ambiguous[0]["guids"].as_array().map(Vec::len), Some(2));
    assert!(ambiguous.iter().all(|body| *body == ambiguous[0]), "{ambiguous:?}");
}
