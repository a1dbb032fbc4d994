//! What is due with time: the table is kept, walks are begun, silent nodes are let go.

use std::net::SocketAddrV4;

use tokio::time::Instant;

use super::requests::{Outbound, Waiter};
use super::{Answer, Effect, Job, REFRESH_TICKS, REMEMBERED_MAX, State, TICK, Via};
use crate::dht_rpc::congestion::SLOT;
use crate::dht_rpc::message::{Id, PING};
use crate::dht_rpc::routing_table::{Insertion, K, TableNode};

/// A node that was pinged within the last minute is not pinged again.
const RECENT_TICKS: u64 = 12;
/// Half an hour. A node that has lasted this long will probably last longer.
const OLD_TICKS: u64 = 360;
const REPINGS_MAX: usize = 3;
/// The length of a ping with an id.
const PING_BYTES: usize = 43;
/// How many nodes that sent a request are pinged at once, in all and of one host. The others are when they ask again.
const GREETINGS_MAX: usize = 16;
const GREETINGS_PER_HOST_MAX: usize = 2;

impl State {
    /// Returns when [`State::on_time`] has to be called next.
    pub(in crate::dht_rpc) fn next_deadline(&mut self) -> Instant {
        let first = self.deadlines.first().map(|(at, _)| *at);
        let delayed = self.delayed.first_key_value().map(|((at, _), _)| *at);
        let next = [first, delayed].into_iter().flatten().fold(self.next_slot.min(self.next_tick), Instant::min);
        self.asked_deadline = next;
        next
    }

    /// Has [`State::on_time`] called by then.
    pub(super) fn wake_by(&mut self, deadline: Instant) {
        if deadline < self.asked_deadline {
            self.asked_deadline = deadline;
            self.effects.push(Effect::Reschedule);
        }
    }

    /// Handles everything that is due.
    pub(in crate::dht_rpc) fn on_time(&mut self, now: Instant) {
        while let Some((at, tid)) = self.deadlines.first().copied()
            && at <= now
        {
            self.deadlines.pop_first();
            self.on_timeout(tid, now);
        }
        while let Some(entry) = self.delayed.first_entry()
            && entry.key().0 <= now
        {
            let (via, to, tid) = entry.remove();
            self.answer(&via, to, tid, None, Answer::default(), now);
        }
        if self.next_slot <= now {
            self.next_slot = now + SLOT;
            self.tokens.rotate(now, || self.chance.bytes());
            self.congestion.next_slot();
            self.send_waiting(now);
        }
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.on_tick(now);
        }
    }

    fn on_tick(&mut self, now: Instant) {
        self.tick += 1;
        self.down_hints = 0;
        if !self.bootstrapped {
            return;
        }
        if self.ephemeral && (self.adaptive || self.forced) {
            self.stable_ticks = self.stable_ticks.saturating_sub(1);
            if self.forced {
                self.start(Job::CheckNetwork);
            } else if self.stable_ticks == 0 {
                self.stable_ticks = 3 * self.stable_ticks_max;
                let host = self.own_address().map(|address| address.host);
                // A network that failed the check is not checked again.
                if host != self.checked_host {
                    self.checked_host = host;
                    self.start(Job::CheckNetwork);
                }
            }
        }
        if self.tick.is_multiple_of(8) {
            self.ping_some(now);
        }
        self.refresh_ticks = self.refresh_ticks.saturating_sub(1);
        // A node that knows no other node refreshes at once, one that knows few does so soon.
        let is_alone = self.table.is_empty() && !self.entry_nodes().is_empty();
        let knows_few = self.tick.is_multiple_of(64) && self.table.len() < K;
        if self.refresh_ticks == 0 || is_alone || knows_few {
            self.refresh_ticks = REFRESH_TICKS;
            let random = self.chance.draw();
            let target = self.table.pick(random).map_or(*self.table.id(), |node| node.id);
            self.start(Job::Refresh(target));
        }
    }

    pub(super) fn start(&mut self, job: Job) {
        let is_running = match job {
            Job::Refresh(_) => &mut self.is_refreshing,
            Job::CheckNetwork => &mut self.is_checking,
        };
        if !std::mem::replace(is_running, true) {
            self.effects.push(Effect::Start(job));
        }
    }

    /// Records that a job is done, so that it can be started again.
    pub(in crate::dht_rpc) fn finished(&mut self, job: Job) {
        match job {
            Job::Refresh(_) => self.is_refreshing = false,
            Job::CheckNetwork => self.is_checking = false,
        }
    }

    fn ping_some(&mut self, now: Instant) {
        let tick = self.tick;
        let mut count = if self.inflight.len() > 2 { 3 } else { 5 };
        let Some(oldest) = self.table.oldest().next() else { return };
        if tick - oldest.pinged < RECENT_TICKS {
            count = 2;
        }
        let ids: Vec<Id> =
            self.table.oldest().take(count).filter(|node| node.pinged != tick).map(|node| node.id).collect();
        for id in ids {
            self.check(&id, now);
        }
    }

    /// Pings a node, which is removed from the table if it does not respond.
    pub(super) fn check(&mut self, id: &Id, now: Instant) {
        let tick = self.tick;
        let Some(node) = self.table.get_mut(id) else { return };
        node.pinged = tick;
        let address = node.address;
        if self.request(Outbound::internal(PING, address, Waiter::Check(*id)), now).is_ok() {
            self.checks += 1;
        }
    }

    /// Pings a node that sent a request, if the table has space for it. It enters the table when it responds. Until
    /// then the source may be forged, and this node tells others of the nodes in its table.
    pub(super) fn greet(&mut self, via: &Via, from: SocketAddrV4, id: &Id, now: Instant) {
        let is_known = *id == *self.table.id() || self.table.get(id).is_some();
        let has_place = self.table.row(id).len() < K || self.swap_candidate(id).is_some();
        if is_known || !has_place {
            return;
        }
        let of_host = self.greetings.iter().filter(|greeted| greeted.ip() == from.ip()).count();
        // Every node of a test network runs on this host.
        let is_busy = of_host >= GREETINGS_PER_HOST_MAX && !from.ip().is_loopback();
        if is_busy || self.greetings.len() >= GREETINGS_MAX || self.congestion.is_full() {
            return;
        }
        // One copy goes out, and counts as a response: a forged source must not be sent more than was sent in its name.
        if !self.replies.spend(*from.ip(), PING_BYTES, now) {
            return;
        }
        let ping = Outbound::internal(PING, from, Waiter::Greeting);
        let ping = Outbound { via: Some(via.clone()), retries: Some(0), ..ping };
        if self.greetings.insert(from) && self.request(ping, now).is_err() {
            self.greetings.remove(&from);
        }
    }

    /// Records that a node responded, and the address that it reports for this node.
    pub(super) fn hear(&mut self, via: &Via, from: SocketAddrV4, from_id: Option<Id>, to: SocketAddrV4, now: Instant) {
        let tick = self.tick;
        let Some(id) = from_id else {
            // A few samples from ephemeral nodes count too, because the first nodes of a network are ephemeral.
            if self.passing_samples.len() < self.bootstrap.len().max(1) && self.passing_samples.insert(from) {
                self.sampler.add(*from.ip(), to);
            }
            return;
        };
        let is_expected = via.is_server() != self.firewalled && !matches!(via, Via::Other(_));
        if let Some(node) = self.table.get_mut(&id) {
            if is_expected && node.sampled.is_none_or(|sampled| tick - sampled >= OLD_TICKS) {
                node.to = Some(to);
                node.sampled = Some(tick);
                self.sampler.add(*from.ip(), to);
            }
            self.table.touch(&id, tick);
        } else {
            self.add_node(TableNode::new(id, from, Some(to), tick), now);
        }
    }

    pub(super) fn add_node(&mut self, mut node: TableNode, now: Instant) {
        let tick = self.tick;
        (node.added, node.pinged, node.seen) = (tick, tick, tick);
        let host = *node.address.ip();
        let sample = node.to.filter(|_| node.sampled.is_none());
        let mut added = node.clone();
        added.sampled = sample.map(|_| tick).or(node.sampled);
        match self.table.insert(added) {
            Insertion::Added => sample.into_iter().for_each(|to| self.sampler.add(host, to)),
            Insertion::Full => self.on_full_row(node, now),
            Insertion::Known => {}
        }
    }

    /// Returns the node that a new one in this full row may replace: the least recently pinged one, unless it has
    /// lasted.
    fn swap_candidate(&self, new: &Id) -> Option<&TableNode> {
        if !self.bootstrapped || self.repings >= REPINGS_MAX {
            return None;
        }
        let candidates = self.table.row(new).iter().filter(|node| node.pinged != self.tick);
        let oldest = candidates.min_by_key(|node| (node.pinged, node.added))?;
        let is_lasting = self.tick - oldest.pinged < RECENT_TICKS && self.tick - oldest.added > OLD_TICKS;
        (!is_lasting).then_some(oldest)
    }

    /// A full row keeps its nodes as long as the least recently pinged one still responds.
    fn on_full_row(&mut self, new: TableNode, now: Instant) {
        let tick = self.tick;
        let Some(oldest) = self.swap_candidate(&new.id) else { return };
        let (id, address) = (oldest.id, oldest.address);
        self.table.get_mut(&id).into_iter().for_each(|node| node.pinged = tick);
        let outbound = Outbound::internal(PING, address, Waiter::Swap(id, Box::new(new)));
        if self.request(outbound, now).is_ok() {
            self.repings += 1;
        }
    }

    pub(super) fn forget(&mut self, id: &Id) {
        if let Some(node) = self.table.remove(id) {
            self.remembered.retain(|known| *known != node.address);
            self.remembered.push_back(node.address);
            if self.remembered.len() > REMEMBERED_MAX {
                self.remembered.pop_front();
            }
        }
    }

    /// Returns nodes that have lasted, to be passed to the next start.
    pub(in crate::dht_rpc) fn routing_nodes(&self) -> Vec<SocketAddrV4> {
        self.table.latest().map(|node| node.address).take(REMEMBERED_MAX).collect()
    }

    /// Returns further nodes to start from, for a walk that knows too few.
    pub(in crate::dht_rpc) fn entry_nodes(&self) -> Vec<SocketAddrV4> {
        let mut nodes = self.bootstrap.clone();
        if self.table.len() < K / 4 {
            nodes.extend(self.known.iter().chain(&self.remembered));
        }
        nodes
    }

    pub(in crate::dht_rpc) fn failed_lately(&self, node: SocketAddrV4, now: Instant) -> bool {
        self.timeouts.failed_lately(node, now)
    }

    pub(in crate::dht_rpc) fn is_quiet(&self) -> bool {
        self.inflight.len() < 3
    }

    pub(in crate::dht_rpc) fn postpone_refresh(&mut self) {
        self.refresh_ticks = REFRESH_TICKS;
    }
}
