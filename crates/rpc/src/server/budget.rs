//! Limits the bytes of requests that a server holds at once, in total and per peer.

use std::sync::Arc;
use std::time::Duration;

use protocol::codec::MESSAGE_BYTES_MAX;
use protocol::{ErrorCode, PublicKey, WireError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::ServerLimits;
use crate::membership::Membership;

/// Returns the maximum length of a request of a caller.
pub(super) type BodyLimit = Box<dyn Fn(PublicKey) -> usize + Send + Sync>;

/// The byte budget for the requests that a server holds at once.
pub(super) struct Budget {
    limit_of: Option<BodyLimit>,
    members: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
}

/// The limits of one call.
pub(crate) struct Allowance {
    limit: usize,
    pool: Arc<Semaphore>,
    is_strangers: bool,
}

/// Bytes reserved for a request. They are released when this is dropped.
#[derive(Debug)]
pub(crate) struct ReservedBytes {
    limit: usize,
    pool: Arc<Semaphore>,
    bytes: usize,
    permit: Option<OwnedSemaphorePermit>,
}

impl Budget {
    pub(super) fn new(limits: &ServerLimits, limit_of: Option<BodyLimit>) -> Self {
        let pool = |bytes: usize| Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        let (members, strangers) = (pool(limits.body_bytes_max), pool(limits.strangers_body_bytes_max));
        Self { limit_of, members, strangers }
    }

    /// Returns the maximum length of a caller's request at this moment.
    pub(super) fn request_bytes_max(&self, caller: PublicKey) -> usize {
        self.limit_of.as_ref().map_or(MESSAGE_BYTES_MAX, |limit_of| limit_of(caller)).min(MESSAGE_BYTES_MAX)
    }

    /// Returns the limits of a caller at this moment, because it may have introduced itself since its last call.
    ///
    /// Where membership is not checked, callers with a smaller limit are strangers.
    pub(super) fn allowance(&self, caller: PublicKey, membership: &Membership) -> Allowance {
        let limit = self.request_bytes_max(caller);
        let is_strangers =
            if membership.is_checked() { !membership.is_member(caller) } else { limit < MESSAGE_BYTES_MAX };
        let pool = if is_strangers { &self.strangers } else { &self.members };
        Allowance { limit, pool: pool.clone(), is_strangers }
    }
}

impl Allowance {
    /// Returns whether the call counts as a stranger's.
    pub(super) fn is_strangers(&self) -> bool {
        self.is_strangers
    }

    /// Starts a request of the given length. Nothing is reserved before bytes arrive.
    pub(crate) fn begin(self, bytes: usize) -> Result<ReservedBytes, WireError> {
        let Self { limit, pool, .. } = self;
        if bytes > limit {
            let message = format!("the request has {bytes} bytes, more than the {limit} that this node takes from you");
            return Err(WireError::new(ErrorCode::RequestTooLarge, message));
        }
        Ok(ReservedBytes { limit, pool, bytes: 0, permit: None })
    }
}

impl ReservedBytes {
    /// Reserves the bytes that arrived.
    pub(crate) fn grow(&mut self, bytes: usize) -> Result<(), WireError> {
        if bytes == 0 {
            return Ok(());
        }
        // A request never grows beyond its limit, which fits in a `u32`.
        let more = u32::try_from(bytes).ok().filter(|_| self.bytes + bytes <= self.limit).ok_or_else(full)?;
        let more = self.pool.clone().try_acquire_many_owned(more).map_err(|_| full())?;
        self.bytes += bytes;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        Ok(())
    }
}

fn full() -> WireError {
    WireError::new(ErrorCode::Unavailable, "this node holds too many requests, try again")
        .with_retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: PublicKey = PublicKey([1; 32]);
    const STRANGER: PublicKey = PublicKey([2; 32]);

    fn budget() -> Budget {
        let limits = ServerLimits { body_bytes_max: 750, strangers_body_bytes_max: 250, ..ServerLimits::default() };
        Budget::new(&limits, Some(Box::new(|key| if key == MEMBER { MESSAGE_BYTES_MAX } else { 100 })))
    }

    fn allowance(budget: &Budget, key: PublicKey) -> Allowance {
        budget.allowance(key, &Membership::unchecked())
    }

    #[test]
    fn strangers_have_a_smaller_limit_and_a_share_of_their_own() {
        let budget = budget();
        let long = allowance(&budget, STRANGER).begin(101).map(drop).expect_err("over the limit");
        assert_eq!(long.code, ErrorCode::RequestTooLarge);
        let take = |key, bytes| {
            let mut room = allowance(&budget, key).begin(bytes)?;
            room.grow(bytes).map(|()| room)
        };
        let held: Vec<ReservedBytes> = (0..2).map(|_| take(STRANGER, 100).expect("room")).collect();
        assert_eq!(take(STRANGER, 100).expect_err("they have 250").code, ErrorCode::Unavailable);
        let member = take(MEMBER, 750).expect("the members' own share");
        assert_eq!(take(MEMBER, 1).expect_err("full").code, ErrorCode::Unavailable);
        drop((held, member));
        take(STRANGER, 100).expect("given back");
        take(MEMBER, 750).expect("given back");
    }

    #[test]
    fn a_length_alone_takes_nothing() {
        let budget = budget();
        let announced: Vec<ReservedBytes> =
            (0..50).map(|_| allowance(&budget, STRANGER).begin(100).expect("allowed")).collect();
        let mut room = allowance(&budget, STRANGER).begin(100).expect("allowed");
        room.grow(60).expect("room");
        room.grow(40).expect("room");
        room.grow(1).expect_err("more than it may be");
        drop(announced);
    }
}
