//! `artifact.fetch`: serves artifacts of the local store to other members, and fetches artifacts from them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use protocol::artifact::{ArtifactFetch, ArtifactHead, FETCH};
use protocol::control::NodeRole;
use protocol::{Digest, ErrorCode, ModelName, PublicKey, WireError, codec};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time;
use tracing::{debug, warn};

use crate::client::{CallError, Client, ResponseStream, StreamOptions};
use crate::frame::FRAME_PAYLOAD_MAX;
use crate::membership::Membership;
use crate::server::{Interrupted, ResponseSink, StreamCall};

/// How many files are read for other nodes at once. Further callers get an error that asks them to try another node.
pub const READS_MAX: usize = 8;
/// How many of those one caller may have.
pub const READS_PER_PEER_MAX: usize = 2;
/// How many bytes are read from the disk at a time.
const BLOCK_BYTES: u64 = 1 << 20;
/// How long a caller may take to grant credit for the next message.
const SEND_WITHIN: Duration = Duration::from_secs(30);
/// When a refused caller may try again.
const AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How long a node may take to accept the call.
const ACCEPT_WITHIN: Duration = Duration::from_secs(10);
/// How long a node may be silent.
const STALL: Duration = Duration::from_secs(20);
/// Credit in addition to the usual window. With a round trip of 50 ms, it allows 20 MB/s.
const AHEAD_BYTES: u32 = 1 << 20;

/// Serves artifacts of a store to the workers of the pool.
pub struct ArtifactServer {
    store: ArtifactStore,
    membership: Membership,
    reads: Arc<Semaphore>,
    by_peer: Mutex<HashMap<PublicKey, usize>>,
}

/// A read on behalf of a caller, which counts against the limits until it is dropped.
struct Read<'a> {
    artifact_server: &'a ArtifactServer,
    peer: PublicKey,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for Read<'_> {
    fn drop(&mut self) {
        let mut by_peer = self.artifact_server.by_peer();
        if let Some(count) = by_peer.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}

impl ArtifactServer {
    /// Serves the artifacts of a store.
    pub fn new(store: ArtifactStore, membership: Membership) -> Self {
        Self { store, membership, reads: Arc::new(Semaphore::new(READS_MAX)), by_peer: Mutex::default() }
    }

    /// Answers a call. `models_of` returns the models that the catalogue lists with an artifact. Artifacts without a
    /// model are not served.
    pub async fn serve<Listing>(&self, call: StreamCall, models_of: impl FnOnce(Digest) -> Listing)
    where
        Listing: Future<Output = Result<Vec<ModelName>, WireError>>,
    {
        let opened = async {
            // A caller without permission must not learn which artifacts exist.
            self.membership.check_role(call.peer, NodeRole::Worker, None)?;
            let wanted: ArtifactFetch = codec::decode(&call.body)?;
            self.check_listed(call.peer, &models_of(wanted.digest).await?)?;
            let read = self.enter(call.peer)?;
            let (file, bytes) = self.open(wanted).await?;
            Ok((read, wanted, file, bytes))
        };
        match opened.await {
            Ok((_read, wanted, file, bytes)) => {
                let peer = call.peer;
                let Ok(reply) = call.accept().await else { return };
                debug!(peer = peer.short(), digest = %wanted.digest, offset = wanted.offset, "an artifact is read");
                let sent = send(reply, file, bytes, wanted.offset).await;
                debug!(peer = peer.short(), digest = %wanted.digest, complete = sent.is_ok(), "the reading ended");
            }
            Err(error) => {
                let error: WireError = error;
                debug!(peer = call.peer.short(), %error, "an artifact was refused");
                call.refuse(error).await;
            }
        }
    }

    fn check_listed(&self, peer: PublicKey, models: &[ModelName]) -> Result<(), WireError> {
        if models.is_empty() {
            return Err(WireError::new(ErrorCode::NotFound, "no model that was added has this artifact"));
        }
        let certificate = self.membership.standing(peer)?;
        if certificate.is_none_or(|certificate| models.iter().any(|model| certificate.allows_model(model))) {
            return Ok(());
        }
        Err(WireError::new(ErrorCode::ModelNotAllowed, "this node's certificate does not allow the artifact's model"))
    }

    fn enter(&self, peer: PublicKey) -> Result<Read<'_>, WireError> {
        let permit = self.reads.clone().try_acquire_owned().map_err(|_| too_many())?;
        let mut by_peer = self.by_peer();
        let count = by_peer.entry(peer).or_default();
        if *count >= READS_PER_PEER_MAX {
            return Err(too_many());
        }
        *count += 1;
        drop(by_peer);
        Ok(Read { artifact_server: self, peer, _permit: permit })
    }

    async fn open(&self, wanted: ArtifactFetch) -> Result<(File, u64), WireError> {
        let store = self.store.clone();
        let opened = spawn_blocking(move || {
            let mut file = store.peek(&wanted.digest)?;
            let bytes = file.metadata()?.len();
            file.seek(SeekFrom::Start(wanted.offset))?;
            Ok::<_, io::Error>((file, bytes))
        });
        match opened.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok((_, bytes)) if wanted.offset > bytes => {
                let message = format!("the artifact has {bytes} bytes, and {} were to be left out", wanted.offset);
                Err(WireError::new(ErrorCode::InvalidValue, message))
            }
            Ok(opened) => Ok(opened),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(WireError::new(ErrorCode::ModelNotHere, "this node does not have the artifact, try another"))
            }
            Err(error) => {
                warn!(digest = %wanted.digest, %error, "an artifact could not be read for another node");
                Err(WireError::new(ErrorCode::Unavailable, "this node cannot read the artifact, try another"))
            }
        }
    }

    fn by_peer(&self) -> MutexGuard<'_, HashMap<PublicKey, usize>> {
        self.by_peer.lock()
    }
}

fn too_many() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node sends as many files as it may, try another")
        .with_retry_after(AGAIN_AFTER)
}

/// Sends the rest of a file. The next block is read while the current one is sent.
async fn send(mut reply: ResponseSink, file: File, bytes: u64, offset: u64) -> Result<(), Interrupted> {
    send_one(&mut reply, &codec::encode(&ArtifactHead { bytes })).await?;
    // A file of the store never grows. If it did, the excess would not be sent.
    let mut left = bytes - offset;
    let mut reading = read(file, left);
    while left > 0 {
        let (file, block) = match (&mut reading).await {
            Ok(Ok((file, block))) if !block.is_empty() => (file, block),
            outcome => {
                warn!(?outcome, "an artifact could not be read to its end");
                let error = WireError::new(ErrorCode::Unavailable, "this node cannot read the artifact, try another");
                return reply.fail(error).await;
            }
        };
        left -= block.len() as u64;
        reading = read(file, left);
        for message in block.chunks(FRAME_PAYLOAD_MAX) {
            send_one(&mut reply, message).await?;
        }
    }
    reply.finish().await
}

async fn send_one(reply: &mut ResponseSink, message: &[u8]) -> Result<(), Interrupted> {
    time::timeout(SEND_WITHIN, reply.send(message)).await.unwrap_or(Err(Interrupted))
}

fn read(mut file: File, left: u64) -> tokio::task::JoinHandle<io::Result<(File, Vec<u8>)>> {
    spawn_blocking(move || {
        let mut block = Vec::with_capacity(left.min(BLOCK_BYTES) as usize);
        (&mut file).take(left.min(BLOCK_BYTES)).read_to_end(&mut block)?;
        Ok((file, block))
    })
}

/// An artifact as another node sends it. Dropping it cancels the call.
#[derive(Debug)]
pub struct ArtifactStream {
    stream: ResponseStream,
    /// The length of the whole artifact, as reported by the other node.
    pub bytes: u64,
}

impl ArtifactStream {
    /// Requests an artifact from a node, from an offset on.
    pub async fn open(client: &Client, peer: PublicKey, wanted: ArtifactFetch) -> Result<Self, CallError> {
        let options = StreamOptions { accept_within: ACCEPT_WITHIN, deadline: None, stall: STALL };
        let body = Bytes::from(codec::encode(&wanted));
        let mut stream = client.open_stream(peer, FETCH, body, options).await?;
        stream.widen(AHEAD_BYTES);
        let head = stream.next().await.unwrap_or(Err(CallError::Garbled))?;
        let ArtifactHead { bytes } = codec::decode(&head)?;
        Ok(Self { stream, bytes })
    }

    /// Returns the next bytes, or `None` at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, CallError>> {
        self.stream.next().await
    }
}
