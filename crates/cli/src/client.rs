//! HTTP client of a gateway.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http::{Method, StatusCode, Uri, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use self::exchange::{Credentials, Failure, Response};
use self::proof::FolderProof;
pub use self::trust::Trust;
use crate::addresses;
use crate::args::ServerArgs;
use crate::data_folder::DataFolder;
use crate::settings::{Env, Settings};

mod exchange;
mod proof;
mod trust;

/// Timeout of every request except a model's answer.
const WITHIN: Duration = Duration::from_secs(10);
/// The longest line of a response, in bytes. The server may be another program.
const LINE_MAX: usize = 16 << 20;
/// Timeout of the check whether a gateway is there.
const PRESENT_WITHIN: Duration = Duration::from_secs(2);

/// A gateway and a key to it.
#[derive(Debug, Clone)]
pub struct GatewayClient {
    base: Uri,
    url: String,
    key: Option<String>,
    trust: Trust,
    /// What it must prove before it is shown the key.
    proof: Option<FolderProof>,
}

/// Whether a gateway answers.
#[derive(Debug)]
pub enum Presence {
    Answers,
    /// Nothing answers, or a program that is not a gateway; the error says which.
    Absent(anyhow::Error),
    /// A gateway answers, or a program that pretends to be one, that does not run on this data folder.
    Foreign(anyhow::Error),
    /// It cannot be talked to, and the error says what to do.
    Closed(anyhow::Error),
}

impl ServerArgs {
    /// Returns the API key: from the named file, else the environment, else the data folder.
    pub fn api_key(&self, data: &DataFolder, env: &Env) -> anyhow::Result<Option<String>> {
        Ok(self.given_key(env)?.or_else(|| data.api_key()))
    }

    /// Returns the API key from the named file, else the environment.
    fn given_key(&self, env: &Env) -> anyhow::Result<Option<String>> {
        Ok(match &self.api_key_file {
            Some(file) => {
                let text =
                    std::fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))?;
                Some(text.trim().to_owned())
            }
            None => env.get("TETHER_API_KEY").map(str::to_owned),
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{url} answered {status}: {message}")]
pub struct Refusal {
    url: String,
    status: StatusCode,
    /// The gateway's error code, such as `model_loading`.
    pub code: String,
    /// The gateway's error message.
    pub message: String,
}

/// An answer that failed after it had begun.
#[derive(Debug, thiserror::Error)]
#[error("the answer broke off: {message}")]
pub struct BrokenOff {
    /// The gateway's error code, such as `worker_failed`.
    pub code: String,
    /// The gateway's error message.
    pub message: String,
}

/// A part of a streamed answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Reasoning before the answer.
    Thought(&'a str),
    /// Text of the answer.
    Text(&'a str),
}

/// A streamed answer, read to its end.
#[derive(Debug, Clone, Default)]
pub struct ChatAnswer {
    /// The whole text, without the reasoning.
    pub text: String,
    pub correlation_id: String,
    pub attempts: u32,
    /// How often another worker continued the answer.
    pub continued: u32,
    /// From the request to the first text or reasoning.
    pub first_token: Duration,
    /// From the first text or reasoning to the last.
    pub rest: Duration,
    /// Tokens of the request.
    pub prompt_tokens: u32,
    /// Tokens of the request that the worker found in its prefix cache.
    pub cached_tokens: u32,
    /// Tokens of the answer, including the reasoning.
    pub completion_tokens: u32,
    /// Why the answer ended: `stop`, `length`, and so on.
    pub finish_reason: String,
}

impl GatewayClient {
    /// Creates a client of an address such as `http://127.0.0.1:7070`.
    pub fn new(url: impl AsRef<str>, key: Option<String>) -> anyhow::Result<Self> {
        let base = exchange::base(url.as_ref())?;
        let url = base.to_string().trim_end_matches('/').to_owned();
        Ok(Self { base, url, key, trust: Trust::default(), proof: None })
    }

    /// Trusts other certificates than the system's.
    #[must_use]
    pub fn trusting(self, trust: Trust) -> Self {
        Self { trust, ..self }
    }

    /// Returns a client of the gateway that the arguments name, else of the data folder's. A gateway that nobody named
    /// is shown a key only if it proves that it runs on the folder, unless the folder knows of no gateway and the key
    /// is not the folder's.
    pub fn find(args: &ServerArgs, settings: &Settings, data: &DataFolder, env: &Env) -> anyhow::Result<Self> {
        let trust = Trust::new(args.ca.clone(), own_certificate(settings, data));
        let (given, own) = (args.given_key(env)?, data.api_key());
        let recorded = data.address();
        let is_of_folder = recorded.is_some() || given.is_none() && own.is_some();
        let must_prove = args.url.is_none() && is_of_folder;
        let url = args.url.clone().or(recorded).unwrap_or_else(|| usual_url(settings));
        let proof = if must_prove { Some(FolderProof::of(data)?) } else { None };
        Ok(Self { proof, ..Self::new(url, given.or(own))?.trusting(trust) })
    }

    /// Returns a client of a gateway that runs with this folder and these settings.
    pub fn here(url: &str, key: Option<String>, settings: &Settings, data: &DataFolder) -> anyhow::Result<Self> {
        Ok(Self::new(url, key)?.trusting(Trust::new(None, own_certificate(settings, data))))
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Checks whether a gateway answers at the URL.
    pub async fn presence(&self) -> Presence {
        let check = timeout(PRESENT_WITHIN, async {
            // Sent without the key: the check needs none, and the server may be another program.
            let nobody = Self { key: None, proof: None, ..self.clone() };
            let response = nobody.send(Method::GET, "/healthz", None).await?;
            let is_success = response.status.is_success();
            let is_gateway = is_success && response.json::<Value>().await.is_ok_and(|body| body["status"] == "ok");
            if is_gateway && self.proof.is_some() {
                let shy = Self { key: None, ..self.clone() };
                shy.send(Method::GET, "/healthz", None).await?;
            }
            Ok::<_, Failure>(is_gateway)
        });
        match check.await {
            Ok(Ok(true)) => Presence::Answers,
            Ok(Ok(false)) => Presence::Absent(anyhow!("another program than a gateway answers at {}", self.url)),
            Ok(Err(Failure::Closed(error))) => Presence::Closed(error),
            Ok(Err(Failure::Foreign(error))) => Presence::Foreign(error),
            Ok(Err(failure)) => Presence::Absent(self.explain(failure)),
            Err(_) => {
                Presence::Absent(anyhow!("nothing answers at {} within {} s", self.url, PRESENT_WITHIN.as_secs()))
            }
        }
    }

    /// Reads a JSON document.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.exchange(Method::GET, path, None).await
    }

    /// Lists the registered models, or the served ones if the key is not an operator's.
    pub async fn models(&self) -> anyhow::Result<Value> {
        match self.get("/admin/v1/models").await {
            // Gateways of an earlier version do not have the path.
            Err(error)
                if error
                    .downcast_ref::<Refusal>()
                    .is_some_and(|refused| matches!(refused.status, StatusCode::FORBIDDEN | StatusCode::NOT_FOUND)) =>
            {
                self.get("/v1/models").await
            }
            listed => listed,
        }
    }

    /// Posts a JSON document and reads the JSON response.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.exchange(Method::POST, path, Some(serde_json::to_vec(body)?)).await
    }

    /// As [`Self::post`], for what may take as long as an answer.
    pub async fn post_and_wait<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let response = self.ask(Method::POST, path, Some(serde_json::to_vec(body)?)).await?;
        response.json().await.with_context(|| format!("the answer of {} is not the expected JSON", self.url))
    }

    /// Patches a resource with a JSON document and reads the JSON response.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.exchange(Method::PATCH, path, Some(serde_json::to_vec(body)?)).await
    }

    /// Replaces a resource by a JSON document and reads the JSON response.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.exchange(Method::PUT, path, Some(serde_json::to_vec(body)?)).await
    }

    /// Deletes a resource and reads the JSON response.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.exchange(Method::DELETE, path, None).await
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<T> {
        let exchange = async {
            let response = self.ask(method, path, body).await?;
            response.json().await.with_context(|| format!("the answer of {} is not the expected JSON", self.url))
        };
        match timeout(WITHIN, exchange).await {
            Ok(answered) => answered,
            Err(_) => bail!("{} does not answer within {} s", self.url, WITHIN.as_secs()),
        }
    }

    /// Requests an answer and passes on its parts as they arrive. Dropping the future stops the answer.
    pub async fn chat(&self, body: &Value, mut on_piece: impl FnMut(Piece<'_>)) -> anyhow::Result<ChatAnswer> {
        let began = Instant::now();
        let response = self.ask(Method::POST, "/v1/chat/completions", Some(serde_json::to_vec(body)?)).await?;
        let header = |name: &str| response.headers.get(name)?.to_str().ok().map(str::to_owned);
        let mut answer = ChatAnswer {
            correlation_id: header("x-request-id").unwrap_or_default(),
            attempts: header("x-tether-attempts").and_then(|text| text.parse().ok()).unwrap_or(1),
            ..ChatAnswer::default()
        };
        let mut first = None;
        let mut events = Events::of(response);
        while let Some(event) = events.next().await? {
            let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty());
            let count = |pointer: &str| event.pointer(pointer).and_then(Value::as_u64);
            if let Some(message) = text("/error/message") {
                let code = text("/error/code").unwrap_or_default().to_owned();
                bail!(BrokenOff { code, message: message.to_owned() });
            }
            if let Some(tokens) = count("/usage/completion_tokens") {
                answer.completion_tokens = tokens as u32;
                answer.prompt_tokens = count("/usage/prompt_tokens").unwrap_or(0) as u32;
                answer.cached_tokens = count("/usage/prompt_tokens_details/cached_tokens").unwrap_or(0) as u32;
            }
            if let Some(continued) = count("/tether/continued") {
                answer.continued = continued as u32;
            }
            if let Some(reason) = text("/choices/0/finish_reason") {
                reason.clone_into(&mut answer.finish_reason);
            }
            let thought = text("/choices/0/delta/reasoning_content").map(Piece::Thought);
            let said = text("/choices/0/delta/content").map(Piece::Text);
            for piece in thought.into_iter().chain(said) {
                let first = *first.get_or_insert_with(Instant::now);
                answer.first_token = first - began;
                answer.rest = first.elapsed();
                if let Piece::Text(text) = piece {
                    answer.text.push_str(text);
                }
                on_piece(piece);
            }
        }
        Ok(answer)
    }

    /// Sends a request and returns an error unless its status is a success.
    async fn ask(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> anyhow::Result<Response> {
        let response = self.send(method, path, body).await.map_err(|failure| self.explain(failure))?;
        let status = response.status;
        if status.is_success() {
            return Ok(response);
        }
        if status == StatusCode::UNAUTHORIZED && self.key.is_none() {
            bail!(
                "{} wants an API key: name the network's data folder with --data-dir, or the file that holds a key with \
                 --api-key-file",
                self.url
            );
        }
        if let Some(elsewhere) = response.headers.get(header::LOCATION).and_then(|location| location.to_str().ok()) {
            bail!("{} redirects to {elsewhere}; give the gateway's own address with --url", self.url);
        }
        let body: Value = response.json().await.unwrap_or_default();
        match body.pointer("/error/message").and_then(Value::as_str) {
            Some(message) => {
                let code = body.pointer("/error/code").and_then(Value::as_str).unwrap_or_default().to_owned();
                bail!(Refusal { url: self.url.clone(), status, code, message: message.to_owned() })
            }
            None => bail!("{} answered {status}, and not as a gateway does; is this another program's port?", self.url),
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<Response, Failure> {
        let credentials = Credentials { key: self.key.as_deref(), proof: self.proof.as_ref() };
        exchange::send(&self.base, &self.trust, (method, path), body.map(Bytes::from), credentials).await
    }

    /// Returns an error that explains why there was no response.
    fn explain(&self, failure: Failure) -> anyhow::Error {
        match failure {
            Failure::Refused => anyhow!("nothing answers at {}; start the network with `tether up`", self.url),
            Failure::Closed(error) | Failure::Foreign(error) | Failure::Broken(error) => error,
        }
    }
}

/// Returns the URL at which a gateway with these settings listens.
pub fn usual_url(settings: &Settings) -> String {
    addresses::urls(settings.gateway.bind, settings.gateway.tls_cert.is_some()).swap_remove(0)
}

/// Returns the certificate file of the gateway that runs here: the one that it recorded, else the one in the settings.
fn own_certificate(settings: &Settings, data: &DataFolder) -> Option<PathBuf> {
    data.certificate().or_else(|| settings.gateway.tls_cert.clone())
}

/// Server-sent events whose data are JSON, up to `[DONE]`.
struct Events {
    response: Response,
    buffer: Vec<u8>,
    done: bool,
}

impl Events {
    fn of(response: Response) -> Self {
        Self { response, buffer: vec![], done: false }
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
            match self.response.chunk().await.context("the connection broke off")? {
                Some(bytes) if self.buffer.len() + bytes.len() <= LINE_MAX => self.buffer.extend_from_slice(&bytes),
                Some(_) => bail!("a line of the answer has more than {} MiB", LINE_MAX >> 20),
                None => bail!("the answer has no end"),
            }
        }
        Ok(None)
    }
}
