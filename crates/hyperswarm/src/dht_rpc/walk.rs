//! Decides which node a query asks next, and when it has come close enough to the target.
//!
//! Does no I/O: [`Query`](super::Query) sends the requests that this module chooses.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddrV4;

use super::DhtReply;
use super::message::{Id, node_id};
use super::routing_table::{K, distance};

/// No honest walk visits this many nodes. A walk through dishonest ones is cut short.
pub(super) const NODES_MAX: usize = 400;

/// After this many timeouts a walk no longer waits for a node, once another one has responded.
const TIMEOUTS_PATIENT: u32 = 2;

/// The state of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Some nodes have not responded yet.
    Waiting,
    /// Too few of the nodes that the walk started from responded; it needs others.
    NeedsNodes,
    /// No node is left that is worth asking.
    Done,
}

/// A hint to a node that another node, which it returned, does not respond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DownHint {
    /// The node that returned the other one.
    pub(super) to: SocketAddrV4,
    /// The node that is down.
    pub(super) down: SocketAddrV4,
}

/// A search for the nodes closest to a target.
#[derive(Debug)]
pub(super) struct Walk {
    target: Id,
    /// The node that walks. It is never asked.
    own: Option<Id>,
    concurrency: usize,
    /// The nodes to ask, closest first.
    pending: BTreeMap<Id, SocketAddrV4>,
    met: HashMap<SocketAddrV4, Met>,
    closest: Vec<(Id, DhtReply)>,
    asked: usize,
    slow: usize,
    patient: usize,
    answered: usize,
    refused: usize,
    /// Whether the walk started from the results of an earlier one, which get a head start.
    is_narrow: bool,
    hints: Vec<DownHint>,
}

#[derive(Debug)]
enum Met {
    /// To be asked or already asked, with the nodes that returned it.
    Named(Vec<SocketAddrV4>),
    /// Asked, and late by this many timeouts, with the nodes that returned it.
    Late(Vec<SocketAddrV4>, u32),
    Answered,
    Down,
}

impl Walk {
    /// Makes a walk without nodes.
    pub(super) fn new(target: Id, own: Option<Id>, concurrency: usize, is_narrow: bool) -> Self {
        Self {
            target,
            own,
            concurrency,
            pending: BTreeMap::new(),
            met: HashMap::new(),
            closest: Vec::with_capacity(K + 1),
            asked: 0,
            slow: 0,
            patient: 0,
            answered: 0,
            refused: 0,
            is_narrow,
            hints: Vec::new(),
        }
    }

    /// Adds a node to ask, if it could be close enough.
    pub(super) fn add(&mut self, node: SocketAddrV4) {
        self.name(node, None);
    }

    /// Adds a node that another node returned. Returns whether it could be close enough.
    fn name(&mut self, node: SocketAddrV4, named_by: Option<SocketAddrV4>) -> bool {
        let id = node_id(node);
        if self.own == Some(id) {
            return true;
        }
        let distance = distance(&self.target, &id);
        let could_be = self.is_closer(&distance);
        let has_room = self.met.len() < NODES_MAX;
        match self.met.get_mut(&node) {
            Some(Met::Named(named) | Met::Late(named, _)) => {
                named.extend(named_by.filter(|_| named.len() < K));
            }
            Some(Met::Down) => self.hints.extend(named_by.map(|to| DownHint { to, down: node })),
            None if could_be && has_room => {
                self.met.insert(node, Met::Named(named_by.into_iter().collect()));
                self.pending.insert(distance, node);
            }
            Some(Met::Answered) | None => {}
        }
        could_be
    }

    /// Returns how many nodes are waiting to be asked.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Changes how many nodes are asked at once.
    pub(super) fn set_concurrency(&mut self, concurrency: usize) {
        self.concurrency = concurrency;
    }

    /// Widens a walk that started narrow, after the nodes of the routing table were added.
    pub(super) fn widen(&mut self) {
        self.is_narrow = false;
    }

    /// Returns the next node to ask now.
    pub(super) fn next(&mut self) -> Option<SocketAddrV4> {
        // An earlier walk's results are likely to be the same, so the other nodes wait for them a moment.
        let is_starting = self.is_narrow && self.answered + self.refused < self.concurrency;
        let concurrency = if is_starting && self.asked >= 3 { 3 } else { self.concurrency };
        while self.asked < concurrency + self.slow {
            let (distance, node) = self.pending.pop_first()?;
            if self.is_closer(&distance) {
                self.asked += 1;
                return Some(node);
            }
            // The nodes still pending are farther away.
            self.pending.clear();
        }
        None
    }

    /// Handles the response of a node.
    pub(super) fn answered(&mut self, node: SocketAddrV4, reply: &DhtReply) {
        self.settle(node, Met::Answered);
        if reply.error == 0 {
            self.answered += 1;
        } else {
            self.refused += 1;
        }
        if let Some(id) = reply.from_id.filter(|_| reply.error == 0) {
            self.keep(distance(&self.target, &id), reply);
        }
        // They come closest first, so if one is too far, the rest are too.
        for closer in reply.closer_nodes.iter().take(K) {
            if !self.name(*closer, Some(node)) {
                break;
            }
        }
    }

    /// Records that a node is late: the timeout of one copy of the request passed.
    pub(super) fn late(&mut self, node: SocketAddrV4) {
        let Some(met) = self.met.get_mut(&node) else { return };
        match met {
            Met::Named(named) => {
                *met = Met::Late(std::mem::take(named), 1);
                self.slow += 1;
            }
            Met::Late(_, times) => {
                *times += 1;
                if *times == TIMEOUTS_PATIENT {
                    self.patient += 1;
                }
            }
            Met::Answered | Met::Down => {}
        }
    }

    /// Records that a node is not worth waiting for, because it recently failed to respond.
    pub(super) fn suspect(&mut self, node: SocketAddrV4) {
        for _ in 0..TIMEOUTS_PATIENT {
            self.late(node);
        }
    }

    /// Records that a node did not respond.
    pub(super) fn failed(&mut self, node: SocketAddrV4) {
        self.refused += 1;
        if let Some(Met::Named(named) | Met::Late(named, _)) = self.settle(node, Met::Down) {
            self.hints.extend(named.into_iter().map(|to| DownHint { to, down: node }));
        }
    }

    /// Records that a node could not be asked.
    pub(super) fn skipped(&mut self, node: SocketAddrV4) {
        self.refused += 1;
        self.settle(node, Met::Answered);
    }

    /// Takes the hints for nodes that returned others which are down.
    pub(super) fn take_hints(&mut self) -> Vec<DownHint> {
        std::mem::take(&mut self.hints)
    }

    /// Returns whether the walk goes on. First ask every node that [`next`](Self::next) returns.
    pub(super) fn progress(&self) -> Progress {
        let late_but_enough = self.asked == self.slow && self.closest.len() >= K;
        let hopeless_but_some = self.asked == self.patient && self.answered > 0;
        if !self.pending.is_empty() || !(self.asked == 0 || late_but_enough || hopeless_but_some) {
            return Progress::Waiting;
        }
        if self.is_narrow && self.answered < K / 4 { Progress::NeedsNodes } else { Progress::Done }
    }

    /// Returns the closest nodes that responded, closest first.
    pub(super) fn into_closest(self) -> Vec<DhtReply> {
        self.closest.into_iter().map(|(_, reply)| reply).collect()
    }

    fn is_closer(&self, distance: &Id) -> bool {
        self.closest.len() < K || self.closest.last().is_some_and(|(farthest, _)| distance < farthest)
    }

    fn keep(&mut self, distance: Id, reply: &DhtReply) {
        if let Err(index) = self.closest.binary_search_by(|(other, _)| other.cmp(&distance))
            && index < K
        {
            self.closest.insert(index, (distance, reply.clone()));
            self.closest.truncate(K);
        }
    }

    fn settle(&mut self, node: SocketAddrV4, as_: Met) -> Option<Met> {
        self.asked = self.asked.saturating_sub(1);
        let before = self.met.insert(node, as_);
        if let Some(Met::Late(_, times)) = &before {
            self.slow -= 1;
            self.patient -= usize::from(*times >= TIMEOUTS_PATIENT);
        }
        before
    }
}

#[cfg(test)]
mod tests;
