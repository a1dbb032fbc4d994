//! The introduction that a node sends first on a connection, to prove who it is.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::control::{Hello, NODE_HELLO};
use protocol::{WireError, codec};
use tokio::task::unconstrained;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::links::{Link, Links};
use crate::membership::Membership;

/// How long a peer may take to respond to an introduction.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of this node's introduction on a connection.
#[derive(Default)]
pub(super) struct Introduction(Mutex<State>);

#[derive(Default)]
struct State {
    /// The serial number of the certificate that was shown. `None` before the first introduction, and if the peer needs
    /// to see it again.
    shown: Option<u64>,
    /// Cancelled when the peer has responded, or will not respond.
    responded: CancellationToken,
}

impl Introduction {
    /// Requests that the certificate is shown again before the next call.
    pub(super) fn repeat(&self) {
        self.lock().shown = None;
    }

    /// Waits until the peer has responded, or will not respond. Cancel safe.
    pub(super) async fn wait_for_response(&self) {
        let responded = self.lock().responded.clone();
        responded.cancelled().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }
}

/// Shows this node's certificate on a connection, unless it was already shown there.
pub(super) fn introduce(link: &Arc<Link>, membership: &Membership, links: &Links) {
    // A peer may have proven on another connection that it is a member.
    if membership.is_member(link.connection().remote_key()) {
        link.connection().trust();
    }
    let Some(serial) = membership.serial() else { return };
    let mut state = link.introduction.lock();
    if state.shown == Some(serial) {
        return;
    }
    let responded = CancellationToken::new();
    *state = State { shown: Some(serial), responded: responded.clone() };
    // However the task ends, the waiters are released.
    let done = responded.drop_guard();
    let (link, membership) = (link.clone(), membership.clone());
    let mut telling = Box::pin(unconstrained(async move {
        let _done = done;
        let connection = link.connection();
        let (peer, secret) = (connection.remote_key(), connection.secret());
        let Some(hello) = membership.introduction(peer, &secret) else { return };
        match time::timeout(RESPONSE_TIMEOUT, connection.request(NODE_HELLO, codec::encode(&hello).into())).await {
            Ok(Ok(reply)) => {
                let hello = codec::decode::<Hello>(&reply).map_err(WireError::from);
                if let Err(error) = hello.and_then(|hello| membership.meet_callee(peer, &secret, &hello)) {
                    debug!(peer = peer.short(), %error, "the peer's introduction is invalid");
                }
                if membership.is_member(peer) {
                    connection.trust();
                }
            }
            Ok(Err(error)) => debug!(peer = peer.short(), %error, "this node was not taken for a member"),
            Err(_) => debug!(peer = peer.short(), "the introduction was not answered"),
        }
    }));
    // Polled here, under the lock, so that it is sent before any call that follows on this connection.
    if telling.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Pending {
        links.spawn(telling);
    }
}
