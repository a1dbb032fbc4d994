//! What operators ask of an orchestrator: jobs, why they went where they did, and dead letters.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use metadata_store::{DurableState, JobRecord, StoreError, TerminalState};
use protocol::control::{ByOperator, Decision, ExplainRequest};
use protocol::jobs::{
    AttemptRecord, DeadLetter, DeadLetterPage, DeadLetterPurge, DeadLetterQuery, DeadLetterRef, DeadLettersPurged,
    JobInfo, JobPage, JobQuery, JobRef, JobStatus, JobsCancelled,
};
use protocol::queue::{QUEUE_PAGE_MAX, QueuePage, QueueQuery};
use protocol::{CorrelationId, ErrorCode, WireError};
use rpc::Caller;
use tokio::time;
use tracing::{info, warn};

use crate::journey;
use crate::orchestrator::Orchestrator;
use crate::refusals;
use crate::reservation_manager::is_hedge;

/// How long a cancelled job may take to be settled before the call returns.
const CANCEL_WITHIN: Duration = Duration::from_secs(1);

impl Orchestrator {
    pub(crate) async fn list_jobs(self: Arc<Self>, _: Caller, query: JobQuery) -> Result<JobPage, WireError> {
        let page = self.store.list_jobs(query).await.map_err(|error| unreadable(&error))?;
        Ok(JobPage { jobs: infos_of(page.jobs), next: page.next })
    }

    pub(crate) async fn show_jobs(self: Arc<Self>, _: Caller, request: JobRef) -> Result<JobPage, WireError> {
        Ok(JobPage { jobs: self.jobs_of(request.correlation_id).await?, next: None })
    }

    async fn jobs_of(&self, id: CorrelationId) -> Result<Vec<JobInfo>, WireError> {
        let jobs = self.store.jobs_of(id).await.map_err(|error| unreadable(&error))?;
        Ok(infos_of(jobs))
    }

    /// Returns how a job was placed and how its attempts ended. Once the decision log has dropped it, only the store's
    /// part is left.
    pub(crate) async fn explain(self: Arc<Self>, _: Caller, request: ExplainRequest) -> Result<Decision, WireError> {
        let id = request.correlation_id;
        let (remembered, mut jobs) = (self.decisions.get(id), self.jobs_of(id).await?);
        let tenant = remembered.as_ref().map(|decision| decision.tenant_id.clone());
        jobs.retain(|job| tenant.as_ref().is_none_or(|tenant| *tenant == job.tenant_id));
        let job = jobs.into_iter().next();
        let mut decision = match (remembered, &job) {
            (Some(remembered), _) => (*remembered).clone(),
            (None, Some(job)) => Decision::without_candidates(job),
            (None, None) => return Err(refusals::forgotten()),
        };
        decision.job = job.map(Box::new);
        decision.weights = Some((&self.config.weights).into());
        Ok(decision)
    }

    pub(crate) async fn list_queue(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<QueueQuery>,
    ) -> Result<QueuePage, WireError> {
        self.operators.check(&operation.token).await?;
        Ok(self.gate.list(operation.request.limit.min(QUEUE_PAGE_MAX) as usize))
    }

    /// Cancels the jobs of a request that run or wait, and waits until those that run are settled, but not long.
    pub(crate) async fn cancel_jobs(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<JobRef>,
    ) -> Result<JobsCancelled, WireError> {
        self.operators.check(&operation.token).await?;
        let id = operation.request.correlation_id;
        let cancelled = self.running.cancel(id, None);
        if cancelled.is_empty() {
            return Ok(JobsCancelled::default());
        }
        info!(correlation_id = %id, jobs = cancelled.len(), "an operator cancels jobs");
        let _ = time::timeout(CANCEL_WITHIN, join_all(cancelled.iter().map(|job| job.ended()))).await;
        let (ran, waited): (Vec<_>, Vec<_>) = cancelled.into_iter().partition(|job| job.has_worker());
        let mut jobs = vec![];
        for job in ran {
            let job = self.store.job(&job.key).await.map_err(|error| unreadable(&error))?;
            jobs.extend(job.map(info_of));
        }
        Ok(JobsCancelled { jobs, waiting: waited.len() as u64 })
    }

    pub(crate) async fn list_dead_letters(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<DeadLetterQuery>,
    ) -> Result<DeadLetterPage, WireError> {
        self.operators.check(&operation.token).await?;
        self.store.list_dead_letters(operation.request).await.map_err(|error| unreadable(&error))
    }

    pub(crate) async fn show_dead_letter(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<DeadLetterRef>,
    ) -> Result<DeadLetter, WireError> {
        self.operators.check(&operation.token).await?;
        let DeadLetterRef { correlation_id, payload } = operation.request;
        if payload {
            info!(%correlation_id, "an operator reads the request of a dead letter");
        }
        self.dead_letter(correlation_id, payload).await
    }

    /// Returns a dead letter with its request, and forgets the crashes of that request, so that it may run again.
    pub(crate) async fn release_dead_letter(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<JobRef>,
    ) -> Result<DeadLetter, WireError> {
        self.operators.check(&operation.token).await?;
        let letter = self.dead_letter(operation.request.correlation_id, true).await?;
        if let Some(request) = &letter.request {
            self.crashes().succeeded(&journey::content_of(&request.model(), request));
        }
        info!(correlation_id = %letter.correlation_id, "an operator runs a dead letter again");
        Ok(letter)
    }

    pub(crate) async fn purge_dead_letters(
        self: Arc<Self>,
        _: Caller,
        operation: ByOperator<DeadLetterPurge>,
    ) -> Result<DeadLettersPurged, WireError> {
        self.operators.check(&operation.token).await?;
        let purged = self.store.purge_dead_letters(operation.request).await.map_err(|error| unreadable(&error))?;
        info!(purged, "an operator deletes dead letters");
        Ok(DeadLettersPurged { purged, silent: vec![] })
    }

    async fn dead_letter(&self, id: CorrelationId, with_request: bool) -> Result<DeadLetter, WireError> {
        let found = self.store.dead_letter(id).await.map_err(|error| unreadable(&error))?;
        let (mut letter, sealed) = found.ok_or_else(|| {
            WireError::new(ErrorCode::NotFound, "this request has no dead letter; `tether dlq list` shows them")
        })?;
        if with_request {
            let sealed = sealed.ok_or_else(|| {
                WireError::new(ErrorCode::InvalidValue, "the request was too long to be kept with its dead letter")
            })?;
            let request =
                crate::dead_letters::open(&self.sealing_key, &letter.tenant_id, id, &sealed).ok_or_else(|| {
                    let message = "the request of this dead letter cannot be read: it was sealed with another \
                               sealing.key than that of the orchestrator's data folder";
                    WireError::new(ErrorCode::InvalidValue, message)
                })?;
            letter.request = Some(Box::new(request));
        }
        Ok(letter)
    }
}

fn unreadable(error: &StoreError) -> WireError {
    warn!(%error, "could not read or write the store for an operator");
    WireError::new(ErrorCode::Unavailable, "the orchestrator's store cannot be read now, try again")
}

/// Returns jobs as operators see them. Reservations of second workers are part of other jobs.
fn infos_of(records: Vec<JobRecord>) -> Vec<JobInfo> {
    records.into_iter().filter(|record| !is_hedge(record)).map(info_of).collect()
}

/// Returns a job as operators see it.
fn info_of(record: JobRecord) -> JobInfo {
    let status = match record.state {
        DurableState::Reserved => JobStatus::Running,
        DurableState::Settled(TerminalState::Completed) => JobStatus::Completed,
        DurableState::Settled(TerminalState::Failed) => JobStatus::Failed,
        DurableState::Settled(TerminalState::Cancelled) => JobStatus::Cancelled,
        DurableState::Settled(TerminalState::Dead) => JobStatus::Dead,
    };
    let (error_code, error_message) = record.error.map(|error| (error.code, error.message)).unzip();
    let mut history = record.history;
    if history.is_empty() && status != JobStatus::Running {
        history.push(AttemptRecord {
            attempt: record.attempt,
            worker_id: record.worker_id,
            model: record.model.clone(),
            outcome: error_code.map_or(status.as_str(), ErrorCode::as_str).to_owned(),
            began_at: record.created_at,
            ended_at: record.updated_at,
            progressed: record.usage.is_some(),
            counted: false,
        });
    }
    JobInfo {
        sequence: record.sequence,
        correlation_id: record.key.correlation_id,
        tenant_id: record.key.tenant_id,
        model: record.model,
        region: record.region,
        trace_id: record.trace_id,
        status,
        worker_id: record.worker_id,
        attempts: record.attempt,
        continued: record.continued,
        created_at: record.created_at,
        updated_at: record.updated_at,
        error_code,
        error_message,
        finish_reason: record.finish_reason,
        usage: record.usage,
        history,
    }
}
