//! Batches, their leases and the results of their lines.

use std::time::Duration;

use protocol::batches::{BatchCounts, BatchId, BatchRef, BatchStatus, BatchTimes};
use protocol::files::{FileId, FileRef};
use protocol::{PublicKey, TenantId, UnixMillis};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::files;
use super::row::{self, integer};
use crate::batch_store::{BatchChange, BatchCreated, BatchRecord, NewBatchRecord, NewLine};

/// How long a batch can be read after its end.
const KEPT: Duration = Duration::from_hours(30 * 24);

const SELECT: &str = "SELECT batches.*,
     coalesce(completed, (SELECT pieces FROM files WHERE files.tenant_id = batches.tenant_id AND file_id = output_file),
              0) AS lines_completed,
     coalesce(failed, (SELECT pieces FROM files WHERE files.tenant_id = batches.tenant_id AND file_id = error_file),
              0) AS lines_failed
     FROM batches";

pub(super) fn create(connection: &Connection, new: &NewBatchRecord, files_max: u32) -> rusqlite::Result<BatchCreated> {
    // Its gateway did not get the reply, and asks again.
    if let Some(known) = find(connection, &new.batch)?.filter(|known| known.input_file == new.input_file) {
        return Ok(BatchCreated::Created(Box::new(known)));
    }
    let BatchRef { tenant_id, id } = &new.batch;
    let of = |id: &FileId| FileRef { tenant_id: tenant_id.clone(), id: id.clone() };
    if files::find(connection, &of(&new.input_file), new.created_at)?.is_none() {
        return Ok(BatchCreated::NoInput);
    }
    if files::count(connection, &of(&new.input_file))?.saturating_add(2) > files_max {
        return Ok(BatchCreated::TooManyFiles);
    }
    for (file, name) in [&new.output_file, &new.error_file].into_iter().zip(&new.sealed_names) {
        let times = (new.created_at, new.expires_at);
        files::insert(connection, &of(file), "batch_output", "collecting", times, name)?;
    }
    let times = BatchTimes { created_at: new.created_at, expires_at: new.expires_at, ..BatchTimes::default() };
    connection
        .prepare_cached(
            "INSERT INTO batches (tenant_id, batch_id, endpoint, input_file, output_file, error_file, status, times,
                                  results_secs, sealed)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?
        .execute(params![
            tenant_id.as_str(),
            id.as_str(),
            new.endpoint,
            new.input_file.as_str(),
            new.output_file.as_str(),
            new.error_file.as_str(),
            BatchStatus::Validating.as_str(),
            row::text_of_json(&times),
            integer(new.results_secs),
            new.sealed
        ])?;
    let created = find(connection, &new.batch)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    Ok(BatchCreated::Created(Box::new(created)))
}

pub(super) fn find(connection: &Connection, batch: &BatchRef) -> rusqlite::Result<Option<BatchRecord>> {
    connection
        .prepare_cached(&format!("{SELECT} WHERE tenant_id = ?1 AND batch_id = ?2"))?
        .query_row((batch.tenant_id.as_str(), batch.id.as_str()), record)
        .optional()
}

pub(super) fn list(
    connection: &Connection,
    tenant_id: &TenantId,
    after: Option<&BatchId>,
    limit: u32,
) -> rusqlite::Result<Vec<BatchRecord>> {
    connection
        .prepare_cached(&format!(
            "{SELECT} WHERE tenant_id = ?1 AND (?2 IS NULL OR batch_id < ?2) ORDER BY batch_id DESC LIMIT ?3"
        ))?
        .query_map(params![tenant_id.as_str(), after.map(BatchId::as_str), limit], record)?
        .collect()
}

/// Gives the lease of the batch that has waited longest for a holder.
pub(super) fn claim(
    connection: &Connection,
    holder: PublicKey,
    working_on: &[BatchId],
    now: UnixMillis,
    lease_until: UnixMillis,
) -> rusqlite::Result<Option<BatchRecord>> {
    let names: Vec<&str> = working_on.iter().map(BatchId::as_str).collect();
    let claimed: Option<BatchRef> = connection
        .prepare_cached(
            "UPDATE batches SET epoch = epoch + 1, holder = ?1, lease_until = ?4
             WHERE (tenant_id, batch_id) IN (
                 SELECT tenant_id, batch_id FROM batches
                 WHERE remove_at IS NULL AND (lease_until <= ?3 OR holder = ?1)
                   AND batch_id NOT IN (SELECT value FROM json_each(?2))
                 ORDER BY lease_until, batch_id LIMIT 1)
             RETURNING tenant_id, batch_id",
        )?
        .query_row(params![holder.0, row::text_of_json(&names), integer(now.0), integer(lease_until.0)], reference)
        .optional()?;
    claimed.map_or(Ok(None), |batch| find(connection, &batch))
}

pub(super) fn step(connection: &Connection, change: &BatchChange) -> rusqlite::Result<Option<BatchRecord>> {
    let Some(mut known) = find(connection, &change.batch)? else { return Ok(None) };
    if change.epoch.is_some_and(|epoch| epoch != known.epoch) {
        return Ok(None);
    }
    let next = change.status.filter(|next| known.status.may_become(*next));
    if let Some(next) = next {
        known.status = next;
        known.times.note(next, change.now);
    }
    let total = change.total.filter(|_| next.is_some());
    let sealed = change.sealed.as_ref().filter(|_| next.is_some());
    let has_ended = next.is_some_and(BatchStatus::is_final);
    let remove_at = has_ended.then(|| integer(change.now.after(KEPT).0));
    connection
        .prepare_cached(
            "UPDATE batches SET status = ?3, times = ?4, total = coalesce(?5, total), sealed = coalesce(?6, sealed),
                                lease_until = max(lease_until, coalesce(?7, 0)), remove_at = coalesce(?8, remove_at),
                                completed = coalesce(?9, completed), failed = coalesce(?10, failed)
             WHERE tenant_id = ?1 AND batch_id = ?2",
        )?
        .execute(params![
            change.batch.tenant_id.as_str(),
            change.batch.id.as_str(),
            known.status.as_str(),
            row::text_of_json(&known.times),
            total,
            sealed,
            change.lease_until.map(|until| integer(until.0)),
            remove_at,
            has_ended.then_some(known.counts.completed),
            has_ended.then_some(known.counts.failed)
        ])?;
    if has_ended {
        publish_results(connection, &known, change.now)?;
    }
    find(connection, &change.batch)
}

/// Completes the result files that have lines, and deletes the others.
fn publish_results(connection: &Connection, batch: &BatchRecord, now: UnixMillis) -> rusqlite::Result<()> {
    let BatchRef { tenant_id, id } = &batch.batch;
    for file in [&batch.output_file, &batch.error_file] {
        connection
            .prepare_cached(
                "UPDATE files SET state = iif(pieces > 0, 'ready', 'removed'), created_at = ?4,
                     expires_at = iif(pieces > 0, ?4 + 1000 * (
                         SELECT results_secs FROM batches WHERE tenant_id = ?1 AND batch_id = ?3), 0)
                 WHERE tenant_id = ?1 AND file_id = ?2",
            )?
            .execute((tenant_id.as_str(), file.as_str(), id.as_str(), integer(now.0)))?;
    }
    Ok(())
}

pub(super) fn record_line(connection: &Connection, new: &NewLine) -> rusqlite::Result<bool> {
    let NewLine { batch, epoch, line, is_error, bytes, sealed, job } = new;
    let Some(known) = find(connection, batch)?.filter(|known| known.epoch == *epoch) else { return Ok(false) };
    let takes_results =
        matches!(known.status, BatchStatus::InProgress | BatchStatus::Finalizing | BatchStatus::Cancelling);
    if !takes_results {
        return Ok(false);
    }
    let (file, other) = (&known.output_file, &known.error_file);
    let (file, other) = if *is_error { (other, file) } else { (file, other) };
    let has_other: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM file_pieces WHERE file_id = ?1 AND piece = ?2)")?
        .query_row((other.as_str(), line), |row| row.get(0))?;
    if !has_other {
        let file = FileRef { tenant_id: batch.tenant_id.clone(), id: file.clone() };
        files::put(connection, &file, *line, *bytes, sealed)?;
    }
    connection
        .prepare_cached(
            "DELETE FROM answers WHERE job_id IN (
                 SELECT job_id FROM jobs WHERE tenant_id = ?1 AND correlation_id = ?2 AND retry_token = ?3)",
        )?
        .execute((job.tenant_id.as_str(), job.correlation_id.0.as_bytes(), job.retry_token.as_str()))?;
    Ok(true)
}

pub(super) fn lines(connection: &Connection, batch: &BatchRef, from: u32, to: u32) -> rusqlite::Result<Vec<u32>> {
    connection
        .prepare_cached(
            "SELECT piece FROM file_pieces JOIN batches ON file_id IN (output_file, error_file)
             WHERE tenant_id = ?1 AND batch_id = ?2 AND piece >= ?3 AND piece < ?4 ORDER BY piece",
        )?
        .query_map((batch.tenant_id.as_str(), batch.id.as_str(), from, to), |row| row.get(0))?
        .collect()
}

/// Forgets up to `limit` batches that ended long ago.
pub(super) fn prune(connection: &Connection, now: UnixMillis, limit: u32) -> rusqlite::Result<u32> {
    let removed = connection
        .prepare_cached(
            "DELETE FROM batches WHERE (tenant_id, batch_id) IN (
                 SELECT tenant_id, batch_id FROM batches WHERE remove_at <= ?1 LIMIT ?2)",
        )?
        .execute((integer(now.0), limit))?;
    Ok(removed as u32)
}

pub(super) fn open(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    let counts: Vec<BatchCounts> = connection
        .prepare_cached(&format!("{SELECT} WHERE remove_at IS NULL"))?
        .query_map((), |row| record(row).map(|batch| batch.counts))?
        .collect::<rusqlite::Result<_>>()?;
    let left = |counts: &BatchCounts| u64::from(counts.total.saturating_sub(counts.completed + counts.failed));
    Ok((counts.len() as u64, counts.iter().map(left).sum()))
}

fn reference(row: &Row<'_>) -> rusqlite::Result<BatchRef> {
    Ok(BatchRef { tenant_id: row::parsed(row, "tenant_id")?, id: row::parsed(row, "batch_id")? })
}

fn record(row: &Row<'_>) -> rusqlite::Result<BatchRecord> {
    Ok(BatchRecord {
        batch: reference(row)?,
        endpoint: row.get("endpoint")?,
        input_file: row::parsed(row, "input_file")?,
        output_file: row::parsed(row, "output_file")?,
        error_file: row::parsed(row, "error_file")?,
        status: row::known_word(row, "status")?,
        times: row::json(row, "times")?,
        counts: BatchCounts {
            total: row.get("total")?,
            completed: row.get("lines_completed")?,
            failed: row.get("lines_failed")?,
        },
        sealed: row.get("sealed")?,
        epoch: row::unsigned(row, "epoch")?,
    })
}
