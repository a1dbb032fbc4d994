//! A registry and an orchestrator that do as the prompt says.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use protocol::Clock as _;
use protocol::control::{
    ByOperator, CATALOG_LIST, Catalog, Decision, Empty, ExplainRequest, FLEET_LIST, Fleet, FleetWorker, JOB_EXPLAIN,
    MODEL_REMOVE, ModelRemove, ModelRemoved, NodeInfo, NodeRole, OPERATOR_TOKEN_CREATE, OPERATOR_TOKEN_LIST,
    OPERATOR_TOKEN_REVOKE, OperatorRequest, Scope, TOKEN_CHECK, TokenCheck, TokenCreate, TokenCreated, TokenGrant,
    TokenList, TokenRevoke, TokenRevoked,
};
use protocol::health::{CachedModel, Capacity, HealthReport, ModelState};
use protocol::infer::{
    Degraded, EmbedInput, Embedding, FinishReason, InferChunk, InferRequest, ListedToken, Origin, Payload, Progress,
    SUBMIT, TokenLogprob, ToolCallDelta,
};
use protocol::jobs::{JOB_LIST, JOB_SHOW, JobInfo, JobPage, JobQuery, JobRef, JobStatus};
use protocol::kept::{KEPT_READ, KEPT_REMOVE, KEPT_SHOW, KeptAnswer, KeptRef, KeptRemoved, KeptStatus};
use protocol::model::{AdapterEntry, AdapterKey, AliasEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::quota::{QuotaRefusal, QuotaRule, QuotaState, Window};
use protocol::signature::NodeKey;
use protocol::token::{ApiToken, RANDOM_BYTES, TokenKind};
use protocol::usage::TokenUsage;
use protocol::{Digest, ErrorCode, Region, Topic, UnixMillis, WireError, codec};
use rpc::{Interrupted, Membership, MemoryNetwork, ResponseSink, Server, StreamCall, SystemClock};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What the fakes know and saw.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) network: MemoryNetwork,
    pub(crate) grants: Arc<Mutex<HashMap<String, TokenGrant>>>,
    pub(crate) models: Arc<Mutex<Vec<ModelEntry>>>,
    /// Their other names.
    pub(crate) aliases: Arc<Mutex<Vec<AliasEntry>>>,
    pub(crate) workers: Arc<Mutex<Vec<FleetWorker>>>,
    /// Jobs, in the order they came.
    pub(crate) jobs: Arc<Mutex<Vec<InferRequest>>>,
    /// How often the registry was asked about a token.
    pub(crate) token_checks: Arc<AtomicUsize>,
    /// Told each time a job comes.
    pub(crate) arrived: Arc<Notify>,
    /// Told each time a job is cancelled.
    pub(crate) cancelled: Arc<Notify>,
    /// Lets a job go on whose prompt is "held".
    pub(crate) release: Arc<Notify>,
}

/// When kept answers began.
const CREATED_AT: UnixMillis = UnixMillis(1_700_000_000_000);

/// A daily limit of 1,000 tokens of which 600 are left.
fn quota() -> QuotaState {
    QuotaState {
        rule: QuotaRule::TokensPerDay,
        limit: Some(1_000),
        spent: 300,
        reserved: 100,
        resets_at: Some(Window::Day.end(SystemClock.now())),
    }
}

/// Returns a well-formed token; 1 to 4 are known to the registry.
pub(crate) fn token(seed: u8) -> String {
    ApiToken::generate(TokenKind::Live, &[seed; RANDOM_BYTES]).to_string()
}

pub(crate) fn grant(tenant: &str, scopes: &[Scope], policy: TenantPolicy) -> TokenGrant {
    let tenant_id = tenant.parse().expect("tenant");
    TokenGrant { key_id: "key".into(), tenant_id, scopes: scopes.to_vec(), policy, expires_at: None }
}

pub(crate) fn model(name: &str, version: &str) -> ModelEntry {
    let key = ModelKey { model_id: name.parse().expect("name"), version: version.parse().expect("version") };
    ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        digest: Digest::of(key.to_string().as_bytes()),
        key,
        bytes: 1,
        context_length: 2048,
        description: String::new(),
        created_at: UnixMillis(1_700_000_000_000),
    }
}

/// The one adapter there is, of the newest `tiny`.
fn pirate() -> AdapterEntry {
    let key = AdapterKey { model: model("tiny", "1.1").key, adapter: "pirate".parse().expect("name") };
    let (digest, description) = (Digest::of(b"adapter"), String::new());
    AdapterEntry { key, digest, bytes: 1, description, created_at: UnixMillis(1_700_000_000_000) }
}

/// A worker that has one model ready, serves another one at its first job, and has the adapter.
fn worker(model: &ModelEntry, idle: &ModelEntry) -> FleetWorker {
    let key = NodeKey::from_seed(&[5; 32]).public_key();
    let cached =
        CachedModel { tokens_per_second: 1.0, ..CachedModel::new(model.key.clone(), model.digest, ModelState::Ready) };
    let report = HealthReport {
        v: 1,
        worker_id: key,
        pub_key: key,
        region: "local".parse().expect("region"),
        gpu_class: "cpu".into(),
        vram_gb: 0,
        accelerators: vec![],
        capacity: Capacity::default(),
        supported: vec![model.key.clone(), idle.key.clone()],
        to_fetch: vec![],
        adapters: vec![pirate().key],
        pinned: vec![],
        model_cache: vec![cached],
        latency_hops: 0,
        draining: false,
        activity: protocol::health::Activity::Accepting,
        continues: true,
        epoch: 1,
        seq: 1,
        issued_at: UnixMillis(0),
        not_after: UnixMillis(0),
    };
    FleetWorker { report, age_ms: 0, reserved: 0, shortened: false }
}

/// A job that has ended well.
fn completed(job: &InferRequest) -> JobInfo {
    JobInfo {
        sequence: 1,
        correlation_id: job.correlation_id,
        tenant_id: job.tenant_id.clone(),
        model: job.model(),
        region: "local".parse().expect("region"),
        trace_id: job.trace_id,
        status: JobStatus::Completed,
        worker_id: NodeKey::from_seed(&[5; 32]).public_key(),
        attempts: 1,
        continued: 0,
        created_at: UnixMillis(0),
        updated_at: UnixMillis(0),
        error_code: None,
        error_message: None,
        finish_reason: None,
        usage: None,
        history: vec![],
    }
}

impl Fake {
    /// Starts fakes with the memberships that they are given by key and role.
    pub(crate) async fn start_as(
        network: &MemoryNetwork,
        tasks: &TaskTracker,
        stop: &CancellationToken,
        admit: impl Fn(&NodeKey, NodeRole) -> Membership,
    ) -> Self {
        let infer = [Scope::Infer];
        let slow = TenantPolicy { requests_per_minute: Some(2), ..TenantPolicy::default() };
        let picky =
            TenantPolicy { allowed_models: Some(vec!["other".parse().expect("name")]), ..TenantPolicy::default() };
        let grants = HashMap::from([
            (token(1), grant("acme", &infer, TenantPolicy::default())),
            (token(2), grant("slow", &infer, slow)),
            (token(3), grant("picky", &infer, picky)),
            (token(4), grant("operator", &[Scope::Admin], TenantPolicy::default())),
        ]);
        let models = vec![model("tiny", "1.0"), model("tiny", "1.1"), model("other", "0.1")];
        let fake = Self {
            network: network.clone(),
            grants: Arc::new(Mutex::new(grants)),
            workers: Arc::new(Mutex::new(vec![worker(&models[1], &models[2])])),
            models: Arc::new(Mutex::new(models)),
            aliases: Arc::default(),
            jobs: Arc::default(),
            token_checks: Arc::default(),
            arrived: Arc::default(),
            cancelled: Arc::default(),
            release: Arc::default(),
        };
        fake.serve(1, NodeRole::Registry, &admit, tasks, stop).await;
        fake.serve(2, NodeRole::Orchestrator, &admit, tasks, stop).await;
        fake
    }

    async fn serve(
        &self,
        seed: u8,
        role: NodeRole,
        admit: impl Fn(&NodeKey, NodeRole) -> Membership,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) {
        let key = NodeKey::from_seed(&[seed; 32]);
        let node = self.network.node(&key);
        node.announce(&Topic::Control("local".parse().expect("region"))).await.expect("announced");
        let info = NodeInfo { roles: vec![role], region: "local".parse().expect("region"), version: "0".into() };
        let server = Server::new(node, info).membership(admit(&key, role));
        let server = match role {
            NodeRole::Registry => self.registry(server),
            _ => self.orchestrator(server),
        };
        tasks.spawn(server.run(stop.clone(), Duration::from_millis(100)));
    }

    /// Adds an orchestrator that knows no worker. Returns how many jobs it has refused.
    pub(crate) async fn orchestrator_without_workers(
        &self,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Arc<AtomicUsize> {
        let refused = Arc::<AtomicUsize>::default();
        let node = self.network.node(&NodeKey::from_seed(&[3; 32]));
        let region: Region = "local".parse().expect("region");
        node.announce(&Topic::Control(region.clone())).await.expect("announced");
        let info = NodeInfo { roles: vec![NodeRole::Orchestrator], region, version: "0".into() };
        let counted = refused.clone();
        let server = Server::new(node, info).stream(SUBMIT, move |call: StreamCall| {
            counted.fetch_add(1, Ordering::SeqCst);
            call.refuse(WireError::new(ErrorCode::NoCapacity, "no worker").with_retry_after(Duration::from_secs(1)))
        });
        tasks.spawn(server.run(stop.clone(), Duration::from_millis(100)));
        refused
    }

    /// Adds an orchestrator that knows no job and answers each. Returns how many it got.
    pub(crate) async fn orchestrator_without_jobs(
        &self,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Arc<AtomicUsize> {
        let seen = Arc::<AtomicUsize>::default();
        let node = self.network.node(&NodeKey::from_seed(&[4; 32]));
        let region: Region = "local".parse().expect("region");
        node.announce(&Topic::Control(region.clone())).await.expect("announced");
        let info = NodeInfo { roles: vec![NodeRole::Orchestrator], region, version: "0".into() };
        let (counted, fake) = (seen.clone(), self.clone());
        let server = Server::new(node, info).unary(JOB_SHOW, |_, _: JobRef| async { Ok(JobPage::default()) }).stream(
            SUBMIT,
            move |call: StreamCall| {
                counted.fetch_add(1, Ordering::SeqCst);
                let fake = Self { jobs: Arc::default(), ..fake.clone() };
                async move { fake.submit(call).await }
            },
        );
        tasks.spawn(server.run(stop.clone(), Duration::from_millis(100)));
        seen
    }

    fn registry(&self, server: Server) -> Server {
        let (grants, models, aliases) = (self.grants.clone(), self.models.clone(), self.aliases.clone());
        let token_checks = self.token_checks.clone();
        server
            .unary(TOKEN_CHECK, move |_, check: TokenCheck| {
                token_checks.fetch_add(1, Ordering::Relaxed);
                let grant = grants.lock().get(&check.token).cloned();
                async move { grant.ok_or_else(|| WireError::new(ErrorCode::InvalidApiKey, "no such key")) }
            })
            .unary(OPERATOR_TOKEN_CREATE, |_, asked: ByOperator<TokenCreate>| async move {
                let new = asked.request;
                let (token, key_id) = (format!("token of {}", new.name), "abcdefgh".to_owned());
                Ok(TokenCreated { token, key_id, tenant_id: new.tenant_id })
            })
            .unary(OPERATOR_TOKEN_LIST, |_, _: OperatorRequest| async { Ok(TokenList::default()) })
            .unary(OPERATOR_TOKEN_REVOKE, |_, asked: ByOperator<TokenRevoke>| async move {
                Ok(TokenRevoked { found: asked.request.key_id == "abcdefgh" })
            })
            .unary(CATALOG_LIST, move |_, _: Empty| {
                let models = models.lock().clone();
                let aliases = aliases.lock().clone();
                async move { Ok(Catalog { models, adapters: vec![pirate()], aliases }) }
            })
            .unary(MODEL_REMOVE, |_, asked: ByOperator<ModelRemove>| async move {
                let ModelRemove { model_id, version, force } = asked.request;
                let key = ModelKey { model_id, version: version.unwrap_or("1.1".parse().expect("version")) };
                Ok(ModelRemoved { found: force, key, aliases: vec![], unused: vec![] })
            })
    }

    fn orchestrator(&self, server: Server) -> Server {
        let (workers, fake) = (self.workers.clone(), self.clone());
        server
            .unary(FLEET_LIST, move |_, _: Empty| {
                let workers = workers.lock().clone();
                async move { Ok(Fleet { workers }) }
            })
            .unary(JOB_LIST, |_, query: JobQuery| async move {
                let next = (query.limit == 1).then(|| query.before.unwrap_or(9) - 1).filter(|next| *next > 5);
                Ok(JobPage { jobs: vec![], next })
            })
            .unary(JOB_SHOW, {
                let jobs = self.jobs.clone();
                move |_, request: JobRef| {
                    let mut jobs: Vec<JobInfo> = jobs.lock().iter().map(completed).collect();
                    jobs.retain(|job| job.correlation_id == request.correlation_id);
                    async move { Ok(JobPage { jobs, next: None }) }
                }
            })
            .unary(JOB_EXPLAIN, |_, request: ExplainRequest| async move {
                if request.correlation_id.0.is_nil() {
                    return Err(WireError::new(ErrorCode::NotFound, "no such job"));
                }
                let tenant_id = "acme".parse().expect("tenant");
                let correlation_id = request.correlation_id;
                Ok(Decision {
                    correlation_id,
                    tenant_id,
                    attempts: vec![],
                    wait: None,
                    degraded: None,
                    weights: None,
                    job: None,
                })
            })
            .unary(KEPT_SHOW, {
                let fake = self.clone();
                move |_, kept: KeptRef| {
                    let shown = fake.kept(&kept).map(|job| KeptAnswer {
                        note: job.note.unwrap_or_default(),
                        created_at: CREATED_AT,
                        status: KeptStatus::Completed,
                        error: None,
                    });
                    async move { shown }
                }
            })
            .unary(KEPT_REMOVE, {
                let fake = self.clone();
                move |_, kept: KeptRef| {
                    let found = fake.kept(&kept).is_ok();
                    fake.jobs.lock().retain(|job| !found || job.correlation_id != kept.correlation_id);
                    async move { Ok(KeptRemoved { found }) }
                }
            })
            .stream(KEPT_READ, {
                let fake = self.clone();
                move |call: StreamCall| {
                    let fake = fake.clone();
                    async move { fake.read_kept(call).await }
                }
            })
            .stream(SUBMIT, move |call| {
                let fake = fake.clone();
                async move { fake.submit(call).await }
            })
    }

    /// Returns a job that has a note.
    fn kept(&self, kept: &KeptRef) -> Result<InferRequest, WireError> {
        let is_this = |job: &&InferRequest| {
            job.correlation_id == kept.correlation_id && job.tenant_id == kept.tenant_id && job.note.is_some()
        };
        let found = self.jobs.lock().iter().find(is_this).cloned();
        found.ok_or_else(|| WireError::new(ErrorCode::NotFound, "no answer is kept"))
    }

    /// Sends the answer of a kept job again.
    async fn read_kept(&self, call: StreamCall) {
        let kept: KeptRef = codec::decode(&call.body).expect("the gateway sends well-formed requests");
        let job = match self.kept(&kept) {
            Ok(job) => job,
            Err(error) => return call.refuse(error).await,
        };
        let Ok(mut reply) = call.accept().await else { return };
        let chunk = InferChunk::new(job.correlation_id, 2, 0, Payload::default());
        let origin = Some(Origin { created_at: CREATED_AT, replayed: true, attached: false });
        let told = InferChunk { progress: Some(Progress::default()), origin, ..chunk };
        let _ = reply.send(&codec::encode(&told)).await;
        let usage = Some(TokenUsage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 3, reasoning_tokens: 0 });
        for (seq, text) in (0..).zip(["Hel", "lo", ""]) {
            let done = text.is_empty();
            let (finish_reason, usage) = (done.then_some(FinishReason::Stop), usage.filter(|_| done));
            let payload = Payload { text: text.into(), finish_reason, usage, ..Payload::default() };
            let model = (seq == 0).then(|| job.model());
            let chunk = InferChunk { model, done, ..InferChunk::new(job.correlation_id, 2, seq, payload) };
            let _ = reply.send(&codec::encode(&chunk)).await;
        }
        let _ = reply.finish().await;
    }

    async fn submit(&self, mut call: StreamCall) {
        let request: InferRequest = codec::decode(&call.body).expect("the gateway sends well-formed jobs");
        self.jobs.lock().push(request.clone());
        self.arrived.notify_one();
        let messages = request.input.messages.as_ref().and_then(|messages| messages.last());
        let text = request.input.embed.as_ref().and_then(|texts| match &texts[0] {
            EmbedInput::Text(text) => Some(text.clone()),
            EmbedInput::Tokens(_) => None,
        });
        let first = request.input.prompts.as_ref().and_then(|prompts| match &prompts[0] {
            EmbedInput::Text(text) => Some(text.clone()),
            EmbedInput::Tokens(_) => None,
        });
        let prompt =
            messages.map(|message| message.content.clone()).or(request.input.prompt.clone()).or(text).or(first);
        let prompt = prompt.expect("a prompt");
        if let Some(code) = prompt.strip_prefix("refuse ") {
            let code: ErrorCode = serde_json::from_value(code.into()).expect("a code");
            let error = WireError::new(code, "refused").with_retry_after(Duration::from_millis(2500));
            return call.refuse(error).await;
        }
        if let Some(millis) = prompt.strip_prefix("wait ") {
            tokio::time::sleep(Duration::from_millis(millis.parse().expect("a number"))).await;
        }
        if prompt == "held" {
            self.release.notified().await;
        }
        // Waits for a place that never comes, until the caller goes.
        if prompt == "queued" {
            call.cancelled().await;
            return self.cancelled.notify_one();
        }
        // A server that cannot count tokens.
        if request.input.count_only && request.model_id.as_str() == "other" {
            let error = WireError::new(ErrorCode::UnsupportedParameter, "it does not count").with_param("input");
            return call.refuse(error).await;
        }
        if prompt == "over quota" {
            let state = QuotaState { spent: 990, ..quota() };
            let refusal = QuotaRefusal { state, wanted: 200 };
            return call.refuse(refusal.error(SystemClock.now())).await;
        }
        if prompt == "vanish" {
            return;
        }
        let is_this = |job: &&InferRequest| job.correlation_id == request.correlation_id;
        let times = self.jobs.lock().iter().filter(is_this).count();
        // Refuses so many calls as a node does that stops.
        if let Some(refusals) = prompt.strip_prefix("away ")
            && times <= refusals.parse().expect("a number")
        {
            return call.refuse(WireError::new(ErrorCode::Unavailable, "this node is stopping")).await;
        }
        // Breaks off with a job that it has written, and finds it there when it comes again.
        if prompt == "restart" {
            if times > 1 {
                return call.refuse(WireError::new(ErrorCode::IdempotencyInProgress, "a job of it exists")).await;
            }
            return;
        }
        let Ok(mut reply) = call.accept().await else { return self.cancelled.notify_one() };
        if self.play(&prompt, &request, &mut reply).await.is_err() {
            self.cancelled.notify_one();
            return;
        }
        let _ = match prompt.as_str() {
            "break" => reply.fail(WireError::new(ErrorCode::WorkerFailed, "the worker died")).await,
            "cut" => return,
            _ => reply.finish().await,
        };
    }

    /// Sends what the prompt asks for.
    async fn play(&self, prompt: &str, request: &InferRequest, reply: &mut ResponseSink) -> Result<(), Interrupted> {
        let answering = prompt.strip_prefix("as ").map(|name| {
            let models = [request.model()].into_iter().chain(request.alternatives.iter().cloned());
            let other = ModelKey { model_id: name.parse().expect("a name"), ..request.model() };
            models.into_iter().find(|model| model.model_id.as_str() == name).unwrap_or(other)
        });
        let chunk = |seq: u64, text: &str| {
            let payload = Payload { text: text.into(), tokens: vec![1], ..Payload::default() };
            let model = answering.clone().filter(|_| seq == 0);
            InferChunk { model, ..InferChunk::new(request.correlation_id, 2, seq, payload) }
        };
        let usage = TokenUsage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 3, reasoning_tokens: 0 };
        let last = |seq: u64| {
            let mut last = chunk(seq, "");
            last.payload =
                Payload { finish_reason: Some(FinishReason::Stop), usage: Some(usage), ..Payload::default() };
            InferChunk { done: true, ..last }
        };
        match prompt {
            "endless" => {
                for seq in 0.. {
                    reply.send(&codec::encode(&chunk(seq, "more "))).await?;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            // A prompt that takes ten minutes to read, and an answer that takes an hour.
            "slow" => {
                for second in 0..600 {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    let progress = Some(Progress { tokens_read: second, tokens_total: 600 });
                    let payload = Payload::default();
                    reply.send(&codec::encode(&InferChunk { progress, payload, ..chunk(0, "") })).await?;
                }
                for minute in 0..60 {
                    reply.send(&codec::encode(&chunk(minute, "more "))).await?;
                    tokio::time::sleep(Duration::from_mins(1)).await;
                }
                reply.send(&codec::encode(&last(60))).await?;
            }
            // Sends again what it kept.
            "replayed" => {
                let origin =
                    Some(Origin { created_at: UnixMillis(1_700_000_000_000), replayed: true, attached: false });
                let (progress, payload) = (Some(Progress::default()), Payload::default());
                reply.send(&codec::encode(&InferChunk { progress, payload, origin, ..chunk(0, "") })).await?;
                reply.send(&codec::encode(&chunk(0, "again"))).await?;
                reply.send(&codec::encode(&last(1))).await?;
            }
            // Says first what is left of the tenant's tokens.
            "quota" => {
                let (progress, quota) = (Some(Progress::default()), Some(quota()));
                let payload = Payload::default();
                reply.send(&codec::encode(&InferChunk { progress, payload, quota, ..chunk(0, "") })).await?;
                reply.send(&codec::encode(&chunk(0, "hi"))).await?;
                reply.send(&codec::encode(&last(1))).await?;
            }
            // Another model answers, because the queue is long.
            "degraded" => {
                let model = Some(model("other", "0.1").key);
                let degraded = Degraded { model: model.clone(), reason: "queue".into(), ..Degraded::default() };
                let (progress, payload) = (Some(Progress::default()), Payload::default());
                let told = InferChunk { progress, payload, degraded: Some(degraded.clone()), ..chunk(0, "") };
                reply.send(&codec::encode(&told)).await?;
                reply.send(&codec::encode(&InferChunk { model, ..chunk(0, "short") })).await?;
                let mut last = last(1);
                last.payload.degraded = Some(degraded);
                reply.send(&codec::encode(&last)).await?;
            }
            // Sends progress once and then nothing, until the caller goes.
            "stuck" => {
                let (progress, payload) = (Some(Progress::default()), Payload::default());
                reply.send(&codec::encode(&InferChunk { progress, payload, ..chunk(0, "") })).await?;
                reply.cancelled().await;
                return Err(Interrupted);
            }
            // The answer of an earlier call, which still runs.
            "attached" => {
                let origin = Origin { created_at: UnixMillis(1_700_000_000_000), replayed: false, attached: true };
                let (progress, payload, origin) = (Some(Progress::default()), Payload::default(), Some(origin));
                reply.send(&codec::encode(&InferChunk { progress, payload, origin, ..chunk(0, "") })).await?;
                reply.send(&codec::encode(&chunk(0, "again"))).await?;
                reply.send(&codec::encode(&last(1))).await?;
            }
            // Sends one piece and then nothing, until the caller goes.
            "silent" => {
                reply.send(&codec::encode(&chunk(0, "one"))).await?;
                reply.cancelled().await;
                return Err(Interrupted);
            }
            "flood" => {
                for seq in 0.. {
                    reply.send(&codec::encode(&chunk(seq, &"x".repeat(10_000)))).await?;
                }
            }
            "gap" => {
                reply.send(&codec::encode(&chunk(0, "one"))).await?;
                reply.send(&codec::encode(&chunk(2, "three"))).await?;
            }
            "stale" => {
                reply.send(&codec::encode(&chunk(0, "one"))).await?;
                reply.send(&codec::encode(&InferChunk { attempt: 1, ..chunk(1, "two") })).await?;
            }
            "unfinished" => reply.send(&codec::encode(&chunk(0, "one"))).await?,
            "break" | "cut" => {
                reply.send(&codec::encode(&chunk(0, "Hel"))).await?;
            }
            "several" => {
                let of = |seq: u64, index: u32, text: &str| InferChunk {
                    payload: Payload { index, text: text.into(), ..Payload::default() },
                    ..chunk(seq, "")
                };
                let ended = |seq: u64, index: u32, reason| InferChunk {
                    payload: Payload { index, finish_reason: Some(reason), ..Payload::default() },
                    ..chunk(seq, "")
                };
                for chunk in [
                    of(0, 0, "a"),
                    of(1, 1, "x"),
                    ended(2, 1, FinishReason::Length),
                    of(3, 0, "b"),
                    ended(4, 0, FinishReason::Stop),
                    last(5),
                ] {
                    reply.send(&codec::encode(&chunk)).await?;
                }
            }
            "call" => {
                let with = |seq: u64, payload: Payload| InferChunk { payload, ..chunk(seq, "") };
                let call = |id: Option<&str>, arguments: &str| ToolCallDelta {
                    index: 0,
                    id: id.map(str::to_owned),
                    name: id.map(|_| "weather".to_owned()),
                    arguments: arguments.into(),
                };
                let calls = |delta| Payload { tool_calls: vec![delta], ..Payload::default() };
                let thought = Payload { reasoning: "hm".into(), ..Payload::default() };
                let mut end = last(3);
                end.payload.finish_reason = Some(FinishReason::ToolCalls);
                end.payload.usage = Some(TokenUsage { reasoning_tokens: 1, ..usage });
                for chunk in
                    [with(0, thought), with(1, calls(call(Some("c1"), "{"))), with(2, calls(call(None, "}"))), end]
                {
                    reply.send(&codec::encode(&chunk)).await?;
                }
            }
            "stopped" => {
                reply.send(&codec::encode(&chunk(0, "Hel"))).await?;
                let mut end = last(1);
                end.payload.stop_sequence = Some("END".into());
                reply.send(&codec::encode(&end)).await?;
            }
            "count" => {
                let mut end = last(0);
                end.payload.input_tokens = Some(7);
                reply.send(&codec::encode(&end)).await?;
            }
            "likely" => {
                let token = |text: &str, top: Vec<TokenLogprob>| {
                    let bytes = text.as_bytes().to_vec();
                    TokenLogprob { token: 1, bytes, logprob: -0.5, top }
                };
                let logprobs = vec![token("Hi", vec![token("Hi", vec![]), token("Ho", vec![])])];
                let payload = Payload { text: "Hi".into(), logprobs, ..Payload::default() };
                reply.send(&codec::encode(&InferChunk { payload, ..chunk(0, "") })).await?;
                reply.send(&codec::encode(&last(1))).await?;
            }
            "scores" => {
                for (index, score) in [(0, 0.25), (1, 0.75)] {
                    let payload = Payload { embeddings: vec![Embedding::new(index, &[score])], ..Payload::default() };
                    reply.send(&codec::encode(&InferChunk { payload, ..chunk(index.into(), "") })).await?;
                }
                let mut end = last(2);
                end.payload.usage = Some(TokenUsage { completion_tokens: 0, ..usage });
                reply.send(&codec::encode(&end)).await?;
            }
            "list" => {
                let listed = |(id, bytes): (u32, &[u8])| ListedToken { id, bytes: bytes.to_vec() };
                for (seq, token) in [(0, (5, &b"Z"[..])), (1, (6, &[0xc3]))] {
                    let payload = Payload { listed_tokens: vec![listed(token)], ..Payload::default() };
                    reply.send(&codec::encode(&InferChunk { payload, ..chunk(seq, "") })).await?;
                }
                let mut end = last(2);
                end.payload.input_tokens = Some(2);
                end.payload.usage = Some(TokenUsage::default());
                reply.send(&codec::encode(&end)).await?;
            }
            "vectors" | "too few vectors" => {
                let count = request.input.embed.as_ref().map_or(1, Vec::len) as u32;
                let count = if prompt == "vectors" { count } else { count - 1 };
                for index in 0..count {
                    let embeddings = vec![Embedding::new(index, &[index as f32, 0.5])];
                    let payload = Payload { embeddings, ..Payload::default() };
                    reply.send(&codec::encode(&InferChunk { payload, ..chunk(index.into(), "") })).await?;
                }
                let mut end = last(count.into());
                end.payload.usage = Some(TokenUsage { completion_tokens: 0, ..usage });
                reply.send(&codec::encode(&end)).await?;
            }
            _ => {
                reply.send(&codec::encode(&chunk(0, "Hel"))).await?;
                reply.send(&codec::encode(&chunk(1, "lo"))).await?;
                // A gateway says what it has read, so that its clients pay for no more.
                if request.acknowledges {
                    reply.wait_until_acknowledged().await?;
                }
                reply.send(&codec::encode(&last(2))).await?;
            }
        }
        Ok(())
    }
}
