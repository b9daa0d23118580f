//! A throwaway Postgres for a whole test run: prints its URL, and ends when standard input does.

use std::{io::Write, process::ExitCode};

use borealis_engine::{
    Error, Result,
    cluster::{Cluster, Durability, Paths},
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", error.message);
            ExitCode::FAILURE
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn run() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("borealis-tests-").tempdir().map_err(Error::bug)?;
    let cluster = Cluster::start(&Paths::under(folder.path()), Durability::Test).await?;
    println!("{}", cluster.url("postgres"));
    std::io::stdout().flush().map_err(Error::bug)?;
    // Ctrl-C reaches every process of the terminal; the tests still need their database to clean up after themselves.
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).map_err(Error::bug)?;
    let (closed, mut input) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        let _ = closed.send(());
    });
    loop {
        tokio::select! {
            _ = &mut input => break,
            _ = interrupt.recv() => {}
        }
    }
    cluster.stop().await
}
