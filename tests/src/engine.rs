//! An engine in this process: the API on free ports, a database and a state folder of its own.

use std::{
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use borealis_api::{
    serve::{Running, serve},
    state::{App, Settings},
};
use borealis_engine::{access::aegis::Unseal, db};
use serde_json::{Value, json};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    Actor, Device, TestDatabase,
    actor::{Enrollment, new_key},
    totp,
};

/// The passphrase of the Aegis key in tests.
pub const CIPHER: &str = "a long passphrase for tests";
/// The first administrator.
pub const ADMIN: &str = "admin";
/// Everybody's password.
pub const PASSWORD: &str = "correct horse battery staple";

/// One API process' worth of engine. Dropping it cuts it off.
#[derive(Debug)]
pub struct Node {
    /// The public address.
    pub addr: SocketAddr,
    /// The internal listener's address.
    pub internal_addr: SocketAddr,
    /// The public base URL.
    pub base: Url,
    /// Its state, for what a test sets up behind the API's back.
    pub app: App,
    running: Running,
    shutdown: CancellationToken,
}

impl Node {
    /// Stops it in good order, as on SIGTERM.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.running.wait().await;
    }
}

/// An engine with everything around it. Dropping it stops it and removes its database and state folder.
#[derive(Debug)]
pub struct TestEngine {
    /// The first API process.
    pub node: Node,
    /// The secret of the first administrator's authenticator app, once there is one.
    admin: OnceCell<Actor>,
    settings: Settings,
    operators: AtomicU32,
    devices: AtomicU32,
    state_dir: tempfile::TempDir,
    /// The database; declared last, so that it is dropped after what uses it.
    pub database: TestDatabase,
}

impl std::ops::Deref for TestEngine {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

/// Settings of an engine on free loopback ports.
#[must_use]
pub fn settings(state_dir: PathBuf) -> Settings {
    Settings {
        listen: ([127, 0, 0, 1], 0).into(),
        internal_listen: ([127, 0, 0, 1], 0).into(),
        internal_url: "http://127.0.0.1:0".parse().expect("a URL"),
        engine_secret_file: state_dir.join("secrets/engine.secret"),
        unseal: Unseal::in_state_dir(&state_dir),
        state_dir,
        public_base_url: Url::parse("http://127.0.0.1:0").expect("a URL"),
        enroll_per_minute: 100_000,
        enroll_wrong_codes: 20,
        enrollment_code_days: 90,
        access: Default::default(),
        trusted_proxies: Default::default(),
        connections_per_address: 100_000,
        quotas: Default::default(),
        audit_webhook: None,
        // Nothing answers there.
        github_api_url: Url::parse("http://127.0.0.1:9/").expect("a URL"),
        exports: Default::default(),
        worker_metrics_listen: None,
        zoneinfo: None,
    }
}

async fn node(settings: Settings, url: &Url, name: &str) -> Node {
    let options = db::Options { url: url.to_string(), max_connections: 8, application_name: name.into() };
    let pool = db::connect(&options).expect("a readable database URL");
    let shutdown = CancellationToken::new();
    let running =
        serve(settings, pool, shutdown.clone()).await.unwrap_or_else(|error| panic!("the API does not start: {error:?}"));
    let (addr, internal_addr, app) = (running.addr, running.internal_addr, running.app.clone());
    let base = Url::parse(&format!("http://{addr}")).expect("a URL");
    Node { addr, internal_addr, base, app, running, shutdown }
}

impl TestEngine {
    /// A fresh engine, before any set-up.
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// A fresh engine with changed settings.
    pub async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::on(TestDatabase::start().await, change).await
    }

    /// A fresh engine on a given database.
    pub async fn on(database: TestDatabase, change: impl FnOnce(&mut Settings)) -> Self {
        let state_dir = tempfile::Builder::new().prefix("borealis-test-").tempdir().expect("a folder");
        std::fs::set_permissions(state_dir.path(), std::fs::Permissions::from_mode(0o700)).expect("a private folder");
        let mut settings = settings(state_dir.path().to_owned());
        change(&mut settings);
        let node = node(settings.clone(), &database.url, "api-1").await;
        Self {
            node,
            admin: OnceCell::new(),
            settings,
            operators: AtomicU32::new(0),
            devices: AtomicU32::new(0),
            state_dir,
            database,
        }
    }

    /// The state folder.
    #[must_use]
    pub fn state_dir(&self) -> &std::path::Path {
        self.state_dir.path()
    }

    /// The engine secret's text.
    #[must_use]
    pub fn engine_secret(&self) -> String {
        let secret = borealis_engine::keys::read_engine_secret(&self.app.settings.engine_secret_file);
        secret.expect("the engine secret").expose().clone()
    }

    /// A second API process on the same database and state folder.
    pub async fn second(&self) -> Node {
        node(self.settings.clone(), &self.database.url, "api-2").await
    }

    /// One on the same database whose keys are others: nobody hands it the key of the secret store.
    pub async fn stranger(&self) -> Node {
        self.stranger_with("stranger", |_| {}).await
    }

    /// Such a one with changed settings, and a state folder of this name below the engine's.
    pub async fn stranger_with(&self, name: &str, change: impl FnOnce(&mut Settings)) -> Node {
        let mut settings = Settings { state_dir: self.state_dir.path().join(name), ..self.settings.clone() };
        change(&mut settings);
        node(settings, &self.database.url, "stranger").await
    }

    /// Nobody the engine knows.
    #[must_use]
    pub fn anonymous(&self) -> Actor {
        Actor::anonymous(&self.base)
    }

    /// The first administrator, signed in. The first call sets the engine up over REST, as a person would.
    pub async fn admin(&self) -> Actor {
        self.admin.get_or_init(|| bootstrap(&self.base, self.state_dir.path())).await.clone()
    }

    /// A new site; its id and enrollment code.
    pub async fn site(&self, name: &str) -> (i64, String) {
        let admin = self.admin().await;
        let created = admin.post("/api/sites", json!({"name": name, "description": "made by a test"})).await.expect(201).body;
        let id = created["id"].as_i64().unwrap_or_else(|| panic!("no site id in {created}"));
        let code = created["enrollment_code"].as_str().unwrap_or_else(|| panic!("no enrollment code in {created}"));
        (id, code.to_owned())
    }

    /// A new operator of these sites, signed in with an authenticator app.
    pub async fn operator(&self, sites: &[i64]) -> Actor {
        let username = self.user("User", sites).await;
        self.anonymous().sign_in(&username, PASSWORD, 0).await
    }

    /// A new administrator beside the first, signed in.
    pub async fn second_admin(&self) -> Actor {
        let username = self.user("Admin", &[]).await;
        self.anonymous().sign_in(&username, PASSWORD, 0).await
    }

    /// A new user who has not signed in yet; the username.
    pub async fn user(&self, role: &str, sites: &[i64]) -> String {
        let admin = self.admin().await;
        let username = format!("operator-{}", self.operators.fetch_add(1, Ordering::Relaxed) + 1);
        if role == "Admin" {
            let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
        }
        let body = json!({"username": username, "password": PASSWORD, "role": role});
        let _ = admin.post("/api/users", body).await.ok();
        // As if they had chosen it, so that each test need not.
        sqlx::query("UPDATE users SET password_change_required = false WHERE username = $1")
            .bind(&username)
            .execute(&self.database.pool)
            .await
            .expect("a user");
        if role == "User" {
            let body = json!({"usernames": [username], "site_ids": sites});
            let _ = admin.post("/api/user_site_assignments/assign", body).await.ok();
        }
        username
    }

    /// As if everybody's last proof of who they are were older than a step-up counts; signing in is one.
    pub async fn age_step_ups(&self) {
        sqlx::query("UPDATE operator_sessions SET stepped_up_at = now() - interval '301 seconds'")
            .execute(&self.database.pool)
            .await
            .expect("an update");
    }

    /// A new device in `site`, enrolled with a key of its own and approved by the administrator.
    pub async fn device(&self, site: i64) -> Device {
        let hostname = format!("host-{}", self.devices.fetch_add(1, Ordering::Relaxed) + 1);
        self.device_named(site, &hostname).await
    }

    /// A new device with this hostname.
    pub async fn device_named(&self, site: i64, hostname: &str) -> Device {
        let pending = Enrollment::request(&self.anonymous(), hostname, &self.enrollment_code(site).await, new_key()).await;
        let admin = self.admin().await;
        let approval = self.approval(pending.reference()).await;
        let _ = admin.post(&format!("/api/admin/device-approvals/{approval}/approve"), json!({})).await.ok();
        pending.finish(site).await
    }

    /// The id of the approval with this reference.
    pub async fn approval(&self, reference: &str) -> String {
        let found = self.admin().await.get("/api/admin/device-approvals").await.ok();
        let approvals = found["approvals"].as_array().unwrap_or_else(|| panic!("no approvals in {found}"));
        let approval = approvals.iter().find(|approval| approval["approval_reference"] == reference);
        id_text(&approval.unwrap_or_else(|| panic!("no approval {reference} in {found}"))["id"])
    }

    /// The enrollment code of a site.
    pub async fn enrollment_code(&self, site: i64) -> String {
        let found = self.admin().await.get("/api/sites").await.ok();
        let sites = found["sites"].as_array().unwrap_or_else(|| panic!("no sites in {found}"));
        let code = sites.iter().find(|found| found["id"] == site).and_then(|site| site["enrollment_code"].as_str());
        code.unwrap_or_else(|| panic!("no code of site {site} in {found}")).to_owned()
    }
}

/// An id, a number or text, as a path wants it.
#[must_use]
pub fn id_text(id: &Value) -> String {
    match id {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Sets a fresh engine up over REST and returns its first administrator, signed in. Where the engine does not take this machine's word,
/// with the setup token of the state folder.
pub async fn bootstrap(base: &Url, state_dir: &Path) -> Actor {
    let nobody = Actor::anonymous(base);
    let set_up = async |path: &str, body: Value| {
        let token = || std::fs::read_to_string(state_dir.join("secrets/setup.token")).ok();
        let send = async |token: Option<String>| {
            let request = nobody.request(reqwest::Method::POST, path).json(&body);
            nobody.send(token.iter().fold(request, |request, token| request.header("X-Borealis-Setup-Token", token.trim()))).await
        };
        let reply = send(token()).await;
        // The file may have been made at the first request only.
        if reply.body["error"] == "setup_token_required" { send(token()).await } else { reply }.ok()
    };
    let _ = set_up("/api/bootstrap/aegis/setup", json!({"cipher": CIPHER})).await;
    let pending = set_up("/api/bootstrap/admin/setup", json!({"username": ADMIN, "password": PASSWORD})).await;
    let secret = pending["secret"].as_str().unwrap_or_else(|| panic!("no authenticator secret in {pending}")).to_owned();
    let body = json!({"pending_token": pending["pending_token"], "code": totp::code(&secret, 0)});
    let done = set_up("/api/bootstrap/admin/mfa/verify", body).await;
    nobody.signed_in(ADMIN, PASSWORD, &secret, &done)
}
