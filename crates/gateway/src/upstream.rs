//! The registries and orchestrators of the region: finds one that answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use protocol::control::NodeRole;
use protocol::{ErrorCode, PublicKey, Region, Topic, WireError, infer};
use rpc::announce::DirectoryTask;
use rpc::{CallError, Client, Directory, Membership, MembershipTask, StreamOptions, Transport};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use crate::answer::{self, Begun};

/// How long a unary call may take.
const CALL: Duration = Duration::from_secs(2);
/// How long a request waits for a node of a role to be found.
const APPEAR: Duration = Duration::from_secs(1);
/// How often all orchestrators are tried in turn.
const ROUNDS: u32 = 3;
/// The wait after the first round; it doubles.
const BACKOFF: Duration = Duration::from_millis(50);

/// The registries and orchestrators of the region.
pub(crate) struct Upstream {
    client: Client,
    directory: Directory,
    /// Counts calls, so that each begins with another peer.
    turn: AtomicUsize,
}

/// Until when a job's answer must begin, and how long it may be silent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    pub(crate) deadline: Instant,
    pub(crate) stall: Duration,
}

/// Keeps an [`Upstream`] fresh while it runs: who is there, and who may be.
pub(crate) struct UpstreamTask {
    directory: DirectoryTask,
    membership: MembershipTask,
}

impl UpstreamTask {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        tokio::join!(self.directory.run(stop.clone()), self.membership.run(stop));
    }
}

impl Upstream {
    pub(crate) fn new(transport: Arc<dyn Transport>, region: Region, membership: Membership) -> (Self, UpstreamTask) {
        let client = Client::new(transport.clone()).with_membership(membership);
        let (directory, task) = Directory::new(transport, client.clone(), Topic::Control(region));
        let task = UpstreamTask { directory: task, membership: MembershipTask::new(client.clone(), directory.clone()) };
        (Self { client, directory, turn: AtomicUsize::new(0) }, task)
    }

    /// Says who belongs to the network.
    pub(crate) fn membership(&self) -> &Membership {
        self.client.membership()
    }

    /// Returns whether a node of a role answered lately.
    pub(crate) fn knows(&self, node: PublicKey, role: NodeRole) -> bool {
        self.directory.find(role).contains(&node)
    }

    /// Asks the nodes of a role in turn until one answers.
    pub(crate) async fn ask<Request: Serialize, Reply: DeserializeOwned>(
        &self,
        role: NodeRole,
        method: &str,
        request: &Request,
    ) -> Result<Reply, WireError> {
        let mut last = away(role);
        for peer in self.peers(role).await? {
            match self.client.call(peer, method, request, CALL).await {
                Ok(reply) => return Ok(reply),
                // Nothing is known about the peer that could not be told about the next.
                Err(CallError::Deadline) => last = away(role),
                Err(error) => {
                    let error = WireError::from(error);
                    if !another_may_know(error.code) {
                        return Err(error);
                    }
                    last = error;
                }
            }
        }
        Err(last)
    }

    /// Hands a job to an orchestrator and waits until its answer begins or one refuses it. `salt` spreads the waits
    /// between tries.
    pub(crate) async fn submit(&self, body: Bytes, timeouts: Timeouts, salt: u128) -> Result<Begun, WireError> {
        let mut last = away(NodeRole::Orchestrator);
        let mut may_be_known = false;
        for round in 0..ROUNDS {
            if round > 0 {
                time::sleep(backoff(round, salt)).await;
            }
            for peer in self.peers(NodeRole::Orchestrator).await? {
                let left = timeouts.deadline.saturating_duration_since(Instant::now());
                // An orchestrator accepts once a worker has said something, which may take as long as the job may wait.
                let options = StreamOptions { accept_within: left, deadline: Some(left), stall: timeouts.stall };
                match self.begin(peer, body.clone(), options).await {
                    Ok(begun) => return Ok(begun),
                    Err(_) if timeouts.deadline <= Instant::now() => return Err(CallError::Deadline.into()),
                    Err(error) => {
                        // One that refused has not kept the job; one that broke off may have.
                        let refused = matches!(error, CallError::Remote(_) | CallError::Unreachable { .. });
                        let error = WireError::from(error);
                        if may_be_known && error.code == ErrorCode::IdempotencyInProgress {
                            return Err(lost());
                        }
                        may_be_known |= !refused;
                        if !another_may_know(error.code) {
                            return Err(error);
                        }
                        last = error;
                    }
                }
            }
        }
        Err(last)
    }

    /// Opens a job's stream and waits for its first chunk that is part of the answer.
    async fn begin(&self, peer: PublicKey, body: Bytes, options: StreamOptions) -> Result<Begun, CallError> {
        let mut stream = self.client.open_stream(peer, infer::SUBMIT, body, options).await?;
        loop {
            let first = stream.next().await.transpose()?;
            if !first.as_ref().is_some_and(|chunk| answer::is_progress(chunk)) {
                stream.lift_deadline();
                return Ok(Begun { stream, first });
            }
        }
    }

    /// Returns the nodes of a role, each time beginning with another.
    async fn peers(&self, role: NodeRole) -> Result<Vec<PublicKey>, WireError> {
        let mut peers = self.directory.find(role);
        if peers.is_empty() && self.directory.wait_for(role, APPEAR).await {
            peers = self.directory.find(role);
        }
        if peers.is_empty() {
            return Err(away(role));
        }
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % peers.len();
        peers.rotate_left(first);
        Ok(peers)
    }
}

/// Returns whether an error is about the peer, or about something that only another peer knows.
fn another_may_know(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::Unavailable
            | ErrorCode::UnknownMethod
            | ErrorCode::NotFound
            | ErrorCode::NotEnrolled
            | ErrorCode::NodeRevoked
    )
}

/// Says that the job was at work where the connection broke off. It is this gateway's own, so no client has sent it
/// twice.
fn lost() -> WireError {
    WireError::new(ErrorCode::Unavailable, "the part of the network that had this job broke off, try again")
        .with_retry_after(Duration::from_secs(1))
}

/// Says that no node of a role answers.
pub(crate) fn away(role: NodeRole) -> WireError {
    let message = match role {
        NodeRole::Registry => "the network's registry does not answer, try again",
        NodeRole::Orchestrator => "no orchestrator of the network answers, try again",
        NodeRole::Gateway | NodeRole::Worker => "a part of the network does not answer, try again",
    };
    WireError::new(ErrorCode::Unavailable, message).with_retry_after(Duration::from_secs(1))
}

/// Returns the wait before a round: between half and one and a half times its nominal length.
fn backoff(round: u32, salt: u128) -> Duration {
    let share = ((salt >> (round * 8)) & 0xff) as u32;
    BACKOFF * (1 << (round - 1)) * (128 + share) / 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_between_rounds_grow_and_differ_between_jobs() {
        assert_eq!(backoff(1, 0), BACKOFF / 2);
        assert_eq!(backoff(2, 0), BACKOFF);
        assert!(backoff(1, u128::MAX) > BACKOFF && backoff(1, u128::MAX) < BACKOFF * 2);
    }
}
