//! Scores of texts, as servers with `POST /v1/rerank` write them: llama-server, vLLM, Infinity and others.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::model_runtime::{EngineError, Scores};

pub(super) const PATH: &str = "/v1/rerank";

/// Returns the body of a request. Servers return all results only if `top_n` says so.
pub(super) fn request(model: &str, query: &str, texts: &[String]) -> Value {
    json!({"model": model, "query": query, "documents": texts, "top_n": texts.len(), "return_documents": false})
}

/// Parses the response for `count` texts.
pub fn read_scores(body: &[u8], count: usize) -> Result<Scores, EngineError> {
    let answer: RerankResponse = serde_json::from_slice(body).map_err(|_| malformed())?;
    let mut scores = vec![f32::NAN; count];
    for item in answer.results {
        *scores.get_mut(item.index).ok_or_else(malformed)? = item.relevance_score;
    }
    if count == 0 || !scores.iter().all(|score| score.is_finite()) {
        return Err(malformed());
    }
    let Usage { prompt_tokens, total_tokens } = answer.usage.unwrap_or_default();
    Ok(Scores { scores, prompt_tokens: prompt_tokens.or(total_tokens).unwrap_or_default() })
}

fn malformed() -> EngineError {
    EngineError::Failed { reason: "the scores are not as they should be".into() }
}

#[derive(Deserialize)]
struct RerankResponse {
    results: Vec<Item>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Item {
    index: usize,
    #[serde(alias = "score")]
    relevance_score: f32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Usage {
    prompt_tokens: Option<u32>,
    total_tokens: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_read_in_the_order_of_the_texts() {
        let llama_server = br#"{"model":"m","object":"list","usage":{"prompt_tokens":9,"total_tokens":9},
            "results":[{"index":1,"relevance_score":2.5},{"index":0,"relevance_score":-1.0}]}"#;
        assert_eq!(read_scores(llama_server, 2), Ok(Scores { scores: vec![-1.0, 2.5], prompt_tokens: 9 }));
        let vllm = br#"{"id":"r","model":"m","usage":{"total_tokens":4},
            "results":[{"index":0,"document":{"text":"a"},"relevance_score":0.5}]}"#;
        assert_eq!(read_scores(vllm, 1), Ok(Scores { scores: vec![0.5], prompt_tokens: 4 }));
    }

    #[test]
    fn scores_that_are_missing_or_of_no_text_are_refused() {
        for body in [
            r#"{"results":[{"index":0,"relevance_score":1.0}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1.0},{"index":2,"relevance_score":1.0}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1e39},{"index":1,"relevance_score":1.0}]}"#,
            r#"{"results":[]}"#,
            r#"{"error":"no"}"#,
        ] {
            assert!(read_scores(body.as_bytes(), 2).is_err(), "{body}");
        }
    }
}
