//! The request body of `POST /v1/rerank`, as Jina's, Cohere's and vLLM's clients send it.

use protocol::WireError;
use protocol::infer::{EmbedInput, Input};
use protocol::keep_alive::KeepAlive;
use serde::Deserialize;
use utoipa::ToSchema;

use super::Count;
use crate::catalog;
use crate::class;
use crate::job::Job;
use crate::json_body::{invalid, missing, read, renamed};

/// A parsed request to rank documents.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reranking {
    pub(crate) job: Job,
    /// The model's name as the client wrote it.
    pub(crate) model: String,
    /// Number of results that the client wants; all if it says nothing.
    pub(crate) top_n: Option<u32>,
    /// The documents in the order of the request, if the results contain them.
    pub(crate) documents: Option<Vec<String>>,
}

/// Documents to rank by their relevance to a query.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct RerankRequest {
    /// `name[@MAJOR.MINOR]` of a reranker or of an embedding model. Without a version it is the newest.
    #[schema(value_type = String)]
    model: Option<String>,
    /// At most 64 KiB.
    #[schema(value_type = String, min_length = 1)]
    query: Option<String>,
    /// At most 2048 documents. The query and each of them must fit the model's context.
    #[schema(value_type = Vec<Document>, min_items = 1, max_items = 2048)]
    documents: Option<Vec<Document>>,
    /// Maximum number of results. All documents are evaluated.
    #[schema(value_type = Option<u32>, minimum = 1)]
    top_n: Option<Count>,
    /// Whether the results contain the documents.
    #[schema(default = false)]
    return_documents: Option<bool>,
    /// As in completions. Not in others' APIs.
    #[schema(value_type = Option<Value>)]
    keep_alive: Option<KeepAlive>,
    /// As in completions. Not in others' APIs.
    service_tier: Option<String>,
}

/// A text, alone or in an object.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = RerankDocument)]
#[serde(untagged, expecting = "expected a text or an object with text")]
enum Document {
    Text(String),
    Object { text: String },
}

impl Document {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { text } => text,
        }
    }
}

/// Parses the body of `POST /v1/rerank`.
pub(crate) fn parse_rerank(bytes: &[u8]) -> Result<Reranking, WireError> {
    let RerankRequest { model, query, documents, top_n, return_documents, keep_alive, service_tier } = read(bytes)?;
    let (model, name) = catalog::parse_named(model.as_deref())?;
    let query = query.ok_or_else(|| missing("query"))?;
    let documents = documents.ok_or_else(|| missing("documents"))?;
    let documents: Vec<_> = documents.into_iter().map(Document::into_text).collect();
    if top_n == Some(Count(0)) {
        return Err(invalid("top_n", "must be at least 1"));
    }
    let input = Input {
        embed: Some(documents.iter().cloned().map(EmbedInput::Text).collect()),
        query: Some(query),
        keep_alive_secs: keep_alive.map(|KeepAlive(secs)| secs),
        ..Input::default()
    };
    input.check().map_err(|problem| renamed(problem.into(), "embed", "documents"))?;
    let class = service_tier.as_deref().map(class::of_tier).transpose()?.flatten();
    Ok(Reranking {
        job: Job { class, ..Job::new(model, input) },
        model: name,
        top_n: top_n.map(|Count(count)| count),
        documents: return_documents.unwrap_or(false).then_some(documents),
    })
}

#[cfg(test)]
mod tests {
    use protocol::ErrorCode;
    use serde_json::{Value, json};

    use super::*;

    fn rerank(mut more: Value) -> Result<Reranking, WireError> {
        let mut body = json!({"model": "m", "query": "q", "documents": ["a", {"text": "b"}]});
        body.as_object_mut().expect("fields").append(more.as_object_mut().expect("fields"));
        parse_rerank(body.to_string().as_bytes())
    }

    #[test]
    fn documents_are_texts_alone_or_in_objects() {
        let Reranking { job, model, top_n, documents } = rerank(json!({})).expect("well formed");
        let texts = ["a", "b"].map(|text| EmbedInput::Text(text.into())).to_vec();
        assert_eq!((job.input.embed, job.input.query.as_deref()), (Some(texts), Some("q")));
        assert_eq!((model.as_str(), top_n, documents), ("m", None, None));
        let asked =
            rerank(json!({"top_n": 1.0, "return_documents": true, "max_chunks_per_doc": 9})).expect("well formed");
        assert_eq!((asked.top_n, asked.documents), (Some(1), Some(vec!["a".into(), "b".into()])));
    }

    #[test]
    fn a_field_at_fault_is_named() {
        for (fields, param) in [
            (json!({"query": null}), "query"),
            (json!({"query": ""}), "query"),
            (json!({"query": "x".repeat(65_537)}), "query"),
            (json!({"documents": []}), "documents"),
            (json!({"documents": null}), "documents"),
            (json!({"documents": [""]}), "documents"),
            (json!({"documents": vec!["a"; 2049]}), "documents"),
            (json!({"documents": ["a", {"image": "x"}]}), "documents[1]"),
            (json!({"top_n": 0}), "top_n"),
        ] {
            let error = rerank(fields).expect_err(param);
            assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some(param)), "{error}");
        }
    }
}
