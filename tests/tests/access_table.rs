//! Who may call what: every route of the access table, tried as everybody. A route without a line in [`World::call`] fails.
//! `access_table/` does the same for the internal listener and for sockets.
//!
//! What belongs to a foreign site answers exactly as what does not exist, and a refused call changes nothing: the owner's
//! call after it still succeeds.

use std::time::Duration;

use borealis_api::access::Class;
use borealis_protocol::{CONTEXT_SYSTEM, agent_id, framing::Frame};
use borealis_tests::{
    Actor, Device, Reply, TestEngine,
    actor::{Credential, Enrollment, new_key},
    agent::open_agent,
    engine::{CIPHER, PASSWORD},
    eventually,
};
use serde_json::{Value, json};
use uuid::Uuid;

#[path = "access_table/internal.rs"]
mod internal;
#[path = "access_table/sockets.rs"]
mod sockets;

const LIMIT: Duration = Duration::from_secs(10);

/// A request with everything valid in it, and what callers without rights get.
struct Call {
    path: String,
    body: Option<Value>,
    rule: Rule,
}

enum Rule {
    /// It acts on something of site A. Others get the answer of this path, which leads to nothing.
    Thing { absent: String },
    /// The body names something of site A. Others get this refusal, as with the body that names nothing that exists.
    Named { status: u16, code: &'static str, absent: Value },
    /// A list in which only who may see site A finds this text.
    List { shows: String },
    /// Every operator may.
    Anyone,
    /// It changes the caller's own account: tried with an operator made for it.
    Own,
    /// It names something that only another account may have: every operator, administrators too, gets this status.
    Others(u16),
    /// An administrator gets this status.
    Admin(u16),
    /// Everybody gets this status, whoever they are.
    Public(u16),
    /// The same, but it would end a session, so it is tried by who has none.
    Leaving,
    /// A device gets this status, about itself.
    Device(u16),
}

struct World {
    engine: TestEngine,
    site: i64,
    admin: Actor,
    operator: Actor,
    /// Of site B, and of no site.
    strangers: Vec<Actor>,
    /// Nobody, a password without its second factor in both forms, and a worker, who is nobody outside the internal listener.
    unknown: Vec<Actor>,
    device: Device,
    other_device: Device,
}

impl World {
    async fn new() -> Self {
        // Passkeys need a name.
        let name = "http://localhost:0".parse().expect("a URL");
        let engine = TestEngine::with(|settings| settings.public_base_url = name).await;
        let admin = engine.admin().await;
        let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
        let (site, _) = engine.site("Site A").await;
        let (other_site, _) = engine.site("Site B").await;
        let operator = engine.operator(&[site]).await;
        let mut strangers = vec![engine.operator(&[other_site]).await, engine.operator(&[]).await];
        strangers[0].name = "operator of another site".into();
        strangers[1].name = "operator of no site".into();
        let username = engine.user("User", &[site]).await;
        let anonymous = engine.anonymous();
        let body = json!({"username": username, "password": PASSWORD});
        let pending = anonymous.post("/api/auth/login", body).await.ok()["pending_token"].as_str().expect("a token").to_owned();
        let mut unknown = vec![anonymous; 4];
        unknown[1].name = "operator without second factor".into();
        unknown[1].credential = Credential::Bearer(pending.clone());
        unknown[2].name = "operator without second factor, by cookie".into();
        unknown[2].credential = Credential::Cookie(pending);
        unknown[3].name = "worker".into();
        unknown[3].credential = Credential::Worker(engine.engine_secret());
        let device = engine.device(site).await;
        let other_device = engine.device(other_site).await;
        Self { engine, site, admin, operator, strangers, unknown, device, other_device }
    }

    /// Everybody the table knows.
    fn everybody(&self) -> Vec<&Actor> {
        let known = [&self.operator, &self.admin, &self.device.actor, &self.other_device.actor];
        self.unknown.iter().chain(&self.strangers).chain(known).collect()
    }

    fn pool(&self) -> &borealis_engine::db::Pool {
        &self.engine.database.pool
    }

    async fn assembly(&self) -> String {
        let guid = Uuid::new_v4().to_string();
        let payload = json!({"name": "Hello", "type": "bash", "script": "echo hello", "timeout_seconds": 60});
        sqlx::query(
            "INSERT INTO assemblies (guid, domain, display_name, assembly_type, assembly_subtype, payload, content_hash)
             VALUES ($1, 'user', 'Hello', 'script', 'bash', $2, '')",
        )
        .bind(&guid)
        .bind(payload.to_string())
        .execute(self.pool())
        .await
        .expect("an assembly");
        guid
    }

    /// A credential of site A.
    async fn credential(&self, name: &str) -> i64 {
        let body = json!({"name": name, "site_id": self.site, "password": "a secret"});
        self.admin.post("/api/credentials", body).await.ok()["credential"]["id"].as_i64().expect("an id")
    }

    /// A directory provider that leads nowhere.
    async fn provider(&self) -> i64 {
        let body = json!({"name": Uuid::new_v4().to_string(), "server_urls": ["ldaps://nowhere.invalid"]});
        self.admin.post("/api/directory/providers", body).await.ok()["provider"]["id"].as_i64().expect("an id")
    }

    /// A passkey of this user.
    async fn passkey(&self, username: &str) -> i64 {
        sqlx::query_scalar(
            "INSERT INTO passkeys (user_id, label, lookup_tag, credential_sealed)
             SELECT id, 'Key', sha256(username::bytea), '' FROM users WHERE username = $1 RETURNING id",
        )
        .bind(username)
        .fetch_one(self.pool())
        .await
        .expect("a passkey")
    }

    /// An API token of this user.
    async fn api_token(&self, username: &str) -> Uuid {
        sqlx::query_scalar(
            "INSERT INTO api_tokens (id, user_id, name, token_hash, hint, scopes, expires_at)
             SELECT $2, id, 'A program', sha256($2::text::bytea), 'hint', '{read}', now() + interval '1 day'
             FROM users WHERE username = $1 RETURNING id",
        )
        .bind(username)
        .bind(Uuid::new_v4())
        .fetch_one(self.pool())
        .await
        .expect("an API token")
    }

    /// A job on the device of site A, as its operator makes it.
    async fn job(&self) -> i64 {
        let made = self.operator.post("/api/scheduled_jobs", self.job_body(&self.device.guid).await).await.ok();
        made["job"]["id"].as_i64().unwrap_or_else(|| panic!("no job id in {made}"))
    }

    async fn job_body(&self, guid: &str) -> Value {
        json!({
            "name": "A job",
            "components": [{"assembly_guid": self.assembly().await, "name": "Hello"}],
            "targets": [{"kind": "device", "device_guid": guid}],
            "schedule": {"type": "daily", "start": "2030-01-01T03:00:00Z"},
        })
    }

    /// A job with one occurrence, whose one run has this status: its id and the run's.
    async fn job_run(&self, status: &str) -> (i64, i64) {
        let job = self.job().await;
        let run = sqlx::query_scalar(
            "WITH occurrence AS (
                 INSERT INTO job_occurrences (job_id, scheduled_at, cause, state, frozen_at)
                 VALUES ($1, now(), 'schedule', CASE WHEN $2 = 'Pending' THEN 'open' ELSE 'closed' END, now())
                 RETURNING id, scheduled_at)
             INSERT INTO scheduled_job_runs (job_id, occurrence_id, scheduled_at, status, device_guid, target_hostname, site_id)
             SELECT $1, id, scheduled_at, $2, $3, $4, $5 FROM occurrence RETURNING id",
        )
        .bind(job)
        .bind(status)
        .bind(Uuid::parse_str(&self.device.guid).expect("a GUID"))
        .bind(&self.device.hostname)
        .bind(self.site)
        .fetch_one(self.pool())
        .await
        .expect("a run");
        (job, run)
    }

    /// A workflow run of site A.
    async fn workflow_run(&self, state: &str) -> Uuid {
        let id = Uuid::now_v7();
        sqlx::query(
            "INSERT INTO workflow_runs (id, workflow, version, state, step, input, scope_ids, finished_at)
             VALUES ($1, 'scheduled_run', 1, $2, 'resolve', '{}', $3, CASE WHEN $2 = 'failed' THEN now() END)",
        )
        .bind(id)
        .bind(state)
        .bind([self.site])
        .execute(self.pool())
        .await
        .expect("a workflow run");
        id
    }

    /// A script that ran on the device of site A.
    async fn activity(&self) -> i64 {
        sqlx::query_scalar(
            "INSERT INTO activity_history (device_guid, hostname, site_id, script_name, status, request, delivery, finished_at)
             VALUES ($1, $2, $3, 'Hello', 'Success', '{}', 'done', now()) RETURNING id",
        )
        .bind(Uuid::parse_str(&self.device.guid).expect("a GUID"))
        .bind(&self.device.hostname)
        .bind(self.site)
        .fetch_one(self.pool())
        .await
        .expect("an activity")
    }

    /// Makes the device of site A one with an open socket at some other API process.
    async fn connected(&self) {
        sqlx::query(
            "WITH process AS (INSERT INTO api_processes (id, last_seen_at) VALUES ($1, now()) RETURNING id)
             INSERT INTO device_sockets (device_guid, service_mode, socket_id, api_process, agent_id, hostname)
             SELECT $2, 'system', 'a socket', id, $3, $4 FROM process ON CONFLICT DO NOTHING",
        )
        .bind(Uuid::new_v4())
        .bind(Uuid::parse_str(&self.device.guid).expect("a GUID"))
        .bind(format!("{}_{}_SYSTEM", self.device.hostname, self.device.guid))
        .bind(&self.device.hostname)
        .execute(self.pool())
        .await
        .expect("a socket");
    }

    /// Connects the agent of the device of site A, which answers every call with a list of no processes.
    async fn answering(&self) {
        let Credential::Bearer(token) = &self.device.actor.credential else { panic!("a device has a token") };
        let mut socket = eventually("a socket", LIMIT, || async { open_agent(self.engine.addr, token).await.ok() }).await;
        let id = agent_id(&self.device.hostname, &self.device.guid, CONTEXT_SYSTEM);
        let hello = socket.hello(&id, json!({"dedup": true})).await;
        assert_eq!(hello["status"], "ok", "{hello}");
        tokio::spawn(async move {
            while let Some(frame) = socket.next().await {
                if let Frame::Event { id: Some(id), .. } = frame {
                    socket.send(&Frame::Ack { id, args: vec![json!({"ok": true, "processes": []})] }).await;
                }
            }
        });
    }

    /// A machine that waits for approval into site A: the approval's id.
    async fn approval(&self) -> String {
        let code = self.engine.enrollment_code(self.site).await;
        let hostname = format!("new-{}", Uuid::new_v4().simple());
        let request = Enrollment::request(&self.engine.anonymous(), &hostname, &code, new_key()).await;
        self.engine.approval(request.reference()).await
    }

    /// The request that a line of the access table is tried with. Made anew for each call that may succeed.
    async fn call(&self, route: &str) -> Option<Call> {
        let site = self.site;
        let (guid, hostname) = (self.device.guid.as_str(), self.device.hostname.as_str());
        let nothing = Uuid::new_v4();
        let thing = |path: String, absent: String, body: Value| {
            Some(Call { path, body: (!body.is_null()).then_some(body), rule: Rule::Thing { absent } })
        };
        let list = |path: &str, shows: &str| {
            Some(Call { path: path.to_owned(), body: None, rule: Rule::List { shows: shows.to_owned() } })
        };
        let with = |path: &str, body: Value, rule: Rule| {
            Some(Call { path: path.to_owned(), body: (!body.is_null()).then_some(body), rule })
        };
        let public = |path: &str, body: Value, status: u16| with(path, body, Rule::Public(status));
        let admin = |path: &str, body: Value| with(path, body, Rule::Admin(200));
        let (method, path) = route.split_once(' ').expect("a method and a path");
        match (method, path) {
            ("GET", "/health" | "/ready" | "/api/openapi.json" | "/api/docs" | "/api/bootstrap/state") => {
                public(path, Value::Null, 200)
            }
            ("GET", "/api/docs/{asset}") => public("/api/docs/page.js", Value::Null, 200),
            ("POST", "/api/auth/login") => public(path, json!({"username": "nobody"}), 400),
            ("POST", "/api/auth/mfa/verify" | "/api/bootstrap/admin/mfa/verify") => {
                public(path, json!({"pending_token": "no such token", "code": "000000"}), 401)
            }
            ("POST", "/api/auth/logout") => with(path, Value::Null, Rule::Leaving),
            ("POST", "/api/bootstrap/aegis/setup" | "/api/bootstrap/aegis/unlock") => {
                public(path, json!({"cipher": "another long passphrase"}), 409)
            }
            ("POST", "/api/bootstrap/admin/setup" | "/api/bootstrap/admin/recover") => {
                public(path, json!({"username": "intruder", "password": PASSWORD}), 409)
            }
            ("POST", "/api/agent/enroll/request" | "/api/agent/enroll/poll" | "/api/agent/token/refresh") => {
                public(path, json!({}), 400)
            }

            ("DELETE", "/api/auth/sessions") => with(path, Value::Null, Rule::Own),
            ("DELETE", "/api/auth/sessions/{id}") => {
                let other = self.engine.operator(&[site]).await;
                let id = other.get("/api/auth/sessions").await.ok()["sessions"][0]["id"].clone();
                with(&format!("/api/auth/sessions/{}", id.as_str().expect("an id")), Value::Null, Rule::Others(404))
            }
            ("POST", "/api/auth/passkeys/authenticate/options") => public(path, json!({}), 200),
            ("POST", "/api/auth/passkeys/authenticate/verify") => public(path, json!({}), 401),
            ("POST", "/api/auth/passkeys/register/options") => with(path, json!({}), Rule::Own),
            ("POST", "/api/auth/passkeys/register/verify") => {
                with(path, json!({"request_id": "none of the caller's", "label": "a\nb"}), Rule::Others(400))
            }
            ("PATCH" | "DELETE", "/api/auth/passkeys/{id}") => {
                let other = self.engine.user("User", &[site]).await;
                let id = self.passkey(&other).await;
                let body = if method == "PATCH" { json!({"label": "mine"}) } else { Value::Null };
                with(&format!("/api/auth/passkeys/{id}"), body, Rule::Others(404))
            }
            ("POST", "/api/auth/tokens") => with(path, json!({"name": "A program", "scopes": ["read"]}), Rule::Own),
            ("DELETE", "/api/auth/tokens/{id}") => {
                let id = self.api_token(&self.engine.user("User", &[site]).await).await;
                with(&format!("/api/auth/tokens/{id}"), Value::Null, Rule::Others(404))
            }
            ("GET", "/api/users/{username}/tokens") => {
                admin(&format!("/api/users/{}/tokens", self.engine.user("User", &[]).await), Value::Null)
            }
            ("DELETE", "/api/users/{username}/tokens/{id}") => {
                let user = self.engine.user("User", &[]).await;
                let id = self.api_token(&user).await;
                admin(&format!("/api/users/{user}/tokens/{id}"), Value::Null)
            }
            (
                "GET",
                "/api/auth/me"
                | "/api/auth/sessions"
                | "/api/auth/passkeys"
                | "/api/auth/tokens"
                | "/api/auth/mfa/recovery-codes"
                | "/api/aegis/status",
            ) => with(path, Value::Null, Rule::Anyone),
            ("POST", "/api/auth/step-up" | "/api/auth/mfa/reset" | "/api/auth/mfa/recovery-codes") => {
                with(path, json!({"password": PASSWORD}), Rule::Own)
            }
            ("POST", "/api/auth/password/reset") => {
                with(path, json!({"current_password": PASSWORD, "new_password": "an entirely new one"}), Rule::Own)
            }

            ("POST", "/api/aegis/rotate") => {
                admin(path, json!({"current_cipher": CIPHER, "new_cipher": "an entirely new passphrase"}))
            }
            // A right one would end the test's engine.
            ("POST", "/api/aegis/force_reset") => with(path, json!({"confirm": "no"}), Rule::Admin(400)),
            ("GET", "/api/users") => admin(path, Value::Null),
            ("POST", "/api/users") => {
                admin(path, json!({"username": format!("new-{}", nothing.simple()), "password": PASSWORD, "role": "User"}))
            }
            ("DELETE", "/api/users/{username}") => {
                admin(&format!("/api/users/{}", self.engine.user("User", &[]).await), Value::Null)
            }
            ("POST", "/api/users/{username}/reset_password") => {
                let user = self.engine.user("User", &[]).await;
                admin(&format!("/api/users/{user}/reset_password"), json!({"password": PASSWORD}))
            }
            ("POST", "/api/users/{username}/role") => {
                let user = self.engine.user("User", &[]).await;
                admin(&format!("/api/users/{user}/role"), json!({"role": "Admin"}))
            }
            ("POST", "/api/users/{username}/mfa") => {
                let user = self.engine.user("User", &[]).await;
                admin(&format!("/api/users/{user}/mfa"), json!({"enabled": true, "reset_secret": true}))
            }
            ("POST", "/api/users/{username}/directory-cache") => {
                let _ = self.provider().await;
                let name = format!("cached-{}", nothing.simple());
                sqlx::query(
                    "INSERT INTO users (username, username_key, role, auth_source, directory_provider_id, directory_subject)
                     SELECT $1, $1, 'User', 'directory', id, $1 FROM directory_providers LIMIT 1",
                )
                .bind(&name)
                .execute(self.pool())
                .await
                .expect("a user");
                admin(&format!("/api/users/{name}/directory-cache"), json!({}))
            }
            ("GET", "/api/github/token") => admin(path, Value::Null),
            ("POST", "/api/github/token") => admin(path, json!({"token": ""})),
            ("GET", "/api/directory/providers") => admin(path, Value::Null),
            ("POST", "/api/directory/providers") => admin(path, json!({"name": format!("Directory {nothing}")})),
            ("PATCH" | "DELETE", "/api/directory/providers/{id}") => {
                let body = if method == "PATCH" { json!({"priority": 7}) } else { Value::Null };
                admin(&format!("/api/directory/providers/{}", self.provider().await), body)
            }
            // Nothing listens there: an administrator gets as far as that.
            ("POST", "/api/directory/providers/certificate") => {
                with(path, json!({"server_url": "ldaps://nowhere.invalid"}), Rule::Admin(502))
            }
            ("POST", "/api/directory/providers/{id}/test" | "/api/directory/providers/{id}/sync") => {
                with(&path.replace("{id}", &self.provider().await.to_string()), json!({}), Rule::Admin(502))
            }
            ("POST", "/api/directory/providers/{id}/lookup-user") => {
                let at = path.replace("{id}", &self.provider().await.to_string());
                with(&at, json!({"username": "ada"}), Rule::Admin(502))
            }
            ("GET", "/api/audit" | "/api/audit/check") => admin(path, Value::Null),
            ("GET", "/api/credentials") => {
                self.credential(&nothing.to_string()).await;
                list(path, &nothing.to_string())
            }
            ("GET", "/api/credentials/{id}") => {
                let id = self.credential(&nothing.to_string()).await;
                thing(format!("/api/credentials/{id}"), "/api/credentials/999999".to_owned(), Value::Null)
            }
            ("POST", "/api/credentials") => admin(path, json!({"name": nothing.to_string()})),
            ("PUT", "/api/credentials/{id}") => {
                let id = self.credential(&nothing.to_string()).await;
                admin(&format!("/api/credentials/{id}"), json!({"description": "changed"}))
            }
            ("DELETE", "/api/credentials/{id}") => {
                let id = self.credential(&nothing.to_string()).await;
                admin(&format!("/api/credentials/{id}"), Value::Null)
            }
            ("POST", "/api/user_site_assignments/selection") => {
                admin(path, json!({"usernames": [self.engine.user("User", &[]).await]}))
            }
            ("POST", "/api/user_site_assignments/assign") => {
                admin(path, json!({"usernames": [self.engine.user("User", &[]).await], "site_ids": [site]}))
            }

            ("GET", "/api/sites") => list(path, "Site A"),
            ("GET", "/api/sites/{site_id}") => thing(format!("/api/sites/{site}"), "/api/sites/999999".into(), Value::Null),
            ("POST", "/api/sites") => with(path, json!({"name": format!("Site {nothing}")}), Rule::Admin(201)),
            ("POST", "/api/sites/delete") => {
                let (id, _) = self.engine.site(&format!("Site {nothing}")).await;
                admin(path, json!({"ids": [id]}))
            }
            ("GET", "/api/sites/device_map") => list(path, hostname),
            ("POST", "/api/sites/assign") => admin(path, json!({"site_id": site, "hostnames": [guid]})),
            ("POST", "/api/sites/rename") => {
                let (id, _) = self.engine.site(&format!("Site {nothing}")).await;
                admin(path, json!({"id": id, "new_name": format!("Renamed {nothing}")}))
            }
            ("POST", "/api/sites/{site_id}/rotate-enrollment-code") => {
                let (id, _) = self.engine.site(&format!("Site {nothing}")).await;
                admin(&format!("/api/sites/{id}/rotate-enrollment-code"), Value::Null)
            }
            ("POST", "/api/sites/{site_id}/auto-approval") => {
                admin(&format!("/api/sites/{site}/auto-approval"), json!({"auto_approve_until": 0}))
            }

            ("GET", "/api/admin/enrollment-codes") => admin(path, Value::Null),
            ("POST", "/api/admin/enrollment-codes") => with(path, json!({}), Rule::Admin(410)),
            ("DELETE", "/api/admin/enrollment-codes/{code_id}") => {
                with("/api/admin/enrollment-codes/site:1", Value::Null, Rule::Admin(410))
            }
            ("GET", "/api/admin/device-approvals") => list(path, &self.approval().await),
            ("POST", "/api/admin/device-approvals/{approval_id}/approve" | "/api/admin/device-approvals/{approval_id}/deny") => {
                let at = |id: &str| path.replace("{approval_id}", id);
                thing(at(&self.approval().await), at(&nothing.to_string()), json!({}))
            }

            ("POST", "/api/agent/heartbeat" | "/api/agent/status" | "/api/agent/details" | "/api/agent/script/request") => {
                with(path, json!({}), Rule::Device(200))
            }
            ("GET", "/api/agent/metadata/{number}") => with("/api/agent/metadata/1", Value::Null, Rule::Device(200)),
            // There are no tunnels yet, which is told to devices alone.
            ("POST", "/api/agent/vpn/ensure") => with(path, json!({}), Rule::Device(503)),

            ("GET", "/api/engine/hold") => with(path, Value::Null, Rule::Anyone),

            ("GET", "/api/devices") => list(path, guid),
            ("GET", "/api/agents") => {
                self.connected().await;
                list(path, guid)
            }
            ("GET", "/api/devices/{guid}") => {
                thing(format!("/api/devices/{guid}"), format!("/api/devices/{nothing}"), Value::Null)
            }
            ("GET", "/api/devices/search") => list(&format!("/api/devices/search?hostname={hostname}"), guid),
            ("POST", "/api/devices/{guid}/hostname") => {
                let body = json!({"hostname": hostname});
                let _ = self.device.post("/api/agent/heartbeat", body.clone()).await.ok();
                thing(format!("/api/devices/{guid}/hostname"), format!("/api/devices/{nothing}/hostname"), body)
            }
            ("POST", "/api/device/description/{hostname}") => {
                let body = json!({"description": "rack 4"});
                thing(format!("/api/device/description/{hostname}"), "/api/device/description/no-such-host".into(), body)
            }
            ("GET", "/api/device/details/{hostname}") => {
                thing(format!("/api/device/details/{hostname}"), "/api/device/details/no-such-host".into(), Value::Null)
            }
            ("GET", "/api/device/processes/{hostname}") => {
                self.answering().await;
                thing(format!("/api/device/processes/{hostname}"), "/api/device/processes/no-such-host".into(), Value::Null)
            }
            ("GET" | "DELETE", "/api/device/activity/{hostname}") => {
                let _ = self.activity().await;
                thing(format!("/api/device/activity/{hostname}"), "/api/device/activity/no-such-host".into(), Value::Null)
            }
            ("GET", "/api/device/activity/job/{job_id}") => {
                let at = |id: i64| format!("/api/device/activity/job/{id}");
                thing(at(self.activity().await), at(i64::from(i32::MAX)), Value::Null)
            }

            ("GET", "/api/runs") => list(path, &self.workflow_run("pending").await.to_string()),
            ("GET", "/api/runs/{id}" | "/api/runs/{id}/events") | ("POST", "/api/runs/{id}/cancel") => {
                let at = |id: Uuid| path.replace("{id}", &id.to_string());
                let body = if method == "GET" { Value::Null } else { json!({}) };
                thing(at(self.workflow_run("pending").await), at(nothing), body)
            }
            ("POST", "/api/runs/{id}/retry") => {
                let at = |id: Uuid| format!("/api/runs/{id}/retry");
                thing(at(self.workflow_run("failed").await), at(nothing), json!({}))
            }

            ("GET", "/api/scheduled_jobs") => {
                let _ = self.job().await;
                list(path, guid)
            }
            ("POST", "/api/scheduled_jobs") => {
                let absent = self.job_body(&nothing.to_string()).await;
                let rule = Rule::Named { status: 403, code: "out_of_scope_targets", absent };
                with(path, self.job_body(guid).await, rule)
            }
            ("POST", "/api/scheduled_jobs/preview") => {
                with(path, json!({"schedule": {"type": "cron", "cron": "0 3 * * *"}, "count": 3}), Rule::Anyone)
            }
            ("GET" | "PUT" | "DELETE", "/api/scheduled_jobs/{id}")
            | ("POST", "/api/scheduled_jobs/{id}/toggle" | "/api/scheduled_jobs/{id}/rerun") => {
                let at = |id: i64| path.replace("{id}", &id.to_string());
                let body = match (method, path.rsplit('/').next()) {
                    ("PUT", _) => json!({"name": "Another name"}),
                    (_, Some("toggle")) => json!({"enabled": false}),
                    ("POST", _) => json!({}),
                    _ => Value::Null,
                };
                thing(at(self.job().await), at(i64::from(i32::MAX)), body)
            }
            ("POST", "/api/scheduled_jobs/{id}/retry_failed")
            | ("GET" | "DELETE", "/api/scheduled_jobs/{id}/runs")
            | ("GET", "/api/scheduled_jobs/{id}/devices") => {
                let (job, _) = self.job_run("Failed").await;
                let at = |id: i64| path.replace("{id}", &id.to_string());
                let body = if method == "POST" { json!({}) } else { Value::Null };
                thing(at(job), at(i64::from(i32::MAX)), body)
            }
            ("POST", "/api/scheduled_jobs/{id}/runs/{run_id}/cancel") => {
                let (job, run) = self.job_run("Pending").await;
                let at = |run: i64| format!("/api/scheduled_jobs/{job}/runs/{run}/cancel");
                thing(at(run), at(i64::from(i32::MAX)), json!({}))
            }

            ("GET", "/api/assemblies") => with(path, Value::Null, Rule::Anyone),
            ("POST", "/api/assemblies") => {
                let payload = json!({"name": "Hi", "type": "bash", "script": "echo hi"});
                with(path, json!({"domain": "user", "display_name": "Hi", "payload": payload}), Rule::Anyone)
            }
            ("POST", "/api/assemblies/import") => {
                with(path, json!({"document": {"name": "Hi", "type": "bash", "script": "echo hi"}}), Rule::Anyone)
            }
            ("GET", "/api/assemblies/{guid}/export") => {
                with(&format!("/api/assemblies/{}/export", self.assembly().await), Value::Null, Rule::Anyone)
            }
            ("GET" | "PUT" | "DELETE", "/api/assemblies/{guid}") => {
                let body = if method == "PUT" { json!({"display_name": "Hello again"}) } else { Value::Null };
                with(&format!("/api/assemblies/{}", self.assembly().await), body, Rule::Anyone)
            }
            ("POST", "/api/scripts/quick_run") => {
                let body = |host: &str, assembly: &str| json!({"assembly_guid": assembly, "hostnames": [host]});
                let assembly = self.assembly().await;
                let absent = body("no-such-host", &assembly);
                let rule = Rule::Named { status: 403, code: "out_of_scope_hostnames", absent };
                with(path, body(hostname, &assembly), rule)
            }
            _ => None,
        }
    }
}

/// What a wrong answer looks like.
fn complain(faults: &mut Vec<String>, route: &str, who: &str, expected: &str, reply: &Reply) {
    faults.push(format!("{route} as {who}: expected {expected}, got {} {}", reply.status, reply.text));
}

fn is_error(reply: &Reply, status: u16, code: &str) -> bool {
    reply.status == status && reply.body["error"] == code
}

/// The body without what differs between any two answers.
fn comparable(reply: &Reply, names: &[&str]) -> (u16, String) {
    let mut body = reply.body.clone();
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
    }
    let mut text = body.to_string();
    for name in names {
        text = text.replace(name, "<name>");
    }
    (reply.status, text)
}

async fn send(actor: &Actor, method: &str, call: &Call) -> Reply {
    actor.call(method, &call.path, call.body.as_ref()).await
}

#[tokio::test]
async fn every_route_keeps_to_its_class_and_to_its_site() {
    let world = World::new().await;
    let (_, _, table) = borealis_api::app::build(&world.engine.app);
    assert!(table.len() > 20, "the access table is too short to be true");
    for device in [&world.device, &world.other_device] {
        let _ = device.post("/api/agent/heartbeat", json!({"hostname": device.hostname})).await.ok();
    }
    let mut faults = Vec::new();
    for entry in &table {
        let route = format!("{} {}", entry.method, entry.path);
        match world.call(&route).await {
            Some(call) => check(&world, &route, &entry.method, entry.class, call, &mut faults).await,
            None => faults.push(format!("{route} is not tried: add it to World::call")),
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

async fn check(world: &World, route: &str, method: &str, class: Class, call: Call, faults: &mut Vec<String>) {
    let devices = [&world.device.actor, &world.other_device.actor];
    let operators: Vec<&Actor> = [&world.operator].into_iter().chain(&world.strangers).collect();

    // Who is not of the class at all.
    if class != Class::Anonymous {
        let mut outside: Vec<&Actor> = world.unknown.iter().collect();
        match class {
            Class::Device => outside.extend(operators.iter().copied().chain([&world.admin])),
            _ => outside.extend(devices),
        }
        for actor in outside {
            let reply = send(actor, method, &call).await;
            let fits = match class {
                Class::Device => reply.status == 401,
                _ => is_error(&reply, 401, "unauthorized"),
            };
            if !fits {
                complain(faults, route, &actor.name, "401", &reply);
            }
        }
    }
    if class == Class::Admin {
        for actor in &operators {
            let reply = send(actor, method, &call).await;
            if !is_error(&reply, 403, "forbidden") {
                complain(faults, route, &actor.name, "403 forbidden", &reply);
            }
        }
    }

    // Who is of the class.
    let fits = matches!(
        (class, &call.rule),
        (Class::Anonymous, Rule::Public(_) | Rule::Leaving)
            | (Class::Admin, Rule::Admin(_))
            | (Class::Device, Rule::Device(_))
            | (
                Class::Operator,
                Rule::Thing { .. } | Rule::Named { .. } | Rule::List { .. } | Rule::Anyone | Rule::Own | Rule::Others(_)
            )
    );
    if !fits {
        faults.push(format!("{route} is {class:?}, but its line in World::call is for another class"));
        return;
    }
    match &call.rule {
        Rule::Public(status) => {
            let all = world.unknown.iter().chain(operators).chain(devices).chain([&world.admin]);
            for actor in all {
                let reply = send(actor, method, &call).await;
                if reply.status != *status {
                    complain(faults, route, &actor.name, &status.to_string(), &reply);
                }
            }
        }
        Rule::Leaving => {
            let no_browser = world.unknown.iter().filter(|actor| !matches!(actor.credential, Credential::Cookie(_)));
            for actor in no_browser.chain(devices) {
                let reply = send(actor, method, &call).await;
                if reply.status != 200 {
                    complain(faults, route, &actor.name, "200", &reply);
                }
            }
        }
        Rule::Admin(status) => {
            let reply = send(&world.admin, method, &call).await;
            if reply.status != *status {
                complain(faults, route, "admin", &status.to_string(), &reply);
            }
        }
        Rule::Device(status) => {
            for device in [&world.device, &world.other_device] {
                let mut body = call.body.clone().unwrap_or_default();
                body["hostname"] = device.hostname.as_str().into();
                body["details"]["summary"]["hostname"] = device.hostname.as_str().into();
                let reply = device.call(method, &call.path, Some(&body)).await;
                if reply.status != *status {
                    complain(faults, route, &device.name, &status.to_string(), &reply);
                }
            }
        }
        Rule::Own => {
            let operator = world.engine.operator(&[world.site]).await;
            let _ = operator.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
            let reply = send(&operator, method, &call).await;
            if !(200..300).contains(&reply.status) {
                complain(faults, route, "an operator made for it", "success", &reply);
            }
        }
        Rule::Others(status) => {
            for actor in operators.into_iter().chain([&world.admin]) {
                let reply = send(actor, method, &call).await;
                if reply.status != *status {
                    complain(faults, route, &actor.name, &status.to_string(), &reply);
                }
            }
        }
        Rule::Anyone => {
            for actor in operators.into_iter().chain([&world.admin]) {
                let Some(call) = world.call(route).await else { continue };
                let reply = send(actor, method, &call).await;
                if !(200..300).contains(&reply.status) {
                    complain(faults, route, &actor.name, "success", &reply);
                }
            }
        }
        Rule::List { shows } => {
            let mine = [(&world.operator, true), (&world.admin, true)];
            for (actor, may) in world.strangers.iter().map(|stranger| (stranger, false)).chain(mine) {
                let reply = send(actor, method, &call).await;
                if reply.status != 200 || reply.text.to_lowercase().contains(&shows.to_lowercase()) != may {
                    let expected = format!("200 {} {shows}", if may { "with" } else { "without" });
                    complain(faults, route, &actor.name, &expected, &reply);
                }
            }
        }
        Rule::Thing { absent } => {
            for actor in &world.strangers {
                let foreign = send(actor, method, &call).await;
                let nothing = actor.call(method, absent, call.body.as_ref()).await;
                if foreign.status != 404 || comparable(&foreign, &[]) != comparable(&nothing, &[]) {
                    complain(faults, route, &actor.name, &format!("the 404 of an absent one, {}", nothing.text), &foreign);
                }
            }
            let reply = world.operator.call(method, absent, call.body.as_ref()).await;
            if reply.status != 404 {
                complain(faults, route, "operator, of an absent one", "404", &reply);
            }
            owners(world, route, method, call, faults).await;
        }
        Rule::Named { status, code, absent } => {
            for actor in &world.strangers {
                let foreign = send(actor, method, &call).await;
                let nothing = actor.call(method, &call.path, Some(absent)).await;
                let nothing_guid = absent["targets"][0]["device_guid"].as_str().unwrap_or("no-such-host").to_owned();
                let upper = [world.device.guid.to_uppercase(), nothing_guid.to_uppercase()];
                let lower = [world.device.guid.to_lowercase(), nothing_guid.to_lowercase()];
                let names = [&*upper[0], &*upper[1], &*lower[0], &*lower[1], &*world.device.hostname];
                let is_same = comparable(&foreign, &names) == comparable(&nothing, &names);
                if !is_error(&foreign, *status, code) || !is_same {
                    let expected = format!("{status} {code}, as for an absent one, {}", nothing.text);
                    complain(faults, route, &actor.name, &expected, &foreign);
                }
            }
            owners(world, route, method, call, faults).await;
        }
    }
}

/// The operator of the site and the administrator succeed, each with a thing of its own.
async fn owners(world: &World, route: &str, method: &str, call: Call, faults: &mut Vec<String>) {
    let reply = send(&world.operator, method, &call).await;
    if !(200..300).contains(&reply.status) {
        complain(faults, route, "operator of the site", "success", &reply);
    }
    if let Some(again) = world.call(route).await {
        let reply = send(&world.admin, method, &again).await;
        if !(200..300).contains(&reply.status) {
            complain(faults, route, "admin", "success", &reply);
        }
    }
}
