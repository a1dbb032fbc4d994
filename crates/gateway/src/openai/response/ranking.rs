//! Ranked documents, in the format that Jina's and Cohere's clients share.

use protocol::CorrelationId;
use serde::Serialize;
use utoipa::ToSchema;

use super::vectors::EmbeddingUsage;
use crate::answer::Whole;
use crate::openai::request::Reranking;

/// Documents by their relevance to the query, the most relevant first.
#[derive(Serialize, ToSchema)]
pub(crate) struct RerankResponse<'a> {
    id: String,
    /// `list`.
    object: &'static str,
    model: &'a str,
    results: Vec<RankedDocument<'a>>,
    usage: EmbeddingUsage,
    meta: RerankMeta,
}

#[derive(Serialize, ToSchema)]
struct RankedDocument<'a> {
    /// Index of the document in the request, from 0.
    index: u32,
    /// The higher, the more relevant. Scores of different models cannot be compared.
    relevance_score: f32,
    /// Absent unless `return_documents` is true.
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<RankedText<'a>>,
}

#[derive(Serialize, ToSchema)]
struct RankedText<'a> {
    text: &'a str,
}

/// The usage once more, where Cohere's clients look for it.
#[derive(Serialize, ToSchema)]
struct RerankMeta {
    tokens: RerankTokens,
}

#[derive(Serialize, ToSchema)]
struct RerankTokens {
    input_tokens: u32,
    /// Always 0, because a ranking generates no tokens.
    output_tokens: u32,
}

impl<'a> RerankResponse<'a> {
    /// Ranks the documents by their scores. Equal ones keep the order of the request. Returns `None` if a worker sent
    /// something other than scores.
    pub(crate) fn of(asked: &'a Reranking, id: CorrelationId, whole: &Whole) -> Option<Self> {
        let document = |index: usize| {
            asked.documents.as_ref().and_then(|documents| documents.get(index)).map(|text| RankedText { text })
        };
        let ranked = |(index, score): (u32, Option<f32>)| {
            Some(RankedDocument { index, relevance_score: score?, document: document(index as usize) })
        };
        let mut results: Vec<_> = (0..).zip(scores(whole)).map(ranked).collect::<Option<_>>()?;
        results.sort_by(|one, other| other.relevance_score.total_cmp(&one.relevance_score));
        results.truncate(asked.top_n.map_or(usize::MAX, |count| count as usize));
        let usage = EmbeddingUsage::of(whole.usage);
        let tokens = RerankTokens { input_tokens: whole.usage.prompt_tokens, output_tokens: 0 };
        let (id, model) = (format!("rerank-{}", id.0.simple()), &*asked.model);
        Some(Self { id, object: "list", model, results, usage, meta: RerankMeta { tokens } })
    }
}

/// Returns the score of each document. A score is a vector of length 1.
fn scores(whole: &Whole) -> impl Iterator<Item = Option<f32>> {
    whole.embeddings.iter().map(|embedding| match *embedding.vector()? {
        [score] if score.is_finite() => Some(score),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use protocol::infer::Embedding;
    use protocol::usage::TokenUsage;
    use serde_json::{Value, json};

    use super::*;
    use crate::openai::request::parse_rerank;

    const ID: &str = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f";

    fn written(fields: &Value, vectors: &[&[f32]]) -> Option<Value> {
        let mut body = json!({"model": "m", "query": "q", "documents": ["a", "b", "c"]});
        body.as_object_mut()?.extend(fields.as_object()?.clone());
        let asked = parse_rerank(body.to_string().as_bytes()).expect("well formed");
        let embeddings = (0..).zip(vectors).map(|(index, vector)| Embedding::new(index, vector)).collect();
        let usage = TokenUsage { prompt_tokens: 9, ..TokenUsage::default() };
        let whole = Whole { choices: vec![], embeddings, input_tokens: None, listed_tokens: vec![], usage };
        let response = RerankResponse::of(&asked, ID.parse().expect("an id"), &whole)?;
        Some(serde_json::to_value(&response).expect("JSON"))
    }

    #[test]
    fn the_most_relevant_come_first_and_equal_ones_in_their_order() {
        let written = written(&json!({}), &[&[0.5], &[0.75], &[0.5]]).expect("scores");
        let expected = json!({
            "id": "rerank-018f3c2e7b1a7c3d9e4f5a6b7c8d9e0f", "object": "list", "model": "m",
            "results": [
                {"index": 1, "relevance_score": 0.75},
                {"index": 0, "relevance_score": 0.5},
                {"index": 2, "relevance_score": 0.5},
            ],
            "usage": {"prompt_tokens": 9, "total_tokens": 9},
            "meta": {"tokens": {"input_tokens": 9, "output_tokens": 0}},
        });
        assert_eq!(written, expected);
    }

    #[test]
    fn as_many_as_wanted_come_with_their_documents_if_wanted() {
        let asked = json!({"top_n": 1, "return_documents": true});
        let written = written(&asked, &[&[-0.5], &[0.25], &[0.125]]).expect("scores");
        assert_eq!(written["results"], json!([{"index": 1, "relevance_score": 0.25, "document": {"text": "b"}}]));
    }

    #[test]
    fn vectors_are_no_scores() {
        for vector in [&[1.0, 0.0][..], &[], &[f32::NAN]] {
            assert_eq!(written(&json!({}), &[vector; 3]), None, "{vector:?}");
        }
    }
}
