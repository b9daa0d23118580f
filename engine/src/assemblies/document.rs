//! Script documents: how they are read, and the form in which they are stored.
//!
//! A document is an object of JSON, or text that is the script itself. Only the fields that matter are read further than their
//! ends; everything here is linear in the length of the document.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json, value::RawValue};

use super::{FILES_MAX, SCRIPT_MAX, SCRIPT_TYPES, SUMMARY_MAX, TIMEOUT_DEFAULT_S, TIMEOUT_MAX_S, VALUES_MAX};
use crate::{
    error::{Error, Result},
    jobs::spec,
    json::{self, Limits},
};

/// The keys that carry a script, in the order they count.
const BODY_KEYS: [&str; 3] = ["script_lines", "script", "content"];
/// The keys that say how it is written.
const ENCODING_KEYS: [&str; 2] = ["script_encoding", "scriptEncoding"];
/// Shorter text that could be base64 may be a command as well.
const BASE64_SURE: usize = 16;
/// The shortest line of base64 that is broken into lines.
const BASE64_LINE: usize = 60;

/// A script document, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Script {
    /// One of [`SCRIPT_TYPES`].
    pub script_type: &'static str,
    /// The body, with LF and without a byte order mark.
    pub content: String,
    /// The limit in seconds; 0: none.
    pub timeout_seconds: u32,
    /// The variables it declares.
    pub variables: Vec<Variable>,
    /// `{file_name, size, mime_type, data}` each, `data` in base64.
    pub files: Vec<Value>,
    /// What it says about itself.
    pub description: String,
}

/// A variable of a script.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    /// As the document writes it.
    pub name: String,
    /// What operators see.
    pub label: String,
    /// How its value is read.
    pub kind: VariableKind,
    /// The value without one from the operator.
    pub value: Value,
}

/// How the value of a variable is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VariableKind {
    /// As text.
    String,
    /// As a number.
    Number,
    /// As true or false.
    Boolean,
    /// As text; no secret is looked up for scripts.
    Credential,
}

impl VariableKind {
    /// The text of documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Number => "number",
            Self::Boolean => "boolean",
            Self::Credential => "credential",
        }
    }
}

fn fault(field: &str, message: &str) -> Error {
    Error::field("invalid_payload", &format!("payload{field}"), message)
}

/// An object of JSON, its fields not yet read; nulls are as if absent.
struct Fields<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Fields<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let fields: BTreeMap<String, &RawValue> = serde_json::from_str(text).ok()?;
        Some(Self(fields.into_iter().filter(|(_, value)| value.get() != "null").collect()))
    }

    fn get(&self, keys: &[&str]) -> Option<&'a str> {
        keys.iter().find_map(|key| self.0.get(*key)).map(|value| value.get())
    }

    fn text(&self, keys: &[&str]) -> Result<Option<String>> {
        let read = |raw: &str| typed(raw, '"').ok_or_else(|| fault(&format!(".{}", keys.first().unwrap_or(&"")), "must be text"));
        self.get(keys).map(read).transpose()
    }

    fn list(&self, key: &str, max: usize) -> Result<Vec<&'a RawValue>> {
        let Some(raw) = self.get(&[key]) else { return Ok(Vec::new()) };
        let list: Vec<&RawValue> = typed(raw, '[').ok_or_else(|| fault(&format!(".{key}"), "must be a list"))?;
        if list.len() > max { Err(fault(&format!(".{key}"), &format!("must be at most {max}"))) } else { Ok(list) }
    }

    /// The script as it is written.
    fn body(&self) -> Result<String> {
        if let Some(lines) = self.get(&["script_lines"]) {
            let lines: Option<Vec<String>> = typed(lines, '[');
            return Ok(lines.ok_or_else(|| fault(".script_lines", "must be a list of text"))?.join("\n"));
        }
        self.text(&["script", "content"])?.ok_or_else(|| fault(".script", "is required"))
    }

    fn encoding(&self) -> Result<Encoding> {
        match self.text(&ENCODING_KEYS)?.unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "" => Ok(Encoding::Unsaid),
            "base64" | "b64" | "base-64" => Ok(Encoding::Base64),
            "plain" | "text" | "utf-8" | "utf8" | "none" => Ok(Encoding::Plain),
            _ => Err(fault(".script_encoding", "must be base64 or plain")),
        }
    }
}

/// Reads a value whose JSON begins with `first`.
fn typed<'a, T: serde::Deserialize<'a>>(raw: &'a str, first: char) -> Option<T> {
    raw.starts_with(first).then(|| serde_json::from_str(raw).ok()).flatten()
}

fn small<T: DeserializeOwned>(raw: &str) -> Option<T> {
    serde_json::from_str(raw).ok()
}

/// How a body is said to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    /// Nothing is said: text, unless it is plainly base64.
    Unsaid,
    Plain,
    Base64,
}

/// The text of a body: decoded, and without a byte order mark, which is no part of a script.
fn decode(body: String, encoding: Encoding) -> Result<String> {
    let text = match encoding {
        Encoding::Base64 => {
            let compact: String = body.split_ascii_whitespace().collect();
            let bytes = STANDARD.decode(compact).map_err(|_| fault(".script", "is not base64"))?;
            String::from_utf8(bytes).map_err(|_| fault(".script", "is not UTF-8"))?
        }
        Encoding::Unsaid => plainly_base64(&body).unwrap_or(body),
        Encoding::Plain if body.trim().len() >= BASE64_SURE && plainly_base64(&body).is_some() => {
            return Err(fault(".script", "is base64, and script_encoding says that it is not"));
        }
        Encoding::Plain => body,
    };
    Ok(if text.starts_with('\u{feff}') { text.trim_start_matches('\u{feff}').to_owned() } else { text })
}

/// The text that `body` is the base64 of, when it cannot be meant as anything else: nothing but base64, in one line or in lines of
/// one length, of readable text. Short words count only when they decode to plain words, since `file` is base64, too.
fn plainly_base64(body: &str) -> Option<String> {
    let lines: Vec<&str> = body.split_ascii_whitespace().collect();
    let (last, rest) = lines.split_last()?;
    let width = rest.first().map_or(BASE64_LINE, |line| line.len());
    if width < BASE64_LINE || rest.iter().any(|line| line.len() != width) || (!rest.is_empty() && last.len() > width) {
        return None;
    }
    let compact = lines.concat();
    let text = String::from_utf8(STANDARD.decode(&compact).ok()?).ok()?;
    let readable = |c: char| !c.is_control() || "\n\r\t".contains(c);
    let word = |c: char| c.is_ascii_alphanumeric() || " ._/-\n\r\t".contains(c);
    let meant = match compact.len() {
        0 => false,
        1..BASE64_SURE => text.chars().all(word),
        // So much that decodes to UTF-8 is no accident, whatever control characters it has.
        length => (length >= 4 * BASE64_SURE && !text.contains('\0')) || text.chars().all(readable),
    };
    meant.then_some(text)
}

/// A document as it is stored: with the assembly's guid, its script as text without a byte order mark, and said to be so, so that a
/// client that takes every script without a hint for base64 does not garble it. A script that is said to be base64 stays so.
///
/// # Errors
/// As [`Script::parse`], of the script alone.
pub(super) fn stored(payload: &Value, guid: &str) -> Result<String> {
    match payload {
        Value::Object(document) => {
            let mut document = document.clone();
            document.insert("assembly_guid".into(), guid.into());
            let text = serde_json::to_string(&document)?;
            plain(&mut document, &text)?;
            Ok(serde_json::to_string_pretty(&document)?)
        }
        Value::String(text) => {
            let text = text.trim_start_matches('\u{feff}');
            measure(text)?;
            let document = looks_like_one(text).then(|| serde_json::from_str(text));
            let Some(Ok(Value::Object(mut document))) = document else {
                return decode(text.to_owned(), Encoding::Unsaid);
            };
            // Text is kept as it is where that does no harm.
            if plain(&mut document, text)? { Ok(serde_json::to_string_pretty(&document)?) } else { Ok(text.to_owned()) }
        }
        Value::Null => Err(Error::field("missing_payload", "payload", "is required")),
        _ => Err(Error::field("invalid_payload", "payload", "must be an object or text")),
    }
}

/// Whether text may be a document.
fn looks_like_one(text: &str) -> bool {
    text.trim_start().starts_with('{')
}

/// Text of any kind may be a script; a document that is too large to be read as one is none.
fn measure(text: &str) -> Result<()> {
    if looks_like_one(text) {
        json::measure(text.as_bytes(), Limits::values(VALUES_MAX)).map_err(|error| fault("", &error.message))?;
    }
    Ok(())
}

/// Makes the script of a document plain text; whether its words changed with that. `text` is the same document.
fn plain(document: &mut Map<String, Value>, text: &str) -> Result<bool> {
    let Some(fields) = Fields::read(text) else { return Ok(false) };
    let encoding = fields.encoding()?;
    let body = fields.body()?;
    let script = decode(body.clone(), encoding)?;
    let marked = encoding == Encoding::Base64 && has_mark(&body);
    if encoding == Encoding::Base64 && !marked {
        return Ok(false);
    }
    let changed = script != body;
    if changed {
        for key in BODY_KEYS {
            document.remove(key);
        }
        document.insert("script".into(), script.into());
    }
    if changed || encoding == Encoding::Unsaid {
        for key in ENCODING_KEYS {
            document.remove(key);
        }
        document.insert("script_encoding".into(), "plain".into());
    }
    Ok(changed)
}

/// Whether base64 begins with the three bytes of a byte order mark.
fn has_mark(base64: &str) -> bool {
    base64.trim_start().starts_with("77u/")
}

/// A stored document as clients get it: JSON, or none when it is none. One from before [`stored`] said so gets its
/// `script_encoding` here, and a script that is plainly base64 is shown as the text that is run.
#[must_use]
pub(super) fn shown(payload: &str) -> Option<Box<RawValue>> {
    let raw: Box<RawValue> = serde_json::from_str(payload).ok()?;
    let missing = |fields: &Fields<'_>| fields.get(&ENCODING_KEYS).is_none() && fields.get(&BODY_KEYS).is_some();
    if measure(payload).is_err() || !Fields::read(payload).is_some_and(|fields| missing(&fields)) {
        return Some(raw);
    }
    let Ok(mut document) = serde_json::from_str::<Map<String, Value>>(payload) else { return Some(raw) };
    if plain(&mut document, payload).is_err() {
        return Some(raw);
    }
    serde_json::value::to_raw_value(&document).ok()
}

impl Script {
    /// Reads a stored document; text that is no JSON object is the script itself. `subtype` is the type of a document that
    /// names none.
    ///
    /// # Errors
    /// 400 `unsupported_script_type`, `script_too_large`, `invalid_payload` naming the field.
    pub fn parse(payload: &str, subtype: &str) -> Result<Self> {
        let payload = payload.trim_start_matches('\u{feff}');
        measure(payload)?;
        let (fields, body) = match Fields::read(payload) {
            Some(fields) => (fields, None),
            None => (Fields(BTreeMap::new()), Some(payload.to_owned())),
        };
        let named = fields.text(&["type", "script_type"])?.filter(|kind| !kind.trim().is_empty());
        let named = named.unwrap_or_else(|| if subtype.is_empty() { "powershell".into() } else { subtype.into() });
        let named = named.trim().to_ascii_lowercase();
        let script_type = SCRIPT_TYPES.into_iter().find(|kind| *kind == named).ok_or_else(|| {
            Error::field("unsupported_script_type", "payload.type", format!("must be one of {}", SCRIPT_TYPES.join(", ")))
        })?;

        let body = match body {
            Some(body) => body,
            None => fields.body()?,
        };
        let content = decode(body, fields.encoding()?)?.replace("\r\n", "\n").replace('\r', "\n");
        if content.trim().is_empty() {
            return Err(fault(".script", "is empty"));
        }
        if content.contains('\0') {
            return Err(fault(".script", "contains a NUL character"));
        }
        if content.len() > SCRIPT_MAX {
            return Err(Error::field("script_too_large", "payload.script", format!("must be at most {SCRIPT_MAX} bytes")));
        }

        let timeout_seconds = match fields.get(&["timeout_seconds", "timeout"]) {
            None => TIMEOUT_DEFAULT_S,
            Some(raw) => small::<i64>(raw)
                .or_else(|| typed::<String>(raw, '"').and_then(|text| text.trim().parse().ok()))
                .filter(|seconds| (0..=TIMEOUT_MAX_S).contains(seconds))
                .and_then(|seconds| u32::try_from(seconds).ok())
                .ok_or_else(|| fault(".timeout_seconds", &format!("must be a whole number from 0 to {TIMEOUT_MAX_S}")))?,
        };
        let variables = fields.list("variables", spec::VARIABLES_MAX)?.into_iter().enumerate();
        let variables = variables
            .map(|(index, item)| {
                let faulty = |reason: String| fault(&format!(".variables[{index}]"), &reason);
                let fields = Fields::read(item.get()).ok_or_else(|| faulty("must be an object".into()))?;
                Variable::read(&fields).map_err(faulty)
            })
            .collect::<Result<Vec<_>>>()?;
        let files = fields.list("files", FILES_MAX)?.into_iter().filter_map(|item| file(&Fields::read(item.get())?)).collect();
        let description = fields.text(&["description", "summary"])?.unwrap_or_default().chars().take(SUMMARY_MAX).collect();
        Ok(Self { script_type, content, timeout_seconds, variables, files, description })
    }
}

/// A file of a document; none when it has no name or no data.
fn file(fields: &Fields<'_>) -> Option<Value> {
    let text = |keys: [&str; 2]| fields.get(&keys).and_then(|raw| typed::<String>(raw, '"')).map(|text| text.trim().to_owned());
    let name = text(["file_name", "name"]).filter(|name| !name.is_empty())?;
    let data: String = typed(fields.get(&["data"])?, '"')?;
    Some(json!({
        "file_name": name,
        "size": fields.get(&["size"]).and_then(small::<i64>).unwrap_or(0),
        "mime_type": text(["mime_type", "mimeType"]).unwrap_or_default(),
        "data": data,
    }))
}

impl Variable {
    fn read(fields: &Fields<'_>) -> Result<Self, String> {
        let text = |keys: &[&str]| fields.get(keys).and_then(|raw| typed::<String>(raw, '"')).map(|text| text.trim().to_owned());
        let name = text(&["name", "key"]).filter(|name| !name.is_empty()).ok_or("needs a name")?;
        let kind = match text(&["type"]).unwrap_or_default().to_ascii_lowercase().as_str() {
            "number" => VariableKind::Number,
            "boolean" => VariableKind::Boolean,
            "credential" => VariableKind::Credential,
            _ => VariableKind::String,
        };
        let value = match fields.get(&["value", "default", "defaultValue", "default_value"]) {
            None => Value::Null,
            Some(raw) if raw.starts_with(['[', '{']) => {
                return Err(format!("'{}' must be text, a number, true, false or null", spec::shortened(&name)));
            }
            Some(raw) => small(raw).ok_or("cannot be read")?,
        };
        let one = Map::from_iter([(name.clone(), value.clone())]);
        spec::check_variables(&one)?;
        literal(kind, &value).map_err(|reason| format!("'{name}' {reason}"))?;
        Ok(Self { label: text(&["label"]).unwrap_or_else(|| name.clone()), name, kind, value })
    }
}

/// The text of a value as the environment carries it, and whether it may also stand in program text as a literal.
pub(super) fn literal(kind: VariableKind, value: &Value) -> Result<(String, Option<String>), &'static str> {
    let text = match value {
        Value::Null => String::new(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match kind {
        VariableKind::Boolean => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Ok(("True".into(), Some("$true".into()))),
            "false" | "0" | "no" | "off" | "" => Ok(("False".into(), Some("$false".into()))),
            _ => Err("must be true or false"),
        },
        VariableKind::Number => match text.trim() {
            "" => Ok((String::new(), Some("0".into()))),
            number if is_number(number) => Ok((number.into(), Some(number.into()))),
            _ => Err("must be a number"),
        },
        VariableKind::String | VariableKind::Credential => Ok((text, None)),
    }
}

/// `-?digits[.digits][e[+-]digits]`: nothing else may ever stand in a script.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let text = text.strip_prefix('-').unwrap_or(text);
    let (mantissa, exponent) =
        text.split_once(['e', 'E']).map_or((text, None), |(mantissa, exponent)| (mantissa, Some(exponent)));
    let mantissa_fits = match mantissa.split_once('.') {
        None => digits(mantissa),
        Some((whole, part)) => digits(whole) && digits(part),
    };
    text.len() <= 40 && mantissa_fits && exponent.is_none_or(|e| digits(e.strip_prefix(['+', '-']).unwrap_or(e)))
}
