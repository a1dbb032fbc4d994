//! Whether a worker takes jobs, and how long those that it has may run.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use protocol::health::Activity;
use protocol::{ErrorCode, WireError};
use tokio_util::sync::CancellationToken;

/// Decides whether a worker takes jobs at all.
pub(crate) struct Standing {
    is_stopping: AtomicBool,
    activity: Mutex<Activity>,
    /// Ends the jobs that have not ended by themselves. Replaced when the worker takes jobs again after a pause.
    give_up: Mutex<CancellationToken>,
    life: CancellationToken,
}

impl Standing {
    /// Returns the state of a worker that takes jobs. When `life` is cancelled, its jobs end.
    pub(crate) fn new(life: CancellationToken) -> Self {
        let give_up = Mutex::new(life.child_token());
        Self { is_stopping: AtomicBool::new(false), activity: Mutex::default(), give_up, life }
    }

    /// Returns why no job is taken, if so.
    pub(crate) fn check(&self) -> Result<(), WireError> {
        if self.takes_jobs() { Ok(()) } else { Err(self.refusal()) }
    }

    pub(crate) fn takes_jobs(&self) -> bool {
        !self.is_stopping() && self.activity() != Activity::Paused
    }

    /// Returns the error of jobs that are refused or given to other workers.
    pub(crate) fn refusal(&self) -> WireError {
        let message = if self.is_stopping() {
            "the worker is stopping, try another"
        } else {
            "the worker takes no jobs at present, try another"
        };
        WireError::new(ErrorCode::WorkerStopping, message)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    /// From now on takes no jobs.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    pub(crate) fn activity(&self) -> Activity {
        *self.activity.lock()
    }

    pub(crate) fn set_activity(&self, activity: Activity) {
        // Before any job can be taken, because the old token would hand it over at once.
        if activity != Activity::Paused {
            let mut give_up = self.give_up.lock();
            if give_up.is_cancelled() {
                *give_up = self.life.child_token();
            }
        }
        *self.activity.lock() = activity;
    }

    /// Ends the jobs that run, so that other workers continue them.
    pub(crate) fn hand_over(&self) {
        self.give_up.lock().cancel();
    }

    /// Returns what ends a job that begins now.
    pub(crate) fn handed_over(&self) -> CancellationToken {
        self.give_up.lock().clone()
    }
}
