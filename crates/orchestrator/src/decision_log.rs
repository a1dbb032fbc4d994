//! How the last jobs were placed, for `/admin/v1/jobs/{correlationId}/decision`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use protocol::CorrelationId;
use protocol::control::Decision;

/// Keeps the decisions of the last jobs.
pub struct DecisionLog {
    kept_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    decisions: HashMap<CorrelationId, Arc<Decision>>,
    order: VecDeque<CorrelationId>,
}

impl DecisionLog {
    /// Makes a log of at most `kept_max` jobs.
    pub fn new(kept_max: usize) -> Self {
        Self { kept_max, state: Mutex::default() }
    }

    /// Stores a job's decision, and removes the oldest if the log is full.
    pub fn keep(&self, decision: Decision) {
        let mut state = self.state.lock();
        let id = decision.correlation_id;
        if state.decisions.insert(id, Arc::new(decision)).is_none() {
            state.order.push_back(id);
        }
        while state.order.len() > self.kept_max {
            if let Some(oldest) = state.order.pop_front() {
                state.decisions.remove(&oldest);
            }
        }
    }

    /// Returns a job's decision while it is remembered.
    pub fn get(&self, id: CorrelationId) -> Option<Arc<Decision>> {
        self.state.lock().decisions.get(&id).cloned()
    }
}
