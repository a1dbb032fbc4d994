//! Models that operators add and forget, and their aliases.

use std::time::Duration;

use protocol::control::{
    ALIAS_REMOVE, ALIAS_SET, AliasRemove, AliasRemoved, AliasSet, ByOperator, Catalog, MODEL_ADD, MODEL_REMOVE,
    ModelAdd, ModelRemove, ModelRemoved, OPERATOR_CATALOG_LIST, OperatorRequest, Scope, TokenCreate,
};
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey, ModelOffer, OfferedSource};
use protocol::{Digest, ErrorCode, UnixMillis};
use rpc::CallError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tether_registry::catalog;

use crate::{TestRegistry, new_token, test};

/// A test, and the token of an operator whose node belongs to no network.
struct Scene {
    test: TestRegistry,
    token: String,
}

impl Scene {
    async fn new() -> Self {
        let test = test().await;
        let new = TokenCreate { scopes: vec![Scope::Admin], ..new_token(None) };
        let token = test.tokens.issue(new).await.expect("issued").token;
        Self { test, token }
    }

    async fn ask<Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: impl Serialize,
    ) -> Result<Reply, (ErrorCode, String)> {
        let asked = ByOperator { token: self.token.clone(), request };
        let reply = self.test.stranger.call(self.test.registry, method, &asked, Duration::from_secs(5)).await;
        reply.map_err(|error| match error {
            CallError::Remote(error) => (error.code, error.message),
            error => panic!("the registry answers: {error}"),
        })
    }

    async fn add(&self, name: &str, version: Option<&str>, bytes: &[u8]) -> Result<String, String> {
        let new = ModelAdd {
            model_id: name.parse().expect("a name"),
            version: version.map(|version| version.parse().expect("a version")),
            digest: Digest::of(bytes),
            bytes: bytes.len() as u64,
            context_length: 512,
            description: String::new(),
            facts: None,
        };
        let added = self.ask::<ModelEntry>(MODEL_ADD, new).await;
        added.map(|entry| entry.key.to_string()).map_err(|(_, message)| message)
    }

    /// Lists as many models as workers may offer.
    async fn fill_with_offers(&self) {
        for number in 0..catalog::OFFERED_MAX {
            let key = ModelKey {
                model_id: format!("m-{number}").parse().expect("a name"),
                version: "1.0".parse().expect("a version"),
            };
            let source = OfferedSource::Server { served_as: "m".into() };
            let offer = ModelOffer { key, source, context_length: 512, facts: None };
            catalog::offer(&*self.test.store, offer, &mut 0, UnixMillis(1)).await.expect("listed");
        }
    }

    /// Sets an alias for one target or for several, with blanks between them, and returns the first that it stands for.
    async fn alias(&self, alias: &str, targets: &str) -> Result<String, String> {
        let mut targets = targets.split(' ').map(|target| target.parse().expect("a model"));
        let alias = alias.parse().expect("a name");
        let target = targets.next().expect("a target");
        let new = AliasSet { alias, target, alternatives: targets.collect() };
        let set = self.ask::<AliasEntry>(ALIAS_SET, new).await;
        set.map(|entry| entry.target.to_string()).map_err(|(_, message)| message)
    }

    async fn remove(&self, name: &str, version: Option<&str>, force: bool) -> Result<ModelRemoved, String> {
        let version = version.map(|version| version.parse().expect("a version"));
        let old = ModelRemove { model_id: name.parse().expect("a name"), version, force };
        self.ask(MODEL_REMOVE, old).await.map_err(|(_, message)| message)
    }

    async fn catalog(&self) -> Catalog {
        let request = OperatorRequest { token: self.token.clone() };
        let (registry, client) = (self.test.registry, &self.test.stranger);
        client.call(registry, OPERATOR_CATALOG_LIST, &request, Duration::from_secs(5)).await.expect("listed")
    }
}

#[tokio::test]
async fn a_version_is_found_for_the_bytes_that_are_added() {
    let scene = Scene::new().await;
    assert_eq!(scene.add("mine", None, b"one").await.as_deref(), Ok("mine@1.0"));
    assert_eq!(scene.add("mine", None, b"one").await.as_deref(), Ok("mine@1.0"));
    let taken = scene.add("mine", None, b"two").await.expect_err("taken");
    assert!(taken.contains("mine@1.0 is another model already") && taken.contains("version 1.1"), "{taken}");
    assert_eq!(scene.add("mine", Some("2.0"), b"two").await.as_deref(), Ok("mine@2.0"));
    assert_eq!(scene.add("mine", None, b"one").await.as_deref(), Ok("mine@1.0"), "the same bytes are the same version");
    let taken = scene.add("mine", Some("1.0"), b"two").await.expect_err("taken");
    assert!(taken.contains("version 2.1"), "{taken}");
    assert!(scene.add("empty", None, b"").await.is_err());
    assert!(scene.catalog().await.models.iter().all(|entry| entry.added));
}

#[tokio::test]
async fn an_alias_stands_for_what_is_there_and_for_no_alias() {
    let scene = Scene::new().await;
    scene.add("mine", None, b"one").await.expect("added");
    assert_eq!(scene.alias("gpt-4o", "mine").await.as_deref(), Ok("mine"));
    for (alias, target, word) in [
        ("gpt-5", "gpt-4o", "is itself an alias; give what it stands for, mine"),
        ("gpt-5", "nobody", "nobody does not exist"),
        ("gpt-5", "mine@3.0", "mine@3.0 does not exist"),
        ("gpt-5", "mine:pirate", "mine:pirate does not exist"),
        ("mine", "mine", "is a model's own name"),
    ] {
        let refused = scene.alias(alias, target).await.expect_err(target);
        assert!(refused.contains(word), "{refused}");
    }
    let refused = scene.add("gpt-4o", None, b"two").await.expect_err("taken");
    assert!(refused.contains("gpt-4o is an alias of mine"), "{refused}");
    assert_eq!(scene.alias("gpt-4o", "mine@1.0").await.as_deref(), Ok("mine@1.0"), "it can be set anew");
    let forget = AliasRemove { alias: "gpt-4o".parse().expect("a name") };
    assert!(scene.ask::<AliasRemoved>(ALIAS_REMOVE, forget.clone()).await.expect("forgotten").found);
    assert!(!scene.ask::<AliasRemoved>(ALIAS_REMOVE, forget).await.expect("nothing to forget").found);
}

#[tokio::test]
async fn one_name_stands_for_several_models_and_for_one_of_that_name() {
    let scene = Scene::new().await;
    for (name, bytes) in [("mine", b"one"), ("yours", b"two"), ("theirs", b"six")] {
        scene.add(name, None, bytes).await.expect("added");
    }
    let adapter = AdapterEntry {
        key: AdapterKey {
            model: scene.catalog().await.models[0].key.clone(),
            adapter: "pirate".parse().expect("a name"),
        },
        digest: Digest::of(b"pirate"),
        bytes: 6,
        description: String::new(),
        created_at: UnixMillis(1),
    };
    scene.test.store.put_adapter(adapter).await.expect("kept");
    scene.alias("any", "mine yours@1.0 mine").await.expect("set");
    scene.alias("mine", "mine yours theirs").await.expect("its own name is one of them");
    let many = vec!["mine@1.0"; 20].join(" ");
    scene.alias("once", &many).await.expect("the same again counts once");
    for (alias, targets, word) in [
        ("yours", "mine theirs", "yours is a model's own name"),
        ("yours", "yours yours", "yours is a model's own name"),
        ("both", "mine nobody", "nobody does not exist"),
        ("both", "mine any", "any is itself an alias"),
        ("both", "mine:pirate yours", "cannot name an adapter"),
    ] {
        let refused = scene.alias(alias, targets).await.expect_err(targets);
        assert!(refused.contains(word), "{targets}: {refused}");
    }
    scene.add("mine", Some("1.1"), b"new").await.expect("a further version of a model that shares its name");
    let aliases = |catalog: Catalog| -> Vec<String> {
        let aliases = |entry: &AliasEntry| {
            let targets: Vec<_> = entry.targets().map(ToString::to_string).collect();
            format!("{}: {}", entry.alias, targets.join(" "))
        };
        catalog.aliases.iter().map(aliases).collect()
    };
    assert_eq!(aliases(scene.catalog().await), ["any: mine yours@1.0", "mine: mine yours theirs", "once: mine@1.0"]);
    // What is left of a name goes on.
    assert!(scene.remove("yours", None, false).await.expect_err("named").contains("any, mine"));
    assert!(scene.remove("yours", None, true).await.expect("forced").aliases.is_empty());
    assert_eq!(aliases(scene.catalog().await), ["any: mine", "mine: mine theirs", "once: mine@1.0"]);
    // Of two versions that have the name, one is left: then the name is that one's.
    let removed = scene.remove("theirs", None, true).await.expect("forced");
    assert_eq!(removed.aliases.iter().map(protocol::ModelName::as_str).collect::<Vec<_>>(), ["mine"]);
    // The model whose own name it is goes, and the name is the other's.
    scene.add("yours", None, b"two").await.expect("added");
    scene.alias("mine", "yours mine@1.1").await.expect("set");
    let removed = scene.remove("mine", Some("1.1"), true).await.expect("forced");
    assert_eq!(removed.aliases.len(), 1, "mine@1.0 has the name");
    scene.alias("mine", "yours mine").await.expect("set");
    assert!(
        scene
            .remove("mine", Some("1.0"), true)
            .await
            .expect("forced")
            .aliases
            .contains(&"any".parse().expect("a name"))
    );
    assert_eq!(aliases(scene.catalog().await), ["mine: yours"]);
}

#[tokio::test]
async fn seventeen_models_are_too_many_for_one_name() {
    let scene = Scene::new().await;
    let names: Vec<String> = (0..17).map(|number| format!("m{number}")).collect();
    for name in &names {
        scene.add(name, None, name.as_bytes()).await.expect("added");
    }
    assert_eq!(scene.alias("all", &names[..16].join(" ")).await.as_deref(), Ok("m0"));
    let refused = scene.alias("all", &names.join(" ")).await.expect_err("too many");
    assert!(refused.contains("at most 16 models"), "{refused}");
}

#[tokio::test]
async fn a_model_is_forgotten_with_what_only_it_needs() {
    let scene = Scene::new().await;
    scene.add("mine", None, b"one").await.expect("added");
    scene.add("mine", Some("1.1"), b"two").await.expect("added");
    scene.add("twin", None, b"two").await.expect("added");
    let model = scene.catalog().await.models[0].key.clone();
    let adapter = AdapterEntry {
        key: AdapterKey { model, adapter: "pirate".parse().expect("a name") },
        digest: Digest::of(b"pirate"),
        bytes: 6,
        description: String::new(),
        created_at: UnixMillis(1),
    };
    scene.test.store.put_adapter(adapter).await.expect("kept");
    for (alias, target) in [("any", "mine"), ("old", "mine@1.0"), ("arr", "mine@1.0:pirate")] {
        scene.alias(alias, target).await.expect("set");
    }
    let unclear = scene.remove("mine", None, true).await.expect_err("two versions");
    assert!(unclear.contains("the versions 1.0, 1.1"), "{unclear}");
    let named = scene.remove("mine", Some("1.0"), false).await.expect_err("aliases");
    assert!(named.contains("what arr, old stands for"), "{named}");
    let removed = scene.remove("mine", Some("1.0"), true).await.expect("forced");
    assert_eq!(removed.aliases.iter().map(protocol::ModelName::as_str).collect::<Vec<_>>(), ["arr", "old"]);
    assert_eq!(removed.unused, [Digest::of(b"one"), Digest::of(b"pirate")]);
    // Another model has the same bytes, and the alias of any version has none left.
    assert!(scene.remove("mine", None, false).await.expect_err("an alias").contains("any"));
    assert_eq!(scene.remove("mine", None, true).await.expect("forced").unused, [Digest([0; 32]); 0]);
    assert_eq!(scene.remove("twin", None, false).await.expect("free").unused, [Digest::of(b"two")]);
    assert!(scene.remove("twin", None, false).await.expect_err("gone").contains("does not exist"));
    assert!(scene.catalog().await.aliases.is_empty());
}

#[tokio::test]
async fn only_operators_change_the_catalogue() {
    let mut scene = Scene::new().await;
    scene.token = scene.test.tokens.issue(new_token(None)).await.expect("issued").token;
    for refused in [
        scene.add("mine", None, b"one").await.err(),
        scene.alias("gpt-4o", "m").await.err(),
        scene.remove("mine", None, true).await.err(),
    ] {
        assert!(refused.is_some_and(|message| message.contains("may not operate")));
    }
}

#[tokio::test]
async fn offers_of_workers_take_no_space_from_operators() {
    let scene = Scene::new().await;
    scene.fill_with_offers().await;
    assert_eq!(scene.add("mine", None, b"weights").await.as_deref(), Ok("mine@1.0"));
}
