//! A transport within one process, used by `tether up` and by tests.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use hyperswarm::crypto;
use parking_lot::{Mutex, MutexGuard};
use protocol::signature::NodeKey;
use protocol::{PublicKey, Topic, WireError};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Channel, Connection, Incoming, Reply, RequestError, Transport, TransportError};

/// How many connections may wait to be accepted by a node.
const ACCEPT_QUEUE: usize = 1024;
/// How many requests and channels may wait to be taken from a connection.
const INCOMING_QUEUE: usize = 1024;
/// How many messages one direction of a channel may queue.
const CHANNEL_QUEUE: usize = 64;

/// A network within one process. Clones refer to the same network.
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    nodes: HashMap<PublicKey, Node>,
    topics: HashMap<Topic, BTreeSet<PublicKey>>,
    connections: u64,
}

#[derive(Clone)]
struct Node {
    accepted: mpsc::Sender<Arc<dyn Connection>>,
    lifeline: Lifeline,
}

/// Everything that ends with a node: the node itself, and each of its connections.
#[derive(Clone, Default)]
struct Lifeline {
    closed: CancellationToken,
    connections: Arc<Mutex<Vec<CancellationToken>>>,
}

impl Lifeline {
    fn hold(&self, connection: &CancellationToken) {
        let mut connections = self.connections.lock();
        connections.retain(|connection| !connection.is_cancelled());
        connections.push(connection.clone());
    }

    fn cut(&self) {
        self.closed.cancel();
        for connection in self.connections.lock().drain(..) {
            connection.cancel();
        }
    }
}

impl MemoryNetwork {
    /// Makes an empty network.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a node. An earlier node with the same key is cut off.
    pub fn node(&self, key: &NodeKey) -> Arc<dyn Transport> {
        let (accepted, queue) = mpsc::channel(ACCEPT_QUEUE);
        let lifeline = Lifeline::default();
        let public_key = key.public_key();
        self.cut(public_key);
        self.lock().nodes.insert(public_key, Node { accepted, lifeline: lifeline.clone() });
        Arc::new(MemoryTransport { network: self.clone(), public_key, queue: tokio::sync::Mutex::new(queue), lifeline })
    }

    /// Removes a node from the network abruptly, as if it had lost power.
    pub fn cut(&self, node: PublicKey) {
        let mut state = self.lock();
        if let Some(node) = state.nodes.remove(&node) {
            node.lifeline.cut();
        }
        state.topics.retain(|_, peers| {
            peers.remove(&node);
            !peers.is_empty()
        });
    }

    /// Returns another secret for each connection. Within one process nobody listens.
    fn next_secret(&self, caller: PublicKey, callee: PublicKey) -> [u8; 32] {
        let mut state = self.lock();
        state.connections += 1;
        crypto::hash(&[&caller.0, &callee.0, &state.connections.to_le_bytes()])
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

struct MemoryTransport {
    network: MemoryNetwork,
    public_key: PublicKey,
    queue: tokio::sync::Mutex<mpsc::Receiver<Arc<dyn Connection>>>,
    lifeline: Lifeline,
}

#[async_trait]
impl Transport for MemoryTransport {
    fn public_key(&self) -> PublicKey {
        self.public_key
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        if self.lifeline.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        let node = self.network.lock().nodes.get(&peer).cloned().ok_or(TransportError::Unreachable { peer })?;
        let secret = self.network.next_secret(self.public_key, peer);
        let closed = CancellationToken::new();
        self.lifeline.hold(&closed);
        node.lifeline.hold(&closed);
        let (to_peer, at_peer) = mpsc::channel(INCOMING_QUEUE);
        let (to_us, at_us) = mpsc::channel(INCOMING_QUEUE);
        let end = |remote_key, outgoing, incoming: mpsc::Receiver<Incoming>| MemoryConnection {
            remote_key,
            secret,
            closed: closed.clone(),
            outgoing,
            incoming: incoming.into(),
        };
        let ours = end(peer, to_peer, at_us);
        let theirs = end(self.public_key, to_us, at_peer);
        node.accepted.send(Arc::new(theirs)).await.map_err(|_| TransportError::Unreachable { peer })?;
        Ok(Arc::new(ours))
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        let mut queue = self.queue.lock().await;
        self.lifeline.closed.run_until_cancelled(queue.recv()).await.flatten()
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        if self.lifeline.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        self.network.lock().topics.entry(topic.clone()).or_default().insert(self.public_key);
        Ok(())
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        let mut state = self.network.lock();
        if let Some(peers) = state.topics.get_mut(topic) {
            peers.remove(&self.public_key);
            // Topics without peers are removed.
            if peers.is_empty() {
                state.topics.remove(topic);
            }
        }
        Ok(())
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        if self.lifeline.closed.is_cancelled() {
            return Err(TransportError::Closed);
        }
        Ok(self.network.lock().topics.get(topic).map(|peers| peers.iter().copied().collect()).unwrap_or_default())
    }
}

impl Drop for MemoryTransport {
    fn drop(&mut self) {
        // Not the network's `cut`, because a newer node with the same key may have replaced this one.
        self.lifeline.cut();
    }
}

struct MemoryConnection {
    remote_key: PublicKey,
    secret: [u8; 32],
    /// Cancelled when either node is gone.
    closed: CancellationToken,
    outgoing: mpsc::Sender<Incoming>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Incoming>>,
}

impl MemoryConnection {
    async fn while_open<T>(&self, wait: impl Future<Output = T>) -> Result<T, TransportError> {
        self.closed.run_until_cancelled(wait).await.ok_or(TransportError::Closed)
    }
}

#[async_trait]
impl Connection for MemoryConnection {
    fn remote_key(&self) -> PublicKey {
        self.remote_key
    }

    fn secret(&self) -> [u8; 32] {
        self.secret
    }

    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError> {
        let (reply, replied) = oneshot::channel();
        let request = Incoming::Request { method: method.to_owned(), body, reply: Box::new(reply) };
        let response = self
            .while_open(async {
                self.outgoing.send(request).await.ok()?;
                replied.await.ok()
            })
            .await?;
        Ok(response.ok_or(TransportError::Closed)??)
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError> {
        let (to_peer, at_peer) = mpsc::channel(CHANNEL_QUEUE);
        let (to_us, at_us) = mpsc::channel(CHANNEL_QUEUE);
        let end = |outgoing, incoming: mpsc::Receiver<Bytes>| {
            Box::new(MemoryChannel { outgoing, incoming: incoming.into(), closed: self.closed.clone() })
        };
        let theirs = Incoming::Channel(end(to_us, at_peer));
        self.while_open(self.outgoing.send(theirs)).await?.map_err(|_| TransportError::Closed)?;
        Ok(end(to_peer, at_us))
    }

    async fn next(&self) -> Option<Incoming> {
        let mut incoming = self.incoming.lock().await;
        self.while_open(incoming.recv()).await.ok().flatten()
    }

    fn is_closed(&self) -> bool {
        self.closed.is_cancelled() || self.outgoing.is_closed()
    }

    fn close(&self) {
        self.closed.cancel();
    }
}

#[async_trait]
impl Reply for oneshot::Sender<Result<Bytes, WireError>> {
    fn send(self: Box<Self>, response: Result<Bytes, WireError>) {
        let _ = oneshot::Sender::send(*self, response);
    }

    async fn closed(&mut self) {
        oneshot::Sender::closed(self).await;
    }
}

#[derive(Debug)]
struct MemoryChannel {
    outgoing: mpsc::Sender<Bytes>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Bytes>>,
    /// Cancelled when the connection closes. Queued messages are lost then.
    closed: CancellationToken,
}

#[async_trait]
impl Channel for MemoryChannel {
    async fn send(&self, message: Bytes) -> bool {
        // Sending comes first, because checking for the end of the connection costs more than sending.
        tokio::select! {
            biased;
            permit = self.outgoing.reserve() => permit.map(|permit| permit.send(message)).is_ok(),
            () = self.closed.cancelled() => false,
        }
    }

    fn try_send(&self, message: Bytes) -> bool {
        self.outgoing.try_send(message).is_ok()
    }

    async fn receive(&self) -> Option<Bytes> {
        let mut incoming = self.incoming.lock().await;
        tokio::select! {
            biased;
            message = incoming.recv() => message,
            () = self.closed.cancelled() => None,
        }
    }

    fn try_receive(&self) -> Option<Bytes> {
        self.incoming.try_lock().ok()?.try_recv().ok()
    }
}
