//! Connections that wait for further requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use parking_lot::Mutex;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};

use super::response::{Connection, Unsent};
use super::{HttpError, Response, ServerAddress};

/// The time limit for connecting to a server.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection waits for another request.
const IDLE_MAX: Duration = Duration::from_mins(1);
/// How many connections to a server wait.
const WAITING_MAX: usize = 256;

/// The connections to all servers that wait for a request, by server.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<HashMap<String, Vec<Waiting>>>);

#[derive(Debug)]
struct Waiting {
    connection: Connection,
    since: Instant,
}

impl Pool {
    /// Sends a request on a waiting connection or a new one, and waits for the head of its response.
    pub(super) async fn send(
        self: &Arc<Self>,
        server: &ServerAddress,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response, HttpError> {
        loop {
            let waiting = self.take(server.as_str());
            let is_new = waiting.is_none();
            let mut connection = match waiting {
                Some(connection) => connection,
                None => connect(server).await?,
            };
            match connection.send(request).await {
                Ok(status) => {
                    return Ok(Response::new(status, connection, self.clone(), server.as_str().to_owned()));
                }
                // The server has closed it meanwhile.
                Err(Unsent { request: Some(unsent), .. }) if !is_new => request = unsent,
                Err(Unsent { error, .. }) => return Err(error.into()),
            }
        }
    }

    /// Takes the connection that was used last, and drops those that have waited too long.
    fn take(&self, server: &str) -> Option<Connection> {
        let mut servers = self.0.lock();
        let waiting = servers.get_mut(server)?;
        let now = Instant::now();
        waiting.retain(|waiting| now - waiting.since < IDLE_MAX);
        while let Some(Waiting { mut connection, .. }) = waiting.pop() {
            if connection.is_free() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection whose response was read.
    pub(super) fn put(&self, server: String, connection: Connection) {
        let mut servers = self.0.lock();
        let waiting = servers.entry(server).or_default();
        if waiting.len() < WAITING_MAX {
            waiting.push(Waiting { connection, since: Instant::now() });
        }
    }
}

async fn connect(server: &ServerAddress) -> Result<Connection, HttpError> {
    let opened = timeout(CONNECT_WITHIN, open(server)).await;
    let stream = opened.ok().flatten().ok_or(HttpError::Unreachable)?;
    // With Nagle's algorithm, the end of a long request would wait for the server's acknowledgement.
    let _ = stream.set_nodelay(true);
    Connection::over(stream).await
}

/// Tries the addresses of a server one after another. One that does not answer leaves time for the others.
async fn open(server: &ServerAddress) -> Option<TcpStream> {
    let addresses: Vec<_> = lookup_host(&server.socket).await.ok()?.collect();
    let each = CONNECT_WITHIN / addresses.len().max(1) as u32;
    for address in addresses {
        if let Ok(Ok(stream)) = timeout(each, TcpStream::connect(address)).await {
            return Some(stream);
        }
    }
    None
}
