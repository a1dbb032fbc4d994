//! The I/O of a node: sockets, timers and tasks around its [`State`].

use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, trace};

use super::incoming_request::DhtRequest;
use super::message::{Message, PING_NAT};
use super::query::{Query, QueryStream};
use super::state::{CallId, Effect, Job, Outbound, State, Step, Via, WALK_STEPS, Waiter, WalkId};
use super::{Call, DhtReply, DhtRequestError, Handler, RequestOptions};
use crate::udx::{Datagram, Socket};

/// How long a node that may be firewalled waits for a sign that it is not, in addition to four round trips.
const PROBE_GRACE: Duration = Duration::from_millis(50);

pub(super) struct Node {
    pub(super) client: Socket,
    pub(super) server: Socket,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) state: Mutex<State>,
    pub(super) waiting: Waiting,
    pub(super) concurrency: usize,
    pub(super) quick_firewall: bool,
    pub(super) forced: bool,
    pub(super) hurry: Notify,
    pub(super) bootstrapped: watch::Sender<bool>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// The callers that wait for requests to end. Each is removed when it is dropped.
#[derive(Default)]
pub(super) struct Waiting {
    next_id: AtomicU64,
    calls: Mutex<HashMap<CallId, oneshot::Sender<Result<DhtReply, DhtRequestError>>>>,
    walks: Mutex<HashMap<WalkId, mpsc::Sender<Step>>>,
}

impl Waiting {
    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }
}

/// What a walk hears of its requests.
pub(super) struct Steps {
    node: Arc<Node>,
    pub(super) walk: WalkId,
    pub(super) steps: mpsc::Receiver<Step>,
}

impl Steps {
    pub(super) fn of(node: &Arc<Node>) -> Self {
        let walk = WalkId(node.waiting.next_id());
        let (sender, steps) = mpsc::channel(WALK_STEPS);
        lock(&node.waiting.walks).insert(walk, sender);
        Self { node: node.clone(), walk, steps }
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        lock(&self.node.waiting.walks).remove(&self.walk);
        self.node.with(|state| state.abandon_walk(self.walk));
    }
}

/// The caller of a request that was sent.
struct Caller<'a> {
    node: &'a Arc<Node>,
    call: CallId,
    tid: u16,
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        if lock(&self.node.waiting.calls).remove(&self.call).is_some() {
            self.node.with(|state| state.abandon_call(self.tid, self.call));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

impl Node {
    /// Lets the state decide, then carries out the decision.
    pub(super) fn with<T>(self: &Arc<Self>, decide: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let result = decide(&mut state);
        let effects = std::mem::take(&mut state.effects);
        drop(state);
        for effect in effects {
            self.carry_out(effect);
        }
        result
    }

    fn carry_out(self: &Arc<Self>, effect: Effect) {
        match effect {
            Effect::Send(outgoing) => self.socket(&outgoing.via).send(outgoing.to, &outgoing.bytes),
            Effect::Complete(call, outcome) => {
                if let Some(caller) = lock(&self.waiting.calls).remove(&call) {
                    let _ = caller.send(outcome);
                }
            }
            Effect::Step(walk, step) => {
                if let Some(steps) = lock(&self.waiting.walks).get(&walk) {
                    // There is room for every step that a walk can have.
                    let _ = steps.try_send(step);
                }
            }
            Effect::Start(job) => self.spawn(job),
            Effect::Reschedule => self.hurry.notify_one(),
        }
    }

    pub(super) fn socket<'a>(&'a self, via: &'a Via) -> &'a Socket {
        match via {
            Via::Client => &self.client,
            Via::Server => &self.server,
            Via::Other(socket) => socket,
        }
    }

    pub(super) fn via_of(&self, socket: &Socket) -> Via {
        if *socket == self.server {
            Via::Server
        } else if *socket == self.client {
            Via::Client
        } else {
            Via::Other(socket.clone())
        }
    }

    /// Background queries leave capacity for queries that a caller waits for.
    pub(super) fn concurrency(&self, is_modest: bool) -> usize {
        if is_modest { (self.concurrency / 8).max(2).min(self.concurrency) } else { self.concurrency }
    }

    pub(super) async fn request(
        self: &Arc<Self>,
        call: &Call,
        to: SocketAddrV4,
        options: RequestOptions,
        internal: bool,
    ) -> Result<DhtReply, DhtRequestError> {
        let call_id = CallId(self.waiting.next_id());
        let outbound = Outbound {
            to,
            internal,
            command: call.command,
            target: call.target,
            token: call.token,
            value: call.value.as_deref(),
            via: options.socket.as_ref().map(|socket| self.via_of(socket)),
            retries: options.retries,
            timeout: options.timeout,
            waiter: Waiter::Call(call_id),
        };
        let (sender, outcome) = oneshot::channel();
        lock(&self.waiting.calls).insert(call_id, sender);
        let sent = self.with(|state| state.request(outbound, Instant::now()));
        let tid = sent.inspect_err(|_| drop(lock(&self.waiting.calls).remove(&call_id)))?;
        let _caller = Caller { node: self, call: call_id, tid };
        outcome.await.map_err(|_| DhtRequestError::Stopped)?
    }

    /// Handles a datagram that arrived at a socket.
    pub(super) fn receive(self: &Arc<Self>, via: &Via, datagram: Datagram) {
        let Datagram { from, bytes } = datagram;
        let now = Instant::now();
        match Message::decode(&bytes) {
            Ok(Message::Response(response)) => self.with(|state| state.on_response(via, from, response, &bytes, now)),
            Ok(Message::Request(request)) => {
                let Some(foreign) = self.with(|state| state.on_request(via, from, &request, bytes.len(), now)) else {
                    return;
                };
                self.handler.on_request(DhtRequest {
                    command: request.command,
                    target: request.target,
                    token: request.token,
                    value: request.value.map(|value| bytes.slice_ref(value)),
                    from,
                    from_id: foreign.from_id,
                    to: request.to,
                    tid: request.tid,
                    local_id: foreign.local_id,
                    socket: self.socket(via).clone(),
                    via: via.clone(),
                    node: self.clone(),
                });
            }
            Err(error) => trace!(%from, %error, "a datagram that is not a message"),
        }
    }

    pub(super) async fn receive_all(self: Arc<Self>, via: Via, mut datagrams: mpsc::Receiver<Datagram>) {
        while let Some(Some(datagram)) = self.stop.run_until_cancelled(datagrams.recv()).await {
            self.receive(&via, datagram);
        }
    }

    /// Calls the state when a deadline passes, and starts the jobs that it requests.
    pub(super) async fn keep_time(self: Arc<Self>) {
        while !self.stop.is_cancelled() {
            let next = self.with(State::next_deadline);
            tokio::select! {
                () = time::sleep_until(next) => {}
                () = self.hurry.notified() => {}
                () = self.stop.cancelled() => return,
            }
            self.with(|state| state.on_time(Instant::now()));
        }
    }

    fn spawn(self: &Arc<Self>, job: Job) {
        let (node, stop) = (self.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let work = async {
                match job {
                    Job::Refresh(target) => node.refresh(target).await,
                    Job::CheckNetwork => drop(node.check_network(false).await),
                }
                node.with(|state| state.finished(job));
            };
            stop.run_until_cancelled(work).await;
        });
    }

    async fn refresh(self: &Arc<Self>, target: super::Id) {
        let query = Query { in_background: true, ..Query::find_node(target) };
        QueryStream::new(self.clone(), query).closest().await;
    }

    /// Finds the first nodes, and learns from them how they see this node.
    pub(super) async fn bootstrap(self: Arc<Self>) {
        let wants_quick_check = self.quick_firewall && !self.forced;
        for round in 0..2 {
            let own = self.with(|state| *state.table.id());
            let mut query = QueryStream::new(self.clone(), Query { in_background: true, ..Query::find_node(own) });
            let mut reachable = None;
            while let Some(reply) = query.next().await {
                if round == 0 && reachable.is_none() && wants_quick_check && self.with(|state| state.firewalled) {
                    // A walk through a small network ends before this gets its response, so it gets some extra time.
                    let deadline = Instant::now() + reply.rtt * 4 + PROBE_GRACE;
                    reachable = Some((self.clone().probe_server_socket(reply.from), deadline));
                }
            }
            // A single sign that the server socket is reachable justifies a full check.
            let is_promising = match reachable {
                Some((probe, deadline)) => time::timeout_at(deadline, probe).await.is_ok_and(|reached| reached.is_ok()),
                None => false,
            };
            if !(is_promising || self.forced) || !self.check_network(!self.forced).await {
                break;
            }
        }
        self.with(|state| state.bootstrapped = true);
        self.bootstrapped.send_replace(true);
    }

    fn probe_server_socket(self: Arc<Self>, witness: SocketAddrV4) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let stop = self.stop.clone();
        let node = self.clone();
        self.tasks.spawn(async move {
            let reached = stop.run_until_cancelled(node.ask_for_pong(witness)).await.flatten();
            if reached.is_some() {
                let _ = sender.send(());
            }
        });
        receiver
    }

    /// Asks a node to send its response to the server socket. Returns the address that it was sent to.
    async fn ask_for_pong(self: &Arc<Self>, witness: SocketAddrV4) -> Option<SocketAddrV4> {
        let port = self.server.local_address().port();
        let call = Call { value: Some(port.to_le_bytes().to_vec().into()), ..Call::new(PING_NAT) };
        let reply = self.request(&call, witness, RequestOptions::default(), true).await.ok()?;
        reply.on_server_socket.then_some(reply.to)
    }

    /// Checks whether other nodes reach this one, and makes it persistent if they do. Returns whether anything changed.
    pub(super) async fn check_network(self: &Arc<Self>, firewall_only: bool) -> bool {
        let (is_firewalled, is_ephemeral) = self.with(|state| (state.firewalled, state.ephemeral));
        if !is_ephemeral || (firewall_only && !is_firewalled) {
            return false;
        }
        let Some(before) = self.with(|state| state.own_host_and_port()) else { return false };
        if is_firewalled {
            let witnesses = self.with(|state| state.witnesses());
            let pongs = futures_util::future::join_all(witnesses.iter().map(|node| self.ask_for_pong(*node))).await;
            let seen: Vec<_> =
                witnesses.iter().zip(pongs).filter_map(|(node, seen)| Some((*node.ip(), seen?))).collect();
            if !self.with(|state| state.on_witnesses(witnesses.len(), &seen)) {
                return false;
            }
            debug!(witnesses = seen.len(), "other nodes reach this one");
        }
        if firewall_only {
            return true;
        }
        let is_settled = self.with(State::settle_identity);
        debug!(%before, is_settled, "looked at the own address");
        is_settled
    }
}
