//! Jobs whose clients may ask for their answer again: a repeat reads the answer that runs, or the one that is kept.

use std::time::Duration;

use bytes::Bytes;
use metadata_store::{DurableState, JobKey, SealedAnswer, TerminalState};
use protocol::infer::{Degraded, InferChunk, InferRequest, Origin, Payload, Progress};
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, UnixMillis, WireError, codec};
use tokio::task;
use tokio::time::{self, Instant};
use tracing::warn;

use super::Orchestrator;
use crate::answers::{self, Found, Next, Reader};
use crate::dispatch::Delivery;
use crate::journey::Journey;
use crate::refusals;
use crate::reservation_manager::key_of;

/// The longest time that a job goes on without a reader, whatever its gateway asks for.
const LINGER_MAX: Duration = Duration::from_mins(5);

/// Bytes of an answer up to which it is sealed at once. More would hold up the other jobs of the thread.
pub(super) const SEALED_AT_ONCE: usize = 64 * 1024;

/// What is asked of a job whose client may submit it again.
pub(super) struct Repeatable {
    key: JobKey,
    /// How long the job goes on without a reader; `None` if it needs none.
    linger: Option<Duration>,
    keeps_answer: bool,
    wants_progress: bool,
    /// What is kept with the answer.
    note: Option<String>,
}

impl Repeatable {
    /// Returns `None` if the client cannot submit the request again. Takes the note out of the request.
    pub(super) fn of(request: &mut InferRequest) -> Option<Self> {
        let note = request.note.take();
        let linger = Duration::from_millis(request.linger_ms?).min(LINGER_MAX);
        Some(Self {
            linger: (!(request.detached && note.is_some())).then_some(linger),
            key: key_of(request),
            keeps_answer: request.keeps_answer,
            wants_progress: request.progress,
            note,
        })
    }
}

impl Orchestrator {
    /// Answers a call with the answer of its job, which at most one call runs.
    pub(super) async fn take_repeatable(&self, request: Repeatable, journey: Journey, caller: Delivery) {
        let (fingerprint, deadline) = (journey.fingerprint, journey.deadline);
        let found = loop {
            match self.answers.enter(&request.key, fingerprint) {
                Found::Undecided(undecided) => undecided.decided().await,
                found => break found,
            }
        };
        match found {
            Found::Other | Found::Undecided(_) => caller.fail(refusals::reused()).await,
            Found::Answer(reader) => request.follow(reader, Some(deadline), caller).await,
            Found::Nothing(writer, reader) => {
                let stall = Duration::from_secs(self.config.caller_stall_secs);
                let is_stored = request.keeps_answer && self.config.answers_kept_hours > 0;
                let delivery = Delivery::shared(writer, request.linger, is_stored, stall);
                // The job's own deadline ends it.
                let run = self.run_repeatable(&request, journey, delivery);
                tokio::join!(run, request.follow(reader, None, caller));
            }
        }
    }

    async fn run_repeatable(&self, request: &Repeatable, journey: Journey, mut delivery: Delivery) {
        let key = &request.key;
        let outcome = match self.recall(key, &journey.fingerprint).await {
            Ok(None) => {
                delivery.begin(Origin { created_at: self.reservations.now(), replayed: false, attached: false });
                Box::pin(self.run_noted(request, journey, &mut delivery)).await
            }
            Ok(Some((created_at, chunks))) => {
                delivery.begin(Origin { created_at, replayed: true, attached: false });
                delivery.tell_degraded(chunks.last().and_then(degraded_of));
                // If it fails, the readers are gone or too slow.
                let _ = delivery.replay(chunks).await;
                Ok(())
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => delivery.finish().await,
            Err(error) => delivery.fail(error).await,
        }
    }

    /// Runs a job whose note is kept before, unless it is refused at once.
    async fn run_noted(
        &self,
        request: &Repeatable,
        mut journey: Journey,
        delivery: &mut Delivery,
    ) -> Result<(), WireError> {
        self.admit(&mut journey).await?;
        self.keep_note(request, &mut journey, delivery).await?;
        let outcome = self.complete(journey, delivery).await;
        // The failure of a repeat that ran nothing is not that of the job.
        if let Err(error) = &outcome {
            self.note_failure(request, error).await;
        }
        outcome
    }

    /// Returns the answer of a job that has ended, or `None` if the job is to run.
    async fn recall(
        &self,
        key: &JobKey,
        fingerprint: &[u8; 32],
    ) -> Result<Option<(UnixMillis, Vec<Bytes>)>, WireError> {
        let Some(known) = self.reservations.job(key).await? else { return Ok(None) };
        if known.may_run_again(fingerprint) {
            return Ok(None);
        }
        let has_answer = known.state == DurableState::Settled(TerminalState::Completed);
        if has_answer
            && known.request_fingerprint == *fingerprint
            && let Some(answer) = self.stored_answer(key).await?
        {
            return Ok(Some(answer));
        }
        Err(refusals::repeated(&known, fingerprint))
    }

    /// Returns the chunks of a kept answer, and when it began.
    pub(super) async fn stored_answer(&self, key: &JobKey) -> Result<Option<(UnixMillis, Vec<Bytes>)>, WireError> {
        let Some(sealed) = self.reservations.answer(key).await? else { return Ok(None) };
        let answer = self.sealing_key.open(&owner(key), &sealed).ok().and_then(answers::decode);
        if answer.is_none() {
            warn!(correlation_id = %key.correlation_id, "a kept answer cannot be opened");
        }
        Ok(answer)
    }

    /// Seals the answer of a job that is about to be settled, if it is to be kept.
    pub(super) async fn sealed(&self, key: &JobKey, delivery: &Delivery, last: &Bytes) -> Option<SealedAnswer> {
        let (created_at, chunks) = delivery.stored(last)?;
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let (sealing_key, owner) = (self.sealing_key.clone(), owner(key));
        let seal = move || sealing_key.seal(&owner, &answers::encode(created_at, &chunks));
        let sealed = if bytes < SEALED_AT_ONCE { seal() } else { task::spawn_blocking(seal).await.ok()? };
        let sealed = sealed?;
        let kept = Duration::from_hours(self.config.answers_kept_hours);
        Some(SealedAnswer { sealed: sealed.into(), expires_at: self.reservations.now().after(kept) })
    }
}

/// Returns what binds a sealed answer to its job.
fn owner(key: &JobKey) -> Vec<u8> {
    codec::encode(&("answer", &key.tenant_id, key.correlation_id, &key.retry_token))
}

impl Repeatable {
    async fn follow(&self, reader: Reader, deadline: Option<Instant>, caller: Delivery) {
        follow(reader, self.key.correlation_id, self.wants_progress, deadline, caller).await;
    }

    /// Returns the note that is kept before the job runs, because its client does not wait for the answer.
    pub(super) fn early_note(&self) -> Option<&String> {
        self.note.as_ref().filter(|_| self.linger.is_none())
    }

    /// Returns the note that is kept with the answer.
    pub(super) fn late_note(&self) -> Option<&String> {
        self.note.as_ref().filter(|_| self.linger.is_some())
    }

    pub(super) fn key(&self) -> &JobKey {
        &self.key
    }
}

/// Sends a shared answer to a caller. By `deadline` it must have begun.
pub(super) async fn follow(
    mut reader: Reader,
    job: CorrelationId,
    wants_progress: bool,
    deadline: Option<Instant>,
    mut caller: Delivery,
) {
    let mut is_introduced = false;
    let mut billed = TokenUsage::default();
    loop {
        let next = tokio::select! {
            biased;
            next = reader.next() => next,
            () = caller.gone() => return reader.acknowledge(caller.read_of(billed)),
            () = time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() && !caller.has_begun() => {
                let error = WireError::new(ErrorCode::DeadlineExceeded, "the deadline passed");
                return caller.fail(error).await;
            }
        };
        if let (Next::Chunk(..), Some(origin), true) = (&next, reader.origin(), wants_progress)
            && !std::mem::replace(&mut is_introduced, true)
            && caller.send_progress(&introduction(job, origin, &reader)).await.is_err()
        {
            return;
        }
        let sent = match next {
            Next::Chunk(chunk, usage) => {
                billed = usage;
                let sent = caller.send_metered(&chunk, usage).await;
                reader.acknowledge(caller.read_of(usage));
                sent
            }
            Next::Progress(chunk) if wants_progress => caller.send_progress(&chunk).await,
            Next::Progress(_) => Ok(()),
            Next::Receipt => caller.wait_until_read().await.map(|()| reader.receipt()),
            Next::TooLate => return caller.fail(refusals::is_running()).await,
            Next::End(Ok(())) => return caller.complete().await,
            Next::End(Err(error)) => return caller.fail(error).await,
        };
        if sent.is_err() {
            return reader.acknowledge(caller.read_of(billed));
        }
    }
}

/// Returns how the job of an answer was made cheaper, from its last chunk.
fn degraded_of(last: &Bytes) -> Option<Degraded> {
    codec::decode::<InferChunk>(last).ok()?.payload.degraded
}

/// Writes a chunk that says where the answer comes from, and how its job was made cheaper.
fn introduction(job: CorrelationId, origin: Origin, reader: &Reader) -> Vec<u8> {
    let chunk = InferChunk::new(job, 1, 0, Payload::default());
    // An answer that is replayed says nothing of the present.
    let quota = reader.quota().filter(|_| !origin.replayed);
    let (progress, degraded) = (Some(Progress::default()), reader.degraded());
    codec::encode(&InferChunk { progress, origin: Some(origin), quota, degraded, ..chunk })
}
