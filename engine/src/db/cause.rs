//! What went wrong in the database, as it is logged.

use std::{error, fmt};

/// An error of sqlx whose text says the cause once, without the place in the server's source code.
#[derive(Debug)]
pub struct Cause(pub(crate) sqlx::Error);

impl Cause {
    /// The text of an error.
    #[must_use]
    pub fn text(error: &sqlx::Error) -> String {
        match error {
            sqlx::Error::Database(database) => match database.code() {
                // Prepared statements that are gone, or there already, although this connection made each of them once.
                Some(code) if matches!(&*code, "26000" | "42P05") => {
                    format!("{} (SQLSTATE {code}): {}", database.message(), super::check::transaction_mode())
                }
                Some(code) => format!("{} (SQLSTATE {code})", database.message()),
                None => database.message().to_owned(),
            },
            sqlx::Error::Io(error) => Self::io(error),
            other => other.to_string(),
        }
    }

    /// The text of an error of the operating system, without its number.
    #[must_use]
    pub fn io(error: &std::io::Error) -> String {
        let text = error.to_string();
        let end = text.find(" (os error ").unwrap_or(text.len());
        text.get(..end).unwrap_or(&text).to_owned()
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&Self::text(&self.0))
    }
}

// What sqlx's error wraps is in its text already.
impl error::Error for Cause {}
