//! Refuses connections above a limit, before any of their bytes are read.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use protocol::{ErrorCode, WireError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::openai::response::error;

/// How long a refused connection stays open for its client to read the response. A connection that is closed with
/// unread bytes is reset, and the client may lose the response.
const LINGER: Duration = Duration::from_secs(1);
/// Maximum number of refused connections that stay open.
const LINGERING_MAX: usize = 64;

/// Sends the responses to connections above the limits.
pub(super) struct TurnAway {
    full: Bytes,
    address_full: Bytes,
    lingering: Arc<Semaphore>,
}

/// Returns the error of a client whose address has too many connections or requests.
pub(super) fn too_many(config: &Config) -> WireError {
    let message = format!(
        "your address already has {} connections here, the most that one may have: reuse them, or close idle ones. \
         Operators raise gateway.connections_per_address_max, or name their proxy in gateway.trusted_proxies",
        config.connections_per_address_max
    );
    WireError::new(ErrorCode::RateLimitExceeded, message)
}

impl TurnAway {
    pub(super) fn new(config: &Config) -> Self {
        let full = WireError::new(ErrorCode::Unavailable, "this gateway holds too many connections");
        Self {
            full: response("503 Service Unavailable", &full),
            address_full: response("429 Too Many Requests", &too_many(config)),
            lingering: Arc::new(Semaphore::new(LINGERING_MAX)),
        }
    }

    /// Refuses a connection because the gateway has too many.
    pub(super) fn full(&self, stream: TcpStream, tasks: &TaskTracker) {
        self.send(stream, self.full.clone(), tasks);
    }

    /// Refuses a connection because its address has too many.
    pub(super) fn address_full(&self, stream: TcpStream, tasks: &TaskTracker) {
        self.send(stream, self.address_full.clone(), tasks);
    }

    fn send(&self, stream: TcpStream, response: Bytes, tasks: &TaskTracker) {
        match self.lingering.clone().try_acquire_owned() {
            Ok(permit) => {
                tasks.spawn(async move {
                    let _ = time::timeout(LINGER, linger(stream, response)).await;
                    drop(permit);
                });
            }
            // As much as fits into the socket's buffer.
            Err(_) => drop(stream.try_write(&response)),
        }
    }
}

/// Sends the response and waits until the client has closed the connection.
async fn linger(mut stream: TcpStream, response: Bytes) -> std::io::Result<()> {
    stream.write_all(&response).await?;
    stream.shutdown().await?;
    let mut unread = [0; 1024];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

fn response(status: &str, error: &WireError) -> Bytes {
    let mut body = BytesMut::new();
    error::write(error, &mut body);
    let head = format!(
        "HTTP/1.1 {status}\r\nretry-after: 1\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), &body].concat().into()
}
