//! Requests to an engine process that have exactly one reply.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time;

use super::{EngineProcess, RESPONSE_TIMEOUT, timed_out, too_long};
use crate::model_runtime::{
    AdapterId, Embeddings, EngineError, ListedToken, PromptInput, Scores, TokenListing, VerifiedArtifact,
};
use crate::process::frame::{Query, Reply, ToChild, encode};
use crate::process::handover;

/// The number of texts in one embedding query. For the widest models, their vectors as JSON take a quarter of a
/// frame.
const TEXTS_MAX: usize = 32;
/// The time limit for these texts together. Callers have deadlines of their own, and a hung engine is given up
/// earlier.
const EMBED_WITHIN: Duration = Duration::from_hours(1);

/// A query in flight. If it is dropped without a reply, the process is told to forget it.
struct PendingQuery<'a> {
    process: &'a EngineProcess,
    id: u64,
    reply: oneshot::Receiver<Result<Reply, EngineError>>,
}

impl EngineProcess {
    pub(in crate::process) async fn count_tokens(&self, input: &PromptInput) -> Result<u32, EngineError> {
        match self.ask(Query::CountTokens(input.clone()), RESPONSE_TIMEOUT).await? {
            Reply::Tokens(tokens) => Ok(tokens),
            _ => Err(nonsense()),
        }
    }

    pub(in crate::process) async fn list_tokens(
        &self,
        input: &PromptInput,
        listing: TokenListing,
    ) -> Result<Vec<ListedToken>, EngineError> {
        match self.ask(Query::ListTokens { input: input.clone(), listing }, RESPONSE_TIMEOUT).await? {
            Reply::Listed(tokens) => Ok(tokens),
            _ => Err(nonsense()),
        }
    }

    /// Requests the scores of a few texts at a time, so that any number of texts fits the frames.
    pub(in crate::process) async fn rerank(&self, query: &str, texts: &[String]) -> Result<Scores, EngineError> {
        let mut all = Scores::default();
        for texts in texts.chunks(TEXTS_MAX) {
            let query = Query::Rerank { query: query.to_owned(), texts: texts.to_vec() };
            let Reply::Scores(Scores { scores, prompt_tokens }) = self.ask(query, EMBED_WITHIN).await? else {
                return Err(nonsense());
            };
            if scores.len() != texts.len() {
                return Err(nonsense());
            }
            all.scores.extend(scores);
            all.prompt_tokens = all.prompt_tokens.saturating_add(prompt_tokens);
        }
        Ok(all)
    }

    /// Requests the vectors of a few texts at a time, so that any number of texts fits the frames.
    pub(in crate::process) async fn embed(&self, inputs: &[PromptInput]) -> Result<Embeddings, EngineError> {
        let mut all = Embeddings::default();
        for texts in inputs.chunks(TEXTS_MAX) {
            let Reply::Vectors(Embeddings { vectors, prompt_tokens }) =
                self.ask(Query::Embed(texts.to_vec()), EMBED_WITHIN).await?
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
        let pending = self.open_query()?;
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
        match pending.reply(within).await? {
            Reply::Adapter(adapter) => Ok(adapter),
            _ => Err(nonsense()),
        }
    }

    pub(in crate::process) async fn remove_adapter(&self, adapter: AdapterId) -> Result<(), EngineError> {
        match self.ask(Query::RemoveAdapter(adapter), RESPONSE_TIMEOUT).await? {
            Reply::Removed => Ok(()),
            _ => Err(nonsense()),
        }
    }

    /// Frees an adapter that no caller uses.
    pub(super) fn forget_adapter(&self, adapter: AdapterId) {
        let query = Query::RemoveAdapter(adapter);
        if let Ok(frame) = encode(&ToChild::Ask { id: self.number(), query })
            && self.outgoing.try_send(frame).is_err()
        {
            tracing::warn!(
                pid = self.pid,
                adapter = adapter.0,
                "an unused adapter could not be removed from its engine"
            );
        }
    }

    async fn ask(&self, query: Query, within: Duration) -> Result<Reply, EngineError> {
        let pending = self.open_query()?;
        let frame = encode(&ToChild::Ask { id: pending.id, query }).map_err(|error| too_long("input", &error))?;
        self.outgoing.try_send(frame).map_err(|_| EngineError::Busy)?;
        pending.reply(within).await
    }

    fn open_query(&self) -> Result<PendingQuery<'_>, EngineError> {
        let id = self.number();
        let (asker, reply) = oneshot::channel();
        let mut state = self.state();
        if let Some(error) = &state.closed {
            return Err(error.clone());
        }
        state.queries.insert(id, asker);
        state.expects_reply = true;
        Ok(PendingQuery { process: self, id, reply })
    }
}

impl PendingQuery<'_> {
    async fn reply(mut self, within: Duration) -> Result<Reply, EngineError> {
        match time::timeout(within, &mut self.reply).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) => Err(EngineError::NotLoaded),
            Err(_) => Err(timed_out(within)),
        }
    }
}

impl Drop for PendingQuery<'_> {
    fn drop(&mut self) {
        let is_open = self.process.state().queries.remove(&self.id).is_some();
        if is_open {
            if let Ok(frame) = encode(&ToChild::Cancel { id: self.id }) {
                // If the queue is full, nothing is lost: the reply is dropped when it arrives.
                let _ = self.process.outgoing.try_send(frame);
            }
        } else if let Ok(Ok(Reply::Adapter(adapter))) = self.reply.try_recv() {
            // The reply arrived at the moment the caller left.
            self.process.forget_adapter(adapter);
        }
    }
}

fn nonsense() -> EngineError {
    EngineError::Failed { reason: "the engine process gave an answer to something else".into() }
}
