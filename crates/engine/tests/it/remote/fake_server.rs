//! A server that answers as a test tells it to, one request a connection.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What is answered.
#[derive(Clone)]
pub(super) enum Reply {
    /// A status and a body.
    Json(u16, String),
    /// The URL of another server, where the request belongs.
    Elsewhere(String),
    /// An event stream that ends.
    Events(String),
    /// An event stream that begins and then says nothing more.
    EventsAndSilence(String),
    /// Nothing at all.
    Silence,
}

pub(super) struct FakeServer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(String, String, Value)>>>,
    left: Arc<Notify>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl FakeServer {
    pub(super) async fn start(answer: impl Fn(&str, &Value) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let server = Self {
            address: listener.local_addr().expect("an address"),
            seen: Arc::default(),
            left: Arc::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let (seen, left, stop, tasks) =
            (server.seen.clone(), server.left.clone(), server.stop.clone(), server.tasks.clone());
        let answer = Arc::new(answer);
        server.tasks.spawn(async move {
            while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
                let (stream, _) = accepted.expect("a connection");
                let (seen, left, answer, stop) = (seen.clone(), left.clone(), answer.clone(), stop.clone());
                tasks.spawn(async move { stop.run_until_cancelled(serve(stream, &seen, &left, &*answer)).await });
            }
        });
        server
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// Returns the body that was last sent to a path.
    pub(super) fn request(&self, path: &str) -> Option<Value> {
        let seen = self.seen.lock();
        seen.iter().rev().find(|(_, seen, _)| seen == path).map(|(_, _, body)| body.clone())
    }

    /// Returns the head of every request.
    pub(super) fn heads(&self) -> Vec<String> {
        self.seen.lock().iter().map(|(head, _, _)| head.clone()).collect()
    }

    /// Waits until a client closes a connection whose answer is not whole.
    pub(super) async fn left(&self) {
        self.left.notified().await;
    }

    /// Closes every connection, and takes no more.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: &Mutex<Vec<(String, String, Value)>>,
    left: &Notify,
    answer: &(impl Fn(&str, &Value) -> Reply + Send + Sync),
) {
    let Some((head, body)) = request(&mut stream).await else { return };
    let path = head.split(' ').nth(1).expect("a path").to_owned();
    let reply = answer(&path, &body);
    seen.lock().push((head, path, body));
    let (text, is_whole) = match reply {
        Reply::Json(status, body) => {
            let head = format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nconnection: close\r\n");
            (format!("{head}content-length: {}\r\n\r\n{body}", body.len()), true)
        }
        Reply::Elsewhere(url) => {
            let head = "HTTP/1.1 307 X\r\nconnection: close\r\ncontent-length: 0\r\n";
            (format!("{head}location: {url}/chat/completions\r\n\r\n"), true)
        }
        Reply::Events(events) => (format!("{}{events}", event_head()), true),
        Reply::EventsAndSilence(events) => (format!("{}{events}", event_head()), false),
        Reply::Silence => (String::new(), false),
    };
    stream.write_all(text.as_bytes()).await.expect("the client is there");
    if !is_whole {
        // Nothing more comes but the end of the connection.
        let _ = stream.read(&mut [0; 16]).await;
        left.notify_one();
    }
}

fn event_head() -> &'static str {
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
}

async fn request(stream: &mut TcpStream) -> Option<(String, Value)> {
    let mut bytes = Vec::new();
    let end = loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).expect("a head of ASCII");
    let length = head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    while bytes.len() < end + 4 + length.unwrap_or(0) {
        stream.read_buf(&mut bytes).await.ok()?;
    }
    Some((head, serde_json::from_slice(&bytes[end + 4..]).unwrap_or_default()))
}
