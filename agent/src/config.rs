//! Settings of an agent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::{Host, Url};

use crate::platform::Platform;
use crate::{Error, Result, files};

/// Where an installed agent keeps its state.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/borealis-agent";
/// Where an installed agent reads its settings.
pub const DEFAULT_CONFIG_PATH: &str = "/etc/borealis-agent/config.json";

/// Where a Linux system has its machine id.
pub const MACHINE_ID_FILE: &str = "/etc/machine-id";

/// Everything [`crate::run`] needs to know. It has no `Debug`, as the enrollment code is a secret.
#[derive(Clone)]
pub struct Config {
    /// Public base URL of the engine.
    pub server_url: Url,
    /// The site's code, until the agent is enrolled.
    pub enrollment_code: Option<String>,
    /// Directory of identity, tokens and jobs; private to the agent.
    pub state_dir: PathBuf,
    /// The file the settings came from; an enrollment code in it is erased after use, and a new one is picked up.
    pub config_path: Option<PathBuf>,
    /// PEM file with certificate authorities to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Send tokens over plain http to addresses that are not loopback.
    pub allow_plain_http: bool,
    /// Stands in for the name of the machine; for several agents on one machine.
    pub hostname: Option<String>,
    /// Stands in for [`MACHINE_ID_FILE`]; for several agents on one machine.
    pub machine_id_file: Option<PathBuf>,
    /// Time between two heartbeats; up to a quarter is added at random.
    pub heartbeat_every: Duration,
    /// Time between two inventories.
    pub details_every: Duration,
}

impl Config {
    /// Settings with the defaults of an installed agent.
    #[must_use]
    pub fn new(server_url: Url, state_dir: PathBuf) -> Self {
        Self {
            server_url,
            enrollment_code: None,
            state_dir,
            config_path: None,
            ca_file: None,
            allow_plain_http: false,
            hostname: None,
            machine_id_file: None,
            heartbeat_every: Duration::from_secs(20),
            details_every: Duration::from_secs(600),
        }
    }

    /// Joins what the command line and environment say with the configuration file; the former wins.
    ///
    /// # Errors
    /// An unreadable file, no server URL, or one that is not allowed.
    pub fn load(given: Settings, config_path: Option<&Path>) -> Result<Self> {
        let stored = config_path.map(Settings::read).transpose()?.flatten().unwrap_or_default();
        let settings = given.or(stored);
        let server_url = settings
            .server_url
            .as_deref()
            .ok_or_else(|| Error::Config("no server URL: give --server-url or BOREALIS_AGENT_SERVER_URL".to_owned()))?;
        let mut config = Self::new(parse_url(server_url)?, settings.state_dir()?);
        config.enrollment_code = settings.enrollment_code.filter(|code| !code.trim().is_empty());
        config.config_path = config_path.map(Path::to_owned);
        config.ca_file = settings.ca_file;
        config.allow_plain_http = settings.allow_plain_http;
        config.hostname = settings.hostname.filter(|name| !name.trim().is_empty());
        config.machine_id_file = settings.machine_id_file;
        config.check()?;
        Ok(config)
    }

    /// Refuses what would give tokens away.
    ///
    /// # Errors
    /// [`Error::Config`] with what to do about it.
    pub fn check(&self) -> Result<()> {
        match self.server_url.scheme() {
            "https" => Ok(()),
            "http" if self.allow_plain_http || is_loopback(&self.server_url) => Ok(()),
            "http" => Err(Error::Config(
                "plain http would show tokens and scripts to the network: use https, or --allow-plain-http in a closed network"
                    .to_owned(),
            )),
            other => Err(Error::Config(format!("the server URL must begin with https:// or http://, not {other}://"))),
        }
    }
}

/// What the configuration file holds, and what the command line may give.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// [`Config::server_url`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_url: Option<String>,
    /// [`Config::enrollment_code`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enrollment_code: Option<String>,
    /// [`Config::state_dir`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// [`Config::ca_file`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// [`Config::allow_plain_http`].
    #[serde(default)]
    pub allow_plain_http: bool,
    /// [`Config::hostname`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// [`Config::machine_id_file`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id_file: Option<PathBuf>,
}

impl Settings {
    /// Reads a configuration file, wherever it leads; none when there is no such file.
    ///
    /// # Errors
    /// What the file system says, or what is wrong with its text.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        files::from_json(path, std::fs::read(path))
    }

    /// These settings, and `others` where they are silent.
    #[must_use]
    pub fn or(self, others: Self) -> Self {
        Self {
            server_url: self.server_url.or(others.server_url),
            enrollment_code: self.enrollment_code.or(others.enrollment_code),
            state_dir: self.state_dir.or(others.state_dir),
            ca_file: self.ca_file.or(others.ca_file),
            allow_plain_http: self.allow_plain_http || others.allow_plain_http,
            hostname: self.hostname.or(others.hostname),
            machine_id_file: self.machine_id_file.or(others.machine_id_file),
        }
    }

    /// The state directory they name, or the usual one, as an absolute path.
    ///
    /// # Errors
    /// A path that cannot be used.
    pub fn state_dir(&self) -> Result<PathBuf> {
        let state_dir = self.state_dir.as_deref().unwrap_or(Path::new(DEFAULT_STATE_DIR));
        // Scripts run in a folder of their own, where a relative path would mean another place.
        std::path::absolute(state_dir)
            .map_err(|error| Error::Config(format!("the state folder {} cannot be used: {error}", state_dir.display())))
    }

    /// Writes the configuration file, readable by its owner alone.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, platform: &dyn Platform, path: &Path) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(Error::file(dir))?;
        }
        files::replace_json(platform, path, self).map_err(Error::file(path))
    }
}

/// Takes the enrollment code out of the configuration file.
pub(crate) fn erase_code(platform: &dyn Platform, path: &Path) -> Result<()> {
    let Some(mut settings) = Settings::read(path)? else { return Ok(()) };
    if settings.enrollment_code.take().is_none() {
        return Ok(());
    }
    settings.save(platform, path)
}

/// The enrollment code the configuration file holds now.
pub(crate) fn stored_code(path: &Path) -> Option<String> {
    Settings::read(path).ok().flatten()?.enrollment_code.filter(|code| !code.trim().is_empty())
}

fn parse_url(text: &str) -> Result<Url> {
    let url = Url::parse(text.trim()).map_err(|error| Error::Config(format!("the server URL is not a URL: {error}")))?;
    if url.cannot_be_a_base() || url.host().is_none() {
        return Err(Error::Config("the server URL names no host".to_owned()));
    }
    Ok(url)
}

/// Whether the URL's host is this machine by its address or as `localhost`.
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform;

    fn given(url: &str) -> Settings {
        Settings { server_url: Some(url.into()), ..Settings::default() }
    }

    #[test]
    fn plain_http_is_for_loopback_unless_asked_for() {
        for url in ["https://rmm.example", "http://127.0.0.1:8080", "http://localhost:1", "http://[::1]:1"] {
            assert!(Config::load(given(url), None).is_ok(), "{url}");
        }
        for url in
            ["http://rmm.example", "http://10.0.0.1", "http://localhost.evil.example", "ftp://127.0.0.1", "mailto:a@b", "x"]
        {
            assert!(Config::load(given(url), None).is_err(), "{url}");
        }
        assert!(Config::load(Settings { allow_plain_http: true, ..given("http://10.0.0.1") }, None).is_ok());
        assert!(Config::load(Settings::default(), None).is_err());
    }

    #[test]
    fn the_code_is_erased_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("etc/config.json");
        let platform = platform::current();
        Settings { enrollment_code: Some("S3CRET".into()), ..given("https://rmm.example") }.save(&*platform, &path).unwrap();
        let config = Config::load(Settings::default(), Some(&path)).unwrap();
        assert_eq!(config.enrollment_code.as_deref(), Some("S3CRET"));
        assert_eq!(stored_code(&path).as_deref(), Some("S3CRET"));
        erase_code(&*platform, &path).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("S3CRET"));
        let config = Config::load(Settings::default(), Some(&path)).unwrap();
        assert_eq!((config.enrollment_code, config.server_url.as_str()), (None, "https://rmm.example/"));
    }

    #[test]
    fn a_misspelt_setting_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, r#"{"server_ulr": "https://rmm.example"}"#).unwrap();
        assert!(matches!(Config::load(Settings::default(), Some(&path)), Err(Error::Corrupt { .. })));
    }
}
