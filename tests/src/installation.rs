//! An engine of real processes: API and workers on a database, set up over REST.

use std::time::Duration;

use borealis_engine::keys::Keys;
use serde_json::{Value, json};
use url::Url;

use crate::{Actor, Child, Processes, engine::bootstrap, eventually, processes::free_port};

/// How long a program may take to listen.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A set-up engine with one site. Its API process runs; workers are started with [`Self::worker`].
#[derive(Debug)]
pub struct Installation {
    /// The API process.
    pub api: Child,
    /// Where it is.
    pub base: Url,
    /// The first administrator.
    pub admin: Actor,
    /// The site.
    pub site: i64,
    state: tempfile::TempDir,
}

impl Installation {
    /// Starts the API on a migrated database and sets it up. `processes` then has what workers and further API processes need.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start(processes: &mut Processes, database: &Url) -> Self {
        let state = tempfile::Builder::new().prefix("borealis-engine-").tempdir().expect("a folder");
        let folder = state.path().join("engine");
        let internal = free_port();
        processes
            .set("DATABASE_URL", database.as_str())
            .set("BOREALIS_STATE_DIR", folder.display().to_string())
            .set("BOREALIS_ENGINE_SECRET_FILE", folder.join("secrets/engine.secret").display().to_string())
            .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{internal}"))
            .set("BOREALIS_INTERNAL_URL", format!("http://127.0.0.1:{internal}"))
            .set("BOREALIS_CONNECTIONS_PER_ADDRESS", "100000")
            .set("BOREALIS_ENROLL_PER_MINUTE", "100000");
        let port = free_port();
        let (api, base) = listen(processes, port).await;
        let admin = bootstrap(&base, &folder).await;
        let site = admin.post("/api/sites", json!({"name": "Fleet"})).await.ok();
        let site = site["id"].as_i64().unwrap_or_else(|| panic!("no site id in {site}"));
        Self { api, base, admin, site, state }
    }

    /// Kills the API process and starts another one at the same address.
    pub async fn restart_api(&mut self, processes: &mut Processes) {
        self.replace_api(processes, self.base.port().expect("a port")).await;
    }

    /// Kills the API process and starts another one at another address.
    pub async fn move_api(&mut self, processes: &mut Processes) {
        self.replace_api(processes, free_port()).await;
    }

    async fn replace_api(&mut self, processes: &mut Processes, port: u16) {
        self.api.kill_now();
        (self.api, self.base) = listen(processes, port).await;
        self.admin = self.admin.at(&self.base);
    }

    /// Starts a worker.
    pub fn worker(&self, processes: &mut Processes) -> Child {
        processes.start("borealis-worker", &["run"])
    }

    /// The engine's keys.
    ///
    /// # Panics
    /// When they cannot be read.
    #[must_use]
    pub fn keys(&self) -> Keys {
        let secrets = self.state.path().join("engine/secrets");
        Keys::load_or_create(&secrets, None).expect("the engine's keys")
    }

    /// Makes a script and a job with it for every device, due as `schedule` says; the job's id.
    pub async fn schedule_for_all(&self, name: &str, schedule: Value) -> i64 {
        let payload = json!({"name": name, "type": "bash", "script": "echo simulated", "timeout_seconds": 600});
        let assembly = json!({"domain": "user", "display_name": name, "assembly_type": "script", "assembly_subtype": "bash",
            "payload": payload});
        let assembly = self.admin.post("/api/assemblies", assembly).await.ok();
        let job = json!({
            "name": name,
            "components": [{"assembly_guid": assembly["assembly_guid"], "name": name}],
            "targets": [{"kind": "all_devices"}],
            "schedule": schedule,
        });
        let made = self.admin.post("/api/scheduled_jobs", job).await.ok();
        made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"))
    }

    /// How each device fared in the job's latest occurrence.
    pub async fn devices(&self, job: i64) -> Vec<Value> {
        let found = self.admin.get(&format!("/api/scheduled_jobs/{job}/devices")).await.ok();
        found["devices"].as_array().cloned().unwrap_or_else(|| panic!("no devices in {found}"))
    }
}

async fn listen(processes: &mut Processes, port: u16) -> (Child, Url) {
    processes.set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"));
    let api = processes.start("borealis-api", &["serve"]);
    eventually("the API listens", START_LIMIT, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
    (api, Url::parse(&format!("http://127.0.0.1:{port}")).expect("a URL"))
}
