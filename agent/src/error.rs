//! What can go wrong in the agent as a whole. Trouble that passes by itself is retried inside and never gets here.

use std::path::PathBuf;

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is missing or makes no sense.
    #[error("{0}")]
    Config(String),
    /// A file or directory of the agent cannot be used.
    #[error("{}: {source}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the agent does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Corrupt {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Another agent works with the same state directory.
    #[error("another agent is already running with {}", .0.display())]
    Locked(PathBuf),
    /// TLS or the HTTP client could not be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// The service manager refused.
    #[error("{0}")]
    Service(String),
}

impl Error {
    /// Turns an I/O error about `path` into [`Error::File`].
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// Shorthand for results of the agent.
pub type Result<T, E = Error> = std::result::Result<T, E>;
