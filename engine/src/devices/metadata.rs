//! The numbered metadata fields of a device: 500 places for short texts that scripts on the machine set and operators read.
//!
//! An agent sends what was set with its heartbeats until it is acknowledged. On the wire a value is base64; here it is text.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::clean;
use crate::{
    db,
    error::{Error, Result},
};

/// The highest number of a field; the lowest is 1.
pub const FIELDS: i16 = 500;
/// The most characters of a value.
pub const VALUE_MAX_CHARS: usize = 1024;

const SOURCE_MAX_CHARS: usize = 64;
const ACTOR_MAX_CHARS: usize = 255;
/// How far ahead of the engine's clock an agent's may be before the time it says is not believed.
const CLOCK_AHEAD_S: i64 = 300;

/// A value as an agent sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    value: String,
    modified_at: DateTime<Utc>,
    source: String,
    actor: String,
}

/// The name of a field on the wire.
#[must_use]
pub fn key(number: i16) -> String {
    format!("field_{number:03}")
}

/// The number in a name: `field_007`, `field 7`, `7`.
#[must_use]
pub fn number(text: &str) -> Option<i16> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text.strip_prefix("field").map_or(text.as_str(), |rest| rest.trim_start_matches(['_', ' ', '-']));
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|number| (1..=FIELDS).contains(number))
}

/// The value of a text on the wire; what is not base64 of a text is the text itself.
fn decoded(text: &str) -> String {
    let bytes = STANDARD.decode(text.trim()).ok();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_else(|| text.to_owned());
    clean::text(&text, VALUE_MAX_CHARS)
}

fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.trim().parse().ok())
}

/// Reads the `metadata_fields` of a heartbeat, by number. What has no number that exists is left out.
#[must_use]
pub fn read(fields: &Map<String, Value>, now: DateTime<Utc>) -> BTreeMap<i16, Sent> {
    let mut sent = BTreeMap::new();
    for (name, value) in fields.iter().take(usize::from(FIELDS.unsigned_abs()) * 2) {
        let empty = Map::new();
        let record = value.as_object().unwrap_or(&empty);
        let first = |names: &[&str]| names.iter().find_map(|name| record.get(*name).filter(|value| !value.is_null()));
        let stated = ["field_number", "fieldNumber", "number", "field_key", "fieldKey"];
        let number = number(name).or_else(|| match first(&stated)? {
            Value::String(text) => self::number(text),
            other => i16::try_from(other.as_i64()?).ok().filter(|number| (1..=FIELDS).contains(number)),
        });
        let Some(number) = number else { continue };
        let text = match if value.is_object() { record.get("value").unwrap_or(&Value::Null) } else { value } {
            Value::Null => String::new(),
            Value::String(text) => decoded(text),
            other => clean::text(&other.to_string(), VALUE_MAX_CHARS),
        };
        let modified_at = first(&["modified_at", "modifiedAt", "modified"])
            .and_then(integer)
            .filter(|at| *at > 0)
            .and_then(|at| DateTime::from_timestamp(at, 0))
            .filter(|at| *at <= now + TimeDelta::seconds(CLOCK_AHEAD_S))
            .unwrap_or(now);
        let line =
            |names: &[&str], max| first(names).and_then(Value::as_str).map(|text| clean::line(text, max)).unwrap_or_default();
        let source = Some(line(&["source"], SOURCE_MAX_CHARS)).filter(|source| !source.is_empty());
        sent.insert(
            number,
            Sent {
                value: text,
                modified_at,
                source: source.unwrap_or_else(|| "agent".to_owned()),
                actor: line(&["actor", "modified_by", "modifiedBy"], ACTOR_MAX_CHARS),
            },
        );
    }
    sent
}

/// Stores what is newer than what is there; the names of the fields that the agent need not send again, in order: all of them.
///
/// # Errors
/// When the database is away.
pub async fn store(conn: &mut sqlx::PgConnection, device: Uuid, sent: &BTreeMap<i16, Sent>) -> Result<Vec<String>> {
    if sent.is_empty() {
        return Ok(Vec::new());
    }
    let numbers: Vec<i16> = sent.keys().copied().collect();
    let values: Vec<String> = sent.values().map(|one| one.value.clone()).collect();
    let times: Vec<DateTime<Utc>> = sent.values().map(|one| one.modified_at).collect();
    let sources: Vec<String> = sent.values().map(|one| one.source.clone()).collect();
    let actors: Vec<String> = sent.values().map(|one| one.actor.clone()).collect();
    sqlx::query!(
        "INSERT INTO device_metadata_fields AS f (device_guid, field_number, value, modified_at, source, actor)
         SELECT $1, n.number, n.value, n.modified_at, n.source, n.actor
         FROM unnest($2::smallint[], $3::text[], $4::timestamptz[], $5::text[], $6::text[])
              AS n (number, value, modified_at, source, actor)
         ON CONFLICT (device_guid, field_number) DO UPDATE SET value = excluded.value, modified_at = excluded.modified_at,
             source = excluded.source, actor = excluded.actor, updated_at = now()
         WHERE f.modified_at < excluded.modified_at",
        device,
        &numbers,
        &values,
        &times,
        &sources,
        &actors,
    )
    .execute(conn)
    .await?;
    Ok(numbers.into_iter().map(key).collect())
}

/// A field of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Its number.
    pub field_number: i16,
    /// Its name on the wire.
    pub field_key: String,
    /// Its name for people.
    pub label: String,
    /// What was set; empty when nothing was, and when it was cleared.
    pub value: String,
    /// When, in epoch seconds; 0 when nothing was.
    pub modified_at: i64,
    /// By what.
    pub source: String,
    /// By whom.
    pub actor: String,
    /// Whether there is a value.
    pub has_value: bool,
}

/// One field of a device, set or not.
///
/// # Errors
/// 400 `invalid_field` when there is no such field.
pub async fn field(pool: &db::Pool, device: Uuid, number: &str) -> Result<Field> {
    let number = number
        .parse()
        .ok()
        .filter(|number| (1..=FIELDS).contains(number))
        .ok_or_else(|| Error::invalid("invalid_field", format!("The number of a field is 1 to {FIELDS}.")))?;
    let row = sqlx::query!(
        "SELECT value, modified_at, source, actor FROM device_metadata_fields WHERE device_guid = $1 AND field_number = $2",
        device,
        number,
    )
    .fetch_optional(pool)
    .await?;
    let unset = Field {
        field_number: number,
        field_key: key(number),
        label: format!("Field {number:03}"),
        value: String::new(),
        modified_at: 0,
        source: String::new(),
        actor: String::new(),
        has_value: false,
    };
    Ok(match row {
        None => unset,
        Some(row) => Field {
            has_value: !row.value.is_empty(),
            value: row.value,
            modified_at: row.modified_at.timestamp(),
            source: row.source,
            actor: row.actor,
            ..unset
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_are_read_in_every_spelling_and_bounded() {
        let now = DateTime::from_timestamp(2_000_000_000, 0).unwrap();
        let long = STANDARD.encode("é".repeat(2_000));
        let fields = json!({
            "field_007": {"value": STANDARD.encode("seven"), "modified_at": 1_999_999_000, "source": "cli", "actor": "root"},
            "Field 8": "cGxhaW4=", "9": "not base64!", "field_010": {"value": null}, "x": {"value": "", "fieldNumber": 11},
            "y": {"value": long, "field_key": "field_500", "modified_at": "2000000301"},
            "field_012": {"value": "AA==", "modified_at": -4}, "field_013": 5,
            "field_000": "a", "field_501": "a", "field_": "a", "field_1e1": "a", "z": {"number": 70_000}, "w": 4,
        });
        let read = read(fields.as_object().unwrap(), now);
        let numbers: Vec<i16> = read.keys().copied().collect();
        assert_eq!(numbers, [7, 8, 9, 10, 11, 12, 13, 500]);
        let value = |number: i16| read[&number].value.as_str();
        assert_eq!(
            (value(7), value(8), value(9), value(10), value(12), value(13)),
            ("seven", "plain", "not base64!", "", "", "5")
        );
        assert_eq!(read[&7].modified_at.timestamp(), 1_999_999_000);
        assert_eq!((read[&7].source.as_str(), read[&7].actor.as_str(), read[&8].source.as_str()), ("cli", "root", "agent"));
        assert_eq!(value(500).chars().count(), VALUE_MAX_CHARS);
        // A clock far ahead would win over every later value.
        assert_eq!((read[&500].modified_at, read[&12].modified_at), (now, now));
    }
}
