//! Distinguished names, compared as RFC 4514 writes them and as directory servers match them: parsed, with escapes
//! resolved, types by their short name, values without case and without insignificant spaces.

/// One `type=value` of a relative distinguished name, in normal form.
type Pair = (String, String);

/// Short names of attribute types that are also written by object identifier or long name.
const TYPES: [(&str, &str, &str); 9] = [
    ("2.5.4.3", "commonname", "cn"),
    ("2.5.4.6", "countryname", "c"),
    ("2.5.4.7", "localityname", "l"),
    ("2.5.4.8", "stateorprovincename", "st"),
    ("2.5.4.9", "streetaddress", "street"),
    ("2.5.4.10", "organizationname", "o"),
    ("2.5.4.11", "organizationalunitname", "ou"),
    ("0.9.2342.19200300.100.1.25", "domaincomponent", "dc"),
    ("0.9.2342.19200300.100.1.1", "userid", "uid"),
];

/// Whether this is a distinguished name of at least one part.
#[must_use]
pub fn is_valid(text: &str) -> bool {
    parse(text).is_some_and(|parts| !parts.is_empty())
}

/// A form that is the same for two names that mean the same entry. What is no distinguished name is compared as text,
/// without case.
#[must_use]
pub fn normal(text: &str) -> String {
    let Some(parts) = parse(text) else { return text.trim().to_lowercase() };
    let part = |pairs: &Vec<Pair>| {
        let pairs: Vec<String> = pairs.iter().map(|(kind, value)| format!("{kind}={}", escape(value))).collect();
        pairs.join("+")
    };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

/// The relative distinguished names, from the entry's own up; none when the text is not a distinguished name.
fn parse(text: &str) -> Option<Vec<Vec<Pair>>> {
    let mut rest = text.trim();
    let mut parts = Vec::new();
    if rest.is_empty() {
        return Some(parts);
    }
    let mut pairs = Vec::new();
    loop {
        let (kind, after) = rest.split_once('=')?;
        let (value, after) = value(after)?;
        pairs.push((attribute_type(kind)?, matched(&value)));
        let mut chars = after.chars();
        let separator = chars.next();
        if separator != Some('+') {
            // The order of the pairs of one part means nothing.
            pairs.sort();
            parts.push(std::mem::take(&mut pairs));
        }
        match separator {
            None => return Some(parts),
            Some(_) => rest = chars.as_str(),
        }
    }
}

fn attribute_type(text: &str) -> Option<String> {
    let name = text.trim().to_ascii_lowercase();
    let name = name.strip_prefix("oid.").unwrap_or(&name);
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || !name.chars().all(fits) {
        return None;
    }
    let short = TYPES.iter().find(|(oid, long, _)| name == *oid || name == *long);
    Some(short.map_or(name, |(_, _, short)| short).to_owned())
}

/// The value at the start of the text, with escapes resolved, and what follows it: nothing, or a separator and more.
fn value(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start_matches(' ');
    if let Some(quoted) = text.strip_prefix('"') {
        let (bytes, rest) = characters(quoted, |c| c == '"')?;
        let rest = rest.strip_prefix('"')?.trim_start_matches(' ');
        let ended = rest.is_empty() || rest.starts_with([',', ';', '+']);
        return ended.then_some(()).and(String::from_utf8(bytes).ok()).map(|value| (value, rest));
    }
    let (bytes, rest) = characters(text, |c| matches!(c, ',' | ';' | '+'))?;
    if text.starts_with('#') {
        return Some((encoded(&bytes)?, rest));
    }
    Some((String::from_utf8(bytes).ok()?, rest))
}

/// The bytes up to an unescaped character that ends them, without unescaped spaces at their end.
fn characters(text: &str, ends: impl Fn(char) -> bool) -> Option<(Vec<u8>, &str)> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut kept = 0;
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if ends(c) {
            break;
        }
        rest = rest.get(c.len_utf8()..)?;
        if c == '\\' {
            if let Some(byte) = rest.get(..2).and_then(|pair| hex::decode(pair).ok()) {
                bytes.extend(byte);
                rest = rest.get(2..)?;
            } else {
                let escaped = rest.chars().next()?;
                bytes.extend(escaped.to_string().into_bytes());
                rest = rest.get(escaped.len_utf8()..)?;
            }
            kept = bytes.len();
        } else {
            bytes.extend(c.to_string().into_bytes());
            if c != ' ' {
                kept = bytes.len();
            }
        }
    }
    bytes.truncate(kept);
    Some((bytes, rest))
}

/// The text of a value that is written as `#` and the hexadecimal digits of its BER encoding; another kind than text stays
/// as it is written.
fn encoded(text: &[u8]) -> Option<String> {
    let digits = text.get(1..)?;
    let bytes = hex::decode(digits).ok()?;
    let as_text = match bytes.split_first_chunk::<2>() {
        // Octet, UTF-8, printable and IA5 strings with a length of one byte.
        Some(([0x04 | 0x0c | 0x13 | 0x16, length], content)) if usize::from(*length) == content.len() && *length < 0x80 => {
            String::from_utf8(content.to_vec()).ok()
        }
        _ => None,
    };
    as_text.or_else(|| String::from_utf8(text.to_ascii_lowercase()).ok())
}

/// A value as servers match it: without case, and with one space where there are several.
fn matched(value: &str) -> String {
    value.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn escape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for (at, c) in value.char_indices() {
        if matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';' | '=') || (at == 0 && c == '#') {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_one_entry_are_the_same() {
        for (one, other) in [
            ("CN=Ops, OU=Groups ,DC=ad,DC=test", "cn=ops,ou=groups,dc=ad,dc=test"),
            ("cn = ops,dc=x", "CN=ops,dc=x"),
            ("cn=a b,dc=x", "cn=A   B,dc=x"),
            // As an administrator writes it, and as slapd answers it.
            ("cn=Ops\\, Berlin (EU),ou=groups,dc=x", "cn=ops\\2C Berlin (EU),ou=groups,dc=x"),
            ("cn=\"Ops, Berlin\",dc=x", "cn=Ops\\, Berlin,dc=x"),
            ("cn=K\\C3\\B6ln,dc=x", "CN=KÖLN,DC=X"),
            ("2.5.4.3=ops,0.9.2342.19200300.100.1.25=x", "commonName=Ops,dc=x"),
            ("OID.2.5.4.11=it,dc=x", "ou=IT,dc=x"),
            ("cn=ops+uid=7,dc=x", "UID=7 + CN=Ops,dc=x"),
            ("cn=#0C036F7073,dc=x", "cn=ops,dc=x"),
            ("cn=a\\+b\\=c,dc=x", "cn=a\\2bb\\3Dc,dc=x"),
            ("cn=ops;dc=x", "cn=ops,dc=x"),
            // Spaces at the ends are insignificant in matching, escaped or not.
            ("cn=a\\ ,dc=x", "cn=a,dc=x"),
        ] {
            assert_eq!(normal(one), normal(other));
            assert!(is_valid(one) && is_valid(other), "{one}");
        }
    }

    #[test]
    fn names_that_mean_two_entries_stay_apart() {
        for (one, other) in [
            ("cn=a\\, b,dc=x", "cn=a,b=,dc=x"),
            ("cn=a\\2Cou=b,dc=x", "cn=a,ou=b,dc=x"),
            ("cn=ab,dc=x", "cn=a b,dc=x"),
            ("cn=a,dc=x", "cn=a,dc=x,dc=y"),
            ("cn=a+cn=b,dc=x", "cn=a,cn=b,dc=x"),
            ("cn=\\23616263,dc=x", "cn=#0403616263,dc=x"),
        ] {
            assert_ne!(normal(one), normal(other));
        }
    }

    #[test]
    fn what_is_no_distinguished_name_is_known() {
        for text in ["", " ", "ops", "cn=a,b", "cn=a,", "=a", "c n=a", "cn=a\\", "cn=\"a,dc=x", "cn=\"a\"b,dc=x", "cn=#0,dc=x"] {
            assert!(!is_valid(text), "{text}");
        }
        assert_eq!(normal(" Ops "), "ops");
    }

    #[test]
    fn the_normal_form_is_its_own() {
        for text in ["CN=Ops\\, Berlin (EU)+ou=\\#x, DC=X", "cn=a\\\\b,dc=x", "cn=\\22\\3c\\3e,dc=x", "cn=#0201ff,dc=x"] {
            let once = normal(text);
            assert_eq!(normal(&once), once);
        }
    }
}
