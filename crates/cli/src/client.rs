//! Talks to a gateway over HTTP, as any client would.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use futures_util::StreamExt as _;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::args::ServerArgs;
use crate::data_folder::DataFolder;
use crate::settings::{Env, Settings};

/// A gateway and a key to it.
#[derive(Debug, Clone)]
pub struct GatewayClient {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

/// The gateway answered with an error.
#[derive(Debug, thiserror::Error)]
#[error("{url} answered {status}: {message}")]
struct Refused {
    url: String,
    status: StatusCode,
    message: String,
}

impl ServerArgs {
    /// Returns the API key: that of the file that was named, else the environment's, else the data folder's.
    pub fn api_key(&self, data: &DataFolder, env: &Env) -> anyhow::Result<Option<String>> {
        Ok(match &self.api_key_file {
            Some(file) => {
                let text =
                    std::fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))?;
                Some(text.trim().to_owned())
            }
            None => env.get("TETHER_API_KEY").map(str::to_owned).or_else(|| data.api_key()),
        })
    }
}

/// A streamed answer, read to its end.
#[derive(Debug, Clone)]
pub struct ChatAnswer {
    /// The whole text.
    pub text: String,
    /// The job's name.
    pub correlation_id: String,
    /// Tries it took.
    pub attempts: u32,
    /// From the request to the first text.
    pub first_token: Duration,
    /// From the first text to the last.
    pub rest: Duration,
    /// Tokens of the answer.
    pub completion_tokens: u32,
}

impl GatewayClient {
    /// Makes a client of an address such as `http://127.0.0.1:7070`.
    pub fn new(url: impl Into<String>, key: Option<String>) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(Duration::from_secs(5)).tcp_nodelay(true).build()?;
        Ok(Self { http, url: base(&url.into())?, key })
    }

    /// Finds the gateway and the key: what the arguments say, else what the data folder holds.
    pub fn find(args: &ServerArgs, settings: &Settings, data: &DataFolder, env: &Env) -> anyhow::Result<Self> {
        let url =
            args.url.clone().or_else(|| data.address()).unwrap_or_else(|| format!("http://{}", settings.gateway.bind));
        Self::new(url, args.api_key(data, env)?)
    }

    /// Returns the gateway's address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Says whether anything answers there.
    pub async fn answers(&self) -> bool {
        let request = self.http.get(format!("{}/healthz", self.url)).timeout(Duration::from_secs(2));
        request.send().await.is_ok_and(|response| response.status().is_success())
    }

    /// Reads a JSON document.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.exchange(self.http.get(format!("{}{path}", self.url))).await
    }

    /// Lists the registered models; those that are served, where the key is not an operator's.
    pub async fn models(&self) -> anyhow::Result<Value> {
        match self.get("/admin/v1/models").await {
            // Gateways of an earlier version do not know the path.
            Err(error)
                if error
                    .downcast_ref::<Refused>()
                    .is_some_and(|refused| matches!(refused.status, StatusCode::FORBIDDEN | StatusCode::NOT_FOUND)) =>
            {
                self.get("/v1/models").await
            }
            listed => listed,
        }
    }

    /// Sends a JSON document and reads another.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.exchange(self.http.post(format!("{}{path}", self.url)).json(body)).await
    }

    /// Sends a change as a JSON document and reads another.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.exchange(self.http.patch(format!("{}{path}", self.url)).json(body)).await
    }

    /// Deletes something and reads what came of it.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.exchange(self.http.delete(format!("{}{path}", self.url))).await
    }

    async fn exchange<T: DeserializeOwned>(&self, request: RequestBuilder) -> anyhow::Result<T> {
        let response = self.send(request.timeout(Duration::from_secs(10))).await?;
        response.json().await.with_context(|| format!("{} answered nonsense", self.url))
    }

    /// Asks for an answer and hands out its text as it comes.
    pub async fn chat(&self, body: &Value, mut on_text: impl FnMut(&str)) -> anyhow::Result<ChatAnswer> {
        let began = Instant::now();
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).json(body);
        let response = self.send(request).await?;
        let header = |name: &str| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let mut answer = ChatAnswer {
            text: String::new(),
            correlation_id: header("x-request-id").unwrap_or_default(),
            attempts: header("x-tether-attempts").and_then(|text| text.parse().ok()).unwrap_or(1),
            first_token: Duration::ZERO,
            rest: Duration::ZERO,
            completion_tokens: 0,
        };
        let mut first = None;
        let mut events = Events::of(response);
        while let Some(event) = events.next().await? {
            if let Some(message) = event.pointer("/error/message").and_then(Value::as_str) {
                bail!("the answer broke off: {message}");
            }
            if let Some(tokens) = event.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
                answer.completion_tokens = tokens as u32;
            }
            let Some(text) = event.pointer("/choices/0/delta/content").and_then(Value::as_str) else { continue };
            if !text.is_empty() {
                let first = *first.get_or_insert_with(Instant::now);
                answer.first_token = first - began;
                answer.rest = first.elapsed();
                answer.text.push_str(text);
                on_text(text);
            }
        }
        Ok(answer)
    }

    async fn send(&self, mut request: RequestBuilder) -> anyhow::Result<Response> {
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(|error| {
            if error.is_connect() {
                anyhow!("nothing answers at {}; start the network with `tether up`", self.url)
            } else {
                anyhow!("{} does not answer: {error}", self.url)
            }
        })?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        if status == StatusCode::UNAUTHORIZED && self.key.is_none() {
            bail!(
                "{} wants an API key: name the network's data folder with --data-dir, or the file that holds a key with \
                 --api-key-file",
                self.url
            );
        }
        let body: Value = response.json().await.unwrap_or_default();
        let message = body.pointer("/error/message").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
        bail!(Refused { url: self.url.clone(), status, message })
    }
}

/// Returns a gateway's address as requests begin with it: people leave the scheme out, and give the address that OpenAI's
/// clients want.
fn base(given: &str) -> anyhow::Result<String> {
    let trimmed = given.trim();
    // A scheme alone is no address without its slashes either.
    let trimmed = if trimmed.ends_with("://") { trimmed } else { trimmed.trim_end_matches('/') };
    let trimmed = trimmed.strip_suffix("/v1").unwrap_or(trimmed);
    let whole = if trimmed.contains("://") { trimmed.to_owned() } else { format!("http://{trimmed}") };
    match reqwest::Url::parse(&whole) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(whole),
        _ => bail!("{given:?} is no address of a gateway; write it as http://HOST:PORT"),
    }
}

/// Server-sent events whose data are JSON, up to `[DONE]`.
struct Events {
    response: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    buffer: Vec<u8>,
    done: bool,
}

impl Events {
    fn of(response: Response) -> Self {
        Self { response: Box::pin(response.bytes_stream()), buffer: vec![], done: false }
    }

    async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        while !self.done {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                match line.strip_prefix(b"data: ").map(<[u8]>::trim_ascii) {
                    Some(b"[DONE]") => self.done = true,
                    Some(data) => return Ok(Some(serde_json::from_slice(data).context("an event is not JSON")?)),
                    None => {}
                }
                continue;
            }
            match self.response.next().await {
                Some(bytes) => self.buffer.extend_from_slice(&bytes.context("the connection broke off")?),
                None => bail!("the answer has no end"),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_as_people_write_it() {
        for given in ["http://127.0.0.1:7070", "http://127.0.0.1:7070/", "127.0.0.1:7070", " 127.0.0.1:7070/v1/ "] {
            assert_eq!(base(given).expect(given), "http://127.0.0.1:7070");
        }
        assert_eq!(base("https://gpu.example/v1").expect("good"), "https://gpu.example");
        for given in ["", "ftp://host", "http://", "http://a b"] {
            let error = base(given).expect_err(given).to_string();
            assert!(error.contains("http://HOST:PORT"), "{error}");
        }
    }
}
