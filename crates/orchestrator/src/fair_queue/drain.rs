//! How fast waiting jobs of a group are released.

use std::time::Duration;

/// What is older than this counts little.
const MEMORY_SECS: f64 = 20.0;
/// The speed is unknown before so much time was measured.
const KNOWN_AFTER_SECS: f64 = 0.2;

/// Measures the tokens that are released in each second in which jobs wait.
#[derive(Debug, Default)]
pub(super) struct Drain {
    tokens: f64,
    secs: f64,
    /// When the last job was released, or when jobs began to wait.
    last: Option<Duration>,
}

impl Drain {
    /// Jobs begin to wait.
    pub(super) fn begin(&mut self, now: Duration) {
        self.last = Some(now);
    }

    pub(super) fn released(&mut self, tokens: u64, now: Duration) {
        let secs = now.saturating_sub(self.last.replace(now).unwrap_or(now)).as_secs_f64();
        let kept = (-secs / MEMORY_SECS).exp();
        self.tokens = self.tokens * kept + tokens as f64;
        self.secs = self.secs * kept + secs;
    }

    pub(super) fn time_for(&self, tokens: u64) -> Option<Duration> {
        let is_known = self.secs >= KNOWN_AFTER_SECS && self.tokens > 0.0;
        let secs = is_known.then(|| tokens as f64 * self.secs / self.tokens)?;
        Some(Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX))
    }
}
