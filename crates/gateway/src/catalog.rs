//! An index of the models, adapters and aliases that the registry lists.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use protocol::control::Catalog;
use protocol::model::{AdapterKey, AliasEntry, ModelEntry, ModelKey, ModelRef};
use protocol::{AdapterName, ErrorCode, ModelName, ModelVersion, WireError};

/// The registry's models by name, each with its versions from the oldest to the newest.
#[derive(Debug, Default)]
pub(crate) struct Models {
    by_name: HashMap<ModelName, Vec<Arc<ModelEntry>>>,
    adapters: BTreeSet<AdapterKey>,
    aliases: BTreeMap<ModelName, Vec<ModelRef>>,
}

impl Models {
    pub(crate) fn new(catalog: Catalog) -> Self {
        let mut by_name: HashMap<ModelName, Vec<Arc<ModelEntry>>> = HashMap::new();
        for entry in catalog.models {
            by_name.entry(entry.key.model_id.clone()).or_default().push(Arc::new(entry));
        }
        for versions in by_name.values_mut() {
            versions.sort_by_key(|entry| entry.key.version);
        }
        let adapters = catalog.adapters.into_iter().map(|entry| entry.key).collect();
        let alias = |entry: AliasEntry| (entry.alias.clone(), entry.targets().cloned().collect());
        Self { by_name, adapters, aliases: catalog.aliases.into_iter().map(alias).collect() }
    }

    /// Resolves a name to models, the preferred one first: the targets of an alias, or else the name itself. Returns
    /// `None` for an alias with a version, unless a model has the same name. Also returns `None` for an alias with an
    /// adapter if one of its targets already has one.
    pub(crate) fn meant(&self, wanted: &ModelRef) -> Option<Vec<ModelRef>> {
        let Some(targets) = self.stands_for(&wanted.name) else { return Some(vec![wanted.clone()]) };
        if wanted.version.is_some() {
            // An alias has no versions; they belong to the model of that name, if there is one.
            return self.by_name.contains_key(&wanted.name).then(|| vec![wanted.clone()]);
        }
        let meant = |target: &ModelRef| match (&wanted.adapter, &target.adapter) {
            (Some(_), Some(_)) => None,
            (wanted, of_target) => {
                Some(ModelRef { adapter: wanted.clone().or_else(|| of_target.clone()), ..target.clone() })
            }
        };
        targets.iter().map(meant).collect()
    }

    /// Returns the targets of a name that is an alias. If a model has the same name, the alias counts only if that
    /// model is among its targets.
    pub(crate) fn stands_for(&self, name: &ModelName) -> Option<&[ModelRef]> {
        let targets = self.aliases.get(name)?;
        let is_own = !self.by_name.contains_key(name) || targets.iter().any(|target| target.name == *name);
        is_own.then_some(targets)
    }

    /// Returns the aliases with their targets, by name.
    pub(crate) fn aliases(&self) -> impl Iterator<Item = (&ModelName, &[ModelRef])> {
        self.aliases.keys().filter_map(|alias| Some((alias, self.stands_for(alias)?)))
    }

    /// Returns whether a model or an alias has this name.
    pub(crate) fn knows(&self, name: &ModelName) -> bool {
        self.by_name.contains_key(name) || self.aliases.contains_key(name)
    }

    /// Returns whether a model version has an adapter.
    pub(crate) fn has_adapter(&self, model: &ModelKey, adapter: &AdapterName) -> bool {
        self.adapters.contains(&AdapterKey { model: model.clone(), adapter: adapter.clone() })
    }

    /// Returns the adapters of a model version, by name.
    pub(crate) fn adapters_of<'a>(&'a self, model: &'a ModelKey) -> impl Iterator<Item = &'a AdapterName> {
        self.adapters.iter().filter(move |key| key.model == *model).map(|key| &key.adapter)
    }

    /// Returns a version of a model; the newest if `version` is `None`.
    pub(crate) fn find(&self, name: &ModelName, version: Option<ModelVersion>) -> Option<&Arc<ModelEntry>> {
        let versions = self.by_name.get(name)?;
        match version {
            None => versions.last(),
            Some(version) => versions.iter().find(|entry| entry.key.version == version),
        }
    }

    /// Returns every version of every model, by name and then from oldest to newest.
    pub(crate) fn all(&self) -> Vec<&Arc<ModelEntry>> {
        let mut all: Vec<_> = self.by_name.values().flatten().collect();
        all.sort_by(|one, other| one.key.cmp(&other.key));
        all
    }

    /// Returns whether this is the newest version of its model.
    pub(crate) fn is_newest(&self, entry: &ModelEntry) -> bool {
        self.find(&entry.key.model_id, None).is_some_and(|newest| newest.key == entry.key)
    }
}

/// Returns the error for a model that does not exist, under the name that the client gave.
pub(crate) fn not_found(name: &str) -> WireError {
    let name: String = name.chars().take(80).collect();
    let message = format!("the model {name:?} does not exist; GET /v1/models lists those that are served");
    WireError::new(ErrorCode::ModelNotFound, message).with_param("model")
}

/// Returns the error for a registered model that no worker serves, under the name that the client gave.
pub(crate) fn not_served(name: &str) -> WireError {
    let message = format!(
        "the model {name:?} is registered, and no worker serves it now; GET /v1/models lists those that are served"
    );
    WireError::new(ErrorCode::ModelNotFound, message).with_param("model")
}

/// Parses a model's name as clients write it. A malformed name fails like that of a model that does not exist.
pub(crate) fn parse_ref(text: &str) -> Result<ModelRef, WireError> {
    text.parse().map_err(|_| not_found(text))
}

/// Parses the name of the model in a request, where it is required.
pub(crate) fn parse_named(name: Option<&str>) -> Result<(ModelRef, String), WireError> {
    let name = name.unwrap_or_default();
    if name.is_empty() {
        let message = "model is missing; GET /v1/models lists those that can be named";
        return Err(WireError::new(ErrorCode::MissingModel, message).with_param("model"));
    }
    Ok((parse_ref(name)?, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use protocol::{Digest, UnixMillis};

    use super::*;

    fn entry(name: &str, version: &str) -> ModelEntry {
        let key = ModelKey { model_id: name.parse().expect("name"), version: version.parse().expect("version") };
        ModelEntry {
            facts: None,
            added: false,
            pin: false,
            keep_alive_secs: None,
            digest: Digest::of(key.to_string().as_bytes()),
            key,
            bytes: 1,
            context_length: 1,
            description: String::new(),
            created_at: UnixMillis(0),
        }
    }

    #[test]
    fn no_version_means_the_newest() {
        let listed = vec![entry("a", "1.9"), entry("a", "1.10"), entry("b", "0.1")];
        let models = Models::new(Catalog { models: listed, ..Catalog::default() });
        let find = |text: &str| {
            let wanted = parse_ref(text).expect(text);
            models.find(&wanted.name, wanted.version).map(|entry| entry.key.to_string())
        };
        assert_eq!(find("a").as_deref(), Some("a@1.10"));
        assert_eq!(find("a@1.9").as_deref(), Some("a@1.9"));
        assert_eq!(find("a@2.0"), None);
        assert_eq!(find("c"), None);
        let all: Vec<_> = models.all().iter().map(|entry| entry.key.to_string()).collect();
        assert_eq!(all, ["a@1.9", "a@1.10", "b@0.1"]);
    }

    #[test]
    fn an_alias_is_the_model_that_it_stands_for() {
        let alias = |alias: &str, target: &str| AliasEntry {
            alias: alias.parse().expect("a name"),
            target: target.parse().expect("a model"),
            alternatives: vec![],
            created_at: UnixMillis(0),
        };
        let several = |name: &str, target: &str, other: &str| AliasEntry {
            alternatives: vec![other.parse().expect("a model")],
            ..alias(name, target)
        };
        let aliases = vec![
            alias("gpt-4o", "a"),
            alias("old", "a@1.9"),
            alias("arr", "a:pirate"),
            alias("b", "a"),
            several("any", "a", "b@0.1"),
            several("c", "b", "c"),
        ];
        let listed = vec![entry("a", "1.9"), entry("b", "0.1"), entry("c", "3.0")];
        let models = Models::new(Catalog { models: listed, aliases, ..Catalog::default() });
        for (wanted, meant) in [
            ("gpt-4o", Some("a")),
            ("gpt-4o:pirate", Some("a:pirate")),
            ("old", Some("a@1.9")),
            ("arr", Some("a:pirate")),
            ("b", Some("b")),
            ("a@1.9", Some("a@1.9")),
            ("d:x", Some("d:x")),
            ("any", Some("a b@0.1")),
            ("any:pirate", Some("a:pirate b@0.1:pirate")),
            ("c", Some("b c")),
            ("c@3.0", Some("c@3.0")),
            ("any@1.0", None),
            ("gpt-4o@1.9", None),
            ("arr:polite", None),
        ] {
            let found = models.meant(&parse_ref(wanted).expect(wanted));
            let found = found.map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
            assert_eq!(found.as_deref(), meant, "{wanted}");
        }
    }

    #[test]
    fn what_is_no_name_is_the_name_of_no_model() {
        for text in ["Meta/Llama", "", "a@x", "a:", "ä"] {
            assert_eq!(parse_ref(text).expect_err(text).code, ErrorCode::ModelNotFound);
        }
    }
}
