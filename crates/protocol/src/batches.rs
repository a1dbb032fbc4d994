//! Batches of requests: orchestrators own them, and gateways work on them under a lease.

use std::collections::BTreeMap;

use inference::text_id;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::files::{Base64Bytes, FileId, is_hex_uuid};
use crate::id::{CorrelationId, RetryToken, TenantId};
use crate::policy::TenantPolicy;

/// Orchestrator: creates a batch. [`NewBatch`] → [`Batch`].
pub const BATCH_CREATE: &str = "batch.create";
/// Orchestrator: shows a batch. [`BatchRef`] → [`Batch`].
pub const BATCH_SHOW: &str = "batch.show";
/// Orchestrator: lists batches. [`BatchQuery`] → [`BatchList`].
pub const BATCH_LIST: &str = "batch.list";
/// Orchestrator: cancels a batch, unless it has ended. [`BatchRef`] → [`Batch`].
pub const BATCH_CANCEL: &str = "batch.cancel";
/// Orchestrator: gives the caller a batch on which nobody works. [`BatchClaim`] → [`BatchClaimed`].
pub const BATCH_CLAIM: &str = "batch.claim";
/// Orchestrator: extends the lease of a batch, and takes it a step on. [`BatchStep`] → [`BatchNow`].
pub const BATCH_STEP: &str = "batch.step";
/// Orchestrator: lists the lines that have a result. [`LinesQuery`] → [`LineList`].
pub const BATCH_LINES: &str = "batch.lines";
/// Orchestrator: writes the result of a line. [`LineResult`] → [`crate::control::Empty`].
pub const BATCH_RECORD: &str = "batch.record";

/// The most requests of a batch; `OpenAI`'s limit.
pub const LINES_MAX: u32 = 50_000;
/// The most batches of a page. A list may have one more, which shows whether a page follows.
pub const BATCHES_PAGE_MAX: u32 = 100;
/// The most errors that are kept of an invalid file.
pub const ERRORS_MAX: usize = 100;
/// The longest result of a line, in bytes. It is sent in one message.
pub const RESULT_BYTES_MAX: usize = 8 * 1024 * 1024;

text_id! {
    /// Id of a batch. Ids increase with time.
    BatchId, "batch", "`batch_` and 32 lower-case hex digits", "^batch_[0-9a-f]{32}$",
    |text| text.strip_prefix("batch_").is_some_and(is_hex_uuid)
}

impl BatchId {
    /// Makes an id of a UUID of version 7.
    pub fn new(uuid: uuid::Uuid) -> Self {
        format!("batch_{}", uuid.as_simple()).parse().expect("a UUID has 32 hex digits")
    }

    /// Returns the token of a run of a line, from 0: whoever submits it again gets the answer of its one job. A line
    /// has a further run only if the job of the one before ended without an answer.
    pub fn retry_token(&self, line: u32, run: u32) -> RetryToken {
        let token = if run == 0 { format!("{self}:{line}") } else { format!("{self}:{line}:{run}") };
        token.parse().expect("an id is visible ASCII")
    }

    /// Returns whether a token is that of a line of this batch.
    pub fn has_token(&self, token: &RetryToken) -> bool {
        token.as_str().strip_prefix(self.as_str()).is_some_and(|rest| rest.starts_with(':'))
    }

    /// Returns the id of the jobs of a line.
    pub fn job_id(&self, tenant_id: &TenantId, line: u32) -> CorrelationId {
        CorrelationId::of_retry(tenant_id, &self.retry_token(line, 0))
    }
}

/// Where a batch stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    /// Its file is being checked.
    Validating,
    /// Its file is invalid.
    Failed,
    /// Its lines run, or wait to run.
    InProgress,
    /// Its lines have results, and the result files are being completed.
    Finalizing,
    /// The result files are complete.
    Completed,
    /// Its time was over before all lines had run.
    Expired,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled, and its work has ended.
    Cancelled,
}

impl BatchStatus {
    /// Returns its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Returns whether it never changes again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }

    /// Returns whether a batch may go from this status to another.
    pub fn may_become(self, next: Self) -> bool {
        match next {
            Self::Validating => false,
            Self::InProgress | Self::Failed => self == Self::Validating,
            Self::Finalizing => self == Self::InProgress,
            Self::Completed => self == Self::Finalizing,
            Self::Expired => matches!(self, Self::Validating | Self::InProgress),
            Self::Cancelling => matches!(self, Self::Validating | Self::InProgress | Self::Finalizing),
            Self::Cancelled => self == Self::Cancelling,
        }
    }
}

/// A batch to create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NewBatch {
    /// Tenant whose batch it is.
    pub tenant_id: TenantId,
    /// Id of the batch.
    pub id: BatchId,
    /// Path of the endpoint that its lines are requests to.
    pub endpoint: String,
    /// File with the requests.
    pub input_file: FileId,
    /// Id of the file for the answers.
    pub output_file: FileId,
    /// Id of the file for the lines without an answer.
    pub error_file: FileId,
    /// Seconds after which the result files are deleted; the configured time if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub results_expire_after_secs: Option<u64>,
    /// What its client says of it, and who its client is.
    #[serde(flatten)]
    pub details: BatchDetails,
}

/// What is kept of a batch encrypted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BatchDetails {
    /// Pairs that the client chose.
    pub metadata: BTreeMap<String, String>,
    /// Public part of the API key that created it.
    pub key_id: String,
    /// Policy of the tenant at that time, by which the file is checked. What applies later is checked by line.
    pub policy: TenantPolicy,
    /// What is wrong with its file.
    pub errors: Vec<BatchError>,
}

/// What is wrong with a batch's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchError {
    /// Kind of the error.
    pub code: String,
    /// The error in words.
    pub message: String,
    /// Name of the field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub param: Option<String>,
    /// Number of the line, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

/// Names a batch of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchRef {
    /// Tenant whose batch it is.
    pub tenant_id: TenantId,
    /// Id of the batch.
    pub id: BatchId,
}

/// A batch as its orchestrator describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Batch {
    /// Tenant whose batch it is.
    pub tenant_id: TenantId,
    /// Id of the batch.
    pub id: BatchId,
    /// Path of the endpoint that its lines are requests to.
    pub endpoint: String,
    /// File with the requests.
    pub input_file: FileId,
    /// File with the answers, once the batch has ended and has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_file: Option<FileId>,
    /// File with the lines without an answer, once the batch has ended and has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_file: Option<FileId>,
    /// The last status that the store has.
    pub status: BatchStatus,
    /// When it entered each status.
    pub times: BatchTimes,
    /// How many lines it has.
    pub counts: BatchCounts,
    /// What its client says of it, and who its client is.
    #[serde(flatten)]
    pub details: BatchDetails,
}

/// When a batch entered each status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BatchTimes {
    /// When it was created.
    pub created_at: UnixMillis,
    /// When its time is over.
    pub expires_at: UnixMillis,
    /// When its lines began to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_progress_at: Option<UnixMillis>,
    /// When all lines had results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finalizing_at: Option<UnixMillis>,
    /// When it was complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<UnixMillis>,
    /// When its file was found to be invalid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed_at: Option<UnixMillis>,
    /// When it ended because its time was over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expired_at: Option<UnixMillis>,
    /// When its client cancelled it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancelling_at: Option<UnixMillis>,
    /// When it ended because it was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancelled_at: Option<UnixMillis>,
}

impl BatchTimes {
    /// Records when a status began.
    pub fn note(&mut self, status: BatchStatus, now: UnixMillis) {
        let entered = match status {
            BatchStatus::Validating => return,
            BatchStatus::Failed => &mut self.failed_at,
            BatchStatus::InProgress => &mut self.in_progress_at,
            BatchStatus::Finalizing => &mut self.finalizing_at,
            BatchStatus::Completed => &mut self.completed_at,
            BatchStatus::Expired => &mut self.expired_at,
            BatchStatus::Cancelling => &mut self.cancelling_at,
            BatchStatus::Cancelled => &mut self.cancelled_at,
        };
        *entered = Some(now);
    }
}

/// Lines of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BatchCounts {
    /// All lines; 0 until the file was checked.
    pub total: u32,
    /// Lines with an answer.
    pub completed: u32,
    /// Lines that have failed, expired or were cancelled.
    pub failed: u32,
}

/// Which batches to list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchQuery {
    /// Tenant whose batches they are.
    pub tenant_id: TenantId,
    /// Only batches older than this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<BatchId>,
    /// The most batches to return; at most one more than [`BATCHES_PAGE_MAX`].
    pub limit: u32,
}

/// Batches of a tenant.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchList {
    /// The batches, the newest first.
    pub batches: Vec<Batch>,
}

/// Asks for a batch to work on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchClaim {
    /// Batches on which the caller works, or that it does not want for a while. Others of which it holds the lease are
    /// those of the process before it.
    pub working_on: Vec<BatchId>,
}

/// A batch to work on, if there is one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchClaimed {
    /// The batch, and its epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claimed: Option<BatchNow>,
}

/// Takes a batch a step on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchStep {
    /// Tenant and id of the batch.
    #[serde(flatten)]
    pub batch: BatchRef,
    /// The epoch in which the caller claimed it. A caller with an old one is refused.
    pub epoch: u64,
    /// The status that it goes to; unchanged if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<BatchStatus>,
    /// Number of its lines, with [`BatchStatus::InProgress`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u32>,
    /// What is wrong with its file, with [`BatchStatus::Failed`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<BatchError>,
}

/// A batch as its worker sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchNow {
    /// Tenant and id of the batch.
    pub batch: Batch,
    /// Number of the claim, which increases with each.
    pub epoch: u64,
    /// Milliseconds for which the lease lasts.
    pub lease_ms: u64,
    /// Whether its time is over. No further line is to run.
    pub is_overdue: bool,
}

/// Which lines of a batch to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LinesQuery {
    /// Tenant and id of the batch.
    #[serde(flatten)]
    pub batch: BatchRef,
    /// The first line to look at, from 1.
    pub from: u32,
    /// The first line after those.
    pub to: u32,
}

/// Lines of a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LineList {
    /// Numbers of the lines, from 1, in ascending order.
    pub lines: Vec<u32>,
}

/// The result of a line. A line that has one keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LineResult {
    /// Tenant and id of the batch.
    #[serde(flatten)]
    pub batch: BatchRef,
    /// The epoch in which the caller claimed it. A caller with an old one is refused.
    pub epoch: u64,
    /// Number of the line, from 1.
    pub line: u32,
    /// Number of the run that gave the answer, from 0.
    #[serde(default)]
    pub run: u32,
    /// Whether it belongs to the file with errors.
    pub is_error: bool,
    /// The line of the result file; at most [`RESULT_BYTES_MAX`].
    pub bytes: Base64Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [BatchStatus; 8] = [
        BatchStatus::Validating,
        BatchStatus::Failed,
        BatchStatus::InProgress,
        BatchStatus::Finalizing,
        BatchStatus::Completed,
        BatchStatus::Expired,
        BatchStatus::Cancelling,
        BatchStatus::Cancelled,
    ];

    #[test]
    fn a_batch_that_has_ended_never_changes_and_every_other_can_end() {
        for status in ALL {
            let next = ALL.iter().filter(|next| status.may_become(**next)).count();
            assert_eq!(next == 0, status.is_final(), "{status:?}");
            assert!(!status.may_become(status) && !status.may_become(BatchStatus::Validating));
        }
    }

    #[test]
    fn each_line_has_a_job_of_its_own_that_is_always_the_same() {
        let tenant: TenantId = "acme".parse().expect("a tenant");
        let batch = |number| BatchId::new(uuid::Uuid::from_u128(number));
        let job = batch(1).job_id(&tenant, 7);
        assert_eq!(batch(1).job_id(&tenant, 7), job);
        assert_ne!(batch(1).job_id(&tenant, 8), job);
        assert_ne!(batch(2).job_id(&tenant, 7), job);
        let tokens = [batch(1).retry_token(7, 0), batch(1).retry_token(7, 1), batch(1).retry_token(71, 0)];
        assert!(tokens.iter().all(|token| batch(1).has_token(token) && !batch(2).has_token(token)));
        assert!(tokens[0] != tokens[1] && tokens[1] != tokens[2]);
    }
}
