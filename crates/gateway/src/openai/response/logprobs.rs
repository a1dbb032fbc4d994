//! Log-probabilities, in the formats of OpenAI's chat and text completions.

use std::borrow::Cow;
use std::collections::BTreeMap;

use protocol::infer::TokenLogprob;
use serde::Serialize;
use utoipa::ToSchema;

/// The log-probabilities of a chat: one entry for each token.
#[derive(Serialize, ToSchema)]
pub(crate) struct ChatLogprobs<'a> {
    pub(crate) content: Vec<ChatToken<'a>>,
    /// Always null.
    #[schema(value_type = Option<String>)]
    refusal: (),
}

#[derive(Serialize, ToSchema)]
#[schema(as = ChatTokenLogprob)]
pub(crate) struct ChatToken<'a> {
    #[serde(flatten)]
    #[schema(inline)]
    token: TopLogprob<'a>,
    /// The most likely tokens at this position.
    top_logprobs: Vec<TopLogprob<'a>>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = TopLogprob)]
struct TopLogprob<'a> {
    /// Text of the token. If the token is part of a character, only `bytes` identifies it.
    #[schema(value_type = String)]
    token: Cow<'a, str>,
    logprob: f32,
    #[schema(value_type = Vec<u32>)]
    bytes: &'a [u8],
}

/// The most likely tokens at one position, with their log-probabilities.
type Likely<'a> = BTreeMap<Cow<'a, str>, f32>;

/// The log-probabilities of a text completion, one column for each property. The first token of an echoed prompt has
/// none.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub(super) struct TextLogprobs<'a> {
    #[schema(value_type = Vec<String>)]
    tokens: Vec<Cow<'a, str>>,
    token_logprobs: Vec<Option<f32>>,
    /// The most likely tokens at each position, if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, f32>>>>)]
    top_logprobs: Option<Vec<Option<Likely<'a>>>>,
    /// Position at which each token begins, in characters.
    text_offset: Vec<usize>,
}

/// The position of the next token in a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct TextPosition {
    /// Characters before it.
    offset: usize,
    /// Whether it is the first token of an echoed prompt.
    is_first: bool,
}

impl TextPosition {
    /// Returns the position of an answer's first token, for a prompt of `prompt_chars` characters.
    pub(super) fn of(prompt_chars: usize, echo: bool) -> Self {
        Self { offset: if echo { 0 } else { prompt_chars }, is_first: echo }
    }
}

impl<'a> ChatLogprobs<'a> {
    /// Returns `None` if there are no tokens, that is, if none were requested.
    pub(crate) fn of(tokens: &'a [TokenLogprob]) -> Option<Self> {
        let content = tokens.iter().map(|token| ChatToken {
            token: top_logprob(token),
            top_logprobs: token.top.iter().map(top_logprob).collect(),
        });
        (!tokens.is_empty()).then(|| Self { content: content.collect(), refusal: () })
    }
}

impl<'a> TextLogprobs<'a> {
    /// Returns `None` if none were requested. Advances `position` past the tokens.
    pub(super) fn of(tokens: &'a [TokenLogprob], position: &mut TextPosition) -> Option<Self> {
        if tokens.is_empty() {
            return None;
        }
        let mut columns = Self::default();
        let mut tops = vec![];
        for token in tokens {
            let is_first = std::mem::take(&mut position.is_first);
            let text = text(token);
            columns.text_offset.push(position.offset);
            position.offset += text.chars().count();
            columns.tokens.push(text);
            columns.token_logprobs.push((!is_first).then_some(token.logprob));
            tops.push((!is_first).then(|| with_itself(token)));
        }
        if tokens.iter().any(|token| !token.top.is_empty()) {
            columns.top_logprobs = Some(tops);
        }
        Some(columns)
    }
}

/// Returns the most likely tokens at a token's position. The token itself is always among them.
fn with_itself(token: &TokenLogprob) -> Likely<'_> {
    token.top.iter().chain([token]).map(|token| (text(token), token.logprob)).collect()
}

fn top_logprob(token: &TokenLogprob) -> TopLogprob<'_> {
    TopLogprob { token: text(token), logprob: token.logprob, bytes: &token.bytes }
}

/// Returns a token's text. Incomplete characters become U+FFFD.
fn text(token: &TokenLogprob) -> Cow<'_, str> {
    String::from_utf8_lossy(&token.bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;

    fn token(text: &[u8], logprob: f32, top: Vec<TokenLogprob>) -> TokenLogprob {
        TokenLogprob { token: 1, bytes: text.to_vec(), logprob, top }
    }

    #[test]
    fn a_chats_tokens_tell_their_bytes_and_what_else_was_likely() {
        let tokens = [token(b"hi", -0.5, vec![token(b"hi", -0.5, vec![]), token(b"\xc3", -2.0, vec![])])];
        let expected = json!({
            "content": [{
                "token": "hi", "logprob": -0.5, "bytes": [104, 105],
                "top_logprobs": [
                    {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
                    {"token": "\u{fffd}", "logprob": -2.0, "bytes": [195]},
                ]
            }],
            "refusal": null
        });
        assert_eq!(to_value(ChatLogprobs::of(&tokens)).expect("JSON"), expected);
        assert!(ChatLogprobs::of(&[]).is_none());
    }

    #[test]
    fn nothing_comes_before_the_first_token_of_a_prompt_that_is_repeated() {
        let tokens = [token(b"a", 0.0, vec![]), token(b"b", -0.5, vec![token(b"c", -0.25, vec![])])];
        let mut position = TextPosition::of(7, true);
        let expected = json!({
            "tokens": ["a", "b"], "token_logprobs": [null, -0.5], "top_logprobs": [null, {"b": -0.5, "c": -0.25}],
            "text_offset": [0, 1]
        });
        assert_eq!(to_value(TextLogprobs::of(&tokens, &mut position)).expect("JSON"), expected);
        let more = [token(b"d", -1.0, vec![])];
        let expected = json!({"tokens": ["d"], "token_logprobs": [-1.0], "text_offset": [2]});
        assert_eq!(to_value(TextLogprobs::of(&more, &mut position)).expect("JSON"), expected);
    }

    #[test]
    fn a_texts_tokens_come_in_columns_with_offsets_that_go_on() {
        let first = [token("né".as_bytes(), -0.5, vec![token(b"no", -0.25, vec![])])];
        let mut offset = TextPosition::default();
        let expected = json!({
            "tokens": ["né"], "token_logprobs": [-0.5], "top_logprobs": [{"né": -0.5, "no": -0.25}], "text_offset": [0]
        });
        assert_eq!(to_value(TextLogprobs::of(&first, &mut offset)).expect("JSON"), expected);
        let second = [token(b"!", -1.0, vec![])];
        let expected = json!({"tokens": ["!"], "token_logprobs": [-1.0], "text_offset": [2]});
        assert_eq!(to_value(TextLogprobs::of(&second, &mut offset)).expect("JSON"), expected);
        assert_eq!((TextLogprobs::of(&[], &mut offset), offset.offset), (None, 3));
    }
}
