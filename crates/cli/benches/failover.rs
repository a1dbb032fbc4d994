//! How long an answer pauses when the process of its worker is killed, beside the prefill that the next worker must
//! do: `make bench`, or with contexts in tokens behind `--`.
//!
//! Each node is a process of the program. Prompts have different beginnings, so that no prefix cache helps.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use protocol::control::Fleet;
use protocol::health::ModelState;
use protocol::jobs::JobList;
use serde_json::json;
use tether_cli::client::{ChatAnswer, GatewayClient};
use tether_cli::commands::async_runtime;
use tether_cli::data_folder::DataFolder;
use tether_cli::processes::Processes;

const CONTEXTS: [u32; 3] = [500, 7_900, 64_000];
const ROUNDS: usize = 3;
/// Tokens of an answer, and the piece at which its worker is killed.
const TOKENS: u32 = 200;
const KILLED_AT: usize = 20;
const WORKERS: [&str; 2] = ["worker-1", "worker-2"];
const READY: Duration = Duration::from_mins(5);

fn main() -> ExitCode {
    let Some(model) = std::env::var_os("BENCH_MODEL").map(PathBuf::from) else {
        println!("BENCH_MODEL names no model: pauses are not measured; run make bench");
        return ExitCode::SUCCESS;
    };
    let asked: Vec<u32> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let contexts = if asked.is_empty() { CONTEXTS.to_vec() } else { asked };
    async_runtime(0).unwrap().block_on(measure(&model, &contexts));
    ExitCode::SUCCESS
}

async fn measure(model: &Path, contexts: &[u32]) {
    let folder = tempfile::tempdir().unwrap();
    let mut mesh = Mesh::start(folder.path(), model, *contexts.iter().max().unwrap()).await;
    println!("{:>8} {:>8} {:>9} {:>11} {:>9}", "context", "prompt", "pause s", "prefill s", "the rest");
    for context in contexts {
        if *context > mesh.context_length {
            println!("{context:>8} the model's context has {} tokens", mesh.context_length);
            continue;
        }
        let (mut pauses, mut prefills, mut prompt_tokens) = (vec![], vec![], 0);
        for round in 0..ROUNDS {
            let whole = mesh.ask(*context, 2 * round, |_| {}).await;
            prefills.push(whole.first_token.as_secs_f64());
            prompt_tokens = whole.prompt_tokens;
            pauses.push(mesh.pause(*context, 2 * round + 1).await.as_secs_f64());
        }
        let (pause, prefill) = (median(pauses), median(prefills));
        println!("{context:>8} {prompt_tokens:>8} {pause:>9.2} {prefill:>11.2} {:>9.2}", pause - prefill);
    }
    mesh.processes.stop().await.unwrap();
}

/// A network of processes with two workers of one model.
struct Mesh {
    processes: Processes,
    client: GatewayClient,
    context_length: u32,
}

impl Mesh {
    async fn start(folder: &Path, model: &Path, context: u32) -> Self {
        let settings = folder.join("settings.toml");
        // A longer context than the model's becomes the model's.
        let (length, file) = (context + TOKENS + 64, model.display());
        let text = format!(
            "version = 1\n[gateway]\nbind = \"127.0.0.1:0\"\n[gateway.rate_limit]\nrequests_per_minute = 0\n\
             [[worker.models]]\nmodel_id = \"bench\"\nversion = \"1.0\"\nfile = \"{file}\"\ncontext_length = {length}\n\
             draft_tokens = 0\n"
        );
        std::fs::write(&settings, text).unwrap();
        let mut processes = Processes::of(env!("CARGO_BIN_EXE_tether"), folder).with_settings(&settings);
        processes.start("registry", &["registry", "--listen", "127.0.0.1:0"]).unwrap();
        processes.wait_for("registry", READY, |data| data.pool().ok().flatten()).await.unwrap();
        let key = processes.wait_for("registry", READY, |data| data.api_key().filter(|key| !key.is_empty()));
        let key = key.await.unwrap();
        for name in ["orchestrator", "gateway"].iter().chain(&WORKERS) {
            let role = name.split_once('-').map_or(*name, |(role, _)| role);
            let line = processes.run("registry", &["invite", "--role", role, "--name", name]).unwrap();
            processes.run(name, &["join", line.strip_prefix("tether join ").unwrap(), "--only-enrol"]).unwrap();
            processes.start(name, &[role, "--listen", "127.0.0.1:0"]).unwrap();
        }
        let url = processes.wait_for("gateway", READY, DataFolder::address).await.unwrap();
        let client = GatewayClient::new(url, Some(key)).unwrap();
        let mut mesh = Self { processes, client, context_length: 0 };
        mesh.until_ready().await;
        mesh
    }

    /// Waits until every worker has the model in memory.
    async fn until_ready(&mut self) {
        let deadline = Instant::now() + READY;
        loop {
            let fleet = self.client.get::<Fleet>("/admin/v1/nodes").await;
            let models = fleet.iter().flat_map(|fleet| &fleet.workers).flat_map(|worker| &worker.report.model_cache);
            let ready: Vec<u32> =
                models.filter(|model| model.state == ModelState::Ready).map(|model| model.context_length).collect();
            if ready.len() >= WORKERS.len() {
                self.context_length = ready[0];
                return;
            }
            assert!(Instant::now() < deadline, "the workers are not ready");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn ask(&self, context: u32, number: usize, mut on_piece: impl FnMut(usize)) -> ChatAnswer {
        let body = json!({
            "model": "bench", "messages": [{ "role": "user", "content": prompt(context, number) }],
            "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0, "stream": true,
            "stream_options": { "include_usage": true },
        });
        let mut count = 0;
        let answer = self.client.chat(&body, |_| {
            count += 1;
            on_piece(count);
        });
        answer.await.unwrap()
    }

    /// Asks, kills the worker that answers, and returns the longest time between two pieces from then on.
    async fn pause(&mut self, context: u32, number: usize) -> Duration {
        let (kill, killed) = std::sync::mpsc::channel();
        let mut last = None;
        let mut longest = Duration::ZERO;
        let pids: Vec<u32> = WORKERS.iter().map(|name| self.processes.pid(name).unwrap()).collect();
        let keys: Vec<_> =
            WORKERS.iter().map(|name| self.processes.data(name).node_key("worker").unwrap().public_key()).collect();
        let client = self.client.clone();
        let answer = self.ask(context, number, |count| {
            let now = Instant::now();
            if count > KILLED_AT
                && let Some(last) = last
            {
                longest = longest.max(now - last);
            }
            last = Some(now);
            if count == KILLED_AT {
                let (client, pids, keys, kill) = (client.clone(), pids.clone(), keys.clone(), kill.clone());
                tokio::spawn(async move {
                    let jobs: JobList = client.get("/admin/v1/jobs?limit=1").await.unwrap();
                    let index = keys.iter().position(|key| *key == jobs.jobs[0].worker_id).unwrap();
                    let pid = rustix::process::Pid::from_raw(pids[index] as i32).unwrap();
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
                    kill.send(index).unwrap();
                });
            }
        });
        let answer = answer.await;
        assert_eq!(answer.continued, 1, "the answer has a part of each worker");
        let name = WORKERS[killed.recv().unwrap()];
        self.processes.kill(name).unwrap();
        // Its other flags are kept.
        self.processes.start(name, &["worker"]).unwrap();
        self.is_back(name).await;
        longest
    }

    /// Waits until a worker that was started again has the model in memory.
    async fn is_back(&mut self, name: &str) {
        let data = self.processes.data(name);
        let key = data.node_key("worker").unwrap().public_key();
        let deadline = Instant::now() + READY;
        loop {
            let epoch: u64 = std::fs::read_to_string(data.path().join("nodes/worker.epoch"))
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(u64::MAX);
            let fleet = self.client.get::<Fleet>("/admin/v1/nodes").await;
            let mut reports = fleet.iter().flat_map(|fleet| &fleet.workers).map(|worker| &worker.report);
            if reports.any(|report| {
                let is_ready = report.model_cache.iter().any(|model| model.state == ModelState::Ready);
                report.worker_id == key && report.epoch >= epoch && is_ready
            }) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// A prompt of about so many tokens with a beginning of its own.
fn prompt(tokens: u32, number: usize) -> String {
    // A figure of this length is a token of its own in the vocabularies of the benchmark's models.
    let mut prompt = format!("round {number}: ");
    for index in 0..tokens.saturating_sub(64) / 2 {
        let _ = write!(prompt, "{} ", index % 10);
    }
    prompt
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
