//! Tenants' policies.

use metadata_store::{RegistryStore, StoreError};
use protocol::policy::{InvalidPolicy, PolicyList, PolicySaved, PolicySet, TenantPolicy, TenantRules};
use protocol::{ErrorCode, ModelName, TenantId, WireError};

use crate::catalog;

/// Why a policy could not be set.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error(transparent)]
    Invalid(#[from] InvalidPolicy),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<PolicyError> for WireError {
    fn from(error: PolicyError) -> Self {
        match error {
            PolicyError::Invalid(invalid) => {
                Self::new(ErrorCode::InvalidValue, invalid.to_string()).with_param("policy")
            }
            PolicyError::Store(_) => Self::new(ErrorCode::Unavailable, "the registry cannot use its store, try again"),
        }
    }
}

/// Returns a tenant's policy. A tenant without one is not limited.
pub async fn of(store: &dyn RegistryStore, tenant_id: &TenantId) -> Result<TenantPolicy, StoreError> {
    Ok(store.policy(tenant_id).await?.unwrap_or_default())
}

/// Sets a tenant's policy, and returns it with what may be a mistake in it.
pub async fn set(store: &dyn RegistryStore, new: PolicySet) -> Result<PolicySaved, PolicyError> {
    let PolicySet { tenant_id, policy } = new;
    policy.check()?;
    store.put_policy(&tenant_id, &policy).await?;
    let mut warnings = policy.prohibitions();
    let known: Vec<ModelName> =
        catalog::list(store).await?.models.into_iter().map(|model| model.key.model_id).collect();
    let degraded = policy.degrade.iter().flat_map(|degrade| &degrade.models);
    let unknown = policy.allowed_models.iter().flatten().chain(degraded).filter(|model| !known.contains(model));
    warnings.extend(unknown.map(|model| format!("no model is called {model} now; `tether model list` shows them")));
    Ok(PolicySaved { tenant_id, policy, warnings })
}

/// Lists the policies that have a rule.
pub async fn list(store: &dyn RegistryStore) -> Result<PolicyList, StoreError> {
    let policies = store.policies().await?.into_iter().filter(|(_, policy)| !policy.is_empty());
    Ok(PolicyList { policies: policies.map(|(tenant_id, policy)| TenantRules { tenant_id, policy }).collect() })
}
