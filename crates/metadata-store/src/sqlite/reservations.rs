//! Reservations: a worker's slots, held for the jobs that were sent to it.

use failpoints::failpoint;
use protocol::jobs::AttemptRecord;
use protocol::model::ModelKey;
use protocol::quota;
use protocol::usage::TokenUsage;
use protocol::{ErrorCode, PublicKey, UnixMillis, WorkerId};
use rusqlite::{Connection, named_params};

use super::row::{self, integer};
use super::{jobs, quotas};
use crate::fencing;
use crate::job_store::{JobRecord, Lease, NewJob, ReassignError, Reassignment, ReserveError, Reserved};

/// Writes a job and its reservation.
///
/// Conditions are checked before writing, so that a refusal has nothing to undo.
pub(super) fn reserve(connection: &Connection, job: &NewJob) -> rusqlite::Result<Result<Reserved, ReserveError>> {
    let NewJob { key, worker_id, worker_capacity, .. } = job;
    if !has_room(connection, worker_id, *worker_capacity, None)? {
        // A resend finds its job even while the worker is full.
        return Ok(match jobs::find(connection, key)? {
            Some(known) if !known.may_run_again(&job.request_fingerprint) => Ok(Reserved::Duplicate(Box::new(known))),
            _ => Err(ReserveError::NoCapacity { worker_id: *worker_id }),
        });
    }
    if let Err(refusal) = quotas::check(connection, job)? {
        // Nor does a resend need a quota.
        return Ok(match jobs::find(connection, key)? {
            Some(known) if !known.may_run_again(&job.request_fingerprint) => Ok(Reserved::Duplicate(Box::new(known))),
            _ => Err(ReserveError::Quota(Box::new(refusal))),
        });
    }
    if let Some(job_id) = insert_job(connection, job)? {
        hold(connection, job_id, job)?;
        failpoint!("store-reserves");
        return Ok(Ok(Reserved::New));
    }
    let known = jobs::find(connection, key)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    if !known.may_run_again(&job.request_fingerprint) {
        return Ok(Ok(Reserved::Duplicate(Box::new(known))));
    }
    let (job_id, attempt) = run_again(connection, job)?;
    hold(connection, job_id, job)?;
    Ok(Ok(Reserved::Again { attempt }))
}

/// Makes a settled job one that is reserved, as its next attempt.
fn run_again(connection: &Connection, job: &NewJob) -> rusqlite::Result<(i64, u32)> {
    let NewJob { key, model: ModelKey { model_id, version }, .. } = job;
    connection
        .prepare_cached(
            "UPDATE jobs SET state = 'reserved', attempt = attempt + 1, worker_id = :worker_id, model_id = :model_id,
                    model_version = :model_version, region = :region, trace_id = :trace_id, finish_reason = NULL,
                    error_code = NULL, error_message = NULL, updated_at = :now
             WHERE tenant_id = :tenant_id AND correlation_id = :correlation_id AND retry_token = :retry_token
             RETURNING job_id, attempt",
        )?
        .query_row(
            named_params! {
                ":worker_id": job.worker_id.0,
                ":model_id": model_id.as_str(),
                ":model_version": version.to_string(),
                ":region": job.region.as_str(),
                ":trace_id": job.trace_id.0,
                ":now": integer(job.now.0),
                ":tenant_id": key.tenant_id.as_str(),
                ":correlation_id": key.correlation_id.0.as_bytes(),
                ":retry_token": key.retry_token.as_str(),
            },
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
}

/// Writes a job and returns its row id, or `None` if the job is known.
fn insert_job(connection: &Connection, job: &NewJob) -> rusqlite::Result<Option<i64>> {
    let NewJob { key, model: ModelKey { model_id, version }, .. } = job;
    let inserted = connection
        .prepare_cached(
            "INSERT INTO jobs (tenant_id, correlation_id, retry_token, trace_id, model_id, model_version, region,
                               worker_id, attempt, state, request_fingerprint, created_at, updated_at)
             VALUES (:tenant_id, :correlation_id, :retry_token, :trace_id, :model_id, :model_version, :region,
                     :worker_id, :attempt, 'reserved', :request_fingerprint, :now, :now)
             ON CONFLICT DO NOTHING",
        )?
        .execute(named_params! {
            ":tenant_id": key.tenant_id.as_str(),
            ":correlation_id": key.correlation_id.0.as_bytes(),
            ":retry_token": key.retry_token.as_str(),
            ":trace_id": job.trace_id.0,
            ":model_id": model_id.as_str(),
            ":model_version": version.to_string(),
            ":region": job.region.as_str(),
            ":worker_id": job.worker_id.0,
            ":attempt": job.attempt,
            ":request_fingerprint": job.request_fingerprint,
            ":now": integer(job.now.0),
        })?;
    Ok((inserted == 1).then(|| connection.last_insert_rowid()))
}

/// Moves a job to another worker as its next attempt.
pub(super) fn reassign(
    connection: &Connection,
    reassignment: &Reassignment,
) -> rusqlite::Result<Result<(), ReassignError>> {
    let Reassignment { key, from_attempt, model, worker_id, worker_capacity, now, lease_until, history, .. } =
        reassignment;
    let Some((job_id, job)) = jobs::standing(connection, key)? else { return Ok(Err(ReassignError::NotFound)) };
    if let Err(stale) = fencing::check_move(&job, *from_attempt) {
        return Ok(Err(stale));
    }
    if !has_room(connection, worker_id, *worker_capacity, Some(job_id))? {
        return Ok(Err(ReassignError::NoCapacity { worker_id: *worker_id }));
    }
    // What the job holds of its tenant's quotas goes with it.
    if let Err(refusal) = quotas::raise(connection, job_id, reassignment)? {
        return Ok(Err(ReassignError::Quota(Box::new(refusal))));
    }
    connection
        .prepare_cached("UPDATE reservations SET worker_id = ?2, lease_until = ?3 WHERE job_id = ?1")?
        .execute((job_id, worker_id.0, integer(lease_until.0)))?;
    connection
        .prepare_cached(
            "UPDATE jobs SET attempt = attempt + 1, worker_id = ?2, updated_at = ?3, model_id = ?4, model_version = ?5,
                    history = ?6
             WHERE job_id = ?1",
        )?
        .execute((
            job_id,
            worker_id.0,
            integer(now.0),
            model.model_id.as_str(),
            model.version.to_string(),
            row::text_of_json(history),
        ))?;
    Ok(Ok(()))
}

/// Returns whether a worker may get another reservation, apart from that of one job. The count reads one index entry
/// per job of the worker.
fn has_room(
    connection: &Connection,
    worker_id: &WorkerId,
    capacity: u32,
    but_for: Option<i64>,
) -> rusqlite::Result<bool> {
    let held = connection
        .prepare_cached("SELECT count(*) FROM reservations WHERE worker_id = ?1 AND job_id IS NOT ?2")?
        .query_row((worker_id.0, but_for), |row| row.get(0))?;
    Ok(fencing::has_room(held, capacity))
}

/// Writes a job's reservation, on its worker and of its tenant's quotas.
fn hold(connection: &Connection, job_id: i64, job: &NewJob) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO reservations (job_id, worker_id, lease_until, tenant_id, tokens, reserved_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute((
            job_id,
            job.worker_id.0,
            integer(job.lease_until.0),
            if job.counts { job.key.tenant_id.as_str() } else { quotas::NOBODY },
            quotas::tokens_of(job.tokens),
            integer(job.now.0),
        ))?;
    if job.counts { quotas::reserve(connection, job) } else { Ok(()) }
}

/// Frees a job's slot and what it holds of its tenant's quotas. Returns what is billed of `usage`: if `is_bounded`, no
/// more than the job held.
pub(super) fn free(
    connection: &Connection,
    job_id: i64,
    usage: Option<TokenUsage>,
    is_bounded: bool,
) -> rusqlite::Result<Option<TokenUsage>> {
    let held = quotas::held(connection, job_id)?;
    connection.prepare_cached("DELETE FROM reservations WHERE job_id = ?1")?.execute((job_id,))?;
    let Some(held) = held else { return Ok(usage) };
    let billed = usage.map(|usage| if is_bounded { quota::within(usage, held.tokens) } else { usage });
    // A job that costs nothing may run again, and its request does not count either.
    let spent = billed.map(|usage| u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens));
    let spent = spent.filter(|spent| *spent > 0);
    quotas::settle(connection, &held, spent)?;
    Ok(billed)
}

/// Extends leases and returns those that are lost.
pub(super) fn renew(
    connection: &Connection,
    leases: &[Lease],
    lease_until: UnixMillis,
) -> rusqlite::Result<Vec<Lease>> {
    let mut extend =
        connection.prepare_cached("UPDATE reservations SET lease_until = max(lease_until, ?2) WHERE job_id = ?1")?;
    let mut lost = Vec::new();
    for lease in leases {
        let job = jobs::standing(connection, &lease.key)?;
        match job.filter(|(_, job)| fencing::may_renew(job, lease.attempt)) {
            Some((job_id, _)) => {
                extend.execute((job_id, integer(lease_until.0)))?;
            }
            None => lost.push(lease.clone()),
        }
    }
    Ok(lost)
}

/// Fails the jobs whose lease has expired and frees their slots.
pub(super) fn release_expired(
    connection: &Connection,
    now: UnixMillis,
    limit: u32,
) -> rusqlite::Result<Vec<JobRecord>> {
    let expired: Vec<i64> = connection
        .prepare_cached("SELECT job_id FROM reservations WHERE lease_until <= ?1 ORDER BY lease_until LIMIT ?2")?
        .query_map((integer(now.0), limit), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    release(connection, expired, now, "nobody renewed the job's reservation in time")
}

/// Fails all jobs that have a reservation and frees their slots.
pub(super) fn release_all(connection: &Connection, now: UnixMillis) -> rusqlite::Result<Vec<JobRecord>> {
    let held: Vec<i64> = connection
        .prepare_cached("SELECT job_id FROM reservations ORDER BY job_id")?
        .query_map((), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    release(connection, held, now, "the orchestrator of the job ended before the job did")
}

fn release(connection: &Connection, jobs: Vec<i64>, now: UnixMillis, why: &str) -> rusqlite::Result<Vec<JobRecord>> {
    let mut fail = connection.prepare_cached(
        "UPDATE jobs SET state = 'failed', error_code = ?2, error_message = ?3, updated_at = ?4 WHERE job_id = ?1",
    )?;
    jobs.into_iter()
        .map(|job_id| {
            let code = ErrorCode::WorkerFailed.as_str();
            fail.execute((job_id, code, why, integer(now.0)))?;
            free(connection, job_id, None, false)?;
            // No dead letter: that its orchestrator went away says nothing of the job, and only the orchestrator had
            // its request.
            let mut job = jobs::find_by_id(connection, job_id)?;
            if let Some(last) = job.history.last() {
                job.history.push(expired_attempt(last, &job, now));
                jobs::write_history(connection, job_id, &job.history)?;
            }
            Ok(job)
        })
        .collect()
}

/// Returns the attempt during which a lease expired.
fn expired_attempt(previous: &AttemptRecord, job: &JobRecord, now: UnixMillis) -> AttemptRecord {
    AttemptRecord {
        attempt: previous.attempt + 1,
        worker_id: job.worker_id,
        model: job.model.clone(),
        outcome: ErrorCode::WorkerFailed.as_str().to_owned(),
        began_at: previous.ended_at,
        ended_at: now,
        progressed: false,
        counted: false,
    }
}

/// Returns each worker that has reserved slots, with their number.
pub(super) fn active(connection: &Connection) -> rusqlite::Result<Vec<(WorkerId, u32)>> {
    connection
        .prepare_cached("SELECT worker_id, count(*) FROM reservations GROUP BY worker_id ORDER BY worker_id")?
        .query_map((), |row| Ok((PublicKey(row.get(0)?), row.get(1)?)))?
        .collect()
}
