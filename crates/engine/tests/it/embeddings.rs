//! Vectors of texts, for any shape of context and vocabulary.

use tether_engine::{
    EmbedRequest, Embeddings, EngineError, LoadOptions, ModelId, ModelRuntime, PromptInput, no_progress,
};

use crate::process_runtime::host;
use crate::quantized_model::{Kind, QuantizedModel};
use crate::{options, within};

/// A text of so many tokens.
fn tokens(count: u32, seed: u32) -> PromptInput {
    PromptInput::Tokens((0..count).map(|index| (index * 7 + seed * 31) % 251).collect())
}

async fn embed(runtime: &dyn ModelRuntime, model: ModelId, inputs: Vec<PromptInput>) -> Embeddings {
    within(runtime.embed(EmbedRequest { model, inputs })).await.expect("it makes vectors")
}

fn assert_equal(one: &[f32], other: &[f32], what: &str) {
    let largest = one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max);
    assert!(largest < 1e-3, "{what}: {largest}");
}

#[tokio::test]
async fn texts_of_any_length_are_embedded_in_contexts_of_any_length() {
    // With this vocabulary, a budget for logits once gave batches that were no multiple of the sequences, and an
    // assertion of llama.cpp ended the process.
    let shape = QuantizedModel {
        architecture: "llama",
        kind: Kind::Q8_0,
        vocabulary: 17_000,
        context_length: 4_096,
        chat_template: None,
    };
    for context_length in [33, 1_000, 4_096] {
        let runtime = host(&["llama"]);
        let options = LoadOptions { context_length, slots: 1, kv_tokens: context_length, ..options() };
        let model = within(runtime.load(shape.artifact(), options, no_progress())).await.expect("it loads").id;
        let lengths = [1, 32, context_length, 7];
        let texts: Vec<PromptInput> = (0..).zip(lengths).map(|(seed, length)| tokens(length, seed)).collect();
        let together = embed(&runtime, model, texts.clone()).await;
        assert_eq!(together.prompt_tokens, lengths.iter().sum::<u32>());
        for (text, vector) in texts.into_iter().zip(&together.vectors) {
            let alone = embed(&runtime, model, vec![text]).await;
            assert_equal(&alone.vectors[0], vector, &format!("a context of {context_length}"));
        }
        let refused = within(runtime.embed(EmbedRequest { model, inputs: vec![tokens(context_length + 1, 1)] })).await;
        let too_long = EngineError::ContextLength { prompt_tokens: context_length + 1, context_length };
        assert_eq!(refused, Err(too_long));
    }
}
