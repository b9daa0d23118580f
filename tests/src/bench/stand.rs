//! What the benches with agents stand on: a private Postgres, an API and a worker process, and machines in the tables.

use std::time::Duration;

use super::{Environment, environment::Database};
use crate::{
    Child, Installation,
    fleet::{Fleet, Machine, Settings, identity},
};

/// How long all agents may take to connect before the bench gives up.
const CONNECT_LIMIT: Duration = Duration::from_secs(180);

/// A running engine of release programs.
#[derive(Debug)]
pub struct Stand {
    /// The API, and who administers it.
    pub installation: Installation,
    /// The worker.
    pub worker: Child,
    /// The database.
    pub database: Database,
    /// Its server, and the programs.
    pub environment: Environment,
}

impl Stand {
    /// Starts everything.
    pub async fn start() -> Self {
        Self::on(Environment::start().await).await
    }

    /// Starts everything on a given server.
    pub async fn on(mut environment: Environment) -> Self {
        let database = environment.database(8).await;
        let installation = Installation::start(&mut environment.processes, &database.url).await;
        let worker = installation.worker(&mut environment.processes);
        Self { installation, worker, database, environment }
    }

    /// Writes machines into the tables, and lets Postgres know them.
    pub async fn machines(&self, count: usize) -> Vec<Machine> {
        let machines =
            identity::write(&self.database.pool, &self.installation.keys(), self.installation.site, "machine", count).await;
        self.vacuum().await;
        machines
    }

    /// What autovacuum would have done by the time a database is this full.
    pub async fn vacuum(&self) {
        sqlx::raw_sql("VACUUM ANALYZE").execute(&self.database.pool).await.expect("a vacuum");
    }

    /// The usual behaviour of a fleet here. Of the signatures, whose checking is the work of 10,000 machines, one in
    /// twenty is checked.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings { connecting: 256, verify_one_in: 20, ..Settings::at([self.installation.base.clone()]) }
    }

    /// A fleet that is connected and has reported its status.
    pub async fn fleet(&self, count: usize) -> Fleet {
        let fleet = Fleet::start(self.machines(count).await, self.settings());
        let all = count as u64;
        fleet
            .until("all agents are connected and have reported", CONNECT_LIMIT, |now| now.connected == all && now.reports >= all)
            .await;
        self.vacuum().await;
        fleet
    }

    /// The administrator's token.
    ///
    /// # Panics
    /// Never: the administrator of an installation is signed in.
    #[must_use]
    pub fn token(&self) -> &str {
        match &self.installation.admin.credential {
            crate::actor::Credential::Bearer(token) => token,
            other => panic!("the administrator is signed in with {other:?}"),
        }
    }
}
