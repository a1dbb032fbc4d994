//! A request before its job is read: where it comes from, and whether it may go on.

use std::net::IpAddr;
use std::sync::Arc;

use protocol::control::TokenGrant;
use protocol::{CorrelationId, PublicKey, TraceId, WireError};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::rate_limit::Verdict;
use crate::request_record::RequestRecord;

/// Where a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// An address, by HTTP.
    Address(IpAddr),
    /// A node, by RPC.
    Node(PublicKey),
}

/// Context of a request, known before its body is read.
#[derive(Debug, Clone, Copy)]
pub struct RequestContext {
    /// The name its job will have, unless the client brings one.
    pub correlation_id: CorrelationId,
    /// The trace it belongs to.
    pub trace_id: TraceId,
    /// Where it comes from.
    pub origin: Option<Origin>,
    pub received: Instant,
}

/// A request that may go on: its token is good, its tenant is within its rate, and there is room for it.
pub struct Admission {
    pub(crate) grant: Arc<TokenGrant>,
    pub(crate) rate: Verdict,
    pub(crate) permit: OwnedSemaphorePermit,
    pub(crate) record: RequestRecord,
}

/// A request that was refused, and what its bucket said.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: WireError,
    pub(crate) rate: Option<Verdict>,
}

impl Admission {
    /// Ends the request with an error.
    pub(crate) fn refuse(mut self, error: WireError) -> Refusal {
        self.record.failed(error.code);
        Refusal { error, rate: Some(self.rate) }
    }
}
