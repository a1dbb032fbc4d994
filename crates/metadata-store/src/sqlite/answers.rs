//! Kept answers of completed jobs.

use std::collections::{BinaryHeap, HashMap, VecDeque};

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

/// Removes up to `limit` answers that have expired, and returns their number.
pub(super) fn remove_expired(connection: &Connection, now: UnixMillis, limit: u32) -> rusqlite::Result<u32> {
    let removed = connection
        .prepare_cached(
            "DELETE FROM answers WHERE job_id IN (
                 SELECT job_id FROM answers WHERE expires_at <= ?1 ORDER BY expires_at LIMIT ?2)",
        )?
        .execute((integer(now.0), limit))?;
    Ok(removed as u32)
}

/// Returns up to `limit` answers that are to go so that the others have at most `bytes_max` bytes.
pub(super) fn victims(connection: &Connection, bytes_max: u64, limit: u32) -> rusqlite::Result<Vec<i64>> {
    let size: i64 = connection.prepare_cached("SELECT bytes FROM answers_size")?.query_row((), |row| row.get(0))?;
    let excess = size.saturating_sub(integer(bytes_max));
    if excess <= 0 || limit == 0 {
        return Ok(vec![]);
    }
    // SQLite knows the length of a blob without reading it.
    let kept: Vec<Kept> = connection
        .prepare_cached(
            "SELECT answers.job_id, tenant_id, length(sealed) FROM answers JOIN jobs ON jobs.job_id = answers.job_id
             ORDER BY expires_at, answers.job_id",
        )?
        .query_map((), |row| Ok(Kept { id: row.get(0)?, tenant_id: row.get(1)?, bytes: row.get(2)? }))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(choose(kept, excess, limit as usize))
}

pub(super) fn remove(connection: &Connection, jobs: &[i64]) -> rusqlite::Result<u32> {
    let mut remove = connection.prepare_cached("DELETE FROM answers WHERE job_id = ?1")?;
    let mut removed = 0;
    for job_id in jobs {
        removed += remove.execute((job_id,))?;
    }
    Ok(removed as u32)
}

/// What takes room in the store.
pub(super) struct Kept {
    pub(super) id: i64,
    pub(super) tenant_id: String,
    pub(super) bytes: i64,
}

/// Chooses items of together at least `excess` bytes, but at most `limit`: always the first of the tenant that has
/// most then.
pub(super) fn choose(kept: Vec<Kept>, excess: i64, limit: usize) -> Vec<i64> {
    let mut tenants = HashMap::<String, (i64, VecDeque<(i64, i64)>)>::new();
    for Kept { id, tenant_id, bytes } in kept {
        let (total, items) = tenants.entry(tenant_id).or_default();
        *total += bytes;
        items.push_back((id, bytes));
    }
    let mut by_total: BinaryHeap<(i64, VecDeque<(i64, i64)>)> = tenants.into_values().collect();
    let (mut chosen, mut freed) = (vec![], 0);
    while freed < excess && chosen.len() < limit {
        let Some((total, mut items)) = by_total.pop() else { break };
        if let Some((id, bytes)) = items.pop_front() {
            chosen.push(id);
            freed += bytes;
            by_total.push((total - bytes, items));
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenant_that_has_most_gives_way_first() {
        let kept = |id, tenant: &str, bytes| Kept { id, tenant_id: tenant.to_owned(), bytes };
        let all = || {
            vec![kept(1, "small", 10), kept(2, "big", 30), kept(3, "big", 30), kept(4, "small", 10), kept(5, "big", 5)]
        };
        assert_eq!(choose(all(), 1, 9), [2]);
        assert_eq!(choose(all(), 31, 9), [2, 3]);
        assert_eq!(choose(all(), 61, 9), [2, 3, 1]);
        assert_eq!(choose(all(), 85, 9).len(), 5);
        assert_eq!(choose(all(), 1_000, 2), [2, 3]);
        assert_eq!(choose(vec![], 1, 9), Vec::<i64>::new());
    }
}
