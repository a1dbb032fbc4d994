//! A network within one process: what `tether up` and the tests run on.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use protocol::signature::NodeKey;
use protocol::{PublicKey, Topic};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Channel, Connection, Incoming, RequestError, Transport, TransportError};

/// Connections that may wait to be accepted by a node.
const ACCEPT_QUEUE: usize = 1024;
/// Requests and channels that may wait to be taken from a connection.
const INCOMING_QUEUE: usize = 1024;
/// Messages that may lie in one direction of a channel.
const CHANNEL_QUEUE: usize = 64;

/// A network within one process. Clones are the same network.
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    nodes: HashMap<PublicKey, Node>,
    topics: HashMap<Topic, BTreeSet<PublicKey>>,
}

struct Node {
    accepted: mpsc::Sender<Arc<dyn Connection>>,
    closed: CancellationToken,
}

impl MemoryNetwork {
    /// Makes an empty network.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a node. A node of the same key that was there before is cut off.
    pub fn node(&self, key: &NodeKey) -> Arc<dyn Transport> {
        let (accepted, queue) = mpsc::channel(ACCEPT_QUEUE);
        let closed = CancellationToken::new();
        let public_key = key.public_key();
        self.cut(public_key);
        self.lock().nodes.insert(public_key, Node { accepted, closed: closed.clone() });
        Arc::new(MemoryTransport { network: self.clone(), public_key, queue: tokio::sync::Mutex::new(queue), closed })
    }

    /// Takes a node off the network at once, as if its plug were pulled.
    pub fn cut(&self, node: PublicKey) {
        let mut state = self.lock();
        if let Some(node) = state.nodes.remove(&node) {
            node.closed.cancel();
        }
        state.topics.retain(|_, peers| {
            peers.remove(&node);
            !peers.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct MemoryTransport {
    network: MemoryNetwork,
    public_key: PublicKey,
    queue: tokio::sync::Mutex<mpsc::Receiver<Arc<dyn Connection>>>,
    closed: CancellationToken,
}

#[async_trait]
impl Transport for MemoryTransport {
    fn public_key(&self) -> PublicKey {
        self.public_key
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        if self.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        let (accepted, peer_closed) = {
            let state = self.network.lock();
            let node = state.nodes.get(&peer).ok_or(TransportError::Unreachable { peer })?;
            (node.accepted.clone(), node.closed.clone())
        };
        let ends = [self.closed.clone(), peer_closed];
        let (to_peer, at_peer) = mpsc::channel(INCOMING_QUEUE);
        let (to_us, at_us) = mpsc::channel(INCOMING_QUEUE);
        let ours = MemoryConnection { remote_key: peer, ends: ends.clone(), outgoing: to_peer, incoming: at_us.into() };
        let theirs = MemoryConnection { remote_key: self.public_key, ends, outgoing: to_us, incoming: at_peer.into() };
        accepted.send(Arc::new(theirs)).await.map_err(|_| TransportError::Unreachable { peer })?;
        Ok(Arc::new(ours))
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        let mut queue = self.queue.lock().await;
        self.closed.run_until_cancelled(queue.recv()).await.flatten()
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        if self.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        self.network.lock().topics.entry(topic.clone()).or_default().insert(self.public_key);
        Ok(())
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        let mut state = self.network.lock();
        if let Some(peers) = state.topics.get_mut(topic) {
            peers.remove(&self.public_key);
            // Topics with nobody on them are pruned (T4).
            if peers.is_empty() {
                state.topics.remove(topic);
            }
        }
        Ok(())
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        if self.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        Ok(self.network.lock().topics.get(topic).map(|peers| peers.iter().copied().collect()).unwrap_or_default())
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        // Not `cut`: a newer node of the same key may have taken this one's place.
        self.closed.cancel();
    }
}

struct MemoryConnection {
    remote_key: PublicKey,
    /// Either node's end closes the connection.
    ends: [CancellationToken; 2],
    outgoing: mpsc::Sender<Incoming>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Incoming>>,
}

impl MemoryConnection {
    async fn while_open<T>(&self, wait: impl Future<Output = T>) -> Result<T, TransportError> {
        let [ours, theirs] = &self.ends;
        let outcome = ours.run_until_cancelled(theirs.run_until_cancelled(wait)).await;
        outcome.flatten().ok_or(TransportError::Closed)
    }
}

#[async_trait]
impl Connection for MemoryConnection {
    fn remote_key(&self) -> PublicKey {
        self.remote_key
    }

    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError> {
        let (reply, replied) = oneshot::channel();
        let request = Incoming::Request { method: method.to_owned(), body, reply };
        let answer = self
            .while_open(async {
                self.outgoing.send(request).await.ok()?;
                replied.await.ok()
            })
            .await?;
        Ok(answer.ok_or(TransportError::Closed)??)
    }

    async fn open_channel(&self) -> Result<Channel, TransportError> {
        let (to_peer, at_peer) = mpsc::channel(CHANNEL_QUEUE);
        let (to_us, at_us) = mpsc::channel(CHANNEL_QUEUE);
        let theirs = Incoming::Channel(Channel { outgoing: to_us, incoming: at_peer });
        self.while_open(self.outgoing.send(theirs)).await?.map_err(|_| TransportError::Closed)?;
        Ok(Channel { outgoing: to_peer, incoming: at_us })
    }

    async fn next(&self) -> Option<Incoming> {
        let mut incoming = self.incoming.lock().await;
        self.while_open(incoming.recv()).await.ok().flatten()
    }

    fn is_closed(&self) -> bool {
        self.ends.iter().any(CancellationToken::is_cancelled) || self.outgoing.is_closed()
    }
}
