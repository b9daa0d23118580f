//! The socket as these agents use it: WebSocket text in frames of 4,096 bytes, Socket.IO without an auth object, JSON as Go
//! writes it.

use std::sync::Arc;

use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use serde_json::Value;
use tokio::{net::TcpStream, sync::Mutex};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        protocol::frame::{
            Frame,
            coding::{Data, OpCode},
        },
    },
};

/// The size of the client library's write buffer, in bytes: a longer message is sent in frames of it.
pub const FRAME_BYTES: usize = 4096;

type Stream = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The writing half: whoever writes a message writes all of it.
#[derive(Debug, Clone)]
pub struct Writer(Arc<Mutex<SplitSink<Stream, Message>>>);

/// The reading half.
#[derive(Debug)]
pub struct Reader(SplitStream<Stream>);

/// Opens the socket below `base`, which may have a path.
///
/// # Errors
/// With the text the agent would report.
pub async fn open(base: &str, headers: &[(&'static str, String)]) -> Result<(Reader, Writer), String> {
    let base = base.trim_end_matches('/').replacen("http", "ws", 1);
    let mut request =
        format!("{base}/socket.io/?EIO=4&transport=websocket").into_client_request().map_err(|error| error.to_string())?;
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().map_err(|_| "a header value".to_owned())?);
    }
    let (stream, _) = tokio_tungstenite::connect_async(request).await.map_err(|error| match error {
        tungstenite::Error::Http(answer) => format!("websocket: bad handshake ({})", answer.status()),
        other => other.to_string(),
    })?;
    let (writer, reader) = stream.split();
    Ok((Reader(reader), Writer(Arc::new(Mutex::new(writer)))))
}

impl Writer {
    /// Writes one message.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn write(&self, text: &str) -> Result<(), String> {
        let mut sink = self.0.lock().await;
        let mut pieces = text.as_bytes().chunks(FRAME_BYTES).peekable();
        let mut opcode = OpCode::Data(Data::Text);
        while let Some(piece) = pieces.next() {
            let frame = Frame::message(piece.to_vec(), opcode, pieces.peek().is_none());
            sink.send(Message::Frame(frame)).await.map_err(|error| error.to_string())?;
            opcode = OpCode::Data(Data::Continue);
        }
        Ok(())
    }

    /// Writes an event without a number: these agents never ask for an answer.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn emit(&self, event: &str, payload: &Value) -> Result<(), String> {
        self.write(&format!("42{}", go_json(&serde_json::json!([event, payload])))).await
    }
}

impl Reader {
    /// The next text message; what else comes is passed over.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn read(&mut self) -> Result<String, String> {
        loop {
            match self.0.next().await {
                Some(Ok(Message::Text(text))) => return Ok(text.to_string()),
                Some(Ok(Message::Close(frame))) => return Err(format!("websocket: close {frame:?}")),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("EOF".to_owned()),
            }
        }
    }
}

/// JSON as Go's encoder writes a map: the names sorted, and what HTML would read escaped.
#[must_use]
pub fn go_json(value: &Value) -> String {
    let mut text = String::new();
    write_go(value, &mut text);
    text
}

fn write_go(value: &Value, text: &mut String) {
    match value {
        Value::Object(members) => {
            let mut sorted: Vec<_> = members.iter().collect();
            sorted.sort_by_key(|(name, _)| *name);
            text.push('{');
            for (at, (name, value)) in sorted.into_iter().enumerate() {
                if at > 0 {
                    text.push(',');
                }
                write_go(&Value::String(name.clone()), text);
                text.push(':');
                write_go(value, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    text.push(',');
                }
                write_go(item, text);
            }
            text.push(']');
        }
        Value::String(plain) => {
            for c in Value::String(plain.clone()).to_string().chars() {
                match c {
                    '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
                    other => text.push(other),
                }
            }
        }
        other => text.push_str(&other.to_string()),
    }
}

/// One event of the engine: its name, its first argument and the number to answer with.
#[must_use]
pub fn parse_event(packet: &str) -> Option<(String, Value, String)> {
    let json = packet.find('[')?;
    let (ack, text) = packet.split_at(json);
    let Ok(Value::Array(values)) = serde_json::from_str(text) else { return None };
    let mut values = values.into_iter();
    let name = values.next()?.as_str()?.to_owned();
    Some((name, values.next().unwrap_or_default(), ack.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_written_as_go_writes_it() {
        let value = json!({"stdout": "a<b>&\u{2028}\n", "context": {"b": [1, null], "a": true}});
        assert_eq!(go_json(&value), "{\"context\":{\"a\":true,\"b\":[1,null]},\"stdout\":\"a\\u003cb\\u003e\\u0026\\u2028\\n\"}");
        assert_eq!(parse_event("17[\"x\",{\"a\":1},2]"), Some(("x".into(), json!({"a": 1}), "17".into())));
        assert_eq!(parse_event("[\"x\"]"), Some(("x".into(), Value::Null, String::new())));
    }
}
