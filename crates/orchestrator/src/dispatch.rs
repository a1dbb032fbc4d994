//! Sends a job to a worker and relays its answer to the caller.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use protocol::infer::{FinishReason, START};
use protocol::model::ModelKey;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, WireError, WorkerId, codec};
use rpc::{CallError, Client, Interrupted, ResponseSink, ResponseStream, StreamCall, StreamOptions};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use crate::job::JobEvent;
use crate::journey::Journey;

/// The call that submitted a job. It is accepted with the first chunk, which may carry only progress. The job can be
/// retried on another worker until part of the answer is sent.
///
/// A caller that leaves a chunk unread for too long counts as gone. Otherwise it would hold its job's reservation
/// forever.
pub struct Delivery {
    state: State,
    stall: Duration,
    has_begun: bool,
}

enum State {
    Waiting(StreamCall),
    Streaming(ResponseSink),
    Gone,
}

impl Delivery {
    /// Makes a delivery that accepts `call` when the first chunk is sent.
    pub fn new(call: StreamCall, stall: Duration) -> Self {
        Self { state: State::Waiting(call), stall, has_begun: false }
    }

    pub async fn send(&mut self, chunk: &[u8]) -> Result<(), Interrupted> {
        self.has_begun = true;
        time::timeout(self.stall, self.state.send(chunk)).await.unwrap_or(Err(Interrupted))
    }

    /// Sends a chunk that carries progress and no part of the answer.
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
        // There is nothing to finish if the caller is gone.
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
    /// The whole answer arrived. Its last chunk is sent only after the job is settled.
    Complete {
        /// The last chunk, as the worker sent it.
        last_chunk: Bytes,
        finish_reason: Option<FinishReason>,
        usage: TokenUsage,
        /// The worker's longest silence before its answer began.
        silence: Duration,
    },
    /// The caller cancelled or disconnected.
    CallerGone {
        /// Tokens delivered until then.
        usage: TokenUsage,
    },
    /// The worker refused or failed.
    Failed {
        error: WireError,
        /// Whether the worker failed to acknowledge the job.
        unacknowledged: bool,
        /// Tokens delivered until then.
        usage: TokenUsage,
    },
    /// Engines crashed on the job, and it is not retried.
    Dead {
        /// The error sent to the caller.
        error: WireError,
    },
}

impl AttemptEnd {
    /// Returns the end of an attempt that never reached a worker.
    pub fn refused(error: WireError) -> Self {
        Self::Failed { error, unacknowledged: false, usage: TokenUsage::default() }
    }

    /// Returns the tokens that the attempt used, as far as known.
    pub fn usage(&self) -> TokenUsage {
        match self {
            Self::Complete { usage, .. } | Self::CallerGone { usage } | Self::Failed { usage, .. } => *usage,
            Self::Dead { .. } => TokenUsage::default(),
        }
    }
}

/// The fields of a chunk that the orchestrator reads. It relays the chunk's bytes unchanged.
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

/// Sends a job to a worker and relays its answer except the last chunk.
///
/// A chunk of another job or attempt, or out of order, fails the attempt, so that an abandoned or dishonest worker
/// cannot add to the answer.
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
    /// When the worker last sent a chunk; no longer updated once the answer has begun.
    heard_at: Instant,
    /// The worker's longest silence before its answer began.
    silence: Duration,
}

async fn relay(
    answer: &mut ResponseStream,
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
        // The deadline limits only the time until the answer begins. An answer that has begun continues as long as its
        // caller reads.
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

    /// Records that the worker sent a chunk.
    fn heard(&mut self) {
        let now = Instant::now();
        self.silence = self.silence.max(now - self.heard_at);
        self.heard_at = now;
    }

    /// Adds to the usage that is billed if the caller disconnects.
    fn count(&mut self, payload: &PayloadHead<'_>) {
        if let Some(usage) = payload.usage {
            self.usage.prompt_tokens = usage.prompt_tokens;
            self.usage.cached_tokens = usage.cached_tokens;
        }
        // A chunk with content but without token ids counts as one token, unless it echoes the prompt: logprobs without
        // tokens belong to the prompt.
        let says_something = payload.logprobs.is_empty()
            && !(payload.text.is_empty() && payload.reasoning.is_empty() && payload.tool_calls.is_empty());
        let tokens = payload.tokens.len().max(usize::from(says_something));
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(tokens as u32);
    }
}

fn garbled(message: &str) -> WireError {
    WireError::new(ErrorCode::WorkerFailed, format!("the worker broke the contract: {message}"))
}

/// Converts a failed call to a worker to the job's error.
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
