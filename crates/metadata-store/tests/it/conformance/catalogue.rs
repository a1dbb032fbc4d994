//! Tokens, policies, models, adapters and aliases.

use protocol::Digest;
use protocol::model::{AdapterEntry, AliasEntry, ModelEntry, ModelFacts};
use protocol::policy::TenantPolicy;
use tether_metadata_store::{PutAdapterError, PutModelError, PutTokenError, TokenRecord};

use super::Registry;
use super::samples::{LEASE, NOW, adapter, model, model_key, tenant, token};

pub(crate) async fn a_token_is_found_as_it_was_written(subject: Registry) {
    let store = subject.store;
    let endless = TokenRecord { expires_at: None, scopes: vec![], ..token("BBBBBBBB") };
    store.put_token(token("AAAAAAAA")).await.expect("is added");
    store.put_token(endless.clone()).await.expect("is added");
    assert_eq!(store.token("AAAAAAAA").await, Ok(Some(token("AAAAAAAA"))));
    assert_eq!(store.token("aaaaaaaa").await, Ok(None), "case counts");
    assert_eq!(store.tokens().await, Ok(vec![token("AAAAAAAA"), endless]));
}

pub(crate) async fn a_key_id_is_given_once(subject: Registry) {
    let store = subject.store;
    store.put_token(token("AAAAAAAA")).await.expect("is added");
    let other = TokenRecord { hash: [8; 32], ..token("AAAAAAAA") };
    assert_eq!(store.put_token(other).await, Err(PutTokenError::Taken { key_id: "AAAAAAAA".into() }));
    assert_eq!(store.token("AAAAAAAA").await, Ok(Some(token("AAAAAAAA"))));
}

pub(crate) async fn a_revoked_token_keeps_the_time_of_its_first_revocation(subject: Registry) {
    let store = subject.store;
    store.put_token(token("AAAAAAAA")).await.expect("is added");
    assert_eq!(store.revoke_token("AAAAAAAA", NOW).await, Ok(true));
    assert_eq!(store.revoke_token("AAAAAAAA", LEASE).await, Ok(true));
    assert_eq!(store.revoke_token("BBBBBBBB", NOW).await, Ok(false));
    let revoked = TokenRecord { revoked_at: Some(NOW), ..token("AAAAAAAA") };
    assert_eq!(store.token("AAAAAAAA").await, Ok(Some(revoked)));
}

pub(crate) async fn a_tenants_latest_rules_hold(subject: Registry) {
    let store = subject.store;
    let strict = TenantPolicy {
        allowed_models: Some(vec!["tether-tiny".parse().expect("a model's name")]),
        requests_per_minute: Some(60),
        ..TenantPolicy::default()
    };
    assert_eq!(store.policy(&tenant("acme")).await, Ok(None));
    store.put_policy(&tenant("other"), &TenantPolicy::default()).await.expect("is set");
    store.put_policy(&tenant("acme"), &TenantPolicy::default()).await.expect("is set");
    store.put_policy(&tenant("acme"), &strict).await.expect("is set");
    assert_eq!(store.policy(&tenant("acme")).await, Ok(Some(strict.clone())));
    let all = vec![(tenant("acme"), strict), (tenant("other"), TenantPolicy::default())];
    assert_eq!(store.policies().await, Ok(all));
    assert_eq!(store.policy(&tenant("other")).await, Ok(Some(TenantPolicy::default())));
}

pub(crate) async fn a_model_version_never_changes_its_digest(subject: Registry) {
    let store = subject.store;
    store.put_model(model("tether-tiny", "1.0")).await.expect("is registered");
    let other = ModelEntry { digest: Digest([8; 32]), ..model("tether-tiny", "1.0") };
    let conflict = PutModelError::Conflict { key: model_key("tether-tiny", "1.0"), registered: Digest([3; 32]) };
    assert_eq!(store.put_model(other).await, Err(conflict));
    let described = ModelEntry { description: "better words".into(), ..model("tether-tiny", "1.0") };
    store.put_model(ModelEntry { created_at: LEASE, ..described.clone() }).await.expect("words may change");
    assert_eq!(store.models().await, Ok(vec![described]));
}

pub(crate) async fn what_is_known_of_a_model_stays_known(subject: Registry) {
    let store = subject.store;
    let facts = ModelFacts { quantisation: "Q4_K_M".into(), parameters: 7, ..ModelFacts::default() };
    let known = ModelEntry { facts: Some(facts), ..model("tether-tiny", "1.0") };
    store.put_model(model("tether-tiny", "1.0")).await.expect("is registered");
    assert_eq!(store.models().await, Ok(vec![model("tether-tiny", "1.0")]));
    for entry in [known.clone(), model("tether-tiny", "1.0")] {
        store.put_model(entry).await.expect("is registered");
        assert_eq!(store.models().await, Ok(vec![known.clone()]));
    }
}

pub(crate) async fn an_alias_stands_for_its_latest_target_and_never_for_a_models_own_name(subject: Registry) {
    let store = subject.store;
    let alias = |target: &str| AliasEntry {
        alias: "gpt-4o".parse().expect("a name"),
        target: target.parse().expect("a model"),
        alternatives: vec![],
        created_at: NOW,
    };
    assert_eq!(store.put_alias(alias("tether-tiny")).await, Ok(true));
    assert_eq!(store.put_alias(alias("tether-tiny@1.0:pirate")).await, Ok(true));
    assert_eq!(store.aliases().await, Ok(vec![alias("tether-tiny@1.0:pirate")]));
    assert_eq!(store.remove_alias(&alias("a").alias).await, Ok(true));
    assert_eq!(store.remove_alias(&alias("a").alias).await, Ok(false));
    store.put_model(model("gpt-4o", "1.0")).await.expect("is registered");
    assert_eq!(store.put_alias(alias("tether-tiny")).await, Ok(false));
    assert_eq!(store.aliases().await, Ok(vec![]));
    let several = AliasEntry {
        alternatives: vec!["tether-tiny@1.0".parse().expect("a model"), "b".parse().expect("a model")],
        ..alias("gpt-4o")
    };
    assert_eq!(store.put_alias(several.clone()).await, Ok(true), "it is one of those that it stands for");
    assert_eq!(store.aliases().await, Ok(vec![several]));
}

pub(crate) async fn a_model_that_was_added_stays_so(subject: Registry) {
    let store = subject.store;
    let added = ModelEntry { added: true, ..model("mine", "1.0") };
    for entry in [model("mine", "1.0"), added.clone(), model("mine", "1.0")] {
        store.put_model(entry).await.expect("is registered");
    }
    assert_eq!(store.models().await, Ok(vec![added]));
}

pub(crate) async fn how_long_a_model_is_kept_outlives_its_registration(subject: Registry) {
    let store = subject.store;
    let plain = model("mine", "1.0");
    assert_eq!(store.keep_model(&plain.key, true, Some(-1)).await, Ok(false));
    store.put_model(plain.clone()).await.expect("is registered");
    assert_eq!(store.keep_model(&plain.key, true, Some(-1)).await, Ok(true));
    store.put_model(plain.clone()).await.expect("is registered again");
    let kept = ModelEntry { pin: true, keep_alive_secs: Some(-1), ..plain.clone() };
    assert_eq!(store.models().await, Ok(vec![kept]));
    assert_eq!(store.keep_model(&plain.key, false, None).await, Ok(true));
    assert_eq!(store.models().await, Ok(vec![plain]));
}

pub(crate) async fn models_are_listed_by_name_and_number(subject: Registry) {
    let store = subject.store;
    for (name, version) in [("b", "1.10"), ("b", "1.9"), ("a", "2.0")] {
        store.put_model(model(name, version)).await.expect("is registered");
    }
    let expected = vec![model("a", "2.0"), model("b", "1.9"), model("b", "1.10")];
    assert_eq!(store.models().await, Ok(expected));
}

pub(crate) async fn a_removed_model_is_gone(subject: Registry) {
    let store = subject.store;
    store.put_model(model("a", "1.0")).await.expect("is registered");
    store.put_model(model("a", "1.1")).await.expect("is registered");
    assert_eq!(store.remove_model(&model_key("a", "1.0")).await, Ok(true));
    assert_eq!(store.remove_model(&model_key("a", "1.0")).await, Ok(false));
    assert_eq!(store.models().await, Ok(vec![model("a", "1.1")]));
}

pub(crate) async fn adapters_are_listed_by_model_and_name(subject: Registry) {
    let store = subject.store;
    for (model_id, version) in [("b", "1.0"), ("a", "1.10"), ("a", "1.9")] {
        store.put_model(model(model_id, version)).await.expect("is registered");
    }
    let expected = [("a", "1.9", "x"), ("a", "1.10", "x"), ("a", "1.10", "y"), ("b", "1.0", "w")];
    for (model_id, version, name) in expected.iter().rev() {
        store.put_adapter(adapter(model_id, version, name)).await.expect("is registered");
    }
    let expected = expected.map(|(model_id, version, name)| adapter(model_id, version, name));
    assert_eq!(store.adapters().await, Ok(expected.to_vec()));
}

pub(crate) async fn an_adapter_needs_its_model_and_keeps_its_digest(subject: Registry) {
    let store = subject.store;
    let pirate = adapter("a", "1.0", "pirate");
    let no_model = PutAdapterError::NoModel { model: model_key("a", "1.0") };
    assert_eq!(store.put_adapter(pirate.clone()).await, Err(no_model));
    store.put_model(model("a", "1.0")).await.expect("is registered");
    store.put_adapter(pirate.clone()).await.expect("is registered");
    let other = AdapterEntry { digest: Digest([8; 32]), ..pirate.clone() };
    let conflict = PutAdapterError::Conflict { key: pirate.key.clone(), registered: pirate.digest };
    assert_eq!(store.put_adapter(other).await, Err(conflict));
    let described = AdapterEntry { description: "better words".into(), ..pirate };
    store.put_adapter(AdapterEntry { created_at: LEASE, ..described.clone() }).await.expect("words may change");
    assert_eq!(store.adapters().await, Ok(vec![described]));
}

pub(crate) async fn a_removed_adapter_is_gone_and_goes_with_its_model(subject: Registry) {
    let store = subject.store;
    store.put_model(model("a", "1.0")).await.expect("is registered");
    store.put_model(model("a", "1.1")).await.expect("is registered");
    let kept = adapter("a", "1.1", "x");
    for entry in [adapter("a", "1.0", "x"), adapter("a", "1.0", "y"), kept.clone()] {
        store.put_adapter(entry).await.expect("is registered");
    }
    let key = adapter("a", "1.0", "x").key;
    assert_eq!(store.remove_adapter(&key).await, Ok(true));
    assert_eq!(store.remove_adapter(&key).await, Ok(false));
    assert_eq!(store.remove_model(&model_key("a", "1.0")).await, Ok(true));
    assert_eq!(store.adapters().await, Ok(vec![kept]));
}
