//! Pool membership: certificates and revocation lists, which the pool's root key signs, and invites, which the registry
//! keeps and redeems.
//!
//! Every check is a pure function of its input and the current time. `rpc::Membership` stores what passed the checks.

pub mod certificate;
pub mod invite;
pub mod revocation;
pub mod transcript;

use std::time::Duration;

pub use certificate::{Certificate, CertificateError};
pub use invite::{Invite, InviteSecret, MalformedInvite};
pub use revocation::{RevocationError, RevocationList, RevocationStamp};
pub use transcript::{Transcript, TranscriptError, VersionMismatch, Versions};

use crate::error_code::{ErrorCode, WireError};
pub use crate::id::InviteId;

/// How long a certificate is valid. Its node renews it after half of that time.
pub const CERTIFICATE_LIFE: Duration = Duration::from_hours(30 * 24);
/// How long an invite is valid.
pub const INVITE_LIFE: Duration = Duration::from_hours(24);
/// How often a node asks its registry for the pool's state.
pub const STATE_EVERY: Duration = Duration::from_secs(2);
/// A certificate is valid from this long before it is issued, for nodes whose clock is slow.
pub const BACKDATE: Duration = Duration::from_mins(1);

/// The age up to which a stamp of the pool's state is fresh. A registry can withhold a revocation for this long, and
/// the clocks of nodes may differ by as much.
pub const STAMP_FRESH: Duration = Duration::from_secs(10);
/// A stamp may be dated this far in the future, for nodes whose clock is slow.
pub const STAMP_AHEAD_MAX: Duration = Duration::from_mins(1);

/// Why a node may not do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Exclusion {
    /// The node has shown no certificate of the pool.
    #[error("this node is not enrolled in the network")]
    NotEnrolled,
    /// The node's certificate has expired.
    #[error("this node's certificate has ended, join again with a new invite")]
    Ended,
    /// The node was revoked.
    #[error("this node was revoked; to come back it needs a new key and a new invite")]
    Revoked,
    /// The node's certificate is for other roles.
    #[error("this node's certificate is for another role")]
    Role,
    /// The node's certificate is for other regions.
    #[error("this node's certificate is for other regions")]
    Region,
    /// The node speaks other versions of the protocol.
    #[error("{0}")]
    Version(VersionMismatch),
}

impl Exclusion {
    /// Returns the label of the exclusion's counter.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NotEnrolled => "not_enrolled",
            Self::Ended => "certificate_ended",
            Self::Revoked => "revoked",
            Self::Role => "role",
            Self::Region => "certificate_region",
            Self::Version(_) => "protocol_version",
        }
    }
}

impl From<Exclusion> for WireError {
    fn from(exclusion: Exclusion) -> Self {
        let code = match exclusion {
            Exclusion::Revoked => ErrorCode::NodeRevoked,
            Exclusion::NotEnrolled | Exclusion::Ended | Exclusion::Role | Exclusion::Region | Exclusion::Version(_) => {
                ErrorCode::NotEnrolled
            }
        };
        Self::new(code, exclusion.to_string())
    }
}
