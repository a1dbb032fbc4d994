//! Upstream's programs: `llama-server`, asked over HTTP, and `llama-bench`, which measures itself.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::time::sleep;

use crate::measure::{ANSWER, Measure, PROMPT};
use crate::side::{Question, Side};
use crate::{Model, SLOTS, THREADS};

/// How long a model may take to load.
const READY_WITHIN: Duration = Duration::from_mins(5);

/// Where the programs are.
pub(crate) struct Programs {
    folder: PathBuf,
}

impl Programs {
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn command(&self, name: &str) -> Command {
        Command::new(self.folder.join(name))
    }
}

/// A server that holds one model.
pub(crate) struct LlamaServer {
    process: Child,
    client: reqwest::Client,
    url: String,
}

impl LlamaServer {
    /// The flags beside model, address and adapters. One context for all slots, as ours has; the rest is as it comes.
    pub(crate) fn flags(model: &Model) -> Vec<String> {
        let (slots, threads) = (SLOTS.to_string(), THREADS.to_string());
        let context = (SLOTS * model.context).to_string();
        let own = ["-np", &slots, "-c", &context, "-t", &threads, "--kv-unified", "--no-ui"].map(str::to_owned);
        let more = std::env::var("BENCH_SERVER_FLAGS").unwrap_or_default();
        own.into_iter().chain(more.split_whitespace().map(str::to_owned)).collect()
    }

    pub(crate) async fn start(programs: &Programs, model: &Model, with_adapters: bool) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = File::create(model.path.with_extension("llama-server.log")).unwrap();
        let mut command = programs.command("llama-server");
        command.arg("-m").arg(&model.path).args(Self::flags(model));
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        if with_adapters {
            command.arg("--lora-init-without-apply");
            for adapter in &model.adapters {
                command.arg("--lora").arg(adapter);
            }
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).kill_on_drop(true);
        let process = command.spawn().unwrap();
        // The server closes a connection behind each stream, and says nothing of it before.
        let client = reqwest::Client::builder().pool_max_idle_per_host(0).build().unwrap();
        let mut server = Self { process, client, url: format!("http://127.0.0.1:{port}") };
        server.ready().await;
        server
    }

    async fn ready(&mut self) {
        let until = Instant::now() + READY_WITHIN;
        let health = format!("{}/health", self.url);
        while !self.client.get(&health).send().await.is_ok_and(|answer| answer.status().is_success()) {
            assert!(self.process.try_wait().unwrap().is_none(), "llama-server ended; its log lies beside the model");
            assert!(Instant::now() < until, "llama-server is not ready; its log lies beside the model");
            sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) async fn stop(mut self) {
        self.process.kill().await.unwrap();
    }
}

#[async_trait]
impl Side for LlamaServer {
    async fn ask(&self, question: Question<'_>) -> BoxStream<'static, Vec<u32>> {
        let mut body = json!({
            "prompt": question.prompt, "n_predict": question.tokens, "ignore_eos": true, "stream": true,
            "return_tokens": true, "temperature": 0, "samplers": ["top_k"], "top_k": 1,
            // A byte that begins no character is held back together with the tokens after it. Ours tells tokens at
            // once.
            "logit_bias": (128..256).map(|token| json!([token, false])).collect::<Value>(),
        });
        if let Some(index) = question.adapter {
            body["lora"] = json!([{ "id": index, "scale": 1.0 }]);
        }
        let answer = self.client.post(format!("{}/completion", self.url)).json(&body).send().await.unwrap();
        let answer = answer.error_for_status().unwrap().bytes_stream().boxed();
        let events = stream::unfold((answer, Vec::new()), |(mut answer, mut unread)| async move {
            loop {
                if let Some(end) = unread.windows(2).position(|pair| pair == b"\n\n") {
                    let event = unread.drain(..end + 2).collect::<Vec<u8>>();
                    return Some((event, (answer, unread)));
                }
                unread.extend_from_slice(&answer.next().await?.unwrap());
            }
        });
        let tokens = events.map(|event| {
            let event: Value = serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap();
            serde_json::from_value::<Vec<u32>>(event["tokens"].clone()).unwrap()
        });
        tokens.filter(|tokens| std::future::ready(!tokens.is_empty())).boxed()
    }
}

/// Measures one stream without sampling or a server.
pub(crate) struct LlamaBench<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) model: &'a Model,
}

impl LlamaBench<'_> {
    pub(crate) async fn take(&self, measure: Measure) -> f64 {
        let (prompt, answer) = match measure {
            Measure::Prompt => (PROMPT, 0),
            Measure::Generate(1) => (0, ANSWER),
            other => unreachable!("llama-bench does not measure {other:?}"),
        };
        self.run(prompt, answer).await["avg_ts"].as_f64().unwrap()
    }

    /// Returns the commits it was built from, as the build states them.
    pub(crate) async fn build(&self) -> String {
        self.run(1, 0).await["build_commit"].as_str().unwrap().to_owned()
    }

    async fn run(&self, prompt: usize, answer: u32) -> Value {
        let mut command = self.programs.command("llama-bench");
        command.arg("-m").arg(&self.model.path).args(["-r", "1", "-o", "json"]);
        command.args(["-t", &THREADS.to_string(), "-p", &prompt.to_string(), "-n", &answer.to_string()]);
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await.unwrap();
        assert!(output.status.success(), "llama-bench failed: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()[0].take()
    }
}
