//! How a program reads its settings: each is a variable of the environment, and an option of the command line.

use std::{error::Error as _, ffi::OsString};

use clap::{
    Arg, Command, Parser,
    error::{ContextKind, ContextValue},
};

/// How the variables of the engine begin.
const PREFIX: &str = "BOREALIS_";

/// Reads the command line and the environment as [`Parser::parse`] does, and ends the program when it cannot. A value that came
/// from the environment is refused by the name of its variable, not by that of an option nobody has typed.
#[must_use]
pub fn parse<T: Parser>() -> T {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    T::try_parse_from(&arguments).unwrap_or_else(|error| match refusal(&T::command(), &arguments, &error) {
        Some(text) => {
            eprintln!("error: {text}\n\nFor more information, try '--help'.");
            std::process::exit(2)
        }
        None => error.exit(),
    })
}

/// What is said of a value from the environment; none when the error is about something else.
fn refusal(command: &Command, arguments: &[OsString], error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind)? {
        ContextValue::String(text) => Some(text.clone()),
        _ => None,
    };
    let (shown, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let long = shown.strip_prefix("--")?.split([' ', '=']).next()?;
    let option = format!("--{long}");
    let typed = |argument: &OsString| argument.to_str().is_some_and(|text| text.split('=').next() == Some(option.as_str()));
    let variable = all(command).into_iter().find(|argument| argument.get_long() == Some(long))?.get_env()?.to_str()?;
    if arguments.iter().any(typed) {
        return None;
    }
    let why = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(why), _) => why.to_string(),
        (None, Some(ContextValue::Strings(values))) => format!("it must be one of {}", values.join(", ")),
        _ => "it cannot be read".to_owned(),
    };
    Some(format!("{variable} is '{value}': {why}"))
}

/// Variables of the environment that look like settings of this program and are none, each with the name that was probably meant.
#[must_use]
pub fn misspelled(command: &Command) -> Vec<(String, String)> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    misspelled_in(command, names)
}

fn misspelled_in(command: &Command, names: impl Iterator<Item = String>) -> Vec<(String, String)> {
    let known: Vec<String> =
        all(command).into_iter().filter_map(|argument| argument.get_env()?.to_str().map(str::to_owned)).collect();
    let meant = |name: &str| {
        let rest = name.strip_prefix(PREFIX)?;
        let near = |known: &&String| *known == rest || strsim::osa_distance(known, name) <= 2;
        if known.iter().any(|known| known == name) { None } else { known.iter().find(near).cloned() }
    };
    names.filter_map(|name| meant(&name).map(|meant| (name, meant))).collect()
}

/// The options of a command and of those below it.
fn all(command: &Command) -> Vec<&Arg> {
    command.get_arguments().chain(command.get_subcommands().flat_map(all)).collect()
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
        #[arg(long, global = true, env = "BOREALIS_OF_A_TEST_FORMAT", value_enum, default_value = "text")]
        format: Format,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Verb {
        Serve {
            #[arg(long, env = "BOREALIS_OF_A_TEST_LISTEN")]
            listen: std::net::SocketAddr,
        },
    }

    #[derive(Debug, Clone, ValueEnum)]
    enum Format {
        Text,
        Json,
    }

    fn said(arguments: &[&str], typed: &[&str]) -> Option<String> {
        let error = Line::try_parse_from(arguments).unwrap_err();
        let typed: Vec<OsString> = typed.iter().map(OsString::from).collect();
        refusal(&Line::command(), &typed, &error)
    }

    #[test]
    fn a_value_from_the_environment_is_refused_by_its_variable() {
        let line = ["test", "serve", "--listen", "nonsense"];
        let expected = "BOREALIS_OF_A_TEST_LISTEN is 'nonsense': invalid socket address syntax";
        assert_eq!(said(&line, &["test", "serve"]).as_deref(), Some(expected));
        assert_eq!(said(&line, &line), None, "typed: clap's own words are right");
        let line = ["test", "serve", "--listen", "[::1]:1", "--format=yaml"];
        let expected = "BOREALIS_OF_A_TEST_FORMAT is 'yaml': it must be one of text, json";
        assert_eq!(said(&line, &["test", "serve"]).as_deref(), Some(expected));
        assert_eq!(said(&line, &line), None);
        assert_eq!(said(&["test", "serv"], &["test", "serv"]), None, "another error");
    }

    #[test]
    fn a_misspelled_setting_is_noticed() {
        let names = ["BOREALIS_OF_A_TEST_LISTEN", "BOREALIS_OF_A_TEST_LITSEN", "BOREALIS_OTHER", "HOME", "OF_A_TEST_LISTEN"];
        let found = misspelled_in(&Line::command(), names.iter().map(ToString::to_string));
        assert_eq!(found, [("BOREALIS_OF_A_TEST_LITSEN".to_owned(), "BOREALIS_OF_A_TEST_LISTEN".to_owned())]);
    }
}
