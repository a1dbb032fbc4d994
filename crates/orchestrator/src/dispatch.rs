//! Sends a job to a worker and carries its answer back to whoever submitted it.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use protocol::infer::{FinishReason, START};
use protocol::model::ModelKey;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, WireError, WorkerId, codec};
use rpc::{AnswerStream, CallError, Client, Interrupted, ReplyStream, StreamCall, StreamOptions};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use crate::job::JobEvent;
use crate::journey::Journey;

/// Whoever submitted a job. The call is accepted with the first chunk, which may bring progress alone; a job of which
/// no part was sent may still be tried elsewhere.
///
/// A caller that leaves a chunk unread for too long counts as gone: it would hold its job's room for ever.
pub struct Delivery {
    state: State,
    stall: Duration,
    has_begun: bool,
}

enum State {
    Waiting(StreamCall),
    /// The answer is on its way.
    Streaming(ReplyStream),
    /// The caller is gone.
    Gone,
}

impl Delivery {
    /// Waits with a call for its first chunk.
    pub fn new(call: StreamCall, stall: Duration) -> Self {
        Self { state: State::Waiting(call), stall, has_begun: false }
    }

    pub async fn send(&mut self, chunk: &[u8]) -> Result<(), Interrupted> {
        self.has_begun = true;
        time::timeout(self.stall, self.state.send(chunk)).await.unwrap_or(Err(Interrupted))
    }

    /// Sends a chunk that brings progress and no part of the answer.
    async fn send_progress(&mut self, chunk: &[u8]) -> Result<(), Interrupted> {
        time::timeout(self.stall, self.state.send(chunk)).await.unwrap_or(Err(Interrupted))
    }

    /// Waits until the caller is gone. Cancel safe.
    pub async fn gone(&mut self) {
        match &mut self.state {
            State::Waiting(call) => call.cancelled().await,
            State::Streaming(reply) => reply.cancelled().await,
            State::Gone => {}
        }
    }

    /// Returns whether part of the answer was sent.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    pub async fn finish(self) {
        // A caller that is gone needs no end.
        if let State::Streaming(reply) = self.state {
            let _ = time::timeout(self.stall, reply.finish()).await;
        }
    }

    /// Refuses the call, or ends the answer with an error.
    pub async fn fail(self, error: WireError) {
        let said = async {
            match self.state {
                State::Waiting(call) => call.refuse(error).await,
                State::Streaming(reply) => {
                    let _ = reply.fail(error).await;
                }
                State::Gone => {}
            }
        };
        let _ = time::timeout(self.stall, said).await;
    }
}

impl State {
    async fn send(&mut self, chunk: &[u8]) -> Result<(), Interrupted> {
        if let Self::Waiting(_) = self {
            let Self::Waiting(call) = std::mem::replace(self, Self::Gone) else { return Err(Interrupted) };
            *self = Self::Streaming(call.accept().await?);
        }
        match self {
            Self::Streaming(reply) => reply.send(chunk).await,
            Self::Waiting(_) | Self::Gone => Err(Interrupted),
        }
    }
}

/// How an attempt ended.
#[derive(Debug)]
pub enum AttemptEnd {
    /// The whole answer came. The last chunk is not sent yet: it waits for the settlement.
    Complete {
        /// The last chunk, as it came.
        last_chunk: Bytes,
        /// Why the answer ended.
        finish_reason: Option<FinishReason>,
        usage: TokenUsage,
        /// The longest silence of the worker until its answer began.
        silence: Duration,
    },
    /// The caller gave up.
    CallerGone {
        /// What was delivered until then.
        usage: TokenUsage,
    },
    /// The worker refused or failed.
    Failed {
        error: WireError,
        /// Whether the worker had not even acknowledged the job.
        unacknowledged: bool,
        /// What was delivered until then.
        usage: TokenUsage,
    },
    /// Engines crashed on the job: it is given to no other.
    Dead {
        /// What the caller is told.
        error: WireError,
    },
}

impl AttemptEnd {
    /// Returns the end of an attempt that never reached a worker.
    pub fn refused(error: WireError) -> Self {
        Self::Failed { error, unacknowledged: false, usage: TokenUsage::default() }
    }

    /// Returns what the attempt took, as far as it came.
    pub fn usage(&self) -> TokenUsage {
        match self {
            Self::Complete { usage, .. } | Self::CallerGone { usage } | Self::Failed { usage, .. } => *usage,
            Self::Dead { .. } => TokenUsage::default(),
        }
    }
}

/// What the orchestrator reads of a chunk. It passes the rest on as it came.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ChunkHead<'a> {
    correlation_id: CorrelationId,
    seq: u64,
    attempt: u32,
    done: bool,
    #[serde(borrow)]
    payload: PayloadHead<'a>,
    #[serde(default)]
    progress: Option<IgnoredAny>,
    #[serde(default)]
    model: Option<ModelKey>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PayloadHead<'a> {
    #[serde(default, borrow)]
    text: Cow<'a, str>,
    #[serde(default, borrow)]
    reasoning: Cow<'a, str>,
    #[serde(default)]
    tool_calls: Vec<IgnoredAny>,
    #[serde(default)]
    tokens: Vec<u32>,
    #[serde(default)]
    logprobs: Vec<IgnoredAny>,
    #[serde(default)]
    finish_reason: Option<FinishReason>,
    #[serde(default)]
    usage: Option<TokenUsage>,
}

/// Sends a job to a worker and relays its answer, all but the last chunk.
///
/// A chunk of another job or attempt, or out of order, fails the attempt: a worker that was given up on, or that lies,
/// cannot get a word in.
pub async fn attempt(
    client: &Client,
    worker_id: WorkerId,
    options: StreamOptions,
    void: &CancellationToken,
    journey: &mut Journey,
    delivery: &mut Delivery,
) -> AttemptEnd {
    let mut relayed = Relayed::begin();
    let body = Bytes::from(codec::encode(&journey.request));
    let opening = client.open_stream(worker_id, START, body, options);
    let opened = tokio::select! {
        opened = opening => opened,
        () = delivery.gone() => return AttemptEnd::CallerGone { usage: relayed.usage },
    };
    let mut answer = match opened {
        Ok(answer) => answer,
        Err(error) => {
            let unacknowledged = !matches!(error, CallError::Remote(_));
            return AttemptEnd::Failed { error: worker_error(error), unacknowledged, usage: relayed.usage };
        }
    };
    journey.step(JobEvent::Acknowledge);
    tokio::select! {
        end = relay(&mut answer, journey, delivery, &mut relayed) => end,
        () = void.cancelled() => {
            let error = WireError::new(ErrorCode::StaleAttempt, "the job's lease was lost");
            AttemptEnd::Failed { error, unacknowledged: false, usage: relayed.usage }
        }
    }
}

struct Relayed {
    seq: u64,
    usage: TokenUsage,
    /// When the worker was last heard of.
    heard_at: Instant,
    /// Its longest silence until its answer began.
    silence: Duration,
}

async fn relay(
    answer: &mut AnswerStream,
    journey: &mut Journey,
    delivery: &mut Delivery,
    relayed: &mut Relayed,
) -> AttemptEnd {
    let failed = |error, usage| AttemptEnd::Failed { error, unacknowledged: false, usage };
    loop {
        let next = tokio::select! {
            biased;
            next = answer.next() => next,
            () = delivery.gone() => return AttemptEnd::CallerGone { usage: relayed.usage },
        };
        let bytes = match next {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => return failed(worker_error(error), relayed.usage),
            None => return failed(garbled("the answer has no end"), relayed.usage),
        };
        let Ok(head) = codec::decode_borrowed::<ChunkHead<'_>>(&bytes) else {
            return failed(garbled("a chunk is malformed"), relayed.usage);
        };
        let request = &journey.request;
        if head.correlation_id != request.correlation_id || head.attempt != request.attempt || head.seq != relayed.seq {
            return failed(garbled("a chunk is out of place"), relayed.usage);
        }
        if head.model.as_ref().is_some_and(|model| model != journey.model()) {
            return failed(garbled("another model answers"), relayed.usage);
        }
        if relayed.seq == 0 {
            relayed.heard();
        }
        if head.progress.is_some() {
            if journey.wants_progress && delivery.send_progress(&bytes).await.is_err() {
                return AttemptEnd::CallerGone { usage: relayed.usage };
            }
            continue;
        }
        // The deadline is for the beginning: an answer that has begun goes on as long as its caller listens.
        answer.lift_deadline();
        relayed.seq += 1;
        relayed.count(&head.payload);
        if head.done {
            let usage = head.payload.usage.unwrap_or(relayed.usage);
            let finish_reason = head.payload.finish_reason;
            return AttemptEnd::Complete { last_chunk: bytes, finish_reason, usage, silence: relayed.silence };
        }
        journey.step(JobEvent::Chunk);
        if delivery.send(&bytes).await.is_err() {
            return AttemptEnd::CallerGone { usage: relayed.usage };
        }
    }
}

impl Relayed {
    fn begin() -> Self {
        Self { seq: 0, usage: TokenUsage::default(), heard_at: Instant::now(), silence: Duration::ZERO }
    }

    /// Takes note that the worker said something.
    fn heard(&mut self) {
        let now = Instant::now();
        self.silence = self.silence.max(now - self.heard_at);
        self.heard_at = now;
    }

    /// Counts what a caller who leaves would be billed.
    fn count(&mut self, payload: &PayloadHead<'_>) {
        if let Some(usage) = payload.usage {
            self.usage.prompt_tokens = usage.prompt_tokens;
            self.usage.cached_tokens = usage.cached_tokens;
        }
        // A worker that names no tokens still delivered at least one with all that it says, unless it repeats the
        // prompt: log-probabilities without tokens are the prompt's.
        let says_something = payload.logprobs.is_empty()
            && !(payload.text.is_empty() && payload.reasoning.is_empty() && payload.tool_calls.is_empty());
        let tokens = payload.tokens.len().max(usize::from(says_something));
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(tokens as u32);
    }
}

fn garbled(message: &str) -> WireError {
    WireError::new(ErrorCode::WorkerFailed, format!("the worker broke the contract: {message}"))
}

/// What a failed call to a worker means for the job.
fn worker_error(error: CallError) -> WireError {
    match error {
        CallError::Remote(error) => error,
        CallError::Deadline => WireError::new(ErrorCode::DeadlineExceeded, "the deadline passed"),
        CallError::TooLarge { .. } => WireError::new(ErrorCode::RequestTooLarge, error.to_string()),
        other => WireError::new(ErrorCode::WorkerFailed, format!("the worker failed: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_said_counts_and_what_says_nothing_does_not() {
        for (payload, tokens) in [
            (r#"{"text": "a", "tokens": [1, 2]}"#, 2),
            (r#"{"tokens": [3]}"#, 1),
            (r#"{"text": "a"}"#, 1),
            (r#"{"reasoning": "hm"}"#, 1),
            (r#"{"text": "prompt", "logprobs": [{}]}"#, 0),
            (r#"{"toolCalls": [{"index": 0, "name": "f"}]}"#, 1),
            (r#"{"usage": {"promptTokens": 5, "completionTokens": 0, "cachedTokens": 2}}"#, 0),
        ] {
            let mut relayed = Relayed::begin();
            relayed.count(&serde_json::from_str(payload).expect(payload));
            assert_eq!(relayed.usage.completion_tokens, tokens, "{payload}");
        }
    }
}
