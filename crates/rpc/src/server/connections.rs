//! Limits the connections that peers open, in total and per peer.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use protocol::PublicKey;
use tokio_util::sync::CancellationToken;

/// The open connections, within their limits.
pub(super) struct Connections {
    limit: usize,
    per_peer: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// The connections of each peer, oldest first.
    by_peer: HashMap<PublicKey, Vec<Held>>,
    count: usize,
    next_id: u64,
}

struct Held {
    id: u64,
    calls: Arc<AtomicUsize>,
    give_way: CancellationToken,
}

/// Permits one connection within the limits, until it is dropped.
pub(super) struct ConnectionPermit {
    connections: Arc<Connections>,
    peer: PublicKey,
    id: u64,
    calls: Arc<AtomicUsize>,
    give_way: CancellationToken,
}

/// Counts as a call in progress on a connection until it is dropped.
pub(super) struct CallMark(Arc<AtomicUsize>);

impl Connections {
    pub(super) fn new(limit: usize, per_peer: usize) -> Arc<Self> {
        Arc::new(Self { limit, per_peer: per_peer.max(1), table: Mutex::default() })
    }

    /// Permits a connection. A peer with too many connections loses its oldest one without calls, which may be
    /// dead without anyone having noticed.
    pub(super) fn enter(self: &Arc<Self>, peer: PublicKey) -> Option<ConnectionPermit> {
        let mut guard = self.lock();
        let table = &mut *guard;
        let of_peer = table.by_peer.entry(peer).or_default();
        if of_peer.len() >= self.per_peer {
            let idle = of_peer.iter().position(|held| held.calls.load(Ordering::Relaxed) == 0)?;
            of_peer.remove(idle).give_way.cancel();
            table.count -= 1;
        } else if table.count >= self.limit {
            if of_peer.is_empty() {
                table.by_peer.remove(&peer);
            }
            return None;
        }
        let id = table.next_id;
        table.next_id += 1;
        table.count += 1;
        let (calls, give_way) = (Arc::<AtomicUsize>::default(), CancellationToken::new());
        of_peer.push(Held { id, calls: calls.clone(), give_way: give_way.clone() });
        Some(ConnectionPermit { connections: self.clone(), peer, id, calls, give_way })
    }

    fn leave(&self, peer: PublicKey, id: u64) {
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(of_peer) = table.by_peer.get_mut(&peer) else { return };
        // A connection that was replaced has been removed already.
        if let Some(position) = of_peer.iter().position(|held| held.id == id) {
            of_peer.remove(position);
            table.count -= 1;
        }
        if of_peer.is_empty() {
            table.by_peer.remove(&peer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

impl ConnectionPermit {
    /// Waits until another connection of the peer takes this permit.
    pub(super) async fn given_away(&self) {
        self.give_way.cancelled().await;
    }

    /// Counts a call in progress.
    pub(super) fn call(&self) -> CallMark {
        self.calls.fetch_add(1, Ordering::Relaxed);
        CallMark(self.calls.clone())
    }

    /// Returns whether no call is in progress.
    pub(super) fn is_idle(&self) -> bool {
        self.calls.load(Ordering::Relaxed) == 0
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.connections.leave(self.peer, self.id);
    }
}

impl Drop for CallMark {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_too_many_connections_loses_its_oldest_idle_one() {
        let connections = Connections::new(10, 2);
        let peer = PublicKey([1; 32]);
        let first = connections.enter(peer).expect("room");
        let second = connections.enter(peer).expect("room");
        let call = first.call();
        let third = connections.enter(peer).expect("the second gives way");
        assert!(second.give_way.is_cancelled() && !first.give_way.is_cancelled());
        let busy = third.call();
        assert!(connections.enter(peer).is_none(), "both have calls");
        drop((call, busy, second));
        connections.enter(peer).expect("the first gives way");
        assert!(first.give_way.is_cancelled());
        drop((first, third));
        let table = connections.lock();
        assert_eq!((table.count, table.by_peer.len()), (0, 0));
    }

    #[test]
    fn there_are_no_more_connections_than_the_limit() {
        let connections = Connections::new(2, 2);
        let held: Vec<_> = (1..=2).map(|seed| connections.enter(PublicKey([seed; 32])).expect("room")).collect();
        assert!(connections.enter(PublicKey([3; 32])).is_none());
        assert_eq!(connections.lock().by_peer.len(), 2, "nothing is remembered of those turned away");
        drop(held);
        connections.enter(PublicKey([3; 32])).expect("room again");
    }
}
