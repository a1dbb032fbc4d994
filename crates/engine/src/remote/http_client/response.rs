//! A connection to a server, and the response that is read from it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::HttpError;
use super::pool::Pool;

/// How many pieces of a response may be left when its connection is to be used again.
const PIECES_LEFT_MAX: usize = 4;

type Transmission = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// A connection. It makes progress only while somebody waits for something of it.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// `None` once it is closed.
    transmission: Option<Pin<Box<Transmission>>>,
    /// The response that is being read.
    body: Option<Incoming>,
}

/// A response whose body is read piece by piece. Dropping it closes the connection.
#[derive(Debug)]
pub(in crate::remote) struct Response {
    status: StatusCode,
    connection: Connection,
    pool: Arc<Pool>,
    /// The server that sends it.
    server: String,
}

impl Connection {
    /// Makes a connection of a stream that was opened just now.
    pub(super) async fn over(stream: TcpStream) -> Result<Self, HttpError> {
        let (sender, transmission) = http1::handshake(TokioIo::new(stream)).await?;
        Ok(Self { sender, transmission: Some(Box::pin(transmission)), body: None })
    }

    /// Sends a request and waits for the head of its response. If the request was not sent, it is returned.
    pub(super) async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<StatusCode, Unsent> {
        let answered = self.sender.try_send_request(request);
        match drive(&mut self.transmission, answered).await {
            Ok(response) => {
                let status = response.status();
                self.body = Some(response.into_body());
                Ok(status)
            }
            Err(mut failed) => Err(Unsent { request: failed.take_message(), error: failed.into_error() }),
        }
    }

    async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        while let Some(body) = &mut self.body {
            match drive(&mut self.transmission, body.frame()).await.transpose()? {
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                None => self.body = None,
            }
        }
        Ok(None)
    }

    /// Returns whether another request can be sent: the last response has ended, and the server has not closed the
    /// connection.
    pub(super) fn is_free(&mut self) -> bool {
        for _ in 0..PIECES_LEFT_MAX {
            match self.chunk().now_or_never() {
                Some(Ok(Some(_))) => {}
                Some(Ok(None)) => break,
                Some(Err(_)) | None => return false,
            }
        }
        drive(&mut self.transmission, self.sender.ready()).now_or_never().is_some_and(|ready| ready.is_ok())
    }
}

/// A request that failed, and the request itself if the server has nothing of it.
pub(super) struct Unsent {
    pub(super) request: Option<Request<Full<Bytes>>>,
    pub(super) error: hyper::Error,
}

impl Response {
    pub(super) fn new(status: StatusCode, connection: Connection, pool: Arc<Pool>, server: String) -> Self {
        Self { status, connection, pool, server }
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns the next piece of the body, or `None` at its end. Cancel safe.
    pub(in crate::remote) async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        self.connection.chunk().await
    }

    /// Keeps the connection for further requests. Of the body, nothing but its end may be left.
    pub(in crate::remote) fn release(self) {
        self.pool.put(self.server, self.connection);
    }
}

/// Waits for something of a connection, and drives the connection meanwhile.
async fn drive<T>(transmission: &mut Option<Pin<Box<Transmission>>>, wanted: impl Future<Output = T>) -> T {
    let mut wanted = pin!(wanted);
    poll_fn(|context| {
        if let Poll::Ready(came) = wanted.as_mut().poll(context) {
            return Poll::Ready(came);
        }
        advance(transmission, context);
        wanted.as_mut().poll(context)
    })
    .await
}

/// Sends and receives what can be. An error of the connection reaches whoever waits for something of it.
fn advance(transmission: &mut Option<Pin<Box<Transmission>>>, context: &mut Context<'_>) {
    let has_ended = transmission.as_mut().is_some_and(|transmission| transmission.poll_unpin(context).is_ready());
    if has_ended {
        *transmission = None;
    }
}
