//! Limits the calls that a server works on at once: those of members, of strangers, and of each stranger.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use protocol::{PublicKey, WireError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{ServerLimits, too_busy, too_many_of_yours};

/// The calls in progress, within their limits.
pub(super) struct CallPermits {
    members: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    per_stranger: usize,
    /// The calls of each stranger, over all its connections. Strangers without calls are not listed.
    by_stranger: Mutex<HashMap<PublicKey, usize>>,
}

/// Permits one call within the limits, until it is dropped.
pub(super) struct CallPermit {
    stranger: Option<(Arc<CallPermits>, PublicKey)>,
    _permit: OwnedSemaphorePermit,
}

impl CallPermits {
    pub(super) fn new(limits: &ServerLimits) -> Arc<Self> {
        let permits = |count: usize| Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        Arc::new(Self {
            members: permits(limits.calls_max),
            strangers: permits(limits.strangers_calls_max),
            per_stranger: limits.strangers_calls_per_peer_max,
            by_stranger: Mutex::default(),
        })
    }

    /// Permits a call of a member.
    pub(super) fn enter(&self) -> Result<CallPermit, WireError> {
        let permit = self.members.clone().try_acquire_owned().map_err(|_| too_busy())?;
        Ok(CallPermit { stranger: None, _permit: permit })
    }

    /// Permits a call of a stranger. It counts from its arrival, whether or not the caller has sent its request.
    pub(super) fn enter_stranger(self: &Arc<Self>, peer: PublicKey) -> Result<CallPermit, WireError> {
        let mut by_stranger = self.by_stranger.lock();
        let calls = by_stranger.get(&peer).copied().unwrap_or(0);
        if calls >= self.per_stranger {
            return Err(too_many_of_yours());
        }
        let permit = self.strangers.clone().try_acquire_owned().map_err(|_| too_busy())?;
        by_stranger.insert(peer, calls + 1);
        Ok(CallPermit { stranger: Some((self.clone(), peer)), _permit: permit })
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        let Some((permits, peer)) = &self.stranger else { return };
        let mut by_stranger = permits.by_stranger.lock();
        if let Some(calls) = by_stranger.get_mut(peer) {
            *calls -= 1;
            if *calls == 0 {
                by_stranger.remove(peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_has_a_part_of_the_strangers_calls_and_a_member_none_of_them() {
        let limits = ServerLimits {
            calls_max: 1,
            strangers_calls_max: 3,
            strangers_calls_per_peer_max: 2,
            ..ServerLimits::default()
        };
        let permits = CallPermits::new(&limits);
        let [one, other] = [1, 2].map(|seed| PublicKey([seed; 32]));
        let held: Vec<_> = (0..2).map(|_| permits.enter_stranger(one).expect("within its part")).collect();
        assert_eq!(permits.enter_stranger(one).map(drop), Err(too_many_of_yours()));
        let last = permits.enter_stranger(other).expect("the other's part");
        assert_eq!(permits.enter_stranger(other).map(drop), Err(too_busy()));
        let member = permits.enter().expect("the members' own");
        assert_eq!(permits.enter().map(drop), Err(too_busy()));
        drop((held, last, member));
        assert!(permits.by_stranger.lock().is_empty(), "nothing is remembered of those that left");
        permits.enter_stranger(one).expect("given back");
    }
}
