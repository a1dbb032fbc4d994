//! Where calls run that wait for a disk.

use tokio_util::task::TaskTracker;

/// Runs calls that wait for a disk. Clones share their threads.
#[derive(Debug, Clone)]
pub struct DiskCalls(Option<TaskTracker>);

impl DiskCalls {
    /// Runs calls on threads of their own.
    pub fn on_threads() -> Self {
        Self(Some(TaskTracker::new()))
    }

    /// Runs each call at once. For simulations: what runs on several threads does not repeat.
    pub fn at_once() -> Self {
        Self(None)
    }

    /// Runs a call. Returns `None` if the runtime ends before the call has begun.
    pub(crate) async fn run<T: Send + 'static>(&self, call: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        match &self.0 {
            Some(threads) => threads.spawn_blocking(call).await.ok(),
            None => Some(call()),
        }
    }

    /// Waits until all calls have ended. No further ones may follow.
    pub(crate) async fn end(&self) {
        if let Some(threads) = &self.0 {
            threads.close();
            threads.wait().await;
        }
    }
}
