//! Requests to an engine process that have exactly one reply.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time;

use super::{ANSWER_WITHIN, EngineProcess, no_answer, too_long};
use crate::model_runtime::{AdapterId, Embeddings, EngineError, PromptInput, VerifiedArtifact};
use crate::process::frame::{Answer, Question, ToChild, encode};
use crate::process::handover;

/// The number of texts in one embedding question. For the widest models, their vectors as JSON take a quarter of a
/// frame.
const TEXTS_MAX: usize = 32;
/// The time limit for these texts together. Callers have deadlines of their own, and a hung engine is given up
/// earlier.
const EMBED_WITHIN: Duration = Duration::from_hours(1);

/// A question in flight. If it is dropped without an answer, the process is told to forget it.
struct PendingQuestion<'a> {
    process: &'a EngineProcess,
    id: u64,
    answered: oneshot::Receiver<Result<Answer, EngineError>>,
}

impl EngineProcess {
    pub(in crate::process) async fn count_tokens(&self, input: &PromptInput) -> Result<u32, EngineError> {
        match self.ask(Question::CountTokens(input.clone()), ANSWER_WITHIN).await? {
            Answer::Tokens(tokens) => Ok(tokens),
            _ => Err(nonsense()),
        }
    }

    /// Requests the vectors of a few texts at a time, so that any number of texts fits the frames.
    pub(in crate::process) async fn embed(&self, inputs: &[PromptInput]) -> Result<Embeddings, EngineError> {
        let mut all = Embeddings::default();
        for texts in inputs.chunks(TEXTS_MAX) {
            let Answer::Vectors(Embeddings { vectors, prompt_tokens }) =
                self.ask(Question::Embed(texts.to_vec()), EMBED_WITHIN).await?
            else {
                return Err(nonsense());
            };
            if vectors.len() != texts.len() {
                return Err(nonsense());
            }
            all.vectors.extend(vectors);
            all.prompt_tokens = all.prompt_tokens.saturating_add(prompt_tokens);
        }
        Ok(all)
    }

    pub(in crate::process) async fn add_adapter(
        &self,
        artifact: VerifiedArtifact,
        within: Duration,
    ) -> Result<AdapterId, EngineError> {
        let [file] = handover::describe(&artifact)
            .try_into()
            .map_err(|_| EngineError::InvalidModel { reason: "an adapter is one file".into() })?;
        let pending = self.open_question()?;
        let frame =
            encode(&ToChild::AddAdapter { id: pending.id, file }).map_err(|error| too_long("adapter", &error))?;
        {
            let files = self.files.lock();
            let permit = self.outgoing.try_reserve().map_err(|_| EngineError::Busy)?;
            handover::send(&files, &artifact)
                .map_err(|error| EngineError::Failed { reason: format!("the adapter was not handed over: {error}") })?;
            permit.send(frame);
        }
        drop(artifact);
        match pending.answer(within).await? {
            Answer::Adapter(adapter) => Ok(adapter),
            _ => Err(nonsense()),
        }
    }

    pub(in crate::process) async fn remove_adapter(&self, adapter: AdapterId) -> Result<(), EngineError> {
        match self.ask(Question::RemoveAdapter(adapter), ANSWER_WITHIN).await? {
            Answer::Removed => Ok(()),
            _ => Err(nonsense()),
        }
    }

    /// Frees an adapter that no caller uses.
    pub(super) fn forget_adapter(&self, adapter: AdapterId) {
        let question = Question::RemoveAdapter(adapter);
        if let Ok(frame) = encode(&ToChild::Ask { id: self.number(), question })
            && self.outgoing.try_send(frame).is_err()
        {
            tracing::warn!(
                pid = self.pid,
                adapter = adapter.0,
                "an unused adapter could not be removed from its engine"
            );
        }
    }

    async fn ask(&self, question: Question, within: Duration) -> Result<Answer, EngineError> {
        let pending = self.open_question()?;
        let frame = encode(&ToChild::Ask { id: pending.id, question }).map_err(|error| too_long("input", &error))?;
        self.outgoing.try_send(frame).map_err(|_| EngineError::Busy)?;
        pending.answer(within).await
    }

    fn open_question(&self) -> Result<PendingQuestion<'_>, EngineError> {
        let id = self.number();
        let (asker, answered) = oneshot::channel();
        let mut state = self.state();
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.questions.insert(id, asker);
        state.asked = true;
        Ok(PendingQuestion { process: self, id, answered })
    }
}

impl PendingQuestion<'_> {
    async fn answer(mut self, within: Duration) -> Result<Answer, EngineError> {
        match time::timeout(within, &mut self.answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(EngineError::NotLoaded),
            Err(_) => Err(no_answer(within)),
        }
    }
}

impl Drop for PendingQuestion<'_> {
    fn drop(&mut self) {
        let is_open = self.process.state().questions.remove(&self.id).is_some();
        if is_open {
            if let Ok(frame) = encode(&ToChild::Cancel { id: self.id }) {
                // If the queue is full, nothing is lost: the answer is dropped when it arrives.
                let _ = self.process.outgoing.try_send(frame);
            }
        } else if let Ok(Ok(Answer::Adapter(adapter))) = self.answered.try_recv() {
            // The answer arrived at the moment the caller left.
            self.process.forget_adapter(adapter);
        }
    }
}

fn nonsense() -> EngineError {
    EngineError::Failed { reason: "the engine process gave an answer to something else".into() }
}
