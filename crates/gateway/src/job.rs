//! A job as both APIs describe it.

use std::time::Duration;

use protocol::infer::Input;
use protocol::model::ModelRef;
use protocol::{CorrelationId, RetryToken, TenantId, TraceId};

/// A job as a client requests it.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub model: ModelRef,
    /// The prompt and the parameters of the answer.
    pub input: Input,
    /// If given, must be the tenant of the API key.
    pub tenant_id: Option<TenantId>,
    /// The job's id; defaults to that of the request.
    pub correlation_id: Option<CorrelationId>,
    /// Makes retries idempotent: jobs with the same token run only once. Generated if it is missing.
    pub retry_token: Option<RetryToken>,
    /// The trace that the job belongs to; defaults to that of the request.
    pub trace_id: Option<TraceId>,
    /// How long the client waits for the answer to begin. The configured deadline is the default and the maximum.
    pub deadline: Option<Duration>,
}
