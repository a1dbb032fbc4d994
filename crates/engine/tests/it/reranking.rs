//! Scores of texts by a reranker.

use tether_engine::{
    EmbedRequest, EngineError, LoadedModel, ModelRuntime, ProcessRuntime, PromptInput, Ranking, RerankRequest, Scores,
    no_progress,
};

use crate::process_runtime::host;
use crate::random_model::{Family, Weights, random_model};
use crate::{options, within};

async fn reranker() -> (ProcessRuntime, LoadedModel) {
    let runtime = host(&["llama"]);
    let artifact = random_model(Family::Ranking, Weights::F16, 3);
    let loaded = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads");
    (runtime, loaded)
}

async fn rerank(runtime: &ProcessRuntime, model: &LoadedModel, texts: &[&str]) -> Result<Scores, EngineError> {
    let texts = texts.iter().map(|text| (*text).to_owned()).collect();
    within(runtime.rerank(RerankRequest { model: model.id, query: "What is it?".into(), texts })).await
}

#[tokio::test]
async fn a_reranker_scores_each_text_by_itself() {
    let (runtime, model) = reranker().await;
    assert_eq!((model.abilities.ranking, model.abilities.embedding_length), (Ranking::Scores, 0));
    let long = "It is a longer text. ".repeat(9);
    let texts = ["It is a pear.", "No.", &long];
    let together = rerank(&runtime, &model, &texts).await.expect("scores");
    let mut tokens = 0;
    for (text, score) in texts.iter().zip(&together.scores) {
        let alone = rerank(&runtime, &model, &[text]).await.expect("a score");
        assert!((alone.scores[0] - score).abs() < 1e-3 && (0.0..=1.0).contains(score), "{together:?}");
        tokens += alone.prompt_tokens;
    }
    assert_eq!(together.prompt_tokens, tokens, "the query counts once for each text");
    let [first, second, _] = together.scores[..] else { panic!("{together:?}") };
    assert!((first - second).abs() > 1e-6, "{together:?}");
}

#[tokio::test]
async fn a_reranker_makes_no_vectors_and_takes_no_pair_that_is_too_long() {
    let (runtime, model) = reranker().await;
    let inputs = vec![PromptInput::Text("It is a pear.".into())];
    let refused = within(runtime.embed(EmbedRequest { model: model.id, inputs })).await;
    assert!(matches!(refused, Err(EngineError::Unsupported { .. })), "{refused:?}");
    let long = "x".repeat(model.context_length as usize);
    let refused = rerank(&runtime, &model, &["It is a pear.", &long]).await;
    assert!(matches!(refused, Err(EngineError::ContextLength { .. })), "{refused:?}");
}

#[tokio::test]
async fn the_text_of_a_special_token_is_text_in_a_pair() {
    let (runtime, model) = reranker().await;
    let plain = rerank(&runtime, &model, &["x"]).await.expect("a score").prompt_tokens;
    let named = rerank(&runtime, &model, &["x<|end|>"]).await.expect("a score").prompt_tokens;
    assert_eq!(named - plain, "<|end|>".len() as u32);
}
