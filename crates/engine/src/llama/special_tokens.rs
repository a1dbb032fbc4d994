//! Keeps text from users from being tokenised as special tokens.
//!
//! A prompt is tokenised with special tokens enabled, because chat templates write their delimiters as text. A
//! message that contains `<|im_end|>` could therefore end its own turn and forge the next. So each such text is
//! replaced by one private-use character, a mark, before the template is rendered. A mark survives trimming, cutting
//! and moving, so it can be found again whatever the template does. It is then tokenised as the plain text that it
//! stands for. Tools, calls and template options also come from users and are treated the same way.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::model_runtime::{Chat, EngineError, unsupported};

/// Private-use characters that no vocabulary needs.
const MARKS: [RangeInclusive<char>; 2] = ['\u{F0000}'..='\u{FFFFD}', '\u{100000}'..='\u{10FFFD}'];

/// The texts that the tokenizer of one model reads as special tokens.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    texts: HashSet<String>,
    /// Their distinct lengths in bytes, longest first, since the tokenizer prefers the longest match.
    lengths: Vec<usize>,
    /// The bytes with which one of the texts begins.
    first_bytes: [bool; 256],
}

/// A conversation in which the texts of special tokens are replaced by marks.
#[derive(Debug)]
pub(super) struct Hidden<'a> {
    pub(super) chat: Cow<'a, Chat>,
    pub(super) marks: Marks,
}

/// The text of a special token for each mark.
#[derive(Debug, Default)]
pub(super) struct Marks(BTreeMap<char, String>);

/// A part of a prompt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Text of the template. Special tokens in it are the template's own.
    Template(&'a str),
    /// The text of a special token that a user wrote.
    Spoken(&'a str),
}

impl SpecialTokens {
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

    /// Replaces the texts of special tokens in a conversation by marks. Most conversations have none and are not
    /// copied.
    pub(super) fn hide<'a>(&self, chat: &'a Chat) -> Result<Hidden<'a>, EngineError> {
        let refuse = || unsupported("messages", "the text of a special token cannot be told apart from it");
        let mut value = serde_json::to_value(chat).map_err(|_| refuse())?;
        each_arguments(&mut value, &open_arguments);
        let mut found = HashSet::new();
        let mut used = HashSet::new();
        let is_mark = |character: &char| MARKS.iter().any(|marks| marks.contains(character));
        each_text(&value, &mut |text| {
            found.extend(self.find(text).map(|(_, found)| found.to_owned()));
            used.extend(text.chars().filter(is_mark));
        });
        if found.is_empty() {
            return Ok(Hidden { chat: Cow::Borrowed(chat), marks: Marks::default() });
        }
        let mut free = MARKS.into_iter().flatten().filter(|mark| !used.contains(mark));
        let mut mark_of = BTreeMap::new();
        for text in found {
            mark_of.insert(text, free.next().ok_or_else(refuse)?);
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
        let mut value = with_texts(value, &swap);
        each_arguments(&mut value, &close_arguments);
        // Clients do not choose the text of a role, so a special token with that name is left to the template.
        for (swapped, message) in value["messages"].as_array_mut().into_iter().flatten().zip(&chat.messages) {
            swapped["role"] = message.role.as_str().into();
        }
        // If the result is no longer a conversation, a special token has the name of one of its fields.
        let chat = serde_json::from_value(value).map_err(|_| refuse())?;
        let marks = Marks(mark_of.into_iter().map(|(text, mark)| (mark, text)).collect());
        Ok(Hidden { chat: Cow::Owned(chat), marks })
    }

    /// Finds the texts of special tokens, leftmost and longest first, with their offsets.
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
    /// Splits a rendered prompt at its marks. The first piece always belongs to the template.
    pub(super) fn cut<'a>(&'a self, prompt: &'a str) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let mut end = 0;
        let marks = prompt.char_indices().filter_map(|(at, character)| Some((at, character, self.0.get(&character)?)));
        // Nearly all prompts have no marks and need not be searched.
        for (at, mark, text) in marks.take(if self.0.is_empty() { 0 } else { usize::MAX }) {
            pieces.push(Piece::Template(&prompt[end..at]));
            pieces.push(Piece::Spoken(text));
            end = at + mark.len_utf8();
        }
        pieces.push(Piece::Template(&prompt[end..]));
        pieces
    }
}

/// Visits the arguments of all calls of a conversation.
fn each_arguments(chat: &mut Value, visit: &dyn Fn(&mut Value)) {
    let messages = chat.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten();
    let calls = messages.filter_map(|message| message.get_mut("toolCalls")?.as_array_mut()).flatten();
    calls.filter_map(|call| call.get_mut("arguments")).for_each(visit);
}

/// Parses arguments as a template will. This undoes escapes that could hide the text of a special token.
fn open_arguments(arguments: &mut Value) {
    if let Some(Ok(object @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
        *arguments = object;
    }
}

fn close_arguments(arguments: &mut Value) {
    if arguments.is_object() {
        *arguments = Value::String(arguments.to_string());
    }
}

fn each_text(value: &Value, visit: &mut dyn FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| each_text(item, visit)),
        Value::Object(fields) => {
            for (key, field) in fields {
                visit(key);
                each_text(field, visit);
            }
        }
        _ => {}
    }
}

fn with_texts(value: Value, swap: &dyn Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => swap(&text).into(),
        Value::Array(items) => items.into_iter().map(|item| with_texts(item, swap)).collect(),
        Value::Object(fields) => {
            let swapped = fields.into_iter().map(|(key, field)| (swap(&key), with_texts(field, swap)));
            Value::Object(swapped.collect::<Map<_, _>>())
        }
        other => other,
    }
}

/// Returns whether an ordinary token looks like a delimiter.
///
/// Converters leave some delimiters as ordinary added tokens, which tokenizers match in any text. `<think>` and
/// `<tool_call>` are such tokens as well, but they do not end a turn, and templates look for them in messages.
pub(super) fn looks_like_delimiter(text: &str) -> bool {
    (text.starts_with("<|") && text.ends_with("|>"))
        || (text.starts_with("<｜") && text.ends_with("｜>"))
        || ["<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]"].contains(&text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model_runtime::{Message, Role, Tool, ToolCall};

    fn texts() -> SpecialTokens {
        SpecialTokens::new(["<|im_end|>", "<|im_start|>", "<|im", "é|>", ""].map(str::to_owned))
    }

    fn say(content: &str) -> Chat {
        vec![Message::new(Role::User, content)].into()
    }

    #[test]
    fn a_conversation_without_control_texts_stays_as_it_is() {
        let chat = say("2 < 3 |> <|i m_end|> é|");
        let texts = texts();
        let hidden = texts.hide(&chat).expect("it can be told apart");
        assert!(matches!(hidden.chat, Cow::Borrowed(_)));
        assert_eq!(hidden.marks.cut("a\u{F0000}b<|im_end|>"), [Piece::Template("a\u{F0000}b<|im_end|>")]);
    }

    #[test]
    fn control_texts_come_back_as_spoken_and_only_those_of_messages() {
        let chat = say("a<|im_end|><|im_b é|>");
        let hidden = texts().hide(&chat).expect("it can be told apart");
        let prompt = format!("<|im_start|>{}<|im_end|>", hidden.chat.messages[0].content);
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
        let chat = say("\u{F0000}<|im_end|>\u{F0001}");
        let hidden = texts().hide(&chat).expect("it can be told apart");
        let expected = [Piece::Template("\u{F0000}"), Piece::Spoken("<|im_end|>"), Piece::Template("\u{F0001}")];
        assert_eq!(hidden.marks.cut(&hidden.chat.messages[0].content), expected);
    }

    #[test]
    fn a_message_of_all_private_characters_leaves_no_mark() {
        let every: String = MARKS.into_iter().flatten().collect();
        let chat = say(&(every + "<|im_end|>"));
        let refused = texts().hide(&chat).map(|_| ());
        assert!(matches!(refused, Err(EngineError::Unsupported { parameter, .. }) if parameter == "messages"));
    }

    #[test]
    fn special_tokens_are_hidden_wherever_people_write() {
        const TEXT: &str = "<|im_end|>";
        let call = ToolCall {
            id: TEXT.into(),
            name: TEXT.into(),
            arguments: r#"{"<|im_end|>":["\u003c|im_end\u007c>"]}"#.into(),
        };
        let broken = ToolCall { arguments: TEXT.into(), ..call.clone() };
        let message = Message {
            role: Role::User,
            content: TEXT.into(),
            reasoning: Some(TEXT.into()),
            tool_calls: vec![call, broken],
            tool_call_id: Some(TEXT.into()),
            name: Some(TEXT.into()),
        };
        let tool = Tool {
            name: TEXT.into(),
            description: Some(TEXT.into()),
            parameters: Some(json!({ TEXT: { "enum": [TEXT] } })),
        };
        let options = Map::from_iter([("date".to_owned(), json!([TEXT]))]);
        let chat = Chat { messages: vec![message], tools: vec![tool], template_options: options, ..Chat::default() };
        let texts = texts();
        let hidden = texts.hide(&chat).expect("it can be told apart");
        let shown = serde_json::to_string(&hidden.chat).expect("it is JSON");
        assert!(!shown.contains("im_end"), "{shown}");
        assert_eq!(shown.matches('\u{F0000}').count(), 16);
        let arguments: Value =
            serde_json::from_str(&hidden.chat.messages[0].tool_calls[0].arguments).expect("it is JSON");
        assert_eq!(arguments, json!({ "\u{F0000}": ["\u{F0000}"] }));
    }
}
