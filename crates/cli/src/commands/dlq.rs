//! `tether dlq`: lists, shows, replays and deletes dead letters.

use std::time::Duration;

use anyhow::bail;
use protocol::jobs::{DeadLetter, DeadLetterList, DeadLetterReplayed, DeadLettersPurged, JobStatus};
use protocol::{Clock as _, UnixMillis};
use rpc::SystemClock;
use serde_json::json;

use super::jobs::{attempts, client, note_silent, request_id};
use super::token::{confirm, date};
use super::{Context, Outcome};
use crate::args::{DlqListArgs, DlqPurgeArgs, DlqReplayArgs, DlqShowArgs};
use crate::output;

/// The most letters that are asked for at once.
const PAGE: u32 = 200;

pub(super) async fn list(context: Context, args: &DlqListArgs) -> anyhow::Result<Outcome> {
    let client = client(&context, &args.server)?;
    let filters = [
        args.tenant.as_ref().map(|tenant| format!("&tenant={tenant}")),
        args.model.as_ref().map(|model| format!("&model={model}")),
    ];
    let filters: String = filters.into_iter().flatten().collect();
    let mut listed = DeadLetterList::default();
    loop {
        let wanted = (args.limit - listed.dead_letters.len() as u32).min(PAGE);
        let after = listed.next.as_ref().map(|next| format!("&after={next}")).unwrap_or_default();
        let page: DeadLetterList =
            client.get(&format!("/admin/v1/dead-letters?limit={wanted}{filters}{after}")).await?;
        listed.dead_letters.extend(page.dead_letters);
        (listed.next, listed.silent) = (page.next, page.silent);
        if listed.next.is_none() || listed.dead_letters.len() as u32 >= args.limit {
            break;
        }
    }
    if context.json {
        output::json(&listed)?;
        return Ok(Outcome::Well);
    }
    let rows: Vec<Vec<String>> = listed.dead_letters.iter().map(row).collect();
    output::table(&["REQUEST", "TENANT", "MODEL", "CAUSE", "ATTEMPTS", "DIED", "ERROR"], &rows);
    if listed.next.is_some() {
        output::note(format!("there are more dead letters than {}; --limit shows more", args.limit));
    }
    note_silent(&listed.silent);
    Ok(Outcome::Well)
}

pub(super) async fn show(context: Context, args: &DlqShowArgs) -> anyhow::Result<Outcome> {
    let id = request_id(&args.request)?;
    let path = format!("/admin/v1/dead-letters/{id}?payload={}", args.payload);
    let letter: DeadLetter = client(&context, &args.server)?.get(&path).await?;
    if context.json {
        output::json(&letter)?;
        return Ok(Outcome::Well);
    }
    output::shown(described(&letter));
    if let Some(request) = &letter.request {
        output::line("");
        output::json(request)?;
    }
    Ok(Outcome::Well)
}

pub(super) async fn replay(context: Context, args: &DlqReplayArgs) -> anyhow::Result<Outcome> {
    let id = request_id(&args.request)?;
    let path = format!("/admin/v1/dead-letters/{id}/replay?keep={}", args.keep);
    let replayed: DeadLetterReplayed = client(&context, &args.server)?.post_and_wait(&path, &json!({})).await?;
    let outcome = if replayed.status == JobStatus::Completed { Outcome::Well } else { Outcome::Finding };
    if context.json {
        output::json(&replayed)?;
    } else {
        output::line(result_of(&replayed));
    }
    Ok(outcome)
}

pub(super) async fn purge(context: Context, args: &DlqPurgeArgs) -> anyhow::Result<Outcome> {
    let client = client(&context, &args.server)?;
    let mut purged = DeadLettersPurged::default();
    let mut add = |more: DeadLettersPurged| {
        purged.purged += more.purged;
        purged.silent = more.silent;
    };
    if args.all || args.older_than.is_some() {
        let now = SystemClock.now();
        let age = Duration::from_hours(24) * args.older_than.unwrap_or(0);
        // Letters of a clock that is ahead are among all.
        let before = if args.all {
            UnixMillis(i64::MAX as u64)
        } else {
            UnixMillis(now.0.saturating_sub(age.as_millis() as u64))
        };
        if args.all && !args.yes {
            confirm("This deletes every dead letter with its request.")?;
        }
        add(client.delete(&format!("/admin/v1/dead-letters?before={before}")).await?);
    } else if args.requests.is_empty() {
        bail!("name the requests whose dead letters to delete, or --older-than DAYS, or --all");
    }
    for request in &args.requests {
        let id = request_id(request)?;
        add(client.delete(&format!("/admin/v1/dead-letters/{id}")).await?);
    }
    if context.json {
        output::json(&purged)?;
    } else {
        output::line(format!("{} deleted", output::counted(purged.purged as usize, "dead letter")));
    }
    note_silent(&purged.silent);
    Ok(if purged.purged == 0 && !args.requests.is_empty() { Outcome::Finding } else { Outcome::Well })
}

fn row(letter: &DeadLetter) -> Vec<String> {
    vec![
        letter.correlation_id.to_string(),
        letter.tenant_id.to_string(),
        letter.model.to_string(),
        letter.cause.as_str().to_owned(),
        letter.history.len().to_string(),
        date(letter.died_at),
        letter.error_code.to_string(),
    ]
}

/// Returns a dead letter for people, without its request.
fn described(letter: &DeadLetter) -> String {
    let kept = match letter.payload_bytes {
        Some(bytes) => format!("{bytes} bytes, sealed; --payload shows it"),
        None => "too long to be kept, so it cannot be replayed".to_owned(),
    };
    [
        format!("request  {}", letter.correlation_id),
        format!("cause    {}", letter.cause.as_str()),
        format!("error    {}: {}", letter.error_code, output::one_line(&letter.error_message)),
        format!("model    {} for {}, in {}", letter.model, letter.tenant_id, letter.region),
        format!("trace    {}", letter.trace_id),
        format!("made     {}", date(letter.created_at)),
        format!("died     {}", date(letter.died_at)),
        format!("payload  {kept}"),
        String::new(),
        attempts(&letter.history),
    ]
    .join("\n")
}

/// Returns what became of a replay, for people.
fn result_of(replayed: &DeadLetterReplayed) -> String {
    let status = replayed.status.as_str();
    let reason = replayed.finish_reason.map(|reason| format!(", finish reason {}", reason.as_str()));
    let usage = replayed.usage.map(|usage| format!(", {} + {} tokens", usage.prompt_tokens, usage.completion_tokens));
    let error = replayed.error.as_ref().map(|error| format!(": {}: {}", error.code, output::one_line(&error.message)));
    let details: String = [reason, usage, error].into_iter().flatten().collect();
    let letter = if replayed.purged { "deleted" } else { "kept" };
    format!("{status} as {}{details}; the dead letter is {letter}", replayed.correlation_id)
}
