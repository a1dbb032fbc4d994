//! Files of tenants. Their bytes and names are sealed before they reach the store.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{FileGone, FileRecord, NewFileRecord, NewPiece, PieceAdded, PieceLimits, StoreError};
use protocol::control::Empty;
use protocol::files::{
    Base64Bytes, FILE_NAME_BYTES_MAX, FILES_PAGE_MAX, FileFinish, FileId, FileList, FilePieces, FileQuery, FileRead,
    FileRef, FileRemoved, FileWrite, NewFile, PIECE_BYTES_MAX, StoredFile,
};
use protocol::{ErrorCode, TenantId, WireError, codec};
use rpc::Caller;
use tokio::task;
use tracing::warn;

use super::Orchestrator;

/// How long an upload may take. One that was given up is deleted after it.
const UPLOAD_WITHIN: Duration = Duration::from_hours(1);
/// How much of a file is read in one call.
const READ_BYTES: usize = 1024 * 1024;

impl Orchestrator {
    pub(crate) async fn create_file(self: Arc<Self>, _: Caller, new: NewFile) -> Result<Empty, WireError> {
        let NewFile { tenant_id, id, name } = new;
        if name.len() > FILE_NAME_BYTES_MAX {
            let message = format!("the file's name is longer than {FILE_NAME_BYTES_MAX} bytes");
            return Err(WireError::new(ErrorCode::InvalidValue, message).with_param("file"));
        }
        let created_at = self.reservations.now();
        let expires_at = created_at.after(UPLOAD_WITHIN);
        let sealed = self.seal_name(&tenant_id, &id, &name)?;
        let file = NewFileRecord { file: FileRef { tenant_id, id }, created_at, expires_at, sealed };
        let max = self.config.tenant_files_max;
        let created = self.store.batches().create_file(file, max).await.map_err(|error| unusable(&error))?;
        if created { Ok(Empty {}) } else { Err(too_many_files(max)) }
    }

    /// Returns how long a file is kept whose client wants it deleted after so many seconds.
    pub(super) fn kept_for(&self, secs: Option<u64>) -> Duration {
        let longest = u64::from(self.config.files_kept_days) * 24 * 3600;
        Duration::from_secs(secs.map_or(longest, |secs| secs.min(longest)))
    }

    pub(crate) async fn write_file(self: Arc<Self>, _: Caller, write: FileWrite) -> Result<Empty, WireError> {
        let FileWrite { file, piece, bytes: Base64Bytes(bytes) } = write;
        if bytes.len() > PIECE_BYTES_MAX {
            let message = format!("a piece is longer than {PIECE_BYTES_MAX} bytes");
            return Err(WireError::new(ErrorCode::InvalidValue, message));
        }
        let length = bytes.len() as u64;
        let sealed = self.seal_piece(&file, piece, bytes).await?;
        let config = &self.config;
        let limits =
            PieceLimits { file_bytes_max: config.file_mib_max << 20, tenant_bytes_max: config.tenant_files_mib << 20 };
        let new = NewPiece { file, piece, bytes: length, sealed };
        match self.store.batches().add_piece(new, limits).await.map_err(|error| unusable(&error))? {
            PieceAdded::Added => Ok(Empty {}),
            PieceAdded::NoUpload => Err(missing_file()),
            PieceAdded::FileTooLong => {
                let message = format!("the file is larger than {} MiB", config.file_mib_max);
                Err(WireError::new(ErrorCode::RequestTooLarge, message).with_param("file"))
            }
            PieceAdded::TenantFull => {
                let message = format!(
                    "the files of this tenant would take more than {} MiB; delete some",
                    config.tenant_files_mib
                );
                Err(WireError::new(ErrorCode::InvalidValue, message).with_param("file"))
            }
        }
    }

    pub(crate) async fn finish_file(self: Arc<Self>, _: Caller, finish: FileFinish) -> Result<StoredFile, WireError> {
        let FileFinish { file, expires_after_secs } = finish;
        let tenant_id = file.tenant_id.clone();
        let expires_at = self.reservations.now().after(self.kept_for(expires_after_secs));
        let finished = self.store.batches().finish_file(file, expires_at).await.map_err(|error| unusable(&error))?;
        self.described(&tenant_id, finished.ok_or_else(missing_file)?)
    }

    pub(crate) async fn show_file(self: Arc<Self>, _: Caller, file: FileRef) -> Result<StoredFile, WireError> {
        let (tenant_id, now) = (file.tenant_id.clone(), self.reservations.now());
        let found = self.store.batches().file(file, now).await.map_err(|error| unusable(&error))?;
        self.described(&tenant_id, found.ok_or_else(missing_file)?)
    }

    pub(crate) async fn list_files(self: Arc<Self>, _: Caller, query: FileQuery) -> Result<FileList, WireError> {
        let (tenant_id, now) = (query.tenant_id.clone(), self.reservations.now());
        let query = FileQuery { limit: query.limit.min(FILES_PAGE_MAX + 1), ..query };
        let found = self.store.batches().list_files(query, now).await.map_err(|error| unusable(&error))?;
        let files = found.into_iter().map(|file| self.described(&tenant_id, file)).collect::<Result<_, _>>()?;
        Ok(FileList { files })
    }

    pub(crate) async fn read_file(self: Arc<Self>, _: Caller, read: FileRead) -> Result<FilePieces, WireError> {
        let FileRead { file, after } = read;
        let now = self.reservations.now();
        let pieces = self.store.batches().pieces(file.clone(), after, READ_BYTES, now);
        let pieces = pieces.await.map_err(|error| unusable(&error))?;
        let last = pieces.last().map(|(piece, _)| *piece);
        let key = self.sealing_key.clone();
        let open = move || {
            let mut bytes = vec![];
            for (piece, sealed) in pieces {
                bytes.append(&mut key.open(&owner(&file, piece), &sealed).ok()?);
            }
            Some(bytes)
        };
        let opened = task::spawn_blocking(open).await.ok().flatten();
        let bytes = Base64Bytes(opened.ok_or_else(unopened)?);
        Ok(FilePieces { bytes, last })
    }

    pub(crate) async fn remove_file(self: Arc<Self>, _: Caller, file: FileRef) -> Result<FileRemoved, WireError> {
        match self.store.batches().remove_file(file).await.map_err(|error| unusable(&error))? {
            FileGone::Removed => Ok(FileRemoved { found: true }),
            FileGone::Missing => Ok(FileRemoved { found: false }),
            FileGone::InUse => {
                let message = "a batch that has not ended reads this file; cancel the batch first";
                Err(WireError::new(ErrorCode::InvalidValue, message).with_param("file_id"))
            }
        }
    }

    pub(super) fn seal_name(&self, tenant_id: &TenantId, id: &FileId, name: &str) -> Result<Vec<u8>, WireError> {
        self.sealing_key.seal(&name_owner(tenant_id, id), name.as_bytes()).ok_or_else(no_randomness)
    }

    pub(super) async fn seal_piece(&self, file: &FileRef, piece: u32, bytes: Vec<u8>) -> Result<Vec<u8>, WireError> {
        let (key, owner) = (self.sealing_key.clone(), owner(file, piece));
        let is_short = bytes.len() < super::repeats::SEALED_AT_ONCE;
        let seal = move || key.seal(&owner, &bytes);
        let sealed = if is_short { seal() } else { task::spawn_blocking(seal).await.ok().flatten() };
        sealed.ok_or_else(no_randomness)
    }

    fn described(&self, tenant_id: &TenantId, file: FileRecord) -> Result<StoredFile, WireError> {
        let FileRecord { id, purpose, created_at, expires_at, bytes, sealed } = file;
        let name = self.sealing_key.open(&name_owner(tenant_id, &id), &sealed).map_err(|_| unopened())?;
        let name = String::from_utf8_lossy(&name).into_owned();
        Ok(StoredFile { id, name, purpose, bytes, created_at, expires_at })
    }
}

/// Returns what binds a sealed piece to its place.
fn owner(file: &FileRef, piece: u32) -> Vec<u8> {
    codec::encode(&("file", &file.tenant_id, &file.id, piece))
}

fn name_owner(tenant_id: &TenantId, id: &FileId) -> Vec<u8> {
    codec::encode(&("file name", tenant_id, id))
}

pub(super) fn missing_file() -> WireError {
    WireError::new(ErrorCode::NotFound, "there is no such file, or no longer").with_param("file_id")
}

pub(super) fn too_many_files(max: u32) -> WireError {
    let message = format!("this tenant has {max} files, which is as many as it may have; delete some");
    WireError::new(ErrorCode::InvalidValue, message).with_param("file")
}

fn unopened() -> WireError {
    warn!("a file cannot be read: it is damaged, or was sealed with another sealing.key than that of the data folder");
    WireError::new(ErrorCode::InternalError, "the file cannot be read")
}

pub(super) fn no_randomness() -> WireError {
    WireError::new(ErrorCode::InternalError, "the system gives no random numbers")
}

/// Returns the error for a store that cannot be read or written now.
pub(super) fn unusable(error: &StoreError) -> WireError {
    warn!(%error, "could not read or write files or batches");
    WireError::new(ErrorCode::Unavailable, "the orchestrator's store cannot be used now, try again")
}
