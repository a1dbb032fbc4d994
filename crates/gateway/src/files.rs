//! Files of tenants: uploads and reads, piece by piece, at the orchestrator that has them.

use bytes::{Bytes, BytesMut};
use protocol::control::{Empty, NodeRole};
use protocol::files::{
    Base64Bytes, FILE_CREATE, FILE_FINISH, FILE_LIST, FILE_READ, FILE_REMOVE, FILE_SHOW, FILE_WRITE, FileFinish,
    FileId, FileList, FilePieces, FileQuery, FileRead, FileRef, FileRemoved, FileWrite, NewFile, PIECE_BYTES_MAX,
    StoredFile,
};
use protocol::{PublicKey, TenantId, WireError};

use crate::gateway::Gateway;

impl Gateway {
    /// Returns a file, and the orchestrator that has it.
    pub(crate) async fn file(&self, file: &FileRef) -> Result<(PublicKey, StoredFile), WireError> {
        let asked = self.upstream().ask_which(NodeRole::Orchestrator, FILE_SHOW, file).await;
        asked.map_err(WireError::for_clients)
    }

    /// Lists files of all orchestrators, in the order that the query asks for.
    pub(crate) async fn list_files(&self, query: &FileQuery) -> Result<Vec<StoredFile>, WireError> {
        let asked = self.upstream().ask_each(NodeRole::Orchestrator, FILE_LIST, |_| Some(query.clone())).await?;
        let mut files = vec![];
        for (_, reply) in asked {
            let list: FileList = reply.map_err(WireError::for_clients)?;
            files.extend(list.files);
        }
        files.sort_by(|one, other| if query.ascending { one.id.cmp(&other.id) } else { other.id.cmp(&one.id) });
        // Orchestrators may share a store.
        files.dedup_by(|one, other| one.id == other.id);
        files.truncate(query.limit as usize);
        Ok(files)
    }

    /// Deletes a file. Returns whether an orchestrator had it.
    pub(crate) async fn remove_file(&self, file: &FileRef) -> Result<bool, WireError> {
        let asked = self.upstream().ask_each(NodeRole::Orchestrator, FILE_REMOVE, |_| Some(file.clone())).await?;
        let mut found = false;
        for (_, reply) in asked {
            let reply: FileRemoved = reply.map_err(WireError::for_clients)?;
            found |= reply.found;
        }
        Ok(found)
    }

    /// Begins the upload of a file.
    pub(crate) async fn create_file(&self, tenant_id: TenantId, name: String) -> Result<Upload, WireError> {
        let id = FileId::new(self.make_id()?.0);
        let file = FileRef { tenant_id, id };
        let new = NewFile { tenant_id: file.tenant_id.clone(), id: file.id.clone(), name };
        let created = self.upstream().ask_which::<_, Empty>(NodeRole::Orchestrator, FILE_CREATE, &new).await;
        let (keeper, _) = created.map_err(WireError::for_clients)?;
        Ok(Upload { gateway: self.clone(), keeper, file, piece: 0, buffer: BytesMut::new() })
    }

    /// Returns a reader of a file from its beginning.
    pub(crate) fn read_file(&self, keeper: PublicKey, file: FileRef) -> FileReader {
        FileReader { gateway: self.clone(), keeper, file, after: None }
    }
}

/// A file that is being uploaded. It holds less than a piece in memory.
pub(crate) struct Upload {
    gateway: Gateway,
    keeper: PublicKey,
    file: FileRef,
    piece: u32,
    buffer: BytesMut,
}

impl Upload {
    pub(crate) async fn write(&mut self, mut bytes: &[u8]) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES_MAX - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == PIECE_BYTES_MAX {
                self.send().await?;
            }
        }
        Ok(())
    }

    async fn send(&mut self) -> Result<(), WireError> {
        let bytes = Base64Bytes(self.buffer.split().to_vec());
        let write = FileWrite { file: self.file.clone(), piece: self.piece, bytes };
        self.ask::<_, Empty>(FILE_WRITE, &write).await?;
        self.piece += 1;
        Ok(())
    }

    async fn ask<Request: serde::Serialize, Reply: serde::de::DeserializeOwned>(
        &self,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        let asked = self.gateway.upstream().ask_keeper(self.keeper, method, request).await;
        asked.map_err(WireError::for_clients)
    }

    /// Ends the upload. One that is not ended is deleted after a while.
    pub(crate) async fn finish(mut self, expires_after_secs: Option<u64>) -> Result<StoredFile, WireError> {
        if !self.buffer.is_empty() {
            self.send().await?;
        }
        self.ask(FILE_FINISH, &FileFinish { file: self.file.clone(), expires_after_secs }).await
    }

    /// Deletes what was uploaded.
    pub(crate) async fn abandon(self) {
        // If it fails, the file is deleted after a while.
        let _ = self.ask::<_, FileRemoved>(FILE_REMOVE, &self.file).await;
    }
}

/// Reads a file piece by piece.
pub(crate) struct FileReader {
    gateway: Gateway,
    keeper: PublicKey,
    file: FileRef,
    after: Option<u32>,
}

impl FileReader {
    /// Returns the next bytes, or `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, WireError> {
        let read = FileRead { file: self.file.clone(), after: self.after };
        let pieces: FilePieces = self.gateway.upstream().ask_keeper(self.keeper, FILE_READ, &read).await?;
        let Some(last) = pieces.last else { return Ok(None) };
        self.after = Some(last);
        Ok(Some(Bytes::from(pieces.bytes.0)))
    }
}
