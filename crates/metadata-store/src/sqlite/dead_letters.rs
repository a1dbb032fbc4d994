//! Dead letters: failed jobs that are kept for operators, with their sealed requests.

use protocol::jobs::{DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, PAGE_MAX};
use protocol::{CorrelationId, TraceId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};
use uuid::Uuid;

use super::row::{self, integer};
use crate::job_store::NewDeadLetter;

/// The columns of a letter without its payload.
macro_rules! select_letters {
    ($columns:literal, $rest:literal) => {
        concat!(
            "SELECT sequence, tenant_id, correlation_id, trace_id, model_id, model_version, region, cause, error_code, ",
            "error_message, history, created_at, died_at, payload_bytes",
            $columns,
            " FROM dead_letters ",
            $rest
        )
    };
}

/// Writes the letter of a job that was settled in the same transaction, and deletes the oldest letters that exceed the
/// limits.
pub(super) fn write(connection: &Connection, job_id: i64, letter: &NewDeadLetter) -> rusqlite::Result<()> {
    if letter.letters_max == 0 {
        return Ok(());
    }
    let payload = letter.payload.as_ref().filter(|payload| payload.sealed.len() as u64 <= letter.bytes_max);
    connection
        .prepare_cached(
            "INSERT INTO dead_letters (tenant_id, correlation_id, trace_id, model_id, model_version, region, cause,
                                       error_code, error_message, history, created_at, died_at, payload, payload_bytes)
             SELECT tenant_id, correlation_id, trace_id, model_id, model_version, region, :cause,
                    coalesce(error_code, 'internal_error'), coalesce(error_message, ''), :history, created_at,
                    updated_at, :payload, :payload_bytes
             FROM jobs WHERE job_id = :job_id",
        )?
        .execute(named_params! {
            ":cause": letter.cause.as_str(),
            ":history": row::text_of_json(&letter.history),
            ":payload": payload.map(|payload| payload.sealed.as_slice()),
            ":payload_bytes": payload.map(|payload| integer(payload.plain_bytes)),
            ":job_id": job_id,
        })?;
    trim(connection, letter.letters_max, letter.bytes_max)
}

/// Deletes the oldest letters until at most so many are left, with at most so many bytes of payload.
fn trim(connection: &Connection, letters_max: u32, bytes_max: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM dead_letters WHERE sequence <= (
                 SELECT max(sequence) FROM (
                     SELECT sequence, row_number() OVER newest AS number, sum(length(payload)) OVER newest AS bytes
                     FROM dead_letters WINDOW newest AS (ORDER BY sequence DESC)
                 ) WHERE number > ?1 OR bytes > ?2)",
        )?
        .execute((letters_max, integer(bytes_max)))?;
    Ok(())
}

/// Returns letters, the newest first.
pub(super) fn list(connection: &Connection, query: &DeadLetterQuery) -> rusqlite::Result<DeadLetterPage> {
    let limit = query.limit.clamp(1, PAGE_MAX);
    let dead_letters: Vec<DeadLetter> = connection
        .prepare_cached(select_letters!(
            "",
            "WHERE sequence < :before AND (:tenant_id IS NULL OR tenant_id = :tenant_id)
               AND (:model_id IS NULL OR model_id = :model_id)
             ORDER BY sequence DESC LIMIT :limit"
        ))?
        .query_map(
            named_params! {
                ":before": query.before.map_or(i64::MAX, integer),
                ":tenant_id": query.tenant_id.as_ref().map(protocol::TenantId::as_str),
                ":model_id": query.model_id.as_ref().map(protocol::ModelName::as_str),
                ":limit": limit,
            },
            letter,
        )?
        .collect::<rusqlite::Result<_>>()?;
    let next = dead_letters.last().filter(|_| dead_letters.len() as u32 == limit).map(|last| last.sequence);
    Ok(DeadLetterPage { dead_letters, next })
}

/// Returns the newest letter of a request, with its sealed payload.
pub(super) fn newest_of(
    connection: &Connection,
    id: &CorrelationId,
) -> rusqlite::Result<Option<(DeadLetter, Option<Vec<u8>>)>> {
    connection
        .prepare_cached(select_letters!(", payload", "WHERE correlation_id = ?1 ORDER BY sequence DESC LIMIT 1"))?
        .query_row((id.0.as_bytes(),), |row| Ok((letter(row)?, row.get("payload")?)))
        .optional()
}

/// Deletes letters and returns their number.
pub(super) fn purge(connection: &Connection, purge: &DeadLetterPurge) -> rusqlite::Result<u64> {
    let purged = connection
        .prepare_cached(
            "DELETE FROM dead_letters WHERE (?1 IS NULL OR correlation_id = ?1) AND (?2 IS NULL OR sequence = ?2)
               AND (?3 IS NULL OR died_at < ?3)",
        )?
        .execute((
            purge.correlation_id.map(|id| id.0.into_bytes()),
            purge.sequence.map(integer),
            purge.died_before.map(|UnixMillis(time)| integer(time)),
        ))?;
    Ok(purged as u64)
}

pub(super) fn count(connection: &Connection) -> rusqlite::Result<u64> {
    connection
        .prepare_cached("SELECT count(*) AS letters FROM dead_letters")?
        .query_row((), |found| row::unsigned(found, "letters"))
}

fn letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    let payload_bytes = match row.get::<_, Option<i64>>("payload_bytes")? {
        Some(_) => Some(row::unsigned(row, "payload_bytes")?),
        None => None,
    };
    Ok(DeadLetter {
        sequence: row::unsigned(row, "sequence")?,
        correlation_id: CorrelationId(Uuid::from_bytes(row.get("correlation_id")?)),
        tenant_id: row::parsed(row, "tenant_id")?,
        model: row::model_key(row)?,
        region: row::parsed(row, "region")?,
        trace_id: TraceId(row.get("trace_id")?),
        cause: row::known_word(row, "cause")?,
        error_code: row::known_word(row, "error_code")?,
        error_message: row.get("error_message")?,
        history: row::json(row, "history")?,
        created_at: row::time(row, "created_at")?,
        died_at: row::time(row, "died_at")?,
        payload_bytes,
        request: None,
    })
}
