//! Answers that their tenants can read again by their job's id, with the notes that gateways keep with them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use metadata_store::{DurableState, JobKey, KeptNote, NewNote, TerminalState};
use protocol::infer::{InferChunk, Origin, Payload, Progress};
use protocol::kept::{KeptAnswer, KeptRef, KeptRemoved, KeptStatus};
use protocol::{ErrorCode, TenantId, UnixMillis, WireError, codec};
use rpc::{Caller, StreamCall};
use tokio::task;
use tracing::warn;

use super::Orchestrator;
use super::repeats::{self, Repeatable, SEALED_AT_ONCE};
use crate::answers::{Found, Reader};
use crate::dispatch::Delivery;
use crate::journey::Journey;

/// How long a cancelled job may take to end before the call returns.
const CANCEL_WITHIN: Duration = Duration::from_secs(1);

impl Orchestrator {
    pub(crate) async fn show_kept(self: Arc<Self>, _: Caller, request: KeptRef) -> Result<KeptAnswer, WireError> {
        let kept = self.find_kept(&request).await?;
        self.describe(kept).await
    }

    /// Cancels a job that runs or waits. One that has ended stays as it is.
    pub(crate) async fn cancel_kept(self: Arc<Self>, _: Caller, request: KeptRef) -> Result<KeptAnswer, WireError> {
        let kept = self.find_kept(&request).await?;
        if matches!(self.status_of(&kept).await?.0, KeptStatus::Queued | KeptStatus::Running) {
            let cancelled = WireError::new(ErrorCode::Cancelled, "cancelled by its client");
            self.reservations.fail_note(&kept.key, cancelled).await?;
            self.stop_job(&kept.key).await;
        }
        let kept = self.find_kept(&request).await?;
        self.describe(kept).await
    }

    pub(crate) async fn remove_kept(self: Arc<Self>, _: Caller, request: KeptRef) -> Result<KeptRemoved, WireError> {
        let KeptRef { tenant_id, correlation_id } = &request;
        let kept = match self.find_kept(&request).await {
            Ok(kept) => kept,
            Err(error) if error.code == ErrorCode::NotFound => return Ok(KeptRemoved { found: false }),
            Err(error) => return Err(error),
        };
        self.stop_job(&kept.key).await;
        self.answers.remove(&kept.key);
        let found = self.reservations.remove_note(tenant_id, *correlation_id).await?;
        Ok(KeptRemoved { found })
    }

    /// Streams an answer from its beginning, while its job runs or after its end.
    pub(crate) async fn read_kept(self: Arc<Self>, call: StreamCall) {
        let request: KeptRef = match codec::decode(&call.body) {
            Ok(request) => request,
            Err(error) => return call.refuse(error.into()).await,
        };
        let kept = match self.find_kept(&request).await {
            Ok(kept) => kept,
            Err(error) => return call.refuse(error).await,
        };
        let stall = Duration::from_secs(self.config.caller_stall_secs);
        let caller = Delivery::new(call, stall, true);
        match self.answers.reader(&kept.key) {
            Some(reader) => self.follow_kept(reader, &kept, caller).await,
            None => self.replay_kept(&kept, caller).await,
        }
    }

    async fn follow_kept(&self, reader: Reader, kept: &KeptNote, caller: Delivery) {
        repeats::follow(reader, kept.key.correlation_id, true, None, caller).await;
    }

    /// Reads a stored answer into memory, where calls read it.
    async fn replay_kept(&self, kept: &KeptNote, caller: Delivery) {
        let stored = async {
            let job = self.reservations.job(&kept.key).await?.ok_or_else(not_kept)?;
            let answer = self.stored_answer(&kept.key).await?.ok_or_else(not_kept)?;
            Ok::<_, WireError>((job.request_fingerprint, answer))
        };
        let (fingerprint, (created_at, chunks)) = match stored.await {
            Ok(stored) => stored,
            Err(error) => return caller.fail(error).await,
        };
        let stall = Duration::from_secs(self.config.caller_stall_secs);
        match self.answers.enter(&kept.key, fingerprint) {
            Found::Answer(reader) => self.follow_kept(reader, kept, caller).await,
            Found::Other | Found::Undecided(_) => caller.fail(gone(kept)).await,
            Found::Nothing(writer, reader) => {
                let mut delivery = Delivery::shared(writer, Some(Duration::ZERO), false, stall);
                let replay = async {
                    delivery.begin(Origin { created_at, replayed: true, attached: false });
                    let _ = delivery.replay(chunks).await;
                    delivery.finish().await;
                };
                tokio::join!(replay, self.follow_kept(reader, kept, caller));
            }
        }
    }

    async fn find_kept(&self, request: &KeptRef) -> Result<KeptNote, WireError> {
        let found = self.reservations.note(&request.tenant_id, request.correlation_id).await?;
        found.ok_or_else(not_kept)
    }

    async fn describe(&self, kept: KeptNote) -> Result<KeptAnswer, WireError> {
        let (status, error) = self.status_of(&kept).await?;
        let opened = self.sealing_key.open(&owner(&kept.key), &kept.sealed).ok();
        let note = opened.and_then(|note| String::from_utf8(note).ok()).ok_or_else(|| {
            warn!(correlation_id = %kept.key.correlation_id, "a kept note cannot be opened");
            gone(&kept)
        })?;
        Ok(KeptAnswer { note, created_at: kept.created_at, status, error })
    }

    /// Returns where a job stands, and why it failed.
    async fn status_of(&self, kept: &KeptNote) -> Result<(KeptStatus, Option<WireError>), WireError> {
        let job = self.reservations.job(&kept.key).await?;
        // A job may complete while it is cancelled. It is billed then, so its answer is its tenant's.
        let is_completed = job.as_ref().is_some_and(|job| job.state == DurableState::Settled(TerminalState::Completed));
        if let Some(error) = kept.error.as_ref().filter(|_| !is_completed) {
            let is_cancelled = error.code == ErrorCode::Cancelled;
            return Ok(if is_cancelled {
                (KeptStatus::Cancelled, None)
            } else {
                (KeptStatus::Failed, Some(error.clone()))
            });
        }
        let failed = |error: Option<metadata_store::JobError>| {
            error.map_or_else(|| gone(kept), |error| WireError::new(error.code, error.message))
        };
        Ok(match job.map(|job| (job.state, job.error)) {
            Some((DurableState::Reserved, _)) => (KeptStatus::Running, None),
            Some((DurableState::Settled(TerminalState::Completed), _)) => (KeptStatus::Completed, None),
            Some((DurableState::Settled(TerminalState::Cancelled), _)) => (KeptStatus::Cancelled, None),
            Some((DurableState::Settled(_), error)) => (KeptStatus::Failed, Some(failed(error))),
            None if self.answers.has(&kept.key) => (KeptStatus::Queued, None),
            None => (KeptStatus::Failed, Some(gone(kept))),
        })
    }

    /// Keeps the note of a job whose client does not wait for its answer. Other notes are kept with the answer.
    pub(super) async fn keep_note(
        &self,
        request: &Repeatable,
        journey: &mut Journey,
        delivery: &mut Delivery,
    ) -> Result<(), WireError> {
        if request.early_note().is_some() && self.config.answers_kept_hours == 0 {
            let message = "no answers are kept here (answers_kept_hours is 0), so no job can run in the background";
            return Err(WireError::new(ErrorCode::UnsupportedParameter, message).with_param("background"));
        }
        journey.late_note = request.late_note().cloned();
        let Some(note) = request.early_note() else { return Ok(()) };
        let created_at = delivery.created_at().unwrap_or_else(|| self.reservations.now());
        let sealed = self.sealed_note(request.key(), note.clone(), created_at).await.ok_or_else(no_randomness)?;
        self.reservations.keep_note(sealed).await?;
        // The client is told that the job was accepted.
        let chunk = InferChunk::new(request.key().correlation_id, 1, 0, Payload::default());
        let accepted = InferChunk { progress: Some(Progress::default()), ..chunk };
        let _ = delivery.send_progress(&codec::encode(&accepted)).await;
        Ok(())
    }

    /// Records why a job whose client does not wait came to no answer.
    pub(super) async fn note_failure(&self, request: &Repeatable, error: &WireError) {
        if request.early_note().is_none() {
            return;
        }
        if let Err(error) = self.reservations.fail_note(request.key(), error.clone().for_clients()).await {
            warn!(correlation_id = %request.key().correlation_id, %error, "could not record why a job failed");
        }
    }

    /// Cancels a job, and waits until it has ended, but not long.
    async fn stop_job(&self, key: &JobKey) {
        let jobs = self.running.cancel(key.correlation_id, Some(&key.tenant_id));
        let _ = tokio::time::timeout(CANCEL_WITHIN, join_all(jobs.iter().map(|job| job.ended()))).await;
    }

    /// Seals the note of a job. Returns `None` if the system has no randomness.
    pub(super) async fn sealed_note(&self, key: &JobKey, note: String, created_at: UnixMillis) -> Option<NewNote> {
        let (sealing_key, owner) = (self.sealing_key.clone(), owner(key));
        let is_short = note.len() < SEALED_AT_ONCE;
        let seal = move || sealing_key.seal(&owner, note.as_bytes());
        let sealed = if is_short { seal() } else { task::spawn_blocking(seal).await.ok()? };
        let expires_at = self.reservations.now().after(Duration::from_hours(self.config.answers_kept_hours));
        Some(NewNote { key: key.clone(), sealed: sealed?.into(), created_at, expires_at })
    }
}

fn not_kept() -> WireError {
    WireError::new(ErrorCode::NotFound, "no answer is kept under this id, or no longer")
}

fn no_randomness() -> WireError {
    WireError::new(ErrorCode::InternalError, "the system gives no random numbers")
}

/// Returns the error for a job that its orchestrator did not finish.
fn gone(kept: &KeptNote) -> WireError {
    let message = format!("the orchestrator ended before job {} had an answer", kept.key.correlation_id);
    WireError::new(ErrorCode::WorkerFailed, message)
}

/// Returns what binds a sealed note to its job.
fn owner(key: &JobKey) -> Vec<u8> {
    let tenant_id: &TenantId = &key.tenant_id;
    codec::encode(&("note", tenant_id, key.correlation_id))
}
