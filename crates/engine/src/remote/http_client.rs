//! An HTTP/1.1 client for servers. Every wait has a deadline, and every read has a limit.
//!
//! Whoever waits for a response drives its connection, so that no other task has to be woken for it.

mod address;
mod pool;
mod response;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use tokio::time::timeout;

pub use self::address::{AddressError, ServerAddress};
use self::pool::Pool;
pub(super) use self::response::Response;

/// The maximum length of a response that describes something.
const DESCRIPTION_BYTES_MAX: usize = 4 << 20;

/// Why a request to a server failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpError {
    #[error("the server cannot be reached")]
    Unreachable,
    #[error("the server took too long")]
    TooSlow,
    #[error("the connection to the server broke: {0}")]
    Broken(#[from] hyper::Error),
    #[error("the server's API key has characters that a header may not have")]
    BadKey,
    #[error("the server's answer is too long")]
    TooLong,
    #[error("the server does not list models as OpenAI's API does")]
    NoModels,
    #[error("the server answered {status}")]
    Refused { status: u16, body: Vec<u8> },
}

/// A client for any number of servers. It follows no redirect and uses no proxy: those would send prompts and API keys
/// to other servers.
#[derive(Debug, Clone, Default)]
pub(super) struct HttpClient(Arc<Pool>);

impl HttpClient {
    /// Requests a description with GET.
    pub(super) async fn get(&self, server: &ServerAddress, path: &str, within: Duration) -> Result<Vec<u8>, HttpError> {
        self.whole(server, (Method::GET, path, Bytes::new()), DESCRIPTION_BYTES_MAX, within).await
    }

    /// Sends a request and reads its response, up to `bytes_max`.
    pub(super) async fn post(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        bytes_max: usize,
        within: Duration,
    ) -> Result<Vec<u8>, HttpError> {
        self.whole(server, (Method::POST, path, json(body)), bytes_max, within).await
    }

    /// Requests a description with POST and a body.
    pub(super) async fn ask(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        within: Duration,
    ) -> Result<Vec<u8>, HttpError> {
        self.post(server, path, body, DESCRIPTION_BYTES_MAX, within).await
    }

    /// Sends a request and returns its response with the body unread. Dropping the future or the response closes the
    /// connection.
    pub(super) async fn open(
        &self,
        server: &ServerAddress,
        path: &str,
        body: &Value,
        within: Duration,
    ) -> Result<Response, HttpError> {
        let begun = self.begin(server, (Method::POST, path, json(body)));
        timeout(within, begun).await.map_err(|_| HttpError::TooSlow)?
    }

    async fn whole(
        &self,
        server: &ServerAddress,
        request: (Method, &str, Bytes),
        bytes_max: usize,
        within: Duration,
    ) -> Result<Vec<u8>, HttpError> {
        let answer = async { read(self.begin(server, request).await?, bytes_max).await };
        timeout(within, answer).await.map_err(|_| HttpError::TooSlow)?
    }

    /// Sends a request and waits for a response that says that it succeeded.
    async fn begin(
        &self,
        server: &ServerAddress,
        (method, path, body): (Method, &str, Bytes),
    ) -> Result<Response, HttpError> {
        let response = self.0.send(server, server.request(method, path, body)?).await?;
        let status: StatusCode = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // The body explains the refusal. If it cannot be read, the status alone is returned.
        let body = read(response, DESCRIPTION_BYTES_MAX).await.unwrap_or_default();
        Err(HttpError::Refused { status: status.as_u16(), body })
    }
}

fn json(body: &Value) -> Bytes {
    body.to_string().into()
}

async fn read(mut response: Response, bytes_max: usize) -> Result<Vec<u8>, HttpError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if body.len() + piece.len() > bytes_max {
            return Err(HttpError::TooLong);
        }
        body.extend_from_slice(&piece);
    }
    response.release();
    Ok(body)
}
