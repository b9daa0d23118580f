//! What is kept of a script's output: of a stream that is too long the beginning and the end, with a marked gap.

/// The most bytes of one output stream that are kept: [`HEAD_BYTES`] and [`TAIL_BYTES`].
pub const CAP_BYTES: usize = HEAD_BYTES + TAIL_BYTES;
/// What is kept of the beginning of a stream that is too long.
pub const HEAD_BYTES: usize = 256 * 1024;
/// What is kept of the end of a stream that is too long: the reason of a failure comes last.
pub const TAIL_BYTES: usize = 768 * 1024;
/// Room beyond [`CAP_BYTES`] for the mark of the gap and for a sentence of the agent about the end of the script.
pub const NOTES_BYTES: usize = 4096;

/// The mark in the place of `left_out` bytes.
#[must_use]
pub fn gap(left_out: u64) -> String {
    format!("\n[{left_out} bytes of output left out here]\n")
}

/// `text` without its middle when it is longer than [`CAP_BYTES`] and [`NOTES_BYTES`]; none when it may stay as it is. What was
/// shortened once is not shortened again.
#[must_use]
pub fn shorten(text: &str) -> Option<String> {
    if text.len() <= CAP_BYTES + NOTES_BYTES {
        return None;
    }
    let (head, tail) = (first(text, HEAD_BYTES), last(text, TAIL_BYTES));
    let left_out = text.len() - head.len() - tail.len();
    Some(join(head, u64::try_from(left_out).unwrap_or(u64::MAX), tail))
}

/// Both ends of a stream with the mark between them.
#[must_use]
pub fn join(head: &str, left_out: u64, tail: &str) -> String {
    [head, &gap(left_out), tail].concat()
}

/// The longest beginning of at most `bytes` bytes that ends between two characters.
#[must_use]
pub fn first(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// The longest end of at most `bytes` bytes that begins between two characters.
#[must_use]
pub fn last(text: &str, bytes: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_stay_and_the_gap_is_counted() {
        assert_eq!(shorten(&"x".repeat(CAP_BYTES + NOTES_BYTES)), None);
        // Characters of two bytes, so that a limit lies inside of one.
        let text = format!("y{}z", "é".repeat(CAP_BYTES));
        let short = shorten(&text).unwrap();
        assert!(short.starts_with("yé") && short.ends_with("éz"));
        assert!(short.len() <= CAP_BYTES + NOTES_BYTES);
        let (head, rest) = short.split_once("\n[").unwrap();
        let (count, tail) = rest.split_once(" bytes of output left out here]\n").unwrap();
        assert_eq!(head.len() + tail.len() + count.parse::<usize>().unwrap(), text.len());
        assert!(head.len() + 4 > HEAD_BYTES && tail.len() + 4 > TAIL_BYTES);
        assert_eq!(shorten(&short), None, "once is enough");
    }
}
