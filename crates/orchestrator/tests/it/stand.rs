//! A network of one real orchestrator with a real store, a registry of fixed rules and workers that do as told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use metadata_store::{JobKey, JobRecord, JobStore, SqliteStore, UsageCursor, UsageRecord};
use observability::Exposition;
use observability::metrics::register_shed;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use protocol::control::{
    ByOperator, Decision, Empty, ExplainRequest, FLEET_LIST, Fleet, JOB_EXPLAIN, NodeInfo, NodeRole, OPERATOR_CHECK,
    OperatorRequest, POLICY_GET, POOL_STATE, PRESENCE_REPORT, PolicyRequest, PoolState, PoolStateRequest,
};
use protocol::error_code::ContextLength;
use protocol::health::{self, CachedModel, Capacity, EXPIRY, HealthReport, ModelState};
use protocol::infer::{Delivered, FinishReason, InferChunk, InferRequest, Payload, Progress, START, SUBMIT};
use protocol::membership::{Certificate, RevocationList, RevocationStamp};
use protocol::model::ModelKey;
use protocol::policy::TenantPolicy;
use protocol::signature::{NodeKey, Signed};
use protocol::usage::TokenUsage;
use protocol::{
    Clock, CorrelationId, Digest, ErrorCode, PublicKey, Region, TenantId, Topic, UnixMillis, WireError, codec,
};
use rpc::{
    CallError, Client, Membership, MemoryNetwork, ResponseStream, Server, StreamCall, StreamOptions, SystemClock,
};
use tether_orchestrator::{Config, Orchestrator, OrchestratorParts};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::evil_worker::Lie;

/// The token of an operator.
pub(crate) const OPERATOR: &str = "operator";

/// What a worker does with a job.
#[derive(Clone)]
pub(crate) enum Manner {
    /// Answers with this many chunks and an end.
    Answer(u64),
    /// Answers with one chunk and an end, and has read so many tokens of the prompt.
    AnswerLong(u32),
    /// Refuses.
    Refuse(ErrorCode),
    /// Takes the job and dies after this many chunks.
    DieAfter(u64),
    /// Takes the job, and its engine crashes while it works on so many.
    Crash(u32),
    /// Takes the job, and its engine is killed from outside.
    LoseEngine,
    /// Says nothing for so many seconds, then answers.
    Late(u64),
    /// Takes the job, and its engine crashes after this many chunks.
    CrashAfter(u64),
    /// Answers with this many chunks that list no tokens, and dies.
    DieUntold(u64),
    /// Takes the job and says no more until it is cancelled.
    Wait,
    /// Reads the prompt for so many seconds, then sends a chunk a second for as many.
    Read(u64),
    /// Makes as many tokens as the job allows, one in this time, on so many slots.
    Pace(Arc<Semaphore>, Duration),
    /// Reads the prompt for so many seconds, then says nothing.
    FallSilent(u64),
    /// Reports again and again that it has read nothing.
    Idle,
    /// Is stopped after this many chunks.
    StopAfter(u64),
    /// Stops after so many chunks, and lists their tokens, so that another worker can continue.
    LeaveAfter(u64),
    /// Says nothing at all.
    Mute,
    /// Takes the job, sends one chunk, and waits until it is cancelled.
    Hang,
    /// Answers, and says that this model does.
    AnswerAs(ModelKey),
    /// Answers for this model, and has none other.
    Only(ModelKey),
    /// Answers under the number of another attempt.
    WrongAttempt,
    /// Does as this lie says, against the contract.
    Lie(Lie),
}

pub(crate) struct Stand {
    pub(crate) network: MemoryNetwork,
    pub(crate) membership: Membership,
    /// What the registry tells of the expelled.
    pub(crate) list: Arc<Mutex<Signed>>,
    pub(crate) store: Arc<dyn JobStore>,
    pub(crate) metrics: Exposition,
    pub(crate) orchestrator: PublicKey,
    pub(crate) gateway: Client,
    pub(crate) policy: Arc<Mutex<TenantPolicy>>,
    /// The tenant whose policy the registry does not return.
    pub(crate) withheld: Arc<Mutex<Option<TenantId>>>,
    tasks: TaskTracker,
    jobs: AtomicU64,
}

pub(crate) struct Worker {
    pub(crate) key: NodeKey,
    pub(crate) client: Client,
    pub(crate) manner: Arc<Mutex<Manner>>,
    pub(crate) seen: Arc<AtomicUsize>,
    pub(crate) cancelled: Arc<Notify>,
    /// What its last job says of an earlier attempt.
    pub(crate) delivered: Arc<Mutex<Option<Delivered>>>,
    /// The most tokens of an answer that its last job asks for.
    pub(crate) max_tokens: Arc<Mutex<Option<u32>>>,
    seq: AtomicU64,
}

pub(crate) fn region() -> Region {
    "local".parse().expect("region")
}

pub(crate) fn model() -> ModelKey {
    ModelKey { model_id: "tether-tiny".parse().expect("name"), version: "1.0".parse().expect("version") }
}

fn info(role: NodeRole) -> NodeInfo {
    NodeInfo { roles: vec![role], region: region(), version: "0".into() }
}

/// A key of its own for each number; workers count from 1.
pub(crate) fn key(number: u8) -> NodeKey {
    NodeKey::from_seed(&[number; 32])
}

/// The root of the pool.
pub(crate) fn root() -> NodeKey {
    key(250)
}

/// A certificate of the pool for a node of a number.
pub(crate) fn certificate(number: u8, role: NodeRole) -> Certificate {
    let now = SystemClock.now();
    Certificate {
        v: protocol::membership::certificate::VERSION,
        serial: 1,
        pool: root().public_key(),
        public_key: key(number).public_key(),
        roles: vec![role],
        regions: vec![],
        models: vec![],
        not_before: UnixMillis(now.0 - 60_000),
        not_after: now.after(Duration::from_hours(1)),
    }
}

/// The membership of whoever has this certificate.
pub(crate) fn membership(certificate: &Certificate) -> Membership {
    let (pool, signed) = (root().public_key(), certificate.sign(&root()));
    Membership::new(pool, certificate.public_key, signed, Arc::new(SystemClock)).expect("a good certificate")
}

fn member(number: u8, role: NodeRole) -> Membership {
    membership(&certificate(number, role))
}

fn list(version: u64, keys: &[PublicKey]) -> Signed {
    let keys = keys.iter().copied().collect();
    RevocationList { version, keys, ..RevocationList::empty(root().public_key()) }.sign(&root())
}

fn stamp(version: u64) -> Signed {
    let (v, pool, issued_at) = (protocol::membership::revocation::VERSION, root().public_key(), SystemClock.now());
    RevocationStamp { v, pool, version, issued_at }.sign(&root())
}

pub(crate) async fn stand(config: Config) -> Stand {
    stand_on(Arc::new(SqliteStore::in_memory().expect("a store")), config).await
}

pub(crate) async fn stand_on(store: Arc<dyn JobStore>, config: Config) -> Stand {
    let network = MemoryNetwork::new();
    let mut registry = Registry::default();
    let shed = register_shed(&mut registry);
    let metrics = tether_orchestrator::Metrics::register(&mut registry, shed);
    let exposition = Exposition::new(registry);
    let tasks = TaskTracker::new();
    let policy = Arc::new(Mutex::new(TenantPolicy::default()));

    let registry = network.node(&key(200));
    registry.announce(&Topic::Control(region())).await.expect("announced");
    let withheld = Arc::new(Mutex::new(None));
    let kept = withheld.clone();
    let (rules, revoked) = (policy.clone(), Arc::new(Mutex::new(list(0, &[]))));
    let current = revoked.clone();
    let server = Server::new(registry, info(NodeRole::Registry))
        .membership(member(200, NodeRole::Registry))
        .unary(POLICY_GET, move |_, request: PolicyRequest| {
            let is_withheld = kept.lock().as_ref() == Some(&request.tenant_id);
            let refusal = WireError::new(ErrorCode::InsufficientScope, "this policy is withheld");
            let policy = if is_withheld { Err(refusal) } else { Ok(rules.lock().clone()) };
            async move { policy }
        })
        .unary(OPERATOR_CHECK, |_, request: OperatorRequest| async move {
            match request.token.as_str() {
                OPERATOR => Ok(Empty {}),
                "caller" => Err(WireError::new(ErrorCode::InsufficientScope, "no operator")),
                _ => Err(WireError::new(ErrorCode::InvalidApiKey, "no such key")),
            }
        })
        .unary(POOL_STATE, move |_, request: PoolStateRequest| {
            let list = current.lock().clone();
            let version = RevocationList::verify(&list, root().public_key()).expect("a good list").version;
            let stamp = Some(stamp(version));
            async move { Ok(PoolState { version, revocations: (version != request.version).then_some(list), stamp }) }
        });
    tasks.spawn(server.run(CancellationToken::new(), Duration::ZERO));

    let transport = network.node(&key(201));
    let orchestrator = transport.public_key();
    let membership = member(201, NodeRole::Orchestrator);
    let parts = OrchestratorParts {
        transport,
        region: region(),
        clock: Arc::new(SystemClock),
        store: store.clone(),
        metrics,
        membership: membership.clone(),
        sealing_key: tether_orchestrator::SealingKey([7; 32]),
        version: "0".into(),
    };
    tasks.spawn(async move { Orchestrator::run(config, parts, CancellationToken::new()).await.expect("runs") });
    let gateway = Client::new(network.node(&key(202))).with_membership(member(202, NodeRole::Gateway));
    Stand {
        network,
        membership,
        list: revoked,
        store,
        metrics: exposition,
        orchestrator,
        gateway,
        policy,
        withheld,
        tasks,
        jobs: AtomicU64::new(1),
    }
}

impl Stand {
    /// Adds a worker and waits until the orchestrator has its report.
    pub(crate) async fn worker(&self, number: u8, manner: Manner) -> Worker {
        let worker = self.certified_worker(&certificate(number, NodeRole::Worker), manner, number);
        worker.report(self, |_| {}).await.expect("believed");
        worker
    }

    /// Expels a node, as the registry would.
    pub(crate) fn revoke(&self, node: PublicKey) {
        *self.list.lock() = list(1, &[node]);
    }

    /// Adds a worker that has this certificate and has not reported.
    pub(crate) fn certified_worker(&self, certificate: &Certificate, manner: Manner, number: u8) -> Worker {
        let membership = membership(certificate);
        let key = key(number);
        let transport = self.network.node(&key);
        let manner = Arc::new(Mutex::new(manner));
        let seen = Arc::new(AtomicUsize::new(0));
        let cancelled = Arc::new(Notify::new());
        let (delivered, max_tokens) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
        let server = Server::new(transport.clone(), info(NodeRole::Worker)).membership(membership.clone());
        let server = server.stream(START, {
            let (manner, seen, cancelled, store) =
                (manner.clone(), seen.clone(), cancelled.clone(), self.store.clone());
            let (delivered, max_tokens) = (delivered.clone(), max_tokens.clone());
            move |call| {
                seen.fetch_add(1, Ordering::SeqCst);
                let job: InferRequest = codec::decode(&call.body).expect("a job");
                (*delivered.lock(), *max_tokens.lock()) = (job.delivered, job.input.max_tokens);
                let manner = manner.lock().clone();
                serve(call, manner, cancelled.clone(), store.clone())
            }
        });
        self.tasks.spawn(server.run(CancellationToken::new(), Duration::ZERO));
        let client = Client::new(transport).with_membership(membership);
        Worker { key, client, manner, seen, cancelled, delivered, max_tokens, seq: AtomicU64::new(0) }
    }

    /// Adds two workers. Equal scores go to the lowest id, so the first of them is asked first.
    pub(crate) async fn pair(&self, first: Manner, second: Manner) -> (Worker, Worker) {
        let (low, high) = if key(1).public_key() < key(2).public_key() { (1, 2) } else { (2, 1) };
        (self.worker(low, first).await, self.worker(high, second).await)
    }

    pub(crate) fn job(&self) -> InferRequest {
        let number = self.jobs.fetch_add(1, Ordering::SeqCst);
        InferRequest::new(
            "acme".parse().expect("tenant"),
            model(),
            serde_json::from_str("\"hi\"").expect("a prompt"),
            CorrelationId(uuid::Uuid::from_u128(number.into())),
            format!("token-{number}").parse().expect("token"),
            protocol::TraceId([1; 16]),
        )
    }

    pub(crate) async fn submit(&self, job: &InferRequest) -> Result<ResponseStream, CallError> {
        submit(&self.gateway, self.orchestrator, job).await
    }

    /// Submits a job and reads its whole answer.
    pub(crate) async fn answer(&self, job: &InferRequest) -> Result<Vec<InferChunk>, WireError> {
        let mut stream = self.submit(job).await?;
        let mut chunks = vec![];
        while let Some(chunk) = stream.next().await {
            chunks.push(codec::decode(&chunk?).expect("a chunk"));
        }
        Ok(chunks)
    }

    pub(crate) async fn record(&self, job: &InferRequest) -> Option<JobRecord> {
        self.store.job(&job_key(job)).await.expect("readable")
    }

    pub(crate) async fn usage(&self) -> Vec<UsageRecord> {
        let tenant = "acme".parse().expect("tenant");
        self.store.usage(&tenant, UsageCursor::default(), 1000).await.expect("readable")
    }

    pub(crate) async fn fleet(&self) -> Fleet {
        self.ask(FLEET_LIST, &Empty {}).await
    }

    pub(crate) async fn explain(&self, job: &InferRequest) -> Decision {
        self.ask(JOB_EXPLAIN, &ExplainRequest { correlation_id: job.correlation_id }).await
    }

    pub(crate) async fn ask<Reply: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        request: &impl serde::Serialize,
    ) -> Reply {
        self.gateway.call(self.orchestrator, method, request, Duration::from_secs(5)).await.expect("answered")
    }

    /// Asks as an operator.
    pub(crate) async fn operate<Reply: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        request: impl serde::Serialize,
    ) -> Result<Reply, CallError> {
        let request = ByOperator { token: OPERATOR.to_owned(), request };
        self.gateway.call(self.orchestrator, method, &request, Duration::from_secs(5)).await
    }

    /// Waits until the store says what is hoped for.
    pub(crate) async fn settled(&self, job: &InferRequest) -> JobRecord {
        for _ in 0..500 {
            if let Some(record) = self.record(job).await
                && record.state != metadata_store::DurableState::Reserved
            {
                return record;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the job was not settled within five seconds");
    }
}

pub(crate) async fn submit(
    client: &Client,
    orchestrator: PublicKey,
    job: &InferRequest,
) -> Result<ResponseStream, CallError> {
    let seconds = Duration::from_secs(20);
    let options = StreamOptions { accept_within: seconds, deadline: Some(seconds), stall: seconds };
    client.open_stream(orchestrator, SUBMIT, codec::encode(job).into(), options).await
}

impl Worker {
    pub(crate) fn report_body(&self, change: impl FnOnce(&mut HealthReport)) -> HealthReport {
        let now = SystemClock.now();
        let mut report = HealthReport {
            v: 1,
            worker_id: self.key.public_key(),
            pub_key: self.key.public_key(),
            region: region(),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity { slots: 4, running: 0, waiting: 0, queue_max: 4 },
            supported: vec![model()],
            to_fetch: vec![],
            adapters: vec![],
            pinned: vec![],
            model_cache: vec![CachedModel::new(model(), Digest::of(b"model"), ModelState::Ready)],
            latency_hops: 0,
            draining: false,
            activity: protocol::health::Activity::Accepting,
            continues: true,
            epoch: 1,
            seq: self.seq.fetch_add(1, Ordering::SeqCst),
            issued_at: now,
            not_after: now.after(EXPIRY),
        };
        change(&mut report);
        report
    }

    pub(crate) fn sign(&self, report: &HealthReport) -> Signed {
        self.key.sign(health::KIND, String::from_utf8(codec::encode(report)).expect("JSON"))
    }

    pub(crate) async fn report(
        &self,
        stand: &Stand,
        change: impl FnOnce(&mut HealthReport),
    ) -> Result<Empty, CallError> {
        self.push(stand, &self.sign(&self.report_body(change))).await
    }

    pub(crate) async fn push(&self, stand: &Stand, signed: &Signed) -> Result<Empty, CallError> {
        self.client.call(stand.orchestrator, PRESENCE_REPORT, signed, Duration::from_secs(5)).await
    }

    pub(crate) fn jobs_seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

pub(crate) fn job_key(request: &InferRequest) -> JobKey {
    let InferRequest { tenant_id, correlation_id, retry_token, .. } = request.clone();
    JobKey { tenant_id, correlation_id, retry_token }
}

/// Sends one chunk with all tokens once they could be made, and the end.
async fn pace(call: StreamCall, request: &InferRequest, slots: &Semaphore, each: Duration) {
    let Ok(mut reply) = call.accept().await else { return };
    let slot = tokio::select! {
        slot = slots.acquire() => slot.expect("never closed"),
        () = reply.cancelled() => return,
    };
    let tokens = request.input.max_tokens.unwrap_or(1);
    tokio::select! {
        () = tokio::time::sleep(each * tokens) => {}
        () = reply.cancelled() => return,
    }
    drop(slot);
    let chunk = |seq, payload| InferChunk::new(request.correlation_id, request.attempt, seq, payload);
    let all = Payload { text: "x".into(), tokens: (0..tokens).collect(), ..Payload::default() };
    let usage = TokenUsage { prompt_tokens: 3, completion_tokens: tokens, cached_tokens: 0, reasoning_tokens: 0 };
    let end = Payload { finish_reason: Some(FinishReason::Stop), usage: Some(usage), ..Payload::default() };
    for chunk in [chunk(0, all), InferChunk { done: true, ..chunk(1, end) }] {
        if reply.send(&codec::encode(&chunk)).await.is_err() {
            return;
        }
    }
    let _ = reply.finish().await;
}

async fn serve(call: StreamCall, manner: Manner, cancelled: Arc<Notify>, store: Arc<dyn JobStore>) {
    let request: InferRequest = codec::decode(&call.body).expect("a job");
    let reserved = store.job(&job_key(&request)).await.expect("readable");
    let reserved = reserved.expect("a reservation is written before a job is sent");
    assert_eq!(reserved.attempt, request.attempt);
    let attempt = if matches!(manner, Manner::WrongAttempt) { request.attempt + 1 } else { request.attempt };
    let model = if let Manner::AnswerAs(model) = &manner { Some(model.clone()) } else { None };
    let first = request.delivered.as_ref().map_or(0, |delivered| delivered.seq);
    let prompt_tokens = if let Manner::AnswerLong(read) = manner { read } else { 3 };
    let has_tokens = !matches!(manner, Manner::DieUntold(_) | Manner::StopAfter(_));
    let chunk = |seq, done| {
        let payload = if done {
            let usage =
                TokenUsage { prompt_tokens, completion_tokens: seq as u32, cached_tokens: 0, reasoning_tokens: 0 };
            Payload { finish_reason: Some(FinishReason::Stop), usage: Some(usage), ..Payload::default() }
        } else {
            let prompt = TokenUsage { prompt_tokens, completion_tokens: 0, cached_tokens: 0, reasoning_tokens: 0 };
            let usage = (seq == 0).then_some(prompt);
            let tokens = if has_tokens { vec![seq as u32] } else { vec![] };
            Payload { text: format!("{seq} "), tokens, usage, ..Payload::default() }
        };
        let progress = None;
        let model = model.clone().filter(|_| seq == 0);
        codec::encode(&InferChunk {
            model,
            done,
            progress,
            ..InferChunk::new(request.correlation_id, attempt, seq, payload)
        })
    };
    let chunks = match manner {
        Manner::Lie(lie) => return lie.serve(call, &request).await,
        Manner::Refuse(ErrorCode::ContextLengthExceeded) => {
            let limit = ContextLength { context_length: 512, part: "prompt", prompt_tokens: 700 };
            return call.refuse(limit.into()).await;
        }
        Manner::Refuse(code) if code == ErrorCode::UnsupportedParameter => {
            return call.refuse(WireError::new(code, "refused").with_param("tools")).await;
        }
        Manner::Pace(slots, each) => return pace(call, &request, &slots, each).await,
        Manner::Refuse(code) => return call.refuse(WireError::new(code, "refused")).await,
        Manner::Only(model) if model != request.model() => {
            return call.refuse(WireError::new(ErrorCode::ModelNotHere, "not here")).await;
        }
        Manner::Mute => {
            let _call = call;
            return std::future::pending().await;
        }
        Manner::Answer(chunks)
        | Manner::DieAfter(chunks)
        | Manner::CrashAfter(chunks)
        | Manner::StopAfter(chunks)
        | Manner::LeaveAfter(chunks)
        | Manner::DieUntold(chunks) => chunks,
        Manner::Hang | Manner::WrongAttempt | Manner::AnswerAs(_) | Manner::Only(_) | Manner::AnswerLong(_) => 1,
        Manner::Late(_)
        | Manner::LoseEngine
        | Manner::Crash(_)
        | Manner::Idle
        | Manner::Wait
        | Manner::Read(_)
        | Manner::FallSilent(_) => 0,
    };
    let Ok(mut reply) = call.accept().await else { return };
    for seq in first..chunks {
        if reply.send(&chunk(seq, false)).await.is_err() {
            return cancelled.notify_one();
        }
    }
    if let Manner::Idle = manner {
        let (progress, model, payload) = (Some(Progress::default()), None, Payload::default());
        let correlation_id = request.correlation_id;
        let chunk = InferChunk { model, progress, ..InferChunk::new(correlation_id, attempt, 0, payload) };
        while reply.send(&codec::encode(&chunk)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        return cancelled.notify_one();
    }
    if let Manner::Read(seconds) | Manner::FallSilent(seconds) = manner {
        for second in 0..seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let progress = Some(Progress { tokens_read: second as u32, tokens_total: seconds as u32 });
            let correlation_id = request.correlation_id;
            let chunk = InferChunk { progress, ..InferChunk::new(correlation_id, attempt, 0, Payload::default()) };
            if reply.send(&codec::encode(&chunk)).await.is_err() {
                return cancelled.notify_one();
            }
        }
    }
    if let Manner::Read(seconds) = manner {
        for seq in 0..seconds {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if reply.send(&chunk(seq, false)).await.is_err() {
                return cancelled.notify_one();
            }
        }
        let _ = reply.send(&chunk(seconds, true)).await;
        let _ = reply.finish().await;
        return;
    }
    if let Manner::Late(seconds) = manner {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }
    match manner {
        Manner::LoseEngine => {
            let error = WireError::new(ErrorCode::WorkerFailed, "the engine was killed, try again");
            let _ = reply.fail(error.with_suspects(0)).await;
        }
        Manner::Late(_)
        | Manner::Answer(_)
        | Manner::AnswerLong(_)
        | Manner::AnswerAs(_)
        | Manner::Only(_)
        | Manner::WrongAttempt => {
            let _ = reply.send(&chunk(chunks, true)).await;
            let _ = reply.finish().await;
        }
        Manner::CrashAfter(_) => {
            let _ = reply.fail(WireError::new(ErrorCode::EngineCrashed, "the engine crashed, try again")).await;
        }
        Manner::StopAfter(_) | Manner::LeaveAfter(_) => {
            let _ = reply.fail(WireError::new(ErrorCode::WorkerStopping, "the worker is stopping")).await;
        }
        Manner::Crash(suspects) => {
            let error = WireError::new(ErrorCode::EngineCrashed, "the engine crashed, try again");
            let _ = reply.fail(error.with_suspects(suspects)).await;
        }
        Manner::Hang | Manner::Wait | Manner::FallSilent(_) => {
            reply.cancelled().await;
            cancelled.notify_one();
        }
        _ => {}
    }
}
