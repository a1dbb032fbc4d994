//! `tether demo`: shows the network at work. Ask, kill the engine that answered, ask again; then a few figures.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use engine::{Event, GenerateRequest, LoadOptions, ModelRuntime, PromptInput, Sampling, VerifiedArtifact, no_progress};
use protocol::WorkerId;
use protocol::control::Decision;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{Context, Outcome, process_runtime, shipped, spinner};
use crate::args::Common;
use crate::client::GatewayClient;
use crate::data_folder::DataFolder;
use crate::network::Network;
use crate::{output, tiny_model};

/// Times each figure is taken; the median is shown.
const ROUNDS: usize = 15;
/// Tokens of each measured answer.
const TOKENS: u32 = 64;

pub(super) async fn run(mut context: Context, common: &Common) -> anyhow::Result<Outcome> {
    // Nothing is left behind unless a folder was named.
    let temporary = tempfile::tempdir().context("no temporary folder")?;
    let data = match &common.data_dir {
        Some(_) => context.data.clone(),
        None => DataFolder::at(temporary.path()),
    };
    context.settings.gateway.bind.set_port(0);
    context.settings.workers = context.settings.workers.max(2);
    // The figures come from many quick requests of one tenant.
    context.settings.gateway.rate_limit.requests_per_minute = 0;

    let waiting = spinner("starting two workers and loading tether-tiny");
    let network = Network::start(&context.settings, &data, shipped()).await?;
    let ready = network.ready().await;
    waiting.finish_and_clear();
    let shown = match ready {
        Ok(()) => show(&network).await,
        Err(error) => Err(error),
    };
    let stopped = network.stop().await;
    shown?;
    stopped?;
    output::line(
        "\nGo on with:\n\n  make up                                  the network, until Ctrl-C\n  \
         tether run tether-tiny \"What is 3 + 4?\"   ask from the command line\n  \
         tether --help                            everything else",
    );
    Ok(Outcome::Well)
}

async fn show(network: &Network) -> anyhow::Result<()> {
    let client = GatewayClient::new(network.url(), Some(network.api_key.clone()))?;
    output::line(format!(
        "Tether runs in one process: gateway, orchestrator, registry and {} workers.\n\
         Its OpenAI address is {}/v1, and tether-tiny answers there. It is a demonstration model: it knows a little.\n",
        network.workers.len(),
        network.url()
    ));
    let first = ask(&client, "What is the capital of Japan?").await?;
    kill_engine(network, first)?;
    let second = ask(&client, "What is 3 + 4?").await?;
    if second == first {
        output::line("  (the worker had its engine back already)");
    }
    let waiting = spinner("measuring");
    let through = through_the_network(&client).await;
    let direct = directly().await;
    waiting.finish_and_clear();
    let (through, direct) = (through?, direct?);
    output::line("");
    let milliseconds = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
    let rate = |figures: &Figures| format!("{:.0}", figures.tokens_per_second);
    let added = through.first_token.saturating_sub(direct.first_token);
    let share = 100.0 * through.tokens_per_second / direct.tokens_per_second;
    output::table(
        &["", "THROUGH TETHER", "ENGINE ALONE", "ADDED BY THE NETWORK"],
        &[
            vec![
                "time to first token".into(),
                milliseconds(through.first_token),
                milliseconds(direct.first_token),
                milliseconds(added),
            ],
            vec!["tokens/s".into(), rate(&through), rate(&direct), format!("{share:.0} % of the engine's speed")],
        ],
    );
    output::line(format!("median of {ROUNDS} answers of {TOKENS} tokens, one at a time, on this machine as it is now"));
    Ok(())
}

/// Asks, prints question and answer, and returns the worker that answered.
async fn ask(client: &GatewayClient, question: &str) -> anyhow::Result<WorkerId> {
    output::line(format!("> {question}"));
    output::piece("  ");
    let body = json!({
        "model": "tether-tiny",
        "messages": [{ "role": "user", "content": question }],
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let answer = client.chat(&body, output::piece).await?;
    let decision: Decision = client.get(&format!("/admin/v1/jobs/{}/decision", answer.correlation_id)).await?;
    let worker = decision.attempts.last().and_then(|attempt| attempt.chosen).context("no worker is known")?;
    output::line(format!("\n  answered by worker {}, attempt {}\n", worker.short(), answer.attempts));
    if answer.text.trim().is_empty() {
        bail!("the model said nothing");
    }
    Ok(worker)
}

fn kill_engine(network: &Network, worker: WorkerId) -> anyhow::Result<()> {
    let handle = network.workers.iter().find(|handle| handle.worker_id() == worker).context("no such worker")?;
    let pid = *handle.engine_pids().first().context("the worker has no engine process")?;
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a process id")?;
    kill_process(process, Signal::KILL).context("could not kill the engine")?;
    output::line(format!("kill -9 {pid}: the engine of worker {} is gone. Asking again.\n", worker.short()));
    Ok(())
}

struct Figures {
    first_token: Duration,
    tokens_per_second: f64,
}

impl Figures {
    /// Takes the median of each column.
    fn of(mut rounds: Vec<(Duration, f64)>) -> Self {
        rounds.sort_by_key(|round| round.0);
        let first_token = rounds[rounds.len() / 2].0;
        rounds.sort_by(|one, other| one.1.total_cmp(&other.1));
        Self { first_token, tokens_per_second: rounds[rounds.len() / 2].1 }
    }
}

const PROMPT: &str = "Tell me a story.";

async fn through_the_network(client: &GatewayClient) -> anyhow::Result<Figures> {
    let body: Value = json!({
        "model": "tether-tiny",
        "messages": [{ "role": "user", "content": PROMPT }],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        let answer = client.chat(&body, |_| {}).await?;
        let after_first = f64::from(answer.completion_tokens.saturating_sub(1));
        rounds.push((answer.first_token, after_first / answer.rest.as_secs_f64().max(1e-9)));
    }
    Ok(Figures::of(rounds))
}

/// Asks an engine process of our own, with nothing in between.
async fn directly() -> anyhow::Result<Figures> {
    let runtime = process_runtime()?;
    let mut file = tempfile::tempfile().context("no temporary file")?;
    std::io::Write::write_all(&mut file, tiny_model::BYTES)?;
    let artifact =
        VerifiedArtifact { file, sha256: tiny_model::digest().to_string(), bytes: tiny_model::BYTES.len() as u64 };
    let options = LoadOptions { threads: tiny_model::served().threads, ..LoadOptions::default() };
    let loaded = runtime.load(artifact, options, no_progress()).await?;
    let request = GenerateRequest {
        model: loaded.id,
        input: PromptInput::Chat(vec![engine::ChatMessage { role: "user".into(), content: PROMPT.into() }]),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop: vec![],
        max_tokens: Some(TOKENS),
        ignore_eos: true,
    };
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        rounds.push(one_round(&*runtime, request.clone()).await?);
    }
    runtime.unload(loaded.id).await?;
    Ok(Figures::of(rounds))
}

async fn one_round(runtime: &dyn ModelRuntime, request: GenerateRequest) -> anyhow::Result<(Duration, f64)> {
    let began = Instant::now();
    let mut stream = runtime.generate(request).await?;
    let mut first = None;
    while let Some(event) = stream.next().await {
        match event? {
            Event::Piece { text, .. } if !text.is_empty() => {
                first.get_or_insert_with(Instant::now);
            }
            Event::Done { usage, .. } => {
                let first = first.context("the engine said nothing")?;
                let after_first = f64::from(usage.completion_tokens.saturating_sub(1));
                return Ok((first - began, after_first / first.elapsed().as_secs_f64().max(1e-9)));
            }
            _ => {}
        }
    }
    bail!("the engine's answer has no end")
}
