//! A worker in the network: takes jobs, runs them and streams their answers.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use artifact_store::ArtifactStore;
use engine::ModelRuntime;
use engine::remote::{RemoteRuntime, Timeouts};
use failpoints::failpoint;
use protocol::artifact::FETCH;
use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::control::{
    Empty, MODEL_MOVE, ModelMove, ModelResidency, NodeInfo, NodeRole, PRESENCE_DESCRIBE, ResidencyState,
    WorkerResidency,
};
use protocol::health::Activity;
use protocol::infer::{InferRequest, Progress, START};
use protocol::model::ModelKey;
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock, ErrorCode, Region, Topic, WireError, WorkerId, codec};
use rpc::announce::DirectoryTask;
use rpc::server::{self, STRANGER_BYTES_MAX};
use rpc::{
    Access, ArtifactServer, Client, Directory, Interrupted, Membership, MembershipTask, ResponseSink, Server,
    StreamCall, Transport,
};
use tokio::sync::{Notify, watch};
use tokio::time::{self, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::activity::{ActivityWatch, Machine, Surroundings};
use crate::adoption::{Adoption, AdoptionWatch};
use crate::announcer::{Announcer, topics};
use crate::capabilities::Capabilities;
use crate::catalog_watch::CatalogWatch;
use crate::config::{CatalogUse, Config};
use crate::device_report;
use crate::disk_calls::DiskCalls;
use crate::engine_meter::EngineMeter;
use crate::execution_engine::{Begun, Broken, ExecutionEngine, empty_chunk, finish, pulse, send_progress};
use crate::fetcher::{Fetcher, FetcherParts};
use crate::health_reporter::{Condition, HealthReporter, Identity, ReportWriter};
use crate::hearing::Hearing;
use crate::listed::Listed;
use crate::metrics::Metrics;
use crate::model_loader::cache::{Entry, ModelCache, Status};
use crate::model_loader::{LoaderOptions, ModelLoader, u64_of};
use crate::offers::Offers;
use crate::quota_guard::{Demand, JobLimits, QuotaGuard, QuotaPermit};
use crate::remote_models::RemoteModels;
use crate::runtimes::Runtimes;
use crate::standing::Standing;

/// A job that has not begun after this time is accepted all the same. Orchestrators wait 500 ms for the acceptance. A
/// job that begins sooner can still be refused if the engine rejects its request.
const BEGIN_BEFORE_ACCEPT: Duration = Duration::from_millis(200);
/// A request longer than this takes a while to parse, so it is accepted first and parsed on a blocking thread.
const READ_AT_ONCE_BYTES: usize = 256 * 1024;
/// How often the engines are polled while no job ends.
const METER_EVERY: Duration = Duration::from_millis(500);
/// How long to wait for the registry's catalogue at the start.
const CATALOG_WITHIN: Duration = Duration::from_secs(3);
/// How long a caller may take to receive an error or a refusal.
const LAST_WORD: Duration = Duration::from_secs(1);

/// What a worker is built from, besides its configuration.
pub struct WorkerParts {
    /// Its transport to the network.
    pub transport: Arc<dyn Transport>,
    /// Its key, which is also the transport's.
    pub key: NodeKey,
    /// The number of this start; greater than that of every earlier start.
    pub epoch: u64,
    /// Wall clock for its reports.
    pub clock: Arc<dyn Clock>,
    /// The runtime that runs its models.
    pub runtime: Arc<dyn ModelRuntime>,
    /// The store of its model files.
    pub artifacts: ArtifactStore,
    /// Runs the calls that wait for the disk of that store.
    pub disk: DiskCalls,
    /// Its metrics; workers of one process may share them.
    pub metrics: Metrics,
    /// Decides which nodes may give it work and read its state.
    pub membership: Membership,
    /// Servers whose models it serves as well, while they run.
    pub adoption: Option<Adoption>,
    pub version: String,
}

/// A worker that has not started.
pub struct BaseWorker {
    config: Config,
    parts: WorkerParts,
    runtime: Arc<Runtimes>,
    loader: Arc<ModelLoader>,
    guard: Arc<QuotaGuard>,
    client: Client,
    directory: Directory,
    directory_task: DirectoryTask,
    hearing: Arc<Hearing>,
    listed: Listed,
    surroundings: Arc<dyn Surroundings>,
    changes: watch::Sender<()>,
    catalog_read: watch::Sender<Option<Instant>>,
    adopted: watch::Sender<Option<usize>>,
    stopped: CancellationToken,
    /// Handles also see the end of a worker that never ran.
    end: DropGuard,
}

/// Observes a worker from outside. Clones observe the same worker.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    worker_id: WorkerId,
    /// When the registry's catalogue was first read.
    catalog_read: watch::Sender<Option<Instant>>,
    /// How many servers' models were found; `None` before the first poll.
    adopted: watch::Sender<Option<usize>>,
    loader: Arc<ModelLoader>,
    hearing: Arc<Hearing>,
    stopped: CancellationToken,
}

/// Why a worker will not be ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// A model could not be loaded. The worker keeps trying.
    #[error("{model}: {reason}")]
    LoadFailed { model: ModelKey, reason: Arc<str> },
    /// The worker has stopped.
    #[error("the worker has stopped")]
    Stopped,
}

impl BaseWorker {
    /// Creates a worker. The configuration must have passed [`Config::check`].
    pub fn new(config: Config, parts: WorkerParts) -> Self {
        let changes = watch::Sender::new(());
        let Config { slots, queue_max, preload, memory_max_mib, vram_max_mib, .. } = config;
        let bytes = |mib: u64| (mib > 0).then(|| mib.saturating_mul(1 << 20));
        let (memory_max, vram_max) = (bytes(memory_max_mib), bytes(vram_max_mib));
        let seed = u64_of(&parts.key.public_key().0);
        let client = Client::new(parts.transport.clone()).with_membership(parts.membership.clone());
        let topic = Topic::Control(config.region.clone());
        let (directory, directory_task) = Directory::new(parts.transport.clone(), client.clone(), topic);
        let offers = Offers::new(client.clone(), directory.clone());
        let timeouts = Timeouts { begin: config.server_stall(), ..Timeouts::default() };
        let runtime =
            Arc::new(Runtimes { engines: parts.runtime.clone(), servers: Arc::new(RemoteRuntime::new(timeouts)) });
        let (listed, free) = (Listed::default(), parts.artifacts.clone());
        let fetcher = Fetcher::new(FetcherParts {
            use_of: config.catalog,
            client: client.clone(),
            directory: directory.clone(),
            store: parts.artifacts.clone(),
            listed: listed.clone(),
            most_bytes: (config.disk_max_mib > 0).then(|| config.disk_max_mib.saturating_mul(1 << 20)),
            free_bytes: Arc::new(move || free.room_bytes().ok()),
            metrics: parts.metrics.clone(),
        });
        let loader = ModelLoader::new(
            ModelCache::new(&config.models, preload),
            LoaderOptions {
                slots,
                queue_max,
                preload,
                memory_max,
                vram_max,
                sandbox: config.engine_sandbox,
                nice: config.activity.nice,
                seed,
            },
            runtime.clone(),
            RemoteModels::new(runtime.servers.clone(), offers),
            fetcher,
            parts.metrics.clone(),
            changes.clone(),
        );
        let loader = Arc::new(loader.with_disk_calls(parts.disk.clone()));
        let guard = QuotaGuard::new(JobLimits::of(&config), changes.clone());
        let stopped = CancellationToken::new();
        let end = stopped.clone().drop_guard();
        let hearing = Arc::new(Hearing::new(config.region.clone()));
        let catalog_read = watch::Sender::new((config.catalog == CatalogUse::Off).then(Instant::now));
        let surroundings = Arc::new(Machine::new(parts.clock.clone(), parts.disk.clone()));
        let adopted = watch::Sender::new(parts.adoption.is_none().then_some(0));
        Self {
            config,
            parts,
            runtime,
            loader,
            guard,
            client,
            directory,
            directory_task,
            hearing,
            listed,
            surroundings,
            changes,
            catalog_read,
            adopted,
            stopped,
            end,
        }
    }

    /// Follows the rules of [`crate::activity`] by this view of the machine.
    #[must_use]
    pub fn with_surroundings(self, surroundings: Arc<dyn Surroundings>) -> Self {
        Self { surroundings, ..self }
    }

    /// Returns a handle that observes the worker while it runs.
    pub fn handle(&self) -> WorkerHandle {
        let worker_id = self.parts.transport.public_key();
        let (loader, hearing) = (self.loader.clone(), self.hearing.clone());
        let (catalog_read, adopted) = (self.catalog_read.clone(), self.adopted.clone());
        WorkerHandle { worker_id, catalog_read, adopted, loader, hearing, stopped: self.stopped.clone() }
    }

    /// Runs until `stop`; then refuses new jobs, lets running jobs finish, and leaves the network.
    pub async fn run(self, stop: CancellationToken) {
        let Self {
            config,
            parts,
            runtime,
            loader,
            guard,
            client,
            directory,
            directory_task,
            hearing,
            listed,
            surroundings,
            changes,
            catalog_read,
            adopted,
            end: _end,
            ..
        } = self;
        let WorkerParts { transport, key, epoch, clock, artifacts, metrics, membership, adoption, version, .. } = parts;
        if !config.engine_sandbox {
            warn!("engine_sandbox is off: a malicious model file can read what this program can read");
        }
        for model in config.models.iter().filter(|model| model.has_open_server()) {
            warn!(model = %model.key(), "server_sandbox is off: a malicious model file can read what this program can read");
        }
        let hardware = runtime.hardware().await;
        device_report::log_devices(&hardware);
        loader.set_hardware(&hardware);
        let capabilities = Capabilities::of(&hardware.devices);
        // Also cancelled when this future is dropped, so that no task outlives its owner.
        let life = CancellationToken::new();
        let _end_of_life = life.clone().drop_guard();
        let bounds = config.clone();
        let standing = Arc::new(Standing::new(life.clone()));
        let handlers = Arc::new(Handlers {
            bound_keep_alive: Box::new(move |secs| bounds.bounded_keep_alive(secs)),
            standing: standing.clone(),
            guard: guard.clone(),
            loader: loader.clone(),
            engine: ExecutionEngine::new(runtime, loader.clone()),
            job_ended: Notify::new(),
            reading: TaskTracker::new(),
        });
        let tasks = TaskTracker::new();

        let identity = Identity {
            key,
            region: config.region.clone(),
            capabilities,
            latency_hops: config.latency_hops,
            limits: guard.limits(),
            epoch,
        };
        let looked_at = handlers.clone();
        let look: Look = Box::new(move || looked_at.condition());
        let reports = Arc::new(ReportWriter::new(identity, clock, look, loader.clone()));

        let info = NodeInfo { roles: vec![NodeRole::Worker], region: config.region.clone(), version };
        let service = Arc::new(Service {
            worker_id: transport.public_key(),
            region: config.region.clone(),
            handlers: handlers.clone(),
            reports: reports.clone(),
            hearing: hearing.clone(),
            artifacts: ArtifactServer::new(artifacts, membership.clone()),
            listed: listed.clone(),
        });
        let (known, own) = (membership.clone(), membership.clone());
        let server =
            service.serve(Server::new(transport.clone(), info)).membership(membership).body_limit(move |key| {
                if known.has_role(key, NodeRole::Orchestrator) { MESSAGE_BYTES_MAX } else { STRANGER_BYTES_MAX }
            });
        let server_stop = life.child_token();
        tasks.spawn(server.run(server_stop.clone(), LAST_WORD * 2));

        let keepers_stop = life.child_token();
        tasks.spawn(loader.clone().run(keepers_stop.clone()));
        if config.catalog != CatalogUse::Off {
            let (client, directory) = (client.clone(), directory.clone());
            let watch = CatalogWatch::new(client, directory, own, loader.clone(), config.catalog, listed, catalog_read);
            tasks.spawn(watch.run(keepers_stop.clone()));
        }
        if let Some(adoption) = adoption {
            let watch = AdoptionWatch::new(adoption, client.clone(), directory.clone(), loader.clone(), adopted);
            tasks.spawn(watch.run(keepers_stop.clone()));
        }
        let activity_stop = life.child_token();
        if config.activity.has_rules() {
            let watch = ActivityWatch {
                rules: config.activity.clone(),
                surroundings,
                standing: standing.clone(),
                guard: guard.clone(),
                loader: loader.clone(),
                changes: changes.clone(),
            };
            tasks.spawn(watch.run(activity_stop.clone()));
        }
        let meter_stop = life.child_token();
        tasks.spawn(meter(handlers.clone(), EngineMeter::new(metrics), meter_stop.clone()));

        let reporter_stop = life.child_token();
        tasks.spawn(directory_task.run(reporter_stop.clone()));
        tasks.spawn(MembershipTask::new(client.clone(), directory.clone()).run(server_stop.clone()));
        tasks.spawn(client.clone().watch_for_pauses(server_stop.clone()));
        let reporter = HealthReporter::new(reports, client, directory, hearing, changes.subscribe());
        let reporter = tasks.spawn(reporter.run(reporter_stop.clone()));
        let (wanting, region) = (handlers.clone(), config.region.clone());
        let announcer = Announcer::new(transport, move || wanting.wanted_topics(&region), changes.subscribe());
        let announcer = tasks.spawn(announcer.run(reporter_stop.clone()));

        stop.cancelled().await;
        info!(jobs = guard.count(), "the worker is stopping");
        activity_stop.cancel();
        standing.stop();
        changes.send_replace(());
        if time::timeout(config.drain(), guard.empty()).await.is_err() {
            standing.hand_over();
            let _ = time::timeout(LAST_WORD, guard.empty()).await;
        }
        reporter_stop.cancel();
        // The server stays up until the orchestrators know of the end: they would take silence for a failure.
        let _ = reporter.await;
        let _ = announcer.await;
        server_stop.cancel();
        meter_stop.cancel();
        keepers_stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}

impl fmt::Debug for BaseWorker {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("BaseWorker").field("config", &self.config).finish_non_exhaustive()
    }
}

impl WorkerHandle {
    pub fn worker_id(&self) -> WorkerId {
        self.worker_id
    }

    /// Returns why no orchestrator accepts the worker's reports, or `None` while that is no problem.
    pub fn unheard(&self) -> Option<String> {
        self.hearing.unheard()
    }

    /// Returns the process ids of its engines.
    pub fn engine_pids(&self) -> Vec<u32> {
        self.loader.cache().ready().into_iter().filter_map(|(_, loaded)| loaded.pid).collect()
    }

    /// Waits until the models that operators added are served and an orchestrator knows of them. Gives up after a few
    /// seconds if no registry or no orchestrator responds.
    pub async fn has_catalog(&self) {
        let mut read = self.catalog_read.subscribe();
        let known = async {
            let read = read.wait_for(Option::is_some).await.ok().and_then(|read| *read);
            if let Some(read) = read {
                self.hearing.has_heard_of(read).await;
            }
        };
        let _ = time::timeout(CATALOG_WITHIN, known).await;
    }

    /// Returns the models that it serves: those in memory, and those that it loads on demand.
    pub fn served_models(&self) -> Vec<ModelKey> {
        let entries = self.loader.cache().entries();
        let served = entries.iter().filter(|entry| !matches!(*entry.status.borrow(), Status::Failed(_)));
        served.map(|entry| entry.key.clone()).collect()
    }

    /// Returns the models that are ready.
    pub fn ready_models(&self) -> Vec<ModelKey> {
        self.loader.cache().ready().into_iter().map(|(key, _)| key).collect()
    }

    /// Returns how many servers' models the last poll found.
    pub fn adopted_count(&self) -> usize {
        self.adopted.borrow().unwrap_or(0)
    }

    /// Waits until every model that is to be in memory is ready, is left out for lack of memory, or has failed. Returns
    /// the first failure.
    pub async fn ready(&self) -> Result<(), NotReady> {
        let all = async {
            let mut outcome = Ok(());
            // Servers are polled once, whether or not one responds.
            let _ = self.adopted.subscribe().wait_for(Option::is_some).await;
            for entry in self.loader.cache().entries().iter() {
                if self.loader.preloads(entry) {
                    outcome = outcome.and(settled(entry).await);
                }
            }
            outcome
        };
        self.stopped.run_until_cancelled(all).await.unwrap_or(Err(NotReady::Stopped))
    }
}

async fn settled(entry: &Entry) -> Result<(), NotReady> {
    let mut status = entry.status.subscribe();
    let has_settled = |status: &Status| match status {
        Status::Ready(_) | Status::Failed(_) => true,
        Status::Absent => entry.has_stayed_out(),
        Status::Loading(_) => false,
    };
    let settled = status.wait_for(has_settled).await;
    match settled.as_deref() {
        Ok(Status::Failed(reason)) => Err(NotReady::LoadFailed { model: entry.key.clone(), reason: reason.clone() }),
        Ok(_) => Ok(()),
        Err(_) => Err(NotReady::Stopped),
    }
}

/// Records the engines' metrics until `stop`.
async fn meter(handlers: Arc<Handlers>, mut meter: EngineMeter, stop: CancellationToken) {
    let counting = async {
        loop {
            meter.add(&handlers.loader.observe());
            // A job's work is counted when the job ends, and work that a cancellation stopped, soon after.
            let _ = time::timeout(METER_EVERY, handlers.job_ended.notified()).await;
        }
    };
    stop.run_until_cancelled(counting).await;
    meter.add(&handlers.loader.observe());
    meter.clear();
}

/// Handlers of the worker's RPC methods.
struct Handlers {
    standing: Arc<Standing>,
    guard: Arc<QuotaGuard>,
    /// Clamps a request's `keep_alive` to the worker's bounds.
    bound_keep_alive: Box<dyn Fn(i64) -> i64 + Send + Sync>,
    loader: Arc<ModelLoader>,
    engine: ExecutionEngine,
    job_ended: Notify,
    /// Requests that are being parsed on blocking threads.
    reading: TaskTracker,
}

/// Observes the worker for its reports.
type Look = Box<dyn Fn() -> Condition + Send + Sync>;

/// The methods that a worker serves.
struct Service {
    worker_id: WorkerId,
    region: Region,
    handlers: Arc<Handlers>,
    reports: Arc<ReportWriter<Look>>,
    hearing: Arc<Hearing>,
    artifacts: ArtifactServer,
    listed: Listed,
}

impl Service {
    fn serve(self: Arc<Self>, server: Server) -> Server {
        let orchestrator = Access::RoleIn(NodeRole::Orchestrator, self.region.clone());
        server
            .with_state(self)
            .stream(START, orchestrator.clone(), Self::start_job)
            .unary(PRESENCE_DESCRIBE, orchestrator.clone(), Self::describe)
            .unary(MODEL_MOVE, orchestrator, Self::move_model)
            .stream(FETCH, Access::Role(NodeRole::Worker), Self::give_artifact)
            .into_server()
    }

    async fn start_job(self: Arc<Self>, call: StreamCall) {
        self.handlers.clone().take(call).await;
    }

    async fn give_artifact(self: Arc<Self>, call: StreamCall) {
        // The connection may be what the worker spares.
        if self.handlers.standing.activity() == Activity::Paused {
            return refuse(call, self.handlers.standing.refusal()).await;
        }
        self.artifacts.serve(call, async |digest| Ok(self.listed.names_of(&digest))).await;
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn describe(self: Arc<Self>, _: server::Caller, _: Empty) -> Result<Signed, WireError> {
        // The orchestrator that asks receives the report with the response.
        let (now, signed) = (Instant::now(), self.reports.sign());
        self.hearing.heard(now);
        Ok(signed)
    }

    #[expect(clippy::unused_async, reason = "handlers are async")]
    async fn move_model(self: Arc<Self>, _: server::Caller, request: ModelMove) -> Result<ModelResidency, WireError> {
        self.handlers.move_model(self.worker_id, &request)
    }
}

/// A caller that has been accepted, or may still be refused.
enum Caller {
    Waiting(StreamCall),
    Accepted(ResponseSink),
}

impl Caller {
    async fn accept(self) -> Result<ResponseSink, Interrupted> {
        match self {
            Self::Waiting(call) => call.accept().await,
            Self::Accepted(reply) => Ok(reply),
        }
    }

    /// Refuses or fails the call.
    async fn refuse(self, error: WireError) {
        match self {
            Self::Waiting(call) => refuse(call, error).await,
            Self::Accepted(reply) => {
                debug!(%error, "a job was refused");
                fail(reply, error).await;
            }
        }
    }
}

struct Job {
    request: Arc<InferRequest>,
    entry: Arc<Entry>,
    deadline: Option<Instant>,
    permit: QuotaPermit,
}

impl Handlers {
    /// Admits or refuses a job, and responds to the call.
    async fn take(self: Arc<Self>, call: StreamCall) {
        if let Err(error) = self.check_in() {
            return refuse(call, error).await;
        }
        let (body, deadline) = (call.body.clone(), call.deadline);
        let (caller, request) = if body.len() > READ_AT_ONCE_BYTES {
            // Accepting early only means that the request has arrived and may be admitted. Without it, the time to
            // parse a long request would look like a worker that does not respond.
            let Ok(reply) = call.accept().await else { return };
            let read = self.reading.spawn_blocking(move || read(&body)).await;
            (Caller::Accepted(reply), read.unwrap_or_else(|_| Err(self.standing.refusal())))
        } else {
            (Caller::Waiting(call), read(&body))
        };
        let job = match request.and_then(|request| self.admit(request, deadline)) {
            Ok(job) => job,
            Err(error) => return caller.refuse(error).await,
        };
        let request = job.request.clone();
        let outcome = self.run(caller, job).await;
        self.job_ended.notify_one();
        debug!(
            correlation_id = %request.correlation_id,
            trace_id = %request.trace_id,
            attempt = request.attempt,
            ?outcome,
            "the job ended"
        );
    }

    /// Returns an error if a job is to be refused without parsing it.
    fn check_in(&self) -> Result<(), WireError> {
        self.standing.check()?;
        Ok(self.guard.check_room()?)
    }

    /// Admits a job, or returns the reason for refusing it, before any work is done.
    fn admit(&self, request: InferRequest, call_deadline: Option<Instant>) -> Result<Job, WireError> {
        let key = ModelKey { model_id: request.model_id.clone(), version: request.version };
        let entry = self.loader.cache().find(&key).ok_or_else(|| not_here(&key))?;
        let listed = request.digests.iter().find(|listed| listed.key == key);
        if listed.is_some_and(|listed| listed.digest != entry.model.digest()) {
            return Err(not_here(&key));
        }
        let adapter = request.input.adapter.as_ref();
        if !entry.model.serves(adapter) {
            let name =
                adapter.map_or_else(|| format!("{key} without its adapter"), |adapter| format!("{key}:{adapter}"));
            let message = format!("this worker does not serve {name}, try another");
            return Err(WireError::new(ErrorCode::ModelNotHere, message));
        }
        let now = Instant::now();
        let relative = request.deadline_ms.and_then(|wait| now.checked_add(Duration::from_millis(wait)));
        let deadline = call_deadline.into_iter().chain(relative).min();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(too_late());
        }
        let demand = Demand::of(&request.input, entry.model.context_length);
        let permit = self.guard.enter(&request.tenant_id, demand)?;
        if let Some(secs) = request.input.keep_alive_secs {
            entry.keep_for((self.bound_keep_alive)(secs));
        }
        Ok(Job { request: Arc::new(request), entry, deadline, permit })
    }

    async fn run(&self, caller: Caller, job: Job) -> Result<(), Broken> {
        let Job { request, entry, deadline, permit } = job;
        let handed_over = self.standing.handed_over();
        failpoint!("worker-taken");
        let mut beginning = Box::pin(self.engine.begin(entry, request.clone()));
        let begun = match time::timeout(BEGIN_BEFORE_ACCEPT, &mut beginning).await {
            Ok(Ok(generation)) => Some(generation),
            Ok(Err(error)) => {
                drop(permit);
                caller.refuse(error.clone()).await;
                return Err(Broken::Failed(error));
            }
            // The model is being loaded, or the engine is busy.
            Err(_) => None,
        };
        let mut reply = caller.accept().await?;
        failpoint!("worker-accepted");
        let has_begun = CancellationToken::new();
        let answered = {
            let (reply, has_begun) = (&mut reply, &has_begun);
            let answering = async move {
                let generation = match begun {
                    Some(generation) => generation,
                    None => wait(beginning, &request, reply).await?,
                };
                self.engine.answer(generation, &request, reply, has_begun).await
            };
            tokio::select! {
                biased;
                () = handed_over.cancelled() => Err(Broken::Failed(self.standing.refusal())),
                () = passed(deadline, has_begun) => Err(Broken::Failed(too_late())),
                answered = answering => answered,
            }
        };
        // The permit is dropped before the caller learns of the end, so that it may send the next job at once.
        drop(permit);
        match answered {
            Ok(last) => {
                failpoint!("worker-finishes");
                finish(reply, &last).await
            }
            Err(broken) => {
                if let Broken::Failed(error) = &broken {
                    fail(reply, error.clone()).await;
                }
                Err(broken)
            }
        }
    }

    /// Loads or unloads a model, and returns its state.
    fn move_model(&self, worker_id: WorkerId, request: &ModelMove) -> Result<ModelResidency, WireError> {
        let ModelMove { key, load, keep_alive_secs } = request;
        let entry = self.loader.cache().find(key).ok_or_else(|| not_here(key))?;
        if *load && self.standing.activity() == Activity::Paused {
            let reason = Some("the worker is paused, because of how its machine is used".to_owned());
            let workers = vec![WorkerResidency { worker_id, state: ResidencyState::Unloaded, reason }];
            return Ok(ModelResidency { key: key.clone(), workers });
        }
        let (state, reason) = if *load { self.loader.bring(&entry, *keep_alive_secs) } else { entry.send_out() };
        info!(model = %key, load, ?state, "an operator moved the model");
        Ok(ModelResidency { key: key.clone(), workers: vec![WorkerResidency { worker_id, state, reason }] })
    }

    fn condition(&self) -> Condition {
        let snapshots = self.loader.observe().snapshots;
        let (draining, activity) = (self.standing.is_stopping(), self.standing.activity());
        Condition { jobs: self.guard.count(), draining, activity, snapshots }
    }

    /// Returns the topics to announce: none while no job is taken.
    fn wanted_topics(&self, region: &Region) -> BTreeSet<Topic> {
        if !self.standing.takes_jobs() {
            return BTreeSet::new();
        }
        topics(region, self.loader.cache().ready().into_iter().map(|(key, _)| key))
    }
}

/// Parses a job and checks what its types cannot express.
fn read(body: &[u8]) -> Result<InferRequest, WireError> {
    let request: InferRequest = codec::decode(body)?;
    request.input.check()?;
    Ok(request)
}

/// Waits until a job has begun, and sends its caller progress meanwhile.
async fn wait(
    mut beginning: impl Future<Output = Result<Begun, WireError>> + Unpin,
    request: &InferRequest,
    reply: &mut ResponseSink,
) -> Result<Begun, Broken> {
    let mut pulse = pulse();
    loop {
        tokio::select! {
            biased;
            () = reply.cancelled() => return Err(Broken::Interrupted),
            begun = &mut beginning => return Ok(begun?),
            _ = pulse.tick(), if request.progress => {}
        }
        send_progress(&empty_chunk(request), Progress::default(), reply).await?;
    }
}

/// Waits until the deadline of an answer that has not begun.
async fn passed(deadline: Option<Instant>, has_begun: &CancellationToken) {
    if let Some(deadline) = deadline
        && has_begun.run_until_cancelled(time::sleep_until(deadline)).await.is_some()
    {
        return;
    }
    std::future::pending::<()>().await;
}

async fn refuse(call: StreamCall, error: WireError) {
    debug!(peer = call.peer.short(), %error, "a job was refused");
    // A caller that does not listen needs no response.
    let _ = time::timeout(LAST_WORD, call.refuse(error)).await;
}

async fn fail(reply: ResponseSink, error: WireError) {
    let _ = time::timeout(LAST_WORD, reply.fail(error)).await;
}

fn not_here(key: &ModelKey) -> WireError {
    WireError::new(ErrorCode::ModelNotHere, format!("this worker does not serve {key}, try another"))
}

fn too_late() -> WireError {
    WireError::new(ErrorCode::DeadlineExceeded, "the deadline passed")
}
