//! Rules of a tenant.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{AdapterName, ModelName, Region};

/// The rules of one tenant. An omitted rule sets no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TenantPolicy {
    /// Models that the tenant may use; all if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_models: Option<Vec<ModelName>>,
    /// Regions in which the tenant's jobs may run; all if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_regions: Option<Vec<Region>>,
    /// Classes of service that the tenant may ask for; all if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_classes: Option<Vec<ServiceClass>>,
    /// Number of requests per minute in the long run, over all gateways. As many may come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Number of requests in each day of UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_day: Option<u64>,
    /// Number of tokens, of prompts and answers, in each minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Number of tokens, of prompts and answers, in each day of UTC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_day: Option<u64>,
    /// Number of jobs that may run or wait at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_jobs: Option<u32>,
    /// The tenant's share of capacity while others wait too, relative to other tenants' shares; 1 if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// What may be done with a job that would have to wait long; nothing if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degrade: Option<DegradePolicy>,
}

impl TenantPolicy {
    /// Returns whether the tenant may use a model.
    pub fn allows(&self, model: &ModelName) -> bool {
        self.allowed_models.as_ref().is_none_or(|allowed| allowed.contains(model))
    }

    /// Returns whether the tenant's jobs may run in a region.
    pub fn allows_region(&self, region: &Region) -> bool {
        self.allowed_regions.as_ref().is_none_or(|allowed| allowed.contains(region))
    }

    /// Returns whether the tenant may ask for a class.
    pub fn allows_class(&self, class: ServiceClass) -> bool {
        self.allowed_classes.as_ref().is_none_or(|allowed| allowed.contains(&class))
    }
}

/// How urgent a job is. Under pressure, urgent jobs run first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ServiceClass {
    /// A person waits for the answer.
    Interactive,
    /// A program waits for the answer.
    #[default]
    Standard,
    /// The answer may come hours later.
    Batch,
}

impl ServiceClass {
    /// Every class, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Interactive, Self::Standard, Self::Batch];

    /// Returns the name of the class, as in policies and headers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Standard => "standard",
            Self::Batch => "batch",
        }
    }

    /// Returns whether this is the class of jobs that do not name one.
    pub fn is_standard(&self) -> bool {
        *self == Self::Standard
    }
}

/// How a tenant's jobs may be made cheaper when capacity is short. The answer says so.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DegradePolicy {
    /// The models to use instead, the best first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelName>,
    /// The adapter to use instead of a job's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterName>,
    /// The most tokens of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
}
