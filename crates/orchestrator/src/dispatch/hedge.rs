//! A second worker for a job whose first one is silent. Whichever sends the first part of the answer goes on with it.

use std::time::Duration;

use bytes::Bytes;
use protocol::health::ModelServer;
use protocol::infer::{InferRequest, START};
use protocol::model::ModelKey;
use protocol::{ErrorCode, WireError, WorkerId, codec};
use rpc::{Client, ResponseStream};
use tokio::sync::oneshot;
use tokio::time::{self, Instant};

use super::{ChunkHead, Relayed, Target};
use crate::bounds::Bounds;
use crate::job::JobEvent;
use crate::journey::Journey;
use crate::quotas::Claim;
use crate::scheduler::Placement;

/// What starts second workers.
pub trait StartHedge: Sync {
    /// Chooses a second worker and gives it the job. Returns `None` if no worker can take it now.
    fn start(&self, journey: &mut Journey) -> Option<Racing>;
}

/// A second worker that was given a job.
pub struct Racing {
    pub placement: Placement,
    /// Yields the worker's answer once it begins. Dropping the receiver cancels the job there.
    pub begun: oneshot::Receiver<Box<Hedge>>,
}

/// A second worker that has begun to answer.
pub struct Hedge {
    pub worker_id: WorkerId,
    /// The most reservations that the worker may hold.
    pub capacity: u32,
    /// What the job takes of its tenant's quotas there.
    pub claim: Claim,
    pub model: ModelKey,
    /// What runs the model there, if it is not an engine of the worker.
    pub server: Option<ModelServer>,
    /// When the job was sent to it.
    pub began: Instant,
    pub answer: BegunAnswer,
    /// Ends the reservation that the worker has so far. Sending says that the job's own one has replaced it.
    pub replaced: oneshot::Sender<()>,
}

/// An answer of which the first part has arrived.
pub struct BegunAnswer {
    pub(super) stream: ResponseStream,
    /// The first chunk that is part of the answer.
    pub(super) first: Bytes,
    pub(super) relayed: Relayed,
    pub(super) bounds: Bounds,
}

/// When a second worker starts, and the one that has started.
pub struct Hedging<'a> {
    starter: &'a dyn StartHedge,
    state: State,
}

enum State {
    /// The job has its first worker, and gets a second one if that is silent for so long.
    Waiting(Duration),
    Racing(oneshot::Receiver<Box<Hedge>>),
    /// No other worker is started.
    Over,
}

impl<'a> Hedging<'a> {
    /// Makes an attempt that gets a second worker after so much silence, or none.
    pub fn new(starter: &'a dyn StartHedge, after: Option<Duration>) -> Self {
        Self { starter, state: after.map_or(State::Over, State::Waiting) }
    }

    /// Waits until the second worker has begun to answer. It starts once the first has been silent for long enough
    /// since `heard_at`. Cancel safe.
    pub(super) async fn overtakes(&mut self, journey: &mut Journey, heard_at: Instant) -> Box<Hedge> {
        loop {
            self.state = match &mut self.state {
                State::Waiting(after) => {
                    time::sleep_until(heard_at + *after).await;
                    match self.starter.start(journey) {
                        Some(Racing { placement, begun }) => {
                            journey.hedge(placement);
                            State::Racing(begun)
                        }
                        None => State::Over,
                    }
                }
                State::Racing(begun) => match begun.await {
                    Ok(hedge) => {
                        self.state = State::Over;
                        return hedge;
                    }
                    Err(_) => {
                        journey.hedge_failed();
                        State::Over
                    }
                },
                State::Over => std::future::pending().await,
            };
        }
    }

    /// Ends the second worker's job, unless it has overtaken the first.
    pub(super) fn end(&mut self) {
        self.state = State::Over;
    }
}

impl Hedge {
    /// Makes the second worker the job's only one: its next attempt. The first worker has waited for `waited`. On an
    /// error the job stays where it is.
    pub(super) async fn take_over(
        self: Box<Self>,
        journey: &mut Journey,
        waited: Duration,
    ) -> Result<BegunAnswer, WireError> {
        let Self { worker_id, capacity, claim, model, server, began, answer, replaced } = *self;
        let overtaken = journey.overtaken_attempt();
        let mut history = journey.history().to_vec();
        history.extend(overtaken.clone());
        let Some(reservation) = &mut journey.reservation else {
            return Err(WireError::new(ErrorCode::InternalError, "a job was to move without a reservation"));
        };
        // The worker holds one reservation for this job already, which ends as soon as this one is written.
        reservation.reassign(model, worker_id, capacity.saturating_add(1), claim, history).await?;
        let attempt = reservation.attempt;
        journey.answer_tokens = claim.answer_tokens;
        let _ = replaced.send(());
        journey.overtaken(overtaken, waited);
        journey.try_worker(worker_id);
        (journey.attempt_began, journey.request.attempt) = (began, attempt);
        // Its pace is not measured: when it took the job is not known here.
        journey.acknowledged_at = None;
        journey.journal.begin(server);
        for event in [JobEvent::GiveUpAttempt, JobEvent::Reserve, JobEvent::Acknowledge] {
            journey.step(event);
        }
        Ok(answer)
    }
}

/// Sends a job to a second worker and waits for the first chunk that is part of its answer. Returns `None` if the
/// worker refuses or fails.
pub async fn begin(client: &Client, target: Target, request: &InferRequest) -> Option<BegunAnswer> {
    let Target { worker_id, timeouts, context_length } = target;
    let body = Bytes::from(codec::encode(request));
    let bounds = Bounds::of(request, body.len(), context_length);
    let mut relayed = Relayed::begin(bounds, timeouts.token_stall);
    let mut stream = client.open_stream(worker_id, START, body, timeouts.options).await.ok()?;
    loop {
        let bytes = stream.next().await?.ok()?;
        let progress = codec::decode_borrowed::<ChunkHead<'_>>(&bytes).ok()?.progress;
        let Some(progress) = progress else {
            return Some(BegunAnswer { stream, first: bytes, relayed, bounds });
        };
        if !relayed.own.take_bytes(bytes.len()) || relayed.advance.has_stalled(progress, Instant::now()) {
            return None;
        }
        relayed.heard();
    }
}
