//! The supervisor: everything one machine needs, started in order, kept running, and stopped in the reverse order.
//!
//! It holds no state of its own besides process ids, so it may be killed at any moment: its children end with it, the private
//! Postgres stays, and the next start goes on with that.

use std::{
    ffi::OsString,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use borealis_engine::{
    Error, Kind, Result,
    access::aegis::Unseal,
    cluster::{Cluster, DATABASE, Durability, Paths},
    db,
    keys::Keys,
    state_dir, time_zones,
};
use borealis_telemetry::Optional;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{access::client::is_for_this_machine, settings::Settings};

/// The first pause before something that ended is started again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause before something that ended is started again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// What ran this long before it ended begins with the first pause again.
const STEADY: Duration = Duration::from_secs(60);
/// How long a child may take to stop: two seconds more than the API waits for requests in flight.
const STOP_LIMIT: Duration = Duration::from_secs(crate::connections::DRAIN_S + 2);
/// How long Postgres may take to notice that the processes that ended are gone; it logs connections that it has to cut.
const UNNOTICED: Duration = Duration::from_millis(300);
/// How long the ports may be taken at the start: children of a killed supervisor need a moment to end.
const PORT_LIMIT: Duration = Duration::from_secs(15);
/// How long the API may take until it is ready before that is reported.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Turns signals into tokens: the first SIGINT, SIGTERM or SIGHUP cancels the first token, the second one the other.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals() -> Result<(CancellationToken, CancellationToken)> {
    let tokens = (CancellationToken::new(), CancellationToken::new());
    let mut signals = Vec::new();
    let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate()];
    if !ignores_hangup() {
        kinds.push(SignalKind::hangup());
    }
    for kind in kinds {
        signals.push(signal(kind).map_err(Error::bug)?);
    }
    for mut signal in signals {
        let (stop, hurry) = tokens.clone();
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                if stop.is_cancelled() {
                    hurry.cancel();
                }
                stop.cancel();
            }
        });
    }
    Ok(tokens)
}

/// Whether this process was started to outlive its terminal, as `nohup` does (proc(5), `SigIgn`; SIGHUP is the lowest bit).
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// Runs Postgres (unless `database_url` names one), the API and a worker until a signal asks to stop. These do not get the `ignored`
/// variables of the environment.
///
/// # Errors
/// `already_running` when another supervisor runs on this state folder, and whatever keeps the start from succeeding. What
/// ends after the start is started again and is no error.
pub async fn up(settings: &Settings, database_url: Option<&str>, ignored: &[String]) -> Result<()> {
    let (stop, hurry) = on_signals()?;
    state_dir::own(&settings.state_dir)?;
    let _lock = state_dir::lock(&settings.state_dir)?;
    time_zones::load(settings.zoneinfo.clone())?;
    ports(settings, &stop).await?;

    let mut cluster = match database_url {
        Some(_) => None,
        None => {
            say(format_args!("starting the private Postgres in {}", settings.state_dir.join("postgres").display()));
            let paths = Paths::under(&settings.state_dir);
            tokio::select! {
                started = Cluster::start(&paths, Durability::Full) => Some(started?),
                () = hurry.cancelled() => return Err(interrupted()),
            }
        }
    };
    let url = match (&cluster, database_url) {
        (Some(cluster), _) => cluster.url(DATABASE),
        (None, Some(url)) => url.to_owned(),
        (None, None) => return Err(Error::bug("neither a cluster nor a URL")),
    };
    let ended = run(settings, &url, ignored, cluster.as_mut(), &stop, &hurry).await;
    if let Some(cluster) = cluster {
        sleep(UNNOTICED).await;
        say(format_args!("stopping Postgres"));
        cluster.stop().await?;
    }
    if ended.is_ok() {
        say(format_args!("stopped"));
    }
    ended
}

async fn run(
    settings: &Settings,
    url: &str,
    ignored: &[String],
    cluster: Option<&mut Cluster>,
    stop: &CancellationToken,
    hurry: &CancellationToken,
) -> Result<()> {
    tokio::select! {
        migrated = migrate(url) => migrated?,
        () = stop.cancelled() => return Ok(()),
    }
    // Before the children: both need them, and a key that cannot be used is an error of the start.
    Keys::load_or_create(&settings.state_dir.join("secrets"), Some(&settings.engine_secret_file))?;
    let mut children = JoinSet::new();
    for role in roles(settings, url, ignored)? {
        children.spawn(keep(role, stop.clone(), hurry.clone()));
    }
    let greeting = tokio::spawn(greet(settings.clone()));
    match cluster {
        Some(cluster) => tokio::select! {
            () = keep_cluster(cluster, settings, stop) => {}
            () = hurry.cancelled() => {}
        },
        None => stop.cancelled().await,
    }
    greeting.abort();
    say(format_args!("stopping (once more to hurry)"));
    while children.join_next().await.is_some() {}
    Ok(())
}

/// Brings the database to this version, waiting while it is away.
async fn migrate(url: &str) -> Result<()> {
    let options = db::Options { url: url.to_owned(), max_connections: 2, application_name: "borealis migrate".to_owned() };
    let pool = db::connect(&options)?;
    let mut pause = FIRST_PAUSE;
    loop {
        let prepared = async {
            db::check(url).await?;
            borealis_workflows::setup(&pool).await
        };
        match prepared.await {
            Err(error) if error.kind == Kind::Unavailable => {
                let cause = error.source.as_ref().map_or_else(String::new, |cause| format!(" ({cause})"));
                say(format_args!("trying again in {} s: {}{cause}", pause.as_secs_f64(), error.message));
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            ended => {
                pool.close().await;
                return ended;
            }
        }
    }
}

/// A process of ours.
#[derive(Debug, Clone)]
struct Role {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<&'static str>,
    environment: Vec<(&'static str, OsString)>,
    ignored: Vec<String>,
}

fn roles(settings: &Settings, url: &str, ignored: &[String]) -> Result<[Role; 2]> {
    let own = std::env::current_exe().map_err(Error::bug)?;
    let worker = own.with_file_name("borealis-worker");
    if !worker.exists() {
        return Err(Error::new(
            Kind::Unavailable,
            "worker_missing",
            format!("{} is missing; it belongs beside {}.", worker.display(), own.display()),
        ));
    }
    let common = [
        ("DATABASE_URL", OsString::from(url)),
        ("BOREALIS_STATE_DIR", settings.state_dir.clone().into()),
        ("BOREALIS_ENGINE_SECRET_FILE", settings.engine_secret_file.clone().into()),
        ("BOREALIS_ZONEINFO", settings.zoneinfo.clone().unwrap_or_default().into()),
    ];
    let (mut command, mut key_file) = (String::new(), OsString::new());
    match &settings.unseal {
        Unseal::Command(words) => command = shlex::try_join(words.iter().map(String::as_str)).map_err(Error::bug)?,
        Unseal::KeyFile(path) => key_file = path.clone().into(),
        Unseal::Manual | Unseal::Own(_) => {}
    }
    let mut api = common.to_vec();
    api.extend([
        ("BOREALIS_LISTEN", settings.listen.to_string().into()),
        ("BOREALIS_INTERNAL_LISTEN", settings.internal_listen.to_string().into()),
        ("BOREALIS_PUBLIC_BASE_URL", settings.public_base_url.as_str().into()),
        ("BOREALIS_UNSEAL", if settings.unseal == Unseal::Manual { "manual" } else { "auto" }.into()),
        ("BOREALIS_UNSEAL_COMMAND", command.into()),
        ("BOREALIS_UNSEAL_KEY_FILE", key_file),
        ("BOREALIS_ENROLL_PER_MINUTE", settings.enroll_per_minute.to_string().into()),
        ("BOREALIS_ENROLL_WRONG_CODES", settings.enroll_wrong_codes.to_string().into()),
        ("BOREALIS_ENROLLMENT_CODE_DAYS", settings.enrollment_code_days.to_string().into()),
        ("BOREALIS_TRUSTED_PROXIES", settings.trusted_proxies.to_string().into()),
        ("BOREALIS_CONNECTIONS_PER_ADDRESS", settings.connections_per_address.to_string().into()),
        ("BOREALIS_SESSION_IDLE_SECONDS", settings.access.sessions.idle_s.to_string().into()),
        ("BOREALIS_TOKEN_TTL_SECONDS", settings.access.sessions.absolute_s.to_string().into()),
        ("BOREALIS_MFA_ISSUER", settings.access.mfa_issuer.as_str().into()),
        ("BOREALIS_PASSKEY_RP_NAME", settings.access.passkey_rp_name.as_str().into()),
        ("BOREALIS_GITHUB_API_URL", settings.github_api_url.as_str().into()),
        ("BOREALIS_EGRESS_ALLOW", settings.access.egress.to_string().into()),
    ]);
    if let Some(webhook) = &settings.audit_webhook {
        api.push(("BOREALIS_AUDIT_WEBHOOK_URL", webhook.url.as_str().into()));
        api.push(("BOREALIS_AUDIT_WEBHOOK_TOKEN_FILE", webhook.token_file.clone().unwrap_or_default().into()));
    }
    let mut work = common.to_vec();
    work.push(("BOREALIS_INTERNAL_URL", format!("http://{}", reachable(settings.internal_listen)).into()));
    // Each has a port of its own, whatever this process was told; an empty one is none.
    let worker_metrics = Optional(settings.worker_metrics_listen);
    for (role, listen) in [(&mut api, settings.exports.metrics_listen), (&mut work, worker_metrics)] {
        role.push(("BOREALIS_METRICS_LISTEN", listen.to_string().into()));
        role.push(("BOREALIS_OTLP_ENDPOINT", settings.exports.otlp_endpoint.to_string().into()));
    }
    let ignored = ignored.to_vec();
    Ok([
        Role { name: "api", program: own, arguments: vec!["serve"], environment: api, ignored: ignored.clone() },
        Role { name: "worker", program: worker, arguments: Vec::new(), environment: work, ignored },
    ])
}

impl Role {
    /// Starts the process. It gets SIGTERM when this one ends in whatever way, and is in a process group of its own, since
    /// Ctrl-C in a terminal must reach the supervisor alone.
    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]).arg(&self.program);
        for name in &self.ignored {
            command.env_remove(name);
        }
        command.args(&self.arguments).envs(self.environment.iter().cloned()).stdin(Stdio::null()).process_group(0);
        command.spawn()
    }
}

/// Keeps a process running until `stop`, then ends it.
async fn keep(role: Role, stop: CancellationToken, hurry: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    while !stop.is_cancelled() {
        let started = Instant::now();
        match role.start() {
            Ok(mut child) => {
                tokio::select! {
                    ended = child.wait() => tracing::error!(process = role.name, ended = %describe(&ended), "a process ended"),
                    () = stop.cancelled() => return end(role.name, child, &hurry).await,
                }
            }
            Err(error) => tracing::error!(process = role.name, %error, "a process cannot be started"),
        }
        if started.elapsed() > STEADY {
            pause = FIRST_PAUSE;
        }
        tracing::info!(process = role.name, pause_ms = pause.as_millis(), "starting it again");
        tokio::select! {
            () = sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn describe(ended: &std::io::Result<ExitStatus>) -> String {
    match ended {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

async fn end(name: &'static str, mut child: Child, hurry: &CancellationToken) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    tokio::select! {
        _ = child.wait() => return,
        () = sleep(STOP_LIMIT) => tracing::warn!(process = name, "it does not stop; killing it"),
        () = hurry.cancelled() => {}
    }
    if let Err(error) = child.kill().await {
        tracing::error!(process = name, %error, "it cannot be killed");
    }
}

/// Keeps the private Postgres running until `stop`. A start under way is waited for, so that what it started is stopped too.
async fn keep_cluster(cluster: &mut Cluster, settings: &Settings, stop: &CancellationToken) {
    let paths = Paths::under(&settings.state_dir);
    let mut pause = FIRST_PAUSE;
    loop {
        let started = Instant::now();
        tokio::select! {
            () = cluster.exited() => {}
            () = stop.cancelled() => return,
        }
        tracing::error!(log = %paths.log().display(), "postgres ended; starting it again");
        if started.elapsed() > STEADY {
            pause = FIRST_PAUSE;
        }
        loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => return,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            match Cluster::start(&paths, Durability::Full).await {
                Ok(again) => {
                    *cluster = again;
                    break;
                }
                Err(error) => tracing::error!(%error, "postgres does not start"),
            }
        }
    }
}

/// Makes sure all ports are free, so that a taken one is a clear error now and not a child that fails over and over.
async fn ports(settings: &Settings, stop: &CancellationToken) -> Result<()> {
    let mut listeners = vec![("BOREALIS_LISTEN", settings.listen), ("BOREALIS_INTERNAL_LISTEN", settings.internal_listen)];
    listeners.extend(settings.exports.metrics_listen.0.map(|addr| ("BOREALIS_METRICS_LISTEN", addr)));
    listeners.extend(settings.worker_metrics_listen.map(|addr| ("BOREALIS_WORKER_METRICS_LISTEN", addr)));
    for (at, (variable, addr)) in listeners.iter().enumerate() {
        if let Some((other, _)) = listeners.iter().take(at).find(|(_, other)| other == addr) {
            return Err(Error::field("invalid_setting", variable, format!("it must differ from {other}.")));
        }
    }
    let deadline = Instant::now() + PORT_LIMIT;
    let mut said = false;
    for (variable, addr) in listeners {
        if addr.port() == 0 {
            return Err(Error::field("invalid_setting", variable, "it needs a port that is not 0."));
        }
        loop {
            match TcpListener::bind(addr).await {
                Ok(_) => break,
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                    if !said {
                        say(format_args!("{addr} is in use; waiting a moment for it to become free"));
                        said = true;
                    }
                    tokio::select! {
                        () = sleep(Duration::from_millis(200)) => {}
                        () = stop.cancelled() => return Err(interrupted()),
                    }
                }
                Err(error) => {
                    return Err(Error::new(
                        Kind::Unavailable,
                        "listen_failed",
                        format!("Cannot listen on {addr}: {error}. Set {variable} to another address."),
                    ));
                }
            }
        }
    }
    Ok(())
}

fn interrupted() -> Error {
    Error::new(Kind::Unavailable, "interrupted", "Stopped before everything was running.")
}

/// How a listener is reached from this machine.
#[must_use]
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

/// Waits until the API is ready, then says where it is and how to go on.
async fn greet(settings: Settings) {
    let addr = reachable(settings.listen);
    let mut patience = Instant::now() + READY_LIMIT;
    loop {
        if get(addr, "/ready").await.is_some_and(|(status, _)| status == 200) {
            break;
        }
        if Instant::now() > patience {
            tracing::warn!("the API is not ready yet; its log lines say why");
            patience = Instant::now() + READY_LIMIT;
        }
        sleep(Duration::from_millis(100)).await;
    }
    let state = get(addr, "/api/bootstrap/state").await.and_then(|(_, body)| serde_json::from_str(&body).ok());
    let phase = state.as_ref().and_then(|state: &serde_json::Value| state.get("phase")?.as_str()).unwrap_or("unknown");
    let base = settings.public_base_url.as_str().trim_end_matches('/');
    let next = match phase {
        "aegis_setup_required" => format!("choose the cipher that seals all secrets: POST {base}/api/bootstrap/aegis/setup"),
        "aegis_unlock_required" => format!("unlock the secrets with the cipher: POST {base}/api/bootstrap/aegis/unlock"),
        "admin_setup_required" => format!("create the first administrator: POST {base}/api/bootstrap/admin/setup"),
        "admin_recovery_required" => format!("give an administrator new credentials: POST {base}/api/bootstrap/admin/recover"),
        _ => format!("sign in: POST {base}/api/auth/login"),
    };
    let token = match phase {
        "login_required" | "unknown" => String::new(),
        _ if is_for_this_machine(&settings) => String::new(),
        _ => format!(
            "\n            with the header X-Borealis-Setup-Token: the content of {}",
            settings.state_dir.join("secrets/setup.token").display()
        ),
    };
    say(format_args!(
        "the engine is up; Ctrl-C stops it\n  API       {base}   (all calls: {base}/api/docs)\n  internal  http://{}\n  \
         state     {}\n  phase     {phase}\n  next      {next}{token}",
        settings.internal_listen,
        settings.state_dir.display()
    ));
}

/// A GET over a connection of its own: this process needs no more of an HTTP client.
async fn get(addr: SocketAddr, path: &str) -> Option<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(addr).await.ok()?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.take(64 * 1024).read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    };
    timeout(Duration::from_secs(5), exchange).await.ok().flatten()
}

/// Nobody may be reading any more; that is no reason to stop.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "borealis: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_reached_over_loopback() {
        let reach = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(reach("0.0.0.0:8080"), "127.0.0.1:8080");
        assert_eq!(reach("[::]:8080"), "[::1]:8080");
        assert_eq!(reach("10.0.0.5:8080"), "10.0.0.5:8080");
    }
}
