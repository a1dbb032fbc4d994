//! [`BatchStore`] in SQLite: what each call reads or writes.

use async_trait::async_trait;
use protocol::batches::{BatchId, BatchRef};
use protocol::files::{FileQuery, FileRef};
use protocol::{PublicKey, TenantId, UnixMillis};

use super::{SqliteStore, batches, files};
use crate::batch_store::{
    BatchChange, BatchCreated, BatchRecord, BatchStore, FileGone, FileRecord, NewBatchRecord, NewFileRecord, NewLine,
    NewPiece, PieceAdded, PieceLimits,
};
use crate::store::StoreError;

#[async_trait]
impl BatchStore for SqliteStore {
    async fn create_file(&self, file: NewFileRecord, files_max: u32) -> Result<bool, StoreError> {
        self.write(move |connection| files::create(connection, &file, files_max)).await
    }

    async fn add_piece(&self, piece: NewPiece, limits: PieceLimits) -> Result<PieceAdded, StoreError> {
        self.write(move |connection| files::add_piece(connection, &piece, limits)).await
    }

    async fn finish_file(&self, file: FileRef, expires_at: UnixMillis) -> Result<Option<FileRecord>, StoreError> {
        self.write(move |connection| files::finish(connection, &file, expires_at)).await
    }

    async fn file(&self, file: FileRef, now: UnixMillis) -> Result<Option<FileRecord>, StoreError> {
        self.read(move |connection| files::find(connection, &file, now)).await
    }

    async fn list_files(&self, query: FileQuery, now: UnixMillis) -> Result<Vec<FileRecord>, StoreError> {
        self.read(move |connection| files::list(connection, &query, now)).await
    }

    async fn pieces(
        &self,
        file: FileRef,
        after: Option<u32>,
        bytes_max: usize,
        now: UnixMillis,
    ) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
        self.read(move |connection| files::pieces(connection, &file, after, bytes_max, now)).await
    }

    async fn remove_file(&self, file: FileRef) -> Result<FileGone, StoreError> {
        self.write(move |connection| files::remove(connection, &file)).await
    }

    async fn prune_files(&self, now: UnixMillis, limit: u32) -> Result<u32, StoreError> {
        self.write(move |connection| {
            let files = files::prune(connection, now, limit)?;
            Ok(files + batches::prune(connection, now, limit.saturating_sub(files))?)
        })
        .await
    }

    async fn create_batch(&self, batch: NewBatchRecord, files_max: u32) -> Result<BatchCreated, StoreError> {
        self.write(move |connection| batches::create(connection, &batch, files_max)).await
    }

    async fn batch(&self, batch: BatchRef) -> Result<Option<BatchRecord>, StoreError> {
        self.read(move |connection| batches::find(connection, &batch)).await
    }

    async fn list_batches(
        &self,
        tenant_id: TenantId,
        after: Option<BatchId>,
        limit: u32,
    ) -> Result<Vec<BatchRecord>, StoreError> {
        self.read(move |connection| batches::list(connection, &tenant_id, after.as_ref(), limit)).await
    }

    async fn claim_batch(
        &self,
        holder: PublicKey,
        working_on: Vec<BatchId>,
        now: UnixMillis,
        lease_until: UnixMillis,
    ) -> Result<Option<BatchRecord>, StoreError> {
        self.write(move |connection| batches::claim(connection, holder, &working_on, now, lease_until)).await
    }

    async fn step_batch(&self, step: BatchChange) -> Result<Option<BatchRecord>, StoreError> {
        self.write(move |connection| batches::step(connection, &step)).await
    }

    async fn record_line(&self, line: NewLine) -> Result<bool, StoreError> {
        self.write(move |connection| batches::record_line(connection, &line)).await
    }

    async fn lines(&self, batch: BatchRef, from: u32, to: u32) -> Result<Vec<u32>, StoreError> {
        self.read(move |connection| batches::lines(connection, &batch, from, to)).await
    }

    async fn open_batches(&self) -> Result<(u64, u64), StoreError> {
        self.read(batches::open).await
    }
}
