//! Dispatches the requests of other nodes to the servers, the router or the store.

use std::collections::HashMap;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::commands::{PEER_HANDSHAKE, PEER_HOLEPUNCH};
use super::persistent::{Limits, Store};
use super::records::Peer;
use super::router::{Decision, Origin, Router, Target};
use super::server::Incoming;
use crate::crypto::{PublicKey, random};
use crate::dht_rpc::{DhtRequest, Handler, Id, ReplyOptions, UNKNOWN_COMMAND};

/// Passes handshakes to the servers of this node or forwards them, and leaves other requests to the store.
pub(super) struct RequestHandler {
    router: Mutex<Router>,
    store: Mutex<Store>,
    servers: Mutex<HashMap<Target, mpsc::Sender<Incoming>>>,
}

impl RequestHandler {
    pub(super) fn new(limits: Limits) -> Self {
        let store = Store::new(limits, u64::from_le_bytes(random()));
        Self { router: Mutex::default(), store: Mutex::new(store), servers: Mutex::default() }
    }

    pub(super) fn router(&self) -> MutexGuard<'_, Router> {
        self.router.lock()
    }

    /// Registers `inbox` for the handshakes of a target. Returns `false` if another server has the target.
    pub(super) fn open(&self, target: Target, server: PublicKey, inbox: mpsc::Sender<Incoming>) -> bool {
        // The record of a server has its key and no addresses, because the node that returns the record is a relay.
        let record = [server.as_bytes().as_slice(), &[0]].concat();
        let is_new = self.router().add_server(target, record.into());
        if is_new {
            self.servers().insert(target, inbox);
        }
        is_new
    }

    /// Stops passing on the handshakes of a target.
    pub(super) fn close(&self, target: &Target) {
        self.router().remove_server(target);
        self.servers().remove(target);
    }

    /// Returns whether a server of this node has a target.
    pub(super) fn serves(&self, target: &Target) -> bool {
        self.servers().contains_key(target)
    }

    fn servers(&self) -> MutexGuard<'_, HashMap<Target, mpsc::Sender<Incoming>>> {
        self.servers.lock()
    }

    fn on_handshake(&self, request: DhtRequest) {
        let (Some(target), Some(value)) = (request.target, request.value.clone()) else { return };
        let origin = Origin { from: request.from, tid: request.tid };
        let decision = self.router().on_handshake(&target, &value, origin, Instant::now());
        let Decision::Serve { noise, back } = decision else { return act(&request, decision) };
        let noise = value.slice_ref(noise);
        if let Some(inbox) = self.servers().get(&target) {
            // If the server cannot keep up, it responds to the next copy that the client sends.
            let _ = inbox.try_send(Incoming { noise, back, request });
        }
    }

    /// Lets the store respond. Returns `false` if it does not: the node is not persistent, or the command is unknown.
    fn is_kept(&self, request: &DhtRequest) -> bool {
        let mut store = self.store.lock();
        store.on_request(request, &mut self.router(), Instant::now())
    }

    /// Returns the peers that announced a topic to this node.
    pub(super) fn peers(&self, topic: &Id) -> Vec<Peer> {
        self.store.lock().peers(topic, Instant::now())
    }

    fn on_holepunch(&self, request: &DhtRequest) {
        let (Some(target), Some(value)) = (request.target, request.value.as_deref()) else { return };
        let origin = Origin { from: request.from, tid: request.tid };
        let decision = self.router().on_holepunch(&target, value, origin, Instant::now());
        act(request, decision);
    }
}

impl Handler for RequestHandler {
    fn on_request(&self, request: DhtRequest) {
        match request.command {
            PEER_HANDSHAKE => self.on_handshake(request),
            PEER_HOLEPUNCH => self.on_holepunch(&request),
            _ if self.is_kept(&request) => {}
            _ => request.error(UNKNOWN_COMMAND),
        }
    }
}

/// Carries out the decision about a request.
pub(super) fn act(request: &DhtRequest, decision: Decision<'_>) {
    match decision {
        Decision::Forward { value, to } => request.relay(&value, to),
        Decision::Respond { value, to } => {
            request.reply_with(Some(&value), &ReplyOptions { to: Some(to), ..ReplyOptions::bare() });
        }
        Decision::PointCloser => {
            request.reply_with(None, &ReplyOptions { without_token: true, ..ReplyOptions::default() });
        }
        Decision::Serve { .. } | Decision::Drop => {}
    }
}
