//! Mock embedding vectors, which are meaningless but equal for equal texts, and scores, which count equal words.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::MockRuntime;
use crate::model_runtime::{EngineError, PromptInput, unsupported};

/// Returns the vector of a text, normalised to length 1.
pub(super) fn vector(input: &PromptInput) -> Result<Vec<f32>, EngineError> {
    let number = |index: u32| {
        let mut hasher = DefaultHasher::new();
        match input {
            PromptInput::Text(text) => text.hash(&mut hasher),
            PromptInput::Tokens(tokens) => tokens.hash(&mut hasher),
            PromptInput::Chat(_) => {}
        }
        index.hash(&mut hasher);
        // Never 0, so that the length is never 0 either.
        (hasher.finish() % 1_000) as f32 + 1.0
    };
    if let PromptInput::Chat(_) = input {
        return Err(unsupported("input", "a conversation has no vector"));
    }
    let numbers: Vec<f32> = (0..MockRuntime::EMBEDDING_LENGTH).map(number).collect();
    let length = numbers.iter().map(|number| number * number).sum::<f32>().sqrt();
    Ok(numbers.into_iter().map(|number| number / length).collect())
}

/// Returns the share of a query's words that a text has.
pub(super) fn relevance(query: &str, text: &str) -> f32 {
    let words: Vec<&str> = query.split_whitespace().collect();
    let found = words.iter().filter(|word| text.split_whitespace().any(|other| other == **word)).count();
    found as f32 / words.len().max(1) as f32
}
