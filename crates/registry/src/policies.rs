//! Tenants' policies.

use metadata_store::{RegistryStore, StoreError};
use protocol::TenantId;
use protocol::policy::TenantPolicy;

/// Returns a tenant's policy. A tenant without one is not limited.
pub async fn of(store: &dyn RegistryStore, tenant_id: &TenantId) -> Result<TenantPolicy, StoreError> {
    Ok(store.policy(tenant_id).await?.unwrap_or_default())
}
