//! `tether demo`: shows a network of processes at work. Asks a model, kills the worker that answered, asks again, and
//! then prints a few measurements.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use engine::{Event, GenerateRequest, LoadOptions, ModelRuntime, PromptInput, Sampling, VerifiedArtifact, no_progress};
use protocol::control::{Decision, Empty, Fleet, FleetWorker, NODE_DESCRIBE, NodeInfo};
use protocol::health::ModelState;
use protocol::{PublicKey, Topic, WorkerId};
use rpc::transport::hyperswarm::HyperswarmTransport;
use rpc::{Client, Transport as _};
use serde_json::{Value, json};
use worker::ServedModel;

use super::{Context, Outcome, process_runtime, spinner};
use crate::args::Common;
use crate::client::GatewayClient;
use crate::data_folder::DataFolder;
use crate::operator::{client_network, random_key};
use crate::processes::Processes;
use crate::voice::{Screen, Voice};
use crate::{output, tiny_model};

/// The loopback address with any free port.
const LOOPBACK: &str = "127.0.0.1:0";
/// How long a process may take to become usable.
const READY: Duration = Duration::from_secs(30);
/// How often each measurement is repeated; the median is shown.
const ROUNDS: usize = 15;
/// Tokens of each measured answer.
const TOKENS: u32 = 64;

pub(super) async fn run(mut context: Context, common: &Common) -> anyhow::Result<Outcome> {
    // Nothing is left on disk unless a folder was named.
    let temporary = tempfile::tempdir().context("no temporary folder")?;
    let folder = common.data_dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    context.settings.network.listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    let mut processes = Processes::below(&folder)?;
    let waiting = spinner("starting eight processes and loading tether-tiny");
    let network = start(&context, &mut processes).await;
    waiting.finish_and_clear();
    let shown = match &network {
        Ok(network) => show(network, &mut processes).await,
        Err(_) => Ok(()),
    };
    let stopped = processes.stop().await;
    network?.network.stop().await;
    shown?;
    stopped?;
    output::line(
        "\nNothing of it runs any more. Go on with:\n\n  make up                                  a network in one \
         process, until Ctrl-C\n  tether run tether-tiny \"What is 3 + 4?\"   ask it from the command line\n  \
         tether registry                          begin a network of your own machines\n  \
         tether --help                            everything else",
    );
    Ok(Outcome::Well)
}

/// The running network, seen from this process.
struct Running {
    gateway: GatewayClient,
    /// A peer of the network, for measurements without HTTP.
    network: Arc<HyperswarmTransport>,
    registry: PublicKey,
    workers: Vec<(&'static str, WorkerId)>,
    startup: Duration,
}

/// The regions of the two workers.
const WORKERS: [(&str, &str); 2] = [("worker-1", "eu-west"), ("worker-2", "us-east")];

async fn start(context: &Context, processes: &mut Processes) -> anyhow::Result<Running> {
    let began = Instant::now();
    let mut bootstrap: Vec<String> = vec![];
    for name in ["bootstrap-1", "bootstrap-2", "bootstrap-3"] {
        let known = bootstrap.join(",");
        let mut arguments = vec!["bootstrap", "--listen", LOOPBACK];
        if !known.is_empty() {
            arguments.extend(["--bootstrap", &known]);
        }
        processes.start(name, &arguments)?;
        bootstrap.push(processes.listening(name, "bootstrap").await?.to_string());
    }
    let known = bootstrap.join(",");
    let registry_arguments = ["registry", "--listen", LOOPBACK, "--bootstrap", &known, "--region", "eu-west"];
    processes.start("registry", &registry_arguments)?;
    let pool = processes.wait_for("registry", READY, |data| data.pool().ok().flatten()).await?;
    let key = processes.wait_for("registry", READY, |data| data.api_key().filter(|key| !key.is_empty())).await?;

    let common = ["--listen", LOOPBACK, "--region"];
    let mut join = |name: &str, role: &str, region: &str, more: &[&str]| -> anyhow::Result<()> {
        let line = processes.run("registry", &["invite", "--role", role, "--name", name])?;
        let invite = line.strip_prefix("tether join ").with_context(|| format!("no invite: {line}"))?.to_owned();
        let mut arguments = vec!["join", &invite];
        arguments.extend(common);
        arguments.push(region);
        arguments.extend(more);
        processes.start(name, &arguments)
    };
    join("orchestrator", "orchestrator", "eu-west", &["--near-regions", "us-east"])?;
    join("gateway", "gateway", "eu-west", &["--bind", LOOPBACK])?;
    for (name, region) in WORKERS {
        join(name, "worker", region, &[])?;
    }
    let url = processes.wait_for("gateway", READY, DataFolder::address).await?;
    let gateway = GatewayClient::new(url, Some(key))?;
    let workers = ready(processes, &gateway).await?;
    let startup = began.elapsed();
    let data = DataFolder::at(processes.data("registry").path());
    let network = client_network(&context.settings, &data, &pool.bootstrap, &random_key()?).await?;
    Ok(Running { gateway, network, registry: pool.registry, workers, startup })
}

/// Waits until both workers are ready and the orchestrator knows, and returns their ids.
async fn ready(processes: &mut Processes, gateway: &GatewayClient) -> anyhow::Result<Vec<(&'static str, WorkerId)>> {
    let deadline = Instant::now() + READY;
    loop {
        let fleet: Result<Fleet, _> = gateway.get("/admin/v1/nodes").await;
        let found: Vec<_> = fleet.iter().flat_map(|fleet| &fleet.workers).filter(|worker| is_ready(worker)).collect();
        if found.len() == WORKERS.len() {
            let of = |region: &str| found.iter().find(|worker| worker.report.region.as_str() == region);
            return WORKERS
                .iter()
                .map(|(name, region)| Ok((*name, of(region).context("a region has no worker")?.report.worker_id)))
                .collect();
        }
        for name in ["registry", "orchestrator", "gateway", "worker-1", "worker-2"] {
            processes.check(name)?;
        }
        if Instant::now() >= deadline {
            bail!("{} of 2 workers are ready after {} s", found.len(), READY.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn is_ready(worker: &FleetWorker) -> bool {
    worker.report.model_cache.iter().any(|model| model.state == ModelState::Ready)
}

async fn show(running: &Running, processes: &mut Processes) -> anyhow::Result<()> {
    let Running { gateway: client, .. } = running;
    output::line(format!(
        "Tether runs in eight processes: three bootstrap nodes, registry, orchestrator, gateway and two workers, in \
         eu-west and us-east.\nThey found each other by topic and speak over Noise-encrypted streams. All were ready \
         {:.1} s after the first began.\nThe OpenAI address is {}/v1, and tether-tiny answers there. It is a \
         demonstration model: it knows a little.\n",
        running.startup.as_secs_f64(),
        client.url()
    ));
    let first = ask(client, "What is the capital of Japan?").await?;
    let waiting = spinner("measuring");
    let figures = measure(running).await;
    waiting.finish_and_clear();
    let figures = figures?;
    let name = running.workers.iter().find(|(_, id)| *id == first).map(|(name, _)| *name).context("no such worker")?;
    let pid = processes.pid(name).context("the worker has no process")?;
    processes.kill(name)?;
    output::line(format!("kill -9 {pid}: worker {} is gone. Asking again.\n", first.short()));
    let second = ask(client, "What is 3 + 4?").await?;
    if second == first {
        bail!("a worker that is gone cannot have answered");
    }
    figures.print();
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
    let mut voice = Voice::new(Screen::of_stdout());
    let answer = client.chat(&body, |piece| output::piece(&voice.says(piece))).await?;
    let decision: Decision = client.get(&format!("/admin/v1/jobs/{}/decision", answer.correlation_id)).await?;
    let worker = decision.attempts.last().and_then(|attempt| attempt.chosen).context("no worker is known")?;
    output::line(format!("\n  answered by worker {}, attempt {}\n", worker.short(), answer.attempts));
    if answer.text.trim().is_empty() {
        bail!("the model said nothing");
    }
    Ok(worker)
}

/// The measurements of the printed table.
struct Table {
    discovery: Duration,
    connect: Duration,
    through: Figures,
    direct: Figures,
}

async fn measure(running: &Running) -> anyhow::Result<Table> {
    let discovery = discovery(running).await?;
    let connect = connecting(running).await?;
    Ok(Table { discovery, connect, through: through_the_network(&running.gateway).await?, direct: directly().await? })
}

/// Measures how long a node that knows only the bootstrap nodes takes to find a worker by its topic.
async fn discovery(running: &Running) -> anyhow::Result<Duration> {
    let topic = Topic::Presence(WORKERS[0].1.parse()?);
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let found = running.network.lookup(&topic).await?;
        rounds.push(began.elapsed());
        if found.is_empty() {
            bail!("no worker is found under {topic}");
        }
    }
    Ok(median(rounds))
}

/// Measures how long connecting to a node by its public key takes, including its first response.
async fn connecting(running: &Running) -> anyhow::Result<Duration> {
    let mut rounds = vec![];
    for _ in 0..ROUNDS {
        // Each client opens a connection of its own.
        let client = Client::new(running.network.clone());
        let began = Instant::now();
        client.call::<_, NodeInfo>(running.registry, NODE_DESCRIBE, &Empty {}, READY).await?;
        rounds.push(began.elapsed());
    }
    Ok(median(rounds))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

impl Table {
    fn print(&self) {
        let Self { discovery, connect, through, direct } = self;
        let milliseconds = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1e3);
        let rate = |figures: &Figures| format!("{:.0}", figures.tokens_per_second);
        let added = through.first_token.saturating_sub(direct.first_token);
        let share = 100.0 * through.tokens_per_second / direct.tokens_per_second;
        let row = |cells: [String; 4]| cells.to_vec();
        let none = String::new;
        output::table(
            &["", "THROUGH TETHER", "ENGINE ALONE", "ADDED BY THE NETWORK"],
            &[
                row(["discovery (lookup of a topic)".into(), milliseconds(*discovery), none(), none()]),
                row(["connect by public key".into(), milliseconds(*connect), none(), none()]),
                row([
                    "time to first token".into(),
                    milliseconds(through.first_token),
                    milliseconds(direct.first_token),
                    milliseconds(added),
                ]),
                row(["tokens/s".into(), rate(through), rate(direct), format!("{share:.0} % of the engine's speed")]),
            ],
        );
        output::line(format!(
            "median of {ROUNDS} rounds, answers of {TOKENS} tokens, one at a time, on this machine as it is now"
        ));
    }
}

struct Figures {
    first_token: Duration,
    tokens_per_second: f64,
}

impl Figures {
    /// Returns the median of each column.
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

/// Measures an engine process without the network.
async fn directly() -> anyhow::Result<Figures> {
    let runtime = process_runtime()?;
    let mut file = tempfile::tempfile().context("no temporary file")?;
    std::io::Write::write_all(&mut file, tiny_model::BYTES)?;
    let artifact = VerifiedArtifact {
        file,
        sha256: tiny_model::digest().to_string(),
        bytes: tiny_model::BYTES.len() as u64,
        parts: vec![],
    };
    // The same options as the network's workers, so that the two can be compared.
    let ServedModel { threads, draft_tokens, .. } = tiny_model::served();
    let options = LoadOptions { threads, draft_tokens, ..LoadOptions::default() };
    let loaded = runtime.load(artifact, options, no_progress()).await?;
    let request = GenerateRequest {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: Some(TOKENS),
        ignore_eos: true,
        ..GenerateRequest::new(
            loaded.id,
            PromptInput::Chat(vec![engine::Message::new(engine::Role::User, PROMPT)].into()),
        )
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
            Event::Piece(piece) if !piece.text.is_empty() => {
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
