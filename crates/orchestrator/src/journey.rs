//! One job on its way: what was tried, where it stands, what it holds.

use protocol::control::{AttemptDecision, Decision};
use protocol::infer::InferRequest;
use protocol::model::ModelKey;
use protocol::prefix::PrefixChain;
use protocol::{Digest, WireError, WorkerId, codec};
use tokio::time::Instant;
use tracing::error;

use crate::circuit_breaker::Admission;
use crate::job::{JobEvent, JobState};
use crate::reservation_manager::Reservation;
use crate::scheduler::Placement;

/// One job on its way.
pub struct Journey {
    /// The job, with the number of the present attempt.
    pub request: InferRequest,
    /// Hash of the request as it came.
    pub fingerprint: [u8; 32],
    /// What it asks for.
    pub model: ModelKey,
    /// The beginnings of its prompt, by which a worker is found that has one of them at hand.
    pub prefix: PrefixChain,
    /// When its caller stops waiting for the answer to begin.
    pub deadline: Instant,
    /// Whether its caller reads how far it is.
    pub wants_progress: bool,
    /// Workers that had it, in order.
    pub tried: Vec<WorkerId>,
    /// Its room on a worker.
    pub reservation: Option<Reservation>,
    /// What the breaker said to the present attempt.
    pub admission: Option<Admission>,
    /// When the present attempt began.
    pub attempt_began: Instant,
    /// Engines that crashed on it.
    pub crashes: u32,
    /// What the attempt before failed of.
    pub last_error: Option<WireError>,
    state: JobState,
    attempts: Vec<AttemptDecision>,
}

impl Journey {
    /// Begins.
    pub fn new(mut request: InferRequest, fingerprint: [u8; 32], deadline: Instant) -> Self {
        // The orchestrator itself tells work from silence by it.
        let wants_progress = std::mem::replace(&mut request.progress, true);
        let model = ModelKey { model_id: request.model_id.clone(), version: request.version };
        Self {
            prefix: PrefixChain::of(&request),
            request,
            fingerprint,
            model,
            deadline,
            wants_progress,
            tried: vec![],
            reservation: None,
            admission: None,
            attempt_began: Instant::now(),
            crashes: 0,
            last_error: None,
            state: JobState::Received,
            attempts: vec![],
        }
    }

    /// Returns what the request is, whoever's client repeats it: its tenant, its model and its input.
    pub fn content(&self) -> Digest {
        let InferRequest { tenant_id, input, .. } = &self.request;
        Digest::of(&codec::encode(&(tenant_id, &self.model, input)))
    }

    /// Keeps the table of a placement.
    pub fn record(&mut self, placement: Placement) {
        self.attempts.push(AttemptDecision {
            attempt: self.attempts.len() as u32 + 1,
            chosen: placement.chosen.map(|worker| worker.worker_id),
            outcome: "placed".to_owned(),
            candidates: placement.candidates,
            refused: placement.refused,
        });
    }

    /// Says what became of the last placement.
    pub fn note(&mut self, outcome: &str) {
        if let Some(attempt) = self.attempts.last_mut() {
            outcome.clone_into(&mut attempt.outcome);
        }
    }

    /// Moves the job on. A step that its state does not allow is a defect of ours, and changes nothing.
    pub fn step(&mut self, event: JobEvent) {
        match self.state.after(event) {
            Ok(state) => self.state = state,
            Err(illegal) => error!(correlation_id = %self.request.correlation_id, %illegal, "job out of step"),
        }
    }

    /// Ends, leaving what `tether explain` shows.
    pub fn into_decision(self) -> Decision {
        Decision {
            correlation_id: self.request.correlation_id,
            tenant_id: self.request.tenant_id,
            attempts: self.attempts,
        }
    }
}
