//! Where the database is: what a `DATABASE_URL` may say.
//!
//! sqlx reads the URL. What it would misread, ignore or take in silence is refused here, with the name of the setting and what to
//! write instead. No message shows the URL: there is a password in it.

use std::{fmt, net::IpAddr};

use sqlx::{
    ConnectOptions,
    postgres::{PgConnectOptions, PgSslMode},
};
use url::Url;

use crate::error::{Error, Result};

/// How a URL begins.
const SCHEMES: [&str; 2] = ["postgres", "postgresql"];
/// What `sslmode` may be.
const MODES: &str = "disable, allow, prefer, require, verify-ca or verify-full";
/// The parameters that are read, by sqlx.
const READ: [&str; 13] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];
/// Parameters of other clients (libpq) that change nothing here: a URL that has them is taken, and the log names them.
const WITHOUT_EFFECT: [&str; 18] = [
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "fallback_application_name",
    "gssencmode",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "load_balance_hosts",
    "passfile",
    "requiressl",
    "sslcompression",
    "sslnegotiation",
    "sslsni",
    "target_session_attrs",
    "tcp_user_timeout",
];

/// Where a database is and how it is reached, as a `DATABASE_URL` says.
#[derive(Clone)]
pub struct Address {
    connect: PgConnectOptions,
    /// Parameters of the URL that change nothing.
    pub without_effect: Vec<String>,
}

/// Without the password.
impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// Host and port, or the socket.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket() {
            Some(folder) => write!(f, "{folder}/.s.PGSQL.{}", self.connect.get_port()),
            None if self.connect.get_host().contains(':') => {
                write!(f, "[{}]:{}", self.connect.get_host(), self.connect.get_port())
            }
            None => write!(f, "{}:{}", self.connect.get_host(), self.connect.get_port()),
        }
    }
}

impl Address {
    /// Reads a `DATABASE_URL`. What it leaves out comes from libpq's variables (`PGHOST`, `PGPORT`, `PGUSER`, `PGPASSWORD`,
    /// `PGDATABASE`, `PGSSLMODE`, ...), then from libpq's defaults; but without an `sslmode`, a server on another machine is
    /// reached with `require`.
    ///
    /// # Errors
    /// `invalid_database_url`, saying what cannot be read and what to write instead.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_with(text, |variable| std::env::var(variable).ok().filter(|value| !value.is_empty()))
    }

    fn parse_with(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut url = read(text.trim())?;
        let (mut names_mode, mut system_roots, mut without_effect) = (false, false, Vec::new());
        let mut kept: Vec<(String, String)> = Vec::new();
        for (name, value) in url.query_pairs() {
            match normal(&name) {
                "sslmode" => {
                    mode(&value)?;
                    names_mode = true;
                    kept.push(("sslmode".to_owned(), value.into_owned()));
                }
                // libpq's word for the roots of the system, which are trusted here anyway.
                "sslrootcert" if value == "system" => system_roots = true,
                name @ ("sslrootcert" | "sslcert" | "sslkey") => {
                    readable(name, &value)?;
                    kept.push((name.to_owned(), value.into_owned()));
                }
                "host" if value.contains(',') => return Err(several()),
                "port" if value.contains(',') => return Err(several()),
                "port" if value.parse::<u16>().is_err() => return Err(refuse("the port in it is not a number up to 65535.")),
                "hostaddr" if value.parse::<IpAddr>().is_err() => return Err(refuse("hostaddr in it is not an IP address.")),
                // Inside a container an empty host is what an empty variable makes of a URL.
                "host" if value.is_empty() => {}
                known if READ.contains(&known) || known.starts_with("options[") => {
                    kept.push((known.to_owned(), value.into_owned()))
                }
                known if WITHOUT_EFFECT.contains(&known) => without_effect.push(known.to_owned()),
                other => {
                    let near = READ.iter().find(|known| strsim::osa_distance(known, other) <= 2);
                    let near = near.map_or_else(String::new, |near| format!(" Did you mean {near}?"));
                    return Err(refuse(format!("there is no parameter \"{}\".{near}", printable(other))));
                }
            }
        }
        if let Some(value) = variable("PGSSLMODE").filter(|_| !names_mode) {
            mode(&value).map_err(|_| refuse(format!("PGSSLMODE is none of {MODES}.")))?;
            names_mode = true;
        }
        if system_roots && !names_mode {
            kept.push(("sslmode".to_owned(), "verify-full".to_owned()));
            names_mode = true;
        }
        if kept.iter().any(|(name, _)| name == "sslcert") != kept.iter().any(|(name, _)| name == "sslkey") {
            return Err(refuse("sslcert and sslkey belong together, and only one of them is in it."));
        }
        if kept.is_empty() {
            url.set_query(None);
        } else {
            url.query_pairs_mut().clear().extend_pairs(kept);
        }
        let connect = PgConnectOptions::from_url(&url).map_err(|_| refuse(ENCODE))?;
        let mut address = Self { connect, without_effect };
        // As in a URL; the resolver takes it without brackets.
        if let Some(host) = address.connect.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            let host = host.to_owned();
            address.connect = address.connect.host(&host);
        }
        if address.socket().is_some() {
            address.connect = address.connect.ssl_mode(PgSslMode::Disable);
        } else if !names_mode && !address.is_on_this_machine() {
            address.connect = address.connect.ssl_mode(PgSslMode::Require);
        }
        Ok(address)
    }

    /// How to connect.
    #[must_use]
    pub fn connect_options(&self) -> PgConnectOptions {
        self.connect.clone()
    }

    /// The server's host and port; none when it is reached over a unix socket.
    #[must_use]
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        self.socket().is_none().then(|| (self.connect.get_host(), self.connect.get_port()))
    }

    /// The role that signs in.
    #[must_use]
    pub fn role(&self) -> &str {
        self.connect.get_username()
    }

    /// The name of the database: the role's unless another is given.
    #[must_use]
    pub fn database(&self) -> &str {
        self.connect.get_database().unwrap_or_else(|| self.role())
    }

    /// How TLS is used.
    #[must_use]
    pub fn mode(&self) -> PgSslMode {
        self.connect.get_ssl_mode()
    }

    /// Whether nothing leaves this machine on the way to the server: a unix socket, or an address of loopback.
    #[must_use]
    pub fn is_on_this_machine(&self) -> bool {
        let host = self.connect.get_host();
        self.socket().is_some() || host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    /// The folder of the unix socket.
    fn socket(&self) -> Option<String> {
        let named = self.connect.get_socket().map(|folder| folder.display().to_string());
        named.or_else(|| Some(self.connect.get_host().to_owned()).filter(|host| host.starts_with('/')))
    }
}

const ENCODE: &str = "it cannot be read as a URL. Write postgres://USER:PASSWORD@HOST:5432/DATABASE, with the characters \
                      : / ? # [ ] @ % and spaces of a name or password percent-encoded (@ is %40, # is %23, / is %2F).";

fn refuse(why: impl Into<String>) -> Error {
    Error::field("invalid_database_url", super::SETTING, why)
}

fn several() -> Error {
    refuse(
        "it names several hosts, and the engine connects to one. Name one that follows the primary: a virtual address, a proxy or a DNS name.",
    )
}

/// The URL with a host in it, so that it can be read: libpq also takes `postgres://user@/database?host=/folder`.
fn read(text: &str) -> Result<Url> {
    let Some((scheme, rest)) = text.split_once("://") else {
        let why = if text.contains('=') {
            "it is not a URL. Words such as host=... dbname=... are not read; write postgres://USER:PASSWORD@HOST:5432/DATABASE."
        } else {
            "it is not a URL. Write postgres://USER:PASSWORD@HOST:5432/DATABASE."
        };
        return Err(refuse(why));
    };
    if !SCHEMES.contains(&scheme.to_ascii_lowercase().as_str()) {
        let why = format!("it begins with {}://, and the engine needs PostgreSQL: postgres://...", printable(scheme));
        return Err(refuse(why));
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at_checked(end).unwrap_or((rest, ""));
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (Some(user), hosts),
        None => (None, authority),
    };
    if hosts.contains(',') {
        return Err(several());
    }
    let without_host = hosts.is_empty() || hosts.starts_with(':');
    let hosts = if without_host { format!("localhost{hosts}") } else { hosts.to_owned() };
    let user = user.map_or_else(String::new, |user| format!("{user}@"));
    let mut url = Url::parse(&format!("postgres://{user}{hosts}{tail}")).map_err(|_| refuse(ENCODE))?;
    if url.fragment().is_some() {
        return Err(refuse(ENCODE));
    }
    if without_host {
        let names_host = url.query_pairs().any(|(name, value)| matches!(&*name, "host" | "hostaddr") && !value.is_empty());
        if !names_host {
            // Its default: PGHOST, the usual folder of the socket when one is there, or localhost.
            let usual = PgConnectOptions::new_without_pgpass().get_host().to_owned();
            url.query_pairs_mut().append_pair("host", &usual);
        }
    }
    Ok(url)
}

/// One name for each parameter.
fn normal(name: &str) -> &str {
    match name {
        "ssl-mode" => "sslmode",
        "ssl-root-cert" | "ssl-ca" => "sslrootcert",
        "ssl-cert" => "sslcert",
        "ssl-key" => "sslkey",
        other => other,
    }
}

fn mode(value: &str) -> Result<PgSslMode> {
    value.parse().map_err(|_| refuse(format!("sslmode in it is none of {MODES}.")))
}

/// Checks a certificate or key that is named by its file.
fn readable(name: &str, file: &str) -> Result<()> {
    if file.trim_start().starts_with("-----BEGIN") {
        return Ok(());
    }
    match std::fs::File::open(file) {
        Ok(_) => Ok(()),
        Err(error) => Err(refuse(format!("{name} in it names {}, which cannot be read: {error}.", printable(file)))),
    }
}

/// The beginning of a text, without what a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address> {
        Address::parse_with(text, |_| None)
    }

    fn refusal(text: &str) -> String {
        let error = parse(text).err().unwrap_or_else(|| panic!("{text} is taken"));
        assert_eq!(error.code, "invalid_database_url");
        error.message
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_name_and_never_shown() {
        for (text, says) in [
            ("mysql://root:hunter2@db/borealis", "begins with mysql://"),
            ("http://u:hunter2@db/borealis", "begins with http://"),
            ("sqlite:borealis.db", "not a URL"),
            ("host=db password=hunter2 dbname=borealis", "Words such as host="),
            ("postgres://u:hunter2@one,two/borealis", "several hosts"),
            ("postgres://u:hunter2@one:5432,two:5433/borealis", "several hosts"),
            ("postgres://u:hunter2@/borealis?host=one,two", "several hosts"),
            ("postgres://u:hunter2#7@db/borealis", "percent-encoded"),
            ("postgres://u:hunter2/7@db/borealis", "percent-encoded"),
            ("postgres://u:hunter2@db:99999/borealis", "percent-encoded"),
            ("postgres://u:hunter2@db/borealis?sslmode=verify_full", "sslmode in it is none of disable"),
            ("postgres://u:hunter2@db/borealis?sslmod=require", "no parameter \"sslmod\". Did you mean sslmode?"),
            ("postgres://u:hunter2@db/borealis?passwrod=hunter2", "Did you mean password?"),
            ("postgres://u:hunter2@db/borealis?zzz=1", "no parameter \"zzz\"."),
            ("postgres://u:hunter2@db/borealis?port=x", "not a number"),
            ("postgres://u:hunter2@db/borealis?hostaddr=db", "not an IP address"),
            (
                "postgres://u:hunter2@db/borealis?sslrootcert=/nowhere/ca.pem",
                "/nowhere/ca.pem, which cannot be read: No such file",
            ),
            ("postgres://u:hunter2@db/borealis?sslcert=/dev/null", "belong together"),
        ] {
            let said = refusal(text);
            assert!(said.starts_with("DATABASE_URL: "), "{text}: {said}");
            assert!(said.contains(says), "{text}: {said}");
            assert!(!said.contains("hunter2"), "{text}: {said}");
        }
    }

    #[test]
    fn a_server_on_another_machine_is_reached_with_tls_unless_the_url_says_otherwise() {
        let mode = |text: &str| format!("{:?}", parse(text).unwrap().mode());
        for (text, expected) in [
            ("postgres://u@db.example/b", "Require"),
            ("postgres://u@10.0.0.5/b", "Require"),
            ("postgres://u@[2001:db8::1]/b", "Require"),
            ("postgres://u@localhost/b?host=db.example", "Require"),
            ("postgres://u@db.example/b?sslmode=disable", "Disable"),
            ("postgres://u@db.example/b?sslmode=prefer", "Prefer"),
            ("postgres://u@db.example/b?ssl-mode=verify-full", "VerifyFull"),
            ("postgres://u@db.example/b?sslrootcert=system", "VerifyFull"),
            ("postgres://u@db.example/b?sslrootcert=system&sslmode=verify-ca", "VerifyCa"),
            ("postgres://u@localhost/b", "Prefer"),
            ("postgres://u@127.0.0.1/b", "Prefer"),
            ("postgres://u@[::1]/b", "Prefer"),
            ("postgres://u@db.example/b?host=/run/postgresql", "Disable"),
            ("postgres://u@%2Frun%2Fpostgresql/b?sslmode=require", "Disable"),
        ] {
            assert_eq!(mode(text), expected, "{text}");
        }
        let with = |value: &str| Address::parse_with("postgres://u@db/b", |name| (name == "PGSSLMODE").then(|| value.to_owned()));
        assert!(with("verify_full").unwrap_err().message.contains("PGSSLMODE"));
    }

    #[test]
    fn every_way_to_name_a_server_is_understood() {
        let place = |text: &str| {
            let address = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            (address.to_string(), address.role().to_owned(), address.database().to_owned())
        };
        for (text, expected) in [
            ("postgres://u@db/b", ("db:5432", "u", "b")),
            ("POSTGRESQL://u:p%40ss@db:6000/b", ("db:6000", "u", "b")),
            ("postgres://u:p@ss@db/b", ("db:5432", "u", "b")),
            ("postgres://u@[::1]:6000/b", ("[::1]:6000", "u", "b")),
            ("postgres://u@/b?host=/run/pg", ("/run/pg/.s.PGSQL.5432", "u", "b")),
            ("postgres:///b?host=/run/pg&user=u&port=6000", ("/run/pg/.s.PGSQL.6000", "u", "b")),
            ("postgres://u@%2Frun%2Fpg/b", ("/run/pg/.s.PGSQL.5432", "u", "b")),
            ("postgres://u@:6000/b?host=db", ("db:6000", "u", "b")),
            ("postgres://u@db", ("db:5432", "u", "u")),
            (" postgres://u@db/b?hostaddr=10.0.0.5 ", ("10.0.0.5:5432", "u", "b")),
        ] {
            let (at, role, database) = place(text);
            assert_eq!((at.as_str(), role.as_str(), database.as_str()), expected, "{text}");
        }
        let address = parse("postgres://u@db/b?channel_binding=require&connect_timeout=10").unwrap();
        assert_eq!(address.without_effect, ["channel_binding", "connect_timeout"]);
        assert_eq!(format!("{:?}", parse("postgres://u:hunter2@db/b").unwrap()), "Address(db:5432)");
        assert_eq!(parse("postgres://u@/b?host=/run/pg").unwrap().host_and_port(), None);
        assert_eq!(parse("postgres://u@localhost/b?host=10.0.0.7&port=6000").unwrap().host_and_port(), Some(("10.0.0.7", 6000)));
    }
}
