//! Reads jobs from the `jobs` table, settles them, and removes old ones.

use failpoints::failpoint;
use protocol::infer::FinishReason;
use protocol::jobs::{AttemptRecord, JobQuery, JobStatus, PAGE_MAX};
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ModelName, PublicKey, TenantId, TraceId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::row::{self, integer};
use super::{answers, dead_letters, notes, reservations, usage};
use crate::fencing::{self, Standing};
use crate::job_store::{
    DurableState, FinaliseError, Finalised, JobError, JobKey, JobRecord, RecordPage, Settlement, TerminalState,
};

/// The most jobs that one page looks at, so that a filter that matches little does not hold up other reads.
const SCANNED_MAX: i64 = 10_000;

/// Selects jobs with their reservation and usage, if they have them.
macro_rules! select_jobs {
    ($condition:literal) => {
        concat!(
            "SELECT jobs.*, lease_until, prompt_tokens, completion_tokens, cached_tokens FROM jobs ",
            "LEFT JOIN reservations ON reservations.job_id = jobs.job_id ",
            "LEFT JOIN usage ON usage.job_id = jobs.job_id ",
            $condition
        )
    };
}

pub(super) fn find(connection: &Connection, key: &JobKey) -> rusqlite::Result<Option<JobRecord>> {
    let sql = select_jobs!("WHERE jobs.tenant_id = ?1 AND jobs.correlation_id = ?2 AND jobs.retry_token = ?3");
    connection
        .prepare_cached(sql)?
        .query_row((key.tenant_id.as_str(), key.correlation_id.0.as_bytes(), key.retry_token.as_str()), record)
        .optional()
}

/// Returns the job with a row id.
pub(super) fn find_by_id(connection: &Connection, job_id: i64) -> rusqlite::Result<JobRecord> {
    connection.prepare_cached(select_jobs!("WHERE jobs.job_id = ?1"))?.query_row((job_id,), record)
}

/// Returns the newest jobs of a request.
pub(super) fn of_request(connection: &Connection, id: &CorrelationId) -> rusqlite::Result<Vec<JobRecord>> {
    let sql = select_jobs!("WHERE jobs.correlation_id = ?1 ORDER BY jobs.job_id DESC LIMIT ?2");
    connection.prepare_cached(sql)?.query_map((id.0.as_bytes(), PAGE_MAX), record)?.collect()
}

/// Returns a page of jobs, the newest first.
pub(super) fn list(connection: &Connection, query: &JobQuery) -> rusqlite::Result<RecordPage> {
    let newest: i64 =
        connection.prepare_cached("SELECT coalesce(max(job_id), 0) FROM jobs")?.query_row((), |row| row.get(0))?;
    let before = query.before.map_or(i64::MAX, integer).min(newest.saturating_add(1));
    // Running jobs are few: they are found by their reservations, however old they are.
    let is_running = query.status == Some(JobStatus::Running);
    let lowest = if is_running { 0 } else { before.saturating_sub(SCANNED_MAX).max(0) };
    let limit = query.limit.clamp(1, PAGE_MAX);
    let sql = if is_running {
        select_jobs!(
            "WHERE jobs.job_id IN (SELECT job_id FROM reservations) AND jobs.job_id < :before AND jobs.job_id >= :lowest
               AND (:state IS NULL OR state = :state) AND (:tenant_id IS NULL OR jobs.tenant_id = :tenant_id)
               AND (:model_id IS NULL OR jobs.model_id = :model_id)
             ORDER BY jobs.job_id DESC LIMIT :limit"
        )
    } else {
        select_jobs!(
            "WHERE jobs.job_id < :before AND jobs.job_id >= :lowest
               AND (:state IS NULL OR state = :state) AND (:tenant_id IS NULL OR jobs.tenant_id = :tenant_id)
               AND (:model_id IS NULL OR jobs.model_id = :model_id)
             ORDER BY jobs.job_id DESC LIMIT :limit"
        )
    };
    let jobs: Vec<JobRecord> = connection
        .prepare_cached(sql)?
        .query_map(
            named_params! {
                ":before": before,
                ":lowest": lowest,
                ":state": query.status.map(name_of),
                ":tenant_id": query.tenant_id.as_ref().map(TenantId::as_str),
                ":model_id": query.model_id.as_ref().map(ModelName::as_str),
                ":limit": limit,
            },
            record,
        )?
        .collect::<rusqlite::Result<_>>()?;
    let next = if jobs.len() as u32 == limit {
        jobs.last().map(|last| last.sequence)
    } else {
        (lowest > 0).then_some(lowest as u64)
    };
    Ok(RecordPage { jobs, next })
}

/// Returns a status's name in the database.
fn name_of(status: JobStatus) -> &'static str {
    if status == JobStatus::Running { DurableState::Reserved.as_str() } else { status.as_str() }
}

/// Removes up to `limit` jobs that were settled before a time, the oldest first, and returns their number. Their usage
/// and their dead letters stay.
pub(super) fn prune(connection: &Connection, settled_before: UnixMillis, limit: u32) -> rusqlite::Result<u32> {
    let removed = connection
        .prepare_cached(
            "DELETE FROM jobs WHERE job_id IN (
                 SELECT job_id FROM jobs WHERE state <> 'reserved' AND updated_at < ?1 ORDER BY updated_at LIMIT ?2)",
        )?
        .execute((integer(settled_before.0), limit))?;
    Ok(removed as u32)
}

/// Returns a job's row id, and what decides on writes of it.
pub(super) fn standing(connection: &Connection, key: &JobKey) -> rusqlite::Result<Option<(i64, Standing)>> {
    let sql = "SELECT job_id, attempt, worker_id, state FROM jobs
               WHERE tenant_id = ?1 AND correlation_id = ?2 AND retry_token = ?3";
    connection
        .prepare_cached(sql)?
        .query_row((key.tenant_id.as_str(), key.correlation_id.0.as_bytes(), key.retry_token.as_str()), |row| {
            let worker_id = PublicKey(row.get("worker_id")?);
            Ok((row.get("job_id")?, Standing { attempt: row.get("attempt")?, worker_id, state: state(row)? }))
        })
        .optional()
}

/// Settles a job, frees its reservation, bills it, and writes its dead letter.
pub(super) fn finalise(
    connection: &Connection,
    settlement: &Settlement,
) -> rusqlite::Result<Result<Finalised, FinaliseError>> {
    let Settlement { key, attempt, worker_id, state, finish_reason, error, usage, answer, now, .. } = settlement;
    let Some((job_id, job)) = standing(connection, key)? else { return Ok(Err(FinaliseError::NotFound)) };
    let outcome = fencing::settle(&job, *attempt, *worker_id);
    if outcome != Finalised::Settled {
        return Ok(Ok(outcome));
    }
    connection
        .prepare_cached(
            "UPDATE jobs SET state = :state, finish_reason = :finish_reason, error_code = :error_code,
                    error_message = :error_message, history = :history, continued = :continued, updated_at = :now
             WHERE job_id = :job_id",
        )?
        .execute(named_params! {
            ":state": state.as_str(),
            ":finish_reason": finish_reason.map(FinishReason::as_str),
            ":error_code": error.as_ref().map(|error| error.code.as_str()),
            ":error_message": error.as_ref().map(|error| error.message.as_str()),
            ":history": history(&settlement.history, error.is_some()),
            ":continued": settlement.continued,
            ":now": integer(now.0),
            ":job_id": job_id,
        })?;
    let usage = reservations::free(connection, job_id, usage.filter(|_| state.is_billed()), settlement.is_bounded)?;
    // A job of which the caller acknowledged nothing gets no line in the ledger.
    if let Some(usage) = usage.filter(|usage| *usage != TokenUsage::default()) {
        usage::bill(connection, job_id, &usage)?;
    }
    if let Some(answer) = answer {
        answers::keep(connection, job_id, answer)?;
    }
    if let Some(note) = &settlement.note {
        notes::keep(connection, note)?;
    }
    if let Some(letter) = &settlement.dead_letter {
        dead_letters::write(connection, job_id, letter)?;
    }
    failpoint!("store-settles");
    Ok(Ok(outcome))
}

/// Replaces the history of a job.
pub(super) fn write_history(connection: &Connection, job_id: i64, attempts: &[AttemptRecord]) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE jobs SET history = ?2 WHERE job_id = ?1")?
        .execute((job_id, row::text_of_json(&attempts)))?;
    Ok(())
}

/// Returns the column `history`. The row itself describes a single attempt that did not fail.
fn history(attempts: &[AttemptRecord], has_failed: bool) -> Option<String> {
    (attempts.len() > 1 || has_failed).then(|| row::text_of_json(&attempts))
}

fn record(row: &Row<'_>) -> rusqlite::Result<JobRecord> {
    let error = match row::word(row, "error_code")? {
        Some(code) => Some(JobError { code, message: row.get("error_message")? }),
        None => None,
    };
    let usage: Option<TokenUsage> = match row.get::<_, Option<i64>>("prompt_tokens")? {
        Some(_) => Some(row::token_usage(row)?),
        None => None,
    };
    Ok(JobRecord {
        sequence: row::unsigned(row, "job_id")?,
        key: row::job_key(row)?,
        trace_id: TraceId(row.get("trace_id")?),
        model: row::model_key(row)?,
        region: row::parsed(row, "region")?,
        worker_id: PublicKey(row.get("worker_id")?),
        attempt: row.get("attempt")?,
        state: state(row)?,
        finish_reason: row::word(row, "finish_reason")?,
        error,
        usage,
        request_fingerprint: row.get("request_fingerprint")?,
        lease_until: row::time_or_null(row, "lease_until")?,
        created_at: row::time(row, "created_at")?,
        updated_at: row::time(row, "updated_at")?,
        continued: row.get("continued")?,
        history: row::json_or_null(row, "history")?.unwrap_or_default(),
    })
}

/// Reads a job's state.
fn state(row: &Row<'_>) -> rusqlite::Result<DurableState> {
    Ok(match row.get_ref("state")?.as_str()? {
        "reserved" => DurableState::Reserved,
        "completed" => DurableState::Settled(TerminalState::Completed),
        "failed" => DurableState::Settled(TerminalState::Failed),
        "cancelled" => DurableState::Settled(TerminalState::Cancelled),
        "dead" => DurableState::Settled(TerminalState::Dead),
        other => return Err(row::malformed("state", format_args!("{other:?} is no state of a job"))),
    })
}
