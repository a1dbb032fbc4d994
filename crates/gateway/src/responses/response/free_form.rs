//! Reads the text of a custom tool's call out of the JSON in which the model writes it, also while it is incomplete.

use serde_json::Value;

use crate::responses::item::FREE_FORM;

/// Returns the text of a call. Arguments of another form are the text themselves.
pub(super) fn text_of(arguments: &str) -> String {
    match serde_json::from_str(arguments) {
        Ok(Value::Object(mut fields)) if fields.get(FREE_FORM).is_some_and(Value::is_string) => {
            match fields.remove(FREE_FORM) {
                Some(Value::String(text)) => text,
                _ => arguments.to_owned(),
            }
        }
        _ => {
            let mut reader = FreeForm::default();
            let cut = reader.push(arguments);
            if reader.has_begun() { cut } else { arguments.to_owned() }
        }
    }
}

/// Decodes `{"input":"…"}` as it arrives. What does not begin so yields nothing until its end is known.
#[derive(Debug, Default)]
pub(super) struct FreeForm {
    /// What is not decoded yet.
    pending: String,
    position: Position,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Position {
    /// Before the text, in the JSON around it.
    #[default]
    Before,
    Within,
    After,
}

impl FreeForm {
    /// Returns whether the text has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.position != Position::Before
    }

    /// Takes a part of the arguments, and returns the part of the text that it completes.
    pub(super) fn push(&mut self, part: &str) -> String {
        if self.position == Position::After {
            return String::new();
        }
        self.pending.push_str(part);
        if self.position == Position::Before {
            let Some(text) = after_opening(&self.pending) else { return String::new() };
            self.pending = text.to_owned();
            self.position = Position::Within;
        }
        self.decode()
    }

    /// Decodes as much of the text as is complete.
    fn decode(&mut self) -> String {
        let (mut text, mut rest) = (String::new(), &*self.pending);
        while let Some(character) = rest.chars().next() {
            let (decoded, length) = match character {
                '"' => {
                    self.position = Position::After;
                    break;
                }
                '\\' => match escape(rest) {
                    Some(decoded) => decoded,
                    None => break,
                },
                other => (other, other.len_utf8()),
            };
            text.push(decoded);
            rest = &rest[length..];
        }
        self.pending = rest.to_owned();
        text
    }
}

/// Returns what follows `{"input":"`, with blanks wherever JSON allows them.
fn after_opening(text: &str) -> Option<&str> {
    let mut rest = text;
    for expected in ["{", &format!("\"{FREE_FORM}\""), ":", "\""] {
        rest = rest.trim_start().strip_prefix(expected)?;
    }
    Some(rest)
}

/// Decodes the escape at the beginning of a text. Returns the character and the escape's length, or `None` if it is
/// incomplete.
fn escape(text: &str) -> Option<(char, usize)> {
    let simple = |character| Some((character, 2));
    match text[1..].chars().next()? {
        'n' => simple('\n'),
        't' => simple('\t'),
        'r' => simple('\r'),
        'b' => simple('\u{8}'),
        'f' => simple('\u{c}'),
        'u' => unicode(text),
        other => Some((other, 1 + other.len_utf8())),
    }
}

/// Decodes `\uXXXX`, or the two of a character beyond the basic plane.
fn unicode(text: &str) -> Option<(char, usize)> {
    let unit = |at: usize| u32::from_str_radix(text.get(at..at + 4)?, 16).ok();
    let replaced = |length| Some((char::REPLACEMENT_CHARACTER, length));
    if text.len() < 6 {
        return None;
    }
    let Some(first) = unit(2) else { return replaced(2) };
    if !(0xD800..0xDC00).contains(&first) {
        return Some((char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER), 6));
    }
    // What follows may be any character, so its bytes are looked at.
    let next = &text.as_bytes()[6..text.len().min(8)];
    if text.len() < 12 && br"\u".starts_with(next) {
        return None;
    }
    match unit(8).filter(|second| text[6..].starts_with(r"\u") && (0xDC00..0xE000).contains(second)) {
        Some(second) => {
            let character = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
            Some((char::from_u32(character).unwrap_or(char::REPLACEMENT_CHARACTER), 12))
        }
        None => replaced(6),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    proptest! {
        #[test]
        fn a_text_comes_out_of_any_pieces_as_it_went_in(text: String, cuts in prop::collection::vec(0usize..400, 0..6)) {
            for arguments in [json!({ "input": text }).to_string(), format!(" {{ \"input\" : {} }}", ascii(&text))] {
                let mut reader = FreeForm::default();
                let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (arguments.len() + 1)).collect();
                cuts.retain(|cut| arguments.is_char_boundary(*cut));
                cuts.extend([0, arguments.len()]);
                cuts.sort_unstable();
                let read: String = cuts.windows(2).map(|cut| reader.push(&arguments[cut[0]..cut[1]])).collect();
                prop_assert_eq!(&read, &text);
                prop_assert_eq!(text_of(&arguments), text.clone());
            }
        }

        #[test]
        fn nothing_panics(text: String, hostile in r#"(\{"input":")?[\\u"0-9a-fD-F\u{e4}\u{20ac}\u{1f600}]{0,20}"#) {
            for text in [text, hostile] {
                text_of(&text);
            }
        }
    }

    #[test]
    fn half_a_pair_before_a_long_character_is_replaced() {
        for character in ['\u{20ac}', '\u{1f600}'] {
            assert_eq!(text_of(&format!(r#"{{"input":"\ud83d{character}"#)), format!("\u{fffd}{character}"));
        }
    }

    /// Writes a text in JSON with ASCII only.
    fn ascii(text: &str) -> String {
        let units: Vec<_> = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        format!("\"{}\"", units.concat())
    }

    #[test]
    fn what_has_another_form_is_the_text_itself() {
        assert_eq!(text_of("plain"), "plain");
        assert_eq!(text_of(r#"{"other":1}"#), r#"{"other":1}"#);
        assert_eq!(text_of(r#"{"input":7}"#), r#"{"input":7}"#);
        assert_eq!(text_of(r#"{"input":"cut off\n he"#), "cut off\n he");
        assert_eq!(text_of(r#"{"also":1,"input":"x"}"#), "x");
    }
}
