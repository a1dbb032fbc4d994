//! `tether queue`: which requests wait for a free slot, and why.

use protocol::queue::{WaitingJob, WaitingJobs};

use super::jobs::{client, note_silent};
use super::{Context, Outcome};
use crate::args::QueueArgs;
use crate::output;

pub(super) async fn list(context: Context, args: &QueueArgs) -> anyhow::Result<Outcome> {
    let client = client(&context, &args.server)?;
    let listed: WaitingJobs = client.get(&format!("/admin/v1/queue?limit={}", args.limit)).await?;
    if context.json {
        output::json(&listed)?;
        return Ok(Outcome::Well);
    }
    let rows: Vec<Vec<String>> = listed.waiting.iter().map(row).collect();
    if rows.is_empty() {
        output::line("no request waits");
    } else {
        output::table(&["REQUEST", "TENANT", "CLASS", "MODEL", "PROMPT", "WAITED", "WHY", "STARTS IN"], &rows);
    }
    if listed.total > listed.waiting.len() as u64 {
        output::note(format!("{} requests wait; --limit shows more", listed.total));
    }
    note_silent(&listed.silent);
    Ok(Outcome::Well)
}

fn row(job: &WaitingJob) -> Vec<String> {
    vec![
        job.correlation_id.to_string(),
        job.tenant_id.to_string(),
        job.class.as_str().to_owned(),
        job.model.to_string(),
        job.prompt_tokens.to_string(),
        seconds(job.waited_ms),
        job.reason.as_str().to_owned(),
        job.starts_in_ms.map_or_else(|| "unknown".to_owned(), seconds),
    ]
}

fn seconds(millis: u64) -> String {
    format!("{}.{} s", millis / 1_000, millis % 1_000 / 100)
}

#[cfg(test)]
mod tests {
    use protocol::model::ModelKey;
    use protocol::policy::ServiceClass;
    use protocol::queue::WaitReason;

    use super::*;

    #[test]
    fn a_row_says_who_waits_how_long_and_why() {
        let job = WaitingJob {
            correlation_id: "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("an id"),
            tenant_id: "acme".parse().expect("a tenant"),
            class: ServiceClass::Batch,
            model: ModelKey { model_id: "m".parse().expect("a name"), version: "1.0".parse().expect("a version") },
            prompt_tokens: 120,
            waited_ms: 1_480,
            reason: WaitReason::ShareUsed,
            starts_in_ms: None,
        };
        assert_eq!(row(&job)[1..], ["acme", "batch", "m@1.0", "120", "1.4 s", "share used", "unknown"]);
    }
}
