//! Answers that their tenants read again by the id of their job.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{SqliteStore, StoreOptions};
use protocol::infer::{InferChunk, InferRequest};
use protocol::kept::{KEPT_CANCEL, KEPT_READ, KEPT_REMOVE, KEPT_SHOW, KeptAnswer, KeptRef, KeptRemoved, KeptStatus};
use protocol::policy::TenantPolicy;
use protocol::{Digest, ErrorCode, codec};
use rpc::{CallError, StreamOptions};
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, stand, stand_on};

const NOTE: &str = "what the gateway knows";

/// A job whose client reads its answer later. `detached` says whether it goes away at once.
fn noted(stand: &Stand, detached: bool) -> InferRequest {
    let (fingerprint, note) = (Some(Digest::of(b"this")), Some(NOTE.to_owned()));
    let job = InferRequest { acknowledges: true, progress: true, fingerprint, note, detached, ..stand.job() };
    InferRequest { linger_ms: Some(0), keeps_answer: true, ..job }
}

fn of(job: &InferRequest) -> KeptRef {
    KeptRef { tenant_id: job.tenant_id.clone(), correlation_id: job.correlation_id }
}

impl Stand {
    /// Submits a job and goes away as soon as it is accepted.
    async fn leave(&self, job: &InferRequest) {
        let mut answer = self.submit(job).await.expect("accepted");
        answer.next().await.expect("a chunk").expect("no error");
    }

    async fn call_kept<Reply: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        kept: &KeptRef,
    ) -> Result<Reply, CallError> {
        self.gateway.call(self.orchestrator, method, kept, Duration::from_secs(5)).await
    }

    async fn shown(&self, job: &InferRequest) -> KeptAnswer {
        self.call_kept(KEPT_SHOW, &of(job)).await.expect("kept")
    }

    /// Waits until a job has ended.
    async fn ended(&self, job: &InferRequest) -> KeptAnswer {
        for _ in 0..500 {
            let shown = self.shown(job).await;
            if !matches!(shown.status, KeptStatus::Queued | KeptStatus::Running) {
                return shown;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the job did not end within five seconds");
    }

    /// Reads the parts of a kept answer.
    async fn read_kept(&self, job: &InferRequest) -> Result<Vec<InferChunk>, CallError> {
        let seconds = Duration::from_secs(20);
        let options = StreamOptions { accept_within: seconds, deadline: Some(seconds), stall: seconds };
        let body = codec::encode(&of(job)).into();
        let mut stream = self.gateway.open_stream(self.orchestrator, KEPT_READ, body, options).await?;
        let mut chunks: Vec<InferChunk> = vec![];
        while let Some(chunk) = stream.next().await {
            chunks.push(codec::decode(&chunk?).expect("a chunk"));
        }
        chunks.retain(|chunk| chunk.progress.is_none());
        Ok(chunks)
    }
}

fn code(error: CallError) -> ErrorCode {
    protocol::WireError::from(error).code
}

#[tokio::test]
async fn a_job_without_a_reader_runs_to_its_end_and_is_read_by_its_tenant_alone_also_later() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = SqliteStore::open(folder.path().join("store.db"), StoreOptions::default());
    let store = Arc::new(store.expect("opens"));
    let (job, chunks) = {
        let stand = stand_on(store.clone(), Config::default()).await;
        stand.worker(1, Manner::Read(1)).await;
        let job = noted(&stand, true);
        stand.leave(&job).await;
        assert_ne!(stand.shown(&job).await.status, KeptStatus::Completed);
        let running = stand.read_kept(&job).await.expect("read while it runs");
        assert_eq!(stand.ended(&job).await.status, KeptStatus::Completed);
        assert_eq!(stand.read_kept(&job).await.expect("read again"), running);
        assert_eq!(stand.usage().await.len(), 1, "it is billed once");
        (job, running)
    };
    assert!(chunks.last().expect("an end").done);
    let files = std::fs::read_dir(folder.path()).expect("a folder").map(|file| file.expect("readable").path());
    let bytes: Vec<u8> = files.flat_map(|file| std::fs::read(file).expect("readable")).collect();
    assert!(!bytes.windows(NOTE.len()).any(|bytes| bytes == NOTE.as_bytes()), "the note is sealed");
    let stand = stand_on(store, Config::default()).await;
    let shown = stand.shown(&job).await;
    assert_eq!((&*shown.note, shown.status), (NOTE, KeptStatus::Completed));
    assert_eq!(stand.read_kept(&job).await.expect("read"), chunks);
    let other = KeptRef { tenant_id: "evil".parse().expect("tenant"), ..of(&job) };
    let refused = stand.call_kept::<KeptAnswer>(KEPT_SHOW, &other).await.expect_err("another tenant's");
    assert_eq!(code(refused), ErrorCode::NotFound);
    assert!(!stand.call_kept::<KeptRemoved>(KEPT_REMOVE, &other).await.expect("answered").found);
}

#[tokio::test]
async fn a_note_with_a_waiting_client_is_kept_with_its_answer() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(3)).await;
    let job = noted(&stand, false);
    let mut answer = stand.submit(&job).await.expect("accepted");
    answer.acknowledge_reads();
    while let Some(chunk) = answer.next().await {
        chunk.expect("no error");
    }
    let shown = stand.shown(&job).await;
    assert_eq!((&*shown.note, shown.status), (NOTE, KeptStatus::Completed));
    // A client that goes away before the end takes its job along.
    *worker.manner.lock() = Manner::Hang;
    let job = noted(&stand, false);
    stand.leave(&job).await;
    worker.cancelled.notified().await;
    let refused = stand.call_kept::<KeptAnswer>(KEPT_SHOW, &of(&job)).await.expect_err("nothing is kept");
    assert_eq!(code(refused), ErrorCode::NotFound);
}

#[tokio::test]
async fn a_job_without_a_reader_is_cancelled_by_its_tenant() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let job = noted(&stand, true);
    stand.leave(&job).await;
    for _ in 0..500 {
        if stand.shown(&job).await.status == KeptStatus::Running {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let cancelled: KeptAnswer = stand.call_kept(KEPT_CANCEL, &of(&job)).await.expect("answered");
    assert_eq!(cancelled.status, KeptStatus::Cancelled);
    worker.cancelled.notified().await;
    let again: KeptAnswer = stand.call_kept(KEPT_CANCEL, &of(&job)).await.expect("answered");
    assert_eq!(again.status, KeptStatus::Cancelled);
}

#[tokio::test]
async fn a_removed_answer_is_in_no_store_and_no_memory() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store, Config::default()).await;
    stand.worker(1, Manner::Answer(3)).await;
    let job = noted(&stand, true);
    stand.leave(&job).await;
    assert_eq!(stand.ended(&job).await.status, KeptStatus::Completed);
    for found in [true, false] {
        let removed: KeptRemoved = stand.call_kept(KEPT_REMOVE, &of(&job)).await.expect("answered");
        assert_eq!(removed.found, found);
        assert_eq!(code(stand.read_kept(&job).await.expect_err("removed")), ErrorCode::NotFound);
    }
    let key = crate::stand::job_key(&job);
    assert_eq!(stand.store.answer(&key, protocol::UnixMillis(0)).await, Ok(None));
}

#[tokio::test]
async fn a_job_without_a_reader_that_fails_says_why() {
    let stand = stand(Config::default()).await;
    stand.worker(1, Manner::Refuse(ErrorCode::InvalidValue)).await;
    let job = noted(&stand, true);
    stand.leave(&job).await;
    let shown = stand.ended(&job).await;
    let error = shown.error.expect("a reason");
    assert_eq!((shown.status, error.code), (KeptStatus::Failed, ErrorCode::WorkerFailed));
    assert!(error.message.contains("the worker"), "{error}");
}

#[tokio::test]
async fn where_no_answers_are_kept_no_job_runs_without_a_reader() {
    let stand = stand(Config { answers_kept_hours: 0, ..Config::default() }).await;
    stand.worker(1, Manner::Answer(3)).await;
    let refused = stand.answer(&noted(&stand, true)).await.expect_err("refused");
    assert_eq!((refused.code, refused.param.as_deref()), (ErrorCode::UnsupportedParameter, Some("background")));
}

#[tokio::test]
async fn a_repeat_that_is_refused_does_not_change_what_is_kept() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    let job = {
        let stand = stand_on(store.clone(), Config::default()).await;
        stand.worker(1, Manner::Answer(3)).await;
        let job = noted(&stand, true);
        stand.leave(&job).await;
        assert_eq!(stand.ended(&job).await.status, KeptStatus::Completed);
        job
    };
    // This orchestrator has the answer in its store alone.
    let stand = stand_on(store, Config::default()).await;
    let another = InferRequest { fingerprint: Some(Digest::of(b"another")), ..job.clone() };
    let refused = stand.answer(&another).await.expect_err("another request under the same key");
    assert_eq!(refused.code, ErrorCode::IdempotencyKeyReused);
    assert_eq!(stand.shown(&job).await.status, KeptStatus::Completed);
}

#[tokio::test]
async fn a_job_without_a_reader_that_may_not_run_is_refused_and_not_kept() {
    let stand = stand(Config::default()).await;
    *stand.policy.lock() = TenantPolicy { allowed_models: Some(vec![]), ..TenantPolicy::default() };
    let job = noted(&stand, true);
    assert_eq!(stand.answer(&job).await.expect_err("not allowed").code, ErrorCode::ModelNotAllowed);
    let refused = stand.call_kept::<KeptAnswer>(KEPT_SHOW, &of(&job)).await.expect_err("nothing is kept");
    assert_eq!(code(refused), ErrorCode::NotFound);
}
