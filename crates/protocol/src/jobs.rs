//! Jobs and dead letters as operators see them: method names, and the messages they carry.

use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::error_code::{ErrorCode, WireError};
use crate::id::{CorrelationId, MalformedId, ModelName, PublicKey, Region, TenantId, TraceId, WorkerId};
use crate::infer::{FinishReason, InferRequest};
use crate::model::ModelKey;
use crate::usage::TokenUsage;

/// Orchestrator: lists its jobs, the newest first. [`JobQuery`] → [`JobPage`].
pub const JOB_LIST: &str = "job.list";
/// Orchestrator: shows the jobs of a request. [`JobRef`] → [`JobPage`].
pub const JOB_SHOW: &str = "job.show";
/// Orchestrator: cancels the running jobs of a request for an operator. [`crate::control::ByOperator`] of a [`JobRef`]
/// → [`JobsCancelled`].
pub const JOB_CANCEL: &str = "job.cancel";
/// Orchestrator: lists its dead letters to an operator, the newest first. [`crate::control::ByOperator`] of a
/// [`DeadLetterQuery`] → [`DeadLetterPage`].
pub const DEAD_LETTER_LIST: &str = "dlq.list";
/// Orchestrator: shows the newest dead letter of a request to an operator. [`crate::control::ByOperator`] of a
/// [`DeadLetterRef`] → [`DeadLetter`].
pub const DEAD_LETTER_SHOW: &str = "dlq.show";
/// Orchestrator: returns a dead letter with its request to an operator who is about to run it again, and forgets the
/// crashes of that request. [`crate::control::ByOperator`] of a [`JobRef`] → [`DeadLetter`].
pub const DEAD_LETTER_RELEASE: &str = "dlq.release";
/// Orchestrator: deletes dead letters for an operator. [`crate::control::ByOperator`] of a [`DeadLetterPurge`] →
/// [`DeadLettersPurged`].
pub const DEAD_LETTER_PURGE: &str = "dlq.purge";

/// The most jobs or dead letters in a page.
pub const PAGE_MAX: u32 = 200;

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It has a reservation and is not settled.
    Running,
    /// The answer is complete.
    Completed,
    /// The job failed, and nothing is billed.
    Failed,
    /// Its caller disconnected, or an operator cancelled it.
    Cancelled,
    /// Engines crashed on it, and it is not retried.
    Dead,
}

impl JobStatus {
    /// Returns the status as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Dead => "dead",
        }
    }
}

impl FromStr for JobStatus {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let all = [Self::Running, Self::Completed, Self::Failed, Self::Cancelled, Self::Dead];
        let found = all.into_iter().find(|status| status.as_str() == text);
        found.ok_or_else(|| MalformedId::new("status", text, "running, completed, failed, cancelled or dead"))
    }
}

/// An attempt of a job that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// Number of the attempt, from 1, as in the job's decision.
    pub attempt: u32,
    /// Worker that was chosen.
    pub worker_id: WorkerId,
    /// Model that it was to run.
    pub model: ModelKey,
    /// How it ended: the code of an error, or the job's status.
    pub outcome: String,
    /// When a worker was chosen for it.
    pub began_at: UnixMillis,
    /// When it completed, failed or was given up.
    pub ended_at: UnixMillis,
    /// Whether it delivered a part of the answer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub progressed: bool,
    /// Whether it speaks against the request. A job with `attempts_max` such attempts gets a dead letter.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub counted: bool,
}

/// A job. The orchestrator keeps it for some time after it is settled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobInfo {
    /// Number of the job at its orchestrator; newer jobs have greater ones.
    pub sequence: u64,
    /// Id of the request that the job belongs to.
    pub correlation_id: CorrelationId,
    /// Tenant that is billed.
    pub tenant_id: TenantId,
    /// Model that runs it or ran it last.
    #[serde(flatten)]
    pub model: ModelKey,
    /// Region of its orchestrator.
    pub region: Region,
    /// Trace that the job belongs to.
    pub trace_id: TraceId,
    /// Whether it is running, or how it ended.
    pub status: JobStatus,
    /// Worker that runs it or ran it last.
    pub worker_id: WorkerId,
    /// Number of attempts that got a reservation.
    pub attempts: u32,
    /// How often another worker continued the answer.
    #[serde(default)]
    pub continued: u32,
    /// When it was first reserved.
    pub created_at: UnixMillis,
    /// When it was last reserved, moved or settled.
    pub updated_at: UnixMillis,
    /// Code of the error that its client got; absent unless it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_code: Option<ErrorCode>,
    /// The same in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// Why the answer ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// Tokens that are billed; absent if nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// The attempts that have ended, in order; at most the last 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<AttemptRecord>,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobQuery {
    /// Only jobs with this status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<JobStatus>,
    /// Only jobs of this tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<TenantId>,
    /// Only jobs of this model, in any version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<ModelName>,
    /// Only jobs with a smaller sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// The most jobs to return; at most [`PAGE_MAX`].
    pub limit: u32,
}

/// Jobs of an orchestrator.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobPage {
    /// The jobs, the newest first.
    pub jobs: Vec<JobInfo>,
    /// `before` of the next page; absent after the last. A page may have fewer jobs than its limit, or none, although
    /// another follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Jobs of all orchestrators of a region, as a gateway lists them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobList {
    /// The jobs, the newest first.
    pub jobs: Vec<JobInfo>,
    /// `after` of the next page; absent after the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Orchestrators that did not answer; their jobs are missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}

/// Names the jobs of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobRef {
    /// Id of the request.
    pub correlation_id: CorrelationId,
}

/// Result of cancelling the jobs of a request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobsCancelled {
    /// Jobs of the request that were running.
    pub jobs: Vec<JobInfo>,
    /// Number of its jobs that waited for a worker. Nothing is kept of them.
    #[serde(default)]
    pub waiting: u64,
}

/// Jobs of a request that were cancelled, at all orchestrators of a region.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CancelledJobs {
    /// Those that were running, as they are now.
    pub jobs: Vec<JobInfo>,
    /// Number of those that waited for a worker. Nothing is kept of them.
    #[serde(default)]
    pub waiting: u64,
    /// Orchestrators that did not answer; their jobs go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}

/// Why a job has a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterCause {
    /// Engines crashed on it.
    EnginesCrashed,
    /// As many attempts as are allowed failed without progress.
    AttemptsFailed,
}

impl DeadLetterCause {
    /// Returns the cause as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EnginesCrashed => "engines_crashed",
            Self::AttemptsFailed => "attempts_failed",
        }
    }
}

/// A failed job that is kept for an operator to inspect and to run again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// Number of the letter at its orchestrator; newer letters have greater ones.
    pub sequence: u64,
    /// Id of the request.
    pub correlation_id: CorrelationId,
    /// Tenant of the request.
    pub tenant_id: TenantId,
    /// Model that was to run it last.
    #[serde(flatten)]
    pub model: ModelKey,
    /// Region of its orchestrator.
    pub region: Region,
    /// Trace that the request belongs to.
    pub trace_id: TraceId,
    /// Why the job is dead.
    pub cause: DeadLetterCause,
    /// Code of the error that the client got.
    pub error_code: ErrorCode,
    /// The same in words.
    pub error_message: String,
    /// The attempts, in order.
    pub history: Vec<AttemptRecord>,
    /// When the job was first reserved.
    pub created_at: UnixMillis,
    /// When it was settled.
    pub died_at: UnixMillis,
    /// Length of the request that is kept, sealed; absent if it was too long to be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload_bytes: Option<u64>,
    /// The request, if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Box<InferRequest>>,
}

/// Which dead letters to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterQuery {
    /// Only letters of this tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<TenantId>,
    /// Only letters of this model, in any version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_id: Option<ModelName>,
    /// Only letters with a smaller sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<u64>,
    /// The most letters to return; at most [`PAGE_MAX`].
    pub limit: u32,
}

/// Dead letters of an orchestrator.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterPage {
    /// The letters, the newest first.
    pub dead_letters: Vec<DeadLetter>,
    /// `before` of the next page; absent after the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Dead letters of all orchestrators of a region, as a gateway lists them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterList {
    /// The letters, the newest first.
    pub dead_letters: Vec<DeadLetter>,
    /// `after` of the next page; absent after the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Orchestrators that did not answer; their letters are missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}

/// Names the newest dead letter of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterRef {
    /// Id of the request.
    pub correlation_id: CorrelationId,
    /// Whether to return the request as well.
    #[serde(default)]
    pub payload: bool,
}

/// Dead letters to delete: those that meet every condition.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterPurge {
    /// Only letters of this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<CorrelationId>,
    /// Only the letter with this number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// Only letters of jobs that died before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub died_before: Option<UnixMillis>,
}

/// Result of deleting dead letters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLettersPurged {
    /// Number of letters that were deleted.
    pub purged: u64,
    /// Orchestrators that did not answer; their letters are still there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}

/// What became of a dead letter that was run again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterReplayed {
    /// Id of the request that died.
    pub replayed: CorrelationId,
    /// Id of the new request.
    pub correlation_id: CorrelationId,
    /// `completed` or `failed`.
    pub status: JobStatus,
    /// Why the answer ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish_reason: Option<FinishReason>,
    /// What the tenant is billed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<TokenUsage>,
    /// Error of the replay; absent if it completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
    /// Whether the dead letter was deleted.
    pub purged: bool,
}
