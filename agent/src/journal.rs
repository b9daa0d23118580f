//! Levels for the journal: it reads them from the beginning of each line that a service prints.

use std::fmt;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// What stands before a line of this level (`sd-daemon(3)`).
pub(crate) const fn prefix(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Whether standard error goes to the journal. A service manager says so in `JOURNAL_STREAM`; a child that has another standard error
/// inherits the variable all the same.
pub(crate) fn is_listening() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else { return false };
    let stderr = std::io::stderr().as_fd().try_clone_to_owned().map(std::fs::File::from);
    let metadata = stderr.and_then(|stderr| stderr.metadata());
    metadata.is_ok_and(|metadata| named == format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// Lines as `0` makes them, each with its level before it.
#[derive(Debug)]
pub(crate) struct Leveled<F>(pub(crate) F);

impl<S, N, F> FormatEvent<S, N> for Leveled<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut text = String::new();
        self.0.format_event(context, Writer::new(&mut text), event)?;
        for line in text.lines() {
            writeln!(writer, "{}{line}", prefix(*event.metadata().level()))?;
        }
        Ok(())
    }
}
