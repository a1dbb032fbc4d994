//! Tracks the adapters attached to a model's running engine. An adapter is attached at its first use. If all slots are
//! taken, the least recently used idle adapter is evicted.

use std::sync::Arc;

use engine::{AdapterId, ModelId};
use parking_lot::{Mutex, MutexGuard};
use protocol::AdapterName;
use tokio::sync::{Notify, OnceCell};

/// The adapters attached to a model's present engine.
#[derive(Debug)]
pub(crate) struct Adapters {
    most: usize,
    attachments: Mutex<Attachments>,
    /// Notified when an adapter is no longer used.
    freed: Notify,
}

/// The adapters of the present engine, attached or still to be removed.
#[derive(Debug, Default)]
struct Attachments {
    /// The engine that they are attached to; another engine has none of them.
    engine: Option<ModelId>,
    /// Least recently used first.
    attached: Vec<Attached>,
    /// Evicted, and still to be removed from the engine.
    evicted: Vec<AdapterId>,
}

#[derive(Debug)]
struct Attached {
    name: AdapterName,
    /// Empty while it is being attached.
    id: Arc<OnceCell<AdapterId>>,
    users: u32,
}

/// Marks an adapter as in use. The adapter stays attached while this lives.
#[derive(Debug)]
pub(crate) struct AdapterGuard {
    adapters: Arc<Adapters>,
    engine: ModelId,
    name: AdapterName,
    /// Filled by the first user.
    pub(crate) id: Arc<OnceCell<AdapterId>>,
}

impl Adapters {
    /// Creates an empty set for up to `most` adapters, at least one.
    pub(crate) fn new(most: u32) -> Arc<Self> {
        Arc::new(Self { most: most.max(1) as usize, attachments: Mutex::default(), freed: Notify::new() })
    }

    /// Replaces the engine. Earlier adapters are forgotten, and callers that wait for the old engine get `None`.
    pub(crate) fn begin(&self, engine: ModelId) {
        *self.attachments() = Attachments { engine: Some(engine), ..Attachments::default() };
        self.freed.notify_waiters();
    }

    /// Marks an adapter as in use, and makes it one of the attached ones. If the maximum is attached, evicts the least
    /// recently used idle adapter. Waits while all are in use. Returns `None` if the engine is not the present one.
    /// Cancel safe.
    pub(crate) async fn acquire(self: &Arc<Self>, engine: ModelId, name: &AdapterName) -> Option<AdapterGuard> {
        loop {
            // Subscribes before it checks, so that an adapter that is freed in between is not missed.
            let freed = self.freed.notified();
            {
                let mut attachments = self.attachments();
                if attachments.engine != Some(engine) {
                    return None;
                }
                if let Some(id) = attachments.take(name, self.most) {
                    return Some(AdapterGuard { adapters: self.clone(), engine, name: name.clone(), id });
                }
            }
            freed.await;
        }
    }

    /// Returns an adapter that must still be removed from the engine.
    pub(crate) fn evicted(&self, engine: ModelId) -> Option<AdapterId> {
        let attachments = self.attachments();
        if attachments.engine == Some(engine) { attachments.evicted.last().copied() } else { None }
    }

    /// Records that an adapter was removed from an engine.
    pub(crate) fn removed(&self, engine: ModelId, id: AdapterId) {
        let mut attachments = self.attachments();
        if attachments.engine == Some(engine) {
            attachments.evicted.retain(|evicted| *evicted != id);
        }
    }

    /// Returns the attached adapters.
    pub(crate) fn attached(&self, engine: ModelId) -> Vec<AdapterName> {
        let attachments = self.attachments();
        let ready = attachments.attached.iter().filter(|attached| attached.id.initialized());
        let names = ready.map(|attached| attached.name.clone());
        if attachments.engine == Some(engine) { names.collect() } else { Vec::new() }
    }

    fn attachments(&self) -> MutexGuard<'_, Attachments> {
        self.attachments.lock()
    }
}

impl Attachments {
    fn take(&mut self, name: &AdapterName, most: usize) -> Option<Arc<OnceCell<AdapterId>>> {
        let mut found = match self.attached.iter().position(|attached| attached.name == *name) {
            Some(position) => self.attached.remove(position),
            None => {
                if self.attached.len() >= most {
                    let idle = self.attached.iter().position(|attached| attached.users == 0)?;
                    self.evicted.extend(self.attached.remove(idle).id.get());
                }
                Attached { name: name.clone(), id: Arc::default(), users: 0 }
            }
        };
        found.users += 1;
        let id = found.id.clone();
        self.attached.push(found);
        Some(id)
    }
}

impl Drop for AdapterGuard {
    fn drop(&mut self) {
        {
            let mut attachments = self.adapters.attachments();
            if attachments.engine != Some(self.engine) {
                return;
            }
            if let Some(attached) = attachments.attached.iter_mut().find(|attached| attached.name == self.name) {
                attached.users = attached.users.saturating_sub(1);
            }
        }
        self.adapters.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ENGINE: ModelId = ModelId(1);

    fn name(text: &str) -> AdapterName {
        text.parse().expect("a name")
    }

    /// Creates the adapters of an engine.
    fn adapters(most: u32) -> Arc<Adapters> {
        let adapters = Adapters::new(most);
        adapters.begin(ENGINE);
        adapters
    }

    /// Leases an adapter and attaches it under this number if it is not attached yet.
    async fn attach(adapters: &Arc<Adapters>, text: &str, number: u64) -> AdapterGuard {
        let guard = adapters.acquire(ENGINE, &name(text)).await.expect("the engine is the present one");
        guard.id.get_or_init(|| async { AdapterId(number) }).await;
        guard
    }

    #[tokio::test]
    async fn the_adapter_unused_for_longest_makes_room() {
        let adapters = adapters(2);
        drop(attach(&adapters, "a", 1).await);
        drop(attach(&adapters, "b", 2).await);
        drop(attach(&adapters, "a", 9).await);
        assert_eq!(adapters.evicted(ENGINE), None);
        drop(attach(&adapters, "c", 3).await);
        assert_eq!(adapters.evicted(ENGINE), Some(AdapterId(2)));
        assert_eq!(adapters.attached(ENGINE), [name("a"), name("c")]);
        adapters.removed(ENGINE, AdapterId(2));
        assert_eq!(adapters.evicted(ENGINE), None);
    }

    #[tokio::test]
    async fn one_in_use_stays_and_whoever_wants_its_place_waits() {
        let adapters = adapters(1);
        let (first, second) = (attach(&adapters, "a", 1).await, attach(&adapters, "a", 9).await);
        assert_eq!(second.id.get(), Some(&AdapterId(1)), "attached once");
        let b = name("b");
        let mut other = Box::pin(adapters.acquire(ENGINE, &b));
        assert!((&mut other).now_or_never().is_none());
        drop(first);
        assert!((&mut other).now_or_never().is_none());
        drop(second);
        assert_eq!(other.await.expect("there is room").id.get(), None, "to be attached");
        assert_eq!(adapters.evicted(ENGINE), Some(AdapterId(1)));
    }

    #[tokio::test]
    async fn another_engine_has_none_of_them() {
        let adapters = adapters(1);
        let old = attach(&adapters, "a", 1).await;
        let (a, b) = (name("a"), name("b"));
        let mut waiting = Box::pin(adapters.acquire(ENGINE, &b));
        assert!((&mut waiting).now_or_never().is_none());
        let next = ModelId(2);
        adapters.begin(next);
        assert!(waiting.await.is_none(), "who waits for the old one waits in vain");
        assert_eq!(adapters.attached(next), []);
        let new = adapters.acquire(next, &a).await.expect("there is room");
        assert_eq!(new.id.get(), None);
        drop(old);
        assert!(adapters.acquire(next, &b).now_or_never().is_none(), "only its own place was given back");
    }
}
