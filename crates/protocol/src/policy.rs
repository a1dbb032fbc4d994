//! Rules of a tenant.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{AdapterName, ModelName, Region, TenantId};

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
    /// The tenant's share of capacity while others wait too, relative to other tenants' shares, 1 to 1000; 1 if
    /// omitted.
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

/// The most entries of a list in a policy.
const ENTRIES_MAX: usize = 1_000;

/// The largest share of a tenant, relative to that of a tenant whose policy has no weight.
pub const WEIGHT_MAX: u32 = 1_000;

/// A policy that cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicy {
    /// The weight is 0.
    #[error("weight must be at least 1; to let a tenant run nothing, set concurrent_jobs to 0")]
    Weight,
    /// The weight is above [`WEIGHT_MAX`].
    #[error("weight must be at most {WEIGHT_MAX}; the shares of tenants are relative, so give others a smaller one")]
    WeightTooLarge,
    /// Degraded answers would have no tokens.
    #[error("the degraded max_tokens must be at least 1")]
    DegradedTokens,
    /// A list is too long.
    #[error("{field} has more than {ENTRIES_MAX} entries")]
    TooLong {
        /// The list, as in JSON.
        field: &'static str,
    },
    /// There is no such rule.
    #[error("{name:?} is not a rule of a policy; the rules are {}", known.join(", "))]
    UnknownRule {
        /// The name as it was written.
        name: String,
        /// The names that could stand there.
        known: Vec<String>,
    },
    /// A rule has a value of the wrong type.
    #[error("the policy is malformed: {0}")]
    Malformed(String),
}

impl TenantPolicy {
    /// Reads a policy that an operator wrote. Unlike a message of another node, it must not have unknown fields: a
    /// mistyped limit would be none.
    pub fn parse(written: serde_json::Value) -> Result<Self, InvalidPolicy> {
        if !written.is_object() {
            return Err(InvalidPolicy::Malformed("it must be a JSON object".to_owned()));
        }
        let unknown = |written: &serde_json::Value, schema: schemars::Schema| {
            let known = schema.get("properties").and_then(serde_json::Value::as_object).cloned().unwrap_or_default();
            let name = written.as_object()?.keys().find(|name| !known.contains_key(*name))?.clone();
            Some(InvalidPolicy::UnknownRule { name, known: known.into_iter().map(|(name, _)| name).collect() })
        };
        let degrade = written.get("degrade").unwrap_or(&serde_json::Value::Null);
        let mistyped = unknown(&written, schemars::schema_for!(Self))
            .or_else(|| unknown(degrade, schemars::schema_for!(DegradePolicy)));
        if let Some(mistyped) = mistyped {
            return Err(mistyped);
        }
        let policy: Self =
            serde_json::from_value(written).map_err(|error| InvalidPolicy::Malformed(error.to_string()))?;
        policy.check().map(|()| policy)
    }

    /// Checks what the types cannot.
    pub fn check(&self) -> Result<(), InvalidPolicy> {
        if self.weight == Some(0) {
            return Err(InvalidPolicy::Weight);
        }
        if self.weight.is_some_and(|weight| weight > WEIGHT_MAX) {
            return Err(InvalidPolicy::WeightTooLarge);
        }
        if self.degrade.as_ref().is_some_and(|degrade| degrade.max_tokens == Some(0)) {
            return Err(InvalidPolicy::DegradedTokens);
        }
        let lengths = [
            ("allowedModels", self.allowed_models.as_ref().map(Vec::len)),
            ("allowedRegions", self.allowed_regions.as_ref().map(Vec::len)),
            ("allowedClasses", self.allowed_classes.as_ref().map(Vec::len)),
            ("degrade.models", self.degrade.as_ref().map(|degrade| degrade.models.len())),
        ];
        match lengths.into_iter().find(|(_, length)| length.is_some_and(|length| length > ENTRIES_MAX)) {
            Some((field, _)) => Err(InvalidPolicy::TooLong { field }),
            None => Ok(()),
        }
    }

    /// Returns whether no rule is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the rules that allow nothing at all, for people: they are valid, and may be mistakes.
    pub fn prohibitions(&self) -> Vec<String> {
        let zeros = [
            ("requests_per_minute", self.requests_per_minute.map(u64::from)),
            ("requests_per_day", self.requests_per_day),
            ("tokens_per_minute", self.tokens_per_minute),
            ("tokens_per_day", self.tokens_per_day),
            ("concurrent_jobs", self.concurrent_jobs.map(u64::from)),
        ];
        let zeros = zeros.into_iter().filter(|(_, limit)| *limit == Some(0));
        let empty = [
            ("allowed_models", self.allowed_models.as_ref().is_some_and(Vec::is_empty)),
            ("allowed_regions", self.allowed_regions.as_ref().is_some_and(Vec::is_empty)),
            ("allowed_classes", self.allowed_classes.as_ref().is_some_and(Vec::is_empty)),
        ];
        let empty = empty.into_iter().filter(|(_, is_empty)| *is_empty);
        let zeros = zeros.map(|(rule, _)| format!("{rule} is 0, so every request of the tenant is refused"));
        zeros
            .chain(empty.map(|(rule, _)| format!("{rule} is empty, so every request of the tenant is refused")))
            .collect()
    }
}

/// A tenant's policy to set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicySet {
    /// Tenant that the policy is for.
    pub tenant_id: TenantId,
    /// The whole policy. Rules that it omits no longer apply.
    pub policy: TenantPolicy,
}

/// A policy that was set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicySaved {
    /// Tenant that the policy is for.
    pub tenant_id: TenantId,
    /// The policy that applies from now on.
    pub policy: TenantPolicy,
    /// What may be a mistake, for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The policies of all tenants that have one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyList {
    /// The policies, ordered by tenant.
    pub policies: Vec<TenantRules>,
}

/// A tenant and its policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TenantRules {
    /// Tenant that the policy is for.
    pub tenant_id: TenantId,
    /// The rules of the tenant.
    pub policy: TenantPolicy,
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_policy_that_an_operator_writes_has_no_unknown_rule() {
        let policy =
            TenantPolicy::parse(json!({ "tokensPerDay": 5, "degrade": { "models": ["m"] } })).expect("a policy");
        assert_eq!(policy.tokens_per_day, Some(5));
        assert_eq!(TenantPolicy::parse(json!({})), Ok(TenantPolicy::default()));
        for (written, part) in [
            (json!({ "tokenPerDay": 5 }), "\"tokenPerDay\" is not a rule"),
            (json!({ "degrade": { "model": "m" } }), "\"model\" is not a rule"),
            (json!({ "tokensPerDay": -5 }), "malformed"),
            (json!({ "allowedModels": ["Not A Name"] }), "malformed"),
            (json!([]), "malformed"),
            (json!({ "weight": 0 }), "at least 1"),
            (json!({ "weight": WEIGHT_MAX + 1 }), "at most 1000"),
            (json!({ "degrade": { "maxTokens": 0 } }), "at least 1"),
            (json!({ "allowedModels": vec!["m"; ENTRIES_MAX + 1] }), "more than 1000"),
        ] {
            let error = TenantPolicy::parse(written.clone()).expect_err("invalid").to_string();
            assert!(error.contains(part), "{written}: {error}");
        }
    }

    #[test]
    fn what_allows_nothing_is_said() {
        let policy = TenantPolicy {
            tokens_per_day: Some(0),
            requests_per_minute: Some(1),
            allowed_models: Some(vec![]),
            ..TenantPolicy::default()
        };
        let said = policy.prohibitions();
        assert!(said[0].contains("tokens_per_day is 0") && said[1].contains("allowed_models is empty"), "{said:?}");
        assert_eq!(said.len(), 2);
    }
}
