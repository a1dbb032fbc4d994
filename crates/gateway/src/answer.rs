//! The answer of a job: reads the orchestrator's chunks, checks each of them and passes them to the client.

mod stream_format;
mod whole;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use failpoints::failpoint;
use futures_util::FutureExt as _;
use protocol::infer::{Degraded, Embedding, FinishReason, Input, ListedToken, Origin, TokenLogprob, ToolCallDelta};
use protocol::model::{ModelEntry, ModelKey};
use protocol::quota::QuotaState;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, UnixMillis, WireError, codec};
use rpc::{CallError, ResponseStream};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use crate::request_record::RequestRecord;
use crate::upstream;
use whole::Gathering;

pub(crate) use stream_format::StreamFormat;
pub(crate) use whole::Whole;

/// How long an orchestrator may take to close a stream after its last chunk.
const CLOSING: Duration = Duration::from_secs(1);

/// The id of an event of a stream that may be resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EventId {
    /// When the answer began. A request that failed and runs again has another answer.
    pub(crate) created_at: UnixMillis,
    pub(crate) seq: u64,
}

impl EventId {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (created_at, seq) = text.split_once('-')?;
        Some(Self { created_at: UnixMillis(created_at.parse().ok()?), seq: seq.parse().ok()? })
    }
}

impl std::fmt::Display for EventId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}-{}", self.created_at.0, self.seq)
    }
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// The chunk as the orchestrator sent it, JSON.
    pub raw: Bytes,
    /// Its position in the answer, counted from 0 without gaps.
    pub seq: u64,
    /// The attempt that produced it.
    pub attempt: u32,
    /// The model that answers, if the piece names it; the first piece does.
    pub model: Option<ModelKey>,
    pub content: Content,
    /// How the answer ended, in its last piece.
    pub end: Option<End>,
}

/// The part of a chunk's payload that the gateway reads: [`protocol::infer::Payload`], with its tokens only counted.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Content {
    /// Index of the answer it belongs to, if the job asks for several, counted from 0.
    pub index: u32,
    /// Text to append; may be empty.
    pub text: String,
    /// Text to append to the model's reasoning, which comes before the answer.
    pub reasoning: String,
    /// Tool call deltas, one for each call.
    #[serde(deserialize_with = "joined")]
    pub tool_calls: Vec<ToolCallDelta>,
    /// The tokens of the text; only their number matters here.
    pub tokens: Vec<IgnoredAny>,
    /// One for each token, if they were requested.
    pub logprobs: Vec<TokenLogprob>,
    /// Embedding vectors, if they were requested.
    pub embeddings: Vec<Embedding>,
    /// The number of prompt tokens, if the job only counts them.
    pub input_tokens: Option<u32>,
    /// The prompt tokens, if the job lists them.
    pub listed_tokens: Vec<ListedToken>,
    /// Why this answer ended; set in its last piece.
    pub finish_reason: Option<FinishReason>,
    /// The stop sequence that ended this answer, in the same piece.
    pub stop_sequence: Option<Box<str>>,
    /// Usage of the whole job in the last piece, of the prompt in the first.
    pub usage: Option<TokenUsage>,
    /// How often another worker continued the answer, in the last piece.
    pub continued: u32,
    /// How the job was made cheaper, in the last piece.
    pub degraded: Option<Box<Degraded>>,
}

impl Content {
    /// Returns the number of tokens in this content. A worker that lists no tokens generated at least one if there is
    /// any content. The exception is an echoed prompt, which has log-probabilities but no tokens.
    fn tokens(&self) -> u32 {
        let is_answer = self.has_something() && self.embeddings.is_empty() && self.logprobs.is_empty();
        self.tokens.len().max(usize::from(is_answer)) as u32
    }

    /// Returns whether there is any content besides the end of an answer.
    pub(crate) fn has_something(&self) -> bool {
        let Self { text, reasoning, tool_calls, logprobs, embeddings, .. } = self;
        !(text.is_empty()
            && reasoning.is_empty()
            && tool_calls.is_empty()
            && logprobs.is_empty()
            && embeddings.is_empty())
    }
}

/// Reads tool call deltas and joins consecutive ones of the same call. A worker sends what its engine generated since
/// its last chunk, but LangChain and instructor read a second delta of a call in one chunk as a second call.
fn joined<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ToolCallDelta>, D::Error> {
    let mut joined: Vec<ToolCallDelta> = Vec::new();
    for delta in Vec::<ToolCallDelta>::deserialize(deserializer)? {
        match joined.last_mut().filter(|last| last.index == delta.index) {
            Some(last) => last.arguments += &delta.arguments,
            None => joined.push(delta),
        }
    }
    Ok(joined)
}

/// How many answers and vectors a job asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) choices: u32,
    pub(crate) embeddings: u32,
}

impl Default for Expected {
    fn default() -> Self {
        Self { choices: 1, embeddings: 0 }
    }
}

impl Expected {
    /// Returns what a checked job asks for.
    pub(crate) fn of(input: &Input) -> Self {
        Self { choices: input.answers(), embeddings: input.embed.as_ref().map_or(0, |texts| texts.len() as u32) }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    pub reason: FinishReason,
    pub usage: TokenUsage,
}

/// The stream of an answer that has begun.
pub(crate) struct Begun {
    pub(crate) stream: ResponseStream,
    /// Its first chunk; `None` if the stream ended without one.
    pub(crate) first: Option<Bytes>,
    /// Where the answer comes from, if it can be asked for again.
    pub(crate) origin: Option<Origin>,
    /// The token limit of the tenant of which least is left, if it has one.
    pub(crate) quota: Option<QuotaState>,
    /// How the job was made cheaper, if it was.
    pub(crate) degraded: Option<Degraded>,
}

impl Begun {
    /// Returns whether an earlier call began the answer, so that it costs and measures nothing.
    pub(crate) fn is_repeat(&self) -> bool {
        self.origin.is_some_and(|origin| origin.replayed || origin.attached)
    }
}

/// A job's answer. Dropping it before its end cancels the job.
pub struct Answer {
    correlation_id: CorrelationId,
    /// The models that may answer. The one that does moves to the front once it is known.
    entries: Vec<Arc<ModelEntry>>,
    /// `None` once the answer has ended.
    stream: Option<ResponseStream>,
    check: Sequence,
    continued: u32,
    origin: Option<Origin>,
    quota: Option<QuotaState>,
    degraded: Option<Degraded>,
    /// The first piece, received before this value was created.
    first: Option<Piece>,
    record: RequestRecord,
    tracker: TaskTracker,
    /// Cancelled when the gateway's drain time is over.
    cut: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

impl Answer {
    /// Takes over an answer that has begun, by one of `entries`. An error in its first piece fails the request.
    pub(crate) fn begin(
        begun: Begun,
        entries: Vec<Arc<ModelEntry>>,
        expected: Expected,
        mut record: RequestRecord,
        tracker: TaskTracker,
        cut: CancellationToken,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, WireError> {
        if begun.is_repeat() {
            record.replays();
        }
        let Begun { stream, first, origin, quota, degraded } = begun;
        let correlation_id = record.correlation_id;
        let mut answer = Self {
            correlation_id,
            entries,
            stream: Some(stream),
            check: Sequence::new(correlation_id, expected),
            continued: 0,
            origin,
            quota,
            degraded,
            first: None,
            record,
            tracker,
            cut,
            _permit: permit,
        };
        answer.first = answer.take(first.map(Ok)).transpose()?;
        Ok(answer)
    }

    /// Returns the job's id.
    pub fn correlation_id(&self) -> CorrelationId {
        self.correlation_id
    }

    /// Returns the model that answers.
    pub fn model(&self) -> &Arc<ModelEntry> {
        &self.entries[0]
    }

    /// Returns the name of the model that answers, for a client that named it so: the same, unless another one runs the
    /// job.
    pub(crate) fn model_name(&self, asked: &str) -> String {
        let other = self.degraded().and_then(|degraded| degraded.model.as_ref());
        other.map_or_else(|| asked.to_owned(), |model| model.model_id.to_string())
    }

    /// Returns the attempt that answers, counted from 1.
    pub fn attempt(&self) -> u32 {
        self.check.attempt
    }

    /// Returns how often another worker continued the answer, as far as it has arrived.
    pub fn continued(&self) -> u32 {
        self.continued
    }

    /// Returns how the job was made cheaper, if it was.
    pub fn degraded(&self) -> Option<&Degraded> {
        self.degraded.as_ref()
    }

    /// Returns where the answer comes from, if it can be asked for again.
    pub fn origin(&self) -> Option<Origin> {
        self.origin
    }

    /// Returns how long the first content took from the request's arrival, once it is there.
    pub(crate) fn first_piece(&self) -> Option<Duration> {
        self.record.first_piece()
    }

    /// Returns the token limit of the tenant of which least is left, if it has one.
    pub fn quota(&self) -> Option<QuotaState> {
        self.quota
    }

    /// Returns the next piece, or `None` after the last one or after an error.
    pub async fn next(&mut self) -> Option<Result<Piece, WireError>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        loop {
            let message = self.stream.as_mut()?.next().await;
            // A chunk with only progress has served its purpose: it shows that the stream is alive.
            if let Some(piece) = self.take(message) {
                failpoint!("gateway-piece");
                return Some(piece);
            }
        }
    }

    /// Processes the stream's next event. Returns a piece or an error, or `None` for a chunk with only progress.
    fn take(&mut self, message: Option<Result<Bytes, CallError>>) -> Option<Result<Piece, WireError>> {
        let piece = match message {
            Some(Ok(message)) => {
                let piece = self.check.read(message).transpose()?;
                piece.and_then(|piece| self.set_model(piece.model.as_ref()).map(|()| piece))
            }
            Some(Err(error)) => Err(for_clients(error)),
            None => Err(broken("the answer ended without its last chunk")),
        };
        match &piece {
            Ok(piece) => {
                if let Some(usage) = piece.content.usage {
                    self.record.prompt(usage);
                }
                self.record.tokens(piece.content.tokens());
                if piece.content.has_something() {
                    self.record.piece();
                }
                self.continued = piece.content.continued;
                // A replayed answer says so only at its end.
                if let Some(degraded) = &piece.content.degraded {
                    self.degraded = Some((**degraded).clone());
                }
                if let Some(end) = &piece.end {
                    failpoint!("gateway-last-piece");
                    self.record.completed(end.reason, end.usage);
                    self.close();
                }
            }
            Err(error) => {
                self.record.failed(error.code);
                self.stream = None;
            }
        }
        Some(piece)
    }

    /// Records the model that answers, as named by the first piece.
    fn set_model(&mut self, model: Option<&ModelKey>) -> Result<(), WireError> {
        let Some(model) = model else { return Ok(()) };
        let index = self.entries.iter().position(|entry| entry.key == *model);
        let index = index.ok_or_else(|| broken("another model answers than was asked for"))?;
        self.entries.swap(0, index);
        self.record.of_model(&self.entries[0]);
        Ok(())
    }

    /// Waits for the whole answer, at most until the gateway's drain time is over.
    pub(crate) async fn collect(&mut self) -> Result<Whole, WireError> {
        let mut gathering = Gathering::new(self.check.expected);
        let cut = self.cut.clone();
        while let Some(piece) = cut.run_until_cancelled(self.next()).await.ok_or_else(upstream::stopping)? {
            gathering.add(piece?).map_err(broken)?;
        }
        gathering.finish().map_err(broken)
    }

    /// Waits for the orchestrator to end the stream, because dropping it here would look like a cancellation.
    fn close(&mut self) {
        let Some(mut stream) = self.stream.take() else { return };
        // Usually the end comes with the last chunk.
        if stream.next().now_or_never().is_none() {
            self.tracker.spawn(async move {
                if time::timeout(CLOSING, stream.next()).await.is_err() {
                    debug!("an orchestrator left a stream open after its last chunk");
                }
            });
        }
    }
}

/// Checks that chunks arrive in order, belong to this job, and do not come from an attempt that was given up.
#[derive(Debug)]
struct Sequence {
    correlation_id: String,
    expected: Expected,
    next: u64,
    attempt: u32,
}

/// The fields of an `Infer.Chunk` that the gateway reads.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Chunk<'a> {
    correlation_id: &'a str,
    seq: u64,
    payload: Content,
    done: bool,
    #[serde(default = "first_attempt")]
    attempt: u32,
    #[serde(default)]
    model: Option<ModelKey>,
    #[serde(default)]
    progress: Option<IgnoredAny>,
}

fn first_attempt() -> u32 {
    1
}

impl Sequence {
    fn new(correlation_id: CorrelationId, expected: Expected) -> Self {
        Self { correlation_id: correlation_id.to_string(), expected, next: 0, attempt: 1 }
    }

    /// Reads a chunk. Returns `None` if it carries only progress.
    fn read(&mut self, raw: Bytes) -> Result<Option<Piece>, WireError> {
        let chunk: Chunk<'_> = serde_json::from_slice(&raw).map_err(|_| broken("a chunk could not be read"))?;
        if chunk.correlation_id != self.correlation_id {
            return Err(broken("a chunk is of another job"));
        }
        if chunk.seq != self.next {
            return Err(broken("a chunk is out of order"));
        }
        if chunk.attempt < self.attempt {
            return Err(broken("a chunk is of a try that was given up"));
        }
        if chunk.progress.is_some() {
            return Ok(None);
        }
        let mut content = chunk.payload;
        let is_expected = content.index < self.expected.choices
            && content.embeddings.iter().all(|embedding| embedding.index < self.expected.embeddings);
        if !is_expected {
            return Err(broken("a chunk brings what was not asked for"));
        }
        let end = match (chunk.done, content.finish_reason, content.usage) {
            (false, ..) => None,
            (true, Some(reason), Some(usage)) => Some(End { reason, usage }),
            (true, ..) => return Err(broken("the last chunk lacks its reason or usage")),
        };
        if end.is_some() && self.expected.choices > 1 {
            // With several answers, each has already ended in a chunk of its own.
            content.finish_reason = None;
        }
        self.next += 1;
        self.attempt = chunk.attempt;
        let (seq, attempt, model) = (chunk.seq, chunk.attempt, chunk.model);
        Ok(Some(Piece { raw, seq, attempt, model, content, end }))
    }
}

/// The part of a chunk that says whether it is part of the answer.
#[derive(Default, Deserialize)]
pub(crate) struct ChunkHead {
    /// Set in a chunk that carries progress and no part of the answer.
    #[serde(default)]
    pub(crate) progress: Option<IgnoredAny>,
    #[serde(default)]
    pub(crate) origin: Option<Origin>,
    #[serde(default)]
    pub(crate) quota: Option<QuotaState>,
    #[serde(default)]
    pub(crate) degraded: Option<Degraded>,
    #[serde(default)]
    pub(crate) model: Option<ModelKey>,
}

impl ChunkHead {
    /// Reads the head of a chunk. One that cannot be read counts as part of the answer, and fails it later.
    pub(crate) fn read(raw: &[u8]) -> Self {
        serde_json::from_slice(raw).unwrap_or_default()
    }
}

/// Logs a protocol violation and returns the error for the client, without the details.
pub(crate) fn broken(what: &str) -> WireError {
    error!(what, "an orchestrator broke the protocol");
    WireError::new(ErrorCode::InternalError, "the answer broke off by an internal error")
}

/// A kept answer that was read whole.
pub(crate) struct KeptWhole {
    pub(crate) whole: Whole,
    pub(crate) origin: Option<Origin>,
    pub(crate) degraded: Option<Degraded>,
}

/// Collects a kept answer. It counts as no request, and costs nothing.
pub(crate) async fn collect_kept(begun: Begun, job: CorrelationId) -> Result<KeptWhole, WireError> {
    let Begun { mut stream, first, origin, mut degraded, quota: _ } = begun;
    let expected = Expected::default();
    let (mut check, mut gathering) = (Sequence::new(job, expected), Gathering::new(expected));
    let mut next = first.map(Ok);
    loop {
        let raw = next.ok_or_else(|| broken("the answer ended without its last chunk"))?.map_err(for_clients)?;
        if let Some(piece) = check.read(raw)? {
            degraded = piece.content.degraded.as_deref().cloned().or(degraded);
            let is_last = piece.end.is_some();
            gathering.add(piece).map_err(broken)?;
            if is_last {
                return Ok(KeptWhole { whole: gathering.finish().map_err(broken)?, origin, degraded });
            }
        }
        next = stream.next().await;
    }
}

/// Converts an error for the client. Codes that nodes use only among themselves are translated.
pub(crate) fn for_clients(error: CallError) -> WireError {
    match error {
        CallError::Closed | CallError::Stalled | CallError::PeerEnded => {
            WireError::new(ErrorCode::Unavailable, "the connection to the network broke off, try again")
        }
        other => WireError::from(other).for_clients(),
    }
}

/// Reads a chunk as the first of an answer, for fuzzing.
pub fn parse_chunk(bytes: &[u8]) -> Result<(), WireError> {
    let chunk: protocol::infer::InferChunk = codec::decode(bytes)?;
    let expected = Expected { choices: 2, embeddings: 2 };
    let mut gathering = Gathering::new(expected);
    let piece = Sequence::new(chunk.correlation_id, expected).read(Bytes::copy_from_slice(bytes))?;
    piece.map_or(Ok(()), |piece| gathering.add(piece).map_err(broken))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> CorrelationId {
        "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("uuid")
    }

    fn chunk(seq: u64, attempt: u32, rest: &str) -> Bytes {
        format!(r#"{{"correlationId":"{}","seq":{seq},"attempt":{attempt},{rest}}}"#, job()).into()
    }

    const TEXT: &str = r#""payload":{"text":"hi","tokens":[1]},"done":false"#;
    const DONE: &str =
        r#""payload":{"finishReason":"stop","usage":{"promptTokens":1,"completionTokens":2}},"done":true"#;

    #[test]
    fn chunks_in_order_are_read() {
        let mut sequence = Sequence::new(job(), Expected::default());
        let mut read = |chunk| sequence.read(chunk).map(|piece| piece.expect("part of the answer"));
        assert_eq!(read(chunk(0, 1, TEXT)).expect("first").content.text, "hi");
        assert_eq!(read(chunk(1, 2, TEXT)).expect("another try may go on").attempt, 2);
        let last = read(chunk(2, 2, DONE)).expect("last");
        assert_eq!(last.end.expect("ends").usage.completion_tokens, 2);
    }

    #[test]
    fn tokens_are_counted_and_what_says_something_without_any_is_one() {
        for (payload, tokens) in [
            (r#""text":"hi","tokens":[1,2]"#, 2),
            (r#""tokens":[3]"#, 1),
            (r#""text":"hi""#, 1),
            (r#""usage":{"promptTokens":5,"completionTokens":0}"#, 0),
        ] {
            let raw = chunk(0, 1, &format!(r#""payload":{{{payload}}},"done":false"#));
            let piece = Sequence::new(job(), Expected::default()).read(raw).expect("in order").expect("part of it");
            assert_eq!(piece.content.tokens(), tokens, "{payload}");
        }
    }

    #[test]
    fn a_chunk_has_one_delta_for_each_call() {
        let deltas = r#"{"index":0,"id":"a","name":"f","arguments":"{"},{"index":0,"arguments":"}"},
            {"index":1,"id":"b","name":"g"},{"index":1,"arguments":"{}"}"#;
        let raw = chunk(0, 1, &format!(r#""payload":{{"toolCalls":[{deltas}]}},"done":false"#));
        let piece = Sequence::new(job(), Expected::default()).read(raw).expect("in order").expect("part of it");
        let calls: Vec<_> = piece.content.tool_calls.iter().map(|delta| (delta.index, &*delta.arguments)).collect();
        assert_eq!(calls, [(0, "{}"), (1, "{}")]);
    }

    #[test]
    fn progress_takes_no_place_in_the_order() {
        const PROGRESS: &str = r#""payload":{},"done":false,"progress":{"tokensRead":3,"tokensTotal":9}"#;
        let mut sequence = Sequence::new(job(), Expected::default());
        for raw in [chunk(0, 1, PROGRESS), chunk(0, 1, PROGRESS), chunk(0, 2, PROGRESS)] {
            assert!(ChunkHead::read(&raw).progress.is_some());
            assert_eq!(sequence.read(raw), Ok(None));
        }
        assert!(ChunkHead::read(&chunk(0, 2, TEXT)).progress.is_none());
        let first = sequence.read(chunk(0, 2, TEXT)).expect("in order").expect("part of the answer");
        assert_eq!((first.seq, first.attempt), (0, 2));
        assert_eq!(sequence.read(chunk(1, 2, PROGRESS)), Ok(None));
        assert_eq!(sequence.read(chunk(1, 2, TEXT)).expect("in order").expect("part of the answer").seq, 1);
    }

    #[test]
    fn what_breaks_the_order_is_an_internal_error() {
        let fails = |chunks: &[Bytes]| {
            let mut sequence = Sequence::new(job(), Expected::default());
            let outcome = chunks.iter().cloned().map(|chunk| sequence.read(chunk)).find_map(Result::err);
            assert_eq!(outcome.expect("refused").code, ErrorCode::InternalError);
        };
        fails(&[chunk(1, 1, TEXT)]);
        fails(&[chunk(0, 1, TEXT), chunk(0, 1, TEXT)]);
        fails(&[chunk(0, 1, TEXT), chunk(2, 1, TEXT)]);
        fails(&[chunk(0, 2, TEXT), chunk(1, 1, TEXT)]);
        fails(&[chunk(0, 1, r#""payload":{},"done":true"#)]);
        fails(&[chunk(0, 1, r#""payload":{"index":1,"text":"x"},"done":false"#)]);
        fails(&[chunk(0, 1, r#""payload":{"embeddings":[{"index":0,"base64":""}]},"done":false"#)]);
        fails(&[Bytes::from_static(b"{}")]);
        fails(&[Bytes::from(chunk(0, 1, TEXT).to_vec().into_iter().rev().collect::<Vec<_>>())]);
        let other = String::from_utf8(chunk(0, 1, TEXT).to_vec()).expect("text").replace("018f", "118f");
        fails(&[other.into()]);
    }

    #[test]
    fn the_end_of_several_answers_is_that_of_none_of_them() {
        let mut sequence = Sequence::new(job(), Expected { choices: 2, embeddings: 0 });
        let of_one = sequence.read(chunk(0, 1, r#""payload":{"index":1,"finishReason":"length"},"done":false"#));
        assert_eq!(
            of_one.expect("an answer's end").expect("part of the answer").content.finish_reason,
            Some(FinishReason::Length)
        );
        let of_all = sequence.read(chunk(1, 1, DONE)).expect("the end of all").expect("part of the answer");
        assert_eq!((of_all.content.finish_reason, of_all.end.is_some()), (None, true));
    }

    #[test]
    fn clients_read_no_code_of_calls_between_nodes() {
        let error = for_clients(CallError::Remote(WireError::new(ErrorCode::StaleAttempt, "x")));
        assert_eq!(error.code, ErrorCode::InternalError);
    }
}
