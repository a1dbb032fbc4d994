//! Log-probabilities, in the two forms that OpenAI's endpoints have for them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use protocol::infer::TokenLogprob;
use serde::Serialize;

/// Those of a chat: one entry a token.
#[derive(Serialize)]
pub(super) struct ChatLogprobs<'a> {
    content: Vec<ChatToken<'a>>,
    refusal: (),
}

#[derive(Serialize)]
struct ChatToken<'a> {
    #[serde(flatten)]
    told: Told<'a>,
    top_logprobs: Vec<Told<'a>>,
}

#[derive(Serialize)]
struct Told<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    bytes: &'a [u8],
}

/// Those of a text completion: one column for each fact.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct TextLogprobs<'a> {
    tokens: Vec<Cow<'a, str>>,
    token_logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<BTreeMap<Cow<'a, str>, f32>>>,
    text_offset: Vec<usize>,
}

impl<'a> ChatLogprobs<'a> {
    /// Returns `None` where none were asked for.
    pub(super) fn of(tokens: &'a [TokenLogprob]) -> Option<Self> {
        let content = tokens
            .iter()
            .map(|token| ChatToken { told: told(token), top_logprobs: token.top.iter().map(told).collect() });
        (!tokens.is_empty()).then(|| Self { content: content.collect(), refusal: () })
    }
}

impl<'a> TextLogprobs<'a> {
    /// Returns `None` where none were asked for. `offset` counts the characters before them, and then those after.
    pub(super) fn of(tokens: &'a [TokenLogprob], offset: &mut usize) -> Option<Self> {
        if tokens.is_empty() {
            return None;
        }
        let mut columns = Self::default();
        for token in tokens {
            let text = text(token);
            columns.text_offset.push(*offset);
            *offset += text.chars().count();
            columns.tokens.push(text);
            columns.token_logprobs.push(token.logprob);
        }
        if tokens.iter().any(|token| !token.top.is_empty()) {
            // The token itself is among them, whether it was likely or not.
            let with_itself = |token: &'a TokenLogprob| {
                let all = token.top.iter().chain([token]);
                all.map(|told| (text(told), told.logprob)).collect()
            };
            columns.top_logprobs = Some(tokens.iter().map(with_itself).collect());
        }
        Some(columns)
    }
}

fn told(token: &TokenLogprob) -> Told<'_> {
    Told { token: text(token), logprob: token.logprob, bytes: &token.bytes }
}

/// Returns a token's text. Where it is part of a character only its bytes tell which.
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
    fn a_texts_tokens_come_in_columns_with_offsets_that_go_on() {
        let first = [token("né".as_bytes(), -0.5, vec![token(b"no", -0.25, vec![])])];
        let mut offset = 0;
        let expected = json!({
            "tokens": ["né"], "token_logprobs": [-0.5], "top_logprobs": [{"né": -0.5, "no": -0.25}], "text_offset": [0]
        });
        assert_eq!(to_value(TextLogprobs::of(&first, &mut offset)).expect("JSON"), expected);
        let second = [token(b"!", -1.0, vec![])];
        let expected = json!({"tokens": ["!"], "token_logprobs": [-1.0], "text_offset": [2]});
        assert_eq!(to_value(TextLogprobs::of(&second, &mut offset)).expect("JSON"), expected);
        assert_eq!((TextLogprobs::of(&[], &mut offset), offset), (None, 3));
    }
}
