//! How the runtime gets connections of its own: what keeps a lease alive must not wait behind steps.

use std::{fmt, sync::Arc};

use sqlx::{AssertSqlSafe, Executor, postgres::PgPoolOptions};

use crate::Pool;

/// A setting of a connection: its name and its value.
pub type Setting<'a> = (&'a str, &'a str);

type Make = dyn Fn(&'static str, u32, &[Setting<'_>]) -> Pool + Send + Sync;

/// Makes the pools of the runtime.
#[derive(Clone)]
pub struct Connect(Arc<Make>);

impl Connect {
    /// Pools to the database of `main`, with nothing but the settings that the runtime asks for.
    #[must_use]
    pub fn like(main: &Pool) -> Self {
        let main = main.clone();
        Self::with(move |_, max_connections, settings| {
            let sql: String =
                settings.iter().map(|(name, value)| format!("SET {name} = '{}';", value.replace('\'', "''"))).collect();
            PgPoolOptions::new()
                .max_connections(max_connections)
                .after_connect(move |connection, _| {
                    let sql = AssertSqlSafe(sql.clone());
                    Box::pin(async move { connection.execute(sqlx::raw_sql(sql)).await.map(|_| ()) })
                })
                .connect_lazy_with((*main.connect_options()).clone())
        })
    }

    /// Pools that the program makes: it gets what the pool is for, its most connections, and what is to be set on each of them.
    pub fn with(make: impl Fn(&'static str, u32, &[Setting<'_>]) -> Pool + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }

    pub(crate) fn pool(&self, name: &'static str, max_connections: u32, settings: &[Setting<'_>]) -> Pool {
        (self.0)(name, max_connections, settings)
    }
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connect")
    }
}
