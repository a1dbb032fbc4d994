//! Stores each worker's high-water mark, the epoch and sequence number of its last accepted health report. Reports at
//! or below the mark are replays.

use protocol::presence::HighWater;
use protocol::{PublicKey, WorkerId};
use rusqlite::Connection;

/// Returns the high-water marks of all workers.
pub(super) fn high_waters(connection: &Connection) -> rusqlite::Result<Vec<(WorkerId, HighWater)>> {
    connection
        .prepare_cached("SELECT worker_id, mark FROM high_waters ORDER BY worker_id")?
        .query_map((), |row| Ok((PublicKey(row.get("worker_id")?), from_bytes(row.get("mark")?))))?
        .collect()
}

/// Raises high-water marks. A mark is never lowered.
pub(super) fn raise(connection: &Connection, marks: &[(WorkerId, HighWater)]) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached(
        "INSERT INTO high_waters (worker_id, mark) VALUES (?1, ?2)
         ON CONFLICT DO UPDATE SET mark = excluded.mark WHERE mark < excluded.mark",
    )?;
    for (worker_id, mark) in marks {
        statement.execute((worker_id.0, to_bytes(*mark)))?;
    }
    Ok(())
}

fn to_bytes(mark: HighWater) -> [u8; 16] {
    (u128::from(mark.epoch) << 64 | u128::from(mark.seq)).to_be_bytes()
}

fn from_bytes(bytes: [u8; 16]) -> HighWater {
    let pair = u128::from_be_bytes(bytes);
    HighWater { epoch: (pair >> 64) as u64, seq: pair as u64 }
}
