//! Decodes SQLite columns into protocol types. A value that does not parse is an error, because the database file may
//! be damaged.

use std::str::FromStr;

use protocol::model::ModelKey;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, UnixMillis};
use rusqlite::Row;
use rusqlite::types::Type;
use serde::de::{DeserializeOwned, IntoDeserializer as _};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job_store::JobKey;

/// Converts to SQLite's signed integer. Values above `i64::MAX` are clamped.
pub(super) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Returns the error for a column with an invalid value.
pub(super) fn malformed(column: &str, reason: impl std::fmt::Display) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, format!("{column}: {reason}").into())
}

pub(super) fn parsed<T>(row: &Row<'_>, column: &str) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::fmt::Display>,
{
    row.get_ref(column)?.as_str()?.parse().map_err(|error| malformed(column, error))
}

/// Reads names separated by spaces.
pub(super) fn parsed_list<T>(row: &Row<'_>, column: &str) -> rusqlite::Result<Vec<T>>
where
    T: FromStr<Err: std::fmt::Display>,
{
    let names = row.get_ref(column)?.as_str()?.split(' ');
    names.map(|name| name.parse().map_err(|error| malformed(column, error))).collect()
}

/// Reads an enum variant, spelt as on the wire.
pub(super) fn word<T: for<'de> Deserialize<'de>>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>> {
    let Some(text) = row.get_ref(column)?.as_str_or_null()? else { return Ok(None) };
    let read: Result<T, serde::de::value::Error> = T::deserialize(text.into_deserializer());
    read.map(Some).map_err(|error| malformed(column, error))
}

/// Reads an enum variant that must be there.
pub(super) fn known_word<T: for<'de> Deserialize<'de>>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    word(row, column)?.ok_or_else(|| malformed(column, "it is missing"))
}

/// Reads a JSON document.
pub(super) fn json<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    serde_json::from_str(row.get_ref(column)?.as_str()?).map_err(|error| malformed(column, error))
}

/// Reads a JSON document that may be missing.
pub(super) fn json_or_null<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>> {
    let Some(text) = row.get_ref(column)?.as_str_or_null()? else { return Ok(None) };
    serde_json::from_str(text).map(Some).map_err(|error| malformed(column, error))
}

/// Returns a value as a JSON document.
pub(super) fn text_of_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("a plain value is JSON")
}

/// Reads an unsigned 64-bit number.
pub(super) fn unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    u64::try_from(row.get::<_, i64>(column)?).map_err(|error| malformed(column, error))
}

pub(super) fn time(row: &Row<'_>, column: &str) -> rusqlite::Result<UnixMillis> {
    unsigned(row, column).map(UnixMillis)
}

/// Reads a time that may be missing.
pub(super) fn time_or_null(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<UnixMillis>> {
    match row.get::<_, Option<i64>>(column)? {
        Some(_) => time(row, column).map(Some),
        None => Ok(None),
    }
}

/// Reads a job's key.
pub(super) fn job_key(row: &Row<'_>) -> rusqlite::Result<JobKey> {
    Ok(JobKey {
        tenant_id: parsed(row, "tenant_id")?,
        correlation_id: CorrelationId(Uuid::from_bytes(row.get("correlation_id")?)),
        retry_token: parsed(row, "retry_token")?,
    })
}

/// Reads a model's name and version.
pub(super) fn model_key(row: &Row<'_>) -> rusqlite::Result<ModelKey> {
    Ok(ModelKey { model_id: parsed(row, "model_id")?, version: parsed(row, "model_version")? })
}

/// Reads a job's token usage.
pub(super) fn token_usage(row: &Row<'_>) -> rusqlite::Result<TokenUsage> {
    Ok(TokenUsage {
        prompt_tokens: row.get("prompt_tokens")?,
        completion_tokens: row.get("completion_tokens")?,
        cached_tokens: row.get("cached_tokens")?,
        // Reasoning tokens are not billed, so they are not stored.
        reasoning_tokens: 0,
    })
}
