//! Makes every decision of a node: which nodes it keeps, which it pings again, how it responds.
//!
//! Pure: takes time and datagrams, and returns [`Effect`]s. The node carries out those of one decision in order; those
//! of two threads may mix.

mod answers;
mod identity;
mod maintenance;
mod requests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use self::requests::Inflight;
use super::aging_map::AgingMap;
use super::congestion::{Congestion, SLOT};
use super::message::{Id, Token};
use super::nat_sampler::NatSampler;
use super::rate_limit::RateLimit;
use super::reply_budget::ReplyBudget;
use super::routing_table::RoutingTable;
use super::timeouts::Timeouts;
use super::tokens::Tokens;
use super::{Config, DhtReply, DhtRequestError, reachable};
use crate::udx::Socket;

pub(super) use self::answers::Answer;
pub(super) use self::requests::{CallId, Outbound, Step, WALK_STEPS, Waiter, WalkId};

/// The interval of routing table maintenance.
pub(super) const TICK: Duration = Duration::from_secs(5);
/// The table is refreshed after about five minutes without a query.
const REFRESH_TICKS: u64 = 60;

const REMEMBERED_MAX: usize = 64;

const KNOWN_TOKENS_MAX: usize = 4_096;
/// A node accepts its token for at least 7.5 seconds.
const KNOWN_TOKEN_AGE_MAX: Duration = Duration::from_secs(7);

/// The socket that a datagram arrives at or leaves from.
#[derive(Debug, Clone)]
pub(super) enum Via {
    /// The socket that a firewalled node sends from.
    Client,
    /// The socket that anyone can reach if the node is not firewalled.
    Server,
    /// A socket that a caller lent for a request.
    Other(Socket),
}

impl Via {
    fn is_server(&self) -> bool {
        matches!(self, Self::Server)
    }
}

/// What a decision leads to.
#[derive(Debug)]
pub(super) enum Effect {
    Send(Outgoing),
    /// A call has ended.
    Complete(CallId, Result<DhtReply, DhtRequestError>),
    /// A request of a walk got further.
    Step(WalkId, Step),
    Start(Job),
    /// The next deadline is nearer than the one that [`State::next_deadline`] returned last.
    Reschedule,
}

/// A datagram to send.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) via: Via,
    pub(super) to: SocketAddrV4,
    pub(super) bytes: Bytes,
}

/// Work that only tasks can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// Walk towards an id to find nodes.
    Refresh(Id),
    /// Check whether others can reach this node.
    CheckNetwork,
}

pub(super) struct State {
    pub(super) table: RoutingTable,
    /// The configured address of this node, which no sample changes.
    configured_address: Option<SocketAddrV4>,
    sampler: NatSampler,
    tokens: Tokens,
    congestion: Congestion,
    timeouts: Timeouts,
    limit: RateLimit,
    replies: ReplyBudget,
    /// The last tokens of other nodes.
    known_tokens: AgingMap<SocketAddrV4, Token>,

    server_port: u16,
    pub(super) firewalled: bool,
    pub(super) ephemeral: bool,
    pub(super) bootstrapped: bool,
    pub(super) stopped: bool,
    /// Whether the configuration asks for a persistent node, which need not prove stable first.
    forced: bool,
    adaptive: bool,
    bootstrap: Vec<SocketAddrV4>,
    known: Vec<SocketAddrV4>,
    /// Nodes that were in the table before, for when no other nodes are left.
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
    /// The nodes that sent a request and were pinged for it.
    greetings: HashSet<SocketAddrV4>,
    is_refreshing: bool,
    is_checking: bool,
    passing_samples: HashSet<SocketAddrV4>,
    checked_host: Option<Ipv4Addr>,

    pub(super) effects: Vec<Effect>,
    /// When [`State::on_time`] will be called next, as far as is known.
    asked_deadline: Instant,
}

/// Draws random numbers from a buffer, so that not every draw costs a system call.
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
            configured_address: config.configured_address(server),
            sampler: NatSampler::default(),
            tokens: Tokens::new(chance.bytes(), chance.bytes(), now),
            congestion: Congestion::new(config.window_max),
            timeouts: Timeouts::default(),
            limit: RateLimit::new(config.requests_per_second, config.requests_burst, chance.bytes(), now),
            replies: ReplyBudget::new(chance.bytes(), now),
            known_tokens: AgingMap::new(KNOWN_TOKENS_MAX, KNOWN_TOKEN_AGE_MAX),
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
            // Nodes that start at the same time must not all be busy at the same ticks.
            tick: 50 + chance.draw() % 50,
            refresh_ticks: REFRESH_TICKS / 2 + chance.draw() % (REFRESH_TICKS / 2),
            next_tick: now + TICK,
            next_slot: now + SLOT,
            stable_ticks,
            stable_ticks_max: stable_ticks,
            checks: 0,
            repings: 0,
            down_hints: 0,
            greetings: HashSet::new(),
            is_refreshing: false,
            is_checking: false,
            passing_samples: HashSet::new(),
            checked_host: None,
            effects: Vec::new(),
            asked_deadline: now,
            chance,
        };
        if let Some(first) = config.first_address(server) {
            state.sampler.add(Ipv4Addr::UNSPECIFIED, first);
        }
        if state.forced
            && !state.firewalled
            && let Some(own) = state.own_host_and_port()
        {
            state.become_persistent(own);
        }
        state
    }
}

#[cfg(test)]
mod tests;
