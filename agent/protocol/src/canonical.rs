//! Canonical JSON: the one byte form of a value that both sides hash and sign.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Compact JSON with object keys in byte order at every depth, whatever order the value keeps them in.
#[must_use]
pub fn to_bytes(value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    write(value, &mut out);
    out
}

/// Lower-case hex SHA-256 of `bytes`.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn write(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Array(items) => {
            out.push(b'[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write(item, out);
            }
            out.push(b']');
        }
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
            out.push(b'{');
            for (at, (key, item)) in entries.into_iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                out.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
                out.push(b':');
                write(item, out);
            }
            out.push(b'}');
        }
        scalar => out.extend_from_slice(scalar.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_are_sorted_at_every_depth() {
        let value = json!({"b": [{"z": 1, "a": "ü\"\n"}], "B": null, "a": 1.5});
        assert_eq!(String::from_utf8(to_bytes(&value)).unwrap(), r#"{"B":null,"a":1.5,"b":[{"a":"ü\"\n","z":1}]}"#);
    }

    #[test]
    fn the_form_survives_the_wire() {
        let value = json!({"n": [0.1, 1e300, 5e-324, -0.0, u64::MAX, i64::MIN, 123_456_789.123_456_78]});
        let back: Value = serde_json::from_str(&value.to_string()).unwrap();
        assert_eq!(to_bytes(&value), to_bytes(&back));
    }
}
