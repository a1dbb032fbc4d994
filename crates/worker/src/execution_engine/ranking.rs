//! Ranks texts by the vectors of a model that was made for embeddings.

use engine::{Embeddings, EngineError};

/// Replaces the vectors of texts by scores: the cosine with the last vector, which is the query's.
pub(super) fn by_cosine(embeddings: Embeddings) -> Embeddings {
    let Embeddings { mut vectors, prompt_tokens } = embeddings;
    let query = vectors.pop().unwrap_or_default();
    // The vectors have length 1.
    let cosine = |vector: Vec<f32>| vec![vector.iter().zip(&query).map(|(one, other)| one * other).sum()];
    Embeddings { vectors: vectors.into_iter().map(cosine).collect(), prompt_tokens }
}

/// Checks that there is a result for each text.
pub(super) fn check_count(results: usize, texts: usize) -> Result<(), EngineError> {
    if results == texts {
        return Ok(());
    }
    Err(EngineError::Failed { reason: format!("{results} results for {texts} texts") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_scored_by_the_cosine_with_the_last_vector() {
        let vectors = vec![vec![0.6, 0.8], vec![-1.0, 0.0], vec![1.0, 0.0]];
        let scored = by_cosine(Embeddings { vectors, prompt_tokens: 7 });
        assert_eq!(scored, Embeddings { vectors: vec![vec![0.6], vec![-1.0]], prompt_tokens: 7 });
    }

    #[test]
    fn a_missing_result_is_a_failure_of_the_engine() {
        assert!(check_count(2, 2).is_ok() && check_count(1, 2).is_err());
    }
}
