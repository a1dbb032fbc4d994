//! Runs cells on one network: sends requests, injures, heals, and looks at what became of the requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use protocol::TraceId;
use protocol::jobs::JobInfo;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::cell::{CROWD, Cell, Injury, REPEATS, SKEWED_FOR, Step, Victim};
use super::client::{Client, End, Moment, Seen, Tap, TapHandle};
use super::network::{DRAIN_SECS, Network, WORKERS};
use super::points::Point;
use super::process::{Frozen, Handle};
use super::requests::{Question, Request, RightAnswers, Shape, knows};
use super::verdict::{Fault, judge};

/// How long a step of a request may take to be reached.
const STEP: Duration = Duration::from_secs(30);
/// How long after its dispatch a job has certainly reached its worker.
const AT_WORKER: Duration = Duration::from_millis(250);
/// Other requests beside the one at whose step a process is killed, and within which time they begin.
const COMPANIONS: usize = 2;
const COMPANIONS_WITHIN_MS: u64 = 400;
/// How often a request comes while an injury lasts.
const ARRIVALS: Duration = Duration::from_millis(500);
/// How long requests come after a kill under many others.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// Of the requests that come while an injury lasts, each of so many may be long.
const LONG_EVERY: u32 = 8;
/// How long answers outlast the time that a stopping node gives them.
const AFTER_DRAIN: Duration = Duration::from_secs(1);
/// How long to wait before the next short request, when one has failed.
const PULSE: Duration = Duration::from_millis(50);

/// What a model says to a request that it does not support.
const UNSUPPORTED: &str = "400 unsupported_parameter";

/// One run of a cell.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) cell: Cell,
    pub(super) number: u32,
    pub(super) seed: u64,
}

impl Run {
    /// Returns the random numbers of this run, which depend on nothing else.
    fn random(self) -> fastrand::Rng {
        let name = protocol::Digest::of(format!("{}/{}/{}", self.seed, self.cell, self.number).as_bytes());
        let word = name.to_string();
        fastrand::Rng::with_seed(u64::from_str_radix(&word[..16], 16).unwrap_or(self.seed))
    }
}

/// What a run of a cell showed.
#[derive(Debug, Default)]
pub(super) struct Sample {
    pub(super) requests: usize,
    pub(super) whole: usize,
    /// How the requests ended that got no whole answer.
    pub(super) errors: Vec<String>,
    /// From the injury, or the end of one that lasts, to the first answer of a request that was sent afterwards.
    pub(super) recovery: Duration,
    /// The longest time between two pieces of an answer.
    pub(super) pause: Duration,
    pub(super) findings: Vec<Finding>,
}

#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Finding {
    pub(super) fault: Fault,
    pub(super) run: u32,
    pub(super) request_id: String,
    pub(super) request: String,
    pub(super) text: String,
}

/// Requests under way, and those that have ended.
struct Load {
    client: Client,
    tasks: JoinSet<(Request, Seen)>,
}

impl Load {
    fn ask(&mut self, request: Request, tap: Tap) {
        let client = self.client.clone();
        self.tasks.spawn(async move {
            let seen = client.ask(&request, tap).await;
            (request, seen)
        });
    }

    fn ask_later(&mut self, request: Request, wait: Duration) {
        let client = self.client.clone();
        self.tasks.spawn(async move {
            tokio::time::sleep(wait).await;
            let seen = client.ask(&request, Tap::default()).await;
            (request, seen)
        });
    }
}

/// Asks every question once, in peace.
pub(super) async fn right_answers(network: &Network) -> anyhow::Result<RightAnswers> {
    let mut right = RightAnswers::new();
    let client = client(network, Arc::default());
    let mut random = fastrand::Rng::with_seed(0);
    for question in Question::all() {
        let request = Request::new(question, false, false, &mut random);
        let seen = client.ask(&request, Tap::default()).await;
        if seen.end == End::Error(UNSUPPORTED.to_owned()) {
            continue;
        }
        let tokens = seen.tokens.with_context(|| format!("{}: {:?}", request.described(), seen.end))?;
        right.insert(question, super::requests::RightAnswer { texts: seen.texts, tokens });
    }
    Ok(right)
}

fn client(network: &Network, right: Arc<RightAnswers>) -> Client {
    Client { address: network.address, key: network.key.clone(), model: network.model, right }
}

/// Runs a cell once, unless the model cannot answer its requests. The network is ready again afterwards, or the error
/// says what is missing.
pub(super) async fn run(network: &mut Network, run: Run, right: &Arc<RightAnswers>) -> anyhow::Result<Option<Sample>> {
    if let Injury::Kill(step) = run.cell.injury
        && !knows(right, shape_of(step))
    {
        return Ok(None);
    }
    let mut random = run.random();
    let before = network.jobs_since(0).await?.first().map_or(0, |job| job.sequence);
    let mut load = Load { client: client(network, right.clone()), tasks: JoinSet::new() };
    let pulse = Pulse::new(&load.client, &mut random);
    let mut sample = Sample::default();
    match run.cell.injury {
        Injury::Kill(step) => {
            for _ in 0..COMPANIONS {
                let wait = Duration::from_millis(random.u64(..COMPANIONS_WITHIN_MS));
                load.ask_later(Request::draw(right, &mut random), wait);
            }
            let killed = kill_at(network, run.cell.victim, step, &mut load, &mut random).await?;
            let recovering = pulse.begin();
            if run.cell.victim != Victim::Engine {
                network.restart(killed).await?;
            }
            sample.recovery = recovering.ended().await;
        }
        Injury::Point(point) => {
            for _ in 0..COMPANIONS {
                let wait = Duration::from_millis(random.u64(..COMPANIONS_WITHIN_MS));
                load.ask_later(Request::draw(right, &mut random), wait);
            }
            let killed = killed_at(network, point, &mut load, &mut random).await?;
            let recovering = pulse.begin();
            for name in killed {
                network.restart(name).await?;
            }
            sample.recovery = recovering.ended().await;
        }
        Injury::Crowd | Injury::Repeats => {
            let killed = kill_under_many(network, run.cell, &mut load, &mut random).await?;
            let recovering = pulse.begin();
            arrive(&mut load, AFTERWARDS, &mut random).await;
            if run.cell.victim != Victim::Engine {
                network.restart(killed).await?;
            }
            sample.recovery = recovering.ended().await;
        }
        _ => {
            injure(network, run.cell, &mut load, &mut random).await?;
            sample.recovery = pulse.begin().ended().await;
        }
    }
    let mut seen = vec![];
    while let Some(ended) = load.tasks.join_next().await {
        seen.push(ended.context("a client broke down")?);
    }
    network.until_ready().await?;
    let jobs = network.settled_since(before).await?;
    for (request, seen) in &seen {
        sample.add(run, request, seen, &jobs, right);
    }
    Ok(Some(sample))
}

impl Sample {
    fn add(&mut self, run: Run, request: &Request, seen: &Seen, jobs: &[JobInfo], right: &RightAnswers) {
        self.requests += 1;
        match &seen.end {
            End::Whole => self.whole += 1,
            end => self.errors.push(end.to_string()),
        }
        self.pause = self.pause.max(seen.pause);
        let Some(right) = right.get(&request.question) else { return };
        let of_request = |trace: TraceId| jobs.iter().filter(move |job| job.trace_id == trace).cloned();
        let jobs: Vec<JobInfo> = of_request(request.trace).collect();
        let id = match jobs.first() {
            Some(job) => job.correlation_id.to_string(),
            None => seen.request_id.clone(),
        };
        for (fault, text) in judge(request, seen, &jobs, right, run.cell.tolerance()) {
            self.findings.push(Finding {
                fault,
                run: run.number,
                request_id: id.clone(),
                request: request.described(),
                text,
            });
        }
    }
}

/// Returns the node of a victim. Of several, the last one, whose machine has a cable.
fn node_of(victim: Victim) -> &'static str {
    match victim {
        Victim::Gateway => "gateway",
        Victim::Orchestrator => "orchestrator",
        Victim::Registry => "registry",
        Victim::Worker | Victim::Engine => WORKERS[1],
    }
}

/// Sends a request, waits until it has come to a step, and kills the victim. Returns the node that was hit.
async fn kill_at(
    network: &mut Network,
    victim: Victim,
    step: Step,
    load: &mut Load,
    random: &mut fastrand::Rng,
) -> anyhow::Result<&'static str> {
    let question = Question::draw(shape_of(step), random);
    let middle = Moment::Text(random.u32(150..700));
    let (any, has_key) = (random.bool(), random.bool());
    let moment = match step {
        Step::Idle => {
            let killed = kill(network, victim, None).await?;
            load.ask(Request::new(question, any, has_key, random), Tap::default());
            return Ok(killed);
        }
        Step::Reserved | Step::Dispatched => {
            let request = Request::new(question, any, has_key, random);
            let frozen = network.freeze_engines();
            load.ask(request.clone(), Tap::default());
            listed(network, request.trace).await?;
            if step == Step::Dispatched {
                tokio::time::sleep(AT_WORKER).await;
            }
            return kill_frozen(network, victim, Some(request.trace), frozen).await;
        }
        Step::WholeUnderWay => {
            let request = Request::new(question, false, has_key, random);
            load.ask(request.clone(), Tap::default());
            listed(network, request.trace).await?;
            let frozen = network.freeze_engines();
            return kill_frozen(network, victim, Some(request.trace), frozen).await;
        }
        Step::Attached | Step::Replayed => {
            let request = Request::new(question, true, true, random);
            let (tap, first) = Tap::at(if step == Step::Attached { Moment::Text(0) } else { Moment::Done });
            load.ask(request.clone(), tap);
            reached(first).await?;
            let (tap, handle) = Tap::at(Moment::Text(0));
            load.ask(request.clone(), tap);
            let _hold = reached(handle).await?;
            let frozen = network.freeze_engines();
            return kill_frozen(network, victim, Some(request.trace), frozen).await;
        }
        Step::Connected => Moment::Connected,
        Step::HeadSent => Moment::HeadSent,
        Step::HalfSent => Moment::HalfSent,
        Step::BodySent => Moment::BodySent,
        Step::FirstByte => Moment::Head,
        Step::FirstToken => Moment::Text(0),
        Step::MidAnswer | Step::MidSchema | Step::MidToolCall | Step::MidReasoning | Step::MidChoices => middle,
        Step::LastToken => Moment::Text(1000),
        Step::LastChunk => Moment::Finished,
        Step::Done => Moment::Done,
    };
    let is_before_answer = matches!(step, Step::Connected | Step::HeadSent | Step::HalfSent | Step::BodySent);
    let request = Request::new(question, any || !is_before_answer, has_key, random);
    let (tap, handle) = Tap::at(moment);
    load.ask(request.clone(), tap);
    let _hold = reached(handle).await?;
    if is_before_answer {
        return kill(network, victim, None).await;
    }
    let frozen = network.freeze_engines();
    kill_frozen(network, victim, Some(request.trace), frozen).await
}

/// Arms a point and sends a request that comes to it. Returns the nodes that have ended.
async fn killed_at(
    network: &mut Network,
    point: Point,
    load: &mut Load,
    random: &mut fastrand::Rng,
) -> anyhow::Result<Vec<&'static str>> {
    let question = Question::draw(Shape::Text, random);
    let request = Request::new(question, random.bool(), random.bool(), random);
    let mut killed = vec![];
    if point.needs_move {
        let frozen = network.freeze_engines();
        load.ask(request.clone(), Tap::default());
        listed(network, request.trace).await?;
        network.arm(point.name)?;
        killed.push(kill_frozen(network, Victim::Worker, Some(request.trace), frozen).await?);
    } else {
        network.arm(point.name)?;
        load.ask(request, Tap::default());
    }
    let victims: &[&str] = if point.victim == Victim::Worker { &WORKERS } else { &[node_of(point.victim)] };
    killed.push(network.self_killed(victims).await?);
    Ok(killed)
}

/// Returns what a request asks for that is to come to a step.
fn shape_of(step: Step) -> Shape {
    match step {
        Step::MidSchema => Shape::Schema,
        Step::MidToolCall => Shape::ToolCall,
        Step::MidChoices => Shape::Choices,
        Step::MidReasoning => Shape::Reasoning,
        _ => Shape::Text,
    }
}

/// Waits until a client has come to the moment of its tap. It stands still until the returned value is dropped.
async fn reached(handle: TapHandle) -> anyhow::Result<tokio::sync::oneshot::Sender<()>> {
    let TapHandle { reached, hold } = handle;
    timeout(STEP, reached)
        .await
        .context("a step was not reached in time")?
        .context("a request ended before its step")?;
    Ok(hold)
}

/// Waits until a job is listed.
async fn listed(network: &Network, trace: TraceId) -> anyhow::Result<()> {
    let deadline = Instant::now() + STEP;
    while !network.jobs_since(0).await?.iter().any(|job| job.trace_id == trace) {
        anyhow::ensure!(Instant::now() < deadline, "a job is not listed in time");
    }
    Ok(())
}

/// Kills the victim while the engines stand still, which then go on.
async fn kill_frozen(
    network: &mut Network,
    victim: Victim,
    trace: Option<TraceId>,
    frozen: Frozen,
) -> anyhow::Result<&'static str> {
    let killed = kill(network, victim, trace).await;
    drop(frozen);
    killed
}

/// Kills the victim: of the workers and engines, the one that has a job.
async fn kill(network: &mut Network, victim: Victim, trace: Option<TraceId>) -> anyhow::Result<&'static str> {
    let name = match (victim, trace) {
        (Victim::Worker | Victim::Engine, Some(trace)) => network.worker_of(trace).await,
        (victim, _) => node_of(victim),
    };
    if victim == Victim::Engine {
        network.kill_engine(name)?;
    } else {
        network.kill(name)?;
    }
    Ok(name)
}

/// Kills the victim under a crowd of requests, or under many clients of one request.
async fn kill_under_many(
    network: &mut Network,
    Cell { victim, injury }: Cell,
    load: &mut Load,
    random: &mut fastrand::Rng,
) -> anyhow::Result<&'static str> {
    let is_one = injury == Injury::Repeats;
    let first = Request::new(Question::draw(Shape::Text, random), true, is_one, random);
    let (tap, handle) = Tap::at(Moment::Text(random.u32(..500)));
    load.ask(first.clone(), tap);
    for _ in 1..if is_one { REPEATS } else { CROWD } {
        let other = Request::new(Question::draw(Shape::Text, random), true, random.bool(), random);
        load.ask(if is_one { first.clone() } else { other }, Tap::default());
    }
    let _hold = reached(handle).await?;
    let frozen = network.freeze_engines();
    kill_frozen(network, victim, Some(first.trace), frozen).await
}

/// Requests in the middle of their answers, which stand still until this is dropped.
struct Scene {
    /// The worker that has one of them.
    worker: &'static str,
    _hold: tokio::sync::oneshot::Sender<()>,
    _engines: Frozen,
}

/// Begins requests of several kinds and waits until one of them is in the middle of its answer.
async fn begin_load(network: &Network, load: &mut Load, random: &mut fastrand::Rng) -> anyhow::Result<Scene> {
    let question = Question::draw(Shape::Text, random);
    let (tap, handle) = Tap::at(Moment::Text(100));
    let first = Request::new(question, true, random.bool(), random);
    load.ask(first.clone(), tap);
    let hold = reached(handle).await?;
    for (is_streamed, has_key) in [(true, true), (true, false), (false, true), (false, false)] {
        let question = Question::draw(Shape::Text, random);
        load.ask(Request::new(question, is_streamed, has_key, random), Tap::default());
    }
    tokio::time::sleep(Duration::from_millis(random.u64(..100))).await;
    let engines = network.freeze_engines();
    Ok(Scene { worker: network.worker_of(first.trace).await, _hold: hold, _engines: engines })
}

/// Injures a node for a while, with requests coming all the time, and heals it.
async fn injure(
    network: &mut Network,
    Cell { victim, injury }: Cell,
    load: &mut Load,
    random: &mut fastrand::Rng,
) -> anyhow::Result<()> {
    let scene = begin_load(network, load, random).await?;
    let name = if matches!(victim, Victim::Worker | Victim::Engine) { scene.worker } else { node_of(victim) };
    match injury {
        Injury::Freeze(time) => {
            let process =
                if victim == Victim::Engine { network.engine(name)? } else { Handle::of(network.pid(name)?)? };
            // Dropping the scene lets all engines go on, so an engine that is the victim is stopped after it.
            let scene = (victim != Victim::Engine).then_some(scene);
            let frozen = Frozen::new([process]);
            drop(scene);
            arrive(load, time, random).await;
            drop(frozen);
        }
        Injury::Cut(time) => {
            network.set_cable(name, false)?;
            drop(scene);
            arrive(load, time, random).await;
            network.set_cable(name, true)?;
        }
        Injury::FullDisk(time) => {
            network.fill_disk(name)?;
            drop(scene);
            arrive(load, time, random).await;
            network.free_disk(name)?;
        }
        Injury::Skew(seconds) => {
            network.set_clock(name, seconds)?;
            drop(scene);
            arrive(load, SKEWED_FOR, random).await;
            network.set_clock(name, 0)?;
        }
        Injury::Absence(time) => {
            network.kill(name)?;
            drop(scene);
            arrive(load, time, random).await;
            network.restart(name).await?;
        }
        Injury::Stop => {
            network.terminate(name)?;
            // The answers take longer than the node has to drain.
            tokio::time::sleep(Duration::from_secs(DRAIN_SECS) + AFTER_DRAIN).await;
            drop(scene);
            arrive(load, Duration::from_secs(1), random).await;
            network.ended(name).await?;
            network.restart(name).await?;
        }
        Injury::PowerCut => network.cut_power().await?,
        Injury::Kill(_) | Injury::Point(_) | Injury::Crowd | Injury::Repeats => {}
    }
    Ok(())
}

/// Sends a request from time to time.
async fn arrive(load: &mut Load, time: Duration, random: &mut fastrand::Rng) {
    let until = Instant::now() + time;
    for number in 0.. {
        if Instant::now() >= until {
            break;
        }
        let mut request = Request::draw(&load.client.right, random);
        // Mostly short ones: what matters afterwards is the network, and not what has piled up.
        if number % LONG_EVERY != 0 {
            request.question.shape = Shape::Short;
        }
        load.ask(request, Tap::default());
        tokio::time::sleep(ARRIVALS.min(until.saturating_duration_since(Instant::now()))).await;
    }
}

/// Asks for short answers until there is one.
struct Pulse {
    client: Client,
    question: Question,
}

struct Recovering(JoinSet<Duration>);

impl Pulse {
    fn new(client: &Client, random: &mut fastrand::Rng) -> Self {
        let question = Question::draw(Shape::Short, random);
        Self { client: client.clone(), question }
    }

    fn begin(&self) -> Recovering {
        let (client, question) = (self.client.clone(), self.question);
        let began = Instant::now();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut random = fastrand::Rng::new();
            while began.elapsed() < super::network::READY {
                let request = Request::new(question, true, false, &mut random);
                if client.ask(&request, Tap::default()).await.end == End::Whole {
                    break;
                }
                tokio::time::sleep(PULSE).await;
            }
            began.elapsed()
        });
        Recovering(task)
    }
}

impl Recovering {
    /// Returns how long it took until there was an answer.
    async fn ended(mut self) -> Duration {
        self.0.join_next().await.and_then(Result::ok).unwrap_or_default()
    }
}
