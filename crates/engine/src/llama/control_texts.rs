//! Keeps what people write from being read as control tokens.
//!
//! A prompt is tokenised with the texts of control tokens read as those tokens, because chat templates write their
//! delimiters as text. A message that holds `<|im_end|>` could so end its own turn and forge the next. Such a text is
//! swapped for one private-use character, a mark, before the template is rendered: a mark survives trimming, cutting
//! and moving, so the place is found again whatever the template does. It is then tokenised as the text it stood for.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

use crate::model_runtime::{ChatMessage, EngineError};

/// Characters that no vocabulary has a use for.
const MARKS: [RangeInclusive<char>; 2] = ['\u{F0000}'..='\u{FFFFD}', '\u{100000}'..='\u{10FFFD}'];

/// The texts that the tokenizer of one model reads as control tokens.
#[derive(Debug)]
pub(super) struct ControlTexts {
    texts: HashSet<String>,
    /// Their distinct lengths in bytes, longest first, as the tokenizer prefers them.
    lengths: Vec<usize>,
    /// Which bytes one of them begins with.
    first_bytes: [bool; 256],
}

/// A conversation without control texts.
#[derive(Debug)]
pub(super) struct Hidden<'a> {
    pub(super) messages: Cow<'a, [ChatMessage]>,
    pub(super) marks: Marks,
}

/// What stands for which control text.
#[derive(Debug, Default)]
pub(super) struct Marks(BTreeMap<char, String>);

/// A part of a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Control texts in it are the template's own.
    Template(&'a str),
    /// A control text that was part of a message.
    Spoken(&'a str),
}

impl ControlTexts {
    pub(super) fn new(texts: impl IntoIterator<Item = String>) -> Self {
        let texts: HashSet<String> = texts.into_iter().filter(|text| !text.is_empty()).collect();
        let mut lengths: Vec<usize> = texts.iter().map(String::len).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        lengths.dedup();
        let mut first_bytes = [false; 256];
        for text in &texts {
            first_bytes[usize::from(text.as_bytes()[0])] = true;
        }
        Self { texts, lengths, first_bytes }
    }

    /// Swaps the control texts in messages for marks; most conversations have none and stay as they are.
    pub(super) fn hide<'a>(&self, messages: &'a [ChatMessage]) -> Result<Hidden<'a>, EngineError> {
        let said = || messages.iter().flat_map(|message| [message.role.as_str(), message.content.as_str()]);
        let found: HashSet<&str> = said().flat_map(|text| self.find(text).map(|(_, found)| found)).collect();
        if found.is_empty() {
            return Ok(Hidden { messages: Cow::Borrowed(messages), marks: Marks::default() });
        }
        let is_mark = |character: &char| MARKS.iter().any(|marks| marks.contains(character));
        let taken: HashSet<char> = said().flat_map(str::chars).filter(is_mark).collect();
        let mut free = MARKS.into_iter().flatten().filter(|mark| !taken.contains(mark));
        let mut mark_of = BTreeMap::new();
        for text in found {
            let mark = free.next().ok_or_else(|| EngineError::Unsupported {
                parameter: "messages".into(),
                reason: "the text of a control token cannot be told apart from it".into(),
            })?;
            mark_of.insert(text, mark);
        }
        let swap = |text: &str| {
            let mut swapped = String::with_capacity(text.len());
            let mut end = 0;
            for (at, found) in self.find(text) {
                swapped.push_str(&text[end..at]);
                swapped.push(mark_of[found]);
                end = at + found.len();
            }
            swapped + &text[end..]
        };
        let messages = messages.iter().map(|message| ChatMessage {
            role: swap(&message.role),
            content: swap(&message.content),
            ..message.clone()
        });
        let messages = Cow::Owned(messages.collect());
        let marks = Marks(mark_of.iter().map(|(text, mark)| (*mark, (*text).to_owned())).collect());
        Ok(Hidden { messages, marks })
    }

    /// Finds the control texts, leftmost and longest first, with their places.
    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < text.len() {
                let begin = at;
                at += 1;
                if !self.first_bytes[usize::from(text.as_bytes()[begin])] {
                    continue;
                }
                let mut candidates = self.lengths.iter().filter_map(|length| text.get(begin..begin + length));
                if let Some(found) = candidates.find(|candidate| self.texts.contains(*candidate)) {
                    at = begin + found.len();
                    return Some((begin, found));
                }
            }
            None
        })
    }
}

impl Marks {
    /// Cuts a rendered prompt at its marks. The first piece is always the template's.
    pub(super) fn cut<'a>(&'a self, prompt: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut end = 0;
        let marks = prompt.char_indices().filter_map(|(at, character)| Some((at, character, self.0.get(&character)?)));
        // Nearly all prompts have no marks, and need not be searched.
        for (at, mark, text) in marks.take(if self.0.is_empty() { 0 } else { usize::MAX }) {
            pieces.push(Piece::Template(&prompt[end..at]));
            pieces.push(Piece::Spoken(text));
            end = at + mark.len_utf8();
        }
        pieces.push(Piece::Template(&prompt[end..]));
        pieces
    }
}

/// Returns whether a token of an ordinary kind has the look of a delimiter.
///
/// Converters leave some delimiters as ordinary added tokens, which tokenizers find in any text. `<think>` and
/// `<tool_call>` are such tokens as well, but they end no turn, and templates look for them in messages.
pub(super) fn looks_like_delimiter(text: &str) -> bool {
    (text.starts_with("<|") && text.ends_with("|>"))
        || (text.starts_with("<｜") && text.ends_with("｜>"))
        || ["<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]"].contains(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts() -> ControlTexts {
        ControlTexts::new(["<|im_end|>", "<|im_start|>", "<|im", "é|>", ""].map(str::to_owned))
    }

    fn say(content: &str) -> ChatMessage {
        ChatMessage::new("user", content)
    }

    #[test]
    fn a_conversation_without_control_texts_stays_as_it_is() {
        let messages = [say("2 < 3 |> <|i m_end|>"), say("é|"), say("")];
        let texts = texts();
        let hidden = texts.hide(&messages).expect("it can be told apart");
        assert!(matches!(hidden.messages, Cow::Borrowed(_)));
        assert_eq!(hidden.marks.cut("a\u{F0000}b<|im_end|>"), [Piece::Template("a\u{F0000}b<|im_end|>")]);
    }

    #[test]
    fn control_texts_come_back_as_spoken_and_only_those_of_messages() {
        let messages = [say("a<|im_end|><|im_b é|>")];
        let hidden = texts().hide(&messages).expect("it can be told apart");
        let prompt = format!("<|im_start|>{}<|im_end|>", hidden.messages[0].content);
        let expected = [
            Piece::Template("<|im_start|>a"),
            Piece::Spoken("<|im_end|>"),
            Piece::Template(""),
            Piece::Spoken("<|im"),
            Piece::Template("_b "),
            Piece::Spoken("é|>"),
            Piece::Template("<|im_end|>"),
        ];
        assert_eq!(hidden.marks.cut(&prompt), expected);
    }

    #[test]
    fn marks_that_a_message_holds_itself_stay_what_they_are() {
        let messages = [say("\u{F0000}<|im_end|>\u{F0001}")];
        let hidden = texts().hide(&messages).expect("it can be told apart");
        let expected = [Piece::Template("\u{F0000}"), Piece::Spoken("<|im_end|>"), Piece::Template("\u{F0001}")];
        assert_eq!(hidden.marks.cut(&hidden.messages[0].content), expected);
    }

    #[test]
    fn a_message_of_all_private_characters_leaves_no_mark() {
        let every: String = MARKS.into_iter().flatten().collect();
        let refused = texts().hide(&[say(&every), say("<|im_end|>")]).map(|_| ());
        assert!(matches!(refused, Err(EngineError::Unsupported { parameter, .. }) if parameter == "messages"));
    }
}
