//! Calls the registries and orchestrators of the region, with retries on other peers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use protocol::control::NodeRole;
use protocol::infer::{self, Degraded, InferRequest};
use protocol::jobs::{JOB_SHOW, JobInfo, JobPage, JobRef, JobStatus};
use protocol::kept::{KEPT_READ, KeptRef};
use protocol::{CorrelationId, Digest, ErrorCode, PublicKey, Region, Topic, WireError, codec};
use rpc::announce::DirectoryTask;
use rpc::backoff::Backoff;
use rpc::{CallError, Client, Directory, Membership, MembershipTask, StreamOptions, Transport};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use crate::answer::{Begun, ChunkHead};

/// Timeout of a unary call.
const CALL: Duration = Duration::from_secs(2);
/// Timeout of a call that carries a part of a file.
const KEEPER_CALL: Duration = Duration::from_secs(10);
/// How long an orchestrator may take to say whether it has a job.
const HOLDER: Duration = Duration::from_millis(150);
/// How long a request waits for discovery to find a node of a role.
const APPEAR: Duration = Duration::from_secs(3);
/// How many times all orchestrators are tried in turn.
const ROUNDS: u32 = 3;
/// How long a job waits for orchestrators that restart. They let their jobs finish first.
const RESTART: Duration = Duration::from_secs(40);
/// The longest wait before the second round; it doubles with each further round.
const BACKOFF: Duration = Duration::from_millis(75);
/// The longest wait between rounds.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// The registries and orchestrators of the region.
pub(crate) struct Upstream {
    client: Client,
    directory: Directory,
    /// Counts calls, so that each starts with the next peer (round-robin).
    turn: AtomicUsize,
    /// Whether an orchestrator was ever found, and so may come back.
    had_orchestrator: AtomicBool,
}

/// When a job's answer must have begun, and how long its stream may be silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) deadline: Instant,
    pub(crate) stall: Duration,
}

/// Keeps the directory, the membership and the connections of an [`Upstream`] up to date while it runs.
pub(crate) struct UpstreamTask {
    client: Client,
    directory: DirectoryTask,
    membership: MembershipTask,
}

impl UpstreamTask {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let pauses = self.client.watch_for_pauses(stop.clone());
        tokio::join!(self.directory.run(stop.clone()), self.membership.run(stop), pauses);
    }
}

impl Upstream {
    pub(crate) fn new(transport: Arc<dyn Transport>, region: Region, membership: Membership) -> (Self, UpstreamTask) {
        let client = Client::new(transport.clone()).with_membership(membership);
        let (directory, task) = Directory::new(transport, client.clone(), Topic::Control(region));
        let membership = MembershipTask::new(client.clone(), directory.clone());
        let task = UpstreamTask { client: client.clone(), directory: task, membership };
        (Self { client, directory, turn: AtomicUsize::new(0), had_orchestrator: AtomicBool::new(false) }, task)
    }

    /// Returns the membership: which nodes belong to the network.
    pub(crate) fn membership(&self) -> &Membership {
        self.client.membership()
    }

    /// Returns whether a node of a role has responded recently.
    pub(crate) fn knows(&self, node: PublicKey, role: NodeRole) -> bool {
        self.directory.find(role).contains(&node)
    }

    /// Calls the nodes of a role in turn until one responds.
    pub(crate) async fn ask<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        role: NodeRole,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        self.ask_which(role, method, request).await.map(|(_, reply)| reply)
    }

    /// As [`Self::ask`], and returns which node responded.
    pub(crate) async fn ask_which<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        role: NodeRole,
        method: &str,
        request: &Request,
    ) -> Result<(PublicKey, Reply), WireError> {
        let mut last = None;
        for peer in self.peers(role, None).await? {
            let error = match self.client.call(peer, method, request, CALL).await {
                Ok(reply) => return Ok((peer, reply)),
                // A timeout says nothing about the next peer, so it is tried as well.
                Err(CallError::Deadline) => away(role),
                Err(error) => error.into(),
            };
            if !another_may_know(error.code) {
                return Err(error);
            }
            last = Some(of_both(last, error));
        }
        Err(last.unwrap_or_else(|| away(role)))
    }

    /// Calls one orchestrator, which has what the call is about.
    pub(crate) async fn ask_keeper<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        keeper: PublicKey,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        self.client.call(keeper, method, request, KEEPER_CALL).await.map_err(|error| match error {
            CallError::Deadline | CallError::Unreachable { .. } | CallError::PeerEnded => away(NodeRole::Orchestrator),
            error => error.into(),
        })
    }

    /// Calls all nodes of a role for which there is a request, at the same time.
    pub(crate) async fn ask_each<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        role: NodeRole,
        method: &str,
        request: impl Fn(PublicKey) -> Option<Request>,
    ) -> Result<Vec<(PublicKey, Result<Reply, WireError>)>, WireError> {
        let peers = self.peers(role, None).await?;
        let asked = peers.into_iter().filter_map(|peer| Some((peer, request(peer)?)));
        let calls = asked.map(|(peer, request)| async move {
            let reply = self.client.call(peer, method, &request, CALL).await;
            let reply = reply.map_err(|error| match error {
                CallError::Deadline => away(role),
                error => error.into(),
            });
            (peer, reply)
        });
        Ok(join_all(calls).await)
    }

    /// Submits a job to one orchestrator and waits until its answer begins or it is refused.
    pub(crate) async fn submit_to(
        &self,
        orchestrator: PublicKey,
        request: &InferRequest,
        timeouts: Timeouts,
    ) -> Result<Begun, WireError> {
        let left = timeouts.deadline.saturating_duration_since(Instant::now());
        let options = StreamOptions { accept_within: left, deadline: Some(left), stall: timeouts.stall };
        Ok(self.begin(orchestrator, Bytes::from(codec::encode(request)), options).await?)
    }

    /// Submits a job to an orchestrator and waits until its answer begins or it is refused. Its id decides the jitter
    /// of the waits between rounds. Repeats of a job with a token of the client go to the same orchestrator, as each
    /// knows only its own jobs. A job with a keeper goes to no other.
    pub(crate) async fn submit(
        &self,
        request: &InferRequest,
        timeouts: Timeouts,
        has_key: bool,
        keeper: Option<PublicKey>,
    ) -> Result<Begun, WireError> {
        let (body, id) = (Bytes::from(codec::encode(request)), request.correlation_id);
        let job = request.fingerprint.map(|_| id);
        let holder = if has_key && keeper.is_none() { self.holder(request).await } else { None };
        let mut last = away(NodeRole::Orchestrator);
        let mut may_be_known = false;
        // An orchestrator whose connection broke goes on with a job that lingers. No other may run it meanwhile.
        let mut runs_at = keeper;
        let mut backoff = Backoff::new(BACKOFF, BACKOFF_MAX, id.0.as_u128() as u64);
        let restarted_by = timeouts.deadline.min(Instant::now() + RESTART);
        let mut restarts = false;
        for round in 0.. {
            if round > 0 {
                if round >= ROUNDS && !(restarts && Instant::now() < restarted_by) {
                    break;
                }
                time::sleep(backoff.next_wait()).await;
            }
            let peers = match self.peers(NodeRole::Orchestrator, job).await {
                Ok(mut peers) => {
                    // Stable, so the others stay in their order.
                    peers.sort_by_key(|peer| Some(*peer) != holder);
                    peers
                }
                Err(error) if !self.had_orchestrator.load(Ordering::Relaxed) => return Err(error),
                Err(error) => {
                    (last, restarts) = (error, true);
                    continue;
                }
            };
            self.had_orchestrator.store(true, Ordering::Relaxed);
            let mut is_one_full = None;
            for peer in peers {
                if runs_at.is_some_and(|at| at != peer) {
                    continue;
                }
                let left = timeouts.deadline.saturating_duration_since(Instant::now());
                // An orchestrator accepts once a worker has sent something, which may take until the job's deadline.
                let options = StreamOptions { accept_within: left, deadline: Some(left), stall: timeouts.stall };
                match self.begin(peer, body.clone(), options).await {
                    Ok(begun) => return Ok(begun),
                    Err(_) if timeouts.deadline <= Instant::now() => return Err(CallError::Deadline.into()),
                    Err(error) => {
                        // One that stops refuses calls at first, and then breaks off or cannot be reached.
                        restarts |= may_restart(&error);
                        // An orchestrator that refused the job does not run it. One whose connection broke may still
                        // run it.
                        let refused = matches!(error, CallError::Remote(_) | CallError::Unreachable { .. });
                        let error = WireError::from(error);
                        if may_be_known && is_own_repeat(request, error.code) {
                            return Err(lost());
                        }
                        may_be_known |= !refused;
                        if !refused && request.linger_ms.is_some() {
                            runs_at = Some(peer);
                        }
                        if has_no_room(error.code) {
                            is_one_full.get_or_insert(error);
                        } else if another_may_know(error.code) {
                            last = error;
                        } else {
                            return Err(error);
                        }
                    }
                }
            }
            // The client tries again when it is told to; its request does not wait for room.
            if let Some(error) = is_one_full {
                return Err(error);
            }
        }
        Err(last)
    }

    /// Returns the orchestrator that has the job of a request with a key, if there are several to ask. An earlier call
    /// may have gone to another one than the first in order, because that one was away or had no capacity then.
    async fn holder(&self, request: &InferRequest) -> Option<PublicKey> {
        let peers = self.directory.find(NodeRole::Orchestrator);
        if !request.keeps_answer || peers.len() < 2 {
            return None;
        }
        let job = JobRef { correlation_id: request.correlation_id };
        let calls = peers.into_iter().map(|peer| {
            let call = self.client.call::<_, JobPage>(peer, JOB_SHOW, &job, HOLDER);
            async move { Some((peer, call.await.ok()?)) }
        });
        let mut known = calls.collect::<FuturesUnordered<_>>();
        let mut best: Option<(u8, PublicKey)> = None;
        while let Some(answered) = known.next().await {
            let Some((peer, page)) = answered else { continue };
            let own = page.jobs.iter().filter(|job| job.tenant_id == request.tenant_id);
            match own.filter_map(holds).max() {
                Some(RUNNING) => return Some(peer),
                rank => best = best.max(rank.map(|rank| (rank, peer))),
            }
        }
        best.map(|(_, peer)| peer)
    }

    /// Submits a job that runs without a reader, and waits until an orchestrator has recorded it.
    pub(crate) async fn submit_detached(&self, request: &InferRequest, timeouts: Timeouts) -> Result<(), WireError> {
        let body = Bytes::from(codec::encode(request));
        let mut last = away(NodeRole::Orchestrator);
        let holder = self.holder(request).await;
        let mut peers = self.peers(NodeRole::Orchestrator, Some(request.correlation_id)).await?;
        // Stable, so the others stay in their order.
        peers.sort_by_key(|peer| Some(*peer) != holder);
        for peer in peers {
            let options = StreamOptions { accept_within: CALL, deadline: None, stall: timeouts.stall };
            let opened = self.client.open_stream(peer, infer::SUBMIT, body.clone(), options).await;
            let accepted = match opened {
                Ok(mut stream) => stream.next().await.unwrap_or(Err(CallError::PeerEnded)),
                Err(error) => Err(error),
            };
            match accepted {
                Ok(_) => return Ok(()),
                // Another orchestrator must not run a job that this one may have recorded.
                Err(error @ (CallError::Remote(_) | CallError::Unreachable { .. })) => {
                    let error = WireError::from(error);
                    if !another_may_know(error.code) {
                        return Err(error);
                    }
                    last = error;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(last)
    }

    /// Opens the stream of a kept answer at the orchestrator that has it, and waits for its first chunk.
    pub(crate) async fn read_kept(
        &self,
        keeper: PublicKey,
        kept: &KeptRef,
        stall: Duration,
    ) -> Result<Begun, WireError> {
        let options = StreamOptions { accept_within: stall, deadline: None, stall };
        let body = Bytes::from(codec::encode(kept));
        Ok(self.open(keeper, KEPT_READ, body, options).await?)
    }

    async fn begin(&self, peer: PublicKey, body: Bytes, options: StreamOptions) -> Result<Begun, CallError> {
        self.open(peer, infer::SUBMIT, body, options).await
    }

    /// Opens the stream of an answer and waits for the first chunk that is part of it.
    async fn open(
        &self,
        peer: PublicKey,
        method: &str,
        body: Bytes,
        options: StreamOptions,
    ) -> Result<Begun, CallError> {
        let mut stream = self.client.open_stream(peer, method, body, options).await?;
        stream.acknowledge_reads();
        let (mut origin, mut quota, mut degraded) = (None, None, None);
        loop {
            let first = stream.next().await.transpose()?;
            let head = first.as_deref().map(ChunkHead::read).unwrap_or_default();
            if head.progress.is_none() {
                stream.lift_deadline();
                return Ok(Begun { stream, first, origin, quota, degraded });
            }
            (origin, quota) = (head.origin.or(origin), head.quota.or(quota));
            // One that says nothing takes back what was said before.
            degraded = head.degraded.or(degraded).filter(|degraded| *degraded != Degraded::default());
        }
    }

    /// Returns the nodes of a role, rotated by one with each call, or in the order that belongs to a job.
    async fn peers(&self, role: NodeRole, job: Option<CorrelationId>) -> Result<Vec<PublicKey>, WireError> {
        let mut peers = self.directory.find(role);
        if peers.is_empty() && self.directory.wait_for(role, APPEAR).await {
            peers = self.directory.find(role);
        }
        if peers.is_empty() {
            return Err(away(role));
        }
        match job {
            Some(job) => peers.sort_by_cached_key(|peer| rank(job, *peer)),
            None => {
                let first = self.turn.fetch_add(1, Ordering::Relaxed) % peers.len();
                peers.rotate_left(first);
            }
        }
        Ok(peers)
    }
}

/// Returns a peer's rank for a job (rendezvous hashing): every gateway asks the same peer first, and if one goes, only
/// its jobs move.
fn rank(job: CorrelationId, peer: PublicKey) -> Digest {
    Digest::of(&[&job.0.as_bytes()[..], &peer.0].concat())
}

/// How much a running job speaks for its orchestrator: no other one can have the answer.
const RUNNING: u8 = 2;

/// Returns how much a job speaks for its orchestrator. Returns `None` if it came to nothing, so that the request may
/// run anywhere.
fn holds(job: &JobInfo) -> Option<u8> {
    match job.status {
        JobStatus::Running => Some(RUNNING),
        JobStatus::Completed | JobStatus::Dead => Some(1),
        JobStatus::Failed | JobStatus::Cancelled => job.usage.is_some().then_some(1),
    }
}

/// Returns whether another peer may succeed: the error is about this peer, or about something that another may know.
pub(crate) fn another_may_know(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::Unavailable
            | ErrorCode::UnknownMethod
            | ErrorCode::NotFound
            | ErrorCode::NotEnrolled
            | ErrorCode::NodeRevoked
    )
}

/// Returns the error that stands for those of two peers. One that does not answer may have what the other does not
/// find.
fn of_both(earlier: Option<WireError>, later: WireError) -> WireError {
    match earlier {
        Some(earlier) if earlier.code == ErrorCode::Unavailable && later.code == ErrorCode::NotFound => earlier,
        _ => later,
    }
}

/// Returns whether an orchestrator refused a job because it knows no worker that takes it. It may have lost its
/// workers, so the others are asked as well.
fn has_no_room(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::NoCapacity | ErrorCode::BreakerOpen)
}

/// Returns whether an orchestrator refuses a job as a repeat of which the client knows nothing: this gateway itself
/// submitted it twice.
fn is_own_repeat(request: &InferRequest, code: ErrorCode) -> bool {
    match code {
        ErrorCode::IdempotencyInProgress => true,
        ErrorCode::IdempotencyKeyReused => request.fingerprint.is_none(),
        _ => false,
    }
}

/// Returns whether a node may be restarting: it cannot be reached, or it is stopping, which names no time to wait.
fn may_restart(error: &CallError) -> bool {
    match error {
        CallError::Unreachable { .. } | CallError::PeerEnded => true,
        CallError::Remote(error) => error.code == ErrorCode::Unavailable && error.retry_after_ms.is_none(),
        _ => false,
    }
}

/// Returns the error for a job whose orchestrator was lost while the job may still run there.
fn lost() -> WireError {
    WireError::new(ErrorCode::Unavailable, "the part of the network that had this job broke off, try again")
        .with_retry_after(Duration::from_secs(1))
}

/// Returns the error for an answer that is cut off because its gateway stops.
pub(crate) fn stopping() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this gateway is stopping, and the answer took too long to end, try again")
        .with_retry_after(Duration::from_secs(1))
}

/// Returns the error for a role of which no node responds.
pub(crate) fn away(role: NodeRole) -> WireError {
    let message = match role {
        NodeRole::Registry => "the network's registry does not answer, try again",
        NodeRole::Orchestrator => "no orchestrator of the network answers, try again",
        NodeRole::Gateway | NodeRole::Worker => "a part of the network does not answer, try again",
    };
    WireError::new(ErrorCode::Unavailable, message).with_retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_missing_while_a_peer_does_not_answer() {
        let [silent, missing, unknown] = [ErrorCode::Unavailable, ErrorCode::NotFound, ErrorCode::UnknownMethod];
        let of = |codes: &[ErrorCode]| {
            let errors = codes.iter().map(|code| WireError::new(*code, "said"));
            errors.fold(None, |earlier, later| Some(of_both(earlier, later))).map(|error| error.code)
        };
        assert_eq!(of(&[missing, missing]), Some(missing));
        assert_eq!(of(&[silent, missing]), Some(silent));
        assert_eq!(of(&[missing, silent, missing]), Some(silent));
        assert_eq!(of(&[unknown, missing]), Some(missing));
    }
}
