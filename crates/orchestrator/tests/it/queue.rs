//! Jobs that wait for a free slot: their order, their limits, and what they are told.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use metadata_store::{
    BatchStore, FinaliseError, Finalised, JobKey, JobRecord, JobStore, KeptNote, Lease, NewJob, NewNote, ReassignError,
    Reassignment, RecordPage, ReserveError, Reserved, Settlement, SqliteStore, Store, StoreError, UsageCursor,
    UsageRecord,
};
use protocol::infer::{Degraded, InferChunk, InferRequest, ModelDigest, SUBMIT};
use protocol::jobs::{
    DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, JOB_CANCEL, JobQuery, JobRef, JobsCancelled,
};
use protocol::model::ModelKey;
use protocol::policy::{DegradePolicy, ServiceClass, TenantPolicy};
use protocol::presence::HighWater;
use protocol::queue::{QUEUE_LIST, QueuePage, QueueQuery, WaitReason};
use protocol::quota::QuotaUsage;
use protocol::{CorrelationId, Digest, ErrorCode, TenantId, UnixMillis, WireError, WorkerId, codec};
use rpc::{CallError, ResponseStream, StreamOptions};
use tether_orchestrator::Config;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{self, Instant};
use tokio_util::task::TaskTracker;

use crate::stand::{Manner, Stand, Worker, model, stand, stand_on};

/// The time in which a token is made.
const TOKEN: Duration = Duration::from_millis(25);

/// A store whose thread paused time waits for: time does not go on while a blocking task runs.
struct PausingStore(Arc<SqliteStore>);

macro_rules! blocking {
    ($self:ident.$method:ident($($argument:expr),*)) => {{
        let (store, handle) = ($self.0.clone(), Handle::current());
        spawn_blocking(move || handle.block_on(store.$method($($argument),*))).await.expect("it ends")
    }};
}

#[async_trait]
#[rustfmt::skip] // One line a method.
impl JobStore for PausingStore {
    async fn reserve(&self, job: NewJob) -> Result<Reserved, ReserveError> { blocking!(self.reserve(job)) }
    async fn finalise(&self, settlement: Settlement) -> Result<Finalised, FinaliseError> { blocking!(self.finalise(settlement)) }
    async fn reassign(&self, to: Reassignment) -> Result<(), ReassignError> { blocking!(self.reassign(to)) }
    async fn renew(&self, leases: Vec<Lease>, until: UnixMillis) -> Result<Vec<Lease>, StoreError> { blocking!(self.renew(leases, until)) }
    async fn release_expired(&self, now: UnixMillis, limit: u32) -> Result<Vec<JobRecord>, StoreError> { blocking!(self.release_expired(now, limit)) }
    async fn release_orphans(&self, now: UnixMillis) -> Result<Vec<JobRecord>, StoreError> { blocking!(self.release_orphans(now)) }
    fn batches(&self) -> &dyn BatchStore { self.0.batches() }
    async fn job(&self, key: &JobKey) -> Result<Option<JobRecord>, StoreError> { let key = key.clone(); blocking!(self.job(&key)) }
    async fn answer(&self, key: &JobKey, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError> { self.0.answer(key, now).await }
    async fn prune_answers(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> { blocking!(self.prune_answers(now, bytes_max, limit)) }
    async fn keep_note(&self, note: NewNote) -> Result<(), StoreError> { blocking!(self.keep_note(note)) }
    async fn note(&self, tenant: &TenantId, id: CorrelationId, now: UnixMillis) -> Result<Option<KeptNote>, StoreError> { self.0.note(tenant, id, now).await }
    async fn fail_note(&self, key: &JobKey, error: WireError) -> Result<(), StoreError> { let key = key.clone(); blocking!(self.fail_note(&key, error)) }
    async fn remove_note(&self, tenant: &TenantId, id: CorrelationId) -> Result<bool, StoreError> { let tenant = tenant.clone(); blocking!(self.remove_note(&tenant, id)) }
    async fn prune_notes(&self, now: UnixMillis, bytes_max: u64, limit: u32) -> Result<u32, StoreError> { blocking!(self.prune_notes(now, bytes_max, limit)) }
    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobRecord>, StoreError> { self.0.jobs_of(id).await }
    async fn list_jobs(&self, query: JobQuery) -> Result<RecordPage, StoreError> { self.0.list_jobs(query).await }
    async fn prune(&self, before: UnixMillis, limit: u32) -> Result<u32, StoreError> { blocking!(self.prune(before, limit)) }
    async fn list_dead_letters(&self, query: DeadLetterQuery) -> Result<DeadLetterPage, StoreError> { self.0.list_dead_letters(query).await }
    async fn dead_letter(&self, id: CorrelationId) -> Result<Option<(DeadLetter, Option<Vec<u8>>)>, StoreError> { self.0.dead_letter(id).await }
    async fn purge_dead_letters(&self, purge: DeadLetterPurge) -> Result<u64, StoreError> { blocking!(self.purge_dead_letters(purge)) }
    async fn count_dead_letters(&self) -> Result<u64, StoreError> { blocking!(self.count_dead_letters()) }
    async fn active_reservations(&self) -> Result<Vec<(WorkerId, u32)>, StoreError> { self.0.active_reservations().await }
    async fn usage(&self, tenant_id: &TenantId, after: UsageCursor, limit: u32) -> Result<Vec<UsageRecord>, StoreError> { self.0.usage(tenant_id, after, limit).await }
    async fn quota_usage(&self, tenant: &TenantId, now: UnixMillis) -> Result<QuotaUsage, StoreError> { self.0.quota_usage(tenant, now).await }
    async fn quota_tenants(&self, now: UnixMillis, limit: u32) -> Result<Vec<TenantId>, StoreError> { self.0.quota_tenants(now, limit).await }
    async fn high_waters(&self) -> Result<Vec<(WorkerId, HighWater)>, StoreError> { blocking!(self.high_waters()) }
    async fn raise_high_water(&self, marks: Vec<(WorkerId, HighWater)>) -> Result<(), StoreError> { blocking!(self.raise_high_water(marks)) }
}

#[async_trait]
impl Store for PausingStore {
    async fn close(&self) -> Result<(), StoreError> {
        self.0.close().await
    }
}

/// A network of workers with four slots each, with paused time.
async fn paced(config: Config, workers: u8) -> (Arc<Stand>, Vec<Worker>) {
    let store = PausingStore(Arc::new(SqliteStore::in_memory().expect("a store")));
    let stand = stand_on(Arc::new(store), config).await;
    let mut paced = vec![];
    for number in 1..=workers {
        paced.push(stand.worker(number, Manner::Pace(Arc::new(Semaphore::new(4)), TOKEN)).await);
    }
    (Arc::new(stand), paced)
}

fn of(stand: &Stand, tenant: &str, tokens: u32) -> InferRequest {
    let mut job = InferRequest { tenant_id: tenant.parse().expect("a tenant"), progress: true, ..stand.job() };
    job.input.max_tokens = Some(tokens);
    job
}

async fn submit(stand: &Stand, job: &InferRequest) -> Result<ResponseStream, CallError> {
    let long = Duration::from_mins(5);
    let options = StreamOptions { accept_within: long, deadline: Some(long), stall: long };
    stand.gateway.open_stream(stand.orchestrator, SUBMIT, codec::encode(job).into(), options).await
}

/// Reads an answer to its end, with its progress.
async fn read(stand: &Stand, job: &InferRequest) -> Result<Vec<InferChunk>, WireError> {
    let mut stream = submit(stand, job).await?;
    let mut chunks = vec![];
    while let Some(chunk) = stream.next().await {
        chunks.push(codec::decode(&chunk?).expect("a chunk"));
    }
    Ok(chunks)
}

/// Reports again and again, as workers do.
fn keep_reporting(stand: &Arc<Stand>, workers: Vec<Worker>) -> tokio::task::JoinHandle<()> {
    let stand = stand.clone();
    TaskTracker::new().spawn(async move {
        loop {
            time::sleep(Duration::from_secs(5)).await;
            for worker in &workers {
                worker.report(&stand, |_| {}).await.expect("believed");
            }
        }
    })
}

/// Draws numbers from a seed.
struct Draw(u64);

impl Draw {
    fn between(&mut self, least: u32, most: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        least + (self.0 >> 33) as u32 % (most - least + 1)
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

/// Sends single requests of one tenant, one after another, and returns how long each took.
async fn one_by_one(stand: &Stand, tenant: &str, requests: u32) -> Vec<Duration> {
    let mut draw = Draw(7);
    let mut times = vec![];
    for _ in 0..requests {
        let began = Instant::now();
        read(stand, &of(stand, tenant, draw.between(20, 60))).await.expect("never refused");
        times.push(began.elapsed());
        time::sleep(Duration::from_millis(u64::from(draw.between(50, 400)))).await;
    }
    times
}

#[tokio::test(start_paused = true)]
async fn a_tenant_at_fifty_times_its_share_hardly_delays_another() {
    let (stand, workers) = paced(Config::default(), 3).await;
    let reporting = keep_reporting(&stand, workers);
    let mut alone = one_by_one(&stand, "victim", 120).await;
    let mut noise = JoinSet::new();
    for number in 0..50 {
        let (stand, mut draw) = (stand.clone(), Draw(number));
        noise.spawn(async move {
            loop {
                read(&stand, &of(&stand, "noisy", draw.between(20, 60))).await.expect("within the limits");
            }
        });
    }
    time::sleep(Duration::from_secs(5)).await;
    let mut beside = one_by_one(&stand, "victim", 120).await;
    let (alone, beside) = (percentile(&mut alone, 95), percentile(&mut beside, 95));
    println!("the 95th percentile alone {alone:?}, beside a crowd {beside:?}");
    assert!(beside <= alone.mul_f64(1.2), "{beside:?} of {alone:?}");
    noise.abort_all();
    reporting.abort();
}

#[tokio::test(start_paused = true)]
async fn under_overload_as_much_is_done_and_nothing_is_done_twice() {
    const WINDOW: Duration = Duration::from_secs(20);
    let mut rates = vec![];
    // Three workers with four slots do some twelve jobs, or 480 tokens, a second.
    for load in [1, 2, 5, 10] {
        let config = Config { queue_max: 64, queue_wait_secs: 5, ..Config::default() };
        let (stand, workers) = paced(config, 3).await;
        let seen: Vec<_> = workers.iter().map(|worker| worker.seen.clone()).collect();
        let reporting = keep_reporting(&stand, workers);
        let (mut jobs, mut draw, began) = (JoinSet::new(), Draw(load), Instant::now());
        for number in 0..load * 12 * WINDOW.as_secs() {
            time::sleep_until(began + WINDOW.mul_f64(number as f64 / (load * 12 * WINDOW.as_secs()) as f64)).await;
            let (stand, tokens) = (stand.clone(), draw.between(20, 60));
            jobs.spawn(async move {
                let began = Instant::now();
                let job = of(&stand, &format!("tenant-{}", number % 4), tokens);
                read(&stand, &job).await.map(|_| (began.elapsed(), Instant::now(), tokens))
            });
        }
        let mut done = vec![];
        while let Some(ended) = jobs.join_next().await {
            match ended.expect("no panic") {
                Ok(well) => done.push(well),
                Err(error) => {
                    assert_eq!(error.code, ErrorCode::NoCapacity);
                    assert!((1_000..=120_000).contains(&error.retry_after_ms.expect("a time to come back")));
                }
            }
        }
        let attempts: usize = seen.iter().map(|seen| seen.load(std::sync::atomic::Ordering::SeqCst)).sum();
        let (from, to) = (began + Duration::from_secs(5), began + WINDOW);
        // Tokens, not jobs: which jobs are shed decides how long the others are.
        let within: u32 =
            done.iter().filter(|(_, ended, _)| (from..to).contains(ended)).map(|(.., tokens)| tokens).sum();
        let rate = f64::from(within) / (to - from).as_secs_f64();
        let mut waits: Vec<Duration> = done.iter().map(|(took, ..)| *took).collect();
        let worst = percentile(&mut waits, 99);
        println!("{load}x: {rate:.1} tokens a second, {} done, {attempts} attempts, P99 {worst:?}", done.len());
        assert!(attempts as f64 <= 1.1 * done.len() as f64, "{attempts} attempts, {} done", done.len());
        rates.push(rate);
        reporting.abort();
    }
    let peak = rates.iter().copied().fold(0.0, f64::max);
    assert!(rates[1..].iter().all(|rate| *rate >= 0.9 * peak), "{rates:?}");
}

/// Fills the slots of one worker with jobs that last until they are cancelled.
async fn fill(stand: &Stand, jobs: u32) -> Vec<ResponseStream> {
    let mut filling = vec![];
    for _ in 0..jobs {
        filling.push(submit(stand, &of(stand, "noisy", 10)).await.expect("accepted"));
    }
    filling
}

async fn waiting(stand: &Stand, jobs: u64) -> QueuePage {
    for _ in 0..200 {
        let page: QueuePage = stand.operate(QUEUE_LIST, QueueQuery { limit: 100 }).await.expect("an operator");
        if page.total == jobs {
            return page;
        }
        time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not {jobs} jobs wait");
}

#[tokio::test]
async fn a_waiting_job_reports_progress_and_runs_once_a_slot_is_free() {
    let stand = Arc::new(stand(Config::default()).await);
    let worker = stand.worker(1, Manner::Hang).await;
    let mut filling = fill(&stand, 4).await;
    *worker.manner.lock() = Manner::Answer(2);
    let job = of(&stand, "acme", 10);
    let mut stream = submit(&stand, &job).await.expect("accepted while it waits");
    let first: InferChunk = codec::decode(&stream.next().await.expect("open").expect("well")).expect("a chunk");
    assert!(first.progress.is_some());
    assert_eq!(worker.jobs_seen(), 4, "it is not in the queue of the worker");
    drop(filling.pop());
    let mut chunks = 0;
    while let Some(chunk) = stream.next().await {
        chunks += usize::from(codec::decode::<InferChunk>(&chunk.expect("well")).expect("a chunk").progress.is_none());
    }
    assert_eq!((chunks, worker.jobs_seen()), (3, 5));
    let wait = stand.explain(&job).await.wait.expect("it waited");
    assert!(wait.waited_ms >= 1_900 && wait.shed.is_none(), "{wait:?}");
    assert!(stand.metrics.encode().contains(r#"tether_queue_wait_seconds_count{class="standard"} 5"#));
}

#[tokio::test]
async fn a_job_that_leaves_or_runs_out_of_time_is_out_of_the_queue() {
    let stand = Arc::new(stand(Config::default()).await);
    stand.worker(1, Manner::Hang).await;
    let _filling = fill(&stand, 4).await;
    let left = {
        let (stand, job) = (stand.clone(), of(&stand, "acme", 10));
        TaskTracker::new().spawn(async move { read(&stand, &job).await })
    };
    let page = waiting(&stand, 1).await;
    assert_eq!((page.waiting[0].tenant_id.as_str(), page.waiting[0].reason), ("acme", WaitReason::AllFull));
    left.abort();
    waiting(&stand, 0).await;
    let short = StreamOptions {
        accept_within: Duration::from_millis(300),
        deadline: Some(Duration::from_millis(300)),
        stall: Duration::from_secs(5),
    };
    let body = codec::encode(&of(&stand, "acme", 10)).into();
    assert!(stand.gateway.open_stream(stand.orchestrator, SUBMIT, body, short).await.is_err());
    waiting(&stand, 0).await;
    assert!(
        !stand
            .metrics
            .encode()
            .lines()
            .any(|line| line.starts_with("tether_requests_waiting{") && line.ends_with(" 1"))
    );
}

#[tokio::test]
async fn the_tenant_over_its_share_is_shed_and_its_batch_jobs_first() {
    let stand = Arc::new(stand(Config { queue_max: 4, ..Config::default() }).await);
    stand.worker(1, Manner::Hang).await;
    let _filling = fill(&stand, 4).await;
    let enter = |tenant: &'static str, class| {
        let stand = stand.clone();
        let job = InferRequest { class, ..of(&stand, tenant, 10) };
        TaskTracker::new().spawn(async move { read(&stand, &job).await })
    };
    let batch = enter("noisy", ServiceClass::Batch);
    waiting(&stand, 1).await;
    let mut noisy: Vec<_> = (0..3).map(|_| enter("noisy", ServiceClass::Standard)).collect();
    waiting(&stand, 4).await;
    let refused = enter("noisy", ServiceClass::Batch).await.expect("no panic").expect_err("the queue is full");
    assert_eq!(refused.code, ErrorCode::NoCapacity);
    noisy.push(enter("acme", ServiceClass::Standard));
    let shed = batch.await.expect("no panic").expect_err("it gives way");
    assert!(shed.code == ErrorCode::NoCapacity && shed.message.contains("share"), "{shed}");
    let page = waiting(&stand, 4).await;
    assert_eq!(page.waiting.iter().filter(|job| job.tenant_id.as_str() == "acme").count(), 1);
    let metrics = stand.metrics.encode();
    assert!(metrics.contains(r#"tether_shed_total{reason="over_share"} 1"#), "{metrics}");
    noisy.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn batch_jobs_hold_no_slot_against_others() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let batch = |tokens| InferRequest { class: ServiceClass::Batch, ..of(&stand, "nightly", tokens) };
    let mut running = vec![];
    for _ in 0..4 {
        running.push(submit(&stand, &batch(10)).await.expect("accepted"));
    }
    let waits = submit(&stand, &batch(10)).await.expect("accepted");
    waiting(&stand, 1).await;
    // As many as the worker has slots run at once, and the next one waits for one of them.
    for _ in 0..4 {
        running.push(submit(&stand, &of(&stand, "quiet", 10)).await.expect("accepted"));
    }
    assert_eq!(worker.jobs_seen(), 8);
    let next = submit(&stand, &of(&stand, "quiet", 10)).await.expect("accepted");
    waiting(&stand, 2).await;
    drop(running.pop());
    waiting(&stand, 1).await;
    assert_eq!(worker.jobs_seen(), 9, "it goes before the batch job that has waited longer");
    drop((waits, next));
}

#[tokio::test]
async fn the_queue_is_shown_to_operators_only() {
    let stand = stand(Config::default()).await;
    let request = protocol::control::ByOperator { token: "caller".to_owned(), request: QueueQuery { limit: 1 } };
    let asked = stand.gateway.call::<_, QueuePage>(stand.orchestrator, QUEUE_LIST, &request, Duration::from_secs(5));
    assert_eq!(WireError::from(asked.await.expect_err("no operator")).code, ErrorCode::InsufficientScope);
}

#[tokio::test]
async fn a_class_that_the_policy_does_not_allow_is_refused() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Answer(1)).await;
    let allowed_classes = Some(vec![ServiceClass::Standard, ServiceClass::Batch]);
    *stand.policy.lock() = TenantPolicy { allowed_classes, ..TenantPolicy::default() };
    let urgent = InferRequest { class: ServiceClass::Interactive, ..stand.job() };
    assert_eq!(stand.answer(&urgent).await.expect_err("not allowed").code, ErrorCode::ClassNotAllowed);
    stand.answer(&InferRequest { class: ServiceClass::Batch, ..stand.job() }).await.expect("allowed");
}

/// Fills a paced network and waits until the speed of its queue is known.
async fn crowded(stand: &Arc<Stand>) -> JoinSet<()> {
    let mut crowd = JoinSet::new();
    for _ in 0..160 {
        let stand = stand.clone();
        crowd.spawn(async move {
            let _ = read(&stand, &of(&stand, "acme", 40)).await;
        });
    }
    time::sleep(Duration::from_secs(3)).await;
    crowd
}

fn small() -> ModelKey {
    ModelKey { model_id: "small".parse().expect("a name"), ..model() }
}

/// A job of which the gateway has sent the file of the small model too.
fn movable(stand: &Stand) -> InferRequest {
    let digests = vec![ModelDigest { key: small(), digest: Digest::of(b"small") }];
    InferRequest { digests, ..of(stand, "acme", 40) }
}

#[tokio::test]
async fn an_operator_cancels_a_job_that_waits() {
    let stand = Arc::new(stand(Config::default()).await);
    let worker = stand.worker(1, Manner::Hang).await;
    let _filling = fill(&stand, 4).await;
    let job = of(&stand, "acme", 10);
    let request = JobRef { correlation_id: job.correlation_id };
    let waits = {
        let stand = stand.clone();
        TaskTracker::new().spawn(async move { read(&stand, &job).await })
    };
    waiting(&stand, 1).await;
    let cancelled: JobsCancelled = stand.operate(JOB_CANCEL, &request).await.expect("allowed");
    let error = waits.await.expect("no panic").expect_err("cancelled");
    assert_eq!((error.code, error.should_retry()), (ErrorCode::CancelledByOperator, false));
    assert_eq!((cancelled.jobs.len(), cancelled.waiting, worker.jobs_seen()), (0, 1, 4));
    waiting(&stand, 0).await;
    let again: JobsCancelled = stand.operate(JOB_CANCEL, &request).await.expect("allowed");
    assert_eq!(again, JobsCancelled::default());
}

#[tokio::test(start_paused = true)]
async fn a_job_runs_on_its_own_model_if_another_one_cannot_do_it_or_is_not_known_to() {
    let (stand, workers) = paced(Config { degrade_wait_secs: 2, ..Config::default() }, 2).await;
    let mut crowd = crowded(&stand).await;
    let (network, second) = (stand.clone(), small());
    *workers[1].manner.lock() = Manner::Refuse(ErrorCode::UnsupportedParameter);
    workers[1].report(&stand, |report| report.supported = vec![small()]).await.expect("believed");
    let reporting = TaskTracker::new().spawn(async move {
        loop {
            time::sleep(Duration::from_secs(5)).await;
            workers[0].report(&network, |_| {}).await.expect("believed");
            workers[1].report(&network, |report| report.supported = vec![second.clone()]).await.expect("believed");
        }
    });
    let degrade = DegradePolicy { models: vec![small().model_id], max_tokens: Some(5), ..DegradePolicy::default() };
    let degrade = Some(degrade);
    *stand.policy.lock() = TenantPolicy { degrade, ..TenantPolicy::default() };
    time::sleep(Duration::from_secs(6)).await;
    let (job, unlisted, mut bound) = (movable(&stand), of(&stand, "acme", 40), movable(&stand));
    bound.input.logit_bias = [(7, 1.0)].into();
    let (chunks, unlisted, bound) = tokio::join!(read(&stand, &job), read(&stand, &unlisted), read(&stand, &bound));
    for (chunks, why) in [(unlisted, "its file is not known"), (bound, "the ids are of its own model")] {
        let chunks = chunks.expect("answered");
        let how = chunks.last().and_then(|last| last.payload.degraded.clone()).expect("it would have waited");
        assert_eq!((how.model, how.max_tokens), (None, Some(5)), "{why}");
    }
    let chunks = chunks.expect("answered by the model that was asked for");
    let told: Vec<_> = chunks.iter().filter_map(|chunk| chunk.degraded.as_ref()).collect();
    assert_eq!(told.first().and_then(|how| how.model.clone()), Some(small()));
    assert_eq!(told.last(), Some(&&Degraded::default()), "what was said is taken back");
    let last = chunks.last().expect("an end");
    assert_eq!((last.payload.degraded.clone(), last.payload.usage.expect("usage").completion_tokens), (None, 40));
    assert_eq!(stand.record(&job).await.expect("kept").model, model());
    crowd.abort_all();
    reporting.abort();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_would_wait_long_runs_on_another_model_if_its_policy_says_so() {
    let (stand, workers) = paced(Config { degrade_wait_secs: 2, ..Config::default() }, 2).await;
    let mut crowd = crowded(&stand).await;
    let (network, second) = (stand.clone(), small());
    // One worker has another model from now on.
    let reporting = TaskTracker::new().spawn(async move {
        loop {
            workers[0].report(&network, |_| {}).await.expect("believed");
            workers[1].report(&network, |report| report.supported = vec![second.clone()]).await.expect("believed");
            time::sleep(Duration::from_secs(5)).await;
        }
    });
    // Rules are read anew after five seconds.
    let later = || time::sleep(Duration::from_secs(6));
    let degrade = DegradePolicy { models: vec![small().model_id], max_tokens: Some(5), ..DegradePolicy::default() };
    let allowed_models = Some(vec![model().model_id]);
    *stand.policy.lock() = TenantPolicy { degrade: Some(degrade.clone()), ..TenantPolicy::default() };
    later().await;
    let job = InferRequest { linger_ms: Some(1_000), keeps_answer: true, ..movable(&stand) };
    let how = Degraded { model: Some(small()), reason: "queue".into(), ..Degraded::default() };
    for is_repeat in [false, true] {
        let chunks = read(&stand, &job).await.expect("answered");
        let said = chunks.iter().find(|chunk| chunk.origin.is_some()).expect("said where it comes from");
        assert_eq!((said.origin.map(|origin| origin.replayed), &said.degraded), (Some(is_repeat), &Some(how.clone())));
        assert_eq!(chunks.last().and_then(|last| last.payload.degraded.clone()), Some(how.clone()));
    }
    *stand.policy.lock() = TenantPolicy { degrade: Some(degrade), allowed_models, ..TenantPolicy::default() };
    later().await;
    let job = movable(&stand);
    let chunks = read(&stand, &job).await.expect("answered");
    let last = chunks.last().expect("an end");
    let how = last.payload.degraded.clone().expect("it would have waited");
    assert_eq!((how.model, how.max_tokens), (None, Some(5)), "the other model is not allowed");
    assert_eq!(last.payload.usage.expect("usage").completion_tokens, 5);
    assert_eq!(stand.explain(&job).await.degraded.and_then(|how| how.max_tokens), Some(5));
    *stand.policy.lock() = TenantPolicy::default();
    later().await;
    let chunks = read(&stand, &of(&stand, "acme", 40)).await.expect("answered");
    assert_eq!(chunks.last().and_then(|last| last.payload.degraded.clone()), None, "nothing is done without a policy");
    let metrics = stand.metrics.encode();
    assert!(metrics.contains(r#"tether_degraded_total{reason="max_tokens"} 1"#), "{metrics}");
    crowd.abort_all();
    reporting.abort();
}
