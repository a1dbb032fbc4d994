//! The gateway's core: admits requests from HTTP and RPC and submits their jobs to orchestrators.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use failpoints::failpoint;
use observability::{Exposition, TraceContext};
use parking_lot::Mutex;
use protocol::control::{
    CATALOG_LIST, Catalog, Decision, Empty, ExplainRequest, FLEET_LIST, Fleet, JOB_EXPLAIN, MODEL_MOVE, ModelMove,
    ModelResidency, NodeRole, Scope, TOKEN_CHECK, TokenCheck, TokenGrant,
};
use protocol::infer::{InferRequest, Input, ModelDigest};
use protocol::kept::{KEPT_CANCEL, KEPT_REMOVE, KEPT_SHOW, KeptAnswer, KeptRef, KeptRemoved};
use protocol::model::{ALTERNATIVES_MAX, ModelEntry, ModelKey, ModelRef};
use protocol::policy::ServiceClass;
use protocol::quota::QuotaRule;
use protocol::{AdapterName, Clock, CorrelationId, Digest, ErrorCode, PublicKey, RetryToken, TenantId, WireError};
use rpc::rate_limit::{Quota, RateLimit, Verdict};
use rpc::{Membership, Transport};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{self, Answer, Begun, ChunkHead, Expected, KeptWhole};
use crate::authentication::Authentication;
use crate::builds::{self, Build};
use crate::cached::Cached;
use crate::catalog::{self, Models};
use crate::class;
use crate::config::{Config, seconds};
use crate::folder_proof::FolderSecret;
use crate::job::Job;
use crate::json_body::invalid;
use crate::metrics::{Metrics, SourceLabel};
use crate::prompt_size;
use crate::repeats::{Repeat, SDK_LINGER, SdkRequests};
use crate::request_context::{AdmittedRequest, Origin, Refusal, RequestContext};
use crate::request_record::RequestRecord;
use crate::upstream::{self, Timeouts, Upstream, UpstreamTask};

/// How long the list of live workers is cached.
const FLEET_BELIEVED: Duration = Duration::from_secs(1);
/// Maximum age of that list while no orchestrator responds.
const FLEET_AGE_MAX: Duration = Duration::from_secs(5);
/// A model that is missing from the cached catalogue may be new. It is looked up again in a catalogue younger than
/// this.
const CATALOG_YOUNG: Duration = Duration::from_secs(1);
/// `Retry-After` of a request that arrives while no registry has responded for too long.
const AWAY_WAIT: Duration = Duration::from_secs(5);
/// `Retry-After` of a request that arrives while the gateway is full.
const FULL_WAIT: Duration = Duration::from_secs(1);

/// What a gateway needs besides its configuration.
#[derive(Clone)]
pub struct GatewayParts {
    /// This node's network transport.
    pub transport: Arc<dyn Transport>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// The metrics that it updates.
    pub metrics: Metrics,
    /// The metrics that it serves under `/metrics`: those of its whole process.
    pub exposition: Exposition,
    /// Which orchestrators and registries it trusts.
    pub membership: Membership,
    /// The program's version, shown under `/version`.
    pub version: String,
    /// The secret of its data folder, if it has one.
    pub folder_secret: Option<FolderSecret>,
    /// The file with this machine's own API key, if it has a data folder.
    pub api_key_file: Option<PathBuf>,
}

/// Receives requests, checks them and submits them to orchestrators. Clones share one gateway.
#[derive(Clone)]
pub struct Gateway {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    exposition: Exposition,
    version: String,
    folder_secret: Option<FolderSecret>,
    api_key_file: Option<PathBuf>,
    transport: Arc<dyn Transport>,
    upstream: Upstream,
    /// Keeps `upstream` up to date; taken by [`Gateway::tend`].
    upstream_task: Mutex<Option<UpstreamTask>>,
    authentication: Authentication,
    rate_limit: RateLimit<TenantId>,
    sdk_requests: SdkRequests,
    /// Notified when a batch was created here, so that its work begins at once.
    batch_created: Notify,
    /// Lines of batches that may run at the same time.
    batch_lines: Arc<Semaphore>,
    models: Cached<Models>,
    fleet: Cached<Fleet>,
    jobs: Arc<Semaphore>,
    tracker: TaskTracker,
    /// Cancelled when the drain time is over: streams that still run are ended with an error.
    cut: CancellationToken,
    /// Notified when the TLS files are to be reloaded.
    reload: Notify,
}

impl Gateway {
    /// Creates a gateway. It does nothing until it runs.
    pub fn new(config: Config, parts: GatewayParts) -> Self {
        let (membership, silence) = (parts.membership.clone(), parts.metrics.registry_silence.clone());
        parts.exposition.refresh(move || {
            silence.set(membership.registry_silence().as_secs_f64());
        });
        let (upstream, upstream_task) = Upstream::new(parts.transport.clone(), config.region.clone(), parts.membership);
        let inner = Inner {
            clock: parts.clock,
            metrics: parts.metrics,
            exposition: parts.exposition,
            version: parts.version,
            folder_secret: parts.folder_secret,
            api_key_file: parts.api_key_file,
            transport: parts.transport,
            upstream,
            upstream_task: Mutex::new(Some(upstream_task)),
            authentication: Authentication::new(config.token_cache(), config.registry_absence),
            rate_limit: RateLimit::new(),
            sdk_requests: SdkRequests::default(),
            batch_created: Notify::new(),
            batch_lines: Arc::new(Semaphore::new(config.batch_lines_max.clamp(1, Semaphore::MAX_PERMITS))),
            models: Cached::new(seconds(config.catalog_cache_secs)),
            fleet: Cached::new(FLEET_BELIEVED),
            jobs: Arc::new(Semaphore::new(config.jobs_max.min(Semaphore::MAX_PERMITS))),
            tracker: TaskTracker::new(),
            cut: CancellationToken::new(),
            reload: Notify::new(),
            config,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Checks the TLS files at once, for example after a certificate was renewed.
    pub fn reload(&self) {
        self.inner.reload.notify_one();
    }

    pub(crate) async fn reload_wanted(&self) {
        self.inner.reload.notified().await;
    }

    /// Admits a request, or refuses it because of its token, the rate limit or missing capacity.
    pub async fn admit(&self, token: Option<&str>, context: RequestContext) -> Result<AdmittedRequest, WireError> {
        self.admit_or_refuse(token, context).await.map_err(|refusal| refusal.error)
    }

    pub(crate) async fn admit_or_refuse(
        &self,
        token: Option<&str>,
        context: RequestContext,
    ) -> Result<AdmittedRequest, Refusal> {
        let mut record = self.record(context);
        let outcome = self.check_in(token, context.origin, &mut record).await;
        match outcome {
            Ok((grant, rate, permit)) => {
                let (repeat, class, keeper) = (Repeat::default(), None, None);
                Ok(AdmittedRequest { grant, rate, permit, record, repeat, class, keeper })
            }
            Err(refusal) => {
                record.failed(refusal.error.code);
                Err(refusal)
            }
        }
    }

    /// Records a request that failed before its token could be read.
    pub(crate) fn turn_down(&self, context: RequestContext, error: &WireError) {
        self.record(context).failed(error.code);
    }

    fn record(&self, context: RequestContext) -> RequestRecord {
        let RequestContext { correlation_id, trace_id, received, origin: _ } = context;
        RequestRecord::new(self.inner.metrics.clone(), received, correlation_id, trace_id)
    }

    /// Admits a line of a batch, once there is room. Its job goes to the orchestrator that has the batch. The bucket of
    /// its tenant's requests has no part in it: a batch sends no more than this gateway takes from it, and the
    /// orchestrator applies the tenant's policy.
    pub(crate) async fn admit_line(
        &self,
        grant: Arc<TokenGrant>,
        keeper: PublicKey,
    ) -> Result<AdmittedRequest, WireError> {
        let context = self.context(None, None)?;
        let permit = self.inner.jobs.clone().acquire_owned().await.map_err(|_| upstream::stopping())?;
        let mut record = self.record(context);
        record.of_key(&grant.key_id);
        let (class, repeat) = (Some(ServiceClass::Batch), Repeat::default());
        Ok(AdmittedRequest { grant, rate: Verdict::UNLIMITED, permit, record, repeat, class, keeper: Some(keeper) })
    }

    async fn check_in(
        &self,
        token: Option<&str>,
        origin: Option<Origin>,
        record: &mut RequestRecord,
    ) -> Result<(Arc<TokenGrant>, Verdict, OwnedSemaphorePermit), Refusal> {
        let unrated = |error| Refusal { error, rate: None };
        let grant = self.authenticate(token, origin, Scope::Infer).await.map_err(unrated)?;
        record.of_key(&grant.key_id);
        let quota = quota(&self.inner.config, &grant);
        let rate = self.inner.rate_limit.take(grant.tenant_id.clone(), quota);
        if !rate.allowed {
            let error = if rate.limit == 0 {
                let message = "the tenant's policy allows no requests per minute";
                WireError::new(ErrorCode::InsufficientQuota, message)
            } else {
                let message = format!("more than {} requests a minute, wait before the next", rate.limit);
                WireError::new(ErrorCode::RateLimitExceeded, message).with_retry_after(rate.retry_after)
            };
            let error = error.with_param(QuotaRule::RequestsPerMinute.as_str());
            return Err(Refusal { error, rate: Some(rate) });
        }
        let permit = self.inner.jobs.clone().try_acquire_owned().map_err(|_| Refusal {
            error: WireError::new(ErrorCode::Unavailable, "this gateway is full, try again")
                .with_retry_after(FULL_WAIT),
            rate: Some(rate),
        })?;
        Ok((grant, rate, permit))
    }

    /// Returns what a token allows, or an error if that does not include `scope`.
    pub(crate) async fn authenticate(
        &self,
        token: Option<&str>,
        origin: Option<Origin>,
        scope: Scope,
    ) -> Result<Arc<TokenGrant>, WireError> {
        let inner = &self.inner;
        self.check_registry()?;
        let ask = async {
            let check = TokenCheck { token: token.unwrap_or_default().to_owned() };
            inner.upstream.ask(NodeRole::Registry, TOKEN_CHECK, &check).await
        };
        let grant =
            inner.authentication.check(token, origin, inner.clock.now(), self.membership().is_registry_away(), ask);
        let grant = grant.await.map_err(WireError::for_clients)?;
        if !grant.scopes.contains(&scope) {
            let message = match scope {
                Scope::Infer => "this API key may not run models",
                Scope::Admin => "this API key may not operate the network",
            };
            return Err(WireError::new(ErrorCode::InsufficientScope, message));
        }
        Ok(grant)
    }

    /// Fails once no registry has responded for too long, because nodes may have been revoked in the meantime.
    pub(crate) fn check_registry(&self) -> Result<(), WireError> {
        let absence_max = self.inner.config.registry_absence;
        if self.membership().registry_silence() < absence_max {
            return Ok(());
        }
        let message = format!(
            "no registry has answered for {} s, and this gateway goes no further without one",
            absence_max.as_secs()
        );
        Err(WireError::new(ErrorCode::Unavailable, message).with_retry_after(AWAY_WAIT))
    }

    /// Fails if no registry has answered since this gateway started. It then knows no API key and no model.
    pub(crate) async fn check_first_contact(&self) -> Result<(), WireError> {
        if self.inner.models.last().is_some() || self.models().await.is_ok() {
            return Ok(());
        }
        let message = "no registry has answered since this gateway was started, so it knows no API key and no model; \
                       start the registry, or check the connection to it";
        Err(WireError::new(ErrorCode::Unavailable, message).with_retry_after(AWAY_WAIT))
    }

    /// Finds out whether a job may be asked for again, and gives it the id and token of the job that it repeats. Called
    /// again, it changes nothing.
    pub(crate) fn identify(&self, admitted: &AdmittedRequest, job: Job, is_streamed: bool) -> Result<Job, WireError> {
        let (repeat, tenant_id) = (&admitted.repeat, &admitted.grant.tenant_id);
        let job = Job { class: class::agreed(admitted.class, job.class)?, ..job };
        if job.linger.is_some() {
            return Ok(job);
        }
        let token = match (&repeat.key, job.retry_token.clone()) {
            (Some(_), Some(_)) => return Err(invalid("retryToken", "and Idempotency-Key say the same; give only one")),
            (key, token) => key.clone().or(token),
        };
        if let Some(token) = token {
            return Ok(job.repeatable(tenant_id, token, seconds(self.inner.config.reconnect_secs), true));
        }
        let is_stored = job.note.is_some();
        // SDKs do not repeat a request whose stream has begun.
        match repeat.sdk.as_ref().filter(|_| !is_streamed) {
            Some(call) => {
                let token = self.inner.sdk_requests.token(tenant_id, job.content(), call, self.make_token()?);
                Ok(job.repeatable(tenant_id, token, SDK_LINGER, is_stored))
            }
            // Nobody can ask for it again before its end.
            None if is_stored => Ok(job.repeatable(tenant_id, self.make_token()?, Duration::ZERO, true)),
            None => Ok(job),
        }
    }

    /// Submits a job that runs without its client. Returns once an orchestrator has recorded it.
    pub(crate) async fn submit_detached(&self, admitted: AdmittedRequest, job: Job) -> Result<(), WireError> {
        let AdmittedRequest { grant, permit: _permit, mut record, rate: _, class: _, repeat, keeper: _ } = admitted;
        let accepted = async {
            let builds = self.check_job(&grant, &job, &mut record).await?;
            let timeouts = self.timeouts(&record, &job);
            let mut request = self.request(&grant, &builds, job, timeouts, &record)?;
            request.digests.extend(self.cheaper_models(&grant, &builds).await?);
            let accepted = Box::pin(self.inner.upstream.submit_detached(&request, timeouts)).await;
            accepted.map_err(|error| repeat.name_key(error.for_clients()))
        };
        let accepted = self.cut().run_until_cancelled(accepted).await.unwrap_or_else(|| Err(upstream::stopping()));
        match &accepted {
            Ok(()) => record.accepted(),
            Err(error) => record.failed(error.code),
        }
        accepted
    }

    /// Returns a kept answer of a tenant, without the answer itself, and the orchestrator that has it.
    pub(crate) async fn kept(&self, kept: &KeptRef) -> Result<(PublicKey, KeptAnswer), WireError> {
        self.ask_keeper(KEPT_SHOW, kept).await
    }

    /// Cancels the job of a kept answer.
    pub(crate) async fn cancel_kept(&self, kept: &KeptRef) -> Result<(PublicKey, KeptAnswer), WireError> {
        self.ask_keeper(KEPT_CANCEL, kept).await
    }

    async fn ask_keeper(&self, method: &str, kept: &KeptRef) -> Result<(PublicKey, KeptAnswer), WireError> {
        let asked = self.inner.upstream.ask_which(NodeRole::Orchestrator, method, kept).await;
        asked.map_err(WireError::for_clients)
    }

    /// Deletes a kept answer. Returns whether an orchestrator had it.
    pub(crate) async fn remove_kept(&self, kept: &KeptRef) -> Result<bool, WireError> {
        let asked = self.inner.upstream.ask_each(NodeRole::Orchestrator, KEPT_REMOVE, |_| Some(kept.clone())).await?;
        let mut found = false;
        for (_, reply) in asked {
            let reply: KeptRemoved = reply.map_err(WireError::for_clients)?;
            found |= reply.found;
        }
        Ok(found)
    }

    /// Collects a kept answer whose job has ended.
    pub(crate) async fn read_kept(&self, keeper: PublicKey, kept: &KeptRef) -> Result<KeptWhole, WireError> {
        let begun = self.inner.upstream.read_kept(keeper, kept, self.stall()).await.map_err(WireError::for_clients)?;
        let collected = answer::collect_kept(begun, kept.correlation_id);
        self.cut().run_until_cancelled(collected).await.unwrap_or_else(|| Err(upstream::stopping()))
    }

    /// Streams a kept answer from its beginning, also while its job runs.
    pub(crate) async fn follow_kept(
        &self,
        admitted: AdmittedRequest,
        keeper: PublicKey,
        kept: KeptRef,
    ) -> Result<Answer, WireError> {
        let AdmittedRequest { permit, mut record, .. } = admitted;
        record.correlation_id = kept.correlation_id;
        record.replays();
        let begun = self.inner.upstream.read_kept(keeper, &kept, self.stall()).await.map_err(WireError::for_clients)?;
        let entry = self.kept_entry(&begun).await?;
        let (tracker, cut) = (self.inner.tracker.clone(), self.cut().clone());
        Answer::begin(begun, vec![entry], Expected::default(), record, tracker, cut, permit)
    }

    /// Returns the model of a kept answer. It may be in the catalogue no longer.
    async fn kept_entry(&self, begun: &Begun) -> Result<Arc<ModelEntry>, WireError> {
        let named = begun.first.as_deref().and_then(|first| ChunkHead::read(first).model);
        let key = named.ok_or_else(|| answer::broken("a kept answer names no model"))?;
        if let Some(entry) = self.models().await?.find(&key.model_id, Some(key.version)) {
            return Ok(entry.clone());
        }
        Ok(Arc::new(ModelEntry {
            digest: Digest::of(key.to_string().as_bytes()),
            key,
            bytes: 0,
            context_length: 0,
            description: String::new(),
            created_at: self.inner.clock.now(),
            facts: None,
            added: false,
            pin: false,
            keep_alive_secs: None,
        }))
    }

    fn stall(&self) -> Duration {
        seconds(self.inner.config.stall_timeout_secs)
    }

    fn make_token(&self) -> Result<RetryToken, WireError> {
        self.make_id()?.to_string().parse().map_err(|_| no_randomness())
    }

    /// Submits a job to an orchestrator and returns its answer once the first piece has arrived.
    pub async fn submit(&self, admitted: AdmittedRequest, job: Job) -> Result<Answer, WireError> {
        let job = match self.identify(&admitted, job, true) {
            Ok(job) => job,
            Err(error) => return Err(admitted.refuse(error).error),
        };
        let AdmittedRequest { grant, permit, mut record, rate: _, class: _, repeat, keeper } = admitted;
        let opened = async {
            let builds = self.check_job(&grant, &job, &mut record).await?;
            // A stored answer is kept as well, but only its client's own token says that it may be repeated.
            let has_key = repeat.key.is_some() || (job.keeps_answer && job.note.is_none());
            let source = if has_key { "key" } else { "sdk_retry" };
            let timeouts = self.timeouts(&record, &job);
            let expected = Expected::of(&job.input);
            let mut request = self.request(&grant, &builds, job, timeouts, &record)?;
            let others = self.cheaper_models(&grant, &builds).await?;
            request.digests.extend(others);
            failpoint!("gateway-submits");
            let begun = Box::pin(self.begin(request, timeouts, has_key, keeper)).await;
            failpoint!("gateway-begun");
            let begun = begun.map_err(|error| repeat.name_key(error.for_clients()))?;
            if begun.is_repeat() {
                self.inner.metrics.idempotent_replays.get_or_create(&SourceLabel { source }).inc();
            }
            let mut entries: Vec<_> = builds.into_iter().map(|build| build.entry).collect();
            entries.extend(self.other_model(&begun, &entries).await?);
            Ok((begun, entries, expected))
        };
        let opened = self.cut().run_until_cancelled(opened).await;
        match opened.unwrap_or_else(|| Err(upstream::stopping())) {
            Ok((begun, entries, expected)) => {
                let (tracker, cut) = (self.inner.tracker.clone(), self.cut().clone());
                Answer::begin(begun, entries, expected, record, tracker, cut, permit)
            }
            Err(error) => {
                let error: WireError = error;
                record.failed(error.code);
                Err(error)
            }
        }
    }

    /// Submits a job. A token that this gateway chose for an SDK may be used up, or its job may be that of an
    /// orchestrator that died, whose answer nobody can read; its client knows nothing of either.
    async fn begin(
        &self,
        request: InferRequest,
        timeouts: Timeouts,
        has_key: bool,
        keeper: Option<PublicKey>,
    ) -> Result<Begun, WireError> {
        let is_own = request.linger_ms.is_some() && !has_key;
        let is_no_answer = |code| matches!(code, ErrorCode::IdempotencyKeyReused | ErrorCode::IdempotencyInProgress);
        match self.inner.upstream.submit(&request, timeouts, has_key, keeper).await {
            Err(error) if is_own && is_no_answer(error.code) => {
                let request = InferRequest { retry_token: self.make_token()?, ..request };
                self.inner.upstream.submit(&request, timeouts, has_key, keeper).await
            }
            begun => begun,
        }
    }

    /// Returns the model of an answer if it is not one that was asked for: that of a replayed answer if its name stands
    /// for another one by now, or that of a job that was made cheaper.
    async fn other_model(
        &self,
        begun: &Begun,
        entries: &[Arc<ModelEntry>],
    ) -> Result<Option<Arc<ModelEntry>>, WireError> {
        let is_replayed = begun.origin.is_some_and(|origin| origin.replayed);
        let replayed = begun.first.as_deref().filter(|_| is_replayed).and_then(|first| ChunkHead::read(first).model);
        let named = replayed.or_else(|| begun.degraded.as_ref()?.model.clone());
        let Some(named) = named.filter(|named| !entries.iter().any(|entry| entry.key == *named)) else {
            return Ok(None);
        };
        let models = self.models().await?;
        let entry = models.find(&named.model_id, Some(named.version)).cloned().ok_or_else(|| {
            if !is_replayed {
                let message = format!("the network's registry does not list {named}, which the tenant's policy names");
                return WireError::new(ErrorCode::NoCapacity, message);
            }
            let message = format!("the kept answer is of {named}, which is no longer there; use a new key");
            WireError::new(ErrorCode::IdempotencyKeyReused, message).with_param("Idempotency-Key")
        })?;
        Ok(Some(entry))
    }

    /// Checks what can be checked without an orchestrator. Returns the builds that may run the job, at least one.
    async fn check_job(
        &self,
        grant: &TokenGrant,
        job: &Job,
        record: &mut RequestRecord,
    ) -> Result<Vec<Build>, WireError> {
        record.correlation_id = job.correlation_id.unwrap_or(record.correlation_id);
        record.trace_id = job.trace_id.unwrap_or(record.trace_id);
        record.class = Some(job.class.unwrap_or_default());
        if job.tenant_id.as_ref().is_some_and(|tenant| *tenant != grant.tenant_id) {
            let message = "tenantId is not the tenant of this API key";
            return Err(WireError::new(ErrorCode::InsufficientScope, message).with_param("tenantId"));
        }
        job.input.check()?;
        let mut checked = Vec::new();
        for meant in self.meant(&job.model).await? {
            checked.push(self.check_build(grant, meant, &job.input, record).await);
        }
        let builds = builds::choose(checked)?;
        Ok(builds::those_that_suit(builds, &job.input))
    }

    /// Checks whether a model may run a job, as far as the gateway can know.
    async fn check_build(
        &self,
        grant: &TokenGrant,
        model: ModelRef,
        input: &Input,
        record: &mut RequestRecord,
    ) -> Result<Build, WireError> {
        let entry = self.model(&model).await?;
        record.of_model(&entry);
        if !grant.policy.allows(&model.name) {
            let message = format!("this API key may not use the model {}", model.name);
            return Err(WireError::new(ErrorCode::ModelNotAllowed, message).with_param("model"));
        }
        if let (Some(named), Some(given)) = (&model.adapter, &input.adapter)
            && named != given
        {
            let message = format!("adapter is {given}, and the model's name says {named}: give one of them");
            return Err(WireError::new(ErrorCode::InvalidValue, message).with_param("adapter"));
        }
        prompt_size::check(input, self.inner.config.messages_max, entry.context_length)?;
        let adapter = input.adapter.clone().or(model.adapter);
        if let Some(adapter) = &adapter {
            self.check_adapter(&entry.key, adapter).await?;
        }
        Ok(Build { entry, adapter })
    }

    /// Resolves a name, which may be an alias, to at least one model.
    pub(crate) async fn meant(&self, wanted: &ModelRef) -> Result<Vec<ModelRef>, WireError> {
        let mut models = self.models().await?;
        if !models.knows(&wanted.name) {
            models = self.inner.models.get_younger_than(CATALOG_YOUNG, self.fetch_models()).await?;
        }
        models.meant(wanted).ok_or_else(|| catalog::not_found(&wanted.to_string()))
    }

    /// Returns the catalogue's entry of a model.
    pub(crate) async fn model(&self, wanted: &ModelRef) -> Result<Arc<ModelEntry>, WireError> {
        let find = |models: &Models| models.find(&wanted.name, wanted.version).cloned();
        if let Some(entry) = find(&*self.models().await?) {
            return Ok(entry);
        }
        let young = self.inner.models.get_younger_than(CATALOG_YOUNG, self.fetch_models()).await?;
        find(&young).ok_or_else(|| catalog::not_found(&wanted.to_string()))
    }

    /// Checks that a model has an adapter.
    async fn check_adapter(&self, model: &ModelKey, adapter: &AdapterName) -> Result<(), WireError> {
        if self.models().await?.has_adapter(model, adapter) {
            return Ok(());
        }
        if self.inner.models.get_younger_than(CATALOG_YOUNG, self.fetch_models()).await?.has_adapter(model, adapter) {
            return Ok(());
        }
        Err(catalog::not_found(&format!("{model}:{adapter}")))
    }

    fn timeouts(&self, record: &RequestRecord, job: &Job) -> Timeouts {
        let config = &self.inner.config;
        let longest = seconds(config.request_deadline_secs);
        let wait = job.deadline.map_or(longest, |wait| wait.min(longest));
        Timeouts { deadline: record.started() + wait, stall: seconds(config.stall_timeout_secs) }
    }

    fn request(
        &self,
        grant: &TokenGrant,
        builds: &[Build],
        job: Job,
        timeouts: Timeouts,
        record: &RequestRecord,
    ) -> Result<InferRequest, WireError> {
        let left = timeouts.deadline.saturating_duration_since(Instant::now());
        let fingerprint = job.retry_token.as_ref().map(|_| job.content());
        let retry_token = job.retry_token.map_or_else(|| self.make_token(), Ok)?;
        let (first, others) = builds.split_first().ok_or_else(|| catalog::not_found(&job.model.to_string()))?;
        Ok(InferRequest {
            tenant_id: grant.tenant_id.clone(),
            model_id: first.entry.key.model_id.clone(),
            version: first.entry.key.version,
            alternatives: others.iter().map(|build| build.entry.key.clone()).collect(),
            digests: builds.iter().map(digest_of).collect(),
            input: Input { adapter: first.adapter.clone(), ..job.input },
            correlation_id: record.correlation_id,
            retry_token,
            fingerprint,
            class: job.class.unwrap_or_default(),
            trace_id: record.trace_id,
            attempt: 1,
            deadline_ms: Some(left.as_millis() as u64),
            progress: true,
            delivered: None,
            acknowledges: true,
            linger_ms: job.linger.map(|linger| linger.as_millis() as u64),
            keeps_answer: job.keeps_answer,
            note: job.note,
            detached: job.detached,
        })
    }

    /// Returns the newest listed version of each model to which the tenant's policy may move a job. An orchestrator
    /// moves it to no other file.
    async fn cheaper_models(&self, grant: &TokenGrant, own: &[Build]) -> Result<Vec<ModelDigest>, WireError> {
        let Some(degrade) = grant.policy.degrade.as_ref().filter(|degrade| !degrade.models.is_empty()) else {
            return Ok(vec![]);
        };
        let models = self.models().await?;
        let allowed = degrade.models.iter().filter(|name| grant.policy.allows(name)).take(ALTERNATIVES_MAX);
        let newest = allowed.filter_map(|name| models.find(name, None));
        let newest = newest.filter(|entry| own.iter().all(|build| build.entry.key != entry.key));
        Ok(newest.map(|entry| ModelDigest { key: entry.key.clone(), digest: entry.digest }).collect())
    }

    /// Creates the context of a request that has just arrived.
    pub fn context(&self, origin: Option<Origin>, trace: Option<TraceContext>) -> Result<RequestContext, WireError> {
        Ok(RequestContext {
            correlation_id: self.make_id()?,
            trace_id: trace.unwrap_or_else(TraceContext::begin).trace_id,
            origin,
            received: Instant::now(),
        })
    }

    /// Creates a UUIDv7 from the clock and the system's randomness.
    pub(crate) fn make_id(&self) -> Result<CorrelationId, WireError> {
        let mut random = [0; 10];
        getrandom::fill(&mut random).map_err(|_| no_randomness())?;
        let millis = self.inner.clock.now().0;
        Ok(CorrelationId(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid()))
    }

    /// Creates a retry token that no other request has.
    pub(crate) fn make_retry_token(&self) -> Result<RetryToken, WireError> {
        self.make_id()?.to_string().parse().map_err(|_| no_randomness())
    }

    /// Returns the registry's models, from the cache if possible.
    pub(crate) async fn models(&self) -> Result<Arc<Models>, WireError> {
        // A registry that is known to be away is not waited for.
        if let Some(models) = self.inner.models.last().filter(|_| self.membership().is_registry_away()) {
            return Ok(models);
        }
        self.inner.models.get(self.fetch_models()).await
    }

    /// Returns the registry's models, bypassing the cache.
    pub(crate) async fn models_now(&self) -> Result<Models, WireError> {
        self.fetch_models().await
    }

    async fn fetch_models(&self) -> Result<Models, WireError> {
        let catalog: Catalog = self
            .inner
            .upstream
            .ask(NodeRole::Registry, CATALOG_LIST, &Empty {})
            .await
            .map_err(WireError::for_clients)?;
        Ok(Models::new(catalog))
    }

    /// Returns the live workers, from a list that is a few seconds old at most.
    pub(crate) async fn fleet(&self) -> Result<Arc<Fleet>, WireError> {
        let fleet = self.inner.fleet.get(self.fleet_now()).await?;
        if self.inner.fleet.age().is_some_and(|age| age > FLEET_AGE_MAX) {
            return Err(upstream::away(NodeRole::Orchestrator));
        }
        Ok(fleet)
    }

    /// Returns the live workers, bypassing the cache.
    pub(crate) async fn fleet_now(&self) -> Result<Fleet, WireError> {
        self.inner.upstream.ask(NodeRole::Orchestrator, FLEET_LIST, &Empty {}).await.map_err(WireError::for_clients)
    }

    /// Resolves a name, a name with a version, or an alias to one model.
    pub(crate) async fn model_key(&self, id: &str) -> Result<ModelKey, WireError> {
        let named = catalog::parse_ref(id)?;
        // For operators, a model's own name means that model, even if it is an alias as well.
        let own = self.models().await?.find(&named.name, named.version).map(|entry| entry.key.clone());
        if let Some(key) = own {
            return Ok(key);
        }
        match &self.meant(&named).await?[..] {
            [one] => Ok(self.model(one).await?.key.clone()),
            several => {
                let names: Vec<String> = several.iter().map(ModelRef::to_string).collect();
                let message = format!("{named} stands for {}: name one of them", names.join(", "));
                Err(WireError::new(ErrorCode::InvalidValue, message).with_param("model"))
            }
        }
    }

    /// Makes the workers that serve a model load or unload it.
    pub(crate) async fn move_model(&self, request: ModelMove) -> Result<ModelResidency, WireError> {
        self.inner.upstream.ask(NodeRole::Orchestrator, MODEL_MOVE, &request).await.map_err(WireError::for_clients)
    }

    /// Returns how a job was placed.
    pub(crate) async fn explain(&self, correlation_id: CorrelationId) -> Result<Decision, WireError> {
        let request = ExplainRequest { correlation_id };
        self.inner.upstream.ask(NodeRole::Orchestrator, JOB_EXPLAIN, &request).await.map_err(WireError::for_clients)
    }

    /// Returns whether a node responds in a role. This node always does.
    pub(crate) fn is_reachable(&self, node: PublicKey, role: NodeRole) -> bool {
        node == self.inner.transport.public_key() || self.inner.upstream.knows(node, role)
    }

    /// Asks a registry on behalf of an operator.
    pub(crate) async fn ask_registry<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        self.inner.upstream.ask(NodeRole::Registry, method, request).await.map_err(WireError::for_clients)
    }

    /// Returns whether any worker can run a job, or an error if that is unknown.
    pub(crate) async fn is_routable(&self) -> Result<bool, WireError> {
        let fleet = self.fleet().await?;
        Ok(fleet.workers.iter().any(|worker| worker.report.can_serve()))
    }

    /// Keeps the directory of peers and the membership up to date until `stop`. Only the first call has an effect.
    pub(crate) async fn tend(&self, stop: CancellationToken) {
        let task = self.inner.upstream_task.lock().take();
        if let Some(task) = task {
            task.run(stop).await;
        }
    }

    pub(crate) fn batch_created(&self) -> &Notify {
        &self.inner.batch_created
    }

    pub(crate) fn batch_lines(&self) -> &Arc<Semaphore> {
        &self.inner.batch_lines
    }

    /// Returns the registries and orchestrators of the region.
    pub(crate) fn upstream(&self) -> &Upstream {
        &self.inner.upstream
    }

    pub(crate) fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Returns the membership: which nodes belong to the network.
    pub(crate) fn membership(&self) -> &Membership {
        self.inner.upstream.membership()
    }

    pub(crate) fn exposition(&self) -> &Exposition {
        &self.inner.exposition
    }

    pub(crate) fn version(&self) -> &str {
        &self.inner.version
    }

    pub(crate) fn folder_secret(&self) -> Option<&FolderSecret> {
        self.inner.folder_secret.as_ref()
    }

    pub(crate) fn api_key_file(&self) -> Option<&Path> {
        self.inner.api_key_file.as_deref()
    }

    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.inner.clock
    }

    pub(crate) fn transport(&self) -> &Arc<dyn Transport> {
        &self.inner.transport
    }

    /// Returns the token that is cancelled when the streams that still run must end.
    pub(crate) fn cut(&self) -> &CancellationToken {
        &self.inner.cut
    }

    /// Returns the tracker of this gateway's tasks.
    pub(crate) fn tracker(&self) -> &TaskTracker {
        &self.inner.tracker
    }
}

/// Returns a tenant's request quota: that of its policy, or else the configured one.
fn quota(config: &Config, grant: &TokenGrant) -> Quota {
    let limit = config.rate_limit;
    match grant.policy.requests_per_minute {
        Some(per_minute) => Quota { per_minute, burst: limit.burst.max(1).min(per_minute) },
        None if limit.requests_per_minute == 0 => Quota::UNLIMITED,
        None => Quota { per_minute: limit.requests_per_minute, burst: limit.burst.max(1) },
    }
}

fn digest_of(build: &Build) -> ModelDigest {
    ModelDigest { key: build.entry.key.clone(), digest: build.entry.digest }
}

fn no_randomness() -> WireError {
    WireError::new(ErrorCode::InternalError, "no name could be made for this request")
}
