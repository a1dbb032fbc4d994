//! Jobs that wait for a free slot, as operators see them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{CorrelationId, PublicKey, TenantId};
use crate::model::ModelKey;
use crate::policy::ServiceClass;

/// Orchestrator: lists its waiting jobs to an operator. [`crate::control::ByOperator`] of a [`QueueQuery`] →
/// [`QueuePage`].
pub const QUEUE_LIST: &str = "queue.list";

/// The most jobs in a list.
pub const QUEUE_PAGE_MAX: u32 = 1_000;

/// Which waiting jobs to list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueueQuery {
    /// The most jobs to return; at most [`QUEUE_PAGE_MAX`].
    pub limit: u32,
}

/// Why a job waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// The workers that could run it are gone.
    NoWorker,
    /// Every worker that may run it is busy.
    AllFull,
    /// Every worker is busy, and its tenant has had more of its share than those before it.
    ShareUsed,
}

impl WaitReason {
    /// Returns the reason in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoWorker => "no worker",
            Self::AllFull => "all full",
            Self::ShareUsed => "share used",
        }
    }
}

/// A job that waits for a free slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WaitingJob {
    /// Id of the request.
    pub correlation_id: CorrelationId,
    /// Tenant that is billed.
    pub tenant_id: TenantId,
    /// How urgent it is.
    pub class: ServiceClass,
    /// Model that it asks for.
    #[serde(flatten)]
    pub model: ModelKey,
    /// Estimated tokens of its prompt.
    pub prompt_tokens: u32,
    /// Milliseconds that it has waited.
    pub waited_ms: u64,
    /// What keeps it from starting.
    pub reason: WaitReason,
    /// Expected milliseconds until it starts; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts_in_ms: Option<u64>,
}

/// Waiting jobs of an orchestrator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueuePage {
    /// The jobs, the next ones of each model first.
    pub waiting: Vec<WaitingJob>,
    /// Number of all waiting jobs.
    pub total: u64,
}

/// Waiting jobs of all orchestrators of a region, as a gateway lists them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WaitingJobs {
    /// The jobs of each orchestrator, the next ones of each model first.
    pub waiting: Vec<WaitingJob>,
    /// Number of all waiting jobs.
    pub total: u64,
    /// Orchestrators that did not answer; their jobs are missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}
