//! A job's answer on its way to the client, checked piece by piece.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::infer::FinishReason;
use protocol::model::ModelEntry;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, WireError, codec};
use rpc::{AnswerStream, CallError};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time;
use tokio_util::task::TaskTracker;
use tracing::{debug, error};

use crate::request_record::RequestRecord;

/// How long an orchestrator may take to close a stream after its last chunk.
const CLOSING: Duration = Duration::from_secs(1);

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The chunk as the orchestrator sent it, JSON.
    pub raw: Bytes,
    /// Its place in the answer, counted from 0 without gaps.
    pub seq: u64,
    /// The try that made it.
    pub attempt: u32,
    /// Text to append; may be empty.
    pub text: String,
    /// How the answer ended, in its last piece.
    pub end: Option<End>,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: FinishReason,
    /// What it took.
    pub usage: TokenUsage,
}

/// A job's answer. Dropping it before its end cancels the job.
pub struct Answer {
    correlation_id: CorrelationId,
    entry: Arc<ModelEntry>,
    /// Taken away at the end.
    stream: Option<AnswerStream>,
    check: Sequence,
    /// The first piece, which was waited for before the answer was given out.
    first: Option<Piece>,
    record: RequestRecord,
    tracker: TaskTracker,
    _permit: OwnedSemaphorePermit,
}

impl Answer {
    /// Waits for the first piece. What goes wrong until then is the request's refusal.
    pub(crate) async fn begin(
        stream: AnswerStream,
        entry: Arc<ModelEntry>,
        record: RequestRecord,
        tracker: TaskTracker,
        permit: OwnedSemaphorePermit,
    ) -> Result<Self, WireError> {
        let correlation_id = record.correlation_id;
        let mut answer = Self {
            correlation_id,
            entry,
            stream: Some(stream),
            check: Sequence::new(correlation_id),
            first: None,
            record,
            tracker,
            _permit: permit,
        };
        answer.first = answer.next().await.transpose()?;
        Ok(answer)
    }

    /// Returns the job's name.
    pub fn correlation_id(&self) -> CorrelationId {
        self.correlation_id
    }

    /// Returns the model that answers.
    pub fn model(&self) -> &Arc<ModelEntry> {
        &self.entry
    }

    /// Returns the try that answers, counted from 1.
    pub fn attempt(&self) -> u32 {
        self.check.attempt
    }

    /// Returns the next piece, or `None` after the last. After an error there is nothing more.
    pub async fn next(&mut self) -> Option<Result<Piece, WireError>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let stream = self.stream.as_mut()?;
        let piece = match stream.next().await {
            Some(Ok(message)) => self.check.read(message),
            Some(Err(error)) => Err(for_clients(error)),
            None => Err(broken("the answer ended without its last chunk")),
        };
        match &piece {
            Ok(piece) => {
                if !piece.text.is_empty() {
                    self.record.piece();
                }
                if let Some(end) = &piece.end {
                    self.record.completed(end);
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

    /// Waits for the whole text and its end.
    pub(crate) async fn collect(&mut self) -> Result<(String, End), WireError> {
        let (mut text, mut end) = (String::new(), None);
        while let Some(piece) = self.next().await {
            let piece = piece?;
            text += &piece.text;
            end = piece.end;
        }
        // An answer without an end is an error above.
        end.map(|end| (text, end)).ok_or_else(|| broken("the answer has no end"))
    }

    /// Lets the orchestrator end the stream: giving it up here would look like a cancel.
    fn close(&mut self) {
        if let Some(mut stream) = self.stream.take() {
            self.tracker.spawn(async move {
                if time::timeout(CLOSING, stream.next()).await.is_err() {
                    debug!("an orchestrator left a stream open after its last chunk");
                }
            });
        }
    }
}

/// Checks that chunks come in order, of one job, and of no try that was given up.
#[derive(Debug)]
struct Sequence {
    correlation_id: String,
    next: u64,
    attempt: u32,
}

/// The parts of an `Infer.Chunk` that matter here; the tokens are skipped.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Chunk<'a> {
    correlation_id: &'a str,
    seq: u64,
    payload: Payload,
    done: bool,
    #[serde(default = "first_attempt")]
    attempt: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    #[serde(default)]
    text: String,
    #[serde(default)]
    finish_reason: Option<FinishReason>,
    #[serde(default)]
    usage: Option<TokenUsage>,
}

fn first_attempt() -> u32 {
    1
}

impl Sequence {
    fn new(correlation_id: CorrelationId) -> Self {
        Self { correlation_id: correlation_id.to_string(), next: 0, attempt: 1 }
    }

    fn read(&mut self, raw: Bytes) -> Result<Piece, WireError> {
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
        let end = match (chunk.done, chunk.payload.finish_reason, chunk.payload.usage) {
            (false, ..) => None,
            (true, Some(reason), Some(usage)) => Some(End { reason, usage }),
            (true, ..) => return Err(broken("the last chunk lacks its reason or usage")),
        };
        self.next += 1;
        self.attempt = chunk.attempt;
        let (seq, attempt, text) = (chunk.seq, chunk.attempt, chunk.payload.text);
        Ok(Piece { raw, seq, attempt, text, end })
    }
}

/// Logs a breach of the protocol and returns what the client may know of it.
fn broken(what: &str) -> WireError {
    error!(what, "an orchestrator broke the protocol");
    WireError::new(ErrorCode::InternalError, "the answer broke off by an internal error")
}

/// Returns the error a client sees: codes that nodes use among themselves stay among them.
pub(crate) fn for_clients(error: CallError) -> WireError {
    let mut error = match error {
        CallError::Closed | CallError::Stalled => {
            WireError::new(ErrorCode::Unavailable, "the connection to the network broke off, try again")
        }
        other => WireError::from(other),
    };
    translate(&mut error);
    error
}

pub(crate) fn translate(error: &mut WireError) {
    error.code = match error.code {
        ErrorCode::WorkerFull | ErrorCode::WorkerStopping | ErrorCode::ModelNotHere => ErrorCode::NoCapacity,
        ErrorCode::Cancelled => ErrorCode::Unavailable,
        ErrorCode::StaleAttempt | ErrorCode::NotEnrolled | ErrorCode::NodeRevoked | ErrorCode::UnknownMethod => {
            "a defect between our nodes, not of this request".clone_into(&mut error.message);
            ErrorCode::InternalError
        }
        code => code,
    };
}

/// Reads a chunk as an answer's first, for fuzzing.
pub fn parse_chunk(bytes: &[u8]) -> Result<(), WireError> {
    let chunk: protocol::infer::InferChunk = codec::decode(bytes)?;
    Sequence::new(chunk.correlation_id).read(Bytes::copy_from_slice(bytes)).map(drop)
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
        let mut sequence = Sequence::new(job());
        assert_eq!(sequence.read(chunk(0, 1, TEXT)).expect("first").text, "hi");
        assert_eq!(sequence.read(chunk(1, 2, TEXT)).expect("another try may go on").attempt, 2);
        let last = sequence.read(chunk(2, 2, DONE)).expect("last");
        assert_eq!(last.end.expect("ends").usage.completion_tokens, 2);
    }

    #[test]
    fn what_breaks_the_order_is_an_internal_error() {
        let fails = |chunks: &[Bytes]| {
            let mut sequence = Sequence::new(job());
            let outcome = chunks.iter().cloned().map(|chunk| sequence.read(chunk)).find_map(Result::err);
            assert_eq!(outcome.expect("refused").code, ErrorCode::InternalError);
        };
        fails(&[chunk(1, 1, TEXT)]);
        fails(&[chunk(0, 1, TEXT), chunk(0, 1, TEXT)]);
        fails(&[chunk(0, 1, TEXT), chunk(2, 1, TEXT)]);
        fails(&[chunk(0, 2, TEXT), chunk(1, 1, TEXT)]);
        fails(&[chunk(0, 1, r#""payload":{},"done":true"#)]);
        fails(&[Bytes::from_static(b"{}")]);
        fails(&[Bytes::from(chunk(0, 1, TEXT).to_vec().into_iter().rev().collect::<Vec<_>>())]);
        let other = String::from_utf8(chunk(0, 1, TEXT).to_vec()).expect("text").replace("018f", "118f");
        fails(&[other.into()]);
    }

    #[test]
    fn codes_that_nodes_use_among_themselves_stay_among_them() {
        for (code, seen) in [
            (ErrorCode::WorkerFull, ErrorCode::NoCapacity),
            (ErrorCode::StaleAttempt, ErrorCode::InternalError),
            (ErrorCode::UnknownMethod, ErrorCode::InternalError),
            (ErrorCode::ContextLengthExceeded, ErrorCode::ContextLengthExceeded),
        ] {
            assert_eq!(for_clients(CallError::Remote(WireError::new(code, "x"))).code, seen);
        }
    }
}
