//! Our engine, in a process of its own.

use std::fs::File;
use std::path::Path;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::future::ready;
use futures_util::stream::BoxStream;
use tether_engine::{
    AdapterId, ChildCommand, Event, GenerateRequest, LoadOptions, ModelId, ModelRuntime, ProcessRuntime, PromptInput,
    Sampling, VerifiedArtifact, no_progress,
};

use crate::side::{Question, Side};
use crate::{Model, SLOTS, THREADS};

const PRESENCE_PENALTY_MAX: f32 = 2.0;

pub(crate) struct Ours {
    runtime: ProcessRuntime,
    model: ModelId,
    adapters: Vec<AdapterId>,
}

impl Ours {
    /// Loads a model that suggests up to so many tokens at once.
    pub(crate) async fn load(model: &Model, draft_tokens: u32) -> Self {
        let program = env!("CARGO_BIN_EXE_engine-host").into();
        let runtime = ProcessRuntime::new(ChildCommand { program, args: vec!["llama".into()], envs: Vec::new() });
        let options = LoadOptions {
            context_length: model.context,
            slots: SLOTS,
            threads: THREADS,
            draft_tokens,
            ..LoadOptions::default()
        };
        let loaded = runtime.load(artifact(&model.path), options, no_progress()).await.unwrap();
        Self { runtime, model: loaded.id, adapters: Vec::new() }
    }

    pub(crate) async fn add_adapters(&mut self, model: &Model) {
        for adapter in &model.adapters {
            self.adapters.push(self.runtime.add_adapter(self.model, artifact(adapter)).await.unwrap());
        }
    }

    pub(crate) fn describe(&self) -> String {
        self.runtime.describe().detail
    }

    /// Returns which share of the tokens suggested so far was right.
    pub(crate) fn accepted_share(&self) -> f64 {
        let counters = self.runtime.load_state()[0].counters;
        counters.accepted_tokens as f64 / counters.drafted_tokens as f64
    }

    pub(crate) async fn stop(self) {
        self.runtime.shut_down().await;
    }
}

#[async_trait]
impl Side for Ours {
    async fn ask(&self, question: Question<'_>) -> BoxStream<'static, Vec<u32>> {
        let request = GenerateRequest {
            adapter: question.adapter.map(|index| self.adapters[index]),
            sampling: Sampling {
                temperature: question.temperature,
                presence_penalty: if question.varied { PRESENCE_PENALTY_MAX } else { 0.0 },
                ..Sampling::default()
            },
            prediction: (!question.prediction.is_empty()).then(|| PromptInput::Tokens(question.prediction.to_vec())),
            continued: question.continued.to_vec(),
            max_tokens: Some(question.tokens),
            ignore_eos: true,
            ..GenerateRequest::new(self.model, PromptInput::Tokens(question.prompt.to_vec()))
        };
        let events = self.runtime.generate(request).await.unwrap();
        let tokens = events.filter_map(|event| {
            ready(match event.unwrap() {
                Event::Piece(piece) => Some(piece.tokens),
                Event::Started { .. } | Event::Progress(_) | Event::Done { .. } => None,
            })
        });
        tokens.filter(|tokens| ready(!tokens.is_empty())).boxed()
    }
}

fn artifact(path: &Path) -> VerifiedArtifact {
    let file = File::open(path).unwrap();
    let bytes = file.metadata().unwrap().len();
    VerifiedArtifact { file, sha256: String::new(), bytes, parts: Vec::new() }
}
