//! Who may call a method.

use protocol::control::NodeRole;
use protocol::{PublicKey, Region, WireError};

use crate::membership::Membership;

/// Who may call a method. The server checks it before it reads the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Every node. The method itself checks what the request proves, such as an invite or an API token.
    Anyone,
    /// Members of the pool, in any role.
    Members,
    /// Members that are certified for the role.
    Role(NodeRole),
    /// Members that are certified for the role in the region.
    RoleIn(NodeRole, Region),
}

impl Access {
    pub(super) fn check(&self, membership: &Membership, key: PublicKey) -> Result<(), WireError> {
        match self {
            Self::Anyone => Ok(()),
            Self::Members => Ok(membership.standing(key).map(drop)?),
            Self::Role(role) => Ok(membership.check_role(key, *role, None)?),
            Self::RoleIn(role, region) => Ok(membership.check_role(key, *role, Some(region))?),
        }
    }
}
