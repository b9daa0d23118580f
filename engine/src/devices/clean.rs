//! What agents send, made fit to store: Postgres takes no NUL in texts, and one line is one line.

use serde_json::Value;

/// At most `max` characters, without NUL.
#[must_use]
pub fn text(text: &str, max: usize) -> String {
    text.chars().filter(|c| *c != '\0').take(max).collect()
}

/// At most `max` characters of one line: trimmed, without control characters.
#[must_use]
pub fn line(text: &str, max: usize) -> String {
    text.trim().chars().filter(|c| !c.is_control()).take(max).collect()
}

/// A document without NUL in any of its texts and names.
#[must_use]
pub fn json(value: Value) -> Value {
    match value {
        Value::String(text) if text.contains('\0') => Value::String(text.replace('\0', "")),
        Value::Array(items) => items.into_iter().map(json).collect(),
        Value::Object(map) => map.into_iter().map(|(name, value)| (name.replace('\0', ""), json(value))).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_postgres_refuses_is_left() {
        assert_eq!(text("a\0b\nc", 3), "ab\n");
        assert_eq!(line("  a\tb\u{1b}[31m\0c ", 99), "ab[31mc");
        assert_eq!(
            json(serde_json::json!({"a\0": ["x\0y", {"k": "\0"}], "n": 1})),
            serde_json::json!({"a": ["xy", {"k": ""}], "n": 1})
        );
    }
}
