//! Speed of a realistic model through the network, beside the engine alone, and the memory of an idle network:
//! `make bench`, which also makes the model.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use artifact_store::ArtifactStore;
use engine::{Event, GenerateRequest, LoadOptions, ModelRuntime, PromptInput, Sampling, VerifiedArtifact};
use protocol::UnixMillis;
use protocol::model::{ModelEntry, ModelKey};
use serde_json::json;
use tether_cli::client::GatewayClient;
use tether_cli::commands::{async_runtime, process_runtime};
use tether_cli::data_folder::DataFolder;
use tether_cli::network::{Network, Supplies};
use tether_cli::settings::Settings;
use worker::ServedModel;

const ROUNDS: usize = 7;
const TOKENS: u32 = 256;
const THREADS: u32 = 2;
const CONTEXT: u32 = 512;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("engine-host") {
        return tether_cli::commands::main();
    }
    idle_memory();
    let Some(model) = std::env::var_os("BENCH_MODEL").map(PathBuf::from) else {
        println!("BENCH_MODEL names no model: the speed of a realistic model is not measured; run make bench");
        return ExitCode::SUCCESS;
    };
    async_runtime(0).unwrap().block_on(throughput(model));
    ExitCode::SUCCESS
}

/// Resident memory of `tether up` that serves no model, after ten seconds.
fn idle_memory() {
    let folder = tempfile::tempdir().unwrap();
    let settings = folder.path().join("tether.toml");
    std::fs::write(&settings, "[gateway]\nbind = \"127.0.0.1:0\"\n[worker]\nmodels = []\n").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tether"))
        .args(["up", "--config"])
        .arg(&settings)
        .arg("--data-dir")
        .arg(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(10));
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let kibibytes: f64 =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().split(' ').next()?.parse().ok()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    println!("idle `tether up` without a model  {:>6.1} MB resident   (bar 80)", kibibytes * 1024.0 / 1e6);
}

async fn throughput(model: PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let data = DataFolder::at(folder.path());
    let artifacts = ArtifactStore::in_folder(data.artifacts()).unwrap();
    let stored = artifacts.put_file(&model).unwrap();
    let key = ModelKey { model_id: "bench".parse().unwrap(), version: "1.0".parse().unwrap() };
    let served = ServedModel {
        context_length: CONTEXT,
        threads: THREADS,
        // Greedy answers of random weights repeat themselves, so suggestions would all be right.
        draft_tokens: 0,
        ..ServedModel::new(key.clone(), stored.digest)
    };
    let entry = ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        key,
        digest: stored.digest,
        bytes: stored.bytes,
        context_length: CONTEXT,
        description: String::new(),
        created_at: UnixMillis(1),
    };
    let mut settings = Settings { workers: 1, ..Settings::default() };
    settings.gateway.bind.set_port(0);
    settings.worker.models = vec![served];
    let supplies = Supplies { runtime: &process_runtime, models: vec![entry] };
    let network = Network::start(&settings, &data, supplies).await.unwrap();
    network.ready().await.unwrap();
    let client = GatewayClient::new(network.url(), Some(network.api_key.clone())).unwrap();

    let runtime = process_runtime().unwrap();
    let file = artifacts.open(&stored.digest).unwrap().file;
    let artifact = VerifiedArtifact { file, sha256: stored.digest.to_string(), bytes: stored.bytes, parts: vec![] };
    let options = LoadOptions { context_length: CONTEXT, threads: THREADS, ..LoadOptions::default() };
    let loaded = runtime.load(artifact, options, engine::no_progress()).await.unwrap();

    let (mut through, mut alone) = (vec![], vec![]);
    for _ in 0..ROUNDS {
        through.push(through_the_network(&client).await);
        alone.push(engine_alone(&*runtime, loaded.id).await);
    }
    network.stop().await.unwrap();
    let (through, alone) = (median(through), median(alone));
    println!("tokens/s through the network    {through:>8.1}");
    println!("  the engine alone              {alone:>8.1}");
    println!("  RATIO                         {:>8.3}   (bar 0.97)", through / alone);
}

async fn through_the_network(client: &GatewayClient) -> f64 {
    let body = json!({
        "model": "bench", "messages": [{ "role": "user", "content": "once upon a time" }],
        "max_tokens": TOKENS, "ignore_eos": true, "temperature": 0, "stream": true,
        "stream_options": { "include_usage": true },
    });
    let answer = client.chat(&body, |_| {}).await.unwrap();
    speed(answer.completion_tokens, answer.rest)
}

async fn engine_alone(runtime: &dyn ModelRuntime, model: engine::ModelId) -> f64 {
    let message = engine::Message::new(engine::Role::User, "once upon a time");
    let request = GenerateRequest {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: Some(TOKENS),
        ignore_eos: true,
        ..GenerateRequest::new(model, PromptInput::Chat(vec![message].into()))
    };
    let mut stream = runtime.generate(request).await.unwrap();
    let mut first = None;
    let mut rest = Duration::ZERO;
    loop {
        match stream.next().await.unwrap().unwrap() {
            Event::Piece(piece) if !piece.text.is_empty() => rest = first.get_or_insert_with(Instant::now).elapsed(),
            Event::Done { usage, .. } => return speed(usage.completion_tokens, rest),
            _ => {}
        }
    }
}

/// Tokens a second from the first text to the last. Both ways draw the same tokens: same model, prompt and seed.
fn speed(tokens: u32, rest: Duration) -> f64 {
    f64::from(tokens - 1) / rest.as_secs_f64()
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
