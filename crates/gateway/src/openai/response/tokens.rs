//! Lists of tokens, in the formats of vLLM and llama-server together.

use protocol::infer::ListedToken;
use serde::Serialize;
use utoipa::ToSchema;

use crate::answer::Whole;

/// The tokens of a prompt.
#[derive(Serialize, ToSchema)]
pub(crate) struct TokenList {
    /// The ids, or objects with the texts if `with_pieces` is true.
    tokens: Vec<TokenItem>,
    count: u32,
    /// Context length of the model in tokens; 0 if it is unknown.
    max_model_len: u32,
    /// The texts of the tokens, if `return_token_strs` is true. Incomplete characters are replaced by U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum TokenItem {
    Id(u32),
    Piece { id: u32, piece: TokenPiece },
}

/// The text of a token, or its bytes if they are not valid UTF-8.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum TokenPiece {
    Text(String),
    Bytes(Vec<u8>),
}

/// The text of tokens, under the names of vLLM and of llama-server.
#[derive(Serialize, ToSchema)]
pub(crate) struct DetokenizedText {
    prompt: String,
    content: String,
}

impl TokenList {
    /// Returns `None` if a worker did not list the tokens.
    pub(crate) fn of(whole: &Whole, max_model_len: u32, with_pieces: bool, with_texts: bool) -> Option<Self> {
        let tokens = complete(whole)?;
        let item = |token: &ListedToken| {
            if with_pieces {
                TokenItem::Piece { id: token.id, piece: TokenPiece::of(&token.bytes) }
            } else {
                TokenItem::Id(token.id)
            }
        };
        let text = |token: &ListedToken| String::from_utf8_lossy(&token.bytes).into_owned();
        Some(Self {
            tokens: tokens.iter().map(item).collect(),
            count: tokens.len() as u32,
            max_model_len,
            token_strs: with_texts.then(|| tokens.iter().map(text).collect()),
        })
    }
}

impl TokenPiece {
    fn of(bytes: &[u8]) -> Self {
        match str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Bytes(bytes.to_vec()),
        }
    }
}

impl DetokenizedText {
    /// Returns `None` if a worker did not list the tokens.
    pub(crate) fn of(whole: &Whole) -> Option<Self> {
        let bytes: Vec<u8> = complete(whole)?.iter().flat_map(|token| token.bytes.iter().copied()).collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Some(Self { prompt: text.clone(), content: text })
    }
}

/// Returns the listed tokens, if they are as many as were counted.
fn complete(whole: &Whole) -> Option<&[ListedToken]> {
    (whole.input_tokens? as usize == whole.listed_tokens.len()).then_some(&whole.listed_tokens)
}

#[cfg(test)]
mod tests {
    use protocol::usage::TokenUsage;
    use serde_json::{Value, json};

    use super::*;

    fn whole(count: u32) -> Whole {
        let listed = |(id, bytes): (u32, &[u8])| ListedToken { id, bytes: bytes.to_vec() };
        let listed_tokens = [(5, &b"Z"[..]), (6, &[0xc3]), (7, &[0xbc])].map(listed).to_vec();
        let usage = TokenUsage::default();
        Whole { choices: vec![], embeddings: vec![], input_tokens: Some(count), listed_tokens, usage }
    }

    fn written<T: Serialize>(value: &T) -> Value {
        serde_json::to_value(value).expect("JSON")
    }

    #[test]
    fn tokens_come_as_ids_or_with_their_texts() {
        let list = |with_pieces, with_texts| written(&TokenList::of(&whole(3), 512, with_pieces, with_texts));
        assert_eq!(list(false, false), json!({"tokens": [5, 6, 7], "count": 3, "max_model_len": 512}));
        let pieces = json!([{"id": 5, "piece": "Z"}, {"id": 6, "piece": [0xc3]}, {"id": 7, "piece": [0xbc]}]);
        assert_eq!(list(true, false)["tokens"], pieces);
        assert_eq!(list(false, true)["token_strs"], json!(["Z", "\u{fffd}", "\u{fffd}"]));
    }

    #[test]
    fn a_character_of_several_tokens_is_whole_in_their_text() {
        assert_eq!(written(&DetokenizedText::of(&whole(3))), json!({"prompt": "Z\u{fc}", "content": "Z\u{fc}"}));
    }

    #[test]
    fn a_count_without_its_tokens_is_no_list() {
        assert!(TokenList::of(&whole(4), 0, false, false).is_none() && DetokenizedText::of(&whole(4)).is_none());
    }
}
