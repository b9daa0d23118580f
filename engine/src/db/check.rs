//! Whether the engine can work on a database: asked once when a process starts, so that a wrong setting is a clear error then
//! and not a pool that times out later.

use std::{io::ErrorKind, time::Duration};

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};

use super::{Cause, SETTING, address::Address};
use crate::{
    cluster::OLDEST_SERVER,
    error::{Error, Kind, Result},
};

/// How long the server may take to let us in.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to answer what is asked here.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Connects, and looks whether this engine can work on the database: a PostgreSQL that is new enough, a database in UTF-8, a
/// connection that keeps its session. Writes nothing.
///
/// # Errors
/// Each names `DATABASE_URL`, the cause and what to do. `database_unreachable` when waiting may help: nothing listens, the name
/// is not known, the server starts. `invalid_database_url` and `database_unsuitable` when an administrator has to change something.
pub async fn check(url: &str) -> Result<()> {
    let address = Address::parse(url)?;
    for name in &address.without_effect {
        tracing::warn!(parameter = name, "{SETTING} has a parameter without effect");
    }
    let mut first = connect(&address).await?;
    let looked = tokio::time::timeout(ANSWER_LIMIT, look(&address, &mut first)).await;
    let _ = first.close().await;
    looked.unwrap_or_else(|_| Err(unreachable(&address, format!("it did not answer within {} s", ANSWER_LIMIT.as_secs()))))
}

/// The same for a process that waits for its database: one that is only away is logged and no error.
///
/// # Errors
/// When an administrator has to change something.
pub async fn check_at_start(url: &str) -> Result<()> {
    match check(url).await {
        Err(error) if error.kind == Kind::Unavailable => {
            tracing::warn!("{} Waiting for it.", error.message);
            Ok(())
        }
        checked => checked,
    }
}

async fn look(address: &Address, first: &mut PgConnection) -> Result<()> {
    server(address, first).await?;
    session(address, first).await
}

async fn connect(address: &Address) -> Result<PgConnection> {
    let options = address.connect_options().application_name("borealis check").extra_float_digits(None);
    match tokio::time::timeout(CONNECT_LIMIT, options.connect()).await {
        Ok(connected) => connected.map_err(|error| explain(address, &error)),
        Err(_) => Err(unreachable(
            address,
            format!("it did not answer within {} s; does a firewall drop the connection?", CONNECT_LIMIT.as_secs()),
        )),
    }
}

/// One row as text. Without a prepared statement, which a pooler might keep on another connection.
async fn ask<const N: usize>(address: &Address, connection: &mut PgConnection, sql: String) -> Result<[Option<String>; N]> {
    let row = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(connection).await.map_err(|error| explain(address, &error))?;
    let mut values = [const { None }; N];
    for (at, value) in values.iter_mut().enumerate() {
        *value = row.try_get(at).map_err(Error::bug)?;
    }
    Ok(values)
}

/// Looks at the server and the database.
async fn server(address: &Address, connection: &mut PgConnection) -> Result<()> {
    let sql = "SELECT current_setting('server_version_num'), current_setting('server_version'), current_setting('server_encoding'), \
               (SELECT nspname::text FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace \
                WHERE extname = 'hstore' AND nspname <> ALL (current_schemas(true))), \
               (SELECT count(*)::text FROM pg_available_extensions WHERE name IN ('hstore', 'pgcrypto')), \
               quote_ident(current_user), quote_ident(current_database())";
    let [number, version, encoding, hidden, available, role, database] = ask(address, connection, sql.to_owned()).await?;
    let version = version.unwrap_or_default();
    let major = number.and_then(|number| number.parse::<u32>().ok()).unwrap_or(0) / 10_000;
    if major < OLDEST_SERVER {
        let why = format!("the server at {address} is PostgreSQL {version}; the engine needs {OLDEST_SERVER} or newer.");
        return Err(unsuitable(why));
    }
    let encoding = encoding.unwrap_or_default();
    if encoding != "UTF8" {
        return Err(unsuitable(format!(
            "the database \"{}\" has the encoding {encoding}, and the engine needs UTF8. An encoding cannot be changed; make another \
             database: CREATE DATABASE name ENCODING 'UTF8' LOCALE 'C.UTF-8' TEMPLATE template0.",
            address.database()
        )));
    }
    if let Some(schema) = hidden {
        let (role, database) = (role.unwrap_or_default(), database.unwrap_or_default());
        return Err(unsuitable(format!(
            "the extension hstore is installed in the schema \"{schema}\", which is not in the search path of {role}. Move it: ALTER \
             EXTENSION hstore SET SCHEMA public; or add the schema: ALTER ROLE {role} IN DATABASE {database} SET search_path = \
             \"$user\", public, \"{schema}\"."
        )));
    }
    if available.as_deref() != Some("2") {
        return Err(unsuitable(format!(
            "the server at {address} lacks the extensions hstore and pgcrypto, which come with PostgreSQL. Install them there (Debian: \
             apt-get install postgresql-{major}; Fedora and Alpine: postgresql-contrib)."
        )));
    }
    Ok(())
}

/// Looks whether what is set on a connection stays on it. A pooler in transaction mode hands its connections round, and then
/// locks and notifications of the engine get lost without an error.
async fn session(address: &Address, first: &mut PgConnection) -> Result<()> {
    let mark = uuid::Uuid::new_v4().simple().to_string();
    let read = "SELECT current_setting('borealis.mark', true)";
    let _: [_; 1] = ask(address, first, format!("SELECT set_config('borealis.mark', '{mark}', false)")).await?;
    let mut second = connect(address).await?;
    let other = async {
        // Within a transaction every pooler keeps the connection, so the first one has to get another if they share.
        sqlx::raw_sql("BEGIN").execute(&mut second).await.map_err(|error| explain(address, &error))?;
        let [of_second] = ask(address, &mut second, read.to_owned()).await?;
        let [of_first] = ask(address, first, read.to_owned()).await?;
        Ok::<_, Error>(of_second.as_deref() == Some(&mark) || of_first.as_deref() != Some(&mark))
    }
    .await;
    let _ = second.close().await;
    if other? {
        return Err(unsuitable(transaction_mode()));
    }
    Ok(())
}

/// What to do about a pooler that does not keep sessions.
pub(super) fn transaction_mode() -> &'static str {
    "a pooler in transaction mode (or statement mode) is in front of PostgreSQL, and the engine needs sessions: locks, LISTEN and \
     prepared statements. Connect to PostgreSQL directly, or set the mode for this database to session (PgBouncer: pool_mode=session)."
}

fn unsuitable(why: impl Into<String>) -> Error {
    Error::field("database_unsuitable", SETTING, why)
}

fn unreachable(address: &Address, why: impl std::fmt::Display) -> Error {
    let why = format!("PostgreSQL at {address} cannot be reached: {why}.");
    let mut error = Error::field("database_unreachable", SETTING, why);
    error.kind = Kind::Unavailable;
    error.retry_after(2)
}

/// What a failed connection means for the person who set it up.
pub(super) fn explain(address: &Address, error: &sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(database) => refused(address, database.code().as_deref().unwrap_or(""), database.message()),
        sqlx::Error::Io(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error) => tls(address, error),
            None => away(address, error),
        },
        sqlx::Error::Tls(error) => tls(address, error),
        sqlx::Error::Protocol(why) => unsuitable(format!(
            "what answers at {address} does not speak PostgreSQL's protocol ({why}). Are host and port right?"
        )),
        sqlx::Error::Configuration(why) => Error::field("invalid_database_url", SETTING, format!("{why}.")),
        other => Error::bug(Cause::text(other)),
    }
}

fn away(address: &Address, error: &std::io::Error) -> Error {
    let socket = address.host_and_port().is_none();
    match error.kind() {
        ErrorKind::ConnectionRefused => {
            unreachable(address, "nothing listens there (connection refused). Does the server run, and is the address right?")
        }
        ErrorKind::NotFound if socket => {
            unreachable(address, "there is no such socket. Does the server run, and is the folder right?")
        }
        ErrorKind::PermissionDenied if socket => unreachable(address, "this user may not open the socket (permission denied)"),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
            unreachable(address, "the connection was closed at once. Is this PostgreSQL, and does it let this machine in?")
        }
        _ => unreachable(address, Cause::io(error)),
    }
}

fn tls(address: &Address, error: &dyn std::fmt::Display) -> Error {
    let why = error.to_string();
    if why.contains("does not support TLS") {
        let mut advice = format!("the server at {address} does not offer TLS. Switch it on there (ssl = on)");
        if !address.is_on_this_machine() {
            advice.push_str(", which is the default for other machines");
        }
        return unsuitable(format!(
            "{advice}; or, when nobody can read or change what passes between, add sslmode=disable to the URL."
        ));
    }
    unsuitable(format!(
        "TLS with the server at {address} fails: {why}. sslrootcert=FILE in the URL, or SSL_CERT_FILE, names the authority that \
         signed its certificate; the name in the certificate must be the host's (sslmode=verify-ca does not compare it)."
    ))
}

/// What the server, or a pooler, said instead of letting us in.
fn refused(address: &Address, code: &str, message: &str) -> Error {
    let (role, database) = (address.role(), address.database());
    let said = |what: String| {
        unsuitable(format!("{what} (the server at {address} says: {message}).", message = message.trim_end_matches('.')))
    };
    match code {
        "28P01" => said(format!(
            "the password of role \"{role}\" is wrong, or the role does not exist. Look at the user and the password in the URL"
        )),
        "28000" => said(format!("role \"{role}\" is not let in. Does it exist, and does pg_hba.conf allow it from here?")),
        "3D000" => said(format!(
            "there is no database \"{database}\". Create it: CREATE DATABASE \"{database}\" OWNER \"{role}\" ENCODING 'UTF8'"
        )),
        "42501" => said(format!(
            "role \"{role}\" may not connect to \"{database}\". Allow it: GRANT CONNECT ON DATABASE \"{database}\" TO \"{role}\""
        )),
        // Of poolers, which have no codes of their own.
        _ if message.contains("unsupported startup parameter") => said(
            "the pooler in front of PostgreSQL refuses a parameter. Take `options` out of the URL (and PGOPTIONS out of the \
             environment), or let the pooler ignore it (PgBouncer: ignore_startup_parameters)"
                .to_owned(),
        ),
        _ if message.contains("statement pooling mode") => unsuitable(transaction_mode()),
        _ if message.contains("authentication failed") => {
            said(format!("the pooler knows no user \"{role}\" with this password. Look at both in the URL"))
        }
        _ if message.contains("no such database") => said(format!("the pooler knows no database \"{database}\"")),
        _ if message.contains("no such user") => said(format!("the pooler knows no user \"{role}\"")),
        // Starting or stopping, too many connections, a pooler whose server is away.
        "57P01" | "57P02" | "57P03" | "53300" => unreachable(address, message.trim_end_matches('.')),
        _ if code.starts_with("08") => unreachable(address, message.trim_end_matches('.')),
        _ => said("the server refuses the connection".to_owned()),
    }
}
