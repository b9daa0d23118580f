//! Names that people give and read: of sites, users, devices, credentials, jobs. One parser refuses what a name cannot be, and one
//! rule says when two names are the same.
//!
//! Names are compared by their key: the text in NFC with Unicode simple case folding. A key is computed here and stored beside its
//! name, in a column `<name>_key` with collation "C", so that a comparison does not depend on the locale of the database. `I` and `i` are
//! the same in every language; `İ` and `ı` are letters of their own.

pub mod backfill;

use icu_casemap::CaseMapper;
use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{DefaultIgnorableCodePoint, GeneralCategory},
};
use unicode_normalization::UnicodeNormalization;

use crate::error::{Error, Result};

/// The first character of an [`exact_key`]; no name has it.
const EXACT: char = '\u{1f}';
/// Characters beside letters, digits and their marks that a name in a path may have.
const IN_PATHS: &str = " .-_@+'$~()";

/// By what two names are compared. Names with the same key are the same name.
#[must_use]
pub fn key(name: &str) -> String {
    let cases = CaseMapper::new();
    // A control character is in no name; it must not make a text look like an exact key, and Postgres stores no NUL.
    let fold = |c: char| if c.is_control() { '\u{fffd}' } else { cases.simple_fold(c) };
    name.nfc().map(fold).nfc().collect()
}

/// The key of a name of which another row has the [`key`], and of rows that have not got theirs yet: it is the name only where
/// it is spelled exactly so.
#[must_use]
pub fn exact_key(name: &str) -> String {
    std::iter::once(EXACT).chain(name.chars().filter(|c| !c.is_control())).collect()
}

/// The keys under which a name is looked for where names are unique. The exact one sorts first and wins.
#[must_use]
pub fn lookup_keys(name: &str) -> Vec<String> {
    vec![exact_key(name), key(name)]
}

/// A name with its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    text: String,
    key: String,
}

/// What the names of one kind of thing may be.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The field of the request, for the error.
    pub field: &'static str,
    /// The error's code.
    pub code: &'static str,
    /// The most characters.
    pub max_chars: usize,
    /// Whether the name stands in paths, such as those of usernames and hostnames.
    pub in_paths: bool,
}

impl Name {
    /// Reads a name: trimmed, and not empty.
    ///
    /// # Errors
    /// 400 with the rule's code and field.
    pub fn parse(text: &str, rule: &Rule) -> Result<Self> {
        let text = text.trim();
        match fault(text, rule) {
            Some(why) => Err(Error::field(rule.code, rule.field, why)),
            None => Ok(Self { key: key(text), text: text.to_owned() }),
        }
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// See [`key`].
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// As it was written.
    #[must_use]
    pub fn into_string(self) -> String {
        self.text
    }
}

/// Why a trimmed text cannot be a name of this kind.
fn fault(text: &str, rule: &Rule) -> Option<String> {
    if text.is_empty() || text.chars().count() > rule.max_chars {
        return Some(format!("must have 1 to {} characters.", rule.max_chars));
    }
    if let Some(hidden) = text.chars().find(|c| is_hidden(*c)) {
        return Some(format!("must not contain the invisible character U+{:04X}.", u32::from(hidden)));
    }
    if !rule.in_paths {
        return None;
    }
    if let Some(refused) = text.chars().find(|c| !fits_in_a_path(*c)) {
        return Some(format!("must not contain {refused}: only letters, digits, spaces and {} are allowed.", IN_PATHS.trim()));
    }
    // Clients resolve dot segments before they send a path, and a GUID in a path is a device.
    if text == "." || text == ".." || crate::keys::parse_guid(text).is_some() {
        return Some("must not be a dot, two dots or a GUID.".to_owned());
    }
    None
}

/// Whether people cannot see this character, or it changes the order in which they see others: controls, line breaks, marks of
/// direction, joiners, fillers, what no character is assigned to.
#[must_use]
pub fn is_hidden(c: char) -> bool {
    let hidden_category = matches!(
        CodePointMapData::<GeneralCategory>::new().get(c),
        GeneralCategory::Control
            | GeneralCategory::Format
            | GeneralCategory::LineSeparator
            | GeneralCategory::ParagraphSeparator
            | GeneralCategory::PrivateUse
            | GeneralCategory::Unassigned
    );
    // The blank Braille pattern counts as a symbol.
    hidden_category || c == '\u{2800}' || CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c)
}

/// A text of somebody else, such as a directory, without hidden characters and with at most `max_chars` characters.
#[must_use]
pub fn visible(text: &str, max_chars: usize) -> String {
    text.trim().chars().filter(|c| !is_hidden(*c)).take(max_chars).collect()
}

fn fits_in_a_path(c: char) -> bool {
    use GeneralCategory::{NonspacingMark, SpacingMark};
    let is_mark = || matches!(CodePointMapData::<GeneralCategory>::new().get(c), NonspacingMark | SpacingMark);
    c.is_alphanumeric() || IN_PATHS.contains(c) || is_mark()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LABEL: Rule = Rule { field: "name", code: "invalid_name", max_chars: 20, in_paths: false };
    const IN_PATH: Rule = Rule { in_paths: true, ..LABEL };

    #[test]
    fn case_and_form_make_no_difference() {
        for (one, other) in [
            ("HOST-I", "host-i"),
            ("MÜLLER-x", "müller-X"),
            ("KÖLN", "Ko\u{308}ln"),
            ("ΣΊΣΥΦΟΣ", "σίσυφος"),
            ("\u{212a}elvin", "kelvin"),
            ("STRAẞE", "straße"),
            ("ДОМ", "дом"),
        ] {
            assert_eq!(key(one), key(other), "{one} {other}");
        }
        for (one, other) in [("İ", "i"), ("ı", "I"), ("İ", "I"), ("ss", "ß"), ("a", "ä"), ("ﬁ", "fi")] {
            assert_ne!(key(one), key(other), "{one} {other}");
        }
    }

    #[test]
    fn every_character_has_one_key() {
        for c in '\0'..=char::MAX {
            let once = key(&c.to_string());
            assert_eq!(key(&once), once, "U+{:04X}", u32::from(c));
        }
    }

    #[test]
    fn no_text_has_the_key_of_an_exact_name() {
        assert!(!key(&exact_key("admin")).starts_with(EXACT));
        assert_eq!(exact_key("a\0b\u{1f}"), "\u{1f}ab");
        let mut keys = lookup_keys(" ");
        keys.sort();
        assert_eq!(keys, lookup_keys(" "), "the exact key sorts first");
    }

    #[test]
    fn names_cannot_hide_characters() {
        assert_eq!(Name::parse(" Köln 東京 مرحبا ", &LABEL).unwrap().as_str(), "Köln 東京 مرحبا");
        assert_eq!(Name::parse("50% / x;y", &LABEL).unwrap().key(), "50% / x;y");
        for hidden in [
            "\u{202e}",
            "\u{200b}",
            "\u{feff}",
            "\u{200f}",
            "\u{2066}",
            "\u{ad}",
            "\u{7}",
            "\u{3164}",
            "\u{fe0f}",
            "\u{e0041}",
            "\u{2028}",
        ] {
            let error = Name::parse(&format!("a{hidden}b"), &LABEL).unwrap_err();
            let code_point = format!("U+{:04X}", u32::from(hidden.chars().next().unwrap()));
            assert!(error.code == "invalid_name" && error.message.contains(&code_point), "{error:?}");
        }
        assert!(Name::parse(&"x".repeat(21), &LABEL).is_err());
        assert!(Name::parse(" ", &LABEL).is_err());
        assert_eq!(visible(" A\u{202e}da\u{200b} ", 3), "Ada");
    }

    #[test]
    fn names_in_paths_can_be_reached() {
        for good in ["web-1.example.org", "MÜLLER x", "o'brien+x@b.example", "SRV$", "PC (2)", "ni\u{303}o", "हिन्दी", "..a"]
        {
            assert_eq!(Name::parse(good, &IN_PATH).unwrap().as_str(), good);
        }
        for bad in
            ["a/b", "a\\b", "..", ".", "%41", "a%b", "x;y", "a?b", "a#b", "a,b", "a:b", "6F9619FF-8B86-D011-B42D-00C04FC964FF"]
        {
            assert!(Name::parse(bad, &IN_PATH).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_key_is_its_own_key_and_forms_agree(name in "\\PC{0,24}") {
            let once = key(&name);
            prop_assert_eq!(&key(&once), &once);
            let decomposed: String = name.nfd().collect();
            prop_assert_eq!(&key(&decomposed), &once);
            let composed: String = name.nfc().collect();
            prop_assert_eq!(&key(&composed), &once);
        }

        #[test]
        fn ascii_folds_as_ascii_and_keeps_the_dot(name in "[ -~]{0,24}") {
            prop_assert_eq!(key(&name), name.to_ascii_lowercase());
            prop_assert_eq!(key(&name.to_ascii_uppercase()), name.to_ascii_lowercase());
        }

        #[test]
        fn marks_after_letters_fold_to_one_key(letters in "[A-Za-zΑ-ωﬀ-ﬆİıſẞΐΰ\u{300}-\u{345}\u{1f80}-\u{1fff}]{0,12}") {
            let once = key(&letters);
            prop_assert_eq!(&key(&once), &once);
            let decomposed: String = letters.nfd().collect();
            prop_assert_eq!(key(&decomposed), once);
        }
    }
}
