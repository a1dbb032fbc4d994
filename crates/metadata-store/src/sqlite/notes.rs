//! What gateways keep with jobs whose answers can be read again.

use protocol::{CorrelationId, TenantId, UnixMillis, WireError};
use rusqlite::{Connection, OptionalExtension as _};

use super::answers::{Kept, choose};
use super::row::{self, integer};
use crate::job_store::{JobKey, KeptNote, NewNote};

/// Keeps a note. That of a job that runs again replaces its first one.
pub(super) fn keep(connection: &Connection, note: &NewNote) -> rusqlite::Result<()> {
    let JobKey { tenant_id, correlation_id, retry_token } = &note.key;
    connection
        .prepare_cached("DELETE FROM notes WHERE tenant_id = ?1 AND correlation_id = ?2")?
        .execute((tenant_id.as_str(), correlation_id.0.as_bytes()))?;
    connection
        .prepare_cached(
            "INSERT INTO notes (tenant_id, correlation_id, retry_token, created_at, expires_at, sealed)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            tenant_id.as_str(),
            correlation_id.0.as_bytes(),
            retry_token.as_str(),
            integer(note.created_at.0),
            integer(note.expires_at.0),
            &*note.sealed,
        ))?;
    Ok(())
}

pub(super) fn find(
    connection: &Connection,
    tenant_id: &TenantId,
    id: CorrelationId,
    now: UnixMillis,
) -> rusqlite::Result<Option<KeptNote>> {
    connection
        .prepare_cached("SELECT * FROM notes WHERE tenant_id = ?1 AND correlation_id = ?2 AND expires_at > ?3")?
        .query_row((tenant_id.as_str(), id.0.as_bytes(), integer(now.0)), |row| {
            Ok(KeptNote {
                key: row::job_key(row)?,
                created_at: row::time(row, "created_at")?,
                sealed: row.get("sealed")?,
                error: row::json_or_null(row, "error")?,
            })
        })
        .optional()
}

/// Records why a job came to no answer. Only the first reason counts, and none if the job has completed.
pub(super) fn fail(connection: &Connection, key: &JobKey, error: &WireError) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE notes SET error = ?4
             WHERE tenant_id = ?1 AND correlation_id = ?2 AND retry_token = ?3 AND error IS NULL
               AND NOT EXISTS (
                   SELECT 1 FROM jobs WHERE tenant_id = ?1 AND correlation_id = ?2 AND retry_token = ?3
                      AND state = 'completed')",
        )?
        .execute((
            key.tenant_id.as_str(),
            key.correlation_id.0.as_bytes(),
            key.retry_token.as_str(),
            row::text_of_json(error),
        ))?;
    Ok(())
}

/// Removes a note and the answer of its job. Returns whether there was one.
pub(super) fn remove(connection: &Connection, tenant_id: &TenantId, id: CorrelationId) -> rusqlite::Result<bool> {
    let key = (tenant_id.as_str(), id.0.as_bytes());
    connection
        .prepare_cached(
            "DELETE FROM answers WHERE job_id IN (
                 SELECT job_id FROM jobs JOIN notes USING (tenant_id, correlation_id, retry_token)
                 WHERE tenant_id = ?1 AND correlation_id = ?2)",
        )?
        .execute(key)?;
    let removed =
        connection.prepare_cached("DELETE FROM notes WHERE tenant_id = ?1 AND correlation_id = ?2")?.execute(key)?;
    Ok(removed > 0)
}

/// Removes up to `limit` notes that have expired, and returns their number.
pub(super) fn remove_expired(connection: &Connection, now: UnixMillis, limit: u32) -> rusqlite::Result<u32> {
    let removed = connection
        .prepare_cached(
            "DELETE FROM notes WHERE note_id IN (
                 SELECT note_id FROM notes WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2)",
        )?
        .execute((integer(now.0), limit))?;
    Ok(removed as u32)
}

/// Returns up to `limit` notes that are to go so that the others have at most `bytes_max` bytes.
pub(super) fn victims(connection: &Connection, bytes_max: u64, limit: u32) -> rusqlite::Result<Vec<i64>> {
    let size: i64 = connection.prepare_cached("SELECT bytes FROM notes_size")?.query_row((), |row| row.get(0))?;
    let excess = size.saturating_sub(integer(bytes_max));
    if excess <= 0 || limit == 0 {
        return Ok(vec![]);
    }
    let kept: Vec<Kept> = connection
        .prepare_cached("SELECT note_id, tenant_id, length(sealed) FROM notes ORDER BY expires_at, note_id")?
        .query_map((), |row| Ok(Kept { id: row.get(0)?, tenant_id: row.get(1)?, bytes: row.get(2)? }))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(choose(kept, excess, limit as usize))
}

pub(super) fn remove_all(connection: &Connection, notes: &[i64]) -> rusqlite::Result<u32> {
    let mut remove = connection.prepare_cached("DELETE FROM notes WHERE note_id = ?1")?;
    let mut removed = 0;
    for note_id in notes {
        removed += remove.execute((note_id,))?;
    }
    Ok(removed as u32)
}
