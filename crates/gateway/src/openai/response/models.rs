//! Model descriptions, in OpenAI's format with additions.

use std::collections::BTreeSet;

use protocol::control::Fleet;
use protocol::health::{CachedModel, HealthReport, ModelState};
use protocol::model::{ModelEntry, ModelFacts, ModelRef};
use protocol::policy::TenantPolicy;
use protocol::{AdapterName, Region};
use serde::Serialize;
use utoipa::ToSchema;

use crate::catalog::Models;
use crate::published;

/// A model. `state` and what follows are Tether's additions.
#[derive(Serialize, ToSchema)]
pub(crate) struct Model {
    /// `name` for the newest version, `name@MAJOR.MINOR` for others; with an adapter, `:adapter` follows.
    pub(crate) id: String,
    /// Always `model`.
    object: &'static str,
    /// Time of registration, in seconds since 1970.
    pub(crate) created: u64,
    /// Always `tether`.
    owned_by: &'static str,
    /// Version of the model, as `MAJOR.MINOR`.
    version: String,
    /// State of the best replica.
    state: ModelProgress,
    /// SHA-256 of the artifact, in hex.
    pub(crate) digest: String,
    /// Context length in tokens.
    pub(crate) context_length: u32,
    /// Regions in which workers serve the model.
    regions: BTreeSet<String>,
    /// Number of workers that have the model ready.
    replicas: usize,
    /// One-line description for people.
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    /// Model that this name stands for, if it is an alias.
    #[serde(skip_serializing_if = "Option::is_none")]
    alias_of: Option<String>,
    /// Further models that the alias stands for. Each request goes to one that supports it and has capacity.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    alternatives: Vec<String>,
    /// Length of the artifact in bytes; 0 for a model of an adopted server.
    pub(crate) bytes: u64,
    /// Whether workers never unload the model.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pinned: bool,
    /// Seconds without work for which workers keep the model in memory, if an operator set this; -1 for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    keep_alive_secs: Option<i64>,
    /// Facts from the model's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<published::ModelFacts>)]
    pub(crate) facts: Option<ModelFacts>,
}

/// State of a model's best replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ModelProgress {
    /// No worker takes jobs for the model. Only operators see such models.
    Unserved,
    /// The model failed to load on each worker that would serve it. Only operators see such models.
    Error,
    /// A worker loads the model at its first job.
    Idle,
    /// A worker is loading the model.
    Loading,
    /// The model answers.
    Ready,
}

#[derive(Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// Always `list`.
    object: &'static str,
    /// Each version of each model that a worker serves and this API key may use, without an adapter and with each of
    /// its adapters.
    pub(crate) data: Vec<Model>,
}

impl ModelList {
    /// Lists the models that a worker serves and a tenant may use.
    pub(crate) fn served(models: &Models, fleet: &Fleet, policy: &TenantPolicy) -> Self {
        let mut list = Self::of(models, fleet, |entry| policy.allows(&entry.key.model_id));
        list.data.retain(Model::is_served);
        list
    }

    /// Lists every registered model, including those that no worker serves.
    pub(crate) fn registered(models: &Models, fleet: &Fleet) -> Self {
        Self::of(models, fleet, |_| true)
    }

    pub(crate) fn models(&self) -> &[Model] {
        &self.data
    }

    fn of(models: &Models, fleet: &Fleet, may_see: impl Fn(&ModelEntry) -> bool) -> Self {
        let seen = models.all().into_iter().filter(|entry| may_see(entry));
        let data = seen.flat_map(|entry| {
            // If a model's name is also an alias, the name is listed with the aliases and the model by its version.
            let by_name = models.is_newest(entry) && models.stands_for(&entry.key.model_id).is_none();
            let adapters = models.adapters_of(&entry.key).map(Some);
            std::iter::once(None).chain(adapters).map(move |adapter| describe(entry, by_name, adapter, fleet))
        });
        let mut data: Vec<Model> = data.collect();
        data.extend(models.aliases().filter_map(|(alias, targets)| {
            Model::shared(alias.to_string(), describe_all(targets, models, fleet, &may_see))
        }));
        Self { object: "list", data }
    }
}

impl Model {
    /// Describes the model or models of a name. Returns `None` if the tenant may use none of them.
    pub(crate) fn named(
        name: &ModelRef,
        meant: &[ModelRef],
        models: &Models,
        fleet: &Fleet,
        policy: &TenantPolicy,
    ) -> Option<Self> {
        // Models that the tenant may not use are hidden as if they did not exist.
        let may_see = |entry: &ModelEntry| policy.allows(&entry.key.model_id);
        let mut described = describe_all(meant, models, fleet, may_see);
        match &described[..] {
            [(target, _)] if target == name => described.pop().map(|(_, model)| model),
            _ => Self::shared(name.to_string(), described),
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Returns the time of registration, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.created
    }

    pub(crate) fn context_length(&self) -> u32 {
        self.context_length
    }

    /// Returns whether a worker takes jobs for this model.
    pub(crate) fn is_served(&self) -> bool {
        self.state >= ModelProgress::Idle
    }

    /// Returns whether a worker has this model in memory.
    pub(crate) fn is_ready(&self) -> bool {
        self.state == ModelProgress::Ready
    }

    /// Merges the models of an alias into one description with the best state of all. Returns `None` if there are no
    /// models.
    fn shared(name: String, models: Vec<(ModelRef, Self)>) -> Option<Self> {
        let names: Vec<String> = models.iter().map(|(target, _)| target.to_string()).collect();
        let (first, alternatives) = names.split_first()?;
        let (alias_of, alternatives) = (Some(first.clone()), alternatives.to_vec());
        let one = models.into_iter().map(|(_, model)| model).reduce(|one, other| Self {
            state: one.state.max(other.state),
            context_length: one.context_length.max(other.context_length),
            regions: one.regions.into_iter().chain(other.regions).collect(),
            replicas: one.replicas + other.replicas,
            ..one
        });
        one.map(|one| Self { id: name, alias_of, alternatives, ..one })
    }
}

/// Describes those targets of a name that exist and may be seen.
fn describe_all(
    targets: &[ModelRef],
    models: &Models,
    fleet: &Fleet,
    may_see: impl Fn(&ModelEntry) -> bool,
) -> Vec<(ModelRef, Model)> {
    let described = targets.iter().filter_map(|target| {
        let entry = models.find(&target.name, target.version).filter(|entry| may_see(entry))?;
        let adapter = target.adapter.as_ref();
        let is_there = adapter.is_none_or(|adapter| models.has_adapter(&entry.key, adapter));
        is_there.then(|| (target.clone(), describe(entry, target.version.is_none(), adapter, fleet)))
    });
    described.collect()
}

/// Describes a model. A pure function of its catalogue entry and the fleet.
fn describe(entry: &ModelEntry, by_name: bool, adapter: Option<&AdapterName>, fleet: &Fleet) -> Model {
    let key = &entry.key;
    let id = if by_name { key.model_id.to_string() } else { key.to_string() };
    let reports = fleet.workers.iter().map(|worker| &worker.report);
    let serving: Vec<_> = reports.filter(|report| report.serves(key, adapter)).collect();
    let progress = |report: &&HealthReport| match report.model_cache.iter().find(|cached| cached.key == *key) {
        None => ModelProgress::Idle,
        Some(CachedModel { state: ModelState::Ready, .. }) => ModelProgress::Ready,
        Some(CachedModel { state: ModelState::Loading, .. }) => ModelProgress::Loading,
        Some(CachedModel { state: ModelState::Error, .. }) => ModelProgress::Error,
    };
    let progress: Vec<_> = serving.iter().map(progress).collect();
    Model {
        id: adapter.map_or_else(|| id.clone(), |adapter| format!("{id}:{adapter}")),
        object: "model",
        created: entry.created_at.0 / 1000,
        owned_by: "tether",
        version: key.version.to_string(),
        state: progress.iter().copied().max().unwrap_or(ModelProgress::Unserved),
        digest: entry.digest.to_string(),
        context_length: entry.context_length,
        regions: serving.iter().map(|report| Region::to_string(&report.region)).collect(),
        replicas: progress.iter().filter(|progress| **progress == ModelProgress::Ready).count(),
        description: entry.description.clone(),
        alias_of: None,
        alternatives: vec![],
        bytes: entry.bytes,
        pinned: entry.pin,
        keep_alive_secs: entry.keep_alive_secs,
        facts: entry.facts.clone(),
    }
}
