//! An engine whose database was restored from a backup does nothing before an administrator has released it, and one whose standby was
//! promoted goes on.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use borealis_engine::{
    db,
    hold::{Guard, Reason},
};
use borealis_tests::{
    Actor, TestCluster, TestDatabase, eventually,
    house::{House, SOON},
    processes::free_port,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use url::Url;

/// How long is waited for what must not happen. Without a hold it happens within a second.
const IDLE: Duration = Duration::from_secs(4);

/// Runs a program of the server's version and gives what it said when it failed.
fn run(program: &Path, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("a program of PostgreSQL");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

async fn occurrences(pool: &PgPool, job: i64) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM job_occurrences WHERE job_id = $1").bind(job).fetch_one(pool).await.expect("a count")
}

/// Has the epoch move as it does every minute, and waits until the state folder knows.
async fn a_minute_passes(pool: &PgPool, folder: &Path) {
    let epoch: i64 = sqlx::query_scalar("UPDATE engine_epoch SET moved_at = now() - interval '2 minutes' RETURNING epoch")
        .fetch_one(pool)
        .await
        .expect("the epoch");
    eventually("the epoch moves", SOON, async || {
        let kept: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("epoch")).ok()?).ok()?;
        (kept["epoch"].as_i64()? > epoch).then_some(())
    })
    .await;
}

async fn ready(base: &Url) -> Value {
    Actor::anonymous(base).get("/ready").await.ok()
}

async fn is_held(base: &Url, held: bool) {
    eventually(&format!("held: {held}"), SOON, async || (ready(base).await["held"] == held).then_some(())).await;
}

/// `borealis-api admin ...` on the engine's state folder: how it ended and what it said.
async fn console(house: &mut House, arguments: &[&str]) -> (bool, String) {
    let state = house.state_dir().join("engine").display().to_string();
    house.processes.set("BOREALIS_STATE_DIR", state).set("DATABASE_URL", house.database.url.to_string());
    let arguments = [&["admin"], arguments].concat();
    let mut admin = house.processes.start("borealis-api", &arguments);
    let status = admin.wait(SOON).await;
    (status.success(), admin.output())
}

/// Makes a job with the script for the device, whose only instant comes in a moment.
async fn due_in_a_moment(house: &House, script: &Value, device: &borealis_tests::Device) -> i64 {
    let job = json!({
        "name": "once", "schedule": {"type": "once", "start": "2099-01-01T00:00:00Z"}, "execution_context": "system",
        "components": [{"kind": "script", "assembly_guid": script}],
        "targets": [{"kind": "device", "device_guid": device.guid, "hostname": device.hostname}],
    });
    let made = house.admin.post("/api/scheduled_jobs", job).await.ok();
    let job = made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"));
    sqlx::query("UPDATE scheduled_jobs SET next_due_at = now() + interval '3 seconds' WHERE id = $1")
        .bind(job)
        .execute(&house.database.pool)
        .await
        .expect("a job");
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_is_held_until_it_is_released() {
    let cluster = TestCluster::start().await;
    let database = TestDatabase::on(cluster.url()).await;
    let (url, pool) = (database.url.clone(), database.pool.clone());
    let mut house = House::open(database, std::slice::from_ref(&url), std::slice::from_ref(&url)).await;
    let folder = house.state_dir().join("engine");
    let base = house.admin.base.clone();
    let script = house.script().await;
    let robot = house.robot(&[0]).await;
    assert_eq!(ready(&base).await["held"], false);

    // The backup is made, then an instant runs, and time goes on.
    let job = due_in_a_moment(&house, &script, &robot.device).await;
    let dump = house.state_dir().join("backup.dump");
    run(&cluster.program("pg_dump"), &["-Fc", "-f", &dump.display().to_string(), "-d", url.as_str()]).expect("a backup");
    assert_eq!(occurrences(&pool, job).await, 0, "the backup was made before the instant came");
    house.all_are(job, "Success", 1).await;
    a_minute_passes(&pool, &folder).await;

    beside(&cluster, &mut house, &url, &dump, job).await;

    // Restored after the engine ran it, and under it.
    eventually("the restore commits", SOON, async || {
        let restored = run(
            &cluster.program("pg_restore"),
            &["--clean", "--if-exists", "--single-transaction", "-d", url.as_str(), &dump.display().to_string()],
        );
        // It may meet a transaction of the engine in a deadlock.
        restored.inspect_err(|said| eprintln!("{said}")).ok()
    })
    .await;
    is_held(&base, true).await;
    tokio::time::sleep(IDLE).await;
    assert_eq!(occurrences(&pool, job).await, 0, "the instant was decided once more");
    let hold = house.admin.get("/api/engine/hold").await.ok();
    assert_eq!((&hold["held"], &hold["reason"]), (&json!(true), &json!("older_database")), "{hold}");
    assert!(house.apis[0].process.as_ref().expect("it runs").output().contains("THE ENGINE IS HELD"));
    assert!(house.workers[0].output().contains("THE ENGINE IS HELD"));
    let connected = house.admin.get("/api/agents").await.ok();
    assert!(connected.to_string().contains(&robot.device.guid.to_string()), "agents stay connected: {connected}");

    // A restart changes nothing, and a worker alone does nothing.
    let mut old = house.workers.remove(0);
    old.kill_now();
    house.apis[0].process.as_mut().expect("it runs").kill_now();
    house.restart(0).await;
    let secret = house.state_dir().join("worker.secret").display().to_string();
    house.processes.set("BOREALIS_ENGINE_SECRET_FILE", secret);
    let worker = house.processes.start("borealis-worker", &["run"]);
    house.workers.push(worker);
    is_held(&base, true).await;

    let (done, said) = console(&mut house, &["release"]).await;
    assert!(!done && said.contains("restored from a backup") && said.contains("--yes"), "{said}");
    assert!(said.contains("Jobs that are due: 1") && said.contains("once"), "{said}");
    assert_eq!(occurrences(&pool, job).await, 0, "showing it releases nothing");
    let (done, said) = console(&mut house, &["release", "--skip-missed", "--yes"]).await;
    assert!(done, "{said}");
    is_held(&base, false).await;
    house.all_are(job, "Skipped", 1).await;

    // What comes now runs: the agent does not take it for something it has had.
    let admin = house.admin.at(&base);
    let job = house.run_now(&admin, &script, &[&robot]).await;
    house.all_are(job, "Success", 1).await;

    let (done, said) = console(&mut house, &["hold"]).await;
    assert!(done, "{said}");
    is_held(&base, true).await;
    let job = house.run_now(&admin, &script, &[&robot]).await;
    tokio::time::sleep(IDLE).await;
    assert_eq!(occurrences(&pool, job).await, 0, "held, and decided");
    let (done, said) = console(&mut house, &["release", "--yes"]).await;
    assert!(done, "{said}");
    house.all_are(job, "Success", 1).await;
    let (done, said) = console(&mut house, &["release", "--yes"]).await;
    assert!(!done && said.contains("not held"), "{said}");
    let audited: Vec<String> = sqlx::query_scalar(
        "SELECT action || ' ' || coalesce(detail ->> 'reason', '') FROM audit_events WHERE action LIKE 'engine.%' ORDER BY id",
    )
    .fetch_all(&pool)
    .await
    .expect("the audit");
    assert_eq!(
        audited,
        ["engine.hold older_database", "engine.release older_database", "engine.hold asked", "engine.release asked"]
    );

    // A worker decides nothing before an API process has confirmed the database.
    house.workers.remove(0).kill();
    house.apis[0].process.take().expect("it runs").kill();
    let secret = house.state_dir().join("worker.secret").display().to_string();
    house.processes.set("BOREALIS_ENGINE_SECRET_FILE", secret);
    let worker = house.processes.start("borealis-worker", &["run"]);
    house.workers.push(worker);
    sqlx::query("UPDATE scheduled_jobs SET enabled = true, next_due_at = now() WHERE id = $1")
        .bind(job)
        .execute(&pool)
        .await
        .expect("a job");
    tokio::time::sleep(IDLE).await;
    assert_eq!(occurrences(&pool, job).await, 1, "decided without an API process");
    house.restart(0).await;
    eventually("it is decided", SOON, async || (occurrences(&pool, job).await == 2).then_some(())).await;
}

/// The backup is restored beside the engine, which goes on, and another engine is started on it with a copy of the state folder.
async fn beside(cluster: &TestCluster, house: &mut House, url: &Url, dump: &Path, job: i64) {
    let mut other = url.clone();
    other.set_path("/beside");
    let sql = "CREATE DATABASE beside";
    run(&cluster.program("psql"), &["-q", "-X", "-d", url.as_str(), "-c", sql]).expect("a database");
    run(&cluster.program("pg_restore"), &["--single-transaction", "-d", other.as_str(), &dump.display().to_string()])
        .expect("a restored database");
    let state = house.state_dir().join("beside");
    let copied = Command::new("cp").arg("-a").arg(house.state_dir().join("engine")).arg(&state).status().expect("cp");
    assert!(copied.success());
    let (listen, internal) = (free_port(), free_port());
    let environment = [
        ("BOREALIS_STATE_DIR", state.display().to_string()),
        ("BOREALIS_ENGINE_SECRET_FILE", state.join("secrets/engine.secret").display().to_string()),
        ("DATABASE_URL", other.to_string()),
        ("BOREALIS_LISTEN", format!("127.0.0.1:{listen}")),
        ("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{internal}")),
        ("BOREALIS_INTERNAL_URL", format!("http://127.0.0.1:{internal}")),
    ];
    let mut processes = borealis_tests::Processes::new();
    for (name, value) in environment {
        processes.set(name, value);
    }
    let _api = processes.start("borealis-api", &["serve"]);
    let _worker = processes.start("borealis-worker", &["run"]);
    eventually("the API listens", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", listen)).await.ok()).await;
    is_held(&Url::parse(&format!("http://127.0.0.1:{listen}")).expect("a URL"), true).await;
    tokio::time::sleep(IDLE).await;
    let options = db::Options { url: other.to_string(), max_connections: 1, application_name: "tests".into() };
    let pool = db::connect(&options).expect("a pool");
    assert_eq!(occurrences(&pool, job).await, 0, "the instant was decided once more");
    let reason: String = sqlx::query_scalar("SELECT held_reason FROM engine_epoch").fetch_one(&pool).await.expect("a reason");
    assert_eq!(reason, "other_database");
    pool.close().await;
    assert_eq!(ready(&house.admin.base).await["held"], false, "the engine beside goes on");
}

/// The engine's database on a server.
fn pool(cluster: &TestCluster) -> PgPool {
    let mut url = cluster.url();
    url.set_path("/borealis");
    db::connect(&db::Options { url: url.to_string(), max_connections: 1, application_name: "tests".into() }).expect("a pool")
}

async fn move_epoch(guard: &Guard, pool: &PgPool) -> i64 {
    let _ =
        sqlx::query("UPDATE engine_epoch SET moved_at = now() - interval '2 minutes'").execute(pool).await.expect("the epoch");
    let standing = guard.look(pool).await.expect("a look");
    assert_eq!(standing.held, None);
    standing.at_least
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_is_not_held_and_one_that_was_far_behind_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let guard = Guard::new(folder.path());
    let primary = TestCluster::start().await;
    let at_primary = pool(&primary);
    borealis_workflows::setup(&at_primary).await.expect("a database of this version");
    let started = guard.look(&at_primary).await.expect("a look").at_least;
    assert_eq!(move_epoch(&guard, &at_primary).await, started + 1);
    at_primary.close().await;
    let stopped = primary.stop().await;
    let (near, far) = (stopped.standby().await, stopped.standby().await);
    let primary = stopped.start().await;
    let at_primary = pool(&primary);
    assert_eq!(move_epoch(&guard, &at_primary).await, started + 2);
    at_primary.close().await;

    // The last move had not reached it.
    let at_near = pool(&near);
    assert_eq!(
        guard.look(&at_near).await.map(|standing| standing.held.is_some()).ok().filter(|held| *held),
        None,
        "not promoted yet"
    );
    let _ = sqlx::query("SELECT pg_promote()").execute(&at_near).await.expect("a promotion");
    let standing = guard.look(&at_near).await.expect("a look");
    assert_eq!((standing.held, standing.at_least), (None, started + 1));
    assert_eq!(move_epoch(&guard, &at_near).await, started + 2);

    // Minutes are missing.
    for _ in 0..2 {
        let _ = move_epoch(&guard, &at_near).await;
    }
    let at_far = pool(&far);
    let _ = sqlx::query("SELECT pg_promote()").execute(&at_far).await.expect("a promotion");
    let standing = guard.look(&at_far).await.expect("a look");
    assert_eq!(standing.held.map(|held| held.reason), Some(Reason::OlderDatabase));

    // So does a process that starts on the folder.
    let again = Guard::new(folder.path()).look(&at_far).await.expect("a look");
    assert!(again.held.is_some());
}

/// Where a state folder keeps what it has seen.
#[tokio::test]
async fn a_state_folder_that_cannot_be_read_confirms_nothing() {
    let database = TestDatabase::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file: PathBuf = folder.path().join("epoch");
    std::fs::write(&file, "garbage").expect("a file");
    let guard = Guard::new(folder.path());
    assert_eq!(guard.look(&database.pool).await.map_err(|error| error.code), Err("state_folder_unusable"));
    assert_eq!(guard.at_least(), borealis_engine::hold::EVERY_EPOCH);
    std::fs::remove_file(&file).expect("a file");
    let first = guard.look(&database.pool).await.expect("a look").at_least;
    // Any number of processes, each with a folder of its own.
    let other_folder = tempfile::tempdir().expect("a folder");
    let other = Guard::new(other_folder.path());
    assert_eq!(other.look(&database.pool).await.expect("a look").at_least, first + 1, "its start is counted");
    assert_eq!(guard.look(&database.pool).await.expect("a look").at_least, first + 1, "and seen");
    assert_eq!(guard.look(&database.pool).await.expect("a look").at_least, first + 1, "a minute has not passed");
}
