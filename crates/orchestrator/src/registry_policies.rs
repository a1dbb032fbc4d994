//! Fetches tenants' policies from the region's registries.

use std::time::Duration;

use async_trait::async_trait;
use protocol::control::{NodeRole, POLICY_GET, PolicyRequest};
use protocol::policy::TenantPolicy;
use protocol::{ErrorCode, TenantId, WireError};
use rpc::{Client, Directory};

use crate::policy_engine::PolicySource;

/// How long a registry may take to respond.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long to wait until a registry is found, right after startup.
const SEARCH: Duration = Duration::from_secs(2);

/// Asks one registry after another.
pub struct RegistryPolicies {
    client: Client,
    directory: Directory,
}

impl RegistryPolicies {
    /// Makes a source that asks the registries in `directory`.
    pub fn new(client: Client, directory: Directory) -> Self {
        Self { client, directory }
    }
}

#[async_trait]
impl PolicySource for RegistryPolicies {
    async fn policy(&self, tenant_id: &TenantId) -> Result<TenantPolicy, WireError> {
        let mut error = WireError::new(ErrorCode::Unavailable, "no registry answers, try again")
            .with_retry_after(Duration::from_secs(1));
        self.directory.wait_for(NodeRole::Registry, SEARCH).await;
        let request = PolicyRequest { tenant_id: tenant_id.clone() };
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call(registry, POLICY_GET, &request, DEADLINE).await {
                Ok(policy) => return Ok(policy),
                Err(failed) => error = failed.into(),
            }
        }
        Err(error)
    }

    fn is_away(&self) -> bool {
        self.client.membership().is_registry_away()
    }
}
