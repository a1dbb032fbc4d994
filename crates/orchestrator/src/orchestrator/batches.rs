//! Batches: their state, the leases under which gateways work on them, and the results of their lines.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{BatchChange, BatchCreated, BatchRecord, JobKey, NewBatchRecord, NewLine};
use protocol::batches::{
    BATCHES_PAGE_MAX, Batch, BatchClaim, BatchClaimed, BatchDetails, BatchList, BatchNow, BatchQuery, BatchRef,
    BatchStatus, BatchStep, ERRORS_MAX, LineList, LineResult, LinesQuery, NewBatch, RESULT_BYTES_MAX,
};
use protocol::control::Empty;
use protocol::files::{Base64Bytes, FileRef};
use protocol::{ErrorCode, WireError, codec};
use rpc::Caller;
use tracing::info;

use super::Orchestrator;
use super::files::{missing_file, no_randomness, too_many_files, unusable};

impl Orchestrator {
    pub(crate) async fn create_batch(self: Arc<Self>, _: Caller, new: NewBatch) -> Result<Batch, WireError> {
        let NewBatch { tenant_id, id, endpoint, input_file, output_file, error_file, .. } = new;
        let created_at = self.reservations.now();
        let window = Duration::from_secs(u64::from(self.config.batch_window_hours) * 3600);
        let results_secs = self.kept_for(new.results_expire_after_secs).as_secs();
        let name = |file, kind: &str| self.seal_name(&tenant_id, file, &format!("{id}_{kind}.jsonl"));
        let sealed_names = [name(&output_file, "output")?, name(&error_file, "error")?];
        let batch = BatchRef { tenant_id, id };
        let sealed = self.seal_details(&batch, &new.details)?;
        let expires_at = created_at.after(window);
        let record = NewBatchRecord {
            batch,
            endpoint,
            input_file,
            output_file,
            error_file,
            created_at,
            expires_at,
            results_secs,
            sealed,
            sealed_names,
        };
        let max = self.config.tenant_files_max;
        match self.store.batches().create_batch(record, max).await.map_err(|error| unusable(&error))? {
            BatchCreated::Created(batch) => self.shown(*batch),
            BatchCreated::NoInput => Err(missing_file()),
            BatchCreated::TooManyFiles => Err(too_many_files(max)),
        }
    }

    pub(crate) async fn show_batch(self: Arc<Self>, _: Caller, batch: BatchRef) -> Result<Batch, WireError> {
        let found = self.store.batches().batch(batch).await.map_err(|error| unusable(&error))?;
        self.shown(found.ok_or_else(missing_batch)?)
    }

    pub(crate) async fn list_batches(self: Arc<Self>, _: Caller, query: BatchQuery) -> Result<BatchList, WireError> {
        let BatchQuery { tenant_id, after, limit } = query;
        let found = self.store.batches().list_batches(tenant_id, after, limit.min(BATCHES_PAGE_MAX + 1));
        let found = found.await.map_err(|error| unusable(&error))?;
        Ok(BatchList { batches: found.into_iter().map(|batch| self.shown(batch)).collect::<Result<_, _>>()? })
    }

    /// Cancels a batch and the lines that run or wait. Its gateway ends it.
    pub(crate) async fn cancel_batch(self: Arc<Self>, _: Caller, batch: BatchRef) -> Result<Batch, WireError> {
        let change = self.change(&batch, None, Some(BatchStatus::Cancelling));
        let changed = self.store.batches().step_batch(change).await.map_err(|error| unusable(&error))?;
        let changed = changed.ok_or_else(missing_batch)?;
        if changed.status == BatchStatus::Cancelling {
            info!(batch = %batch.id, "a batch is cancelled");
            self.stop_lines(&batch);
        }
        self.shown(changed)
    }

    /// Cancels the jobs of a batch's lines.
    fn stop_lines(&self, batch: &BatchRef) {
        self.running.cancel_all(|job| job.tenant_id == batch.tenant_id && batch.id.has_token(&job.retry_token));
    }

    pub(crate) async fn claim_batch(
        self: Arc<Self>,
        caller: Caller,
        claim: BatchClaim,
    ) -> Result<BatchClaimed, WireError> {
        let now = self.reservations.now();
        let claimed =
            self.store.batches().claim_batch(caller.key, claim.working_on, now, now.after(self.batch_lease()));
        let claimed = claimed.await.map_err(|error| unusable(&error))?;
        Ok(BatchClaimed { claimed: claimed.map(|batch| self.present(batch)).transpose()? })
    }

    fn batch_lease(&self) -> Duration {
        Duration::from_secs(self.config.batch_lease_secs.max(3))
    }

    pub(crate) async fn step_batch(self: Arc<Self>, _: Caller, step: BatchStep) -> Result<BatchNow, WireError> {
        let BatchStep { batch, epoch, status, total, mut errors } = step;
        let mut change = self.change(&batch, Some(epoch), status);
        change.total = total;
        if !errors.is_empty() {
            let known = self.store.batches().batch(batch.clone()).await.map_err(|error| unusable(&error))?;
            let mut details = self.details(&known.ok_or_else(missing_batch)?)?;
            errors.truncate(ERRORS_MAX);
            details.errors = errors;
            change.sealed = Some(self.seal_details(&batch, &details)?);
        }
        let changed = self.store.batches().step_batch(change).await.map_err(|error| unusable(&error))?;
        self.present(changed.ok_or_else(lost_lease)?)
    }

    fn change(&self, batch: &BatchRef, epoch: Option<u64>, status: Option<BatchStatus>) -> BatchChange {
        let now = self.reservations.now();
        let lease_until = epoch.map(|_| now.after(self.batch_lease()));
        BatchChange { batch: batch.clone(), epoch, status, total: None, sealed: None, now, lease_until }
    }

    pub(crate) async fn list_lines(self: Arc<Self>, _: Caller, query: LinesQuery) -> Result<LineList, WireError> {
        let LinesQuery { batch, from, to } = query;
        let lines = self.store.batches().lines(batch, from, to).await.map_err(|error| unusable(&error))?;
        Ok(LineList { lines })
    }

    pub(crate) async fn record_line(self: Arc<Self>, _: Caller, result: LineResult) -> Result<Empty, WireError> {
        let LineResult { batch, epoch, line, run, is_error, bytes: Base64Bytes(bytes) } = result;
        if bytes.len() > RESULT_BYTES_MAX {
            let message = format!("the result is longer than {RESULT_BYTES_MAX} bytes");
            return Err(WireError::new(ErrorCode::RequestTooLarge, message));
        }
        let known = self.store.batches().batch(batch.clone()).await.map_err(|error| unusable(&error))?;
        let known = known.ok_or_else(missing_batch)?;
        let id = if is_error { known.error_file } else { known.output_file };
        let file = FileRef { tenant_id: batch.tenant_id.clone(), id };
        let length = bytes.len() as u64;
        let sealed = self.seal_piece(&file, line, bytes).await?;
        let job = line_key(&batch, line, run);
        let new = NewLine { batch, epoch, line, is_error, bytes: length, sealed, job };
        let recorded = self.store.batches().record_line(new).await.map_err(|error| unusable(&error))?;
        if recorded { Ok(Empty {}) } else { Err(lost_lease()) }
    }

    /// Shows a batch to the gateway that works on it. If no further line is to run, those that run are cancelled, also
    /// those that came too late to be cancelled before.
    fn present(&self, batch: BatchRecord) -> Result<BatchNow, WireError> {
        let is_overdue = batch.times.expires_at <= self.reservations.now();
        if is_overdue || batch.status == BatchStatus::Cancelling {
            self.stop_lines(&batch.batch);
        }
        let (epoch, lease_ms) = (batch.epoch, self.batch_lease().as_millis() as u64);
        Ok(BatchNow { batch: self.shown(batch)?, epoch, lease_ms, is_overdue })
    }

    fn shown(&self, batch: BatchRecord) -> Result<Batch, WireError> {
        let details = self.details(&batch)?;
        let BatchRecord { batch: BatchRef { tenant_id, id }, status, counts, .. } = batch;
        let has_ended = status.is_final();
        Ok(Batch {
            tenant_id,
            id,
            endpoint: batch.endpoint,
            input_file: batch.input_file,
            output_file: (has_ended && counts.completed > 0).then_some(batch.output_file),
            error_file: (has_ended && counts.failed > 0).then_some(batch.error_file),
            status,
            times: batch.times,
            counts,
            details,
        })
    }

    fn details(&self, batch: &BatchRecord) -> Result<BatchDetails, WireError> {
        let opened = self.sealing_key.open(&owner(&batch.batch), &batch.sealed).ok();
        opened.and_then(|details| codec::decode(&details).ok()).ok_or_else(|| {
            let message = "the batch cannot be read: it was sealed with another key than that of the data folder";
            WireError::new(ErrorCode::InternalError, message)
        })
    }

    fn seal_details(&self, batch: &BatchRef, details: &BatchDetails) -> Result<Vec<u8>, WireError> {
        self.sealing_key.seal(&owner(batch), &codec::encode(details)).ok_or_else(no_randomness)
    }
}

/// Returns the key of the job of a line's run.
fn line_key(batch: &BatchRef, line: u32, run: u32) -> JobKey {
    let BatchRef { tenant_id, id } = batch;
    JobKey {
        tenant_id: tenant_id.clone(),
        correlation_id: id.job_id(tenant_id, line),
        retry_token: id.retry_token(line, run),
    }
}

/// Returns what binds the sealed details to their batch.
fn owner(batch: &BatchRef) -> Vec<u8> {
    codec::encode(&("batch", &batch.tenant_id, &batch.id))
}

fn missing_batch() -> WireError {
    WireError::new(ErrorCode::NotFound, "there is no such batch, or no longer").with_param("batch_id")
}

/// Returns the error for a gateway whose batch was given to another.
fn lost_lease() -> WireError {
    WireError::new(ErrorCode::StaleAttempt, "the batch is in another epoch, or does not take this")
}
