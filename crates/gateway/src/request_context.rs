//! A request before its job is parsed: its context, and whether it was admitted or refused.

use std::net::IpAddr;
use std::sync::Arc;

use protocol::control::TokenGrant;
use protocol::{CorrelationId, PublicKey, TraceId, WireError};
use rpc::rate_limit::Verdict;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::job::Job;
use crate::request_record::RequestRecord;

/// Where a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// An IP address, over HTTP.
    Address(IpAddr),
    /// A node, over RPC.
    Node(PublicKey),
}

/// Context of a request, known before its body is read.
#[derive(Debug, Clone, Copy)]
pub struct RequestContext {
    /// The id of its job, unless the client provides one.
    pub correlation_id: CorrelationId,
    pub trace_id: TraceId,
    pub origin: Option<Origin>,
    pub received: Instant,
}

/// An admitted request: its token is valid, its tenant is within the rate limit, and it holds a permit for one job.
pub struct AdmittedRequest {
    pub(crate) grant: Arc<TokenGrant>,
    pub(crate) rate: Verdict,
    pub(crate) permit: OwnedSemaphorePermit,
    pub(crate) record: RequestRecord,
}

/// A refused request, with the verdict of its rate limit, if that was checked.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: WireError,
    pub(crate) rate: Option<Verdict>,
}

impl AdmittedRequest {
    /// Gives a job of this request its id; see [`Job::identified`].
    pub(crate) fn identify(&self, job: Job) -> Job {
        job.identified(&self.grant.tenant_id)
    }

    /// Ends the request with an error and records it.
    pub(crate) fn refuse(mut self, error: WireError) -> Refusal {
        self.record.failed(error.code);
        Refusal { error, rate: Some(self.rate) }
    }
}
