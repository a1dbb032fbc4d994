//! Turns an engine's events into chunks.

use std::collections::BTreeSet;
use std::mem;
use std::time::Duration;

use engine::{Embeddings, Event, ListedToken, Piece};
use protocol::infer::{Embedding, FinishReason, InferChunk, InferRequest, PROGRESS_WITHIN, Payload, Progress};
use protocol::usage::TokenUsage;
use rpc::ResponseSink;
use tokio::time::{self, Instant, Interval, MissedTickBehavior};

use super::Broken;
use super::plan::Plan;
use super::translation::append;
use crate::transcript::Transcript;

/// Pieces that are ready together share a chunk, up to about this many bytes.
const CHUNK_BYTES_MAX: usize = 4 * 1024;
/// Vectors share a chunk up to about this many bytes.
const VECTORS_BYTES_MAX: usize = 64 * 1024;
/// About the length of a listed token in JSON, without its bytes.
const LISTED_TOKEN_BYTES: usize = 32;
/// The approximate size of one logprob in a chunk.
const LOGPROB_BYTES: usize = 64;
/// How long a caller may leave a chunk unread before it counts as gone.
const CALLER_STALL: Duration = Duration::from_mins(1);

/// Writes the chunks of one job into reused buffers.
pub(super) struct ChunkWriter {
    chunk: InferChunk,
    bytes: Vec<u8>,
    /// What is still to be sent of each answer.
    waiting: Vec<Payload>,
    waiting_bytes: usize,
    /// The engine's last progress, if the caller wants to know.
    progress: Option<Progress>,
    wants_progress: bool,
    /// The first answer to each prompt, by index. They count the prompts' tokens.
    firsts: BTreeSet<u32>,
    /// Usage of the prompts whose first answers have begun.
    prompt: TokenUsage,
    /// How many answers have ended.
    ended: usize,
    /// Why the first answer ended.
    reason: FinishReason,
    usage: TokenUsage,
    /// The rest of the only answer, which comes with the last chunk.
    rest: Piece,
    /// Number of the first chunk.
    first_seq: u64,
    transcript: Transcript,
}

impl ChunkWriter {
    /// `plan` says which answers are left.
    pub(super) fn new(request: &InferRequest, plan: &Plan) -> Self {
        let chunk = empty_chunk(request);
        Self {
            first_seq: chunk.seq,
            chunk,
            bytes: Vec::with_capacity(256),
            waiting: (0..plan.count()).map(|index| Payload { index, ..Payload::default() }).collect(),
            waiting_bytes: 0,
            progress: None,
            wants_progress: request.progress,
            firsts: plan.firsts().collect(),
            prompt: TokenUsage::default(),
            ended: plan.ended(),
            reason: plan.reason().unwrap_or(FinishReason::Stop),
            usage: TokenUsage { completion_tokens: plan.ended_tokens(), ..TokenUsage::default() },
            rest: Piece::default(),
            transcript: Transcript::new(request),
        }
    }

    /// Returns the prompt and the answer so far.
    pub(super) fn transcript(&self) -> &Transcript {
        &self.transcript
    }

    /// Records an event of an answer.
    pub(super) fn add(&mut self, index: u32, event: Event) {
        let is_only = self.waiting.len() == 1;
        let Some(payload) = self.waiting.get_mut(index as usize) else { return };
        match event {
            // The first chunk has the prompt's tokens, so that a caller that leaves early can be billed for them. With
            // several prompts each chunk has the tokens so far. Each prompt is counted once, however many answers it
            // has.
            Event::Started { prompt_tokens, cached_tokens } if self.firsts.contains(&index) => {
                let all = &mut self.prompt;
                all.prompt_tokens = all.prompt_tokens.saturating_add(prompt_tokens);
                all.cached_tokens = all.cached_tokens.saturating_add(cached_tokens);
                payload.usage = Some(*all);
            }
            Event::Started { .. } => {}
            Event::Progress(progress) => self.progress = self.wants_progress.then_some(progress),
            Event::Piece(piece) => {
                self.waiting_bytes += bytes_of(&piece);
                append(payload, piece);
            }
            Event::Done { reason, usage, rest } => {
                self.ended += 1;
                // The rest has no tokens, so it must not be delivered without the end: another attempt would repeat it.
                if is_only {
                    self.rest = rest;
                } else {
                    append(payload, rest);
                    payload.finish_reason = Some(reason);
                }
                if index == 0 {
                    self.reason = reason;
                }
                if self.firsts.contains(&index) {
                    self.usage.prompt_tokens = self.usage.prompt_tokens.saturating_add(usage.prompt_tokens);
                    self.usage.cached_tokens = self.usage.cached_tokens.saturating_add(usage.cached_tokens);
                }
                self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(usage.completion_tokens);
                self.usage.reasoning_tokens = self.usage.reasoning_tokens.saturating_add(usage.reasoning_tokens);
            }
        }
    }

    /// Returns whether the buffered output fills a chunk.
    pub(super) fn is_full(&self) -> bool {
        self.waiting_bytes >= CHUNK_BYTES_MAX
    }

    /// Returns whether every answer has ended.
    pub(super) fn is_complete(&self) -> bool {
        self.ended == self.waiting.len()
    }

    /// Returns whether part of the answer was sent.
    pub(super) fn has_begun(&self) -> bool {
        self.chunk.seq > self.first_seq
    }

    /// Records that the job is waiting, when the engine reports no progress.
    pub(super) fn wait(&mut self) {
        self.progress = self.wants_progress.then(Progress::default);
    }

    /// Sends the buffered output, or the engine's progress if nothing is buffered.
    pub(super) async fn send(&mut self, reply: &mut ResponseSink) -> Result<(), Broken> {
        let Self { chunk, bytes, waiting, transcript, progress, .. } = self;
        if let Some(progress) = progress.take()
            && waiting.iter().all(is_empty)
        {
            return send_progress(chunk, progress, reply).await;
        }
        for payload in waiting.iter_mut().filter(|payload| !is_empty(payload)) {
            mem::swap(&mut chunk.payload, payload);
            write_chunk(chunk, bytes);
            mem::swap(&mut chunk.payload, payload);
            transcript.append(payload);
            send_within(reply, bytes).await?;
            chunk.seq += 1;
            chunk.model = None;
            clear(payload);
        }
        self.waiting_bytes = 0;
        Ok(())
    }

    /// Sends all vectors, and returns the last chunk.
    pub(super) async fn send_vectors(
        mut self,
        embeddings: Embeddings,
        reply: &mut ResponseSink,
    ) -> Result<InferChunk, Broken> {
        let Embeddings { vectors, prompt_tokens } = embeddings;
        let usage = TokenUsage { prompt_tokens, ..TokenUsage::default() };
        self.add(0, Event::Started { prompt_tokens, cached_tokens: 0 });
        for (index, vector) in (0..).zip(vectors) {
            let embedding = Embedding::new(index, &vector);
            self.waiting_bytes += embedding.base64.len();
            self.waiting[0].embeddings.push(embedding);
            if self.waiting_bytes >= VECTORS_BYTES_MAX {
                self.send(reply).await?;
            }
        }
        self.send(reply).await?;
        self.add(0, Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() });
        Ok(self.last().0)
    }

    /// Sends a prompt's tokens, and returns the last chunk. Nothing was evaluated, and nothing is billed.
    pub(super) async fn send_listed(
        mut self,
        tokens: Vec<ListedToken>,
        reply: &mut ResponseSink,
    ) -> Result<InferChunk, Broken> {
        let count = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        for token in tokens {
            self.waiting_bytes += LISTED_TOKEN_BYTES + 4 * token.bytes.len();
            self.waiting[0].listed_tokens.push(token);
            if self.waiting_bytes >= VECTORS_BYTES_MAX {
                self.send(reply).await?;
            }
        }
        self.send(reply).await?;
        Ok(self.count(count))
    }

    /// Returns the last chunk of a token count. Nothing was evaluated, and nothing is billed.
    pub(super) fn count(self, tokens: u32) -> InferChunk {
        let (finish_reason, usage) = (Some(FinishReason::Stop), Some(TokenUsage::default()));
        let payload = Payload { input_tokens: Some(tokens), finish_reason, usage, ..Payload::default() };
        InferChunk { payload, done: true, ..self.chunk }
    }

    /// Returns the last chunk and the transcript. Called once every answer has ended and was sent.
    pub(super) fn last(self) -> (InferChunk, Transcript) {
        let Self { chunk, mut transcript, reason, usage, rest, .. } = self;
        let mut payload = Payload { finish_reason: Some(reason), usage: Some(usage), ..Payload::default() };
        append(&mut payload, rest);
        transcript.append(&payload);
        (InferChunk { payload, done: true, ..chunk }, transcript)
    }
}

fn bytes_of(piece: &Piece) -> usize {
    let Piece { text, reasoning, tool_calls, logprobs, tokens: _, stop_sequence: _ } = piece;
    let arguments: usize = tool_calls.iter().map(|delta| delta.arguments.len()).sum();
    let logprobs: usize = logprobs.iter().map(|token| (1 + token.top.len()) * LOGPROB_BYTES).sum();
    text.len() + reasoning.len() + arguments + logprobs
}

fn is_empty(payload: &Payload) -> bool {
    let Payload { text, reasoning, tool_calls, tokens, logprobs, embeddings, listed_tokens, finish_reason, .. } =
        payload;
    text.is_empty()
        && reasoning.is_empty()
        && tool_calls.is_empty()
        && tokens.is_empty()
        && logprobs.is_empty()
        && embeddings.is_empty()
        && listed_tokens.is_empty()
        && finish_reason.is_none()
}

/// Empties a payload but keeps its buffers.
fn clear(payload: &mut Payload) {
    payload.text.clear();
    payload.reasoning.clear();
    payload.tool_calls.clear();
    payload.tokens.clear();
    payload.logprobs.clear();
    payload.embeddings.clear();
    payload.listed_tokens.clear();
    payload.finish_reason = None;
    payload.stop_sequence = None;
    payload.usage = None;
}

/// Returns the first chunk of an attempt, without content.
pub(crate) fn empty_chunk(request: &InferRequest) -> InferChunk {
    let seq = request.delivered.as_ref().map_or(0, |delivered| delivered.seq);
    let chunk = InferChunk::new(request.correlation_id, request.attempt, seq, Payload::default());
    InferChunk { model: (seq == 0).then(|| request.model()), ..chunk }
}

/// Sends a job's progress. `next` is the chunk that follows.
pub(crate) async fn send_progress(
    next: &InferChunk,
    progress: Progress,
    reply: &mut ResponseSink,
) -> Result<(), Broken> {
    let mut bytes = Vec::with_capacity(192);
    write_chunk(&InferChunk { payload: Payload::default(), progress: Some(progress), ..next.clone() }, &mut bytes);
    send_within(reply, &bytes).await
}

/// Returns the interval at which a waiting job sends its progress.
pub(crate) fn pulse() -> Interval {
    let every = PROGRESS_WITHIN / 2;
    let mut pulse = time::interval_at(Instant::now() + every, every);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pulse
}

/// Sends the last chunk and ends the stream.
pub(crate) async fn finish(mut reply: ResponseSink, chunk: &InferChunk) -> Result<(), Broken> {
    let mut bytes = Vec::with_capacity(256);
    write_chunk(chunk, &mut bytes);
    send_within(&mut reply, &bytes).await?;
    let finished = time::timeout(CALLER_STALL, reply.finish()).await;
    Ok(finished.map_err(|_| Broken::Interrupted)??)
}

async fn send_within(reply: &mut ResponseSink, bytes: &[u8]) -> Result<(), Broken> {
    Ok(time::timeout(CALLER_STALL, reply.send(bytes)).await.map_err(|_| Broken::Interrupted)??)
}

fn write_chunk(chunk: &InferChunk, bytes: &mut Vec<u8>) {
    bytes.clear();
    serde_json::to_writer(bytes, chunk).expect("chunks hold nothing that JSON cannot say");
}
