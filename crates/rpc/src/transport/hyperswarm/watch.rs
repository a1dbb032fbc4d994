//! Watches a connection's peer while calls are open on it, so that the end of the peer's process is noticed at once.

use std::sync::Arc;

use hyperswarm::udx;
use parking_lot::Mutex;

/// The open calls of a connection.
#[derive(Clone)]
pub(super) struct Watches(Arc<Mutex<Watched>>);

struct Watched {
    stream: Option<udx::Stream>,
    calls: usize,
}

/// An open call. The peer is watched until the last one is dropped.
pub(super) struct Watch(Watches);

impl Watches {
    pub(super) fn of(stream: Option<&udx::Stream>) -> Self {
        Self(Arc::new(Mutex::new(Watched { stream: stream.cloned(), calls: 0 })))
    }

    pub(super) fn watch(&self) -> Watch {
        self.count(|calls| calls + 1);
        Watch(self.clone())
    }

    fn count(&self, change: impl Fn(usize) -> usize) {
        let mut watched = self.0.lock();
        let before = watched.calls;
        watched.calls = change(before);
        let is_watched = watched.calls > 0;
        if is_watched != (before > 0)
            && let Some(stream) = &watched.stream
        {
            stream.watch(is_watched);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.count(|calls| calls - 1);
    }
}
