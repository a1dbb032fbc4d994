//! What operators ask of the region's orchestrators through a gateway. Each orchestrator knows only its own jobs and
//! dead letters, so all are asked, and their pages are merged.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

use observability::TraceContext;
use protocol::control::{ByOperator, NodeRole};
use protocol::infer::{InferChunk, InferRequest};
use protocol::jobs::{
    CancelledJobs, DEAD_LETTER_LIST, DEAD_LETTER_PURGE, DEAD_LETTER_RELEASE, DEAD_LETTER_SHOW, DeadLetter,
    DeadLetterList, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, DeadLetterRef, DeadLetterReplayed,
    DeadLettersPurged, JOB_CANCEL, JOB_LIST, JOB_SHOW, JobInfo, JobList, JobPage, JobQuery, JobRef, JobStatus,
    JobsCancelled, PAGE_MAX,
};
use protocol::queue::{QUEUE_LIST, QueuePage, QueueQuery, WaitingJob, WaitingJobs};
use protocol::quota::{OrchestratorQuotas, QUOTA_LIST, QuotaList, QuotaPage, QuotaQuery};
use protocol::{CorrelationId, ErrorCode, PublicKey, UnixMillis, WireError, codec};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tracing::info;

use crate::config::seconds;
use crate::gateway::Gateway;
use crate::upstream::{self, Timeouts};

/// The most orchestrators that a cursor may name.
const CURSOR_MAX: usize = 256;

/// Where the next page begins at each orchestrator that has one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cursor(BTreeMap<PublicKey, u64>);

impl fmt::Display for Cursor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(peer, before)| format!("{peer}.{before}")).collect();
        formatter.write_str(&parts.join("~"))
    }
}

impl FromStr for Cursor {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        let part = |part: &str| {
            let (peer, before) = part.split_once('.')?;
            Some((peer.parse().ok()?, before.parse().ok()?))
        };
        let parts: Option<BTreeMap<_, _>> = text.split('~').take(CURSOR_MAX).map(part).collect();
        parts.map(Self).ok_or_else(|| {
            let message = "after is no cursor of this list; use `next` of the page before";
            WireError::new(ErrorCode::InvalidValue, message).with_param("after")
        })
    }
}

/// A row of a list that several orchestrators have parts of.
trait Listed {
    fn sequence(&self) -> u64;
    fn at(&self) -> UnixMillis;
}

impl Listed for JobInfo {
    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn at(&self) -> UnixMillis {
        self.created_at
    }
}

impl Listed for DeadLetter {
    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn at(&self) -> UnixMillis {
        self.died_at
    }
}

/// Merges the pages of orchestrators, the newest rows first, and returns at most `limit` rows and where the next page
/// begins.
fn merge<Row: Listed>(pages: Vec<(PublicKey, Vec<Row>, Option<u64>)>, limit: usize) -> (Vec<Row>, Option<Cursor>) {
    let mut cursor = Cursor::default();
    let mut rows = vec![];
    for (peer, page, next) in pages {
        cursor.0.extend(next.map(|next| (peer, next)));
        // An orchestrator's own rows stay in their order, whatever its clock did.
        let mut latest = UnixMillis(u64::MAX);
        for row in page {
            latest = latest.min(row.at());
            rows.push((latest, peer, row));
        }
    }
    rows.sort_by_key(|(at, ..)| Reverse(*at));
    for (_, peer, row) in rows.drain(limit.min(rows.len())..) {
        // The rows that were left out come next. The first of them is the newest.
        let before = row.sequence().saturating_add(1);
        cursor.0.entry(peer).and_modify(|known| *known = before.max(*known)).or_insert(before);
    }
    (rows.into_iter().map(|(.., row)| row).collect(), Some(cursor).filter(|cursor| !cursor.0.is_empty()))
}

/// Merges the waiting jobs of orchestrators: those that start soonest first, then those whose start is unknown, the
/// oldest first. Jobs for one model stay in the order of their orchestrator.
fn next_first(pages: impl Iterator<Item = Vec<WaitingJob>>) -> Vec<WaitingJob> {
    let mut jobs = vec![];
    for page in pages {
        let mut latest = HashMap::new();
        for job in page {
            let own = (job.starts_in_ms.unwrap_or(u64::MAX), Reverse(job.waited_ms));
            let latest = latest.entry(job.model.clone()).or_insert(own);
            *latest = own.max(*latest);
            jobs.push((*latest, job));
        }
    }
    jobs.sort_by_key(|(start, _)| *start);
    jobs.into_iter().map(|(_, job)| job).collect()
}

/// The answers of orchestrators to one question, and those that gave none.
struct Answers<Reply> {
    replies: Vec<(PublicKey, Reply)>,
    silent: Vec<PublicKey>,
}

impl Gateway {
    pub(crate) async fn list_jobs(&self, query: JobQuery, after: Option<&Cursor>) -> Result<JobList, WireError> {
        let limit = query.limit.clamp(1, PAGE_MAX);
        let of_peer = |before| JobQuery { before, limit, ..query.clone() };
        let Answers { replies, silent } = self.page::<_, JobPage>(JOB_LIST, after, of_peer).await?;
        let pages = replies.into_iter().map(|(peer, page)| (peer, page.jobs, page.next)).collect();
        let (jobs, next) = merge(pages, limit as usize);
        Ok(JobList { jobs, next: next.map(|next| next.to_string()), silent })
    }

    pub(crate) async fn list_waiting(&self, token: String, limit: u32) -> Result<WaitingJobs, WireError> {
        let request = ByOperator { token, request: QueueQuery { limit } };
        let asked = self.ask_all::<_, QueuePage>(QUEUE_LIST, |_| Some(request.clone())).await?;
        let total = asked.replies.iter().map(|(_, page)| page.total).sum();
        let mut waiting = next_first(asked.replies.into_iter().map(|(_, page)| page.waiting));
        waiting.truncate(limit as usize);
        Ok(WaitingJobs { waiting, total, silent: asked.silent })
    }

    pub(crate) async fn show_jobs(&self, id: CorrelationId) -> Result<JobList, WireError> {
        let asked = self.ask_all::<_, JobPage>(JOB_SHOW, |_| Some(JobRef { correlation_id: id })).await?;
        let jobs = asked.replies.into_iter().flat_map(|(_, page)| page.jobs).collect();
        Ok(JobList { jobs, next: None, silent: asked.silent })
    }

    pub(crate) async fn list_quotas(&self, query: QuotaQuery) -> Result<QuotaList, WireError> {
        let asked = self.ask_all::<_, QuotaPage>(QUOTA_LIST, |_| Some(query.clone())).await?;
        let counted = |(orchestrator, QuotaPage { tenants, incomplete })| OrchestratorQuotas {
            orchestrator,
            tenants,
            incomplete,
        };
        Ok(QuotaList { orchestrators: asked.replies.into_iter().map(counted).collect(), silent: asked.silent })
    }

    pub(crate) async fn cancel_jobs(&self, token: String, id: CorrelationId) -> Result<CancelledJobs, WireError> {
        let request = ByOperator { token, request: JobRef { correlation_id: id } };
        let asked = self.ask_all::<_, JobsCancelled>(JOB_CANCEL, |_| Some(request.clone())).await?;
        let waiting = asked.replies.iter().map(|(_, cancelled)| cancelled.waiting).sum();
        let jobs = asked.replies.into_iter().flat_map(|(_, cancelled)| cancelled.jobs).collect();
        Ok(CancelledJobs { jobs, waiting, silent: asked.silent })
    }

    pub(crate) async fn list_dead_letters(
        &self,
        token: String,
        query: DeadLetterQuery,
        after: Option<&Cursor>,
    ) -> Result<DeadLetterList, WireError> {
        let limit = query.limit.clamp(1, PAGE_MAX);
        let of_peer = |before| {
            let request = DeadLetterQuery { before, limit, ..query.clone() };
            ByOperator { token: token.clone(), request }
        };
        let Answers { replies, silent } = self.page::<_, DeadLetterPage>(DEAD_LETTER_LIST, after, of_peer).await?;
        let pages = replies.into_iter().map(|(peer, page)| (peer, page.dead_letters, page.next)).collect();
        let (dead_letters, next) = merge(pages, limit as usize);
        Ok(DeadLetterList { dead_letters, next: next.map(|next| next.to_string()), silent })
    }

    pub(crate) async fn show_dead_letter(
        &self,
        token: String,
        correlation_id: CorrelationId,
        payload: bool,
    ) -> Result<DeadLetter, WireError> {
        let request = ByOperator { token, request: DeadLetterRef { correlation_id, payload } };
        let asked = self.upstream().ask_which(NodeRole::Orchestrator, DEAD_LETTER_SHOW, &request).await;
        Ok(asked.map_err(WireError::for_clients)?.1)
    }

    pub(crate) async fn purge_dead_letters(
        &self,
        token: String,
        request: DeadLetterPurge,
    ) -> Result<DeadLettersPurged, WireError> {
        let request = ByOperator { token, request };
        let asked = self.ask_all::<_, DeadLettersPurged>(DEAD_LETTER_PURGE, |_| Some(request.clone())).await?;
        let purged = asked.replies.into_iter().map(|(_, reply)| reply.purged).sum();
        Ok(DeadLettersPurged { purged, silent: asked.silent })
    }

    /// Runs the request of a dead letter again, as a new request of its tenant, and waits for its end. Deletes the
    /// letter if it completes, unless told otherwise.
    pub(crate) async fn replay_dead_letter(
        &self,
        token: String,
        id: CorrelationId,
        keep: bool,
    ) -> Result<DeadLetterReplayed, WireError> {
        let request = ByOperator { token: token.clone(), request: JobRef { correlation_id: id } };
        let asked = self.upstream().ask_which(NodeRole::Orchestrator, DEAD_LETTER_RELEASE, &request).await;
        let (orchestrator, letter): (PublicKey, DeadLetter) = asked.map_err(WireError::for_clients)?;
        let Some(original) = letter.request else {
            return Err(WireError::new(ErrorCode::InternalError, "the orchestrator returned no request"));
        };
        let correlation_id = self.make_id()?;
        let timeouts = self.longest_timeouts();
        let left = timeouts.deadline.saturating_duration_since(Instant::now());
        let request = InferRequest {
            correlation_id,
            retry_token: self.make_retry_token()?,
            trace_id: TraceContext::begin().trace_id,
            deadline_ms: Some(left.as_millis() as u64),
            fingerprint: None,
            progress: true,
            acknowledges: true,
            ..*original
        };
        let mut replayed = DeadLetterReplayed {
            replayed: id,
            correlation_id,
            status: JobStatus::Failed,
            finish_reason: None,
            usage: None,
            error: None,
            purged: false,
        };
        match self.run_to_end(orchestrator, &request, timeouts).await {
            Ok(last) => {
                replayed.status = JobStatus::Completed;
                (replayed.finish_reason, replayed.usage) = (last.payload.finish_reason, last.payload.usage);
            }
            Err(error) => replayed.error = Some(error.for_clients()),
        }
        info!(replayed = %id, %correlation_id, status = replayed.status.as_str(), "dead letter run again");
        if replayed.status == JobStatus::Completed && !keep {
            let purge = DeadLetterPurge { correlation_id: Some(id), ..DeadLetterPurge::default() };
            // The letter can be deleted later; the answer about its replay must not be lost.
            replayed.purged = self.purge_dead_letters(token, purge).await.is_ok_and(|purged| purged.purged > 0);
        }
        Ok(replayed)
    }

    /// Runs a job at one orchestrator, drops its answer, and returns the last chunk.
    async fn run_to_end(
        &self,
        orchestrator: PublicKey,
        request: &InferRequest,
        timeouts: Timeouts,
    ) -> Result<InferChunk, WireError> {
        let mut begun = self.upstream().submit_to(orchestrator, request, timeouts).await?;
        let mut next = begun.first.take();
        loop {
            let chunk = match next.take() {
                Some(chunk) => chunk,
                None => match begun.stream.next().await {
                    Some(chunk) => chunk.map_err(WireError::from)?,
                    None => return Err(WireError::new(ErrorCode::WorkerFailed, "the answer has no end")),
                },
            };
            let chunk: InferChunk = codec::decode(&chunk)?;
            if chunk.done {
                return Ok(chunk);
            }
        }
    }

    fn longest_timeouts(&self) -> Timeouts {
        let config = self.config();
        let deadline = Instant::now() + seconds(config.request_deadline_secs);
        Timeouts { deadline, stall: seconds(config.stall_timeout_secs) }
    }

    /// Asks each orchestrator for its part of a page: all of them for the first one, and those that the cursor names
    /// for the others.
    async fn page<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        after: Option<&Cursor>,
        request: impl Fn(Option<u64>) -> Request,
    ) -> Result<Answers<Reply>, WireError> {
        let of_peer = |peer| match after {
            None => Some(request(None)),
            Some(cursor) => cursor.0.get(&peer).map(|before| request(Some(*before))),
        };
        self.ask_all(method, of_peer).await
    }

    /// Asks all orchestrators for which there is a request. Fails if none answers, or if one refuses the operator.
    async fn ask_all<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: impl Fn(PublicKey) -> Option<Request>,
    ) -> Result<Answers<Reply>, WireError> {
        let mut answers = Answers { replies: vec![], silent: vec![] };
        for (peer, reply) in self.upstream().ask_each(NodeRole::Orchestrator, method, request).await? {
            match reply {
                Ok(reply) => answers.replies.push((peer, reply)),
                Err(error) if upstream::another_may_know(error.code) => answers.silent.push(peer),
                Err(error) => return Err(error.for_clients()),
            }
        }
        if answers.replies.is_empty() && !answers.silent.is_empty() {
            return Err(upstream::away(NodeRole::Orchestrator));
        }
        Ok(answers)
    }
}

#[cfg(test)]
mod tests {
    use protocol::model::ModelKey;
    use protocol::policy::ServiceClass;
    use protocol::queue::WaitReason;

    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Row(u64, u64);

    impl Listed for Row {
        fn sequence(&self) -> u64 {
            self.0
        }

        fn at(&self) -> UnixMillis {
            UnixMillis(self.1)
        }
    }

    fn peer(number: u8) -> PublicKey {
        PublicKey([number; 32])
    }

    /// Reads the rows of orchestrators page by page; each has its rows by sequence, the newest last.
    fn read(orchestrators: &[(PublicKey, Vec<Row>)], limit: usize) -> Vec<Row> {
        let (mut read, mut after) = (vec![], None::<Cursor>);
        for _ in 0..100 {
            let page = |(peer, rows): &(PublicKey, Vec<Row>)| {
                let before = match &after {
                    None => u64::MAX,
                    Some(cursor) => *cursor.0.get(peer)?,
                };
                let page: Vec<Row> = rows.iter().rev().filter(|row| row.0 < before).take(limit).cloned().collect();
                let next = page.last().filter(|_| page.len() == limit).map(|last| last.0);
                Some((*peer, page, next))
            };
            let (rows, next) = merge(orchestrators.iter().filter_map(page).collect(), limit);
            assert!(rows.len() <= limit);
            read.extend(rows);
            match next {
                Some(next) => after = Some(next.to_string().parse().expect("its own text")),
                None => return read,
            }
        }
        panic!("it has no end");
    }

    #[test]
    fn pages_of_several_orchestrators_merge_without_gap_or_repeat() {
        let rows = |times: &[u64]| (1..).zip(times).map(|(sequence, at)| Row(sequence, *at)).collect::<Vec<_>>();
        let orchestrators =
            [(peer(1), rows(&[1, 4, 5, 6, 9, 9, 9])), (peer(2), rows(&[2, 3, 9, 10])), (peer(3), rows(&[]))];
        for limit in 1..=12 {
            let read = read(&orchestrators, limit);
            let mut expected: Vec<Row> = orchestrators.iter().flat_map(|(_, rows)| rows.clone()).collect();
            let times: Vec<u64> = read.iter().map(|row| row.1).collect();
            assert!(times.is_sorted_by(|one, next| one >= next), "limit {limit}: {times:?}");
            let order = |rows: &mut Vec<Row>| rows.sort_by_key(|row| (row.1, row.0));
            let mut found = read;
            order(&mut found);
            order(&mut expected);
            assert_eq!(found, expected, "limit {limit}");
        }
    }

    #[test]
    fn a_clock_that_goes_back_makes_no_gap_and_no_repeat() {
        let orchestrators = [(peer(1), vec![Row(1, 1), Row(2, 9), Row(3, 3)]), (peer(2), vec![Row(1, 5), Row(2, 2)])];
        for limit in 1..=6 {
            let mut found: Vec<u64> = read(&orchestrators, limit).iter().map(|row| row.1).collect();
            found.sort_unstable();
            assert_eq!(found, [1, 2, 3, 5, 9], "limit {limit}");
        }
    }

    #[test]
    fn waiting_jobs_of_several_orchestrators_are_listed_by_their_start() {
        let job = |model: &str, number: u8, waited_ms, starts_in_ms| WaitingJob {
            correlation_id: format!("018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e{number:02}").parse().expect("an id"),
            tenant_id: "acme".parse().expect("a tenant"),
            class: ServiceClass::Standard,
            model: ModelKey { model_id: model.parse().expect("a name"), version: "1.0".parse().expect("a version") },
            prompt_tokens: 1,
            waited_ms,
            reason: WaitReason::AllFull,
            starts_in_ms,
        };
        let one = vec![job("a", 1, 9, None), job("b", 2, 5, Some(30)), job("b", 3, 7, Some(20)), job("a", 4, 99, None)];
        let other = vec![job("a", 5, 8, Some(10)), job("b", 6, 1, Some(40)), job("c", 7, 50, None)];
        let listed = next_first([one, other].into_iter());
        let numbers: Vec<String> = listed.iter().map(|job| job.correlation_id.to_string().split_off(34)).collect();
        assert_eq!(numbers, ["05", "02", "03", "06", "07", "01", "04"]);
    }

    #[test]
    fn a_cursor_that_is_none_is_refused() {
        for text in ["", "x", "1.2", &format!("{}.", peer(1)), &format!("{}.-1", peer(1))] {
            assert_eq!(text.parse::<Cursor>().expect_err(text).param.as_deref(), Some("after"), "{text}");
        }
    }
}
