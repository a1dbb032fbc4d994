//! Starts a second worker for a job whose first one is silent.

use std::sync::Arc;
use std::time::Duration;

use protocol::health::ModelServer;
use protocol::infer::InferRequest;
use protocol::model::ModelKey;
use protocol::usage::TokenUsage;
use protocol::{Digest, RetryToken, WorkerId};
use rpc::Client;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::Orchestrator;
use crate::dispatch::Target;
use crate::dispatch::hedge::{self, Hedge, Racing, StartHedge};
use crate::journey::Journey;
use crate::metrics::{HedgeLabel, Metrics};
use crate::quotas::Claim;
use crate::reservation_manager::{Ending, Reservation, ReservationManager};
use crate::scheduler::{self, Placement};

/// A second worker starts after this many times the 95th percentile of the first one's times to the first token.
const PERCENTILES: u32 = 3;
/// The shortest silence after which a second worker starts. Shorter ones are noise.
const AFTER_MIN: Duration = Duration::from_millis(100);

impl Orchestrator {
    /// Returns after how much silence of a worker a second one starts. Returns `None` if none does: answers that have
    /// begun and workers of which too little is known are not hedged.
    pub(super) fn hedge_after(&self, worker_id: WorkerId, journey: &Journey) -> Option<Duration> {
        if !self.config.hedge || journey.request.delivered.is_some() {
            return None;
        }
        let p95 = self.first_tokens.lock().p95(worker_id, journey.model())?;
        Some((p95 * PERCENTILES).max(AFTER_MIN))
    }

    /// Records how long the workers of a job took to the first token.
    pub(super) fn record_waits(&self, journey: &mut Journey) {
        let waits = std::mem::take(&mut journey.waits);
        if !self.config.hedge {
            return;
        }
        let (mut times, now) = (self.first_tokens.lock(), Instant::now());
        for (worker, waited) in waits {
            times.record(worker, journey.model(), waited, now);
        }
    }

    /// Chooses a second worker: one that is well, has room, and has the model in memory.
    fn place_hedge(&self, journey: &Journey) -> Placement {
        let (wanted, barred) = (journey.wanted(), journey.barred());
        let build = journey.build();
        self.fleet.with_candidates(&wanted, Instant::now(), |candidates| {
            let fit = candidates.filter(|other| other.build == build && other.resident && other.barred.is_none());
            scheduler::place(fit, &barred, &self.config.weights, &[])
        })
    }

    fn count_hedge(&self, outcome: &'static str) {
        self.metrics.hedges.get_or_create(&HedgeLabel { outcome }).inc();
    }
}

impl StartHedge for Orchestrator {
    fn start(&self, journey: &mut Journey) -> Option<Racing> {
        let placement = self.place_hedge(journey);
        let Some(worker) = placement.chosen else {
            self.count_hedge("no_worker");
            return None;
        };
        let claim = self.claim(journey, worker.worker_id);
        let request = request_of_hedge(&journey.limited_to(claim.answer_tokens))?;
        if !self.has_retry(&request.tenant_id) {
            self.count_hedge("no_budget");
            return None;
        }
        let (worker_id, model) = (worker.worker_id, journey.model().clone());
        debug!(correlation_id = %request.correlation_id, worker = worker_id.short(), "a second worker starts");
        let context_length = self.fleet.context_length(worker_id, &model);
        let second = SecondWorker {
            client: self.client.clone(),
            reservations: self.reservations.clone(),
            metrics: self.metrics.clone(),
            target: Target { worker_id, timeouts: self.timeouts(journey), context_length },
            capacity: worker.capacity,
            claim,
            server: self.fleet.server(worker_id, &model),
            model,
            request,
        };
        let (sender, begun) = oneshot::channel();
        self.checks.spawn(second.run(sender));
        Some(Racing { placement, begun })
    }
}

/// Returns the request for a second worker: the next attempt, under a token of its own. The token names the reservation
/// that the worker has until it overtakes the first.
fn request_of_hedge(request: &InferRequest) -> Option<InferRequest> {
    let attempt = request.attempt + 1;
    let token = format!("hedge:{attempt}:{}", Digest::of(request.retry_token.as_str().as_bytes()));
    let retry_token: RetryToken = token.parse().ok()?;
    Some(InferRequest { attempt, retry_token, ..request.clone() })
}

/// A second worker for a job, with a reservation of its own.
struct SecondWorker {
    client: Client,
    reservations: Arc<ReservationManager>,
    metrics: Metrics,
    target: Target,
    capacity: u32,
    claim: Claim,
    server: Option<ModelServer>,
    model: ModelKey,
    request: InferRequest,
}

impl SecondWorker {
    /// Runs the job on the second worker until the job has its answer from one of the two.
    async fn run(self, begun: oneshot::Sender<Box<Hedge>>) {
        let outcome = match self.reserve().await {
            Some(reservation) => {
                let outcome = self.race(begun).await;
                // The job is billed under its own name, or not at all.
                if let Err(error) = reservation.finalise(Ending::cancelled(TokenUsage::default())).await {
                    warn!(%error, "could not end the reservation of a second worker, it expires");
                }
                outcome
            }
            None => "failed",
        };
        self.metrics.hedges.get_or_create(&HedgeLabel { outcome }).inc();
    }

    async fn reserve(&self) -> Option<Reservation> {
        let Target { worker_id, .. } = self.target;
        match self.reservations.reserve_hedge(&self.request, worker_id, self.capacity).await {
            Ok(reservation) => Some(reservation),
            Err(error) => {
                debug!(%error, "no reservation for a second worker");
                None
            }
        }
    }

    /// Returns what became of it.
    async fn race(&self, mut begun: oneshot::Sender<Box<Hedge>>) -> &'static str {
        let began = Instant::now();
        let answer = tokio::select! {
            answer = hedge::begin(&self.client, self.target, &self.request) => answer,
            () = begun.closed() => return "lost",
        };
        let Some(answer) = answer else { return "failed" };
        let (replaced, is_replaced) = oneshot::channel();
        let hedge = Hedge {
            worker_id: self.target.worker_id,
            capacity: self.capacity,
            claim: self.claim,
            model: self.model.clone(),
            server: self.server,
            began,
            answer,
            replaced,
        };
        if begun.send(Box::new(hedge)).is_err() {
            return "lost";
        }
        if is_replaced.await.is_ok() { "won" } else { "lost" }
    }
}
