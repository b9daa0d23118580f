//! Which errors of the database pass by themselves.

/// Classes of SQLSTATE, and codes, that say so: connection failures, too many connections, shutting down, read-only, disk full,
/// serialization trouble.
const PASSING: [&str; 8] = ["08", "53", "57P", "25006", "25P03", "40001", "40P01", "55P03"];

/// Whether doing the same again later may succeed.
#[must_use]
pub fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Tls(_)
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Protocol(_) => true,
        sqlx::Error::Database(database) => {
            database.code().is_some_and(|code| PASSING.iter().any(|class| code.starts_with(class)))
        }
        _ => false,
    }
}
