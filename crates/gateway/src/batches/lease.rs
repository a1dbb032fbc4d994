//! The lease under which a gateway works on a batch.

use std::time::Duration;

use parking_lot::Mutex;
use protocol::batches::{
    BATCH_LINES, BATCH_RECORD, BATCH_STEP, Batch, BatchError, BatchNow, BatchRef, BatchStatus, BatchStep, LineList,
    LineResult, LinesQuery,
};
use protocol::control::Empty;
use protocol::files::{Base64Bytes, FileRef};
use protocol::{ErrorCode, PublicKey, WireError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use crate::files::FileReader;
use crate::gateway::Gateway;

/// How often the lease is extended, and with it the state of the batch is looked at, at least.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Pause before a call that failed is made again.
const AGAIN_AFTER: Duration = Duration::from_millis(500);

/// A batch on which this gateway works.
pub(super) struct Lease {
    pub(super) gateway: Gateway,
    keeper: PublicKey,
    batch: BatchRef,
    epoch: u64,
    lasts: Duration,
    now: Mutex<BatchNow>,
    /// Cancelled when no further line is to run.
    halt: CancellationToken,
}

impl Lease {
    pub(super) fn new(gateway: Gateway, keeper: PublicKey, now: BatchNow) -> Self {
        let batch = BatchRef { tenant_id: now.batch.tenant_id.clone(), id: now.batch.id.clone() };
        let (epoch, lasts) = (now.epoch, Duration::from_millis(now.lease_ms));
        let lease =
            Self { gateway, keeper, batch, epoch, lasts, now: Mutex::new(now.clone()), halt: CancellationToken::new() };
        lease.note(now);
        lease
    }

    /// Extends the lease for as long as it can be extended.
    pub(super) async fn keep(&self) {
        let mut until = Instant::now() + self.lasts;
        loop {
            time::sleep(LOOK_EVERY.min(self.lasts / 3)).await;
            let asked = Instant::now();
            match self.step(None, None, vec![]).await {
                Ok(()) => until = asked + self.lasts,
                Err(error) if is_passing(&error) && Instant::now() < until => {}
                Err(_) => return,
            }
        }
    }

    /// Returns the batch as it was when it was last looked at.
    pub(super) fn batch(&self) -> Batch {
        self.now.lock().batch.clone()
    }

    pub(super) fn reference(&self) -> &BatchRef {
        &self.batch
    }

    pub(super) fn is_overdue(&self) -> bool {
        self.now.lock().is_overdue
    }

    /// Returns the orchestrator that has the batch.
    pub(super) fn keeper(&self) -> PublicKey {
        self.keeper
    }

    /// Returns the token that is cancelled when no further line is to run.
    pub(super) fn halt(&self) -> &CancellationToken {
        &self.halt
    }

    /// Does something, unless no further line is to run.
    pub(super) async fn unless_halted<Done>(
        &self,
        work: impl Future<Output = Result<Done, WireError>>,
    ) -> Result<Done, WireError> {
        self.halt.run_until_cancelled(work).await.unwrap_or_else(|| Err(halted()))
    }

    /// Returns a reader of the requests.
    pub(super) fn input(&self) -> FileReader {
        let file = FileRef { tenant_id: self.batch.tenant_id.clone(), id: self.batch().input_file };
        self.gateway.read_file(self.keeper, file)
    }

    fn note(&self, now: BatchNow) {
        let has_ended = now.batch.status.is_final() || now.batch.status == BatchStatus::Cancelling;
        if now.is_overdue || has_ended {
            self.halt.cancel();
        }
        *self.now.lock() = now;
    }

    /// Takes the batch a step on, and extends the lease.
    pub(super) async fn step(
        &self,
        status: Option<BatchStatus>,
        total: Option<u32>,
        errors: Vec<BatchError>,
    ) -> Result<(), WireError> {
        let step = BatchStep { batch: self.batch.clone(), epoch: self.epoch, status, total, errors };
        let now: BatchNow = self.gateway.upstream().ask_keeper(self.keeper, BATCH_STEP, &step).await?;
        self.note(now);
        Ok(())
    }

    /// Returns which of the lines from `from` to before `to` have a result.
    pub(super) async fn lines(&self, from: u32, to: u32) -> Result<Vec<u32>, WireError> {
        let query = LinesQuery { batch: self.batch.clone(), from, to };
        let list: LineList = self.patiently(BATCH_LINES, &query).await?;
        Ok(list.lines)
    }

    /// Writes the result of a line, which one of its runs gave.
    pub(super) async fn record(&self, line: u32, run: u32, is_error: bool, bytes: Vec<u8>) -> Result<(), WireError> {
        let (batch, epoch) = (self.batch.clone(), self.epoch);
        let result = LineResult { batch, epoch, line, run, is_error, bytes: Base64Bytes(bytes) };
        self.patiently::<_, Empty>(BATCH_RECORD, &result).await.map(drop)
    }

    /// Makes a call again and again while its orchestrator is away. If that takes too long, the lease is lost.
    async fn patiently<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        loop {
            match self.gateway.upstream().ask_keeper(self.keeper, method, request).await {
                Err(error) if is_passing(&error) => time::sleep(AGAIN_AFTER).await,
                replied => return replied,
            }
        }
    }
}

/// Returns the error of a line that does not go on, because its batch does not.
fn halted() -> WireError {
    WireError::new(ErrorCode::Cancelled, "no further line of the batch is to run")
}

/// Returns whether the same call may succeed soon.
pub(super) fn is_passing(error: &WireError) -> bool {
    error.code == ErrorCode::Unavailable
}
