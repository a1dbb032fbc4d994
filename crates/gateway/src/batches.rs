//! Batches: what clients ask of them, and the work on them.
//!
//! An orchestrator owns each batch: its state, its results, and the lease under which one gateway works on it. The
//! gateway translates the lines with the code of their endpoints and submits them like other jobs, each under a token
//! that follows from batch and line. Whoever takes the batch over gets the answers of the jobs that ran already.

mod lease;
mod run_line;
mod task;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use protocol::batches::{
    BATCH_CANCEL, BATCH_CLAIM, BATCH_CREATE, BATCH_LIST, BATCH_SHOW, Batch, BatchClaim, BatchClaimed, BatchDetails,
    BatchId, BatchList, BatchNow, BatchQuery, BatchRef, NewBatch,
};
use protocol::control::{NodeRole, TokenGrant};
use protocol::files::{FileId, FileRef};
use protocol::{ErrorCode, PublicKey, TenantId, WireError};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info};

use self::lease::Lease;
use crate::gateway::Gateway;
use crate::openai::batch::BatchOrder;

/// How often the orchestrators are asked for batches on which nobody works.
const CLAIM_EVERY: Duration = Duration::from_secs(5);
/// The longest time for which a batch whose work broke off is not claimed again; it doubles with each time.
const REST_MAX: Duration = Duration::from_mins(5);
/// The most batches on which a gateway works at the same time. They share its lines.
const BATCHES_MAX: usize = 32;

impl Gateway {
    pub(crate) async fn create_batch(&self, grant: &TokenGrant, order: BatchOrder) -> Result<Batch, WireError> {
        let tenant_id = grant.tenant_id.clone();
        let input = FileRef { tenant_id: tenant_id.clone(), id: order.input_file };
        let (keeper, _) = self.file(&input).await?;
        let details = BatchDetails {
            metadata: order.metadata,
            key_id: grant.key_id.clone(),
            policy: grant.policy.clone(),
            errors: vec![],
        };
        let new = NewBatch {
            tenant_id,
            id: BatchId::new(self.make_id()?.0),
            endpoint: order.endpoint.path().to_owned(),
            input_file: input.id,
            output_file: FileId::new(self.make_id()?.0),
            error_file: FileId::new(self.make_id()?.0),
            results_expire_after_secs: order.results_expire_after_secs,
            details,
        };
        let created = self.ask_to_create(keeper, &new).await.map_err(WireError::for_clients)?;
        self.batch_created().notify_one();
        Ok(created)
    }

    /// Asks once more if there is no reply: the orchestrator creates a batch once, and its client cannot know its id.
    async fn ask_to_create(&self, keeper: PublicKey, new: &NewBatch) -> Result<Batch, WireError> {
        match self.upstream().ask_keeper(keeper, BATCH_CREATE, new).await {
            Err(error) if error.code == ErrorCode::Unavailable => {
                self.upstream().ask_keeper(keeper, BATCH_CREATE, new).await
            }
            created => created,
        }
    }

    pub(crate) async fn batch(&self, batch: &BatchRef) -> Result<Batch, WireError> {
        let asked = self.upstream().ask(NodeRole::Orchestrator, BATCH_SHOW, batch).await;
        asked.map_err(WireError::for_clients)
    }

    pub(crate) async fn cancel_batch(&self, batch: &BatchRef) -> Result<Batch, WireError> {
        let asked = self.upstream().ask(NodeRole::Orchestrator, BATCH_CANCEL, batch).await;
        asked.map_err(WireError::for_clients)
    }

    /// Lists the batches of all orchestrators, the newest first.
    pub(crate) async fn list_batches(
        &self,
        tenant_id: TenantId,
        after: Option<BatchId>,
        limit: u32,
    ) -> Result<Vec<Batch>, WireError> {
        let query = BatchQuery { tenant_id, after, limit };
        let asked = self.upstream().ask_each(NodeRole::Orchestrator, BATCH_LIST, |_| Some(query.clone())).await?;
        let mut batches = vec![];
        for (_, reply) in asked {
            let list: BatchList = reply.map_err(WireError::for_clients)?;
            batches.extend(list.batches);
        }
        batches.sort_by(|one, other| other.id.cmp(&one.id));
        // Orchestrators may share a store.
        batches.dedup_by(|one, other| one.id == other.id);
        batches.truncate(limit as usize);
        Ok(batches)
    }
}

/// Claims batches on which nobody works, and works on them.
pub(crate) struct BatchWorker {
    gateway: Gateway,
    /// The batches on which it works, and the orchestrators that have them.
    working_on: Mutex<BTreeMap<BatchId, PublicKey>>,
    /// The batches whose work broke off not long ago.
    resting: Mutex<BTreeMap<BatchId, Rest>>,
}

/// For how long a batch is not claimed again.
#[derive(Clone, Copy)]
struct Rest {
    until: Instant,
    lasts: Duration,
}

impl BatchWorker {
    pub(crate) fn new(gateway: Gateway) -> Self {
        Self { gateway, working_on: Mutex::default(), resting: Mutex::default() }
    }

    /// Runs until `stop`. The lines that run then go on for a while, for whoever takes their batches over.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let (worker, works) = (Arc::new(self), TaskTracker::new());
        loop {
            if stop.run_until_cancelled(worker.claim_all(&works, &stop)).await.is_none() {
                break;
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = time::sleep(CLAIM_EVERY) => {}
                () = worker.gateway.batch_created().notified() => {}
            }
        }
        works.close();
        works.wait().await;
    }

    async fn claim_all(self: &Arc<Self>, works: &TaskTracker, stop: &CancellationToken) {
        while self.working_on.lock().len() < BATCHES_MAX {
            let claimed = self.claim().await;
            if claimed.is_empty() {
                return;
            }
            for (keeper, batch) in claimed {
                self.begin(keeper, batch, works, stop);
            }
        }
    }

    /// Asks each orchestrator for a batch.
    async fn claim(&self) -> Vec<(PublicKey, BatchNow)> {
        let unwanted = self.unwanted();
        let claim = |_| Some(BatchClaim { working_on: unwanted.clone() });
        let asked = self.gateway.upstream().ask_each(NodeRole::Orchestrator, BATCH_CLAIM, claim).await;
        let replies = asked.unwrap_or_default().into_iter().filter_map(|(keeper, reply)| match reply {
            Ok(BatchClaimed { claimed }) => Some((keeper, claimed?)),
            Err(error) => {
                debug!(%error, "no batch could be claimed");
                None
            }
        });
        replies.collect()
    }

    /// Returns the batches that are not to be claimed: those on which it works, and those that rest.
    fn unwanted(&self) -> Vec<BatchId> {
        let now = Instant::now();
        let mut resting = self.resting.lock();
        resting.retain(|_, rest| now < rest.until + REST_MAX);
        let mut unwanted: Vec<_> = self.working_on.lock().keys().cloned().collect();
        unwanted.extend(resting.iter().filter(|(_, rest)| now < rest.until).map(|(id, _)| id.clone()));
        unwanted
    }

    /// Notes how the work on a batch ended. One whose work broke off rests, longer with each time.
    fn end(&self, id: &BatchId, broke_off: bool) {
        let mut resting = self.resting.lock();
        let before = resting.remove(id);
        if broke_off {
            let lasts = before.map_or(CLAIM_EVERY, |rest| (rest.lasts * 2).min(REST_MAX));
            resting.insert(id.clone(), Rest { until: Instant::now() + lasts, lasts });
        }
        self.working_on.lock().remove(id);
    }

    fn begin(self: &Arc<Self>, keeper: PublicKey, now: BatchNow, works: &TaskTracker, stop: &CancellationToken) {
        let id = now.batch.id.clone();
        info!(batch = %id, status = now.batch.status.as_str(), epoch = now.epoch, "work on a batch begins");
        self.working_on.lock().insert(id.clone(), keeper);
        let (worker, stop) = (self.clone(), stop.clone());
        works.spawn(async move {
            let lease = Lease::new(worker.gateway.clone(), keeper, now);
            let broke_off = tokio::select! {
                () = stop.cancelled() => false,
                () = lease.keep() => {
                    info!(batch = %id, "the lease of a batch is lost");
                    false
                }
                worked = work::work(&lease) => worked.is_err(),
            };
            worker.end(&id, broke_off);
        });
    }
}
