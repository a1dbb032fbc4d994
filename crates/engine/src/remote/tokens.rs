//! Lists of tokens, as servers with `POST /tokenize` write them: llama-server, vLLM and SGLang.

use serde_json::Value;

use crate::model_runtime::ListedToken;

/// Parses a list of tokens: ids with `token_strs` beside them, or objects with id and piece.
pub fn read_tokens(answer: &Value) -> Option<Vec<ListedToken>> {
    let texts = answer["token_strs"].as_array();
    let text = |index: usize| texts.and_then(|texts| texts.get(index)).unwrap_or(&Value::Null);
    let listed = |(index, token): (usize, &Value)| match token {
        Value::Object(token) => Some(ListedToken { id: id(token.get("id")?)?, bytes: bytes(token.get("piece")?)? }),
        token => Some(ListedToken { id: id(token)?, bytes: bytes(text(index))? }),
    };
    answer["tokens"].as_array()?.iter().enumerate().map(listed).collect()
}

/// Returns tokens with a text that their server wrote for all of them together, at the first one.
pub(super) fn with_text(tokens: &[u32], text: String) -> Vec<ListedToken> {
    let mut listed: Vec<_> = tokens.iter().map(|id| ListedToken { id: *id, bytes: vec![] }).collect();
    if let Some(first) = listed.first_mut() {
        first.bytes = text.into_bytes();
    }
    listed
}

fn id(id: &Value) -> Option<u32> {
    u32::try_from(id.as_u64()?).ok()
}

/// Reads the text of a token, or its bytes if they are no text.
fn bytes(piece: &Value) -> Option<Vec<u8>> {
    match piece {
        Value::Null => Some(vec![]),
        Value::String(text) => Some(text.as_bytes().to_vec()),
        Value::Array(bytes) => bytes.iter().map(|byte| u8::try_from(byte.as_u64()?).ok()).collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listed(id: u32, bytes: &[u8]) -> ListedToken {
        ListedToken { id, bytes: bytes.to_vec() }
    }

    #[test]
    fn tokens_are_read_in_three_forms() {
        let pieces = json!({"tokens": [{"id": 1, "piece": "He"}, {"id": 2, "piece": [195]}]});
        assert_eq!(read_tokens(&pieces), Some(vec![listed(1, b"He"), listed(2, &[195])]));
        let texts = json!({"count": 1, "tokens": [7], "token_strs": ["He"]});
        assert_eq!(read_tokens(&texts), Some(vec![listed(7, b"He")]));
        assert_eq!(read_tokens(&json!({"tokens": [7], "token_strs": null})), Some(vec![listed(7, b"")]));
    }

    #[test]
    fn what_is_no_list_of_tokens_is_refused() {
        for answer in [
            json!({}),
            json!({"tokens": [-1]}),
            json!({"tokens": [{"id": 1}]}),
            json!({"tokens": [{"id": 1, "piece": [256]}]}),
            json!({"tokens": ["a"]}),
        ] {
            assert_eq!(read_tokens(&answer), None, "{answer}");
        }
    }
}
