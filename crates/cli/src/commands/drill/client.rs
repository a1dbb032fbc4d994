//! A client as the official SDKs are, which can be held at any moment of a request.

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Take};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::requests::{Request, RightAnswer, RightAnswers};

/// A server that sends nothing for this long has lost the request.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// How long a request with a key is sent again before it counts as lost.
const KEYED_FOR: Duration = Duration::from_secs(90);
/// How often the official SDKs try again by default.
const SDK_RETRIES: u32 = 2;
/// The first and the longest wait of the official SDKs before a try.
const WAIT_FIRST: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(8);
/// The longest response, in bytes.
const RESPONSE_MAX: u64 = 64 << 20;

/// A moment of a request, as its client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    Connected,
    HeadSent,
    HalfSent,
    BodySent,
    /// The head of the response has arrived.
    Head,
    /// So many thousandths of the text have arrived; with 0, the first piece.
    Text(u32),
    /// Every choice has its finish reason.
    Finished,
    /// The response is complete.
    Done,
}

/// Holds a client at a moment of its request.
#[derive(Debug, Default)]
pub(super) struct Tap {
    at: Option<Moment>,
    reached: Option<oneshot::Sender<()>>,
    resume: Option<oneshot::Receiver<()>>,
}

/// The other end of a [`Tap`].
#[derive(Debug)]
pub(super) struct TapHandle {
    pub(super) reached: oneshot::Receiver<()>,
    /// The client goes on once this is dropped.
    pub(super) hold: oneshot::Sender<()>,
}

impl Tap {
    pub(super) fn at(moment: Moment) -> (Self, TapHandle) {
        let ((reached, was_reached), (hold, resume)) = (oneshot::channel(), oneshot::channel());
        let tap = Self { at: Some(moment), reached: Some(reached), resume: Some(resume) };
        (tap, TapHandle { reached: was_reached, hold })
    }

    async fn reach(&mut self, moment: Moment) {
        let is_there = match (self.at, moment) {
            (Some(Moment::Text(wanted)), Moment::Text(now)) => now >= wanted,
            // The end of a text may come with its last piece.
            (Some(Moment::Text(_)), Moment::Finished | Moment::Done) => true,
            (Some(wanted), now) => wanted == now,
            (None, _) => false,
        };
        if !is_there {
            return;
        }
        self.at = None;
        if let (Some(reached), Some(resume)) = (self.reached.take(), self.resume.take())
            && reached.send(()).is_ok()
        {
            let _ = resume.await;
        }
    }
}

/// How a request ended for its client, after all tries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The response has its end.
    Whole,
    /// An error response or an error event: the code.
    Error(String),
    /// No connection, or one that ended before the response began.
    Unreachable,
    /// The response broke off without an error.
    Cut,
    /// Nothing came for a long time.
    Silent,
}

impl fmt::Display for End {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => formatter.write_str("whole"),
            Self::Error(code) => formatter.write_str(code),
            Self::Unreachable => formatter.write_str("no response"),
            Self::Cut => formatter.write_str("broken off"),
            Self::Silent => formatter.write_str("silence"),
        }
    }
}

/// What a client saw of a request.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) end: End,
    pub(super) texts: Vec<String>,
    /// The id of the last try that got a response.
    pub(super) request_id: String,
    pub(super) tries: u32,
    /// The longest time between two pieces of the answer, from the first one on.
    pub(super) pause: Duration,
    /// Lengths of the texts that all tries read together.
    pub(super) read_bytes: usize,
    /// Completion tokens in the response's usage.
    pub(super) tokens: Option<u32>,
}

/// Clients of one gateway.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) address: SocketAddr,
    pub(super) key: String,
    pub(super) model: &'static str,
    pub(super) right: Arc<RightAnswers>,
}

/// One try's response, as far as it came.
#[derive(Default)]
struct Answer {
    choices: Vec<Choice>,
    last_event: Option<String>,
    tokens: Option<u32>,
    last_piece: Option<Instant>,
}

#[derive(Default, Clone)]
struct Choice {
    text: String,
    is_finished: bool,
}

/// How a try ended.
enum TryEnd {
    Whole,
    Unreachable,
    /// An error before the answer began, and whether it is worth another try.
    Refused {
        code: String,
        status: u16,
        is_final: bool,
        wait: Option<Duration>,
    },
    /// An error event after the answer had begun.
    Failed(String),
    Cut,
    Silent,
}

impl Client {
    /// Asks until there is an answer, or as long as a client of its kind does.
    pub(super) async fn ask(&self, request: &Request, mut tap: Tap) -> Seen {
        let began = Instant::now();
        let mut seen = Seen {
            end: End::Unreachable,
            texts: vec![],
            request_id: String::new(),
            tries: 0,
            pause: Duration::ZERO,
            read_bytes: 0,
            tokens: None,
        };
        let mut answer = Answer::default();
        loop {
            let resumed = answer.last_event.clone().filter(|_| request.key.is_some());
            if resumed.is_none() {
                answer = Answer::default();
            }
            let (had, resumes) = (answer.length(), resumed.is_some());
            let end = self.attempt(request, seen.tries, resumed, &mut answer, &mut seen, &mut tap).await;
            seen.tries += 1;
            seen.read_bytes += answer.length() - had;
            seen.texts = answer.choices.iter().map(|choice| choice.text.clone()).collect();
            seen.tokens = answer.tokens;
            let is_begun = matches!(end, TryEnd::Failed(_) | TryEnd::Cut);
            let (end, wait) = match end {
                TryEnd::Whole => (End::Whole, None),
                TryEnd::Unreachable => (End::Unreachable, Some(None)),
                TryEnd::Refused { code, status, is_final, wait } => {
                    // The event that the client has is of an answer that is gone. It asks for the new one.
                    let is_of_gone_answer = status == 422 && resumes;
                    if is_of_gone_answer {
                        answer = Answer::default();
                    }
                    (End::Error(code), (!is_final || is_of_gone_answer).then_some(wait))
                }
                TryEnd::Failed(code) => (End::Error(format!("event {code}")), Some(None)),
                TryEnd::Cut => (End::Cut, Some(None)),
                TryEnd::Silent => (End::Silent, None),
            };
            seen.end = end;
            let Some(wait) = wait else { return seen };
            let may_try = match request.key {
                Some(_) => began.elapsed() < KEYED_FOR,
                // SDKs do not repeat a request whose answer has begun. openai-python repeats one in one piece.
                None => seen.tries <= SDK_RETRIES && !(is_begun && request.is_streamed),
            };
            if !may_try {
                return seen;
            }
            let usual = (WAIT_FIRST * 2_u32.pow(seen.tries.min(5) - 1)).min(WAIT_MAX);
            // With a key a client loses nothing by asking soon.
            let usual = if request.key.is_some() { usual.min(WAIT_FIRST) } else { usual };
            tokio::time::sleep(wait.unwrap_or(usual).min(WAIT_MAX)).await;
        }
    }

    async fn attempt(
        &self,
        request: &Request,
        earlier: u32,
        resumed: Option<String>,
        answer: &mut Answer,
        seen: &mut Seen,
        tap: &mut Tap,
    ) -> TryEnd {
        let body = request.question.body(self.model, request.is_streamed).to_string();
        let mut head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\
             x-stainless-retry-count: {earlier}\r\ntraceparent: 00-{}-00000000000000{:02x}-01\r\n",
            self.address,
            self.key,
            body.len(),
            request.trace_text(),
            earlier.min(254) + 1
        );
        if let Some(key) = &request.key {
            let _ = write!(head, "idempotency-key: {key}\r\n");
        }
        if let Some(event) = resumed {
            let _ = write!(head, "last-event-id: {event}\r\n");
        }
        head.push_str("\r\n");
        let Ok(Ok(mut stream)) = timeout(SILENCE_MAX, TcpStream::connect(self.address)).await else {
            return TryEnd::Unreachable;
        };
        let _ = stream.set_nodelay(true);
        tap.reach(Moment::Connected).await;
        let (first, second) = body.as_bytes().split_at(body.len() / 2);
        let parts = [(head.as_bytes(), Moment::HeadSent), (first, Moment::HalfSent), (second, Moment::BodySent)];
        for (part, moment) in parts {
            if stream.write_all(part).await.is_err() {
                return TryEnd::Unreachable;
            }
            tap.reach(moment).await;
        }
        let mut reader = Reader::new(stream);
        let head = match timeout(SILENCE_MAX, reader.head()).await {
            Ok(Some(head)) => head,
            Ok(None) => return TryEnd::Unreachable,
            Err(_) => return TryEnd::Silent,
        };
        if let Some(id) = head.header("x-request-id") {
            id.clone_into(&mut seen.request_id);
        }
        tap.reach(Moment::Head).await;
        let end = if head.status == 200 && request.is_streamed {
            self.read_events(request, &mut reader, answer, seen, tap).await
        } else {
            read_document(&head, &mut reader, answer).await
        };
        if matches!(end, TryEnd::Whole) {
            tap.reach(Moment::Text(1000)).await;
            tap.reach(Moment::Done).await;
        }
        end
    }

    async fn read_events(
        &self,
        request: &Request,
        reader: &mut Reader,
        answer: &mut Answer,
        seen: &mut Seen,
        tap: &mut Tap,
    ) -> TryEnd {
        let expected = self.right.get(&request.question).map_or(usize::MAX, RightAnswer::len).max(1);
        let mut text: Vec<u8> = vec![];
        loop {
            match timeout(SILENCE_MAX, reader.body()).await {
                Ok(Some(bytes)) => text.extend_from_slice(&bytes),
                Ok(None) => return TryEnd::Cut,
                Err(_) => return TryEnd::Silent,
            }
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let line = line.trim_end();
                if let Some(id) = line.strip_prefix("id: ") {
                    answer.last_event = Some(id.to_owned());
                } else if let Some(data) = line.strip_prefix("data: ") {
                    if data == "[DONE]" {
                        return if answer.is_finished() { TryEnd::Whole } else { TryEnd::Cut };
                    }
                    let event: Value = serde_json::from_str(data).unwrap_or_default();
                    if let Some(code) = event["error"]["code"].as_str() {
                        return TryEnd::Failed(code.to_owned());
                    }
                    if answer.take(&event, "delta") {
                        let last = answer.last_piece.replace(Instant::now());
                        seen.pause = seen.pause.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
                        tap.reach(Moment::Text((1000 * answer.length() / expected) as u32)).await;
                    }
                    if answer.is_finished() {
                        tap.reach(Moment::Finished).await;
                    }
                }
            }
        }
    }
}

async fn read_document(head: &Head, reader: &mut Reader, answer: &mut Answer) -> TryEnd {
    let mut text: Vec<u8> = vec![];
    loop {
        match timeout(SILENCE_MAX, reader.body()).await {
            Ok(Some(bytes)) => text.extend_from_slice(&bytes),
            Ok(None) if reader.is_complete => break,
            Ok(None) => return TryEnd::Cut,
            Err(_) => return TryEnd::Silent,
        }
    }
    let document: Value = serde_json::from_slice(&text).unwrap_or_default();
    if head.status == 200 {
        answer.take(&document, "message");
        return if answer.is_finished() { TryEnd::Whole } else { TryEnd::Cut };
    }
    let code = document["error"]["code"].as_str().unwrap_or("an error without a code");
    let wait = head.header("retry-after-ms").and_then(|wait| wait.parse().ok()).map(Duration::from_millis);
    let is_for_sdks = matches!(head.status, 408 | 409 | 429 | 500..);
    let is_final = !is_for_sdks || head.header("x-should-retry") == Some("false");
    TryEnd::Refused { code: format!("{} {code}", head.status), status: head.status, is_final, wait }
}

impl Answer {
    fn length(&self) -> usize {
        self.choices.iter().map(|choice| choice.text.len()).sum()
    }

    fn is_finished(&self) -> bool {
        !self.choices.is_empty() && self.choices.iter().all(|choice| choice.is_finished)
    }

    /// Takes in an event or a document. Returns whether it had any text.
    fn take(&mut self, event: &Value, part: &str) -> bool {
        let before = self.length();
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(0).min(127) as usize;
            if self.choices.len() <= index {
                self.choices.resize(index + 1, Choice::default());
            }
            let known = &mut self.choices[index];
            let part = &choice[part];
            for piece in ["reasoning_content", "content"] {
                known.text.push_str(part[piece].as_str().unwrap_or_default());
            }
            for call in part["tool_calls"].as_array().into_iter().flatten() {
                for piece in ["name", "arguments"] {
                    known.text.push_str(call["function"][piece].as_str().unwrap_or_default());
                }
            }
            known.is_finished |= choice["finish_reason"].is_string();
        }
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            self.tokens = Some(tokens as u32);
        }
        self.length() > before
    }
}

/// The head of a response.
struct Head {
    status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Reads one HTTP/1.1 response.
struct Reader {
    stream: BufReader<Take<TcpStream>>,
    /// Bytes of the body that are to come, if the head says so.
    left: Option<u64>,
    /// The body has had its end.
    is_complete: bool,
}

impl Reader {
    fn new(stream: TcpStream) -> Self {
        Self { stream: BufReader::new(stream.take(RESPONSE_MAX)), left: None, is_complete: false }
    }

    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line).await {
            Ok(_) if line.ends_with('\n') => Some(line.trim_end().to_owned()),
            _ => None,
        }
    }

    async fn head(&mut self) -> Option<Head> {
        let status = self.line().await?.split(' ').nth(1)?.parse().ok()?;
        let mut head = Head { status, headers: vec![] };
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            head.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        self.left = head.header("content-length").and_then(|length| length.parse().ok());
        Some(head)
    }

    /// Returns the next bytes of the body; `None` at its end, whether or not it is complete.
    async fn body(&mut self) -> Option<Vec<u8>> {
        if self.is_complete {
            return None;
        }
        match self.left {
            Some(left) => {
                let bytes = self.exactly(left).await?;
                self.is_complete = true;
                Some(bytes)
            }
            None => {
                let length = u64::from_str_radix(self.line().await?.split(';').next()?.trim(), 16).ok()?;
                let bytes = self.exactly(length).await?;
                self.line().await?;
                self.is_complete = length == 0;
                (length > 0).then_some(bytes)
            }
        }
    }

    async fn exactly(&mut self, length: u64) -> Option<Vec<u8>> {
        if length > RESPONSE_MAX {
            return None;
        }
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).await.ok()?;
        Some(bytes)
    }
}
