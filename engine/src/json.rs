//! What a JSON text may make of itself in memory. A tree is many times the size of its text: `{"":0}` are six bytes, and its
//! tree takes more than six hundred. So the text is scanned before a tree is built of it, in one pass and without memory.

use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// How deep arrays and objects may be nested, wherever it is not said otherwise.
pub const DEPTH: usize = 64;
/// The most memory that a tree takes for each of the [`Size::values`] of its text, in bytes, beside its texts: the worst is an
/// object with one member, which is counted as three.
pub const BYTES_PER_VALUE: usize = 256;

/// The most a text may have of what costs memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How deep arrays and objects may be nested.
    pub depth: usize,
    /// How many values there may be, counted as in [`Size::values`].
    pub values: usize,
}

impl Limits {
    /// At most this many values, nested at most [`DEPTH`] deep.
    #[must_use]
    pub const fn values(values: usize) -> Self {
        Self { depth: DEPTH, values }
    }
}

/// What a text consists of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// How deep arrays and objects are nested.
    pub depth: usize,
    /// How many arrays, objects, members and elements there are.
    pub values: usize,
}

impl Size {
    /// The most memory a tree of it takes, in bytes, beside the text itself.
    #[must_use]
    pub const fn tree_bytes(&self) -> usize {
        self.values.saturating_mul(BYTES_PER_VALUE)
    }
}

/// Counts what is in `text`, whether or not it is JSON. Stops where a limit is exceeded.
///
/// # Errors
/// 400 `invalid_json`, with the limit.
pub fn measure(text: &[u8], limits: Limits) -> Result<Size> {
    let too_much = |what: String| Err(Error::invalid("invalid_json", format!("The JSON {what}.")));
    let (mut size, mut depth) = (Size::default(), 0_usize);
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => {
                // To the end of the string; an escaped byte is no end.
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => {
                            bytes.next();
                        }
                        _ => {}
                    }
                }
                continue;
            }
            b'[' | b'{' => {
                depth += 1;
                size.depth = size.depth.max(depth);
                if depth > limits.depth {
                    return too_much(format!("is nested more than {} levels deep", limits.depth));
                }
            }
            b']' | b'}' => {
                depth = depth.saturating_sub(1);
                continue;
            }
            b',' | b':' => {}
            _ => continue,
        }
        size.values += 1;
        if size.values > limits.values {
            return too_much(format!("has more than {} values", limits.values));
        }
    }
    Ok(size)
}

/// Reads a text that is within `limits`.
///
/// # Errors
/// 400 `invalid_json`: it is beyond the limits, or not what is asked for.
pub fn from_str<T: DeserializeOwned>(text: &str, limits: Limits) -> Result<T> {
    measure(text.as_bytes(), limits)?;
    serde_json::from_str(text).map_err(|error| Error::invalid("invalid_json", format!("The JSON cannot be read: {error}.")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const FREE: Limits = Limits { depth: usize::MAX, values: usize::MAX };

    #[test]
    fn values_and_levels_are_counted_outside_of_strings() {
        for (text, depth, values) in [
            ("", 0, 0),
            ("1", 0, 0),
            ("[]", 1, 1),
            ("[1,2,3]", 1, 3),
            (r#"{"":0}"#, 1, 2),
            (r#"[{"":0},{"":0}]"#, 2, 6),
            (r#"{"a":"[{,:\"\\","b":[[]]}"#, 3, 6),
            (r#""\\",[,"#, 1, 3),
            ("]]]][", 1, 1),
        ] {
            assert_eq!(measure(text.as_bytes(), FREE).unwrap(), Size { depth, values }, "{text}");
        }
    }

    #[test]
    fn a_limit_holds_exactly() {
        let list = |n: usize| serde_json::to_string(&vec![0; n]).unwrap();
        assert!(measure(list(100).as_bytes(), Limits::values(100)).is_ok());
        assert_eq!(measure(list(101).as_bytes(), Limits::values(100)).unwrap_err().code, "invalid_json");
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(measure(nested(DEPTH).as_bytes(), Limits::values(1_000)).is_ok());
        assert!(measure(nested(DEPTH + 1).as_bytes(), Limits::values(1_000)).is_err());
        assert!(from_str::<Value>(&nested(1_000_000), FREE).is_err(), "the reader has a limit of its own");
    }

    #[test]
    fn what_is_read_is_what_is_there() {
        let value = json!({"a": [1, {"b": "\"[{"}], "c": null});
        assert_eq!(from_str::<Value>(&value.to_string(), Limits::values(20)).unwrap(), value);
        assert_eq!(from_str::<Value>("{", Limits::values(20)).unwrap_err().code, "invalid_json");
    }

    proptest::proptest! {
        /// Every value, member and element of a tree is counted, so that the count bounds the tree.
        #[test]
        fn no_tree_is_larger_than_its_count(texts in proptest::collection::vec(".{0,12}", 0..8), numbers in proptest::collection::vec(0..9, 0..8)) {
            let value = json!({"t": texts, "n": numbers, "m": texts.iter().map(|text| (text.clone(), json!([text]))).collect::<serde_json::Map<_, _>>()});
            fn count(value: &Value) -> usize {
                match value {
                    Value::Array(items) => 1 + items.iter().map(|item| 1 + count(item)).sum::<usize>() - usize::from(!items.is_empty()),
                    Value::Object(map) => 1 + map.values().map(|item| 2 + count(item)).sum::<usize>() - usize::from(!map.is_empty()),
                    _ => 0,
                }
            }
            proptest::prop_assert_eq!(measure(value.to_string().as_bytes(), FREE).unwrap().values, count(&value));
        }
    }
}
