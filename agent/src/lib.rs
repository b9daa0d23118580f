//! The Borealis agent: makes a machine a device of an engine.
//!
//! It enrolls with a site's code, keeps a socket to the engine open, reports what the machine is and does, and runs the
//! signed scripts it is sent, each at most once. [`run`] is the whole agent; the program around it adds only the command
//! line. Nothing in it is global, so that several agents can run in one process.

mod account;
pub mod backoff;
mod client;
mod clock;
mod config;
mod error;
mod files;
pub mod installation;
mod inventory;
pub mod platform;
mod report;
mod roles;
mod scripts;
mod socket;

use std::sync::Arc;
use std::time::Duration;

pub use account::identity;
pub use config::{Config, DEFAULT_CONFIG_PATH, DEFAULT_STATE_DIR, MACHINE_ID_FILE, Settings};
pub use error::{Error, Result};
use platform::Platform;
use tokio::sync::watch;
pub use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use account::{Account, EnrollError};
use backoff::Backoff;
use client::Client;
use clock::ServerClock;
use inventory::Inventory;
use report::{Reporter, Status};
use roles::{Cancels, Jobs, Processes, Role};
use scripts::{Runner, Shared};
use socket::Socket;

/// Version of the agent, as it reports it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How often an agent without a code looks for one in its configuration file.
const CODE_LOOK: Duration = Duration::from_secs(5);
/// The least time between two requests after an operator denied one.
const AFTER_DENIAL: Duration = Duration::from_secs(600);

/// Runs the agent until `stop` is cancelled. A script that runs then is stopped and reported.
///
/// Trouble with the network or the engine is retried forever.
///
/// # Errors
/// Settings, state directory or TLS that cannot be used.
pub async fn run(config: Config, stop: CancellationToken) -> Result<()> {
    let agent = Agent::start(config)?;
    while !stop.is_cancelled() {
        if !agent.account.is_enrolled() {
            agent.status.active("authenticating");
            agent.enroll(&stop).await;
            continue;
        }
        agent.work(&stop).await?;
    }
    info!("agent stopped");
    Ok(())
}

/// What `status` can say from the state directory alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The device's GUID, empty when not enrolled yet.
    pub guid: String,
    /// Hex SHA-256 of the agent's public key; operators compare it when they approve.
    pub fingerprint: String,
    /// Whether the agent has tokens.
    pub enrolled: bool,
}

struct Agent {
    config: Config,
    hostname: String,
    platform: Arc<dyn Platform>,
    tls: Arc<rustls::ClientConfig>,
    clock: Arc<ServerClock>,
    client: Client,
    account: Arc<Account>,
    status: Arc<Status>,
    inventory: Arc<Inventory>,
    code: std::sync::Mutex<Option<String>>,
    _lock: files::Lock,
}

/// What is said of the machine; nothing where the system's file is absent or has no id. A file that was asked for must have one.
fn machine_id(config: &Config) -> Result<String> {
    match &config.machine_id_file {
        None => Ok(std::fs::read_to_string(MACHINE_ID_FILE).map(|text| borealis_protocol::machine_id(&text)).unwrap_or_default()),
        Some(file) => {
            let id = std::fs::read_to_string(file).map_err(Error::file(file))?;
            let id = borealis_protocol::machine_id(&id);
            if id.is_empty() {
                let reason = "it has no machine id, which is 32 hexadecimal digits".to_owned();
                return Err(Error::Corrupt { path: file.clone(), reason });
            }
            Ok(id)
        }
    }
}

impl Agent {
    fn start(config: Config) -> Result<Self> {
        config.check()?;
        let platform = platform::current();
        platform.private_dir(&config.state_dir).map_err(Error::file(&config.state_dir))?;
        let lock = files::lock(&*platform, &config.state_dir)?;
        let hostname = config.hostname.clone().unwrap_or_else(|| platform.hostname());
        let hostname = if hostname.trim().is_empty() { "UNKNOWN-HOST".to_owned() } else { hostname.trim().to_owned() };
        let status = Arc::new(Status::new(&hostname));
        status.complete("process_start");
        status.complete("server_config_loaded");
        let tls = client::tls(config.ca_file.as_deref())?;
        let clock = Arc::new(ServerClock::default());
        let client = Client::new(config.server_url.clone(), &tls, Arc::clone(&clock))?;
        let account = Arc::new(Account::open(Arc::clone(&platform), client.clone(), &config.state_dir, machine_id(&config)?)?);
        status.complete("identity_loaded");
        info!(%hostname, server = %config.server_url, fingerprint = %account.fingerprint(), version = VERSION, "agent started");
        Ok(Self {
            inventory: Arc::new(Inventory::new(&hostname)),
            code: std::sync::Mutex::new(config.enrollment_code.clone()),
            config,
            hostname,
            platform,
            tls,
            clock,
            client,
            account,
            status,
            _lock: lock,
        })
    }

    /// Tries to enroll until it worked or `stop`.
    async fn enroll(&self, stop: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(60));
        let mut complained = false;
        while !stop.is_cancelled() && !self.account.is_enrolled() {
            let Some(code) = self.present_code() else {
                if !complained {
                    warn!("not enrolled and no enrollment code: give one with `borealis-agent install --enrollment-code`");
                    complained = true;
                }
                sleep(CODE_LOOK, stop).await;
                continue;
            };
            let pause = match self.account.enroll(&code, &self.hostname, stop).await {
                Ok(()) => {
                    info!(guid = %self.account.guid(), "enrolled");
                    self.forget_code();
                    return;
                }
                Err(EnrollError::Stopped) => return,
                Err(error) => {
                    warn!(%error, "cannot enroll");
                    match error {
                        EnrollError::Denied(_) => AFTER_DENIAL,
                        EnrollError::Transient { retry_after, .. } => backoff.wait(retry_after),
                        EnrollError::Refused(_) | EnrollError::Stopped => Duration::from_secs(60),
                    }
                }
            };
            sleep(pause, stop).await;
        }
    }

    /// The code given at start, or one that was put into the configuration file since.
    fn present_code(&self) -> Option<String> {
        let stored = self.config.config_path.as_deref().and_then(config::stored_code);
        stored.or_else(|| self.code.lock().ok()?.clone())
    }

    fn forget_code(&self) {
        if let Ok(mut code) = self.code.lock() {
            *code = None;
        }
        if let Some(path) = self.config.config_path.as_deref()
            && let Err(error) = config::erase_code(&*self.platform, path)
        {
            warn!(%error, "cannot erase the enrollment code");
        }
    }

    /// Everything an enrolled agent does, until `stop` or until the engine ends the account.
    async fn work(&self, stop: &CancellationToken) -> Result<()> {
        self.status.complete("authenticating");
        self.status.complete("authenticated");
        self.status.active("roles_loading");
        let store =
            scripts::Store::open(Arc::clone(&self.platform), &self.config.state_dir, &self.account.guid(), clock::local_now())?;
        let run_dir = self.config.state_dir.join("run");
        scripts::end_left_over(&self.platform, &run_dir).await;
        let _ = std::fs::remove_dir_all(&run_dir);
        let (link, linked) = watch::channel(None);
        let (inbox, mut inbound) = socket::inbox();
        let shared = Arc::new(Shared::new(
            store,
            Arc::clone(&self.platform),
            Arc::clone(&self.account),
            Arc::clone(&self.clock),
            self.hostname.clone(),
            run_dir,
            linked,
        ));
        let reporter = Arc::new(Reporter {
            client: self.client.clone(),
            account: Arc::clone(&self.account),
            status: Arc::clone(&self.status),
            shared: Arc::clone(&shared),
            inventory: Arc::clone(&self.inventory),
            heartbeat_every: self.config.heartbeat_every,
            details_every: self.config.details_every,
        });
        let socket = Socket {
            server_url: self.config.server_url.clone(),
            allow_plain_http: self.config.allow_plain_http,
            hostname: self.hostname.clone(),
            tls: Arc::clone(&self.tls),
            account: Arc::clone(&self.account),
            status: Arc::clone(&self.status),
            link,
            inbox,
        };
        self.status.complete("roles_loading");
        self.status.complete("roles_ready");

        // First the work ends, and only then the socket its last results go through.
        let (quiet, hang_up) = (CancellationToken::new(), CancellationToken::new());
        let mut reports = tokio::task::JoinSet::new();
        {
            let (reporter, quiet) = (Arc::clone(&reporter), quiet.clone());
            reports.spawn(async move { reporter.send_status(quiet).await });
        }
        {
            let (reporter, quiet) = (Arc::clone(&reporter), quiet.clone());
            reports.spawn(async move { reporter.send_heartbeats(quiet).await });
        }
        {
            let (reporter, quiet) = (Arc::clone(&reporter), quiet.clone());
            reports.spawn(async move { reporter.send_details(quiet).await });
        }
        let results = tokio::spawn(Runner::send_results(Arc::clone(&shared), quiet.clone()));
        let jobs = tokio::spawn(Runner::run_jobs(Arc::clone(&shared), quiet.clone()));
        let events = {
            let shared = Arc::clone(&shared);
            let roles: Vec<Arc<dyn Role>> =
                vec![Arc::new(Jobs(Arc::clone(&shared))), Arc::new(Cancels(shared)), Arc::new(Processes::default())];
            tokio::spawn(async move { roles::dispatch(roles, &mut inbound).await })
        };
        let connection = {
            let hang_up = hang_up.clone();
            tokio::spawn(async move { socket.keep_up(hang_up).await })
        };

        let lost = self.account.lost();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = lost.cancelled() => break,
                () = self.account.refresh_refused() => {
                    // An operator who left a new code here wants the agent to start over.
                    if self.present_code().is_some() {
                        warn!("the engine refused a token refresh: enrolling again with the code at hand");
                        self.account.wipe();
                    }
                }
            }
        }
        quiet.cancel();
        let _ = jobs.await;
        // Whatever it was sending is sent again below, or at the next start.
        results.abort();
        let _ = results.await;
        Runner::farewell(&shared).await;
        hang_up.cancel();
        let _ = connection.await;
        events.abort();
        reports.shutdown().await;
        if stop.is_cancelled() {
            reporter.say_good_bye().await;
        }
        Ok(())
    }
}

async fn sleep(time: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(time) => {}
        () = stop.cancelled() => {}
    }
}
