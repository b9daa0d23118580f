//! The end of a secret store and the beginning of the next: nothing is sealed under a dead key, the audit still tells the truth, and
//! a person comes in again. Further, how a process opens itself, and what the console can do.

use std::{
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use borealis_engine::{
    Actor as Who,
    access::aegis::{PROTECTED, Unseal, Vault},
};
use borealis_tests::{
    Actor, Processes, TestCluster, TestDatabase, TestEngine,
    actor::Credential,
    engine::{ADMIN, CIPHER, PASSWORD},
    eventually,
    processes::{built, free_port},
    totp,
};
use borealis_workers::api_client::ApiClient;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use url::Url;

const SOON: Duration = Duration::from_secs(30);
const NEW_CIPHER: &str = "another long passphrase for tests";
const NEW_PASSWORD: &str = "an entirely new password";

/// Sets a secret store up after a reset, and recovers the administrator.
async fn recover(base: &Url) -> Actor {
    let nobody = Actor::anonymous(base);
    let state = nobody.post("/api/bootstrap/aegis/setup", json!({"cipher": NEW_CIPHER})).await.ok();
    assert_eq!(state["phase"], "admin_recovery_required");
    let unknown = json!({"username": "nobody of this name", "password": NEW_PASSWORD});
    let _ = nobody.post("/api/bootstrap/admin/recover", unknown).await.error(404, "admin_not_found");
    let pending = nobody.post("/api/bootstrap/admin/recover", json!({"username": ADMIN, "password": NEW_PASSWORD})).await.ok();
    let secret = pending["secret"].as_str().expect("a secret").to_owned();
    let body = json!({"pending_token": pending["pending_token"], "code": totp::code(&secret, 0)});
    let done = nobody.post("/api/bootstrap/admin/mfa/verify", body).await.ok();
    nobody.signed_in(ADMIN, NEW_PASSWORD, &secret, &done)
}

async fn reset(admin: &Actor) -> Value {
    let _ = admin.post("/api/auth/step-up", json!({"password": admin.password})).await.ok();
    admin.post("/api/aegis/force_reset", json!({"confirm": "reset"})).await.ok()
}

async fn phase(base: &Url) -> Value {
    Actor::anonymous(base).get("/api/bootstrap/state").await.ok()["phase"].clone()
}

async fn one<T>(engine: &TestEngine, sql: &'static str) -> T
where
    T: Send + Unpin + sqlx::Type<sqlx::Postgres> + for<'a> sqlx::Decode<'a, sqlx::Postgres>,
{
    sqlx::query_scalar(sql).fetch_one(&engine.database.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
}

async fn credential(admin: &Actor) -> i64 {
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let body = json!({"name": "Web", "username": "deploy", "password": "canary-1", "become_password": "canary-2"});
    admin.post("/api/credentials", body).await.ok()["credential"]["id"].as_i64().expect("an id")
}

/// Waits until all events are sealed; the report of the check.
async fn checked(admin: &Actor) -> Value {
    eventually("all events are sealed", SOON, async || {
        let report = admin.get("/api/audit/check").await.ok();
        (report["waiting"] == 0 || report["ok"] == false).then_some(report)
    })
    .await
}

#[tokio::test]
async fn every_sealed_column_is_in_the_registry() {
    let engine = TestEngine::start().await;
    let mut found: Vec<String> = sqlx::query_scalar(
        "SELECT table_name || '.' || left(column_name, -7) FROM information_schema.columns
         WHERE table_schema = 'public' AND column_name LIKE '%\\_sealed'",
    )
    .fetch_all(&engine.database.pool)
    .await
    .expect("the columns");
    found.sort();
    let mut known = PROTECTED.map(str::to_owned);
    known.sort();
    assert_eq!(found, known);
}

#[tokio::test]
async fn a_reset_takes_everything_sealed_and_ends_with_a_working_administrator() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Oslo").await;
    let operator = engine.operator(&[site]).await;
    let second = engine.second().await;
    let _ = operator.at(&second.base).get("/api/auth/me").await.ok();
    let device = engine.device(site).await;
    let credential = credential(&admin).await;
    let job: i64 = {
        let payload = json!({"name": "Hello", "type": "bash", "script": "echo hello"});
        let assembly = json!({"domain": "user", "display_name": "Hello", "assembly_type": "script", "assembly_subtype": "bash",
            "payload": payload});
        let assembly = admin.post("/api/assemblies", assembly).await.ok();
        let job = json!({"name": "A job", "components": [{"assembly_guid": assembly["assembly_guid"], "name": "Hello"}],
            "targets": [{"kind": "all_devices"}], "schedule": {"type": "daily", "start": "2030-01-01T03:00:00Z"}});
        admin.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].as_i64().expect("an id")
    };
    sqlx::query("UPDATE scheduled_jobs SET credential_id = $1 WHERE id = $2")
        .bind(credential)
        .bind(job)
        .execute(&engine.database.pool)
        .await
        .expect("a job with a credential");
    sqlx::query(
        "INSERT INTO passkeys (user_id, label, lookup_tag, credential_sealed) SELECT id, 'Key', sha256(username::bytea), '' FROM users",
    )
    .execute(&engine.database.pool)
    .await
    .expect("passkeys");
    // What programs and the engine itself sign in with elsewhere.
    for sql in [
        "INSERT INTO github_token (token_sealed) VALUES ('x')",
        "INSERT INTO directory_providers (name, name_key, enabled, bind_password_sealed) VALUES ('With a password', 'with a password', true, 'x')",
        "INSERT INTO directory_providers (name, name_key, enabled) VALUES ('Without', 'without', true)",
    ] {
        sqlx::query(sql).execute(&engine.database.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let token = admin.post("/api/auth/tokens", json!({"name": "x", "scopes": ["read"], "expires_in_days": 1})).await.ok();
    let program = Actor { credential: Credential::Bearer(token["token"].as_str().expect("a token").to_owned()), ..admin.clone() };
    let _ = program.get("/api/sites").await.ok();
    // A sign-in that is on its way.
    let login = json!({"username": ADMIN, "password": PASSWORD});
    let pending = engine.anonymous().post("/api/auth/login", login).await.ok();

    let key = engine.state_dir().join("secrets/unseal.key");
    assert!(key.exists());
    for body in [json!({}), json!({"confirm": ""}), json!({"confirm": "yes"})] {
        let _ = admin.post("/api/aegis/force_reset", body).await.error(400, "confirmation_required");
    }
    let later = engine.anonymous().sign_in_again(&admin, 1).await;
    engine.age_step_ups().await;
    let _ = later.post("/api/aegis/force_reset", json!({"confirm": "reset"})).await.error(403, "step_up_required");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let _ = operator.post("/api/aegis/force_reset", json!({"confirm": "reset"})).await.error(403, "forbidden");

    let done = reset(&admin).await;
    for (field, expected) in [
        ("status", json!("ok")),
        ("force_reset", json!(true)),
        ("affected_credentials", json!(1)),
        ("disabled_jobs", json!(1)),
        ("github_token_reset", json!(true)),
        ("affected_users", json!(2)),
        ("removed_passkeys", json!(2)),
        ("configured", json!(false)),
        ("locked", json!(false)),
        ("user_role", json!("Admin")),
    ] {
        assert_eq!(done[field], expected, "{field}");
    }
    assert!(!key.exists());
    assert_eq!(one::<i64>(&engine, "SELECT count(*) FROM api_tokens").await, 0);
    assert_eq!(one::<i64>(&engine, "SELECT count(*) FROM github_token WHERE reset_at IS NOT NULL").await, 1, "it says so");
    assert_eq!(
        one::<String>(&engine, "SELECT string_agg(name, ',') FROM directory_providers WHERE enabled").await,
        "Without",
        "one whose password is gone is off"
    );
    // Both processes, at once.
    for base in [&engine.base, &second.base] {
        let state = Actor::anonymous(base).get("/api/bootstrap/state").await.ok();
        assert_eq!(state, json!({"phase": "aegis_setup_required", "configured": false, "locked": false}));
        let _ = admin.at(base).get("/api/auth/me").await.error(401, "unauthorized");
        let _ = operator.at(base).get("/api/auth/me").await.error(401, "unauthorized");
        let _ = program.at(base).get("/api/sites").await.error(401, "unauthorized");
        let login = json!({"username": ADMIN, "password": PASSWORD});
        let _ = Actor::anonymous(base).post("/api/auth/login", login).await.error(423, "bootstrap_required");
    }
    // Agents go on working.
    let _ = device.post("/api/agent/heartbeat", json!({})).await.ok();
    for column in PROTECTED {
        let (table, column) = column.split_once('.').expect("a column");
        let left: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT count({column}_sealed) FROM {table}")))
            .fetch_one(&engine.database.pool)
            .await
            .expect("a count");
        assert_eq!(left, 0, "{table}.{column}");
    }
    assert_eq!(one::<i64>(&engine, "SELECT count(*) FROM operator_sessions").await, 0);

    // The other process sets up and recovers; the first follows.
    let admin = recover(&second.base).await;
    assert!(key.exists());
    assert_eq!(phase(&engine.base).await, "login_required");
    let here = admin.at(&engine.base);
    let me = here.get("/api/auth/me").await.ok();
    assert_eq!(me["role"], "Admin");
    let pending = json!({"pending_token": pending["pending_token"], "code": "123456"});
    let _ = engine.anonymous().post("/api/auth/mfa/verify", pending).await.error(401, "invalid_session");
    let shown = here.get(&format!("/api/credentials/{credential}")).await.ok()["credential"].clone();
    assert_eq!(shown["lost_secret_fields"], json!(["password", "become_password"]));
    assert_eq!((&shown["has_password"], &shown["secret_reset_required"]), (&json!(false), &json!(true)));
    assert_eq!(here.get(&format!("/api/scheduled_jobs/{job}")).await.ok()["job"]["enabled"], false);
    let users = here.get("/api/users").await.ok();
    let mut marks = users["users"].as_array().expect("users").iter();
    assert!(marks.all(|user| (user["auth_reset_required"] == 1) == (user["auth_reset_at"].as_i64() > Some(0))), "{users}");
    // The others come back one by one.
    let login = json!({"username": operator.name, "password": PASSWORD});
    let _ = engine.anonymous().post("/api/auth/login", login.clone()).await.error(401, "invalid username or password");
    let _ = here.post("/api/auth/step-up", json!({"password": NEW_PASSWORD})).await.ok();
    let reset = format!("/api/users/{}/reset_password", operator.name);
    let _ = here.post(&reset, json!({"password": PASSWORD})).await.ok();
    assert_eq!(engine.anonymous().post("/api/auth/login", login).await.ok()["stage"], "setup");
    // And the next reset finds a store to end, too.
    let credential = format!("/api/credentials/{credential}");
    let healed = here.put(&credential, json!({"password": "x", "become_password": ""})).await.ok()["credential"].clone();
    assert_eq!(healed["secret_reset_required"], false);
    assert_eq!(self::reset(&here).await["affected_credentials"], 1);
    second.stop().await;
}

trait Again {
    async fn sign_in_again(&self, who: &Actor, steps: u64) -> Actor;
}

impl Again for Actor {
    async fn sign_in_again(&self, who: &Actor, steps: u64) -> Actor {
        let known = Actor { totp_secret: who.totp_secret.clone(), ..self.clone() };
        known.sign_in(&who.name, who.password.as_deref().expect("a password"), steps).await
    }
}

/// Runs a program of Postgres' on a database.
async fn postgres(program: &'static str, arguments: Vec<String>) {
    let ran = tokio::task::spawn_blocking(move || Command::new(program).args(&arguments).output()).await.expect("no panic");
    let ran = ran.unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
    assert!(ran.status.success(), "{program}: {}", String::from_utf8_lossy(&ran.stderr));
}

#[tokio::test]
async fn a_restored_backup_is_nobodys_to_set_up() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Oslo").await;
    let device = engine.device(site).await;
    let id = credential(&admin).await;
    let folder = tempfile::tempdir().expect("a folder");
    let dump = folder.path().join("borealis.dump").display().to_string();
    postgres("pg_dump", vec!["-Fc".into(), "-f".into(), dump.clone(), "-d".into(), engine.database.url.to_string()]).await;

    // As `docs/operations.md` says, without the folder of secrets: somebody who has found the backup, or has lost the folder.
    let database = TestDatabase::start().await;
    let words = ["--clean", "--if-exists", "--single-transaction", "-d", database.url.as_str(), &dump].map(str::to_owned);
    postgres("pg_restore", words.to_vec()).await;
    let restored = TestEngine::on(database, |_| {}).await;
    let nobody = restored.anonymous();
    assert_eq!(phase(&restored.base).await, "aegis_unlock_required");
    let first = json!({"username": "mallory", "password": NEW_PASSWORD});
    let refused = async |path: &str, body: Value| {
        let reply = nobody.post(path, body).await;
        assert_eq!(reply.status, 409, "{path}: {}", reply.text);
        reply.body["error"].clone()
    };
    assert_eq!(refused("/api/bootstrap/aegis/setup", json!({"cipher": NEW_CIPHER})).await, "invalid_phase");
    assert_eq!(refused("/api/bootstrap/admin/setup", first.clone()).await, "invalid_phase");
    assert_eq!(refused("/api/bootstrap/admin/recover", first.clone()).await, "invalid_phase");
    let _ = admin.at(&restored.base).get("/api/auth/me").await.error(401, "unauthorized");
    let _ = nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": NEW_CIPHER})).await.error(401, "invalid_cipher");

    // Who has the cipher goes on where the backup was made.
    let _ = nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": CIPHER})).await.ok();
    for path in ["/api/bootstrap/admin/setup", "/api/bootstrap/admin/recover"] {
        let _ = refused(path, first.clone()).await;
    }
    let here = admin.at(&restored.base).sign_in(ADMIN, PASSWORD, 1).await;
    assert_eq!(here.get(&format!("/api/credentials/{id}")).await.ok()["credential"]["has_password"], true);
    assert_eq!(checked(&here).await["ok"], true);
    // The token of the agent was signed with a key that is not here; its refresh token gives it another.
    let _ = device.at(&restored.base).post("/api/agent/heartbeat", json!({})).await.error(401, "invalid_token");
    let renewal = json!({"guid": device.guid, "refresh_token": device.refresh_token});
    let _ = nobody.post("/api/agent/token/refresh", renewal).await.ok();
}

#[tokio::test]
async fn nothing_is_sealed_under_a_dead_key() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let pool = &engine.database.pool;
    // One that nobody tells anything.
    let deaf = Vault::new(Unseal::in_state_dir(engine.state_dir()));
    assert!(deaf.follow(pool).await.expect("the database"));
    let second = engine.second().await;
    eventually("the second process is open", SOON, async || second.app.vault.is_open().then_some(())).await;
    let old = deaf.key_id().expect("a key");
    assert!(second.app.vault.holds(old));

    let seal = async |vault: &Vault| {
        let mut tx = pool.begin().await.expect("a transaction");
        vault.seal(&mut tx, "credentials.password", 1, "canary").await.map_err(|error| error.code)
    };
    assert!(seal(&deaf).await.is_ok());
    let _ = reset(&admin).await;
    assert!(!engine.app.vault.is_open());
    assert!(deaf.holds(old));
    assert_eq!(seal(&deaf).await, Err("aegis_locked"));
    assert!(!deaf.is_open(), "it has seen that its key is dead");
    // The other process has no request to answer, and drops the key all the same.
    eventually("the second process forgets the key", SOON, async || (!second.app.vault.is_open()).then_some(())).await;

    let dead = Vault::new(Unseal::Manual);
    let _ = dead.open_with(pool, &borealis_engine::Secret::new(CIPHER.to_owned())).await.expect_err("no store");
    let admin = recover(&engine.base).await;
    let new = engine.app.vault.key_id().expect("a key");
    assert_ne!(new, old);
    assert!(deaf.follow(pool).await.expect("the database") && deaf.holds(new));
    // The same with a set-up between, so that there is a store, of another key.
    let _ = reset(&admin).await;
    let _ = recover(&engine.base).await;
    assert!(deaf.holds(new));
    assert_eq!(seal(&deaf).await, Err("aegis_locked"));
    let mut tx = pool.begin().await.expect("a transaction");
    assert!(engine.app.vault.fence(&mut tx).await.is_ok());
    second.stop().await;
}

#[tokio::test]
async fn a_reset_waits_for_who_is_sealing_and_lets_nobody_begin() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let id = credential(&admin).await;
    let pool = engine.database.pool.clone();
    let vault = engine.app.vault.clone();
    let waits = async |what: &'static str| {
        eventually("the reset waits", SOON, async || {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE $1";
            let waiting: i64 = sqlx::query_scalar(sql).bind(format!("{what}%")).fetch_one(&pool).await.expect("the activity");
            (waiting == 1).then_some(())
        })
        .await;
    };
    let begin = || {
        let (pool, vault) = (pool.clone(), Vault::new(Unseal::in_state_dir(engine.state_dir())));
        tokio::spawn(async move { vault.reset(&pool, &Who::console("tests")).await })
    };

    let mut tx = pool.begin().await.expect("a transaction");
    let sealed = vault.seal(&mut tx, "credentials.private_key", id, "canary").await.expect("sealed");
    let set = sqlx::query("UPDATE credentials SET private_key_sealed = $2 WHERE id = $1").bind(id).bind(sealed);
    let _ = set.execute(&mut *tx).await.expect("written");
    let reset = begin();
    waits("DELETE FROM aegis").await;
    tx.commit().await.expect("committed");
    let taken = reset.await.expect("no panic").expect("reset");
    assert_eq!(taken.credentials, [id]);
    let lost: Vec<String> = one(&engine, "SELECT lost_secret_fields FROM credentials").await;
    assert_eq!(lost, ["password", "private_key", "become_password"]);
    assert_eq!(one::<i64>(&engine, "SELECT count(private_key_sealed) FROM credentials").await, 0);

    let _ = recover(&engine.base).await;
    let mut other = pool.begin().await.expect("a transaction");
    let _ = sqlx::query("SELECT id FROM users FOR UPDATE").fetch_all(&mut *other).await.expect("the users");
    let reset = begin();
    waits("SELECT id FROM users").await;
    let mut tx = pool.begin().await.expect("a transaction");
    let refused = vault.seal(&mut tx, "credentials.password", id, "canary").await.expect_err("refused");
    assert_eq!(refused.code, "aegis_busy");
    drop((tx, other));
    let _ = reset.await.expect("no panic").expect("reset");
    let mut tx = pool.begin().await.expect("a transaction");
    assert_eq!(vault.seal(&mut tx, "credentials.password", id, "canary").await.expect_err("refused").code, "aegis_locked");
}

#[tokio::test]
async fn sign_ins_at_the_same_moment_leave_nothing_behind() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let second = engine.second().await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    // One kind of user gets a session from the password, the other a challenge.
    let (plain, factor) = (engine.user("User", &[]).await, engine.user("User", &[]).await);
    let without = json!({"enabled": false, "reset_secret": false});
    let _ = admin.post(&format!("/api/users/{plain}/mfa"), without).await.ok();
    let mut sign_ins = tokio::task::JoinSet::new();
    for n in 0..16 {
        let nobody = Actor::anonymous(if n % 2 == 0 { &engine.base } else { &second.base });
        let username = if n % 4 < 2 { plain.clone() } else { factor.clone() };
        sign_ins.spawn(async move {
            nobody.post("/api/auth/login", json!({"username": username, "password": PASSWORD})).await.status
        });
    }
    let first = sign_ins.join_next().await.expect("a sign-in").expect("no panic");
    let _ = admin.post("/api/aegis/force_reset", json!({"confirm": "reset"})).await.ok();
    let mut statuses = vec![first];
    while let Some(status) = sign_ins.join_next().await {
        statuses.push(status.expect("no panic"));
    }
    assert!(statuses.iter().all(|status| [200, 401, 423, 429, 503].contains(status)), "{statuses:?}");
    for sql in [
        "SELECT count(*) FROM operator_sessions",
        "SELECT count(*) FROM auth_challenges",
        "SELECT count(*) FROM aegis",
        "SELECT count(*) FROM users WHERE password_sealed IS NOT NULL OR NOT auth_reset_required",
    ] {
        assert_eq!(one::<i64>(&engine, sql).await, 0, "{sql}");
    }
    second.stop().await;
}

#[tokio::test]
async fn two_resets_at_once_are_one() {
    let engine = TestEngine::start().await;
    let _ = engine.admin().await;
    let reset = || async {
        let vault = Vault::new(Unseal::in_state_dir(engine.state_dir()));
        vault.reset(&engine.database.pool, &Who::console("tests")).await.map(|taken| taken.users).map_err(|error| error.code)
    };
    let (one, two) = tokio::join!(reset(), reset());
    assert!(matches!((one, two), (Ok(1), Err("not_configured")) | (Err("not_configured"), Ok(1))), "{one:?} {two:?}");
}

#[tokio::test]
async fn the_audit_goes_on_under_another_key_and_a_change_still_shows() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    engine.site("Oslo").await;
    let before = checked(&admin).await;
    assert_eq!((&before["ok"], &before["unverifiable"]), (&json!(true), &json!(0)));
    let _ = reset(&admin).await;
    let admin = recover(&engine.base).await;
    let _ = admin.post("/api/sites", json!({"name": "Bergen"})).await.ok();
    let after = checked(&admin).await;
    assert_eq!(after["ok"], true, "{after}");
    let earlier = after["unverifiable"].as_i64().expect("a number");
    assert!(earlier >= before["checked"].as_i64().expect("a number"), "{before} {after}");
    assert!(after["checked"].as_i64().is_some_and(|checked| checked >= 2), "{after}");
    let events = admin.get("/api/audit?action=aegis.force_reset").await.ok();
    assert_eq!(events["events"][0]["actor_name"], ADMIN);

    let broken = async |why: &str, what: &str| {
        let report = admin.get("/api/audit/check").await.ok();
        assert_eq!((&report["ok"], &report["broken"]["why"]), (&json!(false), &json!(why)), "{what}");
    };
    let new = "(SELECT max(id) FROM audit_events WHERE action = 'site.create')";
    engine.database.tamper(&format!("UPDATE audit_events SET actor_name = actor_name || 'x' WHERE id = {new}")).await;
    broken("the event or its place was changed", "an event of the new key").await;
    // Who says that it is one of an earlier key is found out.
    let begin = format!("UPDATE aegis SET chain_from = (SELECT seq FROM audit_chain WHERE event_id = {new})");
    engine.database.tamper(&begin).await;
    broken("the place where this key's links begin was changed", "the beginning").await;
    engine.database.tamper("UPDATE aegis SET chain_from_tag = NULL").await;
    broken("the place where this key's links begin was changed", "no tag").await;
    engine.database.tamper("UPDATE aegis SET chain_from = 0").await;
    broken("the event or its place was changed", "no beginning").await;
    // Back to where it was, as far as the tag, which only the engine can make, is there.
    let _ = reset(&admin).await;
    let admin = recover(&engine.base).await;
    assert_eq!(checked(&admin).await["ok"], true);

    // What nobody can check any more is not called tampered with.
    engine.database.tamper("UPDATE audit_events SET ip = 'x' WHERE id = (SELECT min(id) FROM audit_events)").await;
    let whole = admin.get("/api/audit/check").await.ok();
    assert_eq!(whole["ok"], true);
    let last = whole["unverifiable"].as_i64().expect("a number");
    engine.database.tamper(&format!("UPDATE audit_chain SET tag = sha256('x') WHERE seq = {last}")).await;
    let report = admin.get("/api/audit/check").await.ok();
    assert_eq!(
        (&report["ok"], &report["broken"]["seq"]),
        (&json!(false), &json!(last + 1)),
        "the new part holds the end of the old"
    );
    engine.database.tamper(&format!("DELETE FROM audit_chain WHERE seq = {}", last - 1)).await;
    let report = admin.get("/api/audit/check").await.ok();
    assert_eq!(report["broken"]["why"], "links before this one are missing");
}

/// A program that prints what is in a file.
fn prints(file: &Path) -> Unseal {
    Unseal::Command(vec!["cat".to_owned(), file.display().to_string()])
}

fn write_key(path: &Path, byte: u8, mode: u32) {
    std::fs::write(path, STANDARD.encode([byte; 32]) + "\n").expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("a mode");
}

async fn opens(node: &borealis_tests::engine::Node) {
    eventually("the process opens itself", SOON, async || node.app.vault.is_open().then_some(())).await;
}

async fn wrapped(engine: &TestEngine) {
    eventually("the data key is wrapped", SOON, async || {
        one::<bool>(engine, "SELECT unseal_wrapped_key IS NOT NULL FROM aegis").await.then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_open_process_hands_the_key_to_its_like_and_nobody_else() {
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::Manual).await;
    let admin = engine.admin().await;
    let handed = "SELECT count(*) FROM audit_events WHERE action = 'aegis.handover'";
    let second = engine.second().await;
    opens(&second).await;
    let _ = admin.at(&second.base).get("/api/auth/me").await.ok();
    assert_eq!(one::<i64>(&engine, handed).await, 1);
    eventually("nothing is left of it", SOON, async || {
        (one::<i64>(&engine, "SELECT count(*) FROM aegis_handovers").await == 0).then_some(())
    })
    .await;
    // It is on no disk either.
    let secrets = engine.state_dir().join("secrets");
    eventually("the setup token is gone, too", SOON, async || (!secrets.join("setup.token").exists()).then_some(())).await;
    let files = std::fs::read_dir(&secrets).expect("a folder");
    let mut names: Vec<_> = files.map(|file| file.expect("a file").file_name().into_string().expect("a name")).collect();
    names.sort();
    assert_eq!(names, ["agent-token.pem", "engine.secret", "script-signing.pem"]);

    // One that reads and writes the database and has other keys gets an answer that is of no use to it.
    let stranger = engine.stranger().await;
    eventually("it was answered", SOON, async || (one::<i64>(&engine, handed).await == 2).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(phase(&stranger.base).await, "aegis_unlock_required");
    assert_eq!(one::<i64>(&engine, handed).await, 2, "it does not ask all the time");
    stranger.stop().await;

    // After a reset there is another key, and it is handed over like the first.
    let _ = reset(&admin).await;
    let admin = recover(&second.base).await;
    opens(&engine.node).await;
    let _ = admin.at(&engine.base).get("/api/auth/me").await.ok();

    // Where nobody is open, somebody has to come.
    engine.app.vault.lock();
    second.stop().await;
    engine.app.vault.lock();
    let second = engine.second().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!engine.app.vault.is_open() && !second.app.vault.is_open());
    let unlock = json!({"cipher": NEW_CIPHER});
    let _ = Actor::anonymous(&second.base).post("/api/bootstrap/aegis/unlock", unlock).await.ok();
    opens(&engine.node).await;
    second.stop().await;
}

#[tokio::test]
async fn a_command_opens_a_process_and_one_that_fails_leaves_it_up_and_locked() {
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    write_key(&secret, 1, 0o600);
    let engine = TestEngine::with(|settings| settings.unseal = prints(&secret)).await;
    let admin = engine.admin().await;
    wrapped(&engine).await;
    assert!(!engine.state_dir().join("secrets/unseal.key").exists());
    let second = engine.stranger().await;
    opens(&second).await;
    let _ = admin.at(&second.base).get("/api/auth/me").await.ok();
    second.stop().await;

    // Another key, then none, then far too much: up, and locked.
    for bad in [Some("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="), None, Some(&*"x".repeat(5000))] {
        match bad {
            Some(text) => std::fs::write(&secret, text).expect("written"),
            None => std::fs::remove_file(&secret).expect("removed"),
        }
        let second = engine.stranger().await;
        let nobody = Actor::anonymous(&second.base);
        let _ = nobody.get("/health").await.ok();
        assert_eq!(phase(&second.base).await, "aegis_unlock_required");
        let _ = admin.at(&second.base).get("/api/auth/me").await.error(401, "unauthorized");
        // The cipher still opens it.
        let unlocked = nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": CIPHER})).await.ok();
        assert_eq!(unlocked["phase"], "login_required");
        second.stop().await;
    }
    // It is tried again.
    let second = engine.stranger().await;
    assert_eq!(phase(&second.base).await, "aegis_unlock_required");
    write_key(&secret, 1, 0o600);
    opens(&second).await;
    second.stop().await;

    // Another key fits after the store has been opened with the cipher.
    write_key(&secret, 2, 0o600);
    let second = engine.stranger().await;
    let _ = Actor::anonymous(&second.base).post("/api/bootstrap/aegis/unlock", json!({"cipher": CIPHER})).await.ok();
    let events = "SELECT count(*) FROM audit_events WHERE action = 'aegis.unseal_key'";
    eventually("the key is wrapped anew", SOON, async || (one::<i64>(&engine, events).await >= 2).then_some(())).await;
    second.stop().await;
    let third = engine.stranger().await;
    opens(&third).await;
    third.stop().await;
    // A reset ends that, too.
    let _ = reset(&admin).await;
    let third = engine.stranger().await;
    assert_eq!(phase(&third.base).await, "aegis_setup_required");
    third.stop().await;
}

#[tokio::test]
async fn a_slow_command_keeps_nobody_waiting() {
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::Command(vec!["sleep".into(), "600".into()])).await;
    let admin = engine.admin().await;
    let _ = admin.get("/api/auth/me").await.ok();
    let second = engine.stranger().await;
    let asked = tokio::time::timeout(SOON / 2, phase(&second.base)).await.expect("an answer");
    assert_eq!(asked, "aegis_unlock_required");
    tokio::time::timeout(SOON / 2, second.stop()).await.expect("an end");
}

#[tokio::test]
async fn a_key_file_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("unseal.key");
    write_key(&file, 1, 0o644);
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::KeyFile(file.clone())).await;
    let admin = engine.admin().await;
    let second = engine.stranger().await;
    assert_eq!(phase(&second.base).await, "aegis_unlock_required");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    wrapped(&engine).await;
    opens(&second).await;
    let _ = admin.at(&second.base).get("/api/auth/me").await.ok();
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
    second.stop().await;
}

/// `borealis-api admin` with the built program.
struct Console {
    state_dir: PathBuf,
    database: Option<String>,
}

struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Console {
    fn of(engine: &TestEngine) -> Self {
        Self { state_dir: engine.state_dir().to_owned(), database: Some(engine.database.url.to_string()) }
    }

    async fn say(&self, arguments: &[&str], input: &str) -> Said {
        let mut command = Command::new(built("borealis-api"));
        command.arg("admin").args(arguments).env_clear().env("BOREALIS_STATE_DIR", &self.state_dir);
        command.envs(self.database.as_ref().map(|url| ("DATABASE_URL", url)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        let ended = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().expect("borealis-api starts");
            let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
            child.wait_with_output().expect("it ends")
        });
        let ended = ended.await.expect("no panic");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said { code: ended.status.code(), out: text(&ended.stdout), err: text(&ended.stderr) }
    }

    async fn ok(&self, arguments: &[&str], input: &str) -> String {
        let said = self.say(arguments, input).await;
        assert_eq!(said.code, Some(0), "{arguments:?}: {}", said.err);
        said.out
    }

    async fn fails(&self, arguments: &[&str], input: &str, code: i32, why: &str) {
        let said = self.say(arguments, input).await;
        assert_eq!(said.code, Some(code), "{arguments:?}: {} {}", said.out, said.err);
        assert!(said.err.contains(why), "{arguments:?}: {}", said.err);
    }
}

#[tokio::test]
async fn the_console_lists_recovers_and_signs_people_out() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Oslo").await;
    let operator = engine.operator(&[site]).await;
    let console = Console::of(&engine);
    let list = console.ok(&["list"], "").await;
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{list}");
    assert_eq!(lines[1][..4], [ADMIN, "Admin", "local", "ready"]);
    assert!(lines[1][4].parse::<chrono::DateTime<chrono::Utc>>().is_ok(), "{list}");

    let sessions = async |whose: &[&str]| console.ok(&[&["sessions"], whose].concat(), "").await.lines().count() - 1;
    assert_eq!((sessions(&[]).await, sessions(&["ADMIN"]).await, sessions(&[&operator.name]).await), (2, 1, 1));
    console.fails(&["sessions", "nobody"], "", 1, "There is no such user").await;
    console.fails(&["end-sessions"], "", 2, "required").await;
    console.fails(&["end-sessions", ADMIN, "--all"], "", 2, "cannot be used with").await;
    let _ = console.ok(&["end-sessions", &operator.name], "").await;
    let _ = operator.get("/api/auth/me").await.error(401, "unauthorized");
    let _ = admin.get("/api/auth/me").await.ok();
    let _ = console.ok(&["end-sessions", "--all"], "").await;
    let _ = admin.get("/api/auth/me").await.error(401, "unauthorized");

    console.fails(&["recover", "nobody"], "", 1, "admin list").await;
    console.fails(&["recover", &operator.name], "", 1, "--promote").await;
    for (name, arguments) in
        [(ADMIN, &["recover", "Admin"][..]), (&operator.name, &["recover", "--promote", operator.name.as_str()])]
    {
        let password = console.ok(arguments, "").await.trim().to_owned();
        assert_eq!(password.len(), 23, "{password}");
        let _ = engine.anonymous().post("/api/auth/login", json!({"username": name, "password": PASSWORD})).await.expect(401);
        let back = engine.anonymous().sign_in(name, &password, 0).await;
        let _ = back.get("/api/users").await.error(403, "password_change_required");
        let change = json!({"current_password": password, "new_password": NEW_PASSWORD});
        let _ = back.post("/api/auth/password/reset", change).await.ok();
        let _ = back.get("/api/users").await.ok();
        let text: String = one(&engine, "SELECT string_agg(e::text, ' ') FROM audit_events e").await;
        assert!(!text.contains(&password));
    }
    let by_console = "SELECT array_agg(action ORDER BY id) FROM audit_events WHERE actor_name = 'console' AND actor_id <> ''";
    let actions: Vec<String> = one(&engine, by_console).await;
    assert_eq!(actions, ["session.end", "session.end", "user.recover", "user.recover"]);
}

#[tokio::test]
async fn the_console_changes_the_cipher_and_checks_the_audit_of_a_locked_store() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let console = Console::of(&engine);
    let _ = checked(&admin).await;
    let said = console.ok(&["audit", "check"], "").await;
    assert!(said.starts_with("ok: ") && said.contains("head: "), "{said}");
    std::fs::remove_file(engine.state_dir().join("secrets/unseal.key")).expect("a key file");
    console.fails(&["audit", "check"], "", 1, "A line is missing").await;
    console.fails(&["audit", "check"], "not the passphrase\n", 1, "This is not the cipher").await;
    let _ = console.ok(&["audit", "check"], &format!("{CIPHER}\n")).await;
    assert!(!engine.state_dir().join("secrets/unseal.key").exists(), "a look leaves nothing behind");

    console.fails(&["rotate-cipher"], &format!("not the passphrase\n{NEW_CIPHER}\n"), 1, "This is not the cipher").await;
    console.fails(&["rotate-cipher"], &format!("{CIPHER}\nshort\n"), 1, "new_cipher").await;
    let _ = console.ok(&["rotate-cipher"], &format!("{CIPHER}\n{NEW_CIPHER}\n")).await;
    console.fails(&["audit", "check"], &format!("{CIPHER}\n"), 1, "This is not the cipher").await;
    let password = console.ok(&["recover", ADMIN], &format!("{NEW_CIPHER}\r\n")).await;
    let admin = engine.anonymous().sign_in(ADMIN, password.trim(), 0).await;
    let change = json!({"current_password": password.trim(), "new_password": NEW_PASSWORD});
    let _ = admin.post("/api/auth/password/reset", change).await.ok();
    let _ = checked(&admin).await;

    let export = console.ok(&["audit", "export"], "").await;
    let events: Vec<Value> = export.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(events.len() > 5 && events[0]["action"] == "audit.export" && events[0]["actor_name"] == "console", "{export}");
    assert!(events.iter().any(|event| event["action"] == "aegis.rotate" && event["actor_name"] == "console"));

    engine.database.tamper("UPDATE audit_events SET ip = 'x' WHERE id = (SELECT min(id) FROM audit_events)").await;
    console.fails(&["audit", "check"], &format!("{NEW_CIPHER}\n"), 1, "The audit was tampered with at event").await;
}

#[tokio::test]
async fn the_console_rotates_keys_and_nobody_is_refused() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Oslo").await;
    let device = engine.device(site).await;
    let second = engine.second().await;
    let console = Console::of(&engine);
    let secret = engine.app.settings.engine_secret_file.clone();
    let bases = [engine.internal_addr, second.internal_addr].map(|addr| Url::parse(&format!("http://{addr}")).expect("a URL"));
    // A worker that was there before, at each process.
    let workers = bases.clone().map(|base| ApiClient::new(vec![base], &secret, uuid::Uuid::new_v4()).expect("a client"));
    let before = std::fs::read_to_string(&secret).expect("a secret");
    let asking = CancellationToken::new();
    let asked = tokio::spawn({
        let (asking, workers) = (asking.clone(), workers.clone());
        let devices = [device.actor.clone(), device.at(&second.base)];
        async move {
            let mut rounds = 0;
            while !asking.is_cancelled() {
                for worker in &workers {
                    let _ = worker.public_base_url().await.expect("no worker is refused");
                }
                for device in &devices {
                    let _ = device.post("/api/agent/heartbeat", json!({})).await.ok();
                }
                rounds += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            rounds
        }
    });
    let _ = console.ok(&["rotate-keys", "engine-secret"], "").await;
    assert_ne!(std::fs::read_to_string(&secret).expect("a secret"), before);
    let secrets = engine.state_dir().join("secrets");
    assert!(!secrets.join("engine.secret.previous").exists() && !secrets.join("engine.secret.next").exists());
    let old = secrets.join("old.secret");
    std::fs::write(&old, before).expect("written");
    std::fs::set_permissions(&old, std::fs::Permissions::from_mode(0o600)).expect("a mode");
    eventually("the old one is refused", SOON, async || {
        let client = ApiClient::new(vec![bases[0].clone()], &old, uuid::Uuid::new_v4()).expect("a client");
        client.public_base_url().await.is_err_and(|error| error.code == "unauthorized").then_some(())
    })
    .await;

    let signed_by = async |base: &Url| {
        let renewal = json!({"guid": device.guid, "refresh_token": device.refresh_token});
        let answer = Actor::anonymous(base).post("/api/agent/token/refresh", renewal).await.ok();
        let header = answer["access_token"].as_str().and_then(|token| token.split_once('.')).expect("a token").0;
        let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).expect("base64")).expect("JSON");
        header["kid"].clone()
    };
    let old_kid = signed_by(&engine.base).await;
    let _ = console.ok(&["rotate-keys", "agent-tokens"], "").await;
    eventually("both sign with the new key", SOON, async || {
        let [first, other] = [signed_by(&engine.base).await, signed_by(&second.base).await];
        tokio::time::sleep(Duration::from_secs(1)).await;
        (first != old_kid && first == other).then_some(())
    })
    .await;
    asking.cancel();
    assert!(asked.await.expect("nobody was refused") > 10);
    console.fails(&["rotate-keys", "agent-tokens"], "", 1, "finish the last rotation first").await;
    // The token of before is good until the old key is given up.
    let _ = device.post("/api/agent/heartbeat", json!({})).await.ok();
    let _ = console.ok(&["rotate-keys", "agent-tokens", "--stolen"], "").await;
    eventually("the old one is refused", SOON, async || {
        let reply = device.post("/api/agent/heartbeat", json!({})).await;
        (reply.status == 401).then_some(())
    })
    .await;
    second.stop().await;

    // Step by step, as on several machines.
    console.fails(&["rotate-keys", "engine-secret", "--step", "switch"], "", 1, "prepare the rotation first").await;
    for (step, file) in [("prepare", "engine.secret.next"), ("switch", "engine.secret"), ("finish", "engine.secret")] {
        let said = console.ok(&["rotate-keys", "engine-secret", "--step", step], "").await;
        assert_eq!(Path::new(said.trim()), secrets.join(file));
    }
    let events = admin.get("/api/audit?action=keys.rotate").await.ok();
    assert_eq!(events["events"][0]["detail"], json!({"key": "engine-secret", "step": "finish", "stolen": false}));
}

#[tokio::test]
async fn the_console_ends_a_store_whose_cipher_is_lost() {
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::Manual).await;
    let admin = engine.admin().await;
    let locked = engine.stranger().await;
    assert_eq!(phase(&locked.base).await, "aegis_unlock_required");
    let console = Console::of(&engine);
    console.fails(&["force-reset"], "", 1, "--yes").await;
    let _ = admin.get("/api/auth/me").await.ok();
    let said = console.say(&["force-reset", "--yes"], "").await;
    assert_eq!(said.code, Some(0), "{}", said.err);
    assert!(said.err.contains("Users to be recovered: 1"), "{}", said.err);
    console.fails(&["force-reset", "--yes"], "", 1, "has not been set up").await;
    console.fails(&["recover", ADMIN], "", 1, "no secret store yet").await;
    assert_eq!(
        (phase(&engine.base).await, phase(&locked.base).await),
        (json!("aegis_setup_required"), json!("aegis_setup_required"))
    );
    eventually("the open process forgets the key", SOON, async || (!engine.app.vault.is_open()).then_some(())).await;
    let admin = recover(&locked.base).await;
    let _ = admin.get("/api/auth/me").await.ok();
    let event = admin.get("/api/audit?action=aegis.force_reset").await.ok()["events"][0].clone();
    assert_eq!((&event["actor_kind"], &event["actor_name"]), (&json!("system"), &json!("console")));
    locked.stop().await;
}

#[tokio::test]
async fn the_console_finds_the_private_postgres() {
    let cluster = TestCluster::start().await;
    let mut console = Console { state_dir: cluster.state_dir().to_owned(), database: None };
    console.fails(&["list"], "", 1, "migrations").await;
    let url = cluster.url().as_str().replace("/postgres?", "/borealis?");
    let migrated = Command::new(built("borealis-api")).arg("migrate").env_clear().env("DATABASE_URL", url).status();
    assert!(migrated.expect("borealis-api starts").success());
    assert_eq!(console.ok(&["list"], "").await.lines().count(), 1);
    let elsewhere = tempfile::tempdir().expect("a folder");
    console.state_dir = elsewhere.path().to_owned();
    console.fails(&["list"], "", 1, "No private Postgres runs in").await;
}

#[tokio::test]
async fn a_process_whose_command_fails_says_so_and_not_what_it_printed() {
    let engine = TestEngine::start().await;
    let _ = engine.admin().await;
    let folder = tempfile::tempdir().expect("a folder");
    let mut processes = Processes::new();
    let port = free_port();
    processes
        .set("DATABASE_URL", engine.database.url.as_str())
        .set("BOREALIS_STATE_DIR", folder.path().display().to_string())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_UNSEAL_COMMAND", "sh -c 'echo canary-out; echo canary-err >&2; exit 3'");
    let mut api = processes.start("borealis-api", &["serve"]);
    let line = "no unseal key for the secret store";
    eventually("it is said twice", SOON, async || (api.output().matches(line).count() >= 2).then_some(())).await;
    let log = api.output();
    assert!(log.contains("it ended with exit status: 3") && log.contains("stays locked") && !log.contains("canary"), "{log}");
    assert!(api.is_running());
    assert_eq!(phase(&Url::parse(&format!("http://127.0.0.1:{port}")).expect("a URL")).await, "aegis_unlock_required");
    let _ = api.terminate().await;
}

#[tokio::test]
async fn a_store_that_cannot_be_read_is_told_from_a_wrong_cipher() {
    let engine = TestEngine::with(|settings| settings.unseal = Unseal::Manual).await;
    let _ = engine.admin().await;
    let locked = engine.stranger().await;
    let nobody = Actor::anonymous(&locked.base);
    let unlock = async |cipher: &str| nobody.post("/api/bootstrap/aegis/unlock", json!({"cipher": cipher})).await;
    let _ = unlock("not the cipher of this store").await.error(401, "invalid_cipher");
    sqlx::query("UPDATE aegis SET kdf = '{}'").execute(&engine.database.pool).await.expect("an update");
    let _ = unlock(CIPHER).await.error(500, "corrupt_secret_store");
    locked.stop().await;
}
