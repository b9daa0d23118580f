//! The private Postgres on real server binaries: it starts below folders only root may enter, outlives a crash of its starter,
//! is taken over by the next start, and stops cleanly. Also under a path that is too long for a socket.

#![allow(clippy::unwrap_used)]

use std::{os::unix::fs::PermissionsExt, time::Duration};

use borealis_engine::cluster::{Cluster, DATABASE, Durability, Paths};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{Connection, PgConnection};

/// A state folder below one that only its owner may enter.
fn closed_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    folder
}

async fn connect(cluster: &Cluster) -> PgConnection {
    PgConnection::connect(&cluster.url(DATABASE)).await.unwrap()
}

async fn gone(pid: Pid) {
    for _ in 0..200 {
        if kill(pid, None).is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("postgres {pid} still runs");
}

#[tokio::test]
async fn a_cluster_outlives_its_starter_and_the_next_start_goes_on_with_it() {
    let folder = closed_folder();
    let paths = Paths::under(&folder.path().join("state"));
    let first = Cluster::start(&paths, Durability::Full).await.unwrap();
    let pid = first.pid();
    assert!(!first.taken_over());
    let mut connection = connect(&first).await;
    sqlx::query("CREATE TABLE kept AS SELECT 7 AS n").execute(&mut connection).await.unwrap();
    let owner: (bool, String) =
        sqlx::query_as("SELECT usesuper, current_setting('listen_addresses') FROM pg_user WHERE usename = current_user")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert_eq!(owner, (true, String::new()));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!uid.split_whitespace().any(|id| id == "0"), "postgres runs as root: {uid}");
    let mode = std::fs::metadata(folder.path().join("state")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    // A crash of the starter: nobody stops the server.
    drop((connection, first));
    let second = Cluster::start(&paths, Durability::Full).await.unwrap();
    assert!(second.taken_over());
    assert_eq!(second.pid(), pid);
    let kept: i32 = sqlx::query_scalar("SELECT n FROM kept").fetch_one(&mut connect(&second).await).await.unwrap();
    assert_eq!(kept, 7);
    second.stop().await.unwrap();
    gone(pid).await;

    // A killed server leaves its note; the next start recovers.
    let third = Cluster::start(&paths, Durability::Full).await.unwrap();
    let mut third = third;
    kill(third.pid(), Signal::SIGKILL).unwrap();
    tokio::time::timeout(Duration::from_secs(10), third.exited()).await.unwrap();
    assert!(paths.data().join("postmaster.pid").exists());
    let fourth = Cluster::start(&paths, Durability::Full).await.unwrap();
    assert!(!fourth.taken_over());
    let kept: i32 = sqlx::query_scalar("SELECT n FROM kept").fetch_one(&mut connect(&fourth).await).await.unwrap();
    assert_eq!(kept, 7);
    fourth.stop().await.unwrap();
}

#[tokio::test]
async fn a_long_path_is_reached_through_a_short_link() {
    let folder = closed_folder();
    let paths = Paths::under(&folder.path().join("deep".repeat(40)));
    let cluster = Cluster::start(&paths, Durability::Test).await.unwrap();
    let pid = cluster.pid();
    let one: i32 = sqlx::query_scalar("SELECT 1").fetch_one(&mut connect(&cluster).await).await.unwrap();
    assert_eq!(one, 1);
    // A test cluster ends with its starter, however that ends.
    drop(cluster);
    gone(pid).await;
}

#[tokio::test]
async fn a_creation_that_was_cut_short_starts_over() {
    let folder = closed_folder();
    let paths = Paths::under(folder.path());
    let draft = paths.data().with_file_name("data.new");
    std::fs::create_dir_all(draft.join("base")).unwrap();
    std::fs::write(draft.join("PG_VERSION"), "15\n").unwrap();
    let cluster = Cluster::start(&paths, Durability::Test).await.unwrap();
    assert!(!draft.exists());
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_folder_with_something_else_in_it_is_left_alone() {
    let folder = closed_folder();
    let paths = Paths::under(folder.path());
    std::fs::create_dir_all(paths.data()).unwrap();
    std::fs::write(paths.data().join("thesis.txt"), "words").unwrap();
    let error = Cluster::start(&paths, Durability::Test).await.unwrap_err();
    assert_eq!(error.code, "data_folder_in_use");
    assert!(paths.data().join("thesis.txt").exists());
}
