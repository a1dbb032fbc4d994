//! Serves one client connection, from the TLS handshake to its end.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version, header};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use observability::TraceContext;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;
use tracing::debug;

use super::client_address::{client_address, is_proxy};
use super::dialect::Dialect;
use super::errors;
use super::extract::{ArrivedAt, Bridge};
use super::ollama_port;
use super::reset_limit::ResetLimit;
use super::router;
use super::timeouts::{Activity, ConnectionTimeouts, TrackedBody, Watched};
use super::tls::Tls;
use super::turn_away::too_many;
use crate::gateway::Gateway;
use crate::origin_permits::{OriginPermit, OriginPermits};
use crate::repeats::ConnectionEnd;
use crate::request_context::Origin;

/// Maximum size of a request head, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Maximum number of header lines.
const HEADERS_MAX: usize = 100;
/// How long a client that has connected to a gateway that stops may take to send its first request.
const FIRST_REQUEST_WITHIN: Duration = Duration::from_millis(500);
/// Maximum number of concurrent streams on an HTTP/2 connection.
const STREAMS_MAX: u32 = 256;
/// Maximum number of HTTP/2 requests that a client takes back before they are accepted.
const PENDING_RESETS_MAX: usize = 20;
/// Maximum number of streams that the server resets because of a client's errors.
const ERROR_RESETS_MAX: usize = 256;
/// How often an HTTP/2 client is pinged.
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long it may take to respond before the connection is closed.
const PING_WITHIN: Duration = Duration::from_secs(20);

/// The state that all connections share.
#[derive(Clone)]
pub(super) struct Connections {
    shared: Arc<Shared>,
    tls: Option<Tls>,
    /// Whether the clients are Ollama's.
    is_ollama: bool,
}

/// How a connection came in.
#[derive(Clone, Copy)]
struct Door {
    is_tls: bool,
    is_ollama: bool,
}

struct Shared {
    gateway: Gateway,
    router: Router,
    server: Builder<Tracked>,
    timeouts: ConnectionTimeouts,
    /// Connections of each address, and requests of each address behind a trusted proxy.
    per_address: OriginPermits,
    resets: ResetLimit,
    /// Makes connections close once their requests are done.
    stop: CancellationToken,
    /// Makes connections close at once.
    abort: CancellationToken,
}

/// An address has too many connections or requests.
#[derive(Debug)]
pub(super) struct TooMany;

/// Runs HTTP/2 streams as tasks of the gateway.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<Work: Future<Output: Send + 'static> + Send + 'static> Executor<Work> for Tracked {
    fn execute(&self, work: Work) {
        self.0.spawn(work);
    }
}

impl Connections {
    pub(super) fn new(gateway: Gateway, tls: Option<Tls>, stop: CancellationToken, abort: CancellationToken) -> Self {
        let timeouts = ConnectionTimeouts::of(gateway.config());
        let router = router::router(Bridge { gateway: gateway.clone(), stop: stop.clone() });
        let server = server(gateway.tracker().clone());
        let (per_address, resets) = (OriginPermits::default(), ResetLimit::new());
        let shared = Arc::new(Shared { gateway, router, server, timeouts, per_address, resets, stop, abort });
        Self { shared, tls, is_ollama: false }
    }

    /// Returns the connections of Ollama's clients. They share all limits with the others.
    pub(super) fn for_ollama(&self) -> Self {
        Self { shared: self.shared.clone(), tls: None, is_ollama: true }
    }

    /// Returns the permit of a connection. A trusted proxy needs none, because its connections carry the requests of
    /// many clients.
    pub(super) fn permit(&self, peer: IpAddr) -> Result<Option<OriginPermit>, TooMany> {
        if self.shared.is_proxy(peer) { Ok(None) } else { self.shared.permit(Origin::of(peer)) }
    }

    pub(super) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Serves a connection to its end.
    pub(super) async fn serve(&self, stream: TcpStream, peer: SocketAddr) {
        let (shared, is_ollama) = (&self.shared, self.is_ollama);
        // With Nagle's algorithm a token would wait for the acknowledgement of the previous one.
        if let Err(error) = stream.set_nodelay(true) {
            debug!(%error, "no TCP_NODELAY");
        }
        let Ok(arrived_at) = stream.local_addr().map(ArrivedAt) else { return };
        match &self.tls {
            None => shared.drive(stream, peer.ip(), arrived_at, Door { is_tls: false, is_ollama }).await,
            Some(tls) => match time::timeout(shared.timeouts.head, tls.accept(stream)).await {
                Ok(Ok(stream)) => shared.drive(stream, peer.ip(), arrived_at, Door { is_tls: true, is_ollama }).await,
                Ok(Err(error)) => debug!(%error, "TLS handshake failed"),
                Err(_) => debug!("TLS handshake took too long"),
            },
        }
    }
}

impl Shared {
    async fn drive(
        self: &Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: IpAddr,
        arrived_at: ArrivedAt,
        door: Door,
    ) {
        let activity = Arc::new(Activity::begin());
        let excess = CancellationToken::new();
        let end = ConnectionEnd::default();
        let _ended = end.guard();
        let asked = CancellationToken::new();
        let io = TokioIo::new(Watched::new(stream, activity.clone()));
        let service = hyper::service::service_fn(|mut request: Request<Incoming>| {
            request.extensions_mut().insert(arrived_at);
            // A client takes a request back by a reset of its stream, and in HTTP/1 by closing the connection.
            let end = end.of_stream();
            request.extensions_mut().insert(end.clone());
            asked.cancel();
            let guard = activity.request(request.version() == Version::HTTP_2);
            let (shared, excess) = (self.clone(), excess.clone());
            async move {
                let mut unanswered = shared.resets.watch(Origin::of(peer), excess, end);
                let is_head = request.method() == Method::HEAD;
                let (response, permit) = shared.respond(request, peer, door).await;
                if is_head {
                    unanswered.answered();
                }
                Ok::<_, Infallible>(response.map(|body| TrackedBody::new(body, guard, permit, unanswered)))
            }
        });
        let mut connection = pin!(self.server.serve_connection(io, service));
        let mut watch = pin!(activity.watch(self.timeouts));
        let mut stopping = false;
        let mut stop = pin!(async {
            self.stop.cancelled().await;
            // Hyper would close a connection whose first request it has not read. The client could not send it again.
            let _ = time::timeout(FIRST_REQUEST_WITHIN, asked.cancelled()).await;
        });
        loop {
            tokio::select! {
                outcome = connection.as_mut() => {
                    if let Err(error) = outcome {
                        debug!(%error, "connection failed");
                    }
                    return;
                }
                reason = watch.as_mut() => {
                    debug!(reason, "closing a connection");
                    return;
                }
                () = excess.cancelled(), if !self.is_proxy(peer) => {
                    debug!("closing a connection: its client takes too many requests back");
                    return;
                }
                () = self.abort.cancelled() => return,
                () = stop.as_mut(), if !stopping => {
                    stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    /// Answers a request. The permit is held until the response is sent.
    async fn respond(
        &self,
        mut request: Request<Incoming>,
        peer: IpAddr,
        door: Door,
    ) -> (Response<Body>, Option<OriginPermit>) {
        if door.is_ollama {
            if ollama_port::is_greeting(&request) {
                return (ollama_port::greet(), None);
            }
            ollama_port::add_key(&mut request, peer, &self.gateway).await;
        }
        let (origin, permit) = self.identify(&request, peer);
        let dialect = Dialect::of(request.uri().path(), request.headers());
        let (response, permit) = match permit {
            Ok(permit) => (self.route(request, origin).await, permit),
            Err(TooMany) => (errors::failure(&too_many(self.gateway.config())), None),
        };
        let mut response = dialect.shape(response);
        harden(response.headers_mut(), door.is_tls);
        (response, permit)
    }

    /// Returns whose request it is, and its permit if it came through a trusted proxy. Health checks need none: no
    /// client can make a gateway look ill to its proxy.
    fn identify(&self, request: &Request<Incoming>, peer: IpAddr) -> (Origin, Result<Option<OriginPermit>, TooMany>) {
        let config = self.gateway.config();
        let client = client_address(peer, request.headers(), &config.trusted_proxies, config.proxy_header);
        let origin = Origin::of(client);
        let needs_permit = self.is_proxy(peer) && !router::is_health_check(request.uri().path());
        let permit = if needs_permit { self.permit(origin) } else { Ok(None) };
        (origin, permit)
    }

    fn is_proxy(&self, peer: IpAddr) -> bool {
        is_proxy(peer, &self.gateway.config().trusted_proxies)
    }

    fn permit(&self, origin: Origin) -> Result<Option<OriginPermit>, TooMany> {
        match self.gateway.config().connections_per_address_max {
            0 => Ok(None),
            max => self.per_address.acquire(Some(origin), max).map(Some).ok_or(TooMany),
        }
    }

    async fn route(&self, request: Request<Incoming>, origin: Origin) -> Response<Body> {
        let trace = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
        match self.gateway.context(Some(origin), trace.and_then(TraceContext::parse)) {
            Ok(context) => {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(context);
                let mut router = self.router.clone();
                let outcome: Result<_, Infallible> = router.call(request).await;
                outcome.unwrap_or_else(|never| match never {})
            }
            Err(error) => errors::failure(&error),
        }
    }
}

fn server(tracker: TaskTracker) -> Builder<Tracked> {
    let mut builder = Builder::new(Tracked(tracker));
    // `Activity` limits the time to send a head, since it can distinguish that from the time between requests.
    builder.http1().header_read_timeout(None).max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(ERROR_RESETS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_WITHIN);
    builder
}

/// Adds the security headers of every response. Responses are JSON or streams, so they are never framed, sniffed or
/// cached.
fn harden(headers: &mut HeaderMap, tls: bool) {
    let fixed = HeaderValue::from_static;
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff"));
    headers.insert(header::REFERRER_POLICY, fixed("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, fixed("DENY"));
    headers.entry(header::CACHE_CONTROL).or_insert(fixed("no-store"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(fixed("default-src 'none'; frame-ancestors 'none'"));
    if tls {
        headers.insert(HeaderName::from_static("strict-transport-security"), fixed("max-age=31536000"));
    }
}
