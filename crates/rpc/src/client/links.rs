//! Keeps one connection per peer. Concurrent callers share one dial (single-flight). A peer that did not respond in
//! time is pinged before its connection is used again. If it does not respond to that either, the connection is
//! retired: no further call uses it, and its streams go on until they or the transport end. After a failed dial, calls
//! fail at once for a time that doubles with each failure (exponential backoff).

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use protocol::control::{Empty, NODE_PING};
use protocol::{PublicKey, codec};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::CallError;
use super::introduction::Introduction;
use super::pauses::{self, Pauses};
use crate::backoff::{self, Backoff};
use crate::transport::{Connection, RequestError, Transport};

/// How long a suspected peer may take to respond to a ping.
const PING_WITHIN: Duration = Duration::from_millis(500);
/// The delay after the first failed dial. It doubles with each failure.
const BACKOFF: Duration = Duration::from_millis(100);
/// The maximum delay between two dials, so that a peer that comes back is found within seconds.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The number of peers at which idle ones are first removed.
const PEERS_SWEPT_AT: usize = 1024;

/// The connections of one client.
pub(super) struct Links {
    transport: Arc<dyn Transport>,
    connect_within: Duration,
    peers: Arc<Mutex<Peers>>,
    pauses: Pauses,
    tasks: TaskTracker,
    stop: CancellationToken,
    _end: DropGuard,
}

#[derive(Default)]
struct Peers {
    by_key: HashMap<PublicKey, Peer>,
    sweep_at: usize,
}

/// The state of a peer.
#[derive(Default)]
struct Peer {
    opening: Option<watch::Receiver<Opening>>,
    /// The waits after failed dials; `None` after one that succeeded.
    backoff: Option<Backoff>,
    /// The peer is not dialled before this time.
    rest: Option<Instant>,
    /// Connections that no further call uses. They exist as long as something is under way on them.
    retired: Vec<Weak<Link>>,
}

/// The state of a connection.
#[derive(Clone)]
enum Opening {
    Dialling,
    Open(Arc<Link>),
    Failed(CallError),
}

/// Whether a peer has become silent. If so, it is pinged before its connection is used again. Clones share the flag.
#[derive(Debug, Clone, Default)]
pub(crate) struct Suspicion(Arc<AtomicBool>);

impl Suspicion {
    /// Records that a response did not arrive in time: the method may be slow, or the peer may be gone.
    pub(crate) fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// An open connection, and whether its peer is believed to be alive.
pub(super) struct Link {
    connection: Arc<dyn Connection>,
    /// The state of the introduction on this connection.
    pub(super) introduction: Introduction,
    suspicion: Suspicion,
    is_retired: AtomicBool,
    opened_at: Instant,
    /// Held by the task that pings the peer.
    asking: tokio::sync::Mutex<()>,
}

impl fmt::Debug for Link {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Link").field("peer", &self.connection.remote_key()).finish_non_exhaustive()
    }
}

impl Link {
    fn over(connection: Arc<dyn Connection>) -> Self {
        Self {
            connection,
            introduction: Introduction::default(),
            suspicion: Suspicion::default(),
            is_retired: AtomicBool::new(false),
            opened_at: Instant::now(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    pub(super) fn connection(&self) -> &dyn Connection {
        &*self.connection
    }

    /// Returns the flag to raise when a call gets no response in time.
    pub(super) fn suspicion(&self) -> &Suspicion {
        &self.suspicion
    }

    /// Returns when the connection was opened.
    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    fn is_sound(&self) -> bool {
        !self.suspicion.is_raised() && !self.is_out_of_use()
    }

    fn is_out_of_use(&self) -> bool {
        self.is_retired.load(Ordering::Relaxed) || self.connection.is_closed()
    }

    /// Pings a suspected peer, and retires the connection if that does not respond. Concurrent callers wait for the
    /// outcome.
    async fn responds(&self) -> bool {
        let _asking = self.asking.lock().await;
        if self.is_out_of_use() {
            return false;
        }
        if self.suspicion.is_raised() {
            let ping = self.connection.request(NODE_PING, Bytes::from(codec::encode(&Empty {})));
            match time::timeout(PING_WITHIN, ping).await {
                // Any response, even an error, proves that the peer is alive.
                Ok(Ok(_) | Err(RequestError::Remote(_))) => self.suspicion.clear(),
                // A peer that pauses may go on with its streams, so the connection is not closed.
                Ok(Err(RequestError::Transport(_))) | Err(_) => {
                    self.is_retired.store(true, Ordering::Relaxed);
                    return false;
                }
            }
        }
        true
    }
}

impl Peer {
    /// Returns whether removing this peer would lose no state.
    fn is_idle(&self, now: Instant) -> bool {
        let unused = match self.opening.as_ref().map(|opening| opening.borrow().clone()) {
            None | Some(Opening::Failed(_)) => true,
            Some(Opening::Open(link)) => link.connection.is_closed(),
            Some(Opening::Dialling) => false,
        };
        unused && self.rest.is_none_or(|rest| rest <= now) && self.retired.iter().all(|link| link.strong_count() == 0)
    }

    /// Puts a connection that is out of use aside, so that the next call opens another.
    fn retire(&mut self) {
        self.retired.retain(|link| link.strong_count() > 0);
        if let Some(opening) = self.opening.take()
            && let Opening::Open(link) = &*opening.borrow()
        {
            self.retired.push(Arc::downgrade(link));
        }
    }

    fn close(self) {
        if let Some(opening) = self.opening
            && let Opening::Open(link) = &*opening.borrow()
        {
            link.connection.close();
        }
        for link in self.retired.iter().filter_map(Weak::upgrade) {
            link.connection.close();
        }
    }
}

impl Links {
    pub(super) fn new(transport: Arc<dyn Transport>, connect_within: Duration) -> Self {
        let stop = CancellationToken::new();
        let end = stop.clone().drop_guard();
        let (peers, pauses, tasks) = (Arc::default(), Pauses::default(), TaskTracker::new());
        Self { transport, connect_within, peers, pauses, tasks, stop, _end: end }
    }

    /// Returns a connection to a peer that is believed to be alive, and opens one if needed. Cancel safe: a dial
    /// continues for later callers.
    pub(super) async fn get(&self, peer: PublicKey) -> Result<Arc<Link>, CallError> {
        self.note_pause();
        if let Some(link) = self.sound(peer) {
            return Ok(link);
        }
        // Tries twice: the first connection may turn out not to respond. A new connection is not suspected, so two
        // tries suffice.
        for _ in 0..2 {
            let mut opening = self.opening(peer)?;
            let opened = match opening.wait_for(|opening| !matches!(opening, Opening::Dialling)).await {
                Ok(opened) => opened.clone(),
                Err(_) => return Err(CallError::Closed),
            };
            match opened {
                Opening::Open(link) if link.is_sound() || link.responds().await => return Ok(link),
                Opening::Failed(error) => return Err(error),
                Opening::Open(_) | Opening::Dialling => {}
            }
        }
        Err(CallError::Unreachable { peer })
    }

    /// Returns the existing connection if it can be used as it is. Most calls take this path.
    fn sound(&self, peer: PublicKey) -> Option<Arc<Link>> {
        match &*self.lock().by_key.get(&peer)?.opening.as_ref()?.borrow() {
            Opening::Open(link) if link.is_sound() => Some(link.clone()),
            _ => None,
        }
    }

    /// Returns the existing connection or the dial in progress, or starts a dial.
    fn opening(&self, peer: PublicKey) -> Result<watch::Receiver<Opening>, CallError> {
        let mut guard = self.lock();
        let peers = &mut *guard;
        let entry = peers.by_key.entry(peer).or_default();
        if let Some(opening) = &entry.opening {
            let of_use = match &*opening.borrow() {
                Opening::Dialling => true,
                Opening::Open(link) => !link.is_out_of_use(),
                Opening::Failed(_) => false,
            };
            if of_use {
                return Ok(opening.clone());
            }
        }
        entry.retire();
        let now = Instant::now();
        if entry.rest.is_some_and(|rest| now < rest) {
            return Err(CallError::Unreachable { peer });
        }
        let (state, opening) = watch::channel(Opening::Dialling);
        entry.opening = Some(opening.clone());
        peers.sweep(now);
        drop(guard);
        let dial = Dial { transport: self.transport.clone(), peer, peers: self.peers.clone(), state };
        let dial = dial.run(self.connect_within);
        self.spawn(dial);
        Ok(opening)
    }

    /// Returns this node's public key.
    pub(super) fn public_key(&self) -> PublicKey {
        self.transport.public_key()
    }

    /// Runs a task as long as a handle to the client exists.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(work).await });
    }

    /// Forgets the failed dials to a peer, so that the next call dials at once.
    pub(super) fn forgive(&self, peer: PublicKey) {
        if let Some(peer) = self.lock().by_key.get_mut(&peer) {
            (peer.backoff, peer.rest) = (None, None);
        }
    }

    pub(super) fn disconnect(&self, peer: PublicKey) {
        let known = self.lock().by_key.remove(&peer);
        if let Some(peer) = known {
            peer.close();
        }
    }

    /// Notices pauses of this process. A call that begins right after one notices it as well.
    pub(super) async fn watch_for_pauses(&self) {
        self.pauses.begin();
        loop {
            time::sleep(pauses::BEAT).await;
            self.note_pause();
        }
    }

    /// Ends the watch. Without a beat, any two calls would seem to have a pause between them.
    pub(super) fn watch_no_more(&self) {
        self.pauses.end();
    }

    fn note_pause(&self) {
        if let Some(stopped) = self.pauses.take() {
            warn!(secs = stopped.as_secs(), "this process was stopped for a while, connections are checked");
            self.suspect_all();
        }
    }

    /// Makes the next call to each peer ping it first.
    fn suspect_all(&self) {
        for peer in self.lock().by_key.values() {
            if let Some(opening) = &peer.opening
                && let Opening::Open(link) = &*opening.borrow()
            {
                link.suspicion.raise();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Peers> {
        lock(&self.peers)
    }
}

impl Peers {
    /// Removes idle peers from time to time. Keys come from topics, to which anyone may write, so their number must be
    /// bounded.
    fn sweep(&mut self, now: Instant) {
        if self.by_key.len() > self.sweep_at.max(PEERS_SWEPT_AT) {
            self.by_key.retain(|_, peer| !peer.is_idle(now));
            self.sweep_at = self.by_key.len() * 2;
        }
    }
}

fn lock(peers: &Mutex<Peers>) -> MutexGuard<'_, Peers> {
    peers.lock()
}

/// A dial in progress.
struct Dial {
    transport: Arc<dyn Transport>,
    peer: PublicKey,
    peers: Arc<Mutex<Peers>>,
    state: watch::Sender<Opening>,
}

impl Dial {
    /// Opens the connection and tells the waiters. The dial continues if they give up, so that each of them does not
    /// start a slow dial anew.
    async fn run(self, within: Duration) {
        let outcome = match time::timeout(within, self.transport.connect(self.peer)).await {
            Ok(outcome) => outcome.map_err(CallError::from),
            Err(_) => Err(CallError::Unreachable { peer: self.peer }),
        };
        self.note(&outcome);
        self.state.send_replace(match outcome {
            Ok(connection) => Opening::Open(Arc::new(Link::over(connection))),
            Err(error) => Opening::Failed(error),
        });
    }

    /// Records the outcome: a success ends the backoff, and a failure lengthens it.
    fn note(&self, outcome: &Result<Arc<dyn Connection>, CallError>) {
        let mut peers = lock(&self.peers);
        let own = self.state.subscribe();
        let is_own = |entry: &&mut Peer| entry.opening.as_ref().is_some_and(|opening| opening.same_channel(&own));
        match (outcome, peers.by_key.get_mut(&self.peer).filter(is_own)) {
            (Ok(_), Some(entry)) => (entry.backoff, entry.rest) = (None, None),
            // If the peer was disconnected meanwhile, the connection is not wanted.
            (Ok(connection), None) => connection.close(),
            (Err(error), Some(entry)) => {
                let seed = backoff::seed_of([self.transport.public_key(), self.peer]);
                let backoff = entry.backoff.get_or_insert_with(|| Backoff::new(BACKOFF, BACKOFF_MAX, seed));
                let wait = backoff.next_wait();
                entry.rest = Some(Instant::now() + wait);
                debug!(peer = self.peer.short(), %error, ?wait, "no connection");
            }
            (Err(_), None) => {}
        }
    }
}
