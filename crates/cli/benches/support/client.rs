//! A client over HTTP that does as little as a client can.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A client that does as little as a client can, over one kept-alive connection.
pub(crate) struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    key: String,
}

/// What a client heard of one answer.
pub(crate) struct Heard {
    pub(crate) first: Duration,
    pub(crate) total: Duration,
    pub(crate) events: usize,
    pub(crate) longest_gap: Duration,
}

impl Client {
    pub(crate) fn connect(address: &str, key: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { reader: BufReader::new(stream.try_clone().unwrap()), stream, key: key.to_owned() }
    }

    pub(crate) fn ask(&mut self, tokens: u32, stream: bool) -> Heard {
        let body = format!(
            r#"{{"model":"tether-tiny","messages":[{{"role":"user","content":"hello there"}}],"max_tokens":{tokens},"stream":{stream}}}"#
        );
        let began = Instant::now();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.key,
            body.len()
        );
        self.stream.write_all(head.as_bytes()).unwrap();
        let mut line = String::new();
        let mut length = None;
        loop {
            line.clear();
            self.reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                length = Some(value.trim().parse::<usize>().unwrap());
            }
            assert!(!line.starts_with("HTTP/1.1") || line.contains(" 200 "), "{line}");
            if line == "\r\n" {
                break;
            }
        }
        let mut heard = Heard { first: began.elapsed(), total: Duration::ZERO, events: 0, longest_gap: Duration::ZERO };
        if let Some(length) = length {
            let mut body = vec![0; length];
            self.reader.read_exact(&mut body).unwrap();
        } else {
            self.read_events(began, &mut heard);
        }
        heard.total = began.elapsed();
        heard
    }

    fn read_events(&mut self, began: Instant, heard: &mut Heard) {
        let mut last = began;
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            self.reader.read_exact(&mut chunk).unwrap();
            if size == 0 {
                return;
            }
            let text = std::str::from_utf8(&chunk).unwrap();
            let contents = text.matches("\"delta\":{\"content\":\"").count();
            if contents > 0 {
                let now = Instant::now();
                if heard.events == 0 {
                    heard.first = began.elapsed();
                } else {
                    heard.longest_gap = heard.longest_gap.max(now - last);
                }
                last = now;
                heard.events += contents;
            }
        }
    }
}

/// Has several clients ask at once, and returns how many events they heard.
pub(crate) fn run_clients(
    address: &str,
    key: &str,
    clients: usize,
    requests: usize,
    tokens: u32,
    stream: bool,
) -> usize {
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            let mut client = Client::connect(address, key);
            std::thread::spawn(move || (0..requests).map(|_| client.ask(tokens, stream).events).sum::<usize>())
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).sum()
}
