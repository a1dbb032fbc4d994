//! What a simulation finds wrong, and what happened in it.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use protocol::Digest;
use tokio::time::Instant;

/// Collects what is wrong. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Findings(Arc<Mutex<Vec<String>>>);

impl Findings {
    pub fn report(&self, finding: String) {
        self.0.lock().push(finding);
    }

    pub fn all(&self) -> Vec<String> {
        self.0.lock().clone()
    }
}

/// The events of a simulation in their order, with the time of each. Clones share it.
#[derive(Debug, Clone)]
pub struct Trace {
    begun: Instant,
    events: Arc<Mutex<Vec<String>>>,
}

impl Trace {
    pub fn begin() -> Self {
        Self { begun: Instant::now(), events: Arc::default() }
    }

    pub fn note(&self, event: impl fmt::Display) {
        let at = self.begun.elapsed().as_millis();
        self.events.lock().push(format!("{at:>7} ms  {event}"));
    }

    pub fn events(&self) -> Vec<String> {
        self.events.lock().clone()
    }

    /// Returns a digest of all events.
    pub fn digest(&self) -> Digest {
        Digest::of(self.events.lock().join("\n").as_bytes())
    }
}
