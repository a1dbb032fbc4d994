//! Nodes that speak different versions of the protocol.

use std::time::Duration;

use protocol::control::{Empty, Hello, NODE_HELLO, NodeRole};
use protocol::membership::transcript::{Ends, VERSIONS};
use protocol::membership::{Exclusion, Transcript, Versions};
use protocol::{ErrorCode, codec};
use tether_rpc::CallError;
use tether_rpc::transport::{Incoming, RequestError};

use crate::membership::{Node, Pool};

const SECOND: Duration = Duration::from_secs(1);
/// The version before this one, whose introductions have no transcript.
const BEFORE: Versions = Versions { oldest: VERSIONS.oldest - 1, newest: VERSIONS.newest - 1 };
const NEXT: Versions = Versions { oldest: VERSIONS.oldest + 1, newest: VERSIONS.newest + 1 };
const AFTER_NEXT: Versions = Versions { oldest: VERSIONS.oldest + 2, newest: VERSIONS.newest + 2 };

fn join(pool: &Pool, seed: u8, role: NodeRole, versions: Versions) -> Node {
    pool.join_speaking(seed, &pool.certificate(seed, &[role]), versions)
}

/// Returns the outcome of a member's call, when the two nodes have met.
async fn call(pool: &Pool, caller: Versions, callee: Versions) -> (Node, Node, Result<Empty, CallError>) {
    let server = join(pool, 1, NodeRole::Registry, callee);
    pool.serve(&server, NodeRole::Registry, |server| server);
    let worker = join(pool, 2, NodeRole::Worker, caller);
    worker.client.meet(server.key, SECOND).await.expect("met");
    let outcome = worker.client.call(server.key, "whoami", &Empty {}, SECOND).await;
    (server, worker, outcome)
}

#[tokio::test(start_paused = true)]
async fn a_version_works_with_the_one_before_in_both_directions() {
    for (caller, callee) in
        [(VERSIONS, VERSIONS), (BEFORE, VERSIONS), (VERSIONS, BEFORE), (NEXT, VERSIONS), (VERSIONS, NEXT)]
    {
        let (server, worker, outcome) = call(&Pool::new(), caller, callee).await;
        assert_eq!(outcome, Ok(Empty {}), "{caller} calls {callee}");
        assert!(worker.membership.has_role(server.key, NodeRole::Registry), "{caller} calls {callee}");
    }
}

#[tokio::test(start_paused = true)]
async fn versions_that_have_none_in_common_are_refused_and_the_node_to_update_is_named() {
    for (caller, callee, older) in [
        (BEFORE, NEXT, "calling"),
        (NEXT, BEFORE, "called"),
        (VERSIONS, AFTER_NEXT, "calling"),
        (AFTER_NEXT, VERSIONS, "called"),
    ] {
        let (server, worker, outcome) = call(&Pool::new(), caller, callee).await;
        let advice = format!("update tether on the {older} node");
        // A callee of the version before transcripts cannot refuse; the caller does not use it.
        if callee != BEFORE {
            let Err(CallError::Remote(error)) = outcome else { panic!("{caller} calls {callee}: {outcome:?}") };
            assert!(error.code == ErrorCode::NotEnrolled && error.message.contains(&advice), "{error}");
        }
        if caller != BEFORE {
            let excluded = worker.membership.standing(server.key).expect_err("not used");
            assert!(excluded.to_string().contains(&advice), "{excluded}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_introduction_is_worth_nothing_on_another_connection() {
    let pool = Pool::new();
    let server = join(&pool, 1, NodeRole::Registry, VERSIONS);
    pool.serve(&server, NodeRole::Registry, |server| server);
    let worker = join(&pool, 2, NodeRole::Worker, VERSIONS);
    let one = worker.transport.connect(server.key).await.expect("connected");
    let other = worker.transport.connect(server.key).await.expect("connected");
    let ends = Ends { secret: &one.secret(), pool: pool.key(), caller: worker.key, callee: server.key };
    let certificate = Some(pool.certificate(2, &[NodeRole::Worker]).sign(pool.root()));
    let hello = Hello { certificate, transcript: Transcript::of_caller(ends, VERSIONS) };
    let refused = other.request(NODE_HELLO, codec::encode(&hello).into()).await;
    let Err(RequestError::Remote(error)) = refused else { panic!("{refused:?}") };
    assert!(error.message.contains("made for another connection"), "{error}");
    assert_eq!(server.membership.standing(worker.key), Err(Exclusion::NotEnrolled));
    one.request(NODE_HELLO, codec::encode(&hello).into()).await.expect("on its own connection");
    assert!(server.membership.is_member(worker.key));
}

#[tokio::test(start_paused = true)]
async fn a_callee_that_changes_what_was_said_is_not_taken_for_a_member() {
    let pool = Pool::new();
    let worker = join(&pool, 2, NodeRole::Worker, VERSIONS);
    let server = join(&pool, 1, NodeRole::Registry, VERSIONS);
    let liar = server.transport.clone();
    let (worker_key, pool_key) = (worker.key, pool.key());
    let certificate = Some(pool.certificate(1, &[NodeRole::Registry]).sign(pool.root()));
    pool.tasks.spawn(async move {
        let connection = liar.accept().await.expect("a connection");
        let Some(Incoming::Request { reply, .. }) = connection.next().await else { panic!("an introduction") };
        // It claims to have heard an older version, as if the worker's words had been changed on the way.
        let ends = Ends { secret: &connection.secret(), pool: pool_key, caller: worker_key, callee: liar.public_key() };
        let older = Versions { oldest: VERSIONS.oldest, newest: VERSIONS.newest - 1 };
        let said = Transcript::of_caller(ends, older);
        let (_, transcript) = Transcript::meet_caller(ends, VERSIONS, said.as_ref()).expect("its own words");
        reply.send(Ok(codec::encode(&Hello { certificate, transcript }).into()));
        connection.next().await;
    });
    worker.client.meet(server.key, SECOND).await.expect("answered");
    assert_eq!(worker.membership.standing(server.key), Err(Exclusion::NotEnrolled));
}
