//! One job on its way: what was tried, where it stands, what it holds.

use protocol::control::{AttemptDecision, Decision};
use protocol::infer::InferRequest;
use protocol::model::{ALTERNATIVES_MAX, ModelKey};
use protocol::prefix::PrefixChain;
use protocol::{Digest, WireError, WorkerId, codec};
use tokio::time::Instant;
use tracing::error;

use crate::circuit_breaker::Admission;
use crate::fleet::Wanted;
use crate::job::{JobEvent, JobState};
use crate::reservation_manager::Reservation;
use crate::scheduler::{Placement, Tried};

/// A model that may run a job.
struct Build {
    model: ModelKey,
    /// The beginnings of its prompt: a worker that knows one of them is preferred.
    prefix: PrefixChain,
    /// A context of this many tokens is too short for it; 0 where none is known to be.
    short_context: u32,
}

impl Build {
    fn new(model: ModelKey, request: &InferRequest) -> Self {
        Self { prefix: PrefixChain::with(request, &model), model, short_context: 0 }
    }
}

/// One job on its way.
pub struct Journey {
    /// The job, with the number of the present attempt.
    pub request: InferRequest,
    /// Hash of the request as it came.
    pub fingerprint: [u8; 32],
    /// The models that may run it, the one that it asks for first, and never none.
    builds: Vec<Build>,
    /// Which of them the present attempt is for.
    build: usize,
    /// When its caller stops waiting for the answer to begin.
    pub deadline: Instant,
    /// Whether its caller reads how far it is.
    pub wants_progress: bool,
    /// Workers that had it, and the model that each was to run, in order.
    pub tried: Vec<Tried>,
    /// Its room on a worker.
    pub reservation: Option<Reservation>,
    /// What the breaker said to the present attempt.
    pub admission: Option<Admission>,
    /// Whether the present attempt was sent to its worker.
    pub is_dispatched: bool,
    /// When the present attempt began.
    pub attempt_began: Instant,
    /// Engines that crashed on it.
    pub crashes: u32,
    /// What the attempt before failed of.
    pub last_error: Option<WireError>,
    /// Why a model could not do what it asks, where another was to be tried.
    pub refusal: Option<WireError>,
    state: JobState,
    attempts: Vec<AttemptDecision>,
}

impl Journey {
    pub fn new(mut request: InferRequest, fingerprint: [u8; 32], deadline: Instant) -> Self {
        // The orchestrator itself tells work from silence by it.
        let wants_progress = std::mem::replace(&mut request.progress, true);
        let mut models = vec![request.model()];
        for model in std::mem::take(&mut request.alternatives).into_iter().take(ALTERNATIVES_MAX) {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        let builds = models.into_iter().map(|model| Build::new(model, &request));
        Self {
            builds: builds.collect(),
            build: 0,
            request,
            fingerprint,
            deadline,
            wants_progress,
            tried: vec![],
            reservation: None,
            admission: None,
            is_dispatched: false,
            attempt_began: Instant::now(),
            crashes: 0,
            last_error: None,
            refusal: None,
            state: JobState::Received,
            attempts: vec![],
        }
    }

    /// Returns the model that the present attempt is for; before the first, the one that the job asks for.
    pub fn model(&self) -> &ModelKey {
        &self.builds[self.build].model
    }

    /// Returns the models that may run it.
    pub fn models(&self) -> impl Iterator<Item = &ModelKey> + Clone {
        self.builds.iter().map(|build| &build.model)
    }

    /// Returns the worker that had it last.
    pub fn last_worker(&self) -> Option<WorkerId> {
        self.tried.last().map(|(worker, _)| *worker)
    }

    /// Leaves out the models that it may not have, unless it may have none.
    pub fn keep_models(&mut self, may_have: impl Fn(&ModelKey) -> bool) {
        if self.models().any(&may_have) {
            self.builds.retain(|build| may_have(&build.model));
            self.choose(0);
        }
    }

    /// Returns what it wants of a worker, for each model that may run it yet.
    pub fn wanted(&self) -> Vec<Wanted<'_>> {
        let adapter = self.request.input.adapter.as_ref();
        let wanted = self.builds.iter().map(|Build { model, prefix, short_context }| Wanted {
            model,
            adapter,
            prefix,
            short_context: *short_context,
        });
        wanted.collect()
    }

    /// Has the next attempt be for one of the models.
    pub fn choose(&mut self, build: usize) {
        self.build = build;
        self.request.model_id = self.model().model_id.clone();
        self.request.version = self.model().version;
    }

    /// Takes note that the present model cannot do what the job asks: no worker whose context has no more than
    /// `context` tokens, or nobody at all where that is 0. Nobody has failed.
    pub fn rule_out(&mut self, context: u32, refusal: &WireError) {
        self.tried.pop();
        self.refusal = Some(refusal.clone());
        let build = &mut self.builds[self.build];
        build.short_context = if context == 0 { u32::MAX } else { build.short_context.max(context) };
    }

    /// Returns what the request is, whoever's client repeats it: its tenant, the model that it asks for and its input.
    pub fn content(&self) -> Digest {
        let InferRequest { tenant_id, input, .. } = &self.request;
        Digest::of(&codec::encode(&(tenant_id, &self.builds[0].model, input)))
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

    /// Ends the journey and returns the record of its decision.
    pub fn into_decision(self) -> Decision {
        Decision {
            correlation_id: self.request.correlation_id,
            tenant_id: self.request.tenant_id,
            attempts: self.attempts,
        }
    }
}
