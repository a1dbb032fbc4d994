//! Answers that their tenants can read again: method names, and the messages they carry.

use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::error_code::WireError;
use crate::id::{CorrelationId, TenantId};

/// Orchestrator: shows a kept answer's note, and where its job stands. [`KeptRef`] → [`KeptAnswer`].
pub const KEPT_SHOW: &str = "kept.show";
/// Orchestrator: streams a kept answer from its first chunk on, also while its job runs. [`KeptRef`] →
/// [`crate::infer::InferChunk`]s.
pub const KEPT_READ: &str = "kept.read";
/// Orchestrator: cancels the job of a kept answer, unless it has ended. [`KeptRef`] → [`KeptAnswer`].
pub const KEPT_CANCEL: &str = "kept.cancel";
/// Orchestrator: deletes a kept answer and its note, and cancels its job if that runs. [`KeptRef`] → [`KeptRemoved`].
pub const KEPT_REMOVE: &str = "kept.remove";

/// The longest note, in bytes. It is sent together with its job.
pub const NOTE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Names a kept answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptRef {
    /// Tenant whose job it is.
    pub tenant_id: TenantId,
    /// Id of the job.
    pub correlation_id: CorrelationId,
}

/// A kept answer, without the answer itself.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptAnswer {
    /// What the gateway kept with the job.
    pub note: String,
    /// When the job was submitted.
    pub created_at: UnixMillis,
    /// Where the job stands.
    pub status: KeptStatus,
    /// Why the job failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

impl std::fmt::Debug for KeptAnswer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The note contains a client's texts.
        formatter.debug_struct("KeptAnswer").field("status", &self.status).finish_non_exhaustive()
    }
}

/// Where the job of a kept answer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeptStatus {
    /// It waits for a worker.
    Queued,
    /// A worker runs it.
    Running,
    /// The answer is complete.
    Completed,
    /// The job failed, or its orchestrator ended before it had an answer.
    Failed,
    /// The job was cancelled.
    Cancelled,
}

/// Whether a kept answer was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeptRemoved {
    /// Whether it was there.
    pub found: bool,
}
