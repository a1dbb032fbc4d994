//! Parses embedding vectors as servers write them: numbers, or Base64 of little-endian floats.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::model_runtime::{Embeddings, EngineError};

/// Parses the response to `POST /v1/embeddings` for `count` texts, and normalises each vector to length 1.
pub fn read_embeddings(body: &[u8], count: usize) -> Result<Embeddings, EngineError> {
    let answer: EmbeddingsResponse = serde_json::from_slice(body).map_err(|_| malformed())?;
    let mut vectors = vec![Vec::new(); count];
    for (position, item) in answer.data.into_iter().enumerate() {
        let vector = item.embedding.into_numbers().ok_or_else(malformed)?;
        *vectors.get_mut(item.index.unwrap_or(position)).ok_or_else(malformed)? = normalised(vector)?;
    }
    let length = vectors.first().map_or(0, Vec::len);
    if length == 0 || vectors.iter().any(|vector| vector.len() != length) {
        return Err(malformed());
    }
    Ok(Embeddings { vectors, prompt_tokens: answer.usage.map(|usage| usage.prompt_tokens).unwrap_or_default() })
}

fn normalised(mut vector: Vec<f32>) -> Result<Vec<f32>, EngineError> {
    let length = vector.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt();
    if !length.is_finite() {
        return Err(malformed());
    }
    if length > 0.0 {
        for number in &mut vector {
            *number = (f64::from(*number) / length) as f32;
        }
    }
    Ok(vector)
}

fn malformed() -> EngineError {
    EngineError::Failed { reason: "the vectors are not as they should be".into() }
}

#[derive(Deserialize)]
struct EmbeddingsResponse {
    data: Vec<Item>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Item {
    index: Option<usize>,
    embedding: Vector,
}

#[derive(Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u32,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

impl Vector {
    fn into_numbers(self) -> Option<Vec<f32>> {
        match self {
            Self::Numbers(numbers) => Some(numbers),
            Self::Base64(text) => {
                let bytes = STANDARD.decode(text).ok()?;
                let (floats, rest) = bytes.as_chunks::<4>();
                rest.is_empty().then(|| floats.iter().map(|float| f32::from_le_bytes(*float)).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_base64_give_the_same_vectors_in_the_order_asked_for() {
        let numbers = br#"{"data":[{"index":1,"embedding":[0.0,2.0]},{"index":0,"embedding":[3.0,4.0]}],"usage":{"prompt_tokens":5}}"#;
        let expected = Embeddings { vectors: vec![vec![0.6, 0.8], vec![0.0, 1.0]], prompt_tokens: 5 };
        assert_eq!(read_embeddings(numbers, 2), Ok(expected));
        let base64 = br#"{"data":[{"index":0,"embedding":"AABAQAAAgEA="}]}"#;
        assert_eq!(read_embeddings(base64, 1).expect("read").vectors, [[0.6, 0.8]]);
    }

    #[test]
    fn vectors_that_are_missing_uneven_or_endless_are_refused() {
        for body in [
            r#"{"data":[{"embedding":[1.0]}]}"#,
            r#"{"data":[{"embedding":[1.0]},{"embedding":[1.0,2.0]}]}"#,
            r#"{"data":[{"embedding":[1e39]},{"embedding":[1.0]}]}"#,
            r#"{"data":[{"embedding":"AAA"},{"embedding":"AAAAAA=="}]}"#,
            r#"{"data":[{"index":9,"embedding":[1.0]},{"embedding":[1.0]}]}"#,
            r#"{"data":[{"embedding":[]},{"embedding":[]}]}"#,
        ] {
            assert!(read_embeddings(body.as_bytes(), 2).is_err(), "{body}");
        }
    }
}
