//! `tether batch`: lists, shows and cancels the batches of the API key's tenant.

use protocol::UnixMillis;
use serde::Deserialize;
use serde_json::{Value, json};

use super::jobs::client;
use super::token::date;
use super::{Context, Outcome};
use crate::args::{BatchListArgs, BatchRefArgs};
use crate::output;

/// What is shown of a batch.
#[derive(Debug, Deserialize)]
struct Batch {
    id: String,
    endpoint: String,
    status: String,
    created_at: u64,
    expires_at: u64,
    request_counts: Counts,
    input_file_id: String,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Counts {
    total: u64,
    completed: u64,
    failed: u64,
}

pub(super) async fn list(context: Context, args: &BatchListArgs) -> anyhow::Result<Outcome> {
    let page: Value = client(&context, &args.server)?.get(&format!("/v1/batches?limit={}", args.limit)).await?;
    if context.json {
        output::json(&page)?;
        return Ok(Outcome::Well);
    }
    let batches: Vec<Batch> = serde_json::from_value(page["data"].clone())?;
    let rows: Vec<Vec<String>> = batches.iter().map(row).collect();
    output::table(&["BATCH", "STATUS", "ENDPOINT", "REQUESTS", "ANSWERED", "FAILED", "CREATED"], &rows);
    if page["has_more"] == true {
        output::note(format!("there are more batches than {}; --limit shows more", args.limit));
    }
    Ok(Outcome::Well)
}

pub(super) async fn show(context: Context, args: &BatchRefArgs) -> anyhow::Result<Outcome> {
    let batch: Value = client(&context, &args.server)?.get(&format!("/v1/batches/{}", args.batch)).await?;
    shown(&context, batch)
}

pub(super) async fn cancel(context: Context, args: &BatchRefArgs) -> anyhow::Result<Outcome> {
    let path = format!("/v1/batches/{}/cancel", args.batch);
    let batch: Value = client(&context, &args.server)?.post(&path, &json!({})).await?;
    shown(&context, batch)
}

fn shown(context: &Context, batch: Value) -> anyhow::Result<Outcome> {
    if context.json {
        output::json(&batch)?;
        return Ok(Outcome::Well);
    }
    output::shown(described(&serde_json::from_value(batch)?));
    Ok(Outcome::Well)
}

fn row(batch: &Batch) -> Vec<String> {
    let Counts { total, completed, failed } = batch.request_counts;
    let counts = [total, completed, failed].map(|count| count.to_string());
    let mut row = vec![batch.id.clone(), batch.status.clone(), batch.endpoint.clone()];
    row.extend(counts);
    row.push(day(batch.created_at));
    row
}

fn described(batch: &Batch) -> String {
    let Counts { total, completed, failed } = batch.request_counts;
    let file = |id: &Option<String>| id.clone().unwrap_or_else(|| "none yet".to_owned());
    format!(
        "{}: {}\n  endpoint  {}\n  requests  {total}, {completed} answered, {failed} failed\n  created   {}\n  \
         expires   {}\n  input     {}\n  answers   {}\n  errors    {}",
        batch.id,
        batch.status,
        batch.endpoint,
        day(batch.created_at),
        day(batch.expires_at),
        batch.input_file_id,
        file(&batch.output_file_id),
        file(&batch.error_file_id),
    )
}

fn day(seconds: u64) -> String {
    date(UnixMillis(seconds.saturating_mul(1000)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_shows_how_far_it_is() {
        let batch: Batch = serde_json::from_value(json!({
            "id": "batch_1", "endpoint": "/v1/embeddings", "status": "in_progress", "created_at": 0, "expires_at": 86_400,
            "request_counts": {"total": 9, "completed": 5, "failed": 1}, "input_file_id": "file-1",
            "output_file_id": null, "error_file_id": null,
        }))
        .expect("a batch");
        assert_eq!(row(&batch)[..6], ["batch_1", "in_progress", "/v1/embeddings", "9", "5", "1"]);
        let described = described(&batch);
        assert!(described.contains("9, 5 answered, 1 failed") && described.contains("none yet"), "{described}");
    }
}
