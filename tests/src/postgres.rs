//! A Postgres as other people run it: on a TCP port of loopback, with roles and passwords, with or without TLS.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use borealis_engine::cluster::{Binaries, SERVICE_USER};
use nix::unistd::{Uid, User};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::{directory::Certificates, eventually, processes::free_port};

/// The password of the superuser `postgres`.
const SUPERUSER_PASSWORD: &str = "superuser";

/// The server. Dropping it ends it.
#[derive(Debug)]
pub struct Postgres {
    /// Its port on 127.0.0.1.
    pub port: u16,
    folder: tempfile::TempDir,
    child: std::process::Child,
}

impl Postgres {
    /// Makes and starts one, on which passwords are checked. With certificates it offers TLS.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start(certificates: Option<&Certificates>) -> Self {
        let folder = tempfile::Builder::new().prefix("borealis-tcp-").tempdir().expect("a folder");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("a folder others may enter");
        let home = folder.path().join("home");
        std::fs::create_dir(&home).expect("a folder");
        std::fs::write(home.join("password"), SUPERUSER_PASSWORD).expect("a file");
        if let Some(certificates) = certificates {
            certificates.write(&home);
        }
        give_to_service_user(&home);
        let binaries = Binaries::find(Path::new("/nowhere")).expect("an installed PostgreSQL");
        let data = home.join("data");
        let made = as_service_user(&binaries.file("initdb"))
            .args(["-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-sync", "--pwfile"])
            .arg(home.join("password"))
            .arg("-D")
            .arg(&data)
            .output()
            .expect("initdb");
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let mut server = as_service_user(&binaries.file("postgres"));
        server.arg("-D").arg(&data).args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "shared_buffers=32MB"]);
        server.arg("-c").arg(format!("port={port}")).arg("-c").arg(format!("unix_socket_directories={}", home.display()));
        if certificates.is_some() {
            for (setting, value) in [("ssl", "on"), ("ssl_cert_file", "../server.pem"), ("ssl_key_file", "../key.pem")] {
                server.arg("-c").arg(format!("{setting}={value}"));
            }
        }
        let log = std::fs::File::create(folder.path().join("log")).expect("a log");
        let child = server.stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("postgres");
        let server = Self { port, folder, child };
        eventually("the server answers", Duration::from_secs(60), async || {
            let connection = PgConnection::connect(&server.superuser("postgres")).await.ok()?;
            connection.close().await.ok()
        })
        .await;
        server
    }

    /// The URL of the superuser.
    #[must_use]
    pub fn superuser(&self, database: &str) -> String {
        format!("postgres://postgres:{SUPERUSER_PASSWORD}@localhost:{}/{database}", self.port)
    }

    /// The folder of its unix socket, of its certificates (`authority.pem`), and of what else runs as its user.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// Has the superuser execute statements, one after the other.
    ///
    /// # Panics
    /// When one is refused.
    pub async fn execute(&self, database: &str, statements: &[&str]) {
        let mut connection = PgConnection::connect(&self.superuser(database)).await.expect("a connection");
        for sql in statements {
            let done = sqlx::raw_sql(AssertSqlSafe((*sql).to_owned())).execute(&mut connection).await;
            let _ = done.unwrap_or_else(|error| panic!("{sql}: {error}"));
        }
        let _ = connection.close().await;
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), nix::sys::signal::Signal::SIGQUIT);
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- postgres ----\n{}", std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default());
        }
    }
}

/// A command that runs as the account of private servers when this process is root, which servers refuse to be.
#[must_use]
pub fn as_service_user(program: &Path) -> Command {
    let mut command = if Uid::effective().is_root() {
        let user = service_user();
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={}", user.uid)).arg(format!("--regid={}", user.gid)).args(["--clear-groups", "--"]);
        command.arg(program);
        command
    } else {
        Command::new(program)
    };
    command.current_dir("/").stdin(Stdio::null());
    command
}

/// Hands a folder and what is in it to the account that [`as_service_user`] runs as.
pub fn give_to_service_user(folder: &Path) {
    if Uid::effective().is_root() {
        let user = service_user();
        let (uid, gid) = (Some(user.uid.as_raw()), Some(user.gid.as_raw()));
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            std::os::unix::fs::chown(entry.path(), uid, gid).expect("an owner");
        }
        std::os::unix::fs::chown(folder, uid, gid).expect("an owner");
    }
}

fn service_user() -> User {
    let find = || User::from_name(SERVICE_USER).expect("the accounts");
    find().unwrap_or_else(|| {
        let _ = Command::new("useradd").args(["--system", "--no-create-home", "--user-group", SERVICE_USER]).output();
        find().expect("the account of private servers")
    })
}
