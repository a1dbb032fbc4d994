//! A job as both APIs describe it.

use std::time::Duration;

use protocol::infer::Input;
use protocol::model::ModelRef;
use protocol::{CorrelationId, Digest, RetryToken, TenantId, TraceId, codec};

/// A job as a client requests it.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub model: ModelRef,
    /// The prompt and the parameters of the answer.
    pub input: Input,
    /// If given, must be the tenant of the API key.
    pub tenant_id: Option<TenantId>,
    /// The job's id. Defaults to one derived from the retry token, or to that of the request.
    pub correlation_id: Option<CorrelationId>,
    /// Makes retries idempotent: jobs with the same token run only once. Generated if it is missing.
    pub retry_token: Option<RetryToken>,
    /// The trace that the job belongs to; defaults to that of the request.
    pub trace_id: Option<TraceId>,
    /// How long the client waits for the answer to begin. The configured deadline is the default and the maximum.
    pub deadline: Option<Duration>,
}

impl Job {
    /// Derives the id from the retry token if the client gave only that, so that a repeat has the same id.
    #[must_use]
    pub(crate) fn identified(mut self, tenant_id: &TenantId) -> Self {
        if let (None, Some(token)) = (self.correlation_id, &self.retry_token) {
            self.correlation_id = Some(CorrelationId::of_retry(tenant_id, token));
        }
        self
    }

    /// Returns a digest of what the client asks for, if it chose a retry token. The deadline and the trace differ from
    /// repeat to repeat and do not count.
    pub(crate) fn fingerprint(&self) -> Option<Digest> {
        let asked = (self.model.to_string(), &self.input);
        self.retry_token.as_ref().map(|_| Digest::of(&codec::encode(&asked)))
    }
}
