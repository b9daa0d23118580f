//! Postgres away, slow, silent, full, read-only or out of connections, behind a proxy that makes it so. Liveness stays, readiness
//! is truthful, requests get 503 with `Retry-After` and never 500, nobody spins, and all goes on by itself when it is over.

use std::time::{Duration, Instant};

use borealis_tests::{
    Actor, House, Proxy, Reply, Robot, TestDatabase, TestEngine, eventually,
    house::{SOON, cpu_ms},
    proxy::Line,
};
use serde_json::{Value, json};

/// What an API process and a worker may use of a processor while Postgres is away, per second: 5 %, of an unoptimized build.
const IDLE_CPU_MS_PER_S: u64 = 50;
/// How often each may knock at Postgres per second.
const KNOCKS_PER_S: u64 = 15;

/// One API process and one worker, each with a proxy before Postgres, and one machine.
struct Scene {
    house: House,
    robot: Robot,
    script: Value,
    api: Proxy,
    worker: Proxy,
}

impl Scene {
    async fn new() -> Self {
        Self::on(TestDatabase::start().await).await
    }

    async fn on(database: TestDatabase) -> Self {
        let (api, worker) = (Proxy::start(&database.url).await, Proxy::start(&database.url).await);
        let (api_url, worker_url) = (api.url(&database.url), worker.url(&database.url));
        let mut house = House::open(database, &[api_url], &[worker_url]).await;
        let script = house.script().await;
        let robot = house.robot(&[0]).await;
        Self { house, robot, script, api, worker }
    }

    fn both(&self, change: impl Fn(&Proxy)) {
        change(&self.api);
        change(&self.worker);
    }

    async fn job(&self) -> i64 {
        self.house.run_now(&self.house.admin, &self.script, &[&self.robot]).await
    }

    /// A job that the machine is at for `time`.
    async fn running_job(&self, time: Duration) -> i64 {
        self.robot.take(time);
        let job = self.job().await;
        self.house.all_are(job, "Running", 1).await;
        job
    }

    async fn get(&self, path: &str) -> Reply {
        self.house.admin.get(path).await
    }

    async fn is_ready(&self) {
        eventually("the API is ready", SOON, async || (self.get("/ready").await.status == 200).then_some(())).await;
    }

    /// Everything works again: what was under way ends well, and so does what is new.
    async fn goes_on(&self, under_way: &[i64]) {
        self.is_ready().await;
        for job in under_way {
            self.house.all_are(*job, "Success", 1).await;
        }
        self.robot.take(Duration::ZERO);
        let job = self.job().await;
        self.house.all_are(job, "Success", 1).await;
        self.house.workflows_end().await;
        assert!(
            self.robot.memory().sent.values().all(|times| *times <= self.robot.memory().connections),
            "{:?}",
            self.robot.memory()
        );
        assert_eq!(self.robot.memory().sent.len(), under_way.len() + 1);
        self.listens_again().await;
    }

    /// Both processes have their LISTEN connections.
    async fn listens_again(&self) {
        for name in ["borealis-api", "borealis-worker"] {
            eventually(&format!("{name} listens"), SOON, async || {
                let count: i64 = sqlx::query_scalar(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1 AND query LIKE 'LISTEN %'",
                )
                .bind(name)
                .fetch_one(&self.house.database.pool)
                .await
                .expect("a count");
                (count > 0).then_some(())
            })
            .await;
        }
    }
}

/// What people, machines and anonymous callers ask, reading and writing.
async fn requests(admin: &Actor, robot: &Robot) -> Vec<(&'static str, Reply)> {
    let host = json!({"hostnames": [robot.device.hostname], "assembly_guid": "none"});
    let nobody = Actor::anonymous(&admin.base);
    vec![
        ("devices", admin.get("/api/devices").await),
        ("jobs", admin.get("/api/scheduled_jobs").await),
        ("runs", admin.get("/api/runs").await),
        ("site", admin.post("/api/sites", json!({"name": "another"})).await),
        ("quick run", admin.post("/api/scripts/quick_run", host).await),
        ("sign in", nobody.post("/api/auth/login", json!({"username": "admin", "password": "wrong"})).await),
        ("heartbeat", robot.device.actor.post("/api/agent/heartbeat", json!({"metrics": {}})).await),
    ]
}

/// Nobody is told that we are broken, and everybody when to come again.
async fn refused_politely(scene: &Scene) {
    for (what, reply) in requests(&scene.house.admin, &scene.robot).await {
        unavailable(what, &reply);
    }
    let reply = scene.get("/ready").await;
    unavailable("/ready", &reply);
    let _ = scene.get("/health").await.expect(200);
}

#[track_caller]
fn unavailable(what: &str, reply: &Reply) {
    assert_eq!((reply.status, reply.body["error"].as_str()), (503, Some("database_unavailable")), "{what}: {}", reply.text);
    let again = reply.header("retry-after").and_then(|seconds| seconds.parse::<u64>().ok());
    assert!(again.is_some_and(|seconds| (1..=60).contains(&seconds)), "{what}: Retry-After is {again:?}");
}

/// Postgres is away for `time` while a job is under way.
async fn away(time: Duration) {
    let scene = Scene::new().await;
    let under_way = scene.running_job(Duration::from_secs(2)).await;
    let pids = [scene.house.apis[0].process.as_ref().expect("a process").pid(), scene.house.workers[0].pid()];
    let cpu = || pids.map(cpu_ms);
    let knocks = || [scene.api.knocks(), scene.worker.knocks()];
    scene.both(Proxy::go_away);
    let gone = Instant::now();
    // Requests are for what they are answered, and not counted among what the processes do by themselves.
    refused_politely(&scene).await;
    let (cpu_before, knocks_before, began) = (cpu(), knocks(), Instant::now());
    while gone.elapsed() < time {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let _ = scene.get("/health").await.expect(200);
    }
    let seconds = began.elapsed().as_secs().max(1);
    for (index, name) in ["API", "worker"].into_iter().enumerate() {
        let (used, knocked) = (cpu()[index] - cpu_before[index], knocks()[index] - knocks_before[index]);
        println!("{name}: {used} ms of processor and {knocked} knocks in {seconds} s");
        assert!(used <= 200 + seconds * IDLE_CPU_MS_PER_S, "the {name} used {used} ms of processor in {seconds} s");
        assert!(knocked <= 20 + seconds * KNOCKS_PER_S, "the {name} knocked {knocked} times in {seconds} s");
    }
    refused_politely(&scene).await;
    assert_eq!(scene.robot.memory().connections, 1, "a machine's socket survives");
    scene.both(Proxy::come_back);
    scene.goes_on(&[under_way]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_away_for_five_seconds() {
    away(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_away_for_a_minute() {
    away(Duration::from_secs(60)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_answers_nothing_for_a_while() {
    let scene = Scene::new().await;
    let under_way = scene.running_job(Duration::from_secs(1)).await;
    scene.both(|proxy| proxy.set(Line { stalls: true, ..Line::default() }));
    let _ = scene.get("/health").await.expect(200);
    let reply = scene.get("/ready").await;
    assert_eq!(reply.status, 503, "/ready: {}", reply.text);
    assert!(reply.header("retry-after").is_some(), "/ready: {:?}", reply.headers);
    let reply = scene.get("/api/devices").await;
    assert_eq!(reply.status, 503, "a request without an answer: {}", reply.text);
    assert!(reply.header("retry-after").is_some(), "a request without an answer: {:?}", reply.headers);
    scene.both(Proxy::come_back);
    scene.goes_on(&[under_way]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_of_postgres_takes_two_seconds() {
    let scene = Scene::new().await;
    let under_way = scene.running_job(Duration::from_secs(1)).await;
    scene.both(|proxy| proxy.set(Line { latency: Duration::from_secs(1), ..Line::default() }));
    let _ = scene.get("/health").await.expect(200);
    // Slow is not broken: requests get their answer or are asked to come again.
    for (what, reply) in requests(&scene.house.admin, &scene.robot).await {
        assert!(reply.status < 500 || reply.status == 503, "{what}: {} {}", reply.status, reply.text);
        assert!(reply.status < 500 || reply.header("retry-after").is_some(), "{what}: {:?}", reply.headers);
    }
    // The run goes on even so.
    scene.house.all_are(under_way, "Success", 1).await;
    scene.both(Proxy::come_back);
    sqlx::query("DELETE FROM sites WHERE name = 'another'").execute(&scene.house.database.pool).await.expect("a clean-up");
    scene.goes_on(&[under_way]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_narrow_line_only_slows_things_down() {
    let scene = Scene::new().await;
    scene.both(|proxy| proxy.set(Line { bytes_per_second: Some(40_000), ..Line::default() }));
    scene.robot.take(Duration::ZERO);
    let job = scene.job().await;
    scene.house.all_are(job, "Success", 1).await;
    scene.both(Proxy::come_back);
    scene.goes_on(&[job]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_listen_connections_are_cut() {
    let scene = Scene::new().await;
    scene.listens_again().await;
    for _ in 0..3 {
        assert!(scene.api.cut_listeners() > 0 && scene.worker.cut_listeners() > 0, "somebody listens");
        // Nothing but the listeners was cut: requests are answered as ever.
        let _ = scene.get("/ready").await.expect(200);
        scene.robot.take(Duration::ZERO);
        let job = scene.job().await;
        scene.house.all_are(job, "Success", 1).await;
        scene.listens_again().await;
    }
    assert_eq!(scene.robot.memory().connections, 1, "a machine's socket survives");
    scene.house.workflows_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_connections_are_cut_again_and_again() {
    let scene = Scene::new().await;
    let mut jobs = Vec::new();
    scene.robot.take(Duration::from_millis(300));
    for _ in 0..10 {
        // A request whose connection is cut may be refused; then it is made again.
        let admin = &scene.house.admin;
        let body = json!({
            "name": "hello", "schedule": {"type": "immediately"}, "execution_context": "system",
            "components": [{"kind": "script", "assembly_guid": scene.script}],
            "targets": [{"kind": "device", "device_guid": scene.robot.device.guid, "hostname": scene.robot.device.hostname}],
        });
        let made = eventually("a job is made", SOON, async || {
            let reply = admin.post("/api/scheduled_jobs", body.clone()).await;
            assert!(reply.status < 400 || reply.status == 503, "{} {}", reply.status, reply.text);
            (reply.status < 400).then_some(reply.body)
        })
        .await;
        jobs.push(made["job"]["id"].as_i64().expect("a job"));
        scene.both(Proxy::cut);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    for job in &jobs {
        scene.house.all_are(*job, "Success", 1).await;
    }
    scene.house.workflows_end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_is_exhausted() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("Home").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let mut held = Vec::new();
    while let Ok(connection) = engine.app.pool.acquire().await {
        held.push(connection);
    }
    let (devices, site, heartbeat, ready) = tokio::join!(
        admin.get("/api/devices"),
        admin.post("/api/sites", json!({"name": "another"})),
        device.actor.post("/api/agent/heartbeat", json!({"metrics": {}})),
        admin.get("/ready"),
    );
    for (what, reply) in [("devices", devices), ("site", site), ("heartbeat", heartbeat), ("/ready", ready)] {
        unavailable(what, &reply);
    }
    let _ = admin.get("/health").await.expect(200);
    drop(held);
    let _ = admin.get("/ready").await.expect(200);
    let _ = admin.post("/api/sites", json!({"name": "another"})).await.expect(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_takes_no_more_connections() {
    let scene = Scene::new().await;
    let under_way = scene.running_job(Duration::from_secs(1)).await;
    let database = scene.house.database.url.path().trim_start_matches('/').to_owned();
    // Closed for new ones, and the old ones are ended: as when others have used all of them up.
    let close = format!("ALTER DATABASE {database} CONNECTION LIMIT 0");
    // Superusers are let in all the same, so the processes must not be one.
    let superuser: bool = sqlx::query_scalar("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        .fetch_one(&scene.house.database.pool)
        .await
        .expect("the role");
    if superuser {
        scene.both(Proxy::go_away);
    } else {
        execute(&scene, &close).await;
        scene.both(Proxy::cut);
    }
    refused_politely(&scene).await;
    execute(&scene, &format!("ALTER DATABASE {database} CONNECTION LIMIT -1")).await;
    scene.both(Proxy::come_back);
    scene.goes_on(&[under_way]).await;
}

async fn execute(scene: &Scene, sql: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned()))
        .execute(&scene.house.database.pool)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_read_only() {
    let scene = Scene::new().await;
    let under_way = scene.running_job(Duration::from_secs(1)).await;
    let database = scene.house.database.url.path().trim_start_matches('/').to_owned();
    execute(&scene, &format!("ALTER DATABASE {database} SET default_transaction_read_only = on")).await;
    scene.both(Proxy::cut);
    eventually("readiness tells", SOON, async || {
        let reply = scene.get("/ready").await;
        (reply.status == 503 && reply.body["error"] == "database_read_only").then_some(())
    })
    .await;
    let _ = scene.get("/health").await.expect(200);
    // What only reads is answered, the rest may come again.
    let _ = scene.get("/api/assemblies").await.expect(200);
    unavailable("a new site", &scene.house.admin.post("/api/sites", json!({"name": "another"})).await);
    execute(
        &scene,
        &format!("SET default_transaction_read_only = off; ALTER DATABASE {database} RESET default_transaction_read_only"),
    )
    .await;
    scene.both(Proxy::cut);
    scene.goes_on(&[under_way]).await;
}

/// The database on a small file system that is filled to the last byte.
#[tokio::test(flavor = "multi_thread")]
async fn the_disk_is_full() {
    let database = TestDatabase::start().await;
    let Some(disk) = Disk::under(&database).await else {
        println!(
            "not shown here: only root may mount a small file system, and nothing else is full without filling the machine's own"
        );
        return;
    };
    let scene = Scene::on(database).await;
    let under_way = scene.running_job(Duration::from_secs(3)).await;
    disk.fill();
    let admin = &scene.house.admin;
    let refused = eventually("something is refused", SOON, async || {
        let payload = json!({"name": "x", "type": "bash", "script": "#".repeat(200_000), "timeout_seconds": 60});
        let reply = admin.post("/api/assemblies", json!({"domain": "user", "display_name": "x", "payload": payload})).await;
        (reply.status != 201).then_some(reply)
    })
    .await;
    unavailable("a script without room", &refused);
    let _ = scene.get("/health").await.expect(200);
    let _ = scene.get("/api/devices").await.expect(200);
    // The machine's result arrives while there is no room for it; it keeps it until there is.
    tokio::time::sleep(Duration::from_secs(5)).await;
    disk.clear();
    scene.goes_on(&[under_way]).await;
    drop(scene);
}

/// A small file system with the tablespace of one database.
struct Disk {
    folder: tempfile::TempDir,
    space: String,
    admin: url::Url,
}

impl Disk {
    /// Moves `database` to one of its own, where that is possible.
    async fn under(database: &TestDatabase) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        // Whoever owns the server's socket is who the server runs as.
        let socket =
            database.url.query_pairs().find(|(name, _)| name == "host").map(|(_, folder)| folder.into_owned()).expect("a socket");
        let socket = std::path::Path::new(&socket).join(format!(".s.PGSQL.{}", database.url.port().unwrap_or(5432)));
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(socket).expect("the server's socket"));
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size=48m,mode=0700,uid={owner}"), "borealis-test"])
            .arg(folder.path())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            return None;
        }
        let name = database.url.path().trim_start_matches('/').to_owned();
        let mut admin = database.url.clone();
        admin.set_path("postgres");
        let disk = Self { folder, space: format!("small_{name}"), admin };
        for sql in [
            format!("CREATE TABLESPACE {} LOCATION '{}'", disk.space, disk.folder.path().display()),
            format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"),
            format!("ALTER DATABASE {name} SET TABLESPACE {}", disk.space),
        ] {
            disk.ask(&sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        Some(disk)
    }

    async fn ask(&self, sql: &str) -> sqlx::Result<()> {
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(self.admin.as_str()).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await?;
        Ok(())
    }

    /// Leaves no byte free.
    fn fill(&self) {
        let mut ballast = std::fs::File::create(self.folder.path().join("ballast")).expect("a file");
        while std::io::Write::write_all(&mut ballast, &[0; 4096]).is_ok() {}
    }

    fn clear(&self) {
        std::fs::remove_file(self.folder.path().join("ballast")).expect("the file");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.folder.path().join("ballast"));
        let name = self.space.trim_start_matches("small_").to_owned();
        let sql = [format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"), format!("DROP TABLESPACE IF EXISTS {}", self.space)];
        std::thread::scope(|scope| {
            let cleaning = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
                runtime.block_on(async {
                    for sql in &sql {
                        self.ask(sql).await.ok()?;
                    }
                    Some(())
                })
            });
            let _ = cleaning.join();
        });
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.folder.path()).status();
    }
}
