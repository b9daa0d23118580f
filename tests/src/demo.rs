//! The demo: what a person would do with `curl` on a fresh engine, with words for what happens.

use std::{
    fmt::{self, Write as _},
    fs,
    io::{IsTerminal, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures::StreamExt;
use reqwest::{Method, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::totp;

/// How long a run of the demo job may take until the demo gives up on it.
const RUN_LIMIT: Duration = Duration::from_secs(120);
/// How long the agent may take to enroll and come online.
const AGENT_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);
const USERNAME: &str = "admin";
const SITE: &str = "Demo site";
const ASSEMBLY: &str = "Demo: say hello";
const JOB: &str = "Demo job";
/// What the demo job runs.
const SCRIPT: &str = r#"echo "Hello from $(hostname): this ran as $(id -un), sent by Borealis Engine."
echo "Kernel  $(uname -sr)"
echo "Load    $(cut -d' ' -f1-3 /proc/loadavg)"
for step in 1 2 3; do
  echo "step $step of 3"
  sleep 0.5
done
echo "done at $(date -u +%H:%M:%S) UTC"
"#;

/// Why the demo cannot go on, in words for the person who started it.
#[derive(Debug)]
pub struct Trouble(pub String);

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Shorthand for what the demo returns.
pub type Result<T> = std::result::Result<T, Trouble>;

fn trouble<T>(text: impl Into<String>) -> Result<T> {
    Err(Trouble(text.into()))
}

/// `<state>/demo.json`: everything needed to go on as the demo's administrator. Written after every step, so that a demo that
/// was interrupted can be started again.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Notes {
    /// Where the API is reached on this machine.
    pub base_url: Option<String>,
    /// The first administrator.
    pub username: Option<String>,
    /// The administrator's password.
    pub password: Option<String>,
    /// The base32 secret for an authenticator app.
    pub totp_secret: Option<String>,
    /// What unlocks the secrets.
    pub aegis_cipher: Option<String>,
    /// The demo's site.
    pub site_id: Option<i64>,
    /// Lets further machines ask to join the site.
    pub enrollment_code: Option<String>,
    /// This machine, as a device.
    pub device_guid: Option<String>,
    /// The scheduled job.
    pub job_id: Option<i64>,
}

impl Notes {
    /// Reads the notes of an earlier demo.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(state_dir: &Path) -> Result<Self> {
        let path = Self::path(state_dir);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .or_else(|error| trouble(format!("{} cannot be read: {error}. Remove it to start over.", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => trouble(format!("{} cannot be read: {error}.", path.display())),
        }
    }

    /// Writes the notes as a whole, for this user alone (mode 0600).
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, state_dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Trouble(error.to_string()))?;
        write_private(&Self::path(state_dir), &text)
    }

    /// Where the notes of a state folder are.
    #[must_use]
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("demo.json")
    }
}

/// Writes a file as a whole, for this user alone.
fn write_private(path: &Path, text: &str) -> Result<()> {
    let draft = path.with_extension("new");
    let _ = fs::remove_file(&draft);
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&draft, path))
        .or_else(|error| trouble(format!("{} cannot be written: {error}.", path.display())))
}

/// What is shown of the demo's progress: a line for each step.
#[derive(Debug)]
pub struct Screen {
    terminal: bool,
}

impl Default for Screen {
    fn default() -> Self {
        Self { terminal: std::io::stdout().is_terminal() }
    }
}

impl Screen {
    /// Shows a step while it happens, and then that it is done.
    pub async fn step<T>(&self, name: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        let started = Instant::now();
        if self.terminal {
            print!("  .. {name}");
            let _ = std::io::stdout().flush();
        }
        let done = work.await;
        let seconds = started.elapsed().as_secs_f64();
        if self.terminal {
            print!("\r\x1b[K");
        }
        match &done {
            Ok(_) => println!("  {} {name}  {}", self.paint("32", "ok"), self.paint("2", &format!("{seconds:.1} s"))),
            Err(_) => println!("  {} {name}", self.paint("31", "!!")),
        }
        done
    }

    /// `text` in an SGR colour, where a terminal shows it.
    #[must_use]
    pub fn paint(&self, colour: &str, text: &str) -> String {
        if self.terminal { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A heading.
    pub fn heading(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }
}

/// A REST client with a session.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
    /// Shown to the set-up routes when this machine is not reached over loopback.
    setup_token: Option<String>,
}

/// An answer that is not the expected one.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    body: Value,
}

impl Answer {
    fn code(&self) -> &str {
        self.body.get("error").and_then(Value::as_str).unwrap_or_default()
    }
}

impl Client {
    /// A client of the engine at `base`, without a session.
    ///
    /// # Errors
    /// When there is no TLS provider to build it with.
    pub fn new(base: &str, state_dir: &Path) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .build()
            .map_err(|error| Trouble(error.to_string()))?;
        let setup_token =
            fs::read_to_string(state_dir.join("secrets").join("setup.token")).ok().map(|text| text.trim().to_owned());
        Ok(Self { http, base: base.trim_end_matches('/').to_owned(), token: None, setup_token })
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let mut request = self.http.request(method, format!("{}{path}", self.base)).header(header::ACCEPT, "application/json");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        } else if let Some(token) = &self.setup_token {
            request = request.header("X-Borealis-Setup-Token", token);
        }
        request
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer> {
        let mut request = self.request(method, path).timeout(Duration::from_secs(30));
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.map_err(|error| Trouble(format!("{path}: {error}")))?;
        let status = answer.status();
        let text = answer.text().await.map_err(|error| Trouble(format!("{path}: {error}")))?;
        Ok(Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) })
    }

    /// As [`Self::exchange`], with everything but a success as trouble.
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
        let answer = self.exchange(method.clone(), path, body.as_ref()).await?;
        if answer.status.is_success() {
            return Ok(answer.body);
        }
        trouble(format!("{method} {path} answered {}: {}", answer.status.as_u16(), answer.body))
    }

    async fn get(&self, path: &str) -> Result<Value> {
        self.call(Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Result<Value> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Waits until the engine is ready; `gone` says why it will not be.
    ///
    /// # Errors
    /// What `gone` says.
    pub async fn ready(&self, mut gone: impl FnMut() -> Option<String>) -> Result<()> {
        loop {
            if let Ok(answer) = self.exchange(Method::GET, "/ready", None).await
                && answer.status.is_success()
            {
                return Ok(());
            }
            if let Some(why) = gone() {
                return trouble(why);
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value.get(name).and_then(Value::as_str).ok_or_else(|| Trouble(format!("the answer has no text \"{name}\": {value}")))
}

fn number(value: &Value, name: &str) -> Result<i64> {
    value.get(name).and_then(Value::as_i64).ok_or_else(|| Trouble(format!("the answer has no number \"{name}\": {value}")))
}

fn list<'a>(value: &'a Value, name: &str) -> Result<&'a [Value]> {
    let found = value.get(name).and_then(Value::as_array);
    found.map(Vec::as_slice).ok_or_else(|| Trouble(format!("the answer has no list \"{name}\": {value}")))
}

/// 128 random bits for a person to read off a screen.
fn passphrase() -> String {
    let bytes: [u8; 16] = rand::random();
    bytes.chunks(4).fold(String::new(), |mut text, chunk| {
        if !text.is_empty() {
            text.push('-');
        }
        for byte in chunk {
            let _ = write!(text, "{byte:02x}");
        }
        text
    })
}

/// Brings the engine from whatever phase it is in to a signed-in administrator.
///
/// # Errors
/// When somebody else has set this engine up, or an answer is not the expected one.
pub async fn sign_in(client: &mut Client, notes: &mut Notes, state_dir: &Path) -> Result<()> {
    let foreign = || {
        trouble(format!(
            "This engine was not set up by the demo, or {} is gone. Give the demo a state folder of its own:\n    \
             BOREALIS_STATE_DIR=.borealis-demo ./borealis demo",
            Notes::path(state_dir).display()
        ))
    };
    let session_file = state_dir.join("secrets").join("demo.session");
    // Each phase leads to another; there are five.
    for _ in 0..8 {
        let state = client.get("/api/bootstrap/state").await?;
        match text(&state, "phase")? {
            "aegis_setup_required" => {
                // Noted first: a cipher that was set and is not known could not be helped.
                let cipher = notes.aegis_cipher.get_or_insert_with(passphrase).clone();
                notes.write(state_dir)?;
                client.post("/api/bootstrap/aegis/setup", json!({"cipher": cipher})).await?;
            }
            "aegis_unlock_required" => {
                let Some(cipher) = &notes.aegis_cipher else { return foreign() };
                client.post("/api/bootstrap/aegis/unlock", json!({"cipher": cipher})).await?;
            }
            "admin_setup_required" => {
                let password = notes.password.get_or_insert_with(passphrase).clone();
                notes.username = Some(USERNAME.to_owned());
                notes.write(state_dir)?;
                let body = json!({"username": USERNAME, "display_name": "Demo administrator", "password": password});
                let pending = client.post("/api/bootstrap/admin/setup", body).await?;
                let secret = text(&pending, "secret")?.to_owned();
                notes.totp_secret = Some(secret.clone());
                notes.write(state_dir)?;
                let body = json!({"pending_token": text(&pending, "pending_token")?, "code": totp::code(&secret, 0)});
                let done = client.post("/api/bootstrap/admin/mfa/verify", body).await?;
                let token = text(&done, "token")?.to_owned();
                write_private(&session_file, &token)?;
                client.token = Some(token);
                return Ok(());
            }
            "login_required" => {
                let (Some(username), Some(password), Some(secret)) = (&notes.username, &notes.password, &notes.totp_secret)
                else {
                    return foreign();
                };
                // The last demo's session, while it lasts: an authenticator code can be used only once.
                if let Ok(token) = fs::read_to_string(&session_file) {
                    client.token = Some(token.trim().to_owned());
                    if client.exchange(Method::GET, "/api/auth/me", None).await?.status.is_success() {
                        return Ok(());
                    }
                    client.token = None;
                }
                let token = login(client, username, password, secret).await?;
                write_private(&session_file, &token)?;
                client.token = Some(token);
                return Ok(());
            }
            _ => return foreign(),
        }
    }
    trouble("the engine does not leave its set-up phases")
}

async fn login(client: &Client, username: &str, password: &str, secret: &str) -> Result<String> {
    // A code is taken once, and the next one a little early. After several sign-ins in a row, both were used.
    for (steps, wait) in [(0, false), (1, false), (1, true)] {
        if wait {
            let now = Utc::now().timestamp().unsigned_abs();
            tokio::time::sleep(Duration::from_secs(totp::STEP_S - now % totp::STEP_S + 1)).await;
        }
        let pending = client.post("/api/auth/login", json!({"username": username, "password": password})).await?;
        if let Ok(token) = text(&pending, "token") {
            return Ok(token.to_owned());
        }
        let body = json!({"pending_token": text(&pending, "pending_token")?, "code": totp::code(secret, steps)});
        let answer = client.exchange(Method::POST, "/api/auth/mfa/verify", Some(&body)).await?;
        if answer.status.is_success() {
            return text(&answer.body, "token").map(str::to_owned);
        }
        if answer.code() != "invalid_code" {
            return trouble(format!("signing in as {username} was refused: {}", answer.body));
        }
    }
    trouble(format!("no code of {username}'s authenticator was accepted; is this machine's clock right?"))
}

/// Finds or makes the demo's site.
///
/// # Errors
/// When an answer is not the expected one.
pub async fn site(client: &Client, notes: &mut Notes, state_dir: &Path) -> Result<()> {
    let found = client.get("/api/sites").await?;
    let sites = list(&found, "sites")?;
    let known = sites.iter().find(|site| notes.site_id.is_some() && site.get("id").and_then(Value::as_i64) == notes.site_id);
    let named = || sites.iter().find(|site| site.get("name").and_then(Value::as_str) == Some(SITE));
    let site = match known.or_else(named) {
        Some(site) => site.clone(),
        None => client.post("/api/sites", json!({"name": SITE, "description": "Made by ./borealis demo"})).await?,
    };
    let id = number(&site, "id")?;
    if notes.site_id != Some(id) {
        (notes.device_guid, notes.job_id) = (None, None);
    }
    notes.site_id = Some(id);
    notes.enrollment_code = Some(text(&site, "enrollment_code")?.to_owned());
    notes.write(state_dir)
}

/// Whether the demo's device is online.
///
/// # Errors
/// When an answer is not the expected one.
pub async fn is_online(client: &Client, guid: &str) -> Result<bool> {
    let agents = client.get("/api/agents").await?;
    let Some(agents) = agents.as_object() else { return trouble(format!("the list of agents is no object: {agents}")) };
    Ok(agents.values().any(|agent| same_guid(agent.get("agent_guid"), guid)))
}

fn same_guid(found: Option<&Value>, guid: &str) -> bool {
    found.and_then(Value::as_str).is_some_and(|found| found.eq_ignore_ascii_case(guid))
}

/// Approves this machine's request to join the site, unless it is a device already, and waits until its agent is online.
///
/// # Errors
/// When it does not come online; `gone` says why the agent ended.
pub async fn admit(
    client: &Client,
    notes: &mut Notes,
    state_dir: &Path,
    hostname: &str,
    mut gone: impl FnMut() -> Option<String>,
) -> Result<()> {
    let deadline = Instant::now() + AGENT_LIMIT;
    let mut approved: Option<Value> = None;
    loop {
        if let Some(guid) = notes.device_guid.clone()
            && is_online(client, &guid).await?
        {
            return Ok(());
        }
        let approvals = client.get("/api/admin/device-approvals?status=all").await?;
        let mine = |approval: &&Value| {
            approval.get("site_id").and_then(Value::as_i64) == notes.site_id
                && approval
                    .get("hostname_claimed")
                    .and_then(Value::as_str)
                    .is_some_and(|name| name.eq_ignore_ascii_case(hostname))
        };
        let approvals = list(&approvals, "approvals")?;
        let is_pending = |approval: &&Value| approval.get("status").and_then(Value::as_str) == Some("pending");
        if let Some(pending) = approvals.iter().filter(mine).find(is_pending) {
            let id = pending.get("id").cloned().unwrap_or_default();
            let path = format!("/api/admin/device-approvals/{}/approve", id_text(&id));
            // The same machine may have been a device with another key: it is the same device then.
            let conflict = pending.get("conflict_requires_prompt").and_then(Value::as_bool) == Some(true);
            let body = if conflict { json!({"conflict_resolution": "overwrite"}) } else { json!({}) };
            client.post(&path, body).await?;
            approved = Some(id);
        } else if let Some(id) = &approved
            && let Some(guid) =
                approvals.iter().find(|found| found.get("id") == Some(id)).and_then(|found| text(found, "guid").ok())
        {
            notes.device_guid = Some(guid.to_owned());
            notes.write(state_dir)?;
        }
        if let Some(why) = gone() {
            return trouble(why);
        }
        if Instant::now() > deadline {
            return trouble(format!("the agent did not come online within {} s", AGENT_LIMIT.as_secs()));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn id_text(id: &Value) -> String {
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}

/// Makes the demo's script, or finds it.
///
/// # Errors
/// When an answer is not the expected one.
pub async fn assembly(client: &Client) -> Result<String> {
    let found = client.get("/api/assemblies?domain=user").await?;
    let present = list(&found, "items")?.iter().find(|item| item.get("display_name").and_then(Value::as_str) == Some(ASSEMBLY));
    if let Some(item) = present {
        return text(item, "assembly_guid").map(str::to_owned);
    }
    let body = json!({
        "domain": "user",
        "display_name": ASSEMBLY,
        "summary": "Says hello from the machine it runs on.",
        "assembly_type": "script",
        "assembly_subtype": "bash",
        "payload": {
            "name": ASSEMBLY,
            "description": "Says hello from the machine it runs on.",
            "category": "script",
            "type": "bash",
            "script_lines": SCRIPT.lines().collect::<Vec<_>>(),
            "timeout_seconds": 60,
        },
    });
    let made = client.post("/api/assemblies", body).await?;
    text(&made, "assembly_guid").map(str::to_owned)
}

/// Schedules the job to run now, or runs it once more, and returns the id of the workflow run.
///
/// # Errors
/// When an answer is not the expected one, or no run appears.
pub async fn schedule(client: &Client, notes: &mut Notes, state_dir: &Path, hostname: &str, assembly: &str) -> Result<String> {
    let mut known = Vec::new();
    let again = match notes.job_id {
        Some(job) => {
            known = runs(client, job).await.unwrap_or_default();
            let answer = client.exchange(Method::POST, &format!("/api/scheduled_jobs/{job}/rerun"), None).await?;
            match answer.status.as_u16() {
                200..300 => true,
                404 => false,
                // The last demo's occurrence is still under way: its run is what there is to watch.
                409 if answer.code() == "occurrence_in_progress" => {
                    known.clear();
                    true
                }
                status => return trouble(format!("running job {job} again was refused with {status}: {}", answer.body)),
            }
        }
        None => false,
    };
    if !again {
        known.clear();
        let made = client
            .post(
                "/api/scheduled_jobs",
                json!({
                    "name": JOB,
                    "components": [{"kind": "script", "name": ASSEMBLY, "assembly_guid": assembly}],
                    "targets": [{"kind": "device", "hostname": hostname, "device_guid": notes.device_guid, "site_id": notes.site_id}],
                    "schedule": {"type": "immediately"},
                    "execution_context": "system",
                    "enabled": true,
                }),
            )
            .await?;
        notes.job_id = Some(number(made.get("job").unwrap_or(&made), "id")?);
        notes.write(state_dir)?;
    }
    let Some(job) = notes.job_id else { return trouble("the job has no id") };
    let deadline = Instant::now() + RUN_LIMIT;
    loop {
        if let Some(run) = runs(client, job).await?.into_iter().find(|run| !known.contains(run)) {
            return Ok(run);
        }
        if Instant::now() > deadline {
            return trouble(format!("job {job} was due and no run of it appeared; is the worker running?"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The workflow runs of a job, newest first.
async fn runs(client: &Client, job: i64) -> Result<Vec<String>> {
    let found = client.get(&format!("/api/runs?job_id={job}&limit=50")).await?;
    let runs = list(&found, "runs")?.iter().filter(|run| run.get("parent_id").is_none_or(Value::is_null));
    runs.map(|run| text(run, "id").map(str::to_owned)).collect()
}

/// Shows the events of a run as they happen, until it has ended; its final state.
///
/// # Errors
/// When it does not end in time.
pub async fn timeline(client: &Client, run: &str, screen: &Screen) -> Result<String> {
    let mut shown = Shown::default();
    let deadline = Instant::now() + RUN_LIMIT;
    loop {
        let request = client
            .request(Method::GET, &format!("/api/runs/{run}/events"))
            .header(header::ACCEPT, "text/event-stream")
            .header("Last-Event-ID", shown.last.to_string());
        // Accept was set for JSON already; the stream's is the one that counts.
        let mut request = request.build().map_err(|error| Trouble(error.to_string()))?;
        request.headers_mut().insert(header::ACCEPT, header::HeaderValue::from_static("text/event-stream"));
        let answer = client.http.execute(request).await.map_err(|error| Trouble(error.to_string()))?;
        if !answer.status().is_success() {
            return trouble(format!("the run's events cannot be followed: {}", answer.status()));
        }
        let mut stream = answer.bytes_stream();
        let mut buffer = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                chunk = stream.next() => match chunk {
                    Some(Ok(bytes)) => {
                        buffer.extend_from_slice(&bytes);
                        for event in events_of(&mut buffer) {
                            shown.show(&event, screen);
                        }
                    }
                    _ => break,
                },
                _ = tick.tick() => {
                    let state = client.get(&format!("/api/runs/{run}")).await?;
                    let state = state.get("run").unwrap_or(&state);
                    let name = text(state, "state")?;
                    if matches!(name, "succeeded" | "failed" | "cancelled") {
                        let rest = client.get(&format!("/api/runs/{run}/events")).await?;
                        for event in list(&rest, "events")? {
                            shown.show(event, screen);
                        }
                        return Ok(name.to_owned());
                    }
                    if Instant::now() > deadline {
                        return trouble(format!("run {run} has not ended after {} s; it is {name}", RUN_LIMIT.as_secs()));
                    }
                }
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Takes the complete events off the front of an event stream's buffer.
fn events_of(buffer: &mut Vec<u8>) -> Vec<Value> {
    let mut events = Vec::new();
    while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
        let block: Vec<u8> = buffer.drain(..end + 2).collect();
        let block = String::from_utf8_lossy(&block);
        let data: Vec<&str> = block.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start).collect();
        if let Ok(event) = serde_json::from_str::<Value>(&data.join("\n"))
            && event.get("seq").is_some()
        {
            events.push(event);
        }
    }
    events
}

/// What of a timeline was shown.
#[derive(Debug, Default)]
struct Shown {
    last: i64,
    first_at: Option<DateTime<Utc>>,
}

impl Shown {
    fn show(&mut self, event: &Value, screen: &Screen) {
        let seq = event.get("seq").and_then(Value::as_i64).unwrap_or(0);
        if seq <= self.last {
            return;
        }
        self.last = seq;
        let at = event.get("at").and_then(instant);
        let first = *self.first_at.get_or_insert_with(|| at.unwrap_or_else(Utc::now));
        let after = at.map_or(0.0, |at| (at - first).as_seconds_f64());
        let of = |name: &str| event.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut line = format!("  {:>7}  {:<18} {}", format!("+{after:.2}s"), of("kind").replace('_', " "), of("step"));
        if event.get("attempt").and_then(Value::as_i64).is_some_and(|attempt| attempt > 1) {
            let _ = write!(line, "  attempt {}", event["attempt"]);
        }
        if let Some(detail) = event.get("detail").and_then(brief) {
            let _ = write!(line, "  {}", screen.paint("2", &detail));
        }
        println!("{}", line.trim_end());
    }
}

/// A time as the API writes them: RFC 3339, or seconds of the epoch.
fn instant(value: &Value) -> Option<DateTime<Utc>> {
    match value {
        Value::String(text) => DateTime::parse_from_rfc3339(text).ok().map(|at| at.to_utc()),
        Value::Number(seconds) => DateTime::from_timestamp_micros((seconds.as_f64()? * 1e6) as i64),
        _ => None,
    }
}

/// The short members of an event's detail.
fn brief(detail: &Value) -> Option<String> {
    let line = match detail {
        Value::String(text) => text.clone(),
        Value::Object(members) => {
            let scalars = members.iter().filter(|(_, value)| !value.is_null() && !value.is_object() && !value.is_array());
            scalars.map(|(name, value)| format!("{name}={}", id_text(value))).collect::<Vec<_>>().join(" ")
        }
        _ => return None,
    };
    let line: String = line.chars().filter(|letter| !letter.is_control()).take(90).collect();
    (!line.is_empty()).then_some(line)
}

/// What the script printed, and how it ended.
#[derive(Debug)]
pub struct Outcome {
    /// `Success`, `Failed`, ...
    pub status: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The result on the demo's device.
///
/// # Errors
/// When an answer is not the expected one.
pub async fn outcome(client: &Client, notes: &Notes) -> Result<Outcome> {
    let Some(job) = notes.job_id else { return trouble("the job has no id") };
    let found = client.get(&format!("/api/scheduled_jobs/{job}/devices")).await?;
    let Some(device) = list(&found, "devices")?.first() else { return trouble("the job's result names no device") };
    let status = text(device, "job_status")?.to_owned();
    let activity = device.get("activities").and_then(Value::as_array).and_then(|activities| activities.last());
    let Some(activity) = activity else { return Ok(Outcome { status, stdout: String::new(), stderr: String::new() }) };
    let activity = client.get(&format!("/api/device/activity/job/{}", number(activity, "activity_id")?)).await?;
    let of = |name: &str| activity.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Outcome { status, stdout: of("stdout"), stderr: of("stderr") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_stream_is_read_in_any_cut() {
        let stream = b": keep-alive\n\nid: 1\nevent: step\ndata: {\"seq\":1,\"kind\":\"a\"}\n\nid: 2\ndata: {\"seq\":2,\ndata: \"kind\":\"b\"}\n\nid: 3\ndata: {\"se";
        for cut in 0..stream.len() {
            let mut buffer = stream[..cut].to_vec();
            let mut events = events_of(&mut buffer);
            buffer.extend_from_slice(&stream[cut..]);
            events.extend(events_of(&mut buffer));
            let kinds: Vec<_> = events.iter().map(|event| event["kind"].as_str().unwrap()).collect();
            assert_eq!(kinds, ["a", "b"], "cut at {cut}");
        }
    }

    #[test]
    fn notes_are_for_their_owner_alone_and_come_back() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        assert!(Notes::read(folder.path()).unwrap().site_id.is_none());
        let notes = Notes { site_id: Some(7), password: Some(passphrase()), ..Notes::default() };
        notes.write(folder.path()).unwrap();
        notes.write(folder.path()).unwrap();
        assert_eq!(Notes::read(folder.path()).unwrap().password, notes.password);
        assert_eq!(fs::metadata(Notes::path(folder.path())).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(Notes::path(folder.path()), "{").unwrap();
        assert!(Notes::read(folder.path()).unwrap_err().0.contains("Remove it"));
    }
}
