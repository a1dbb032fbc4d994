//! Notices that this process did not run for a while, because it or its machine was stopped.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How often a process shows itself that it runs.
pub(super) const BEAT: Duration = Duration::from_millis(500);
/// The shortest time without a beat that counts as a pause.
const PAUSE: Duration = Duration::from_secs(3);

/// When this process last ran; `None` unless it is watched.
#[derive(Default)]
pub(super) struct Pauses(Mutex<Option<Instant>>);

impl Pauses {
    pub(super) fn begin(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    pub(super) fn end(&self) {
        *self.0.lock() = None;
    }

    /// Returns how long the process was stopped, once after each pause.
    pub(super) fn take(&self) -> Option<Duration> {
        let mut last = self.0.lock();
        let stopped = last.as_ref()?.elapsed();
        *last = Some(Instant::now());
        (stopped >= PAUSE).then_some(stopped)
    }
}
