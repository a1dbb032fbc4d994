//! Crowds of keys on a topic.

use std::sync::Arc;
use std::time::Duration;

use protocol::Topic;
use protocol::control::NodeRole;
use protocol::signature::NodeKey;
use tether_rpc::{Directory, Transport};

use crate::membership::Pool;

const SECOND: Duration = Duration::from_secs(1);

fn topic() -> Topic {
    Topic::Control("local".parse().expect("region"))
}

/// Returns the seed of the node whose public key comes last.
fn last_seed() -> u8 {
    (0..u8::MAX).max_by_key(|seed| NodeKey::from_seed(&[*seed; 32]).public_key()).expect("a seed")
}

/// Announces nodes that have no certificate and do not respond.
async fn crowd(pool: &Pool, count: u16) -> Vec<Arc<dyn Transport>> {
    let mut crowd = vec![];
    for number in 0..count {
        let mut seed = [77; 32];
        seed[..2].copy_from_slice(&number.to_le_bytes());
        let node = pool.network.node(&NodeKey::from_seed(&seed));
        node.announce(&topic()).await.expect("announced");
        crowd.push(node);
    }
    crowd
}

/// Checks that a new node finds an orchestrator within five seconds, although its key comes last.
async fn assert_found(pool: &Pool) {
    let orchestrator = pool.join(last_seed(), &[NodeRole::Orchestrator]);
    pool.serve(&orchestrator, NodeRole::Orchestrator, |server| server);
    orchestrator.transport.announce(&topic()).await.expect("announced");
    let node = pool.join(last_seed() ^ 1, &[NodeRole::Gateway]);
    let (directory, task) = Directory::new(node.transport.clone(), node.client.clone(), topic());
    pool.tasks.spawn(task.run(pool.stop.clone()));
    assert!(directory.wait_for(NodeRole::Orchestrator, SECOND * 5).await);
    assert_eq!(directory.find(NodeRole::Orchestrator), [orchestrator.key]);
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_is_found_among_200_silent_nodes() {
    let pool = Pool::new();
    let _crowd = crowd(&pool, 200).await;
    assert_found(&pool).await;
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_is_found_among_10_000_keys_that_nobody_serves() {
    let pool = Pool::new();
    drop(crowd(&pool, 10_000).await);
    assert_found(&pool).await;
}
