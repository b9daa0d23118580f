//! The README's walk with real processes: API, worker and agent, from an empty database to a script's own output; then the
//! same with what goes wrong in practice.

use std::time::Duration;

use borealis_tests::{
    Actor, Child, Processes, TestDatabase,
    engine::{bootstrap, id_text},
    eventually,
    processes::free_port,
};
use serde_json::{Value, json};
use url::Url;

/// How long a step with nothing in its way may take. Far above what it takes.
const SOON: Duration = Duration::from_secs(60);
const HOSTNAME: &str = "walker";

/// An engine of real processes, with one agent, enrolled and connected.
struct House {
    admin: Actor,
    worker: Option<Child>,
    agent: Option<Child>,
    _api: Child,
    processes: Processes,
    _state: tempfile::TempDir,
    _database: TestDatabase,
}

impl House {
    async fn new() -> Self {
        let database = TestDatabase::start().await;
        let state = tempfile::tempdir().expect("a folder");
        let folder = |name: &str| state.path().join(name).display().to_string();
        let (port, internal_port) = (free_port(), free_port());
        let base = Url::parse(&format!("http://127.0.0.1:{port}")).expect("a URL");
        let mut processes = Processes::new();
        processes
            .set("DATABASE_URL", database.url.as_str())
            .set("BOREALIS_STATE_DIR", folder("engine"))
            .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
            .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{internal_port}"))
            .set("BOREALIS_INTERNAL_URL", format!("http://127.0.0.1:{internal_port}"))
            .set("BOREALIS_ENGINE_SECRET_FILE", folder("engine/secrets/engine.secret"))
            .set("BOREALIS_AGENT_SERVER_URL", base.as_str())
            .set("BOREALIS_AGENT_STATE_DIR", folder("agent"))
            .set("BOREALIS_AGENT_HOSTNAME", HOSTNAME);
        let api = processes.start("borealis-api", &["serve"]);
        eventually("the API listens", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        let worker = Some(processes.start("borealis-worker", &["run"]));

        let admin = bootstrap(&base).await;
        let site = admin.post("/api/sites", json!({"name": "Lab"})).await.ok();
        processes.set("BOREALIS_AGENT_ENROLLMENT_CODE", site["enrollment_code"].as_str().expect("a code"));
        let agent = Some(processes.start("borealis-agent", &["run"]));
        let approval = eventually("the agent asks to be enrolled", SOON, async || {
            let found = admin.get("/api/admin/device-approvals?status=pending").await.ok();
            found["approvals"].get(0).map(|approval| id_text(&approval["id"]))
        })
        .await;
        let _ = admin.post(&format!("/api/admin/device-approvals/{approval}/approve"), json!({})).await.ok();
        let house = Self { admin, worker, agent, _api: api, processes, _state: state, _database: database };
        house.online(true).await;
        house
    }

    /// Waits until the agent's socket is there, or gone.
    async fn online(&self, expected: bool) {
        eventually(if expected { "the agent is online" } else { "the agent is offline" }, SOON, async || {
            let agents = self.admin.get("/api/agents").await.ok();
            (agents.to_string().contains(HOSTNAME) == expected).then_some(())
        })
        .await;
    }

    /// Makes a script and a job that runs it now on the agent: the job's id.
    async fn run_now(&self, script: &str) -> i64 {
        let payload = json!({"name": "Walk", "type": "bash", "script": script, "timeout_seconds": 600});
        let assembly = json!({"domain": "user", "display_name": "Walk", "assembly_type": "script", "assembly_subtype": "bash",
            "payload": payload});
        let assembly = self.admin.post("/api/assemblies", assembly).await.ok();
        let job = json!({
            "name": "Walk",
            "components": [{"assembly_guid": assembly["assembly_guid"], "name": "Walk"}],
            "targets": [HOSTNAME],
            "schedule": {"type": "immediately"},
        });
        let made = self.admin.post("/api/scheduled_jobs", job).await.ok();
        made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"))
    }

    async fn runs(&self, job: i64) -> Vec<Value> {
        let found = self.admin.get(&format!("/api/scheduled_jobs/{job}/runs")).await.ok();
        found["runs"].as_array().cloned().unwrap_or_else(|| panic!("no runs in {found}"))
    }

    /// Waits until the job's only run has this status.
    async fn until(&self, job: i64, status: &str) -> Value {
        eventually(&format!("the run is {status}"), SOON, async || {
            let runs = self.runs(job).await;
            assert!(runs.len() <= 1, "one occurrence, one device, but {runs:?}");
            let run = runs.into_iter().next()?;
            let is_terminal = !["Pending", "Running"].contains(&run["status"].as_str().unwrap_or_default());
            assert!(!is_terminal || run["status"] == status, "ended as {run}");
            (run["status"] == status).then_some(run)
        })
        .await
    }

    /// What the job's script printed.
    async fn output(&self, job: i64) -> String {
        let devices = self.admin.get(&format!("/api/scheduled_jobs/{job}/devices")).await.ok();
        let activity = id_text(&devices["devices"][0]["activities"][0]["activity_id"]);
        let activity = self.admin.get(&format!("/api/device/activity/job/{activity}")).await.ok();
        activity["stdout"].as_str().unwrap_or_else(|| panic!("no output in {activity}")).to_owned()
    }
}

#[tokio::test]
async fn a_script_scheduled_over_rest_runs_on_a_real_agent_and_its_output_comes_back() {
    let house = House::new().await;
    let job = house.run_now("echo \"walked on $(uname -s)\"; echo twice-$((20 + 1))").await;
    let _ = house.until(job, "Success").await;
    let output = house.output(job).await;
    assert!(output.contains("walked on Linux") && output.contains("twice-21"), "{output:?}");
}

#[tokio::test]
async fn cancelling_a_long_script_ends_it_and_its_children() {
    let house = House::new().await;
    let marker = house._state.path().join("survived");
    let script = format!("(sleep 20; touch '{}') & wait; sleep 300", marker.display());
    let job = house.run_now(&script).await;
    let run = house.until(job, "Running").await;
    let _ = house.admin.post(&format!("/api/scheduled_jobs/{job}/runs/{}/cancel", run["id"]), json!({})).await.ok();
    let run = house.until(job, "Failed").await;
    assert_eq!(run["error"], "cancelled_by_operator", "{run}");
    tokio::time::sleep(Duration::from_secs(21)).await;
    assert!(!marker.exists(), "a child of the cancelled script went on");
}

#[tokio::test]
async fn a_device_that_is_away_gets_its_script_when_it_appears() {
    let mut house = House::new().await;
    house.agent.take().expect("an agent").kill();
    house.online(false).await;
    let job = house.run_now("echo better late").await;
    let _ = house.until(job, "Pending").await;
    house.agent = Some(house.processes.start("borealis-agent", &["run"]));
    let _ = house.until(job, "Success").await;
    assert!(house.output(job).await.contains("better late"));
}

#[tokio::test]
async fn a_worker_killed_in_mid_run_delays_it_by_its_lease_at_most() {
    let mut house = House::new().await;
    let job = house.run_now("sleep 2; echo still here").await;
    let run = house.until(job, "Running").await;
    house.worker.take().expect("a worker").kill();
    house.worker = Some(house.processes.start("borealis-worker", &["run"]));
    let _ = house.until(job, "Success").await;
    assert!(house.output(job).await.contains("still here"));
    let workflow = run["workflow_run_id"].as_str().expect("a workflow run").to_owned();
    // 15 s is the promise; the rest is for a loaded machine.
    eventually("the workflow run has ended", Duration::from_secs(15 + 10), async || {
        let found = house.admin.get(&format!("/api/runs/{workflow}")).await.ok();
        let state = found["state"].as_str().or_else(|| found["run"]["state"].as_str()).unwrap_or_default().to_owned();
        (state == "succeeded").then_some(())
    })
    .await;
}
