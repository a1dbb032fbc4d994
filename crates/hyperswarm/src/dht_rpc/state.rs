//! Everything a node decides: whom it knows, whom it asks again, what it answers.
//!
//! Pure: time and datagrams come in, datagrams and jobs go out. [`DhtRpc`](super::DhtRpc) acts on them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::congestion::{Congestion, SLOT};
use super::message::{
    DELAYED_PING, DOWN_HINT, FIND_NODE, INVALID_TOKEN, Id, PING, PING_NAT, Request, Response, UNKNOWN_COMMAND, node_id,
};
use super::nat_sampler::NatSampler;
use super::rate_limit::RateLimit;
use super::routing_table::{Insertion, K, RoutingTable, TableNode};
use super::timeouts::Timeouts;
use super::tokens::Tokens;
use super::walk::DownHint;
use super::{Config, DhtReply, DhtRequestError, reachable};
use crate::compact_encoding::{Decoder, Encoder};
use crate::udx::Socket;

/// How often a node looks after its table.
pub(super) const TICK: Duration = Duration::from_secs(5);
/// Some five minutes without a query.
const REFRESH_TICKS: u64 = 60;
/// A node asked within the last minute need not be asked again.
const RECENT_TICKS: u64 = 12;
/// Half an hour: a node that lasted so long will probably last longer.
const OLD_TICKS: u64 = 360;

const REQUESTS_MAX: usize = 8_192;
const WAITING_MAX: usize = 2_048;
const CHECKS_MAX: usize = 10;
const REPINGS_MAX: usize = 3;
const DOWN_HINTS_PER_TICK: usize = 50;
const DELAYED_PINGS_MAX: usize = 256;
const PING_DELAY_MAX: Duration = Duration::from_secs(10);
const REMEMBERED_MAX: usize = 64;
const RETRIES: u8 = 3;

/// The socket that a datagram comes from or goes to.
#[derive(Debug, Clone)]
pub(super) enum Via {
    /// The one that a node behind a firewall talks from.
    Client,
    /// The one that anyone can reach, where there is no firewall.
    Server,
    /// One that somebody lent for a request.
    Other(Socket),
}

impl Via {
    fn is_server(&self) -> bool {
        matches!(self, Self::Server)
    }
}

/// A datagram to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) via: Via,
    pub(super) to: SocketAddrV4,
    pub(super) bytes: Bytes,
}

/// What a query hears of its requests.
#[derive(Debug)]
pub(super) enum Step {
    Late(SocketAddrV4),
    Answered(SocketAddrV4, DhtReply),
    Failed(SocketAddrV4),
}

/// Who wants to know how a request ends.
#[derive(Debug)]
pub(super) enum Waiter {
    Nobody,
    Call(oneshot::Sender<Result<DhtReply, DhtRequestError>>),
    Walk(mpsc::UnboundedSender<Step>),
    /// The table: lets the node go unless it is heard.
    Check(Id),
    /// The table: lets the new node have the old one's place unless that is heard.
    Swap(Id, Box<TableNode>),
}

impl Waiter {
    fn is_gone(&self) -> bool {
        match self {
            Self::Call(sender) => sender.is_closed(),
            Self::Walk(sender) => sender.is_closed(),
            Self::Nobody | Self::Check(_) | Self::Swap(..) => false,
        }
    }
}

/// A request of this node.
#[derive(Debug)]
pub(super) struct Outbound<'a> {
    pub(super) to: SocketAddrV4,
    pub(super) internal: bool,
    pub(super) command: u64,
    pub(super) target: Option<Id>,
    pub(super) token: Option<Id>,
    pub(super) value: Option<&'a [u8]>,
    pub(super) via: Option<Via>,
    pub(super) retries: Option<u8>,
    pub(super) timeout: Option<Duration>,
    pub(super) waiter: Waiter,
}

impl Outbound<'_> {
    pub(super) fn internal(command: u64, to: SocketAddrV4, waiter: Waiter) -> Self {
        Self {
            to,
            internal: true,
            command,
            target: None,
            token: None,
            value: None,
            via: None,
            retries: None,
            timeout: None,
            waiter,
        }
    }
}

#[derive(Debug)]
struct Inflight {
    to: SocketAddrV4,
    via: Via,
    bytes: Bytes,
    internal: bool,
    copies: u8,
    retries: u8,
    timeout: Option<Duration>,
    sent: Instant,
    deadline: Option<Instant>,
    waiter: Waiter,
}

/// What only tasks can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// Walk towards an id, to meet nodes.
    Refresh(Id),
    /// Find out whether others can reach this node.
    CheckNetwork,
}

/// How to answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer<'a> {
    pub(super) error: u64,
    pub(super) value: Option<&'a [u8]>,
    pub(super) token: bool,
    pub(super) closer_nodes: bool,
}

/// A request that the table itself has no answer to.
#[derive(Debug)]
pub(super) struct Foreign {
    pub(super) from_id: Option<Id>,
    pub(super) local_id: Option<Id>,
}

pub(super) struct State {
    pub(super) table: RoutingTable,
    pub(super) sampler: NatSampler,
    tokens: Tokens,
    congestion: Congestion,
    timeouts: Timeouts,
    limit: RateLimit,

    server_port: u16,
    pub(super) firewalled: bool,
    pub(super) ephemeral: bool,
    pub(super) bootstrapped: bool,
    pub(super) stopped: bool,
    /// Whether the node is to last, however it is reached.
    forced: bool,
    adaptive: bool,
    bootstrap: Vec<SocketAddrV4>,
    known: Vec<SocketAddrV4>,
    /// Nodes that were in the table once, for when nobody else is left.
    remembered: VecDeque<SocketAddrV4>,

    inflight: HashMap<u16, Inflight>,
    deadlines: BTreeSet<(Instant, u16)>,
    waiting: VecDeque<u16>,
    delayed: BTreeMap<(Instant, u64), (Via, SocketAddrV4, u16)>,
    delayed_count: u64,
    chance: Chance,

    tick: u64,
    next_tick: Instant,
    next_slot: Instant,
    refresh_ticks: u64,
    stable_ticks: u64,
    stable_ticks_max: u64,
    checks: usize,
    repings: usize,
    down_hints: usize,
    is_refreshing: bool,
    is_checking: bool,
    passing_samples: HashSet<SocketAddrV4>,
    checked_host: Option<std::net::Ipv4Addr>,

    pub(super) outbox: Vec<Outgoing>,
    pub(super) jobs: Vec<Job>,
    /// Whether the next deadline is nearer than the one that was asked for.
    pub(super) hurry: bool,
    asked_deadline: Instant,
}

/// Draws numbers from a stock, so that not every one costs a call to the system.
struct Chance {
    stock: [u8; 256],
    left: usize,
    refill: fn() -> [u8; 256],
}

impl Chance {
    fn draw(&mut self) -> u64 {
        if self.left < 8 {
            self.stock = (self.refill)();
            self.left = self.stock.len();
        }
        self.left -= 8;
        let bytes = self.stock[self.left..self.left + 8].try_into().expect("there are eight bytes");
        u64::from_le_bytes(bytes)
    }

    fn bytes(&mut self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.draw().to_le_bytes()));
        bytes
    }
}

impl State {
    pub(super) fn new(config: &Config, server: SocketAddrV4, now: Instant, refill: fn() -> [u8; 256]) -> Self {
        let mut chance = Chance { stock: [0; 256], left: 0, refill };
        let own = reachable(server);
        let is_another = |node: &SocketAddrV4| *node != server && *node != own;
        let stable_ticks = (config.stable_after.as_millis() / TICK.as_millis()).max(1) as u64;
        let mut state = Self {
            table: RoutingTable::new(chance.bytes()),
            sampler: NatSampler::default(),
            tokens: Tokens::new(chance.bytes(), chance.bytes(), now),
            congestion: Congestion::new(config.window_max),
            timeouts: Timeouts::default(),
            limit: RateLimit::new(config.requests_per_second, config.requests_burst, chance.bytes(), now),
            server_port: server.port(),
            firewalled: config.firewalled,
            ephemeral: true,
            bootstrapped: false,
            stopped: false,
            forced: config.ephemeral == Some(false),
            adaptive: config.ephemeral.is_none(),
            bootstrap: config.bootstrap.iter().copied().filter(is_another).collect(),
            known: config.known_nodes.iter().copied().filter(is_another).take(REMEMBERED_MAX).collect(),
            remembered: VecDeque::new(),
            inflight: HashMap::new(),
            deadlines: BTreeSet::new(),
            waiting: VecDeque::new(),
            delayed: BTreeMap::new(),
            delayed_count: 0,
            // Nodes that start together must not all be busy at the same ticks.
            tick: 50 + chance.draw() % 50,
            refresh_ticks: REFRESH_TICKS / 2 + chance.draw() % (REFRESH_TICKS / 2),
            next_tick: now + TICK,
            next_slot: now + SLOT,
            stable_ticks,
            stable_ticks_max: stable_ticks,
            checks: 0,
            repings: 0,
            down_hints: 0,
            is_refreshing: false,
            is_checking: false,
            passing_samples: HashSet::new(),
            checked_host: None,
            outbox: Vec::new(),
            jobs: Vec::new(),
            hurry: false,
            asked_deadline: now,
            chance,
        };
        if let Some(public) = config.known_public_address(server) {
            state.sampler.add(public);
            if state.forced && !state.firewalled {
                state.become_persistent(public);
            }
        }
        state
    }

    /// Returns the socket that this node talks from.
    pub(super) fn via(&self) -> Via {
        if self.firewalled { Via::Client } else { Via::Server }
    }

    pub(super) fn id(&self) -> Option<Id> {
        (!self.ephemeral).then(|| *self.table.id())
    }

    pub(super) fn remote_address(&self) -> Option<SocketAddrV4> {
        self.sampler.host_and_port().filter(|address| !self.firewalled && address.port() == self.server_port)
    }

    /// Returns nodes that have lasted, for another start.
    pub(super) fn routing_nodes(&self) -> Vec<SocketAddrV4> {
        self.table.latest().map(|node| node.address).take(REMEMBERED_MAX).collect()
    }

    /// Returns where a walk that knows too few nodes may begin as well.
    pub(super) fn entry_nodes(&self) -> Vec<SocketAddrV4> {
        let mut nodes = self.bootstrap.clone();
        if self.table.len() < K / 4 {
            nodes.extend(self.known.iter().chain(&self.remembered));
        }
        nodes
    }

    pub(super) fn failed_lately(&self, node: SocketAddrV4, now: Instant) -> bool {
        self.timeouts.failed_lately(node, now)
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.inflight.len() < 3
    }

    pub(super) fn postpone_refresh(&mut self) {
        self.refresh_ticks = REFRESH_TICKS;
    }

    // Requests of this node.

    /// Sends a request, or lets it wait its turn. The waiter hears how it ends, unless this fails.
    pub(super) fn request(&mut self, outbound: Outbound<'_>, now: Instant) -> Result<(), DhtRequestError> {
        if self.stopped {
            return Err(DhtRequestError::Stopped);
        }
        if self.inflight.len() >= REQUESTS_MAX || self.waiting.len() >= WAITING_MAX {
            return Err(DhtRequestError::Busy);
        }
        let mut tid = self.chance.draw() as u16;
        while self.inflight.contains_key(&tid) {
            tid = tid.wrapping_add(1);
        }
        let via = outbound.via.unwrap_or_else(|| self.via());
        let request = Request {
            tid,
            to: outbound.to,
            id: self.id().filter(|_| via.is_server()),
            token: outbound.token,
            internal: outbound.internal,
            command: outbound.command,
            target: outbound.target,
            value: outbound.value,
        };
        let mut bytes = Vec::with_capacity(128 + outbound.value.map_or(0, <[u8]>::len));
        request.encode(&mut bytes);
        let inflight = Inflight {
            to: outbound.to,
            via,
            bytes: bytes.into(),
            internal: outbound.internal,
            copies: 0,
            retries: outbound.retries.unwrap_or(RETRIES),
            timeout: outbound.timeout,
            sent: now,
            deadline: None,
            waiter: outbound.waiter,
        };
        self.inflight.insert(tid, inflight);
        if self.congestion.is_full() {
            self.waiting.push_back(tid);
        } else {
            self.send_copy(tid, now);
        }
        Ok(())
    }

    /// Tells nodes that ones they named are down, so many per tick.
    pub(super) fn hint(&mut self, hints: Vec<DownHint>, now: Instant) {
        for hint in hints {
            if self.down_hints >= DOWN_HINTS_PER_TICK {
                return;
            }
            self.down_hints += 1;
            let mut value = Vec::with_capacity(6);
            value.write_ipv4(hint.down);
            let outbound = Outbound::internal(DOWN_HINT, hint.to, Waiter::Nobody);
            // A hint that finds no room is not missed.
            let _ = self.request(Outbound { value: Some(&value), ..outbound }, now);
        }
    }

    fn send_copy(&mut self, tid: u16, now: Instant) {
        let Some(inflight) = self.inflight.get_mut(&tid) else { return };
        inflight.copies += 1;
        inflight.sent = now;
        let copies = inflight.copies.into();
        let timeout = inflight.timeout.unwrap_or_else(|| self.timeouts.timeout(inflight.to, copies, now));
        let deadline = now + timeout;
        inflight.deadline = Some(deadline);
        self.deadlines.insert((deadline, tid));
        self.hurry |= deadline < self.asked_deadline;
        self.congestion.sent();
        self.outbox.push(Outgoing { via: inflight.via.clone(), to: inflight.to, bytes: inflight.bytes.clone() });
    }

    fn send_waiting(&mut self, now: Instant) {
        while !self.congestion.is_full() {
            let Some(tid) = self.waiting.pop_front() else { return };
            if self.inflight.get(&tid).is_some_and(|inflight| inflight.waiter.is_gone()) {
                self.inflight.remove(&tid);
            } else {
                self.send_copy(tid, now);
            }
        }
    }

    fn take_inflight(&mut self, tid: u16) -> Option<Inflight> {
        let inflight = self.inflight.remove(&tid)?;
        if let Some(deadline) = inflight.deadline {
            self.deadlines.remove(&(deadline, tid));
            self.congestion.settled();
        }
        Some(inflight)
    }

    // Time.

    /// Returns when [`State::on_time`] has to be called next.
    pub(super) fn next_deadline(&mut self) -> Instant {
        let first = self.deadlines.first().map(|(at, _)| *at);
        let delayed = self.delayed.first_key_value().map(|((at, _), _)| *at);
        let next = [first, delayed].into_iter().flatten().fold(self.next_slot.min(self.next_tick), Instant::min);
        self.asked_deadline = next;
        self.hurry = false;
        next
    }

    /// Does what is due.
    pub(super) fn on_time(&mut self, now: Instant) {
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
            self.answer(&via, to, tid, None, Answer { error: 0, value: None, token: false, closer_nodes: false });
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

    fn on_timeout(&mut self, tid: u16, now: Instant) {
        let Some(inflight) = self.inflight.get_mut(&tid) else { return };
        inflight.deadline = None;
        if inflight.waiter.is_gone() {
            self.inflight.remove(&tid);
            self.congestion.settled();
            return;
        }
        if let Waiter::Walk(steps) = &inflight.waiter {
            let _ = steps.send(Step::Late(inflight.to));
        }
        if inflight.copies <= inflight.retries {
            self.send_copy(tid, now);
            return;
        }
        let inflight = self.inflight.remove(&tid).expect("it was there just now");
        self.congestion.settled();
        // Only the node itself answers its own commands; others depend on peers behind it.
        if inflight.internal || matches!(inflight.waiter, Waiter::Walk(_)) {
            self.timeouts.failed(inflight.to, now);
            self.forget(&node_id(inflight.to));
        }
        match inflight.waiter {
            Waiter::Nobody => {}
            Waiter::Call(sender) => drop(sender.send(Err(DhtRequestError::Timeout))),
            Waiter::Walk(steps) => drop(steps.send(Step::Failed(inflight.to))),
            Waiter::Check(_) => self.checks -= 1,
            Waiter::Swap(_, new) => {
                self.repings -= 1;
                self.add_node(*new, now);
            }
        }
        self.send_waiting(now);
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
                let host = self.sampler.address().map(|address| address.host);
                // A network that was found wanting need not be asked again.
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
        // A node that knows nobody looks for company at once, one that knows few soon.
        let is_alone = self.table.is_empty() && !self.entry_nodes().is_empty();
        let knows_few = self.tick.is_multiple_of(64) && self.table.len() < K;
        if self.refresh_ticks == 0 || is_alone || knows_few {
            self.refresh_ticks = REFRESH_TICKS;
            let random = self.chance.draw();
            let target = self.table.pick(random).map_or(*self.table.id(), |node| node.id);
            self.start(Job::Refresh(target));
        }
    }

    fn start(&mut self, job: Job) {
        let is_running = match job {
            Job::Refresh(_) => &mut self.is_refreshing,
            Job::CheckNetwork => &mut self.is_checking,
        };
        if !std::mem::replace(is_running, true) {
            self.jobs.push(job);
        }
    }

    /// Notes that a job is done and may be started again.
    pub(super) fn finished(&mut self, job: Job) {
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

    /// Asks a node for a sign of life; it leaves the table without one.
    fn check(&mut self, id: &Id, now: Instant) {
        let tick = self.tick;
        let Some(node) = self.table.get_mut(id) else { return };
        node.pinged = tick;
        let address = node.address;
        if self.request(Outbound::internal(PING, address, Waiter::Check(*id)), now).is_ok() {
            self.checks += 1;
        }
    }

    // Datagrams.

    /// Takes a response: whoever waits for it hears of it.
    pub(super) fn on_response(
        &mut self,
        via: &Via,
        from: SocketAddrV4,
        response: Response<'_>,
        bytes: &Bytes,
        now: Instant,
    ) {
        // The Node package goes by the number alone. No honest node answers from another address.
        if self.inflight.get(&response.tid).is_none_or(|inflight| inflight.to != from) {
            return;
        }
        let Some(inflight) = self.take_inflight(response.tid) else { return };
        let rtt = now.saturating_duration_since(inflight.sent);
        if inflight.copies <= 2 && inflight.timeout.is_none() {
            self.timeouts.answered(from, rtt, now);
        }
        let from_id = response.id.filter(|id| *id == node_id(from));
        self.hear(via, from, from_id, response.to, now);
        let reply = DhtReply {
            from,
            from_id,
            to: response.to,
            on_server_socket: via.is_server(),
            rtt,
            token: response.token,
            closer_nodes: response.closer_nodes.into_iter().filter(|node| is_plausible(*node, from)).collect(),
            error: response.error,
            value: response.value.map(|value| bytes.slice_ref(value)),
        };
        match inflight.waiter {
            Waiter::Nobody => {}
            Waiter::Call(sender) => drop(sender.send(Ok(reply))),
            Waiter::Walk(steps) => drop(steps.send(Step::Answered(inflight.to, reply))),
            Waiter::Check(id) => {
                self.checks -= 1;
                // It answers, but no longer as a lasting node.
                if from_id != Some(id) {
                    self.forget(&id);
                }
            }
            Waiter::Swap(old, new) => {
                self.repings -= 1;
                if from_id != Some(old) {
                    self.forget(&old);
                    self.add_node(*new, now);
                }
            }
        }
        self.send_waiting(now);
    }

    /// Takes a request. Answers it, unless that is the handler's to do.
    pub(super) fn on_request(
        &mut self,
        via: &Via,
        from: SocketAddrV4,
        request: &Request<'_>,
        now: Instant,
    ) -> Option<Foreign> {
        if self.stopped || from.port() == 0 || !self.limit.allows(from, now) {
            return None;
        }
        let from_id = request.id.filter(|id| *id == node_id(from));
        if from_id.is_some() {
            self.hear(via, from, from_id, request.to, now);
        }
        if request.token.is_some_and(|token| !self.tokens.accepts(&token, *from.ip())) {
            let answer = Answer { error: INVALID_TOKEN, value: None, token: true, closer_nodes: true };
            self.answer(via, from, request.tid, request.target, answer);
            return None;
        }
        if !request.internal {
            return Some(Foreign { from_id, local_id: self.id() });
        }
        let pong = Answer { error: 0, value: None, token: false, closer_nodes: false };
        let mut value = Decoder::new(request.value.unwrap_or_default());
        match request.command {
            PING => self.answer(via, from, request.tid, None, pong),
            PING_NAT => {
                if let Some(port) = value.u16().ok().filter(|port| *port != 0) {
                    self.answer(via, SocketAddrV4::new(*from.ip(), port), request.tid, None, pong);
                }
            }
            FIND_NODE => {
                if request.target.is_some() {
                    self.answer(via, from, request.tid, request.target, Answer { closer_nodes: true, ..pong });
                }
            }
            DOWN_HINT => {
                if let Ok(down) = value.ipv4() {
                    self.on_down_hint(down, now);
                    self.answer(via, from, request.tid, None, pong);
                }
            }
            DELAYED_PING => {
                let delay = value.u32().map(|millis| Duration::from_millis(millis.into()));
                if let Ok(delay) = delay
                    && delay <= PING_DELAY_MAX
                    && self.delayed.len() < DELAYED_PINGS_MAX
                {
                    self.delayed_count += 1;
                    self.hurry |= now + delay < self.asked_deadline;
                    self.delayed.insert((now + delay, self.delayed_count), (via.clone(), from, request.tid));
                }
            }
            _ => {
                let answer = Answer { error: UNKNOWN_COMMAND, closer_nodes: true, ..pong };
                self.answer(via, from, request.tid, request.target, answer);
            }
        }
        None
    }

    fn on_down_hint(&mut self, down: SocketAddrV4, now: Instant) {
        let (id, tick) = (node_id(down), self.tick);
        if self.checks >= CHECKS_MAX {
            return;
        }
        if let Some(node) = self.table.get_mut(&id)
            && (node.pinged < tick || node.down_hints == 0)
        {
            node.down_hints += 1;
            self.check(&id, now);
        }
    }

    /// Sends a response.
    pub(super) fn answer(&mut self, via: &Via, to: SocketAddrV4, tid: u16, target: Option<Id>, answer: Answer<'_>) {
        let closer_nodes = match target {
            Some(target) if answer.closer_nodes => {
                self.table.closest(&target, K).into_iter().map(|node| node.address).collect()
            }
            _ => Vec::new(),
        };
        let response = Response {
            tid,
            to,
            id: self.id().filter(|_| via.is_server()),
            token: answer.token.then(|| self.tokens.issue(*to.ip())),
            closer_nodes,
            error: answer.error,
            value: answer.value,
        };
        let mut bytes = Vec::with_capacity(256 + answer.value.map_or(0, <[u8]>::len));
        response.encode(&mut bytes);
        self.outbox.push(Outgoing { via: via.clone(), to, bytes: bytes.into() });
    }

    /// Sends a request on to another node, under the number that its sender gave it.
    pub(super) fn forward(&mut self, via: &Via, request: Request<'_>) {
        let id = self.id().filter(|_| via.is_server());
        let to = request.to;
        let mut bytes = Vec::with_capacity(128 + request.value.map_or(0, <[u8]>::len));
        Request { id, token: None, ..request }.encode(&mut bytes);
        self.outbox.push(Outgoing { via: via.clone(), to, bytes: bytes.into() });
    }

    // The table.

    /// Notes that a node was heard, and what it says about this one's address.
    fn hear(&mut self, via: &Via, from: SocketAddrV4, from_id: Option<Id>, to: SocketAddrV4, now: Instant) {
        let tick = self.tick;
        let Some(id) = from_id else {
            // A few samples of nodes that do not last are taken: the first nodes of a network are such.
            if self.passing_samples.len() < self.bootstrap.len().max(1) && self.passing_samples.insert(from) {
                self.sampler.add(to);
            }
            return;
        };
        let is_expected = via.is_server() != self.firewalled && !matches!(via, Via::Other(_));
        if let Some(node) = self.table.get_mut(&id) {
            if is_expected && node.sampled.is_none_or(|sampled| tick - sampled >= OLD_TICKS) {
                node.to = Some(to);
                node.sampled = Some(tick);
                self.sampler.add(to);
            }
            self.table.touch(&id, tick);
        } else {
            self.add_node(TableNode::new(id, from, Some(to), tick), now);
        }
    }

    fn add_node(&mut self, mut node: TableNode, now: Instant) {
        let tick = self.tick;
        (node.added, node.pinged, node.seen) = (tick, tick, tick);
        let sample = node.to.filter(|_| node.sampled.is_none());
        let mut added = node.clone();
        added.sampled = sample.map(|_| tick).or(node.sampled);
        match self.table.insert(added) {
            Insertion::Added => sample.into_iter().for_each(|to| self.sampler.add(to)),
            Insertion::Full => self.on_full_row(node, now),
            Insertion::Known => {}
        }
    }

    /// A full row keeps its nodes, as long as the one heard longest ago still answers.
    fn on_full_row(&mut self, new: TableNode, now: Instant) {
        if !self.bootstrapped || self.repings >= REPINGS_MAX {
            return;
        }
        let tick = self.tick;
        let candidates = self.table.row(&new.id).iter().filter(|node| node.pinged != tick);
        let Some(oldest) = candidates.min_by_key(|node| (node.pinged, node.added)) else { return };
        if tick - oldest.pinged < RECENT_TICKS && tick - oldest.added > OLD_TICKS {
            return;
        }
        let (id, address) = (oldest.id, oldest.address);
        self.table.get_mut(&id).into_iter().for_each(|node| node.pinged = tick);
        let outbound = Outbound::internal(PING, address, Waiter::Swap(id, Box::new(new)));
        if self.request(outbound, now).is_ok() {
            self.repings += 1;
        }
    }

    fn forget(&mut self, id: &Id) {
        if let Some(node) = self.table.remove(id) {
            self.remembered.retain(|known| *known != node.address);
            self.remembered.push_back(node.address);
            if self.remembered.len() > REMEMBERED_MAX {
                self.remembered.pop_front();
            }
        }
    }

    // What others see of this node.

    /// Returns up to five nodes that can tell whether this one can be reached.
    pub(super) fn witnesses(&self) -> Vec<SocketAddrV4> {
        let mut nodes: Vec<_> = self.table.latest().take(5).map(|node| node.address).collect();
        if nodes.len() < 5 {
            nodes.extend(self.bootstrap.iter().filter(|node| !nodes.contains(node)).copied().collect::<Vec<_>>());
        }
        nodes
    }

    /// Takes the word of witnesses that reached the server socket, if it is enough. Says whether there is no firewall.
    pub(super) fn on_witnesses(&mut self, asked: usize, seen: &[SocketAddrV4]) -> bool {
        let mut sampler = NatSampler::default();
        for address in seen {
            sampler.add(*address);
        }
        let enough = if asked >= 5 { 3 } else { 1 };
        let Some(address) = sampler.host_and_port() else { return false };
        // A port that is mapped to another one cannot be told to others, who would take it from the node's id.
        let is_open = seen.len() >= enough
            && self.sampler.address().is_some_and(|own| own.host == *address.ip())
            && address.port() == self.server_port;
        if is_open {
            self.firewalled = false;
            self.passing_samples.clear();
            self.sampler = sampler;
        }
        is_open
    }

    /// Makes the node a lasting part of the table, if its address is certain.
    pub(super) fn settle_identity(&mut self) -> bool {
        match self.sampler.host_and_port() {
            Some(address) if !self.firewalled && self.ephemeral => {
                self.become_persistent(address);
                true
            }
            _ => false,
        }
    }

    fn become_persistent(&mut self, address: SocketAddrV4) {
        self.ephemeral = false;
        let id = node_id(address);
        if *self.table.id() != id {
            self.table.move_to(id);
            if self.bootstrapped {
                self.start(Job::Refresh(id));
            }
        }
    }

    /// Ends all requests.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.deadlines.clear();
        self.waiting.clear();
        self.delayed.clear();
        for (_, inflight) in self.inflight.drain() {
            match inflight.waiter {
                Waiter::Call(sender) => drop(sender.send(Err(DhtRequestError::Stopped))),
                Waiter::Walk(steps) => drop(steps.send(Step::Failed(inflight.to))),
                Waiter::Nobody | Waiter::Check(_) | Waiter::Swap(..) => {}
            }
        }
    }
}

/// Returns whether a node may have named this one in good faith.
fn is_plausible(node: SocketAddrV4, named_by: SocketAddrV4) -> bool {
    let ip = node.ip();
    node.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_broadcast()
        && (!ip.is_loopback() || named_by.ip().is_loopback())
}

#[cfg(test)]
mod tests;
