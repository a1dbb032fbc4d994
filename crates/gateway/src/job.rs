//! What a client asks for, whichever API it used.

use std::time::Duration;

use protocol::infer::Input;
use protocol::model::ModelRef;
use protocol::{CorrelationId, RetryToken, TenantId, TraceId};

/// A job as a client asks for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// The model to run.
    pub model: ModelRef,
    /// What to answer, and how.
    pub input: Input,
    /// Must be the token's own tenant where it is given.
    pub tenant_id: Option<TenantId>,
    /// The job's name; that of the request where it is missing.
    pub correlation_id: Option<CorrelationId>,
    /// The same token never runs a job twice; made up where it is missing.
    pub retry_token: Option<RetryToken>,
    /// The trace the job belongs to; that of the request where it is missing.
    pub trace_id: Option<TraceId>,
    /// How long the client will wait for the answer to begin; the configured time where it is missing or longer.
    pub deadline: Option<Duration>,
}
