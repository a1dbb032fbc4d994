//! Operators' changes to the catalogue: models and their aliases.

use std::fmt::Write as _;
use std::iter;

use metadata_store::{PutModelError, RegistryStore, StoreError};
use protocol::control::{AliasRemoved, AliasSet, Catalog, ModelAdd, ModelKeep, ModelRemove, ModelRemoved};
use protocol::model::{ALTERNATIVES_MAX, AdapterKey, AliasEntry, ModelEntry, ModelFacts, ModelKey, ModelRef};
use protocol::{Digest, ErrorCode, ModelName, ModelVersion, UnixMillis, WireError};

use crate::catalog::{self, OFFERED_MAX};

/// The most aliases.
pub const ALIASES_MAX: usize = 1_000;
/// The longest description of a model, in bytes.
const DESCRIPTION_BYTES_MAX: usize = 1_024;

/// Why a model or an alias could not be added, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Another model has the name, or the name and the version.
    #[error(
        "{key} is another model already (digest {}); choose another name, or add this one as version {next} of it",
        short(.registered)
    )]
    Taken {
        key: ModelKey,
        /// The digest of the registered model.
        registered: Digest,
        /// The suggested next version.
        next: ModelVersion,
    },
    /// The name stands for another model.
    #[error("{alias} is an alias of {target}; choose another name, or forget the alias first")]
    IsAlias {
        alias: ModelName,
        /// What the alias stands for.
        target: ModelRef,
    },
    /// A model has the name of an alias.
    #[error("{0} is a model's own name; choose another name, or have it stand for {0} and other models")]
    IsModel(ModelName),
    /// An alias would stand for too many models.
    #[error("one name stands for at most {} models", ALTERNATIVES_MAX + 1)]
    TooManyTargets,
    /// An alias would stand for several models, and name an adapter.
    #[error("an alias of several models cannot name an adapter; requests add one, as NAME:ADAPTER")]
    AdapterOfSeveral,
    /// An alias would stand for another.
    #[error("{alias} is itself an alias; give what it stands for, {target}")]
    AliasOfAlias {
        /// The target that was given.
        alias: ModelName,
        /// What that target, itself an alias, stands for.
        target: ModelRef,
    },
    /// There is no such model.
    #[error("the model {0} does not exist")]
    NoModel(ModelRef),
    /// The name has several versions, and none was given.
    #[error("{name} has the versions {versions}; say which one, as {name}@VERSION")]
    Several {
        name: ModelName,
        /// All of its versions.
        versions: String,
    },
    /// Aliases stand for the model.
    #[error("{key} is what {aliases} stands for; forget that first, or force it (--force)")]
    HasAliases {
        /// The model to remove.
        key: ModelKey,
        /// What stands for it.
        aliases: String,
    },
    /// A length is out of range.
    #[error("{0}")]
    Value(&'static str),
    /// The catalogue has reached its limit.
    #[error("no more than {0} can be listed")]
    TooMany(usize),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<ModelError> for WireError {
    fn from(error: ModelError) -> Self {
        let message = error.to_string();
        match error {
            ModelError::NoModel(_) => Self::new(ErrorCode::ModelNotFound, message).with_param("model"),
            ModelError::Store(_) => Self::new(ErrorCode::Unavailable, "the registry cannot use its store, try again"),
            ModelError::IsModel(_) => Self::new(ErrorCode::InvalidValue, message).with_param("alias"),
            _ => Self::new(ErrorCode::InvalidValue, message).with_param("model"),
        }
    }
}

/// Registers a model. Without a requested version, it gets the version that already has this digest, or else the first.
pub async fn add(store: &dyn RegistryStore, new: ModelAdd, now: UnixMillis) -> Result<ModelEntry, ModelError> {
    let catalog = catalog::list(store).await?;
    let key = free_key(&catalog, &new.model_id, new.version, Some(&new.digest))?;
    if new.bytes == 0 || new.context_length == 0 {
        return Err(ModelError::Value("a model's file must have bytes, and its context tokens"));
    }
    if new.description.len() > DESCRIPTION_BYTES_MAX {
        return Err(ModelError::Value("the description must have at most 1024 bytes"));
    }
    let known = catalog.models.into_iter().find(|entry| entry.key == key);
    let entry = ModelEntry {
        key: key.clone(),
        digest: new.digest,
        bytes: new.bytes,
        context_length: new.context_length,
        description: new.description,
        created_at: known.as_ref().map_or(now, |known| known.created_at),
        facts: new.facts.map(ModelFacts::bounded),
        added: true,
        pin: known.as_ref().is_some_and(|known| known.pin),
        keep_alive_secs: known.and_then(|known| known.keep_alive_secs),
    };
    match store.put_model(entry.clone()).await {
        Ok(()) => Ok(entry),
        // A concurrent call registered the version first.
        Err(PutModelError::Conflict { registered, .. }) => {
            Err(ModelError::Taken { next: next_of(key.version), key, registered })
        }
        Err(PutModelError::Store(error)) => Err(error.into()),
    }
}

/// Sets how long workers keep a model in memory.
pub async fn keep(store: &dyn RegistryStore, change: ModelKeep) -> Result<ModelEntry, ModelError> {
    let catalog = catalog::list(store).await?;
    let key = find(&catalog, &change.model_id, change.version)?;
    let gone =
        || ModelError::NoModel(ModelRef { name: key.model_id.clone(), version: Some(key.version), adapter: None });
    let known = catalog.models.into_iter().find(|entry| entry.key == key).ok_or_else(gone)?;
    let kept = ModelEntry {
        pin: change.pin.unwrap_or(known.pin),
        // Values below -1 mean the same as -1.
        keep_alive_secs: change.keep_alive_secs.map(|secs| secs.max(-1)).or(known.keep_alive_secs),
        ..known
    };
    if store.keep_model(&key, kept.pin, kept.keep_alive_secs).await? { Ok(kept) } else { Err(gone()) }
}

/// Returns the name and version under which a model can be registered. Without a digest, the result holds for a file
/// that is not registered yet.
pub fn free_key(
    catalog: &Catalog,
    name: &ModelName,
    version: Option<ModelVersion>,
    digest: Option<&Digest>,
) -> Result<ModelKey, ModelError> {
    let is_foreign = |entry: &&AliasEntry| entry.alias == *name && !entry.is_own_name();
    if let Some(AliasEntry { alias, target, .. }) = catalog.aliases.iter().find(is_foreign) {
        return Err(ModelError::IsAlias { alias: alias.clone(), target: target.clone() });
    }
    let versions: Vec<&ModelEntry> = catalog.models.iter().filter(|entry| entry.key.model_id == *name).collect();
    let newest = versions.iter().max_by_key(|entry| entry.key.version);
    let taken = |entry: &ModelEntry| ModelError::Taken {
        key: entry.key.clone(),
        registered: entry.digest,
        next: next_of(newest.map_or(entry.key.version, |newest| newest.key.version)),
    };
    let key = |version| ModelKey { model_id: name.clone(), version };
    let is_new = |entry: &&&ModelEntry| digest != Some(&entry.digest);
    match version {
        Some(version) => match versions.iter().find(|entry| entry.key.version == version).filter(is_new) {
            Some(other) => Err(taken(other)),
            None => room(catalog, key(version)),
        },
        None => match versions.iter().find(|entry| !is_new(entry)) {
            Some(same) => Ok(same.key.clone()),
            None => match newest {
                Some(other) => Err(taken(other)),
                None => room(catalog, key(ModelVersion { major: 1, minor: 0 })),
            },
        },
    }
}

fn room(catalog: &Catalog, key: ModelKey) -> Result<ModelKey, ModelError> {
    let is_known = catalog.models.iter().any(|entry| entry.key == key);
    // Offers of workers take no space from operators.
    let added = catalog.models.iter().filter(|entry| entry.added).count();
    if is_known || added < OFFERED_MAX { Ok(key) } else { Err(ModelError::TooMany(OFFERED_MAX)) }
}

fn next_of(version: ModelVersion) -> ModelVersion {
    ModelVersion { minor: version.minor.saturating_add(1), ..version }
}

/// Finds the model that a name and an optional version identify. A name without a version must have only one.
pub fn find(catalog: &Catalog, name: &ModelName, version: Option<ModelVersion>) -> Result<ModelKey, ModelError> {
    let named = catalog.models.iter().map(|entry| &entry.key).filter(|key| key.model_id == *name);
    let keys: Vec<&ModelKey> = named.filter(|key| version.is_none_or(|version| key.version == version)).collect();
    match keys[..] {
        [one] => Ok(one.clone()),
        [] => Err(ModelError::NoModel(ModelRef { name: name.clone(), version, adapter: None })),
        _ => {
            let versions = list(keys.iter().map(|key| key.version));
            Err(ModelError::Several { name: name.clone(), versions })
        }
    }
}

/// Removes a model and its adapters. With `force`, it is also removed from aliases, and aliases left without a target
/// are removed.
pub async fn remove(store: &dyn RegistryStore, old: ModelRemove) -> Result<ModelRemoved, ModelError> {
    let catalog = catalog::list(store).await?;
    let key = find(&catalog, &old.model_id, old.version)?;
    let orphans = orphans(&catalog, &key);
    if !orphans.is_empty() && !old.force {
        return Err(ModelError::HasAliases { key, aliases: list(orphans.iter().map(|orphan| &orphan.alias)) });
    }
    let is_gone = |model: &ModelKey| *model == key;
    let entry = catalog.models.iter().find(|entry| is_gone(&entry.key));
    let adapters = catalog.adapters.iter().filter(|entry| is_gone(&entry.key.model)).map(|entry| entry.digest);
    let mut unused: Vec<Digest> = entry.map(|entry| entry.digest).into_iter().chain(adapters).collect();
    let kept = |digest: &Digest| {
        let in_model = |entry: &ModelEntry| !is_gone(&entry.key) && entry.digest == *digest;
        catalog.models.iter().any(in_model)
            || catalog.adapters.iter().any(|entry| !is_gone(&entry.key.model) && entry.digest == *digest)
    };
    unused.retain(|digest| !kept(digest));
    // The model is removed first, because an alias that keeps other targets may have the model's own name.
    let found = store.remove_model(&key).await?;
    let mut aliases = Vec::new();
    for AliasEntry { alias, target, alternatives, created_at } in orphans {
        let targets = iter::once(target).chain(alternatives);
        let mut left: Vec<ModelRef> = targets.filter(|target| !is_lost(&catalog, target, &key)).collect();
        // A model's own name needs no alias.
        let is_needed = left.len() > 1 || left.first().is_some_and(|target| target.name != alias);
        let is_kept = is_needed && {
            let target = left.remove(0);
            let entry = AliasEntry { alias: alias.clone(), target, alternatives: left, created_at };
            // If another version has the name, the name belongs to that model and the alias is removed.
            store.put_alias(entry).await?
        };
        if !is_kept {
            store.remove_alias(&alias).await?;
            aliases.push(alias);
        }
    }
    Ok(ModelRemoved { found, key, aliases, unused })
}

/// Returns the aliases that lose a target when a model is removed.
fn orphans(catalog: &Catalog, gone: &ModelKey) -> Vec<AliasEntry> {
    let lose = |entry: &&AliasEntry| entry.targets().any(|target| is_lost(catalog, target, gone));
    catalog.aliases.iter().filter(lose).cloned().collect()
}

/// Returns whether a target no longer exists once a model is removed.
fn is_lost(catalog: &Catalog, target: &ModelRef, gone: &ModelKey) -> bool {
    let others = catalog.models.iter().filter(|entry| entry.key.model_id == gone.model_id && entry.key != *gone);
    let is_last = others.count() == 0;
    let is_its_version = target.version == Some(gone.version);
    // An adapter belongs to one version.
    let is_its_adapter = target.adapter.as_ref().is_some_and(|adapter| {
        target.version.is_none() && newest(catalog, &target.name).is_some_and(|newest| newest == *gone) && {
            let key = AdapterKey { model: gone.clone(), adapter: adapter.clone() };
            catalog.adapters.iter().any(|entry| entry.key == key)
        }
    });
    target.name == gone.model_id && (is_last || is_its_version || is_its_adapter)
}

fn newest(catalog: &Catalog, name: &ModelName) -> Option<ModelKey> {
    catalog.models.iter().map(|entry| &entry.key).filter(|key| key.model_id == *name).max().cloned()
}

/// Gives a model another name, or several models one name.
pub async fn set_alias(store: &dyn RegistryStore, new: AliasSet, now: UnixMillis) -> Result<AliasEntry, ModelError> {
    let AliasSet { alias, target, mut alternatives } = new;
    let mut seen = vec![target.clone()];
    alternatives.retain(|other| {
        !seen.contains(other) && {
            seen.push(other.clone());
            true
        }
    });
    let entry = AliasEntry { alias, target, alternatives, created_at: now };
    let catalog = catalog::list(store).await?;
    check_targets(&catalog, &entry)?;
    let is_new = catalog.aliases.iter().all(|known| known.alias != entry.alias);
    if is_new && catalog.aliases.len() >= ALIASES_MAX {
        return Err(ModelError::TooMany(ALIASES_MAX));
    }
    if store.put_alias(entry.clone()).await? { Ok(entry) } else { Err(ModelError::IsModel(entry.alias)) }
}

fn check_targets(catalog: &Catalog, entry: &AliasEntry) -> Result<(), ModelError> {
    let is_model = |name: &ModelName| catalog.models.iter().any(|entry| entry.key.model_id == *name);
    if entry.alternatives.len() > ALTERNATIVES_MAX {
        return Err(ModelError::TooManyTargets);
    }
    if !entry.alternatives.is_empty() && entry.targets().any(|target| target.adapter.is_some()) {
        return Err(ModelError::AdapterOfSeveral);
    }
    for target in entry.targets() {
        let of_name = |other: &&AliasEntry| other.alias == target.name && !is_model(&target.name);
        if let Some(other) = catalog.aliases.iter().find(of_name) {
            return Err(ModelError::AliasOfAlias { alias: other.alias.clone(), target: other.target.clone() });
        }
        let key = match target.version {
            Some(version) => Some(ModelKey { model_id: target.name.clone(), version }),
            None => newest(catalog, &target.name),
        };
        let is_there = |key: &ModelKey| {
            let has = |adapter| {
                let key = AdapterKey { model: key.clone(), adapter };
                catalog.adapters.iter().any(|entry| entry.key == key)
            };
            catalog.models.iter().any(|entry| entry.key == *key) && target.adapter.clone().is_none_or(has)
        };
        if !key.is_some_and(|key| is_there(&key)) {
            return Err(ModelError::NoModel(target.clone()));
        }
    }
    // A model's own name stands for it without an alias, and must not be narrowed to one of its versions.
    if entry.is_own_name() && entry.alternatives.is_empty() {
        return Err(ModelError::IsModel(entry.alias.clone()));
    }
    Ok(())
}

pub async fn remove_alias(store: &dyn RegistryStore, alias: &ModelName) -> Result<AliasRemoved, ModelError> {
    Ok(AliasRemoved { found: store.remove_alias(alias).await? })
}

fn list(items: impl Iterator<Item = impl std::fmt::Display>) -> String {
    let mut text = String::new();
    for item in items {
        let before = if text.is_empty() { "" } else { ", " };
        // Writing to a `String` does not fail.
        let _ = write!(text, "{before}{item}");
    }
    text
}

fn short(digest: &Digest) -> String {
    digest.to_string().chars().take(12).collect()
}
