//! Sends a job to a worker and relays its answer to the caller.

pub mod hedge;

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use failpoints::failpoint;
use protocol::infer::{Degraded, FinishReason, InferChunk, Origin, Payload, Progress, START};
use protocol::model::ModelKey;
use protocol::quota::QuotaState;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, UnixMillis, WireError, WorkerId, codec};
use rpc::{CallError, Client, Interrupted, ResponseSink, ResponseStream, StreamCall, StreamOptions};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::{self, Instant};
use tracing::debug;

use self::hedge::{Hedge, Hedging};
use crate::advance::Advance;
use crate::answers::Writer;
use crate::bounds::{Bounds, Content, Meter};
use crate::job::{JobEvent, Position};
use crate::journal::Entry;
use crate::journey::Journey;
use crate::receipts::Receipts;
use crate::reservation_manager::Stop;
use crate::worker_errors;

/// A worker may find that the deadline has passed this much before the orchestrator does.
const DEADLINE_TOLERANCE: Duration = Duration::from_secs(1);

/// The call that submitted a job. It is accepted with the first chunk, which may carry only progress. Until part of the
/// answer is sent, the job can begin anew on another worker; after that, another worker can only continue the answer.
///
/// A caller that leaves a chunk unread for too long counts as gone. Otherwise it would hold its job's reservation
/// forever.
pub struct Delivery {
    state: State,
    stall: Duration,
    has_begun: bool,
    /// Whether the last chunk was sent.
    is_complete: bool,
    /// Whether an answer that nobody reads is longer than can be stored.
    is_too_long: bool,
    /// `None` if the caller does not acknowledge what it reads: what was sent to it counts as read.
    receipts: Option<Receipts>,
    /// A chunk that is sent before the first one.
    notice: Option<Vec<u8>>,
}

enum State {
    Waiting(StreamCall),
    Streaming(ResponseSink),
    /// Any number of calls read the answer.
    Shared {
        writer: Writer,
        /// How long the job goes on when nobody reads; `None` if it needs no reader.
        linger: Option<Duration>,
        /// Whether the answer is also stored.
        is_stored: bool,
    },
    Gone,
}

impl Delivery {
    /// Makes a delivery that accepts `call` when the first chunk is sent. `acknowledges` says whether the caller
    /// acknowledges what it reads.
    pub fn new(call: StreamCall, stall: Duration, acknowledges: bool) -> Self {
        let receipts = acknowledges.then(Receipts::default);
        Self { receipts, ..Self::of(State::Waiting(call), stall) }
    }

    /// Makes a delivery to the calls that read a shared answer.
    pub(crate) fn shared(writer: Writer, linger: Option<Duration>, is_stored: bool, stall: Duration) -> Self {
        Self::of(State::Shared { writer, linger, is_stored }, stall)
    }

    fn of(state: State, stall: Duration) -> Self {
        let (has_begun, is_complete, is_too_long) = (false, false, false);
        Self { state, stall, has_begun, is_complete, is_too_long, receipts: None, notice: None }
    }

    /// Says what is left of the tenant's tokens, before the first chunk.
    pub(crate) fn tell_quota(&mut self, correlation_id: CorrelationId, quota: QuotaState) {
        if let State::Shared { writer, .. } = &self.state {
            return writer.tell_quota(quota);
        }
        let chunk = InferChunk::new(correlation_id, 1, 0, Payload::default());
        let progress = Some(Progress::default());
        self.notice = Some(codec::encode(&InferChunk { progress, quota: Some(quota), ..chunk }));
    }

    /// Says how the job was made cheaper, to everyone who reads a shared answer. Other callers learn it from progress.
    pub(crate) fn tell_degraded(&self, degraded: Option<Degraded>) {
        if let State::Shared { writer, .. } = &self.state {
            writer.tell_degraded(degraded);
        }
    }

    async fn give_notice(&mut self) -> Result<(), Interrupted> {
        match self.notice.take() {
            Some(chunk) => self.state.send(&chunk, TokenUsage::default()).await,
            None => Ok(()),
        }
    }

    /// Says where the answer comes from.
    pub(crate) fn begin(&self, origin: Origin) {
        if let State::Shared { writer, .. } = &self.state {
            writer.begin(origin);
        }
    }

    /// Returns when a shared answer began.
    pub(crate) fn created_at(&self) -> Option<UnixMillis> {
        match &self.state {
            State::Shared { writer, .. } => writer.created_at(),
            State::Waiting(_) | State::Streaming(_) | State::Gone => None,
        }
    }

    /// Returns the answer as its readers get it, if it is to be stored: `last` and all chunks before it.
    pub(crate) fn stored(&self, last: &Bytes) -> Option<(UnixMillis, Vec<Bytes>)> {
        let State::Shared { writer, is_stored: true, .. } = &self.state else { return None };
        let mut chunks = writer.is_whole().then(|| writer.chunks())?;
        chunks.push(last.clone());
        Some((writer.created_at()?, chunks))
    }

    /// Sends the last chunk.
    pub async fn send_last(&mut self, chunk: &[u8], usage: TokenUsage) -> Result<(), Interrupted> {
        if let State::Shared { writer, .. } = &self.state {
            // The job is settled. Its answer must be whole for whoever comes later.
            writer.put(Bytes::copy_from_slice(chunk), usage);
        } else {
            self.send(chunk, usage).await?;
        }
        self.is_complete = true;
        Ok(())
    }

    /// Sends an answer that was kept.
    pub(crate) async fn replay(&mut self, mut chunks: Vec<Bytes>) -> Result<(), Interrupted> {
        let Some(last) = chunks.pop() else { return Err(Interrupted) };
        for chunk in chunks {
            // The job is billed already.
            self.send(&chunk, TokenUsage::default()).await?;
        }
        self.send_last(&last, TokenUsage::default()).await
    }

    async fn send(&mut self, chunk: &[u8], usage: TokenUsage) -> Result<(), Interrupted> {
        self.has_begun = true;
        let stall = self.stall;
        let sending = async {
            self.give_notice().await?;
            self.state.send(chunk, usage).await
        };
        let sent = time::timeout(stall, sending).await.unwrap_or(Err(Interrupted));
        self.is_too_long = sent.is_err() && self.state.is_overfull(chunk.len());
        sent
    }

    /// Sends a chunk. `usage` is what the job is billed once the caller has read it.
    pub(crate) async fn send_metered(&mut self, chunk: &[u8], usage: TokenUsage) -> Result<(), Interrupted> {
        self.send(chunk, usage).await?;
        if let (Some(receipts), State::Streaming(reply)) = (&mut self.receipts, &self.state) {
            receipts.acknowledge(reply.acknowledged());
            receipts.sent(reply.sent(), usage);
        }
        Ok(())
    }

    /// Waits until the caller has read all that was sent.
    pub(crate) async fn wait_until_read(&mut self) -> Result<(), Interrupted> {
        if let State::Shared { writer, .. } = &self.state {
            return time::timeout(self.stall, writer.wait_until_read()).await.map_err(|_| Interrupted);
        }
        let (Some(_), State::Streaming(reply)) = (&self.receipts, &mut self.state) else { return Ok(()) };
        loop {
            let read = reply.acknowledged();
            match time::timeout(self.stall, reply.wait_until_acknowledged()).await {
                Ok(outcome) => return outcome,
                // Whoever reads slowly is not gone.
                Err(_) if reply.acknowledged() > read => {}
                Err(_) => return Err(Interrupted),
            }
        }
    }

    /// Returns what is billed of `sent` if no more follows: what the caller has read.
    pub fn read_of(&mut self, sent: TokenUsage) -> TokenUsage {
        match (&mut self.receipts, &self.state) {
            // Nobody was to read it yet.
            (_, State::Shared { .. }) if self.is_too_long => sent,
            (_, State::Shared { writer, .. }) => writer.read(),
            (None, _) => sent,
            (Some(receipts), State::Streaming(reply)) => receipts.acknowledge(reply.acknowledged()),
            (Some(_), State::Waiting(_) | State::Gone) => TokenUsage::default(),
        }
    }

    /// Sends a chunk that carries progress and no part of the answer.
    pub(crate) async fn send_progress(&mut self, chunk: &[u8]) -> Result<(), Interrupted> {
        if let State::Shared { writer, .. } = &self.state {
            writer.progress(Bytes::copy_from_slice(chunk));
            return Ok(());
        }
        let stall = self.stall;
        let sending = async {
            self.give_notice().await?;
            self.state.send(chunk, TokenUsage::default()).await
        };
        time::timeout(stall, sending).await.unwrap_or(Err(Interrupted))
    }

    /// Waits until the caller is gone. Cancel safe.
    pub async fn gone(&mut self) {
        match &mut self.state {
            State::Waiting(call) => call.cancelled().await,
            State::Streaming(reply) => reply.cancelled().await,
            State::Shared { writer, linger: Some(linger), .. } => writer.abandoned(*linger).await,
            State::Shared { linger: None, .. } => std::future::pending().await,
            State::Gone => {}
        }
    }

    /// Returns whether part of the answer was sent.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Returns whether the job was given up because its answer, which nobody reads, is longer than can be stored.
    pub(crate) fn is_too_long(&self) -> bool {
        self.is_too_long
    }

    /// Ends a call that got the last chunk.
    pub(crate) async fn complete(mut self) {
        self.is_complete = true;
        self.finish().await;
    }

    pub async fn finish(self) {
        match self.state {
            State::Streaming(reply) if self.is_complete => {
                let _ = time::timeout(self.stall, reply.finish()).await;
            }
            // A caller that counts as gone may be back, and must not take this for the end.
            State::Streaming(reply) => {
                let _ = time::timeout(self.stall, reply.fail(abandoned())).await;
            }
            // A caller may have come when the job was given up.
            State::Shared { writer, .. } => writer.end(if self.is_complete { Ok(()) } else { Err(abandoned()) }),
            // There is nothing to finish if the caller is gone.
            State::Waiting(_) | State::Gone => {}
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
                State::Shared { writer, .. } => writer.end(Err(error)),
                State::Gone => {}
            }
        };
        let _ = time::timeout(self.stall, said).await;
    }
}

impl State {
    async fn send(&mut self, chunk: &[u8], usage: TokenUsage) -> Result<(), Interrupted> {
        if let Self::Waiting(_) = self {
            let Self::Waiting(call) = std::mem::replace(self, Self::Gone) else { return Err(Interrupted) };
            *self = Self::Streaming(call.accept().await?);
        }
        match self {
            Self::Streaming(reply) => reply.send(chunk).await,
            Self::Shared { writer, linger, .. } => {
                // A chunk may be part of a larger buffer.
                let push = writer.push(Bytes::copy_from_slice(chunk), usage);
                tokio::select! {
                    biased;
                    () = push => Ok(()),
                    () = writer.overfull(chunk.len()), if linger.is_none() => Err(Interrupted),
                }
            }
            Self::Waiting(_) | Self::Gone => Err(Interrupted),
        }
    }

    /// Returns whether a chunk makes an answer that needs no reader longer than can be stored.
    fn is_overfull(&self, bytes: usize) -> bool {
        matches!(self, Self::Shared { writer, linger: None, .. } if writer.is_overfull(bytes))
    }
}

fn abandoned() -> WireError {
    let message = "the job was given up because nobody read its answer; ask again";
    WireError::new(ErrorCode::Unavailable, message).with_retry_after(Duration::from_secs(1))
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
        /// Whether the worker claims more usage than is possible.
        overclaims: bool,
    },
    /// The caller cancelled or disconnected, or an operator cancelled the job.
    CallerGone {
        /// Tokens that it had read by then.
        usage: TokenUsage,
    },
    /// The worker refused or failed.
    Failed {
        error: WireError,
        fault: Fault,
        /// Tokens delivered until then.
        usage: TokenUsage,
    },
    /// Engines crashed on the job, and it is not retried.
    Dead {
        /// The error sent to the caller.
        error: WireError,
    },
}

/// What a failed attempt says of its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing but what the error's code says.
    None,
    /// The worker did not acknowledge the job.
    Unacknowledged,
    /// The worker's process has ended.
    Ended,
    /// The connection to the worker broke: it was cut off, or its machine is gone.
    Lost,
    /// The worker's engine was killed from outside.
    EngineKilled,
    /// The worker stops, and hands the job over.
    Leaving,
    /// The worker broke the contract, or lied.
    Breach,
}

impl AttemptEnd {
    /// Returns the end of an attempt that never reached a worker.
    pub fn refused(error: WireError) -> Self {
        Self::Failed { error, fault: Fault::None, usage: TokenUsage::default() }
    }

    /// Returns the error code, or the status of a job that ends so.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Complete { .. } => "completed",
            Self::CallerGone { .. } => "cancelled",
            Self::Failed { error, .. } | Self::Dead { error } => error.code.as_str(),
        }
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
    progress: Option<Progress>,
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
    #[serde(default, borrow)]
    tool_calls: Vec<CallHead<'a>>,
    #[serde(default)]
    index: u32,
    #[serde(default)]
    tokens: Vec<u32>,
    #[serde(default)]
    logprobs: Vec<IgnoredAny>,
    #[serde(default)]
    finish_reason: Option<FinishReason>,
    #[serde(default)]
    usage: Option<TokenUsage>,
}

#[derive(Deserialize)]
struct CallHead<'a> {
    #[serde(default, borrow)]
    name: Cow<'a, str>,
    #[serde(default, borrow)]
    arguments: Cow<'a, str>,
}

impl PayloadHead<'_> {
    fn entry(&self) -> Entry<'_> {
        let Self { index, tokens, text, reasoning, tool_calls, logprobs, finish_reason, .. } = self;
        let has_other = !(reasoning.is_empty() && tool_calls.is_empty() && logprobs.is_empty());
        Entry { index: *index, tokens, text, has_other, finish_reason: *finish_reason }
    }

    fn content(&self) -> Content {
        let calls = self.tool_calls.iter().map(|call| call.name.len() + call.arguments.len());
        Content {
            bytes: self.text.len() + self.reasoning.len() + calls.sum::<usize>(),
            tokens: self.tokens.len(),
            logprobs: self.logprobs.len(),
        }
    }
}

/// How long a worker is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    pub options: StreamOptions,
    /// The longest time without a token of the answer and without a further evaluated token of the prompt.
    pub token_stall: Option<Duration>,
}

/// The worker of an attempt.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub worker_id: WorkerId,
    pub timeouts: Timeouts,
    /// What the worker reports for the model, in tokens; 0 if unknown.
    pub context_length: u32,
}

/// Sends a job to a worker and relays its answer, or the rest of it, except the last chunk. If the worker is silent,
/// another one may overtake it.
///
/// A chunk of another job or attempt, out of order, or beyond what the request asks for, fails the attempt, so that an
/// abandoned or dishonest worker cannot add to the answer or to the bill.
pub async fn attempt(
    client: &Client,
    target: Target,
    stop: &Stop,
    hedging: &mut Hedging<'_>,
    journey: &mut Journey,
    delivery: &mut Delivery,
) -> AttemptEnd {
    let Target { worker_id, timeouts, context_length } = target;
    let body = journey.take_encoded();
    let mut bounds = Bounds::of(&journey.sent(), body.len(), context_length);
    let deadline = journey.deadline;
    let before = journey.meter.filter(|_| journey.request.delivered.is_some());
    let mut meter = before.map_or_else(|| Meter::new(bounds), |before| before.within(bounds));
    let mut relayed = Relayed::begin(bounds, timeouts.token_stall);
    let opening = client.open_stream(worker_id, START, body, timeouts.options);
    let opened = tokio::select! {
        opened = opening => opened,
        () = delivery.gone() => return AttemptEnd::CallerGone { usage: delivery.read_of(meter.delivered()) },
        () = stop.cancelled.cancelled() => {
            return AttemptEnd::CallerGone { usage: delivery.read_of(meter.delivered()) };
        }
    };
    let mut answer = match opened {
        Ok(answer) => answer,
        Err(error) => {
            let fault = if let CallError::Remote(said) = &error { fault_of(said) } else { Fault::Unacknowledged };
            let error = failure(error, bounds, deadline);
            return AttemptEnd::Failed { error, fault, usage: TokenUsage::default() };
        }
    };
    failpoint!("orchestrator-acknowledged");
    journey.step(JobEvent::Acknowledge);
    journey.acknowledged_at = Some(Instant::now());
    let mut first = None;
    loop {
        let end = tokio::select! {
            end = relay(&mut answer, first.take(), hedging, journey, delivery, &mut relayed, &mut meter) => end,
            () = stop.cancelled.cancelled() => Relay::CallerGone,
            () = stop.void.cancelled() => {
                let error = WireError::new(ErrorCode::StaleAttempt, "the job's lease was lost");
                Relay::Failed { error, fault: Fault::None }
            }
        };
        journey.meter = Some(meter);
        let usage = meter.delivered();
        return match end {
            Relay::Complete(end) => end,
            Relay::CallerGone => AttemptEnd::CallerGone { usage: delivery.read_of(usage) },
            Relay::Failed { error, fault } => AttemptEnd::Failed { error, fault, usage },
            Relay::Broken(error) => broken(error, bounds, deadline, usage),
            Relay::Overtaken(hedge) => {
                match hedge.take_over(journey, relayed.advance.longest(Instant::now())).await {
                    Ok(begun) => {
                        bounds = begun.bounds;
                        (answer, relayed, meter) = (begun.stream, begun.relayed, Meter::new(bounds));
                        first = Some(begun.first);
                        continue;
                    }
                    Err(error) if error.code == ErrorCode::StaleAttempt => {
                        AttemptEnd::Failed { error, fault: Fault::None, usage }
                    }
                    // The first worker goes on.
                    Err(error) => {
                        debug!(%error, "a second worker could not take a job over");
                        continue;
                    }
                }
            }
        };
    }
}

/// Returns the end of an attempt whose stream broke.
fn broken(error: CallError, bounds: Bounds, deadline: Instant, usage: TokenUsage) -> AttemptEnd {
    let fault = match &error {
        CallError::PeerEnded => Fault::Ended,
        CallError::Closed => Fault::Lost,
        CallError::Remote(said) => fault_of(said),
        _ => Fault::None,
    };
    let error = failure(error, bounds, deadline);
    AttemptEnd::Failed { error, fault, usage }
}

/// Returns what a worker's error says of it.
fn fault_of(said: &WireError) -> Fault {
    match said.code {
        ErrorCode::WorkerStopping => Fault::Leaving,
        ErrorCode::WorkerFailed if said.suspects == Some(0) => Fault::EngineKilled,
        _ => Fault::None,
    }
}

/// How the relay of an answer ended.
enum Relay {
    Complete(AttemptEnd),
    CallerGone,
    Failed {
        error: WireError,
        fault: Fault,
    },
    Broken(CallError),
    /// Another worker has begun to answer, and this one has not.
    Overtaken(Box<Hedge>),
}

struct Relayed {
    /// Whether the attempt has sent a part of the answer.
    has_begun: bool,
    /// When the worker last sent a chunk; no longer updated once the answer has begun.
    heard_at: Instant,
    /// The worker's longest silence before its answer began.
    silence: Duration,
    advance: Advance,
    /// What this attempt sent. Only that is the worker's doing.
    own: Meter,
}

async fn relay(
    answer: &mut ResponseStream,
    mut first: Option<Bytes>,
    hedging: &mut Hedging<'_>,
    journey: &mut Journey,
    delivery: &mut Delivery,
    relayed: &mut Relayed,
    meter: &mut Meter,
) -> Relay {
    loop {
        let next = match first.take() {
            Some(first) => Some(Ok(first)),
            None => tokio::select! {
                biased;
                next = answer.next() => next,
                () = delivery.gone() => return Relay::CallerGone,
                hedge = hedging.overtakes(journey, relayed.advance.at()) => return Relay::Overtaken(hedge),
            },
        };
        let bytes = match next {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => return Relay::Broken(error),
            None => return breach("the answer has no end"),
        };
        if !relayed.own.take_bytes(bytes.len()) {
            return breach("the answer is longer than the request allows");
        }
        let Ok(head) = codec::decode_borrowed::<ChunkHead<'_>>(&bytes) else {
            return breach("a chunk is malformed");
        };
        let request = &journey.request;
        let expected = Position { attempt: request.attempt, seq: journey.journal.seq() };
        let is_next = Position { attempt: head.attempt, seq: head.seq }.is_next(expected);
        if head.correlation_id != request.correlation_id || !is_next {
            return breach("a chunk is out of place");
        }
        if head.model.as_ref().is_some_and(|model| model != journey.model()) {
            return breach("another model answers");
        }
        if !relayed.has_begun {
            relayed.heard();
        }
        if let Some(progress) = head.progress {
            if relayed.advance.has_stalled(progress, Instant::now()) {
                let error = WireError::new(ErrorCode::WorkerFailed, "the worker made no progress with the answer");
                return Relay::Failed { error, fault: Fault::None };
            }
            if journey.wants_progress && delivery.send_progress(&bytes).await.is_err() {
                return Relay::CallerGone;
            }
            continue;
        }
        // The deadline limits only the time until the answer begins. An answer that has begun continues as long as its
        // caller reads.
        answer.lift_deadline();
        relayed.advance.token(Instant::now());
        if !std::mem::replace(&mut relayed.has_begun, true) {
            hedging.end();
            journey.begins(relayed.advance.longest(Instant::now()));
        }
        let (content, index) = (head.payload.content(), head.payload.index);
        let is_one_too_many = index >= journey.request.input.answers();
        let is_too_long = !relayed.own.may_answer(journey.journal.tokens_of(index) + content.tokens);
        if is_one_too_many || is_too_long || !relayed.own.take(content, head.payload.usage) {
            return breach("the answer has more tokens than the request allows");
        }
        // Together with what others delivered. Who of them sent too much is not known.
        if !meter.take_bytes(bytes.len()) || !meter.take(content, head.payload.usage) {
            let error = WireError::new(ErrorCode::WorkerFailed, "the answer is longer than the request allows");
            return Relay::Failed { error, fault: Fault::None };
        }
        if head.done {
            failpoint!("orchestrator-last-chunk");
            // The job is settled before its last chunk is sent, so a caller that is gone by now must show here.
            if delivery.wait_until_read().await.is_err() {
                return Relay::CallerGone;
            }
            failpoint!("orchestrator-all-read");
            let claimed = head.payload.usage;
            let usage = claimed.map_or_else(|| meter.delivered(), |claimed| meter.bounded(claimed));
            let finish_reason = head.payload.finish_reason;
            let (continued, degraded) = (journey.continued, journey.degraded.as_ref());
            let is_as_sent = claimed == Some(usage) && continued == 0 && degraded.is_none();
            let amended = (!is_as_sent).then(|| amend(&bytes, usage, continued, degraded));
            let last_chunk = match amended {
                None => bytes,
                Some(Some(amended)) => amended,
                Some(None) => return breach("the last chunk is malformed"),
            };
            let overclaims = claimed.is_some_and(|claimed| meter.is_impossible(claimed));
            let silence = relayed.silence;
            let end = AttemptEnd::Complete { last_chunk, finish_reason, usage, silence, overclaims };
            return Relay::Complete(end);
        }
        failpoint!("orchestrator-chunk");
        journey.step(JobEvent::Chunk);
        if delivery.send_metered(&bytes, meter.delivered()).await.is_err() {
            return Relay::CallerGone;
        }
        failpoint!("orchestrator-chunk-sent");
        journey.charge(meter.delivered());
        journey.journal.record(head.payload.entry(), journey.request.input.echo);
    }
}

impl Relayed {
    fn begin(bounds: Bounds, token_stall: Option<Duration>) -> Self {
        let now = Instant::now();
        let (advance, own) = (Advance::begin(token_stall, now), Meter::new(bounds));
        Self { has_begun: false, heard_at: now, silence: Duration::ZERO, advance, own }
    }

    /// Records that the worker sent a chunk.
    fn heard(&mut self) {
        let now = Instant::now();
        self.silence = self.silence.max(now - self.heard_at);
        self.heard_at = now;
    }
}

/// Writes into the last chunk what is billed, how often the answer was continued, and how the job was made cheaper.
/// Returns `None` if chunk or payload is not an object: serde reads structs from arrays as well.
fn amend(chunk: &Bytes, usage: TokenUsage, continued: u32, degraded: Option<&Degraded>) -> Option<Bytes> {
    let mut chunk = codec::decode::<serde_json::Value>(chunk).ok()?;
    let payload = chunk.as_object_mut()?.get_mut("payload")?.as_object_mut()?;
    payload.insert("usage".to_owned(), serde_json::json!(usage));
    if continued > 0 {
        payload.insert("continued".to_owned(), continued.into());
    }
    if let Some(degraded) = degraded {
        payload.insert("degraded".to_owned(), serde_json::json!(degraded));
    }
    Some(codec::encode(&chunk).into())
}

fn breach(message: &str) -> Relay {
    let error = WireError::new(ErrorCode::WorkerFailed, format!("the worker broke the contract: {message}"));
    Relay::Failed { error, fault: Fault::Breach }
}

/// Returns the job's error for a failed call to a worker.
fn failure(error: CallError, bounds: Bounds, deadline: Instant) -> WireError {
    let CallError::Remote(said) = error else { return worker_errors::of_call(&error) };
    if said.code == ErrorCode::ContextLengthExceeded && !bounds.can_be_too_long() {
        let message = "the worker refused a prompt that fits the context it reports";
        return WireError::new(ErrorCode::WorkerFailed, message);
    }
    worker_errors::translate(said, deadline <= Instant::now() + DEADLINE_TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_chunk_is_amended_if_it_is_an_object() {
        let amend = |chunk: &'static str| amend(&Bytes::from_static(chunk.as_bytes()), TokenUsage::default(), 1, None);
        let amended = amend(r#"{"payload":{"text":"x"},"done":true}"#).expect("an object");
        assert!(std::str::from_utf8(&amended).is_ok_and(|chunk| chunk.contains(r#""continued":1"#)));
        for chunk in [r#"{"payload":[],"done":true}"#, r#"["id",0,{}]"#, "{}", ""] {
            assert_eq!(amend(chunk), None, "{chunk}");
        }
    }
}
