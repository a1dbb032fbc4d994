//! Every kind of request to every kind of model: no combination ends a process or gives NaN.

use tether_engine::{
    EmbedRequest, GenerateRequest, Kernels, LoadOptions, Message, ModelRuntime, PromptInput, Role, Sampling,
    no_progress,
};

use crate::process_runtime::host;
use crate::quantized_model::{Kind, QuantizedModel};
use crate::{options, run, within};

const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";

#[tokio::test]
async fn every_model_answers_chats_texts_and_embeddings_in_every_quantization_with_and_without_our_kernels() {
    let runtime = host(&["llama"]);
    for architecture in ["llama", "qwen2", "gemma3"] {
        let kinds = [Kind::F16, Kind::Q4_0, Kind::Q4_1, Kind::Q8_0, Kind::Q4_K_M];
        for (kind, kernels) in kinds.into_iter().flat_map(|kind| [(kind, Kernels::Auto), (kind, Kernels::Off)]) {
            let what = format!("{architecture} in {kind:?}, kernels {kernels:?}");
            let shape = QuantizedModel {
                architecture,
                kind,
                vocabulary: 1_000,
                context_length: 300,
                chat_template: Some(TEMPLATE),
            };
            let options = LoadOptions { slots: 2, kernels, ..options() };
            let loaded = within(runtime.load(shape.artifact(), options, no_progress())).await;
            let model = loaded.unwrap_or_else(|error| panic!("{what}: {error}")).id;
            // Longer than the window of the one that has one, and than what one step takes beside others.
            let long = "abc d".repeat(40);
            for input in [
                PromptInput::Chat(vec![Message::new(Role::User, long.clone())].into()),
                PromptInput::Text(long.clone()),
                PromptInput::Text("a".into()),
            ] {
                let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
                let request = GenerateRequest {
                    sampling,
                    max_tokens: Some(20),
                    ignore_eos: true,
                    logprobs: Some(2),
                    ..GenerateRequest::new(model, input)
                };
                let answer = run(&runtime, request).await;
                assert_eq!(answer.tokens.len(), 20, "{what}: {answer:?}");
            }
            let inputs = vec![PromptInput::Text(long), PromptInput::Text("a".into())];
            let made = within(runtime.embed(EmbedRequest { model, inputs })).await;
            let made = made.unwrap_or_else(|error| panic!("{what}: {error}"));
            for vector in made.vectors {
                let length: f32 = vector.iter().map(|number| number * number).sum();
                assert!((length - 1.0).abs() < 1e-4, "{what}: {length}");
            }
            within(runtime.unload(model)).await.expect("it was loaded");
        }
    }
}
