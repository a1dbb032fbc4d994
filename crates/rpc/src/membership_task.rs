//! Keeps a node's membership up to date: fetches the revocations from a registry, and renews the certificate in time.

use std::time::Duration;

use protocol::control::{CERTIFICATE_RENEW, Empty, Enrolled, NodeRole, POOL_STATE, PoolState, PoolStateRequest};
use protocol::membership::STATE_EVERY;
use protocol::{ErrorCode, PublicKey};
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::announce::Directory;
use crate::client::{CallError, Client};
use crate::membership::Membership;

/// How long a registry may take to respond. Together with [`STATE_EVERY`], this bounds how long a revocation takes to
/// spread.
const DEADLINE: Duration = Duration::from_secs(1);
/// The delay after a failed renewal. The certificate is still valid for days.
const RENEW_AGAIN: Duration = Duration::from_secs(30);

/// The task that keeps the membership of a [`Client`] up to date.
pub struct MembershipTask {
    client: Client,
    membership: Membership,
    directory: Directory,
    /// The registry that responded last.
    last: Option<PublicKey>,
    renew_at: Instant,
    is_revoked: bool,
    is_away: bool,
}

impl MembershipTask {
    /// Makes the task for a client's membership. It finds registries in a directory.
    pub fn new(client: Client, directory: Directory) -> Self {
        let membership = client.membership().clone();
        Self { client, membership, directory, last: None, renew_at: Instant::now(), is_revoked: false, is_away: false }
    }

    /// Asks every two seconds until `stop`. While no registry responds, the last known state applies.
    pub async fn run(mut self, stop: CancellationToken) {
        if !self.membership.is_checked() {
            return;
        }
        stop.run_until_cancelled(async {
            let mut ticks = time::interval(STATE_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut found = self.directory.clone();
            let mut is_searching = true;
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    searching = found.changed(), if is_searching && self.last.is_none() => is_searching = searching,
                }
                let registries = self.registries();
                self.update(&registries).await;
                self.tell_absence();
                if self.membership.is_due() && Instant::now() >= self.renew_at {
                    self.renew_at = Instant::now() + RENEW_AGAIN;
                    self.renew(&registries).await;
                }
            }
        })
        .await;
    }

    /// Returns the registries to ask: the one that responded last, those found, and the one from the invite.
    fn registries(&self) -> Vec<PublicKey> {
        let mut keys: Vec<PublicKey> = self.last.into_iter().collect();
        let others = self.directory.find(NodeRole::Registry).into_iter().chain(self.membership.registry());
        for key in others {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys
    }

    async fn update(&mut self, registries: &[PublicKey]) {
        let before = self.last.take();
        for registry in registries {
            let request = PoolStateRequest { version: self.membership.version() };
            match self.client.call::<_, PoolState>(*registry, POOL_STATE, &request, DEADLINE).await {
                Ok(state) => {
                    self.take(*registry, &state).await;
                    if self.is_confirmed_by(*registry, &state) {
                        self.last = Some(*registry);
                        return;
                    }
                }
                Err(CallError::Remote(refusal)) if refusal.code == ErrorCode::NodeRevoked => {
                    // Believed only if it comes from a registry that this node knows: by its certificate, by its last
                    // answer, or from the invite.
                    let is_known = before == Some(*registry) || self.membership.registry() == Some(*registry);
                    if (is_known || self.membership.has_role(*registry, NodeRole::Registry)) && !self.is_revoked {
                        self.is_revoked = true;
                        error!(
                            "this node was revoked: no other node takes its calls any more; to come back it needs a new key: \
                             stop it, move its key and enrolment in `nodes/` away, and join with a new invite"
                        );
                        self.membership.note_expelled();
                    }
                }
                Err(error) => debug!(registry = registry.short(), %error, "a registry did not tell the pool's state"),
            }
        }
    }

    /// Returns whether a registry's fresh stamp confirms the list that this node has. Otherwise another registry is
    /// asked, because this one may withhold revocations.
    fn is_confirmed_by(&self, registry: PublicKey, state: &PoolState) -> bool {
        let problem = match state.stamp.as_ref().map(|stamp| self.membership.take_stamp(stamp)) {
            Some(Ok(true)) => return true,
            Some(Ok(false)) => "its stamp is old, or the clocks differ",
            Some(Err(_)) => "its stamp is invalid",
            None => "it sends no stamp",
        };
        debug!(registry = registry.short(), problem, "a registry does not confirm the list of revoked nodes");
        false
    }

    /// Logs when the registries go away and when they come back.
    fn tell_absence(&mut self) {
        let is_away = self.membership.is_registry_away();
        if is_away && !self.is_away {
            warn!(
                "no registry answers: this node continues with what it knows; check that the registry runs and that the clocks agree"
            );
        } else if !is_away && self.is_away {
            info!("a registry answers again");
        }
        self.is_away = is_away;
    }

    async fn take(&self, registry: PublicKey, state: &PoolState) {
        let Some(list) = &state.revocations else { return };
        match self.membership.take_revocations(list) {
            Ok(true) => {
                info!(version = self.membership.version(), "the list of revoked nodes has changed");
                self.client.disconnect_revoked();
                self.keep().await;
            }
            Ok(false) => {}
            Err(error) => warn!(registry = registry.short(), %error, "a registry sent a false revocation list"),
        }
    }

    async fn renew(&mut self, registries: &[PublicKey]) {
        for registry in registries {
            let renewed = self.client.call::<_, Enrolled>(*registry, CERTIFICATE_RENEW, &Empty {}, DEADLINE).await;
            match renewed {
                Ok(enrolled) => match self.membership.renew(enrolled.certificate) {
                    Ok(()) => {
                        info!("this node's certificate was renewed");
                        self.keep().await;
                        return;
                    }
                    Err(error) => warn!(registry = registry.short(), %error, "a registry sent a false certificate"),
                },
                Err(error) => {
                    warn!(registry = registry.short(), %error, "the certificate was not renewed, trying again");
                }
            }
        }
    }

    /// Stores the certificate and the list, on a blocking thread.
    async fn keep(&self) {
        if let Some((keep, enrolled)) = self.membership.to_keep() {
            // The function reports its own errors.
            let _ = tokio::task::spawn_blocking(move || keep(&enrolled)).await;
        }
    }
}
