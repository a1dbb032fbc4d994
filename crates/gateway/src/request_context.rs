//! A request before its job is parsed: its context, and whether it was admitted or refused.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use protocol::control::TokenGrant;
use protocol::policy::ServiceClass;
use protocol::{CorrelationId, PublicKey, TraceId, WireError};
use rpc::rate_limit::Verdict;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::repeats::Repeat;
use crate::request_record::RequestRecord;

/// Where a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// An IPv4 address or the first address of an IPv6 /64, over HTTP. [`Origin::of`] makes it.
    Address(IpAddr),
    /// A node, over RPC.
    Node(PublicKey),
}

/// The bits of an IPv6 address that name the network. A host may use every address of its /64.
const NETWORK_BITS: u128 = !(u64::MAX as u128);
/// The bits that name the site. Providers give a customer up to a /48, which has 65,536 networks.
const SITE_BITS: u128 = !((1 << 80) - 1);

impl Origin {
    /// Returns the origin of an HTTP client with this address.
    pub fn of(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(address) if !address.is_loopback() => {
                Ipv6Addr::from_bits(address.to_bits() & NETWORK_BITS).into()
            }
            address => address,
        })
    }

    /// Returns the first address of the IPv6 /48 around an IPv6 network.
    pub(crate) fn site(self) -> Option<Ipv6Addr> {
        match self {
            Self::Address(IpAddr::V6(address)) if !address.is_loopback() => {
                Some(Ipv6Addr::from_bits(address.to_bits() & SITE_BITS))
            }
            Self::Address(_) | Self::Node(_) => None,
        }
    }
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
    pub(crate) repeat: Repeat,
    /// The class that its header names.
    pub(crate) class: Option<ServiceClass>,
    /// The orchestrator that is to run its job; any if none is named.
    pub(crate) keeper: Option<PublicKey>,
}

/// A refused request, with the verdict of its rate limit, if that was checked.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: WireError,
    pub(crate) rate: Option<Verdict>,
}

impl AdmittedRequest {
    /// Ends the request with an error and records it.
    pub(crate) fn refuse(mut self, error: WireError) -> Refusal {
        self.record.failed(error.code);
        Refusal { error, rate: Some(self.rate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_one_host_are_one_origin() {
        let of = |text: &str| Origin::of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:ffff:ffff:ffff"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_ne!(of("::1"), of("::2"), "loopback stays what it is");
    }

    #[test]
    fn the_networks_of_one_ipv6_site_belong_together() {
        let site = |text: &str| Origin::of(text.parse().expect("an address")).site();
        assert_eq!(site("2001:db8:7::1"), site("2001:db8:7:ffff::1"));
        assert_ne!(site("2001:db8:7::1"), site("2001:db8:8::1"));
        assert_eq!(site("::1"), None);
        assert_eq!(site("192.0.2.1"), None);
    }
}
