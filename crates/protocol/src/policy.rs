//! Rules of a tenant.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::ModelName;

/// The rules of one tenant. An omitted rule sets no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TenantPolicy {
    /// Models that the tenant may use; all if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_models: Option<Vec<ModelName>>,
    /// Number of requests per minute in the long run, over all gateways. As many may come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
}

impl TenantPolicy {
    /// Returns whether the tenant may use a model.
    pub fn allows(&self, model: &ModelName) -> bool {
        self.allowed_models.as_ref().is_none_or(|allowed| allowed.contains(model))
    }
}
