//! Engine.IO 4 and Socket.IO v5 packets as text frames of one WebSocket, default namespace, no binary attachments.
//!
//! Pure functions, so that a client, a fake server and a load generator share them. Formats: the Engine.IO protocol
//! (revision 4) and Socket.IO protocol (revision 5) documents; only what agents use of them is here.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the server says when the transport opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Open {
    /// Id of the transport session.
    pub sid: String,
    /// Transports the client may upgrade to.
    #[serde(default)]
    pub upgrades: Vec<String>,
    /// Milliseconds between two pings of the server.
    pub ping_interval: u64,
    /// Milliseconds the server waits for the answer to a ping.
    pub ping_timeout: u64,
    /// Largest message the server takes, in bytes; 0 when not said.
    #[serde(default)]
    pub max_payload: u64,
}

/// One text frame.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// `0{...}`: the transport is open.
    Open(Open),
    /// `1`: the transport closes.
    Close,
    /// `2`: are you there? With an optional payload that the answer repeats.
    Ping(String),
    /// `3`: the answer to a ping.
    Pong(String),
    /// `6`: nothing.
    Noop,
    /// `40{...}`: namespace connect (client) or its acceptance (server).
    Connect(Option<Value>),
    /// `41`: the namespace is left.
    Disconnect,
    /// `42[id]["name",...]`: an event; with an id the sender waits for an [`Frame::Ack`].
    Event {
        /// Number to answer with.
        id: Option<u64>,
        /// Name of the event.
        name: String,
        /// Its arguments.
        args: Vec<Value>,
    },
    /// `43id[...]`: the answer to an event.
    Ack {
        /// The number the event carried.
        id: u64,
        /// The answer's arguments.
        args: Vec<Value>,
    },
    /// `44{...}`: the namespace was refused.
    ConnectError(Option<Value>),
}

/// Why a text frame was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// An empty frame.
    #[error("empty frame")]
    Empty,
    /// A packet type outside of what agents speak: binary events, the polling probe, another namespace.
    #[error("unsupported packet: {0}")]
    Unsupported(&'static str),
    /// The frame breaks the grammar of its type.
    #[error("malformed packet: {0}")]
    Malformed(&'static str),
}

/// Reads one text frame.
///
/// # Errors
/// [`FrameError`]; never panics, whatever the text.
pub fn decode(text: &str) -> Result<Frame, FrameError> {
    let mut chars = text.chars();
    let kind = chars.next().ok_or(FrameError::Empty)?;
    let rest = chars.as_str();
    match kind {
        '0' => serde_json::from_str(rest).map(Frame::Open).map_err(|_| FrameError::Malformed("open")),
        '1' => Ok(Frame::Close),
        '2' => Ok(Frame::Ping(rest.to_owned())),
        '3' => Ok(Frame::Pong(rest.to_owned())),
        '4' => decode_message(rest),
        '5' => Err(FrameError::Unsupported("upgrade")),
        '6' => Ok(Frame::Noop),
        _ => Err(FrameError::Malformed("unknown transport packet")),
    }
}

fn decode_message(text: &str) -> Result<Frame, FrameError> {
    let mut chars = text.chars();
    let kind = chars.next().ok_or(FrameError::Malformed("message without a type"))?;
    let mut rest = chars.as_str();
    // "/," is the long spelling of the default namespace; every other namespace is not ours.
    if rest.starts_with('/') {
        rest = rest.strip_prefix("/,").or_else(|| (rest == "/").then_some("")).ok_or(FrameError::Unsupported("namespace"))?;
    }
    match kind {
        '0' => optional(rest).map(Frame::Connect),
        '1' => Ok(Frame::Disconnect),
        '2' => {
            let (id, body) = take_id(rest)?;
            let mut args = array(body, "event")?.into_iter();
            match args.next() {
                Some(Value::String(name)) => Ok(Frame::Event { id, name, args: args.collect() }),
                _ => Err(FrameError::Malformed("event without a name")),
            }
        }
        '3' => {
            let (id, body) = take_id(rest)?;
            let id = id.ok_or(FrameError::Malformed("ack without an id"))?;
            Ok(Frame::Ack { id, args: array(body, "ack")? })
        }
        '4' => optional(rest).map(Frame::ConnectError),
        '5' | '6' => Err(FrameError::Unsupported("binary")),
        _ => Err(FrameError::Malformed("unknown message packet")),
    }
}

fn take_id(text: &str) -> Result<(Option<u64>, &str), FrameError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (id, body) = text.split_at(digits);
    if id.is_empty() {
        return Ok((None, body));
    }
    id.parse().map(|id| (Some(id), body)).map_err(|_| FrameError::Malformed("id out of range"))
}

fn array(text: &str, what: &'static str) -> Result<Vec<Value>, FrameError> {
    serde_json::from_str(text).map_err(|_| FrameError::Malformed(what))
}

fn optional(text: &str) -> Result<Option<Value>, FrameError> {
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(text).map(Some).map_err(|_| FrameError::Malformed("connect"))
}

/// Writes one text frame.
#[must_use]
pub fn encode(frame: &Frame) -> String {
    match frame {
        Frame::Open(open) => format!("0{}", serde_json::to_string(open).unwrap_or_default()),
        Frame::Close => "1".to_owned(),
        Frame::Ping(payload) => format!("2{payload}"),
        Frame::Pong(payload) => format!("3{payload}"),
        Frame::Noop => "6".to_owned(),
        Frame::Connect(data) => with_data("40", data.as_ref()),
        Frame::Disconnect => "41".to_owned(),
        Frame::Event { id, name, args } => {
            let mut items = Vec::with_capacity(args.len() + 1);
            items.push(Value::from(name.as_str()));
            items.extend(args.iter().cloned());
            format!("42{}{}", id.map(|id| id.to_string()).unwrap_or_default(), Value::Array(items))
        }
        Frame::Ack { id, args } => format!("43{id}{}", Value::from(args.as_slice())),
        Frame::ConnectError(data) => with_data("44", data.as_ref()),
    }
}

fn with_data(kind: &str, data: Option<&Value>) -> String {
    data.map_or_else(|| kind.to_owned(), |data| format!("{kind}{data}"))
}

/// Writes an event with one argument straight from its type, without building a [`Value`] first.
///
/// # Errors
/// When `payload` has no JSON form (a map with keys that are not text).
pub fn encode_event<T: Serialize + ?Sized>(id: Option<u64>, name: &str, payload: &T) -> Result<String, serde_json::Error> {
    let mut text = String::from("42");
    if let Some(id) = id {
        text.push_str(&id.to_string());
    }
    text.push_str(&serde_json::to_string(&(name, payload))?);
    Ok(text)
}

/// Writes the answer to an event with one argument.
///
/// # Errors
/// When `payload` has no JSON form.
pub fn encode_ack<T: Serialize + ?Sized>(id: u64, payload: &T) -> Result<String, serde_json::Error> {
    Ok(format!("43{id}{}", serde_json::to_string(&[payload])?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn frames_of_the_protocol_documents() {
        let open =
            r#"0{"sid":"lv_VI97HAXpY6yYWAAAC","upgrades":[],"pingInterval":25000,"pingTimeout":20000,"maxPayload":1000000}"#;
        let Frame::Open(info) = decode(open).unwrap() else { panic!("not an open frame") };
        assert_eq!((info.ping_interval, info.ping_timeout, info.max_payload), (25_000, 20_000, 1_000_000));
        assert_eq!(encode(&Frame::Open(info)), open);

        let cases = [
            ("1", Frame::Close),
            ("2", Frame::Ping(String::new())),
            ("2probe", Frame::Ping("probe".into())),
            ("3", Frame::Pong(String::new())),
            ("6", Frame::Noop),
            ("40", Frame::Connect(None)),
            (r#"40{"sid":"x"}"#, Frame::Connect(Some(json!({"sid": "x"})))),
            ("41", Frame::Disconnect),
            (r#"42["foo"]"#, Frame::Event { id: None, name: "foo".into(), args: vec![] }),
            (
                r#"4212["foo",{"a":1},"b"]"#,
                Frame::Event { id: Some(12), name: "foo".into(), args: vec![json!({"a": 1}), json!("b")] },
            ),
            (r#"4313["bar"]"#, Frame::Ack { id: 13, args: vec![json!("bar")] }),
            ("430[]", Frame::Ack { id: 0, args: vec![] }),
            (r#"44{"message":"Not authorized"}"#, Frame::ConnectError(Some(json!({"message": "Not authorized"})))),
        ];
        for (text, frame) in cases {
            assert_eq!(decode(text).unwrap(), frame, "{text}");
            assert_eq!(encode(&frame), text);
        }
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        for text in [
            "",
            "4",
            "9",
            "é",
            "0",
            "0{}",
            "5",
            "42",
            "42{}",
            "42[]",
            "42[1]",
            "43[]",
            "4399999999999999999999[]",
            "42999",
            "43x[]",
            "45[\"a\"]",
            "461[]",
            "40/admin,",
            "42/admin,[\"a\"]",
            "40{",
            "44x",
            "42[\"a\"",
            "4é",
        ] {
            assert!(decode(text).is_err(), "{text:?}");
        }
        let deep = format!("42[\"a\",{}", "[".repeat(100_000));
        assert!(decode(&deep).is_err());
    }

    #[test]
    fn the_default_namespace_may_be_spelled_out() {
        assert_eq!(decode("40/,").unwrap(), Frame::Connect(None));
        assert_eq!(decode(r#"42/,7["a"]"#).unwrap(), Frame::Event { id: Some(7), name: "a".into(), args: vec![] });
    }

    #[test]
    fn typed_helpers_write_the_same_frames() {
        let event = encode_event(Some(3), "quick_job_result", &json!({"job_id": 1})).unwrap();
        assert_eq!(event, r#"423["quick_job_result",{"job_id":1}]"#);
        assert_eq!(encode_event(None, "a", &1).unwrap(), r#"42["a",1]"#);
        assert_eq!(encode_ack(9, &json!({"ok": true})).unwrap(), r#"439[{"ok":true}]"#);
    }
}
