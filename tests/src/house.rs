//! An engine of real processes: any number of API processes and workers on one database, each with a way to it of its own,
//! and machines that do as they are told.

use std::{net::SocketAddr, path::Path, time::Duration};

use serde_json::{Value, json};
use url::Url;

use crate::{
    Actor, Child, Device, Processes, TestDatabase,
    actor::{Enrollment, new_key},
    engine::{bootstrap, id_text},
    eventually,
    processes::free_port,
    robot::Robot,
};

/// How long something with nothing in its way may take. Far above what it takes.
pub const SOON: Duration = Duration::from_secs(60);

/// One API process.
#[derive(Debug)]
pub struct Api {
    /// The process; none while it is down.
    pub process: Option<Child>,
    /// Where it serves.
    pub addr: SocketAddr,
    /// Its base URL.
    pub base: Url,
    internal: String,
    database: Url,
}

impl Api {
    /// Where workers reach it.
    #[must_use]
    pub fn internal_addr(&self) -> &str {
        &self.internal
    }
}

/// The engine.
#[derive(Debug)]
pub struct House {
    /// The first administrator, at the first API process.
    pub admin: Actor,
    /// The API processes.
    pub apis: Vec<Api>,
    /// The workers.
    pub workers: Vec<Child>,
    /// The site.
    pub site: i64,
    code: String,
    machines: usize,
    state: tempfile::TempDir,
    /// Its processes, to start more of them.
    pub processes: Processes,
    /// The database, for what a test looks at itself. Dropped after what uses it.
    pub database: TestDatabase,
}

impl House {
    /// Starts an API process for each of `apis` and a worker for each of `workers`, which are their ways to `database`.
    pub async fn open(database: TestDatabase, apis: &[Url], workers: &[Url]) -> Self {
        Self::open_with(database, apis, workers, |_, _| {}).await
    }

    /// The same, with something in the environment of each API process that is its own: `dress` is called before each start.
    pub async fn open_with(database: TestDatabase, apis: &[Url], workers: &[Url], dress: impl Fn(usize, &mut Processes)) -> Self {
        let state = tempfile::tempdir().expect("a folder");
        let mut processes = Processes::new();
        let engine = state.path().join("engine");
        processes.set("BOREALIS_ENROLL_PER_MINUTE", "100000").set("BOREALIS_CONNECTIONS_PER_ADDRESS", "100000");
        let mut started = Vec::new();
        for (index, database) in apis.iter().enumerate() {
            let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let base = Url::parse(&format!("http://{addr}")).expect("a URL");
            let internal = format!("127.0.0.1:{}", free_port());
            let mut api = Api { process: None, addr, base, internal, database: database.clone() };
            dress(index, &mut processes);
            start(&mut processes, &mut api, &engine).await;
            started.push(api);
        }
        let admin = bootstrap(&started.first().expect("an API process").base, &engine).await;
        let site = admin.post("/api/sites", json!({"name": "Lab"})).await.ok();
        let internal: Vec<String> = started.iter().map(|api| format!("http://{}", api.internal)).collect();
        processes.set("BOREALIS_INTERNAL_URL", internal.join(","));
        // A worker has the engine secret and none of the other keys.
        let secret = state.path().join("worker.secret");
        std::fs::copy(engine.join("secrets/engine.secret"), &secret).expect("a copy of the engine secret");
        processes.set("BOREALIS_ENGINE_SECRET_FILE", secret.display().to_string()).unset("BOREALIS_STATE_DIR");
        let workers = workers
            .iter()
            .map(|database| {
                processes.set("DATABASE_URL", database.as_str());
                processes.start("borealis-worker", &["run"])
            })
            .collect();
        Self {
            admin,
            apis: started,
            workers,
            site: site["id"].as_i64().expect("a site"),
            code: site["enrollment_code"].as_str().expect("a code").to_owned(),
            machines: 0,
            state,
            processes,
            database,
        }
    }

    /// Starts an API process that is down again, at the same addresses.
    pub async fn restart(&mut self, index: usize) {
        start(&mut self.processes, &mut self.apis[index], &self.state.path().join("engine")).await;
    }

    /// The state folder of the API processes.
    #[must_use]
    pub fn state_dir(&self) -> &std::path::Path {
        self.state.path()
    }

    /// The engine's keys.
    ///
    /// # Panics
    /// When they cannot be read.
    #[must_use]
    pub fn keys(&self) -> borealis_engine::keys::Keys {
        borealis_engine::keys::Keys::load_or_create(&self.state.path().join("engine/secrets"), None).expect("the engine's keys")
    }

    /// A new device, enrolled and approved.
    pub async fn device(&mut self) -> Device {
        self.machines += 1;
        let hostname = format!("machine-{}", self.machines);
        let pending = Enrollment::request(&Actor::anonymous(&self.admin.base), &hostname, &self.code, new_key()).await;
        let found = self.admin.get("/api/admin/device-approvals?status=pending").await.ok();
        let approvals = found["approvals"].as_array().expect("approvals");
        let approval =
            approvals.iter().find(|approval| approval["approval_reference"] == pending.reference()).expect("the approval");
        let _ =
            self.admin.post(&format!("/api/admin/device-approvals/{}/approve", id_text(&approval["id"])), json!({})).await.ok();
        pending.finish(self.site).await
    }

    /// A new machine that connects to the first of these API processes that takes it, and comes again when it is cut off.
    pub async fn robot(&mut self, apis: &[usize]) -> Robot {
        let device = self.device().await;
        let addresses = apis.iter().map(|index| self.apis[*index].addr).collect();
        let robot = Robot::start(device, addresses);
        robot.connected().await;
        robot
    }

    /// The id of a new script.
    pub async fn script(&self) -> Value {
        let payload = json!({"name": "hello", "type": "bash", "script": "echo hello\n", "timeout_seconds": 120});
        let body = json!({"domain": "user", "display_name": "hello", "payload": payload});
        self.admin.post("/api/assemblies", body).await.expect(201).body["assembly_guid"].clone()
    }

    /// Has `actor` make a job that runs the script now on these machines; its id.
    pub async fn run_now(&self, actor: &Actor, script: &Value, robots: &[&Robot]) -> i64 {
        let job = json!({
            "name": "hello", "schedule": {"type": "immediately"}, "execution_context": "system",
            "components": [{"kind": "script", "assembly_guid": script}],
            "targets": robots.iter().map(|robot| json!({"kind": "device", "device_guid": robot.device.guid, "hostname": robot.device.hostname})).collect::<Vec<_>>(),
        });
        let made = actor.post("/api/scheduled_jobs", job).await.ok();
        made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"))
    }

    /// How many runs of a job have each status.
    pub async fn statuses(&self, job: i64) -> std::collections::BTreeMap<String, i64> {
        let rows: Vec<(String, i64)> =
            sqlx::query_as("SELECT status, count(*) FROM scheduled_job_runs WHERE job_id = $1 GROUP BY status")
                .bind(job)
                .fetch_all(&self.database.pool)
                .await
                .expect("the runs");
        rows.into_iter().collect()
    }

    /// Waits until `count` runs of a job are `status` and none is anything else.
    pub async fn all_are(&self, job: i64, status: &str, count: usize) {
        let wanted = std::collections::BTreeMap::from([(status.to_owned(), i64::try_from(count).expect("a count"))]);
        eventually(&format!("{count} runs of job {job} are {status}"), SOON, async || {
            (self.statuses(job).await == wanted).then_some(())
        })
        .await;
    }

    /// Waits until the workflow runs of all jobs have ended, well or because they were cancelled, and nothing of them is left over.
    pub async fn workflows_end(&self) {
        eventually("the workflow runs end", SOON, async || {
            let open: i64 =
                sqlx::query_scalar("SELECT count(*) FROM workflow_runs WHERE state NOT IN ('succeeded', 'cancelled')")
                    .fetch_one(&self.database.pool)
                    .await
                    .expect("a count");
            (open == 0).then_some(())
        })
        .await;
        for (what, sql) in [
            ("open occurrences", "SELECT count(*) FROM job_occurrences WHERE state <> 'closed'"),
            ("activities that have not ended", "SELECT count(*) FROM activity_history WHERE delivery <> 'done'"),
            ("leases", "SELECT count(*) FROM workflow_runs WHERE lease_token IS NOT NULL"),
            ("events that were refused", "SELECT count(*) FROM activity_events WHERE kind = 'refused'"),
        ] {
            let count: i64 = sqlx::query_scalar(sql).fetch_one(&self.database.pool).await.expect("a count");
            assert_eq!(count, 0, "{what}");
        }
    }
}

async fn start(processes: &mut Processes, api: &mut Api, state_dir: &Path) {
    processes
        .set("BOREALIS_STATE_DIR", state_dir.display().to_string())
        .set("BOREALIS_ENGINE_SECRET_FILE", state_dir.join("secrets/engine.secret").display().to_string())
        .set("DATABASE_URL", api.database.as_str())
        .set("BOREALIS_LISTEN", api.addr.to_string())
        .set("BOREALIS_INTERNAL_LISTEN", api.internal.clone());
    api.process = Some(processes.start("borealis-api", &["serve"]));
    let addr = api.addr;
    eventually("the API listens", SOON, async || tokio::net::TcpStream::connect(addr).await.ok()).await;
}

/// The processor time a process has used, in milliseconds.
///
/// # Panics
/// When there is no such process.
#[must_use]
pub fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    // utime and stime, in ticks of 10 ms.
    fields[11..13].iter().filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10
}
