//! `tether jobs` and `tether explain`: what became of requests, and why.

use anyhow::Context as _;
use protocol::control::{AttemptDecision, CandidateScore, Decision, QueueWait};
use protocol::jobs::{AttemptRecord, CancelledJobs, JobInfo, JobList, JobStatus};
use protocol::{CorrelationId, PublicKey, WorkerId};

use super::token::date;
use super::{Context, Outcome};
use crate::args::{JobsListArgs, RequestArgs, ServerArgs};
use crate::client::GatewayClient;
use crate::output;

/// The most jobs that are asked for at once.
const PAGE: u32 = 200;

pub(super) async fn list(context: Context, args: &JobsListArgs) -> anyhow::Result<Outcome> {
    let client = client(&context, &args.server)?;
    let filters = [
        args.state.as_ref().map(|state| format!("&status={}", state.as_str())),
        args.tenant.as_ref().map(|tenant| format!("&tenant={tenant}")),
        args.model.as_ref().map(|model| format!("&model={model}")),
    ];
    let filters: String = filters.into_iter().flatten().collect();
    let mut listed = JobList::default();
    loop {
        let wanted = (args.limit - listed.jobs.len() as u32).min(PAGE);
        let after = listed.next.as_ref().map(|next| format!("&after={next}")).unwrap_or_default();
        let page: JobList = client.get(&format!("/admin/v1/jobs?limit={wanted}{filters}{after}")).await?;
        listed.jobs.extend(page.jobs);
        (listed.next, listed.silent) = (page.next, page.silent);
        if listed.next.is_none() || listed.jobs.len() as u32 >= args.limit {
            break;
        }
    }
    if context.json {
        output::json(&listed)?;
        return Ok(Outcome::Well);
    }
    let rows: Vec<Vec<String>> = listed.jobs.iter().map(row).collect();
    output::table(&["REQUEST", "TENANT", "MODEL", "STATE", "WORKER", "ATTEMPTS", "TOKENS", "MADE", "ERROR"], &rows);
    if listed.next.is_some() {
        output::note(format!("there are more jobs than {}; --limit shows more", args.limit));
    }
    note_silent(&listed.silent);
    Ok(Outcome::Well)
}

pub(super) async fn show(context: Context, args: &RequestArgs) -> anyhow::Result<Outcome> {
    let id = request_id(&args.request)?;
    let found: JobList = client(&context, &args.server)?.get(&format!("/admin/v1/jobs/{id}")).await?;
    let is_none = found.jobs.is_empty();
    if context.json {
        output::json(&found)?;
    } else if is_none {
        let none = "no orchestrator knows a job of this request; settled jobs are kept for a limited time";
        output::line(format!("{id}: {none}"));
    } else {
        print_jobs(&found.jobs);
    }
    note_silent(&found.silent);
    Ok(if is_none { Outcome::Finding } else { Outcome::Well })
}

pub(super) async fn cancel(context: Context, args: &RequestArgs) -> anyhow::Result<Outcome> {
    let id = request_id(&args.request)?;
    let client = client(&context, &args.server)?;
    let cancelled: CancelledJobs = client.post(&format!("/admin/v1/jobs/{id}/cancel"), &()).await?;
    let CancelledJobs { jobs, waiting, silent } = &cancelled;
    let is_none = jobs.is_empty() && *waiting == 0;
    if context.json {
        output::json(&cancelled)?;
    } else if is_none {
        output::line(format!("{id}: no job of this request runs or waits; `tether jobs show` shows how it ended"));
    } else {
        print_jobs(jobs);
        if *waiting > 0 {
            output::line(format!("{id}: cancelled before it reached a worker"));
        }
    }
    note_silent(silent);
    Ok(if is_none { Outcome::Finding } else { Outcome::Well })
}

fn print_jobs(jobs: &[JobInfo]) {
    let jobs: Vec<String> = jobs.iter().map(described).collect();
    if !jobs.is_empty() {
        output::shown(jobs.join("\n\n"));
    }
}

pub(super) async fn explain(context: Context, args: &RequestArgs) -> anyhow::Result<Outcome> {
    let id = request_id(&args.request)?;
    let decision: Decision = client(&context, &args.server)?.get(&format!("/admin/v1/jobs/{id}/decision")).await?;
    if context.json {
        output::json(&decision)?;
    } else {
        output::shown(explained(&decision));
    }
    Ok(Outcome::Well)
}

pub(super) fn client(context: &Context, server: &ServerArgs) -> anyhow::Result<GatewayClient> {
    GatewayClient::find(server, &context.settings, &context.data, &context.env)
}

/// Says which orchestrators are missing from a list.
pub(super) fn note_silent(silent: &[PublicKey]) {
    if !silent.is_empty() {
        let names: Vec<String> = silent.iter().map(PublicKey::short).collect();
        output::note(format!("no answer from {}; what they know is missing", names.join(", ")));
    }
}

/// Parses the id of a request. The ids of OpenAI's objects end with it: `chatcmpl-018f…`.
pub(super) fn request_id(text: &str) -> anyhow::Result<CorrelationId> {
    const UUID: usize = 36;
    let end = text.len().checked_sub(UUID + 1).and_then(|start| text.get(start..)?.strip_prefix('-'));
    text.parse().or_else(|error| end.and_then(|end| end.parse().ok()).ok_or(error)).with_context(|| {
        format!("{text:?} is not the id of a request, which is in the header x-request-id of its response")
    })
}

fn row(job: &JobInfo) -> Vec<String> {
    vec![
        job.correlation_id.to_string(),
        job.tenant_id.to_string(),
        job.model.to_string(),
        job.status.as_str().to_owned(),
        job.worker_id.short(),
        job.attempts.to_string(),
        job.usage.map(|usage| usage.completion_tokens.to_string()).unwrap_or_default(),
        date(job.created_at),
        job.error_code.map(|code| code.to_string()).unwrap_or_default(),
    ]
}

/// Returns a job and its attempts for people.
fn described(job: &JobInfo) -> String {
    let millis = job.updated_at.since(job.created_at).as_millis();
    let how = match job.status {
        JobStatus::Running => format!("running since {}", date(job.created_at)),
        settled => format!("{} after {millis} ms, at {}", settled.as_str(), date(job.updated_at)),
    };
    let mut lines = vec![
        format!("request  {}", job.correlation_id),
        format!("state    {how}"),
        format!("model    {} for {}, in {}", job.model, job.tenant_id, job.region),
        format!("trace    {}", job.trace_id),
    ];
    if let Some(message) = &job.error_message {
        let code = job.error_code.map(|code| code.to_string()).unwrap_or_default();
        lines.push(format!("error    {code}: {}", output::one_line(message)));
    }
    if let Some(usage) = job.usage {
        lines.push(format!("billed   {} + {} tokens", usage.prompt_tokens, usage.completion_tokens));
    }
    if job.continued > 0 {
        lines.push(format!("         continued by another worker: {}", job.continued));
    }
    if job.status == JobStatus::Running {
        lines.push(format!("runs on  {}, attempt {}", job.worker_id.short(), job.attempts));
    }
    if !job.history.is_empty() {
        lines.push(String::new());
        lines.push(attempts(&job.history));
    }
    lines.join("\n")
}

/// Returns a table of attempts.
pub(super) fn attempts(history: &[AttemptRecord]) -> String {
    let row = |record: &AttemptRecord| {
        let progress = if record.progressed { "yes" } else { "no" };
        vec![
            record.attempt.to_string(),
            record.worker_id.short(),
            record.model.to_string(),
            record.outcome.clone(),
            format!("{} ms", record.ended_at.since(record.began_at).as_millis()),
            progress.to_owned(),
            if record.counted { "counts against the request".to_owned() } else { String::new() },
        ]
    };
    let rows: Vec<Vec<String>> = history.iter().map(row).collect();
    output::aligned(&["ATTEMPT", "WORKER", "MODEL", "OUTCOME", "TOOK", "PROGRESS", ""], &rows)
}

/// Returns how a job was placed, for people.
fn explained(decision: &Decision) -> String {
    let mut parts = vec![match &decision.job {
        Some(job) => described(job),
        None => format!(
            "request  {}\nstate    it never got a reservation\ntenant   {}",
            decision.correlation_id, decision.tenant_id
        ),
    }];
    let waited = decision.wait.as_ref().map(waited);
    let degraded = decision.degraded.as_ref().map(|degraded| {
        format!("cheaper  {}, because its tenant's policy says so", output::one_line(&degraded.to_string()))
    });
    let lines: Vec<String> = waited.into_iter().chain(degraded).collect();
    if !lines.is_empty() {
        parts.push(lines.join("\n"));
    }
    if let Some(weights) = &decision.weights {
        parts.push(format!(
            "A score is {} x model + {} x region + {} x queue + {} x cache + {} x speed.",
            weights.model_match, weights.region_proximity, weights.queue_depth, weights.warm_cache, weights.speed
        ));
    }
    let is_forgotten =
        decision.attempts.iter().all(|attempt| attempt.candidates.is_empty() && attempt.refused.is_empty());
    if is_forgotten {
        parts.push("The workers that were considered are no longer known.".to_owned());
    } else {
        parts.extend(decision.attempts.iter().map(placed));
    }
    parts.join("\n\n")
}

/// Returns a line about a job's time in the queue.
fn waited(wait: &QueueWait) -> String {
    let end = match wait.shed.as_deref() {
        None => "it got a slot".to_owned(),
        Some("wait_too_long") => "it was refused, because the wait would have been too long".to_owned(),
        Some("over_share") => "it had to leave, because the queue was full and its tenant over its share".to_owned(),
        Some("tenant_queue_full") => "it was refused, because too many jobs of its tenant wait".to_owned(),
        Some("queue_full") => "it was refused, because too many jobs wait".to_owned(),
        Some(other) => output::one_line(other),
    };
    format!("queue    {} ms as {}; {end}", wait.waited_ms, wait.class.as_str())
}

/// Returns one attempt with the workers that were considered.
fn placed(attempt: &AttemptDecision) -> String {
    let chosen = attempt.chosen.map_or_else(|| "no worker could be chosen".to_owned(), |worker| worker.short());
    let mut text = format!("attempt {}: {chosen}, {}", attempt.attempt, output::one_line(&attempt.outcome));
    if !attempt.candidates.is_empty() {
        let rows: Vec<Vec<String>> =
            attempt.candidates.iter().map(|candidate| candidate_row(candidate, attempt.chosen)).collect();
        let head = ["", "WORKER", "SCORE", "MODEL", "REGION", "QUEUE", "CACHE", "SPEED", "RUNS"];
        text.push('\n');
        text.push_str(&output::aligned(&head, &rows));
    }
    if !attempt.refused.is_empty() {
        let refused = attempt.refused.iter().map(|refused| {
            let model = refused.model.as_ref().map(|model| format!(" with {model}")).unwrap_or_default();
            format!("{}{model} {}", refused.worker_id.short(), output::one_line(&refused.reason))
        });
        text.push_str("\nnot considered: ");
        text.push_str(&refused.collect::<Vec<_>>().join(", "));
    }
    text
}

/// Returns the name of a worker that was considered, and says so if its owner wants others to be chosen first.
fn who(candidate: &CandidateScore) -> String {
    let name = candidate.worker_id.short();
    if candidate.activity.is_accepting() { name } else { format!("{name} ({})", candidate.activity.as_str()) }
}

fn candidate_row(candidate: &CandidateScore, chosen: Option<WorkerId>) -> Vec<String> {
    let term = |value: f64| format!("{value:.2}");
    vec![
        if Some(candidate.worker_id) == chosen { ">".to_owned() } else { String::new() },
        who(candidate),
        term(candidate.score),
        term(candidate.model_match),
        term(candidate.region_proximity),
        term(candidate.queue_depth),
        term(candidate.warm_cache),
        term(candidate.speed),
        candidate.model.as_ref().map(ToString::to_string).unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use protocol::UnixMillis;
    use protocol::control::{RefusedWorker, ScoreWeights};

    use super::*;

    const ID: &str = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f";

    #[test]
    fn a_request_is_named_by_its_id_or_by_that_of_its_answer() {
        for text in [ID.to_owned(), format!("chatcmpl-{ID}"), format!("cmpl-{ID}")] {
            assert_eq!(request_id(&text).expect("an id").to_string(), ID, "{text}");
        }
        for text in ["", "7", "chatcmpl-7", "é8f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f", &format!("x{ID}")] {
            assert!(format!("{:#}", request_id(text).expect_err(text)).contains("x-request-id"), "{text}");
        }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn an_explanation_shows_scores_refusals_and_ends() {
        let (one, two) = (PublicKey([0xaa; 32]), PublicKey([0xbb; 32]));
        let candidate = CandidateScore {
            worker_id: one,
            model: None,
            activity: protocol::health::Activity::Deprioritised,
            score: 9.25,
            model_match: 1.0,
            region_proximity: 1.0,
            queue_depth: 0.5,
            warm_cache: 0.25,
            speed: 0.5,
        };
        let refused = RefusedWorker { worker_id: two, model: None, reason: "dr\u{1b}[2Jaining".to_owned() };
        let attempt = AttemptDecision {
            attempt: 1,
            chosen: Some(one),
            outcome: "worker_failed".to_owned(),
            candidates: vec![candidate],
            refused: vec![refused],
        };
        let weights =
            ScoreWeights { model_match: 4.0, region_proximity: 2.0, queue_depth: 3.0, warm_cache: 1.5, speed: 0.5 };
        let decision = Decision {
            correlation_id: ID.parse().expect("an id"),
            tenant_id: "acme".parse().expect("a tenant"),
            attempts: vec![attempt],
            wait: Some(QueueWait {
                class: protocol::policy::ServiceClass::Batch,
                waited_ms: 1_500,
                shed: Some("over_share".to_owned()),
            }),
            degraded: Some(protocol::infer::Degraded {
                max_tokens: Some(64),
                reason: "queue".to_owned(),
                ..protocol::infer::Degraded::default()
            }),
            weights: Some(weights),
            job: None,
        };
        let text = plain(&explained(&decision));
        for part in [
            "it never got a reservation",
            "queue    1500 ms as batch; it had to leave",
            "cheaper  max_tokens=64; reason=queue",
            "4 x model + 2 x region + 3 x queue + 1.5 x cache + 0.5 x speed",
            "attempt 1: aaaaaaaa, worker_failed",
            ">  aaaaaaaa (deprioritised)  9.25   1.00   1.00    0.50   0.25   0.50",
            "not considered: bbbbbbbb dr\\u{1b}[2Jaining",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn a_job_shows_its_attempts_and_its_error_on_one_line() {
        let record = AttemptRecord {
            attempt: 1,
            worker_id: PublicKey([0xaa; 32]),
            model: model(),
            outcome: "engine_crashed".to_owned(),
            began_at: UnixMillis(1_000),
            ended_at: UnixMillis(1_250),
            progressed: false,
            counted: true,
        };
        let job = JobInfo {
            sequence: 1,
            correlation_id: ID.parse().expect("an id"),
            tenant_id: "acme".parse().expect("a tenant"),
            model: model(),
            region: "local".parse().expect("a region"),
            trace_id: protocol::TraceId([1; 16]),
            status: JobStatus::Dead,
            worker_id: PublicKey([0xaa; 32]),
            attempts: 1,
            continued: 0,
            created_at: UnixMillis(1_000),
            updated_at: UnixMillis(1_300),
            error_code: Some(protocol::ErrorCode::RequestCrashesEngine),
            error_message: Some("one\ntwo".to_owned()),
            finish_reason: None,
            usage: None,
            history: vec![record],
        };
        let text = plain(&described(&job));
        for part in [
            "state    dead after 300 ms",
            "error    request_crashes_engine: one two",
            "1        aaaaaaaa  m@1.0  engine_crashed  250 ms  no        counts against the request",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    fn model() -> protocol::model::ModelKey {
        protocol::model::ModelKey { model_id: "m".parse().expect("a name"), version: "1.0".parse().expect("a version") }
    }
}
