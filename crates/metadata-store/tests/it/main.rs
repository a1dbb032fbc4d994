//! What every metadata store does, and what is particular to the SQLite one.

mod conformance;
mod quota_crashes;
mod sqlite;
