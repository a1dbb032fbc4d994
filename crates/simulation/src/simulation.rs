//! One simulation: a network, its clients and its faults, all drawn from one seed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use metadata_store::{DurableState, JobKey, JobStore as _, TerminalState, UsageCursor, UsageRecord};
use parking_lot::Mutex;
use protocol::Digest;
use tokio::time::{self, Instant};
use tokio_util::task::TaskTracker;

use crate::faults::Fault;
use crate::findings::{Findings, Trace};
use crate::network::{Network, Node, Shape, TENANTS, models};
use crate::randomness;
use crate::workload::{self, End, Received, Request};

/// How long clients ask and faults begin.
const BUSY: Duration = Duration::from_secs(40);
/// How long nodes have to find each other.
const START: Duration = Duration::from_secs(5);
/// How long a network may take to be well again after its last fault.
const RECOVERY: Duration = Duration::from_mins(3);
/// How long it takes until a lease has run out that nobody renews, and its job is released.
const RELEASE: Duration = Duration::from_mins(1);
const CLIENTS: u8 = 6;

/// What a simulation showed.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    /// What is wrong; empty if all is well.
    pub findings: Vec<String>,
    pub events: Vec<String>,
    /// A digest of all events. Equal seeds give equal ones.
    pub digest: Digest,
    pub requests: usize,
    /// How many answers were complete.
    pub finished: usize,
    pub faults: usize,
}

/// A request and what came of it.
struct Exchange {
    request: Request,
    received: Received,
    /// Whether no network was between the client and its gateway.
    is_within: bool,
}

/// Runs the simulation of a seed. In a process of its own it repeats exactly; see [`crate::randomness`].
pub fn simulate(seed: u64) -> Report {
    randomness::begin(seed);
    // One thread for all that blocks, so that it comes in one order.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).max_blocking_threads(1).build();
    runtime.expect("a runtime").block_on(run(seed))
}

async fn run(seed: u64) -> Report {
    let mut random = Rng::with_seed(seed);
    let (findings, trace) = (Findings::default(), Trace::begin());
    let workers = random.u8(2..5);
    let shape = Shape {
        orchestrators: random.u8(1..3),
        gateways: random.u8(1..3),
        workers,
        per_token: (0..workers).map(|_| Duration::from_millis(random.u64(10..120))).collect(),
    };
    trace.note(format_args!("{shape:?}"));
    let mut network = Network::start(shape, findings.clone()).await;
    let mut tokens = vec![];
    for tenant in TENANTS {
        tokens.push(network.token(tenant).await);
    }
    time::sleep(START).await;
    let scene = Arc::new(Scene { tokens, trace: trace.clone(), asked: Mutex::default(), findings: findings.clone() });
    if !scene.is_well(&mut network, &mut random).await {
        findings.report("the network does not start".to_owned());
    }
    let until = Instant::now() + BUSY;
    let clients = TaskTracker::new();
    for number in 0..CLIENTS {
        clients.spawn(client(scene.clone(), Side::of(number, &mut network), number, random.fork(), until));
    }
    let faults = break_things(&mut network, &trace, until, &mut random).await;
    clients.close();
    if time::timeout(RECOVERY * 2, clients.wait()).await.is_err() {
        findings.report("clients wait for ever".to_owned());
    }
    if !scene.is_well(&mut network, &mut random).await {
        findings.report("the network does not recover".to_owned());
    }
    time::sleep(RELEASE).await;
    scene.check(&network).await;
    let asked = scene.asked.lock();
    Report {
        seed,
        findings: findings.all(),
        events: trace.events(),
        digest: trace.digest(),
        requests: asked.len(),
        finished: asked.iter().filter(|asked| matches!(asked.received.end, End::Finished(_))).count(),
        faults,
    }
}

/// Begins and ends faults until a time, and then ends all of them. Returns how many there were.
async fn break_things(network: &mut Network, trace: &Trace, until: Instant, random: &mut Rng) -> usize {
    let (mut count, nodes) = (0, network.nodes());
    let mut running: Vec<(Instant, Fault)> = vec![];
    while Instant::now() < until {
        let next = Instant::now() + Duration::from_millis(random.u64(100..8_000));
        while let Some(index) =
            (0..running.len()).filter(|index| running[*index].0 <= next).min_by_key(|index| running[*index].0)
        {
            let (at, fault) = running.remove(index);
            time::sleep_until(at).await;
            trace.note(format_args!("over: {fault}"));
            fault.end(network);
        }
        time::sleep_until(next).await;
        let fault = Fault::random(&nodes, random);
        if running.iter().any(|(_, other)| other.is_like(&fault)) {
            continue;
        }
        trace.note(&fault);
        fault.begin(network);
        running.push((Instant::now() + Duration::from_millis(random.u64(200..20_000)), fault));
        count += 1;
    }
    for (_, fault) in running {
        trace.note(format_args!("over: {fault}"));
        fault.end(network);
    }
    network.links.heal_all();
    count
}

/// How a client reaches its gateway.
enum Side {
    Within(Arc<Mutex<Vec<Option<gateway::Gateway>>>>, usize),
    Over(rpc::Client, protocol::PublicKey),
}

impl Side {
    fn of(number: u8, network: &mut Network) -> Self {
        let gateway = number / 2 % network.shape.gateways;
        if number.is_multiple_of(2) {
            Self::Within(network.gateways(), usize::from(gateway))
        } else {
            Self::Over(network.client(number), Node::Gateway(gateway).public_key())
        }
    }

    async fn ask(&self, token: &str, request: &Request) -> Received {
        match self {
            Self::Within(gateways, number) => {
                let running = gateways.lock()[*number].clone();
                match running {
                    Some(gateway) => workload::ask_within(&gateway, token, request).await,
                    None => Received::nothing(End::Broken),
                }
            }
            Self::Over(client, gateway) => workload::ask_over(client, *gateway, token, request).await,
        }
    }
}

/// Asks one thing after the other, and sometimes the same again.
async fn client(scene: Arc<Scene>, side: Side, number: u8, mut random: Rng, until: Instant) {
    let mut count = 0;
    let mut last: Option<Request> = None;
    while Instant::now() < until {
        time::sleep(Duration::from_millis(random.u64(0..3_000))).await;
        count += 1;
        let fresh = Request::random(u64::from(number) << 32 | count, &models(), TENANTS.len(), &mut random);
        let request = last.take().filter(|_| random.u8(..6) == 0).unwrap_or(fresh);
        last = Some(request.clone());
        scene.ask(&side, request).await;
    }
}

struct Scene {
    /// The API key of each tenant.
    tokens: Vec<String>,
    trace: Trace,
    asked: Mutex<Vec<Exchange>>,
    findings: Findings,
}

impl Scene {
    async fn ask(&self, side: &Side, request: Request) -> End {
        let received = side.ask(&self.tokens[request.tenant], &request).await;
        self.trace.note(format_args!("{} {:?} after {}", request.id.0, received.end, received.tokens()));
        if let End::Failed(protocol::ErrorCode::InternalError, message) = &received.end {
            self.findings.report(format!("{}: internal error: {message}", request.id));
        }
        if let Some(finding) = received.check(&request) {
            self.findings.report(finding);
        }
        let end = received.end.clone();
        self.asked.lock().push(Exchange { request, received, is_within: matches!(side, Side::Within(..)) });
        end
    }

    /// Asks until each model answers, for as long as a network may take to be well.
    async fn is_well(&self, network: &mut Network, random: &mut Rng) -> bool {
        let side = Side::of(0, network);
        let until = Instant::now() + RECOVERY;
        for (number, model) in models().into_iter().enumerate() {
            loop {
                let number = 1 << 48 | (number as u64) << 40 | random.u64(..1 << 40);
                let request = Request::random(number, std::slice::from_ref(&model), TENANTS.len(), random);
                let request = Request { leaves_after: None, pause: Duration::ZERO, ..request };
                if matches!(self.ask(&side, request).await, End::Finished(_)) {
                    break;
                }
                if Instant::now() >= until {
                    return false;
                }
                time::sleep(Duration::from_secs(1)).await;
            }
        }
        true
    }

    /// Compares what the stores say with what the clients got.
    async fn check(&self, network: &Network) {
        let mut records: BTreeMap<JobKey, Vec<(DurableState, Option<UsageRecord>)>> = BTreeMap::new();
        for disk in &network.disks {
            let mut bills = BTreeMap::new();
            for tenant in TENANTS {
                let tenant = tenant.parse().expect("a tenant");
                let listed = disk.store.usage(&tenant, UsageCursor::default(), u32::MAX).await.expect("it works");
                for bill in listed {
                    if let Some(second) = bills.insert(bill.key.clone(), bill) {
                        self.findings.report(format!("{} is billed twice", second.key.correlation_id));
                    }
                }
            }
            for (key, times) in disk.ledger().settlements {
                if times != 1 {
                    self.findings.report(format!("{} was settled {times} times", key.correlation_id));
                }
                let job = disk.store.job(&key).await.expect("it works").expect("it was accepted");
                let bill = bills.remove(&key);
                records.entry(key).or_default().push((job.state, bill));
            }
            let held = disk.store.active_reservations().await.expect("it works");
            if !held.is_empty() {
                self.findings.report(format!("reservations are left: {held:?}"));
            }
        }
        self.check_bills(&records);
    }

    fn check_bills(&self, records: &BTreeMap<JobKey, Vec<(DurableState, Option<UsageRecord>)>>) {
        let completed = DurableState::Settled(TerminalState::Completed);
        let mut read: BTreeMap<JobKey, Vec<&Exchange>> = BTreeMap::new();
        let asked = self.asked.lock();
        for asked in asked.iter() {
            let Request { id, retry_token, tenant, .. } = &asked.request;
            let tenant_id = TENANTS[*tenant].parse().expect("a tenant");
            let key = JobKey { tenant_id, correlation_id: *id, retry_token: retry_token.clone() };
            read.entry(key).or_default().push(asked);
        }
        for (key, asked) in read {
            let id = key.correlation_id;
            let (whole, prompt) = (asked[0].request.tokens(), asked[0].request.prompt_tokens());
            let records = records.get(&key).map_or(&[][..], |records| records);
            let bills: Vec<_> = records.iter().filter_map(|(_, bill)| bill.as_ref()).collect();
            let is_finished = asked.iter().any(|asked| matches!(asked.received.end, End::Finished(_)));
            let is_billed_whole =
                bills.iter().any(|bill| bill.usage.completion_tokens == whole && bill.usage.prompt_tokens == prompt);
            if is_finished && !(records.iter().any(|(state, _)| *state == completed) && is_billed_whole) {
                self.findings.report(format!("{id} was answered, and the stores say {records:?}"));
            }
            if bills.len() > asked.len() {
                self.findings.report(format!("{id} was asked {} times and billed {} times", asked.len(), bills.len()));
            }
            let got = asked.iter().map(|asked| asked.received.tokens()).max().unwrap_or_default();
            let is_within = asked.iter().all(|asked| asked.is_within);
            for (state, bill) in records {
                let Some(bill) = bill else { continue };
                let billed = bill.usage.completion_tokens;
                // Nothing is between the client and the gateway, so what the gateway acknowledged, the client has.
                let most = if is_within && *state != completed { got } else { whole };
                if billed > most {
                    self.findings.report(format!("{id} is {state:?}: {billed} tokens are billed, {got} were read"));
                }
            }
        }
    }
}
