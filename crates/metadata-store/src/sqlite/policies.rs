//! The `policies` table: what each tenant may do.

use protocol::TenantId;
use protocol::policy::TenantPolicy;
use rusqlite::{Connection, OptionalExtension as _};

use super::row;

/// Sets a tenant's policy.
pub(super) fn put(connection: &Connection, tenant_id: &TenantId, policy: &TenantPolicy) -> rusqlite::Result<()> {
    let policy = serde_json::to_string(policy).expect("a policy holds nothing that JSON cannot say");
    connection
        .prepare_cached(
            "INSERT INTO policies (tenant_id, policy) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET policy = excluded.policy",
        )?
        .execute((tenant_id.as_str(), policy))?;
    Ok(())
}

/// Returns a tenant's policy.
pub(super) fn find(connection: &Connection, tenant_id: &TenantId) -> rusqlite::Result<Option<TenantPolicy>> {
    connection
        .prepare_cached("SELECT policy FROM policies WHERE tenant_id = ?1")?
        .query_row((tenant_id.as_str(),), |row| row::json(row, "policy"))
        .optional()
}

/// Returns every tenant's policy.
pub(super) fn list(connection: &Connection) -> rusqlite::Result<Vec<(TenantId, TenantPolicy)>> {
    connection
        .prepare_cached("SELECT tenant_id, policy FROM policies ORDER BY tenant_id")?
        .query_map((), |row| Ok((row::parsed(row, "tenant_id")?, row::json(row, "policy")?)))?
        .collect()
}
