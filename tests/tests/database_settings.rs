//! What an operator gets wrong about the database is said at the start: by the name of the setting, with the cause once and what
//! to do. Tried on a real server with passwords, roles, encodings and TLS, and behind a real PgBouncer.

use std::{path::Path, time::Duration};

use borealis_engine::{Error, Kind, db};
use borealis_tests::{
    Postgres, Processes, TestDatabase,
    directory::Certificates,
    eventually,
    postgres::{as_service_user, give_to_service_user},
    processes::free_port,
};

const SOON: Duration = Duration::from_secs(60);
const PASSWORD: &str = "hunter2";

/// A server with the role `ada` and her database.
async fn server(certificates: Option<&Certificates>) -> Postgres {
    let server = Postgres::start(certificates).await;
    let role = format!("CREATE ROLE ada LOGIN PASSWORD '{PASSWORD}'");
    server.execute("postgres", &[&role, "CREATE DATABASE borealis OWNER ada ENCODING 'UTF8' TEMPLATE template0"]).await;
    server
}

async fn refusal(url: &str) -> Error {
    let error = db::check(url).await.err().unwrap_or_else(|| panic!("{url} is taken"));
    let said = &error.message;
    assert!(said.starts_with("DATABASE_URL: "), "{said}");
    assert!(!said.contains(PASSWORD), "{said}");
    assert!(!said.contains(" at line ") && error.source.is_none(), "{error:?}");
    error
}

async fn prepares(url: &str) -> Result<(), Error> {
    db::check(url).await?;
    let pool = db::connect(&db::Options { url: url.to_owned(), max_connections: 2, application_name: "test".into() })?;
    let prepared = borealis_workflows::setup(&pool).await;
    pool.close().await;
    prepared
}

#[tokio::test]
async fn what_is_wrong_with_the_database_is_said_by_name() {
    let server = server(None).await;
    let port = server.port;
    server
        .execute(
            "postgres",
            &[
                "CREATE DATABASE latin OWNER ada ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0",
                "CREATE DATABASE elsewhere OWNER ada ENCODING 'UTF8' TEMPLATE template0",
                "CREATE DATABASE closed ENCODING 'UTF8' TEMPLATE template0",
                "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
            ],
        )
        .await;
    server
        .execute(
            "elsewhere",
            &["CREATE SCHEMA extensions", "CREATE EXTENSION hstore SCHEMA extensions", "GRANT USAGE ON SCHEMA extensions TO ada"],
        )
        .await;

    // Something that listens and is no Postgres.
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other_port = other.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });

    for (url, kind, says) in [
        (
            format!("postgres://ada:{PASSWORD}@127.0.0.1:1/borealis"),
            Kind::Unavailable,
            "nothing listens there (connection refused)",
        ),
        (format!("postgres://ada:{PASSWORD}@name.invalid/borealis"), Kind::Unavailable, "name.invalid:5432 cannot be reached"),
        (format!("postgres://ada:{PASSWORD}@/borealis?host=/nowhere"), Kind::Unavailable, "no such socket"),
        (
            format!("postgres://ada:{PASSWORD}@127.0.0.1:{other_port}/borealis"),
            Kind::Invalid,
            "does not speak PostgreSQL's protocol",
        ),
        (format!("postgres://ada:wrong@localhost:{port}/borealis"), Kind::Invalid, "the password of role \"ada\" is wrong"),
        (
            format!("postgres://eve:{PASSWORD}@localhost:{port}/borealis"),
            Kind::Invalid,
            "role \"eve\" is wrong, or the role does not exist",
        ),
        (
            format!("postgres://ada:{PASSWORD}@localhost:{port}/nothing"),
            Kind::Invalid,
            "CREATE DATABASE \"nothing\" OWNER \"ada\"",
        ),
        (
            format!("postgres://ada:{PASSWORD}@localhost:{port}/closed"),
            Kind::Invalid,
            "GRANT CONNECT ON DATABASE \"closed\" TO \"ada\"",
        ),
        (
            format!("postgres://ada:{PASSWORD}@localhost:{port}/latin"),
            Kind::Invalid,
            "encoding LATIN1, and the engine needs UTF8",
        ),
        (
            format!("postgres://ada:{PASSWORD}@localhost:{port}/elsewhere"),
            Kind::Invalid,
            "ALTER EXTENSION hstore SET SCHEMA public",
        ),
        (format!("postgres://ada:{PASSWORD}@localhost:{port}/borealis?sslmode=require"), Kind::Invalid, "does not offer TLS"),
        // 0.0.0.0 reaches this machine, but is no address of loopback: another machine, as far as a URL tells.
        (format!("postgres://ada:{PASSWORD}@0.0.0.0:{port}/borealis"), Kind::Invalid, "add sslmode=disable to the URL"),
        (format!("mysql://ada:{PASSWORD}@localhost:{port}/borealis"), Kind::Invalid, "begins with mysql://"),
    ] {
        let error = refusal(&url).await;
        assert_eq!(error.kind, kind, "{}", error.message);
        assert!(error.message.contains(says), "{}", error.message);
        assert_eq!(error.message.matches("DATABASE_URL").count(), 1, "{}", error.message);
    }

    // What the messages ask for helps.
    prepares(&format!("postgres://ada:{PASSWORD}@0.0.0.0:{port}/borealis?sslmode=disable")).await.unwrap();
    prepares(&format!("postgres://ada:{PASSWORD}@/borealis?host={}&port={port}", server.home().display())).await.unwrap();
    server
        .execute("postgres", &["ALTER ROLE ada IN DATABASE elsewhere SET search_path = \"$user\", public, \"extensions\""])
        .await;
    prepares(&format!("postgres://ada:{PASSWORD}@localhost:{port}/elsewhere")).await.unwrap();
}

#[tokio::test]
async fn every_program_says_so_and_ends() {
    let server = server(None).await;
    let port = server.port;
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("engine.secret");
    let mut processes = Processes::new();
    processes
        .set("BOREALIS_STATE_DIR", folder.path().join("state").display().to_string())
        .set("BOREALIS_ENGINE_SECRET_FILE", secret.display().to_string())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{}", free_port()))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
    let wrong = format!("postgres://ada:wrong@localhost:{port}/borealis");
    let nothing = format!("postgres://ada:{PASSWORD}@localhost:{port}/nothing");
    for (program, arguments, url, says) in [
        ("borealis-api", &["up"][..], "mysql://ada:hunter2@localhost/borealis", "begins with mysql://"),
        ("borealis-api", &["up"][..], nothing.as_str(), "there is no database \"nothing\""),
        ("borealis-api", &["serve"][..], wrong.as_str(), "the password of role \"ada\" is wrong"),
        ("borealis-api", &["migrate"][..], "postgres://ada:hunter2@127.0.0.1:1/borealis", "nothing listens there"),
        ("borealis-api", &["admin", "list"][..], wrong.as_str(), "the password of role \"ada\" is wrong"),
        ("borealis-worker", &["run"][..], wrong.as_str(), "the password of role \"ada\" is wrong"),
        ("borealis-worker", &["run"][..], "postgres://ada:hunter2@one,two/borealis", "several hosts"),
    ] {
        processes.set("DATABASE_URL", url);
        let mut child = processes.start(program, arguments);
        assert_eq!(child.wait(SOON).await.code(), Some(1), "{program} {arguments:?}: {}", child.output());
        let said = child.output();
        assert_eq!(said.matches(says).count(), 1, "{program} {arguments:?}: {said}");
        assert!(!said.contains(PASSWORD) && !said.contains("because") && !said.contains("on our side"), "{said}");
    }
    // One that is only away is waited for, and named.
    processes.set("DATABASE_URL", "postgres://ada:hunter2@127.0.0.1:1/borealis");
    let mut up = processes.start("borealis-api", &["up"]);
    eventually("it says what it waits for", SOON, async || up.output().contains("nothing listens there").then_some(())).await;
    assert!(up.is_running());
    assert_eq!(up.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn tls_is_used_and_the_authority_can_be_named() {
    let certificates = Certificates::for_name("localhost");
    let server = server(Some(&certificates)).await;
    let authority = server.home().join("authority.pem");
    let (port, authority) = (server.port, authority.display());
    let url = |host: &str, rest: &str| format!("postgres://ada:{PASSWORD}@{host}:{port}/borealis{rest}");

    // Without a word about it, another machine is reached with TLS.
    for (url, uses_tls) in [(url("0.0.0.0", ""), true), (url("localhost", "?sslmode=disable"), false)] {
        let pool = db::connect(&db::Options { url, max_connections: 1, application_name: "test".into() }).unwrap();
        let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        assert_eq!(sqlx::query_scalar::<_, bool>(sql).fetch_one(&pool).await.unwrap(), uses_tls);
        pool.close().await;
    }
    assert!(refusal(&url("localhost", "?sslmode=verify-full")).await.message.contains("sslrootcert=FILE"));
    let named = format!("?sslmode=verify-full&sslrootcert={authority}");
    db::check(&url("localhost", &named)).await.unwrap();
    let error = refusal(&url("127.0.0.1", &named)).await;
    assert!(error.message.contains("the name in the certificate must be the host's"), "{}", error.message);
    db::check(&url("127.0.0.1", &named.replace("full", "ca"))).await.unwrap();

    // The certificate authorities of the system are used, or those of SSL_CERT_FILE.
    let mut processes = Processes::new();
    processes.set("DATABASE_URL", url("localhost", "?sslmode=verify-full"));
    let mut refused = processes.start("borealis-api", &["migrate"]);
    assert_eq!(refused.wait(SOON).await.code(), Some(1));
    assert!(refused.output().contains("SSL_CERT_FILE"), "{}", refused.output());
    processes.set("SSL_CERT_FILE", authority.to_string());
    let mut taken = processes.start("borealis-api", &["migrate"]);
    assert_eq!(taken.wait(SOON).await.code(), Some(0), "{}", taken.output());
}

#[tokio::test]
async fn pgbouncer_works_in_session_mode_and_is_refused_in_others() {
    let server = server(None).await;
    let home = server.home();
    let bouncer_port = free_port();
    // Nothing but how it is reached and whom it lets in: everything else is its default.
    let settings = format!(
        "[databases]\nborealis = host=127.0.0.1 port={port}\n\
         transactions = host=127.0.0.1 port={port} dbname=borealis pool_mode=transaction\n\
         statements = host=127.0.0.1 port={port} dbname=borealis pool_mode=statement\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {bouncer_port}\nunix_socket_dir =\n\
         auth_type = scram-sha-256\nauth_file = {home}/users\n",
        port = server.port,
        home = home.display()
    );
    std::fs::write(home.join("bouncer.ini"), settings).unwrap();
    std::fs::write(home.join("users"), format!("\"ada\" \"{PASSWORD}\"\n")).unwrap();
    give_to_service_user(&home);
    let mut bouncer = as_service_user(Path::new("/usr/sbin/pgbouncer"));
    bouncer.arg("-q").arg(home.join("bouncer.ini"));
    let bouncer = Ended(bouncer.spawn().expect("pgbouncer (package pgbouncer)"));
    eventually("pgbouncer listens", SOON, async || tokio::net::TcpStream::connect(("127.0.0.1", bouncer_port)).await.ok()).await;
    let url = |database: &str| format!("postgres://ada:{PASSWORD}@localhost:{bouncer_port}/{database}");

    for database in ["transactions", "statements"] {
        let error = refusal(&url(database)).await;
        assert!(error.message.contains("pool_mode=session"), "{database}: {}", error.message);
        assert_eq!(error.kind, Kind::Invalid);
    }
    let error = refusal(&url("nothing")).await;
    assert!(error.message.contains("knows no database \"nothing\""), "{}", error.message);
    let error = refusal(&url("borealis?options=-cjit%3Doff")).await;
    assert!(error.message.contains("`options`"), "{}", error.message);

    let error = refusal(&url("borealis").replace(PASSWORD, "wrong")).await;
    assert!(error.message.contains("no user \"ada\" with this password"), "{}", error.message);

    prepares(&url("borealis")).await.unwrap();
    // The limits of a connection are in force, those of a pool of its own too.
    let main = db::connect(&db::Options { url: url("borealis"), max_connections: 1, application_name: "t".into() }).unwrap();
    let own = db::sibling(&main, 1, &[("statement_timeout", "1234")]);
    let setting = async |pool: &db::Pool, name: &str| {
        sqlx::query_scalar::<_, String>("SELECT current_setting($1)").bind(name).fetch_one(pool).await.unwrap()
    };
    for pool in [&main, &own] {
        assert_eq!(setting(pool, "idle_in_transaction_session_timeout").await, "10s");
        assert_eq!(setting(pool, "application_name").await, "t");
    }
    assert_eq!(setting(&own, "statement_timeout").await, "1234ms");
    assert_eq!(setting(&main, "statement_timeout").await, "0");
    main.close().await;
    own.close().await;

    // A whole engine behind it.
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let mut processes = Processes::new();
    processes
        .set("DATABASE_URL", url("borealis"))
        .set("BOREALIS_STATE_DIR", folder.path().join("state").display().to_string())
        .set("BOREALIS_LISTEN", format!("127.0.0.1:{port}"))
        .set("BOREALIS_INTERNAL_LISTEN", format!("127.0.0.1:{}", free_port()));
    let up = processes.start("borealis-api", &["up"]);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    eventually("it is ready", SOON, async || {
        let answer = client.get(format!("http://127.0.0.1:{port}/ready")).send().await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await;
    eventually("a worker is there", SOON, async || {
        let pool = db::connect(&db::Options { url: url("borealis"), max_connections: 1, application_name: "t".into() }).ok()?;
        let there: i64 = sqlx::query_scalar("SELECT count(*) FROM workers").fetch_one(&pool).await.ok()?;
        pool.close().await;
        (there > 0).then_some(())
    })
    .await;
    assert_eq!(up.terminate().await.code(), Some(0));
    drop(bouncer);
}

/// A program that ends with the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A database that ran migrations in a wording they once had goes on, and has the same schema as a new one.
#[tokio::test]
async fn a_database_made_between_two_versions_is_taken_over() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let former = folder.join("tests/former_migrations");
    let fresh = schema(&TestDatabase::start().await).await;
    let mut names: Vec<String> = std::fs::read_dir(folder.join("../migrations"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".sql"))
        .collect();
    names.sort();
    const TABLE: &str = "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, installed_on \
        timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, execution_time bigint NOT NULL)";

    // What main was when 6 and 7 read otherwise, what it was when 13 did, and a database that met 6 after 7 in its present wording.
    for (old, last) in [(&["0006", "0007"][..], "0007"), (&["0013"][..], "0022"), (&["0006"][..], "0022")] {
        let database = TestDatabase::empty().await;
        let mut migrations: Vec<_> = names.iter().filter(|name| name[..4] <= *last).collect();
        if *old == ["0006"] {
            let at = migrations.iter().position(|name| name.starts_with("0006")).unwrap();
            migrations[at..=at + 1].reverse();
        }
        database.execute(TABLE).await;
        for name in migrations {
            let is_former = old.iter().any(|number| name.starts_with(number));
            let file = if is_former { former.join(name) } else { folder.join("../migrations").join(name) };
            let text = std::fs::read_to_string(file).unwrap();
            database.execute(&text).await;
            let row = format!("{}, '', true, sha384(convert_to($file${text}$file$, 'UTF8')), 0", &name[..4]);
            database
                .execute(format!(
                    "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES ({row})"
                ))
                .await;
        }
        borealis_workflows::setup(&database.pool).await.unwrap_or_else(|error| panic!("{old:?}: {error:?}"));
        let now = schema(&database).await;
        assert!(now == fresh, "{old:?}: {:?}", now.symmetric_difference(&fresh).collect::<Vec<_>>());
        // And again, with nothing left to accept.
        borealis_workflows::setup(&database.pool).await.unwrap();
    }

    let database = TestDatabase::start().await;
    database.execute("UPDATE _sqlx_migrations SET checksum = 'other' WHERE version = 8").await;
    let error = borealis_workflows::setup(&database.pool).await.unwrap_err();
    assert_eq!((error.code, error.kind), ("migration_modified", Kind::Conflict));
    assert!(error.message.contains("Migration 8"), "{}", error.message);
}

/// The lines of a dump of everything in a database but its rows.
async fn schema(database: &TestDatabase) -> std::collections::BTreeSet<String> {
    let program = borealis_engine::cluster::Binaries::find(Path::new("/nowhere")).unwrap().file("pg_dump");
    let dump =
        tokio::process::Command::new(program).args(["--schema-only", "--dbname", database.url.as_str()]).output().await.unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let text = String::from_utf8(dump.stdout).unwrap();
    // Lines that differ from dump to dump, and the comma after a column that may stand last.
    text.lines().filter(|line| !line.starts_with('\\')).map(|line| line.trim_end_matches(',').to_owned()).collect()
}
