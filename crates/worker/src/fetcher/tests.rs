//! Fetches over an in-memory network, from sources that behave well and badly.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::registry::Registry;
use protocol::artifact::{ArtifactHead, FETCH};
use protocol::control::{ARTIFACT_HOLDERS, ArtifactHolders, ArtifactHoldersRequest, Catalog, NodeInfo, NodeRole};
use protocol::health::{Capacity, HealthReport};
use protocol::model::{ModelEntry, ModelKey};
use protocol::signature::NodeKey;
use protocol::{PublicKey, Region, Topic, UnixMillis, WireError, codec};
use rpc::{ArtifactServer, Membership, MemoryNetwork, Server, StreamCall};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::disk::SPARE_BYTES;
use super::*;

const SECOND: Duration = Duration::from_secs(1);

const LENGTH: u64 = 3_000_000;

fn content() -> Vec<u8> {
    (0..LENGTH).map(|number| (number >> 7) as u8).collect()
}

fn digest() -> Digest {
    Digest::of(&content())
}

fn region() -> Region {
    "local".parse().expect("a region")
}

fn key() -> ModelKey {
    ModelKey { model_id: "mine".parse().expect("a name"), version: "1.0".parse().expect("a version") }
}

fn entry(bytes: &[u8]) -> ModelEntry {
    ModelEntry {
        key: key(),
        digest: Digest::of(bytes),
        bytes: bytes.len() as u64,
        context_length: 1,
        description: String::new(),
        created_at: UnixMillis(0),
        facts: None,
        added: true,
        pin: false,
        keep_alive_secs: None,
    }
}

fn report(worker_id: PublicKey) -> HealthReport {
    HealthReport {
        v: 1,
        worker_id,
        pub_key: worker_id,
        region: region(),
        gpu_class: "cpu".into(),
        vram_gb: 0,
        accelerators: vec![],
        capacity: Capacity::default(),
        supported: vec![key()],
        to_fetch: vec![],
        adapters: vec![],
        pinned: vec![],
        model_cache: vec![],
        latency_hops: 0,
        draining: false,
        activity: protocol::health::Activity::Accepting,
        continues: true,
        epoch: 1,
        seq: 1,
        issued_at: UnixMillis(0),
        not_after: UnixMillis(0),
    }
}

/// How a node that is asked for the file behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It has the file and sends it.
    Good,
    /// It disappears after this many bytes.
    Dying(usize),
    /// It sends wrong bytes of the right length.
    False,
    /// It claims that the file is longer than listed.
    Longer,
    /// It sends more than it announced.
    Endless,
    /// It sends almost nothing.
    Slow,
    /// It is busy for this many requests.
    Busy(usize),
}

/// The offsets that a node was asked for.
type Received = Arc<Mutex<Vec<u64>>>;

/// A network with a fetcher, workers of these kinds, and a registry.
struct Scene {
    fetcher: Fetcher,
    store: ArtifactStore,
    listed: Listed,
    folder: TempDir,
    free: Arc<AtomicU64>,
    /// The requests to each worker, and then those to the registry.
    requests: Vec<Received>,
    stop: CancellationToken,
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Scene {
    async fn new(workers: &[Kind], registry: Option<Kind>) -> Self {
        Self::with(workers, registry, None).await
    }

    async fn with(workers: &[Kind], registry: Option<Kind>, most_bytes: Option<u64>) -> Self {
        let (network, tasks, stop) = (MemoryNetwork::new(), TaskTracker::new(), CancellationToken::new());
        let own = NodeKey::from_seed(&[1; 32]);
        // In the order in which the fetcher asks them.
        let mut keys: Vec<NodeKey> =
            (10..10 + workers.len() as u8).map(|seed| NodeKey::from_seed(&[seed; 32])).collect();
        keys.sort_by_key(|key| Digest::of(&[own.public_key().0, key.public_key().0, digest().0].concat()));
        let mut requests = vec![];
        for (key, kind) in keys.iter().zip(workers) {
            requests.push(source(&network, &tasks, &stop, key, NodeRole::Worker, *kind).await);
        }
        if let Some(kind) = registry {
            let key = NodeKey::from_seed(&[3; 32]);
            requests.push(source(&network, &tasks, &stop, &key, NodeRole::Registry, kind).await);
        }
        let reports: Vec<HealthReport> = keys.iter().map(|key| report(key.public_key())).collect();
        let orchestrator = network.node(&NodeKey::from_seed(&[2; 32]));
        let info = NodeInfo { roles: vec![NodeRole::Orchestrator], region: region(), version: "0".into() };
        let server = Server::new(orchestrator.clone(), info).unary(
            ARTIFACT_HOLDERS,
            move |_, request: ArtifactHoldersRequest| {
                let holding = reports.iter().filter(|report| report.has_file(&request.digest, &request.models));
                let holders = ArtifactHolders { workers: holding.map(|report| report.worker_id).collect() };
                async move { Ok(holders) }
            },
        );
        tasks.spawn(server.run(stop.clone(), SECOND));
        orchestrator.announce(&Topic::Control(region())).await.expect("announced");
        let transport = network.node(&own);
        let client = Client::new(transport.clone());
        let (directory, task) = Directory::new(transport, client.clone(), Topic::Control(region()));
        tasks.spawn(task.run(stop.clone()));
        assert!(directory.wait_for(NodeRole::Orchestrator, SECOND * 5).await);
        let folder = tempfile::tempdir().expect("a folder");
        let store = ArtifactStore::in_folder(folder.path()).expect("a store");
        let (listed, free) = (Listed::default(), Arc::new(AtomicU64::new(1 << 40)));
        listed.update(&Catalog { models: vec![entry(&content())], ..Catalog::default() });
        let free_bytes = free.clone();
        let fetcher = Fetcher::new(FetcherParts {
            use_of: CatalogUse::Fetch,
            client,
            directory,
            store: store.clone(),
            listed: listed.clone(),
            most_bytes,
            free_bytes: Arc::new(move || Some(free_bytes.load(Ordering::Relaxed))),
            metrics: Metrics::register(&mut Registry::default()),
        });
        Self { fetcher, store, listed, folder, free, requests, stop }
    }

    async fn fetch(&self) -> Result<(), FetchError> {
        self.fetcher.fetch(&digest(), &|_, _, _| {}).await
    }

    fn requests(&self, number: usize) -> Vec<u64> {
        self.requests[number].lock().clone()
    }

    fn is_here(&self) -> bool {
        // Opening verifies the digest.
        self.store.open(&digest()).is_ok()
    }

    /// Stores a file that was fetched some time ago.
    fn put_fetched(&self, byte: u8, length: usize) -> Digest {
        let bytes = vec![byte; length];
        let mut partial = self.store.partial(&Digest::of(&bytes)).expect("opened").expect("free");
        partial.append(&bytes).expect("written");
        partial.finish().expect("right");
        Digest::of(&bytes)
    }
}

/// Adds a node to the network that serves the file.
async fn source(
    network: &MemoryNetwork,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    key: &NodeKey,
    role: NodeRole,
    kind: Kind,
) -> Received {
    let transport = network.node(key);
    let info = NodeInfo { roles: vec![role], region: region(), version: "0".into() };
    let requests: Received = Arc::default();
    let noted = requests.clone();
    let server = Server::new(transport.clone(), info).stream(FETCH, move |call| {
        let wanted: ArtifactFetch = codec::decode(&call.body).expect("a request");
        let before = {
            let mut noted = noted.lock();
            noted.push(wanted.offset);
            noted.len() - 1
        };
        answer(call, wanted.offset as usize, kind, before)
    });
    tasks.spawn(server.run(stop.clone(), SECOND));
    transport.announce(&Topic::Control(region())).await.expect("announced");
    requests
}

async fn answer(call: StreamCall, offset: usize, kind: Kind, before: usize) {
    let content = content();
    match kind {
        Kind::Busy(times) if before < times => {
            return call.refuse(WireError::new(ErrorCode::Unavailable, "others are served")).await;
        }
        Kind::Good | Kind::Busy(_) => {
            let folder = tempfile::tempdir().expect("a folder");
            let store = ArtifactStore::in_folder(folder.path()).expect("a store");
            store.put(&content[..], u64::MAX).expect("put");
            let artifact_server = ArtifactServer::new(store, Membership::unchecked());
            return artifact_server.serve(call, async |_| Ok(vec!["mine".parse().expect("a name")])).await;
        }
        _ => {}
    }
    let bytes = content.len() as u64 + u64::from(kind == Kind::Longer);
    let mut reply = call.accept().await.expect("wanted");
    // The fetcher hangs up on a source that sends bad bytes.
    let _ = reply.send(&codec::encode(&ArtifactHead { bytes })).await;
    let rest = &content[offset..];
    let parts: Vec<Vec<u8>> = match kind {
        Kind::Dying(after) => rest[..after.min(rest.len())].chunks(10_000).map(<[u8]>::to_vec).collect(),
        Kind::False => rest.chunks(10_000).map(|part| vec![b'!'; part.len()]).collect(),
        _ => content.chunks(10_000).chain(content.chunks(10_000)).map(<[u8]>::to_vec).collect(),
    };
    for part in parts {
        if kind == Kind::Slow {
            time::sleep(SECOND * 15).await;
        }
        if reply.send(&part).await.is_err() {
            return;
        }
    }
    if !matches!(kind, Kind::Dying(_)) {
        let _ = reply.finish().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_file_comes_from_a_worker_that_has_it_and_else_from_the_registry() {
    let scene = Scene::new(&[Kind::Good], Some(Kind::Good)).await;
    scene.fetch().await.expect("it comes");
    assert!(scene.is_here());
    assert_eq!((scene.requests(0), scene.requests(1)), (vec![0], vec![]), "the registry is spared");
    let scene = Scene::new(&[], Some(Kind::Good)).await;
    scene.fetch().await.expect("it comes");
    assert!(scene.is_here());
    scene.fetch().await.expect("it is here");
    assert_eq!(scene.requests(0), [0], "it is not asked again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_blocks_are_written_in_their_order() {
    for _ in 0..8 {
        let scene = Scene::new(&[], Some(Kind::Good)).await;
        scene.fetch().await.expect("every block in its place");
    }
}

#[tokio::test(start_paused = true)]
async fn when_a_source_dies_another_goes_on_where_it_ended() {
    let scene = Scene::new(&[Kind::Dying(1_230_000), Kind::Good], Some(Kind::Good)).await;
    scene.fetch().await.expect("it comes");
    assert!(scene.is_here());
    assert_eq!((scene.requests(0), scene.requests(1)), (vec![0], vec![1_230_000]));
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_process_fetched_is_not_fetched_again() {
    let scene = Scene::new(&[Kind::Good], None).await;
    let mut partial = scene.store.partial(&digest()).expect("opened").expect("free");
    partial.append(&content()[..2_000_000]).expect("written");
    drop(partial);
    let noted = Mutex::new(vec![]);
    let note = |there, of, begun_with| noted.lock().push((there, of, begun_with));
    scene.fetcher.fetch(&digest(), &note).await.expect("it comes");
    assert_eq!(scene.requests(0), [2_000_000]);
    let noted = noted.into_inner();
    assert_eq!(noted.first(), Some(&(2_000_000, 3_000_000, 2_000_000)));
    assert_eq!(noted.last(), Some(&(3_000_000, 3_000_000, 2_000_000)));
}

#[tokio::test(start_paused = true)]
async fn wrong_bytes_are_dropped_and_whoever_sent_them_is_not_asked_for_a_while() {
    let scene = Scene::new(&[Kind::False, Kind::Good], None).await;
    scene.fetch().await.expect("the other is good");
    assert!(scene.is_here());
    assert_eq!((scene.requests(0), scene.requests(1)), (vec![0], vec![0]));
    assert_eq!(scene.fetcher.metrics.artifact_verify_failures.get(), 1);
    scene.store.evict(&digest()).expect("evicted");
    time::sleep(SECOND * 590).await;
    scene.fetch().await.expect("it comes");
    assert_eq!(scene.requests(0).len(), 1, "ten minutes");
    scene.store.evict(&digest()).expect("evicted");
    time::sleep(SECOND * 20).await;
    scene.fetch().await.expect("it comes");
    assert_eq!(scene.requests(0).len(), 2);
}

#[tokio::test(start_paused = true)]
async fn where_only_wrong_bytes_come_nothing_is_kept() {
    let scene = Scene::new(&[Kind::False], Some(Kind::False)).await;
    let refused = scene.fetch().await.expect_err("nobody has it");
    assert!(matches!(refused, FetchError::NoSource(_)), "{refused}");
    assert!(!scene.is_here() && scene.store.partial_bytes(&digest()) == 0);
}

#[tokio::test(start_paused = true)]
async fn a_source_whose_file_is_longer_than_listed_is_left() {
    let scene = Scene::new(&[Kind::Longer, Kind::Good], None).await;
    scene.fetch().await.expect("it comes");
    assert!(scene.is_here());
    let scene = Scene::new(&[Kind::Endless], Some(Kind::Good)).await;
    let most = AtomicU64::new(0);
    let note = |there, _, _| {
        most.fetch_max(there, Ordering::Relaxed);
    };
    scene.fetcher.fetch(&digest(), &note).await.expect("what came before the rest was right");
    assert!(scene.is_here() && most.into_inner() <= content().len() as u64);
    // It is not asked again.
    scene.store.evict(&digest()).expect("evicted");
    scene.fetch().await.expect("it comes");
    assert_eq!((scene.requests(0).len(), scene.requests(1).len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_source_that_trickles_is_left_for_another() {
    let scene = Scene::new(&[Kind::Slow, Kind::Good], None).await;
    let begun = Instant::now();
    scene.fetch().await.expect("it comes");
    assert!(scene.is_here() && begun.elapsed() < SECOND * 60, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn busy_sources_are_waited_for_and_those_that_fail_are_not() {
    let scene = Scene::new(&[], Some(Kind::Busy(20))).await;
    scene.fetch().await.expect("it comes in the end");
    assert_eq!(scene.requests(0).len(), 21);
    let scene = Scene::new(&[Kind::Dying(0)], None).await;
    let begun = Instant::now();
    let refused = scene.fetch().await.expect_err("nobody has it").to_string();
    assert!(refused.contains("could not be fetched") && begun.elapsed() < SECOND * 30, "{refused}");
    let scene = Scene::new(&[], None).await;
    let refused = scene.fetch().await.expect_err("there is nobody").to_string();
    assert!(refused.contains("no node that has it answers"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_file_without_room_is_not_asked_for_and_nothing_leaves_for_it() {
    let scene = Scene::new(&[Kind::Good], None).await;
    let old = scene.put_fetched(b'o', 1_000_000);
    scene.free.store(SPARE_BYTES + 1_999_999, Ordering::Relaxed);
    let refused = scene.fetch().await.expect_err("a byte is missing").to_string();
    assert!(refused.contains("the disk has no room"), "{refused}");
    assert!(scene.store.contains(&old) && scene.requests(0).is_empty());
    assert!(!scene.fetcher.could_take(&digest(), content().len() as u64));
}

#[tokio::test(start_paused = true)]
async fn the_least_recently_used_make_room_and_those_in_use_never() {
    let scene = Scene::with(&[Kind::Good], None, Some(5_000_000)).await;
    let [used, old, young] = [b'u', b'o', b'y'].map(|byte| scene.put_fetched(byte, 1_000_000));
    let held = scene.store.in_use(&used).expect("noted").expect("fetched");
    let own = scene.store.put(&vec![b'm'; 4_000_000][..], u64::MAX).expect("put").digest;
    // Fetched files take 3 MB of the allowed 5 MB, and the new file takes 3 MB more.
    scene.fetch().await.expect("it comes");
    assert!(!scene.store.contains(&old), "one was enough");
    assert!(scene.store.contains(&young) && scene.store.contains(&own) && scene.is_here());
    drop(held);
    let scene = Scene::with(&[Kind::Good], None, Some(3_500_000)).await;
    let used = scene.put_fetched(b'u', 1_000_000);
    let held = scene.store.in_use(&used).expect("noted");
    let idle = scene.put_fetched(b'i', 300_000);
    let refused = scene.fetch().await.expect_err("it is in use").to_string();
    assert!(refused.contains("disk_max_mib") && scene.store.contains(&used), "{refused}");
    assert!(scene.store.contains(&idle), "nothing leaves in vain");
    drop(held);
    scene.fetch().await.expect("it is no more");
    assert!(!scene.store.contains(&used));
}

#[tokio::test(start_paused = true)]
async fn what_is_removed_meanwhile_is_fetched_no_further_and_goes() {
    let scene = Scene::new(&[Kind::Slow], None).await;
    let removing = async {
        time::sleep(SECOND * 20).await;
        scene.listed.update(&Catalog::default());
    };
    let (fetched, ()) = tokio::join!(scene.fetch(), removing);
    assert!(matches!(fetched, Err(FetchError::Withdrawn)));
    // The task that writes the last block releases the file.
    while scene.store.partial(&digest()).expect("opened").is_none() {
        time::sleep(SECOND / 100).await;
    }
    let fetched = scene.put_fetched(b'f', 1_000);
    let own = scene.store.put(&b"own"[..], 3).expect("put").digest;
    let gone = scene.fetcher.clear(|_| true).await.expect("cleared");
    assert!(gone.contains(&fetched) && !scene.store.contains(&fetched) && scene.store.contains(&own));
    assert!(scene.store.partials().expect("listed").is_empty());
    assert!(matches!(scene.fetch().await, Err(FetchError::Withdrawn)), "it is not listed");
}

#[tokio::test(start_paused = true)]
async fn two_workers_of_a_machine_fetch_a_file_once() {
    let scene = Scene::new(&[Kind::Good], None).await;
    let other = ArtifactStore::in_folder(scene.folder.path()).expect("a store");
    let (first, second) = tokio::join!(scene.fetch(), async {
        let fetcher = Fetcher { store: other, permits: Semaphore::new(1), ..second_of(&scene) };
        fetcher.fetch(&digest(), &|_, _, _| {}).await
    });
    assert!(first.is_ok() && second.is_ok());
    assert_eq!(scene.requests(0), [0]);
}

/// Creates a second fetcher on the network of a scene.
fn second_of(scene: &Scene) -> Fetcher {
    let Fetcher { client, sources, .. } = &scene.fetcher;
    let free_bytes = scene.free.clone();
    Fetcher::new(FetcherParts {
        use_of: CatalogUse::Fetch,
        client: client.clone(),
        directory: sources.directory.clone(),
        store: scene.store.clone(),
        listed: scene.listed.clone(),
        most_bytes: None,
        free_bytes: Arc::new(move || Some(free_bytes.load(Ordering::Relaxed))),
        metrics: Metrics::register(&mut Registry::default()),
    })
}
