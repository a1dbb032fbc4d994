//! The HTTP server: the OpenAI and Anthropic APIs, Tether's own API, the admin API, health checks and metrics.

mod admin;
mod answer_body;
mod batches;
mod chat;
mod client_address;
mod completions;
mod connection;
mod dialect;
mod embeddings;
mod errors;
mod extract;
mod files;
mod health;
mod infer;
mod input_tokens;
mod job;
mod messages;
mod models;
mod ollama;
mod ollama_port;
mod openapi;
mod repeats;
mod request_body;
mod rerank;
mod reset_limit;
mod responses;
mod router;
mod tenant_request;
mod timeouts;
mod tls;
mod tokens;
mod turn_away;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::connection::{Connections, TooMany};
use self::tls::Tls;
use self::turn_away::TurnAway;
use crate::config::{CUT_WITHIN, seconds};
use crate::gateway::Gateway;
use crate::origin_permits::OriginPermit;

/// The pause after `accept` failed, for example for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How many connections that the kernel has accepted are still served when the gateway stops.
const BACKLOG_MAX: usize = 4096;
/// Why a gateway cannot run.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The address cannot be bound.
    #[error("could not listen on {address}")]
    Bind { address: SocketAddr, source: std::io::Error },
    /// Only one of the two TLS files is configured.
    #[error("tls_cert and tls_key are given both or not at all")]
    TlsIncomplete,
    /// A TLS file cannot be used.
    #[error("could not use the TLS file {}: {reason}", path.display())]
    Tls { path: PathBuf, reason: String },
    /// The address for clients without a key can be reached from other machines.
    #[error("ollama_needs_key = false needs a loopback ollama_bind such as 127.0.0.1:11434, not {address}")]
    OpenToOthers { address: SocketAddr },
    /// A configured origin is invalid.
    #[error("cors_origins: {origin:?} is not an origin such as https://app.example.com")]
    Origin { origin: String },
}

/// A bound HTTP listener, ready to serve.
pub(crate) struct HttpBridge {
    gateway: Gateway,
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Tls>,
    /// The listener for clients of Ollama.
    ollama: Option<TcpListener>,
}

/// Binds an address, and returns it with the port that it got.
async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let bound = TcpListener::bind(address).await.and_then(|listener| {
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    bound.map_err(|source| GatewayError::Bind { address, source })
}

impl HttpBridge {
    pub(crate) async fn bind(gateway: Gateway) -> Result<Self, GatewayError> {
        let config = gateway.config();
        router::check_origins(&config.cors_origins)?;
        let tls = Tls::load(config)?;
        let (listener, address) = listen(config.bind).await?;
        let ollama = match config.ollama_bind {
            Some(address) => Some(ollama_port::bind(address, config).await?),
            None => None,
        };
        if tls.is_none() && !address.ip().is_loopback() {
            warn!(%address, "HTTP without TLS beyond this machine: API keys and prompts travel in the clear");
        }
        Ok(Self { gateway, listener, address, tls, ollama })
    }

    /// Returns the address that it listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the address for Ollama's clients, if it has one.
    pub(crate) fn ollama_address(&self) -> Option<SocketAddr> {
        self.ollama.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop`, then drains: waits for the requests under way, at most for the drain time. Background tasks
    /// run until `drained`.
    pub(crate) async fn run(self, stop: CancellationToken, drained: CancellationToken) {
        let Self { gateway, listener, address, tls, ollama } = self;
        let tracker = gateway.tracker().clone();
        let drain = seconds(gateway.config().drain_secs) + CUT_WITHIN;
        let slots = Arc::new(Semaphore::new(gateway.config().connections_max.min(Semaphore::MAX_PERMITS)));
        let turn_away = TurnAway::new(gateway.config());
        let abort = CancellationToken::new();
        if let Some(tls) = &tls {
            tracker.spawn(tls.clone().watch(gateway.clone(), drained));
        }
        let connections = Connections::new(gateway, tls, stop.clone(), abort.clone());
        info!(%address, "serving HTTP");
        let open = tokio_util::task::TaskTracker::new();
        let take = |connections: &Connections, stream: TcpStream, peer: SocketAddr| {
            let slot = slots.clone().try_acquire_owned();
            match (slot, connections.permit(peer.ip())) {
                (Ok(slot), Ok(permit)) => {
                    open.spawn(hold(connections.clone(), stream, peer, (slot, permit)));
                }
                _ if connections.is_tls() => drop(stream),
                (_, Err(TooMany)) => turn_away.address_full(stream, &open),
                (Err(_), Ok(_)) => turn_away.full(stream, &open),
            }
        };
        let serve = async |listener: TcpListener, connections: Connections| {
            while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
                match accepted {
                    Ok((stream, peer)) => take(&connections, stream, peer),
                    Err(error) => {
                        debug!(%error, "no connection could be accepted");
                        time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
            for (stream, peer) in close(listener) {
                take(&connections, stream, peer);
            }
        };
        let for_ollama = connections.for_ollama();
        let ollama = async {
            if let Some(listener) = ollama {
                serve(listener, for_ollama).await;
            }
        };
        tokio::join!(serve(listener, connections), ollama);
        open.close();
        if time::timeout(drain, open.wait()).await.is_err() {
            warn!(connections = open.len(), "closing connections that did not end in time");
            abort.cancel();
            open.wait().await;
        }
    }
}

/// Closes a listener. Returns the connections that the kernel had accepted for it, whose clients would see them reset.
fn close(listener: TcpListener) -> Vec<(TcpStream, SocketAddr)> {
    let Ok(listener) = listener.into_std() else { return vec![] };
    let waiting = std::iter::from_fn(|| listener.accept().ok()).take(BACKLOG_MAX);
    let usable = waiting.filter_map(|(stream, peer)| {
        stream.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(stream).ok()?, peer))
    });
    usable.collect()
}

/// The permits of a connection: one of the gateway's, and one of its address.
type ConnectionPermits = (OwnedSemaphorePermit, Option<OriginPermit>);

async fn hold(connections: Connections, stream: TcpStream, peer: SocketAddr, permits: ConnectionPermits) {
    connections.serve(stream, peer).await;
    drop(permits);
}
