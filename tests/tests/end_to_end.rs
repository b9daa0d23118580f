//! The README's walk with real processes: API, worker and agent, from an empty database to a script's own output; then the
//! same with what goes wrong in practice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use borealis_tests::{
    Actor, Child, Processes, TestDatabase,
    actor::Credential,
    directory::Certificates,
    engine::{ADMIN, CIPHER, PASSWORD, bootstrap, id_text},
    eventually,
    processes::free_port,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use url::Url;

/// How long a step with nothing in its way may take. Far above what it takes.
const SOON: Duration = Duration::from_secs(60);
const HOSTNAME: &str = "walker";

/// An engine of real processes, with one agent, enrolled and connected.
struct House {
    admin: Actor,
    worker: Option<Child>,
    agent: Option<Child>,
    /// The agent's file, put aside.
    before: Option<String>,
    api: Child,
    processes: Processes,
    _state: tempfile::TempDir,
    _database: TestDatabase,
}

impl House {
    async fn new() -> Self {
        Self::with(Processes::new(), free_port(), None).await
    }

    /// On this port, and with another address that agents are told.
    async fn with(mut processes: Processes, port: u16, public: Option<Url>) -> Self {
        let database = TestDatabase::start().await;
        let state = tempfile::tempdir().expect("a folder");
        let folder = |name: &str| state.path().join(name).display().to_string();
        let internal_port = free_port();
        let base = Url::parse(&format!("http://127.0.0.1:{port}")).expect("a URL");
        let public = public.unwrap_or_else(|| base.clone());
        processes
            .set("DATABASE_URL", database.url.as_str())
            .set("BOREALIS_STATE_DIR", folder("engine"))
            .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
            .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{internal_port}"))
            .set("BOREALIS_INTERNAL_URL", format!("http://127.0.0.1:{internal_port}"))
            .set("BOREALIS_ENGINE_SECRET_FILE", folder("engine/secrets/engine.secret"))
            .set("BOREALIS_PUBLIC_BASE_URL", public.as_str())
            .set("BOREALIS_AGENT_SERVER_URL", public.as_str())
            .set("BOREALIS_AGENT_STATE_DIR", folder("agent"))
            .set("BOREALIS_AGENT_HOSTNAME", HOSTNAME);
        let api = processes.start("borealis-api", &["serve"]);
        eventually("the API listens", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()).await;
        let worker = Some(processes.start("borealis-worker", &["run"]));

        let admin = bootstrap(&base, &state.path().join("engine")).await;
        let site = admin.post("/api/sites", json!({"name": "Lab"})).await.ok();
        processes.set("BOREALIS_AGENT_ENROLLMENT_CODE", site["enrollment_code"].as_str().expect("a code"));
        let agent = Some(processes.start("borealis-agent", &["run"]));
        let approval = eventually("the agent asks to be enrolled", SOON, async || {
            let found = admin.get("/api/admin/device-approvals?status=pending").await.ok();
            found["approvals"].get(0).map(|approval| id_text(&approval["id"]))
        })
        .await;
        let _ = admin.post(&format!("/api/admin/device-approvals/{approval}/approve"), json!({})).await.ok();
        let house = Self { admin, worker, agent, before: None, api, processes, _state: state, _database: database };
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

/// A proxy that speaks TLS with this certificate, and plain HTTP with what is behind it; how often a handshake failed.
async fn tls_proxy(listener: TcpListener, certificates: &Certificates, behind: u16) -> Arc<AtomicUsize> {
    let chain = vec![CertificateDer::from_pem_slice(certificates.server.as_bytes()).expect("a certificate")];
    let key = PrivateKeyDer::from_pem_slice(certificates.key().as_bytes()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(chain, key))
        .expect("a configuration");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let refused = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&refused);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, refused) = (acceptor.clone(), Arc::clone(&counter));
            tokio::spawn(async move {
                let Ok(mut outside) = acceptor.accept(stream).await else {
                    refused.fetch_add(1, Ordering::Relaxed);
                    return;
                };
                let Ok(mut inside) = TcpStream::connect(("127.0.0.1", behind)).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
            });
        }
    });
    refused
}

#[tokio::test]
async fn an_agent_works_over_tls_and_believes_its_own_authorities_only() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let public = format!("https://localhost:{}", listener.local_addr().expect("its address").port());
    let public = Url::parse(&public).expect("a URL");
    let certificates = Certificates::for_name("localhost");
    let port = free_port();
    let refused = tls_proxy(listener, &certificates, port).await;
    let folder = tempfile::tempdir().expect("a folder");
    let authority = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let mut processes = Processes::new();
    processes.set("BOREALIS_AGENT_CA_FILE", authority("right.pem", &certificates.authority));
    let mut house = House::with(processes, port, Some(public.clone())).await;
    let job = house.run_now("echo through-$((40 + 2))").await;
    let _ = house.until(job, "Success").await;
    assert!(house.output(job).await.contains("through-42"));
    assert_eq!(refused.load(Ordering::Relaxed), 0);

    // The same agent, with another authority, or sent to a name that the certificate is not for: it says why it does not go there. (Its
    // socket goes where the engine has told it.)
    let other = authority("other.pem", &Certificates::for_name("localhost").authority);
    let right = authority("right.pem", &certificates.authority);
    let by_address = format!("https://127.0.0.1:{}", public.port().expect("a port"));
    for (authority, url) in [(other, public.as_str()), (right, &*by_address)] {
        drop(house.agent.take());
        house.online(false).await;
        let before = refused.load(Ordering::Relaxed);
        house.processes.set("BOREALIS_AGENT_CA_FILE", authority).set("BOREALIS_AGENT_SERVER_URL", url);
        house.agent = Some(house.processes.start("borealis-agent", &["run"]));
        eventually("it refuses twice", SOON, async || (refused.load(Ordering::Relaxed) >= before + 2).then_some(())).await;
        let said = house.agent.as_ref().expect("the agent").output();
        assert!(said.to_lowercase().contains("certificate"), "{said}");
    }
}

#[tokio::test]
async fn the_script_key_is_rotated_and_agents_follow() {
    let mut house = House::new().await;
    let kept = |house: &House, name: &str| {
        let text = std::fs::read_to_string(house._state.path().join("agent/agent.json")).expect("the agent's file");
        serde_json::from_str::<Value>(&text).expect("JSON")[name].clone()
    };
    let pinned = kept(&house, "server_signing_key");
    for round in 1..=2 {
        if round == 2 {
            // One that misses the first rotation and this one follows both.
            drop(house.agent.take());
            house.online(false).await;
            std::fs::write(house._state.path().join("agent/agent.json"), house.before.take().expect("its file"))
                .expect("written");
        } else {
            house.before = Some(std::fs::read_to_string(house._state.path().join("agent/agent.json")).expect("its file"));
        }
        let mut rotated = house.processes.start("borealis-api", &["admin", "rotate-keys", "script-signing"]);
        while rotated.is_running() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert!(rotated.output().contains("does not count any more"), "{}", rotated.output());
        if house.agent.is_none() {
            house.agent = Some(house.processes.start("borealis-agent", &["run"]));
            house.online(true).await;
        }
        let job = house.run_now(&format!("echo round-{round}")).await;
        let _ = house.until(job, "Success").await;
        assert!(house.output(job).await.contains(&format!("round-{round}")));
        assert_ne!(kept(&house, "server_signing_key"), pinned);
    }
}

#[tokio::test]
async fn no_secret_is_in_any_log_however_much_is_logged() {
    let mut processes = Processes::new();
    processes.set("BOREALIS_LOG", "trace").set("BOREALIS_AGENT_LOG", "trace");
    let house = House::with(processes, free_port(), None).await;
    let admin = &house.admin;
    let job = house.run_now("echo done").await;
    let _ = house.until(job, "Success").await;
    let nobody = Actor::anonymous(&admin.base);
    let wrong = json!({"username": ADMIN, "password": "canary-wrong-password"});
    let _ = nobody.post("/api/auth/login", wrong).await.error(401, "invalid username or password");
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let secrets = json!({"name": "Web", "username": "deploy", "password": "canary-credential", "private_key": "canary-key"});
    let _ = admin.post("/api/credentials", secrets).await.ok();
    let provider =
        json!({"name": "Main", "server_urls": "ldaps://dc1.ad.test", "bind_dn": "cn=x", "bind_password": "canary-bind"});
    let _ = admin.post("/api/directory/providers", provider).await.ok();
    let token = admin.post("/api/auth/tokens", json!({"name": "x", "scopes": ["read"], "expires_in_days": 1})).await.ok();
    let token = token["token"].as_str().expect("a token").to_owned();
    let _ = Actor { credential: Credential::Bearer(token.clone()), ..nobody.clone() }.get("/api/sites").await.ok();
    // A browser, with its cookie, and an operator's socket.
    let _ = admin.as_browser().get("/api/auth/me").await.ok();
    let code = admin.get("/api/sites").await.ok()["sites"][0]["enrollment_code"].as_str().expect("a code").to_owned();
    let Credential::Bearer(session) = &admin.credential else { panic!("the administrator has a token") };
    let agent: Value = {
        let text = std::fs::read_to_string(house._state.path().join("agent/agent.json")).expect("the agent's file");
        serde_json::from_str(&text).expect("JSON")
    };
    let kept = |name: &str| agent["tokens"][name].as_str().unwrap_or_else(|| panic!("no {name} in the agent's file")).to_owned();
    let engine_secret = std::fs::read_to_string(house._state.path().join("engine/secrets/engine.secret")).expect("a file");
    let secrets = [
        PASSWORD.to_owned(),
        CIPHER.to_owned(),
        "canary-".to_owned(),
        admin.totp_secret.clone().expect("a secret"),
        session.clone(),
        token,
        code,
        kept("access_token"),
        kept("refresh_token"),
        engine_secret.trim().to_owned(),
    ];
    let logs = [&house.api, house.worker.as_ref().expect("a worker"), house.agent.as_ref().expect("an agent")];
    for process in logs {
        let log = process.output();
        assert!(log.contains("DEBUG") && log.len() > 2_000, "{} logs much: {}", process.name, log.len());
        for (place, secret) in secrets.iter().enumerate() {
            let line = log.lines().find(|line| line.contains(secret.as_str()));
            assert!(line.is_none(), "secret {place} is in the log of {}: {line:?}", process.name);
        }
    }
    assert!(house.api.output().contains("/api/credentials"), "what was done is there");
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
async fn a_job_run_and_its_workflow_run_end_alike() {
    let house = House::new().await;
    let admin = &house.admin;
    let ends = async |run: &Value, state: &str| {
        let path = format!("/api/runs/{}", run["workflow_run_id"].as_str().expect("a workflow run"));
        eventually(&format!("{path} is {state}"), SOON, async || {
            let found = admin.get(&path).await.ok();
            assert!(found["finished_at"].is_null() || found["state"] == state, "ended as {found}");
            (found["state"] == state).then_some(found)
        })
        .await
    };

    // The script fails on its only device, and is retried through the run that carried it.
    let switch = house._state.path().join("switch");
    let job = house.run_now(&format!("test -e '{}'", switch.display())).await;
    let failed = ends(&house.until(job, "Failed").await, "failed").await;
    assert_eq!(
        (&failed["error"], &failed["output"]),
        (&json!("runs_failed: 1 of 1 runs did not end well: 1 Failed."), &json!({"statuses": {"Failed": 1}})),
    );
    let listed = admin.get("/api/runs?state=failed").await.ok();
    assert_eq!(listed["runs"][0]["id"], failed["id"], "{listed}");
    std::fs::write(&switch, "").expect("a file");
    let retry = format!("/api/runs/{}/retry", failed["id"].as_str().expect("an id"));
    let retried = admin.post(&retry, json!({})).await.ok()["run"].clone();
    assert_ne!(retried["id"], failed["id"], "another occurrence");
    let _ = ends(&json!({"workflow_run_id": retried["id"]}), "succeeded").await;
    let runs = house.runs(job).await;
    assert_eq!(runs.iter().map(|run| &run["status"]).collect::<Vec<_>>(), ["Success", "Failed"], "newest first");
    let again = format!("/api/runs/{}/retry", retried["id"].as_str().expect("an id"));
    let _ = admin.post(&again, json!({})).await.error(409, "run_not_failed");

    let _ = admin.delete(&format!("/api/scheduled_jobs/{job}")).await.ok();
    let _ = admin.post(&retry, json!({})).await.error(409, "nothing_to_retry");

    // A cancel of the only run cancels what carries it.
    let job = house.run_now("sleep 300").await;
    let run = house.until(job, "Running").await;
    let _ = admin.post(&format!("/api/scheduled_jobs/{job}/runs/{}/cancel", run["id"]), json!({})).await.ok();
    let _ = ends(&run, "cancelled").await;
    assert_eq!(house.until(job, "Failed").await["error"], "cancelled_by_operator");

    // And the other way round.
    let job = house.run_now("sleep 300").await;
    let run = house.until(job, "Running").await;
    let cancel = format!("/api/runs/{}/cancel", run["workflow_run_id"].as_str().expect("a workflow run"));
    let _ = admin.post(&cancel, json!({})).await.ok();
    let _ = ends(&run, "cancelled").await;
    assert_eq!(house.until(job, "Failed").await["error"], "cancelled_by_operator");
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
async fn a_copy_of_the_agents_state_on_another_machine_runs_nothing_until_an_operator_moves_the_identity() {
    let machine = |name: &str, id: &str| {
        let file = tempfile::Builder::new().prefix(name).tempfile().expect("a file");
        std::fs::write(file.path(), id).expect("a machine id");
        file
    };
    let (own, copy) = (machine("own", &"a".repeat(32)), machine("copy", &"b".repeat(32)));
    let mut processes = Processes::new();
    processes.set("BOREALIS_AGENT_MACHINE_ID_FILE", own.path().display().to_string());
    let mut house = House::with(processes, free_port(), None).await;
    let state = house.processes.get("BOREALIS_AGENT_STATE_DIR").expect("a folder");
    let copied = format!("{state}-copied");
    let done = std::process::Command::new("cp").args(["-a", &state, &copied]).status().expect("cp");
    assert!(done.success());
    house.processes.set("BOREALIS_AGENT_STATE_DIR", &copied).set("BOREALIS_AGENT_HOSTNAME", "copied");
    house.processes.set("BOREALIS_AGENT_MACHINE_ID_FILE", copy.path().display().to_string());
    let second = house.processes.start("borealis-agent", &["run"]);
    let approval = eventually("the copy is shown", SOON, async || {
        let found = house.admin.get("/api/admin/device-approvals?status=pending").await.ok();
        found["approvals"].get(0).cloned()
    })
    .await;
    assert_eq!((&approval["kind"], &approval["hostname_claimed"]), (&json!("identity"), &json!("copied")), "{approval}");

    let trace = format!("{state}-trace");
    let script = format!("echo x >> {trace}");
    for _ in 0..10 {
        let job = house.run_now(&script).await;
        let _ = house.until(job, "Success").await;
    }
    assert_eq!(std::fs::read_to_string(&trace).expect("a trace").lines().count(), 10);
    assert!(second.output().contains("an operator has to decide"), "the copy's log says why: {}", second.output());
    // The machine it belongs to is away: its work waits for it.
    house.agent.take().expect("an agent").kill();
    house.online(false).await;
    let job = house.run_now(&script).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let _ = house.until(job, "Pending").await;

    // The copy may ask again after minutes; started again, it asks at once.
    let id = id_text(&approval["id"]);
    let _ = house.admin.post(&format!("/api/admin/device-approvals/{id}/approve"), json!({})).await.ok();
    second.kill();
    house.agent = Some(house.processes.start("borealis-agent", &["run"]));
    let _ = house.until(job, "Success").await;
}

/// A small disk of its own, until it is dropped.
struct Disk(std::path::PathBuf);

impl Disk {
    fn mount(at: std::path::PathBuf) -> Self {
        std::fs::create_dir(&at).expect("a folder");
        let mut command = std::process::Command::new("mount");
        let mounted = command.args(["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs"]).arg(&at).status().expect("mount runs");
        assert!(mounted.success(), "a small disk is mounted");
        Self(at)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_device_whose_disk_is_full_gets_its_script_when_there_is_room() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("only root can mount a small disk");
        return;
    }
    let mut house = House::new().await;
    drop(house.agent.take());
    house.online(false).await;
    let disk = Disk::mount(house._state.path().join("disk"));
    std::fs::copy(house._state.path().join("agent/agent.json"), disk.0.join("agent.json")).expect("the agent's file");
    house.processes.set("BOREALIS_AGENT_STATE_DIR", disk.0.display().to_string());
    house.agent = Some(house.processes.start("borealis-agent", &["run"]));
    house.online(true).await;

    let filling = disk.0.join("filling");
    assert!(std::fs::write(&filling, vec![b'x'; 16 << 20]).is_err(), "it is full");
    let job = house.run_now("echo there is room").await;
    eventually("the run says why it waits", SOON, async || {
        let runs = house.runs(job).await;
        let run = runs.first()?;
        (run["status"] == "Pending" && run["error"] == "agent_disk_full").then_some(())
    })
    .await;
    std::fs::remove_file(&filling).expect("room");
    // Nothing else happens to the agent: it is offered again by itself.
    let run = house.until(job, "Success").await;
    assert_eq!(run["error"].as_str().unwrap_or_default(), "", "{run}");
    assert!(house.output(job).await.contains("there is room"));

    // An agent that is told to stop takes its leave.
    house.agent.as_ref().expect("the agent").ask_to_end();
    eventually("the device is offline", SOON, async || {
        let devices = house.admin.get("/api/devices").await.ok();
        (devices["devices"][0]["status"] == "Offline").then_some(())
    })
    .await;
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
