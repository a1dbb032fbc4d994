//! A worker and an orchestrator that are both behind firewalls: lookups find the other one, and no connection comes
//! about.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use engine::MockOptions;
use protocol::{PublicKey, Topic};
use rpc::transport::{Connection, TransportError};
use rpc::{Membership, Transport};
use tokio::time;

use crate::{SECOND, Scene, config};

/// How long an attempt to get through takes.
const ATTEMPT: Duration = Duration::from_secs(3);

/// A node's end of the network behind a wall that can be opened.
struct Walled {
    inner: Arc<dyn Transport>,
    is_open: Arc<AtomicBool>,
}

#[async_trait]
impl Transport for Walled {
    fn public_key(&self) -> PublicKey {
        self.inner.public_key()
    }

    async fn connect(&self, peer: PublicKey) -> Result<Arc<dyn Connection>, TransportError> {
        if self.is_open.load(Ordering::Relaxed) {
            return self.inner.connect(peer).await;
        }
        time::sleep(ATTEMPT).await;
        Err(TransportError::Unreachable { peer })
    }

    async fn accept(&self) -> Option<Arc<dyn Connection>> {
        // Nobody gets in either.
        while !self.is_open.load(Ordering::Relaxed) {
            time::sleep(ATTEMPT).await;
        }
        self.inner.accept().await
    }

    async fn announce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.announce(topic).await
    }

    async fn unannounce(&self, topic: &Topic) -> Result<(), TransportError> {
        self.inner.unannounce(topic).await
    }

    async fn lookup(&self, topic: &Topic) -> Result<Vec<PublicKey>, TransportError> {
        self.inner.lookup(topic).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_no_connection_reaches_says_within_15_seconds_that_a_port_must_be_forwarded() {
    let is_open = Arc::new(AtomicBool::new(false));
    let wall = |inner| Arc::new(Walled { inner, is_open: is_open.clone() }) as Arc<dyn Transport>;
    let (mock, admit) = (MockOptions::default(), |_: &_| Membership::unchecked());
    let scene = Scene::build_behind(config(), mock, |_| {}, |runtime| runtime, admit, wall).await;
    time::sleep(SECOND * 15).await;
    let why = scene.handle.unheard().expect("it says so");
    assert!(why.contains("gets no jobs") && why.contains("forward a UDP port"), "{why}");
    assert!(scene.orchestrator.received().is_empty());

    // Once there is a way through, it is found without a restart.
    is_open.store(true, Ordering::Relaxed);
    time::sleep(SECOND * 90).await;
    assert_eq!(scene.handle.unheard(), None);
    assert!(!scene.orchestrator.received().is_empty());
}
