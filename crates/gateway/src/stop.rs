//! Stop strings over text that comes in pieces.
//!
//! Text that may turn out to be the beginning of a stop string is held back. The first occurrence is the one that
//! is complete first (the longest, where several end together), so the result does not depend on where the pieces
//! were cut. Every byte is looked at once per stop string, however long the text.

/// Watches a text for stop strings.
#[derive(Debug, Default)]
pub struct StopFilter {
    patterns: Vec<Pattern>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// Stops at any of `strings`; an empty one stops nothing.
    pub fn new(strings: &[String]) -> Self {
        let patterns = strings.iter().filter(|s| !s.is_empty()).map(|s| Pattern::new(s)).collect();
        Self { patterns, held: String::new(), stopped: false }
    }

    /// Takes the next piece and gives back what is certain to lie before any stop string.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (index, byte) in text.bytes().enumerate() {
            let longest = self.patterns.iter_mut().filter_map(|pattern| pattern.advance(byte)).max();
            if let Some(length) = longest {
                self.stopped = true;
                self.held.truncate(before + index + 1 - length);
                return std::mem::take(&mut self.held);
            }
        }
        let open = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - open);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string was found; what follows it is dropped.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that was held back for a stop string that did not come.
    pub fn finish(self) -> String {
        self.held
    }
}

/// A stop string and how much of it the text ends with (Knuth, Morris, Pratt).
///
/// Both start on a character, so a match of bytes is a match of characters.
#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// Longest proper border of each prefix: where to go on when the next byte does not fit.
    borders: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for index in 1..bytes.len() {
            while border > 0 && bytes[index] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[index] == bytes[border]);
            borders[index] = border;
        }
        Self { bytes, borders, matched: 0 }
    }

    /// The length of the whole pattern when it ends with this byte.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.borders[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        (self.matched == self.bytes.len()).then_some(self.matched)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        let mut filter = StopFilter::new(&stops);
        let deltas = pieces.iter().map(|piece| filter.push(piece)).collect();
        let stopped = filter.stopped();
        (deltas, filter.finish(), stopped)
    }

    #[test]
    fn holds_back_what_may_become_a_stop_string() {
        let (deltas, rest, stopped) = run(&["\nUser:"], &["Hello", ".\n", "Us", "eful"]);
        assert_eq!(deltas, ["Hello", ".", "", "\nUseful"]);
        assert_eq!((rest.as_str(), stopped), ("", false));
    }

    #[test]
    fn ends_before_a_stop_string_across_pieces_and_drops_the_rest() {
        let (deltas, rest, stopped) = run(&["END"], &["a E", "N", "D b", "c"]);
        assert_eq!(deltas, ["a ", "", "", ""]);
        assert_eq!((rest.as_str(), stopped), ("", true));
    }

    #[test]
    fn gives_back_the_held_text_at_the_end() {
        let (deltas, rest, stopped) = run(&["明月光"], &["牀前明", "月"]);
        assert_eq!(deltas, ["牀前", ""]);
        assert_eq!((rest.as_str(), stopped), ("明月", false));
    }

    #[test]
    fn the_first_to_be_complete_wins_and_the_longest_of_those_that_end_together() {
        assert_eq!(run(&["abcde", "cd"], &["xabcde"]).0, ["xab"]);
        assert_eq!(run(&["bc", "abc"], &["xabc"]).0, ["x"]);
    }

    #[test]
    fn no_stop_strings_let_everything_through() {
        assert_eq!(run(&[], &["a", "b"]).0, ["a", "b"]);
        assert_eq!(run(&[""], &["a", "b"]).0, ["a", "b"]);
    }

    /// The definition: the occurrence whose end comes first, and of those the one that starts first.
    fn naive(stops: &[String], text: &str) -> Option<usize> {
        stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .flat_map(|stop| {
                text.match_indices(stop.as_str()).take(1).map(move |(at, _)| (at + stop.len(), at))
            })
            .min()
            .map(|(_, start)| start)
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_search(
            stops in prop::collection::vec("[ab光]{0,4}", 0..4),
            pieces in prop::collection::vec("[ab光]{0,5}", 0..12),
        ) {
            let text = pieces.concat();
            let mut filter = StopFilter::new(&stops);
            let mut seen = String::new();
            for piece in &pieces {
                seen.push_str(&filter.push(piece));
            }
            let stopped = filter.stopped();
            seen.push_str(&filter.finish());
            match naive(&stops, &text) {
                Some(end) => prop_assert_eq!((seen.as_str(), stopped), (&text[..end], true)),
                None => prop_assert_eq!((seen.as_str(), stopped), (text.as_str(), false)),
            }
        }

        #[test]
        fn holds_back_no_more_than_it_must(pieces in prop::collection::vec("[ab]{0,3}", 0..10)) {
            let stop = "abaab";
            let mut filter = StopFilter::new(&[stop.to_owned()]);
            let (mut text, mut seen) = (String::new(), String::new());
            for piece in &pieces {
                text.push_str(piece);
                seen.push_str(&filter.push(piece));
                if filter.stopped() {
                    break;
                }
                let open = (0..stop.len()).rev().find(|&length| text.ends_with(&stop[..length])).unwrap();
                prop_assert_eq!(&seen, &text[..text.len() - open]);
            }
        }
    }
}
