//! Kept answers of completed jobs.

use protocol::UnixMillis;
use rusqlite::{Connection, OptionalExtension as _};

use super::row::integer;
use crate::job_store::{JobKey, SealedAnswer};

/// Keeps the answer of a job that was settled in the same transaction.
pub(super) fn keep(connection: &Connection, job_id: i64, answer: &SealedAnswer) -> rusqlite::Result<()> {
    connection.prepare_cached("INSERT INTO answers (job_id, expires_at, sealed) VALUES (?1, ?2, ?3)")?.execute((
        job_id,
        integer(answer.expires_at.0),
        &*answer.sealed,
    ))?;
    Ok(())
}

pub(super) fn find(connection: &Connection, key: &JobKey, now: UnixMillis) -> rusqlite::Result<Option<Vec<u8>>> {
    let JobKey { tenant_id, correlation_id, retry_token } = key;
    connection
        .prepare_cached(
            "SELECT sealed FROM answers JOIN jobs ON jobs.job_id = answers.job_id
             WHERE tenant_id = ?1 AND correlation_id = ?2 AND retry_token = ?3 AND expires_at > ?4",
        )?
        .query_row((tenant_id.as_str(), correlation_id.0.as_bytes(), retry_token.as_str(), integer(now.0)), |row| {
            row.get(0)
        })
        .optional()
}

pub(super) fn prune(connection: &Connection, now: UnixMillis, bytes_max: u64, limit: u32) -> rusqlite::Result<u32> {
    let expired = connection
        .prepare_cached(
            "DELETE FROM answers WHERE job_id IN (
                 SELECT job_id FROM answers WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2)",
        )?
        .execute((integer(now.0), limit))?;
    let mut removed = expired as u32;
    let mut size = connection.prepare_cached("SELECT bytes FROM answers_size")?;
    let mut remove_next = connection.prepare_cached(
        "DELETE FROM answers WHERE job_id = (SELECT job_id FROM answers ORDER BY expires_at, job_id LIMIT 1)",
    )?;
    while removed < limit && size.query_row((), |row| row.get::<_, i64>(0))? > integer(bytes_max) {
        if remove_next.execute(())? == 0 {
            break;
        }
        removed += 1;
    }
    Ok(removed)
}
