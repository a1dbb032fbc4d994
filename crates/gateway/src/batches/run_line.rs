//! Runs a line of a batch until it has a result.

use std::sync::Arc;
use std::time::Duration;

use protocol::batches::RESULT_BYTES_MAX;
use protocol::control::{Scope, TokenGrant};
use protocol::policy::ServiceClass;
use protocol::{CorrelationId, ErrorCode, WireError};
use serde_json::value::RawValue;
use tokio::time;

use super::lease::Lease;
use super::task::{LineTask, write_error};
use crate::job::Job;
use crate::openai::batch::BatchEndpoint;
use crate::openai::batch::line::{Line, LineOutcome, write_result};

/// How long the job of a line goes on if this gateway dies, so that the next one gets its answer.
const LINGER: Duration = Duration::from_mins(5);
/// The longest pause before a line is submitted again; it doubles with each time.
const PAUSE_MAX: Duration = Duration::from_mins(1);
const PAUSE: Duration = Duration::from_secs(1);
/// How often a line runs whose workers fail.
const FAILURES_MAX: u32 = 3;
/// How many jobs a line has at most. Each but the last ended without an answer that can be read.
const RUNS_MAX: u32 = FAILURES_MAX;

/// What a line of a batch needs to run, besides itself.
pub(super) struct LineRunner<'a> {
    lease: &'a Lease,
    endpoint: BatchEndpoint,
    grant: Arc<TokenGrant>,
}

impl<'a> LineRunner<'a> {
    pub(super) fn new(lease: &'a Lease, endpoint: BatchEndpoint) -> Self {
        let batch = lease.batch();
        let grant = Arc::new(TokenGrant {
            key_id: batch.details.key_id,
            tenant_id: batch.tenant_id,
            scopes: vec![Scope::Infer],
            policy: batch.details.policy,
            expires_at: None,
        });
        Self { lease, endpoint, grant }
    }

    /// Runs a line and records its result. Returns an error if the batch is no longer this gateway's.
    pub(super) async fn run(&self, number: u32, line: Line) -> Result<(), WireError> {
        let batch = self.lease.reference();
        let id = batch.id.job_id(&batch.tenant_id, number);
        let answered = self.answer(number, id, &line).await;
        if answered.as_ref().is_err_and(|error| is_cancelled(error.code)) && self.is_halted().await? {
            return Ok(());
        }
        let (run, answered) = match answered {
            Ok((run, body)) => (run, written(id, &line, 200, body).ok_or_else(too_long)),
            Err(error) => (0, Err(error)),
        };
        let (is_error, result) = match answered {
            Ok(result) => (false, result),
            Err(error) => (true, refusal(id, &line, &error)),
        };
        match self.lease.record(number, run, is_error, result).await {
            Err(error) if error.code == ErrorCode::RequestTooLarge => {
                self.lease.record(number, run, true, refusal(id, &line, &too_long())).await
            }
            recorded => recorded,
        }
    }

    /// Returns whether the batch was cancelled or its time is over, which cancels its jobs.
    async fn is_halted(&self) -> Result<bool, WireError> {
        if !self.lease.halt().is_cancelled() {
            self.lease.step(None, None, vec![]).await?;
        }
        Ok(self.lease.halt().is_cancelled())
    }

    /// Submits a line until it has an answer or is refused for good. Returns the answer and the number of its run.
    async fn answer(&self, number: u32, id: CorrelationId, line: &Line) -> Result<(u32, Vec<u8>), WireError> {
        let task = LineTask::parse(self.endpoint, line.body.get().as_bytes())?;
        let (mut pause, mut failures, mut run) = (PAUSE, 0, 0);
        loop {
            let error = match Box::pin(self.submit(number, id, run, &task)).await {
                Ok(body) => return Ok((run, body)),
                Err(error) => error,
            };
            if error.code == ErrorCode::IdempotencyKeyReused {
                run += 1;
                // A result that another gateway or an earlier try recorded stays.
                if run == RUNS_MAX || self.has_result(number).await? {
                    return Err(no_answer());
                }
                continue;
            }
            failures += u32::from(is_failure(error.code));
            if !(may_pass(error.code) || is_failure(error.code) && failures < FAILURES_MAX) {
                return Err(error);
            }
            let asked = error.retry_after_ms.map(Duration::from_millis);
            self.sleep(asked.unwrap_or_default().max(pause).min(PAUSE_MAX)).await?;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn has_result(&self, number: u32) -> Result<bool, WireError> {
        Ok(!self.lease.lines(number, number.saturating_add(1)).await?.is_empty())
    }

    /// Waits, unless no further line is to run.
    async fn sleep(&self, pause: Duration) -> Result<(), WireError> {
        let sleep = async {
            time::sleep(pause).await;
            Ok(())
        };
        self.lease.unless_halted(sleep).await
    }

    /// Waits for room among the lines of all batches, and submits a run of a line.
    async fn submit(&self, number: u32, id: CorrelationId, run: u32, task: &LineTask) -> Result<Vec<u8>, WireError> {
        let gateway = &self.lease.gateway;
        let batch = self.lease.reference();
        let token = batch.id.retry_token(number, run);
        let job = Job { class: Some(ServiceClass::Batch), correlation_id: Some(id), ..task.job.clone() };
        let job = job.repeatable(&batch.tenant_id, token, LINGER, true);
        let room = async {
            let permit = gateway.batch_lines().clone().acquire_owned().await;
            let admitted = gateway.admit_line(self.grant.clone(), self.lease.keeper()).await?;
            Ok::<_, WireError>((permit, admitted))
        };
        let (_permit, admitted) = self.lease.unless_halted(room).await?;
        let mut answer = gateway.submit(admitted, job).await?;
        let whole = answer.collect().await?;
        let unwritable = || WireError::new(ErrorCode::InternalError, "the answer could not be written");
        task.write(id, &answer, &whole, gateway.clock().now()).ok_or_else(unwritable)
    }
}

fn is_cancelled(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::Cancelled | ErrorCode::CancelledByOperator)
}

/// Returns the line of the result file, or `None` if it is too long.
fn written(id: CorrelationId, line: &Line, status: u16, body: Vec<u8>) -> Option<Vec<u8>> {
    let body = RawValue::from_string(String::from_utf8(body).ok()?).ok()?;
    let result = write_result(id, &line.custom_id, &LineOutcome::Response { status, body: &body });
    (result.len() <= RESULT_BYTES_MAX).then_some(result)
}

/// Returns the line of the file with errors.
fn refusal(id: CorrelationId, line: &Line, error: &WireError) -> Vec<u8> {
    written(id, line, error.code.http_status(), write_error(error)).unwrap_or_default()
}

/// Returns the error of a line whose jobs have all ended without an answer.
fn no_answer() -> WireError {
    WireError::new(ErrorCode::WorkerFailed, "the workers that ran this request broke off its answer each time")
}

fn too_long() -> WireError {
    WireError::new(ErrorCode::InternalError, "the answer is too long for a result file")
}

/// Returns whether the same line may be answered later, however often it is submitted.
fn may_pass(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::RateLimitExceeded
            | ErrorCode::NoCapacity
            | ErrorCode::BreakerOpen
            | ErrorCode::ModelLoading
            | ErrorCode::Unavailable
            | ErrorCode::DeadlineExceeded
            | ErrorCode::IdempotencyInProgress
            | ErrorCode::StaleAttempt
    )
}

/// Returns whether workers failed, which may be because of the line.
fn is_failure(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::WorkerFailed | ErrorCode::EngineCrashed | ErrorCode::InternalError)
}
