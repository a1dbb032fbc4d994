//! The HTTP server: the OpenAI API, Tether's own API, the admin API, health checks and metrics.

mod admin;
mod answer_body;
mod chat;
mod completions;
mod connection;
mod embeddings;
mod errors;
mod extract;
mod health;
mod infer;
mod input_tokens;
mod job;
mod models;
mod openapi;
mod request_body;
mod router;
mod timeouts;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::connection::Connections;
use self::tls::Tls;
use crate::config::{CUT_WITHIN, seconds};
use crate::gateway::Gateway;

/// The pause after `accept` failed, for example for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The response to a connection above the limit, without TLS.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
    content-type: application/json\r\ncontent-length: 123\r\n\r\n\
    {\"error\":{\"message\":\"this gateway holds too many connections\",\"type\":\"overloaded_error\",\"param\":null,\"code\":\"unavailable\"}}";

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
}

impl HttpBridge {
    pub(crate) async fn bind(gateway: Gateway) -> Result<Self, GatewayError> {
        let config = gateway.config();
        router::check_origins(&config.cors_origins)?;
        let tls = Tls::load(config)?;
        let bound = TcpListener::bind(config.bind).await.and_then(|listener| {
            let address = listener.local_addr()?;
            Ok((listener, address))
        });
        let (listener, address) = bound.map_err(|source| GatewayError::Bind { address: config.bind, source })?;
        if tls.is_none() && !address.ip().is_loopback() {
            warn!(%address, "HTTP without TLS beyond this machine: API keys and prompts travel in the clear");
        }
        Ok(Self { gateway, listener, address, tls })
    }

    /// Returns the address that it listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then drains: waits for the requests under way, at most for the drain time. Background tasks
    /// run until `drained`.
    pub(crate) async fn run(self, stop: CancellationToken, drained: CancellationToken) {
        let Self { gateway, listener, address, tls } = self;
        let tracker = gateway.tracker().clone();
        let drain = seconds(gateway.config().drain_secs) + CUT_WITHIN;
        let slots = Arc::new(Semaphore::new(gateway.config().connections_max.min(Semaphore::MAX_PERMITS)));
        let abort = CancellationToken::new();
        if let Some(tls) = &tls {
            tracker.spawn(tls.clone().watch(gateway.clone(), drained));
        }
        let connections = Connections::new(gateway, tls, stop.clone(), abort.clone());
        info!(%address, "serving HTTP");
        let open = tokio_util::task::TaskTracker::new();
        while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
            match accepted {
                Ok((stream, peer)) => match slots.clone().try_acquire_owned() {
                    Ok(slot) => {
                        open.spawn(hold(connections.clone(), stream, peer, slot));
                    }
                    Err(_) => turn_away(&stream, connections.is_tls()),
                },
                Err(error) => {
                    debug!(%error, "no connection could be accepted");
                    time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        open.close();
        if time::timeout(drain, open.wait()).await.is_err() {
            warn!(connections = open.len(), "closing connections that did not end in time");
            abort.cancel();
            open.wait().await;
        }
    }
}

async fn hold(connections: Connections, stream: TcpStream, peer: SocketAddr, slot: OwnedSemaphorePermit) {
    connections.serve(stream, peer).await;
    drop(slot);
}

/// Sends the 503 response, as far as it fits into the socket's buffer at once.
fn turn_away(stream: &TcpStream, tls: bool) {
    if !tls {
        let _ = stream.try_write(FULL);
    }
}

#[cfg(test)]
mod tests {
    use super::FULL;

    #[test]
    fn the_canned_refusal_has_the_length_it_says() {
        let text = std::str::from_utf8(FULL).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("head and body");
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
        serde_json::from_str::<serde_json::Value>(body).expect("JSON");
    }
}
