//! Output of a script: kept up to a limit, handed out in pieces while it grows.

use borealis_protocol::events::OUTPUT_CAP_BYTES;

/// Ends output that was cut.
const MARKER: &str = "\n[output truncated]\n";

/// One stream as far as it is kept.
#[derive(Debug, Default)]
pub(super) struct Captured {
    bytes: Vec<u8>,
    /// How much of `bytes` was handed out by [`Self::piece`].
    handed_out: usize,
    truncated: bool,
}

impl Captured {
    /// Adds what fits.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = OUTPUT_CAP_BYTES.saturating_sub(self.bytes.len());
        let kept = bytes.get(..room).unwrap_or(bytes);
        self.bytes.extend_from_slice(kept);
        self.truncated |= kept.len() < bytes.len();
    }

    /// The next piece that was not handed out yet, at most `cap` bytes of text; empty when there is none. A character that is
    /// not complete yet waits for its rest.
    pub(super) fn piece(&mut self, cap: usize) -> String {
        let rest = self.bytes.get(self.handed_out..).unwrap_or_default();
        // A replacement character is three bytes where the stray byte was one.
        let mut take = rest.get(..cap / 3).unwrap_or(rest);
        if let Err(error) = std::str::from_utf8(take)
            && error.error_len().is_none()
        {
            take = take.get(..error.valid_up_to()).unwrap_or(take);
            if take.is_empty() && rest.len() > 4 {
                take = rest.get(..1).unwrap_or_default();
            }
        }
        let text = to_text(take);
        self.handed_out += take.len();
        text
    }

    /// All of it, with a mark where it was cut, and whether it was.
    pub(super) fn finished(&self) -> (String, bool) {
        let mut text = to_text(&self.bytes);
        let truncated = self.truncated || text.len() > OUTPUT_CAP_BYTES;
        if truncated {
            cut_to(&mut text, OUTPUT_CAP_BYTES - MARKER.len());
            text.push_str(MARKER);
        }
        (text, truncated)
    }
}

/// Bytes as text that JSON and Postgres can hold.
fn to_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "\u{FFFD}")
}

/// Shortens `text` to `cap` bytes with a mark; false when it was short enough.
pub(super) fn cut(text: &mut String, cap: usize) -> bool {
    if text.len() <= cap {
        return false;
    }
    cut_to(text, cap.saturating_sub(MARKER.len()));
    text.push_str(MARKER);
    true
}

fn cut_to(text: &mut String, cap: usize) {
    let mut end = cap.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_the_cut_is_marked() {
        let mut captured = Captured::default();
        for _ in 0..64 {
            captured.push(&[b'x'; 64 * 1024]);
        }
        assert_eq!(captured.bytes.len(), OUTPUT_CAP_BYTES);
        let (text, truncated) = captured.finished();
        assert!(truncated);
        assert_eq!(text.len(), OUTPUT_CAP_BYTES);
        assert!(text.ends_with(MARKER));
    }

    #[test]
    fn exactly_the_limit_is_not_cut() {
        let mut captured = Captured::default();
        captured.push(&vec![b'x'; OUTPUT_CAP_BYTES]);
        captured.push(&[]);
        assert_eq!(captured.finished(), ("x".repeat(OUTPUT_CAP_BYTES), false));
    }

    #[test]
    fn pieces_together_are_the_whole_even_through_a_character() {
        let whole = "aé€😀\n".repeat(50);
        for cap in [3, 12, 15, 30, 3000] {
            let mut captured = Captured::default();
            let mut said = String::new();
            for byte in whole.as_bytes() {
                captured.push(&[*byte]);
                said.push_str(&captured.piece(cap));
            }
            for _ in 0..whole.len() {
                said.push_str(&captured.piece(cap));
            }
            if cap >= 12 {
                assert_eq!(said, whole, "cap {cap}");
            }
            assert!(captured.piece(cap).is_empty(), "cap {cap} ends");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_within_the_limit() {
        let mut captured = Captured::default();
        captured.push(&vec![0xFF; OUTPUT_CAP_BYTES]);
        assert!(captured.piece(65_536).len() <= 65_536);
        assert!(captured.finished().0.len() <= OUTPUT_CAP_BYTES);
        let mut nul = Captured::default();
        nul.push(b"a\0b");
        assert_eq!(nul.finished().0, "a\u{FFFD}b");
    }
}
