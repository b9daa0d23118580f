//! The WebSocket frames of a client (RFC 6455, 5.2) on their way in: its messages are counted, and a JSON text that is too long
//! is shortened inside the string it is too long in.
//!
//! Agents of the reference split a message into frames of 4,096 bytes and have no limit for what a script printed. A report
//! beyond the limit would end its socket, and with it every other script of the device; shortened it says how the script ended.

/// What a string ends with where the rest of its message was left out, as it stands in JSON.
pub const SHORTENED: &str = r"\n[The report was too long; the rest was left out.]\n";
/// How many bytes of a message may follow its limit before a place is found where it can be cut.
const SEARCH_BYTES: usize = 256;

/// What was found in some bytes of a client.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Messages and control frames that have begun.
    pub messages: u32,
    /// Frames that have begun, those that continue a message included.
    pub frames: u32,
}

/// A message that is too long and cannot be shortened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooLong;

/// Reads the frames of one client.
#[derive(Debug)]
pub struct Frames {
    /// The most bytes of one message; none when something else keeps the limit.
    limit: Option<u64>,
    header: [u8; 14],
    have: usize,
    frame: Option<Frame>,
    message: Option<Message>,
}

/// The frame whose payload is being read.
#[derive(Debug)]
struct Frame {
    left: u64,
    mask: Option<[u8; 4]>,
    /// Bytes of the payload so far, which the mask goes by.
    at: u64,
    /// Whether it ends its message.
    last: bool,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A ping, pong or close, which may stand inside a message.
    Control,
    /// Part of a message, of which this many bytes are still to be passed on.
    Data { room: u64 },
}

#[derive(Debug, Default)]
struct Message {
    length: u64,
    json: Json,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Whole,
    /// The limit is reached: what came after it, until the message can be cut.
    Closing(Vec<u8>),
    /// What comes is left out.
    Closed,
}

impl Frames {
    /// Of a client whose messages may have `limit` bytes. A longer one is passed on with up to 1 KiB more.
    pub fn new(limit: Option<u64>) -> Self {
        Self { limit, header: [0; 14], have: 0, frame: None, message: None }
    }

    /// Reads `bytes` and gives what is to be passed on to `out`, in order.
    ///
    /// # Errors
    /// When a message is too long and cannot be shortened: nothing after it can be passed on.
    pub fn pass(&mut self, mut bytes: &[u8], out: &mut impl FnMut(&[u8])) -> Result<Counted, TooLong> {
        let mut counted = Counted::default();
        while !bytes.is_empty() {
            let Some(frame) = &mut self.frame else {
                bytes = self.read_header(bytes, &mut counted, out);
                continue;
            };
            let length = bytes.len().min(usize::try_from(frame.left).unwrap_or(usize::MAX));
            let (payload, rest) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
            bytes = rest;
            frame.left -= payload.len() as u64;
            match (frame.kind, &mut self.message) {
                (Kind::Data { room }, Some(message)) if self.limit.is_some() => {
                    let passed = payload.len().min(usize::try_from(room).unwrap_or(usize::MAX));
                    let (passed, beyond) = payload.split_at_checked(passed).unwrap_or((payload, &[]));
                    frame.kind = Kind::Data { room: room - passed.len() as u64 };
                    if !passed.is_empty() {
                        frame.unmasked(passed, |byte| message.json.read(byte));
                        out(passed);
                    }
                    if !beyond.is_empty() {
                        let mut trouble = false;
                        frame.unmasked(beyond, |byte| trouble |= message.read_beyond(byte, out).is_err());
                        if trouble {
                            return Err(TooLong);
                        }
                    }
                }
                _ => out(payload),
            }
            if frame.left == 0 {
                self.end_frame(out);
            }
        }
        Ok(counted)
    }

    /// Reads a frame's header from the start of `bytes`; the bytes after it.
    fn read_header<'a>(&mut self, bytes: &'a [u8], counted: &mut Counted, out: &mut impl FnMut(&[u8])) -> &'a [u8] {
        let Some((&byte, rest)) = bytes.split_first() else { return bytes };
        if let Some(slot) = self.header.get_mut(self.have) {
            *slot = byte;
        }
        self.have += 1;
        let [first, second, h2, h3, h4, h5, h6, h7, h8, h9, ..] = self.header;
        let (length_bytes, length) = match second & 0x7f {
            126 => (2, u64::from(u16::from_be_bytes([h2, h3]))),
            127 => (8, u64::from_be_bytes([h2, h3, h4, h5, h6, h7, h8, h9])),
            short => (0, u64::from(short)),
        };
        let masked = second & 0x80 != 0;
        let size = 2 + length_bytes + if masked { 4 } else { 0 };
        if self.have < 2 || self.have < size {
            return rest;
        }
        self.have = 0;
        let header = self.header.get(..size).unwrap_or_default();
        let mask = masked.then(|| header.last_chunk::<4>().copied()).flatten();
        let (last, opcode) = (first & 0x80 != 0, first & 0x0f);
        counted.frames += 1;
        counted.messages += u32::from(opcode != 0);
        let mut frame = Frame { left: length, mask, at: 0, last, kind: Kind::Control };
        match (opcode, self.limit) {
            (8.., _) | (_, None) => out(header),
            (_, Some(limit)) => {
                if opcode != 0 {
                    self.message = Some(Message { json: Json::of(opcode), ..Message::default() });
                }
                let message = self.message.get_or_insert_default();
                let left = limit.saturating_sub(message.length);
                match message.state {
                    State::Whole if length <= left => {
                        message.length += length;
                        frame.kind = Kind::Data { room: length };
                        out(header);
                    }
                    State::Whole => {
                        message.length = limit;
                        message.state = State::Closing(Vec::new());
                        frame.kind = Kind::Data { room: left };
                        // The part that fits becomes a frame of its own, which does not end the message.
                        if left > 0 || opcode != 0 {
                            write_header(opcode, false, mask, left, out);
                        }
                    }
                    State::Closing(_) | State::Closed => frame.kind = Kind::Data { room: 0 },
                }
            }
        }
        let empty = frame.left == 0;
        self.frame = Some(frame);
        if empty {
            self.end_frame(out);
        }
        rest
    }

    fn end_frame(&mut self, out: &mut impl FnMut(&[u8])) {
        let Some(frame) = self.frame.take() else { return };
        if !frame.last || frame.kind == Kind::Control {
            return;
        }
        if let Some(Message { state: State::Closing(tail), .. }) = self.message.take() {
            // It ends before a place to cut it was found, so it is whole.
            write_header(0, true, Some([0; 4]), tail.len() as u64, out);
            out(&tail);
        }
    }
}

impl Frame {
    fn unmasked(&mut self, payload: &[u8], mut each: impl FnMut(u8)) {
        let mask = self.mask.unwrap_or_default();
        for byte in payload {
            let key = mask.get((self.at % 4) as usize).copied().unwrap_or_default();
            each(byte ^ key);
            self.at += 1;
        }
    }
}

impl Message {
    /// A byte after the limit.
    fn read_beyond(&mut self, byte: u8, out: &mut impl FnMut(&[u8])) -> Result<(), TooLong> {
        let State::Closing(tail) = &mut self.state else { return Ok(()) };
        if let Some(closing) = self.json.closing() {
            write_header(0, true, Some([0; 4]), (tail.len() + closing.len()) as u64, out);
            out(tail);
            out(&closing);
            self.state = State::Closed;
            return Ok(());
        }
        if tail.len() >= SEARCH_BYTES || self.json.lost {
            return Err(TooLong);
        }
        tail.push(byte);
        self.json.read(byte);
        Ok(())
    }
}

fn write_header(opcode: u8, last: bool, mask: Option<[u8; 4]>, length: u64, out: &mut impl FnMut(&[u8])) {
    let first = opcode | if last { 0x80 } else { 0 };
    let bit = if mask.is_some() { 0x80 } else { 0 };
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ 0..=125), _) => out(&[first, bit | short]),
        (_, Ok(medium)) => {
            out(&[first, bit | 126]);
            out(&medium.to_be_bytes());
        }
        _ => {
            out(&[first, bit | 127]);
            out(&length.to_be_bytes());
        }
    }
    if let Some(mask) = mask {
        out(&mask);
    }
}

/// Where a JSON text stands, as far as is needed to end it early. What stands before it (the type of a Socket.IO packet and its
/// number) is passed over.
#[derive(Debug, Default)]
struct Json {
    /// The open brackets, the innermost last: true for an object.
    open: Vec<bool>,
    in_string: bool,
    /// Whether the next string is the name of a member.
    name_next: bool,
    /// Whether the string is one.
    in_name: bool,
    /// Characters of an escape that are to come.
    escape: Escape,
    /// Half of a character that is written as two escapes.
    half: bool,
    /// Bytes of a character that are to come.
    character: u8,
    /// It is no text, or too deep: it cannot be ended early.
    lost: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// After the backslash.
    Begun,
    /// After `\u`: how many digits are to come, and what those so far say.
    Code(u8, u16),
}

impl Json {
    /// The deepest nesting that is followed.
    const DEPTH: usize = 64;

    fn of(opcode: u8) -> Self {
        Self { lost: opcode != 1, ..Self::default() }
    }

    fn read(&mut self, byte: u8) {
        if self.lost {
            return;
        }
        if self.in_string {
            return self.read_in_string(byte);
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.in_name = self.name_next;
            }
            b'{' | b'[' => {
                self.lost = self.open.len() >= Self::DEPTH;
                self.open.push(byte == b'{');
                self.name_next = byte == b'{';
            }
            b'}' | b']' => {
                self.open.pop();
                self.name_next = false;
            }
            b',' => self.name_next = self.open.last().copied().unwrap_or(false),
            b':' => self.name_next = false,
            _ => {}
        }
    }

    fn read_in_string(&mut self, byte: u8) {
        match self.escape {
            Escape::Begun if byte == b'u' => self.escape = Escape::Code(4, 0),
            Escape::Begun => {
                self.escape = Escape::None;
                self.half = false;
            }
            Escape::Code(left, code) => {
                let digit = char::from(byte).to_digit(16).and_then(|digit| u16::try_from(digit).ok()).unwrap_or(0);
                let code = code << 4 | digit;
                self.escape = if left > 1 { Escape::Code(left - 1, code) } else { Escape::None };
                if left == 1 {
                    self.half = (0xd800..0xdc00).contains(&code);
                }
            }
            Escape::None => match byte {
                b'"' => self.in_string = false,
                b'\\' => self.escape = Escape::Begun,
                0x80..0xc0 => self.character = self.character.saturating_sub(1),
                0xc0..0xe0 => self.character = 1,
                0xe0..0xf0 => self.character = 2,
                0xf0.. => self.character = 3,
                _ => {
                    self.character = 0;
                    self.half = false;
                }
            },
        }
    }

    /// What ends the text here; none where it cannot end.
    fn closing(&self) -> Option<Vec<u8>> {
        let between = self.escape == Escape::None && !self.half && self.character == 0;
        if !self.in_string || self.in_name || self.lost || !between {
            return None;
        }
        let brackets = self.open.iter().rev().map(|object| if *object { b'}' } else { b']' });
        Some(SHORTENED.bytes().chain([b'"']).chain(brackets).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use tokio_tungstenite::tungstenite::protocol::{Message as WebSocketMessage, Role, WebSocket};

    use super::*;

    fn frame(opcode: u8, last: bool, payload: &[u8]) -> Vec<u8> {
        let mask = [7, 0, 200, 99];
        let mut bytes = Vec::new();
        write_header(opcode, last, Some(mask), payload.len() as u64, &mut |piece| bytes.extend_from_slice(piece));
        bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    /// A message in frames of `size` bytes, with a ping after each.
    fn message(text: &str, size: usize) -> Vec<u8> {
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
        let mut bytes = Vec::new();
        for (at, piece) in pieces.iter().enumerate() {
            bytes.extend(frame(u8::from(at == 0), at + 1 == pieces.len(), piece));
            bytes.extend(frame(9, true, b"x"));
        }
        bytes
    }

    fn pass(frames: &mut Frames, bytes: &[u8], cut: usize) -> Result<(Vec<u8>, Counted), TooLong> {
        let (mut passed, mut sum) = (Vec::new(), Counted::default());
        for piece in bytes.chunks(cut) {
            let counted = frames.pass(piece, &mut |bytes| passed.extend_from_slice(bytes))?;
            sum = Counted { messages: sum.messages + counted.messages, frames: sum.frames + counted.frames };
        }
        Ok((passed, sum))
    }

    /// The texts in these bytes, as the WebSocket library reads them.
    fn texts(bytes: Vec<u8>) -> Vec<String> {
        struct Bytes(std::io::Cursor<Vec<u8>>);
        impl std::io::Read for Bytes {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                self.0.read(buffer)
            }
        }
        impl std::io::Write for Bytes {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut socket = WebSocket::from_raw_socket(Bytes(std::io::Cursor::new(bytes)), Role::Server, None);
        let mut texts = Vec::new();
        while let Ok(message) = socket.read() {
            if let WebSocketMessage::Text(text) = message {
                texts.push(text.to_string());
            }
        }
        texts
    }

    #[test]
    fn messages_are_counted_however_they_are_split_and_cut() {
        let mut bytes = message(&"x".repeat(70_000), 4_096);
        for length in [0, 1, 125, 126, 65_535, 65_536] {
            bytes.extend(frame(1, true, &vec![b'x'; length]));
        }
        bytes.extend(frame(8, true, b""));
        // A message of 18 frames with a ping after each, six of one frame, and the close.
        let expected = Counted { messages: 1 + 18 + 6 + 1, frames: 18 + 18 + 6 + 1 };
        for limit in [None, Some(1 << 20)] {
            for cut in [1, 3, 7, 4_096, bytes.len()] {
                let (passed, counted) = pass(&mut Frames::new(limit), &bytes, cut).unwrap();
                assert_eq!(counted, expected, "pieces of {cut}");
                assert!(passed == bytes, "what is short enough is passed on as it is");
            }
        }
    }

    #[test]
    fn a_report_that_is_too_long_is_shortened_and_stays_a_report() {
        let next = json!(["after", {"job_id": 8}]);
        for output in ["plain ".repeat(400), "ä€😀".repeat(200), "\\\"\n\u{1}".repeat(300), "\u{1f600}".repeat(250)] {
            for ascii in [false, true] {
                let report = json!(["quick_job_result", {"context": {"a": [1, "x"]}, "job_id": 7, "status": "Success", "stderr": "e", "stdout": output}]);
                let mut text = report.to_string();
                if ascii {
                    text = text.chars().fold(String::new(), |mut text, c| {
                        if c.is_ascii() {
                            text.push(c);
                        } else {
                            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| text.push_str(&format!("\\u{unit:04x}")));
                        }
                        text
                    });
                }
                let text = format!("42{text}");
                let bytes: Vec<u8> = [message(&text, 64), message(&format!("42{next}"), 64)].concat();
                for limit in 300..340 {
                    let (passed, _) = pass(&mut Frames::new(Some(limit)), &bytes, 50).unwrap();
                    let texts = texts(passed);
                    let [short, after] = texts.as_slice() else { panic!("two messages: {texts:?}") };
                    assert!(short.len() < 300 + 1024 && short.len() < text.len(), "{}", short.len());
                    let short: Value = serde_json::from_str(&short[2..]).unwrap_or_else(|error| panic!("{error}: {short}"));
                    assert_eq!((&short[1]["job_id"], &short[1]["status"]), (&json!(7), &json!("Success")));
                    let kept = short[1]["stdout"].as_str().unwrap();
                    let kept = kept.strip_suffix("\n[The report was too long; the rest was left out.]\n").expect("the mark");
                    assert!(output.starts_with(kept));
                    assert_eq!(*after, format!("42{next}"));
                }
                // In one frame.
                let (passed, _) = pass(&mut Frames::new(Some(300)), &message(&text, usize::MAX), 17).unwrap();
                let short: Value = serde_json::from_str(&texts(passed)[0][2..]).unwrap();
                assert_eq!(short[1]["job_id"], 7);
            }
        }
    }

    #[test]
    fn a_message_just_over_the_limit_is_whole() {
        let text = format!("42{}", json!(["e", {"a": "x".repeat(100), "b": {"c": [1, 2]}}]));
        for limit in text.len() - 18..=text.len() {
            let (passed, _) = pass(&mut Frames::new(Some(limit as u64)), &message(&text, 16), 5).unwrap();
            assert_eq!(texts(passed), std::slice::from_ref(&text), "{limit}");
        }
    }

    #[test]
    fn what_cannot_be_shortened_ends_the_stream() {
        let numbers = format!("42{}", json!(["e", vec![1_000; 500]]));
        let name = format!("42{{\"{}\":1}}", "n".repeat(1_000));
        let deep = format!("{}\"{}", "[".repeat(70), "x".repeat(1_000));
        for text in [numbers, name, deep] {
            assert_eq!(pass(&mut Frames::new(Some(200)), &message(&text, 64), 64).unwrap_err(), TooLong, "{text}");
        }
        let binary = frame(2, true, &[b'"'; 1_000]);
        assert_eq!(pass(&mut Frames::new(Some(200)), &binary, 64).unwrap_err(), TooLong);
    }

    #[test]
    fn no_bytes_break_it() {
        for seed in 0..2_000_u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let bytes: Vec<u8> = (0..200)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    [0x81, 0x01, 0x80, 0x00, 0x89, 0x84, 0xfe, 0xff, b'"', b'{', b'\\', state as u8][(state >> 32) as usize % 12]
                })
                .collect();
            let whole = pass(&mut Frames::new(Some(40)), &bytes, bytes.len());
            let pieces = pass(&mut Frames::new(Some(40)), &bytes, 3);
            assert_eq!(whole.is_ok(), pieces.is_ok());
            if let (Ok(whole), Ok(pieces)) = (whole, pieces) {
                assert_eq!(whole, pieces);
            }
        }
    }
}
