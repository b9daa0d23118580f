//! What comes of a call to an agent, and what each way to fail is called: the same for every route and workflow.

use borealis_protocol::calls::Refusal;
pub use borealis_protocol::calls::{Call, ListProcesses, Process, ProcessRequest, ProcessSnapshot, Spec};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, Kind, Result};

/// What came of a call. It travels between processes of the engine as a [`Told`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Told", into = "Told")]
pub enum Outcome {
    /// The agent did it.
    Answered {
        /// The reply, a JSON object.
        reply: Box<RawValue>,
    },
    /// The device has no socket, or lost it before it answered.
    Away,
    /// As many calls to the device as may be are under way, and none of them ended in time. Nothing was sent.
    Busy,
    /// It has not answered in time; whether it does what it was asked is not known.
    TimedOut,
    /// The agent says that it did not do it.
    Refused {
        /// Its word for programs.
        code: String,
        /// Its sentence for people; may be empty.
        message: String,
    },
    /// What it answered is no answer.
    Unreadable,
}

/// How an [`Outcome`] is written: a reader of an enum with a tag would build a tree of the reply.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Told {
    /// [`Outcome::word`].
    outcome: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reply: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    code: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    message: String,
}

impl From<Outcome> for Told {
    fn from(outcome: Outcome) -> Self {
        let told = Self { outcome: outcome.word().to_owned(), ..Self::default() };
        match outcome {
            Outcome::Answered { reply } => Self { reply: Some(reply), ..told },
            Outcome::Refused { code, message } => Self { code, message, ..told },
            Outcome::Away | Outcome::Busy | Outcome::TimedOut | Outcome::Unreadable => told,
        }
    }
}

impl From<Told> for Outcome {
    fn from(told: Told) -> Self {
        match (told.outcome.as_str(), told.reply) {
            ("answered", Some(reply)) => Self::Answered { reply },
            ("away", _) => Self::Away,
            ("busy", _) => Self::Busy,
            ("timed_out", _) => Self::TimedOut,
            ("refused", _) => Self::Refused { code: told.code, message: told.message },
            _ => Self::Unreadable,
        }
    }
}

/// What an agent's word of refusal is for a client: its code, and whose fault it is.
const REFUSALS: [(&str, Kind); 21] = [
    ("access_denied", Kind::Forbidden),
    ("agent_busy", Kind::Unavailable),
    ("agent_unavailable", Kind::Unavailable),
    ("conflict", Kind::Conflict),
    ("invalid_action", Kind::Invalid),
    ("invalid_path", Kind::Invalid),
    ("invalid_request", Kind::Invalid),
    ("not_found", Kind::NotFound),
    ("path_not_found", Kind::NotFound),
    ("permission_denied", Kind::Forbidden),
    ("pid_required", Kind::Invalid),
    ("process_not_found", Kind::NotFound),
    ("protected_process", Kind::Conflict),
    ("service_not_found", Kind::NotFound),
    ("socket_unavailable", Kind::Unavailable),
    ("termination_failed", Kind::Conflict),
    ("timeout", Kind::TimedOut),
    ("unsupported", Kind::NotSupported),
    ("unsupported_action", Kind::NotSupported),
    ("unsupported_event", Kind::NotSupported),
    ("unsupported_platform", Kind::NotSupported),
];

impl Outcome {
    /// What a refusal of an agent comes to.
    #[must_use]
    pub fn refused(refusal: Refusal) -> Self {
        Self::Refused { code: refusal.code, message: refusal.message }
    }

    /// Every word.
    pub const WORDS: [&str; 6] = ["answered", "away", "busy", "timed_out", "refused", "unreadable"];

    /// One of [`Self::WORDS`], for logs and metrics.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Answered { .. } => "answered",
            Self::Away => "away",
            Self::Busy => "busy",
            Self::TimedOut => "timed_out",
            Self::Refused { .. } => "refused",
            Self::Unreadable => "unreadable",
        }
    }

    /// The reply.
    ///
    /// # Errors
    /// 503 `agent_unavailable`, `agent_busy`; 504 `timeout`; 502 `invalid_agent_response`; for a refusal the agent's own code with the
    /// status that belongs to it, or else 502 `agent_error` with `agent_code`.
    pub fn into_reply<C: Call>(self) -> Result<C::Reply> {
        match self {
            Self::Answered { reply } => serde_json::from_str(reply.get()).map_err(|_| unreadable()),
            Self::Away => {
                let message = "The device's agent is not connected, or its connection was lost before it answered.";
                Err(Error::new(Kind::Unavailable, "agent_unavailable", message))
            }
            Self::Busy => {
                let message = "Too many requests to this device are under way; try again.";
                Err(Error::new(Kind::Unavailable, "agent_busy", message))
            }
            Self::TimedOut => {
                let message = format!("The device's agent has not answered within {} s.", C::LIMIT.as_secs());
                Err(Error::new(Kind::TimedOut, "timeout", message))
            }
            Self::Refused { code, message } => Err(refusal(&code, &message)),
            Self::Unreadable => Err(unreadable()),
        }
    }
}

fn unreadable() -> Error {
    Error::new(Kind::Upstream, "invalid_agent_response", "The device's agent answered with something that cannot be read.")
}

fn refusal(code: &str, message: &str) -> Error {
    let says = if message.is_empty() { "It gave no reason.".to_owned() } else { format!("It says: {message}") };
    let known = REFUSALS.iter().find(|(known, _)| *known == code).copied();
    let by_kind = || {
        let starts = [("invalid_", "invalid_request", Kind::Invalid), ("unsupported_", "unsupported", Kind::NotSupported)];
        starts.into_iter().find(|(start, ..)| code.starts_with(start)).map(|(_, code, kind)| (code, kind))
    };
    let (known, kind) = known.or_else(by_kind).unwrap_or(("agent_error", Kind::Upstream));
    Error::new(kind, known, format!("The device's agent did not do it ({code}). {says}")).with("agent_code", code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(outcome: Outcome) -> (Kind, &'static str) {
        let error = outcome.into_reply::<ListProcesses>().unwrap_err();
        (error.kind, error.code)
    }

    fn answered(text: &str) -> Outcome {
        Outcome::Answered { reply: RawValue::from_string(text.to_owned()).unwrap() }
    }

    #[test]
    fn each_way_to_fail_has_one_code() {
        assert_eq!(error(Outcome::Away), (Kind::Unavailable, "agent_unavailable"));
        assert_eq!(error(Outcome::Busy), (Kind::Unavailable, "agent_busy"));
        assert_eq!(error(Outcome::TimedOut), (Kind::TimedOut, "timeout"));
        assert_eq!(error(Outcome::Unreadable), (Kind::Upstream, "invalid_agent_response"));
        assert_eq!(error(answered(r#"{"processes":7}"#)), (Kind::Upstream, "invalid_agent_response"));
        assert!(answered(r#"{"ok":true,"processes":[]}"#).into_reply::<ListProcesses>().is_ok());
    }

    #[test]
    fn what_an_agent_refuses_is_told_with_its_own_code() {
        for (code, kind, told) in [
            ("process_not_found", Kind::NotFound, "process_not_found"),
            ("protected_process", Kind::Conflict, "protected_process"),
            ("unsupported_event", Kind::NotSupported, "unsupported_event"),
            ("unsupported_thing", Kind::NotSupported, "unsupported"),
            ("invalid_thing", Kind::Invalid, "invalid_request"),
            ("handler_panic", Kind::Upstream, "agent_error"),
            ("not_for_host", Kind::Upstream, "agent_error"),
        ] {
            let error = Outcome::refused(Refusal::new(code, "why")).into_reply::<ListProcesses>().unwrap_err();
            assert_eq!((error.kind, error.code, &error.extra["agent_code"]), (kind, told, &code.into()), "{code}");
            assert!(error.message.contains("why"));
        }
        assert!(REFUSALS.is_sorted_by_key(|(code, _)| *code));
    }

    #[test]
    fn an_outcome_survives_the_way_between_processes() {
        for outcome in [answered(r#"{"a": 1}"#), Outcome::Away, Outcome::refused(Refusal::new("conflict", "m"))] {
            let text = serde_json::to_string(&outcome).unwrap();
            let back: Outcome = serde_json::from_str(&text).unwrap();
            assert_eq!(serde_json::to_string(&back).unwrap(), text);
            assert_eq!(back.word(), outcome.word());
            assert!(Outcome::WORDS.contains(&outcome.word()));
        }
    }
}
