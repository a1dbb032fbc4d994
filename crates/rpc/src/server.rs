//! Serves the calls of peers.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::control::{Empty, Hello, NODE_DESCRIBE, NODE_HELLO, NODE_PING, NodeInfo};
use protocol::membership::Exclusion;
use protocol::membership::certificate::CERTIFICATE_BYTES_MAX;
use protocol::{ErrorCode, PublicKey, WireError, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use self::budget::{Allowance, BodyLimit, Budget};
use self::call_permits::{CallPermit, CallPermits};
use self::connections::{CallMark, ConnectionPermit, Connections};
use crate::frame::Frame;
use crate::membership::Membership;
use crate::transport::{Channel, Connection, Incoming, Transport};

mod access;
mod budget;
mod call_permits;
mod connections;
mod stream_call;
mod with_state;

pub use access::Access;
pub use stream_call::{Interrupted, ResponseSink, StreamCall};
pub use with_state::WithState;

/// How long a caller may take to send its request.
const OPENING: Duration = Duration::from_secs(10);
/// How long an unwanted connection is held, so that its calls are told why they are refused.
const TURNING_AWAY: Duration = Duration::from_secs(1);
/// How many connections over the limit get a response with the reason at once. Further ones are closed without a
/// response.
const TURNED_AWAY_MAX: usize = 64;
/// The maximum size of an introduction: a certificate in its envelope, JSON-escaped once more.
const HELLO_BYTES_MAX: usize = 2 * CERTIFICATE_BYTES_MAX + 1024;
/// How many invalid introductions a peer may send before its connection is closed. Each may cost a signature
/// verification.
const HELLOS_FAILED_MAX: u32 = 16;

/// The maximum length of a request from a node that is not a member, on interfaces between nodes. It must hold a
/// certificate.
pub const STRANGER_BYTES_MAX: usize = 64 * 1024;

/// Concurrency limits of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLimits {
    /// The maximum number of concurrent calls. Further calls are refused.
    pub calls_max: usize,
    /// The same for all strangers together, so that they cannot use up the capacity of the others. Strangers are
    /// callers that the server's membership does not know, or, if it is not checked, those whose body limit is below
    /// the largest message.
    pub strangers_calls_max: usize,
    /// The same for one stranger, over all its connections, so that a few keys cannot use up the calls of all
    /// strangers. A call counts from its arrival: a stream whose request never comes counts until it times out.
    pub strangers_calls_per_peer_max: usize,
    /// The maximum number of bytes of the requests of those calls. Requests beyond it are refused.
    pub body_bytes_max: usize,
    /// The same for all strangers together.
    pub strangers_body_bytes_max: usize,
    /// The maximum number of connections. Further ones are refused with an error and closed, unless a stranger's oldest
    /// connection without calls can be closed for them.
    pub connections_max: usize,
    /// The same for all strangers together; members have the rest. A stranger here is a peer that the server's
    /// membership does not know. It counts as a member from when it shows a valid certificate, and a further
    /// stranger replaces the oldest connection without calls. Only calls keep strangers' connections open against
    /// others, so it should exceed `strangers_calls_max`. Nothing limits the connections of one network address: the
    /// transport does not show it.
    pub strangers_connections_max: usize,
    /// The maximum number of connections of one peer. A further one replaces the peer's oldest one without calls.
    pub connections_per_peer_max: usize,
    /// The idle timeout. A connection without calls is closed after this time, and before twice this time.
    pub idle: Duration,
    /// The same for connections of strangers.
    pub strangers_idle: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            calls_max: 8192,
            strangers_calls_max: 2048,
            strangers_calls_per_peer_max: 128,
            body_bytes_max: 256 * 1024 * 1024,
            strangers_body_bytes_max: 4 * 1024 * 1024,
            connections_max: 16_384,
            strangers_connections_max: 8192,
            connections_per_peer_max: 8,
            idle: Duration::from_mins(5),
            strangers_idle: Duration::from_secs(10),
        }
    }
}

/// The caller of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The public key that the connection proved.
    pub key: PublicKey,
}

type Done<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type UnaryHandler = Box<dyn Fn(Caller, Bytes) -> Done<Result<Bytes, WireError>> + Send + Sync>;
type RevokedHook = Box<dyn Fn(PublicKey, &str) + Send + Sync>;
type StreamHandler = Box<dyn Fn(StreamCall) -> Done<()> + Send + Sync>;

/// Serves methods by name. Every node also serves `node.describe` and `node.ping`.
pub struct Server {
    transport: Arc<dyn Transport>,
    unary: HashMap<&'static str, Unary>,
    streams: HashMap<&'static str, Stream>,
    limits: ServerLimits,
    body_limit: Option<BodyLimit>,
    membership: Membership,
    on_revoked_call: Option<RevokedHook>,
}

/// A unary method.
struct Unary {
    handler: UnaryHandler,
    /// Whether the work continues when the caller is gone.
    finishes: bool,
    access: Access,
}

/// A streaming method.
struct Stream {
    handler: StreamHandler,
    access: Access,
}

impl Server {
    /// Makes a server that only describes itself.
    pub fn new(transport: Arc<dyn Transport>, info: NodeInfo) -> Self {
        let (unary, streams) = (HashMap::new(), HashMap::new());
        let (limits, membership) = (ServerLimits::default(), Membership::unchecked());
        let server = Self { transport, unary, streams, limits, body_limit: None, membership, on_revoked_call: None };
        let describe = move |_, _: Empty| {
            let info = info.clone();
            async move { Ok(info) }
        };
        server.unary(NODE_DESCRIBE, describe).unary(NODE_PING, |_, _: Empty| async { Ok(Empty {}) })
    }

    /// Passes the callers' introductions to a membership, responds to them, and rejects revoked peers.
    #[must_use]
    pub fn membership(mut self, membership: Membership) -> Self {
        self.membership = membership;
        self
    }

    /// Sets a hook for each refused call of a revoked peer, with its key and the method. It is not called for streams,
    /// which are refused before their method is known.
    #[must_use]
    pub fn on_revoked_call(mut self, hook: impl Fn(PublicKey, &str) + Send + Sync + 'static) -> Self {
        self.on_revoked_call = Some(Box::new(hook));
        self
    }

    /// Sets the concurrency limits.
    #[must_use]
    pub fn limits(mut self, limits: ServerLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Limits the length of a request by the public key of its caller, so that strangers can send less than members.
    /// Evaluated for each call.
    #[must_use]
    pub fn body_limit(mut self, limit_of: impl Fn(PublicKey) -> usize + Send + Sync + 'static) -> Self {
        self.body_limit = Some(Box::new(limit_of));
        self
    }

    /// Limits the number of concurrent calls.
    #[must_use]
    pub fn calls_max(mut self, calls_max: usize) -> Self {
        self.limits.calls_max = calls_max;
        self
    }

    /// Adds a unary method. A call that was started is completed, whether or not the caller waits for it.
    #[must_use]
    pub fn unary<Request, Reply, Work>(
        self,
        method: &'static str,
        handler: impl Fn(Caller, Request) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        self.handle_unary(method, Access::Anyone, handler, true)
    }

    /// Adds a unary method whose work is dropped when the caller no longer waits.
    #[must_use]
    pub fn unary_while_wanted<Request, Reply, Work>(
        self,
        method: &'static str,
        handler: impl Fn(Caller, Request) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        self.handle_unary(method, Access::Anyone, handler, false)
    }

    fn handle_unary<Request, Reply, Work>(
        mut self,
        method: &'static str,
        access: Access,
        handler: impl Fn(Caller, Request) -> Work + Send + Sync + 'static,
        finishes: bool,
    ) -> Self
    where
        Request: DeserializeOwned,
        Reply: Serialize,
        Work: Future<Output = Result<Reply, WireError>> + Send + 'static,
    {
        let handler: UnaryHandler = Box::new(move |caller, body| {
            let work = codec::decode::<Request>(&body).map(|request| handler(caller, request));
            Box::pin(async move { Ok(Bytes::from(codec::encode(&work?.await?))) })
        });
        self.unary.insert(method, Unary { handler, finishes, access });
        self
    }

    /// Adds a streaming method. The handler accepts or refuses the call.
    #[must_use]
    pub fn stream<Work>(
        self,
        method: &'static str,
        handler: impl Fn(StreamCall) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Work: Future<Output = ()> + Send + 'static,
    {
        self.handle_streaming(method, Access::Anyone, handler)
    }

    fn handle_streaming<Work>(
        mut self,
        method: &'static str,
        access: Access,
        handler: impl Fn(StreamCall) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Work: Future<Output = ()> + Send + 'static,
    {
        let handler: StreamHandler = Box::new(move |call| Box::pin(handler(call)));
        self.streams.insert(method, Stream { handler, access });
        self
    }

    /// Returns the names of the methods and who may call them, without the one that introduces nodes to each other.
    /// A name that is both unary and streaming is there twice.
    pub fn methods(&self) -> impl Iterator<Item = (&'static str, &Access)> {
        let unary = self.unary.iter().map(|(name, method)| (*name, &method.access));
        unary.chain(self.streams.iter().map(|(name, method)| (*name, &method.access)))
    }

    /// Lets methods share a state.
    #[must_use]
    pub fn with_state<S: Clone + Send + Sync + 'static>(self, state: S) -> WithState<S> {
        WithState::new(self, state)
    }

    /// Serves until `stop`. Then new calls are refused, and calls in progress have `drain` to end before they are
    /// dropped.
    pub async fn run(mut self, stop: CancellationToken, drain: Duration) {
        let (calls, connections) = (TaskTracker::new(), TaskTracker::new());
        let (abort, over) = (CancellationToken::new(), CancellationToken::new());
        let transport = self.transport.clone();
        let limits = self.limits;
        let shared = Arc::new(Shared {
            call_permits: CallPermits::new(&limits),
            budget: Budget::new(&limits, self.body_limit.take()),
            server: self,
            calls: calls.clone(),
            stop: stop.clone(),
            abort: abort.clone(),
            over: over.clone(),
        });
        let connection_permits = Connections::new(&limits);
        let turned_away = Arc::new(Semaphore::new(TURNED_AWAY_MAX));
        while let Some(Some(connection)) = stop.run_until_cancelled(transport.accept()).await {
            let shared = shared.clone();
            let peer = connection.remote_key();
            if let Some(permit) = connection_permits.enter(peer, shared.server.membership.is_member(peer)) {
                connections.spawn(async move { shared.serve(connection, permit).await });
            } else if let Ok(permit) = turned_away.clone().try_acquire_owned() {
                connections.spawn(async move {
                    debug!(peer = peer.short(), "a connection too many");
                    shared.turn_away(&*connection, too_many(), None).await;
                    drop(permit);
                });
            } else {
                connection.close();
            }
        }
        calls.close();
        if time::timeout(drain, calls.wait()).await.is_err() {
            debug!(calls = calls.len(), "dropping calls that did not end in time");
            abort.cancel();
            calls.wait().await;
        }
        over.cancel();
        connections.close();
        connections.wait().await;
    }
}

struct Shared {
    server: Server,
    call_permits: Arc<CallPermits>,
    budget: Budget,
    calls: TaskTracker,
    /// Cancelled when no new calls are accepted.
    stop: CancellationToken,
    /// Cancelled when the calls in progress are dropped.
    abort: CancellationToken,
    /// Cancelled when no calls are left.
    over: CancellationToken,
}

/// What a call holds while it is being handled.
struct Hold {
    _permit: CallPermit,
    _mark: CallMark,
}

impl Shared {
    /// Serves the calls of a connection until it closes, is idle for too long, or is replaced by another.
    async fn serve(self: &Arc<Self>, connection: Arc<dyn Connection>, permit: ConnectionPermit) {
        let caller = Caller { key: connection.remote_key() };
        let membership = &self.server.membership;
        if membership.is_revoked(caller.key) {
            return self.turn_away(&*connection, Exclusion::Revoked.into(), self.server.on_revoked_call.as_ref()).await;
        }
        let mut revoked = std::pin::pin!(membership.until_revoked(caller.key));
        connection.allow_requests(self.budget.request_bytes_max(caller.key));
        let trust = || {
            if membership.is_member(caller.key) {
                permit.count_as_member();
                connection.trust();
            }
        };
        trust();
        // A connection that has begun as a stranger's is looked at again after the stranger's time.
        let idle = || if permit.is_strangers() { self.server.limits.strangers_idle } else { self.server.limits.idle };
        let mut given_away = std::pin::pin!(permit.given_away());
        let mut over = std::pin::pin!(self.over.cancelled());
        let mut timer = std::pin::pin!(time::sleep(idle()));
        let mut was_idle = false;
        let mut hellos_left = HELLOS_FAILED_MAX;
        loop {
            let mut next = connection.next();
            let incoming = loop {
                tokio::select! {
                    biased;
                    incoming = &mut next => break incoming,
                    () = &mut given_away => {
                        debug!(peer = caller.key.short(), "a connection gives way to a newer one");
                        return connection.close();
                    }
                    () = &mut revoked => {
                        debug!(peer = caller.key.short(), "a peer was revoked, its connection is closed");
                        return connection.close();
                    }
                    () = &mut over => return,
                    () = timer.as_mut() => {
                        if was_idle {
                            return connection.close();
                        }
                        was_idle = permit.is_idle();
                        timer.as_mut().reset(Instant::now() + idle());
                    }
                }
            };
            let Some(incoming) = incoming else { return };
            // Checked here as well, because a peer that never stops calling would keep its connection.
            if permit.is_given_away() {
                return connection.close();
            }
            was_idle = false;
            match incoming {
                // Handled here and not in a task, so that the calls that follow find the caller introduced.
                Incoming::Request { method, body, reply } if method == NODE_HELLO => {
                    let hello = self.take_hello(caller, &connection.secret(), &body);
                    trust();
                    hellos_left -= u32::from(hello.is_err());
                    reply.send(hello);
                    if hellos_left == 0 {
                        debug!(peer = caller.key.short(), "a peer keeps sending invalid certificates");
                        return connection.close();
                    }
                }
                incoming => self.begin(caller, incoming, &permit),
            }
        }
    }

    fn take_hello(&self, caller: Caller, secret: &[u8; 32], body: &[u8]) -> Result<Bytes, WireError> {
        let membership = &self.server.membership;
        if !membership.is_checked() {
            return Err(unknown(NODE_HELLO));
        }
        let hello = codec::decode_within::<Hello>(body, HELLO_BYTES_MAX)?;
        let own = membership.meet_caller(caller.key, secret, &hello)?;
        Ok(Bytes::from(codec::encode(&own)))
    }

    /// Handles a call, or refuses it if the server is at its limit.
    fn begin(self: &Arc<Self>, caller: Caller, incoming: Incoming, connection_permit: &ConnectionPermit) {
        if self.stop.is_cancelled() {
            return refuse(incoming, stopping());
        }
        let allowance = self.budget.allowance(caller.key, &self.server.membership);
        let permits = &self.call_permits;
        let permit = if allowance.is_strangers() { permits.enter_stranger(caller.key) } else { permits.enter() };
        let permit = match permit {
            Ok(permit) => permit,
            Err(error) => return refuse(incoming, error),
        };
        let hold = Hold { _permit: permit, _mark: connection_permit.call() };
        let shared = self.clone();
        self.calls.spawn(async move {
            shared.abort.run_until_cancelled(shared.handle(caller, incoming, allowance)).await;
            drop(hold);
        });
    }

    async fn handle(&self, caller: Caller, incoming: Incoming, allowance: Allowance) {
        match incoming {
            Incoming::Request { method, body, mut reply } => {
                let reserved = allowance.begin(body.len()).and_then(|mut reserved| {
                    reserved.grow(body.len())?;
                    Ok(reserved)
                });
                let response = match reserved.and_then(|held| Ok((held, self.unary(caller, &method)?))) {
                    Err(error) => Err(error),
                    Ok((_held, Unary { handler, finishes: true, .. })) => handler(caller, body).await,
                    Ok((_held, Unary { handler, finishes: false, .. })) => tokio::select! {
                        biased;
                        response = handler(caller, body) => response,
                        () = reply.closed() => return,
                    },
                };
                reply.send(response);
            }
            Incoming::Channel(channel) => self.handle_stream(caller, channel, allowance).await,
        }
    }

    /// Returns a unary method that the caller may call.
    fn unary(&self, caller: Caller, method: &str) -> Result<&Unary, WireError> {
        let unary = self.server.unary.get(method).ok_or_else(|| unknown(method))?;
        unary.access.check(&self.server.membership, caller.key)?;
        Ok(unary)
    }

    /// Returns a streaming method that the caller may call.
    fn streaming(&self, caller: Caller, method: &str) -> Result<&Stream, WireError> {
        let stream = self.server.streams.get(method).ok_or_else(|| unknown(method))?;
        stream.access.check(&self.server.membership, caller.key)?;
        Ok(stream)
    }

    async fn handle_stream(&self, caller: Caller, channel: Box<dyn Channel>, allowance: Allowance) {
        let reading = StreamCall::read(caller.key, channel, allowance);
        let Ok(Some(call)) = time::timeout(OPENING, reading).await else {
            return;
        };
        match self.streaming(caller, &call.method) {
            Ok(stream) => (stream.handler)(call).await,
            Err(error) => call.refuse(error).await,
        }
    }

    /// Refuses the first calls of an unwanted connection, and gives the reason.
    async fn turn_away(&self, connection: &dyn Connection, error: WireError, hook: Option<&RevokedHook>) {
        let telling = async {
            while let Some(incoming) = connection.next().await {
                if let (Some(hook), Incoming::Request { method, .. }) = (hook, &incoming) {
                    hook(connection.remote_key(), method);
                }
                refuse(incoming, error.clone());
            }
        };
        let _ = time::timeout(TURNING_AWAY, self.over.run_until_cancelled(telling)).await;
        connection.close();
    }
}

/// Refuses a call without reading it: a call beyond the limits must cost neither memory nor time.
fn refuse(incoming: Incoming, error: WireError) {
    match incoming {
        Incoming::Request { reply, .. } => reply.send(Err(error)),
        Incoming::Channel(channel) => drop(channel.try_send(Frame::Error(error).encode())),
    }
}

fn too_busy() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node works on too many calls, try again")
        .with_retry_after(Duration::from_secs(1))
}

fn too_many_of_yours() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node works on too many of your calls, try again")
        .with_retry_after(Duration::from_secs(1))
}

fn too_many() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node holds too many connections, try again")
        .with_retry_after(Duration::from_secs(1))
}

/// The error of a node that stops. It names no time to wait, unlike those of a busy node: another may take the call at
/// once, and how long a restart takes is not known here.
fn stopping() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node is stopping, try another")
}

fn unknown(method: &str) -> WireError {
    let name: String = method.chars().take(64).collect();
    WireError::new(ErrorCode::UnknownMethod, format!("this node knows no method {name:?}"))
}
