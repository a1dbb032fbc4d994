//! The `quota_windows` table: what each tenant has used, and what its running jobs may still use.
//!
//! Every job is counted, also that of a tenant without limits, so that a new limit counts what was used before it.

use protocol::quota::{Amount, QuotaLimits, QuotaRefusal, QuotaUsage, Window};
use protocol::{TenantId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, named_params};

use super::row::{self, integer};
use crate::job_store::{NewJob, Reassignment};

/// The most tokens that one job reserves, so that sums do not overflow. No job uses as many.
const TOKENS_MAX: u64 = 1 << 40;
/// The tenant of a reservation that holds nothing of any tenant's quotas. No tenant has this name.
pub(super) const NOBODY: &str = "";

/// What a job holds of its tenant's quotas.
pub(super) struct Held {
    tenant_id: String,
    pub(super) tokens: u64,
    reserved_at: UnixMillis,
}

/// Returns the tokens that a job reserves.
pub(super) fn tokens_of(tokens: u64) -> i64 {
    integer(tokens.min(TOKENS_MAX))
}

/// Checks that a job fits within its tenant's limits.
pub(super) fn check(connection: &Connection, job: &NewJob) -> rusqlite::Result<Result<(), QuotaRefusal>> {
    let NewJob { key, limits, tokens, now, counts, .. } = job;
    if limits.is_empty() || !counts {
        return Ok(Ok(()));
    }
    Ok(usage(connection, &key.tenant_id, limits, *now)?.check(limits, *tokens, *now))
}

/// Reserves what a job may use. Its reservation says how much that is.
pub(super) fn reserve(connection: &Connection, job: &NewJob) -> rusqlite::Result<()> {
    for window in Window::ALL {
        let start = window.start(job.now);
        let added = connection
            .prepare_cached(
                "UPDATE quota_windows SET tokens_reserved = tokens_reserved + ?4, requests_reserved = requests_reserved + 1
                 WHERE tenant_id = ?1 AND window = ?2 AND window_start = ?3",
            )?
            .execute((job.key.tenant_id.as_str(), window.as_str(), integer(start.0), tokens_of(job.tokens)))?;
        if added == 0 {
            begin(connection, job, window, start)?;
        }
    }
    Ok(())
}

/// Raises what a job holds to what it may use on its next worker, if that is more and fits within the limits. It stays
/// in the windows in which it was reserved.
pub(super) fn raise(
    connection: &Connection,
    job_id: i64,
    reassignment: &Reassignment,
) -> rusqlite::Result<Result<(), QuotaRefusal>> {
    let Reassignment { key, limits, tokens, .. } = reassignment;
    let tokens = (*tokens).min(TOKENS_MAX);
    let Some(held) = held(connection, job_id)?.filter(|held| held.tokens < tokens) else { return Ok(Ok(())) };
    // It is counted among the requests and the running jobs already.
    let limits = QuotaLimits { requests_per_day: None, concurrent_jobs: None, ..*limits };
    if !limits.is_empty() {
        let mut others = usage(connection, &key.tenant_id, &limits, held.reserved_at)?;
        for amount in [&mut others.minute_tokens, &mut others.day_tokens] {
            amount.reserved = amount.reserved.saturating_sub(held.tokens);
        }
        if let Err(refusal) = others.check(&limits, tokens, held.reserved_at) {
            return Ok(Err(refusal));
        }
    }
    let more = integer(tokens - held.tokens);
    for window in Window::ALL {
        let start = window.start(held.reserved_at);
        connection
            .prepare_cached(
                "UPDATE quota_windows SET tokens_reserved = tokens_reserved + ?4
                 WHERE tenant_id = ?1 AND window = ?2 AND window_start = ?3",
            )?
            .execute((&held.tenant_id, window.as_str(), integer(start.0), more))?;
    }
    connection
        .prepare_cached("UPDATE reservations SET tokens = ?2 WHERE job_id = ?1")?
        .execute((job_id, integer(tokens)))?;
    Ok(Ok(()))
}

/// Begins a window, and removes the tenant's earlier ones in which nothing is reserved.
fn begin(connection: &Connection, job: &NewJob, window: Window, start: UnixMillis) -> rusqlite::Result<()> {
    let tenant_id = job.key.tenant_id.as_str();
    connection
        .prepare_cached(
            "DELETE FROM quota_windows
             WHERE tenant_id = ?1 AND window = ?2 AND window_start < ?3 AND requests_reserved = 0",
        )?
        .execute((tenant_id, window.as_str(), integer(start.0)))?;
    connection
        .prepare_cached(
            "INSERT INTO quota_windows (tenant_id, window, window_start, tokens_reserved, requests_reserved)
             VALUES (?1, ?2, ?3, ?4, 1)",
        )?
        .execute((tenant_id, window.as_str(), integer(start.0), tokens_of(job.tokens)))?;
    Ok(())
}

/// Returns what a job holds, if it counts against its tenant's quotas.
pub(super) fn held(connection: &Connection, job_id: i64) -> rusqlite::Result<Option<Held>> {
    connection
        .prepare_cached(
            "SELECT tenant_id, tokens, reserved_at FROM reservations WHERE job_id = ?1 AND tenant_id <> ?2",
        )?
        .query_row((job_id, NOBODY), |row| {
            Ok(Held { tenant_id: row.get(0)?, tokens: number(row, 1)?, reserved_at: UnixMillis(number(row, 2)?) })
        })
        .optional()
}

/// Ends what a job holds, in the windows in which it was reserved. `spent` is what it is billed, if it is billed.
pub(super) fn settle(connection: &Connection, held: &Held, spent: Option<u64>) -> rusqlite::Result<()> {
    for window in Window::ALL {
        connection
            .prepare_cached(
                "UPDATE quota_windows SET
                    tokens_reserved = tokens_reserved - :tokens, requests_reserved = requests_reserved - 1,
                    tokens_spent = tokens_spent + :spent, requests_spent = requests_spent + :requests
                 WHERE tenant_id = :tenant_id AND window = :window AND window_start = :window_start",
            )?
            .execute(named_params! {
                ":tokens": integer(held.tokens),
                ":spent": integer(spent.unwrap_or_default()),
                ":requests": i64::from(spent.is_some()),
                ":tenant_id": held.tenant_id,
                ":window": window.as_str(),
                ":window_start": integer(window.start(held.reserved_at).0),
            })?;
    }
    Ok(())
}

/// Returns what a tenant uses at a time, as far as the limits need it.
fn usage(
    connection: &Connection,
    tenant_id: &TenantId,
    limits: &QuotaLimits,
    now: UnixMillis,
) -> rusqlite::Result<QuotaUsage> {
    let (mut usage, tenant) = (QuotaUsage::default(), tenant_id.as_str());
    if limits.tokens_per_minute.is_some() {
        (usage.minute_tokens, _) = amounts(connection, tenant, Window::Minute, now)?;
    }
    if limits.tokens_per_day.is_some() || limits.requests_per_day.is_some() {
        (usage.day_tokens, usage.day_requests) = amounts(connection, tenant, Window::Day, now)?;
    }
    if limits.concurrent_jobs.is_some() {
        // A job is reserved in the day in which it began, and stays there until it ends.
        usage.jobs = connection
            .prepare_cached(
                "SELECT coalesce(sum(requests_reserved), 0) FROM quota_windows WHERE tenant_id = ?1 AND window = ?2",
            )?
            .query_row((tenant, Window::Day.as_str()), |row| row.get(0))?;
    }
    Ok(usage)
}

/// Returns everything that a tenant uses at a time.
pub(super) fn of_tenant(
    connection: &Connection,
    tenant_id: &TenantId,
    now: UnixMillis,
) -> rusqlite::Result<QuotaUsage> {
    let all = QuotaLimits {
        requests_per_day: Some(0),
        tokens_per_minute: Some(0),
        tokens_per_day: Some(0),
        concurrent_jobs: Some(0),
    };
    usage(connection, tenant_id, &all, now)
}

/// Returns the tokens and the requests of a window.
fn amounts(
    connection: &Connection,
    tenant_id: &str,
    window: Window,
    now: UnixMillis,
) -> rusqlite::Result<(Amount, Amount)> {
    let found = connection
        .prepare_cached(
            "SELECT tokens_spent, tokens_reserved, requests_spent, requests_reserved FROM quota_windows
             WHERE tenant_id = ?1 AND window = ?2 AND window_start = ?3",
        )?
        .query_row((tenant_id, window.as_str(), integer(window.start(now).0)), |row| {
            let tokens = Amount { spent: number(row, 0)?, reserved: number(row, 1)? };
            Ok((tokens, Amount { spent: number(row, 2)?, reserved: number(row, 3)? }))
        })
        .optional()?;
    Ok(found.unwrap_or_default())
}

/// Reads a number that a sound file never has negative.
fn number(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(index)?).unwrap_or_default())
}

/// Returns the tenants that have used or reserved something in the day that contains a time, ordered by name.
pub(super) fn tenants(connection: &Connection, now: UnixMillis, limit: u32) -> rusqlite::Result<Vec<TenantId>> {
    connection
        .prepare_cached(
            "SELECT DISTINCT tenant_id FROM quota_windows WHERE window = 'day' AND window_start = ?1
             ORDER BY tenant_id LIMIT ?2",
        )?
        .query_map((integer(Window::Day.start(now).0), limit), |row| row::parsed(row, "tenant_id"))?
        .collect()
}
