//! The usage ledger: one record for each billed job.

use protocol::usage::TokenUsage;
use protocol::{PublicKey, TenantId};
use rusqlite::{Connection, Row};

use super::row::{self, integer};
use crate::job_store::{UsageCursor, UsageRecord};

/// Bills a job that was settled in the same transaction. A second bill for the same job violates a constraint of the
/// table.
pub(super) fn bill(connection: &Connection, job_id: i64, usage: &TokenUsage) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO usage (job_id, tenant_id, correlation_id, retry_token, model_id, model_version, region,
                                worker_id, attempt, prompt_tokens, completion_tokens, cached_tokens, settled_at)
             SELECT job_id, tenant_id, correlation_id, retry_token, model_id, model_version, region,
                    worker_id, attempt, ?2, ?3, ?4, updated_at
             FROM jobs WHERE job_id = ?1",
        )?
        .execute((job_id, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens))?;
    Ok(())
}

/// Returns a tenant's records after a cursor.
pub(super) fn list(
    connection: &Connection,
    tenant_id: &TenantId,
    after: UsageCursor,
    limit: u32,
) -> rusqlite::Result<Vec<UsageRecord>> {
    let (settled_at, sequence) = after.parts();
    connection
        .prepare_cached(
            "SELECT * FROM usage WHERE tenant_id = ?1 AND (settled_at, sequence) > (?2, ?3)
             ORDER BY settled_at, sequence LIMIT ?4",
        )?
        .query_map((tenant_id.as_str(), integer(settled_at.0), integer(sequence), limit), record)?
        .collect()
}

fn record(row: &Row<'_>) -> rusqlite::Result<UsageRecord> {
    Ok(UsageRecord {
        sequence: row::unsigned(row, "sequence")?,
        key: row::job_key(row)?,
        model: row::model_key(row)?,
        region: row::parsed(row, "region")?,
        worker_id: PublicKey(row.get("worker_id")?),
        attempt: row.get("attempt")?,
        usage: row::token_usage(row)?,
        settled_at: row::time(row, "settled_at")?,
    })
}
