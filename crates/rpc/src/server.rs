//! Answers to peers' calls.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use protocol::control::{Empty, NODE_DESCRIBE, NodeInfo};
use protocol::{ErrorCode, PublicKey, WireError, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::stream::{Frame, StreamCall};
use crate::transport::{Channel, Connection, Incoming, Transport};

/// Calls a node works on at once; one more is refused.
const CALLS_MAX: usize = 8192;
/// How long a caller may take to send its request.
const OPENING: Duration = Duration::from_secs(10);

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The key that the connection proved.
    pub key: PublicKey,
}

type Done<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type UnaryHandler = Box<dyn Fn(Caller, Bytes) -> Done<Result<Bytes, WireError>> + Send + Sync>;
type StreamHandler = Box<dyn Fn(StreamCall) -> Done<()> + Send + Sync>;

/// Answers calls under names. Every node also answers `node.describe`.
pub struct Server {
    transport: Arc<dyn Transport>,
    unary: HashMap<&'static str, UnaryHandler>,
    streams: HashMap<&'static str, StreamHandler>,
    calls_max: usize,
}

impl Server {
    /// Makes a server that can only say what it is.
    pub fn new(transport: Arc<dyn Transport>, info: NodeInfo) -> Self {
        let server = Self { transport, unary: HashMap::new(), streams: HashMap::new(), calls_max: CALLS_MAX };
        server.unary(NODE_DESCRIBE, move |_, _: Empty| {
            let info = info.clone();
            async move { Ok(info) }
        })
    }

    /// Limits the calls worked on at once.
    #[must_use]
    pub fn calls_max(mut self, calls_max: usize) -> Self {
        self.calls_max = calls_max;
        self
    }

    /// Answers a unary method.
    #[must_use]
    pub fn unary<Request, Reply, Work>(
        mut self,
        method: &'static str,
        handler: impl Fn(Caller, Request) -> Work + Send + Sync + 'static,
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
        self.unary.insert(method, handler);
        self
    }

    /// Answers a streamed method. The handler accepts or refuses the call.
    #[must_use]
    pub fn stream<Work>(
        mut self,
        method: &'static str,
        handler: impl Fn(StreamCall) -> Work + Send + Sync + 'static,
    ) -> Self
    where
        Work: Future<Output = ()> + Send + 'static,
    {
        self.streams.insert(method, Box::new(move |call| Box::pin(handler(call))));
        self
    }

    /// Serves until `stop`; calls under way then have `drain` to end before they are dropped.
    pub async fn run(self, stop: CancellationToken, drain: Duration) {
        let tracker = TaskTracker::new();
        let abort = CancellationToken::new();
        let transport = self.transport.clone();
        let shared = Arc::new(Shared {
            calls: Arc::new(Semaphore::new(self.calls_max)),
            server: self,
            tracker: tracker.clone(),
            abort: abort.clone(),
        });
        while let Some(Some(connection)) = stop.run_until_cancelled(transport.accept()).await {
            let shared = shared.clone();
            let stop = stop.clone();
            tracker.spawn(async move {
                stop.run_until_cancelled(shared.serve(connection)).await;
            });
        }
        tracker.close();
        if tokio::time::timeout(drain, tracker.wait()).await.is_err() {
            debug!(calls = tracker.len(), "dropping calls that did not end in time");
            abort.cancel();
            tracker.wait().await;
        }
    }
}

struct Shared {
    server: Server,
    calls: Arc<Semaphore>,
    tracker: TaskTracker,
    abort: CancellationToken,
}

impl Shared {
    async fn serve(self: &Arc<Self>, connection: Arc<dyn Connection>) {
        let caller = Caller { key: connection.remote_key() };
        while let Some(incoming) = connection.next().await {
            let permit = self.calls.clone().try_acquire_owned().ok();
            let shared = self.clone();
            self.tracker.spawn(async move {
                shared.abort.run_until_cancelled(shared.handle(caller, incoming, permit)).await;
            });
        }
    }

    async fn handle(&self, caller: Caller, incoming: Incoming, permit: Option<OwnedSemaphorePermit>) {
        match incoming {
            Incoming::Request { method, body, reply } => {
                let answer = if permit.is_none() {
                    Err(too_busy())
                } else if let Some(handler) = self.server.unary.get(method.as_str()) {
                    handler(caller, body).await
                } else {
                    Err(unknown(&method))
                };
                // A caller that is gone needs no reply.
                let _ = reply.send(answer);
            }
            Incoming::Channel(channel) => self.handle_stream(caller, channel, permit.is_none()).await,
        }
    }

    async fn handle_stream(&self, caller: Caller, channel: Box<dyn Channel>, busy: bool) {
        if busy {
            // Unread: a request over the limit must not take memory.
            let refusal = channel.send(Frame::Error(too_busy()).encode());
            let _ = tokio::time::timeout(OPENING, refusal).await;
            return;
        }
        let Ok(Some(call)) = tokio::time::timeout(OPENING, StreamCall::read(caller.key, channel)).await else {
            return;
        };
        match self.server.streams.get(call.method.as_str()) {
            Some(handler) => handler(call).await,
            None => {
                let error = unknown(&call.method);
                call.refuse(error).await;
            }
        }
    }
}

fn too_busy() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node works on too many calls, try again")
        .with_retry_after(Duration::from_secs(1))
}

fn unknown(method: &str) -> WireError {
    let name: String = method.chars().take(64).collect();
    WireError::new(ErrorCode::UnknownMethod, format!("this node knows no method {name:?}"))
}
