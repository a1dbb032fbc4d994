//! Jobs that wait for a free slot.

use std::sync::Arc;
use std::time::Duration;

use observability::metrics::ReasonLabel;
use protocol::infer::{
    Degraded, EmbedInput, InferChunk, InferRequest, Input, ModelDigest, PROGRESS_WITHIN, Payload, Progress,
};
use protocol::model::ModelKey;
use protocol::policy::{DegradePolicy, ServiceClass};
use protocol::usage::TokenUsage;
use protocol::{AdapterName, Digest, ErrorCode, ModelName, WireError, codec};
use tokio::time::{self, Instant};
use tracing::info;

use super::Orchestrator;
use crate::bounds::BYTES_PER_TOKEN;
use crate::dispatch::Delivery;
use crate::fair_queue::{FlowKey, TooMany};
use crate::job_gate::{Group, Label, QueuePosition, Shed, Turn, WaitingJob};
use crate::journey::Journey;
use crate::metrics::ClassLabel;
use crate::refusals;
use crate::scheduler::Candidate;

/// How long a job waits before it takes its place in the queue again, if it found no worker in its turn.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Bytes of a request that are no part of its prompt.
const OTHER_BYTES: usize = 400;

/// Estimates the tokens of a prompt from the size of its request.
pub(super) fn prompt_tokens(request_bytes: usize) -> u32 {
    u32::try_from(request_bytes.saturating_sub(OTHER_BYTES) / BYTES_PER_TOKEN).unwrap_or(u32::MAX)
}

impl Orchestrator {
    /// Chooses a worker with a free slot. While no slot is free, the job waits for its turn, unless it has a
    /// reservation.
    pub(super) async fn find_slot(
        &self,
        journey: &mut Journey,
        delivery: &mut Delivery,
    ) -> Result<Candidate, WireError> {
        let has_passed = journey.reservation.is_some() || delivery.has_begun();
        if has_passed || self.gate.is_quiet() || !self.gate.supply(&journey.group()).exists {
            let found = self.find_worker(journey, delivery).await;
            if has_passed || !journey.is_busy {
                self.note_wait(journey, Duration::ZERO, &found);
                return found;
            }
        }
        let began = Instant::now();
        let found = self.wait_for_slot(journey, delivery).await;
        self.note_wait(journey, began.elapsed(), &found);
        found
    }

    fn note_wait(&self, journey: &mut Journey, waited: Duration, found: &Result<Candidate, WireError>) {
        journey.waited += waited;
        if found.is_ok() && journey.reservation.is_none() {
            let label = ClassLabel { class: journey.request.class.as_str() };
            self.metrics.queue_wait.get_or_create(&label).observe(waited.as_secs_f64());
        }
    }

    async fn wait_for_slot(&self, journey: &mut Journey, delivery: &mut Delivery) -> Result<Candidate, WireError> {
        journey.share = None;
        self.degrade(journey, delivery).await?;
        let mut position = self.enter_queue(journey)?;
        loop {
            journey.turn = Some(self.turn(&mut position, journey, delivery).await?);
            let chosen = self.choose_worker(journey);
            if chosen.is_ok() || !journey.is_busy {
                return chosen;
            }
            let Some(mut turn) = journey.turn.take() else { return chosen };
            turn.pass();
            tokio::select! {
                () = time::sleep(LOOK_AGAIN) => {}
                () = delivery.gone() => return Err(gone()),
                () = journey.running.cancelled().cancelled() => return Err(refusals::cancelled()),
            }
            let Some(again) = turn.give_back() else { return chosen };
            position = again;
        }
    }

    /// Makes a job cheaper that would wait long, if its tenant's policy says how. Batch jobs wait.
    async fn degrade(&self, journey: &mut Journey, delivery: &mut Delivery) -> Result<(), WireError> {
        let policy = journey.policy.clone();
        let Some(how) = policy.degrade.as_ref().filter(|_| journey.degraded.is_none()) else { return Ok(()) };
        let wait = self.gate.expected_wait(&self.waiting_job(journey)).unwrap_or_default();
        let is_long = wait >= Duration::from_secs(self.config.degrade_wait_secs) && !wait.is_zero();
        if !is_long || journey.request.class == ServiceClass::Batch {
            return Ok(());
        }
        let Some(degraded) = self.cheaper(journey, how, wait) else { return Ok(()) };
        info!(correlation_id = %journey.request.correlation_id, %degraded, "a job is made cheaper");
        self.metrics.degraded.get_or_create(&ReasonLabel { reason: what(&degraded) }).inc();
        delivery.tell_degraded(Some(degraded.clone()));
        journey.degrade(degraded);
        if journey.wants_progress && delivery.send_progress(&waiting_chunk(journey)).await.is_err() {
            return Err(gone());
        }
        Ok(())
    }

    /// Makes a job ask its own models again, because the one that it was given to cannot do what it asks. Returns
    /// whether it was given to another one. The caller is told, if it was told of the other.
    pub(super) async fn restore_models(&self, journey: &mut Journey, delivery: &mut Delivery) -> bool {
        if !journey.restore_models() {
            return false;
        }
        info!(correlation_id = %journey.request.correlation_id, "a job returns to the models that it asked for");
        delivery.tell_degraded(None);
        if journey.wants_progress {
            let told = InferChunk { degraded: Some(Degraded::default()), ..progress_chunk(journey) };
            // A caller that has gone is noticed by the next attempt.
            let _ = delivery.send_progress(&codec::encode(&told)).await;
        }
        true
    }

    /// Returns the first of the cheaper ways that helps: another model or adapter that waits half as long at most, or
    /// a shorter answer.
    fn cheaper(&self, journey: &Journey, how: &DegradePolicy, wait: Duration) -> Option<Degraded> {
        let reason = "queue".to_owned();
        let is_faster = |models: Vec<(ModelKey, Option<Digest>)>, adapter: Option<AdapterName>| {
            let group = Arc::new(Group { models, adapter, regions: journey.policy.allowed_regions.clone() });
            let exists = self.gate.supply(&group).exists;
            let job = WaitingJob { group, ..self.waiting_job(journey) };
            exists && self.gate.expected_wait(&job).is_some_and(|other| other <= wait / 2)
        };
        let mut others = other_models(journey, how);
        if let Some(other) = others.find(|other| is_faster(vec![(other.key.clone(), Some(other.digest))], None)) {
            return Some(Degraded { model: Some(other.key.clone()), reason, ..Degraded::default() });
        }
        let (input, own) = (&journey.request.input, journey.group());
        let adapter = how.adapter.as_ref().filter(|adapter| input.adapter.as_ref().is_some_and(|own| own != *adapter));
        if let Some(adapter) = adapter.filter(|adapter| is_faster(own.models, Some((*adapter).clone()))) {
            return Some(Degraded { adapter: Some(adapter.clone()), reason, ..Degraded::default() });
        }
        let is_shorter = |most: &u32| input.embed.is_none() && input.max_tokens.is_none_or(|asked| asked > *most);
        let max_tokens = how.max_tokens.filter(is_shorter)?;
        Some(Degraded { max_tokens: Some(max_tokens), reason, ..Degraded::default() })
    }

    /// Takes a place in the queue, or returns why the job may not wait.
    fn enter_queue(&self, journey: &mut Journey) -> Result<QueuePosition, WireError> {
        let job = self.waiting_job(journey);
        let wait = self.gate.expected_wait(&job);
        let most = Duration::from_secs(self.config.queue_wait_secs);
        if journey.request.class != ServiceClass::Batch && wait.is_some_and(|wait| wait > most) {
            let message = "too many jobs wait for this model, try again later";
            return Err(shed(journey, "wait_too_long", message, self.gate.retry_after(&job)));
        }
        let label = Label {
            correlation_id: journey.request.correlation_id,
            tenant_id: journey.request.tenant_id.clone(),
            class: journey.request.class,
            model: journey.model().clone(),
            prompt_tokens: journey.prompt_tokens,
        };
        let retry_after = || self.gate.retry_after(&job);
        self.gate.enter(job.clone(), label).map_err(|too_many| match too_many {
            TooMany::OfTenant => {
                let message = "too many jobs of this tenant wait, try again later";
                shed(journey, "tenant_queue_full", message, retry_after())
            }
            TooMany::OfAll => shed(journey, "queue_full", "too many jobs wait, try again later", retry_after()),
        })
    }

    fn waiting_job(&self, journey: &Journey) -> WaitingJob {
        let InferRequest { tenant_id, class, .. } = &journey.request;
        WaitingJob {
            group: Arc::new(journey.group()),
            flow: FlowKey { tenant_id: tenant_id.clone(), class: *class },
            weight: journey.policy.weight.unwrap_or(1),
            cost: self.gate.cost(&journey.request, journey.prompt_tokens),
        }
    }

    /// Waits until it is the job's turn. The caller gets progress meanwhile.
    async fn turn(
        &self,
        position: &mut QueuePosition,
        journey: &mut Journey,
        delivery: &mut Delivery,
    ) -> Result<Turn, WireError> {
        loop {
            tokio::select! {
                biased;
                turn = position.turn() => return turn.map_err(|why| left(journey, why)),
                () = delivery.gone() => return Err(gone()),
                () = journey.running.cancelled().cancelled() => return Err(refusals::cancelled()),
                () = time::sleep_until(journey.deadline) => {
                    let message = "the deadline passed while the request waited for a worker";
                    return Err(WireError::new(ErrorCode::DeadlineExceeded, message));
                }
                () = time::sleep(PROGRESS_WITHIN) => {}
            }
            if journey.wants_progress && delivery.send_progress(&waiting_chunk(journey)).await.is_err() {
                return Err(gone());
            }
        }
    }

    /// Records what a completed job shows of its worker and its model.
    pub(super) fn note_completed(&self, journey: &Journey, usage: TokenUsage, ended: Instant) {
        let request = &journey.request;
        if request.input.embed.is_none() && !request.input.count_only {
            self.gate.note_answer(request, usage);
        }
        if let (Some(worker), Some(began)) = (journey.last_worker(), journey.acknowledged_at) {
            let between = began.saturating_duration_since(journey.attempt_began) + ended.elapsed();
            self.fleet.note_pace(worker, ended.saturating_duration_since(began), between);
        }
    }
}

/// Returns the other models that a policy names and that can do what the job asks: those of which the gateway has sent
/// the version and the file, as the catalogue lists them. What a worker says of its own model is not enough.
fn other_models<'a>(journey: &'a Journey, how: &'a DegradePolicy) -> impl Iterator<Item = &'a ModelDigest> {
    let is_new = |name: &&ModelName| journey.models().all(|model| model.model_id != **name);
    let allowed = how.models.iter().filter(|name| journey.policy.allows(name)).filter(is_new);
    let allowed = allowed.filter(|_| !is_bound_to_model(&journey.request.input));
    let listed = |name: &ModelName| {
        let of_name = journey.request.digests.iter().filter(|listed| listed.key.model_id == *name);
        of_name.max_by_key(|listed| listed.key.version)
    };
    allowed.filter_map(listed)
}

/// Returns whether a request means something else to another model: its result is vectors or a number of tokens, or it
/// has ids of tokens.
fn is_bound_to_model(input: &Input) -> bool {
    let has_ids = |texts: &Vec<EmbedInput>| texts.iter().any(|text| matches!(text, EmbedInput::Tokens(_)));
    input.embed.is_some()
        || input.count_only
        || input.prompt_tokens.is_some()
        || input.prompts.as_ref().is_some_and(has_ids)
        || !input.logit_bias.is_empty()
}

/// Returns the error of a job that had to leave the queue.
fn left(journey: &mut Journey, why: Shed) -> WireError {
    match why {
        Shed::Stopped => WireError::new(ErrorCode::Unavailable, "the orchestrator is stopping, try again"),
        Shed::OverShare { retry_after } => {
            let message = "too many jobs wait, and this tenant has more of them than its share, try again later";
            shed(journey, "over_share", message, retry_after)
        }
    }
}

fn shed(journey: &mut Journey, reason: &'static str, message: &str, retry_after: Duration) -> WireError {
    journey.shed = Some(reason);
    refusals::queue_full(message, retry_after)
}

/// Returns the chunk that says that a job still waits, and how it was made cheaper.
fn waiting_chunk(journey: &Journey) -> Vec<u8> {
    codec::encode(&InferChunk { degraded: journey.degraded.clone(), ..progress_chunk(journey) })
}

fn progress_chunk(journey: &Journey) -> InferChunk {
    let chunk = InferChunk::new(journey.request.correlation_id, journey.request.attempt, 0, Payload::default());
    InferChunk { progress: Some(Progress::default()), ..chunk }
}

/// Returns what of a job was made cheaper.
fn what(degraded: &Degraded) -> &'static str {
    match degraded {
        Degraded { model: Some(_), .. } => "model",
        Degraded { adapter: Some(_), .. } => "adapter",
        Degraded { .. } => "max_tokens",
    }
}

fn gone() -> WireError {
    WireError::new(ErrorCode::Cancelled, "the caller has gone")
}
