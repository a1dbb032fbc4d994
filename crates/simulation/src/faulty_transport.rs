//! A transport whose links can be cut, held back and slowed down.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use protocol::{PublicKey, Topic};
use rpc::Transport;
use rpc::transport::{Channel, Connection, Incoming, RequestError, TransportError};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

/// The state of all links of a network. Clones share it.
#[derive(Clone)]
pub struct Links {
    state: Arc<Mutex<State>>,
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    /// Pairs that do not reach each other: connections break, and new ones fail.
    cut: BTreeSet<Pair>,
    /// Pairs whose messages wait. Neither end can tell that from silence.
    held: BTreeSet<Pair>,
    /// How often each pair has lost what was under way between them.
    losses: BTreeMap<Pair, u64>,
    /// How long a message to or from a node takes.
    delays: BTreeMap<PublicKey, Duration>,
    open: Vec<(Pair, Weak<dyn Connection>)>,
    /// What ends with the present run of each node.
    runs: BTreeMap<PublicKey, CancellationToken>,
}

/// Two nodes, the lower key first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair(PublicKey, PublicKey);

impl Pair {
    fn of(one: PublicKey, other: PublicKey) -> Self {
        Self(one.min(other), one.max(other))
    }
}

impl Default for Links {
    fn default() -> Self {
        Self { state: Arc::default(), changes: watch::Sender::new(()) }
    }
}

impl Links {
    /// Wraps a node's transport.
    pub fn over(&self, transport: Arc<dyn Transport>) -> Arc<dyn Transport> {
        let (own, run) = (transport.public_key(), CancellationToken::new());
        self.state.lock().runs.insert(own, run.clone());
        Arc::new(FaultyTransport { own, inner: transport, links: self.clone(), run })
    }

    /// Ends a node: nothing that it still does reaches anybody.
    pub fn kill(&self, node: PublicKey) {
        if let Some(run) = self.state.lock().runs.remove(&node) {
            run.cancel();
        }
    }

    /// Cuts two nodes off from each other.
    pub fn cut(&self, one: PublicKey, other: PublicKey) {
        let pair = Pair::of(one, other);
        let mut state = self.state.lock();
        state.cut.insert(pair);
        state.close(pair);
    }

    /// Loses all messages between two nodes that have not arrived, and those that follow. Neither end can tell that
    /// from silence.
    pub fn lose(&self, one: PublicKey, other: PublicKey) {
        let pair = Pair::of(one, other);
        let mut state = self.state.lock();
        state.held.insert(pair);
        *state.losses.entry(pair).or_default() += 1;
    }

    /// Ends a loss: the connections of the two nodes break, as both have waited too long, and new ones are possible.
    pub fn give_up(&self, one: PublicKey, other: PublicKey) {
        self.state.lock().close(Pair::of(one, other));
        self.heal(one, other);
    }

    /// Holds back all messages between two nodes.
    pub fn hold(&self, one: PublicKey, other: PublicKey) {
        self.state.lock().held.insert(Pair::of(one, other));
    }

    /// Makes each message to or from a node take this long.
    pub fn slow(&self, node: PublicKey, delay: Duration) {
        self.state.lock().delays.insert(node, delay);
    }

    /// Repairs the link of two nodes.
    pub fn heal(&self, one: PublicKey, other: PublicKey) {
        let pair = Pair::of(one, other);
        let mut state = self.state.lock();
        state.cut.remove(&pair);
        state.held.remove(&pair);
        drop(state);
        self.changes.send_replace(());
    }

    /// Lets messages to and from a node pass at once.
    pub fn speed_up(&self, node: PublicKey) {
        self.state.lock().delays.remove(&node);
    }

    pub fn heal_all(&self) {
        let mut state = self.state.lock();
        (state.cut, state.held, state.delays) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        drop(state);
        self.changes.send_replace(());
    }

    fn is_cut(&self, pair: Pair) -> bool {
        self.state.lock().cut.contains(&pair)
    }

    fn losses(&self, pair: Pair) -> u64 {
        self.state.lock().losses.get(&pair).copied().unwrap_or_default()
    }

    fn is_held(&self, pair: Pair) -> bool {
        self.state.lock().held.contains(&pair)
    }

    fn arrival(&self, Pair(one, other): Pair) -> Instant {
        let state = self.state.lock();
        let delay = [one, other].iter().filter_map(|node| state.delays.get(node)).sum();
        Instant::now() + delay
    }

    async fn wait_while_held(&self, pair: Pair) {
        let mut changes = self.changes.subscribe();
        while self.is_held(pair) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn wrap(&self, own: PublicKey, run: &CancellationToken, inner: Arc<dyn Connection>) -> Arc<dyn Connection> {
        let pair = Pair::of(own, inner.remote_key());
        self.state.lock().open.push((pair, Arc::downgrade(&inner)));
        let link = Link { links: self.clone(), pair, losses: self.losses(pair), run: run.clone() };
        Arc::new(FaultyConnection { inner, link, arriving: Arriving::default() })
    }
}

impl State {
    /// Closes the connections of a pair.
    fn close(&mut self, pair: Pair) {
        self.open.retain(|(of, connection)| {
            let Some(connection) = connection.upgrade() else { return false };
            if *of == pair {
                connection.close();
            }
            *of != pair
        });
    }
}

#[derive(Clone)]
struct Link {
    links: Links,
    pair: Pair,
    /// The losses of the pair when the connection was opened. After a further one nothing arrives on it any more.
    losses: u64,
    /// Cancelled when this end of it has crashed.
    run: CancellationToken,
}

impl fmt::Debug for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pair.fmt(formatter)
    }
}

impl Link {
    /// Waits until a message that was sent just now has arrived.
    async fn pass(&self) {
        let at = self.links.arrival(self.pair);
        // Sleeping until now would still wait for the next tick of the timer.
        if at > Instant::now() {
            time::sleep_until(at).await;
        }
        self.links.wait_while_held(self.pair).await;
    }

    fn is_lost(&self) -> bool {
        self.links.losses(self.pair) != self.losses
    }
}

/// The message that arrives next. It stays here while it is delayed, so that whoever waits for it may give up.
struct Arriving<T>(tokio::sync::Mutex<Option<(Instant, T)>>);

impl<T> Default for Arriving<T> {
    fn default() -> Self {
        Self(tokio::sync::Mutex::new(None))
    }
}

impl<T> Arriving<T> {
    async fn next(&self, link: &Link, receive: impl Future<Output = Option<T>>) -> Option<T> {
        let mut slot = self.0.lock().await;
        if slot.is_none() {
            let message = receive.await?;
            *slot = Some((link.links.arrival(link.pair), message));
        }
        if let Some((at, _)) = &*slot {
            // Sleeping until now would still wait for the timer's next tick.
            if *at > Instant::now() {
                time::sleep_until(*at).await;
            }
        }
        link.links.wait_while_held(link.pair).await;
        slot.take().map(|(_, message)| message).filter(|_| !link.is_lost())
    }

    fn try_next(&self, link: &Link, receive: impl FnOnce() -> Option<T>) -> Option<T> {
        let mut slot = self.0.try_lock().ok()?;
        if slot.is_none() {
            *slot = receive().map(|message| (link.links.arrival(link.pair), message));
        }
        let is_late = slot.as_ref().is_some_and(|(at, _)| *at > Instant::now());
        if is_late || link.links.is_held(link.pair) || link.is_lost() {
            return None;
        }
        slot.take().map(|(_, message)| message)
    }
}

struct FaultyTransport {
    own: PublicKey,
    inner: Arc<dyn Transport>,
    links: Links,
    run: CancellationToken,
}

#[async_trait]
impl Transport for FaultyTransport {
    fn public_key(&self) -> PublicKey {
        self.own
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        let pair = Pair::of(self.own, peer);
        self.links.wait_while_held(pair).await;
        if self.run.is_cancelled() {
            return Err(TransportError::Closed);
        }
        if self.links.is_cut(pair) {
            return Err(TransportError::Unreachable { peer });
        }
        Ok(self.links.wrap(self.own, &self.run, self.inner.connect(peer).await?))
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        Some(self.links.wrap(self.own, &self.run, self.inner.accept().await?))
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.announce(topic).await
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.unannounce(topic).await
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        self.inner.lookup(topic).await
    }
}

struct FaultyConnection {
    inner: Arc<dyn Connection>,
    link: Link,
    arriving: Arriving<Incoming>,
}

#[async_trait]
impl Connection for FaultyConnection {
    fn remote_key(&self) -> PublicKey {
        self.inner.remote_key()
    }

    fn secret(&self) -> [u8; 32] {
        self.inner.secret()
    }

    async fn request(&self, method: &str, body: Bytes) -> Result<Bytes, RequestError> {
        let call = async {
            let reply = self.inner.request(method, body).await;
            self.link.pass().await;
            if self.link.is_lost() { Err(TransportError::Closed.into()) } else { reply }
        };
        self.link.run.run_until_cancelled(call).await.unwrap_or(Err(TransportError::Closed.into()))
    }

    async fn open_channel(&self) -> Result<Box<dyn Channel>, TransportError> {
        if self.link.run.is_cancelled() {
            return Err(TransportError::Closed);
        }
        let (inner, link) = (self.inner.open_channel().await?, self.link.clone());
        Ok(Box::new(FaultyChannel { inner, link, arriving: Arriving::default() }))
    }

    async fn next(&self) -> Option<Incoming> {
        Some(match self.arriving.next(&self.link, self.inner.next()).await? {
            Incoming::Channel(inner) => Incoming::Channel(Box::new(FaultyChannel {
                inner,
                link: self.link.clone(),
                arriving: Arriving::default(),
            })),
            request @ Incoming::Request { .. } => request,
        })
    }

    fn allow_requests(&self, bytes_max: usize) {
        self.inner.allow_requests(bytes_max);
    }

    fn trust(&self) {
        self.inner.trust();
    }

    fn is_closed(&self) -> bool {
        self.inner.is_closed()
    }

    fn close(&self) {
        self.inner.close();
    }
}

struct FaultyChannel {
    inner: Box<dyn Channel>,
    link: Link,
    arriving: Arriving<Bytes>,
}

impl fmt::Debug for FaultyChannel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.link.fmt(formatter)
    }
}

#[async_trait]
impl Channel for FaultyChannel {
    async fn send(&self, message: Bytes) -> bool {
        !self.link.run.is_cancelled() && self.inner.send(message).await
    }

    fn try_send(&self, message: Bytes) -> bool {
        !self.link.run.is_cancelled() && self.inner.try_send(message)
    }

    async fn receive(&self) -> Option<Bytes> {
        self.arriving.next(&self.link, self.inner.receive()).await
    }

    fn try_receive(&self) -> Option<Bytes> {
        self.arriving.try_next(&self.link, || self.inner.try_receive())
    }
}
