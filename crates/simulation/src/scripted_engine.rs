//! An engine whose answers are known: each token of an answer follows from its prompt and its position.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use engine::hardware::Hardware;
use engine::{
    EngineError, Event, GenerateRequest, GenerateStream, LoadOptions, LoadSnapshot, LoadedModel, MemoryPlan,
    MockOptions, MockRuntime, ModelId, ModelRuntime, Piece, ProgressSink, PromptInput, RuntimeInfo, VerifiedArtifact,
};
use parking_lot::Mutex;
use protocol::Digest;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::findings::Findings;

/// The length of an answer whose request sets no limit.
pub const ANSWER_TOKENS: u32 = 40;
const EVENTS_MAX: usize = 256;

/// Returns a token of the answer to a prompt, counted from 0.
pub fn token(prompt: &str, index: u32) -> u32 {
    let digest = Digest::of(format!("{prompt} {index}").as_bytes()).0;
    u32::from_le_bytes([digest[0], digest[1], digest[2], 0])
}

/// Returns the text of a token of the answer to a prompt.
pub fn word(prompt: &str, index: u32) -> String {
    format!("{index}:{} ", token(prompt, index))
}

/// Replaces the words of the mock, which keeps slots, queue, pace and counters, by those of the script.
pub struct ScriptedEngine {
    mock: MockRuntime,
    findings: Findings,
    trouble: Arc<EngineTrouble>,
    tasks: TaskTracker,
}

/// What an engine is told to do wrong.
#[derive(Debug)]
pub struct EngineTrouble {
    /// While set, answers stand still.
    frozen: watch::Sender<bool>,
    /// How many generations break off, and after how many tokens.
    breaking: Mutex<Option<(u32, u32)>>,
}

impl Default for EngineTrouble {
    fn default() -> Self {
        Self { frozen: watch::Sender::new(false), breaking: Mutex::default() }
    }
}

impl EngineTrouble {
    pub fn freeze(&self, frozen: bool) {
        self.frozen.send_replace(frozen);
    }

    /// Makes the next generations break off after some tokens.
    pub fn break_next(&self, generations: u32, after: u32) {
        *self.breaking.lock() = Some((generations, after));
    }

    fn take_break(&self) -> Option<u32> {
        let mut breaking = self.breaking.lock();
        let (left, after) = (*breaking)?;
        *breaking = (left > 1).then_some((left - 1, after));
        Some(after)
    }
}

impl ScriptedEngine {
    pub fn new(per_token: Duration, findings: Findings, trouble: Arc<EngineTrouble>) -> Self {
        let first_token = per_token * 2;
        let options = MockOptions { first_token, per_token, tokens: ANSWER_TOKENS, ..MockOptions::default() };
        Self { mock: MockRuntime::new(options), findings, trouble, tasks: TaskTracker::new() }
    }
}

fn prompt_of(input: &PromptInput) -> String {
    match input {
        PromptInput::Text(text) => text.clone(),
        PromptInput::Chat(chat) => chat.messages.iter().map(|message| message.content.as_str()).collect(),
        PromptInput::Tokens(tokens) => format!("{tokens:?}"),
    }
}

#[async_trait]
impl ModelRuntime for ScriptedEngine {
    fn describe(&self) -> RuntimeInfo {
        self.mock.describe()
    }

    async fn hardware(&self) -> Hardware {
        self.mock.hardware().await
    }

    async fn estimate(&self, artifact: &VerifiedArtifact, options: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        self.mock.estimate(artifact, options).await
    }

    async fn load(
        &self,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        self.mock.load(artifact, options, progress).await
    }

    async fn unload(&self, model: ModelId) -> Result<(), EngineError> {
        self.mock.unload(model).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let prompt = prompt_of(&request.input);
        let mut index = request.continued.len() as u32;
        let is_scripted = request.continued.iter().zip(0..).all(|(given, index)| *given == token(&prompt, index));
        if !is_scripted {
            self.findings.report(format!("a worker is to continue {prompt:?} after tokens that it never had"));
        }
        let mut inner = self.mock.generate(request).await?;
        let (sink, stream) = GenerateStream::channel(EVENTS_MAX);
        let (trouble, breaks_after) = (self.trouble.clone(), self.trouble.take_break());
        self.tasks.spawn(async move {
            let mut frozen = trouble.frozen.subscribe();
            let retold = async {
                while let Some(event) = inner.next().await {
                    let _ = frozen.wait_for(|frozen| !frozen).await;
                    let event = match event {
                        Ok(Event::Piece(_)) if breaks_after.is_some_and(|after| index >= after) => {
                            Err(EngineError::Failed { reason: "told to break off".into() })
                        }
                        Ok(Event::Piece(_)) => {
                            let piece = Piece {
                                text: word(&prompt, index),
                                tokens: vec![token(&prompt, index)],
                                ..Piece::default()
                            };
                            index += 1;
                            Ok(Event::Piece(piece))
                        }
                        other => other,
                    };
                    let is_over = event.is_err();
                    if sink.events.send(event).await.is_err() || is_over {
                        return;
                    }
                }
            };
            tokio::select! {
                biased;
                () = sink.cancelled.cancelled() => {}
                () = retold => {}
            }
        });
        Ok(stream)
    }

    async fn count_tokens(&self, model: ModelId, input: &PromptInput) -> Result<u32, EngineError> {
        self.mock.count_tokens(model, input).await
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        self.mock.load_state()
    }
}
