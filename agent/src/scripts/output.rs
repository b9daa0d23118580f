//! Output of a script: both ends of it are kept, and it is handed out in pieces while it grows.

use std::collections::VecDeque;

use borealis_protocol::output::{self, HEAD_BYTES, TAIL_BYTES};

/// Ends output that was cut at its end.
const MARKER: &str = "\n[output truncated]\n";
/// Ends the live output of a script that prints faster than it is sent.
const LIVE_ENDS: &str = "\n[live output ends here: the rest comes with the result]\n";

/// One stream as far as it is kept: at most [`HEAD_BYTES`] and [`TAIL_BYTES`].
#[derive(Debug, Default)]
pub(super) struct Captured {
    head: Vec<u8>,
    /// The last bytes of what follows the head.
    tail: VecDeque<u8>,
    /// Bytes between head and tail that are not kept.
    left_out: u64,
    /// How many bytes of the stream were handed out by [`Self::piece`].
    handed_out: u64,
    live_ended: bool,
}

impl Captured {
    /// Adds bytes to the end.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = HEAD_BYTES.saturating_sub(self.head.len());
        let (head, rest) = bytes.split_at(room.min(bytes.len()));
        self.head.extend_from_slice(head);
        let (skipped, rest) = rest.split_at(rest.len().saturating_sub(TAIL_BYTES));
        let surplus = (self.tail.len() + rest.len()).saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
        self.tail.extend(rest);
        self.left_out += length(skipped.len() + surplus);
    }

    /// The next piece that was not handed out yet, at most `cap` bytes of text; empty when there is none. A character that is
    /// not complete yet waits for its rest. Ends where the stream has grown faster than it was handed out.
    pub(super) fn piece(&mut self, cap: usize) -> String {
        if self.live_ended {
            return String::new();
        }
        // A replacement character is three bytes where the stray byte was one.
        let mut bytes = self.after(self.handed_out, cap / 3);
        if bytes.is_empty() {
            self.live_ended = self.left_out > 0 && self.handed_out < self.total();
            return if self.live_ended { LIVE_ENDS.to_owned() } else { String::new() };
        }
        if let Err(error) = std::str::from_utf8(&bytes)
            && error.error_len().is_none()
        {
            let (complete, whole) = (error.valid_up_to(), bytes.len());
            if complete > 0 {
                bytes.truncate(complete);
            } else if whole < 4 && self.handed_out + length(whole) == self.total() {
                bytes.clear();
            } else {
                bytes.truncate(1);
            }
        }
        self.handed_out += length(bytes.len());
        to_text(&bytes)
    }

    /// Up to `most` bytes from `position` of the stream on, as far as they are kept without a gap.
    fn after(&self, position: u64, most: usize) -> Vec<u8> {
        let head = length(self.head.len());
        let from = |start: u64| usize::try_from(start).unwrap_or(usize::MAX);
        if position < head {
            let mut bytes: Vec<u8> = self.head.iter().skip(from(position)).take(most).copied().collect();
            if self.left_out == 0 {
                bytes.extend(self.tail.iter().take(most - bytes.len()));
            }
            return bytes;
        }
        match position.checked_sub(head + self.left_out) {
            Some(start) => self.tail.iter().skip(from(start)).take(most).copied().collect(),
            None => Vec::new(),
        }
    }

    fn total(&self) -> u64 {
        length(self.head.len()) + self.left_out + length(self.tail.len())
    }

    /// Both ends with a mark between them where something is left out, and whether it is.
    pub(super) fn finished(&self) -> (String, bool) {
        let mut bytes = self.head.clone();
        if self.left_out == 0 {
            bytes.extend(&self.tail);
            let text = to_text(&bytes);
            // Bytes that are no text take more room as text.
            return match output::shorten(&text) {
                Some(short) => (short, true),
                None => (text, false),
            };
        }
        // A character that the cut goes through is left out with the rest.
        let head_end = match std::str::from_utf8(&bytes) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => bytes.len(),
        };
        let torn = self.tail.iter().take(3).take_while(|byte| **byte & 0xC0 == 0x80).count();
        let left_out = self.left_out + length(bytes.len() - head_end) + length(torn);
        bytes.truncate(head_end);
        let tail: Vec<u8> = self.tail.iter().skip(torn).copied().collect();
        let (head, tail) = (to_text(&bytes), to_text(&tail));
        (output::join(output::first(&head, HEAD_BYTES), left_out, output::last(&tail, TAIL_BYTES)), true)
    }
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
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
    let end = output::first(text, cap.saturating_sub(MARKER.len())).len();
    text.truncate(end);
    text.push_str(MARKER);
    true
}

#[cfg(test)]
mod tests {
    use borealis_protocol::output::{CAP_BYTES, NOTES_BYTES};

    use super::*;

    #[test]
    fn memory_is_bounded_and_both_ends_stay() {
        for step in [1, 1000, 65_536, 3_000_000] {
            let mut captured = Captured::default();
            let whole: Vec<u8> = (0..300_000).flat_map(|line: u32| format!("line {line:06}\n").into_bytes()).collect();
            for bytes in whole.chunks(step) {
                captured.push(bytes);
            }
            assert!(captured.head.len() == HEAD_BYTES && captured.tail.len() == TAIL_BYTES);
            assert!(captured.tail.capacity() <= 2 * TAIL_BYTES);
            let (text, shortened) = captured.finished();
            assert!(shortened && text.len() <= CAP_BYTES + NOTES_BYTES);
            let text = text.as_bytes();
            assert_eq!(text[..HEAD_BYTES], whole[..HEAD_BYTES], "step {step}");
            assert_eq!(text[text.len() - TAIL_BYTES..], whole[whole.len() - TAIL_BYTES..], "step {step}");
            let mark = output::gap(length(whole.len() - CAP_BYTES));
            assert_eq!(text[HEAD_BYTES..text.len() - TAIL_BYTES], *mark.as_bytes(), "step {step}");
        }
    }

    #[test]
    fn exactly_the_limit_is_not_cut() {
        let mut captured = Captured::default();
        captured.push(&vec![b'x'; CAP_BYTES]);
        captured.push(&[]);
        assert_eq!(captured.finished(), ("x".repeat(CAP_BYTES), false));
        captured.push(b"y");
        assert!(captured.finished().1);
    }

    #[test]
    fn a_cut_through_a_character_leaves_no_stray_bytes() {
        for lead in ["", "x", "xx"] {
            let mut captured = Captured::default();
            let whole = format!("{lead}{}", "€".repeat(500_000));
            captured.push(whole.as_bytes());
            let (text, _) = captured.finished();
            assert!(!text.contains('\u{FFFD}'));
            let (head, rest) = text.split_once("\n[").unwrap();
            let (count, tail) = rest.split_once(" bytes of output left out here]\n").unwrap();
            assert_eq!(head.len() + count.parse::<usize>().unwrap() + tail.len(), whole.len());
        }
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
    fn live_output_goes_on_as_long_as_it_keeps_up() {
        let line = "x".repeat(1023) + "\n";
        let mut captured = Captured::default();
        let mut said = 0;
        for _ in 0..3000 {
            captured.push(line.as_bytes());
            said += captured.piece(65_536).len();
        }
        assert_eq!(said, 3000 * 1024, "all of it, in the head, in the tail and beyond");
        captured.push(&vec![b'y'; 2_000_000]);
        assert_eq!(captured.piece(65_536), LIVE_ENDS);
        captured.push(b"more");
        assert_eq!(captured.piece(65_536), "", "said once");
        assert!(captured.finished().0.ends_with("more"));
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_within_the_limit() {
        for count in [CAP_BYTES, 2 * CAP_BYTES] {
            let mut captured = Captured::default();
            captured.push(&vec![0xFF; count]);
            assert!(captured.piece(65_536).len() <= 65_536);
            assert!(captured.finished().0.len() <= CAP_BYTES + NOTES_BYTES);
        }
        let mut nul = Captured::default();
        nul.push(b"a\0b");
        assert_eq!(nul.finished().0, "a\u{FFFD}b");
    }
}
