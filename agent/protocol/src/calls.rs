//! Calls: what the engine asks of an agent and waits for an answer to.
//!
//! A call is an event with an ack id. Its answer is one object: `{"ok":true, ...}` with the members of the reply, or
//! `{"ok":false,"error":code,"message":sentence}`. Agents also answer in other forms, all of which [`Answer::read`] knows.
//!
//! A call is asked for once, is bound to the socket it was sent through, and is lost with it. What must survive is a durable run, not a
//! call.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lenient;

/// [`Refusal::code`] of an agent that has no handler for the event.
pub const UNSUPPORTED_EVENT: &str = "unsupported_event";
/// [`Refusal::code`] of an agent whose handlers for the event are all at work.
pub const AGENT_BUSY: &str = "agent_busy";
/// [`Refusal::code`] of an agent whose handler failed.
pub const AGENT_ERROR: &str = "agent_error";
/// [`Refusal::code`] of an answer that says only that it is one of failure.
const REFUSED: &str = "refused";

/// The most characters of a [`Refusal::code`].
const CODE_CHARS: usize = 64;
/// The most characters of a [`Refusal::message`].
const MESSAGE_CHARS: usize = 500;

/// One kind of call.
pub trait Call {
    /// What the engine sends.
    type Request: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What the agent answers.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// What the call is named within the engine, in its metrics and its log.
    const NAME: &'static str;
    /// The Socket.IO event. Several calls may have the same one.
    const EVENT: &'static str;
    /// How long the engine waits for the answer.
    const LIMIT: Duration;
    /// The most bytes of an answer.
    const ANSWER_BYTES: usize;
    /// The most values in an answer: arrays, objects, members and elements.
    const ANSWER_VALUES: usize;
}

/// A [`Call`] without its types, to look it up by its name.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// [`Call::NAME`].
    pub name: &'static str,
    /// [`Call::EVENT`].
    pub event: &'static str,
    /// [`Call::LIMIT`].
    pub limit: Duration,
    /// [`Call::ANSWER_BYTES`].
    pub answer_bytes: usize,
    /// [`Call::ANSWER_VALUES`].
    pub answer_values: usize,
    /// Whether a value is a request of this call.
    pub takes: fn(&Value) -> bool,
}

impl Spec {
    /// The description of a call.
    #[must_use]
    pub const fn of<C: Call>() -> Self {
        Self {
            name: C::NAME,
            event: C::EVENT,
            limit: C::LIMIT,
            answer_bytes: C::ANSWER_BYTES,
            answer_values: C::ANSWER_VALUES,
            takes: |request| C::Request::deserialize(request).is_ok(),
        }
    }

    /// The call of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|spec| spec.name == name)
    }
}

/// Every call there is.
pub static ALL: [Spec; 1] = [Spec::of::<ListProcesses>()];

/// Why an agent did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A word for programs, such as `process_not_found`; lower-case letters, digits and `_`.
    pub code: String,
    /// A sentence for people; may be empty.
    pub message: String,
}

impl Refusal {
    /// Bounds what an agent says: a code of other characters is none, and a message has no control characters.
    #[must_use]
    pub fn new(code: &str, message: &str) -> Self {
        let is_code = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let code = code.trim();
        let sound = !code.is_empty() && code.len() <= CODE_CHARS && code.chars().all(is_code);
        Self {
            code: if sound { code } else { REFUSED }.to_owned(),
            message: message.trim().chars().filter(|c| !c.is_control()).take(MESSAGE_CHARS).collect(),
        }
    }

    /// As an agent answers it.
    #[must_use]
    pub fn to_answer(&self) -> Value {
        serde_json::json!({"ok": false, "error": self.code, "message": self.message})
    }
}

/// What the answer to a call is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The reply, as JSON text of an object.
    Reply(&'a str),
    /// The agent did not do it.
    Refused(Refusal),
    /// It is no object, or no JSON.
    Unreadable,
}

/// What tells a reply from a refusal.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Head {
    ok: Option<bool>,
    #[serde(deserialize_with = "lenient::text")]
    error: String,
    #[serde(deserialize_with = "lenient::text")]
    message: String,
    #[serde(deserialize_with = "lenient::text")]
    status: String,
    #[serde(deserialize_with = "lenient::text")]
    detail: String,
}

impl<'a> Answer<'a> {
    /// Reads the arguments of an ack, the JSON text of an array, in every form agents answer in: `ok` false; an `error` without `ok` true
    /// or a `status` beside it (`unsupported_event`, `handler_error`, `handler_panic`); `status` `error` or `ignored` with a `detail`.
    #[must_use]
    pub fn read(arguments: &'a str) -> Self {
        #[derive(Deserialize)]
        struct Arguments<'a>(#[serde(borrow)] Vec<&'a serde_json::value::RawValue>);
        let first = match serde_json::from_str::<Arguments<'a>>(arguments) {
            Ok(Arguments(list)) => list.first().map(|value| value.get().trim()),
            Err(_) => None,
        };
        // A derived reader would take an array for an object.
        let Some(text) = first.filter(|text| text.starts_with('{')) else { return Self::Unreadable };
        let Ok(head) = serde_json::from_str::<Head>(text) else { return Self::Unreadable };
        let says = if head.message.is_empty() { &head.detail } else { &head.message };
        let status = head.status.trim().to_ascii_lowercase();
        match (head.ok, status.as_str()) {
            (Some(true), _) => Self::Reply(text),
            (Some(false), _) => Self::Refused(Refusal::new(&head.error, says)),
            (None, "error" | "failed") => Self::Refused(Refusal::new(&head.error, says)),
            (None, "ignored") => Self::Refused(Refusal::new("not_for_host", says)),
            (None, "") if !head.error.trim().is_empty() => Self::Refused(Refusal::new(&head.error, says)),
            (None, _) => Self::Reply(text),
        }
    }
}

/// The processes of a machine.
#[derive(Debug)]
pub struct ListProcesses;

impl Call for ListProcesses {
    type Request = ProcessRequest;
    type Reply = ProcessSnapshot;
    const NAME: &'static str = "processes.list";
    const EVENT: &'static str = PROCESS_MANAGEMENT_REQUEST;
    const LIMIT: Duration = Duration::from_secs(8);
    const ANSWER_BYTES: usize = 8 * 1024 * 1024;
    const ANSWER_VALUES: usize = 400_000;
}

/// Engine to agent: [`ProcessRequest`], answered with a [`ProcessSnapshot`].
pub const PROCESS_MANAGEMENT_REQUEST: &str = "process_management_request";
/// [`ProcessRequest::action`] of [`ListProcesses`].
pub const ACTION_LIST: &str = "list";
/// The most processes that an agent of ours lists.
pub const PROCESSES_MAX: usize = 8_000;

/// How often a client that shows processes should ask again, in milliseconds.
pub const PROCESSES_REFRESH_MS: i64 = 5_000;

/// How old a list of processes may be, in seconds, when a caller asks for `asked`: 0.25 to 15, and 5 when it asks for none.
#[must_use]
pub fn process_list_age_s(asked: Option<f64>) -> f64 {
    asked.filter(|asked| !asked.is_nan()).map_or(5.0, |asked| asked.clamp(0.25, 15.0))
}

/// What [`PROCESS_MANAGEMENT_REQUEST`] says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessRequest {
    /// [`ACTION_LIST`]; agents may know other words.
    #[serde(default)]
    pub action: String,
    /// How old a snapshot may be, in seconds, so that the agent need not take a new one; 0 when nothing is said. See
    /// [`process_list_age_s`].
    #[serde(default)]
    pub max_age_seconds: f64,
    /// When the engine asked, in epoch seconds.
    #[serde(default)]
    pub requested_at: i64,
}

/// The processes of a machine at a moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSnapshot {
    /// When it was taken, in epoch seconds.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub reported_at: i64,
    /// How often a client that shows them should ask again, in milliseconds.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub refresh_interval_ms: i64,
    /// There are more than the agent lists; these are the largest.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub truncated: bool,
    /// The processes, in no order.
    pub processes: Vec<Process>,
}

/// A process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Process {
    /// `<pid>:<created_at>`: a number alone is used again for other processes.
    #[serde(default, deserialize_with = "lenient::text")]
    pub id: String,
    /// Its number.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub pid: i64,
    /// The number of the process that started it, 0 for none.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub parent_pid: i64,
    /// Its name.
    #[serde(default, deserialize_with = "lenient::text")]
    pub name: String,
    /// Its share of all processors together, in percent.
    #[serde(default, deserialize_with = "lenient::number")]
    pub cpu_percent: f64,
    /// Its use of processors, in percent of one of them.
    #[serde(default, deserialize_with = "lenient::number")]
    pub raw_cpu_percent: f64,
    /// Its share of the memory, in percent.
    #[serde(default, deserialize_with = "lenient::number")]
    pub memory_percent: f64,
    /// Its memory, in bytes.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub memory_bytes: i64,
    /// Its command line.
    #[serde(default, deserialize_with = "lenient::text")]
    pub command_line: String,
    /// The path of its program.
    #[serde(default, deserialize_with = "lenient::text")]
    pub executable_path: String,
    /// The user it runs as.
    #[serde(default, deserialize_with = "lenient::text")]
    pub username: String,
    /// What it does, as its operating system calls it: `running`, `sleeping`.
    #[serde(default, deserialize_with = "lenient::text")]
    pub status: String,
    /// When it was started, in epoch seconds.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub created_at: i64,
    /// When it was looked at, in epoch seconds.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub captured_at: i64,
    /// How many processes it has started that still run.
    #[serde(default, deserialize_with = "lenient::integer")]
    pub child_count: i64,
    /// Whether there are any.
    #[serde(default, deserialize_with = "lenient::flag")]
    pub has_children: bool,
    /// What else the agent says of it, such as the rates of its disk and network use.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(text: &str) -> (String, String) {
        match Answer::read(text) {
            Answer::Refused(refusal) => (refusal.code, refusal.message),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_form_of_answer_is_understood() {
        for reply in [
            r#"{"ok":true,"processes":[]}"#,
            r#"{"ok":true,"error":"none","status":"ignored"}"#,
            r#"{"status":"ok"}"#,
            r#"{"status":"active","error":"still"}"#,
            r#"{"processes":[]}"#,
            r#"{"error":""}"#,
            r#"{"error":null,"ok":null}"#,
        ] {
            assert_eq!(Answer::read(&format!("[{reply}]")), Answer::Reply(reply));
            assert_eq!(Answer::read(&format!("[ {reply} , 1]")), Answer::Reply(reply), "further arguments are passed over");
        }
        for (text, code, message) in [
            (r#"{"ok":false,"error":"process_not_found","message":"It is gone."}"#, "process_not_found", "It is gone."),
            (r#"{"ok":false}"#, "refused", ""),
            (r#"{"ok":false,"error":17}"#, "17", ""),
            (r#"{"error":"unsupported_event"}"#, UNSUPPORTED_EVENT, ""),
            (r#"{"error":"handler_error","message":"broken\u0000\npipe"}"#, "handler_error", "brokenpipe"),
            (r#"{"error":"handler_panic"}"#, "handler_panic", ""),
            (r#"{"status":"error","detail":"no room"}"#, "refused", "no room"),
            (r#"{"status":"ignored","agent_id":"a"}"#, "not_for_host", ""),
            (r#"{"ok":false,"error":"<script>"}"#, "refused", ""),
        ] {
            assert_eq!(refused(&format!("[{text}]")), (code.to_owned(), message.to_owned()), "{text}");
        }
        let long = refused(&json!([{"ok": false, "error": "e".repeat(65), "message": "m".repeat(10_000)}]).to_string());
        assert_eq!((long.0.as_str(), long.1.len()), ("refused", MESSAGE_CHARS));
        for text in ["[null]", "[]", "[1]", "[[true]]", "[\"ok\"]", "{}", "[{]", "", "[{\"ok\":\"yes\"}]"] {
            assert_eq!(Answer::read(text), Answer::Unreadable, "{text}");
        }
    }

    #[test]
    fn the_age_of_a_list_is_bounded() {
        for (asked, seconds) in [
            (None, 5.0),
            (Some(f64::NAN), 5.0),
            (Some(-1.0), 0.25),
            (Some(0.1), 0.25),
            (Some(3.0), 3.0),
            (Some(1e300), 15.0),
            (Some(f64::INFINITY), 15.0),
        ] {
            assert!((process_list_age_s(asked) - seconds).abs() < f64::EPSILON, "{asked:?}");
        }
    }

    #[test]
    fn processes_are_read_in_every_form_and_what_is_unknown_is_passed_on() {
        let spec = Spec::named("processes.list").unwrap();
        assert!(Spec::named("quick_job_run").is_none());
        assert!((spec.takes)(&json!({"action": "list"})) && !(spec.takes)(&json!({"action": 1})));
        for no_list in [r#"{"ok":true}"#, r#"{"ok":true,"processes":7}"#] {
            assert!(serde_json::from_str::<ProcessSnapshot>(no_list).is_err(), "{no_list}");
        }
        let text = json!({"ok": true, "reported_at": "1700000000", "refresh_interval_ms": 5000.5, "processes": [
            {"pid": 7.0, "name": 12, "cpu_percent": "1.5", "memory_bytes": 1e30, "has_children": "yes", "disk_read_rate": 3, "created_at": null},
        ]});
        let snapshot: ProcessSnapshot = serde_json::from_str(&text.to_string()).unwrap();
        assert_eq!((snapshot.reported_at, snapshot.refresh_interval_ms), (1_700_000_000, 5_000));
        let row = serde_json::to_value(&snapshot.processes[0]).unwrap();
        assert_eq!((&row["pid"], &row["name"], &row["cpu_percent"]), (&json!(7), &json!("12"), &json!(1.5)));
        assert_eq!((&row["memory_bytes"], &row["has_children"]), (&json!(i64::MAX), &json!(false)));
        assert_eq!((&row["disk_read_rate"], &row["created_at"]), (&json!(3), &json!(0)));
    }
}
