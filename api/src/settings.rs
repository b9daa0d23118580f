//! The settings of an API process: read once, from the environment or the command line, where each has the same name.

use std::{net::SocketAddr, path::PathBuf};

use borealis_engine::{
    Error, Result, Secret,
    access::{self, aegis, sessions::Lifetimes},
    db, egress,
    quotas::Quotas,
    sites::CODE_MAX_DAYS,
};
use borealis_telemetry::{Exports, Optional};
use clap::{Args, ValueEnum};
use url::Url;

use crate::{access::proxies::TrustedProxies, audit_webhook::Webhook, github};

/// Settings of the API process.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the public listener binds.
    pub listen: SocketAddr,
    /// Where the internal listener binds.
    pub internal_listen: SocketAddr,
    /// Where other API processes reach it; port 0 becomes the one that was bound.
    pub internal_url: Url,
    /// The folder of secrets and of the private Postgres.
    pub state_dir: PathBuf,
    /// Where the engine secret is kept.
    pub engine_secret_file: PathBuf,
    /// The base URL people and agents use; by default the listener's own.
    pub public_base_url: Url,
    /// Enrollment requests a minute from one address.
    pub enroll_per_minute: u32,
    /// Wrong enrollment codes from one address in 15 minutes; with more it is refused.
    pub enroll_wrong_codes: u32,
    /// For how many days an enrollment code can be used, unless it is said; 0 for ever.
    pub enrollment_code_days: i32,
    /// How a process opens the secret store by itself.
    pub unseal: aegis::Unseal,
    /// Sign-in: how long sessions live, the name an authenticator app shows.
    pub access: access::Settings,
    /// The proxies whose word on the client's address counts.
    pub trusted_proxies: TrustedProxies,
    /// Open connections from one address that is no trusted proxy; those that became sockets do not count.
    pub connections_per_address: u32,
    /// How much a user may own.
    pub quotas: Quotas,
    /// Where the audit is told, if anywhere.
    pub audit_webhook: Option<Webhook>,
    /// Where GitHub's interface is.
    pub github_api_url: Url,
    /// What leaves the process besides its log.
    pub exports: Exports,
    /// Where the worker of `up` does.
    pub worker_metrics_listen: Option<SocketAddr>,
    /// The folder of compiled time zones, when it is not to be the newest of this machine.
    pub zoneinfo: Option<PathBuf>,
}

/// Where everything is kept, and how the secrets in it are opened.
#[derive(Debug, Clone, Args)]
pub struct Store {
    /// The folder of secrets, logs and the private Postgres.
    #[arg(long, global = true, env = "BOREALIS_STATE_DIR", value_name = "FOLDER", default_value = ".borealis")]
    pub state_dir: PathBuf,
    /// An external Postgres. Without it, `up` starts a private one.
    #[arg(long, global = true, env = "DATABASE_URL", value_name = "URL", value_parser = secret, hide_env_values = true)]
    pub database_url: Option<Secret<String>>,
    /// Whether a restarted engine unlocks its secrets by itself, with a key file in the state folder.
    #[arg(long, global = true, env = "BOREALIS_UNSEAL", value_enum, default_value = "auto")]
    pub unseal: Unseal,
    /// A program with its arguments that prints the key to unlock with (32 bytes in base64), instead of the file in the state folder.
    /// Words and quotes as in a shell, but no shell runs.
    #[arg(
        long,
        global = true,
        env = "BOREALIS_UNSEAL_COMMAND",
        value_name = "COMMAND",
        default_value = "",
        hide_default_value = true,
        hide_env_values = true
    )]
    pub unseal_command: String,
    /// A file with that key, kept by you: mode 0600, yours or root's.
    #[arg(
        long,
        global = true,
        env = "BOREALIS_UNSEAL_KEY_FILE",
        value_name = "FILE",
        default_value = "",
        hide_default_value = true
    )]
    pub unseal_key_file: String,
    /// The secret that API and workers share [default: <state>/secrets/engine.secret].
    #[arg(long, global = true, env = "BOREALIS_ENGINE_SECRET_FILE", value_name = "FILE")]
    pub engine_secret_file: Option<PathBuf>,
    /// A folder of compiled time zones, as /usr/share/zoneinfo [default: the system's, or the built-in copy where that is newer].
    #[arg(long, global = true, env = "BOREALIS_ZONEINFO", value_name = "FOLDER", default_value = "", hide_default_value = true)]
    pub zoneinfo: String,
    /// How long a session lives without a request, in seconds.
    #[arg(long, global = true, env = "BOREALIS_SESSION_IDLE_SECONDS", value_name = "N", default_value_t = Lifetimes::default().idle_s, value_parser = clap::value_parser!(u32).range(60..=31_536_000))]
    pub session_idle_seconds: u32,
}

/// The environment, as given.
#[derive(Debug, Clone, Args)]
pub struct Environment {
    /// Where everything is kept.
    #[command(flatten)]
    pub store: Store,
    /// Where the API listens, for people and agents.
    #[arg(long, env = "BOREALIS_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Where the API listens for workers and for other API processes.
    #[arg(long, env = "BOREALIS_INTERNAL_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:8081")]
    pub internal_listen: SocketAddr,
    /// The URL under which other API processes reach that listener [default: http://<internal-listen>, or this machine's hostname if that is every address].
    #[arg(long, env = "BOREALIS_INTERNAL_ADVERTISE_URL", value_name = "URL")]
    pub internal_advertise_url: Option<Url>,
    /// The URL under which people and agents reach the API [default: http://<listen>].
    #[arg(long, env = "BOREALIS_PUBLIC_BASE_URL", value_name = "URL")]
    pub public_base_url: Option<Url>,
    /// Enrollment requests a minute from one address.
    #[arg(long, env = "BOREALIS_ENROLL_PER_MINUTE", value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub enroll_per_minute: u32,
    /// Wrong enrollment codes from one address in 15 minutes; with more it is refused.
    #[arg(long, env = "BOREALIS_ENROLL_WRONG_CODES", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub enroll_wrong_codes: u32,
    /// For how many days an enrollment code can be used, unless the request that makes it says; 0 for ever.
    #[arg(long, env = "BOREALIS_ENROLLMENT_CODE_DAYS", value_name = "N", default_value_t = 90, value_parser = clap::value_parser!(i32).range(0..=CODE_MAX_DAYS as i64))]
    pub enrollment_code_days: i32,
    /// The most scheduled jobs one user may own.
    #[arg(long, env = "BOREALIS_JOBS_PER_USER", value_name = "N", default_value_t = Quotas::default().jobs, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub jobs_per_user: u32,
    /// How large they may be together, in MiB.
    #[arg(long, env = "BOREALIS_JOB_MIB_PER_USER", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub job_mib_per_user: u64,
    /// The most assemblies one user may own.
    #[arg(long, env = "BOREALIS_ASSEMBLIES_PER_USER", value_name = "N", default_value_t = Quotas::default().assemblies, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub assemblies_per_user: u32,
    /// How large they may be together, in MiB.
    #[arg(long, env = "BOREALIS_ASSEMBLY_MIB_PER_USER", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub assembly_mib_per_user: u64,
    /// How long a session lives at most, in seconds.
    #[arg(long, env = "BOREALIS_TOKEN_TTL_SECONDS", value_name = "N", default_value_t = Lifetimes::default().absolute_s, value_parser = clap::value_parser!(u32).range(60..=31_536_000))]
    pub token_ttl_seconds: u32,
    /// The name authenticator apps show.
    #[arg(long, env = "BOREALIS_MFA_ISSUER", value_name = "NAME", default_value = "Borealis")]
    pub mfa_issuer: String,
    /// The name browsers show where a passkey is made.
    #[arg(long, env = "BOREALIS_PASSKEY_RP_NAME", value_name = "NAME", default_value = "Borealis")]
    pub passkey_rp_name: String,
    /// Addresses and networks, with or without a port, that directories and the like may be at beside the usual:
    /// `10.0.0.5:3890,192.0.2.0/24`.
    #[arg(long, env = "BOREALIS_EGRESS_ALLOW", value_name = "LIST", default_value = "", hide_default_value = true)]
    pub egress_allow: egress::Policy,
    /// Proxies in front whose X-Forwarded-For is believed, as addresses and networks: `127.0.0.1,10.1.0.0/16`. Without them limits per
    /// address see the proxy's.
    #[arg(long, env = "BOREALIS_TRUSTED_PROXIES", value_name = "LIST", default_value = "", hide_default_value = true)]
    pub trusted_proxies: TrustedProxies,
    /// The most connections from one address; those of trusted proxies and those that became sockets of agents or browsers are not
    /// counted.
    #[arg(long, env = "BOREALIS_CONNECTIONS_PER_ADDRESS", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub connections_per_address: u32,
    /// Where the events of the audit are posted as JSON lines, each at least once and in order.
    #[arg(long, env = "BOREALIS_AUDIT_WEBHOOK_URL", value_name = "URL", default_value = "", hide_default_value = true)]
    pub audit_webhook_url: Optional<Url>,
    /// A file with a token that goes along as `Authorization: Bearer`; mode 0600.
    #[arg(long, env = "BOREALIS_AUDIT_WEBHOOK_TOKEN_FILE", value_name = "FILE", default_value = "", hide_default_value = true)]
    pub audit_webhook_token_file: String,
    /// GitHub's interface: another one for GitHub Enterprise.
    #[arg(long, env = "BOREALIS_GITHUB_API_URL", value_name = "URL", default_value = github::DEFAULT_URL)]
    pub github_api_url: Url,
    /// What leaves the process besides its log.
    #[command(flatten)]
    pub exports: Exports,
    /// Where the worker that `up` starts serves `/metrics`; nowhere when not set.
    #[arg(long, env = "BOREALIS_WORKER_METRICS_LISTEN", value_name = "ADDR:PORT", default_value = "", hide_default_value = true)]
    pub worker_metrics_listen: Optional<SocketAddr>,
}

/// How secrets are unlocked after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Unseal {
    /// By a key file in the state folder.
    Auto,
    /// By an operator with the cipher.
    Manual,
}

#[allow(clippy::unnecessary_wraps)]
fn secret(text: &str) -> Result<Secret<String>, std::convert::Infallible> {
    Ok(Secret::new(text.to_owned()))
}

impl Store {
    /// The external Postgres, when one is named; an empty variable names none.
    #[must_use]
    pub fn database_url(&self) -> Option<&str> {
        self.database_url.as_ref().map(|url| url.expose().trim()).filter(|url| !url.is_empty())
    }

    /// The state folder as an absolute path.
    ///
    /// # Errors
    /// `invalid_setting`, naming the variable.
    pub fn state_dir(&self) -> Result<PathBuf> {
        std::path::absolute(&self.state_dir)
            .map_err(|error| Error::field("invalid_setting", "BOREALIS_STATE_DIR", format!("it cannot be used: {error}.")))
    }

    /// Where the engine secret is kept, as an absolute path.
    ///
    /// # Errors
    /// `invalid_setting`, naming the variable.
    pub fn engine_secret_file(&self) -> Result<PathBuf> {
        match &self.engine_secret_file {
            Some(file) => std::path::absolute(file).map_err(|error| {
                Error::field("invalid_setting", "BOREALIS_ENGINE_SECRET_FILE", format!("it cannot be used: {error}."))
            }),
            None => Ok(self.state_dir()?.join("secrets").join("engine.secret")),
        }
    }

    /// The folder of compiled time zones, when one is named; an empty variable names none.
    #[must_use]
    pub fn zoneinfo(&self) -> Option<PathBuf> {
        Some(self.zoneinfo.trim()).filter(|folder| !folder.is_empty()).map(PathBuf::from)
    }

    /// How a process opens the secret store by itself. An empty variable is none.
    ///
    /// # Errors
    /// `invalid_setting`, naming the variable.
    pub fn unseal(&self) -> Result<aegis::Unseal> {
        let refuse = |variable, why: &str| Err(Error::field("invalid_setting", variable, why));
        let (command, file) = (self.unseal_command.trim(), self.unseal_key_file.trim());
        match (self.unseal, command.is_empty(), file.is_empty()) {
            (Unseal::Auto, true, true) => Ok(aegis::Unseal::in_state_dir(&self.state_dir()?)),
            (Unseal::Manual, true, true) => Ok(aegis::Unseal::Manual),
            (Unseal::Manual, ..) => refuse("BOREALIS_UNSEAL", "it is manual, and there is an unseal command or key file, too."),
            (_, false, false) => refuse("BOREALIS_UNSEAL_COMMAND", "it is set, and BOREALIS_UNSEAL_KEY_FILE, too."),
            (_, false, true) => match shlex::split(command) {
                Some(words) if !words.is_empty() => Ok(aegis::Unseal::Command(words)),
                _ => refuse("BOREALIS_UNSEAL_COMMAND", "it cannot be split into words: is a quote missing?"),
            },
            (_, true, false) => match std::path::absolute(file) {
                Ok(path) => Ok(aegis::Unseal::KeyFile(path)),
                Err(error) => refuse("BOREALIS_UNSEAL_KEY_FILE", &format!("it cannot be used: {error}.")),
            },
        }
    }
}

impl Environment {
    /// The settings these values mean, with paths made absolute.
    ///
    /// # Errors
    /// `invalid_setting`, naming the variable.
    pub fn settings(&self) -> Result<Settings> {
        let state_dir = self.store.state_dir()?;
        Ok(Settings {
            listen: self.listen,
            internal_listen: self.internal_listen,
            internal_url: match &self.internal_advertise_url {
                Some(url) => base("BOREALIS_INTERNAL_ADVERTISE_URL", url.clone())?,
                None => advertised(self.internal_listen)?,
            },
            engine_secret_file: self.store.engine_secret_file()?,
            public_base_url: match &self.public_base_url {
                Some(url) => base("BOREALIS_PUBLIC_BASE_URL", url.clone())?,
                None if self.listen.ip().is_loopback() && self.trusted_proxies == TrustedProxies::default() => own(self.listen)?,
                None => {
                    let why =
                        "it must be set where others than this machine reach the engine: agents, passkeys and cookies go by it.";
                    return Err(Error::field("invalid_setting", "BOREALIS_PUBLIC_BASE_URL", why));
                }
            },
            enroll_per_minute: self.enroll_per_minute,
            enroll_wrong_codes: self.enroll_wrong_codes,
            enrollment_code_days: self.enrollment_code_days,
            unseal: self.store.unseal()?,
            access: access::Settings {
                sessions: Lifetimes { idle_s: self.store.session_idle_seconds, absolute_s: self.token_ttl_seconds },
                mfa_issuer: self.mfa_issuer.clone(),
                passkey_rp_name: self.passkey_rp_name.clone(),
                egress: self.egress(),
            },
            trusted_proxies: self.trusted_proxies.clone(),
            connections_per_address: self.connections_per_address,
            quotas: Quotas {
                jobs: self.jobs_per_user,
                job_bytes: self.job_mib_per_user << 20,
                assemblies: self.assemblies_per_user,
                assembly_bytes: self.assembly_mib_per_user << 20,
            },
            audit_webhook: match &self.audit_webhook_url.0 {
                Some(url) => Some(Webhook::new(url.clone(), token_file(&self.audit_webhook_token_file)?.as_deref())?),
                None => None,
            },
            github_api_url: github_api(self.github_api_url.clone())?,
            exports: self.exports.clone(),
            worker_metrics_listen: self.worker_metrics_listen.0,
            zoneinfo: self.store.zoneinfo(),
            state_dir,
        })
    }
}

impl Environment {
    /// The policy with the doors of this engine closed.
    fn egress(&self) -> egress::Policy {
        let database = self.store.database_url().and_then(|url| db::Address::parse(url).ok());
        let database = database.and_then(|address| address.host_and_port().map(|(host, port)| (host.to_owned(), port)));
        let listeners = [self.listen, self.internal_listen].into_iter().chain(self.exports.metrics_listen.0);
        let own = listeners.map(|at| (at.ip().to_string(), at.port()));
        own.chain(database).fold(self.egress_allow.clone(), |policy, (host, port)| policy.closed(host, port))
    }
}

/// Checks that a base URL can have paths appended.
fn base(variable: &str, mut url: Url) -> Result<Url> {
    let refuse = |why: &str| Err(Error::field("invalid_setting", variable, why));
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return refuse("it must be an http or https URL with a host.");
    }
    if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some() {
        return refuse("it must not have a query, a fragment or a user.");
    }
    if !matches!(url.path(), "" | "/") {
        return refuse("it must not have a path: the API answers at the root of its host.");
    }
    url.set_path("");
    Ok(url)
}

/// The path of a file that need not be named.
fn token_file(named: &str) -> Result<Option<PathBuf>> {
    let refuse = |error: std::io::Error| {
        Error::field("invalid_setting", "BOREALIS_AUDIT_WEBHOOK_TOKEN_FILE", format!("it cannot be used: {error}."))
    };
    (!named.trim().is_empty()).then(|| std::path::absolute(named.trim()).map_err(refuse)).transpose()
}

/// Whether a token may be sent there: nobody in between reads along.
pub(crate) fn may_take_a_token(url: &Url) -> bool {
    let loopback = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    url.host().is_some() && (url.scheme() == "https" || url.scheme() == "http" && loopback) && url.username().is_empty()
}

/// Checks that a token may be sent there, and that paths can be appended.
fn github_api(mut url: Url) -> Result<Url> {
    if !may_take_a_token(&url) {
        return Err(Error::field("invalid_setting", "BOREALIS_GITHUB_API_URL", "it must be an https URL."));
    }
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

/// The listener's own URL.
fn own(listen: SocketAddr) -> Result<Url> {
    Url::parse(&format!("http://{listen}")).map_err(Error::bug)
}

/// Where other machines reach a listener: under its own address, or under this machine's name when it listens on every address.
fn advertised(listen: SocketAddr) -> Result<Url> {
    if !listen.ip().is_unspecified() {
        return own(listen);
    }
    let host = nix::unistd::gethostname().ok().and_then(|host| host.into_string().ok()).filter(|host| !host.is_empty());
    let url = Url::parse(&format!("http://{}:{}", host.as_deref().unwrap_or("localhost"), listen.port()));
    url.map_err(|_| {
        Error::field(
            "invalid_setting",
            "BOREALIS_INTERNAL_ADVERTISE_URL",
            "it must be set: this machine's hostname is no host of a URL.",
        )
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        environment: Environment,
    }

    fn read(arguments: &[&str]) -> Result<Settings> {
        let line = Line::try_parse_from(std::iter::once(&"test").chain(arguments)).unwrap();
        line.environment.settings()
    }

    #[test]
    fn what_is_not_set_follows_from_what_is() {
        let settings = read(&["--state-dir", "/srv/b", "--listen", "127.0.0.1:9000"]).unwrap();
        assert_eq!(settings.engine_secret_file, std::path::Path::new("/srv/b/secrets/engine.secret"));
        assert_eq!(settings.public_base_url.as_str(), "http://127.0.0.1:9000/");
        assert_eq!(settings.unseal, aegis::Unseal::Own("/srv/b/secrets/unseal.key".into()));
        assert_eq!(read(&["--listen", "[::1]:9000"]).unwrap().public_base_url.as_str(), "http://[::1]:9000/");
        assert_eq!(read(&["--unseal", "manual"]).unwrap().unseal, aegis::Unseal::Manual);
        let internal = |arguments: &[&str]| read(arguments).unwrap().internal_url.to_string();
        assert_eq!(internal(&[]), "http://127.0.0.1:8081/");
        assert_eq!(internal(&["--internal-listen", "[::1]:9001"]), "http://[::1]:9001/");
        assert_eq!(internal(&["--internal-advertise-url", "http://api-2:9001"]), "http://api-2:9001/");
        let everywhere = Url::parse(&internal(&["--internal-listen", "0.0.0.0:9001"])).unwrap();
        assert!(everywhere.port() == Some(9001) && everywhere.host_str() != Some("0.0.0.0"), "{everywhere}");
        for open in [&["--listen", "[::]:9000"][..], &["--listen", "192.0.2.1:9000"], &["--trusted-proxies", "127.0.0.1"]] {
            assert!(read(open).unwrap_err().fields.contains_key("BOREALIS_PUBLIC_BASE_URL"), "{open:?}");
            let named = [open, &["--public-base-url", "https://rmm.example"]].concat();
            assert_eq!(read(&named).unwrap().public_base_url.as_str(), "https://rmm.example/");
        }
    }

    #[tokio::test]
    async fn no_door_of_the_engine_is_opened_by_an_exception() {
        let settings = read(&[
            "--listen",
            "127.0.0.1:9000",
            "--internal-listen",
            "127.0.0.1:9001",
            "--metrics-listen",
            "127.0.0.1:9002",
            "--database-url",
            "postgres://b:c@10.0.0.7:6000/b",
            "--egress-allow",
            "127.0.0.1,10.0.0.7",
        ])
        .unwrap();
        let asks = async |ip: &str, port| settings.access.egress.addresses(egress::DIRECTORY, ip, port).await.is_ok();
        for door in [("127.0.0.1", 9000), ("127.0.0.1", 9001), ("127.0.0.1", 9002), ("10.0.0.7", 6000)] {
            assert!(!asks(door.0, door.1).await, "{door:?}");
        }
        assert!(asks("127.0.0.1", 9003).await && asks("10.0.0.7", 6001).await, "the exceptions themselves");
    }

    #[test]
    fn the_unseal_key_has_one_place() {
        let unseal = |arguments: &[&str]| read(arguments).map(|settings| settings.unseal);
        let command = unseal(&["--unseal-command", "/bin/get 'a key' --from=\"the vault\" $HOME;x"]).unwrap();
        let words = ["/bin/get", "a key", "--from=the vault", "$HOME;x"].map(str::to_owned).to_vec();
        assert_eq!(command, aegis::Unseal::Command(words));
        assert_eq!(unseal(&["--unseal-key-file", "/run/key"]).unwrap(), aegis::Unseal::KeyFile("/run/key".into()));
        assert!(matches!(unseal(&["--unseal-key-file", "", "--unseal-command", " "]).unwrap(), aegis::Unseal::Own(_)));
        for bad in [
            &["--unseal-key-file", "/run/key", "--unseal-command", "get"][..],
            &["--unseal", "manual", "--unseal-command", "get"],
            &["--unseal-command", "get 'a key"],
        ] {
            assert_eq!(unseal(bad).unwrap_err().code, "invalid_setting", "{bad:?}");
        }
    }

    #[test]
    fn a_base_url_nothing_can_be_appended_to_is_refused() {
        for bad in ["ftp://host", "https://host/path", "https://host?q", "https://user@host", "data:text/plain,x"] {
            assert_eq!(read(&["--public-base-url", bad]).unwrap_err().code, "invalid_setting", "{bad}");
        }
        assert_eq!(read(&["--public-base-url", "https://rmm.example"]).unwrap().public_base_url.as_str(), "https://rmm.example/");
    }

    #[test]
    fn the_database_url_is_not_shown() {
        let line = Line::try_parse_from(["test", "--database-url", "postgres://u:hunter2@h/d"]).unwrap();
        assert!(!format!("{:?}", line.environment).contains("hunter2"));
        assert_eq!(line.environment.store.database_url(), Some("postgres://u:hunter2@h/d"));
        let none = Line::try_parse_from(["test", "--database-url", " "]).unwrap();
        assert_eq!(none.environment.store.database_url(), None);
    }
}
