//! This node's requests: sent in a window, repeated, and settled by a response, a timeout or the end.

use std::net::SocketAddrV4;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Effect, Outgoing, State, Via};
use crate::compact_encoding::Encoder;
use crate::dht_rpc::message::{DOWN_HINT, INVALID_TOKEN, Id, Message, Request, Response, Token, node_id};
use crate::dht_rpc::routing_table::TableNode;
use crate::dht_rpc::walk::{DownHint, NODES_MAX};
use crate::dht_rpc::{DhtReply, DhtRequestError};

const REQUESTS_MAX: usize = 8_192;
pub(super) const WAITING_MAX: usize = 2_048;
const DOWN_HINTS_PER_TICK: usize = 50;
const RETRIES: u8 = 3;
/// The most steps of one walk: it asks each node once, whose every copy may be late, and which responds or fails.
pub(in crate::dht_rpc) const WALK_STEPS: usize = NODES_MAX * (RETRIES as usize + 2);

/// A request that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::dht_rpc) struct CallId(pub(in crate::dht_rpc) u64);

/// A walk that sends requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::dht_rpc) struct WalkId(pub(in crate::dht_rpc) u64);

/// A report to a query about one of its requests.
#[derive(Debug)]
pub(in crate::dht_rpc) enum Step {
    Late(SocketAddrV4),
    Answered(SocketAddrV4, DhtReply),
    Failed(SocketAddrV4),
}

/// Where the outcome of a request goes.
#[derive(Debug)]
pub(in crate::dht_rpc) enum Waiter {
    Nobody,
    Call(CallId),
    Walk(WalkId),
    /// The routing table: it takes the node in if the node responds.
    Greeting,
    /// The routing table: it removes the node unless the node responds.
    Check(Id),
    /// The routing table: it replaces the old node by the new one unless the old one responds.
    Swap(Id, Box<TableNode>),
}

/// A request that this node sends.
#[derive(Debug)]
pub(in crate::dht_rpc) struct Outbound<'a> {
    pub(in crate::dht_rpc) to: SocketAddrV4,
    pub(in crate::dht_rpc) internal: bool,
    pub(in crate::dht_rpc) command: u64,
    pub(in crate::dht_rpc) target: Option<Id>,
    pub(in crate::dht_rpc) token: Option<Id>,
    pub(in crate::dht_rpc) value: Option<&'a [u8]>,
    pub(in crate::dht_rpc) via: Option<Via>,
    pub(in crate::dht_rpc) retries: Option<u8>,
    pub(in crate::dht_rpc) timeout: Option<Duration>,
    pub(in crate::dht_rpc) waiter: Waiter,
}

impl Outbound<'_> {
    pub(in crate::dht_rpc) fn internal(command: u64, to: SocketAddrV4, waiter: Waiter) -> Self {
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
pub(super) struct Inflight {
    pub(super) to: SocketAddrV4,
    pub(super) via: Via,
    pub(super) bytes: Bytes,
    pub(super) internal: bool,
    pub(super) copies: u8,
    pub(super) retries: u8,
    pub(super) timeout: Option<Duration>,
    pub(super) sent: Instant,
    pub(super) deadline: Option<Instant>,
    pub(super) waiter: Waiter,
    /// Whether the request is sent once more if the node asks for a token. A caller that gave one may have signed it.
    pub(super) takes_token: bool,
    /// Whether the caller is gone: a response is taken, but no further copy is sent.
    pub(super) is_abandoned: bool,
}

impl State {
    /// Sends a request, or lets it wait its turn, and returns its number. The waiter hears how it ends, unless this
    /// fails.
    pub(in crate::dht_rpc) fn request(&mut self, outbound: Outbound<'_>, now: Instant) -> Result<u16, DhtRequestError> {
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
        // A request about a target may get a long response, and a token shows the node that its response is wanted.
        let known_token = outbound.target.and_then(|_| self.known_tokens.get(&outbound.to, now).copied());
        let request = Request {
            tid,
            to: outbound.to,
            id: self.id().filter(|_| via.is_server()),
            token: outbound.token.or(known_token),
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
            takes_token: outbound.token.is_none(),
            is_abandoned: false,
        };
        self.inflight.insert(tid, inflight);
        if self.congestion.is_full() {
            self.waiting.push_back(tid);
        } else {
            self.send_copy(tid, now);
        }
        Ok(tid)
    }

    /// Notes that nobody waits for a call any more.
    pub(in crate::dht_rpc) fn abandon_call(&mut self, tid: u16, call: CallId) {
        if let Some(inflight) = self.inflight.get_mut(&tid) {
            inflight.is_abandoned |= matches!(inflight.waiter, Waiter::Call(waiting) if waiting == call);
        }
    }

    /// Notes that nobody waits for a walk any more.
    pub(in crate::dht_rpc) fn abandon_walk(&mut self, walk: WalkId) {
        for inflight in self.inflight.values_mut() {
            inflight.is_abandoned |= matches!(inflight.waiter, Waiter::Walk(waiting) if waiting == walk);
        }
    }

    /// Reports nodes that are down to the nodes that returned them, up to a limit per tick.
    pub(in crate::dht_rpc) fn hint(&mut self, hints: Vec<DownHint>, now: Instant) {
        for hint in hints {
            if self.down_hints >= DOWN_HINTS_PER_TICK {
                return;
            }
            self.down_hints += 1;
            let mut value = Vec::with_capacity(6);
            value.write_ipv4(hint.down);
            let outbound = Outbound::internal(DOWN_HINT, hint.to, Waiter::Nobody);
            // A hint that does not fit is dropped; nobody depends on it.
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
        self.congestion.sent();
        let outgoing = Outgoing { via: inflight.via.clone(), to: inflight.to, bytes: inflight.bytes.clone() };
        self.effects.push(Effect::Send(outgoing));
        self.wake_by(deadline);
    }

    pub(super) fn send_waiting(&mut self, now: Instant) {
        while !self.congestion.is_full() {
            let Some(tid) = self.waiting.pop_front() else { return };
            if self.inflight.get(&tid).is_some_and(|inflight| inflight.is_abandoned) {
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

    /// Handles a response and passes it to the waiter of its request.
    pub(in crate::dht_rpc) fn on_response(
        &mut self,
        via: &Via,
        from: SocketAddrV4,
        response: Response<'_>,
        bytes: &Bytes,
        now: Instant,
    ) {
        // The Node package goes by the number alone. No honest node responds from another address.
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
        if let Some(token) = response.token {
            self.known_tokens.insert(from, token, now);
            if response.error == INVALID_TOKEN && inflight.takes_token && !inflight.is_abandoned {
                self.send_with_token(response.tid, inflight, token, now);
                return;
            }
        }
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
            Waiter::Call(call) => self.effects.push(Effect::Complete(call, Ok(reply))),
            Waiter::Walk(walk) => self.effects.push(Effect::Step(walk, Step::Answered(inflight.to, reply))),
            Waiter::Greeting => {
                self.greetings.remove(&inflight.to);
            }
            Waiter::Check(id) => {
                self.checks -= 1;
                // The node responds, but is no longer persistent.
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

    /// Sends a request again, with the token that the node asks for.
    fn send_with_token(&mut self, tid: u16, inflight: Inflight, token: Token, now: Instant) {
        let Ok(Message::Request(request)) = Message::decode(&inflight.bytes) else {
            unreachable!("these bytes were encoded here");
        };
        let mut bytes = Vec::with_capacity(inflight.bytes.len() + token.len());
        Request { token: Some(token), ..request }.encode(&mut bytes);
        self.inflight.insert(tid, Inflight { bytes: bytes.into(), takes_token: false, ..inflight });
        self.send_copy(tid, now);
    }

    pub(super) fn on_timeout(&mut self, tid: u16, now: Instant) {
        let Some(inflight) = self.inflight.get_mut(&tid) else { return };
        inflight.deadline = None;
        if inflight.is_abandoned {
            self.inflight.remove(&tid);
            self.congestion.settled();
            return;
        }
        if let Waiter::Walk(walk) = inflight.waiter {
            self.effects.push(Effect::Step(walk, Step::Late(inflight.to)));
        }
        if inflight.copies <= inflight.retries {
            self.send_copy(tid, now);
            return;
        }
        let inflight = self.inflight.remove(&tid).expect("it was there just now");
        self.congestion.settled();
        // Only the node itself responds to its own commands; others depend on peers behind it.
        if inflight.internal || matches!(inflight.waiter, Waiter::Walk(_)) {
            self.timeouts.failed(inflight.to, now);
            self.forget(&node_id(inflight.to));
        }
        match inflight.waiter {
            Waiter::Nobody => {}
            Waiter::Call(call) => self.effects.push(Effect::Complete(call, Err(DhtRequestError::Timeout))),
            Waiter::Walk(walk) => self.effects.push(Effect::Step(walk, Step::Failed(inflight.to))),
            Waiter::Greeting => {
                self.greetings.remove(&inflight.to);
            }
            Waiter::Check(_) => self.checks -= 1,
            Waiter::Swap(_, new) => {
                self.repings -= 1;
                self.add_node(*new, now);
            }
        }
        self.send_waiting(now);
    }

    /// Ends all requests.
    pub(in crate::dht_rpc) fn stop(&mut self) {
        self.stopped = true;
        self.deadlines.clear();
        self.waiting.clear();
        self.delayed.clear();
        for (_, inflight) in self.inflight.drain() {
            match inflight.waiter {
                Waiter::Call(call) => self.effects.push(Effect::Complete(call, Err(DhtRequestError::Stopped))),
                Waiter::Walk(walk) => self.effects.push(Effect::Step(walk, Step::Failed(inflight.to))),
                Waiter::Nobody | Waiter::Greeting | Waiter::Check(_) | Waiter::Swap(..) => {}
            }
        }
    }
}

/// Returns whether a node may have named this one in good faith.
pub(super) fn is_plausible(node: SocketAddrV4, named_by: SocketAddrV4) -> bool {
    let ip = node.ip();
    node.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_broadcast()
        && (!ip.is_loopback() || named_by.ip().is_loopback())
}
