//! Files of tenants, in sealed pieces.

use protocol::UnixMillis;
use protocol::files::{FileId, FilePurpose, FileQuery, FileRef};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::row::{self, integer};
use crate::batch_store::{FileGone, FileRecord, NewFileRecord, NewPiece, PieceAdded, PieceLimits};

pub(super) fn create(connection: &Connection, new: &NewFileRecord, files_max: u32) -> rusqlite::Result<bool> {
    let NewFileRecord { file, created_at, expires_at, sealed } = new;
    if count(connection, file)? >= files_max {
        return Ok(false);
    }
    insert(connection, file, "batch", "uploading", (*created_at, *expires_at), sealed)?;
    Ok(true)
}

/// Returns how many files the tenant of a file has.
pub(super) fn count(connection: &Connection, file: &FileRef) -> rusqlite::Result<u32> {
    connection
        .prepare_cached("SELECT count(*) FROM files WHERE tenant_id = ?1 AND state <> 'removed'")?
        .query_row((file.tenant_id.as_str(),), |row| row.get(0))
}

pub(super) fn insert(
    connection: &Connection,
    file: &FileRef,
    purpose: &str,
    state: &str,
    (created_at, expires_at): (UnixMillis, UnixMillis),
    sealed: &[u8],
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO files (tenant_id, file_id, purpose, state, created_at, expires_at, sealed)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            file.tenant_id.as_str(),
            file.id.as_str(),
            purpose,
            state,
            integer(created_at.0),
            integer(expires_at.0),
            sealed
        ])?;
    Ok(())
}

pub(super) fn add_piece(connection: &Connection, new: &NewPiece, limits: PieceLimits) -> rusqlite::Result<PieceAdded> {
    let NewPiece { file, piece, bytes, sealed } = new;
    let own: Option<u64> = connection
        .prepare_cached("SELECT bytes FROM files WHERE tenant_id = ?1 AND file_id = ?2 AND state = 'uploading'")?
        .query_row((file.tenant_id.as_str(), file.id.as_str()), |row| row::unsigned(row, "bytes"))
        .optional()?;
    let Some(own) = own else { return Ok(PieceAdded::NoUpload) };
    if own.saturating_add(*bytes) > limits.file_bytes_max {
        return Ok(PieceAdded::FileTooLong);
    }
    let all: u64 = connection
        .prepare_cached(
            "SELECT coalesce(sum(bytes), 0) AS bytes FROM files WHERE tenant_id = ?1 AND state <> 'removed'",
        )?
        .query_row((file.tenant_id.as_str(),), |row| row::unsigned(row, "bytes"))?;
    if all.saturating_add(*bytes) > limits.tenant_bytes_max {
        return Ok(PieceAdded::TenantFull);
    }
    put(connection, file, *piece, *bytes, sealed)?;
    Ok(PieceAdded::Added)
}

/// Adds a piece to a file that has none of this number.
pub(super) fn put(
    connection: &Connection,
    file: &FileRef,
    piece: u32,
    bytes: u64,
    sealed: &[u8],
) -> rusqlite::Result<()> {
    let added = connection
        .prepare_cached("INSERT OR IGNORE INTO file_pieces (file_id, piece, sealed) VALUES (?1, ?2, ?3)")?
        .execute(params![file.id.as_str(), piece, sealed])?;
    if added > 0 {
        connection
            .prepare_cached(
                "UPDATE files SET bytes = bytes + ?3, pieces = pieces + 1 WHERE tenant_id = ?1 AND file_id = ?2",
            )?
            .execute((file.tenant_id.as_str(), file.id.as_str(), integer(bytes)))?;
    }
    Ok(())
}

/// Completes an upload that has all its pieces, from the first on.
pub(super) fn finish(
    connection: &Connection,
    file: &FileRef,
    expires_at: UnixMillis,
) -> rusqlite::Result<Option<FileRecord>> {
    connection
        .prepare_cached(
            "UPDATE files SET state = 'ready', expires_at = ?3
             WHERE tenant_id = ?1 AND file_id = ?2 AND state = 'uploading'
               AND (SELECT count(*) = files.pieces AND count(*) = coalesce(max(piece) + 1, 0)
                    FROM file_pieces WHERE file_pieces.file_id = files.file_id)
             RETURNING *",
        )?
        .query_row((file.tenant_id.as_str(), file.id.as_str(), integer(expires_at.0)), record)
        .optional()
}

pub(super) fn find(connection: &Connection, file: &FileRef, now: UnixMillis) -> rusqlite::Result<Option<FileRecord>> {
    connection
        .prepare_cached(
            "SELECT * FROM files WHERE tenant_id = ?1 AND file_id = ?2 AND state = 'ready' AND expires_at > ?3",
        )?
        .query_row((file.tenant_id.as_str(), file.id.as_str(), integer(now.0)), record)
        .optional()
}

pub(super) fn list(connection: &Connection, query: &FileQuery, now: UnixMillis) -> rusqlite::Result<Vec<FileRecord>> {
    let (after, order) = if query.ascending { ("file_id > ?4", "ASC") } else { ("file_id < ?4", "DESC") };
    let sql = format!(
        "SELECT * FROM files
         WHERE tenant_id = ?1 AND state = 'ready' AND expires_at > ?2 AND (?3 IS NULL OR purpose = ?3)
           AND (?4 IS NULL OR {after})
         ORDER BY file_id {order} LIMIT ?5"
    );
    let (purpose, after) = (query.purpose.map(FilePurpose::as_str), query.after.as_ref().map(FileId::as_str));
    connection
        .prepare_cached(&sql)?
        .query_map(params![query.tenant_id.as_str(), integer(now.0), purpose, after, query.limit], record)?
        .collect()
}

pub(super) fn pieces(
    connection: &Connection,
    file: &FileRef,
    after: Option<u32>,
    bytes_max: usize,
    now: UnixMillis,
) -> rusqlite::Result<Vec<(u32, Vec<u8>)>> {
    if find(connection, file, now)?.is_none() && !is_in_use(connection, file)? {
        return Ok(vec![]);
    }
    let mut read = connection
        .prepare_cached("SELECT piece, sealed FROM file_pieces WHERE file_id = ?1 AND piece > ?2 ORDER BY piece")?;
    let mut rows = read.query((file.id.as_str(), after.map_or(-1, i64::from)))?;
    let (mut pieces, mut bytes) = (vec![], 0);
    while let Some(row) = rows.next()? {
        let (piece, sealed): (u32, Vec<u8>) = (row.get(0)?, row.get(1)?);
        bytes += sealed.len();
        if bytes > bytes_max && !pieces.is_empty() {
            break;
        }
        pieces.push((piece, sealed));
    }
    Ok(pieces)
}

/// Deletes a file. Its pieces are deleted by [`prune`], a few at a time.
pub(super) fn remove(connection: &Connection, file: &FileRef) -> rusqlite::Result<FileGone> {
    let key = (file.tenant_id.as_str(), file.id.as_str());
    if is_in_use(connection, file)? {
        return Ok(FileGone::InUse);
    }
    let removed = connection
        .prepare_cached(
            "UPDATE files SET state = 'removed', expires_at = 0
             WHERE tenant_id = ?1 AND file_id = ?2 AND state IN ('ready', 'uploading')",
        )?
        .execute(key)?;
    Ok(if removed > 0 { FileGone::Removed } else { FileGone::Missing })
}

/// Returns whether a batch that has not ended reads a file. It does so even if the file has expired meanwhile.
fn is_in_use(connection: &Connection, file: &FileRef) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM batches WHERE tenant_id = ?1 AND input_file = ?2 AND remove_at IS NULL)",
        )?
        .query_row((file.tenant_id.as_str(), file.id.as_str()), |row| row.get(0))
}

/// Deletes up to `limit` pieces of files that have expired, and such files without pieces. An upload that has expired
/// ends before its pieces are deleted, so that it is never completed without them.
pub(super) fn prune(connection: &Connection, now: UnixMillis, limit: u32) -> rusqlite::Result<u32> {
    // A file is kept for as long as a batch needs it.
    const EXPIRED: &str = "FROM files WHERE expires_at <= ?1 AND state <> 'collecting'
         AND NOT EXISTS (SELECT 1 FROM batches WHERE batches.tenant_id = files.tenant_id
                         AND input_file = file_id AND remove_at IS NULL)";
    connection
        .prepare_cached("UPDATE files SET state = 'removed' WHERE expires_at <= ?1 AND state = 'uploading'")?
        .execute((integer(now.0),))?;
    let pieces = connection
        .prepare_cached(&format!(
            "DELETE FROM file_pieces WHERE (file_id, piece) IN (
                 SELECT file_id, piece FROM file_pieces WHERE file_id IN (SELECT file_id {EXPIRED}) LIMIT ?2)"
        ))?
        .execute((integer(now.0), limit))?;
    let left = limit.saturating_sub(pieces as u32);
    let files = connection
        .prepare_cached(&format!(
            "DELETE FROM files WHERE (tenant_id, file_id) IN (
                 SELECT tenant_id, file_id {EXPIRED}
                   AND NOT EXISTS (SELECT 1 FROM file_pieces WHERE file_pieces.file_id = files.file_id) LIMIT ?2)"
        ))?
        .execute((integer(now.0), left))?;
    Ok((pieces + files) as u32)
}

fn record(row: &Row<'_>) -> rusqlite::Result<FileRecord> {
    Ok(FileRecord {
        id: row::parsed(row, "file_id")?,
        purpose: row::known_word(row, "purpose")?,
        created_at: row::time(row, "created_at")?,
        expires_at: row::time(row, "expires_at")?,
        bytes: row::unsigned(row, "bytes")?,
        sealed: row.get("sealed")?,
    })
}
