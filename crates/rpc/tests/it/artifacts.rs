//! Artifacts that go from node to node.

use std::sync::Arc;

use artifact_store::ArtifactStore;
use protocol::artifact::{ArtifactFetch, FETCH};
use protocol::control::NodeRole;
use protocol::membership::Certificate;
use protocol::{Digest, ErrorCode, ModelName};
use tether_rpc::artifacts::{READS_MAX, READS_PER_PEER_MAX};
use tether_rpc::{ArtifactServer, ArtifactStream, CallError};

use crate::membership::{Node, Pool};

/// A registry with an artifact of three blocks that the catalogue lists, and one that it does not.
struct Scene {
    pool: Pool,
    registry: Node,
    _folder: tempfile::TempDir,
}

fn listed() -> Vec<u8> {
    (0..2_600_000_u32).map(|number| (number >> 8) as u8).collect()
}

const UNLISTED: &[u8] = b"a file that nobody added";
const AWAY: &[u8] = b"a file that lies elsewhere";

fn scene() -> Scene {
    let (pool, folder) = (Pool::new(), tempfile::tempdir().expect("a folder"));
    let store = ArtifactStore::in_folder(folder.path()).expect("a store");
    for bytes in [&listed(), UNLISTED] {
        store.put(bytes, 1 << 30).expect("put");
    }
    let registry = pool.join(1, &[NodeRole::Registry]);
    let artifact_server = Arc::new(ArtifactServer::new(store, registry.membership.clone()));
    let digests = [Digest::of(&listed()), Digest::of(AWAY)];
    pool.serve(&registry, NodeRole::Registry, move |server| {
        server.stream(FETCH, move |call| {
            let artifact_server = artifact_server.clone();
            let models_of = move |digest| async move {
                let names: Vec<ModelName> = vec!["mine".parse().expect("a name")];
                Ok(if digests.contains(&digest) { names } else { vec![] })
            };
            async move { artifact_server.serve(call, models_of).await }
        })
    });
    Scene { pool, registry, _folder: folder }
}

impl Scene {
    async fn open(&self, node: &Node, bytes: &[u8], offset: u64) -> Result<ArtifactStream, CallError> {
        let wanted = ArtifactFetch { digest: Digest::of(bytes), offset };
        ArtifactStream::open(&node.client, self.registry.key, wanted).await
    }

    async fn refusal(&self, node: &Node, bytes: &[u8], offset: u64) -> ErrorCode {
        match self.open(node, bytes, offset).await {
            Err(CallError::Remote(error)) => error.code,
            other => panic!("{other:?}"),
        }
    }
}

async fn read(mut stream: ArtifactStream) -> Vec<u8> {
    let mut all = vec![];
    while let Some(bytes) = stream.next().await {
        all.extend_from_slice(&bytes.expect("it goes well"));
    }
    all
}

#[tokio::test(start_paused = true)]
async fn a_worker_reads_what_is_listed_from_any_offset() {
    let scene = scene();
    let worker = scene.pool.join(2, &[NodeRole::Worker]);
    let length = listed().len();
    for offset in [0, 1, 1 << 20, length - 1, length] {
        let stream = scene.open(&worker, &listed(), offset as u64).await.expect("accepted");
        assert_eq!(stream.bytes, length as u64);
        assert!(read(stream).await == listed()[offset..], "from {offset}");
    }
    assert_eq!(scene.refusal(&worker, &listed(), length as u64 + 1).await, ErrorCode::InvalidValue);
}

#[tokio::test(start_paused = true)]
async fn what_no_list_names_is_given_to_nobody_and_what_is_away_is_said_to_be() {
    let scene = scene();
    let worker = scene.pool.join(2, &[NodeRole::Worker]);
    assert_eq!(scene.refusal(&worker, UNLISTED, 0).await, ErrorCode::NotFound);
    assert_eq!(scene.refusal(&worker, AWAY, 0).await, ErrorCode::ModelNotHere);
}

#[tokio::test(start_paused = true)]
async fn only_workers_that_may_serve_the_model_get_it() {
    let scene = scene();
    let gateway = scene.pool.join(3, &[NodeRole::Gateway]);
    assert_eq!(scene.refusal(&gateway, &listed(), 0).await, ErrorCode::NotEnrolled);
    let of_models = |seed, names: &[&str]| {
        let models = names.iter().map(|name| name.parse().expect("a name")).collect();
        let certificate = scene.pool.certificate(seed, &[NodeRole::Worker]);
        scene.pool.join_with(seed, &Certificate { models, ..certificate })
    };
    assert_eq!(scene.refusal(&of_models(4, &["other"]), &listed(), 0).await, ErrorCode::ModelNotAllowed);
    read(scene.open(&of_models(5, &["other", "mine"]), &listed(), 0).await.expect("accepted")).await;
    let stranger = tether_rpc::Client::new(scene.pool.node(7));
    let wanted = ArtifactFetch { digest: Digest::of(&listed()), offset: 0 };
    let refused = ArtifactStream::open(&stranger, scene.registry.key, wanted).await.expect_err("no member");
    assert!(matches!(refused, CallError::Remote(error) if error.code == ErrorCode::NotEnrolled));
}

#[tokio::test(start_paused = true)]
async fn so_many_read_at_once_and_one_more_is_told_to_try_another() {
    let scene = scene();
    let (mut reading, mut workers) = (vec![], vec![]);
    for seed in 10..10 + (READS_MAX / READS_PER_PEER_MAX) as u8 {
        let worker = scene.pool.join(seed, &[NodeRole::Worker]);
        for _ in 0..READS_PER_PEER_MAX {
            reading.push(scene.open(&worker, &listed(), 0).await.expect("there is room"));
        }
        assert_eq!(scene.refusal(&worker, &listed(), 0).await, ErrorCode::Unavailable, "its share");
        workers.push(worker);
    }
    let late = scene.pool.join(9, &[NodeRole::Worker]);
    assert_eq!(scene.refusal(&late, &listed(), 0).await, ErrorCode::Unavailable, "all places");
    // Who leaves in the middle, and who does not read on, gives the place back.
    drop(reading.pop());
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    reading.push(scene.open(&late, &listed(), 0).await.expect("there is room again"));
    tokio::time::sleep(std::time::Duration::from_secs(31)).await;
    read(scene.open(&late, &listed(), 0).await.expect("the others did not read")).await;
}
