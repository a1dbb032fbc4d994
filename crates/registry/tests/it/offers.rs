//! Models that workers offer: of their own files, and of adopted servers.

use std::time::Duration;

use protocol::control::{Empty, MODEL_OFFER, NodeRole};
use protocol::model::{AliasEntry, ModelFacts, ModelKey, ModelOffer, OfferedSource, SERVED_AS_BYTES_MAX};
use protocol::signature::NodeKey;
use protocol::{Digest, ErrorCode, UnixMillis};
use rpc::{CallError, Client, Membership};
use tether_registry::{Grant, catalog};

use crate::{TestRegistry, test};

fn offer(model_id: &str, served_as: &str) -> ModelOffer {
    of(model_id, OfferedSource::Server { served_as: served_as.into() })
}

fn file(model_id: &str, bytes: &[u8]) -> ModelOffer {
    of(model_id, OfferedSource::Artifact { digest: Digest::of(bytes), bytes: bytes.len() as u64 })
}

fn of(model_id: &str, source: OfferedSource) -> ModelOffer {
    let key = ModelKey { model_id: model_id.parse().expect("a name"), version: "1.0".parse().expect("a version") };
    ModelOffer { key, source, context_length: 4_096, facts: None }
}

/// Makes a node a member that may serve some models; none for all.
async fn member(test: &TestRegistry, seed: u8, role: NodeRole, models: &[&str]) -> Client {
    let key = NodeKey::from_seed(&[seed; 32]);
    let models = models.iter().map(|model| model.parse().expect("a name")).collect();
    let certificate = test.authority.certify(key.public_key(), Grant { models, ..Grant::of(role, "node") }).await;
    let membership =
        Membership::new(test.authority.pool(), key.public_key(), certificate.expect("issued"), test.clock.clone());
    Client::new(test.network.node(&key)).with_membership(membership.expect("good"))
}

async fn outcome(test: &TestRegistry, client: &Client, offer: ModelOffer) -> Option<ErrorCode> {
    match client.call::<_, Empty>(test.registry, MODEL_OFFER, &offer, Duration::from_secs(5)).await {
        Ok(Empty {}) => None,
        Err(CallError::Remote(error)) => Some(error.code),
        Err(error) => panic!("the registry answers: {error}"),
    }
}

#[tokio::test]
async fn a_workers_offer_is_listed_once_and_never_becomes_another_model() {
    let test = test().await;
    let worker = member(&test, 20, NodeRole::Worker, &[]).await;
    assert_eq!(outcome(&test, &worker, offer("qwen3-8b", "Qwen/Qwen3-8B")).await, None);
    assert_eq!(outcome(&test, &worker, offer("qwen3-8b", "Qwen/Qwen3-8B")).await, None);
    let taken = outcome(&test, &worker, offer("qwen3-8b", "somebody/else")).await;
    assert_eq!(taken, Some(ErrorCode::InvalidValue));
    let models = catalog::list(&*test.store).await.expect("read").models;
    let listed: Vec<_> = models.iter().map(|model| (model.digest, model.bytes, model.context_length)).collect();
    assert_eq!(listed, [(Digest::of(b"remote:Qwen/Qwen3-8B"), 0, 4_096)]);
}

#[tokio::test]
async fn a_workers_file_is_listed_under_its_digest_and_never_becomes_another() {
    let test = test().await;
    let worker = member(&test, 20, NodeRole::Worker, &[]).await;
    assert_eq!(outcome(&test, &worker, file("mine", b"weights")).await, None);
    assert_eq!(outcome(&test, &worker, file("mine", b"weights")).await, None);
    for other in [file("mine", b"other weights"), offer("mine", "org/mine"), file("empty", b"")] {
        assert_eq!(outcome(&test, &worker, other).await, Some(ErrorCode::InvalidValue));
    }
    let models = catalog::list(&*test.store).await.expect("read").models;
    let listed: Vec<_> = models.iter().map(|model| (model.digest, model.bytes, model.context_length)).collect();
    assert_eq!(listed, [(Digest::of(b"weights"), 7, 4_096)]);
    let (alias, target) = ("gpt-4o".parse().expect("a name"), "mine".parse().expect("a model"));
    test.store
        .put_alias(AliasEntry { alias, target, alternatives: vec![], created_at: UnixMillis(1) })
        .await
        .expect("set");
    assert_eq!(outcome(&test, &worker, file("gpt-4o", b"other")).await, Some(ErrorCode::InvalidValue));
}

#[tokio::test]
async fn what_a_worker_tells_of_a_model_is_kept_and_cut() {
    let test = test().await;
    let worker = member(&test, 20, NodeRole::Worker, &[]).await;
    let facts = |quantisation: &str| ModelFacts { quantisation: quantisation.into(), ..ModelFacts::default() };
    let with_facts = |quantisation: &str| ModelOffer { facts: Some(facts(quantisation)), ..file("mine", b"weights") };
    // A worker of an earlier version tells nothing, and the first who does is believed.
    for offer in [file("mine", b"weights"), with_facts(&"Q".repeat(1_000)), with_facts("F16"), file("mine", b"weights")]
    {
        assert_eq!(outcome(&test, &worker, offer).await, None);
    }
    let models = catalog::list(&*test.store).await.expect("read").models;
    assert_eq!(models[0].facts, Some(facts(&"Q".repeat(128))));
}

#[tokio::test]
async fn only_certified_workers_offer_and_only_what_they_may_serve() {
    let test = test().await;
    let limited = member(&test, 20, NodeRole::Worker, &["qwen3-8b"]).await;
    let orchestrator = member(&test, 21, NodeRole::Orchestrator, &[]).await;
    let other = outcome(&test, &limited, offer("llama3.2-3b", "llama3.2:3b")).await;
    assert_eq!(other, Some(ErrorCode::ModelNotAllowed));
    for client in [&orchestrator, &test.client, &test.stranger] {
        let refused = outcome(&test, client, offer("qwen3-8b", "Qwen/Qwen3-8B")).await;
        assert_eq!(refused, Some(ErrorCode::NotEnrolled));
    }
    assert_eq!(outcome(&test, &limited, offer("qwen3-8b", "Qwen/Qwen3-8B")).await, None);
}

#[tokio::test]
async fn offers_are_bounded_in_length_and_number() {
    let test = test().await;
    let worker = member(&test, 20, NodeRole::Worker, &[]).await;
    let long = "x".repeat(SERVED_AS_BYTES_MAX + 1);
    for served_as in ["", &long] {
        assert_eq!(outcome(&test, &worker, offer("m", served_as)).await, Some(ErrorCode::InvalidValue));
    }
    for number in 0..catalog::OFFERED_MAX {
        let offer = offer(&format!("m-{number}"), "m");
        catalog::offer(&*test.store, offer, &mut 0, UnixMillis(1)).await.expect("there is room");
    }
    assert_eq!(outcome(&test, &worker, offer("one-more", "m")).await, Some(ErrorCode::InvalidValue));
    assert_eq!(outcome(&test, &worker, offer("m-0", "m")).await, None);
}

#[tokio::test]
async fn one_worker_leaves_the_others_their_offers() {
    let test = test().await;
    let greedy = member(&test, 20, NodeRole::Worker, &[]).await;
    for number in 0..catalog::OFFERED_PER_WORKER_MAX {
        assert_eq!(outcome(&test, &greedy, offer(&format!("m-{number}"), "m")).await, None);
    }
    assert_eq!(outcome(&test, &greedy, offer("one-more", "m")).await, Some(ErrorCode::InvalidValue));
    assert_eq!(outcome(&test, &greedy, offer("m-0", "m")).await, None, "known ones are no news");
    let other = member(&test, 21, NodeRole::Worker, &[]).await;
    assert_eq!(outcome(&test, &other, offer("one-more", "m")).await, None);
}
