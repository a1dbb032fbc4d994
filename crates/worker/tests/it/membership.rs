//! Whose jobs a worker takes, and whom it tells how it is.

use std::sync::Arc;

use bytes::Bytes;
use engine::MockOptions;
use parking_lot::Mutex;
use protocol::control::{
    Empty, NodeInfo, NodeRole, POOL_STATE, PRESENCE_DESCRIBE, PRESENCE_REPORT, PoolState, PoolStateRequest,
};
use protocol::infer::START;
use protocol::membership::{Certificate, RevocationList, RevocationStamp, certificate, revocation};
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock as _, ErrorCode, PublicKey, Topic, codec};
use rpc::{CallError, Client, Membership, ResponseStream, Server, StreamOptions};
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, World, config, next, read, region, request, slow};

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

fn root() -> NodeKey {
    key(100)
}

fn certified(world: &World, seed: u8, role: NodeRole) -> Certificate {
    let now = world.clock.now();
    Certificate {
        v: certificate::VERSION,
        serial: 1,
        pool: root().public_key(),
        public_key: key(seed).public_key(),
        roles: vec![role],
        regions: vec![],
        models: vec![],
        not_before: now,
        not_after: now.after(SECOND * 3600),
    }
}

fn member(world: &World, certificate: &Certificate) -> Membership {
    let (pool, signed) = (root().public_key(), certificate.sign(&root()));
    Membership::new(pool, certificate.public_key, signed, world.clock.clone()).expect("good")
}

/// A client of another node that has this certificate.
fn client(scene: &Scene, seed: u8, certificate: &Certificate) -> Client {
    Client::new(scene.world.network.node(&key(seed))).with_membership(member(&scene.world, certificate))
}

async fn admitted_scene(mock: MockOptions) -> Scene {
    let as_worker = |world: &World| member(world, &certified(world, 1, NodeRole::Worker));
    let scene = Scene::build(config(), mock, |_| {}, |runtime| runtime, as_worker).await;
    scene.handle.ready().await.expect("the model loads");
    scene
}

async fn open(scene: &Scene, client: &Client) -> Result<ResponseStream, CallError> {
    let options = StreamOptions { accept_within: SECOND / 2, deadline: None, stall: SECOND * 60 };
    client.open_stream(scene.handle.worker_id(), START, Bytes::from(codec::encode(&request())), options).await
}

async fn refusal(scene: &Scene, client: &Client) -> ErrorCode {
    match open(scene, client).await {
        Err(CallError::Remote(error)) => error.code,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn work_is_taken_from_certified_orchestrators_only() {
    let scene = admitted_scene(MockOptions::default()).await;
    let certificate = |seed, role| certified(&scene.world, seed, role);
    assert_eq!(scene.refusal(&request()).await.code, ErrorCode::NotEnrolled, "a stranger");
    let worker = client(&scene, 10, &certificate(10, NodeRole::Worker));
    assert_eq!(refusal(&scene, &worker).await, ErrorCode::NotEnrolled, "another role");
    let mars = vec!["mars".parse().expect("region")];
    let elsewhere = Certificate { regions: mars, ..certificate(11, NodeRole::Orchestrator) };
    assert_eq!(refusal(&scene, &client(&scene, 11, &elsewhere)).await, ErrorCode::NotEnrolled, "another region");
    let good = client(&scene, 12, &certificate(12, NodeRole::Orchestrator));
    let (_, error) = read(open(&scene, &good).await.expect("accepted")).await;
    assert_eq!(error, None);
}

#[tokio::test(start_paused = true)]
async fn a_stranger_that_calls_itself_an_orchestrator_is_told_nothing() {
    let scene = admitted_scene(MockOptions::default()).await;
    time::sleep(SECOND * 20).await;
    assert_eq!(scene.orchestrator.received().len(), 0, "it announces on the control topic, and has no certificate");
    let id = scene.handle.worker_id();
    let asked = scene.orchestrator.client.call::<_, Signed>(id, PRESENCE_DESCRIBE, &Empty {}, SECOND).await;
    assert!(matches!(asked, Err(CallError::Remote(error)) if error.code == ErrorCode::NotEnrolled));
}

/// Adds a registry that tells this list, and an orchestrator that takes reports, both certified.
async fn peers(scene: &Scene, list: &Arc<Mutex<Signed>>) -> Client {
    let world = &scene.world;
    let info = |role| NodeInfo { roles: vec![role], region: region(), version: "0".into() };
    let (registry, orchestrator) = (world.network.node(&key(20)), world.network.node(&key(21)));
    let (shared, clock) = (list.clone(), world.clock.clone());
    let server = Server::new(registry.clone(), info(NodeRole::Registry))
        .membership(member(world, &certified(world, 20, NodeRole::Registry)))
        .unary(POOL_STATE, move |_, request: PoolStateRequest| {
            let list = shared.lock().clone();
            let version = RevocationList::verify(&list, root().public_key()).expect("good").version;
            let (v, pool, issued_at) = (revocation::VERSION, root().public_key(), clock.now());
            let stamp = Some(RevocationStamp { v, pool, version, issued_at }.sign(&root()));
            async move { Ok(PoolState { version, revocations: (version != request.version).then_some(list), stamp }) }
        });
    world.tasks.spawn(server.run(world.end.clone(), SECOND));
    let membership = member(world, &certified(world, 21, NodeRole::Orchestrator));
    let server = Server::new(orchestrator.clone(), info(NodeRole::Orchestrator))
        .membership(membership.clone())
        .unary(PRESENCE_REPORT, |_, _: Signed| async { Ok(Empty {}) });
    world.tasks.spawn(server.run(world.end.clone(), SECOND));
    for node in [&registry, &orchestrator] {
        node.announce(&Topic::Control(region())).await.expect("announced");
    }
    Client::new(orchestrator).with_membership(membership)
}

fn list(version: u64, keys: &[PublicKey]) -> Signed {
    let keys = keys.iter().copied().collect();
    RevocationList { version, keys, ..RevocationList::empty(root().public_key()) }.sign(&root())
}

#[tokio::test(start_paused = true)]
async fn a_revoked_orchestrators_jobs_are_cut_off_and_refused_within_five_seconds() {
    let scene = admitted_scene(slow()).await;
    let shared = Arc::new(Mutex::new(list(0, &[])));
    let orchestrator = peers(&scene, &shared).await;
    time::sleep(SECOND * 5).await;
    let mut stream = open(&scene, &orchestrator).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    *shared.lock() = list(1, &[key(21).public_key()]);
    let begun = Instant::now();
    let (_, error) = read(stream).await;
    assert_eq!(error, Some(CallError::Closed));
    assert!(begun.elapsed() <= SECOND * 5, "{:?}", begun.elapsed());
    assert_eq!(refusal(&scene, &orchestrator).await, ErrorCode::NodeRevoked);
    time::sleep(SECOND).await;
    assert!(scene.metric("tether_worker_requests_running").abs() < f64::EPSILON, "its job has ended");
}

#[tokio::test(start_paused = true)]
async fn while_the_registry_is_away_who_is_known_works_on() {
    let scene = admitted_scene(MockOptions::default()).await;
    let orchestrator = peers(&scene, &Arc::new(Mutex::new(list(0, &[])))).await;
    time::sleep(SECOND * 5).await;
    scene.world.network.cut(key(20).public_key());
    time::sleep(SECOND * 600).await;
    let (_, error) = read(open(&scene, &orchestrator).await.expect("accepted")).await;
    assert_eq!(error, None);
}
