//! Limits the connections that peers open: in total, those of strangers, and those of each peer.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};
use protocol::PublicKey;
use tokio_util::sync::CancellationToken;

use super::ServerLimits;

/// The open connections, within their limits.
pub(super) struct Connections {
    limit: usize,
    strangers: usize,
    per_peer: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// The connections of each peer, oldest first.
    by_peer: HashMap<PublicKey, Vec<Held>>,
    /// The ids of strangers' connections, oldest first.
    strangers: BTreeMap<u64, PublicKey>,
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
    pub(super) fn new(limits: &ServerLimits) -> Arc<Self> {
        let &ServerLimits { connections_max, strangers_connections_max, connections_per_peer_max, .. } = limits;
        Arc::new(Self {
            limit: connections_max,
            strangers: strangers_connections_max,
            per_peer: connections_per_peer_max.max(1),
            table: Mutex::default(),
        })
    }

    /// Permits a connection. A peer with too many connections loses its oldest one without calls, which may be
    /// dead without anyone having noticed. If there are too many connections of others, the oldest one of a stranger
    /// without calls is closed. A member never gives way to another peer.
    pub(super) fn enter(self: &Arc<Self>, peer: PublicKey, is_member: bool) -> Option<ConnectionPermit> {
        let mut guard = self.lock();
        let table = &mut *guard;
        if table.by_peer.get(&peer).is_some_and(|held| held.len() >= self.per_peer) {
            let idle = table.by_peer.get(&peer)?.iter().find(|held| held.is_idle())?.id;
            table.replace(peer, idle);
        } else if table.count >= self.limit || !is_member && table.strangers.len() >= self.strangers {
            let (idle, stranger) = table.oldest_idle_stranger()?;
            table.replace(stranger, idle);
        }
        let id = table.next_id;
        table.next_id += 1;
        table.count += 1;
        if !is_member {
            table.strangers.insert(id, peer);
        }
        let (calls, give_way) = (Arc::<AtomicUsize>::default(), CancellationToken::new());
        let held = Held { id, calls: calls.clone(), give_way: give_way.clone() };
        table.by_peer.entry(peer).or_default().push(held);
        Some(ConnectionPermit { connections: self.clone(), peer, id, calls, give_way })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

impl Table {
    fn oldest_idle_stranger(&self) -> Option<(u64, PublicKey)> {
        let is_idle = |id: u64, peer| self.by_peer.get(peer)?.iter().find(|held| held.id == id).map(Held::is_idle);
        let oldest = self.strangers.iter().find(|&(id, peer)| is_idle(*id, peer) == Some(true));
        oldest.map(|(id, peer)| (*id, *peer))
    }

    /// Removes a connection and requests that it closes.
    fn replace(&mut self, peer: PublicKey, id: u64) {
        if let Some(held) = self.remove(peer, id) {
            held.give_way.cancel();
        }
    }

    fn remove(&mut self, peer: PublicKey, id: u64) -> Option<Held> {
        let of_peer = self.by_peer.get_mut(&peer)?;
        let position = of_peer.iter().position(|held| held.id == id)?;
        let held = of_peer.remove(position);
        if of_peer.is_empty() {
            self.by_peer.remove(&peer);
        }
        self.strangers.remove(&id);
        self.count -= 1;
        Some(held)
    }
}

impl Held {
    fn is_idle(&self) -> bool {
        self.calls.load(Ordering::Relaxed) == 0
    }
}

impl ConnectionPermit {
    /// Waits until another connection takes this permit.
    pub(super) async fn given_away(&self) {
        self.give_way.cancelled().await;
    }

    /// Returns whether another connection has taken this permit.
    pub(super) fn is_given_away(&self) -> bool {
        self.give_way.is_cancelled()
    }

    /// Counts all connections of the peer as a member's from now on, because it has shown a certificate.
    pub(super) fn count_as_member(&self) {
        let mut guard = self.connections.lock();
        let Table { by_peer, strangers, .. } = &mut *guard;
        for held in by_peer.get(&self.peer).into_iter().flatten() {
            strangers.remove(&held.id);
        }
    }

    /// Returns whether the connection counts as a stranger's.
    pub(super) fn is_strangers(&self) -> bool {
        self.connections.lock().strangers.contains_key(&self.id)
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
        // A connection that was replaced has been removed already.
        self.connections.lock().remove(self.peer, self.id);
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

    fn connections(limit: usize, strangers: usize, per_peer: usize) -> Arc<Connections> {
        Connections::new(&ServerLimits {
            connections_max: limit,
            strangers_connections_max: strangers,
            connections_per_peer_max: per_peer,
            ..ServerLimits::default()
        })
    }

    fn peer(seed: u8) -> PublicKey {
        PublicKey([seed; 32])
    }

    #[test]
    fn a_peer_with_too_many_connections_loses_its_oldest_idle_one() {
        let connections = connections(10, 10, 2);
        let peer = peer(1);
        let first = connections.enter(peer, false).expect("room");
        let second = connections.enter(peer, false).expect("room");
        let call = first.call();
        let third = connections.enter(peer, false).expect("the second gives way");
        assert!(second.give_way.is_cancelled() && !first.give_way.is_cancelled());
        let busy = third.call();
        assert!(connections.enter(peer, false).is_none(), "both have calls");
        drop((call, busy, second));
        connections.enter(peer, false).expect("the first gives way");
        assert!(first.give_way.is_cancelled());
        drop((first, third));
        let table = connections.lock();
        assert_eq!((table.count, table.by_peer.len(), table.strangers.len()), (0, 0, 0));
    }

    #[test]
    fn there_are_no_more_connections_than_the_limit() {
        let connections = connections(2, 2, 2);
        let held: Vec<_> = (1..=2).map(|seed| connections.enter(peer(seed), true).expect("room")).collect();
        for is_member in [false, true] {
            assert!(connections.enter(peer(3), is_member).is_none(), "no member gives way");
        }
        assert_eq!(connections.lock().by_peer.len(), 2, "nothing is remembered of those turned away");
        drop(held);
        connections.enter(peer(3), false).expect("room again");
    }

    #[test]
    fn the_oldest_idle_stranger_gives_way_to_the_next() {
        let connections = connections(8, 3, 2);
        let held: Vec<_> = (1..=3).map(|seed| connections.enter(peer(seed), false).expect("room")).collect();
        let call = held[0].call();
        let next = connections.enter(peer(4), false).expect("the second gives way");
        let gone: Vec<bool> = held.iter().map(ConnectionPermit::is_given_away).collect();
        assert_eq!(gone, [false, true, false]);
        let busy = [held[2].call(), next.call()];
        assert!(connections.enter(peer(5), false).is_none(), "each stranger has a call");
        connections.enter(peer(6), true).expect("members have the rest");
        drop((call, busy));
    }

    #[test]
    fn members_take_what_strangers_leave_and_then_the_permits_of_idle_strangers() {
        let connections = connections(4, 3, 2);
        let strangers: Vec<_> = (1..=2).map(|seed| connections.enter(peer(seed), false).expect("room")).collect();
        let call = strangers[0].call();
        let members: Vec<_> = (3..=5).map(|seed| connections.enter(peer(seed), true).expect("room")).collect();
        assert!(!strangers[0].is_given_away() && strangers[1].is_given_away());
        assert!(connections.enter(peer(6), true).is_none(), "the stranger that is left has a call");
        drop(call);
        connections.enter(peer(6), true).expect("it has none any more");
        drop((strangers, members));
        assert_eq!(connections.lock().count, 0);
    }

    #[test]
    fn a_stranger_that_showed_its_certificate_no_longer_gives_way() {
        let connections = connections(8, 2, 2);
        let proven: Vec<_> = (0..2).map(|_| connections.enter(peer(1), false).expect("room")).collect();
        assert!(proven[1].is_strangers());
        proven[0].count_as_member();
        assert!(!proven[1].is_strangers(), "the certificate is the key's, on each of its connections");
        let strangers: Vec<_> = (2..=4).map(|seed| connections.enter(peer(seed), false).expect("room")).collect();
        assert!(proven.iter().all(|held| !held.is_given_away()));
        assert!(strangers[0].is_given_away() && !strangers[1].is_given_away());
    }
}
