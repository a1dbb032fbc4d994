//! Other nodes' requests, and this node's responses.

use std::net::SocketAddrV4;
use std::time::Duration;

use tokio::time::Instant;

use super::{Effect, Outgoing, State, Via};
use crate::compact_encoding::Decoder;
use crate::dht_rpc::message::{
    DELAYED_PING, DOWN_HINT, FIND_NODE, INVALID_TOKEN, Id, PING, PING_NAT, Request, Response, UNKNOWN_COMMAND, node_id,
};
use crate::dht_rpc::routing_table::K;

const CHECKS_MAX: usize = 10;
const DELAYED_PINGS_MAX: usize = 256;
const PING_DELAY_MAX: Duration = Duration::from_secs(10);

/// How to respond.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::dht_rpc) struct Answer<'a> {
    pub(in crate::dht_rpc) error: u64,
    pub(in crate::dht_rpc) value: Option<&'a [u8]>,
    pub(in crate::dht_rpc) token: bool,
    pub(in crate::dht_rpc) closer_nodes: bool,
    /// Whether the request had a valid token, so that the response goes to whoever sent it.
    pub(in crate::dht_rpc) is_verified: bool,
}

/// A request that goes to the handler.
#[derive(Debug)]
pub(in crate::dht_rpc) struct Foreign {
    pub(in crate::dht_rpc) from_id: Option<Id>,
    pub(in crate::dht_rpc) local_id: Option<Id>,
}

impl State {
    /// Handles a request, whose datagram has this many bytes. Returns it if the handler has to respond to it.
    pub(in crate::dht_rpc) fn on_request(
        &mut self,
        via: &Via,
        from: SocketAddrV4,
        request: &Request<'_>,
        bytes: usize,
        now: Instant,
    ) -> Option<Foreign> {
        if self.stopped || from.port() == 0 || !self.limit.allows(from, now) {
            return None;
        }
        self.replies.receive(*from.ip(), bytes, now);
        let from_id = request.id.filter(|id| *id == node_id(from));
        if let Some(id) = &from_id {
            self.greet(via, from, id, now);
        }
        if request.token.is_some_and(|token| !self.tokens.accepts(&token, *from.ip())) {
            let answer = Answer { error: INVALID_TOKEN, token: true, closer_nodes: true, ..Answer::default() };
            self.answer(via, from, request.tid, request.target, answer, now);
            return None;
        }
        if !request.internal {
            return Some(Foreign { from_id, local_id: self.id() });
        }
        let pong = Answer { is_verified: request.token.is_some(), ..Answer::default() };
        let mut value = Decoder::new(request.value.unwrap_or_default());
        match request.command {
            PING => self.answer(via, from, request.tid, None, pong, now),
            PING_NAT => {
                if let Some(port) = value.u16().ok().filter(|port| *port != 0) {
                    self.answer(via, SocketAddrV4::new(*from.ip(), port), request.tid, None, pong, now);
                }
            }
            FIND_NODE => {
                if request.target.is_some() {
                    self.answer(via, from, request.tid, request.target, Answer { closer_nodes: true, ..pong }, now);
                }
            }
            DOWN_HINT => {
                if let Ok(down) = value.ipv4() {
                    self.on_down_hint(down, now);
                    self.answer(via, from, request.tid, None, pong, now);
                }
            }
            DELAYED_PING => {
                let delay = value.u32().map(|millis| Duration::from_millis(millis.into()));
                if let Ok(delay) = delay
                    && delay <= PING_DELAY_MAX
                    && self.delayed.len() < DELAYED_PINGS_MAX
                {
                    self.delayed_count += 1;
                    self.delayed.insert((now + delay, self.delayed_count), (via.clone(), from, request.tid));
                    self.wake_by(now + delay);
                }
            }
            _ => {
                let answer = Answer { error: UNKNOWN_COMMAND, closer_nodes: true, ..pong };
                self.answer(via, from, request.tid, request.target, answer, now);
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

    /// Sends a response. If its receiver has not proven its address and was sent too much, the response asks for a
    /// token instead, which is no longer than a request, or is left out.
    pub(in crate::dht_rpc) fn answer(
        &mut self,
        via: &Via,
        to: SocketAddrV4,
        tid: u16,
        target: Option<Id>,
        answer: Answer<'_>,
        now: Instant,
    ) {
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
        if !answer.is_verified && !self.replies.spend(*to.ip(), bytes.len(), now) {
            let token = Some(self.tokens.issue(*to.ip()));
            bytes.clear();
            let closer_nodes = Vec::new();
            Response { tid, to, id: None, token, closer_nodes, error: INVALID_TOKEN, value: None }.encode(&mut bytes);
            if !self.replies.spend(*to.ip(), bytes.len(), now) {
                return;
            }
        }
        self.effects.push(Effect::Send(Outgoing { via: via.clone(), to, bytes: bytes.into() }));
    }

    /// Forwards a request to another node, under the transaction id of its sender.
    pub(in crate::dht_rpc) fn forward(&mut self, via: &Via, request: Request<'_>) {
        let id = self.id().filter(|_| via.is_server());
        let to = request.to;
        let mut bytes = Vec::with_capacity(128 + request.value.map_or(0, <[u8]>::len));
        Request { id, token: None, ..request }.encode(&mut bytes);
        self.effects.push(Effect::Send(Outgoing { via: via.clone(), to, bytes: bytes.into() }));
    }
}
