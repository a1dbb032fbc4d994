//! The work on a batch, from wherever it stands to its end.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use protocol::batches::{BatchError, BatchStatus};
use protocol::error_code::WireError;
use protocol::{CorrelationId, ErrorCode};
use tokio::time;
use tracing::{debug, info, warn};

use super::lease::{Lease, is_passing};
use super::run_line::LineRunner;
use crate::catalog;
use crate::files::FileReader;
use crate::openai::batch::BatchEndpoint;
use crate::openai::batch::line::{CheckedFile, FileCheck, LineOutcome, LineSplitter, parse_line, write_result};

/// Pause before the work goes on after an error that passes.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How long lines that have begun may take to end once no further line is to run.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);
/// For how many lines at once is looked up whether they have a result.
const WINDOW: u32 = 1_000;

/// Works on a batch until it has ended. Returns an error if the work breaks off.
pub(super) async fn work(lease: &Lease) -> Result<(), WireError> {
    loop {
        match advance(lease).await {
            Ok(()) if lease.batch().status.is_final() => break,
            Ok(()) => {}
            Err(error) if is_passing(&error) => time::sleep(AGAIN_AFTER).await,
            Err(error) => {
                let batch = &lease.reference().id;
                warn!(%batch, %error, "the work on a batch breaks off");
                return Err(error);
            }
        }
    }
    let batch = lease.batch();
    let counts = batch.counts;
    info!(
        batch = %batch.id,
        status = batch.status.as_str(),
        total = counts.total,
        completed = counts.completed,
        failed = counts.failed,
        "a batch has ended"
    );
    Ok(())
}

/// Does what the status of a batch calls for.
async fn advance(lease: &Lease) -> Result<(), WireError> {
    let batch = lease.batch();
    if lease.is_overdue() && batch.status.may_become(BatchStatus::Expired) {
        return expire(lease).await;
    }
    match batch.status {
        BatchStatus::Validating => validate(lease).await,
        BatchStatus::InProgress => run_lines(lease).await,
        BatchStatus::Finalizing => lease.step(Some(BatchStatus::Completed), None, vec![]).await,
        BatchStatus::Cancelling => lease.step(Some(BatchStatus::Cancelled), None, vec![]).await,
        BatchStatus::Failed | BatchStatus::Completed | BatchStatus::Expired | BatchStatus::Cancelled => Ok(()),
    }
}

async fn validate(lease: &Lease) -> Result<(), WireError> {
    let checked = match check_file(lease).await? {
        Ok(checked) => checked,
        Err(errors) => return lease.step(Some(BatchStatus::Failed), None, errors).await,
    };
    match check_model(lease, &checked.model).await {
        Ok(()) => lease.step(Some(BatchStatus::InProgress), Some(checked.total), vec![]).await,
        Err(error) if is_passing(&error) => Err(error),
        Err(error) => {
            let code = error.code.as_str().to_owned();
            let error = BatchError { code, message: error.message, param: Some("body.model".into()), line: None };
            lease.step(Some(BatchStatus::Failed), None, vec![error]).await
        }
    }
}

async fn check_file(lease: &Lease) -> Result<Result<CheckedFile, Vec<BatchError>>, WireError> {
    let mut check = FileCheck::new(endpoint(lease)?);
    let mut lines = Lines::new(lease);
    while !check.has_failed() {
        match lines.fill().await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if error.code == ErrorCode::RequestTooLarge => {
                let code = "line_too_long".to_owned();
                return Ok(Err(vec![BatchError { code, message: error.message, param: None, line: None }]));
            }
            Err(error) => return Err(error),
        }
        while let Some((number, line)) = lines.next() {
            check.add(number, line);
        }
        // A whole file takes a while, and other tasks of the thread wait.
        tokio::task::yield_now().await;
    }
    Ok(check.finish())
}

/// Checks that the model exists and that the tenant may use it.
async fn check_model(lease: &Lease, model: &str) -> Result<(), WireError> {
    let named = catalog::parse_ref(model)?;
    let policy = lease.batch().details.policy;
    let meant = lease.gateway.meant(&named).await?;
    if meant.iter().any(|model| policy.allows(&model.name)) {
        return Ok(());
    }
    Err(WireError::new(ErrorCode::ModelNotAllowed, format!("this API key may not use the model {model}")))
}

fn endpoint(lease: &Lease) -> Result<BatchEndpoint, WireError> {
    let endpoint = BatchEndpoint::of_path(&lease.batch().endpoint);
    endpoint.ok_or_else(|| WireError::new(ErrorCode::InternalError, "the batch has an endpoint of another version"))
}

/// Runs the lines that have no result. Then the results are complete, unless the batch was cancelled or expired.
async fn run_lines(lease: &Lease) -> Result<(), WireError> {
    let endpoint = endpoint(lease)?;
    let runner = &LineRunner::new(lease, endpoint);
    let lines_max = lease.gateway.config().batch_lines_max.max(1);
    let mut open = OpenLines::new(lease);
    let mut running = FuturesUnordered::new();
    let run = Box::pin(async {
        loop {
            let next = open.next();
            tokio::pin!(next);
            let next = loop {
                tokio::select! {
                    biased;
                    next = &mut next => break next?,
                    Some(ended) = running.next() => ended?,
                }
            };
            let Some((number, bytes)) = next else { break };
            let line = parse_line(&bytes, endpoint);
            let line = line.map_err(|_| WireError::new(ErrorCode::InternalError, "a checked line has changed"))?;
            running.push(runner.run(number, line));
            while running.len() >= lines_max
                && let Some(ended) = running.next().await
            {
                ended?;
            }
        }
        while let Some(ended) = running.next().await {
            ended?;
        }
        Ok::<_, WireError>(())
    });
    let ran = lease.halt().run_until_cancelled(run).await;
    match ran {
        Some(Ok(())) => lease.step(Some(BatchStatus::Finalizing), None, vec![]).await,
        // Whoever runs these lines again gets the answers of their jobs.
        Some(Err(error)) if is_passing(&error) => Err(error),
        ended => {
            lease.halt().cancel();
            drain(lease, &mut running).await;
            ended.unwrap_or(Ok(()))
        }
    }
}

/// Records the answers of the lines that have begun. The orchestrator cancels their jobs if the batch ends, so that few
/// take long.
async fn drain(lease: &Lease, running: &mut FuturesUnordered<impl Future<Output = Result<(), WireError>>>) {
    let all = async {
        while let Some(ended) = running.next().await {
            if let Err(error) = ended {
                debug!(batch = %lease.reference().id, %error, "a line that had begun was not recorded");
            }
        }
    };
    if time::timeout(DRAIN_WITHIN, all).await.is_err() {
        warn!(batch = %lease.reference().id, "lines that had begun took too long to end");
    }
}

/// Gives the lines without a result the error that their time is over.
async fn expire(lease: &Lease) -> Result<(), WireError> {
    if lease.batch().status == BatchStatus::InProgress {
        let (batch, endpoint, mut open) = (lease.reference(), endpoint(lease)?, OpenLines::new(lease));
        while let Some((number, bytes)) = open.next().await? {
            let Ok(line) = parse_line(&bytes, endpoint) else { continue };
            let job: CorrelationId = batch.id.job_id(&batch.tenant_id, number);
            let message = "the batch's time was over before this request had run";
            let outcome = LineOutcome::Error { code: "batch_expired", message };
            lease.record(number, 0, true, write_result(job, &line.custom_id, &outcome)).await?;
        }
    }
    lease.step(Some(BatchStatus::Expired), None, vec![]).await
}

/// The lines of a batch that have no result.
struct OpenLines<'a> {
    lease: &'a Lease,
    lines: Lines,
    /// Number of the last line. Blank lines do not count, as they do not in the number of all lines.
    number: u32,
    /// Lines before this one were looked up, and those with a result are in `done`.
    looked_up: u32,
    done: HashSet<u32>,
}

impl<'a> OpenLines<'a> {
    fn new(lease: &'a Lease) -> Self {
        Self { lease, lines: Lines::new(lease), number: 0, looked_up: 0, done: HashSet::new() }
    }

    async fn next(&mut self) -> Result<Option<(u32, Vec<u8>)>, WireError> {
        loop {
            let Some(bytes) = self.lines.next().map(|(_, bytes)| bytes.to_vec()) else {
                if self.lines.fill().await? {
                    continue;
                }
                return Ok(None);
            };
            self.number = self.number.saturating_add(1);
            let number = self.number;
            if number >= self.looked_up {
                self.looked_up = number.saturating_add(WINDOW);
                self.done = self.lease.lines(number, self.looked_up).await?.into_iter().collect();
            }
            if !self.done.contains(&number) {
                return Ok(Some((number, bytes)));
            }
        }
    }
}

/// The lines of the requests' file.
struct Lines {
    reader: FileReader,
    splitter: LineSplitter,
    line_bytes_max: usize,
    has_ended: bool,
}

impl Lines {
    fn new(lease: &Lease) -> Self {
        let line_bytes_max = lease.gateway.config().body_bytes_max;
        Self { reader: lease.input(), splitter: LineSplitter::default(), line_bytes_max, has_ended: false }
    }

    /// Reads on. Returns whether there may be a further line.
    async fn fill(&mut self) -> Result<bool, WireError> {
        if self.has_ended {
            return Ok(false);
        }
        if self.splitter.pending() > self.line_bytes_max {
            let message = format!("a line of the file is longer than {} bytes", self.line_bytes_max);
            return Err(WireError::new(ErrorCode::RequestTooLarge, message));
        }
        match self.reader.next().await? {
            Some(bytes) => self.splitter.push(&bytes),
            None => {
                self.has_ended = true;
                // The last line may have no end.
                self.splitter.push(b"\n");
            }
        }
        Ok(true)
    }

    fn next(&mut self) -> Option<(u32, &[u8])> {
        self.splitter.next()
    }
}
