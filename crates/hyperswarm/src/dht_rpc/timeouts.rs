//! Estimates how long to wait for a response from a node's earlier responses.

use std::net::SocketAddrV4;
use std::time::Duration;

use tokio::time::Instant;

use super::aging_map::AgingMap;

const NODES_MAX: usize = 4_096;
const NODE_AGE_MAX: Duration = Duration::from_mins(10);
const FAILURE_AGE_MAX: Duration = Duration::from_mins(1);

const TIMEOUT_MIN: Duration = Duration::from_millis(300);
const TIMEOUT_MAX: Duration = Duration::from_secs(4);
/// For a node that has never responded.
const FIRST_TIMEOUTS: [Duration; 4] =
    [Duration::from_millis(500), Duration::from_millis(750), Duration::from_secs(1), Duration::from_millis(1_500)];

/// Remembers how fast nodes respond, and which failed to.
#[derive(Debug)]
pub(super) struct Timeouts {
    nodes: AgingMap<SocketAddrV4, Estimate>,
    failed: AgingMap<SocketAddrV4, ()>,
}

#[derive(Debug, Clone, Copy)]
struct Estimate {
    mean: Duration,
    deviation: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { nodes: AgingMap::new(NODES_MAX, NODE_AGE_MAX), failed: AgingMap::new(NODES_MAX, FAILURE_AGE_MAX) }
    }
}

impl Timeouts {
    /// Records how long a response took.
    pub(super) fn answered(&mut self, node: SocketAddrV4, took: Duration, now: Instant) {
        self.failed.remove(&node);
        if let Some(known) = self.nodes.get_mut(&node, now) {
            known.deviation = (known.deviation * 3 + known.mean.abs_diff(took)) / 4;
            known.mean = (known.mean * 7 + took) / 8;
        } else {
            self.nodes.insert(node, Estimate { mean: took, deviation: took / 2 }, now);
        }
    }

    /// Records that a node responded to no copy of a request.
    pub(super) fn failed(&mut self, node: SocketAddrV4, now: Instant) {
        self.nodes.remove(&node);
        self.failed.insert(node, (), now);
    }

    /// Returns whether a node failed to respond in the last minute.
    pub(super) fn failed_lately(&self, node: SocketAddrV4, now: Instant) -> bool {
        self.failed.get(&node, now).is_some()
    }

    /// Returns how long to wait after the `attempt`th copy (from 1) of a request.
    pub(super) fn timeout(&self, node: SocketAddrV4, attempt: u32, now: Instant) -> Duration {
        match self.nodes.get(&node, now) {
            Some(known) => ((known.mean + known.deviation * 4) * attempt).clamp(TIMEOUT_MIN, TIMEOUT_MAX),
            None => FIRST_TIMEOUTS[(attempt.max(1) as usize - 1).min(FIRST_TIMEOUTS.len() - 1)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_slow_node_gets_more_time_and_a_dead_one_is_remembered() {
        let now = Instant::now();
        let node = "1.2.3.4:5".parse().unwrap();
        let mut timeouts = Timeouts::default();
        assert_eq!(timeouts.timeout(node, 1, now), Duration::from_millis(500));
        assert_eq!(timeouts.timeout(node, 9, now), Duration::from_millis(1_500));
        timeouts.answered(node, Duration::from_millis(1), now);
        assert_eq!(timeouts.timeout(node, 1, now), TIMEOUT_MIN);
        for _ in 0..50 {
            timeouts.answered(node, Duration::from_secs(1), now);
        }
        assert!(timeouts.timeout(node, 1, now) > Duration::from_millis(900));
        assert_eq!(timeouts.timeout(node, 9, now), TIMEOUT_MAX);
        timeouts.failed(node, now);
        assert!(timeouts.failed_lately(node, now));
        assert!(!timeouts.failed_lately(node, now + FAILURE_AGE_MAX));
        timeouts.answered(node, Duration::from_secs(1), now);
        assert!(!timeouts.failed_lately(node, now));
    }
}
