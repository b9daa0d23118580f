//! What came with an event, read within bounds.

use std::{convert::Infallible, sync::Arc};

use borealis_engine::json::{self, Limits};
use serde_json::Value;
use socketioxide::{
    extract::TryData,
    handler::{FromMessageParts, Value as Raw},
    socket::Socket,
};

use super::Adapter;

/// The most values in a message, as [`json::Size::values`] counts them. The longest reports are long texts, not many.
const VALUES: usize = 10_000;

/// The first argument of an event; none when there is none, when it cannot be read, or when it has more values than any client sends.
/// Binary attachments are no part of our events: a tree of them is many times their size.
pub struct Said(pub Option<Value>);

impl FromMessageParts<Adapter> for Said {
    type Error = Infallible;

    fn from_message_parts(socket: &Arc<Socket<Adapter>>, raw: &mut Raw, ack: &Option<i64>) -> Result<Self, Infallible> {
        let fits = match raw {
            Raw::Str(text, binaries) => {
                binaries.as_ref().is_none_or(|binaries| binaries.is_empty())
                    && json::measure(text.as_bytes(), Limits::values(VALUES)).is_ok()
            }
            Raw::Bytes(_) => false,
        };
        if !fits {
            tracing::info!(socket = %socket.id, "a message has more values than are read");
            return Ok(Self(None));
        }
        let TryData(said) = TryData::<Value>::from_message_parts(socket, raw, ack)?;
        Ok(Self(said.ok()))
    }
}
