//! Turns token bytes into text as they arrive (the detokenizer), and ends the text at a stop sequence.
//!
//! The result does not depend on how the bytes were split: it is the lossy UTF-8 decoding of all bytes, up to the
//! first place where a stop sequence is complete. Characters and stop sequences that may still be completed are held
//! back. A character that the token limit cut is dropped.

#[derive(Debug, Clone, Default)]
pub struct TextAssembler {
    stops: Vec<String>,
    incomplete: Vec<u8>,
    held: String,
    stopped: bool,
    /// The stop sequence that ended the text.
    stop: Option<String>,
}

impl TextAssembler {
    /// Begins an answer that ends at any of these stop sequences; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, ..Self::default() }
    }

    /// Appends the bytes of a token and returns the text that can no longer change.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        if self.stopped {
            return String::new();
        }
        let known = self.held.len();
        self.decode(bytes);
        if self.cut_at_stop(known) {
            self.stopped = true;
            return std::mem::take(&mut self.held);
        }
        let keep = self.held_back();
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns whether a stop sequence was completed. Any text after it is ignored.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Returns the stop sequence that ended the text, if one did.
    pub fn stop_sequence(&self) -> Option<&str> {
        self.stop.as_deref()
    }

    /// Ends the answer and returns the text that was held back. If the token limit cut the answer, an incomplete last
    /// character is dropped, since more bytes would have completed it.
    pub fn finish(&mut self, is_cut: bool) -> String {
        if self.stopped {
            return String::new();
        }
        let is_incomplete = !std::mem::take(&mut self.incomplete).is_empty();
        if is_incomplete && !is_cut {
            let known = self.held.len();
            self.held.push(char::REPLACEMENT_CHARACTER);
            self.cut_at_stop(known);
        }
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    /// Appends the complete characters of the bytes to `held`, and keeps an incomplete last one for later.
    fn decode(&mut self, bytes: &[u8]) {
        self.incomplete.extend_from_slice(bytes);
        let mut rest = self.incomplete.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = after;
                    let Some(length) = error.error_len() else { break };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        let keep = rest.len();
        self.incomplete.drain(..self.incomplete.len() - keep);
    }

    /// Cuts `held` at the stop sequence that is completed first after `known` bytes. Returns whether there is one.
    fn cut_at_stop(&mut self, known: usize) -> bool {
        let Some((start, stop)) = self.find_stop(known) else { return false };
        self.stop = Some(stop.to_owned());
        self.held.truncate(start);
        true
    }

    /// Returns the stop sequence that is completed first after `known` bytes, and its start; if two end there, the
    /// longer one.
    fn find_stop(&self, known: usize) -> Option<(usize, &str)> {
        let ends = self.held.char_indices().map(|(start, character)| start + character.len_utf8());
        ends.skip_while(|end| *end <= known).find_map(|end| {
            let text = &self.held[..end];
            let complete = self.stops.iter().filter(|stop| text.ends_with(stop.as_str()));
            complete.max_by_key(|stop| stop.len()).map(|stop| (end - stop.len(), stop.as_str()))
        })
    }

    /// Returns the length of the longest suffix of `held` that is a prefix of a stop sequence.
    fn held_back(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = held.len().min(stop.len() - 1);
            (1..=most).rev().find(|length| held.ends_with(&stop.as_bytes()[..*length])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn assemble<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, stops: &[String]) -> (String, bool) {
        let mut assembler = TextAssembler::new(stops);
        let mut text = String::new();
        for piece in pieces {
            text.push_str(&assembler.push(piece));
        }
        let stopped = assembler.is_stopped();
        text.push_str(&assembler.finish(false));
        (text, stopped)
    }

    /// Cuts a complete text at the stop sequence that is completed first.
    fn naive(text: &str, stops: &[String]) -> String {
        for end in 1..=text.len() {
            let Some(head) = text.get(..end) else { continue };
            let starts = stops.iter().filter(|stop| !stop.is_empty() && head.ends_with(stop.as_str()));
            if let Some(longest) = starts.map(String::len).max() {
                return text[..end - longest].to_owned();
            }
        }
        text.to_owned()
    }

    #[test]
    fn a_character_in_two_tokens_comes_out_whole() {
        let mut assembler = TextAssembler::new(&[]);
        assert_eq!(assembler.push(&[b'a', 0xf0, 0x9f]), "a");
        assert_eq!(assembler.push(&[0xa6]), "");
        assert_eq!(assembler.push(&[0x80, b'b']), "\u{1f980}b");
        assert_eq!(assembler.finish(false), "");
    }

    #[test]
    fn invalid_bytes_become_replacement_characters() {
        assert_eq!(assemble([&b"a\xff"[..], b"b\xe2\x82"], &[]).0, "a\u{fffd}b\u{fffd}");
    }

    #[test]
    fn a_character_that_the_limit_cut_is_left_out() {
        for (bytes, cut, whole) in
            [(&b"a\xe2\x82"[..], "a", "a\u{fffd}"), (b"a\xff", "a\u{fffd}", "a\u{fffd}"), (b"ab", "ab", "ab")]
        {
            for (is_cut, expected) in [(true, cut), (false, whole)] {
                let mut assembler = TextAssembler::new(&[]);
                assert_eq!(assembler.push(bytes) + &assembler.finish(is_cut), expected);
            }
        }
    }

    #[test]
    fn the_start_of_a_stop_text_is_held_back_until_it_is_none() {
        let mut assembler = TextAssembler::new(&["\n\nUser".into()]);
        assert_eq!(assembler.push(b"hi\n"), "hi");
        assert_eq!(assembler.push(b"\nUs"), "");
        assert_eq!(assembler.push(b"ual"), "\n\nUsual");
        assert_eq!(assembler.push(b"\n\n\nUser: x"), "\n");
        assert!(assembler.is_stopped());
        assert_eq!(assembler.push(b"more"), "");
    }

    #[test]
    fn the_stop_sequence_that_ended_the_text_is_known() {
        let stops = ["b".to_owned(), "ab".to_owned(), "x".to_owned()];
        for (text, expected) in [("1ab2x", Some("ab")), ("1b2ab", Some("b")), ("1a2x", Some("x")), ("none", None)] {
            let mut assembler = TextAssembler::new(&stops);
            assembler.push(text.as_bytes());
            assembler.finish(false);
            assert_eq!(assembler.stop_sequence(), expected, "{text}");
        }
    }

    #[test]
    fn held_text_comes_out_when_the_answer_ends() {
        assert_eq!(assemble([&b"a STO"[..]], &["STOP".into()]), ("a STO".into(), false));
    }

    proptest! {
        #[test]
        fn any_split_of_bytes_gives_the_same_text(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xe2), Just(0x82), Just(0xac), Just(b'a')], 0..64),
            cuts in prop::collection::vec(1_usize..6, 0..64),
        ) {
            let mut pieces = Vec::new();
            let mut rest = bytes.as_slice();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            prop_assert_eq!(assemble(pieces, &[]).0, String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn stop_texts_end_the_answer_where_a_search_of_the_whole_text_finds_them(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            cuts in prop::collection::vec(1_usize..5, 0..24),
        ) {
            let mut pieces = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            let (assembled, stopped) = assemble(pieces, &stops);
            let expected = naive(&text, &stops);
            prop_assert_eq!(stopped, expected.len() < text.len());
            prop_assert_eq!(assembled, expected);
        }
    }
}
