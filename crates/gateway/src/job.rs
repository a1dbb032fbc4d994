//! A job as both APIs describe it.

use std::time::Duration;

use protocol::infer::Input;
use protocol::model::ModelRef;
use protocol::policy::ServiceClass;
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
    /// How long the job goes on without its client, who may then ask for the answer again. `None` if it cannot.
    pub linger: Option<Duration>,
    /// Whether its answer is also kept for long after its end.
    pub keeps_answer: bool,
    /// What is kept with the answer, so that its client can read both later by the job's id.
    pub note: Option<String>,
    /// Whether the job runs to its end without its client.
    pub detached: bool,
    /// How urgent it is, if the client says so.
    pub class: Option<ServiceClass>,
    /// How long the client waits for the answer to begin. The configured deadline is the default and the maximum.
    pub deadline: Option<Duration>,
}

impl Job {
    /// Creates a job that says no more than its model and input.
    pub(crate) fn new(model: ModelRef, input: Input) -> Self {
        Self {
            model,
            input,
            tenant_id: None,
            correlation_id: None,
            retry_token: None,
            trace_id: None,
            linger: None,
            keeps_answer: false,
            note: None,
            detached: false,
            class: None,
            deadline: None,
        }
    }

    /// Makes a job that can be asked for again for `linger` after its client is gone. Its id is derived from the token
    /// if the client gave none, so that a repeat has the same id.
    #[must_use]
    pub(crate) fn repeatable(
        mut self,
        tenant_id: &TenantId,
        token: RetryToken,
        linger: Duration,
        keeps_answer: bool,
    ) -> Self {
        self.keeps_answer = keeps_answer;
        self.correlation_id.get_or_insert_with(|| CorrelationId::of_retry(tenant_id, &token));
        self.linger = Some(linger);
        self.retry_token = Some(token);
        self
    }

    /// Returns a digest of what the client asks for. The deadline and the trace differ from repeat to repeat and do not
    /// count.
    pub(crate) fn content(&self) -> Digest {
        Digest::of(&codec::encode(&(self.model.to_string(), &self.input)))
    }
}
