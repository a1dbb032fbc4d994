//! Clients that do as little as clients can, each over one kept-alive connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

/// Sends requests to one server.
pub(crate) struct Load {
    runtime: Runtime,
    address: SocketAddr,
    key: Option<String>,
    model: String,
}

impl Load {
    pub(crate) fn new(address: SocketAddr, key: Option<String>, model: impl Into<String>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, address, key, model: model.into() }
    }

    /// Sends requests for one token, one after another. Returns the time of each: of the whole answer, or until the
    /// first event of a streamed one.
    pub(crate) fn one_after_another(&self, count: usize, stream: bool) -> Vec<Duration> {
        let request = self.request(1, stream);
        self.runtime.block_on(async {
            let mut client = Client::connect(self.address).await;
            let mut times = vec![];
            for _ in 0..count {
                let began = Instant::now();
                let first = client.ask(&request, began).await;
                times.push(if stream { first } else { began.elapsed() });
            }
            times
        })
    }

    /// Has several clients send requests at once.
    pub(crate) fn together(&self, clients: usize, requests: usize) {
        let request = self.request(1, false);
        self.run(clients, requests, &request);
    }

    /// Reads several long streams at once.
    pub(crate) fn streams(&self, streams: usize, events: usize) {
        let request = self.request(events, true);
        self.run(streams, 1, &request);
    }

    fn run(&self, clients: usize, requests: usize, request: &str) {
        self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for _ in 0..clients {
                let (address, request) = (self.address, request.to_owned());
                tasks.spawn(async move {
                    let mut client = Client::connect(address).await;
                    for _ in 0..requests {
                        client.ask(&request, Instant::now()).await;
                    }
                });
            }
            tasks.join_all().await;
        });
    }

    fn request(&self, tokens: usize, stream: bool) -> String {
        let body = format!(
            r#"{{"model":"{}","messages":[{{"role":"user","content":"hello there"}}],"max_tokens":{tokens},"stream":{stream}}}"#,
            self.model
        );
        let key = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\n{key}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self(BufReader::with_capacity(64 * 1024, stream))
    }

    /// Sends a request and reads the whole answer. Returns when its first event came, since `began`.
    async fn ask(&mut self, request: &str, began: Instant) -> Duration {
        self.0.get_mut().write_all(request.as_bytes()).await.unwrap();
        let mut line = String::new();
        let mut length = None;
        loop {
            line.clear();
            self.0.read_line(&mut line).await.unwrap();
            assert!(!line.is_empty(), "the server closed the connection");
            assert!(!line.starts_with("HTTP/1.1") || line.contains(" 200 "), "{line}");
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = Some(value.trim().parse::<usize>().unwrap());
            }
            if line == "\r\n" {
                break;
            }
        }
        match length {
            Some(length) => {
                let mut body = vec![0; length];
                self.0.read_exact(&mut body).await.unwrap();
                began.elapsed()
            }
            None => self.read_events(began).await,
        }
    }

    async fn read_events(&mut self, began: Instant) -> Duration {
        let (mut first, mut line, mut chunk) = (None, String::new(), vec![]);
        loop {
            line.clear();
            self.0.read_line(&mut line).await.unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            chunk.resize(size + 2, 0);
            self.0.read_exact(&mut chunk).await.unwrap();
            if size == 0 {
                return first.expect("an answer has a text");
            }
            if first.is_none() && chunk.windows(6).any(|part| part == b" word\"") {
                first = Some(began.elapsed());
            }
        }
    }
}
