//! Reads jobs from the `jobs` table and settles them.

use protocol::infer::FinishReason;
use protocol::usage::TokenUsage;
use protocol::{PublicKey, TraceId};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::row::{self, integer};
use super::{answers, reservations, usage};
use crate::job_store::{
    DurableState, FinaliseError, Finalised, JobError, JobKey, JobRecord, Settlement, TerminalState,
};

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

/// Settles a job, frees its reservation and bills it.
pub(super) fn finalise(
    connection: &Connection,
    settlement: &Settlement,
) -> rusqlite::Result<Result<Finalised, FinaliseError>> {
    let Settlement { key, attempt, worker_id, state, finish_reason, error, usage, answer, now } = settlement;
    let job_id: Option<i64> = connection
        .prepare_cached(
            "UPDATE jobs SET state = :state, finish_reason = :finish_reason, error_code = :error_code,
                    error_message = :error_message, updated_at = :now
             WHERE tenant_id = :tenant_id AND correlation_id = :correlation_id AND retry_token = :retry_token
               AND attempt = :attempt AND worker_id = :worker_id AND state = 'reserved'
             RETURNING job_id",
        )?
        .query_row(
            named_params! {
                ":state": state.as_str(),
                ":finish_reason": finish_reason.map(FinishReason::as_str),
                ":error_code": error.as_ref().map(|error| error.code.as_str()),
                ":error_message": error.as_ref().map(|error| error.message.as_str()),
                ":now": integer(now.0),
                ":tenant_id": key.tenant_id.as_str(),
                ":correlation_id": key.correlation_id.0.as_bytes(),
                ":retry_token": key.retry_token.as_str(),
                ":attempt": attempt,
                ":worker_id": worker_id.0,
            },
            |row| row.get(0),
        )
        .optional()?;
    let Some(job_id) = job_id else {
        return refusal(connection, key);
    };
    reservations::free(connection, job_id)?;
    // A job of which the caller acknowledged nothing gets no line in the ledger.
    if let Some(usage) = usage.filter(|usage| state.is_billed() && *usage != TokenUsage::default()) {
        usage::bill(connection, job_id, &usage)?;
    }
    if let Some(answer) = answer {
        answers::keep(connection, job_id, answer)?;
    }
    // A dead letter for a failed or dead job would be written here, in this transaction.
    Ok(Ok(Finalised::Settled))
}

/// Returns why a settlement changed nothing.
fn refusal(connection: &Connection, key: &JobKey) -> rusqlite::Result<Result<Finalised, FinaliseError>> {
    Ok(match find(connection, key)? {
        None => Err(FinaliseError::NotFound),
        Some(JobRecord { state: DurableState::Settled(state), .. }) => Ok(Finalised::AlreadySettled { state }),
        Some(JobRecord { state: DurableState::Reserved, attempt, .. }) => Ok(Finalised::Stale { attempt }),
    })
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
    })
}

/// Reads a job's state.
pub(super) fn state(row: &Row<'_>) -> rusqlite::Result<DurableState> {
    Ok(match row.get_ref("state")?.as_str()? {
        "reserved" => DurableState::Reserved,
        "completed" => DurableState::Settled(TerminalState::Completed),
        "failed" => DurableState::Settled(TerminalState::Failed),
        "cancelled" => DurableState::Settled(TerminalState::Cancelled),
        "dead" => DurableState::Settled(TerminalState::Dead),
        other => return Err(row::malformed("state", format_args!("{other:?} is no state of a job"))),
    })
}
