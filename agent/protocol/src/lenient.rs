//! Reads of JSON values that some agents write in other forms than ours: what does not fit reads as if it were not there.

use serde::{Deserialize as _, Deserializer};
use serde_json::Value;

/// A boolean; everything else reads as false.
pub(crate) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Value::deserialize(deserializer)? == Value::Bool(true))
}

/// A text, or a number as text; everything else reads as empty.
pub(crate) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => text,
        Value::Number(number) => number.to_string(),
        _ => String::new(),
    })
}

/// A number, also one with a fraction or in a text; everything else reads as 0.
pub(crate) fn integer<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    #[expect(clippy::cast_possible_truncation, reason = "a number beyond the range becomes the end of it")]
    let whole = |number: f64| number as i64;
    Ok(value.as_i64().or_else(|| number_of(&value).map(whole)).unwrap_or(0))
}

/// As [`integer`], with its fraction.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(number_of(&Value::deserialize(deserializer)?).unwrap_or(0.0))
}

fn number_of(value: &Value) -> Option<f64> {
    let number = match value {
        Value::String(text) => text.trim().parse().ok()?,
        other => other.as_f64()?,
    };
    number.is_finite().then_some(number)
}
