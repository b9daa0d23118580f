//! The one error that crosses a crate boundary: a kind that says whose fault it is, a stable code for programs,
//! and a sentence for people. `api` turns the kind into an HTTP status in one place; retry policies read it too.

use std::collections::BTreeMap;

use crate::db::Cause;

pub mod catalogue;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is, and so what may be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is malformed or asks for something that cannot be.
    Invalid,
    /// The caller is not known.
    Unauthenticated,
    /// The caller is known and may not do this.
    Forbidden,
    /// There is no such thing, or the caller may not see it.
    NotFound,
    /// The state of the thing does not allow it now.
    Conflict,
    /// What was here is gone for good.
    Gone,
    /// The body is larger than the route accepts.
    TooLarge,
    /// The body is of a type the route does not take.
    Unsupported,
    /// The body parses, but contradicts an earlier request under the same key.
    Unprocessable,
    /// A secret store is locked, or a first set-up is missing.
    Locked,
    /// Too much in too short a time.
    Limited,
    /// Something this needs (Postgres, an agent, the API process) is away; trying again may help.
    Unavailable,
    /// A server outside (a directory, GitHub) did not answer, or not as it should.
    Upstream,
    /// A device's agent did not answer in time. What it was asked may have been done.
    TimedOut,
    /// The device's agent cannot do it.
    NotSupported,
    /// A fault of ours. The text stays in the log.
    Bug,
}

/// An error with a kind, a stable code, a message for a person, and optionally more.
#[derive(Debug, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Error {
    /// Whose fault it is.
    pub kind: Kind,
    /// Stable text a program can match on.
    pub code: &'static str,
    /// One sentence for a person. Never an internal text.
    pub message: String,
    /// Per-field reasons of a validation error.
    pub fields: BTreeMap<String, String>,
    /// Further members of the error body, as clients read them (`hostnames`, `phase`, ...).
    pub extra: serde_json::Map<String, serde_json::Value>,
    /// For [`Kind::Limited`] and [`Kind::Unavailable`]: when to try again, in seconds.
    pub retry_after_s: Option<u64>,
    /// What this layer was told by the one below; logged, never sent.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` with a stable `code` and a sentence for a person.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            kind,
            code,
            message: message.into(),
            fields: BTreeMap::new(),
            extra: serde_json::Map::new(),
            retry_after_s: None,
            source: None,
        }
    }

    /// The request is malformed.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, code, message)
    }

    /// One field of the request is wrong: `field` names it, `message` says why.
    pub fn field(code: &'static str, field: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        let mut error = Self::new(Kind::Invalid, code, format!("{field}: {message}"));
        error.fields.insert(field.to_owned(), message);
        error
    }

    /// There is no such thing, or the caller may not see it.
    pub fn not_found() -> Self {
        Self::new(Kind::NotFound, "not found", "There is no such object, or you may not see it.")
    }

    /// The state of the thing does not allow it now.
    pub fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, code, message)
    }

    /// A fault of ours; `what` is logged, the client sees `internal_error`.
    pub fn bug(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let mut error = Self::new(Kind::Bug, "internal_error", "Something went wrong on our side.");
        error.source = Some(what.into());
        error
    }

    /// Adds a member to the error body.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<serde_json::Value>) -> Self {
        self.extra.insert(name.to_owned(), value.into());
        self
    }

    /// Says when to try again.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// Whether doing the same again later may succeed.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, Kind::Unavailable | Kind::Limited)
    }

    /// The name of the violated constraint, when a database constraint is the cause.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        let source = self.source.as_deref()?.downcast_ref::<Cause>()?;
        source.0.as_database_error()?.constraint()
    }

    /// Replaces the error when the constraint `name` was violated: how a unique key becomes a client error.
    #[must_use]
    pub fn on_constraint(self, name: &str, replacement: impl FnOnce() -> Error) -> Self {
        if self.constraint() == Some(name) { replacement() } else { self }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        if matches!(error, sqlx::Error::PoolTimedOut) {
            crate::db::count_timeout();
        }
        let away = match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::Tls(_)
            | sqlx::Error::WorkerCrashed
            | sqlx::Error::Protocol(_) => true,
            // Connection failures, too many connections, shutting down, read-only, disk full, serialization trouble.
            sqlx::Error::Database(db) => db.code().is_some_and(|code| {
                ["08", "53", "57P", "25006", "25P03", "40001", "40P01", "55P03"].iter().any(|class| code.starts_with(class))
            }),
            _ => false,
        };
        // Text with a NUL, which Postgres cannot hold: whoever sent it is at fault.
        let unstorable =
            matches!(&error, sqlx::Error::Database(db) if db.code().is_some_and(|code| ["22021", "22P05"].contains(&&*code)));
        // A number or a time that no column holds: it was sent, or follows from what was sent.
        let outside =
            matches!(&error, sqlx::Error::Database(db) if db.code().is_some_and(|code| ["22003", "22008"].contains(&&*code)));
        let mut mapped = if outside {
            tracing::warn!(%error, "a value was sent that the database cannot hold");
            Error::invalid("out_of_range", "A number or a time is beyond what can be stored.")
        } else if unstorable {
            Error::invalid("invalid_text", "Text must be Unicode without the NUL character.")
        } else if away {
            Error::new(Kind::Unavailable, "database_unavailable", "The database is not reachable now; try again.").retry_after(2)
        } else {
            Error::new(Kind::Bug, "internal_error", "Something went wrong on our side.")
        };
        mapped.source = Some(Box::new(Cause(error)));
        mapped
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Error::bug(error)
    }
}
