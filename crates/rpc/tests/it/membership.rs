//! Nodes that show each other certificates.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use protocol::control::{
    CERTIFICATE_RENEW, Empty, Enrolled, Hello, NODE_HELLO, NodeInfo, NodeRole, POOL_STATE, PoolState, PoolStateRequest,
};
use protocol::membership::transcript::VERSIONS;
use protocol::membership::{
    Certificate, Exclusion, RevocationList, RevocationStamp, Versions, certificate, revocation,
};
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock, ErrorCode, PublicKey, Topic, UnixMillis, WireError, codec};
use tether_rpc::transport::Connection;
use tether_rpc::{
    CallError, Client, Directory, Enrolment, Membership, MembershipTask, MemoryNetwork, Server, ServerLimits,
    StreamCall, Transport,
};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::options;

const SECOND: Duration = Duration::from_secs(1);
const LIFE: Duration = Duration::from_hours(1);

/// A time of day that goes with Tokio's clock.
pub(crate) struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_700_000_000_000).after(self.0.elapsed())
    }
}

/// A pool, its root, and a network its nodes are on.
pub(crate) struct Pool {
    root: NodeKey,
    clock: Arc<dyn Clock>,
    pub(crate) network: MemoryNetwork,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    serial: Mutex<u64>,
}

/// A node of it.
pub(crate) struct Node {
    pub(crate) key: PublicKey,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) membership: Membership,
    pub(crate) client: Client,
}

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

fn region(name: &str) -> protocol::Region {
    name.parse().expect("region")
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self {
            root: key(100),
            clock: Arc::new(PausedClock(Instant::now())),
            network: MemoryNetwork::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            serial: Mutex::new(0),
        }
    }

    /// Returns the pool's root key.
    pub(crate) fn root(&self) -> &NodeKey {
        &self.root
    }

    pub(crate) fn key(&self) -> PublicKey {
        self.root.public_key()
    }

    pub(crate) fn certificate(&self, seed: u8, roles: &[NodeRole]) -> Certificate {
        let mut serial = self.serial.lock();
        *serial += 1;
        let now = self.clock.now();
        Certificate {
            v: certificate::VERSION,
            serial: *serial,
            pool: self.root.public_key(),
            public_key: key(seed).public_key(),
            roles: roles.to_vec(),
            regions: vec![],
            models: vec![],
            not_before: now,
            not_after: now.after(LIFE),
        }
    }

    pub(crate) fn join(&self, seed: u8, roles: &[NodeRole]) -> Node {
        self.join_with(seed, &self.certificate(seed, roles))
    }

    pub(crate) fn join_with(&self, seed: u8, certificate: &Certificate) -> Node {
        self.join_speaking(seed, certificate, VERSIONS)
    }

    pub(crate) fn join_speaking(&self, seed: u8, certificate: &Certificate, versions: Versions) -> Node {
        let (pool, key) = (self.root.public_key(), key(seed));
        let transport = self.network.node(&key);
        let signed = certificate.sign(&self.root);
        let membership = Membership::new(pool, key.public_key(), signed, self.clock.clone()).expect("a good one");
        let membership = membership.speaking(versions);
        let client = Client::new(transport.clone()).with_membership(membership.clone());
        Node { key: key.public_key(), transport, membership, client }
    }

    /// Returns an end of the network for a node without a certificate.
    pub(crate) fn node(&self, seed: u8) -> Arc<dyn Transport> {
        self.network.node(&key(seed))
    }

    fn stamp(&self, version: u64) -> Signed {
        let (v, pool, issued_at) = (revocation::VERSION, self.root.public_key(), self.clock.now());
        RevocationStamp { v, pool, version, issued_at }.sign(&self.root)
    }

    fn list(&self, version: u64, nodes: &[PublicKey]) -> Signed {
        let keys = nodes.iter().copied().collect();
        RevocationList { version, keys, ..RevocationList::empty(self.root.public_key()) }.sign(&self.root)
    }

    /// Serves "whoami", which says why the caller may not be a worker in `local`.
    pub(crate) fn serve(&self, node: &Node, role: NodeRole, build: impl FnOnce(Server) -> Server) {
        let info = NodeInfo { roles: vec![role], region: region("local"), version: "0".into() };
        let membership = node.membership.clone();
        let server = Server::new(node.transport.clone(), info)
            .membership(node.membership.clone())
            .unary("whoami", move |caller, _: Empty| {
                let admitted = membership.check_role(caller.key, NodeRole::Worker, Some(&region("local")));
                async move { admitted.map(|()| Empty {}).map_err(WireError::from) }
            })
            .stream("hang", |call: StreamCall| async move {
                if let Ok(mut reply) = call.accept().await {
                    reply.cancelled().await;
                }
            });
        self.tasks.spawn(build(server).run(self.stop.clone(), SECOND));
    }
}

async fn whoami(client: &Client, peer: PublicKey) -> Result<Empty, CallError> {
    client.call(peer, "whoami", &Empty {}, SECOND).await
}

fn code(outcome: &Result<Empty, CallError>) -> Option<ErrorCode> {
    match outcome {
        Err(CallError::Remote(error)) => Some(error.code),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_call_finds_its_caller_introduced() {
    let pool = Pool::new();
    let (server, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    pool.serve(&server, NodeRole::Registry, |server| server);
    assert_eq!(whoami(&worker.client, server.key).await, Ok(Empty {}));
    assert_eq!(server.membership.standing(worker.key).map(|own| own.map(|own| own.serial)), Ok(Some(2)));
    // And the other way round.
    worker.client.meet(server.key, SECOND).await.expect("met");
    assert!(worker.membership.has_role(server.key, NodeRole::Registry));
    assert!(!worker.membership.has_role(server.key, NodeRole::Worker));
}

/// Opens a connection for each of these strangers, and uses none of them.
async fn idle_strangers(
    pool: &Pool,
    server: &Node,
    seeds: std::ops::Range<u8>,
) -> Vec<(Arc<dyn Transport>, Arc<dyn Connection>)> {
    let mut strangers = vec![];
    for seed in seeds {
        let transport = pool.node(seed);
        let connection = transport.connect(server.key).await.expect("connected");
        strangers.push((transport, connection));
        time::sleep(SECOND / 100).await;
    }
    strangers
}

#[tokio::test(start_paused = true)]
async fn idle_strangers_keep_no_member_out() {
    let pool = Pool::new();
    let (server, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    let limits = ServerLimits { connections_max: 8, strangers_connections_max: 8, ..ServerLimits::default() };
    pool.serve(&server, NodeRole::Registry, |server| server.limits(limits));
    let strangers = idle_strangers(&pool, &server, 10..18).await;
    assert_eq!(whoami(&worker.client, server.key).await, Ok(Empty {}));
    let closed: Vec<bool> = strangers.iter().map(|(_, connection)| connection.is_closed()).collect();
    assert_eq!(closed, [true, false, false, false, false, false, false, false], "the oldest gave way");
}

#[tokio::test(start_paused = true)]
async fn a_member_that_has_shown_its_certificate_gives_way_to_no_stranger() {
    let pool = Pool::new();
    let certificate = pool.certificate(2, &[NodeRole::Worker]);
    let (server, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join_with(2, &certificate));
    let limits = ServerLimits { connections_max: 8, strangers_connections_max: 4, ..ServerLimits::default() };
    pool.serve(&server, NodeRole::Registry, |server| server.limits(limits));
    let hello = Hello { certificate: Some(certificate.sign(&pool.root)), transcript: None };
    let stranger = pool.node(3);
    let member = worker.transport.connect(server.key).await.expect("connected");
    let unproven = stranger.connect(server.key).await.expect("connected");
    member.request(NODE_HELLO, codec::encode(&hello).into()).await.expect("a valid certificate");
    let none = Hello::default();
    unproven.request(NODE_HELLO, codec::encode(&none).into()).await.expect("an introduction without a certificate");
    let strangers = idle_strangers(&pool, &server, 10..18).await;
    assert!(!member.is_closed() && unproven.is_closed());
    assert_eq!(strangers.iter().filter(|(_, connection)| !connection.is_closed()).count(), 4);
    // Strangers are closed soon, members after five minutes.
    time::sleep(SECOND * 21).await;
    assert!(!member.is_closed() && strangers.iter().all(|(_, connection)| connection.is_closed()));
}

#[tokio::test(start_paused = true)]
async fn many_first_calls_at_once_all_find_their_caller_introduced() {
    let pool = Pool::new();
    let (server, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    pool.serve(&server, NodeRole::Registry, |server| server);
    let calls = (0..100).map(|_| whoami(&worker.client, server.key));
    let outcomes = futures_util::future::join_all(calls).await;
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn strangers_and_borrowed_or_foreign_certificates_are_not_admitted() {
    let pool = Pool::new();
    let server = pool.join(1, &[NodeRole::Registry]);
    pool.serve(&server, NodeRole::Registry, |server| server);
    let stranger = Client::new(pool.network.node(&key(3)));
    assert_eq!(code(&whoami(&stranger, server.key).await), Some(ErrorCode::NotEnrolled));
    // A pool of one's own proves nothing to another.
    let other = Pool { root: key(101), network: pool.network.clone(), ..Pool::new() };
    let foreign = other.join(4, &[NodeRole::Worker]);
    assert_eq!(code(&whoami(&foreign.client, server.key).await), Some(ErrorCode::NotEnrolled));
    // Neither does the certificate of another key, shown under one's own.
    let certificate = Some(pool.certificate(5, &[NodeRole::Worker]).sign(&pool.root));
    let hello = Hello { certificate, transcript: None };
    assert!(server.membership.meet_caller(key(6).public_key(), &[0; 32], &hello).is_err());
    assert_eq!(server.membership.standing(key(6).public_key()), Err(Exclusion::NotEnrolled));
}

#[tokio::test(start_paused = true)]
async fn who_goes_on_showing_false_certificates_is_cut_off() {
    let pool = Pool::new();
    let server = pool.join(1, &[NodeRole::Registry]);
    pool.serve(&server, NodeRole::Registry, |server| server);
    let stranger = pool.network.node(&key(3));
    let connection = stranger.connect(server.key).await.expect("connected");
    let forged = Signed { signature: "0".repeat(128), ..pool.certificate(3, &[NodeRole::Worker]).sign(&pool.root) };
    let body = codec::encode(&Hello { certificate: Some(forged), transcript: None });
    let mut refused = 0;
    while connection.request(NODE_HELLO, body.clone().into()).await == Err(refusal()) {
        refused += 1;
    }
    assert_eq!(refused, 16);
    assert!(connection.is_closed());
}

fn refusal() -> tether_rpc::transport::RequestError {
    WireError::from(protocol::membership::CertificateError::BadSignature).into()
}

#[tokio::test(start_paused = true)]
async fn a_certificate_admits_to_its_role_and_region_only() {
    let pool = Pool::new();
    let server = pool.join(1, &[NodeRole::Registry]);
    pool.serve(&server, NodeRole::Registry, |server| server);
    let gateway = pool.join(2, &[NodeRole::Gateway]);
    let refused = whoami(&gateway.client, server.key).await.expect_err("not a worker");
    assert!(refused.to_string().contains("another role"), "{refused}");
    let elsewhere = Certificate { regions: vec![region("mars")], ..pool.certificate(3, &[NodeRole::Worker]) };
    let refused = whoami(&pool.join_with(3, &elsewhere).client, server.key).await.expect_err("not here");
    assert!(refused.to_string().contains("other regions"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_ended_admits_no_more_and_a_new_one_is_shown_unasked() {
    let pool = Pool::new();
    let server = pool.join_with(
        1,
        &Certificate { not_after: pool.clock.now().after(LIFE * 3), ..pool.certificate(1, &[NodeRole::Registry]) },
    );
    pool.serve(&server, NodeRole::Registry, |server| server);
    let worker = pool.join(2, &[NodeRole::Worker]);
    whoami(&worker.client, server.key).await.expect("admitted");
    time::sleep(LIFE).await;
    assert_eq!(server.membership.standing(worker.key), Err(Exclusion::Ended));
    worker.membership.renew(pool.certificate(2, &[NodeRole::Worker]).sign(&pool.root)).expect("a good one");
    whoami(&worker.client, server.key).await.expect("admitted");
}

#[tokio::test(start_paused = true)]
async fn an_older_certificate_does_not_replace_a_newer_one() {
    let pool = Pool::new();
    let server = pool.join(1, &[NodeRole::Registry]);
    let older = pool.certificate(2, &[NodeRole::Worker, NodeRole::Orchestrator]).sign(&pool.root);
    let newer = pool.certificate(2, &[NodeRole::Worker]).sign(&pool.root);
    let node = key(2).public_key();
    for signed in [newer, older] {
        let hello = Hello { certificate: Some(signed), transcript: None };
        server.membership.meet_caller(node, &[0; 32], &hello).expect("both are good");
    }
    assert!(!server.membership.has_role(node, NodeRole::Orchestrator));
}

#[tokio::test(start_paused = true)]
async fn who_was_revoked_is_cut_off_at_once_and_told_why() {
    let pool = Pool::new();
    let (server, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    pool.serve(&server, NodeRole::Registry, |server| server);
    let mut stream = worker.client.open_stream(server.key, "hang", "{}".into(), options()).await.expect("accepted");
    assert_eq!(server.membership.take_revocations(&pool.list(1, &[worker.key])), Ok(true));
    assert_eq!(stream.next().await, Some(Err(CallError::Closed)));
    assert_eq!(code(&whoami(&worker.client, server.key).await), Some(ErrorCode::NodeRevoked));
    // An older list does not bring it back, and neither does its certificate.
    assert_eq!(server.membership.take_revocations(&pool.list(1, &[])), Ok(false));
    assert_eq!(code(&whoami(&worker.client, server.key).await), Some(ErrorCode::NodeRevoked));
    // Nor is it called any more.
    pool.serve(&worker, NodeRole::Worker, |server| server);
    assert_eq!(whoami(&server.client, worker.key).await, Err(CallError::Unreachable { peer: worker.key }));
}

#[tokio::test(start_paused = true)]
async fn a_caller_cuts_what_goes_on_with_a_revoked_peer() {
    let pool = Pool::new();
    let (caller, worker) = (pool.join(1, &[NodeRole::Orchestrator]), pool.join(2, &[NodeRole::Worker]));
    pool.serve(&worker, NodeRole::Worker, |server| server);
    let mut stream = caller.client.open_stream(worker.key, "hang", "{}".into(), options()).await.expect("accepted");
    caller.membership.take_revocations(&pool.list(1, &[worker.key])).expect("a good list");
    caller.client.disconnect_revoked();
    assert_eq!(stream.next().await, Some(Err(CallError::Closed)));
}

#[tokio::test(start_paused = true)]
async fn a_directory_lists_only_what_a_peer_is_certified_for() {
    let pool = Pool::new();
    let topic = Topic::Control(region("local"));
    let (honest, liar) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    for node in [&honest, &liar] {
        pool.serve(node, NodeRole::Registry, |server| server);
        node.transport.announce(&topic).await.expect("announced");
    }
    // A stranger that runs the same program without a certificate.
    let stranger = pool.network.node(&key(3));
    let info = NodeInfo { roles: vec![NodeRole::Registry], region: region("local"), version: "0".into() };
    pool.tasks.spawn(Server::new(stranger.clone(), info).run(pool.stop.clone(), SECOND));
    stranger.announce(&topic).await.expect("announced");

    let node = pool.join(4, &[NodeRole::Gateway]);
    let (directory, task) = Directory::new(node.transport.clone(), node.client.clone(), topic);
    pool.tasks.spawn(task.run(pool.stop.clone()));
    assert!(directory.wait_for(NodeRole::Registry, SECOND).await);
    time::sleep(SECOND * 5).await;
    assert_eq!(directory.find(NodeRole::Registry), [honest.key]);
    node.membership.take_revocations(&pool.list(1, &[honest.key])).expect("a good list");
    assert_eq!(directory.find(NodeRole::Registry), []);
}

/// A registry that tells this list and gives this certificate.
struct FakeRegistry {
    list: Arc<Mutex<Signed>>,
    /// The stamp that it repeats, if it is frozen.
    frozen: Arc<Mutex<Option<Signed>>>,
    polls: Arc<Mutex<u64>>,
}

fn registry(pool: &Arc<Pool>, node: &Node) -> FakeRegistry {
    let list = Arc::new(Mutex::new(pool.list(0, &[])));
    let fake = FakeRegistry { list, frozen: Arc::default(), polls: Arc::default() };
    let (list, polls, root) = (fake.list.clone(), fake.polls.clone(), pool.root.public_key());
    let (frozen, renewing, stamping) = (fake.frozen.clone(), pool.clone(), pool.clone());
    pool.serve(node, NodeRole::Registry, |server| {
        server
            .unary(POOL_STATE, move |_, request: PoolStateRequest| {
                *polls.lock() += 1;
                let list = list.lock().clone();
                let version = RevocationList::verify(&list, root).expect("a good list").version;
                let revocations = (version != request.version).then_some(list);
                let stamp = frozen.lock().clone().or_else(|| Some(stamping.stamp(version)));
                async move { Ok(PoolState { version, revocations, stamp }) }
            })
            .unary(CERTIFICATE_RENEW, move |caller, _: Empty| {
                assert_eq!(caller.key, key(2).public_key());
                let certificate = renewing.certificate(2, &[NodeRole::Worker]).sign(&renewing.root);
                let revocations = renewing.list(0, &[]);
                async move { Ok(Enrolled { certificate, revocations }) }
            })
    });
    fake
}

#[tokio::test(start_paused = true)]
async fn a_revocation_is_known_within_five_seconds_and_outlives_the_registry() {
    let pool = Arc::new(Pool::new());
    let topic = Topic::Control(region("local"));
    let (keeper, worker) = (pool.join(1, &[NodeRole::Registry]), pool.join(2, &[NodeRole::Worker]));
    let fake = registry(&pool, &keeper);
    keeper.transport.announce(&topic).await.expect("announced");
    let (directory, task) = Directory::new(worker.transport.clone(), worker.client.clone(), topic);
    pool.tasks.spawn(task.run(pool.stop.clone()));
    pool.tasks.spawn(MembershipTask::new(worker.client.clone(), directory).run(pool.stop.clone()));
    time::sleep(SECOND * 10).await;
    assert!(worker.membership.is_member(keeper.key));

    let expelled = key(9).public_key();
    *fake.list.lock() = pool.list(5, &[expelled]);
    let begun = Instant::now();
    worker.membership.until_revoked(expelled).await;
    assert!(begun.elapsed() <= SECOND * 5, "{:?}", begun.elapsed());
    assert_eq!(worker.membership.version(), 5);

    pool.network.cut(keeper.key);
    time::sleep(SECOND * 60).await;
    assert!(worker.membership.is_revoked(expelled) && worker.membership.is_member(worker.key));
}

#[tokio::test(start_paused = true)]
async fn a_frozen_registry_keeps_no_revocation_from_a_node_and_counts_as_silent() {
    let pool = Arc::new(Pool::new());
    let topic = Topic::Control(region("local"));
    let (frozen, honest) = (pool.join(1, &[NodeRole::Registry]), pool.join(3, &[NodeRole::Registry]));
    let worker = pool.join(2, &[NodeRole::Worker]);
    let (fake, other) = (registry(&pool, &frozen), registry(&pool, &honest));
    frozen.transport.announce(&topic).await.expect("announced");
    let (directory, task) = Directory::new(worker.transport.clone(), worker.client.clone(), topic.clone());
    pool.tasks.spawn(task.run(pool.stop.clone()));
    pool.tasks.spawn(MembershipTask::new(worker.client.clone(), directory).run(pool.stop.clone()));
    time::sleep(SECOND * 10).await;
    assert!(!worker.membership.is_registry_away());

    // From now on it repeats what it said. No other registry is announced yet.
    *fake.frozen.lock() = Some(pool.stamp(0));
    time::sleep(SECOND * 600).await;
    assert!(worker.membership.registry_silence() >= SECOND * 590, "{:?}", worker.membership.registry_silence());

    // It was asked first so far, and it is still found.
    honest.transport.announce(&topic).await.expect("announced");
    let expelled = key(9).public_key();
    *other.list.lock() = pool.list(5, &[expelled]);
    time::timeout(SECOND * 60, worker.membership.until_revoked(expelled)).await.expect("known from the other");
    assert!(!worker.membership.is_registry_away());
    // A registry without stamps, or with those of another, confirms nothing.
    *fake.frozen.lock() = Some(RevocationList::empty(pool.root.public_key()).sign(&pool.root));
    pool.network.cut(honest.key);
    time::sleep(SECOND * 60).await;
    assert!(worker.membership.is_registry_away());
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_at_half_of_its_life_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nodes/worker.enrolment.json");
    let pool = Arc::new(Pool::new());
    let keeper = pool.join_with(
        1,
        &Certificate { not_after: pool.clock.now().after(LIFE * 10), ..pool.certificate(1, &[NodeRole::Registry]) },
    );
    registry(&pool, &keeper);
    let first = pool.certificate(2, &[NodeRole::Worker]);
    // No topic is looked up: the registry is the one the node joined by.
    let enrolment = Enrolment {
        pool: pool.root.public_key(),
        registry: keeper.key,
        bootstrap: vec!["127.0.0.1:49737".into()],
        certificate: first.sign(&pool.root),
        revocations: pool.list(0, &[]),
    };
    enrolment.save(&path).expect("saved");
    let loaded = Enrolment::load(&path).expect("readable").expect("there");
    assert_eq!(loaded, enrolment);
    let transport = pool.network.node(&key(2));
    let own_key = key(2).public_key();
    let membership = loaded.membership(&path, own_key, pool.clock.clone()).expect("a good one");
    let client = Client::new(transport.clone()).with_membership(membership.clone());
    let (directory, _task) = Directory::new(transport, client.clone(), Topic::Control(region("local")));
    pool.tasks.spawn(MembershipTask::new(client, directory).run(pool.stop.clone()));

    time::sleep(Duration::from_secs(30 * 60 - 5)).await;
    assert_eq!(membership.own().expect("a member").serial, first.serial);
    time::sleep(SECOND * 10).await;
    let renewed = membership.own().expect("a member");
    assert!(renewed.serial > first.serial && renewed.not_after > first.not_after);
    time::sleep(LIFE * 3).await;
    assert!(membership.is_member(own_key), "renewed again and again");
    let kept = Enrolment::load(&path).expect("readable").expect("there");
    assert_ne!(kept.certificate, enrolment.certificate);
    assert_eq!(kept.bootstrap, enrolment.bootstrap);
    assert_eq!(Enrolment::load(&folder.path().join("none")).expect("readable"), None);
}

#[tokio::test(start_paused = true)]
async fn a_members_calls_count_as_a_members_whatever_it_may_send() {
    let pool = Pool::new();
    let (server, worker) = (pool.join(1, &[NodeRole::Worker]), pool.join(2, &[NodeRole::Worker]));
    let limits = ServerLimits { strangers_calls_max: 1, strangers_body_bytes_max: 1, ..ServerLimits::default() };
    pool.serve(&server, NodeRole::Worker, |server| server.limits(limits).body_limit(|_| 1000));
    let mut held = vec![];
    for _ in 0..3 {
        let body = codec::encode(&Empty {}).into();
        held.push(worker.client.open_stream(server.key, "hang", body, options()).await.expect("a member's"));
    }
    let stranger = Client::new(pool.node(3));
    let refused = stranger.open_stream(server.key, "hang", codec::encode(&Empty {}).into(), options()).await;
    assert!(matches!(refused, Err(CallError::Remote(error)) if error.code == ErrorCode::Unavailable));
}
