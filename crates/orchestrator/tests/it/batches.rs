//! Files and batches at an orchestrator: whose they are, who may work on them, and what is kept of them.

use std::time::Duration;

use metadata_store::{JobStore, SqliteStore, StoreOptions};
use protocol::batches::{
    BATCH_CANCEL, BATCH_CLAIM, BATCH_CREATE, BATCH_LINES, BATCH_LIST, BATCH_RECORD, BATCH_SHOW, BATCH_STEP, Batch,
    BatchClaim, BatchClaimed, BatchDetails, BatchId, BatchList, BatchNow, BatchQuery, BatchRef, BatchStatus, BatchStep,
    LineList, LineResult, LinesQuery, NewBatch,
};
use protocol::control::Empty;
use protocol::files::{
    Base64Bytes, FILE_CREATE, FILE_FINISH, FILE_LIST, FILE_READ, FILE_REMOVE, FILE_SHOW, FILE_WRITE, FileFinish,
    FileId, FileList, FilePieces, FileQuery, FileRead, FileRef, FileRemoved, FileWrite, NewFile, PIECE_BYTES_MAX,
    StoredFile,
};
use protocol::{ErrorCode, TenantId, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tether_orchestrator::Config;

use crate::stand::{Stand, stand, stand_on};

const SECRET: &[u8] = b"the text of a client";

fn file(tenant: &str, number: u128) -> FileRef {
    FileRef { tenant_id: tenant.parse().expect("a tenant"), id: FileId::new(uuid::Uuid::from_u128(number)) }
}

fn batch() -> BatchRef {
    BatchRef { tenant_id: acme(), id: BatchId::new(uuid::Uuid::from_u128(1)) }
}

fn acme() -> TenantId {
    "acme".parse().expect("a tenant")
}

fn new_batch() -> NewBatch {
    NewBatch {
        tenant_id: acme(),
        id: batch().id,
        endpoint: "/v1/embeddings".into(),
        input_file: file("acme", 1).id,
        output_file: file("acme", 2).id,
        error_file: file("acme", 3).id,
        results_expire_after_secs: None,
        details: BatchDetails::default(),
    }
}

impl Stand {
    async fn try_ask<Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: &impl Serialize,
    ) -> Result<Reply, WireError> {
        let asked = self.gateway.call(self.orchestrator, method, request, Duration::from_secs(5)).await;
        asked.map_err(WireError::from)
    }

    async fn write(&self, file: &FileRef, piece: u32, bytes: &[u8]) -> Result<Empty, WireError> {
        let write = FileWrite { file: file.clone(), piece, bytes: Base64Bytes(bytes.to_vec()) };
        self.try_ask(FILE_WRITE, &write).await
    }

    async fn create_file(&self, file: &FileRef) -> Result<Empty, WireError> {
        let FileRef { tenant_id, id } = file.clone();
        self.try_ask(FILE_CREATE, &NewFile { tenant_id, id, name: "secret.jsonl".into() }).await
    }

    async fn upload(&self, file: &FileRef) -> StoredFile {
        self.create_file(file).await.expect("created");
        self.write(file, 0, SECRET).await.expect("written");
        self.ask(FILE_FINISH, &FileFinish { file: file.clone(), expires_after_secs: None }).await
    }

    async fn read(&self, file: &FileRef) -> Vec<u8> {
        let pieces: FilePieces = self.ask(FILE_READ, &FileRead { file: file.clone(), after: None }).await;
        pieces.bytes.0
    }

    async fn create_batch(&self) -> Batch {
        self.upload(&file("acme", 1)).await;
        self.ask(BATCH_CREATE, &new_batch()).await
    }

    async fn claim(&self, working_on: Vec<BatchId>) -> Option<BatchNow> {
        let claimed: BatchClaimed = self.ask(BATCH_CLAIM, &BatchClaim { working_on }).await;
        claimed.claimed
    }

    async fn step(&self, epoch: u64, status: Option<BatchStatus>) -> Result<BatchNow, WireError> {
        let total = (status == Some(BatchStatus::InProgress)).then_some(3);
        let step = BatchStep { batch: batch(), epoch, status, total, errors: vec![] };
        self.try_ask(BATCH_STEP, &step).await
    }

    async fn record_line(&self, epoch: u64, line: u32, is_error: bool, text: &[u8]) -> Result<Empty, WireError> {
        let bytes = Base64Bytes(text.to_vec());
        self.try_ask(BATCH_RECORD, &LineResult { batch: batch(), epoch, line, run: 0, is_error, bytes }).await
    }

    /// Creates a batch whose lines may run, and returns its epoch.
    async fn begin(&self) -> u64 {
        self.create_batch().await;
        let epoch = self.claim(vec![]).await.expect("a batch").epoch;
        self.step(epoch, Some(BatchStatus::InProgress)).await.expect("its lines run");
        epoch
    }
}

#[tokio::test]
async fn nobody_sees_the_files_and_batches_of_another_tenant() {
    let stand = stand(Config::default()).await;
    stand.create_batch().await;
    let (own, theirs) = (file("acme", 1), file("other", 1));
    assert_eq!(stand.read(&own).await, SECRET);
    assert_eq!(stand.read(&theirs).await, b"");
    let shown = stand.try_ask::<StoredFile>(FILE_SHOW, &theirs).await;
    assert_eq!(shown.expect_err("not theirs").code, ErrorCode::NotFound);
    let removed: FileRemoved = stand.ask(FILE_REMOVE, &theirs).await;
    assert!(!removed.found);
    let other: TenantId = "other".parse().expect("a tenant");
    let query = FileQuery { tenant_id: other.clone(), purpose: None, after: None, ascending: false, limit: 10 };
    assert_eq!(stand.ask::<FileList>(FILE_LIST, &query).await.files, []);
    let batches: BatchList =
        stand.ask(BATCH_LIST, &BatchQuery { tenant_id: other.clone(), after: None, limit: 9 }).await;
    assert_eq!(batches.batches, []);
    let theirs = BatchRef { tenant_id: other, ..batch() };
    for method in [BATCH_SHOW, BATCH_CANCEL] {
        let refused = stand.try_ask::<Batch>(method, &theirs).await.expect_err("not theirs");
        assert_eq!(refused.code, ErrorCode::NotFound, "{method}");
    }
}

#[tokio::test]
async fn the_store_holds_no_text_of_a_file_and_no_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("orchestrator.db");
    let store = std::sync::Arc::new(SqliteStore::open(&path, StoreOptions::default()).expect("a store"));
    let stand = stand_on(store.clone(), Config::default()).await;
    let epoch = stand.begin().await;
    stand.record_line(epoch, 1, false, SECRET).await.expect("recorded");
    metadata_store::Store::close(&*store).await.expect("closed");
    for entry in std::fs::read_dir(folder.path()).expect("readable") {
        let bytes = std::fs::read(entry.expect("a file").path()).expect("readable");
        for text in [SECRET, b"secret.jsonl"] {
            assert!(!bytes.windows(text.len()).any(|part| part == text));
        }
    }
}

#[tokio::test]
async fn a_gateway_that_lost_its_lease_writes_nothing_more() {
    let stand = stand(Config::default()).await;
    let epoch = stand.begin().await;
    stand.record_line(epoch, 1, false, b"one\n").await.expect("recorded");
    assert!(stand.claim(vec![batch().id]).await.is_none(), "somebody works on it");
    // A gateway that does not work on its own batch was started anew.
    let again = stand.claim(vec![]).await.expect("the batch").epoch;
    assert!(again > epoch);
    let late = stand.record_line(epoch, 2, false, b"two\n").await.expect_err("late");
    assert_eq!(late.code, ErrorCode::StaleAttempt);
    assert_eq!(stand.step(epoch, Some(BatchStatus::Finalizing)).await.expect_err("late").code, ErrorCode::StaleAttempt);
    stand.record_line(again, 2, false, b"zwei\n").await.expect("recorded");
    let lines: LineList = stand.ask(BATCH_LINES, &LinesQuery { batch: batch(), from: 1, to: 9 }).await;
    assert_eq!(lines.lines, [1, 2]);
}

#[tokio::test]
async fn a_line_has_one_result() {
    let stand = stand(Config::default()).await;
    let epoch = stand.begin().await;
    for (line, is_error, text) in
        [(2, false, "b\n"), (1, false, "a\n"), (1, false, "x\n"), (1, true, "y\n"), (3, true, "c\n")]
    {
        stand.record_line(epoch, line, is_error, text.as_bytes()).await.expect("recorded");
    }
    stand.step(epoch, Some(BatchStatus::Finalizing)).await.expect("its lines have run");
    let ended = stand.step(epoch, Some(BatchStatus::Completed)).await.expect("complete").batch;
    assert_eq!((ended.counts.total, ended.counts.completed, ended.counts.failed), (3, 2, 1));
    assert!(ended.times.in_progress_at <= ended.times.completed_at && ended.times.completed_at.is_some());
    let of = |id: Option<FileId>| FileRef { tenant_id: acme(), id: id.expect("a file") };
    assert_eq!(stand.read(&of(ended.output_file)).await, b"a\nb\n");
    assert_eq!(stand.read(&of(ended.error_file)).await, b"c\n");
    assert!(stand.claim(vec![]).await.is_none(), "it has ended");
}

#[tokio::test]
async fn a_batch_keeps_its_counts_when_its_results_are_deleted() {
    let store = std::sync::Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store.clone(), Config::default()).await;
    let epoch = stand.begin().await;
    stand.record_line(epoch, 1, false, b"a\n").await.expect("recorded");
    stand.step(epoch, Some(BatchStatus::Finalizing)).await.expect("its lines have run");
    let ended = stand.step(epoch, Some(BatchStatus::Completed)).await.expect("complete").batch;
    let results = FileRef { tenant_id: acme(), id: ended.output_file.clone().expect("a file") };
    let removed: FileRemoved = stand.ask(FILE_REMOVE, &results).await;
    assert!(removed.found);
    store.batches().prune_files(ended.times.created_at, 100).await.expect("pruned");
    let shown: Batch = stand.ask(BATCH_SHOW, &batch()).await;
    assert_eq!((shown.counts.completed, shown.counts.failed), (1, 0));
    assert_eq!((shown.output_file, shown.error_file), (ended.output_file, None));
}

#[tokio::test]
async fn an_upload_without_all_its_pieces_is_not_completed() {
    let store = std::sync::Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store.clone(), Config::default()).await;
    let (gap, late) = (file("acme", 1), file("acme", 2));
    let finish = async |file: &FileRef| {
        let finish = FileFinish { file: file.clone(), expires_after_secs: None };
        stand.try_ask::<StoredFile>(FILE_FINISH, &finish).await
    };
    stand.create_file(&gap).await.expect("created");
    stand.write(&gap, 1, SECRET).await.expect("written");
    finish(&gap).await.expect_err("its beginning is missing");
    stand.write(&gap, 0, SECRET).await.expect("written");
    let finished = finish(&gap).await.expect("it is complete");
    stand.create_file(&late).await.expect("created");
    stand.write(&late, 0, SECRET).await.expect("written");
    stand.write(&late, 1, SECRET).await.expect("written");
    assert_eq!(store.batches().prune_files(finished.expires_at, 1).await, Ok(1), "a piece of one of them");
    finish(&late).await.expect_err("it has expired");
    stand.write(&late, 0, SECRET).await.expect_err("it has expired");
}

#[tokio::test]
async fn a_batch_whose_time_is_over_is_said_to_be_and_takes_the_errors_of_its_lines() {
    let stand = stand(Config { batch_window_hours: 0, ..Config::default() }).await;
    let epoch = stand.begin().await;
    assert!(stand.step(epoch, None).await.expect("a lease").is_overdue);
    stand.record_line(epoch, 1, true, b"expired\n").await.expect("recorded");
    let ended = stand.step(epoch, Some(BatchStatus::Expired)).await.expect("expired").batch;
    assert_eq!((ended.status, ended.counts.failed), (BatchStatus::Expired, 1));
    assert!(ended.output_file.is_none() && ended.error_file.is_some());
}

#[tokio::test]
async fn a_batch_that_is_created_again_is_the_same_one() {
    let stand = stand(Config::default()).await;
    stand.begin().await;
    let again: Batch = stand.ask(BATCH_CREATE, &new_batch()).await;
    assert_eq!(again.status, BatchStatus::InProgress);
    let other = NewBatch { input_file: file("acme", 9).id, ..new_batch() };
    stand.try_ask::<Batch>(BATCH_CREATE, &other).await.expect_err("a batch of another file");
}

#[tokio::test]
async fn a_batch_whose_lines_have_all_run_does_not_expire() {
    let stand = stand(Config { batch_window_hours: 0, ..Config::default() }).await;
    let epoch = stand.begin().await;
    for status in [BatchStatus::Finalizing, BatchStatus::Expired, BatchStatus::Completed] {
        stand.step(epoch, Some(status)).await.expect("a lease");
    }
    let shown: Batch = stand.ask(BATCH_SHOW, &batch()).await;
    assert_eq!(shown.status, BatchStatus::Completed);
}

#[tokio::test]
async fn a_cancelled_batch_goes_to_its_end_and_no_further() {
    let stand = stand(Config::default()).await;
    let epoch = stand.begin().await;
    let cancelled: Batch = stand.ask(BATCH_CANCEL, &batch()).await;
    assert_eq!(cancelled.status, BatchStatus::Cancelling);
    assert_eq!(stand.step(epoch, Some(BatchStatus::Completed)).await.expect("a lease").batch.status, cancelled.status);
    let ended = stand.step(epoch, Some(BatchStatus::Cancelled)).await.expect("a lease").batch;
    assert_eq!(ended.status, BatchStatus::Cancelled);
    let again: Batch = stand.ask(BATCH_CANCEL, &batch()).await;
    assert_eq!((again.status, again.times), (ended.status, ended.times));
}

#[tokio::test]
async fn a_file_that_a_batch_reads_is_not_deleted() {
    let stand = stand(Config::default()).await;
    let epoch = stand.begin().await;
    let input = file("acme", 1);
    let refused = stand.try_ask::<FileRemoved>(FILE_REMOVE, &input).await.expect_err("in use");
    assert_eq!(refused.code, ErrorCode::InvalidValue);
    let _: Batch = stand.ask(BATCH_CANCEL, &batch()).await;
    stand.step(epoch, Some(BatchStatus::Cancelled)).await.expect("it has ended");
    let removed: FileRemoved = stand.ask(FILE_REMOVE, &input).await;
    assert!(removed.found);
    let removed: FileRemoved = stand.ask(FILE_REMOVE, &input).await;
    assert!(!removed.found);
}

#[tokio::test]
async fn a_tenant_has_so_many_files_and_so_many_bytes() {
    let config = Config { tenant_files_max: 2, tenant_files_mib: 1, file_mib_max: 1, ..Config::default() };
    let stand = stand(config).await;
    let (one, two, three) = (file("acme", 1), file("acme", 2), file("acme", 3));
    stand.create_file(&one).await.expect("created");
    stand.create_file(&two).await.expect("created");
    assert_eq!(stand.create_file(&three).await.expect_err("too many").param.as_deref(), Some("file"));
    let piece = vec![b'x'; PIECE_BYTES_MAX];
    for number in 0..4 {
        stand.write(&one, number, &piece).await.expect("written");
    }
    assert_eq!(stand.write(&one, 4, b"x").await.expect_err("too long").code, ErrorCode::RequestTooLarge);
    assert_eq!(stand.write(&two, 0, b"x").await.expect_err("too much").code, ErrorCode::InvalidValue);
    stand.write(&file("other", 4), 0, b"x").await.expect_err("no upload");
    let removed: FileRemoved = stand.ask(FILE_REMOVE, &one).await;
    assert!(removed.found);
    stand.create_file(&three).await.expect("there is room, although nothing has been pruned");
    stand.write(&three, 0, &piece).await.expect("written");
}

#[tokio::test]
async fn what_has_expired_is_deleted_and_the_rest_stays() {
    let store = std::sync::Arc::new(SqliteStore::in_memory().expect("a store"));
    let stand = stand_on(store.clone(), Config::default()).await;
    let (short, long) = (file("acme", 8), file("acme", 9));
    stand.create_file(&short).await.expect("created");
    stand.write(&short, 0, SECRET).await.expect("written");
    let finish = FileFinish { file: short.clone(), expires_after_secs: Some(3_600) };
    let finished: StoredFile = stand.ask(FILE_FINISH, &finish).await;
    let kept = stand.upload(&long).await;
    let later = finished.expires_at.after(Duration::from_secs(1));
    // A piece and its file.
    assert_eq!(store.batches().prune_files(later, 100).await, Ok(2));
    assert_eq!(store.batches().file(short, later).await, Ok(None));
    assert_eq!(store.batches().file(long, later).await.expect("readable").map(|file| file.id), Some(kept.id));
}
